"""What `bench.py kernels` measures: each operation beside PyTorch, torch.compile, Liger-Kernel and the roofline.

On CUDA at the shapes of GPT-2 in training, in bfloat16 with float32 weights; on the CPU at smaller ones, where the
plain PyTorch versions are measured. Contenders are functions of the same arguments; a figure is one contender's median
of many calls (CUDA) or one call (CPU) in a repeat.

Dims: N rows, C width, V vocabulary; B batch, T sequence, H heads, D head dim.
"""

import ctypes
import functools
import importlib.util
import itertools
import platform
import sys
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
CONTEXTS = (512, 1024, 2048, 4096, 8192)
DOCUMENT_TOKENS = 512  # on average
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
    if "attention" in ops:
        contexts = [T for T in CONTEXTS if T <= rows] if device.type == "cuda" else [min(rows, 1024)]
        for D, T in itertools.product((64, 128), contexts):
            yield _attention(device, dtype, tokens=rows, T=T, H=768 // D, D=D)
        for T in contexts[-2:]:
            yield _attention(device, dtype, tokens=rows, T=T, H=12, D=64, documents=True)
        yield _attention(device, dtype, tokens=rows, T=contexts[-1], H=12, D=64, window=contexts[-1] // 8)


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

    moved = {"forward": (4 if residual else 2) * rows * C * x.element_size() / 1e9,
             "backward": (4 if residual else 3) * rows * C * x.element_size() / 1e9}
    runs = _ours(op, by) | {"PyTorch": plain} | _compiled(plain, device)
    if is_layer and not residual and _has_liger(device):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        runs["Liger"] = lambda: (LigerLayerNormFunction.apply(x, weight, bias, 1e-5),)
    return Comparison(label, {f"{name}: {label}": _forward_backward(run, inputs, moved, "GB/s", device)
                              for name, run in runs.items()},
                      ratios=("forward ms", "backward ms"), ceiling="copy", bounded=("forward GB/s", "backward GB/s"))


def _forward_backward(run: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], amounts: dict[str, float],
                      unit: str, device: torch.device) -> Callable[[int], dict[str, float]]:
    """amounts: what forward and backward each move or compute, in the unit times seconds."""
    def measure(repeat: int) -> dict[str, float]:
        outputs = run()
        gradients = [torch.randn_like(out) for out in outputs]
        forward_s = seconds_per_call(run, device)
        backward_s = seconds_per_call(
            lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True), device)
        return {"forward ms": 1e3 * forward_s, "backward ms": 1e3 * backward_s,
                f"forward {unit}": amounts["forward"] / forward_s,
                f"backward {unit}": amounts["backward"] / backward_s}
    return measure


def _attention(device: torch.device, dtype: torch.dtype, *, tokens: int, T: int, H: int, D: int,
               documents: bool = False, window: int | None = None) -> Comparison:
    """FLOPs: two matmuls of the visible pairs forward, five backward; what is computed and masked does not count."""
    B = tokens // T
    kind = "documents" if documents else "causal" if window is None else f"window {window}"
    label = f"attention {kind} {B} x {T} x {H} x {D}"
    q, k, v = (torch.randn(B, T, H, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    ids = None
    if documents:  # lengths uniform from 1 up, of that mean
        starts = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 1 / DOCUMENT_TOKENS
        ids = starts.cumsum(1).to(device)
    first_key = kernels.first_visible_key(ids, window, T=T, device=device)
    own = torch.arange(T, device=device)
    pairs = (own + 1).sum().item() * B if first_key is None else \
        (own - first_key.clamp(min=0) + 1).expand(B, T).sum().item()
    flops = 2 * D * H * pairs  # of one matmul
    amounts = {"forward": 2 * flops / 1e12, "backward": 5 * flops / 1e12}

    def by(module) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (module.attention(q, k, v, first_key=first_key),)

    runs = _ours("attention", by)
    for name, peer in _attention_peers(q, k, v, ids, window).items():
        if _works(peer, name):
            runs[name] = peer
    return Comparison(label, {f"{name}: {label}": _forward_backward(run, [q, k, v], amounts, "TFLOP/s", device)
                              for name, run in runs.items()},
                      ratios=("forward ms", "backward ms"), ceiling="matmul",
                      bounded=("forward TFLOP/s", "backward TFLOP/s"))


def _attention_peers(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None,
                     window: int | None) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """SDPA by backend (causal: it cannot skip documents without a mask that costs it flash), FlexAttention for windows
    and documents, flash-attn."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    B, T = q.shape[:2]

    def sdpa(*backends: SDPBackend) -> tuple[Tensor, ...]:
        with sdpa_kernel(list(backends), set_priority=True):
            return (F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True),)

    if q.device.type != "cuda":
        name = "PyTorch" if ids is None and window is None else "PyTorch, causal"
        return {name: lambda: (F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)),
                                                              is_causal=True),)}
    peers = {"SDPA flash, causal": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
             "SDPA cuDNN, causal": lambda: sdpa(SDPBackend.CUDNN_ATTENTION)}
    if ids is not None or window is not None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = key <= query
            if ids is not None:
                seen = seen & (ids[b, query] == ids[b, key])
            return seen if window is None else seen & (key > query - window)

        mask = create_block_mask(visible, B, None, T, T, device=q.device)
        torch._dynamo.reset()
        flex = torch.compile(flex_attention, dynamic=False)
        peers["FlexAttention"] = lambda: (flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask),)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func
        size = (-1 if window is None else window - 1, 0)
        peers["flash-attn" + (", causal" if ids is not None else "")] = lambda: (
            flash_attn_func(q, k, v, causal=True, window_size=size),)
    return peers


def _works(peer: Callable[[], object], name: str) -> bool:
    try:
        peer()
    except RuntimeError as error:  # a backend that this build or this shape lacks
        print(f"{name} left out: {str(error).splitlines()[0][:160]}", file=sys.stderr)
        return False
    return True


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
    if device.type != "cuda":
        return {}
    torch._dynamo.reset()  # one code object serves all shapes: past 8 of them Dynamo would go on in eager
    return {"torch.compile": torch.compile(plain, dynamic=False)}


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
