"""Where the data sets lie and how they are laid out: an index of paths and labels, read from folder names and lists.

`data.load` is the door; this module stands behind it and reads no pixel. It imports nothing heavy, so that a script's
`--help` can name the benchmarks at once.

    source = layouts.find("mvtec", root)             # Source: .name, .folder, .reading, .readers {class: reader}
    notes = layouts.Notes()                          # takes what is odd but can be lived with
    train, test = source.readers["bottle"]("bottle", "mvtec", notes)      # lists of Sample

Names, in the layout of MVTec AD and in a folder of one's own; case, spaces, `-`, `_` and `.` do not matter:

- Good images lie in a folder called as in NORMAL. A folder that looks like one without being in the list (`good_2`,
  `ok images`, `negative`) is refused: its label would be a guess. `not_ok`, `abnormal`, `NG` and the like are defects.
- The splits are called as in TRAIN and TEST. Images directly in train are good.
- A mask lies in a folder of the defect's name below a folder called as in MASKS, or directly there, or in a folder
  called so inside the defect's folder, or in one called DEFECT_mask beside it, or beside its image. It is called like
  its image, with or without an affix: NAME, NAME_mask, NAME-mask, NAME_gt, NAME_label, mask_NAME, ... A folder called
  like the image holds its masks, which add up (MVTec LOCO).
"""

import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
TRAIN = ("train", "training")
TEST = ("test", "testing")
NORMAL = ("good", "goods", "ok", "okay", "normal", "normals", "nominal", "fine", "pass", "passed", "healthy",
          "defectfree", "nodefect", "nodefects", "anomalyfree", "noanomaly", "faultfree")
MASKS = ("groundtruth", "gt", "mask", "masks", "label", "labels", "annotation", "annotations")

_DEFECTIVE_WORDS = {"not", "no", "non", "un", "ng", "nok", "bad", "ko", "defective", "defect"}
_LIKE_NORMAL = ("io", "gut", "negative", "negatives", "neg", "true", "clean", "perfect", "correct")
_STRONG_MASKS = ("groundtruth", "gt", "mask", "masks")  # no defect is called so; one may be called label
_AFFIX = "masks?|gt|labels?|seg|segmentation|ground[ _-]?truth|annotations?"
_JUNK = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Sample:
    """One image of a data set, not yet read."""

    image: Path
    mask: Path | None  # a file, or a folder of several; None: of a good image, or not known
    label: int  # 0 good, 1 defective
    cls: str
    defect: str  # kind of defect, as the data set calls it; "good" for every good image
    dataset: str


class Notes:
    """What is odd in a data set, but no reason to refuse it: each kind with its count and where it was seen."""

    SHOWN = 3  # places that a line names

    def __init__(self):
        self.kinds = {}  # kind -> [(count, place)], in the order in which they were found

    def add(self, kind, place, count=1):
        """count: how many of this kind are in this place."""
        self.kinds.setdefault(kind, []).append((count, str(place)))

    def add_files(self, kind, folder, paths):
        """All these files or folders, which lie in `folder`, are of this kind; nothing if there are none."""
        if paths:
            self.add(kind, f"{folder}: {len(paths)}, first {paths[0].name}", len(paths))

    def extend(self, other):
        """Take over what another has."""
        for kind, seen in other.kinds.items():
            self.kinds.setdefault(kind, []).extend(seen)

    def lines(self):
        """One line for each kind, for instance "masks without an image: 3 (nut/hole: 2, first 7.png; ...)"."""
        lines = []
        for kind, seen in self.kinds.items():
            total = sum(count for count, _ in seen)
            places = "; ".join(place for _, place in seen[: self.SHOWN])
            if len(seen) > self.SHOWN:
                places += f"; and {len(seen) - self.SHOWN} more places"
            lines.append(f"{kind}: {total} ({places})")
        return lines


# ------------------------------------------------------------------------------- what names mean


def is_normal(folder):
    """Whether a folder's name says that its images are good.

    Raises `UsageError` if it looks like it without being a known name: labels must not be guessed.
    """
    name = folder.name.lower()
    plain = _plain(name)
    if plain in NORMAL:
        return True
    words = re.findall("[a-z]+", name)
    like = plain in _LIKE_NORMAL
    for word in words:
        like = like or word in ("ok", "okay", "nominal", "passed")
        like = like or word.startswith(("good", "normal"))
    if like and not _DEFECTIVE_WORDS & set(words):
        raise UsageError(f"{folder}: the name looks like good images, but is none of those known "
                         "(good, ok, normal, ...): rename it to good, or to what the defect is")
    return False


def _plain(name):
    """A name without case and separators: "Defect-Free" -> "defectfree"."""
    return re.sub(r"[\W_]+", "", name.lower())


def _without_affix(stem):
    """The name of the image whose mask is called so, "000_mask" or "mask_000" -> "000"; None without an affix."""
    found = re.fullmatch(f"(.+?)[ ._-]+(?:{_AFFIX})|(?:{_AFFIX})[ ._-]+(.+)", stem, re.IGNORECASE)
    if not found:
        return None
    return found[1] or found[2]


def folders(folder):
    """The folders in a folder, sorted; none if it does not exist."""
    if folder is None or not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=_name)


def images_in(folder, notes=None):
    """The image files in a folder, sorted; none if it does not exist. What else lies there is noted."""
    if folder is None or not folder.is_dir():
        return []
    paths = sorted(folder.iterdir(), key=_name)
    paths = [path for path in paths if not path.name.startswith(".")]
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and _is_file(path)]
    if notes is not None:
        known = set(images)
        files, deeper = [], []
        for path in paths:
            if path.is_dir() and _plain(path.name) not in MASKS:
                deeper.append(path)
            elif path not in known and not path.is_dir() and path.name.lower() not in _JUNK:
                files.append(path)
        notes.add_files("files left out, no images by their suffix", folder, files)
        notes.add_files("folders left out, images are expected directly above", folder, deeper)
    return images


def _is_file(path):
    """Whether it is a file, or a link to nothing: a picture that is missing, which reading will say."""
    return path.is_file() or path.is_symlink() and not path.exists()


def _name(path):
    return path.name


def _child(folder, names):
    """The folder in `folder` that is called like one of the plain names; None if there is none. Raises `UsageError` if
    there are two."""
    found = [path for path in folders(folder) if _plain(path.name) in names]
    if len(found) > 1:
        raise UsageError(f"{folder} has both {found[0].name} and {found[1].name}: put their images into one of them")
    return found[0] if found else None


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
    more = ", ..." if len(names) > 8 else ""
    return f"{folder} with {', '.join(names[:8])}{more}"


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


# ------------------------------------------------------------------------------- where a data set lies


@dataclass
class Source:
    """A data set that was found: its classes can be listed before any of them is read."""

    name: str
    folder: Path
    readers: dict[str, Callable]  # class -> function of (cls, dataset, notes), returns (train, test)
    reading: str  # how the folder is understood, in a few words
    notes: Notes = field(default_factory=Notes)
    benchmark: Benchmark | None = None


def parts_of(name):
    """The data sets joined in a name; a folder may have a + in its own."""
    return [name] if os.path.isdir(name) else name.split("+")


def find(part, root):
    """Find the data set called `part`. Returns a `Source`. Raises `UsageError` if it is not there."""
    if part in BENCHMARKS:
        return _find_benchmark(part, root)
    if part == "synth":
        from common import synth  # here, since nobody else needs the drawing code

        is_drawing = (root / synth.MARKER).is_file()
        return _own(root if is_drawing else synth.ensure(root))
    for folder in (Path(part), root / part):
        if part and os.path.isdir(folder):
            return _own(folder)
    known = ", ".join(BENCHMARKS)
    raise UsageError(f"--data: '{part}' is neither a folder nor one of synth, {known}")


def _find_benchmark(name, root):
    """Look for a benchmark below `root`, one folder deeper (as archives unpack), and in `root` itself."""
    benchmark = BENCHMARKS[name]
    candidates = []
    for folder in _called(benchmark.folders, root):
        candidates += [folder, *_called(benchmark.folders, folder)]
    for folder in (*candidates, root):
        notes = Notes()
        if name == "visa":
            readers = _open_visa(folder, notes)
        elif name == "realiad":
            readers = _open_realiad(folder)
        else:
            readers = _open_classes(folder, notes, masks_demanded=True)
        # Any folder in MVTec layout would do otherwise, for instance MVTec AD where BTAD is looked for.
        if readers.keys() & benchmark.counts.keys():
            return Source(name, folder, readers, benchmark.title, notes, benchmark)
    found = " and ".join(contents(folder) for folder in candidates or [root])
    raise UsageError(
        f"--data {name}: {benchmark.title} not found; expected {root / benchmark.folders[0]} (or "
        f"{', '.join(benchmark.folders[1:])}) with {benchmark.inside}; found {found}. "
        f"Get it from {benchmark.source} and unpack it there, or name the folder with --data-root")


def _called(names, folder):
    """The folders in `folder` that have one of the names, in any case; in the order of the names."""
    below = {path.name.lower(): path for path in folders(folder)}
    return [below[name] for name in names if name in below]


def _own(folder):
    """A folder of somebody's own, in whichever layout. Returns a `Source`; raises `UsageError` if none fits."""
    name, cls, notes = name_of(folder), _class_of(folder), Notes()
    readers = _open_classes(folder, notes)
    if readers:
        return Source(name, folder, readers, "CLASS/train and CLASS/test", notes)
    if _child(folder, TRAIN) or _child(folder, TEST):
        readers = {cls: partial(_read_class, folder, False)}
        return Source(name, folder, readers, "one class: train and test")
    if any(is_normal(path) for path in folders(folder)):
        readers = {cls: partial(_read_good, folder)}
        return Source(name, folder, readers, "one class: a folder of good images")
    if images_in(folder):
        readers = {cls: partial(_read_good, folder)}
        return Source(name, folder, readers, "one class: all images directly in it are good")
    notes = Notes()  # without those of the layout that did not fit
    for path in folders(folder):
        if images_in(path) or any(is_normal(below) for below in folders(path)):
            readers[path.name] = partial(_read_good, path)
        else:
            _note_left_out(path, notes)
    if readers:
        return Source(name, folder, readers, "CLASS/good, or good images directly in CLASS", notes)
    raise UsageError(f"--data {folder}: no class in it; expected CLASS/train/good and "
                     f"CLASS/test/DEFECT, or good images only in CLASS; found {contents(folder)}")


def _class_of(folder):
    """What the only class of a folder is called: nut/train/good holds nuts."""
    for name in reversed(Path(os.path.abspath(folder)).parts):
        if _plain(name) not in (*NORMAL, *TRAIN, ""):
            return name
    return name_of(folder)


def _note_left_out(path, notes):
    notes.add("folders left out, they are no class", f"{path}: neither train nor test in it")


# ------------------------------------------------------------------------------- MVTec layout


def _open_classes(folder, notes, masks_demanded=False):
    """MVTec layout. Returns {class: reader}."""
    readers = {}
    for path in folders(folder):
        if _child(path, TRAIN) or _child(path, TEST):
            readers[path.name] = partial(_read_class, path, masks_demanded)
        else:
            _note_left_out(path, notes)
    return readers


def _read_class(folder, masks_demanded, cls, dataset, notes):
    """One class in MVTec layout. Returns (train, test)."""
    train = _good_samples(_training_images(folder, notes), cls, dataset)
    test = []
    home = _child(folder, TEST)
    _note_loose(home, notes)
    finder = _MaskFinder(folder, home, notes)
    for path in finder.kinds:
        images = images_in(path, notes)
        images, beside = _split_masks(images, notes)
        if is_normal(path):
            test += _good_samples(images, cls, dataset)
            continue
        masks = finder.masks_of(path, images, beside)
        for image in images:
            sample = Sample(image, masks.get(image.stem), 1, cls, path.name, dataset)
            test.append(sample)
        lacking = [image for image in images if image.stem not in masks]
        if lacking:
            line = f"{path}: {len(lacking)} of {len(images)}, first {lacking[0].name}"
            if masks_demanded:
                expected = folder / "ground_truth" / path.name / f"{lacking[0].stem}_mask.png"
                raise UsageError(f"defective images without a mask: {line}; expected {expected}; "
                                 "unpack the data set again")
            notes.add("defective test images without a mask", line, len(lacking))
    finder.note_unused()
    for path in folders(folder):
        if _plain(path.name) not in (*TRAIN, *TEST, *MASKS):
            images = images_in(path)
            for below in folders(path):
                images += images_in(below)
            notes.add_files("images left out, neither in train nor in test", path, images)
    return train, test


def _good_samples(images, cls, dataset):
    """Good images as samples."""
    return [Sample(image, None, 0, cls, "good", dataset) for image in images]


def _training_images(folder, notes):
    """The good training images of a class in MVTec layout."""
    home = _child(folder, TRAIN)
    if not folders(home):
        images, _ = _split_masks(images_in(home, notes), notes)
        return images
    _note_loose(home, notes)
    images = []
    for path in folders(home):
        if is_normal(path):
            found, _ = _split_masks(images_in(path, notes), notes)
            images += found
        else:
            kind = "training images left out, their folder is not called good"
            notes.add_files(kind, path, images_in(path))
    return images


def _note_loose(home, notes):
    """Note images that lie beside the folders which would tell their label."""
    notes.add_files("images left out, no folder tells their label", home, images_in(home))


def _read_good(folder, cls, dataset, notes):
    """A class of training images only: in good folders, or else directly in `folder`. Returns (train, [])."""
    images, others = [], []
    for path in folders(folder):
        if is_normal(path):
            images += images_in(path, notes)
        else:
            others += images_in(path)
    loose = images_in(folder)
    if images:
        others += loose
    else:
        images, _ = _split_masks(loose, notes)
    notes.add_files("images left out, not in a good folder", folder, others)
    return _good_samples(images, cls, dataset), []


# ------------------------------------------------------------------------------- masks


def _split_masks(images, notes):
    """Image files of one folder -> (images, masks among them): NAME_mask.png beside NAME.png is a mask."""
    stems = {image.stem for image in images}
    masks = [image for image in images if _without_affix(image.stem) in stems]
    if masks:
        notes.add_files("masks found beside their images", masks[0].parent, masks)
        images = [image for image in images if _without_affix(image.stem) not in stems]
    return images, masks


class _MaskFinder:
    """The masks of one class in MVTec layout: which files they are, and which images they belong to."""

    def __init__(self, folder, test, notes):
        self.notes = notes
        self.homes = [path for path in folders(folder) if _plain(path.name) in MASKS]
        self.homes += [path for path in folders(test) if _plain(path.name) in _STRONG_MASKS]
        names = {path.name for path in folders(test)}
        self.kinds = []  # folders of test images
        self.siblings = {}  # name of a defect -> the folder DEFECT_mask beside it
        for path in folders(test):
            base = _without_affix(path.name)
            if base in names and _plain(path.name).endswith(_STRONG_MASKS):
                self.siblings[base] = path
            elif path not in self.homes:
                self.kinds.append(path)
        self.flat = []  # masks directly in a home, which any defect may claim
        for home in self.homes:
            self.flat += images_in(home)
        stems = Counter()  # how many kinds of defects have an image of this name
        for path in self.kinds:
            if not is_normal(path):
                stems.update({image.stem for image in images_in(path)})
        self.ambiguous = {stem for stem, times in stems.items() if times > 1}
        self.claimed = set()

    def masks_of(self, defect, images, beside):
        """The masks of the images of one defect's folder: {stem of the image: file or folder}."""
        stems = Counter(image.stem for image in images)
        sharing = [image for image in images if stems[image.stem] > 1]
        self.notes.add_files("images that share a name, and so a mask", defect, sharing)
        masks = {}
        own = list(beside)
        for place in self._places(defect):
            own += _masks_in(place, self.notes)
        unused = [mask for mask in own if not self._claim(mask, stems, masks)]
        if unused:
            self.notes.add_files("masks without an image", unused[0].parent, unused)
        for mask in self.flat:
            if _image_of(mask, stems) not in self.ambiguous and self._claim(mask, stems, masks):
                self.claimed.add(mask)
        return masks

    def _places(self, defect):
        """The folders that hold masks of this defect and of no other."""
        places = [path for path in folders(defect) if _plain(path.name) in MASKS]
        for home in self.homes:
            places += [path for path in folders(home) if path.name.lower() == defect.name.lower()]
        if defect.name in self.siblings:
            places.append(self.siblings[defect.name])
        return places

    def _claim(self, mask, stems, masks):
        """Enter a mask under its image's stem. Returns False if there is no such image."""
        stem = _image_of(mask, stems)
        if stem is None:
            return False
        first = masks.setdefault(stem, mask)
        if first != mask:
            kind = "masks left out, their image has another one"
            self.notes.add(kind, f"{mask}, used is {first.name}")
        return True

    def note_unused(self):
        """Note the masks that no image of the class has claimed."""
        unused = [mask for mask in self.flat if mask not in self.claimed]
        if unused:
            kind = "masks without an image, or with several of its name"
            self.notes.add_files(kind, unused[0].parent, unused)
        known = {path.name.lower() for path in self.kinds}
        for home in self.homes:
            for path in folders(home):
                if path.name.lower() not in known and _plain(path.name) not in NORMAL:
                    place = f"{path}: no folder of this name in test"
                    self.notes.add("mask folders without images", place)


def _image_of(mask, stems):
    """The stem among `stems` that a mask belongs to: its own, or its own without an affix; None if there is none."""
    stem = mask.name if mask.is_dir() else mask.stem
    if stem in stems:
        return stem
    base = _without_affix(stem)
    return base if base in stems else None


def _masks_in(place, notes):
    """The masks in a folder: image files, and folders which are called like an image and hold its masks."""
    masks = images_in(place)
    for path in folders(place):
        if images_in(path, notes):
            masks.append(path)
    return masks


# ------------------------------------------------------------------------------- lists


def _open_visa(folder, notes):
    """VisA as its authors pack it (csv), or as their script prepares it. Returns {class: reader}."""
    split_file = folder / "split_csv" / "1cls.csv"
    if not split_file.is_file():
        prepared = folder / "1cls"
        home = prepared if prepared.is_dir() else folder
        return _open_classes(home, notes, masks_demanded=True)
    entries = defaultdict(list)
    with open(split_file, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        lacking = {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ())
        if lacking:
            raise UsageError(f"{split_file}: no column '{min(lacking)}'; unpack the data set again")
        for row in _rows(rows):
            if not _sound(row):
                raise UsageError(f"{split_file}: line {rows.line_num} is damaged; "
                                 "unpack the data set again")
            mask = folder / row["mask"] if row["mask"] else None
            defect = "good" if row["label"] == "normal" else "bad"
            entry = row["split"], defect, folder / row["image"], mask
            entries[row["object"]].append(entry)
    return {cls: partial(_read_list, split_file, entries[cls]) for cls in entries}


def _rows(rows):
    """The lines of a table; one that the csv module cannot take apart is empty."""
    try:
        yield from rows
    except csv.Error:  # a stray quote swallows the lines after it
        yield dict.fromkeys(rows.fieldnames)


def _sound(row):
    """Whether a line of VisA's list says what it must; a class is a folder's name."""
    split_known = row["split"] in ("train", "test")
    label_known = row["label"] in ("normal", "anomaly")
    named = row["image"] and row["object"] and Path(row["object"]).name == row["object"]
    return split_known and label_known and named


def _open_realiad(folder):
    """Real-IAD: one json a class. Returns {class: reader}."""
    images = folder
    for name in ("realiad_256", "realiad_512", "realiad_1024"):  # the largest comes last
        if (folder / name).is_dir():
            images = folder / name
    jsons = folder / "realiad_jsons"
    above = folder.parent / "realiad_jsons"  # where the user named a folder of one resolution
    for place in (jsons, jsons / "realiad_jsons", images, folder, above):
        lists = [path for path in sorted(place.glob("*.json")) if path.stem in _REALIAD_CLASSES]
        if lists:  # other programs' lists lie there too
            return {path.stem: partial(_read_json, path, images / path.stem) for path in lists}
    return {}


def _read_json(path, folder, cls, dataset, notes):
    """One class of Real-IAD. path: its json; folder: of its images. Returns (train, test)."""
    entries = []
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "test"):
            for entry in lists[split]:
                defect = str(entry["anomaly_class"])
                if defect == "OK":
                    defect = "good"
                mask = folder / entry["mask_path"] if entry.get("mask_path") else None
                entries.append((split, defect, folder / entry["image_path"], mask))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a list of Real-IAD ({error!r}); "
                         "unpack the data set again") from error
    return _read_list(path, entries, cls, dataset, notes)


def _read_list(path, entries, cls, dataset, notes):
    """One class out of a list. path: of the list; entries: (split, defect, image, mask). Returns (train, test)."""
    once = list(dict.fromkeys(entries))
    if len(once) < len(entries):
        number = len(entries) - len(once)
        kind = "entries that a list holds twice, the copies left out"
        notes.add(kind, f"{path.name}, {cls}: {number}", number)
    files = [file for _, _, image, mask in once for file in (image, mask) if file]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"{path}: {len(missing)} of {len(files)} files listed for {cls} are missing "
                         f"(first: {missing[0]}); unpack the data set again, or leave the class out "
                         "with --classes")
    samples = {"train": [], "test": []}
    for split, defect, image, mask in sorted(once, key=_kind_and_path):
        good = defect == "good"
        sample = Sample(image, None if good else mask, int(not good), cls, defect, dataset)
        samples[split].append(sample)
    train = [sample for sample in samples["train"] if not sample.label]
    both = {sample.image for sample in train} & {sample.image for sample in samples["test"]}
    if both:
        raise UsageError(f"{path}: {cls} lists {min(both)} for training and for testing; "
                         "unpack the data set again")
    defective = [sample.image for sample in samples["train"] if sample.label]
    lacking = [sample.image for sample in samples["test"] if sample.label and not sample.mask]
    place = f"{path.name}, {cls}"
    notes.add_files("training images left out, they are defective", place, defective)
    notes.add_files("defective test images without a mask", place, lacking)
    return train, samples["test"]


def _kind_and_path(entry):
    """What the entries of a list are sorted by."""
    _, defect, image, _ = entry
    return defect, str(image)
