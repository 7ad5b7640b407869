"""Text from a trained model: generate() with a KV cache, the text layer on top of it, and a command line.

`python sample.py RUN --prompt TEXT` streams the prompt and its continuation to stdout. Three layers: tokens (generate),
the choice of one token from logits (choose and its filters), text (generate_text, which never emits half a character or
half a stop text). It trains nothing and evaluates nothing.

Dims: B rows of a batch, T tokens of a prompt, V vocabulary.
"""

import argparse
import codecs
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from config import UserError, exit_cleanly, load_config
from data.chat import encode_chat, load_template, turn_end
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT, KVCache, Linear

DTYPES = ("float32", "bfloat16", "float16")
NOT_FINITE = "the model's logits are not finite; try --dtype float32, or an earlier checkpoint"


class SampleError(UserError):
    """A prompt or setting that cannot be sampled with."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits; applied in this order, as Hugging Face does."""

    temperature: float = 1.0  # logits are divided by it; 0 = the likeliest token, the lowest id of equals
    top_k: int | None = None  # the k likeliest tokens stay; None = all
    top_p: float = 1.0  # the fewest likeliest tokens that reach this probability together stay; 1 = all
    min_p: float = 0.0  # tokens of at least this share of the likeliest one's probability stay; 0 = all
    seed: int = 0  # row r of a batch draws from its own generator, made of (seed, r)

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise SampleError(f"temperature = {self.temperature} should be finite and at least 0 (0 = likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise SampleError(f"top_k = {self.top_k} should be at least 1; leave it out for the whole vocabulary")
        if not 0.0 <= self.top_p <= 1.0:
            raise SampleError(f"top_p = {self.top_p} should lie in 0 to 1 (1 = all tokens)")
        if not 0.0 <= self.min_p <= 1.0:
            raise SampleError(f"min_p = {self.min_p} should lie in 0 to 1 (0 = all tokens)")


# ----------------------------------------------------------------------------------------------------------------------
# Tokens

def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling = Sampling(),  # noqa: B008
             use_cache: bool = True) -> Iterator[list[int]]:
    """Continue each prompt (at least one token); yields the next token of every row, max_new_tokens times.

    A row's tokens depend on its prompt, the seed and its number only: not on the other rows or their count (but for the
    rounding of batched matmuls). There is no stop token: the batch is static, so the caller stops listening. A context
    that has outgrown max_seq_len is cut to its last max_seq_len / 2 tokens (prompts too), at positions from 0 again.
    use_cache=False computes every step from scratch, row by row, to check the cache against. Raises SampleError.
    """
    if not all(prompts):
        raise SampleError("a prompt has no tokens; start from the tokenizer's end-of-text token")
    contexts = [list(prompt) for prompt in prompts]
    generators = [row_generator(sampling.seed, row) for row in range(len(prompts))]
    cache = None
    for step in range(max_new_tokens):
        if not use_cache:
            logits = _logits_from_scratch(model, contexts)
        elif cache is None or cache.length == model.config.max_seq_len:
            for context in contexts:
                cut_to_fit(context, model.config.max_seq_len)
            hidden, cache = prefill(model, contexts, new_tokens=max_new_tokens - step)
            logits = last_logits(model, hidden)
        else:
            logits = decode(model, cache, [context[-1] for context in contexts])
        tokens = choose(logits, sampling, generators)
        for context, token in zip(contexts, tokens, strict=True):
            context.append(token)
        yield tokens


@torch.inference_mode()
def prefill(model: GPT, contexts: list[list[int]], *, new_tokens: int) -> tuple[Tensor, KVCache]:
    """What model.hidden makes of the contexts, (B, T, C), and the cache that now holds them, with room for new_tokens.

    Contexts, none longer than max_seq_len, stand right-aligned behind padding, so that all rows write the same slot
    next.
    """
    T = max(len(context) for context in contexts)
    padding = [T - len(context) for context in contexts]
    device = model.wte.weight.device
    tokens = torch.tensor([[0] * pad + context for pad, context in zip(padding, contexts, strict=True)], device=device)
    cache = KVCache(model.config, batch=len(contexts), dtype=cache_dtype(model), device=device,
                    slots=min(model.config.max_seq_len, T + new_tokens),
                    padding=torch.tensor(padding, device=device) if any(padding) else None)
    return model.hidden(tokens, cache=cache), cache


def cache_dtype(model: GPT) -> torch.dtype:
    """On the CPU, attention of one query is several times slower in bfloat16 than in float32 (docs/BENCHMARKS.md)."""
    return torch.float32 if model.wte.weight.device.type == "cpu" else model.compute_dtype


@torch.inference_mode()
def last_logits(model: GPT, hidden: Tensor) -> Tensor:
    """Logits (B, V) of the last position of hidden (B, T, C)."""
    return model.logits(hidden[:, -1])


@torch.inference_mode()
def decode(model: GPT, cache: KVCache, tokens: list[int]) -> Tensor:
    """Logits (B, V) after one more token per row."""
    column = torch.tensor(tokens, device=model.wte.weight.device)[:, None]  # (B, 1)
    return last_logits(model, model.hidden(column, cache=cache))


@torch.inference_mode()
def _logits_from_scratch(model: GPT, contexts: list[list[int]]) -> Tensor:
    """The last logits of prefill, without cache, padding or batch."""
    rows = []
    for context in contexts:
        cut_to_fit(context, model.config.max_seq_len)
        tokens = torch.tensor([context], device=model.wte.weight.device)
        rows.append(model.logits(model.hidden(tokens)[:, -1]))
    return torch.cat(rows)


def cut_to_fit(context: list[int], max_seq_len: int) -> None:
    """In place: a context longer than max_seq_len keeps its last max_seq_len / 2 tokens, at least one."""
    if len(context) > max_seq_len:
        del context[:-max(1, max_seq_len // 2)]


# ----------------------------------------------------------------------------------------------------------------------
# The choice of a token

def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """One token id per row of logits (B, V), float32. Raises SampleError if a row has no finite maximum."""
    chosen = pick(logits, sampling, generators).tolist()  # one transfer from the device
    if -1 in chosen:
        raise SampleError(NOT_FINITE)
    return chosen


@torch.inference_mode()
def pick(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """choose() left on the device: a token id per row (B,), -1 where a row of logits (B, V) has no finite maximum."""
    if sampling.temperature == 0.0:
        tokens = logits.argmax(dim=-1)  # the first of equals
    else:
        # One number per row, drawn on the CPU: the same seed draws the same on every device.
        uniform = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
        tokens = draw(filter_logits(logits, sampling), torch.stack(uniform))
    return torch.where(logits.amax(dim=-1).isfinite(), tokens, -1)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) -> (B, V) scaled, -inf where a filter removes the token; the likeliest always stays.

    Order: temperature, top_k, top_p, min_p; each sees the probabilities that those before it left. Every filter is a
    threshold: tokens as likely as the last one that stays, stay too.
    """
    logits = scale(logits, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    return keep_min_p(logits, sampling.min_p) if sampling.min_p > 0.0 else logits


def scale(logits: Tensor, temperature: float) -> Tensor:
    """(logits - maximum) / temperature, (B, V): without the maximum a small temperature overflows."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k <= V largest of each row (B, V), and those equal to the smallest of them."""
    return _keep_from(logits, logits.topk(k).values[:, -1:])


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest largest of each row (B, V) that reach probability p together, and those equal to the smallest."""
    falling = _sort_falling(logits)
    mass_before = F.pad(falling.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))
    kept = (mass_before < p).sum(dim=-1, keepdim=True).clamp(min=1)
    return _keep_from(logits, falling.gather(-1, kept - 1))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep what is at least p times as likely as the largest of each row (B, V)."""
    return _keep_from(logits, logits.amax(dim=-1, keepdim=True) + math.log(p))


def _keep_from(logits: Tensor, threshold: Tensor) -> Tensor:
    return logits.masked_fill(logits < threshold, -math.inf)


def _sort_falling(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # numpy sorts with vector instructions: 0.1 ms for GPT-2's vocabulary, torch 3 ms
        return torch.from_numpy(np.sort(logits.numpy())).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The id (B,) at which the cumulated probability of a row of logits (B, V) passes uniform (B,) in [0, 1)."""
    probabilities = logits.softmax(dim=-1)
    if probabilities.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        probabilities = probabilities.cpu()  # no float64 on MPS; CUDA's cumsum may refuse to be deterministic
    # float64: sums rounded to float32 could step at a token of probability 0, or end below uniform
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = uniform.to(cumulated.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].to(logits.device)


def row_generator(seed: int, row: int) -> torch.Generator:
    """The source of randomness of one row; a CPU generator on every device."""
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)  # torch takes 63 bits


# ----------------------------------------------------------------------------------------------------------------------
# Text

@dataclass(frozen=True)
class Piece:
    """What one more token of a row made certain."""

    row: int
    text: str  # may be empty: half a character, or the start of a stop text
    tokens: int  # new tokens of the row so far, end-of-text included
    finish: str | None = None  # in a row's last piece: "stop" (end-of-text or a stop text) or "length"


def generate_text(model: GPT, tokenizer: Tokenizer, prompts: list[str], *, max_new_tokens: int,
                  sampling: Sampling = Sampling(), stop: tuple[str, ...] = (),  # noqa: B008
                  use_cache: bool = True, chat_template: str | None = None) -> Iterator[Piece]:
    """Continue each prompt as text, piece by piece, until end-of-text, a stop text (neither is emitted) or the length.
    With a chat_template each prompt is what the user says, and the end of the assistant's turn is the end.

    Every row ends with a piece whose finish is set; ended rows emit no more. Raises SampleError, at once.
    """
    if max_new_tokens < 1:
        raise SampleError(f"max_new_tokens = {max_new_tokens} should be at least 1")
    contexts = [encode_prompt(tokenizer, prompt, model.config.vocab_size, chat_template) for prompt in prompts]
    ends = {tokenizer.eot} | ({turn_end(tokenizer, chat_template)} if chat_template is not None else set())
    streams = {row: TextStream(tokenizer, context, stop) for row, context in enumerate(contexts)}
    steps = generate(model, contexts, max_new_tokens=max_new_tokens, sampling=sampling, use_cache=use_cache)
    return _pieces(steps, streams, ends=ends, max_new_tokens=max_new_tokens)


def _pieces(steps: Iterator[list[int]], streams: dict[int, "TextStream"], *, ends: set[int],
            max_new_tokens: int) -> Iterator[Piece]:
    """The pieces of generate_text; streams holds the rows that have not ended."""
    for count, tokens in enumerate(steps, start=1):
        is_last = count == max_new_tokens
        for row, stream in list(streams.items()):
            is_eot = tokens[row] in ends
            text = "" if is_eot else stream.add(tokens[row])
            if is_eot or is_last:
                text += stream.end()
            finish = "stop" if is_eot or stream.stopped else "length" if is_last else None
            if finish is not None:
                del streams[row]
            yield Piece(row, text, count, finish)
        if not streams:
            return


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, temperature: float = 1.0,
                top_k: int | None = None, seed: int = 0) -> str:
    """The continuation of one prompt, "" = from end-of-text. Leaves the model in the mode it came in."""
    was_training = model.training
    model.eval()
    try:
        pieces = generate_text(model, tokenizer, [prompt], max_new_tokens=max_new_tokens,
                               sampling=Sampling(temperature=temperature, top_k=top_k, seed=seed))
        return "".join(piece.text for piece in pieces)
    finally:
        model.train(was_training)


def encode_prompt(tokenizer: Tokenizer, prompt: str, vocab_size: int, chat_template: str | None = None) -> list[int]:
    """The prompt's ids, special tokens as plain text; behind the tokenizer's bos_token if it has one, and end-of-text
    for an empty prompt if not. With a chat_template it is what the user says, and the assistant's turn begins. Raises
    SampleError, ChatError."""
    if chat_template is not None:
        ids = encode_chat(tokenizer, chat_template, [{"role": "user", "content": prompt}]).tolist()
    else:
        ids = tokenizer.encode(prompt).tolist()
        if tokenizer.bos_token is not None or not ids:
            ids.insert(0, tokenizer.start)
    if max(ids) >= vocab_size:
        raise SampleError(f"the prompt has token {max(ids)} but the model knows {vocab_size} ids; the run's "
                          "tokenizer.json belongs to another model")
    return ids


class Detokenizer:
    """Turns the tokens that follow `context` into text, whole characters only; what is not UTF-8 becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids = list(context)  # not byte-level: ids whose text is out, then those whose text is not
        self._out = len(context)

    def add(self, token: int) -> str:
        """The text that became certain with one more token."""
        if token >= self._tokenizer.vocab_size:
            return ""  # a row of the model's table that stands for nothing
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):  # perhaps half a character, spelled in byte tokens
            return ""
        self._ids, self._out = self._ids[self._out:], len(self._ids) - self._out
        return text

    def end(self) -> str:
        """The rest: no more tokens come."""
        return self._utf8.decode(b"", final=True) if self._tokenizer.byte_level else self._pending()

    def _pending(self) -> str:
        """Text of the ids that are not out yet. Whether a word starts with a space shows only beside its neighbours."""
        before, after = (self._tokenizer.decode_bytes(ids).decode() for ids in (self._ids[:self._out], self._ids))
        return after[len(before):]


class TextStream:
    """One row's tokens -> text, without any part of a stop text.

    Of several stop texts the one that is complete first ends the text, wherever tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int], stop: tuple[str, ...] = ()):
        if "" in stop:
            raise SampleError("a stop text is empty; leave it out")
        self.stopped = False
        self.decoded = 0  # characters so far, those held back included
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stop = stop
        self._held = ""  # perhaps the start of a stop text

    def add(self, token: int) -> str:
        """The text that became certain with one more token."""
        text = self._detokenizer.add(token)
        self.decoded += len(text)
        self._held += text
        return self._release(self._possible_stop_length())

    def end(self) -> str:
        """The rest: no more tokens come."""
        self._held += self._detokenizer.end()
        return self._release(0)

    def _release(self, keep: int) -> str:
        """The held text up to a stop text, with which it then begins for good; or all but its last keep characters."""
        ends = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        self.stopped = bool(ends)
        cut = min(ends)[1] if ends else len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _possible_stop_length(self) -> int:
        """Characters at the end of the held text with which a stop text begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


# ----------------------------------------------------------------------------------------------------------------------
# Loading a model to sample from

def load_model(run: str | Path, *, device: torch.device, dtype: str,
               note: Callable[[str], None]) -> tuple[GPT, Tokenizer]:
    """The model (in eval mode) and tokenizer of a run folder or of one checkpoint in it.

    dtype, one of DTYPES, is that of weights and matmuls. note receives lines for the user. Raises CheckpointError,
    ConfigError, SampleError.
    """
    if dtype not in DTYPES:
        raise SampleError(f"dtype {dtype!r} should be one of {', '.join(DTYPES)}")
    folder = checkpoint.resolve(run, note)
    run_dir = checkpoint.run_dir_of(folder)
    config = load_config(run_dir / "config.toml").model
    tokenizer = load_tokenizer(run_dir)
    model = GPT(config, compute_dtype=getattr(torch, dtype))
    checkpoint.load_into(model, checkpoint.load_tensors(folder, "model"), str(folder))
    note(f"model: {folder}, {model.parameter_count():,} parameters, {dtype} on {device.type}")
    return model.to(device, getattr(torch, dtype)).eval(), tokenizer


def choose_device(wanted: str) -> torch.device:
    """auto = cuda, then mps, then cpu. Raises SampleError if the wanted one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in there if there[kind]) if wanted == "auto" else wanted
    if not there[kind]:
        raise SampleError(f"device {kind!r} is not there in this PyTorch; use --device auto or cpu")
    return torch.device(kind)


class PackedLinear(nn.Module):
    """A linear layer for inputs of one dtype whose weight oneDNN has laid out. CPU, inference only, never saved.

    From 1 row to 256 it is as fast as F.linear or up to three times faster (docs/BENCHMARKS.md).
    """

    ROWS = 16  # the layout is chosen for this many; that of 1 is no faster on 1 row and half as fast on 2 or more

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        # Private operators of PyTorch: packing_works() tells whether they are there and compute what they should.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), self.ROWS)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_for_decoding(model: GPT) -> str:
    """Replace the model's linear layers, head included, by packed ones where that works; returns what was done and why.

    For a model that will only generate: afterwards it can neither train nor be saved. A tied head is held twice.
    """
    dtype = model.compute_dtype
    if model.wte.weight.device.type != "cpu":
        return "weights: as they are (packing is for the CPU)"
    if not packing_works(dtype):
        return f"weights: as they are (this PyTorch or CPU does not pack {dtype})"
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, dtype))
    if model.lm_head is None:
        model.lm_head = PackedLinear(model.wte.weight, None, dtype)
    return "weights: packed by oneDNN"


@torch.inference_mode()
def packing_works(dtype: torch.dtype) -> bool:
    """Whether PackedLinear computes what F.linear does, tried on a small layer."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (96,), (1, 3, 64)))
    try:
        packed = PackedLinear(weight, bias, dtype)(x)
    except RuntimeError:
        return False
    expected = F.linear(x.double(), weight.double(), bias.double())
    tolerance = 8 * torch.finfo(dtype).eps  # values up to about 30, sums of 64 products kept in float32
    return torch.allclose(packed.double(), expected, rtol=tolerance, atol=64 * tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Command line

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise SampleError(f"{message}; python sample.py --help lists the arguments")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="sample.py", description="Continue a prompt with a trained model.",
                     epilog="Without a prompt the model starts a text of its own.")
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("-", dest="stdin", action="store_true", help="read the prompt from stdin")
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--prompt-file", metavar="FILE", help="the whole file is one prompt")
    parser.add_argument("--chat", action="store_true",
                        help="the prompt is what a user says, in the run's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X",
                        help="0 = always the likeliest token; default 1")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens; left out = from all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X",
                        help="draw from the fewest likeliest tokens that reach this probability; default 1 = all")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X",
                        help="draw from tokens of at least this share of the likeliest one's probability; default 0")
    parser.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT",
                        help="end the text before any of these")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="samples, generated as one batch")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text; default 0")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES,
                        help="of weights and matmuls; default float32; bfloat16 is about twice as fast where native")
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise SampleError(f"--{name.replace('_', '-')} {getattr(args, name)} should be at least 1")
    if args.chat and args.prompt is None and args.prompt_file is None and not args.stdin:
        raise SampleError("--chat needs what the user says: --prompt TEXT, --prompt-file FILE or -")
    return args


def main(argv: list[str]) -> None:
    args = _parse(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    prompt = _read_prompt(args)
    model, tokenizer = load_model(args.run, device=choose_device(args.device), dtype=args.dtype, note=_note)
    template = _chat_template(args.run) if args.chat else None
    _note(pack_for_decoding(model))
    context = encode_prompt(tokenizer, prompt, model.config.vocab_size, template)
    _check_length(len(context), model.config.max_seq_len, is_chat=args.chat)
    pieces = generate_text(model, tokenizer, [prompt] * args.num_samples, max_new_tokens=args.max_new_tokens,
                           sampling=sampling, stop=tuple(args.stop), chat_template=template)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ? instead
    try:
        _print_samples(prompt + "\n" if args.chat else prompt, pieces, args.num_samples)
    except KeyboardInterrupt:
        print(flush=True)
        raise


def _chat_template(run: str) -> str:
    """The template of a run. Raises SampleError if it was not trained on conversations."""
    path = Path(run)
    template = load_template(path if (path / "config.toml").exists() else checkpoint.run_dir_of(path))
    if template is None:
        raise SampleError(f"run {run!r} holds no chat_template.jinja, it was not trained on conversations; leave out "
                          "--chat")
    return template


def _print_samples(prompt: str, pieces: Iterator[Piece], num_samples: int) -> None:
    """The first sample as it arrives, then the others; a tokens/s line on stderr."""
    texts = [[] for _ in range(num_samples)]
    lengths = [0] * num_samples
    print(prompt, end="", flush=True)
    start = first = time.perf_counter()
    for piece in pieces:
        if not any(lengths):
            first = time.perf_counter()
        if piece.row == 0:
            print(piece.text, end="", flush=True)
        texts[piece.row].append(piece.text)
        lengths[piece.row] = piece.tokens
    seconds = time.perf_counter() - first
    print()
    for text in texts[1:]:
        print("---", prompt + "".join(text), sep="\n")
    sys.stdout.flush()
    rate = f", then {(sum(lengths) - num_samples) / seconds:.1f} tokens/s" if max(lengths) > 1 else ""
    _note(f"{sum(lengths)} new tokens; prompt read in {first - start:.2f} s{rate}")


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text, exactly as given: a final newline in a file counts. Raises SampleError."""
    if not args.stdin and args.prompt_file is None:
        return args.prompt or ""
    try:
        data = sys.stdin.buffer.read() if args.stdin else Path(args.prompt_file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise SampleError(f"prompt file {args.prompt_file!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        name = "stdin" if args.stdin else f"prompt file {args.prompt_file!r}"
        raise SampleError(f"{name} is not valid UTF-8 at byte {error.start}; convert it first") from None


def _check_length(tokens: int, max_seq_len: int, *, is_chat: bool) -> None:
    """Note that a text is cut on the left; raise SampleError for a chat, which would lose its template's beginning."""
    if tokens > max_seq_len and is_chat:
        raise SampleError(f"the conversation has {tokens:,} tokens, more than the context of {max_seq_len:,}; shorten "
                          "the prompt")
    if tokens > max_seq_len:
        _note(f"the prompt has {tokens:,} tokens, more than the context of {max_seq_len:,}: its last "
              f"{max(1, max_seq_len // 2):,} are used")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
