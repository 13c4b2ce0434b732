"""The numbers of the four papers: every table, as printed; and which of them belong to a run.

They are in papers.csv, beside this file. A line is one row of a table for one data set, condition
and class:

    paper, table     onenip, omniad, roads or cada; its table's number there (4a: part a of Table 4)
    row              method or variant
    options          what makes our script this row: words of its command line on top of its paper
                     preset. default: none needed; empty: our script cannot be this row. What a
                     table varies and the laptop preset has otherwise is named in all of its rows
    data, size       as for --data, joined sets in alphabetical order; pixels, empty if not said
    condition        clean; brightness:3 and so on, as for --corrupt; ood: the mean of these four
    class            a class; mean: of all classes; mean mvtec: of one of several joined data sets;
                     mixed: all classes in one pool; gain: that pool minus the pool of the base
    i_auroc ... mad  metrics of `metrics.evaluate`, in per cent; 97.85±0.01: mean and standard
                     deviation over ten seeds
    params_m flops_g millions of parameters, billions of multiply-adds
    note             where the paper contradicts itself, or what one must know to compare

A number stands beside a run only if the run has the options of the number's row, and has all other
options that decide the result as in the paper, or as in its authors' code (`OF_THE_CODE`).
"""

import csv
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

TITLES = {
    "onenip": "OneNIP (ECCV 2024)",
    "omniad": "Omni-AD (ICME 2025)",
    "roads": "ROADS (WACV 2025)",
    "cada": "CADA (arXiv 2404.00724)",
}

TABLES = {  # what each table is about
    "onenip": {
        "1": "one model per data set",
        "2": "one model for the 30 classes of three data sets",
        "3": "image size",
        "4a": "prompt, restoration, refiner",
        "4b": "layers of encoder and decoder",
        "4c": "share of the refiner in the map",
        "4d": "prompts in training and at test, over ten seeds",
        "5": "pixels, per class",
        "6": "images, per class",
    },
    "omniad": {
        "I": "three data sets",
        "II": "which tokens are learned",
        "III": "order of the two attentions",
        "IV": "number of tokens",
        "V": "branches of the block",
        "VI": "depths of the decoder",
        "VII": "encoder",
    },
    "roads": {
        "1": "MVTec AD, per class",
        "2": "MVTec AD under four shifts, per class",
        "3": "VisA, clean and under shift",
        "4": "adapter and prompts; weights of the losses",
    },
    "cada": {
        "1": "MVTec AD, three bases",
        "2": "VisA, three bases",
        "3": "the head: structure, dropout, image score",
        "4": "who knows the class",
        "5": "which statistics are estimated",
    },
}

QUALITY = {  # metric: the head of its column
    "i_auroc": "I-AUROC",
    "i_ap": "I-AP",
    "i_f1max": "I-F1max",
    "p_auroc": "P-AUROC",
    "p_ap": "P-AP",
    "p_f1max": "P-F1max",
    "p_aupro": "P-AUPRO",
    "mad": "mAD",
}
COSTS = {"params_m": "M parameters", "flops_g": "G multiply-adds"}

# The options that decide a result: those of these groups, and some of the group "data". The source
# of textures does not count: the papers' (DTD) cannot be a default, since it must be downloaded.
GROUPS = ("model", "training", "scoring", "ablations", "calibration")
OF_THE_DATA = ("classes", "image_size", "mask_rule", "contaminate")
PER_PROCESS = ("batch_size", "calibration_batch")
WEIGHT_FILES = ("weights", "adapter_weights")  # a file is taken for the official one

# Where paper and authors' code differ, the preset has one of the two, and a run with the other is
# the published row as well: what {option: values} the preset does not have.
OF_THE_CODE = {"onenip": {"score_scale": ("test", "none"), "prompt_class": ("given",)}}

# Options of a row that ask something else of the same trained model: --eval of its checkpoint
# answers. All others make another training.
AT_EVALUATION = {
    "onenip": ("alpha", "prompt_test"),
    "omniad": (),
    "roads": (),
    "cada": ("calibrate", "regressor", "dropout", "statistic", "score"),
}


@dataclass(frozen=True)
class Line:
    """One line of papers.csv."""

    paper: str
    table: str
    row: str
    options: tuple | None  # words of a command line; None: our script cannot be this row
    data: str
    size: int | None
    condition: str
    cls: str
    values: dict  # {metric: number as printed}
    spread: dict  # {metric: standard deviation}, where there is one
    note: str


@dataclass(frozen=True)
class Row:
    """One row of a table: `options` as in `Line`, and its lines for all data sets and classes."""

    name: str
    options: tuple | None
    lines: list


# ------------------------------------------------------------------------------------- the tables


@functools.cache
def lines():
    """All of papers.csv, list of `Line`, in the papers' order."""
    with open(Path(__file__).with_name("papers.csv"), newline="", encoding="utf-8") as file:
        return [_line(record) for record in csv.DictReader(file)]


def _line(record):
    """A record of the file -> `Line`."""
    options = None
    if record["options"]:
        options = () if record["options"] == "default" else tuple(record["options"].split())
    values, spread = {}, {}
    for metric in (*QUALITY, *COSTS):
        value, _, deviation = record[metric].partition("±")
        if value:
            values[metric] = float(value)
        if deviation:
            spread[metric] = float(deviation)
    return Line(
        paper=record["paper"],
        table=record["table"],
        row=record["row"],
        options=options,
        data=record["data"],
        size=int(record["size"]) if record["size"] else None,
        condition=record["condition"],
        cls=record["class"],
        values=values,
        spread=spread,
        note=record["note"],
    )


def rows(paper, table):
    """The rows of a table, list of `Row`, in the paper's order.

    Raises `KeyError` for a paper or a table that is not there.
    """
    if table not in TABLES[paper]:
        raise KeyError(f"{TITLES[paper]} has no Table {table}; it has {', '.join(TABLES[paper])}")
    found = {}
    for line in lines():
        if (line.paper, line.table) == (paper, table):
            row = found.setdefault(line.row, Row(line.row, line.options, []))
            row.lines.append(line)
    return list(found.values())


# --------------------------------------------------------------------------- which belong to a run


def numbers(paper, args, preset, data, world=1):
    """What the paper reports for a run: the `paper` argument of `report.evaluate`.

    Args:
        paper: a key of `TITLES`.
        args: the run's options, a dataclass of `runtime.option` fields.
        preset: {field: value} of the paper's run; fields that it lacks have their defaults there.
        data: name of the data set; of joined ones in any order.
        world: number of processes; the papers' batch sizes are those of all of them together.
    Returns:
        None if the paper has nothing for these options, this data and this condition. Else a dict
        of {metric: fraction}, without the parts that the paper leaves open:
            "mean", "mixed"        {metric: fraction}
            "classes", "datasets"  {name: {metric: fraction}}
            "shift"                {condition: the parts above}, with --shift
            "source"               title and tables
            "notes"                list of lines
        Where several tables have a number, the first one counts.
    """
    from common import corruptions  # scipy, which nothing else here needs

    data = by_name(data)
    condition = "{}:{}".format(*corruptions.parse(args.corrupt)) if args.corrupt else "clean"
    deciding = [*_names(args, GROUPS), *OF_THE_DATA]
    found, used = {}, []
    for line in lines():
        if (line.paper, line.data) != (paper, data) or line.cls == "gain":
            continue
        if not _is_row(line, args, preset, deciding, world):
            continue
        if line.condition == condition:
            part = _part(found, line.cls)
        elif args.shift:
            part = _part(found.setdefault("shift", {}).setdefault(line.condition, {}), line.cls)
        else:
            continue
        new = [metric for metric in line.values if metric in QUALITY and metric not in part]
        for metric in new:
            part[metric] = round(line.values[metric] / 100, 4)
        if new:
            used.append(line)
    if not used:
        return None
    found["source"] = _source(paper, used)
    notes = dict.fromkeys(line.note for line in used if line.note)
    return {**found, "notes": list(notes)} if notes else found


def costs(paper, args, preset):
    """Size and cost of the model that the options make, as the paper has them.

    Arguments as in `numbers`; neither data nor training matter. Returns {"params_m": millions of
    parameters, "flops_g": billions of multiply-adds}, empty if the paper has none.
    """
    deciding = [*_names(args, ("model", "ablations")), "image_size"]
    found = {}
    for line in lines():
        if line.paper == paper and _is_row(line, args, preset, deciding):
            for metric in COSTS:
                if metric in line.values:
                    found.setdefault(metric, line.values[metric])
    return found


def _names(args, groups):
    """The options of these groups."""
    return [field.name for field in dataclasses.fields(args) if field.metadata["group"] in groups]


def _is_row(line, args, preset, deciding, world=1):
    """Whether the options `deciding` are the row's, and those it does not name the paper's."""
    if line.options is None:
        return False
    changed = settings(line.options)
    for name in deciding:
        if not hasattr(args, name):
            continue
        value, default = getattr(args, name), getattr(type(args), name)
        wanted = preset.get(name, default)
        if name in changed:
            wanted = type(default)(changed[name])
        if name in PER_PROCESS:
            value *= world
        if name in WEIGHT_FILES and value != "random":
            continue
        if name not in changed and value in OF_THE_CODE.get(line.paper, {}).get(name, ()):
            continue
        if value != wanted:
            return False
    return True


def by_name(data):
    """The data sets joined by + in alphabetical order, as they are called in the tables."""
    return "+".join(sorted(data.split("+")))


def settings(words):
    """("--prompt", "none", "--no-refiner") -> {"prompt": "none", "refiner": False}."""
    return {name: value for name, value, _ in each_option(words)}


def each_option(words):
    """The options of a row, one by one: yields (name, value, the words that say it)."""
    words = iter(words)
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        if name.startswith("no_"):
            yield name.removeprefix("no_"), False, (word,)
        else:
            value = next(words)
            yield name, value, (word, value)


def _part(found, cls):
    """The dict in `found` to which the numbers of this class, mean or pool belong."""
    if cls.startswith("mean "):
        return found.setdefault("datasets", {}).setdefault(cls.removeprefix("mean "), {})
    if cls in ("mean", "mixed"):
        return found.setdefault(cls, {})
    return found.setdefault("classes", {}).setdefault(cls, {})


def _source(paper, used):
    """Title and tables of the lines: OneNIP (ECCV 2024), Tables 1, 5 and 6."""
    *first, last = [table for table in TABLES[paper] if any(line.table == table for line in used)]
    names = f"Tables {', '.join(first)} and {last}" if first else f"Table {last}"
    return f"{TITLES[paper]}, {names}"
