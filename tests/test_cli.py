"""cli.py: what all commands share."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from config import UserError

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


@pytest.fixture(autouse=True)
def handlers():
    """Each signal's handler is put back."""
    before = {number: signal.getsignal(number) for number in (*cli.stop_signals(), signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("words, expected", [
    (["~/run", "--data=~/text", "--prompt", "~/is home"], ("/home/me/run", "/home/me/text", "~/is home")),
    (["run~", "--data", "a/~/b", "--prompt", "~"], ("run~", "a/~/b", "~")),
])
def test_a_path_may_begin_with_the_home_folder(monkeypatch, words, expected):
    monkeypatch.setenv("HOME", "/home/me")
    parser = cli.Parser(prog="python x.py")
    parser.add_argument("run", metavar="RUN")
    group = parser.add_argument_group("more")
    group.add_argument("--data", metavar="FILE")
    group.add_argument("--prompt", metavar="TEXT")
    args = parser.parse_args(words)
    assert (args.run, args.data, args.prompt) == expected


def test_wrong_arguments_are_an_error_of_the_user():
    with pytest.raises(UserError, match="python x.py --help lists the arguments"):
        cli.Parser(prog="python x.py").parse_args(["--nothing"])


@pytest.mark.parametrize(("option", "value"), [("--labels", "-1,0,1"), ("--stop", "---"), ("--labels", "-help"),
                                               ("--stop", "--"), ("--labels", "--")])
def test_a_value_that_begins_with_a_dash_is_refused_with_a_spelling_that_is_taken(option, value):
    parser = cli.Parser(prog="python x.py")
    parser.add_argument("--labels")
    parser.add_argument("--stop", nargs="+")
    with pytest.raises(UserError, match=f"argument {option}: expected.*begins with - is spelled (.*)-...[)]") as caught:
        parser.parse_args([option, value])
    spelled = re.search("is spelled (.*)-...[)]", str(caught.value))[1] + value
    given = vars(parser.parse_args([spelled]))[option.strip("-")]
    assert given == ([value] if option == "--stop" else value)
    parser.add_argument("--seed", type=int)
    with pytest.raises(UserError, match="--seed: invalid int value: '--'"):
        parser.parse_args(["--seed=--"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_stop_signal_is_a_request_and_a_second_ctrl_c_does_not_wait(name):
    stop = cli.StopRequest()
    assert not stop()
    signal.raise_signal(signal.Signals[name])
    assert stop() and stop.signal == name
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stop = cli.StopRequest()
    signal.raise_signal(signal.SIGHUP)
    assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal == "SIGTERM"


@pytest.mark.parametrize("local_rank, said", [(None, "a note\n"), ("0", "a note\n"), ("1", "")])
def test_of_a_nodes_processes_one_says_a_note(monkeypatch, capsys, local_rank, said):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    cli.note("a note")
    assert capsys.readouterr().err == said
