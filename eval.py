"""How good a model is: loss, perplexity and bits per byte of a text or of validation shards, and scores of tasks.

`python eval.py RUN [--data DIR_OR_FILE] [--task FILE.jsonl]` prints one JSON object on stdout; train.py calls
evaluate(). Bits per byte do not depend on the tokenizer, so they compare models of different vocabularies, and with
gzip and xz on the same text. What a task is and how it is scored: tasks.py.
"""

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np
import torch

import cli
import files
import sample
from config import UserError, exit_cleanly
from data.dataset import open_dataset, open_split
from data.encode_units import separator_of
from data.loader import IGNORED, MicroBatch, ValLoader
from data.text import read_text
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from devices import choose_device
from distributed import World, sum_over_ranks
from finetune.runs import SavedRun, read_run
from kernels import self_check
from kernels.cpu import pack_for_decoding
from model import GPT
from tasks import scores, tasks

YARDSTICK_TOKENS = 1_000_000  # of validation text for gzip and xz, which need a second per 2 MB


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token, over all scored targets
    perplexity: float | None  # None: beyond what a float holds
    bits_per_byte: float | None  # nats of non-special targets / (ln 2 x their bytes); None if these are not known
    tokens: int
    bytes: int
    unknown: int  # targets that the tokenizer could not spell


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[MicroBatch], *, token_bytes: np.ndarray, device: torch.device,
             world: World = World(), should_stop: Callable[[], bool] = lambda: False) -> Score | None:  # noqa: B008
    """The score over all ranks' batches; None if should_stop() on any rank. token_bytes (V,): bytes per id, 0 =
    special, -1 = unknown text, one of which makes bits per byte unknown (Tokenizer.scored_bytes). The model is left in
    the mode (train or eval) it came in. Ranks may have different numbers of batches.
    """
    bytes_of_id = torch.from_numpy(token_bytes).to(torch.float64)
    sums = torch.zeros(6, dtype=torch.float64)  # nats, targets, nats and bytes of text, unknown, ranks that stopped
    was_training = model.training
    model.eval()
    for batch in batches:
        if should_stop():
            sums[5] = 1.0
            break
        losses = model(batch.tokens, batch.targets, document_ids=batch.document_ids, reduction="none").cpu().double()
        targets = batch.targets.flatten().cpu()
        lengths = bytes_of_id[targets.clamp(min=0)] * (targets != IGNORED)
        sums[:5] += torch.stack((losses.sum(), (targets != IGNORED).sum(), losses[lengths > 0].sum(),
                                 lengths.clamp(min=0).sum(), (lengths < 0).sum()))
    model.train(was_training)
    sums = sums.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64
    nats, scored, text_nats, text_bytes, unknown, stopped = sum_over_ranks(sums, world).tolist()
    if stopped:
        return None
    loss = nats / max(scored, 1.0)  # a loss mask may leave nothing
    return Score(loss=loss, perplexity=math.exp(loss) if loss < 700 else None,
                 bits_per_byte=text_nats / (math.log(2) * text_bytes) if text_bytes and not unknown else None,
                 tokens=int(scored), bytes=int(text_bytes), unknown=int(unknown))


def text_batches(ids: np.ndarray, *, eot: int, seq_len: int, batch_size: int, device: torch.device,
                 stride: int | None = None, document_end: int | None = None) -> Iterator[MicroBatch]:
    """All of a text in windows, each token scored once; the first is predicted from end-of-text. ids (n,), n >= 1.

    A window begins `stride` tokens after the one before it and scores what that one did not: all but the first window's
    tokens have a context of at least seq_len - stride + 1 (Hugging Face's perplexity of fixed-length models). stride
    None = seq_len: windows do not overlap. document_end: the id between documents, if these do not see each other.
    """
    stride = stride or seq_len
    windows = max(0, -(-(len(ids) - seq_len) // stride)) + 1
    tokens = np.full((windows - 1) * stride + seq_len + 1, eot, dtype=np.int64)
    tokens[1:len(ids) + 1] = ids
    targets = tokens[1:].copy()
    targets[len(ids):] = IGNORED
    parts = [np.lib.stride_tricks.sliding_window_view(part, seq_len)[::stride] for part in (tokens[:-1], targets)]
    for first in range(0, windows, batch_size):
        inputs, next_tokens = (torch.from_numpy(part[first:first + batch_size].copy()).to(device) for part in parts)
        next_tokens[int(first == 0):, :seq_len - stride] = IGNORED
        document_ids = None
        if document_end is not None:  # as in data/loader.py: an end-of-text opens the document behind it
            document_ids = (inputs == document_end).cumsum(dim=1, dtype=torch.int32)
        yield MicroBatch(inputs, next_tokens, document_ids, first_window=first)


def yardsticks(data: ValLoader | None, tokenizer: Tokenizer) -> Iterator[str]:
    """A line: what general compressors make of the evaluated text. None for examples, whose responses alone count."""
    if data is not None and data.stream.row_tokens is None:
        windows = np.arange(min(data.windows, max(1, YARDSTICK_TOKENS // data.seq_len)))
        text = tokenizer.decode_bytes(data.stream.windows(windows * data.seq_len + 1, data.seq_len).reshape(-1))
        if text:
            sizes = [f"{name} {bits:.4f} bits/byte" for name, bits in compressed_bits_per_byte(text).items()]
            yield f"yardsticks on the same validation text ({len(text) / 1e6:.2f} MB): {', '.join(sizes)}"


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors need for the same text, as yardsticks: {"gzip": bits per byte, "xz": ...}."""
    return {"gzip": 8 * len(gzip.compress(text, 9)) / len(text), "xz": 8 * len(lzma.compress(text)) / len(text)}


# ---- Command line ----------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    args = _parse(argv)
    task = None if args.task is None else tasks.read_task(args.task)
    tasks.check_options(task, [name for name in tasks.OPTIONS if getattr(args, name) is not None])
    _check_files(args, task)
    kind = None if task is None else task.kind
    metrics = scores.choose_metrics(args.metrics, cli.note) if kind in ("generation", "chat") else ()
    labels = tasks.choose_labels(task, args.labels) if kind == "classification" else []
    device, _ = choose_device(args.device, option="--device ")
    saved = read_run(args.run, cli.note)
    tokenizer, too_long, answer_tokens = saved.tokenizer, saved.config.data.too_long, args.max_new_tokens or 256
    # What is refused is refused before the weights are read.
    data = _data(args, saved, device) if task is None or args.data is not None else None
    if task is not None:
        task = replace(task, examples=task.examples[:args.limit], parse_special=bool(args.parse_special))
    if kind not in (None, "multiple choice"):
        spelled, _ = tasks.encode_labels(tokenizer, labels, saved.model.vocab_size)
        tasks.encode_asked(saved.model, tokenizer, task, saved.chat_template, too_long=too_long,
                           label_tokens=max(map(len, spelled), default=1), max_new_tokens=answer_tokens)
    model = sample.build_model(saved, device=device, dtype=args.dtype, note=cli.note)
    if device.type == "cuda":  # on a CPU build_model did
        cli.note(self_check.choose("auto", model.config, table_rows=model.wte.num_embeddings,
                                   dtype=model.compute_dtype, device=device))
    result = {"run": args.run}
    if data is not None:
        result |= _score(model, data, tokenizer, device)
    if task is not None:
        if kind == "multiple choice":
            found, rows = tasks.multiple_choice(model, tokenizer, task, batch_size=args.batch_size)
        elif kind == "classification":
            found, rows = tasks.classification(model, tokenizer, task, labels, batch_size=args.batch_size,
                                               too_long=too_long)
            cli.note(scores.confusion_table(labels, np.array(found["confusion"])))
        else:
            cli.note(pack_for_decoding(model))
            found, rows = tasks.generation(model, tokenizer, task, saved.chat_template, ends=saved.end_ids,
                                           metrics=metrics, max_new_tokens=answer_tokens, stop=tuple(args.stop or ()),
                                           batch_size=args.batch_size, too_long=too_long)
            if found.get("bleu") == 0:
                cli.note("bleu is 0: no answer shares a word with its reference, or none has the four in a row that it "
                         "counts; chrf also tells short texts apart")
        result |= {"task": str(args.task), "kind": kind, "examples": len(task.examples), **found}
        if args.plot is not None:
            with files.disk_errors(args.plot):
                files.write_whole(args.plot, scores.confusion_image(labels, np.array(found["confusion"])))
        if args.predictions is not None:
            with files.disk_errors(args.predictions):
                files.write_whole(args.predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(json.dumps(result))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python eval.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    add("--data", type=Path, metavar="DIR_OR_FILE", help="folder of shards (its validation split) or a text file; left "
        "out = the run's own, or none beside --task")
    add("--task", type=Path, metavar="FILE.jsonl", help="examples to score: lines of query, choices, gold (or "
        "HellaSwag's ctx, endings, label); of text, label; of prompt, reference; or of messages")
    add("--stride", type=cli.count, metavar="N", help="perplexity of a sliding window that moves by N tokens and "
        "scores those, each with max_seq_len - N tokens or more before it; left out = windows that do not overlap")
    add("--batch-size", type=cli.count, default=8, metavar="N", help="rows per forward pass; default 8")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", default="float32", choices=sample.DTYPES)
    add = parser.add_argument_group("with --task").add_argument
    add("--limit", type=cli.count, metavar="N", help="score the first N examples only")
    add("--predictions", type=Path, metavar="FILE.jsonl", help="write each example's prediction")
    add("--labels", action="append", metavar="A,B,C", help="classification: all labels, or given twice or more, one "
        "label each (which may hold a comma); left out = those of the file, sorted")
    add("--plot", type=Path, metavar="FILE.png", help="classification: write the confusion matrix")
    add("--max-new-tokens", type=cli.count, metavar="N", help="generation: default 256")
    add("--stop", nargs="+", action="extend", metavar="TEXT",
        help="generation: end an answer before any of these, as sample.py does; end-of-text always ends it")
    add("--parse-special", action="store_true", default=None,
        help="generation: special tokens that a prompt spells are read as such")
    add("--metrics", metavar="NAMES", help=f"generation: of {','.join(scores.TEXT_METRICS)}; default all installed")
    args = parser.parse_args(argv)
    args.stop = args.stop and sample.stop_texts(args.stop, cli.note)
    if args.stride is not None and args.task is not None and args.data is None:
        raise UserError(f"--stride {args.stride} is for text, and a task is scored alone; name text with --data too")
    return args


def _check_files(args: argparse.Namespace, task: tasks.Task | None) -> None:
    """Raise UserError for a file that could not be written after the work, or should not."""
    for option, path, suffix in (("--plot", args.plot, ".png"), ("--predictions", args.predictions, "")):
        if path is not None:
            cli.check_output(option, path, suffix)
            if path.resolve() == task.path.resolve():
                raise UserError(f"{option} {str(path)!r} is the task itself; name another file")
    if args.plot is not None:
        cli.require("--plot", "matplotlib")


class Data(NamedTuple):
    """What is scored: the result's fields that say so, the batches, and of a text its bytes as UTF-8 and whether the
    tokenizer keeps all of it."""

    fields: dict
    batches: Iterator[MicroBatch]
    text_bytes: int | None = None
    is_kept: bool = True


def _data(args: argparse.Namespace, saved: SavedRun, device: torch.device) -> Data:
    """What --data names, else the run's own validation split. Raises UserError."""
    config, tokenizer, seq_len = saved.config, saved.tokenizer, saved.model.max_seq_len
    data = args.data or config.data.dir and Path(config.data.dir)
    if data is None or not data.exists():  # a run converted from Hugging Face has none
        problem = f"run {args.run!r} has no data of its own" if data is None else f"data {str(data)!r} does not exist"
        raise UserError(f"{problem}; name a folder of shards or a text file with --data")
    if args.stride is not None and args.stride > seq_len:
        raise UserError(f"--stride {args.stride} is more than the context of {seq_len} tokens: some would not be "
                        f"scored; give 1 to {seq_len}")
    common = {"seq_len": seq_len, "batch_size": args.batch_size, "device": device, "stride": args.stride}
    fields = {"data": str(data)} | ({} if args.stride is None else {"stride": args.stride})
    if data.is_dir():
        return Data(fields, _shard_batches(data, saved, common))
    if data.suffix in (".jsonl", ".gz", ".zst", ".parquet"):
        raise UserError(f"--data {str(data)!r} is not plain text; prepare it first (python -m data.prepare "
                        f"{quote(str(data))} --out DIR --tokenizer RUN, then --data DIR), or use --task for examples "
                        "with right answers")
    text, invalid = read_text(str(data), f"--data {str(data)!r}", note=cli.note)
    if invalid:
        cli.note(f"--data {str(data)!r}: {invalid:,} invalid UTF-8 sequences replaced by U+FFFD")
    separators = len(separator_of(tokenizer.eot_token).findall(text)) if config.data.parse_special else 0
    if separators:
        cli.note(f"--data {str(data)!r}: the text spells end-of-text {separators:,} times, plain text here, and "
                 "the end of documents for the run (data.parse_special): the loss is that of another text; a folder "
                 "prepared with --parse-special is scored as the run was trained")
    ids = tokenizer.encode(text)
    if len(ids) == 0:
        raise UserError(f"text {str(data)!r} is empty; name a file with text in it")
    return Data(fields, text_batches(ids, eot=tokenizer.start, **common), len(text.encode()),
                tokenizer.spells(ids, text))


def _score(model: GPT, data: Data, tokenizer: Tokenizer, device: torch.device) -> dict:
    """The result's fields of data."""
    score = evaluate(model, data.batches, token_bytes=tokenizer.scored_bytes(), device=device)
    if not math.isfinite(score.loss):
        raise UserError("the model's losses are not finite; try --dtype float32, or an earlier checkpoint")
    if data.text_bytes is not None:  # of the text's real bytes: all tokens are text
        bits = score.loss * score.tokens / (math.log(2) * data.text_bytes) if data.is_kept else None
        score = replace(score, bits_per_byte=bits, bytes=data.text_bytes)
    if score.bits_per_byte is None:
        cli.note(f"bits_per_byte is null: the run's tokenizer loses some of the text ({score.unknown:,} of "
                 f"{score.tokens:,} tokens are unknown to it), so that its loss is that of another text, or no text is "
                 "scored")
    return data.fields | asdict(score)


def _shard_batches(data: Path, saved: SavedRun, common: dict) -> Iterator[MicroBatch]:
    """The validation split of a folder of shards. common: options of text_batches."""
    dataset, own, tokenizer, config = open_dataset(data), data / TOKENIZER_FILE, saved.tokenizer, saved.config
    if own.exists() and load_tokenizer(own).fingerprint != tokenizer.fingerprint:
        raise UserError(f"data {str(data)!r} was made with tokenizer {dataset.index['tokenizer']!r}, the run with "
                        "another; prepare the text again with --tokenizer RUN")
    if dataset.raw_files:
        cli.note(f"no header in {', '.join(dataset.raw_files)}: read as bare uint16 ids")
    stream, document_end = open_split(dataset, "val"), tokenizer.eot if config.data.document_mask else None
    loader = ValLoader(stream, seq_len=common["seq_len"], eval_tokens=stream.tokens, micro_batch=common["batch_size"],
                       device=common["device"], eot=document_end, vocab_size=tokenizer.vocab_size)
    if common["stride"] is None:
        trained = max(1, config.train.eval_tokens // loader.seq_len)  # windows of the run's own evaluations
        is_own = config.data.dir is not None and data.resolve() == Path(config.data.dir).resolve()
        if is_own and loader.windows > trained:
            cli.note(f"all {loader.windows * loader.seq_len:,} validation tokens are scored, the run's own evaluations "
                     f"scored the first {trained * loader.seq_len:,} (train.eval_tokens): the figures differ")
        return loader.micro_batches()
    if stream.row_tokens is not None:
        raise UserError(f"--stride {common['stride']}: the rows of {str(data)!r} are examples, which do not continue "
                        "each other; leave it out")
    tokens = stream.windows(np.zeros(1), stream.tokens)[0]
    return text_batches(tokens[1:], eot=tokens[0], document_end=document_end, **common)


if __name__ == "__main__":
    exit_cleanly(main)
