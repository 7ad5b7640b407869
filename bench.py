"""Benchmarks of every hot path against PyTorch and peers: `python bench.py COMMAND [--json FILE]`.

Commands: train, data, sample, serve, kernels, checkpoint. Each prints the setting it ran in and a table, and with
--json writes the same. Contenders take turns within a repeat; a figure is the median of the repeats, and a ratio is
taken within each repeat, so that the machine's drift cancels. Peers run as they are, in processes of their own; none of
their code is here, and nothing of theirs is unpickled.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import heapq
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import bench_kernels
import checkpoint
import distributed
import eval as evaluation
import kernels
import sample
from config import Config, MachineError, ModelConfig, UserError, exit_cleanly, parse_arguments, to_toml
from data.loader import MicroBatch, TrainLoader
from data.prepare import SMALL_BYTES, prepare
from data.shards import open_dataset, open_split
from data.sources import STDLIB, UNIT_BYTES, documents, find_files, whole_document_units
from data.tokenizer import GPT2_PATTERN, TIKTOKEN_FILES, load_tokenizer, train_bpe
from distributed import World
from kernels import self_check
from metrics import format_table
from model import GPT, padded_vocab_size
from optim import LossScale, Optimizer
from train import train_step

CHECKOUT = Path(__file__).resolve().parent
CPU = torch.device("cpu")
BUSY_PERCENT = 5.0  # of the CPU taken by other processes, from which figures are not to be trusted
Result = TypeVar("Result")


# ----------------------------------------------------------------------------------------------------------------------
# Figures: samples, medians, ratios, the table

Contender = Callable[[int], dict[str, float]]  # number of the repeat -> quantity: value


class Figures:
    """Samples of each (subject, quantity), one per repeat. A quantity's name ends with its unit."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[float]] = {}

    def add(self, subject: str, values: dict[str, float]) -> None:
        for quantity, value in values.items():
            self.samples.setdefault((subject, quantity), []).append(value)

    def add_ratios(self, label: str, ours: str, peer: str, quantities: Iterable[str]) -> None:
        """ours / peer of each repeat as subject `label`, for the quantities that both have."""
        for quantity in quantities:
            pair = [self.samples.get((subject, quantity)) for subject in (ours, peer)]
            if all(pair):
                self.samples[label, f"ratio of {quantity}"] = [a / b for a, b in zip(*pair, strict=True)]

    def rows(self) -> list[dict]:
        return [{"subject": subject, "quantity": quantity, "median": statistics.median(samples),
                 "p10": float(np.percentile(samples, 10)), "p90": float(np.percentile(samples, 90)),
                 "repeats": len(samples), "samples": samples}
                for (subject, quantity), samples in self.samples.items()]

    def table(self) -> str:
        """A line per subject, a column per quantity; subjects of other quantities in a table of their own."""
        cells: dict[str, dict[str, str]] = {}
        for row in self.rows():
            spread = f" ({_text(row['p10'])}-{_text(row['p90'])})" if row["repeats"] > 1 else ""
            cells.setdefault(row["subject"], {})[row["quantity"]] = _text(row["median"]) + spread
        tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for subject, values in cells.items():
            tables.setdefault(tuple(values), []).append((subject, *values.values()))
        repeats = sorted({len(samples) for samples in self.samples.values()})
        lines = [f"median (p10-p90) of {' or '.join(map(str, repeats))} repeats"]
        return "\n\n".join(lines + [format_table(("", *quantities), rows) for quantities, rows in tables.items()])


def _text(value: float) -> str:
    """Four significant digits, and all digits before the point."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def take_turns(contenders: dict[str, Contender], repeats: int, figures: Figures) -> None:
    """Run every contender once per repeat; who begins changes, since the first after a pause finds a cooler machine."""
    names = list(contenders)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            values = contenders[name](repeat)
            figures.add(name, values)
            _note(f"{repeat + 1}/{repeats} {name}: " + ", ".join(f"{_text(v)} {q}" for q, v in values.items()))


def seconds_of(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


# ----------------------------------------------------------------------------------------------------------------------
# The setting

class OthersCpu:
    """CPU time that other processes take, from Linux's /proc/stat. Processes of ours count as ours once they ended."""

    def __init__(self) -> None:
        self._start = self._now()

    def percent(self) -> float | None:
        """Share of all cores since this was made; None where /proc/stat is missing."""
        now = self._now()
        if now is None:
            return None
        busy, total, own = (b - a for a, b in zip(self._start, now, strict=True))
        return round(100.0 * max(0.0, busy - own) / total, 1) if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds on all cores together: busy, busy or idle, ours."""
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        idle = ticks[3] + ticks[4]  # idle, iowait
        per_second = os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - idle) / per_second, sum(ticks) / per_second, sum(os.times()[:4])


def describe_machine() -> dict:
    """What every benchmark states first. Takes a second, in which others' work is watched."""
    others = OthersCpu()
    time.sleep(1.0)
    busy = others.percent()
    warn_if_busy(busy, "before the start")
    return {"cpu": _cpu_model(), "cores": _cores(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": _commit(CHECKOUT),
            "load average": [round(load, 2) for load in os.getloadavg()], "others' CPU % before": busy}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str:
    try:
        git = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True,
                             text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no git)"
    return git.stdout.strip() if git.returncode == 0 else "unknown (not a git checkout)"


def warn_if_busy(percent: float | None, when: str) -> None:
    if percent is not None and percent > BUSY_PERCENT:
        _note(f"warning: other processes use {percent:.0f} % of the CPU {when}; do not trust figures taken now")


# ----------------------------------------------------------------------------------------------------------------------
# Processes: one that runs to its end, one that answers requests

# Started by a small process of its own: Linux counts the memory of whoever started a process to its peak.
LAUNCHER = """
import json, os, sys, time
started = time.monotonic()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
ended = time.monotonic()
unit = 1 if sys.platform == "darwin" else 1024
with open(sys.argv[1], "w") as file:
    json.dump({"started": started, "ended": ended, "peak_bytes": unit * usage.ru_maxrss,
               "status": os.waitstatus_to_exitcode(status)}, file)
"""


@dataclass(frozen=True)
class Finished:
    started: float  # time.monotonic(), which all processes share, just before the interpreter starts
    ended: float
    peak_bytes: int  # resident
    output: str  # stdout and stderr

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def run_to_end(command: list[str], *, cwd: Path) -> Finished:
    """Raises MachineError with the process's last line if it fails."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        answer = Path(folder, "answer.json")
        done = subprocess.run([sys.executable, "-I", "-S", "-c", LAUNCHER, str(answer), *command], cwd=cwd, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
                              env=os.environ | {"PYTHONUTF8": "1"})
        result = json.loads(answer.read_text()) if answer.exists() else {"status": done.returncode}
    if result.pop("status") != 0:
        raise MachineError(f"{_short(command)} failed: {_last_line(done.stdout)}")
    return Finished(output=done.stdout, **result)


# What every worker script begins with. Whatever a peer prints goes to stderr, answers to the real stdout.
WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

def serve(work):
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(**json.loads(line))), file=answers, flush=True)
"""


class Worker:
    """A process that runs `script` once, then answers requests: JSON objects, a line each. Ends with the block."""

    def __init__(self, script: str, *arguments: str, cwd: Path, isolated: bool = False):
        """isolated: without PYTHONPATH and cwd on its import path. Writes no bytecode beside a peer's files."""
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-B", *(["-I"] if isolated else []), "-c", WORKER + script, *arguments], cwd=cwd,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def send(self, **request: object) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict:
        """The next answer; the first one, {}, says that the process is ready. Raises MachineError if it died."""
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise MachineError(f"a process that was measured ended early: {_last_line(self._errors.read())}")
        return json.loads(line)

    def ask(self, **request: object) -> dict:
        self.send(**request)
        return self.receive()


def _short(command: list[str]) -> str:
    return shlex.join(word if len(word) < 80 else "..." for word in command)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(it printed nothing)"])[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Text

def read_documents(source: str, *, limit_bytes: float) -> list[str]:
    """Documents of a SOURCE of data.prepare, in order, until they hold limit_bytes of UTF-8. Raises SourceError."""
    texts, size = [], 0
    units = whole_document_units(find_files(source), "train", val_fraction=0.0, unit_bytes=sys.maxsize)
    for text, _ in itertools.chain.from_iterable(documents(unit, "text") for unit in units):
        texts.append(text)
        size += len(text.encode())
        if size >= limit_bytes:
            break
    if not texts:
        raise UserError(f"source {source!r} holds no text; name another")
    return texts


def repeated(texts: list[str], *, size: float) -> list[str]:
    """The texts over and over until they hold `size` bytes of UTF-8."""
    chosen, total = [], 0
    for text in itertools.cycle(texts):
        if total >= size:
            return chosen
        chosen.append(text)
        total += len(text.encode())


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# bench.py train: our train.py beside nanoGPT's, in speed and in loss

DEFAULT_TRAIN_CONFIGS = (("shakespeare_nanogpt.toml",), ("shakespeare_nanogpt.toml", "train.dtype=float32"),
                         ("shakespeare.toml",))
DEFAULT_TEXT_BYTES = 1_115_394  # of python-stdlib where no text is named: as much as tinyshakespeare has
WARMUP_STEPS = 20
VAL_FRACTION = 0.1  # nanoGPT's, the end of the text
SCORE_WINDOW = 64  # characters of context that every model is scored with
NANOGPT = "nanoGPT"
NANOGPT_HEADS, NANOGPT_CONTEXT, NANOGPT_BATCH = 4, 64, 12
NANOGPT_FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py",
                 "data/shakespeare_char/prepare.py")

# Runs a script that leaves `model` in its globals, without its fixed seed; notes when it ended, then saves the weights.
NANOGPT_TRAIN = """
import json, runpy, sys, time, torch
seed, ended_file, weights_file, *sys.argv[1:] = sys.argv[1:]
set_seed = torch.manual_seed
torch.manual_seed = lambda _: set_seed(int(seed))
model = runpy.run_path("train.py", run_name="__main__")["model"]
with open(ended_file, "w") as file:
    json.dump(time.monotonic(), file)
from safetensors.torch import save_file
tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}  # tied to wte
save_file(tensors, weights_file)
"""


def bench_train(args: argparse.Namespace, figures: Figures) -> dict:
    """Every config and the peer, trained once per seed and repeat, timed from outside and scored alike."""
    configs = args.config or _default_configs()
    words_of = {_label(words): words for words in configs}
    if len(words_of) < len(configs):
        raise UserError("--config names the same contender twice; leave one out (--repeats repeats all)")
    for words in configs:
        parse_arguments(words)  # a mistake ends the benchmark before the first run
    peer = args.peer and check_nanogpt(args.peer)
    text = read_text(args.data)
    val_text = text[int(len(text) * (1 - VAL_FRACTION)):]
    setting = describe_machine()
    setting["dtype"] = "float32, or where a config says auto: {} ({})".format(*distributed.choose_dtype("auto", CPU))
    setting["text"] = f"{args.data or STDLIB}, {len(text):,} characters, {len(set(text))} different ones"
    setting["loss"] = f"the last {len(val_text):,} characters but the first, windows of {SCORE_WINDOW}, float32"
    setting["seeds"] = args.seeds
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        folder = Path(name)
        text_file = folder / "input.txt"
        text_file.write_text(text, encoding="utf-8", newline="")
        contenders = {label: _our_trainer(words, text_file, val_text, args.seeds) for label, words in words_of.items()}
        if peer:
            checkout, seconds = copy_nanogpt(peer, text_file, folder / "nanogpt")
            setting["peer"] = f"{peer}, commit {_commit(peer)}, its data prepared apart in {seconds:.2f} s"
            contenders[NANOGPT] = _nanogpt_trainer(checkout, args.peer_steps, text, val_text, args.seeds)
        take_turns(contenders, args.repeats * len(args.seeds), figures)
    for label in words_of if peer else ():
        figures.add_ratios(f"{label} / {NANOGPT}", label, NANOGPT,
                           ("steps/s", "tokens/s", "wall s", "peak MiB", "val nats/char"))
    return setting


def _default_configs() -> list[list[str]]:
    return [[str(CHECKOUT / "configs" / name), *overrides] for name, *overrides in DEFAULT_TRAIN_CONFIGS]


def _label(words: list[str]) -> str:
    return "flatgpt " + " ".join(Path(word).stem if word.endswith(".toml") and "=" not in word else word
                                 for word in words)


def read_text(source: str | None) -> str:
    """All text of a source, lines ended by a newline alone, as Python reads text files (nanoGPT does)."""
    limit = DEFAULT_TEXT_BYTES if source is None else float("inf")
    text = "".join(read_documents(source or STDLIB, limit_bytes=limit))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _our_trainer(words: list[str], text_file: Path, val_text: str, seeds: list[int]) -> Contender:
    tokens_per_step = parse_arguments(words)[0].train.tokens_per_step

    def train_once(repeat: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=text_file.parent) as folder:
            run_dir = Path(folder, "run")
            done = run_to_end(
                [sys.executable, str(CHECKOUT / "train.py"), "train.device=cpu", *words, "train.log_every=1",
                 f"train.seed={seeds[repeat % len(seeds)]}", f"train.out_dir={run_dir}", f"data.dir={folder}/shards",
                 f"data.source={text_file}", "data.val_source=[]", f"data.val_fraction={VAL_FRACTION}"], cwd=Path.cwd())
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
            loss = score_run(run_dir, val_text)
        known_mfu = [row["mfu"] for row in rows[len(_warm(rows)):] if row["mfu"] is not None]
        return {**_speed([row["seconds"] for row in rows], tokens_per_step),
                **({"mfu %": 100 * statistics.median(known_mfu)} if known_mfu else {}),
                "wall s": done.seconds, "peak MiB": done.peak_bytes / 2 ** 20, "val nats/char": loss}

    return train_once


def _warm(steps: list) -> list:
    """The steps that are not measured: the first 20, of a short run at most half."""
    return steps[:min(WARMUP_STEPS, len(steps) // 2)]


def _speed(seconds: list[float], tokens_per_step: int) -> dict[str, float]:
    median = statistics.median(seconds[len(_warm(seconds)):])
    return {"ms/step": 1e3 * median, "steps/s": 1 / median, "tokens/s": tokens_per_step / median}


def score_run(run_dir: Path, text: str) -> float:
    model, tokenizer = sample.load_model(run_dir, device=CPU, dtype="float32", note=lambda line: None)
    return nats_per_character(model, tokenizer.encode(text), tokenizer.token_bytes(), text)


def nats_per_character(model: GPT, ids: np.ndarray, token_bytes: np.ndarray, text: str) -> float:
    """Loss over all of a text but its first token, in windows that do not overlap; ids (n,) encode it."""
    window = min(SCORE_WINDOW, model.config.max_seq_len)
    batches = evaluation.text_batches(ids[1:], eot=int(ids[0]), seq_len=window, batch_size=64, device=CPU)
    score = evaluation.evaluate(model, batches, token_bytes=token_bytes, device=CPU)
    characters = score.bytes * len(text) / len(text.encode())
    return score.loss * score.tokens / characters


def check_nanogpt(path: str) -> Path:
    missing = [name for name in NANOGPT_FILES if not Path(path, name).is_file()]
    if missing:
        raise UserError(f"--peer {path!r} is no nanoGPT checkout, it has no {missing[0]}; name the folder of one")
    return Path(path).resolve()


def copy_nanogpt(peer: Path, text_file: Path, folder: Path) -> tuple[Path, float]:
    """A copy of what nanoGPT's Shakespeare demo needs, its data prepared; the copy and the seconds preparing took."""
    for name in NANOGPT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(peer / name, folder / name)
    script = folder / NANOGPT_FILES[-1]
    shutil.copy(text_file, script.with_name("input.txt"))
    return folder, run_to_end([sys.executable, str(script)], cwd=folder).seconds


def _nanogpt_trainer(checkout: Path, steps: int, text: str, val_text: str, seeds: list[int]) -> Contender:
    """README's CPU demo of nanoGPT."""
    options = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
               "--log_interval=1", f"--block_size={NANOGPT_CONTEXT}", f"--batch_size={NANOGPT_BATCH}", "--n_layer=4",
               f"--n_head={NANOGPT_HEADS}", "--n_embd=128", f"--max_iters={steps}", f"--lr_decay_iters={steps}",
               "--dropout=0.0"]
    ended, weights = checkout / "ended.json", checkout / "weights.safetensors"

    def train_once(repeat: int) -> dict[str, float]:
        done = run_to_end([sys.executable, "-c", NANOGPT_TRAIN, str(seeds[repeat % len(seeds)]), str(ended),
                           str(weights), *options], cwd=checkout)
        steps_ms = re.findall(r"^iter \d+: loss .*?, time ([\d.]+)ms", done.output, re.MULTILINE)
        if not steps_ms:
            raise MachineError(f"nanoGPT printed no step times: {_last_line(done.output)}")
        model = gpt_from_nanogpt(load_file(weights), n_head=NANOGPT_HEADS)
        return {**_speed([float(ms) / 1e3 for ms in steps_ms], NANOGPT_BATCH * NANOGPT_CONTEXT),
                "wall s": json.loads(ended.read_text()) - done.started, "peak MiB": done.peak_bytes / 2 ** 20,
                "val nats/char": nats_per_character(model, *encode_characters(val_text, sorted(set(text))), val_text)}

    return train_once


def encode_characters(text: str, alphabet: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """nanoGPT's ids of characters, their places in the sorted alphabet (n,); bytes of each id (V,)."""
    places = {character: place for place, character in enumerate(alphabet)}
    return (np.array([places[character] for character in text]),
            np.array([len(character.encode()) for character in alphabet], dtype=np.int32))


NANOGPT_NAMES = {"transformer.wte": "wte", "transformer.wpe": "wpe", "transformer.ln_f": "final_norm",
                 "transformer.h": "blocks", "ln_1": "attn_norm", "ln_2": "mlp_norm", "attn.c_attn": "attn.qkv",
                 "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}


def gpt_from_nanogpt(tensors: dict[str, Tensor], *, n_head: int) -> GPT:
    """Our model, in float32 and eval mode, with the weights of nanoGPT's state_dict (without its tied lm_head)."""
    ours = {re.sub("|".join(map(re.escape, NANOGPT_NAMES)), lambda match: NANOGPT_NAMES[match[0]], name): tensor
            for name, tensor in tensors.items()}
    (vocab_size, n_embd), max_seq_len = ours["wte.weight"].shape, len(ours["wpe.weight"])
    n_layer = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("blocks."))
    model = GPT(ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size,
                            max_seq_len=max_seq_len, mlp="gelu_exact", bias="final_norm.bias" in ours))
    ours["wte.weight"] = F.pad(ours["wte.weight"], (0, 0, 0, padded_vocab_size(vocab_size) - vocab_size))
    checkpoint.load_into(model, ours, "nanoGPT's model")
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# bench.py data: data.prepare beside bare tiktoken; the loader beside a batch that is there already

# prepare asks should_stop after each unit of text, so the first call says when workers are up and encoding.
PREPARE = """
import json, sys, time
from data.prepare import prepare
source, folder, tokenizer, workers, progress_file = sys.argv[1:]
units = []
prepare([source], folder, tokenizer=tokenizer, val_fraction=0.0, workers=int(workers),
        should_stop=lambda: units.append(time.monotonic()))
with open(progress_file, "w") as file:
    json.dump(units, file)
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
texts = []

def work(action):
    if action == "load":
        with open(texts_file) as file:
            texts.extend(json.loads(line)["text"] for line in file)
        return {}
    return {"tokens": sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in texts)}

serve(work)
"""
TIKTOKEN, PREPARED = "tiktoken", "data.prepare"
LOADER_TEXT_BYTES = 4e6


def bench_data(args: argparse.Namespace, figures: Figures) -> dict:
    if args.tokenizer not in TIKTOKEN_FILES and not re.fullmatch(r"bpe:\d+", args.tokenizer):
        raise UserError(f"--tokenizer {args.tokenizer!r} is none that tiktoken runs; name bpe:N or one of "
                        f"{', '.join(TIKTOKEN_FILES)}")
    config = parse_arguments(args.config)[0]
    workers = args.workers or _cores()
    if args.mb * 1e6 < 2 * _units_left_out(workers, args.mb * 1e6) * UNIT_BYTES:
        raise UserError(f"--mb {args.mb} is too little text for {workers} processes; raise it to 100, say")
    source_texts = read_documents(args.source, limit_bytes=args.mb * 1e6)
    texts = repeated(source_texts, size=args.mb * 1e6)
    size = sum(len(text.encode()) for text in texts)
    setting = describe_machine()
    setting["text"] = (f"{size / 1e6:.2f} MB of {args.source} in {len(texts):,} documents made of "
                       f"{len(source_texts):,}, no validation split")
    setting["tokenizer"], setting["processes"] = args.tokenizer, workers
    setting["MB/s"] = (f"{TIKTOKEN}: encode_to_numpy of documents in memory, all processes together; {PREPARED}: from "
                       "the first encoded unit to the synced index.json, one unit per process left out")
    setting["start-up s"] = (f"{TIKTOKEN}: spawn, imports, tokenizer; {PREPARED}: the same, counting documents and one "
                             "unit encoded; wall s holds it")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        write_jsonl(folder / "texts.jsonl", texts)
        tokenizer, description = _tokenizer_for_both(args.tokenizer, source_texts, folder)
        (folder / "encoding.json").write_text(json.dumps(description))
        for number, part in enumerate(shared_out(texts, workers)):
            write_jsonl(folder / f"part_{number}.jsonl", part)
        take_turns({PREPARED: _preparer(folder, tokenizer, workers, size),
                    TIKTOKEN: _bare_encoder(folder, workers, size)}, args.repeats, figures)
        figures.add_ratios(f"{PREPARED} / {TIKTOKEN}", PREPARED, TIKTOKEN, ("MB/s",))
        setting["loader"] = bench_loader(config, repeated(source_texts, size=min(size, LOADER_TEXT_BYTES)), args,
                                         figures, folder)
    return setting


def _tokenizer_for_both(name: str, texts: list[str], folder: Path) -> tuple[str, dict]:
    """A tokenizer for data.prepare, trained here if it is bpe:N, and the same one as tiktoken is told of it."""
    if name in TIKTOKEN_FILES:
        return name, {"name": name}
    tokenizer = train_bpe(texts, int(name.removeprefix("bpe:")))
    tokenizer.save(folder / "tokenizer.json")
    ranks = [(tokenizer.decode_bytes([i]).hex(), i) for i in range(tokenizer.vocab_size) if i != tokenizer.eot]
    return str(folder / "tokenizer.json"), {"pattern": GPT2_PATTERN, "ranks": ranks}


def shared_out(texts: list[str], parts: int) -> list[list[str]]:
    """The texts in parts of nearly equal length: each, longest first, goes to the part that is shortest so far."""
    heap = [(0, number) for number in range(parts)]
    shares: list[list[str]] = [[] for _ in range(parts)]
    for text in sorted(texts, key=len, reverse=True):
        length, number = heapq.heappop(heap)
        shares[number].append(text)
        heapq.heappush(heap, (length + len(text), number))
    return shares


def _units_left_out(workers: int, size: float) -> int:
    """Units that are encoded, or nearly, when the first of them arrives: one per process; small texts have but one."""
    return workers if size > SMALL_BYTES else 1


def _preparer(folder: Path, tokenizer: str, workers: int, size: int) -> Contender:
    measured_mb = (size - _units_left_out(workers, size) * UNIT_BYTES) / 1e6

    def prepare_once(repeat: int) -> dict[str, float]:
        out, progress = folder / "shards", folder / "progress.json"
        done = run_to_end([sys.executable, "-c", PREPARE, str(folder / "texts.jsonl"), str(out), tokenizer,
                           str(workers), str(progress)], cwd=CHECKOUT)
        shutil.rmtree(out)
        first_unit = json.loads(progress.read_text())[0]
        return {"MB/s": measured_mb / (done.ended - first_unit), "start-up s": first_unit - done.started,
                "wall s": done.seconds}

    return prepare_once


def _bare_encoder(folder: Path, workers: int, size: int) -> Contender:
    def encode_once(repeat: int) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            def start() -> list[Worker]:
                started = [stack.enter_context(Worker(TIKTOKEN_WORKER, str(folder / f"part_{number}.jsonl"),
                                                      str(folder / "encoding.json"), cwd=folder))
                           for number in range(workers)]
                for process in started:
                    process.receive()
                return started

            startup, processes = seconds_of(start)
            _ask_all(processes, action="load")
            seconds, _ = seconds_of(lambda: _ask_all(processes, action="encode"))
        return {"MB/s": size / 1e6 / seconds, "start-up s": startup}

    return encode_once


def _ask_all(processes: list[Worker], **request: object) -> list[dict]:
    """Ask all at once, so that they work at the same time."""
    for process in processes:
        process.send(**request)
    return [process.receive() for process in processes]


def bench_loader(config: Config, texts: list[str], args: argparse.Namespace, figures: Figures, folder: Path) -> str:
    """Steps of a small model, for which loading weighs most: fed by TrainLoader, and with one batch over and over."""
    write_jsonl(folder / "small.jsonl", texts)
    prepare([str(folder / "small.jsonl")], folder / "small", tokenizer=config.data.tokenizer or "bytes",
            val_fraction=0.0, note=lambda line: None)
    dtype, _ = distributed.choose_dtype(config.train.dtype, CPU)
    distributed.prepare_cpu(CPU, World())
    dataset = open_dataset(folder / "small")
    tokens_per_step, model_config = config.train.tokens_per_step, replace(config.model, vocab_size=dataset.vocab_size)
    loader = TrainLoader(open_split(dataset, "train"), seq_len=model_config.max_seq_len, seed=config.train.seed,
                         tokens_per_step=tokens_per_step, micro_batch=config.train.micro_batch)
    model = GPT(model_config, compute_dtype=dtype)
    optimizer, scale = Optimizer(model, config.optim), LossScale.for_dtype(dtype)
    resident = loader.batch(0)

    def train(batches: Iterable[list[MicroBatch]]) -> None:
        for micro_batches in batches:
            train_step(model, optimizer, micro_batches, lr=config.optim.lr, tokens_per_step=tokens_per_step,
                       grad_clip=config.optim.grad_clip, scale=scale, step=0)

    def loaded(repeat: int) -> Iterator[list[MicroBatch]]:
        return loader.batches(repeat * args.steps, (repeat + 1) * args.steps)

    def ms_each(work: Callable[[], object]) -> float:
        return 1e3 * seconds_of(work)[0] / args.steps

    train([resident])  # warms up
    take_turns({"loader alone": lambda repeat: {"ms/batch": ms_each(lambda: sum(1 for _ in loaded(repeat)))},
                "steps with loader": lambda repeat: {"ms/step": ms_each(lambda: train(loaded(repeat)))},
                "steps with one batch": lambda repeat: {"ms/step": ms_each(lambda: train([resident] * args.steps))}},
               args.repeats, figures)
    figures.add_ratios("with loader / with one batch", "steps with loader", "steps with one batch", ("ms/step",))
    return f"{_label(args.config)}, {dtype}, {args.steps} steps of {tokens_per_step:,} tokens"


# ----------------------------------------------------------------------------------------------------------------------
# bench.py sample: our generate() beside nanoGPT's and transformers', and the memory's bound on all of them

BANDWIDTH_BYTES = 1_000_000_000
OURS, MEMORY = "flatgpt", "memory"
CHOICES = {"greedy": None, "top-k 200": 200}  # of the next token, as top_k
GPT2_KEYS = ("n_layer", "n_head", "n_embd", "vocab_size", "max_seq_len", "bias")

# In both: weights are random, and a call returns how many tokens it made.
NANOGPT_GENERATE = """
import torch
from model import GPT, GPTConfig
description = json.loads(sys.argv[1])
torch.set_num_threads(description["threads"])
shape = {key: description[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size", "bias")}
model = GPT(GPTConfig(block_size=description["max_seq_len"], dropout=0.0, **shape))
model = model.to(getattr(torch, description["dtype"])).eval()

def work(prompts, new_tokens, top_k):
    tokens = torch.tensor(prompts)
    return {"tokens": model.generate(tokens, new_tokens, top_k=top_k)[:, tokens.shape[1]:].numel()}

serve(work)
"""
TRANSFORMERS_GENERATE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
description = json.loads(sys.argv[1])
torch.set_num_threads(description["threads"])
shape = {key: description[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
model = GPT2LMHeadModel(GPT2Config(n_positions=description["max_seq_len"], attn_implementation="sdpa", **shape))
model = model.to(getattr(torch, description["dtype"])).eval()
model.generation_config.eos_token_id = None  # nothing ends a text early

@torch.inference_mode()
def work(prompts, new_tokens, top_k):
    tokens = torch.tensor(prompts)
    choice = {"do_sample": False} if top_k is None else {"do_sample": True, "top_k": top_k}
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, use_cache=True,
                         pad_token_id=0, **choice)
    return {"tokens": out[:, tokens.shape[1]:].numel()}

serve(work)
"""


Generate = Callable[[list[list[int]], int, int | None], int]  # prompts, new tokens, top_k -> tokens made in all


def bench_sample(args: argparse.Namespace, figures: Figures) -> dict:
    """Every contender at every dtype, batch size and choice of the token; each model is built once and stays."""
    config = parse_arguments(args.config)[0].model
    if config.vocab_size is None:
        raise UserError(f"the model of {args.config[0]!r} has no vocab_size; add model.vocab_size=50257 to --config")
    if args.prompt_tokens + args.new_tokens > config.max_seq_len:
        raise UserError(f"--prompt-tokens {args.prompt_tokens} + --new-tokens {args.new_tokens} exceed "
                        f"model.max_seq_len = {config.max_seq_len}, beyond which contenders differ; lower one")
    peer = args.peer and check_nanogpt(args.peer)
    setting = describe_machine()
    setting["model"] = f"{_label(args.config)}, random weights"
    setting["tokens/s"] = f"of {args.new_tokens} new tokens after {args.prompt_tokens}, reading the prompt included"
    setting["first token ms"] = "a call for one token"
    setting["bound %"] = "of memory's GB/s / bytes of weights read per token"
    contenders: dict[str, Contender] = {MEMORY: _read_memory}
    bytes_per_token: dict[str, float] = {}
    pairs = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-sample-")))
        for dtype in args.dtypes:
            generators = {OURS: _our_generate(config, dtype, setting)}
            generators |= _peers_generate(config, dtype, peer, folder, stack, setting)
            for batch, (choice, top_k), who in itertools.product(args.batch_sizes, CHOICES.items(), generators):
                if who == NANOGPT and top_k is None:
                    continue  # it always draws
                ending = f"{dtype}, batch {batch}, {choice}"
                prompts = np.random.default_rng(0).integers(config.vocab_size, size=(batch, args.prompt_tokens))
                name = f"{who}, {ending}"
                contenders[name] = _token_rate(generators[who], prompts.tolist(), args.new_tokens, top_k)
                bytes_per_token[name] = weight_bytes(config, dtype) / batch
                if who != OURS:
                    pairs.append((f"{OURS} / {who}, {ending}", f"{OURS}, {ending}", name))
        take_turns(contenders, args.repeats, figures)
    for name, size in bytes_per_token.items():
        rates = zip(figures.samples[name, "tokens/s"], figures.samples[MEMORY, "GB/s"], strict=True)
        figures.samples[name, "bound %"] = [100 * rate * size / (1e9 * bandwidth) for rate, bandwidth in rates]
    for label, ours, theirs in pairs:
        figures.add_ratios(label, ours, theirs, ("tokens/s", "first token ms"))
    return setting


def _read_memory(repeat: int) -> dict[str, float]:
    """Read bandwidth of all threads together: the median of five sums over one buffer."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    return {"GB/s": BANDWIDTH_BYTES / 1e9 / statistics.median(seconds_of(buffer.sum)[0] for _ in range(5))}


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of weights that one forward pass reads: all but the tables of which it reads a row per token."""
    with torch.device("meta"):
        model = GPT(config)
    looked_up = [model.wpe.weight] if model.wpe is not None else []
    looked_up += [] if model.lm_head is None else [model.wte.weight]
    read = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in looked_up)
    return read * getattr(torch, dtype).itemsize


def _token_rate(generate: Generate, prompts: list[list[int]], new_tokens: int, top_k: int | None) -> Contender:
    generate(prompts, min(4, new_tokens), top_k)  # warms up

    def generate_once(repeat: int) -> dict[str, float]:
        first, _ = seconds_of(lambda: generate(prompts, 1, top_k))
        seconds, made = seconds_of(lambda: generate(prompts, new_tokens, top_k))
        if made != len(prompts) * new_tokens:
            raise MachineError(f"a contender made {made} tokens instead of {len(prompts) * new_tokens}")
        return {"tokens/s": made / seconds, "first token ms": 1e3 * first}

    return generate_once


def _our_generate(config: ModelConfig, dtype: str, setting: dict) -> Generate:
    model = GPT(config, compute_dtype=getattr(torch, dtype)).to(getattr(torch, dtype)).eval()
    setting[f"{OURS} {dtype}"] = sample.pack_for_decoding(model)

    def generate(prompts: list[list[int]], new_tokens: int, top_k: int | None) -> int:
        sampling = sample.Sampling(temperature=0.0) if top_k is None else sample.Sampling(top_k=top_k)
        return sum(map(len, sample.generate(model, prompts, max_new_tokens=new_tokens, sampling=sampling)))

    return generate


def _peers_generate(config: ModelConfig, dtype: str, nanogpt: Path | None, folder: Path, stack: contextlib.ExitStack,
                    setting: dict) -> dict[str, Generate]:
    """Processes of nanoGPT (its checkout) and of transformers that hold a model of config's size, where they can."""
    gpt2 = ModelConfig(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, bias=config.bias,
                       vocab_size=config.vocab_size, max_seq_len=config.max_seq_len, mlp=config.mlp)
    if config != gpt2 or not config.mlp.startswith("gelu"):
        setting["peers"] = "none: they have GPT-2's architecture only"
        return {}
    workers = {}
    description = json.dumps({key: getattr(config, key) for key in GPT2_KEYS}
                             | {"dtype": dtype, "threads": torch.get_num_threads()})
    if nanogpt is not None:
        workers[NANOGPT] = stack.enter_context(Worker(NANOGPT_GENERATE, description, cwd=nanogpt))
        setting[NANOGPT] = f"{nanogpt}, commit {_commit(nanogpt)}"
    if importlib.util.find_spec("transformers") is None:
        setting["transformers"] = "not installed"
    else:  # isolated: our kernels/ shadows a package of that name, which it imports
        transformers = Worker(TRANSFORMERS_GENERATE, description, cwd=folder, isolated=True)
        workers["transformers"] = stack.enter_context(transformers)
        setting["transformers"] = importlib.metadata.version("transformers")
    for worker in workers.values():
        worker.receive()
    return {who: partial(_generated, worker) for who, worker in workers.items()}


def _generated(worker: Worker, prompts: list[list[int]], new_tokens: int, top_k: int | None) -> int:
    return worker.ask(prompts=prompts, new_tokens=new_tokens, top_k=top_k)["tokens"]


# ----------------------------------------------------------------------------------------------------------------------
# bench.py serve: many clients beside one

def bench_serve(args: argparse.Namespace, figures: Figures) -> dict:
    """One server process with random weights; per repeat one client, then --clients at once, each with one request."""
    config = parse_arguments(args.config)[0]
    if config.model.vocab_size is None:
        raise UserError(f"the model of {args.config[0]!r} has no vocab_size; add model.vocab_size=50257 to --config")
    if args.prompt_tokens + args.new_tokens > config.model.max_seq_len:
        raise UserError(f"--prompt-tokens {args.prompt_tokens} + --new-tokens {args.new_tokens} exceed "
                        f"model.max_seq_len = {config.model.max_seq_len}; lower one")
    setting = describe_machine()
    setting["model"] = f"{_label(args.config)}, random weights, {args.dtype}"
    setting["tokens/s"] = f"of all clients' {args.new_tokens} new tokens each after {args.prompt_tokens}, over HTTP"
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        _write_random_run(Path(folder), config)
        with _running_server(Path(folder), args.dtype) as url:
            ask = partial(_ask_server, url, prompt_tokens=args.prompt_tokens, vocab_size=config.model.vocab_size)
            ask(1, new_tokens=4)  # warms up
            contenders = {f"{n} at once": partial(_served_rate, ask, n, args.new_tokens) for n in (1, args.clients)}
            take_turns(contenders, args.repeats, figures)
    figures.add_ratios(f"{args.clients} clients / 1", f"{args.clients} at once", "1 at once", ("tokens/s",))
    return setting


def _write_random_run(folder: Path, config: Config) -> None:
    """A run folder that serve.py loads; its tokenizer knows 257 ids, and texts are asked for by ids."""
    torch.manual_seed(0)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    checkpoint.save(folder, 1, model=dict(GPT(config.model).named_parameters()), optimizer={}, state={}, keep=1)


@contextlib.contextmanager
def _running_server(run: Path, dtype: str) -> Iterator[str]:
    """The URL of a serve.py process. Raises MachineError with its last line if it does not start."""
    command = [sys.executable, str(CHECKOUT / "serve.py"), str(run), "--port", "0", "--device", "cpu", "--dtype", dtype]
    environment = {key: value for key, value in os.environ.items() if key != "FLATGPT_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        try:
            while not (lines and lines[-1].startswith("serving ")):
                lines.append(process.stderr.readline())
                if not lines[-1]:
                    raise MachineError(f"serve.py did not start: {_last_line(''.join(lines))}")
            yield re.search(r"127\.0\.0\.1:\d+", lines[-1])[0]
        finally:
            process.terminate()


def _ask_server(address: str, client: int, *, new_tokens: int, prompt_tokens: int, vocab_size: int) -> int:
    """New tokens of one request."""
    prompt = np.random.default_rng(client).integers(vocab_size, size=prompt_tokens).tolist()
    connection = http.client.HTTPConnection(address)
    body = {"prompt": prompt, "max_tokens": new_tokens, "seed": client, "logit_bias": {"256": -100}}  # 256 ends a text
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    if "usage" not in answer:
        raise MachineError(f"the server refused: {answer['error']['message']}")
    return answer["usage"]["completion_tokens"]


def _served_rate(ask: Callable[..., int], clients: int, new_tokens: int, repeat: int) -> dict[str, float]:
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        seconds, made = seconds_of(lambda: sum(pool.map(lambda n: ask(n, new_tokens=new_tokens), range(clients))))
    if made != clients * new_tokens:
        raise MachineError(f"the server made {made} tokens instead of {clients * new_tokens}")
    return {"tokens/s": made / seconds}


# ----------------------------------------------------------------------------------------------------------------------
# bench.py checkpoint: saving beside dd

SAVED, DD = "checkpoint", "dd"


def bench_checkpoint(args: argparse.Namespace, figures: Figures) -> dict:
    """checkpoint.save of weights and moments, and dd of as many bytes, into a new folder below --dir each time."""
    config = parse_arguments(args.config)[0]
    if config.model.vocab_size is None:
        raise UserError(f"the model of {args.config[0]!r} has no vocab_size; add model.vocab_size=50257 to --config")
    if not Path(args.dir).is_dir():
        raise UserError(f"--dir {args.dir!r} is no folder; name one on the disk to measure")
    model = GPT(config.model)
    optimizer = Optimizer(model, config.optim)
    moments = optimizer.state_tensors().values()
    for tensor in moments:
        tensor.normal_()  # zeros might be compressed
    size = sum(t.numel() * t.element_size() for t in (*model.state_dict().values(), *moments))
    setting = describe_machine()
    setting["model"] = f"{_label(args.config)}, {model.parameter_count():,} parameters and their moments"
    setting["bytes"] = f"{size:,} in {Path(args.dir).resolve()}"
    setting["verify s, load s"] = "every sha256; copying into model and optimizer; the files are in the page cache"
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.dir) as folder:
        take_turns({SAVED: _saver(model, optimizer, Path(folder, "run"), size),
                    DD: _dd_writer(Path(folder, "zeros"), size)}, args.repeats, figures)
    figures.add_ratios(f"{SAVED} / {DD}", SAVED, DD, ("save s",))
    return setting


def _saver(model: GPT, optimizer: Optimizer, run_dir: Path, size: int) -> Contender:
    def save_and_load(repeat: int) -> dict[str, float]:
        os.sync()  # what others left to write is not ours
        save_s, path = seconds_of(lambda: checkpoint.save(
            run_dir, repeat, model=model.state_dict(), optimizer=optimizer.state_tensors(), state={}, keep=1))
        verify_s, _ = seconds_of(lambda: checkpoint.resolve(path, _note))

        def load() -> None:
            checkpoint.load_into(model, checkpoint.load_tensors(path, "model"), str(path))
            optimizer.load_state_tensors(checkpoint.load_tensors(path, "optimizer"), updates=0)

        load_s, _ = seconds_of(load)
        shutil.rmtree(run_dir)
        return {"save s": save_s, "save GB/s": size / 1e9 / save_s, "verify s": verify_s, "load s": load_s}

    return save_and_load


def _dd_writer(path: Path, size: int) -> Contender:
    blocks = -(-size // 2 ** 20)
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={2 ** 20}", f"count={blocks}", "conv=fsync"]

    def write(repeat: int) -> dict[str, float]:
        os.sync()
        seconds, done = seconds_of(lambda: subprocess.run(command, capture_output=True, text=True))
        if done.returncode:
            raise MachineError(f"{_short(command)} failed: {_last_line(done.stderr)}")
        path.unlink()
        return {"save s": seconds, "save GB/s": blocks * 2 ** 20 / 1e9 / seconds}

    return write


# ----------------------------------------------------------------------------------------------------------------------
# kernels: see bench_kernels.py

def bench_ops(args: argparse.Namespace, figures: Figures) -> dict:
    """Each operation beside PyTorch's, and what the machine could reach at best, in turns."""
    device = sample.choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rows = args.rows or (65_536 if device.type == "cuda" else 1024)
    setting = describe_machine()
    setting["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    setting["dtype"] = f"{dtype}, weights float32"
    verdicts = {}
    for norm in ("layernorm", "rmsnorm"):
        model = ModelConfig(n_embd=768, n_head=12, norm=norm, vocab_size=bench_kernels.VOCAB_SIZE)
        verdicts |= self_check.verdicts("auto", model, table_rows=bench_kernels.TABLE_ROWS, dtype=dtype, device=device)
    kernels.choose_backends(op for op, problem in verdicts.items() if problem is None)
    setting["Triton"] = "; ".join(f"{op}: {problem or 'passed its check'}" for op, problem in verdicts.items())
    ceilings = bench_kernels.ceilings(device, dtype)
    for comparison in bench_kernels.comparisons(args.ops, device, dtype, rows=rows):
        bound = f"{comparison.ceiling}, beside {comparison.label}"
        take_turns(comparison.contenders | {bound: partial(_ceiling, ceilings[comparison.ceiling], comparison.bounded)},
                   args.repeats, figures)
        ours, *peers = comparison.contenders
        for peer in peers:
            figures.add_ratios(f"{ours} / {peer.partition(':')[0]}", ours, peer, comparison.ratios)
        figures.add_ratios(f"{ours} / {comparison.ceiling}", ours, bound, comparison.bounded)
    return setting


def _ceiling(measure: Callable[[], float], quantities: tuple[str, ...], repeat: int) -> dict[str, float]:
    return dict.fromkeys(quantities, measure())


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def write_json(path: Path, content: dict) -> None:
    """Whole or not at all. Raises MachineError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise MachineError(f"--json {str(path)!r} cannot be written: {error.strerror}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; python {self.prog} --help lists the arguments")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="bench.py", description="Benchmarks against PyTorch and peers: a table, and JSON.",
                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="{train,data,sample,serve,kernels,checkpoint}")

    def command(name: str, run: Callable, what: str, *, repeats: int, config: str | None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--json", metavar="FILE", help="write setting and figures there too")
        added.add_argument("--repeats", type=_count, default=repeats, metavar="N", help=f"default {repeats}")
        if config is not None:
            added.add_argument("--config", nargs="+", default=[str(CHECKOUT / "configs" / config)], metavar="WORD",
                               help=f"FILE.toml and overrides section.key=value; default {config}")
        return added

    train = command("train", bench_train, "Speed and loss of train.py, beside nanoGPT.", repeats=1, config=None)
    train.add_argument("--config", nargs="+", action="append", metavar="WORD",
                       help="FILE.toml and overrides of one contender; may be given again (default: "
                            + "; ".join(" ".join(words) for words in DEFAULT_TRAIN_CONFIGS) + ")")
    train.add_argument("--data", metavar="SOURCE", help=f"text, all of it used; left out = 1.1 MB of {STDLIB}")
    train.add_argument("--seeds", nargs="+", type=_whole, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    train.add_argument("--peer-steps", type=_count, default=2000, metavar="N", help="nanoGPT's; default 2000")

    data = command("data", bench_data, "data.prepare beside bare tiktoken, and the loader.", repeats=3,
                   config="shakespeare_nanogpt.toml")
    data.add_argument("--mb", type=_count, default=100, metavar="N", help="10^6 bytes of text; default 100")
    data.add_argument("--source", default=STDLIB, help=f"text, repeated up to --mb; default {STDLIB}")
    data.add_argument("--tokenizer", default="gpt2", metavar="NAME",
                      help=f"bpe:N, trained apart, or one of {', '.join(TIKTOKEN_FILES)}; default gpt2")
    data.add_argument("--workers", type=_count, metavar="N", help="processes on both sides; default: the cores")
    data.add_argument("--steps", type=_count, default=100, metavar="N", help="of the loader per repeat; default 100")

    sampling = command("sample", bench_sample, "generate() beside nanoGPT's and transformers'.", repeats=3,
                       config="gpt2_124m.toml")
    sampling.add_argument("--dtypes", nargs="+", choices=sample.DTYPES, default=["float32", "bfloat16"],
                          help="default float32 bfloat16")
    sampling.add_argument("--batch-sizes", nargs="+", type=_count, default=[1], metavar="N", help="default 1")
    serving = command("serve", bench_serve, "serve.py with many clients beside one.", repeats=5,
                      config="gpt2_124m.toml")
    serving.add_argument("--clients", type=_count, default=8, metavar="N", help="default 8")
    serving.add_argument("--dtype", choices=sample.DTYPES, default="float32", help="default float32")
    for subparser in (sampling, serving):
        subparser.add_argument("--new-tokens", type=_count, default=256, metavar="N", help="default 256")
        subparser.add_argument("--prompt-tokens", type=_count, default=16, metavar="N", help="default 16")
    for subparser in (train, sampling):
        subparser.add_argument("--peer", metavar="PATH", help="a checkout of nanoGPT")

    operations = command("kernels", bench_ops, "Each operation of kernels/ beside PyTorch's.", repeats=5, config=None)
    operations.add_argument("--ops", nargs="+", choices=kernels.OPS, default=list(kernels.OPS), help="default: all")
    operations.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    operations.add_argument("--dtype", choices=sample.DTYPES, help="default bfloat16 on CUDA, float32 on the CPU")
    operations.add_argument("--rows", type=_count, metavar="N", help="default 65,536 on CUDA, 1,024 on the CPU")

    saving = command("checkpoint", bench_checkpoint, "Saving beside dd; loading.", repeats=5, config="gpt2_124m.toml")
    saving.add_argument("--dir", default=".", help="folder on the disk to measure, left as it was; default: this one")
    return parser.parse_args(argv)


def _whole(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} should be a whole number")
    return int(word)


def _count(word: str) -> int:
    if _whole(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} should be at least 1")
    return int(word)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    args = _parse(argv)
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json!r} lies in a folder that does not exist; make it first")
    others, figures = OthersCpu(), Figures()
    setting = args.run(args, figures)
    setting["others' CPU % during"] = others.percent()
    for key, value in setting.items():
        print(f"{key}: {value}")
    print(figures.table(), flush=True)
    warn_if_busy(setting["others' CPU % during"], "during the measurements")
    if args.json is not None:
        write_json(Path(args.json), {"command": shlex.join(["python", "bench.py", *argv]), "setting": setting,
                                     "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                                     "figures": figures.rows()})


if __name__ == "__main__":
    exit_cleanly(main)
