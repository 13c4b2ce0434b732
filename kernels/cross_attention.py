"""Cross-attention between few learned tokens and many feature tokens.

    S = scale * Q K^T            (N, M) scores of N queries against M keys, per image and head
    P = softmax(S)               each row sums to 1; keys inside the window count as S = -inf
    O = dropout(P) V             (N, D)

The four methods use it with one side short: ROADS's class prompts (10 tokens) and Omni-AD's learnable tokens (64) read
a feature map (up to 64 x 64 tokens) and are read by it; OneNIP's prompt and target are 196 tokens each. So there are
two regimes, and the matrix P exists in neither (who reads what, for one image and head):

    many queries, few keys (M <= 64)               few queries, many keys (and everything larger)

              K, V  (all of them)                              K, V
             +------+                                  +------+------+------+
      Q  0   | P 0  |  -> O rows 0                  Q  | P 0  | P 1  | P 2  |   -> O, in three partial sums
             +------+                                  +------+------+------+
      Q  1   | P 1  |  -> O rows 1                  program 0   1      2        then one kernel merges them
             +------+
      one program per block of queries;             one program per range of keys walks over its blocks with
      one softmax, no rescaling                     the online softmax; few images: more ranges, so more programs

The backward pass mirrors this: it recomputes P from the saved log-sum-exp, and whichever side is short stays on chip
and collects its gradient while the long side streams by once. If both are long, each has a kernel of its own.

Everything below is written per (image, head); a batch of 1 (tokens shared by all images) has batch stride 0 and costs
no copy. Read in this order: the plain PyTorch version, `_few_keys_kernel`, `_many_keys_kernel`, `_merge_kernel`,
`_grad_keys_kernel`, `_grad_queries_kernel`, and how they are launched. kernels/README.md is the guided tour.

What to expect: at these sizes (head width 8 to 64, at most 64 x 4,096 scores) attention is a matter of memory traffic
and launch time, not of arithmetic. `python -m kernels.bench` predicts the bytes, and measures them on a GPU.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .backend import INTERPRET, autocast, tl, triton, use_triton

LOG2E = 1.4426950408889634  # the kernels use exp2 and log2, the GPU's native functions, on scores in units of ln 2
# (is it fp32, BLOCK_D) -> (most queries or keys in one block, warps per program), such that no register spills
TILES = {
    (False, 16): (64, 4), (False, 32): (64, 4), (False, 64): (64, 8), (False, 128): (32, 4),
    (True, 16): (32, 4), (True, 32): (32, 4), (True, 64): (32, 4), (True, 128): (32, 8),
}
PROGRAMS = 256  # split a long side until the launch has about this many programs (a large GPU has 80 to 150 cores)


def cross_attention(q, k, v, *, scale=None, window=None, dropout_p=0.0, seed=None, backend="auto"):
    """Multi-head scaled dot-product attention, softmax(scale * q k^T) v, differentiable in q, k and v.

    q          (B or 1, H, N, D), k and v (B or 1, H, M, D), all of one floating dtype. A batch of 1 is shared by all
               B images (learned tokens). Views are welcome: `.unflatten(-1, (H, D)).transpose(1, 2)` splits the heads.
    scale      default 1 / sqrt(D).
    window     (height, width, radius): queries and keys are the cells of one height x width grid in row-major order,
               and a query may NOT attend to the keys within `radius` rows and `radius` columns of itself (the
               neighbour mask of UniAD and OneNIP; theirs of size n is radius n // 2). A query whose every key is
               forbidden yields zeros.
    dropout_p  each attention weight is zeroed with this probability, the others are scaled by 1 / (1 - dropout_p).
               Pass 0.0 at test time: there is no training flag here.
    seed       what the dropout mask is drawn from. Default: one draw from PyTorch's global CPU generator, so that
               `torch.manual_seed` governs it.
    backend    "auto" (Triton on CUDA tensors, plain PyTorch elsewhere; see `set_backend`), "triton" or "torch".

    Returns (B, H, N, D) in the inputs' dtype. Under autocast the inputs are cast first, as by `torch.matmul`.
    Raises ValueError for shapes, dtypes or options that do not fit, RuntimeError for Triton where it cannot run.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, window, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if dropout_p > 0 and seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    if use_triton(backend, q, _unsupported(q, k)):
        return _CrossAttention.apply(q, k, v, scale, window, dropout_p, seed or 0)
    return cross_attention_torch(q, k, v, scale, window, dropout_p, seed)


def _check(q, k, v, window, dropout_p):
    """Raise ValueError, in one line that says what is wrong, unless the arguments fit each other."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "cross_attention: expected q (B|1, H, N, D) and k, v (B|1, H, M, D), "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] and 1 not in (q.shape[0], k.shape[0]):
        raise ValueError(f"cross_attention: batch {q.shape[0]} of q and {k.shape[0]} of k, v: equal, or one of them 1")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"cross_attention: q, k, v of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"cross_attention: q, k, v on one device, got {q.device}, {k.device}, {v.device}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"cross_attention: dropout_p {dropout_p}: at least 0 and below 1")
    if window is not None:
        height, width, radius = window
        if not q.shape[2] == k.shape[2] == height * width or radius < 0:
            raise ValueError(
                f"cross_attention: window {tuple(window)} (height, width, radius) needs radius >= 0 and "
                f"{height * width} queries and keys, got {q.shape[2]} and {k.shape[2]}"
            )


# --------------------------------------------------------------------------------------------------
# The formula: what every other path is held to
# --------------------------------------------------------------------------------------------------


def attention_formula(q, k, v, scale, forbidden=None):
    """The definition of attention, in five lines. q (B, H, N, D), k and v (B, H, M, D) -> (B, H, N, D).

    forbidden: (N, M) bool, True where a query may not attend to a key; a query without any key yields zeros.
    """
    scores = scale * q @ k.transpose(-2, -1)  # (B, H, N, M)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -math.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a row of -inf alone would be 0 / 0
    return weights @ v


def neighbours(height, width, radius):
    """The neighbour mask of UniAD and OneNIP: (N, N) bool, True where two cells of a height x width grid are at most
    `radius` rows and `radius` columns apart."""
    cell = torch.arange(height * width)
    row, column = cell // width, cell % width
    rows_apart = (row[:, None] - row).abs()  # (N, N)
    columns_apart = (column[:, None] - column).abs()  # (N, N)
    return (rows_apart <= radius) & (columns_apart <= radius)


# --------------------------------------------------------------------------------------------------
# The PyTorch path, taken on CPUs
# --------------------------------------------------------------------------------------------------


def cross_attention_torch(q, k, v, scale, window=None, dropout_p=0.0, seed=None):
    """`cross_attention` in plain PyTorch; same arguments, already checked."""
    bias, empty = None, None
    if window is not None:
        bias, empty = _window_bias(*window, q.dtype, q.device)  # (N, N), (N, 1) | None
    on_cpu = q.device.type == "cpu"
    if dropout_p == 0 and not (on_cpu and q.dtype == torch.bfloat16):
        # one fused call: on CPUs it is faster in fp32 and fp64, and slower in bf16
        batch = max(q.shape[0], k.shape[0])
        q, k, v = (t.expand(batch, -1, -1, -1) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        dtype = q.dtype
        if dtype == torch.float16:  # its scores end at 65,504
            q, k, v = q.float(), k.float(), v.float()
        scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, N, M)
        if bias is not None:
            scores = scores.add_(bias)
        weights = scores.softmax(dim=-1)
        if dropout_p > 0:
            weights = weights * _dropout_keep(weights.shape, dropout_p, seed, q.device)
        # dividing the output here, not the N x M weights, gives the same
        o = (weights @ v / (1 - dropout_p)).to(dtype)  # (B, H, N, D)
    return o if empty is None else o.masked_fill(empty, 0.0)


@functools.lru_cache(maxsize=16)
def _window_bias(height, width, radius, dtype, device):
    """The neighbour mask as a matrix to add to the scores: (N, N), -inf where attention is forbidden, else 0.

    Also the rows without any key left, (N, 1) bool, or None if there are none: their softmax would be 0 / 0, so
    their biases are 0 here and their output is set to 0 afterwards.
    """
    with torch.inference_mode(False):  # cached: what a test run made must serve a training run too
        forbidden = neighbours(height, width, radius).to(device)  # (N, N)
        bias = torch.zeros(forbidden.shape, dtype=dtype, device=device)
        # the cell in the middle has the nearest farthest cell: it is the first to lose all its keys
        if radius < max(height // 2, width // 2):
            return bias.masked_fill(forbidden, -math.inf), None
        empty = forbidden.all(dim=1, keepdim=True)  # (N, 1)
        return bias.masked_fill(forbidden & ~empty, -math.inf), empty


def _dropout_keep(shape, dropout_p, seed, device):
    """True where an attention weight survives dropout, drawn from `seed`; (B, H, N, M) bool.

    `F.dropout` draws one random number per weight, which on CPUs takes longer than the attention itself. Here
    one 64-bit draw decides about four weights, 16 bits each (so dropout_p is rounded to 1 / 65536).
    """
    n = math.prod(shape)
    generator = torch.Generator(device).manual_seed(seed)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return (bits.view(torch.int16)[:n] >= round(dropout_p * 65536) - 32768).view(shape)


# --------------------------------------------------------------------------------------------------------------------
# Triton, forward. Names: n counts queries, m keys, d channels; *_b, *_h, *_n, *_m are strides over images, heads,
# queries, keys. A block of 10 or 196 tokens is padded to a power of two: `m < M` and so on mask what does not exist.
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _pointers(base, offset, rows, stride, d, ALIGN: tl.constexpr):
    """Pointers to columns d of the given rows of a matrix that starts `offset` elements after base.

    64-bit: a row may start more than 2^31 elements after the base. Every row starts at a multiple of ALIGN elements;
    told so, the compiler moves up to 16 bytes per instruction.
    """
    pointers = base + offset + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.multiple_of(pointers, (1, ALIGN * base.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _load_rows(
    base, offset, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr
):
    """Rows `rows` of a (count, D) matrix as a (len(rows), BLOCK_D) tile of type DOT; zeros beyond its edges."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    return tl.load(_pointers(base, offset, rows, stride, d, ALIGN), mask=mask, other=0.0).to(DOT)


@triton.jit
def _store_rows(
    base, offset, rows, stride, count, tile, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Store a (len(rows), BLOCK_D) tile as rows of a (count, D) matrix, in that matrix's type."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    tl.store(_pointers(base, offset, rows, stride, d, ALIGN), tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _forbid(s, n, m, M, width, radius, WINDOW: tl.constexpr):
    """The scores s with -inf for keys that do not exist or lie in the query's window. n, m broadcast to s."""
    allowed = m < M
    if WINDOW:
        rows_apart = tl.abs(n // width - m // width)
        columns_apart = tl.abs(n % width - m % width)
        allowed = allowed & (tl.maximum(rows_apart, columns_apart) > radius)
    return tl.where(allowed, s, -float("inf"))


@triton.jit
def _kept(n, m, M, bh, seed, dropout_p):
    """True where a weight survives dropout. n, m broadcast to the tile.

    Philox turns (seed, position) into random bits without any state, so that the backward kernels, which visit the
    weights in another order, find the same ones dropped.
    """
    position = n * M + m
    bits, _, _, _ = tl.philox(seed, position, position * 0 + bh, position * 0, position * 0)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216)  # 24 bits: every value in [0, 1) exact in fp32
    return uniform >= dropout_p


@triton.jit(do_not_specialize=["seed"])  # one compilation for all seeds
def _few_keys_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    o, o_b, o_h, o_n,  # output (B, H, N, D)
    lse,  # output (B, H, N), fp32: log2 of the sum of 2^score, for the backward pass
    H, N, M,  # heads, queries, keys (M <= BLOCK_M)
    scale_log2,  # scale * log2(e)
    width, radius,  # of the window
    seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """All keys on chip. Program (image and head, block of queries) -> BLOCK_N rows of the output."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_N, BLOCK_D)
    k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
    v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)

    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # (BLOCK_N, BLOCK_M)
    s = _forbid(s, n[:, None], m[None, :], M, width, radius, WINDOW)
    top = tl.max(s, axis=1)
    top = tl.where(top == -float("inf"), 0.0, top)  # a row without keys: -inf - 0, not -inf - -inf = NaN
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, axis=1)
    if DROPOUT:  # after the total: dropout acts on the normalised weights
        p = tl.where(_kept(n[:, None], m[None, :], M, bh, seed, dropout_p), p * (1 / (1 - dropout_p)), 0.0)
    out = tl.dot(p.to(DOT), v_tile, input_precision="ieee")  # (BLOCK_N, BLOCK_D)
    out = out / tl.where(total == 0, 1.0, total)[:, None]  # a row without keys stays 0
    _store_rows(o, b * o_b + h * o_h, n, o_n, N, out, D, BLOCK_D, ALIGN)
    tl.store(lse + bh.to(tl.int64) * N + n, top + tl.log2(total), mask=n < N)


@triton.jit(do_not_specialize=["seed"])  # one compilation for all seeds
def _many_keys_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    o, o_s, o_b, o_h, o_n,  # output (splits, B, H, N, D): each split's own softmax, normalised
    lse, lse_s,  # output (splits, B, H, N), fp32
    H, N, M,  # heads, queries, keys
    chunk,  # keys per split, a multiple of BLOCK_M
    scale_log2,  # scale * log2(e)
    width, radius,  # of the window
    seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """Online softmax. Program (image and head, block of queries, split) -> its queries over its range of keys."""
    bh = tl.program_id(0)
    split = tl.program_id(2).to(tl.int64)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_N, BLOCK_D)

    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # largest score so far
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum of 2^(score - top) so far
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # sum of 2^(score - top) * value so far
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
        v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # (BLOCK_N, BLOCK_M)
        s = _forbid(s, n[:, None], m[None, :], M, width, radius, WINDOW)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key yet: avoid -inf - -inf = NaN
        shrink = tl.exp2(top - safe_top)  # what was summed so far was relative to the old top
        p = tl.exp2(s - safe_top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(_kept(n[:, None], m[None, :], M, bh, seed, dropout_p), p * (1 / (1 - dropout_p)), 0.0)
        out = out * shrink[:, None] + tl.dot(p.to(DOT), v_tile, input_precision="ieee")
        top = new_top

    out = out / tl.where(total == 0, 1.0, total)[:, None]  # a row without keys stays 0
    _store_rows(o, split * o_s + b * o_b + h * o_h, n, o_n, N, out, D, BLOCK_D, ALIGN)
    tl.store(lse + split * lse_s + bh.to(tl.int64) * N + n, top + tl.log2(total), mask=n < N)


@triton.jit
def _merge_kernel(
    parts, parts_s, parts_b, parts_h, parts_n,  # (splits, B, H, N, D) fp32: outputs of the splits
    lses, lses_s,  # (splits, B, H, N) fp32
    o, o_b, o_h, o_n,  # output (B, H, N, D)
    lse,  # output (B, H, N), fp32
    H, N, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sum of the splits' outputs, each weighted by its share of the softmax's denominator, in the order of the splits.

    Program (image and head, block of queries).
    """
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lses += bh.to(tl.int64) * N
    offset = b * parts_b + h * parts_h
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for i in range(0, splits):
        top = tl.maximum(top, tl.load(lses + i * lses_s + n, mask=n < N, other=0.0))
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_N,), tl.float32)
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(0, splits):
        share = tl.exp2(tl.load(lses + i * lses_s + n, mask=n < N, other=0.0) - top)  # (BLOCK_N,)
        total += share
        out += share[:, None] * _load_rows(parts, offset + i * parts_s, n, parts_n, N, D, BLOCK_D, ALIGN, tl.float32)
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    _store_rows(o, b * o_b + h * o_h, n, o_n, N, out, D, BLOCK_D, ALIGN)
    tl.store(lse + bh.to(tl.int64) * N + n, top + tl.log2(total), mask=n < N)


# --------------------------------------------------------------------------------------------------------------------
# Triton, backward. With dP = dO V^T (zero where dropped, else / (1 - dropout_p)):
#     delta = sum_d dO * O = sum_m P * dP         (N,)
#     dS = P * (dP - delta)                       (N, M)
#     dQ = scale * dS K,   dK = scale * dS^T Q,   dV = dropout(P)^T dO
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _delta_kernel(
    o, o_b, o_h, o_n,  # output of the forward pass (B, H, N, D)
    do, do_b, do_h, do_n,  # its gradient (B, H, N, D)
    delta,  # output (B, H, N), fp32
    H, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """delta = sum of dO * O over the channels. Program (image and head, block of queries)."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_tile = _load_rows(o, b * o_b + h * o_h, n, o_n, N, D, BLOCK_D, ALIGN, tl.float32)
    do_tile = _load_rows(do, b * do_b + h * do_h, n, do_n, N, D, BLOCK_D, ALIGN, tl.float32)
    tl.store(delta + bh.to(tl.int64) * N + n, tl.sum(o_tile * do_tile, axis=1), mask=n < N)


@triton.jit(do_not_specialize=["seed"])  # one compilation for all seeds
def _grad_keys_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    do, do_b, do_h, do_n,  # gradient of the output (B, H, N, D)
    lse, delta,  # (B, H, N) fp32
    dq, dq_b, dq_h, dq_n,  # output (B, H, N, D), written only if ALL_KEYS
    dk, dv, dk_s, dk_b, dk_h, dk_m,  # outputs (splits, B, H, M, D), same strides
    H, N, M, chunk,  # chunk: queries per split, a multiple of BLOCK_N
    scale, scale_log2, width, radius, seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    ALL_KEYS: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """dK and dV. Program (image and head, block of keys, split) keeps its keys while its range of queries streams by.

    If its block holds all keys (ALL_KEYS), dS has all columns, and dQ falls out of the same pass. The tiles are
    kept transposed, (keys, queries), since that is how the two sums over the queries need them.
    """
    bh = tl.program_id(0)
    split = tl.program_id(2).to(tl.int64)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
    v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
    lse += bh.to(tl.int64) * N
    delta += bh.to(tl.int64) * N

    dk_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_N, BLOCK_D)
        do_tile = _load_rows(do, b * do_b + h * do_h, n, do_n, N, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_N, BLOCK_D)
        lse_row = tl.load(lse + n, mask=n < N, other=0.0)
        lse_row = tl.where(lse_row == -float("inf"), 0.0, lse_row)  # a query without keys
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
        s = _forbid(s, n[None, :], m[:, None], M, width, radius, WINDOW)
        p = tl.exp2(s - lse_row[None, :])
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        dropped = p  # dropout(P)
        if DROPOUT:
            kept = _kept(n[None, :], m[:, None], M, bh, seed, dropout_p)
            dropped = tl.where(kept, p * (1 / (1 - dropout_p)), 0.0)
            dp = tl.where(kept, dp * (1 / (1 - dropout_p)), 0.0)
        dv_tile += tl.dot(dropped.to(DOT), do_tile, input_precision="ieee")
        ds = (p * (dp - tl.load(delta + n, mask=n < N, other=0.0)[None, :])).to(DOT)
        dk_tile += tl.dot(ds, q_tile, input_precision="ieee")
        if ALL_KEYS:
            dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision="ieee") * scale
            _store_rows(dq, b * dq_b + h * dq_h, n, dq_n, N, dq_tile, D, BLOCK_D, ALIGN)
    offset = split * dk_s + b * dk_b + h * dk_h
    _store_rows(dk, offset, m, dk_m, M, dk_tile * scale, D, BLOCK_D, ALIGN)
    _store_rows(dv, offset, m, dk_m, M, dv_tile, D, BLOCK_D, ALIGN)


@triton.jit(do_not_specialize=["seed"])  # one compilation for all seeds
def _grad_queries_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    do, do_b, do_h, do_n,  # gradient of the output (B, H, N, D)
    lse, delta,  # (B, H, N) fp32
    dq, dq_s, dq_b, dq_h, dq_n,  # output (splits, B, H, N, D)
    dk, dv, dk_b, dk_h, dk_m,  # outputs (B, H, M, D), same strides, written only if ALL_QUERIES
    H, N, M, chunk,  # chunk: keys per split, a multiple of BLOCK_M
    scale, scale_log2, width, radius, seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    ALL_QUERIES: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """dQ, the mirror image: program (image and head, block of queries, split) keeps its queries, keys stream by.

    If its block holds all queries (ALL_QUERIES), dS has all rows, and dK and dV fall out of the same pass.
    """
    bh = tl.program_id(0)
    split = tl.program_id(2).to(tl.int64)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_N, BLOCK_D)
    do_tile = _load_rows(do, b * do_b + h * do_h, n, do_n, N, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_N, BLOCK_D)
    lse_row = tl.load(lse + bh.to(tl.int64) * N + n, mask=n < N, other=0.0)
    lse_row = tl.where(lse_row == -float("inf"), 0.0, lse_row)  # a query without keys
    delta_row = tl.load(delta + bh.to(tl.int64) * N + n, mask=n < N, other=0.0)

    dq_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
        v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)  # (BLOCK_M, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # (BLOCK_N, BLOCK_M)
        s = _forbid(s, n[:, None], m[None, :], M, width, radius, WINDOW)
        p = tl.exp2(s - lse_row[:, None])
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        dropped = p  # dropout(P)
        if DROPOUT:
            kept = _kept(n[:, None], m[None, :], M, bh, seed, dropout_p)
            dropped = tl.where(kept, p * (1 / (1 - dropout_p)), 0.0)
            dp = tl.where(kept, dp * (1 / (1 - dropout_p)), 0.0)
        ds = (p * (dp - delta_row[:, None])).to(DOT)
        dq_tile += tl.dot(ds, k_tile, input_precision="ieee")
        if ALL_QUERIES:
            offset = b * dk_b + h * dk_h
            dk_tile = tl.dot(tl.trans(ds), q_tile, input_precision="ieee") * scale
            dv_tile = tl.dot(tl.trans(dropped.to(DOT)), do_tile, input_precision="ieee")
            _store_rows(dk, offset, m, dk_m, M, dk_tile, D, BLOCK_D, ALIGN)
            _store_rows(dv, offset, m, dk_m, M, dv_tile, D, BLOCK_D, ALIGN)
    _store_rows(dq, split * dq_s + b * dq_b + h * dq_h, n, dq_n, N, dq_tile * scale, D, BLOCK_D, ALIGN)


@triton.jit
def _sum_parts_kernel(
    parts,  # (P, L) fp32
    out,  # output (L,)
    P, L,
    BLOCK: tl.constexpr,
):
    """Sum of P partial gradients, always in the same order, so that every run gives the same bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, P):
        total += tl.load(parts + i, mask=i < L, other=0.0)
        parts += L
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < L)


# --------------------------------------------------------------------------------------------------------------------
# Launching the kernels
# --------------------------------------------------------------------------------------------------------------------


def _unsupported(q, k):
    """What the kernels cannot do with these inputs, in words, or None."""
    longest = max(q.shape[2], k.shape[2])
    if q.numel() == 0 or k.numel() == 0:
        return f"cross_attention takes no empty tensors, got q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"cross_attention takes float32, float16 or bfloat16, got {q.dtype}"
    if not 8 <= q.shape[3] <= 128:
        return f"cross_attention takes heads of width 8 to 128, got {q.shape[3]}"
    if longest > 16384:
        return f"cross_attention takes up to 16,384 queries and keys, got {longest}"


def _tiles(q, k, *others):
    """(BLOCK_N, BLOCK_M, what all kernels share, the tensor cores' type): fixed rules and no autotuning, so that every
    run gives the same bits. A side of up to `side` tokens is one block, and stays on chip as a whole.
    """
    D = q.shape[3]
    block_d = max(16, triton.next_power_of_2(D))  # tl.dot wants at least 16
    side, warps = TILES[q.dtype == torch.float32, block_d]
    block_n, block_m = (max(16, min(side, triton.next_power_of_2(x.shape[2]))) for x in (q, k))
    tensors = (q, k, *others)
    align = math.gcd(16, D, *(n for x in tensors for n in (*x.stride()[:3], x.data_ptr() // x.element_size())))
    # the interpreter cannot multiply bf16 matrices; on a GPU the tensor cores take the inputs' type
    dot = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[q.dtype]
    dot = tl.float32 if INTERPRET and q.dtype == torch.bfloat16 else dot
    return block_n, block_m, dict(D=D, BLOCK_D=block_d, ALIGN=align, num_warps=warps), dot


def _splits(programs, length, block):
    """(splits, tokens per split): cut a side of `length` tokens until the launch has about PROGRAMS programs."""
    blocks = triton.cdiv(length, block)
    per_split = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // programs)))
    return triton.cdiv(blocks, per_split), per_split * block


def _empty(*shape, like, dtype=None):
    """An uninitialised (..., H, N, D) tensor, stored as (..., N, H, D) so that merging the heads later is no copy."""
    *batch, H, N, D = shape
    return torch.empty(*batch, N, H, D, dtype=dtype or like.dtype, device=like.device).transpose(-3, -2)


def _rows(x):
    """What a kernel needs to know of a (B|1, H, N, D) tensor: itself and its strides, 0 over a shared batch of 1."""
    return x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2)


def forward_triton(q, k, v, scale, window, dropout_p, seed):
    """Output (B, H, N, D) and log2-sum-exp2 (B, H, N) of `cross_attention`; arguments already checked."""
    (B, H, N, D), M = q.shape, k.shape[2]
    B = max(B, k.shape[0])
    block_n, block_m, tile, dot = _tiles(q, k, v)
    _, width, radius = window or (0, 1, 0)
    flags = dict(**tile, BLOCK_N=block_n, BLOCK_M=block_m, WINDOW=window is not None, DROPOUT=dropout_p > 0, DOT=dot)
    o = _empty(B, H, N, D, like=q)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    query_blocks = triton.cdiv(N, block_n)
    inputs = (*_rows(q), *_rows(k), *_rows(v))
    if M <= block_m:
        _few_keys_kernel[(B * H, query_blocks)](
            *inputs, *_rows(o), lse, H, N, M, scale * LOG2E, width, radius, seed, dropout_p, **flags
        )
        return o, lse
    splits, chunk = _splits(B * H * query_blocks, M, block_m)
    if splits == 1:
        parts, lses = o[None], lse[None]
    else:
        parts = _empty(splits, B, H, N, D, like=q, dtype=torch.float32)
        lses = torch.empty(splits, B, H, N, dtype=torch.float32, device=q.device)
    _many_keys_kernel[(B * H, query_blocks, splits)](
        *inputs, parts, *parts.stride()[:4], lses, lses.stride(0), H, N, M, chunk, scale * LOG2E, width, radius, seed,
        dropout_p, **flags,
    )
    if splits > 1:
        _merge_kernel[(B * H, query_blocks)](
            parts, *parts.stride()[:4], lses, lses.stride(0), *_rows(o), lse, H, N, splits, **tile, BLOCK_N=block_n
        )
    return o, lse


def backward_triton(do, q, k, v, o, lse, scale, window, dropout_p, seed):
    """Gradients of q, k and v, from that of the output, do (B, H, N, D)."""
    (B, H, N, _), M = o.shape, k.shape[2]
    block_n, block_m, tile, dot = _tiles(q, k, v, do)
    _, width, radius = window or (0, 1, 0)
    flags = dict(**tile, BLOCK_N=block_n, BLOCK_M=block_m, WINDOW=window is not None, DROPOUT=dropout_p > 0, DOT=dot)
    numbers = (scale, scale * LOG2E, width, radius, seed, dropout_p)
    query_blocks, key_blocks = triton.cdiv(N, block_n), triton.cdiv(M, block_m)
    delta = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    _delta_kernel[(B * H, query_blocks)](*_rows(o), *_rows(do), delta, H, N, **tile, BLOCK_N=block_n)
    inputs = (*_rows(q), *_rows(k), *_rows(v), *_rows(do), lse, delta)

    all_keys = key_blocks == 1
    all_queries = query_blocks == 1 and not all_keys
    # if both sides are long, the compiler would rather spill a few registers than run fewer programs at once: forbid it
    registers = None if all_keys or all_queries else 255
    query_splits, query_chunk = _splits(B * H * key_blocks, N, block_n)
    key_splits, key_chunk = _splits(B * H * query_blocks, M, block_m)
    # one partial gradient per split, and per image where all images share the tokens
    dq, dq_parts = _gradient(q, B, 1 if all_keys else key_splits)
    dk, dk_parts = _gradient(k, B, 1 if all_queries else query_splits)
    dv, dv_parts = _gradient(v, B, 1 if all_queries else query_splits)
    if not all_queries:
        _grad_keys_kernel[(B * H, key_blocks, query_splits)](
            *inputs, dq_parts, *dq_parts.stride()[1:4], dk_parts, dv_parts, *dk_parts.stride()[:4],
            H, N, M, query_chunk, *numbers, ALL_KEYS=all_keys, maxnreg=registers, **flags,
        )
    if not all_keys:
        _grad_queries_kernel[(B * H, query_blocks, key_splits)](
            *inputs, dq_parts, *dq_parts.stride()[:4], dk_parts, dv_parts, *dk_parts.stride()[1:4],
            H, N, M, key_chunk, *numbers, ALL_QUERIES=all_queries, maxnreg=registers, **flags,
        )
    for gradient, parts in ((dq, dq_parts), (dk, dk_parts), (dv, dv_parts)):
        count, length = parts.shape[0] * parts.shape[1] // gradient.shape[0], gradient.numel()
        if count > 1:
            _sum_parts_kernel[(triton.cdiv(length, 1024),)](parts, gradient, count, length, BLOCK=1024)
    return dq, dk, dv


def _gradient(x, B, splits):
    """(gradient of x, buffer (splits, B, H, N, D) for its parts); one part is written to the gradient itself."""
    gradient = _empty(*x.shape, like=x)
    if splits == 1 and x.shape[0] == B:
        return gradient, gradient[None]
    return gradient, _empty(splits, B, *x.shape[1:], like=x, dtype=torch.float32)


class _CrossAttention(torch.autograd.Function):
    """Saves inputs, output and log-sum-exp; the weights are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, *options):
        # the kernels walk along channels with stride 1: true for split heads, a copy for anything else
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        with torch.cuda.device_of(q):
            o, lse = forward_triton(q, k, v, *options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        do = do if do.stride(3) == 1 else do.contiguous()
        with torch.cuda.device_of(do):
            dq, dk, dv = backward_triton(do, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None, None, None
