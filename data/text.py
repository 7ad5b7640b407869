"""Bytes to text: which encoding a file is in, what is no text at all, what could not be decoded; and JSON rows.

The one decoder of all readers: training text, rows, tasks, prompts. A byte order mark names the encoding and is no part
of the text; without one it is UTF-8. Everything becomes UTF-8 first (utf8_blocks, streamed), so that places in it are
byte offsets whatever the file was. What cannot be decoded becomes U+FFFD and is counted.
"""

import codecs
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import files
from config import UserError
from data.tokenizer import replace_surrogates

HEAD_BYTES = 1 << 16  # of a file that show what it is
WORTH_A_WARNING = 1 / 1000  # of the characters could not be decoded
NO_TEXT = 1 / 4
FULL_OF_NULS = 1 / 100  # of the bytes
MARKS = ((codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF16_LE, "utf-16-le"),
         (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF8, "utf-8"))  # UTF-32's begins with UTF-16's
OTHER_FORMATS = [(re.compile(start, re.DOTALL), kind, way_out) for start, kind, way_out in (
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (.docx, .epub, .pt and .npz are such too)",
     "unpack it, or save its text as a .txt"),
    (rb"\x1f\x8b", "compressed by gzip", "unpack it: gzip -dc < {path} > {new}"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it: zstd -dc < {path} > {new}"),
    (rb"BZh[1-9]1AY&SY", "compressed by bzip2", "unpack it: bzip2 -dc < {path} > {new}"),
    (rb"\xfd7zXZ\0", "compressed by xz", "unpack it: xz -dc < {path} > {new}"),
    (rb"PAR1", "a parquet file", "let its name end in .parquet"),
    (rb"%PDF-", "a PDF", "take its text out: pdftotext {path} {new}"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "save its text as a .txt"),
    (rb".{6}\0\0\{\"", "weights in safetensors", "name a text file"),
    (rb"\x88\xd8\x34\x01|\xa1\xd9\x34\x01", "a token shard", "name its folder as data.dir (eval.py: --data DIR)"),
    (rb"\x93NUMPY", "a numpy array", "save its text as a .txt"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8", "an image", "name a text file"))]
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON spells them, in pairs or alone

# Of UTF-16 and UTF-32: a byte that is no UTF-8 either (through surrogateescape), to be counted with the others.
codecs.register_error("invalid_in_utf8_too", lambda error: ("\udcff", error.end))


class SourceError(UserError):
    """A source that does not exist, cannot be read, or holds no text."""


def utf8_blocks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """What a file holds, in blocks, as UTF-8 without its byte order mark; bytes that UTF-8 does not allow stay."""
    blocks, head = iter(blocks), b""
    while len(head) < 4 and (block := next(blocks, None)) is not None:
        head += block
    mark, encoding = next((found for found in MARKS if head.startswith(found[0])), (b"", "utf-8"))
    blocks = itertools.chain([head[len(mark):]], blocks)
    if encoding == "utf-8":
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)("invalid_in_utf8_too")
    for block in blocks:
        yield decoder.decode(block).encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")


def is_utf8(head: bytes) -> bool:
    """Whether a file that begins so is read as UTF-8."""
    return not head.startswith(tuple(mark for mark, encoding in MARKS if encoding != "utf-8"))


def decoded(data: bytes) -> tuple[str, int]:
    """The text of UTF-8, and how many invalid sequences were replaced by U+FFFD."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def read_text(path: str | None, named: str, *, note: Callable[[str], None] | None) -> tuple[str, int]:
    """The text of a file, or of stdin (None), and how many invalid sequences were replaced, with a warning to note if
    that is many; none are replaced if note is None. Raises SourceError."""
    try:
        data = sys.stdin.buffer.read() if path is None else Path(path).read_bytes()
    except OSError as error:
        raise SourceError(f"{named} cannot be read: {error.strerror}") from None
    if note is None:
        refuse_formats(data[:HEAD_BYTES], named, path)
        try:
            return b"".join(utf8_blocks([data])).decode(), 0
        except UnicodeDecodeError as error:
            raise SourceError(f"{named} is not valid UTF-8 at byte {error.start}; "
                              f"{_way_out(data[:HEAD_BYTES], path)}") from None
    if warning := warning_of(data[:HEAD_BYTES], named, path):
        note(f"warning: {warning}")
    return text_of(data, named)


def text_of(data: bytes, named: str) -> tuple[str, int]:
    """The text of a whole file, and how many invalid sequences were replaced. Raises SourceError if it is full of NULs.
    """
    data = b"".join(utf8_blocks([data]))
    refuse_nuls(data, named)
    return decoded(data)


def refuse_formats(head: bytes, named: str, path: str | None) -> bytes:
    """The head of a file as UTF-8. Raises SourceError if it begins another format or is full of NULs. named: what the
    message calls it; path: for the command in it (None: stdin)."""
    for start, kind, way_out in OTHER_FORMATS:
        if start.match(head):
            raise SourceError(f"{named} is {kind}, not text; {way_out.format(**_paths(path))}")
    data = b"".join(utf8_blocks([head]))
    refuse_nuls(data, named, head, path)
    return data


def warning_of(head: bytes, named: str, path: str | None) -> str | None:
    """A line for the user if more than a thousandth of the characters in the head of a file cannot be decoded. Raises
    SourceError if it is no text."""
    text, invalid = decoded(refuse_formats(head, named, path))
    if invalid <= len(text) * WORTH_A_WARNING:
        return None
    found = f"{invalid:,} of the first {len(text):,} characters are not UTF-8"
    if invalid > len(text) * NO_TEXT:
        raise SourceError(f"{named} is no text in UTF-8 ({found}) but in another encoding, or a binary file; "
                          f"{_way_out(head, path)}")
    return f"{named}: {found} and become U+FFFD; {_way_out(head, path)}"


def refuse_nuls(data: bytes, named: str, head: bytes = b"", path: str | None = None) -> None:
    """Raise SourceError if UTF-8 is full of NUL bytes. head: the bytes of the file as they are, if at hand."""
    nuls = data.count(0)
    if nuls < 2 or nuls <= len(data) * FULL_OF_NULS:
        return
    quarters = [head[i::4].count(0) * 4 / max(1, len(head)) for i in range(4)]  # NULs at places 0, 1, 2, 3 of four
    encoding = next((name for name, nul, filled in (("UTF-32LE", (2, 3), 0), ("UTF-32BE", (0, 1), 3),
                                                    ("UTF-16LE", (1, 3), 0), ("UTF-16BE", (0, 2), 1))
                     if all(quarters[i] > 0.5 for i in nul) and quarters[filled] < 0.5), None)
    if path is not None and path.endswith(".bin"):  # ids of tokens look the same
        encoding = None
    found = f"{nuls:,} of its first {len(data):,} bytes are NUL" if head else f"{nuls:,} NULs in {len(data):,} bytes"
    if encoding is None:
        raise SourceError(f"{named} is no text but a binary file, or damaged ({found}); if it is text in UTF-16 "
                          f"without a byte order mark, convert it: {_conversion('UTF-16LE', path)}")
    raise SourceError(f"{named} is no UTF-8 ({found}): it looks like {encoding} without a byte order mark; convert "
                      f"it: {_conversion(encoding, path)}")


def _way_out(head: bytes, path: str | None) -> str:
    """What to do with text that is not in UTF-8."""
    if sum(byte >= 0x80 for byte in head) <= len(head) * NO_TEXT and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", head):
        return f"if it is Latin-1 (Windows-1252), convert it: {_conversion('WINDOWS-1252', path)}"
    return f"find its encoding (file -i {_paths(path)['path']}) and convert it: {_conversion('ENCODING', path)}"


def _conversion(encoding: str, path: str | None) -> str:
    """The command that makes UTF-8 of a file."""
    return piped(f"iconv -f {encoding} -t UTF-8", path, _paths(path)["new"])


def piped(command: str, path: str | None, new: str) -> str:
    """A shell's line that makes a file `new` (in quotes if need be) of one that may be packed."""
    unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(Path(path or "").suffix.lower())
    quoted = "FILE" if path is None else shlex.quote(path)
    return f"{unpack} < {quoted} | {command} > {new}" if unpack else f"{command} < {quoted} > {new}"


def _paths(path: str | None) -> dict[str, str]:
    """A file and the one to make of it, as a shell takes them."""
    if path is None:
        return {"path": "FILE", "new": "NEW_FILE"}
    named = Path(path[:-len(Path(path).suffix)] if path.lower().endswith((".gz", ".zst", ".bz2", ".xz")) else path)
    new = named.with_name(f"{named.stem}.utf-8{named.suffix if named.suffix in ('.jsonl', '.json') else '.txt'}")
    return {"path": shlex.quote(path), "new": shlex.quote(str(new))}


# ---- JSON rows -------------------------------------------------------------------------------------------------------

def row_of(line: bytes) -> tuple[object, int]:
    """The value of a line of JSON, and how much in it was replaced by U+FFFD: invalid UTF-8, and lone surrogates, which
    JSON may spell as \\ud800. Raises ValueError."""
    text, invalid = decoded(line)
    value = files.parse_json(text.removeprefix("\ufeff"))
    if not SURROGATE.search(text):
        return value, invalid
    try:
        clean = replaced_in_all(value)
        shown, cleaned = (json.dumps(each, ensure_ascii=False) for each in (value, clean))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return clean, invalid + cleaned.count("\ufffd") - shown.count("\ufffd")


def replaced_in_all(value: object) -> object:
    """A JSON value with lone surrogates in its texts, keys included, as U+FFFD."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [replaced_in_all(each) for each in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): replaced_in_all(each) for key, each in value.items()}
    return value
