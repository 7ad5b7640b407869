"""Text from a trained model: generate() with a KV cache, the text layer on top of it, and a command line.

`python sample.py RUN --prompt TEXT` streams the prompt and its continuation to stdout. Three layers: tokens (generate),
the choice of one from logits (pick), text (generate_text, which never emits half a character or half a stop text).

Dims: B rows of a batch, T tokens of a prompt, C width, V vocabulary.
"""

import argparse
import codecs
import hashlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import cli
import devices
from config import ModelConfig, UserError, exit_cleanly
from data.prompts import answer_room, encode_prompt, fit_chat, fit_prompt
from data.text import read_text
from data.tokenizer import Tokenizer
from finetune.runs import SavedRun, read_run
from kernels import self_check
from kernels.cpu import pack_for_decoding
from model import GPT, KVCache

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
        for name, is_right, should in (
                ("temperature", 0.0 <= self.temperature < math.inf, "be finite and at least 0 (0 = likeliest token)"),
                ("top_k", self.top_k is None or self.top_k > 0, "be at least 1; leave it out for the whole vocabulary"),
                ("top_p", 0.0 <= self.top_p <= 1.0, "lie in 0 to 1 (1 = all tokens)"),
                ("min_p", 0.0 <= self.min_p <= 1.0, "lie in 0 to 1 (0 = all tokens)")):
            if not is_right:
                raise SampleError(f"{name} = {getattr(self, name)} should {should}")


# ---- Tokens ----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int,
             sampling: Sampling = Sampling()) -> Iterator[list[int]]:  # noqa: B008
    """Continue each prompt (at least one token); yields the next token of every row, max_new_tokens times.

    A row's tokens depend on its prompt, the seed and its number only, not on the other rows (but for the rounding of
    batched matmuls). There is no stop token: the batch is static, so the caller stops listening. A context that has
    outgrown max_seq_len, or a prompt, is cut to its last max_seq_len / 2 tokens, at positions from 0 again. Raises
    SampleError."""
    if not all(prompts):
        raise SampleError("a prompt has no tokens; start from the tokenizer's end-of-text token")
    contexts, max_seq_len = [list(prompt) for prompt in prompts], model.config.max_seq_len
    generators = [row_generator(sampling.seed, row) for row in range(len(prompts))]
    cache = None
    for step in range(max_new_tokens):
        if cache is None or cache.length == max_seq_len:
            contexts = [ids if len(ids) <= max_seq_len else ids[-max(1, max_seq_len // 2):] for ids in contexts]
            hidden, cache = prefill(model, contexts, new_tokens=max_new_tokens - step)
            logits = model.logits(hidden[:, -1])
        else:
            logits = decode(model, cache, [context[-1] for context in contexts])
        tokens = pick(logits, sampling, generators).tolist()  # one transfer from the device
        if -1 in tokens:
            raise SampleError(NOT_FINITE)
        for context, token in zip(contexts, tokens, strict=True):
            context.append(token)
        yield tokens


@torch.inference_mode()
def prefill(model: GPT, contexts: list[list[int]], *, new_tokens: int) -> tuple[Tensor, KVCache]:
    """What model.hidden makes of the contexts, (B, T, C), and the cache that now holds them, with room for new_tokens.
    None is longer than max_seq_len. They stand right-aligned behind padding: all rows write the same slot next."""
    device, T = model.wte.weight.device, max(map(len, contexts))
    tokens = torch.tensor([[0] * (T - len(context)) + context for context in contexts], device=device)
    padding = torch.tensor([T - len(context) for context in contexts], device=device)
    cache = KVCache(model.config, batch=len(contexts), dtype=cache_dtype(model), device=device,
                    slots=min(model.config.max_seq_len, T + new_tokens),
                    padding=padding if min(map(len, contexts)) < T else None)
    return model.hidden(tokens, cache=cache), cache


def cache_dtype(model: GPT) -> torch.dtype:
    """On the CPU, attention of one query is several times slower in bfloat16 than in float32 (docs/BENCHMARKS.md)."""
    return torch.float32 if model.wte.weight.device.type == "cpu" else model.compute_dtype


@torch.inference_mode()
def decode(model: GPT, cache: KVCache, tokens: list[int]) -> Tensor:
    """Logits (B, V) after one more token per row."""
    column = torch.tensor(tokens, device=model.wte.weight.device)[:, None]  # (B, 1)
    return model.logits(model.hidden(column, cache=cache)[:, -1])


# ---- The choice of a token -------------------------------------------------------------------------------------------

@torch.inference_mode()
def pick(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """A token id per row (B,), on the logits' device; -1 where none can be chosen: a row of logits (B, V) has no finite
    maximum."""
    if sampling.temperature == 0.0:
        tokens = logits.argmax(dim=-1)  # the first of equals
    else:
        # One number per row, drawn on the CPU: the same seed draws the same on every device.
        uniform = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
        tokens = draw(filter_logits(logits, sampling), torch.stack(uniform))
    return torch.where(logits.amax(dim=-1).isfinite() & (tokens < logits.shape[-1]), tokens, -1)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) -> (B, V) scaled, -inf where a filter removes the token; the likeliest always stays. Each filter
    sees the probabilities that those before it left, and is a threshold: tokens as likely as the last one that stays,
    stay too."""
    # Without the maximum a small temperature overflows; one that float32 rounds to 0 or inf makes 0 / 0 or inf / inf,
    # and beyond its range all temperatures choose alike.
    limits = torch.finfo(torch.float32)
    temperature = min(max(sampling.temperature, limits.tiny), limits.max)
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.top_p < 1.0:
        if logits.device.type == "cpu":  # numpy sorts with vector instructions: 0.1 ms for GPT-2's vocabulary, torch 3
            falling = torch.from_numpy(np.sort(logits.numpy())).flip(-1)
        else:
            falling = logits.sort(dim=-1, descending=True).values
        mass_before = F.pad(falling.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))
        kept = (mass_before < sampling.top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        logits = logits.masked_fill(logits < falling.gather(-1, kept - 1), -math.inf)
    if sampling.min_p > 0.0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p), -math.inf)
    return logits


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


# ---- Text ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Piece:
    """What one more token of a row made certain."""

    row: int
    text: str  # may be empty: half a character, or the start of a stop text
    tokens: int  # new tokens of the row so far, end-of-text included
    finish: str | None = None  # in a row's last piece: "stop" (end-of-text or a stop text) or "length"


def generate_text(model: GPT, tokenizer: Tokenizer, prompts: list[str], *, max_new_tokens: int,
                  sampling: Sampling = Sampling(), stop: tuple[str, ...] = (),  # noqa: B008
                  ends: frozenset[int] = frozenset(), chat_template: str | None = None,
                  parse_special: bool = False) -> Iterator[Piece]:
    """Continue each prompt as text, piece by piece, until end-of-text or a token of ends (a run's end_ids), a stop text
    (none is emitted) or the length; the last piece of a row has its finish set. chat_template and parse_special: see
    fit_context. Raises SampleError, ChatError, at once."""
    contexts = [fit_context(tokenizer, prompt, model.config, max_new_tokens=max_new_tokens,
                            chat_template=chat_template, parse_special=parse_special)[0] for prompt in prompts]
    ends |= {tokenizer.eot}
    streams = {row: TextStream(tokenizer, context, stop, ends) for row, context in enumerate(contexts)}
    steps = generate(model, contexts, max_new_tokens=max_new_tokens, sampling=sampling)

    def pieces() -> Iterator[Piece]:
        for count, tokens in enumerate(steps, start=1):
            for row, stream in list(streams.items()):
                text = stream.add(tokens[row], is_last=count == max_new_tokens)
                if stream.finish is not None:
                    del streams[row]
                yield Piece(row, text, count, stream.finish)
            if not streams:
                return

    return pieces()


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, temperature: float = 1.0,
                top_k: int | None = None, seed: int = 0, ends: frozenset[int] = frozenset()) -> str:
    """The continuation of one prompt, "" = from end-of-text; ends as in generate_text. Leaves the model in the mode it
    came in."""
    was_training, sampling = model.training, Sampling(temperature=temperature, top_k=top_k, seed=seed)
    try:
        pieces = generate_text(model.eval(), tokenizer, [prompt], max_new_tokens=max_new_tokens, sampling=sampling,
                               ends=ends)
        return "".join(piece.text for piece in pieces)
    finally:
        model.train(was_training)


def fit_context(tokenizer: Tokenizer, prompt: str, config: ModelConfig, *, max_new_tokens: int,
                chat_template: str | None = None, parse_special: bool = False) -> tuple[list[int], int]:
    """The ids that the model continues, and how many tokens were cut of a prompt longer than the context. A plain one,
    in which parse_special reads special tokens as such, then fills half of it, as in generate(); with a chat_template,
    where it is what the user says and the assistant's turn begins, the conversation leaves answer_room. Raises
    SampleError, ChatError."""
    room = config.max_seq_len
    if chat_template is None:
        ids = encode_prompt(tokenizer, prompt, parse_special=parse_special)
        ids, cut = fit_prompt(tokenizer, ids, room, free=room - max(1, room // 2))
    else:
        messages = [{"role": "user", "content": prompt}]
        ids, cut = fit_chat(tokenizer, chat_template, messages, room, free=answer_room(room, max_new_tokens))
    return known_ids(ids, config.vocab_size), cut


def known_ids(ids: np.ndarray, vocab_size: int) -> list[int]:
    """The ids (n,) as a list. Raises SampleError if the model does not know one of them."""
    if len(ids) and ids.max() >= vocab_size:
        raise SampleError(f"the prompt has token {ids.max()} but the model knows {vocab_size} ids; the run's "
                          "tokenizer.json belongs to another model")
    return ids.tolist()


class TextStream:
    """One row's tokens -> text in whole characters (what is not UTF-8 becomes U+FFFD), up to a token that ends it, a
    stop text (neither is emitted) or the last token. Of several stop texts the one that is complete first counts.

    Special tokens are no text, but a stop text may spell them; then it is looked for in the text that has them all. A
    context that ends inside a character leaves it to the text: what is certain of the context and this text together
    are the text of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int], stop: tuple[str, ...] = (),
                 ends: frozenset[int] = frozenset()):
        if "" in stop:
            raise SampleError("a stop text is empty; leave it out")
        self.finish: str | None = None  # once the text has ended: "stop" (a token of ends or a stop text) or "length"
        self.stopped = False  # by a stop text
        self.decoded = 0  # characters so far, those held back included
        self._tokenizer, self._ends = tokenizer, ends
        # Special tokens stand in held text, and in the stop texts that spell them, as surrogates, which are in no text.
        spelled = sorted((one for one in tokenizer.special_ids if any(one in text for text in stop)), key=len)[::-1]
        self._marks = dict.fromkeys(tokenizer.special_ids.values(), "\ud800") if spelled else {}
        marked = stop
        for i, one in enumerate(spelled):  # the longest of several that match
            self._marks[tokenizer.special_ids[one]] = mark = chr(0xD801 + i)
            marked = tuple(text.replace(one, mark) for text in marked)
        self._stop, self._marked_stop = stop, tuple(set(marked) - set(stop))
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # of a byte-level tokenizer; of others:
        self._ids = [i for i in context if i < tokenizer.vocab_size]  # ids whose text is out, so many, and those whose
        self._out = len(self._ids)  # is not
        self._held = ""  # perhaps the start of a stop text
        while self._out and "\ufffd" in tokenizer.spelling(self._ids[self._out - 1]).decode(errors="replace"):
            self._out -= 1  # of parts of characters the last may be unfinished
        self._ids, unsure = self._ids[:self._out], self._ids[self._out:]
        for token in unsure:
            self._decode(token)

    def add(self, token: int, *, is_last: bool = False) -> str:
        """The text that became certain with one more token: all of it if that is the last one or ends the text."""
        is_end = token in self._ends
        text = "" if is_end else self._decode(token)
        self._held += text
        self.decoded += len(text) - (token in self._marks)
        text = self.end() if is_end or is_last else self._release(keep_begun=True)
        if is_end or self.stopped:
            self.finish = "stop"
        return text

    def end(self) -> str:
        """The rest: no more tokens come."""
        self._held += self._rest()
        text = self._release(keep_begun=False)
        self.finish = "stop" if self.stopped else "length"
        return text

    def _decode(self, token: int) -> str:
        """The characters that became certain with one more token."""
        if token >= self._tokenizer.vocab_size:
            return ""  # a row of the model's table that stands for nothing
        if token in self._marks:
            return self._rest() + self._marks[token]
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):  # perhaps half a character, spelled in byte tokens
            return ""
        self._ids, self._out = self._ids[self._out:], len(self._ids) - self._out
        return text

    def _rest(self) -> str:
        """What is not out yet, be it half a character."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        text, self._out = self._pending(), len(self._ids)
        return text

    def _pending(self) -> str:
        """Text of the ids that are not out yet. Whether a word starts with a space shows only beside its neighbours."""
        before, after = (self._tokenizer.decode_bytes(ids).decode() for ids in (self._ids[:self._out], self._ids))
        return after[len(before):]

    def _release(self, *, keep_begun: bool) -> str:
        """The held text up to a stop text, which then stays; without one all of it, but for a stop text's beginning."""
        held = self._held
        shown = [i for i, char in enumerate(held) if not (self._marks and "\ud800" <= char <= "\udfff")]
        ends, begun = [], [len(held)]  # places in held: (end, start) of stop texts, where one may have begun
        for stops, places in ((self._stop, shown), (self._marked_stop, range(len(held)))):
            text = "".join(held[i] for i in places)
            for stop in stops:
                if (start := text.find(stop)) >= 0:
                    ends.append((places[start + len(stop) - 1] + 1, places[start]))
                begun += [places[-n] for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        self.stopped = bool(ends)
        cut = min(ends)[1] if ends else min(begun) if keep_begun else len(held)
        self._held = held[cut:]
        return "".join(held[i] for i in shown if i < cut)


# ---- Command line ----------------------------------------------------------------------------------------------------

def load_model(run: str | Path, *, device: torch.device, dtype: str,
               note: Callable[[str], None]) -> tuple[GPT, Tokenizer]:
    """The model of RUN as build_model makes it, and the tokenizer. Raises CheckpointError, ConfigError."""
    saved = read_run(run, note)
    return build_model(saved, device=device, dtype=dtype, note=note), saved.tokenizer


def build_model(saved: SavedRun, *, device: torch.device, dtype: str, note: Callable[[str], None]) -> GPT:
    """The model of a run, in eval mode. dtype, one of DTYPES: of weights and matmuls. Raises CheckpointError."""
    model = GPT(saved.config.model, compute_dtype=getattr(torch, dtype))
    checkpoint.load_into(model, saved.weights(), str(saved.checkpoint))
    note(f"model: {saved.checkpoint}, {model.parameter_count():,} parameters, {dtype} on {device.type}")
    if device.type == "cpu":  # on CUDA it would compile kernels at each start, which decoding does not use
        note(self_check.choose("auto", model.config, table_rows=model.wte.num_embeddings, dtype=model.compute_dtype,
                               device=device))
    return model.to(device, getattr(torch, dtype)).eval()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python sample.py", description="Continue a prompt with a trained model.",
                        epilog="Without a prompt the model starts a text of its own.")
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("-", dest="stdin", action="store_true", help="read the prompt from stdin")
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--prompt-file", metavar="FILE", help="the whole file is one prompt")
    add("--chat", action="store_true", help="the prompt is what a user says, in the run's chat template")
    add("--max-new-tokens", type=cli.count, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, default=1.0, metavar="X", help="0 = always the likeliest token; default 1")
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens; left out = from all")
    add("--top-p", type=float, default=1.0, metavar="X",
        help="draw from the fewest likeliest tokens that reach this probability; default 1 = all")
    add("--min-p", type=float, default=0.0, metavar="X",
        help="draw from tokens of at least this share of the likeliest one's probability; default 0")
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end the text before any of these; they "
        r"may spell special tokens; \n alone is read as a newline")
    add("--parse-special", action="store_true", help="special tokens that the prompt spells are read as such")
    add("--num-samples", type=cli.count, default=1, metavar="N", help="samples, generated as one batch")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text; default 0")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", default="float32", choices=DTYPES,
        help="of weights and matmuls; default float32; bfloat16 is about twice as fast where native")
    args = parser.parse_args(argv)
    args.stop = stop_texts(args.stop, cli.note)
    if args.chat and args.prompt is None and args.prompt_file is None and not args.stdin:
        raise SampleError("--chat needs what the user says: --prompt TEXT, --prompt-file FILE or -")
    if args.chat and args.parse_special:
        raise SampleError("--parse-special is for plain prompts: what a user says in a chat is text; leave it out, or "
                          "write the template's tokens into the prompt and leave out --chat")
    return args


def stop_texts(given: list[str], note: Callable[[str], None]) -> tuple[str, ...]:
    """The stop texts of a command line. Where a newline was meant a shell may pass a backslash and n: a text of nothing
    but \\n, \\r and \\t is read so, and note tells; of others, such as \\nabla, note tells what they are."""
    stops = []
    for stop in given:
        if re.fullmatch(r"(\\[nrt])+", stop):
            stops.append(stop.replace(r"\n", "\n").replace(r"\r", "\r").replace(r"\t", "\t"))
            note(f"--stop '{stop}': read as {stops[-1]!r}")
        else:
            stops.append(stop)
            if re.search(r"\\[nrt]", stop):
                note(f"--stop '{stop}': taken as it is, a backslash and a letter; for a newline or tab write $'{stop}'")
    return tuple(stops)


def main(argv: list[str]) -> None:
    args = _parse(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    prompt = args.prompt or ""
    if args.stdin or args.prompt_file is not None:  # exactly as given: a final newline in a file counts
        named = "stdin" if args.stdin else f"prompt file {args.prompt_file!r}"
        prompt, _ = read_text(args.prompt_file, named, note=None)
    device, _ = devices.choose_device(args.device, option="--device ")
    run = read_run(args.run, cli.note)
    template = run.chat_template if args.chat else None
    if args.chat and template is None:
        raise SampleError(f"run {args.run!r} holds no chat_template.jinja, it was not trained on conversations; leave "
                          "out --chat")
    context, cut = fit_context(run.tokenizer, prompt, run.model, max_new_tokens=args.max_new_tokens,
                               chat_template=template, parse_special=args.parse_special)
    TextStream(run.tokenizer, context, tuple(args.stop))  # refuses what it cannot stop at before the weights are read
    if cut:
        too_long = (f"the {'conversation' if args.chat else 'prompt'} has {len(context) + cut:,} tokens, more than the "
                    f"context of {run.model.max_seq_len:,}")
        if args.chat and run.config.data.too_long == "error":
            raise SampleError(f"{too_long}; shorten the prompt (the run's data.too_long is error)")
        cli.note(f"{too_long}: {cut:,} were cut from its front")
    model = build_model(run, device=device, dtype=args.dtype, note=cli.note)
    cli.note(pack_for_decoding(model))
    pieces = generate_text(model, run.tokenizer, [prompt] * args.num_samples, max_new_tokens=args.max_new_tokens,
                           sampling=sampling, stop=tuple(args.stop), chat_template=template, ends=run.end_ids,
                           parse_special=args.parse_special)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ? instead
    _print_samples(prompt + "\n" if args.chat else prompt, pieces, args.num_samples)


def _print_samples(prompt: str, pieces: Iterator[Piece], num_samples: int) -> None:
    """The first sample as it arrives, then the others; a tokens/s line on stderr."""
    texts, lengths = [""] * num_samples, [0] * num_samples
    print(prompt, end="", flush=True)
    start, first = time.perf_counter(), None
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            print(piece.text if piece.row == 0 else "", end="", flush=True)
            texts[piece.row] += piece.text
            lengths[piece.row] = piece.tokens
        seconds = time.perf_counter() - first
    finally:
        print(flush=True)  # after Ctrl-C too
    for text in texts[1:]:
        print("---", prompt + text, sep="\n", flush=True)
    rate = f", then {(sum(lengths) - num_samples) / seconds:.1f} tokens/s" if max(lengths) > 1 else ""
    cli.note(f"{sum(lengths)} new tokens; prompt read in {first - start:.2f} s{rate}")


if __name__ == "__main__":
    exit_cleanly(main)
