"""Shards, written: the bytes, what is refused, and going on from part files."""

import hashlib
import resource

import numpy as np
import pytest

import files
from config import MachineError, UserError
from data.shards import ShardError
from data.tokenizer import load_tokenizer
from data.write_shards import Encoded, ShardWriter, SplitWriter
from tests.test_data_shards import llmc_bytes, write_shard


@pytest.mark.parametrize(("dtype", "magic", "version", "letter", "top"),
                         [(np.uint16, 20240520, 1, "H", 65_535), (np.uint32, 20240801, 7, "I", 200_000)])
def test_a_shard_has_the_bytes_that_llmc_writes(tmp_path, dtype, magic, version, letter, top):
    tokens = [0, 1, 517, top]
    write_shard(tmp_path / "a.bin", tokens, dtype, top + 1)
    assert (tmp_path / "a.bin").read_bytes() == llmc_bytes(tokens, magic, version, letter)


def test_pieces_of_any_integer_dtype_are_appended_in_order(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300)
    for piece in (np.array([1, 2], dtype=np.int64), np.array([], dtype=np.int64), np.array([299], dtype=np.uint16),
                  np.array([[7, 8], [9, 10]], dtype=np.int32)):
        writer.write(piece)
    writer.close()
    assert (tmp_path / "a.bin").read_bytes() == llmc_bytes([1, 2, 299, 7, 8, 9, 10])


def test_close_reports_name_count_and_sha256_of_the_whole_file(tmp_path):
    entry = write_shard(tmp_path / "train_00000.bin", range(1000))
    digest = hashlib.sha256((tmp_path / "train_00000.bin").read_bytes()).hexdigest()
    assert entry == {"file": "train_00000.bin", "tokens": 1000, "sha256": digest}


@pytest.mark.parametrize(("tokens", "named"), [([5, -1], "-1"), ([300], "300"), ([70_000], "70000")])
def test_an_id_outside_the_vocabulary_is_refused_not_wrapped(tmp_path, tokens, named):
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300)
    with pytest.raises(ShardError, match=f"'a.bin'.* id {named} .*300"):
        writer.write(np.array(tokens))


def test_token_ids_that_are_not_integers_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300)
    with pytest.raises(ShardError, match="float64"):
        writer.write(np.array([1.5]))


def test_a_vocabulary_above_65536_is_refused_in_uint16(tmp_path):
    ShardWriter(tmp_path / "a.bin", np.uint16, 65_536)
    with pytest.raises(ShardError, match="65537.*uint32"):
        ShardWriter(tmp_path / "a.bin", np.uint16, 65_537)


def test_a_shard_of_two_to_the_31_tokens_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300)
    writer.tokens = 2**31 - 2  # as if so many had been written
    writer.write(np.array([1]))
    with pytest.raises(ShardError, match="2147483648"):
        writer.write(np.array([1]))


def test_nothing_has_the_shards_name_before_close(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300)
    writer.write(np.arange(300))
    assert [path.name for path in tmp_path.iterdir()] == [".a.bin.part"]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("was_closed", [False, True])
def test_a_second_writer_goes_on_where_the_first_was_recorded(was_closed, tmp_path):
    track = {"loss": np.array([1, 0, 1], dtype=np.uint8)}
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300, tracks=["loss"])
    for _ in range(3):
        writer.write(np.array([7, 8, 9]), track)
    if was_closed:
        writer.close()
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300, tracks=["loss"], tokens=5)
    writer.write(np.array([1, 2, 3]), track)
    entry = writer.close()
    assert (tmp_path / "a.bin").read_bytes() == llmc_bytes([7, 8, 9, 7, 8, 1, 2, 3])
    assert (tmp_path / "a.loss.bin").read_bytes() == bytes([1, 0, 1, 1, 0, 1, 0, 1])
    assert entry["loss_sha256"] == hashlib.sha256((tmp_path / "a.loss.bin").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.loss.bin"]


def test_a_part_that_is_shorter_than_was_recorded_is_refused(tmp_path):
    ShardWriter(tmp_path / "a.bin", np.uint16, 300).write(np.arange(5))
    for name in ("a.bin", "b.bin"):
        with pytest.raises(UserError, match=f".{name}.part' holds fewer bytes than were recorded"):
            ShardWriter(tmp_path / name, np.uint16, 300, tokens=6)


def test_each_token_is_written_once(tmp_path, monkeypatch):
    """Over several shards, with a state() and a second start between."""
    sizes = []

    def write(path, parts, at=None):
        sizes.append(sum(memoryview(part).nbytes for part in parts))
        real_write(path, parts, at)
    real_write = files.write
    monkeypatch.setattr(files, "write", write)
    ids, tokenizer = np.arange(1000, dtype="<u2") % 256, load_tokenizer("bytes")
    state = None
    for part in np.split(ids, 10):
        writer = SplitWriter(tmp_path, "train", tokenizer, shard_tokens=330, state=state)
        writer.add(Encoded(part, len(part), 0))
        state = writer.state()
    writer.finish_shard()
    assert sum(sizes) == 2 * len(ids) + 4 * 2 * 1024  # of four shards: the header's place, and the header
    assert [shard["tokens"] for shard in writer.shards] == [330, 330, 330, 10]
    assert b"".join((tmp_path / shard["file"]).read_bytes()[1024:] for shard in writer.shards) == ids.tobytes()


def test_a_disk_that_fails_is_one_line_that_names_the_shard(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(tmp_path / "a.bin", np.uint16, 300)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # stands in for a full disk
    try:
        with pytest.raises(MachineError, match="a.bin.*File too large"):
            writer.write(np.zeros(100_000, dtype=np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
