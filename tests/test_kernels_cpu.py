"""What is faster on a CPU: when it is chosen, what it leaves to PyTorch, and packed weights. That it computes what is
defined: tests/test_kernels_reference.py and tests/test_kernels_chunked_loss.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from config import ModelConfig
from kernels import cpu, reference, self_check
from kernels.cpu import PackedLinear, pack_for_decoding, packing_works
from model import GPT
from tests.test_kernels_reference import F32, needs_onednn, randn
from tests.test_train import run, settings  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
OPS = ("attention", "layer_norm", "rms_norm", "linear", "linear_cross_entropy")
MODERN = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=16, vocab_size=1100, norm="rmsnorm",
                     position="rope", mlp="swiglu", bias=False, qk_norm=True, logit_softcap=15.0)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def choose(setting: str = "auto", dtype: torch.dtype = torch.float32, model: ModelConfig = MODERN) -> str:
    return self_check.choose(setting, model, table_rows=1152, dtype=dtype, device=CPU)


# ---- The choice ------------------------------------------------------------------------------------------------------

@needs_onednn
def test_a_process_starts_with_pytorch_and_chooses_what_is_faster_and_right():
    assert {kernels.backend(op) for op in OPS} == {"torch"}
    assert choose() == "kernels: cpu for attention, linear_cross_entropy, linear, rms_norm"
    assert [op for op in OPS if kernels.backend(op) == "cpu"] == ["attention", "rms_norm", "linear",
                                                                        "linear_cross_entropy"]
    assert choose(dtype=torch.bfloat16) == ("kernels: cpu for attention, linear_cross_entropy, rms_norm; "
                                            "torch (PyTorch's own is as fast) for linear")
    assert choose(model=ModelConfig(n_layer=1, n_head=2, n_embd=60, vocab_size=1100)) == (
        "kernels: cpu for attention, linear_cross_entropy, linear; torch (PyTorch's own is as fast) for layer_norm")


def test_the_torch_setting_turns_it_off():
    assert choose("torch") == "kernels: torch (asked for) for attention, linear_cross_entropy, linear, rms_norm"
    assert {kernels.backend(op) for op in OPS} == {"torch"}


def test_a_dtype_that_nothing_was_made_for_is_pytorch_s():
    assert choose(dtype=torch.float64).startswith("kernels: torch (no kernels for torch.float64) for attention, ")


@needs_onednn
def test_a_model_computes_the_same_by_either_backend():
    torch.manual_seed(0)
    model = GPT(MODERN)
    tokens = torch.randint(1100, (2, 16))
    losses = []
    for setting in ("torch", "auto"):
        choose(setting)
        losses.append([model(tokens, tokens, reduction="sum"), model(tokens)])
    torch.testing.assert_close(*losses, **F32)


def test_short_rows_of_attention_take_matmuls_and_others_go_to_pytorch(monkeypatch):
    handed_on = []
    real = reference.attention
    monkeypatch.setattr(reference, "attention", lambda q, *a, **o: (handed_on.append(q.shape[1]), real(q, *a, **o))[1])
    for dtype, lengths in ((torch.float32, (1, 64, 65)), (torch.bfloat16, (1, 256, 257))):
        handed_on.clear()
        for T in lengths:
            q, k, v = (randn(1, T, 2, 4, seed=i, dtype=dtype) for i in range(3))
            cpu.attention(q, k, v)
        assert handed_on == [1, lengths[-1]]


@needs_onednn
def test_operations_work_whole_under_torch_compile():
    choose()
    x, weight, square = randn(3, 5, 6), randn(6, seed=1), randn(6, 6, seed=2)
    def f(x: torch.Tensor) -> torch.Tensor:
        y = kernels.linear(kernels.rms_norm(x, weight, eps=1e-5), square, None)[:, :, None]
        return kernels.attention(y, y, y)
    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x), **F32)


# ---- A broken operation ----------------------------------------------------------------------------------------------

@needs_onednn
def test_a_wrong_product_is_found_named_and_replaced(monkeypatch):
    onednn = cpu._onednn
    monkeypatch.setattr(cpu, "_onednn", lambda x, weight, bias=None: onednn(x, weight, bias) * 1.001)
    line = choose()
    assert line.startswith("kernels: cpu for attention, rms_norm; torch (relative error ")
    assert "torch (relative error 0.001 of the output, allowed 2e-05) for linear" in line
    assert [kernels.backend(op) for op in ("rms_norm", "linear", "linear_cross_entropy")] == ["cpu", "torch", "torch"]


def test_a_missing_operator_leaves_the_products_to_pytorch(monkeypatch):
    def missing(x, weight, bias=None):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
    monkeypatch.setattr(cpu, "_onednn", missing)
    assert choose().endswith("torch (AttributeError: '_OpNamespace' 'mkldnn' object has no attribute "
                             "'_linear_pointwise') for linear_cross_entropy, linear")
    assert not packing_works(torch.float32)


def test_a_run_goes_on_without_a_broken_operation_and_says_so(monkeypatch, settings):  # noqa: F811
    backward = cpu._RMSNorm.backward
    def wrong(ctx, grad):
        grad_x, *others = backward(ctx, grad)
        return grad_x * 1.01, *others
    monkeypatch.setattr(cpu._RMSNorm, "backward", staticmethod(wrong))
    folder = run(settings, "fallen_back", "train.max_steps=2", "model.norm=rmsnorm", "train.device=cpu")
    line = next(line for line in (folder / "log.txt").read_text().splitlines() if "kernels: " in line)
    assert "cpu for attention, " in line
    assert "torch (relative error 0.01 of gradient 0, allowed 2e-05) for rms_norm" in line


IMPORTS = "import sys, model; from kernels import self_check; print('triton' in sys.modules, 'sympy' in sys.modules)"


def test_choosing_on_a_cpu_imports_nothing_slow():
    code = IMPORTS.replace("print", """
self_check.choose("auto", model.ModelConfig(n_embd=64, n_head=2, vocab_size=99), table_rows=99,
                  dtype=model.torch.float32, device=model.torch.device("cpu"))
print""")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parents[1])
    assert done.stdout.split() == ["False", "False"]


# ---- Packed weights --------------------------------------------------------------------------------------------------

needs_packing = pytest.mark.skipif(not packing_works(torch.float32),
                                   reason="this PyTorch or CPU packs no weights: packed decoding stays unchecked")


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_and_the_head_are_packed(tied):
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=48, vocab_size=257, max_seq_len=32, tie_embeddings=tied))
    assert pack_for_decoding(model) == "weights: packed by oneDNN"
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 2 * 4 + 1  # 4 per block and the head


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_packed_layer_computes_the_linear_map(rows):
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((301, 77), (301,), (2, rows, 77)))
    expected = x.double() @ weight.double().T
    for layer_bias in (bias, None):
        packed = PackedLinear(weight, layer_bias, torch.float32)(x)
        whole = expected if layer_bias is None else expected + bias
        torch.testing.assert_close(packed.double(), whole, atol=1e-4, rtol=1e-5)  # float32: 77 products of about 1


@needs_packing
def test_packing_that_computes_something_else_is_not_used(monkeypatch):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    model = GPT(MODERN)
    assert pack_for_decoding(model) == "weights: as they are (this PyTorch or CPU does not pack torch.float32)"
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_a_packing_operator_that_fails_is_not_used(monkeypatch):
    def fail(self, x):
        raise RuntimeError("unsupported")
    monkeypatch.setattr(PackedLinear, "forward", fail)
    assert not packing_works(torch.float32)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_gives_the_same_logits_packed_and_plain(weights):
    torch.manual_seed(0)
    model = GPT(MODERN, compute_dtype=torch.bfloat16).to(weights).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(16)[None]
    with torch.inference_mode():
        plain = model(tokens)
        pack_for_decoding(model)
        # bfloat16: 8 bits, some tens of roundings in another order
        torch.testing.assert_close(model(tokens), plain, rtol=0, atol=0.025 * plain.abs().max().item())
    assert plain.abs().max() > 1
