"""The engine of `common/metrics.py` for more pixels than memory can hold: histograms of scores, and error bounds.

It keeps at most 2^19 bins per class, 12 MiB each, whatever the number of images. A bin is an interval of neighbouring
floats, inside which the order of positives and negatives is not known; `intervals` therefore gives the lowest and the
highest value that each metric can have. What a metric is, and how it follows from bins, stands in `metrics.py`.
"""

import numpy as np

PAGE_BITS = 10  # a page is 2^10 = 1024 neighbouring bins
PAGE = 2**PAGE_BITS
PAGES = 512  # at most 512 x 1024 = 2^19 bins, 3 x 8 bytes each: 12 MiB per class


def keys_of(scores, dtype=np.float32):
    """Floats of any shape -> integers (n,) in the same order: int32 for float32, int64 for float64.

    The bits of a non-negative IEEE float, read as an integer, are in the order of the floats; for a negative float the
    order is reversed, which flipping all bits but the sign mends. -0.0 becomes 0.0, so that the two stay equal.
    """
    # float64 beyond float32's range become infinite: still in order
    with np.errstate(over="ignore"):
        x = np.add(scores.reshape(-1), dtype(0), dtype=dtype)  # (n,)
    key = x.view(np.int32 if dtype is np.float32 else np.int64)
    negative = key >> (8 * key.itemsize - 1)  # all bits 1 for a negative float, else 0
    key ^= negative & np.iinfo(key.dtype).max
    return key


def empty_rows():
    """Three zero arrays, one entry a bin: pixels, positives, region mass."""
    bins = PAGES * PAGE
    return [np.zeros(bins, np.int64), np.zeros(bins, np.int64), np.zeros(bins, np.float64)]


class Histogram:
    """Pixels, positives and region mass per interval of 2^shift neighbouring float32 keys, for every class.

    Two levels: a directory says which pages (1024 bins each) are in use; only these are stored, so bins are spent where
    scores are. When more than 512 pages are needed, `shift` grows by one, which joins bins two by two. The final
    shift is the smallest for which all scores seen fit in 512 pages, in whatever order they came: that makes merging
    associative. Scores within one octave, say 0.25 to 0.5, need shift 4: 16 neighbouring floats a bin, of some 500,000.
    The whole range of float32 needs shift 13.
    """

    def __init__(self):
        self.bits = 0  # every bit that is 1 in some score: see `single_scores`
        self.rounded = False  # whether float32 could not hold some score
        self._clear(shift=0)

    def _clear(self, shift):
        self.shift = shift
        self.rows = {}  # class -> three arrays as of `empty_rows`
        pages = 2 ** (32 - PAGE_BITS - shift)
        self.directory = np.full(pages, -1, np.int32)  # page -> slot, -1: not in use
        self.used = 0

    def add_map(self, name, a_map):
        """Count the pixels of a map (H, W) of any float dtype; they come before its positives and mass."""
        keys = keys_of(a_map)
        magnitudes = keys ^ ((keys >> 31) & 0x7FFFFFFF)
        self.bits |= int(np.bitwise_or.reduce(magnitudes, initial=0))
        with np.errstate(over="ignore"):
            differs = np.any(a_map != a_map.astype(np.float32))
        self.rounded = self.rounded or bool(differs)
        self.add(name, 0, keys, 1)

    def single_scores(self):
        """True if no bin can hold two different scores: then the engine is exact, as for float16 or constant maps.

        So it is if the last `shift` bits of all scores, as float32, are zero, and none was rounded to float32.
        """
        last_bits = (1 << self.shift) - 1
        return not self.rounded and not self.bits & last_bits

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
            page = keys >> (self.shift + PAGE_BITS)
            page += len(self.directory) // 2  # keys are signed
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
            self.rows[name] = empty_rows()
        np.add.at(self.rows[name][row], slots, amount)

    def pages(self):
        """Pages in use, ascending."""
        return np.flatnonzero(self.directory >= 0)

    def _bin_keys(self):
        """The lowest key of every bin in use, (pages, 1024) int32, and its place in the arrays of a class."""
        page = self.pages()[:, None]  # (pages, 1)
        bins = np.arange(PAGE)
        first = (page - len(self.directory) // 2) << (self.shift + PAGE_BITS)
        keys = (first + (bins << self.shift)).astype(np.int32)
        return keys, self.directory[page] * PAGE + bins

    def merge(self, other):
        """Add the other's content; the result is as coarse as the coarser, or as the budget demands."""
        self.bits |= other.bits
        self.rounded = self.rounded or other.rounded
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
        finer = self.rows
        keys, slots = self._bin_keys()
        self._clear(self.shift + 1)
        while finer:
            name, rows = finer.popitem()
            self._add_bins(name, rows, keys, slots)

    def align(self, gather):
        """Make the layout the same in all processes, so that their arrays can be added up.

        gather: function of a thing that returns the things of all processes.
        """
        layouts = gather((self.shift, self.pages(), self.bits, self.rounded))
        self.bits = int(np.bitwise_or.reduce([bits for _, _, bits, _ in layouts]))
        self.rounded = any(rounded for _, _, _, rounded in layouts)
        shift = max(layout[0] for layout in layouts)
        while True:
            pages = np.concatenate([p >> (shift - own) for own, p, _, _ in layouts])
            pages = np.unique(pages)
            if len(pages) <= PAGES:
                break
            shift += 1
        while self.shift < shift:
            self.coarsen()
        self._add_pages(np.setdiff1d(pages, self.pages()))

    def ascending(self, name):
        """Pixels, positives and mass of a class, (bins,) each, in ascending order of scores; zeros if it has none."""
        slots = self.directory[self.pages()]
        rows = self.rows.get(name) or empty_rows()
        return [row.reshape(PAGES, PAGE)[slots].reshape(-1) for row in rows]


def intervals(b, limit):
    """Lowest and highest possible AUROC, AP, F1max, AUPRO when the order inside each bin is unknown: two lists.

    b: `metrics.Bins`; limit: negatives up to which AUPRO integrates, 0.3 N.

    In a bin with p positives and n negatives, T positives and F negatives in the bins above:
    * a positive's own FP is at least a_k = F and at most a_k + n_k = F + n: strips of AUROC and AUPRO;
    * its precision is at most (T+p)/(T+p+F) (all positives tied, before the negatives), and that of the i-th positive
      at least (T+i)/(T+i+F+n) (all negatives first). The sum over i of the latter is p - (F+n) sum_i 1/(T+F+n+i) and
      sum_i 1/(A+i) <= ln(1 + p/A), as 1/x falls;
    * a threshold in the bin has TP <= T+p, FP >= F, so F1 <= 2(T+p)/(T+p+F+P); the lowest score of the bin is itself a
      threshold, with F1 = 2(T+p)/(T+p+F+n+P).
    """
    p_total = b.positives.sum()
    tp = np.cumsum(b.positives)
    f_low = b.above
    f_high = b.above + b.inside
    full_area = p_total * float(b.negatives)
    partial_area = b.regions * limit

    def auroc(f):
        return _strips(b.positives, f, b.negatives) / full_area

    def f1max(f):
        return float(np.max(2 * tp / (tp + f + p_total)))

    def aupro(f):
        return _strips(b.mass, f, limit) / partial_area

    before = (tp - b.positives + f_high).astype(np.float64)  # A = T + F + n
    growth = np.log1p(b.positives / np.maximum(before, 1.0))  # A = 0: then F + n = 0
    ap_low = float(np.sum(b.positives - f_high * growth)) / p_total
    ap_high = float(np.sum(b.positives * (tp / (tp + f_low)))) / p_total
    low = [auroc(f_high), ap_low, f1max(f_high), aupro(f_high)]
    high = [auroc(f_low), ap_high, f1max(f_low), aupro(f_low)]
    # rounding may give 1 + 1e-16
    return [min(float(v), 1.0) for v in low], [min(float(v), 1.0) for v in high]


def _strips(weight, f, limit):
    """Sum over the bins of weight x (limit - f), where that is positive: the area right of f."""
    return float(np.sum(weight * np.maximum(limit - f, 0.0)))
