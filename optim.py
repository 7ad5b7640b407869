"""The optimizer: parameter groups, fused AdamW, Muon, the learning rate as a pure function of the step.

AdamW is arXiv:1711.05101 through PyTorch's fused kernel. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
orthogonalises the update of each of the blocks' matrices; equal shapes are stacked and share their matmuls. The state
is plain tensors by parameter name and one count, so a checkpoint needs no pickle and no parameter order. Matrices and
embedding tables decay (as in GPT-2 and nanoGPT), norms and biases never.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw  # the function, not the class: building the class imports torch._dynamo, 1.3 s

from config import OptimConfig
from model import GPT

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the Muon post: steepest at 0, no exact limit
NEWTON_SCHULZ_STEPS = 5


def learning_rate(step: int, optim: OptimConfig) -> float:
    """AdamW's learning rate of the step that follows `step` completed ones. optim.decay_steps must be resolved."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    if step >= optim.decay_steps:
        return optim.min_lr
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / (optim.decay_steps - optim.warmup_steps)
        return optim.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (optim.lr - optim.min_lr)
    steps_left = (optim.decay_steps - step) / (optim.decay_fraction * optim.decay_steps)
    return optim.min_lr + min(1.0, steps_left) * (optim.lr - optim.min_lr)


class Optimizer:
    """AdamW for all parameters that learn, or Muon for the blocks' matrices and AdamW for the rest (embeddings, head,
    vectors)."""

    def __init__(self, model: GPT, optim: OptimConfig, *, newton_schulz_dtype: torch.dtype = torch.bfloat16):
        self.optim = optim
        self.newton_schulz_dtype = newton_schulz_dtype
        self.updates = 0  # updates made; a skipped step does not count
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.muon = {name: p for name, p in parameters.items()
                     if optim.name == "muon" and name.startswith("blocks.") and p.dim() == 2}
        self.muon_rows = {name: _rows_of_parts(name, p, model) for name, p in self.muon.items()}
        self.adamw = {name: p for name, p in parameters.items() if name not in self.muon}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.muon.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' .grad. lr is AdamW's; Muon's is muon_lr times the same share of the peak."""
        self._step_adamw(lr)
        if self.muon:
            self._step_muon(self.optim.muon_lr * lr / self.optim.lr)
        self.updates += 1

    def _step_adamw(self, lr: float) -> None:
        for decays in (True, False):
            names = [name for name, p in self.adamw.items() if (p.dim() >= 2) == decays]
            parameters = [self.adamw[name] for name in names]
            if not names:
                continue
            # the fused kernel counts in place, one float32 scalar per parameter
            counts = torch.full((len(names),), float(self.updates), device=parameters[0].device)
            adamw(parameters, [p.grad for p in parameters], [self.exp_avg[name] for name in names],
                  [self.exp_avg_sq[name] for name in names], [], list(counts.unbind()),
                  fused=True, amsgrad=False, beta1=self.optim.betas[0], beta2=self.optim.betas[1], lr=lr,
                  weight_decay=self.optim.weight_decay if decays else 0.0, eps=self.optim.eps, maximize=False)

    def _step_muon(self, lr: float) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for name, p in self.muon.items():
            parts = self.muon_rows[name]
            for triple in zip(p.split(parts), p.grad.split(parts), self.momentum[name].split(parts), strict=True):
                by_shape.setdefault(triple[0].shape, []).append(triple)
        for (rows, columns), triples in by_shape.items():
            matrices, gradients, moments = (list(column) for column in zip(*triples, strict=True))
            torch._foreach_lerp_(moments, gradients, 1.0 - self.optim.muon_momentum)
            nesterov = torch._foreach_lerp(gradients, moments, self.optim.muon_momentum)
            updates = orthogonalise(torch.stack(nesterov), dtype=self.newton_schulz_dtype)
            torch._foreach_mul_(matrices, 1.0 - lr * self.optim.weight_decay)
            # sqrt(rows / columns): the same change of the output's size for every shape (the Muon post)
            scale = lr * math.sqrt(max(1.0, rows / columns))
            torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """exp_avg.NAME, exp_avg_sq.NAME, momentum.NAME -> tensor of NAME's shape. Kept, not copied: to go on, fill
        them (checkpoint.fill) and set updates."""
        tables = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "momentum": self.momentum}
        return {f"{kind}.{name}": tensor for kind, table in tables.items() for name, tensor in table.items()}


def _rows_of_parts(name: str, weight: Tensor, model: GPT) -> list[int]:
    """Rows of the matrices that stand on top of each other in one weight: q, k, v; gate and up. Muon updates each on
    its own, which is worth 0.02 nats after 110 steps of the small Shakespeare model (docs/DECISIONS.md)."""
    config = model.config
    if name.endswith("attn.qkv.weight"):
        return [config.n_head * config.dim_per_head] + 2 * [config.kv_heads * config.dim_per_head]
    return 2 * [config.mlp_width] if name.endswith("mlp.fc.weight") and config.mlp == "swiglu" else [weight.shape[0]]


def orthogonalise(matrices: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Each of matrices (n, rows, columns) with its singular values pushed to about 1, by Newton-Schulz in dtype."""
    a, b, c = NEWTON_SCHULZ
    X = matrices.to(dtype)
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # largest singular value at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def gradient_norm(model: nn.Module) -> Tensor:
    """The global L2 norm of all gradients (0-d float32), on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])


@dataclass
class LossScale:
    """Dynamic loss scale for float16 (arXiv:1710.03740, section 3.2): halved when gradients overflow, doubled after a
    long good stretch; 1.0 and unchanging for other dtypes. Unlike torch.amp.GradScaler's, its finiteness check decides
    for AdamW and Muon together, and its state is two numbers in state.json."""

    scale: float = 1.0
    good_steps: int = 0
    dynamic: bool = False

    GROWTH_INTERVAL = 2000  # as GradScaler

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        return cls(scale=2.0 ** 16, dynamic=True) if dtype == torch.float16 else cls()

    def update(self, finite: bool) -> None:
        if self.dynamic:
            self.good_steps = self.good_steps + 1 if finite else 0
            if not finite:
                self.scale = max(self.scale / 2.0, 1.0)
            elif self.good_steps % self.GROWTH_INTERVAL == 0:
                self.scale *= 2.0
