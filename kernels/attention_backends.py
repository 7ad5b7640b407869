"""Attention's backends beside torch, cpu and triton, under the names by which the log calls them.

`triton fused`: flash_attention.py with the backward that adds up q's gradient by atomics. `SDPA cuDNN`, `SDPA flash`:
PyTorch's kernels of these names, for rows without documents and windows, which they would need a dense mask for.
`FlexAttention`: PyTorch's compiled kernel for rows with them (arXiv:2412.05496). What one is not for, such as the steps
of decoding, is computed by reference.py. fastest.py finds out which one wins.

Dims: B batch, T sequence, H query heads, Hkv key/value heads, D head dim.
"""

import functools
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import configs, reference

SDPA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
FLEX_BLOCK = 128  # queries and keys of a tile that FlexAttention visits or not: its own default


@functools.cache  # FlexAttention is compiled once
def backend_of(name: str) -> SimpleNamespace:
    """What a module of kernels/ offers for attention."""
    if name in SDPA:
        return SimpleNamespace(supports=_is_for_tensor_cores, attention=partial(_by_sdpa, SDPA[name]))
    if name == "triton fused":
        from kernels import flash_attention
        return SimpleNamespace(supports=_has_fused_tiles, attention=partial(flash_attention.attention, fused=True),
                               packed_attention=partial(flash_attention.packed_attention, fused=True))
    assert name == "FlexAttention", name
    # together with the making of its mask, which is how a compiled model has it
    return SimpleNamespace(supports=_is_for_tensor_cores, attention=torch.compile(_by_flex, dynamic=False))


def _is_for_tensor_cores(q: Tensor) -> bool:
    """On CUDA none of PyTorch's fused kernels takes float32 but the slow one. A single query is decoding's."""
    return q.shape[1] > 1 and q.numel() > 0 and (not q.is_cuda or q.dtype in (torch.float16, torch.bfloat16))


def _has_fused_tiles(q: Tensor) -> bool:
    from kernels import flash_attention
    return flash_attention.supports(q) and q.shape[-1] <= configs.MAX_FUSED_HEAD_DIM


def _by_sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None) -> Tensor:
    """Raises RuntimeError where PyTorch's kernel does not take the tensors."""
    if first_key is not None or q.shape[1] != k.shape[1]:
        return reference.attention(q, k, v, first_key=first_key)
    with sdpa_kernel(kernel):
        return reference.attention(q, k, v)


def _by_flex(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention  # here: with Dynamo and sympy it takes a second
    B, T, H, _ = q.shape
    if first_key is None or T != k.shape[1]:
        return reference.attention(q, k, v, first_key=first_key)
    out_BHTD = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                              block_mask=_block_mask(first_key.expand(B, -1)), enable_gqa=H != k.shape[2])
    return out_BHTD.transpose(1, 2)


def _block_mask(first_key: Tensor):  # -> BlockMask
    """FlexAttention's mask of attention(): which tiles it visits, and which of them it need not mask. first_key (B, T).
    PyTorch's create_block_mask would hold T x T; this holds a number per tile."""
    from torch.nn.attention.flex_attention import BlockMask
    T, tiles = first_key.shape[1], -(-first_key.shape[1] // FLEX_BLOCK)
    query, tile = (torch.arange(n, device=first_key.device) for n in (tiles * FLEX_BLOCK, tiles))
    first = torch.minimum(first_key, query[:T])  # (B, T): a query sees itself
    of_tile = first[:, query.clamp(max=T - 1)].unflatten(1, (tiles, FLEX_BLOCK))  # queries past T: as the last one
    from_key, all_from_key = of_tile.amin(-1)[..., None], of_tile.amax(-1)[..., None]  # (B, tiles, 1)
    key_end, behind = (tile + 1) * FLEX_BLOCK, tile[None, :] < tile[:, None]  # (tiles,), (tiles, tiles)
    is_full = behind & (tile * FLEX_BLOCK >= all_from_key) & (key_end <= T)[:, None]  # (B, tiles of queries, of keys)
    is_visited = (behind | (tile[None, :] == tile[:, None])) & (key_end > from_key) & ~is_full

    def ordered(mask: Tensor) -> tuple[Tensor, Tensor]:  # how many, and their numbers in front
        return (mask.sum(-1, dtype=torch.int32)[:, None],
                mask.int().argsort(dim=-1, descending=True, stable=True).int()[:, None])

    return BlockMask.from_kv_blocks(
        *ordered(is_visited), *ordered(is_full), BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(T, T),
        mask_mod=lambda b, h, query, key: (key == query) | ((key < query) & (key >= first_key[b, query])))
