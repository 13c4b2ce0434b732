"""AUPRO, by sorting all pixels once.

A region is an 8-connected component of one image's mask. At a threshold t

    PRO(t) = mean over the regions of all images of the share of the region's pixels with score >= t
    FPR(t) = share of all pixels outside of masks with score >= t
    AUPRO  = 1/0.3 x the area under PRO over FPR, for FPR from 0 to 0.3

So a defective pixel weighs 1 / (area of its region x number of regions), a good one 1 / (their
number). Sort the scores from the highest, sum up both weights, and the curve is there: no loop over
thresholds. Pixels of equal score are one point of the curve; between two points runs a straight
line, hence so at 0.3. `scipy.ndimage.label` finds regions (structure: what touches at a corner is
connected).
"""

import numpy as np

from common import metrics


def aupro(maps, masks):
    """maps (N, H, W) float, masks (N, H, W) bool -> a float."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(maps, masks):
    number = len(maps)
    labels = masks.any((1, 2))
    return metrics.evaluate(maps, masks, maps.max((1, 2)), labels, np.zeros(number, int))["mean"][
        "p_aupro"
    ]


def cases():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 16, 16), bool)
    masks[0, 2:5, 2:9] = True
    maps = rng.random((4, 16, 16)) + masks
    yield "one region, and found", (maps.copy(), masks.copy())
    maps = rng.random((4, 16, 16)) + 0.3 * masks
    yield "one region, and half found: the curve is cut at 0.3", (maps.copy(), masks.copy())
    masks[0, 12, 12] = True
    masks[1, 8:16, 8:16] = True
    maps = rng.random((4, 16, 16)) + 0.5 * masks
    yield "three regions: a pixel counts as much as a square", (maps.copy(), masks.copy())
    masks[2, 3, 3] = masks[2, 4, 4] = True
    yield "two pixels that touch at a corner are one region", (maps.copy(), masks.copy())
    yield "many ties", ((4 * maps).round() / 4, masks.copy())
