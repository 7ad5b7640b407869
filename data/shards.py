"""Token shards, read: their headers, the index of a data folder, and a split as one stream of tokens.

A shard is llm.c's file: a header of 256 little-endian int32 (magic, version, token count, zeros), then the token ids as
uint16 or uint32. index.json names the shards of a folder with split, token count and sha256. Folders without one are
read too: *train*.bin and *val*.bin of llm.c and modded-nanogpt, nanoGPT's train.bin and val.bin of bare uint16 ids.
Tracks lie beside a shard, one uint8 for each token: train_00000.loss.bin, 1 where the loss counts predicting the token
(no file: everywhere), and train_00000.start.bin, 1 where an example starts. Nothing here imports torch.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
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
REDO = "copy it again or prepare the data again"


class ShardError(UserError):
    """A shard or index that is missing, damaged, or not what the reader needs."""


# ---- Files -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ShardHeader:
    path: Path
    dtype: np.dtype
    tokens: int
    bytes: int = HEADER_BYTES  # 0 = nanoGPT's file without one


def read_header(path: Path, *, foreign: bool = False) -> ShardHeader:
    """A shard's header, checked against the file's size. foreign: from a folder without index.json, where nanoGPT's
    train.bin and val.bin may lack one. Raises ShardError."""
    name = f"shard {str(path)!r}"
    try:
        with open(path, "rb") as file:
            start, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{name} cannot be read: {error.strerror}; copy it back or prepare the data again") from None
    # As ids 20240520 would be 55,432 and 308, as no GPT-2 text starts; three numbers and then zeros are a header too.
    is_raw = int.from_bytes(start[:4], "little") not in KNOWN_MAGICS and (len(start) < HEADER_BYTES or any(start[12:]))
    if foreign and is_raw and path.name in RAW_FILES:
        return _raw_header(path, start, size)
    if len(start) < HEADER_BYTES:
        raise ShardError(f"{name} holds {size} bytes, fewer than its header of {HEADER_BYTES}; {REDO}")
    magic, version, tokens = np.frombuffer(start, dtype="<i4", count=3).tolist()
    dtype = next((d for d, known in MAGIC_VERSION.items() if known == (magic, version)), None)
    if dtype is None:
        known = " or ".join(f"{m} version {v} ({d.name})" for d, (m, v) in MAGIC_VERSION.items())
        raise ShardError(f"{name} starts with magic {magic} version {version}, expected {known}; bare uint16 ids, as "
                         f"nanoGPT's, are read from {' or '.join(RAW_FILES)} of a folder that has no {INDEX_FILE}")
    expected = HEADER_BYTES + tokens * dtype.itemsize
    if tokens < 0 or size != expected:
        raise ShardError(f"{name} holds {size} bytes but its header says {tokens} tokens of {dtype.name}, {expected} "
                         f"bytes; it is cut short or damaged: {REDO}")
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
    raise ShardError(f"shard {str(path)!r} {problem}; write it anew as bare uint16 ids (nanoGPT's) or as llm.c's files")


def track_path(shard: Path, track: str) -> Path:
    """train_00000.bin -> train_00000.loss.bin"""
    return Path(shard).with_suffix(f".{track}.bin")


def files_of(shard: dict) -> dict[str, str | None]:
    """The files of a shard of the index, itself first, with their sha256."""
    return {shard["file"]: shard["sha256"]} | {track_path(shard["file"], track).name: shard[f"{track}_sha256"]
                                               for track in TRACKS if f"{track}_sha256" in shard}


# ---- A data folder ---------------------------------------------------------------------------------------------------

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
        return hashlib.sha256(json.dumps(self.index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def raw_files(self) -> list[str]:
        """Files without a header, which were taken for bare uint16 ids; for a note to the user."""
        return [shard["file"] for shard in self.index["shards"] if shard.get("raw")]


def open_dataset(data_dir: Path) -> Dataset:
    """The data folder, with every header read and compared with the index. Raises ShardError."""
    data_dir, index = Path(data_dir), load_index(data_dir)
    if index is None:
        return Dataset(data_dir, _foreign_index(data_dir))
    for shard in index["shards"]:
        check_shard(data_dir, index, shard)
    return Dataset(data_dir, index, vocab_size=index["vocab_size"], eot=index["eot"])


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
    if not isinstance(index, dict):
        return f"has format {type(index).__name__!r}, expected {INDEX_FORMAT}"
    for key, is_good, expected in (
            ("format", index.get("format") == INDEX_FORMAT, INDEX_FORMAT),
            ("dtype", index.get("dtype") in ("uint16", "uint32"), "uint16 or uint32"),
            ("vocab_size", isinstance(index.get("vocab_size"), int), "a whole number"),
            ("eot", isinstance(index.get("eot", "missing"), int | None), "an id or null"),
            ("row_tokens", isinstance(index.get("row_tokens"), int | None), "a whole number"),
            ("shards", isinstance(index.get("shards"), list), "a list")):
        if not is_good:
            return f"has {key} {index.get(key)!r}, expected {expected}"
    kinds = {"file": str, "split": str, "tokens": int, "sha256": str}
    for number, shard in enumerate(index["shards"]):
        if not isinstance(shard, dict) or any(type(shard.get(key)) is not kind for key, kind in kinds.items()):
            return f"describes shard {number} without {', '.join(kinds)}"
        if shard["split"] not in SPLITS or Path(shard["file"]).name != shard["file"]:
            return f"names shard {shard['file']!r} of split {shard['split']!r}, expected a file here and train or val"
    return None


def check_shard(data_dir: Path, index: dict, shard: dict) -> None:
    """Raise ShardError if the file's header does not say what the index says."""
    header = read_header(data_dir / shard["file"])
    if (header.dtype.name, header.tokens) != (index["dtype"], shard["tokens"]):
        raise ShardError(f"shard {str(header.path)!r} holds {header.tokens} tokens of {header.dtype.name} but "
                         f"{INDEX_FILE} says {shard['tokens']} of {index['dtype']}; {REDO}")
    for track in TRACKS:
        path = track_path(header.path, track)
        size = path.stat().st_size if path.exists() else None
        if size != header.tokens and (size is not None or f"{track}_sha256" in shard):
            found = "is missing" if size is None else f"holds {size} bytes but its shard {header.tokens} tokens"
            raise ShardError(f"{str(path)!r} {found}; {REDO}")


def _foreign_index(data_dir: Path) -> dict:
    """An index for a folder of llm.c, modded-nanogpt or nanoGPT shards."""
    shards, dtypes = [], {}
    for split in SPLITS:
        for path in shards_in(data_dir, f"*{split}*.bin"):
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
        found = f"holds neither {INDEX_FILE} nor *train*.bin and *val*.bin" if data_dir.exists() else "does not exist"
        raise ShardError(f"data folder {str(data_dir)!r} {found}; make it with python -m data.prepare SOURCE "
                         f"--out {data_dir}")
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise ShardError(f"data folder {str(data_dir)!r} mixes shards of {found}; keep one kind")
    return {"format": INDEX_FORMAT, "dtype": next(iter(dtypes)), "shards": shards}


def shards_in(data_dir: Path, pattern: str) -> list[Path]:
    """The files of that name, sorted, without tracks."""
    return sorted(path for path in data_dir.glob(pattern) if path.suffixes[-2:-1] not in ([f".{t}"] for t in TRACKS))


# ---- Reading ---------------------------------------------------------------------------------------------------------

class TokenStream:
    """The shards of one split as one stream of `tokens` ids, memory-mapped, so memory is flat in its size.

    name: for messages; row_tokens: whole examples were packed into rows of that many, None = text, where windows start
    anywhere; tracks: those of TRACKS that some shard has.
    """

    def __init__(self, shards: Sequence[ShardHeader], name: str, row_tokens: int | None = None):
        self.name, self.row_tokens, self.dtype = name, row_tokens, shards[0].dtype
        self.tracks = {track for track in TRACKS for shard in shards if track_path(shard.path, track).exists()}
        self._shards = [shard for shard in shards if shard.tokens]
        *begins, self.tokens = np.cumsum([0, *(shard.tokens for shard in self._shards)]).tolist()
        self._begins = np.array(begins, dtype=np.int64)  # of each shard, in the stream
        self._mapped = functools.lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _map(self, number: int, track: str | None) -> np.ndarray:
        shard = self._shards[number]
        path, dtype, offset = shard.path, shard.dtype, shard.bytes
        if track is not None:
            path, dtype, offset = track_path(shard.path, track), np.uint8, 0
            if not path.exists():
                return np.broadcast_to(np.uint8(1), (shard.tokens,))
        try:
            mapped = np.memmap(path, dtype, mode="r", offset=offset, shape=(shard.tokens,))
        except ValueError:  # the file ends before that
            raise ShardError(f"shard {str(path)!r} became shorter in use; leave shards alone during a run") from None
        return mapped.view(np.ndarray)  # a memmap's own indexing costs several microseconds more

    def windows(self, starts: np.ndarray, length: int, track: str | None = None) -> np.ndarray:
        """The tokens [start, start + length) of each start, across shards if need be: (n, length) in the shards' dtype;
        of a track the uint8 beside those tokens."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"window [{starts.min()}, {starts.max() + length}) reaches outside the {self.tokens} "
                             f"tokens of the {self.name}")
        windows = np.empty((len(starts), length), dtype=self.dtype if track is None else np.uint8)
        first, last = (np.searchsorted(self._begins, places, side="right") - 1
                       for places in (starts, starts + length - 1))
        for n in np.unique(first[first == last]):
            inside = (first == n) & (last == n)
            rows = np.lib.stride_tricks.sliding_window_view(self._mapped(n, track), length)  # row i starts at token i
            windows[inside] = rows[starts[inside] - self._begins[n]]
        for i in np.flatnonzero(first != last):  # few: at most one window in each gap between shards
            parts = range(first[i], last[i] + 1)
            offsets = starts[i] - self._begins[parts]  # of the window in each of its shards, negative after the first
            windows[i] = np.concatenate([self._mapped(n, track)[max(0, offset):offset + length]
                                         for n, offset in zip(parts, offsets, strict=True)])
        return windows


def open_split(dataset: Dataset, split: str) -> TokenStream:
    """The stream of split "train" or "val". Raises ShardError if the data folder has no shard of it."""
    foreign = dataset.vocab_size is None
    headers = [read_header(dataset.dir / shard["file"], foreign=foreign) for shard in dataset.index["shards"]
               if shard["split"] == split]
    if not headers:
        asked = " with --val-fraction or --val" if split == "val" else ""
        way_out = f"add one named *{split}*.bin" if foreign else f"prepare the data again{asked}"
        raise ShardError(f"data folder {str(dataset.dir)!r} has no {split} shard; {way_out}")
    return TokenStream(headers, f"{split} split of {str(dataset.dir)!r}", dataset.index.get("row_tokens"))
