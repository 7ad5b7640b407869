"""metrics.py against figures worked out by hand, files cut short as crashes and full disks cut them, and fake trackers.

Left unchecked without a GPU: peak_memory_bytes on CUDA. Left unchecked without network: the real wandb package.
"""

import importlib.machinery
import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

import metrics
import trackers
from config import MachineError, UserError
from metrics import RunLog

ROOT = Path(__file__).resolve().parent.parent


def train_row(step: int, **changes) -> dict:
    return {"step": step, "tokens": step * 4096, "loss": 8.0 - step / 100, "lr": 6e-4, "grad_norm": 0.41,
            "tokens_per_second": 812_345.0, "mfu": 0.462, "seconds": 1.5, "skipped": False} | changes


def val_row(step: int, **changes) -> dict:
    return {"step": step, "loss": 2.1034, "bits_per_byte": 1.2345} | changes


def log_steps(run_dir: Path, first: int, last: int, *, resume_step: int = 0, **arguments) -> None:
    """A run of train rows first..last with a val row every second step."""
    log = RunLog(run_dir, resume_step=resume_step, **arguments)
    for step in range(first, last + 1):
        log.train(row := train_row(step), 100, mean_loss=row["loss"], seconds_left=None)
        if step % 2 == 0:
            log.val(val_row(step), 100)
    log.close()


def rows_of(run_dir: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in metrics.jsonl")
    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def keys_of(run_dir: Path) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in rows_of(run_dir)]


@pytest.fixture
def file_size_limit():
    """A function that sets the largest size a file may grow to (-1: any): writes beyond it fail, as on a full disk.

    Tests using it need capsys as well: pytest's other capture writes to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size < 0 else size, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- Speed and memory ------------------------------------------------------------------------------------------------

def test_mfu_divides_by_the_peak_of_all_devices():
    # 1M tok/s x 1 GFLOP/token = 1 PFLOP/s on two devices of 1 PFLOP/s each
    assert metrics.mfu(1e6, 1e9, 1e15, 2) == pytest.approx(0.5)


def test_mfu_is_none_when_the_peak_is_unknown():
    assert metrics.mfu(1e6, 1e9, None, 2) is None


def test_peak_memory_of_the_cpu_grows_by_what_is_allocated():
    code = ("import metrics; before = metrics.peak_memory_bytes('cpu'); block = bytearray(b'x') * 200_000_000; "
            "print(metrics.peak_memory_bytes('cpu') - before)")
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 150e6 < grown < 250e6  # 200 MB plus or minus the interpreter; KiB taken for bytes would be 1024 times off


def test_peak_memory_of_an_unknown_device_is_none():
    assert metrics.peak_memory_bytes("mps") is None


# ---- Figures as text -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (307, "5m 07s"), (3599.7, "1h 00m"), (7500, "2h 05m"),
    (3 * 86_400 + 4 * 3600, "3d 04h"),
])
def test_human_seconds_shows_two_units(seconds, text):
    assert metrics.human_seconds(seconds) == text


def test_train_line_reads_as_designed():
    line = metrics.format_train_line(train_row(1200, loss=3.41214), 19073, 7500.0)
    assert line == "step 1200/19073 | loss 3.4121 | lr 6.0e-04 | grad 0.41 | 812k tok/s | mfu 46.2% | 2h 05m left"


def test_train_line_leaves_unknown_figures_out():
    row = train_row(3, mfu=None, grad_norm=float("nan"), tokens_per_second=None)
    assert metrics.format_train_line(row, 9, None) == "step 3/9 | loss 7.9700 | lr 6.0e-04"


def test_train_line_says_that_a_step_was_skipped():
    line = metrics.format_train_line(train_row(3, loss=None, skipped=True, grad_norm=None), 9, None)
    assert line == "step 3/9 | skipped: loss or gradient not finite | lr 6.0e-04 | 812k tok/s | mfu 46.2%"


def test_val_line_reads_as_designed():
    assert metrics.format_val_line(val_row(250), 1000) == "step 250/1000 | val loss 2.1034 | 1.2345 bits/byte"


def test_val_line_leaves_unknown_bits_per_byte_out():
    assert metrics.format_val_line(val_row(250, bits_per_byte=None), 1000) == "step 250/1000 | val loss 2.1034"


# ---- RunLog: rows and lines ------------------------------------------------------------------------------------------

def test_rows_have_the_fields_of_the_design_in_their_order(tmp_path):
    log = RunLog(tmp_path / "run", resume_step=0)
    log.train(train_row(1), 10, mean_loss=None, seconds_left=None)
    log.val(val_row(1), 10)
    log.close()
    train, val = rows_of(tmp_path / "run")
    assert list(train) == ["kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds",
                           "skipped"]
    assert list(val) == ["kind", "step", "loss", "bits_per_byte"]
    assert train == {"kind": "train"} | train_row(1) and val == {"kind": "val"} | val_row(1)


def test_figures_that_are_missing_or_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path, resume_step=0)
    log.train({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-3}, 10, mean_loss=None,
              seconds_left=None)
    log.close()
    (row,) = rows_of(tmp_path)
    assert row["lr"] == 1e-3
    assert [row[field] for field in ("loss", "grad_norm", "mfu", "tokens", "skipped")] == [None] * 5


def test_lines_go_to_stdout_and_to_log_txt(tmp_path, capsys):
    log = RunLog(tmp_path, resume_step=0)
    log.note("device: cpu")
    log.train(train_row(1), 10, mean_loss=9.5, seconds_left=60.0)
    log.val(val_row(1), 10)
    log.close()
    printed = capsys.readouterr()
    lines = ["device: cpu", metrics.format_train_line(train_row(1, loss=9.5), 10, 60.0),
             metrics.format_val_line(val_row(1), 10)]
    assert printed.out.splitlines() == lines and printed.err == ""
    assert (tmp_path / "log.txt").read_text().splitlines() == lines


def test_each_row_is_in_the_file_before_the_next_step(tmp_path):
    log = RunLog(tmp_path, resume_step=0)
    for step in (1, 2):
        log.train(train_row(step), 10, mean_loss=None, seconds_left=None)
        assert keys_of(tmp_path)[-1] == ("train", step)
    log.close()


def test_a_row_logged_twice_is_written_once(tmp_path):
    log = RunLog(tmp_path, resume_step=0)
    log.train(train_row(1), 10, mean_loss=None, seconds_left=None)
    log.train(train_row(1, loss=0.5), 10, mean_loss=None, seconds_left=None)
    log.val(val_row(1), 10)
    log.val(val_row(1), 10)
    log.close()
    assert keys_of(tmp_path) == [("train", 1), ("val", 1)]
    assert rows_of(tmp_path)[0]["loss"] == train_row(1)["loss"]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", resume_step=0, tracker="wandb", enabled=False)
    log.note("hello")
    log.train(train_row(1), 10, mean_loss=None, seconds_left=None)
    log.val(val_row(1), 10)
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_note_in_a_script_that_the_terminal_lacks_does_not_end_the_run(tmp_path):
    code = (f"import metrics, pathlib; log = metrics.RunLog(pathlib.Path({str(tmp_path)!r}), resume_step=0); "
            "log.note('ab \\u4e2d'); log.note('after'); log.close()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "ab \\u4e2d\nafter\n")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "ab 中\nafter\n"


# ---- RunLog: after a crash, on a full disk ---------------------------------------------------------------------------

def test_a_resumed_run_has_the_rows_of_an_unbroken_one(tmp_path):
    log_steps(tmp_path / "unbroken", 1, 9)
    log_steps(tmp_path / "broken", 1, 6)
    log_steps(tmp_path / "broken", 5, 9, resume_step=4)
    assert (tmp_path / "broken/metrics.jsonl").read_bytes() == (tmp_path / "unbroken/metrics.jsonl").read_bytes()


def test_every_way_to_tear_the_last_line_leaves_a_resumable_file(tmp_path):
    log_steps(tmp_path / "unbroken", 1, 3)
    whole = (tmp_path / "unbroken/metrics.jsonl").read_bytes()
    last_line = len(whole) - len(whole.splitlines()[-1]) - 1
    for size in range(last_line, len(whole) + 1, 7):
        run = tmp_path / f"torn_at_{size}"
        run.mkdir()
        (run / "metrics.jsonl").write_bytes(whole[:size])
        log_steps(run, 3, 3, resume_step=2)
        assert (run / "metrics.jsonl").read_bytes() == whole


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    log_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    log_steps(tmp_path, 4, 4, resume_step=3)
    assert keys_of(tmp_path) == [("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4)]


def test_duplicates_left_by_another_program_go_at_resume(tmp_path):
    log_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    log_steps(tmp_path, 3, 3, resume_step=2)
    assert keys_of(tmp_path) == [("train", 1), ("train", 2), ("val", 2), ("train", 3)]


def test_zeros_left_by_a_power_loss_go_at_resume(tmp_path):
    log_steps(tmp_path, 1, 2)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 300)
    log_steps(tmp_path, 3, 3, resume_step=2)
    assert keys_of(tmp_path) == [("train", 1), ("train", 2), ("val", 2), ("train", 3)]


def test_a_run_that_starts_again_without_a_checkpoint_keeps_no_row(tmp_path):
    log = RunLog(tmp_path, resume_step=0)
    log.val(val_row(0), 10)
    log.train(train_row(1), 10, mean_loss=None, seconds_left=None)
    log.close()
    log = RunLog(tmp_path, resume_step=0)
    log.val(val_row(0, loss=9.0), 10)
    log.close()
    assert rows_of(tmp_path) == [{"kind": "val"} | val_row(0, loss=9.0)]


def test_a_crash_before_the_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    log_steps(tmp_path, 1, 6)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*paths):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(metrics.os, "replace", crash)
    with pytest.raises(MachineError, match="cannot be written: No space left on device"):
        RunLog(tmp_path, resume_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_log_txt_is_appended_to(tmp_path):
    for resume_step in (0, 4):
        log = RunLog(tmp_path, resume_step=resume_step)
        log.note(f"from {resume_step}")
        log.close()
    assert (tmp_path / "log.txt").read_text() == "from 0\nfrom 4\n"


def test_rows_refused_by_a_full_disk_are_written_once_there_is_room(tmp_path, capsys, file_size_limit):
    log = RunLog(tmp_path, resume_step=0)
    log.train(train_row(1), 10, mean_loss=None, seconds_left=None)
    file_size_limit((tmp_path / "metrics.jsonl").stat().st_size + 20)  # the next row is torn after 20 bytes
    for step in (2, 3):
        log.train(train_row(step), 10, mean_loss=None, seconds_left=None)
    torn = (tmp_path / "metrics.jsonl").read_bytes()
    file_size_limit(-1)
    log.train(train_row(4), 10, mean_loss=None, seconds_left=None)
    log.close()
    assert not torn.endswith(b"\n")
    assert rows_of(tmp_path) == [{"kind": "train"} | train_row(step) for step in (1, 2, 3, 4)]
    assert (tmp_path / "log.txt").read_text().count("\n") == 4
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written (File too large)") == 1


def test_rows_that_wait_for_room_are_tried_again_at_the_end(tmp_path, capsys, file_size_limit):
    log = RunLog(tmp_path, resume_step=0)
    file_size_limit(20)
    log.train(train_row(1), 10, mean_loss=None, seconds_left=None)
    file_size_limit(-1)
    log.close()
    assert keys_of(tmp_path) == [("train", 1)]


def test_a_stdout_on_a_full_disk_does_not_end_the_run(tmp_path):
    code = (f"import metrics, pathlib, config; log = metrics.RunLog(pathlib.Path({str(tmp_path)!r}), resume_step=0); "
            "config.exit_cleanly(lambda argv: [log.note('first'), log.note('second')])")
    with open("/dev/full", "w") as full:
        stdout_full = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
        both_full = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=full)
    assert stdout_full.returncode == both_full.returncode == 0
    assert stdout_full.stderr.decode() == ("warning: stdout cannot be written (No space left on device); training goes "
                                           "on, log.txt has the lines\n")
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n" * 2


def test_a_trace_that_a_full_disk_swallows_is_said_to_be_missing(tmp_path, capsys, file_size_limit):
    import torch
    log = RunLog(tmp_path, resume_step=0)
    file_size_limit(20_000)  # PyTorch leaves a part of the file under a temporary name and raises nothing
    with metrics.profiled(tmp_path, 3, log):
        sum(torch.ones(8, 8) @ torch.ones(8, 8) for _ in range(200))
    file_size_limit(-1)
    log.close()
    assert "warning: the trace of step 3 was not written to" in capsys.readouterr().out


# ---- Trackers --------------------------------------------------------------------------------------------------------

class FakeWandb(types.ModuleType):
    """The part of wandb's API that metrics.py uses; remembers every call. Fails at the step fail_at."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
        self.inits, self.logged, self.finished, self.fail_at = [], [], 0, None

    def init(self, *, project, name, id, resume, dir, config):
        self.inits.append({"project": project, "name": name, "id": id, "resume": resume, "dir": dir, "config": config})
        return self

    def log(self, figures, *, step):
        if step == self.fail_at:
            raise ConnectionError("no route\nto host")
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_gets_the_known_figures_at_their_step(tmp_path, wandb):
    log = RunLog(tmp_path, resume_step=0, tracker="wandb")
    log.train(train_row(1, mfu=None), 10, mean_loss=None, seconds_left=None)
    log.val(val_row(2), 10)
    log.close()
    assert wandb.logged == [
        (1, {"train/tokens": 4096, "train/loss": 7.99, "train/lr": 6e-4, "train/grad_norm": 0.41,
             "train/tokens_per_second": 812_345.0, "train/seconds": 1.5, "train/skipped": False}),
        (2, {"val/loss": 2.1034, "val/bits_per_byte": 1.2345}),
    ]
    assert wandb.finished == 1


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path, wandb):
    log_steps(tmp_path / "run", 1, 4, tracker="wandb", config={"train": {"seed": 1}})
    log_steps(tmp_path / "run", 5, 6, resume_step=4, tracker="wandb")
    log_steps(tmp_path / "other", 1, 2, tracker="wandb")
    first, resumed, other = wandb.inits
    assert first["id"] == resumed["id"] != other["id"]
    assert first == {"project": "flatgpt", "name": "run", "id": first["id"], "resume": "allow",
                     "dir": str(tmp_path / "run"), "config": {"train": {"seed": 1}}}


def test_a_tracker_that_fails_midway_warns_once_and_the_rows_go_on(tmp_path, wandb, capsys):
    wandb.fail_at = 2
    log_steps(tmp_path, 1, 4, tracker="wandb")
    assert keys_of(tmp_path) == [("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4)]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "tracker wandb failed (ConnectionError: no route to host)" in warnings[0]
    assert warnings[0] in (tmp_path / "log.txt").read_text().splitlines()


def test_a_tracker_that_does_not_start_warns_and_the_rows_go_on(tmp_path, wandb, monkeypatch, capsys):
    def offline(**arguments):
        raise TimeoutError("no answer")
    monkeypatch.setattr(wandb, "init", offline)
    log_steps(tmp_path, 1, 1, tracker="wandb")
    assert keys_of(tmp_path) == [("train", 1)]
    assert "tracker wandb failed (TimeoutError: no answer)" in capsys.readouterr().err


def test_a_missing_tracker_is_a_user_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="train.tracker = 'wandb' needs the package wandb, .* pip install wandb"):
        RunLog(tmp_path / "run", resume_step=0, tracker="wandb")
    assert not (tmp_path / "run").exists()


def test_a_folder_named_as_the_tracker_does_not_pass_for_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # only here, so that an installed wandb is not found either
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match="pip install wandb"):
        trackers.check("wandb")


def test_tensorboard_of_a_resumed_run_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; event files are left unchecked")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log_steps(tmp_path, 1, 6, tracker="tensorboard")
    log_steps(tmp_path, 5, 8, resume_step=4, tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.step for event in events.Scalars("val/bits_per_byte")] == [2, 4, 6, 8]
    assert events.Scalars("train/loss")[7].value == pytest.approx(train_row(8)["loss"])  # stored as float32
