"""The numbers of the four papers: every table, as printed, and the question which of them belong to a run.

All are in papers.csv, beside this file. One line of it is one row of a table for one data set, condition and class:

    paper, table     onenip, omniad, roads or cada; the number that the table has there (4a: its part a)
    row              method or variant
    options          what makes our script the row's: words of its command line on top of its paper preset; "default":
                     none are needed; empty: our script cannot be this row (another method, mostly)
    data, size       as for --data, joined sets in the order of the alphabet; pixels, empty where the paper says nothing
    condition        clean; brightness:3 and so on, as for --corrupt; ood: the mean of these four
    class            a class; mean: of the classes; mean mvtec: of one set of joined ones; mixed: all classes in one
                     pool; gain: that pool, minus the same without calibration
    i_auroc ... mad  the metrics of `metrics.evaluate`, in per cent; 97.85±0.01: mean and standard deviation of ten seeds
    params_m flops_g millions of parameters, billions of multiply-adds
    note             where the paper contradicts itself, or what one must know to compare

A number stands beside a run only if the run has the row's options and all others that decide the result as in the paper.
"""

import csv
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from common import corruptions

TITLES = {"onenip": "OneNIP (ECCV 2024)", "omniad": "Omni-AD (ICME 2025)", "roads": "ROADS (WACV 2025)",
          "cada": "CADA (arXiv 2404.00724)"}

TABLES = {  # what each table is about
    "onenip": {
        "1": "one model per data set", "2": "one model for the 30 classes of three data sets", "3": "image size",
        "4a": "prompt, restoration, refiner", "4b": "layers of encoder and decoder",
        "4c": "share of the refiner in the map", "4d": "prompts in training and at test, ten seeds",
        "5": "pixels, per class", "6": "images, per class",
    },
    "omniad": {
        "I": "three data sets", "II": "which tokens are learned", "III": "order of the two attentions",
        "IV": "number of tokens", "V": "branches of the block", "VI": "depths of the decoder", "VII": "encoder",
    },
    "roads": {
        "1": "MVTec AD, per class", "2": "MVTec AD under four shifts, per class", "3": "VisA, clean and under shift",
        "4": "adapter and prompts; weights of the losses",
    },
    "cada": {
        "1": "MVTec AD, three bases", "2": "VisA, three bases", "3": "the head: structure, dropout, image score",
        "4": "who knows the class", "5": "which statistics are estimated",
    },
}

QUALITY = ("i_auroc", "i_ap", "i_f1max", "p_auroc", "p_ap", "p_f1max", "p_aupro", "mad")  # in per cent
COSTS = ("params_m", "flops_g")

# Options that decide what a run computes: those of these groups, and some of the data. The source of textures is left
# to the user: the papers have DTD, which is not ours to bring along.
GROUPS = ("model", "training", "scoring", "ablations", "calibration")
OF_THE_DATA = ("classes", "image_size", "mask_rule", "contaminate")
PER_PROCESS = ("batch_size", "calibration_batch")
WEIGHT_FILES = ("weights", "adapter_weights")  # taken for the official ones: nobody can tell


@dataclass(frozen=True)
class Line:
    """One line of papers.csv."""

    paper: str
    table: str
    row: str
    options: tuple | None  # words of a command line; None: no row of ours
    data: str
    size: int | None
    condition: str
    cls: str
    values: dict  # {metric: as printed: per cent, millions or billions}
    spread: dict  # {metric: standard deviation}, where there is one
    note: str


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    options: tuple | None  # as in `Line`
    lines: list  # of all data sets, conditions and classes


# ------------------------------------------------------------------------------------------------------ the tables


@functools.cache
def lines():
    """All of papers.csv, in its order: that of the tables."""
    with open(Path(__file__).with_name("papers.csv"), newline="", encoding="utf-8") as file:
        return [_line(record) for record in csv.DictReader(file)]


def _line(record):
    """One record of the file -> `Line`."""
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
    size = int(record["size"]) if record["size"] else None
    return Line(record["paper"], record["table"], record["row"], options, record["data"], size, record["condition"],
                record["class"], values, spread, record["note"])


def rows(paper, table):
    """The rows of a table, in the paper's order: list of `Row`. Raises `KeyError` for a table that is not there."""
    if table not in TABLES[paper]:
        raise KeyError(f"{TITLES[paper]} has no Table {table}; it has {', '.join(TABLES[paper])}")
    found = {}
    for line in lines():
        if (line.paper, line.table) == (paper, table):
            row = found.setdefault(line.row, Row(line.row, line.options, []))
            row.lines.append(line)
    return list(found.values())


# -------------------------------------------------------------------------------------------- which belong to a run


def numbers(paper, args, preset, data, world=1):
    """What the paper reports for a run: the `paper` argument of `report.evaluate`.

    Args:
        paper: a key of `TITLES`.
        args: the run's options, made of `runtime.option` fields.
        preset: {field: value}, the script's paper preset; fields that it lacks have their defaults in the paper.
        data: name of the data set; joined ones in any order.
        world: number of processes; the papers' batches are those of all of them.
    Returns:
        {"source": str, "mean": {metric: fraction}, "mixed": {...}, "classes": {name: {...}}, "datasets": {name: {...}},
        "shift": {condition: {"mean": {...}, "classes": {...}}} (with --shift), "notes": [str]}, without the parts that
        the paper leaves open; None if it has nothing for these options, this data and this condition. Where several
        tables have a number, the first one counts.
    """
    data = "+".join(sorted(data.split("+")))
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
        new = {metric: value / 100 for metric, value in line.values.items() if metric in QUALITY and metric not in part}
        part |= new
        used += [line] if new else []
    if not used:
        return None
    found["source"] = _source(paper, used)
    notes = dict.fromkeys(line.note for line in used if line.note)
    return {**found, "notes": list(notes)} if notes else found


def costs(paper, args, preset):
    """{"params_m": millions of parameters, "flops_g": billions of multiply-adds} of the model that the options make, as
    the paper has them; empty if it has none. Data and training do not matter."""
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
    """Whether the options called `deciding` are the row's, and where it does not name them, the paper's."""
    if line.options is None:
        return False
    changed = settings(line.options)
    for name in (name for name in deciding if hasattr(args, name)):
        value, default = getattr(args, name), getattr(type(args), name)
        wanted = preset.get(name, default)
        if name in changed:
            wanted = type(default)(changed[name])
        if name in PER_PROCESS:
            value *= world
        if name in WEIGHT_FILES and value != "random":
            continue
        if value != wanted:
            return False
    return True


def settings(words):
    """("--prompt", "none", "--no-refiner") -> {"prompt": "none", "refiner": False}."""
    found, words = {}, iter(words)
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        if name.startswith("no_"):
            found[name.removeprefix("no_")] = False
        else:
            found[name] = next(words)
    return found


def _part(found, cls):
    """The dict in `found` where the numbers of a class, or of means and pools, belong."""
    if cls.startswith("mean "):
        return found.setdefault("datasets", {}).setdefault(cls.removeprefix("mean "), {})
    if cls in ("mean", "mixed"):
        return found.setdefault(cls, {})
    return found.setdefault("classes", {}).setdefault(cls, {})


def _source(paper, used):
    """The paper's title and the tables: OneNIP (ECCV 2024), Tables 1, 5 and 6."""
    *first, last = [table for table in TABLES[paper] if any(line.table == table for line in used)]
    names = f"Tables {', '.join(first)} and {last}" if first else f"Table {last}"
    return f"{TITLES[paper]}, {names}"
