"""The plain PyTorch kernels against float64 formulas written as plainly as possible: forward and every gradient."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
F32 = {"rtol": 1e-5, "atol": 1e-5}  # float32: 24 bits, sums of at most a few hundred values of size 1
BF16 = {"rtol": 2e-2, "atol": 2e-2}  # bfloat16: 8 bits, a few roundings (0.4% each) of values up to 3


def randn(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape))) * scale
    return x.to(dtype).requires_grad_()


def assert_equal_to_float64(op, formula, inputs: list[Tensor | None], *, tolerance: dict) -> None:
    """op(*inputs) and the gradients of a random weighting of it agree with formula's on float64 copies."""
    copies = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = op(*inputs), formula(*copies)
    given = [x for x in inputs if x is not None]
    assert ours.shape == theirs.shape and ours.dtype == given[0].dtype
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    weighting = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weighting = weighting.to(ours.dtype)
    assert_gradients_equal(given, torch.autograd.grad(ours, given, weighting), torch.autograd.grad(
        theirs, [x for x in copies if x is not None], weighting.double()), tolerance=tolerance)


def assert_gradients_equal(inputs: list[Tensor], ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], *,
                           tolerance: dict) -> None:
    """The tolerance is relative to each gradient's largest value: sums over rows grow with their number."""
    for x, our, their in zip(inputs, ours, theirs, strict=True):
        assert our.dtype == x.dtype and our.shape == x.shape
        size = their.abs().max().clamp(min=1e-3)  # of one visible key q and k have none
        torch.testing.assert_close(our.double() / size, their.double() / size, **tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Norms

def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def plain_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 60), (3, 63)])
def test_layer_norm_equals_its_formula(shape, has_bias):
    inputs = [randn(*shape), randn(shape[-1], seed=1), randn(shape[-1], seed=2) if has_bias else None]
    assert_equal_to_float64(lambda *a: reference.layer_norm(*a, eps=0.1), lambda *a: plain_layer_norm(*a, eps=0.1),
                            inputs, tolerance=F32)


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 60), (3, 63), (2, 3, 4, 10)])
def test_rms_norm_equals_its_formula(shape):
    inputs = [randn(*shape), randn(shape[-1], seed=1)]
    assert_equal_to_float64(lambda *a: reference.rms_norm(*a, eps=0.1), lambda *a: plain_rms_norm(*a, eps=0.1),
                            inputs, tolerance=F32)


def test_norms_read_views_with_strides():
    """The q part of a packed q, k, v projection, as QK-norm sees it."""
    packed, weight, bias = randn(2, 5, 9, 10), randn(10, seed=1), randn(10, seed=2)
    assert not packed[:, :, 2:6].is_contiguous()
    assert_equal_to_float64(lambda p, w: reference.rms_norm(p[:, :, 2:6], w, eps=1e-5),
                            lambda p, w: plain_rms_norm(p[:, :, 2:6], w, eps=1e-5), [packed, weight], tolerance=F32)
    assert_equal_to_float64(lambda p, w: reference.rms_norm(p.transpose(0, 2), w, eps=1e-5),
                            lambda p, w: plain_rms_norm(p.transpose(0, 2), w, eps=1e-5), [packed, weight],
                            tolerance=F32)
    assert_equal_to_float64(lambda p, w, b: reference.layer_norm(p.transpose(0, 2), w, b, eps=1e-5),
                            lambda p, w, b: plain_layer_norm(p.transpose(0, 2), w, b, eps=1e-5),
                            [packed, weight, bias], tolerance=F32)


def test_norms_in_bfloat16_keep_float32_statistics():
    """Near 30 bfloat16 has steps of 0.125, sums of squares steps of 1024: statistics in it would be far off."""
    x = (randn(64, 256).detach() + 30.0).to(torch.bfloat16)
    weight = randn(256, seed=1).detach().bfloat16().float()
    two_roundings = {"rtol": 1.02 * 2 ** -8, "atol": 1e-6}  # of 8 bits: the normalised value and its product
    for ours, formula in ((reference.layer_norm(x, weight, None, eps=1e-5),
                           plain_layer_norm(x.double(), weight.double(), None, eps=1e-5)),
                          (reference.rms_norm(x, weight, eps=1e-5),
                           plain_rms_norm(x.double(), weight.double(), eps=1e-5))):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), formula, **two_roundings)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_in_bfloat16_have_the_gradients_of_their_formula(name):
    inputs = [randn(3, 5, 60, dtype=torch.bfloat16), randn(60, seed=1)] + [randn(60, seed=2)] * (name == "layer_norm")
    formula = plain_layer_norm if name == "layer_norm" else plain_rms_norm
    assert_equal_to_float64(lambda *a: getattr(reference, name)(*a, eps=1e-5), lambda *a: formula(*a, eps=1e-5), inputs,
                            tolerance=BF16)


# ----------------------------------------------------------------------------------------------------------------------
# Matrix products

@pytest.mark.parametrize("by_onednn", [True, False], ids=["oneDNN", "F.linear"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 60), (1000, 65)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_linear_equals_its_formula(shape, has_bias, by_onednn, monkeypatch):
    if by_onednn and not reference._onednn_works():
        pytest.skip("this PyTorch has no oneDNN: its products are unchecked")
    monkeypatch.setattr(reference, "_takes_onednn", lambda x: by_onednn and x.dtype == torch.float32)
    inputs = [randn(*shape), randn(37, shape[-1], seed=1), randn(37, seed=2) if has_bias else None]
    # float32: sums of up to 1,000 products of values around 1
    assert_equal_to_float64(reference.linear, F.linear, inputs, tolerance={"rtol": 2e-5, "atol": 2e-4})


def test_linear_computes_in_the_dtype_of_its_input_and_keeps_that_of_the_weight():
    x, weight = randn(5, 16).bfloat16(), randn(8, 16, seed=1).requires_grad_()
    y = reference.linear(x, weight, None)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_onednn_is_not_used_where_it_fails_its_trial(monkeypatch):
    monkeypatch.setattr(reference, "_onednn_matmul", lambda a, b, bias=None: (a @ b) * 1.001)
    assert reference._onednn_works.__wrapped__() is False


# ----------------------------------------------------------------------------------------------------------------------
# Attention

def plain_attention(q: Tensor, k: Tensor, v: Tensor, first_key: list[list[int]], scale: float | None = None) -> Tensor:
    """One softmax per query, over the keys that its row of first_key names, up to its own."""
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = []
    for b in range(B):
        for i in range(Tq):
            own = Tk - Tq + i
            seen = slice(min(first_key[b][i], own), own + 1)
            for h in range(H):
                kv = h // (H // Hkv)
                weights = torch.softmax(k[b, seen, kv] @ q[b, i, h] * scale, dim=0)
                out.append(weights @ v[b, seen, kv])
    return torch.stack(out).view(B, Tq, H, D)


ATTENTION_SHAPES = {  # B, Tq, Tk, H, Hkv, D
    "square": (2, 13, 13, 4, 4, 6),
    "grouped": (2, 13, 13, 6, 2, 10),
    "one key head": (1, 9, 9, 3, 1, 5),
    "one token": (1, 1, 1, 2, 2, 2),
    "decoding": (2, 1, 11, 4, 2, 8),
    "prefill in pieces": (2, 5, 13, 4, 2, 8),
    "longer than the matmul path": (1, 67, 67, 2, 1, 4),
}


@pytest.mark.parametrize("path", ["matmul and softmax", "SDPA", "own choice"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_attention_equals_one_softmax_per_query(name, masked, path, monkeypatch):
    B, Tq, Tk, H, Hkv, D = ATTENTION_SHAPES[name]
    if path != "own choice":
        monkeypatch.setattr(reference, "_matmul_softmax_is_faster", lambda q, Tk: path != "SDPA")
    first_key = torch.zeros(B, Tq, dtype=torch.int32)
    if masked:
        first_key = torch.randint(0, Tk, (B, Tq), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    assert_equal_to_float64(
        lambda q, k, v: reference.attention(q, k, v, first_key=first_key if masked else None),
        lambda q, k, v: plain_attention(q, k, v, first_key.tolist()),
        [randn(B, Tq, H, D, seed=1), randn(B, Tk, Hkv, D, seed=2), randn(B, Tk, Hkv, D, seed=3)], tolerance=F32)


@pytest.mark.parametrize("path", ["matmul and softmax", "SDPA"])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_attention_takes_the_scale_it_is_given(scale, path, monkeypatch):
    monkeypatch.setattr(reference, "_matmul_softmax_is_faster", lambda q, Tk: path != "SDPA")
    assert_equal_to_float64(
        lambda q, k, v: reference.attention(q, k, v, scale=scale),
        lambda q, k, v: plain_attention(q, k, v, [[0] * 7], scale), [randn(1, 7, 2, 6, seed=s) for s in (1, 2, 3)],
        tolerance=F32)


@pytest.mark.parametrize("path", ["matmul and softmax", "SDPA"])
def test_attention_reads_views_of_the_packed_projection(path, monkeypatch):
    monkeypatch.setattr(reference, "_matmul_softmax_is_faster", lambda q, Tk: path != "SDPA")
    H, Hkv = 4, 2
    assert_equal_to_float64(
        lambda qkv: reference.attention(*qkv.split((H, Hkv, Hkv), dim=2)),
        lambda qkv: plain_attention(*qkv.split((H, Hkv, Hkv), dim=2), [[0] * 9] * 2),
        [randn(2, 9, H + 2 * Hkv, 6)], tolerance=F32)


@pytest.mark.parametrize("path", ["matmul and softmax", "SDPA"])
def test_one_row_of_first_keys_serves_the_whole_batch(path, monkeypatch):
    monkeypatch.setattr(reference, "_matmul_softmax_is_faster", lambda q, Tk: path != "SDPA")
    first_key = reference.first_visible_key(None, 3, T=9, device=CPU)
    assert first_key.shape == (1, 9)
    assert_equal_to_float64(
        lambda q, k, v: reference.attention(q, k, v, first_key=first_key),
        lambda q, k, v: plain_attention(q, k, v, first_key.clamp(min=0).tolist() * 2),
        [randn(2, 9, 2, 6, seed=s) for s in (1, 2, 3)], tolerance=F32)


@pytest.mark.parametrize("path", ["matmul and softmax", "SDPA"])
@pytest.mark.parametrize("Tq", [13, 5])
def test_attention_in_bfloat16_stays_within_its_rounding(Tq, path, monkeypatch):
    monkeypatch.setattr(reference, "_matmul_softmax_is_faster", lambda q, Tk: path != "SDPA")
    inputs = [randn(2, T, H, 10, seed=s, dtype=torch.bfloat16) for s, (T, H) in enumerate([(Tq, 4), (13, 2), (13, 2)])]
    assert_equal_to_float64(reference.attention, lambda q, k, v: plain_attention(q, k, v, [[0] * Tq] * 2), inputs,
                            tolerance=BF16)


def test_document_starts_and_first_visible_keys_equal_a_walk_over_the_tokens():
    documents = [[0, 0, 0, 0, 0, 0, 0], [3, 3, 4, 4, 4, 9, 10], [0, 1, 2, 3, 4, 5, 6], [5, 5, 5, 5, 5, 5, 6]]
    starts = [[next(j for j in range(7) if row[j] == row[i]) for i in range(7)] for row in documents]
    got = reference.document_starts(torch.tensor(documents))
    assert got.tolist() == starts and got.dtype == torch.int32
    for window in (None, 1, 3, 7, 100):
        oldest = [0 if window is None else i - window + 1 for i in range(7)]
        got = reference.first_visible_key(torch.tensor(documents), window, T=7, device=CPU)
        assert got.dtype == torch.int32
        assert got.tolist() == [[max(s, o) for s, o in zip(row, oldest, strict=True)] for row in starts]
        if window is not None:
            got = reference.first_visible_key(None, window, T=7, device=CPU)
            assert got.clamp(min=0).tolist() == [[max(0, o) for o in oldest]]
    assert reference.first_visible_key(None, None, T=7, device=CPU) is None


# ----------------------------------------------------------------------------------------------------------------------
# Linear + cross-entropy

def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None, softcap: float,
                        reduction: str) -> Tensor:
    logits = hidden @ weight[:vocab_size].T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    zero = logits.new_zeros(())
    losses = [zero if t == -100 else -torch.log(row.exp()[t] / row.exp().sum())
              for row, t in zip(logits, targets.tolist(), strict=True)]
    count = sum(t != -100 for t in targets.tolist())
    return torch.stack(losses) if reduction == "none" else torch.stack(losses).sum() / (
        count if reduction == "mean" else 1)


def make_targets(N: int, vocab_size: int, *, ignored: tuple[int, ...] = ()) -> Tensor:
    targets = torch.randint(vocab_size, (N,), generator=torch.Generator().manual_seed(N))
    targets[list(ignored)] = -100
    return targets


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 64, None])  # 11 rows: a short last chunk, an exact one, one for all
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("vocab_size", [None, 13])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_equals_its_formula(reduction, vocab_size, softcap, chunk_rows):
    targets = make_targets(11, 13, ignored=(0, 4, 5, 6, 7, 10))  # with chunks of 4 one chunk is ignored as a whole
    assert_loss_equals_formula(randn(11, 6), randn(16, 6, seed=1), targets, tolerance=F32, chunk_rows=chunk_rows,
                               vocab_size=vocab_size, softcap=softcap, reduction=reduction)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_linear_cross_entropy_with_bfloat16_rows_stays_within_their_rounding(softcap):
    targets = make_targets(37, 13, ignored=(3, 8))
    assert_loss_equals_formula(randn(37, 6, dtype=torch.bfloat16), randn(16, 6, seed=1), targets, tolerance=BF16,
                               chunk_rows=8, vocab_size=13, softcap=softcap, reduction="mean")


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, 1 / 192), (torch.float16, 65536.0)])
def test_a_factor_behind_the_loss_is_not_rounded_to_the_dtype_of_the_rows(dtype, factor):
    """1/192 in bfloat16 is off by 0.2%, and with it every element alike; 65,536 in float16 is infinite."""
    hidden, weight = randn(37, 6, scale=0.1, dtype=dtype), randn(16, 6, seed=1, scale=0.1)
    targets = make_targets(37, 16)
    loss = reference.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    whole, = torch.autograd.grad(loss, hidden, retain_graph=True)
    scaled, = torch.autograd.grad(loss * factor, hidden)
    share = (scaled.double() * whole.double()).sum() / whole.double().square().sum() / factor
    assert share.item() == pytest.approx(1.0, abs=2 ** -11)  # 222 roundings of either sign, 2^-9 each


def test_gradients_can_be_asked_for_again_while_the_graph_is_kept():
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), make_targets(5, 16)
    once = torch.autograd.grad(reference.linear_cross_entropy(hidden, weight, targets) * 3.0, (hidden, weight))
    loss = reference.linear_cross_entropy(hidden, weight, targets) * 3.0
    for retain_graph in (True, True, False):
        again = torch.autograd.grad(loss, (hidden, weight), retain_graph=retain_graph)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


def assert_loss_equals_formula(hidden: Tensor, weight: Tensor, targets: Tensor, *, tolerance: dict,
                               chunk_rows: int | None, **options) -> None:
    ours = reference.linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows, **options)
    assert ours.dtype == torch.float32 and ours.shape == ()
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    theirs = plain_cross_entropy(h64, w64, targets, **options)
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    # a factor behind the loss: the gradients made in the forward pass must take it up
    assert_gradients_equal([hidden, weight], torch.autograd.grad(ours * 0.3, (hidden, weight)),
                           torch.autograd.grad(theirs * 0.3, (h64, w64)), tolerance=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_losses_of_single_rows_equal_the_formula_and_carry_no_gradient(chunk_rows, softcap):
    hidden, weight, targets = randn(11, 6), randn(16, 6, seed=1), make_targets(11, 13, ignored=(2, 10))
    options = {"vocab_size": 13, "softcap": softcap, "reduction": "none"}
    ours = reference.linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows, **options)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert ours[[2, 10]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(ours.double(), plain_cross_entropy(hidden.double(), weight.double(), targets, **options)
                               .detach(), **F32)


def test_loss_without_gradients_equals_loss_with_them():
    hidden, weight, targets = randn(11, 6), randn(16, 6, seed=1), make_targets(11, 13, ignored=(3,))
    with_gradients = reference.linear_cross_entropy(hidden, weight, targets, vocab_size=13, softcap=3.0, chunk_rows=4)
    with torch.no_grad():
        without = reference.linear_cross_entropy(hidden, weight, targets, vocab_size=13, softcap=3.0, chunk_rows=4)
    assert with_gradients.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradients.detach(), **F32)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight = torch.full((3, 1), 100.0), torch.tensor([[10.0], [-10.0], [9.99]])  # logits 1000, -1000, 999
    losses = reference.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]), reduction="none")
    total = math.log1p(math.exp(-1.0))
    # float32: logits near 1000 are known to 6e-5, their differences too
    torch.testing.assert_close(losses, torch.tensor([total, 2000.0 + total, 1.0 + total]), rtol=1e-6, atol=2e-4)
    summed = reference.linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([0, 1, 2]), reduction="sum")
    torch.testing.assert_close(summed.detach(), losses.sum(), rtol=1e-6, atol=0.0)
    assert torch.autograd.grad(summed, hidden)[0].isfinite().all()


def test_a_batch_of_ignored_rows_sums_to_zero_without_gradient():
    hidden, weight = randn(5, 6), randn(16, 6, seed=1)
    targets = torch.full((5,), -100)
    loss = reference.linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_rows=2)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.count_nonzero() == 0
    mean = reference.linear_cross_entropy(hidden, weight, targets)
    assert mean.isnan() and F.cross_entropy(hidden @ weight.T, targets).isnan()  # no rows, no mean: as PyTorch has it


def test_another_ignore_index_is_obeyed():
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), torch.tensor([0, 3, 7, 3, 15])
    ours = reference.linear_cross_entropy(hidden, weight, targets, ignore_index=3)
    theirs = F.cross_entropy(hidden @ weight.T, targets, ignore_index=3)
    torch.testing.assert_close(ours, theirs, **F32)
    with torch.no_grad():
        without_gradients = reference.linear_cross_entropy(hidden, weight, targets, ignore_index=3)
    torch.testing.assert_close(without_gradients, theirs, **F32)
    assert_gradients_equal([hidden, weight], torch.autograd.grad(ours, (hidden, weight)),
                           torch.autograd.grad(theirs, (hidden, weight)), tolerance=F32)


def test_padding_rows_of_the_table_have_no_probability_and_no_gradient():
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), make_targets(5, 13)
    loss = reference.linear_cross_entropy(hidden, weight, targets, vocab_size=13)
    loss.backward()
    assert weight.grad[13:].count_nonzero() == 0 and weight.grad[:13].count_nonzero() > 0
    with torch.no_grad():
        weight[13:] = 1e4
    assert torch.equal(reference.linear_cross_entropy(hidden, weight, targets, vocab_size=13), loss)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_each_gradient_can_be_had_alone(wanted):
    hidden, weight, targets = randn(5, 6), randn(16, 6, seed=1), make_targets(5, 16)
    both = dict(zip(("hidden", "weight"), torch.autograd.grad(
        reference.linear_cross_entropy(hidden, weight, targets), (hidden, weight)), strict=True))
    alone = {"hidden": hidden.detach(), "weight": weight.detach()}
    alone[wanted].requires_grad_()
    reference.linear_cross_entropy(alone["hidden"], alone["weight"], targets).backward()
    assert torch.equal(alone[wanted].grad, both[wanted])


PEAK_MEMORY = """
import torch
import metrics
from kernels import reference

def growth_MiB(loss):
    # How far the highest resident memory of this process rises while loss and gradients are computed.
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(50304, 8, requires_grad=True)
    before = metrics.peak_memory_bytes("cpu")
    loss(hidden, weight, torch.randint(50257, (1024,))).backward()
    return (metrics.peak_memory_bytes("cpu") - before) / 2**20

def chunked(softcap):
    return lambda h, w, t: reference.linear_cross_entropy(h, w, t, vocab_size=50257, softcap=softcap, chunk_rows=32)

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
    rows = reference._default_chunk_rows(torch.zeros(1), V)
    assert rows >= 64 and (rows == 64 or rows * V * 4 <= 64 * 2 ** 20)
