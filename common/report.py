"""The evaluation that all four methods share, and what it leaves behind: tables, metrics.json, scores.csv, pictures.

A script gives a function `score(images, samples) -> (maps, scores)`; everything after that is here.
"""

import csv
import io
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import UsageError, corruptions, data, metrics, runtime

COLUMNS = {"i_auroc": "I-AUROC", "i_ap": "I-AP", "i_f1max": "I-F1max", "p_auroc": "P-AUROC", "p_ap": "P-AP",
           "p_f1max": "P-F1max", "p_aupro": "P-AUPRO", "mad": "mAD"}


@dataclass
class Pass:
    """One pass over the test images, the same on every rank."""

    rep: dict  # metrics.evaluate's report
    rows: list  # (path, class, label, score), in the data's order
    kept: list  # (path, sample, score, features, map, mask), in the data's order; empty unless they are to be kept
    vanished: int  # masks lost by resizing


def measure(run, args, dataset, score, *, corrupt=None, keep=False, pooled=None):
    """One pass over the test images that writes nothing. Arguments as in `evaluate`; corrupt: (name, severity) or
    None; keep: keep the maps. Returns a `Pass`."""
    samples = dataset.test[run.rank::run.world]  # every rank scores its share
    images = data.Images(samples, args.image_size, corrupt=corrupt, mask_rule=args.mask_rule)
    accumulator = metrics.Accumulator(expected_pixels=len(dataset.test) * args.image_size ** 2)
    rows, kept = [], []
    title = "{}, severity {}".format(*corrupt) if corrupt else "evaluation"
    for first, batch, part, maps, scores in _scored(run, args, images, score, title):
        masks = [images.mask(first + i).numpy() for i in range(len(part))]
        names = [str(s.image) for s in part]
        # A defective image without a mask (Real-IAD has some) counts for the image metrics only: an empty map.
        known = [s.mask is not None or not s.label for s in part]
        accumulator.update([m if k else m[:0, :0] for m, k in zip(maps, known)],
                           [g if k else g[:0, :0] for g, k in zip(masks, known)],
                           scores, [s.label for s in part], [s.cls for s in part], names)
        rows += [(name, s.cls, s.label, float(value)) for name, s, value in zip(names, part, scores)]
        if keep:
            kept += zip(names, part, scores, _features(pooled, batch, part), maps, masks)
    return Pass(metrics.reduce(accumulator), *(_in_order(run.gather(rows), dataset.test) for rows in (rows, kept)),
                sum(run.gather([images.vanished])))


def _scored(run, args, images, score, title):
    """Yield (index of the first, images, samples, maps, scores) batch by batch; maps and scores as numpy arrays."""
    starts, size = range(0, len(images), args.batch_size), args.batch_size
    loader = run.loader(images, [list(range(i, min(i + size, len(images)))) for i in starts], args.workers)
    for first, batch in zip(starts, run.progress(loader, title, len(starts))):
        part, batch = images.samples[first:first + len(batch)], run.to_device(batch)
        yield first, batch, part, *(t.float().cpu().numpy() for t in score(batch, part))


def _features(pooled, batch, part):
    return pooled(batch).float().cpu().numpy() if pooled else [None] * len(part)


def _in_order(rows, samples):
    """Rows that begin with a path, in the order of the samples."""
    order = {str(s.image): i for i, s in enumerate(samples)}
    return sorted(rows, key=lambda row: order[row[0]])


def evaluate(run, args, dataset, score, *, setting, seconds, paper=None, extra=dict, pooled=None, compare=None):
    """The evaluation of a trained model: metrics, tables, files.

    Args:
        score: (images (B, 3, S, S) uint8 on the run's device, their B samples) -> (maps (B, S, S), scores (B,)),
            float tensors; must not depend on what else is in the batch.
        setting: {name: value}, printed above the table and kept in metrics.json (size, smoothing, image-score rule...).
        seconds: of the training.
        paper: {"source": str, "classes": {name: {metric: fraction}}, "mean": {...}, "mixed": {...}, ...} or None.
        extra: called after each pass over the test images; its dict joins that pass's "setting" in metrics.json.
        pooled: (images) -> (B, C), one feature vector per image, kept beside the maps by --save-maps; or None.
        compare: {name: report of `measure`}: what stands beside this result in a second table; or None.
    Returns:
        The content of metrics.json.
    """
    began = time.monotonic()
    corrupt = corruption(args)
    main = measure(run, args, dataset, score, corrupt=corrupt, keep=args.save_maps, pooled=pooled)
    rep = main.rep
    means = {name: metrics.mean([rep["classes"][c] for c in classes]) for name, classes in dataset.groups.items()}
    result = {
        "method": run.method, "data": dataset.name + ("" if not args.corrupt else " + " + ":".join(map(str, corrupt))),
        "setting": {**setting, **extra(), "mask": f"> 0, {args.mask_rule}", "metrics": rep["engine"]},
        "classes": rep["classes"], "mean": rep["mean"], "mixed": rep["mixed"],
        **({"datasets": means} if len(means) > 1 else {}),
        **({"error_bounds": rep["error_bounds"]} if "error_bounds" in rep else {}),
        **({"compare": {name: _three(r) for name, r in compare.items()}} if compare else {}),
        "paper": paper, "images": len(main.rows), "seconds": {"train": round(seconds, 1)},
        "versions": runtime.environment(), "seed": args.seed, "commit": runtime.commit(),
    }
    missing = sum(s.label and s.mask is None for s in dataset.test)
    for what, number in (("masks lost by resizing", main.vanished), ("defects without a mask", missing)):
        if number:
            result["setting"][what] = number
    for name, severity in shifts(args):
        shifted = measure(run, args, dataset, score, corrupt=(name, severity)).rep
        result.setdefault("shift", {})[f"{name}:{severity}"] = {"setting": extra(), **_three(shifted)}
    if args.save_maps:
        _save_maps(run, args, dataset, score, pooled, main.kept)
    if run.main:
        pictures(run, args, dataset, main.rows, score, corrupt)
        if args.shift == "curve":
            curves(run.out / "pictures" / "shift.png", result)
        _write_csv(run.out / "scores.csv", ("path", "class", "label", "score"), main.rows)
        result["seconds"]["evaluate"] = round(time.monotonic() - began, 1)
        runtime.write_atomic(run.out / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())
        for text in (table(result), compare_table(result), shift_table(result)):
            if text:
                run.say(text)
        run.say(f"\n{run.out}: metrics.json, scores.csv, pictures/")
    return result


def _three(rep):
    return {part: rep[part] for part in ("classes", "mean", "mixed")}


def normal_score(run, args, score, samples, images=None):
    """The 99 % quantile of the image scores of up to 256 training images: what --predict compares with.

    samples: the training images. images: their pixels, `data.Images`; None if `score` needs none.
    """
    order = runtime.epoch_order(args.seed, 0, len(samples))[:256]
    scores = []
    for first in run.progress(range(0, len(order), args.batch_size), "training statistics"):
        index = order[first:first + args.batch_size]
        batch = None if images is None else torch.stack([images[i] for i in index]).to(run.device)
        scores.append(score(batch, [samples[i] for i in index])[1])
    return torch.cat(scores).quantile(0.99).item()


def corruption(args):
    """--corrupt NAME[:SEVERITY] -> (name, severity), or None."""
    return corruptions.parse(args.corrupt) if args.corrupt else None


def shifts(args):
    """--shift -> [(name, severity)]: the further test sets, each judged on its own (ROADS's benchmark)."""
    severities = {"": (), "all": (3,), "curve": (1, 2, 3, 4, 5)}[args.shift]
    return [(name, severity) for name in corruptions.NAMES for severity in severities]


def predict(run, args, score, columns):
    """Score files that nobody labelled: predictions.csv and one heat-map per image.

    Args:
        score: as in `evaluate`, with samples of class "" and label 0.
        columns: {name: function(sample, score) -> value}: the method's own columns after path and score.
    """
    files = [f for path in args.predict for f in data.image_files(path)]
    if not files:
        raise UsageError(f"--predict {' '.join(args.predict)}: no images found")
    samples = [data.Sample(f, None, 0, "", "", "") for f in files]
    images, rows = data.Images(samples, args.image_size), []
    maps_folder = run.out / "pictures"
    maps_folder.mkdir(parents=True, exist_ok=True)
    for first in run.progress(range(0, len(files), args.batch_size), "prediction"):
        part = samples[first:first + args.batch_size]
        batch = torch.stack([images[first + i] for i in range(len(part))])
        maps, scores = (t.float().cpu().numpy() for t in score(batch.to(run.device), part))
        for i, (sample, m, s) in enumerate(zip(part, maps, scores), first):
            rgb, low, high = _rgb(batch[i - first]), m.min(), m.max()
            strip = _strip([rgb, heat(m, low, high), overlay(rgb, m, low, high)])
            strip.save(maps_folder / f"{i:05d}-{sample.image.stem}.png")
            rows.append((str(sample.image), float(s), *(column(sample, float(s)) for column in columns.values())))
    _write_csv(run.out / "predictions.csv", ("path", "score", *columns), rows)
    for row in rows[:20]:
        run.say("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    run.say(f"{run.out}: predictions.csv ({len(rows)} images), pictures/")


# --------------------------------------------------------------------------------------------------------- table


def table(result):
    """The seven metrics in per cent: classes, their mean (model-unified), all in one pool (absolute-unified)."""
    paper = result["paper"] or {}
    width = max(12, *(len(name) + 2 for name in result["classes"]))
    line = lambda name, values: f"{name:<{width}}" + "".join(
        f"{percent(values.get(k)):>9}" for k in COLUMNS)
    out = ["", "  ".join(f"{k}: {v}" for k, v in result["setting"].items()), "",
           " " * width + "".join(f"{name:>9}" for name in COLUMNS.values())]
    for name, values in result["classes"].items():
        out.append(line(name, values))
        if name in paper.get("classes", {}):
            out.append(line("  paper", paper["classes"][name]))
    out.append("-" * (width + 9 * len(COLUMNS)))
    for name, values in result.get("datasets", {}).items():
        out.append(line(f"mean {name}", values))
        if name in paper.get("datasets", {}):
            out.append(line("  paper", paper["datasets"][name]))
    out.append(line("mean", result["mean"]))
    if "mean" in paper:
        out.append(line("  paper", paper["mean"]))
    out.append(line("mixed", result["mixed"]))
    if "mixed" in paper:
        out.append(line("  paper", paper["mixed"]))
    return "\n".join(out)


def compare_table(result):
    """Other results (CADA's Table 1): means over classes (model-unified) and the pool (absolute-unified)."""
    if "compare" not in result:
        return ""
    keys = ("i_auroc", "i_ap", "p_auroc", "p_ap")
    reports = {**result["compare"], "this result": result}
    width = 2 + max(map(len, reports))
    out = ["", f"{'':<{width}}{'mean over classes (model-unified)':^36}{'one pool (absolute-unified)':^36}",
           " " * width + "".join(f"{COLUMNS[key]:>9}" for key in keys) * 2]
    for name, rep in reports.items():
        values = [rep[part][key] for part in ("mean", "mixed") for key in keys]
        out.append(f"{name:<{width}}" + "".join(f"{percent(value):>9}" for value in values))
    return "\n".join(out)


def shift_table(result):
    """ROADS's tables: clean I-AUROC/P-AUROC (Table 1), I-AUROC/P-AUPRO per class and condition at severity 3 (Table 2),
    P-AUPRO in and out of distribution, the latter as the mean of the four (Table 4)."""
    if "shift" not in result:
        return ""
    conditions = {"clean": result, **{name: result["shift"][f"{name}:3"] for name in corruptions.NAMES}}
    width = max(24, *(len(name) + 2 for name in result["classes"]))
    pair = lambda values, a, b: f"{percent(values[a])}/{percent(values[b])}"
    row = lambda name, cells: f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells)
    line = lambda name, of: row(name, [pair(of(result), "i_auroc", "p_auroc"), *(
        pair(of(condition), "i_auroc", "p_aupro") for condition in conditions.values())])
    out = ["", row("domain shift, severity 3", ["clean", *conditions]),
           row("", ["I-/P-AUROC"] + ["I-AUROC/P-AUPRO"] * len(conditions))]
    out += [line(name, lambda condition: condition["classes"][name]) for name in result["classes"]]
    out += ["-" * (width + 16 * 6), line("mean", lambda condition: condition["mean"]),
            line("mixed", lambda condition: condition["mixed"])]
    for key in conditions[corruptions.NAMES[0]]["setting"]:  # what the method itself reports on each condition
        cells = [condition["setting"][key] for condition in conditions.values()]
        out.append(row(key, ["", *(percent(c) if isinstance(c, float) else str(c) for c in cells)]))
    clean, *shifted = (condition["mean"]["p_aupro"] for condition in conditions.values())
    if None not in shifted:
        out.append(f"P-AUPRO: in distribution {percent(clean)}, out of distribution {percent(np.mean(shifted))}")
    return "\n".join(out)


def percent(value):
    """Fraction -> "12.3"; None, an undefined metric, -> "-"."""
    return "-" if value is None else f"{100 * value:.1f}"


def _write_csv(path, header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    runtime.write_atomic(path, text.getvalue().encode())


def _save_maps(run, args, dataset, score, pooled, kept):
    """--save-maps: maps/CLASS.npz of the test images (`kept`), maps/train/CLASS.npz of the training images, which are
    scored for it: what a method that works on maps needs (CADA's --base-run)."""
    for cls in dataset.classes:
        if run.main:
            _save_class(run.out / "maps", cls, [row for row in kept if row[1].cls == cls])
        samples = [s for s in dataset.train if s.cls == cls]  # one class at a time: all maps may not fit into memory
        images, rows = data.Images(samples[run.rank::run.world], args.image_size), []
        for _, batch, part, maps, scores in _scored(run, args, images, score, f"training maps, {cls}"):
            rows += zip([str(s.image) for s in part], part, scores, _features(pooled, batch, part), maps)
        rows = _in_order(run.gather(rows), samples)
        if run.main:
            _save_class(run.out / "maps" / "train", cls, rows)


def _save_class(folder, cls, rows):
    paths, samples, scores, features, *pixels = zip(*rows)
    arrays = dict(paths=np.array(paths), labels=np.array([s.label for s in samples]), scores=np.array(scores))
    if features[0] is not None:
        arrays["features"] = np.stack(features)  # (N, C)
    arrays.update(zip(("maps", "masks"), map(np.stack, pixels)))  # (N, S, S) each; no masks of training images
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    runtime.write_atomic(folder / f"{cls}.npz", buffer.getbuffer())


# ------------------------------------------------------------------------------------------------------ pictures

# Dark blue over red to pale yellow; lightness rises evenly, so that the maps also read in grey.
_HEAT = np.array([[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21],
                  [250, 193, 39], [252, 255, 164]], float)
_GREEN, _RED, _GREY = (64, 160, 72), (208, 60, 56), (90, 90, 90)
_LINES = (230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167)  # told apart without seeing red or green, too


def heat(values, low, high):
    """Map (H, W) -> uint8 colours (H, W, 3); low is dark, high is bright."""
    t = np.clip((np.asarray(values, float) - low) / max(high - low, 1e-12), 0, 1) * (len(_HEAT) - 1)
    return np.stack([np.interp(t, np.arange(len(_HEAT)), _HEAT[:, c]) for c in range(3)], -1).astype(np.uint8)


def overlay(image, values, low, high):
    """Heat over the image, more opaque where the map is higher: uint8 (H, W, 3)."""
    alpha = np.clip((np.asarray(values, float) - low) / max(high - low, 1e-12), 0, 1)[..., None] * 0.75
    return (image * (1 - alpha) + heat(values, low, high) * alpha).astype(np.uint8)


def pictures(run, args, dataset, rows, score, corrupt):
    """pictures/CLASS.png: input, truth, map and overlay of the defective images with the highest, the median and the
    lowest score and of the good image with the highest (one colour scale per class), above the histogram of the
    class's scores; pictures/overview.png: the median defective image of every class."""
    folder = run.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    sample_of = {str(s.image): s for s in dataset.test}
    overview = []
    for cls in dataset.classes:
        of = {label: sorted((row for row in rows if row[1] == cls and row[2] == label), key=lambda row: row[3])
              for label in (0, 1)}
        bad, good = of[1], of[0]
        shown = [(bad[-1], "highest score"), (bad[len(bad) // 2], "median"), (bad[0], "lowest score")] if bad else []
        shown += [(good[-1], "good, highest score")] if good else []
        images = data.Images([sample_of[row[0]] for row, _ in shown], args.image_size, corrupt=corrupt,
                             mask_rule=args.mask_rule)
        batch = torch.stack([images[i] for i in range(len(images))])
        maps = score(batch.to(run.device), images.samples)[0].float().cpu().numpy()
        low, high = maps.min(), maps.max()
        strips = []
        for i, (row, title) in enumerate(shown):
            rgb, mask = _rgb(batch[i]), images.mask(i).numpy()
            truth = np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, 2)
            strip = _strip([rgb, truth, heat(maps[i], low, high), overlay(rgb, maps[i], low, high)])
            strips.append(_titled(strip, f"{cls}: {images.samples[i].defect or 'good'}, {title}, {row[3]:.3g}"))
            if title == "median":
                overview.append(strip)
        histogram = _histogram([r[3] for r in good], [r[3] for r in bad], strips[0].width)
        strips.append(_titled(histogram, "image scores: good (green), defective (red)"))
        _column(strips).save(folder / f"{cls}.png")
    if overview:
        half = -(-len(overview) // 2)  # two columns of classes
        columns = [_column(overview[i:i + half]) for i in range(0, len(overview), half)]
        _strip([np.asarray(c) for c in columns], gap=16).save(folder / "overview.png")


def _rgb(image):
    return image.permute(1, 2, 0).numpy()  # (3, S, S) -> (S, S, 3)


def _strip(arrays, gap=4):
    """Arrays (H, W, 3) side by side on white."""
    height, width = max(a.shape[0] for a in arrays), sum(a.shape[1] + gap for a in arrays) - gap
    canvas, x = Image.new("RGB", (width, height), "white"), 0
    for a in arrays:
        canvas.paste(Image.fromarray(a), (x, 0))
        x += a.shape[1] + gap
    return canvas


def _column(pictures, gap=4):
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap), "white")
    y = 0
    for p in pictures:
        canvas.paste(p, (0, y))
        y += p.height + gap
    return canvas


def _titled(picture, text):
    canvas = Image.new("RGB", (picture.width, picture.height + 18), "white")
    ImageDraw.Draw(canvas).text((2, 1), text, fill="black", font=ImageFont.load_default(13))
    canvas.paste(picture, (0, 18))
    return canvas


def distributions(path, parts):
    """Picture of the image scores of every class on one axis, side by side for several ways to score (CADA's Fig. 5).

    Args:
        path: of the PNG. parts: {title: rows (path, class, label, score)}, as `measure` gives them.
    """
    panels = []
    for title, rows in parts.items():
        scores = np.array([row[3] for row in rows])
        limits = scores.min(), np.quantile(scores, 0.99)  # a few extreme defects would squeeze all others
        strips = []
        for cls in dict.fromkeys(row[1] for row in rows):
            good, bad = ([min(row[3], limits[1]) for row in rows if row[1:3] == (cls, label)] for label in (0, 1))
            strips.append(_titled(_histogram(good, bad, 420, 56, limits=limits), cls))
        panels.append(np.asarray(_titled(_column(strips), title)))
    path.parent.mkdir(parents=True, exist_ok=True)
    _strip(panels, gap=24).save(path)


def curves(path, result, width=360, height=240):
    """Picture of --shift curve: mean I-AUROC and P-AUPRO against the severity, one line per corruption."""
    panels = []
    for key in ("i_auroc", "p_aupro"):
        lines = {name: [result["mean"][key]] + [result["shift"][f"{name}:{s}"]["mean"][key] for s in range(1, 6)]
                 for name in corruptions.NAMES}
        lines = {name: line for name, line in lines.items() if None not in line}  # undefined without masks, say
        canvas = Image.new("RGB", (width, height), "white")
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
        low = math.floor(10 * min([v for line in lines.values() for v in line], default=0)) / 10
        x = lambda severity: 36 + severity * (width - 150) / 5
        y = lambda value: 8 + (1 - value) / max(1 - low, 0.1) * (height - 34)
        for tick in np.arange(low, 1.01, 0.1):
            draw.line((x(0), y(tick), x(5), y(tick)), fill=(225, 225, 225))
            draw.text((8, y(tick) - 6), f"{100 * tick:.0f}", fill=_GREY, font=font)
        for severity in range(6):
            draw.text((x(severity) - 3, height - 18), str(severity), fill=_GREY, font=font)
        for i, (name, line) in enumerate(lines.items()):
            draw.line([(x(s), y(v)) for s, v in enumerate(line)], fill=_LINES[i], width=2)
            draw.text((width - 106, 10 + 16 * i), name, fill=_LINES[i], font=font)
        panels.append(np.asarray(_titled(canvas, f"mean {COLUMNS[key]} against the severity (0: clean)")))
    _strip(panels, gap=16).save(path)


def _histogram(good, bad, width, height=120, bins=40, limits=None):
    """Scores of good (green) and defective (red) images of one class, each as a share of its own number."""
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    low, high = limits or (min(good + bad), max(good + bad))
    edges = np.linspace(low, high if high > low else low + 1e-9, bins + 1)
    shares = [np.histogram(s, edges)[0] / max(1, len(s)) for s in (good, bad)]
    top, base, step = max(s.max() for s in shares), height - 16, width / bins
    for side, (share, colour) in enumerate(zip(shares, (_GREEN, _RED))):
        for i, value in enumerate(share):
            if value > 0:
                x = i * step + side * step / 2
                draw.rectangle((x, base - value / top * (base - 4), x + step / 2 - 1, base), fill=colour)
    draw.line((0, base, width, base), fill=_GREY)
    draw.text((2, base + 2), f"{low:.3g}", fill=_GREY, font=font)
    label = f"{high:.3g}"
    draw.text((width - draw.textlength(label, font) - 2, base + 2), label, fill=_GREY, font=font)
    return canvas
