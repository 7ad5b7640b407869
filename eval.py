"""How good a model is: loss, perplexity and bits per byte of a text or of validation shards.

`python eval.py RUN [--data DIR_OR_FILE]` prints one JSON object on stdout; train.py calls evaluate(). Bits per byte do
not depend on the tokenizer, so they compare models of different vocabularies, and with gzip and xz on the same text.
"""

import argparse
import gzip
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import kernels
import sample
from config import UserError, exit_cleanly, load_config
from data.loader import MicroBatch, ValLoader
from data.shards import open_dataset, open_split
from data.tokenizer import Tokenizer, load_tokenizer
from distributed import World, sum_over_ranks
from kernels import self_check
from model import GPT

IGNORED = -100  # a target that is not scored


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
        losses = model(batch.tokens, batch.targets, documents=batch.documents, reduction="none").cpu().double()
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
    device = sample.choose_device(args.device)
    model, tokenizer = sample.load_model(args.run, device=device, dtype=args.dtype, note=_note)
    verdicts = self_check.verdicts("auto", model.config, table_rows=model.wte.num_embeddings,
                                   dtype=model.compute_dtype, device=device)
    kernels.choose_backends(op for op, problem in verdicts.items() if problem is None)
    run = Path(args.run)
    run_dir = run if (run / "config.toml").exists() else checkpoint.run_dir_of(run)
    data_config = load_config(run_dir / "config.toml").data
    data = Path(args.data or data_config.dir)
    if not data.exists():
        raise UserError(f"data {str(data)!r} does not exist; name a folder of shards or a text file with --data")
    if data.is_dir():
        batches = _shard_batches(data, model, tokenizer, args.batch_size, device, data_config.document_mask)
    else:
        batches = _file_batches(data, model, tokenizer, args.batch_size, device)
    score = evaluate(model, batches, token_bytes=tokenizer.token_bytes(), device=device)
    print(json.dumps({"run": args.run, "data": str(data), **asdict(score)}))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; python eval.py --help lists the arguments")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    parser.add_argument("--data", metavar="DIR_OR_FILE",
                        help="folder of shards (its validation split) or a text file; left out = the run's own")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows per forward pass")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=sample.DTYPES)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} should be at least 1")
    return args


def _shard_batches(data: Path, model: GPT, tokenizer: Tokenizer, batch_size: int, device: torch.device,
                   document_mask: bool) -> Iterator[MicroBatch]:
    dataset = open_dataset(data)
    has_own = (data / "tokenizer.json").exists()
    if has_own and load_tokenizer(str(data)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"data {str(data)!r} was made with tokenizer {dataset.index['tokenizer']!r}, the run with "
                        "another; prepare the text again with --tokenizer RUN")
    stream = open_split(dataset, "val")
    loader = ValLoader(stream, seq_len=model.config.max_seq_len, eval_tokens=stream.tokens, micro_batch=batch_size,
                       device=device, eot=tokenizer.eot if document_mask else None,
                       vocab_size=model.config.vocab_size)
    return loader.micro_batches()


def _file_batches(path: Path, model: GPT, tokenizer: Tokenizer, batch_size: int,
                  device: torch.device) -> Iterator[MicroBatch]:
    ids = tokenizer.encode(path.read_bytes().decode("utf-8", errors="replace"))
    if len(ids) == 0:
        raise UserError(f"text {str(path)!r} is empty; name a file with text in it")
    return text_batches(ids, eot=tokenizer.eot, seq_len=model.config.max_seq_len, batch_size=batch_size, device=device)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
