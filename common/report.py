"""The evaluation that all four methods share, and what it leaves behind: the table, metrics.json, scores.csv, pictures.

A script gives a function `score(images, samples) -> (maps, scores)`; everything after that is here.
"""

import csv
import io
import json
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import UsageError, corruptions, data, metrics, runtime

COLUMNS = {"i_auroc": "I-AUROC", "i_ap": "I-AP", "i_f1max": "I-F1max", "p_auroc": "P-AUROC", "p_ap": "P-AP",
           "p_f1max": "P-F1max", "p_aupro": "P-AUPRO", "mad": "mAD"}


def evaluate(run, args, dataset, score, *, setting, seconds, paper=None, extra=dict):
    """One pass over the test images: metrics, table, files.

    Args:
        score: (images (B, 3, S, S) uint8 on the run's device, their B samples) -> (maps (B, S, S), scores (B,)),
            float tensors; must not depend on what else is in the batch.
        setting: {name: value}, printed above the table and kept in metrics.json (size, smoothing, image-score rule...).
        seconds: of the training.
        paper: {"source": str, "classes": {name: {metric: fraction}}, "mean": {...}, ...} or None.
        extra: called after the pass; its dict joins metrics.json's "setting".
    Returns:
        The content of metrics.json.
    """
    began = time.monotonic()
    corrupt = corruption(args)
    samples = dataset.test[run.rank::run.world]  # every rank scores its share
    images = data.Images(samples, args.image_size, corrupt=corrupt, mask_rule=args.mask_rule)
    accumulator = metrics.Accumulator(expected_pixels=len(dataset.test) * args.image_size ** 2)
    rows, kept = [], {}
    starts = range(0, len(samples), args.batch_size)
    loader = run.loader(images, [list(range(i, min(i + args.batch_size, len(samples)))) for i in starts], args.workers)
    for first, batch in zip(starts, run.progress(loader, "evaluation", len(starts))):
        part = samples[first:first + len(batch)]
        maps, scores = (t.float().cpu().numpy() for t in score(run.to_device(batch), part))
        masks = [images.mask(first + i).numpy() for i in range(len(part))]
        names = [str(s.image) for s in part]
        # A defective image without a mask (Real-IAD has some) counts for the image metrics only: an empty map.
        known = [s.mask is not None or not s.label for s in part]
        accumulator.update([m if k else m[:0, :0] for m, k in zip(maps, known)],
                           [g if k else g[:0, :0] for g, k in zip(masks, known)],
                           scores, [s.label for s in part], [s.cls for s in part], names)
        rows += [(name, s.cls, s.label, float(value)) for name, s, value in zip(names, part, scores)]
        if args.save_maps:
            for s, name, m, g in zip(part, names, maps, masks):
                kept.setdefault(s.cls, []).append((name, s.label, m, g))
    rows, kept, vanished = run.gather(rows), run.gather([kept]), sum(run.gather([images.vanished]))
    rep = metrics.reduce(accumulator)
    order = {str(s.image): i for i, s in enumerate(dataset.test)}
    rows.sort(key=lambda row: order[row[0]])

    means = {name: metrics.mean([rep["classes"][c] for c in classes]) for name, classes in dataset.groups.items()}
    result = {
        "method": run.method, "data": dataset.name + ("" if not args.corrupt else " + " + ":".join(map(str, corrupt))),
        "setting": {**setting, **extra(), "mask": f"> 0, {args.mask_rule}", "metrics": rep["engine"]},
        "classes": rep["classes"], "mean": rep["mean"], "mixed": rep["mixed"],
        **({"datasets": means} if len(means) > 1 else {}),
        **({"error_bounds": rep["error_bounds"]} if "error_bounds" in rep else {}),
        "paper": paper, "images": len(rows),
        "seconds": {"train": round(seconds, 1), "evaluate": round(time.monotonic() - began, 1)},
        "versions": runtime.environment(), "seed": args.seed, "commit": runtime.commit(),
    }
    missing = sum(s.label and s.mask is None for s in dataset.test)
    for what, number in (("masks lost by resizing", vanished), ("defects without a mask", missing)):
        if number:
            result["setting"][what] = number
    if run.main:
        pictures(run, args, dataset, rows, score, corrupt)
        for cls in dataset.classes if args.save_maps else ():
            _save_maps(run.out / "maps", cls, [row for part in kept for row in part.get(cls, [])], order)
        _write_csv(run.out / "scores.csv", ("path", "class", "label", "score"), rows)
        runtime.write_atomic(run.out / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())
        run.say(table(result))
        run.say(f"\n{run.out}: metrics.json, scores.csv, pictures/")
    return result


def corruption(args):
    """--corrupt NAME[:SEVERITY] -> (name, severity), or None."""
    return corruptions.parse(args.corrupt) if args.corrupt else None


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
            _strip([rgb, heat(m, low, high), overlay(rgb, m, low, high)]).save(maps_folder / f"{i:05d}-{sample.image.stem}.png")
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
        f"{'-' if values.get(k) is None else format(100 * values[k], '.1f'):>9}" for k in COLUMNS)
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
    return "\n".join(out)


def _write_csv(path, header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    runtime.write_atomic(path, text.getvalue().encode())


def _save_maps(folder, cls, rows, order):
    rows.sort(key=lambda row: order[row[0]])
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, paths=np.array([r[0] for r in rows]), labels=np.array([r[1] for r in rows]),
             maps=np.stack([r[2] for r in rows]), masks=np.stack([r[3] for r in rows]))
    runtime.write_atomic(folder / f"{cls}.npz", buffer.getbuffer())


# ------------------------------------------------------------------------------------------------------ pictures

# Dark blue over red to pale yellow; lightness rises evenly, so that the maps also read in grey.
_HEAT = np.array([[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21],
                  [250, 193, 39], [252, 255, 164]], float)
_GREEN, _RED, _GREY = (64, 160, 72), (208, 60, 56), (90, 90, 90)


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
        _column([*strips, _titled(histogram, "image scores: good (green), defective (red)")]).save(folder / f"{cls}.png")
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


def _histogram(good, bad, width, height=120, bins=40):
    """Scores of good (green) and defective (red) images of one class, each as a share of its own number."""
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    low, high = min(good + bad), max(good + bad)
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
