"""README's promises that a test can keep: its commands, files and knobs exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import config as configuration

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_command_trains_the_demo_from_text_to_sample(tmp_path):
    command = next(line for line in README.splitlines() if line.endswith("&& python train.py"))
    assert "pip install -r requirements.txt" in command
    # the same main job, cut short: 6 steps of a small model; relative paths land in tmp_path
    shorter = ["train.max_steps=6", "train.eval_every=3", "train.tokens_per_step=512", "train.micro_batch=2",
               "train.eval_tokens=2048", "model.n_layer=1", "model.n_embd=32", "data.tokenizer=bpe:512"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *shorter], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for words in ("val loss", "bits/byte", "gzip", "xz", "--- sample at step 6", "python sample.py out/demo"):
        assert words in done.stdout, words
    again = subprocess.run([sys.executable, str(ROOT / "train.py"), *shorter], cwd=tmp_path, capture_output=True,
                           text=True)
    assert again.returncode == 0 and "is finished: step 6 of 6" in again.stdout


def test_the_second_command_is_the_one_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '(.*)' README.md", script)[1]
    assert len([line for line in README.splitlines() if re.search(pattern, line)]) == 1
    assert "ruff" in script and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_file_that_readme_names_exists():
    named = {name for name in re.findall(r"`([\w/]+\.(?:py|toml|txt))`", README) if "/" not in name or
             name.split("/")[0] in ("configs", "data", "kernels", "tests", "docs")}
    names = {name for name in named if not any((ROOT / folder / name).exists() for folder in (".", "data", "kernels"))}
    assert names - {"config.toml", "log.txt"} == set()


def test_every_file_at_the_top_is_in_readme():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name


ROWS = re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", README, re.MULTILINE)
READING_PATH = {name: int(lines) for name, lines in ROWS}


def test_the_files_to_read_are_as_long_as_readme_says_and_fit_an_afternoon():
    counted = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in READING_PATH}
    assert len(READING_PATH) == 12
    wrong = {name: lines for name, lines in counted.items() if abs(READING_PATH[name] - lines) > lines / 10}
    assert wrong == {}, "README is off by more than 10 %"
    assert sum(counted.values()) <= 3500


def test_readme_is_short():
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) <= 700


def test_every_document_and_picture_that_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_every_knob_that_readme_names_exists():
    sections = configuration.Config()
    for section, key in re.findall(r"\b(model|data|optim|train)\.(\w+)", README):
        if key in ("py", "safetensors", "prepare", "lrr"):  # a file, a module, and the typo that README shows
            continue
        assert hasattr(getattr(sections, section), key), f"{section}.{key}"
