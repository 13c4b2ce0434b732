"""Multi-head attention between a few tokens and a large map that never projects the map.

ROADS's prompts (l = 10) read maps of up to 4,096 positions and are read by them, with a LayerNorm on
either side and four linear maps around the attention. As it is usually written, three of the four
linear maps act on the whole map. But a linear map may act on the other factor of a product just as
well, and there it meets l tokens in place of thousands. With z the map after its LayerNorm, and per
head h the blocks W_q, W_k, W_v of D rows and W_o of D columns:

    the tokens read the map           scores  q_h (z W_k^T + b_k)^T  =  (q_h W_k) z^T  + a constant
                                      output  P (z W_v^T + b_v)      =  (P z) W_v^T    + b_v

    the map reads the tokens          scores  (z W_q^T + b_q) k_h^T  =  z (k_h W_q)^T  + b_q k_h^T
                                      output  sum_h (P v_h) W_o^T    =  sum_h P (v_h W_o^T)

The constant, q_h b_k^T, is the same for all keys of a query, so the softmax does not see it; b_q k_h^T
differs from key to key and stays. Rows of P sum to 1, so b_v comes through. What is left of LayerNorm
after its weight and bias have gone the same way is (z - mean) / deviation. So q, k and v of the map do
not exist: each position of the map is standardised, multiplied with H l folded tokens of width C, and
with H l more. For R = H l that is 4 M R C operations in place of 4 M C (C + l), so it pays while the
tokens are few (`folding_pays`); otherwise the usual form runs.

Read in this order: `few_token_formula`, `_tokens_read`, `_map_reads`, `standardise`.
"""

import torch
import torch.nn.functional as F

from .cross_attention import cross_attention


def few_token_attention(
    queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads, *, backend="auto"
):
    """to_out(attention(to_q(norm_q(queries)), to_k(norm_m(memory)), to_v(norm_m(memory)))).

    queries            (B, N, C); memory (B, M, C); floating dtype. Either side may be the short one.
    norm_q, norm_m     `nn.LayerNorm(C)` of the two sides, with weight and bias.
    to_q, to_k, to_v, to_out  `nn.Linear(C, C)`, each with a bias. Of all six modules only the
                       parameters (and eps) are used: hooks are not called.
    heads              H; divides C. Scores are scaled by 1 / sqrt(C / H).
    backend            "auto" (Triton on CUDA tensors, plain PyTorch elsewhere), "triton" or "torch".

    Returns (B, N, C), equal to `few_token_formula` up to rounding, with gradients for both inputs and
    all parameters; that of to_k's bias is zero, as it is in exact arithmetic. The dtype is that of
    `F.linear`: the inputs', or autocast's. Raises ValueError for shapes that do not fit.
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

    Both counts are per image and divided by 4 C. Folded: the map meets H l rows of width C, twice; the
    tokens go through four products with a C x C matrix. Usual: two such products and the attention for
    each position of the map, and two products for each token.
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
        raise ValueError(f"few_token_attention: {heads} heads do not divide {queries.shape[2]} channels")


# --------------------------------------------------------------------------------------------------
# Folding. Letters in einsum: b image, h head, n a token, d a channel of the head, c of the whole width
# --------------------------------------------------------------------------------------------------


def _tokens_read(queries, memory, norm_q, norm_m, to_q, to_k, to_v, to_out, heads, backend):
    """The folded form for few queries and a large memory."""
    q = to_q(norm_q(queries)).unflatten(2, (heads, -1))  # (B, N, C) -> (B, N, H, D)
    scale = q.shape[3] ** -0.5
    k_weight = to_k.weight.unflatten(0, (heads, -1))  # (C, C) -> (H, D, C)
    v_weight = to_v.weight.unflatten(0, (heads, -1))  # (C, C) -> (H, D, C)

    folded = torch.einsum("bnhd,hdc->bhnc", q, k_weight) * (scale * norm_m.weight)  # (B, H, N, C)
    seen = tokens_read(folded.flatten(1, 2), memory, norm_m.eps, backend)  # (B, H N, C)
    seen = seen.unflatten(1, (heads, -1)) * norm_m.weight + norm_m.bias  # (B, H N, C) -> (B, H, N, C)
    values = torch.einsum("bhnc,hdc->bnhd", seen, v_weight).flatten(2)  # (B, N, H, D) -> (B, N, C)
    # the key's bias cannot matter; named here so that every parameter has a gradient, as DDP requires
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
    return map_reads(queries, keys, bias.flatten(1), values, to_out.bias, heads, norm_q.eps, backend)


# --------------------------------------------------------------------------------------------------
# What is left to do at every position of the map: the PyTorch path
# --------------------------------------------------------------------------------------------------


def standardise(x, eps):
    """(x - mean) / deviation along the last dimension: LayerNorm without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def tokens_read(tokens, x, eps, backend="auto"):
    """softmax(tokens z^T) z with z = standardise(x); tokens (B, R, C), x (B, M, C) -> (B, R, C)."""
    z = standardise(x, eps)  # (B, M, C)
    weights = (tokens @ z.transpose(1, 2)).softmax(dim=2)  # (B, R, M)
    return weights @ z


def map_reads(x, keys, bias, values, out_bias, heads, eps, backend="auto"):
    """sum over heads of softmax(z keys^T + bias) values, plus out_bias, with z = standardise(x).

    x (B, N, C); keys and values (B, H M, C), head by head; bias (B, H M); out_bias (C,) -> (B, N, C).
    """
    z = standardise(x, eps)  # (B, N, C)
    scores = torch.baddbmm(bias[:, None], z, keys.transpose(1, 2))  # (B, N, H M)
    weights = scores.unflatten(2, (heads, -1)).softmax(dim=3).flatten(2)  # (B, N, H, M) -> (B, N, H M)
    return torch.baddbmm(out_bias[None, None], weights, values)
