"""Text to token ids and back: raw bytes, tiktoken's encodings, a BPE trained here, or any Hugging Face tokenizer.json.

Byte-level tokenizers (GPT-2's kind) are encoded by tiktoken, others by the `tokenizers` library, which also trains
`bpe:N`; each is imported where it is used. save() writes Hugging Face's format whatever the kind, so a folder with a
tokenizer.json works alone. Text that spells a special token is plain text. Which special token ends a text is the
`eos_token` of a tokenizer_config.json beside it, else the one by a known name. Nothing here knows files of text or
shards.

Long texts. tiktoken slows down on very long pre-tokens, and fails beyond a million blanks in a row: its regex engine
runs out of stack (0.14.0). So a long text is encoded in pieces, cut only where the ids provably stay those of the
whole (CUT), and a stretch without such a place in overlapping windows, see Tokenizer._encode_windows.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from config import UserError

END_OF_TEXT = "<|endoftext|>"
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # what others call it: Llama 3, Llama 2, Gemma, BERT
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

# GPT-2's split of text into words, the form that tiktoken runs fastest; bpe:N is trained with the same split.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}  # the vocabulary of `bytes`

OPENAI = "https://openaipublic.blob.core.windows.net"
TIKTOKEN_FILES = {  # what tiktoken downloads for a name
    "gpt2": (f"{OPENAI}/gpt-2/encodings/main/vocab.bpe", f"{OPENAI}/gpt-2/encodings/main/encoder.json"),
    "r50k_base": (f"{OPENAI}/encodings/r50k_base.tiktoken",),
    "cl100k_base": (f"{OPENAI}/encodings/cl100k_base.tiktoken",),
    "o200k_base": (f"{OPENAI}/encodings/o200k_base.tiktoken",),
}
DOWNLOAD_TIMEOUT_S = 5.0  # to find out that there is no network; tiktoken itself would wait for ever

# Places where a text may be cut: between a letter and space + letter, or after a newline that follows a non-blank and
# precedes a letter or digit (text without spaces, as Chinese, has no other). In the patterns of GPT-2, cl100k, o200k
# and their kin a match ends there whatever comes before, and looks no further. pattern_allows_cuts() checks a pattern.
CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W_])")
PIECE_CHARS = 1 << 18  # longer texts are cut; 2^18 blanks stay far below the regex engine's limit
WINDOW_CHARS = 1 << 14  # of a stretch without a cut; BPE's time per character grows with the length of a pre-token
CUT_PROBES_LEFT = ("a", "A", "aB", "Ab", "é", "中", "don't", "x's", "'l", " a", "\n\na", "1a", "!a", "ß", "ǅ", "-\ta")
CUT_PROBES_RIGHT = (" b", " B", " bC", " é", " 中", " b's", " b ", " b1", " b\n", " b  c")
LINE_PROBES_LEFT = ("a\n", ".\n", "中\n", "1\n", ".'\n", "x'\n", "=\n", "\n\na\n", "\r\na\n")
LINE_PROBES_RIGHT = ("b", "1", "中", "b c", "1\n", "12\n\n")


class TokenizerError(UserError):
    """A tokenizer that does not exist, cannot be read, downloaded or trained, or does not know an id."""


class Tokenizer:
    """Text <-> ids. Attributes: name, vocab_size (highest id + 1), eot (id of end-of-text).

    Made by load_tokenizer() and train_bpe(), as byte-level (ranks given) or around the `tokenizers` library (hf given).
    ranks: token -> id, which is also the priority of its merge; pattern: the split into words, None = no split;
    end_of_text: the special token that ends a text, or its id, None = the one by a known name.
    """

    def __init__(self, name: str, specials: dict[str, int], *, ranks: dict[bytes, int] | None = None,
                 pattern: str | None = None, hf=None, file_text: str | None = None,
                 end_of_text: str | int | None = None):
        self.name = name
        self.eot = _end_of_text(name, specials, end_of_text)
        self._specials, self._ranks, self._pattern, self._hf = specials, ranks, pattern, hf
        self._file_text = file_text  # a tokenizer.json that was read is written back as it was
        vocab = ranks if ranks is not None else hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(max(vocab.values()), max(specials.values())) + 1
        if hf is not None:
            self._encode_piece, self._cuts = _hugging_face_encoder(hf), False
        elif ranks == BYTE_RANKS:
            self._encode_piece, self._cuts = _encode_bytes, False
        else:
            self._encode_piece, self._cuts = _tiktoken_encoder(ranks, pattern, specials), pattern_allows_cuts(pattern)

    @property
    def cuttable(self) -> bool:
        """Whether the ids of a text are those of its parts when it is cut at a CUT."""
        return self._cuts or self._ranks == BYTE_RANKS

    @property
    def byte_level(self) -> bool:
        """Whether any ids, decoded with decode_bytes, give the bytes of their text, one id after the other."""
        return self._ranks is not None

    @property
    def special_ids(self) -> dict[str, int]:
        """The special tokens and their ids; text that spells one is encoded as plain text all the same."""
        return dict(self._specials)

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids; files of other spelling may still hold the same tokenizer."""
        if self._ranks is None or other._ranks is None:
            return (self.fingerprint, self.eot) == (other.fingerprint, other.eot)
        return (self._ranks, self._specials, self._pattern, self.eot) == (
            other._ranks, other._specials, other._pattern, other.eot)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, uint32 (n,): those of tiktoken's encode_ordinary of the whole, for any length.

        A lone surrogate counts as U+FFFD. A tokenizer whose pattern allows no cuts encodes the text in one go.
        """
        text = replace_surrogates(text)
        if not self._cuts or len(text) <= PIECE_CHARS:
            return self._encode_piece(text)
        parts = []
        for piece in pieces(text, PIECE_CHARS):
            parts.extend([self._encode_piece(piece)] if len(piece) <= 2 * PIECE_CHARS else self._encode_windows(piece))
        return np.concatenate(parts)

    def _encode_windows(self, text: str) -> Iterator[np.ndarray]:
        """Ids of a text without a legal cut: each window keeps its first three quarters, the next one starts there.

        Exact as far as tokens do not depend on what follows a quarter of a window later: BPE merges on both sides of
        the end of a token are independent of each other, so the text after it gives the ids that it gives in the whole.
        Runs of one character are (tested); a text made for the purpose may differ in a few ids at a window's end.
        """
        start = 0
        while len(text) - start > WINDOW_CHARS:
            window = text[start:start + WINDOW_CHARS]
            ids, data = self._encode_piece(window), window.encode()
            ends = np.cumsum(self._token_bytes[ids])
            ends = ends[:np.searchsorted(ends, len(data) * 3 // 4)]  # of the tokens that may be kept, in bytes
            whole = np.flatnonzero(np.frombuffer(data, np.uint8)[ends] & 0xC0 != 0x80)  # not inside a character
            if len(whole):
                yield ids[:whole[-1] + 1]
                start += len(data[:ends[whole[-1]]].decode())
            else:  # every token ends inside a character: cut there all the same
                yield self._encode_piece(window[:WINDOW_CHARS // 2])
                start += WINDOW_CHARS // 2
        yield self._encode_piece(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens as they are spelled, bytes that are no UTF-8 as U+FFFD."""
        ids = self._known(ids)
        if self._hf is not None:
            return self._hf.decode(ids, skip_special_tokens=False)
        spelled = self._spelled_specials
        return b"".join(spelled.get(i) or self._bytes_of_id[i] for i in ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text that ids stand for, special tokens left out; exact for a byte-level tokenizer.

        Otherwise the UTF-8 of the decoded text, where the bytes of a part need not be a part of the bytes.
        """
        ids = self._known(ids)
        if self._hf is not None:
            return self._hf.decode(ids, skip_special_tokens=True).encode()
        return b"".join(self._bytes_of_id[i] for i in ids)

    def spelling(self, token: int) -> bytes:
        """The bytes of one token, of a special token too; b"" for an id that stands for nothing.

        Of a tokenizer that is not byte-level from the spelling of the token (a word's mark counts as a space).
        """
        if not 0 <= token < self.vocab_size:
            return b""
        return self._spelled_specials.get(token) or self._bytes_of_id[token]

    def _known(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise TokenizerError(f"id {wrong} lies outside the {self.vocab_size} ids of tokenizer {self.name!r}; the "
                                 "data or model was made with another tokenizer")
        return ids

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 (vocab_size,); 0 for special tokens and unused ids.

        Exact for a byte-level tokenizer; otherwise from the spelling of the token (a word's mark counts as a space).
        """
        return self._token_bytes.copy()

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self._bytes_of_id], dtype=np.int32)

    @functools.cached_property
    def _bytes_of_id(self) -> list[bytes]:
        texts = [b""] * self.vocab_size
        if self._ranks is not None:
            for token, i in self._ranks.items():
                texts[i] = token
        else:
            for token, i in self._hf.get_vocab(with_added_tokens=True).items():
                texts[i] = b"" if token in self._specials else _bytes_of_spelling(token)
        return texts

    @functools.cached_property
    def _spelled_specials(self) -> dict[int, bytes]:
        return {i: token.encode() for token, i in self._specials.items()}

    @functools.cached_property
    def file_text(self) -> str:
        """What save() writes: a Hugging Face tokenizer.json."""
        if self._file_text is None:
            return _byte_level_file(self._ranks, recovered_merges(self._ranks), self._pattern, self._specials)
        return self._file_text

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer.json as hex: the same for the same ids and merges."""
        return hashlib.sha256(self.file_text.encode()).hexdigest()

    @functools.cached_property
    def bos_token(self) -> str | None:
        """The special token that the tokenizer.json puts before every text (Llama's do), None if it puts none."""
        return _token_before_text(json.loads(self.file_text).get("post_processor"))

    @property
    def start(self) -> int:
        """The id that stands before a text with nothing before it: bos_token's, else end-of-text."""
        return self._specials.get(self.bos_token, self.eot)

    @property
    def eot_token(self) -> str:
        """End-of-text as it is spelled."""
        return next(token for token, i in self._specials.items() if i == self.eot)

    def save(self, path: Path) -> None:
        """Write a Hugging Face tokenizer.json, whole or not at all; before it a tokenizer_config.json with the
        eos_token, if that does not show from the special tokens' names."""
        path = Path(path)
        config = path.with_name(TOKENIZER_CONFIG_FILE)
        if _known_end(self._specials) == self.eot_token:
            config.unlink(missing_ok=True)
        else:
            _write_whole(config, json.dumps({"eos_token": self.eot_token}, ensure_ascii=False).encode() + b"\n")
        _write_whole(path, self.file_text.encode())


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can spell, as U+FFFD; a pair of them is the character it means."""
    if text.isascii():  # known at once, where encoding is a pass over the text
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at least `size` characters, cut at the first CUT after that; the last may be shorter."""
    start = 0
    while len(text) - start > size:
        cut = CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start:cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


def pattern_allows_cuts(pattern: str | None) -> bool:
    """Whether a match of the pattern ends at every CUT, tried on a few letters, digits and blanks around one."""
    if pattern is None:
        return False
    import regex  # tiktoken depends on it
    compiled = regex.compile(pattern)
    probes = [(left, right) for left in CUT_PROBES_LEFT for right in CUT_PROBES_RIGHT]
    probes += [(left, right) for left in LINE_PROBES_LEFT for right in LINE_PROBES_RIGHT]
    return all(compiled.findall(left) + compiled.findall(right) == compiled.findall(left + right)
               for left, right in probes)


# ----------------------------------------------------------------------------------------------------------------------
# The three ways to encode a piece: str -> uint32 (n,)

def _encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)


def _tiktoken_encoder(ranks: dict[bytes, int], pattern: str, specials: dict[str, int]) -> Callable[[str], np.ndarray]:
    import tiktoken
    encoding = tiktoken.Encoding("flatgpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    return functools.partial(encoding.encode_to_numpy, disallowed_special=())  # twice as fast as encode_ordinary's list


def _hugging_face_encoder(hf) -> Callable[[str], np.ndarray]:
    hf.encode_special_tokens = True  # text that spells a special token is plain text
    hf.no_truncation()
    hf.no_padding()
    return lambda text: np.array(hf.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


# ----------------------------------------------------------------------------------------------------------------------
# Loading and training

def load_tokenizer(name_or_path: str, *, end_of_text: int | None = None) -> Tokenizer:
    """The tokenizer of a name (bytes, gpt2, r50k_base, cl100k_base, o200k_base) or of a tokenizer.json.

    The file may be given itself or as the folder that holds it: a run, shards, a Hugging Face model. end_of_text: its
    id, for a file whose tokenizer_config.json names none. Raises TokenizerError.
    """
    name_or_path = str(name_or_path)
    if name_or_path == "bytes":
        return Tokenizer("bytes", {END_OF_TEXT: 256}, ranks=BYTE_RANKS)
    if name_or_path in TIKTOKEN_FILES:
        return _load_tiktoken(name_or_path)
    if name_or_path.startswith("bpe:"):
        raise TokenizerError(f"tokenizer {name_or_path!r} must be trained on text first; prepare data with it "
                             "(data.source, or python -m data.prepare) and name the folder of shards or the run")
    path = tokenizer_path(name_or_path)
    try:
        return _from_file_text(path.read_text(encoding="utf-8"), tokenizer_identity(name_or_path),
                               end_of_text=_configured_end(path) or end_of_text)
    except OSError as error:
        raise TokenizerError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not of the shape expected
        raise TokenizerError(f"tokenizer {str(path)!r} is not a Hugging Face tokenizer.json: "
                             f"{type(error).__name__} {error}; copy it again, or name another") from None


def tokenizer_identity(name_or_path: str) -> str:
    """What tells tokenizers apart without loading them: the name, or of a file `tokenizer.json:<start of its sha256>`
    and after a + the end-of-text that its tokenizer_config.json names, unless that is a known name.

    Raises TokenizerError if there is no such file.
    """
    name_or_path = str(name_or_path)
    if name_or_path == "bytes" or name_or_path in TIKTOKEN_FILES or name_or_path.startswith("bpe:"):
        return name_or_path
    path = tokenizer_path(name_or_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"tokenizer {name_or_path!r} cannot be read: {error.strerror}") from None
    end = _configured_end(path)
    return f"{TOKENIZER_FILE}:{hashlib.sha256(content).hexdigest()[:12]}" + (
        "" if end in (None, END_OF_TEXT, *OTHER_ENDS) else f"+{end}")


def tokenizer_path(name_or_path: str) -> Path:
    """The tokenizer.json that a path means. Raises TokenizerError if there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if (path / TOKENIZER_FILE).is_file():
        return path / TOKENIZER_FILE
    if path.is_dir():
        raise TokenizerError(f"tokenizer folder {name_or_path!r} holds no {TOKENIZER_FILE}; name a run folder, a "
                             "folder of shards or a Hugging Face model")
    raise TokenizerError(f"tokenizer {name_or_path!r} is neither a name nor a file; there are bytes, bpe:N, "
                         f"{', '.join(TIKTOKEN_FILES)}, or the path of a {TOKENIZER_FILE} or of a run folder")


def _load_tiktoken(name: str) -> Tokenizer:
    import requests  # tiktoken depends on it
    import tiktoken
    cache = _tiktoken_cache()
    missing = [url for url in TIKTOKEN_FILES[name] if cache is None or not (cache / _cache_name(url)).exists()]
    try:
        if missing:
            requests.head(missing[0], timeout=DOWNLOAD_TIMEOUT_S)
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong checksum
        files = " and ".join(_cache_name(url) for url in TIKTOKEN_FILES[name])
        raise TokenizerError(
            f"tokenizer {name!r} is not on this machine and cannot be downloaded ({type(error).__name__}); fetch it "
            f"where there is a network (TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; "
            f"tiktoken.get_encoding('{name}')\"), copy DIR here (it holds {files}, the sha1 of the file's URL) and set "
            "TIKTOKEN_CACHE_DIR to it; or use bpe:N, trained on your text, or bytes, which need no download") from None
    return Tokenizer(name, dict(encoding._special_tokens), ranks=encoding._mergeable_ranks, pattern=encoding._pat_str)


def _tiktoken_cache() -> Path | None:
    """The folder where tiktoken keeps downloads; None if it keeps none."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        return Path(tempfile.gettempdir(), "data-gym-cache")
    return Path(folder) if folder else None


def _cache_name(url: str) -> str:
    return hashlib.sha1(url.encode()).hexdigest()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of vocab_size ids, end-of-text (the last) included, with GPT-2's split into words.

    The same texts give the same tokenizer; texts should be short (the library holds 256 at a time). Raises
    TokenizerError if the texts are too small for so many ids.
    """
    if vocab_size < 257:
        raise TokenizerError(f"tokenizer 'bpe:{vocab_size}' should have at least 257 ids: 256 bytes and end-of-text")
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers
    hf = HuggingFace(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=[], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    hf.train_from_iterator((replace_surrogates(text) for text in texts), trainer)
    ids = hf.get_vocab_size() + 1
    if ids < vocab_size:
        raise TokenizerError(f"tokenizer 'bpe:{vocab_size}': the training text yields only {ids} ids; use bpe:{ids} or "
                             "fewer, or more text")
    model = json.loads(hf.to_str())["model"]
    ranks = {_bytes_of_word(word): i for word, i in model["vocab"].items()}
    merges = [tuple(_bytes_of_word(part) for part in _merge_pair(merge)) for merge in model["merges"]]
    specials = {END_OF_TEXT: vocab_size - 1}
    return Tokenizer(f"bpe:{vocab_size}", specials, ranks=ranks, pattern=GPT2_PATTERN,
                     file_text=_byte_level_file(ranks, merges, GPT2_PATTERN, specials))


def _end_of_text(name: str, specials: dict[str, int], given: str | int | None) -> int:
    """The id of end-of-text: the given token's, or that of the first known name. A given id that no special token has
    (configs are careless with it) counts as not given."""
    if isinstance(given, str) and given not in specials:
        raise TokenizerError(f"tokenizer {name!r}: {TOKENIZER_CONFIG_FILE} names eos_token {given!r}, which is none of "
                             f"its special tokens ({', '.join(specials)}); correct one of the two")
    if isinstance(given, str) or given in specials.values():
        return specials.get(given, given)
    token = _known_end(specials)
    if token is None:
        raise TokenizerError(f"tokenizer {name!r} has no end-of-text token among its special tokens "
                             f"({', '.join(specials)}); name one as eos_token in a {TOKENIZER_CONFIG_FILE} beside it, "
                             f"or add {END_OF_TEXT} to its added_tokens")
    return specials[token]


def _known_end(specials: dict[str, int]) -> str | None:
    return next((token for token in (END_OF_TEXT, *OTHER_ENDS) if token in specials), None)


def _configured_end(path: Path) -> str | None:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json, None if there is none."""
    config = path.with_name(TOKENIZER_CONFIG_FILE)
    if path.name != TOKENIZER_FILE or not config.exists():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{str(config)!r} cannot be read as Hugging Face's ({type(error).__name__} {error}); copy "
                             "it again") from None
    return token if isinstance(token, str) else None


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json

@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's encoder.py), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


@functools.cache
def _char_of_byte() -> dict[int, str]:
    return {byte: char for char, byte in _byte_of_char().items()}


def _bytes_of_word(word: str) -> bytes:
    """The bytes that a word of a byte-level vocabulary stands for. Raises KeyError if it is no such word."""
    table = _byte_of_char()
    return bytes([table[char] for char in word])


def _word_of_bytes(token: bytes) -> str:
    table = _char_of_byte()
    return "".join([table[byte] for byte in token])


def _bytes_of_spelling(token: str) -> bytes:
    """The text of a token that is not byte-level: SentencePiece's mark is a space, <0xE4> a byte, ## a continuation."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("\u2581", " ").encode()


def _merge_pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge  # up to tokenizers 0.19 "a b", since then ["a", "b"]


def recovered_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of more than one byte, in the order of their ranks.

    It is the pair that remains when the token's bytes are merged by all lower ranks (as in tiktoken's and
    transformers' conversions).
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                candidates = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
                best = min(candidates)
                if best >= rank:
                    raise TokenizerError(f"token {token!r} cannot be made by merging two tokens of lower rank")
                i = candidates.index(best)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            merges.append((parts[0], parts[1]))
    return merges


def _byte_level_file(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], pattern: str | None,
                     specials: dict[str, int]) -> str:
    """tokenizer.json of a byte-level BPE. Specials stand in the vocabulary too, which fixes their ids."""
    vocab = {_word_of_bytes(token): i for token, i in ranks.items()} | specials
    by_id = sorted(vocab.items(), key=lambda item: item[1])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in by_id if token in specials]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": dict(by_id), "merges": [f"{_word_of_bytes(a)} {_word_of_bytes(b)}" for a, b in merges]}
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": _pre_tokenizer(pattern), "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": model}
    return json.dumps(file, ensure_ascii=False, indent=1) + "\n"


def _pre_tokenizer(pattern: str | None) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern is None:
        return byte_level
    if pattern == GPT2_PATTERN:  # Hugging Face's built-in split is GPT-2's
        return {**byte_level, "use_regex": True}
    # {1,3}+ is possessive to tiktoken but "one or more times {1,3}" to the library's Oniguruma; {1,3} is the same here
    split = {"type": "Split", "pattern": {"Regex": pattern.replace("}+", "}")}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def from_vocab_and_merges(folder: Path, *, end_of_text: int | None = None) -> Tokenizer:
    """GPT-2's tokenizer from its older files: vocab.json, merges.txt and, if there is one, added_tokens.json.

    end_of_text as for load_tokenizer. Raises TokenizerError.
    """
    folder = Path(folder)
    try:
        added = folder / "added_tokens.json"
        specials = json.loads(added.read_text(encoding="utf-8")) if added.exists() else {}
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        specials = {token: i for token, i in vocab.items() if token == END_OF_TEXT} | specials
        ranks = {_bytes_of_word(word): i for word, i in vocab.items() if word not in specials}
        pairs = [tuple(_bytes_of_word(part) for part in merge.split(" ")) for merge in merges]
        text = _byte_level_file(ranks, pairs, GPT2_PATTERN, specials)
        name = f"{TOKENIZER_FILE}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return _from_file_text(text, name, end_of_text=_configured_end(folder / TOKENIZER_FILE) or end_of_text)
    except OSError as error:
        raise TokenizerError(f"tokenizer file {str(error.filename)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"vocab.json and merges.txt in {str(folder)!r} are not those of a byte-level BPE such as "
                             f"GPT-2's: {type(error).__name__} {error}; put a {TOKENIZER_FILE} beside them") from None


def _from_file_text(text: str, name: str, *, end_of_text: str | int | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json: by tiktoken if that gives the same ids, else by the `tokenizers` library."""
    file = json.loads(text)
    specials = {t["content"]: t["id"] for t in file["added_tokens"] if t["special"]}
    if _is_byte_level(file):
        pattern = _pattern_of(file["pre_tokenizer"])
        ranks = {_bytes_of_word(word): i for word, i in file["model"]["vocab"].items() if word not in specials}
        tokenizer = Tokenizer(name, specials, ranks=ranks, pattern=pattern, file_text=text, end_of_text=end_of_text)
        if pattern in (None, GPT2_PATTERN) or _agrees(tokenizer, text):
            return tokenizer
    from tokenizers import Tokenizer as HuggingFace
    try:
        hf = HuggingFace.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(str(error)) from None
    return Tokenizer(name, specials, hf=hf, file_text=text, end_of_text=end_of_text)


def _is_byte_level(file: dict) -> bool:
    """Whether tiktoken can stand in: a byte-level BPE without normalizer, its merges in the order of their ids.

    Without a split into words only plain bytes can: tiktoken needs a pattern.
    """
    model, splits = file["model"], file["pre_tokenizer"]
    plain_bpe = model.get("type") == "BPE" and not any(
        model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                                   "byte_fallback"))
    if not plain_bpe or file["normalizer"] is not None or not all(t["special"] for t in file["added_tokens"]):
        return False
    if splits is None or not _has_one_split(splits):
        return False
    specials = {t["content"] for t in file["added_tokens"]}
    vocab = {word: i for word, i in model["vocab"].items() if word not in specials}
    if _pattern_of(splits) is None:
        return vocab == {_word_of_bytes(token): i for token, i in BYTE_RANKS.items()}
    words, alphabet = set(vocab), set(_byte_of_char())
    made = [vocab.get("".join(_merge_pair(merge)), -1) for merge in model["merges"]]
    return (alphabet <= words and all(alphabet.issuperset(word) for word in words)
            and made == sorted(made) and set(made) == {vocab[word] for word in words if len(word) > 1})


def _has_one_split(splits: dict) -> bool:
    """Whether a pre_tokenizer is ByteLevel alone, or one isolating Split by a regex and then ByteLevel."""
    steps = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return True
    return (len(steps) == 2 and steps[0]["type"] == "Split" and "Regex" in steps[0]["pattern"]
            and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] and steps[1].get("use_regex") is False)


def _pattern_of(splits: dict) -> str | None:
    if splits["type"] == "Sequence" and len(splits["pretokenizers"]) == 2:
        return splits["pretokenizers"][0]["pattern"]["Regex"]
    step = splits["pretokenizers"][0] if splits["type"] == "Sequence" else splits
    return GPT2_PATTERN if step.get("use_regex", True) else None


def _token_before_text(processor: dict | None) -> str | None:
    """The first special token of a TemplateProcessing for one text, also as a step of a Sequence."""
    steps = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    for step in steps:
        if step and step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


AGREEMENT_PROBE = ("It's we'LL I'd 12 1234567 3.14, x_1 = foo(bar)[0];\r\n\r\n\ttab  two   three    \n \n  x!?... --> "
                   "naïve Ünï e\u0301a\u0301 日本語。中文\n한국어 русский العربية हिन्दी 😀👨‍👩‍👧 \u00a0nbsp\u2003em "
                   "\x00\x1f\u200b camelCaseHTMLWord don’t ''s 'S ''' /// \n/path\n\n   end  ")


def _agrees(tokenizer: Tokenizer, text: str) -> bool:
    """Whether tiktoken gives the library's ids for a text that exercises the split; they read regexes differently."""
    from tokenizers import Tokenizer as HuggingFace
    expected = _hugging_face_encoder(HuggingFace.from_str(text))(AGREEMENT_PROBE)
    return np.array_equal(tokenizer.encode(AGREEMENT_PROBE), expected)
