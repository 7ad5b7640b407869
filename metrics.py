"""What a run reports about itself: tokens/s, MFU, memory; its log lines and metrics.jsonl; trackers; loss curves.

train.py measures and hands over one row per log step; RunLog prints it as a line on stdout, appends that line to
RUN/log.txt and the row to RUN/metrics.jsonl, and passes it on to tensorboard or wandb if asked. Rows keep DESIGN.md
section 6: an unknown figure is null, and no (kind, step) stands there twice, also after a crash. Logging never ends a
run: a full disk or a failing tracker gives one warning. `python metrics.py RUN ...` compares runs as a table and a
plot, without importing torch. It does not count FLOPs (model.flops_per_token does) and does not evaluate (eval.py).
"""

import argparse
import importlib.util
import io
import json
import math
import os
import re
import secrets
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from config import MachineError, UserError, exit_cleanly

ROW_FIELDS = {
    "train": ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds", "skipped"),
    "val": ("step", "loss", "bits_per_byte"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Speed and memory

# TFLOP/s without sparsity: bfloat16 and float16 on tensor (AMD: matrix) cores with float32 accumulation, which is what
# torch's matmuls use, and float32 without TF32. None: the device has no such cores, or its maker states no figure that
# we know. Keys are matched whole against the name torch reports, because a prefix would guess: a 4090 Laptop is no
# 4090, an H100 PCIe no H100 SXM, and a MIG slice is a fraction of its card.
# Source: NVIDIA's data sheet of each data-centre card (figures "with sparsity" halved); for GeForce and RTX cards
# appendix A of the GA102, Ada and RTX Blackwell architecture white papers; AMD's CDNA data sheets.
PEAK_TFLOPS: dict[str, tuple[float | None, float | None, float | None]] = {
    # device name, without NVIDIA or Tesla               bfloat16 float16 float32
    r"V100-PCIE-(16|32)GB":                              (None, 112.0, 14.0),
    r"V100-SXM2-(16|32)GB(-LS)?":                        (None, 125.0, 15.7),
    r"V100S-PCIE-32GB":                                  (None, 130.0, 16.4),
    r"T4":                                               (None, 65.0, 8.1),
    r"A10":                                              (125.0, 125.0, 31.2),
    r"A30":                                              (165.0, 165.0, 10.3),
    r"A40":                                              (149.7, 149.7, 37.4),
    r"A[18]00(-SXM4-(40|80)GB|-PCIE-40GB| 80GB PCIe)":   (312.0, 312.0, 19.5),
    r"RTX A6000":                                        (154.8, 154.8, 38.7),
    r"GeForce RTX 3090":                                 (71.0, 71.0, 35.6),
    r"GeForce RTX 3090 Ti":                              (80.0, 80.0, 40.0),
    r"L4":                                               (121.0, 121.0, 30.3),
    r"L40":                                              (181.0, 181.0, 90.5),
    r"L40S":                                             (362.0, 362.0, 91.6),
    r"RTX 6000 Ada Generation":                          (364.2, 364.2, 91.1),
    r"GeForce RTX 4080":                                 (97.5, 97.5, 48.7),
    r"GeForce RTX 4090":                                 (165.2, 165.2, 82.6),
    r"GeForce RTX 5080":                                 (112.6, 112.6, 56.3),
    r"GeForce RTX 5090":                                 (209.5, 209.5, 104.8),
    r"H100 80GB HBM3":                                   (989.4, 989.4, 66.9),  # SXM5
    r"H100 PCIe":                                        (756.0, 756.0, 51.2),
    r"H100 NVL":                                         (835.5, 835.5, 60.0),
    r"GH200 (480GB|144G HBM3e)":                         (989.4, 989.4, 66.9),
    r"H20":                                              (148.0, 148.0, 44.0),
    r"H200":                                             (989.4, 989.4, 66.9),
    r"H200 NVL":                                         (835.5, 835.5, 60.0),
    r"B200":                                             (2250.0, 2250.0, None),
    r"GB200":                                            (2500.0, 2500.0, None),
    r"AMD Instinct MI210":                               (181.0, 181.0, 45.3),
    r"AMD Instinct MI250X":                              (191.5, 191.5, 47.9),  # a device is half a card
    r"AMD Instinct MI300X( OAM)?":                       (1307.4, 1307.4, 163.4),
    r"AMD Instinct MI325X( OAM)?":                       (1307.4, 1307.4, 163.4),
    r"AMD Instinct MI355X( OAM)?":                       (2516.6, 2516.6, 157.3),
}
DTYPE_COLUMNS = ("bfloat16", "float16", "float32")


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device as torch names it, FLOP/s in that dtype; None if it is not in PEAK_TFLOPS (any CPU)."""
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device_name.strip())
    for pattern, tflops in PEAK_TFLOPS.items():
        if dtype in DTYPE_COLUMNS and re.fullmatch(pattern, name):
            peak = tflops[DTYPE_COLUMNS.index(dtype)]
            return None if peak is None else peak * 1e12
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int) -> float | None:
    """Share (0..1) of the peak of all devices that the model's matmuls use; tokens_per_second counts all ranks."""
    if peak is None or not math.isfinite(tokens_per_second):
        return None
    return tokens_per_second * flops_per_token / (peak * world_size)


def peak_memory_bytes(device) -> int | None:
    """Most memory held at once so far: on CUDA by torch's tensors, on the CPU by the process; None if not known.

    device is a torch.device or its name.
    """
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device)
    if kind == "cpu":
        if sys.platform == "linux":  # getrusage would count the parent's memory from before exec
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    return None


class StepClock:
    """Seconds of training since the last train row; what runs inside `paused()` (evaluation, saves) is left out."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - paused_at

    def take(self) -> float:
        """The seconds since the last take(), or since the clock was made, without pauses; starts again from zero."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        return seconds


# ----------------------------------------------------------------------------------------------------------------------
# Figures as text

def _known(figure: float | None) -> bool:
    return figure is not None and math.isfinite(figure)


def human_count(count: float) -> str:
    """Three significant digits with k, M, B or T: 812k, 1.23M, 10.0B; whole numbers below 1000 as they are."""
    unit, suffix = 1.0, ""
    for larger, name in ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        if count / unit >= 999.5:  # would round up to a fourth digit
            unit, suffix = larger, name
    scaled = count / unit
    digits = 0 if scaled >= 99.95 or scaled == count == int(count) else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f}{suffix}"


def human_seconds(seconds: float) -> str:
    """The two largest units: 42s, 5m 07s, 2h 05m, 3d 04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02d}h"


def format_train_line(row: dict, max_steps: int, seconds_left: float | None) -> str:
    """One log line, figures that are not known left out:
    'step 1200/19073 | loss 3.4121 | lr 6.0e-04 | grad 0.41 | 812k tok/s | mfu 46.2% | 2h 05m left'.
    """
    parts = [f"step {row['step']}/{max_steps}"]
    if row.get("skipped"):
        parts.append("skipped: loss or gradient not finite")
    elif _known(row.get("loss")):
        parts.append(f"loss {row['loss']:.4f}")
    if _known(row.get("lr")):
        parts.append(f"lr {row['lr']:.1e}")
    if _known(row.get("grad_norm")):
        parts.append(f"grad {row['grad_norm']:.2f}")
    if _known(row.get("tokens_per_second")):
        parts.append(f"{human_count(row['tokens_per_second'])} tok/s")
    if _known(row.get("mfu")):
        parts.append(f"mfu {row['mfu']:.1%}")
    if _known(seconds_left):
        parts.append(f"{human_seconds(seconds_left)} left")
    return " | ".join(parts)


def format_val_line(row: dict, max_steps: int) -> str:
    """'step 250/1000 | val loss 2.1034 | 1.2345 bits/byte', figures that are not known left out."""
    parts = [f"step {row['step']}/{max_steps}"]
    parts.append(f"val loss {row['loss']:.4f}" if _known(row.get("loss")) else "val loss not finite")
    if _known(row.get("bits_per_byte")):
        parts.append(f"{row['bits_per_byte']:.4f} bits/byte")
    return " | ".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# The log of a run: stdout, log.txt, metrics.jsonl, tracker

class RunLog:
    """Rank 0's log.txt, metrics.jsonl, stdout and tracker. On other ranks (enabled False) every method does nothing.

    resume_step is the step of the checkpoint that the run goes on from, 0 for a new run: rows after it were written
    before a crash and will be written again, so they are dropped; log.txt only grows. Raises UserError if the
    tracker's package is missing, MachineError if the run folder cannot be written.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, tracker: str = "none", config: dict | None = None,
                 enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        check_tracker(tracker)
        rows_path = run_dir / "metrics.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._last_step = _drop_rows_after(rows_path, resume_step)
            self._rows_file, self._text_file = _AppendFile(rows_path), _AppendFile(run_dir / "log.txt")
        except OSError as error:
            raise MachineError(f"run folder '{run_dir}' cannot be written: {error.strerror}") from None
        self._tracker_name = tracker
        self._tracker: _TensorBoard | _Wandb | None = None
        with self._tracker_may_fail():
            self._tracker = _open_tracker(tracker, run_dir, resume_step, config)

    def note(self, text: str) -> None:
        """Print text and append it to log.txt."""
        if self._enabled:
            _print(text)
            self._text_file.write(text)

    def train(self, row: dict, max_steps: int, seconds_left: float | None) -> None:
        """Log a train row (ROW_FIELDS; missing ones become null) and its line."""
        if self._enabled:
            self.note(format_train_line(row, max_steps, seconds_left))
            self._write_row("train", row)

    def val(self, row: dict, max_steps: int) -> None:
        """Log a val row (ROW_FIELDS; missing ones become null) and its line."""
        if self._enabled:
            self.note(format_val_line(row, max_steps))
            self._write_row("val", row)

    def close(self) -> None:
        """Finish the tracker and close the files; later calls do nothing."""
        if not self._enabled:
            return
        with self._tracker_may_fail():
            if self._tracker is not None:
                self._tracker.close()
        self._rows_file.close()
        self._text_file.close()
        self._enabled = False

    def _write_row(self, kind: str, row: dict) -> None:
        # Rows come in the order of steps, so one number per kind tells whether this one was written before.
        if row["step"] <= self._last_step.get(kind, -1):
            return
        self._last_step[kind] = row["step"]
        row = {"kind": kind} | dict.fromkeys(ROW_FIELDS[kind]) | row
        for field, figure in row.items():
            if isinstance(figure, float) and not math.isfinite(figure):
                row[field] = None
        self._rows_file.write(json.dumps(row, allow_nan=False))
        if self._tracker is not None:
            figures = {f"{kind}/{field}": figure for field, figure in row.items()
                       if isinstance(figure, int | float) and field != "step"}
            with self._tracker_may_fail():
                self._tracker.log(figures, step=row["step"])

    @contextmanager
    def _tracker_may_fail(self) -> Iterator[None]:
        # Exception, because a tracker is other people's software and service: whatever it raises, training goes on.
        try:
            yield
        except Exception as error:
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line, however many the error has
            text = (f"warning: tracker {self._tracker_name} failed ({reason}); training goes on without it, "
                    "metrics.jsonl has every row")
            _warn(text)
            self._text_file.write(text)


class _AppendFile:
    """A file that only grows, one write() per line. What a full disk refuses waits here and goes first next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._warned = False

    def write(self, line: str) -> None:
        self._waiting += f"{line}\n".encode(errors="backslashreplace")
        self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            while self._waiting:
                # A disk that fills on the way takes the first part of a line; the rest must follow it, not a new line.
                written = os.write(self._descriptor, self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if not self._warned:
                _warn(f"warning: {self._path} cannot be written ({error.strerror}); training goes on, the lines are "
                      "kept in memory and tried again")
            self._warned = True

    def close(self) -> None:
        self._try_to_write()
        os.close(self._descriptor)


def _print(text: str) -> None:
    """Print a line at once. A stdout that no longer takes it (full disk, closed pipe) is given up, not the run."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a sample in a script that the terminal's encoding lacks
        _print(text.encode("ascii", errors="backslashreplace").decode())
    except OSError as error:
        # What stdout holds would fail again at exit, so it goes to /dev/null with all that follows.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _warn(f"warning: stdout cannot be written ({error.strerror}); training goes on, log.txt has the lines")


def _warn(text: str) -> None:
    """Print a line on stderr at once, or nowhere: stderr is often a file on the disk whose fullness it reports."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _drop_rows_after(path: Path, resume_step: int) -> dict[str, int]:
    """Rewrite metrics.jsonl without rows after resume_step, second rows of a (kind, step) and broken lines.

    Returns the last step left of each kind. Without a checkpoint (resume_step 0) the run starts again, so no row stays.
    """
    if not path.exists():
        return {}
    before = path.read_bytes()
    kept, last_step = [], {}
    for line in before.split(b"\n"):
        try:
            row = _parse_row(line)
        except ValueError:  # the line a crash or a full disk tore, or the empty end of the file
            continue
        if 0 < resume_step >= row["step"] > last_step.get(row["kind"], -1):
            kept.append(line + b"\n")
            last_step[row["kind"]] = row["step"]
    if b"".join(kept) != before:
        write_whole(path, b"".join(kept))
    return last_step


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file, fsync, os.replace. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Trackers

def check_tracker(name: str) -> None:
    """Raise UserError if the tracker's package is not installed; cheap, so every rank can ask before any work."""
    if name != "none":
        _require(name, f"train.tracker = '{name}'")


def _require(package: str, what_for: str) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # no origin: a folder of that name, such as ./wandb, passing for a package
        raise UserError(f"{what_for} needs the package {package}, which is not installed; pip install {package}")


def _open_tracker(name: str, run_dir: Path, resume_step: int, config: dict | None) -> "_TensorBoard | _Wandb | None":
    if name == "tensorboard":
        return _TensorBoard(run_dir, resume_step)
    if name == "wandb":
        return _Wandb(run_dir, config)
    return None


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        # purge_step hides the events that a crashed run wrote after the checkpoint; tensorboard drops those >= it.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One Weights & Biases run, its id kept in RUN/wandb_id so that a resumed run continues it, offline as well.

    wandb ignores rows at steps that it already has, so the steps between checkpoint and crash keep their first values.
    """

    def __init__(self, run_dir: Path, config: dict | None) -> None:
        import wandb
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_whole(id_file, secrets.token_hex(6).encode())
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "flatgpt"), name=run_dir.resolve().name,
                               id=id_file.read_text().strip(), resume="allow", dir=str(run_dir), config=config)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Reading runs and comparing them

@dataclass(frozen=True)
class Run:
    """The rows of one metrics.jsonl, in the order of steps."""

    name: str
    train: list[dict]
    val: list[dict]

    def figures(self, kind: str, field: str) -> list[float]:
        """The known values of a field, in the order of steps."""
        return [row[field] for row in getattr(self, kind) if row.get(field) is not None]


def read_run(name: str) -> Run:
    """The rows of a run folder (or of the run a checkpoint belongs to). Raises UserError naming what is wrong."""
    folder = Path(name)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"run '{name}' is not a folder; give a run's train.out_dir")
    if not path.is_file():
        raise UserError(f"folder '{name}' has no metrics.jsonl, so it is not a run or has not logged a step yet")
    *lines, unfinished = path.read_bytes().split(b"\n")  # the line a running train.py is writing has no newline yet
    run = Run(name, train=[], val=[])
    for number, line in enumerate(lines, start=1):
        try:
            row = _parse_row(line)
        except ValueError as error:
            raise UserError(f"'{path}' line {number} is not a metrics row: {error}; mend or delete the line") from None
        getattr(run, row["kind"]).append(row)
    return run


def _parse_row(line: bytes) -> dict:
    """One line of metrics.jsonl. Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:
        raise ValueError("it is not valid JSON") from None
    if not isinstance(row, dict) or row.get("kind") not in ROW_FIELDS:
        raise ValueError("its kind is neither 'train' nor 'val'")
    for field in ROW_FIELDS[row["kind"]]:
        if not isinstance(row.get(field), int | float | None):
            raise ValueError(f"{field} is not a number")
    if not isinstance(row.get("step"), int):
        raise ValueError("step is not a whole number")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which Python's json would read")


SUMMARY_HEADER = ("run", "step", "tokens", "train loss", "best val", "last val", "bits/byte", "tok/s", "mfu", "seconds")
TAIL_ROWS = 10  # train rows averaged into "train loss": one batch's loss is noisy


def summary(run: Run) -> tuple[str, ...]:
    """A run as one row under SUMMARY_HEADER; '-' where nothing is known."""
    steps = run.figures("train", "step") + run.figures("val", "step")
    losses, val_losses = run.figures("train", "loss")[-TAIL_ROWS:], run.figures("val", "loss")
    return (
        run.name,
        _text(max(steps, default=None), "d"),
        _text(max(run.figures("train", "tokens"), default=None), human_count),
        _text(statistics.fmean(losses) if losses else None, ".4f"),
        _text(min(val_losses, default=None), ".4f"),
        _text(val_losses[-1] if val_losses else None, ".4f"),
        _text(min(run.figures("val", "bits_per_byte"), default=None), ".4f"),
        _text(_median(run.figures("train", "tokens_per_second")), human_count),
        _text(_median(run.figures("train", "mfu")), ".1%"),
        _text(sum(run.figures("train", "seconds")), ".0f"),
    )


def _median(figures: list[float]) -> float | None:
    return statistics.median(figures) if figures else None


def _text(figure: float | None, style) -> str:
    """A figure by a format spec or a function of it; '-' for None."""
    if figure is None:
        return "-"
    return format(figure, style) if isinstance(style, str) else style(figure)


def val_losses_by_step(runs: list[Run]) -> list[tuple[str, ...]]:
    """A row (step, loss of each run) for every step at which a run was evaluated, '-' where one was not."""
    columns = [{row["step"]: row["loss"] for row in run.val} for run in runs]
    steps = sorted(set().union(*columns))
    return [(str(step), *(_text(column.get(step), ".4f") for column in columns)) for step in steps]


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns two spaces apart; the first is flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Plot

def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the window values around each one, fewer at both ends; centred, so that curves do not lag."""
    sums = [0.0, *accumulate(values)]
    smoothed = []
    for i in range(len(values)):
        first, end = max(0, i - window // 2), min(len(values), i + window // 2 + 1)
        smoothed.append((sums[end] - sums[first]) / (end - first))
    return smoothed


def train_curve(run: Run) -> tuple[list[int], list[float]]:
    """Tokens and losses of the train rows that have both."""
    rows = [row for row in run.train if row.get("tokens") is not None and row.get("loss") is not None]
    return [row["tokens"] for row in rows], [row["loss"] for row in rows]


def val_curve(run: Run) -> tuple[list[float], list[float]]:
    """Tokens and losses of the val rows; their tokens follow from the train row at, or else next to, their step."""
    rows = [row for row in run.train if row.get("tokens") is not None and row["step"] > 0]
    steps = [row["step"] for row in rows]
    tokens, losses = [], []
    for row in run.val:
        if rows and row["loss"] is not None:
            near = rows[min(bisect_left(steps, row["step"]), len(rows) - 1)]
            tokens.append(near["tokens"] * row["step"] / near["step"])
            losses.append(row["loss"])
    return tokens, losses


def plot(runs: list[Run], path: Path) -> None:
    """Train and val loss of the runs over tokens, side by side, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    train_axes, val_axes = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        tokens, losses = train_curve(run)
        train_axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        train_axes.plot(tokens, smooth(losses, window=len(losses) // 25), color=color, linewidth=1.8, label=run.name)
        val_axes.plot(*val_curve(run), color=color, linewidth=1.8, marker="o", markersize=3, label=run.name)
    for axes, title, curves in ((train_axes, "Training loss", map(train_curve, runs)),
                                (val_axes, "Validation loss", map(val_curve, runs))):
        axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)", xlim=(0, None))
        limits = loss_limits([losses for _, losses in curves if losses])
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*train_axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def _tick(tokens: float, _position: int) -> str:
    return re.sub(r"\.00?(?=\D)|(?<=\.\d)0(?=\D)", "", human_count(tokens))  # 2.00B -> 2B, 2.50B -> 2.5B


def loss_limits(curves: list[list[float]]) -> tuple[float, float] | None:
    """Axis limits that show the curves from a tenth of the way on; the first fall would flatten all that follows."""
    if not curves:
        return None
    top = max(max(losses[len(losses) // 10:]) for losses in curves)
    bottom = min(min(losses) for losses in curves)
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


# ----------------------------------------------------------------------------------------------------------------------
# Command line

USAGE = "python metrics.py RUN ... [--plot FILE.png]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; usage: {USAGE}")


def main(argv: list[str]) -> None:
    parser = _Parser(usage=USAGE, description="Compare runs: a table, and loss curves as PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write train and val loss curves over tokens")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None:
        _check_plot_file(arguments.plot)
    runs = [read_run(name) for name in arguments.runs]
    print(format_table(SUMMARY_HEADER, [summary(run) for run in runs]))
    by_step = val_losses_by_step(runs)
    if by_step:
        print("\nval loss by step\n" + format_table(("step", *(run.name for run in runs)), by_step))
    if arguments.plot is not None:
        try:
            plot(runs, arguments.plot)
        except OSError as error:
            raise MachineError(f"--plot '{arguments.plot}' cannot be written: {error.strerror}") from None


def _check_plot_file(path: Path) -> None:
    if path.suffix != ".png":
        raise UserError(f"--plot '{path}' should end in .png")
    if not path.parent.is_dir():
        raise UserError(f"--plot '{path}' lies in a folder that does not exist; make '{path.parent}' first")
    _require("matplotlib", "--plot")


if __name__ == "__main__":
    exit_cleanly(main)
