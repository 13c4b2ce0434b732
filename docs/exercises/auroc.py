"""AUROC from ranks.

The probability that a random defective image scores higher than a random good one, a tie counting
one half. Sort all N scores, give each its rank from 1, equal scores the mean of their ranks; with P
defective images and G = N - P good ones

    AUROC = (sum of the defective images' ranks - P (P + 1) / 2) / (P G)

No loop over pairs: they would be millions for pixels. `np.unique` returns what the ranks need.
"""

import numpy as np

from common import metrics


def auroc(scores, labels):
    """scores (N,) float, labels (N,) bool, True = defective -> a float."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(scores, labels):
    return of_images(scores, labels)["i_auroc"]


def of_images(scores, labels):
    """The image metrics of `common/metrics.py`; the maps are of one pixel, and do not matter."""
    pixel = scores[:, None, None], labels[:, None, None]
    classes = np.zeros(len(scores), int)
    return metrics.evaluate(*pixel, scores, labels, classes)["mean"]


def cases():
    yield "four images", (np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.3
    scores = rng.normal(size=200) + labels
    yield "two hundred images", (scores, labels)
    yield "many ties", (scores.round(), labels)
    yield "all scores equal", (np.ones(200), labels)
    yield "worse than chance, and not flipped", (-scores, labels)
