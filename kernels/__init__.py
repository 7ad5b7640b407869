"""The fused operations of the model: one public function each, whatever computes it.

Three backends compute the same functions: `torch` by PyTorch's own operations on any device (reference.py, the
definitions, and chunked_loss.py), `cpu` by what is faster on a CPU (cpu.py), `triton` by fused kernels
(flash_attention.py, norm.py, cross_entropy.py), which torch.compile takes whole; attention has more of them
(attention_backends.py). A process starts with torch for all; self_check.py switches each operation to another one that
it found right on this machine, in a run on CUDA to the fastest (fastest.py).

Dims: B batch, T sequence (Tq queries, Tk keys), H query heads, Hkv key/value heads, D head dim, N = B*T rows, C width,
V vocabulary (rows of the padded table). Statistics and losses are float32 whatever the dtype of the inputs.
"""

import os
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from cli import is_installed
from kernels import chunked_loss, cpu, reference
from kernels.reference import document_starts, first_visible_key  # noqa: F401 (public: the makers of first_key)

TRITON = ("attention", "layer_norm", "rms_norm", "linear_cross_entropy")  # those that have a Triton kernel

_chosen: dict[str, tuple[str, ModuleType]] = {}  # the backend of each operation that torch does not compute


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton cannot run here, or None if it can: on CUDA from compute capability 8.0, or on CPU tensors under its
    interpreter (TRITON_INTERPRET=1), which is for tests and far too slow to train with."""
    if not is_installed("triton"):
        return "triton is not installed"
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def choose_backends(backends: Mapping[str, str]) -> None:
    """From now on each operation is computed by the backend given for it, others by torch."""
    _chosen.clear()
    _chosen.update((op, (name, module_of(op, name))) for op, name in backends.items() if name != "torch")


def backend(op: str) -> str:
    return _chosen[op][0] if op in _chosen else "torch"


def module_of(op: str, backend: str) -> ModuleType:
    """The module, or what stands for one, whose function op is the backend's. Triton is imported only where needed."""
    if backend == "torch":
        return chunked_loss if op == "linear_cross_entropy" else reference
    if backend == "cpu":
        return cpu
    if op == "attention" and backend != "triton":
        from kernels import attention_backends
        return attention_backends.backend_of(backend)
    from kernels import cross_entropy, flash_attention, norm
    return {"attention": flash_attention, "linear_cross_entropy": cross_entropy}.get(op, norm)


def _of(op: str, x: Tensor) -> ModuleType:
    """The module that computes op for x: torch's if x is not of the device, dtype or size that the chosen one takes."""
    return _chosen[op][1] if op in _chosen and _chosen[op][1].supports(x) else module_of(op, "torch")


# ---- Operations ------------------------------------------------------------------------------------------------------

def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
               residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dim (arXiv:1607.06450). x (..., C), weight and bias (C,) -> (..., C) in x's dtype.
    With a residual (..., C) of x's dtype: the norm of x + residual, and x + residual itself."""
    return _of("layer_norm", x).layer_norm(x, weight, bias, eps=eps, residual=residual)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dim (arXiv:1910.07467). Shapes, dtypes and residual as in layer_norm."""
    return _of("rms_norm", x).rms_norm(x, weight, eps=eps, residual=residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) @ weight.T + bias in x's dtype; weight (M, C) and bias (M,) keep their own -> (..., M)."""
    return _of("linear", x).linear(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None) -> Tensor:
    """Causal attention. q (B, Tq, H, D), k and v (B, Tk, Hkv, D) with Hkv | H -> (B, Tq, H, D).

    Scores are scaled by D ** -0.5. Query i stands at key Tk-Tq+i and sees the keys first_key[b, i] up to that one, at
    least itself; first_key is int (B or 1, Tq) as first_visible_key makes it, None = from key 0."""
    return _of("attention", q).attention(q, k, v, first_key=first_key)


def packed_attention(qkv: Tensor, n_head: int, *, first_key: Tensor | None = None) -> Tensor:
    """attention of q, k and v side by side, as one projection makes them: qkv (B, T, H + 2 Hkv, D) -> (B, T, H, D)."""
    module, n_kv_head = _of("attention", qkv), (qkv.shape[2] - n_head) // 2
    if hasattr(module, "packed_attention"):
        return module.packed_attention(qkv, n_head, first_key=first_key)
    return attention(*qkv.split((n_head, n_kv_head, n_kv_head), dim=2), first_key=first_key)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str = "mean",
                         softcap: float = 0.0) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against targets, in nats, without ever holding all logits.

    hidden (N, C), weight (V, C) of any float dtype (matmuls run in hidden's), targets (N,) int64; a row whose target is
    -100 costs nothing. Rows of weight from vocab_size on are padding and take no part. reduction: "mean" over the other
    rows or "sum" -> float32 (); "none" -> float32 (N,), without gradient. softcap > 0: logits become
    softcap * tanh(logits / softcap). Raises ValueError for another reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} should be mean, sum or none")
    return _of("linear_cross_entropy", hidden).linear_cross_entropy(
        hidden, weight, targets, vocab_size=vocab_size, reduction=reduction, softcap=softcap)
