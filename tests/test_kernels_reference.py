"""The definitions, and what is faster on a CPU, against float64 formulas written as plainly as possible: forward and
every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import cpu, reference

CPU = torch.device("cpu")
F32 = {"rtol": 1e-5, "atol": 1e-5}  # float32: 24 bits, sums of at most a few hundred values of size 1
BF16 = {"rtol": 2e-2, "atol": 2e-2}  # bfloat16: 8 bits, a few roundings (0.4% each) of values up to 3


needs_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
                                  reason="this PyTorch has no oneDNN: kernels/cpu.py is unchecked")
both = pytest.mark.parametrize("module", [reference, pytest.param(cpu, marks=needs_onednn)], ids=["definition", "cpu"])


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


# ---- Norms -----------------------------------------------------------------------------------------------------------

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


@both
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 60), (3, 63), (2, 3, 4, 10)])
def test_rms_norm_equals_its_formula(shape, module):
    inputs = [randn(*shape), randn(shape[-1], seed=1)]
    assert_equal_to_float64(lambda *a: module.rms_norm(*a, eps=0.1), lambda *a: plain_rms_norm(*a, eps=0.1),
                            inputs, tolerance=F32)


@both
def test_a_residual_is_added_in_front_and_its_sum_returned(module):
    x, residual, weight = randn(3, 5, 60), randn(3, 5, 60, seed=1), randn(60, seed=2)
    for norm, formula in ((module.rms_norm, plain_rms_norm),
                          (lambda x, w, **o: reference.layer_norm(x, w, None, **o),
                           lambda x, w, **o: plain_layer_norm(x, w, None, **o))):
        y, added = norm(x, weight, eps=0.1, residual=residual)
        assert torch.equal(added, x + residual)
        torch.testing.assert_close(y, formula(x + residual, weight, eps=0.1), **F32)


@both
def test_norms_read_views_with_strides(module):
    """The q part of a packed q, k, v projection, as QK-norm sees it."""
    packed, weight, bias = randn(2, 5, 9, 10), randn(10, seed=1), randn(10, seed=2)
    assert not packed[:, :, 2:6].is_contiguous()
    assert_equal_to_float64(lambda p, w: module.rms_norm(p[:, :, 2:6], w, eps=1e-5),
                            lambda p, w: plain_rms_norm(p[:, :, 2:6], w, eps=1e-5), [packed, weight], tolerance=F32)
    assert_equal_to_float64(lambda p, w: module.rms_norm(p.transpose(0, 2), w, eps=1e-5),
                            lambda p, w: plain_rms_norm(p.transpose(0, 2), w, eps=1e-5), [packed, weight],
                            tolerance=F32)
    assert_equal_to_float64(lambda p, w, b: reference.layer_norm(p.transpose(0, 2), w, b, eps=1e-5),
                            lambda p, w, b: plain_layer_norm(p.transpose(0, 2), w, b, eps=1e-5),
                            [packed, weight, bias], tolerance=F32)


@both
def test_norms_in_bfloat16_keep_float32_statistics(module):
    """Near 30 bfloat16 has steps of 0.125, sums of squares steps of 1024: statistics in it would be far off."""
    x = (randn(64, 256).detach() + 30.0).to(torch.bfloat16)
    weight = randn(256, seed=1).detach().bfloat16().float()
    two_roundings = {"rtol": 1.02 * 2 ** -8, "atol": 1e-6}  # of 8 bits: the normalised value and its product
    for ours, formula in ((reference.layer_norm(x, weight, None, eps=1e-5),
                           plain_layer_norm(x.double(), weight.double(), None, eps=1e-5)),
                          (module.rms_norm(x, weight, eps=1e-5),
                           plain_rms_norm(x.double(), weight.double(), eps=1e-5))):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), formula, **two_roundings)


@pytest.mark.parametrize("norm", [reference.layer_norm, reference.rms_norm, cpu.rms_norm])
def test_norms_in_bfloat16_have_the_gradients_of_their_formula(norm):
    is_layer = norm is reference.layer_norm
    inputs = [randn(3, 5, 60, dtype=torch.bfloat16), randn(60, seed=1)] + [randn(60, seed=2)] * is_layer
    formula = plain_layer_norm if is_layer else plain_rms_norm
    assert_equal_to_float64(lambda *a: norm(*a, eps=1e-5), lambda *a: formula(*a, eps=1e-5), inputs, tolerance=BF16)


# ---- Matrix products -------------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 60), (1000, 65)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_linear_equals_its_formula(shape, has_bias, module):
    inputs = [randn(*shape), randn(37, shape[-1], seed=1), randn(37, seed=2) if has_bias else None]
    # float32: sums of up to 1,000 products of values around 1
    assert_equal_to_float64(module.linear, F.linear, inputs, tolerance={"rtol": 2e-5, "atol": 2e-4})


@both
def test_linear_computes_in_the_dtype_of_its_input_and_keeps_that_of_the_weight(module):
    x, weight = randn(5, 16).bfloat16(), randn(8, 16, seed=1)
    y = module.linear(x, weight, None)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


# ---- Attention -------------------------------------------------------------------------------------------------------

def plain_attention(q: Tensor, k: Tensor, v: Tensor, first_key: list[list[int]]) -> Tensor:
    """One softmax per query, over the keys that its row of first_key names, up to its own."""
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1], k.shape[2]
    out = []
    for b in range(B):
        for i in range(Tq):
            own = Tk - Tq + i
            seen = slice(min(first_key[b][i], own), own + 1)
            for h in range(H):
                kv = h // (H // Hkv)
                weights = torch.softmax(k[b, seen, kv] @ q[b, i, h] / math.sqrt(D), dim=0)
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


@both
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_attention_equals_one_softmax_per_query(name, masked, module):
    B, Tq, Tk, H, Hkv, D = ATTENTION_SHAPES[name]
    first_key = torch.zeros(B, Tq, dtype=torch.int32)
    if masked:
        first_key = torch.randint(0, Tk, (B, Tq), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    assert_equal_to_float64(
        lambda q, k, v: module.attention(q, k, v, first_key=first_key if masked else None),
        lambda q, k, v: plain_attention(q, k, v, first_key.tolist()),
        [randn(B, Tq, H, D, seed=1), randn(B, Tk, Hkv, D, seed=2), randn(B, Tk, Hkv, D, seed=3)], tolerance=F32)


@both
def test_attention_reads_views_of_the_packed_projection(module):
    H, Hkv = 4, 2
    assert_equal_to_float64(
        lambda qkv: module.attention(*qkv.split((H, Hkv, Hkv), dim=2)),
        lambda qkv: plain_attention(*qkv.split((H, Hkv, Hkv), dim=2), [[0] * 9] * 2),
        [randn(2, 9, H + 2 * Hkv, 6)], tolerance=F32)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_onednn)])
def test_packed_attention_is_that_of_its_parts(backend):
    kernels.choose_backends({"attention": backend})
    first_key = reference.first_visible_key(None, 3, T=9, device=CPU)
    assert_equal_to_float64(
        lambda qkv: kernels.packed_attention(qkv, 4, first_key=first_key),
        lambda qkv: plain_attention(*qkv.split((4, 2, 2), dim=2), first_key.expand(2, 9).tolist()),
        [randn(2, 9, 8, 6)], tolerance=F32)


@both
def test_one_row_of_first_keys_serves_the_whole_batch(module):
    first_key = reference.first_visible_key(None, 3, T=9, device=CPU)
    assert first_key.shape == (1, 9)
    assert_equal_to_float64(
        lambda q, k, v: module.attention(q, k, v, first_key=first_key),
        lambda q, k, v: plain_attention(q, k, v, first_key.clamp(min=0).tolist() * 2),
        [randn(2, 9, 2, 6, seed=s) for s in (1, 2, 3)], tolerance=F32)


@both
@pytest.mark.parametrize("Tq", [13, 5])
def test_attention_in_bfloat16_stays_within_its_rounding(Tq, module):
    inputs = [randn(2, T, H, 10, seed=s, dtype=torch.bfloat16) for s, (T, H) in enumerate([(Tq, 4), (13, 2), (13, 2)])]
    assert_equal_to_float64(module.attention, lambda q, k, v: plain_attention(q, k, v, [[0] * Tq] * 2), inputs,
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


# ---- Linear + cross-entropy ------------------------------------------------------------------------------------------

def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, softcap: float,
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


def assert_loss_equals_formula(loss, hidden: Tensor, weight: Tensor, targets: Tensor, *, tolerance: dict,
                               **options) -> None:
    """Of loss(hidden, weight, targets, **options) the value, a number, and both gradients."""
    ours = loss(hidden, weight, targets, **options)
    assert ours.dtype == torch.float32 and ours.shape == ()
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    theirs = plain_cross_entropy(h64, w64, targets, **options)
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    # a factor behind the loss: gradients made in the forward pass must take it up
    assert_gradients_equal([hidden, weight], torch.autograd.grad(ours * 0.3, (hidden, weight)),
                           torch.autograd.grad(theirs * 0.3, (h64, w64)), tolerance=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("vocab_size", [16, 13])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_equals_its_formula(reduction, vocab_size, softcap):
    assert_loss_equals_formula(reference.linear_cross_entropy, randn(11, 6), randn(16, 6, seed=1),
                               make_targets(11, 13, ignored=(0, 4, 5, 6, 7, 10)), tolerance=F32,
                               vocab_size=vocab_size, softcap=softcap, reduction=reduction)


def test_losses_of_single_rows_equal_the_formula():
    hidden, weight, targets = randn(11, 6), randn(16, 6, seed=1), make_targets(11, 13, ignored=(2, 10))
    options = {"vocab_size": 13, "softcap": 2.0, "reduction": "none"}
    ours = reference.linear_cross_entropy(hidden, weight, targets, **options)
    torch.testing.assert_close(ours, plain_cross_entropy(hidden, weight, targets, **options), **F32)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_linear_cross_entropy_with_bfloat16_rows_stays_within_their_rounding(softcap):
    assert_loss_equals_formula(reference.linear_cross_entropy, randn(37, 6, dtype=torch.bfloat16), randn(16, 6, seed=1),
                               make_targets(37, 13, ignored=(3, 8)), tolerance=BF16, vocab_size=13, softcap=softcap,
                               reduction="mean")
