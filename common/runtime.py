"""What every run needs and no method is about: options, device, processes, seeds, checkpoints, the log.

A script uses it in this order:

    args = runtime.parse(Args, PRESETS, __doc__)      # dataclass -> command line; presets; values of a run to resume
    run = runtime.start(args, method="onenip")        # device, torchrun; refuses to overwrite a finished run
    ...                                               # data and weights: what may fail, fails before anything is written
    run.open(args)                                    # output folder, args.json
    for step in range(first, steps):
        run.seed(args.seed, step)                     # all randomness of a step follows from (seed, step, rank) ...
        ...                                           # ... so a resumed run is the uninterrupted run, bit for bit
        run.save(state)                               # atomically; torch.load(weights_only=True) reads it

and `runtime.launch(main)` ends the program: a user's mistake is one line on stderr and exit status 2.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import UsageError, corruptions

BENCHMARKS = ("mvtec", "visa", "btad", "realiad")  # data sets whose default preset is the paper's


# ------------------------------------------------------------------------------------------------------- options


def option(default, help, *, group="run", choices=None, low=None, high=None, nargs=None):
    """A dataclass field that is also a command-line option: default, one line of help, allowed values or range."""
    metadata = dict(help=help, group=group, choices=choices, low=low, high=high, nargs=nargs)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Options:
    """The options that all four scripts share; a script's own `Args` inherits them and adds the method's."""

    data: str = option("synth", "synth, mvtec, visa, btad, realiad, several joined with +, or a folder in MVTec layout",
                       group="data")
    data_root: str = option("", "where the data sets lie (default: $AD_DATA, else data/)", group="data")
    classes: str = option("", "only these classes, separated by commas", group="data")
    corrupt: str = option("", "evaluate under a shift: brightness, contrast, defocus_blur or gaussian_noise, "
                              "with :SEVERITY 1 to 5 (default 3)", group="data")
    shift: str = option("", "after the clean test images, the same under all four shifts: all at severity 3, curve at 1 "
                            "to 5, drawn as curves", group="data", choices=("", "all", "curve"))
    mask_rule: str = option("half", "masks are resized by: bilinear, then > 0.5 (half), nearest, or bilinear, then > 0 (any)",
                            group="data", choices=("half", "nearest", "any"))
    memory_share: float = option(0.5, "share of the free memory that decoded images and frozen features may take",
                                 group="data", low=0.0, high=1.0)
    preset: str = option("", "laptop or paper (default: paper for mvtec, visa, btad and realiad, else laptop)",
                         choices=("", "laptop", "paper"))
    out: str = option("", "folder of the run (default: runs/<script>-<data>)")
    overwrite: bool = option(False, "replace what --out holds")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    eval: str = option("", "no training: evaluate this checkpoint")
    predict: list = option([], "no training: score these images or folders with --eval CKPT", nargs="+")
    save_maps: bool = option(False, "keep the anomaly maps and pooled features, maps/<class>.npz and maps/train/")
    seed: int = option(0, "seed of everything random", low=0)
    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    workers: int = option(0, "processes that prepare batches", low=0)
    amp: str = option("off", "bf16: mixed precision in bfloat16; auto: where the processor computes in it",
                      choices=("off", "auto", "bf16"))
    kernels: str = option("auto", "attention and cosine map by Triton or by plain PyTorch (auto: Triton on a GPU)",
                          choices=("auto", "triton", "torch"))
    log_every: int = option(50, "steps between two lines of log.jsonl", low=1)
    checkpoint_every: int = option(500, "steps between two checkpoints", low=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not the whole usage
        raise UsageError(f"{message} (--help explains every option)")


def parse(Args, presets, description, argv=None):
    """The command line -> Args. Precedence: given > (values of the run to resume or checkpoint to evaluate) > preset
    > the default in `Args`.

    Args:
        Args: dataclass that inherits Options; every field made by `option`.
        presets: {"laptop": {field: value}, "paper": {...}}.
        description: the script's docstring; its first line heads --help.
    Raises:
        UsageError: unknown option, wrong type, value out of range, contradicting options.
    """
    fields = {f.name: f for f in dataclasses.fields(Args)}
    parser = _Parser(description=description.strip().split("\n")[0], allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {}
    for f in fields.values():
        m = f.metadata
        group = groups.setdefault(m["group"], parser.add_argument_group(m["group"]))
        flag, default = "--" + f.name.replace("_", "-"), f.default
        if default is dataclasses.MISSING:
            default = f.default_factory()
        in_presets = any(f.name in values for values in presets.values()) and ", ".join(
            f"{preset}: {values.get(f.name, default)}" for preset, values in presets.items())
        shown = in_presets or ("" if default in ("", []) or "default" in m["help"] else f"default: {default}")
        text = m["help"].replace("%", "%%") + (f" ({shown})" if shown else "")
        kind = dict(default=argparse.SUPPRESS, help=text, dest=f.name)
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **kind)
        elif m["nargs"]:
            group.add_argument(flag, nargs=m["nargs"], metavar="PATH", **kind)
        else:
            group.add_argument(flag, type=f.type, choices=m["choices"],
                               metavar=None if m["choices"] else f.type.__name__.upper(), **kind)
    given = vars(parser.parse_args(argv))

    if given.get("predict") and not given.get("eval"):
        raise UsageError("--predict needs --eval CHECKPOINT: the trained model to score with")
    if given.get("resume") and (given.get("eval") or given.get("overwrite")):
        raise UsageError("--resume goes with neither --eval nor --overwrite")
    method = Path(sys.argv[0]).stem or "run"
    saved = {}
    if given.get("eval"):
        saved = {k: v for k, v in load_checkpoint(given["eval"])["args"].items() if k in fields}
        for name in ("out", "overwrite", "resume", "corrupt", "shift", "save_maps", "device", "workers", "data_root", "predict"):
            saved.pop(name, None)  # these belong to the run, not to the model
        given.setdefault("out", _default_out(method, {**saved, **given}) +
                         ("-predict" if given.get("predict") else "-eval") +
                         ("-" + given["corrupt"].replace(":", "-") if given.get("corrupt") else ""))
    given.setdefault("out", _default_out(method, given))
    if given.get("resume"):
        saved = _args_to_resume(Path(given["out"]), given, fields)
    data = given.get("data", saved.get("data", fields["data"].default))
    preset = given.get("preset") or saved.get("preset") or default_preset(data)
    args = Args(**{**presets.get(preset, {}), **saved, **given, "preset": preset})

    for f in fields.values():
        value, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, float) and not math.isfinite(value) or (low is not None and value < low) or (
                high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UsageError(f"--{f.name.replace('_', '-')} {value}: must be {allowed} (--help explains every option)")
    if args.shift and (args.corrupt or args.predict):
        raise UsageError("--shift goes with neither --corrupt nor --predict")
    if args.corrupt:
        corruptions.parse(args.corrupt)  # a wrong name must not show only after the training
    return args


def default_preset(data):
    """paper for the four benchmarks (or several of them joined), laptop for everything else."""
    return "paper" if all(part in BENCHMARKS for part in data.split("+")) else "laptop"


def _default_out(method, values):
    data = values.get("data", "synth")
    return str(Path("runs") / f"{method}-{Path(data).resolve().name if os.sep in data or data == '.' else data}")


def _args_to_resume(out, given, fields):
    """The options of the interrupted run in `out`; those given again must not contradict them."""
    path = out / "args.json"
    if not path.is_file():
        raise UsageError(f"--resume: {out} holds no run (no args.json); leave --resume out to start one")
    saved = {k: v for k, v in json.loads(path.read_text()).items() if k in fields}
    free = {"resume", "out", "device", "workers", "data_root", "save_maps", "shift", "log_every", "checkpoint_every"}
    for name, value in given.items():
        if name not in free and name in saved and saved[name] != value:
            raise UsageError(f"--resume: {out} was started with --{name.replace('_', '-')} {saved[name]}, not {value}; "
                             f"leave it out, or choose another --out")
    return {k: v for k, v in saved.items() if k not in ("resume", "overwrite")}


# ----------------------------------------------------------------------------------------------------------- run


@dataclass
class Run:
    """One process of a run: where it computes, which share is its own, where it writes (rank 0 only)."""

    method: str
    out: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    amp: str = "off"

    @property
    def main(self):
        return self.rank == 0

    def say(self, text=""):
        if self.main:
            print(text, flush=True)

    def progress(self, iterable, desc, total=None, initial=0):
        """A tqdm bar on stderr, silent when stderr is no terminal and on all ranks but the first."""
        return tqdm(iterable, desc=desc, total=total, initial=initial, leave=False, dynamic_ncols=True,
                    disable=None if self.main else True)

    def seed(self, *numbers):
        """Seed torch from (numbers..., rank): stateless, so no generator state needs to be saved."""
        torch.manual_seed(int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1, np.uint64)[0] >> 1))

    def autocast(self):
        enabled = self.amp == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def to_device(self, tensor):
        """Host -> device without waiting (the loader pins its batches when there is a GPU)."""
        return tensor.to(self.device, non_blocking=True)

    def loader(self, dataset, batches, workers):
        """DataLoader over an explicit list of index lists: what is drawn depends on the step, never on who draws it."""
        return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                           pin_memory=self.device.type == "cuda", persistent_workers=workers > 0)

    def positions(self, first, steps, batch_size):
        """Yield the index lists of steps first..steps-1 for this rank. Together the ranks' lists of one step are the
        list that a single process with `world` times the batch size would draw."""
        for step in range(first, steps):
            start = (step * self.world + self.rank) * batch_size
            yield list(range(start, start + batch_size))

    def in_turn(self, function):
        """function() on rank 0 first, then on the others: the first may download or draw what the others find."""
        if not self.main:
            dist.barrier()
        result = function()
        if self.main and self.world > 1:
            dist.barrier()
        return result

    def open(self, args):
        """Make the output folder and write args.json; with --overwrite, drop the files of the run before."""
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            if args.overwrite:
                for name in ("metrics.json", "log.jsonl", "scores.csv", "predictions.csv", "checkpoint.pt"):
                    if not (args.eval and Path(args.eval).resolve() == (self.out / name).resolve()):
                        (self.out / name).unlink(missing_ok=True)
                for kept in (self.out / "maps").rglob("*.npz"):  # of another model: --base-run would believe them
                    kept.unlink()
            if not args.resume:
                write_atomic(self.out / "args.json", (json.dumps(as_dict(args), indent=1) + "\n").encode())
        if self.world > 1:
            dist.barrier()

    def log(self, record):
        """Append one JSON line to log.jsonl."""
        if self.main:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")

    def rewind_log(self, step):
        """Drop the lines after `step`: the resumed run writes them again."""
        path = self.out / "log.jsonl"
        if self.main and path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomic(path, "".join(line + "\n" for line in lines).encode())

    def save(self, state, name="checkpoint.pt"):
        """Write a checkpoint atomically: a crash or a full disk leaves the one before it intact."""
        if self.main:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(self.out / name, buffer.getbuffer())
        if self.world > 1:
            dist.barrier()

    def wrap(self, model):
        """(model, wrapped): with several processes the batch norms see all of a step (on GPUs), and what `wrapped`
        computes has its gradients averaged; with one process both are the model itself."""
        if self.world == 1:
            return model, model
        if self.device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model, torch.nn.parallel.DistributedDataParallel(model)

    def checkpoint(self, args):
        """With --resume, the newest checkpoint in --out; None where there is none."""
        path = self.out / "checkpoint.pt"
        return load_checkpoint(path, self.method) if args.resume and path.is_file() else None

    def restore(self, before, model, optimizer):
        """Load the checkpoint `before` (None: a new training) and cut the log there. Returns (steps done, seconds)."""
        done, seconds = 0, 0.0
        if before:
            load_model(model, before["model"], self.out / "checkpoint.pt")
            optimizer.load_state_dict(before["optimizer"])
            done, seconds = before["step"], before["seconds"]
        self.rewind_log(done)
        return done, seconds

    def keep(self, args, done, steps, bad, record, state):
        """After `done` of `steps` training steps: a line of the log every --log-every steps and at the end, a checkpoint
        every --checkpoint-every steps (the script itself saves the last one, with what only a finished run has).

        Args:
            bad: device flag that became true when a loss was not finite; it is looked at just before it would be kept.
            record, state: called to get the line, and the checkpoint; to read a loss is a sync, so it is done rarely.
        """
        log, save = done % args.log_every == 0 or done == steps, done % args.checkpoint_every == 0 and done < steps
        if log or save:
            self.check_finite(bad, done)
        if log:
            self.log({"step": done, **record()})
        if save:
            self.save(state())

    def gather(self, items):
        """Concatenate every rank's list, in rank order, on all ranks (small objects only: scores, names)."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def mean(self, values):
        """{name: scalar tensor} -> {name: float}, averaged over the ranks (reading them is a sync: do it rarely)."""
        stacked = torch.stack([value.detach().float() for value in values.values()])  # (len(values),)
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist()))

    def check_finite(self, bad, step):
        """`bad`: device flag that became true when a loss was not finite (looked at rarely: reading it is a sync)."""
        if self.world > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            kept = "the checkpoint before it is kept" if (self.out / "checkpoint.pt").is_file() else "nothing was saved"
            raise UsageError(f"the loss became NaN or infinite by step {step}; {kept}: try a lower --lr or --amp off")


def _step_of(line):
    try:
        return json.loads(line).get("step", 0)
    except json.JSONDecodeError:  # the line that was being written when the run died
        return math.inf


def start(args, method):
    """Device, process group and output folder of a run.

    Refuses a folder that holds a finished run (or an interrupted one, unless --resume) without --overwrite.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or auto")
    if args.kernels == "triton" and not use_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError("--kernels triton: Triton kernels need a CUDA device; use --kernels auto, or torch")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
    amp = args.amp if args.amp != "auto" else "bf16" if _has_bf16(device) else "off"
    run = Run(method, Path(args.out), device, rank, world, amp)
    if run.main:
        _refuse_to_overwrite(run.out, args)
    return run


def _has_bf16(device):
    """Whether bfloat16 is computed in hardware (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _refuse_to_overwrite(out, args):
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    finished, begun = out / "metrics.json", out / "args.json"
    if not (args.overwrite or args.resume) and (finished.is_file() or begun.is_file()):
        state = "a finished run" if finished.is_file() else "an interrupted run (--resume goes on with it)"
        raise UsageError(f"--out {out} holds {state}; --overwrite replaces it, --out DIR writes elsewhere")


as_dict = dataclasses.asdict


def load_checkpoint(path, method=None):
    """Read a checkpoint (weights only: no code is run) on the CPU.

    Raises:
        UsageError: missing, unreadable, or not a checkpoint of `method`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise UsageError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or not {"method", "args", "model"} <= state.keys():
        raise UsageError(f"{path}: not a checkpoint of these scripts (method, args or model is missing)")
    if method and state["method"] != method:
        raise UsageError(f"{path}: a checkpoint of {state['method']}.py, not of {method}.py")
    return state


def load_model(model, state, path):
    """Strict loading; a mismatch is the user's mistake of naming another checkpoint or other model options."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise UsageError(f"{path}: does not fit this model: {first[:200]}") from None


def write_atomic(path, data):
    """Bytes -> file, all or nothing: a temporary sibling is written, synced and renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """Every training image once an epoch, in random order."""
    return np.random.default_rng([seed, 1, epoch]).permutation(n)


class Stream(torch.utils.data.Dataset):
    """Sample number k of the endless training stream. Of each epoch the images that do not fill a step are dropped.

    Everything is a function of (seed, k): the loader's processes, the number of GPUs and interruptions change nothing.
    """

    def __init__(self, images, seed, images_per_step, whole_images):
        self.images, self.seed, self.whole_images = images, seed, whole_images
        self.per_epoch = len(images) // images_per_step * images_per_step or len(images)

    def index(self, k):
        """Which image is number k."""
        epoch, place = divmod(k, self.per_epoch)
        return int(epoch_order(self.seed, epoch, len(self.images))[place])

    def __getitem__(self, k):
        index = self.index(k)
        # without memory for all frozen features they are computed from the images, step by step
        return {"index": index, "image": self.images[index]} if self.whole_images else {"index": index}


def lr_factor(step, steps, schedule, drop=0.1):
    """constant: 1. step: 1, then `drop` after 80 % of the steps. cosine: linear warm-up over the first 5 %, then half a
    cosine to 0."""
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 1.0 if step < 0.8 * steps else drop
    warm = max(1, round(0.05 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def precompute(run, function, images, batch_size, memory_share, desc="frozen features"):
    """function(batch) of every image, computed once.

    Args:
        function: (B, 3, S, S) uint8 on the device -> (B, ...) tensor; deterministic (a frozen network).
        images: indexable, images[i] -> (3, S, S) uint8.
        memory_share: of the free memory; results that would take more are not kept.
    Returns:
        (N, ...) tensor in host memory, or None when it would not fit.
    """
    from common.data import free_memory
    result = None
    for first in run.progress(range(0, len(images), batch_size), desc):
        batch = torch.stack([images[i] for i in range(first, min(first + batch_size, len(images)))])
        values = function(batch.to(run.device)).cpu()
        if result is None:
            if len(images) * values[0].numel() * values.element_size() * run.world > memory_share * free_memory():
                return None
            result = torch.empty(len(images), *values.shape[1:], dtype=values.dtype)
        result[first:first + len(values)] = values
    return result


def environment():
    """Versions and machine, for metrics.json."""
    from importlib.metadata import PackageNotFoundError, version
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "triton", "numpy", "scipy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return found


def commit():
    """Short hash of the checkout that the scripts lie in, with '+' when it has changes; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Stopwatch:
    """Seconds since it was made, plus those of earlier sessions of the same run."""

    def __init__(self, before=0.0):
        self.start = time.monotonic() - before

    def __call__(self):
        return time.monotonic() - self.start


def launch(main):
    """Run main() and end as a command should: a user's mistake is one line on stderr and status 2, no traceback."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # one line, without the source code
    prefix = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        main()
        return
    except UsageError as error:
        # An error inside a loader process arrives with its traceback as text; the message is the last line of it.
        message, status = str(error).strip().split("\n")[-1].removeprefix("common.UsageError: "), 2
    except torch.OutOfMemoryError:
        message, status = "the GPU ran out of memory: lower --batch-size or --image-size", 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        message, status = f"{error.filename or 'output'}: {error.strerror}; nothing that was saved is lost", 2
    except KeyboardInterrupt:
        message, status = "interrupted; --resume goes on from the last checkpoint", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{prefix}{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
