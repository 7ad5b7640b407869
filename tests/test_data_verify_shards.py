"""Shards against the sha256 of their index: what is found, what is said, and what goes on in the background."""

import numpy as np

from data.dataset import open_dataset
from data.shards import ShardError
from data.verify_shards import BackgroundVerifier, verify
from tests.test_data_shards import llmc_bytes, make_folder


def test_verify_finds_every_flipped_bit(tmp_path):
    make_folder(tmp_path, [range(500), range(300)])
    path = tmp_path / "train_00001.bin"
    good, random = path.read_bytes(), np.random.default_rng(0)
    assert verify(tmp_path, lambda line: None) == []
    for bit in random.choice(8 * len(good), size=60, replace=False):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        problems = verify(tmp_path, lambda line: None)
        assert len(problems) == 1 and "train_00001.bin" in problems[0]


def test_verify_names_all_bad_shards_and_notes_the_good_ones(tmp_path):
    make_folder(tmp_path, [range(500), range(300)])
    (tmp_path / "train_00000.bin").unlink()
    (tmp_path / "val_00000.bin").write_bytes(llmc_bytes([1, 2, 4]))
    notes = []
    problems = verify(tmp_path, notes.append)
    assert ["train_00000.bin" in problems[0], "val_00000.bin" in problems[1], len(problems)] == [True, True, 2]
    assert len(notes) == 1 and notes[0].startswith("train_00001.bin")


def test_verify_without_an_index_checks_headers(tmp_path):
    (tmp_path / "x_train.bin").write_bytes(llmc_bytes(range(10)))
    assert verify(tmp_path, lambda line: None) == []
    (tmp_path / "y_train.bin").write_bytes(llmc_bytes(range(10))[:-2])
    assert len(verify(tmp_path, lambda line: None)) == 1


def test_verify_of_an_empty_folder_is_a_problem(tmp_path):
    assert "no shards" in verify(tmp_path, lambda line: None)[0]


def test_the_background_verifier_names_the_damaged_shard(tmp_path):
    dataset = open_dataset(make_folder(tmp_path, [range(500), range(300)]))
    (tmp_path / "train_00001.bin").write_bytes(llmc_bytes([7, *range(1, 300)]))
    verifier = BackgroundVerifier(dataset)
    verifier._thread.join(10)
    assert isinstance(verifier.error, ShardError) and "train_00001.bin" in str(verifier.error)


def test_the_background_verifier_is_content_with_good_and_with_foreign_shards(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    make_folder(tmp_path / "ours", [range(500)])
    (tmp_path / "theirs" / "train.bin").write_bytes(llmc_bytes(range(10)))
    for folder in ("ours", "theirs"):
        verifier = BackgroundVerifier(open_dataset(tmp_path / folder))
        verifier._thread.join(10)
        assert not verifier._thread.is_alive() and verifier.error is None


def test_verify_says_which_files_have_no_header(tmp_path):
    np.array([7, 8, 9], dtype=np.uint16).tofile(tmp_path / "train.bin")
    notes = []
    assert verify(tmp_path, notes.append) == []
    assert notes == ["train.bin: 3 tokens (no header: bare uint16 ids); no index.json, so no sha256 to compare"]
