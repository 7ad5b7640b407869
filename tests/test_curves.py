"""curves.py: runs read back, as a table and as curves, and what is said of rows that are broken."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import curves
from config import UserError
from tests.test_metrics import ROOT, log_steps, train_row, val_row


@pytest.mark.parametrize("count, text", [
    (0, "0"), (7, "7"), (12.34, "12.3"), (999.4, "999"), (999.6, "1.00k"), (8123, "8.12k"), (812_345, "812k"),
    (999_600, "1.00M"), (1.234e6, "1.23M"), (9.996e9, "10.0B"), (5e12, "5.00T"),
])
def test_human_count_has_three_digits(count, text):
    assert curves.human_count(count) == text


def run_main(capsys, *arguments: str) -> list[list[str]]:
    """The words of each line that the command line prints."""
    curves.main(list(arguments))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def write_run(run_dir: Path, rows: list[dict]) -> str:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(run_dir)


def test_the_table_sums_a_run_up(tmp_path, capsys):
    rows = [{"kind": "train"} | train_row(step, loss=float(step), tokens_per_second=1000.0 * step, mfu=step / 100)
            for step in range(1, 22)]
    rows[11] |= {"loss": None, "skipped": True}  # step 12: not among the losses that are averaged
    rows += [{"kind": "val"} | val_row(10, loss=2.0, bits_per_byte=0.9), {"kind": "val"} | val_row(20, loss=2.5)]
    name = write_run(tmp_path / "run", rows)
    lines = run_main(capsys, name)
    assert lines[0] == curves.format_table(curves.SUMMARY_HEADER, []).split()
    # train loss: mean of 11, 13..21; tokens 21 x 4096; tok/s and mfu: medians of 1..21; seconds 21 x 1.5, rounded
    assert lines[1] == [name, "21", "86.0k", "16.4000", "2.0000", "2.5000", "0.9000", "11.0k",
                        "11.0%", "32"]


def test_a_run_without_figures_shows_dashes(tmp_path, capsys):
    name = write_run(tmp_path / "run", [])
    assert run_main(capsys, name)[1] == [name, *["-"] * 8, "0"]


def test_val_losses_stand_side_by_side_by_step(tmp_path, capsys):
    first = write_run(tmp_path / "a", [{"kind": "val"} | val_row(step, loss=3.0 - step / 10) for step in (5, 10)])
    second = write_run(tmp_path / "b", [{"kind": "val"} | val_row(step, loss=4.0 - step / 10) for step in (10, 15)])
    lines = run_main(capsys, first, second)
    assert lines[-4:] == [["step", first, second], ["5", "2.5000", "-"], ["10", "2.0000", "3.0000"],
                          ["15", "-", "2.5000"]]


def test_a_checkpoint_stands_for_its_run(tmp_path, capsys):
    write_run(tmp_path / "run", [{"kind": "val"} | val_row(5)])
    (tmp_path / "run/checkpoints/step_00000005").mkdir(parents=True)
    assert run_main(capsys, str(tmp_path / "run/checkpoints/step_00000005"))[1][1] == "5"


def test_the_line_that_a_running_run_is_writing_is_passed_over(tmp_path, capsys):
    name = write_run(tmp_path / "run", [{"kind": "val"} | val_row(5)])
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"kind": "val", "st')
    assert run_main(capsys, name)[1][1] == "5"


def test_the_plot_is_a_png_whatever_the_runs_hold(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; plots are left unchecked")
    from matplotlib.image import imread
    log_steps(tmp_path / "short", 1, 9)
    capsys.readouterr()
    val_only = write_run(tmp_path / "val_only", [{"kind": "val"} | val_row(5)])
    empty = write_run(tmp_path / "empty", [])
    run_main(capsys, str(tmp_path / "short"), val_only, empty, "--plot", str(tmp_path / "curves.png"))
    image = imread(tmp_path / "curves.png")
    assert image.shape[1] == 1800 and image[..., :3].std() > 0.01  # 12 inches at 150 dpi, and not blank
    assert not list(tmp_path.glob(".*"))  # no temporary file left


def test_val_losses_are_plotted_at_the_tokens_of_their_step():
    run = curves.Run("run", train=[train_row(10), train_row(20)],
                      val=[val_row(0), val_row(10), val_row(15), val_row(30, loss=None), val_row(40)])
    assert curves.val_curve(run)[0] == [0, 10 * 4096, 15 * 4096, 40 * 4096]
    assert curves.val_curve(replace(run, train=run.train[:1]))[0] == [0, 10 * 4096, 15 * 4096, 40 * 4096]
    fork = [train_row(step) | {"tokens": 1000 + (step - 100) * 50} for step in (110, 120)]  # at step 100 from 1,000
    run = curves.Run("fork", train=fork, val=[val_row(105), val_row(110), val_row(120), val_row(130)])
    assert curves.val_curve(run)[0] == [1250, 1500, 2000, 2500]


def test_the_legend_names_every_run_as_its_folder_is_called(tmp_path, monkeypatch, capsys):
    """matplotlib leaves labels that begin with _ out, and typesets what stands between two $."""
    from matplotlib.figure import Figure

    legends, real = [], Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda *args, **more: legends.append(real(*args, **more)) or legends[0])
    monkeypatch.chdir(tmp_path)
    names = ["_second", "lr$x_$", "$$"]
    for name in names:
        write_run(tmp_path / name, [{"kind": "train"} | train_row(10)])
    run_main(capsys, *names, "--plot", "curves.png")
    assert [text.get_text() for text in legends[0].get_texts()] == names
    assert [text.get_parse_math() for text in legends[0].get_texts()] == [False] * 3


def test_smoothing_is_the_centred_mean_cut_at_the_ends():
    assert curves.smooth([0.0, 3.0, 6.0, 0.0, 3.0], window=3) == [1.5, 3.0, 3.0, 3.0, 1.5]


def test_a_first_fall_does_not_set_the_plot_s_limits():
    bottom, top = curves.loss_limits([[11.0, 9.0, *[3.0] * 17, 2.0]])
    assert bottom < 2.0 and 3.0 < top < 4.0


@pytest.mark.parametrize("content, problem", [
    pytest.param("[" * 100_000 + "\n", "line 1 is not a metrics row: it is not valid JSON", id="nested too deeply"),
    ('{"kind": "train", "step": 1}\n{"kind": "tra\n', "line 2 is not a metrics row: it is not valid JSON"),
    ('{"kind": "val", "step": 1, "loss": NaN}\n', "line 1 is not a metrics row: it is not valid JSON"),
    ('{"kind": "test", "step": 1}\n', "line 1 is not a metrics row: its kind is neither 'train' nor 'val'"),
    ('{"kind": "val", "step": 1, "loss": "low"}\n', "line 1 is not a metrics row: loss is not a number"),
    ('{"kind": "val", "loss": 1.0}\n', "line 1 is not a metrics row: step is not a whole number"),
])
def test_a_broken_line_is_named(tmp_path, content, problem):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=problem):
        curves.main([str(tmp_path)])


@pytest.mark.parametrize("arguments, problem", [
    ([], "the following arguments are required: RUN; python metrics.py --help lists"),
    (["missing"], "run 'missing' is not a folder"),
    (["."], "folder '.' has no metrics.jsonl"),
    ([".", "--plot", "curves.jpg"], "--plot 'curves.jpg' should end in .png"),
    ([".", "--plot", "missing/curves.png"], "make 'missing' first"),
])
def test_mistakes_on_the_command_line_are_one_line_and_status_2(tmp_path, arguments, problem):
    done = subprocess.run([sys.executable, str(ROOT / "metrics.py"), *arguments], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and problem in done.stderr


def test_plotting_without_matplotlib_names_the_package(tmp_path, monkeypatch):
    name = write_run(tmp_path / "run", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match="--plot needs the package matplotlib, .* pip install matplotlib"):
        curves.main([name, "--plot", str(tmp_path / "curves.png")])


def test_the_command_line_does_not_import_torch(tmp_path):
    name = write_run(tmp_path / "run", [{"kind": "val"} | val_row(5)])
    code = f"import sys, metrics, curves; curves.main([{name!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
