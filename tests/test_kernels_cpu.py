"""kernels/cpu.py: packed linear layers compute what plain ones do, or are not used."""

import pytest
import torch

from kernels import cpu
from tests.test_sample import all_tokens, make_model

needs_packing = pytest.mark.skipif(not cpu.packing_works(torch.float32),
                                   reason="this PyTorch or CPU packs no weights: packed decoding stays unchecked")


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_and_the_head_are_packed(tied):
    model = make_model(tie_embeddings=tied)
    assert cpu.pack_for_decoding(model) == "weights: packed by oneDNN"
    assert sum(isinstance(m, cpu.PackedLinear) for m in model.modules()) == 2 * 4 + 1  # 4 per block and the head


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_packed_layer_computes_the_linear_map(rows):
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((301, 77), (301,), (2, rows, 77)))
    expected = x.double() @ weight.double().T
    for layer_bias in (bias, None):
        packed = cpu.PackedLinear(weight, layer_bias, torch.float32)(x)
        whole = expected if layer_bias is None else expected + bias
        torch.testing.assert_close(packed.double(), whole, atol=1e-4, rtol=1e-5)  # float32: 77 products of about 1


@needs_packing
def test_packing_that_computes_something_else_is_not_used(monkeypatch):
    forward = cpu.PackedLinear.forward
    monkeypatch.setattr(cpu.PackedLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    model = make_model()
    assert cpu.pack_for_decoding(model) == "weights: as they are (this PyTorch or CPU does not pack torch.float32)"
    assert not any(isinstance(m, cpu.PackedLinear) for m in model.modules())


def test_a_packing_operator_that_fails_is_not_used(monkeypatch):
    def fail(self, x):
        raise RuntimeError("unsupported")
    monkeypatch.setattr(cpu.PackedLinear, "forward", fail)
    assert not cpu.packing_works(torch.float32)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_gives_the_same_logits_packed_and_plain(weights):
    model = make_model().to(weights)
    model.compute_dtype = torch.bfloat16
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        plain = model(tokens)
        cpu.pack_for_decoding(model)
        torch.testing.assert_close(model(tokens), plain, atol=0.05, rtol=0.0)  # bf16: 8 bits of values up to 2
    assert len(all_tokens(model, [[1, 2], [3]], max_new_tokens=40)[1]) == 40
    assert plain.abs().max() > 1
