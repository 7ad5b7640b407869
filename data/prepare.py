"""Text to token shards: `python -m data.prepare SOURCE ... --out DIR`; prepared.py runs it for train.py.

Writes DIR/train_00000.bin, val_00000.bin, ..., tokenizer.json and, last, index.json. The bytes depend on the text and
the settings alone, not on paths, time or the number of workers. The sources are cut into units of about 1 MB, in order,
which worker processes read and encode (encode_units.py); this process appends their tokens, in order, to the open shard
of their split, and writes .progress.json (output_folder.py) every few seconds. After kill -9, a stop or a row that
cannot be used the same command cuts the open shards back to that, and goes on with the next unit: of sources that were
changed meanwhile, with the first unit that is another. Memory holds a few units for each worker.

A document ends with end-of-text. A text split by characters may be cut inside a document: its first part, the end of
train, then has no end-of-text, for the document did not end there; its rest starts val.
"""

import argparse
import hashlib
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import cli
from config import ConfigError, MachineError, UserError, exit_cleanly
from data.chat import DEFAULT_TEMPLATE, read_template, save_template
from data.dataset import INDEX_FORMAT
from data.encode_units import BAD_ROWS_NAMED, Encoder, WorkerDied, encode_units, end_with, separator_of, worker_pool
from data.examples import ROWS_PER_UNIT, Packing, first_example, texts_of_examples
from data.output_folder import Busy, OutputFolder
from data.rows import CHAT, TEXT, ExampleError, find_kind
from data.shards import TRACKS
from data.source_files import FORMATS
from data.sources import (
    STDLIB,
    UNIT_BYTES,
    Rules,
    SourceError,
    TextFile,
    Texts,
    choose_split,
    describe,
    find_files,
    row_name,
    split_of,
    texts_of,
)
from data.text import WORTH_A_WARNING
from data.tokenizer import (
    END_OF_TEXT,
    TIKTOKEN_FILES,
    TOKENIZER_FILE,
    Tokenizer,
    bpe_ids,
    load_tokenizer,
    tokenizer_identity,
    train_bpe,
)
from data.verify_shards import verify
from data.write_shards import MAX_SHARD_TOKENS, SplitWriter

DEFAULT_TOKENIZER = "gpt2"
SMALL_BYTES = 8 << 20  # below this, starting workers takes longer than they save
CHECKPOINT_SECONDS = 5.0
BPE_SAMPLE_BYTES = 200_000_000
NOTE_SECONDS = 30.0


class PreparationStopped(Exception):
    """should_stop() said so; what is done is kept, and the same call goes on."""


# ---- prepare() -------------------------------------------------------------------------------------------------------

def prepare(sources: Sequence[str], out_dir: Path, *, tokenizer: str = DEFAULT_TOKENIZER,
            val_fraction: float = 0.05, val_sources: Sequence[str] = (), workers: int | None = None,
            text_field: str = "text", kind: str = "auto", shard_tokens: int = 100_000_000,
            max_seq_len: int | None = None, chat_template: str = DEFAULT_TEMPLATE, too_long: str = "cut",
            bad_rows: str = "error", parse_special: bool = False,
            should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Write the shards of sources into out_dir, or go on with it, or find it done; the index.

    max_seq_len, chat_template (its text) and too_long are for rows of examples; bad_rows: error, or skip the rows that
    cannot be used; parse_special: end-of-text spelled in plain text ends a document. should_stop is asked after each
    unit. Raises UserError (nothing stays written unless there was a finished shard or 5 s of work before it),
    MachineError and PreparationStopped; what stays the same call goes on from.
    """
    if not sources:
        raise UserError(f"no source is named; name a text file, a folder, or {STDLIB}")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {shard_tokens} should lie between 1 and {MAX_SHARD_TOKENS}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} should be at least 1")
    if not 0.0 <= val_fraction <= 0.9:
        raise UserError(f"--val-fraction {val_fraction} should lie between 0 and 0.9")
    settings = {"sources": [describe(source) for source in sources],
                "val_sources": [describe(source) for source in val_sources],
                "tokenizer": tokenizer_identity(tokenizer), "val_fraction": None if val_sources else val_fraction,
                "text_field": text_field, "bad_rows": bad_rows, "parse_special": parse_special} | (
                    {"kind": kind} if kind == TEXT else {})
    text_files = [file for source in sources for file in find_files(source, cli.note)]
    val_files = [file for source in val_sources for file in find_files(source, cli.note)]
    rules = Rules(val_fraction, text_field, bad_rows == "skip", parse_special)
    packing = choose_packing(text_files + val_files, rules, kind, max_seq_len, chat_template, too_long)
    if packing is None:
        texts = choose_split(text_files, val_files, rules)
    else:
        texts = choose_split(text_files, val_files, replace(rules, text_field=None),
                             row_unit_bytes=ROWS_PER_UNIT * 4 * packing.row_tokens)
        settings |= packing.settings
        if shard_tokens < packing.row_tokens:
            raise UserError(f"--shard-tokens {shard_tokens} is less than a row of {packing.row_tokens}; raise it")
        shard_tokens -= shard_tokens % packing.row_tokens  # a shard holds whole rows
    if texts.bytes <= SMALL_BYTES or workers == 1:
        workers = 0
    elif workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    folder = OutputFolder(Path(out_dir), settings | {"shard_tokens": shard_tokens})
    try:
        index = folder.open()
        if index is not None:
            cli.note(f"{folder.path} is prepared already")
            return index
        return _fill(folder, texts, tokenizer, packing, workers=workers, should_stop=should_stop)
    except OSError as error:
        raise MachineError(f"writing {str(folder.path)!r} failed: {error.strerror}; make room and give the same "
                           "command again: it goes on") from None
    except MachineError as error:
        raise type(error)(f"{error}; give the same command again: it goes on") from None
    finally:
        folder.close()


def choose_packing(text_files: Sequence[TextFile], rules: Rules, kind: str, max_seq_len: int | None,
                   chat_template: str, too_long: str) -> Packing | None:
    """How the rows of examples in these files are packed; None if they hold plain text. Raises UserError."""
    kind = find_kind(text_files, rules.text_field, kind, skip_bad=rules.skip_bad)
    if kind == TEXT:
        return None
    if rules.parse_special:
        raise UserError(f"--parse-special (data.parse_special) is for plain text, but source {text_files[0].path!r} "
                        f"holds {kind}; leave it out")
    if max_seq_len is None or max_seq_len < 1:
        what = "is missing" if max_seq_len is None else f"= {max_seq_len} should be at least 1"
        raise UserError(f"--max-seq-len {what}: source {text_files[0].path!r} holds {kind}, which is packed into rows "
                        "of the model's context; name that (model.max_seq_len), or say that the texts in a field are "
                        "to be learnt as they are (--kind text, data.kind=text)")
    return Packing(kind, max_seq_len, chat_template if kind == CHAT else "", too_long)


def _fill(folder: OutputFolder, texts: Texts, tokenizer_name: str, packing: Packing | None, *, workers: int,
          should_stop: Callable[[], bool]) -> dict:
    """Write what the folder lacks; the index."""
    settings = folder.settings
    try:
        tokenizer = _tokenizer_of(folder, texts, tokenizer_name, packing)
        encoder = Encoder(tokenizer, texts.rules, packing)
        if folder.changed:
            units = folder.progress["units"]
            folder.go_back(_point_before_changes(folder, texts, encoder))
            cli.note(f"{folder.path}: {', '.join(folder.changed)} changed since this was begun; "
                     f"{folder.progress['units']:,} of the {units:,} units that were done are still the same and stay, "
                     "the rest is made anew")
        writers = {split: SplitWriter(folder.path, split, tokenizer, shard_tokens=settings["shard_tokens"],
                                      tracks=() if packing is None else TRACKS,
                                      state=folder.progress["splits"].get(split)) for split in ("train", "val")}
        _encode_texts(folder, texts, encoder, writers, workers=workers, should_stop=should_stop)
    except UserError as error:
        if not folder.progress["units"]:
            folder.discard()
            raise
        if not isinstance(error, SourceError | ExampleError):
            raise
        raise type(error)(f"{error}; what was made before it is kept: then give the same command again, it goes on"
                          ) from None
    for writer in writers.values():
        writer.finish_shard()
    shards = [shard for writer in writers.values() for shard in writer.shards]
    counts = {key: folder.progress[key] for key in ("invalid_utf8", "bad_rows", "separators")}
    index = {"format": INDEX_FORMAT, "tokenizer": settings["tokenizer"], "tokenizer_sha256": tokenizer.fingerprint,
             "dtype": encoder.dtype.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
             "settings": settings, "val_split": texts.val_split, **counts, "shards": shards}
    if packing is not None:
        index |= {"row_tokens": packing.row_tokens,
                  "examples": {split: writer.lengths for split, writer in writers.items() if writer.lengths}}
    try:
        _check_no_split_is_empty(index)
    except UserError:
        folder.discard()  # the ways out are other settings
        raise
    named = folder.progress["bad_rows_named"]
    folder.finish(index)
    cli.note(f"{folder.path}: {_summary(index, named)}")
    if packing is not None:
        cli.note(f"its first example, with what the loss counts in [[ ]]: {first_example(folder.path, tokenizer)}")
    return index


def _tokenizer_of(folder: OutputFolder, texts: Texts, name: str, packing: Packing | None) -> Tokenizer:
    """The tokenizer, loaded or trained on the training split and saved in the folder, where a second start finds it;
    the chat template beside it."""
    path, vocab_size, known = folder.path / TOKENIZER_FILE, bpe_ids(name), folder.progress["tokenizer_sha256"]
    if known is not None and (vocab_size is None or not folder.changed):
        tokenizer = load_tokenizer(str(path))
        if tokenizer.fingerprint != known:
            raise UserError(f"tokenizer {str(path)!r} was changed meanwhile; remove the folder and start again")
        return tokenizer
    if known is None:
        folder.save()  # from here on the folder is ours
    if packing is not None and packing.kind == CHAT:
        save_template(folder.path, packing.chat_template)
    tokenizer = load_tokenizer(name) if vocab_size is None else \
        _train_tokenizer(texts, packing, vocab_size)
    if known not in (None, tokenizer.fingerprint):
        cli.note(f"{folder.path}: {', '.join(folder.changed)} changed since this was begun, and with it {name}, which "
                 "is trained on it: all is made anew")
        folder.go_back(folder.START, tokenizer_sha256=None)
        folder.changed = []
    tokenizer.save(path)
    folder.save(tokenizer_sha256=tokenizer.fingerprint)
    return tokenizer


def _train_tokenizer(texts: Texts, packing: Packing | None, vocab_size: int) -> Tokenizer:
    """bpe:N; of more than a little text in a process of its own, for a signal cannot end the library's training."""
    cli.note(f"training tokenizer bpe:{vocab_size} on {min(texts.bytes, BPE_SAMPLE_BYTES) / 1e6:.1f} MB of text")
    if texts.bytes <= UNIT_BYTES:
        return _train(texts, packing, vocab_size)
    started = time.monotonic()
    with worker_pool(1) as pool:
        future = pool.submit(_train, texts, packing, vocab_size)
        while True:
            with suppress(TimeoutError):
                return future.result(NOTE_SECONDS)
            cli.note(f"training tokenizer bpe:{vocab_size}, {time.monotonic() - started:.0f} s so far")


def _train(texts: Texts, packing: Packing | None, vocab_size: int) -> Tokenizer:
    return train_bpe(_training_texts(texts, packing), vocab_size)


def _training_texts(texts: Texts, packing: Packing | None = None) -> Iterator[str]:
    """Texts of the training split, in all about BPE_SAMPLE_BYTES, from units spread evenly over it."""
    stride, rules = math.ceil(texts.bytes / BPE_SAMPLE_BYTES), texts.rules
    separator = separator_of(END_OF_TEXT) if rules.parse_special else None
    for unit in itertools.islice(texts.units(cuttable=True), 0, None, stride):
        if unit.split == "val":
            continue
        if packing is None:
            found = (([text], text) for text, _ in texts_of(unit, rules.text_field, rules.bad_rows()))
        else:
            found = texts_of_examples(unit, packing.kind, rules.bad_rows())
        for parts, hashed in found:
            if unit.split == "train" or split_of([hashed], rules.val_fraction) == "train":
                yield from parts if separator is None else filter(None, separator.split(parts[0]))


def _point_before_changes(folder: OutputFolder, texts: Texts, encoder: Encoder) -> dict:
    """The last point before which the units are what they were."""
    points, good, digest = folder.points(), folder.START, b""
    units = itertools.islice(texts.units(cuttable=encoder.tokenizer.cuttable), max(points))
    for number, unit in enumerate(units, start=1):
        digest = _chained(digest, encoder.digest(unit))
        if number in points and points[number]["digest"] != digest.hex():
            break
        good = points.get(number, good)
    return good


def _chained(before: bytes, digest: bytes) -> bytes:
    return hashlib.blake2b(before + digest, digest_size=16).digest()


def _encode_texts(folder: OutputFolder, texts: Texts, encoder: Encoder, writers: dict[str, SplitWriter], *,
                  workers: int, should_stop: Callable[[], bool]) -> None:
    """Append the tokens of all units that .progress.json does not count yet, and keep it up to date."""
    point = folder.point
    digest, named = bytes.fromhex(point["digest"]), list(point["bad_rows_named"])
    units = texts.units(cuttable=encoder.tokenizer.cuttable)
    skipped = sum(unit.bytes for unit in itertools.islice(units, point["units"]))
    if not workers and not encoder.tokenizer.cuttable and texts.bytes > UNIT_BYTES:
        workers = 1  # a signal cannot end its encoding of a unit

    def save() -> None:
        folder.save_point(point | {"digest": digest.hex(), "bad_rows_named": list(named),
                                   "splits": {name: writer.state() for name, writer in writers.items()}})

    saved, saved_shards, warned = time.monotonic(), [len(writer.shards) for writer in writers.values()], texts.warned
    with closing(encode_units(units, encoder, workers, folder.path / TOKENIZER_FILE)) as results, \
            cli.progress(desc="preparing", total=texts.bytes, initial=skipped, unit="B", unit_scale=True,
                         disable=texts.bytes <= SMALL_BYTES) as bar:  # bytes of source
        while True:
            try:
                size, encoded = next(results)
            except StopIteration:
                break
            except (UserError, KeyboardInterrupt) as error:  # what is done stays; before a mistake if it is worth it
                if folder.progress["units"] or not isinstance(error, UserError):
                    save()
                raise
            for split, tokens in encoded.splits.items():
                writers[split].add(tokens)
            point["units"] += 1
            for key, count in encoded.counts.items():
                point[key] += count
            digest = _chained(digest, encoded.digest)
            named += [row_name(*row) for row in encoded.bad_rows[:BAD_ROWS_NAMED - len(named)]]
            bar.update(size)
            replaced = encoded.counts["invalid_utf8"]
            if not warned and replaced > max(1, size * WORTH_A_WARNING):
                cli.note(f"warning: {replaced:,} of some {size:,} characters read are not UTF-8 and become U+FFFD; "
                         "convert the sources from their encoding (iconv) if that is not what you want")
                warned = True
            stop, shards = should_stop(), [len(writer.shards) for writer in writers.values()]
            if stop or shards != saved_shards or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved, saved_shards = time.monotonic(), shards
            if stop:
                raise PreparationStopped(f"stopped while preparing {str(folder.path)!r}")
    folder.progress |= point | {"bad_rows_named": named}


def _check_no_split_is_empty(index: dict) -> None:
    """Raise ConfigError if there is nothing to train on, or nothing to validate on though it was asked for."""
    none = "0 (data.val_fraction; no validation)"
    ways_out = {"train": f"give more text, or a smaller --val-fraction or {none}",
                "val": f"give more validation text, or a larger --val-fraction or {none}"}
    if index["val_split"] == "none":
        del ways_out["val"]
    dropped = sum(lengths["dropped"] for lengths in index.get("examples", {}).values())
    documents = sum(shard["documents"] for shard in index["shards"])
    for split, way_out in ways_out.items():
        if not any(shard["split"] == split for shard in index["shards"]):
            if index["val_split"] == "hash" and documents:
                way_out = (f"a hash of its text says where a document goes, and all {documents:,} went to the other "
                           "split, as equal ones do together; name validation text (--val, data.val_source), or "
                           f"give more different text, another --val-fraction or {none}")
            if dropped:
                way_out += (f", or cut examples: {dropped:,} were left out as too long (--too-long, data.too_long)")
            raise ConfigError(f"the {split} split holds 0 tokens; {way_out}")


def _summary(index: dict, bad_rows_named: list[str]) -> str:
    lines = []
    for split in ("train", "val"):
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        tokens, text_bytes = (sum(shard[key] for shard in shards) for key in ("tokens", "text_bytes"))
        line = f"{split} {tokens:,} tokens of {text_bytes:,} bytes in {len(shards)} shard{'s' * (len(shards) != 1)}"
        if lengths := index.get("examples", {}).get(split):
            count, tokens_before = lengths["examples"], lengths["tokens"] + lengths["cut_tokens"]
            cut = (f"; {lengths['truncated']:,} cut to fit, then {min(lengths['shortest'], index['row_tokens'])} to "
                   f"{index['row_tokens']}, {lengths['tokens'] / count:.1f} on average" if lengths["truncated"] else "")
            dropped = f", {lengths['dropped']:,} left out as too long" if lengths["dropped"] else ""
            line += (f" ({count:,} examples of {lengths['shortest']} to {lengths['longest']} tokens, "
                     f"{tokens_before / count:.1f} on average{cut}; {lengths['response_tokens']:,} tokens with loss"
                     f"{dropped}, rows {100 * lengths['tokens'] / tokens:.1f} % full)")
        lines.append(line)
    replaced = f", {index['invalid_utf8']:,} invalid UTF-8 sequences replaced" if index["invalid_utf8"] else ""
    if index["bad_rows"]:
        more = ", ..." if index["bad_rows"] > len(bad_rows_named) else ""
        replaced += f", {index['bad_rows']:,} bad rows left out ({', '.join(bad_rows_named)}{more})"
    if index["separators"]:
        replaced += f", {index['separators']:,} times the text spells end-of-text, "
        replaced += "where a document ends" if index["settings"]["parse_special"] else \
            "which is plain text in it (a document's end with --parse-special, data.parse_special=true)"
    if "row_tokens" in index:
        replaced += f"; {index['settings']['kind']} in rows of {index['row_tokens']:,} tokens, loss on the responses"
    return f"{', '.join(lines)}; tokenizer {index['tokenizer']}, {index['vocab_size']:,} ids{replaced}"


# ---- Command line ----------------------------------------------------------------------------------------------------

def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m data.prepare", allow_abbrev=False,
                        description="Turn text into token shards, or check a folder of them.")
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help=f"text file, {FORMATS}, a folder of those, a glob ('a/*.txt'), or {STDLIB}")
    parser.add_argument("--out", metavar="DIR", help="new or empty folder, or one that this command left unfinished")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, metavar="NAME",
                        help=f"bytes, bpe:N (N ids, trained on the text), {', '.join(TIKTOKEN_FILES)}, a "
                             f"{TOKENIZER_FILE} or a run folder (default {DEFAULT_TOKENIZER})")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--val-fraction", type=float, default=0.05, metavar="F",
                       help="share of the text set aside for validation (default 0.05)")
    split.add_argument("--val", nargs="+", action="extend", default=[], metavar="SOURCE",
                       help="validation text instead")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a .jsonl row or parquet column")
    parser.add_argument("--kind", choices=("auto", TEXT), default="auto",
                        help="auto: rows of examples are known by their fields; text: all rows are plain text")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard")
    parser.add_argument("--max-seq-len", type=int, metavar="N",
                        help="context of the model, for rows of prompt and response, text and label, or messages")
    parser.add_argument("--chat-template", metavar="FILE",
                        help="Jinja template for messages, - = from standard input (default: a plain one)")
    parser.add_argument("--too-long", choices=("cut", "drop", "error"), default="cut",
                        help="what becomes of rows of examples longer than the context (default cut)")
    parser.add_argument("--bad-rows", choices=("error", "skip"), default="error",
                        help="what becomes of rows that cannot be used; skip: left out and counted (default error)")
    parser.add_argument("--parse-special", action="store_true",
                        help=f"end-of-text spelled in a text, as {END_OF_TEXT}, ends a document")
    parser.add_argument("--verify", metavar="DIR", help="check every shard of a folder against its index.json")
    # From train.py: end with this process, and leave it to that one to say what the exit status means.
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.verify is not None:
        if args.sources or args.out is not None:
            raise UserError("--verify DIR stands alone; leave out SOURCE and --out")
        if not Path(args.verify).is_dir():
            raise UserError(f"--verify {args.verify!r} is no folder; name a folder of shards")
        problems = verify(Path(args.verify), cli.note)
        if problems:
            raise MachineError("; ".join(problems))
        return
    if args.out is None:
        raise UserError("--out DIR is missing; name the folder for the shards")
    if args.parent is not None:
        end_with(args.parent)
    template = DEFAULT_TEMPLATE if args.chat_template is None else read_template(args.chat_template)
    stop = cli.StopRequest(interrupts=True)
    try:
        prepare(args.sources, Path(args.out), tokenizer=args.tokenizer, val_fraction=args.val_fraction,
                val_sources=args.val, workers=args.workers, text_field=args.text_field, kind=args.kind,
                shard_tokens=args.shard_tokens, max_seq_len=args.max_seq_len, chat_template=template,
                too_long=args.too_long, bad_rows=args.bad_rows, parse_special=args.parse_special)
    except Busy:
        if args.parent is None:
            raise
        sys.exit(os.EX_TEMPFAIL)
    except (KeyboardInterrupt, WorkerDied):
        if not stop():
            if args.parent is None:
                raise
            sys.exit(os.EX_OSERR)  # prepared.py goes on without workers
        if args.parent is None:
            cli.note(f"stopped while preparing {args.out!r} ({stop.signal}); the same command goes on from there")
        sys.exit(128 + signal.Signals[stop.signal])


if __name__ == "__main__":
    exit_cleanly(main)
