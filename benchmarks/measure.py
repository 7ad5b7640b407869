"""What all benchmarks share: contenders that take turns, medians and ratios, arguments, the table and the JSON, the
setting they ran in, processes of their own for what is measured, and text."""

import argparse
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import cli
import files
from config import Config, MachineError, UserError, parse_arguments
from data.sources import find_files, texts_of, whole_document_units

CHECKOUT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WATCHED_S = 1.0  # how long others' work is watched before the start
BUSY_PERCENT = 5.0  # of the CPU taken by other processes, from which figures are not to be trusted
NANOGPT = "nanoGPT"
NANOGPT_FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py",
                 "data/shakespeare_char/prepare.py")
Contender = Callable[[], dict[str, float]]  # measures once: quantity, whose name ends in its unit -> value


class Figures:
    """samples[subject][quantity]: one value per repeat. left_out[subject]: why it has none; failed: those of them that
    are ours."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.left_out: dict[str, str] = {}
        self.failed: list[str] = []

    def take_turns(self, contenders: dict[str, Contender], repeats: int, peers: Collection[str] = ()) -> None:
        """Measure every contender once per repeat. Who begins changes, since the first finds a cooler machine. One that
        fails, in whichever repeat, is left out from then on with all its figures; peers: those that are not ours."""
        names = list(contenders)
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                if name in self.left_out:
                    continue
                try:
                    values = contenders[name]()
                except UserError:
                    raise
                except Exception as error:  # of whatever kind: out of memory, a compiler's, a backend's, a process's
                    self.leave_out(name, reason_of(error), is_ours=name not in peers)
                if name in self.left_out:
                    free_memory()  # not before: until the except block ends, the error's frames hold tensors
                    continue
                for quantity, value in values.items():
                    self.samples[name][quantity].append(value)
                cli.note(f"{name}, repeat {len(self.samples[name][quantity])}: "
                         + ", ".join(f"{_text(value)} {quantity}" for quantity, value in values.items()))

    def leave_out(self, name: str, reason: str, *, is_ours: bool) -> None:
        self.samples.pop(name, None)
        self.left_out[name] = reason
        self.failed += [name] * is_ours
        cli.note(f"{name} left out: {reason}")

    def add_ratios(self, label: str, ours: str, peer: str, *quantities: str) -> None:
        """ours / peer of each repeat as subject `label`, for the quantities that both have."""
        for quantity in quantities:
            pair = [self.samples.get(subject, {}).get(quantity) for subject in (ours, peer)]
            if all(pair):
                self.samples[label][f"ratio of {quantity}"] = [a / b for a, b in zip(*pair, strict=True)]

    def rows(self) -> list[dict]:
        return [{"subject": subject, "quantity": quantity, "median": statistics.median(samples),
                 "p10": float(np.percentile(samples, 10)), "p90": float(np.percentile(samples, 90)),
                 "repeats": len(samples), "samples": samples}
                for subject, of in self.samples.items() for quantity, samples in of.items()]

    def table(self) -> str:
        """A line per subject, a column per quantity; subjects of other quantities in a table of their own."""
        tables: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for subject, rows in itertools.groupby(self.rows(), key=lambda row: row["subject"]):
            cells = {row["quantity"]: _text(row["median"]) + (
                f" ({_text(row['p10'])}-{_text(row['p90'])})" if row["repeats"] > 1 else "") for row in rows}
            tables[tuple(cells)].append((subject, *cells.values()))
        if not tables:
            return "nothing was measured"
        return "\n\n".join([f"median (p10-p90) of {self.rows()[0]['repeats']} repeats",
                            *(cli.format_table(("", *quantities), rows) for quantities, rows in tables.items())])


def _text(value: float) -> str:
    """Four significant digits, and all digits before the point."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def reason_of(error: Exception) -> str:
    """What went wrong, in one line; of others' errors, which may tell stories, the first."""
    if isinstance(error, MachineError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def free_memory() -> None:
    """Give back what nobody holds any more, also what waits in cycles and in CUDA's cache."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # of a context that an earlier kernel broke
            torch.cuda.empty_cache()


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def command(commands, run: Callable[[argparse.Namespace, Figures], dict], what: str, *, repeats: int,
            config: str | None = None, lengths: bool = False, peer: bool = False) -> argparse.ArgumentParser:
    """The parser of a command, named like run's file, with what several of them take. run returns the setting."""
    parser = commands.add_parser(run.__module__.removeprefix("benchmarks."), help=what, description=what,
                                 allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--json", metavar="FILE", help="write setting and figures there too")
    parser.add_argument("--repeats", type=cli.count, default=repeats, metavar="N", help=f"default {repeats}")
    if config is not None:
        parser.add_argument("--config", nargs="+", default=[str(CHECKOUT / "configs" / config)], metavar="WORD",
                            help=f"FILE.toml and overrides section.key=value; default {config}")
    if lengths:
        parser.add_argument("--new-tokens", type=cli.count, default=256, metavar="N", help="default 256")
        parser.add_argument("--prompt-tokens", type=cli.count, default=16, metavar="N", help="default 16")
    if peer:
        parser.add_argument("--peer", type=nanogpt_checkout, metavar="PATH", help="a checkout of nanoGPT")
    return parser


def nanogpt_checkout(path: str) -> Path:
    missing = [name for name in NANOGPT_FILES if not Path(path, name).is_file()]
    if missing:
        raise argparse.ArgumentTypeError(f"{path!r} is no nanoGPT checkout: it has no {missing[0]}; name one")
    return Path(path).resolve()


def complete_config(args: argparse.Namespace) -> Config:
    """--config, of a model that can be built without data and holds the texts that are asked for. Raises UserError."""
    config = parse_arguments(args.config)[0]
    if config.model.vocab_size is None:
        raise UserError(f"the model of {args.config[0]!r} has no vocab_size; add model.vocab_size=50257 to --config")
    if "new_tokens" in args and args.prompt_tokens + args.new_tokens > config.model.max_seq_len:
        raise UserError(f"--prompt-tokens {args.prompt_tokens} + --new-tokens {args.new_tokens} exceed "
                        f"model.max_seq_len = {config.model.max_seq_len}, beyond which contenders differ; lower one")
    return config


def label(words: list[str]) -> str:
    """What a contender of ours is called: the names of its config files, and its overrides."""
    return " ".join(["flatgpt", *(word if "=" in word else Path(word).stem for word in words)])


def report(argv: list[str], args: argparse.Namespace) -> None:
    """Run the command that was asked for, print its setting and table, and write both to --json. Raises MachineError in
    the end if a contender of ours failed."""
    if args.json is not None:
        cli.check_output("--json", Path(args.json))
    args.command, args.setting, figures = shlex.join(["python", "bench.py", *argv]), {}, Figures()
    with others_watched(args.setting, "before"):
        args.setting |= describe_machine()
        time.sleep(WATCHED_S)
    with others_watched(args.setting, "during"):
        args.setting |= args.run(args, figures)
    for key, value in args.setting.items():
        if not isinstance(value, dict):
            print(f"{key}: {value}")
    for name, reason in figures.left_out.items():
        print(f"left out: {name}: {reason}")
    print(figures.table(), flush=True)
    write_json(args, figures)
    if figures.failed:
        raise MachineError(f"{', '.join(figures.failed)} failed: {figures.left_out[figures.failed[0]]}")


def write_json(args: argparse.Namespace, figures: Figures) -> None:
    """Setting and figures so far into --json, if it was given."""
    if args.json is None:
        return
    setting = args.setting | ({"left out": figures.left_out} if figures.left_out else {})
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    content = {"command": args.command, "setting": setting, "date": date, "figures": figures.rows()}
    with files.disk_errors(Path(args.json)):
        files.write_whole(Path(args.json), json.dumps(content, indent=1) + "\n")


def describe_machine() -> dict:
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return {"cpu": model[1] if model else platform.processor() or platform.machine(), "cores": cores(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
            "commit": cli.commit(CHECKOUT), "load average": [round(load, 2) for load in os.getloadavg()]}


@contextmanager
def others_watched(setting: dict, when: str) -> Iterator[None]:
    """Puts into the setting others' share of all cores in the block, None if not known; a warning if it is large."""
    before = cpu_seconds()
    yield
    others, total = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
    percent = setting[f"others' CPU % {when}"] = round(100.0 * max(0.0, others) / total, 1) if total else None
    if total and percent > BUSY_PERCENT:
        cli.note(f"warning: other processes took {percent:.0f} % of the CPU {when} the measurements; do not trust "
                 "figures taken now")


def cpu_seconds() -> tuple[float, float]:
    """Of all cores together, from Linux's /proc/stat: seconds busy for others, and seconds in all; elsewhere zeros.
    Processes of ours count as ours once they ended."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    idle, per_second = ticks[3] + ticks[4], os.sysconf("SC_CLK_TCK")  # idle and iowait
    return (sum(ticks) - idle) / per_second - sum(os.times()[:4]), sum(ticks) / per_second


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str:
    return importlib.metadata.version(package) if cli.is_installed(package) else "not installed"


# Started by a small process of its own: Linux counts the memory of whoever started a process to its peak.
LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.monotonic()
status = subprocess.call(sys.argv[1:], stderr=subprocess.STDOUT)
ended = time.monotonic()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
json.dump({"started": started, "ended": ended, "seconds": ended - started, "peak_bytes": peak, "status": status},
          sys.stderr)
"""


def run_to_end(*arguments: str, cwd: Path) -> SimpleNamespace:
    """started (before its interpreter) and ended, on time.monotonic(), which all processes share; seconds, peak_bytes
    (resident), output (stdout and stderr). Raises MachineError with its last line if it fails."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", LAUNCHER, *arguments], cwd=cwd, capture_output=True,
                          text=True, errors="replace", env=os.environ | {"PYTHONUTF8": "1"})
    result = json.loads(done.stderr) if done.returncode == 0 else {"status": done.returncode}
    if result.pop("status") != 0:
        short = shlex.join(word if len(word) < 80 else "..." for word in arguments)
        raise MachineError(f"{short} failed: {last_line(done.stdout or done.stderr)}")
    return SimpleNamespace(**result, output=done.stdout)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(it printed nothing)"])[-1]


# What every worker script begins with. Whatever a peer prints goes to stderr, answers to the real stdout.
WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

def answer(value):
    print(json.dumps(value), file=answers, flush=True)

def serve(work):
    answer({})
    for line in sys.stdin:
        answer(work(**json.loads(line)))
"""


class Worker(subprocess.Popen):
    """A process that runs `script` once, then answers requests: JSON objects, a line each. Ends with the block."""

    def __init__(self, script: str, *arguments: str, cwd: Path):
        self.log = tempfile.TemporaryFile(mode="w+", errors="replace")
        # -B: no bytecode in a peer's folder
        super().__init__([sys.executable, "-B", "-c", WORKER + script, *arguments], cwd=cwd, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def __exit__(self, *exception: object) -> None:
        self.terminate()
        with suppress(BrokenPipeError):  # a request that a dead process never read
            super().__exit__(*exception)
        self.log.close()

    def receive(self) -> dict:
        """The next answer; the first one, {}, says that the process is ready. Raises MachineError if it died."""
        line = self.stdout.readline()
        if not line:
            self.log.seek(0)
            raise MachineError(f"a process that was measured ended early: {last_line(self.log.read())}")
        return json.loads(line)


def ask(*workers: Worker, **request: object) -> list[dict]:
    """Every worker's answer to a request. All are asked before the first is heard, so that they work at once."""
    for worker in workers:
        with suppress(BrokenPipeError):  # receive() says how it ended
            print(json.dumps(request), file=worker.stdin, flush=True)
    return [worker.receive() for worker in workers]


def read_documents(source: str, *, limit_bytes: float) -> list[str]:
    """Documents of a SOURCE of data.prepare, in order, until they hold limit_bytes of UTF-8. Raises SourceError."""
    units = whole_document_units(find_files(source), "train", val_fraction=0.0, unit_bytes=sys.maxsize)
    texts = take((text for unit in units for text, _ in texts_of(unit, "text")), size=limit_bytes)
    if not texts:
        raise UserError(f"source {source!r} holds no text; name another")
    return texts


def take(texts: Iterator[str], *, size: float) -> list[str]:
    """The first of the texts, until they hold `size` bytes of UTF-8."""
    taken = []
    while size > 0 and (text := next(texts, None)) is not None:
        taken.append(text)
        size -= len(text.encode())
    return taken
