"""The ahead-of-time gate: every kernel compiles, at every tile size, for GPUs that are not here, within its limits.

For the Triton beside another torch, in an environment that holds both: python tests/aot.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton: whether the kernels compile is unchecked")

ROOT = Path(__file__).resolve().parents[1]


def run_python(*args: str) -> subprocess.CompletedProcess:
    """Apart from this process, whose kernels are made for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=900)


def test_every_kernel_compiles_for_every_architecture_within_its_limits(tmp_path):
    done = run_python("tests/aot.py", "--json", str(tmp_path / "kernels.json"))
    print(done.stdout)  # registers, spills and shared memory: shown by pytest -rP
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert {k["arch"] for k in kernels} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert not any(k["problems"] for k in kernels)


TOO_MUCH = """
import json, sys
from dataclasses import replace
sys.path.insert(0, "tests")
import aot

case = next(c for c in aot.norm_cases("sm_90") if c.name == "layer_norm 8192 backward" and c.dtype == "bfloat16")
narrow = replace(case, warps=4)  # 64 elements of each of four tensors a thread
odd = replace(next(c for c in aot.norm_cases("sm_90") if c.name == "layer_norm 1024 forward"), divisible_by_16=())
print(json.dumps([aot.compile_case(c).problems for c in (case, narrow, odd)]))
"""


def test_the_gate_sees_spilled_registers_and_narrow_loads():
    done = run_python("-c", TOO_MUCH)
    assert done.returncode == 0, done.stderr
    good, spilling, narrow = json.loads(done.stdout)
    assert good == []
    assert len(spilling) == 1 and spilling[0].startswith("spills ")
    assert narrow == ["no 16-byte loads"]
