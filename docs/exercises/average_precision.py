"""Average precision, without interpolation.

Lower a threshold through all distinct scores. At each of them

    precision = TP / (TP + FP)        recall = TP / P
    AP = sum over thresholds of precision x (recall - recall at the threshold before)

Images of equal score pass the threshold together: one step, not several. Unlike AUROC, AP depends on
how rare defects are: a map of noise has an AUROC of 1/2, and an AP of P / N.
"""

from docs.exercises import auroc


def average_precision(scores, labels):
    """scores (N,) float, labels (N,) bool, True = defective -> a float."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(scores, labels):
    return auroc.of_images(scores, labels)["i_ap"]


def cases():
    return auroc.cases()
