"""One picture file: its pixels as every method wants them, and what can be told about it in about a millisecond.

    image = files.read_image(path)     # uint8 (H, W, 3), any mode and bit depth
    mask = files.read_mask(path)       # bool (H, W)
    facts = files.inspect(path)        # size, mode, frames, ...: from the header, without decoding, where that suffices
"""

import contextlib
import json
import os
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from common import UsageError, layouts
from common.folder import write_atomic

# An image of more pixels is refused: decoded it takes a gigabyte. (Pillow's own limit has this value too, but neither
# names the file nor says what to do.)
MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None

# Largest values that files of more than 8 bits are meant for: 8, 10, 12, 14 and 16 bits.
RANGES = (255, 1023, 4095, 16383, 65535)

_HEAD = 12  # bytes at the end of a file that are looked at

_FORMAT = 3  # of the facts that are remembered: a higher one where `inspect` says something else

# orientation of a TIFF (its tag 274) -> what undoes Pillow's turning
_UNDONE_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


# ------------------------------------------------------------------------------------------------- pixels


def read_image(path, top=None):
    """The picture in a file at its own resolution: uint8 (H, W, 3), RGB; any mode and bit depth.

    top: of a grey image of more than 8 bits, the value that becomes white, as `data.depths` finds it for a class;
    larger values are clipped. Not given, it follows from the image's own largest value (see `range_of`).

    Raises `UsageError` that names the file if it is missing, damaged, truncated, too large, or has values that are
    negative or beyond 16 bits.
    """
    with _opened(path, "image") as image:
        image = _as_stored(image)
        if is_deep(image.mode):
            values = _deep_values(image)
            if top is None:
                top = range_of(values.max())
            grey = _eight_bits(values, top)
            return np.repeat(grey[..., None], 3, axis=2)  # (H, W) -> (H, W, 3)
        if isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # Pillow warns about the direct way
        return np.array(image.convert("RGB"))


def mode_of(path):
    """Pillow's mode of an image, from its header. Raises as `read_image`."""
    with _opened(path, "image") as image:
        return image.mode


def largest_value(path):
    """The largest value of a grey image of more than 8 bits. Raises as `read_image`."""
    with _opened(path, "image") as image:
        return _deep_values(image).max().item()


def is_deep(mode):
    """Whether images of this mode of Pillow's hold more than 8 bits: 16 or 32 bits (I...), or floats (F)."""
    return mode.startswith("I") or mode == "F"


def range_of(largest):
    """The range that grey values of more than 8 bits are meant for, from the largest of them.

    1 for floats in 0..1, which resizing may have brought a little beyond, otherwise the smallest of RANGES that holds
    it: a 12-bit camera in 16-bit files gives 4095. Raises ValueError beyond 65535 and for NaN.
    """
    if isinstance(largest, (float, np.floating)) and largest < 2:  # floats in 0..255 never end below 2
        return 1
    for top in RANGES:
        if largest <= top:
            return top
    raise ValueError(f"its largest value is {largest}, more than 16 bits")


def _deep_values(image):
    """The grey values of an opened image of more than 8 bits: (H, W) int64, or float32."""
    values = np.asarray(image)
    if image.mode != "F":
        values = values.astype(np.int64)
    if not (values.min() >= 0 and values.max() <= RANGES[-1]):  # so written, NaN is refused too
        raise ValueError(f"its values, {values.min()} to {values.max()}, are not in 0..{RANGES[-1]}")
    return values


def _eight_bits(values, top):
    """Grey values (H, W) of 0..top as uint8; integers lose their last bits, floats are rounded."""
    values = np.minimum(values, top)
    if values.dtype == np.int64:
        surplus = max(0, int(top).bit_length() - 8)
        return (values >> surplus).astype(np.uint8)
    if top != 255:
        values = values * np.float32(255 / top)
    return np.rint(values).astype(np.uint8)


def read_mask(path):
    """A mask at its own resolution: bool (H, W), True where a pixel is > 0 in any channel and not fully transparent.

    path: a file, or a folder of masks, which add up. Raises `UsageError` that names the file if it is missing, damaged,
    truncated, or if the masks of a folder differ in size.
    """
    path = Path(path)
    if not path.is_dir():
        with _opened(path, "mask") as image:
            return _defective(_as_stored(image))
    parts = [read_mask(file) for file in layouts.images_in(path)]
    if len({part.shape for part in parts}) != 1:
        raise UsageError(f"{path}: the masks in it must have one size, that of their image")
    return np.logical_or.reduce(parts)


def _defective(image):
    """The mask (H, W) in an opened file."""
    opaque = image.mode in ("1", "L") and "transparency" not in image.info
    if opaque or is_deep(image.mode):
        return np.asarray(image) > 0
    values = np.asarray(image.convert("RGBA"))  # (H, W, 4)
    return values[..., :3].any(axis=-1) & (values[..., 3] > 0)


def _as_stored(image):
    """An opened image as its pixels lie in the file, whatever orientation it names: so Pillow reads all formats but
    TIFF, which it turns when it decodes."""
    if image.format != "TIFF":
        return image
    undone_by = _UNDONE_BY.get(image.tag_v2.get(274))  # decoding deletes the tag
    return image if undone_by is None else image.transpose(undone_by)


def _stored_size(image):
    """[width, height] of an opened image as it is stored. Some versions of Pillow give a TIFF its turned size."""
    if image.format == "TIFF":
        return [image.tag_v2[256], image.tag_v2[257]]
    return list(image.size)


@contextlib.contextmanager
def _opened(path, kind):
    """A file opened by Pillow; whatever goes wrong inside the `with` becomes a `UsageError` that names the file."""
    try:
        # by its name Pillow would map an uncompressed file into memory, and a TIFF that is turned by a
        # quarter with the wrong width
        with open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} are {width * height / 1e6:.0f} megapixels, more than "
                                 f"{MAX_PIXELS / 1e6:.0f}: shrink it or cut it into tiles")
            yield image
    except UsageError:
        raise
    except Exception as error:  # the decoders raise nearly every type there is
        raise _unreadable(kind, path, error) from error


def _unreadable(kind, path, error):
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        reason = "no such file"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif os.path.isfile(path) and os.path.getsize(path) == 0:
        reason = "the file is empty (zero bytes)"
    elif isinstance(error, UnidentifiedImageError):
        reason = "no image, or of an unknown format"
    return UsageError(f"cannot read the {kind} {path}: {reason}")


# ------------------------------------------------------------------------------------------------- facts


def inspect(path, kind="image"):
    """What the header of a file tells, and whether the file is whole. Raises `UsageError` that names the file.

    Files of more than 8 bits are decoded: only so one learns whether their values can be shown.

    kind: "image", or "mask", which is decoded, since only so one learns whether anything is in it. Returns a dict:
    "size" [width, height], "format", "mode", "frames" (pages), "narrowed" (16-bit colour, of which Pillow keeps 8 bits)
    and, for masks, "marks": "some", "none", or "alpha" if the shape is only in the transparency.
    """
    with _opened(path, kind) as image:
        facts = {
            "size": _stored_size(image),
            "format": image.format,
            "mode": image.mode,
            "frames": getattr(image, "n_frames", 1),
            "narrowed": not is_deep(image.mode) and _raw_bits(image) == 16,
        }
        if kind == "mask":
            facts["marks"] = _marks(image)
        elif is_deep(image.mode):
            _deep_values(image)  # complains of what cannot be shown
        elif _seems_cut(path, image):
            image.load()  # complains if it is
    return facts


def _raw_bits(image):
    """16 if the file holds 16 bits per channel, else 8."""
    if not image.tile:
        return 8
    return 16 if ";16" in str(image.tile[0][3]) else 8


def _marks(image):
    """Whether a mask marks anything: "some", "none", or "alpha" if only its transparency varies."""
    if _defective(image).any():
        return "some"
    if "A" in image.mode or "transparency" in image.info:
        low, high = image.convert("RGBA").getextrema()[3]
        if low != high:
            return "alpha"
    return "none"


def _seems_cut(path, image):
    """Whether a file lacks its end. A cheap look: who is suspected is decoded, and only that can convict."""
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        file.seek(max(0, length - _HEAD))
        tail = file.read()
    if image.format == "PNG":
        return b"IEND" not in tail
    if image.format == "JPEG":
        return b"\xff\xd9" not in tail
    if image.format == "WEBP":
        return length < 8 + int.from_bytes(head[4:8], "little")
    if image.format == "BMP":
        return length < int.from_bytes(head[2:6], "little")
    if image.format == "TIFF":
        return _strips_end(image) > length
    return True  # of other formats only decoding tells


def _strips_end(image):
    """Where the last strip or tile of a TIFF file ends, in bytes."""
    end = 0
    for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
        starts, lengths = image.tag_v2.get(offsets, ()), image.tag_v2.get(counts, ())
        for start, length in zip(starts, lengths):
            end = max(end, start + length)
    return end


def check_archive(path):
    """Read a file of torch.save whole: its parts carry checksums, which torch does not look at.

    Raises:
        ValueError: it is damaged, or no such file. OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")


def state(path):
    """What changes with a file's content: [size, time of writing, time of any change, inode]; None if the file is gone
    or was written a moment ago, when it may change again without a new time.

    Time of writing and size alone do not do: unpackers set the time, and renaming one file over another keeps it.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if time.time_ns() - status.st_mtime_ns < 2e9:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class Memory:
    """Facts about files, remembered from run to run: they hold as long as the file's state does, see `state`.

    They lie in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), in a file per data set. Where that cannot be
    written, or is damaged, everything is simply looked at again.
    """

    def __init__(self, name):
        self.file = _cache_folder() / (re.sub(r"\W+", "_", name) + ".json")
        self.known, self.new = {}, {}
        try:
            known = json.loads(self.file.read_bytes())
            self.known = {key: entry for key, entry in known.items() if isinstance(entry["facts"], dict)}
        except (OSError, ValueError, TypeError, AttributeError, LookupError):
            pass

    def recall(self, path, kind, look):
        """look(path) -> dict, or what it returned when the file was the same. Errors are not remembered."""
        key = f"{_FORMAT} {PIL.__version__} {kind} {os.path.abspath(path)}"
        found = state(path)
        entry = self.known.get(key)
        if found and entry and entry["state"] == found:
            return entry["facts"]
        facts = look(path)
        if found:
            self.new[key] = {"state": found, "facts": facts}
        return facts

    def save(self):
        """Write what is new; silently nothing where there is no place for it."""
        if not self.new:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, json.dumps({**self.known, **self.new}).encode())


def _cache_folder():
    """Where the user's caches lie."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # so the standard: ignore it
        home = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "anomaly-detection"
