"""bench.py sample: our generate() beside nanoGPT's and transformers', and the memory's bound on all of them."""

import argparse
import contextlib
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cli
import sample
from benchmarks import measure
from config import MachineError, ModelConfig
from kernels import self_check
from kernels.cpu import pack_for_decoding
from model import GPT

BANDWIDTH_BYTES = 1_000_000_000
OURS, MEMORY, TRANSFORMERS = "flatgpt", "memory", "transformers"
CHOICES = {"greedy": None, "top-k 200": 200}  # of the next token, as top_k
GPT2_KEYS = ("n_layer", "n_head", "n_embd", "vocab_size", "max_seq_len", "bias")

# In both: weights are random, and a call returns how many tokens it made.
GENERATE = """
import torch
description = json.loads(sys.argv[1])
torch.set_num_threads(description["threads"])
shape = {key: description[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}

def work(prompts, new_tokens, top_k):
    tokens = torch.tensor(prompts)
    return {"tokens": generate(tokens, new_tokens, top_k)[:, tokens.shape[1]:].numel()}
"""
NANOGPT_GENERATE = GENERATE + """
from model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=description["max_seq_len"], bias=description["bias"], dropout=0.0, **shape))
model = model.to(getattr(torch, description["dtype"])).eval()

def generate(tokens, new_tokens, top_k):
    return model.generate(tokens, new_tokens, top_k=top_k)

serve(work)
"""
TRANSFORMERS_GENERATE = GENERATE + """
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(n_positions=description["max_seq_len"], attn_implementation="sdpa", **shape))
model = model.to(getattr(torch, description["dtype"])).eval()
model.generation_config.eos_token_id = None  # nothing ends a text early

@torch.inference_mode()
def generate(tokens, new_tokens, top_k):
    choice = {"do_sample": False} if top_k is None else {"do_sample": True, "top_k": top_k}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, use_cache=True,
                          pad_token_id=0, **choice)

serve(work)
"""
Generate = Callable[[list[list[int]], int, int | None], int]  # prompts, new tokens, top_k -> tokens made in all


def add_to(commands) -> None:
    parser = measure.command(commands, run, "generate() beside nanoGPT's and transformers'.", repeats=3,
                             config="gpt2_124m.toml", lengths=True, peer=True)
    parser.add_argument("--dtypes", nargs="+", choices=sample.DTYPES, default=["float32", "bfloat16"],
                        help="default float32 bfloat16")
    parser.add_argument("--batch-sizes", nargs="+", type=cli.count, default=[1], metavar="N", help="default 1")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    """Every contender at every dtype, batch size and choice of the token; each model is built once and stays."""
    config = measure.complete_config(args).model
    setting = {"model": f"{measure.label(args.config)}, random weights",
               "tokens/s": f"of {args.new_tokens} new tokens after {args.prompt_tokens}, reading the prompt included",
               "first token ms": "a call for one token",
               "bound %": "of memory's GB/s / bytes of weights read per token"}
    contenders: dict[str, measure.Contender] = {MEMORY: _read_memory}
    measured = []  # who, of what, bytes of weights per token
    prompts = np.random.default_rng(0).integers(config.vocab_size, size=(max(args.batch_sizes), args.prompt_tokens))
    with contextlib.ExitStack() as stack:
        for dtype in args.dtypes:
            ours = _our_generate(config, dtype, setting)
            generators = {OURS: ours} | _peers(config, dtype, args.peer, stack, setting)
            for batch, (choice, top_k), who in itertools.product(args.batch_sizes, CHOICES.items(), generators):
                if who == measure.NANOGPT and top_k is None:
                    continue  # it always draws
                of = f"{dtype}, batch {batch}, {choice}"
                measured.append((who, of, weight_bytes(config, dtype) / batch))
                generate = partial(generators[who], prompts[:batch].tolist(), top_k=top_k)
                contenders[f"{who}, {of}"] = partial(_token_rate, generate, batch, args.new_tokens)
                try:
                    generate(min(4, args.new_tokens))  # warms up
                except MachineError as error:
                    figures.leave_out(f"{who}, {of}", str(error), is_ours=who == OURS)
        figures.take_turns(contenders, args.repeats, peers=[name for name in contenders if not name.startswith(OURS)])
    for who, of, size in measured:
        name = f"{who}, {of}"
        if not {name, MEMORY} & figures.left_out.keys():
            rates = zip(figures.samples[name]["tokens/s"], figures.samples[MEMORY]["GB/s"], strict=True)
            figures.samples[name]["bound %"] = [100 * rate * size / (1e9 * memory) for rate, memory in rates]
        if who != OURS:
            figures.add_ratios(f"{OURS} / {name}", f"{OURS}, {of}", name, "tokens/s", "first token ms")
    return setting


def _read_memory() -> dict[str, float]:
    """Read bandwidth of all threads together: the median of five sums over one buffer."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    return {"GB/s": BANDWIDTH_BYTES / 1e9 / statistics.median(measure.seconds_of(buffer.sum)[0] for _ in range(5))}


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of weights that one forward pass reads: all but the tables of which it reads a row per token."""
    with torch.device("meta"):
        model = GPT(config)
    looked_up = ("wpe.weight",) if model.lm_head is None else ("wpe.weight", "wte.weight")
    read = sum(p.numel() for name, p in model.named_parameters() if name not in looked_up)
    return read * getattr(torch, dtype).itemsize


def _token_rate(generate: Callable[[int], int], batch: int, new_tokens: int) -> dict[str, float]:
    first, _ = measure.seconds_of(lambda: generate(1))
    seconds, made = measure.seconds_of(lambda: generate(new_tokens))
    if made != batch * new_tokens:
        raise MachineError(f"a contender made {made} tokens instead of {batch * new_tokens}")
    return {"tokens/s": made / seconds, "first token ms": 1e3 * first}


def _our_generate(config: ModelConfig, dtype: str, setting: dict) -> Generate:
    model = GPT(config, compute_dtype=getattr(torch, dtype)).to(getattr(torch, dtype)).eval()
    setting[f"{OURS} {dtype} kernels"] = self_check.choose(
        "auto", config, table_rows=model.wte.num_embeddings, dtype=model.compute_dtype, device=measure.CPU)
    setting[f"{OURS} {dtype}"] = pack_for_decoding(model)

    def generate(prompts: list[list[int]], new_tokens: int, top_k: int | None) -> int:
        sampling = sample.Sampling(temperature=0.0 if top_k is None else 1.0, top_k=top_k)
        return sum(map(len, sample.generate(model, prompts, max_new_tokens=new_tokens, sampling=sampling)))

    return generate


def _peers(config: ModelConfig, dtype: str, nanogpt: Path | None, stack: contextlib.ExitStack,
           setting: dict) -> dict[str, Generate]:
    """Processes of nanoGPT (its checkout) and of transformers that hold a model of config's size, where they can."""
    shape = {key: getattr(config, key) for key in GPT2_KEYS}
    if config != ModelConfig(mlp=config.mlp, **shape) or not config.mlp.startswith("gelu"):
        setting["peers"] = "none: they have GPT-2's architecture only"
        return {}
    description = json.dumps(shape | {"dtype": dtype, "threads": torch.get_num_threads()})
    workers = {}
    if nanogpt is not None:
        workers[measure.NANOGPT] = measure.Worker(NANOGPT_GENERATE, description, cwd=nanogpt)
        setting[measure.NANOGPT] = f"{nanogpt}, commit {cli.commit(nanogpt)}"
    setting[TRANSFORMERS] = measure.version(TRANSFORMERS)
    if cli.is_installed(TRANSFORMERS):  # not here: our kernels/ would shadow a package of that name, which it imports
        workers[TRANSFORMERS] = measure.Worker(TRANSFORMERS_GENERATE, description, cwd=Path("/"))

    def generate(worker: measure.Worker, prompts: list[list[int]], new_tokens: int, top_k: int | None) -> int:
        return measure.ask(worker, prompts=prompts, new_tokens=new_tokens, top_k=top_k)[0]["tokens"]

    ready = {}
    for who, worker in workers.items():
        try:
            stack.enter_context(worker).receive()
            ready[who] = partial(generate, worker)
        except MachineError as error:
            setting[who] = f"left out: {error}"
    return ready
