"""Each Triton kernel against its PyTorch reference, on this machine, at a run's dtype and widths, before it is trusted.

A driver, a compiler or a chip that nobody tested can be wrong in ways that no test of ours saw; a run that would learn
from wrong gradients for a month finds out in its first second instead.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kernels
from config import MachineError, ModelConfig
from kernels import reference

# What may be added to twice the reference's own error: both are relative to float64, in the Frobenius norm. A wrong
# index or a missing term is off by 0.1 and more.
ALLOWANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # the GPU sums float32 in other orders


def verdicts(setting: str, model: ModelConfig, *, table_rows: int, dtype: torch.dtype,
             device: torch.device) -> dict[str, str | None]:
    """Of each operation that the model uses, why Triton must not compute it here; None if it may.

    setting: auto, triton or torch, as train.kernels; table_rows: rows of the padded embedding table.
    """
    used = ["attention", "linear_cross_entropy"]
    used += ["layer_norm"] if model.norm == "layernorm" else []
    used += ["rms_norm"] if model.norm == "rmsnorm" or model.qk_norm else []
    reason = "asked for" if setting == "torch" else kernels.why_no_triton(device)
    if reason is None and dtype not in ALLOWANCE:
        reason = f"no kernels for {dtype}"
    if reason is not None:
        return dict.fromkeys(used, reason)
    return {op: _problem(op, model, table_rows, dtype, device) for op in used}


def _problem(op: str, model: ModelConfig, table_rows: int, dtype: torch.dtype, device: torch.device) -> str | None:
    cases = {"attention": _attention_cases, "layer_norm": _norm_cases, "rms_norm": _norm_cases,
             "linear_cross_entropy": _cross_entropy_cases}[op]
    try:
        module = kernels.triton_module(op)
        for run, inputs in cases(op, model, table_rows, dtype):
            inputs = [x.to(device) for x in inputs]
            for name, (error, allowed) in _errors(run, module, inputs).items():
                if not error <= allowed:  # also if it is NaN
                    return f"relative error {error:.2g} of {name}, allowed {allowed:.2g}"
    except Exception as error:  # of the compiler, the launch or the driver, each with types of its own
        text = str(error).strip().splitlines() or [""]
        if "illegal memory access" in str(error):  # CUDA answers nothing after that, the reference's calls neither
            raise MachineError(f"the Triton kernel of {op} broke this process's CUDA context ({text[0][:200]}); start "
                               "again with train.kernels=torch") from error
        return f"{type(error).__name__}: {text[0][:200]}"
    return None


Case = tuple[Callable, list[Tensor]]  # run(module, *inputs) -> the output; floating inputs get gradients


def _norm_cases(op: str, model: ModelConfig, table_rows: int, dtype: torch.dtype) -> Iterator[Case]:
    widths = set()
    if op == "rms_norm" and model.qk_norm:
        widths.add(model.dim_per_head)
    if op == {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[model.norm]:
        widths.add(model.n_embd)
    for width in sorted(widths):
        x, weight, bias = _randn(37, width).to(dtype) + 1.0, _randn(width) + 1.0, _randn(width)
        if op == "rms_norm":
            yield (lambda m, x, w: m.rms_norm(x, w, eps=model.norm_eps)), [x, weight]
        elif model.bias:
            yield (lambda m, x, w, b: m.layer_norm(x, w, b, eps=model.norm_eps)), [x, weight, bias]
        else:
            yield (lambda m, x, w: m.layer_norm(x, w, None, eps=model.norm_eps)), [x, weight]


def _attention_cases(op: str, model: ModelConfig, table_rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """Plain causal (or the model's window), then documents too; two key heads at most, T of two tiles and a bit."""
    T, heads = 150, model.n_head // model.kv_heads * min(2, model.kv_heads)
    documents = torch.tensor([0] * 40 + [1] + [2] * (T - 41))[None]
    q, k, v = (_randn(1, T, H, model.dim_per_head).to(dtype) for H in (heads, *[min(2, model.kv_heads)] * 2))
    for ids in (None, documents):
        def run(module, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = ids) -> Tensor:
            first_key = kernels.first_visible_key(None if ids is None else ids.to(q.device), model.window, T=T,
                                                  device=q.device)
            return module.attention(q, k, v, first_key=first_key)
        yield run, [q, k, v]


def _cross_entropy_cases(op: str, model: ModelConfig, table_rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """Of any width: the kernel sees the logits only. Two chunks, the second short."""
    C = 64
    targets = torch.randint(model.vocab_size, (13,), generator=torch.Generator().manual_seed(0))
    targets[3] = -100
    def run(module, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return module.linear_cross_entropy(hidden, weight, targets, vocab_size=model.vocab_size, ignore_index=-100,
                                           reduction="sum", softcap=model.logit_softcap, z_loss=0.0, chunk_rows=8)
    yield run, [_randn(13, C).to(dtype), _randn(table_rows, C) / C ** 0.5, targets]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))  # the run's own RNG stays untouched


def _errors(run: Callable, module, inputs: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Of the output and of each input's gradient: the module's error against float64, and what is allowed."""
    exact = _results(run, reference, [x.double() if x.is_floating_point() else x for x in inputs])
    ours, plain = _results(run, module, inputs), _results(run, reference, inputs)
    dtype = inputs[0].dtype
    def error(result: Tensor, exact: Tensor) -> float:
        return ((result.double() - exact).norm() / exact.norm()).item()
    return {name: (error(ours[name], exact[name]), 2 * error(plain[name], exact[name]) + ALLOWANCE[dtype])
            for name in exact}


def _results(run: Callable, module, inputs: list[Tensor]) -> dict[str, Tensor]:
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    floating = [x for x in inputs if x.requires_grad]
    with torch.enable_grad():
        output = run(module, *inputs)
        weighting = _randn(*output.shape).to(output.device, output.dtype)
        gradients = torch.autograd.grad(output, floating, weighting)
    return {"the output": output.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}
