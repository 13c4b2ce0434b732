"""Pictures for slides, from finished runs: large, few, with titles that can be read at the back of a room.

    python -m docs.figures RUN                     all pictures that the run's method has, into RUN/figures/
    python -m docs.figures RUN --classes screw     of this class
    python -m docs.figures hero RUN RUN RUN RUN --out docs/hero.png
                                                   the same defects under several methods, and the truth;
                                                   of runs on the same data, with --save-maps
    python -m docs.figures training RUN --script omniad.py --every 100 -- --classes screw --steps 600
                                                   trains (what stands after -- are the script's own
                                                   options), and draws the maps of the same images
                                                   after every 100 steps: RUN-frames/001.png, ...

    scales.png     what each scale of the teacher contributes to the map       (Omni-AD, ROADS, CADA)
    mix.png        S_rec, the refiner's mask, and their mix                    (OneNIP)
    attention.png  where in the prompt a pixel of the defect looks             (OneNIP)
    tokens.png     what each learned token or prompt reads                     (Omni-AD, ROADS)
    codes.png      the adapter's codes of clean and shifted images in a plane  (ROADS)
    calibrated.png maps before and after calibration, each on one scale        (CADA)

The script itself builds data, network and model from its checkpoint, up to the moment in which it would
evaluate; what it would evaluate with is taken from there. So a series of a training can be had of
omniad.py and roads.py: onenip.py evaluates no checkpoint of an unfinished training, and cada.py would
first calibrate it.
"""

import argparse
import importlib
import io
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import kernels
from common import UsageError, corruptions, data, files, options, pages, pictures, report, runtime
from common.folder import check_place, read_json, write_atomic
from kernels.cross_attention import neighbours

ROOT = Path(__file__).resolve().parent.parent  # of the scripts
PANEL, GAP, TEXT = 224, 6, 22  # pixels: side of a panel, between two, height of the letters
IMAGES = 4  # rows of a picture
SHOWN = 5  # tokens of a picture
FRAMES = 6  # checkpoints of a strip
COLOURS = (  # told apart without seeing red or green
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (120, 120, 120),
    (0, 0, 0),
)

# ------------------------------------------------------------------------------------- a finished run


@dataclass
class Found:
    """What a script would evaluate with."""

    args: object
    dataset: data.Dataset
    score: object  # its Scorer
    depths: dict  # see `data.depths`


class Ready(Exception):
    """The script is about to evaluate; .args[0] is a `Found`."""


def ready(checkpoint, out):
    """The parts of a run, rebuilt by its own script from its checkpoint, and the run's method.

    Raises:
        UsageError: there is no such checkpoint, or it is one that the script does not evaluate.
    """
    state = runtime.load_checkpoint(checkpoint)
    method = state["method"]
    if method not in PICTURES:
        raise UsageError(f"{checkpoint}: there are no pictures for {method}")
    script = importlib.import_module(method)

    def stop(run, args, dataset, score, **more):
        scorer = getattr(score, "__self__", score)  # cada.py first measures score.plain
        raise Ready(Found(args, dataset, scorer, run.depths))

    words = [f"{method}.py", "--eval", str(checkpoint), "--out", str(out), "--overwrite"]
    words += ["--device", "cpu", "--amp", "off", "--data-root", state["args"]["data_root"]]
    with patch.object(sys, "argv", words), redirect_stdout(io.StringIO()):
        with patch.object(report, "evaluate", stop), patch.object(report, "measure", stop):
            try:
                script.main()
            except Ready as found:
                return method, found.args[0]
    raise UsageError(f"{checkpoint}: {method}.py did not come to an evaluation")


def typical_defects(folder, dataset, names):
    """Of each class the defective image with the median score: list of samples."""
    scores = {path: score for path, _, _, score in pages.read_scores(Path(folder) / "scores.csv")}
    chosen = []
    for cls in names:
        mine = [s for s in dataset.test if s.cls == cls and s.label and str(s.image) in scores]
        mine.sort(key=lambda sample: scores[str(sample.image)])
        if mine:
            chosen.append(mine[len(mine) // 2])
    return chosen


# -------------------------------------------------------------------------------------------- drawing


def panel(values, low=None, high=None):
    """A map (h, w), a picture (h, w, 3) or a mask -> uint8 (PANEL, PANEL, 3)."""
    values = np.asarray(values)
    if values.dtype == bool:
        values = pictures.truth(values)
    elif values.ndim == 2:
        low = values.min() if low is None else low
        high = values.max() if high is None else high
        values = pictures.heat(values, low, high)
    picture = Image.fromarray(values).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    return np.asarray(picture)


def grid(rows, titles, names=()):
    """Rows of panels, with a title above each column and a name at the left of each row."""
    font = ImageFont.load_default(TEXT)
    left = 0
    if names:
        left = 20 + max(int(font.getlength(name)) for name in names)
    columns = max(len(row) for row in rows)
    width = left + columns * (PANEL + GAP) - GAP
    canvas = Image.new("RGB", (width, TEXT + 12 + len(rows) * (PANEL + GAP) - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        centre = left + i * (PANEL + GAP) + PANEL / 2
        draw.text((centre, 2), title, "black", font, anchor="ma")
    for j, row in enumerate(rows):
        y = TEXT + 12 + j * (PANEL + GAP)
        if names:
            draw.text((left - 12, y + PANEL / 2), names[j], "black", font, anchor="rm")
        for i, array in enumerate(row):
            canvas.paste(Image.fromarray(array), (left + i * (PANEL + GAP), y))
    return canvas


def save(canvas, path):
    """PNG of 256 colours, a third of the bytes; dithered, or smooth metal would show steps."""
    palette = canvas.quantize(256, kmeans=2)
    dithered = canvas.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    content = io.BytesIO()
    dithered.save(content, "png", optimize=True)
    write_atomic(path, content.getvalue())


def framed(array, colour, width=5):
    picture = Image.fromarray(array)
    ImageDraw.Draw(picture).rectangle((0, 0, PANEL - 1, PANEL - 1), outline=colour, width=width)
    return np.asarray(picture)


# ------------------------------------------------------------------------------- pictures of a method


class Chosen:
    """The images that are shown: pixels (B, 3, S, S), samples, and their first two panels."""

    def __init__(self, found, samples):
        size, rule = found.args.image_size, found.args.mask_rule
        images = data.Images(samples, size, mask_rule=rule, depths=found.depths)
        self.samples = samples
        self.batch = torch.stack([images[i] for i in range(len(images))])
        self.masks = np.stack([images.mask(i).numpy() for i in range(len(images))])
        self.names = [sample.cls.replace("_", " ") for sample in samples]
        self.first = []
        for image, mask in zip(self.batch, self.masks):
            self.first.append([panel(pictures.pixels(image)), panel(mask)])

    def centre(self, i):
        """Row and column of a pixel of the defect of image i, as near its middle as there is one."""
        pixels = np.argwhere(self.masks[i])
        if not len(pixels):
            return self.masks.shape[1] // 2, self.masks.shape[2] // 2
        return pixels[np.square(pixels - pixels.mean(0)).sum(1).argmin()]


@torch.no_grad()
def teacher_and_student(method, score, batch):
    """[f1, f2, f3] of the teacher, and what the model rebuilds."""
    if method == "cada":
        maps = score.base.features.maps(batch)
        targets, rebuilt, _ = score.base.model.eval()(maps, batch)
        return targets[:3], rebuilt[:3]
    maps = score.features.maps(batch)
    if method == "omniad":
        return maps, score.model(maps)
    return maps, score.model(maps, batch)["maps"]


def scales(method, found, chosen):
    """scales.png: each scale's distance at its own resolution, and the map; each on its own scale."""
    teacher, student = teacher_and_student(method, found.score, chosen.batch)
    if len(teacher) < 3:  # cada.py --base uniad
        return None
    distances = []
    for t, s in zip(teacher, student):  # (B, C, h, w)
        distances.append(kernels.cosine_map([t], [s], t.shape[2]).numpy())  # (B, h, w)
    maps = found.score(chosen.batch, chosen.samples)[0].numpy()
    rows = []
    for i, first in enumerate(chosen.first):
        rows.append([*first, *(panel(d[i]) for d in distances), panel(maps[i])])
    sides = [f"scale {n}: {d.shape[1]} x {d.shape[2]}" for n, d in enumerate(distances, 1)]
    return grid(rows, ["image", "truth", *sides, "map"], chosen.names)


def mix(method, found, chosen):
    """mix.png: S_rec, M̂ and S (Eq. 10)."""
    onenip = importlib.import_module("onenip")
    error, logits, _ = found.score.reconstruct(chosen.batch, chosen.samples)
    if logits is None:
        return None
    size = found.args.image_size
    s_rec = onenip.resize(error, size)[:, 0].numpy()
    mask = onenip.mask_of(logits, size).numpy()
    s = onenip.combine(error, logits, found.score.scale, found.args)[0].numpy()
    rows = []
    for i, first in enumerate(chosen.first):
        rows.append([*first, panel(s_rec[i]), panel(mask[i], 0, 1), panel(s[i])])
    mixed = f"mix, {found.args.alpha:g} of it"
    return grid(rows, ["image", "truth", "error", "refiner", mixed], chosen.names)


def attention_weights(query, key, heads, forbidden=None):
    """What each query (B|1, N, C) gives each key (B, M, C), averaged over the heads: (B, N, M).

    forbidden: (N, M) bool, or None.
    """
    q = query.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, C/heads)
    k = key.unflatten(2, (heads, -1)).transpose(1, 2)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -torch.inf)
    return scores.softmax(3).mean(1)


class Seen:
    """Keeps what a module gave last, while it is looked at."""

    def __init__(self, module):
        self.handle = module.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.inputs, self.output = inputs, output


def attention(method, found, chosen):
    """attention.png: where in the prompt one pixel of the defect looks, in the last block (Eq. 3)."""
    model, score = found.score.model, found.score
    if model.prompt != "dynamic":
        return None
    onenip = importlib.import_module("onenip")
    fixed = onenip.fixed_prompts(found.dataset.train, found.args)
    layer = model.decoder[-1].feature_attention
    q, k = Seen(layer.to_q), Seen(layer.to_k)
    score(chosen.batch, chosen.samples)
    forbidden = neighbours(*model.window)
    weights = attention_weights(q.output, k.output, layer.heads, forbidden).detach()  # (B, N, N)
    rows = []
    for i, (sample, first) in enumerate(zip(chosen.samples, chosen.first)):
        prompt = found.dataset.train[fixed[score.chosen[str(sample.image)]]]
        images = data.Images([prompt], found.args.image_size, depths=found.depths)
        prompt = pictures.pixels(images[0])
        row, column = (int(n * model.side / found.args.image_size) for n in chosen.centre(i))
        seen = weights[i, row * model.side + column].unflatten(0, (model.side, model.side))
        token = marked(first[0], row, column, model.side)
        rows.append([token, panel(prompt), panel(seen.numpy())])
    return grid(rows, ["image, a token", "its prompt", "where it looks"], chosen.names)


def marked(array, row, column, side):
    """The panel with one cell of a side x side grid framed."""
    picture, cell = Image.fromarray(array), PANEL / side
    box = column * cell, row * cell, (column + 1) * cell, (row + 1) * cell
    ImageDraw.Draw(picture).rectangle(box, outline=(255, 0, 0), width=4)
    return np.asarray(picture)


@torch.no_grad()
def tokens(method, found, chosen):
    """tokens.png: of the finest map, what each of the learned tokens reads, up to SHOWN of them."""
    model = found.score.model
    if method == "omniad":
        layer = getattr(model.stages[-1][-1], "first", None)
        if layer is None or layer.kind != "q":
            return None
        q, k = Seen(layer.to_q), Seen(layer.to_k)
        found.score(chosen.batch, chosen.samples)
        weights = attention_weights(q.output, k.output, layer.heads)  # (B, T, h w)
    else:
        if not model.selector:
            return None
        layer = model.promptings[-1].prompts_read
        seen = Seen(layer)
        found.score(chosen.batch, chosen.samples)
        z, positions = seen.inputs
        q, k = layer.to_q(layer.norm_x(z)), layer.to_k(layer.norm_y(positions))
        weights = attention_weights(q, k, layer.heads)  # (B, l, h w)
    side = int(weights.shape[2] ** 0.5)
    weights = weights.unflatten(2, (side, side)).numpy()
    every = max(1, weights.shape[1] // SHOWN)
    shown = range(0, weights.shape[1], every)[:SHOWN]
    rows = []
    for i, first in enumerate(chosen.first):
        rows.append([first[0], *(panel(weights[i, t]) for t in shown)])
    return grid(rows, ["image", *(f"token {t + 1}" for t in shown)], chosen.names)


@torch.no_grad()
def codes(method, found, chosen, per_class=8, side=720):
    """codes.png: the adapter's codes of test images in the plane of their two main directions, clean
    (disc) and brighter (ring), a colour for each class, a line between the two of one image."""
    adapter = found.score.model.adapter
    if adapter is None:
        return None
    samples = []
    for cls in found.dataset.classes:
        samples += [s for s in found.dataset.test if s.cls == cls][:per_class]
    parts = []
    for corrupt in (None, corruptions.parse("brightness:3")):
        images = data.Images(samples, found.args.image_size, corrupt=corrupt, depths=found.depths)
        rows = [adapter(images[i][None])[0] for i in range(len(images))]
        parts.append(torch.stack(rows).float())
    both = torch.cat(parts)  # (2N, code)
    centred = both - both.mean(0)
    plane = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).numpy()  # (2N, 2)
    low, high = plane.min(0), plane.max(0)
    places = 30 + (plane - low) / np.maximum(high - low, 1e-12) * (side - 60)
    canvas = Image.new("RGB", (side + 260, side), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for n, sample in enumerate(samples):
        colour = COLOURS[found.dataset.classes.index(sample.cls) % len(COLOURS)]
        clean, shifted = places[n], places[len(samples) + n]
        draw.line((*clean, *shifted), fill=colour)
        draw.ellipse((*(clean - 6), *(clean + 6)), fill=colour)
        draw.ellipse((*(shifted - 6), *(shifted + 6)), outline=colour, width=2)
    for n, cls in enumerate(found.dataset.classes):
        colour = COLOURS[n % len(COLOURS)]
        draw.text((side + 10, 20 + 30 * n), cls.replace("_", " "), colour, font)
    below = side + 10, 40 + 30 * len(found.dataset.classes)
    draw.text(below, "disc: clean\nring: brighter", "black", font)
    return canvas


def calibrated(method, found, chosen):
    """calibrated.png: maps before and after, all of one column on one scale."""
    before = found.score.plain(chosen.batch, chosen.samples)[0].numpy()
    after = found.score(chosen.batch, chosen.samples)[0].numpy()
    rows = []
    for i, first in enumerate(chosen.first):
        columns = [panel(maps[i], maps.min(), maps.max()) for maps in (before, after)]
        rows.append([*first, *columns])
    return grid(rows, ["image", "truth", "before", "after"], chosen.names)


PICTURES = {
    "onenip": {"mix": mix, "attention": attention},
    "omniad": {"scales": scales, "tokens": tokens},
    "roads": {"scales": scales, "tokens": tokens, "codes": codes},
    "cada": {"scales": scales, "calibrated": calibrated},
}


def draw_run(folder, classes):
    """All pictures of a run into RUN/figures. Returns their paths."""
    out = Path(folder) / "figures"
    method, found = ready(Path(folder) / "checkpoint.pt", out)
    chosen = choose(folder, found, classes)
    paths = []
    for name, function in PICTURES[method].items():
        canvas = function(method, found, chosen)
        if canvas is not None:
            paths.append(out / f"{name}.png")
            save(canvas, paths[-1])
    return paths


def choose(folder, found, classes):
    """The typical defects of these classes, or of the first few: `Chosen`."""
    names = classes or found.dataset.classes[:IMAGES]
    unknown = [name for name in names if name not in found.dataset.classes]
    if unknown:
        known = ", ".join(found.dataset.classes)
        raise UsageError(f"--classes {unknown[0]}: the run has {known}")
    samples = typical_defects(folder, found.dataset, names)
    if not samples:
        raise UsageError(f"{folder}: its scores.csv names no defective image of {', '.join(names)}")
    return Chosen(found, samples)


# ------------------------------------------------------------------------------------------- training


def draw_training(folder, script, every, words, classes):
    """Train, and draw the maps of the same images from every checkpoint, all on one scale.

    words: the script's own options. Writes RUN-frames/STEP.pt (the checkpoints), NNN.png (one each)
    and strip.png (up to FRAMES of them side by side). Returns the paths of the pictures.
    """
    if script not in ("omniad.py", "roads.py"):
        raise UsageError(
            f"--script {script}: give omniad.py or roads.py (onenip.py evaluates no unfinished "
            "training, cada.py would first calibrate it)"
        )
    out = Path(f"{folder}-frames")
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / script), *words]
    command += ["--out", folder, "--checkpoint-every", str(every)]
    checkpoints = train(command, Path(folder) / "checkpoint.pt", out)
    _, found = ready(checkpoints[-1], out / "run")
    chosen = choose(folder, found, classes)
    series = []  # of each checkpoint the maps (B, S, S)
    for checkpoint in checkpoints:
        _, found = ready(checkpoint, out / "run")
        series.append(found.score(chosen.batch, chosen.samples)[0].numpy())
    series = np.stack(series)  # (checkpoints, B, S, S)
    low, high = np.median(series), np.quantile(series, 0.999)
    columns = []
    for maps in series:
        columns.append([panel(array, low, high) for array in maps])
    titles = [f"step {checkpoint.stem}" for checkpoint in checkpoints]
    paths = []
    for n, (column, title) in enumerate(zip(columns, titles), 1):
        rows = [[*first, array] for first, array in zip(chosen.first, column)]
        paths.append(out / f"{n:03d}.png")
        save(grid(rows, ["image", "truth", title], chosen.names), paths[-1])
    shown = np.linspace(0, len(columns) - 1, min(FRAMES, len(columns))).round().astype(int)
    rows = []
    for i, first in enumerate(chosen.first):
        rows.append([*first, *(columns[n][i] for n in shown)])
    paths.append(out / "strip.png")
    save(grid(rows, ["image", "truth", *(titles[n] for n in shown)], chosen.names), paths[-1])
    return paths


def train(command, checkpoint, out):
    """Run the command; copy each checkpoint that it writes to out/STEP.pt. Returns these, in order.

    A checkpoint is replaced as a whole, so a copy is never a half of one. One that is replaced
    before it was seen (every 20 ms) is missed, the last one never.

    Raises:
        UsageError: the command failed (it has said why).
    """
    copies, seen = [], version(checkpoint)
    process = subprocess.Popen(command)
    try:
        running = True
        while running:
            running = process.poll() is None  # before the look, so that one look comes after the end
            now = version(checkpoint)
            if now != seen:
                copies.append(out / f"copy{len(copies)}.pt")
                shutil.copyfile(checkpoint, copies[-1])
                seen = now
            time.sleep(0.02)
    finally:
        process.terminate()  # if this is interrupted; after its end it is without effect
        process.wait()
    if process.returncode != 0 or not copies:
        raise UsageError(f"{' '.join(command[1:])}: no training, so no pictures")
    named = {}
    for copy in copies:
        step = runtime.load_checkpoint(copy)["step"]
        named[step] = copy.replace(out / f"{step}.pt")
    return [named[step] for step in sorted(named)]


def version(path):
    """Changes whenever the file is replaced; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


# ----------------------------------------------------------------------------------------------- hero


def draw_hero(folders, path):
    """The same defects under several methods: of each class the one whose rank, averaged over the
    methods, is the median. A red frame: the map's highest pixel is further from the defect than 5 %
    of the picture's side.

    Returns the text that says which were missed.
    """
    runs = [kept_maps(Path(folder)) for folder in folders]  # [(method, {class: what it kept})]
    classes = list(runs[0][1])
    columns, missed = [], []
    for cls in classes:
        shown = median_defect([kept[cls] for _, kept in runs])
        _, first = runs[0]
        at = first[cls]["paths"].tolist().index(shown)
        image = Image.fromarray(files.read_image(shown)).resize((PANEL, PANEL))
        image = np.asarray(image)
        column = [image, panel(first[cls]["masks"][at].astype(bool))]
        for method, kept in runs:
            array, hit = map_of(kept[cls], shown)
            column.append(array)
            if not hit:
                missed.append(f"{method}: {cls}")
        columns.append(column)
    labels = ["image", "truth", *(method for method, _ in runs)]
    titles = [cls.replace("_", " ") for cls in classes]
    save(grid(list(zip(*columns)), titles, labels), path)
    return "highest pixel not at the defect (red frame): " + (", ".join(missed) or "none")


def kept_maps(folder):
    """A run's method, and {class: what --save-maps kept of its test images}."""
    if not (folder / "metrics.json").is_file():
        raise UsageError(f"{folder}: no finished run (no metrics.json)")
    result = read_json(folder / "metrics.json", ("method", "classes"))
    kept = {}
    for cls in result["classes"]:
        path = folder / "maps" / f"{cls}.npz"
        if not path.is_file():
            raise UsageError(f"{folder}: no maps/{cls}.npz; do that run's --eval with --save-maps")
        kept[cls] = pages.load_maps(path)
    return result["method"], kept


def map_of(kept, path):
    """The panel of one map of a class, from the median of all that class's pixels to their top
    0.1 %, and whether its highest pixel is at the defect (as meshes have holes: or close to it)."""
    at = kept["paths"].tolist().index(path)
    maps, mask = kept["maps"], kept["masks"][at].astype(bool)
    array = panel(maps[at], np.median(maps), np.quantile(maps, 0.999))
    away = ndimage.distance_transform_edt(~mask)  # (S, S) pixels to the nearest of the defect
    hit = bool(away.ravel()[maps[at].argmax()] <= 0.05 * len(mask))
    return (array if hit else framed(array, (255, 40, 40))), hit


def median_defect(of_class):
    """The path of the defective image whose rank among those of its class, averaged over the
    methods, is the median. of_class: of each method, what it kept."""
    ranks = {}
    for rows in of_class:
        bad = np.flatnonzero(rows["labels"])
        order = bad[np.argsort(rows["scores"][bad], kind="stable")]
        for rank, i in enumerate(order):
            path = str(rows["paths"][i])
            ranks[path] = ranks.get(path, 0) + rank
    ordered = sorted(ranks, key=lambda path: (ranks[path], path))
    return ordered[len(ordered) // 2]


# ----------------------------------------------------------------------------------------------- main


def check_picture(path):
    """Raises UsageError if no picture can be written there: before it is drawn."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: name a picture, such as hero.png")
    check_place(path)


def main(argv=None):
    """Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser("python -m docs.figures", description=(__doc__ or "").split("\n")[0])
    runs = "a finished run; or hero RUN RUN ...; or training RUN"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    parser.add_argument("--classes", default="", help="classes to show, separated by commas")
    parser.add_argument("--out", default="hero.png", help="file of the hero (default: %(default)s)")
    parser.add_argument("--script", default="omniad.py", help="what trains (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps from picture to picture")
    args = parser.parse_args(words[:end])
    classes = [name for name in args.classes.split(",") if name]
    first, *others = args.runs
    try:
        if first == "hero" and not others:
            raise UsageError("hero: give the folders of finished runs, of each method one")
        if first == "hero":
            check_picture(Path(args.out))
            print(draw_hero(others, Path(args.out)))
            print(args.out)
        elif first == "training":
            if len(others) != 1:
                raise UsageError("training: give one folder, that of the run that is to be")
            script_words = words[end + 1 :]
            for path in draw_training(*others, args.script, args.every, script_words, classes):
                print(path)
        else:
            for folder in args.runs:
                for path in draw_run(folder, classes):
                    print(path)
    except UsageError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # see `exit_with`
        raise
    except OSError as error:
        print(f"figures: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    options.exit_with(main)
