"""What every run needs and no method is about: device, processes, seeds, the ledger, checkpoints.

A script uses it in this order:

    args = runtime.parse(Args, PRESETS, __doc__, method="omniad")  # common/options.py
    run = runtime.start(args, "omniad")           # device, threads, torchrun; --out may be used
    state = run.checkpoint_to_evaluate(args)      # --eval; None: a training
    dataset, images = runtime.training_data(run, args)             # every file looked at
    ...                                           # what may fail, fails before a file is written
    run.open(args)                                # output folder, of this run alone; args.json
    ...                                           # train, or load the checkpoint: score, state
    if not dataset.test:                          # a folder of good images only
        return thresholds.without_test_images(run, args, dataset, score, state)

and in its training loop

    job = runtime.Training(run, args, model, optimizer)        # with --resume: as it was
    frozen = runtime.Frozen(run, features, images, args)       # a frozen network's features
    stream = runtime.Stream(images, args.seed, images_per_step, frozen.needs_images)
    for step, batch in job.batches(stream, steps):
        run.seed(args.seed, step)       # all randomness of a step follows from (seed, step, rank),
        ...                             # so a resumed run is the uninterrupted one: on a CPU bit
                                        # for bit, on a GPU but for rounding (cuDNN picks its
                                        # algorithms by timing, atomic sums have no order)
        job.record(loss, parts)
    return job.finish()

`runtime.launch(main)` ends the program: a user's mistake is one line on stderr and exit status 2;
after `run.open` it also says what is kept.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.collate import collate, default_collate_fn_map
from tqdm import tqdm

from common import UsageError, backbones, cache, data, files, folder, options
from common.folder import write_atomic
from common.options import Options, default_preset, option, parse

# those of common.options and common.folder, by one name
__all__ = ["Options", "default_preset", "option", "parse", "write_atomic"]

# --------------------------------------------------------------------------------------------- run


@dataclass
class Run:
    """One process of a run: where it computes, which share is its own, where rank 0 writes."""

    method: str
    out: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    amp: str = "off"
    trained_on: str = ""  # which images: a digest of their names and sizes
    depths: dict = field(default_factory=dict)  # grey values of each class, see `data.depths`
    held_out: list = field(default_factory=list)  # good images, not trained on: for the thresholds
    compile: bool = False
    disk: cache.Folder | None = None  # where frozen features are kept; None: nowhere
    speed: dict = field(default_factory=dict)  # see `Training.speed`, by part
    writing: threading.Thread | None = None  # the last checkpoint's `Writer`

    @property
    def is_rank0(self):
        """Whether this process writes and prints."""
        return self.rank == 0

    def say(self, text=""):
        """Print a line. Where nobody reads any more (`| head`), the run goes on in silence."""
        if self.is_rank0:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                options.to_nowhere(sys.stdout)

    def progress(self, iterable, desc, total=None, initial=0):
        """A tqdm bar on stderr; none where that is no terminal, and on all ranks but the first."""
        return tqdm(
            iterable,
            desc=desc,
            total=total,
            initial=initial,
            leave=False,
            dynamic_ncols=True,
            disable=None if self.is_rank0 else True,
        )

    def seed(self, *numbers):
        """Seed torch from (numbers..., rank): stateless, so no generator has to be saved."""
        sequence = np.random.SeedSequence([*numbers, self.rank])
        seed = int(sequence.generate_state(1, np.uint64)[0])
        torch.manual_seed(seed >> 1)  # 63 bits: torch takes no more

    def environment(self):
        """Versions, machine and --amp as it was decided here, for metrics.json."""
        return {**environment(), "amp": self.amp}

    def autocast(self):
        enabled = self.amp == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def to_device(self, tensor):
        """Host -> device; from pinned memory, in which the loader puts its batches when there is a
        GPU, without waiting."""
        return tensor.to(self.device, non_blocking=True)

    def loader(self, dataset, batches, workers):
        """DataLoader over lists of indices: what is drawn never depends on who draws it.

        workers: a number of processes, or "auto", see `auto_workers`. Each has up to four batches
        ready, and with a GPU they lie in pinned memory, from which it fetches them while it computes.
        """
        workers = auto_workers(self.device, dataset) if workers == "auto" else int(workers)
        return Loader(
            dataset,
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_in_worker,
            timeout=LOADER_CHECK if workers else 0,
        )

    def batch_indices(self, first, steps, batch_size):
        """Yield the indices of steps first ... steps - 1 for this rank, a list a step.

        Together the ranks' lists of one step are the list that a single process with `world` times
        the batch size would draw.
        """
        for step in range(first, steps):
            start = (step * self.world + self.rank) * batch_size
            yield list(range(start, start + batch_size))

    def rank0_first(self, function, *args):
        """function(*args) on rank 0, then on the others: the first may draw what the others find.

        All ranks must call it.
        """
        if not self.is_rank0:
            dist.barrier()
        result = function(*args)
        if self.is_rank0 and self.world > 1:
            dist.barrier()
        return result

    def open(self, args):
        """Take the output folder for this run alone (see `folder.take`) and write args.json.

        Whatever may be wrong with the user's input must have been found by then: the results of an
        earlier run are deleted here.
        """
        self.checkpoint_to_resume(args)  # one that is no good is refused
        if self.is_rank0:
            folder.take(self.out, args)
            if not args.resume:
                content = json.dumps({"method": self.method, **as_dict(args)}, indent=1) + "\n"
                write_atomic(self.out / "args.json", content.encode())
        if self.world > 1:
            dist.barrier()

    def log(self, record):
        """Append one JSON line to log.jsonl."""
        if self.is_rank0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")

    def rewind_log(self, step):
        """Drop the lines after `step`: the resumed run writes them again."""
        path = self.out / "log.jsonl"
        if self.is_rank0 and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if _step_of(line) <= step]
            write_atomic(path, "".join(line + "\n" for line in lines).encode())

    def save(self, state, name="checkpoint.pt"):
        """Write a checkpoint in a thread, while the training goes on from the state copied here.

        It is written atomically: a crash or a full disk leaves the one before intact. What goes wrong
        in the thread is raised by the next `save` or by `finish_saving`.
        """
        if not self.is_rank0:
            return
        self._wait_for_writer()
        self.writing = Writer(self.out / name, _copied(state))

    def finish_saving(self):
        """Return when the last checkpoint is on the disk. All ranks must call it."""
        self._wait_for_writer()
        if self.world > 1:
            dist.barrier()

    def _wait_for_writer(self):
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()  # raises what the thread did

    def checkpoint_to_evaluate(self, args):
        """The checkpoint that --eval names, a `Checkpoint`; None without --eval."""
        if not args.eval:
            return None
        state = load_checkpoint(args.eval, self.method)
        if args.predict and "model" not in state["finished"]:
            raise UsageError(state.unfinished("threshold to compare with"))
        self.depths = state.get("depths", {})
        return state

    def checkpoint_to_resume(self, args):
        """With --resume, the newest checkpoint in --out; None where there is none."""
        path = self.out / "checkpoint.pt"
        if not args.resume or not path.is_file():
            return None
        try:
            state = load_checkpoint(path, self.method)
        except UsageError as error:
            raise UsageError(f"--resume: {error}; --overwrite starts anew") from None
        before = state.get("trained_on", self.trained_on)  # an older run kept none
        if before != self.trained_on:
            raise UsageError(
                f"--resume: the training images are not those that {self.out} was started with; "
                "--overwrite starts anew"
            )
        return state

    def wrap(self, model):
        """(model, parallel): what `parallel` computes has its gradients averaged over the ranks.

        With several processes on GPUs the batch norms see all of a step. With one process both are
        the model itself, but that --compile compiles `parallel`: on one GPU into CUDA graphs, where
        PyTorch finds that it can.
        """
        parallel = model
        if self.world > 1:
            if self.device.type == "cuda":
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            parallel = torch.nn.parallel.DistributedDataParallel(model)
        if self.compile:
            graphs = self.device.type == "cuda" and self.world == 1
            parallel = torch.compile(parallel, mode="reduce-overhead" if graphs else None)
        return model, parallel

    def place(self, features):
        """Move a frozen network to the device. With --amp a GPU computes it in bfloat16 as well.

        On a CPU it stays in float32, in which its features are kept.
        """
        features.to(self.device)
        features.backbone.bf16 = self.amp == "bf16" and self.device.type == "cuda"

    @property
    def processes(self):
        """How many processes of this run share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def gather(self, items):
        """Concatenate every rank's list, in rank order, on all ranks (small objects only)."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def mean(self, values):
        """{name: scalar tensor} -> {name: float}, mean over the ranks (a sync: do it rarely)."""
        stacked = torch.stack([value.detach().float() for value in values.values()])  # (values,)
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist()))

    def check_finite(self, not_finite, step, rate="--lr"):
        """Raise UsageError if the flag `not_finite` is set on any rank (a sync: do it rarely).

        rate: the option of the learning rate.
        """
        if self.world > 1:
            dist.all_reduce(not_finite, op=dist.ReduceOp.MAX)
        if not not_finite.item():
            return
        self._wait_for_writer()
        raise UsageError(
            f"the loss became NaN or infinite by step {step}: try a lower {rate} or --amp off"
        )


class Writer(threading.Thread):
    """Writes one checkpoint; `result` waits for it. A process that ends waits, too."""

    def __init__(self, path, state):
        super().__init__()
        self.path, self.state, self.error = path, state, None
        self.start()

    def run(self):
        try:
            buffer = io.BytesIO()
            torch.save(self.state, buffer)
            write_atomic(self.path, buffer.getbuffer())
        except Exception as error:
            self.error = error

    def result(self):
        """Returns when the file is there. Raises what went wrong."""
        self.join()
        if self.error is not None:
            raise self.error


def wait_for_writers():
    """Return when no checkpoint is being written, whether that works or not."""
    for thread in threading.enumerate():
        if isinstance(thread, Writer):
            thread.join()


def _copied(state):
    """A checkpoint's dictionaries, lists and tensors, copied to the CPU; all else as it is."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


# A batch takes seconds even of huge images on a busy machine; who waits longer waits in vain.
LOADER_SECONDS = 600
LOADER_CHECK = 5  # so often, in seconds, is asked whether all processes are alive

# PyTorch would raise the death of a process by a signal, in the midst of whatever runs by then, and
# a second death in the midst of the first one's message. A `Loader` asks instead.
signal_handling._SIGCHLD_handler_set = True


class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose processes cannot hang for want of shared memory, and fail in one line.

    PyTorch hands tensors from process to process in /dev/shm, which is tiny in containers; where it
    is full, a batch is lost and the run waits for ever. Here they then go through the pipe.
    """

    def __iter__(self):
        """Raises `UsageError` if a process cannot be started, dies, or is silent for too long."""
        advice = "use fewer, or --workers 0"
        try:
            batches = super().__iter__()
        except OSError as error:  # their semaphores lie in /dev/shm, too
            raise UsageError(
                f"--workers {self.num_workers}: its processes cannot be started "
                f"({error.strerror}; is /dev/shm full?); {advice}"
            ) from None
        try:
            yield from _patiently(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            reason = str(error).splitlines()[0]
            raise UsageError(f"--workers {self.num_workers}: {reason}; {advice}") from None


def _patiently(batches):
    """The batches of a DataLoader whose own patience is LOADER_CHECK: it then looks whether its
    processes are alive, and goes on where it was. Raises RuntimeError after LOADER_SECONDS."""
    asked = time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            waited = time.monotonic() - asked
            if "timed out" not in str(error):
                raise
            if waited > LOADER_SECONDS:
                raise RuntimeError(f"DataLoader timed out after {waited:.0f} seconds") from None
        else:
            yield batch
            asked = time.monotonic()


def _in_worker(_):
    """Prepare a process of a `Loader`: Ctrl-C is the main process's business, as are all errors,
    which it gets sent. (What is left are connections that break when it ends early.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _in_silence
    ForkingPickler.register(torch.Tensor, _reduced)


def _in_silence(*_):
    pass


def _collate(samples):
    """As torch's `default_collate`, which stacks in shared memory, but only where it is enough."""
    return collate(samples, collate_fn_map={**default_collate_fn_map, torch.Tensor: _stack})


def _stack(tensors, collate_fn_map=None):
    if _is_scarce(sum(tensor.nbytes for tensor in tensors)):
        return torch.stack(tensors)
    return default_collate_fn_map[torch.Tensor](tensors, collate_fn_map=collate_fn_map)


def _reduced(tensor):
    """How a tensor on the CPU is sent: in shared memory while there is plenty, else by value, which
    is slower. Returns a function that makes it anew, and its arguments."""
    if not tensor.is_shared() and _is_scarce(tensor.nbytes):
        return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)


def _is_scarce(size):
    """Whether there is too little shared memory for a few more tensors of `size` bytes."""
    return os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < 8 * size + 2**25


def _step_of(line):
    try:
        return json.loads(line).get("step", 0)
    except json.JSONDecodeError:  # the line that was being written when the run died
        return math.inf


def start(args, method):
    """Device, threads, process group and output folder of a run.

    `args.threads` becomes the number that was chosen. Raises `UsageError` if the device is not
    there or the folder cannot be had (see `folder.refuse`).
    """
    world, rank = _world(), int(os.environ.get("RANK", 0))
    device = _device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, in which convolutions are computed anyway
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    amp = args.amp
    if amp == "auto":
        amp = "bf16" if _has_bf16(device) else "off"
    if args.compile:
        _check_compiler()
    run = Run(method, Path(args.out), device, rank, world, amp, compile=args.compile)
    if run.is_rank0:
        folder.refuse(run.out, args)
    args.threads = str(_set_threads(args.threads, device))
    return run


def _set_threads(threads, device):
    """Set PyTorch's number of threads on the CPU to `threads`, a number or auto. Returns it."""
    number = torch.get_num_threads()
    if threads != "auto":
        number = int(threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        number = _measured_threads(number)
    torch.set_num_threads(number)
    return number


def _measured_threads(limit):
    """How many threads to use now: all of `limit`, unless that is clearly slower than fewer.

    Where other programs are running, threads wait for one another all the time, and two can take
    ten times as long as one. Measured with a convolution, a tenth of a second for each number,
    twice. Says so on stderr if it is fewer.
    """
    numbers = [limit]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    if len(numbers) == 1:
        return limit
    seconds = dict.fromkeys(numbers, 0.0)  # of one convolution
    for number in numbers * 2:
        torch.set_num_threads(number)
        seconds[number] += _seconds_of_convolution(0.1) / 2
    fastest = min(seconds.values())
    number = next(number for number in numbers if seconds[number] <= 1.25 * fastest)
    if number < limit:
        ratio = seconds[limit] / seconds[number]
        options.tell(
            f"{number} of {limit} threads: with all of them a step takes {ratio:.1f} times as "
            "long, as on a machine that is busy; --threads N decides otherwise"
        )
    return number


@torch.no_grad()
def _seconds_of_convolution(duration):
    """Mean time of a convolution, repeated for `duration` seconds."""
    images, weight = torch.zeros(4, 64, 32, 32), torch.zeros(64, 64, 3, 3)
    torch.conv2d(images, weight)  # starts the threads
    clock, times = Stopwatch(), 0
    while clock() < duration:
        torch.conv2d(images, weight)
        times += 1
    return clock() / times


def _device(args):
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise UsageError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu, or auto"
        )
    if args.device != "cpu" and has_cuda:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if args.kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(
            "--kernels triton: Triton kernels need a CUDA device; use --kernels auto, or torch"
        )
    return torch.device("cpu")


def _check_compiler():
    known = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(map(shutil.which, known)):
        raise UsageError(
            "--compile: PyTorch needs a C++ compiler, and there is none ($CXX, g++, clang++); install "
            "one, or leave --compile out"
        )


def _has_bf16(device):
    """Whether bfloat16 is computed in hardware (elsewhere it is emulated, slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    return False


def training_data(run, args):
    """--data as (dataset, pixels of its training images); (None, None) for --predict.

    Every file is looked at, and what is odd about the data is said on stderr. Where there are no
    test images, `dataset.test` is empty and a share of the training images goes to `run.held_out`.

    Raises:
        UsageError: as `data.load` and `data.check`; options that need test images without these;
            nothing to predict.
    """
    if args.predict:
        data.pictures_of(args.predict)  # found to be there before anything is deleted
        return None, None
    dataset = run.rank0_first(_checked_data, run, args)
    run.say(dataset.reading)
    if run.is_rank0:
        for line in dataset.problems:
            options.tell(f"problem: {line}")
    if not dataset.test:
        dataset.train, run.held_out = hold_out(dataset.train, args.holdout, args.seed)
    run.trained_on = digest_of(dataset.train)
    if not args.eval:
        run.depths = run.rank0_first(data.depths, dataset.train, run.is_rank0)
    if data.depth_line(run.depths):
        run.say(data.depth_line(run.depths))
    images = data.Images(
        dataset.train, args.image_size, memory_share=args.memory_share, depths=run.depths
    )
    if args.cache:
        run.disk = cache.Folder(dataset.root)
    return dataset, images


def digest_of(samples):
    """What tells one list of images from another, wherever they lie: classes, names and sizes."""
    digest = hashlib.sha256()
    for sample in samples:
        size = os.path.getsize(sample.image)
        digest.update(os.fsencode(f"{sample.cls}/{sample.image.name} {size}\n"))
    return digest.hexdigest()


# Options, and their values where only one is meant. ("given": the class of every image is known.)
NEED_TEST_IMAGES = (
    ("corrupt", None),
    ("shift", None),
    ("save_maps", None),
    ("contaminate", None),
    ("fix_threshold", None),
    ("eval_every", None),
    ("class_at_test", "given"),
    ("prompt_class", "given"),
    ("calibrate", "given"),
)


def _checked_data(run, args):
    dataset = data.load(
        args.data, args.data_root or None, args.classes or None, need_test=bool(args.eval)
    )
    tested = {sample.cls for sample in dataset.test}
    untested = [cls for cls in dataset.classes if cls not in tested]
    if tested and untested:
        raise UsageError(
            f"--data {args.data}: class '{untested[0]}' has no test images, while others have; add "
            "some, or leave the class out with --classes"
        )
    for name, wanted in NEED_TEST_IMAGES:
        value = getattr(args, name, None)  # some are one script's own
        if not tested and value and wanted in (None, value):
            words = f"--{name.replace('_', '-')} {wanted or ''}".rstrip()
            raise UsageError(f"{words} needs test images, and --data {args.data} has none")
    data.check(dataset, progress=run.is_rank0)
    return dataset


def hold_out(samples, share, seed):
    """Part the training images in two: (to train on, to set the threshold with), in their order.

    share: of every class is held out, one image at least if it has two; 0: none.
    """
    rng = np.random.default_rng([seed, 7])
    chosen = set()  # numbers of samples
    for cls in dict.fromkeys(sample.cls for sample in samples):
        own = [i for i, sample in enumerate(samples) if sample.cls == cls]
        count = 0
        if share > 0:
            count = min(len(own) - 1, max(1, round(share * len(own))))
        chosen.update(rng.permutation(own)[:count].tolist())
    kept = [sample for i, sample in enumerate(samples) if i not in chosen]
    return kept, [samples[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------- training loops


class Training:
    """The ledger of one training loop: where it stands, what it logs, when it saves.

        job = Training(run, args, model, optimizer)
        if job.finished:                    # a resumed run of which only the evaluation is missing
            return job.resumed
        for step, batch in job.batches(stream, steps):
            job.set_rate(step)
            ...
            job.record(loss, parts)
        return job.finish(...)

    Args:
        model: the module that is trained (not its parallel wrapper). A resumed run's weights are
            loaded into it at once, as is the optimiser's state.
        optimizer: None if nothing is trained (there are no steps then).
        part: what the checkpoint calls the weights; a method that trains in several stages has a
            part for each.
        before: the checkpoint that an earlier stage ended with, or that this stage was interrupted
            at. Default: with --resume the newest in --out, else none. What it holds of other parts
            is kept in this job's checkpoints.
        steps_before: how many steps earlier stages took: log and checkpoint count on from there.
        schedule, drop: of the learning rate, see `lr_factor`. Default: args.schedule, 0.1.
        log_as: {name: value} that joins every line of the log.

    Attributes:
        resumed: the checkpoint that this job goes on from; None: it starts anew.
        finished: whether that checkpoint is the end of this job.
        contents: what every checkpoint holds besides the ledger's own; the script may add to it.
    """

    def __init__(
        self,
        run,
        args,
        model,
        optimizer,
        *,
        part="model",
        before=None,
        steps_before=0,
        schedule=None,
        drop=0.1,
        log_as=None,
    ):
        self.run, self.args, self.model, self.optimizer = run, args, model, optimizer
        self.part, self.steps_before = part, steps_before
        self.schedule, self.drop = schedule or args.schedule, drop
        self.log_as = log_as or {}
        before = before or run.checkpoint_to_resume(args) or {}
        self.resumed = before if part in before else None
        self.finished = part in before.get("finished", ())
        own = {"args", "optimizer", "step", "seconds", part}
        self.contents = {name: value for name, value in before.items() if name not in own}
        self.contents.setdefault("finished", [])
        self.contents["depths"] = run.depths
        self.contents["trained_on"] = run.trained_on
        self.full_rates = []
        if optimizer is not None:
            self.full_rates = [group["lr"] for group in optimizer.param_groups]
        if self.resumed:
            load_model(model, before[part], run.out / "checkpoint.pt")
        if self.resumed and not self.finished and optimizer is not None:
            optimizer.load_state_dict(before["optimizer"])
        self.done = before.get("step", steps_before) - steps_before  # steps of this job
        self.steps = self.done
        self.clock = Stopwatch(before.get("seconds", 0.0))
        self.not_finite = torch.zeros((), dtype=torch.int32, device=run.device)
        if not self.finished:
            run.rewind_log(steps_before + self.done)

    def batches(self, stream, steps, batch_size=None, title="training"):
        """Yield (step, batch) for all steps that are left, with a progress bar.

        stream: a `Stream`. steps: of the whole job. batch_size: of this rank, default args' own.
        """
        batch_size = batch_size or self.args.batch_size
        self.steps, self.images_per_step = steps, batch_size * self.run.world
        self.first, self.waited, self.loop_clock = self.done, 0.0, Stopwatch()
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.run.device)
        indices = self.run.batch_indices(self.first, steps, batch_size)
        loader = self.run.loader(stream, indices, self.args.workers)
        asked = time.monotonic()
        for step, batch in enumerate(self.run.progress(loader, title, steps, self.first), self.first):
            self.waited += time.monotonic() - asked
            yield step, batch
            asked = time.monotonic()

    def speed(self):
        """What limits this session's steps, for log.jsonl and metrics.json.

        Returns {"images_per_s": of all ranks together, "data_wait": share of the time in which the
        loop waited for its next batch, 0 to 1; on a GPU also "peak_gpu_gib": GiB of this process's
        tensors at most}.
        """
        seconds = self.loop_clock()
        images = (self.done - self.first) * self.images_per_step
        found = {"images_per_s": round(images / seconds, 1)}
        found["data_wait"] = round(self.waited / seconds, 3)
        if self.run.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.run.device)
            found["peak_gpu_gib"] = round(peak / 2**30, 2)
        return found

    def set_rate(self, step):
        """Set the learning rate of `step`, of every parameter group in proportion to its own."""
        factor = lr_factor(step, self.steps, self.schedule, self.drop)
        for group, rate in zip(self.optimizer.param_groups, self.full_rates):
            group["lr"] = rate * factor

    def record(self, loss, parts):
        """The end of a step: a line of the log every --log-every steps and after the last one, a
        checkpoint every --checkpoint-every steps (`finish` writes the last one).

        To read a loss makes a GPU wait, so it is done when it is to be kept, and whether all losses
        were finite is looked at just before.

        Args:
            loss: scalar tensor, the total. parts: {name: scalar tensor}, what it is made of.
        Raises:
            UsageError: a loss since the last look was NaN or infinite.
        """
        self.not_finite |= ~torch.isfinite(loss.detach())
        self.done += 1
        done, last = self.steps_before + self.done, self.steps_before + self.steps
        log_due = done % self.args.log_every == 0 or done == last
        save_due = done % self.args.checkpoint_every == 0 and done < last
        if log_due or save_due:
            rate = "--lr" if self.part == "model" else f"--{self.part}-lr"
            self.run.check_finite(self.not_finite, done, rate)
        if log_due:
            self._log(done, loss, parts)
        if save_due:
            self.run.save(self.state())

    def _log(self, done, loss, parts):
        losses = self.run.mean({"loss": loss, **parts})
        rate = self.optimizer.param_groups[0]["lr"]
        speed = self.speed()
        self.run.speed[self.part] = speed  # the last step has a line
        self.run.log({"step": done, **self.log_as, **losses, "lr": rate, **speed})

    def state(self, **more):
        """The checkpoint at this point of the training."""
        return {
            **self.contents,
            "method": self.run.method,
            "args": as_dict(self.args),
            self.part: self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "step": self.steps_before + self.done,
            "seconds": self.clock(),
            **more,
        }

    def share_buffers(self):
        """Before the model is evaluated: on CPUs each rank's batch norms have had statistics of
        their own since the last step. All take those of the first."""
        if self.run.world > 1 and self.optimizer is not None:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def finish(self, **more):
        """Write the last checkpoint, which says that this part is trained, and return it.

        more: what only a finished training has.
        """
        self.share_buffers()
        finished = [*self.contents["finished"], self.part]
        state = self.state(finished=finished, **more)
        self.run.save(state)
        self.run.finish_saving()
        return state


def frozen_batch(device):
    """How many images' features are computed at once, whatever the batch of a step is.

    On a CPU few, whose maps stay in its caches: 8 take 17 to 33 % less time an image than 32
    (docs/measured.md).
    """
    return 8 if device.type == "cpu" else 32


class Frozen:
    """What a frozen network makes of the training images, by batches.

    It is computed once and kept where there is room for it (see `precompute`), else computed from
    the images at every step. Without a GPU that is the host's memory. With one it is the GPU's own,
    else pinned host memory, from which the rows of a step are fetched while the step before computes.

    Args:
        features: the network. forward: uint8 (B, 3, S, S) -> rows (B, ...); split: rows, as float32,
            -> what the model takes.
        images: indexable, images[i] -> uint8 (3, S, S).
        title: of the progress bar.
    Attributes:
        rows: (N, ...), or None.
    """

    def __init__(self, run, features, images, args, title="frozen features"):
        self.run, self.features = run, features
        entry = None
        if isinstance(images, data.Images):  # those of a data set, not made here
            entry = entry_of(run, features, images, title)
        batch_size, share = frozen_batch(run.device), args.memory_share
        self.rows = precompute(run, features, images, batch_size, share, title, True, entry)

    @property
    def needs_images(self):
        """Whether a batch must bring its images."""
        return self.rows is None

    def __call__(self, batch):
        """{"index": (B,)} and, if `needs_images`, {"image": uint8 (B, 3, S, S)} -> features.split's
        result, on the device."""
        if self.rows is None:
            rows = self.features(self.run.to_device(batch["image"]))
        elif self.rows.device == self.run.device:
            rows = self.rows[self.run.to_device(batch["index"])]
        else:
            rows = self._fetch(batch["index"])
        return self.features.split(rows.float())

    def _fetch(self, index):
        """Rows (B, ...) from pinned memory. Nothing waits: the copies are queued behind the step
        before, and what they read never changes."""
        shape = len(index), *self.rows.shape[1:]
        fetched = torch.empty(shape, dtype=self.rows.dtype, device=self.run.device)
        for place, i in enumerate(index.tolist()):
            fetched[place].copy_(self.rows[i], non_blocking=True)
        return fetched


def entry_of(run, features, images, title):
    """Where on the disk `features` of these images are kept, a `cache.Entry`; None: nowhere.

    It depends on all that decides their bits: network, weights, code, files, versions and machine,
    as far as that can be told; `precompute` looks at the first batch besides. images: `data.Images`.
    """
    identity = images.identity()
    if run.disk is None or identity is None:
        return None
    weights = hashlib.sha256()
    for name, values in features.state_dict().items():
        weights.update(name.encode())
        weights.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy())
    sources = [Path(module.__file__) for module in (backbones, data, files)]
    code = [source.read_text(encoding="utf-8") for source in sources]
    code += [inspect.getsource(cls) for cls in type(features).__mro__ if cls not in _OF_TORCH]
    machine = environment()
    machine |= {"processor": torch.backends.cpu.get_cpu_capability(), "on": run.device.type}
    parts = [frozen_batch(run.device), run.amp, machine, code, weights.hexdigest(), identity]
    return run.disk.entry(title, parts)


_OF_TORCH = torch.nn.Module.__mro__  # bases whose code torch's version stands for


def precompute(
    run,
    function,
    images,
    batch_size,
    memory_share,
    desc="frozen features",
    near=False,
    entry=None,
):
    """function(batch) of every image, computed once.

    Several processes share the batches out and send one another what they computed, so that each
    has all of it, with the bits that one process would have.

    Args:
        function: (B, 3, S, S) uint8 on the device -> (B, ...) tensor; deterministic.
        images: indexable, images[i] -> (3, S, S) uint8.
        batch_size: the same on all ranks.
        memory_share: of the free memory; results that would take more are not kept.
        near: keep them in the GPU's memory if they fit into this share of what is free there, else in
            pinned memory if that pays (see `worth_moving`).
        entry: `cache.Entry` from which the results are read, if the first batch is the same to the
            bit, and to which they are written.
    Returns:
        (N, ...) tensor, or None when it is not kept.
    """
    batches = in_order(len(images), batch_size)
    # rank 0 has batches 1, 1 + world, ..., rank 1 the next ones; number 0 is everybody's, to see
    # how much there will be
    own = [batches[0], *batches[1 + run.rank :: run.world]]
    undecoded = isinstance(images, data.Images) and not images.cached
    drawn = iter(run.loader(images, own, "auto" if undecoded else 0))
    batch = next(drawn)
    values = function(run.to_device(batch))  # (B, ...)
    home = _home(run, function, batch, values, images, memory_share, near)
    if home is None:
        return None
    pinned = near and home != run.device
    shape = len(images), *values.shape[1:]
    result = torch.empty(shape, dtype=values.dtype, device=home, pin_memory=pinned)
    if entry is not None and _read(run, entry, result, values):
        return result
    result[: len(values)] = values
    for first in run.progress(range(1, len(batches), run.world), desc):
        share = batches[first : first + run.world]  # a batch for each rank, fewer at the end
        if run.rank < len(share):
            computed = function(run.to_device(next(drawn))).contiguous()
        for rank, indices in enumerate(share):
            values = computed if rank == run.rank else None
            if values is None:
                shape = len(indices), *result.shape[1:]
                values = torch.empty(shape, dtype=result.dtype, device=run.device)
            if run.world > 1:
                dist.broadcast(values, rank)
            result[indices[0] : indices[-1] + 1] = values
    if entry is not None and run.is_rank0 and result.nbytes <= cache.LIMIT:  # else copied in vain
        entry.write(result.cpu())
    return result


def _read(run, entry, result, first):
    """Whether `result` (N, ...) was filled from its entry, on all ranks; first: its first batch."""
    rows = result if result.device.type == "cpu" else torch.empty_like(result, device="cpu")
    there = entry.read(rows, first.cpu())
    if run.world > 1:
        there = torch.tensor(int(there), device=run.device)
        dist.all_reduce(there, op=dist.ReduceOp.MIN)
    if there and rows is not result:
        result.copy_(rows)
    return bool(there)


def _home(run, function, batch, values, images, memory_share, near):
    """Where the results of `precompute` are kept: a device, the same on all ranks; None: nowhere.

    values: those of `batch`, the first one.
    """
    need = len(images) * values[0].numel() * values.element_size()  # bytes
    places = [None, torch.device("cpu"), run.device]
    on_gpu = near and run.device.type == "cuda"
    choice = 0
    if on_gpu and need <= memory_share * torch.cuda.mem_get_info(run.device)[0]:
        choice = 2
    elif not on_gpu or worth_moving(function, run.to_device(batch[:1]), values[:1], images):
        if on_gpu:
            need = 2 ** math.ceil(math.log2(need))  # as PyTorch pins memory
        need *= run.processes  # each keeps all
        choice = int(need <= memory_share * data.free_memory())
    if run.world > 1:
        choice = torch.tensor(choice, device=run.device)
        dist.all_reduce(choice, op=dist.ReduceOp.MIN)
        choice = choice.item()
    return places[choice]


# A GPU computes a frozen network at some 60 TFLOP/s, and fetches from pinned memory at some 20 GB/s.
OPERATIONS_PER_BYTE = 3000


def worth_moving(function, image, row, images):
    """Whether it is better to fetch a row (1, ...) from pinned memory at every step than to compute it
    from its image (1, 3, S, S) again, which must be fetched as well.

    It is if that saves at least OPERATIONS_PER_BYTE operations (a multiply-add is two) for each byte
    that the row is longer than the image; and always if the image would have to be decoded.
    """
    if isinstance(images, data.Images) and not images.cached:
        return True
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function(image)
    longer = row.numel() * row.element_size() - image.numel() * image.element_size()
    return counter.get_total_flops() >= OPERATIONS_PER_BYTE * longer


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """Every training image once an epoch, in random order."""
    return np.random.default_rng([seed, 1, epoch]).permutation(n)


MOST_WORKERS = 16  # more do not help: docs/gpu.md


def in_order(count, batch_size):
    """The numbers 0 ... count - 1 in lists of `batch_size`; the last one may be shorter."""
    numbers = list(range(count))
    return [numbers[first : first + batch_size] for first in range(0, count, batch_size)]


def auto_workers(device, dataset):
    """How many processes should prepare batches for this device: what --workers auto means.

    A GPU must not wait for pixels, so every core of this process's share but one prepares them; on a
    CPU the cores have the model to compute. Numbers of images alone need no process.
    """
    if device.type != "cuda":
        return 0
    if isinstance(dataset, Stream) and not _holds_pixels(dataset[0]):
        return 0
    own = options.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(own - 1, MOST_WORKERS))


def _holds_pixels(sample):
    """Whether a sample of a `Stream`, a dictionary of such, has a tensor somewhere in it."""
    if isinstance(sample, dict):
        return any(_holds_pixels(value) for value in sample.values())
    return isinstance(sample, torch.Tensor)


class Stream(torch.utils.data.Dataset):
    """Sample number k of the endless training stream: {"index": of the image} and, if wanted,
    {"image": uint8 (3, S, S)}.

    Everything is a function of (seed, k): the loader's processes, the number of GPUs and
    interruptions change nothing. Of each epoch the images that do not fill a step are dropped, if
    `drop_incomplete`.
    """

    drop_incomplete = True

    def __init__(self, images, seed, images_per_step, needs_images):
        self.images, self.seed, self.needs_images = images, seed, needs_images
        self.images_per_step = images_per_step
        self.per_epoch = len(images)
        if self.drop_incomplete and len(images) >= images_per_step:
            self.per_epoch = len(images) // images_per_step * images_per_step

    def steps(self, epochs):
        """How many steps that many passes over the images are."""
        return math.ceil(epochs * self.per_epoch / self.images_per_step)

    def index(self, k):
        """Which image is number k."""
        epoch, place = divmod(k, self.per_epoch)
        return int(epoch_order(self.seed, epoch, len(self.images))[place])

    def sample(self, index):
        """What the loop gets of training image `index`."""
        if self.needs_images:
            return {"index": index, "image": self.images[index]}
        return {"index": index}

    def __getitem__(self, k):
        return self.sample(self.index(k))

    def first(self, count):
        """The `count` images with which the training begins (all, if there are fewer), as a batch:
        for what a model takes from the data before its first step."""
        count = min(count, len(self.images))
        indices = epoch_order(self.seed, 0, len(self.images))[:count]
        return torch.utils.data.default_collate([self.sample(int(i)) for i in indices])


def lr_factor(step, steps, schedule, drop=0.1):
    """What the learning rate of a step is multiplied by.

    constant: 1. step: 1, then `drop` after 80 % of the steps. cosine: linear warm-up over the first
    5 %, then half a cosine to 0.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 1.0 if step < 0.8 * steps else drop
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Stopwatch:
    """Seconds since it was made, plus those of earlier sessions of the same run."""

    def __init__(self, before=0.0):
        self.start = time.monotonic() - before

    def __call__(self):
        return time.monotonic() - self.start


# ------------------------------------------------------------------------- checkpoints, files, ends

as_dict = dataclasses.asdict


class Checkpoint(dict):
    """The content of a checkpoint. What is missing in it is a line for the user, not a KeyError."""

    def __init__(self, state, path):
        super().__init__(state)
        self.path = path

    def __missing__(self, name):
        raise UsageError(self.unfinished(name))

    def unfinished(self, lacking):
        """Why it lacks what is wanted, and what to do."""
        return (
            f"{self.path}: its training is not finished (step {self.get('step', 0)}), so it has no "
            f"{lacking}; --resume --out {Path(self.path).parent} finishes it"
        )


def load_checkpoint(path, method=None):
    """Read a checkpoint (weights only: no code is run) on the CPU. Returns a `Checkpoint`.

    Raises:
        UsageError: missing, damaged, not a checkpoint of `method`, or of an older layout.
    """
    try:
        files.check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:
        raise UsageError(f"{path}: no checkpoint, or one that is damaged or cut off") from None
    kinds = {"method": str, "args": dict, "model": dict}
    if not isinstance(state, dict) or not kinds.keys() <= state.keys():
        raise UsageError(
            f"{path}: not a checkpoint of these scripts (method, args or model is missing)"
        )
    for name, kind in kinds.items():
        if not isinstance(state[name], kind):
            raise UsageError(f"{path}: not a checkpoint of these scripts ({name} is something else)")
    if method and state["method"] != method:
        raise UsageError(f"{path}: a checkpoint of {state['method']}.py, not of {method}.py")
    if "finished" not in state:
        raise UsageError(
            f"{path}: written by an older version of these scripts; train again, or evaluate it "
            "with the version that its run's metrics.json names (commit)"
        )
    return Checkpoint(state, path)


def load_model(model, state, path):
    """Strict loading; a mismatch means another checkpoint, or other model options."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{path}: {_misfit(model.state_dict(), state, error)}") from None


def _misfit(ours, theirs, error):
    """In what the weights of a checkpoint differ from those of the model that was built."""
    advice = "leave out the options that its run did not have"
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in theirs:
            return f"does not fit this model, whose {name} it lacks; {advice}"
        if name not in ours:
            return f"does not fit this model, which has no {name}; {advice}"
        here, there = tuple(ours[name].shape), tuple(theirs[name].shape)
        if here != there:
            return f"does not fit this model: {name} is {there} in it and {here} here; {advice}"
    return f"does not fit this model: {str(error).splitlines()[-1].strip()[:200]}"


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def check_normal_score(args, state, names):
    """--predict: files must be scored as the training images were whose scores they are compared
    with, with the same values of the options `names`. Raises UsageError where they changed."""
    if not args.predict:
        return
    for name in names:
        now = getattr(args, name)
        before = state["args"].get(name, getattr(type(args), name))  # an older run had the default
        if before != now:
            raise UsageError(
                f"--predict: the checkpoint's normal score was taken with "
                f"--{name.replace('_', '-')} {before}, so it says nothing about {now}; leave "
                "that option out"
            )


def environment():
    """Versions and machine."""
    from importlib.metadata import PackageNotFoundError, version

    system = f"{platform.system()} {platform.machine()}"
    found = {"python": platform.python_version(), "system": system}
    for package in ("torch", "triton", "numpy", "scipy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    found["threads"] = torch.get_num_threads()
    found["device"] = f"CPU, {found['threads']} threads"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def launch(main):
    """Run main() and end as a command should: a user's mistake is one line on stderr, status 2.

    If the run has taken its folder by then, the line says what is kept. Other errors keep their
    traceback, and status 1.
    """
    warnings.formatwarning = _one_line
    options.any_output()
    if _world() > 1 and hasattr(os, "register_at_fork"):
        _speak_when_terminated()
    if signal.getsignal(signal.SIGINT) is options.interrupted_early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            main()
        finally:
            wait_for_writers()  # what is kept is looked up below
        return
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second one would interrupt the message
        message, status = "interrupted", 130
    except Exception as error:
        message, status = _message_of(error), 2
        if message is None:
            if folder.kept():
                options.tell(folder.kept())
            raise
    finally:
        kept = folder.kept()
        folder.release()
        if dist.is_initialized():
            dist.destroy_process_group()
        options.flush_output()
    _tell(message, kept)
    sys.exit(status)


def _world():
    """Processes of this run, by torchrun's word."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _tell(message, kept):
    """The line on stderr in which a run ends that does not end well."""
    prefix = f"[rank {os.environ['RANK']}] " if _world() > 1 else ""
    line = f"{prefix}{Path(sys.argv[0]).name}: {message}"
    options.tell(f"{line}; {kept}" if kept else line)


def _speak_when_terminated():
    """When one process of a run dies, torchrun sends SIGTERM to the others: end in a line then too.

    A thread waits for the signal, since the main thread may be waiting for a GPU whose partner is
    gone, forever, and runs no handler there. Forked processes, the loader's, end as they always do.
    """
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # a handler at all: Python tells the pipe
    signal.set_wakeup_fd(end)

    def blocked(how):  # while a process forks, which has the same handler and pipe for a moment
        signal.pthread_sigmask(how, [signal.SIGTERM])

    def as_ever():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        blocked(signal.SIG_UNBLOCK)

    def wait():
        while os.read(pipe, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(3)  # most often the main thread has noticed, and says it itself
        wait_for_writers()
        _tell("another process of this run has ended, or torchrun was stopped", folder.kept())
        os._exit(2)

    os.register_at_fork(
        before=functools.partial(blocked, signal.SIG_BLOCK),
        after_in_parent=functools.partial(blocked, signal.SIG_UNBLOCK),
        after_in_child=as_ever,
    )
    threading.Thread(target=wait, daemon=True).start()


def _lost_a_process(error):
    """Whether an error is what the processes of a run get when one of them is gone."""
    if isinstance(error, dist.DistError):  # NCCL's
        return True
    signs = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting"
    return dist.is_initialized() and any(sign in str(error) for sign in signs)


def _message_of(error):
    """What to tell the user who can mend it; None if the fault is ours."""
    if isinstance(error, UsageError):
        # one from inside a loader process arrives with its traceback as text, before the message
        message = str(error).strip().rsplit("common.UsageError: ", 1)[-1]
        return message.replace("\n", "\\n")  # a file's name may hold one
    if _lost_a_process(error):
        return "another process of this run has ended"
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU ran out of memory: lower --batch-size or --image-size"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory: lower --batch-size, --image-size or --memory-share"
    if isinstance(error, OSError) and (error.errno in OF_THE_SYSTEM or folder.holds(error.filename)):
        return f"{error.filename or 'output'}: {error.strerror}"
    return None


# What is wrong with a disk, a folder or a name, and not with us. (Not all systems know all.)
NAMES = (
    "ENOSPC EDQUOT EFBIG EIO ESTALE EACCES EROFS EPERM ENOTDIR ENAMETOOLONG ELOOP EMFILE ENFILE"
)
OF_THE_SYSTEM = {getattr(errno, name) for name in NAMES.split() if hasattr(errno, name)}


def _one_line(message, *_):
    """A warning without its source code."""
    return f"warning: {message}\n"
