"""Token shards, read: headers, the index of a data folder, and a split as one stream.

A shard is llm.c's file: a header of 256 little-endian int32 (magic, version, token count, zeros), then the token ids as
uint16 or uint32. A data folder holds shards and index.json, which names each with its split, token count and sha256. A
folder without index.json, as llm.c and modded-nanogpt make them, is read too: *train*.bin and *val*.bin, sorted; and
nanoGPT's train.bin and val.bin, which are uint16 ids and nothing else.
Beside a shard there may be tracks, one uint8 for each of its tokens and no header: train_00000.loss.bin, 1 where the
loss counts predicting the token (no file: everywhere), and train_00000.start.bin, 1 where an example starts.
Nothing here knows text, tokenizers or batches (prepare.py, tokenizer.py, loader.py do), and nothing imports torch.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import UserError

HEADER_BYTES = 256 * 4
MAGIC_VERSION = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # llm.c's, of GPT-2 and Llama 3
KNOWN_MAGICS = (20240520, 20240801, 20240522)  # and that of llm.c's multiple-choice files
RAW_FILES = ("train.bin", "val.bin")  # may lack a header, in a folder without index.json
INDEX_FILE = "index.json"
INDEX_FORMAT = 1
SPLITS = ("train", "val")
TRACKS = ("loss", "start")
SAMPLE_BYTES = 64 << 10  # hashed at both ends of a foreign shard, which carries no sha256
OPEN_SHARDS = 256  # mapped at once; each holds a file descriptor and 1024 is a common limit
AGAIN = "copy it again or prepare the data again"


class ShardError(UserError):
    """A shard or index that is missing, damaged, or not what the reader needs."""


# ----------------------------------------------------------------------------------------------------------------------
# Files

@dataclass(frozen=True)
class ShardHeader:
    path: Path | None  # None: a track that is not there, 1 everywhere
    dtype: np.dtype
    tokens: int
    bytes: int = HEADER_BYTES  # 0 = nanoGPT's file without one


def read_header(path: Path, *, foreign: bool = False) -> ShardHeader:
    """The header of a shard, checked against the file's size. foreign: its folder has no index.json, so that a file
    named as nanoGPT's may be without one. Raises ShardError."""
    name = f"shard {str(path)!r}"
    try:
        with open(path, "rb") as file:
            start, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{name} cannot be read: {error.strerror}; copy it back or prepare the data again") from None
    # 20240520 would be the token ids 55,432 and 308: no GPT-2 text starts so. Three numbers and then zeros, too, must
    # be a header.
    is_raw = int.from_bytes(start[:4], "little") not in KNOWN_MAGICS and (len(start) < HEADER_BYTES or any(start[12:]))
    if foreign and is_raw and path.name in RAW_FILES:
        return _raw_header(path, start, size)
    if len(start) < HEADER_BYTES:
        raise ShardError(f"{name} holds {size} bytes, fewer than its header of {HEADER_BYTES}; {AGAIN}")
    magic, version, tokens = (int(value) for value in np.frombuffer(start, dtype="<i4", count=3))
    dtype = next((d for d, known in MAGIC_VERSION.items() if known == (magic, version)), None)
    if dtype is None:
        known = " or ".join(f"{m} version {v} ({d.name})" for d, (m, v) in MAGIC_VERSION.items())
        raise ShardError(f"{name} starts with magic {magic} version {version}, expected {known}; a file of bare uint16 "
                         f"ids, as nanoGPT's, is read if it is called {' or '.join(RAW_FILES)} and its folder has no "
                         f"{INDEX_FILE}")
    expected = HEADER_BYTES + tokens * dtype.itemsize
    if tokens < 0 or size != expected:
        raise ShardError(f"{name} holds {size} bytes but its header says {tokens} tokens of {dtype.name}, {expected} "
                         f"bytes; it is cut short or damaged: {AGAIN}")
    return ShardHeader(path, dtype, tokens)


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
        return ShardHeader(path, np.dtype("<u2"), size // 2, bytes=0)
    raise ShardError(f"shard {str(path)!r} {problem}; only bare uint16 ids (nanoGPT's) and llm.c's files are read: "
                     "write it anew as one of them")


def track_path(shard: Path, track: str) -> Path:
    """train_00000.bin -> train_00000.loss.bin"""
    return Path(shard).with_suffix(f".{track}.bin")


def files_of(shard: dict) -> dict[str, str | None]:
    """The files of a shard of the index, itself first, with their sha256."""
    tracks = {track_path(Path(shard["file"]), track).name: shard[f"{track}_sha256"] for track in TRACKS
              if f"{track}_sha256" in shard}
    return {shard["file"]: shard["sha256"]} | tracks


# ----------------------------------------------------------------------------------------------------------------------
# A data folder

@dataclass(frozen=True)
class Dataset:
    """A data folder whose headers were checked. A foreign one (no index.json) knows no vocabulary: None."""

    dir: Path
    index: dict
    vocab_size: int | None = None
    eot: int | None = None

    @functools.cached_property
    def hash(self) -> str:
        """sha256 hex over the index as canonical JSON; with the shards' sha256 inside it stands for the data."""
        canonical = json.dumps(self.index, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

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
        return Dataset(data_dir, _foreign_index(data_dir))
    for shard in index["shards"]:
        check_shard(data_dir, index, shard)
    return Dataset(data_dir, index, index["vocab_size"], index["eot"])


def load_index(data_dir: Path) -> dict | None:
    """The index of a data folder, its shape checked; None if the folder has none. Raises ShardError."""
    path = Path(data_dir) / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        problem = _index_problem(index)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardError(f"index {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        problem = f"is not valid JSON ({error})"
    if problem:
        raise ShardError(f"index {str(path)!r} {problem}; prepare the data again")
    return index


def _index_problem(index: object) -> str | None:
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        return f"has format {found!r}, expected {INDEX_FORMAT}"
    if index.get("dtype") not in ("uint16", "uint32"):
        return f"has dtype {index.get('dtype')!r}, expected uint16 or uint32"
    index = {"row_tokens": None} | index
    for key, kind, expected in (("vocab_size", int, "a whole number"), ("eot", int | None, "an id or null"),
                                ("row_tokens", int | None, "a whole number"), ("shards", list, "a list")):
        if not isinstance(index.get(key, "missing"), kind):
            return f"has {key} {index.get(key)!r}, expected {expected}"
    for number, shard in enumerate(index["shards"]):
        kinds = {"file": str, "split": str, "tokens": int, "sha256": str}
        if not isinstance(shard, dict) or any(type(shard.get(key)) is not kind for key, kind in kinds.items()):
            return f"describes shard {number} without {', '.join(kinds)}"
        if shard["split"] not in SPLITS or Path(shard["file"]).name != shard["file"]:
            return f"names shard {shard['file']!r} of split {shard['split']!r}, expected a file in this folder and " \
                   "train or val"
    return None


def check_shard(data_dir: Path, index: dict, shard: dict) -> None:
    """Raise ShardError if the file's header does not say what the index says."""
    header = read_header(data_dir / shard["file"])
    if (header.dtype.name, header.tokens) != (index["dtype"], shard["tokens"]):
        raise ShardError(f"shard {str(header.path)!r} holds {header.tokens} tokens of {header.dtype.name} but "
                         f"{INDEX_FILE} says {shard['tokens']} of {index['dtype']}; copy the folder again or prepare "
                         "the data again")
    for track in TRACKS:
        path = track_path(header.path, track)
        size = path.stat().st_size if path.exists() else None
        if size != header.tokens and (size is not None or f"{track}_sha256" in shard):
            found = "is missing" if size is None else f"holds {size} bytes but its shard {header.tokens} tokens"
            raise ShardError(f"{str(path)!r} {found}; copy the folder again or prepare the data again")


def _foreign_index(data_dir: Path) -> dict:
    """An index for a folder of llm.c, modded-nanogpt or nanoGPT shards."""
    shards, dtypes = [], {}
    for split in SPLITS:
        for path in without_tracks(data_dir.glob(f"*{split}*.bin")):
            if all(name in path.name for name in SPLITS):
                raise ShardError(f"shard {str(path)!r} has both train and val in its name; rename it")
            header = read_header(path, foreign=True)
            dtypes[header.dtype.name] = path.name
            with open(path, "rb") as file:  # data sets of equal sizes are told apart without reading them
                digest = hashlib.sha256(file.read(SAMPLE_BYTES))
                file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
            shards.append({"file": path.name, "split": split, "tokens": header.tokens, "sha256": None,
                           "sample_sha256": digest.hexdigest()} | ({} if header.bytes else {"raw": True}))
    if not shards:
        raise ShardError(f"data folder {str(data_dir)!r} holds neither {INDEX_FILE} nor *train*.bin and *val*.bin; "
                         f"make it with python -m data.prepare SOURCE --out {data_dir}")
    if len(dtypes) > 1:
        raise ShardError(f"data folder {str(data_dir)!r} mixes shards of "
                         + " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
                         + "; keep one kind")
    return {"format": INDEX_FORMAT, "dtype": next(iter(dtypes)), "shards": shards}


def without_tracks(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffixes[-2:-1] not in ([f".{track}"] for track in TRACKS))


# ----------------------------------------------------------------------------------------------------------------------
# Reading

class TokenStream:
    """The shards of one split as one stream of `tokens` ids, memory-mapped, so memory is flat in its size.

    name: for error messages; row_tokens: whole examples were packed into rows of that many; None = text, in which
    windows start anywhere.
    """

    def __init__(self, shards: Sequence[ShardHeader], name: str, row_tokens: int | None = None):
        self.name, self.row_tokens = name, row_tokens
        self.dtype = shards[0].dtype
        self._shards = [shard for shard in shards if shard.tokens]
        self._ends = np.cumsum([0, *(shard.tokens for shard in self._shards)])[1:]  # of shard i, in the stream
        self.tokens = int(self._ends[-1]) if self._shards else 0
        self._mapped = functools.lru_cache(maxsize=OPEN_SHARDS)(self._map)

    @functools.cached_property
    def loss(self) -> "TokenStream | None":
        """1 for each token that the loss counts, else 0; None if it counts all."""
        return self._track("loss")

    @functools.cached_property
    def start(self) -> "TokenStream | None":
        """1 for each token that starts an example, else 0; None if none was packed."""
        return self._track("start")

    def _track(self, name: str) -> "TokenStream | None":
        """The stream of the uint8 that lie beside the tokens; None if no shard has any."""
        tracks = []
        for shard in self._shards:
            path = track_path(shard.path, name)
            tracks.append(ShardHeader(path if path.exists() else None, np.dtype(np.uint8), shard.tokens, bytes=0))
        return TokenStream(tracks, self.name) if any(track.path for track in tracks) else None

    def _map(self, number: int) -> np.ndarray:
        shard = self._shards[number]
        if shard.path is None:
            return np.broadcast_to(np.uint8(1), (shard.tokens,))
        if shard.path.stat().st_size < shard.bytes + shard.tokens * shard.dtype.itemsize:
            raise ShardError(f"shard {str(shard.path)!r} became shorter while in use; leave shards alone during a run")
        mapped = np.memmap(shard.path, dtype=shard.dtype, mode="r", offset=shard.bytes, shape=(shard.tokens,))
        return mapped.view(np.ndarray)  # a memmap's own indexing costs several microseconds more

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens [start, start + length) of each start: (n, length) in the shards' dtype; may straddle shards."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"window [{starts.min()}, {starts.max() + length}) reaches outside the {self.tokens} "
                             f"tokens of the {self.name}")
        windows = np.empty((len(starts), length), dtype=self.dtype)
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + length - 1, side="right")
        for number in np.unique(first[first == last]):
            inside = (first == number) & (last == number)
            shard = self._mapped(int(number))
            rows = np.lib.stride_tricks.as_strided(shard, (len(shard) - length + 1, length), shard.strides * 2,
                                                   writeable=False)  # row i is the window that starts at token i
            windows[inside] = rows[starts[inside] - (self._ends[number] - len(shard))]
        for i in np.flatnonzero(first != last):  # few: at most one window in each gap between shards
            begins = {n: int(self._ends[n]) - self._shards[n].tokens for n in range(first[i], last[i] + 1)}
            windows[i] = np.concatenate([self._mapped(n)[max(0, starts[i] - begin):starts[i] + length - begin]
                                         for n, begin in begins.items()])
        return windows


def open_split(dataset: Dataset, split: str) -> TokenStream:
    """The stream of split "train" or "val". Raises ShardError if the data folder has no shard of it."""
    foreign = dataset.vocab_size is None
    headers = [read_header(dataset.dir / shard["file"], foreign=foreign) for shard in dataset.index["shards"]
               if shard["split"] == split]
    if not headers:
        way_out = f"add one named *{split}*.bin" if foreign else \
            "prepare the data again" + (" with --val-fraction or --val" if split == "val" else "")
        raise ShardError(f"data folder {str(dataset.dir)!r} has no {split} shard; {way_out}")
    return TokenStream(headers, f"{split} split of {str(dataset.dir)!r}", dataset.index.get("row_tokens"))
