"""The neighbour mask of UniAD and OneNIP.

A transformer that rebuilds a token may simply copy it: the shortcut. So each token is forbidden to
look at itself and at its neighbours. The tokens are the cells of a grid, row by row; cell i has row
i // width and column i % width.

    mask[i, j] = True where the cells i and j are at most `radius` rows AND at most `radius` columns
    apart

No loop: compare all rows with all rows by broadcasting.
"""

from kernels.cross_attention import neighbours


def neighbour_mask(height, width, radius):
    """-> bool tensor (height width, height width), True = forbidden."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(height, width, radius):
    return neighbours(height, width, radius)


def cases():
    yield "radius 0: only oneself", (3, 3, 0)
    yield "radius 1", (4, 4, 1)
    yield "14 x 14 tokens, 7 x 7 neighbours, as in UniAD", (14, 14, 3)
    yield "a grid that is no square: which number is the width?", (2, 5, 1)
