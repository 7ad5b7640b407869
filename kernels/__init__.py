"""The fused operations of the model: one public function each, whatever computes it.

Two backends compute the same functions: `torch` is reference.py, plain PyTorch on any device; `triton` are the fused
kernels of flash_attention.py, norm.py and cross_entropy.py, custom operators that torch.compile takes whole. A process
starts with torch for every operation; choose_backends() switches those to triton that self_check.py found right here.

Dims: B batch, T sequence (Tq queries, Tk keys), H query heads, Hkv key/value heads, D head dim, N = B*T rows, C width,
V vocabulary (rows of the padded table). Statistics and losses are float32 whatever the dtype of the inputs.
"""

import importlib.util
import os
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import document_starts, first_visible_key, linear

OPS = ("attention", "layer_norm", "rms_norm", "linear_cross_entropy")
__all__ = ["OPS", "attention", "backend", "choose_backends", "document_starts", "first_visible_key", "layer_norm",
           "linear", "linear_cross_entropy", "rms_norm", "triton_module", "why_no_triton"]


# ----------------------------------------------------------------------------------------------------------------------
# Backends

_triton: dict[str, ModuleType] = {}  # of the operations that Triton computes, the module; the others stay with torch


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton cannot run here, or None if it can: on CUDA from compute capability 8.0, or on CPU tensors under its
    interpreter (TRITON_INTERPRET=1), which is for tests and far too slow to train with."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def choose_backends(triton_ops: Iterable[str]) -> None:
    """From now on Triton computes triton_ops, PyTorch the other operations."""
    _triton.clear()
    for op in triton_ops:
        _triton[op] = triton_module(op)


def backend(op: str) -> str:
    return "triton" if op in _triton else "torch"


def triton_module(op: str) -> ModuleType:
    """The file of op's Triton kernel. Imported only here: without a GPU nothing should wait for triton."""
    if op == "attention":
        from kernels import flash_attention
        return flash_attention
    if op == "linear_cross_entropy":
        from kernels import cross_entropy
        return cross_entropy
    from kernels import norm
    return norm


def _of(op: str, x: Tensor) -> ModuleType:
    """The module that computes op for x: a kernel takes the dtypes and sizes that it was made for, on the GPU if there
    is one (else it is interpreted)."""
    module = _triton.get(op)
    return module if module is not None and module.supports(x) and x.is_cuda == torch.cuda.is_available() else reference


# ----------------------------------------------------------------------------------------------------------------------
# Operations

def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
               residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dim (arXiv:1607.06450). x (..., C), weight and bias (C,) -> (..., C) in x's dtype.

    With a residual (..., C) of x's dtype: the norm of x + residual, and x + residual itself.
    """
    return _of("layer_norm", x).layer_norm(x, weight, bias, eps=eps, residual=residual)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dim (arXiv:1910.07467). x (..., C), weight (C,) -> (..., C) in x's dtype.

    With a residual (..., C) of x's dtype: the norm of x + residual, and x + residual itself.
    """
    return _of("rms_norm", x).rms_norm(x, weight, eps=eps, residual=residual)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
              first_key: Tensor | None = None) -> Tensor:
    """Causal attention. q (B, Tq, H, D), k and v (B, Tk, Hkv, D) with Hkv | H -> (B, Tq, H, D).

    Query i stands at key Tk-Tq+i and sees the keys first_key[b, i] up to that one; first_key is int (B or 1, Tq) as
    first_visible_key makes it, None = from key 0. Every query sees itself, so no row is empty. scale: None = D ** -0.5.
    """
    return _of("attention", q).attention(q, k, v, scale=scale, first_key=first_key)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None,
                         ignore_index: int = -100, reduction: str = "mean", softcap: float = 0.0,
                         z_loss: float = 0.0, chunk_rows: int | None = None) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against targets, in nats, without ever holding all logits.

    hidden (N, C), weight (V, C) of any float dtype (matmuls run in hidden's, under autocast in its dtype), targets (N,)
    int64. Rows of weight from vocab_size on are padding and take no part. Rows whose target is ignore_index cost
    nothing. reduction: "mean" over the other rows or "sum" -> float32 (); "none" -> float32 (N,), without gradient.
    softcap > 0: logits become softcap * tanh(logits / softcap). z_loss > 0 adds z_loss * logsumexp(logits)^2 to each
    row's loss (PaLM, arXiv:2204.02311). Gradients are computed chunk by chunk in the forward pass (as Liger-Kernel,
    arXiv:2410.10989); chunk_rows rows of logits exist at a time. Raises ValueError for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} should be mean, sum or none")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):  # which would round the float32 sums inside, too
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, ignore_index=ignore_index,
                                        reduction=reduction, softcap=softcap, z_loss=z_loss, chunk_rows=chunk_rows)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    return _of("linear_cross_entropy", hidden).linear_cross_entropy(
        hidden, weight, targets, vocab_size=vocab_size, ignore_index=ignore_index, reduction=reduction, softcap=softcap,
        z_loss=z_loss, chunk_rows=chunk_rows)
