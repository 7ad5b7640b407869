"""Files written whole or not at all, and for good: after a crash, a power cut or on a full disk what is under a final
name is the old content or the new, never half of one.

Every change to the disk goes through make_folder, write, sync, rename and delete_folder: tests crash at each of them.
All raise OSError.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from config import MachineError

HASH_CHUNK_BYTES = 4 << 20


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def write(path: Path, parts: Iterable, at: int | None = None) -> None:
    """Write bytes, or whatever shows its memory as such (numpy arrays), one after the other; no copy is made. at: into
    the file that is there, from this byte on."""
    with open(path, "wb" if at is None else "r+b", buffering=0) as file:
        file.seek(at or 0)
        for part in parts:
            rest = memoryview(part).cast("B")
            while rest:  # one write() takes 2 GB at most, and a nearly full disk less
                rest = rest[file.write(rest):]


def sync(path: Path) -> None:
    """fsync a file, or a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def rename(path: Path, new_path: Path) -> None:
    os.replace(path, new_path)


def delete_folder(path: Path, ignore_errors: bool = False) -> None:
    if path.is_symlink():  # what it leads to is not ours
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def publish(temporary: Path, path: Path) -> None:
    """Give a file that is complete its final name, durably."""
    sync(temporary)
    rename(temporary, path)
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, durably. Text is written as UTF-8."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary, [content.encode() if isinstance(content, str) else content])
        publish(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: Path, pause: Callable[[float], None] | None = None) -> str:
    """sha256 of a file as hex; pause(seconds the last chunk took) is called after each chunk."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        started = time.perf_counter()
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            if pause is not None:
                pause(time.perf_counter() - started)
                started = time.perf_counter()
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError for what is none, also if it is nested too deeply to be read or gives
    one name two values, of which Python would take the last."""
    def table(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs) and (twice := [name for name, value in pairs if found[name] != value]):
            raise ValueError(f"it gives {twice[0]!r} two values")
        return found

    try:
        return json.loads(text, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def mapped(path: Path, size: int) -> memoryview:
    """The first `size` bytes of a file, mapped into memory, read-only, for as long as the view or an array of it is in
    use. Python's mmap, and so numpy's, keeps a file descriptor open for each (until 3.13), and 256 is a common limit.
    Raises ValueError if the file is shorter."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < size:
            raise ValueError(f"{str(path)!r} is shorter than {size} bytes")
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, libc.munmap, address, size).atexit = False  # a thread may still read then
    return memoryview(memory).toreadonly()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Around writing: what the disk refuses becomes one line, MachineError."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"writing {str(path)!r} failed: {error.strerror or error}") from error


class Locked(Exception):
    """Another process holds a lock; its text says which."""


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds a lock on a file, made if it is not there, for the time of the block; its descriptor. The lock is flock's:
    the system drops it when the process ends, however it ends. Raises Locked if another process holds it, OSError if it
    cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(os.read(descriptor, 200).decode(errors="replace") or "another process") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            warn(f"warning: the file system of {str(path)!r} has no locks ({error.strerror}): make sure that no other "
                 "process writes there")
        with suppress(OSError):  # a full disk: who holds the lock is only a hint for the next one
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield descriptor
    finally:
        os.close(descriptor)


class AppendFile:
    """A file that only grows, one write() per line. What a full disk refuses waits here and goes first next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._warned = False

    def write(self, line: str) -> None:
        self._waiting += f"{line}\n".encode(errors="backslashreplace")
        self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            while self._waiting:
                # A disk that fills on the way takes the first part of a line; the rest must follow it, not a new line.
                written = os.write(self._descriptor, self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if not self._warned:
                warn(f"warning: {self._path} cannot be written ({error.strerror}); training goes on, the lines are "
                     "kept in memory and tried again")
            self._warned = True

    def close(self) -> None:
        self._try_to_write()
        os.close(self._descriptor)


def warn(text: str) -> None:
    """A line on stderr, or nowhere: stderr is often a file on the disk whose fullness it reports, or a pipe that nobody
    reads any more."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
