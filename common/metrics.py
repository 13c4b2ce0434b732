"""Seven metrics of anomaly detection and localisation, exact, from one pass over the anomaly maps.

    from common import metrics
    rep = metrics.evaluate(maps, masks, image_scores, labels, classes)      # (N,H,W) (N,H,W) (N,) (N,) (N,)
    rep["classes"]["bottle"]["p_aupro"], rep["mean"]["mad"], rep["mixed"]["i_auroc"]

1. What is measured
-------------------
Every image has a score s and a label y (1 = defective); every pixel has a score (the anomaly map) and a label (the
mask, > 0 = defect). Whatever is scored, let P positives and N negatives be given, and for a threshold t
    TP(t) = positives with score >= t      FP(t) = negatives with score >= t      (a larger score is more anomalous)

    AUROC    area under the points (FP/N, TP/P)
             = probability that a random positive scores higher than a random negative, a tie counting 1/2
    AP       sum over thresholds of precision x increase in recall = sum_t TP/(TP+FP) x (TP(t) - TP(t+))/P,
             t+ the next higher score; a step function, no interpolation
    F1max    max over t of 2 TP / (TP + FP + P)                       (the harmonic mean of precision and recall)
    AUPRO    a region is an 8-connected component of one image's mask. PRO(t) = mean over the regions of all images of
             the share of the region's pixels with score >= t: a region of 10 pixels counts as much as one of 10,000.
             AUPRO = 1/0.3 x the area under the points (FP/N, PRO) for FP/N from 0 to 0.3, straight lines between
             the points of neighbouring thresholds, hence linear interpolation at the limit 0.3
    mAD      plain mean of the seven: image AUROC, AP, F1max; pixel AUROC, AP, F1max, AUPRO

The keys are i_auroc i_ap i_f1max p_auroc p_ap p_f1max p_aupro mad. All are fractions: 1 is perfect; an AUROC of 0.5
is chance, less than 0.5 is an inverted model and is printed as such. Pixel metrics use all pixels of all images, good
and defective. Image labels are given by the caller (the folder), never derived from masks.

Three views of the same run:
    classes   each class by itself
    mean      plain average over the classes (one model for all classes, "model-unified": UniAD, ROADS, OneNIP,
              Omni-AD). A class where the metric is undefined is left out of the average of this metric
    mixed     the images of all classes in one pool, as if there were one class ("absolute-unified": CADA). Harder: the
              scores of different classes must be comparable
A metric without a positive or without a negative (AUPRO: without a region or without a negative pixel) is undefined:
None, with a warning that names class and metric. Never 0, never flipped.

2. Why nothing of length N has to be sorted
-------------------------------------------
Pixels are many (1,725 images of 256 x 256: 113 million), positives few (2 to 3 %). TP changes only at scores of
positives; between two of them FP grows alone, and this is a horizontal line for ROC and PRO and can only lower F1.
So all four pixel metrics follow from a histogram whose bins are the distinct scores of *positives* and, per bin,
    positives p_k,  region mass m_k = sum over its positives of 1/(area of the region),
    above a_k = negatives with a larger score,  inside n_k = negatives with the same score
(class `Bins`). With T_k, F_k the positives and negatives in bin k and above, and R the number of regions:
    AUROC = 1/(P N)      sum_k p_k E_k(N)          where E_k(L) = mean of max(0, L - f) for f in [a_k, a_k + n_k]
    AUPRO = 1/(R 0.3 N)  sum_k m_k E_k(0.3 N)
    AP    = 1/P sum_k p_k T_k / (T_k + F_k)        F1max = max_k 2 T_k / (T_k + F_k + P)
(each positive of bin k adds to the area a strip from its own FP to the limit L; a tie is a straight line, hence the
mean.) AUPRO is a partial AUROC in which a pixel weighs 1/(area x regions). What costs time is a_k and n_k: `Ranker`
finds for each pixel by table, in a few array operations, between which two scores of positives it lies.

3. Two engines, chosen by size, named in rep["engine"]
------------------------------------------------------
exact     keeps the maps (the array given to `evaluate`, or a copy of each batch) and works as above. Equal to
          scikit-learn, and for AUPRO to a loop over every distinct threshold, up to rounding (1e-9 is tested). Beyond
          the maps it needs some 200 bytes per positive pixel.
bounded   more than EXACT_PIXELS (2^28) pixels, float64 ones counted twice: keeps only histograms of at most 2^19 bins
          per class, 12 MiB each, whatever the number of images (`common/bounded.py`). A bin is then not one score but
          an interval of neighbouring floats; inside it the order of positives and negatives is unknown. Every metric is
          computed for the best and the worst order that is possible (`intervals`): the exact value lies between.
          Reported is the middle, and rep["error_bounds"] holds the half width, rounding included: 2e-5 or less in the
          bench below, only rounding for float16 maps, more where scores crowd in a few bins (a saturated sigmoid).
          Image scores are few, kept (some 40 bytes each), and always exact.
Measured (`python -m tests.bench_metrics`, two shared cores, ratios of processor seconds within one process): 83 maps of
256 x 256, 45 to 50 times faster than scikit-learn's three pixel metrics and an AUPRO by full sort, in a tenth of the
memory, and 105 to 120 times faster than with the loop over 200 thresholds; 1,725 maps, 27 to 30 times faster than by
full sort, in a ninth, 620 MiB beyond the maps. Bounded: 2,000 maps of 30 classes in 5 s and 400 MiB, 8,000 in no more
memory; with the engine left to choose, which keeps the first gigabyte of maps, 114,585 maps in 1.4 GiB, 82 CPU seconds.

Partial results merge: `Accumulator.merge` in one process, `reduce` over torchrun processes. Order does not matter, up
to rounding.

4. What other recipes do, and by how much numbers differ
--------------------------------------------------------
One example, 83 smooth synthetic maps of 256 x 256 (`python -m tests.bench_metrics`, where the recipes are written out),
then the same with one pixel of one good image set to three times the maximum:

                                                                            AUPRO    one outlier pixel
    the definition above: all thresholds, regions of all images             0.6967   0.6967
    200 equal steps from min to max, FPR below 0.3 / its maximum (Dinomaly) 0.6939   0.6603
    100 equal steps, FPR below 0.3 stretched to [0, 1] (ADer, Omni-AD)      0.6793   0.6078
    200 steps on each defective image by itself, averaged (RD4AD)           0.6942   0.6942
    200 steps, the prediction first dilated by 5 x 5 (SimpleNet)            0.7175   0.7003
                                                                            P-F1max
    the definition above: all thresholds                                    0.4080   0.4080
    21 equal steps from min to max (ADer, MambaAD, Omni-AD)                 0.3953   0.2906

So recipes differ by 0.3 to 2.1 points, more than many a paper's gain, and in both directions; equal steps depend on the
largest score, hence on one pixel; averaging per image leaves the false alarms on good images out. None of them is an
option here: one definition, exact. Where a paper's number comes from such a recipe, the difference is part of it.

Sources of the definitions: average precision without interpolation as in scikit-learn; PRO with 30 % limit from
Bergmann et al., "Uninformed Students" (CVPR 2020) and "The MVTec AD Dataset" (IJCV 2021); mAD from ADer (Zhang et al.,
2024) as used in Omni-AD; absolute-unified from CADA.
"""

import warnings
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from common import UsageError
from common.bounded import Histogram, intervals, keys_of

IMAGE_METRICS = ("i_auroc", "i_ap", "i_f1max")
PIXEL_METRICS = ("p_auroc", "p_ap", "p_f1max", "p_aupro")
SEVEN = IMAGE_METRICS + PIXEL_METRICS
METRICS = SEVEN + ("mad",)

FPR_LIMIT = 0.3  # AUPRO: integrate up to this false positive rate, as in the papers
# More pixels than this, float64 ones counted twice: the bounded engine. 4096 maps of 256 x 256, 1 GiB
EXACT_PIXELS = 2**28
ROUNDING = 1e-12  # added to the error bounds, see `_seven`
PIECE = 2**16  # pixels that stay in the processor's cache


# ------------------------------------------------------------------------------------------ the four formulas


class Bins(NamedTuple):
    """Scores that hold at least one positive, from the highest to the lowest. Arrays of shape (K,)."""

    positives: np.ndarray  # p_k: positives in the bin
    mass: np.ndarray  # m_k: sum of 1/(area of the region) over these positives (pixels only)
    above: np.ndarray  # a_k: negatives in all higher bins, also those that hold no positive
    inside: np.ndarray  # n_k: negatives in the bin
    negatives: int  # N: all negatives
    regions: int  # R: all regions


def _bins(everything, positives, mass, regions):
    """Bins from a histogram in ascending order of scores: all samples, positives, region mass, each (B,)."""
    descending = np.flatnonzero(positives)[::-1]
    all_upto = np.cumsum(everything)
    total = int(all_upto[-1]) if all_upto.size else 0
    p = positives[descending]
    higher = total - all_upto[descending]  # samples in higher bins
    higher_positives = np.cumsum(p) - p
    return Bins(
        positives=p,
        mass=mass[descending],
        above=higher - higher_positives,
        inside=everything[descending] - p,
        negatives=total - int(p.sum()),
        regions=regions,
    )


def _area(weight, b, limit):
    """Sum of weight x E_k(limit): the area under a curve that rises by weight_k while FP goes from a_k to a_k + n_k."""
    left = np.minimum(b.above, limit)
    right = np.minimum(b.above + b.inside, limit)
    # of the rise, what lies before the limit
    share = np.where(b.inside > 0, (right - left) / np.maximum(b.inside, 1), 1.0)
    return float(np.sum(weight * share * (limit - (left + right) / 2)))


def _values(b):
    """AUROC, AP, F1max, AUPRO, each bin being one score (all its samples are tied)."""
    p_total = b.positives.sum()
    limit = FPR_LIMIT * b.negatives
    tp = np.cumsum(b.positives)
    fp = b.above + b.inside
    auroc = _area(b.positives, b, b.negatives) / (p_total * float(b.negatives))
    ap = float(np.sum(b.positives * (tp / (tp + fp)))) / p_total
    f1 = float(np.max(2 * tp / (tp + fp + p_total)))
    aupro = 0.0
    if b.regions:  # image scores have none
        aupro = _area(b.mass, b, limit) / (b.regions * limit)
    return [min(float(v), 1.0) for v in (auroc, ap, f1, aupro)]  # rounding may give 1 + 1e-16


def _image_bins(scores, labels):
    """Bins of image scores (N,) float64 and labels (N,) bool: here a plain sort is cheap."""
    distinct, where = np.unique(scores, return_inverse=True)
    everything = np.bincount(where, minlength=distinct.size)
    positives = np.bincount(where[labels], minlength=distinct.size)
    return _bins(everything, positives, np.zeros(distinct.size), 0)


def best_f1_threshold(scores, labels):
    """The score t for which "defective if score >= t" has the best F1; the highest such t. None without a positive.

    scores (N,) of any float dtype, labels (N,) 0/1. It looks at the labels: for reports, not for choosing on test data.
    """
    scores = np.asarray(_numpy(scores), np.float64).reshape(-1)
    labels = np.asarray(_numpy(labels)).reshape(-1) > 0
    if scores.shape != labels.shape:
        raise UsageError(f"best_f1_threshold: {scores.size} scores but {labels.size} labels")
    if not labels.any():
        return None
    b = _image_bins(scores, labels)
    tp = np.cumsum(b.positives)
    best = np.argmax(2 * tp / (tp + b.above + b.inside + tp[-1]))
    descending = np.unique(scores[labels])[::-1]
    return float(descending[best])


class Ranker:
    """Where does a key lie among K sorted, distinct keys? A table look-up instead of a binary search for each.

    The leading 16 bits of a key (sign, exponent, a few bits of the mantissa) choose a cell. A cell that holds n of the
    K keys is cut into 2n to 4n equal sub-cells, so that most sub-cells hold none or one of them, wherever the K keys
    crowd. A table says how many of the K keys lie in lower sub-cells: if the own sub-cell holds none, this is the rank.
    Otherwise comparing with one or two of the K keys settles it, but for the few keys that share a sub-cell with more
    of them: those are searched.
    """

    def __init__(self, keys):
        self.keys = np.append(keys, np.iinfo(keys.dtype).max)  # a sentinel larger than any score
        self.low = 8 * keys.itemsize - 16  # bits below the leading 16
        cell = (keys >> self.low).astype(np.intp) + 2**15
        held = np.bincount(cell, minlength=2**16)
        wanted = np.ceil(np.log2(2 * np.maximum(held, 1)))
        bits = np.where(held > 0, np.minimum(wanted, self.low), 0).astype(np.intp)
        sub_cells = 1 << bits  # (65536,) of each cell
        self.shift = (self.low - bits).astype(keys.dtype)  # (65536,)
        self.first = np.cumsum(sub_cells) - sub_cells  # (65536,) the cell's first sub-cell
        count = np.bincount(self._cells(keys), minlength=int(np.sum(sub_cells)))
        lower = (np.cumsum(count) - count).astype(np.int32)
        self.lower = np.where(count > 0, ~lower, lower)  # (sub-cells,); ~r = -1 - r: not empty

    def _cells(self, keys):
        """The sub-cell (n,) of each key."""
        top = (keys >> self.low).astype(np.intp)
        top += 2**15
        rest = keys & ((1 << self.low) - 1)
        cell = self.first.take(top)
        cell += rest >> self.shift.take(top)
        return cell

    def codes(self, keys):
        """keys (n,) -> (n,): 2r if r of the K keys are smaller and none is equal, 2r + 1 if the next one is equal."""
        code = self.lower.take(self._cells(keys)).astype(np.intp)
        some = np.flatnonzero(code < 0)
        key = keys[some]
        rank = ~code[some]
        rank += self.keys.take(rank) < key
        far = np.flatnonzero(self.keys.take(rank) < key)
        rank[far] = np.searchsorted(self.keys, key[far])
        code *= 2
        code[some] = 2 * rank + (self.keys.take(rank) == key)
        return code


# ------------------------------------------------------------------------------------------- the accumulator


@dataclass
class _Class:
    """What is kept of one class: image scores and positive pixels always, maps in the exact engine only."""

    scores: list = field(default_factory=list)  # floats
    labels: list = field(default_factory=list)  # bools
    maps: list = field(default_factory=list)  # arrays (H, W) of any float dtype
    positives: list = field(default_factory=list)  # arrays (p,): scores of the positive pixels of one image ...
    mass: list = field(default_factory=list)  # ... and 1/(area of its region) for each
    regions: int = 0

    def extend(self, other):
        self.scores.extend(other.scores)
        self.labels.extend(other.labels)
        self.maps.extend(other.maps)
        self.positives.extend(other.positives)
        self.mass.extend(other.mass)
        self.regions += other.regions


def _mass(mask):
    """mask (H, W) bool -> (number of 8-connected regions, 1/area of its region for each pixel of mask in row order)."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    if not rows.size:
        return 0, np.zeros(0)
    # defects are small: label only their bounding box
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    region, number = ndimage.label(box, structure=np.ones((3, 3)))
    region = region[box]  # (positive pixels,), from 1
    return number, 1 / np.bincount(region)[region]


class Accumulator:
    """Collects batches of one evaluation; `compute` gives the report that `evaluate` documents.

    engine          "auto" (exact up to EXACT_PIXELS pixels, then bounded), "exact" or "bounded"
    expected_pixels with "auto", if known: start bounded at once, instead of keeping the first gigabyte of maps
    It can be pickled and sent elsewhere. Batches may differ in image size, classes and float dtype.
    """

    def __init__(self, engine="auto", expected_pixels=None):
        if engine not in ("auto", "exact", "bounded"):
            raise UsageError(f"engine={engine!r}: choose auto, exact or bounded")
        self.engine = engine
        self.images, self.pixels = 0, 0
        self.classes = {}  # name -> _Class
        self.histogram = None  # set: the bounded engine is at work
        too_many = engine == "auto" and (expected_pixels or 0) > EXACT_PIXELS
        if engine == "bounded" or too_many:
            self.histogram = Histogram()

    def update(self, maps, masks, image_scores, labels, classes, names=None, copy=True):
        """Add N images, torch tensors (any device), numpy arrays or sequences of (H, W) ones.

        maps (N, H, W) float16, bfloat16, float32 or float64; masks (N, H, W), any dtype, > 0 is defect;
        image_scores (N,) float; labels (N,), 1 or True = defective; classes (N,), names or numbers;
        names (N,) to be used in error messages, such as paths. copy=False: the caller will not change the maps before
        `compute`, so the exact engine need not copy them.

        Raises UsageError, and adds nothing, if a score is NaN or infinite, shapes do not fit or a label is not 0/1.
        """
        batch = _check(maps, masks, image_scores, labels, classes, names)
        copy = copy and self.histogram is None
        for a_map, mask, score, label, name in zip(*batch):
            c = self.classes.setdefault(str(name), _Class())
            c.scores.append(float(score))
            c.labels.append(bool(label))
            c.maps.append(a_map.copy() if copy else a_map)
            mask = mask if mask.dtype == bool else mask > 0
            number, mass = _mass(mask)
            if number:
                c.positives.append(a_map[mask])
                c.mass.append(mass)
                c.regions += number
            self.images += 1
            # float64 counts twice: it is memory that is scarce
            self.pixels += a_map.size * (2 if a_map.dtype == np.float64 else 1)
            self._choose_engine()

    def _choose_engine(self):
        """Let the bounded engine take over once it is due."""
        due = self.engine != "exact" and self.pixels > EXACT_PIXELS
        if due or self.histogram is not None:
            self._become_bounded()

    def _become_bounded(self):
        """Move the kept maps, if any, into the histogram."""
        if self.histogram is None:
            self.histogram = Histogram()
        for name, c in self.classes.items():
            for a_map in c.maps:
                self.histogram.add_map(name, a_map)
            for scores, mass in zip(c.positives, c.mass):
                keys = keys_of(scores)
                self.histogram.add(name, 1, keys, 1)
                self.histogram.add(name, 2, keys, mass)
            c.maps, c.positives, c.mass = [], [], []

    def merge(self, other):
        """Add what another accumulator holds, which is left as it is; returns self. Associative and commutative."""
        for name, c in other.classes.items():
            self.classes.setdefault(name, _Class()).extend(c)
        self.images += other.images
        self.pixels += other.pixels
        self._choose_engine()
        if other.histogram is not None:
            self._become_bounded()
            self.histogram.merge(other.histogram)
        return self

    def compute(self):
        """The report of `evaluate`. More batches may follow."""
        return _report(self, _Alone())


class _Alone:
    """One process: what others gather from all processes and add up is its own."""

    def gather(self, thing):
        return [thing]

    def total(self, array):
        return array


class _Group:
    """All processes of a torch.distributed group."""

    def __init__(self):
        self.device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"

    def gather(self, thing):
        """The things of all processes, in the order of their ranks."""
        things = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(things, thing)
        return things

    def total(self, array):
        """The sum of the processes' arrays."""
        # on the CPU the tensor shares memory: the array itself is added up
        tensor = torch.from_numpy(array).to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()


def evaluate(maps, masks=None, image_scores=None, labels=None, classes=None, names=None, engine="auto"):
    """All seven metrics, per class, averaged and pooled.

    Either arrays: maps (N, H, W) float, masks (N, H, W) with > 0 = defect, image_scores (N,), labels (N,) with
    1 = defective, classes (N,), names (N,) or None (for error messages); or one iterable of such batches, each a tuple
    (maps, masks, image_scores, labels, classes[, names]), so that not all maps have to be in memory. Details and errors
    raised: `Accumulator.update`.

    Returns {"classes": {NAME: {metric: value}}, "mean": {...}, "mixed": {...}, "engine": "exact" or "bounded",
    "images": N} and, from the bounded engine, "error_bounds" with "classes", "mean" and "mixed" of the same form: the
    exact value lies within value +- bound. Values are Python floats in [0, 1] or None where undefined, classes are
    sorted, metrics are METRICS in this order.
    """
    if masks is not None:
        expected = sum(np.prod(np.shape(m)) for m in maps)
        acc = Accumulator(engine, expected_pixels=expected)
        acc.update(maps, masks, image_scores, labels, classes, names, copy=False)
        return acc.compute()
    acc = Accumulator(engine)
    for batch in maps:
        if not isinstance(batch, (tuple, list)):
            raise UsageError("metrics.evaluate: give maps, masks, image_scores, labels, classes "
                             "or batches of them")
        acc.update(*batch)
    return acc.compute()


def of_image_scores(scores, labels, classes):
    """The image metrics alone, as `evaluate` returns them; of what is undefined nothing warns.

    scores: (N,). labels: (N,), 1 or true is defective. classes: (N,) names.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    one_pixel = scores[:, None, None], labels[:, None, None]  # (N,) -> (N, 1, 1), in place of maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(*one_pixel, scores, labels, classes)


def reduce(acc):
    """The report over all processes of a torch.distributed group, in each of them; `acc.compute()` if there is none.

    Every image must be in one process only (a sampler that repeats images to fill the last batch would count them
    twice). Maps stay where they are. Exact engine: the processes exchange image scores and positive pixels, each
    ranks its own pixels among all positives, and the counts are added up. Bounded engine: they agree on the bins and
    add up the histograms. If the processes' pixels together are too many for "auto", all become bounded.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _report(acc, _Group())
    return acc.compute()


# ------------------------------------------------------------------------------------------------ the report


def _report(acc, group):
    """The report of `evaluate` over the processes of a group (`_Alone`, `_Group`)."""
    _agree_on_engine(acc, group)
    bounded = acc.histogram is not None
    scores, labels, regions = _image_scores(acc, group)
    names = sorted(scores)
    if not names:
        raise UsageError("metrics: there are no images to evaluate")

    values, bounds = {}, {}  # class -> {metric: number}; the pool of all classes is None
    every_view = _histogram_bins if bounded else _ranked_bins
    for name, pixels in every_view(acc, names, regions, group):
        members = names if name is None else [name]
        pool_scores = np.concatenate([scores[member] for member in members])
        pool_labels = np.concatenate([labels[member] for member in members])
        title = "all classes mixed" if name is None else f"class {name!r}"
        exact = not bounded or acc.histogram.single_scores()
        images = _image_bins(pool_scores, pool_labels)
        values[name], bounds[name] = _seven(title, images, pixels, exact)

    report = _three_views(values, names)
    report["engine"] = "bounded" if bounded else "exact"
    report["images"] = sum(s.size for s in scores.values())
    if bounded:
        report["error_bounds"] = _three_views(bounds, names)
    return report


def _agree_on_engine(acc, group):
    """All processes become bounded if one is, or if their pixels together are too many."""
    states = group.gather((acc.histogram is not None, acc.engine == "exact", acc.pixels))
    one_bounded = any(bounded for bounded, _, _ in states)
    all_exact = all(exact for _, exact, _ in states)
    too_many = sum(pixels for _, _, pixels in states) > EXACT_PIXELS
    if one_bounded or (too_many and not all_exact):
        acc._become_bounded()


def _image_scores(acc, group):
    """Of all processes, per class: image scores {class: (N,) float64}, labels {(N,) bool}, numbers of regions."""
    scores, labels, regions = {}, {}, {}
    mine = {name: (c.scores, c.labels, c.regions) for name, c in acc.classes.items()}
    for part in group.gather(mine):
        for name, (part_scores, part_labels, part_regions) in part.items():
            scores.setdefault(name, []).extend(part_scores)
            labels.setdefault(name, []).extend(part_labels)
            regions[name] = regions.get(name, 0) + part_regions
    scores = {name: np.array(values, np.float64) for name, values in scores.items()}
    labels = {name: np.array(values, bool) for name, values in labels.items()}
    return scores, labels, regions


def _three_views(rows, names):
    """rows: class -> {metric: value}, and None -> that of the pool. Returns the views of the module's docstring."""
    classes = {name: rows[name] for name in names}
    return {"classes": classes, "mean": mean(classes.values()), "mixed": rows[None]}


def _ranked_bins(acc, names, regions, group):
    """Exact engine: yields (class, Bins) for every class, then (None, Bins of the pool of all classes).

    Bins are the distinct scores of positive pixels. One class after the other, so that the bins of only one are held.
    """
    parts = group.gather({name: (c.positives, c.mass) for name, c in acc.classes.items()})
    dtype = _common_dtype(acc, group)
    keys, mass = {}, {}
    for name in names:
        key_arrays, mass_arrays = [keys_of(np.zeros(0), dtype)], [np.zeros(0)]
        for part in parts:
            part_positives, part_mass = part.get(name, ([], []))
            key_arrays += [keys_of(p, dtype) for p in part_positives]
            mass_arrays += part_mass
        keys[name] = np.concatenate(key_arrays)
        mass[name] = np.concatenate(mass_arrays)
    ascending = np.sort(np.concatenate(list(keys.values())))
    first_of_equals = np.append(True, ascending[1:] != ascending[:-1])[: ascending.size]
    distinct = ascending[first_of_equals]
    ranker = Ranker(distinct)
    size = 2 * distinct.size + 1  # a gap, a score, a gap, a score, ... a gap
    pool = [np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size)]
    for name in names:
        everything = np.zeros(size, np.int64)
        if name in acc.classes:
            _count(acc.classes[name].maps, ranker, dtype, everything)
        everything = group.total(everything)
        code = ranker.codes(keys[name])
        positives = np.bincount(code, minlength=size)
        weight = np.bincount(code, mass[name], minlength=size)
        for pooled, row in zip(pool, (everything, positives, weight)):
            pooled += row
        yield name, _bins(everything, positives, weight, regions[name])
    yield None, _bins(*pool, sum(regions.values()))


def _common_dtype(acc, group):
    """The float type in which scores are compared: float64 if any map of any process is in it, else float32."""
    mine = {a_map.dtype for c in acc.classes.values() for a_map in c.maps}
    kinds = set().union(*group.gather(mine))
    return np.float64 if np.dtype(np.float64) in kinds else np.float32


def _count(maps, ranker, dtype, everything):
    """Add every pixel of the maps to its place in `everything` (2K + 1,)."""
    for a_map in maps:
        flat = a_map.reshape(-1)  # (H, W) -> (H * W,)
        for i in range(0, flat.size, PIECE):
            keys = keys_of(flat[i : i + PIECE], dtype)
            np.add.at(everything, ranker.codes(keys), 1)


def _histogram_bins(acc, names, regions, group):
    """Bounded engine: yields the same as `_ranked_bins`. Bins are intervals of scores."""
    acc.histogram.align(group.gather)
    pool = None
    for name in names:
        rows = [group.total(row) for row in acc.histogram.ascending(name)]
        if pool is None:
            pool = rows
        else:
            pool = [pooled + row for pooled, row in zip(pool, rows)]
        yield name, _bins(*rows, regions[name])
    yield None, _bins(*pool, sum(regions.values()))


def _seven(title, images, pixels, exact):
    """Values and error bounds of METRICS for one view, each a dict; warns of what is undefined.

    exact: a bin of pixels holds one score, otherwise an interval of scores. The bounds include rounding. A sum of P
    terms that are not negative, in any order, is off by at most P x 2^-53 of itself: that is the region mass, added up
    pixel by pixel. The rest (integers, then numpy's pairwise sums over the bins) stays far below ROUNDING.
    """
    value, bound = dict.fromkeys(METRICS), dict.fromkeys(METRICS)
    if _defined(title, images, IMAGE_METRICS, "image"):
        for key, v in zip(IMAGE_METRICS, _values(images)):  # the fourth, AUPRO, is for pixels only
            value[key], bound[key] = v, 0.0
    if _defined(title, pixels, PIXEL_METRICS, "pixel"):
        rounding = ROUNDING + float(pixels.positives.sum()) * 2.0**-53
        if exact:
            low = high = _values(pixels)
        else:
            low, high = intervals(pixels, FPR_LIMIT * pixels.negatives)
        for key, least, most in zip(PIXEL_METRICS, low, high):
            value[key] = (least + most) / 2
            bound[key] = (most - least) / 2 + rounding
    if None not in [value[key] for key in SEVEN]:
        value["mad"] = sum(value[key] for key in SEVEN) / len(SEVEN)
        bound["mad"] = sum(bound[key] for key in SEVEN) / len(SEVEN)
    return value, bound


def _defined(title, b, keys, unit):
    """Whether there are positives and negatives; otherwise a warning names class and metrics."""
    if b.positives.size and b.negatives:
        return True
    lacking = "good" if b.positives.size else "defective"
    warnings.warn(f"{title}: {', '.join(keys)} and mad are undefined, there is no {lacking} {unit}",
                  stacklevel=6)
    return False


def mean(rows):
    """Average of each metric over the classes in which it is defined; None if there is none."""
    average = dict.fromkeys(METRICS)
    for key in METRICS:
        column = [row[key] for row in rows if row[key] is not None]
        if column:
            average[key] = sum(column) / len(column)
    return average


# ------------------------------------------------------------------------------------------------- the input


def _numpy(x):
    """Array, tensor of any device or sequence of them -> numpy array; bfloat16, unknown to numpy, becomes float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        if x.dtype == torch.bfloat16:
            x = x.float()
        return x.cpu().numpy()
    if isinstance(x, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in x):
        return np.asarray([_numpy(item) for item in x])
    return np.asarray(x)


def _arrays(stack):
    """A stack of images as one array (N, H, W), or, if given one by one, as a list of arrays (H, W)."""
    if isinstance(stack, (list, tuple)):
        return [_numpy(x) for x in stack]
    return _numpy(stack)


def _check(maps, masks, image_scores, labels, classes, names):
    """The arguments of `Accumulator.update` as numpy arrays (or lists of them), or UsageError naming the image."""
    maps, masks = _arrays(maps), _arrays(masks)
    scores, labels = _numpy(image_scores), _numpy(labels)
    lists = {"masks": masks, "image_scores": scores, "labels": labels, "classes": classes}
    if names is not None:
        lists["names"] = names
    for what, given in lists.items():
        several = np.iterable(given) and not isinstance(given, str)  # "bottle" is one class, not six
        number = len(given) if several else "no list of"
        if number != len(maps):
            raise UsageError(f"metrics: {len(maps)} maps but {number} {what}: give one per image")
    classes = [c.item() if isinstance(c, torch.Tensor) else c for c in classes]
    for i in range(len(maps)):
        fault = _fault(maps[i], masks[i], scores[i], labels[i])
        if fault:
            image = f"image {i} of the batch" if names is None else f"image {names[i]}"
            raise UsageError(f"metrics: {image} (class {classes[i]}): {fault}")
    return maps, masks, scores.astype(np.float64), labels.astype(bool), classes


def _fault(a_map, mask, score, label):
    """What is wrong with the input of one image; "" if nothing."""
    if np.ndim(a_map) != 2 or np.shape(a_map) != np.shape(mask):
        return f"map of shape {np.shape(a_map)} and mask of shape {np.shape(mask)}: both must be (H, W)"
    if a_map.dtype not in (np.float16, np.float32, np.float64):
        return f"map of dtype {a_map.dtype}: give float16, bfloat16, float32 or float64"
    if not np.isfinite(a_map).all():
        return "the map holds NaN or infinite scores"
    if not isinstance(score, Real) or not np.isfinite(score):
        return f"the image score {score} is not a finite number"
    if label not in (0, 1):
        return f"the label {label} is neither 0 (good) nor 1 (defective)"
    return ""
