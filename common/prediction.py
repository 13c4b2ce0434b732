"""--predict: pictures that nobody labelled -> predictions.csv, heat-maps, masks, predictions.html.

    files -> decoded (threads) -> scored (batches, by the model) -> drawn (threads) -> row, figure

Every step hands on one picture at a time and works only a few pictures ahead, so memory does not
grow with their number; of a picture at its own resolution nothing is kept but a thumbnail. A
picture that cannot be read costs its own row only.
"""

import csv
import functools
import io
import os
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UsageError, data, options, pages, pictures
from common.folder import short_name

COLUMNS = ("path", "score", "ratio", "verdict")  # then the method's own, then the reason
SHOWN = 20  # rows printed at the end
AT_ONCE = 2**18  # the model's pixels that are scored together: 64 small pictures, 5 of 224 px
THUMBNAIL = 128  # pixels of a thumbnail's longer side


@dataclass
class Prediction:
    """One picture on its way through the steps; what a step adds is empty before it."""

    sample: data.Sample
    target: Path  # of its heat-map below pictures/, and of its mask below masks/
    reason: str = ""  # why it has no score
    pixels: np.ndarray | None = None  # uint8 (S, S, 3), what the model sees
    thumbnail: np.ndarray | None = None  # uint8 (h, w, 3), for the page
    size: tuple = ()  # (width, height) of the picture in the file
    map: np.ndarray | None = None  # float32 (S, S)
    score: float | None = None
    ratio: float | None = None  # score / threshold
    verdict: str = ""  # good or defective
    own: dict = field(default_factory=dict)  # the method's own columns
    figure: bytes = b""  # its place on the page


def predict(run, args, score, normal_score, columns=None, pixel_threshold=None):
    """Score the files and folders of --predict.

    Written into the run's folder: predictions.csv, one row a picture in the order of the files;
    predictions.html, the same to look through; pictures/, heat-maps at the resolution of the files,
    in the folders of the input; masks/, white where a map is above `pixel_threshold`. A killed run
    leaves the rows it had in predictions.part.csv.

    Args:
        score: (images (B, 3, S, S) uint8 on the run's device, their B samples) -> (maps (B, S, S),
            scores (B,)), float tensors; the samples have class "" and label 0.
        normal_score: the 99 % quantile of the training images' scores. It is the threshold, unless
            `args.threshold` is given and takes its place. A picture whose score is higher than
            the threshold is called defective. Column `ratio` is score / threshold; empty if the
            threshold is not above 0.
        columns: {name: function(sample, score) -> value}: the method's own columns, after the
            verdict.
        pixel_threshold: of the maps' values; None: no masks.
    Raises:
        UsageError: a path of --predict does not exist, or none of them holds an image.
        SystemExit: status 1, at the end, if a picture has no score; column `reason` says why.
    """
    if run.rank > 0:
        return  # one process does it all
    waiting = _inputs(args.predict)
    columns = columns or {}
    threshold = normal_score if args.threshold is None else args.threshold
    decode = functools.partial(_decode, size=args.image_size, top=_top(run.depths))
    draw = functools.partial(_draw, out=run.out, pixel_threshold=pixel_threshold)
    batch_size = max(args.batch_size, AT_ONCE // args.image_size**2)
    ahead = 2 * batch_size + 8  # pictures under way in each step
    page, summary = pages.Predictions(run.out), _Summary()
    unfinished = run.out / "predictions.part.csv"
    # Bytes of a file name that are not UTF-8 are written as they are.
    text = dict(newline="", encoding="utf-8", errors="surrogateescape")
    threads = ThreadPoolExecutor(options.cores() + 1)
    with threads as pool, open(unfinished, "w", buffering=1, **text) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *columns, "reason"])
        decoded = _in_threads(pool, decode, waiting, ahead)
        scored = _scored(run, score, decoded, columns, threshold, batch_size)
        drawn = _in_threads(pool, draw, scored, ahead)
        for done in run.progress(drawn, "prediction", len(waiting)):
            path = str(done.sample.image)
            own = [done.own.get(name) for name in columns]
            writer.writerow([path, done.score, done.ratio, done.verdict, *own, done.reason])
            page.add(done.figure, done.score, done.verdict, done.sample.image.parent)
            summary.add(done)
    os.replace(unfinished, run.out / "predictions.csv")
    page.write(run.out / "predictions.html", run.method, threshold, pixel_threshold)
    for line in summary.lines():
        run.say(line)
    folders = "pictures/" if pixel_threshold is None else "pictures/, masks/"
    run.say(f"{run.out}: predictions.csv, predictions.html, {folders} ({summary.counts()})")
    if summary.failed:
        print(f"{Path(sys.argv[0]).name}: {summary.failures()}", file=sys.stderr)
        raise SystemExit(1)


# -------------------------------------------------------------------------------------------- files


def _inputs(paths):
    """A `Prediction` for every image file at and below the paths, in the order given: a list.

    A file that is reached twice, through a link between folders or because it is named twice, is
    taken once, by its shorter path. The targets repeat the folders of the input. A second input of
    the same name becomes NAME-2; files that differ only in their suffix keep it. Upper and lower
    case make no difference, as on many file systems.
    """
    places, roots = {}, set()  # (real folder, name) -> (file, its place below pictures/)
    real_folder = functools.lru_cache(os.path.realpath)
    for path, files in zip(map(Path, paths), data.pictures_of(paths)):
        whole_folder, root = path.is_dir(), Path()
        if whole_folder:
            root = _unused(Path(os.path.basename(os.path.abspath(path))), roots)
        for file in files:
            place = root / file.relative_to(path) if whole_folder else Path(file.name)
            key = real_folder(file.parent), file.name
            if key not in places or len(file.parts) < len(places[key][0].parts):
                places[key] = file, place
    stems, taken = Counter(), set()
    for _, place in places.values():
        stems[_folded(place.parent / place.stem)] += 1
        taken.update(_folded(folder) for folder in place.parents)  # files cannot be called so
    predictions = []
    for file, place in places.values():
        alone = stems[_folded(place.parent / place.stem)] == 1
        name = short_name(place.stem if alone else place.name)
        target = _unused(place.parent / f"{name}.png", taken, ".png")
        sample = data.Sample(file, None, 0, "", "", "")
        predictions.append(Prediction(sample, target))
    return predictions


def _unused(path, taken, suffix=""):
    """The path, or NAME-2, NAME-3, ... if it is taken. What is returned is taken from now on."""
    name, number, unused = path.name.removesuffix(suffix), 2, path
    while _folded(unused) in taken:
        unused = path.parent / f"{name}-{number}{suffix}"
        number += 1
    taken.add(_folded(unused))
    return unused


def _folded(path):
    return str(path).casefold()


# -------------------------------------------------------------------------------------------- steps


def _in_threads(pool, function, items, ahead):
    """Yield function(item) in the order of the items, at most `ahead` of them under way."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _top(depths):
    """The value that becomes white in grey pictures of more than 8 bits: that of the training
    images, if it is the same for all classes (the class of these pictures is not known). None:
    each picture's own largest value decides."""
    tops = {top for top in depths.values() if top is not None}
    return tops.pop() if len(tops) == 1 else None


def _decode(prediction, size, top):
    """Read the file: what the model sees, and the thumbnail. In a thread."""
    try:
        image = data.read_image(prediction.sample.image, top)  # (H, W, 3)
    except UsageError as error:
        prediction.reason = str(error)
        return prediction
    prediction.size = image.shape[1], image.shape[0]
    prediction.pixels = data.resize_image(image, size)
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    prediction.thumbnail = np.asarray(thumbnail)
    return prediction


def _scored(run, score, decoded, columns, threshold, batch_size):
    """Yield the predictions with their scores, in the same order. In the main thread."""
    while True:
        group = list(islice(decoded, batch_size))
        if not group:
            return
        batch = [prediction for prediction in group if not prediction.reason]
        if batch:
            _score_batch(run, score, batch)
        for prediction in batch:
            if prediction.score is not None:
                _judge(prediction, columns, threshold)
        yield from group


def _score_batch(run, score, batch):
    pixels = np.stack([prediction.pixels for prediction in batch])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S)
    samples = [prediction.sample for prediction in batch]
    maps, scores = score(run.to_device(images.contiguous()), samples)
    maps, scores = maps.float().cpu().numpy(), scores.float().cpu().numpy()
    for i, prediction in enumerate(batch):
        prediction.pixels = None
        if np.isfinite(scores[i]) and np.isfinite(maps[i]).all():
            prediction.map, prediction.score = maps[i], float(scores[i])
        else:
            prediction.reason = "the model's score or map is not finite"


def _judge(prediction, columns, threshold):
    sample, value = prediction.sample, prediction.score
    prediction.verdict = "defective" if value > threshold else "good"
    if threshold > 0:
        prediction.ratio = value / threshold
    for name, column in columns.items():
        prediction.own[name] = column(sample, value)


def _draw(prediction, out, pixel_threshold):
    """Write heat-map and mask, and draw the figure of the page. In a thread."""
    if prediction.score is None:
        caption = pages.failed_caption(prediction.sample.image, prediction.reason)
        prediction.figure = pages.figure(caption)
        return prediction
    values, links = prediction.map, {"heat-map": Path("pictures") / prediction.target}
    low, high = values.min(), values.max()
    if pixel_threshold is not None:
        high = max(high, pixel_threshold)  # a map that stays far below the threshold stays dark
        links["mask"] = Path("masks") / prediction.target
        mask = pictures.enlarged(values, prediction.size) > pixel_threshold  # (H, W)
        _save(Image.fromarray(mask.astype(np.uint8) * 255), out / links["mask"])
    heat = pictures.heat_picture(values, low, high, prediction.size)
    _save(heat, out / links["heat-map"])
    shown = [prediction.thumbnail, pictures.overlaid(prediction.thumbnail, values, low, high)]
    picture = pages.jpeg(pictures.in_row(shown))
    caption = pages.caption(prediction.sample.image, prediction.score, prediction.ratio,
                            prediction.verdict, prediction.own)
    prediction.figure = pages.figure(caption, picture, links)
    prediction.map = prediction.thumbnail = None
    return prediction


def _save(picture, path):
    """PNG. The lowest compression: the usual one takes three times as long for 7 % less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    path.write_bytes(buffer.getbuffer())


# ------------------------------------------------------------------------------------------ summary


class _Summary:
    """What is printed at the end: numbers, the highest scores, the first failure."""

    def __init__(self):
        self.numbers = Counter()
        self.highest = []  # predictions
        self.failed = 0
        self.first_failed = None

    def add(self, done):
        done.figure = b""
        self.numbers[done.verdict or "without a score"] += 1
        if done.score is None:
            self.failed += 1
            self.first_failed = self.first_failed or done
            return
        self.highest.append(done)
        self.highest.sort(key=lambda one: -one.score)
        del self.highest[SHOWN:]

    def lines(self):
        """The highest scores, one line each."""
        lines = []
        for one in self.highest:
            ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
            own = "".join(f"  {pages.text(value)}" for value in one.own.values())
            path = pages.readable(one.sample.image)
            lines.append(f"{one.score:<10.4g}{ratio:>8}  {one.verdict:<9}  {path}{own}")
        if lines:
            lines.insert(0, f"{'score':<10}{'ratio':>8}  verdict    path")
        return lines

    def counts(self):
        parts = [f"{number} {what}" for what, number in sorted(self.numbers.items())]
        return f"{self.numbers.total()} images: {', '.join(parts)}"

    def failures(self):
        one = self.first_failed
        return (f"{self.failed} of {self.numbers.total()} images have no score (column reason of "
                f"predictions.csv); the first: {pages.readable(one.reason)}")
