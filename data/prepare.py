"""Text to token shards: `python -m data.prepare SOURCE ... --out DIR`; prepared.py runs it for train.py.

Writes DIR/train_00000.bin, val_00000.bin, ..., tokenizer.json and, last, index.json. The bytes depend on the text and
the settings alone, not on paths, time or the number of workers. The sources are cut into units of about 1 MB, in order,
which worker processes read and encode; this process appends their tokens, in order, to the open shard of their split,
and writes .progress.json every few seconds: units done and tokens in each open shard. After kill -9 the same command
cuts the open shards back to that, and goes on with the next unit. Memory holds a few units for each worker.

A document ends with end-of-text. A text split by characters may be cut inside a document: its first part, the end of
train, then has no end-of-text, for the document did not end there; its rest starts val.
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from shlex import quote

import numpy as np

import cli
import files
from config import ConfigError, MachineError, UserError, exit_cleanly
from data.chat import DEFAULT_TEMPLATE, TEMPLATE_FILE, read_template, save_template
from data.dataset import INDEX_FORMAT, files_of, load_index
from data.examples import ROWS_PER_UNIT, Example, Packing, examples, first_example, packed, texts_of_examples
from data.rows import CHAT, TEXT, find_kind
from data.shards import TRACKS
from data.source_files import FORMATS
from data.sources import (
    STDLIB,
    TextFile,
    Texts,
    Unit,
    choose_split,
    describe,
    find_files,
    split_of,
    texts_of,
)
from data.text import WORTH_A_WARNING
from data.tokenizer import TIKTOKEN_FILES, TOKENIZER_FILE, Tokenizer, load_tokenizer, tokenizer_identity, train_bpe
from data.verify_shards import verify
from data.write_shards import MAX_SHARD_TOKENS, Encoded, SplitWriter, dtype_for, write_index

DEFAULT_TOKENIZER = "gpt2"
SMALL_BYTES = 8 << 20  # below this, starting workers takes longer than they save
UNITS_PER_WORKER = 3  # encoded or waiting at a time
CHECKPOINT_SECONDS = 5.0
BPE_SAMPLE_BYTES = 200_000_000

PROGRESS_FILE = ".progress.json"
LOCK_FILE = ".lock"
ORPHAN_SECONDS = 0.5  # between two looks whether the parent lives


class Busy(UserError):
    """Another process is preparing the same folder."""


class WorkerDied(MachineError):
    """Of too little memory, or by the signal that was to end us all."""


class PreparationStopped(Exception):
    """should_stop() said so; what is done is kept, and the same call goes on."""


# ---- Encoding units, here or in worker processes ---------------------------------------------------------------------

class Encoder:
    """Encodes units; each worker process has one. packing: the units hold examples, not texts."""

    def __init__(self, tokenizer: Tokenizer, val_fraction: float, text_field: str, packing: Packing | None = None):
        self.tokenizer, self.val_fraction, self.text_field = tokenizer, val_fraction, text_field
        self.packing = packing
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.token_bytes = tokenizer.token_bytes()

    def encode(self, unit: Unit) -> tuple[dict[str, Encoded], int]:
        """Tokens by split, and how many invalid UTF-8 sequences were replaced."""
        if self.packing is not None:
            return self._encode_examples(unit, self.packing)
        tokens: dict[str, list[np.ndarray]] = {}
        text_bytes, documents, invalid_in_all = Counter(), Counter(), 0
        for text, invalid in texts_of(unit, self.text_field):
            split = unit.split or split_of([text], self.val_fraction)
            tokens.setdefault(split, []).append(self.tokenizer.encode(text).astype(self.dtype))
            if unit.ends:
                tokens[split].append(np.array([self.tokenizer.eot], dtype=self.dtype))
            text_bytes[split] += len(text) if text.isascii() else len(text.encode())
            documents[split] += unit.ends
            invalid_in_all += invalid
        return {split: Encoded(np.concatenate(parts), text_bytes[split], documents[split])
                for split, parts in tokens.items()}, invalid_in_all

    def _encode_examples(self, unit: Unit, packing: Packing) -> tuple[dict[str, Encoded], int]:
        found: dict[str, list[Example]] = {}
        dropped, invalid_in_all = Counter(), 0
        for example, invalid in examples(unit, packing, self.tokenizer):
            if example is None:
                dropped[unit.split or "train"] += 1
            else:
                found.setdefault(unit.split or split_of([example.text], self.val_fraction), []).append(example)
            invalid_in_all += invalid
        encoded = {}
        for split in (*found, *(dropped.keys() - found.keys())):
            members = found.get(split, [])
            tokens, loss, start = packed(members, packing.row_tokens, self.tokenizer.eot)
            lengths = [len(example.ids) + example.cut for example in members]
            ends = {"shortest": min(lengths), "longest": max(lengths)} if members else {}
            encoded[split] = Encoded(
                tokens.astype(self.dtype).reshape(-1), int(self.token_bytes[tokens].sum()), len(members),
                {"loss": loss.reshape(-1), "start": start.reshape(-1)},
                {"examples": len(members), "tokens": sum(len(example.ids) for example in members),
                 "response_tokens": sum(int(example.scored.sum()) for example in members), **ends,
                 "truncated": sum(example.cut > 0 for example in members), "dropped": dropped[split],
                 "cut_tokens": sum(example.cut for example in members)})
        return encoded, invalid_in_all


_encoder: Encoder | None = None  # of a worker process


def _start_worker(parent: int, tokenizer_file: str, val_fraction: float, text_field: str,
                  packing: Packing | None) -> None:
    global _encoder
    end_with(parent)  # a pool that was killed cannot tell its workers, and they hold each other's end of its pipe
    _encoder = Encoder(load_tokenizer(tokenizer_file), val_fraction, text_field, packing)


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended."""
    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode_in_worker(unit: Unit) -> tuple[dict[str, Encoded], int]:
    return _encoder.encode(unit)


def encode_units(units: Iterator[Unit], encoder: Encoder, workers: int, tokenizer_file: Path) \
        -> Iterator[tuple[int, dict[str, Encoded], int]]:
    """(source bytes, tokens by split, invalid sequences) of each unit, in order; workers = 0: in this process."""
    if not workers:
        for unit in units:
            yield unit.bytes, *encoder.encode(unit)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    # Processes inherit blocked signals: Ctrl-C reaches this one alone, which ends the workers in order. SIGINT comes
    # second, for multiprocessing unblocks it when it starts its resource tracker, which ignores it anyway.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGHUP])
    arguments = (os.getpid(), str(tokenizer_file), encoder.val_fraction, encoder.text_field, encoder.packing)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pending = deque()
    try:
        for _ in range(workers):
            pool.submit(int)  # anything: a process starts
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for unit in units:
            pending.append((unit.bytes, pool.submit(_encode_in_worker, unit)))
            if len(pending) >= UNITS_PER_WORKER * workers:
                size, future = pending.popleft()
                yield size, *future.result()
        for size, future in pending:
            yield size, *future.result()
    except BrokenProcessPool:
        raise WorkerDied("a worker process died (out of memory? It takes less with fewer --workers)") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---- The output folder -----------------------------------------------------------------------------------------------

class OutputFolder:
    """The folder while it is being filled: locked, with .progress.json saying what is done."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.progress = {"settings": settings, "tokenizer_sha256": None, "units": 0, "invalid_utf8": 0, "splits": {}}
        self._made = not path.exists()
        self._lock = ExitStack()

    def open(self) -> dict | None:
        """Make and lock the folder; the index if it is finished, else None. Raises UserError if it is not ours."""
        try:
            try:
                files.make_folder(self.path)
            except FileExistsError:
                if not self.path.is_dir():
                    raise
            self._acquire_lock()
            return self._claim()
        except files.Locked:
            raise Busy(f"another process is preparing {str(self.path)!r}; wait for it, or name another folder (--out, "
                       "data.dir)") from None
        except OSError as error:
            raise UserError(f"output folder {str(self.path)!r} cannot be written: {error.strerror}; name another "
                            "(--out, data.dir)") from None

    def _acquire_lock(self) -> None:
        path, is_ours = self.path / LOCK_FILE, False
        while not is_ours:  # else whoever held it finished, and removed it between our open and our lock
            self._lock.close()
            lock = self._lock.enter_context(files.locked(path))
            with suppress(FileNotFoundError):
                is_ours = os.path.samestat(os.fstat(lock), os.stat(path))
        self._lock.callback(path.unlink, missing_ok=True)

    def _claim(self) -> dict | None:
        index = load_index(self.path)
        if index is not None:
            refuse_differences(self.path, made_with(index), self.settings, way_out=another_folder(self.path))
            if (self.path / PROGRESS_FILE).exists():  # killed right after index.json was written
                self._remove_all_but(index)
            return index
        names = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE, f".{PROGRESS_FILE}.tmp"}
        if PROGRESS_FILE in names:
            try:
                self.progress = files.parse_json((self.path / PROGRESS_FILE).read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"output folder {str(self.path)!r}: {PROGRESS_FILE} is damaged; remove the folder and "
                                "start again") from None
            refuse_differences(self.path, self.progress["settings"], self.settings, way_out="it is not finished: give "
                               "the command that began it again, name another folder (--out, data.dir) or remove it")
        elif names:
            raise UserError(f"output folder {str(self.path)!r} is not empty, it holds "
                            f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}; name an empty or new "
                            "one (--out, data.dir); to train on these shards as they are: data.source=[]")
        return None

    def save(self, **changes) -> None:
        """Write .progress.json with changes."""
        self.progress |= changes
        files.write_whole(self.path / PROGRESS_FILE, json.dumps(self.progress))

    def finish(self, index: dict) -> None:
        """Write index.json; what was needed on the way goes."""
        write_index(self.path, index)
        self._remove_all_but(index)

    def discard(self) -> None:
        """Remove all that was written: a mistake of the user's leaves nothing behind."""
        self._remove_all_but({"shards": []}, TOKENIZER_FILE, "tokenizer_config.json", TEMPLATE_FILE)

    def _remove_all_but(self, index: dict, *others: str) -> None:
        """Remove what prepare() makes on its way but the shards of an index. Only for a folder with .progress.json."""
        keep = {name for shard in index["shards"] for name in files_of(shard)}
        for pattern in ("*.tmp", ".train_*.part", ".val_*.part", "train_*.bin", "val_*.bin", PROGRESS_FILE, *others):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock, and of a folder made for nothing."""
        with suppress(OSError):
            self._lock.close()
        if self._made:
            with suppress(OSError):  # it is not empty
                self.path.rmdir()


def made_with(index: dict) -> dict:
    """The settings of an index. Where there was no choice of too_long yet and nothing was too long, it says "cut"."""
    settings = index.get("settings", {})
    is_cut = any(counts["truncated"] for counts in index.get("examples", {}).values())
    return settings if is_cut or "kind" not in settings else {"too_long": "cut"} | settings


def refuse_differences(folder: Path, theirs: dict, ours: dict, *, way_out: str) -> None:
    """Raise ConfigError listing how the settings that made a folder differ from ours."""
    lines = [f"{key}: {json.dumps(theirs.get(key))} -> {json.dumps(ours[key])}" for key in ours
             if theirs.get(key) != ours[key]]
    if lines:
        raise ConfigError(f"data folder {str(folder)!r} was made with other settings ({'; '.join(lines)}); "
                          f"{way_out}")


def another_folder(folder: Path) -> str:
    """The ways out for a finished folder."""
    return ("name another folder (--out, data.dir) or remove this one; to train on it as it is: data.source=[] "
            f"data.dir={quote(str(folder))}")


# ---- prepare() -------------------------------------------------------------------------------------------------------

def prepare(sources: Sequence[str], out_dir: Path, *, tokenizer: str = DEFAULT_TOKENIZER,
            val_fraction: float = 0.05, val_sources: Sequence[str] = (), workers: int | None = None,
            text_field: str = "text", kind: str = "auto", shard_tokens: int = 100_000_000,
            max_seq_len: int | None = None, chat_template: str = DEFAULT_TEMPLATE, too_long: str = "cut",
            should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Write the shards of sources into out_dir, or go on with it, or find it done; the index.

    max_seq_len, chat_template (its text) and too_long are for rows of examples. should_stop is asked after each unit.
    Raises UserError (nothing stays written), MachineError and PreparationStopped (the same call goes on).
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
                "text_field": text_field} | ({"kind": kind} if kind == TEXT else {})
    text_files = [file for source in sources for file in find_files(source, cli.note)]
    val_files = [file for source in val_sources for file in find_files(source, cli.note)]
    packing = choose_packing(text_files + val_files, text_field, max_seq_len, chat_template, too_long, kind)
    if packing is None:
        texts = choose_split(text_files, val_files, val_fraction, text_field)
    else:
        texts = choose_split(text_files, val_files, val_fraction, None,
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
        return _fill(folder, texts, tokenizer, packing=packing, workers=workers, should_stop=should_stop)
    except OSError as error:
        raise MachineError(f"writing {str(folder.path)!r} failed: {error.strerror}; make room and give the same "
                           "command again: it goes on") from None
    except MachineError as error:
        raise type(error)(f"{error}; give the same command again: it goes on") from None
    finally:
        folder.close()


def choose_packing(text_files: Sequence[TextFile], text_field: str, max_seq_len: int | None, chat_template: str,
                   too_long: str, kind: str = "auto") -> Packing | None:
    """How the rows of examples in these files are packed; None if they hold plain text. Raises UserError."""
    kind = find_kind(text_files, text_field, kind)
    if kind == TEXT:
        return None
    if max_seq_len is None or max_seq_len < 1:
        what = "is missing" if max_seq_len is None else f"= {max_seq_len} should be at least 1"
        raise UserError(f"--max-seq-len {what}: source {text_files[0].path!r} holds {kind}, which is packed into rows "
                        "of the model's context; name that (model.max_seq_len), or say that the texts in a field are "
                        "to be learnt as they are (--kind text, data.kind=text)")
    return Packing(kind, max_seq_len, chat_template if kind == CHAT else "", too_long)


def _fill(folder: OutputFolder, texts: Texts, tokenizer_name: str, *, packing: Packing | None, workers: int,
          should_stop: Callable[[], bool]) -> dict:
    """Write what the folder lacks; the index."""
    try:
        tokenizer = _tokenizer_of(folder, texts, tokenizer_name, packing)
        writers = {split: SplitWriter(folder.path, split, tokenizer, shard_tokens=folder.settings["shard_tokens"],
                                      tracks=() if packing is None else TRACKS,
                                      state=folder.progress["splits"].get(split)) for split in ("train", "val")}
        encoder = Encoder(tokenizer, texts.val_fraction, texts.text_field, packing)
        invalid = _encode_texts(folder, texts, encoder, writers, workers=workers, should_stop=should_stop)
        for writer in writers.values():
            writer.finish_shard()
        shards = [shard for writer in writers.values() for shard in writer.shards]
        index = {"format": INDEX_FORMAT, "tokenizer": folder.settings["tokenizer"],
                 "tokenizer_sha256": tokenizer.fingerprint, "dtype": encoder.dtype.name,
                 "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "settings": folder.settings,
                 "val_split": texts.val_split, "invalid_utf8": invalid, "shards": shards}
        if packing is not None:
            index |= {"row_tokens": packing.row_tokens,
                      "examples": {split: writer.lengths for split, writer in writers.items() if writer.lengths}}
        _check_no_split_is_empty(index)
        folder.finish(index)
    except UserError:
        folder.discard()
        raise
    cli.note(f"{folder.path}: {_summary(index)}")
    if packing is not None:
        cli.note(f"its first example, with what the loss counts in [[ ]]: {first_example(folder.path, tokenizer)}")
    return index


def _tokenizer_of(folder: OutputFolder, texts: Texts, name: str, packing: Packing | None) -> Tokenizer:
    """The tokenizer, loaded or trained on the training split and saved in the folder, where a second start finds it;
    the chat template beside it."""
    path = folder.path / TOKENIZER_FILE
    if folder.progress["tokenizer_sha256"] is not None:
        tokenizer = load_tokenizer(str(path))
        if tokenizer.fingerprint != folder.progress["tokenizer_sha256"]:
            raise UserError(f"tokenizer {str(path)!r} was changed meanwhile; start again")
        return tokenizer
    folder.save()  # from here on the folder is ours
    if packing is not None and packing.kind == CHAT:
        save_template(folder.path, packing.chat_template)
    if name.startswith("bpe:"):
        vocab_size = int(name[4:]) if name[4:].isdecimal() else 0
        cli.note(f"training tokenizer {name}")
        tokenizer = train_bpe(_training_texts(texts, packing), vocab_size)
    else:
        tokenizer = load_tokenizer(name)
    tokenizer.save(path)
    folder.save(tokenizer_sha256=tokenizer.fingerprint)
    return tokenizer


def _training_texts(texts: Texts, packing: Packing | None = None) -> Iterator[str]:
    """Texts of the training split, in all about BPE_SAMPLE_BYTES, from units spread evenly over it."""
    stride = math.ceil(texts.bytes / BPE_SAMPLE_BYTES)
    for unit in itertools.islice(texts.units(cuttable=True), 0, None, stride):
        if unit.split == "val":
            continue
        found = (([text], text) for text, _ in texts_of(unit, texts.text_field)) if packing is None else \
            texts_of_examples(unit, packing.kind)
        for parts, hashed in found:
            if unit.split == "train" or split_of([hashed], texts.val_fraction) == "train":
                yield from parts


def _encode_texts(folder: OutputFolder, texts: Texts, encoder: Encoder, writers: dict[str, SplitWriter], *,
                  workers: int, should_stop: Callable[[], bool]) -> int:
    """Append the tokens of all units that .progress.json does not count yet, and keep it up to date.

    Returns how many invalid UTF-8 sequences were replaced in all.
    """
    done, invalid = folder.progress["units"], folder.progress["invalid_utf8"]
    units = texts.units(cuttable=encoder.tokenizer.cuttable)
    skipped = sum(unit.bytes for unit in itertools.islice(units, done))
    saved, saved_shards, warned = time.monotonic(), None, texts.warned
    with closing(encode_units(units, encoder, workers, folder.path / TOKENIZER_FILE)) as results, \
            cli.progress(desc="preparing", total=texts.bytes, initial=skipped, unit="B", unit_scale=True,
                         disable=texts.bytes <= SMALL_BYTES) as bar:  # bytes of source
        for size, encoded, replaced in results:
            for split, tokens in encoded.items():
                writers[split].add(tokens)
            done, invalid = done + 1, invalid + replaced
            bar.update(size)
            if not warned and replaced > max(1, size * WORTH_A_WARNING):
                cli.note(f"warning: {replaced:,} of some {size:,} characters read are not UTF-8 and become U+FFFD; "
                         "convert the sources from their encoding (iconv) if that is not what you want")
                warned = True
            stop, shards = should_stop(), [len(writer.shards) for writer in writers.values()]
            if stop or shards != saved_shards or time.monotonic() - saved > CHECKPOINT_SECONDS:
                folder.save(units=done, invalid_utf8=invalid, splits={name: w.state() for name, w in writers.items()})
                saved, saved_shards = time.monotonic(), shards
            if stop:
                raise PreparationStopped(f"stopped while preparing {str(folder.path)!r}")
    return invalid


def _check_no_split_is_empty(index: dict) -> None:
    """Raise ConfigError if there is nothing to train on, or nothing to validate on though it was asked for."""
    ways_out = {"train": "more text, or a smaller --val-fraction (data.val_fraction; 0 = no validation)",
                "val": "more validation text, a larger --val-fraction (data.val_fraction; 0 = no validation)"}
    if index["val_split"] == "none":
        del ways_out["val"]
    dropped = sum(lengths["dropped"] for lengths in index.get("examples", {}).values())
    for split, way_out in ways_out.items():
        if not any(shard["split"] == split for shard in index["shards"]):
            cut = f", or cut examples: {dropped:,} were left out as too long (--too-long, data.too_long)"
            raise ConfigError(f"the {split} split holds 0 tokens; give {way_out}{cut if dropped else ''}")


def _summary(index: dict) -> str:
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
    template = DEFAULT_TEMPLATE
    if args.chat_template is not None:
        template = read_template(args.chat_template)
    stop = cli.StopRequest()
    try:
        prepare(args.sources, Path(args.out), tokenizer=args.tokenizer, val_fraction=args.val_fraction,
                val_sources=args.val, workers=args.workers, text_field=args.text_field, kind=args.kind,
                shard_tokens=args.shard_tokens, max_seq_len=args.max_seq_len, chat_template=template,
                too_long=args.too_long, should_stop=stop)
    except Busy:
        if args.parent is None:
            raise
        sys.exit(os.EX_TEMPFAIL)
    except (PreparationStopped, WorkerDied):
        if not stop():
            if args.parent is None:
                raise
            sys.exit(os.EX_OSERR)  # prepared.py goes on without workers
        if args.parent is None:
            cli.note(f"stopped while preparing {args.out!r} ({stop.signal}); the same command goes on from there")
        sys.exit(128 + signal.Signals[stop.signal])


if __name__ == "__main__":
    exit_cleanly(main)
