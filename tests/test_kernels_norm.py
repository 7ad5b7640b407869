"""The fused norms against float64: forward and every gradient, on the GPU or through Triton's interpreter."""

import pytest
import torch
from torch import Tensor, library

import kernels
from kernels import reference

pytest.importorskip("triton", reason="no triton: the fused norms are unchecked")

from kernels import configs, norm  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error (Frobenius) that rounding explains: of the results to 24, 11 or 8 bits, and of what they are made from
CAP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SHAPES = [(1, 1, 768), (63, 65), (3, 5, 60), (7, 1000), (2, 1600), (130, 16), (5, 9)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, rms: bool,
                residual: bool) -> dict[str, Tensor]:
    """Rows around 1, not 0: a mean that is lost shows. Weights stay float32, as the model's do."""
    generator = torch.Generator().manual_seed(sum(shape))
    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)
    inputs = {"x": (randn(*shape) + 1.0).to(dtype), "weight": randn(shape[-1]) + 1.0}
    if not rms:
        inputs["bias"] = randn(shape[-1])
    if residual:
        inputs["residual"] = randn(*shape).to(dtype)
    return {name: t.to(device).requires_grad_() for name, t in inputs.items()}


def call(module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The outputs of the norm that inputs belong to, as a tuple."""
    if "bias" in inputs:
        out = module.layer_norm(**inputs, eps=1e-5)
    else:
        out = module.rms_norm(**inputs, eps=1e-5)
    return out if isinstance(out, tuple) else (out,)


def outputs_and_gradients(module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = call(module, inputs)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    results = dict(zip(("y", "sum"), outputs, strict=False))
    return results | {f"grad_{name}": g for name, g in zip(inputs, gradients, strict=True)}


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def assert_as_exact_as_pytorch(inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """At most twice the error of PyTorch's same computation in the same dtype, and below the cap in any case."""
    exact = outputs_and_gradients(reference, {n: t.detach().double().requires_grad_() for n, t in inputs.items()})
    ours, theirs = outputs_and_gradients(norm, inputs), outputs_and_gradients(reference, inputs)
    for name, value in exact.items():
        source = inputs.get(name.removeprefix("grad_"), inputs["x"])
        assert ours[name].dtype == source.dtype and ours[name].shape == source.shape
        error = relative_error(ours[name], value)
        assert error <= 2 * relative_error(theirs[name], value) + 1e-6, name
        assert error <= CAP[dtype], name


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_are_as_exact_as_pytorch(shape, dtype, rms, residual, kernel_device):
    assert_as_exact_as_pytorch(make_inputs(shape, dtype, kernel_device, rms=rms, residual=residual), dtype)


@pytest.mark.parametrize("width", [4100, 8192])
def test_very_wide_rows(width, kernel_device):
    assert width <= configs.MAX_NORM_WIDTH
    assert_as_exact_as_pytorch(make_inputs((3, width), torch.float32, kernel_device, rms=False, residual=True),
                               torch.float32)


def test_a_norm_without_bias_is_one_with_a_zero_bias(kernel_device):
    inputs = make_inputs((5, 60), torch.float32, kernel_device, rms=False, residual=False)
    zero = torch.zeros_like(inputs["bias"])
    ours = norm.layer_norm(inputs["x"], inputs["weight"], None, eps=1e-5)
    theirs = norm.layer_norm(inputs["x"], inputs["weight"], zero, eps=1e-5)
    assert torch.equal(ours, theirs)
    for gradients in zip(*[torch.autograd.grad(y.sum(), [inputs["x"], inputs["weight"]]) for y in (ours, theirs)],
                         strict=True):
        assert torch.equal(*gradients)


def test_norms_read_views_and_expanded_gradients(kernel_device):
    """The q part of a packed projection (a copy), rows of a wider matrix (a view), a gradient with strides 0."""
    packed = torch.randn(2, 5, 9, 16, device=kernel_device, requires_grad=True)
    weight = torch.randn(16, device=kernel_device)
    for view in (packed[:, :, 2:6], packed[:, :, 3], packed.transpose(0, 2), packed[0, 0]):
        ours, theirs = norm.rms_norm(view, weight, eps=1e-5), reference.rms_norm(view, weight, eps=1e-5)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*[torch.autograd.grad(y.sum(), packed)[0] for y in (ours, theirs)])


def test_backward_gives_the_same_bits_each_time(kernel_device):
    inputs = make_inputs((63, 60), torch.bfloat16, kernel_device, rms=False, residual=True)
    first, second = outputs_and_gradients(norm, inputs), outputs_and_gradients(norm, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_either_output_may_go_unused(kernel_device):
    inputs = make_inputs((5, 60), torch.float32, kernel_device, rms=True, residual=True)
    for used in (0, 1):
        ours, theirs = (torch.autograd.grad(call(module, inputs)[used].square().sum(),
                                            [inputs["x"], inputs["residual"]]) for module in (norm, reference))
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their)


def test_with_a_residual_the_norm_is_that_of_the_rounded_sum(kernel_device):
    inputs = make_inputs((5, 60), torch.bfloat16, kernel_device, rms=True, residual=True)
    y, added = call(norm, inputs)
    assert torch.equal(added, inputs["x"] + inputs["residual"])
    assert torch.equal(y, norm.rms_norm(added, inputs["weight"], eps=1e-5))


def test_memory_beside_the_rows_is_not_read(kernel_device):
    """Rows inside a larger matrix of NaN, 60 columns of a tile of 64, 5 rows of a tile of 64."""
    outer = torch.full((9, 80), float("nan"), device=kernel_device)
    outer[2:7, 8:68] = torch.randn(5, 60, device=kernel_device)
    weight = torch.randn(60, device=kernel_device, requires_grad=True)
    x = outer[2:7, 8:68].detach().requires_grad_()
    y = norm.rms_norm(x, weight, eps=1e-5)
    assert torch.equal(y, norm.rms_norm(x.detach().clone(), weight, eps=1e-5))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, weight]))


def test_what_the_kernels_do_not_take_goes_to_pytorch(kernel_device):
    for shape, dtype, taken in (((3, configs.MAX_NORM_WIDTH), torch.float32, True), ((0, 8), torch.float32, False),
                                ((3, configs.MAX_NORM_WIDTH + 1), torch.float32, False),
                                ((3, 8), torch.float64, False)):
        assert norm.supports(torch.zeros(shape, dtype=dtype, device=kernel_device)) is taken
    packed = torch.zeros(2, 5, 6, 16, device=kernel_device)
    assert norm.supports(packed) and norm.supports(packed[:, :, 0])  # rows of one stride
    assert not norm.supports(packed[:, :, :4])  # heads of a packed projection: they would be copied


# ---- As an operator of PyTorch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_norms_pass_opcheck(rms, residual, kernel_device):
    inputs = make_inputs((3, 5, 60), torch.float32, kernel_device, rms=rms, residual=residual)
    args = inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual"), 1e-5, rms
    library.opcheck(norm.norm_forward, args)
    _, added, mean, rstd = norm.norm_forward(*args)
    grad, grad_added = torch.randn(2, 3, 5, 60, device=kernel_device)
    library.opcheck(norm.norm_backward, (
        grad, grad_added if residual else None, added.detach() if residual else inputs["x"].detach(),
        inputs["weight"].detach(), mean.detach(), rstd.detach(), not rms, rms))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_norms_work_whole_under_torch_compile(backend, kernel_device, triton_backends):
    def f(x, weight, bias, residual):
        y, added = kernels.layer_norm(x, weight, bias, eps=1e-5, residual=residual)
        return kernels.rms_norm(added * 2, weight, eps=1e-5) + y
    inputs = list(make_inputs((7, 60), torch.float32, kernel_device, rms=False, residual=True).values())
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for ours, eager in zip([compiled(*inputs), *torch.autograd.grad(compiled(*inputs).square().sum(), inputs)],
                           [f(*inputs), *torch.autograd.grad(f(*inputs).square().sum(), inputs)], strict=True):
        torch.testing.assert_close(ours, eager)


def test_norms_work_under_activation_checkpointing(kernel_device, triton_backends):
    from torch.utils.checkpoint import checkpoint
    inputs = make_inputs((7, 60), torch.bfloat16, kernel_device, rms=False, residual=False)
    def f(x, weight, bias):
        return kernels.layer_norm(x.square(), weight, bias, eps=1e-5)
    plain = f(*inputs.values())
    again = checkpoint(f, *inputs.values(), use_reentrant=False)
    gradients = [torch.autograd.grad(y.float().square().sum(), list(inputs.values())) for y in (plain, again)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


# ---- At real sizes ---------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("width", [64, 768, 1600, 4096])
def test_norms_at_training_sizes(width, rms, triton_gpu):
    assert_as_exact_as_pytorch(make_inputs((16_384, width), torch.bfloat16, triton_gpu, rms=rms, residual=True),
                               torch.bfloat16)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(triton_gpu):
    """2.2e9 elements: the last rows are right only if offsets are 64 bits wide."""
    x = torch.zeros(2_200_000, 1024, dtype=torch.bfloat16, device=triton_gpu)
    x[-5:] = torch.randn(5, 1024, device=triton_gpu).bfloat16()
    weight = torch.randn(1024, device=triton_gpu)
    assert torch.equal(norm.rms_norm(x, weight, eps=1e-5)[-5:], norm.rms_norm(x[-5:].clone(), weight, eps=1e-5))
