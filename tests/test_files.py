"""files.py: what a run depends on is old or new after any crash, never half; full disks leave the old content."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

import files
import train
from config import Config, MachineError, TrainConfig, to_toml
from data.tokenizer import load_tokenizer
from finetune.runs import save_base
from tests.crashing_disk import CRASHED, CrashingDisk, in_child

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the children run this file's code only


@pytest.mark.parametrize("text, message", [
    pytest.param("[" * 100_000, "nested too deeply", id="lists"), ("", "Expecting value"), (b"\xff{}", "codec|invalid"),
    pytest.param('{"a": ' * 100_000, "nested too deeply", id="tables"), ('{"a": 1, "a": 2}', "gives 'a' two values"),
    ('{"b": {"a": [1], "a": [1, 2]}}', "gives 'a' two values")])
def test_json_that_cannot_be_read_or_has_two_meanings_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)


def test_json_is_read_as_python_reads_it():
    for text in ('{"a": [1, 2.5, null, {"b": "é"}], "c": {}}', b'{"a": 1, "b": 2, "a": 1}', "[]", "1e400"):
        assert files.parse_json(text) == json.loads(text)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    for content in ("first ü", b"second"):
        files.write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_grow_leaves_the_old_one_and_one_line(tmp_path):
    files.write_whole(tmp_path / "file", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MachineError, match="^writing '.*file' failed: File too large$"):
            with files.disk_errors(tmp_path / "file"):
                files.write_whole(tmp_path / "file", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def run_files(run: Path, generation: int) -> None:
    """All that a run writes beside checkpoints and logs."""
    config = Config(train=TrainConfig(out_dir=str(run), seed=generation))
    train.write_run_files(config, load_tokenizer("bytes"), f"{{# {generation} #}}", {"eos_token_id": [256, generation]})
    save_base(run, {"weight": torch.full((3,), float(generation))})


def contents(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and ".tmp" not in path.name}


@pytest.mark.parametrize("loss", ["none", "torn", "zeroed", "undone"])
def test_after_a_crash_at_any_change_each_file_of_a_run_is_old_or_new(tmp_path, loss):
    wholes = []
    for generation in (1, 2):
        run_files_in = tmp_path / f"whole_{generation}"
        run_files_in.mkdir()
        run_files(run_files_in, generation)
        wholes.append({name: content.replace(str(run_files_in).encode(), b"RUN")
                       for name, content in contents(run_files_in).items()})
    assert sorted(wholes[0]) == ["base/model.safetensors", "chat_template.jinja", "config.toml",
                                 "generation_config.json", "tokenizer.json"]
    for crash_at in range(1, 100):
        run = tmp_path / f"crash_{crash_at}"
        run.mkdir()
        run_files(run, 1)

        def rewrite(run=run, crash_at=crash_at) -> None:
            CrashingDisk(crash_at, loss).install()
            run_files(run, 2)

        status = in_child(rewrite)
        for name, content in contents(run).items():
            found = content.replace(str(run).encode(), b"RUN")
            assert found in (wholes[0][name], wholes[1][name]), f"{name}, crash at change {crash_at}"
        assert contents(run).keys() == wholes[0].keys()
        if status == 0:
            break
        assert status == CRASHED
    assert crash_at > 12


def test_the_crash_test_catches_a_file_that_is_not_synced(tmp_path):
    """The harness must be able to fail: a plain write, renamed, as config.toml once was."""
    files.write_whole(tmp_path / "config.toml", "old")

    def rewrite() -> None:
        disk = CrashingDisk(2, "zeroed")
        disk.install()
        files.write(tmp_path / ".config.toml.tmp", [to_toml(Config()).encode()])
        files.rename(tmp_path / ".config.toml.tmp", tmp_path / "config.toml")

    assert in_child(rewrite) == CRASHED
    assert not any((tmp_path / "config.toml").read_bytes())


def test_sha256_is_that_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(9_000_000))
    pauses = []
    digest = files.sha256(tmp_path / "file", pauses.append)
    assert os.popen(f"sha256sum {tmp_path / 'file'}").read().split()[0] == digest and len(pauses) == 3
