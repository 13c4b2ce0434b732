"""The evaluation that all methods share: tables, metrics.json, scores.csv, pictures, kept maps.

A script gives a function `score(images, samples) -> (maps, scores)`; everything after that is here,
except for `prediction.py` (--predict), `pictures.py` (drawing) and `pages.py` (HTML).

    python -m common.report RUN          RUN/run.html: misses and false alarms, table, pictures
    python -m common.report RUN RUN ...  ./compare.html: the same images as each run sees them
"""

import argparse
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import UsageError, corruptions, data, metrics, options, pages, papers, pictures, runtime
from common.folder import check_place, current_commit, write_csv
from common.pages import percent
from common.pictures import distributions
from common.prediction import predict

__all__ = ["COLUMNS", "corruption", "distributions", "evaluate", "measure",
           "percent", "predict", "shifts"]

COLUMNS = papers.QUALITY
COMPARED = ("i_auroc", "i_ap", "p_auroc", "p_ap")  # columns of `compare_table`


# ----------------------------------------------------------------------------------------- one pass


@dataclass
class Pass:
    """One pass over the test images, the same on every rank."""

    rep: dict  # metrics.evaluate's report
    rows: list  # (path, class, label, score), in the data's order
    kept: list  # (path, sample, score, features, map, mask), same order; empty unless asked for
    vanished: int  # masks lost by resizing
    seconds: float  # of scoring on this rank: model, map, smoothing, and the way to the host


@dataclass
class Batch:
    """A batch of images and what they were given, as numpy arrays."""

    first: int  # index of its first image
    samples: list  # B of them
    maps: np.ndarray  # (B, S, S)
    scores: np.ndarray  # (B,)
    features: np.ndarray | list  # (B, C), or B times None
    seconds: float  # of scoring it


def measure(run, args, dataset, score, *, corrupt=None, keep=False, described=None):
    """One pass over the test images that writes nothing. Returns a `Pass`.

    corrupt: (name, severity) or None. keep: also keep the maps, and the features if `described` is
    given. All others as in `evaluate`.
    """
    samples = dataset.test[run.rank::run.world]  # every rank scores its share
    images = images_of(run, args, samples, corrupt)
    expected = len(dataset.test) * args.image_size ** 2
    accumulator = metrics.Accumulator(expected_pixels=expected)
    rows, kept, seconds = [], [], 0.0
    title = "{}, severity {}".format(*corrupt) if corrupt else "evaluation"
    function = described if keep and described else score
    for batch in _scored(run, args, images, function, title):
        masks = [images.mask(batch.first + i).numpy() for i in range(len(batch.samples))]
        _accumulate(accumulator, batch, masks)
        seconds += batch.seconds
        for sample, value in zip(batch.samples, batch.scores):
            rows.append((str(sample.image), sample.cls, sample.label, float(value)))
        if keep:
            kept += _kept(batch, masks)
    rep = metrics.reduce(accumulator)
    rows = _in_order(run.gather(rows), dataset.test)
    kept = _in_order(run.gather(kept), dataset.test)
    return Pass(rep, rows, kept, vanished=sum(run.gather([images.vanished])), seconds=seconds)


def images_of(run, args, samples, corrupt=None):
    """The pixels of samples as this run reads them, `data.Images`."""
    return data.Images(
        samples, args.image_size, corrupt=corrupt, mask_rule=args.mask_rule, depths=run.depths
    )


def _scored(run, args, images, score, title):
    """Score images (`data.Images`) in their order; yields `Batch` after `Batch`."""
    batches = runtime.in_order(len(images), args.batch_size)
    loader = run.loader(images, batches, args.workers)
    for numbers, batch in zip(batches, run.progress(loader, title, len(batches))):
        samples = [images.samples[i] for i in numbers]
        began = time.monotonic()
        batch = run.to_device(batch)
        maps, scores, *features = score(batch, samples)
        features = _numpy(features[0]) if features else [None] * len(samples)
        maps, scores = _numpy(maps), _numpy(scores)
        yield Batch(numbers[0], samples, maps, scores, features, time.monotonic() - began)


def _numpy(tensor):
    return tensor.float().cpu().numpy()


def _accumulate(accumulator, batch, masks):
    """Count a batch. A defective image without a mask (some data sets have them) counts for the
    image metrics only: its pixels are unknown, so an empty map stands for it."""
    known_maps, known_masks = [], []
    for sample, values, mask in zip(batch.samples, batch.maps, masks):
        unknown = sample.label and sample.mask is None
        known_maps.append(values[:0, :0] if unknown else values)
        known_masks.append(mask[:0, :0] if unknown else mask)
    labels = [sample.label for sample in batch.samples]
    classes = [sample.cls for sample in batch.samples]
    names = [str(sample.image) for sample in batch.samples]
    accumulator.update(known_maps, known_masks, batch.scores, labels, classes, names)


def _kept(batch, *pixels):
    """Rows (path, sample, score, features, map, and further pixels) of a batch."""
    paths = [str(sample.image) for sample in batch.samples]
    return zip(paths, batch.samples, batch.scores, batch.features, batch.maps, *pixels)


def _in_order(rows, samples):
    """Rows that begin with a path, in the order of the samples."""
    order = {str(sample.image): i for i, sample in enumerate(samples)}
    return sorted(rows, key=lambda row: order[row[0]])


# ----------------------------------------------------------------------------------- the evaluation


def evaluate(run, args, dataset, score, *, setting, seconds, paper=None, extra=None, described=None,
             compare=None, saved=0.0):
    """The evaluation of a trained model: metrics, tables, files.

    Args:
        score: (images (B, 3, S, S) uint8 on the run's device, their B samples) -> (maps (B, S, S),
            scores (B,)), float tensors; must not depend on what else is in the batch.
        setting: {name: value}, printed above the table and kept in metrics.json (size, smoothing,
            image-score rule, ...).
        seconds: duration of the training.
        paper: {"source": str, "classes": {name: {metric: fraction}}, "mean": {...}, "mixed": {...},
            ...} or None.
        extra: called after each pass over the test images; its dict joins that pass's "setting" in
            metrics.json.
        described: like `score`, but returns one feature vector per image as a third, (B, C); kept
            beside the maps by --save-maps. Default: no features are kept.
        compare: {name: `Pass.rep` of `measure`}, results that stand beside this one in a second
            table; or None.
        saved: seconds of scoring that `score` has saved by an earlier pass over the same images; they
            count as its own.
    Returns:
        The content of metrics.json.
    """
    began = time.monotonic()
    corrupt = corruption(args)
    found = measure(
        run, args, dataset, score, corrupt=corrupt, keep=args.save_maps, described=described
    )
    found.seconds += saved
    setting = {**setting, **_extra(extra), "mask": f"> 0, {args.mask_rule}",
               "metrics": found.rep["engine"], **_lost_masks(dataset, found)}
    result = _result(run, args, dataset, found, setting, seconds, paper, compare)
    for name, severity in shifts(args):
        shifted = measure(run, args, dataset, score, corrupt=(name, severity)).rep
        part = {"setting": _extra(extra), **_three_views(shifted)}
        result.setdefault("shift", {})[f"{name}:{severity}"] = part
    if args.save_maps:
        _save_maps(run, args, dataset, described or score, found.kept)
    if run.is_rank0:
        _draw_classes(run, args, dataset, found.rows, score, corrupt)
        if args.shift == "curve":
            pictures.curves(run.out / "pictures" / "shift.png", _curves(result))
        write_csv(run.out / "scores.csv", ("path", "class", "label", "score"), found.rows)
        result["seconds"]["evaluate"] = round(time.monotonic() - began, 1)
        content = json.dumps(result, indent=1) + "\n"
        runtime.write_atomic(run.out / "metrics.json", content.encode())
        for text in (table(result), compare_table(result), shift_table(result)):
            if text:
                run.say(text)
        run.say(f"\n{run.out}: metrics.json, scores.csv, pictures/")
    return result


def _extra(extra):
    return extra() if extra else {}


def _lost_masks(dataset, found):
    """{what: number} of the masks that are not there; empty if none is missing."""
    missing = sum(sample.label and sample.mask is None for sample in dataset.test)
    numbers = {"masks lost by resizing": found.vanished, "defects without a mask": missing}
    return {what: number for what, number in numbers.items() if number}


def _result(run, args, dataset, found, setting, seconds, paper, compare):
    """The content of metrics.json, all but the shifted test sets."""
    name = dataset.name
    if args.corrupt:
        name += " + {}:{}".format(*corruption(args))
    result = {"method": run.method, "data": name, "setting": setting, **_three_views(found.rep)}
    if len(dataset.groups) > 1:
        result["datasets"] = {}
        for group, classes in dataset.groups.items():
            values = [found.rep["classes"][cls] for cls in classes]
            result["datasets"][group] = metrics.mean(values)
    if "error_bounds" in found.rep:
        result["error_bounds"] = found.rep["error_bounds"]
    if compare:
        result["compare"] = {name: _three_views(rep) for name, rep in compare.items()}
    times = {"train": round(seconds, 1), "score": round(found.seconds, 4)}
    result |= {"paper": paper, "images": len(found.rows), "seconds": times,
               "versions": run.environment(), "seed": args.seed, "commit": current_commit()}
    if run.speed:  # a model was trained, not only evaluated
        result["speed"] = run.speed
    if dataset.problems:
        result["problems"] = dataset.problems
    return result


def _three_views(rep):
    return {view: rep[view] for view in ("classes", "mean", "mixed")}


def corruption(args):
    """--corrupt NAME[:SEVERITY] -> (name, severity), or None."""
    return corruptions.parse(args.corrupt) if args.corrupt else None


def shifts(args):
    """--shift -> [(name, severity)]: the further test sets, each judged on its own."""
    severities = {"": (), "all": (3,), "curve": (1, 2, 3, 4, 5)}[args.shift]
    return [(name, severity) for name in corruptions.NAMES for severity in severities]


# ------------------------------------------------------------------------------------------- tables


def table(result):
    """The seven metrics and mAD in per cent: each class, the mean over classes (model-unified), all
    classes in one pool (absolute-unified)."""
    paper = result["paper"] or {}
    width = max(12, *(len(name) + 2 for name in result["classes"]))
    lines = []

    def add(name, values, of_paper):
        lines.append(_row(name, width, values, COLUMNS))
        if of_paper is not None:
            lines.append(_row("  paper", width, of_paper, COLUMNS))

    for name, values in result["classes"].items():
        add(name, values, paper.get("classes", {}).get(name))
    lines.append("-" * (width + 9 * len(COLUMNS)))
    for name, values in result.get("datasets", {}).items():
        add(f"mean {name}", values, paper.get("datasets", {}).get(name))
    add("mean", result["mean"], paper.get("mean"))
    add("mixed", result["mixed"], paper.get("mixed"))
    setting = "  ".join(f"{name}: {_text(value)}" for name, value in result["setting"].items())
    head = " " * width + "".join(f"{name:>9}" for name in COLUMNS.values())
    if paper:
        lines.append(f"paper: {paper['source']}")
        lines += [f"  {note}" for note in paper.get("notes", [])]
    return "\n".join(["", setting, "", head, *lines])


def _row(name, width, values, keys):
    return f"{name:<{width}}" + "".join(f"{percent(values.get(key)):>9}" for key in keys)


def compare_table(result):
    """Several results one below the other: means over classes (model-unified), and all classes in
    one pool (absolute-unified)."""
    if "compare" not in result:
        return ""
    results = {**result["compare"], "this result": result}
    width = 2 + max(map(len, results))
    views = f"{'mean over classes (model-unified)':^36}{'one pool (absolute-unified)':^36}"
    names = "".join(f"{COLUMNS[key]:>9}" for key in COMPARED)
    lines = ["", " " * width + views, " " * width + names + names]
    for name, rep in results.items():
        lines.append(_row(name, width, rep["mean"], COMPARED) + _row("", 0, rep["mixed"], COMPARED))
    return "\n".join(lines)


def shift_table(result):
    """A table of conditions, at severity 3: I-AUROC/P-AUROC of the clean test images, then
    I-AUROC/P-AUPRO of each condition, class by class; what the method itself reports on each;
    P-AUPRO in and out of distribution, the latter as the mean over the shifts."""
    if "shift" not in result:
        return ""
    conditions = {"clean": result}
    for name in corruptions.NAMES:
        conditions[name] = result["shift"][f"{name}:3"]
    width = max(24, *(len(name) + 2 for name in result["classes"]))

    def line(name, cells):
        return f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells)

    def view(name, values):  # values: of each condition
        cells = [f"{percent(values[0].get('i_auroc'))}/{percent(values[0].get('p_auroc'))}"]
        for found in values:
            cells.append(f"{percent(found.get('i_auroc'))}/{percent(found.get('p_aupro'))}")
        return line(name, cells)

    lines = ["", line("domain shift, severity 3", ["clean", *conditions])]
    lines.append(line("", ["I-/P-AUROC"] + ["I-AUROC/P-AUPRO"] * len(conditions)))
    *papers, out_of_distribution = _paper_of_conditions(result["paper"] or {})
    for cls in result["classes"]:
        lines.append(view(cls, [condition["classes"][cls] for condition in conditions.values()]))
        theirs = [paper.get("classes", {}).get(cls, {}) for paper in papers]
        if any(theirs):
            lines.append(view("  paper", theirs))
    lines.append("-" * (width + 16 * (1 + len(conditions))))
    for name in ("mean", "mixed"):
        lines.append(view(name, [condition[name] for condition in conditions.values()]))
        theirs = [paper.get(name, {}) for paper in papers]
        if any(theirs):
            lines.append(view("  paper", theirs))
    for key in conditions[corruptions.NAMES[0]]["setting"]:  # what `extra` gave
        values = [condition["setting"][key] for condition in conditions.values()]
        cells = [percent(value) if isinstance(value, float) else _text(value) for value in values]
        lines.append(line(key, ["", *cells]))
    clean, *shifted = [condition["mean"]["p_aupro"] for condition in conditions.values()]
    if None not in shifted:
        lines.append(f"P-AUPRO: in distribution {percent(clean)}, "
                     f"out of distribution {percent(np.mean(shifted))}")
    theirs = out_of_distribution.get("mean", {}).get("p_aupro")
    if theirs is not None:
        lines.append(f"  paper: out of distribution {percent(theirs)}")
    return "\n".join(lines)


def _paper_of_conditions(paper):
    """The paper's numbers of the clean images, of each shift at severity 3, and of their mean."""
    shifted = paper.get("shift", {})
    names = [f"{name}:3" for name in corruptions.NAMES]
    return [paper, *(shifted.get(name, {}) for name in names), shifted.get("ood", {})]


def _text(value):
    return "-" if value is None else str(value)


# -------------------------------------------------------------------------------------------- files


def _save_maps(run, args, dataset, score, kept):
    """--save-maps: maps/CLASS.npz of the test images (`kept`), and maps/train/CLASS.npz of the
    training images, which are scored for it. A method that works on maps needs both."""
    for cls in dataset.classes:
        if run.is_rank0:
            of_class = [row for row in kept if row[1].cls == cls]
            _save_class(run.out / "maps", cls, of_class)
        # One class at a time: all maps of the training images may not fit into memory.
        samples, rows = [sample for sample in dataset.train if sample.cls == cls], []
        images = images_of(run, args, samples[run.rank::run.world])
        for batch in _scored(run, args, images, score, f"training maps, {cls}"):
            rows += _kept(batch)
        rows = _in_order(run.gather(rows), samples)
        if run.is_rank0:
            _save_class(run.out / "maps" / "train", cls, rows)


def _save_class(folder, cls, rows):
    """folder/CLASS.npz from rows that `_kept` made; no masks of training images."""
    paths, samples, scores, features, maps, *masks = zip(*rows)
    labels = [sample.label for sample in samples]
    arrays = {"paths": np.array(paths), "labels": np.array(labels), "scores": np.array(scores)}
    if features[0] is not None:
        arrays["features"] = np.stack(features)  # (N, C)
    arrays["maps"] = np.stack(maps)  # (N, S, S)
    if masks:
        arrays["masks"] = np.stack(masks[0])  # (N, S, S)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    runtime.write_atomic(folder / f"{cls}.npz", buffer.getbuffer())


# ----------------------------------------------------------------------------------------- pictures


def _draw_classes(run, args, dataset, rows, score, corrupt):
    """pictures/CLASS.png: input, truth, map and overlay of the images that `_chosen` names (one
    colour scale per class), above the histogram of the class's scores; pictures/overview.png: the
    median defective image of each."""
    folder = run.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    sample_of = {str(sample.image): sample for sample in dataset.test}
    overview = []
    for cls in dataset.classes:
        good, bad = _by_score(rows, cls, 0), _by_score(rows, cls, 1)
        chosen = _chosen(good, bad)
        samples = [sample_of[row[0]] for _, row in chosen]
        images = images_of(run, args, samples, corrupt)
        batch = torch.stack([images[i] for i in range(len(images))])
        maps = _numpy(score(batch.to(run.device), samples)[0])  # (len(chosen), S, S)
        low, high = maps.min(), maps.max()
        strips = []
        for i, (what, row) in enumerate(chosen):
            image = pictures.pixels(batch[i])
            panels = [image, pictures.truth(images.mask(i).numpy()),
                      pictures.heat(maps[i], low, high),
                      pictures.overlay(image, maps[i], low, high)]
            strip = pictures.in_row(panels)
            title = f"{cls}: {samples[i].defect or 'good'}, {what}, {row[3]:.3g}"
            strips.append(pictures.titled(strip, title))
            if what == "median":
                overview.append(strip)
        good_scores, bad_scores = [row[3] for row in good], [row[3] for row in bad]
        histogram = pictures.histogram(good_scores, bad_scores, strips[0].width)
        strips.append(pictures.titled(histogram, "image scores: good (green), defective (red)"))
        pictures.in_column(strips).save(folder / pictures.file_of(cls, dataset.classes))
    if overview:
        half = -(-len(overview) // 2)  # two columns of classes
        columns = [pictures.in_column(overview[:half])]
        if overview[half:]:
            columns.append(pictures.in_column(overview[half:]))
        arrays = [np.asarray(column) for column in columns]
        pictures.in_row(arrays, gap=16).save(folder / "overview.png")


def _by_score(rows, cls, label):
    """The rows (path, class, label, score) of a class and label, the lowest score first."""
    chosen = [row for row in rows if row[1] == cls and row[2] == label]
    return sorted(chosen, key=lambda row: row[3])


def _chosen(good, bad):
    """[(what, row)]: the defective images with the highest, the median and the lowest score, the
    good one with the highest; as far as there are any."""
    chosen = []
    if bad:
        chosen += [("highest score", bad[-1]), ("median", bad[len(bad) // 2])]
        chosen += [("lowest score", bad[0])]
    if good:
        chosen.append(("good, highest score", good[-1]))
    return chosen


def _curves(result):
    """For `pictures.curves`: mean I-AUROC and P-AUPRO against the severity of each corruption."""
    panels = {}
    for key in ("i_auroc", "p_aupro"):
        lines = {}
        for name in corruptions.NAMES:
            shifted = [result["shift"][f"{name}:{severity}"] for severity in range(1, 6)]
            lines[name] = [condition["mean"][key] for condition in [result, *shifted]]
        panels[f"mean {COLUMNS[key]} against the severity (0: clean)"] = lines
    return panels


# -------------------------------------------------------------------------- python -m common.report


def main(argv=None):
    """Write the page of one run, or of several side by side. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m common.report", description="A page of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", metavar="FILE",
                        help="the page (default: RUN/run.html; of several runs: compare.html here)")
    args = parser.parse_args(argv)
    folders = [Path(run) for run in args.runs]
    default = folders[0] / "run.html" if len(folders) == 1 else Path("compare.html")
    out = Path(args.out or default)
    try:
        if args.out:
            check_place(out)
        if len(folders) == 1:
            page = pages.run_page(folders[0], COLUMNS)
        else:
            page = pages.compare_page(folders, COLUMNS)
        runtime.write_atomic(out, page.encode())
    except UsageError as error:
        print(f"error: {pages.readable(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    options.exit_with(main)
