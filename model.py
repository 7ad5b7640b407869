"""The decoder-only Transformer: GPT, its blocks, initialisation, the KV cache, and what a token costs.

GPT-2 (Radford et al. 2019) and its modern descendants (RMSNorm, RoPE, SwiGLU, QK-norm, grouped-query attention; Llama,
arXiv:2302.13971, Qwen3, arXiv:2505.09388) by the switches of [model]. Weights keep their own dtype (float32 in
training); matmuls run in `compute_dtype`. It builds no optimizer, loads no files and prints nothing.

Dims: B batch, T sequence, C width (n_embd), H query heads, Hkv key/value heads, D head dim, V vocabulary.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from config import ModelConfig, RopeScaling


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype while the weight keeps its own. GPT initialises it."""

    def reset_parameters(self) -> None:
        """Nothing: drawing numbers that GPT draws again would double the start of a large model."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dim; with a residual as kernels.layer_norm."""

    def __init__(self, dim: int, config: ModelConfig, kind: str | None = None):
        super().__init__()
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.bias and self.kind == "layernorm" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.kind == "rmsnorm":
            return kernels.rms_norm(x, self.weight, eps=self.eps, residual=residual)
        return kernels.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


class KVCache:
    """Keys and values of the tokens seen so far, in static buffers: one pair per layer, shared length for the batch.

    Prompts of unequal length stand right-aligned: row b's first padding[b] slots are padding, never seen.
    """

    def __init__(self, config: ModelConfig, *, batch: int, dtype: torch.dtype, device: torch.device,
                 slots: int | None = None, padding: Tensor | None = None):
        slots = config.max_seq_len if slots is None else slots
        # Head-major memory: decoding then reads each head's keys in one run. Seen as (B, slots, Hkv, D).
        shape = (batch, config.kv_heads, slots, config.dim_per_head)
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
                                   for _ in range(config.n_layer)] for _ in range(2))
        self.padding = padding  # (B,) int, or None = no padding anywhere
        self.length = 0  # slots filled, padding included

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, Tq, Hkv, D) behind the filled slots; returns all keys and values (B, length + Tq, Hkv, D)."""
        end = self.length + k.shape[1]
        self.keys[layer][:, self.length:end] = k
        self.values[layer][:, self.length:end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class Attention(nn.Module):
    """Causal self-attention, heads grouped over n_kv_head keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.H, self.Hkv, self.D = config.n_head, config.kv_heads, config.dim_per_head
        self.qkv = Linear(config.n_embd, (self.H + 2 * self.Hkv) * self.D, bias=config.has_qkv_bias)
        self.proj = Linear(self.H * self.D, config.n_embd, bias=config.bias)
        self.q_norm = Norm(self.D, config, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(self.D, config, "rmsnorm") if config.qk_norm else None

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, first_key: Tensor | None,
                cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.D)  # (B, T, H + 2 Hkv, D)
        if self.q_norm is None and rotation is None and cache is None:  # left together: so is their gradient
            return self.proj(kernels.packed_attention(qkv, self.H, first_key=first_key).flatten(2))
        q, k, v = qkv.split((self.H, self.Hkv, self.Hkv), dim=2)  # (B, T, H or Hkv, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # A cache may hold float32 beside bfloat16 matmuls (see sample.py); else both conversions do nothing.
        out = kernels.attention(q.to(k.dtype), k, v, first_key=first_key).to(x.dtype)  # (B, T, H, D)
        return self.proj(out.flatten(2))


class MLP(nn.Module):
    """Two linear layers and a nonlinearity; SwiGLU (arXiv:2002.05202) holds gate and up in one matmul."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        width = 2 * config.mlp_width if self.kind == "swiglu" else config.mlp_width
        self.fc = Linear(config.n_embd, width, bias=config.has_mlp_bias)
        self.proj = Linear(config.mlp_width, config.n_embd, bias=config.has_mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)  # (B, T, hidden), twice that for swiglu
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = Norm(config.n_embd, config)
        self.attn = Attention(config)
        self.mlp_norm = Norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, branch: Tensor | None, rotation: tuple[Tensor, Tensor] | None,
                first_key: Tensor | None, cache: KVCache | None, layer: int) -> tuple[Tensor, Tensor]:
        """The residual stream, and the branch (None before the first block) that the norm behind has yet to add to it:
        the sum costs no pass of its own."""
        y, x = (self.attn_norm(x), x) if branch is None else self.attn_norm(branch, residual=x)
        branch = self.dropout(self.attn(y, rotation, first_key, cache, layer))
        y, x = self.mlp_norm(branch, residual=x)
        return x, self.dropout(self.mlp(y))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab_size), or the loss against targets. Initialised from the global RNG."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32,
                 activation_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = activation_checkpointing
        self.wte = _embedding(padded_vocab_size(config.vocab_size), config.n_embd)
        self.wpe = _embedding(config.max_seq_len, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = Norm(config.n_embd, config)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, self.wte.num_embeddings, bias=False)
        if config.position == "rope":
            cos, sin = rope_table(config)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        if not self.wte.weight.is_meta:  # else the one who puts it there fills it, see distributed.shard
            with torch.no_grad():
                for name, value in self.initial_weights():
                    self.get_parameter(name).copy_(value)

    def initial_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter, whole, on the CPU, drawn from the global RNG in a fixed order.

        gpt2: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 L)) (GPT-2, section 2.3). zero_residual: matrices
        N(0, 1/sqrt(fan_in)), residual projections 0, and with an untied head that head 0 and the embedding N(0, 1), as
        modded-nanogpt. Biases 0, norms 1."""
        is_gpt2 = self.config.init == "gpt2"
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, device="cpu")
            if name in ("wte.weight", "wpe.weight"):
                std = 0.02 if is_gpt2 or self.lm_head is None else 1.0
            elif name.endswith("proj.weight"):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_gpt2 else 0.0  # two residual branches per block
            else:
                std = 0.02 if is_gpt2 else 0.0 if name == "lm_head.weight" else parameter.shape[-1] ** -0.5
            if parameter.dim() < 2:
                value.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                value.normal_(std=std) if std else value.zero_()
            if name in ("wte.weight", "lm_head.weight"):
                value[self.config.vocab_size:] = 0.0  # of no token: the gradient is 0, and decay keeps them there
            yield name, value

    @property
    def head_weight(self) -> Tensor:
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, document_ids: Tensor | None = None,
                reduction: str = "mean") -> Tensor:
        """Logits (B, T, vocab_size) float32; with targets (B, T) the loss in nats over those that are not -100.

        document_ids (B, T) numbers the document of each token, if documents are to be kept apart; reduction as in
        kernels.linear_cross_entropy.
        """
        x = self.hidden(tokens, document_ids=document_ids)
        if targets is None:
            return self.logits(x)
        return kernels.linear_cross_entropy(
            x.flatten(0, 1), self.head_weight, targets.flatten(), vocab_size=self.config.vocab_size,
            reduction=reduction, softcap=self.config.logit_softcap)

    def hidden(self, tokens: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last norm, (B, T, C) in compute_dtype. With a cache, tokens follow those in it
        and are added to it."""
        B, T = tokens.shape
        if (0 if cache is None else cache.length) + T > self.config.max_seq_len:
            raise ValueError(f"{T} more tokens do not fit into max_seq_len = {self.config.max_seq_len}")
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids and cache exclude each other: a cache holds one document per row")
        positions, first_key = self._positions_and_first_keys(B, T, document_ids, cache, tokens.device)
        x = F.embedding(tokens, self.wte.weight).to(self.compute_dtype)
        rotation = None
        if self.wpe is not None:
            x = x + F.embedding(positions, self.wpe.weight).to(x.dtype)  # (B or 1, T, C)
        else:  # cos and sin (B or 1, T, 1, D), the same for all heads
            rotation = tuple(table[positions][:, :, None].to(x.dtype) for table in (self.rope_cos, self.rope_sin))
        x, branch = self.dropout(x), None
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
                x = x if branch is None else x + branch  # here, so that a block keeps their sum instead of both
                x, branch = checkpoint(block, x, None, rotation, first_key, cache, layer, use_reentrant=False,
                                       context_fn=partial(create_selective_checkpoint_contexts, _keeps_attention))
            else:
                x, branch = block(x, branch, rotation, first_key, cache, layer)
        if cache is not None:
            cache.length += T
        return self.final_norm(branch, residual=x)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (..., vocab_size) of hidden (..., C)."""
        tied, cap = self.lm_head is None, self.config.logit_softcap
        logits = F.linear(hidden, self.wte.weight.to(hidden.dtype)) if tied else self.lm_head(hidden)
        logits = logits[..., :self.config.vocab_size].float()
        return logits if cap == 0.0 else cap * torch.tanh(logits / cap)

    def _positions_and_first_keys(self, B: int, T: int, document_ids: Tensor | None, cache: KVCache | None,
                                  device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions (B or 1, T) and attention's first_key (B or 1, T) or None."""
        window = self.config.window
        slot = torch.arange(T, device=device)[None]
        if cache is None:
            first_key = kernels.first_visible_key(document_ids, window, T=T, device=device)
            return slot if document_ids is None else slot - kernels.document_starts(document_ids), first_key
        slot = slot + cache.length
        if cache.padding is None and window is None:
            return slot, None
        first_key = torch.zeros_like(slot) if window is None else (slot - (window - 1)).clamp(min=0)
        if cache.padding is None:
            return slot, first_key
        padding = cache.padding[:, None]  # (B, 1)
        return (slot - padding).clamp(min=0), torch.maximum(first_key, padding)

    def parameter_count(self) -> int:
        """Parameters of vocab_size rows, as published; the padding of the table is not counted."""
        padding = self.wte.num_embeddings - self.config.vocab_size
        tables = 1 if self.lm_head is None else 2
        return sum(p.numel() for p in self.parameters()) - tables * padding * self.config.n_embd


def _keeps_attention(_context, op, *_args, **_kwargs) -> bool:
    """For activation checkpointing, what is not computed again: operators called so, all but the CPU's few matmuls."""
    return "attention" in str(op)


def _embedding(rows: int, columns: int) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)  # GPT fills it


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token tables: from 1,024 up a multiple of 128, which tensor cores need to run at full rate."""
    return vocab_size if vocab_size < 1024 else 128 * math.ceil(vocab_size / 128)


# ---- Rotary position embedding (RoFormer, arXiv:2104.09864) ----------------------------------------------------------

def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, float32 (max_seq_len, D): each twice, of sin the first half negative."""
    D = config.dim_per_head
    # Radians per token, (D/2,); rounded as Hugging Face's, whose last bits position 10,000 would multiply.
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if config.rope_scaling is not None:
        frequency = scaled_frequency(frequency, config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32, device="cpu"), frequency)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def scaled_frequency(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies for a longer context: all divided by factor, or (llama3) low ones in full and high ones not at all.

    llama3 is Llama 3.1's rule as in Hugging Face's modeling_rope_utils: between the two wavelengths it interpolates.
    """
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # full turns over the original context
    unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequency / scaling.factor, frequency, unscaled.clamp(0.0, 1.0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]), Hugging Face's order. x (B, T, H, D), cos and sin (B or 1, T, 1, D)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ---- What a token costs ----------------------------------------------------------------------------------------------

def flops_per_token(config: ModelConfig, *, seq_len: int | None = None) -> int:
    """FLOPs of forward and backward per token: the matmuls that the model has, causal half of attention.

    A matmul of (1, m) by (m, n) is 2mn FLOPs forward and twice that backward. Embedding look-ups, norms, the surplus
    rows of the padded table and recomputation under activation checkpointing are not counted.
    """
    T = seq_len or config.max_seq_len
    C, H, Hkv, D = config.n_embd, config.n_head, config.kv_heads, config.dim_per_head
    fc = 2 * config.mlp_width if config.mlp == "swiglu" else config.mlp_width
    matrices_per_block = C * (H + 2 * Hkv) * D + H * D * C + C * fc + config.mlp_width * C
    window = T if config.window is None else min(T, config.window)
    # keys seen, summed over T queries: 1 + 2 + ... + window, then window each
    keys_per_query = (window * (window + 1) / 2 + (T - window) * window) / T
    attention_per_block = 2 * H * D * keys_per_query  # multiply-adds of q k^T and weights v
    multiply_adds = config.n_layer * (matrices_per_block + attention_per_block) + C * config.vocab_size
    return round(3 * 2 * multiply_adds)
