"""How good a model is: loss, perplexity and bits per byte of a text or of validation shards, and scores of tasks.

`python eval.py RUN [--data DIR_OR_FILE] [--task FILE.jsonl]` prints one JSON object on stdout; train.py calls
evaluate(). Bits per byte do not depend on the tokenizer, so they compare models of different vocabularies, and with
gzip and xz on the same text. What a task is and how it is scored: tasks.py.
"""

import argparse
import gzip
import importlib.util
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
import kernels
import sample
from config import MachineError, UserError, exit_cleanly, load_config
from data.chat import load_template
from data.loader import IGNORED, MicroBatch, ValLoader
from data.shards import open_dataset, open_split
from data.tokenizer import Tokenizer, load_tokenizer
from distributed import World, sum_over_ranks
from files import write_whole
from kernels import self_check
from model import GPT
from tasks import scores, tasks


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token, over all scored targets
    perplexity: float
    bits_per_byte: float | None  # nats of non-special targets / (ln 2 x their bytes); None without such targets
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[MicroBatch], *, token_bytes: np.ndarray, device: torch.device,
             world: World = World(), should_stop: Callable[[], bool] = lambda: False) -> Score | None:  # noqa: B008
    """The score over all ranks' batches; None if should_stop() on any rank. token_bytes (V,): bytes per id, 0 =
    special. The model is left in the mode (train or eval) it came in. Ranks may have different numbers of batches.
    """
    bytes_of_id = torch.from_numpy(token_bytes).to(torch.float64)
    nats = scored = text_nats = text_bytes = stopped = 0.0
    was_training = model.training
    model.eval()
    for batch in batches:
        if should_stop():
            stopped = 1.0
            break
        losses = model(batch.tokens, batch.targets, document_ids=batch.document_ids, reduction="none").cpu().double()
        targets = batch.targets.flatten().cpu()
        lengths = bytes_of_id[targets.clamp(min=0)] * (targets != IGNORED)
        nats += losses.sum().item()
        scored += (targets != IGNORED).sum().item()
        text_nats += losses[lengths > 0].sum().item()
        text_bytes += lengths.sum().item()
    model.train(was_training)
    sums_dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.tensor([nats, scored, text_nats, text_bytes, stopped], dtype=sums_dtype, device=device)
    nats, scored, text_nats, text_bytes, stopped = sum_over_ranks(sums, world).tolist()
    if stopped:
        return None
    scored = max(scored, 1.0)  # a loss mask may leave nothing
    return Score(loss=nats / scored, perplexity=_exp(nats / scored),
                 bits_per_byte=text_nats / (math.log(2) * text_bytes) if text_bytes else None,
                 tokens=int(scored), bytes=int(text_bytes))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def text_batches(ids: np.ndarray, *, eot: int, seq_len: int, batch_size: int,
                 device: torch.device) -> Iterator[MicroBatch]:
    """All of a text in windows that do not overlap; its first token is predicted from end-of-text. ids (n,), n >= 1."""
    tokens = np.concatenate([[eot], ids]).astype(np.int64)  # (n + 1,)
    windows = -(-len(ids) // seq_len)
    inputs = np.full(windows * seq_len, eot, dtype=np.int64)
    targets = np.full(windows * seq_len, IGNORED, dtype=np.int64)
    inputs[:len(ids)], targets[:len(ids)] = tokens[:-1], tokens[1:]
    inputs = torch.from_numpy(inputs).view(windows, seq_len).to(device)
    targets = torch.from_numpy(targets).view(windows, seq_len).to(device)
    for first in range(0, windows, batch_size):
        rows = slice(first, first + batch_size)
        yield MicroBatch(inputs[rows], targets[rows], None, first_window=first)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors need for the same text, as yardsticks: {"gzip": bits per byte, "xz": ...}."""
    sizes = {"gzip": len(gzip.compress(text, 9)), "xz": len(lzma.compress(text))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def main(argv: list[str]) -> None:
    args = _parse(argv)
    task = None if args.task is None else tasks.read_task(Path(args.task))
    _check_task_options(args, task)
    if task is not None:
        _check_output_files(args, task)
    metrics = scores.choose_metrics(args.metrics, _note) if task is not None and task.is_generation else ()
    labels = tasks.choose_labels(task, args.labels) if task is not None and task.kind == "classification" else []
    device = choose_device(args.device, option="--device ")[0]
    model, tokenizer = sample.load_model(args.run, device=device, dtype=args.dtype, note=_note)
    verdicts = self_check.verdicts("auto", model.config, table_rows=model.wte.num_embeddings,
                                   dtype=model.compute_dtype, device=device)
    kernels.choose_backends(op for op, problem in verdicts.items() if problem is None)
    run = Path(args.run)
    run_dir = run if (run / "config.toml").exists() else checkpoint.run_dir_of(run)
    result = {"run": args.run}
    if task is None or args.data is not None:
        result |= _loss(args, run_dir, model, tokenizer, device)
    if task is not None:
        result |= _score_task(args, run_dir, task, model, tokenizer, labels, metrics)
    print(json.dumps(result))


def _loss(args: argparse.Namespace, run_dir: Path, model: GPT, tokenizer: Tokenizer, device: torch.device) -> dict:
    data_config = load_config(run_dir / "config.toml").data
    if args.data is None and data_config.dir is None:  # converted from Hugging Face
        raise UserError(f"run {args.run!r} has no data of its own; name a folder of shards or a text file with --data")
    data = Path(args.data or data_config.dir)
    if not data.exists():
        raise UserError(f"data {str(data)!r} does not exist; name a folder of shards or a text file with --data")
    if data.is_dir():
        batches = _shard_batches(data, model, tokenizer, args.batch_size, device, data_config.document_mask)
    else:
        batches = _file_batches(data, model, tokenizer, args.batch_size, device)
    score = evaluate(model, batches, token_bytes=tokenizer.token_bytes(), device=device)
    return {"data": str(data), **asdict(score)}


def _score_task(args: argparse.Namespace, run_dir: Path, task: tasks.Task, model: GPT, tokenizer: Tokenizer,
                labels: list[str], metrics: tuple[str, ...]) -> dict:
    """The task's part of the JSON; writes --predictions and --plot, and the confusion table to stderr."""
    task = replace(task, examples=task.examples[:args.limit])
    if task.kind == "multiple choice":
        result, rows = tasks.multiple_choice(model, tokenizer, task, batch_size=args.batch_size)
    elif task.kind == "classification":
        result, rows, confusion = tasks.classification(model, tokenizer, task, labels, batch_size=args.batch_size)
        _note(scores.confusion_table(labels, confusion))
        if args.plot is not None:
            _write_whole("--plot", args.plot, scores.confusion_image(labels, confusion))
    else:
        _note(sample.pack_for_decoding(model))
        result, rows = tasks.generation(model, tokenizer, task, load_template(run_dir), metrics=metrics,
                                        max_new_tokens=args.max_new_tokens, stop=tuple(args.stop),
                                        batch_size=args.batch_size)
    if args.predictions is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write_whole("--predictions", args.predictions, lines.encode())
    return {"task": args.task, "kind": task.kind, "examples": len(task.examples), **result}


def _write_whole(option: str, path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise MachineError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; python eval.py --help lists the arguments")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    parser.add_argument("--data", metavar="DIR_OR_FILE",
                        help="folder of shards (its validation split) or a text file; left out = the run's own, or "
                             "none beside --task")
    parser.add_argument("--task", metavar="FILE.jsonl",
                        help="examples to score: lines of query, choices, gold (or HellaSwag's ctx, endings, label); "
                             "of text, label; of prompt, reference; or of messages")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass; default 8")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=sample.DTYPES)
    options = parser.add_argument_group("with --task")
    options.add_argument("--limit", type=int, metavar="N", help="score the first N examples only")
    options.add_argument("--predictions", type=Path, metavar="FILE.jsonl", help="write each example's prediction")
    options.add_argument("--labels", metavar="A,B,C",
                         help="classification: all labels; left out = those of the file, sorted")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="classification: write the confusion matrix")
    options.add_argument("--max-new-tokens", type=int, metavar="N", help="generation: default 256")
    options.add_argument("--stop", nargs="+", action="extend", metavar="TEXT",
                         help="generation: end an answer before any of these; end-of-text always ends it")
    options.add_argument("--metrics", metavar="NAMES",
                         help=f"generation: some of {','.join(scores.TEXT_METRICS)}; default all that are installed")
    args = parser.parse_args(argv)
    for name in ("batch_size", "limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} should be at least 1")
    return args


def _check_task_options(args: argparse.Namespace, task: tasks.Task | None) -> None:
    """Raise UserError for an option that has no meaning here; fill defaults in."""
    kinds = {"limit": "any kind", "predictions": "any kind", "labels": "classification", "plot": "classification",
             "max_new_tokens": "generation", "stop": "generation", "metrics": "generation"}
    for name, kind in kinds.items():
        if getattr(args, name) is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if task is None:
            raise UserError(f"{option} is for a task of {kind}; name one with --task, or leave it out")
        if kind != "any kind" and kind != ("generation" if task.is_generation else task.kind):
            raise UserError(f"{option} is for {kind}, and {args.task!r} is {task.kind}; leave it out")
    args.stop, args.max_new_tokens = args.stop or [], args.max_new_tokens or 256


def _check_output_files(args: argparse.Namespace, task: tasks.Task) -> None:
    """Raise UserError for a file that could not be written after the work, or should not."""
    if args.plot is not None:
        if args.plot.suffix != ".png":
            raise UserError(f"--plot {str(args.plot)!r} should end in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot needs the package matplotlib, which is not installed; pip install matplotlib")
    for option, path in (("--plot", args.plot), ("--predictions", args.predictions)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option} {str(path)!r} lies in a folder that does not exist; make {str(path.parent)!r} "
                            "first")
        if path is not None and path.exists() and not path.is_file():  # os.replace would put a file for a device
            raise UserError(f"{option} {str(path)!r} is no regular file; name another")
        if path is not None and path.resolve() == task.path.resolve():
            raise UserError(f"{option} {str(path)!r} is the task itself; name another file")


def _shard_batches(data: Path, model: GPT, tokenizer: Tokenizer, batch_size: int, device: torch.device,
                   document_mask: bool) -> Iterator[MicroBatch]:
    dataset = open_dataset(data)
    has_own = (data / "tokenizer.json").exists()
    if has_own and load_tokenizer(str(data)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"data {str(data)!r} was made with tokenizer {dataset.index['tokenizer']!r}, the run with "
                        "another; prepare the text again with --tokenizer RUN")
    if dataset.raw_files:
        _note(f"no header in {', '.join(dataset.raw_files)}: read as bare uint16 ids")
    stream = open_split(dataset, "val")
    loader = ValLoader(stream, seq_len=model.config.max_seq_len, eval_tokens=stream.tokens, micro_batch=batch_size,
                       device=device, eot=tokenizer.eot if document_mask else None,
                       vocab_size=model.config.vocab_size)
    return loader.micro_batches()


def _file_batches(path: Path, model: GPT, tokenizer: Tokenizer, batch_size: int,
                  device: torch.device) -> Iterator[MicroBatch]:
    if path.suffix in (".jsonl", ".gz", ".zst", ".parquet"):
        raise UserError(f"--data {str(path)!r} is not plain text; prepare it first (python -m data.prepare {path} "
                        "--out DIR --tokenizer RUN, then --data DIR), or use --task for examples with right answers")
    ids = tokenizer.encode(path.read_bytes().decode("utf-8", errors="replace"))
    if len(ids) == 0:
        raise UserError(f"text {str(path)!r} is empty; name a file with text in it")
    return text_batches(ids, eot=tokenizer.start, seq_len=model.config.max_seq_len, batch_size=batch_size,
                        device=device)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
