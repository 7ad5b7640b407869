"""Which backend computes each operation: each one against the definitions, on this machine, before it is trusted.

A driver, a compiler, a chip or a private operator can be wrong in ways that no test of ours saw; a run that would learn
from wrong gradients for a month finds out in its first second instead. Of several that are right a run takes the one
that fastest.py measured to be the fastest, and when it is resumed the one that it had.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor

import kernels
from config import ConfigError, MachineError, ModelConfig
from kernels import cpu, reference

# What may be added to twice the reference's own error: both are relative to float64, in the Frobenius norm. A wrong
# index or a missing term is off by 0.1 and more.
ALLOWANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # the GPU sums float32 in other orders
AS_FAST = "PyTorch's own is as fast"  # the reason where nothing had to be checked
HEAD_START = 1.02  # what a rival's time counts: the first, whose gradients have the same bits each time, wins a tie

# Of each operation: the backends that might compute it, the first choice first, and why each must not.
Verdicts = dict[str, dict[str, str | None]]
Choice = dict[str, str]  # of each operation: the backend
Measured = tuple[dict[str, dict[str, float | str]], float]  # of each timed backend ms, or why not; seconds of it all
Case = tuple[Callable[..., Tensor], list[Tensor]]  # run(module, *inputs) -> the module's output, and inputs for it


def choose(setting: str, model: ModelConfig, *, table_rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """Choose the backends of this process, the only one of its kind, by no clock. Arguments as for verdicts, result the
    line of agree."""
    return agree(setting, [verdicts(setting, model, table_rows=table_rows, dtype=dtype, device=device)])[1]


def agree(setting: str, of_ranks: list[Verdicts], *, previous: Choice | None = None,
          measured: Measured | None = None) -> tuple[Choice, str]:
    """Choose the backend of each operation among its contenders: the fastest if they were measured, else the first.
    Returns the choice and the line that says which, why not the others, and what is not as in the checkpoint, whose
    choice is previous. Raises ConfigError if setting is triton and one of its kernels is not right."""
    wrong = [f"{op}: {reason}" for op in of_ranks[0] if op in kernels.TRITON
             and (reason := _reason(of_ranks, op, "triton")) is not None]
    if setting == "triton" and wrong:
        raise ConfigError(f"train.kernels = 'triton' but {'; '.join(wrong)}; kernels=auto takes PyTorch for these")
    choice: Choice = {}
    by_words: dict[str, list[str]] = {}
    for op, backends in contenders(of_ranks, previous).items():
        times = {} if measured is None else measured[0].get(op, {})
        ms = {backend: times[backend] for backend in backends if isinstance(times.get(backend), float)}
        first = next(iter(ms if times else backends), "torch")
        choice[op] = min(ms, key=lambda name: ms[name] * (1.0 if name == first else HEAD_START), default=first)
        why_not = {name: _reason(of_ranks, op, name) for name in of_ranks[0][op]} | {
            name: reason for name, reason in times.items() if isinstance(reason, str)}
        notes = [f"not {name}: {reason}" for name, reason in why_not.items() if reason is not None]
        if ms:
            others = ", ".join(f"{name} {ms[name]:.3g}" for name in ms if name != choice[op])
            notes = [f"{ms[choice[op]]:.3g} ms" + (f", {others}" if others else ""), *notes]
        elif choice[op] == "torch":
            notes = [reason for reason in why_not.values() if reason is not None][:1]
        words = choice[op] + (f" ({'; '.join(notes)})" if notes else "")
        by_words.setdefault(words, []).append(op)
    kernels.choose_backends(choice)
    if "triton" in choice.values() and hasattr(torch._inductor.config.triton, "mix_order_reduction"):
        # Beside our norms the compiler has QK-norm alone, and would write its gradients twice.
        torch._inductor.config.triton.mix_order_reduction = choice.get("rms_norm") != "triton"
    line = "kernels: " + "; ".join(f"{words} for {', '.join(ops)}" for words, ops in by_words.items())
    if measured is not None:
        line += f"; forward and backward timed in {measured[1]:.1f} s"
    if previous is not None:
        changed = [f"{op} was by {previous.get(op, 'another')}" for op in choice if previous.get(op) != choice[op]]
        if changed:
            line += f"; not as in the checkpoint, bits may differ: {', '.join(changed)}"
        elif any(len(backends) > 1 for backends in contenders(of_ranks).values()):
            line += "; as in the checkpoint"
    return choice, line


def contenders(of_ranks: list[Verdicts], previous: Choice | None = None) -> dict[str, list[str]]:
    """Of each operation the backends that are right on every rank, the first choice first; where it is one of them,
    that of the checkpoint alone. None at all: PyTorch computes it."""
    right = {op: [name for name in backends if _reason(of_ranks, op, name) is None]
             for op, backends in of_ranks[0].items()}
    return {op: [previous[op]] if previous is not None and previous.get(op) in (names or ["torch"]) else names
            for op, names in right.items()}


def _reason(of_ranks: list[Verdicts], op: str, backend: str) -> str | None:
    """Why the backend must not compute op: the first rank's reason that has one."""
    reasons = [verdicts[op].get(backend, "not available") for verdicts in of_ranks]
    reason = next(filter(None, reasons), None)
    return f"rank {reasons.index(reason)}: {reason}" if len(set(reasons)) > 1 else reason


def verdicts(setting: str, model: ModelConfig, *, table_rows: int, dtype: torch.dtype, device: torch.device,
             rivals: Mapping[str, tuple[str, ...]] | None = None) -> Verdicts:
    """The verdicts on each operation that the model uses. setting: auto, triton or torch, as train.kernels; table_rows:
    rows of the padded embedding table; rivals: of an operation, the backends that are to be timed beside the first
    (fastest.rivals)."""
    used = ["attention", "linear_cross_entropy", "linear"]
    used += ["layer_norm"] * (model.norm == "layernorm") + ["rms_norm"] * (model.norm == "rmsnorm" or model.qk_norm)
    no_triton = kernels.why_no_triton(device)
    backend = "cpu" if setting != "triton" and no_triton is not None and device.type == "cpu" else "triton"
    reason = ("asked for" if setting == "torch" else f"no kernels for {dtype}" if dtype not in ALLOWANCE
              else no_triton if backend == "triton" else None)
    if reason is not None:
        return {op: {backend: reason} for op in used}
    has_own = {op: cpu.computes(op, dtype) if backend == "cpu" else op in kernels.TRITON for op in used}
    return {op: {name: _problem(op, name, _cases(op, name, model, table_rows, dtype), device)
                 for name in (backend, *(rivals or {}).get(op, ()))} if has_own[op]
            else {backend: AS_FAST} for op in used}


def _problem(op: str, backend: str, cases: Iterator[Case], device: torch.device) -> str | None:
    """What is wrong with the backend's op: the output and each input's gradient are compared with float64."""
    if backend == "torch":
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            module = kernels.module_of(op, backend)
            for run, inputs in cases:
                inputs = [x.to(device) for x in inputs]
                if not module.supports(inputs[0]):
                    return "not made for the model's size or dtype"
                exact = _results(run, reference, [x.double() if x.is_floating_point() else x for x in inputs])
                ours, plain = _results(run, module, inputs), _results(run, reference, inputs)
                for name, right in exact.items():
                    error, own = (((x[name].double() - right).norm() / right.norm()).item() for x in (ours, plain))
                    allowed = 2 * (own if math.isfinite(own) else 0.0) + ALLOWANCE[inputs[0].dtype]
                    if not error <= allowed:  # also if it is NaN
                        return f"relative error {error:.2g} of {name}, allowed {allowed:.2g}"
        except Exception as error:  # of the compiler, the launch or the driver, each with types of its own
            return words_of(error, op, backend, device, [str(warning.message) for warning in said])
    return None


def words_of(error: Exception, op: str, backend: str, device: torch.device, said: list[str]) -> str:
    """The error of a kernel in a line, with the reason that PyTorch gives in its warnings, said. Raises MachineError if
    nothing else can run after it."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:  # an error of the context: CUDA answers nothing more, the reference's calls neither
            raise MachineError(f"{op} by {backend} broke this process's CUDA context ({text}); start again with "
                               "train.kernels=torch") from error
    # of sdpa_kernel: a heading for each kernel, that the others are disabled, and why this one was not taken
    hint = next((words for words in said if "not used because" not in words and "disabled" not in words), None)
    return f"{type(error).__name__}: {text}" + (f" ({hint.split(' (Triggered')[0][:200]})" if hint else "")


def _cases(op: str, backend: str, model: ModelConfig, table_rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """Small inputs of the model's widths."""
    C, D, Hkv, eps = model.n_embd, model.dim_per_head, min(2, model.kv_heads), model.norm_eps
    if op == "layer_norm":
        x, residual, weights = _randn(37, C).to(dtype) + 1.0, _randn(37, C, seed=1).to(dtype), [_randn(C) + 1.0]
        weights += [_randn(C)] if model.bias else []
        yield lambda m, x, w, b=None: m.layer_norm(x, w, b, eps=eps), [x, *weights]
        yield (lambda m, x, r, w, b=None: torch.cat(m.layer_norm(x, w, b, eps=eps, residual=r)),
               [x, residual, *weights])
    elif op == "rms_norm":
        for width in [C] * (model.norm == "rmsnorm") + [D] * model.qk_norm:
            x, residual, weight = _randn(37, width).to(dtype) + 1.0, _randn(37, width, seed=1).to(dtype), _randn(width)
            yield lambda m, x, w: m.rms_norm(x, w, eps=eps), [x, weight + 1.0]
            yield lambda m, x, r, w: torch.cat(m.rms_norm(x, w, eps=eps, residual=r)), [x, residual, weight + 1.0]
    elif op == "linear":  # the projection to q, k and v, and the MLP's back; wider ones would hold up the start
        for columns, rows in ((C, (model.n_head + 2 * model.kv_heads) * D), (model.mlp_width, C)):
            columns, rows = min(columns, 1024), min(rows, 1024)
            weight = _randn(rows, columns) / columns ** 0.5
            yield lambda m, x, w, b: m.linear(x, w, b), [_randn(37, columns).to(dtype), weight, _randn(rows)]
    elif op == "attention":  # causal (or the model's window), then documents too
        # two of Triton's tiles and a bit; on the CPU short enough not to be handed to PyTorch; PyTorch's kernels had
        # their errors at lengths of some remainder by 128, the size of a tile
        T = {"cpu": 60, "triton": 150, "triton fused": 150}.get(backend, 384 + model.max_seq_len % 128)
        heads = (model.n_head // model.kv_heads * Hkv, Hkv, Hkv)
        inputs = [_randn(1, T, H, D, seed=i).to(dtype) for i, H in enumerate(heads)]
        inputs = inputs if has_own_qk(model) else [torch.cat(inputs, dim=2)]
        for ids in (None, torch.tensor([0] * 40 + [1] + [2] * (T - 41))[None]):
            first_key = kernels.first_visible_key(ids, model.window, T=T, device=torch.device("cpu"))
            yield (lambda m, *inputs, first_key=first_key: attend(m, *inputs, n_head=heads[0], first_key=first_key),
                   inputs)
        if backend != "cpu":  # it makes scores in the inputs' dtype
            yield lambda m, *inputs: attend(m, *_low_scores(*inputs, n_head=heads[0]), n_head=heads[0],
                                            first_key=None), inputs
    else:  # the loss, of any width: the kernel sees the logits only. Two chunks, the second short
        targets = torch.randint(model.vocab_size, (13,), generator=torch.Generator().manual_seed(0))
        targets[3] = reference.IGNORED
        options = {"vocab_size": model.vocab_size, "reduction": "sum", "softcap": model.logit_softcap}
        yield (lambda m, *x: m.linear_cross_entropy(*x, **options, **({} if m is reference else {"chunk_rows": 8})),
               [_randn(13, 64).to(dtype), _randn(table_rows, 64) / 8.0, targets])


def _low_scores(*inputs: Tensor, n_head: int) -> list[Tensor]:
    """q, k, v, or all three packed, with scores of about -120: cuDNN's backward gave NaN where the log of their sum of
    exponentials is far below 0 (pytorch issues 139298, 196678). The first column, which makes them so, gets no
    gradient: it would be rounding errors times 1,000."""
    D, packed = inputs[0].shape[-1], len(inputs) == 1
    n_kv_head = (inputs[0].shape[2] - n_head) // 2 if packed else inputs[1].shape[2]
    q, k, v = inputs[0].split((n_head, n_kv_head, n_kv_head), dim=2) if packed else inputs
    q, k = (torch.cat((torch.full_like(x[..., :1], value), x[..., 1:]), dim=-1)
            for x, value in ((q, 1.0), (k, -120.0 * D ** 0.5)))
    return [torch.cat((q, k, v), dim=2)] if packed else [q, k, v]


def has_own_qk(model: ModelConfig) -> bool:
    """Whether q and k are tensors of their own, not views of the projection that makes them and v."""
    return model.qk_norm or model.position == "rope"


def attend(module: ModuleType, *inputs: Tensor, n_head: int, first_key: Tensor | None) -> Tensor:
    """Attention of q, k, v, or of all three packed, as the model has them."""
    if len(inputs) == 1:
        if hasattr(module, "packed_attention"):
            return module.packed_attention(*inputs, n_head, first_key=first_key)
        n_kv_head = (inputs[0].shape[2] - n_head) // 2
        inputs = inputs[0].split((n_head, n_kv_head, n_kv_head), dim=2)
    return module.attention(*inputs, first_key=None if first_key is None else first_key.to(inputs[0].device))


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
