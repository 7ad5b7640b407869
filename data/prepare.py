"""Text to token shards: `python -m data.prepare SOURCE ... --out DIR`, and what train.py calls to have its data ready.

Writes DIR/train_00000.bin, val_00000.bin, ..., tokenizer.json and, last, index.json. The bytes depend on the text and
the settings alone, not on paths, time or the number of workers. Files of text and their split into train and val are
sources.py's, files of tokens shards.py's, ids tokenizer.py's.

How it runs. The sources are cut into units of about 1 MB, in order. Worker processes read and encode units; this
process appends their tokens, in order, to the open shard of their split and to a spool file beside it, and writes
.progress.json every few seconds: units done and tokens in each spool. After kill -9 the same command cuts the spools
back to what .progress.json says, fills the open shards from them, and goes on with the next unit. Memory holds a few
units for each worker.

Rows of prompt and response, of text and label, or of messages are examples: examples.py says which of their tokens the
loss counts and packs them into rows of max_seq_len + 1 tokens; tracks beside the shards keep both (shards.py).

A document ends with end-of-text. Where the text is split by characters the cut may fall inside a document: its first
part, the end of train, then has no end-of-text, for the document did not end there; its rest starts val.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from config import ConfigError, DataConfig, MachineError, UserError, exit_cleanly
from data.chat import DEFAULT_TEMPLATE, TEMPLATE_FILE, read_template, save_template
from data.examples import (
    CHAT,
    PROMPT_RESPONSE,
    ROWS_PER_UNIT,
    TEXT,
    Example,
    Packing,
    examples,
    find_kind,
    packed,
    template_hash,
    texts_of_examples,
)
from data.shards import (
    INDEX_FILE,
    INDEX_FORMAT,
    MAX_SHARD_TOKENS,
    TRACKS,
    ShardWriter,
    files_of,
    load_index,
    track_path,
    verify,
    write_index,
    write_track,
)
from data.sources import (
    KINDS,
    LONGEST_UNIT_BYTES,
    STDLIB,
    UNIT_BYTES,
    SourceError,
    TextFile,
    Texts,
    Unit,
    choose_split,
    describe,
    documents,
    find_files,
    split_of,
)
from data.tokenizer import (
    TIKTOKEN_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    pieces,
    tokenizer_identity,
    train_bpe,
)

DEFAULT_TOKENIZER = "gpt2"
SMALL_BYTES = 8 << 20  # below this, starting workers takes longer than they save
UNITS_PER_WORKER = 3  # encoded or waiting at a time
SPOOL_BLOCK_BYTES = 1 << 24
CHECKPOINT_SECONDS = 5.0
BPE_SAMPLE_BYTES = 200_000_000
BPE_TEXT_CHARS = 1 << 16

PROGRESS_FILE = ".progress.json"
LOCK_FILE = ".lock"
POLL_SECONDS = 1.0
NOTE_SECONDS = 30.0


def _print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Busy(UserError):
    """Another process is preparing the same folder."""


class PreparationStopped(MachineError):
    """should_stop() said so; what is done is kept, and the same call goes on."""


# ----------------------------------------------------------------------------------------------------------------------
# Encoding units, here or in worker processes

@dataclass
class Encoded:
    """The tokens of a unit's documents of one split."""

    tokens: bytearray  # in the shards' dtype
    text_bytes: int
    documents: int  # that end here
    tracks: dict[str, bytearray] = field(default_factory=dict)  # of examples, one byte for each token
    lengths: dict[str, int] = field(default_factory=dict)  # of examples, see Encoder._lengths


class Encoder:
    """Encodes units; each worker process has one. packing: the units hold examples, not texts."""

    def __init__(self, tokenizer: Tokenizer, *, val_fraction: float, text_field: str, packing: Packing | None = None):
        self.tokenizer, self.val_fraction, self.text_field = tokenizer, val_fraction, text_field
        self.packing = packing
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.token_bytes = tokenizer.token_bytes()

    def encode(self, unit: Unit) -> tuple[dict[str, Encoded], int]:
        """Tokens by split, and how many invalid UTF-8 sequences were replaced."""
        if self.packing is not None:
            return self._encode_examples(unit, self.packing)
        encoded: dict[str, Encoded] = {}
        end = np.array([self.tokenizer.eot], dtype=self.dtype)
        invalid_in_all = 0
        for text, invalid in documents(unit, self.text_field):
            split = unit.split or split_of(text, self.val_fraction)
            into = encoded.setdefault(split, Encoded(bytearray(), 0, 0))
            into.tokens += self.tokenizer.encode(text).astype(self.dtype).data
            into.text_bytes += len(text) if text.isascii() else len(text.encode())
            if unit.ends:
                into.tokens += end.data
                into.documents += 1
            invalid_in_all += invalid
        return encoded, invalid_in_all

    def _encode_examples(self, unit: Unit, packing: Packing) -> tuple[dict[str, Encoded], int]:
        found: dict[str, list[Example]] = {}
        invalid_in_all = 0
        for example, invalid in examples(unit, packing, self.tokenizer):
            found.setdefault(unit.split or split_of(example.text, self.val_fraction), []).append(example)
            invalid_in_all += invalid
        encoded = {}
        for split, members in found.items():
            tokens, loss, start = packed(members, packing.row_tokens, self.tokenizer.eot)
            tracks = {"loss": bytearray(loss.data.cast("B")), "start": bytearray(start.data.cast("B"))}
            encoded[split] = self.counted(bytearray(tokens.astype(self.dtype).data.cast("B")), tracks)
            encoded[split].lengths = self._lengths(members)
        return encoded, invalid_in_all

    def _lengths(self, members: list[Example]) -> dict[str, int]:
        """Of examples: how many, their tokens, those that the loss counts, the shortest, the longest, how many were cut
        to fit."""
        lengths = [len(example.ids) + example.cut for example in members]
        return {"examples": len(members), "tokens": sum(len(example.ids) for example in members),
                "response_tokens": sum(int(example.scored.sum()) for example in members),
                "shortest": min(lengths), "longest": max(lengths),
                "truncated": sum(example.cut > 0 for example in members)}

    def counted(self, tokens: bytearray, tracks: dict[str, bytearray]) -> Encoded:
        """Some of a unit's tokens, counted from their ids: text never encodes to end-of-text. Examples by their starts.
        """
        ids = np.frombuffer(tokens, self.dtype)
        ends = np.frombuffer(tracks["start"], np.uint8) if tracks else ids == self.tokenizer.eot
        return Encoded(tokens, int(self.token_bytes[ids].sum()), int(np.count_nonzero(ends)), tracks)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(tokenizer_file: str, val_fraction: float, text_field: str, packing: Packing | None) -> None:
    global _encoder
    _encoder = Encoder(load_tokenizer(tokenizer_file), val_fraction=val_fraction, text_field=text_field,
                       packing=packing)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, and they hold each other's end of its pipe."""
    import multiprocessing
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(unit: Unit) -> tuple[dict[str, Encoded], int]:
    return _encoder.encode(unit)


def _nothing() -> None:
    pass


@contextmanager
def _starting_workers() -> Iterator[None]:
    """While processes start: hide the main module, which each would import (train.py imports torch), and Ctrl-C.

    A process inherits the blocked signal; Ctrl-C then reaches this one alone, which ends them in order.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def encode_units(units: Iterator[Unit], encoder: Encoder, workers: int, tokenizer_file: Path) \
        -> Iterator[tuple[int, dict[str, Encoded], int]]:
    """(source bytes, tokens by split, invalid sequences) of each unit, in order; workers = 0: in this process."""
    if not workers:
        for unit in units:
            yield unit.bytes, *encoder.encode(unit)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    arguments = (str(tokenizer_file), encoder.val_fraction, encoder.text_field, encoder.packing)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
    pending = deque()
    try:
        with _starting_workers():
            for _ in range(workers):
                pool.submit(_nothing)
        for unit in units:
            pending.append((unit.bytes, pool.submit(_encode_in_worker, unit)))
            if len(pending) >= UNITS_PER_WORKER * workers:
                size, future = pending.popleft()
                yield size, *future.result()
        while pending:
            size, future = pending.popleft()
            yield size, *future.result()
    except BrokenProcessPool:
        raise MachineError("a worker process died (out of memory?); give the same command again to go on, with fewer "
                           "--workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# The output folder

class SplitWriter:
    """The tokens of one split on their way into shards.

    They go into the open shard, which only exists once it is full, and into a spool file, from which a second start
    fills the open shard again.
    """

    def __init__(self, folder: Path, split: str, encoder: Encoder, shard_tokens: int, state: dict | None):
        self.folder, self.split, self.encoder, self.shard_tokens = folder, split, encoder, shard_tokens
        state = state or {"shards": [], "tokens": 0, "text_bytes": 0, "documents": 0}
        self.shards = list(state["shards"])  # finished ones, as index.json describes them
        self.tokens, self.text_bytes, self.documents = state["tokens"], state["text_bytes"], state["documents"]
        self.lengths: dict[str, int] = dict(state.get("lengths", {}))  # of the examples in all shards
        self._full_spools: list[Path] = []
        self._spool = self._open_spool(self._spool_path(), self.tokens * encoder.dtype.itemsize)
        self._tracks = {track: self._open_spool(self._track_spool_path(track), self.tokens)
                        for track in (TRACKS if encoder.packing is not None else ())}
        self._shard = self._new_shard()
        self._spool.seek(0)
        while block := self._spool.read(SPOOL_BLOCK_BYTES):
            self._shard.write(np.frombuffer(block, encoder.dtype))

    def _open_spool(self, path: Path, size: int) -> BinaryIO:
        """A spool cut back to the bytes that .progress.json counts."""
        spool = open(path, "ab+")
        if spool.tell() < size:
            spool.close()
            raise UserError(f"{str(path)!r} holds fewer bytes than {PROGRESS_FILE} says; start again")
        spool.truncate(size)
        return spool

    def _spool_path(self) -> Path:
        return self.folder / f".{self.split}_{len(self.shards):05d}.part"

    def _track_spool_path(self, track: str) -> Path:
        return self.folder / f".{self.split}_{len(self.shards):05d}.{track}.part"

    def _new_shard(self) -> ShardWriter:
        return ShardWriter(self.folder / f"{self.split}_{len(self.shards):05d}.bin", self.encoder.dtype,
                           self.encoder.tokenizer.vocab_size)

    def state(self) -> dict:
        """Make the spool durable; what __init__ needs to go on from here."""
        for spool in (self._spool, *self._tracks.values()):
            spool.flush()
            os.fsync(spool.fileno())
        return {"shards": self.shards, "tokens": self.tokens, "text_bytes": self.text_bytes,
                "documents": self.documents, "lengths": self.lengths}

    def add(self, encoded: Encoded) -> None:
        """Append tokens; a shard that is full is finished, in the middle of a document if need be."""
        itemsize = self.encoder.dtype.itemsize
        for name, count in encoded.lengths.items():
            merge = {"shortest": min, "longest": max}.get(name, int.__add__)
            self.lengths[name] = merge(self.lengths[name], count) if name in self.lengths else count
        while self.tokens + len(encoded.tokens) // itemsize > self.shard_tokens:
            room = self.shard_tokens - self.tokens
            first = self.encoder.counted(encoded.tokens[:room * itemsize],
                                         {name: track[:room] for name, track in encoded.tracks.items()})
            self._append(first)
            self.finish_shard()
            encoded = Encoded(encoded.tokens[room * itemsize:], encoded.text_bytes - first.text_bytes,
                              encoded.documents - first.documents,
                              {name: track[room:] for name, track in encoded.tracks.items()})
        self._append(encoded)

    def _append(self, encoded: Encoded) -> None:
        self._spool.write(encoded.tokens)
        for name, spool in self._tracks.items():
            spool.write(encoded.tracks[name])
        self._shard.write(np.frombuffer(encoded.tokens, self.encoder.dtype))
        self.tokens += len(encoded.tokens) // self.encoder.dtype.itemsize
        self.text_bytes += encoded.text_bytes
        self.documents += encoded.documents

    def finish_shard(self) -> None:
        """Put the open shard in place and start the next. Its spool stays until remove_full_spools()."""
        written = self._shard.close()
        hashes = {}
        for track, spool in self._tracks.items():
            spool.close()
            path = self._track_spool_path(track)
            hashes[f"{track}_sha256"] = write_track(track_path(self.folder / written["file"], track), path)
            self._full_spools.append(path)
        self._spool.close()
        self._full_spools.append(self._spool_path())
        self.shards.append({"file": written["file"], "split": self.split, "tokens": written["tokens"],
                            "text_bytes": self.text_bytes, "documents": self.documents, "sha256": written["sha256"],
                            **hashes})
        self.tokens = self.text_bytes = self.documents = 0
        self._spool = open(self._spool_path(), "wb+")
        self._tracks = {track: open(self._track_spool_path(track), "wb+") for track in self._tracks}
        self._shard = self._new_shard()

    def remove_full_spools(self) -> None:
        """To be called once .progress.json no longer needs them."""
        while self._full_spools:
            self._full_spools.pop().unlink(missing_ok=True)

    def close(self) -> None:
        """Drop the open shard. The spool stays, for a second start."""
        self._shard.abort()
        for spool in (self._spool, *self._tracks.values()):
            with suppress(OSError):  # on a full disk the buffer cannot be written; .progress.json does not count on it
                spool.close()


class OutputFolder:
    """The folder while it is being filled: locked, with .progress.json saying what is done."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.progress = {"settings": settings, "tokenizer_sha256": None, "units": 0, "invalid_utf8": 0, "splits": {}}
        self._made = not path.exists()
        self._lock: int | None = None

    def open(self) -> dict | None:
        """Make and lock the folder; the index if it is finished, else None. Raises UserError if it is not ours."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            return self._claim()
        except OSError as error:
            raise UserError(f"output folder {str(self.path)!r} cannot be written: {error.strerror}; name another "
                            "(--out, data.dir)") from None

    def _acquire_lock(self) -> None:
        while self._lock is None:
            lock = os.open(self.path / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise Busy(f"another process is preparing {str(self.path)!r}; wait for it, or name another folder "
                           "(--out, data.dir)") from None
            except OSError:  # a file system without locks: one process at a time is then up to the user
                pass
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK_FILE)):
                    self._lock = lock
                    return
            os.close(lock)  # whoever held it finished, and removed it between our open and our lock

    def _claim(self) -> dict | None:
        index = load_index(self.path)
        if index is not None:
            refuse_differences(self.path, index.get("settings", {}), self.settings)
            if (self.path / PROGRESS_FILE).exists():  # killed right after index.json was written
                self._remove_all_but([name for shard in index["shards"] for name in files_of(shard)])
            return index
        names = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE, PROGRESS_FILE + ".tmp"}
        if PROGRESS_FILE in names:
            self.progress = self._read_progress()
            refuse_differences(self.path, self.progress["settings"], self.settings)
        elif names:
            raise UserError(f"output folder {str(self.path)!r} is not empty, it holds "
                            f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}; name an empty or new "
                            "one (--out, data.dir); to train on these shards as they are: data.source=[]")
        return None

    def _read_progress(self) -> dict:
        try:
            return json.loads((self.path / PROGRESS_FILE).read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"output folder {str(self.path)!r}: {PROGRESS_FILE} is damaged; remove the folder and "
                            "start again") from None

    def save(self, **changes) -> None:
        """Write .progress.json with changes, whole or not at all."""
        self.progress |= changes
        temporary = self.path / (PROGRESS_FILE + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.progress, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / PROGRESS_FILE)

    def finish(self, index: dict) -> None:
        """Write index.json; what was needed on the way goes."""
        write_index(self.path, index)
        self._remove_all_but([name for shard in index["shards"] for name in files_of(shard)])

    def discard(self) -> None:
        """Remove all that was written: a mistake of the user's leaves nothing behind."""
        self._remove_all_but([])
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE):
            (self.path / name).unlink(missing_ok=True)

    def _remove_all_but(self, keep: Sequence[str]) -> None:
        """Remove the files that prepare() makes on its way. Only for a folder with our .progress.json."""
        for pattern in ("*.tmp", ".train_*.part", ".val_*.part", "train_*.bin", "val_*.bin", PROGRESS_FILE):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock, and of a folder made for nothing."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / LOCK_FILE).unlink()
            os.close(self._lock)
            self._lock = None
        if self._made:
            with suppress(OSError):  # it is not empty
                self.path.rmdir()


def refuse_differences(folder: Path, theirs: dict, ours: dict, ignore: Sequence[str] = ()) -> None:
    """Raise ConfigError listing how the settings that made a folder differ from ours."""
    lines = [f"{key}: {json.dumps(theirs.get(key))} -> {json.dumps(ours[key])}" for key in ours
             if key not in ignore and theirs.get(key) != ours[key]]
    if lines:
        raise ConfigError(f"data folder {str(folder)!r} was made with other settings ({'; '.join(lines)}); name "
                          "another folder (--out, data.dir) or remove this one; to train on it as it is: "
                          "data.source=[]")


# ----------------------------------------------------------------------------------------------------------------------
# prepare()

def prepare(sources: Sequence[str], out_dir: Path, *, tokenizer: str = DEFAULT_TOKENIZER,
            val_fraction: float = 0.05, val_sources: Sequence[str] = (), workers: int | None = None,
            text_field: str = "text", shard_tokens: int = 100_000_000, min_window: int | None = None,
            max_seq_len: int | None = None, chat_template: str = DEFAULT_TEMPLATE,
            note: Callable[[str], None] = _print_note, should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Write the shards of sources into out_dir, or go on with it, or find it done; the index.

    min_window: tokens that each split must hold at least, max_seq_len + 1. max_seq_len and chat_template (its text) are
    for rows of examples. Raises UserError (nothing stays written), MachineError and PreparationStopped (the same call
    goes on).
    """
    if not sources:
        raise SourceError(f"no source is named; name a text file, a folder, or {STDLIB}")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {shard_tokens} should lie between 1 and {MAX_SHARD_TOKENS}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} should be at least 1")
    if not 0.0 <= val_fraction <= 0.9:
        raise UserError(f"--val-fraction {val_fraction} should lie between 0 and 0.9")
    settings = settings_of(sources, val_sources, tokenizer=tokenizer, val_fraction=val_fraction, text_field=text_field)
    files = [file for source in sources for file in find_files(source)]
    val_files = [file for source in val_sources for file in find_files(source)]
    packing = choose_packing(files + val_files, text_field, max_seq_len, chat_template)
    if packing is None:
        sources_of_text = choose_split(files, val_files, val_fraction, text_field)
    else:
        unit_bytes = min(max(UNIT_BYTES, ROWS_PER_UNIT * 4 * packing.row_tokens), LONGEST_UNIT_BYTES)
        sources_of_text = choose_split(files, val_files, val_fraction, None, row_unit_bytes=unit_bytes)
        settings |= packing.settings
        if shard_tokens < packing.row_tokens:
            raise UserError(f"--shard-tokens {shard_tokens} is less than a row of {packing.row_tokens}; raise it")
        shard_tokens -= shard_tokens % packing.row_tokens  # a shard holds whole rows
    folder = OutputFolder(Path(out_dir), settings | {"shard_tokens": shard_tokens})
    try:
        index = folder.open()
        if index is not None:
            note(f"{folder.path} is prepared already")
        else:
            index = _fill(folder, sources_of_text, tokenizer, packing=packing, workers=workers, note=note,
                          should_stop=should_stop, min_tokens=min_window or 1)
        return index
    finally:
        folder.close()


def choose_packing(files: Sequence[TextFile], text_field: str, max_seq_len: int | None,
                   chat_template: str) -> Packing | None:
    """How the rows of examples in these files are packed; None if they hold plain text. Raises UserError."""
    kind = find_kind(files, text_field)
    if kind == TEXT:
        return None
    if max_seq_len is None or max_seq_len < 1:
        what = "is missing" if max_seq_len is None else f"= {max_seq_len} should be at least 1"
        raise UserError(f"--max-seq-len {what}: source {files[0].path!r} holds {kind}, which is packed into rows of "
                        "the model's context; name that (model.max_seq_len)")
    return Packing(kind, max_seq_len, chat_template if kind == CHAT else "")


def settings_of(sources: Sequence[str], val_sources: Sequence[str], *, tokenizer: str, val_fraction: float,
                text_field: str) -> dict:
    """What decides the tokens, as index.json keeps it. Raises UserError if a source or tokenizer is not there."""
    return {"sources": [describe(source, find_files(source)) for source in sources],
            "val_sources": [describe(source, find_files(source)) for source in val_sources],
            "tokenizer": tokenizer_identity(tokenizer), "val_fraction": None if val_sources else val_fraction,
            "text_field": text_field}


def _fill(folder: OutputFolder, texts: Texts, tokenizer_name: str, *, packing: Packing | None, workers: int | None,
          note: Callable[[str], None], should_stop: Callable[[], bool], min_tokens: int) -> dict:
    """Write what the folder lacks; the index."""
    writers: dict[str, SplitWriter] = {}
    try:
        tokenizer = _tokenizer_of(folder, texts, tokenizer_name, packing, note)
        encoder = Encoder(tokenizer, val_fraction=texts.val_fraction, text_field=texts.text_field, packing=packing)
        for split in ("train", "val"):
            writers[split] = SplitWriter(folder.path, split, encoder, folder.settings["shard_tokens"],
                                         folder.progress["splits"].get(split))
        if texts.bytes <= SMALL_BYTES or workers == 1:
            workers = 0
        elif workers is None:
            workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        invalid = _encode_texts(folder, texts, encoder, writers, workers=workers, should_stop=should_stop)
        for writer in writers.values():
            if writer.tokens:
                writer.finish_shard()
        shards = [shard for writer in writers.values() for shard in writer.shards]
        index = {"format": INDEX_FORMAT, "tokenizer": folder.settings["tokenizer"],
                 "tokenizer_sha256": tokenizer.fingerprint, "dtype": encoder.dtype.name,
                 "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "settings": folder.settings,
                 "val_split": texts.val_split, "invalid_utf8": invalid, "shards": shards}
        if packing is not None:
            index |= {"row_tokens": packing.row_tokens,
                      "examples": {split: writer.lengths for split, writer in writers.items() if writer.lengths}}
        _check_tokens(index, min_tokens)
        folder.finish(index)
    except UserError:
        folder.discard()
        raise
    except OSError as error:
        raise MachineError(f"writing {str(folder.path)!r} failed: {error.strerror}; make room and give the same "
                           "command again: it goes on") from None
    except MachineError as error:
        raise type(error)(f"{error}; give the same command again: it goes on") from None
    finally:
        for writer in writers.values():
            writer.close()
    note(f"{folder.path}: {_summary(index)}")
    return index


def _tokenizer_of(folder: OutputFolder, texts: Texts, name: str, packing: Packing | None,
                  note: Callable[[str], None]) -> Tokenizer:
    """The tokenizer, loaded or trained on the training split and saved in the folder, where a second start finds it;
    the chat template beside it."""
    path = folder.path / TOKENIZER_FILE
    if folder.progress["tokenizer_sha256"] is not None:
        tokenizer = load_tokenizer(str(path))
        if tokenizer.fingerprint != folder.progress["tokenizer_sha256"]:
            raise UserError(f"tokenizer {str(path)!r} was changed meanwhile; start again")
        return tokenizer
    folder.save()  # from here on the folder is ours
    if packing is not None and packing.kind == CHAT:
        save_template(folder.path, packing.chat_template)
    if name.startswith("bpe:"):
        vocab_size = int(name[4:]) if name[4:].isdecimal() else 0
        note(f"training tokenizer {name}")
        tokenizer = train_bpe(_training_texts(texts, packing), vocab_size)
    else:
        tokenizer = load_tokenizer(name)
    tokenizer.save(path)
    folder.save(tokenizer_sha256=tokenizer.fingerprint)
    return tokenizer


def _training_texts(texts: Texts, packing: Packing | None = None) -> Iterator[str]:
    """Short texts of the training split, in all about BPE_SAMPLE_BYTES, from units spread evenly over it."""
    stride = math.ceil(texts.bytes / BPE_SAMPLE_BYTES)
    for unit in itertools.islice(texts.units(cuttable=True), 0, None, stride):
        if unit.split == "val":
            continue
        if packing is None:
            found = (([text], text) for text, _ in documents(unit, texts.text_field))
        else:
            found = texts_of_examples(unit, packing.kind)
        for parts, hashed in found:
            if unit.split == "train" or split_of(hashed, texts.val_fraction) == "train":
                for piece in itertools.chain.from_iterable(pieces(part, BPE_TEXT_CHARS) for part in parts):
                    yield from (piece[i:i + 2 * BPE_TEXT_CHARS] for i in range(0, len(piece), 2 * BPE_TEXT_CHARS))


def _encode_texts(folder: OutputFolder, texts: Texts, encoder: Encoder, writers: dict[str, SplitWriter], *,
                  workers: int, should_stop: Callable[[], bool]) -> int:
    """Append the tokens of all units that .progress.json does not count yet, and keep it up to date.

    Returns how many invalid UTF-8 sequences were replaced in all.
    """
    done, invalid = folder.progress["units"], folder.progress["invalid_utf8"]
    units = texts.units(cuttable=encoder.tokenizer.cuttable)
    skipped = sum(unit.bytes for unit in itertools.islice(units, done))
    saved, saved_shards = time.monotonic(), None
    with closing(encode_units(units, encoder, workers, folder.path / TOKENIZER_FILE)) as results, \
            _progress_bar(texts.bytes, skipped) as advance:
        for size, encoded, replaced in results:
            for split, tokens in encoded.items():
                writers[split].add(tokens)
            done, invalid = done + 1, invalid + replaced
            advance(size)
            stop, shards = should_stop(), [len(writer.shards) for writer in writers.values()]
            if stop or shards != saved_shards or time.monotonic() - saved > CHECKPOINT_SECONDS:
                folder.save(units=done, invalid_utf8=invalid, splits={name: w.state() for name, w in writers.items()})
                for writer in writers.values():
                    writer.remove_full_spools()
                saved, saved_shards = time.monotonic(), shards
            if stop:
                raise PreparationStopped(f"stopped while preparing {str(folder.path)!r}")
    return invalid


@contextmanager
def _progress_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over bytes of source, unless there is little to do; yields what advances it."""
    if total <= SMALL_BYTES:
        yield lambda size: None
        return
    from tqdm import tqdm
    with tqdm(desc="preparing", total=total, initial=done, unit="B", unit_scale=True, mininterval=1.0) as bar:
        yield bar.update


def _tokens_in(index: dict, split: str) -> int:
    return sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)


def _check_tokens(index: dict, minimum: int) -> None:
    """Raise ConfigError if a split (val only if one was asked for) is too small for one window."""
    for split in ("train", "val"):
        tokens = _tokens_in(index, split)
        if tokens < minimum and not (split == "val" and index["val_split"] == "none"):
            change = {"train": "more text, or a smaller --val-fraction (data.val_fraction; 0 = no validation)",
                      "val": "more validation text, a larger --val-fraction (data.val_fraction; 0 = no validation)"}
            raise ConfigError(f"the {split} split holds {tokens:,} tokens but needs {minimum:,}; give {change[split]}"
                              + (", or lower model.max_seq_len" if minimum > 1 else ""))


def _summary(index: dict) -> str:
    lines = []
    for split in ("train", "val"):
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        lines.append(f"{split} {sum(s['tokens'] for s in shards):,} tokens of {sum(s['text_bytes'] for s in shards):,} "
                     f"bytes in {len(shards)} shard{'s' * (len(shards) != 1)}")
        if split in index.get("examples", {}):
            lines[-1] += f" ({_summary_of_examples(index['examples'][split], sum(s['tokens'] for s in shards))})"
    replaced = f", {index['invalid_utf8']:,} invalid UTF-8 sequences replaced" if index["invalid_utf8"] else ""
    if "row_tokens" in index:
        replaced += f"; {index['settings']['kind']} in rows of {index['row_tokens']:,} tokens, loss on the responses"
    return f"{', '.join(lines)}; tokenizer {index['tokenizer']}, {index['vocab_size']:,} ids{replaced}"


def _summary_of_examples(lengths: dict[str, int], tokens: int) -> str:
    cut = f", {lengths['truncated']:,} cut at the end to fit" if lengths["truncated"] else ""
    return (f"{lengths['examples']:,} examples of {lengths['shortest']} to {lengths['longest']} tokens, "
            f"{lengths['tokens'] / lengths['examples']:.1f} on average, {lengths['response_tokens']:,} tokens with loss"
            f"{cut}, rows {100 * lengths['tokens'] / tokens:.1f} % full")


# ----------------------------------------------------------------------------------------------------------------------
# For train.py

def data_dir_for(data: DataConfig, *, max_seq_len: int | None = None, chat_template: str = DEFAULT_TEMPLATE) -> Path:
    """The folder of shards: data.dir, else shards/<name of the first source>-<hash of the data settings>; of examples
    with max_seq_len and (chat) the template among the settings."""
    if data.dir is not None:
        return Path(data.dir)
    if not data.source:
        raise ConfigError("data.source and data.dir are both left out; name text (data.source=mybook.txt) or a folder "
                          "of shards (data.dir=shards/mybook)")
    tokenizer = tokenizer_identity(data.tokenizer or DEFAULT_TOKENIZER)  # a copied or moved file is the same
    settings = [data.source, data.val_source, tokenizer, data.val_fraction, data.text_field]
    name = Path(data.source[0]).absolute().name.partition(".")[0] or "text"
    candidates = {kind: Path("shards", f"{name}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]}")
                  for kind, words in ((TEXT, settings), (PROMPT_RESPONSE, [*settings, max_seq_len]),
                                      (CHAT, [*settings, max_seq_len, template_hash(chat_template)]))}
    for folder in candidates.values():
        if (folder / INDEX_FILE).exists():  # its source may be gone
            return folder
    kind = TEXT
    with suppress(SourceError):  # prepare() says it
        kind = find_kind([file for source in data.source for file in find_files(source)], data.text_field)
    return candidates.get(kind, candidates[PROMPT_RESPONSE])


def ensure_prepared(data: DataConfig, *, local_rank: int, note: Callable[[str], None],
                    should_stop: Callable[[], bool] = lambda: False, max_seq_len: int | None = None,
                    chat_template: str = DEFAULT_TEMPLATE) -> Path:
    """The folder of shards, prepared first if it is not: by local rank 0, while the others wait for index.json.
    max_seq_len, chat_template (its text): for examples.

    For every rank to call before the process group exists. Raises ConfigError if the folder was made with other
    settings or holds nothing, PreparationStopped if should_stop() says so.
    """
    folder = data_dir_for(data, max_seq_len=max_seq_len, chat_template=chat_template)
    if not data.source:
        _check_given_folder(folder, data)
        return folder
    started = noted = time.monotonic()
    while not _is_prepared(folder, data, note, max_seq_len, chat_template):
        if should_stop():
            raise PreparationStopped(f"stopped while {str(folder)!r} was being prepared")
        if local_rank == 0:
            with suppress(Busy):  # another node or job is at it
                prepare(data.source, folder, tokenizer=data.tokenizer or DEFAULT_TOKENIZER,
                        val_fraction=data.val_fraction, val_sources=data.val_source, text_field=data.text_field,
                        max_seq_len=max_seq_len, chat_template=chat_template, note=note, should_stop=should_stop)
                return folder
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            note(f"waiting for {folder / INDEX_FILE}, {noted - started:.0f} s so far")
        time.sleep(POLL_SECONDS)
    return folder


def _is_prepared(folder: Path, data: DataConfig, note: Callable[[str], None], max_seq_len: int | None,
                 chat_template: str) -> bool:
    """Whether the folder is finished. Raises ConfigError if it was made with other settings."""
    index = load_index(folder)
    if index is None:
        return False
    ours = {"val_fraction": None if data.val_source else data.val_fraction, "text_field": data.text_field,
            **_tokenizer_setting(index, data)}
    kind = index.get("settings", {}).get("kind")
    if kind is not None:
        ours |= Packing(kind, max_seq_len, chat_template).settings
    try:
        ours |= {"sources": [describe(source, find_files(source)) for source in data.source],
                 "val_sources": [describe(source, find_files(source)) for source in data.val_source]}
    except SourceError as error:
        note(f"{error}; using {folder}, which was made from it")
    refuse_differences(folder, index.get("settings", {}), ours)
    return True


def _tokenizer_setting(index: dict, data: DataConfig) -> dict:
    """The tokenizer to compare with that of an index: none if it is left out or the index's own tokenizer.json."""
    if data.tokenizer is None:
        return {}
    identity = tokenizer_identity(data.tokenizer)
    _, plus, end_of_text = index.get("tokenizer", "").partition("+")  # see tokenizer_identity
    own = f"{TOKENIZER_FILE}:{index.get('tokenizer_sha256', '')[:12]}{plus}{end_of_text}"
    return {} if identity == own else {"tokenizer": identity}


def _check_given_folder(folder: Path, data: DataConfig) -> None:
    """Raise ConfigError unless the folder holds shards, ours or (with data.tokenizer) foreign ones."""
    index = load_index(folder)
    if index is not None:
        refuse_differences(folder, index.get("settings", {}), _tokenizer_setting(index, data))
    elif (folder / PROGRESS_FILE).exists():
        raise ConfigError(f"data.dir = {str(folder)!r} is not finished; give the command that began it again")
    elif not any(folder.glob("*train*.bin")):
        raise ConfigError(f"data.dir = {str(folder)!r} holds neither {INDEX_FILE} nor *train*.bin; set data.source to "
                          "prepare text into it")
    elif data.tokenizer is None:
        raise ConfigError(f"data.dir = {str(folder)!r} holds shards without {INDEX_FILE}; set data.tokenizer to the "
                          "one they were made with (gpt2, most often)")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data.prepare", allow_abbrev=False,
                     description="Turn text into token shards, or check a folder of them.")
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help=f"{', '.join(KINDS)} file, a folder of those, or {STDLIB}")
    parser.add_argument("--out", metavar="DIR", help="new or empty folder, or one that this command left unfinished")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, metavar="NAME",
                        help=f"bytes, bpe:N (N ids, trained on the text), {', '.join(TIKTOKEN_FILES)}, a "
                             f"{TOKENIZER_FILE} or a run folder (default {DEFAULT_TOKENIZER})")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--val-fraction", type=float, default=0.05, metavar="F",
                       help="share of the text set aside for validation (default 0.05)")
    split.add_argument("--val", nargs="+", default=[], metavar="SOURCE", help="validation text instead")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a .jsonl row or parquet column")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard")
    parser.add_argument("--max-seq-len", type=int, metavar="N",
                        help="context of the model, for rows of prompt and response, text and label, or messages")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template for messages (default: a plain one)")
    parser.add_argument("--verify", metavar="DIR", help="check every shard of a folder against its index.json")
    return parser


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.verify is not None:
        _verify(args)
        return
    if args.out is None:
        raise UserError("--out DIR is missing; name the folder for the shards")
    prepare(args.sources, Path(args.out), tokenizer=args.tokenizer, val_fraction=args.val_fraction,
            val_sources=args.val, workers=args.workers, text_field=args.text_field, shard_tokens=args.shard_tokens,
            max_seq_len=args.max_seq_len,
            chat_template=read_template(args.chat_template) if args.chat_template else DEFAULT_TEMPLATE)


def _verify(args: argparse.Namespace) -> None:
    if args.sources or args.out is not None:
        raise UserError("--verify DIR stands alone; leave out SOURCE and --out")
    if not Path(args.verify).is_dir():
        raise UserError(f"--verify {args.verify!r} is no folder; name a folder of shards")
    problems = verify(Path(args.verify), _print_note)
    if problems:
        raise MachineError("; ".join(problems))


if __name__ == "__main__":
    import data.prepare  # workers look for its functions here, and find no __main__

    exit_cleanly(data.prepare.main)
