"""What `bench.py kernels` measures: each operation beside PyTorch, torch.compile, Liger-Kernel and the roofline.

On CUDA at the shapes of GPT-2 in training, in bfloat16 with float32 weights; on the CPU at smaller ones, where the
plain PyTorch versions are measured. Contenders are functions of the same arguments; a figure is one contender's median
of many calls (CUDA) or one call (CPU) in a repeat.

Dims: N rows, C width, V vocabulary.
"""

import ctypes
import functools
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import metrics
from kernels import reference

GPT2_WIDTHS = {"124M": 768, "350M": 1024, "1.5B": 1600}
VOCAB_SIZE, TABLE_ROWS = 50_257, 50_304


@dataclass(frozen=True)
class Comparison:
    """Contenders of one operation at one shape. The first is ours; each returns its figures of one repeat."""

    label: str
    contenders: dict[str, Callable[[int], dict[str, float]]]
    ratios: tuple[str, ...]  # quantities to compare with the peers'
    ceiling: str  # which of ceilings() bounds
    bounded: tuple[str, ...]  # these quantities


def comparisons(ops: list[str], device: torch.device, dtype: torch.dtype, *, rows: int) -> Iterator[Comparison]:
    for name, C in GPT2_WIDTHS.items():
        if device.type == "cpu" and name != "124M":
            continue
        for op in [op for op in ops if op.endswith("_norm")]:
            for residual in (False, True):
                yield _norms(op, f"{op}{' + residual' if residual else ''} {rows} x {C}", device, dtype, rows=rows,
                             C=C, residual=residual)
        if "linear_cross_entropy" in ops:
            yield _cross_entropy(f"linear_cross_entropy {rows} x {C} x {TABLE_ROWS}", device, dtype, rows=rows, C=C)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """What the device reaches at best, on random data: GB/s read and written by a copy, TFLOP/s of a square matmul."""
    size, n = (2 ** 30, 8192) if device.type == "cuda" else (2 ** 27, 2048)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {"copy": lambda: 2 * size / 1e9 / seconds_per_call(lambda: target.copy_(source), device),
            "matmul": lambda: 2 * n ** 3 / 1e12 / seconds_per_call(lambda: a @ b, device)}


# ----------------------------------------------------------------------------------------------------------------------
# Operations

def _norms(op: str, label: str, device: torch.device, dtype: torch.dtype, *, rows: int, C: int,
           residual: bool) -> Comparison:
    """Bytes: x, y and the gradients once each; with a residual it, the sum and the sum's gradient too."""
    is_layer = op == "layer_norm"
    x, more = (torch.randn(rows, C, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(C, device=device, requires_grad=True) for _ in range(2))
    inputs = [x, weight] + [bias] * is_layer + [more] * residual

    def by(module) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            options = {"eps": 1e-5, "residual": more if residual else None}
            out = module.layer_norm(x, weight, bias, **options) if is_layer else module.rms_norm(x, weight, **options)
            return out if residual else (out,)
        return run

    def plain() -> tuple[Tensor, ...]:
        added = x + more if residual else x
        w = weight.to(dtype)
        y = F.layer_norm(added, (C,), w, bias.to(dtype), 1e-5) if is_layer else F.rms_norm(added, (C,), w, 1e-5)
        return (y, added) if residual else (y,)

    element = x.element_size()
    moved = {"forward": (4 if residual else 2) * rows * C * element,
             "backward": (4 if residual else 3) * rows * C * element}
    runs = _ours(op, by) | {"PyTorch": plain} | _compiled(plain, device)
    if is_layer and not residual and _has_liger(device):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        runs["Liger"] = lambda: (LigerLayerNormFunction.apply(x, weight, bias, 1e-5),)
    return Comparison(label, {f"{name}: {label}": _forward_backward(run, inputs, moved, device)
                              for name, run in runs.items()},
                      ratios=("forward ms", "backward ms"), ceiling="copy", bounded=("forward GB/s", "backward GB/s"))


def _forward_backward(run: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], moved: dict[str, int],
                      device: torch.device) -> Callable[[int], dict[str, float]]:
    def measure(repeat: int) -> dict[str, float]:
        outputs = run()
        gradients = [torch.randn_like(out) for out in outputs]
        forward_s = seconds_per_call(run, device)
        backward_s = seconds_per_call(
            lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True), device)
        return {"forward ms": 1e3 * forward_s, "backward ms": 1e3 * backward_s,
                "forward GB/s": moved["forward"] / 1e9 / forward_s,
                "backward GB/s": moved["backward"] / 1e9 / backward_s}
    return measure


def _cross_entropy(label: str, device: torch.device, dtype: torch.dtype, *, rows: int, C: int) -> Comparison:
    """Forward and backward together: ours makes its gradients in the forward pass. FLOPs: three matmuls."""
    hidden = torch.randn(rows, C, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(TABLE_ROWS, C, device=device) / C ** 0.5).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (rows,), device=device)

    def by(module) -> Callable[[], Tensor]:
        return lambda: module.linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB_SIZE, ignore_index=-100,
                                                   reduction="mean", softcap=0.0, z_loss=0.0, chunk_rows=None)

    def plain() -> Tensor:
        return F.cross_entropy((hidden @ weight.to(dtype).T)[:, :VOCAB_SIZE].float(), targets)

    runs = _ours("linear_cross_entropy", by) | {"PyTorch": plain} | _compiled(plain, device)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        runs["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, weight.to(dtype)[:VOCAB_SIZE], targets, options=options)
    if _has_liger(device):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        runs["Liger"] = lambda: LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight.to(dtype)[:VOCAB_SIZE], targets)[0]
    flops = 6 * rows * C * TABLE_ROWS

    def measured(run: Callable[[], Tensor]) -> Callable[[int], dict[str, float]]:
        def measure(repeat: int) -> dict[str, float]:
            def step() -> None:
                torch.autograd.grad(run(), [hidden, weight])
            seconds = seconds_per_call(step, device)
            figures = {"forward + backward ms": 1e3 * seconds, "TFLOP/s": flops / 1e12 / seconds}
            peak = peak_growth_bytes(step, device)
            return figures | ({} if peak is None else {"peak memory MiB": peak / 2 ** 20})
        return measure

    return Comparison(label, {f"{name}: {label}": measured(run) for name, run in runs.items()},
                      ratios=("forward + backward ms", "peak memory MiB"), ceiling="matmul", bounded=("TFLOP/s",))


def _ours(op: str, by: Callable) -> dict[str, Callable]:
    """Triton first, where it was chosen, and the reference."""
    ours = {"Triton": by(kernels.triton_module(op))} if kernels.backend(op) == "triton" else {}
    return ours | {"reference": by(reference)}


def _compiled(plain: Callable, device: torch.device) -> dict[str, Callable]:
    return {"torch.compile": torch.compile(plain)} if device.type == "cuda" else {}


@functools.cache
def _has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


# ----------------------------------------------------------------------------------------------------------------------
# Time and memory

def seconds_per_call(work: Callable[[], object], device: torch.device, *, at_least_s: float = 0.1) -> float:
    """After one call to warm up: the mean of as many calls as take at_least_s together."""
    work()
    calls = 1
    while True:
        seconds = _seconds(work, calls, device)
        if seconds >= at_least_s:
            return seconds / calls
        calls = max(2 * calls, int(1.2 * calls * at_least_s / max(seconds, 1e-6)))


def _seconds(work: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_growth_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above what was held before, while work runs; None where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left in the heap would be used again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    except OSError:
        return None
    before = metrics.peak_memory_bytes(device)
    work()
    return metrics.peak_memory_bytes(device) - before
