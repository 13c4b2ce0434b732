"""What every method's script must keep, whatever it computes: checks that the tests of all scripts call.

`finished` is a run of the eight tiny classes (7 test images each) with --save-maps: (its folder, the finished process).
"""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from common import runtime

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"i_auroc", "i_ap", "i_f1max", "p_auroc", "p_ap", "p_f1max", "p_aupro", "mad"}


def read_log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def first_run(script, words, folder):
    """One small run through the real command line, in a process of its own and from another folder: what the checks
    below call `finished`."""
    words = [sys.executable, script.__file__, *words, "--out", folder / "first", "--save-maps"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "first", done


def check_files(finished, method):
    """Every file of the contract is there, and the table's numbers follow from scores.csv and the maps.

    Returns metrics.json, the log's lines, the checkpoint, and {class: (its maps.npz, [(label, score)])} for what only
    the method's own test can judge.
    """
    out, done = finished
    result = json.loads((out / "metrics.json").read_text())
    assert set(result) - {"shift", "compare", "problems"} == {
        "method", "data", "setting", "classes", "mean", "mixed", "paper", "images", "seconds", "speed", "versions",
        "seed", "commit"}
    assert result["versions"]["amp"] in ("off", "bf16")  # what --amp auto has become
    for speed in result["speed"].values():
        assert speed["images_per_s"] > 0 and 0 <= speed["data_wait"] <= 1
    assert result["method"] == method and result["images"] == 8 * 7 and result["paper"] is None
    assert len(result["classes"]) == 8
    for row in [*result["classes"].values(), result["mean"], result["mixed"]]:
        assert set(row) == METRICS and all(0 <= v <= 1 for v in row.values())
    for key in METRICS:
        assert result["mean"][key] == pytest.approx(np.mean([row[key] for row in result["classes"].values()]))
    rows = list(csv.DictReader(open(out / "scores.csv")))
    assert list(rows[0]) == ["path", "class", "label", "score"] and len(rows) == 8 * 7
    kept = {}
    for name, row in result["classes"].items():
        scores = [(int(r["label"]), float(r["score"])) for r in rows if r["class"] == name]
        maps = np.load(out / "maps" / f"{name}.npz")
        assert row["i_auroc"] == pytest.approx(roc_auc_score(*zip(*scores)))
        assert row["p_auroc"] == pytest.approx(roc_auc_score(maps["masks"].ravel(), maps["maps"].ravel()))
        assert maps["labels"].tolist() == [label for label, _ in scores]
        assert len(maps["features"]) == 7 and np.isfinite(maps["features"]).all()
        train = np.load(out / "maps" / "train" / f"{name}.npz")
        assert train["maps"].shape[1:] == maps["maps"].shape[1:] and len(train["features"]) == len(train["scores"]) == 6
        kept[name] = maps, scores
    for name in ["overview", *result["classes"]]:
        assert min(Image.open(out / "pictures" / f"{name}.png").size) > 100
    assert "mixed" in done.stdout and f"{100 * result['mean']['i_auroc']:.1f}" in done.stdout
    assert done.stderr == "", "progress bars are silent when stderr is no terminal"
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    if "normal_score" in state:  # the thresholds of --predict are those of all training images, here 48
        train = [np.load(path) for path in sorted((out / "maps" / "train").glob("*.npz"))]
        scores = np.concatenate([part["scores"] for part in train])
        peaks = np.concatenate([part["maps"].max((1, 2)) for part in train])
        assert state["normal_score"] == pytest.approx(np.quantile(scores, 0.99), rel=1e-3)
        assert state["pixel_threshold"] == pytest.approx(np.quantile(peaks, 0.99), rel=1e-3)
    return result, read_log(out), state, kept


class Parallel(torch.nn.Module):
    """In the place of DistributedDataParallel: counts what goes through it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


def check_every_step_is_parallel(script, words, calls, out, command, monkeypatch):
    """Every step goes through what `wrap` made, or the ranks of torchrun would train models of their own, unseen.

    calls: how many of each training there are, in the run of `words`.
    """
    made = []

    def wrap(run, model):
        made.append(Parallel(model))
        return model, made[-1]

    monkeypatch.setattr(runtime.Run, "wrap", wrap)
    done = command(script.__name__, *words, "--out", out)
    assert done.status == 0, done.err
    assert [parallel.calls for parallel in made] == calls


# Dies by SIGKILL when the second checkpoint is due: the log is ahead of the first one.
DIES = """
import os, runpy, signal, sys
sys.path.insert(0, sys.argv[1])
from common import runtime
save, saved = runtime.Run.save, []
def save_or_die(self, state, *rest):
    saved.append(state["step"])
    if len(saved) == 2:
        self.finish_saving()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, state, *rest)
runtime.Run.save = save_or_die
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check_killed_and_resumed(script, words, finished, out, command, metrics_of):
    """The run of `words` ends by SIGKILL between its first checkpoint and its second; --resume then gives the numbers,
    the log and the weights of `finished`, the same run uninterrupted."""
    words = [*map(str, words), "--out", str(out)]
    program = [sys.executable, "-c", DIES, ROOT, script.__file__]
    assert subprocess.run([*program, *words], stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < read_log(finished[0])[-1]["step"] and state["finished"] == []
    assert not (out / "metrics.json").exists()
    refused = command(script.__name__, *words)
    assert refused.status == 2 and "--resume" in refused.err
    assert command(script.__name__, "--out", out, "--resume").status == 0
    assert metrics_of(out) == metrics_of(finished[0])
    losses = [[(line["step"], line["loss"]) for line in read_log(folder)] for folder in (out, finished[0])]
    assert losses[0] == losses[1]
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (out, finished[0]))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_predict(script, columns, finished, tiny_data, out, command):
    """Scores and heat-maps of unlabelled images, without the training data; a score equals the evaluation's. What is no
    image costs its own row only, and the status. columns: the method's own."""
    chosen, folder = list(csv.DictReader(open(finished[0] / "scores.csv")))[3], tiny_data / "screw" / "train"
    out.parent.mkdir(exist_ok=True)
    broken = out.parent / "text.png"
    broken.write_text("no picture")
    words = ("--eval", finished[0] / "checkpoint.pt", "--predict", chosen["path"], broken, folder, "--out", out)
    done = command(script.__name__, *words)
    assert done.status == 1 and "text.png" in done.err and done.err.count("\n") == 1
    written = list(csv.DictReader(open(out / "predictions.csv")))
    assert list(written[0]) == ["path", "score", "ratio", "verdict", *columns, "reason"] and len(written) == 8
    assert float(written[0]["score"]) == pytest.approx(float(chosen["score"]), rel=1e-4)
    normal = torch.load(finished[0] / "checkpoint.pt", weights_only=True).get("normal_score")
    if normal:  # OneNIP's follows from the options of the evaluation
        assert float(written[0]["ratio"]) == pytest.approx(float(written[0]["score"]) / normal)
    assert [bool(row["score"]) for row in written] == [bool(not row["reason"]) for row in written]
    assert [row["path"] for row in written if row["reason"]] == [str(broken)]
    assert len(list((out / "pictures").rglob("*.png"))) == 7 and (out / "predictions.html").is_file()


def check_good_images_only(script, words, tiny_data, folder, command):
    """A folder of nothing but good images: trained but for those held out, whose scores set the threshold; then
    pictures are predicted. words: of a small run, without its data."""
    home = folder / "mine"
    shutil.copytree(tiny_data / "screw" / "train" / "good", home / "screws")
    done = command(script.__name__, *words, "--data", home, "--out", folder / "run")
    assert done.status == 0, done.err
    assert done.err == "" and str(home) in done.out.splitlines()[0] and "--predict" in done.out.splitlines()[-1]
    assert not (folder / "run" / "metrics.json").exists()
    found = json.loads((folder / "run" / "threshold.json").read_text())
    rows = list(csv.DictReader(open(folder / "run" / "scores.csv")))
    assert found["held out"] == len(rows) == 1 and found["method"] == script.__name__
    checkpoint = folder / "run" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["normal_score"] == found["threshold"] == float(rows[0]["score"])
    done = command(script.__name__, "--eval", checkpoint, "--predict", rows[0]["path"], home, "--out", folder / "p")
    assert done.status == 0, done.err
    first = next(csv.DictReader(open(folder / "p" / "predictions.csv")))
    assert first["path"] == rows[0]["path"] and float(first["score"]) == pytest.approx(found["threshold"], rel=1e-4)
    if found["threshold"] > 0:  # else no ratio would tell anything
        assert float(first["ratio"]) == pytest.approx(1, rel=1e-4), "to the threshold of the held-out images"
    refused = command(script.__name__, *words, "--data", home, "--out", folder / "run")
    assert refused.status == 2 and "a finished run" in refused.err
    refused = command(script.__name__, *words, "--data", home, "--out", folder / "q", "--shift", "all")
    assert refused.status == 2 and "--shift needs test images" in refused.err


def check_features_on_the_fly(script, words, folder, command):
    """Without memory for frozen features they come from the images at every step: the same training within rounding."""
    for share in (0.5, 0):
        assert command(script.__name__, *words, "--memory-share", share, "--out", folder / str(share)).status == 0
    a, b = ([line["loss"] for line in read_log(folder / str(share))] for share in (0.5, 0))
    assert a == pytest.approx(b, rel=1e-3)


def check_bad_input(script, cases, small, finished, folder, command):
    """Each case, (words, what its message must name), ends in one line and status 2; nothing is half-written or lost.

    small: the words of a small run; what a case says comes after them, and wins.
    """
    before = (finished[0] / "metrics.json").read_bytes()
    for i, (words, named) in enumerate(cases):
        out = () if "--out" in words else ("--out", folder / f"out{i}")
        done = command(script.__name__, *out, *(() if {"--eval", "--resume"} & set(words) else small), *words)
        assert done.status == 2, (words, done)
        lines = [line for line in done.err.splitlines() if not line.startswith("problem: ")]  # of the data
        assert named in done.err and len(lines) == 1 and "Traceback" not in done.err, (words, done.err)
        assert not list((folder / f"out{i}").glob("metrics.json")) and not list(folder.rglob("*.tmp")), words
    assert (finished[0] / "metrics.json").read_bytes() == before
