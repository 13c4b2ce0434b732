"""Time and peak memory of common/metrics.py beside scikit-learn and the slow AUPRO recipes: same process, same data.

    python -m tests.bench_metrics                    83 maps: exact references, the 200-threshold loop, all recipes
    python -m tests.bench_metrics --maps 1725        15 classes pooled; no threshold loops (minutes, 6 GiB)
    python -m tests.bench_metrics --stream 2000      the bounded engine alone: batches of 100 maps, 30 classes
    python -m tests.bench_metrics --stream 114585 --engine auto        as many images as Real-IAD's test set

Ours is everything: region labelling, all seven metrics, per class, mean and mixed. Theirs is the three pixel metrics of
the pool and one AUPRO. Times are wall clock and processor seconds; the best of --repeat for ours. Memory is the peak of
the process's resident memory beyond what it had before (Linux only; elsewhere "-"); what one row has freed, the next
may use again unseen, so the bounded engine's memory is what --stream prints, not the row after the exact engine's.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np

from common import metrics

try:
    from tests.test_metrics import (f1_of_21_thresholds, full_sort_aupro, per_image_aupro, sklearn_three, synthetic,
                                    threshold_aupro)
except ImportError as error:
    raise SystemExit(f"bench_metrics: {error}. Run it as `python -m tests.bench_metrics` from the repository's folder, "
                     "with `pip install -r requirements-dev.txt`") from None


def resident(which):
    """Resident memory in MiB: "VmRSS" now, "VmHWM" peak since the last reset; None where /proc is missing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    return None


def measure(name, function, repeat=1):
    """Print and return (result, wall seconds, processor seconds, peak MiB beyond the start)."""
    best, highest = None, None
    for _ in range(repeat):
        try:
            Path("/proc/self/clear_refs").write_text("5")              # resets VmHWM
            start = resident("VmRSS")
        except OSError:
            start = None
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if start is not None:                                          # the first run counts: later ones reuse memory
            highest = max(highest or 0, resident("VmHWM") - start)
        if best is None or cpu < best[2]:
            best = result, wall, cpu
    best += (highest,)
    memory = "-" if highest is None else f"{highest:.0f}"
    print(f"{name:<58}{best[1]:>9.3f}{best[2]:>9.3f}{memory:>9}", flush=True)
    return best


def make(n, classes=1):
    """n synthetic maps of 256 x 256 in float32, each class with its own level of scores; the arguments of evaluate."""
    maps, masks = np.empty((n, 256, 256), np.float32), np.empty((n, 256, 256), bool)
    names = np.arange(n) * classes // n
    for i in range(0, n, 83):
        part = slice(i, min(i + 83, n))
        maps[part], masks[part] = synthetic(part.stop - i, seed=i)[:2]
        maps[part] += np.float32(0.02) * names[part, None, None].astype(np.float32)
    return maps, masks, maps.max((1, 2)), masks.any((1, 2)), [f"class {c:02d}" for c in names]


def stream(number, engine):
    """Only our engine, fed with batches of 100 maps that nobody keeps."""
    maps, *others = make(100, 30)  # drawn once, shifted a little for every batch

    def batches():
        for i in range(0, number, 100):
            n = min(100, number - i)
            shifted = maps + np.float32(1e-5 * i)
            yield tuple(x[:n] for x in (shifted, *others))

    def evaluate():
        return metrics.evaluate(batches(), engine=engine)

    report, *_ = measure(f"ours, {engine}: {number} maps, streamed", evaluate)
    bounds = report.get("error_bounds", {}).get("mixed", {})
    for key, value in report["mixed"].items():
        print(f"{key:<10}{value:.9f} +- {bounds.get(key, 0):.1e}")


def compare(data, repeat):
    """Both engines beside scikit-learn and an exact AUPRO. Returns the rows of ours and of scikit-learn."""
    maps, masks = data[:2]
    print(f"{len(maps)} maps, {maps.nbytes / 2 ** 20:.0f} MiB, {100 * masks.mean():.1f} % positive pixels")
    ours = measure("ours, exact: all seven, three views", partial(metrics.evaluate, *data, engine="exact"), repeat)
    bounded = measure("ours, bounded", partial(metrics.evaluate, *data, engine="bounded"), repeat)
    three = measure("scikit-learn: AUROC + AP + PR curve (pixels)",
                    partial(sklearn_three, maps.ravel(), masks.ravel()))
    full = measure("AUPRO by full sort, exact", partial(full_sort_aupro, maps, masks))
    print(f"\nexact engine against scikit-learn + full sort: {faster(ours, three, full)}")
    if ours[3]:
        print(f"memory: 1/{max(three[3], full[3]) / ours[3]:.1f}")
    row = ours[0]["mixed"]
    exact = dict(zip(metrics.PIXEL_METRICS, (*three[0], full[0])))
    print("largest difference:", max(abs(row[key] - exact[key]) for key in exact))
    print("bounded engine: difference and bound")
    for key in (*metrics.PIXEL_METRICS, "mad"):
        difference = abs(bounded[0]["mixed"][key] - row[key])
        print(f"    {key:<8} {difference:.1e} {bounded[0]['error_bounds']['mixed'][key]:.1e}")
    return ours, three


def faster(ours, *theirs):
    """How many times faster than the sum of others, in words; each as `measure` returns it."""
    wall = sum(other[1] for other in theirs) / ours[1]
    processor = sum(other[2] for other in theirs) / ours[2]
    return f"{processor:.0f} x faster (processor seconds), {wall:.0f} x (wall)"


def threshold_loops(data, ours, three):
    """The loop over 200 thresholds, as it is published and with its labelling moved out of the loop."""
    maps, masks = data[:2]
    print()
    loop = measure("AUPRO, 200 thresholds, regions labelled at each", partial(threshold_aupro, maps, masks))
    once = measure("AUPRO, 200 thresholds, regions labelled once",
                   partial(threshold_aupro, maps, masks, relabel=False))
    for name, other in ("as published (labelling in the loop)", loop), ("labelling once", once):
        print(f"exact engine against scikit-learn + 200 thresholds, {name}: {faster(ours, three, other)}")


def recipes(data, row):
    """By how much other recipes' numbers differ, and how one outlier pixel moves them; row: ours, of the pool."""
    maps, masks = data[:2]
    spiked = maps.copy()
    spiked[0, 0, 0] = 3 * maps.max()
    spiked_row = metrics.evaluate(spiked, *data[1:])["mixed"]
    others = {
        "  200 thresholds, FPR / its maximum (Dinomaly)": partial(threshold_aupro, relabel=False),
        "  100 thresholds, FPR min-max (ADer, Omni-AD)":
            partial(threshold_aupro, thresholds=100, rescale="minmax", relabel=False),
        "  per image, averaged (RD4AD)": per_image_aupro,
        "  prediction dilated by 5 x 5 (SimpleNet)": partial(threshold_aupro, dilate=True, relabel=False),
    }
    print(f"\n{'recipe':<58}{'value':>9}{'one outlier pixel':>20}")
    show("AUPRO, ours: the definition", row["p_aupro"], spiked_row["p_aupro"])
    for name, recipe in others.items():
        show(name, recipe(maps, masks), recipe(spiked, masks))
    show("P-F1max, ours: all thresholds", row["p_f1max"], spiked_row["p_f1max"])
    show("  21 thresholds (ADer, Omni-AD)", f1_of_21_thresholds(maps, masks), f1_of_21_thresholds(spiked, masks))


def show(name, value, with_outlier):
    print(f"{name:<58}{value:>9.4f}{with_outlier:>20.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=83, help="number of maps of 256 x 256 (default 83)")
    parser.add_argument("--repeat", type=int, default=5, help="ours: best of so many runs (default 5)")
    parser.add_argument("--stream", type=int, help="only stream so many maps through the engine, without references")
    parser.add_argument("--engine", default="bounded", help="of --stream: bounded (default) or auto")
    args = parser.parse_args()
    print(f"{'':<58}{'wall s':>9}{'cpu s':>9}{'MiB':>9}")
    if args.stream:
        stream(args.stream, args.engine)
        return
    few = args.maps < 200
    data = make(args.maps, 1 if few else 15)
    ours, three = compare(data, args.repeat)
    if few:
        threshold_loops(data, ours, three)
        recipes(data, ours[0]["mixed"])


if __name__ == "__main__":
    main()
