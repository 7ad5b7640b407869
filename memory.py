"""The memory of a step before it is made: the real model runs on meta tensors, which have shapes but no bytes.

Forward, backward and the optimizer's update, while every storage that an operator makes is counted, and the most at
any one time kept. Needs no GPU and no data. It is the model as it stands that is counted: torch.compile keeps less for
the backward. What several ranks hold of it (FSDP2) is arithmetic on the count of one.

Dims: B sequences of a micro-batch, T tokens of a sequence, N = B*T rows, H heads, C width, V vocabulary (rows of the
padded table).
"""

import bisect
import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from config import Config
from finetune import lora
from kernels import chunked_loss, configs, reference
from model import GPT
from optim import Optimizer


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators make while it is entered, and their most at any one time of each phase."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.now, self.phase, self._seen = 0, "forward", {}
        self.peaks: dict[str, int] = {}  # by phase
        self.at_start: dict[str, int] = {}  # of each phase
        for tensor in tensors:  # those that are there already
            self._add(tensor)

    def enter(self, phase: str) -> None:
        self.phase, self.at_start[phase] = phase, self.now
        self.peaks[phase] = max(self.now, self.peaks.get(phase, 0))

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peaks[self.phase] = max(self.now, self.peaks.get(self.phase, 0))

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out


class _Attention(torch.autograd.Function):
    """What FlashAttention takes and keeps: PyTorch's on meta tensors would make all T x T scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, T, H, _ = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty((B, H, T), dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, _, lse, _ = ctx.saved_tensors
        delta = torch.empty_like(lse)  # noqa: F841 (an inner buffer)
        return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), None


class _PackedAttention(torch.autograd.Function):
    """The same of the packed projection (B, T, H + 2 Hkv, D): its gradient is one, too."""

    @staticmethod
    def forward(ctx, qkv: Tensor, n_head: int, first_key: Tensor | None) -> Tensor:
        B, T, _, D = qkv.shape
        out = qkv.new_empty((B, T, n_head, D))
        ctx.save_for_backward(qkv, out, qkv.new_empty((B, n_head, T), dtype=torch.float32), first_key)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        qkv, _, lse, _ = ctx.saved_tensors
        delta = torch.empty_like(lse)  # noqa: F841 (an inner buffer)
        return torch.empty_like(qkv, memory_format=torch.contiguous_format), None, None


class _RMSNorm(torch.autograd.Function):
    """What a fused kernel takes and keeps, ours or CUDA's: on meta tensors PyTorch's is many float32 operators."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, residual: Tensor | None):
        added = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.save_for_backward(added, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        return y if residual is None else (y, added)

    @staticmethod
    def backward(ctx, grad: Tensor, grad_added: Tensor | None = None):
        x, weight, _ = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        return grad_x, torch.empty_like(weight), None if grad_added is None else grad_x


class _Loss(torch.autograd.Function):
    """What kernels/cross_entropy.py takes and keeps."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        N, V = hidden.shape[0], weight.shape[0]
        # inner buffers: one chunk of logits, the table in hidden's dtype, the losses
        chunk = hidden.new_empty((min(configs.CROSS_ENTROPY_CHUNK_ROWS, N), V))
        inner = chunk, weight.to(hidden.dtype), hidden.new_empty(N, dtype=torch.float32)  # noqa: F841
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(torch.empty_like(hidden), grad_weight)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight * grad


@contextlib.contextmanager
def _operators(live: LiveBytes, kind: str, kept: list[Tensor] | None) -> Iterator[None]:
    """In the block the model's operators take on meta tensors what they take for real. kind: triton, torch (of CUDA)
    or cpu (PyTorch's own on a CPU). kept, of activation checkpointing: gets what it does not compute again."""
    def attention(q, k, v, *, first_key):
        if first_key is not None and kind != "triton":  # PyTorch's takes a mask of all T x T
            visible = reference.visible_keys(q.shape[1], k.shape[1], first_key, device=q.device)
            first_key = torch.where(visible, 0.0, -math.inf).to(q.dtype)
        return keeping(_Attention.apply(q, k, v, first_key))

    def linear_cross_entropy(hidden, weight, targets, **options):
        live.enter("loss")
        if kind == "triton":
            loss = _Loss.apply(hidden, weight)
        else:
            rows = configs.CROSS_ENTROPY_CHUNK_ROWS if kind == "torch" else None
            loss = chunked_loss.linear_cross_entropy(hidden, weight, targets, chunk_rows=rows, **options)
        live.enter("backward")
        return loss

    def packed_attention(qkv, n_head, *, first_key):
        return keeping(_PackedAttention.apply(qkv, n_head, first_key))

    def rms_norm(x, weight, *, eps, residual):
        return _RMSNorm.apply(x, weight, residual)

    def keeping(out: Tensor) -> Tensor:
        if live.phase == "forward" and kept is not None:
            kept.extend([torch.empty_like(out), out.new_empty(out.shape[:-1], dtype=torch.float32)])
        return out

    module = SimpleNamespace(supports=lambda x: x.is_meta, attention=attention, rms_norm=rms_norm,
                             linear_cross_entropy=linear_cross_entropy)
    if kind == "triton":
        module.packed_attention = packed_attention
    chosen = dict(kernels._chosen)
    kernels.choose_backends({})
    kernels._chosen.update({op: (kind, module) for op in ("attention", "linear_cross_entropy", "rms_norm")
                            if (op, kind) != ("rms_norm", "cpu")})
    try:
        yield
    finally:
        kernels._chosen.clear()
        kernels._chosen.update(chosen)


def meta_model(config: Config, dtype: torch.dtype) -> GPT:
    """The model of a run, adapters included, on the meta device."""
    with torch.device("meta"):
        model = GPT(config.model, compute_dtype=dtype, activation_checkpointing=config.train.activation_checkpointing)
        if config.lora.rank:
            lora.add_adapters(model, config.lora)
    return model.to("meta")  # RoPE's tables too


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one rank that holds the whole model, in a step of micro-batches of B."""

    weights: int
    gradients: int
    moments: int
    activations: int  # kept from forward to backward
    peaks: dict[str, int]  # beside weights, gradients and moments: the most at once in each phase of the step

    @property
    def phase(self) -> str:
        return max(self.peaks, key=self.peaks.get)

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.moments + max(self.peaks.values())


class Memory:
    """Bytes of a rank for any B, and any number of ranks that hold one copy of the model (FSDP2). Counted at a few B's;
    between them and beyond each phase of a step is a line."""

    def __init__(self, config: Config, *, dtype: torch.dtype, kind: str):
        self.config, self.kind, self.model = config, kind, meta_model(config, dtype)
        self._optimizer = Optimizer(self.model, config.optim,
                                    newton_schulz_dtype=torch.bfloat16 if dtype.itemsize < 4 else dtype)
        full = math.ceil(configs.CROSS_ENTROPY_CHUNK_ROWS / config.model.max_seq_len)  # the loss's chunks grow no more
        self.counted = {B: self._count(B) for B in {1, full, 2 * full}}

        def size(parameters: Iterable[nn.Parameter]) -> int:
            return sum(p.nbytes for p in parameters)
        # What FSDP2 holds whole: the tables, a block and the one fetched ahead; in the backward two blocks' gradients
        # too, one of them on its way. The tables' are counted.
        block = max(self.model.blocks, key=lambda block: size(block.parameters()))
        # Blocks travel in the dtype of their matmuls, so that the backward keeps no copy in it (distributed.shard).
        in_dtype = sum(min(p.nbytes, p.numel() * dtype.itemsize) for p in block.parameters())
        whole = size(self.model.parameters()) - size(self.model.blocks.parameters()) + 2 * in_dtype
        self.gathered = dict.fromkeys(("forward", "loss"), whole) | {
            "backward": whole + 2 * size(p for p in block.parameters() if p.requires_grad), "update": 0}

        keeps_casts = dtype != torch.float32 and not config.train.activation_checkpointing
        self.casts = sum(p.numel() * dtype.itemsize for p in self.model.blocks.parameters()
                         if keeps_casts and p.dim() >= 2 and p.dtype != dtype)

    def _count(self, B: int) -> StepBytes:
        """A step of several micro-batches of B: the gradients of those before are there."""
        learned = [p for p in self.model.parameters() if p.requires_grad]
        for p in learned:
            p.grad = torch.empty_like(p)
        tokens = torch.empty((B, self.config.model.max_seq_len), dtype=torch.int64, device="meta")
        document_ids = tokens.int() if self.config.data.document_mask else None
        held = [*self.model.parameters(), *self.model.buffers()], [p.grad for p in learned], \
            self._optimizer.state_tensors().values()
        live = LiveBytes(tensor for tensors in held for tensor in tensors)
        kept: list[Tensor] = []
        with _operators(live, self.kind, kept if self.config.train.activation_checkpointing else None), live:
            live.enter("forward")
            self.model(tokens, tokens, document_ids=document_ids, reduction="sum").backward()
            kept.clear()
            live.enter("update")
            self._optimizer.step(self.config.optim.lr)
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in held]
        return StepBytes(*sizes, activations=live.at_start["loss"] - sum(sizes),
                         peaks={phase: peak - sum(sizes) for phase, peak in live.peaks.items()})

    def at(self, B: int, ranks: int = 1) -> StepBytes:
        """A step of one rank if so many hold one copy of the model."""
        known = sorted(self.counted)
        right = min(max(1, bisect.bisect_left(known, B)), len(known) - 1)
        a, b = known[right - 1], known[right]
        low, high = self.counted[a], self.counted[b]

        def on_line(start: int, end: int) -> int:
            return math.ceil(start + (end - start) * (B - a) / (b - a))
        peaks = {phase: on_line(low.peaks[phase], high.peaks[phase]) for phase in low.peaks}
        if ranks > 1:  # an update touches a rank's own rows, and Muon's matrices are shared out
            peaks = {phase: math.ceil(peak / ranks) if phase == "update" else peak + self.gathered[phase] - self.casts
                     for phase, peak in peaks.items()}
        activations = on_line(low.activations, high.activations) - (self.casts if ranks > 1 else 0)
        return StepBytes(*(math.ceil(part / ranks) for part in (low.weights, low.gradients, low.moments)),
                         activations=activations, peaks=peaks)

    def largest(self, limit: int, most: int, ranks: int = 1) -> int:
        """The largest B up to most of which a step takes at most limit bytes; 0 if not even one sequence fits."""
        while True:
            B = bisect.bisect_right(range(1, most + 1), limit, key=lambda B: self.at(B, ranks).peak)
            if B <= max(self.counted):
                return B
            self.counted[B] = self._count(B)  # so far out another operator may be the largest


def loss_chunk_bytes(config: Config, B: int, model: GPT, *, dtype: torch.dtype, kind: str) -> int:
    """The loss's inner buffers: one chunk of logits, in PyTorch's also in float32, and the table in dtype."""
    V, C = model.head_weight.shape
    rows = min(configs.CROSS_ENTROPY_CHUNK_ROWS, B * config.model.max_seq_len)
    table = 0 if model.head_weight.dtype == dtype else V * C * dtype.itemsize
    return rows * V * (dtype.itemsize if kind == "triton" else dtype.itemsize + 4) + table
