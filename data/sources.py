"""Sources of text: names to files, files to documents, documents to train or val.

A source is a .txt (one document), a .jsonl (.gz, .zst) or .parquet (a document in each row), a folder of those, or the
running Python's own library source. Its files are cut into units of about 1 MB, in order, which prepare.py hands to
worker processes; nothing is read as a whole but the units themselves. Nothing here knows tokens, only the places where
a text may be cut without changing them (tokenizer.CUT).
"""

import codecs
import gzip
import hashlib
import itertools
import json
import os
import sysconfig
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config import MachineError, UserError
from data.tokenizer import CUT, pieces, replace_surrogates

STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
KINDS = {".txt": ("txt", ""), ".jsonl": ("jsonl", ""), ".jsonl.gz": ("jsonl", "gz"), ".jsonl.zst": ("jsonl", "zst"),
         ".parquet": ("parquet", "")}
PACKED_RATIO = 4  # text bytes per byte of .gz or .zst, a guess for progress and sampling

UNIT_BYTES = 1 << 20
LONGEST_UNIT_BYTES = 1 << 24  # of a .txt without a place to cut; there it is cut all the same
SEARCH_BYTES = 1 << 12  # read at a time to find a cut
CUT_CONTEXT_BYTES = 16  # a CUT looks at 3 characters
FIRST_ROW_BYTES = 1 << 12  # read at least, to see what a .jsonl holds
PARQUET_ROWS = 1024  # read at a time
FEW_DOCUMENTS = 100  # with fewer the text is split by characters


class SourceError(UserError):
    """A source that does not exist, cannot be read, or holds no text."""


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


def whole_document_units(files: Sequence[TextFile], split: str | None, *, val_fraction: float, unit_bytes: int,
                         row_unit_bytes: int | None = None) -> Iterator[Unit]:
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
            yield from _row_units(file, split, row_unit_bytes)
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


def units_split_by_rows(files: Sequence[TextFile], *, val_fraction: float) -> Iterator[Unit]:
    """The units of a few rows that stay whole: the last val_fraction of them, at least one, is val."""
    lines = [(file, line) for file in files for unit in _row_units(file, None)
             for line in (unit.content or _read_range(unit)).removesuffix(b"\n").split(b"\n")]
    filled = [place for place, (_, line) in enumerate(lines) if line.strip()]
    first_of_val = filled[-max(1, round(len(filled) * val_fraction))]
    for file in dict.fromkeys(file for file, _ in lines):
        places = [place for place, (owner, _) in enumerate(lines) if owner is file]
        for split, mine in (("train", [p for p in places if p < first_of_val]),
                            ("val", [p for p in places if p >= first_of_val])):
            if mine:
                content = b"".join(lines[place][1] + b"\n" for place in mine)
                yield Unit("jsonl", file.path, len(content), content=content, line=mine[0] - places[0] + 1, split=split)


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


def _row_units(file: TextFile, split: str | None, unit_bytes: int | None = None) -> Iterator[Unit]:
    """Units of a file with one document in each row; of a .jsonl about unit_bytes (left out: UNIT_BYTES) each."""
    unit_bytes = UNIT_BYTES if unit_bytes is None else unit_bytes
    if file.kind == "parquet":
        groups = _open_parquet(file.path).num_row_groups
        for group in range(groups):
            yield Unit("parquet", file.path, file.bytes // groups, start=group, split=split)
    elif file.packing:
        yield from _packed_units(file, split, unit_bytes)
    else:
        with _reading(file.path), open(file.path, "rb") as opened:
            start = 0
            while start < file.bytes:
                opened.seek(start + unit_bytes)
                opened.readline()
                end = min(opened.tell(), file.bytes)
                yield Unit("jsonl", file.path, end - start, start=start, end=end, split=split)
                start = end


def _packed_units(file: TextFile, split: str | None, unit_bytes: int) -> Iterator[Unit]:
    """Rows of a .gz or .zst, unpacked here: such a file can only be read from its start."""
    line, rest, packed = 1, b"", 0
    with _reading(file.path), open(file.path, "rb") as opened:
        for block in itertools.chain(_unpacked(file, opened), [b"\n"]):  # the last row may lack its newline
            rest += block
            if len(rest) < unit_bytes and block != b"\n":
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


def _rows(file: TextFile) -> Iterator[tuple[int, object, int]]:
    for unit in _row_units(file, None):
        yield from jsonl_rows(unit)


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


def jsonl_rows(unit: Unit) -> Iterator[tuple[int, object, int]]:
    """(number in the unit, value, invalid UTF-8 sequences replaced) of each row of a jsonl unit that is not blank."""
    rows = unit.content or _read_range(unit)
    for number, row in enumerate(rows.split(b"\n")):
        if not row.strip():
            continue
        line, invalid = _decoded(row)
        try:
            value = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"source {row_name(unit, number)} is not JSON: {error}") from None
        yield number, value, invalid


def row_name(unit: Unit, number: int) -> str:
    """Where a row of a unit stands, for a message."""
    return f"{unit.path!r} line {_first_line(unit) + number}"


def first_row(file: TextFile) -> object | None:
    """The first row of a .jsonl that is not blank; None if there is none."""
    rows = (value for unit in _row_units(file, None, FIRST_ROW_BYTES) for _, value, _ in jsonl_rows(unit))
    return next(rows, None)


def _jsonl_documents(unit: Unit, text_field: str) -> Iterator[tuple[str, int]]:
    for number, value, invalid in jsonl_rows(unit):
        text = value.get(text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            found = f"fields {', '.join(value)}" if isinstance(value, dict) else json.dumps(value)[:40]
            raise SourceError(f"source {row_name(unit, number)} has no text in a field {text_field!r}, only {found}; "
                              "name the field (--text-field, data.text_field), or call the fields of examples prompt "
                              "and response, text and label, or messages")
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
    """The files to prepare and how val is chosen: given, none, hash (of documents), or the last characters or rows."""

    files: list[TextFile]
    val_files: list[TextFile]
    val_fraction: float
    text_field: str | None  # None: rows are no plain text
    val_split: str
    row_unit_bytes: int | None = None  # None: UNIT_BYTES

    @property
    def bytes(self) -> int:
        return sum(file.text_bytes for file in self.files + self.val_files)

    def units(self, *, cuttable: bool) -> Iterator[Unit]:
        """All units, in order: the same at each call. cuttable: a cut changes no ids, so a .txt is cut every 1 MB."""
        unit_bytes = UNIT_BYTES if cuttable else LONGEST_UNIT_BYTES
        if self.val_split == "characters":
            yield from units_split_by_characters(self.files, val_fraction=self.val_fraction,
                                                 text_field=self.text_field, unit_bytes=unit_bytes)
            return
        if self.val_split == "rows":
            yield from units_split_by_rows(self.files, val_fraction=self.val_fraction)
            return
        split = None if self.val_split == "hash" else "train"
        for files, chosen in ((self.files, split), (self.val_files, "val")):
            yield from whole_document_units(files, chosen, val_fraction=self.val_fraction, unit_bytes=unit_bytes,
                                            row_unit_bytes=self.row_unit_bytes)


def choose_split(files: list[TextFile], val_files: list[TextFile], val_fraction: float, text_field: str | None, *,
                 row_unit_bytes: int | None = None) -> Texts:
    """How the texts are split; text_field None: rows stay whole, whatever they hold. Raises SourceError if there is no
    text."""
    counted = _count_documents(files, text_field, limit=FEW_DOCUMENTS)
    for found, named in ((counted, files), (val_files and _count_documents(val_files, text_field, limit=1), val_files)):
        if named and not found:
            raise SourceError(f"source {named[0].path!r} holds no text: every row is empty")
    if val_files:
        val_split = "given"
    elif val_fraction == 0.0:
        val_split = "none"
    else:
        val_split = "hash" if counted == FEW_DOCUMENTS else "rows" if text_field is None else "characters"
    return Texts(files, val_files, val_fraction, text_field, val_split, row_unit_bytes)


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


def _count_documents(files: Sequence[TextFile], text_field: str | None, limit: int) -> int:
    """How many documents (text_field None: rows) there are, up to limit, after which nothing more is read."""
    found = itertools.chain.from_iterable([None] if file.kind == "txt" else _rows(file) if text_field is None else
                                          _row_documents(file, text_field) for file in files)
    return sum(1 for _ in itertools.islice(found, limit))
