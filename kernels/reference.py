"""The operations by their definitions, in plain PyTorch: any device, any float dtype, autograd's gradients.

Every other backend is measured against this file in float64 (self_check.py, tests/), and what no other one was chosen
for is computed here; but for the loss, whose logits all exist at once here, and one chunk at a time in chunked_loss.py.

Dims: B batch, T sequence (Tq queries, Tk keys), H query heads, Hkv key/value heads, D head dim, N = B*T rows, C width,
V vocabulary (rows of the padded table). The arguments are those of the same names in kernels/__init__.py.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORED = -100  # a target that the loss does not count
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of sums, losses and softmax: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- Norms and matrix products ---------------------------------------------------------------------------------------

def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
               residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dim."""
    x = x if residual is None else x + residual
    y = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
    return y if residual is None else (y, x)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean of x^2 + eps) * weight, over the last dim."""
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return y if residual is None else (y, x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


# ---- Attention -------------------------------------------------------------------------------------------------------

def attention(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None) -> Tensor:
    """softmax(q @ k.T / sqrt(D), over the keys that each query sees) @ v, head by head."""
    Tq, Tk = q.shape[1], k.shape[1]
    needs_mask = first_key is not None or (Tq != Tk and Tq > 1)  # PyTorch's is_causal aligns the first query and key
    # cuDNN's backward with a mask gives NaN on Hopper for T % 128 == 64 (pytorch/pytorch issue 196678)
    with sdpa_kernel(WITHOUT_CUDNN) if needs_mask and torch.is_grad_enabled() else contextlib.nullcontext():
        out_BHTD = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=not needs_mask and Tq > 1,
            attn_mask=visible_keys(Tq, Tk, first_key, device=q.device) if needs_mask else None,
            enable_gqa=q.shape[2] != k.shape[2])
    return out_BHTD.transpose(1, 2)


def visible_keys(Tq: int, Tk: int, first_key: Tensor | None, *, device: torch.device) -> Tensor:
    """The mask of attention(): bool (B or 1, 1, Tq, Tk), True where the query sees the key."""
    key = torch.arange(Tk, device=device)
    last_key = torch.arange(Tk - Tq, Tk, device=device)  # (Tq,) the key at which each query stands
    mask = key <= last_key[None, :, None]  # (1, Tq, Tk)
    if first_key is not None:
        mask = mask & (key >= torch.minimum(first_key, last_key)[:, :, None])
    return mask[:, None]


def first_visible_key(document_ids: Tensor | None, window: int | None, *, T: int,
                      device: torch.device) -> Tensor | None:
    """The first key that each query sees, int32 (B or 1, T); None if both arguments are None (plain causal). A token
    sees its own document only, numbered by document_ids (B, T) in rising order, and of it the last `window` tokens,
    itself included."""
    if document_ids is None and window is None:
        return None
    position = torch.arange(T, device=device, dtype=torch.int32)[None]  # (1, T)
    first = torch.zeros_like(position) if document_ids is None else document_starts(document_ids)
    return first if window is None else torch.maximum(first, position - (window - 1))


def document_starts(document_ids: Tensor) -> Tensor:
    """int32 (B, T): the position at which each token's document starts. document_ids (B, T)."""
    position = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32)[None]
    is_start = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=False)
    return torch.where(is_start, position, 0).cummax(dim=1).values


# ---- Linear + cross-entropy ------------------------------------------------------------------------------------------

def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str,
                         softcap: float) -> Tensor:
    """-ln softmax(hidden @ weight.T)[target], per row or over the rows whose target is not IGNORED."""
    logits = linear(hidden, weight[:vocab_size], None).to(statistics_dtype(hidden))  # (N, vocab_size)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)
