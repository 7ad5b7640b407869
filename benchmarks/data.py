"""bench.py data: data.prepare beside bare tiktoken; the loader beside a batch that is there already."""

import argparse
import contextlib
import itertools
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cli
import devices
import distributed
import plan
import start
from benchmarks import measure
from config import Config, UserError, parse_arguments
from data.dataset import open_dataset, open_split
from data.loader import MicroBatch, TrainLoader
from data.prepare import SMALL_BYTES, prepare
from data.sources import STDLIB, UNIT_BYTES
from data.tokenizer import GPT2_PATTERN, TIKTOKEN_FILES, train_bpe
from kernels import self_check
from model import GPT
from optim import LossScale, Optimizer
from train import train_step

# prepare asks should_stop after each unit of text, so the first call says when workers are up and encoding.
PREPARE = """
import sys, time
from data.prepare import prepare
source, folder, tokenizer, workers = sys.argv[1:]
prepare([source], folder, tokenizer=tokenizer, val_fraction=0.0, workers=int(workers),
        should_stop=lambda: print("a unit at", time.monotonic()))
"""

TIKTOKEN_WORKER = """
import tiktoken
texts_file, encoding_file = sys.argv[1:]
with open(encoding_file) as file:
    description = json.load(file)
if "name" in description:
    encoding = tiktoken.get_encoding(description["name"])
else:
    ranks = {bytes.fromhex(token): rank for token, rank in description["ranks"]}
    encoding = tiktoken.Encoding("bpe", pat_str=description["pattern"], mergeable_ranks=ranks, special_tokens={})
answer({})  # started
with open(texts_file) as file:
    texts = [json.loads(line)["text"] for line in file]
serve(lambda: {"tokens": sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in texts)})
"""
TIKTOKEN, PREPARED = "tiktoken", "data.prepare"
LOADER_TEXT_BYTES = 4e6


def add_to(commands) -> None:
    parser = measure.command(commands, run, "data.prepare beside bare tiktoken, and the loader.", repeats=3,
                             config="shakespeare_nanogpt.toml")
    parser.add_argument("--mb", type=cli.count, default=100, metavar="N", help="10^6 bytes of text; default 100")
    parser.add_argument("--source", default=STDLIB, help=f"text, repeated up to --mb; default {STDLIB}")
    parser.add_argument("--tokenizer", default="gpt2", metavar="NAME",
                        help=f"bpe:N, trained apart, or one of {', '.join(TIKTOKEN_FILES)}; default gpt2")
    parser.add_argument("--workers", type=cli.count, metavar="N",
                        help="processes on both sides; default: the cores")
    parser.add_argument("--steps", type=cli.count, default=100, metavar="N",
                        help="of the loader per repeat; default 100")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    if args.tokenizer not in TIKTOKEN_FILES and not re.fullmatch(r"bpe:\d+", args.tokenizer):
        raise UserError(f"--tokenizer {args.tokenizer!r} is none that tiktoken runs; name bpe:N or one of "
                        f"{', '.join(TIKTOKEN_FILES)}")
    config = start.inherit(*parse_arguments(args.config), None, distributed.World())
    workers = args.workers or measure.cores()
    source_texts = measure.read_documents(args.source, limit_bytes=args.mb * 1e6)
    texts = measure.take(itertools.cycle(source_texts), size=args.mb * 1e6)
    size = sum(len(text.encode()) for text in texts)
    # Encoded, or nearly, when the first unit arrives: a unit of each process; small texts are encoded by one.
    left_out = UNIT_BYTES * (workers if size > SMALL_BYTES else 1)
    if size < 2 * left_out:
        raise UserError(f"--mb {args.mb} is too little text for {workers} processes; raise it to 100, say")
    setting = {
        "text": f"{size / 1e6:.2f} MB of {args.source} in {len(texts):,} documents made of {len(source_texts):,}, no "
                "validation split",
        "tokenizer": args.tokenizer, "processes": workers, "tiktoken": measure.version("tiktoken"),
        "MB/s": f"{TIKTOKEN}: encode_to_numpy of documents in memory, all processes together; {PREPARED}: from the "
                "first encoded unit to the synced index.json, one unit per process left out",
        "start-up s": f"{TIKTOKEN}: spawn, imports, tokenizer; {PREPARED}: the same, counting documents and one unit "
                      "encoded; wall s holds it"}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        folder = Path(temporary)
        tokenizer, description = tokenizer_for_both(args.tokenizer, source_texts, folder)
        (folder / "encoding.json").write_text(json.dumps(description))
        write_jsonl(folder / "texts.jsonl", texts)
        parts = [folder / f"part_{number}.jsonl" for number in range(workers)]
        for part, share in zip(parts, shared_out(texts, workers), strict=True):
            write_jsonl(part, share)
        figures.take_turns({PREPARED: partial(_prepare_once, folder, tokenizer, workers, size - left_out),
                            TIKTOKEN: partial(_encode_bare, folder, parts, size)}, args.repeats, peers=(TIKTOKEN,))
        figures.add_ratios(f"{PREPARED} / {TIKTOKEN}", PREPARED, TIKTOKEN, "MB/s")
        write_jsonl(folder / "small.jsonl", measure.take(iter(texts), size=LOADER_TEXT_BYTES))
        return setting | {"loader": _measure_loader(config, folder, args, figures)}


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def tokenizer_for_both(name: str, texts: list[str], folder: Path) -> tuple[str, dict]:
    """A tokenizer for data.prepare, trained here if it is bpe:N, and the same one as tiktoken is told of it."""
    if name in TIKTOKEN_FILES:
        return name, {"name": name}
    tokenizer = train_bpe(texts, int(name.removeprefix("bpe:")))
    tokenizer.save(folder / "tokenizer.json")
    ranks = [(tokenizer.decode_bytes([i]).hex(), i) for i in range(tokenizer.vocab_size) if i != tokenizer.eot]
    return str(folder / "tokenizer.json"), {"pattern": GPT2_PATTERN, "ranks": ranks}


def shared_out(texts: list[str], parts: int) -> list[list[str]]:
    """The texts in parts of nearly equal length: sorted by length, then dealt out there and back again."""
    texts = sorted(texts, key=len, reverse=True)
    return [texts[i::2 * parts] + texts[2 * parts - 1 - i::2 * parts] for i in range(parts)]


def _prepare_once(folder: Path, tokenizer: str, workers: int, size: int) -> dict[str, float]:
    out = folder / "shards"
    done = measure.run_to_end(sys.executable, "-c", PREPARE, str(folder / "texts.jsonl"), str(out), tokenizer,
                              str(workers), cwd=measure.CHECKOUT)
    shutil.rmtree(out)
    first_unit = float(re.search(r"a unit at ([\d.]+)", done.output)[1])
    return {"MB/s": size / 1e6 / (done.ended - first_unit), "start-up s": first_unit - done.started,
            "wall s": done.seconds}


def _encode_bare(folder: Path, parts: list[Path], size: int) -> dict[str, float]:
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(measure.Worker(TIKTOKEN_WORKER, str(part), str(folder / "encoding.json"),
                                                        cwd=folder)) for part in parts]
        for process in processes:
            process.receive()  # it has started
        startup = time.perf_counter() - started
        for process in processes:
            process.receive()  # it has loaded its documents
        seconds, _ = measure.seconds_of(lambda: measure.ask(*processes))
    return {"MB/s": size / 1e6 / seconds, "start-up s": startup}


def _measure_loader(config: Config, folder: Path, args: argparse.Namespace, figures: measure.Figures) -> str:
    """Steps of a small model, for which loading weighs most, by TrainLoader and with one batch; what was run."""
    prepare([str(folder / "small.jsonl")], folder / "small", tokenizer=config.data.tokenizer or "bytes",
            val_fraction=0.0)
    dataset = open_dataset(folder / "small")
    model_config = replace(config.model, vocab_size=dataset.vocab_size)
    machine = devices.choose_machine(replace(config.train, device="cpu"), distributed.World())
    model = GPT(model_config, compute_dtype=machine.dtype)
    chosen = self_check.choose("auto", model_config, table_rows=model.wte.num_embeddings, dtype=machine.dtype,
                               device=measure.CPU)
    loader = TrainLoader(open_split(dataset, "train"), seq_len=model_config.max_seq_len, seed=config.train.seed,
                         tokens_per_step=config.train.tokens_per_step)
    loader.micro_batch, _ = plan.choose_micro_batch(config, None, model, model, loader, distributed.World())
    step = partial(train_step, model, Optimizer(model, config.optim), lr=config.optim.lr, step=0,
                   tokens_per_step=config.train.tokens_per_step, grad_clip=config.optim.grad_clip,
                   scale=LossScale.for_dtype(machine.dtype))
    one_batch = [loader.batch(0)] * args.steps

    def ms_each(work: Callable[[list[MicroBatch]], object], batches: Iterable[list[MicroBatch]]) -> float:
        return 1e3 * measure.seconds_of(lambda: [work(batch) for batch in batches])[0] / args.steps

    step(one_batch[0])  # warms up
    figures.take_turns({
        "loader alone": lambda: {"ms/batch": ms_each(len, loader.batches(0, args.steps))},
        "steps with loader": lambda: {"ms/step": ms_each(step, loader.batches(0, args.steps))},
        "steps with one batch": lambda: {"ms/step": ms_each(step, one_batch)}}, args.repeats)
    figures.add_ratios("with loader / with one batch", "steps with loader", "steps with one batch", "ms/step")
    return (f"{measure.label(args.config)}, {machine.dtype}, {args.steps} steps of {config.train.tokens_per_step:,} "
            f"tokens; {chosen}")
