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


# ---- Norms: a tile holds whole rows ----------------------------------------------------------------------------------

MAX_NORM_WIDTH = 8192  # beyond, the backward's sums for the weight do not fit in registers beside a row
NORM_BLOCKS = tuple(2 ** n for n in range(4, 14))  # the columns of a tile: the width rounded up to a power of 2
NORM_BACKWARD_PROGRAMS_PER_SM = 4  # each writes one row of partial sums for the weight: few rows, all SMs busy


def norm(width: int, *, backward: bool) -> Tile:
    """Forward 32 elements a thread: four 16-byte loads of bfloat16 in flight. Backward half of that: x, dy and the sums
    for the weight and the bias stay in registers over all tiles. 128 threads; wide rows take more."""
    columns = max(NORM_BLOCKS[0], next_power_of_2(width))
    per_thread = 16 if backward else 32
    return Tile(rows=max(1, 128 * per_thread // columns), columns=columns, threads=max(128, columns // per_thread))


# ---- Cross-entropy: a program walks one row of logits in steps of `columns` ------------------------------------------

CROSS_ENTROPY_CHUNK_ROWS = 8192  # fewer lose: each chunk reads and writes the float32 gradient of the weight once


def cross_entropy(vocab_size: int) -> Tile:
    """16 elements a thread. Few programs an SM, so that rows read in the first sweep are still in L2 in the second:
    3 on each of 132 SMs hold 40 MB of GPT-2's rows in bfloat16."""
    columns = min(4096, max(256, next_power_of_2(vocab_size)))
    return Tile(rows=1, columns=columns, threads=columns // 16)


# ---- Attention -------------------------------------------------------------------------------------------------------

MAX_HEAD_DIM = 256
MAX_FUSED_HEAD_DIM = 128  # a tile that makes all three gradients of wider heads does not fit
LAST_QUERY_BLOCK = 1024  # queries that the search for a key tile's last one reads at a time


class AttentionTile(NamedTuple):
    """queries x keys scores at a time, by warps x 32 threads, with the loads of `stages` tiles in flight. A backward
    with mask_all masks the tiles that all their queries see, too: the branch around the mask saves a fifth of such a
    tile's instructions on sm_90, and makes registers spill elsewhere."""

    queries: int
    keys: int
    warps: int
    stages: int
    mask_all: bool = True


class AttentionTiles(NamedTuple):
    """Of each kernel. fused: of the backward that makes all three gradients; None where it does not fit."""

    forward: AttentionTile
    backward_q: AttentionTile
    backward_kv: AttentionTile
    fused: AttentionTile | None = None


# By GPU and columns of a tile, which holds whole heads. Chosen by the ahead-of-time gate, not by time: the largest that
# keep registers from spilling and wgmma from waiting for each other, on Triton 3.6 and 3.7. No GPU has timed them yet.
_ATTENTION = {
    "sm_90": {64: ((128, 64, 8, 3), (128, 64, 8, 3, False), (64, 128, 8, 2, False), (64, 128, 8, 2, False)),
              128: ((128, 128, 8, 2), (64, 64, 4, 2, False), (64, 64, 8, 2), (64, 64, 8, 2)),
              256: ((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2))},
    "sm_100": {64: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
               128: ((128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
               256: ((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2))},
    "sm_80": {64: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
              128: ((128, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
              256: ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2))},
    "sm_89": {64: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
              128: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
              256: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2))},
    "gfx942": {64: ((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
               128: ((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
               256: ((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1))},
    # float32 is multiplied without tensor cores, operands in registers: small tiles, many threads
    "float32": {64: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
                128: ((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
                256: ((16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2))},
    "gfx942 float32": {64: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
                       128: ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
                       256: ((16, 16, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1))},
}


def head_block(D: int) -> int:
    """Columns of a tile that holds whole heads: matrix units multiply 16 at a time."""
    return max(16, next_power_of_2(D))


def attention(D: int, dtype: torch.dtype, arch: str) -> AttentionTiles:
    """arch: sm_80 and so on, or gfx942. Compute capabilities 10.x and 11.x share a table; 8.6, 8.9 and 12.x, with 99 KB
    of shared memory, another."""
    row = arch if arch in _ATTENTION else "sm_100" if arch.startswith(("sm_10", "sm_11")) else "sm_89"
    if dtype == torch.float32:
        row = "gfx942 float32" if arch == "gfx942" else "float32"
    return AttentionTiles(*(AttentionTile(*tile) for tile in _ATTENTION[row][max(64, head_block(D))]))
