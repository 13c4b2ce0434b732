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
import os
import shutil
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import UsageError, corruptions, layouts
from common.layouts import BENCHMARKS, Sample

MASK_RULES = ("half", "nearest", "any")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB


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
    files = layouts.images_in(path, [])
    for folder in layouts.folders(path):
        files += image_files(folder)
    return files


def load(name, root=None, classes=None):
    """The index of a data set: every path and label, checked, no pixel read.

    name: `synth`, `mvtec`, `visa`, `btad`, `realiad`, a folder in MVTec layout (also relative to `root`), or several of
    these joined with `+`. root: where the data sets lie; default `$AD_DATA`, else `data`. classes: take only these.
    Of joined sets, classes of equal name are renamed DATASET-CLASS; all others keep their names.

    Returns a `Dataset`. Raises `UsageError` as the module's docstring says; unknown classes too.
    """
    root = Path(root or os.environ.get("AD_DATA") or "data")
    parts = name.split("+")
    if Path(name).is_dir():  # a folder may have a + in its name
        parts = [name]
    try:
        sources = [layouts.find(part, root) for part in parts]
        unique = _unique_names(name, sources)
        unknown = sorted(set(classes or ()) - set(unique.values()))
        if unknown:
            known = ", ".join(unique.values())
            raise UsageError(f"--classes: no class '{unknown[0]}' in {name}; known: {known}")
        dataset = Dataset("+".join(source.name for source in sources), root)
        if len(sources) == 1:
            dataset.root = sources[0].folder
        for source in sources:
            _add_source(dataset, source, unique, classes)
    except OSError as error:
        reason = f"cannot read {error.filename}: {error.strerror}"
        raise UsageError(f"--data {name}: {reason}") from error
    return dataset


def _unique_names(name, sources):
    """{(source, class): the class's name}: with its source before it where several sources have a class of this name.

    name: what the user asked for. Raises `UsageError` if two sources have the same name.
    """
    if len({source.name for source in sources}) < len(sources):
        raise UsageError(f"--data {name}: the same data set twice; name each once")
    pairs = [(source.name, cls) for source in sources for cls in source.readers]
    times = Counter(cls for _, cls in pairs)
    unique = {}
    for source_name, cls in pairs:
        unique[source_name, cls] = f"{source_name}-{cls}" if times[cls] > 1 else cls
    return unique


def _add_source(dataset, source, unique, chosen):
    """Read the classes of a source, or those chosen, into the data set under their unique names."""
    bar = tqdm(sorted(source.readers), f"index {source.name}", delay=2, leave=False, disable=None)
    for cls in bar:
        name = unique[source.name, cls]
        if not chosen or name in chosen:
            _add_class(dataset, source, cls, name)
    dataset.problems += source.problems
    if source.benchmark and not chosen:
        dataset.problems += _check_total(dataset, source)


def _add_class(dataset, source, cls, unique):
    """Read the class `cls` of the source, check it, and add it to the data set under its unique name."""
    train, test, problems = source.readers[cls](unique, source.name)
    if not train:
        raise UsageError(f"{source.folder}: class '{cls}' has no good training images (in MVTec "
                         f"layout: {cls}/train/good); add some, or leave the class out with --classes")
    if not test:
        raise UsageError(f"{source.folder}: class '{cls}' has no test images (in MVTec layout: "
                         f"{cls}/test/good and {cls}/test/DEFECT); add some, or leave the class out "
                         "with --classes")
    defective = sum(sample.label for sample in test)
    counts = len(train), len(test) - defective, defective
    for count, kind in zip(counts[1:], ("good", "defective")):
        if count == 0:
            problems.append(f"{unique}: no {kind} test image, so the image metrics of this class "
                            "are undefined")
    if source.benchmark:
        problems += _check_counts(source.benchmark, cls, unique, counts)
    dataset.train += train
    dataset.test += test
    dataset.classes.append(unique)
    dataset.groups.setdefault(source.name, []).append(unique)
    dataset.problems += problems


def _check_counts(benchmark, cls, unique, counts):
    """Problem lines if a class of a benchmark is unknown or has not the published size."""
    if cls not in benchmark.counts:
        return [f"{unique}: not a class of {benchmark.title}"]
    published = benchmark.counts[cls]
    if published in (None, counts):
        return []
    return [f"{unique}: {_counts(counts)}; {benchmark.title} has {_counts(published)}"]


def _check_total(dataset, source):
    """Problem lines if a whole benchmark has not the published size."""
    name, benchmark = source.name, source.benchmark
    problems = []
    known = set(dataset.groups[name])
    absent = [cls for cls in benchmark.counts if not {cls, f"{name}-{cls}"} & known]
    if absent:
        number = f"{len(absent)} of {len(benchmark.counts)}"
        problems.append(f"{name}: {number} classes are missing: {', '.join(absent)}")
    training = sum(sample.dataset == name for sample in dataset.train)
    labels = [sample.label for sample in dataset.test if sample.dataset == name]
    counts = training, labels.count(0), labels.count(1)
    if counts != benchmark.total:
        published = f"{benchmark.title} has {_counts(benchmark.total)}"
        problems.append(f"{name}: {_counts(counts)} in all; {published}")
    return problems


def _counts(counts):
    return "{} training, {} good and {} defective test images".format(*counts)


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
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
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
        rows.append(_row(dataset, cls, sizes[cls]))
    columns = list(zip(*rows[1:]))
    rows.append(("all", *(sum(column) for column in columns[1:5]), ""))
    widths = []
    for column in zip(*rows):
        widths.append(max(len(str(cell)) for cell in column))
    lines = [f"{dataset.name} in {dataset.root}, classes: {len(dataset.classes)}"]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row[1:5], widths[1:5])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[5]]).rstrip())
    problems = dataset.problems + problems
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
    parser = argparse.ArgumentParser("python -m common.data", description="What is in a data set, and what is wrong.")
    parser.add_argument("name", help=f"synth, {', '.join(BENCHMARKS)}, several joined with +, or a folder")
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
