"""What bench.py kernels counts: bytes and FLOPs of each operation, and the growth of memory."""

import json
import sys
from types import SimpleNamespace

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


class Device:
    """A CUDA device on paper: launching takes the host 30 us, the kernel 20. Times in s."""

    def __init__(self):
        self.host = self.idle_from = 0.0

    def run(self, seconds: float) -> float:
        """Queue work; when it will be over."""
        self.idle_from = max(self.idle_from, self.host) + seconds
        return self.idle_from

    def call(self) -> None:
        self.host += 30e-6
        self.run(20e-6)

    def wait(self) -> None:
        self.host = max(self.host, self.idle_from)

    def seconds_of(self, work) -> tuple[float, None]:
        before = self.host
        work()
        return self.host - before, None

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=None, query=lambda: event.at <= self.host, record=lambda: vars(event).update(
            at=self.run(0.0)), elapsed_time=lambda end: 1e3 * (end.at - event.at))
        return event


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.run(cycles / kernels.WAIT_HZ))
    monkeypatch.setattr(measure, "seconds_of", device.seconds_of)
    monkeypatch.setattr(kernels, "seconds_per_call", lambda work: 30e-6)
    return device


def test_on_cuda_a_call_takes_the_time_of_its_kernels_not_of_its_launch(device, capsys):
    clock, words, exceptions = kernels.choose_clock(torch.device("cuda"))
    assert clock("ours", device.call) == pytest.approx(20e-6) and exceptions == []
    assert "launches are not in it" in words and capsys.readouterr().err == ""


def test_a_call_that_waits_for_the_device_is_timed_by_the_clock_and_named(device, capsys):
    def call_and_wait() -> None:
        device.call()
        device.wait()

    clock, _, exceptions = kernels.choose_clock(torch.device("cuda"))
    assert [clock("Liger", call_and_wait) for _ in range(2)] == [30e-6] * 2 and exceptions == ["Liger"]
    assert capsys.readouterr().err == ("Liger: its calls cannot be queued, the time of their launches is in its "
                                       "figures\n")


def test_a_peer_that_this_build_lacks_is_left_out_of_the_table_with_its_reason(monkeypatch, tmp_path, capsys):
    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB")

    monkeypatch.setattr(measure, "WATCHED_S", 0.0)
    monkeypatch.setattr(kernels, "seconds_per_call", lambda work: (work(), 0.5)[1])
    monkeypatch.setattr(kernels, "choose_backends", lambda device, dtype: "torch")  # ours is not F's attention
    monkeypatch.setattr(kernels.kernels.reference, "attention", lambda q, k, v, first_key: q + k + v)
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", fail)
    bench.main(["kernels", "--device", "cpu", "--ops", "attention", "--rows", "9", "--repeats", "2", "--json",
                str(tmp_path / "ops.json")])
    content = json.loads((tmp_path / "ops.json").read_text())
    label, reason = "PyTorch: attention causal 1 x 9 x 12 x 64", "OutOfMemoryError: CUDA out of memory. Tried to "
    assert content["setting"]["left out"][label] == reason + "allocate 12 GiB"
    assert f"left out: {label}: {reason}allocate 12 GiB\n" in capsys.readouterr().out
    subjects = {row["subject"] for row in content["figures"]}
    assert "torch: attention causal 1 x 9 x 12 x 64" in subjects and not any("PyTorch" in name for name in subjects)
