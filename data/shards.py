"""Token shards: writing, checking and reading them.

A shard is llm.c's file: a header of 256 little-endian int32 (magic, version, token count, zeros), then the token ids as
uint16 or uint32. A data folder holds shards and index.json, which names each with its split, token count and sha256. A
folder without index.json, as llm.c and modded-nanogpt make them, is read too: *train*.bin and *val*.bin, sorted; and
nanoGPT's train.bin and val.bin, which are uint16 ids and nothing else.
Beside a shard there may be tracks, one uint8 for each of its tokens and no header: train_00000.loss.bin, 1 where the
loss counts predicting the token (no file: everywhere), and train_00000.start.bin, 1 where an example starts.
Nothing here knows text, tokenizers or batches (prepare.py, tokenizer.py, loader.py do), and nothing imports torch.
"""

import copy
import functools
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import MachineError, UserError

HEADER_BYTES = 256 * 4
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
MAGIC_VERSION = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # llm.c's, of GPT-2 and Llama 3
LLMC_EVAL_MAGIC = 20240522  # of its multiple-choice files
RAW_FILES = ("train.bin", "val.bin")  # may lack a header, in a folder without index.json
INDEX_FILE = "index.json"
INDEX_FORMAT = 1
SPLITS = ("train", "val")
TRACKS = ("loss", "start")
HASH_CHUNK_BYTES = 4 << 20
SAMPLE_BYTES = 64 << 10  # hashed at both ends of a foreign shard, which carries no sha256
OPEN_SHARDS = 256  # mapped at once; each holds a file descriptor and 1024 is a common limit


class ShardError(UserError):
    """A shard or index that is missing, damaged, or not what the reader needs."""


# ----------------------------------------------------------------------------------------------------------------------
# One shard file

@dataclass(frozen=True)
class ShardHeader:
    dtype: np.dtype
    tokens: int
    bytes: int = HEADER_BYTES  # 0 = nanoGPT's file without one


def _header_bytes(dtype: np.dtype, tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = *MAGIC_VERSION[dtype], tokens
    return header.tobytes()


def read_header(path: Path, *, foreign: bool = False) -> ShardHeader:
    """The header of a shard, checked against the file's size. foreign: its folder has no index.json, so that a file
    named as nanoGPT's may be without one. Raises ShardError."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"shard {str(path)!r} cannot be read: {error.strerror}; copy it back or prepare the data "
                         "again") from None
    if foreign and path.name in RAW_FILES and not _has_header(raw):
        return _raw_header(path, raw, size)
    if len(raw) < HEADER_BYTES:
        raise ShardError(f"shard {str(path)!r} holds {size} bytes, fewer than its header of {HEADER_BYTES}; copy it "
                         "again or prepare the data again")
    magic, version, tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    dtype = next((d for d, known in MAGIC_VERSION.items() if known == (magic, version)), None)
    if dtype is None:
        known = " or ".join(f"{m} version {v} ({d.name})" for d, (m, v) in MAGIC_VERSION.items())
        raise ShardError(f"shard {str(path)!r} starts with magic {magic} version {version}, expected {known}; a file "
                         f"of bare uint16 ids, as nanoGPT's, is read if it is called {' or '.join(RAW_FILES)} and its "
                         "folder has no index.json")
    expected = HEADER_BYTES + tokens * dtype.itemsize
    if tokens < 0 or size != expected:
        raise ShardError(f"shard {str(path)!r} holds {size} bytes but its header says {tokens} tokens of {dtype.name}, "
                         f"{expected} bytes; it is cut short or damaged: copy it again or prepare the data again")
    return ShardHeader(dtype, tokens)


def _has_header(start: bytes) -> bool:
    """Whether a file starts with one of llm.c's magics, whatever the version, or with what must be a header all the
    same: three numbers and then zeros. 20240520 would be the token ids 55,432 and 308: no GPT-2 text starts so."""
    magics = {magic for magic, _ in MAGIC_VERSION.values()} | {LLMC_EVAL_MAGIC}
    return int.from_bytes(start[:4], "little") in magics or (len(start) == HEADER_BYTES and not any(start[12:]))


def _raw_header(path: Path, start: bytes, size: int) -> ShardHeader:
    """What a header would say of a file of bare uint16 ids; start: its first bytes. Raises ShardError if it is none."""
    ids = np.frombuffer(start[:len(start) // 2 * 2], dtype="<u2")
    if size == 0 or size % 2:
        problem = f"holds {size} bytes, no number of uint16 ids"
    elif len(ids) > 1 and not ids[1::2].any():
        problem = "has no header, and every second uint16 is 0: these are ids of 4 or 8 bytes"
    elif start.startswith(b"\x93NUMPY"):
        problem = "is numpy's .npy format"
    else:
        return ShardHeader(np.dtype("<u2"), size // 2, bytes=0)
    raise ShardError(f"shard {str(path)!r} {problem}; only bare uint16 ids (nanoGPT's) and llm.c's files are read: "
                     "write it anew as one of them")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing (a full disk, say) into one line."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"writing {str(path)!r} failed: {error.strerror}") from error


class ShardWriter:
    """Writes one shard under a temporary name; close() puts it in place whole, abort() leaves nothing.

    path: the final name; dtype: uint16 or uint32; vocab_size: every id must lie below it. The disk failing raises
    MachineError.
    """

    def __init__(self, path: Path, dtype: np.dtype, vocab_size: int):
        self.path, self.dtype, self.vocab_size = Path(path), np.dtype(dtype).newbyteorder("<"), vocab_size
        self.tokens = 0
        if self.dtype not in MAGIC_VERSION:
            raise ShardError(f"shard {self.path.name!r}: dtype {self.dtype.name} should be uint16 or uint32")
        if vocab_size - 1 > np.iinfo(self.dtype).max:
            raise ShardError(f"shard {self.path.name!r}: a vocabulary of {vocab_size} ids does not fit "
                             f"{self.dtype.name}; write it as uint32")
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        with _disk_errors(self.path):
            self._file = open(self._temporary, "wb")
            self._file.write(_header_bytes(self.dtype, 0))

    def write(self, tokens: np.ndarray) -> None:
        """Append token ids (any integer dtype, any shape read in order). Raises ShardError for an id out of range."""
        tokens = np.asarray(tokens)
        if tokens.size == 0:
            return
        if tokens.dtype.kind not in "iu":
            raise ShardError(f"shard {self.path.name!r}: token ids of dtype {tokens.dtype} should be integers")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ShardError(f"shard {self.path.name!r}: token id {low if low < 0 else high} lies outside the "
                             f"vocabulary of {self.vocab_size} ids; the tokenizer and vocab_size do not fit")
        if self.tokens + tokens.size > MAX_SHARD_TOKENS:
            raise ShardError(f"shard {self.path.name!r} would hold {self.tokens + tokens.size} tokens, its header "
                             f"counts to {MAX_SHARD_TOKENS}; lower --shard-tokens")
        with _disk_errors(self.path):
            self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype))
        self.tokens += tokens.size

    def close(self) -> dict:
        """Put the shard in place, durably; {"file": name, "tokens": count, "sha256": hex of the whole file}."""
        with _disk_errors(self.path):
            self._file.seek(0)
            self._file.write(_header_bytes(self.dtype, self.tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sha256 = hash_file(self._temporary)
            os.replace(self._temporary, self.path)
            _fsync_folder(self.path.parent)
        return {"file": self.path.name, "tokens": self.tokens, "sha256": sha256}

    def abort(self) -> None:
        """Drop what was written. Harmless after close()."""
        with suppress(OSError):  # the disk is full and a buffer was left: the file goes anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def track_path(shard: Path, track: str) -> Path:
    """train_00000.bin -> train_00000.loss.bin"""
    return Path(shard).with_suffix(f".{track}.bin")


def write_track(path: Path, content: Path) -> str:
    """Put a track in place with the content of another file, whole and durably; its sha256 as hex."""
    temporary = path.with_name(path.name + ".tmp")
    with _disk_errors(path):
        shutil.copyfile(content, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
        return hash_file(path)


def files_of(shard: dict) -> dict[str, str | None]:
    """The files of a shard of the index, itself first, with their sha256."""
    tracks = {track_path(Path(shard["file"]), track).name: shard[f"{track}_sha256"] for track in TRACKS
              if f"{track}_sha256" in shard}
    return {shard["file"]: shard["sha256"]} | tracks


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path, pause: Callable[[float], None] | None = None) -> str:
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


# ----------------------------------------------------------------------------------------------------------------------
# The index of a data folder

def write_index(data_dir: Path, index: dict) -> None:
    """Write index.json whole. The same index gives the same bytes. Raises MachineError if the disk fails."""
    path = Path(data_dir) / INDEX_FILE
    temporary = path.with_name(path.name + ".tmp")
    with _disk_errors(path):
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            json.dump(index, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)


def load_index(data_dir: Path) -> dict | None:
    """The index of a data folder, its shape checked; None if the folder has none. Raises ShardError."""
    path = Path(data_dir) / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardError(f"index {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ShardError(f"index {str(path)!r} is not valid JSON ({error}); prepare the data again") from None
    problem = _index_problem(index)
    if problem:
        raise ShardError(f"index {str(path)!r} {problem}; prepare the data again")
    return index


def _index_problem(index: object) -> str | None:
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        return f"has format {found!r}, expected {INDEX_FORMAT}"
    if index.get("dtype") not in ("uint16", "uint32"):
        return f"has dtype {index.get('dtype')!r}, expected uint16 or uint32"
    if type(index.get("vocab_size")) is not int:
        return f"has vocab_size {index.get('vocab_size')!r}, expected a whole number"
    if type(index.get("eot", "missing")) not in (int, type(None)):
        return f"has eot {index.get('eot')!r}, expected the id of end-of-text or null"
    if type(index.get("row_tokens")) not in (int, type(None)):
        return f"has row_tokens {index['row_tokens']!r}, expected a whole number"
    if not isinstance(index.get("shards"), list):
        return "has no list of shards"
    for number, shard in enumerate(index["shards"]):
        kinds = {"file": str, "split": str, "tokens": int, "sha256": str}
        if not isinstance(shard, dict) or any(type(shard.get(key)) is not kind for key, kind in kinds.items()):
            return f"describes shard {number} without {', '.join(kinds)}"
        if shard["split"] not in SPLITS or Path(shard["file"]).name != shard["file"]:
            return f"names shard {shard['file']!r} of split {shard['split']!r}, expected a file in this folder and " \
                   "train or val"
    return None


def index_hash(index: dict) -> str:
    """sha256 hex over the index as canonical JSON; with the shards' sha256 inside it stands for the data."""
    canonical = json.dumps(index, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# A data folder

@dataclass(frozen=True)
class Dataset:
    """A data folder whose headers were checked. A foreign one (no index.json) knows no vocabulary: None."""

    dir: Path
    index: dict
    hash: str
    vocab_size: int | None
    eot: int | None

    @property
    def raw_files(self) -> list[str]:
        """Files without a header, which were taken for bare uint16 ids; for a note to the user."""
        return [shard["file"] for shard in self.index["shards"] if shard.get("raw")]


def open_dataset(data_dir: Path) -> Dataset:
    """The data folder, with every header read and compared with the index. Raises ShardError."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ShardError(f"data folder {str(data_dir)!r} does not exist; make it with python -m data.prepare SOURCE "
                         f"--out {data_dir}")
    index = load_index(data_dir)
    if index is None:
        index = _foreign_index(data_dir)
        return Dataset(data_dir, index, index_hash(index), None, None)
    for shard in index["shards"]:
        _check_shard(data_dir, index, shard)
    return Dataset(data_dir, index, index_hash(index), index["vocab_size"], index["eot"])


def _check_shard(data_dir: Path, index: dict, shard: dict) -> None:
    """Raise ShardError if the file's header does not say what the index says."""
    header = read_header(data_dir / shard["file"])
    found, expected = (header.dtype.name, header.tokens), (index["dtype"], shard["tokens"])
    if found != expected:
        raise ShardError(f"shard {str(data_dir / shard['file'])!r} holds {found[1]} tokens of {found[0]} but "
                         f"index.json says {expected[1]} of {expected[0]}; copy the folder again or prepare the data "
                         "again")
    for track in TRACKS:
        path = track_path(data_dir / shard["file"], track)
        size = path.stat().st_size if path.exists() else None
        if size != header.tokens and (size is not None or f"{track}_sha256" in shard):
            found = "is missing" if size is None else f"holds {size} bytes but its shard {header.tokens} tokens"
            raise ShardError(f"{str(path)!r} {found}; copy the folder again or prepare the data again")


def _foreign_index(data_dir: Path) -> dict:
    """An index for a folder of llm.c, modded-nanogpt or nanoGPT shards."""
    shards, dtypes = [], {}
    for split in SPLITS:
        for path in sorted(data_dir.glob(f"*{split}*.bin")):
            if path.suffixes[-2:-1] in ([f".{track}"] for track in TRACKS):
                continue
            if all(name in path.name for name in SPLITS):
                raise ShardError(f"shard {str(path)!r} has both train and val in its name; rename it")
            header = read_header(path, foreign=True)
            dtypes[header.dtype.name] = path.name
            shards.append({"file": path.name, "split": split, "tokens": header.tokens, "sha256": None,
                           "sample_sha256": _hash_ends(path)} | ({} if header.bytes else {"raw": True}))
    if not shards:
        raise ShardError(f"data folder {str(data_dir)!r} holds neither index.json nor *train*.bin and *val*.bin; make "
                         f"it with python -m data.prepare SOURCE --out {data_dir}")
    if len(dtypes) > 1:
        raise ShardError(f"data folder {str(data_dir)!r} mixes shards of "
                         + " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
                         + "; keep one kind")
    return {"format": INDEX_FORMAT, "dtype": next(iter(dtypes)), "shards": shards}


def _hash_ends(path: Path) -> str:
    """sha256 of a shard's first and last 64 KiB: tells data sets of equal sizes apart without reading them."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def verify(data_dir: Path, note: Callable[[str], None]) -> list[str]:
    """One line for each thing wrong with a data folder: headers, counts, sha256 (without an index headers only)."""
    data_dir = Path(data_dir)
    try:
        index = load_index(data_dir)
        if index is None:
            return _verify_headers(data_dir, note)
    except ShardError as error:
        return [str(error)]
    problems = []
    for shard in index["shards"]:
        try:
            _check_shard(data_dir, index, shard)
            _check_sha256(data_dir, shard)
            note(f"{shard['file']}: {shard['tokens']} tokens, sha256 as recorded")
        except ShardError as error:
            problems.append(str(error))
    return problems or ([] if index["shards"] else [f"index {str(data_dir / INDEX_FILE)!r} names no shard"])


def _verify_headers(data_dir: Path, note: Callable[[str], None]) -> list[str]:
    problems, paths = [], sorted(data_dir.glob("*.bin"))
    for path in paths:
        try:
            header = read_header(path, foreign=True)
            note(f"{path.name}: {header.tokens} tokens" + ("" if header.bytes else " (no header: bare uint16 ids)")
                 + "; no index.json, so no sha256 to compare")
        except ShardError as error:
            problems.append(str(error))
    return problems if paths else [f"data folder {str(data_dir)!r} holds no shards (*.bin)"]


def _check_sha256(data_dir: Path, shard: dict, pause: Callable[[float], None] | None = None) -> None:
    for name, expected in files_of(shard).items():
        path = data_dir / name
        try:
            found = hash_file(path, pause)
        except OSError as error:
            raise ShardError(f"shard {str(path)!r} cannot be read: {error.strerror}") from None
        if found != expected:
            raise ShardError(f"shard {str(path)!r} is damaged: its sha256 is {found[:16]}..., index.json says "
                             f"{expected[:16]}...; copy it again or prepare the data again")


class BackgroundVerifier:
    """Checks the sha256 of every shard in a daemon thread while a run goes on; the loop polls .error.

    It rests twice as long as it works, so that a training step hardly notices. Foreign shards carry no sha256: nothing
    to do. `done` is set when every shard was found as recorded, `error` when one was not.
    """

    def __init__(self, dataset: Dataset):
        self.error: ShardError | None = None
        self.done = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(dataset,), name="shard-verifier", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what was not checked yet stays unchecked."""
        self._stopped.set()
        self._thread.join()

    def _run(self, dataset: Dataset) -> None:
        if sys.platform == "linux":  # there a thread has its own niceness; 19 is the lowest priority
            with suppress(OSError):  # a sandbox that forbids it: the rests must do
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for shard in dataset.index["shards"]:
            if shard["sha256"] is None:
                continue
            try:
                _check_sha256(dataset.dir, shard, self._rest)
            except _Stopped:
                return
            except ShardError as error:
                self.error = error
                return
        self.done = True

    def _rest(self, worked_s: float) -> None:
        if self._stopped.wait(2 * worked_s):
            raise _Stopped


class _Stopped(Exception):
    """BackgroundVerifier.stop() was called in the middle of a shard."""


# ----------------------------------------------------------------------------------------------------------------------
# Reading

class TokenStream:
    """The shards of one split as one stream of `tokens` ids, memory-mapped, so memory is flat in its size.

    row_tokens: whole examples were packed into rows of that many; None = text, in which windows start anywhere.
    foreign: not made by prepare.py.
    """

    def __init__(self, paths: list[Path], name: str, *, row_tokens: int | None = None, foreign: bool = False):
        self.name = name  # for error messages: "train split of 'shards/x'"
        self.row_tokens = row_tokens
        self._is_track = False
        headers = [read_header(path, foreign=foreign) for path in paths]
        filled = [(path, header) for path, header in zip(paths, headers, strict=True) if header.tokens]
        self._paths = [path for path, _ in filled]
        self._headers = [header for _, header in filled]
        self._ends = np.cumsum([header.tokens for header in self._headers], dtype=np.int64)  # of shard i, in the stream
        self.tokens = int(self._ends[-1]) if filled else 0
        self.dtype = headers[0].dtype if headers else np.dtype("<u2")
        self._shard = functools.lru_cache(maxsize=OPEN_SHARDS)(self._map_shard)

    @functools.cached_property
    def loss(self) -> "TokenStream | None":
        """1 for each token that the loss counts, else 0; None if it counts all."""
        return self._track("loss")

    @functools.cached_property
    def start(self) -> "TokenStream | None":
        """1 for each token that starts an example, else 0; None if none was packed."""
        return self._track("start")

    def _track(self, name: str) -> "TokenStream | None":
        """The stream of the uint8 that lie beside the tokens, 1 where a shard has none; None if no shard has any."""
        paths = [track_path(path, name) for path in self._paths]
        if not any(path.exists() for path in paths):
            return None
        track = copy.copy(self)
        track._paths, track._is_track, track.dtype = paths, True, np.dtype(np.uint8)
        track._headers = [replace(header, dtype=track.dtype, bytes=0) for header in self._headers]
        track._shard = functools.lru_cache(maxsize=OPEN_SHARDS)(track._map_shard)
        return track

    def _map_shard(self, number: int) -> np.ndarray:
        path, header = self._paths[number], self._headers[number]
        if self._is_track and not path.exists():
            return np.broadcast_to(np.uint8(1), (header.tokens,))
        if path.stat().st_size < header.bytes + header.tokens * header.dtype.itemsize:
            raise ShardError(f"shard {str(path)!r} became shorter while in use; leave shards alone during a run")
        mapped = np.memmap(path, dtype=header.dtype, mode="r", offset=header.bytes, shape=(header.tokens,))
        return mapped.view(np.ndarray)  # a memmap's own indexing costs several microseconds more

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens [start, start + length) of each start: (n, length) in the shards' dtype; may straddle shards."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size == 0:
            return np.empty((0, length), dtype=self.dtype)
        low, high = int(starts.min()), int(starts.max()) + length
        if low < 0 or high > self.tokens:
            raise IndexError(f"window [{low}, {high}) reaches outside the {self.tokens} tokens of the {self.name}")
        first, last = (int(s) for s in np.searchsorted(self._ends, (low, high - 1), side="right"))
        if first == last:
            return self._gather(first, starts, length)
        return self._gather_from_several(starts, length)

    def _gather(self, number: int, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows that lie in one shard."""
        shard = self._shard(number)
        begin = int(self._ends[number]) - len(shard)
        rows = np.lib.stride_tricks.as_strided(shard, (len(shard) - length + 1, length), shard.strides * 2,
                                               writeable=False)  # row i is the window that starts at token i
        return rows[starts - begin]

    def _gather_from_several(self, starts: np.ndarray, length: int) -> np.ndarray:
        windows = np.empty((len(starts), length), dtype=self.dtype)
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + length - 1, side="right")
        for number in np.unique(first[first == last]):
            inside = (first == number) & (last == number)
            windows[inside] = self._gather(int(number), starts[inside], length)
        for i in np.flatnonzero(first != last):  # few: at most one window in each gap between shards
            windows[i] = self._straddling(int(starts[i]), length, int(first[i]), int(last[i]))
        return windows

    def _straddling(self, start: int, length: int, first: int, last: int) -> np.ndarray:
        parts = []
        for number in range(first, last + 1):
            shard = self._shard(number)
            begin = int(self._ends[number]) - len(shard)
            parts.append(shard[max(0, start - begin):start + length - begin])
        return np.concatenate(parts)


def open_split(dataset: Dataset, split: str) -> TokenStream:
    """The stream of split "train" or "val". Raises ShardError if the data folder has no shard of it."""
    names = [shard["file"] for shard in dataset.index["shards"] if shard["split"] == split]
    if not names:
        way_out = f"add one named *{split}*.bin" if dataset.vocab_size is None else \
            "prepare the data again" + (" with --val-fraction or --val" if split == "val" else "")
        raise ShardError(f"data folder {str(dataset.dir)!r} has no {split} shard; {way_out}")
    return TokenStream([dataset.dir / name for name in names], f"{split} split of {str(dataset.dir)!r}",
                       row_tokens=dataset.index.get("row_tokens"), foreign=dataset.vocab_size is None)
