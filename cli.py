"""What all commands share: a parser whose errors are one line, notes on stderr, stop signals, optional packages."""

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import files
from config import UserError


class Parser(argparse.ArgumentParser):
    """prog: as the user types it, 'python sample.py'. Wrong arguments raise UserError, one line and exit status 2."""

    def error(self, message: str) -> None:
        if option := re.match(r"argument (--\S+): expected (at least )?one argument", message):
            message += f" (one that begins with - is spelled {option[1]}=-...)"
        raise UserError(f"{message}; {self.prog} --help lists the arguments")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        """--stop=-- is a value, which Python 3.11 drops in silence (python/cpython issue 109475)."""
        if not action.option_strings or arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")
        self._check_value(action, value)
        return [value] if action.nargs == "+" else value

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        """A path may begin with ~: the shell leaves it alone in quotes and in --data=~/text."""
        is_path = action.metavar != "TEXT" and arg_string.startswith("~") and "/" in arg_string
        return super()._get_value(action, os.path.expanduser(arg_string) if is_path else arg_string)


def whole(word: str, minimum: int = 0) -> int:
    """A whole number of the command line: argparse's type."""
    with contextlib.suppress(ValueError):
        if int(word) >= minimum:
            return int(word)
    raise argparse.ArgumentTypeError(f"{word!r} should be a whole number, at least {minimum}")


count = partial(whole, minimum=1)


def check_output(option: str, path: Path, suffix: str = "") -> None:
    """Raise UserError for a file that could not be written once the work is done."""
    for is_wrong, what in (
            (suffix and path.suffix != suffix, f"should end in {suffix}"),
            (not path.parent.is_dir(), f"lies in no folder that exists; make {str(path.parent)!r} first"),
            (path.exists() and not path.is_file(), "is no regular file; name another")):
        if is_wrong:
            raise UserError(f"{option} {str(path)!r} {what}")


def note(text: str) -> None:
    """A line for the user beside the results, on stderr at once; of torchrun's processes the node's first says it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        files.warn(text)


def progress(**what):
    """tqdm's bar, on stderr."""
    from tqdm import tqdm
    return tqdm(mininterval=1.0, file=_Stderr(), **what)


class _Stderr:
    """stderr for tqdm: what nobody can read any more (a closed pipe, a full disk) is dropped, the work goes on."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)  # whether it is a terminal, and how wide


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns two spaces apart; the first is flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def stop_signals() -> list[signal.Signals]:
    """Those that ask a program to end in order. A SIGHUP that is ignored at the start (nohup) stays so."""
    ends_with_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1] + [signal.SIGHUP] * ends_with_terminal


class StopRequest:
    """Set by one of stop_signals(), polled by what goes on for long; signal: its name. A second Ctrl-C does not wait.
    interrupts: the first signal raises KeyboardInterrupt instead, for what may end anywhere."""

    def __init__(self, *, interrupts: bool = False):
        self.signal, self._interrupts = None, interrupts
        for number in stop_signals():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        is_first, name = self.signal is None, signal.Signals(number).name
        self.signal = self.signal or name
        if self._interrupts if is_first else number == signal.SIGINT:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        return self.signal is not None


def commit(folder: Path) -> str:
    """The commit of a checkout, with +changes if its files differ from it. Its .git is given by name: in search of one
    git takes that of GIT_DIR, or of a checkout around this one."""
    git = ["git", "--git-dir=.git", "--work-tree=.", "describe", "--always", "--dirty=+changes", "--exclude=*"]
    try:
        described = subprocess.run(git, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "(no git)"
    return described.stdout.strip() or "(not a git checkout)"


def is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # no origin: a folder of that name, passing for a package


def require(what_for: str, *packages: str) -> None:
    """Raise UserError, naming what needs them, if optional packages are not installed."""
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        kind = f"the package {missing[0]}, which is" if len(missing) == 1 else \
            f"the packages {' and '.join(missing)}, which are"
        raise UserError(f"{what_for} needs {kind} not installed; pip install {' '.join(missing)}")
