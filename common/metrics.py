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
          per class, 12 MiB each, whatever the number of images (`Histogram`). A bin is then not one score but an
          interval of neighbouring floats; inside it the order of positives and negatives is unknown. Every metric is
          computed for the best and the worst order that is possible (`_intervals`): the exact value lies between.
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

IMAGE_METRICS = ("i_auroc", "i_ap", "i_f1max")
PIXEL_METRICS = ("p_auroc", "p_ap", "p_f1max", "p_aupro")
METRICS = IMAGE_METRICS + PIXEL_METRICS + ("mad",)

FPR_LIMIT = 0.3             # AUPRO: integrate up to this false positive rate, as in the papers
EXACT_PIXELS = 2 ** 28      # more than this, float64 ones twice: the bounded engine. 4096 maps of 256 x 256, 1 GiB
ROUNDING = 1e-12            # added to the error bounds, see `_seven`


# ------------------------------------------------------------------------------------------------- the four formulas
class Bins(NamedTuple):
    """Scores that hold at least one positive, from the highest to the lowest. Arrays of shape (K,)."""
    positives: np.ndarray   # p_k: positives in the bin
    mass: np.ndarray        # m_k: sum of 1/(area of the region) over these positives (pixels only)
    above: np.ndarray       # a_k: negatives in all higher bins, also those that hold no positive
    inside: np.ndarray      # n_k: negatives in the bin
    negatives: int          # N: all negatives
    regions: int            # R: all regions


def _bins(everything, positives, mass, regions):
    """Bins from a histogram in ascending order of scores: all samples, positives, region mass, each (B,)."""
    keep = np.flatnonzero(positives)[::-1]
    positives, mass = positives[keep], mass[keep]
    upto = np.cumsum(everything)
    total = int(upto[-1]) if upto.size else 0
    higher_positives = np.cumsum(positives) - positives
    return Bins(positives, mass, above=total - upto[keep] - higher_positives, inside=everything[keep] - positives,
                negatives=total - int(positives.sum()), regions=regions)


def _area(weight, b, limit):
    """Sum of weight x E_k(limit): the area under a curve that rises by weight_k while FP goes from a_k to a_k + n_k."""
    left, right = np.minimum(b.above, limit), np.minimum(b.above + b.inside, limit)
    share = np.where(b.inside > 0, (right - left) / np.maximum(b.inside, 1), 1.0)     # of the rise, before the limit
    return float(np.sum(weight * share * (limit - (left + right) / 2)))


def _values(b):
    """AUROC, AP, F1max, AUPRO, each bin being one score (all its samples are tied)."""
    p_total, limit = b.positives.sum(), FPR_LIMIT * b.negatives
    tp, fp = np.cumsum(b.positives), b.above + b.inside
    auroc = _area(b.positives, b, b.negatives) / (p_total * float(b.negatives))
    ap = float(np.sum(b.positives * (tp / (tp + fp)))) / p_total
    f1 = float(np.max(2 * tp / (tp + fp + p_total)))
    aupro = _area(b.mass, b, limit) / (b.regions * limit) if b.regions else 0.0       # 0 regions: image scores
    return [min(float(v), 1.0) for v in (auroc, ap, f1, aupro)]                       # rounding may give 1 + 1e-16


def _intervals(b):
    """Lowest and highest possible AUROC, AP, F1max, AUPRO when the order inside each bin is unknown: two lists.

    In a bin with p positives and n negatives, T positives and F negatives in the bins above:
    * a positive's own FP is at least a_k = F and at most a_k + n_k = F + n: strips of AUROC and AUPRO;
    * its precision is at most (T+p)/(T+p+F) (all positives tied, before the negatives), and that of the i-th positive
      at least (T+i)/(T+i+F+n) (all negatives first). The sum over i of the latter is p - (F+n) sum_i 1/(T+F+n+i) and
      sum_i 1/(A+i) <= ln(1 + p/A), as 1/x falls;
    * a threshold in the bin has TP <= T+p, FP >= F, so F1 <= 2(T+p)/(T+p+F+P); the lowest score of the bin is itself a
      threshold, with F1 = 2(T+p)/(T+p+F+n+P).
    """
    p_total, limit = b.positives.sum(), FPR_LIMIT * b.negatives
    tp, f_low, f_high = np.cumsum(b.positives), b.above, b.above + b.inside

    def strips(weight, f, limit):
        return float(np.sum(weight * np.maximum(limit - f, 0.0)))
    before = (tp - b.positives + f_high).astype(np.float64)                           # A = T + F + n
    ap_low = b.positives - f_high * np.log1p(b.positives / np.maximum(before, 1.0))   # A = 0: then F + n = 0
    area, partial = p_total * float(b.negatives), b.regions * limit
    low = (strips(b.positives, f_high, b.negatives) / area, float(np.sum(ap_low)) / p_total,
           float(np.max(2 * tp / (tp + f_high + p_total))), strips(b.mass, f_high, limit) / partial)
    high = (strips(b.positives, f_low, b.negatives) / area, float(np.sum(b.positives * (tp / (tp + f_low)))) / p_total,
            float(np.max(2 * tp / (tp + f_low + p_total))), strips(b.mass, f_low, limit) / partial)
    return [[min(float(v), 1.0) for v in ends] for ends in (low, high)]               # as in `_values`


def _image_bins(scores, labels):
    """Bins of image scores (N,) float64 and labels (N,) bool: here a plain sort is cheap."""
    distinct, where = np.unique(scores, return_inverse=True)
    positives = np.bincount(where[labels], minlength=distinct.size)
    return _bins(np.bincount(where, minlength=distinct.size), positives, np.zeros(distinct.size), 0)


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
    return float(np.unique(scores[labels])[::-1][best])


# ------------------------------------------------------------------------------------- scores as integers, and ranks
def _keys(scores, dtype=np.float32):
    """Floats of any shape -> integers (n,) in the same order: int32 for float32, int64 for float64.

    The bits of a non-negative IEEE float, read as an integer, are in the order of the floats; for a negative float the
    order is reversed, which flipping all bits but the sign mends. -0.0 becomes 0.0, so that the two stay equal.
    """
    with np.errstate(over="ignore"):                    # float64 beyond float32's range become infinite: still in order
        x = np.add(scores.reshape(-1), dtype(0), dtype=dtype)
    key = x.view(np.int32 if dtype is np.float32 else np.int64)
    key ^= (key >> (8 * key.itemsize - 1)) & np.iinfo(key.dtype).max
    return key


class Ranker:
    """Where does a key lie among K sorted, distinct keys? A table look-up instead of a binary search for each.

    The leading 16 bits of a key (sign, exponent, a few bits of the mantissa) choose a cell. A cell that holds n of the
    K keys is cut into 2n to 4n equal sub-cells, so that most sub-cells hold none or one of them, wherever the K keys
    crowd. A table says how many of the K keys lie in lower sub-cells: if the own sub-cell holds none, this is the rank.
    Otherwise comparing with one or two of the K keys settles it, but for the few keys that share a sub-cell with more
    of them: those are searched.
    """

    def __init__(self, keys):
        self.keys = np.append(keys, np.iinfo(keys.dtype).max)                   # a sentinel larger than any score
        self.low = 8 * keys.itemsize - 16                                       # bits below the leading 16
        held = np.bincount((keys >> self.low).astype(np.intp) + 2 ** 15, minlength=2 ** 16)
        bits = np.where(held > 0, np.minimum(np.ceil(np.log2(2 * np.maximum(held, 1))), self.low), 0).astype(np.intp)
        self.shift = (self.low - bits).astype(keys.dtype)                       # (65536,)
        self.first = np.cumsum(1 << bits) - (1 << bits)                         # (65536,) the cell's first sub-cell
        count = np.bincount(self._cells(keys), minlength=int(np.sum(1 << bits)))
        lower = (np.cumsum(count) - count).astype(np.int32)
        self.lower = np.where(count > 0, ~lower, lower)                         # (sub-cells,); ~r = -1 - r: not empty

    def _cells(self, keys):
        top = (keys >> self.low).astype(np.intp)
        top += 2 ** 15
        cell = self.first.take(top)
        cell += (keys & ((1 << self.low) - 1)) >> self.shift.take(top)
        return cell

    def codes(self, keys):
        """keys (n,) -> (n,): 2r if r of the K keys are smaller and none is equal, 2r + 1 if the next one is equal."""
        code = self.lower.take(self._cells(keys)).astype(np.intp)
        some = np.flatnonzero(code < 0)
        key, rank = keys[some], ~code[some]
        rank += self.keys.take(rank) < key
        far = np.flatnonzero(self.keys.take(rank) < key)
        rank[far] = np.searchsorted(self.keys, key[far])
        code *= 2
        code[some] = 2 * rank + (self.keys.take(rank) == key)
        return code


# ----------------------------------------------------------------------------------------------- the bounded engine
PAGE_BITS = 10              # a page is 2^10 = 1024 neighbouring bins
PAGE = 2 ** PAGE_BITS
PAGES = 512                 # at most 512 x 1024 = 2^19 bins, 3 x 8 bytes each: 12 MiB per class


class Histogram:
    """Pixels, positives and region mass per interval of 2^shift neighbouring float32 keys, for every class.

    Two levels: a directory says which pages (1024 bins each) are in use; only these are stored, so bins are spent where
    scores are. When more than 512 pages are needed, `shift` grows by one, which joins bins two by two. The final
    shift is the smallest for which all scores seen fit in 512 pages, in whatever order they came: that makes merging
    associative. Scores within one octave, say 0.25 to 0.5, need shift 4: 16 neighbouring floats a bin, of some 500,000.
    The whole range of float32 needs shift 13.
    """

    def __init__(self):
        self.bits, self.rounded = 0, False                                        # see single_scores
        self._clear(shift=0)

    def _clear(self, shift):
        self.shift, self.rows = shift, {}                                         # rows: class -> three arrays
        self.directory = np.full(2 ** (32 - PAGE_BITS - shift), -1, np.int32)     # page -> slot, -1: not in use
        self.used = 0

    def add_map(self, name, a_map):
        """Count the pixels of a map (H, W) of any float dtype; they come before its positives and mass."""
        keys = _keys(a_map)
        self.bits |= int(np.bitwise_or.reduce(keys ^ ((keys >> 31) & 0x7fffffff), initial=0))
        with np.errstate(over="ignore"):
            self.rounded = self.rounded or bool(np.any(a_map != a_map.astype(np.float32)))
        self.add(name, 0, keys, 1)

    def single_scores(self):
        """True if no bin can hold two different scores: then the engine is exact, as for float16 or constant maps.

        So it is if the last `shift` bits of all scores, as float32, are zero, and none was rounded to float32.
        """
        return not self.rounded and not self.bits & ((1 << self.shift) - 1)

    def _add_pages(self, pages):
        """False, and nothing is done, if the pages (sorted, distinct, not yet in use) do not fit."""
        if self.used + pages.size > PAGES:
            return False
        self.directory[pages] = np.arange(self.used, self.used + pages.size)
        self.used += pages.size
        return True

    def _slots(self, keys):
        """The place (n,) of each key's bin in the arrays of a class; makes room for it where there is none."""
        while True:
            page = (keys >> (self.shift + PAGE_BITS)) + (len(self.directory) // 2)       # keys are signed
            slot = self.directory.take(page).astype(np.intp)
            new = slot < 0
            if not new.any():
                break
            if not self._add_pages(np.unique(page[new])):
                self.coarsen()
        slot *= PAGE
        slot += (keys >> self.shift) & (PAGE - 1)
        return slot

    def add(self, name, row, keys, amount):
        """Add amount (a number or (n,)) to row 0 pixels, 1 positives or 2 mass at keys (n,) int32 of class `name`."""
        slots = self._slots(keys)
        if name not in self.rows:
            self.rows[name] = [np.zeros(PAGES * PAGE, kind) for kind in (np.int64, np.int64, np.float64)]
        np.add.at(self.rows[name][row], slots, amount)

    def pages(self):
        """Pages in use, ascending."""
        return np.flatnonzero(self.directory >= 0)

    def _bin_keys(self):
        """The lowest key of every bin in use, (pages, 1024) int32, and its place in the arrays of a class."""
        page = self.pages()
        first = (page - len(self.directory) // 2)[:, None] << (self.shift + PAGE_BITS)
        return ((first + (np.arange(PAGE) << self.shift)).astype(np.int32),
                self.directory[page][:, None] * PAGE + np.arange(PAGE))

    def merge(self, other):
        """Add the other's content; the result is as coarse as the coarser, or as the budget demands."""
        self.bits, self.rounded = self.bits | other.bits, self.rounded or other.rounded
        while self.shift < other.shift:
            self.coarsen()
        keys, slots = other._bin_keys()
        for name, rows in other.rows.items():
            self._add_bins(name, rows, keys, slots)

    def _add_bins(self, name, rows, keys, slots):
        """Add the three arrays of a class, whose bins with the given lowest keys are at the given places."""
        filled = rows[0][slots] > 0
        for i, row in enumerate(rows):
            self.add(name, i, keys[filled], row[slots[filled]])

    def coarsen(self):
        """Join bins two by two. One class after the other is emptied and freed, so that only one is held twice."""
        finer, (keys, slots) = self.rows, self._bin_keys()
        self._clear(self.shift + 1)
        while finer:
            name, rows = finer.popitem()
            self._add_bins(name, rows, keys, slots)

    def align(self, gather):
        """Make the layout the same in all processes, so that their arrays can be added up."""
        layouts = gather((self.shift, self.pages(), self.bits, self.rounded))
        self.bits = int(np.bitwise_or.reduce([bits for _, _, bits, _ in layouts]))
        self.rounded = any(rounded for _, _, _, rounded in layouts)
        shift = max(layout[0] for layout in layouts)
        while len(pages := np.unique(np.concatenate([p >> (shift - s) for s, p, _, _ in layouts]))) > PAGES:
            shift += 1
        while self.shift < shift:
            self.coarsen()
        self._add_pages(np.setdiff1d(pages, self.pages()))

    def ascending(self, name):
        """Pixels, positives and mass of a class, (bins,) each, in ascending order of scores; zeros if it has none."""
        slots = self.directory[self.pages()]
        rows = self.rows.get(name) or [np.zeros(PAGES * PAGE, kind) for kind in (np.int64, np.int64, np.float64)]
        return [row.reshape(PAGES, PAGE)[slots].reshape(-1) for row in rows]


# ---------------------------------------------------------------------------------------------------- the accumulator
@dataclass
class _Class:
    """What is kept of one class: image scores and positive pixels always, maps in the exact engine only."""
    scores: list = field(default_factory=list)      # floats
    labels: list = field(default_factory=list)      # bools
    maps: list = field(default_factory=list)        # arrays (H, W) of any float dtype
    positives: list = field(default_factory=list)   # arrays (p,): scores of the positive pixels of one image ...
    mass: list = field(default_factory=list)        # ... and 1/(area of its region) for each
    regions: int = 0

    def extend(self, other):
        for name in ("scores", "labels", "maps", "positives", "mass"):
            getattr(self, name).extend(getattr(other, name))
        self.regions += other.regions


def _mass(mask):
    """mask (H, W) bool -> (number of 8-connected regions, 1/area of its region for each pixel of mask in row order)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return 0, np.zeros(0)
    box = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]    # defects are small: label only their bounding box
    region, number = ndimage.label(box, structure=np.ones((3, 3)))
    region = region[box]
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
        self.engine, self.images, self.pixels, self.classes = engine, 0, 0, {}
        self.histogram = None                                                      # set: the bounded engine is at work
        if engine == "bounded" or engine == "auto" and (expected_pixels or 0) > EXACT_PIXELS:
            self.histogram = Histogram()

    def update(self, maps, masks, image_scores, labels, classes, names=None, copy=True):
        """Add N images, torch tensors (any device), numpy arrays or sequences of (H, W) ones.

        maps (N, H, W) float16, bfloat16, float32 or float64; masks (N, H, W), any dtype, > 0 is defect;
        image_scores (N,) float; labels (N,), 1 or True = defective; classes (N,), names or numbers;
        names (N,) to be used in error messages, such as paths. copy=False: the caller will not change the maps before
        `compute`, so the exact engine need not copy them.

        Raises UsageError, and adds nothing, if a score is NaN or infinite, shapes do not fit or a label is not 0/1.
        """
        maps, masks, scores, labels, classes = _check(maps, masks, image_scores, labels, classes, names)
        if copy and self.histogram is None and isinstance(maps, np.ndarray):
            maps = maps.copy()
        elif copy and self.histogram is None:
            maps = [m.copy() for m in maps]
        for a_map, mask, score, label, name in zip(maps, masks, scores, labels, classes):
            c = self.classes.setdefault(str(name), _Class())
            c.scores.append(float(score))
            c.labels.append(bool(label))
            c.maps.append(a_map)
            mask = mask if mask.dtype == bool else mask > 0
            number, mass = _mass(mask)
            if number:
                c.positives.append(a_map[mask])
                c.mass.append(mass)
                c.regions += number
            self.images += 1
            self.pixels += a_map.size * (2 if a_map.dtype == np.float64 else 1)        # it is memory that is scarce
            self._choose_engine()

    def _choose_engine(self, force=False):
        """Move the kept maps, if any, into the histogram, once the bounded engine is at work or becomes due."""
        if self.histogram is None:
            if not force and (self.engine == "exact" or self.pixels <= EXACT_PIXELS):
                return
            self.histogram = Histogram()
        for name, c in self.classes.items():
            for a_map in c.maps:
                self.histogram.add_map(name, a_map)
            for scores, mass in zip(c.positives, c.mass):
                self.histogram.add(name, 1, _keys(scores), 1)
                self.histogram.add(name, 2, _keys(scores), mass)
            c.maps, c.positives, c.mass = [], [], []

    def merge(self, other):
        """Add what another accumulator holds, which is left as it is; returns self. Associative and commutative."""
        for name, c in other.classes.items():
            self.classes.setdefault(name, _Class()).extend(c)
        self.images += other.images
        self.pixels += other.pixels
        self._choose_engine(force=other.histogram is not None)
        if other.histogram is not None:
            self.histogram.merge(other.histogram)
        return self

    def compute(self):
        """The report of `evaluate`. More batches may follow."""
        return _report(self, gather=lambda thing: [thing], total=lambda array: array)


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
        acc = Accumulator(engine, expected_pixels=sum(np.prod(np.shape(m)) for m in maps))
        acc.update(maps, masks, image_scores, labels, classes, names, copy=False)
    else:
        acc = Accumulator(engine)
        for batch in maps:
            if not isinstance(batch, (tuple, list)):
                raise UsageError("metrics.evaluate: give maps, masks, image_scores, labels, classes or batches of them")
            acc.update(*batch)
    return acc.compute()


def reduce(acc):
    """The report over all processes of a torch.distributed group, in each of them; `acc.compute()` if there is none.

    Every image must be in one process only (a sampler that repeats images to fill the last batch would count them
    twice). Maps stay where they are. Exact engine: the processes exchange image scores and positive pixels, each
    ranks its own pixels among all positives, and the counts are added up. Bounded engine: they agree on the bins and
    add up the histograms. If the processes' pixels together are too many for "auto", all become bounded.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return acc.compute()
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"

    def gather(thing):
        things = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(things, thing)
        return things

    def total(array):
        tensor = torch.from_numpy(array).to(device)     # on the CPU it shares memory: the array itself is added up
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    return _report(acc, gather, total)


# --------------------------------------------------------------------------------------------------------- the report
def _report(acc, gather, total):
    """gather(thing) -> the things of all processes; total(array) -> their sum."""
    states = gather((acc.histogram is not None, acc.engine == "exact", acc.pixels))
    if any(bounded for bounded, _, _ in states) or (not all(exact for _, exact, _ in states)
                                                    and sum(pixels for _, _, pixels in states) > EXACT_PIXELS):
        acc._choose_engine(force=True)
    bounded = acc.histogram is not None

    parts = gather({name: (c.scores, c.labels, c.regions) for name, c in acc.classes.items()})
    names = sorted({name for part in parts for name in part})
    if not names:
        raise UsageError("metrics: there are no images to evaluate")
    scores, labels, regions = {}, {}, {}
    for name in names:
        mine = [part[name] for part in parts if name in part]
        scores[name] = np.array([s for part in mine for s in part[0]], np.float64)
        labels[name] = np.array([y for part in mine for y in part[1]], bool)
        regions[name] = sum(part[2] for part in mine)

    views, bounds = {}, {}
    for name, pixels in (_histogram_bins if bounded else _ranked_bins)(acc, names, regions, gather, total):
        members = names if name is None else [name]
        images = _image_bins(np.concatenate([scores[n] for n in members]),
                             np.concatenate([labels[n] for n in members]))
        title = "all classes mixed" if name is None else f"class {name!r}"
        views[name], bounds[name] = _seven(title, images, pixels, exact=not bounded or acc.histogram.single_scores())

    def view(source):
        return {"classes": {name: source[name] for name in names}, "mean": mean([source[name] for name in names]),
                "mixed": source[None]}
    report = view(views) | {"engine": "bounded" if bounded else "exact", "images": sum(s.size for s in scores.values())}
    return report | {"error_bounds": view(bounds)} if bounded else report


def _ranked_bins(acc, names, regions, gather, total):
    """Exact engine: yields (class, Bins) for every class, then (None, Bins of the pool of all classes).

    Bins are the distinct scores of positive pixels. One class after the other, so that the bins of only one are held.
    """
    parts = gather({name: (c.positives, c.mass) for name, c in acc.classes.items()})
    kinds = gather({a_map.dtype for c in acc.classes.values() for a_map in c.maps})
    dtype = np.float64 if any(np.dtype(np.float64) in kind for kind in kinds) else np.float32   # float16: exact in it
    keys, mass = {}, {}
    for name in names:
        mine = [part[name] for part in parts if name in part]
        keys[name] = np.concatenate([_keys(np.zeros(0), dtype), *(_keys(p, dtype) for part in mine for p in part[0])])
        mass[name] = np.concatenate([np.zeros(0), *(m for part in mine for m in part[1])])
    distinct = np.sort(np.concatenate(list(keys.values())))
    distinct = distinct[np.append(True, distinct[1:] != distinct[:-1])[:distinct.size]]
    ranker, size = Ranker(distinct), 2 * distinct.size + 1                # a gap, a score, a gap, a score, ... a gap
    pool = [np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size)]
    for name in names:
        counts = np.zeros(size, np.int64)
        for a_map in acc.classes[name].maps if name in acc.classes else []:
            flat = a_map.reshape(-1)
            for i in range(0, flat.size, 2 ** 16):                        # pieces that stay in the processor's cache
                np.add.at(counts, ranker.codes(_keys(flat[i:i + 2 ** 16], dtype)), 1)
        code = ranker.codes(keys[name])
        rows = (total(counts), np.bincount(code, minlength=size), np.bincount(code, mass[name], minlength=size))
        for row, pooled in zip(rows, pool):
            pooled += row
        yield name, _bins(*rows, regions[name])
    yield None, _bins(*pool, sum(regions.values()))


def _histogram_bins(acc, names, regions, gather, total):
    """Bounded engine: yields the same as `_ranked_bins`. Bins are intervals of scores."""
    acc.histogram.align(gather)
    pool = None
    for name in names:
        rows = [total(row) for row in acc.histogram.ascending(name)]
        pool = rows if pool is None else [a + b for a, b in zip(pool, rows)]
        yield name, _bins(*rows, regions[name])
    yield None, _bins(*pool, sum(regions.values()))


def _seven(title, images, pixels, exact):
    """Values and error bounds of METRICS for one view, each a dict; warns of what is undefined.

    exact: a bin of pixels holds one score, otherwise an interval of scores. The bounds include rounding. A sum of P
    terms that are not negative, in any order, is off by at most P x 2^-53 of itself: that is the region mass, added up
    pixel by pixel. The rest (integers, then numpy's pairwise sums over the bins) stays far below ROUNDING.
    """
    value, bound = dict.fromkeys(METRICS), dict.fromkeys(METRICS)
    rounding = ROUNDING + float(pixels.positives.sum()) * 2.0 ** -53
    for keys, b, unit in (IMAGE_METRICS, images, "image"), (PIXEL_METRICS, pixels, "pixel"):
        if not b.positives.size or not b.negatives:
            what = "no defective" if not b.positives.size else "no good"
            warnings.warn(f"{title}: {', '.join(keys)} and mad are undefined (there is {what} {unit}): None",
                          stacklevel=5)
        elif unit == "pixel" and not exact:
            for key, low, high in zip(keys, *_intervals(b)):
                value[key], bound[key] = (low + high) / 2, (high - low) / 2 + rounding
        else:
            for key, v in zip(keys, _values(b)):                          # four values; AUPRO is for pixels only
                value[key], bound[key] = v, rounding if unit == "pixel" else 0.0
    seven = METRICS[:-1]
    if all(value[key] is not None for key in seven):
        value["mad"], bound["mad"] = (sum(d[key] for key in seven) / len(seven) for d in (value, bound))
    return value, bound


def mean(rows):
    """Average of each metric over the classes in which it is defined; None if there is none."""
    columns = {key: [row[key] for row in rows if row[key] is not None] for key in METRICS}
    return {key: sum(column) / len(column) if column else None for key, column in columns.items()}


# ---------------------------------------------------------------------------------------------------------- the input
def _numpy(x):
    """Array, tensor of any device or sequence of them -> numpy array; bfloat16, unknown to numpy, becomes float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
    if isinstance(x, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in x):
        return np.asarray([_numpy(item) for item in x])
    return np.asarray(x)


def _check(maps, masks, image_scores, labels, classes, names):
    """The arguments of `Accumulator.update` as numpy arrays (or lists of them), or UsageError naming the image."""
    maps, masks = ([_numpy(x) for x in stack] if isinstance(stack, (list, tuple)) else _numpy(stack)
                   for stack in (maps, masks))
    scores, labels = _numpy(image_scores), _numpy(labels)
    n = len(maps)
    for what, given in (("masks", masks), ("image_scores", scores), ("labels", labels), ("classes", classes),
                        ("names", range(n) if names is None else names)):
        several = np.iterable(given) and not isinstance(given, str)       # "bottle" is one class, not six
        if not several or len(given) != n:
            raise UsageError(f"metrics: {n} maps but {len(given) if several else 'no list of'} {what}: "
                             "give one per image")
    classes = [c.item() if isinstance(c, torch.Tensor) else c for c in classes]

    def refuse(i, why):
        image = f"image {i} of the batch" if names is None else f"image {names[i]}"
        raise UsageError(f"metrics: {image} (class {classes[i]}): {why}")
    for i in range(n):
        if np.ndim(maps[i]) != 2 or np.shape(maps[i]) != np.shape(masks[i]):
            refuse(i, f"map of shape {np.shape(maps[i])} and mask of shape {np.shape(masks[i])}: both must be (H, W)")
        if maps[i].dtype not in (np.float16, np.float32, np.float64):
            refuse(i, f"map of dtype {maps[i].dtype}: give float16, bfloat16, float32 or float64")
        if not np.isfinite(maps[i]).all():
            refuse(i, "the map holds NaN or infinite scores")
        if not isinstance(scores[i], Real) or not np.isfinite(scores[i]):
            refuse(i, f"the image score {scores[i]} is not a finite number")
        if labels[i] not in (0, 1):
            refuse(i, f"the label {labels[i]} is neither 0 (good) nor 1 (defective)")
    return maps, masks, scores.astype(np.float64), labels.astype(bool), classes
