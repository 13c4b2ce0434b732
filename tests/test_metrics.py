"""common/metrics.py against scikit-learn, against slow literal transcriptions, and against its own promises.

The recipes that other projects use (thresholds, per-image PRO, dilation) are written out here, slow and literal, as the
things compared with: `tests/bench_metrics.py` times them and prints by how much their numbers differ.
"""

import pickle
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from skimage.measure import label as label_regions, regionprops
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import common.bounded
from common import UsageError, metrics
from common.bounded import intervals, keys_of


# ------------------------------------------------------------------------------------------------- slow references
def literal_aupro(maps, masks, limit=0.3):
    """The definition: every distinct score is a threshold, every region counts the same, straight lines between."""
    regions = []  # the scores of each
    for a_map, mask in zip(maps, masks):
        labels = label_regions(mask, connectivity=2)
        regions += [a_map[labels == i] for i in range(1, labels.max() + 1)]
    negatives = maps[~masks]
    x0, y0, area = 0.0, 0.0, 0.0
    for t in np.unique(maps)[::-1]:
        x1 = np.mean(negatives >= t)
        y1 = np.mean([np.mean(region >= t) for region in regions])
        if x1 > limit:
            y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            return (area + (limit - x0) * (y0 + y_limit) / 2) / limit
        area += (x1 - x0) * (y0 + y1) / 2
        x0, y0 = x1, y1


def full_sort_aupro(maps, masks, limit=0.3):
    """Exact too, by sorting all pixels (as MVTec's own evaluation does)."""
    weight, number = np.zeros(maps.shape), 0
    for w, g in zip(weight, masks):
        regions, n = ndimage.label(g, np.ones((3, 3)))
        w[g] = 1 / np.bincount(regions.ravel())[regions[g]]
        number += n
    flat = maps.ravel()
    order = np.argsort(flat)[::-1]
    descending = flat[order]
    last = np.append(descending[1:] != descending[:-1], True)  # of each run of equal scores
    fpr = np.cumsum(~masks.ravel()[order]) / np.sum(~masks)
    pro = np.cumsum(weight.ravel()[order]) / number
    x = np.append(0, fpr[last])
    y = np.append(0, pro[last])
    y_limit = np.interp(limit, x, y)
    keep = x <= limit
    return trapezoid(np.append(y[keep], y_limit), np.append(x[keep], limit)) / limit


def trapezoid(y, x):
    heights = (y[1:] + y[:-1]) / 2
    return float(np.sum(heights * np.diff(x)))


def sklearn_three(scores, labels):
    """AUROC, AP and F1max over all thresholds, by scikit-learn."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()


def coordinates(mask):
    """The pixels of each region of a mask, as indices."""
    return [tuple(region.coords.T) for region in regionprops(label_regions(mask))]


def threshold_aupro(maps, masks, thresholds=200, rescale="max", dilate=False, relabel=True):
    """AUPRO over equal steps from the smallest to the largest score, regions re-labelled for every threshold.

    rescale: what remains below FPR 0.3 is divided by its own maximum, "max" (RD4AD's function, Dinomaly, SimpleNet), or
    stretched to [0, 1], "minmax" (ADer). dilate: the prediction is dilated by 5 x 5 (SimpleNet). relabel=False moves
    the labelling out of the loop: the same numbers, sooner.
    """
    low, high = maps.min(), maps.max()
    known = [coordinates(mask) for mask in masks]
    fprs, pros = [], []
    for t in np.arange(thresholds) * ((high - low) / thresholds) + low:
        predicted = maps > t
        if dilate:
            predicted = ndimage.binary_dilation(predicted, np.ones((1, 5, 5)))
        found = []
        for i in range(len(masks)):
            regions = coordinates(masks[i]) if relabel else known[i]
            found += [predicted[i][region].mean() for region in regions]
        pros.append(np.mean(found))
        fprs.append(np.logical_and(predicted, ~masks).sum() / np.sum(~masks))
    fprs, pros = np.array(fprs)[::-1], np.array(pros)[::-1]
    pros, fprs = pros[fprs < 0.3], fprs[fprs < 0.3]
    start = fprs.min() if rescale == "minmax" else 0
    return trapezoid(pros, (fprs - start) / (fprs.max() - start))


def per_image_aupro(maps, masks):
    """RD4AD: 200 thresholds on each defective image by itself, averaged."""
    values = []
    for a_map, mask in zip(maps, masks):
        if mask.any():
            values.append(threshold_aupro(a_map[None], mask[None]))
    return float(np.mean(values))


def f1_of_21_thresholds(maps, masks):
    """ADer, MambaAD, Omni-AD: min-max normalise all maps jointly, try 0, 0.05, ..., 1 only."""
    scaled, best = (maps - maps.min()) / (maps.max() - maps.min()), 0.0
    for t in np.linspace(0, 1, 21):
        tp = np.sum(masks & (scaled > t))
        best = max(best, 2 * tp / (np.sum(scaled > t) + masks.sum()))
    return float(best)


# ------------------------------------------------------------------------------------------------------------- data
def synthetic(n, size=256, seed=0, dtype=np.float32):
    """Smooth noise with bumps at the defects of two images in three: maps, masks, image scores, labels."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((n, size, size), dtype)
    masks = np.zeros((n, size, size), bool)
    y, x = np.mgrid[:size, :size]
    for i in range(n):
        noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), size / 64)
        maps[i] = 0.5 + 0.1 * noise / noise.std()
        for _ in range(rng.integers(1, 4) if i % 3 else 0):
            cy, cx = rng.integers(size // 10, size - size // 10, 2)
            r = rng.integers(max(2, size // 24), max(4, size // 8))
            distance = (y - cy) ** 2 + (x - cx) ** 2
            masks[i] |= distance < r ** 2
            bump = rng.uniform(0.1, 0.4) * np.exp(-distance / (1.5 * r ** 2))
            maps[i] += bump.astype(dtype)
    return maps, masks, maps.max((1, 2)), masks.any((1, 2))


KINDS = ("random", "tied", "constant", "inverted", "tiny", "dots", "perfect", "heavy tail", "zeros", "extreme",
         "crowded float64", "float16", "many classes")


def case(kind, seed):
    """A small evaluation (maps, masks, image_scores, labels, classes) of one kind; some metrics may be undefined."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    n = rng.integers(1, 7)
    h, w = rng.integers(1, 4, 2) if kind == "tiny" else rng.integers(3, 13, 2)
    maps = rng.standard_normal((n, h, w))
    maps = maps.astype(rng.choice([np.float32, np.float64]))
    masks = rng.random((n, h, w)) < rng.choice([0.05, 0.3, 0.6])
    masks[rng.random(n) < 0.3] = False
    if kind == "dots":                                   # every region is one pixel
        masks[:] = False
        dots = masks[:, ::2, ::2]
        dots[:] = rng.random(dots.shape) < 0.7
    if kind in ("inverted", "perfect"):
        maps = (masks + 0.3 * maps) * (-1 if kind == "inverted" else 1)
    if kind == "tied":
        maps = np.round(maps + masks)
    if kind == "constant":
        maps[:] = rng.standard_normal()
    if kind == "heavy tail":
        maps = np.exp(4 * maps)
    if kind == "zeros":                                  # 0.0 and -0.0 are one score
        chosen = rng.random(maps.shape) < 0.5
        zeros = rng.choice([-0.0, 0.0], maps.shape)
        maps = np.where(chosen, zeros, maps).astype(maps.dtype)
    if kind == "extreme":
        exponent = rng.choice([-300, -40, 0, 37], maps.shape)
        maps = np.clip(maps * 10.0 ** exponent, -3e38, 3e38)
    if kind == "crowded float64":                        # distinct in float64, all equal in float32
        maps = 1 + 1e-12 * rng.integers(0, 50, maps.shape)
    if kind == "float16":
        maps = maps.astype(np.float16)
    scores = np.round(rng.standard_normal(n), rng.integers(0, 3))
    number = 3 if kind == "many classes" else rng.integers(1, 3)
    classes = rng.choice(["a", "b", "c"][:number], n)
    return maps, masks, scores, masks.any((1, 2)), classes


def quiet(*args, **kwargs):
    """metrics.evaluate without the warnings about undefined metrics, which have their own test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metrics.evaluate(*args, **kwargs)


def views(report):
    return report["classes"] | {"mean": report["mean"], "mixed": report["mixed"]}


def assert_same(a, b, tolerance=1e-12):
    """Two reports have the same numbers, up to rounding."""
    assert (a["engine"], a["images"]) == (b["engine"], b["images"])
    assert a["classes"].keys() == b["classes"].keys()
    for name, row in views(a).items():
        for key, value in row.items():
            other = views(b)[name][key]
            assert value == other or abs(value - other) <= tolerance, (name, key)
    if "error_bounds" in a:
        rest = {"engine": 0, "images": 0}
        assert_same(a["error_bounds"] | rest, b["error_bounds"] | rest)


# ------------------------------------------------------------------------------------------------- right, whatever
def reference(maps, masks, scores, labels):
    """All seven metrics by scikit-learn and the literal AUPRO: {metric: value}, None where undefined."""
    maps = maps.astype(np.float64)
    expected = dict.fromkeys(metrics.METRICS)
    if 0 < labels.sum() < labels.size:
        expected.update(zip(metrics.IMAGE_METRICS, sklearn_three(scores, labels)))
    if 0 < masks.sum() < masks.size:
        aupro = literal_aupro(maps, masks)
        assert abs(full_sort_aupro(maps, masks) - aupro) < 1e-9
        three = sklearn_three(maps.ravel(), masks.ravel())
        expected.update(zip(metrics.PIXEL_METRICS, (*three, aupro)))
    seven = list(expected.values())[:-1]
    if None not in seven:
        expected["mad"] = np.mean(seven)
    return expected


def assert_three(row, keys, expected):
    """The first three of the metrics `keys` are those expected, up to rounding."""
    assert np.allclose([row[key] for key in keys[:3]], expected, rtol=0, atol=1e-9)


def view_of(report, name):
    """The row of a class, or, for None, of the pool."""
    return report["mixed"] if name is None else report["classes"][str(name)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_scikit_learn_and_to_the_literal_aupro(kind):
    """All seven metrics of every class and of the pool, 13 kinds x 45 cases = 585, within 1e-9; None where undefined.

    And on the same cases, with so few bins that they are coarse: the bounded engine honours its bounds.
    """
    compared = 0
    for seed in range(45):
        maps, masks, scores, labels, classes = case(kind, seed)
        report = quiet(maps, masks, scores, labels, classes)
        assert report["engine"] == "exact" and report["images"] == len(maps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.bounded.PAGES", 2 + seed % 8)
            bounded = quiet(maps, masks, scores, labels, classes, engine="bounded")
        for name in [*np.unique(classes), None]:
            chosen = np.ones(len(maps), bool) if name is None else classes == name
            expected = reference(maps[chosen], masks[chosen], scores[chosen], labels[chosen])
            row = view_of(report, name)
            middle = view_of(bounded, name)
            bound = view_of(bounded["error_bounds"], name)
            for key in metrics.METRICS:
                where = seed, name, key
                if expected[key] is None:
                    assert row[key] is None and middle[key] is None and bound[key] is None, where
                    continue
                assert isinstance(row[key], float) and 0 <= row[key] <= 1, where
                assert isinstance(middle[key], float) and 0 <= middle[key] <= 1, where
                assert abs(row[key] - expected[key]) < 1e-9, where
                assert abs(middle[key] - expected[key]) <= bound[key] + 1e-12, where
                compared += 1
    assert compared > 200


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False, width=32), st.booleans()),
                min_size=2, max_size=40))
def test_image_metrics_and_best_threshold_on_any_floats(pairs):
    """Whatever finite scores hypothesis finds: image metrics equal scikit-learn's, and the threshold gives that F1."""
    scores = np.array([score for score, _ in pairs])
    labels = np.array([label for _, label in pairs])
    nothing = np.zeros((len(pairs), 2, 2))
    row = quiet(nothing, nothing, scores, labels, ["c"] * len(pairs))["mixed"]
    threshold = metrics.best_f1_threshold(scores, labels)
    if labels.all() or not labels.any():
        assert row["i_auroc"] is row["i_ap"] is row["i_f1max"] is None
        assert (threshold is None) == (not labels.any())
        return
    auroc, ap, f1 = sklearn_three(scores, labels)
    assert_three(row, metrics.IMAGE_METRICS, (auroc, ap, f1))
    found = scores >= threshold
    f1_there = 2 * (found & labels).sum() / (found.sum() + labels.sum())
    assert f1_there == pytest.approx(f1, abs=1e-12)


def test_ranker_agrees_with_binary_search():
    """Ranks by table equal np.searchsorted for crowded, spread, few, no and extreme keys of 32 and 64 bits."""
    rng = np.random.default_rng(0)
    for kind in np.int32, np.int64:
        info = np.iinfo(kind)
        for k in 0, 1, 2, 1000, 30000:
            crowd = rng.integers(-1000, 1000, k // 2)
            spread = rng.integers(info.min, info.max, k - k // 2, kind)
            keys = np.unique(np.concatenate([crowd, spread])).astype(kind)
            just_below = keys[keys > info.min] - 1
            anywhere = rng.integers(info.min, info.max, 5000, kind)
            near = rng.integers(-1000, 1000, 5000)
            asked = np.concatenate([keys, just_below, anywhere, near, [info.min, info.max - 1]])
            asked = asked.astype(kind)
            left = np.searchsorted(keys, asked)
            codes = metrics.Ranker(keys).codes(asked)
            assert np.array_equal(codes, 2 * left + np.isin(asked, keys))


def test_keys_are_in_the_order_of_the_floats():
    """The integers that stand for scores are ordered as the floats are, and equal where these are equal."""
    for dtype in np.float32, np.float64:
        limits = np.finfo(dtype)
        tiny = limits.smallest_subnormal
        above_one = np.nextafter(dtype(1), dtype(2))
        negative = [-limits.max, -2, -1, -tiny, -0.0]
        positive = [0.0, tiny, 1, above_one, 2e30]
        for half in (negative, positive):
            assert (np.diff(keys_of(np.array(half, dtype), dtype)) > 0).all()
        below, above = keys_of(np.array([-0.0, 0.0], dtype), dtype)
        assert below == above


# --------------------------------------------------------------------------------- the same, however the data arrive
def test_arrays_stream_tensors_and_lists_agree():
    """One call with arrays, batches of any size and order, torch tensors and lists of images: the same report."""
    maps, masks, scores, labels = synthetic(24, 48)
    classes = np.array(["b", "a", "c"])[np.arange(24) // 8]
    expected = metrics.evaluate(maps, masks, scores, labels, classes)
    assert list(expected["classes"]) == ["a", "b", "c"]
    order = np.random.default_rng(0).permutation(24)
    parts = [order[:1], order[1:9], order[9:9], order[9:]]
    data = (maps, masks, scores, labels, classes)
    assert_same(expected, metrics.evaluate(tuple(x[i] for x in data) for i in parts))
    arrays = maps, masks.astype(np.uint8) * 255, scores, labels.astype(np.int64)
    tensors = [torch.from_numpy(x) for x in arrays]
    assert_same(expected, metrics.evaluate(*tensors, list(classes)))
    lists = list(maps), list(masks.astype(np.float32)), list(scores), [int(y) for y in labels]
    names = [f"{i}.png" for i in range(24)]
    assert_same(expected, metrics.evaluate(*lists, list(classes), names=names))
    strided = maps.transpose(2, 0, 1).copy().transpose(1, 2, 0)
    assert_same(expected, metrics.evaluate(strided, masks, scores, labels, classes))


def test_images_of_different_sizes():
    """Images of one evaluation may differ in size: every pixel counts once, every region once."""
    a, b = synthetic(6, 32, seed=1), synthetic(6, 20, seed=2)
    report = metrics.evaluate([(*x, ["c"] * 6) for x in (a, b)])
    together = [[*x, *y] for x, y in zip(a, b)]
    assert_same(report, metrics.evaluate(*together, ["c"] * 12))
    scores = np.concatenate([a[0].ravel(), b[0].ravel()])
    labels = np.concatenate([a[1].ravel(), b[1].ravel()])
    assert_three(report["mixed"], metrics.PIXEL_METRICS, sklearn_three(scores, labels))


def test_a_reused_buffer_does_not_change_what_was_added():
    """A stream may overwrite its batch in place, as loaders do: the accumulator has copied it."""
    data = synthetic(8, 24)
    acc, classes = metrics.Accumulator(), ["c"] * 8
    arrays, tensors, lists = ([x.copy() for x in data] for _ in range(3))
    acc.update(*arrays, classes)
    acc.update(*map(torch.from_numpy, tensors), classes)  # tensors that share the arrays' memory
    acc.update(*map(list, lists), classes)  # lists of views
    for x in arrays + tensors + lists:
        x[:] = 0
    three_times = [np.concatenate([x] * 3) for x in data]
    assert_same(acc.compute(), metrics.evaluate(*three_times, classes * 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    """Half precision and double give what the same numbers in float32 or by scikit-learn give; dtypes may be mixed."""
    maps, masks, scores, labels = map(torch.from_numpy, synthetic(9, 32, dtype=np.float64))
    maps = maps.to(dtype)
    classes = list("aabababab")
    report = metrics.evaluate(maps, masks, scores, labels, classes)
    three = sklearn_three(maps.double().numpy().ravel(), masks.numpy().ravel())
    assert_three(report["mixed"], metrics.PIXEL_METRICS, three)
    first = [x[:4] for x in (maps, masks, scores, labels, classes)]
    rest = [x[4:] for x in (maps.double(), masks, scores, labels, classes)]
    assert_same(report, metrics.evaluate([first, rest]))
    image_scores = scores.to(dtype)  # those too, as one tensor or as a list
    report = metrics.evaluate(maps, masks, image_scores, labels, classes)
    three = sklearn_three(image_scores.double().numpy(), labels.numpy())
    assert_three(report["mixed"], metrics.IMAGE_METRICS, three)
    lists = map(list, (maps, masks, image_scores, labels, classes))
    assert_same(report, metrics.evaluate(*lists))


@pytest.mark.parametrize("engine", ["exact", "bounded", "auto"])
def test_merging_is_associative_commutative_and_survives_pickling(engine, monkeypatch):
    """(a + b) + c = a + (b + c) = c + a + b = all at once; "auto" turns bounded on the way, wherever that happens."""
    monkeypatch.setattr("common.bounded.PAGES", 16)
    monkeypatch.setattr(metrics, "EXACT_PIXELS", 30 * 32 * 32)
    maps, masks, scores, labels = synthetic(40, 32)
    maps[:9] *= 1e-3  # other octaves in some parts than in others
    maps[30] = -maps[30]
    classes = np.array(["a"] * 15 + ["b"] * 20 + ["c"] * 5)
    expected = metrics.evaluate(maps, masks, scores, labels, classes, engine=engine)
    assert expected["engine"] == ("exact" if engine == "exact" else "bounded")

    def part(start, stop):
        acc = metrics.Accumulator(engine)
        acc.update(*(x[start:stop] for x in (maps, masks, scores, labels, classes)))
        return pickle.loads(pickle.dumps(acc))
    cuts = (0, 9), (9, 12), (12, 40)
    a, b, c = (part(*cut) for cut in cuts)
    left = part(*cuts[0]).merge(b).merge(c).compute()
    right = part(*cuts[0]).merge(part(*cuts[1]).merge(c)).compute()
    other = part(*cuts[2]).merge(a).merge(b).compute()
    empty = metrics.Accumulator(engine)
    empty.merge(c).merge(b).merge(metrics.Accumulator(engine)).merge(a)
    for report in left, right, other, empty.compute():
        assert_same(expected, report)
    assert_same(b.compute(), part(*cuts[1]).compute())  # what was merged from is unchanged


def test_engine_is_chosen_by_size(monkeypatch):
    """Exact up to EXACT_PIXELS, float64 ones counted twice, bounded beyond, known before or noticed on the way."""
    maps, masks, scores, labels = synthetic(6, 16)
    monkeypatch.setattr(metrics, "EXACT_PIXELS", 6 * 16 * 16)
    arguments = maps, masks, scores, labels, ["c"] * 6
    assert metrics.evaluate(*arguments)["engine"] == "exact"
    assert "error_bounds" not in metrics.evaluate(*arguments)
    monkeypatch.setattr(metrics, "EXACT_PIXELS", 6 * 16 * 16 - 1)
    assert metrics.evaluate(*arguments)["engine"] == metrics.evaluate([arguments])["engine"] == "bounded"
    assert metrics.evaluate(*arguments, engine="exact")["engine"] == "exact"
    wide = [maps[:4].astype(np.float64), *(x[:4] for x in arguments[1:])]
    assert metrics.evaluate(*(x[:4] for x in arguments))["engine"] == "exact"
    assert metrics.evaluate(*wide)["engine"] == metrics.evaluate([wide])["engine"] == "bounded"
    hinted = metrics.Accumulator(expected_pixels=6 * 16 * 16)
    hinted.update(*arguments)
    assert hinted.histogram is not None


# ------------------------------------------------------------------------------------------------ the bounded engine
def test_bounds_hold_and_are_small_on_maps():
    """On 40 smooth maps of 128 x 128 every pixel metric of every view is within its bound, and the bounds are small."""
    maps, masks, scores, labels = synthetic(40, 128)
    classes = np.arange(40) % 2
    exact = metrics.evaluate(maps, masks, scores, labels, classes, engine="exact")
    bounded = metrics.evaluate(maps, masks, scores, labels, classes, engine="bounded")
    for name, row in views(exact).items():
        for key, value in row.items():
            bound = views(bounded["error_bounds"])[name][key]
            assert abs(views(bounded)[name][key] - value) <= bound < 3e-4
            if key.startswith("i_"):
                assert bound == 0


def test_bins_of_one_score_each_are_recognised_as_exact():
    """float16 and constant maps of either sign lose nothing in coarse bins: the bounds say so, and the values agree.
    Scores that differ only in float64 do lose, even where no bins were joined."""
    maps, masks, scores, labels = synthetic(12, 64)
    coarse = (maps - maps.mean()).astype(np.float16)
    crowded = 1 + 1e-12 * maps.astype(np.float64)
    constant = np.full_like(maps, -0.7)
    for exactly, m in (True, coarse), (True, constant), (False, maps), (False, crowded):
        arguments = m, masks, scores, labels, ["c"] * 12
        exact = metrics.evaluate(*arguments, engine="exact")
        bounded = metrics.evaluate(*arguments, engine="bounded")
        halves = [metrics.Accumulator("bounded") for _ in range(2)]
        for half, part in zip(halves, (slice(5), slice(5, 12))):
            half.update(*(x[part] for x in arguments))
        assert_same(bounded, halves[0].merge(halves[1]).compute())
        bounds = bounded["error_bounds"]["mixed"]
        for key in metrics.PIXEL_METRICS:
            assert abs(bounded["mixed"][key] - exact["mixed"][key]) <= bounds[key]
        assert (bounds["p_auroc"] <= 2e-12) == (bounds["p_aupro"] <= 2e-12) == exactly


def hostile(kind, shape, rng):
    """Scores that are hard on bins: most of them one score, all floats there are, neighbours in float32 or float64."""
    u, sign = rng.standard_normal(shape), rng.choice([-1.0, 1.0], shape)
    everywhere = (sign * 10 ** rng.uniform(-45, 38, shape)).astype(np.float32)
    if kind == "spike":
        return np.where(rng.random(shape) < 0.99, 0.5, u)
    if kind == "neighbours":
        steps = rng.integers(0, 8, shape, np.int32).astype(np.float32)
        return np.float32(1) + np.float32(2 ** -23) * steps
    if kind == "neighbours among all floats":  # bins must be wide, and half of the scores fall in one
        return np.where(rng.random(shape) < 0.5, hostile("neighbours", shape, rng), everywhere)
    if kind == "all of float64":
        return sign * 10 ** rng.uniform(-320, 308, shape)
    sigmoid = 1 / (1 + np.exp(-30 * u))
    scores = {"all floats": everywhere, "denormal": 1e-42 * u, "saturated": sigmoid,
              "largest": np.finfo(np.float32).max * sign}
    return scores[kind].astype(np.float32) if kind in scores else np.round(2 * u)  # ties


@pytest.mark.parametrize("kind", ["spike", "neighbours", "neighbours among all floats", "all floats", "all of float64",
                                  "denormal", "saturated", "largest", "ties"])
def test_bounds_hold_on_hostile_scores_in_any_order(kind):
    """With all the bins there are: every metric of every view within its bound, and images in any order."""
    rng = np.random.default_rng(0)
    maps, classes = hostile(kind, (18, 64, 64), rng), np.arange(18) % 3
    masks = rng.random(maps.shape) < 0.02
    masks[:, 10:20, 10:20] |= rng.random((18, 1, 1)) < 0.5
    masks[::4] = False
    scores, labels = maps.max((1, 2)), masks.any((1, 2))
    exact = metrics.evaluate(maps, masks, scores, labels, classes, engine="exact")
    bounded = metrics.evaluate(maps, masks, scores, labels, classes, engine="bounded")
    for name, row in views(exact).items():
        for key, value in row.items():
            middle = views(bounded)[name][key]
            bound = views(bounded["error_bounds"])[name][key]
            assert 0 <= middle <= 1 and abs(middle - value) <= bound, (name, key)
    one_by_one = metrics.Accumulator("bounded")
    for i in rng.permutation(18):
        one_by_one.update(*(x[i:i + 1] for x in (maps, masks, scores, labels, classes)))
    assert_same(bounded, one_by_one.compute())


def test_bounds_cover_rounding():
    """Ten million masses of 1/60,000 in one bin add up to some 1e-12 less than they should: the bound knows."""
    mask = np.zeros((256, 256), bool)
    mask[:234] = True
    a_map = np.full((256, 256), np.float32(0.3))
    maps = np.broadcast_to(a_map, (160, 256, 256))
    masks = np.broadcast_to(mask, (160, 256, 256))
    scores = np.arange(160)
    report = metrics.evaluate(maps, masks, scores, scores % 2, ["c"] * 160, engine="bounded")
    error = abs(report["mixed"]["p_aupro"] - 0.15)  # a straight line to (1, 1), up to FPR 0.3
    assert 2e-12 < error <= report["error_bounds"]["mixed"]["p_aupro"] < 2e-9


def test_intervals_are_the_extremes_of_all_orders():
    """For one bin of 2 positives and 2 negatives between others, every order and every tie lies in the interval, which
    is reached at both ends (AUROC, F1max, AUPRO; the lower bound of AP gives away a little)."""
    rng = np.random.default_rng(0)
    inside = np.array([1, 1, 0, 0], bool)
    labels = np.concatenate([[1, 0], inside, [0, 1, 0]]).astype(bool)

    def bins(scores):
        distinct, where = np.unique(scores, return_inverse=True)
        positives = np.bincount(where, labels).astype(int)
        return metrics._bins(np.bincount(where), positives, positives / 4.0, 1)
    crowded = bins(np.array([9, 8, 5, 5, 5, 5, 2, 1, 0]))
    low, high = intervals(crowded, metrics.FPR_LIMIT * crowded.negatives)
    seen = []
    for _ in range(2000):
        order = np.concatenate([[9, 8], rng.integers(4, 8, 4), [2, 1, 0]])
        seen.append(metrics._values(bins(order)))
    lowest, highest = np.min(seen, 0), np.max(seen, 0)
    above, below = lowest - low, high - highest  # what the interval gives away
    assert (above >= -1e-12).all() and (below >= -1e-12).all()
    assert above[[0, 2, 3]].max() < 1e-12 and below.max() < 1e-12 and above[1] < 0.05


def test_bounded_memory_does_not_grow_with_the_number_of_images():
    """Streaming 400 maps instead of 100 (19 MiB more) raises the peak of numpy's memory by less than 3 MiB. That is
    little more than 12 MiB for each of 8 classes, although a new octave on the way demands wider bins."""
    maps, masks, scores, labels = synthetic(10, 128)

    def peak(batches):
        def stream():
            for i in range(batches):
                octave = np.float32(2.0 ** -(4 * i // batches))
                yield octave * (maps + np.float32(1e-3 * i)), masks, scores, labels, np.arange(10) % 8
        tracemalloc.start()
        quiet(stream(), engine="bounded")
        result = tracemalloc.get_traced_memory()[1] / 2 ** 20
        tracemalloc.stop()
        return result
    few, many = peak(10), peak(40)
    assert many < few + 3 and many < 8 * 12 + 60, (few, many)


# ------------------------------------------------------------------------------------------------- several processes
def _process(rank, folder, engine):
    """One of two processes: rank 0 has no image of class c, rank 1 none of class a."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{engine}", rank=rank, world_size=2)
    common.bounded.PAGES = 16
    metrics.EXACT_PIXELS = 35 * 32 * 32
    maps, masks, scores, labels, classes = _shared_data()
    mine = slice(0, 18) if rank == 0 else slice(18, 30)
    maps = maps if rank else maps.astype(np.float32)  # rank 0 too must compare in float64
    acc = metrics.Accumulator(engine)
    acc.update(*(x[mine] for x in (maps, masks, scores, labels, classes)))
    report = metrics.reduce(acc)
    with open(f"{folder}/{engine}-{rank}.pickle", "wb") as file:
        pickle.dump(report, file)
    torch.distributed.destroy_process_group()


def _processes(rank, folder):
    for engine in "exact", "bounded", "auto":
        _process(rank, folder, engine)


def _shared_data():
    maps, masks, scores, labels = synthetic(30, 32, dtype=np.float64)
    maps = maps.astype(np.float32).astype(np.float64)
    maps[:18] *= 2.0 ** -10  # the processes' scores share no page of bins
    maps[24:] = 1 + 1e-9 * maps[24:]  # distinct in float64 only
    classes = np.repeat(["a", "b", "c"], [10, 12, 8])
    return maps, masks, scores, labels, classes


def test_reduce_over_two_processes(tmp_path, monkeypatch):
    """Two gloo processes report, each, what one process with all images reports; "auto" counts the pixels of both."""
    torch.multiprocessing.spawn(_processes, (str(tmp_path),), nprocs=2)
    monkeypatch.setattr("common.bounded.PAGES", 16)
    monkeypatch.setattr(metrics, "EXACT_PIXELS", 35 * 32 * 32)
    for engine, used in ("exact", "exact"), ("bounded", "bounded"), ("auto", "bounded"):
        expected = metrics.evaluate(*_shared_data(), engine=engine)
        assert expected["engine"] == used
        for rank in 0, 1:
            assert_same(expected, pickle.loads((tmp_path / f"{engine}-{rank}.pickle").read_bytes()))


def test_reduce_without_processes_is_compute():
    """A script may always call `reduce`: without torch.distributed it is `compute`."""
    acc = metrics.Accumulator()
    acc.update(*synthetic(4, 16), ["c"] * 4)
    assert metrics.reduce(acc) == acc.compute()


# ------------------------------------------------------------------------------------------------ undefined, refused
@pytest.mark.parametrize("engine", ["exact", "bounded"])
def test_undefined_is_none_with_a_warning_and_left_out_of_the_mean(engine):
    """One label only: None, and a warning naming class and metric; `mean` averages the classes that have a value."""
    maps, masks, scores, labels = synthetic(9, 24)
    classes = np.where(labels, "bad", "fine")
    classes[:2] = "both"
    with pytest.warns(UserWarning) as caught:
        report = metrics.evaluate(maps, masks, scores, labels, classes, engine=engine)
    said = sorted(str(w.message) for w in caught)
    assert len(said) == 3  # bad: pixels have both labels
    assert all(c in s for c, s in zip(("'bad'", "'fine'", "'fine'"), said))
    assert "i_auroc, i_ap, i_f1max and mad" in said[0] and "p_aupro" in said[1] + said[2]
    for key in metrics.METRICS:
        assert report["classes"]["fine"][key] is None
        assert (report["classes"]["bad"][key] is None) == (key in (*metrics.IMAGE_METRICS, "mad"))
        known = [r[key] for r in report["classes"].values() if r[key] is not None]
        assert report["mean"][key] == pytest.approx(np.mean(known), abs=1e-12)
    with pytest.warns(UserWarning) as caught:
        nothing = metrics.evaluate(maps, 0 * masks, scores, 0 * labels, ["c"] * 9, engine=engine)
    assert any("all classes mixed: p_auroc" in str(w.message) for w in caught)
    assert all(v is None for row in views(nothing).values() for v in row.values())


def test_an_inverted_model_is_not_flipped():
    """AUROC below one half is printed as it is."""
    maps, masks, scores, labels = synthetic(12, 32)
    right = metrics.evaluate(maps, masks, scores, labels, ["c"] * 12)["mixed"]
    wrong = metrics.evaluate(-maps, masks, -scores, labels, ["c"] * 12)["mixed"]
    for key in ("p_auroc", "i_auroc"):
        assert wrong[key] == pytest.approx(1 - right[key], abs=1e-12)
        assert wrong[key] < 0.5


@pytest.mark.parametrize("what, change, message", [
    ("maps", lambda d: d["maps"].__setitem__((2, 3, 3), np.nan), "b/2.png.*NaN"),
    ("maps", lambda d: d["maps"].__setitem__((1, 0, 0), np.inf), "b/1.png.*infinite"),
    ("scores", lambda d: d["scores"].__setitem__(3, -np.inf), "b/3.png.*image score"),
    ("shapes", lambda d: d.update(masks=d["masks"][:, :8]), r"b/0.png.*\(16, 16\).*\(8, 16\)"),
    ("one shape", lambda d: d.update(maps=[*d["maps"][:2], d["maps"][2][:4], d["maps"][3]]), "b/2.png.*shape"),
    ("channel", lambda d: d.update(maps=d["maps"][:, None], masks=d["masks"][:, None]), r"b/0.png.*\(H, W\)"),
    ("integers", lambda d: d.update(maps=(99 * d["maps"]).astype(np.uint8)), "b/0.png.*uint8"),
    ("labels", lambda d: d.update(labels=np.array([0, 1, 2, 1])), "b/2.png.*label 2"),
    ("number", lambda d: d.update(scores=d["scores"][:3]), "4 maps but 3 image_scores"),
    ("none", lambda d: d.update(scores=[0.1, None, 0.2, 0.3]), "b/1.png.*image score None"),
    ("one for all", lambda d: d.update(scores=0.5), "4 maps but no list of image_scores"),
    ("classes", lambda d: d.update(classes=["x"] * 5), "4 maps but 5 classes"),
    ("one class", lambda d: d.update(classes="pipe"), "4 maps but no list of classes"),
])
def test_wrong_input_is_refused_by_name_and_adds_nothing(what, change, message):
    """NaN, infinite scores, shapes that do not fit, odd labels: one clear line naming the image; nothing is counted."""
    maps, masks, scores, labels = synthetic(4, 16)
    acc = metrics.Accumulator()
    acc.update(maps.copy(), masks, scores, labels, ["x"] * 4)
    before = acc.compute()
    data = {"maps": maps, "masks": masks, "scores": scores, "labels": labels, "classes": ["x"] * 4}
    change(data)
    with pytest.raises(UsageError, match=message) as error:
        acc.update(*data.values(), names=[f"b/{i}.png" for i in range(4)])
    assert "\n" not in str(error.value)
    assert acc.compute() == before


def test_nothing_to_evaluate_and_unknown_engine_are_refused():
    """No image at all, or an engine that does not exist: UsageError."""
    with pytest.raises(UsageError, match="no images"):
        metrics.evaluate([])
    with pytest.raises(UsageError, match="give maps, masks"):
        metrics.evaluate(synthetic(2, 16)[0])
    with pytest.raises(UsageError, match="exact or bounded"):
        metrics.Accumulator("fast")


# ---------------------------------------------------------------------------------- what the docstring says of others
def test_one_outlier_pixel_moves_threshold_recipes_but_not_ours():
    """A single pixel at 3 x the maximum: ours moves by what one pixel weighs, 200 and 21 thresholds by far more; and
    all recipes differ from the definition by 1e-4 to 0.1, as the docstring says: they are not interchangeable."""
    maps, masks, scores, labels = synthetic(9, 64)
    outlier = maps.copy()
    outlier[0, 0, 0] = 3 * maps.max()
    ours, moved = (metrics.evaluate(m, masks, scores, labels, ["c"] * 9)["mixed"] for m in (maps, outlier))
    recipes = {"200": threshold_aupro, "minmax": lambda m, g: threshold_aupro(m, g, 100, "minmax"),
               "image": per_image_aupro, "dilated": lambda m, g: threshold_aupro(m, g, dilate=True)}
    for recipe in recipes.values():
        assert 1e-4 < abs(recipe(maps, masks) - ours["p_aupro"]) < 0.1
    assert 1e-4 < ours["p_f1max"] - f1_of_21_thresholds(maps, masks) < 0.1
    for key, recipe in ("p_aupro", threshold_aupro), ("p_f1max", f1_of_21_thresholds):
        by_ours = abs(moved[key] - ours[key])
        by_recipe = abs(recipe(outlier, masks) - recipe(maps, masks))
        assert by_recipe > 20 * by_ours and by_ours < 1e-3
    assert threshold_aupro(maps, masks, relabel=False) == threshold_aupro(maps, masks)


def test_faster_than_scikit_learn():
    """A guard against losing the speed: 12 maps of 256 x 256, all seven, in at most an eighth of the processor time of
    scikit-learn's three pixel metrics alone (measured: `python -m tests.bench_metrics`)."""
    maps, masks, scores, labels = synthetic(12)

    def seconds(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    def evaluate():
        metrics.evaluate(maps, masks, scores, labels, ["c"] * 12)

    ours = min(seconds(evaluate) for _ in range(3))
    theirs = seconds(lambda: sklearn_three(maps.ravel(), masks.ravel()))
    assert theirs > 8 * ours


def test_bench_streams_2000_maps_in_a_minute_and_600_mib():
    """The bench runs as its docstring says, and the bounded engine keeps to time and (resident) memory there."""
    bench = subprocess.run([sys.executable, "-m", "tests.bench_metrics", "--stream", "2000"], text=True, check=True,
                           capture_output=True, cwd=Path(__file__).resolve().parents[1])
    (line,) = [line for line in bench.stdout.splitlines() if "2000 maps" in line]
    wall, _, mib = line.split()[-3:]
    assert float(wall) < 60 and (mib == "-" or float(mib) < 600)
