"""prepare.py against a plain reading of the same texts: what is in the shards, how it is split, and what goes wrong."""

import argparse
import errno
import gc
import gzip
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import files
from config import MachineError, UserError
from data import encode_units, output_folder, sources
from data import prepare as module
from data.dataset import open_dataset, open_split
from data.prepare import prepare
from data.tokenizer import load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
SOURCE = inspect.getsource(argparse)  # 100 kB of code and English that every machine has
PARTS = [part for part in SOURCE.split("\n\n") if part]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """A folder with a small tokenizer.json."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(PARTS, 600).save(folder / "tokenizer.json")
    return str(folder)


def tokens_of(folder: Path, split: str) -> list[int]:
    stream = open_split(open_dataset(folder), split)
    return stream.windows(np.array([0]), stream.tokens)[0].tolist()


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def jsonl(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


def by_hash(texts: list[str], split: str, fraction: float = 0.05) -> list[str]:
    def hashed(text: str) -> float:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return [text for text in texts if (hashed(text) < fraction) == (split == "val")]


def expected(tokenizer: str, texts: list[str]) -> list[int]:
    """Each text's ids, tiktoken's encode_ordinary of the whole, and end-of-text."""
    import tiktoken
    found = load_tokenizer(tokenizer)
    if found.name == "bytes":
        return [i for text in texts for i in [*text.encode(), found.eot]]
    oracle = tiktoken.Encoding("oracle", pat_str=found._pattern, mergeable_ranks=found._ranks, special_tokens={})
    return [i for text in texts for i in [*oracle.encode_ordinary(text), found.eot]]


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "data.prepare", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, **options)


# ---- What is written -------------------------------------------------------------------------------------------------

def test_one_text_is_split_by_characters_without_end_of_text_at_the_cut(tmp_path):
    text = SOURCE[:5000] + "é中😀" * 500
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    index = prepare([str(tmp_path / "book.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.1)
    cut = int(len(text) * 0.9)  # nanoGPT's data[:int(n * 0.9)]
    assert tokens_of(tmp_path / "out", "train") == list(text[:cut].encode())
    assert tokens_of(tmp_path / "out", "val") == [*text[cut:].encode(), 256]
    assert index["val_split"] == "characters"
    assert [(s["text_bytes"], s["documents"]) for s in index["shards"]] == [(len(text[:cut].encode()), 0),
                                                                            (len(text[cut:].encode()), 1)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_few_documents_are_split_by_characters_over_all_of_them(kind, tmp_path, bpe):
    texts = PARTS[:30]
    if kind == "txt":
        for i, text in enumerate(texts):
            (tmp_path / f"{i:02d}.txt").write_text(text, newline="")
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(jsonl(texts))
    else:
        write_parquet(tmp_path / "a.parquet", texts)
    prepare([str(tmp_path)], tmp_path / ".out", tokenizer=bpe, val_fraction=0.2)
    cut, eot = int(sum(map(len, texts)) * 0.8), load_tokenizer(bpe).eot
    train, val = [], []
    for text in texts:
        head, tail = text[:cut], text[cut:]
        train += expected(bpe, [head])[:None if not tail else -1] if head else []
        val += expected(bpe, [tail]) if tail else []
        cut = max(0, cut - len(text))
    assert tokens_of(tmp_path / ".out", "train") == train
    assert tokens_of(tmp_path / ".out", "val") == val
    assert (train + val).count(eot) == len(texts)


def test_many_documents_are_split_by_the_hash_of_their_text(tmp_path, bpe):
    texts = [f"{part} {i}" for i, part in enumerate(PARTS[:300])]
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=bpe)
    assert index["val_split"] == "hash" and 0 < len(by_hash(texts, "val")) < 60
    for split in ("train", "val"):
        assert tokens_of(tmp_path / "out", split) == expected(bpe, by_hash(texts, split))
    counts = {shard["split"]: (shard["documents"], shard["text_bytes"]) for shard in index["shards"]}
    assert counts == {split: (len(by_hash(texts, split)), sum(len(t.encode()) for t in by_hash(texts, split)))
                      for split in ("train", "val")}


def test_adding_documents_moves_none_from_one_split_to_the_other(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    for name, count in (("a", 200), ("b", 300)):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(texts[:count]))
        prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, tokenizer="bytes")
    few, many = tokens_of(tmp_path / "a", "val"), tokens_of(tmp_path / "b", "val")
    assert many[:len(few)] == few


def test_named_validation_text_is_all_of_val_and_nothing_else(tmp_path):
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "other.jsonl").write_text(jsonl(["two", "three"]))
    index = prepare([str(tmp_path / "train.txt")], tmp_path / "out", tokenizer="bytes",
                    val_sources=[str(tmp_path / "other.jsonl")])
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", ["one"])
    assert tokens_of(tmp_path / "out", "val") == expected("bytes", ["two", "three"])
    assert index["val_split"] == "given" and index["settings"]["val_fraction"] is None


def test_a_val_fraction_of_zero_writes_no_val_shard(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    index = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert [shard["split"] for shard in index["shards"]] == ["train"]
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", ["some text"])


def test_a_long_text_cut_into_units_has_the_ids_of_the_whole(tmp_path, bpe, monkeypatch):
    text = SOURCE + "Текст без латиницы. " * 500 + "日本語の文。\n" * 2000 + " " * 5000 + "x" + "-" * 5000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(sources, "UNIT_BYTES", 700)
    monkeypatch.setattr(sources, "SEARCH_BYTES", 64)
    file = sources.find_files(str(tmp_path / "a.txt"))[0]
    units = list(sources._txt_units(file, "train", 700))
    assert len(units) > 150 and sorted(unit.bytes for unit in units)[-2] < 3000  # all but the runs at the end
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=bpe, val_fraction=0.0)
    assert tokens_of(tmp_path / "out", "train") == expected(bpe, [text])


def test_a_text_without_any_place_to_cut_is_cut_between_characters(tmp_path, monkeypatch):
    text = "。" * 5000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    monkeypatch.setattr(sources, "LONGEST_UNIT_BYTES", 500)
    index = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", [text]) and index["invalid_utf8"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_invalid_utf8_is_replaced_and_counted_wherever_units_are_cut(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    data = b"".join(rng.choices([b"word and word ", b"\xff", b"\xe4\xb8", b"\xe4\xb8\xad", b"\x80\x80\x80\x80",
                                 b"\xf0\x9f", b" a", b"\n", b"\xef\xbf\xbd", b"\xed\xa0\x80"],
                                weights=[5, 1, 1, 1, 1, 1, 1, 1, 1, 1], k=3000))
    (tmp_path / "a.txt").write_bytes(data)
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    monkeypatch.setattr(sources, "SEARCH_BYTES", 32)
    index = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.3)
    text = data.decode("utf-8", "replace")
    assert bytes(tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "val")[:-1]).decode() == text
    assert index["invalid_utf8"] == text.count("\ufffd") - data.count("\ufffd".encode())


def test_lone_surrogates_in_json_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", ["a\ufffdb", "😀"]) and index["invalid_utf8"] == 1


def test_full_shards_hold_exactly_shard_tokens_and_join_to_the_same_stream(tmp_path, bpe):
    texts = [f"{part} é中 {i}" for i, part in enumerate(PARTS[:200])]
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=bpe, shard_tokens=1000)
    train = [shard for shard in index["shards"] if shard["split"] == "train"]
    assert len(train) > 5 and all(shard["tokens"] == 1000 for shard in train[:-1])
    assert [shard["file"] for shard in train] == [f"train_{i:05d}.bin" for i in range(len(train))]
    assert tokens_of(tmp_path / "out", "train") == expected(bpe, by_hash(texts, "train"))
    tokenizer, ids = load_tokenizer(bpe), tokens_of(tmp_path / "out", "train")
    for number, shard in enumerate(train):
        part = ids[1000 * number:1000 * number + shard["tokens"]]
        assert shard["text_bytes"] == len(tokenizer.decode_bytes(part))
        assert shard["documents"] == part.count(tokenizer.eot)


def test_ids_above_65535_are_written_as_uint32(tmp_path, bpe):
    file = json.loads(Path(bpe, "tokenizer.json").read_text())
    file["model"]["vocab"]["<|endoftext|>"] = file["added_tokens"][0]["id"] = 65_536
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "a.txt").write_text("some text")
    for eot, dtype in ((65_536, "uint32"), (65_535, "uint16")):
        file["model"]["vocab"]["<|endoftext|>"] = file["added_tokens"][0]["id"] = eot
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        index = prepare([str(tmp_path / "a.txt")], tmp_path / dtype, tokenizer=str(tmp_path / "tokenizer.json"),
                        val_fraction=0.0)
        assert (index["dtype"], index["vocab_size"]) == (dtype, eot + 1)
        assert tokens_of(tmp_path / dtype, "train")[-1] == eot


def write_parquet(path: Path, texts: list[str | None], kind: str = "") -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; parquet stays untested")
    import pyarrow
    if kind:
        texts = pyarrow.array(texts, "large_string" if kind == "large_string" else "string")
        texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)


def write_zst(path: Path, data: bytes) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed; .zst stays untested")
    half = len(data) // 2  # two frames, as parallel compressors write them, the second as zstd --long=31 does
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, write_content_size=0)
    long = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path.write_bytes(zstandard.compress(data[:half]) + long.compress(data[half:]) + long.flush())


def write_as(kind: str, path: Path, texts: list[str]) -> Path:
    path = path.with_suffix(f".{kind}")
    rows = jsonl(texts).rstrip("\n")  # the last row may lack its newline
    if kind.endswith("parquet"):
        write_parquet(path, texts, kind.removesuffix("parquet").rstrip("."))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(rows.encode()))
    elif kind == "jsonl.zst":
        write_zst(path, rows.encode())
    else:
        path.write_text(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "large_string.parquet",
                                  "string_view.parquet", "dictionary.parquet"])
def test_every_format_gives_the_same_documents(kind, tmp_path, monkeypatch):
    texts = [*PARTS[:50], "", "é中😀"]
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    path = write_as(kind, tmp_path / "a", texts)
    prepare([str(path)], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", [text for text in texts if text])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "dictionary.parquet"])
def test_a_row_without_text_is_named_or_skipped_alike_in_every_format(kind, tmp_path, capsys):
    path = write_as(kind, tmp_path / "a", ["one", *["x"] * 8, None, "", "two", None])
    assert f"a.{kind}' {'row' if 'parquet' in kind else 'line'} 10 has no text in a field 'text', only null in it" \
        in refusal(tmp_path, [path.name], val_fraction=0.0)
    index = prepare([str(path)], tmp_path / "out", tokenizer="bytes", val_fraction=0.0, bad_rows="skip")
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", ["one", *["x"] * 8, "two"])
    assert index["bad_rows"] == 2 and index["settings"]["bad_rows"] == "skip"
    assert re.search(r"2 bad rows left out \(\S+ (line|row) 10, \S+ (line|row) 13\)", capsys.readouterr().err)


def test_a_folder_is_read_in_the_order_of_its_names_without_hidden_and_unknown_files(tmp_path):
    for name, text in (("b.txt", "b"), ("a/z.txt", "az"), ("a/b/c.txt", "abc"), ("a.txt", "a"), ("c.py", "not text"),
                       (".hidden.txt", "hidden"), (".git/x.txt", "git"), ("empty.txt", ""), ("UPPER.TXT", "upper"),
                       ("a/y.jsonl", '{"text": "row"}\n')):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert tokens_of(tmp_path / "out", "train") == expected("bytes", ["upper", "abc", "row", "az", "a", "b"])


def test_the_bytes_depend_neither_on_where_the_text_lies_nor_on_when(tmp_path, bpe):
    for place in ("here", "there/deep"):
        (tmp_path / place / "texts").mkdir(parents=True)
        (tmp_path / place / "texts" / "a.txt").write_text(SOURCE)
        prepare([str(tmp_path / place / "texts")], tmp_path / place / "out", tokenizer=bpe)
    assert files_of(tmp_path / "here" / "out") == files_of(tmp_path / "there" / "deep" / "out")


def test_a_bpe_is_trained_on_the_training_split_alone_and_saved_beside_the_shards(tmp_path):
    texts = [f"{part} {i}" for i, part in enumerate(PARTS[:300])]
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bpe:500")
    alone = train_bpe(by_hash(texts, "train"), 500)
    assert index["tokenizer"] == "bpe:500" and (index["vocab_size"], index["eot"]) == (500, 499)
    assert index["tokenizer_sha256"] == alone.fingerprint == load_tokenizer(str(tmp_path / "out")).fingerprint


def test_a_bpe_of_a_large_text_is_trained_on_a_sample_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BPE_SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    (tmp_path / "a.txt").write_text(SOURCE)
    texts = sources.choose_split(sources.find_files(str(tmp_path / "a.txt")), [], sources.Rules(0.1))
    sample = list(module._training_texts(texts))
    assert 4_000 < sum(map(len, sample)) < 20_000
    found = [SOURCE.index(text) for text in sample]
    assert found == sorted(found) and found[-1] > 0.7 * len(SOURCE) and found[-1] < 0.9 * len(SOURCE)


def test_examples_left_out_as_too_long_are_counted_and_said(tmp_path, monkeypatch, capsys):
    """examples.py decides which; here every row with an x stands for those."""
    def leave_out(unit, packing, *others):
        assert packing.too_long == "drop"
        for example, invalid in examples(unit, packing, *others):
            yield None if "x" in example.text else example, invalid
    examples = encode_units.examples
    monkeypatch.setattr(encode_units, "examples", leave_out)
    rows = [{"prompt": "x" * (i % 3 == 0) + "a", "response": "b"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_seq_len": 99, "too_long": "drop"}
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bytes", val_fraction=0.2, **settings)
    assert [(lengths["examples"], lengths["dropped"]) for lengths in index["examples"].values()] == [(16, 8), (4, 2)]
    assert index["settings"]["too_long"] == "drop" and "8 left out as too long" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    shutil.rmtree(tmp_path / "out")
    found = refusal(tmp_path, ["a.jsonl"], val_fraction=0.0, **settings)
    assert "the train split holds 0 tokens" in found and "1 were left out as too long (--too-long" in found


# ---- Workers, interruptions ------------------------------------------------------------------------------------------

def many_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl").write_text(jsonl([f"{part} {i}" for i, part in enumerate(PARTS[:200])]))
    (folder / "b.txt").write_text(SOURCE, newline="")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(PARTS[200:300]).encode(), mtime=0))


def test_the_number_of_workers_does_not_change_the_bytes(tmp_path, bpe, monkeypatch):
    many_files(tmp_path / "in")
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    for workers in (1, 2, 3):
        prepare([str(tmp_path / "in")], tmp_path / str(workers), tokenizer=bpe, workers=workers, shard_tokens=9000)
    assert len(files_of(tmp_path / "1")) > 5
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "3")


def test_small_inputs_start_no_process(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(SOURCE)
    monkeypatch.setattr("concurrent.futures.process.ProcessPoolExecutor.submit", None)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", workers=4)


def test_importing_prepare_imports_nothing_heavy():
    code = ("import sys, data.prepare; print([m for m in ('torch', 'tiktoken', 'tokenizers', 'pyarrow', 'zstandard', "
            "'tqdm', 'requests', 'multiprocessing', 'concurrent.futures') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("stop_at", [0, 1, 3, 8, 25])
def test_stopped_anywhere_the_same_call_goes_on_to_the_same_bytes(stop_at, tmp_path, bpe, monkeypatch):
    many_files(tmp_path / "in")
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    settings = {"tokenizer": bpe, "shard_tokens": 9000}
    prepare([str(tmp_path / "in")], tmp_path / "whole", **settings)
    asked = iter(range(1000))
    with pytest.raises(module.PreparationStopped):
        prepare([str(tmp_path / "in")], tmp_path / "out", should_stop=lambda: next(asked) == stop_at, **settings)
    encoded = []
    encode = encode_units.Encoder.encode
    monkeypatch.setattr(encode_units.Encoder, "encode", lambda self, unit: encoded.append(unit) or encode(self, unit))
    prepare([str(tmp_path / "in")], tmp_path / "out", **settings)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    texts = sources.choose_split(sources.find_files(str(tmp_path / "in")), [], sources.Rules(0.05))
    assert encoded == list(texts.units(cuttable=True))[stop_at + 1:]  # nothing that was finished is done again


def killed_at(point: int, call: Callable[[], None]) -> bool:
    """Make the call in a child process that is killed when it changes the disk for the point-th time, by a write in the
    middle of it; whether it was."""
    child = os.fork()
    if child == 0:
        counter = itertools.count()

        def counted(function: Callable, before_dying: Callable = lambda *args, **kwargs: None) -> Callable:
            def wrapped(*args, **kwargs):
                if next(counter) == point:
                    before_dying(*args, **kwargs)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapped

        def write_half(path, parts, at=None):
            data = b"".join(bytes(memoryview(part).cast("B")) for part in parts)
            write(path, [data[:len(data) // 2]], at)

        write = files.write
        files.write, files.rename = counted(write, write_half), counted(files.rename)
        os.unlink, os.truncate = counted(os.unlink), counted(os.truncate)
        files.sync = counted(lambda path: None)  # nothing that a process wrote is lost when it alone dies
        call()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", ["text", "examples"])
def test_killed_at_any_moment_the_same_call_goes_on_to_the_same_bytes(kind, tmp_path, bpe, monkeypatch):
    rows = [{"text": f"{part} {i}"} if kind == "text" else {"prompt": part[-20:], "response": f"{part[:99]} {i}"}
            for i, part in enumerate(PARTS[:110 if kind == "text" else 40])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 1)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0 if kind == "text" else 60.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def call(out: str = "out") -> None:
        prepare([str(tmp_path / "a.jsonl")], tmp_path / out, tokenizer=bpe, val_fraction=0.3, max_seq_len=99,
                shard_tokens=3000 if kind == "text" else 600)  # examples: several shards of one unit
    call("whole")
    for point in itertools.count():
        if not killed_at(point, call):
            break
        if point % 3 == 0:
            killed_at(2, call)  # and once more, early in the second try
        call()
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole"), point
        shutil.rmtree(tmp_path / "out")
    assert point > 40


def test_a_trained_bpe_is_not_trained_again_when_the_call_goes_on(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(SOURCE)
    prepare([str(tmp_path / "a.txt")], tmp_path / "whole", tokenizer="bpe:400")
    with pytest.raises(module.PreparationStopped):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bpe:400", should_stop=lambda: True)
    monkeypatch.setattr(module, "train_bpe", None)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bpe:400")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_unfinished_folder_that_was_tampered_with_is_refused(tmp_path, bpe):
    def begin() -> None:
        with pytest.raises(module.PreparationStopped):
            prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes",
                    should_stop=lambda: True)
    (tmp_path / "a.txt").write_text("some text " * 50)
    for name, content, message in ((".train_00000.bin.part", "short", "holds fewer bytes than"),
                                   ("tokenizer.json", Path(bpe, "tokenizer.json").read_text(), "was changed meanwhile"),
                                   (".progress.json", "{", "is damaged")):
        begin()
        (tmp_path / "out" / name).write_text(content)
        with pytest.raises(UserError, match=message):
            prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_full_disk_is_one_line_with_status_1_and_can_be_gone_on_from(tmp_path):
    (tmp_path / "a.txt").write_text(SOURCE)

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # bytes; Python ignores the signal, writes fail
    words = [tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "bytes"]
    failed = run(*words, preexec_fn=small_files)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: writing ") and "the same command again" in failed.stderr
    assert run(*words).returncode == 0
    assert len(tokens_of(tmp_path / "out", "train")) == int(len(SOURCE) * 0.95)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps --ppid: that workers end with it is unchecked")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_workers_end_with_the_process_that_started_them_which_says_what_stopped_it(how, tmp_path, bpe):
    (tmp_path / "a.txt").write_text((SOURCE + "\n") * 200)  # seconds of work
    words = [tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", bpe, "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "data.prepare", *map(str, words)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(children := children_of(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) == 3  # two workers and multiprocessing's resource tracker
    number = signal.Signals[how]
    time.sleep(0.15)  # they are importing, or at work
    os.killpg(process.pid, number)  # as the terminal or a batch system does: to all of them
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert errors.splitlines()[-1] == (f"stopped while preparing {str(tmp_path / 'out')!r} ({how}); the same command "
                                       "goes on from there")
    while (left := [child for child in children if Path(f"/proc/{child}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and (tmp_path / "out" / ".progress.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps --ppid: that training ends with it is unchecked")
def test_a_stop_ends_the_training_of_a_tokenizer_and_the_same_command_goes_on(tmp_path):
    rng = random.Random(0)
    (tmp_path / "a.jsonl").write_text(jsonl(["".join(rng.choices("abcdefghij ", k=20_000)) for _ in range(200)]))
    words = [tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", "bpe:9000"]
    process = subprocess.Popen([sys.executable, "-m", "data.prepare", *map(str, words)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(children := children_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].endswith("(SIGINT); the same command goes on from there")
    while (left := [child for child in children if Path(f"/proc/{child}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and not (tmp_path / "out" / "tokenizer.json").exists()
    rewrite(tmp_path / "out" / ".progress.json", '"bpe:9000"', '"bpe:300"')  # a shorter way to the end
    assert run(*words[:-1], "bpe:300").returncode == 0


def test_what_was_encoded_before_a_stop_stays(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(SOURCE)
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    whole = prepare([str(tmp_path / "a.txt")], tmp_path / "whole", tokenizer="bytes")
    real = module.encode_units

    def stopped(*args):
        yield from itertools.islice(real(*args), 3)
        raise KeyboardInterrupt  # where a signal finds it waiting for the next unit

    monkeypatch.setattr(module, "encode_units", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes")
    assert json.loads((tmp_path / "out" / ".progress.json").read_text())["units"] == 3
    monkeypatch.setattr(module, "encode_units", real)
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes") == whole


def test_a_worker_that_dies_is_one_line_and_the_same_call_goes_on(tmp_path, monkeypatch, bpe):
    (tmp_path / "a.txt").write_text(SOURCE)
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    def kill_workers() -> bool:
        for worker in multiprocessing.active_children():
            worker.kill()
        return False
    with pytest.raises(MachineError, match="a worker process died.*fewer --workers"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=bpe, workers=2,
                should_stop=kill_workers)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=bpe, workers=2)
    assert tokens_of(tmp_path / "out", "val") == expected(bpe, [SOURCE[int(len(SOURCE) * 0.95):]])


# ---- The user's mistakes: one line, status 2, nothing written --------------------------------------------------------

def refused(tmp_path: Path, *words: str) -> str:
    before = sorted(tmp_path.rglob("*"))
    result = run(*words)
    assert result.returncode == 2 and result.stdout == "", result
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    return result.stderr


def test_wrong_command_lines_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    text, out = tmp_path / "a.txt", ["--out", tmp_path / "out", "--tokenizer", "bytes"]
    assert "unrecognized arguments: --nonsense" in refused(tmp_path, text, *out, "--nonsense")
    assert "--out DIR is missing" in refused(tmp_path, text)
    assert "argument --too-long: invalid choice: 'keep'" in refused(tmp_path, text, *out, "--too-long", "keep")
    assert "not allowed with argument" in refused(tmp_path, text, *out, "--val", text, "--val-fraction", "0.1")
    assert "--verify DIR stands alone" in refused(tmp_path, text, "--verify", tmp_path)


def refusal(tmp_path: Path, sources: list, **settings) -> str:
    """What prepare() says; nothing may be left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare([str(tmp_path / source) for source in sources], tmp_path / "out",
                **{"tokenizer": "bytes"} | settings)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sources_that_cannot_be_used_are_named(tmp_path):
    for name in ("empty.txt", "rows.jsonl", "good.txt"):
        (tmp_path / name).write_text({"rows.jsonl": '{"text": ""}\n', "good.txt": "x"}.get(name, ""))
    (tmp_path / "folder").mkdir()
    assert "no source is named" in refusal(tmp_path, [])
    assert "missing.txt' does not exist" in refusal(tmp_path, ["good.txt", "missing.txt"])
    assert "empty.txt' is empty" in refusal(tmp_path, ["empty.txt"])
    assert "folder' holds no text" in refusal(tmp_path, ["folder"])
    assert "rows.jsonl' holds no text: every row is empty" in refusal(tmp_path, ["rows.jsonl"])
    assert "missing.txt' does not exist" in refusal(tmp_path, ["good.txt"], val_sources=[str(tmp_path / "missing.txt")])


@pytest.mark.parametrize(("settings", "message"), [
    ({"shard_tokens": 0}, "--shard-tokens 0 should lie between 1 and"), ({"shard_tokens": 2**31}, "should lie between"),
    ({"workers": 0}, "--workers 0 should be at least 1"), ({"val_fraction": 1.0}, "--val-fraction 1.0 should lie"),
    ({"val_fraction": -0.1}, "--val-fraction -0.1 should lie"), ({"tokenizer": "gpt5"}, "'gpt5' is neither a name"),
    ({"tokenizer": "bpe:100000"}, "the training text yields only"),
    *(({"tokenizer": name}, f"{name!r} should be bpe:N with N from 257")
      for name in ("bpe:", "bpe:1e3", "bpe:-5", "bpe:1000.5", "bpe:256", "bpe:99999999999", "bpe:٣٠٠")),
    *(({"tokenizer": name}, f"{name!r} is neither a name nor a file") for name in ("BPE:1000", "gpt-2", "bpe")),
])
def test_settings_out_of_range_are_named(settings, message, tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    assert message in refusal(tmp_path, ["a.txt"], **settings)


@pytest.mark.parametrize(("row", "message"), [
    ("{broken", "line 150 is not JSON"), ('["text"]', "line 150 has no text in a field 'text', only [\"text\"]"),
    ('{"content": "x", "id": 3}', "line 150 has no text in a field 'text', only fields content, id"),
    ('{"text": 7}', "line 150 has no text in a field 'text', only 7 in it"), ("[" * 100_000, "line 150 is not JSON"),
])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_row_that_is_no_document_is_named_by_file_and_line(row, message, kind, tmp_path, monkeypatch):
    gc.collect()  # what other tests left must not be finalized at the bottom of the deep row's recursion
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)  # it lies in a later unit
    rows = (jsonl(PARTS[:148]) + "\n" + row + "\n" + jsonl(PARTS[148:160])).encode()
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(rows) if kind.endswith("gz") else rows)
    found = refusal(tmp_path, [f"a.{kind}"])
    assert message in found and f"a.{kind}'" in found and "(--bad-rows skip, data.bad_rows=skip)" in found


def folder_with_a_bad_row(folder: Path) -> None:
    """Five files of 15 rows of their own; a row of the fourth is broken."""
    folder.mkdir()
    for i, name in enumerate("abcde"):
        rows = jsonl([f"{name} {part} é{number}" for number, part in enumerate(PARTS[20 * i:20 * i + 40])])
        (folder / f"{name}.jsonl").write_text(rows if name != "d" else rows.replace('{"id": 30,', '{"id": 30;'))


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


MENDS = {  # how the user mends the row, and perhaps more
    "as it should be": lambda folder: rewrite(folder / "d.jsonl", '{"id": 30;', '{"id": 30,'),
    "the row removed": lambda folder: (folder / "d.jsonl").write_text(
        "".join(line for line in (folder / "d.jsonl").read_text().splitlines(True) if '{"id": 30;' not in line)),
    "the file removed": lambda folder: (folder / "d.jsonl").unlink(),
    "a file before it, too": lambda folder: (rewrite(folder / "d.jsonl", '{"id": 30;', '{"id": 30,'),
                                             rewrite(folder / "b.jsonl", '"id": 20,', '"id": 21,')),
    "the first file, too": lambda folder: (rewrite(folder / "d.jsonl", '{"id": 30;', '{"id": 30,'),
                                           rewrite(folder / "a.jsonl", '"id": 0,', '"id": 9,')),
    "skipped": lambda folder: None,
}


@pytest.mark.parametrize(("how", "workers"), [*((how, 1) for how in MENDS), ("as it should be", 2)])
def test_a_bad_row_keeps_what_is_done_and_once_mended_the_same_call_goes_on(how, workers, tmp_path, bpe, monkeypatch):
    folder_with_a_bad_row(tmp_path / "in")
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    settings = {"tokenizer": bpe, "shard_tokens": 1500, "workers": workers}
    words = {"bad_rows": "skip"} if how == "skipped" else {}

    with pytest.raises(UserError, match=r"d.jsonl' line 31 is not JSON.*what was made before it is kept"):
        prepare([str(tmp_path / "in")], tmp_path / "out", **settings)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train_*.bin")}
    assert len(finished) > 5

    MENDS[how](tmp_path / "in")
    encoded, encode = [], encode_units.Encoder.encode
    monkeypatch.setattr(encode_units.Encoder, "encode", lambda self, unit: encoded.append(unit) or encode(self, unit))
    index = prepare([str(tmp_path / "in")], tmp_path / "out", **settings, **words)
    goes_on_in = encoded[0].path[-7:] if workers == 1 else None
    prepare([str(tmp_path / "in")], tmp_path / "whole", **settings, **words)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert index["bad_rows"] == (how == "skipped")

    first = {"a file before it, too": "b.jsonl", "the first file, too": "a.jsonl", "the file removed": "e.jsonl"}
    assert goes_on_in in (first.get(how, "d.jsonl"), None)
    kept = sum(path.exists() and path.stat().st_mtime_ns == changed for path, changed in finished.items())
    assert kept == 0 if how == "the first file, too" else \
        0 < kept < len(finished) if how in first else kept == len(finished)


@pytest.mark.parametrize("point", [0, 1, 2, 3, 5, 8, 13])
def test_killed_while_going_back_the_same_call_goes_on_to_the_same_bytes(point, tmp_path, bpe, monkeypatch):
    folder_with_a_bad_row(tmp_path / "in")
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    settings = {"tokenizer": bpe, "shard_tokens": 1500}
    with pytest.raises(UserError, match="is kept"):
        prepare([str(tmp_path / "in")], tmp_path / "out", **settings)
    MENDS["a file before it, too"](tmp_path / "in")
    assert killed_at(point, lambda: prepare([str(tmp_path / "in")], tmp_path / "out", **settings))
    for folder in ("out", "whole"):
        prepare([str(tmp_path / "in")], tmp_path / folder, **settings)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_points_to_go_back_to_are_thinned_out(tmp_path, bpe, monkeypatch):
    folder_with_a_bad_row(tmp_path / "in")
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(output_folder, "POINTS", 8)
    with pytest.raises(UserError, match="is kept"):
        prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer=bpe)
    progress = json.loads((tmp_path / "out" / ".progress.json").read_text())
    units = [point["units"] for point in progress["points"]]
    assert 3 < len(units) < 8 and units == sorted(set(units)) and units[-1] == progress["units"] - 1


def test_a_bpe_of_changed_sources_is_trained_again_and_all_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    (tmp_path / "a.txt").write_text(SOURCE)
    asked = iter(range(1000))
    with pytest.raises(module.PreparationStopped):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bpe:400", should_stop=lambda: next(asked) == 9)
    (tmp_path / "a.txt").write_text(SOURCE + "the the the end" * 100)
    for folder in ("out", "whole"):
        prepare([str(tmp_path / "a.txt")], tmp_path / folder, tokenizer="bpe:400")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert "and with it bpe:400, which is trained on it: all is made anew" in capsys.readouterr().err


def test_skipped_rows_are_counted_over_all_starts_and_the_first_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    good = [f"{part} {i}" for i, part in enumerate(PARTS[:150])]
    rows = jsonl(good).splitlines(True)
    for place in (103, 120, 121, 140, 149):
        rows.insert(place, "{broken\n")
    (tmp_path / "a.jsonl").write_text("".join(rows))
    asked = iter(range(1000))
    settings = {"tokenizer": "bytes", "bad_rows": "skip"}
    with pytest.raises(module.PreparationStopped):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", should_stop=lambda: next(asked) == 42, **settings)
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **settings)
    for split in ("train", "val"):
        assert tokens_of(tmp_path / "out", split) == expected("bytes", by_hash(good, split))
    assert index["bad_rows"] == 5
    assert re.search(r"5 bad rows left out \(\S+a.jsonl' line 104, \S+ line 121, \S+ line 122, \.\.\.\)",
                     capsys.readouterr().err)
    with pytest.raises(UserError, match='bad_rows: "skip" -> "error"'):  # the shards are not those of all rows
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bytes")


def test_bad_rows_are_skipped_wherever_rows_are_read_before_they_are_encoded(tmp_path):
    """By the look at the first row, by a split by characters (in the unit that it cuts, too), by a BPE's training."""
    rows = ["{broken\n", *jsonl(PARTS[:20]).splitlines(True), '{"text": null}\n', "{broken\n"]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "b.jsonl").write_text(jsonl(PARTS[:20]))
    found = [prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, tokenizer="bpe:300", bad_rows="skip")
             for name in "ab"]
    assert found[0]["val_split"] == "characters" and [index["bad_rows"] for index in found] == [3, 0]
    for name in ("tokenizer.json", "train_00000.bin", "val_00000.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_examples_are_skipped_and_counted_too(tmp_path):
    good = [{"prompt": f"{part[:40]} {i}", "response": "yes"} for i, part in enumerate(PARTS[:120])]
    bad = ['{"prompt": "x", "response": ""}', '{"prompt": "x"}', '{"text": "x"}', "nonsense"]
    for name, rows in (("a", [*bad[3:], *map(json.dumps, good[:50]), *bad[:3], *map(json.dumps, good[50:])]),
                       ("b", map(json.dumps, good))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        index = prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, tokenizer="bytes", max_seq_len=99,
                        bad_rows="skip")
        assert index["bad_rows"] == (4 if name == "a" else 0)
    assert tokens_of(tmp_path / "a", "train") == tokens_of(tmp_path / "b", "train")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_damaged_file_is_named(kind, tmp_path):
    path = write_as(kind, tmp_path / "a", PARTS[:200])
    path.write_bytes(path.read_bytes()[:-20])
    assert f"a.{kind}' cannot be read" in refusal(tmp_path, [path.name])
    path.write_bytes(b"nonsense" * 10)
    assert f"a.{kind}' cannot be read" in refusal(tmp_path, [path.name])


def test_a_column_that_holds_no_text_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    assert "no column 'content' of text" in refusal(tmp_path, ["a.parquet"], text_field="content")
    write_parquet(tmp_path / "a.parquet", [7])
    assert "no column 'text' of text but int64" in refusal(tmp_path, ["a.parquet"])


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_a_package_that_is_missing_is_named(package, name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"anything")
    for known in [known for known in sys.modules if known.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}, which is not installed; pip install {package}" in refusal(tmp_path, [name])


def test_a_split_without_a_token_says_what_to_change(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([str(i) for i in range(100)]))
    found = refusal(tmp_path, ["a.jsonl"], val_fraction=1e-9)
    assert "the val split holds 0 tokens; a hash of its text" in found and "all 100 went to the other split" in found
    (tmp_path / "b.txt").write_text("x")
    assert "the train split holds 0 tokens; give more text" in refusal(tmp_path, ["b.txt"], val_fraction=0.5)


def test_equal_documents_go_to_one_side_which_is_said_with_ways_out_that_work(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(["the same"] * 150))
    (tmp_path / "b.txt").write_text("other text")
    found = refusal(tmp_path, ["a.jsonl"])
    assert "all 150 went to the other split, as equal ones do together" in found and "--val-fraction or 0 (" in found
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "none", tokenizer="bytes", val_fraction=0.0)
    assert {shard["split"] for shard in index["shards"]} == {"train"}
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "given", tokenizer="bytes",
                    val_sources=[str(tmp_path / "b.txt")])
    assert {shard["split"] for shard in index["shards"]} == {"train", "val"}


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_end_of_text_spelled_in_a_text_is_counted_or_ends_a_document(kind, tmp_path, bpe, capsys, monkeypatch):
    import tiktoken
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    text = "<|endoftext|>".join(["", *PARTS[:40], PARTS[40] + " ", ""])
    (tmp_path / f"a.{kind}").write_text(text if kind == "txt" else jsonl([text]), newline="")
    plain = prepare([str(tmp_path / f"a.{kind}")], tmp_path / "plain", tokenizer=bpe, val_fraction=0.0)
    said = capsys.readouterr().err
    assert plain["separators"] == 42 and "42 times the text spells end-of-text, which is plain text in it" in said
    assert tokens_of(tmp_path / "plain", "train") == expected(bpe, [text]) and "--parse-special" in said
    index = prepare([str(tmp_path / f"a.{kind}")], tmp_path / "out", tokenizer=bpe, val_fraction=0.0,
                    parse_special=True)
    found = load_tokenizer(bpe)
    oracle = tiktoken.Encoding("oracle", pat_str=found._pattern, mergeable_ranks=found._ranks,
                               special_tokens=found.special_ids)
    assert tokens_of(tmp_path / "out", "train") == oracle.encode(text, allowed_special="all")[1:]  # no empty document
    assert sum(shard["documents"] for shard in index["shards"]) == 41
    assert "spells end-of-text, where a document ends" in capsys.readouterr().err
    assert "parse_special: true -> false" in refusal(tmp_path, [f"a.{kind}"], val_fraction=0.0, tokenizer=bpe)


def test_end_of_text_in_examples_is_no_document_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert "--parse-special (data.parse_special) is for plain text" in refusal(
        tmp_path, ["a.jsonl"], max_seq_len=9, parse_special=True)


def test_only_an_empty_folder_is_written_into(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_00000.bin").write_text("somebody's")
    assert "out' is not empty, it holds train_00000.bin; name an empty or new one" in refusal(tmp_path, ["a.txt"])
    assert (tmp_path / "out" / "train_00000.bin").read_text() == "somebody's"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").write_text("a file")
    assert "out' cannot be written: File exists" in refusal(tmp_path, ["a.txt"])


def test_the_same_command_again_finds_it_done_and_another_lists_the_differences(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text " * 50)
    first = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes")
    before, _ = files_of(tmp_path / "out"), capsys.readouterr()
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes") == first
    assert "is prepared already" in capsys.readouterr().err and files_of(tmp_path / "out") == before
    found = refusal(tmp_path, ["a.txt"], val_fraction=0.1, tokenizer="bpe:300")
    assert 'tokenizer: "bytes" -> "bpe:300"; val_fraction: 0.05 -> 0.1' in found and "text_field" not in found
    (tmp_path / "a.txt").write_text("SOME TEXT " * 50)  # of the same size
    assert re.search(r'settings \(sources: .*"content": "(\w+)".* -> .*"content": "(?!\1)\w+"',
                     refusal(tmp_path, ["a.txt"]))


def test_a_finished_folder_that_cannot_be_written_is_found_done(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(SOURCE)
    made = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes")

    def read_only(path, *rest):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    for name in ("open", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes") == made
    assert "is prepared already" in capsys.readouterr().err
    with pytest.raises(UserError, match="was made with other settings"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", val_fraction=0.2)


def test_an_unfinished_folder_of_other_settings_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    with pytest.raises(module.PreparationStopped):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", should_stop=lambda: True)
    assert "val_fraction: 0.05 -> 0.2" in refusal(tmp_path, ["a.txt"], val_fraction=0.2)


def test_two_processes_do_not_fill_the_same_folder(tmp_path):
    (tmp_path / "a.txt").write_text("some text")

    def second() -> bool:
        assert "another process is preparing" in refusal(tmp_path, ["a.txt"])
        return False
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", should_stop=second)
    assert (tmp_path / "out" / "index.json").exists() and not (tmp_path / "out" / ".lock").exists()


def test_a_source_that_goes_away_in_the_middle_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    (tmp_path / "a.txt").write_text(SOURCE)

    def remove() -> bool:
        (tmp_path / "a.txt").unlink(missing_ok=True)
        return False
    with pytest.raises(MachineError, match="reading .*a.txt' failed: No such file or directory; give the same command"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes", should_stop=remove)
    assert (tmp_path / "out" / ".progress.json").exists()


def test_no_space_in_the_middle_keeps_what_is_done(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")

    def full(path, content):
        if path.name == "index.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content)
    write_whole = files.write_whole
    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(MachineError, match="No space left on device; make room and give the same command again"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="bytes")
    assert (tmp_path / "out" / ".progress.json").exists()


# ---- --verify --------------------------------------------------------------------------------------------------------

def test_verify_finds_a_flipped_bit_by_the_name_of_its_shard(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    assert run(tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "bytes").returncode == 0
    assert run("--verify", tmp_path / "out").returncode == 0
    data = bytearray((tmp_path / "out" / "val_00000.bin").read_bytes())
    data[-3] ^= 1
    (tmp_path / "out" / "val_00000.bin").write_bytes(data)
    found = run("--verify", tmp_path / "out")
    assert found.returncode == 1 and "val_00000.bin' is damaged" in found.stderr.splitlines()[-1]
    assert "is no folder" in refused(tmp_path, "--verify", tmp_path / "nowhere")
