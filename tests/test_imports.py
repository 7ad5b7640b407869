"""The import arrows of the design, no pickle, and nothing at import: read from the source, so new files are covered."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Who may import whom, inside functions too; each also what its imports may, and a folder's files each other. A new
# file starts with no arrow.
ARROWS = {
    "config": set(),
    "files": {"config"},
    "cli": {"config", "files"},
    "kernels": {"cli"},
    "data": {"cli"},
    "distributed": {"cli"},
    "devices": {"distributed"},
    "watchdog": {"distributed"},
    "curves": {"cli"},
    "gpus": set(),
    "trackers": {"cli"},
    "metrics": {"curves", "trackers"},
    "model": {"kernels"},
    "optim": {"model", "distributed"},
    "tensor_files": {"files"},
    "checkpoint": {"distributed", "tensor_files"},
    "finetune": {"checkpoint", "model", "data"},
    "sample": {"finetune", "devices"},
    "convert": {"finetune"},
    "start": {"metrics", "optim", "convert", "devices"},
    "memory": {"finetune", "optim"},
    "plan": {"start", "memory", "gpus"},
    "tasks": {"sample"},
    "eval": {"tasks"},
    "serving": {"sample", "metrics"},
    "serve": {"serving"},
    "train": {"start", "eval", "plan", "gpus", "watchdog"},
    "benchmarks": {"train", "serving"},
    "bench": {"benchmarks"},
    "examples": {"train"},
}
# Imported where used: without them (and on a machine without triton) every file still imports.
OPTIONAL = ("triton", "pyarrow", "zstandard", "matplotlib", "wandb", "tensorboard", "sacrebleu", "fastapi", "uvicorn",
            "transformers")



def reachable(unit: str) -> set[str]:
    return {unit}.union(*map(reachable, ARROWS.get(unit, ())))


FILES = sorted(path.relative_to(ROOT) for pattern in ("*.py", "[!.]*/*.py") for path in ROOT.glob(pattern)
               if path.parent.name != "tests")
OURS = {path.parts[0].removesuffix(".py") for path in FILES}


def name_of(path: Path) -> str:
    """kernels/__init__.py -> kernels, data/loader.py -> data.loader"""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each module that the source imports anywhere, functions included, and the line; 'a.b' for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # level > 0 stays inside the folder
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module",
                                                                      "import_module", "runpy.run_module"):
            yield (node.args[0].value if isinstance(node.args[0], ast.Constant) else "?"), node.lineno


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path):
    unit = path.parts[0].removesuffix(".py")
    allowed = reachable(unit)
    wrong = [f"{path}:{line} imports {name}" for name, line in imported(ast.parse((ROOT / path).read_text("utf-8")))
             if name.split(".")[0] in OURS - allowed or name == "?"]
    assert wrong == []


def test_the_arrows_make_no_circle():
    done: set[str] = set()
    while ready := [unit for unit, arrows in ARROWS.items() if unit not in done and arrows <= done]:
        done.update(ready)
    assert done == set(ARROWS) == OURS


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_pickled(path):
    """Neither pickle and its kin, nor the torch and numpy functions that read or write pickles."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    wrong = [(line, name) for name, line in imported(tree)
             if name.split(".")[0] in forbidden or name in ("torch.load", "torch.save")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            wrong.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            wrong.append((node.value.lineno, "allow_pickle"))
    assert wrong == []


IMPORT_EVERYTHING = """
import importlib, os, random, signal, sys, threading
import numpy, safetensors.torch, tokenizers, torch, torch.distributed
for name in {optional!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

def world():
    return dict(
        folder=sorted(os.listdir(".")), environment=dict(os.environ), threads=threading.active_count(),
        torch_threads=torch.get_num_threads(), torch_rng=torch.get_rng_state().tolist(), python_rng=random.getstate(),
        numpy_rng=numpy.random.get_state()[1].tolist(), dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(), matmul=torch.get_float32_matmul_precision(),
        signals=[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)],
        group=torch.distributed.is_initialized(), cuda=torch.cuda.is_initialized())

before = world()
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (name.startswith("kernels.") and error.name == "triton"):  # the kernels themselves need triton
            raise
    after = world()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"importing {{name}} changed {{changed}}"
"""


def test_importing_any_file_does_nothing_and_needs_no_optional_package(tmp_path):
    program = IMPORT_EVERYTHING.format(optional=OPTIONAL, modules=[name_of(path) for path in FILES])
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
