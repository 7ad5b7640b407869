"""Sources: where a text may be cut, and what the units of files hold."""

import gzip
import json
import pickle
import random

from data import sources
from data.source_files import find_files
from data.sources import FilesUnit, RowsUnit, TextUnit, texts_of, whole_document_units


def test_the_search_for_a_cut_finds_the_first_one_from_any_byte(tmp_path, monkeypatch):
    rng = random.Random(0)
    text = "".join(rng.choices(["a", "é", "中", "😀", " ", "\n", "\u3000", "\u3000\n中", ".\n1", "中 中", "e\u0301"],
                               k=800))
    legal = [len(text[:cut.start()].encode()) for cut in sources.CUT.finditer(text)]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(sources, "SEARCH_BYTES", 40)
    size = len(text.encode())
    with open(tmp_path / "a.txt", "rb") as opened:
        for start in range(8, size):
            found = sources._next_cut(opened, start, size)
            assert found is None or found in legal
            # one right behind `start` may be missed: the two characters before it are needed
            assert (found or 10**6) <= next((cut for cut in legal if cut >= start + 8), 10**6)


def test_units_are_small_read_themselves_in_any_process_and_cover_all_texts_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    texts = [f"number {i} " + "and so on " * (i % 40) for i in range(60)]
    texts[7] += "and so on " * 200
    for i in range(20):
        (tmp_path / f"a{i:02d}.txt").write_text(texts[i])
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[20:40])
    (tmp_path / "b.jsonl").write_text(rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.replace("number", "packed").encode()))
    units = list(whole_document_units(find_files(str(tmp_path)), "train", val_fraction=0.0, unit_bytes=300))
    assert {type(unit) for unit in units} == {TextUnit, FilesUnit, RowsUnit} and len(units) > 30
    found = ""
    for unit in pickle.loads(pickle.dumps(units)):
        for text, invalid in texts_of(unit, "text"):
            found += text + "|" * unit.ends
            assert invalid == 0 and len(text) < 800
    packed = [text.replace("number", "packed") for text in texts[20:40]]
    assert found == "".join(text + "|" for text in [*texts[:40], *packed])


def test_of_a_large_source_blocks_of_every_file_say_whether_it_was_changed(tmp_path, monkeypatch):
    data = {name: bytes([65 + i % 26 for i in range(size)]) for name, size in (("a", 5000), ("b", 90), ("c", 20_000))}

    def content(**changed: int) -> str:
        for name, each in data.items():
            place = changed.get(name, 0)
            (tmp_path / f"{name}.txt").write_bytes(each if name not in changed else
                                                   each[:place] + b"?" + each[place + 1:])
        return sources.describe(str(tmp_path))["content"]

    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    edits = [{"a": 0}, {"a": 4999}, {"b": 50}, {"c": 19_999}, {"c": 150}]
    assert content() == content() and len({content(), *(content(**edit) for edit in edits)}) == 6
    monkeypatch.setattr(sources, "HASHED_BYTES", 2500)  # a tenth
    assert len({content(), *(content(**edit) for edit in edits[:4])}) == 5
    assert content(c=150) == content()  # not all is read
