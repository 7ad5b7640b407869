"""A thousand ranks in one process: a group that only pretends, and a tiny model whose rows are real."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from data.loader import TrainLoader, permuted
from tests.test_data_loader import T, make_stream
from tests.test_train_processes import CHECKOUT

RANKS = 1024
A_RANK = """
import json, sys, torch
sys.path.insert(0, {checkout!r})
import checkpoint, distributed
from config import ModelConfig, OptimConfig
from distributed import World
from model import GPT
from optim import Optimizer, gradient_norm
from torch.testing._internal.distributed.fake_pg import FakeStore

rank, parts, ranks = map(int, sys.argv[1:])
torch.distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
world = World(rank, rank % 8, ranks, 8)
with torch.device("meta"):
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=32, vocab_size=1100, bias=False,
                            norm="rmsnorm", position="rope", mlp="swiglu", tie_embeddings=False))
shapes = {{name: list(p.shape) for name, p in model.named_parameters()}}
distributed.shard(model, parts, torch.device("cpu"), world)
for name, value in model.initial_weights():
    checkpoint.fill({{name: model.get_parameter(name)}}, {{name: value}})
optimizer = Optimizer(model, OptimConfig(name="muon", decay_steps=9), newton_schulz_dtype=torch.float32, world=world)
tokens = torch.zeros(1, 32, dtype=torch.int64)
model(tokens, tokens, reduction="sum").backward()
finite = bool(gradient_norm([p.grad for p in optimizer.parameters]).isfinite())
optimizer.step(1e-3)
held = {{name: len(distributed.local(p)) for name, p in model.named_parameters()}}
print(json.dumps({{"finite": finite, "held": held, "shapes": shapes}}))
"""


@pytest.mark.parametrize("rank, parts", [(37, 64), (0, 1024), (RANKS - 1, 1024)])
def test_a_rank_of_a_thousand_holds_its_share_and_makes_a_step(rank, parts):
    """Rows are dealt as by torch.chunk: where a thousand share 64 rows, most hold none."""
    done = subprocess.run([sys.executable, "-c", A_RANK.format(checkout=str(CHECKOUT)), str(rank), str(parts),
                           str(RANKS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["finite"]
    for name, (rows, *_) in found["shapes"].items():
        chunks = torch.arange(rows).chunk(parts)
        assert found["held"][name] == (len(chunks[rank % parts]) if rank % parts < len(chunks) else 0), name
    assert max(found["held"].values()) == {37: 18, 0: 2, RANKS - 1: 0}[rank]  # of the tables' 1,152 rows


def test_the_shares_of_a_thousand_ranks_are_the_whole_batch(tmp_path):
    stream = make_stream(tmp_path, np.arange(3000 * T + 7) % 1000)
    loaders = [TrainLoader(stream, seq_len=T, tokens_per_step=2 * RANKS * T, seed=5, rank=rank, world_size=RANKS,
                           micro_batch=2) for rank in range(0, RANKS, 31)]
    alone = TrainLoader(stream, seq_len=T, tokens_per_step=2 * RANKS * T, seed=5, micro_batch=2 * RANKS)
    whole = alone.batch(3)[0]
    for rank, loader in zip(range(0, RANKS, 31), loaders, strict=True):
        assert torch.equal(loader.batch(3)[0].tokens, whole.tokens[2 * rank:2 * rank + 2])


def test_a_step_is_found_at_once_in_ten_trillion_tokens():
    """Nothing is as long as the data: a batch of 16M tokens costs some 8,192 numbers wherever it is."""
    windows, batch = 10 ** 13 // 2048, 8192
    for step in (0, 10 ** 5, windows // batch - 1):
        places = np.arange(step * batch, (step + 1) * batch)
        found = permuted(places, windows, key=11)
        assert len(np.unique(found)) == batch and 0 <= found.min() and found.max() < windows
