"""The shared evaluation and what it writes, with a score function whose maps are known."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import UsageError, data, metrics, report, runtime

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
    paper = {"source": "x", "mean": {"i_auroc": 0.875}, "classes": {"screw": {"p_ap": 0.125}}}
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
    assert "87.5" in text and "12.5" in text and "mixed" in text
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


def test_heat_is_monotone_in_lightness():
    """Higher is lighter, so that the maps also read in grey; the ends of the range are the ends of the scale."""
    colours = report.heat(np.linspace(-1, 2, 31)[None], 0.0, 1.0)[0].astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= -1e-9).all() and lightness[0] < 5 and lightness[-1] > 230
    assert np.array_equal(report.heat(np.full((2, 2), 3.0), 3.0, 3.0)[0, 0], colours[0].astype(np.uint8))
    image = np.full((1, 2, 3), 100, np.uint8)
    assert np.array_equal(report.overlay(image, np.array([[0.0, 1.0]]), 0, 1)[0, 0], image[0, 0])
