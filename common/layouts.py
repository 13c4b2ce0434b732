"""Where the data sets lie and how they are laid out: an index of paths and labels, read from folder names and lists.

`data.load` is the door; this module is what stands behind it, and reads no pixel. It imports nothing heavy, so that a
script's `--help` can name the benchmarks at once.

    source = layouts.find("mvtec", root)        # Source: .name, .folder, .readers {class: reader}
    train, test, problems = source.readers["bottle"]("bottle", "mvtec")
"""

import csv
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

from common import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

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


# ------------------------------------------------------------------------------- the benchmarks and counts


@dataclass(frozen=True)
class Benchmark:
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
    "mvtec": Benchmark(
        "MVTec AD", ("mvtec", "mvtec_ad", "mvtec-ad", "mvtecad", "mvtec_anomaly_detection"),
        "bottle/train/good and the like",
        "the MVTec AD page of the MVTec company (asks for consent; CC BY-NC-SA 4.0)",
        {"bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
         "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
         "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
         "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119)},
        (3629, 467, 1258)),
    "visa": Benchmark(
        "VisA", ("visa", "visa_20220922", "visa_pytorch"),
        "split_csv/1cls.csv beside the classes, or 1cls/candle/train/good and the like",
        "the repository amazon-science/spot-diff (VisA_20220922.tar; CC BY 4.0)",
        {"candle": (900, 100, 100), "capsules": (542, 60, 100), "cashew": (450, 50, 100),
         "chewinggum": (453, 50, 100), "fryum": (450, 50, 100), "macaroni1": (900, 100, 100),
         "macaroni2": (900, 100, 100), "pcb1": (904, 100, 100), "pcb2": (901, 100, 100), "pcb3": (905, 101, 100),
         "pcb4": (904, 101, 100), "pipe_fryum": (450, 50, 100)},
        (8659, 962, 1200)),
    "btad": Benchmark(
        "BTAD", ("btad", "btech_dataset_transformed", "btech"), "01/train/ok and the like",
        "the BTAD page of the AVIRES laboratory, University of Udine (CC BY-NC-SA 4.0)",
        {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)},
        (1799, 451, 290)),
    "realiad": Benchmark(
        "Real-IAD", ("real-iad", "realiad", "real_iad"),
        "realiad_256, realiad_512 or realiad_1024, and realiad_jsons/audiojack.json and the like",
        "the Real-IAD project page (on request; CC BY-NC-SA 4.0)",
        dict.fromkeys(_REALIAD_CLASSES),  # only the totals are published in the papers
        (36465, 63256, 51329)),
}


# ----------------------------------------------------------------------------------- where a data set lies


@dataclass
class Source:
    """A data set that was found: its classes can be listed before any of them is read."""

    name: str
    folder: Path
    readers: dict[str, Callable]  # class -> function of (cls, dataset), returns (train, test, problems)
    problems: list[str]
    benchmark: Benchmark | None = None


def find(part, root):
    """Find the data set called `part`. Returns a `Source`."""
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
                             f"{name_of(folder)}")
        raise UsageError(f"--data {part}: no class in it; expected CLASS/train/good and CLASS/test/DEFECT, found "
                         f"{contents(folder)}")
    return Source(name_of(folder), folder, readers, problems)


def _find_benchmark(name, root):
    """Look for a benchmark below `root`, one folder deeper (as archives unpack), and in `root` itself."""
    benchmark = BENCHMARKS[name]

    def named(folder):
        below = {path.name.lower(): path for path in folders(folder)}
        return [below[other] for other in benchmark.folders if other in below]

    candidates = [path for folder in named(root) for path in (folder, *named(folder))]
    open_ = {"visa": _open_visa, "realiad": _open_realiad}.get(name, partial(_open_folders, masks_demanded=True))
    for folder in (*candidates, root):
        readers, problems = open_(folder)
        # Any folder in MVTec layout would do otherwise, for instance MVTec AD where BTAD is looked for.
        if readers.keys() & benchmark.counts.keys():
            return Source(name, folder, readers, problems, benchmark)
    found = " and ".join(contents(folder) for folder in candidates or [root])
    raise UsageError(
        f"--data {name}: {benchmark.title} not found; expected {root / benchmark.folders[0]} (or "
        f"{', '.join(benchmark.folders[1:])}) with {benchmark.inside}; found {found}. Get it from {benchmark.source} "
        f"and unpack it there, or name the folder with --data-root")


# ----------------------------------------------------------------------------- what is in a class, and where


def _open_folders(folder, masks_demanded=False):
    """MVTec layout. Returns ({class: reader}, problems)."""
    readers, problems = {}, []
    for path in folders(folder):
        if (path / "train").is_dir() or (path / "test").is_dir():
            readers[path.name] = partial(_read_folders, path, masks_demanded)
        else:
            problems.append(f"{path}: left out, it has neither train nor test in it")
    return readers, problems


def _read_folders(folder, masks_demanded, cls, dataset):
    """One class in MVTec layout. Returns (train, test, problems)."""
    train, test, problems = [], [], []
    for path in folders(folder / "train"):
        if path.name in _NORMAL:
            train += [Sample(image, None, 0, cls, "good", dataset) for image in images_in(path, problems)]
        else:
            problems.append(f"{path}: left out, training takes only good images")
    for path in folders(folder / "test"):
        images = images_in(path, problems)
        if path.name in _NORMAL:
            test += [Sample(image, None, 0, cls, "good", dataset) for image in images]
            continue
        doubled = [stem for stem, times in Counter(image.stem for image in images).items() if times > 1]
        if doubled:
            problems.append(f"{path}: several images of the same name share one mask (first: {doubled[0]})")
        # Matched on the stem, as BTAD mixes bmp and png; MVTec AD calls a mask NAME_mask, the others call it NAME.
        masks, mask_folder = {}, folder / "ground_truth" / path.name
        for mask in images_in(mask_folder, problems):
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
    for path in folders(folder / "ground_truth"):
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


def folders(folder):
    """The folders in a folder, sorted; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
                  key=lambda path: path.name)


def images_in(folder, problems):
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


def name_of(folder):
    """The name that the user knows a folder by: also of ".", and of a link, not of what it points to."""
    return os.path.basename(os.path.abspath(folder))


def contents(folder):
    """A folder and what lies in it, for a message."""
    if not folder.is_dir():
        return f"no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return f"{folder} empty"
    return f"{folder} with {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


