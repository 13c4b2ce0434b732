"""The data sets: first an index of paths and labels (`load`), later pixels (`read_image`, `Images`).

    ds = data.load("mvtec", root)            # Dataset: .train and .test, lists of Sample; .classes; .problems
    images = data.Images(ds.test, size=224)  # images[i]: uint8 (3, 224, 224); images.mask(i): bool (224, 224)
    python -m common.data mvtec --data-root DIR    # the table of what is there, and every problem found

| name      | folder below the root (any case)                   | layout                                             |
|-----------|----------------------------------------------------|----------------------------------------------------|
| `synth`   | synth                                              | MVTec layout, drawn by `common/synth.py`           |
| `mvtec`   | mvtec, mvtec_ad, mvtec-ad, mvtec_anomaly_detection | CLS/train/good, CLS/test/DEFECT,                   |
|           |                                                    | CLS/ground_truth/DEFECT/NAME_mask.png              |
| `visa`    | visa, visa_20220922, visa_pytorch                  | split_csv/1cls.csv and what it lists, or 1cls/CLS  |
|           |                                                    | in MVTec layout                                    |
| `btad`    | btad, btech_dataset_transformed                    | MVTec layout, `ok` and `ko` for good and defective |
| `realiad` | real-iad, realiad                                  | realiad_1024 (else 512, else 256) with the lists   |
|           |                                                    | realiad_jsons/CLS.json (or CLS.json beside CLS)    |
| a path    | itself                                             | MVTec layout                                       |

The root may also be the data set itself, and `a+b` joins several. Nothing is ever downloaded.

What counts as what:
- Labels come from the folder, csv or json, never from a mask. Training takes good images only.
- In MVTec layout the good folder may be called `good` or `ok`, and a mask NAME.* or NAME_mask.*, of any image format.
- Raised as `UsageError`, since no honest number could follow: a data set that is not there, a class without training or
  without test images, files that a csv or json lists but that are missing, an image in both splits; and in `mvtec`,
  `visa` (prepared form) and `btad`, whose every defect has a mask, a defective image without one. When pixels are read:
  an unreadable or truncated image, a mask of another size than its image.
- Noted in `Dataset.problems`, since the run remains meaningful: defective images without a mask (in Real-IAD, in VisA's
  csv and in a folder of one's own; `Sample.mask` is None), masks without an image, defective or doubled training images
  (left out), files that are no images (left out; .DS_Store, Thumbs.db and the like silently), a class whose test images
  are all good or all defective, counts that differ from the published ones.
- Pixels: every mode becomes 8-bit RGB. Grey is repeated; 16 bits are divided by 256 (never clipped); transparency is
  dropped and the colour below it kept, as in the pipelines we compare with. The EXIF orientation is ignored: masks are
  drawn on the pixels as stored, and inspection cameras do not turn.
- Masks: a pixel is defective if it is > 0 (VisA's masks hold 1, 2, 3, ...). In a palette image its colour counts, not
  its index, and a transparent pixel is not defective.
"""

import argparse
import csv
import json
import os
import shutil
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import UsageError, corruptions

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_RULES = ("half", "nearest", "any")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB

_NORMAL = ("good", "ok")  # folder names of normal images
_JUNK = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Sample:
    """One image of a data set, not yet read."""

    image: Path
    mask: Path | None  # None: a good image, or a defective one whose mask is not known
    label: int  # 0 good, 1 defective
    cls: str
    defect: str  # kind of defect, as the data set calls it; "good" for every good image
    dataset: str


@dataclass
class Dataset:
    """An index: what there is to train and to test on. Sorted, so the same on every machine."""

    name: str
    root: Path  # its folder; of a joined set the folder that holds them all
    train: list[Sample] = field(default_factory=list)  # good images only
    test: list[Sample] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)  # data-set name -> its classes; one entry unless joined
    problems: list[str] = field(default_factory=list)  # one line each, found while indexing


# ------------------------------------------------------------------------------------------- the benchmarks and counts


@dataclass(frozen=True)
class _Benchmark:
    title: str
    folders: tuple[str, ...]  # accepted names below the root, in lower case; the first is the one we advise
    inside: str  # what must be in it
    source: str  # where people get it, under which licence
    counts: dict[str, tuple[int, int, int]]  # class -> (train, test good, test defective)
    total: tuple[int, int, int]


_REALIAD_CLASSES = """audiojack bottle_cap button_battery end_cap eraser fire_hood mint mounts pcb phone_battery
    plastic_nut plastic_plug porcelain_doll regulator rolled_strip_base sim_card_set switch tape terminalblock
    toothbrush toy toy_brick transistor1 u_block usb usb_adaptor vcpill wooden_beads woodstick zipper""".split()

BENCHMARKS = {
    "mvtec": _Benchmark(
        "MVTec AD", ("mvtec", "mvtec_ad", "mvtec-ad", "mvtecad", "mvtec_anomaly_detection"),
        "bottle/train/good and the like",
        "the MVTec AD page of the MVTec company (asks for consent; CC BY-NC-SA 4.0)",
        {"bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
         "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
         "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
         "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119)},
        (3629, 467, 1258)),
    "visa": _Benchmark(
        "VisA", ("visa", "visa_20220922", "visa_pytorch"),
        "split_csv/1cls.csv beside the classes, or 1cls/candle/train/good and the like",
        "the repository amazon-science/spot-diff (VisA_20220922.tar; CC BY 4.0)",
        {"candle": (900, 100, 100), "capsules": (542, 60, 100), "cashew": (450, 50, 100),
         "chewinggum": (453, 50, 100), "fryum": (450, 50, 100), "macaroni1": (900, 100, 100),
         "macaroni2": (900, 100, 100), "pcb1": (904, 100, 100), "pcb2": (901, 100, 100), "pcb3": (905, 101, 100),
         "pcb4": (904, 101, 100), "pipe_fryum": (450, 50, 100)},
        (8659, 962, 1200)),
    "btad": _Benchmark(
        "BTAD", ("btad", "btech_dataset_transformed", "btech"), "01/train/ok and the like",
        "the BTAD page of the AVIRES laboratory, University of Udine (CC BY-NC-SA 4.0)",
        {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)},
        (1799, 451, 290)),
    "realiad": _Benchmark(
        "Real-IAD", ("real-iad", "realiad", "real_iad"),
        "realiad_256, realiad_512 or realiad_1024, and realiad_jsons/audiojack.json and the like",
        "the Real-IAD project page (on request; CC BY-NC-SA 4.0)",
        dict.fromkeys(_REALIAD_CLASSES),  # only the totals are published in the papers
        (36465, 63256, 51329)),
}


# --------------------------------------------------------------------------------------------------------------- index


def image_files(path):
    """The image files at and below a path, sorted; the path itself if it is a file, whatever its suffix.

    Returns a list of Path, empty if there are none. Raises `UsageError` if there is no such path.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    return _images(path, []) + [file for folder in _folders(path) for file in image_files(folder)]


def load(name, root=None, classes=None):
    """The index of a data set: every path and label, checked, no pixel read.

    name: `synth`, `mvtec`, `visa`, `btad`, `realiad`, a folder in MVTec layout (also relative to `root`), or several of
    these joined with `+`. root: where the data sets lie; default `$AD_DATA`, else `data`. classes: take only these.
    Of joined sets, classes of equal name are renamed DATASET-CLASS; all others keep their names.

    Returns a `Dataset`. Raises `UsageError` as the module's docstring says; unknown classes too.
    """
    root = Path(root or os.environ.get("AD_DATA") or "data")
    parts = [name] if Path(name).is_dir() else name.split("+")  # a folder may have a + in its name
    try:
        sources = [_open(part, root) for part in parts]
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise UsageError(f"--data {name}: the same data set twice; name each once")
        times = Counter(cls for source in sources for cls in source.readers)
        unique = {(source.name, cls): f"{source.name}-{cls}" if times[cls] > 1 else cls
                  for source in sources for cls in source.readers}
        unknown = sorted(set(classes or ()) - set(unique.values()))
        if unknown:
            raise UsageError(f"--classes: no class '{unknown[0]}' in {name}; known: {', '.join(unique.values())}")
        dataset = Dataset("+".join(names), root if len(sources) > 1 else sources[0].folder)
        for source in sources:
            for cls in tqdm(sorted(source.readers), desc=f"index {source.name}", delay=2, leave=False, disable=None):
                if not classes or unique[source.name, cls] in classes:
                    _add_class(dataset, source, cls, unique[source.name, cls])
            dataset.problems += source.problems
            if source.benchmark and not classes:
                dataset.problems += _check_total(dataset, source)
    except OSError as error:
        raise UsageError(f"--data {name}: cannot read {error.filename}: {error.strerror}") from error
    return dataset


@dataclass
class _Source:
    """A data set that was found: its classes can be listed before any of them is read."""

    name: str
    folder: Path
    readers: dict[str, Callable]  # class -> function of (cls, dataset), returns (train, test, problems)
    problems: list[str]
    benchmark: _Benchmark | None = None


def _open(part, root):
    """Find the data set called `part`. Returns a `_Source`."""
    if part in BENCHMARKS:
        return _find_benchmark(part, root)
    if part == "synth":
        from common import synth  # here, since nobody else needs the drawing code

        folder = synth.ensure(root)
    else:
        folder = next((path for path in (Path(part), root / part) if part and path.is_dir()), None)
        if folder is None:
            raise UsageError(f"--data: '{part}' is neither a folder nor one of synth, {', '.join(BENCHMARKS)}")
    readers, problems = _open_folders(folder)
    if not readers:
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            raise UsageError(f"--data {part}: {folder} is a single class; give the folder above it, and --classes "
                             f"{_name(folder)}")
        raise UsageError(f"--data {part}: no class in it; expected CLASS/train/good and CLASS/test/DEFECT, found "
                         f"{_holds(folder)}")
    return _Source(_name(folder), folder, readers, problems)


def _find_benchmark(name, root):
    """Look for a benchmark below `root`, one folder deeper (as archives unpack), and in `root` itself."""
    benchmark = BENCHMARKS[name]

    def named(folder):
        below = {path.name.lower(): path for path in _folders(folder)}
        return [below[other] for other in benchmark.folders if other in below]

    candidates = [path for folder in named(root) for path in (folder, *named(folder))]
    open_ = {"visa": _open_visa, "realiad": _open_realiad}.get(name, partial(_open_folders, masks_demanded=True))
    for folder in (*candidates, root):
        readers, problems = open_(folder)
        # Any folder in MVTec layout would do otherwise, for instance MVTec AD where BTAD is looked for.
        if readers.keys() & benchmark.counts.keys():
            return _Source(name, folder, readers, problems, benchmark)
    found = " and ".join(_holds(folder) for folder in candidates or [root])
    raise UsageError(
        f"--data {name}: {benchmark.title} not found; expected {root / benchmark.folders[0]} (or "
        f"{', '.join(benchmark.folders[1:])}) with {benchmark.inside}; found {found}. Get it from {benchmark.source} "
        f"and unpack it there, or name the folder with --data-root")


def _add_class(dataset, source, cls, unique):
    """Read the class `cls` of the source, check it, and add it to the data set under its unique name."""
    train, test, problems = source.readers[cls](unique, source.name)
    if not train:
        raise UsageError(f"{source.folder}: class '{cls}' has no good training images (in MVTec layout: "
                         f"{cls}/train/good); add some, or leave the class out with --classes")
    if not test:
        raise UsageError(f"{source.folder}: class '{cls}' has no test images (in MVTec layout: {cls}/test/good and "
                         f"{cls}/test/DEFECT); add some, or leave the class out with --classes")
    defective = sum(sample.label for sample in test)
    counts = len(train), len(test) - defective, defective
    for count, kind in zip(counts[1:], ("good", "defective")):
        if count == 0:
            problems.append(f"{unique}: no {kind} test image, so the image metrics of this class are undefined")
    benchmark = source.benchmark
    if benchmark:
        if cls not in benchmark.counts:
            problems.append(f"{unique}: not a class of {benchmark.title}")
        elif benchmark.counts[cls] not in (None, counts):
            problems.append(f"{unique}: {_counts(counts)}; {benchmark.title} has {_counts(benchmark.counts[cls])}")
    dataset.train += train
    dataset.test += test
    dataset.classes.append(unique)
    dataset.groups.setdefault(source.name, []).append(unique)
    dataset.problems += problems


def _check_total(dataset, source):
    """Problem lines if a whole benchmark has not the published size."""
    name, benchmark, problems = source.name, source.benchmark, []
    absent = [cls for cls in benchmark.counts if not {cls, f"{name}-{cls}"} & set(dataset.groups[name])]
    if absent:
        problems.append(f"{name}: {len(absent)} of {len(benchmark.counts)} classes are missing: {', '.join(absent)}")
    labels = [sample.label for sample in dataset.test if sample.dataset == name]
    counts = sum(sample.dataset == name for sample in dataset.train), labels.count(0), labels.count(1)
    if counts != benchmark.total:
        problems.append(f"{name}: {_counts(counts)} in all; {benchmark.title} has {_counts(benchmark.total)}")
    return problems


def _counts(counts):
    return "{} training, {} good and {} defective test images".format(*counts)


# ---------------------------------------------------------------------------- layouts: what is in a class, and where


def _open_folders(folder, masks_demanded=False):
    """MVTec layout. Returns ({class: reader}, problems)."""
    readers, problems = {}, []
    for path in _folders(folder):
        if (path / "train").is_dir() or (path / "test").is_dir():
            readers[path.name] = partial(_read_folders, path, masks_demanded)
        else:
            problems.append(f"{path}: left out, it has neither train nor test in it")
    return readers, problems


def _read_folders(folder, masks_demanded, cls, dataset):
    """One class in MVTec layout. Returns (train, test, problems)."""
    train, test, problems = [], [], []
    for path in _folders(folder / "train"):
        if path.name in _NORMAL:
            train += [Sample(image, None, 0, cls, "good", dataset) for image in _images(path, problems)]
        else:
            problems.append(f"{path}: left out, training takes only good images")
    for path in _folders(folder / "test"):
        images = _images(path, problems)
        if path.name in _NORMAL:
            test += [Sample(image, None, 0, cls, "good", dataset) for image in images]
            continue
        doubled = [stem for stem, times in Counter(image.stem for image in images).items() if times > 1]
        if doubled:
            problems.append(f"{path}: several images of the same name share one mask (first: {doubled[0]})")
        # Matched on the stem, as BTAD mixes bmp and png; MVTec AD calls a mask NAME_mask, the others call it NAME.
        masks, mask_folder = {}, folder / "ground_truth" / path.name
        for mask in _images(mask_folder, problems):
            first = masks.setdefault(mask.stem.removesuffix("_mask"), mask)
            if first is not mask:
                problems.append(f"{mask}: left out, {first.name} is the mask of the same image")
        test += [Sample(image, masks.get(image.stem), 1, cls, path.name, dataset) for image in images]
        maskless = [image for image in images if image.stem not in masks]
        if maskless:
            line = (f"{path}: {len(maskless)} of {len(images)} defective images without a mask (expected for the "
                    f"first: {mask_folder / maskless[0].stem}_mask.png)")
            if masks_demanded:
                raise UsageError(f"{line}; unpack the data set again")
            problems.append(line)
        imageless = sorted(masks.keys() - {image.stem for image in images})
        if imageless:
            first = masks[imageless[0]].name
            problems.append(f"{mask_folder}: {len(imageless)} masks without an image (first: {first})")
    for path in _folders(folder / "ground_truth"):
        if path.name not in _NORMAL and not (folder / "test" / path.name).is_dir():
            problems.append(f"{path}: masks without images, there is no test/{path.name}")
    return train, test, problems


def _open_visa(folder):
    """VisA as its authors pack it (csv), or as their script prepares it. Returns ({class: reader}, problems)."""
    split_file = folder / "split_csv" / "1cls.csv"
    if not split_file.is_file():
        prepared = folder / "1cls"
        return _open_folders(prepared if prepared.is_dir() else folder, masks_demanded=True)
    entries = defaultdict(list)
    with open(split_file, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        lacking = {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ())
        if lacking:
            raise UsageError(f"{split_file}: no column '{min(lacking)}'; unpack the data set again")
        for row in rows:
            if (row["split"] not in ("train", "test") or row["label"] not in ("normal", "anomaly")
                    or not (row["object"] and row["image"])):
                raise UsageError(f"{split_file}: line {rows.line_num} is damaged; unpack the data set again")
            mask = folder / row["mask"] if row["mask"] else None
            defect = "good" if row["label"] == "normal" else "bad"
            entries[row["object"]].append((row["split"], defect, folder / row["image"], mask))
    return {cls: partial(_read_list, split_file, entries[cls]) for cls in entries}, []


def _open_realiad(folder):
    """Real-IAD: one json a class. Returns ({class: reader}, problems)."""
    homes = [folder / name for name in ("realiad_1024", "realiad_512", "realiad_256")]
    images = next((home for home in homes if home.is_dir()), folder)
    places = [folder / "realiad_jsons", folder / "realiad_jsons" / "realiad_jsons", images, folder,
              folder.parent / "realiad_jsons"]  # the last: the user named a folder of one resolution
    for place in places:
        lists = [path for path in sorted(place.glob("*.json")) if path.stem in _REALIAD_CLASSES]  # others lie there too
        if lists:
            return {path.stem: partial(_read_json, path, images / path.stem) for path in lists}, []
    return {}, []


def _read_json(path, folder, cls, dataset):
    """One class of Real-IAD. path: its json; folder: of its images. Returns (train, test, problems)."""
    entries = []
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "test"):
            for entry in lists[split]:
                defect = "good" if entry["anomaly_class"] == "OK" else str(entry["anomaly_class"])
                mask = folder / entry["mask_path"] if entry.get("mask_path") else None
                entries.append((split, defect, folder / entry["image_path"], mask))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a list of Real-IAD ({error!r}); unpack the data set again") from error
    return _read_list(path, entries, cls, dataset)


def _read_list(path, entries, cls, dataset):
    """One class out of a list. path: of the list; entries: (split, defect, image, mask).

    Returns (train, test, problems).
    """
    problems = []
    once = list(dict.fromkeys(entries))
    if len(once) < len(entries):
        problems.append(f"{path}: {cls} lists {len(entries) - len(once)} entries twice; the copies are left out")
    files = [file for _, _, image, mask in once for file in (image, mask) if file]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"{path}: {len(missing)} of {len(files)} files listed for {cls} are missing (first: "
                         f"{missing[0]}); unpack the data set again, or leave the class out with --classes")
    samples = {"train": [], "test": []}
    for split, defect, image, mask in sorted(once, key=lambda entry: (entry[1], str(entry[2]))):
        good = defect == "good"
        samples[split].append(Sample(image, None if good else mask, int(not good), cls, defect, dataset))
    train = [sample for sample in samples["train"] if not sample.label]
    both = {sample.image for sample in train} & {sample.image for sample in samples["test"]}
    if both:
        raise UsageError(f"{path}: {cls} lists {min(both)} for training and for testing; unpack the data set again")
    if len(train) < len(samples["train"]):
        problems.append(f"{path}: {len(samples['train']) - len(train)} defective training images of {cls} left out")
    maskless = [sample.image for sample in samples["test"] if sample.label and not sample.mask]
    if maskless:
        problems.append(f"{path}: {len(maskless)} defective test images of {cls} without a mask (first: {maskless[0]})")
    return train, samples["test"], problems


def _folders(folder):
    """The folders in a folder, sorted; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
                  key=lambda path: path.name)


def _images(folder, problems):
    """The image files in a folder, sorted; none if it does not exist. What else lies there becomes a problem line."""
    if not folder.is_dir():
        return []
    paths = sorted((path for path in folder.iterdir()
                    if not path.name.startswith(".") and path.name.lower() not in _JUNK), key=lambda path: path.name)
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if len(images) < len(paths):
        first = min({path.name for path in paths} - {path.name for path in images})
        problems.append(f"{folder}: {len(paths) - len(images)} left out, no image by its suffix (first: {first})")
    return images


def _name(folder):
    """The name that the user knows a folder by: also of ".", and of a link, not of what it points to."""
    return os.path.basename(os.path.abspath(folder))


def _holds(folder):
    """A folder and what lies in it, for a message."""
    if not folder.is_dir():
        return f"no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return f"{folder} empty"
    return f"{folder} with {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


# -------------------------------------------------------------------------------------------------------------- pixels


def read_image(path):
    """The picture in a file at its own resolution: uint8 (H, W, 3), RGB; any mode and bit depth.

    32-bit integers must be in 0..65535 (taken for 16 bits); floats in 0..1 or, if any is larger, in 0..255.
    Raises `UsageError` that names the file if it is missing, damaged, truncated or out of these ranges.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 or 32 bits; Pillow itself would clip them at 255
                values = np.asarray(image).astype(np.int64)  # (H, W)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("its integers are not in 0..65535")
                return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)  # (H, W) -> (H, W, 3)
            if image.mode == "F":
                values = np.asarray(image)  # (H, W) float32
                if not (values.min() >= 0 and values.max() <= 255):  # so written, NaN is refused too
                    raise ValueError("its floats are neither in 0..1 nor in 0..255")
                values = values * 255 if values.max() <= 1 else values
                return np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=2)  # (H, W) -> (H, W, 3)
            if isinstance(image.info.get("transparency"), bytes):
                image = image.convert("RGBA")  # Pillow warns about the direct way
            return np.array(image.convert("RGB"))
    except Exception as error:  # the decoders raise nearly every type there is
        raise _unreadable("image", path, error) from error


def read_mask(path):
    """A mask at its own resolution: bool (H, W), True where a pixel is > 0 in any channel and not fully transparent.

    Raises `UsageError` that names the file if it is missing, damaged or truncated.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
                return np.asarray(image) > 0
            values = np.asarray(image.convert("RGBA"))  # (H, W, 4)
            return values[..., :3].any(axis=-1) & (values[..., 3] > 0)
    except Exception as error:
        raise _unreadable("mask", path, error) from error


def _unreadable(kind, path, error):
    reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return UsageError(f"cannot read the {kind} {path}: {reason or type(error).__name__}")


def resize_image(image, size):
    """uint8 (H, W, 3) -> uint8 (size, size, 3): bilinear, antialiased (Pillow's), as in all four papers' pipelines.

    An image that is not square is squeezed, not cropped.
    """
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask, size, rule="half"):
    """bool (H, W) -> bool (size, size), by one of the rules that published numbers rest on.

    half: bilinear, then > 0.5 (RD4AD, ADer, Omni-AD); nearest: nearest neighbour (UniAD, OneNIP); any: bilinear, then
    > 0 (ReContrast, CADA), which grows a mask by about a pixel. Small defects can vanish under half and nearest.
    """
    if rule not in MASK_RULES:
        raise UsageError(f"mask rule '{rule}': choose one of {', '.join(MASK_RULES)}")
    method = Image.Resampling.NEAREST if rule == "nearest" else Image.Resampling.BILINEAR
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), method)
    return np.asarray(resized) > (0 if rule == "any" else 127)


def normalize(batch):
    """uint8 (B, 3, H, W) in 0..255 -> float32 (B, 3, H, W), ImageNet's mean and deviation taken off, same device."""
    mean = torch.tensor(MEAN, device=batch.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=batch.device).view(1, 3, 1, 1)
    return batch.float().div_(255).sub_(mean).div_(std)


class Images(torch.utils.data.Dataset):
    """The pixels of samples: `images[i]` is uint8 (3, size, size), `images.mask(i)` bool (size, size).

    samples: list of `Sample`. corrupt: (name, severity) of `corruptions`, applied at the original resolution; its noise
    is seeded by class, defect and file name, so it is the same wherever the data lie and in whatever order they are
    read. memory_share: see `preload`. mask_rule: see `resize_mask`. workers: threads of `preload`, 0 for one per core.
    progress: show a bar (none in any case when stderr is no terminal).

    Reading raises `UsageError` that names the file. Works in DataLoader workers, forked or spawned.
    """

    def __init__(self, samples, size, corrupt=None, memory_share=0.5, mask_rule="half", workers=0, progress=True):
        self.samples, self.size, self.corrupt = samples, size, corrupt
        self.memory_share, self.mask_rule = memory_share, mask_rule
        self.workers, self.progress = workers, progress
        self._pixels = None  # uint8 (N, 3, size, size) once preloaded
        self._vanished = set()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        # A copy: who changes the image he got shall not change the next epoch's. By numpy, as torch starts its threads
        # for as little as this, which on a busy machine takes ten times as long.
        return torch.from_numpy(self._pixels[i].numpy().copy() if self.cached else self._decode(i))

    @property
    def cached(self):
        """Whether all pixels are in memory."""
        return self._pixels is not None

    @property
    def vanished(self):
        """How many of the masks read so far are empty after the resize, though their images are defective."""
        return len(self._vanished)

    def mask(self, i):
        """bool (size, size); all False for a good image, and for a defective one without a mask file."""
        sample = self.samples[i]
        if sample.mask is None:
            return torch.zeros(self.size, self.size, dtype=torch.bool)
        mask = read_mask(sample.mask)
        (width, height), _ = _header(sample.image)
        if mask.shape != (height, width):
            raise UsageError(_sizes_differ(sample, (width, height), mask.shape[::-1]))
        resized = resize_mask(mask, self.size, self.mask_rule)
        if not resized.any():
            self._vanished.add(i)
        return torch.from_numpy(resized)

    def preload(self):
        """Decode everything once, into memory that processes share, so that no epoch decodes again.

        Only if it fits into `memory_share` of the memory that is free now (divided among the processes of a torchrun);
        otherwise each access decodes. `cached` says which.
        """
        shape = (len(self.samples), 3, self.size, self.size)
        need = int(np.prod(shape))
        if self.cached or need > self.memory_share * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            return
        pixels = torch.empty(shape, dtype=torch.uint8)
        # Containers often have a tiny /dev/shm, and overfilling it kills the process. Forked workers share anyway.
        if not os.path.isdir("/dev/shm") or need < shutil.disk_usage("/dev/shm").free:
            pixels.share_memory_()
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:  # threads: Pillow decodes without the GIL
            decoded = pool.map(self._decode, range(len(self)))
            for i, image in enumerate(tqdm(decoded, "read images", len(self), disable=None if self.progress else True)):
                pixels[i].numpy()[:] = image
        self._pixels = pixels

    def _decode(self, i):
        """Image i from its file: uint8 array (3, size, size)."""
        sample = self.samples[i]
        image = read_image(sample.image)
        if self.corrupt:
            # The prefix that a joined data set may have given the class must not change the noise.
            cls = sample.cls.removeprefix(f"{sample.dataset}-")
            seed = zlib.crc32(f"{cls}/{sample.defect}/{sample.image.name}".encode())
            image = corruptions.corrupt(image, *self.corrupt, seed=seed)
        return np.ascontiguousarray(resize_image(image, self.size).transpose(2, 0, 1))  # (S, S, 3) -> (3, S, S)


def free_memory():
    """Bytes that can be taken without swapping, as far as the system tells. (A container's own limit is not seen.)"""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:  # macOS: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


# ----------------------------------------------------------------------------------------------- python -m common.data


def _header(path, kind="image"):
    """((width, height), format) of an image file, without its pixels. Raises `UsageError` if it is unreadable."""
    try:
        with Image.open(path) as image:
            return image.size, image.format
    except Exception as error:
        raise _unreadable(kind, path, error) from error


def _sizes_differ(sample, image_size, mask_size):
    return ("the mask {} is {}x{}, but its image {} is {}x{}; they must have the same size"
            .format(sample.mask, *mask_size, sample.image, *image_size))


def scan(dataset):
    """Read the header of every image and mask. Returns ({class: Counter of (width, height)}, problem lines)."""
    sizes, problems, blurred = defaultdict(Counter), [], defaultdict(list)
    for sample in tqdm(dataset.train + dataset.test, "read headers", disable=None):
        try:
            size, _ = _header(sample.image)
            sizes[sample.cls][size] += 1
            if sample.mask:
                mask_size, mask_format = _header(sample.mask, "mask")
                if mask_size != size:
                    problems.append(_sizes_differ(sample, size, mask_size))
                if mask_format == "JPEG":
                    blurred[sample.mask.parent].append(sample.mask.name)
        except UsageError as error:
            problems.append(str(error))
    for folder, names in blurred.items():
        problems.append(f"{folder}: {len(names)} masks are JPEG (first: {names[0]}): > 0 marks their smeared edges too")
    return sizes, problems


def summary(dataset):
    """The table of `python -m common.data`, as text, problems included. Reads every header."""
    sizes, problems = scan(dataset)
    rows = [("class", "train", "test good", "test defective", "masks", "size")]
    for cls in dataset.classes:
        test = [sample for sample in dataset.test if sample.cls == cls]
        defective = sum(sample.label for sample in test)
        names = [f"{width}x{height}" for width, height in sorted(sizes[cls])]
        rows.append((cls, sum(sample.cls == cls for sample in dataset.train), len(test) - defective, defective,
                     sum(sample.mask is not None for sample in test),
                     " to ".join(names[:: max(1, len(names) - 1)]) + (f" ({len(names)} sizes)" if names[2:] else "")))
    rows.append(("all", *(sum(column) for column in list(zip(*rows[1:]))[1:5]), ""))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = [f"{dataset.name} in {dataset.root}, classes: {len(dataset.classes)}"]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row[1:5], widths[1:5])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[5]]).rstrip())
    problems = dataset.problems + problems
    lines += [f"problem: {line}" for line in problems] or ["no problems found"]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.data", description="What is in a data set, and what is wrong.")
    parser.add_argument("name", help="synth, mvtec, visa, btad, realiad, several joined with +, or a folder")
    parser.add_argument("--data-root", metavar="DIR", help="where the data sets lie (default: $AD_DATA, else data)")
    parser.add_argument("--classes", metavar="A,B", help="only these classes")
    args = parser.parse_args(argv)
    try:
        print(summary(load(args.name, args.data_root, args.classes.split(",") if args.classes else None)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
