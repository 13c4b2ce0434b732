"""The simplest detector: its distances against scipy's search, its memory, and the program through its command line."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from common import data, runtime
from docs import nearest

SMALL = "--image-size", 64, "--patches", 40


@pytest.fixture(scope="module")
def words(tiny_data):
    return ("--data", tiny_data, *SMALL)


@pytest.fixture(scope="module")
def filled(tiny_data, tmp_path_factory):
    """The parts of a run on two classes: args, features, memory, and its Scorer."""
    args = nearest.Args(image_size=64, patches=40, out=str(tmp_path_factory.mktemp("filled")))
    dataset = data.load(str(tiny_data), classes=["screw", "terrazzo"])
    images = data.Images(dataset.train, 64)
    run = runtime.Run("nearest", tmp_path_factory.mktemp("run"), torch.device("cpu"))
    features = nearest.Features(args)
    memory = nearest.Memory(2, args.patches, features.channels)
    nearest.fill(args, run, features, memory, images, dataset.classes)
    return dataset, images, nearest.Scorer(args, run, features, memory, dataset.classes)


def scores_of(folder):
    return {row["path"]: float(row["score"]) for row in csv.DictReader(open(folder / "scores.csv"))}


def test_memory_holds_patches_of_its_class(filled):
    """Every remembered patch is one of its own class's training images; none is there twice while there are others."""
    dataset, images, score = filled
    for number, name in enumerate(dataset.classes):
        batch = torch.stack([images[i] for i, s in enumerate(images.samples) if s.cls == name])
        found = score.features(batch).flatten(2).transpose(1, 2)  # (6, 64, C)
        patches = score.memory.patches[number]  # (40, C)
        distance, which = KDTree(found.flatten(0, 1).numpy()).query(patches.numpy())
        assert distance.max() < 1e-3
        assert len(set(which)) == 40


def test_distance_is_that_of_the_nearest_neighbour(filled):
    """The image score is scipy's largest nearest-neighbour distance; with --memory all the nearest of all classes."""
    dataset, _, score = filled
    sample = next(s for s in dataset.test if s.cls == "terrazzo" and s.label)
    image = data.Images([sample], 64)[0][None]
    patches = score.features(image)[0].flatten(1).T.numpy()  # (64, C)
    for memory, rows in (("class", score.memory.patches[1]), ("all", score.memory.patches.flatten(0, 1))):
        score.args.memory = memory
        maps, scores = score(image, [sample])
        expected, _ = KDTree(rows.numpy()).query(patches)
        assert scores.item() == pytest.approx(expected.max(), rel=1e-3)
        assert maps.shape == (1, 64, 64) and maps.max() <= scores.item()
    score.args.memory = "class"


def test_a_small_class_repeats_its_patches(filled):
    """More patches wanted than there are: the memory is full, without a row of zeros."""
    dataset, images, score = filled
    args = nearest.Args(image_size=64, patches=500, out=score.args.out)
    memory = nearest.Memory(2, 500, score.features.channels)
    nearest.fill(args, score.run, score.features, memory, images, dataset.classes)
    for patches in memory.patches:  # 6 images of 64 places
        assert len(torch.unique(patches, dim=0)) == 6 * 64


def test_the_program(words, tmp_path, command, metrics_of):
    """One run: files, table; the same bits again and from its checkpoint; one memory for all is never further away."""
    done = command("docs.nearest", *words, "--out", tmp_path / "a", "--save-maps")
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert result["method"] == "nearest" and len(result["classes"]) == 8
    assert f"{100 * result['mean']['i_auroc']:.1f}" in done.out and "mixed" in done.out
    assert len(np.load(tmp_path / "a" / "maps" / "train" / "screw.npz")["features"]) == 6
    assert command("docs.nearest", *words, "--out", tmp_path / "b").status == 0
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    checkpoint = tmp_path / "a" / "checkpoint.pt"
    for memory in ("class", "all"):
        again = "--eval", checkpoint, "--memory", memory, "--out", tmp_path / memory
        assert command("docs.nearest", *again).status == 0
    own, of_class, of_all = [scores_of(tmp_path / name) for name in ("a", "class", "all")]
    assert own == of_class
    assert all(of_all[path] <= own[path] for path in own) and of_all != own


def test_predict(words, tiny_data, tmp_path, command):
    """Unlabelled images are scored by a memory of all classes, as in the evaluation."""
    assert command("docs.nearest", *words, "--memory", "all", "--out", tmp_path / "a").status == 0
    path, score = list(scores_of(tmp_path / "a").items())[3]
    again = "--eval", tmp_path / "a" / "checkpoint.pt", "--predict", path, "--out", tmp_path / "b"
    assert command("docs.nearest", *again).status == 0
    row = next(csv.DictReader(open(tmp_path / "b" / "predictions.csv")))
    assert float(row["score"]) == pytest.approx(score, rel=1e-4)


def test_bad_input(words, tiny_data, tmp_path, command):
    """One line that names the option, status 2."""
    two = tmp_path / "two"
    assert command("docs.nearest", *words, "--classes", "screw,terrazzo", "--out", two).status == 0
    checkpoint = "--eval", two / "checkpoint.pt"
    cases = [
        ((*words, "--image-size", 72), "--image-size 72"),
        ((*words, "--average", 2), "--average 2"),
        ((*checkpoint, "--predict", tiny_data), "--memory all"),
        ((*checkpoint, "--average", 3), "--average 3: the memory"),
        ((*checkpoint, "--classes", "hex_nut"), "nothing is remembered of class 'hex_nut'"),
    ]
    for i, (case, named) in enumerate(cases):
        done = command("docs.nearest", *case, "--out", tmp_path / str(i))
        assert done.status == 2 and named in done.err and done.err.count("\n") == 1, done.err
