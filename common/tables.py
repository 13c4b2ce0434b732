"""A table of a paper by one command: its rows are run, and the table is printed with the paper's
numbers beside ours.

    python -m common.tables                          what there is: tables, rows, what they cost
    python -m common.tables onenip                   the rows of OneNIP's tables
    python -m common.tables onenip 4a                Table 4a on the embedded data
    python -m common.tables onenip 4a --data mvtec -- --workers 4
    python -m common.tables cada 4 --seeds 0,1,2     mean ± standard deviation of three trainings

A row is one command line of a script, which is printed. What stands after -- goes to all of them.
Rows that only ask something else of a trained model (`papers.AT_EVALUATION`, or its test images
under shifts) share one training: they are --eval of its checkpoint.

Every command has a folder in --runs, named by its options and the commit of the checkout. A
finished one is reused, by any table; an interrupted one goes on with --resume. So the same command
again does only what is missing. A row that fails is reported, the others go on, and the exit
status is 1.

The result: the table on the terminal, and in --out (default runs/tables/PAPER-TABLE-DATA)

    table.md      the same, with the commands
    table.json    every number of every seed, the commits, versions and folders
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from common import UsageError, layouts, papers
from common.folder import current_commit, read_json, temporary_beside, write_atomic
from common.layouts import BENCHMARKS
from common.options import default_preset, exit_with

SCRIPTS = Path(__file__).resolve().parent.parent

COLUMNS = papers.QUALITY | papers.COSTS

# Of a training with the laptop preset, on the embedded data and one core: the scripts' docstrings.
MINUTES = {"onenip": 4, "omniad": 7, "roads": 6, "cada": 3}

# Options of the scripts that leave a result as it is: runs with others of them are reused.
FREE = ("data_root", "cache", "device", "workers", "log_every", "checkpoint_every")

# Options that this command sets itself.
OWN_WORDS = ("data", "seed", "seeds", "out", "eval", "resume", "overwrite", "predict", "shift")

SHIFTS = ("brightness:3", "contrast:3", "defocus_blur:3", "gaussian_noise:3")


# ---------------------------------------------------------------------------- commands of a table


@dataclass(frozen=True)
class Job:
    """A command of a script and the folder of its run."""

    script: str  # onenip; docs.nearest, as after python -m
    words: tuple  # the options, without --out and --eval
    folder: Path
    training: "Job | None" = None  # this one is --eval of that one's checkpoint; None: a training

    @property
    def state(self):
        """finished, interrupted or new, by what lies in the folder."""
        if (self.folder / "metrics.json").is_file():
            return "finished"
        return "interrupted" if (self.folder / "args.json").is_file() else "new"

    def command(self):
        """The words of the command line that makes this run."""
        words = self.words
        if self.training is not None:
            words = ("--eval", str(self.training.folder / "checkpoint.pt"), *words)
        return (*program(self.script), *words, "--out", str(self.folder))

    def next_command(self):
        """The same, but an interrupted training goes on, and an evaluation is done again."""
        if self.state != "interrupted":
            return self.command()
        if self.training is not None:
            return (*self.command(), "--overwrite")
        return (*program(self.script), "--out", str(self.folder), "--resume")

    def costs_command(self):
        """What prints the size and the cost of this training's model."""
        return (*program(self.script), "--flops", *self.words)


def program(script):
    """What one would type here after python: the script's file, or -m and its module."""
    if "." in script:
        return "-m", script
    return (os.path.relpath(SCRIPTS / f"{script}.py"),)


def chain_of(row, seed, shift, args, commit):
    """The commands that end with this row's numbers: [training], or [training, its evaluation].

    Args:
        row: `papers.Row`.
        shift: whether the table has shifted test images.
        args: this command's options, see `parse`.
    """
    at_training, at_evaluation = split(args.paper, row.options)
    if shift:
        at_evaluation += ("--shift", "all")
    at_training = (*args.words, *at_training)
    words = ("--data", args.data, *at_training, "--seed", str(seed))
    name = name_of(args.paper, args.data, at_training, seed)
    training = Job(args.paper, words, folder_of(args, name, commit))
    if not at_evaluation:
        return [training]
    name = name_of(args.paper, args.data, (*at_training, *at_evaluation), seed)
    words = (*args.words, *at_evaluation)
    return [training, Job(args.paper, words, folder_of(args, name, commit), training)]


def split(paper, words):
    """A row's options -> (those of the training, those of the evaluation)."""
    at_training, at_evaluation = (), ()
    for name, _, said in papers.each_option(words):
        if name in papers.AT_EVALUATION[paper]:
            at_evaluation += said
        else:
            at_training += said
    return at_training, at_evaluation


def name_of(paper, data, words, seed):
    """The name of a run's folder: readable, and another one for other options or data."""
    if os.sep in data or data == ".":
        readable = [paper, Path(data).resolve().name]
    else:
        readable = [paper, papers.by_name(data)]
    place = "+".join(map(str, places(data, root_of(words))))
    words = without_free(words)
    readable += [word.removeprefix("--") for word in words]
    text = "-".join(readable)
    name = re.sub(r"[^\w.,+-]", "_", text)[:80]
    if name != text or os.sep in place:  # other folders may have the same name
        digest = hashlib.sha1(os.fsencode("\0".join([paper, place, *words]))).hexdigest()
        name += f"-{digest[:8]}"
    return f"{name}-seed{seed}"


def places(data, root):
    """What --data names, part by part: the folder, as `layouts.find` chooses it, or the name of a
    data set that is the same wherever it lies."""
    found = []
    for part in layouts.parts_of(data):
        if part in (*BENCHMARKS, "synth"):
            found.append(part)
        else:
            found.append((Path(part) if os.path.isdir(part) else root / part).resolve())
    return found


def root_of(words):
    """Where the data sets lie: as the scripts see it, to which these words go."""
    found = os.environ.get("AD_DATA")
    for i, word in enumerate(words):
        option, _, value = word.partition("=")
        if option == "--data-root":
            found = value or "".join(words[i + 1 : i + 2])
    return Path(found or "data")


def without_free(words):
    """The words without the options `FREE` and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = option_of(word) not in FREE
        if keep:
            kept.append(word)
    return kept


def option_of(word):
    """--no-save-maps, --save-maps=x -> save_maps."""
    name = word.partition("=")[0].removeprefix("--").removeprefix("no-")
    return name.replace("-", "_")


def folder_of(args, name, commit):
    """Where the run lies: that of this commit; with --any-commit perhaps that of another one."""
    own = args.runs / f"{name}@{commit}"
    if not args.any_commit:
        return own
    others = [path for path in args.runs.glob("*@*") if path.name.rpartition("@")[0] == name]
    others.sort(key=os.path.getmtime, reverse=True)
    for wanted in ("finished", "interrupted"):
        for folder in (own, *others):
            if Job("", (), folder).state == wanted:
                return folder
    return own


# -------------------------------------------------------------------------------- running commands


class Runner:
    """Runs commands, several at once, and remembers which of them failed.

    `after(training)` is called when a training and all that is asked of it are through.

    Attributes:
        failed: {folder: why}, one line each.
    """

    def __init__(self, at_once, after=lambda training: None):
        self.at_once, self.after, self.failed = at_once, after, {}
        self.children, self.stopped, self.lock = set(), False, threading.Lock()

    def run(self, chains, costs=()):
        """Run what is not finished.

        chains: as `joined` gives them. costs: trainings whose --flops is wanted too.

        Raises `KeyboardInterrupt` when interrupted, after the end of all commands that ran.
        """
        with ThreadPoolExecutor(self.at_once) as pool:
            tasks = []
            for training, evaluations in chains.items():
                task = pool.submit(self._chain, training, evaluations, training in costs)
                tasks.append(task)
            try:
                wait(tasks)
            except KeyboardInterrupt:
                self._stop()
                raise
        for task in tasks:
            task.result()  # raises what was raised there

    def _stop(self):
        """End what runs. Checkpoints are written in one piece, so that nothing is lost by it."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                child.terminate()

    def _chain(self, training, evaluations, costs):
        self._job(training)
        for evaluation in evaluations:
            if training.state == "finished":
                self._job(evaluation)
            elif not self.stopped:
                why = self.failed.get(training.folder, "it has no result")
                self.failed[evaluation.folder] = f"its training: {why}"
        if costs and training.state == "finished":
            self._costs(training)
        with self.lock:
            self.after(training)

    def _job(self, job):
        if self.stopped:
            return
        if job.state == "finished":
            self.say(f"finished before: {job.folder}")
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / ".table.lock", "wb") as lock:
            if fcntl:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    why = "another process runs it; the same command later takes it"
                    self._fail(job.folder, why)
                    return
            self._locked(job, lock)

    def _locked(self, job, lock):
        command, output = job.next_command(), job.folder / "output.txt"
        self.say(f"python {shlex.join(command)}")
        began = time.monotonic()
        status = self._wait(command, output, lock)
        if self.stopped:
            return
        if status == 0 and job.state == "finished":
            self.say(f"finished after {time.monotonic() - began:.0f} s: {job.folder}")
        elif status == 0:
            self._fail(job.folder, "it wrote no metrics.json")
        else:
            self._fail(job.folder, last_line(output) or f"exit status {status}")

    def _costs(self, training):
        """costs.txt: what the script's --flops prints."""
        path = training.folder / "costs.txt"
        if path.is_file():
            return
        unfinished = temporary_beside(path)
        try:
            status = self._wait(training.costs_command(), unfinished)
            if status == 0:
                unfinished.replace(path)
            elif not self.stopped:
                self._fail(training.folder, f"--flops: {last_line(unfinished)}")
        finally:
            unfinished.unlink(missing_ok=True)

    def _wait(self, command, output, lock=None):
        """Exit status of the command, after its end; what it prints is in the file `output`."""
        environment = dict(os.environ)
        if self.at_once > 1:
            environment["OMP_NUM_THREADS"] = "1"
        with open(output, "wb") as file:
            with self.lock:  # a child is either stopped by _stop or not started after it
                if self.stopped:
                    return None
                # The child keeps the lock too, so that it holds even if this process is killed.
                child = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[lock.fileno()] if lock and fcntl else [],
                )
                self.children.add(child)
            status = child.wait()
        with self.lock:
            self.children.remove(child)
        return status

    def _fail(self, folder, why):
        self.failed[folder] = why
        self.say(f"FAILED: {folder}: {why}")

    def say(self, text):
        print(text, flush=True)


def last_line(path):
    """The last line of a file that is not empty: a script's message, or a traceback's."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# ----------------------------------------------------------------------------------------- numbers


NEEDED = ("classes", "mean", "mixed", "commit", "versions")  # of metrics.json


def measured(job):
    """metrics.json of a finished run, with "costs" where its training knows them.

    Raises:
        UsageError: one of the two files is damaged.
    """
    result = read_json(job.folder / "metrics.json", NEEDED)
    path = (job.training or job).folder / "costs.txt"
    if path.is_file():
        result["costs"] = costs_of(path)
    return result


def costs_of(path):
    """The total in a file of what --flops prints -> {"params_m": millions, "flops_g": billions}."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        total, *_ = [line for line in lines if line.startswith("total")]
        parameters, operations = (int(word.replace(",", "")) for word in total.split()[1:3])
    except ValueError:
        raise UsageError(f"{path} is damaged: it has no total; delete it") from None
    return {"params_m": parameters / 1e6, "flops_g": operations / 1e9}


def check_finished(jobs):
    """Refuse a finished run that cannot be read: now, and not when all others are through."""
    for job in jobs:
        if job.state != "finished":
            continue
        try:
            measured(job)
            if job.training is None:
                preset_of(job)
        except UsageError as error:
            raise UsageError(f"{error}; without {job.folder} it is run anew") from None


def preset_of(training):
    """The preset of a finished training."""
    return read_json(training.folder / "args.json", ("preset",))["preset"]


def value(result, condition, place, metric):
    """One number of a run in the papers' units, per cent; None where it has none.

    result: `measured`. condition, place, metric: condition, class and metric as in papers.csv.
    """
    if metric in papers.COSTS:
        return result.get("costs", {}).get(metric)
    if condition == "ood":
        values = [value(result, name, place, metric) for name in SHIFTS]
        return None if None in values else statistics.mean(values)
    part = result
    if condition != "clean":
        part = result.get("shift", {}).get(condition, {})
    if place in ("mean", "mixed"):
        found = part.get(place, {})
    elif is_class(place):
        found = part.get("classes", {}).get(place, {})
    else:
        found = part.get("datasets", {}).get(place.removeprefix("mean "), {})
    number = found.get(metric)
    return None if number is None else 100 * number


def is_class(place):
    """Whether a class of papers.csv is one, not a mean or a pool."""
    return place not in ("mean", "mixed", "gain") and not place.startswith("mean ")


@dataclass(frozen=True)
class Column:
    """One column of the printed table; in the lines of a class, place "mean" means the class."""

    condition: str
    place: str
    metric: str

    def title(self, name_condition, name_place):
        parts = [COLUMNS[self.metric]]
        if name_place:
            parts.insert(0, self.place)
        if name_condition:
            parts.insert(0, self.condition.removesuffix(":3"))
        return " ".join(parts)


def columns_of(lines, metrics):
    """What a table has: conditions, means and pools of its lines, and of each the `metrics`."""
    views = {}
    for line in lines:
        place = line.cls if line.cls in ("mean", "mixed") or " " in line.cls else "mean"
        if line.cls != "gain":
            views.setdefault((line.condition, place), set()).update(line.values)
    columns = []
    for (condition, place), of_paper in views.items():
        for metric in metrics or [name for name in COLUMNS if name in of_paper]:
            columns.append(Column(condition, place, metric))
    return columns


class Table:
    """A finished table: the numbers of the runs and of the paper.

    Args:
        args: this command's. rows: list of `papers.Row`.
        chains: {row name: {seed: `chain_of`}} of the rows that are ours.
        failed: {folder: why}.
    """

    def __init__(self, args, rows, chains, failed):
        self.args, self.rows, self.chains, self.failed = args, rows, chains, failed
        self.lines = [line for row in rows for line in row.lines]
        self.columns = columns_of(self.lines, args.metrics)
        self.by_class = any(is_class(line.cls) for line in self.lines)
        data = papers.by_name(args.data)
        self.same_data = any(line.data == data for line in self.lines)
        self.paper_data = data if self.same_data else self.lines[0].data
        self.results = {}  # {row name: {seed: result}}
        for name, of_seed in chains.items():
            self.results[name] = {}
            for seed, chain in of_seed.items():
                if chain[-1].state == "finished":
                    self.results[name][seed] = measured(chain[-1])

    def classes(self):
        """The classes that have lines of their own: those of the runs, if the table has any."""
        for result in self._all_results():
            if self.by_class:
                return list(result["classes"])
        return []

    def _all_results(self):
        return [result for of_seed in self.results.values() for result in of_seed.values()]

    def why_missing(self, name):
        """Why the row has fewer results than seeds: list of lines."""
        found = []
        for seed, chain in self.chains.get(name, {}).items():
            reasons = [self.failed[job.folder] for job in chain if job.folder in self.failed]
            if reasons:
                found.append(f"{name}, seed {seed}: {reasons[0]}")
        return found

    def ours(self, name, column, cls=None):
        """{seed: number}; without the seeds for which it is undefined."""
        place, found = place_of(column, cls), {}
        for seed, result in self.results.get(name, {}).items():
            number = value(result, column.condition, place, column.metric)
            if number is not None:
                found[seed] = number
        return found

    def paper(self, row, column, cls=None):
        """(number, standard deviation or None) as printed, or None."""
        place = place_of(column, cls)
        for line in row.lines:
            if (line.data, line.condition, line.cls) != (self.paper_data, column.condition, place):
                continue
            if column.metric in line.values:
                return line.values[column.metric], line.spread.get(column.metric)
        return None

    # ------------------------------------------------------------------------------------- as text

    def title(self):
        about = papers.TABLES[self.args.paper][self.args.table]
        return f"{papers.TITLES[self.args.paper]}, Table {self.args.table}: {about}"

    def text(self):
        """All of it as Markdown that reads well on a terminal."""
        parts = [self.title(), self.setting(), self.grid()]
        missing = [line for row in self.rows for line in self.why_missing(row.name)]
        if missing:
            parts.append("Failed:\n" + "\n".join(f"- {line}" for line in missing))
        notes = self.notes()
        if notes:
            parts.append("On the paper's numbers:\n" + "\n".join(f"- {note}" for note in notes))
        return "\n\n".join(parts) + "\n"

    def notes(self):
        """What one must know of the paper's numbers, each once, with the rows that it is about."""
        rows_of_note = {}
        for line in self.lines:
            if line.note and line.data == self.paper_data and line.cls != "gain":
                rows = rows_of_note.setdefault(line.note, [])
                add_new(rows, line.row)
        return [f"{'; '.join(rows)}: {note}" for note, rows in rows_of_note.items()]

    def setting(self):
        """What one must know of the runs: a paragraph."""
        args, found = self.args, self.environment()
        preset = found["presets"] or [default_preset(args.data)]
        parts = [f"ours: {args.data}, {' and '.join(preset)} preset"]
        if args.words:
            parts.append(shlex.join(args.words))
        seeds = ", ".join(map(str, args.seeds))
        if len(args.seeds) > 1:
            parts.append(f"mean ± standard deviation of seeds {seeds}")
        else:
            parts.append(f"seed {seeds}")
        parts.append(f"commit {', '.join(found['commits']) or '-'}")
        for versions in found["versions"]:
            parts.append(f"torch {versions.get('torch')} on {versions.get('device')}")
        said = "; ".join(parts)
        if not self.same_data:
            said += f". The paper's numbers are of other data, {self.paper_data}"
        return said + "."

    def environment(self):
        """Commits, versions and presets of the runs, each once."""
        commits, versions, presets = [], [], []
        for result in self._all_results():
            add_new(commits, result["commit"] or "none")
            add_new(versions, result["versions"])
        for of_seed in self.chains.values():
            for training, *_ in of_seed.values():
                if training.state == "finished":
                    add_new(presets, preset_of(training))
        return {"commits": commits, "versions": versions, "presets": presets}

    def grid(self):
        """The table proper: for each row and class a line of ours and one of the paper."""
        name_condition = any(column.condition != "clean" for column in self.columns)
        name_place = any(column.place != "mean" for column in self.columns)
        heads = [column.title(name_condition, name_place) for column in self.columns]
        lines = [["row", "", *heads]]
        for row in self.rows:
            for cls in (*self.classes(), None):
                lines += self._of_row(row, cls)
        widths = [max(map(len, cells)) for cells in zip(*lines)]
        rule = ["-" * width for width in widths[:2]]
        rule += ["-" * (width - 1) + ":" for width in widths[2:]]  # numbers stand to the right
        return "\n".join(pipes(line, widths) for line in (lines[0], rule, *lines[1:]))

    def _of_row(self, row, cls):
        """One or two lines of cells; none for another method on other data."""
        name = row.name if cls is None else f"{row.name}, {cls}"
        paper = [printed(self.paper(row, column, cls)) for column in self.columns]
        from_paper = ["", f"paper, {self.paper_data}", *paper]
        in_paper = any(text != "-" for text in paper)
        if row.name not in self.chains:
            return [[name, *from_paper[1:]]] if self.same_data and in_paper else []
        ours = [cell(self.ours(row.name, column, cls)) for column in self.columns]
        lines = [[name, self._whose(row.name), *ours]]
        if in_paper:
            lines.append(from_paper)
        return lines

    def _whose(self, name):
        """ours, synth; and how many seeds are there, if not all."""
        text, there = f"ours, {Path(self.args.data).name}", len(self.results[name])
        if 0 < there < len(self.args.seeds):
            text += f", {there} of {len(self.args.seeds)} seeds"
        return text

    def commands(self):
        """{row name: its command lines, as a person would type them}."""
        found = {}
        for name, of_seed in self.chains.items():
            jobs = [job for chain in of_seed.values() for job in chain]
            found[name] = [f"python {shlex.join(job.command())}" for job in jobs]
        return found

    # ------------------------------------------------------------------------------------- as data

    def as_dict(self):
        """The content of table.json."""
        args, rows = self.args, []
        commands = self.commands()
        for row in self.rows:
            of_seed = self.chains.get(row.name, {})
            rows.append({
                "name": row.name,
                "options": None if row.options is None else list(row.options),
                "commands": commands.get(row.name, []),
                "folders": [str(chain[-1].folder) for chain in of_seed.values()],
                "failed": self.why_missing(row.name),
                "cells": self._cells(row),
            })
        return {
            "paper": args.paper,
            "table": args.table,
            "title": self.title(),
            "data": args.data,
            "paper_data": self.paper_data,
            "seeds": args.seeds,
            "words": list(args.words),
            **self.environment(),
            "rows": rows,
        }

    def _cells(self, row):
        """Every number of a row: list of dicts, in per cent."""
        found = []
        for cls in (*self.classes(), None):
            for column in self.columns:
                place, values = place_of(column, cls), self.ours(row.name, column, cls)
                paper = self.paper(row, column, cls)
                if not values and paper is None:
                    continue
                number, deviation = paper or (None, None)
                found.append({
                    "condition": column.condition,
                    "class": place,
                    "metric": column.metric,
                    "of_seed": values,
                    "mean": statistics.mean(values.values()) if values else None,
                    "deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "paper": number,
                    "paper_deviation": deviation,
                })
        return found


def place_of(column, cls):
    """Which class of papers.csv a column shows in the line of a class. (Tables by class have no
    other means and pools.)"""
    return column.place if cls is None else cls


def add_new(found, item):
    if item not in found:
        found.append(item)


def cell(numbers):
    """{seed: number} -> text."""
    if not numbers:
        return "-"
    values = numbers.values()
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text


def printed(number):
    """The paper's (number, deviation) -> text, with the digits that the paper prints."""
    if number is None:
        return "-"
    mean, deviation = number
    if deviation is not None:
        return f"{mean:.2f} ± {deviation:.2f}"
    return f"{mean:.2f}".removesuffix("0")  # 97.85 has two, 97.8 has one


def pipes(cells, widths):
    """One line of a Markdown table: the first two cells to the left, numbers to the right."""
    padded = []
    for i, (text, width) in enumerate(zip(cells, widths)):
        padded.append(text.ljust(width) if i < 2 else text.rjust(width))
    return "| " + " | ".join(padded) + " |"


# -------------------------------------------------------------------------------- the command line


def overview():
    """All tables, their rows and what they cost."""
    lines = []
    for paper, tables in papers.TABLES.items():
        lines += ["", f"{papers.TITLES[paper]:<63}{'rows':>6}{'trainings':>11}{'evaluations':>13}"]
        for table, about in tables.items():
            rows = [row for row in papers.rows(paper, table) if row.options is not None]
            shift = has_shifts(rows)
            trainings = {split(paper, row.options)[0] for row in rows}
            evaluations = {row.options for row in rows if shift or split(paper, row.options)[1]}
            counts = f"{len(rows):>6}{len(trainings):>11}{len(evaluations):>13}"
            lines.append(f"  {f'{paper} {table}':<12}{about:<49}{counts}")
    minutes = ", ".join(f"{paper} {count}" for paper, count in MINUTES.items())
    lines += [
        "",
        "A training with the laptop preset takes minutes on two CPU cores: " + minutes + ".",
        "The papers' settings (--data mvtec, visa, btad, realiad) need a GPU. Trainings are shared",
        "between tables.",
        "The rows of a paper: python -m common.tables PAPER",
        "A table: python -m common.tables PAPER TABLE --data DATA --seeds 0,1,2 (see --help)",
    ]
    return "\n".join(lines[1:])


def rows_of(paper):
    """The rows of all tables of a paper, with their options."""
    lines = []
    for table, about in papers.TABLES[paper].items():
        lines += ["", f"{paper} {table}: {about}"]
        for row in papers.rows(paper, table):
            if row.options is not None:
                options = shlex.join(row.options) or "(no options)"
                lines.append(f"  {row.name:<44}{options}")
    return "\n".join(lines[1:])


def has_shifts(rows):
    """Whether a table has numbers under shifts."""
    return any(line.condition != "clean" for row in rows for line in row.lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not the whole usage
        raise UsageError(f"{message} (--help explains every option)")


def parse(argv):
    """The command line -> namespace; `words` is what stands after --."""
    own, words = argv, []
    if "--" in argv:
        at = argv.index("--")
        own, words = argv[:at], argv[at + 1 :]
    parser = _Parser(
        prog="python -m common.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("paper", nargs="?", help=f"{', '.join(papers.TITLES)}; without it: what there is")
    add("table", nargs="?", help="number of the table; without it: the paper's rows")
    add("--data", default="synth", help="as for the scripts (default: %(default)s)")
    add("--seeds", default="0", help="one training each, such as 0,1,2 (default: %(default)s)")
    add("--metrics", default="", help="columns, such as p_ap,p_aupro (default: the paper's)")
    add("--jobs", type=int, default=1, help="commands at once, one thread each if above 1")
    add("--any-commit", action="store_true", help="reuse runs of other commits as well")
    add("--dry-run", action="store_true", help="run nothing: print commands, show what there is")
    add("--runs", type=Path, default=Path("runs/tables/runs"), help="folder of the runs")
    add("--out", type=Path, help="folder of the result (default: runs/tables/PAPER-TABLE-DATA)")
    args = parser.parse_args(own)
    args.words = tuple(words)
    return args


def check(args):
    """Refuse what cannot be, before anything runs, and turn texts into values."""
    if args.paper not in papers.TITLES:
        raise UsageError(f"'{args.paper}' is no paper here; choose {', '.join(papers.TITLES)}")
    if args.table is None:
        return
    if args.table not in papers.TABLES[args.paper]:
        there = ", ".join(papers.TABLES[args.paper])
        raise UsageError(f"{args.paper} has no Table {args.table}; it has {there}")
    args.seeds = seeds_of(args.seeds)
    args.metrics = [name for name in args.metrics.split(",") if name]
    for name in args.metrics:
        if name not in COLUMNS:
            raise UsageError(f"--metrics {name}: choose from {', '.join(COLUMNS)}")
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: must be at least 1")
    if args.out is None:
        data = Path(args.data).resolve().name
        args.out = Path("runs/tables") / f"{args.paper}-{args.table}-{data}"
    for name, folder in (("--runs", args.runs), ("--out", args.out)):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{name} {folder} is a file; name a folder")
    if args.dry_run:
        return
    for part in layouts.parts_of(args.data):
        if part != "synth":  # which is drawn where it is missing
            layouts.find(part, root_of(args.words))


def seeds_of(text):
    """0,1,2 -> [0, 1, 2], each once."""
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UsageError(f"--seeds {text}: must be whole numbers, such as 0,1,2")
    return list(dict.fromkeys(int(seed) for seed in seeds))


def check_words(args, rows):
    """Refuse what, after --, would make the rows other rows."""
    varied = {}
    for row in rows:
        varied |= papers.settings(row.options)
    for word in args.words:
        if not word.startswith("--"):
            continue
        if option_of(word) in OWN_WORDS:
            raise UsageError(f"{word} after --: this command sets it itself")
        if option_of(word) in varied:
            raise UsageError(f"{word} after --: Table {args.table} varies it, row by row")


def main(argv=None):
    """Returns the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.paper is None:
        print(overview())
        return 0
    check(args)
    if args.table is None:
        print(rows_of(args.paper))
        return 0
    rows = papers.rows(args.paper, args.table)
    possible = [row for row in rows if row.options is not None]
    check_words(args, possible)
    commit = current_commit() or "none"
    shift, chains = has_shifts(possible), {}
    for row in possible:
        chains[row.name] = {}
        for seed in args.seeds:
            chains[row.name][seed] = chain_of(row, seed, shift, args, commit)
    for training, evaluations in joined(chains).items():
        check_finished((training, *evaluations))
    if args.dry_run:
        print_commands(chains)
        print(f"\n{Table(args, rows, chains, {}).text()}", end="")
        return 0
    warn_of_changes(commit)
    args.out.mkdir(parents=True, exist_ok=True)  # before the hours of the runs
    failed = run(args, possible, chains)
    table = Table(args, rows, chains, failed)
    print(f"\n{table.text()}", end="")
    write(args, table)
    return 1 if failed else 0


def print_commands(chains):
    """What would be run, and what is there already."""
    for training, evaluations in joined(chains).items():
        for job in (training, *evaluations):
            print(f"{job.state}: python {shlex.join(job.next_command())}")


def warn_of_changes(commit):
    if commit.endswith("+"):
        text = "its uncommitted changes are not looked at: all runs of it count as of one code"
        print(f"warning: checkout {commit}: {text}", file=sys.stderr)


def run(args, rows, chains):
    """Run what is not finished. Returns {folder: why} of what failed."""
    columns = columns_of([line for row in rows for line in row.lines], args.metrics)
    costs = []
    if any(column.metric in papers.COSTS for column in columns):  # the same for all seeds
        costs = [of_seed[args.seeds[0]][0] for of_seed in chains.values()]
    runner = Runner(args.jobs)
    runner.run(joined(chains), costs)
    return runner.failed


def joined(chains):
    """{row name: {seed: `chain_of`}} -> every training once, {training: [its evaluations]}."""
    found = {}
    for of_seed in chains.values():
        for training, *evaluations in of_seed.values():
            known = found.setdefault(training, [])
            known += [job for job in evaluations if job not in known]
    return found


def write(args, table):
    """table.md and table.json; what is no UTF-8 in a file name is \\udc.. there, as in JSON."""
    text = table.text()
    for name, lines in table.commands().items():
        text += f"\n{name}\n\n" + "".join(f"    {line}\n" for line in lines)
    write_atomic(args.out / "table.md", f"# {text}".encode(errors="backslashreplace"))
    content = json.dumps(table.as_dict(), indent=1, ensure_ascii=False) + "\n"
    write_atomic(args.out / "table.json", content.encode(errors="backslashreplace"))
    print(f"\n{args.out}: table.md, table.json")


def launch():
    """The command: a user's mistake is one line on stderr and exit status 2."""
    return ended("tables", main)


def ended(name, main):
    """The exit status of main() of a command of this name that runs commands."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the commands too
    try:
        return main()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # see `exit_with`
        raise
    except OSError as error:
        print(f"{name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    exit_with(launch)
