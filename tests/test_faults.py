"""A disk that fails at the n-th call, of any file that a run depends on, and files that are not what they should be:
the run goes on and its result is the same, or it ends with one line, and the same command goes on afterwards."""

import builtins
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint
import config as configuration
import train
from data.prepare import prepare
from distributed import World
from finetune.runs import read_run
from tests.test_train import CONFIG, NoSignal, assert_same_bits, tensors

ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES)


class FailingDisk:
    """Lets the n-th call fail that opens, writes, syncs, makes or renames something in `folder`, and all later ones if
    it stays broken. calls: how many there were; failed: what the first failure was of."""

    def __init__(self, folder: Path, fail_at: int, number: int, stays: bool):
        self.folder, self.fail_at, self.number, self.stays = str(folder), fail_at, number, stays
        self.calls, self.failed = 0, ""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "write"), (os, "fsync"),
                             (os, "replace"), (os, "mkdir"), (os, "ftruncate"), (os, "unlink"), (os, "rmdir"),
                             (os, "scandir"), (os, "listdir")):
            monkeypatch.setattr(module, name, self._failing(getattr(module, name), name))

    def _failing(self, real: Callable, name: str) -> Callable:
        def call(path, *arguments, **settings):
            where = path
            if isinstance(path, int):
                where = os.readlink(f"/proc/self/fd/{path}") if os.path.exists(f"/proc/self/fd/{path}") else ""
            if os.path.abspath(os.fsdecode(where)).startswith(self.folder):
                self.calls += 1
                if self.calls == self.fail_at or (self.stays and self.calls > self.fail_at):
                    self.failed = self.failed or f"{name} {where}"
                    raise OSError(self.number, os.strerror(self.number), os.fsdecode(where))
            return real(path, *arguments, **settings)
        return call


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with prepared data, and a run of 4 steps: run, and resumed to 6: whole."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.txt").write_text("the cat sat on the mat and slept. " * 200)
    (folder / "small.toml").write_text(CONFIG.replace("n_layer = 2", "n_layer = 1"))
    prepare([str(folder / "text.txt")], folder / "data", tokenizer="bytes", val_fraction=0.1, workers=1)
    go_on(folder, "run", 4)
    shutil.copytree(folder / "run", folder / "whole")
    go_on(folder, "whole", 6)
    return folder


def go_on(folder: Path, name: str, steps: int) -> None:
    config, given = configuration.parse_arguments([
        str(folder / "small.toml"), f"data.dir={folder}/data", f"train.out_dir={folder}/{name}", "train.keep=2",
        f"train.max_steps={steps}", "train.save_every=2", "train.eval_every=2", "train.eval_tokens=64"])
    train.train(config, given, world=World(), stop=NoSignal())


def one_line_or_none(work: Callable[[], None], capsys: pytest.CaptureFixture) -> str:
    """Runs work as a command is run; the error's line, "" if there was none. All else is raised."""
    try:
        configuration.exit_cleanly(lambda argv: work())
    except SystemExit as end:
        line = capsys.readouterr().err.splitlines()[-1]
        assert end.code in (1, 2) and line.startswith("error: ") and len(line) < 2000, line
        return line
    return ""


def broken_run(folder: Path, capsys: pytest.CaptureFixture, fail_at: int, number: int, stays: bool) -> FailingDisk:
    """Resumes a copy of the run on a failing disk, checks what came of it, and resumes it on a good one."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(folder / "run", folder / "copy")
    disk = FailingDisk(folder, fail_at, number, stays)
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk.install(monkeypatch)
        one_line_or_none(lambda: go_on(folder, "copy", 6), capsys)
    newest = checkpoint.resolve(folder / "copy", lambda line: None)
    assert int(newest.name[5:]) >= 4, disk.failed
    go_on(folder, "copy", 6)
    assert_same_bits(tensors(folder / "copy", 6), tensors(folder / "whole", 6))
    rows = [json.loads(line) for line in (folder / "copy" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == sorted(set(steps)), disk.failed
    return disk


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_call_of_the_disk_that_fails_loses_nothing(begun, capsys, step, stays):
    """Each call of a resumed run (fast: every 5th) fails, until the run has fewer calls than that."""
    fail_at = 1 + stays * step // 2
    while (disk := broken_run(begun, capsys, fail_at, ERRORS[fail_at // step % len(ERRORS)], stays)).calls >= fail_at:
        fail_at += step
    assert fail_at > 50, disk.calls


EVERY_FILE = ["config.toml", "tokenizer.json", "metrics.jsonl", "log.txt", ".lock", "checkpoints", "data/index.json",
              "data/train_00000.bin", "data/val_00000.bin", "data/tokenizer.json",
              *(f"checkpoints/step_00000004/{name}" for name in ("model.safetensors", "optimizer.safetensors",
                                                                 "state.json", "manifest.json"))]


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("wound", ["folder", "empty", "gone", "half", "noise", "dangling link"])
def test_a_file_of_a_run_that_is_something_else(begun, capsys, name, wound):
    for part in ("copy", "data-copy"):
        shutil.rmtree(begun / part, ignore_errors=True)
    shutil.copytree(begun / "run", begun / "copy")
    shutil.copytree(begun / "data", begun / "data-copy")
    path = begun / "data-copy" / name[5:] if name.startswith("data/") else begun / "copy" / name
    data = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if wound == "folder":
        path.mkdir()
    elif wound == "dangling link":
        path.symlink_to(begun / "nowhere")
    elif wound != "gone":
        path.write_bytes({"empty": b"", "half": data[:len(data) // 2], "noise": bytes(range(256)) * 9}[wound])
    os.rename(begun / "data", begun / "data-good")
    os.rename(begun / "data-copy", begun / "data")
    try:
        for use in (lambda: read_run(begun / "copy", lambda line: None).weights(), lambda: go_on(begun, "copy", 6)):
            one_line_or_none(use, capsys)
    finally:
        shutil.rmtree(begun / "data")
        os.rename(begun / "data-good", begun / "data")
