"""The loss in chunks, by PyTorch's products and by cpu.py's, against float64: losses, gradients, memory."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import chunked_loss, cpu
from tests.test_kernels_reference import (
    BF16,
    F32,
    assert_loss_equals_formula,
    make_targets,
    needs_onednn,
    plain_cross_entropy,
    randn,
)

ROOT = Path(__file__).resolve().parents[1]
both = pytest.mark.parametrize("module", [chunked_loss, pytest.param(cpu, marks=needs_onednn)], ids=["torch", "cpu"])


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    defaults = {"vocab_size": weight.shape[0], "softcap": 0.0, "reduction": "mean"}
    return chunked_loss.linear_cross_entropy(hidden, weight, targets, **defaults | options)


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 64, None])  # 11 rows: a short last chunk, an exact one, one for all
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("vocab_size", [16, 13])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@both
def test_the_loss_equals_its_formula(module, reduction, vocab_size, softcap, chunk_rows):
    targets = make_targets(11, 13, ignored=(0, 4, 5, 6, 7, 10))  # with chunks of 4 one chunk is ignored as a whole
    assert_loss_equals_formula(partial(module.linear_cross_entropy, chunk_rows=chunk_rows), randn(11, 6),
                               randn(16, 6, seed=1), targets, tolerance=F32, vocab_size=vocab_size, softcap=softcap,
                               reduction=reduction)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@both
def test_the_loss_of_bfloat16_rows_stays_within_their_rounding(module, softcap):
    assert_loss_equals_formula(partial(module.linear_cross_entropy, chunk_rows=8), randn(37, 6, dtype=torch.bfloat16),
                               randn(16, 6, seed=1), make_targets(37, 13, ignored=(3, 8)), tolerance=BF16,
                               vocab_size=13, softcap=softcap, reduction="mean")


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, 1 / 192), (torch.float16, 65536.0)])
def test_a_factor_behind_the_loss_is_not_rounded_to_the_dtype_of_the_rows(dtype, factor):
    """1/192 in bfloat16 is off by 0.2%, and with it every element alike; 65,536 in float16 is infinite."""
    hidden, weight = randn(37, 6, scale=0.1, dtype=dtype), randn(16, 6, seed=1, scale=0.1)
    targets = make_targets(37, 16)
    loss = loss_of(hidden, weight, targets, reduction="sum")
    whole, = torch.autograd.grad(loss, hidden, retain_graph=True)
    scaled, = torch.autograd.grad(loss * factor, hidden)
    share = (scaled.double() * whole.double()).sum() / whole.double().square().sum() / factor
    assert share.item() == pytest.approx(1.0, abs=2 ** -11)  # 222 roundings of either sign, 2^-9 each


def test_gradients_can_be_asked_for_again_while_the_graph_is_kept():
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), make_targets(5, 16)
    once = torch.autograd.grad(loss_of(hidden, weight, targets) * 3.0, (hidden, weight))
    loss = loss_of(hidden, weight, targets) * 3.0
    for retain_graph in (True, True, False):
        again = torch.autograd.grad(loss, (hidden, weight), retain_graph=retain_graph)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_losses_of_single_rows_equal_the_formula_and_carry_no_gradient(chunk_rows, softcap):
    hidden, weight, targets = randn(11, 6), randn(16, 6, seed=1), make_targets(11, 13, ignored=(2, 10))
    options = {"vocab_size": 13, "softcap": softcap, "reduction": "none"}
    ours = loss_of(hidden, weight, targets, chunk_rows=chunk_rows, **options)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert ours[[2, 10]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(ours.double(), plain_cross_entropy(hidden.double(), weight.double(), targets, **options)
                               .detach(), **F32)


def test_loss_without_gradients_equals_loss_with_them():
    hidden, weight, targets = randn(11, 6), randn(16, 6, seed=1), make_targets(11, 13, ignored=(3,))
    with_gradients = loss_of(hidden, weight, targets, vocab_size=13, softcap=3.0, chunk_rows=4)
    with torch.no_grad():
        without = loss_of(hidden, weight, targets, vocab_size=13, softcap=3.0, chunk_rows=4)
    assert with_gradients.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradients.detach(), **F32)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight = torch.full((3, 1), 100.0), torch.tensor([[10.0], [-10.0], [9.99]])  # logits 1000, -1000, 999
    losses = loss_of(hidden, weight, torch.tensor([0, 1, 2]), reduction="none")
    total = math.log1p(math.exp(-1.0))
    # float32: logits near 1000 are known to 6e-5, their differences too
    torch.testing.assert_close(losses, torch.tensor([total, 2000.0 + total, 1.0 + total]), rtol=1e-6, atol=2e-4)
    summed = loss_of(hidden.requires_grad_(), weight, torch.tensor([0, 1, 2]), reduction="sum")
    torch.testing.assert_close(summed.detach(), losses.sum(), rtol=1e-6, atol=0.0)
    assert torch.autograd.grad(summed, hidden)[0].isfinite().all()


def test_a_batch_of_ignored_rows_sums_to_zero_without_gradient():
    hidden, weight = randn(5, 6), randn(16, 6, seed=1)
    targets = torch.full((5,), -100)
    loss = loss_of(hidden, weight, targets, reduction="sum", chunk_rows=2)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.count_nonzero() == 0
    mean = loss_of(hidden, weight, targets)
    assert mean.isnan() and F.cross_entropy(hidden @ weight.T, targets).isnan()  # no rows, no mean: as PyTorch has it


def test_padding_rows_of_the_table_have_no_probability_and_no_gradient():
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), make_targets(5, 13)
    loss = loss_of(hidden, weight, targets, vocab_size=13)
    loss.backward()
    assert weight.grad[13:].count_nonzero() == 0 and weight.grad[:13].count_nonzero() > 0
    with torch.no_grad():
        weight[13:] = 1e4
    assert torch.equal(loss_of(hidden, weight, targets, vocab_size=13), loss)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_each_gradient_can_be_had_alone(wanted):
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), make_targets(5, 16)
    both = dict(zip(("hidden", "weight"), torch.autograd.grad(
        loss_of(hidden, weight, targets), (hidden, weight)), strict=True))
    alone = {"hidden": hidden.detach(), "weight": weight.detach()}
    alone[wanted].requires_grad_()
    loss_of(alone["hidden"], alone["weight"], targets).backward()
    assert torch.equal(alone[wanted].grad, both[wanted])


PEAK_MEMORY = """
import torch
import metrics
from kernels import chunked_loss

def growth_MiB(loss):
    # How far the highest resident memory of this process rises while loss and gradients are computed.
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(50304, 8, requires_grad=True)
    before = metrics.peak_memory_bytes("cpu")
    loss(hidden, weight, torch.randint(50257, (1024,))).backward()
    return (metrics.peak_memory_bytes("cpu") - before) / 2**20

def chunked(softcap):
    return lambda h, w, t: chunked_loss.linear_cross_entropy(
        h, w, t, vocab_size=50257, reduction="mean", softcap=softcap, chunk_rows=32)

def all_logits(h, w, t):
    return torch.nn.functional.cross_entropy(h @ w[:50257].T, t)

print(growth_MiB(chunked(15.0)), growth_MiB(chunked(0.0)), growth_MiB(all_logits))
"""


def test_only_a_chunk_of_the_logits_exists_at_a_time():
    """Measured as resident memory of a process; the last figure shows that the measure sees a whole set of logits."""
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    with_softcap_MiB, without_MiB, all_logits_MiB = map(float, done.stdout.split())
    all_MiB = 1024 * 50257 * 4 / 2 ** 20  # 196 MiB; a chunk is 1/32 of it, 6 MiB
    assert all_logits_MiB > all_MiB
    # a few chunks at once, gradients, what libraries load at the first call: less than one set of logits by far
    assert max(with_softcap_MiB, without_MiB) < 0.75 * all_MiB


@pytest.mark.parametrize("V", [2, 300, 50257, 200_000])
def test_a_chunk_on_the_cpu_holds_at_most_64_MiB_of_logits_and_many_rows(V):
    chunks = []
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        chunks.append(a.shape[0])
        return torch.zeros(a.shape[0], 1)
    N = 2 ** 23 // V + 70
    loss_of(torch.zeros(N, 1), torch.zeros(V, 1), torch.zeros(N, dtype=torch.long), matmul=matmul)
    rows = max(chunks)
    assert len(chunks) > 1 and rows >= 64 and (rows == 64 or rows * V * 4 <= 64 * 2 ** 20)


def test_a_frozen_table_costs_no_gradient_of_its_own():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(37, 12), torch.randn(50, 12), torch.randint(50, (37,))
    added, gradients = [], []
    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        added.append(total.shape)
    for learns in (True, False):
        h = hidden.clone().requires_grad_()
        loss_of(h, weight.clone().requires_grad_(learns), targets, add_product=add_product).backward()
        gradients.append(h.grad)
    assert torch.equal(*gradients) and added == [weight.shape]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@both
def test_the_loss_works_whole_under_torch_compile(module, backend):
    hidden, weight, targets = randn(37, 6), randn(16, 6, seed=1), make_targets(37, 13, ignored=(3,))
    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        return module.linear_cross_entropy(hidden * 2.0, weight, targets, vocab_size=13, softcap=3.0, reduction="sum",
                                           chunk_rows=8)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for op in (f, compiled):
        loss = op(hidden, weight)
        found = [loss, *torch.autograd.grad(loss, (hidden, weight))]
        if op is f:
            eager = found
    for ours, expected in zip(found, eager, strict=True):
        torch.testing.assert_close(ours, expected, **F32)
