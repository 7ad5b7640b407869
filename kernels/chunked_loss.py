"""Linear layer + cross-entropy in plain PyTorch without ever holding all logits: the loss of every device's torch.

A chunk of rows is multiplied out, turned into losses and, in place, into the gradient of its own logits, and that into
the gradients of hidden and weight, all in the forward pass (as Liger-Kernel, arXiv:2410.10989); backward only scales.
cross_entropy.py does the same around a Triton kernel. What it computes is defined in reference.py.

Dims: N rows, C width, V vocabulary (rows of the padded table).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import IGNORED, statistics_dtype


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str,
                         softcap: float, chunk_rows: int | None = None,
                         matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
                         add_product: Callable[..., object] = lambda total, a, b: total.add_(a @ b)) -> Tensor:
    """kernels.linear_cross_entropy, chunk_rows rows of logits at a time: if None, on CUDA enough for large matmuls,
    elsewhere few enough to stay near the caches. cpu.py passes products of its own; add_product adds a @ b to total."""
    chunk_rows = chunk_rows or (8192 if hidden.is_cuda else max(64, 2 ** 23 // weight.shape[0]))
    rule = _Rule(vocab_size, softcap, chunk_rows, matmul, add_product)
    if reduction != "none" and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total = _SummedLoss.apply(hidden, weight, targets, rule)
    else:
        with torch.no_grad():
            weight = weight.to(hidden.dtype)
            chunks = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
            losses = torch.cat([rule.losses(rule.logits(h, weight), t)[0].squeeze(1) for h, t in chunks])
        total = losses if reduction == "none" else losses.sum()
    return total / (targets != IGNORED).sum() if reduction == "mean" else total


class _Rule(NamedTuple):
    vocab_size: int
    softcap: float
    chunk_rows: int
    matmul: Callable[[Tensor, Tensor], Tensor]
    add_product: Callable[..., object]

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits (rows, V) of one chunk, in float32; may be overwritten. weight in hidden's dtype."""
        logits = self.matmul(hidden, weight.T).to(statistics_dtype(hidden))
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each row (rows, 1), and what scales exp(logits - largest), which logits become, to the softmax
        (rows, 1); both 0 where ignored."""
        keep = (targets != IGNORED)[:, None]
        target_logit = logits.gather(1, torch.where(keep, targets[:, None], 0))
        logits[:, self.vocab_size:] = -math.inf  # the padding is multiplied, at full rate, and then takes no part
        largest = logits.amax(dim=-1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        losses = largest + total.log() - target_logit
        return torch.where(keep, losses, 0.0), torch.where(keep, 1.0 / total, 0.0)


class _SummedLoss(torch.autograd.Function):
    """Summed loss; both gradients are made in forward, while a chunk's logits are at hand, and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rule: _Rule) -> Tensor:
        total = torch.zeros((), dtype=statistics_dtype(hidden), device=hidden.device)
        compute_weight = weight.to(hidden.dtype)  # once, not per chunk
        grad_hidden = torch.empty_like(hidden)
        # a frozen table (LoRA) needs none: neither the memory nor a third of the matmuls
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if ctx.needs_input_grad[1] else None
        for h, t, grad_h in zip(*(x.split(rule.chunk_rows) for x in (hidden, targets, grad_hidden)), strict=True):
            logits = rule.logits(h, compute_weight)  # (rows, V)
            slope = 1.0 - (logits / rule.softcap).square() if rule.softcap else None  # of the softcap
            losses, scale = rule.losses(logits, t)
            total = total + losses.sum()
            keep = (t != IGNORED)[:, None]
            grad_logits = logits.mul_(scale)  # softmax, less the one-hot:
            grad_logits.scatter_add_(1, torch.where(keep, t[:, None], 0), -keep.to(logits.dtype))
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_h.copy_(rule.matmul(grad_logits, compute_weight))
            if grad_weight is not None:
                rule.add_product(grad_weight, grad_logits.T, h)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        # float32: in bfloat16 a factor such as 1/200 is off by up to 2^-9, and with it the whole gradient of the body
        grad_hidden = (grad_hidden.to(grad_output.dtype) * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            # in place, a table less at the peak, unless a second backward could ask for it again (retain_graph=True)
            keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
            scale = Tensor.mul if torch.compiler.is_compiling() or keeps_graph() else Tensor.mul_
            grad_weight = scale(grad_weight, grad_output.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None
