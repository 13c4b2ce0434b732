"""Do two checkouts of this repository compute the same, to the bit? A tool for rewriting.

    git worktree add ../before COMMIT
    python tests/same_results.py ../before . [--only roads]

Every script, every base of cada.py, and cada.py --base-run are run in both checkouts: tiny, on the
same drawn images, with the same seed and one thread. Each case has six modes:

    cached     frozen features computed once; a process started from the shell
    uncached   features computed at every step (--memory-share 0), with some other options
    resumed    killed while it writes a checkpoint, then --resume
    two        two processes
    eval       --eval of the checkpoint of `cached`, under the four shifts
    predict    --predict with it

Compared are all metrics, the log's losses, the images' scores, the kept maps, and every tensor of
the checkpoint but the optimizer's; not times, versions and commits. One line is printed for each
comparison, and the exit status is 1 if one shows a difference; the runs then stay where the last
line says.

The checkouts may differ in their words: an option that only one of them has is left out for both (a
line says so), a key that only one side has is not compared, and a tensor of the checkpoint may have
another name, if it is there.

A full pass takes 3 minutes of one core. pytest does not run it.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch

import numpy as np
import torch

# What the scripts import takes seconds. Here it is imported once; the forks have it.
for module in ("scipy.ndimage", "scipy.signal", "torch.distributed", "triton"):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)

SECONDS = 600  # a run that takes longer hangs, and is ended
MODES = ("cached", "uncached", "resumed", "two", "eval", "predict")
TIMES = {"images_per_s", "seconds"}  # keys of the log and of the checkpoint
TENSOR = "tensor"  # first word of the text that stands for one

COMMON = """
    --classes screw,hex_nut,terrazzo --image-size 64 --seed 3 --device cpu --workers 0 --amp off
    --kernels torch --batch-size 4 --log-every 1 --checkpoint-every 2"""
HEAD = """
    --calibrate cada --calibration-steps 6 --calibration-batch 4 --calibration-lr 0.05
    --calibration-schedule cosine --regressor 1+2 --head-kernel 1 --dropout 0.25 --statistic max
    --alpha 0.1 --score top1"""
PYRAMID = """
    --backbone efficientnet_lite0 --depths 1,1,1,1 --steps 6 --lr 2e-3 --schedule step
    --lr-drop 0.2 --weight-decay 1e-5 --clip 0 --smoothing 5""" + HEAD


@dataclass
class Case:
    """One script with its options.

    also: {mode: further options}, so that the modes reach different branches.
    kills: the sessions of `resumed` die while they write these checkpoints.
    base: the case whose cached run --base-run reads.
    """

    script: str
    options: str
    also: dict = field(default_factory=dict)
    kills: tuple = (2,)
    base: str = ""


CASES = {
    "onenip": Case("onenip.py", """
        --backbone efficientnet_lite0 --hidden 32 --heads 4 --mlp 64 --encoder-layers 1
        --decoder-layers 2 --refiner-width 16 --dropout 0.1 --steps 6 --lr 1e-3 --schedule cosine
        --weight-decay 1e-4 --clip 0.1 --jitter 2 --bank 2 --loss-weights code --dice paper
        --alpha 0.2 --pool 16 --prompt dynamic""",
        also={"uncached": "--bank 0 --dice code"}),
    "omniad": Case("omniad.py", """
        --backbone efficientnet_lite0 --depths 1,1,1,1 --tokens 16 --heads 4 --steps 6 --lr 1e-3
        --schedule cosine --weight-decay 1e-4 --clip 0.1 --jitter 0 --sigma 4 --score top1""",
        also={"uncached": "--jitter 2 --score max", "resumed": "--jitter 2 --standardize"}),
    "roads": Case("roads.py", """
        --backbone efficientnet_lite0 --depths 1,1,1,1 --tokens 4 --adapter style
        --adapter-backbone efficientnet_lite0 --adapter-size 64 --steps 6 --lr 2e-3
        --adapter-lr 1e-4 --schedule cosine --distance location --ood-severity 3 --sigma 4""",
        also={"uncached": "--distance flat", "resumed": "--schedule step"}),
    "revdist": Case("cada.py", "--base revdist --cosine flat" + PYRAMID, kills=(2, 4),
        also={"uncached": "--cosine location --statistic std", "eval": "--calibrate given"}),
    "recontrast": Case("cada.py", "--base recontrast --encoder-lr 1e-5" + PYRAMID, kills=(2, 4),
        also={"uncached": "--regressor 0+2", "eval": "--calibrate classifier"}),
    "uniad": Case("cada.py", """
        --base uniad --backbone efficientnet_lite0 --hidden 32 --heads 4 --mlp 64 --layers 1
        --attention-dropout 0.1 --jitter 2 --steps 6 --lr 1e-3 --schedule cosine
        --weight-decay 1e-4 --clip 0.1 --smoothing 5""" + HEAD, kills=(2, 4),
        also={"uncached": "--statistic score", "eval": "--statistic score"}),
    "base-run": Case("cada.py", "--smoothing 0" + HEAD, base="omniad"),
}


class Failed(Exception):
    """A run ended otherwise than it should; the message says how."""


# ------------------------------------------------------------------------------------------- runs


class Checkout:
    """One of the two checkouts, and the folder in which its runs lie."""

    def __init__(self, root, work):
        self.root, self.work = root, work
        self.work.mkdir()
        self.known = {}  # script -> its options

    def command(self, output, *words):
        """Start Python as a user does; what it prints goes to the file `output`."""
        command = [sys.executable, *map(str, words)]
        with open(self.work / output, "w") as file:
            done = subprocess.run(command, cwd=self.root, timeout=SECONDS, stdin=subprocess.DEVNULL,
                                  stdout=file, stderr=subprocess.STDOUT)
        self.expect(output, 0, [done.returncode])

    def fork(self, output, *words, status=0, kill=0, world=1):
        """The same without the seconds of importing torch: the script runs in a fork of this
        process, or in two, which have the variables that torchrun sets.

        kill: the fork dies by SIGKILL when it is about to put its checkpoint number `kill` in
        place. That one is then written in part, the one before is complete, and the log is
        ahead of it.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(word) for word in words]
        forks = []
        for rank in range(world):
            variables = {}
            if world > 1:
                variables = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank),
                             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            file = self.work / output
            if rank > 0:
                file = self.work / f"{rank}-{output}"
            fork = multiprocessing.get_context("fork").Process(
                target=run_in_fork, args=(self.root, words, variables, kill, file))
            fork.start()
            forks.append(fork)
        for fork in forks:
            fork.join(SECONDS)
            if fork.is_alive():
                fork.kill()
                fork.join()
        self.expect(output, status, [fork.exitcode for fork in forks])

    def expect(self, output, status, found):
        if any(code != status for code in found):
            lines = (self.work / output).read_text().splitlines() or ["no output"]
            raise Failed(f"{self.root}: ended with {found}, not {status}: {lines[-1]}")

    def options(self, script):
        """The options that --help names."""
        if script not in self.known:
            output = f"help-{script}.txt"
            self.fork(output, self.root / script, "--help")
            help_text = (self.work / output).read_text()
            self.known[script] = set(re.findall(r"--[a-z][a-z0-9-]*", help_text))
        return self.known[script]

    def run(self, name, mode, words, data):
        """Run a case in one mode; returns the folder of the run."""
        case = CASES[name]
        script, output = self.root / case.script, f"{name}-{mode}.txt"
        out = self.work / f"{name}-{mode}"
        checkpoint = self.work / f"{name}-cached" / "checkpoint.pt"
        places = ["--out", out]
        if case.base:
            places += ["--base-run", self.work / f"{case.base}-cached"]
        if mode == "cached":
            self.command(output, script, *words, *places, "--data", data, "--save-maps")
        elif mode == "uncached":
            self.fork(output, script, *words, *places, "--data", data, "--memory-share", 0)
        elif mode == "two":
            self.fork(output, script, *words, *places, "--data", data, world=2)
        elif mode == "resumed":
            session = [*words, "--data", data]
            for number in case.kills:
                self.fork(output, script, *session, *places, status=-signal.SIGKILL, kill=number)
                session = ["--resume"]
            self.fork(output, script, *session, *places)
        elif mode == "eval":
            shift = [] if case.base else ["--shift", "all"]  # a recorded base has only its own maps
            self.fork(output, script, *words, *places, "--eval", checkpoint, *shift)
        elif mode == "predict":
            pictures = data / "hex_nut" / "test"
            self.fork(output, script, *words, *places, "--eval", checkpoint, "--predict", pictures)
        return out


def run_in_fork(root, words, variables, kill, output):
    """The life of a forked process: the script words[0], as if Python had been started with it."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    os.chdir(root)
    sys.path[0], sys.argv = str(root), words
    if kill:
        os.replace = replace_or_die(kill)
    runpy.run_path(words[0], run_name="__main__")


def replace_or_die(number):
    """os.replace, but the process is killed when checkpoint `number` of this session is due."""
    replace = os.replace
    checkpoints = 0

    def function(source, target):
        nonlocal checkpoints
        if Path(target).name == "checkpoint.pt":
            checkpoints += 1
            if checkpoints == number:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    return function


def options_of(name, mode):
    """[(option, its values)] of a case in a mode; of an option that comes twice the later holds."""
    case = CASES[name]
    text = COMMON + " " + case.options + " " + case.also.get(mode, "")
    if mode in ("eval", "predict"):  # the rest comes from the checkpoint
        text = case.also.get(mode, "")
    pairs = []
    for part in text.split():
        if part.startswith("--"):
            pairs.append((part, []))
        else:
            pairs[-1][1].append(part)
    if case.base:  # that run has chosen these
        pairs = [pair for pair in pairs if pair[0] not in ("--classes", "--image-size")]
    return pairs


# ------------------------------------------------------------------------------------ comparisons
# Each returns the number of equal values and the names of the different ones.


def leaves(value, name=""):
    """Yield (name, leaf) of nested dictionaries and lists; of a tensor or array the leaf is a text
    with dtype, shape and a digest of the bytes."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}/{i}")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        yield name, f"{TENSOR} {array.dtype} {array.shape} {digest}"
    else:
        yield name, value


def compare(old, new):
    """All leaves that both have."""
    old, new = dict(leaves(old)), dict(leaves(new))
    shared = [name for name in old if name in new]
    different = [name for name in shared if repr(old[name]) != repr(new[name])]  # repr: NaN is NaN
    return len(shared) - len(different), different


def compare_metrics(old, new):
    """metrics.json: every value of OLD's results, and the numbers that both settings have."""
    results, settings = [], []
    for folder in (old, new):
        content = json.loads((folder / "metrics.json").read_text())
        parts = ("classes", "mean", "mixed", "shift", "compare")
        results.append({part: content[part] for part in parts if part in content})
        settings.append({key: value for key, value in content["setting"].items()
                         if isinstance(value, (int, float))})
    equal, different = compare(*results)
    names = [{name for name, _ in leaves(result)} for result in results]
    gone = [name for name in names[0] - names[1] if "/setting/" not in name]
    equal_settings, different_settings = compare(*settings)
    different += [f"{name} (only OLD has it)" for name in sorted(gone)] + different_settings
    return equal + equal_settings, different


def compare_logs(old, new):
    """log.jsonl: as many lines, the same steps, losses and learning rates."""
    logs = []
    for folder in (old, new):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for line in lines:
            for key in TIMES & line.keys():
                del line[key]
        logs.append(lines)
    if len(logs[0]) != len(logs[1]):
        return 0, [f"{len(logs[0])} lines in OLD, {len(logs[1])} in NEW"]
    if not all({"step", "loss"} <= line.keys() for line in logs[0] + logs[1]):
        return 0, ["a line without step or loss"]
    return compare(*logs)


def compare_tables(old, new):
    """scores.csv or predictions.csv: row by row, the columns that both have."""
    tables = []
    for path in (old, new):
        with open(path) as file:
            tables.append(list(csv.DictReader(file)))
    if len(tables[0]) != len(tables[1]):
        return 0, [f"{len(tables[0])} rows in OLD, {len(tables[1])} in NEW"]
    return compare(*tables)


def compare_checkpoints(old, new):
    """checkpoint.pt: each tensor of OLD, by its name or another; other values that both have."""
    states = []
    for folder in (old, new):
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        states.append({key: state[key] for key in state.keys() - TIMES - {"optimizer", "args"}})
    equal, different = compare(*states)
    old, new = (dict(leaves(state)) for state in states)
    spare = Counter(new[name] for name in new.keys() - old.keys())
    for name in sorted(old.keys() - new.keys()):
        if not str(old[name]).startswith(TENSOR):
            continue
        if spare[old[name]] > 0:
            spare[old[name]] -= 1
            equal += 1
        else:
            different.append(f"{name} (NEW has no such tensor)")
    return equal, different


def compare_maps(old, new):
    """maps/: the arrays of every file of OLD."""
    equal, different = 0, []
    for path in sorted((old / "maps").rglob("*.npz")):
        other = new / path.relative_to(old)
        if not other.is_file():
            different.append(f"{path.name} (only OLD has it)")
            continue
        with np.load(path) as old_arrays, np.load(other) as new_arrays:
            equal_arrays, different_arrays = compare(dict(old_arrays), dict(new_arrays))
        equal += equal_arrays
        different += [path.name + name for name in different_arrays]
    return equal, different


def comparisons(mode, old, new):
    """Yield (what, equal, different) for two folders of runs."""
    if mode == "predict":
        name = "predictions.csv"
        yield name, *compare_tables(old / name, new / name)
        return
    yield "metrics.json", *compare_metrics(old, new)
    yield "scores.csv", *compare_tables(old / "scores.csv", new / "scores.csv")
    if mode != "eval":
        yield "log.jsonl", *compare_logs(old, new)
        yield "checkpoint.pt", *compare_checkpoints(old, new)
    if mode == "cached":
        yield "maps/", *compare_maps(old, new)


# ------------------------------------------------------------------------------------------- main


def check(name, mode, checkouts, data):
    """Run a case in one mode in both checkouts; print, and return whether all is equal."""
    script = CASES[name].script
    folders, words = [], []
    try:
        known = checkouts[0].options(script) & checkouts[1].options(script)
        for option, values in options_of(name, mode):
            if option in known:
                words += [option, *values]
            else:
                print(f"{name:<11}{mode:<9}{option} is left out: one checkout does not have it")
        for checkout in checkouts:
            folders.append(checkout.run(name, mode, words, data))
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"{name:<11}{mode:<9}FAILED: {error}", flush=True)
        return False
    good = True
    for what, equal, different in comparisons(mode, *folders):
        verdict = f"equal, {equal} values"
        if different:
            total = equal + len(different)
            verdict = f"DIFFERENT, {len(different)} of {total} values: {', '.join(different[:3])}"
        elif equal == 0:
            verdict = "NOTHING to compare"
        print(f"{name:<11}{mode:<9}{what:<16}{verdict}", flush=True)
        good &= equal > 0 and not different
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="checkout of the commit before")
    parser.add_argument("new", type=Path, help="checkout of the commit after")
    parser.add_argument("--only", choices=CASES, help="only this case")
    args = parser.parse_args()
    for root in (args.old, args.new):
        if not (root / "common" / "runtime.py").is_file():
            parser.error(f"{root}: not a checkout of this repository")
    work = Path(tempfile.mkdtemp(prefix="same-results-"))
    checkouts = [Checkout(args.old.resolve(), work / "old"),
                 Checkout(args.new.resolve(), work / "new")]
    size = "--train 5 --test-good 3 --test-bad 3 --size 64 --seed 0".split()
    checkouts[0].command("drawn.txt", "-m", "common.synth", "--out", work / "drawn", *size)

    runs = [(name, mode) for name in CASES for mode in MODES]
    runs.remove(("base-run", "predict"))  # there is no base that could score new images
    if args.only:
        needed = [(CASES[args.only].base, "cached")]  # what --base-run reads
        runs = [run for run in runs if run[0] == args.only or run in needed]
    good = True
    for name, mode in runs:
        good &= check(name, mode, checkouts, work / "drawn")
    if not good:
        print(f"not all equal; the runs are in {work}")
        return 1
    shutil.rmtree(work)
    print("all equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
