"""Token shards, read: their headers, and those of a split as one stream of tokens. The folder is dataset.py's.

A shard is llm.c's file: a header of 256 little-endian int32 (magic, version, token count, zeros), then the token ids as
uint16 or uint32; nanoGPT's train.bin and val.bin are bare uint16 ids.
Tracks lie beside a shard, one uint8 for each token: train_00000.loss.bin, 1 where the loss counts predicting the token
(no file: everywhere), and train_00000.start.bin, 1 where an example starts. Nothing here imports torch.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import files
from config import UserError

HEADER_BYTES = 256 * 4
MAGIC_VERSION = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # llm.c's, of GPT-2 and Llama 3
KNOWN_MAGICS = (20240520, 20240801, 20240522)  # and that of llm.c's multiple-choice files
RAW_FILES = ("train.bin", "val.bin")  # may lack a header, in a folder without index.json
TRACKS = ("loss", "start")
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
                         f"nanoGPT's, are read from {' or '.join(RAW_FILES)} of a folder that has no index.json")
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
        self._mapped = functools.cache(self._map)

    def _map(self, number: int, track: str | None) -> np.ndarray:
        shard = self._shards[number]
        path, dtype, offset = shard.path, shard.dtype, shard.bytes
        if track is not None:
            path, dtype, offset = track_path(shard.path, track), np.uint8, 0
            if not path.exists():
                return np.broadcast_to(np.uint8(1), (shard.tokens,))
        try:
            data = files.mapped(path, offset + shard.tokens * np.dtype(dtype).itemsize)
        except ValueError:  # the file ends before that
            raise ShardError(f"shard {str(path)!r} became shorter in use; leave shards alone during a run") from None
        return np.frombuffer(data, dtype, offset=offset)

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
