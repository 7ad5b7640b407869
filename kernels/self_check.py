"""Which backend computes each operation: each one against the definitions, on this machine, before it is trusted.

A driver, a compiler, a chip or a private operator can be wrong in ways that no test of ours saw; a run that would learn
from wrong gradients for a month finds out in its first second instead.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

import kernels
from config import ConfigError, MachineError, ModelConfig
from kernels import cpu, reference

# What may be added to twice the reference's own error: both are relative to float64, in the Frobenius norm. A wrong
# index or a missing term is off by 0.1 and more.
ALLOWANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # the GPU sums float32 in other orders

Verdicts = dict[str, tuple[str, str | None]]  # of each operation: the backend that might compute it, why it must not
Case = tuple[Callable[..., Tensor], list[Tensor]]  # run(module, *inputs) -> the module's output, and inputs for it


def choose(setting: str, model: ModelConfig, *, table_rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """Choose the backends of this process, the only one of its kind. Arguments as for verdicts, result as of agree."""
    return agree(setting, [verdicts(setting, model, table_rows=table_rows, dtype=dtype, device=device)])


def agree(setting: str, of_ranks: list[Verdicts]) -> str:
    """Choose the backends that are right on every rank. Returns the line that says which, and why not the others.
    Raises ConfigError if setting is triton and one of its kernels is not right."""
    chosen, wrong, by_reason = {}, [], {}
    for op, (backend, _) in of_ranks[0].items():
        reasons = [verdicts[op][1] for verdicts in of_ranks]
        reason = next(filter(None, reasons), None)
        if len(set(reasons)) > 1:
            reason = f"rank {reasons.index(reason)}: {reason}"
        if reason is not None and backend == "triton" and op in kernels.TRITON:
            wrong.append(f"{op}: {reason}")
        chosen[op] = backend if reason is None else "torch"
        by_reason.setdefault(backend if reason is None else f"torch ({reason})", []).append(op)
    if setting == "triton" and wrong:
        raise ConfigError(f"train.kernels = 'triton' but {'; '.join(wrong)}; kernels=auto takes PyTorch for these")
    kernels.choose_backends(chosen)
    return "kernels: " + "; ".join(f"{backend} for {', '.join(ops)}" for backend, ops in by_reason.items())


def verdicts(setting: str, model: ModelConfig, *, table_rows: int, dtype: torch.dtype,
             device: torch.device) -> Verdicts:
    """The verdict on each operation that the model uses. setting: auto, triton or torch, as train.kernels; table_rows:
    rows of the padded embedding table."""
    used = ["attention", "linear_cross_entropy", "linear"]
    used += ["layer_norm"] * (model.norm == "layernorm") + ["rms_norm"] * (model.norm == "rmsnorm" or model.qk_norm)
    no_triton = kernels.why_no_triton(device)
    backend = "cpu" if setting != "triton" and no_triton is not None and device.type == "cpu" else "triton"
    reason = ("asked for" if setting == "torch" else f"no kernels for {dtype}" if dtype not in ALLOWANCE
              else no_triton if backend == "triton" else None)
    if reason is not None:
        return dict.fromkeys(used, (backend, reason))
    has_own = {op: cpu.computes(op, dtype) if backend == "cpu" else op in kernels.TRITON for op in used}
    return {op: (backend, _problem(op, backend, _cases(op, backend, model, table_rows, dtype), device)) if has_own[op]
            else ("torch", "PyTorch's own is as fast") for op in used}


def _problem(op: str, backend: str, cases: Iterator[Case], device: torch.device) -> str | None:
    """What is wrong with the backend's op: the output and each input's gradient are compared with float64."""
    try:
        module = kernels.module_of(op, backend)
        for run, inputs in cases:
            inputs = [x.to(device) for x in inputs]
            if not module.supports(inputs[0]):
                return "not made for the model's size"
            exact = _results(run, reference, [x.double() if x.is_floating_point() else x for x in inputs])
            ours, plain = _results(run, module, inputs), _results(run, reference, inputs)
            for name, right in exact.items():
                error, own = (((x[name].double() - right).norm() / right.norm()).item() for x in (ours, plain))
                allowed = 2 * own + ALLOWANCE[inputs[0].dtype]
                if not error <= allowed:  # also if it is NaN
                    return f"relative error {error:.2g} of {name}, allowed {allowed:.2g}"
    except Exception as error:  # of the compiler, the launch or the driver, each with types of its own
        text = (str(error).strip().splitlines() or [""])[0][:200]
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except Exception:  # an error of the context: CUDA answers nothing more, the reference's calls neither
                raise MachineError(f"the Triton kernel of {op} broke this process's CUDA context ({text}); start again "
                                   "with train.kernels=torch") from error
        return f"{type(error).__name__}: {text}"
    return None


def _cases(op: str, backend: str, model: ModelConfig, table_rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """Small inputs of the model's widths."""
    C, D, Hkv, eps = model.n_embd, model.dim_per_head, min(2, model.kv_heads), model.norm_eps
    if op == "layer_norm":
        inputs = [_randn(37, C).to(dtype) + 1.0, _randn(C) + 1.0, _randn(C)]
        yield lambda m, x, w, b=None: m.layer_norm(x, w, b, eps=eps), inputs if model.bias else inputs[:2]
    elif op == "rms_norm":
        for width in [C] * (model.norm == "rmsnorm") + [D] * model.qk_norm:
            yield lambda m, x, w: m.rms_norm(x, w, eps=eps), [_randn(37, width).to(dtype) + 1.0, _randn(width) + 1.0]
    elif op == "linear":  # the projection to q, k and v, and the MLP's back; wider ones would hold up the start
        for columns, rows in ((C, (model.n_head + 2 * model.kv_heads) * D), (model.mlp_width, C)):
            columns, rows = min(columns, 1024), min(rows, 1024)
            weight = _randn(rows, columns) / columns ** 0.5
            yield lambda m, x, w, b: m.linear(x, w, b), [_randn(37, columns).to(dtype), weight, _randn(rows)]
    elif op == "attention":  # causal (or the model's window), then documents too
        # two of Triton's tiles and a bit; on the CPU short enough not to be handed to PyTorch
        T = 150 if backend == "triton" else 60
        heads = (model.n_head // model.kv_heads * Hkv, Hkv, Hkv)
        inputs = [_randn(1, T, H, D, seed=i).to(dtype) for i, H in enumerate(heads)]
        for ids in (None, torch.tensor([0] * 40 + [1] + [2] * (T - 41))[None]):
            first_key = kernels.first_visible_key(ids, model.window, T=T, device=torch.device("cpu"))
            yield (lambda m, q, k, v, first_key=None: m.attention(q, k, v, first_key=first_key),
                   inputs if first_key is None else [*inputs, first_key])
    else:  # the loss, of any width: the kernel sees the logits only. Two chunks, the second short
        targets = torch.randint(model.vocab_size, (13,), generator=torch.Generator().manual_seed(0))
        targets[3] = reference.IGNORED
        options = {"vocab_size": model.vocab_size, "reduction": "sum", "softcap": model.logit_softcap}
        yield (lambda m, *x: m.linear_cross_entropy(*x, **options, **({} if m is reference else {"chunk_rows": 8})),
               [_randn(13, 64).to(dtype), _randn(table_rows, 64) / 8.0, targets])


def _randn(*shape: int, seed: int = 0) -> Tensor:
    """From a generator of its own: the run's stays untouched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)))


def _results(run: Callable[..., Tensor], module: ModuleType, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the floating inputs."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.enable_grad():
        output = run(module, *inputs)
        weighting = _randn(*output.shape).to(output.device, output.dtype)
        # of a sum: a gradient for an output of many numbers would import sympy, which takes longer than all checks
        gradients = torch.autograd.grad((output * weighting).sum(), [x for x in inputs if x.requires_grad])
    return {"the output": output.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}
