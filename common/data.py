"""The data sets: first an index of paths and labels (`load`), later pixels (`Images`).

    ds = data.load("mvtec", root)            # Dataset: .train and .test, lists of Sample; .classes; .problems; .reading
    data.check(ds)                           # looks at every file, before hours are spent on the good ones
    depths = data.depths(ds.train)           # {class: value that becomes white}, for images of more than 8 bits
    images = data.Images(ds.test, size=224, depths=depths)   # images[i]: uint8 (3, 224, 224); images.mask(i): bool
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
| a path    | itself                                             | MVTec layout; of one class: train and test; or good|
|           |                                                    | images only: CLS/good, CLS, or the folder itself   |

The root may also be the data set itself, and `a+b` joins several. Nothing is ever downloaded.

What counts as what (names of folders and masks: `common/layouts.py`):
- Labels come from the folder, csv or json, never from a mask. Training takes good images only.
- Raised as `UsageError`, since no honest number could follow: a data set that is not there, a class without training
  images, or without test images unless the caller can do without, a folder of which one cannot tell whether its images
  are good, files that a csv or json lists but that are missing, an image in both splits; and in `mvtec`, `visa`
  (prepared form) and `btad`, whose every defect has a mask, a defective image without one. By `check`: unreadable,
  truncated or oversized images, masks of another size than their image.
- Noted in `Dataset.problems`, since the run remains meaningful: one line for each kind, with count and places. For
  instance defective images without a mask (in Real-IAD, in VisA's csv and in a folder of one's own; `Sample.mask` is
  None), masks without an image or with nothing in them, images and folders left out, test images that are copies of
  training images, a class whose test images are all good or all defective, counts that differ from the published ones.
- Pixels: every mode becomes 8-bit RGB. Grey is repeated; more than 8 bits are scaled by one rule per class, see
  `depths`; transparency is dropped and the colour below it kept, as in the pipelines we compare with. The EXIF
  orientation is ignored: masks are drawn on the pixels as stored, and inspection cameras do not turn.
- Masks: a pixel is defective if it is > 0 (VisA's masks hold 1, 2, 3, ...). In a palette image its colour counts, not
  its index, and a transparent pixel is not defective.
"""

import argparse
import hashlib
import os
import shutil
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import UsageError, corruptions, files, layouts, options
from common.files import read_image, read_mask
from common.folder import read_json, short_name
from common.layouts import BENCHMARKS, Sample

MASK_RULES = ("half", "nearest", "any")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB
LARGE = 25_000_000  # pixels from which decoding takes longer than everything else


@dataclass
class Dataset:
    """An index: what there is to train and to test on. Sorted, so the same on every machine."""

    name: str
    root: Path  # its folder; of a joined set the folder that holds them all
    train: list[Sample] = field(default_factory=list)  # good images only
    test: list[Sample] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)  # data-set name -> its classes; one entry unless joined
    problems: list[str] = field(default_factory=list)  # one line for each kind
    reading: str = ""  # one line: how the folders were understood


# ------------------------------------------------------------------------------------------------- index


def image_files(path):
    """The image files at and below a path, sorted; the path itself if it is a file, whatever its suffix.

    Each folder is visited once, though links may lead to it again. Returns a list of Path, empty if there are none.
    Raises `UsageError` if there is no such path.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    return _files_below(path, set())


def pictures_of(paths):
    """The image files of --predict, for each of its paths: a list of lists, see `image_files`.

    Raises `UsageError` if one of the paths does not exist, or none of them holds an image.
    """
    found = [image_files(path) for path in paths]
    if not any(found):
        names = " ".join(str(path) for path in paths)
        raise UsageError(f"--predict {names}: no images found")
    return found


def _files_below(folder, seen):
    """The image files of a folder and those below it; seen: the real paths of the folders visited so far.

    The folder of a run below it is left out: its pictures are no pictures of products.
    """
    real = os.path.realpath(folder)
    if real in seen:
        return []
    seen.add(real)
    found = layouts.images_in(folder)
    for below in layouts.folders(folder):
        if not is_of_a_run(below):
            found += _files_below(below, seen)
    return found


def is_of_a_run(folder):
    """Whether a run of ours has written the folder."""
    try:
        return "method" in read_json(folder / "args.json")
    except UsageError:
        return False


def load(name, root=None, classes=None, need_test=True):
    """The index of a data set: every path and label, checked, no pixel read.

    name: `synth`, `mvtec`, `visa`, `btad`, `realiad`, a folder (also relative to `root`), or several of these joined
    with `+`. root: where the data sets lie; default `$AD_DATA`, else `data`. classes: take only these; names, or one
    string of names with commas between them (a name may hold commas itself). need_test: refuse a class without test
    images; otherwise `Dataset.test` may be empty.
    Of joined sets, classes of equal name are renamed DATASET-CLASS; all others keep their names. Folders of equal name
    are called by the folder above, too: a/x+b/x gives a-x and b-x.

    Returns a `Dataset`. Raises `UsageError` as the module's docstring says; unknown classes too.
    """
    root = Path(root or os.environ.get("AD_DATA") or "data")
    parts = layouts.parts_of(name)
    notes = layouts.Notes()
    try:
        sources = [layouts.find(part, root) for part in parts]
        _tell_apart(name, sources)
        unique = _unique_names(sources)
        chosen = _chosen(classes, list(unique.values()), name)
        dataset = Dataset("+".join(source.name for source in sources), root)
        above = {source.folder.absolute().parent for source in sources}
        if len(sources) == 1:
            dataset.root = sources[0].folder
        elif len(above) == 1:
            dataset.root = above.pop()
        for source in sources:
            _add_source(dataset, source, unique, chosen, need_test, notes)
        _note_copies(dataset, notes)
        _check_names(dataset.classes)
    except OSError as error:
        reason = f"cannot read {error.filename}: {error.strerror}"
        raise UsageError(f"--data {name}: {reason}") from error
    dataset.problems = notes.lines()
    dataset.reading = "; ".join(_reading(dataset, source) for source in sources)
    return dataset


def _tell_apart(name, sources):
    """Give sources of equal name the name of the folder above, too. Raises `UsageError` if they are the same."""
    times = Counter(source.name for source in sources)
    for equal in [name for name in times if times[name] > 1]:
        group = [source for source in sources if source.name == equal]
        if len({source.folder.resolve() for source in group}) < len(group):
            raise UsageError(f"--data {name}: the same data set twice; name each once")
        places = [Path(os.path.abspath(source.folder)).parts[1:] for source in group]  # without the root
        depth = 2
        while len({place[-depth:] for place in places}) < len(places):
            depth += 1
        for source, place in zip(group, places):
            if source.benchmark is None:
                source.name = "-".join(place[-depth:])


def _unique_names(sources):
    """{(source, class): the class's name}, with its source before it where several sources have a class so called."""
    pairs = [(source.name, cls) for source in sources for cls in source.readers]
    times = Counter(cls for _, cls in pairs)
    unique = {}
    for source_name, cls in pairs:
        unique[source_name, cls] = f"{source_name}-{cls}" if times[cls] > 1 else cls
    for name, number in Counter(unique.values()).items():
        if number > 1:
            raise UsageError(f"--data: joined, {number} classes would be called '{name}': "
                             "rename one of their folders")
    return unique


def _chosen(classes, known, name):
    """The set of the classes that the user wants, None for all; a comma may be part of a name or part two names.

    The longest known name wins: with classes `a`, `b` and `a,b`, "a,b" is the last and "b,a" the first two.
    """
    if not classes:
        return None
    text = classes if isinstance(classes, str) else ",".join(classes)
    pieces = text.split(",")
    chosen = set()
    while pieces:
        for length in range(len(pieces), 0, -1):
            candidate = ",".join(pieces[:length]).strip()
            if candidate in known or not candidate:
                break
        else:
            raise UsageError(f"--classes: no class '{candidate}' in {name}; "
                             f"known: {', '.join(known)}")
        if candidate:
            chosen.add(candidate)
        pieces = pieces[length:]
    if not chosen:
        raise UsageError(f"--classes {text}: names no class; known: {', '.join(known)}")
    return chosen


def _add_source(dataset, source, unique, chosen, need_test, notes):
    """Read the classes of a source, or those chosen, into the data set under their unique names."""
    bar = tqdm(sorted(source.readers), f"index {source.name}", delay=2, leave=False, disable=None)
    for cls in bar:
        name = unique[source.name, cls]
        if chosen is None or name in chosen:
            _add_class(dataset, source, cls, name, need_test, notes)
    notes.extend(source.notes)
    if source.benchmark and chosen is None:
        _check_total(dataset, source, notes)


def _add_class(dataset, source, cls, unique, need_test, notes):
    """Read the class `cls` of the source, check it, and add it to the data set under its unique name."""
    train, test = source.readers[cls](unique, source.name, notes)
    if not train:
        raise UsageError(f"{source.folder}: class '{cls}' has no good training images (in MVTec "
                         f"layout: {cls}/train/good); add some, or leave the class out with --classes")
    if need_test and not test:
        raise UsageError(f"{source.folder}: class '{cls}' has no test images (in MVTec layout: "
                         f"{cls}/test/good and {cls}/test/DEFECT); add some, or leave the class out "
                         "with --classes")
    defective = sum(sample.label for sample in test)
    counts = len(train), len(test) - defective, defective
    if test and not counts[1]:
        notes.add("classes without a good test image, whose image metrics are undefined", unique)
    if test and not counts[2]:
        notes.add("classes without a defective test image, whose metrics are undefined", unique)
    if source.benchmark:
        _check_counts(source.benchmark, cls, unique, counts, notes)
    dataset.train += train
    dataset.test += test
    dataset.classes.append(unique)
    dataset.groups.setdefault(source.name, []).append(unique)


def _check_counts(benchmark, cls, unique, counts, notes):
    """Note a class of a benchmark that is unknown or has not the published size."""
    if cls not in benchmark.counts:
        notes.add(f"classes that {benchmark.title} does not have", unique)
        return
    published = benchmark.counts[cls]
    if published not in (None, counts):
        notes.add(f"classes that differ from {benchmark.title}",
                  f"{unique} has {_counts(counts)} instead of {_counts(published)}")


def _check_total(dataset, source, notes):
    """Note a benchmark that lacks classes, or has not the published size as a whole."""
    name, benchmark = source.name, source.benchmark
    known = set(dataset.groups[name])
    absent = [cls for cls in benchmark.counts if not {cls, f"{name}-{cls}"} & known]
    if absent:
        notes.add(f"classes of {benchmark.title} that are missing", ", ".join(absent), len(absent))
    training = sum(sample.dataset == name for sample in dataset.train)
    labels = [sample.label for sample in dataset.test if sample.dataset == name]
    counts = training, labels.count(0), labels.count(1)
    if counts != benchmark.total:
        notes.add("data sets that have not the published size",
                  f"{name} has {_counts(counts)} instead of {_counts(benchmark.total)}")


def _counts(counts):
    return "{} training, {} good and {} defective test images".format(*counts)


def _reading(dataset, source):
    """How the folder of a source was understood, for instance "read nut as one class: train and test (nut): 40 ...".

    The user shall see at once when a folder of somebody's own was taken for something else than it is.
    """
    classes = dataset.groups.get(source.name, [])
    train = [sample for sample in dataset.train if sample.dataset == source.name]
    test = [sample for sample in dataset.test if sample.dataset == source.name]
    defective = sum(sample.label for sample in test)
    names = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    counts = f"{len(train)} good images to train on"
    if test:
        counts += f", {len(test) - defective} good and {defective} defective to test on"
    else:
        counts += ", none to test on"
    return f"{source.folder} read as {source.reading}; classes: {len(classes)} ({names}); {counts}"


def _check_names(classes):
    """Raises `UsageError` for a class whose name is too long for the files of a run that are called by it."""
    for name in classes:
        if short_name(name) != name:
            raise UsageError(f"class '{name[:40]}...': the name of its folder is too long for a run's files; rename it")


def _note_copies(dataset, notes):
    """Note test images that are copies of training images: same content, whatever the name."""
    train = [sample.image for sample in dataset.train]
    test = [sample.image for sample in dataset.test]
    # Each mark costs more than the one before, and is asked only of what the one before could not tell apart.
    for mark in (_length, _sample_of_content, _digest):
        marks = {path: mark(path) for path in {*train, *test}}
        shared = {marks[path] for path in train} & {marks[path] for path in test}
        train = [path for path in train if marks[path] in shared]
        test = [path for path in test if marks[path] in shared]
    if not test:
        return
    original = {marks[path]: path for path in train}
    copies = defaultdict(list)
    for sample in dataset.test:
        if sample.image in marks and marks[sample.image] in original:
            copies[sample.cls].append(sample.image)
    for cls, paths in copies.items():
        pair = f"{paths[0]} is {original[marks[paths[0]]]}"
        kind = "test images that are copies of training images"
        notes.add(kind, f"{cls}: {len(paths)}, first {pair}", len(paths))


def _length(path):
    """The bytes of a file; for an empty one, which is a copy of nothing, something of its own."""
    return os.path.getsize(path) or path


def _sample_of_content(path):
    """Length and three pieces of a file."""
    length = os.path.getsize(path)
    pieces = []
    with open(path, "rb") as file:
        for place in (0, length // 2, max(0, length - 4096)):
            file.seek(place)
            pieces.append(file.read(4096))
    return length, *pieces


def _digest(path):
    """A hash of the whole file."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            content.update(piece)
    return content.digest()


# ------------------------------------------------------------------------------------------------- pixels


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
    read. depths: by class, see `depths`; without it, or for a class that it does not know while its classes disagree,
    an image of more than 8 bits is scaled by its own largest value. memory_share: see `preload`. mask_rule: see
    `resize_mask`. workers: threads of `preload`, 0 for one per core. progress: show a bar (none in any case when stderr
    is no terminal).

    Reading raises `UsageError` that names the file. Works in DataLoader workers, forked or spawned.
    """

    def __init__(self, samples, size, corrupt=None, memory_share=0.5, mask_rule="half", workers=0,
                 progress=True, depths=None):
        self.samples, self.size, self.corrupt = samples, size, corrupt
        self.memory_share, self.mask_rule = memory_share, mask_rule
        self.workers, self.progress = workers, progress
        self.depths = depths or {}
        self._pixels = None  # uint8 (N, 3, size, size) once preloaded
        self._vanished = set()
        self._states = ()

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
        width, height = files.inspect(sample.image)["size"]
        if mask.shape != (height, width):
            raise UsageError(_sizes_differ(sample, (width, height), mask.shape[::-1]))
        resized = resize_mask(mask, self.size, self.mask_rule)
        if not resized.any():
            self._vanished.add(i)
        return torch.from_numpy(resized)

    def identity(self):
        """What decides the pixels, for `cache`: list of files' states and of the rules by which they are read; None if
        a file is so new that it may change without a new time, or gone.

        The files are asked once, before the first of them is decoded by `preload`: a file that changes in between is
        then kept under a state that it no longer has.
        """
        if self._states == ():
            self._states = states([sample.image for sample in self.samples])
        if self._states is None:
            return None
        tops = [self._top(sample.cls) for sample in self.samples]
        return [self.size, self.corrupt, tops, self._states]

    def preload(self):
        """Decode everything once, into memory that processes share, so that no epoch decodes again.

        Only if it fits into `memory_share` of the memory that is free now (divided among the processes of a torchrun);
        otherwise each access decodes. `cached` says which.
        """
        shape = (len(self.samples), 3, self.size, self.size)
        need = int(np.prod(shape))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.identity()
        if self.cached or need > self.memory_share * free_memory() / processes:
            return
        pixels = torch.empty(shape, dtype=torch.uint8)
        # Containers often have a tiny /dev/shm, and overfilling it kills the process. Forked workers share anyway.
        if not os.path.isdir("/dev/shm") or need < shutil.disk_usage("/dev/shm").free:
            pixels.share_memory_()
        numbers = range(len(self))
        decoded = _in_threads(self._decode, numbers, "read images", self.progress, self.workers)
        for i, image in enumerate(decoded):
            pixels[i].numpy()[:] = image
        self._pixels = pixels

    def _top(self, cls):
        """The value that becomes white in this class's images of more than 8 bits; None if that is not known."""
        if cls in self.depths:
            return self.depths[cls]
        known = {top for top in self.depths.values() if top is not None}
        return known.pop() if len(known) == 1 else None

    def _decode(self, i):
        """Image i from its file: uint8 array (3, size, size)."""
        sample = self.samples[i]
        image = read_image(sample.image, self._top(sample.cls))
        if self.corrupt:
            # The prefix that a joined data set may have given the class must not change the noise.
            cls = sample.cls.removeprefix(f"{sample.dataset}-")
            seed = zlib.crc32(f"{cls}/{sample.defect}/{sample.image.name}".encode())
            image = corruptions.corrupt(image, *self.corrupt, seed=seed)
        resized = resize_image(image, self.size)
        return np.ascontiguousarray(resized.transpose(2, 0, 1))  # (S, S, 3) -> (3, S, S)


def states(paths):
    """[path, `files.state`] of each file; None if one is gone or was written just now."""
    found = []
    for path in paths:
        state = files.state(path)
        if state is None:
            return None
        found.append([os.path.abspath(path), *state])
    return found


def free_memory():
    """Bytes that can be taken without swapping, as far as the system tells. (A container's own limit is not seen.)"""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # macOS: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


# ------------------------------------------------------------------------------------------------- check


def check(dataset, progress=True):
    """Look at every image and mask, a quarter of a millisecond each, before any time is spent on training.

    Headers are read, masks decoded, and files that seem to lack their end; what was found is remembered (see
    `files.Memory`). progress: show a bar.

    Returns the problem lines that were found, also appended to `dataset.problems`: masks in which nothing is marked,
    several pages, large images, ... Raises `UsageError` that names the files if any cannot be used.
    """
    _, faults, notes = scan(dataset, progress)
    if faults:
        message = faults[0]
        if len(faults) > 1:
            message += f" (and {len(faults) - 1} more files; python -m common.data names them all)"
        raise UsageError(message)
    lines = notes.lines()
    dataset.problems += [line for line in lines if line not in dataset.problems]
    return lines


def scan(dataset, progress=True):
    """Look at every image and mask.

    Returns ({class: Counter of (width, height)}, one line for each file that cannot be used, other `Notes`).
    """
    memory = files.Memory(dataset.name)
    samples = dataset.train + dataset.test
    facts, faults, notes = [], [], layouts.Notes()
    for found in _in_threads(partial(_facts, memory), samples, "check files", progress):
        facts.append(found)
    memory.save()
    sizes = defaultdict(Counter)
    for sample, (image, masks, fault) in zip(samples, facts):
        if image:
            sizes[sample.cls][tuple(image["size"])] += 1
        if fault:
            faults.append(fault)
        else:
            _note_facts(sample, image, masks, notes)
    return sizes, faults, notes


def _facts(memory, sample):
    """The facts about a sample's image, its masks (a list), and what is wrong with them, "" if nothing."""
    image, masks = None, []
    try:
        image = memory.recall(sample.image, "image", files.inspect)
        for path in _mask_files(sample):
            mask = memory.recall(path, "mask", partial(files.inspect, kind="mask"))
            if mask["size"] != image["size"]:
                return image, masks, _sizes_differ(sample, image["size"], mask["size"])
            masks.append(mask)
    except UsageError as error:
        return image, masks, str(error)
    return image, masks, ""


def _mask_files(sample):
    """The files that make up a sample's mask."""
    if sample.mask is None:
        return []
    if sample.mask.is_dir():
        return layouts.images_in(sample.mask)
    return [sample.mask]


def _sizes_differ(sample, image_size, mask_size):
    return ("the mask {} is {}x{}, but its image {} is {}x{}; they must have the same size"
            .format(sample.mask, *mask_size, sample.image, *image_size))


def _note_facts(sample, image, masks, notes):
    """Note what is odd about a sample's files."""
    width, height = image["size"]
    place = f"{sample.cls}: {sample.image.name}"
    if width * height > LARGE:
        notes.add(f"images of more than {LARGE // 10**6} megapixels, slow to decode (shrink them once)",
                  f"{place}, {width}x{height}")
    if image["frames"] > 1:
        notes.add("files of several pages or frames, of which only the first is used",
                  f"{place}, {image['frames']} pages")
    if image["narrowed"]:
        notes.add("16-bit colour images, of which only the upper 8 bits are used", place)
    if not masks:
        return
    marks = {mask["marks"] for mask in masks}
    mask_place = f"{sample.cls}: {sample.mask}"
    if any(mask["frames"] > 1 for mask in masks):
        notes.add("masks of several pages, of which only the first is used", mask_place)
    if any(mask["narrowed"] for mask in masks):
        notes.add("masks in 16-bit colour, in which values below 256 count as 0", mask_place)
    if marks == {"none"}:
        notes.add("masks that mark nothing, though their images are defective", mask_place)
    elif "some" not in marks:
        notes.add("masks whose shape is only in the transparency, so that they mark nothing", mask_place)
    if "JPEG" in {mask["format"] for mask in masks}:
        notes.add("masks in JPEG, whose smeared edges count as defect too", mask_place)


def _in_threads(function, items, title, progress, workers=0):
    """Yield function(item) of each item, in order, computed in threads. Whoever stops listening stops the threads."""
    pool = ThreadPoolExecutor(workers or options.cores())  # threads: Pillow decodes without the GIL
    try:
        results = pool.map(function, items)
        yield from tqdm(results, title, len(items), delay=1, disable=None if progress else True)
    finally:
        pool.shutdown(cancel_futures=True)


def depths(samples, progress=True):
    """By which value the grey images of more than 8 bits are scaled, one rule for each class.

    A 16-bit file may hold 8, 10, 12, 14 or 16 bits, a float 0..1 or 0..255, and only the images tell: the largest value
    of all of a class decides (`files.range_of`). Take training images: what is found belongs to the trained model, and
    is used at test and prediction, where larger values are clipped.

    samples: list of `Sample`. Returns {class: 1, 255, 1023, 4095, 16383 or 65535; None where all images have 8 bits},
    to be kept in the checkpoint and given to `Images`. Raises `UsageError` for files that cannot be read.
    """
    memory = files.Memory("depths-" + "+".join(sorted({sample.dataset for sample in samples})))
    paths = [sample.image for sample in samples]
    recall = partial(memory.recall, kind="depth", look=_depth)
    largest = _in_threads(recall, paths, "read depths", progress)
    tops = {sample.cls: None for sample in samples}
    for sample, facts in zip(samples, largest):
        if facts["largest"] is not None:
            top = files.range_of(facts["largest"])
            tops[sample.cls] = max(top, tops[sample.cls] or 0)
    memory.save()
    return tops


def _depth(path):
    """{"largest": the largest grey value of an image of more than 8 bits, else None}"""
    if files.is_deep(files.mode_of(path)):
        return {"largest": files.largest_value(path)}
    return {"largest": None}


def depth_line(depths):
    """What `depths` found, in one line for the user; "" if all images have 8 bits."""
    scaled = [f"{cls} 0..{top}" for cls, top in depths.items() if top is not None]
    if not scaled:
        return ""
    return ("grey values of more than 8 bits, scaled by what the training images hold: "
            + ", ".join(scaled))


# ------------------------------------------------------------------------------- python -m common.data


def summary(dataset):
    """The table of `python -m common.data`, as text, problems included. Looks at every file."""
    sizes, faults, notes = scan(dataset)
    rows = [("class", "train", "test good", "test defective", "masks", "size")]
    for cls in dataset.classes:
        rows.append(_row(dataset, cls, sizes[cls]))
    columns = list(zip(*rows[1:]))
    rows.append(("all", *(sum(column) for column in columns[1:5]), ""))
    widths = []
    for column in zip(*rows):
        widths.append(max(len(str(cell)) for cell in column))
    lines = [dataset.reading]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row[1:5], widths[1:5])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[5]]).rstrip())
    problems = dataset.problems + notes.lines() + faults
    lines += [f"problem: {line}" for line in problems] or ["no problems found"]
    return "\n".join(lines)


def _row(dataset, cls, sizes):
    """One class in the table: name, numbers of images and masks, smallest and largest size."""
    training = sum(sample.cls == cls for sample in dataset.train)
    test = [sample for sample in dataset.test if sample.cls == cls]
    defective = sum(sample.label for sample in test)
    masks = sum(sample.mask is not None for sample in test)
    names = [f"{width}x{height}" for width, height in sorted(sizes)]
    size = " to ".join(names if len(names) < 2 else [names[0], names[-1]])
    if len(names) > 2:
        size += f" ({len(names)} sizes)"
    return cls, training, len(test) - defective, defective, masks, size


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.data",
                                     description="What is in a data set, and what is wrong.")
    parser.add_argument("name", help=f"synth, {', '.join(BENCHMARKS)}, several joined with +, or a folder")
    parser.add_argument("--data-root", metavar="DIR",
                        help="where the data sets lie (default: $AD_DATA, else data)")
    parser.add_argument("--classes", metavar="A,B", help="only these classes")
    args = parser.parse_args(argv)
    try:
        print(summary(load(args.name, args.data_root, args.classes, need_test=False)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    options.exit_with(main)
