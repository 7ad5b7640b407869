"""What all commands share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).resolve().parents[1]


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                          capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")}).stdout.strip()


@pytest.fixture
def checkouts(tmp_path: Path) -> tuple[Path, Path]:
    """A checkout, and another one inside its folder."""
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder in (outer, inner):
        (folder / "file").write_text(folder.name)
        git(folder, "init", "-q")
        git(folder, "add", "file")
        git(folder, "commit", "-q", "-m", folder.name)
        git(folder, "tag", "-a", "v1", "-m", "a tag is no commit")
    return outer, inner


def test_the_commit_is_that_of_the_folder_whatever_else_is_a_checkout(checkouts, monkeypatch):
    outer, inner = checkouts
    commit = git(inner, "rev-parse", "--short", "HEAD")
    assert cli.commit(inner) == commit != cli.commit(outer)
    for name, path in (("GIT_DIR", outer / ".git"), ("GIT_WORK_TREE", outer)):  # as in a hook of another checkout
        monkeypatch.setenv(name, str(path))
    assert cli.commit(inner) == commit
    (inner / "file").write_text("changed")
    assert cli.commit(inner) == commit + "+changes"


def test_a_worktree_has_its_own_commit(checkouts, tmp_path):
    git(checkouts[0], "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    git(tmp_path / "side", "commit", "-q", "--allow-empty", "-m", "side")
    assert cli.commit(tmp_path / "side") == git(tmp_path / "side", "rev-parse", "--short", "HEAD")


def test_a_copy_without_git_inside_another_checkout_has_no_commit(checkouts, monkeypatch):
    copy = checkouts[0] / "copy"
    copy.mkdir()
    assert cli.commit(copy) == "(not a git checkout)"
    monkeypatch.setenv("PATH", "")
    assert cli.commit(copy) == "(no git)"


def test_work_goes_on_when_nobody_reads_its_notes_and_its_progress():
    code = ("import cli\n"
            "cli.note('first')\n"
            "with cli.progress(desc='work', total=3) as bar:\n"
            "    for _ in range(3):\n"
            "        bar.update(1)\n"
            "        bar.refresh()\n"
            "cli.note('last')\n"
            "print('done')\n")
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, open(write, "w") as pipe:
        for stderr in (full, pipe):
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=stderr)
            assert (done.returncode, done.stdout) == (0, "done\n")
