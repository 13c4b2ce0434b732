"""CutPaste: a pseudo-anomaly made of the image itself.

A rectangle of 2 % to 15 % of the area is cut out, its colours are changed, and it is pasted elsewhere.
So that your picture can be compared, draw from `rng` in this order, S being the image's side:

    area    rng.uniform(0.02, 0.15) * S * S
    aspect  rng.random() below 0.5: rng.uniform(0.3, 1.0), else rng.uniform(1.0, 3.3)
    w, h    the whole numbers below sqrt(area * aspect) and sqrt(area / aspect), between 1 and S
    corners rng.integers(0, [S - h + 1, S - w + 1], (2, 2)): row and column of what is cut, then of
            where it is pasted
    colours recolour(patch): a function of an array (h, w, 3), which draws from rng itself

The mask is where it was pasted. The good image must survive.
"""

import numpy as np
from PIL import Image

import onenip


def cutpaste(image, rng, recolour):
    """image uint8 (S, S, 3) -> the pseudo-anomaly uint8 (S, S, 3), the mask bool (S, S)."""
    ...


# ------------------------------------------------------------------------------------ the checker

RETURNS = "the image", "the mask"


def reference(image, rng, recolour):
    return onenip.cutpaste_patch(image, rng)


class Recolour:
    """`onenip.colour_jitter` of arrays. A class, since a copy must draw from the copied rng."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, patch):
        return np.asarray(onenip.colour_jitter(Image.fromarray(patch), self.rng))


def cases():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        yield f"seed {seed}", (image, rng, Recolour(rng))
