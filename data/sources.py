"""Files of text to units for any process to read, and texts to train or val.

Which files a source has: source_files.py. A text is one document, a .jsonl or .parquet has one in each row. The files
are cut into units of about 1 MB, in order. Of tokens only the places are known here where a text may be cut without
changing them (tokenizer.CUT). What is compressed, or in UTF-16 or UTF-32, can only be read from its start: it is
streamed as UTF-8 by the process that makes the units.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import cli
from config import MachineError
from data.source_files import STDLIB, TextFile, find_files, to_rows
from data.text import (
    HEAD_BYTES,
    SourceError,
    decoded,
    is_utf8,
    refuse_nuls,
    row_of,
    text_of,
    utf8_blocks,
    warning_of,
)
from data.tokenizer import CUT

UNIT_BYTES = 1 << 20
LONGEST_UNIT_BYTES = 1 << 24  # of a .txt without a place to cut; there it is cut all the same
SEARCH_BYTES = 1 << 12  # read at first to find a cut
FIRST_ROW_BYTES = 1 << 12  # read at least, to see what a .jsonl holds
PARQUET_ROWS = 1024  # read at a time
FEW_DOCUMENTS = 100  # with fewer the text is split by characters
HASHED_BYTES = 1 << 30  # of a source that are hashed at each start; of a larger one blocks spread over each file
BLOCK_BYTES = 1 << 14
SKIP_BAD = "leave such rows out (--bad-rows skip, data.bad_rows=skip)"
BAD_ROW = f"mend or remove the row, or {SKIP_BAD}"


def describe(source: str, *, content: bool = True) -> dict:
    """What index.json says about a source: its name without its place, names and sizes of its files as a hash, and
    (content) what is in them as another. Raises SourceError."""
    files = find_files(source)
    hashed = {"content": _content_hash(files)} if content else {}
    listing = "".join(f"{file.name}\0{file.bytes}\n" for file in files)
    name = os.fsencode(Path(source).absolute().name).decode("utf-8", "backslashreplace")  # index.json is UTF-8
    return {"name": source if source == STDLIB else name, "files": len(files),
            "bytes": sum(file.bytes for file in files),
            "listing": hashlib.sha256(os.fsencode(listing)).hexdigest()[:16], **hashed}


def _content_hash(files: Sequence[TextFile]) -> str:
    """blake2b over what is in the files: edits that keep the size show. Not their time, which differs in every copy."""
    digest, share = hashlib.blake2b(digest_size=16), HASHED_BYTES / max(1, sum(file.bytes for file in files))
    for file in files:
        blocks = math.ceil(file.bytes / BLOCK_BYTES)
        read = min(blocks, max(2, int(blocks * share)))
        with _reading(file.path), open(file.path, "rb") as opened:
            for block in range(read):
                if read < blocks:  # the first and the last are among them
                    opened.seek(block * (file.bytes - BLOCK_BYTES) // (read - 1))
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what goes wrong while reading a source into one line that names it."""
    try:
        yield
    except PermissionError as error:
        raise SourceError(f"source {path!r} cannot be read: {error.strerror}; see who may read it (ls -l)") from None
    except (OSError, EOFError, zlib.error, ValueError, NotImplementedError) as error:  # or pyarrow's kinds of them
        if getattr(error, "errno", None):
            raise MachineError(f"reading {path!r} failed: {error.strerror}") from None
        raise SourceError(f"source {path!r} cannot be read: {str(error).partition(chr(10))[0]}; see that it is whole"
                          ) from None


def _read_range(path: str, start: int, end: int) -> bytes:
    with _reading(path), open(path, "rb") as opened:
        opened.seek(start)
        data = opened.read(end - start)
        if len(data) < end - start:
            raise EOFError("it became shorter meanwhile")
    refuse_nuls(data, f"source {path!r}")
    return data


def _head(file: TextFile) -> bytes:
    """The first HEAD_BYTES, unpacked."""
    head = b""
    with _reading(file.path), open(file.path, "rb") as opened:
        for block in _unpacked(file.path, file.packing, opened, HEAD_BYTES):
            head += block
            if len(head) >= HEAD_BYTES:
                break
    return head[:HEAD_BYTES]


def check_heads(files: Sequence[TextFile]) -> bool:
    """Look into each file before any work; whether it warned of text in another encoding. Raises SourceError for what
    is no text."""
    warnings = [warning for file in files if file.kind != "parquet"
                if (warning := warning_of(_head(file), f"source {file.path!r}", file.path))]
    if warnings:
        others = f" ({len(warnings) - 1:,} more of the files are like it)" if len(warnings) > 1 else ""
        cli.note(f"warning: {warnings[0]}{others}")
    return bool(warnings)


# ---- Units -----------------------------------------------------------------------------------------------------------
# Tasks of about UNIT_BYTES, for any process. `bytes` of source are what one stands for, for the progress bar;
# split None: the hash of each document decides; ends: the document ends with the unit. bad, where rows are read: a list
# that gets the numbers in the unit of those that cannot be used; None = they are refused.

@dataclass(frozen=True)
class TextUnit:
    """A piece of one document: bytes [start, end) of a .txt, or `text`, from a row."""

    bytes: int
    split: str
    ends: bool
    path: str = ""
    start: int = 0
    end: int = 0
    text: str | None = None
    invalid: int = 0  # sequences replaced in `text`

    def texts(self, text_field: str, bad: list[int] | None) -> Iterator[tuple[str, int]]:
        yield decoded(_read_range(self.path, self.start, self.end)) if self.text is None else (self.text, self.invalid)


@dataclass(frozen=True)
class FilesUnit:
    """Small .txt files."""

    paths: tuple[str, ...]
    bytes: int
    split: str | None
    ends = True

    def texts(self, text_field: str, bad: list[int] | None) -> Iterator[tuple[str, int]]:
        for path in self.paths:
            with _reading(path):
                data = Path(path).read_bytes()
            yield text_of(data, f"source {path!r}")


@dataclass(frozen=True)
class RowsUnit:
    """Rows: bytes [start, end) of a .jsonl, `lines` unpacked from one, or row group `group` of a .parquet."""

    path: str
    bytes: int
    split: str | None
    start: int = 0
    end: int = 0
    lines: bytes = b""
    first_line: int | None = None  # number of the first of `lines` in the file, from 1
    group: int | None = None
    only_bad: bool = False  # its texts are in other units: it stands for its bad rows
    ends = True

    def content(self) -> bytes:
        """The lines of a .jsonl."""
        return self.lines or _read_range(self.path, self.start, self.end)

    def texts(self, text_field: str, bad: list[int] | None) -> Iterator[tuple[str, int]]:
        found = self._jsonl_texts(text_field, bad) if self.group is None else self._parquet_texts(text_field, bad)
        return (("", 0) for _ in found) if self.only_bad else found

    def _jsonl_texts(self, text_field: str, bad: list[int] | None) -> Iterator[tuple[str, int]]:
        for number, value, invalid in jsonl_rows(self, bad):
            if isinstance(value, dict) and isinstance(value.get(text_field), str):
                yield value[text_field], invalid
                continue
            found = json.dumps(value)[:40] if not isinstance(value, dict) else \
                f"{json.dumps(value[text_field])[:40]} in it" if text_field in value else f"fields {', '.join(value)}"
            _leave_out(self, number, bad, f"has no text in a field {text_field!r}, only {found}; {BAD_ROW}, or name "
                       "the field (--text-field, data.text_field), or call the fields of examples prompt and response, "
                       "text and label, or messages")

    def _parquet_texts(self, text_field: str, bad: list[int] | None) -> Iterator[tuple[str, int]]:
        file = _open_parquet(self.path)
        names = file.schema_arrow.names
        kind = "nothing" if text_field not in names else "several of that name" if names.count(text_field) > 1 else \
            str(file.schema_arrow.field(text_field).type)
        if not re.fullmatch("(dictionary<values=)?(large_)?string(_view)?(, .*)?", kind):
            raise SourceError(f"source {self.path!r} has no column {text_field!r} of text but {kind}, of its columns "
                              f"{', '.join(names)}; name the column (--text-field, data.text_field), or, if its text "
                              f"lies deeper or it holds examples, make rows of JSON of it: {to_rows(self.path)}")
        numbers = itertools.count()
        batches = file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[self.group], columns=[text_field])
        while True:
            with _reading(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            column = batch.column(0).dictionary_decode() if kind.startswith("dict") else batch.column(0)
            for value, number in zip(column, numbers, strict=False):
                if value.is_valid:
                    yield decoded(value.as_buffer().to_pybytes())  # as_py() fails where it is not UTF-8
                else:
                    _leave_out(self, number, bad, f"has no text in a field {text_field!r}, only null in it; {BAD_ROW}, "
                               "or name the column (--text-field, data.text_field)")


Unit = TextUnit | FilesUnit | RowsUnit


def texts_of(unit: Unit, text_field: str, bad: list[int] | None = None) -> Iterator[tuple[str, int]]:
    """(text, invalid UTF-8 sequences replaced by U+FFFD in it) of each document of a unit; empty ones are left out."""
    return (found for found in unit.texts(text_field, bad) if found[0])


def jsonl_rows(unit: RowsUnit, bad: list[int] | None = None) -> Iterator[tuple[int, object, int]]:
    """(number in the unit, value, invalid UTF-8 sequences replaced) of each row of a .jsonl that is not blank."""
    is_first = unit.start == 0 and unit.first_line in (None, 1)
    for number, row in enumerate(unit.content().splitlines()):  # of bytes: at \n, \r\n and \r, which JSON has no other
        if not row.strip():
            continue
        if is_first and row.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise SourceError(f"source {row_name(unit, number)} begins an array, and a row is an object on a line "
                              f"of its own; make rows of it: {to_rows(unit.path)}")
        try:
            value, invalid = row_of(row)
        except ValueError as error:
            _leave_out(unit, number, bad, f"is not JSON: {error}; {BAD_ROW}")
            continue
        is_first = False
        yield number, value, invalid


def _leave_out(unit: RowsUnit, number: int, bad: list[int] | None, problem: str) -> None:
    if bad is None:
        raise SourceError(f"source {row_name(unit, number)} {problem}") from None
    bad.append(number)


def row_name(unit: RowsUnit, number: int) -> str:
    """Where a row stands, for a message."""
    if unit.group is not None:
        groups = _open_parquet(unit.path).metadata
        return f"{unit.path!r} row {1 + number + sum(groups.row_group(g).num_rows for g in range(unit.group))}"
    first_line = unit.first_line
    if first_line is None:
        first_line = 1
        with _reading(unit.path), open(unit.path, "rb") as opened:
            while (place := opened.tell()) < unit.start:  # which is behind a \n
                rows = opened.read(min(UNIT_BYTES, unit.start - place - 1)) + opened.readline()
                first_line += _line_ends(rows)
    return f"{unit.path!r} line {first_line + number}"


def _line_ends(data: bytes) -> int:
    """As splitlines() counts them: \n, \r\n and \r."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def first_row(file: TextFile, *, skip_bad: bool = False) -> object | None:
    """The first row of a .jsonl that is not blank; None if there is none."""
    warning_of(_head(file), f"source {file.path!r}", file.path)  # it raises what is no text
    bad = [] if skip_bad else None
    return next((row for unit in _row_units(file, None, FIRST_ROW_BYTES) for _, row, _ in jsonl_rows(unit, bad)), None)


# ---- Files -> units, in order ----------------------------------------------------------------------------------------

def whole_document_units(files: Sequence[TextFile], split: str | None, *, val_fraction: float, unit_bytes: int,
                         row_unit_bytes: int | None = None) -> Iterator[Unit]:
    """The units of files whose documents stay whole: all of one split, or (None) each document by its hash."""
    def is_small(file: TextFile) -> bool:
        return file.kind == "txt" and not file.packing and file.bytes < UNIT_BYTES

    for small, members in itertools.groupby(files, is_small):
        paths, size = [], 0  # of small files, which share a unit
        for file in members:
            if small:
                paths.append(file.path)
                size += file.bytes
                if size >= UNIT_BYTES:
                    yield FilesUnit(tuple(paths), size, split)
                    paths, size = [], 0
            elif file.kind == "txt":
                texts = (text for unit in _txt_units(file, "", unit_bytes) for text, _ in texts_of(unit, ""))
                yield from _txt_units(file, split or split_of(texts, val_fraction), unit_bytes)
            else:
                yield from _row_units(file, split, row_unit_bytes)
        if paths:
            yield FilesUnit(tuple(paths), size, split)


def _is_streamed(file: TextFile) -> bool:
    """Whether it can only be read from its start."""
    return file.packing != "" or not is_utf8(_head(file))


def _txt_units(file: TextFile, split: str, unit_bytes: int) -> Iterator[TextUnit]:
    """A text, cut where the ids of the parts are those of the whole (tokenizer.CUT)."""
    if _is_streamed(file):
        yield from _streamed_txt_units(file, split, unit_bytes)
        return
    start = len(codecs.BOM_UTF8) if _head(file).startswith(codecs.BOM_UTF8) else 0
    with _reading(file.path), open(file.path, "rb") as opened:
        while start < file.bytes:
            end = _unit_end(opened, start, file.bytes, unit_bytes)
            yield TextUnit(end - start, split, end == file.bytes, file.path, start=start, end=end)
            start = end


def _streamed_txt_units(file: TextFile, split: str, unit_bytes: int) -> Iterator[TextUnit]:
    """The same units, with their texts: as much of the file is held as one of them may be long."""
    rest, place = b"", 0
    with _reading(file.path), open(file.path, "rb") as opened:
        blocks = utf8_blocks(_unpacked(file.path, file.packing, opened))
        while True:
            held, size = [rest], len(rest)
            while size <= unit_bytes + LONGEST_UNIT_BYTES and (block := next(blocks, None)) is not None:
                held.append(block)
                size += len(block)
            rest = b"".join(held)
            if not rest:
                return
            end = _unit_end(io.BytesIO(rest), 0, len(rest), unit_bytes)
            refuse_nuls(rest[:end], f"source {file.path!r}")
            text, invalid = decoded(rest[:end])
            size, place, rest = opened.tell() - place, opened.tell(), rest[end:]
            yield TextUnit(size * file.text_bytes // file.bytes, split, not rest, file.path, text=text, invalid=invalid)


def _unit_end(opened: BinaryIO, start: int, size: int, unit_bytes: int) -> int:
    """Where the unit of a UTF-8 file of `size` bytes ends that begins at `start`."""
    limit = min(size, start + unit_bytes + LONGEST_UNIT_BYTES)
    end = _next_cut(opened, start + unit_bytes, limit)
    if end is None:
        end = limit if limit == size else _character_start(opened, limit)
    return end


def _next_cut(opened: BinaryIO, start: int, end: int) -> int | None:
    """The byte offset of the first CUT in [start, end) of a UTF-8 file, if there is one."""
    if start >= end:
        return None
    start, size = _character_start(opened, start), SEARCH_BYTES  # else the rest of a blank might pass for another
    while True:
        opened.seek(start)
        # a byte that is no character becomes one, but no letter
        text = opened.read(min(size, end - start)).decode("utf-8", "surrogateescape")
        if cut := CUT.search(text):
            return start + len(text[:cut.start()].encode("utf-8", "surrogateescape"))
        if size >= end - start:
            return None
        size *= 8


def _character_start(opened: BinaryIO, offset: int) -> int:
    """The last byte offset up to `offset` (at least 3) where a character of a UTF-8 file starts."""
    opened.seek(offset - 3)
    data = opened.read(4)
    return next((offset - i for i in range(4) if len(data) == 4 and data[3 - i] & 0xC0 != 0x80), offset)


def _row_units(file: TextFile, split: str | None, unit_bytes: int | None = None) -> Iterator[RowsUnit]:
    """Units of a file with one document in each row; of a .jsonl about unit_bytes (left out: UNIT_BYTES) each."""
    unit_bytes = unit_bytes or UNIT_BYTES
    if file.kind == "parquet":
        groups = _open_parquet(file.path).num_row_groups
        for group in range(groups):
            yield RowsUnit(file.path, file.bytes // groups, split, group=group)
    elif _is_streamed(file):
        yield from _streamed_row_units(file, split, unit_bytes)
    else:
        with _reading(file.path), open(file.path, "rb") as opened:
            start = 0
            while start < file.bytes:
                opened.seek(start + unit_bytes)
                opened.readline()
                end = min(opened.tell(), file.bytes)
                yield RowsUnit(file.path, end - start, split, start=start, end=end)
                start = end


def _open_parquet(path: str):
    cli.require(f"source {path!r}", "pyarrow")
    import pyarrow.parquet
    with _reading(path):
        return pyarrow.parquet.ParquetFile(open(path, "rb"))  # opened here: Arrow spells names in UTF-8 only


def _streamed_row_units(file: TextFile, split: str | None, unit_bytes: int) -> Iterator[RowsUnit]:
    line, held, size, place = 1, [], 0, 0
    with _reading(file.path), open(file.path, "rb") as opened:
        blocks = utf8_blocks(_unpacked(file.path, file.packing, opened))
        for block in itertools.chain(blocks, [b"\n"]):  # the last row may lack it
            held.append(block)
            size += len(block)
            if b"\n" not in block or (size < unit_bytes and block != b"\n"):
                continue
            rows, newline, rest = b"".join(held).rpartition(b"\n")
            refuse_nuls(rows, f"source {file.path!r}")
            read, place, held, size = opened.tell() - place, opened.tell(), [rest], len(rest)
            yield RowsUnit(file.path, read * file.text_bytes // file.bytes, split, lines=rows + newline,
                           first_line=line)
            line += _line_ends(rows + newline)


def _unpacked(path: str, packing: str, opened: BinaryIO, block_bytes: int | None = None) -> Iterator[bytes]:
    """The content of a file in blocks. Raises EOFError if what was compressed is cut short."""
    if packing != "zst":
        with gzip.GzipFile(fileobj=opened) if packing == "gz" else nullcontext(opened) as unpacked:
            while block := unpacked.read(block_bytes or UNIT_BYTES):
                yield block
        return
    cli.require(f"source {path!r}", "zstandard")
    import zstandard
    frame = None
    while data := opened.read(1 << 16):
        while data:
            # any window (zstd --long=31): by default those above 128 MiB are refused; memory is taken as text fills it
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                if block := frame.decompress(data):
                    yield block
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends within a frame")


# ---- The split into train and val ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rules:
    """What the user chose for documents of any kind."""

    val_fraction: float
    text_field: str | None = "text"  # None: rows are no plain text
    skip_bad: bool = False  # rows that cannot be used are left out
    parse_special: bool = False  # end-of-text spelled in a text ends a document

    def bad_rows(self) -> list[int] | None:
        """For the numbers of bad rows, if they are left out."""
        return [] if self.skip_bad else None


@dataclass(frozen=True)
class Texts:
    """The files to prepare and how val is chosen: given, none, hash (of documents), or the last characters or rows."""

    files: list[TextFile]
    val_files: list[TextFile]
    rules: Rules
    val_split: str
    row_unit_bytes: int  # of text of rows in a unit
    warned: bool  # of another encoding

    @property
    def bytes(self) -> int:
        return sum(file.text_bytes for file in self.files + self.val_files)

    def units(self, *, cuttable: bool) -> Iterator[Unit]:
        """All units, in order: the same at each call. cuttable: a cut changes no ids, so a .txt is cut every 1 MB."""
        unit_bytes = UNIT_BYTES if cuttable else LONGEST_UNIT_BYTES
        if self.val_split == "characters":
            yield from self._split_by_characters(unit_bytes)
        elif self.val_split == "rows":
            yield from self._split_by_rows()
        else:
            split = None if self.val_split == "hash" else "train"
            for files, chosen in ((self.files, split), (self.val_files, "val")):
                yield from whole_document_units(files, chosen, val_fraction=self.rules.val_fraction,
                                                unit_bytes=unit_bytes, row_unit_bytes=self.row_unit_bytes)

    def _split_by_characters(self, unit_bytes: int) -> Iterator[Unit]:
        """The last val_fraction of the characters is val (nanoGPT's way)."""
        def units() -> Iterator[Unit]:
            return whole_document_units(self.files, "train", val_fraction=0.0, unit_bytes=unit_bytes)

        field = self.rules.text_field
        lengths = [sum(len(text) for text, _ in texts_of(unit, field, self.rules.bad_rows())) for unit in units()]
        train_left = int(sum(lengths) * (1 - self.rules.val_fraction))
        for unit, length in zip(units(), lengths, strict=True):
            if length <= train_left or train_left == 0:
                yield unit if length <= train_left else replace(unit, split="val")
                train_left = max(0, train_left - length)
                continue
            for text, invalid in texts_of(unit, field, bad := self.rules.bad_rows()):
                head, tail = text[:train_left], text[train_left:]
                if head:
                    yield TextUnit(len(head), "train", unit.ends and not tail, text=head, invalid=invalid)
                if tail:
                    yield TextUnit(len(tail), "val", unit.ends, text=tail, invalid=0 if head else invalid)
                train_left -= len(head)
            if bad:
                yield replace(unit, bytes=0, only_bad=True)

    def _split_by_rows(self) -> Iterator[Unit]:
        """A few rows stay whole: the last val_fraction of them, at least one, is val."""
        lines = [b"".join(unit.content() for unit in _row_units(file, None)).splitlines()
                 for file in self.files]
        filled = [(place, number) for place, rows in enumerate(lines) for number, row in enumerate(rows) if row.strip()]
        first_val = filled[-max(1, round(len(filled) * self.rules.val_fraction))]
        for place, (file, rows) in enumerate(zip(self.files, lines, strict=True)):
            cut = sum((place, number) < first_val for number in range(len(rows)))
            for split, start, part in (("train", 0, rows[:cut]), ("val", cut, rows[cut:])):
                if part:
                    content = b"\n".join(part) + b"\n"
                    yield RowsUnit(file.path, len(content), split, lines=content, first_line=start + 1)


def choose_split(files: list[TextFile], val_files: list[TextFile], rules: Rules, *, row_unit_bytes: int = 0) -> Texts:
    """How the texts are split; row_unit_bytes: of rows in a unit, at least. Raises SourceError if there is no text."""
    def documents(file: TextFile) -> Iterator[object]:
        if file.kind == "txt":
            yield file
            return
        bad = rules.bad_rows()
        for unit in _row_units(file, None):
            yield from jsonl_rows(unit, bad) if rules.text_field is None else texts_of(unit, rules.text_field, bad)

    warned = check_heads(files + val_files)
    counts = []
    for named, limit in ((files, FEW_DOCUMENTS), (val_files, 1)):  # after the limit nothing more is read
        found = itertools.chain.from_iterable(map(documents, named))
        counts.append(sum(1 for _ in itertools.islice(found, limit)))
        if named and not counts[-1]:
            raise SourceError(f"source {named[0].path!r} holds no text: every row is empty{' or bad' * rules.skip_bad}")
    if val_files or rules.val_fraction == 0.0:
        val_split = "given" if val_files else "none"
    else:
        val_split = "hash" if counts[0] == FEW_DOCUMENTS else "rows" if rules.text_field is None else "characters"
    return Texts(files, val_files, rules, val_split, min(max(UNIT_BYTES, row_unit_bytes), LONGEST_UNIT_BYTES), warned)


def split_of(texts: Iterable[str], val_fraction: float) -> str:
    """train or val, by the hash of a document's text, which may come in pieces."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode())
    return "val" if int.from_bytes(digest.digest(), "big") < val_fraction * 2**64 else "train"
