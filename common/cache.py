"""Frozen features kept on disk beside their data set, so that a second run starts at once.

    folder = cache.Folder(dataset.root)              # DATA/.features
    entry = folder.entry("frozen features", [what, decides, them])
    if not entry.read(rows, first):                  # True: `rows` is filled, bit for bit as computed
        ...                                          # compute `rows`
        entry.write(rows)

An entry is a file named by a hash of all that decides its content: a line of JSON (format, dtype,
shape, checksum), then the raw numbers, so that no code is run by reading it. A folder that cannot be
written keeps nothing, and says nothing. The oldest entries go first when there are too many bytes;
nothing but our own files is ever deleted.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from pathlib import Path

import torch

from common import options
from common.folder import temporary_beside

NAME = ".features"
MAGIC = "anomaly-detection features 1"
LIMIT = 4 * 2**30  # bytes of all entries of a data set
SHARE = 0.1  # of the disk's free space (entries counted as free) that they may take
PIECE = 2**24  # bytes that are checked and written at once


class Folder:
    """The entries of one data set."""

    def __init__(self, root):
        self.path = Path(root) / NAME

    def entry(self, title, parts):
        """The entry of what `parts`, which JSON must know, decide; title: its name in messages."""
        key = hashlib.sha256(json.dumps([MAGIC, title, parts]).encode()).hexdigest()[:32]
        return Entry(self, title, key)

    def has_room(self, size):
        """Whether an entry of `size` bytes may be written; the oldest ones are deleted for it."""
        entries = []
        for path in self.path.glob("*.rows"):
            with contextlib.suppress(OSError):  # another process was faster
                status = path.stat()
                if _is_ours(path):
                    entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(length for _, length, _ in entries)
        limit = min(LIMIT, SHARE * (shutil.disk_usage(self.path).free + total))
        if size > limit:
            return False
        for _, length, path in sorted(entries):
            if total + size > limit:
                path.unlink(missing_ok=True)
                total -= length
        return True


class Entry:
    """One file of a `Folder`."""

    def __init__(self, folder, title, key):
        self.folder, self.title = folder, title
        self.path = folder.path / f"{key}.rows"

    def read(self, rows, first):
        """Fill `rows` from the file. Returns whether that worked; if not, `rows` may hold anything.

        A file that is damaged, or that holds other numbers than were computed for the first images
        just now, is not used, and a line on stderr says so.

        Args:
            rows: (N, ...) contiguous tensor on the CPU.
            first: (n, ...), what was computed for the first n <= N; on the CPU.
        """
        try:
            with open(self.path, "rb") as file:
                reason = _fill(rows, file)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False
        except OSError as error:
            reason = error.strerror
        if not reason and not torch.equal(_bytes(rows[: len(first)]), _bytes(first)):
            reason = "is of another machine or version"
        if reason:
            if os.environ.get("RANK", "0") == "0":
                options.tell(f"{self.path} {reason}; the {self.title} are computed anew")
            return False
        with contextlib.suppress(OSError):
            os.utime(self.path)  # used just now: others go first
        return True

    def write(self, rows):
        """Keep `rows`, a contiguous tensor on the CPU, if there is room; all or nothing, silently."""
        content = _bytes(rows)
        temporary = temporary_beside(self.path)
        with contextlib.suppress(OSError):
            self.folder.path.mkdir(exist_ok=True)
            _sweep(self.folder.path)
            if not self.folder.has_room(len(content)):
                return
            header = {"format": MAGIC, **_form(rows), "crc32": _checksum(content)}
            with open(temporary, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                for piece in content.split(PIECE):
                    file.write(piece.numpy())
            os.replace(temporary, self.path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # of a disk that is full


def _form(rows):
    return {"dtype": str(rows.dtype), "shape": list(rows.shape)}


def _bytes(rows):
    """A tensor's bytes, uint8 (size,), without a copy if it is contiguous."""
    return rows.contiguous().flatten().view(torch.uint8)


def _fill(rows, file):
    """Read an opened entry into `rows`. Returns what is wrong with it, "" if nothing."""
    try:
        header = json.loads(file.readline(4096))
        expected = {"format": MAGIC, **_form(rows), "crc32": header["crc32"]}
    except (ValueError, TypeError, KeyError):
        return "is damaged, or no file of ours"
    if header != expected:
        return "is of another form"
    content = _bytes(rows)
    if file.readinto(content.numpy()) < len(content) or file.read(1):
        return "has not the length it should have"
    if _checksum(content) != header["crc32"]:
        return "is damaged"
    return ""


def _checksum(content):
    """CRC-32 of bytes, uint8 (size,)."""
    checksum = 0
    for piece in content.split(PIECE):
        checksum = zlib.crc32(piece.numpy(), checksum)
    return checksum


def _is_ours(path):
    with open(path, "rb") as file:
        return MAGIC.encode() in file.readline(4096)


def _sweep(folder):
    """Delete what killed processes left half written."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may sweep, too
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
