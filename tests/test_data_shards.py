"""Shards, read: what a damaged folder is told, and windows against a plain array."""

import hashlib
import json
import struct
import sys

import numpy as np
import pytest

import data.shards
from data.shards import (
    Dataset,
    ShardError,
    TokenStream,
    load_index,
    open_dataset,
    open_split,
    read_header,
)
from data.write_shards import ShardWriter, write_index


def llmc_bytes(tokens, magic=20240520, version=1, letter="H", count=None) -> bytes:
    """A shard as llm.c's data scripts write it, by struct alone."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{letter}", *tokens)


def write_shard(path, tokens, dtype=np.uint16, vocab_size=60_000) -> dict:
    writer = ShardWriter(path, dtype, vocab_size)
    writer.write(np.asarray(tokens))
    return writer.close()


def make_folder(folder, train, val=((1, 2, 3),), dtype=np.uint16, vocab_size=60_000):
    """A prepared data folder with one shard for each token list."""
    shards = []
    for split, lists in (("train", train), ("val", val)):
        for number, tokens in enumerate(lists):
            entry = write_shard(folder / f"{split}_{number:05d}.bin", tokens, dtype, vocab_size)
            shards.append({**entry, "split": split, "text_bytes": 4 * len(tokens), "documents": 1})
    write_index(folder, {"format": 1, "tokenizer": "bpe:60000", "dtype": np.dtype(dtype).name,
                         "vocab_size": vocab_size, "eot": 0, "settings": {"source": ["a.txt"]}, "shards": shards})
    return folder


# ---- Headers ---------------------------------------------------------------------------------------------------------

def broken_files():
    good = llmc_bytes(range(100))
    return {
        "empty": (b"", "0 bytes"),
        "header cut short": (good[:1000], "1000 bytes"),
        "tokens cut short": (good[:-1], "1223 bytes.*100 tokens.*1224"),
        "bytes too many": (good + b"\0\0", "1226 bytes"),
        "another version": (llmc_bytes(range(100), version=2), "version 2"),
        "an llm.c evaluation file": (llmc_bytes(range(100), magic=20240522), "20240522"),
        "nanoGPT's headerless tokens": (np.arange(5000, dtype="<u2").tobytes(), "nanoGPT.*train.bin or val.bin"),
        "a negative count": (llmc_bytes(range(100), count=-1), "-1 tokens"),
    }


@pytest.mark.parametrize("kind", list(broken_files()))
def test_a_broken_shard_is_named_with_what_was_expected(tmp_path, kind):
    content, message = broken_files()[kind]
    (tmp_path / "train_00000.bin").write_bytes(content)
    with pytest.raises(ShardError, match="train_00000.bin.*" + message) as caught:
        read_header(tmp_path / "train_00000.bin")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ShardError, match="gone.bin.*No such file"):
        read_header(tmp_path / "gone.bin")


# ---- The index and the folder ----------------------------------------------------------------------------------------

def test_the_same_index_gives_the_same_bytes_and_comes_back_equal(tmp_path):
    index = load_index(make_folder(tmp_path, [range(50)]))
    before = (tmp_path / "index.json").read_bytes()
    write_index(tmp_path, index)
    assert (tmp_path / "index.json").read_bytes() == before
    assert json.loads(before) == index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "train_00000.bin", "val_00000.bin"]


def test_the_index_hash_depends_on_content_and_not_on_the_order_of_keys(tmp_path):
    index = load_index(make_folder(tmp_path, [range(50)]))
    assert Dataset(tmp_path, dict(reversed(index.items()))).hash == Dataset(tmp_path, index).hash
    assert Dataset(tmp_path, {**index, "eot": 1}).hash != Dataset(tmp_path, index).hash


def test_a_folder_without_an_index_has_none(tmp_path):
    assert load_index(tmp_path) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"format": 2}, "format 2"), ({"dtype": "int64"}, "int64"), ({"vocab_size": "many"}, "vocab_size"),
    ({"eot": "<end>"}, "eot"), ({"shards": None}, "shards None"), ({"shards": [{"file": "a.bin"}]}, "shard 0"),
    ({"shards": [{"file": "../a.bin", "split": "train", "tokens": 1, "sha256": ""}]}, "../a.bin"),
])
def test_an_index_of_the_wrong_shape_is_refused(tmp_path, change, message):
    index = load_index(make_folder(tmp_path, [range(50)]))
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ShardError, match=f"index.json.*{message}.*prepare"):
        load_index(tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"format": 1')
    with pytest.raises(ShardError, match="not valid JSON"):
        load_index(tmp_path)


def test_an_opened_dataset_knows_its_index_vocabulary_and_end_of_text(tmp_path):
    dataset = open_dataset(make_folder(tmp_path, [range(50)]))
    assert (dataset.vocab_size, dataset.eot) == (60_000, 0)
    canonical = json.dumps(load_index(tmp_path), sort_keys=True, separators=(",", ":"))
    assert dataset.hash == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_folder_that_does_not_exist_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(ShardError, match="nowhere.*does not exist.*data.prepare"):
        open_dataset(tmp_path / "nowhere")


def test_a_shard_missing_in_the_middle_is_found_at_open(tmp_path):
    make_folder(tmp_path, [range(50), range(60), range(70)])
    (tmp_path / "train_00001.bin").unlink()
    with pytest.raises(ShardError, match="train_00001.bin"):
        open_dataset(tmp_path)


def test_a_shard_whose_count_differs_from_the_index_is_found_at_open(tmp_path):
    make_folder(tmp_path, [range(50)])
    write_shard(tmp_path / "train_00000.bin", range(49))
    with pytest.raises(ShardError, match="train_00000.bin.*49 tokens.*50"):
        open_dataset(tmp_path)


def test_a_shard_whose_dtype_differs_from_the_index_is_found_at_open(tmp_path):
    make_folder(tmp_path, [range(50)])
    write_shard(tmp_path / "train_00000.bin", range(50), np.uint32)
    with pytest.raises(ShardError, match="train_00000.bin.*uint32.*uint16"):
        open_dataset(tmp_path)


def test_a_folder_of_llmc_shards_is_read_by_name(tmp_path):
    for name, tokens in (("fineweb_train_000002.bin", [5, 6]), ("fineweb_train_000001.bin", [3, 4]),
                         ("fineweb_val_000000.bin", [9]), ("notes.bin", [7])):
        (tmp_path / name).write_bytes(llmc_bytes(tokens))
    dataset = open_dataset(tmp_path)
    assert (dataset.vocab_size, dataset.eot) == (None, None)
    assert open_split(dataset, "train").windows(np.array([0]), 4).tolist() == [[3, 4, 5, 6]]
    assert open_split(dataset, "val").tokens == 1


def test_nanogpts_files_without_header_are_read_as_uint16_and_named(tmp_path):
    train = np.random.default_rng(0).integers(50_257, size=70_000).astype(np.uint16)  # longer than any header
    train.tofile(tmp_path / "train.bin")  # as nanoGPT's prepare.py does
    np.array([7, 8, 9], dtype=np.uint16).tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path)
    assert dataset.raw_files == ["train.bin", "val.bin"]
    stream = open_split(dataset, "train")
    assert stream.tokens == 70_000
    assert (stream.windows(np.array([0, 69_500]), 500) == np.stack([train[:500], train[69_500:]])).all()
    assert open_split(dataset, "val").windows(np.array([0]), 3).tolist() == [[7, 8, 9]]


def test_raw_and_llmc_files_may_stand_side_by_side(tmp_path):
    (tmp_path / "train.bin").write_bytes(llmc_bytes([1, 2, 3]))
    np.array([7, 8], dtype=np.uint16).tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path)
    assert dataset.raw_files == ["val.bin"]
    assert open_split(dataset, "train").windows(np.array([0]), 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("content", "message"), [
    (llmc_bytes([1, 2], version=2), "magic 20240520 version 2"),
    (llmc_bytes([1, 2], magic=20240522), "magic 20240522"),
    (llmc_bytes([1, 2], magic=20250101), "magic 20250101"),  # some later header
    (llmc_bytes([1, 2], count=5), "says 5 tokens"),
    (llmc_bytes([1, 2])[:600], "600 bytes, fewer than its header"),
    (np.arange(1, 900, dtype=np.uint32).tobytes(), "every second uint16 is 0"),
    (np.arange(1, 900, dtype=np.int64).tobytes(), "every second uint16 is 0"),
    (b"\x93NUMPY\x01\x00" + bytes(range(1, 201)), "numpy's"),
    (b"abc", "3 bytes"), (b"", "0 bytes")])
def test_a_train_bin_that_is_neither_llmcs_nor_clearly_raw_is_refused(tmp_path, content, message):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ShardError, match=f"train.bin.*{message}"):
        open_dataset(tmp_path)


def test_files_without_header_are_refused_under_other_names_and_beside_an_index(tmp_path):
    np.arange(5, 3000, dtype=np.uint16).tofile(tmp_path / "fineweb_train_000001.bin")
    with pytest.raises(ShardError, match="fineweb_train_000001.bin.*train.bin or val.bin.*no index.json"):
        open_dataset(tmp_path)
    (tmp_path / "ours").mkdir()
    make_folder(tmp_path / "ours", [[1, 2, 3]])
    np.arange(5, 3000, dtype=np.uint16).tofile(tmp_path / "ours" / "train_00000.bin")
    with pytest.raises(ShardError, match="train_00000.bin.*magic"):
        open_dataset(tmp_path / "ours")


def test_the_hash_of_an_llmc_folder_sees_other_tokens_of_the_same_count(tmp_path):
    (tmp_path / "train.bin").write_bytes(llmc_bytes([1, 2, 3]))
    before = open_dataset(tmp_path).hash
    assert open_dataset(tmp_path).hash == before
    (tmp_path / "train.bin").write_bytes(llmc_bytes([1, 2, 4]))
    assert open_dataset(tmp_path).hash != before


@pytest.mark.parametrize(("files", "message"), [
    ({}, "neither index.json nor"), ({"train_val.bin": "H"}, "both train and val"),
    ({"train_0.bin": "H", "train_1.bin": "I"}, "uint16.*uint32"),
])
def test_an_llmc_folder_that_cannot_be_read_says_why(tmp_path, files, message):
    for name, letter in files.items():
        magic, version = (20240520, 1) if letter == "H" else (20240801, 7)
        (tmp_path / name).write_bytes(llmc_bytes([1, 2], magic, version, letter))
    with pytest.raises(ShardError, match=message):
        open_dataset(tmp_path)


def test_a_split_without_shards_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(ShardError, match="no val shard.*--val"):
        open_split(open_dataset(make_folder(tmp_path, [range(50)], val=())), "val")


# ---- Reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("open_shards", [256, 1])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_equal_slices_of_all_tokens(tmp_path, monkeypatch, dtype, open_shards):
    monkeypatch.setattr(data.shards, "OPEN_SHARDS", open_shards)
    random = np.random.default_rng(1)
    lists = [random.integers(0, 60_000, size) for size in (311, 0, 5, 63, 1, 1000)]  # 5 and 1 are shorter than a window
    stream = open_split(open_dataset(make_folder(tmp_path, lists, dtype=dtype)), "train")
    tokens = np.concatenate(lists)
    assert stream.tokens == len(tokens) == 1380
    for length in (1, 2, 64, 65, 400, 1380):
        starts = random.integers(0, len(tokens) - length + 1, 50)
        starts[:2] = 0, len(tokens) - length
        expected = np.stack([tokens[start:start + length] for start in starts])
        np.testing.assert_array_equal(stream.windows(starts, length), expected)


def test_windows_of_one_shard_equal_slices(tmp_path):
    tokens = np.random.default_rng(2).integers(0, 60_000, 700)
    stream = open_split(open_dataset(make_folder(tmp_path, [tokens])), "train")
    starts = np.array([0, 635, 17, 17, 300])
    np.testing.assert_array_equal(stream.windows(starts, 65), np.stack([tokens[s:s + 65] for s in starts]))


@pytest.mark.parametrize("start", [-1, 437])
def test_a_window_outside_the_stream_is_refused(tmp_path, start):
    stream = open_split(open_dataset(make_folder(tmp_path, [range(500)])), "train")
    stream.windows(np.array([436]), 64)
    with pytest.raises(IndexError, match="500 tokens"):
        stream.windows(np.array([3, start]), 64)


def test_no_windows_is_an_empty_array(tmp_path):
    stream = open_split(open_dataset(make_folder(tmp_path, [range(500)])), "train")
    assert stream.windows(np.array([], dtype=np.int64), 64).shape == (0, 64)


def test_a_shard_cut_short_after_open_is_an_error_not_a_bus_error(tmp_path):
    stream = open_split(open_dataset(make_folder(tmp_path, [range(500)])), "train")
    (tmp_path / "train_00000.bin").write_bytes(llmc_bytes(range(500))[:-2])
    with pytest.raises(ShardError, match="became shorter"):
        stream.windows(np.array([0]), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: that memory stays flat is unchecked here")
def test_memory_is_flat_in_the_size_of_the_data(tmp_path):
    def anonymous_bytes() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

    tokens = 200_000_000  # a file of 400 MB, all of it a hole
    with open(tmp_path / "train.bin", "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253))
        file.truncate(1024 + 2 * tokens)
    stream = TokenStream([read_header(tmp_path / "train.bin")], "train split")
    before = anonymous_bytes()
    for starts in np.random.default_rng(3).integers(0, tokens - 1025, (100, 64)):
        stream.windows(starts, 1025)
    assert anonymous_bytes() - before < 20e6  # the windows of one call are 131 kB
