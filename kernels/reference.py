"""The kernels in plain PyTorch: what runs where no fused kernel does, and what fused kernels are tested against.

Statistics and losses are float32 whatever the dtype of the inputs. Shapes: B batch, T sequence (Tq queries, Tk keys),
H query heads, Hkv key/value heads, D head dim, N = B*T rows, C width, V vocabulary (rows of the padded table).
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    """LayerNorm over the last dim (arXiv:1607.06450). x (..., C), weight and bias (C,) -> (..., C) in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last dim (arXiv:1910.07467). x (..., C), weight (C,) -> (..., C) in x's dtype."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNormOnCPU.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """PyTorch has no fused rms_norm for the CPU: its many small operators cost a third of a small model's step.

    The backward borrows LayerNorm's: with the mean given as 0, dx of LayerNorm is that of RMSNorm less
    rstd * mean(g * weight), which a matrix-vector product puts back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        statistics = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics)  # (..., 1)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        C = x.shape[-1]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [C], torch.zeros_like(rstd), rstd, weight.to(rstd.dtype), None, [True, False, False])
        grad_x += (grad @ weight.to(grad.dtype)).unsqueeze(-1) * (rstd / C)
        # not from LayerNorm's backward either: it sums bfloat16 in bfloat16, 5 % off
        grad_weight = (x * rstd).mul_(grad).view(-1, C).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


# ----------------------------------------------------------------------------------------------------------------------
# Matrix products

def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) @ weight.T + bias in x's dtype; weight (M, C) and bias (M,) keep their own -> (..., M)."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if _takes_onednn(x):
        return _LinearByOneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) @ b (k, m), without gradient."""
    return _onednn_matmul(a, b) if _takes_onednn(a) else a @ b


def _takes_onednn(x: Tensor) -> bool:
    """float32 on the CPU: PyTorch multiplies by MKL there, which leaves AMD's wide registers unused. oneDNN, just as
    exact, is twice as fast on them (docs/BENCHMARKS.md); bfloat16 goes to oneDNN by itself."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
            and _onednn_works())


@functools.cache
def _onednn_works() -> bool:
    """Whether the private operator is there and multiplies as accurately as float32 can, tried on a small product."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(48, 96, generator=generator), torch.randn(96, 80, generator=generator)
    try:
        with torch.no_grad():
            products = _onednn_matmul(a, b), _onednn_matmul(b.T, a.T).T
    except RuntimeError:
        return False
    return all(torch.allclose(p.double(), a.double() @ b.double(), rtol=0, atol=2e-5) for p in products)


def _onednn_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


class _LinearByOneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_matmul(x, weight.T, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = _onednn_matmul(grad_rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = _onednn_matmul(grad_rows.T, rows) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_rows.sum(0) if ctx.needs_input_grad[2] else None


# ----------------------------------------------------------------------------------------------------------------------
# Attention

def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
              first_key: Tensor | None = None) -> Tensor:
    """Causal attention. q (B, Tq, H, D), k and v (B, Tk, Hkv, D) with Hkv | H -> (B, Tq, H, D).

    Query i stands at key Tk-Tq+i and sees the keys first_key[b, i] up to that one; first_key is int (B or 1, Tq) as
    first_visible_key makes it, None = from key 0. Every query sees itself, so no row is empty. scale: None = D ** -0.5.
    """
    Tq, Tk, D = q.shape[1], k.shape[1], q.shape[3]
    scale = D ** -0.5 if scale is None else scale
    q_BHTD, k_BHTD, v_BHTD = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    needs_mask = first_key is not None or (Tq != Tk and Tq > 1)
    mask = visible_keys(Tq, Tk, first_key, device=q.device) if needs_mask else None  # (B or 1, 1, Tq, Tk)
    if _matmul_softmax_is_faster(q, Tk):
        out_BHTD = _matmul_softmax(q_BHTD, k_BHTD, v_BHTD, scale=scale, mask=mask)
    else:
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, is_causal=mask is None and Tq > 1, scale=scale,
            enable_gqa=q.shape[2] != k.shape[2])
    return out_BHTD.transpose(1, 2)


def visible_keys(Tq: int, Tk: int, first_key: Tensor | None, *, device: torch.device) -> Tensor:
    """The mask of attention(): bool (B or 1, 1, Tq, Tk), True where the query sees the key."""
    key = torch.arange(Tk, device=device)
    last_key = torch.arange(Tk - Tq, Tk, device=device)  # (Tq,) the key at which each query stands
    mask = (key[None, :] <= last_key[:, None])[None]  # (1, Tq, Tk)
    if first_key is not None:
        mask = mask & (key[None, None, :] >= torch.minimum(first_key, last_key)[:, :, None])
    return mask[:, None]


def first_visible_key(document_ids: Tensor | None, window: int | None, *, T: int,
                      device: torch.device) -> Tensor | None:
    """int32 (B or 1, T): the first key that each query sees; None if both arguments are None (plain causal).

    document_ids (B, T) numbers each token's document, in rising order; a token sees its own document only.
    window: a token sees that many tokens, itself included.
    """
    if document_ids is None and window is None:
        return None
    position = torch.arange(T, device=device, dtype=torch.int32)[None]  # (1, T)
    first = torch.zeros_like(position) if document_ids is None else document_starts(document_ids)
    return first if window is None else torch.maximum(first, position - (window - 1))


def document_starts(document_ids: Tensor) -> Tensor:
    """int32 (B, T): the position at which each token's document starts. document_ids (B, T)."""
    position = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32)[None]
    is_start = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=False)
    return torch.where(is_start, position, torch.zeros_like(position)).cummax(dim=1).values.to(torch.int32)


def _matmul_softmax_is_faster(q: Tensor, Tk: int) -> bool:
    """On the CPU SDPA's backward loses to two matmuls and a softmax on short rows (docs/BENCHMARKS.md)."""
    if q.device.type != "cpu" or q.shape[1] == 1:
        return False
    return Tk <= (256 if q.dtype == torch.bfloat16 else 64)


def _matmul_softmax(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D), mask as of visible_keys or None = causal -> (B, H, Tq, D)."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    G = H // Hkv  # the G query heads of one key head stand as more rows of one matmul: k and v are never repeated
    if mask is None:
        mask = visible_keys(Tq, Tk, None, device=q.device)
    additive = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    additive = additive.expand(mask.shape[0], G, Tq, Tk).reshape(-1, 1, G * Tq, Tk)  # (B or 1, 1, G*Tq, Tk)
    if mask.shape[0] > 1:
        additive = additive.expand(B, Hkv, G * Tq, Tk).flatten(0, 1)
    else:
        additive = additive[0]
    q, k, v = q.reshape(B * Hkv, G * Tq, D), k.reshape(B * Hkv, Tk, D), v.reshape(B * Hkv, Tk, D)
    scores = torch.baddbmm(additive, q, k.mT, alpha=scale)  # (B*Hkv, G*Tq, Tk); scale and mask cost no extra pass
    return (torch.softmax(scores, dim=-1) @ v).view(B, H, Tq, D)


# ----------------------------------------------------------------------------------------------------------------------
# Linear + cross-entropy

def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None,
                         ignore_index: int = -100, reduction: str = "mean", softcap: float = 0.0,
                         chunk_rows: int | None = None) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against targets, in nats, without ever holding all logits.

    hidden (N, C), weight (V, C) of any float dtype (matmuls run in hidden's), targets (N,) int64. Rows of weight from
    vocab_size on are padding and take no part. Rows whose target is ignore_index cost nothing. reduction: "mean" over
    the other rows or "sum" -> float32 (); "none" -> float32 (N,), without gradient. softcap > 0: logits become
    softcap * tanh(logits / softcap). Gradients are computed chunk by chunk in the forward pass (as Liger-Kernel,
    arXiv:2410.10989); chunk_rows rows of logits exist at a time.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} should be mean, sum or none")
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    rows = _default_chunk_rows(hidden, weight.shape[0]) if chunk_rows is None else chunk_rows
    if reduction == "none":
        with torch.no_grad():
            return torch.cat(_losses_by_chunk(hidden, weight, targets, vocab_size, ignore_index, softcap, rows))
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total = _LinearCrossEntropySum.apply(hidden, weight, targets, vocab_size, ignore_index, softcap, rows,
                                         wants_grad, weight.requires_grad)
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def _default_chunk_rows(hidden: Tensor, V: int) -> int:
    """Rows of logits at a time: on CUDA large matmuls (8,192 rows), on the CPU logits that stay near the caches."""
    return 8192 if hidden.device.type == "cuda" else max(64, 2 ** 23 // V)


def _chunk_logits(h: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """float32 logits (rows, V) of one chunk; may be overwritten by the caller. weight in h's dtype."""
    logits = _matmul(h, weight.T).float()
    return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)


def _losses_by_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, ignore_index: int,
                     softcap: float, rows: int) -> list[Tensor]:
    weight = weight.to(hidden.dtype)
    return [F.cross_entropy(_chunk_logits(h, weight, softcap)[:, :vocab_size], t, ignore_index=ignore_index,
                            reduction="none")
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]


class _LinearCrossEntropySum(torch.autograd.Function):
    """Summed loss; both gradients are made in forward, while a chunk's logits are at hand, and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, ignore_index: int,
                softcap: float, rows: int, wants_grad: bool, weight_learns: bool) -> Tensor:
        if not wants_grad:
            return torch.cat(_losses_by_chunk(hidden, weight, targets, vocab_size, ignore_index, softcap, rows)).sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        compute_weight = weight.to(hidden.dtype)  # once, not per chunk
        grad_hidden = torch.empty_like(hidden)
        # a frozen table (LoRA) needs none: neither the memory nor a third of the matmuls
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_learns else None
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start:start + rows], targets[start:start + rows]
            logits = _chunk_logits(h, compute_weight, softcap)  # (rows, V)
            # d loss / d logits = softmax - one-hot, 0 on ignored rows; through the softcap: times 1 - (z / cap)^2
            slope = 1.0 - (logits / softcap).square() if softcap else None
            logits[:, vocab_size:] = -math.inf  # the padding is multiplied, at full rate, and then takes no part
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            keep = (t != ignore_index)[:, None]
            index = torch.where(keep, t[:, None], 0)
            total = total + torch.where(keep, lse - logits.gather(1, index), 0.0).sum()
            grad_logits = logits.sub_(lse).exp_()
            grad_logits.scatter_add_(1, index, torch.full_like(lse, -1.0))
            grad_logits = grad_logits.mul_(keep) if slope is None else grad_logits.mul_(slope).mul_(keep)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[start:start + rows] = _matmul(grad_logits, compute_weight)
            if grad_weight is not None:
                grad_weight += _matmul(grad_logits.T, h)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        # float32: in bfloat16 a factor such as 1/200 is off by up to 2^-9, and with it the whole gradient of the body
        grad_hidden = (grad_hidden.float() * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_output.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None
