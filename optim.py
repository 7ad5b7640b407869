"""The optimizer: parameter groups, fused AdamW, Muon, the learning rate as a pure function of the step.

AdamW is arXiv:1711.05101 through PyTorch's fused kernel. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
orthogonalises the update of each of the blocks' matrices; equal shapes are stacked and share their matmuls. The state
is plain tensors by parameter name and one count, so a checkpoint needs no pickle and no parameter order. Matrices and
embedding tables decay (as in GPT-2 and nanoGPT), norms and biases never.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw  # the function, not the class: building the class imports torch._dynamo, 1.3 s

from config import OptimConfig
from distributed import World, local, naming_lost_rank, whole
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

    def __init__(self, model: GPT, optim: OptimConfig, *, newton_schulz_dtype: torch.dtype = torch.bfloat16,
                 world: World = World()):  # noqa: B008
        self.optim, self.world = optim, world
        self.newton_schulz_dtype = newton_schulz_dtype
        self.updates = 0  # updates made; a skipped step does not count
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(parameters.values())
        self.muon = {name: p for name, p in parameters.items()
                     if optim.name == "muon" and name.startswith("blocks.") and p.dim() == 2}
        self.muon_rows = {name: _rows_of_parts(name, p, model) for name, p in self.muon.items()}
        self.adamw = {name: p for name, p in parameters.items() if name not in self.muon}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.muon.items()}

    def zero_grad(self) -> None:
        """Not model.zero_grad(): after an evaluation FSDP2's parameters() are its whole copies, whose .grad is another.
        DDP's gradients are views of its buckets, and stay so."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and self.world.size > 1 and not hasattr(gradients[0], "device_mesh"):
            torch._foreach_zero_(gradients)
            return
        for p in self.parameters:
            p.grad = None

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
            if not names:
                continue
            parameters = [local(self.adamw[name]) for name in names]
            # the fused kernel counts in place, one float32 scalar per parameter
            counts = torch.full((len(names),), float(self.updates), device=parameters[0].device)
            adamw(parameters, [local(self.adamw[name].grad) for name in names],
                  [local(self.exp_avg[name]) for name in names], [local(self.exp_avg_sq[name]) for name in names], [],
                  list(counts.unbind()),
                  fused=True, amsgrad=False, beta1=self.optim.betas[0], beta2=self.optim.betas[1], lr=lr,
                  weight_decay=self.optim.weight_decay if decays else 0.0, eps=self.optim.eps, maximize=False)

    def _step_muon(self, lr: float) -> None:
        """Momentum and weights are updated on the rows that this rank holds; each whole matrix is orthogonalised by one
        rank."""
        by_shape: dict[tuple, list[str]] = {}
        for name, p in self.muon.items():
            by_shape.setdefault((p.shape, *self.muon_rows[name]), []).append(name)
        for (_, *parts), names in by_shape.items():
            weights, moments = ([local(table[name]) for name in names] for table in (self.muon, self.momentum))
            gradients = [local(self.muon[name].grad) for name in names]
            torch._foreach_lerp_(moments, gradients, 1.0 - self.optim.muon_momentum)
            nesterov = torch.stack(torch._foreach_lerp(gradients, moments, self.optim.muon_momentum))
            updates = shared_over_ranks(lambda matrices, parts=parts: self._directions(matrices, parts),
                                        nesterov.to(self.newton_schulz_dtype), self.muon[names[0]], self.world)
            torch._foreach_mul_(weights, 1.0 - lr * self.optim.weight_decay)
            torch._foreach_add_(weights, list(updates.to(weights[0].dtype).unbind()), alpha=-lr)

    def _directions(self, matrices: Tensor, parts: list[int]) -> Tensor:
        """Of weights (n, rows, columns), which hold matrices of so many rows on top of each other: each orthogonal,
        times sqrt(rows / columns), the same change of the output's size for every shape (the Muon post)."""
        return torch.cat([orthogonalise(part, dtype=self.newton_schulz_dtype)
                          * math.sqrt(max(1.0, part.shape[1] / part.shape[2])) for part in matrices.split(parts, 1)], 1)

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


def shared_over_ranks(function: Callable[[Tensor], Tensor], rows: Tensor, like: Tensor, world: World) -> Tensor:
    """function, from matrices (n, all rows, columns) to as many of the same shape, with about n / ranks of them on each
    rank; the same bits as function(matrices) on one.

    rows (n, rows, columns) are those that this rank holds of the matrices of weights like `like`, all or a share.
    """
    is_shard = hasattr(like, "device_mesh")
    if world.size == 1:
        return function(rows)
    group = like.device_mesh.get_group("parts" if like.device_mesh.ndim > 1 else 0) if is_shard else dist.group.WORLD
    ranks, total = group.size(), like.shape[0]
    each, height = -(-len(rows) // ranks), -(-total // ranks)  # matrices and, as FSDP2, rows; the last may have fewer
    count = min(each, max(0, len(rows) - group.rank() * each))  # of this rank
    if not is_shard:  # every rank has all gradients: each does its own and gathers the others'
        mine = rows.new_zeros(each, *rows.shape[1:])
        if count:
            mine[:count] = function(rows[group.rank() * each:][:count])
        found = rows.new_empty(ranks * each, *rows.shape[1:])
        with naming_lost_rank():
            dist.all_gather(list(found.split(each)), mine)
        return found[:len(rows)]
    sent = rows.new_zeros(ranks * each, height, rows.shape[2])
    sent[:len(rows), :rows.shape[1]] = rows
    received = torch.empty_like(sent)  # (ranks, each, height, columns): this rank's matrices, in every rank's rows
    with naming_lost_rank():
        dist.all_to_all_single(received, sent, group=group)
    matrices = received.view(ranks, each, height, -1).transpose(0, 1).reshape(each, ranks * height, -1)
    if count:
        matrices[:count, :total] = function(matrices[:count, :total])
    back = matrices.view(each, ranks, height, -1).transpose(0, 1).reshape(sent.shape)  # may be received's memory
    with naming_lost_rank():
        dist.all_to_all_single(sent, back, group=group)
    return sent[:len(rows), :rows.shape[1]]


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The global L2 norm of all gradients (0-d float32), on their device; a collective if they are sharded."""
    return whole(torch.nn.utils.get_total_norm(gradients))


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


@dataclass
class SpikeGuard:
    """Which finite steps to leave out (train.skip_spikes): those whose loss or gradient norm lies so many robust
    standard deviations (1.4826 x the median distance to the median) above the median of the last HISTORY steps. They
    never enter it themselves; ten in a row are no spike but a new state of affairs, with which it begins anew. As
    OLMo-core's SkipStep, which takes mean and standard deviation."""

    deviations: float = 0.0  # 0.0 = off
    history: list[list[float]] = field(default_factory=list)  # of steps that counted: loss, gradient norm
    in_a_row: int = 0
    skipped: int = 0  # in all

    HISTORY, LEAST, MOST_IN_A_ROW = 128, 32, 10

    def leaves_out(self, *measured: float) -> bool:
        if self.deviations == 0.0:
            return False
        if len(self.history) >= self.LEAST:
            for value, past in zip(measured, zip(*self.history, strict=True), strict=True):
                median = statistics.median(past)
                spread = 1.4826 * statistics.median(abs(x - median) for x in past)
                if value > median + self.deviations * spread:
                    self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
                    if self.in_a_row == self.MOST_IN_A_ROW:
                        self.in_a_row, self.history = 0, []
                    return True
        self.in_a_row, self.history = 0, [*self.history, list(measured)][-self.HISTORY:]
        return False
