"""The command's figures against arithmetic; the micro-batch that fits, found on a stand-in for a GPU's memory."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels
import plan
import train
from config import Config, MachineError, ModelConfig, OptimConfig, TrainConfig, UserError
from data.loader import TrainLoader
from distributed import World
from kernels import attention_backends, fastest, reference
from model import GPT
from optim import LossScale, Optimizer
from start import Progress
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
    (32, 40, 32, "auto: all of a step"), (8, None, 8, "auto: 16 would not fit"),
    (10, None, 8, "auto: 16 would not fit"), (1, None, 1, "auto: 2 would not fit"),
    (10, 20, 16, "auto: 32 would not fit"), (10, 12, 8, "auto: 16 would not fit"),
    (20, 40, 32, "auto: all of a step"), (5, 3, 2, "auto: 4 would not fit"), (2, 1, 1, "auto: 2 would not fit")])
def test_the_share_of_a_step_is_halved_until_it_fits(loader, eager, compiled, chosen, why):
    model = OfSize(eager)
    compiled_model = None if compiled is None else OfSize(compiled)
    assert choose(loader, model, compiled_model) == (chosen, why)
    assert model.asked[-2:] == 2 * [model.asked[-1]] and model.asked[-1] <= eager  # twice: beside gradients
    assert model.weight.grad is None
    if compiled is not None:  # compiling takes minutes: at most two sizes that are too large
        assert compiled_model.asked[-2:] == [chosen, chosen] and len(compiled_model.asked) <= 4


@pytest.mark.parametrize("counted, holds, asked, chosen", [
    (8, 8, [16, 8, 8], 8), (8, 15, [16, 8, 8], 8), (8, 16, [16, 16], 16), (11, 31, [16, 16], 16),
    (32, 32, [32, 32], 32), (32, 5, [32, 16, 8, 4, 4], 4), (0, 1, [2, 1, 1], 1), (1, 2, [2, 2], 2)])
def test_the_trial_begins_at_twice_what_is_counted_and_decides(loader, monkeypatch, counted, holds, asked, chosen):
    """And only the compiled model runs."""
    monkeypatch.setattr(plan, "_counted_micro_batch", lambda *args: counted)
    model, compiled = OfSize(0), OfSize(holds)
    assert choose(loader, model, compiled)[0] == choose(loader, OfSize(holds))[0] == chosen
    assert (model.asked, compiled.asked) == ([], asked)


def test_a_count_that_fails_is_said_and_the_trial_works_without(loader, monkeypatch, capsys):
    def fails(*args):
        raise ZeroDivisionError("no such operator")
    monkeypatch.setattr(plan, "_counted_micro_batch", fails)
    assert choose(loader, eager := OfSize(10), OfSize(20)) == (16, "auto: 32 would not fit")
    assert eager.asked == [32, 16, 8, 8]
    assert "could not be counted and is found by trial (ZeroDivisionError: no such operator)" in capsys.readouterr().err


def test_the_counted_micro_batch_leaves_the_spare_bytes_of_what_is_free(monkeypatch):
    config = Config(model=ModelConfig(n_layer=1, n_head=2, n_embd=64, max_seq_len=T, vocab_size=50))
    model, device = GPT(config.model), torch.device("cuda")
    need = plan.Memory(config, dtype=torch.float32, kind="torch").at(21).peak
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (need - 10_000 + 500, 0))
    assert plan._counted_micro_batch(config, model, device, 99, 500) == 21
    assert plan._counted_micro_batch(config, model, device, 99, 501) == 20
    assert plan._counted_micro_batch(config, model, device, 16, 500) == 16


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


# ---- The command -----------------------------------------------------------------------------------------------------

TINY = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2", "model.max_seq_len=64", "train.tokens_per_step=4096"]


def figures(capsys, *words: str) -> dict:
    plan.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_gpt2s_figures_are_arithmetic(capsys):
    f = figures(capsys, "configs/gpt2_124m.toml", "--gpu", "h100", "--gpus", "8", "--mfu", "0.5")
    n, tokens = 124_439_808, 19_073 * 524_288
    assert f["parameters"] == n and f["tokens"] == tokens and f["tokens_per_parameter"] == tokens / n
    flops = 6 * (12 * 12 * 768 ** 2 + 50257 * 768) + 6 * 12 * 2 * 768 * 1025 / 2  # matrices; half of attention
    assert f["flops_per_token"] == flops
    assert f["tokens_per_second"] == pytest.approx(0.5 * 8 * 989.4e12 / flops)
    assert f["hours"] == pytest.approx(tokens * flops / (0.5 * 8 * 989.4e12) / 3600)
    assert f["gpu_hours"] == 8 * f["hours"] and not f["mfu_is_assumed"]
    rows = 4 * (n + 47 * 768)  # the table is padded
    assert f["checkpoint_bytes"] == 3 * rows and f["checkpoints_bytes"] == 3 * f["checkpoint_bytes"]
    assert f["adamw_ms_per_step"] == pytest.approx(28 * (n + 47 * 768) / 3350e9 * 1e3)
    assert (f["shard"], f["micro_batch"], f["micro_batches_per_step"], f["fits"]) == (1, 64, 1, True)
    assert [row["shard"] for row in f["shards"]] == [1, 2, 4, 8]


def test_the_parts_add_up_and_the_table_is_the_json(capsys):
    words = [*TINY, "--gpus", "2", "--gpu", "a100-40gb"]
    f = figures(capsys, *words)
    parts = [f[f"{part}_bytes"] for part in ("weights", "gradients", "moments", "gathered", "activations", "loss_chunk",
                                             "temporaries", "context", "nccl")]
    assert sum(parts) == f["peak_bytes"] and min(parts) >= 0
    plan.main(words)
    table = capsys.readouterr().out
    assert table == plan.table(f) + "\n" and max(map(len, table.splitlines())) <= 120
    for words in (f"{f['parameters']:,} parameters", "2 x a100-40gb: 37.25 GiB", f"{f['weights_bytes'] / 2 ** 30:.2f}"):
        assert words in table


SEVEN_B = """model.n_layer=32 model.n_embd=4096 model.n_head=32 model.vocab_size=32000 model.max_seq_len=4096
model.mlp_hidden=11008 model.norm=rmsnorm model.position=rope model.mlp=swiglu model.bias=false model.qk_norm=false
model.tie_embeddings=false train.tokens_per_step=4194304 train.activation_checkpointing=true optim.name=adamw
train.micro_batch=auto""".split()


def test_where_ddp_does_not_fit_the_least_shard_that_does_is_named(capsys):
    """A 7B model's weights, gradients and moments are 100 GiB: not on one 80 GB card."""
    f = figures(capsys, *SEVEN_B, "--gpus", "8")
    assert f["parameters"] == 6_738_415_616  # as published of Llama 7B
    assert f["shards"][0]["largest_micro_batch"] == 0 and f["shard"] == 2 and f["fits"]
    assert f["micro_batch"] == 4 <= f["shards"][1]["largest_micro_batch"] < 8  # of a share of 128
    assert f["mfu"] == pytest.approx(0.3) and f["mfu_is_assumed"] and f["gpu_is_assumed"]
    text = plan.table(f)
    assert max(map(len, text.splitlines())) <= 120
    assert "does not fit" in text and text.splitlines()[-1].startswith("fits: train.shard=2 train.micro_batch=")
    assert 0 < f["gathered_bytes"] and f["weights_bytes"] == math.ceil((4 * 6_738_415_616 + 2 * 4096 * 128 * 4) / 2)
    nowhere = figures(capsys, *SEVEN_B, "--gpu", "3090")
    assert not nowhere["fits"] and "does not fit: try" in plan.table(nowhere)


def test_an_unknown_figure_is_null(capsys):
    f = figures(capsys, *TINY, "--gpu", "b300")
    assert f["gpu_bytes"] is f["shards"][0]["largest_micro_batch"] is None and f["hours"] > 0
    assert "is not known" in plan.table(f)
    f = figures(capsys, *TINY, "--gpu", "t4", "train.dtype=bfloat16")
    assert f["hours"] is None and "unknown: no peak in bfloat16" in plan.table(f)
    assert figures(capsys, *TINY, "--gpu", "t4")["dtype"] == "float16"


@pytest.mark.parametrize("tokenizer, size", [
    ("gpt2", 50257), ("bytes", 257), ("bpe:1000", 1000), ("cl100k_base", 100277), ("o200k_base", 200019)])
def test_the_tokenizers_name_tells_the_vocabulary(tokenizer, size):
    config = Config(data=plan.replace(Config().data, tokenizer=tokenizer))
    assert plan.resolved(config, set(), 1).model.vocab_size == size


@pytest.mark.parametrize("words, error", [
    (["--gpu", "h101"], "choose from"), (["--gpus", "0"], "at least 1"), (["--mfu", "1.5"], "above 0, at most 1"),
    (["model.n_layr=2"], "did you mean 'n_layer'"), (["nothere.toml"], "does not exist"),
    (["--gpus", "3", *TINY], "does not divide"), (["data.dir=nowhere", "data.tokenizer=None"], "model.vocab_size=N"),
    (["data.tokenizer=nowhere/tokenizer.json"], "model.vocab_size=N"), (["train.init_from=nowhere"], "does not exist")])
def test_mistakes_are_one_line(words, error):
    with pytest.raises(UserError, match=error) as raised:
        plan.main(words)
    assert "\n" not in str(raised.value)


def test_the_command_ends_with_status_2_after_a_mistake_and_overrides_may_have_dashes():
    def command(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "plan.py", *words], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=plan.DEMO.parents[1])
    done = command("--gpu", "h101")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = command(*TINY[:2], "--gpu", "4090", "--model.n_head=2", *TINY[3:])
    assert done.returncode == 0 and "1 x 4090" in done.stdout and done.stderr == ""


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


def test_a_micro_batch_is_tried_again_with_the_kernels_that_won(loader, monkeypatch):
    """They take twice the memory here."""
    class ByKernels(OfSize):
        def forward(self, *tensors, **options):
            self.holds = 8 if kernels.backend("attention") == "SDPA flash" else 16
            return super().forward(*tensors, **options)

    monkeypatch.setattr(fastest, "measure", lambda contenders, model, **options: (
        {"attention": {"cpu": 2.0, "SDPA flash": 1.0}}, 0.1))
    progress, model = Progress(), ByKernels(16)
    checked = plan.Checked([{"attention": {"cpu": None, "SDPA flash": None}}], {}, False, False)
    settle = partial(plan.settle, config(), checked=checked, model=model, compiled=model, loader=loader, world=World())
    assert settle(progress=progress)[0] == "auto: 16 would not fit"
    assert (progress.micro_batch, progress.kernels) == (8, {"attention": "SDPA flash"})
    model.asked.clear()
    assert settle(progress=progress)[0] == "auto: as the run began" and model.asked == []


def test_a_run_takes_the_fastest_kernel_and_keeps_it(settings, monkeypatch):  # noqa: F811
    """By a clock that says so, among those that pass their check; a resumed run asks no clock."""
    clock = {"cpu": 2.0, "SDPA flash": 1.0}
    monkeypatch.setattr(fastest, "rivals", lambda *arguments, **options: {"attention": ("SDPA flash",)})
    monkeypatch.setattr(fastest, "measure", lambda contenders, model, **options: (
        {"attention": {name: clock[name] for name in contenders["attention"]}}, 0.3))
    unbroken = run(settings, "unbroken")
    for name in ("stopped", "moved"):
        run(settings, name, "train.max_steps=5")
    state = json.loads((unbroken / "checkpoints/step_00000012/state.json").read_text())
    assert state["kernels"]["attention"] == "SDPA flash" == kernels.backend("attention")
    monkeypatch.setattr(fastest, "measure", None)
    stopped = run(settings, "stopped")
    assert losses(stopped) == losses(unbroken)
    assert_same_bits(tensors(stopped, 12), tensors(unbroken, 12))
    log = (stopped / "log.txt").read_text()
    assert "SDPA flash (1 ms, cpu 2) for attention" in log and "as in the checkpoint" in log

    # On a machine where that kernel is wrong another is chosen, and the log says what that means.
    monkeypatch.setattr(attention_backends, "backend_of", lambda name: SimpleNamespace(
        supports=lambda q: True, attention=lambda q, k, v, first_key=None: 1.01 * reference.attention(q, k, v)))
    log = (run(settings, "moved") / "log.txt").read_text()
    assert "not SDPA flash: relative error" in log
    assert "not as in the checkpoint, bits may differ: attention was by SDPA flash" in log
