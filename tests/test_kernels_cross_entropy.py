"""The fused linear cross-entropy against float64: losses and gradients, on the GPU or through Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

import kernels
from kernels import chunked_loss, reference

pytest.importorskip("triton", reason="no triton: the fused cross-entropy is unchecked")

from kernels import cross_entropy  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error (Frobenius) of the gradients that rounding explains: logits are rounded to the dtype, and so are their
# gradients; both sums are float32. float32: sums of up to 1,000 products.
GRADIENT_CAP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Of the loss: float32 statistics; logits of size 1 rounded to 11 or 8 bits, errors of either sign averaging out
LOSS_CAP = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}


def make_inputs(N: int, C: int, V: int, vocab_size: int, dtype: torch.dtype, device: torch.device, *,
                ignored: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, C, generator=generator).to(dtype)
    weight = torch.randn(V, C, generator=generator) / C ** 0.5  # float32, as the model's; logits of size 1
    targets = torch.randint(vocab_size, (N,), generator=generator)
    targets[list(ignored)] = -100
    targets[0] = vocab_size - 1 if 0 not in ignored else -100  # the last real column, beside the padding
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, softcap: float,
               reduction: str) -> Tensor:
    """The definition, on all logits at once."""
    logits = hidden @ weight[:vocab_size].T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / ((targets != -100).sum() if reduction == "mean" else 1)


def loss_and_gradients(op, hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> list[Tensor]:
    loss = op(hidden, weight, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, [hidden, weight])]  # a factor behind it, as train.py's


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


SIZES = {  # N, C, V, vocab_size
    "one row of bytes": (1, 7, 257, 257),
    "65 characters": (63, 16, 65, 65),
    "padded, two tiles": (5, 16, 4224, 4100),
    "GPT-2": (6, 8, 50304, 50257),
}


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_as_exact_as_pytorch(size, dtype, options, kernel_device):
    N, C, V, vocab_size = SIZES[size]
    inputs = make_inputs(N, C, V, vocab_size, dtype, kernel_device, ignored=(1, 4) if N > 4 else ())
    options = {"softcap": 0.0, "vocab_size": vocab_size, "reduction": "sum"} | options
    doubles = [t.detach().double().requires_grad_() for t in inputs[:2]]
    exact = loss_and_gradients(plain_loss, *doubles, inputs[2], **options)
    ours = loss_and_gradients(cross_entropy.linear_cross_entropy, *inputs, **options, chunk_rows=4)
    theirs = loss_and_gradients(reference.linear_cross_entropy, *inputs, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype and ours[2].dtype == torch.float32
    errors, their_errors = ([relative_error(a, b) for a, b in zip(side, exact, strict=True)] for side in (ours, theirs))
    assert errors[0] <= LOSS_CAP[dtype]
    assert max(errors[1:]) <= GRADIENT_CAP[dtype]
    for name, error, theirs in zip(("loss", "grad_hidden", "grad_weight"), errors, their_errors, strict=True):
        # float32: sums of 50,304 products, in whatever order each matmul library takes them
        assert error <= 2 * theirs + (5e-6 if dtype == torch.float32 else LOSS_CAP[dtype]), name


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 64])  # 11 rows: a short last chunk, an exact one, one for all
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_and_reductions(reduction, chunk_rows, kernel_device):
    hidden, weight, targets = make_inputs(11, 6, 33, 31, torch.float32, kernel_device, ignored=(0, 4, 5, 6, 7, 10))
    ours = cross_entropy.linear_cross_entropy(hidden, weight, targets, vocab_size=31, softcap=0.0,
                                              reduction=reduction, chunk_rows=chunk_rows)
    exact = plain_loss(hidden.detach().double(), weight.detach().double(), targets, vocab_size=31, softcap=0.0,
                       reduction=reduction)
    assert ours.requires_grad == (reduction != "none")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_each_gradient_can_be_had_alone(wanted, kernel_device, triton_backends):
    """A frozen table (LoRA's) gets none, and the gradient of the rows is the same."""
    hidden, weight, targets = make_inputs(11, 6, 40, 37, torch.float32, kernel_device)
    _, *both = loss_and_gradients(kernels.linear_cross_entropy, hidden, weight, targets, vocab_size=37)
    alone = {"hidden": hidden.detach(), "weight": weight.detach()}
    alone[wanted].requires_grad_()
    loss = kernels.linear_cross_entropy(alone["hidden"], alone["weight"], targets, vocab_size=37)
    gradient, = torch.autograd.grad(loss * 0.3, alone[wanted])
    assert torch.equal(gradient, dict(zip(("hidden", "weight"), both, strict=True))[wanted])


def test_padding_columns_change_no_bit(kernel_device, triton_backends):
    hidden, weight, targets = make_inputs(5, 6, 300, 290, torch.bfloat16, kernel_device)
    results = []
    for filler in (0.0, 1e4, float("nan")):
        with torch.no_grad():
            weight[290:] = filler
        logits = hidden.detach() @ weight.detach().to(hidden.dtype).T
        losses = hidden.new_empty(5, dtype=torch.float32)
        cross_entropy._loss_and_gradient(logits, targets, losses, 290, 5.0, wants_grad=True)
        assert logits[:, 290:].count_nonzero() == 0
        results.append((losses, logits))
    for losses, gradients in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(gradients, results[0][1])


def test_a_chunk_of_ignored_rows_costs_nothing_even_where_logits_are_nan(kernel_device):
    logits = torch.full((3, 40), float("nan"), device=kernel_device)
    losses = torch.full((3,), 7.0, device=kernel_device)
    cross_entropy._loss_and_gradient(logits, torch.full((3,), -100, device=kernel_device), losses, 40, 0.0,
                                     wants_grad=True)
    assert losses.tolist() == [0.0] * 3 and logits.count_nonzero() == 0


def test_large_logits_neither_overflow_nor_lose_the_loss(kernel_device):
    hidden = torch.full((3, 1), 100.0, device=kernel_device)
    weight = torch.tensor([[10.0], [-10.0], [9.99]], device=kernel_device)  # logits 1000, -1000, 999
    losses = cross_entropy.linear_cross_entropy(
        hidden, weight, torch.tensor([0, 1, 2], device=kernel_device), vocab_size=3, softcap=0.0,
        reduction="none")
    exact = F.cross_entropy((hidden.double() @ weight.double().T), torch.tensor([0, 1, 2], device=kernel_device),
                            reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-4)  # logits near 1000 are known to 6e-5


def test_a_logit_that_is_nan_shows_in_the_loss(kernel_device):
    hidden, weight, targets = make_inputs(3, 6, 40, 40, torch.float32, kernel_device)
    with torch.no_grad():
        hidden[1, 2] = float("nan")
    losses = cross_entropy.linear_cross_entropy(hidden, weight, targets, vocab_size=40, softcap=0.0,
                                                reduction="none")
    assert losses.isnan().tolist() == [False, True, False]


def test_the_same_bits_each_time(kernel_device):
    inputs = make_inputs(11, 16, 300, 290, torch.bfloat16, kernel_device)
    first, second = (loss_and_gradients(cross_entropy.linear_cross_entropy, *inputs, vocab_size=290, softcap=0.0,
                                        reduction="sum", chunk_rows=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- As an operator of PyTorch ---------------------------------------------------------------------------------------

def test_linear_cross_entropy_passes_opcheck(kernel_device):
    hidden, weight, targets = make_inputs(5, 6, 40, 37, torch.float32, kernel_device)
    args = targets, 37, 3.0, 2
    utils = "test_schema", "test_autograd_registration", "test_faketensor"
    # test_aot_dispatch_dynamic asks for gradients of every output; the two that are gradients themselves have none
    library.opcheck(cross_entropy.summed_loss, (hidden, weight, *args, True), test_utils=utils)
    library.opcheck(cross_entropy.summed_loss, (hidden, weight.detach(), *args, False), test_utils=utils)
    library.opcheck(cross_entropy.token_losses, (hidden.detach(), weight.detach(), *args))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_linear_cross_entropy_works_whole_under_torch_compile(backend, kernel_device):
    inputs = make_inputs(5, 6, 40, 37, torch.float32, kernel_device, ignored=(3,))
    def f(hidden, weight, targets):
        return cross_entropy.linear_cross_entropy(hidden * 2, weight, targets, vocab_size=37, softcap=0.0,
                                                  reduction="mean", chunk_rows=2)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for ours, eager in zip(loss_and_gradients(compiled, *inputs), loss_and_gradients(f, *inputs), strict=True):
        torch.testing.assert_close(ours, eager)


def test_strided_rows_and_targets(kernel_device, triton_backends):
    hidden, weight, targets = make_inputs(10, 6, 40, 40, torch.float32, kernel_device)
    ours = kernels.linear_cross_entropy(hidden[::2], weight, targets[::2], vocab_size=40)
    theirs = F.cross_entropy(hidden[::2] @ weight.T, targets[::2])
    torch.testing.assert_close(ours, theirs)


# ---- At real sizes ---------------------------------------------------------------------------------------------------

@pytest.mark.gpu
def test_gpt2_sizes_on_the_gpu(triton_gpu):
    """Losses and gradients of 16k rows against float64 of 2,048 at a time; at most a chunk of logits beside them."""
    inputs = make_inputs(16_384, 768, 50_304, 50_257, torch.bfloat16, triton_gpu, ignored=(3, 8191, 8192))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = loss_and_gradients(cross_entropy.linear_cross_entropy, *inputs, vocab_size=50_257, softcap=0.0,
                              reduction="sum")
    peak = torch.cuda.max_memory_allocated() - before
    chunk = 8192 * 50_304 * 2
    gradients = inputs[0].numel() * 2 + 2 * inputs[1].numel() * 4  # of hidden; of weight, and again in backward
    assert peak < chunk + gradients + inputs[1].numel() * 2 + 64 * 2 ** 20  # and the weight in bfloat16
    doubles = [t.detach().double().requires_grad_() for t in inputs[:2]]
    exact = loss_and_gradients(chunked_loss.linear_cross_entropy, *doubles, inputs[2], vocab_size=50_257, softcap=0.0,
                               reduction="sum", chunk_rows=2048)
    assert relative_error(ours[0], exact[0]) <= LOSS_CAP[torch.bfloat16]
    assert max(relative_error(a, b) for a, b in zip(ours[1:], exact[1:], strict=True)) <= GRADIENT_CAP[torch.bfloat16]


@pytest.mark.gpu
def test_logits_beyond_31_bits(triton_gpu):
    """65,536 rows in one chunk: 3.3e9 logits."""
    hidden, weight, targets = make_inputs(65_536, 64, 50_304, 50_257, torch.bfloat16, triton_gpu)
    options = {"vocab_size": 50_257, "softcap": 0.0, "reduction": "none"}
    with torch.no_grad():
        one = cross_entropy.linear_cross_entropy(hidden, weight, targets, chunk_rows=65_536, **options)
        many = cross_entropy.linear_cross_entropy(hidden, weight, targets, chunk_rows=8192, **options)
    # cuBLAS may sum in another order and round a logit the other way, 2^-8 of 8; a wrapped offset is off by 1 nearly
    # everywhere
    torch.testing.assert_close(one, many, rtol=0, atol=0.05)
