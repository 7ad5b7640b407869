"""Runs read back: the rows of metrics.jsonl, runs compared as a table and as loss curves. Behind `python metrics.py`.
Needs no torch, and matplotlib only for a plot."""

import io
import json
import re
import statistics
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import files
from cli import Parser, check_output, format_table, require
from config import MachineError, UserError

ROW_FIELDS = {"train": ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds", "skipped"),
              "val": ("step", "loss", "bits_per_byte")}


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
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    d, h = divmod(hours, 24)
    return f"{d}d {h:02d}h" if d else f"{h}h {m:02d}m" if h else f"{m}m {s:02d}s" if m else f"{s}s"


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
            row = parse_row(line)
        except ValueError as error:
            raise UserError(f"'{path}' line {number} is not a metrics row: {error}; mend or delete the line") from None
        getattr(run, row["kind"]).append(row)
    return run


def parse_row(line: bytes) -> dict:
    """One line of metrics.jsonl. Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line, parse_constant=int)  # int refuses NaN and Infinity, which Python's json would read
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(row, dict) or row.get("kind") not in ROW_FIELDS:
        raise ValueError("its kind is neither 'train' nor 'val'")
    for field in ROW_FIELDS[row["kind"]]:
        if not isinstance(row.get(field), int | float | None):
            raise ValueError(f"{field} is not a number")
    if not isinstance(row.get("step"), int):
        raise ValueError("step is not a whole number")
    return row


def drop_rows_after(path: Path, resume_step: int) -> dict[str, int]:
    """Rewrite metrics.jsonl without rows after resume_step, second rows of a (kind, step) and broken lines.

    Returns the last step left of each kind. Without a checkpoint (resume_step 0) the run starts again, so no row stays.
    """
    if not path.exists():
        return {}
    before = path.read_bytes()
    kept, last_step = [], {}
    for line in before.split(b"\n"):
        try:
            row = parse_row(line)
        except ValueError:  # the line a crash or a full disk tore, or the empty end of the file
            continue
        if 0 < resume_step >= row["step"] > last_step.get(row["kind"], -1):
            kept.append(line + b"\n")
            last_step[row["kind"]] = row["step"]
    if b"".join(kept) != before:
        files.write_whole(path, b"".join(kept))
    return last_step


SUMMARY_HEADER = ("run", "step", "tokens", "train loss", "best val", "last val", "bits/byte", "tok/s", "mfu", "seconds")
TAIL_ROWS = 10  # train rows averaged into "train loss": one batch's loss is noisy


def summary(run: Run) -> tuple[str, ...]:
    """A run as one row under SUMMARY_HEADER; '-' where nothing is known."""
    steps = run.figures("train", "step") + run.figures("val", "step")
    losses, val_losses = run.figures("train", "loss")[-TAIL_ROWS:], run.figures("val", "loss")
    speeds, mfus = run.figures("train", "tokens_per_second"), run.figures("train", "mfu")
    return (
        run.name,
        _text(max(steps, default=None)),
        _text(max(run.figures("train", "tokens"), default=None), human_count),
        _text(statistics.fmean(losses) if losses else None, "{:.4f}".format),
        _text(min(val_losses, default=None), "{:.4f}".format),
        _text(val_losses[-1] if val_losses else None, "{:.4f}".format),
        _text(min(run.figures("val", "bits_per_byte"), default=None), "{:.4f}".format),
        _text(statistics.median(speeds) if speeds else None, human_count),
        _text(statistics.median(mfus) if mfus else None, "{:.1%}".format),
        f"{sum(run.figures('train', 'seconds')):.0f}",
    )


def _text(figure: float | None, style: Callable[[float], str] = str) -> str:
    return "-" if figure is None else style(figure)


def val_losses_by_step(runs: list[Run]) -> list[tuple[str, ...]]:
    """A row (step, loss of each run) for every step at which a run was evaluated, '-' where one was not."""
    columns = [{row["step"]: row.get("loss") for row in run.val} for run in runs]
    steps = sorted(set().union(*columns))
    return [(str(step), *(_text(column.get(step), "{:.4f}".format) for column in columns)) for step in steps]


# ---- Plot ------------------------------------------------------------------------------------------------------------

def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the window values around each one, fewer at both ends; centred, so that curves do not lag."""
    sums, n, half = [0.0, *accumulate(values)], len(values), window // 2
    bounds = [(max(0, i - half), min(n, i + half + 1)) for i in range(n)]
    return [(sums[end] - sums[first]) / (end - first) for first, end in bounds]


def train_curve(run: Run) -> tuple[list[int], list[float]]:
    """Tokens and losses of the train rows that have both."""
    rows = [row for row in run.train if row.get("tokens") is not None and row.get("loss") is not None]
    return [row["tokens"] for row in rows], [row["loss"] for row in rows]


def val_curve(run: Run) -> tuple[list[float], list[float]]:
    """Tokens and losses of the val rows; their tokens lie on the line through the two train rows next to their step: a
    fork's need not be in proportion to its steps."""
    rows = [row for row in run.train if row.get("tokens") is not None and row["step"] > 0]
    points = sorted({row["step"]: row["tokens"] for row in rows}.items())
    points = [(0, 0), *points] if len(points) == 1 else points
    known = [row for row in run.val if points and row.get("loss") is not None]
    tokens = []
    for row in known:
        right = min(max(bisect_left(points, (row["step"], 0)), 1), len(points) - 1)
        (step, before), (next_step, after) = points[right - 1:right + 1]
        tokens.append(before + (after - before) * (row["step"] - step) / (next_step - step))
    return tokens, [row["loss"] for row in known]


def plot(runs: list[Run], path: Path) -> None:
    """Train and val loss of the runs over tokens, side by side, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    train_axes, val_axes = figure.subplots(1, 2)
    lines = []  # one of each run
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        tokens, losses = train_curve(run)
        train_axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        lines += train_axes.plot(tokens, smooth(losses, window=len(losses) // 25), color=color, linewidth=1.8)
        val_axes.plot(*val_curve(run), color=color, linewidth=1.8, marker="o", markersize=3)
    for axes, title, curves in ((train_axes, "Training loss", map(train_curve, runs)),
                                (val_axes, "Validation loss", map(val_curve, runs))):
        axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)", xlim=(0, None))
        limits = loss_limits([losses for _, losses in curves if losses])
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_formatter(FuncFormatter(  # 2.00B -> 2B, 2.50B -> 2.5B
            lambda tokens, _: re.sub(r"\.00?(?=\D)|(?<=\.\d)0(?=\D)", "", human_count(tokens))))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(lines, [run.name for run in runs], loc="outside lower center", ncols=3, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may hold $
    image = io.BytesIO()
    figure.savefig(image, format="png")
    files.write_whole(path, image.getvalue())


def loss_limits(curves: list[list[float]]) -> tuple[float, float] | None:
    """Axis limits that show the curves from a tenth of the way on; the first fall would flatten all that follows."""
    if not curves:
        return None
    top = max(max(losses[len(losses) // 10:]) for losses in curves)
    bottom = min(min(losses) for losses in curves)
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


# ---- Command line ----------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    parser = Parser(prog="python metrics.py", description="Compare runs: a table, and loss curves as PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write train and val loss curves over tokens")
    arguments = parser.parse_args(argv)
    path = arguments.plot
    if path is not None:
        check_output("--plot", path, ".png")
        require("--plot", "matplotlib")
    runs = [read_run(name) for name in arguments.runs]
    print(format_table(SUMMARY_HEADER, [summary(run) for run in runs]))
    by_step = val_losses_by_step(runs)
    if by_step:
        print("\nval loss by step\n" + format_table(("step", *(run.name for run in runs)), by_step))
    if path is not None:
        try:
            plot(runs, path)
        except OSError as error:
            raise MachineError(f"--plot '{path}' cannot be written: {error.strerror}") from None
