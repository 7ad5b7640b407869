"""Counted memory against what PyTorch's allocator gave a real step on the CPU, and against arithmetic."""

import itertools
from dataclasses import replace

import pytest
import torch

import kernels
from config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from finetune import lora
from memory import LiveBytes, Memory, loss_chunk_bytes
from model import GPT
from optim import Optimizer

GPT2 = ModelConfig(n_layer=2, n_head=4, n_embd=128, vocab_size=8192, max_seq_len=128)
MODERN = replace(GPT2, n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, bias=False,
                 tie_embeddings=False)
OF_29M = replace(GPT2, n_layer=9, n_head=8, n_embd=512, vocab_size=2048)
SMALL = Config(model=replace(GPT2, max_seq_len=16, vocab_size=100))
MUON = OptimConfig(name="muon", decay_steps=9)


def allocated(config: Config, B: int, dtype: torch.dtype) -> int:
    """Most bytes at once, by the profiler's record of allocations, of a micro-batch after another and an update."""
    model = GPT(config.model, compute_dtype=dtype, activation_checkpointing=config.train.activation_checkpointing)
    if config.lora.rank:
        lora.add_adapters(model, config.lora)
    optimizer = Optimizer(model, config.optim, newton_schulz_dtype=dtype)
    tokens = torch.zeros((B, config.model.max_seq_len), dtype=torch.int64)
    document_ids = tokens.int() if config.data.document_mask else None
    model(tokens[:1], tokens[:1], reduction="sum").backward()
    held = [*model.parameters(), *model.buffers(), *optimizer.state_tensors().values()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    with torch.profiler.profile(profile_memory=True) as profiler:
        model(tokens, tokens, document_ids=document_ids, reduction="sum").backward()
        optimizer.step(1e-3)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return sum(tensor.nbytes for tensor in held) + max(itertools.accumulate(changes))


@pytest.mark.parametrize("config, dtype", [
    (Config(model=OF_29M), "bfloat16"), (Config(model=MODERN), "bfloat16"), (Config(model=MODERN), "float32"),
    (Config(model=replace(GPT2, window=32, dropout=0.1)), "bfloat16"),
    (Config(model=GPT2, data=DataConfig(document_mask=True)), "bfloat16"),
    (Config(model=GPT2, train=TrainConfig(activation_checkpointing=True)), "bfloat16"),
    (Config(model=replace(MODERN, logit_softcap=30.0), optim=MUON), "bfloat16"),
    (Config(model=GPT2, lora=LoraConfig(rank=8)), "bfloat16")],
    ids=["29m", "modern", "float32", "window", "documents", "checkpointing", "muon", "lora"])
def test_the_count_is_what_the_allocator_gave(config, dtype):
    """From two chunks of the loss on, or of a small table: else oneDNN's own float32 sums of the table's gradient,
    which no operator shows, would be the peak."""
    dtype, B = getattr(torch, dtype), 3 if config.model is OF_29M else 9  # 1,152 tokens, the chunks are of 1,024
    real, counted = allocated(config, B, dtype), Memory(config, dtype=dtype, kind="cpu")._count(B).peak
    assert counted == pytest.approx(real, rel=0.03 if dtype == torch.bfloat16 else 1e-3)  # float32 has no such sums


def test_weights_gradients_and_moments_are_four_bytes_a_parameter_each():
    """GPT-2's 124,439,808 and the 47 rows by which its table is padded; adapters: moments of what learns alone."""
    step = Memory(Config(model=ModelConfig(vocab_size=50257)), dtype=torch.bfloat16, kind="triton").at(1)
    n = 124_439_808 + 47 * 768
    assert (step.weights, step.gradients, step.moments) == (4 * n, 4 * n, 8 * n)
    adapters = 2 * 8 * sum((128 + 3 * 128, 128 + 128, 128 + 512, 512 + 128))  # layers, rank, C + M of each target
    step = Memory(Config(model=GPT2, lora=LoraConfig(rank=8)), dtype=torch.bfloat16, kind="triton").at(1)
    assert (step.gradients, step.moments) == (4 * adapters, 8 * adapters)


def test_a_block_of_gpt2_keeps_sixteen_widths_a_token_and_checkpointing_two():
    """Input, norm, q k v, attention, sum, norm, 4 C twice around the GELU, in bfloat16: 1+1+3+1+1+1+4+4 = 16;
    with checkpointing input and attention."""
    C = 128
    for knobs, widths in (({}, 16), ({"activation_checkpointing": True}, 2)):
        two, three = (Memory(Config(model=replace(GPT2, n_layer=n), train=TrainConfig(**knobs)), dtype=torch.bfloat16,
                             kind="triton").at(64).activations for n in (2, 3))
        assert (three - two) / (64 * 128) == pytest.approx(2 * widths * C, rel=0.05)  # statistics beside them


def test_the_line_between_and_beyond_counted_sizes_is_what_is_counted_there():
    """In between it may be above: at small B another operator than at large ones makes a phase's peak."""
    memory = Memory(Config(model=GPT2), dtype=torch.bfloat16, kind="triton")
    assert sorted(memory.counted) == [1, 64, 128]
    for B in (2, 63, 100, 200):
        line, counted = memory.at(B), memory._count(B)
        assert line.activations == pytest.approx(counted.activations, rel=1e-3)
        assert counted.peak * 0.999 <= line.peak <= counted.peak * (1.05 if B < 64 else 1.001)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_largest_micro_batch_fits_and_the_next_does_not(ranks):
    memory = Memory(SMALL, dtype=torch.bfloat16, kind="triton")
    for B in (1, 7, 600, 3000):
        limit = memory.at(B, ranks).peak
        assert memory.largest(limit, 5000, ranks) == B and memory.largest(limit - 1, 5000, ranks) == B - 1
    assert memory.largest(limit, 100, ranks) == 100


def test_ranks_that_share_a_copy_hold_a_part_of_it_and_gather_blocks():
    memory = Memory(replace(SMALL, model=replace(SMALL.model, n_layer=6)), dtype=torch.float32, kind="triton")
    one, four = memory.at(3), memory.at(3, 4)
    assert [4 * four.weights, 4 * four.gradients, 4 * four.moments] == pytest.approx(
        [one.weights, one.gradients, one.moments], abs=4)
    C = 128
    block, tables = 4 * (12 * C * C + 13 * C), 4 * (100 + 16 + 2) * C
    assert four.peaks["backward"] - one.peaks["backward"] == tables + 4 * block  # two of weights, two of gradients
    assert four.peaks["loss"] - one.peaks["loss"] == tables + 2 * block


def test_the_loss_holds_a_chunk_of_logits_and_the_table_in_its_dtype():
    memory = Memory(Config(model=GPT2), dtype=torch.bfloat16, kind="triton")
    chunk = loss_chunk_bytes(Config(model=GPT2), 128, memory.model, dtype=torch.bfloat16, kind="triton")
    assert chunk == 2 * (8192 * 8192 + 8192 * 128)
    step, N = memory.at(128), 128 * 128
    gradients = 2 * N * 128 + 4 * 8192 * 128  # of hidden, in bfloat16, and of the table
    assert step.peaks["loss"] - step.activations - chunk == pytest.approx(gradients, rel=0.05)


def test_counting_leaves_the_process_as_it_was():
    kernels.choose_backends({"linear": "cpu"})
    before = torch.get_rng_state()
    Memory(replace(SMALL, train=TrainConfig(activation_checkpointing=True)), dtype=torch.bfloat16, kind="torch")
    assert kernels.backend("linear") == "cpu" and kernels.backend("attention") == "torch"
    assert torch.equal(before, torch.get_rng_state())
    kernels.choose_backends({})


def test_storages_count_once_and_until_they_are_gone():
    x = torch.empty(100, device="meta")
    with LiveBytes([x]) as live:
        y = (x + 1).view(10, 10)[2:]
        assert (live.now, live.peaks["forward"]) == (800, 800)
        del y
        z = x * 2  # noqa: F841
        assert (live.now, live.peaks["forward"]) == (800, 800)
