"""What bench.py kernels counts: bytes and FLOPs of each operation, and the growth of memory."""

import json
import sys

import pytest
import torch

import bench
from benchmarks import kernels, measure


@pytest.mark.parametrize("op", kernels.kernels.TRITON)
def test_an_operation_is_compared_with_pytorch_and_the_roofline(op, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "WATCHED_S", 0.0)
    monkeypatch.setattr(kernels, "seconds_per_call", lambda work: (work(), 0.5)[1])
    monkeypatch.setattr(kernels, "TABLE_ROWS", 384)
    monkeypatch.setattr(kernels, "VOCAB_SIZE", 300)
    bench.main(["kernels", "--device", "cpu", "--ops", op, "--rows", "9", "--repeats", "1", "--json",
                str(tmp_path / "ops.json")])
    rows = {(row["subject"], row["quantity"]): row["median"]
            for row in json.loads((tmp_path / "ops.json").read_text())["figures"]}
    ours = "torch" if op == "layer_norm" else "cpu"
    if op == "linear_cross_entropy":
        label = "linear_cross_entropy 9 x 768 x 384"
        assert rows[f"{ours}: {label}", "TFLOP/s"] == 6 * 9 * 768 * 384 / 1e12 / 0.5  # three matmuls in 0.5 s
        assert rows[f"{ours}: {label} / PyTorch", "ratio of forward + backward ms"] == 1.0
    elif op == "attention":
        forward = rows[f"{ours}: attention causal 1 x 9 x 12 x 64", "forward TFLOP/s"]
        assert forward == 2 * 2 * 64 * 12 * (9 * 10 / 2) / 1e12 / 0.5  # two matmuls of the 45 pairs under the diagonal
        assert rows[f"{ours}: attention causal 1 x 9 x 12 x 64", "backward TFLOP/s"] == pytest.approx(2.5 * forward)
        alone = rows[f"{ours}: attention window 1 1 x 9 x 12 x 64", "forward TFLOP/s"]
        assert alone == pytest.approx(forward * 9 / 45)  # each query sees itself alone
    else:
        for label, tensors in ((f"{op} 9 x 768", 2), (f"{op} + residual 9 x 768", 4)):  # read or written forward
            assert rows[f"PyTorch: {label}", "forward GB/s"] == tensors * 9 * 768 * 4 / 1e9 / 0.5
        assert rows[f"{ours}: {op} 9 x 768 / copy", "ratio of forward GB/s"] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the measure of peak memory is unchecked here")
def test_the_growth_of_memory_is_that_of_the_work_alone():
    held = torch.ones(2 ** 24)  # 64 MiB, before
    growth = kernels.peak_growth_bytes(lambda: torch.ones(2 ** 23).sum(), torch.device("cpu"))
    assert held.sum() == 2 ** 24 and 30 <= growth / 2 ** 20 < 48  # 32, give or take what the process frees meanwhile
