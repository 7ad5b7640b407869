"""Where a rank stands when it makes no headway: written down before the others give up waiting for it.

A hang shows in every rank but the one that causes it: all others wait in a collective until train.timeout_s.
"""

import faulthandler
import threading
import time
from pathlib import Path

import files
from distributed import World

SHARE = 0.8  # of the time that ranks wait for each other, until a rank without headway is written down


class Watchdog:
    """A thread that writes RUN/stacks/rank_R.txt, a line and every thread's stack, once a phase takes too long. Nothing
    for a single process, which nobody waits for. close() ends it."""

    def __init__(self, run_dir: Path, world: World, timeout_s: float):
        self._path, self._rank = run_dir / "stacks" / f"rank_{world.rank}.txt", world.rank
        self._limit_s = SHARE * timeout_s
        self._closed = threading.Event()
        self.mark("the start")
        if world.size > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, phase: str) -> None:
        """From now on the rank is in this phase."""
        self._phase, self._since, self._is_written = phase, time.monotonic(), False

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_s / 8)):
            seconds = time.monotonic() - self._since
            if seconds < self._limit_s or self._is_written:
                continue
            self._is_written = True
            line = f"rank {self._rank} has been in {self._phase} for {seconds:.0f} s"
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=file, flush=True)
                    faulthandler.dump_traceback(file, all_threads=True)
                line += f"; its stack is in {str(self._path)!r}"
            except OSError as error:
                line += f"; its stack could not be written to {str(self._path)!r}: {error.strerror}"
            files.warn(f"warning: {line}")
