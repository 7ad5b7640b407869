"""cli.py: what all commands share."""

import signal

import pytest

import cli
from config import UserError


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
