"""The folder of a run, --out: one run at a time writes there, and everything in it is of that run.

    folder.refuse(out, args)     # early: UsageError if `out` holds what must not be replaced
    folder.take(out, args)       # before the first file: claimed for this process, and emptied
    folder.kept()                # when the run ends early: what is left, and how to go on

A folder is a run's if args.json lies in it. Its run is finished once one of RESULTS is there, each
written last and at once; else it can be resumed from its checkpoint.pt; and if it has none, nothing
in it is worth keeping, so that the next run (mostly the same command, put right) takes the folder
over. Nothing heavy is imported here.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from common import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

RESULTS = ("metrics.json", "threshold.json", "predictions.csv")
FILES = (
    "args.json",
    "log.jsonl",
    "checkpoint.pt",
    *RESULTS,
    "scores.csv",
    "calibration.json",
    "run.html",
    "predictions.html",
    "predictions.part.csv",
)
FOLDERS = ("pictures", "maps", "masks")
LOCK = ".lock"

_claimed = {}  # folder -> its open lock file; the system drops the lock when this process ends
_taken = []  # the folder that this process's run writes to


def refuse(out, args):
    """Whether a run with these options may have the folder.

    Raises:
        UsageError: `out` is a file; holds files of our names but no run; another process writes
            there; it holds a finished or interrupted run, without --overwrite or --resume; or
            something that an option names lies in it and would be deleted.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.is_symlink() and not out.exists():
        raise UsageError(f"--out {out} is a link to nothing; name another folder")
    if (out / LOCK).is_file():
        _claim(out)
    if args.resume:
        return
    if not (out / "args.json").is_file():
        foreign = [name for name in (*FILES, *FOLDERS) if (out / name).exists()]
        if foreign:
            raise UsageError(
                f"--out {out}: there is {foreign[0]} in it, but no run (no args.json); name a new "
                "folder"
            )
        return
    if not args.overwrite:
        _refuse_to_overwrite(out)
    _refuse_to_delete_inputs(out, args)


def _refuse_to_overwrite(out):
    if is_finished(out):
        found = "a finished run"
    elif (out / "checkpoint.pt").is_file() and _trains(out):
        found = "an interrupted run (--resume goes on with it)"
    else:
        return
    raise UsageError(
        f"--out {out} holds {found}; --overwrite replaces it, --out DIR writes elsewhere"
    )


def _refuse_to_delete_inputs(out, args):
    for name, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if name == "out" or not isinstance(path, str) or not os.path.exists(path):
                continue
            if Path(path).resolve().is_relative_to(out.resolve()):
                raise UsageError(
                    f"--{name.replace('_', '-')} {path} lies in --out {out}, which this run would "
                    "empty; choose another --out"
                )


def _trains(out):
    """Whether the run in the folder is a training, which can be resumed, and no evaluation."""
    try:
        return not read_json(out / "args.json").get("eval")
    except UsageError:
        return True


def is_finished(out):
    """Whether the run in the folder reached its end."""
    return any((out / name).is_file() for name in RESULTS)


def take(out, args):
    """Claim the folder, which is made if need be, for this process until it ends; without --resume
    empty it of the run before.

    Raises:
        UsageError: as `refuse`, for what has changed since.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made: {error.strerror}") from None
    _claim(out)
    refuse(out, args)
    for leftover in out.glob(".*.tmp"):  # of a write that was killed
        leftover.unlink(missing_ok=True)
    if not args.resume:
        _empty(out)
    _taken[:] = [out]


def _claim(out):
    """Raises `UsageError` if another process has claimed the folder."""
    key = out.resolve()
    if key in _claimed:  # to open and close the file again would drop the lock
        return
    file = open(out / LOCK, "ab")
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            raise UsageError(
                f"--out {out}: another run is writing there at this moment; choose another --out"
            ) from None
        # else the file system knows no locks
    _claimed[key] = file


def _lock(file):
    """Lock an open file for this process; its forks do not inherit the lock, and may outlive it."""
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def release():
    """Give up all claims: the process's run has ended."""
    for file in _claimed.values():
        file.close()
    _claimed.clear()
    _taken.clear()


def _empty(out):
    """Delete what a run has written; anything else in the folder stays. args.json, by which it is a
    run's folder, goes last: so whoever interrupts this can ask again."""
    for name in FOLDERS:
        path = out / name
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    for name in reversed(FILES):
        (out / name).unlink(missing_ok=True)


def holds(path):
    """Whether a file lies in the folder that this process's run writes to."""
    if not _taken or not isinstance(path, (str, os.PathLike)):
        return False
    return Path(path).absolute().is_relative_to(_taken[0].absolute())


def kept():
    """What a run that ends now leaves behind, and how to go on: one sentence, "" before `take`."""
    if not _taken:
        return ""
    out = _taken[0]
    if is_finished(out):
        return f"the results in {out} are complete"
    if (out / "checkpoint.pt").is_file() and _trains(out):
        return f"the training is kept in {out / 'checkpoint.pt'}: --resume --out {out} goes on"
    part = out / "predictions.part.csv"
    if part.is_file():
        return f"the scores so far are in {part}; the same command starts anew"
    return "nothing is kept of it; the same command starts anew"


def read_json(path, keys=()):
    """The content of a JSON file, a dict that has these keys.

    Raises:
        UsageError: it is not there, cannot be read, is damaged, or is something else.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: it is no JSON object")
    missing = [key for key in keys if key not in found]
    if missing:
        raise UsageError(f"{path} is damaged, or something else: it has no {missing[0]}")
    return found


def check_place(path):
    """Raises UsageError if no file can be written there: who needs minutes for its content asks first."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


LONGEST = 200  # bytes of a name that is made from another one; file systems mostly allow 255


def short_name(name):
    """The name, or, if it is too long for what is added to it, its start and a digest of all."""
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST:
        return name
    digest = hashlib.sha1(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST - 9].decode(errors='ignore')}-{digest}"


def temporary_beside(path):
    """A new hidden sibling, in which a file is written until it is whole. The name is drawn: in two
    containers that share a folder two processes may have one number."""
    return path.with_name(f".{short_name(path.name)}.{secrets.token_hex(4)}.tmp")


def write_atomic(path, content):
    """Bytes -> file, all or nothing: a temporary sibling is written, synced and renamed. An OSError
    names the file itself."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_csv(path, header, rows):
    """A header and rows -> CSV file, all or nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # Bytes that are no UTF-8 in a file name are written as they are.
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def current_commit():
    """Short hash of the checkout that the scripts lie in, with '+' if changed; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    options = {"capture_output": True, "text": True, "check": True}
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **options)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], **options)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
