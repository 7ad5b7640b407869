"""Text in every encoding, against Python's own codecs; what is no text; rows of JSON."""

import codecs
import gzip
import io
import json
import pickle
import random
import shlex
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from config import UserError
from data import sources
from data.dataset import open_dataset, open_split
from data.prepare import prepare
from data.source_files import find_files
from data.sources import texts_of, whole_document_units
from data.text import read_text

TEXT = "Grüße, 中文 und 😀, e\u0301, \u2028 and more words.\n" * 400
ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
             "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


def text_in(folder: Path) -> str:
    """What is in the shards of tokenizer bytes, train and then val, end-of-texts left out."""
    dataset = open_dataset(folder)
    ids = []
    for split in {shard["split"]: None for shard in dataset.index["shards"]}:
        stream = open_split(dataset, split)
        ids += stream.windows(np.array([0]), stream.tokens)[0].tolist()
    return bytes(i for i in ids if i < 256).decode()


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed; .zst stays untested")
        return zstandard.compress(data)
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md.zst", "a.jsonl", "a.jsonl.gz", "a.json.zst"])
def test_a_byte_order_mark_names_the_encoding_of_every_kind_of_file(encoding, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 700)
    lines = TEXT.split("\n") if ".js" in name else []
    content = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\r\n" for line in lines) or TEXT
    data = ENCODINGS[encoding] + content.encode(encoding)
    (tmp_path / name).write_bytes(compressed(name, data))
    source = [str(tmp_path / name)]
    index = prepare(source, tmp_path / "out", tokenizer="bytes", val_sources=source)
    assert text_in(tmp_path / "out") == 2 * ("".join(lines) or TEXT)
    assert index["invalid_utf8"] == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_pieces_are_cut_where_those_of_utf8_are(encoding, name, tmp_path, monkeypatch):
    rng = random.Random(0)
    text = "".join(rng.choices(["a", "é", "中", "😀", " ", "\n", "\u3000\n中", "word and word", "。" * 50], k=4000))
    for constant, value in (("UNIT_BYTES", 300), ("LONGEST_UNIT_BYTES", 200), ("SEARCH_BYTES", 40)):
        monkeypatch.setattr(sources, constant, value)
    found = []
    for path, data in ((tmp_path / "utf8.txt", text.encode()),
                       (tmp_path / name, compressed(name, ENCODINGS[encoding] + text.encode(encoding)))):
        path.write_bytes(data)
        units = whole_document_units(find_files(str(path)), None, val_fraction=0.5, unit_bytes=300)
        found.append([(unit.split, unit.ends, *texts_of(unit, "")) for unit in pickle.loads(pickle.dumps([*units]))])
    assert found[0] == found[1] and len(found[0]) > 40 and "".join(unit[2][0] for unit in found[1]) == text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_memory_does_not_grow_with_a_streamed_file(name, tmp_path, monkeypatch):
    for constant, value in (("UNIT_BYTES", 10_000), ("LONGEST_UNIT_BYTES", 20_000)):
        monkeypatch.setattr(sources, constant, value)
    line, peaks = json.dumps({"text": TEXT[:400]}, ensure_ascii=False) + "\r\n", []
    for lines in (5_000, 15_000):  # of 0.8 kB in UTF-16; blocks are of 1 MiB
        (tmp_path / name).write_bytes(compressed(name, (line * lines).encode("utf-16")))
        tracemalloc.start()
        count = sum(len(text) for unit in whole_document_units(find_files(str(tmp_path / name)), "train",
                                                               val_fraction=0.0, unit_bytes=10_000)
                    for text, _ in texts_of(unit, "text"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == lines * (400 if name == "a.jsonl" else len(line))
    assert peaks[1] < 1.1 * peaks[0]


def test_what_utf16_does_not_allow_is_replaced_and_counted_as_python_does(tmp_path):
    data = codecs.BOM_UTF16_LE + b"a\0" * 5000 + b"\0\xd8" + "é\ufffd".encode("utf-16-le") + b"\0\xdc\x3d\xd8b\0" + b"x"
    (tmp_path / "a.txt").write_bytes(data)
    index = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    expected = data.decode("utf-16", "replace")
    assert text_in(tmp_path / "out") == expected and index["invalid_utf8"] == expected.count("\ufffd") - 1 == 4


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("a.txt", "text")
    return buffer.getvalue()


WORDS = "Grüße an alle, und noch ein Wort dazu.\n" * 300
NO_TEXT = {
    **{name.replace("-", "").lower(): (WORDS.encode(name), f"looks like {name} without a byte order mark; convert "
                                                           f"it: .*iconv -f {name} -t UTF-8")
       for name in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE")},
    "koi8": (("привет, мир\n" * 300).encode("koi8-r"), "is no text in UTF-8 .* find its encoding .* iconv -f ENCODING"),
    "zip": (zipped(), "is a zip archive"), "gzip": (gzip.compress(b"text"), "compressed by gzip, not text; unpack it"),
    "pickle": (pickle.dumps([1.5] * 100), "is a Python pickle"), "pdf": (b"%PDF-1.4 text", "is a PDF, .* pdftotext"),
    "safetensors": (save({"a": np.zeros(4)}), "is weights in safetensors"),
    "shard": (struct.pack("<256i", 20240520, 1, 0, *[0] * 253), "is a token shard, .* data.dir"),
    "shard32": (struct.pack("<256i", 20240801, 7, 0, *[0] * 253), "is a token shard, .* data.dir"),
    "numpy": (b"\x93NUMPY\1\0" + bytes(200), "is a numpy array"), "zeros": (bytes(5000), "a binary file, or damaged"),
    "random": (random.Random(0).randbytes(5000), "is no text in UTF-8"), "image": (b"\x89PNG\r\n\x1a\n", "is an image"),
    "parquet": (b"PAR1" + bytes(100), "is a parquet file, not text; let its name end in .parquet"),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz"])
def test_what_is_no_text_is_refused_by_what_it_is(name, suffix, tmp_path):
    data, message = NO_TEXT[name]
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(compressed(path.name, data))
    with pytest.raises(UserError, match=message) as caught:
        prepare([str(path)], tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    if suffix == "txt":
        for note in (print, None):
            with pytest.raises(UserError, match=message if note or name not in ("koi8", "random") else "is not valid"):
                read_text(str(path), "it", note=note)


@pytest.mark.parametrize("name", ["utf16le", "utf16be", "utf32le", "utf32be", "latin1"])
@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_the_conversion_that_is_shown_gives_the_text(name, suffix, tmp_path, capfd):
    path = tmp_path / "it's mine" / f"a.{suffix}"
    path.parent.mkdir()
    path.write_bytes(compressed(path.name, NO_TEXT[name][0] if name in NO_TEXT else WORDS.encode("latin-1")))
    try:
        prepare([str(path)], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
        said = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: "))
    except UserError as error:
        said = str(error)
    subprocess.run(["bash", "-c", said.partition(" convert it: ")[2]], check=True)
    prepare([shlex.split(said)[-1]], tmp_path / "good", tokenizer="bytes", val_fraction=0.0)
    assert text_in(tmp_path / "good") == WORDS


def test_other_encodings_are_warned_of_at_once_and_by_file(tmp_path, capfd):
    for name, data in (("a.txt", b"fine"), ("b.txt", WORDS.encode("latin-1")), ("c.txt", WORDS.encode("latin-1"))):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="bytes")
    warning, summary = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: source '") and "b.txt': 600 of the first 11,700 characters are not UTF-8" in \
        warning and warning.endswith("(1 more of the files are like it)")
    assert "1,200 invalid UTF-8 sequences replaced" in summary


@pytest.mark.parametrize("level", [1, 19, "a frame each"])
def test_zstds_blocks_may_give_nothing_and_end_within_a_character(level, tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed; .zst stays untested")
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x10000, 0x110000)) for _ in range(100_000))  # can hardly be compressed
    data = codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(data, level) if level != "a frame each" else b"".join(
        zstandard.compress(data[i:i + 7]) for i in range(0, len(data), 7)))
    index = prepare([str(tmp_path / "a.txt.zst")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert index["invalid_utf8"] == 0 and text_in(tmp_path / "out") == text


@pytest.mark.parametrize(("words", "warned"), [("word " * 100 + "ü", True), ("word " * 1200 + "ü", False)])
def test_another_encoding_further_on_is_warned_of_once_when_it_comes(words, warned, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sources, "UNIT_BYTES", 10_000)
    data = ("plain words " * 10_000 + words * (100_000 // len(words))).encode("latin-1")
    (tmp_path / "a.txt").write_bytes(data)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == warned and all("are not UTF-8 and become U+FFFD; convert" in line for line in warnings)


# ---- Rows of JSON ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_end_with_any_newline_and_at_nothing_else(name, end, tmp_path):
    rows = ['\ufeff{"text": "a\u2028b\u2029c\x85d\\u000be"}', "", ' {"text": "\\ud83d\\ude00 f\\u2028"} ', "  ",
            '{"text": "g", "score": NaN, "n": {"a": [Infinity]}}', '\ufeff{"text": "h"}']  # no newline at the end
    (tmp_path / name).write_bytes(compressed(name, end.join(rows).encode()))
    index = prepare([str(tmp_path / name)], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert text_in(tmp_path / "out") == "a\u2028b\u2029c\x85d\x0be" + "😀 f\u2028" + "gh"
    assert index["shards"][0]["documents"] == 4 and index["invalid_utf8"] == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r", "\n\r\n\n\r"])
def test_lines_are_counted_as_editors_do_in_every_unit(ends, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    rows = "".join(json.dumps({"text": f"row {i}"} if i != 299 else "bad") + ends[i % len(ends)] for i in range(300))
    line = next(number for number, row in enumerate(io.StringIO(rows, newline=None), start=1) if "bad" in row)
    (tmp_path / name).write_bytes(compressed(name, rows.encode()))
    with pytest.raises(UserError, match=f"line {line} has no text"):
        prepare([str(tmp_path / name)], tmp_path / "out", tokenizer="bytes")


@pytest.mark.parametrize("kind", ["text", "examples"])
def test_what_no_utf8_can_spell_is_replaced_and_counted_in_every_kind_of_row(kind, tmp_path):
    row = b'{"text": "a\\ud800b\xffc\xef\xbf\xbd"}\n' if kind == "text" else \
        b'{"prompt": "a\\ud800b", "response": "\xffc\xef\xbf\xbd"}\n'
    (tmp_path / "a.jsonl").write_bytes(row * 3)
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bytes", max_seq_len=63, val_fraction=0.0)
    assert index["invalid_utf8"] == 6 and text_in(tmp_path / "out").count("a\ufffdb\ufffdc\ufffd") == 3


@pytest.mark.parametrize(("row", "message"), [
    ('{"text": null}', "line 2 has no text in a field 'text', only null in it; mend or remove the row"),
    ('{"text": 5}', "only 5 in it"), ('{"text": NaN}', "only NaN in it"), ('{"text": []}', "only .. in it"),
    ('{"text": "a", "text": "b"}', "is not JSON: it gives 'text' two values"),
    ('{"text": "a", "meta": {"x": 1, "x": 2}}', "it gives 'x' two values"), ('{"text": "a"} {}', "Extra data"),
])
def test_rows_without_one_text_are_named_with_what_they_hold(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{row}\n')
    with pytest.raises(UserError, match=message):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bytes")


def test_a_column_that_is_there_twice_is_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; parquet stays untested")
    import pyarrow
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet' has no column 'text' of text but several of that name"):
        prepare([str(tmp_path / "a.parquet")], tmp_path / "out", tokenizer="bytes")


def test_a_line_of_many_units_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    rows = [{"text": "a"}, {"text": "word " * 100_000}, {"text": "b"}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(compressed(name, "\n".join(map(json.dumps, rows)).encode()))
        prepare([str(tmp_path / name)], tmp_path / f"out{name}", tokenizer="bytes", val_fraction=0.0)
        assert text_in(tmp_path / f"out{name}") == "".join(row["text"] for row in rows)


def test_stdin_is_decoded_as_files_are(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\r\n".encode("utf-16"))))
    assert read_text(None, "stdin", note=None) == ("Grüße\r\n", 0)
