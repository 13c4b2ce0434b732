"""The command line: a dataclass of options becomes --help, checks and values.

    @dataclass
    class Args(Options):
        width: int = option(256, "width of the model", group="model", low=1)

    PRESETS = {"paper": {}, "laptop": {"width": 64}}
    args = parse(Args, PRESETS, __doc__, method="omniad")

Nothing heavy is imported here: a script that calls `before_torch` between its options and its
`import torch` answers --help, and a wrong option, at once, and ends in one line if Ctrl-C comes
while torch is imported.
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from common import UsageError
from common.folder import read_json
from common.layouts import BENCHMARKS

BACKBONES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "wide_resnet50_2",
    "efficientnet_b4",
    "efficientnet_lite0",
)

# Not taken over from the checkpoint that --eval names: they belong to a run, not to its model.
OF_THE_RUN = (
    "out",
    "overwrite",
    "resume",
    "corrupt",
    "shift",
    "save_maps",
    "device",
    "workers",
    "data_root",
    "predict",
    "threshold",
    "threads",
    "holdout",
    "cache",
    "refit",  # cada.py: asked for once, it must not be done again by whoever evaluates the result
)
# What a resumed run may change: it leaves the trained model as it would have been.
FREE_ON_RESUME = (
    "resume",
    "out",
    "device",
    "workers",
    "threads",
    "data_root",
    "cache",
    "save_maps",
    "shift",
    "log_every",
    "checkpoint_every",
)


def option(
    default, help, *, group="run", choices=None, low=None, high=None, nargs=None, words=None
):
    """A dataclass field that is also a command-line option.

    default: a list makes an option of several values. help: one line. group: its heading in --help.
    choices: the allowed values. low, high: the allowed range. nargs: "+" for several values.
    words: {"--no-adapter": "none"}: further options that stand for one value of this one.
    """
    metadata = dict(
        help=help,
        group=group,
        choices=choices,
        low=low,
        high=high,
        nargs=nargs,
        words=words or {},
    )
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Options:
    """The options that all four scripts share; a script's own `Args` adds the method's."""

    data: str = option(
        "synth",
        f"synth, {', '.join(BENCHMARKS)}, several joined with +, or a folder: in MVTec layout, "
        "or of good images only",
        group="data",
    )
    data_root: str = option(
        "", "where the data sets lie (default: $AD_DATA, else data/)", group="data"
    )
    classes: str = option("", "only these classes, separated by commas", group="data")
    corrupt: str = option(
        "",
        "evaluate under a shift: brightness, contrast, defocus_blur or gaussian_noise, "
        "with :SEVERITY 1 to 5 (default 3)",
        group="data",
    )
    shift: str = option(
        "",
        "after the clean test images, the same under all four shifts: all at severity 3, "
        "curve at 1 to 5, drawn as curves",
        group="data",
        choices=("", "all", "curve"),
    )
    mask_rule: str = option(
        "half",
        "masks are resized by: bilinear, then > 0.5 (half), nearest, or bilinear, then > 0 (any)",
        group="data",
        choices=("half", "nearest", "any"),
    )
    holdout: float = option(
        0.1,
        "without test images: the share of each class's training images that is not trained on, "
        "but sets the threshold",
        group="data",
        low=0.0,
        high=0.9,
    )
    memory_share: float = option(
        0.5,
        "share of the free memory that decoded images and frozen features may take",
        group="data",
        low=0.0,
        high=1.0,
    )
    cache: bool = option(
        True,
        "keep frozen features on disk, in the data set's folder .features, for the next run: 4 GiB at "
        "most, and a tenth of the free space",
        group="data",
    )
    preset: str = option(
        "",
        f"laptop or paper (default: paper for {', '.join(BENCHMARKS)}, else laptop)",
        choices=("", "laptop", "paper"),
    )
    out: str = option("", "folder of the run (default: runs/<script>-<data>)")
    overwrite: bool = option(False, "replace the run that --out holds")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    eval: str = option("", "no training: evaluate this checkpoint")
    predict: list = option(
        [], "no training: score these images or folders with --eval CKPT", nargs="+"
    )
    threshold: float = option(
        None,
        "--predict: the image score above which an image is called defective (default: the score "
        "that 99 % of good images do not reach, from the checkpoint)",
    )
    save_maps: bool = option(
        False, "keep the anomaly maps and pooled features, maps/<class>.npz and maps/train/"
    )
    seed: int = option(0, "seed of everything random", low=0)
    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    workers: str = option(
        "auto",
        "processes that prepare batches: a number, or auto: with a GPU, one less than there are "
        "cores, at most 16, where batches hold pixels; else 0",
    )
    threads: str = option(
        "auto",
        "CPU threads of PyTorch: a number, or auto: $OMP_NUM_THREADS, else measured at the start",
    )
    amp: str = option(
        "off",
        "bf16: mixed precision in bfloat16; auto: where the processor computes in it",
        choices=("off", "auto", "bf16"),
    )
    kernels: str = option(
        "auto",
        "attention and cosine map by Triton or by plain PyTorch (auto: Triton on a GPU)",
        choices=("auto", "triton", "torch"),
    )
    log_every: int = option(50, "steps between two lines of log.jsonl", low=1)
    checkpoint_every: int = option(500, "steps between two checkpoints", low=1)
    compile: bool = option(
        False,
        "compile the trained part (torch.compile): the first steps take minutes, jitter and dropout "
        "draw other noise; needs a C++ compiler",
    )


# ----------------------------------------------------------------------------------- parsing


EXAMPLES = """\
  {0}                                   train and evaluate on pictures drawn by code
  {0} --data FOLDER                     on your own images; good ones are enough
  {0} --eval CHECKPOINT --predict PATH  score images that nobody labelled"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not the whole usage
        raise UsageError(f"{message} (--help explains every option)")

    def format_help(self):
        """What it is, how it is called, then every option."""
        formatter = self._get_formatter()
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        usage = f"usage: {self.prog} [--option value ...]"
        examples = f"examples:\n{EXAMPLES.format(self.prog)}"
        return "\n\n".join([self.description, usage, examples, formatter.format_help()])


def before_torch(Args, presets, description):
    """What can be done before torch is imported: --help, a wrong option in one line, Ctrl-C in one
    line, and how the OpenMP threads wait.

    To be called by a script that is being run, after its options and before its `import torch`.
    Arguments as for `parse`.
    """
    any_output()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell ignores it
        signal.signal(signal.SIGINT, interrupted_early)
    _wait_briefly()
    try:
        given = vars(_parser(Args, presets, description).parse_args())
        _check_given(given, Args)
        known = given.get("out") or not given.get("base_run")  # else it follows from that run's data
        if given.get("resume") and known:
            _of_run_to_resume(Path(given.get("out") or _default_out(given)), given, Args)
        elif given.get("eval") and os.path.isdir(given["eval"]):
            raise UsageError(f"--eval {given['eval']} is a folder; name the checkpoint.pt in it")
        elif given.get("eval") and not os.path.isfile(given["eval"]):
            raise UsageError(f"{given['eval']}: no such checkpoint")
    except UsageError as error:
        tell(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(2)
    except BrokenPipeError:  # --help, which nobody reads
        to_nowhere(sys.stdout)
        sys.exit(0)
    finally:
        flush_output()


def any_output():
    """What stdout and stderr cannot encode is written as \\x.., in place of an error: file names
    that are no UTF-8, and every sign that an old code page lacks. Closed ones are opened, on nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this, such as cron
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def tell(line):
    """Print a line on stderr, if anybody reads that."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        to_nowhere(sys.stderr)


def flush_output():
    """Write what is buffered. Where nobody reads any more (`| head`), it is dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream)


def cores():
    """How many of the machine's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def to_nowhere(stream):
    """What is written to the stream from now on, or is still in its buffer, is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_with(main):
    """The end of a command: exit with main()'s status; quietly where nobody reads on (`| head`)."""
    any_output()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        to_nowhere(sys.stdout)
        status = 1
    sys.exit(status)


def interrupted_early(*_):
    """Ctrl-C while modules are imported. Ends the process at once, since an exception would show as
    the failure of some import."""
    message = f"{Path(sys.argv[0]).name}: interrupted before the run began\n"
    os.write(2, message.encode(errors="surrogateescape"))
    os._exit(130)


def _wait_briefly():
    """OpenMP threads that wait for one another give up their core soon, unless the user said how.

    GNU's OpenMP, with which PyTorch is built on Linux, has them spin for milliseconds: beside other
    programs the threads then steal each other's time. It reads this when torch is imported.
    """
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def parse(Args, presets, description, argv=None, method=None, inherited=None):
    """The command line -> Args.

    Precedence: given > values of the run to resume or of the checkpoint to evaluate > preset > the
    default in `Args`. Paths become absolute, so that a checkpoint can be used from any folder.

    Args:
        Args: dataclass that inherits Options; every field made by `option`.
        presets: {"laptop": {field: value}, "paper": {...}}, or a function of no arguments that
            returns it, where the presets depend on another option.
        description: the script's docstring; its first line heads --help.
        method: the script's name in its checkpoints. Options of another one's are not even read.
        inherited: function (given, saved) -> {option: value}, what another run that these options
            name has settled. given: as on the command line, paths absolute; saved: the checkpoint's.
    Raises:
        UsageError: unknown option, wrong type, value out of range, contradicting options; --eval or
            --resume of another script.
    """
    if callable(presets):
        presets = presets()
    fields = {field.name: field for field in dataclasses.fields(Args)}
    given = vars(_parser(Args, presets, description).parse_args(argv))
    _check_given(given, Args)
    saved = {}
    if given.get("eval"):
        saved = _of_checkpoint(given, Args, method)
    as_typed = dict(given)
    for name in given:
        given[name] = _absolute(fields[name], given[name])
    if inherited:
        saved |= inherited(given, saved)
    default_out = _default_out({**saved, **as_typed})
    if given.get("eval"):
        default_out += _kind_of_evaluation(given)
    given.setdefault("out", default_out)
    if given.get("resume"):
        saved = _of_run_to_resume(Path(given["out"]), given, Args, method)
    data = given.get("data", saved.get("data", fields["data"].default))
    preset = given.get("preset") or saved.get("preset") or default_preset(data)
    args = Args(**{**presets.get(preset, {}), **saved, **given, "preset": preset})
    for field in fields.values():
        _check_range(field, getattr(args, field.name))
    if args.shift and args.corrupt:
        raise UsageError("--shift cannot be combined with --corrupt")
    if args.corrupt:
        from common import corruptions  # scipy

        corruptions.parse(args.corrupt)  # a wrong name must not show only after the training
    return args


def default_preset(data):
    """paper for the four benchmarks (or several of them joined), laptop for everything else."""
    if all(part in BENCHMARKS for part in data.split("+")):
        return "paper"
    return "laptop"


def check_depths(text):
    """--depths, blocks of the four stages. Raises UsageError."""
    words = text.split(",")
    if len(words) != 4 or not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--depths {text}: must be four numbers above 0, such as 3,3,4,6")


def _flag(name):
    return "--" + name.replace("_", "-")


def _parser(Args, presets, description):
    """The argparse parser: only what is given on the command line is in its result."""
    if callable(presets):
        presets = presets()
    parser = _Parser(
        prog=Path(sys.argv[0]).name,
        description=(description or "").strip().split("\n")[0],  # python -OO keeps no docstring
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = {}
    for field in dataclasses.fields(Args):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], field, presets)
    return parser


def _add_option(group, field, presets):
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    choices, nargs = field.metadata["choices"], field.metadata["nargs"]
    text = field.metadata["help"].replace("%", "%%")
    shown = _shown_default(field, default, presets)
    if shown:
        text += f" ({shown})"
    common = dict(default=argparse.SUPPRESS, help=text, dest=field.name)
    if isinstance(default, bool):
        group.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, **common)
    elif nargs:
        group.add_argument(_flag(field.name), nargs=nargs, metavar="PATH", **common)
    elif choices:
        group.add_argument(_flag(field.name), type=field.type, choices=choices, **common)
    else:
        metavar = field.type.__name__.upper()
        group.add_argument(_flag(field.name), type=field.type, metavar=metavar, **common)
    for word, value in field.metadata["words"].items():
        common["help"] = f"the same as {_flag(field.name)} {value}"
        group.add_argument(word, action="store_const", const=value, **common)


def _shown_default(field, default, presets):
    """What --help says of the default: each preset's value where they set it, else the value."""
    if any(field.name in values for values in presets.values()):
        shown = [f"{name}: {values.get(field.name, default)}" for name, values in presets.items()]
        return ", ".join(shown)
    if default in ("", []) or "default" in field.metadata["help"]:
        return ""
    return f"default: {default}"


def _check_given(given, Args):
    """What can be told without the values of a checkpoint or preset. Raises `UsageError`."""
    for field in dataclasses.fields(Args):
        if field.name in given:
            _check_range(field, given[field.name])
    for name in ("data", "out", "eval", "predict"):
        value = given.get(name)
        if value == "" or isinstance(value, list) and "" in value:
            raise UsageError(f"{_flag(name)}: its value is empty; name a path, or leave it out")
    threads = given.get("threads", "auto")
    if threads != "auto" and not (threads.isdecimal() and 0 < int(threads) <= 1024):
        raise UsageError(f"--threads {threads}: must be auto or a number from 1 to 1024")
    if given.get("predict") and not given.get("eval"):
        raise UsageError("--predict needs --eval CHECKPOINT: the trained model to score with")
    for name in ("corrupt", "shift", "save_maps"):
        if given.get("predict") and given.get(name):
            raise UsageError(f"{_flag(name)} cannot be combined with --predict")
    if "threshold" in given and not given.get("predict"):
        raise UsageError("--threshold needs --predict: the metrics have none")
    if given.get("resume") and (given.get("eval") or given.get("overwrite")):
        raise UsageError("--resume cannot be combined with --eval or --overwrite")


def _absolute(field, value):
    """The value of an option; if it names a file or folder of this machine, its absolute path."""
    if field.name == "data":
        if os.path.isdir(value) and value not in (*BENCHMARKS, "synth"):  # its name may hold a +
            return os.path.abspath(value)
        return "+".join(map(_absolute_source, value.split("+")))
    may_be_path = field.type is str and not field.metadata["choices"]
    if may_be_path and field.name not in ("out", "classes", "corrupt") and os.path.exists(value):
        return os.path.abspath(value)
    return value


def _absolute_source(name):
    if name and name not in (*BENCHMARKS, "synth") and os.path.isdir(name):
        return os.path.abspath(name)
    return name


def _of_checkpoint(given, Args, method):
    """The options that the checkpoint to evaluate was trained with.

    Raises:
        UsageError: no such checkpoint, of another script, or what it was trained with is gone.
    """
    from common.runtime import load_checkpoint  # torch

    path = given["eval"]
    names = [field.name for field in dataclasses.fields(Args) if field.name not in OF_THE_RUN]
    saved = _saved(load_checkpoint(path, method)["args"], names, Args)
    for name in saved.keys() - given.keys():
        needed = name not in ("data", "textures") or not given.get("predict")
        if needed and _is_gone(saved[name]):
            raise UsageError(
                f"{path} was trained with {_flag(name)} {saved[name]}, which is not there now; "
                f"name it anew with {_flag(name)}"
            )
    return saved


def _saved(values, names, Args):
    """What a run had for each of these options. One that is younger than the run has its default,
    which changes nothing, and not what a preset says of it by now."""
    defaults = Args()
    return {name: values.get(name, getattr(defaults, name)) for name in names}


def _is_gone(value):
    """Whether a value, as `_absolute` makes it, names files or folders of which one is missing."""
    if not isinstance(value, str) or os.path.exists(value):
        return False
    return any(os.path.isabs(part) and not os.path.exists(part) for part in value.split("+"))


def _default_out(values):
    script = Path(sys.argv[0]).stem or "run"
    names = []
    for part in values.get("data", "synth").split("+"):
        is_path = os.sep in part or part == "."
        names.append(Path(part).resolve().name if is_path else part)
    return str(Path("runs") / f"{script}-{'+'.join(names)}")


def _kind_of_evaluation(given):
    """What follows the default folder's name when --eval is given."""
    kind = "-predict" if given.get("predict") else "-eval"
    if given.get("corrupt"):
        kind += "-" + given["corrupt"].replace(":", "-")
    return kind


def _of_run_to_resume(out, given, Args, method=None):
    """The options of the interrupted run in `out`; those given again must not contradict them."""
    path = out / "args.json"
    if not path.is_file():
        raise UsageError(f"--resume: {out} holds no run (no args.json); leave --resume out")
    try:
        of_run = read_json(path)
    except UsageError:
        raise UsageError(f"--resume: {path} is damaged; --overwrite starts anew") from None
    theirs = of_run.get("method", method)
    if method and theirs != method:
        raise UsageError(f"--resume: {out} holds a run of {theirs}.py, not of {method}.py")
    if of_run.get("eval"):
        raise UsageError(
            f"--resume: {out} holds an evaluation of {of_run['eval']}, not a training; --overwrite "
            "does it again"
        )
    fields = {field.name: field for field in dataclasses.fields(Args)}
    saved = _saved(of_run, fields, Args)
    for name, value in given.items():
        value = _absolute(fields[name], value)
        if name not in saved or name in FREE_ON_RESUME or _is_gone(saved[name]):
            continue
        if saved[name] != value:
            raise UsageError(
                f"--resume: {out} was started with {_flag(name)} {saved[name]}, not {value}; "
                "leave it out, or choose another --out"
            )
    for name in saved.keys() - given.keys():
        if _is_gone(saved[name]):
            raise UsageError(
                f"--resume: {_flag(name)} {saved[name]} is not there now; name it anew with "
                f"{_flag(name)}"
            )
    return {k: v for k, v in saved.items() if k not in ("resume", "overwrite")}


MOST = 2**31 - 1  # of a number whose option names no limit


def _check_range(field, value):
    if field.name == "workers" and value != "auto" and not str(value).isdecimal():
        raise UsageError(f"--workers {value}: must be auto or a number, 0 or more")
    if field.type not in (int, float) or value is None is field.default:
        return
    low, high = field.metadata["low"], field.metadata["high"]
    if not isinstance(value, (int, float)):  # of a damaged args.json
        raise UsageError(f"{_flag(field.name)} {value!r}: must be a number")
    if not math.isfinite(value):
        raise UsageError(f"{_flag(field.name)} {value}: must be a finite number")
    if high is None and field.type is int:
        high = MOST
    too_low = low is not None and value < low
    too_high = high is not None and value > high
    if not too_low and not too_high:
        return
    allowed = f"from {low} to {high}"
    if low is None:
        allowed = f"at most {high}"
    elif high in (None, MOST) and too_low:
        allowed = f"at least {low}"
    raise UsageError(
        f"{_flag(field.name)} {value}: must be {allowed} (--help explains every option)"
    )
