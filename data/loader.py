"""The order of the data and the batches made from it: a pure function of (seed, step).

Window i of a split is its tokens [i*T, i*T + T], T+1 of them; a short tail is dropped. A keyed permutation per epoch
orders the windows, and batch k (from 0) is the permuted windows k*S .. (k+1)*S - 1, straddling epochs. So there is no
loader state, seeking costs nothing, and the number of processes does not change a batch. Where examples were packed
into rows of T+1 tokens, window i is row i, and the examples in it do not see each other.

Dims: B windows of a micro-batch, T tokens of a window (seq_len), S windows of a step over all ranks.
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.shards import ShardError, TokenStream

FEISTEL_ROUNDS = 8
CHECKED_AT_ONCE = 256  # validation windows
IGNORED = -100  # a target that the loss does not count, as in PyTorch


# ---- The order -------------------------------------------------------------------------------------------------------

def permuted(index: int | np.ndarray, size: int, key: int) -> int | np.ndarray:
    """Where a keyed permutation of range(size) sends index (any shape, each in [0, size)); same shape, int64.

    A generalised Feistel network with cycle-walking (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002):
    the number is split as left * width + right, and each round adds a hash of one half to the other, modulo its width.
    The domain left x right is larger than size by less than one row; whatever lands in the surplus goes round again.
    """
    width = math.isqrt(size - 1) + 1  # ceil(sqrt(size))
    height = -(-size // width)
    digest = hashlib.blake2b(str(key).encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    round_keys = np.frombuffer(digest, dtype="<u8")
    numbers = np.asarray(index, dtype=np.uint64)
    result = _feistel(numbers.reshape(-1), height, width, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], height, width, round_keys)
    result = result.astype(np.int64).reshape(numbers.shape)
    return result if isinstance(index, np.ndarray) else int(result)


def _feistel(numbers: np.ndarray, height: int, width: int, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of range(height * width), on uint64."""
    left, right = np.divmod(numbers, np.uint64(width))
    for left_key, right_key in round_keys.reshape(-1, 2):
        left = (left + _hash(right, left_key)) % np.uint64(height)
        right = (right + _hash(left, right_key)) % np.uint64(width)
    return left * np.uint64(width) + right


def _hash(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """63 well-mixed bits of each number under a key (the finaliser of splitmix64, wrapping at 2^64)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(1)  # a bit to spare, so that adding to it cannot wrap


def epoch_key(seed: int, epoch: int) -> int:
    """The permutation key of an epoch (from 0)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest(), "little")


# ---- Micro-batches ---------------------------------------------------------------------------------------------------

@dataclass
class MicroBatch:
    """One forward and backward pass. targets: the tokens one further on; document_ids rise by 1 at each document."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64; IGNORED where the data's loss mask is 0
    document_ids: Tensor | None  # (B, T) int32, given when document masks are wanted or examples were packed
    first_window: int  # train: place of its first window in the order of the whole run; val: that window's number
    scored: int | None = None  # train: targets that are not IGNORED; None = the data has no loss mask: all of them

    def to(self, device: torch.device) -> "MicroBatch":
        document_ids = None if self.document_ids is None else self.document_ids.to(device)
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device), document_ids=document_ids)


def _read(window_ids: np.ndarray, *, stream: TokenStream, seq_len: int, eot: int | None,
          vocab_size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens, targets, document_ids (B, T) of windows. Raises ShardError for an id from vocab_size on."""
    starts = window_ids * (stream.row_tokens or seq_len)
    windows = stream.windows(starts, seq_len + 1)  # (B, T+1) in the shards' dtype
    if vocab_size is not None and windows.size and windows.max() >= vocab_size:
        raise ShardError(f"{stream.name} holds token {windows.max()} but the tokenizer has {vocab_size} ids; these "
                         "shards were made with another tokenizer: name it in data.tokenizer")
    tokens = torch.from_numpy(windows[:, :-1].astype(np.int64, order="C"))  # (B, T)
    targets = torch.from_numpy(windows[:, 1:].astype(np.int64, order="C"))  # (B, T)
    if "loss" in stream.tracks:
        targets[torch.from_numpy(stream.windows(starts + 1, seq_len, "loss") == 0)] = IGNORED
    document_ids = None
    if "start" in stream.tracks:
        document_ids = torch.from_numpy(stream.windows(starts, seq_len, "start").cumsum(axis=1, dtype=np.int32) - 1)
    elif eot is not None:  # it opens the document behind it, as in sampling a prompt; to the one before it is a target
        document_ids = torch.from_numpy((windows[:, :-1] == eot).cumsum(axis=1, dtype=np.int32))
    return tokens, targets, document_ids


def _check_length(stream: TokenStream, seq_len: int) -> int:
    """Windows in the stream, or ShardError if there is not one or they have another length."""
    if stream.row_tokens is not None:
        if stream.row_tokens != seq_len + 1:
            raise ShardError(f"{stream.name} was packed for a context of {stream.row_tokens - 1} tokens but "
                             f"model.max_seq_len = {seq_len}; set it to {stream.row_tokens - 1}, or prepare the "
                             "examples again (data.source without data.dir)")
        return stream.tokens // stream.row_tokens
    windows = (stream.tokens - 1) // seq_len
    if windows < 1:
        raise ShardError(f"{stream.name} holds {stream.tokens} tokens but one window needs {seq_len + 1}; lower "
                         "model.max_seq_len or prepare more text")
    return windows


class TrainLoader:
    """This rank's share of every batch, of tokens_per_step over all ranks, in micro-batches of micro_batch windows, a
    number that may be set later.

    eot: the end-of-text id if document numbers are wanted; vocab_size: how many ids the tokenizer knows. Others raise
    ShardError: here if the first batch holds one, else when one is met, for reading all of a large data set would hold
    up the start by minutes. So does a stream without a window.
    """

    def __init__(self, stream: TokenStream, *, seq_len: int, tokens_per_step: int, seed: int, micro_batch: int = 1,
                 rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu", eot: int | None = None,
                 vocab_size: int | None = None):
        self.windows_per_epoch = _check_length(stream, seq_len)
        assert tokens_per_step % (seq_len * world_size) == 0, "start.inherit checks it"
        self.stream, self.micro_batch, self.seed, self.device = stream, micro_batch, seed, torch.device(device)
        self.windows_per_step = tokens_per_step // seq_len
        self._first_place = 0  # of batch 0 in the order of the windows
        windows_per_rank = self.windows_per_step // world_size
        self._share = slice(rank * windows_per_rank, (rank + 1) * windows_per_rank)  # of a batch
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._read = partial(_read, stream=stream, seq_len=seq_len, eot=eot, vocab_size=vocab_size)
        self._read(self.window_ids(0)[self._share])

    def go_on_after(self, steps: int, windows: int) -> None:
        """Let batch `steps` begin after so many windows of the order: a fork's parent may have had other batches."""
        self._first_place = windows - steps * self.windows_per_step

    def window_ids(self, step: int) -> np.ndarray:
        """(S,) int64: the windows of batch `step` (from 0), of all ranks, in order."""
        places = np.arange(step * self.windows_per_step, (step + 1) * self.windows_per_step) + self._first_place
        epochs, within = np.divmod(places, self.windows_per_epoch)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            places[inside] = permuted(within[inside], self.windows_per_epoch, epoch_key(self.seed, epoch))
        return places

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's share of batch `step` (from 0) in micro-batches; the last may be short."""
        return self._receive(self._prepare(step))

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[MicroBatch]]:
        """batch(step) for each step of the range, the next one prepared by a thread while the current one is used.

        What the thread raises is raised here. close() on the iterator ends the thread.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
            submitted = (thread.submit(self._prepare, step) for step in range(start_step, stop_step))
            upcoming = next(submitted, None)
            while upcoming is not None:
                prepared, upcoming = upcoming.result(), next(submitted, None)
                yield self._receive(prepared)

    def _prepare(self, step: int) -> tuple[list[MicroBatch], torch.cuda.Event | None]:
        """The share of one step on the device, and on CUDA the event that its copies set when they are done."""
        tensors = self._read(self.window_ids(step)[self._share])
        is_masked = "loss" in self.stream.tracks
        scored = [int((part != IGNORED).sum()) if is_masked else None for part in tensors[1].split(self.micro_batch)]
        arrived = None
        if self._copies is not None:
            with torch.cuda.stream(self._copies):  # sets the device too: a new thread starts on device 0
                tensors = [None if t is None else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
                arrived = self._copies.record_event()
        first = self._first_place + step * self.windows_per_step + self._share.start
        parts = zip(*([None] * len(scored) if t is None else t.split(self.micro_batch) for t in tensors), strict=True)
        return [MicroBatch(*part, first_window=first + i * self.micro_batch, scored=scored[i])
                for i, part in enumerate(parts)], arrived

    def _receive(self, prepared: tuple[list[MicroBatch], torch.cuda.Event | None]) -> list[MicroBatch]:
        """Hand a step's tensors from the copying stream over to the current one."""
        batch, arrived = prepared
        if arrived is None:
            return [micro_batch.to(self.device) for micro_batch in batch]
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        for tensor in (batch[0].tokens, batch[0].targets, batch[0].document_ids):
            if tensor is not None:  # all micro-batches are views of one allocation: marking one marks it whole
                tensor.record_stream(current)  # its memory is not reused before the current stream is done with it
        return batch


class ValLoader:
    """The first eval_tokens of the validation split in order, in windows that do not overlap; at least one window.

    The same windows at any world size. Ranks may get different numbers of micro-batches, even none. Raises ShardError
    if one of them holds an id from vocab_size on, the ids that the tokenizer knows.
    """

    def __init__(self, stream: TokenStream, *, seq_len: int, eval_tokens: int, micro_batch: int = 1,
                 device: str | torch.device = "cpu", eot: int | None = None, vocab_size: int | None = None):
        self.windows = min(_check_length(stream, seq_len), max(1, eval_tokens // seq_len))
        self.stream, self.seq_len, self.micro_batch, self.device = stream, seq_len, micro_batch, torch.device(device)
        self._read = partial(_read, stream=stream, seq_len=seq_len, eot=eot, vocab_size=vocab_size)
        for first in range(0, self.windows, CHECKED_AT_ONCE):
            self._read(np.arange(first, min(first + CHECKED_AT_ONCE, self.windows)))

    def micro_batches(self, rank: int = 0, world_size: int = 1, *, equal: bool = False) -> Iterator[MicroBatch]:
        """This rank's windows, in order. equal: as many micro-batches on every rank; those beyond a rank's own windows
        repeat one, and none of their targets counts."""
        start, stop = rank * self.windows // world_size, (rank + 1) * self.windows // world_size
        most = -(-self.windows // world_size) if equal else stop - start
        for first in range(start, start + most, self.micro_batch):
            ids = np.arange(first, max(first + 1, min(first + self.micro_batch, stop)))
            tokens, targets, document_ids = self._read(np.minimum(ids, self.windows - 1))
            targets[torch.from_numpy(ids >= stop)] = IGNORED
            yield MicroBatch(tokens, targets, document_ids, first_window=first).to(self.device)
