"""What is faster on a CPU than PyTorch's own: linear layers whose weights oneDNN has laid out, for generating text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer for inputs of one dtype whose weight oneDNN has laid out. CPU, inference only, never saved.

    From 1 row to 256 it is as fast as F.linear or up to three times faster (docs/BENCHMARKS.md).
    """

    ROWS = 16  # the layout is chosen for this many; that of 1 is no faster on 1 row and half as fast on 2 or more

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        # Private operators of PyTorch: packing_works() tells whether they are there and compute what they should.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), self.ROWS)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_for_decoding(model: nn.Module) -> str:
    """Replace the linear layers of a GPT, head included, by packed ones where that works; says what was done and why.

    For a model that will only generate: afterwards it can neither train nor be saved. A tied head is held twice.
    """
    dtype = model.compute_dtype
    if model.wte.weight.device.type != "cpu":
        return "weights: as they are (packing is for the CPU)"
    if not packing_works(dtype):
        return f"weights: as they are (this PyTorch or CPU does not pack {dtype})"
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, dtype))
    if model.lm_head is None:
        model.lm_head = PackedLinear(model.wte.weight, None, dtype)
    return "weights: packed by oneDNN"


@torch.inference_mode()
def packing_works(dtype: torch.dtype) -> bool:
    """Whether PackedLinear computes what F.linear does, tried on a small layer."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (96,), (1, 3, 64)))
    try:
        packed = PackedLinear(weight, bias, dtype)(x)
    except RuntimeError:
        return False
    expected = F.linear(x.double(), weight.double(), bias.double())
    tolerance = 8 * torch.finfo(dtype).eps  # values up to about 30, sums of 64 products kept in float32
    return torch.allclose(packed.double(), expected, rtol=tolerance, atol=64 * tolerance)
