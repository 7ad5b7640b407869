"""Hugging Face's tokenizer.json of a byte-level BPE: written, and read as what tiktoken needs to give the same ids.

A byte-level vocabulary spells each byte as a printable character. Which splits of text into words tiktoken may stand in
for is a table here; tests compare its ids with those of the `tokenizers` library, which encodes all else.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# The splits into words, in the form that tiktoken runs fastest; bpe:N is trained with GPT-2's.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
                  r"\s*[\r\n]|\s+(?!\S)|\s")
O200K_PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|"
                 r"'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|"
                 r"'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
FILE_REGEXES = {  # the regex of a Split in a tokenizer.json -> the pattern that splits alike
    # as save() writes it: to the library's Oniguruma {1,3}+ is "one or more times {1,3}", and {1,3} is the same here
    CL100K_PATTERN.replace("}+", "}"): CL100K_PATTERN,
    # Llama 3's and other conversions of cl100k
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
     r"\s+(?!\S)|\s+"): CL100K_PATTERN,
    O200K_PATTERN: O200K_PATTERN,
}

BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}  # the vocabulary of `bytes`
# The printable character that stands for each byte in the words of a byte-level vocabulary (GPT-2's encoder.py).
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF_CHAR = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def bytes_of_word(word: str) -> bytes:
    """The bytes that a word of a byte-level vocabulary stands for. Raises KeyError if it is no such word."""
    return bytes([BYTE_OF_CHAR[char] for char in word])


def word_of_bytes(token: bytes) -> str:
    return "".join([CHAR_OF_BYTE[byte] for byte in token])


@dataclass(frozen=True)
class Decoding:
    """How the words of a tokenizer.json spell text: what its decoder does to one word, and its model's byte_fallback.
    Without a decoder that is what the pre_tokenizer did to the text, undone."""

    steps: tuple[dict, ...]  # of the decoder; those that only look at neighbouring words change nothing here
    byte_fallback: bool  # <0xE4> is a byte
    unknown: str | int | None  # the word, or id, of all text that the vocabulary cannot spell

    @property
    def byte_level(self) -> bool:
        """Whether each word is the bytes that its characters stand for, wherever it stands."""
        return any(step["type"] == "ByteLevel" for step in self.steps)

    def spelling(self, word: str) -> bytes:
        """The text of one word, a mark at its start or end as a space; not of an added token, which is what it is."""
        if self.byte_level and BYTE_OF_CHAR.keys() >= set(word):
            return bytes_of_word(word)
        if self.byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", word):
            return bytes([int(word[3:5], 16)])
        for step in self.steps:
            match step:
                case {"type": "Metaspace", "replacement": mark}:
                    word = word.replace(mark, " ")
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    word = word.replace(old, new)
                case {"type": "WordPiece", "prefix": prefix}:
                    word = word.removeprefix(prefix)
                case {"type": "BPEDecoder", "suffix": suffix} if word.endswith(suffix):
                    word = word.removesuffix(suffix) + " "
        return word.encode()


def decoding_of(file: dict) -> Decoding:
    """The Decoding of a tokenizer.json. Raises KeyError, TypeError or AttributeError if it is none."""
    steps = tuple(_steps(file.get("decoder"), "decoders"))
    if not steps:
        steps = tuple(step for step in _steps(file.get("pre_tokenizer"), "pretokenizers")
                      if step["type"] in ("ByteLevel", "Metaspace"))
    model = file["model"]
    unknown = model.get("unk_token") if model.get("type") != "Unigram" else model.get("unk_id")
    return Decoding(steps, bool(model.get("byte_fallback")) or any(step["type"] == "ByteFallback" for step in steps),
                    unknown)


def _steps(part: dict | None, name: str) -> Iterator[dict]:
    """The steps of a part of the file, those of its Sequences one after the other."""
    if part is not None and part["type"] == "Sequence":
        for step in part[name]:
            yield from _steps(step, name)
    elif part is not None:
        yield part


def pair_of(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge  # up to tokenizers 0.19 "a b", since then ["a", "b"]


def recovered_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of more than one byte, in the order of their ranks: the pair that remains when
    the token's bytes are merged by all lower ranks (as in tiktoken's and transformers' conversions)."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = candidates.index(min(candidates))
            if candidates[i] >= rank:
                raise ValueError(f"token {token!r} cannot be made by merging two tokens of lower rank")
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def byte_level_file(vocab: dict[str, int], merges: Iterable[tuple[str, str]], pattern: str | None,
                     specials: dict[str, int]) -> str:
    """tokenizer.json of a byte-level BPE. Specials stand in the vocabulary too, which fixes their ids."""
    by_id = sorted((vocab | specials).items(), key=lambda item: item[1])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in by_id if token in specials]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": dict(by_id), "merges": [f"{a} {b}" for a, b in merges]}
    splits = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": pattern == GPT2_PATTERN}  # ByteLevel's own regex is GPT-2's
    if pattern not in (None, GPT2_PATTERN):
        regex = next(regex for regex, equal in FILE_REGEXES.items() if equal == pattern)
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        splits = {"type": "Sequence", "pretokenizers": [split, splits]}
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": splits, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": model}
    return json.dumps(file, ensure_ascii=False, indent=1) + "\n"


def ranks_and_pattern(file: dict, specials: dict[str, int]) -> tuple[dict[bytes, int], str | None]:
    """What tiktoken needs to give the ids of a file. Raises KeyError unless that is byte-level BPE without normalizer,
    split by a pattern of ours, whose merges make the tokens in the order of their ids."""
    model = file["model"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (model.get("type", "BPE") != "BPE" or any(map(model.get, options)) or file["normalizer"] is not None
            or not all(token["special"] for token in file["added_tokens"])):
        raise KeyError("model")
    pattern = _pattern_of(file["pre_tokenizer"])
    words = {word: i for word, i in model["vocab"].items() if word not in specials}
    ranks = {bytes_of_word(word): i for word, i in words.items()}
    merged = ["".join(pair_of(merge)) for merge in model["merges"]]
    merged = [word for word, _ in itertools.groupby(merged)]  # Llama 3 lists every pair that makes a token
    if (merged != sorted((word for word in words if len(word) > 1), key=words.get)
            or not ranks.keys() >= BYTE_RANKS.keys() or len({*ranks.values(), *specials.values()}) < len(ranks) + len(
                specials) or (pattern is None and ranks != BYTE_RANKS)
            or (model.get("ignore_merges") and len(words) < len(model["vocab"]))):  # text could become a special token
        raise KeyError("vocab")
    return ranks, pattern


def _pattern_of(splits: dict | None) -> str | None:
    """The pattern of a pre_tokenizer: ByteLevel, alone or behind a Split by a regex that we know. Raises KeyError."""
    match splits:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return None
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2_PATTERN
        case {"type": "Sequence", "pretokenizers": [one]}:
            return _pattern_of(one)
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]} if (
                    behavior, invert) in (("Isolated", False), ("Removed", True)):  # alike: all of a text matches
            return FILE_REGEXES[regex]
    raise KeyError("pre_tokenizer")


def token_before_text(processor: dict | None) -> str | None:
    """The special token that a post-processor puts before one text, also as a step of a Sequence."""
    match processor:
        case {"type": "Sequence", "processors": steps}:
            return next(filter(None, map(token_before_text, steps)), None)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": token}}, *_]}:
            return token
        case {"type": "RobertaProcessing" | "BertProcessing", "cls": [token, _]}:
            return token
    return None


def put_behind(part: object, *, text: bool) -> object:
    """A normalizer or pre_tokenizer for what stands behind a special token or, text=True, behind other text: without
    the space or SentencePiece's mark that it puts before a beginning. The library takes every call for a beginning."""
    if isinstance(part, list):
        return [put_behind(step, text=text) for step in part
                if not (text and isinstance(step, dict) and step.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    match part.get("type"):
        case "Prepend" if text:
            return None
        case "Metaspace" if text or part.get("prepend_scheme") == "first":
            part = {key: value for key, value in part.items() if key != "add_prefix_space"}
            return part | {"prepend_scheme": "never"}
        case "ByteLevel" if text:
            return part | {"add_prefix_space": False}
    return {key: put_behind(value, text=text) for key, value in part.items()}
