"""The public operations: which backend computes them, who is trusted, and what holds for every backend."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cli
import kernels
from config import ConfigError, MachineError, ModelConfig
from kernels import self_check
from model import GPT
from tests.test_train import losses, run, settings  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
CHECKOUT = Path(__file__).resolve().parents[1]
GPT2 = ModelConfig(n_layer=1, n_head=2, n_embd=60, max_seq_len=16, vocab_size=65)
QWEN = ModelConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=16, vocab_size=1100, norm="rmsnorm",
                   position="rope", mlp="swiglu", bias=False, qk_norm=True, logit_softcap=15.0)


def verdicts(model: ModelConfig = QWEN, *, setting: str = "auto", dtype: torch.dtype = torch.float32,
             device: torch.device = CPU) -> self_check.Verdicts:
    return self_check.verdicts(setting, model, table_rows=1152 if model is QWEN else 65, dtype=dtype, device=device)


def test_an_unknown_reduction_is_refused_by_name():
    with pytest.raises(ValueError, match="'avg' should be mean, sum or none"):
        kernels.linear_cross_entropy(torch.zeros(2, 6), torch.zeros(16, 6), torch.tensor([1, 2]), vocab_size=16,
                                     reduction="avg")


# ---- Who computes what -----------------------------------------------------------------------------------------------

def test_where_neither_triton_nor_a_cpu_is_pytorch_computes_all_that_the_model_uses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    mps = torch.device("mps")
    verdict = {"triton": kernels.why_no_triton(mps)}
    used = "attention", "linear_cross_entropy", "linear"
    assert verdicts(GPT2, device=mps) == dict.fromkeys((*used, "layer_norm"), verdict)
    assert verdicts(QWEN, device=mps) == dict.fromkeys((*used, "rms_norm"), verdict)


def test_the_torch_setting_is_obeyed(kernel_device):
    assert all(found == {"triton": "asked for"} for found in verdicts(setting="torch", device=kernel_device).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [GPT2, QWEN], ids=["GPT-2", "Qwen3"])
def test_every_kernel_passes_its_check(model, dtype, kernel_device):
    found = verdicts(model, dtype=dtype, device=kernel_device)
    assert found.pop("linear") == {"triton": "PyTorch's own is as fast"}
    assert all(of == {"triton": None} for of in found.values())


def test_the_chosen_backend_computes_and_pytorch_takes_what_a_kernel_does_not(triton_backends, kernel_device):
    from kernels import norm, reference
    x = torch.randn(3, 8, device=kernel_device)
    assert kernels._of("rms_norm", x) is norm
    assert kernels._of("rms_norm", x.double()) is reference
    kernels.choose_backends({"linear_cross_entropy": "triton", "rms_norm": "torch"})
    assert kernels.backend("linear_cross_entropy") == "triton" and kernels.backend("rms_norm") == "torch"
    assert kernels._of("rms_norm", x) is reference


def test_training_with_a_mask_does_not_take_cudnn(monkeypatch):
    from kernels import reference
    enabled, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **options: (
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled()), sdpa(*args, **options))[1])
    x, first_key = torch.randn(1, 5, 2, 8, requires_grad=True), torch.zeros(1, 5, dtype=torch.int32)
    for options in ({"first_key": first_key}, {}):
        reference.attention(x, x, x, **options)
    reference.attention(x[:, :2], x, x)
    assert enabled == [False, True, False]


# ---- A broken kernel -------------------------------------------------------------------------------------------------

class Broken:
    """A kernel that, after its launch, spoils one of its arguments by 1 %."""

    def __init__(self, kernel, argument: int):
        self.kernel, self.argument = kernel, argument

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.kernel[grid](*args, **constants)
            args[self.argument].mul_(1.01)
        return launch


@pytest.fixture
def broken_norm(kernel_device, monkeypatch):
    """RMSNorm's backward kernel gives an input gradient that is 1 % too large."""
    from kernels import norm
    monkeypatch.setattr(norm, "_backward_kernel", Broken(norm._backward_kernel, norm._backward_kernel.arg_names.index(
        "GRAD_X")))


def test_a_wrong_gradient_is_found_named_and_measured(broken_norm, kernel_device):
    found = verdicts(QWEN, device=kernel_device)
    assert found["rms_norm"]["triton"].startswith("relative error 0.01 of gradient 0, allowed 2")
    assert found["linear_cross_entropy"] == {"triton": None}


def test_a_kernel_that_does_not_compile_is_named_with_the_reason(kernel_device, monkeypatch):
    from kernels import cross_entropy
    def fail(*args, **options):
        raise RuntimeError("PassManager::run failed\nand 200 lines of MLIR")
    monkeypatch.setattr(cross_entropy, "_by_chunk", fail)
    assert verdicts(device=kernel_device)["linear_cross_entropy"] == {
        "triton": "RuntimeError: PassManager::run failed"}


@pytest.mark.parametrize("is_sticky", [True, False])
def test_a_cuda_error_that_stays_ends_the_process_one_that_passes_only_the_kernel(is_sticky, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: misaligned address\nCompile with TORCH_USE_CUDA_DSA")
    monkeypatch.setattr(kernels, "module_of", fail)
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", fail if is_sticky else lambda device: None)
    if is_sticky:
        with pytest.raises(MachineError, match=r"attention by triton broke .* \(CUDA error: misaligned address\); "
                                               "start again with train.kernels=torch"):
            verdicts(device=torch.device("cuda"))
    else:
        assert verdicts(device=torch.device("cuda"))["attention"] == {
            "triton": "RuntimeError: CUDA error: misaligned address"}


def test_a_size_that_a_kernel_does_not_take_is_pytorch_s(kernel_device):
    found = verdicts(replace(GPT2, head_dim=300), device=kernel_device)
    assert found["attention"] == {"triton": "not made for the model's size or dtype"}
    assert found["layer_norm"] == {"triton": None}


def test_what_fails_on_one_rank_is_left_to_pytorch_on_all():
    right, wrong = ({"linear": {"cpu": reason}, "rms_norm": {"cpu": None}} for reason in (None, "it is off"))
    choice = {"linear": "torch", "rms_norm": "cpu"}
    assert self_check.agree("auto", [right, wrong]) == (
        choice, "kernels: torch (rank 1: it is off) for linear; cpu for rms_norm")
    assert {op: kernels.backend(op) for op in choice} == choice
    assert self_check.agree("auto", [wrong, wrong]) == (
        choice, "kernels: torch (it is off) for linear; cpu for rms_norm")


def test_a_run_goes_on_without_the_broken_kernel_and_says_so(broken_norm, kernel_device, settings):  # noqa: F811
    more = ["train.max_steps=2", "model.norm=rmsnorm", f"train.device={kernel_device.type}"]
    log = (run(settings, "fallen_back", *more) / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "kernels:" in line)
    assert "torch (relative error 0.01 of gradient 0, allowed 2" in line and "for rms_norm" in line
    assert "triton for " in line and "linear_cross_entropy" in line
    assert kernels.backend("rms_norm") == "torch" and kernels.backend("linear_cross_entropy") == "triton"


def test_triton_is_refused_with_a_broken_kernel_and_nothing_is_written(broken_norm, kernel_device,
                                                                       settings):  # noqa: F811
    more = ["train.kernels=triton", "model.norm=rmsnorm", f"train.device={kernel_device.type}"]
    with pytest.raises(ConfigError, match="train.kernels = 'triton' but .*rms_norm: relative error 0.01"):
        run(settings, "refused", *more)
    assert not Path("refused").exists()


def test_triton_is_refused_where_it_cannot_run_before_any_work(settings, monkeypatch):  # noqa: F811
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="train.kernels = 'triton' but (no CUDA device|triton is not installed); "):
        run(settings, "refused", "train.kernels=triton")
    assert sorted(path.name for path in Path().iterdir()) == ["small.toml", "text.txt"]


BROKEN_ON_RANK_1 = """
import os, sys, torch
sys.path.insert(0, {checkout!r})
sys.path.insert(0, {checkout!r} + "/tests")
import conftest, distributed, kernels
from config import ModelConfig
from kernels import norm, reference, self_check

world = distributed.read_world()
model = ModelConfig(n_layer=1, n_head=2, n_embd=60, max_seq_len=16, vocab_size=65)
if world.rank == 1:
    norm.layer_norm = lambda x, weight, bias, *, eps: 1.01 * reference.layer_norm(x, weight, bias, eps=eps)
os.environ["TRITON_INTERPRET"] = "1"
with distributed.process_group(world, torch.device("cpu"), 60.0):
    mine = self_check.verdicts("auto", model, table_rows=65, dtype=torch.float32, device=torch.device("cpu"))
    _, line = self_check.agree("auto", distributed.gather(mine, world))
    backends = f"rank {{world.rank}}: {{kernels.backend('layer_norm')}} {{kernels.backend('linear_cross_entropy')}}"
    sys.stdout.write(f"{{backends}} {{line}}\\n")  # in one piece: the other rank writes there too
"""


@pytest.mark.skipif(torch.cuda.is_available(),
                    reason="needs the interpreter: that ranks agree on a kernel that fails on one is unchecked here")
def test_ranks_agree_on_the_backend_that_works_on_all(tmp_path, kernel_device):
    script = tmp_path / "script.py"
    script.write_text(BROKEN_ON_RANK_1.format(checkout=str(CHECKOUT)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: torch triton kernels: " in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("torch (rank 1: relative error ") == 2


# ---- Training on either backend --------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_triton_trains_to_the_losses_of_torch(norm, kernel_device, settings):  # noqa: F811
    more = ["train.max_steps=4", "train.eval_tokens=64", f"model.norm={norm}", f"train.device={kernel_device.type}"]
    by_triton = run(settings, "triton", *more)
    assert kernels.backend("linear_cross_entropy") == "triton"
    by_torch = run(settings, "torch", *more, "train.kernels=torch")
    assert kernels.backend("linear_cross_entropy") == "torch"
    for ours, theirs in zip(losses(by_triton), losses(by_torch), strict=True):
        # float32, sums in another order, amplified by three steps of AdamW at 1e-2
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)


def test_kernels_are_named_for_the_operations_of_the_model_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = self_check.choose("torch", GPT2, table_rows=GPT2.vocab_size, dtype=torch.float32, device=CPU)
    assert line == "kernels: torch (asked for) for attention, linear_cross_entropy, linear, layer_norm"


@pytest.mark.gpu
def test_fifty_steps_on_the_gpu_give_the_same_loss_curve(triton_gpu, settings):  # noqa: F811
    """bfloat16: each backend rounds elsewhere; over 50 steps of a small model that stays within 0.01 nats a token."""
    more = ["train.max_steps=50", "train.device=cuda", "train.dtype=bfloat16", "model.n_embd=256", "model.n_head=4",
            "model.max_seq_len=128", "train.tokens_per_step=2048", "optim.lr=1e-3", "optim.decay_steps=50",
            "train.eval_tokens=4096"]
    curves = [[row[1] for row in losses(run(settings, backend, *more, f"train.kernels={backend}"))]
              for backend in ("triton", "torch")]
    assert all(abs(a - b) < 0.01 for a, b in zip(*curves, strict=True))


# ---- Packed documents ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("model", [GPT2, QWEN], ids=["GPT-2", "Qwen3"])
def test_what_changes_in_one_document_changes_no_bit_of_another(model, backend, kernel_device, triton_backends):
    """Neither its logits nor the gradients that its input embeddings get from the loss of the whole row."""
    if backend != "triton":
        kernels.choose_backends(dict.fromkeys([*kernels.TRITON, "linear"], backend) | {"layer_norm": "torch"})
    torch.manual_seed(0)
    gpt = GPT(replace(model, max_seq_len=70)).to(kernel_device)
    tokens = torch.randint(model.vocab_size, (2, 70)).to(kernel_device)
    documents = torch.tensor([[0] * 20 + [1] * 50, [0] * 45 + [1] * 25]).to(kernel_device)
    changed = torch.where(documents == 0, (tokens + 1) % model.vocab_size, tokens)
    results = []
    for text in (tokens, changed):
        embedded = []
        handle = gpt.dropout.register_forward_hook(lambda module, args, output: embedded.append(output))  # noqa: B023
        logits = gpt(text, document_ids=documents)
        gradient, = torch.autograd.grad(gpt(text, text, document_ids=documents, reduction="sum"), embedded[1])
        handle.remove()
        results.append((logits, gradient))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[documents == 1], after[documents == 1])
        assert not torch.isclose(before[documents == 0], after[documents == 0]).all(-1).any()


@pytest.mark.parametrize("of_norm, mixed", [("torch", True), ("triton", False)])
def test_sums_over_rows_and_columns_are_not_mixed_where_only_qk_norm_is_the_compiler_s(monkeypatch, of_norm, mixed):
    triton = torch._inductor.config.triton
    if not cli.is_installed("triton") or not hasattr(triton, "mix_order_reduction"):
        pytest.skip("no triton, or an Inductor that does not mix sums: how QK-norm is compiled is unchecked")
    monkeypatch.setattr(triton, "mix_order_reduction", not mixed)
    self_check.agree("auto", [{"attention": {"triton": None}, "rms_norm": {of_norm: None}}])
    assert triton.mix_order_reduction is mixed
