"""Which of several right backends is the fastest: forward and backward timed at the shapes of the run.

Who wins differs by GPU, shape and version: cuDNN's attention is ahead of FlashAttention-2 on Hopper by others' figures,
and behind it elsewhere. Rank 0 of a run on CUDA measures once, before the first step; self_check.agree() chooses. What
PyTorch computes is compiled if the run is. A norm is timed with the residual add in front, which Inductor fuses; what
else it may fuse in the model, such as a cast or a dropout beside the norm, this cannot see.

Dims: B batch, T sequence, H query heads, Hkv key/value heads, D head dim, C width.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from config import ModelConfig
from kernels.self_check import ALLOWANCE, Measured, attend, has_own_qk, words_of

ROUNDS = 7  # in which all take turns, since the first to run finds a cooler GPU; the median counts
ROUND_S = 0.02  # of one backend, in calls one after the other: launches then hide behind the kernels before them
LOSS_ROWS = 8192  # of the loss, one chunk of logits: all others cost the same
MEAN_DOCUMENT = 512  # tokens of the documents that stand for those of the data
SAME = 8  # ALLOWANCEs by which two backends that are both right may differ at the run's shapes

Call = Callable[[], tuple[Tensor, ...]]  # one forward and backward: outputs and gradients
Timer = Callable[[Call, int], float]  # ms of a call, in the mean of so many


class Work(NamedTuple):
    """run(module, *inputs) -> outputs, whose gradients are given; all inputs want theirs."""

    run: Callable[..., tuple[Tensor, ...]]
    inputs: list[Tensor]
    gradients: list[Tensor]


def rivals(setting: str, model: ModelConfig, *, device: torch.device, documents: bool,
           compiles: bool) -> dict[str, tuple[str, ...]]:
    """The backends to check and to time beside the first one, Triton's, of each operation. None where there is no
    choice: outside CUDA, where the setting (train.kernels) names one, and in a deterministic run, whose bits a clock
    must not decide. documents: whether they are kept apart."""
    if device.type != "cuda" or setting != "auto" or torch.are_deterministic_algorithms_enabled():
        return {}
    is_masked = documents or model.window is not None
    of_pytorch = ("FlexAttention",) * compiles if is_masked else ("SDPA cuDNN", "SDPA flash")
    norm = "layer_norm" if model.norm == "layernorm" else "rms_norm"  # of the residual stream
    return {"attention": ("triton fused", *of_pytorch), norm: ("torch",), "linear_cross_entropy": ("torch",)}


def measure(contenders: dict[str, list[str]], model: ModelConfig, *, B: int, T: int, table_rows: int,
            dtype: torch.dtype, device: torch.device, documents: bool, compiles: bool,
            timer: Timer | None = None) -> Measured:
    """Milliseconds of each operation's contenders (self_check.contenders), where it has several; what raises, does not
    fit into memory, or computes something else than the first has a reason in their place. Some 0.15 s each, and the
    compiling."""
    started = time.perf_counter()
    timer = timer or (partial(_on_cuda, device=device) if device.type == "cuda" else _on_cpu)
    found: dict[str, dict[str, float | str]] = {}
    for op, backends in contenders.items():
        if len(backends) > 1:
            work = _work(op, model, B=B, T=T, table_rows=table_rows, documents=documents, dtype=dtype, device=device)
            found[op] = _take_turns(op, backends, work, compiles, timer)
            del work  # before the next one's
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found, time.perf_counter() - started


def _take_turns(op: str, backends: list[str], work: Work, compiles: bool, timer: Timer) -> dict[str, float | str]:
    calls: dict[str, tuple[Call, int]] = {}
    found: dict[str, float | str] = {}
    expected = None
    for name in backends:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                module = kernels.module_of(op, name)
                run = torch.compile(work.run, dynamic=False) if compiles and name == "torch" else work.run
                call = partial(_forward_and_backward, run, module, work)
                results = call()
                difference = _difference(results, results if expected is None else expected)
                if difference <= SAME * ALLOWANCE[work.inputs[0].dtype]:
                    expected = results if expected is None else expected
                    calls[name] = call, max(1, min(100, int(1e3 * ROUND_S / max(timer(call, 1), 1e-3))))
                else:
                    found[name] = (f"relative difference {difference:.2g} to {next(iter(calls))} at the run's shapes"
                                   if math.isfinite(difference) else "results are not finite at the run's shapes")
            except Exception as error:  # of the compiler, the launch or the driver, each with types of its own
                found[name] = words_of(error, op, name, work.inputs[0].device, [str(w.message) for w in said])
        results = None
    expected = None
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (call, repeats) in calls.items():
            samples[name].append(timer(call, repeats))
    return {name: statistics.median(ms) for name, ms in samples.items()} | found


def _forward_and_backward(run: Callable[..., tuple[Tensor, ...]], module: ModuleType,
                          work: Work) -> tuple[Tensor, ...]:
    outputs = run(module, *work.inputs)
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, work.inputs, work.gradients)


def _difference(ours: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> float:
    """The largest of the relative ones (Frobenius norm); infinite if a number is not finite."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    of_each = [(norm(a - b) / norm(b)).item() for a, b in zip(ours, first, strict=True)]
    return max(value if math.isfinite(value) else math.inf for value in of_each)


def _on_cuda(call: Call, repeats: int, *, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / repeats


def _on_cpu(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - start) / repeats


# ---- What is timed ---------------------------------------------------------------------------------------------------

def _work(op: str, model: ModelConfig, *, B: int, T: int, table_rows: int, documents: bool, dtype: torch.dtype,
          device: torch.device) -> Work:
    """As a block of the model has it; of the loss some of its rows."""
    C, H, Hkv, D, eps = model.n_embd, model.n_head, model.kv_heads, model.dim_per_head, model.norm_eps
    on_cpu = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, device=device, dtype=dtype,
                    generator=torch.Generator(device).manual_seed(0))  # of its own: the run's stays untouched
    if op == "attention":
        ids = (torch.rand((B, T), generator=on_cpu) < 1 / MEAN_DOCUMENT).cumsum(1).to(device) if documents else None
        first_key = kernels.first_visible_key(ids, model.window, T=T, device=device)
        packed = randn(B, T, H + 2 * Hkv, D)
        q, k, v = packed.split((H, Hkv, Hkv), dim=2)
        inputs = [q.contiguous(), k.contiguous(), v] if has_own_qk(model) else [packed]
        return Work(lambda m, *inputs: (attend(m, *inputs, n_head=H, first_key=first_key),), _leaves(inputs),
                    [randn(B, T, H, D)])
    if op == "linear_cross_entropy":
        rows = min(B * T, LOSS_ROWS)
        targets = torch.randint(model.vocab_size, (rows,), generator=on_cpu).to(device)
        options = {"vocab_size": model.vocab_size, "reduction": "sum", "softcap": model.logit_softcap}
        return Work(lambda m, hidden, weight: (m.linear_cross_entropy(hidden, weight, targets, **options),),
                    _leaves([randn(rows, C), randn(table_rows, C, dtype=torch.float32) / C ** 0.5]),
                    [torch.ones((), device=device)])
    x, residual, *gradients = (randn(B, T, C) for _ in range(4))
    weights = [randn(C, dtype=torch.float32) for _ in range(1 + (op == "layer_norm" and model.bias))]
    if op == "rms_norm":
        return Work(lambda m, x, residual, weight: m.rms_norm(x, weight, eps=eps, residual=residual),
                    _leaves([x, residual, *weights]), gradients)
    return Work(lambda m, x, residual, weight, bias=None: m.layer_norm(x, weight, bias, eps=eps, residual=residual),
                _leaves([x, residual, *weights]), gradients)


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]
