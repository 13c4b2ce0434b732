"""The methods side by side under one protocol (docs/protocol.md): runs them, prints the tables.

    python -m docs.evidence                                  the tables, from docs/results
    python -m docs.evidence --data FOLDER --teacher resnet18 --weights FILE --seeds 0,1,2
                                                             trains what is missing there, then the tables
    python -m docs.evidence --data FOLDER --rows onenip,roads-3 --shift
                                                             only these rows, and under four shifts too

A row is one training, and what is asked of the trained model: its maps calibrated by CADA, without
class labels ("cada") or with them ("given"), and, with --shift, the same images under four shifts. What a
command leaves is in --runs, where an interrupted training goes on; what counts is kept in
docs/results/DATA-TEACHER.json, a list with one record for each row, budget, seed and calibration:

    row, seed, calibration      what it is: a name of `ROWS`; none, given or cada
    minutes, steps              of training on one thread; 0: nothing is trained
    commit, command
    amp                         off or bf16, as --amp was decided there; not there in an older record
    inputs                      digests of what it was trained with: names and sizes of the images; the weights; not
                                there in an older record
    mean, mixed                 seven metrics, per cent: over classes; of all images in one pool
    classes                     {class: the same}
    shift                       {condition: {"mean", "mixed"}}, where it was asked
    parameters, seconds         of the model that is trained; of its training
    ms                          of one test image on one thread, from its pixels to its score, where it
                                was asked (--time, on a machine that does nothing else)
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from common import UsageError, data, papers, tables
from common.folder import write_atomic
from common.options import exit_with

RESULTS = Path(__file__).resolve().parent / "results"
TEACHERS = ("resnet18", "efficientnet_lite0")
METRICS = ("i_auroc", "p_auroc", "p_ap", "p_aupro")  # columns of the first table
MINUTES = 10  # the protocol's budget; in the tables a row of another one says so


@dataclass(frozen=True)
class Row:
    """A line of the table.

    pace: steps in a minute of one thread, with each of `TEACHERS`; 0: nothing is trained.
    """

    title: str
    script: str
    words: tuple
    pace: tuple

    @property
    def calibrates_itself(self):
        return self.script == "cada"


def row(title, command, *pace):
    script, *words = command.split()
    return Row(title, script, tuple(words), pace or (0, 0))


NEAREST = "docs.nearest --average 3"
CADA = "cada --image-size 256"
ROADS = "roads --image-size 256 --batch-size 8"
ROWS = {
    "nearest-class": row("nearest neighbour, knows the class", NEAREST),
    "nearest": row("nearest neighbour", f"{NEAREST} --memory all"),
    "uniad": row("UniAD", f"{CADA} --base uniad --image-size 224", 1000, 1250),
    "revdist": row("reverse distillation", CADA, 220, 1050),
    "recontrast": row("ReContrast", f"{CADA} --base recontrast", 75, 80),
    "onenip": row("OneNIP", "onenip --image-size 224 --bank 4", 260, 220),
    "omniad": row("Omni-AD", "omniad --image-size 256", 75, 130),
    "roads-0": row("ROADS-0, distillation alone", f"{ROADS} --no-prompts --no-adapter", 70, 330),
    "roads-1": row("ROADS-1, adapter", f"{ROADS} --no-prompts", 55, 130),
    "roads-1-mu0": row("ROADS-1, μ = 0", f"{ROADS} --no-prompts --mu 0", 55, 130),
    "roads-2": row("ROADS-2, prompts", f"{ROADS} --no-adapter", 50, 150),
    "roads-3": row("ROADS", ROADS, 40, 80),
    "roads-in": row("ROADS, instance norm", f"{ROADS} --adapter instance-norm", 40, 140),
}
CALIBRATION = ()  # options for the calibration of another script's maps: none but the preset's
# By script, what the presets, made for EfficientNet-Lite0, have otherwise: reverse distillation's loss as in its
# authors' code; OneNIP's losses for features of another size, and Omni-AD's recipe for maps of unequal magnitude, both
# chosen on training images (docs/measured.md).
FOR_RESNET = {
    "cada": ("--cosine", "flat"),
    "onenip": ("--loss-weights", "relative"),
    "roads": ("--distance", "flat"),
    "omniad": ("--standardize", "--clip", "0.2", "--lr", "5e-4"),
}


# ---------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Model:
    """One training: a row, a seed, a teacher, a budget."""

    name: str
    seed: int
    args: argparse.Namespace

    @property
    def row(self):
        return ROWS[self.name]

    @property
    def minutes(self):
        """Of training; 0 where nothing is trained."""
        return self.args.minutes if any(self.row.pace) else 0

    @property
    def steps(self):
        return self.row.pace[TEACHERS.index(self.args.teacher)] * self.minutes

    def folder(self, part):
        """Another one for other options, data or steps."""
        digest = hashlib.sha1(os.fsencode("\0".join(self.words()))).hexdigest()
        name = f"{self.name}-{self.args.teacher}-{self.minutes}min-seed{self.seed}-{digest[:8]}"
        return self.args.runs.resolve() / name / part

    def words(self):
        """The options of its training."""
        words = ["--data", self.args.data, *self.row.words, "--backbone", self.args.teacher]
        if self.args.weights:
            words += ["--weights", self.args.weights]
        if self.args.teacher == "resnet18":
            words += FOR_RESNET.get(self.row.script, ())
        if self.steps:
            words += ["--steps", str(self.steps)]
        if self.row.script != "cada" and self.steps:
            words.append("--save-maps")
        return [*words, "--seed", str(self.seed)]

    def training(self):
        return tables.Job(self.row.script, tuple(self.words()), self.folder("model"))

    def questions(self):
        """{part: the command that asks it of the trained model}."""
        found, seed = {}, ("--seed", str(self.seed))
        training = self.training()

        def evaluation(part, *words):
            found[part] = tables.Job(training.script, (*words, *seed), self.folder(part), training)

        def calibration(part, *words):
            words = ("--base-run", str(training.folder), *words, *CALIBRATION, *seed)
            found[part] = tables.Job("cada", words, self.folder(part))

        if self.row.calibrates_itself:
            evaluation("given", "--calibrate", "given")
        elif self.steps:
            calibration("given", "--calibrate", "given")
            calibration("cada")
        if self.args.shift and self.row.calibrates_itself:
            evaluation("shift-none", "--calibrate", "none", "--shift", "all")
            evaluation("shift-cada", "--shift", "all")
        elif self.args.shift:
            evaluation("shift-none", "--shift", "all")
        if self.args.time and self.steps:
            evaluation("time", "--classes", self.args.classes[0])
        return found

    def is_complete(self):
        jobs = self.training(), *self.questions().values()
        return all(job.state == "finished" for job in jobs)

    def results(self):
        """{part: metrics.json} of what was asked."""
        jobs = {"model": self.training(), **self.questions()}
        return {part: tables.measured(job) for part, job in jobs.items()}

    def check_finished(self):
        """Refuse results that cannot be read, before hours are spent on others."""
        tables.check_finished([self.training(), *self.questions().values()])


def records(model, results):
    """{part: metrics.json} of one model -> what is kept of it."""
    trained = results["model"]
    views = {"none": trained}
    if model.row.calibrates_itself:
        views = {"none": trained["compare"]["without calibration"], "cada": trained}
    for part in ("given", "cada"):
        if part in results:
            views[part] = results[part]
    found = []
    for calibration, result in views.items():
        record = {
            "row": model.name,
            "seed": model.seed,
            "calibration": calibration,
            "minutes": model.minutes,
            "inputs": model.args.inputs,
            "steps": model.steps,
            "commit": trained["commit"],
            "amp": trained["versions"]["amp"],
            "command": " ".join(["python", *anonymous(model)]),
            "parameters": trained["setting"].get("parameters", 0),
            "seconds": trained["seconds"]["train"],
            "mean": per_cent(result["mean"]),
            "mixed": per_cent(result["mixed"]),
            "classes": {name: per_cent(part) for name, part in result["classes"].items()},
        }
        if "time" in results:
            seconds = results["time"]["seconds"]["score"]
            record["ms"] = round(1000 * seconds / results["time"]["images"], 1)
        shifted = results.get(f"shift-{calibration}")
        if shifted:
            record["shift"] = {}
            for condition, part in shifted["shift"].items():
                record["shift"][condition] = {
                    "mean": per_cent(part["mean"]),
                    "mixed": per_cent(part["mixed"]),
                }
        found.append(record)
    return found


def anonymous(model):
    """The words of the training's command, with FOLDER and FILE in place of this machine's paths."""
    hidden = {model.args.data: "FOLDER", model.args.weights: "FILE"}
    words = [hidden.get(word, word) for word in model.words()]
    return [*tables.program(model.row.script), *words]


def per_cent(values):
    """{metric: fraction} -> {metric: per cent with two digits}; what is undefined stays None."""
    found = {}
    for metric, value in values.items():
        found[metric] = None if value is None else round(100 * value, 2)
    return found


# ----------------------------------------------------------------------------------------- results


def file_of(results, data, teacher):
    """docs/results/DATA-TEACHER.json."""
    name = re.sub(r"[^\w-]", "_", Path(data).resolve().name)
    return results / f"{name}-{teacher}.json"


def files(results):
    """Those that are there, in the order of their names."""
    return sorted(file for teacher in TEACHERS for file in results.glob(f"*-{teacher}.json"))


NEEDED = {"row", "seed", "calibration", "minutes", "commit", "parameters", "mean", "mixed", "classes"}


def read(file):
    """The records; none where there is no such file. Raises UsageError if it is something else."""
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    whole = isinstance(found, list)
    if not whole or not all(isinstance(r, dict) and NEEDED <= r.keys() and r["row"] in [*ROWS] for r in found):
        raise UsageError(f"{file} is damaged: it holds no list of results; move it elsewhere")
    return found


def inputs_of(dataset, weights):
    """What the models of one file of results share: digests of the images' names and sizes, and of the weights.
    They tell nothing of this machine."""
    images = hashlib.sha1()
    for sample in (*dataset.train, *dataset.test):
        name = os.path.relpath(sample.image, dataset.root)
        images.update(os.fsencode(f"{name}\0{sample.image.stat().st_size}\0"))
    content = Path(weights).read_bytes() if os.path.isfile(weights) else weights.encode(errors="replace")
    return {"images": images.hexdigest()[:8], "weights": hashlib.sha1(content).hexdigest()[:8]}


def write(file, found):
    """One record a line, in the order of the table, so that a change shows what is new."""
    order = list(ROWS)
    found.sort(key=lambda r: (order.index(r["row"]), r["minutes"], r["calibration"], r["seed"]))
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in found)
    # What is no UTF-8 in a name is written as \udc.., as JSON has it.
    write_atomic(file, f"[\n{lines}\n]\n".encode(errors="backslashreplace"))


def replaced(found, new):
    """The records with those of the same model, budget, seed and calibration replaced. What a record of
    the same commit has and the new one was not asked for, shifts or times, stays."""
    def key(record):
        return record["row"], record["minutes"], record["seed"], record["calibration"]

    known = {key(record): record for record in found}
    for record in new:
        before = known.get(key(record), {})
        if before.get("commit") == record["commit"]:
            record = {**before, **record}
        known[key(record)] = record
    return list(known.values())


# ------------------------------------------------------------------------------------------ tables


def spread(values):
    """Numbers of several seeds -> text; what is undefined is left out."""
    known = [value for value in values if value is not None]
    return tables.cell(dict(enumerate(known)))


def grid(heads, rows):
    """Lists of cells -> a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines)


def by_row(found):
    """[(title, the records of a row and a budget)] of those that there are, in the order of `ROWS`."""
    pairs = []
    for name, about in ROWS.items():
        of_row = [r for r in found if r["row"] == name]
        for minutes in sorted({r["minutes"] for r in of_row}):
            title = about.title if minutes in (0, MINUTES) else f"{about.title}, {minutes} min"
            pairs.append((title, [r for r in of_row if r["minutes"] == minutes]))
    return pairs


def main_table(found):
    """Every row, plain and calibrated: the four metrics of the mean over classes, and the pool;
    what it costs."""
    heads = ["row", "seeds", *(papers.QUALITY[metric] for metric in METRICS)]
    heads += ["pool", "pool, CADA", "pool, CaDA-A", "I-AUROC, CADA", "million parameters"]
    timed = any(r.get("ms") for r in found)
    if timed:
        heads.append("ms an image")
    rows = []
    for title, of_row in by_row(found):
        of = {}
        for calibration in ("none", "cada", "given"):
            of[calibration] = [r for r in of_row if r["calibration"] == calibration]
        cells = [title, str(len(of["none"]))]
        cells += [spread([r["mean"][metric] for r in of["none"]]) for metric in METRICS]
        cells += [spread([r["mixed"]["i_auroc"] for r in records]) for records in of.values()]
        cells.append(spread([r["mean"]["i_auroc"] for r in of["cada"]]))
        cells.append(f"{of_row[0]['parameters'] / 1e6:.1f}" if of_row[0]["parameters"] else "-")
        if timed:
            cells.append(spread([r.get("ms") for r in of["none"]]))
        rows.append(cells)
    return grid(heads, rows)


def class_table(found, metric):
    """One metric of every class, not calibrated."""
    found = [r for r in found if r["calibration"] == "none"]
    classes = list(found[0]["classes"]) if found else []
    rows = []
    for title, records in by_row(found):
        rows.append([title, *(spread([r["classes"][cls][metric] for r in records]) for cls in classes)])
    return grid([papers.QUALITY[metric], *classes], rows)


def shift_table(found):
    """I-AUROC and P-AUPRO on clean images and under each shift."""
    found = [r for r in found if "shift" in r and r["calibration"] == "none"]
    if not found:
        return ""
    conditions = list(found[0]["shift"])
    names = [condition.partition(":")[0] for condition in conditions]
    parts = []
    for metric in ("i_auroc", "p_aupro"):
        rows = []
        for title, records in by_row(found):
            seeds = ", ".join(str(r["seed"]) for r in records)
            cells = [title, seeds, spread([r["mean"][metric] for r in records])]
            for condition in conditions:
                cells.append(spread([r["shift"][condition]["mean"][metric] for r in records]))
            means = []
            for r in records:
                means.append(statistics.mean(part["mean"][metric] for part in r["shift"].values()))
            rows.append([*cells, spread(means)])
        heads = [papers.QUALITY[metric], "seed", "clean", *names, "shifted, mean"]
        parts.append(grid(heads, rows))
    return "\n\n".join(parts)


def text_of(found):
    """All tables of one file of results, as Markdown."""
    parts = [main_table(found), class_table(found, "i_auroc"), class_table(found, "p_ap")]
    return "\n\n".join(part for part in (*parts, shift_table(found)) if part)


# -------------------------------------------------------------------------------- the command line


def parse(argv):
    parser = argparse.ArgumentParser("python -m docs.evidence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="", help="folder in MVTec layout; without it: no training")
    parser.add_argument("--teacher", default="resnet18", choices=TEACHERS, help="frozen network")
    parser.add_argument("--weights", default="", help="file of its weights")
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, separated by commas")
    parser.add_argument("--minutes", type=int, default=MINUTES,
                        help="of training on one thread (default: %(default)s)")
    parser.add_argument("--shift", action="store_true", help="the same images under four shifts too")
    parser.add_argument("--time", action="store_true", help="ms of a test image too, on one thread")
    parser.add_argument("--jobs", type=int, default=1, help="models at once, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def check(args):
    """Refuse what cannot be, before anything runs, and turn texts into values."""
    args.rows = args.rows.split(",")
    for name in args.rows:
        if name not in ROWS:
            raise UsageError(f"--rows {name}: choose from {', '.join(ROWS)}")
    args.seeds = tables.seeds_of(args.seeds)
    for name in ("minutes", "jobs"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    for file in files(args.results):  # all are printed at the end
        read(file)
    if not args.data:
        return
    args.data, args.weights = (path and os.path.abspath(path) for path in (args.data, args.weights))
    dataset = data.load(args.data)
    args.classes, args.inputs = dataset.classes, inputs_of(dataset, args.weights)
    file = file_of(args.results, args.data, args.teacher)
    for record in read(file):
        other = ""
        if list(record["classes"]) != args.classes:
            other = "other classes"
        elif record.get("inputs", args.inputs) != args.inputs:
            other = "other images or other --weights"
        if other:
            raise UsageError(f"{file} is of {other}: give another folder with --results")


def train(args):
    """Everything that is asked for, several models at once; each one's records are kept at once.
    Returns {folder: why} of the commands that failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands
    args.results.mkdir(parents=True, exist_ok=True)
    file = file_of(args.results, args.data, args.teacher)
    models = {}
    for seed in args.seeds:
        for name in args.rows:
            model = Model(name, seed, args)
            model.check_finished()
            models[model.training()] = model

    def keep(training):
        model = models[training]
        if model.is_complete():
            write(file, replaced(read(file), records(model, model.results())))
            shutil.rmtree(training.folder / "maps", ignore_errors=True)

    runner = tables.Runner(args.jobs, after=keep)
    runner.run({training: list(model.questions().values()) for training, model in models.items()})
    return runner.failed


def main(argv=None):
    """Returns the exit status."""
    args = parse(argv)
    check(args)
    failed = train(args) if args.data else {}
    for file in files(args.results):
        print(f"\n## {file.stem}\n\n{text_of(read(file))}")
    return 1 if failed else 0


def launch(argv=None):
    """The command: what went wrong is one line on stderr and exit status 2."""
    return tables.ended("evidence", lambda: main(argv))


if __name__ == "__main__":
    exit_with(launch)
