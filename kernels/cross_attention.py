"""Cross-attention between few learned tokens and many feature tokens.

    S = scale * Q K^T        (N, M) scores of N queries against M keys, per image and head
    P = softmax(S)           each row sums to 1; keys inside the window count as S = -inf
    O = dropout(P) V         (N, D)

The four methods use it with one side short: ROADS's class prompts (10 tokens) and Omni-AD's
learnable tokens (64) read a feature map (up to 64 x 64 tokens) and are read by it; OneNIP's prompt
and target are 196 tokens each. So there are two regimes, and the matrix P exists in neither (who
reads what, for one image and head):

    few keys: they fit into one block           many keys

              K, V  (all of them)                              K, V
             +------+                                  +------+------+------+
      Q  0   | P 0  |  -> O rows 0                  Q  | P 0  | P 1  | P 2  |   -> O, in three sums
             +------+                                  +------+------+------+
      Q  1   | P 1  |  -> O rows 1                  program 0   1      2   then a kernel merges them
             +------+
      one program per block of queries;             one program per range of keys walks over it
      one softmax, no rescaling                     with the online softmax; few images: more ranges

`TILES` says how many tokens fit into one block: 64 for heads of width up to 64 in half precision
and up to 16 in fp32, so that Omni-AD's 64 tokens are few keys in half precision and, in the two
larger of its four stages, in fp32; elsewhere 32, where ROADS's 10 are.

The backward pass mirrors this: it recomputes P from each row's saved largest score and sum, and
whichever side is short stays on chip and collects its gradient while the long side streams by
once. If both are long, each has a kernel of its own.

Everything below is written per (image, head); a batch of 1 (tokens shared by all images) has batch
stride 0 and costs no copy. Read in this order: `attention_formula`, `_few_keys_kernel`,
`_many_keys_kernel`, `_merge_kernel`, `_grad_keys_kernel`, `_grad_queries_kernel`, and how they are
launched. kernels/README.md is the guided tour.

What to expect: the bytes that must move are few, and only ROADS, with 10 tokens on one side, is
bound by them. Omni-AD and OneNIP do more exponentials, instructions and (with dropout) random
numbers than bytes, and all of it lasts about as long as a few launches. `python -m kernels.bench`
predicts the bytes, `python -m kernels.check` measures on a GPU.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .backend import (
    INTERLEAVE, INTERPRET, NO_CUDA_GRAPH, VERSION, autocast, compare, cores, opaque, tl, trial,
    trial_tensors, triton, use_triton,
)

LOG2E = 1.4426950408889634  # the kernels use exp2, the GPU's native function
# (is it fp32, BLOCK_D) -> (most queries or keys in one block, warps), such that no register spills
TILES = {
    (False, 16): (64, 4), (False, 32): (64, 4), (False, 64): (64, 8), (False, 128): (32, 4),
    (True, 16): (64, 8), (True, 32): (32, 4), (True, 64): (32, 8), (True, 128): (16, 8),
}
if VERSION == (3, 2):  # its compiler, that of PyTorch 2.6, dies of the larger tile on an H100
    TILES[False, 64] = (32, 4)
WARPS_PER_CORE = 16  # split a long side until each core of the card has so many warps, which fill
# its 65,536 registers with 128 a thread,
BLOCKS_PER_SPLIT = 4  # but leave each program at least this many blocks to walk over


def cross_attention(
    q, k, v, *, scale=None, window=None, dropout_p=0.0, seed=None, backend="auto"
):
    """Multi-head scaled dot-product attention, softmax(scale * q k^T) v, differentiable in q, k
    and v.

    q          (B or 1, H, N, D), k and v (B or 1, H, M, D), all of one floating dtype. A batch of
               1 is shared by all B images (learned tokens). Views are welcome:
               `.unflatten(-1, (H, D)).transpose(1, 2)` splits the heads.
    scale      default 1 / sqrt(D).
    window     (height, width, radius): queries and keys are the cells of one height x width grid
               in row-major order, and a query may NOT attend to the keys within `radius` rows and
               `radius` columns of itself (the neighbour mask of UniAD and OneNIP; theirs of size n
               is radius n // 2). A query whose every key is forbidden yields zeros.
    dropout_p  each attention weight is zeroed with this probability, the others are scaled by
               1 / (1 - dropout_p). Pass 0.0 at test time: there is no training flag here.
    seed       an int, what the dropout mask is drawn from. Default: one draw from PyTorch's global
               CPU generator, so that `torch.manual_seed` governs it.
    backend    "auto" (Triton on CUDA tensors where it works, plain PyTorch elsewhere; see
               `set_backend`), "triton" or "torch".

    Returns (B, H, N, D) in the inputs' dtype. Under autocast the inputs are cast first, as by
    `torch.matmul`. Raises ValueError for shapes, dtypes or options that do not fit, RuntimeError
    for Triton where it cannot run.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, scale, window, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    window = [] if window is None else list(window)
    seed = _seed(seed, dropout_p)
    # HxNxMxD, as `kernels.check` names it
    shape = "x".join(map(str, (*q.shape[1:3], *k.shape[2:])))
    if use_triton(backend, "cross_attention", q, _unsupported(q, k), shape):
        # torch.compile wants an autograd.Function's arguments to differ from each other
        q = q.view_as(q) if q is k or q is v else q
        v = v.view_as(v) if v is k else v
        if seed is not None:  # the kernels read it there, so a CUDA graph draws anew at each replay
            seed = seed.to(q.device, non_blocking=True)
        return _CrossAttention.apply(q, k, v, seed, scale, window, dropout_p)
    return cross_attention_torch(q, k, v, scale, window, dropout_p, seed)


def _seed(seed, dropout_p):
    """The seed as a tensor, int64, (): torch.compile can pass that along, as it cannot a drawn int.
    None without dropout."""
    if dropout_p == 0:
        return None
    return torch.randint(2**31 - 1, ()) if seed is None else torch.tensor(seed)


def _check(q, k, v, scale, window, dropout_p):
    """Raise ValueError, in one line that says what is wrong, unless the arguments fit each
    other."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    same_heads = q.ndim == k.ndim == 4 and q.shape[1::2] == k.shape[1::2]
    if not same_heads or k.shape != v.shape:
        raise ValueError(
            f"cross_attention: expected q (B|1, H, N, D) and k, v (B|1, H, M, D), {shapes}"
        )
    if q.shape[0] != k.shape[0] and 1 not in (q.shape[0], k.shape[0]):
        raise ValueError(
            f"cross_attention: batch {q.shape[0]} of q and {k.shape[0]} of k, v: "
            "equal, or one of them 1"
        )
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"cross_attention: nothing to attend to, {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"cross_attention: q, k, v of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"cross_attention: q, k, v on one device, got {q.device}, {k.device}, {v.device}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"cross_attention: scale {scale}: a number above 0")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"cross_attention: dropout_p {dropout_p}: at least 0 and below 1")
    if window is not None:
        height, width, radius = window
        if not q.shape[2] == k.shape[2] == height * width or radius < 0:
            raise ValueError(
                f"cross_attention: window {tuple(window)} (height, width, radius) needs "
                f"radius >= 0 and {height * width} queries and keys, "
                f"got {q.shape[2]} and {k.shape[2]}"
            )


# --------------------------------------------------------------------------------------------------
# The formula: what every other path is held to
# --------------------------------------------------------------------------------------------------


def attention_formula(q, k, v, scale, forbidden=None):
    """The definition of attention, in five lines. q (B, H, N, D), k and v (B, H, M, D) -> (B, H,
    N, D).

    forbidden: (N, M) bool, True where a query may not attend to a key; a query without any key
    yields zeros.
    """
    scores = scale * q @ k.transpose(-2, -1)  # (B, H, N, M)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -math.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a row of -inf alone would be 0 / 0
    return weights @ v


def neighbours(height, width, radius):
    """The neighbour mask of UniAD and OneNIP: (N, N) bool, True where two cells of a height x
    width grid are at most `radius` rows and `radius` columns apart."""
    cell = torch.arange(height * width)
    row, column = cell // width, cell % width
    rows_apart = (row[:, None] - row).abs()  # (N, N)
    columns_apart = (column[:, None] - column).abs()  # (N, N)
    return (rows_apart <= radius) & (columns_apart <= radius)


# --------------------------------------------------------------------------------------------------
# The PyTorch path, taken on CPUs
# --------------------------------------------------------------------------------------------------


def cross_attention_torch(q, k, v, scale, window, dropout_p, seed):
    """`cross_attention` in plain PyTorch; same arguments, already checked."""
    bias, empty = None, None
    if window:
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
            weights = weights * _dropout_keep(weights, dropout_p, seed)
        # dividing the output here, not the N x M weights, gives the same
        o = (weights @ v / (1 - dropout_p)).to(dtype)  # (B, H, N, D)
    return o if empty is None else o.masked_fill(empty, 0.0)


@functools.lru_cache(maxsize=16)
def _window_bias(height, width, radius, dtype, device):
    """The neighbour mask as a matrix to add to the scores: (N, N), -inf where attention is
    forbidden, else 0.

    Also the rows without any key left, (N, 1) bool, or None if there are none: their softmax would
    be 0 / 0, so their biases are 0 here and their output is set to 0 afterwards.
    """
    with torch.inference_mode(False):  # cached: what a test run made must serve a training run too
        forbidden = neighbours(height, width, radius).to(device)  # (N, N)
        bias = torch.zeros(forbidden.shape, dtype=dtype, device=device)
        # the cell in the middle has the nearest farthest cell: it is the first to lose all its keys
        if radius < max(height // 2, width // 2):
            return bias.masked_fill(forbidden, -math.inf), None
        empty = forbidden.all(dim=1, keepdim=True)  # (N, 1)
        return bias.masked_fill(forbidden & ~empty, -math.inf), empty


def _keep_shapes(weights, dropout_p, seed):
    return torch.empty_like(weights, dtype=torch.bool, memory_format=torch.contiguous_format)


@opaque("(Tensor weights, float dropout_p, Tensor seed) -> Tensor", _keep_shapes, NO_CUDA_GRAPH)
def _dropout_keep(weights, dropout_p, seed):
    """True where an attention weight survives dropout, drawn from `seed`; (B, H, N, M) bool.

    `F.dropout` draws one random number per weight, which on CPUs takes longer than the attention
    itself. Here one 64-bit draw decides about four weights, 16 bits each (so dropout_p is rounded
    to 1 / 65536).
    """
    n = weights.numel()
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=weights.device)
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    bits.random_(-(2**63), None, generator=generator)
    dropped = min(round(dropout_p * 65536), 65535)  # of 65536: so many int16 lie below the threshold
    keep = bits.view(torch.int16)[:n] >= dropped - 32768
    return keep.view(weights.shape)


# --------------------------------------------------------------------------------------------------
# Triton, forward. Names: n counts queries, m keys, d channels; *_b, *_h, *_n, *_m are strides over
# images, heads, queries, keys. A block of 10 or 196 tokens is padded to a power of two: `m < M`
# and so on mask what does not exist.
# --------------------------------------------------------------------------------------------------


@triton.jit
def _pointers(base, offset, rows, stride, d, ALIGN: tl.constexpr):
    """Pointers to columns d of the given rows of a matrix that starts `offset` elements after base.

    64-bit: a row may start more than 2^31 elements after the base. Every row starts at a multiple
    of ALIGN elements; told so, the compiler moves up to 16 bytes per instruction.
    """
    pointers = base + offset + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.multiple_of(pointers, (1, ALIGN * base.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _load_rows(
    base, offset, rows, stride, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
):
    """Rows of a (count, D) matrix as a (len(rows), BLOCK_D) tile of type DOT; zeros beyond its
    edges."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    tile = tl.load(_pointers(base, offset, rows, stride, d, ALIGN), mask=mask, other=0.0)
    return tile.to(DOT)


@triton.jit
def _store_rows(
    base, offset, rows, stride, count, tile,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):
    """Store a (len(rows), BLOCK_D) tile as rows of a (count, D) matrix, in that matrix's type."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    pointers = _pointers(base, offset, rows, stride, d, ALIGN)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _forbid(s, n, m, M, width, radius, WINDOW: tl.constexpr):
    """The scores s with -inf for keys that do not exist or lie in the query's window.

    n and m broadcast to s.
    """
    allowed = m < M
    if WINDOW:
        rows_apart = tl.abs(n // width - m // width)
        columns_apart = tl.abs(n % width - m % width)
        allowed = allowed & (tl.maximum(rows_apart, columns_apart) > radius)
    return tl.where(allowed, s, -float("inf"))


@triton.jit
def _kept(n, first_m, M, bh, seed, dropout_p, BLOCK_M: tl.constexpr):
    """True where the weights of queries n and keys first_m, ... survive dropout: (BLOCK_N,
    BLOCK_M).

    seed points to an int64. Philox turns (seed, position) into random bits without any state, so
    that the backward kernels, which visit the weights in another order, find the same ones
    dropped. It gives four words at a time, for four keys that follow each other; first_m is a
    multiple of four. Interleaving lays them out side by side: a c a c ... and b d b d ... become
    a b c d a b c d ... Where the compiler cannot do that, every weight draws all four words and
    keeps its own.
    """
    key = tl.load(seed)
    if INTERLEAVE:
        four = first_m // 4 + tl.arange(0, BLOCK_M // 4)
        position = n[:, None] * tl.cdiv(M, 4) + four[None, :]
        zero = position * 0
        a, b, c, d = tl.philox(key, position, zero + bh, zero, zero)  # (BLOCK_N, BLOCK_M / 4) each
        bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # (BLOCK_N, BLOCK_M)
    else:
        m = first_m + tl.arange(0, BLOCK_M)[None, :]
        position = n[:, None] * tl.cdiv(M, 4) + m // 4
        zero = position * 0
        a, b, c, d = tl.philox(key, position, zero + bh, zero, zero)  # (BLOCK_N, BLOCK_M) each
        ab, cd = tl.where(m % 4 == 0, a, b), tl.where(m % 4 == 2, c, d)
        bits = tl.where(m % 4 < 2, ab, cd)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216)  # 24 bits: all of [0, 1) exact in fp32
    return uniform >= dropout_p


@triton.jit
def _drop(p, kept, dropout_p):
    """dropout(p)."""
    return tl.where(kept, p * (1 / (1 - dropout_p)), 0.0)


@triton.jit
def _few_keys_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    o, o_b, o_h, o_n,  # output (B, H, N, D)
    tops, totals,  # outputs (B, H, N), fp32, for the backward pass: see `attention_triton`
    H, N, M,  # heads, queries, keys (M <= BLOCK_M)
    scale_log2,  # scale * log2(e)
    width, radius,  # of the window
    seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """All keys on chip. Program (image and head, block of queries) -> BLOCK_N rows of the
    output."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # (BLOCK_N, BLOCK_D)
    q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)
    # (BLOCK_M, BLOCK_D) each
    k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)
    v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)

    # (BLOCK_N, BLOCK_M)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    s = _forbid(s, n[:, None], m[None, :], M, width, radius, WINDOW)
    top = tl.max(s, axis=1)
    # a row without keys: -inf - 0, not -inf - -inf = NaN
    top = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2((s - top[:, None]) * scale_log2)
    total = tl.sum(p, axis=1)
    if DROPOUT:  # after the total: dropout acts on the normalised weights
        p = _drop(p, _kept(n, 0, M, bh, seed, dropout_p, BLOCK_M), dropout_p)
    out = tl.dot(p.to(DOT), v_tile, input_precision="ieee")  # (BLOCK_N, BLOCK_D)
    out = out / tl.where(total == 0, 1.0, total)[:, None]  # a row without keys stays 0
    _store_rows(o, b * o_b + h * o_h, n, o_n, N, out, D, BLOCK_D, ALIGN)
    tl.store(tops + bh.to(tl.int64) * N + n, top, mask=n < N)
    tl.store(totals + bh.to(tl.int64) * N + n, total, mask=n < N)


@triton.jit
def _many_keys_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    o, o_s, o_b, o_h, o_n,  # output (splits, B, H, N, D): each split's own softmax, normalised
    tops, totals, tops_s,  # outputs (splits, B, H, N), fp32, same strides: as above
    H, N, M,  # heads, queries, keys
    chunk,  # keys per split, a multiple of BLOCK_M
    scale_log2,  # scale * log2(e)
    width, radius,  # of the window
    seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """Online softmax. Program (image and head, block of queries, split): queries over a range of
    keys."""
    bh = tl.program_id(0)
    split = tl.program_id(2).to(tl.int64)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D)
    q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)

    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # largest score so far
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum of e^(score - top) so far
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # sum of e^(score - top) * value so far
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        # (BLOCK_M, BLOCK_D) each
        k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)
        v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)
        # (BLOCK_N, BLOCK_M)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        s = _forbid(s, n[:, None], m[None, :], M, width, radius, WINDOW)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key yet: avoid -inf - -inf
        # what was summed so far was relative to the old top
        shrink = tl.exp2((top - safe_top) * scale_log2)
        p = tl.exp2((s - safe_top[:, None]) * scale_log2)
        total = total * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            p = _drop(p, _kept(n, start, M, bh, seed, dropout_p, BLOCK_M), dropout_p)
        out = out * shrink[:, None] + tl.dot(p.to(DOT), v_tile, input_precision="ieee")
        top = new_top

    out = out / tl.where(total == 0, 1.0, total)[:, None]  # a row without keys stays 0
    _store_rows(o, split * o_s + b * o_b + h * o_h, n, o_n, N, out, D, BLOCK_D, ALIGN)
    row = split * tops_s + bh.to(tl.int64) * N + n
    tl.store(tops + row, top, mask=n < N)
    tl.store(totals + row, total, mask=n < N)


@triton.jit
def _merge_kernel(
    parts, parts_s, parts_b, parts_h, parts_n,  # (splits, B, H, N, D) fp32: outputs of the splits
    part_tops, part_totals, part_s,  # (splits, B, H, N) fp32, same strides
    o, o_b, o_h, o_n,  # output (B, H, N, D)
    tops, totals,  # outputs (B, H, N), fp32
    H, N, splits, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sum of the splits' outputs, each weighted by its share of the softmax's denominator, in
    order.

    Program (image and head, block of queries).
    """
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = bh.to(tl.int64) * N + n
    offset = b * parts_b + h * parts_h
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for i in range(0, splits):
        top = tl.maximum(top, tl.load(part_tops + i * part_s + row, mask=n < N, other=0.0))
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_N,), tl.float32)
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(0, splits):
        part_top = tl.load(part_tops + i * part_s + row, mask=n < N, other=0.0)
        part_total = tl.load(part_totals + i * part_s + row, mask=n < N, other=0.0)
        share = part_total * tl.exp2((part_top - top) * scale_log2)  # (BLOCK_N,)
        total += share
        tile = _load_rows(parts, offset + i * parts_s, n, parts_n, N, D, BLOCK_D, ALIGN, tl.float32)
        out += share[:, None] * tile
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    _store_rows(o, b * o_b + h * o_h, n, o_n, N, out, D, BLOCK_D, ALIGN)
    tl.store(tops + row, top, mask=n < N)
    tl.store(totals + row, total, mask=n < N)


# --------------------------------------------------------------------------------------------------
# Triton, backward. With dP = dO V^T (zero where dropped, else / (1 - dropout_p)):
#     delta = sum_d dO * O = sum_m P * dP         (N,)
#     dS = P * (dP - delta)                       (N, M)
#     dQ = scale * dS K,   dK = scale * dS^T Q,   dV = dropout(P)^T dO
# --------------------------------------------------------------------------------------------------


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


@triton.jit
def _softmax_rows(tops, totals, delta, bh, n, N):
    """Of queries n: largest score, 1 / sum, and delta.

    A query without keys has the largest score -inf and the sum 0. With a large negative number
    instead, its weights become 2^-inf = 0. All other sums are at least 1: the largest score adds
    2^0.
    """
    row = bh.to(tl.int64) * N + n
    top = tl.maximum(tl.load(tops + row, mask=n < N, other=0.0), -1e30)
    total = tl.maximum(tl.load(totals + row, mask=n < N, other=0.0), 1.0)
    return top, 1 / total, tl.load(delta + row, mask=n < N, other=0.0)


@triton.jit
def _grad_keys_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    do, do_b, do_h, do_n,  # gradient of the output (B, H, N, D)
    tops, totals, delta,  # (B, H, N) fp32
    dq, dq_b, dq_h, dq_n,  # output (B, H, N, D), written only if ALL_KEYS
    dk, dv, dk_s, dk_b, dk_h, dk_m,  # outputs (splits, B, H, M, D), same strides
    H, N, M, chunk,  # chunk: queries per split, a multiple of BLOCK_N
    scale, scale_log2, width, radius, seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    ALL_KEYS: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """dK and dV. Program (image and head, block of keys, split) keeps its keys, its queries stream
    by.

    If its block holds all keys (ALL_KEYS), dS has all columns, and dQ falls out of the same pass.
    The tiles are kept transposed, (keys, queries), since that is how the two sums over the queries
    need them.
    """
    bh = tl.program_id(0)
    split = tl.program_id(2).to(tl.int64)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    first_m = tl.program_id(1) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    # (BLOCK_M, BLOCK_D) each
    k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)
    v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)

    dk_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # (BLOCK_N, BLOCK_D) each
        q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)
        do_tile = _load_rows(do, b * do_b + h * do_h, n, do_n, N, D, BLOCK_D, ALIGN, DOT)
        top, inverse, delta_row = _softmax_rows(tops, totals, delta, bh, n, N)
        # (BLOCK_M, BLOCK_N)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        s = _forbid(s, n[None, :], m[:, None], M, width, radius, WINDOW)
        p = tl.exp2((s - top[None, :]) * scale_log2) * inverse[None, :]
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        dropped = p  # dropout(P)
        if DROPOUT:
            kept = tl.trans(_kept(n, first_m, M, bh, seed, dropout_p, BLOCK_M))
            dropped = _drop(p, kept, dropout_p)
            dp = _drop(dp, kept, dropout_p)
        dv_tile += tl.dot(dropped.to(DOT), do_tile, input_precision="ieee")
        ds = (p * (dp - delta_row[None, :])).to(DOT)
        dk_tile += tl.dot(ds, q_tile, input_precision="ieee")
        if ALL_KEYS:
            dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision="ieee") * scale
            _store_rows(dq, b * dq_b + h * dq_h, n, dq_n, N, dq_tile, D, BLOCK_D, ALIGN)
    offset = split * dk_s + b * dk_b + h * dk_h
    _store_rows(dk, offset, m, dk_m, M, dk_tile * scale, D, BLOCK_D, ALIGN)
    _store_rows(dv, offset, m, dk_m, M, dv_tile, D, BLOCK_D, ALIGN)


@triton.jit
def _grad_queries_kernel(
    q, q_b, q_h, q_n,  # queries (B, H, N, D) and their strides
    k, k_b, k_h, k_m,  # keys (B, H, M, D)
    v, v_b, v_h, v_m,  # values (B, H, M, D)
    do, do_b, do_h, do_n,  # gradient of the output (B, H, N, D)
    tops, totals, delta,  # (B, H, N) fp32
    dq, dq_s, dq_b, dq_h, dq_n,  # output (splits, B, H, N, D)
    dk, dv, dk_b, dk_h, dk_m,  # outputs (B, H, M, D), same strides, written only if ALL_QUERIES
    H, N, M, chunk,  # chunk: keys per split, a multiple of BLOCK_M
    scale, scale_log2, width, radius, seed, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    ALL_QUERIES: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):
    """dQ, the mirror image: program (image and head, block of queries, split) keeps its queries.

    If its block holds all queries (ALL_QUERIES), dS has all rows, and dK and dV fall out of the
    same pass.
    """
    bh = tl.program_id(0)
    split = tl.program_id(2).to(tl.int64)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D)
    q_tile = _load_rows(q, b * q_b + h * q_h, n, q_n, N, D, BLOCK_D, ALIGN, DOT)
    do_tile = _load_rows(do, b * do_b + h * do_h, n, do_n, N, D, BLOCK_D, ALIGN, DOT)
    top, inverse, delta_row = _softmax_rows(tops, totals, delta, bh, n, N)

    dq_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        # (BLOCK_M, BLOCK_D) each
        k_tile = _load_rows(k, b * k_b + h * k_h, m, k_m, M, D, BLOCK_D, ALIGN, DOT)
        v_tile = _load_rows(v, b * v_b + h * v_h, m, v_m, M, D, BLOCK_D, ALIGN, DOT)
        # (BLOCK_N, BLOCK_M)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        s = _forbid(s, n[:, None], m[None, :], M, width, radius, WINDOW)
        p = tl.exp2((s - top[:, None]) * scale_log2) * inverse[:, None]
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        dropped = p  # dropout(P)
        if DROPOUT:
            kept = _kept(n, start, M, bh, seed, dropout_p, BLOCK_M)
            dropped = _drop(p, kept, dropout_p)
            dp = _drop(dp, kept, dropout_p)
        ds = (p * (dp - delta_row[:, None])).to(DOT)
        dq_tile += tl.dot(ds, k_tile, input_precision="ieee")
        if ALL_QUERIES:
            offset = b * dk_b + h * dk_h
            dk_tile = tl.dot(tl.trans(ds), q_tile, input_precision="ieee") * scale
            dv_tile = tl.dot(tl.trans(dropped.to(DOT)), do_tile, input_precision="ieee")
            _store_rows(dk, offset, m, dk_m, M, dk_tile, D, BLOCK_D, ALIGN)
            _store_rows(dv, offset, m, dk_m, M, dv_tile, D, BLOCK_D, ALIGN)
    offset = split * dq_s + b * dq_b + h * dq_h
    _store_rows(dq, offset, n, dq_n, N, dq_tile * scale, D, BLOCK_D, ALIGN)


@triton.jit
def _sum_parts_kernel(
    parts,  # (P, L) fp32
    out,  # output (L,)
    P, L,
    BLOCK: tl.constexpr,
):
    """Sum of P partial gradients, always in the same order, so that every run gives the same
    bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _part in range(0, P):
        total += tl.load(parts + i, mask=i < L, other=0.0)
        parts += L
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < L)


# --------------------------------------------------------------------------------------------------
# Launching the kernels
# --------------------------------------------------------------------------------------------------


def _unsupported(q, k):
    """What the kernels cannot do with these inputs, in words, or None."""
    longest = max(q.shape[2], k.shape[2])
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"cross_attention takes float32, float16 or bfloat16, got {q.dtype}"
    if not 8 <= q.shape[3] <= 128:
        return f"cross_attention takes heads of width 8 to 128, got {q.shape[3]}"
    if longest > 16384:
        return f"cross_attention takes up to 16,384 queries and keys, got {longest}"
    return None


def dot_type(dtype):
    """What the tensor cores multiply: the inputs' type; the interpreter has no bf16 matrices."""
    if INTERPRET and dtype == torch.bfloat16:
        return tl.float32
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return types[dtype]


def _tiles(q, k, *others):
    """(BLOCK_N, BLOCK_M, what all kernels share).

    Fixed rules and no autotuning, so that every run gives the same bits. A side of up to `side`
    tokens is one block, and stays on chip as a whole.
    """
    D = q.shape[3]
    block_d = max(16, triton.next_power_of_2(D))  # tl.dot wants at least 16
    side, warps = TILES[q.dtype == torch.float32, block_d]
    if 16 < D < block_d:  # masks along the channels cost registers too
        side = max(16, side // 2)
    block_n = max(16, min(side, triton.next_power_of_2(q.shape[2])))
    block_m = max(16, min(side, triton.next_power_of_2(k.shape[2])))
    starts = []
    for x in (q, k, *others):
        starts += [*x.stride()[:3], x.data_ptr() // x.element_size()]
    align = math.gcd(16, D, *starts)
    return block_n, block_m, dict(D=D, BLOCK_D=block_d, ALIGN=align, num_warps=warps)


def _flags(q, window, dropout_p):
    options = dict(WINDOW=bool(window), DROPOUT=dropout_p > 0, DOT=dot_type(q.dtype))
    return options | registers(255)


def registers(most):
    """Launch option, where there is one: without it the compiler may choose fewer registers a
    thread, to run more programs at once, and spill some of them to memory."""
    return {} if torch.version.hip else {"maxnreg": most}


def split(programs, warps, length, block, device):
    """(splits, tokens per split): cut a side of `length` tokens, which `programs` of so many warps
    walk along, until the card is full."""
    blocks = triton.cdiv(length, block)
    wanted = WARPS_PER_CORE * cores(device) // (programs * warps)
    splits = max(1, min(wanted, blocks // BLOCKS_PER_SPLIT))
    per_split = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, per_split), per_split * block


def _empty(*shape, like, dtype=None):
    """An uninitialised (..., H, N, D) tensor, stored as (..., N, H, D): merging the heads is no
    copy."""
    *batch, H, N, D = shape
    x = torch.empty(*batch, N, H, D, dtype=dtype or like.dtype, device=like.device)
    return x.transpose(-3, -2)


def _rows(x):
    """A (B|1, H, N, D) tensor as a kernel takes it: itself and its strides, 0 over a batch of 1."""
    return x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2)


def _forward_shapes(q, k, v, seed, scale, window, dropout_p):
    (_, H, N, D), B = q.shape, max(q.shape[0], k.shape[0])
    return _empty(B, H, N, D, like=q), q.new_empty((2, B, H, N), dtype=torch.float32)


@opaque(
    "(Tensor q, Tensor k, Tensor v, Tensor? seed, float scale, int[] window, float dropout_p) "
    "-> (Tensor, Tensor)",
    _forward_shapes,
)
def attention_triton(q, k, v, seed, scale, window, dropout_p):
    """Output (B, H, N, D) of `cross_attention`, and of each query (2, B, H, N) fp32: its largest
    product q k, and the sum of e^(scale (product - largest)). Two numbers: their one logarithm
    would be too coarse for large scores, and so would be products that are scaled before they are
    compared."""
    (B, H, N, D), M = q.shape, k.shape[2]
    B = max(B, k.shape[0])
    block_n, block_m, tile = _tiles(q, k, v)
    _, width, radius = window or (0, 1, 0)
    numbers = (scale * LOG2E, width, radius, seed, dropout_p)
    flags = dict(**tile, BLOCK_N=block_n, BLOCK_M=block_m, **_flags(q, window, dropout_p))
    o = _empty(B, H, N, D, like=q)
    rows = torch.empty(2, B, H, N, dtype=torch.float32, device=q.device)
    query_blocks = triton.cdiv(N, block_n)
    inputs = (*_rows(q), *_rows(k), *_rows(v))
    with torch.cuda.device_of(q):
        if M <= block_m:
            _few_keys_kernel[(B * H, query_blocks)](
                *inputs, *_rows(o), *rows, H, N, M, *numbers, **flags
            )
            return o, rows
        splits, chunk = split(B * H * query_blocks, tile["num_warps"], M, block_m, q.device)
        parts, part_rows = o[None], rows[:, None]
        if splits > 1:
            parts = _empty(splits, B, H, N, D, like=q, dtype=torch.float32)
            part_rows = torch.empty(2, splits, B, H, N, dtype=torch.float32, device=q.device)
        _many_keys_kernel[(B * H, query_blocks, splits)](
            *inputs, parts, *parts.stride()[:4], *part_rows, part_rows.stride(1), H, N, M, chunk,
            *numbers, **flags,
        )
        if splits > 1:
            _merge_kernel[(B * H, query_blocks)](
                parts, *parts.stride()[:4], *part_rows, part_rows.stride(1), *_rows(o), *rows,
                H, N, splits, scale * LOG2E, **tile, BLOCK_N=block_n,
            )
    return o, rows


def _backward_shapes(do, q, k, v, o, rows, seed, scale, window, dropout_p):
    return tuple(_empty(*x.shape, like=x) for x in (q, k, v))


@opaque(
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor rows, Tensor? seed, float scale, "
    "int[] window, float dropout_p) -> (Tensor, Tensor, Tensor)",
    _backward_shapes,
)
def attention_grad_triton(do, q, k, v, o, rows, seed, scale, window, dropout_p):
    """Gradients of q, k and v, from that of the output, do (B, H, N, D)."""
    do = do if do.stride(3) == 1 else do.contiguous()
    (B, H, N, _), M, device = o.shape, k.shape[2], q.device
    block_n, block_m, tile = _tiles(q, k, v, do)
    _, width, radius = window or (0, 1, 0)
    flags = dict(**tile, BLOCK_N=block_n, BLOCK_M=block_m, **_flags(q, window, dropout_p))
    if window and dropout_p > 0:
        flags["num_warps"] = 8  # both at once take registers: spread them over more threads
    numbers = (scale, scale * LOG2E, width, radius, seed, dropout_p)
    query_blocks, key_blocks = triton.cdiv(N, block_n), triton.cdiv(M, block_m)
    delta = torch.empty(B, H, N, dtype=torch.float32, device=device)
    inputs = (*_rows(q), *_rows(k), *_rows(v), *_rows(do), *rows, delta)

    all_keys = key_blocks == 1
    all_queries = query_blocks == 1 and not all_keys
    warps = flags["num_warps"]
    query_splits, query_chunk = split(B * H * key_blocks, warps, N, block_n, device)
    key_splits, key_chunk = split(B * H * query_blocks, warps, M, block_m, device)
    # one partial gradient per split, and per image where all images share the tokens
    dq, dq_parts = _gradient(q, B, 1 if all_keys else key_splits)
    dk, dk_parts = _gradient(k, B, 1 if all_queries else query_splits)
    dv, dv_parts = _gradient(v, B, 1 if all_queries else query_splits)
    with torch.cuda.device_of(q):
        _delta_kernel[(B * H, query_blocks)](
            *_rows(o), *_rows(do), delta, H, N, **tile, BLOCK_N=block_n
        )
        if not all_queries:
            _grad_keys_kernel[(B * H, key_blocks, query_splits)](
                *inputs, dq_parts, *dq_parts.stride()[1:4], dk_parts, dv_parts,
                *dk_parts.stride()[:4], H, N, M, query_chunk, *numbers, ALL_KEYS=all_keys, **flags,
            )
        if not all_keys:
            _grad_queries_kernel[(B * H, query_blocks, key_splits)](
                *inputs, dq_parts, *dq_parts.stride()[:4], dk_parts, dv_parts,
                *dk_parts.stride()[1:4], H, N, M, key_chunk, *numbers,
                ALL_QUERIES=all_queries, **flags,
            )
        for gradient, parts in ((dq, dq_parts), (dk, dk_parts), (dv, dv_parts)):
            count = parts.shape[0] * parts.shape[1] // gradient.shape[0]
            if count > 1:
                length = gradient.numel()
                grid = (triton.cdiv(length, 1024),)
                _sum_parts_kernel[grid](parts, gradient, count, length, BLOCK=1024)
    return dq, dk, dv


def _gradient(x, B, splits):
    """(gradient of x, buffer (splits, B, H, N, D) for its parts), the same memory if there is one
    part."""
    gradient = _empty(*x.shape, like=x)
    if splits == 1 and x.shape[0] == B:
        return gradient, gradient[None]
    return gradient, _empty(splits, B, *x.shape[1:], like=x, dtype=torch.float32)


class _CrossAttention(torch.autograd.Function):
    """Saves inputs, output and two numbers a row; the weights are recomputed in the backward
    pass."""

    @staticmethod
    def forward(ctx, q, k, v, seed, *options):
        # the kernels walk along channels with stride 1: true for split heads, a copy for anything
        # else
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        o, rows = attention_triton(q, k, v, seed, *options)
        ctx.save_for_backward(q, k, v, o, rows, seed)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *attention_grad_triton(do, *ctx.saved_tensors, *ctx.options), None, None, None, None


@trial("cross_attention")
def _trial(device, dtype):
    """Output and gradients against the PyTorch path, where keys are few, queries are few, both
    many."""
    for N, M in ((70, 5), (5, 70), (70, 71)):
        q, k, v, upstream = trial_tensors([(1, 2, n, 16) for n in (N, M, M, N)], device, dtype)
        results = {}
        for backend in ("triton", "torch"):
            o = cross_attention(q, k, v, backend=backend)
            results[backend] = [o, *torch.autograd.grad(o, (q, k, v), upstream)]
        compare(results["triton"], results["torch"], dtype)
        # with dropout O = W V, so dO . O = dV . V if both passes drop the same weights
        v, upstream = (x.detach().abs().requires_grad_() for x in (v, upstream))
        o = cross_attention(q, k, v, dropout_p=0.5, seed=1, backend="triton")
        (dv,) = torch.autograd.grad(o, (v,), upstream)
        dots = [(x.float() * y.float()).sum() for x, y in ((o, upstream), (dv, v))]
        compare(dots[1:], dots[:1], dtype)
