"""Units of sources.py to tokens, in this process or in worker processes, in order."""

import hashlib
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import MachineError
from data.examples import Example, Packing, examples, packed
from data.sources import RowsUnit, Rules, Unit, split_of, texts_of
from data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from data.write_shards import Encoded, dtype_for

UNITS_PER_WORKER = 3  # encoded or waiting at a time
BAD_ROWS_NAMED = 3
ORPHAN_SECONDS = 0.5  # between two looks whether the parent lives


class WorkerDied(MachineError):
    """Of too little memory, or by the signal that was to end us all."""


@dataclass
class EncodedUnit:
    splits: dict[str, Encoded]
    counts: Counter  # invalid_utf8: sequences replaced; bad_rows: left out; separators: end-of-text spelled in the text
    bad_rows: list[tuple[RowsUnit, int]]  # the first few, for row_name()
    digest: bytes  # of what is in the unit


class Encoder:
    """Encodes units; each worker process has one. packing: the units hold examples, not texts."""

    def __init__(self, tokenizer: Tokenizer, rules: Rules, packing: Packing | None = None):
        self.tokenizer, self.rules, self.packing = tokenizer, rules, packing
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.token_bytes = tokenizer.token_bytes()

    def encode(self, unit: Unit) -> EncodedUnit:
        """Tokens by split, and what is to be said of the unit."""
        bad = self.rules.bad_rows()
        splits, counts = self._encode_texts(unit, bad) if self.packing is None else \
            self._encode_examples(unit, self.packing, bad)
        named = [(replace(unit, lines=b""), number) for number in bad[:BAD_ROWS_NAMED]] if bad else []
        return EncodedUnit(splits, counts + Counter(bad_rows=len(bad or ())), named, self.digest(unit))

    def digest(self, unit: Unit) -> bytes:
        """A hash of what is in a unit and how it is split: where it is the same, so is what encode() makes of it."""
        digest = hashlib.blake2b(f"{unit.split} {unit.ends}".encode(), digest_size=16)
        if isinstance(unit, RowsUnit) and unit.group is None:
            digest.update(unit.content())
            return digest.digest()
        bad: list[int] = []
        for text, _ in texts_of(unit, self.rules.text_field, bad):
            data = text.encode()
            digest.update(b"%d " % len(data) + data)
        digest.update(b"%d" % len(bad))
        return digest.digest()

    def _encode_texts(self, unit: Unit, bad: list[int] | None) -> tuple[dict[str, Encoded], Counter]:
        tokens: dict[str, list[np.ndarray]] = {}
        text_bytes, documents, counts = Counter(), Counter(), Counter()
        separator = separator_of(self.tokenizer.eot_token)
        for text, invalid in texts_of(unit, self.rules.text_field, bad):
            split = unit.split or split_of([text], self.rules.val_fraction)
            parts = separator.split(text)
            counts += Counter(invalid_utf8=invalid, separators=len(parts) - 1)
            for number, part in enumerate(parts if self.rules.parse_special else [text]):
                if not part:
                    continue
                tokens.setdefault(split, []).append(self.tokenizer.encode(part).astype(self.dtype))
                if unit.ends or (self.rules.parse_special and number < len(parts) - 1):
                    tokens[split].append(np.array([self.tokenizer.eot], dtype=self.dtype))
                    documents[split] += 1
                text_bytes[split] += len(part) if part.isascii() else len(part.encode())
        return {split: Encoded(np.concatenate(parts), text_bytes[split], documents[split])
                for split, parts in tokens.items()}, counts

    def _encode_examples(self, unit: Unit, packing: Packing,
                         bad: list[int] | None) -> tuple[dict[str, Encoded], Counter]:
        found: dict[str, list[Example]] = {}
        dropped, counts = Counter(), Counter()
        for example, invalid in examples(unit, packing, self.tokenizer, bad):
            if example is None:
                dropped[unit.split or "train"] += 1
            else:
                found.setdefault(unit.split or split_of([example.text], self.rules.val_fraction), []).append(example)
            counts["invalid_utf8"] += invalid
        encoded = {}
        for split in (*found, *(dropped.keys() - found.keys())):
            members = found.get(split, [])
            tokens, loss, start = packed(members, packing.row_tokens, self.tokenizer.eot)
            lengths = [len(example.ids) + example.cut for example in members]
            ends = {"shortest": min(lengths), "longest": max(lengths)} if members else {}
            encoded[split] = Encoded(
                tokens.astype(self.dtype).reshape(-1), int(self.token_bytes[tokens].sum()), len(members),
                {"loss": loss.reshape(-1), "start": start.reshape(-1)},
                {"examples": len(members), "tokens": sum(len(example.ids) for example in members),
                 "response_tokens": sum(int(example.scored.sum()) for example in members), **ends,
                 "truncated": sum(example.cut > 0 for example in members), "dropped": dropped[split],
                 "cut_tokens": sum(example.cut for example in members)})
        return encoded, counts


def separator_of(eot_token: str) -> re.Pattern:
    """End-of-text as a text may spell it: the tokenizer's, and the one that most collections use."""
    return re.compile("|".join(re.escape(token) for token in sorted({END_OF_TEXT, eot_token})))


_encoder: Encoder | None = None  # of a worker process


def _start_worker(parent: int, tokenizer_file: Path | None, *settings: Rules | Packing | None) -> None:
    global _encoder
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # with it a pool ends the others when one has died
    end_with(parent)  # a pool that was killed cannot tell its workers, and they hold each other's end of its pipe
    if tokenizer_file is not None:
        _encoder = Encoder(load_tokenizer(tokenizer_file), *settings)


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended."""
    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode_in_worker(unit: Unit) -> EncodedUnit:
    return _encoder.encode(unit)


@contextmanager
def worker_pool(workers: int, tokenizer_file: Path | None = None,
                *settings: Rules | Packing | None) -> Iterator:
    """A pool of processes, with an Encoder each if there is a tokenizer; killed if the block ends by an exception."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    # Processes inherit blocked signals: a stop reaches this one alone, which ends the workers in order, and not while
    # it starts them. SIGINT and SIGTERM come second, for multiprocessing unblocks them when it starts its resource
    # tracker, which ignores them anyway.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGHUP])
    arguments = (os.getpid(), tokenizer_file, *settings)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    finished = False
    try:
        for _ in range(workers):
            pool.submit(int)  # anything: a process starts
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        yield pool
        finished = True
    except BrokenProcessPool:
        raise WorkerDied("a worker process died (out of memory? It takes less with fewer --workers)") from None
    finally:
        for child in () if finished else multiprocessing.active_children():
            child.kill()  # it may have minutes of work before it
        pool.shutdown(cancel_futures=True)


def encode_units(units: Iterator[Unit], encoder: Encoder, workers: int, tokenizer_file: Path) \
        -> Iterator[tuple[int, EncodedUnit]]:
    """(source bytes, what became of it) of each unit, in order; workers = 0: in this process."""
    if not workers:
        for unit in units:
            yield unit.bytes, encoder.encode(unit)
        return
    pending = deque()
    with worker_pool(workers, tokenizer_file, encoder.rules, encoder.packing) as pool:
        for unit in units:
            pending.append((unit.bytes, pool.submit(_encode_in_worker, unit)))
            if len(pending) >= UNITS_PER_WORKER * workers:
                size, future = pending.popleft()
                yield size, future.result()
        for size, future in pending:
            yield size, future.result()
