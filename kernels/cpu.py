"""What is faster on a CPU than PyTorch's own operations (docs/BENCHMARKS.md): a backend like the Triton kernels.

The functions are those of reference.py, to which they hand what is not faster here: products in bfloat16, attention
over long rows, what torch.compile fuses. oneDNN is reached by private operators of PyTorch: where they are missing or
wrong, self_check.py leaves PyTorch to compute. Beside the operations: packed weights, for models that only generate.

Dims: B batch, T sequence (Tq queries, Tk keys), H query heads, Hkv key/value heads, D head dim, C width.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import chunked_loss, reference


def computes(op: str, dtype: torch.dtype) -> bool:
    """Whether something here is faster for op in dtype."""
    return op in ("attention", "rms_norm", "linear_cross_entropy") or (op == "linear" and dtype == torch.float32)


def supports(x: Tensor) -> bool:
    """Of any dtype and size."""
    return x.device.type == "cpu"


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps=eps, residual=residual)
    x = x if residual is None else x + residual
    y = _RMSNorm.apply(x, weight, eps)
    return y if residual is None else (y, x)


class _RMSNorm(torch.autograd.Function):
    """PyTorch has no fused rms_norm for the CPU: its many small operators cost a third of a small model's step. The
    backward borrows LayerNorm's: with the mean given as 0, its dx is that of RMSNorm less rstd * mean(g * weight),
    which a matrix-vector product puts back."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=reference.statistics_dtype(x))  # (..., 1)
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _is_for_onednn(x):
        return reference.linear(x, weight, bias)
    return _Linear.apply(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _is_for_onednn(x: Tensor) -> bool:
    """PyTorch multiplies float32 by MKL, which leaves AMD's wide registers unused: oneDNN, just as exact, is twice as
    fast on them. bfloat16 goes to oneDNN by itself."""
    return x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k) @ weight (m, k).T + bias, without gradient. weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = _onednn(grad_rows, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = _onednn(grad_rows.T, rows.T) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_rows.sum(0) if ctx.needs_input_grad[2] else None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _onednn(a, b.T) if _is_for_onednn(a) else a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) @ b (k, n), in blocks of rows, so that the product stays in the caches."""
    rows = max(256, 2 ** 22 // b.shape[1])
    for block, a_rows in zip(total.split(rows), a.split(rows), strict=True):
        block += _matmul(a_rows, b)


linear_cross_entropy = partial(chunked_loss.linear_cross_entropy, matmul=_matmul, add_product=_add_product)


def attention(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None) -> Tensor:
    """By two matmuls and a softmax, to which the backward of PyTorch's own loses on short rows."""
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1], k.shape[2]
    if Tq == 1 or Tk > (256 if q.dtype == torch.bfloat16 else 64):
        return reference.attention(q, k, v, first_key=first_key)
    G = H // Hkv  # the G query heads of one key head stand as more rows of one matmul: k and v are never repeated
    mask = reference.visible_keys(Tq, Tk, first_key, device=q.device)  # (B or 1, 1, Tq, Tk)
    additive = torch.where(mask, 0.0, -math.inf).to(q.dtype).expand(-1, G, Tq, Tk).reshape(-1, 1, G * Tq, Tk)
    additive = additive[0] if mask.shape[0] == 1 else additive.expand(B, Hkv, -1, -1).flatten(0, 1)
    q = q.transpose(1, 2).reshape(B * Hkv, G * Tq, D)
    k, v = (x.transpose(1, 2).reshape(B * Hkv, Tk, D) for x in (k, v))
    scores = torch.baddbmm(additive, q, k.mT, alpha=D ** -0.5)  # (B*Hkv, G*Tq, Tk); scale and mask cost no extra pass
    return (torch.softmax(scores, dim=-1) @ v).view(B, H, Tq, D).transpose(1, 2)


# ---- Packed weights --------------------------------------------------------------------------------------------------

class PackedLinear(nn.Module):
    """A linear layer for inputs of one dtype whose weight oneDNN has laid out. Inference only, never saved. From 1 row
    to 256 it is as fast as F.linear or up to three times faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        # laid out for 16 rows: the layout for 1 is no faster on 1 row and half as fast on 2 or more
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 16)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _onednn(x, self.packed, self.bias)


def pack_for_decoding(model: nn.Module) -> str:
    """Replace the linear layers of a GPT and its head by packed ones where that works; returns what was done and why.
    Afterwards the model can generate, but neither train nor be saved. A tied head is held twice."""
    dtype = model.compute_dtype
    if model.wte.weight.device.type != "cpu":
        return "weights: as they are (packing is for the CPU)"
    if not packing_works(dtype):
        return f"weights: as they are (this PyTorch or CPU does not pack {dtype})"
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, PackedLinear(layer.weight, layer.bias, dtype))
    if model.lm_head is None:
        model.lm_head = PackedLinear(model.wte.weight, None, dtype)
    return "weights: packed by oneDNN"


@torch.inference_mode()
def packing_works(dtype: torch.dtype) -> bool:
    """Whether PackedLinear computes what F.linear does, tried on a small layer."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (96,), (1, 3, 64)))
    try:
        packed = PackedLinear(weight, bias, dtype)(x)
    except (RuntimeError, AttributeError):  # this PyTorch has no such operator, or it does not take the dtype
        return False
    expected = F.linear(x.double(), weight.double(), bias.double())
    tolerance = 8 * torch.finfo(dtype).eps  # values up to about 30, sums of 64 products kept in float32
    return torch.allclose(packed.double(), expected, rtol=tolerance, atol=64 * tolerance)
