"""Shards, read: what a damaged folder is told, and windows against a plain array."""

import gc
import os
import resource
import struct
import sys

import numpy as np
import pytest

import files
from data.dataset import open_dataset, open_split
from data.shards import ShardError, TokenStream, read_header
from data.verify_shards import verify
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


# ---- Reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_equal_slices_of_all_tokens(tmp_path, dtype):
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


def test_shards_are_more_than_a_process_may_open_files(tmp_path):
    lists = [np.arange(7) + 7 * number for number in range(200)]
    dataset = open_dataset(make_folder(tmp_path, lists))
    stream, limits = open_split(dataset, "train"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 4, limits[1]))
    try:
        found = stream.windows(np.arange(0, 1400, 7), 7)
        assert verify(tmp_path, lambda line: None) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(found, np.stack(lists))


def test_a_mapped_file_is_its_bytes_and_read_only(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100)
    data = files.mapped(tmp_path / "a", 25_000)
    rest = np.frombuffer(data, np.uint8, offset=3)
    del data
    gc.collect()  # the array alone keeps the memory
    assert rest.tobytes() == (bytes(range(256)) * 100)[3:25_000] and not rest.flags.writeable
    with pytest.raises(ValueError, match="shorter than 25601 bytes"):
        files.mapped(tmp_path / "a", 25_601)


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
