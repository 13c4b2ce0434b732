"""The command line: a dataclass of options becomes --help, checks and values.

    @dataclass
    class Args(Options):
        width: int = option(256, "width of the model", group="model", low=1)

    PRESETS = {"paper": {}, "laptop": {"width": 64}}
    args = parse(Args, PRESETS, __doc__)

Nothing heavy is imported here: a script that calls `before_torch` between its options and its `import torch` answers
--help, and a wrong option, at once.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common import UsageError
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
)
# What a resumed run may change: it leaves the trained model as it would have been.
FREE_ON_RESUME = (
    "resume",
    "out",
    "device",
    "workers",
    "data_root",
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
        "synth, mvtec, visa, btad, realiad, several joined with +, or a folder in MVTec layout",
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
    memory_share: float = option(
        0.5,
        "share of the free memory that decoded images and frozen features may take",
        group="data",
        low=0.0,
        high=1.0,
    )
    preset: str = option(
        "",
        "laptop or paper (default: paper for mvtec, visa, btad and realiad, else laptop)",
        choices=("", "laptop", "paper"),
    )
    out: str = option("", "folder of the run (default: runs/<script>-<data>)")
    overwrite: bool = option(False, "replace what --out holds")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    eval: str = option("", "no training: evaluate this checkpoint")
    predict: list = option(
        [], "no training: score these images or folders with --eval CKPT", nargs="+"
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


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not the whole usage
        raise UsageError(f"{message} (--help explains every option)")


def before_torch(Args, presets, description):
    """What can be answered before torch is imported, is: --help, and a wrong option in one line.

    To be called by a script that is being run, after its options and before its `import torch`.
    Arguments as for `parse`.
    """
    try:
        given = vars(_parser(Args, presets, description).parse_args())
        _refuse_contradictions(given)
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def parse(Args, presets, description, argv=None):
    """The command line -> Args.

    Precedence: given > values of the run to resume or of the checkpoint to evaluate > preset > the
    default in `Args`.

    Args:
        Args: dataclass that inherits Options; every field made by `option`.
        presets: {"laptop": {field: value}, "paper": {...}}, or a function of no arguments that
            returns it, where the presets depend on another option.
        description: the script's docstring; its first line heads --help.
    Raises:
        UsageError: unknown option, wrong type, value out of range, contradicting options.
    """
    if callable(presets):
        presets = presets()
    fields = {field.name: field for field in dataclasses.fields(Args)}
    given = vars(_parser(Args, presets, description).parse_args(argv))
    _refuse_contradictions(given)
    saved = {}
    if given.get("eval"):
        saved = _of_checkpoint(given["eval"], fields)
        given.setdefault("out", _default_out({**saved, **given}) + _kind_of_evaluation(given))
    given.setdefault("out", _default_out(given))
    if given.get("resume"):
        saved = _of_run_to_resume(Path(given["out"]), given, fields)
    data = given.get("data", saved.get("data", fields["data"].default))
    preset = given.get("preset") or saved.get("preset") or default_preset(data)
    args = Args(**{**presets.get(preset, {}), **saved, **given, "preset": preset})
    for field in fields.values():
        _check_range(field, getattr(args, field.name))
    if args.shift and (args.corrupt or args.predict):
        raise UsageError("--shift goes with neither --corrupt nor --predict")
    if args.corrupt:
        from common import corruptions  # scipy

        corruptions.parse(args.corrupt)  # a wrong name must not show only after the training
    return args


def default_preset(data):
    """paper for the four benchmarks (or several of them joined), laptop for everything else."""
    if all(part in BENCHMARKS for part in data.split("+")):
        return "paper"
    return "laptop"


def _flag(name):
    return "--" + name.replace("_", "-")


def _parser(Args, presets, description):
    """The argparse parser: only what is given on the command line is in its result."""
    if callable(presets):
        presets = presets()
    parser = _Parser(
        description=description.strip().split("\n")[0],
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


def _refuse_contradictions(given):
    if given.get("predict") and not given.get("eval"):
        raise UsageError("--predict needs --eval CHECKPOINT: the trained model to score with")
    if given.get("resume") and (given.get("eval") or given.get("overwrite")):
        raise UsageError("--resume goes with neither --eval nor --overwrite")


def _of_checkpoint(path, fields):
    """The options that the checkpoint at `path` was trained with."""
    from common.runtime import load_checkpoint  # torch

    saved = load_checkpoint(path)["args"]
    return {k: v for k, v in saved.items() if k in fields and k not in OF_THE_RUN}


def _default_out(values):
    script = Path(sys.argv[0]).stem or "run"
    data = values.get("data", "synth")
    if os.sep in data or data == ".":
        data = Path(data).resolve().name
    return str(Path("runs") / f"{script}-{data}")


def _kind_of_evaluation(given):
    """What follows the default folder's name when --eval is given."""
    kind = "-predict" if given.get("predict") else "-eval"
    if given.get("corrupt"):
        kind += "-" + given["corrupt"].replace(":", "-")
    return kind


def _of_run_to_resume(out, given, fields):
    """The options of the interrupted run in `out`; those given again must not contradict them."""
    path = out / "args.json"
    if not path.is_file():
        raise UsageError(f"--resume: {out} holds no run (no args.json); leave --resume out")
    saved = {k: v for k, v in json.loads(path.read_text()).items() if k in fields}
    for name, value in given.items():
        if name in saved and name not in FREE_ON_RESUME and saved[name] != value:
            raise UsageError(
                f"--resume: {out} was started with {_flag(name)} {saved[name]}, not {value}; "
                "leave it out, or choose another --out"
            )
    return {k: v for k, v in saved.items() if k not in ("resume", "overwrite")}


def _check_range(field, value):
    if field.name == "workers" and value != "auto" and not str(value).isdecimal():
        raise UsageError(f"--workers {value}: must be auto or a number, 0 or more")
    low, high = field.metadata["low"], field.metadata["high"]
    finite = not isinstance(value, float) or math.isfinite(value)
    too_low = low is not None and value < low
    too_high = high is not None and value > high
    if finite and not too_low and not too_high:
        return
    allowed = f"at least {low}" if high is None else f"from {low} to {high}"
    raise UsageError(
        f"{_flag(field.name)} {value}: must be {allowed} (--help explains every option)"
    )
