"""The kernels in plain PyTorch: what runs where no fused kernel does, and what fused kernels are tested against.

Statistics and losses are float32 whatever the dtype of the inputs. Shapes: B batch, T sequence (Tq queries, Tk keys),
H query heads, Hkv key/value heads, D head dim, N = B*T rows, C width, V vocabulary (rows of the padded table).
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
               residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """kernels.layer_norm in plain PyTorch."""
    if residual is not None:
        x = x + residual
    y = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
    return y if residual is None else (y, x)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """kernels.rms_norm in plain PyTorch."""
    if residual is not None:
        x = x + residual
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        y = _RMSNormOnCPU.apply(x, weight, eps)
    else:
        y = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return y if residual is None else (y, x)


class _RMSNormOnCPU(torch.autograd.Function):
    """PyTorch has no fused rms_norm for the CPU: its many small operators cost a third of a small model's step.

    The backward borrows LayerNorm's: with the mean given as 0, dx of LayerNorm is that of RMSNorm less
    rstd * mean(g * weight), which a matrix-vector product puts back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_statistics_dtype(x))  # (..., 1)
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
        grad_weight = (x * rstd).mul_(grad).reshape(-1, C).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """float32; float64 for float64, which makes this file an oracle for the fused kernels."""
    return torch.promote_types(x.dtype, torch.float32)


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
        ctx.has_bias = bias is not None
        return _onednn_matmul(x, weight.T, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = _onednn_matmul(grad_rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = _onednn_matmul(grad_rows.T, rows) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_rows.sum(0) if ctx.has_bias else None


# ----------------------------------------------------------------------------------------------------------------------
# Attention

def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
              first_key: Tensor | None = None) -> Tensor:
    """kernels.attention in plain PyTorch."""
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
                         z_loss: float = 0.0, chunk_rows: int | None = None) -> Tensor:
    """kernels.linear_cross_entropy in plain PyTorch."""
    rule = _LossRule(vocab_size=weight.shape[0] if vocab_size is None else vocab_size, ignore_index=ignore_index,
                     softcap=softcap, z_loss=z_loss,
                     rows=_default_chunk_rows(hidden, weight.shape[0]) if chunk_rows is None else chunk_rows)
    if reduction != "none" and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total = _LinearCrossEntropySum.apply(hidden, weight, targets, rule)
    else:
        with torch.no_grad():
            losses = _losses(hidden, weight, targets, rule)
        total = losses if reduction == "none" else losses.sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def _default_chunk_rows(hidden: Tensor, V: int) -> int:
    """Rows of logits at a time: on CUDA large matmuls (8,192 rows), on the CPU logits that stay near the caches."""
    return 8192 if hidden.device.type == "cuda" else max(64, 2 ** 23 // V)


class _LossRule(NamedTuple):
    vocab_size: int
    ignore_index: int
    softcap: float
    z_loss: float
    rows: int  # per chunk

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """float32 logits (rows, V) of one chunk; may be overwritten. weight in hidden's dtype."""
        logits = _matmul(hidden, weight.T).to(_statistics_dtype(hidden))
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each row (rows, 1), and what scales exp(logits - largest), which logits become, to the gradient of
        the log of the sum (rows, 1); both 0 where ignored."""
        keep = (targets != self.ignore_index)[:, None]
        target_logit = logits.gather(1, torch.where(keep, targets[:, None], 0))
        logits[:, self.vocab_size:] = -math.inf  # the padding is multiplied, at full rate, and then takes no part
        largest = logits.amax(dim=-1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        lse = largest + total.log()
        losses = lse - target_logit + self.z_loss * lse.square()
        slope = (1.0 + 2.0 * self.z_loss * lse) / total
        return torch.where(keep, losses, 0.0), torch.where(keep, slope, 0.0)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, rule: _LossRule) -> Tensor:
    """Loss of each row, (N,)."""
    weight = weight.to(hidden.dtype)
    return torch.cat([rule.losses(rule.logits(h, weight), t)[0].squeeze(1)
                      for h, t in zip(hidden.split(rule.rows), targets.split(rule.rows), strict=True)])


class _LinearCrossEntropySum(torch.autograd.Function):
    """Summed loss; both gradients are made in forward, while a chunk's logits are at hand, and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rule: _LossRule) -> Tensor:
        total = torch.zeros((), dtype=_statistics_dtype(hidden), device=hidden.device)
        compute_weight = weight.to(hidden.dtype)  # once, not per chunk
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=total.dtype)
        for start in range(0, hidden.shape[0], rule.rows):
            h, t = hidden[start:start + rule.rows], targets[start:start + rule.rows]
            logits = rule.logits(h, compute_weight)  # (rows, V)
            # through the softcap: times 1 - (z / cap)^2
            slope = 1.0 - (logits / rule.softcap).square() if rule.softcap else None
            losses, scale = rule.losses(logits, t)
            total = total + losses.sum()
            keep = (t != rule.ignore_index)[:, None]
            grad_logits = logits.mul_(scale)  # softmax, less the one-hot:
            grad_logits.scatter_add_(1, torch.where(keep, t[:, None], 0), -keep.to(logits.dtype))
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[start:start + rule.rows] = _matmul(grad_logits, compute_weight)
            _add_product(grad_weight, grad_logits.T, h)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        # float32: in bfloat16 a factor such as 1/200 is off by up to 2^-9, and with it the whole gradient of the body
        grad_hidden = (grad_hidden.to(grad_output.dtype) * grad_output).to(grad_hidden.dtype)
        grad_output = grad_output.to(grad_weight.dtype)
        scale = Tensor.mul if _may_be_needed_again() else Tensor.mul_  # in place: a table less at the peak
        return grad_hidden, scale(grad_weight, grad_output), None, None


def _may_be_needed_again() -> bool:
    """Whether a second backward could ask for the tensors saved for this one (retain_graph=True)."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is None or torch.compiler.is_compiling() or keeps_graph()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) @ b (k, n); on the CPU in blocks of rows, so that the product stays in the caches."""
    rows = max(256, 2 ** 22 // b.shape[1]) if a.device.type == "cpu" else a.shape[0]
    for block, a_rows in zip(total.split(rows), a.split(rows), strict=True):
        block += _matmul(a_rows, b)
