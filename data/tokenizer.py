"""Text to token ids and back: raw bytes, tiktoken's encodings, a BPE trained here, or any Hugging Face tokenizer.json.

Byte-level BPE without a normalizer, split into words as GPT-2, cl100k or o200k do, is encoded by tiktoken, all else by
the `tokenizers` library, which also trains `bpe:N`; each is imported where it is used. save() writes Hugging Face's
format whatever the kind, so a folder with a tokenizer.json works alone. Text that spells a special token is plain text.
Which special token ends a text is the `eos_token` of a tokenizer_config.json beside it, else the one by a known name.

Long texts. tiktoken slows down on very long pre-tokens, and fails beyond a million blanks in a row: its regex engine
runs out of stack (0.14.0). So a long text is encoded in pieces, cut only where the ids stay those of the whole (CUT),
and a stretch without such a place in overlapping windows; there a text made for the purpose may differ in a few ids.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import files
from config import UserError
from data.tokenizer_file import (
    BYTE_RANKS,
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    Decoding,
    byte_level_file,
    bytes_of_word,
    decoding_of,
    pair_of,
    put_behind,
    ranks_and_pattern,
    recovered_merges,
    token_before_text,
    word_of_bytes,
)

END_OF_TEXT = "<|endoftext|>"
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # what others call it: Llama 3, Llama 2, Gemma, BERT
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))  # by transformers

OPENAI = "https://openaipublic.blob.core.windows.net"
TIKTOKEN_FILES = {  # what tiktoken downloads for a name
    "gpt2": (f"{OPENAI}/gpt-2/encodings/main/vocab.bpe", f"{OPENAI}/gpt-2/encodings/main/encoder.json"),
    **{name: (f"{OPENAI}/encodings/{name}.tiktoken",) for name in ("r50k_base", "cl100k_base", "o200k_base")},
}
DOWNLOAD_TIMEOUT_S = 5.0  # to find out that there is no network; tiktoken itself would wait for ever

# Places where a text may be cut: between a letter and space + letter, or after a newline that follows a non-blank and
# precedes a letter or digit (text without spaces, as Chinese, has no other). In all the patterns a match ends there
# whatever comes before, and looks no further.
CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W_])")
PIECE_CHARS = 1 << 18  # longer texts are cut; 2^18 blanks stay far below the regex engine's limit
MIN_BPE_IDS, MAX_BPE_IDS = 257, 1_000_000
TRAINING_CHARS = 1 << 16  # longer texts are cut to train a tokenizer, for the library holds 256 at a time
# Stretches of letters, digits, other characters or blanks that no split into words cuts. To train on they are cut up
# into words of LONGEST_WORD_CHARS and thinned out: the library's time and memory grow with the different words.
LONGEST_WORD_CHARS = 84  # 252 bytes of Chinese, whole characters of 2, 3 or 4 bytes
UNBROKEN = re.compile("|".join(rf"(?<!{kind}){kind}{{256,}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"(?:_|[^\w\s])")))
MAY_BE_UNBROKEN = re.compile(r"(?<!\S)\S{256}|\s{256}")  # sooner seen
UNBROKEN_SAMPLE_CHARS = 1 << 16  # kept whole; then ever fewer: as many again each time that there are e times as many
PROBE = "Ab  É\n\tß\uff0c日本 1.5 e\u0301 🙂 an end\n"  # what a tokenizer that loses text does not give back
WINDOW_CHARS = 1 << 14  # of a stretch without a cut; BPE's time per character grows with the length of a pre-token


class TokenizerError(UserError):
    """A tokenizer that does not exist, cannot be read, downloaded or trained, or does not know an id."""


class Tokenizer:
    """Text <-> ids. Made by load_tokenizer() and train_bpe(), from ranks or around a tokenizer of the library (hf).

    ranks: token -> id, which is also the priority of its merge; pattern: the split into words, None = no split;
    end_of_text: the special token that ends a text, or its id, None = the one by a known name. Attributes: name;
    vocab_size, the highest id + 1; special_ids, the special tokens and their ids; eot, eot_token: end-of-text's id and
    spelling; bos_token: what the tokenizer.json puts before every text, or None; named: special tokens by
    transformers' names, those of tokenizer_config.json and these two, which templates see; start: the id before a text
    with nothing before it, bos_token's, else that of the named one or eot; strips: special token -> whether it takes
    the blanks on its left and on its right, None = none does; byte_level: any ids, decoded with decode_bytes, give the
    bytes of their text, one id after the other; cuttable: the ids of a text are those of its parts when it is cut at a
    CUT; unknown: the id of text that the vocabulary cannot spell, or None; added_ids: those of special and other added
    tokens.
    """

    def __init__(self, name: str, specials: dict[str, int], *, ranks: dict[bytes, int] | None = None,
                 pattern: str | None = None, hf=None, decoding: Decoding | None = None, file_text: str | None = None,
                 bos_token: str | None = None, end_of_text: str | int | None = None,
                 named: dict[str, str] | None = None, strips: dict[str, tuple[bool, bool]] | None = None):
        self.name, self.special_ids, self.bos_token = name, specials, bos_token
        self.eot_token = _end_of_text(name, specials, end_of_text)
        self.eot = specials[self.eot_token]
        self.added_ids = frozenset(specials.values())
        self.named = ({} if bos_token is None else {"bos_token": bos_token}) | (named or {}) | {
            "eos_token": self.eot_token}
        self.strips = strips or {}
        self.start = specials.get(bos_token or self.named.get("bos_token"), self.eot)
        self.cuttable = hf is None  # all the patterns may be cut
        self.byte_level, self.unknown = hf is None or decoding.byte_level, None
        self._ranks, self._pattern, self._hf = ranks, pattern, hf
        self._file_text = file_text  # a tokenizer.json that was read is written back as it was
        if hf is not None:
            self._hf_behind = {}  # made where they are asked for
            _without_special_tokens(hf)
            spelled = [(decoding.spelling(word), i) for word, i in hf.get_vocab(with_added_tokens=False).items()]
            added = hf.get_added_tokens_decoder()
            spelled += [(token.content.encode(), i) for i, token in added.items()]
            self.added_ids |= added.keys()
            self.unknown = hf.token_to_id(decoding.unknown) if isinstance(decoding.unknown, str) else decoding.unknown
        else:
            spelled = list(ranks.items())
            if pattern is not None:
                import tiktoken
                self._encoding = tiktoken.Encoding("flatgpt", pat_str=pattern, mergeable_ranks=ranks,
                                                   special_tokens=specials)
        spelled += [(token.encode(), i) for token, i in specials.items()]
        self.vocab_size = max(i for _, i in spelled) + 1
        if self.vocab_size > max(MAX_BPE_IDS, 64 * len(spelled)):  # one table of ids could fill the memory
            raise ValueError(f"id {self.vocab_size - 1} is far beyond its {len(spelled)} tokens")
        self._spellings = [b""] * self.vocab_size
        for token, i in spelled:
            self._spellings[i] = token
        self._token_bytes = np.array([len(token) for token in self._spellings], dtype=np.int32)
        self._token_bytes[list(specials.values())] = 0

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids; files of other spelling may still hold the same tokenizer."""
        ours, theirs = ((t._ranks, t._pattern, t.special_ids, t.eot) if t._hf is None else (t.fingerprint, t.eot)
                        for t in (self, other))
        return ours == theirs

    def encode(self, text: str, *, behind: str | None = None) -> np.ndarray:
        """Ids of the text, uint32 (n,); a lone surrogate counts as U+FFFD.

        They are those of tiktoken's encode_ordinary and of the `tokenizers` library for the whole text, except that
        windows (see the top) may change a few in a text made for the purpose. behind: what stands before it, "special"
        token or other "text", None = nothing: SentencePiece's kinds begin a text with a mark, and only that.
        """
        text = replace_surrogates(text)
        if self._hf is not None:
            hf = self._hf if behind is None else self._behind(behind)
            try:
                with _library_errors():
                    return np.array(hf.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
            except ValueError as error:  # text unknown to a model without an unknown token, a regex that backtracks
                raise TokenizerError(f"tokenizer {self.name!r} cannot encode {text[:40]!r}: {error}; mend its "
                                     f"{TOKENIZER_FILE}") from None
        if self._pattern is None or len(text) <= PIECE_CHARS:
            return self._encode_piece(text)
        parts = []
        for piece in pieces(text, PIECE_CHARS):
            parts.extend([self._encode_piece(piece)] if len(piece) <= 2 * PIECE_CHARS else self._encode_windows(piece))
        return np.concatenate(parts)

    def _encode_piece(self, text: str) -> np.ndarray:
        if self._pattern is None:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        return self._encoding.encode_to_numpy(text, disallowed_special=())  # twice as fast as encode_ordinary's list

    def _behind(self, what: str):
        """The library's tokenizer for what stands behind a special token or other text; most are the same."""
        if what not in self._hf_behind:
            file = json.loads(self._file_text)
            parts = {name: put_behind(file.get(name), text=what == "text") for name in ("normalizer", "pre_tokenizer")}
            is_same = all(file.get(name) == part for name, part in parts.items())
            self._hf_behind[what] = self._hf if is_same else _without_special_tokens(type(self._hf).from_str(
                json.dumps(file | parts)))
        return self._hf_behind[what]

    def _encode_windows(self, text: str) -> Iterator[np.ndarray]:
        """Ids of a text without a legal cut: each window keeps its first three quarters, the next one starts there.

        BPE merges on both sides of the end of a token are independent of each other, so the text after it gives the ids
        that it gives in the whole, as far as tokens do not depend on what follows a quarter of a window later.
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
        if not self.byte_level:
            return self._hf.decode(ids, skip_special_tokens=False)
        return b"".join(self._spellings[i] for i in ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text that ids stand for, special tokens left out. Unless byte_level, the UTF-8 of the text:
        the bytes of a part of the ids need not be a part of the bytes."""
        ids = self._known(ids)
        if not self.byte_level:
            return self._hf.decode(ids, skip_special_tokens=True).encode()
        return b"".join(self._spellings[i] for i in ids if self._token_bytes[i])

    def _known(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise TokenizerError(f"id {wrong} lies outside the {self.vocab_size} ids of tokenizer {self.name!r}; the "
                                 "data or model was made with another tokenizer")
        return ids

    def spelling(self, token: int) -> bytes:
        """The bytes of one token, of a special token too; b"" for an id that stands for nothing. Where the vocabulary
        does not spell bytes, a word's mark counts as a space."""
        return self._spellings[token] if 0 <= token < self.vocab_size else b""

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for (its spelling's), int32 (vocab_size,); 0 for special and unused ids."""
        return self._token_bytes.copy()

    def scored_bytes(self) -> np.ndarray:
        """token_bytes() for bits per byte, which mean something where the ids hold the whole text: -1 for the id of
        text that is unknown, and 0 for all others of a tokenizer that loses some (case, accents, blanks, ...)."""
        lengths = self._token_bytes * self._keeps_text
        if self.unknown is not None:
            lengths[self.unknown] = -1
        return lengths

    def spells(self, ids: np.ndarray, text: str) -> bool:
        """Whether ids hold all of a text: they give it back, up to Unicode's canonical equivalence (a normalizer NFC)
        and one space before it (a mark before the first word)."""
        ours, theirs = (unicodedata.normalize("NFC", t).removeprefix(" ") for t in (self.decode(ids), text))
        return ours == theirs

    @functools.cached_property
    def _keeps_text(self) -> bool:
        return self._hf is None or self.spells(self.encode(PROBE), PROBE)

    @functools.cached_property
    def file_text(self) -> str:
        """What save() writes: a Hugging Face tokenizer.json."""
        if self._file_text is None:
            vocab = {word_of_bytes(token): i for token, i in self._ranks.items()}
            merges = [(word_of_bytes(a), word_of_bytes(b)) for a, b in recovered_merges(self._ranks)]
            return byte_level_file(vocab, merges, self._pattern, self.special_ids)
        return self._file_text

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer.json as hex: the same for the same ids and merges."""
        return hashlib.sha256(self.file_text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write a Hugging Face tokenizer.json, whole or not at all; before it a tokenizer_config.json with the named
        tokens that it does not show itself, if there are any."""
        path = Path(path)
        config = path.with_name(TOKENIZER_CONFIG_FILE)
        shown = {"eos_token": _known_end(self.special_ids), "bos_token": self.bos_token}
        named = {name: token for name, token in self.named.items() if shown.get(name) != token}
        if named:
            files.write_whole(config, json.dumps(named, ensure_ascii=False) + "\n")
        else:
            config.unlink(missing_ok=True)
        files.write_whole(path, self.file_text)


def _without_special_tokens(hf):
    """The library's tokenizer, to which text that spells a special token is now plain text."""
    hf.encode_special_tokens = True
    hf.no_truncation()
    hf.no_padding()
    return hf


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can spell, as U+FFFD; a pair of them is the character it means."""
    try:
        text.isascii() or text.encode()  # ascii is known at once, encoding is a pass over the text
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at least `size` characters, cut at the first CUT after that; the last may be shorter."""
    start = 0
    while len(text) - start > size and (cut := CUT.search(text, start + size)):
        yield text[start:cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


# ---- Loading and training --------------------------------------------------------------------------------------------

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
    path = _tokenizer_path(name_or_path)
    with _reading(path, f"is not a Hugging Face {TOKENIZER_FILE}", "copy it again, or name another"):
        return _from_file_text(path.read_text(encoding="utf-8"), tokenizer_identity(name_or_path),
                               end_of_text=end_of_text, named=_configured(path))


@contextmanager
def _reading(path: Path, wrong: str, way_out: str) -> Iterator[None]:
    """Around reading a file: what it does not hold becomes one line."""
    try:
        yield
    except OSError as error:
        raise TokenizerError(f"tokenizer {error.filename or str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # not JSON, or not of the shape expected
        raise TokenizerError(f"tokenizer {str(path)!r} {wrong}: {type(error).__name__} {error}; {way_out}") from None


@contextmanager
def _library_errors() -> Iterator[None]:
    """What the `tokenizers` library raises, plain Exceptions and panics, which are none, as ValueError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(str(error).partition("\n")[0]) from None
        raise


def tokenizer_identity(name_or_path: str) -> str:
    """What tells tokenizers apart without loading them: the name, or of a file `tokenizer.json:<start of its sha256>`
    and after a + the end-of-text that its tokenizer_config.json names, unless that is a known name.

    Raises TokenizerError if there is no such file.
    """
    name_or_path = str(name_or_path)
    if (vocab_size := bpe_ids(name_or_path)) is not None:
        return f"bpe:{vocab_size}"
    if name_or_path == "bytes" or name_or_path in TIKTOKEN_FILES:
        return name_or_path
    path = _tokenizer_path(name_or_path)
    with _reading(path, "cannot be read", "copy it again"):
        name = f"{TOKENIZER_FILE}:{files.sha256(path)[:12]}"
    end = _configured(path).get("eos_token")
    return name if end in (None, END_OF_TEXT, *OTHER_ENDS) else f"{name}+{end}"


def bpe_ids(name: str) -> int | None:
    """N of bpe:N; None for another kind of name. Raises TokenizerError if N is none."""
    if not name.startswith("bpe:"):
        return None
    if not re.fullmatch("[0-9]+", name[4:]) or not MIN_BPE_IDS <= int(name[4:]) <= MAX_BPE_IDS:
        raise TokenizerError(f"tokenizer {name!r} should be bpe:N with N from {MIN_BPE_IDS} (the 256 bytes and "
                             f"end-of-text) to {MAX_BPE_IDS:,}, as in bpe:8192")
    return int(name[4:])


def _tokenizer_path(name_or_path: str) -> Path:
    """The tokenizer.json that a path means. Raises TokenizerError if there is none."""
    path = Path(name_or_path)
    if not path.exists():
        raise TokenizerError(f"tokenizer {name_or_path!r} is neither a name nor a file; there are bytes, bpe:N, "
                             f"{', '.join(TIKTOKEN_FILES)}, or the path of a {TOKENIZER_FILE} or of a run folder")
    if path.is_dir() and not (path / TOKENIZER_FILE).is_file():
        raise TokenizerError(f"tokenizer folder {name_or_path!r} holds no {TOKENIZER_FILE}; name a run folder, a "
                             "folder of shards or a Hugging Face model")
    return path / TOKENIZER_FILE if path.is_dir() else path


def _load_tiktoken(name: str) -> Tokenizer:
    import requests  # tiktoken depends on it
    import tiktoken
    default = str(Path(tempfile.gettempdir(), "data-gym-cache"))
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    cached = [hashlib.sha1(url.encode()).hexdigest() for url in TIKTOKEN_FILES[name]]
    try:
        if not all(Path(cache, file).exists() for file in cached):
            requests.head(TIKTOKEN_FILES[name][0], timeout=DOWNLOAD_TIMEOUT_S)
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong checksum
        raise TokenizerError(
            f"tokenizer {name!r} is not on this machine and cannot be downloaded ({type(error).__name__}); fetch it "
            f"where there is a network (TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; "
            f"tiktoken.get_encoding('{name}')\"), copy DIR here (it holds {' and '.join(cached)}, the sha1 of the "
            "file's URL) and set TIKTOKEN_CACHE_DIR to it; or use bpe:N, trained on your text, or bytes, which need no "
            "download") from None
    pattern = {"cl100k_base": CL100K_PATTERN, "o200k_base": O200K_PATTERN}.get(name, GPT2_PATTERN)
    return Tokenizer(name, dict(encoding._special_tokens), ranks=encoding._mergeable_ranks, pattern=pattern)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of vocab_size ids, end-of-text (the last) included, with GPT-2's split into words.

    The same texts give the same tokenizer. Raises TokenizerError if they are too small for so many ids.
    """
    bpe_ids(f"bpe:{vocab_size}")
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers
    hf = HuggingFace(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=[], show_progress=sys.stderr.isatty(),
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    hf.train_from_iterator(_training_pieces(map(replace_surrogates, texts)), trainer)
    ids = hf.get_vocab_size() + 1
    if ids < vocab_size:
        raise TokenizerError(f"tokenizer 'bpe:{vocab_size}': the training text yields only {ids} ids; use bpe:{ids} or "
                             "fewer, or more text")
    model, specials = json.loads(hf.to_str())["model"], {END_OF_TEXT: vocab_size - 1}
    return Tokenizer(f"bpe:{vocab_size}", specials, pattern=GPT2_PATTERN,
                     ranks={bytes_of_word(word): i for word, i in model["vocab"].items()},
                     file_text=byte_level_file(model["vocab"], map(pair_of, model["merges"]), GPT2_PATTERN, specials))


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in short pieces, unbroken stretches thinned out."""
    unbroken = kept = 0  # characters in such stretches so far
    for text in texts:
        for piece in pieces(text, TRAINING_CHARS):
            end = 0
            for found in UNBROKEN.finditer(piece) if MAY_BE_UNBROKEN.search(piece) else ():
                yield piece[end:found.start()]
                end = found.end()
                for start in range(found.start(), end, LONGEST_WORD_CHARS):
                    word = piece[start:min(start + LONGEST_WORD_CHARS, end)]
                    unbroken += len(word)
                    if kept < UNBROKEN_SAMPLE_CHARS * (1 + math.log(max(1.0, unbroken / UNBROKEN_SAMPLE_CHARS))):
                        kept += len(word)
                        yield word
            yield from (piece[start:start + 2 * TRAINING_CHARS]
                        for start in range(end, len(piece), 2 * TRAINING_CHARS))


def _end_of_text(name: str, specials: dict[str, int], given: str | int | None) -> str:
    """End-of-text as it is spelled: the given token, else the first known name. A given id that no special token has
    (configs are careless with it) counts as not given."""
    if isinstance(given, str) and given not in specials:
        raise TokenizerError(f"tokenizer {name!r}: {TOKENIZER_CONFIG_FILE} names eos_token {given!r}, which is none of "
                             f"its special tokens ({', '.join(specials)}); correct one of the two")
    found = next((token for token, i in specials.items() if given in (token, i)), _known_end(specials))
    if found is None:
        raise TokenizerError(f"tokenizer {name!r} has no end-of-text token among its special tokens "
                             f"({', '.join(specials)}); name one as eos_token in a {TOKENIZER_CONFIG_FILE} beside it, "
                             f"or add {END_OF_TEXT} to its added_tokens")
    return found


def _known_end(specials: dict[str, int]) -> str | None:
    return next((token for token in (END_OF_TEXT, *OTHER_ENDS) if token in specials), None)


def _configured(path: Path) -> dict[str, str]:
    """The NAMED tokens of the tokenizer_config.json beside a tokenizer.json; none without one."""
    config = path.with_name(TOKENIZER_CONFIG_FILE)
    if path.name != TOKENIZER_FILE or not config.exists():
        return {}
    with _reading(config, "cannot be read as Hugging Face's", "copy it again"):
        table = files.parse_json(config.read_text(encoding="utf-8"))
        tokens = {name: table.get(name) for name in NAMED}
        tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


# ---- Hugging Face's files --------------------------------------------------------------------------------------------

def from_vocab_and_merges(folder: Path, *, end_of_text: int | None = None) -> Tokenizer:
    """GPT-2's tokenizer from its older files: vocab.json, merges.txt and, if there is one, added_tokens.json.

    end_of_text as for load_tokenizer. Raises TokenizerError.
    """
    folder = Path(folder)
    with _reading(folder / "vocab.json", "and merges.txt are not those of a byte-level BPE such as GPT-2's",
                  f"put a {TOKENIZER_FILE} beside them"):
        added = folder / "added_tokens.json"
        specials = files.parse_json(added.read_text(encoding="utf-8")) if added.exists() else {}
        vocab = files.parse_json((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        specials = {token: i for token, i in vocab.items() if token == END_OF_TEXT} | specials
        for word in itertools.chain(vocab.keys() - specials.keys(), *merges):
            bytes_of_word(word)  # raises KeyError
        text = byte_level_file(vocab, merges, GPT2_PATTERN, specials)
        name = f"{TOKENIZER_FILE}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return _from_file_text(text, name, end_of_text=end_of_text, named=_configured(folder / TOKENIZER_FILE))


def _from_file_text(text: str, name: str, *, end_of_text: int | None = None,
                    named: dict[str, str] | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json: encoded by tiktoken if that gives the same ids, else by `tokenizers`."""
    file = files.parse_json(text)
    named_only = [t for t in file["added_tokens"] if not t["special"] and t["content"] in (named or {}).values()]
    if named_only:  # special tokens by the config beside the file alone, which transformers takes as such
        for token in named_only:
            token["special"] = True
        text = json.dumps(file, ensure_ascii=False, indent=1) + "\n"
    specials = {t["content"]: t["id"] for t in file["added_tokens"] if t["special"]}
    options = {"file_text": text, "bos_token": token_before_text(file.get("post_processor")),
               "end_of_text": (named or {}).get("eos_token", end_of_text), "named": named,
               "strips": {t["content"]: (t["lstrip"], t["rstrip"]) for t in file["added_tokens"] if t["special"]}}
    try:
        ranks, pattern = ranks_and_pattern(file, specials)
    except KeyError:
        from tokenizers import Tokenizer as HuggingFace
        with _library_errors():
            hf = HuggingFace.from_str(text)
        for token in file["added_tokens"]:  # the library numbers them anew where ids before them are missing
            if (found := hf.token_to_id(token["content"])) != token["id"]:
                raise ValueError(f"added token {token['content']!r} has id {token['id']}, but the library makes it "
                                 f"{found}: ids before it are missing") from None
        return Tokenizer(name, specials, hf=hf, decoding=decoding_of(file), **options)
    return Tokenizer(name, specials, ranks=ranks, pattern=pattern, **options)
