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
from pathlib import Path

import numpy as np

from common import metrics

try:
    from tests.test_metrics import (f1_of_21_thresholds, full_sort_aupro, per_image_aupro, sklearn_three, synthetic,
                                    threshold_aupro)
except ImportError as error:
    raise SystemExit(f"bench_metrics: {error}. Run it as `python -m tests.bench_metrics` from the repository's folder, "
                     "with `pip install -r requirements-dev.txt`")


def resident(which):
    """Resident memory in MiB: "VmRSS" now, "VmHWM" peak since the last reset; None where /proc is missing."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(which)), None)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=83, help="number of maps of 256 x 256 (default 83)")
    parser.add_argument("--repeat", type=int, default=5, help="ours: best of so many runs (default 5)")
    parser.add_argument("--stream", type=int, help="only stream so many maps through the engine, without references")
    parser.add_argument("--engine", default="bounded", help="of --stream: bounded (default) or auto")
    args = parser.parse_args()
    print(f"{'':<58}{'wall s':>9}{'cpu s':>9}{'MiB':>9}")
    if args.stream:
        maps, *others = make(100, 30)                                  # drawn once, shifted a little for every batch

        def batches():
            for i in range(0, args.stream, 100):
                n = min(100, args.stream - i)
                yield tuple(x[:n] for x in (maps + np.float32(1e-5 * i), *others))
        report = measure(f"ours, {args.engine}: {args.stream} maps, streamed",
                         lambda: metrics.evaluate(batches(), engine=args.engine))
        print("\n".join(f"{k:<10}{v:.9f} +- {report[0]['error_bounds']['mixed'][k]:.1e}"
                        for k, v in report[0]["mixed"].items()))
        return

    data = make(args.maps, 1 if args.maps < 200 else 15)
    maps, masks = data[:2]
    print(f"{args.maps} maps, {maps.nbytes / 2 ** 20:.0f} MiB, {100 * masks.mean():.1f} % positive pixels")
    ours = measure("ours, exact: all seven, three views", lambda: metrics.evaluate(*data, engine="exact"), args.repeat)
    bounded = measure("ours, bounded", lambda: metrics.evaluate(*data, engine="bounded"), args.repeat)
    three = measure("scikit-learn: AUROC + AP + PR curve (pixels)", lambda: sklearn_three(maps.ravel(), masks.ravel()))
    full = measure("AUPRO by full sort, exact", lambda: full_sort_aupro(maps, masks))
    theirs = three[2] + full[2]
    row, error = ours[0]["mixed"], bounded[0]["error_bounds"]["mixed"]
    print(f"\nexact engine against scikit-learn + full sort: {theirs / ours[2]:.0f} x faster (processor seconds), "
          f"{(three[1] + full[1]) / ours[1]:.0f} x (wall)")
    if ours[3]:
        print(f"memory: 1/{max(three[3], full[3]) / ours[3]:.1f}")
    print("largest difference:", max(abs(row[k] - v) for k, v in zip(metrics.PIXEL_METRICS, (*three[0], full[0]))))
    print("bounded engine: difference and bound", {k: (f"{abs(bounded[0]['mixed'][k] - row[k]):.1e}", f"{error[k]:.1e}")
                                                   for k in (*metrics.PIXEL_METRICS, "mad")})
    if args.maps >= 200:
        return
    print()
    loop = measure("AUPRO, 200 thresholds, regions labelled at each", lambda: threshold_aupro(maps, masks))
    once = measure("AUPRO, 200 thresholds, regions labelled once", lambda: threshold_aupro(maps, masks, relabel=False))
    for name, other in ("as published (labelling in the loop)", loop), ("labelling once", once):
        print(f"exact engine against scikit-learn + 200 thresholds, {name}: {(three[2] + other[2]) / ours[2]:.0f} x "
              f"(processor seconds), {(three[1] + other[1]) / ours[1]:.0f} x (wall)")

    spiked = maps.copy()
    spiked[0, 0, 0] = 3 * maps.max()
    spiked_row = metrics.evaluate(spiked, *data[1:])["mixed"]
    print(f"\n{'recipe':<58}{'value':>9}{'one outlier pixel':>20}")
    for name, recipe in (
            ("AUPRO, ours: the definition", None),
            ("  200 thresholds, FPR / its maximum (Dinomaly)", lambda m: threshold_aupro(m, masks, relabel=False)),
            ("  100 thresholds, FPR min-max (ADer, Omni-AD)",
             lambda m: threshold_aupro(m, masks, 100, "minmax", relabel=False)),
            ("  per image, averaged (RD4AD)", lambda m: per_image_aupro(m, masks)),
            ("  prediction dilated by 5 x 5 (SimpleNet)",
             lambda m: threshold_aupro(m, masks, dilate=True, relabel=False))):
        values = (row["p_aupro"], spiked_row["p_aupro"]) if recipe is None else (recipe(maps), recipe(spiked))
        print(f"{name:<58}{values[0]:>9.4f}{values[1]:>20.4f}", flush=True)
    print(f"{'P-F1max, ours: all thresholds':<58}{row['p_f1max']:>9.4f}{spiked_row['p_f1max']:>20.4f}")
    print(f"{'  21 thresholds (ADer, Omni-AD)':<58}{f1_of_21_thresholds(maps, masks):>9.4f}"
          f"{f1_of_21_thresholds(spiked, masks):>20.4f}")


if __name__ == "__main__":
    main()
