"""Tile sizes of the Triton kernels: one table, read by the launchers and by the ahead-of-time gate of the tests.

Chosen by plain functions instead of triton.autotune: a training step never stops to tune, ranks never differ, and
every choice that a launch can make is known to tests/test_kernels_aot.py, which compiles it for GPUs that are not here.
"""

from typing import NamedTuple

import torch

WARP_SIZE = 64 if torch.version.hip else 32  # threads


def computes_on(x: torch.Tensor) -> bool:
    """Whether the kernels compute for x's dtype and device: the GPU if there is one, else they are interpreted."""
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.is_cuda == torch.cuda.is_available()


class Tile(NamedTuple):
    """rows x columns elements by so many threads."""

    rows: int
    columns: int
    threads: int

    def warps(self, warp_size: int = WARP_SIZE) -> int:
        return max(1, self.threads // warp_size)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# ----------------------------------------------------------------------------------------------------------------------
# Norms: a tile holds whole rows

MAX_NORM_WIDTH = 8192  # beyond, the backward's sums for the weight do not fit in registers beside a row
NORM_BLOCKS = tuple(2 ** n for n in range(4, 14))  # the columns of a tile: the width rounded up to a power of 2
NORM_BACKWARD_PROGRAMS_PER_SM = 4  # each writes one row of partial sums for the weight: few rows, all SMs busy


def norm_forward(width: int) -> Tile:
    """4,096 elements a tile: 32 a thread, four 16-byte loads of bfloat16 in flight. Wide rows take more warps."""
    columns = max(NORM_BLOCKS[0], next_power_of_2(width))
    return Tile(rows=max(1, 4096 // columns), columns=columns, threads=max(128, columns // 32))


def norm_backward(width: int) -> Tile:
    """Half of that a thread: x, dy and the sums for the weight and the bias stay in registers over all tiles."""
    columns = max(NORM_BLOCKS[0], next_power_of_2(width))
    return Tile(rows=max(1, 2048 // columns), columns=columns, threads=max(128, columns // 16))


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy: a program walks one row of logits in steps of `columns`

CROSS_ENTROPY_CHUNK_ROWS = 8192  # fewer lose: each chunk reads and writes the float32 gradient of the weight once


def cross_entropy(vocab_size: int) -> Tile:
    """16 elements a thread. Few programs an SM, so that rows read in the first sweep are still in L2 in the second:
    3 on each of 132 SMs hold 40 MB of GPT-2's rows in bfloat16."""
    columns = min(4096, max(256, next_power_of_2(vocab_size)))
    return Tile(rows=1, columns=columns, threads=columns // 16)


# ----------------------------------------------------------------------------------------------------------------------
# Attention

MAX_HEAD_DIM = 256
LAST_QUERY_BLOCK = 1024  # queries that the search for a key tile's last one reads at a time

class AttentionTile(NamedTuple):
    """queries x keys scores at a time, by warps x 32 threads, with the loads of `stages` tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class AttentionTiles(NamedTuple):
    """Of each kernel. fused: of the backward that makes all three gradients; None where it does not fit."""

    forward: AttentionTile
    backward_q: AttentionTile
    backward_kv: AttentionTile
    fused: AttentionTile | None = None


def _tiles(*tiles: tuple[int, int, int, int]) -> AttentionTiles:
    return AttentionTiles(*(AttentionTile(*tile) for tile in tiles))


# By the columns of a tile, those of the head dim. Chosen by the ahead-of-time gate, not by time: the largest that keep
# registers from spilling and wgmma from waiting for each other, on Triton 3.6 and 3.7. No GPU has timed them yet.
_ATTENTION_16_BIT = {
    "sm_90": {64: _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2), (64, 128, 8, 2)),
              128: _tiles((128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
              256: _tiles((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2))},
    "sm_100": {64: _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
               128: _tiles((128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
               256: _tiles((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2))},
    "sm_80": {64: _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
              128: _tiles((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
              256: _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2))},
    "gfx942": {64: _tiles((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
               128: _tiles((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
               256: _tiles((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1))},
}
# float32 is multiplied without tensor cores, operands in registers: small tiles, many threads
_ATTENTION_FLOAT32 = {
    64: _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    128: _tiles((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    256: _tiles((16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2)),
}
_ATTENTION_FLOAT32_GFX942 = {
    64: _tiles((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    128: _tiles((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    256: _tiles((16, 16, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def head_block(D: int) -> int:
    """Columns of a tile that holds whole heads: matrix units multiply 16 at a time."""
    return max(16, next_power_of_2(D))


def attention(D: int, dtype: torch.dtype, arch: str) -> AttentionTiles:
    """arch: sm_80 and so on, or gfx942. Compute capabilities 8.x and 12.x share a table that fits the least of them,
    99 KB of shared memory; 10.x another; AMD's the third."""
    if arch.startswith("sm_10"):
        arch = "sm_100"
    elif arch not in _ATTENTION_16_BIT:
        arch = "sm_80"
    block = max(64, head_block(D))
    if dtype == torch.float32:
        return (_ATTENTION_FLOAT32_GFX942 if arch == "gfx942" else _ATTENTION_FLOAT32)[block]
    return _ATTENTION_16_BIT[arch][block]


def attention_backward_is_fused(D: int, dtype: torch.dtype, arch: str) -> bool:
    """Whether adding up q's gradient by atomics beats computing the probabilities twice. Split, until it is timed."""
    return False
