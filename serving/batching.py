"""Many requests, one batch: rows join and leave it between two decoding steps.

Batch holds the model's state and is driven step by step; Batcher is the thread that drives it, with a bounded queue in
front. A row's tokens do not depend on the rows beside it (but for the rounding of batched matmuls): it has its own
random numbers, and in the cache it sees its own slots only. A row that cannot go on, whatever the cause, ends alone.
Nothing here knows HTTP.

Dims: B rows of the batch, T tokens of the longest prompt, C width, V vocabulary.
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
    repetition_penalty: float = 1.0  # before those: logits of tokens that prompt and text have, / it if > 0, else * it
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


# ---- The cache -------------------------------------------------------------------------------------------------------

class BatchCache(KVCache):
    """A KVCache whose rows come and go: its first len(starts) rows are in use, right-aligned at `length`.

    Moving a row to other slots changes nothing for it: keys are stored rotated to its positions, which count from its
    first slot. Slots before it hold nothing but finite numbers: attention gives them the weight 0, and 0 x NaN is NaN.
    """

    def __init__(self, config: ModelConfig, *, batch: int, dtype: torch.dtype, device: torch.device):
        # empty, not zeros: on the CPU memory that no row has reached then costs nothing
        shape = (batch, config.kv_heads, config.max_seq_len, config.dim_per_head)  # see KVCache
        self._buffers = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2)
                         for _ in range(2 * config.n_layer)]  # keys of each layer, then values
        self.slots = config.max_seq_len
        self.clear()

    def clear(self) -> None:
        self.starts: list[int] = []  # first slot of each row
        self.length = 0
        self._show_rows()

    def join(self, other: KVCache, row: int) -> None:
        """Take over a row of another cache, as the last one."""
        first = 0 if other.padding is None else int(other.padding[row])
        count = other.length - first
        if count > self.length:
            self._move(count - self.length)
        new, start = len(self.starts), self.length - count
        for mine, theirs in zip(self._buffers, other.keys + other.values, strict=True):
            mine[new, :start] = 0.0
            mine[new, start:self.length] = theirs[row, first:other.length]
        self.starts.append(start)
        self._show_rows()

    def leave(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        start = self.starts.pop()
        if row < len(self.starts):
            for buffer in self._buffers:
                buffer[row, :self.length] = buffer[len(self.starts), :self.length]
            self.starts[row] = start
        if not self.starts:
            self.length = 0
        self._show_rows()

    def make_room(self) -> None:
        """Drop the slots that every row skips, once there is no other room or they are half of what attention reads."""
        unused = min(self.starts)
        if unused > 0 and (self.length == self.slots or unused > self.length // 2):
            self._move(-unused)
            self._show_rows()

    def _move(self, by: int) -> None:
        """All rows by that many slots, to the right if positive."""
        rows, first = len(self.starts), min(self.starts, default=self.length)
        for buffer in self._buffers:
            buffer[:rows, first + by:self.length + by] = buffer[:rows, first:self.length].clone()
            buffer[:rows, first:first + by] = 0.0  # slots that became free, if it was to the right
        self.starts = [start + by for start in self.starts]
        self.length += by

    def _show_rows(self) -> None:
        """Set what the model reads: the rows in use, and where they start."""
        rows, layers = [buffer[:len(self.starts)] for buffer in self._buffers], len(self._buffers) // 2
        self.keys, self.values = rows[:layers], rows[layers:]
        self.padding = torch.tensor(self.starts, device=rows[0].device) if any(self.starts) else None


# ---- The batch -------------------------------------------------------------------------------------------------------

class _Running:
    """A row in the batch: what it has made so far."""

    def __init__(self, row: Row, tokenizer: Tokenizer):
        self.row = row
        self.generator = sample.row_generator(row.sampling.seed, row.number)
        self.deadline = row.deadline  # from then on the next token is the last
        self.changes_logits = bool(row.presence_penalty or row.frequency_penalty or row.logit_bias
                                   or row.repetition_penalty != 1.0)
        self._prompt = frozenset(row.prompt)
        self.last_token = -1  # made, not read yet
        self.made = 0
        self._stream = TextStream(tokenizer, row.prompt, row.stop, row.stop_tokens)
        self._out = 0  # characters delivered
        self._held: list[Scored] = []  # tokens that begin beyond them
        self._counts: collections.Counter[int] = collections.Counter()  # of new tokens, if a penalty needs them

    def adjust(self, logits: Tensor) -> None:
        """Penalties and biases onto the logits (V,), in place. Repetition: CTRL, arXiv:1909.05858, section 4.1, with
        transformers' product for logits below 0."""
        penalty = self.row.repetition_penalty
        if penalty != 1.0:
            tokens = torch.tensor(list(self._prompt | self._counts.keys()), device=logits.device)
            own = logits[tokens]
            logits[tokens] = torch.where(own > 0, own / penalty, own * penalty)
        added = dict(self.row.logit_bias)
        for token, count in self._counts.items():
            added[token] = added.get(token, 0.0) - (self.row.presence_penalty + self.row.frequency_penalty * count)
        if added:
            tokens = torch.tensor(list(added), device=logits.device)
            logits.index_add_(0, tokens, torch.tensor(list(added.values()), device=logits.device))

    def rewind(self) -> None:
        """The random numbers as they were before the step that failed: a token took one, a greedy one none."""
        self.generator = sample.row_generator(self.row.sampling.seed, self.row.number)
        if self.row.sampling.temperature > 0.0:
            for _ in range(self.made):
                torch.rand((), generator=self.generator, dtype=torch.float64)

    def add(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> Part:
        """What one more token makes certain."""
        self.made += 1
        self.last_token = token
        if self.changes_logits:
            self._counts[token] += 1
        self._held.append(Scored(token, self._stream.decoded, logprob, top))
        is_last = self.made >= self.row.max_new_tokens or time.monotonic() >= self.deadline
        text = self._stream.add(token, is_last=is_last)
        # Tokens are told that begin in the text so far; at its end all others too, but for those of a stop text.
        self._out += len(text)
        takes_all = self._stream.finish is not None and not self._stream.stopped
        out = tuple(scored for scored in self._held if takes_all or scored.offset < self._out)
        self._held = self._held[len(out):]
        return Part(text, out, self.made, self._stream.finish)


class Batch:
    """Rows that are generated together, at most max_rows. Driven by one thread: join(), step()."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, max_rows: int):
        """Raises MachineError if the cache does not fit into memory."""
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.running: list[_Running] = []
        self.is_lost = False  # the device answers nothing more: a CUDA error that lasts as long as the process
        device = model.wte.weight.device
        try:
            self._cache = BatchCache(model.config, batch=max_rows, dtype=sample.cache_dtype(model), device=device)
        except RuntimeError as error:  # OutOfMemoryError is one
            raise MachineError(f"the cache of {max_rows} rows does not fit into the memory of {device.type} "
                               f"({str(error).splitlines()[0]}); lower --batch-size") from None

    @torch.inference_mode()
    def join(self, rows: list[Row]) -> Parts:
        """Read the prompts, and make their first tokens."""
        try:
            hidden, cache = sample.prefill(self.model, [row.prompt for row in rows], new_tokens=0)
            logits = self.model.logits(hidden[:, -1])
        except Exception as error:
            if len(rows) == 1:
                return [self._failed(rows[0], error)]
            return [part for row in rows for part in self.join([row])]
        parts, starting, running = [], [], []
        for number, (row, h) in enumerate(zip(rows, hidden, strict=True)):
            try:
                if row.scores_prompt or row.max_new_tokens == 0:
                    scored = self._score_prompt(row, h) if row.scores_prompt else ()
                    parts.append((row, Part(prompt=scored, finish=None if row.max_new_tokens else "length")))
                if row.max_new_tokens > 0:
                    running.append(_Running(row, self.tokenizer))
                    starting.append(number)
            except Exception as error:
                parts.append(self._failed(row, error))
        if starting:
            first = self._advance(running, logits[starting])
            parts += first
            for number, one, (_, part) in zip(starting, running, first, strict=True):
                if part.finish is None:
                    self._cache.join(cache, number)
                    self.running.append(one)
        return parts

    @torch.inference_mode()
    def step(self) -> Parts:
        """One more token of every running row."""
        self._cache.make_room()
        logits = sample.decode(self.model, self._cache, [one.last_token for one in self.running])
        parts = self._advance(self.running, logits)
        for number in reversed(range(len(parts))):  # from the end, so that the row that moves up stays
            if parts[number][1].finish is not None:
                self._cache.leave(number)
                self.running[number] = self.running[-1]
                self.running.pop()
        return parts

    def clear(self) -> None:
        """Forget all rows, also after a step that failed half-way."""
        self.running.clear()
        self._cache.clear()

    def _advance(self, running: list[_Running], logits: Tensor) -> Parts:
        """Choose a token of each row from its logits (B, V). Where that fails, rows choose one by one."""
        try:
            chosen = self._choose(running, logits)
        except Exception as error:
            for one in running:
                one.rewind()
            if len(running) == 1:
                return [self._failed(running[0].row, error, running[0].made)]
            return [part for number, one in enumerate(running)
                    for part in self._advance([one], logits[number:number + 1])]
        parts = []
        for one, (token, *scored) in zip(running, chosen, strict=True):
            try:
                if token < 0:
                    raise FloatingPointError(sample.NOT_FINITE)
                parts.append((one.row, one.add(token, *scored)))
            except Exception as error:
                parts.append(self._failed(one.row, error, one.made))
        return parts

    def _failed(self, row: Row, error: Exception, made: int = 0) -> tuple[Row, Part]:
        """The last part of a row that cannot go on; what was no fault of the numbers is told in the log."""
        if isinstance(error, FloatingPointError):
            return row, Part(made=made, finish="error", error=str(error))
        return row, Part(made=made, finish="error", error=self.told(error))

    def told(self, error: Exception) -> str:
        """What clients hear of an error of the model, which the log tells in full."""
        self.is_lost |= isinstance(error, torch.AcceleratorError)
        with contextlib.suppress(OSError):  # nobody may read stderr any more
            traceback.print_exception(error)
        return f"the model failed ({type(error).__name__})"

    def _choose(self, running: list[_Running], logits: Tensor) -> list[tuple]:
        """Each row's token, -1 if there is none, its logprob and the likeliest tokens, see Scored."""
        asking = [number for number, one in enumerate(running) if one.row.top_logprobs is not None]
        own = logits[asking].log_softmax(dim=-1)  # before anything is added to the logits
        tokens = self._pick(running, logits)
        tops = [running[number].row.top_logprobs for number in asking]
        scores = dict(zip(asking, score(own, tokens[asking], tops), strict=True))
        return [(token, *scores.get(number, (None, ()))) for number, token in enumerate(tokens.tolist())]

    def _pick(self, running: list[_Running], logits: Tensor) -> Tensor:
        """A token per row (B,), -1 where its logits are not finite; rows of equal settings are picked together."""
        alike: dict[Sampling, list[int]] = {}
        if any(one.changes_logits for one in running):
            logits = logits.clone()
        for number, one in enumerate(running):
            if one.changes_logits:
                one.adjust(logits[number])
            alike.setdefault(replace(one.row.sampling, seed=0), []).append(number)
        tokens = torch.empty(len(running), dtype=torch.long, device=logits.device)
        for sampling, numbers in alike.items():
            rows = logits if len(numbers) == len(running) else logits[numbers]
            tokens[numbers] = sample.pick(rows, sampling, [running[number].generator for number in numbers])
        return tokens

    def _score_prompt(self, row: Row, hidden: Tensor) -> tuple[Scored, ...]:
        """The prompt's tokens, each scored from what precedes it. hidden (T, C) of the padded prompt."""
        scored = [Scored(row.prompt[0], 0)]
        hidden = hidden[-len(row.prompt):-1]  # (n - 1, C): each predicts the token after it
        following = torch.tensor(row.prompt[1:], device=hidden.device)
        chunk = max(1, SCORED_LOGITS // self.model.config.vocab_size)
        for h, tokens in zip(hidden.split(chunk), following.split(chunk), strict=True):
            logprobs = self.model.logits(h).log_softmax(dim=-1)
            each = score(logprobs, tokens, [row.top_logprobs or 0] * len(tokens))
            scored += [Scored(token, 0, *one) for token, one in zip(tokens.tolist(), each, strict=True)]
        if any(math.isnan(one.logprob) for one in scored[1:]):
            raise FloatingPointError(sample.NOT_FINITE)
        return tuple(scored)


def score(logprobs: Tensor, tokens: Tensor, tops: list[int]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each row of logprobs (n, V) that of its token (n,), and its tops[row] likeliest (token, logprob)."""
    if not tops:
        return []
    own = logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(tops), logprobs.shape[1]), dim=-1)
    return [(logprob, tuple(zip(row_ids[:k], row_values[:k], strict=True)))
            for logprob, row_ids, row_values, k in zip(own, ids.tolist(), values.tolist(), tops, strict=True)]


# ---- The thread ------------------------------------------------------------------------------------------------------

class Batcher:
    """A thread that feeds a Batch from a bounded queue, first come, first served.

    deliver receives, in that thread and after every step, the parts that the step made.
    """

    def __init__(self, batch: Batch, deliver: Callable[[Parts], None], *, max_waiting: int):
        self.batch, self.max_waiting = batch, max_waiting
        self._deliver = deliver
        self.waiting: collections.deque[Row] = collections.deque()
        self._cancelled: set[Row] = set()
        self._closes_at = math.inf  # time.monotonic() from which nothing runs any more
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def is_closing(self) -> bool:
        return self._closes_at < math.inf

    def submit(self, rows: list[Row]) -> None:
        """Queue the rows of one request, all or none. Raises QueueFull or Closed."""
        with self._changed:
            if self.is_closing:
                raise Closed
            if len(self.waiting) + len(rows) > self.max_waiting:
                raise QueueFull
            self.waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: list[Row]) -> None:
        """Nobody listens to these rows any more."""
        with self._changed:
            self._cancelled.update(rows)
            self._changed.notify()

    def close(self, grace_s: float) -> None:
        """Take no more rows, drop those that wait, end those that run after grace_s at the latest. join() waits."""
        with self._changed:
            self._closes_at = time.monotonic() + grace_s
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (arriving := self._arriving()) is not None:
            parts: Parts = []
            try:
                if arriving:
                    parts += self.batch.join(arriving)
                if self.batch.running:
                    parts += self.batch.step()
            except Exception as error:  # whatever it is, this thread must live on, or every later request would hang
                told = self.batch.told(error)
                ended = {row for row, part in parts if part.finish is not None}
                failed = {*arriving, *(one.row for one in self.batch.running)} - ended
                self.batch.clear()
                parts += [(row, Part(finish="error", error=told)) for row in failed]
            self._deliver(parts)

    def _arriving(self) -> list[Row] | None:
        """Rows to join now, perhaps none, as soon as there is something to do; None = the end. What need not go on is
        dropped if it has not begun, else it gets one more token."""
        with self._changed:
            while not (self.waiting or self.batch.running or self.is_closing):
                self._cancelled.clear()
                self._changed.wait()
            now = time.monotonic()
            why = "the server is shutting down" if self.is_closing else \
                "the request waited for too long; try again later"
            dropped = [(row, Part(finish="dropped", error=why)) for row in self.waiting
                       if row in self._cancelled or self.is_closing or row.deadline <= now]
            for row, _ in dropped:
                self.waiting.remove(row)
            arriving: list[Row] = []
            while self.waiting and len(self.batch.running) + len(arriving) < self.batch.max_rows:
                longest = max(len(row.prompt) for row in [*arriving, self.waiting[0]])
                if arriving and longest * (len(arriving) + 1) > PREFILL_TOKENS:
                    break
                arriving.append(self.waiting.popleft())
            for one in self.batch.running:
                if now >= self._closes_at or one.row in self._cancelled:
                    one.deadline = now
            self._cancelled &= set(arriving)  # they run at the next step
        if dropped:
            self._deliver(dropped)
        return arriving if arriving or self.batch.running or not self.is_closing else None
