"""LayerNorm and RMSNorm as fused Triton kernels, forward and backward, with an optional residual add in front.

One pass over the rows each way: statistics in float32 registers, the input read once. The weight's gradient is summed
in two stages, per program in registers and then over programs in a fixed order, so equal inputs give equal bits. Rows
too wide for those registers are PyTorch's. LayerNorm: arXiv:1607.06450; RMSNorm: arXiv:1910.07467.

Dims: N rows, C width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kernels import configs


def supports(x: Tensor) -> bool:
    """Rows of one stride. Heads of a packed projection have two and would be copied; PyTorch's norm reads them where
    they are, and torch.compile fuses it with the rotation behind."""
    is_rows = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    return configs.computes_on(x) and x.shape[-1] <= configs.MAX_NORM_WIDTH and x.numel() > 0 and is_rows


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
               residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    y, added, _, _ = norm_forward(x, weight, bias, residual, eps, False)
    return y if residual is None else (y, added)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    y, added, _, _ = norm_forward(x, weight, None, residual, eps, True)
    return y if residual is None else (y, added)


def _rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C) with a contiguous last dim; a view where its strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@library.custom_op("flatgpt::norm_forward", mutates_args=())
def norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
                 rms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (..., C), x + residual (..., C), mean (N,), 1 / standard deviation (N,). Empty: the sum without a residual, the
    mean of RMSNorm."""
    y, added, mean, rstd = _outputs(x, weight, bias, residual, eps, rms)
    rows = _rows(x)
    residual_rows = rows if residual is None else _rows(residual)
    N, C = rows.shape
    tile = configs.norm(C, backward=False)
    with torch.cuda.device_of(x):  # Triton launches on the current one; for backward, autograd's thread sets it
        _forward_kernel[(triton.cdiv(N, tile.rows),)](
            rows, residual_rows, weight, weight if bias is None else bias, y, added, mean, rstd,
            N, rows.stride(0), residual_rows.stride(0), eps,
            C=C, BLOCK_C=tile.columns, BLOCK_N=tile.rows, IS_RMS=rms, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, num_warps=tile.warps())
    return y, added, mean, rstd


@norm_forward.register_fake
def _outputs(x, weight, bias, residual, eps, rms):
    y, N = torch.empty_like(x, memory_format=torch.contiguous_format), x.numel() // x.shape[-1]
    return (y, x.new_empty(0) if residual is None else torch.empty_like(y),
            x.new_empty(0 if rms else N, dtype=torch.float32), x.new_empty(N, dtype=torch.float32))


@library.custom_op("flatgpt::norm_backward", mutates_args=())
def norm_backward(grad: Tensor, grad_added: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
                  has_bias: bool, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., C), the weight (C,) and the bias (C,), empty without one. x is what was normalised;
    grad_added (..., C) is the gradient that reached the sum x + residual on its other way."""
    rows, grad_rows = _rows(x), _rows(grad)
    added_rows = grad_rows if grad_added is None else _rows(grad_added)
    N, C = rows.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = configs.norm(C, backward=True)
    n_sm = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1  # 1: interpreted
    programs = min(n_sm * configs.NORM_BACKWARD_PROGRAMS_PER_SM, triton.cdiv(N, tile.rows))
    grad_weight = torch.empty((programs, C), dtype=torch.float32, device=x.device)  # one partial sum a program
    grad_bias = torch.empty((programs if has_bias else 0, C), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad_rows, added_rows, rows, weight, mean, rstd, grad_x, grad_weight, grad_bias,
        N, grad_rows.stride(0), added_rows.stride(0), rows.stride(0),
        C=C, BLOCK_C=tile.columns, BLOCK_N=tile.rows, IS_RMS=rms, HAS_BIAS=has_bias,
        HAS_ADDED=grad_added is not None, num_warps=tile.warps())
    grad_bias = grad_bias.sum(0).to(weight.dtype) if has_bias else weight.new_empty(0)
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias


@norm_backward.register_fake
def _(grad, grad_added, x, weight, mean, rstd, has_bias, rms):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), torch.empty_like(weight) if has_bias else weight.new_empty(0)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, residual, _, ctx.rms = inputs
    _, added, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x if residual is None else added, weight, mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, grad_added, _grad_mean, _grad_rstd):
    x, weight, mean, rstd = ctx.saved_tensors
    if grad is None:  # only the sum was used
        return grad_added, None, None, grad_added, None, None
    grad_x, grad_weight, grad_bias = norm_backward(
        grad, grad_added if ctx.has_residual else None, x, weight, mean, rstd, ctx.has_bias, ctx.rms)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, grad_x if ctx.has_residual else None, None, None


norm_forward.register_autograd(_gradients, setup_context=_save_for_backward)


# ---- Kernels ---------------------------------------------------------------------------------------------------------

@triton.jit
def _forward_kernel(X, RESIDUAL, WEIGHT, BIAS, Y, ADDED, MEAN, RSTD, N, x_stride, residual_stride, eps,
                    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, IS_RMS: tl.constexpr,
                    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Program i normalises rows i*BLOCK_N ... X and RESIDUAL (N, C) by rows of their stride; Y, ADDED contiguous."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < N
    row = row.to(tl.int64)[:, None]  # N * C passes 2^31 at 1M rows of 2,048
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = in_rows[:, None] & (column < C)
    x = tl.load(X + row * x_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(RESIDUAL + row * residual_stride + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(Y.dtype.element_ty)  # rounded as the unfused sum is
        tl.store(ADDED + row * C + column, x, mask=mask)
    x = x.to(tl.float32)
    if not IS_RMS:
        mean = tl.sum(x, axis=1) / C
        tl.store(MEAN + row, mean[:, None], mask=in_rows[:, None])
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / C + eps)
    tl.store(RSTD + row, rstd[:, None], mask=in_rows[:, None])
    y = x * rstd[:, None] * tl.load(WEIGHT + column, mask=column < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(BIAS + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(Y + row * C + column, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(GRAD, GRAD_ADDED, X, WEIGHT, MEAN, RSTD, GRAD_X, GRAD_WEIGHT, GRAD_BIAS,
                     N, grad_stride, added_stride, x_stride,
                     C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, IS_RMS: tl.constexpr,
                     HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr):
    """Program i takes the tiles i, i + programs, ... and writes row i of GRAD_WEIGHT and GRAD_BIAS (programs, C)."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)[None, :]
    in_columns = column < C
    weight = tl.load(WEIGHT + column, mask=in_columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = row < N
        row = row.to(tl.int64)[:, None]
        mask = in_rows[:, None] & in_columns
        grad = tl.load(GRAD + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.load(X + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=in_rows[:, None], other=0.0)  # (BLOCK_N, 1)
        if not IS_RMS:
            x_hat = tl.where(mask, x_hat - tl.load(MEAN + row, mask=in_rows[:, None], other=0.0), 0.0)
        x_hat *= rstd
        grad_weight += grad * x_hat
        if HAS_BIAS:
            grad_bias += grad
        grad_x_hat = grad * weight
        grad_x = grad_x_hat - x_hat * (tl.sum(grad_x_hat * x_hat, axis=1) / C)[:, None]
        if not IS_RMS:
            grad_x -= (tl.sum(grad_x_hat, axis=1) / C)[:, None]
        grad_x *= rstd
        if HAS_ADDED:
            grad_x += tl.load(GRAD_ADDED + row * added_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(GRAD_X + row * C + column, grad_x.to(GRAD_X.dtype.element_ty), mask=mask)
    tl.store(GRAD_WEIGHT + program * C + column, tl.sum(grad_weight, axis=0)[None, :], mask=in_columns)
    if HAS_BIAS:
        tl.store(GRAD_BIAS + program * C + column, tl.sum(grad_bias, axis=0)[None, :], mask=in_columns)
