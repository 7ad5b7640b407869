"""dataset.py: the index, folders without one, and what is refused of both."""

import hashlib
import json

import numpy as np
import pytest

from data.dataset import Dataset, load_index, open_dataset, open_split
from data.shards import ShardError
from data.write_shards import write_index
from tests.test_data_shards import llmc_bytes, make_folder, write_shard


def test_the_same_index_gives_the_same_bytes_and_comes_back_equal(tmp_path):
    index = load_index(make_folder(tmp_path, [range(50)]))
    before = (tmp_path / "index.json").read_bytes()
    write_index(tmp_path, index)
    assert (tmp_path / "index.json").read_bytes() == before
    assert json.loads(before) == index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "train_00000.bin", "val_00000.bin"]


def test_the_index_hash_depends_on_content_and_not_on_the_order_of_keys(tmp_path):
    index = load_index(make_folder(tmp_path, [range(50)]))
    assert Dataset(tmp_path, dict(reversed(index.items())), ()).hash == Dataset(tmp_path, index, ()).hash
    assert Dataset(tmp_path, {**index, "eot": 1}, ()).hash != Dataset(tmp_path, index, ()).hash


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
    assert dataset.vocab_size == 60_000
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
    assert dataset.vocab_size is None
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
