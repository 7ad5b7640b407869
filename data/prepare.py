"""Text to token shards: `python -m data.prepare SOURCE ... --out DIR`, and what train.py calls to have its data ready.

Reads .txt, .jsonl (.gz, .zst), .parquet, folders of those, and Python's own library source; splits documents into
train and val; writes DIR/train_00000.bin, val_00000.bin, ..., tokenizer.json and, last, index.json. The bytes depend on
the text and the settings alone, not on paths, time or the number of workers. Files of tokens are shards.py's, ids
tokenizer.py's.

How it runs. The sources are cut into units of about 1 MB, in order. Worker processes read and encode units; this
process appends their tokens, in order, to one spool file per split, makes a shard of a spool that is full, and writes
.progress.json every few seconds: units done and bytes of each spool. After kill -9 the same command cuts the spools
back to what .progress.json says and goes on with the next unit. Memory holds a few units for each worker.

A document ends with end-of-text. Where the text is split by characters the cut may fall inside a document: its first
part, the end of train, then has no end-of-text, for the document did not end there; its rest starts val.
"""

import argparse
import codecs
import fcntl
import gzip
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import sysconfig
import threading
import time
import types
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from config import ConfigError, DataConfig, MachineError, UserError, exit_cleanly
from data.shards import INDEX_FILE, INDEX_FORMAT, MAX_SHARD_TOKENS, ShardWriter, load_index, verify, write_index
from data.tokenizer import (
    CUT,
    TIKTOKEN_FILES,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    pieces,
    replace_surrogates,
    tokenizer_identity,
    train_bpe,
)

STDLIB = "python-stdlib"
DEFAULT_TOKENIZER = "gpt2"
STDLIB_SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
KINDS = {".txt": ("txt", ""), ".jsonl": ("jsonl", ""), ".jsonl.gz": ("jsonl", "gz"), ".jsonl.zst": ("jsonl", "zst"),
         ".parquet": ("parquet", "")}
PACKED_RATIO = 4  # text bytes per byte of .gz or .zst, a guess for progress and sampling

UNIT_BYTES = 1 << 20
LONGEST_UNIT_BYTES = 1 << 24  # of a .txt without a place to cut; there it is cut all the same
SMALL_BYTES = 8 << 20  # below this, starting workers takes longer than they save
UNITS_PER_WORKER = 3  # encoded or waiting at a time
SEARCH_BYTES = 1 << 12  # read at a time to find a cut
CUT_CONTEXT_BYTES = 16  # a CUT looks at 3 characters
PARQUET_ROWS = 1024  # read at a time
SPOOL_BLOCK_BYTES = 1 << 24
CHECKPOINT_SECONDS = 5.0
FEW_DOCUMENTS = 100  # with fewer the text is split by characters
BPE_SAMPLE_BYTES = 200_000_000
BPE_TEXT_CHARS = 1 << 16

PROGRESS_FILE = ".progress.json"
LOCK_FILE = ".lock"
POLL_SECONDS = 1.0
NOTE_SECONDS = 30.0


def _print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class SourceError(UserError):
    """A source that does not exist, cannot be read, or holds no text."""


class Busy(UserError):
    """Another process is preparing the same folder."""


class PreparationStopped(MachineError):
    """should_stop() said so; what is done is kept, and the same call goes on."""


# ----------------------------------------------------------------------------------------------------------------------
# Sources: names -> files

@dataclass(frozen=True)
class TextFile:
    path: str
    name: str  # relative to its source, so that nothing depends on where the source lies
    kind: str  # txt, jsonl, parquet
    packing: str  # "", gz, zst
    bytes: int  # on disk

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        return self.bytes * (PACKED_RATIO if self.packing else 1)


def find_files(source: str) -> list[TextFile]:
    """The files of a source, in a fixed order. Raises SourceError if there is none or none can be used."""
    if source == STDLIB:
        return _stdlib_files()
    path = Path(source)
    try:
        if path.is_dir():
            files = [_text_file(p, p.relative_to(path).as_posix()) for p in _walk(path) if _kind(p)]
            files = [file for file in files if file.bytes]
            if not files:
                raise SourceError(f"source folder {source!r} holds no text: no file with a byte in it that ends in "
                                  f"{', '.join(KINDS)}")
            return files
        file = _text_file(path, path.name)
    except FileNotFoundError:
        raise SourceError(f"source {source!r} does not exist; name a file ({', '.join(KINDS)}), a folder of those, or "
                          f"{STDLIB}") from None
    except OSError as error:
        raise SourceError(f"source {source!r} cannot be read: {error.strerror}") from None
    if not _kind(path):
        raise SourceError(f"source {source!r} has an unknown suffix; it should end in one of {', '.join(KINDS)} (plain "
                          "text of another name: rename it to .txt)")
    if not file.bytes:
        raise SourceError(f"source {source!r} is empty")
    return [file]


def _walk(folder: Path) -> list[Path]:
    """Files below a folder, hidden ones left out, sorted by their parts."""
    paths = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths.extend(Path(parent, name) for name in names if not name.startswith("."))
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> tuple[str, str] | None:
    return next((kind for suffix, kind in KINDS.items() if path.name.lower().endswith(suffix)), None)


def _text_file(path: Path, name: str) -> TextFile:
    kind, packing = _kind(path) or ("txt", "")
    return TextFile(str(path), name, kind, packing, path.stat().st_size)


def _stdlib_files() -> list[TextFile]:
    """The running Python's library source without its tests, one document per .py file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in _walk(folder) if path.suffix == ".py"
             and STDLIB_SKIPPED.isdisjoint(path.relative_to(folder).parts[:-1])]
    files = [_text_file(path, path.relative_to(folder).as_posix()) for path in paths]
    if not files:
        raise SourceError(f"source {STDLIB!r}: {str(folder)!r} holds no .py files; name a text file instead")
    return [file for file in files if file.bytes]


def describe(source: str, files: list[TextFile]) -> dict:
    """What index.json says about a source: its name without its place, and names and sizes of its files as a hash."""
    listing = "".join(f"{file.name}\0{file.bytes}\n" for file in files)
    return {"name": source if source == STDLIB else Path(source).absolute().name, "files": len(files),
            "bytes": sum(file.bytes for file in files), "listing": hashlib.sha256(listing.encode()).hexdigest()[:16]}


# ----------------------------------------------------------------------------------------------------------------------
# Units: files -> tasks of about UNIT_BYTES, in order

@dataclass(frozen=True)
class Unit:
    """One task: whole documents, or a piece of one. `kind` says what it is and which fields say where it lies.

    txt: bytes [start, end) of one document; files: .txt files whose paths are `content`; jsonl: bytes [start, end) of
    rows, or unpacked rows in `content`; parquet: row group `start`; text: (a piece of) a row's text in `content`.
    """

    kind: str
    path: str
    bytes: int  # of source that it stands for, for the progress bar
    start: int = 0
    end: int = 0
    content: bytes | str | tuple[str, ...] = ""
    line: int = 0  # of the first row in its file, from 1; 0: not known
    invalid: int = 0  # sequences replaced in a text
    split: str | None = None  # None: the hash of each document decides
    ends: bool = True  # the document ends with this unit


def whole_document_units(files: Sequence[TextFile], split: str | None, *, val_fraction: float,
                         unit_bytes: int) -> Iterator[Unit]:
    """The units of files whose documents stay whole: all of one split, or (None) each document by its hash."""
    small: list[TextFile] = []
    for file in files:
        if file.kind == "txt" and file.bytes < UNIT_BYTES:
            small.append(file)
            if sum(f.bytes for f in small) >= UNIT_BYTES:
                yield _files_unit(small, split)
                small = []
            continue
        if small:  # the order of documents is that of the files
            yield _files_unit(small, split)
            small = []
        if file.kind == "txt":
            chosen = split or _split_of_digest(_digest_of_file(file), val_fraction)
            yield from _txt_units(file, 0, file.bytes, split=chosen, ends=True, unit_bytes=unit_bytes)
        else:
            yield from _row_units(file, split)
    if small:
        yield _files_unit(small, split)


def units_split_by_characters(files: Sequence[TextFile], *, val_fraction: float, text_field: str,
                              unit_bytes: int) -> Iterator[Unit]:
    """The units of a text whose last val_fraction of characters is val (nanoGPT's way)."""
    blocks = {file: list(_block_lengths(file, text_field)) for file in files}
    lengths = {file: sum(chars for chars, _ in blocks[file]) for file in files}
    train_left = int(sum(lengths.values()) * (1 - val_fraction))
    for file in files:
        if file.kind == "txt":
            cut = file.bytes if lengths[file] <= train_left else _byte_offset(file, blocks[file], train_left)
            yield from _txt_units(file, 0, cut, split="train", ends=cut == file.bytes, unit_bytes=unit_bytes)
            yield from _txt_units(file, cut, file.bytes, split="val", ends=True, unit_bytes=unit_bytes)
            train_left = max(0, train_left - lengths[file])
            continue
        for text, invalid in _row_documents(file, text_field):
            head, tail = text[:train_left], text[train_left:]
            yield from _text_units(file, head, split="train", ends=not tail, invalid=invalid, unit_bytes=unit_bytes)
            yield from _text_units(file, tail, split="val", ends=True, invalid=0 if head else invalid,
                                   unit_bytes=unit_bytes)
            train_left = max(0, train_left - len(text))


def _files_unit(files: list[TextFile], split: str | None) -> Unit:
    return Unit("files", files[0].path, sum(file.bytes for file in files), split=split,
                content=tuple(file.path for file in files))


def _text_units(file: TextFile, text: str, *, split: str, ends: bool, invalid: int, unit_bytes: int) -> Iterator[Unit]:
    start = 0
    for piece in pieces(text, unit_bytes):
        yield Unit("text", file.path, len(piece), content=piece, split=split, invalid=0 if start else invalid,
                   ends=ends and start + len(piece) == len(text))
        start += len(piece)


def _txt_units(file: TextFile, start: int, end: int, *, split: str, ends: bool, unit_bytes: int) -> Iterator[Unit]:
    """Bytes [start, end) of a .txt, cut where the ids of the parts are those of the whole (tokenizer.CUT)."""
    with _reading(file.path), open(file.path, "rb") as opened:
        while start < end:
            limit = min(end, start + unit_bytes + LONGEST_UNIT_BYTES)
            cut = _next_cut(opened, start + unit_bytes, limit)
            if cut is None:
                cut = end if limit == end else _character_start(opened, limit)
            yield Unit("txt", file.path, cut - start, start=start, end=cut, split=split, ends=ends and cut == end)
            start = cut


def _next_cut(opened: BinaryIO, start: int, end: int) -> int | None:
    """The byte offset of the first CUT in [start, end) of a UTF-8 file, if there is one."""
    while start < end:
        start = _character_start(opened, start)  # else the rest of a blank might pass for another character
        opened.seek(start)
        data = opened.read(min(SEARCH_BYTES, end - start))
        text = data.decode("utf-8", "surrogateescape")  # a byte that is no character becomes one, but no letter
        if cut := CUT.search(text):
            return start + len(text[:cut.start()].encode("utf-8", "surrogateescape"))
        if len(data) < SEARCH_BYTES:
            return None
        start += len(data) - CUT_CONTEXT_BYTES
    return None


def _character_start(opened: BinaryIO, offset: int) -> int:
    """The last byte offset up to `offset` (at least 3) where a character of a UTF-8 file starts."""
    opened.seek(offset - 3)
    data = opened.read(4)
    return next((offset - i for i in range(4) if len(data) == 4 and data[3 - i] & 0xC0 != 0x80), offset)


def _row_units(file: TextFile, split: str | None) -> Iterator[Unit]:
    """Units of a file with one document in each row."""
    if file.kind == "parquet":
        groups = _open_parquet(file.path).num_row_groups
        for group in range(groups):
            yield Unit("parquet", file.path, file.bytes // groups, start=group, split=split)
    elif file.packing:
        yield from _packed_units(file, split)
    else:
        with _reading(file.path), open(file.path, "rb") as opened:
            start = 0
            while start < file.bytes:
                opened.seek(start + UNIT_BYTES)
                opened.readline()
                end = min(opened.tell(), file.bytes)
                yield Unit("jsonl", file.path, end - start, start=start, end=end, split=split)
                start = end


def _packed_units(file: TextFile, split: str | None) -> Iterator[Unit]:
    """Rows of a .gz or .zst, unpacked here: such a file can only be read from its start."""
    line, rest, packed = 1, b"", 0
    with _reading(file.path), open(file.path, "rb") as opened:
        for block in itertools.chain(_unpacked(file, opened), [b"\n"]):  # the last row may lack its newline
            rest += block
            if len(rest) < UNIT_BYTES and block != b"\n":
                continue
            rows, newline, rest = rest.rpartition(b"\n")
            if newline:
                size, packed = (opened.tell() - packed) * PACKED_RATIO, opened.tell()
                yield Unit("jsonl", file.path, size, content=rows + newline, line=line, split=split)
                line += rows.count(b"\n") + 1


def _unpacked(file: TextFile, opened: BinaryIO) -> Iterator[bytes]:
    """The content of a .gz or .zst in blocks. Raises EOFError if it is cut short."""
    if file.packing == "gz":
        with gzip.GzipFile(fileobj=opened) as unpacked:
            while block := unpacked.read(UNIT_BYTES):
                yield block
        return
    with _needing("zstandard", file.path):
        import zstandard
    frame = None
    while data := opened.read(1 << 16):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends within a frame")


@contextmanager
def _needing(package: str, path: str) -> Iterator[None]:
    """Around the import of an optional package that reading a source needs."""
    try:
        yield
    except ImportError:
        raise SourceError(f"source {path!r} needs the package {package}, which is not installed: pip install "
                          f"{package}") from None


def _open_parquet(path: str):
    with _needing("pyarrow", path):
        import pyarrow.parquet
    with _reading(path):
        return pyarrow.parquet.ParquetFile(path)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what goes wrong while reading a source into one line that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are ValueErrors
        if getattr(error, "errno", None) and not isinstance(error, PermissionError):
            raise MachineError(f"reading {path!r} failed: {error.strerror}") from None
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise SourceError(f"source {path!r} cannot be read: {reason}; see that it is whole") from None


# ----------------------------------------------------------------------------------------------------------------------
# Documents: units -> texts

def documents(unit: Unit, text_field: str) -> Iterator[tuple[str, int]]:
    """(text, invalid UTF-8 sequences replaced by U+FFFD in it) of each document of a unit; empty ones are left out."""
    if unit.kind == "text":
        found = [(unit.content, unit.invalid)]
    elif unit.kind == "txt":
        found = map(_decoded, [_read_range(unit)])
    elif unit.kind == "files":
        found = (_decoded(_read_file(path)) for path in unit.content)
    elif unit.kind == "jsonl":
        found = _jsonl_documents(unit, text_field)
    else:
        found = _parquet_documents(unit, text_field)
    return (document for document in found if document[0])


def _row_documents(file: TextFile, text_field: str) -> Iterator[tuple[str, int]]:
    for unit in _row_units(file, None):
        yield from documents(unit, text_field)


def _read_file(path: str) -> bytes:
    with _reading(path):
        return Path(path).read_bytes()


def _read_range(unit: Unit) -> bytes:
    with _reading(unit.path), open(unit.path, "rb") as opened:
        opened.seek(unit.start)
        data = opened.read(unit.end - unit.start)
        if len(data) < unit.end - unit.start:
            raise EOFError("it became shorter meanwhile")
    return data


def _decoded(data: bytes) -> tuple[str, int]:
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def _jsonl_documents(unit: Unit, text_field: str) -> Iterator[tuple[str, int]]:
    rows = unit.content or _read_range(unit)
    for number, row in enumerate(rows.split(b"\n")):
        if not row.strip():
            continue
        line, invalid = _decoded(row)
        try:
            value = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"source {unit.path!r} line {_first_line(unit) + number} is not JSON: {error}") from None
        text = value.get(text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            found = f"fields {', '.join(value)}" if isinstance(value, dict) else line[:40]
            raise SourceError(f"source {unit.path!r} line {_first_line(unit) + number} has no text in a field "
                              f"{text_field!r}, only {found}; name the field (--text-field, data.text_field)")
        clean = replace_surrogates(text)  # JSON may spell them as \ud800
        yield clean, invalid + clean.count("\ufffd") - text.count("\ufffd")


def _first_line(unit: Unit) -> int:
    """The number of a unit's first row in its file, from 1."""
    if unit.line:
        return unit.line
    with open(unit.path, "rb") as opened:
        return 1 + sum(opened.read(min(UNIT_BYTES, unit.start - start)).count(b"\n")
                       for start in range(0, unit.start, UNIT_BYTES))


def _parquet_documents(unit: Unit, text_field: str) -> Iterator[tuple[str, int]]:
    file = _open_parquet(unit.path)
    names = file.schema_arrow.names
    kind = str(file.schema_arrow.field(text_field).type) if text_field in names else "nothing"
    if kind not in ("string", "large_string"):
        raise SourceError(f"source {unit.path!r} has no column {text_field!r} of text but {kind}, of its columns "
                          f"{', '.join(names)}; name the column (--text-field, data.text_field)")
    with _reading(unit.path):
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[unit.start], columns=[text_field]):
            for value in batch.column(0):
                if value.is_valid:
                    yield _decoded(value.as_buffer().to_pybytes())  # as_py() fails where it is not UTF-8


# ----------------------------------------------------------------------------------------------------------------------
# The split into train and val

@dataclass(frozen=True)
class Texts:
    """The files to prepare and how val is chosen: given, none, hash (of documents) or characters (the last ones)."""

    files: list[TextFile]
    val_files: list[TextFile]
    val_fraction: float
    text_field: str
    val_split: str

    @property
    def bytes(self) -> int:
        return sum(file.text_bytes for file in self.files + self.val_files)

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """All units, in order: the same at each call."""
        if self.val_split == "characters":
            yield from units_split_by_characters(self.files, val_fraction=self.val_fraction,
                                                 text_field=self.text_field, unit_bytes=unit_bytes)
            return
        split = None if self.val_split == "hash" else "train"
        for files, chosen in ((self.files, split), (self.val_files, "val")):
            yield from whole_document_units(files, chosen, val_fraction=self.val_fraction, unit_bytes=unit_bytes)


def choose_split(files: list[TextFile], val_files: list[TextFile], val_fraction: float, text_field: str) -> Texts:
    """How the texts are split. Raises SourceError if there is no text."""
    counted = _count_documents(files, text_field, limit=FEW_DOCUMENTS)
    for found, named in ((counted, files), (val_files and _count_documents(val_files, text_field, limit=1), val_files)):
        if named and not found:
            raise SourceError(f"source {named[0].path!r} holds no text: every row is empty")
    if val_files:
        val_split = "given"
    elif val_fraction == 0.0:
        val_split = "none"
    else:
        val_split = "hash" if counted == FEW_DOCUMENTS else "characters"
    return Texts(files, val_files, val_fraction, text_field, val_split)


def split_of(text: str, val_fraction: float) -> str:
    """train or val, by the hash of a document's text."""
    return _split_of_digest(hashlib.blake2b(text.encode(), digest_size=8).digest(), val_fraction)


def _split_of_digest(digest: bytes, val_fraction: float) -> str:
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def _decoded_blocks(file: TextFile) -> Iterator[tuple[str, int]]:
    """(text, byte offset behind it) of a .txt, a block at a time; invalid UTF-8 is replaced."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with _reading(file.path), open(file.path, "rb") as opened:
        while data := opened.read(UNIT_BYTES):
            text = decoder.decode(data)
            yield text, opened.tell() - len(decoder.getstate()[0])
        yield decoder.decode(b"", final=True), file.bytes


def _digest_of_file(file: TextFile) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for text, _ in _decoded_blocks(file):
        digest.update(text.encode())
    return digest.digest()


def _block_lengths(file: TextFile, text_field: str) -> Iterator[tuple[int, int]]:
    """(characters, byte offset behind them) of a file's blocks; of its documents, without offset, if it has rows."""
    found = _decoded_blocks(file) if file.kind == "txt" else ((text, 0) for text, _ in _row_documents(file, text_field))
    return ((len(text), end) for text, end in found)


def _byte_offset(file: TextFile, blocks: list[tuple[int, int]], chars: int) -> int:
    """The byte offset behind the first `chars` characters of a .txt that has more."""
    start = 0
    for length, end in blocks:
        if length >= chars:
            break
        chars, start = chars - length, end
    data = _read_range(Unit("txt", file.path, 0, start=start, end=end))
    decoder = codecs.getincrementaldecoder("utf-8")  # counts whole characters
    return start + bisect_left(range(len(data)), chars, key=lambda n: len(decoder("replace").decode(data[:n])))


def _count_documents(files: Sequence[TextFile], text_field: str, limit: int) -> int:
    """How many documents there are, up to limit, after which nothing more is read."""
    found = itertools.chain.from_iterable([None] if file.kind == "txt" else _row_documents(file, text_field)
                                          for file in files)
    return sum(1 for _ in itertools.islice(found, limit))


# ----------------------------------------------------------------------------------------------------------------------
# Encoding units, here or in worker processes

@dataclass
class Encoded:
    """The tokens of a unit's documents of one split."""

    tokens: bytearray  # in the shards' dtype
    text_bytes: int
    documents: int  # that end here


class Encoder:
    """Encodes units; each worker process has one."""

    def __init__(self, tokenizer: Tokenizer, *, val_fraction: float, text_field: str):
        self.tokenizer, self.val_fraction, self.text_field = tokenizer, val_fraction, text_field
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.token_bytes = tokenizer.token_bytes()

    def encode(self, unit: Unit) -> tuple[dict[str, Encoded], int]:
        """Tokens by split, and how many invalid UTF-8 sequences were replaced."""
        encoded: dict[str, Encoded] = {}
        end = np.array([self.tokenizer.eot], dtype=self.dtype)
        invalid_in_all = 0
        for text, invalid in documents(unit, self.text_field):
            split = unit.split or split_of(text, self.val_fraction)
            into = encoded.setdefault(split, Encoded(bytearray(), 0, 0))
            into.tokens += self.tokenizer.encode(text).astype(self.dtype).data
            into.text_bytes += len(text.encode())
            if unit.ends:
                into.tokens += end.data
                into.documents += 1
            invalid_in_all += invalid
        return encoded, invalid_in_all

    def counted(self, tokens: bytearray) -> Encoded:
        """Some of a unit's tokens, counted from their ids: text never encodes to end-of-text."""
        ids = np.frombuffer(tokens, self.dtype)
        return Encoded(tokens, int(self.token_bytes[ids].sum()), int(np.count_nonzero(ids == self.tokenizer.eot)))


_encoder: Encoder | None = None  # of a worker process


def _start_worker(tokenizer_file: str, val_fraction: float, text_field: str) -> None:
    global _encoder
    _encoder = Encoder(load_tokenizer(tokenizer_file), val_fraction=val_fraction, text_field=text_field)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, and they hold each other's end of its pipe."""
    import multiprocessing
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(unit: Unit) -> tuple[dict[str, Encoded], int]:
    return _encoder.encode(unit)


def _nothing() -> None:
    pass


@contextmanager
def _starting_workers() -> Iterator[None]:
    """While processes start: hide the main module, which each would import (train.py imports torch), and Ctrl-C.

    A process inherits the blocked signal; Ctrl-C then reaches this one alone, which ends them in order.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def encode_units(units: Iterator[Unit], encoder: Encoder, workers: int, tokenizer_file: Path) \
        -> Iterator[tuple[int, dict[str, Encoded], int]]:
    """(source bytes, tokens by split, invalid sequences) of each unit, in order; workers = 0: in this process."""
    if not workers:
        for unit in units:
            yield unit.bytes, *encoder.encode(unit)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    arguments = (str(tokenizer_file), encoder.val_fraction, encoder.text_field)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
    pending = deque()
    try:
        with _starting_workers():
            for _ in range(workers):
                pool.submit(_nothing)
        for unit in units:
            pending.append((unit.bytes, pool.submit(_encode_in_worker, unit)))
            if len(pending) >= UNITS_PER_WORKER * workers:
                size, future = pending.popleft()
                yield size, *future.result()
        while pending:
            size, future = pending.popleft()
            yield size, *future.result()
    except BrokenProcessPool:
        raise MachineError("a worker process died (out of memory?); give the same command again to go on, with fewer "
                           "--workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# The output folder

class SplitWriter:
    """The tokens of one split on their way into shards: in a spool file until they fill one."""

    def __init__(self, folder: Path, split: str, encoder: Encoder, shard_tokens: int, state: dict | None):
        self.folder, self.split, self.encoder, self.shard_tokens = folder, split, encoder, shard_tokens
        state = state or {"shards": [], "tokens": 0, "text_bytes": 0, "documents": 0}
        self.shards = list(state["shards"])  # finished ones, as index.json describes them
        self.tokens, self.text_bytes, self.documents = state["tokens"], state["text_bytes"], state["documents"]
        self._full_spools: list[Path] = []
        self._spool = open(self._spool_path(), "ab+")
        if self._spool.tell() < self.tokens * encoder.dtype.itemsize:
            raise UserError(f"spool {str(self._spool_path())!r} holds fewer bytes than {PROGRESS_FILE} says; remove the "
                            "folder and start again")
        self._spool.truncate(self.tokens * encoder.dtype.itemsize)

    def _spool_path(self) -> Path:
        return self.folder / f".{self.split}_{len(self.shards):05d}.part"

    def state(self) -> dict:
        """Make the spool durable; what __init__ needs to go on from here."""
        self._spool.flush()
        os.fsync(self._spool.fileno())
        return {"shards": self.shards, "tokens": self.tokens, "text_bytes": self.text_bytes,
                "documents": self.documents}

    def add(self, encoded: Encoded) -> None:
        """Append tokens; a shard that is full is finished, in the middle of a document if need be."""
        itemsize = self.encoder.dtype.itemsize
        while self.tokens + len(encoded.tokens) // itemsize > self.shard_tokens:
            room = (self.shard_tokens - self.tokens) * itemsize
            first = self.encoder.counted(encoded.tokens[:room])
            self._append(first)
            self.finish_shard()
            encoded = Encoded(encoded.tokens[room:], encoded.text_bytes - first.text_bytes,
                              encoded.documents - first.documents)
        self._append(encoded)

    def _append(self, encoded: Encoded) -> None:
        self._spool.write(encoded.tokens)
        self.tokens += len(encoded.tokens) // self.encoder.dtype.itemsize
        self.text_bytes += encoded.text_bytes
        self.documents += encoded.documents

    def finish_shard(self) -> None:
        """Make a shard of the spool and start the next. The old spool stays until remove_full_spools()."""
        writer = ShardWriter(self.folder / f"{self.split}_{len(self.shards):05d}.bin", self.encoder.dtype,
                             self.encoder.tokenizer.vocab_size)
        try:
            self._spool.seek(0)
            while block := self._spool.read(SPOOL_BLOCK_BYTES):
                writer.write(np.frombuffer(block, self.encoder.dtype))
            written = writer.close()
        except BaseException:
            writer.abort()
            raise
        self._spool.close()
        self._full_spools.append(self._spool_path())
        self.shards.append({"file": written["file"], "split": self.split, "tokens": written["tokens"],
                            "text_bytes": self.text_bytes, "documents": self.documents, "sha256": written["sha256"]})
        self.tokens = self.text_bytes = self.documents = 0
        self._spool = open(self._spool_path(), "wb+")

    def remove_full_spools(self) -> None:
        """To be called once .progress.json no longer needs them."""
        while self._full_spools:
            self._full_spools.pop().unlink(missing_ok=True)

    def close(self) -> None:
        with suppress(OSError):  # on a full disk the buffer cannot be written; .progress.json does not count on it
            self._spool.close()


class OutputFolder:
    """The folder while it is being filled: locked, with .progress.json saying what is done."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.progress = {"settings": settings, "tokenizer_sha256": None, "units": 0, "invalid_utf8": 0, "splits": {}}
        self._made = not path.exists()
        self._lock: int | None = None

    def open(self) -> dict | None:
        """Make and lock the folder; the index if it is finished, else None. Raises UserError if it is not ours."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            return self._claim()
        except OSError as error:
            raise UserError(f"output folder {str(self.path)!r} cannot be written: {error.strerror}; name another "
                            "(--out, data.dir)") from None

    def _acquire_lock(self) -> None:
        while self._lock is None:
            lock = os.open(self.path / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise Busy(f"another process is preparing {str(self.path)!r}; wait for it, or name another folder "
                           "(--out, data.dir)") from None
            except OSError:  # a file system without locks: one process at a time is then up to the user
                pass
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK_FILE)):
                    self._lock = lock
                    return
            os.close(lock)  # whoever held it finished, and removed it between our open and our lock

    def _claim(self) -> dict | None:
        index = load_index(self.path)
        if index is not None:
            refuse_differences(self.path, index.get("settings", {}), self.settings)
            if (self.path / PROGRESS_FILE).exists():  # killed right after index.json was written
                self._remove_all_but([shard["file"] for shard in index["shards"]])
            return index
        names = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE, PROGRESS_FILE + ".tmp"}
        if PROGRESS_FILE in names:
            self.progress = self._read_progress()
            refuse_differences(self.path, self.progress["settings"], self.settings)
        elif names:
            raise UserError(f"output folder {str(self.path)!r} is not empty, it holds "
                            f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}; name an empty or new "
                            "one (--out, data.dir)")
        return None

    def _read_progress(self) -> dict:
        try:
            return json.loads((self.path / PROGRESS_FILE).read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"output folder {str(self.path)!r}: {PROGRESS_FILE} is damaged; remove the folder and "
                            "start again") from None

    def save(self, **changes) -> None:
        """Write .progress.json with changes, whole or not at all."""
        self.progress |= changes
        temporary = self.path / (PROGRESS_FILE + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.progress, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / PROGRESS_FILE)

    def finish(self, index: dict) -> None:
        """Write index.json; what was needed on the way goes."""
        write_index(self.path, index)
        self._remove_all_but([shard["file"] for shard in index["shards"]])

    def discard(self) -> None:
        """Remove all that was written: a mistake of the user's leaves nothing behind."""
        self._remove_all_but([])
        (self.path / TOKENIZER_FILE).unlink(missing_ok=True)

    def _remove_all_but(self, keep: Sequence[str]) -> None:
        """Remove the files that prepare() makes on its way. Only for a folder with our .progress.json."""
        for pattern in ("*.tmp", ".train_*.part", ".val_*.part", "train_*.bin", "val_*.bin", PROGRESS_FILE):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock, and of a folder made for nothing."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / LOCK_FILE).unlink()
            os.close(self._lock)
            self._lock = None
        if self._made:
            with suppress(OSError):  # it is not empty
                self.path.rmdir()


def refuse_differences(folder: Path, theirs: dict, ours: dict, ignore: Sequence[str] = ()) -> None:
    """Raise ConfigError listing how the settings that made a folder differ from ours."""
    lines = [f"{key}: {json.dumps(theirs.get(key))} -> {json.dumps(ours[key])}" for key in ours
             if key not in ignore and theirs.get(key) != ours[key]]
    if lines:
        raise ConfigError(f"data folder {str(folder)!r} was made with other settings ({'; '.join(lines)}); name "
                          "another folder (--out, data.dir) or remove this one")


# ----------------------------------------------------------------------------------------------------------------------
# prepare()

def prepare(sources: Sequence[str], out_dir: Path, *, tokenizer: str = DEFAULT_TOKENIZER,
            val_fraction: float = 0.05, val_sources: Sequence[str] = (), workers: int | None = None,
            text_field: str = "text", shard_tokens: int = 100_000_000, min_window: int | None = None,
            note: Callable[[str], None] = _print_note, should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Write the shards of sources into out_dir, or go on with it, or find it done; the index.

    min_window: tokens that each split must hold at least, max_seq_len + 1. Raises UserError (nothing stays written),
    MachineError and PreparationStopped (the same call goes on).
    """
    if not sources:
        raise SourceError(f"no source is named; name a text file, a folder, or {STDLIB}")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {shard_tokens} should lie between 1 and {MAX_SHARD_TOKENS}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} should be at least 1")
    if not 0.0 <= val_fraction <= 0.9:
        raise UserError(f"--val-fraction {val_fraction} should lie between 0 and 0.9")
    settings = settings_of(sources, val_sources, tokenizer=tokenizer, val_fraction=val_fraction, text_field=text_field)
    texts = choose_split([file for source in sources for file in find_files(source)],
                         [file for source in val_sources for file in find_files(source)], val_fraction, text_field)
    folder = OutputFolder(Path(out_dir), settings | {"shard_tokens": shard_tokens})
    try:
        index = folder.open()
        if index is not None:
            note(f"{folder.path} is prepared already")
        else:
            index = _fill(folder, texts, tokenizer, workers=workers, note=note, should_stop=should_stop,
                          min_tokens=min_window or 1)
        return index
    finally:
        folder.close()


def settings_of(sources: Sequence[str], val_sources: Sequence[str], *, tokenizer: str, val_fraction: float,
                text_field: str) -> dict:
    """What decides the tokens, as index.json keeps it. Raises UserError if a source or tokenizer is not there."""
    return {"sources": [describe(source, find_files(source)) for source in sources],
            "val_sources": [describe(source, find_files(source)) for source in val_sources],
            "tokenizer": tokenizer_identity(tokenizer), "val_fraction": None if val_sources else val_fraction,
            "text_field": text_field}


def _fill(folder: OutputFolder, texts: Texts, tokenizer_name: str, *, workers: int | None, note: Callable[[str], None],
          should_stop: Callable[[], bool], min_tokens: int) -> dict:
    """Write what the folder lacks; the index."""
    writers: dict[str, SplitWriter] = {}
    try:
        tokenizer = _tokenizer_of(folder, texts, tokenizer_name, note)
        encoder = Encoder(tokenizer, val_fraction=texts.val_fraction, text_field=texts.text_field)
        for split in ("train", "val"):
            writers[split] = SplitWriter(folder.path, split, encoder, folder.settings["shard_tokens"],
                                         folder.progress["splits"].get(split))
        if texts.bytes <= SMALL_BYTES or workers == 1:
            workers = 0
        elif workers is None:
            workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        invalid = _encode_texts(folder, texts, encoder, writers, workers=workers, should_stop=should_stop)
        for writer in writers.values():
            if writer.tokens:
                writer.finish_shard()
        shards = [shard for writer in writers.values() for shard in writer.shards]
        index = {"format": INDEX_FORMAT, "tokenizer": folder.settings["tokenizer"],
                 "tokenizer_sha256": tokenizer.fingerprint, "dtype": encoder.dtype.name,
                 "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "settings": folder.settings,
                 "val_split": texts.val_split, "invalid_utf8": invalid, "shards": shards}
        _check_tokens(index, min_tokens)
        folder.finish(index)
    except UserError:
        folder.discard()
        raise
    except OSError as error:
        raise MachineError(f"writing {str(folder.path)!r} failed: {error.strerror}; make room and give the same "
                           "command again: it goes on") from None
    except MachineError as error:
        raise type(error)(f"{error}; give the same command again: it goes on") from None
    finally:
        for writer in writers.values():
            writer.close()
    note(f"{folder.path}: {_summary(index)}")
    return index


def _tokenizer_of(folder: OutputFolder, texts: Texts, name: str, note: Callable[[str], None]) -> Tokenizer:
    """The tokenizer, loaded or trained on the training split and saved in the folder, where a second start finds it."""
    path = folder.path / TOKENIZER_FILE
    if folder.progress["tokenizer_sha256"] is not None:
        tokenizer = load_tokenizer(str(path))
        if tokenizer.fingerprint != folder.progress["tokenizer_sha256"]:
            raise UserError(f"tokenizer {str(path)!r} was changed meanwhile; remove the folder and start again")
        return tokenizer
    folder.save()  # from here on the folder is ours
    if name.startswith("bpe:"):
        vocab_size = int(name[4:]) if name[4:].isdecimal() else 0
        note(f"training tokenizer {name}")
        tokenizer = train_bpe(_training_texts(texts), vocab_size)
    else:
        tokenizer = load_tokenizer(name)
    tokenizer.save(path)
    folder.save(tokenizer_sha256=tokenizer.fingerprint)
    return tokenizer


def _training_texts(texts: Texts) -> Iterator[str]:
    """Short texts of the training split, in all about BPE_SAMPLE_BYTES, from units spread evenly over it."""
    stride = math.ceil(texts.bytes / BPE_SAMPLE_BYTES)
    for unit in itertools.islice(texts.units(UNIT_BYTES), 0, None, stride):
        for text, _ in documents(unit, texts.text_field) if unit.split != "val" else ():
            if unit.split == "train" or split_of(text, texts.val_fraction) == "train":
                for piece in pieces(text, BPE_TEXT_CHARS):
                    yield from (piece[i:i + 2 * BPE_TEXT_CHARS] for i in range(0, len(piece), 2 * BPE_TEXT_CHARS))


def _encode_texts(folder: OutputFolder, texts: Texts, encoder: Encoder, writers: dict[str, SplitWriter], *,
                  workers: int, should_stop: Callable[[], bool]) -> int:
    """Append the tokens of all units that .progress.json does not count yet, and keep it up to date.

    Returns how many invalid UTF-8 sequences were replaced in all.
    """
    done, invalid = folder.progress["units"], folder.progress["invalid_utf8"]
    units = texts.units(UNIT_BYTES if encoder.tokenizer.cuttable else LONGEST_UNIT_BYTES)
    skipped = sum(unit.bytes for unit in itertools.islice(units, done))
    saved, saved_shards = time.monotonic(), None
    with closing(encode_units(units, encoder, workers, folder.path / TOKENIZER_FILE)) as results, \
            _progress_bar(texts.bytes, skipped) as advance:
        for size, encoded, replaced in results:
            for split, tokens in encoded.items():
                writers[split].add(tokens)
            done, invalid = done + 1, invalid + replaced
            advance(size)
            stop, shards = should_stop(), [len(writer.shards) for writer in writers.values()]
            if stop or shards != saved_shards or time.monotonic() - saved > CHECKPOINT_SECONDS:
                folder.save(units=done, invalid_utf8=invalid, splits={name: w.state() for name, w in writers.items()})
                for writer in writers.values():
                    writer.remove_full_spools()
                saved, saved_shards = time.monotonic(), shards
            if stop:
                raise PreparationStopped(f"stopped while preparing {str(folder.path)!r}")
    return invalid


@contextmanager
def _progress_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over bytes of source, unless there is little to do; yields what advances it."""
    if total <= SMALL_BYTES:
        yield lambda size: None
        return
    from tqdm import tqdm
    with tqdm(desc="preparing", total=total, initial=done, unit="B", unit_scale=True, mininterval=1.0) as bar:
        yield bar.update


def _tokens_in(index: dict, split: str) -> int:
    return sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)


def _check_tokens(index: dict, minimum: int) -> None:
    """Raise ConfigError if a split (val only if one was asked for) is too small for one window."""
    for split in ("train", "val"):
        tokens = _tokens_in(index, split)
        if tokens < minimum and not (split == "val" and index["val_split"] == "none"):
            change = "more text" if split == "train" else "more validation text, a larger --val-fraction " \
                "(data.val_fraction; 0 = no validation)"
            raise ConfigError(f"the {split} split holds {tokens:,} tokens but needs {minimum:,}; give {change}"
                              + (", or lower model.max_seq_len" if minimum > 1 else ""))


def _summary(index: dict) -> str:
    lines = []
    for split in ("train", "val"):
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        lines.append(f"{split} {sum(s['tokens'] for s in shards):,} tokens of {sum(s['text_bytes'] for s in shards):,} "
                     f"bytes in {len(shards)} shard{'s' * (len(shards) != 1)}")
    replaced = f", {index['invalid_utf8']:,} invalid UTF-8 sequences replaced" if index["invalid_utf8"] else ""
    return f"{', '.join(lines)}; tokenizer {index['tokenizer']}, {index['vocab_size']:,} ids{replaced}"


# ----------------------------------------------------------------------------------------------------------------------
# For train.py

def data_dir_for(data: DataConfig) -> Path:
    """The folder of shards: data.dir, else shards/<name of the first source>-<hash of the data settings>."""
    if data.dir is not None:
        return Path(data.dir)
    if not data.source:
        raise ConfigError("data.source and data.dir are both left out; name text (data.source=mybook.txt) or a folder "
                          "of shards (data.dir=shards/mybook)")
    settings = [data.source, data.val_source, data.tokenizer or DEFAULT_TOKENIZER, data.val_fraction, data.text_field]
    name = Path(data.source[0]).absolute().name.partition(".")[0] or "text"
    return Path("shards", f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}")


def ensure_prepared(data: DataConfig, *, local_rank: int, note: Callable[[str], None],
                    should_stop: Callable[[], bool] = lambda: False) -> Path:
    """The folder of shards, prepared first if it is not: by local rank 0, while the others wait for index.json.

    For every rank to call before the process group exists. Raises ConfigError if the folder was made with other
    settings or holds nothing, PreparationStopped if should_stop() says so.
    """
    folder = data_dir_for(data)
    if not data.source:
        _check_given_folder(folder, data)
        return folder
    started = noted = time.monotonic()
    while not _is_prepared(folder, data, note):
        if should_stop():
            raise PreparationStopped(f"stopped while {str(folder)!r} was being prepared")
        if local_rank == 0:
            with suppress(Busy):  # another node or job is at it
                prepare(data.source, folder, tokenizer=data.tokenizer or DEFAULT_TOKENIZER,
                        val_fraction=data.val_fraction, val_sources=data.val_source, text_field=data.text_field,
                        note=note, should_stop=should_stop)
                return folder
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            note(f"waiting for {folder / INDEX_FILE}, {noted - started:.0f} s so far")
        time.sleep(POLL_SECONDS)
    return folder


def _is_prepared(folder: Path, data: DataConfig, note: Callable[[str], None]) -> bool:
    """Whether the folder is finished. Raises ConfigError if it was made with other settings."""
    index = load_index(folder)
    if index is None:
        return False
    ours = {"val_fraction": None if data.val_source else data.val_fraction, "text_field": data.text_field,
            **_tokenizer_setting(index, data)}
    try:
        ours |= {"sources": [describe(source, find_files(source)) for source in data.source],
                 "val_sources": [describe(source, find_files(source)) for source in data.val_source]}
    except SourceError as error:
        note(f"{error}; using {folder}, which was made from it")
    refuse_differences(folder, index.get("settings", {}), ours)
    return True


def _tokenizer_setting(index: dict, data: DataConfig) -> dict:
    """The tokenizer to compare with that of an index: none if it is left out or the index's own tokenizer.json."""
    if data.tokenizer is None:
        return {}
    identity = tokenizer_identity(data.tokenizer)
    return {} if identity == f"{TOKENIZER_FILE}:{index.get('tokenizer_sha256', '')[:12]}" else {"tokenizer": identity}


def _check_given_folder(folder: Path, data: DataConfig) -> None:
    """Raise ConfigError unless the folder holds shards, ours or (with data.tokenizer) foreign ones."""
    index = load_index(folder)
    if index is not None:
        refuse_differences(folder, index.get("settings", {}), _tokenizer_setting(index, data))
    elif (folder / PROGRESS_FILE).exists():
        raise ConfigError(f"data.dir = {str(folder)!r} is not finished; give the command that began it again")
    elif not any(folder.glob("*train*.bin")):
        raise ConfigError(f"data.dir = {str(folder)!r} holds neither {INDEX_FILE} nor *train*.bin; set data.source to "
                          "prepare text into it")
    elif data.tokenizer is None:
        raise ConfigError(f"data.dir = {str(folder)!r} holds shards without {INDEX_FILE}; set data.tokenizer to the "
                          "one they were made with (gpt2, most often)")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data.prepare", allow_abbrev=False,
                     description="Turn text into token shards, or check a folder of them.")
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help=f"{', '.join(KINDS)} file, a folder of those, or {STDLIB}")
    parser.add_argument("--out", metavar="DIR", help="new or empty folder, or one that this command left unfinished")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, metavar="NAME",
                        help=f"bytes, bpe:N (N ids, trained on the text), {', '.join(TIKTOKEN_FILES)}, a "
                             f"{TOKENIZER_FILE} or a run folder (default {DEFAULT_TOKENIZER})")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--val-fraction", type=float, default=0.05, metavar="F",
                       help="share of the text set aside for validation (default 0.05)")
    split.add_argument("--val", nargs="+", default=[], metavar="SOURCE", help="validation text instead")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a .jsonl row or parquet column")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard")
    parser.add_argument("--verify", metavar="DIR", help="check every shard of a folder against its index.json")
    return parser


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.verify is not None:
        _verify(args)
        return
    if args.out is None:
        raise UserError("--out DIR is missing; name the folder for the shards")
    prepare(args.sources, Path(args.out), tokenizer=args.tokenizer, val_fraction=args.val_fraction,
            val_sources=args.val, workers=args.workers, text_field=args.text_field, shard_tokens=args.shard_tokens)


def _verify(args: argparse.Namespace) -> None:
    if args.sources or args.out is not None:
        raise UserError("--verify DIR stands alone; leave out SOURCE and --out")
    if not Path(args.verify).is_dir():
        raise UserError(f"--verify {args.verify!r} is no folder; name a folder of shards")
    problems = verify(Path(args.verify), _print_note)
    if problems:
        raise MachineError("; ".join(problems))


if __name__ == "__main__":
    import data.prepare  # workers look for its functions here, and find no __main__

    exit_cleanly(data.prepare.main)
