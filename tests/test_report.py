"""The shared evaluation and what it writes, with a score function whose maps are known."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import UsageError, corruptions, data, metrics, pictures, report, runtime

SETTING = {"image size": 64}


@dataclasses.dataclass
class Args(runtime.Options):
    image_size: int = 64
    batch_size: int = 5


def darkness(images, samples):
    """A 'detector' whose map is the darkness of each pixel and whose score is its mean: independent of the batch."""
    maps = 1 - images.float().mean(1) / 255
    return maps, maps.mean((1, 2))


@pytest.fixture
def run(tmp_path):
    return runtime.Run("method", tmp_path, torch.device("cpu"))


def test_evaluation_is_the_metrics_of_the_maps(run, tiny_data):
    """Table and files hold exactly what metrics.evaluate says of all maps at once; scores.csv is in the data's order;
    the paper's numbers and the method's extras get through."""
    dataset, args = data.load(str(tiny_data)), Args(save_maps=True)
    paper = {"source": "x", "mean": {"i_auroc": 0.875}, "mixed": {"p_auroc": 0.625}, "classes": {"screw": {"p_ap": 0.125}}}
    result = report.evaluate(run, args, dataset, darkness, setting=SETTING, seconds=1.5, paper=paper,
                             extra=lambda: {"accuracy": 0.5})
    images = data.Images(dataset.test, 64)
    batch = torch.stack([images[i] for i in range(len(images))])
    maps, scores = darkness(batch, dataset.test)
    expected = metrics.evaluate(maps, torch.stack([images.mask(i) for i in range(len(images))]), scores,
                                [s.label for s in dataset.test], [s.cls for s in dataset.test])
    for part in ("classes", "mean", "mixed"):
        assert result[part] == expected[part]
    assert result == json.loads((run.out / "metrics.json").read_text())
    assert result["setting"]["accuracy"] == 0.5 and result["seconds"]["train"] == 1.5
    rows = list(csv.reader(open(run.out / "scores.csv")))
    assert rows[0] == ["path", "class", "label", "score"]
    assert [row[0] for row in rows[1:]] == [str(s.image) for s in dataset.test]
    assert [float(row[3]) for row in rows[1:]] == [float(s) for s in scores]
    text = report.table(result)
    assert "87.5" in text and "12.5" in text and "62.5" in text and "mixed" in text
    kept = np.load(run.out / "maps" / "screw.npz")
    of = [i for i, s in enumerate(dataset.test) if s.cls == "screw"]
    assert np.array_equal(kept["maps"], maps[of].numpy()) and kept["paths"].tolist() == [
        str(dataset.test[i].image) for i in of]


def test_joined_data_sets_have_their_own_means(run, tiny_data):
    """--data a+b: one mean per data set beside the mean over all classes (OneNIP's Table 2)."""
    dataset = data.load(str(tiny_data))
    first, rest = dataset.classes[:3], dataset.classes[3:]
    dataset.groups = {"a": first, "b": rest}
    result = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    for name, classes in dataset.groups.items():
        assert result["datasets"][name]["p_auroc"] == pytest.approx(
            np.mean([result["classes"][c]["p_auroc"] for c in classes]))
    assert "mean a" in report.table(result)


def test_defect_without_a_mask_counts_for_the_image_metrics_only(run, tiny_data):
    """Its pixels are unknown, not clean: the pixel metrics are those without the image."""
    dataset = data.load(str(tiny_data), classes=["screw"])
    whole = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    index = next(i for i, s in enumerate(dataset.test) if s.label)
    dataset.test[index] = dataclasses.replace(dataset.test[index], mask=None)
    result = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    assert result["setting"]["defects without a mask"] == 1
    assert result["mean"]["i_auroc"] == whole["mean"]["i_auroc"]
    del dataset.test[index]
    without = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    for key in ("p_auroc", "p_ap", "p_f1max", "p_aupro"):
        assert result["mean"][key] == without["mean"][key]


def test_undefined_metrics_are_null_with_a_warning(run, tiny_data):
    """A class without defective images: null in the file, a dash in the table, never 0."""
    dataset = data.load(str(tiny_data), classes=["screw", "capsule"])
    dataset.test = [s for s in dataset.test if s.cls == "capsule" or s.label == 0]
    with pytest.warns(UserWarning, match="screw"):
        result = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    assert result["classes"]["screw"]["i_auroc"] is None
    assert result["mean"]["i_auroc"] == result["classes"]["capsule"]["i_auroc"]
    assert [line for line in report.table(result).splitlines() if line.startswith("screw")][0].count(" -") == 8


def test_nan_scores_are_refused_by_name(run, tiny_data):
    """A broken model ends in one line that names the image, and leaves no metrics.json."""
    def broken(images, samples):
        maps, scores = darkness(images, samples)
        maps[-1, 3, 3] = float("nan")
        return maps, scores

    dataset = data.load(str(tiny_data), classes=["screw"])
    with pytest.raises(UsageError, match="png"):
        report.evaluate(run, Args(), dataset, broken, setting=SETTING, seconds=0)
    assert not (run.out / "metrics.json").exists()


def test_pictures_show_best_median_and_worst(run, tiny_data):
    """One picture per class: four strips of four panels and the histogram; the first panel is the input itself."""
    dataset = data.load(str(tiny_data), classes=["screw"])
    report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    picture = np.asarray(Image.open(run.out / "pictures" / "screw.png"))
    assert picture.shape == (4 * (64 + 18 + 4) + 120 + 18, 4 * 64 + 3 * 4, 3)
    scored = sorted((row for row in csv.DictReader(open(run.out / "scores.csv")) if row["label"] == "1"),
                    key=lambda row: float(row["score"]))
    for place, row in ((0, scored[-1]), (1, scored[len(scored) // 2]), (2, scored[0])):
        top = place * (64 + 18 + 4) + 18
        expected = data.resize_image(data.read_image(row["path"]), 64)
        assert np.array_equal(picture[top:top + 64, :64], expected)
    assert (run.out / "pictures" / "overview.png").is_file()


@pytest.mark.parametrize("shift", ["all", "curve"])
def test_shift_judges_every_corruption_on_its_own(run, tiny_data, shift):
    """Each condition has the numbers that --corrupt alone gives, and the method's own report of that pass; the tables
    hold Table 1's, 2's and 4's numbers; the curves are drawn."""
    dataset, calls = data.load(str(tiny_data), classes=["screw", "capsule"]), []
    extra = lambda: {"passes": calls.append(0) or len(calls)}
    result = report.evaluate(run, Args(shift=shift), dataset, darkness, setting=SETTING, seconds=0, extra=extra)
    assert list(result["shift"]) == [f"{name}:{severity}" for name in corruptions.NAMES
                                     for severity in ((3,) if shift == "all" else range(1, 6))]
    assert [part["setting"]["passes"] for part in result["shift"].values()] == list(range(2, len(calls) + 1))
    for name in corruptions.NAMES:
        alone = report.evaluate(run, Args(corrupt=f"{name}:3"), dataset, darkness, setting=SETTING, seconds=0)
        for part in ("classes", "mean", "mixed"):
            assert result["shift"][f"{name}:3"][part] == alone[part]
    plain = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    assert plain["mean"] == result["mean"] and "shift" not in plain and report.shift_table(plain) == ""
    lines = {line.split("  ")[0]: line.split() for line in report.shift_table(result).splitlines()}
    percent = lambda values, *keys: "/".join(f"{100 * values[key]:.1f}" for key in keys)
    for name, part in (("screw", lambda r: r["classes"]["screw"]), ("mean", lambda r: r["mean"])):
        shifted = [result["shift"][f"{c}:3"] for c in corruptions.NAMES]
        assert lines[name][1:] == [percent(part(result), "i_auroc", "p_auroc"),
                                   *(percent(part(r), "i_auroc", "p_aupro") for r in (result, *shifted))]
    outside = np.mean([r["mean"]["p_aupro"] for r in shifted])
    assert report.shift_table(result).endswith(f"out of distribution {100 * outside:.1f}")
    assert (run.out / "pictures" / "shift.png").is_file() == (shift == "curve")


def test_compared_results_stand_beside_the_main_one(run, tiny_data):
    """Reports that `measure` gave come into metrics.json and into a table with means and pool; measuring writes nothing."""
    dataset = data.load(str(tiny_data), classes=["screw", "capsule"])
    inverted = lambda images, samples: tuple(-x for x in darkness(images, samples))
    other = report.measure(run, Args(), dataset, inverted)
    assert list(run.out.iterdir()) == []
    result = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0, compare={"inverted": other.rep})
    assert result["compare"]["inverted"]["mean"]["i_auroc"] == pytest.approx(1 - result["mean"]["i_auroc"])
    rows = [line.split() for line in report.compare_table(result).splitlines()]
    keys = ("i_auroc", "i_ap", "p_auroc", "p_ap")
    for name, rep in (("inverted", other.rep), ("this", result)):
        row, = (row for row in rows if row and row[0] == name)
        assert row[-8:] == [f"{100 * rep[part][key]:.1f}" for part in ("mean", "mixed") for key in keys]


def test_kept_maps_of_test_and_training_images(run, tiny_data):
    """--save-maps keeps, class by class and in the data's order, what `score` and `pooled` gave for every image."""
    dataset = data.load(str(tiny_data), classes=["screw", "capsule"])
    pooled = lambda images: images.float().mean((2, 3))
    report.evaluate(run, Args(save_maps=True), dataset, darkness, setting=SETTING, seconds=0, pooled=pooled)
    for folder, samples in (("maps", dataset.test), ("maps/train", dataset.train)):
        for cls in dataset.classes:
            kept, of = np.load(run.out / folder / f"{cls}.npz"), [s for s in samples if s.cls == cls]
            images = torch.stack([image for image in data.Images(of, 64)])
            maps, scores = darkness(images, of)
            assert kept["paths"].tolist() == [str(s.image) for s in of]
            assert kept["labels"].tolist() == [s.label for s in of]
            for name, value in (("maps", maps), ("scores", scores), ("features", pooled(images))):
                assert np.array_equal(kept[name], value.numpy()), name
            assert ("masks" in kept) == (folder == "maps")


def test_distributions_show_every_class_on_one_axis(run):
    """The same scores in two units look the same; a shifted class does not."""
    rows = lambda scale: [("", cls, label, scale * (3 * label + i + 10 * (cls == "b")))
                          for cls in "ab" for label in (0, 1) for i in range(20)]
    path = run.out / "pictures" / "distributions.png"
    report.distributions(path, {"x": rows(1.0), "y": rows(8.0)})
    panel = np.asarray(Image.open(path)).astype(int)
    left, right = panel[18:, :420], panel[18:, -420:]
    bars = lambda p, cls: (p[18 + cls * 78:58 + cls * 78] != 255).any(2)  # below the class's name, above the axis
    assert np.array_equal(bars(left, 0), bars(right, 0)) and not np.array_equal(bars(left, 0), bars(left, 1))


def test_heat_is_monotone_in_lightness():
    """Higher is lighter, so that the maps also read in grey; the ends of the range are the ends of the scale."""
    colours = pictures.heat(np.linspace(-1, 2, 31)[None], 0.0, 1.0)[0].astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= -1e-9).all() and lightness[0] < 5 and lightness[-1] > 230
    assert np.array_equal(pictures.heat(np.full((2, 2), 3.0), 3.0, 3.0)[0, 0], colours[0].astype(np.uint8))
    image = np.full((1, 2, 3), 100, np.uint8)
    assert np.array_equal(pictures.overlay(image, np.array([[0.0, 1.0]]), 0, 1)[0, 0], image[0, 0])
