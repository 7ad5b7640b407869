"""The micro-batch that fits, found on a stand-in for a GPU's memory."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import plan
import train
from config import Config, MachineError, ModelConfig, OptimConfig, TrainConfig
from data.loader import TrainLoader
from distributed import World
from model import GPT
from optim import LossScale, Optimizer
from tests.test_data_loader import make_loader, make_stream, same
from tests.test_train import assert_same_bits, losses, run, settings, tensors  # noqa: F401 (a fixture)

T, SHARE = 15, 32  # test_data_loader's T
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class OfSize(torch.nn.Module):
    """A model that holds so many sequences, and remembers what it was asked for."""

    def __init__(self, holds: int, error: Exception = OUT_OF_MEMORY):
        super().__init__()
        self.weight, self.holds, self.asked, self.error = torch.nn.Parameter(torch.ones(3)), holds, [], error

    def forward(self, tokens, targets, *, document_ids, reduction):
        assert targets.shape == tokens.shape == (len(tokens), T) and reduction == "sum"
        self.asked.append(len(tokens))
        if len(tokens) > self.holds:
            raise self.error
        return self.weight.sum()


class CudaLoader:
    """A loader that calls its device CUDA; the tensors lie on the CPU."""

    device, windows_per_step = torch.device("cuda"), SHARE

    def __init__(self, loader: TrainLoader):
        self.loader, self.micro_batch = loader, 1

    def batch(self, step: int) -> list:
        self.loader.micro_batch = self.micro_batch
        return self.loader.batch(step)


@pytest.fixture
def loader(tmp_path, monkeypatch) -> CudaLoader:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    stream = make_stream(tmp_path, np.arange(100 * T) % 50)
    return CudaLoader(make_loader(stream, windows_per_step=SHARE))


def config(micro_batch: int | str = "auto") -> Config:
    return Config(model=ModelConfig(max_seq_len=T), train=TrainConfig(micro_batch=micro_batch))


def choose(loader, model: OfSize, compiled: OfSize | None = None, *, ranks: int = 1) -> tuple[int, str]:
    return plan.choose_micro_batch(config(), None, model, compiled or model, loader, World(size=ranks))


@pytest.mark.parametrize("eager, compiled, chosen, why", [
    (32, 40, 32, "auto: all of a step"), (8, None, 8, "auto: 16 would not fit"), (10, None, 8, "auto: 16 would not fit"),
    (1, None, 1, "auto: 2 would not fit"), (10, 20, 16, "auto: 32 would not fit"), (10, 12, 8, "auto: 16 would not fit"),
    (20, 40, 32, "auto: all of a step"), (5, 3, 2, "auto: 4 would not fit"), (2, 1, 1, "auto: 2 would not fit")])
def test_the_share_of_a_step_is_halved_until_it_fits(loader, eager, compiled, chosen, why):
    model = OfSize(eager)
    compiled_model = None if compiled is None else OfSize(compiled)
    assert choose(loader, model, compiled_model) == (chosen, why)
    assert model.asked[-2:] == 2 * [model.asked[-1]] and model.asked[-1] <= eager  # twice: beside gradients
    assert model.weight.grad is None
    if compiled is not None:  # compiling takes minutes: at most two sizes that are too large
        assert compiled_model.asked[-2:] == [chosen, chosen] and len(compiled_model.asked) <= 4


def test_micro_batches_are_of_equal_size(tmp_path, loader):
    loader.windows_per_step = loader.loader.windows_per_step = 30
    loader.loader._share = slice(0, 30)
    assert choose(loader, OfSize(9))[0] == 8  # 30 in 4: 8, 8, 8, 6
    assert choose(loader, OfSize(30))[0] == 30


def test_no_micro_batch_is_larger_than_helps(loader, monkeypatch):
    monkeypatch.setattr(plan, "TRIED_TOKENS", 10 * T)
    assert choose(loader, model := OfSize(99)) == (8, "auto: more than 150 tokens are no faster")
    assert model.asked == [8, 8]


def test_all_ranks_take_the_smallest(loader, monkeypatch):
    """What the others found comes by gather, after every rank is through its trials."""
    of_others = {"found": None}
    monkeypatch.setattr(plan.distributed, "gather", lambda value, world:
                        [None, None] if value is None else [value, of_others["found"] or value])
    of_others["found"] = 8
    assert choose(loader, OfSize(32), ranks=2) == (2, "auto: 4 would not fit on rank 1")
    of_others["found"] = 1
    assert choose(loader, OfSize(4), ranks=2) == (4, "auto: 8 would not fit on rank 0")


def test_a_model_that_does_not_fit_at_all_ends_with_the_way_out(loader):
    with pytest.raises(MachineError, match="not one sequence fits.*train.activation_checkpointing=true"):
        choose(loader, OfSize(0))


def test_an_error_that_is_none_of_memory_is_not_taken_for_one(loader):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose(loader, OfSize(0, RuntimeError("CUDA error: an illegal memory access was encountered")))


@pytest.mark.parametrize("error, answer", [
    (OUT_OF_MEMORY, True), (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory."), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_errors_of_memory_are_known_by_type_or_words(error, answer):
    assert plan.is_out_of_memory(error) == answer


def test_a_number_and_what_a_run_began_with_are_not_tried(loader):
    arguments = OfSize(0), OfSize(0), loader, World()
    assert plan.choose_micro_batch(config(64), None, *arguments) == (64, "asked for")
    assert plan.choose_micro_batch(config(64), 5, *arguments) == (64, "asked for")
    assert plan.choose_micro_batch(config(), 5, *arguments) == (5, "auto: as the run began")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: how often a run compiles is unchecked")
@pytest.mark.parametrize("documents", [False, True])
def test_a_trial_leaves_the_model_and_the_batches_as_they_were_and_its_graph_is_the_runs(tmp_path, documents):
    stream = make_stream(tmp_path, np.arange(100 * T) % 50)
    loader = make_loader(stream, windows_per_step=8, eot=7 if documents else None)
    before, graphs = loader.batch(0), []
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=T, vocab_size=50))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    compiled = torch.compile(model, dynamic=False, backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert plan._fits(compiled, 4, loader, 100)
    assert all(p.grad is None for p in model.parameters())
    assert_same_bits(weights, dict(model.named_parameters()))
    loader.micro_batch = 3
    assert same(before, loader.batch(0))
    loader.micro_batch = 4
    result = train.train_step(compiled, Optimizer(model, OptimConfig(decay_steps=9)), loader.batch(1), lr=1e-3,
                              tokens_per_step=8 * T, grad_clip=1.0, scale=LossScale(), step=1)
    assert math.isfinite(result.loss) and len(graphs) == 1


# ---- In a run, on the CPU --------------------------------------------------------------------------------------------

def test_a_run_with_auto_has_the_bits_of_one_with_its_number_and_keeps_it(settings, monkeypatch):  # noqa: F811
    """Also when it goes on on a machine that would choose another."""
    words = [*settings, "model.dropout=0.1"]
    monkeypatch.setattr(plan, "UNTRIED_TOKENS", 3 * 16)
    unbroken = run(words, "unbroken", "train.micro_batch=3")
    run(words, "auto", "train.micro_batch=auto", "train.max_steps=5")
    monkeypatch.setattr(plan, "UNTRIED_TOKENS", 8 * 16)
    auto = run(words, "auto", "train.micro_batch=auto")
    assert losses(auto) == losses(unbroken)
    assert_same_bits(tensors(auto, 12), tensors(unbroken, 12))
    log = (auto / "log.txt").read_text()
    assert "micro-batches of up to 3 x 16 (auto: up to 48 tokens, untried)" in log
    assert "micro-batches of up to 3 x 16 (auto: as the run began)" in log
    assert json.loads((auto / "checkpoints/step_00000012/state.json").read_text())["micro_batch"] == 3
    assert 'micro_batch = "auto"' in (auto / "config.toml").read_text()
