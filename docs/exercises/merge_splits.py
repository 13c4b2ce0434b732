"""Attention over keys that were split.

A few queries over many keys keep a GPU busy only if the keys are divided among programs. Each gives,
for its own keys and every query, the softmax's result and what the others need to know of it:

    top    the largest score                    (-inf if this split had no key for the query)
    total  sum of exp(score - top)              (0 then)
    part   softmax(scores) V, of its own keys   (zeros then)

Merge them: the exact softmax over all keys is the mean of the parts, each weighted by its share of
the sum of all exponentials. Beware of exp of large numbers, and of -inf - (-inf).
"""

import torch

from kernels.cross_attention import attention_formula


def merge_splits(parts, tops, totals):
    """parts (splits, N, D), tops and totals (splits, N) -> (N, D); zeros for a query without keys."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(q, k, v, forbidden, sizes):
    return attention_formula(q, k, v, 1.0, forbidden)


def given(q, k, v, forbidden, sizes):
    """Queries (N, D), keys and values (M, D), forbidden (N, M) bool, the number of keys of each split
    -> what the exercise gets."""
    parts, tops, totals = [], [], []
    first = 0
    for size in sizes:
        mine = slice(first, first + size)
        scores = (q @ k[mine].T).masked_fill(forbidden[:, mine], -torch.inf)  # (N, size)
        top = scores.amax(1)
        tops.append(top)
        finite = top.masked_fill(top.isinf(), 0.0)
        totals.append((scores - finite[:, None]).exp().sum(1))
        parts.append(attention_formula(q, k[mine], v[mine], 1.0, forbidden[:, mine]))
        first += size
    return torch.stack(parts), torch.stack(tops), torch.stack(totals)


def cases():
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 8), torch.randn(12, 8), torch.randn(12, 8)
    none = torch.zeros(4, 12, dtype=torch.bool)
    yield "two equal splits", (q, k, v, none, (6, 6))
    yield "three splits of different size", (q, k, v, none, (2, 7, 3))
    yield "scores of some hundred, whose exp is too large", (60 * q, k, v, none, (6, 6))
    one_split = none.clone()
    one_split[1, 6:] = True
    yield "a split without a key for one query", (q, k, v, one_split, (6, 6))
    all_keys = none.clone()
    all_keys[2] = True
    yield "a query without any key", (q, k, v, all_keys, (6, 6))
