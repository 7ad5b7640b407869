"""Causal attention as fused Triton kernels, forward and backward: grouped queries, sliding windows, packed documents.

As in FlashAttention-2 (arXiv:2307.08691) scores exist one tile at a time, the softmax runs along with its largest score
and its sum, and the backward recomputes the probabilities from the saved log of that sum. One int32 per query, the
first key that it sees, covers windows, documents and padding; tiles that no query of a tile sees are not visited. No
dropout, no scores added, no decoding kernel.

The backward is split: one kernel sums over keys (for q), one over queries (for k, v), each in a fixed order, so equal
inputs give equal bits; or fused: all probabilities once, q's gradient by atomics (attention_backends.py).

Dims: B batch, Tq queries, Tk keys, H query heads, Hkv key/value heads, G = H / Hkv, D head dim. "own" is the key at
which a query stands. In kernels a stride is named x_b, x_t, x_h for the dims of x; that of D is 1. to_b, to_t are those
of the gradients that a kernel writes, whose heads follow one another.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kernels import configs


def supports(q: Tensor) -> bool:
    """A single query is left to PyTorch: its kernel splits the keys over programs; here one would walk all of them."""
    return configs.computes_on(q) and q.shape[-1] <= configs.MAX_HEAD_DIM and q.shape[1] > 1 and q.numel() > 0


def attention(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None, fused: bool = False) -> Tensor:
    """kernels.attention by Triton. Gradients have the same bits every time unless the backward is fused."""
    return attention_forward(q, k, v, first_key, q.shape[2], fused)[0]


def packed_attention(qkv: Tensor, n_head: int, *, first_key: Tensor | None = None, fused: bool = False) -> Tensor:
    """kernels.packed_attention by Triton: its backward writes into one gradient, so that none has to be joined."""
    return attention_forward(qkv, None, None, first_key, n_head, fused)[0]


@library.custom_op("flatgpt::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor | None, v: Tensor | None, first_key: Tensor | None, n_head: int,
                      fused: bool) -> tuple[Tensor, Tensor]:
    """Attention (B, Tq, H, D), contiguous, and the log of the sum of exp(scores), float32 (B, H, Tq). Without k and v,
    q is all three, packed: (B, T, H + 2 Hkv, D). fused is for the backward."""
    out, lse = _outputs(q, k, v, first_key, n_head, fused)
    first, q, k, v = _addressable(first_key, *_unpacked(q, k, v, n_head))
    B, Tq, H, D = q.shape
    tile = configs.attention(D, q.dtype, _arch(q.device)).forward
    with torch.cuda.device_of(q):  # Triton launches on the current one; for backward, autograd's thread sets it
        _forward_kernel[(triton.cdiv(Tq, tile.queries) * B * H,)](
            q, k, v, first, out, lse, D ** -0.5, H, Tq, k.shape[1],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], first.stride(0),
            G=H // k.shape[2], D=D, BLOCK_D=configs.head_block(D), BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
            HAS_FIRST=first_key is not None, num_warps=tile.warps, num_stages=tile.stages)
    return out, lse


@attention_forward.register_fake
def _outputs(q, k, v, first_key, n_head, fused):
    B, Tq, _, D = q.shape
    return q.new_empty((B, Tq, n_head, D)), q.new_empty((B, n_head, Tq), dtype=torch.float32)


@library.custom_op("flatgpt::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor,
                       first_key: Tensor | None, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous, in their dtypes; of a packed q that is the first, and the others are empty.
    grad (B, Tq, H, D) is that of out."""
    gradients = _gradient_outputs(grad, q, k, v, out, lse, first_key, fused)
    grad_q, grad_k, grad_v = gradients if k is not None else _unpacked(gradients[0], None, None, out.shape[2])
    first, q, k, v, grad = _addressable(first_key, *_unpacked(q, k, v, out.shape[2]), grad)
    (B, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    tiles = configs.attention(D, q.dtype, _arch(q.device))
    fused = fused and tiles.fused is not None
    of_q, of_kv = tiles.backward_q, tiles.fused if fused else tiles.backward_kv
    last = first if first_key is None else _last_queries(first, Tk, of_kv.keys)
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    constants = {"G": H // Hkv, "D": D, "BLOCK_D": configs.head_block(D), "HAS_FIRST": first_key is not None}
    sum_q = torch.zeros_like(out, dtype=torch.float32) if fused else grad_q
    _backward_q_kernel[(triton.cdiv(Tq, of_q.queries) * B * H,)](
        q, k, v, grad, out, lse, delta, first, grad_q, D ** -0.5, H, Tq, Tk, *strides, *grad_q.stride()[:2],
        first.stride(0), **constants, BLOCK_Q=of_q.queries, BLOCK_K=of_q.keys, MASK_ALL=of_q.mask_all,
        ONLY_DELTA=fused, num_warps=of_q.warps, num_stages=of_q.stages)
    _backward_kv_kernel[(triton.cdiv(Tk, of_kv.keys) * B * Hkv,)](
        q, k, v, grad, lse, delta, first, last, sum_q, grad_k, grad_v, D ** -0.5, Hkv, Tq, Tk, *strides,
        *grad_k.stride()[:2], first.stride(0), last.stride(0), **constants, BLOCK_Q=of_kv.queries, BLOCK_K=of_kv.keys,
        MASK_ALL=of_kv.mask_all or first_key is not None, ADD_GRAD_Q=fused, num_warps=of_kv.warps,
        num_stages=of_kv.stages)
    if fused:
        grad_q.copy_(sum_q)
    return gradients


@attention_backward.register_fake
def _gradient_outputs(grad, q, k, v, out, lse, first_key, fused):
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, first_key, _, ctx.fused = inputs
    ctx.save_for_backward(q, k, v, *output, first_key)
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp, whose gradient nobody asks for


def _gradients(ctx, grad, _grad_lse):
    q, k, v, out, lse, first_key = ctx.saved_tensors
    grad_q, grad_k, grad_v = attention_backward(grad, q, k, v, out, lse, first_key, ctx.fused)
    return (grad_q, None, None, None, None, None) if k is None else (grad_q, grad_k, grad_v, None, None, None)


attention_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _unpacked(q: Tensor, k: Tensor | None, v: Tensor | None, H: int) -> tuple[Tensor, ...]:
    """q, k and v, of a packed q as views."""
    Hkv = (q.shape[2] - H) // 2
    return (q, k, v) if k is not None else q.split((H, Hkv, Hkv), dim=2)


def _addressable(first_key: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """first_key int32 (B, Tq) and tensors (B, T, H, D) as the kernels read them, the numbers of the last dim in a row.
    Of first_key None any tensor, since it is never read."""
    tensors = tuple(x if x.stride(3) == 1 else x.contiguous() for x in tensors)
    B = tensors[0].shape[0]
    return tensors[0] if first_key is None else first_key.to(torch.int32).contiguous().expand(B, -1), *tensors


def _last_queries(first: Tensor, Tk: int, block: int) -> Tensor:
    """For each tile of `block` keys one more than the last query that sees any of it, int32 (B, tiles). first (B, Tq)
    need not rise along the sequence."""
    B, Tq = first.shape
    rows, tiles = 1 if first.stride(0) == 0 else B, triton.cdiv(Tk, block)
    last = first.new_empty((rows, tiles))
    _last_query_kernel[(tiles * rows,)](first, last, Tq, Tk, BLOCK_K=block, BLOCK=configs.LAST_QUERY_BLOCK)
    return last.expand(B, -1)


@functools.cache
def _arch(device: torch.device) -> str:
    """The GPU as configs.py names it. The interpreter runs the tiles of the GPU that matters most."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return f"sm_{10 * major + minor}"


# ---- Kernels ---------------------------------------------------------------------------------------------------------

LOG2_E = tl.constexpr(1.4426950408889634)  # probabilities are powers of 2, which is what the hardware computes
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["Tq", "Tk", "first_b"])
def _forward_kernel(Q, K, V, FIRST, OUT, LSE, scale, H, Tq, Tk, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, first_b,
                    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
                    BLOCK_K: tl.constexpr, HAS_FIRST: tl.constexpr):
    """A program computes BLOCK_Q queries of one head. Those that stand last, and see most, start first."""
    tiles = tl.cdiv(Tq, BLOCK_Q)
    start_q = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    head = (tl.program_id(0) // tiles).to(tl.int64)  # of all batches
    b, h = head // H, head % H
    K += b * k_b + h // G * k_h
    V += b * v_b + h // G * v_h
    q = _load_tile(Q + b * q_b + h * q_h, start_q, Tq, q_t, BLOCK_Q, D, BLOCK_D)
    own, first, start_k, end_k = _visible_range(FIRST + b * first_b, start_q, Tq, Tk, BLOCK_Q, BLOCK_K, HAS_FIRST)

    out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)  # of exp2(score - largest)
    largest = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    scale_2 = scale * LOG2_E
    all_see_from, all_see_to = tl.max(first, axis=0), Tk - Tq + start_q + 1
    for start in range(start_k, end_k, BLOCK_K):
        k = _load_tile(K, start, Tk, k_t, BLOCK_K, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
        if (start < all_see_from) | (start + BLOCK_K > all_see_to):
            key = start + tl.arange(0, BLOCK_K)
            visible = key[None, :] <= own[:, None]
            if HAS_FIRST:
                visible = visible & (key[None, :] >= first[:, None])
            scores = tl.where(visible, scores, -INFINITY)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale_2)
        subtract = new_largest
        if HAS_FIRST:  # a query may see no key of its tile's first ones
            subtract = tl.where(new_largest == -INFINITY, 0.0, new_largest)
        p = tl.exp2(scores * scale_2 - subtract[:, None])
        shrink = tl.exp2(largest - subtract)
        total = total * shrink + tl.sum(p, axis=1)
        v = _load_tile(V, start, Tk, v_t, BLOCK_K, D, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = new_largest

    _store_tile(OUT + (b * Tq * H + h) * D, out / total[:, None], start_q, Tq, H * D, BLOCK_Q, D, BLOCK_D)
    query = start_q + tl.arange(0, BLOCK_Q)
    tl.store(LSE + head * Tq + query, (largest + tl.log2(total)) / LOG2_E, mask=query < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk", "first_b"])
def _backward_q_kernel(Q, K, V, GRAD, OUT, LSE, DELTA, FIRST, GRAD_Q, scale, H, Tq, Tk,
                       q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, grad_b, grad_t, grad_h, to_b, to_t, first_b,
                       G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_FIRST: tl.constexpr,
                       BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK_ALL: tl.constexpr, ONLY_DELTA: tl.constexpr):
    """GRAD_Q for BLOCK_Q queries of one head, and for the other kernel DELTA (B, H, Tq): what the softmax takes off the
    gradient of each score of a query, the sum of out * grad."""
    tiles = tl.cdiv(Tq, BLOCK_Q)
    start_q = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    K += b * k_b + h // G * k_h
    V += b * v_b + h // G * v_h
    query = start_q + tl.arange(0, BLOCK_Q)
    q = _load_tile(Q + b * q_b + h * q_h, start_q, Tq, q_t, BLOCK_Q, D, BLOCK_D)
    grad = _load_tile(GRAD + b * grad_b + h * grad_h, start_q, Tq, grad_t, BLOCK_Q, D, BLOCK_D)
    out = _load_tile(OUT + (b * Tq * H + h) * D, start_q, Tq, H * D, BLOCK_Q, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(DELTA + head * Tq + query, delta, mask=query < Tq)
    if ONLY_DELTA:
        return
    lse_2 = tl.load(LSE + head * Tq + query, mask=query < Tq, other=INFINITY) * LOG2_E  # past Tq nothing is probable
    own, first, start_k, end_k = _visible_range(FIRST + b * first_b, start_q, Tq, Tk, BLOCK_Q, BLOCK_K, HAS_FIRST)

    grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    scale_2 = scale * LOG2_E
    all_see_from, all_see_to = tl.max(first, axis=0), Tk - Tq + start_q + 1
    for start in range(start_k, end_k, BLOCK_K):
        k = _load_tile(K, start, Tk, k_t, BLOCK_K, D, BLOCK_D)
        v = _load_tile(V, start, Tk, v_t, BLOCK_K, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
        p = tl.exp2(scores * scale_2 - lse_2[:, None])
        if (start < all_see_from) | (start + BLOCK_K > all_see_to) | MASK_ALL:
            key = start + tl.arange(0, BLOCK_K)
            visible = key[None, :] <= own[:, None]
            if HAS_FIRST:
                visible = visible & (key[None, :] >= first[:, None])
            p = tl.where(visible, p, 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    _store_tile(GRAD_Q + b * to_b + h * D, grad_q * scale, start_q, Tq, to_t, BLOCK_Q, D, BLOCK_D)


@triton.jit(do_not_specialize=["Tq", "Tk", "first_b", "last_b"])
def _backward_kv_kernel(Q, K, V, GRAD, LSE, DELTA, FIRST, LAST, GRAD_Q, GRAD_K, GRAD_V, scale, Hkv, Tq, Tk,
                        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, grad_b, grad_t, grad_h, to_b, to_t,
                        first_b, last_b, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                        HAS_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                        MASK_ALL: tl.constexpr, ADD_GRAD_Q: tl.constexpr):
    """GRAD_K and GRAD_V for BLOCK_K keys of one key head, over all queries of its G query heads. With ADD_GRAD_Q the
    tiles' shares of GRAD_Q, float32, are added to it on the way. One loop: of two, one with the mask, Triton 3.6 made
    wgmma that wait for each other. HAS_FIRST asks for MASK_ALL."""
    tiles = tl.cdiv(Tk, BLOCK_K)
    tile = tl.program_id(0) % tiles
    start_k = tile * BLOCK_K
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h_kv = head // Hkv, head % Hkv
    k = _load_tile(K + b * k_b + h_kv * k_h, start_k, Tk, k_t, BLOCK_K, D, BLOCK_D)
    v = _load_tile(V + b * v_b + h_kv * v_h, start_k, Tk, v_t, BLOCK_K, D, BLOCK_D)
    key = start_k + tl.arange(0, BLOCK_K)
    begin = tl.maximum(start_k - (Tk - Tq), 0) // BLOCK_Q * BLOCK_Q  # the first query at or behind these keys
    end = Tq
    if HAS_FIRST:
        end = tl.load(LAST + b * last_b + tile)
        FIRST += b * first_b

    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    scale_2 = scale * LOG2_E
    for i in range(0, tl.cdiv(end - begin, BLOCK_Q) * G):  # one loop over tiles and heads: nested, it spills registers
        start = begin + i // G * BLOCK_Q
        h = h_kv * G + i % G
        rows = (b * Hkv * G + h) * Tq  # of LSE and DELTA
        query = start + tl.arange(0, BLOCK_Q)
        q = _load_tile(Q + b * q_b + h * q_h, start, Tq, q_t, BLOCK_Q, D, BLOCK_D)
        grad = _load_tile(GRAD + b * grad_b + h * grad_h, start, Tq, grad_t, BLOCK_Q, D, BLOCK_D)
        lse_2 = tl.load(LSE + rows + query, mask=query < Tq, other=INFINITY) * LOG2_E
        delta = tl.load(DELTA + rows + query, mask=query < Tq, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_K, BLOCK_Q)
        p = tl.exp2(scores * scale_2 - lse_2[None, :])
        own = query + (Tk - Tq)
        if (start_k + BLOCK_K > start + Tk - Tq + 1) | MASK_ALL:
            visible = key[:, None] <= own[None, :]
            if HAS_FIRST:
                first = tl.minimum(tl.load(FIRST + query, mask=query < Tq, other=0), own)
                visible = visible & (key[:, None] >= first[None, :])
            p = tl.where(visible, p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_scores = (p * (grad_p - delta[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        if ADD_GRAD_Q:
            share = tl.dot(tl.trans(grad_scores), k, input_precision="ieee") * scale  # (BLOCK_Q, BLOCK_D)
            column = tl.arange(0, BLOCK_D)
            tl.atomic_add(GRAD_Q + ((b * Tq + query[:, None]) * Hkv * G + h) * D + column[None, :], share,
                          mask=(query < Tq)[:, None] & (column < D)[None, :], sem="relaxed")
    _store_tile(GRAD_K + b * to_b + h_kv * D, grad_k * scale, start_k, Tk, to_t, BLOCK_K, D, BLOCK_D)
    _store_tile(GRAD_V + b * to_b + h_kv * D, grad_v, start_k, Tk, to_t, BLOCK_K, D, BLOCK_D)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def _last_query_kernel(FIRST, LAST, Tq, Tk, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program i of a row of FIRST (Tq,): LAST[i] = 1 + the last query that sees a key before (i + 1) * BLOCK_K."""
    tiles = tl.cdiv(Tk, BLOCK_K)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    last = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, Tq, BLOCK):
        query = start + tl.arange(0, BLOCK)
        first = tl.load(FIRST + row * Tq + query, mask=query < Tq, other=Tk)
        sees = (tl.minimum(first, query + (Tk - Tq)) < (tile + 1) * BLOCK_K) & (query < Tq)
        last = tl.where(sees, query + 1, last)
    tl.store(LAST + row * tiles + tile, tl.max(last, axis=0))


@triton.jit
def _load_tile(BASE, start, T, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start ... of BASE (T, D): (ROWS, BLOCK_D), zeros past either end."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = start + row < T
    if D < BLOCK_D:
        mask = mask & (column < D)
    return tl.load(BASE + (tl.cast(start, tl.int64) + row) * stride + column, mask=mask, other=0.0)


@triton.jit
def _store_tile(BASE, tile, start, T, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(BASE + (tl.cast(start, tl.int64) + row) * stride + column, tile.to(BASE.dtype.element_ty),
             mask=(start + row < T) & (column < D))


@triton.jit
def _visible_range(FIRST, start_q, Tq, Tk, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Of each query the key at which it stands and the first that it sees; where the tile's keys start and end."""
    query = start_q + tl.arange(0, BLOCK_Q)
    own = query + (Tk - Tq)
    first = tl.zeros((BLOCK_Q,), tl.int32)
    start_k = 0
    if HAS_FIRST:
        first = tl.minimum(tl.load(FIRST + query, mask=query < Tq, other=Tk), own)
        start_k = tl.maximum(tl.min(first, axis=0), 0) // BLOCK_K * BLOCK_K
    return own, first, start_k, tl.minimum(Tk - Tq + start_q + BLOCK_Q, Tk)
