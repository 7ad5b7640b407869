"""The attention kernels against float64: forward and every gradient, on the GPU or through Triton's interpreter."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, library

from kernels import reference

pytest.importorskip("triton", reason="no triton: the attention kernels are unchecked")

from kernels import configs, flash_attention  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error (Frobenius) that rounding explains: of the results to 24, 11 or 8 bits, and of probabilities and their
# gradients before they are multiplied again. A GPU sums float32 in longer chains than numpy.
CAP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
GRAD_CAP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
GPU_CAP = 1e-5


@pytest.fixture(autouse=True)
def reference_computes_in_its_dtype():
    """On CUDA PyTorch's plain attention would compute 16-bit inputs in float32: no yardstick for what rounding does."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


# ---- The oracle ------------------------------------------------------------------------------------------------------

def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition: all scores, a mask, a softmax. Attention (B, Tq, H, D) and log-sum-exp (B, H, Tq)."""
    Tq, H, Tk, Hkv = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(H // Hkv, dim=2), v.repeat_interleave(H // Hkv, dim=2)
    own = torch.arange(Tq, device=q.device) + Tk - Tq
    first = torch.zeros_like(own)[None] if first_key is None else torch.minimum(first_key, own)  # (B or 1, Tq)
    key = torch.arange(Tk, device=q.device)
    visible = (key >= first[:, :, None]) & (key <= own[None, :, None])  # (B or 1, Tq, Tk)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)))


def make_qkv(B: int, Tq: int, Tk: int, H: int, Hkv: int, D: int, *, dtype: torch.dtype = torch.float32,
             device: torch.device | str = "cpu") -> list[Tensor]:
    """q, k, v that want gradients, and a gradient for the output, which does not."""
    shapes = (B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), (B, Tq, H, D)
    *qkv, grad = (randn(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes))
    return [*(x.requires_grad_() for x in qkv), grad]


def results(op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Tensor]:
    out = op(q, k, v)
    return dict(zip(("out", "grad_q", "grad_k", "grad_v"), (out, *torch.autograd.grad(out, (q, k, v), grad)),
                    strict=True))


def packed_results(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first_key: Tensor | None, *,
                   fused: bool = False) -> dict[str, Tensor]:
    """The same of q, k and v in one tensor, whose gradient is taken apart."""
    qkv = torch.cat((q, k, v), dim=2).detach().requires_grad_()
    out = flash_attention.packed_attention(qkv, q.shape[2], first_key=first_key, fused=fused)
    grad_qkv, = torch.autograd.grad(out, qkv, grad)
    assert grad_qkv.is_contiguous()
    gradients = grad_qkv.split((q.shape[2], k.shape[2], v.shape[2]), dim=2)
    return dict(zip(("out", "grad_q", "grad_k", "grad_v"), (out, *(g.contiguous() for g in gradients)), strict=True))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_as_exact_as_pytorch(inputs: list[Tensor], first_key: Tensor | None = None, *, fused: bool = False,
                               packed: bool = False) -> None:
    """At most twice the error of PyTorch's same computation in the same dtype, and below the cap in any case."""
    q, dtype = inputs[0], inputs[0].dtype
    copies = [x.detach().double().requires_grad_() for x in inputs]
    exact = results(lambda q, k, v: plain_attention(q, k, v, first_key=first_key)[0], *copies)
    theirs = results(lambda q, k, v: reference.attention(q, k, v, first_key=first_key), *inputs)
    ours = packed_results(*inputs, first_key, fused=fused) if packed else results(
        partial(flash_attention.attention, first_key=first_key, fused=fused), *inputs)
    for name, value in exact.items():
        assert ours[name].dtype == dtype and ours[name].shape == value.shape and ours[name].is_contiguous()
        error = relative_error(ours[name], value)
        if value.norm() < 1e-9:  # of one visible key the scores have no gradient
            assert ours[name].norm() < 1e-2 if dtype != torch.float32 else ours[name].norm() < 1e-5, name
            continue
        assert error <= 2 * relative_error(theirs[name], value) + 1e-6, name
        cap = GPU_CAP if q.is_cuda and dtype == torch.float32 else (CAP if name == "out" else GRAD_CAP)[dtype]
        assert error <= cap, name


def assert_unchanged(before: Tensor, after: Tensor, name: str, *, fused: bool) -> None:
    """Bit by bit, but for what a GPU's atomics add up in any order."""
    if fused and name == "grad_q":
        torch.testing.assert_close(after, before)
    else:
        assert torch.equal(after, before), name


# ---- Which keys a query sees -----------------------------------------------------------------------------------------

def document_ids(B: int, T: int, *, seed: int = 0) -> Tensor:
    """Documents of random lengths from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand((B, T), generator=generator) < torch.rand((B, 1), generator=generator) * 0.3
    starts[:, T // 2:T // 2 + 2] = True  # one of length 1 in any case
    return starts.cumsum(1)


def windowed(T: int, window: int) -> Tensor:
    return reference.first_visible_key(None, window, T=T, device=torch.device("cpu"))


def documents(B: int, T: int, window: int | None = None) -> Tensor:
    return reference.first_visible_key(document_ids(B, T), window, T=T, device=torch.device("cpu"))


def any_keys(B: int, Tq: int, Tk: int) -> Tensor:
    """No order at all: negative ones, and ones behind the query, which then sees itself."""
    return torch.randint(-5, Tk + 5, (B, Tq), generator=torch.Generator().manual_seed(3))


# name: (B, Tq, Tk, H, Hkv, D), first_key
SHAPES = {
    "T1": ((2, 1, 1, 2, 2, 16), None),
    "T63-G2": ((2, 63, 63, 4, 2, 24), None),
    "T127-D64": ((1, 127, 127, 2, 2, 64), None),
    "T130-G4-D32": ((1, 130, 130, 4, 1, 32), None),
    "T130-D128": ((1, 130, 130, 1, 1, 128), None),
    "T70-D80": ((1, 70, 70, 2, 1, 80), None),
    "T40-D256": ((1, 40, 40, 1, 1, 256), None),
    "Tq1-Tk90": ((2, 1, 90, 4, 2, 16), None),
    "Tq37-Tk165": ((1, 37, 165, 2, 1, 16), None),
    "window-of-1": ((1, 70, 70, 2, 2, 16), windowed(70, 1)),
    "window-of-100": ((1, 250, 250, 1, 1, 16), windowed(250, 100)),
    "documents": ((2, 250, 250, 1, 1, 16), documents(2, 250)),
    "documents-window-G4-D64": ((2, 127, 127, 4, 1, 64), documents(2, 127, 20)),
    "padding-cached": ((3, 9, 140, 2, 1, 16), torch.tensor([[0], [131], [139]]).expand(3, 9)),
    "only-itself": ((1, 70, 70, 2, 2, 16), torch.full((1, 70), 70)),
    "any-keys": ((2, 150, 211, 2, 1, 16), any_keys(2, 150, 211)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_as_exact_as_pytorch(name, dtype, kernel_device):
    shape, first_key = SHAPES[name]
    assert_as_exact_as_pytorch(make_qkv(*shape, dtype=dtype, device=kernel_device),
                               None if first_key is None else first_key.to(kernel_device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["T63-G2", "T127-D64", "T70-D80", "documents-window-G4-D64", "any-keys"])
def test_the_fused_backward_is_as_exact_as_pytorch(name, dtype, kernel_device):
    shape, first_key = SHAPES[name]
    assert_as_exact_as_pytorch(make_qkv(*shape, dtype=dtype, device=kernel_device),
                               None if first_key is None else first_key.to(kernel_device), fused=True)


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["T63-G2", "T127-D64", "T70-D80", "window-of-100", "documents-window-G4-D64"])
def test_packed_attention_is_as_exact_as_pytorch(name, dtype, fused, kernel_device):
    shape, first_key = SHAPES[name]
    assert_as_exact_as_pytorch(make_qkv(*shape, dtype=dtype, device=kernel_device),
                               None if first_key is None else first_key.to(kernel_device), fused=fused,
                               packed=True)


def test_heads_have_fused_tiles_up_to_the_width_that_says_so():
    for arch in configs._ATTENTION:
        for D in (64, configs.MAX_FUSED_HEAD_DIM, configs.MAX_FUSED_HEAD_DIM + 1):
            fused = configs.attention(D, torch.bfloat16, arch).fused
            assert (fused is None) == (D > configs.MAX_FUSED_HEAD_DIM)


def test_the_split_backward_gives_the_same_bits_every_time(kernel_device):
    inputs = make_qkv(1, 150, 150, 2, 1, 16, dtype=torch.bfloat16, device=kernel_device)
    once, again = (results(flash_attention.attention, *inputs) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_the_log_sum_exp_is_saved_in_float32(kernel_device):
    q, k, v, _ = make_qkv(2, 37, 80, 4, 2, 16, dtype=torch.bfloat16, device=kernel_device)
    first_key = any_keys(2, 37, 80).to(kernel_device)
    _, lse = flash_attention.attention_forward(q, k, v, first_key, q.shape[2], False)
    _, exact = plain_attention(q.double(), k.double(), v.double(), first_key=first_key)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=1e-5)  # float32 of values up to 10


# ---- Where the numbers are in memory ---------------------------------------------------------------------------------

def test_attention_reads_views_of_the_packed_projection(kernel_device):
    B, T, H, Hkv, D = 2, 70, 4, 2, 24
    qkv, grad = randn(B, T, H + 2 * Hkv, D).to(kernel_device).requires_grad_(), randn(B, T, H, D).to(kernel_device)
    split = (H, Hkv, Hkv)
    ours = flash_attention.attention(*qkv.split(split, dim=2))
    double = qkv.detach().double().requires_grad_()
    exact, _ = plain_attention(*double.split(split, dim=2))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, qkv, grad)[0].double(),
                               torch.autograd.grad(exact, double, grad.double())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["heads before positions", "positions before batches", "head dim first"])
def test_attention_reads_any_strides(layout, kernel_device):
    order, back = {"heads before positions": ((0, 2, 1, 3), (0, 2, 1, 3)),
                   "positions before batches": ((1, 0, 2, 3), (1, 0, 2, 3)),
                   "head dim first": ((3, 0, 1, 2), (1, 2, 3, 0))}[layout]
    inputs = make_qkv(2, 70, 70, 2, 1, 16, device=kernel_device)
    strided = [x.detach().permute(order).contiguous().permute(back).requires_grad_() for x in inputs]
    assert strided[0].shape == inputs[0].shape and not strided[0].is_contiguous()
    plain, ours = (results(flash_attention.attention, *x) for x in (inputs, strided))
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-5)  # float32, sums in another order


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_the_output_s_gradient_may_have_any_strides(kind, kernel_device):
    q, k, v, grad = make_qkv(2, 40, 40, 2, 2, 16, device=kernel_device)
    if kind == "expanded":
        grad = torch.ones((), device=kernel_device).expand(grad.shape)  # as of out.sum()
    else:
        grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
    odd = results(flash_attention.attention, q, k, v, grad)
    plain = results(flash_attention.attention, q, k, v, grad.clone(memory_format=torch.contiguous_format))
    assert all(torch.equal(odd[name], plain[name]) for name in plain)


@pytest.mark.parametrize("first_key", ["int64", "one row, expanded", "every other column"])
def test_first_keys_may_be_any_integers_of_any_strides(first_key, kernel_device):
    plain = documents(2, 90).to(kernel_device)
    if first_key == "int64":
        given = plain.long()
    elif first_key == "one row, expanded":
        plain = plain[:1].repeat(2, 1)
        given = plain[:1].expand(2, 90)
    else:
        given = plain.repeat_interleave(2, dim=1)[:, ::2]
    inputs = make_qkv(2, 90, 90, 2, 2, 16, device=kernel_device)
    ours, theirs = (results(lambda *qkv, f=f: flash_attention.attention(*qkv, first_key=f), *inputs)
                    for f in (given, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_row_of_first_keys_serves_every_batch(kernel_device):
    inputs, first_key = make_qkv(2, 90, 90, 2, 2, 16, device=kernel_device), windowed(90, 7).to(kernel_device)
    one, all_rows = (results(lambda *qkv, f=f: flash_attention.attention(*qkv, first_key=f), *inputs)
                     for f in (first_key, first_key.repeat(2, 1)))
    assert all(torch.equal(one[name], all_rows[name]) for name in one)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_memory_outside_the_tensors_changes_no_bit(fused, masked, kernel_device):
    """NaN in rows before and past T (the unwritten slots of a cache), past the last head, and between heads."""
    B, T, H, D = 2, 77, 2, 24
    first_key = documents(B, T).to(kernel_device) if masked else None
    def inside(x: Tensor, outside: float) -> Tensor:
        memory = torch.full((B, T + 150, H + 1, D + 8), outside, device=kernel_device)
        memory[:, 10:10 + T, :H, :D] = x.detach()
        return memory[:, 10:10 + T, :H, :D].requires_grad_()
    inputs = make_qkv(B, T, T, H, H, D, device=kernel_device)
    clean, poisoned = (results(partial(flash_attention.attention, first_key=first_key, fused=fused),
                               *(inside(x, outside) for x in inputs)) for outside in (0.0, math.nan))
    for name in clean:
        assert_unchanged(clean[name], poisoned[name], name, fused=fused)


# ---- What a query does not see ---------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_keys_that_no_query_sees_change_no_bit(fused, kernel_device):
    """Two documents, the second one padded on the left, so to say: its queries see none of the first's keys. Nor does
    the first see the second, which lies in its future."""
    T, cut = 150, 83
    first_key = torch.where(torch.arange(T) < cut, 0, cut)[None].to(kernel_device)
    q, k, v, grad = make_qkv(1, T, T, 2, 1, 16, dtype=torch.bfloat16, device=kernel_device)
    for changed, kept in (slice(None, cut), slice(cut, None)), (slice(cut, None), slice(None, cut)):
        other_k, other_v = k.detach().clone(), v.detach().clone()
        other_k[:, changed] = other_v[:, changed] = 1e4
        before, after = (results(partial(flash_attention.attention, first_key=first_key, fused=fused), q, *kv, grad)
                         for kv in ((k, v), (other_k.requires_grad_(), other_v.requires_grad_())))
        for name in before:
            assert_unchanged(before[name][:, kept], after[name][:, kept], name, fused=fused)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_tiles_that_no_query_of_a_tile_sees_are_not_read(fused, kernel_device):
    """NaN times a probability of 0 is NaN: results that stay finite come from programs that skipped what holds NaN."""
    T, cut = 512, 256  # a multiple of all tiles
    first_key = torch.where(torch.arange(T) < cut, 0, cut)[None].to(kernel_device)
    for poisoned, kept in (slice(None, cut), slice(cut, None)), (slice(cut, None), slice(None, cut)):
        inputs = make_qkv(1, T, T, 1, 1, 16, dtype=torch.float16, device=kernel_device)
        for x in inputs:
            x.data[:, poisoned] = math.nan
        op = partial(flash_attention.attention, first_key=first_key, fused=fused)
        for name, value in results(op, *inputs).items():
            assert value[:, kept].isfinite().all(), name
            assert value[:, poisoned].isnan().any(), name


@pytest.mark.parametrize("Tq, only_itself", [(1300, False), (1300, True), (33, False)])
def test_a_tile_of_keys_knows_the_last_query_that_sees_it(Tq, only_itself, kernel_device):
    """Against a loop over all queries; 1,024 queries are read at a time."""
    Tk, block = 1300, 128
    first_key = torch.full((2, Tq), Tk) if only_itself else any_keys(2, Tq, Tk)
    first_key = first_key.int().to(kernel_device)
    last = flash_attention._last_queries(first_key, Tk, block)
    own = torch.arange(Tq) + Tk - Tq
    sees_from = torch.minimum(first_key.cpu(), own)  # (B, Tq)
    expected = [[max((i + 1 for i in range(Tq) if row[i] < end), default=0) for end in range(block, Tk + block, block)]
                for row in sees_from.tolist()]
    assert last.tolist() == expected


# ---- As PyTorch's operators behave -----------------------------------------------------------------------------------

@pytest.mark.parametrize("first_key", [None, documents(1, 20)], ids=["causal", "documents"])
def test_the_operators_keep_pytorch_s_rules(first_key, kernel_device):
    q, k, v, grad = make_qkv(2, 20, 20, 2, 1, 16, device=kernel_device)
    first_key = None if first_key is None else first_key.to(kernel_device)
    library.opcheck(flash_attention.attention_forward, (q, k, v, first_key, q.shape[2], False))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = flash_attention.attention_forward(q, k, v, first_key, q.shape[2], False)
    library.opcheck(flash_attention.attention_backward, (grad, q, k, v, out, lse, first_key, True))
    qkv = torch.cat((q, k, v), dim=2).requires_grad_()
    library.opcheck(flash_attention.attention_forward, (qkv, None, None, first_key, 2, False))
    library.opcheck(flash_attention.attention_backward,
                    (grad, qkv.detach(), None, None, out, lse, first_key, True))


def test_a_compiled_model_has_the_same_gradients(kernel_device):
    first_key = windowed(30, 9).to(kernel_device)
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention.attention(q * 1.5, k, v.sin(), first_key=first_key) * 2.0
    inputs = make_qkv(2, 30, 30, 2, 1, 16, device=kernel_device)
    eager = results(model, *inputs)
    compiled = results(torch.compile(model, backend="aot_eager", fullgraph=True), *inputs)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-6, atol=1e-6)


def test_a_compiled_model_keeps_q_k_and_v_packed(kernel_device):
    qkv, grad = randn(2, 30, 4, 16).to(kernel_device).requires_grad_(), randn(2, 30, 2, 16).to(kernel_device)
    def model(qkv: Tensor) -> Tensor:
        return flash_attention.packed_attention(qkv * 1.5, 2) * 2.0
    eager, compiled = model(qkv), torch.compile(model, backend="aot_eager", fullgraph=True)(qkv)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(out, qkv, grad)[0] for out in (compiled, eager)),
                               rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_has_the_same_gradients(kernel_device):
    inputs = make_qkv(1, 30, 30, 2, 1, 16, device=kernel_device)
    plain = results(flash_attention.attention, *inputs)
    again = results(lambda *qkv: torch.utils.checkpoint.checkpoint(flash_attention.attention, *qkv,
                                                                   use_reentrant=False), *inputs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("q, taken", [
    (torch.empty(1, 2, 1, 256), True), (torch.empty(1, 2, 1, 5, dtype=torch.bfloat16), True),
    (torch.empty(1, 2, 1, 257), False), (torch.empty(1, 2, 1, 64, dtype=torch.float64), False),
    (torch.empty(3, 1, 2, 64), False), (torch.empty(0, 2, 1, 64), False)], ids=lambda x: str(getattr(x, "shape", x)))
def test_the_kernels_take_what_they_were_made_for(q, taken, kernel_device):
    assert flash_attention.supports(q.to(kernel_device)) is taken


# ---- Real sizes ------------------------------------------------------------------------------------------------------

def packed(B: int, T: int, device: torch.device) -> Tensor:
    """Documents of 1 to 2 * 512 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand((B, T), generator=generator) < 1 / 512).cumsum(1)
    return reference.first_visible_key(ids, None, T=T, device=torch.device("cpu")).to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [1024, 4096])
@pytest.mark.parametrize("joined", [False, True], ids=["", "packed"])
def test_real_sizes_are_as_exact_as_pytorch(joined, T, D, G, masked, fused, triton_gpu):
    B = 16_384 // T
    first_key = packed(B, T, triton_gpu) if masked else None
    assert_as_exact_as_pytorch(make_qkv(B, T, T, 4, 4 // G, D, dtype=torch.bfloat16, device=triton_gpu), first_key,
                               fused=fused, packed=joined)


@pytest.mark.gpu
def test_the_split_backward_gives_the_same_bits_at_real_sizes(triton_gpu):
    inputs = make_qkv(16, 1024, 1024, 12, 12, 64, dtype=torch.bfloat16, device=triton_gpu)
    once = results(flash_attention.attention, *inputs)
    for _ in range(5):
        again = results(flash_attention.attention, *inputs)
        assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.gpu
def test_tensors_of_more_than_2_31_numbers(triton_gpu):
    """The last batch of a packed projection of 2.4 billion numbers, against that batch alone."""
    B, T, H, D = 1024, 1024, 12, 64
    qkv = torch.randn((B, T, 3 * H, D), device=triton_gpu, dtype=torch.bfloat16)
    assert qkv.numel() > 2 ** 31
    qkv.requires_grad_()
    out = flash_attention.packed_attention(qkv, H)
    grad, = torch.autograd.grad(out, qkv, torch.ones_like(out))
    last = qkv[-1:].detach().clone().requires_grad_()
    out_last = flash_attention.packed_attention(last, H)
    grad_last, = torch.autograd.grad(out_last, last, torch.ones_like(out_last))
    assert torch.equal(out[-1:], out_last) and torch.equal(grad[-1:], grad_last)
