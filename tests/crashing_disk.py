"""A disk that crashes at the n-th change, for tests: a mere kill, or a power cut that loses what was not synced."""

import os
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import files

CRASHED = 77  # exit status


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class CrashingDisk:
    """Stands in for the disk functions of files.py and ends the process at the n-th change, as a power cut would.

    `loss` is what the cut does to what was not synced: "none" (a mere kill), "torn" (the second half of each such file
    is gone), "zeroed" (its bytes are zeros), "undone" (names that appeared in folders not synced since, by creation or
    rename, are as before). Real fsync is left out: only the book-keeping matters.
    """

    def __init__(self, crash_at: int, loss: str):
        self.crash_at, self.loss, self.changes, self.lock = crash_at, loss, 0, threading.RLock()
        self.unsynced: set[Path] = set()  # files whose bytes may be lost
        self.entries: list[list] = []  # [folder, path, old path or its old bytes or None] of names that may be lost

    def install(self) -> None:
        self.real = {name: getattr(files, name) for name in ("make_folder", "write", "rename", "delete_folder")}
        for name in (*self.real, "sync"):
            setattr(files, name, self.one_at_a_time(getattr(self, name)))

    def one_at_a_time(self, change: Callable) -> Callable:
        """Threads, each a rank, may change the disk together."""
        def locked(*args, **options) -> None:
            with self.lock:
                change(*args, **options)

        return locked

    def changed(self) -> None:
        self.changes += 1
        if self.changes == self.crash_at:
            try:
                self.lose()
                os._exit(CRASHED)
            finally:  # an error of ours must not look like one of the disk, which save() survives
                traceback.print_exc()
                os._exit(1)

    def make_folder(self, path: Path) -> None:
        self.real["make_folder"](path)
        self.entries.append([path.parent, path, None])
        self.changed()

    def write(self, path: Path, parts) -> None:
        self.real["write"](path, parts)
        self.unsynced.add(path)
        self.entries.append([path.parent, path, None])
        self.changed()

    def sync(self, path: Path) -> None:
        self.changed()  # a crash just before it
        self.unsynced.discard(path)
        self.entries = [entry for entry in self.entries if entry[0] != path]

    def rename(self, path: Path, new_path: Path) -> None:
        if path.is_dir():
            assert not any(entry[0] == path for entry in self.entries), "a folder is renamed before it is synced"
        before = new_path.read_bytes() if new_path.is_file() else None
        self.real["rename"](path, new_path)
        self.unsynced = {new_path / p.relative_to(path) if p.is_relative_to(path) else p for p in self.unsynced}
        self.entries = [entry for entry in self.entries if entry[1] != path]
        self.entries.append([path.parent, new_path, path if before is None else before])
        self.changed()

    def delete_folder(self, path: Path, ignore_errors: bool = False) -> None:
        for file in sorted(path.iterdir())[:2]:
            file.unlink()
            self.unsynced.discard(file)
            self.entries = [entry for entry in self.entries if entry[1] != file]
        self.changed()  # a crash half-way
        self.real["delete_folder"](path, ignore_errors)
        self.unsynced = {p for p in self.unsynced if not p.is_relative_to(path)}
        self.entries = [entry for entry in self.entries if not entry[1].is_relative_to(path)]
        self.changed()

    def lose(self) -> None:
        if self.loss in ("torn", "zeroed"):
            for path in self.unsynced:
                size = path.stat().st_size
                path.write_bytes(path.read_bytes()[:size // 2] if self.loss == "torn" else bytes(size))
        if self.loss == "undone":
            for _, path, old in reversed(self.entries):
                if isinstance(old, bytes):
                    path.write_bytes(old)
                elif old is not None:
                    path.rename(old)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)  # another rank that met the loss makes room meanwhile
