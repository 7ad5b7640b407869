"""What a run reports about itself: tokens/s, MFU, memory; its log lines and metrics.jsonl.

train.py measures and hands over one row per log step; RunLog prints it as a line on stdout, appends that line to
RUN/log.txt and the row to RUN/metrics.jsonl, and passes it on to tensorboard or wandb if asked. An unknown figure is
null, and no (kind, step) stands there twice, also after a crash. Logging never ends a run: a full disk or a failing
tracker gives one warning. `python metrics.py RUN ...` is curves.py: runs read back and compared.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import curves
import files
import trackers
from config import MachineError, exit_cleanly
from curves import ROW_FIELDS, drop_rows_after, human_count, human_seconds

# ---- Speed and memory ------------------------------------------------------------------------------------------------

def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int) -> float | None:
    """Share (0..1) of the peak of all devices that the model's matmuls use; tokens_per_second counts all ranks."""
    if peak is None or not math.isfinite(tokens_per_second):
        return None
    return tokens_per_second * flops_per_token / (peak * world_size)


def peak_memory_bytes(device) -> int | None:
    """Most memory held at once so far: on CUDA by torch's tensors, on the CPU by the process; None if not known."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device)
    if kind == "cpu" and sys.platform == "linux":  # getrusage would count the parent's memory from before exec
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    if kind == "cpu":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    return None


@contextmanager
def profiled(run_dir: Path, step: int, log: "RunLog") -> Iterator[None]:
    """Trace a step into RUN/profile/step_N.json, which chrome://tracing and perfetto.dev show."""
    import torch
    path = run_dir / "profile" / f"step_{step:08d}.json"
    with torch.profiler.profile(record_shapes=True) as profiler:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        log.note(f"profiled step {step}: {path} ({path.stat().st_size / 1e6:.1f} MB)")  # a full disk leaves no file
    except (OSError, RuntimeError) as error:
        log.note(f"warning: the trace of step {step} was not written to {path}: {error}; training goes on")


# ---- Figures as text -------------------------------------------------------------------------------------------------

def format_train_line(row: dict, max_steps: int, seconds_left: float | None) -> str:
    """One log line, figures that are not known left out:
    'step 1200/19073 | loss 3.4121 | lr 6.0e-04 | grad 0.41 | 812k tok/s | mfu 46.2% | 2h 05m left'.
    """
    why = "loss or gradient not finite" if row.get("loss") is None else "a spike"
    return _line(row, max_steps, [f"skipped: {why}"] if row.get("skipped") else [], (
        ("loss", "loss {:.4f}".format), ("lr", "lr {:.1e}".format), ("grad_norm", "grad {:.2f}".format),
        ("tokens_per_second", lambda rate: f"{human_count(rate)} tok/s"), ("mfu", "mfu {:.1%}".format),
        ("seconds_left", lambda seconds: f"{human_seconds(seconds)} left")), seconds_left=seconds_left)


def format_val_line(row: dict, max_steps: int) -> str:
    """'step 250/1000 | val loss 2.1034 | 1.2345 bits/byte', figures that are not known left out."""
    is_known = row.get("loss") is not None and math.isfinite(row["loss"])
    return _line(row, max_steps, [] if is_known else ["val loss not finite"], (
        ("loss", "val loss {:.4f}".format), ("bits_per_byte", "{:.4f} bits/byte".format)))


def _line(row: dict, max_steps: int, words: list[str], styles: Iterable[tuple[str, Callable]], **more: object) -> str:
    figures = ((style, (row | more).get(name)) for name, style in styles)
    known = [style(figure) for style, figure in figures if figure is not None and math.isfinite(figure)]
    return " | ".join([f"step {row['step']}/{max_steps}", *words, *known])


# ---- The log of a run: stdout, log.txt, metrics.jsonl, tracker -------------------------------------------------------

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
        trackers.check(tracker)
        rows_path = run_dir / "metrics.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._last_step = drop_rows_after(rows_path, resume_step)
            self._rows_file, self._text_file = files.AppendFile(rows_path), files.AppendFile(run_dir / "log.txt")
        except OSError as error:
            raise MachineError(f"run folder '{run_dir}' cannot be written: {error.strerror}") from None
        self._tracker_name = tracker
        self._tracker: tuple[Callable, Callable] | None = None  # log and close
        with self._tracker_may_fail():
            self._tracker = trackers.start(tracker, run_dir, resume_step, config)

    def note(self, text: str) -> None:
        """Print text and append it to log.txt."""
        if self._enabled:
            _print(text)
        self.write(text)

    def write(self, text: str) -> None:
        """Append to log.txt what stderr shows."""
        if self._enabled:
            self._text_file.write(text)

    def train(self, row: dict, max_steps: int, *, mean_loss: float | None, seconds_left: float | None) -> None:
        """Log a train row (ROW_FIELDS; missing ones become null) and its line, which shows the mean loss of the steps
        since the last line: one batch's is noise."""
        if self._enabled:
            self.note(format_train_line(row | {"loss": mean_loss}, max_steps, seconds_left))
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
                self._tracker[1]()
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
                self._tracker[0](figures, step=row["step"])

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
            files.warn(text)
            self.write(text)


def _print(text: str) -> None:
    """Print a line at once. A stdout that no longer takes it (full disk, closed pipe) is given up, not the run."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a sample in a script that the terminal's encoding lacks
        _print(text.encode("ascii", errors="backslashreplace").decode())
    except OSError as error:
        # What stdout holds would fail again at exit, so it goes to /dev/null with all that follows.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        files.warn(f"warning: stdout cannot be written ({error.strerror}); training goes on, log.txt has the lines")


if __name__ == "__main__":
    exit_cleanly(curves.main)
