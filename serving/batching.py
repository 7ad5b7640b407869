"""Many requests, one batch: rows join and leave it between two decoding steps.

Batch holds the model's state and is driven step by step; Batcher is the thread that drives it, with a bounded queue in
front. A row's tokens do not depend on the rows beside it (but for the rounding of batched matmuls): it has its own
random numbers, and in the cache it sees its own slots only. Nothing here knows HTTP.

Dims: B rows of the batch, T tokens of the longest prompt, V vocabulary.
"""

import collections
import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import sample
from config import MachineError, ModelConfig
from data.tokenizer import Tokenizer
from model import GPT, KVCache
from sample import Sampling, TextStream

PREFILL_TOKENS = 4096  # read at most this many prompt tokens, padding included, between two steps of the running rows
SCORED_LOGITS = 2 ** 24  # of prompt tokens at a time: 64 MiB in float32


@dataclass(frozen=True, eq=False)
class Row:
    """One text to generate, or (max_new_tokens = 0) one prompt to score. deliver receives its parts, in order."""

    prompt: list[int]  # 1 to max_seq_len tokens
    max_new_tokens: int  # at most max_seq_len - len(prompt) + 1: the last token is not read again
    deliver: Callable[["Part"], None]
    sampling: Sampling = Sampling()
    number: int = 0  # among the rows of one seed, as in sample.generate
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the text has
    frequency_penalty: float = 0.0  # the same, times their count
    logit_bias: dict[int, float] = field(default_factory=dict)  # token -> added to its logit
    top_logprobs: int | None = None  # this many likeliest tokens beside each token; None = no logprobs at all
    scores_prompt: bool = False
    deadline: float = math.inf  # time.monotonic() at which the text ends, whatever its length


@dataclass(frozen=True)
class Scored:
    """A token with the model's own log probabilities: before temperature, filters, penalties and biases."""

    token: int
    offset: int  # characters of the row's text before it
    logprob: float | None = None  # nats; None for a prompt's first token, and if nobody asked
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the likeliest, best first


@dataclass(frozen=True)
class Part:
    """What one step made certain of a row."""

    text: str = ""
    tokens: tuple[Scored, ...] = ()  # new tokens that begin in the text delivered so far
    made: int = 0  # new tokens so far, end-of-text and those of a stop text included
    finish: str | None = None  # in the last part: "stop", "length", "error" or, before it began, "dropped"
    error: str = ""
    prompt: tuple[Scored, ...] = ()  # in the first part, if scores_prompt; offsets are 0


class QueueFull(Exception):
    """More rows wait than the queue holds."""


class Closed(Exception):
    """The batcher takes no more rows."""


Parts = list[tuple[Row, Part]]


# ----------------------------------------------------------------------------------------------------------------------
# The cache

class BatchCache(KVCache):
    """A KVCache whose rows come and go: its first len(starts) rows are in use, right-aligned at `length`.

    Moving a row to other slots changes nothing for it: keys are stored rotated to its positions, which count from its
    first slot. Slots before it hold nothing but finite numbers: attention gives them the weight 0, and 0 x NaN is NaN.
    """

    def __init__(self, config: ModelConfig, *, batch: int, dtype: torch.dtype, device: torch.device):
        # empty, not zeros: on the CPU memory that no row has reached then costs nothing
        shape = (batch, config.kv_heads, config.max_seq_len, config.dim_per_head)  # see KVCache
        self.keys, self.values = ([torch.empty(shape, dtype=dtype, device=device).transpose(1, 2)
                                   for _ in range(config.n_layer)] for _ in range(2))
        self.slots = config.max_seq_len
        self.starts: list[int] = []  # first slot of each row
        self.padding, self.length = None, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows, end = len(self.starts), self.length + k.shape[1]
        keys, values = self.keys[layer][:rows], self.values[layer][:rows]
        keys[:, self.length:end] = k
        values[:, self.length:end] = v
        return keys[:, :end], values[:, :end]

    @torch.inference_mode()
    def join(self, other: KVCache, row: int) -> None:
        """Take over a row of another cache, as the last one."""
        first = 0 if other.padding is None else int(other.padding[row])
        count = other.length - first
        self._move(max(0, count - self.length))
        new = len(self.starts)
        self.starts.append(self.length - count)
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
            mine[new, :self.length - count] = 0.0
            mine[new, self.length - count:self.length] = theirs[row, first:other.length]
        self._set_padding()

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        start = self.starts.pop()
        if row < len(self.starts):
            for buffer in self.keys + self.values:
                buffer[row, :self.length] = buffer[len(self.starts), :self.length]
            self.starts[row] = start
        if not self.starts:
            self.length = 0
        self._set_padding()

    def clear(self) -> None:
        self.starts, self.padding, self.length = [], None, 0

    @torch.inference_mode()
    def make_room(self) -> None:
        """Drop the slots that every row skips, once there is no other room or they are half of what attention reads."""
        unused = min(self.starts)
        if self.length == self.slots or unused > self.length // 2:
            self._move(-unused)
            self._set_padding()

    def _move(self, by: int) -> None:
        """All rows by that many slots, to the right if positive."""
        if by == 0:
            return
        rows, first = len(self.starts), min(self.starts, default=self.length)
        for buffer in self.keys + self.values:
            buffer[:rows, first + by:self.length + by] = buffer[:rows, first:self.length].clone()
            buffer[:rows, first:first + by] = 0.0  # slots that became free, if it was to the right
        self.starts = [start + by for start in self.starts]
        self.length += by

    def _set_padding(self) -> None:
        self.padding = torch.tensor(self.starts, device=self.keys[0].device) if any(self.starts) else None


# ----------------------------------------------------------------------------------------------------------------------
# The batch

class _Running:
    """A row in the batch: what it has made so far."""

    def __init__(self, row: Row, tokenizer: Tokenizer):
        self.row = row
        self.generator = sample.row_generator(row.sampling.seed, row.number)
        self.last_token = -1  # made, not read yet
        self.made = 0
        self._stream = TextStream(tokenizer, row.prompt, row.stop)
        self._out = 0  # characters delivered
        self._held: list[Scored] = []  # tokens that begin beyond them
        self._counts: dict[int, int] = {}  # of new tokens, if a penalty needs them

    def changes_logits(self) -> bool:
        return bool(self.row.presence_penalty or self.row.frequency_penalty or self.row.logit_bias)

    def adjust(self, logits: Tensor) -> None:
        """Penalties and biases onto the logits (V,), in place."""
        added = dict(self.row.logit_bias)
        for token, count in self._counts.items():
            penalty = self.row.presence_penalty + self.row.frequency_penalty * count
            added[token] = added.get(token, 0.0) - penalty
        if added:
            tokens = torch.tensor(list(added), device=logits.device)
            logits.index_add_(0, tokens, torch.tensor(list(added.values()), device=logits.device))

    def add(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...], is_late: bool) -> Part:
        """What one more token makes certain; is_late ends the text whatever its length."""
        self.made += 1
        self.last_token = token
        if self.changes_logits():
            self._counts[token] = self._counts.get(token, 0) + 1
        self._held.append(Scored(token, self._stream.decoded, logprob, top))
        is_end, is_last = token in self.row.stop_tokens, self.made >= self.row.max_new_tokens or is_late
        text = "" if is_end else self._stream.add(token)
        if (is_end or is_last) and not self._stream.stopped:
            text += self._stream.end()
        finish = "stop" if is_end or self._stream.stopped else "length" if is_last else None
        return Part(text, self._release(text, finish), self.made, finish)

    def end(self) -> Part:
        """The part that ends the text here."""
        text = self._stream.end()
        finish = "stop" if self._stream.stopped else "length"
        return Part(text, self._release(text, finish), self.made, finish)

    def _release(self, text: str, finish: str | None) -> tuple[Scored, ...]:
        """The held tokens that begin in the text so far; at the end all but those of a stop text, which are dropped."""
        self._out += len(text)
        takes_all = finish is not None and not self._stream.stopped
        out = [scored for scored in self._held if takes_all or scored.offset < self._out]
        self._held = self._held[len(out):]
        return tuple(out)


class Batch:
    """Rows that are generated together, at most max_rows. Driven by one thread: join(), step(), drop()."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, max_rows: int):
        """Raises MachineError if the cache does not fit into memory."""
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.running: list[_Running] = []
        device = model.wte.weight.device
        try:
            self._cache = BatchCache(model.config, batch=max_rows, dtype=sample.cache_dtype(model), device=device)
        except RuntimeError as error:  # OutOfMemoryError is one
            raise MachineError(f"the cache of {max_rows} rows does not fit into the memory of {device.type} "
                               f"({str(error).splitlines()[0]}); lower --batch-size") from None

    def join(self, rows: list[Row]) -> Parts:
        """Read the prompts, and make their first tokens."""
        hidden, cache = sample.prefill(self.model, [row.prompt for row in rows], new_tokens=0)
        prompts = [self._score_prompt(row, h) for row, h in zip(rows, hidden, strict=True)]
        parts = [(row, Part(prompt=prompt, finish="length" if row.max_new_tokens == 0 else None))
                 for row, prompt in zip(rows, prompts, strict=True) if row.scores_prompt or row.max_new_tokens == 0]
        starting = [number for number, row in enumerate(rows) if row.max_new_tokens > 0]
        if starting:
            running = [_Running(rows[number], self.tokenizer) for number in starting]
            first = self._advance(running, sample.last_logits(self.model, hidden[starting]))
            parts += first
            for number, one, (_, part) in zip(starting, running, first, strict=True):
                if part.finish is None:
                    self._cache.join(cache, number)
                    self.running.append(one)
        return parts

    def step(self) -> Parts:
        """One more token of every running row."""
        self._cache.make_room()
        logits = sample.decode(self.model, self._cache, [one.last_token for one in self.running])
        parts = self._advance(self.running, logits)
        self._remove({number for number, (_, part) in enumerate(parts) if part.finish is not None})
        return parts

    def end(self, rows: set[Row]) -> Parts:
        """End the texts of these rows here, of those that are running."""
        ended = {number for number, one in enumerate(self.running) if one.row in rows}
        parts = [(self.running[number].row, self.running[number].end()) for number in sorted(ended)]
        self._remove(ended)
        return parts

    def clear(self) -> None:
        """Forget all rows, also after a step that failed half-way."""
        self.running.clear()
        self._cache.clear()

    def _remove(self, numbers: set[int]) -> None:
        for number in sorted(numbers, reverse=True):  # from the end, so that the row that moves up stays
            self._cache.leave(number)
            self.running[number] = self.running[-1]
            self.running.pop()

    @torch.inference_mode()
    def _advance(self, running: list[_Running], logits: Tensor) -> Parts:
        """Choose a token of each row from its logits (B, V), which may be overwritten."""
        asking = [number for number, one in enumerate(running) if one.row.top_logprobs is not None]
        own = logits[asking].log_softmax(dim=-1)  # before anything is added to the logits
        tokens = self._pick(running, logits)
        tops = [running[number].row.top_logprobs for number in asking]
        scores = dict(zip(asking, score(own, tokens[asking], tops), strict=True))
        now, parts = time.monotonic(), []
        for number, (one, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            if token < 0:
                part = Part(made=one.made, finish="error", error=sample.NOT_FINITE)
            else:
                logprob, top = scores.get(number, (None, ()))
                part = one.add(token, logprob, top, is_late=now >= one.row.deadline)
            parts.append((one.row, part))
        return parts

    def _pick(self, running: list[_Running], logits: Tensor) -> Tensor:
        """A token per row (B,), -1 where its logits are not finite; rows of equal settings are picked together."""
        alike: dict[Sampling, list[int]] = {}
        for number, one in enumerate(running):
            if one.changes_logits():
                one.adjust(logits[number])
            alike.setdefault(replace(one.row.sampling, seed=0), []).append(number)
        tokens = torch.empty(len(running), dtype=torch.long, device=logits.device)
        for sampling, numbers in alike.items():
            generators = [running[number].generator for number in numbers]
            rows = logits if len(numbers) == len(running) else logits[numbers]
            tokens[numbers] = sample.pick(rows, sampling, generators)
        return tokens

    @torch.inference_mode()
    def _score_prompt(self, row: Row, hidden: Tensor) -> tuple[Scored, ...]:
        """The prompt's tokens, each scored from what precedes it. hidden (T, C) of the padded prompt."""
        if not row.scores_prompt:
            return ()
        scored = [Scored(row.prompt[0], 0)]
        hidden = hidden[-len(row.prompt):-1]  # (n - 1, C): each predicts the token after it
        following = torch.tensor(row.prompt[1:], device=hidden.device)
        chunk = max(1, SCORED_LOGITS // self.model.config.vocab_size)
        for h, tokens in zip(hidden.split(chunk), following.split(chunk), strict=True):
            logprobs = self.model.logits(h).log_softmax(dim=-1)
            scores = score(logprobs, tokens, [row.top_logprobs or 0] * len(tokens))
            scored += [Scored(token, 0, *one) for token, one in zip(tokens.tolist(), scores, strict=True)]
        return tuple(scored)


def score(logprobs: Tensor, tokens: Tensor, tops: list[int]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each row of logprobs (n, V) that of its token (n,), and its tops[row] likeliest (token, logprob)."""
    if not tops:
        return []
    own = logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(tops), logprobs.shape[1]), dim=-1)
    return [(logprob, tuple(zip(row_ids[:k], row_values[:k], strict=True)))
            for logprob, row_ids, row_values, k in zip(own, ids.tolist(), values.tolist(), tops, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# The thread

class Batcher:
    """A thread that feeds a Batch from a bounded queue, first come, first served.

    deliver receives, in that thread and after every step, the parts that the step made.
    """

    def __init__(self, batch: Batch, deliver: Callable[[Parts], None], *, max_waiting: int):
        self.batch, self.max_waiting = batch, max_waiting
        self._deliver = deliver
        self._waiting: collections.deque[Row] = collections.deque()
        self._cancelled: set[Row] = set()
        self._closes_at: float | None = None  # time.monotonic() from which nothing runs any more
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_closing(self) -> bool:
        return self._closes_at is not None

    def submit(self, rows: list[Row]) -> None:
        """Queue the rows of one request, all or none. Raises QueueFull or Closed."""
        with self._changed:
            if self.is_closing:
                raise Closed
            if len(self._waiting) + len(rows) > self.max_waiting:
                raise QueueFull
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: list[Row]) -> None:
        """Nobody listens to these rows any more."""
        with self._changed:
            self._cancelled.update(rows)
            self._changed.notify()

    def close(self, grace_s: float) -> None:
        """Take no more rows, drop those that wait, and end those that run after grace_s at the latest. Returns at once;
        join() waits."""
        with self._changed:
            self._closes_at = time.monotonic() + grace_s
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (arriving := self._arriving()) is not None:
            parts = self._end_what_must(arriving)
            try:
                if arriving:
                    parts += self.batch.join(arriving)
                if self.batch.running:
                    parts += self.batch.step()
            except Exception as error:  # whatever it is, this thread must live on, or every later request would hang
                with contextlib.suppress(OSError):  # nobody may read stderr any more
                    traceback.print_exc()
                ended = {row for row, part in parts if part.finish is not None}
                failed = {*arriving, *(one.row for one in self.batch.running)} - ended
                self.batch.clear()
                parts += [(row, Part(finish="error", error=f"the model failed ({type(error).__name__})"))
                          for row in failed]
            self._deliver(parts)

    def _arriving(self) -> list[Row] | None:
        """Rows to join now, perhaps none, as soon as there is something to do; None = the end."""
        with self._changed:
            while not (self._waiting or self.batch.running or self.is_closing):
                self._cancelled.clear()
                self._changed.wait()
            now = time.monotonic()
            dropped = [(row, self._dropped(row)) for row in self._waiting
                       if row in self._cancelled or self.is_closing or row.deadline <= now]
            for row, _ in dropped:
                self._waiting.remove(row)
            arriving: list[Row] = []
            while self._waiting and self._fits(arriving, self._waiting[0]):
                arriving.append(self._waiting.popleft())
        if dropped:
            self._deliver(dropped)
        return arriving if arriving or self.batch.running or not self.is_closing else None

    def _fits(self, arriving: list[Row], row: Row) -> bool:
        """Whether the row may be read with those that arrive already."""
        if len(self.batch.running) + len(arriving) >= self.batch.max_rows:
            return False
        longest = max(len(other.prompt) for other in [*arriving, row])
        return not arriving or longest * (len(arriving) + 1) <= PREFILL_TOKENS

    def _dropped(self, row: Row) -> Part:
        why = "the server is shutting down" if self.is_closing else "the request waited for too long; try again later"
        return Part(finish="dropped", error=why)

    def _end_what_must(self, arriving: list[Row]) -> Parts:
        """End what nobody waits for, and at the end of the grace everything."""
        with self._changed:
            is_over = self._closes_at is not None and time.monotonic() >= self._closes_at
            rows = {one.row for one in self.batch.running if is_over or one.row in self._cancelled}
            self._cancelled &= set(arriving)  # they run at the next step
        return self.batch.end(rows)
