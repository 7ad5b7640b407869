"""What all commands share: a parser whose errors are one line, notes on stderr, stop signals, optional packages."""

import argparse
import importlib.util
import signal
import sys

from config import UserError


class Parser(argparse.ArgumentParser):
    """prog: as the user types it, 'python sample.py'. Wrong arguments raise UserError, one line and exit status 2."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def note(text: str) -> None:
    """A line for the user beside the results, on stderr at once."""
    print(text, file=sys.stderr, flush=True)


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1, polled by what goes on for long; signal: its name. A second Ctrl-C does not
    wait. interrupts: the first signal raises KeyboardInterrupt instead, for what may end anywhere."""

    def __init__(self, *, interrupts: bool = False):
        self.signal, self._interrupts = None, interrupts
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        is_first, name = self.signal is None, signal.Signals(number).name
        self.signal = self.signal or name
        if self._interrupts if is_first else number == signal.SIGINT:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        return self.signal is not None


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
