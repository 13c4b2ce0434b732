"""Omni-AD's attention (a): learned queries read the map.

T learned tokens ask all h w positions of the map. There are always T of them, so the cost grows with
the number of positions and not with its square. What they read is laid out as a square grid, and
resized to the map:

    Q = to_q(tokens) (T, C)      K = to_k(x), V = to_v(x)      both (h w, C)
    each of the heads has C / heads channels:  softmax(Q Kᵀ / sqrt(C / heads)) V     (T, C / heads)
    heads joined, to_out, laid out row by row (sqrt T, sqrt T, C), nearest neighbour to (h, w, C)
"""

import torch

import omniad


def learned_queries(layer, x):
    """layer: has to_q, to_k, to_v, to_out (nn.Linear), heads, tokens (T, C); x (B, h, w, C) -> the
    same shape."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(layer, x):
    return layer(x)


def cases():
    torch.manual_seed(0)
    one_head = omniad.TokenAttention("q", 8, omniad.Args(tokens=4, heads=1))
    two_heads = omniad.TokenAttention("q", 8, omniad.Args(tokens=4, heads=2))
    yield "one head, a map of the grid's size", (one_head, torch.randn(2, 2, 2, 8))
    yield "two heads", (two_heads, torch.randn(2, 2, 2, 8).requires_grad_())
    yield "a larger map, which is no square", (two_heads, torch.randn(2, 4, 6, 8).requires_grad_())
