"""Token shards, written: what shards.py reads.

A shard and its tracks begin as part files (.train_00000.bin.part): the header's place and the tokens so far, each
written once. SplitWriter.state() makes them durable and says how long they are; a second start cuts them back to that
and goes on. A full shard gets its header and its name; ends the process before the next state(), it is a part again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import files
from config import UserError
from data.dataset import INDEX_FILE
from data.shards import HEADER_BYTES, MAGIC_VERSION, ShardError, track_path
from data.tokenizer import Tokenizer

MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32


def write_index(data_dir: Path, index: dict) -> None:
    """Write index.json. The same index gives the same bytes. Raises OSError."""
    files.write_whole(Path(data_dir) / INDEX_FILE,
                      json.dumps(index, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype of shards with that many ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---- One shard -------------------------------------------------------------------------------------------------------

class ShardWriter:
    """Writes one shard, with its tracks, under temporary names; close() puts it in place.

    path: the final name; dtype: uint16 or uint32; vocab_size: every id must lie below it; tracks: some of TRACKS;
    tokens: go on behind so many that an earlier writer left. The disk failing raises MachineError.
    """

    def __init__(self, path: Path, dtype: np.dtype, vocab_size: int, *, tracks: Sequence[str] = (), tokens: int = 0):
        self.path, self.dtype, self.vocab_size = Path(path), np.dtype(dtype).newbyteorder("<"), vocab_size
        self.tokens = tokens
        if self.dtype not in MAGIC_VERSION:
            raise ShardError(f"shard {self.path.name!r}: dtype {self.dtype.name} should be uint16 or uint32")
        if vocab_size - 1 > np.iinfo(self.dtype).max:
            raise ShardError(f"shard {self.path.name!r}: a vocabulary of {vocab_size} ids does not fit "
                             f"{self.dtype.name}; write it as uint32")
        self._tracks = {track: track_path(self.path, track) for track in tracks}
        with files.disk_errors(self.path):
            _open_part(self.path, self._bytes, is_new=tokens == 0)
            for path in self._tracks.values():
                _open_part(path, tokens, is_new=tokens == 0)

    @property
    def _bytes(self) -> int:
        return HEADER_BYTES + self.tokens * self.dtype.itemsize

    def write(self, tokens: np.ndarray, tracks: Mapping[str, np.ndarray] | None = None) -> None:
        """Append token ids (any integer dtype, any shape read in order) and their tracks (uint8, as many). Raises
        ShardError for an id out of range."""
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
        with files.disk_errors(self.path):
            files.write(part_path(self.path), [np.ascontiguousarray(tokens, self.dtype)], at=self._bytes)
            for track, path in self._tracks.items():
                files.write(part_path(path), [tracks[track]], at=self.tokens)
        self.tokens += tokens.size

    def sync(self) -> None:
        """Make what was written durable, under its temporary names."""
        with files.disk_errors(self.path):
            for path in (self.path, *self._tracks.values()):
                files.sync(part_path(path))

    def close(self) -> dict:
        """Put the shard in place, durably; {"file": name, "tokens": count, "sha256": hex of the whole file} and
        "loss_sha256", ... of its tracks."""
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = *MAGIC_VERSION[self.dtype], self.tokens
        described = {"file": self.path.name, "tokens": self.tokens}
        paths = {"sha256": self.path} | {f"{track}_sha256": path for track, path in self._tracks.items()}
        with files.disk_errors(self.path):
            files.write(part_path(self.path), [header], at=0)
            for name, path in paths.items():
                described[name] = files.sha256(part_path(path))
                files.publish(part_path(path), path)
        return described


def part_path(path: Path) -> Path:
    """train_00000.bin -> .train_00000.bin.part"""
    return path.with_name(f".{path.name}.part")


def _open_part(path: Path, size: int, *, is_new: bool) -> None:
    """Begin the part file of what will be `path` with `size` zeros, or cut the one that is there to `size` bytes."""
    part = part_path(path)
    if is_new:
        files.write(part, [bytes(size)])
        files.sync(part.parent)
        return
    if path.exists() and not part.exists():  # finished, but the process ended before that was written down
        files.rename(path, part)
    if not part.exists() or part.stat().st_size < size:
        raise UserError(f"{str(part)!r} holds fewer bytes than were recorded; remove the "
                        "folder and start again")
    os.truncate(part, size)


# ---- All shards of a split -------------------------------------------------------------------------------------------

@dataclass
class Encoded:
    """The tokens of a unit's documents of one split."""

    tokens: np.ndarray  # (n,) in the shards' dtype
    text_bytes: int
    documents: int  # that end here
    tracks: dict[str, np.ndarray] = field(default_factory=dict)  # of examples: (n,) uint8 each
    lengths: dict[str, int] = field(default_factory=dict)  # of examples: what index.json says of them


class SplitWriter:
    """The tokens of one split on their way into shards. state: what state() said in a start before this one."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, *, shard_tokens: int,
                 tracks: Sequence[str] = (), state: dict | None = None):
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.tracks, self.token_bytes = tracks, tokenizer.token_bytes()
        state = state or {"shards": [], "tokens": 0, "text_bytes": 0, "documents": 0, "lengths": {}}
        self.shards = list(state["shards"])  # finished ones, as index.json describes them
        self.text_bytes, self.documents = state["text_bytes"], state["documents"]  # of the open shard
        self.lengths: dict[str, int] = dict(state["lengths"])  # of the examples in all shards
        self._shard = self._open_shard(state["tokens"]) if state["tokens"] else None

    @property
    def tokens(self) -> int:
        """Of the open shard."""
        return 0 if self._shard is None else self._shard.tokens

    def _open_shard(self, tokens: int) -> ShardWriter:
        path, vocab_size = self.folder / f"{self.split}_{len(self.shards):05d}.bin", self.tokenizer.vocab_size
        return ShardWriter(path, dtype_for(vocab_size), vocab_size, tracks=self.tracks, tokens=tokens)

    def state(self) -> dict:
        """Make the open shard durable; what __init__ needs to go on from here."""
        if self._shard is not None:
            self._shard.sync()
        return {"shards": list(self.shards), "tokens": self.tokens, "text_bytes": self.text_bytes,
                "documents": self.documents, "lengths": dict(self.lengths)}

    def add(self, encoded: Encoded) -> None:
        """Append tokens; a shard that is full is finished, in the middle of a document if need be."""
        for name, count in encoded.lengths.items():
            merge = {"shortest": min, "longest": max}.get(name, int.__add__)
            self.lengths[name] = merge(self.lengths[name], count) if name in self.lengths else count
        while self.tokens + len(encoded.tokens) > self.shard_tokens:
            first, encoded = self._cut(encoded, self.shard_tokens - self.tokens)
            self._append(first)
            self.finish_shard()
        self._append(encoded)

    def _cut(self, encoded: Encoded, room: int) -> tuple[Encoded, Encoded]:
        """The first tokens, and the rest. Text never encodes to end-of-text: each ends a document, in examples each
        start counts one."""
        tokens, tracks = encoded.tokens[:room], {track: values[:room] for track, values in encoded.tracks.items()}
        text_bytes = int(self.token_bytes[tokens].sum())
        documents = int(np.count_nonzero(tracks["start"] if tracks else tokens == self.tokenizer.eot))
        rest = Encoded(encoded.tokens[room:], encoded.text_bytes - text_bytes, encoded.documents - documents,
                       {track: values[room:] for track, values in encoded.tracks.items()})
        return Encoded(tokens, text_bytes, documents, tracks), rest

    def _append(self, encoded: Encoded) -> None:
        if self._shard is None and len(encoded.tokens):
            self._shard = self._open_shard(0)
        if self._shard is not None:
            self._shard.write(encoded.tokens, encoded.tracks)
        self.text_bytes += encoded.text_bytes
        self.documents += encoded.documents

    def finish_shard(self) -> None:
        """Put the open shard, if there is one, in place; the next begins with the next token."""
        if self._shard is None:
            return
        written = self._shard.close()
        self.shards.append({"file": written.pop("file"), "split": self.split, "tokens": written.pop("tokens"),
                            "text_bytes": self.text_bytes, "documents": self.documents, **written})
        self.text_bytes, self.documents, self._shard = 0, 0, None
