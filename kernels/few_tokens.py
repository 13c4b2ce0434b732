"""Multi-head attention between a few tokens and a large map that never projects the map.

ROADS's prompts (l = 10) read maps of up to 4,096 positions and are read by them, with a LayerNorm
on either side and four linear maps around the attention. As it is usually written, three of the
four linear maps act on the whole map. But a linear map may act on the other factor of a product
just as well, and there it meets l tokens in place of thousands. With z the map after its
LayerNorm, and per head h the blocks W_q, W_k, W_v of D rows and W_o of D columns:

    the tokens read the map           scores  q_h (z W_k^T + b_k)^T  =  (q_h W_k) z^T  + a constant
                                      output  P (z W_v^T + b_v)      =  (P z) W_v^T    + b_v

    the map reads the tokens          scores  (z W_q^T + b_q) k_h^T  =  z (k_h W_q)^T  + b_q k_h^T
                                      output  sum_h (P v_h) W_o^T    =  sum_h P (v_h W_o^T)

The constant, q_h b_k^T, is the same for all keys of a query, so the softmax does not see it; b_q
k_h^T differs from key to key and stays. Rows of P sum to 1, so b_v comes through. What is left of
LayerNorm after its weight and bias have gone the same way is (z - mean) / deviation. So q, k and v
of the map do not exist: each position of the map is standardised, multiplied with H l folded
tokens of width C, and with H l more. For R = H l that is 4 M R C operations in place of 4 M C (C +
l), so it pays while the tokens are few (`folding_pays`); otherwise the usual form runs.

On a GPU, what is left at every position is one kernel each way, LayerNorm included: the map is
read once (and written once, if it is the one that reads), and neither its standardised copy nor
the scores go to memory. The folding itself, on H l tokens, is plain PyTorch, and so are the
gradients of the projections.

Read in this order: `few_token_formula`, `_tokens_read`, `_map_reads`, `tokens_read_torch`,
`map_reads_torch`, then the kernels of the same names.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .backend import autocast, compare, opaque, tl, trial, trial_tensors, triton, use_triton
from .cross_attention import (
    LOG2E, _delta_kernel, _load_rows, _merge_kernel, _softmax_rows, _store_rows,
    _sum_parts_kernel, cross_attention, dot_type, registers, split,
)


def few_token_attention(
    queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads, *, backend="auto"
):
    """to_out(attention(to_q(norm_q(queries)), to_k(norm_m(memory)), to_v(norm_m(memory)))).

    queries            (B, N, C); memory (B, M, C); floating dtype. Either side may be the short
                       one.
    norm_q, norm_m     `nn.LayerNorm(C)` of the two sides, with weight and bias.
    to_q, to_k, to_v, to_out  `nn.Linear(C, C)`, each with a bias. Of all six modules only the
                       parameters (and eps) are used: hooks are not called.
    heads              H; divides C. Scores are scaled by 1 / sqrt(C / H).
    backend            "auto" (Triton on CUDA tensors, plain PyTorch elsewhere), "triton" or
                       "torch".

    Returns (B, N, C), equal to `few_token_formula` up to rounding, with gradients for both inputs
    and all parameters; that of to_k's bias is zero, as it is in exact arithmetic. The dtype is
    that of `F.linear`: the inputs', or autocast's. Raises ValueError for shapes that do not fit.
    """
    _check(queries, memory, heads)
    arguments = (queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads)
    if not folding_pays(queries.shape[1], memory.shape[1], queries.shape[2], heads):
        return few_token_formula(*arguments, backend=backend)
    if queries.shape[1] <= memory.shape[1]:
        return _tokens_read(*arguments, backend=backend)
    return _map_reads(*arguments, backend=backend)


def few_token_formula(
    queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads, *, backend="torch"
):
    """The definition, in the order of the words: norms, projections, attention, output."""
    standard = norm_m(memory)  # (B, M, C)
    q = split_heads(to_q(norm_q(queries)), heads)  # (B, H, N, D)
    k = split_heads(to_k(standard), heads)  # (B, H, M, D)
    v = split_heads(to_v(standard), heads)  # (B, H, M, D)
    out = cross_attention(q, k, v, backend=backend)  # (B, H, N, D)
    return to_out(out.transpose(1, 2).flatten(2))  # (B, H, N, D) -> (B, N, C)


def split_heads(x, heads):
    """(B, N, C) -> (B, H, N, D), a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def folding_pays(queries, memory, width, heads):
    """True if folding the projections into the shorter side takes fewer operations.

    Both counts are per image and divided by 4 C. Folded: the map meets H l rows of width C, twice;
    the tokens go through four products with a C x C matrix. Usual: two such products and the
    attention for each position of the map, and two products for each token. On a CPU the count
    decides right: in fp32 the times cross where it says, at about as many folded tokens as
    channels (`python -m kernels.bench --cpu`, docs/gpu.md).
    """
    few, many = min(queries, memory), max(queries, memory)
    folded = many * heads * few + 2 * few * width
    usual = many * (width + few) + few * width
    return folded < usual


def _check(queries, memory, heads):
    """Raise ValueError, in one line that says what is wrong, unless the shapes fit each other."""
    if queries.ndim != 3 or memory.ndim != 3 or queries.shape[::2] != memory.shape[::2]:
        raise ValueError(
            "few_token_attention: expected queries (B, N, C) and memory (B, M, C), "
            f"got {tuple(queries.shape)} and {tuple(memory.shape)}"
        )
    if queries.numel() == 0 or memory.numel() == 0:
        raise ValueError(
            "few_token_attention: nothing to attend to: "
            f"queries {tuple(queries.shape)}, memory {tuple(memory.shape)}"
        )
    if queries.shape[2] % heads:
        raise ValueError(
            f"few_token_attention: {heads} heads do not divide {queries.shape[2]} channels"
        )


# --------------------------------------------------------------------------------------------------
# Folding. Letters in einsum: b image, h head, n a token, d a channel of the head, c of the whole
# width
# --------------------------------------------------------------------------------------------------


def _tokens_read(queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads, backend):
    """The folded form for few queries and a large memory."""
    q = to_q(norm_q(queries)).unflatten(2, (heads, -1))  # (B, N, C) -> (B, N, H, D)
    scale = q.shape[3] ** -0.5
    k_weight = to_k.weight.unflatten(0, (heads, -1))  # (C, C) -> (H, D, C)
    v_weight = to_v.weight.unflatten(0, (heads, -1))  # (C, C) -> (H, D, C)

    folded = torch.einsum("bnhd,hdc->bhnc", q, k_weight) * (scale * norm_m.weight)  # (B, H, N, C)
    seen = tokens_read(folded.flatten(1, 2), memory, norm_m.eps, backend)  # (B, H N, C)
    seen = seen.unflatten(1, (heads, -1))  # (B, H N, C) -> (B, H, N, C)
    seen = seen * norm_m.weight + norm_m.bias
    values = torch.einsum("bhnc,hdc->bnhd", seen, v_weight).flatten(2)  # (B, N, H, D) -> (B, N, C)
    # the key's bias cannot matter; named here so that every parameter has a gradient, as DDP
    # requires
    return to_out(values + to_v.bias + 0.0 * to_k.bias)


def _map_reads(queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads, backend):
    """The folded form for many queries and a small memory."""
    standard = norm_m(memory)
    k = to_k(standard).unflatten(2, (heads, -1))  # (B, M, C) -> (B, M, H, D)
    v = to_v(standard).unflatten(2, (heads, -1))  # (B, M, C) -> (B, M, H, D)
    k = k * k.shape[3] ** -0.5
    q_weight = to_q.weight.unflatten(0, (heads, -1))  # (C, C) -> (H, D, C)
    q_bias = to_q.bias.unflatten(0, (heads, -1))  # (C,) -> (H, D)
    out_weight = to_out.weight.unflatten(1, (heads, -1))  # (C, C) -> (C, H, D)

    keys = torch.einsum("bmhd,hdc->bhmc", k, q_weight)  # (B, H, M, C)
    bias = keys @ norm_q.bias + torch.einsum("bmhd,hd->bhm", k, q_bias)  # (B, H, M)
    keys = (keys * norm_q.weight).flatten(1, 2)  # (B, H, M, C) -> (B, H M, C)
    values = torch.einsum("bmhd,chd->bhmc", v, out_weight).flatten(1, 2)  # (B, H M, C)
    bias = bias.flatten(1)  # (B, H, M) -> (B, H M)
    return map_reads(queries, keys, bias, values, to_out.bias, heads, norm_q.eps, backend)


# --------------------------------------------------------------------------------------------------
# What is left to do at every position of the map
# --------------------------------------------------------------------------------------------------


def tokens_read(tokens, x, eps, backend="auto"):
    """softmax(tokens z^T) z with z = standardise(x); tokens (B, R, C), x (B, M, C) -> (B, R, C)."""
    shape = f"tokens{tokens.shape[1]}x{x.shape[1]}x{x.shape[2]}"
    if _use_triton(backend, tokens, x, shape, heads=0):
        return _TokensRead.apply(autocast(tokens)[0], x, eps)
    return tokens_read_torch(tokens, x, eps)


def map_reads(x, keys, bias, values, out_bias, heads, eps, backend="auto"):
    """sum over heads of softmax(z keys^T + bias) values, plus out_bias, with z = standardise(x).

    x (B, N, C); keys and values (B, H M, C), head by head; bias (B, H M); out_bias (C,) -> (B, N,
    C).
    """
    shape = f"map{x.shape[1]}x{keys.shape[1]}x{x.shape[2]}"
    if _use_triton(backend, keys, x, shape, heads):
        keys, values = autocast(keys, values)
        return _MapReads.apply(x, keys, bias.float(), values, out_bias.float(), heads, eps)
    return map_reads_torch(x, keys, bias, values, out_bias, heads, eps)


def _use_triton(backend, tokens, x, shape, heads):
    """True if the kernels shall run, see `backend.use_triton`. heads: 0 where the tokens read."""
    unsupported = None
    if not {tokens.dtype, x.dtype} <= {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"few_token_attention takes float32, float16 or bfloat16, got {x.dtype}"
    (tokens,) = autocast(tokens)
    widest = WIDEST[tokens.dtype == torch.float32]
    if unsupported is None and not 8 <= x.shape[2] <= widest:
        unsupported = (
            f"few_token_attention in {tokens.dtype} takes maps of width 8 to {widest}, "
            f"got {x.shape[2]}"
        )
    # a program holds a block of positions and, where the map reads, all tokens of a head
    sizes = (x.shape[2], tokens.shape[1] // heads if heads else 0)
    return use_triton(backend, "few_token_attention", tokens, unsupported, shape, sizes)


def standardise(x, eps):
    """(x - mean) / deviation along the last dimension: LayerNorm without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def tokens_read_torch(tokens, x, eps):
    """`tokens_read` in plain PyTorch."""
    z = standardise(x, eps)  # (B, M, C)
    weights = (tokens @ z.transpose(1, 2)).softmax(dim=2)  # (B, R, M)
    return weights @ z


def map_reads_torch(x, keys, bias, values, out_bias, heads, eps):
    """`map_reads` in plain PyTorch.

    Positions last: a CPU's softmax over ten numbers that lie side by side takes several times as
    long as over ten rows.
    """
    z = standardise(x, eps)  # (B, N, C)
    scores = torch.baddbmm(bias[:, :, None], keys, z.transpose(1, 2))  # (B, H M, N)
    by_head = scores.unflatten(1, (heads, -1))  # (B, H M, N) -> (B, H, M, N)
    weights = by_head.softmax(dim=2).flatten(1, 2)  # (B, H, M, N) -> (B, H M, N)
    return torch.baddbmm(out_bias[None, None], weights.transpose(1, 2), values)


# --------------------------------------------------------------------------------------------------
# Triton. Names: r counts folded tokens, m positions of the map, c channels; *_b, *_m are strides
# over images and positions. Tokens, their gradients and the outputs they read are contiguous (B,
# R, C).
# --------------------------------------------------------------------------------------------------


@triton.jit
def _standard_rows(
    x, offset, m, x_m, M, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows m of a map, standardised, (BLOCK_M, BLOCK_C) fp32, zeros beyond the edges; 1 /
    deviations."""
    tile = _load_rows(x, offset, m, x_m, M, C, BLOCK_C, ALIGN, tl.float32)
    mean = tl.sum(tile, axis=1) / C
    centred = tl.where((tl.arange(0, BLOCK_C) < C)[None, :], tile - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _standard_grad(z, inverse, dz, C: tl.constexpr):
    """Gradient of the rows from that of the standardised rows z: without its parts along 1 and
    z."""
    along_one = tl.sum(dz, axis=1) / C
    along_z = tl.sum(dz * z, axis=1) / C
    return (dz - along_one[:, None] - z * along_z[:, None]) * inverse[:, None]


@triton.jit
def _tokens_read_kernel(
    tokens,  # folded tokens (B, R, C)
    x, x_b, x_m,  # map (B, M, C) and its strides
    out, out_s,  # output (splits, B, R, C): each split's own softmax, normalised
    tops, totals, tops_s,  # outputs (splits, B, R) fp32: largest score, sum of e^(score - it)
    R, M, chunk, eps,  # chunk: positions per split, a multiple of BLOCK_M
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Online softmax. Program (image, block of tokens, split) walks over its range of the map."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = _load_rows(tokens, b * R * C, r, C, R, C, BLOCK_C, ALIGN, DOT)  # (BLOCK_R, BLOCK_C)
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        z, _ = _standard_rows(x, b * x_b, m, x_m, M, eps, C, BLOCK_C, ALIGN)
        z = z.to(DOT)  # (BLOCK_M, BLOCK_C)
        s = tl.dot(token, tl.trans(z), input_precision="ieee")  # (BLOCK_R, BLOCK_M)
        s = tl.where((m < M)[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))  # finite: each block holds a position
        shrink = tl.exp2((top - new_top) * LOG2E)
        p = tl.exp2((s - new_top[:, None]) * LOG2E)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(DOT), z, input_precision="ieee")
        top = new_top
    _store_rows(out, part * out_s + b * R * C, r, C, R, acc / total[:, None], C, BLOCK_C, ALIGN)
    row = part * tops_s + b * R + r
    tl.store(tops + row, top, mask=r < R)
    tl.store(totals + row, total, mask=r < R)


@triton.jit
def _tokens_read_grad_map_kernel(
    tokens, do,  # folded tokens and the gradient of what they read, (B, R, C)
    x, x_b, x_m,  # map (B, M, C) and its strides
    tops, totals, delta,  # (B, R) fp32
    dx, dx_b, dx_m,  # output: gradient of the map
    R, M, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Program (image, block of positions): z is key and value, so dz = dS^T tokens + P^T dO."""
    b = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_at, at = b.to(tl.int64) * x_b, b.to(tl.int64) * R * C
    z, inverse = _standard_rows(x, x_at, m, x_m, M, eps, C, BLOCK_C, ALIGN)
    dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        token = _load_rows(tokens, at, r, C, R, C, BLOCK_C, ALIGN, DOT)  # (BLOCK_R, BLOCK_C)
        do_tile = _load_rows(do, at, r, C, R, C, BLOCK_C, ALIGN, DOT)
        top, scale, delta_row = _softmax_rows(tops, totals, delta, b, r, R)
        s = tl.dot(z.to(DOT), tl.trans(token), input_precision="ieee")  # (BLOCK_M, BLOCK_R)
        p = tl.exp2((s - top[None, :]) * LOG2E) * scale[None, :]
        p = tl.where((r < R)[None, :], p, 0.0)
        dp = tl.dot(z.to(DOT), tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - delta_row[None, :])
        dz += tl.dot(ds.to(DOT), token, input_precision="ieee")
        dz += tl.dot(p.to(DOT), do_tile, input_precision="ieee")
    dx_tile = _standard_grad(z, inverse, dz, C)
    _store_rows(dx, b.to(tl.int64) * dx_b, m, dx_m, M, dx_tile, C, BLOCK_C, ALIGN)


@triton.jit
def _tokens_read_grad_tokens_kernel(
    tokens, do,  # folded tokens and the gradient of what they read, (B, R, C)
    x, x_b, x_m,  # map (B, M, C) and its strides
    tops, totals, delta,  # (B, R) fp32
    dt, dt_s,  # output: gradient of the tokens (splits, B, R, C), and its stride over splits
    R, M, chunk, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Program (image, block of tokens, split): d tokens = dS z, summed over a range of the map."""
    b = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = b.to(tl.int64) * R * C
    token = _load_rows(tokens, at, r, C, R, C, BLOCK_C, ALIGN, DOT)  # (BLOCK_R, BLOCK_C)
    do_tile = _load_rows(do, at, r, C, R, C, BLOCK_C, ALIGN, DOT)
    top, scale, delta_row = _softmax_rows(tops, totals, delta, b, r, R)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        z, _ = _standard_rows(x, b.to(tl.int64) * x_b, m, x_m, M, eps, C, BLOCK_C, ALIGN)
        z = z.to(DOT)  # zero beyond the map, and so adds nothing below
        s = tl.dot(token, tl.trans(z), input_precision="ieee")  # (BLOCK_R, BLOCK_M)
        p = tl.exp2((s - top[:, None]) * LOG2E) * scale[:, None]
        p = tl.where((m < M)[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(z), input_precision="ieee")
        ds = (p * (dp - delta_row[:, None])).to(DOT)
        acc += tl.dot(ds, z, input_precision="ieee")
    part = tl.program_id(2).to(tl.int64) * dt_s
    _store_rows(dt, part + at, r, C, R, acc, C, BLOCK_C, ALIGN)


@triton.jit
def _head_weights(
    z, keys, bias, at, bias_at, h, L,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Softmax of rows z over the L tokens of head h, (BLOCK_M, BLOCK_L); and the head's keys."""
    j = tl.arange(0, BLOCK_L)
    key = _load_rows(keys, at + h * L * C, j, C, L, C, BLOCK_C, ALIGN, DOT)  # (BLOCK_L, BLOCK_C)
    s = tl.dot(z, tl.trans(key), input_precision="ieee")  # (BLOCK_M, BLOCK_L)
    s += tl.load(bias + bias_at + h * L + j, mask=j < L, other=0.0)[None, :]
    s = tl.where((j < L)[None, :], s, -float("inf"))
    p = tl.exp2((s - tl.max(s, axis=1)[:, None]) * LOG2E)
    return p / tl.sum(p, axis=1)[:, None], key


@triton.jit
def _map_reads_kernel(
    x, x_b, x_m,  # map (B, M, C) and its strides
    keys, bias, values, out_bias,  # (B, H L, C), (B, H L) fp32, (B, H L, C), (C,) fp32
    out,  # output (B, M, C), contiguous
    M, H, L, eps,  # positions, heads, tokens of a head (L <= BLOCK_L)
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Program (image, block of positions): one head after the other, all of whose tokens are on
    chip."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    at, bias_at = b * H * L * C, b * H * L
    z, _ = _standard_rows(x, b * x_b, m, x_m, M, eps, C, BLOCK_C, ALIGN)
    z = z.to(DOT)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    acc += tl.load(out_bias + c, mask=c < C, other=0.0)[None, :]
    for h in range(0, H):
        p, key = _head_weights(
            z, keys, bias, at, bias_at, h, L, C, BLOCK_C, ALIGN, BLOCK_L, LOG2E, DOT
        )
        j = tl.arange(0, BLOCK_L)
        value = _load_rows(values, at + h * L * C, j, C, L, C, BLOCK_C, ALIGN, DOT)
        acc += tl.dot(p.to(DOT), value, input_precision="ieee")
    _store_rows(out, b * M * C, m, C, M, acc, C, BLOCK_C, ALIGN)


@triton.jit
def _map_reads_grad_map_kernel(
    x, x_b, x_m,  # map (B, M, C) and its strides
    do, do_b, do_m,  # gradient of the output (B, M, C)
    keys, bias, values,  # (B, H L, C), (B, H L) fp32, (B, H L, C)
    dx, dx_b, dx_m,  # output: gradient of the map
    M, H, L, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Program (image, block of positions): dz = sum over heads of dS keys."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    at, bias_at = b * H * L * C, b * H * L
    z, inverse = _standard_rows(x, b * x_b, m, x_m, M, eps, C, BLOCK_C, ALIGN)
    do_tile = _load_rows(do, b * do_b, m, do_m, M, C, BLOCK_C, ALIGN, DOT)  # (BLOCK_M, BLOCK_C)
    dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for h in range(0, H):
        p, key = _head_weights(
            z.to(DOT), keys, bias, at, bias_at, h, L, C, BLOCK_C, ALIGN, BLOCK_L, LOG2E, DOT
        )
        j = tl.arange(0, BLOCK_L)
        value = _load_rows(values, at + h * L * C, j, C, L, C, BLOCK_C, ALIGN, DOT)
        dp = tl.dot(do_tile, tl.trans(value), input_precision="ieee")  # (BLOCK_M, BLOCK_L)
        ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        dz += tl.dot(ds.to(DOT), key, input_precision="ieee")
    dx_tile = _standard_grad(z, inverse, dz, C)
    _store_rows(dx, b * dx_b, m, dx_m, M, dx_tile, C, BLOCK_C, ALIGN)


@triton.jit
def _map_reads_grad_tokens_kernel(
    x, x_b, x_m,  # map (B, M, C) and its strides
    do, do_b, do_m,  # gradient of the output (B, M, C)
    keys, bias, values,  # (B, H L, C), (B, H L) fp32, (B, H L, C)
    dk, dv, dk_s,  # outputs (splits, B, H L, C), and their stride over splits
    db, db_s,  # output (splits, B, H L)
    M, H, L, chunk, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, LOG2E: tl.constexpr, DOT: tl.constexpr,
):
    """Program (image, head, split): d keys = dS^T z, d values = P^T dO, d bias = sum of dS."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    j = tl.arange(0, BLOCK_L)
    at, bias_at = b * H * L * C, b * H * L
    value = _load_rows(values, at + h * L * C, j, C, L, C, BLOCK_C, ALIGN, DOT)
    dk_tile = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    dv_tile = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    db_row = tl.zeros((BLOCK_L,), tl.float32)
    first = tl.program_id(2) * chunk
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        z, _ = _standard_rows(x, b * x_b, m, x_m, M, eps, C, BLOCK_C, ALIGN)
        z = z.to(DOT)
        # zeros beyond the map, which add nothing
        do_tile = _load_rows(do, b * do_b, m, do_m, M, C, BLOCK_C, ALIGN, DOT)
        p, key = _head_weights(
            z, keys, bias, at, bias_at, h, L, C, BLOCK_C, ALIGN, BLOCK_L, LOG2E, DOT
        )
        dp = tl.dot(do_tile, tl.trans(value), input_precision="ieee")  # (BLOCK_M, BLOCK_L)
        ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        dk_tile += tl.dot(tl.trans(ds.to(DOT)), z, input_precision="ieee")
        dv_tile += tl.dot(tl.trans(p.to(DOT)), do_tile, input_precision="ieee")
        db_row += tl.sum(ds, axis=0)
    part = tl.program_id(2).to(tl.int64)
    offset = part * dk_s + at + h * L * C
    _store_rows(dk, offset, j, C, L, dk_tile, C, BLOCK_C, ALIGN)
    _store_rows(dv, offset, j, C, L, dv_tile, C, BLOCK_C, ALIGN)
    tl.store(db + part * db_s + bias_at + h * L + j, db_row, mask=j < L)


# --------------------------------------------------------------------------------------------------
# Launching the kernels
# --------------------------------------------------------------------------------------------------


# fp32 or not -> most channels: a tile of more does not fit on chip, and PyTorch's matrix products
# win
WIDEST = {True: 64, False: 512}
BLOCK_R = 16  # folded tokens per block


def _tile(x, *others):
    """What all kernels share for maps like x: width, alignment, block of positions, warps,
    types."""
    C = x.shape[2]
    block_c = max(16, triton.next_power_of_2(C))
    block_m = 32 if block_c <= 256 and others[0].dtype != torch.float32 else 16
    starts = []
    for t in (x, *others):
        starts += [*t.stride()[:-1], t.data_ptr() // t.element_size()]
    return dict(
        C=C, BLOCK_C=block_c, ALIGN=math.gcd(16, C, *starts), BLOCK_M=block_m, LOG2E=LOG2E,
        DOT=dot_type(others[0].dtype), num_warps=4 if block_c <= 128 else 8,
    )


def _sum_parts(parts, like):
    """The sum over the first dimension of fp32 parts, in order, in the type of `like`."""
    if len(parts) == 1 and like.dtype == torch.float32:
        return parts[0]
    out = torch.empty_like(like)
    count, length = len(parts), out.numel()
    _sum_parts_kernel[(triton.cdiv(length, 1024),)](parts, out, count, length, BLOCK=1024)
    return out


def _read_shapes(tokens, x, eps):
    return torch.empty_like(tokens), tokens.new_empty((2, *tokens.shape[:2]), dtype=torch.float32)


@opaque("(Tensor tokens, Tensor x, float eps) -> (Tensor, Tensor)", _read_shapes)
def tokens_read_triton(tokens, x, eps):
    """What the tokens read, (B, R, C), and each token's largest score and sum, (2, B, R) fp32."""
    (B, R, C), M, device = tokens.shape, x.shape[1], tokens.device
    tile = _tile(x, tokens)
    blocks = triton.cdiv(R, BLOCK_R)
    splits, chunk = split(B * blocks, tile["num_warps"], M, tile["BLOCK_M"], device)
    out = torch.empty_like(tokens)
    rows = torch.empty(2, B, R, dtype=torch.float32, device=device)
    parts, part_rows = out[None], rows[:, None]
    if splits > 1:
        parts = torch.empty(splits, B, R, C, dtype=torch.float32, device=device)
        part_rows = torch.empty(2, splits, B, R, dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        _tokens_read_kernel[(B, blocks, splits)](
            tokens, x, *x.stride()[:2], parts, parts.stride(0), *part_rows, part_rows.stride(1),
            R, M, chunk, eps, BLOCK_R=BLOCK_R, **tile,
        )
        if splits > 1:  # as one head of width C
            _merge_kernel[(B, blocks)](
                parts, *parts.stride()[:2], 0, C, *part_rows, part_rows.stride(1),
                out, R * C, 0, C, *rows, 1, R, splits, LOG2E,
                D=C, BLOCK_D=tile["BLOCK_C"], ALIGN=tile["ALIGN"], BLOCK_N=BLOCK_R,
            )
    return out, rows


def _read_grad_shapes(do, tokens, x, out, rows, eps):
    return torch.empty_like(tokens), torch.empty_like(x)


@opaque(
    "(Tensor do, Tensor tokens, Tensor x, Tensor out, Tensor rows, float eps) -> (Tensor, Tensor)",
    _read_grad_shapes,
)
def tokens_read_grad_triton(do, tokens, x, out, rows, eps):
    """Gradients of the tokens (B, R, C) and of the map (B, M, C)."""
    (B, R, C), M, device = tokens.shape, x.shape[1], tokens.device
    dx = torch.empty_like(x)
    tile = _tile(x, tokens, do, dx)
    blocks = triton.cdiv(R, BLOCK_R)
    splits, chunk = split(B * blocks, tile["num_warps"], M, tile["BLOCK_M"], device)
    delta = torch.empty(B, R, dtype=torch.float32, device=device)
    parts = torch.empty(splits, B, R, C, dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        _delta_kernel[(B, blocks)](
            out, R * C, 0, C, do, R * C, 0, C, delta, 1, R,
            D=C, BLOCK_D=tile["BLOCK_C"], ALIGN=tile["ALIGN"], BLOCK_N=BLOCK_R,
        )
        shared = (tokens, do, x, *x.stride()[:2], *rows, delta)
        _tokens_read_grad_map_kernel[(B, triton.cdiv(M, tile["BLOCK_M"]))](
            *shared, dx, *dx.stride()[:2], R, M, eps, BLOCK_R=BLOCK_R, **tile
        )
        _tokens_read_grad_tokens_kernel[(B, blocks, splits)](
            *shared, parts, parts.stride(0), R, M, chunk, eps, BLOCK_R=BLOCK_R, **tile
        )
        return _sum_parts(parts, tokens), dx


class _TokensRead(torch.autograd.Function):
    """Saves tokens, map, result and two numbers a token."""

    @staticmethod
    def forward(ctx, tokens, x, eps):
        tokens = tokens.contiguous()
        x = x if x.stride(2) == 1 else x.contiguous()
        out, rows = tokens_read_triton(tokens, x, eps)
        ctx.save_for_backward(tokens, x, out, rows)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *tokens_read_grad_triton(do.contiguous(), *ctx.saved_tensors, ctx.eps), None


def _map_read_shapes(x, keys, bias, values, out_bias, heads, eps):
    return x.new_empty(x.shape, dtype=keys.dtype)


@opaque(
    "(Tensor x, Tensor keys, Tensor bias, Tensor values, Tensor out_bias, int heads, float eps) "
    "-> Tensor",
    _map_read_shapes,
)
def map_reads_triton(x, keys, bias, values, out_bias, heads, eps):
    """`map_reads`: (B, M, C) in the type of the keys."""
    (B, M, C), L = x.shape, keys.shape[1] // heads
    out = torch.empty(B, M, C, dtype=keys.dtype, device=x.device)
    tile = _tile(x, keys, values, out)
    with torch.cuda.device_of(x):
        _map_reads_kernel[(B, triton.cdiv(M, tile["BLOCK_M"]))](
            x, *x.stride()[:2], keys, bias, values, out_bias, out, M, heads, L, eps,
            BLOCK_L=max(16, triton.next_power_of_2(L)), **tile,
        )
    return out


def _map_read_grad_shapes(do, x, keys, bias, values, heads, eps):
    return tuple(torch.empty_like(t) for t in (x, keys, bias, values))


@opaque(
    "(Tensor do, Tensor x, Tensor keys, Tensor bias, Tensor values, int heads, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _map_read_grad_shapes,
)
def map_reads_grad_triton(do, x, keys, bias, values, heads, eps):
    """Gradients of the map, keys, bias and values."""
    do = do if do.stride(2) == 1 else do.contiguous()
    (B, M, C), R, device = x.shape, keys.shape[1], x.device
    L = R // heads
    dx = torch.empty_like(x)
    tile = _tile(x, keys, values, do, dx)
    tile["BLOCK_L"] = max(16, triton.next_power_of_2(L))
    splits, chunk = split(B * heads, tile["num_warps"], M, tile["BLOCK_M"], device)
    dk, dv = (torch.empty(splits, B, R, C, dtype=torch.float32, device=device) for _ in range(2))
    db = torch.empty(splits, B, R, dtype=torch.float32, device=device)
    shared = (x, *x.stride()[:2], do, *do.stride()[:2], keys, bias, values)
    with torch.cuda.device_of(x):
        _map_reads_grad_map_kernel[(B, triton.cdiv(M, tile["BLOCK_M"]))](
            *shared, dx, *dx.stride()[:2], M, heads, L, eps, **tile, **registers(255)
        )
        _map_reads_grad_tokens_kernel[(B, heads, splits)](
            *shared, dk, dv, dk.stride(0), db, db.stride(0), M, heads, L, chunk, eps, **tile,
            num_stages=2,  # Triton's three would need 115 KB at width 512: `aot.SHARED_LIMIT`
        )
        return dx, _sum_parts(dk, keys), _sum_parts(db, bias), _sum_parts(dv, values)


class _MapReads(torch.autograd.Function):
    """Saves its inputs; the weights over a head's few tokens are recomputed in the backward
    pass."""

    @staticmethod
    def forward(ctx, x, keys, bias, values, out_bias, heads, eps):
        x = x if x.stride(2) == 1 else x.contiguous()
        keys, bias, values = keys.contiguous(), bias.contiguous(), values.contiguous()
        out = map_reads_triton(x, keys, bias, values, out_bias, heads, eps)
        ctx.save_for_backward(x, keys, bias, values)
        ctx.options = heads, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        dx, dk, db, dv = map_reads_grad_triton(do, *ctx.saved_tensors, *ctx.options)
        return dx, dk, db, dv, do.sum(dim=(0, 1), dtype=torch.float32), None, None


@trial("few_token_attention")
def _trial(device, dtype, width, per_head):
    """Maps of this width that read so many tokens in each of two heads, or, with 0, that are read
    by tokens: output and gradients, against the PyTorch path."""
    rows = 2 * per_head or 6
    shapes = [(1, rows, width), (1, 40, width), (1, rows, width), (1, rows), (width,)]
    tokens, x, values, bias, out_bias = trial_tensors(shapes, device, dtype)
    with torch.no_grad():
        tokens *= width**-0.5  # else a softmax over products of many channels has one entry
    results = {}
    for backend in ("triton", "torch"):
        if per_head:
            inputs = (x, tokens, bias, values, out_bias)
            out = map_reads(*inputs, 2, 1e-5, backend)
        else:
            inputs = (tokens, x)
            out = tokens_read(*inputs, 1e-5, backend)
        upstream = out.detach().flip(1)
        results[backend] = [out, *torch.autograd.grad(out, inputs, upstream)]
    compare(results["triton"], results["torch"], dtype)
