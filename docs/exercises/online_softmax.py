"""Attention without the matrix of scores: online softmax, in Triton.

One program computes one query's result. It walks over the keys in blocks of BLOCK_M and keeps three
things: the largest score so far (top), the sum of exp(score - top) (total), and the sum of
exp(score - top) * value (out). When a block has a larger score, what was summed up before was
relative to the old top, and shrinks:

    new_top = max(top, largest score of the block)
    shrink  = exp(top - new_top)
    p       = exp(scores - new_top)             (BLOCK_M,); 0 for keys that do not exist
    total   = total * shrink + sum of p
    out     = out * shrink + p @ values         (D,), here a product and tl.sum over the keys
    top     = new_top

and at the end out / total. Write the lines of the loop. The kernel runs as Python on your CPU (Triton's
interpreter), where print() works. The keys of the last block may not exist: load with
`mask=..., other=0.0`, and give them a score of -inf.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is declared

import torch

import kernels

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise SystemExit("this exercise needs Triton, which pip installs on Linux only") from error


@triton.jit
def kernel(q, k, v, o, M, scale, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Program n: row n of o (N, D) from row n of q (N, D) and all rows of k and v (M, D)."""
    n = tl.program_id(0)
    d = tl.arange(0, D)
    query = tl.load(q + n * D + d) * scale  # (D,)
    top = -float("inf")
    total = 0.0
    out = tl.zeros((D,), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)  # (BLOCK_M,) these keys; m < M: they exist
        at = m[:, None] * D + d[None, :]  # (BLOCK_M, D) where their numbers are
        ...
    tl.store(o + n * D + d, out / total)


def online_softmax(q, k, v):
    """q (N, D), k and v (M, D), D a power of two -> softmax(q kᵀ / sqrt(D)) v (N, D)."""
    o = torch.empty_like(q)
    kernel[(len(q),)](q, k, v, o, len(k), q.shape[1] ** -0.5, D=q.shape[1], BLOCK_M=16)
    return o


# ------------------------------------------------------------------------------------ the checker


def reference(q, k, v):
    q, k, v = q[None, None], k[None, None], v[None, None]  # (N, D) -> (1, 1, N, D)
    return kernels.cross_attention(q, k, v, backend="torch")[0, 0]


def cases():
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 8), torch.randn(48, 8), torch.randn(48, 8)
    yield "one block", (q, k[:16], v[:16])
    yield "three blocks", (q, k, v)
    yield "the last block is not full", (q, k[:37], v[:37])
    yield "scores of some hundred, whose exp is too large", (300 * q, k, v)
