"""Linear layer + cross-entropy in chunks of rows: matmuls by cuBLAS, one Triton kernel between them.

A chunk's logits are computed, turned into losses and, in place, into their own gradient, and multiplied out into the
gradients of hidden and weight, all in the forward pass; backward only scales (the idea of Liger-Kernel,
arXiv:2410.10989, whose chunks are smaller: each one reads and writes the weight's whole gradient, float32).

Dims: N rows, C width, V vocabulary (rows of the padded table).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kernels import configs
from kernels.reference import IGNORED


def supports(hidden: Tensor) -> bool:
    return configs.computes_on(hidden)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str,
                         softcap: float, chunk_rows: int = configs.CROSS_ENTROPY_CHUNK_ROWS) -> Tensor:
    """kernels.linear_cross_entropy by Triton, chunk_rows rows of logits at a time."""
    args = targets, vocab_size, softcap, chunk_rows
    if reduction != "none" and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, _, _ = summed_loss(hidden, weight, *args, weight.requires_grad)
    else:
        total = token_losses(hidden.detach(), weight.detach(), *args)
        total = total if reduction == "none" else total.sum()
    return total / (targets != IGNORED).sum() if reduction == "mean" else total


@library.custom_op("flatgpt::token_losses", mutates_args=())
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float, rows: int) -> Tensor:
    """Loss of each row, float32 (N,), without gradient."""
    return _by_chunk(hidden, weight, targets, vocab_size, softcap, rows, wants_grad=False, weight_learns=False)[0]


@token_losses.register_fake
def _(hidden, weight, targets, vocab_size, softcap, rows):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@library.custom_op("flatgpt::summed_loss", mutates_args=())
def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float, rows: int,
                weight_learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, float32 (), and its gradients: (N, C) in hidden's dtype and (V, C) in float32, empty for a
    weight that does not learn (LoRA's)."""
    losses, *gradients = _by_chunk(hidden, weight, targets, vocab_size, softcap, rows, wants_grad=True,
                                   weight_learns=weight_learns)
    return losses.sum(), *gradients


@summed_loss.register_fake
def _(hidden, weight, targets, vocab_size, softcap, rows, weight_learns):
    return (hidden.new_empty((), dtype=torch.float32),
            torch.empty_like(hidden, memory_format=torch.contiguous_format),
            hidden.new_empty(weight.shape if weight_learns else 0, dtype=torch.float32))


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.weight_dtype, ctx.weight_learns = inputs[1].dtype, inputs[-1]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # nobody differentiates the gradients: no zeros for them


def _gradients(ctx, grad_total, _grad_hidden, _grad_weight):
    grad_hidden, grad_weight = ctx.saved_tensors
    # float32: in bfloat16 a factor such as 1/200 is off by up to 2^-9, and with it the whole gradient of the body
    grad_hidden = (grad_hidden.float() * grad_total).to(grad_hidden.dtype)
    return grad_hidden, (grad_weight * grad_total).to(ctx.weight_dtype) if ctx.weight_learns else None, *[None] * 5


summed_loss.register_autograd(_gradients, setup_context=_save_for_backward)


def _by_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float, rows: int, *,
              wants_grad: bool, weight_learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), gradient of their sum by hidden (N, C) and by weight (V, C) float32; empty unless wanted."""
    N, V = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.contiguous()
    compute_weight = weight.to(hidden.dtype)  # once, not per chunk
    losses = hidden.new_empty(N, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden if wants_grad else hidden[:0])
    grad_weight = torch.zeros(weight.shape if weight_learns else 0, dtype=torch.float32, device=hidden.device)
    buffer = hidden.new_empty((min(rows, N), V))  # one for all chunks
    for start in range(0, N, rows):
        chunk = hidden[start:start + rows]
        logits = torch.matmul(chunk, compute_weight.T, out=buffer[:chunk.shape[0]])  # (rows, V)
        _loss_and_gradient(logits, targets[start:], losses[start:], vocab_size, softcap, wants_grad=wants_grad)
        if wants_grad:  # the logits have become their own gradient
            torch.matmul(logits, compute_weight, out=grad_hidden[start:start + rows])
            if weight_learns:
                _add_product(grad_weight, logits.T, chunk)
    return losses, grad_hidden, grad_weight


def _loss_and_gradient(logits: Tensor, targets: Tensor, losses: Tensor, vocab_size: int, softcap: float, *,
                       wants_grad: bool) -> None:
    """Write the loss of each row of logits (rows, V) into losses, and its gradient over the logits."""
    rows, V = logits.shape
    tile = configs.cross_entropy(V)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        _loss_kernel[(rows,)](logits, targets, losses, softcap, V=V, VOCAB_SIZE=vocab_size, BLOCK_V=tile.columns,
                              HAS_SOFTCAP=softcap != 0.0, WANTS_GRAD=wants_grad, num_warps=tile.warps())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) float32 += a (m, k) @ b (k, n), without rounding the product to their dtype where cuBLAS can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_to_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch's addmm takes a float32 sum beside 16-bit factors: some versions want three equal dtypes."""
    a, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


# ---- Kernel ----------------------------------------------------------------------------------------------------------

LOG2_E = tl.constexpr(1.4426950408889634)
IGNORED_TARGET = tl.constexpr(IGNORED)


@triton.jit
def _loss_kernel(LOGITS, TARGETS, LOSSES, softcap, V: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK_V: tl.constexpr,
                 HAS_SOFTCAP: tl.constexpr, WANTS_GRAD: tl.constexpr):
    """Program i: the loss of row i of LOGITS (rows, V), and its gradient in the row's place. Columns from VOCAB_SIZE on
    are padding. Two sweeps; the second goes backwards, over what the first left in the caches."""
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * V  # rows * V passes 2^31 at 43k rows of GPT-2's vocabulary
    target = tl.load(TARGETS + row)
    if target == IGNORED_TARGET:
        tl.store(LOSSES + row, 0.0)
        if WANTS_GRAD:
            for tile in range(0, tl.cdiv(V, BLOCK_V)):
                column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
                tl.store(LOGITS + column, tl.zeros((BLOCK_V,), LOGITS.dtype.element_ty), mask=column < V)
        return
    target_logit = tl.load(LOGITS + target).to(tl.float32)  # before the gradient takes its place
    if HAS_SOFTCAP:
        target_logit = softcap * _tanh(target_logit / softcap)

    # Sweep 1: the largest logit, and lane by lane the sum of exp(logit - largest)
    largest = -float("inf")
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for tile in range(0, tl.cdiv(VOCAB_SIZE, BLOCK_V)):
        x = _logits(LOGITS, tile, softcap, V, VOCAB_SIZE, BLOCK_V, HAS_SOFTCAP)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        sums = sums * tl.exp2((largest - new_largest) * LOG2_E) + tl.exp2((x - new_largest) * LOG2_E)
        largest = new_largest
    lse = largest + tl.log(tl.sum(sums, axis=0))
    tl.store(LOSSES + row, lse - target_logit)

    # Sweep 2: softmax - one-hot, through the softcap
    if WANTS_GRAD:
        n_tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
        for i in range(0, n_tiles):
            tile = n_tiles - 1 - i
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            x = _logits(LOGITS, tile, softcap, V, VOCAB_SIZE, BLOCK_V, HAS_SOFTCAP)
            grad = tl.exp2((x - lse) * LOG2_E) - tl.where(column == target, 1.0, 0.0)
            if HAS_SOFTCAP:
                share = tl.where(column < VOCAB_SIZE, x / softcap, 1.0)
                grad *= 1.0 - share * share
            tl.store(LOGITS + column, grad.to(LOGITS.dtype.element_ty), mask=column < V)


@triton.jit
def _logits(LOGITS, tile, softcap, V: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK_V: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr):
    """One tile of a row, float32, through the softcap; -inf from VOCAB_SIZE on. Loaded up to V, a multiple of 128: by
    the odd VOCAB_SIZE the loads would fall apart into single numbers."""
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(LOGITS + column, mask=column < V, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return tl.where(column < VOCAB_SIZE, x, -float("inf"))


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0  # libdevice's tanh does not run in the interpreter
