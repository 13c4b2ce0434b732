"""The shared evaluation and what it writes, with a score function whose maps are known."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import UsageError, corruptions, data, metrics, pictures, prediction, report, runtime

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
    paper = {"source": "x", "mean": {"i_auroc": 0.875}, "mixed": {"p_auroc": 0.625},
             "classes": {"screw": {"p_ap": 0.125}}}
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
    assert 0 < result["seconds"]["score"] <= result["seconds"]["evaluate"] + 0.06  # both rounded
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
    """One picture per class: four strips of four panels and the histogram. The panels: the input itself, the truth, the
    map in one scale for all strips."""
    dataset = data.load(str(tiny_data), classes=["screw"])
    report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0)
    picture = np.asarray(Image.open(run.out / "pictures" / "screw.png"))
    assert picture.shape == (4 * (64 + 18 + 4) + 120 + 18, 4 * 64 + 3 * 4, 3)
    scored = sorted((row for row in csv.DictReader(open(run.out / "scores.csv")) if row["label"] == "1"),
                    key=lambda row: float(row["score"]))
    good = [row for row in csv.DictReader(open(run.out / "scores.csv")) if row["label"] == "0"]
    worst_good = max(good, key=lambda row: float(row["score"]))
    chosen = [scored[-1], scored[len(scored) // 2], scored[0], worst_good]
    sample_of = {str(sample.image): sample for sample in dataset.test}
    images = data.Images([sample_of[row["path"]] for row in chosen], 64)
    maps = darkness(torch.stack([images[i] for i in range(4)]), images.samples)[0].numpy()
    for place, row in enumerate(chosen):
        top = place * (64 + 18 + 4) + 18
        panels = [picture[top:top + 64, left:left + 64] for left in (0, 68, 136)]
        assert np.array_equal(panels[0], data.resize_image(data.read_image(row["path"]), 64))
        assert np.array_equal(panels[1], pictures.truth(images.mask(place).numpy()))
        assert np.array_equal(panels[2], pictures.heat(maps[place], maps.min(), maps.max()))
    assert (run.out / "pictures" / "overview.png").is_file()


@pytest.mark.parametrize("shift", ["all", "curve"])
def test_shift_judges_every_corruption_on_its_own(run, tiny_data, shift):
    """Each condition has the numbers that --corrupt alone gives, and the method's own report of that pass; the table
    holds the numbers of every condition; the curves are drawn."""
    dataset, calls = data.load(str(tiny_data), classes=["screw", "capsule"]), []

    def extra():
        calls.append(0)
        return {"passes": len(calls)}

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

    def percent(values, *keys):
        return "/".join(f"{100 * values[key]:.1f}" for key in keys)

    for name, part in (("screw", lambda r: r["classes"]["screw"]), ("mean", lambda r: r["mean"])):
        shifted = [result["shift"][f"{c}:3"] for c in corruptions.NAMES]
        assert lines[name][1:] == [percent(part(result), "i_auroc", "p_auroc"),
                                   *(percent(part(r), "i_auroc", "p_aupro") for r in (result, *shifted))]
    outside = np.mean([r["mean"]["p_aupro"] for r in shifted])
    assert report.shift_table(result).endswith(f"out of distribution {100 * outside:.1f}")
    assert (run.out / "pictures" / "shift.png").is_file() == (shift == "curve")


def test_compared_results_stand_beside_the_main_one(run, tiny_data):
    """Reports that `measure` gave come into metrics.json and into a table with means and pool;
    measuring writes nothing."""
    dataset = data.load(str(tiny_data), classes=["screw", "capsule"])

    def brightness(images, samples):
        return tuple(-x for x in darkness(images, samples))

    other = report.measure(run, Args(), dataset, brightness)
    assert list(run.out.iterdir()) == []
    result = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0,
                             compare={"inverted": other.rep})
    assert result["compare"]["inverted"]["mean"]["i_auroc"] == pytest.approx(1 - result["mean"]["i_auroc"])
    rows = [line.split() for line in report.compare_table(result).splitlines()]
    keys = ("i_auroc", "i_ap", "p_auroc", "p_ap")
    for name, rep in (("inverted", other.rep), ("this", result)):
        row, = (row for row in rows if row and row[0] == name)
        assert row[-8:] == [f"{100 * rep[part][key]:.1f}" for part in ("mean", "mixed") for key in keys]


def test_pictures_of_classes_never_overwrite_ours_or_each_others():
    """A class may be called as one of our pictures, and another as what that one is renamed to."""
    classes = ["screw", "shift", "overview", "shift-class"]
    names = [pictures.file_of(cls, classes) for cls in classes]
    assert names[0] == "screw.png" and len(set(names)) == 4
    assert not set(names) & {f"{name}.png" for name in pictures.OWN_PICTURES}


def test_paper_stands_below_ours_under_shift(run, tiny_data):
    """Its numbers of each condition, and of their mean, where it has them; its notes below the table."""
    dataset, args = data.load(str(tiny_data), classes=["screw"]), Args(shift="all")
    shifted = {f"{name}:3": {"mean": {"i_auroc": 0.5 + i / 100}} for i, name in enumerate(corruptions.NAMES)}
    paper = {"source": "x", "mean": {"i_auroc": 0.875}, "notes": ["it says otherwise in its text"],
             "shift": {**shifted, "ood": {"mean": {"p_aupro": 0.625}}}}
    result = report.evaluate(run, args, dataset, darkness, setting=SETTING, seconds=1.5, paper=paper)
    text = report.shift_table(result)
    row, = (line.split() for line in text.splitlines() if line.startswith("  paper "))
    assert row[1:] == ["87.5/-", "87.5/-", "50.0/-", "51.0/-", "52.0/-", "53.0/-"]
    assert "paper: out of distribution 62.5" in text
    assert "it says otherwise in its text" in report.table(result)


def test_kept_maps_of_test_and_training_images(run, tiny_data):
    """--save-maps keeps, class by class and in the data's order, what `described` gave for every image."""
    dataset = data.load(str(tiny_data), classes=["screw", "capsule"])

    def described(images, samples):
        return *darkness(images, samples), images.float().mean((2, 3))

    args = Args(save_maps=True)
    report.evaluate(run, args, dataset, darkness, setting=SETTING, seconds=0, described=described)
    for folder, samples in (("maps", dataset.test), ("maps/train", dataset.train)):
        for cls in dataset.classes:
            kept, of = np.load(run.out / folder / f"{cls}.npz"), [s for s in samples if s.cls == cls]
            images = torch.stack([image for image in data.Images(of, 64)])
            maps, scores, features = described(images, of)
            assert kept["paths"].tolist() == [str(s.image) for s in of]
            assert kept["labels"].tolist() == [s.label for s in of]
            for name, value in (("maps", maps), ("scores", scores), ("features", features)):
                assert np.array_equal(kept[name], value.numpy()), name
            assert ("masks" in kept) == (folder == "maps")


def test_distributions_show_every_class_on_one_axis(run):
    """The same scores in two units look the same; a shifted class does not."""

    def rows(scale):
        return [("", cls, label, scale * (3 * label + i + 10 * (cls == "b")))
                for cls in "ab" for label in (0, 1) for i in range(20)]

    path = run.out / "pictures" / "distributions.png"
    report.distributions(path, {"x": rows(1.0), "y": rows(8.0)})
    panel = np.asarray(Image.open(path)).astype(int)
    left, right = panel[18:, :420], panel[18:, -420:]

    def bars(half, cls):
        """Where something is drawn below the class's name and above the axis."""
        return (half[18 + cls * 78:58 + cls * 78] != 255).any(2)

    assert np.array_equal(bars(left, 0), bars(right, 0))
    assert not np.array_equal(bars(left, 0), bars(left, 1))


def test_heat_is_monotone_in_lightness():
    """Higher is lighter, so that the maps also read in grey; the ends of the range are the ends of the scale."""
    colours = pictures.heat(np.linspace(-1, 2, 31)[None], 0.0, 1.0)[0].astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= -1e-9).all() and lightness[0] < 5 and lightness[-1] > 230
    assert np.array_equal(pictures.heat(np.full((2, 2), 3.0), 3.0, 3.0)[0, 0], colours[0].astype(np.uint8))
    image = np.full((1, 2, 3), 100, np.uint8)
    assert np.array_equal(pictures.overlay(image, np.array([[0.0, 1.0]]), 0, 1)[0, 0], image[0, 0])


@pytest.mark.filterwarnings("ignore:.*undefined")
def test_undefined_is_a_dash_in_every_table(run, tiny_data):
    """None in what the method reports (an accuracy over no images, say) and in the metrics: a dash, and null."""
    dataset = data.load(str(tiny_data), classes=["screw"])
    dataset.test = [s for s in dataset.test if not s.label]
    dataset.problems = ["no defective image"]
    with pytest.warns(UserWarning, match="screw"):
        result = report.evaluate(run, Args(shift="all"), dataset, darkness, setting=SETTING, seconds=0,
                                 extra=lambda: {"accuracy": None}, compare={"itself": UNDEFINED})
    for text in (report.table(result), report.compare_table(result), report.shift_table(result)):
        assert "None" not in text and "nan" not in text and " 0.0" not in text
    assert "accuracy: -" in report.table(result)
    kept = json.loads((run.out / "metrics.json").read_text())
    assert kept["setting"]["accuracy"] is None and kept["mean"]["i_auroc"] is None
    assert kept["problems"] == ["no defective image"]


UNDEFINED = {part: dict.fromkeys(metrics.METRICS) for part in ("mean", "mixed")} | {"classes": {}}


# ----------------------------------------------------------------------------------------- prediction


def read_predictions(run):
    with open(run.out / "predictions.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def targets(run, folder="pictures"):
    """The files below a folder of the run, sorted."""
    return sorted(str(p.relative_to(run.out / folder)) for p in (run.out / folder).rglob("*") if p.is_file())


def picture(path, size=(40, 30), grey=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


def test_predictions_are_scores_ratios_and_verdicts(run, tiny_data, capsys):
    """One row a file, in their order: the score that the evaluation would give, its ratio to the threshold, the
    verdict, the method's own column; printed with the highest score first."""
    folder = tiny_data / "screw" / "test"
    report.predict(run, Args(predict=[str(folder)]), darkness, 0.3, columns={"name": lambda s, v: s.image.stem})
    rows, files = read_predictions(run), data.image_files(folder)
    assert list(rows[0]) == ["path", "score", "ratio", "verdict", "name", "reason"]
    assert [row["path"] for row in rows] == [str(file) for file in files]
    samples = [data.Sample(file, None, 0, "", "", "") for file in files]
    _, scores = darkness(torch.stack(list(data.Images(samples, 64))), samples)
    for row, file, score in zip(rows, files, scores.tolist()):
        assert float(row["score"]) == pytest.approx(score)
        assert float(row["ratio"]) == pytest.approx(score / 0.3)
        assert row["verdict"] == ("defective" if score > 0.3 else "good")
        assert row["name"] == file.stem and row["reason"] == ""
    assert {row["verdict"] for row in rows} == {"good", "defective"}
    lines = capsys.readouterr().out.splitlines()
    printed = [float(line.split()[0]) for line in lines[1:-1]]
    assert printed == sorted(printed, reverse=True) and len(printed) == len(rows)
    assert "7 images" in lines[-1] and not (run.out / "predictions.part.csv").exists()
    assert not (run.out / "masks").exists()


def test_threshold_option_moves_the_verdict(run, tmp_path):
    """--threshold replaces the training images' quantile; a threshold that is not above 0 has no ratio."""
    for grey in (50, 100, 150):
        picture(tmp_path / "in" / f"{grey}.png", grey=grey)
    args = Args(predict=[str(tmp_path / "in")])
    args.threshold = 0.5
    report.predict(run, args, darkness, 0.9)
    assert [row["verdict"] for row in read_predictions(run)] == ["defective", "good", "defective"]
    assert float(read_predictions(run)[2]["ratio"]) == pytest.approx((1 - 50 / 255) / 0.5)
    args.threshold = 0.0
    report.predict(run, args, darkness, 0.9)
    assert {(row["verdict"], row["ratio"]) for row in read_predictions(run)} == {("defective", "")}


def test_heat_maps_and_masks_have_the_files_resolution(run, tmp_path):
    """The mask is the map, enlarged as torch does it, above the threshold; the heat-map is brightest there. A map that
    stays far below the threshold stays dark."""
    values = torch.zeros(1, 64, 64)
    values[0, 10:20, 30:50] = torch.linspace(0.5, 1, 20)

    def score(images, samples):
        maps = values * images.float().mean((1, 2, 3))[:, None, None] / 200
        return maps, maps.amax((1, 2))

    picture(tmp_path / "in" / "bright.png", (300, 150), 200)
    picture(tmp_path / "in" / "dark.png", (150, 300), 20)
    report.predict(run, Args(predict=[str(tmp_path / "in")]), score, 0.5, pixel_threshold=0.7)
    mask = np.asarray(Image.open(run.out / "masks" / "in" / "bright.png"))
    large = torch.nn.functional.interpolate(values[None], size=(150, 300), mode="bilinear")[0, 0].numpy()
    sure = abs(large - 0.7) > 1e-4
    assert mask.shape == (150, 300) and set(np.unique(mask)) == {0, 255}
    assert np.array_equal((mask > 0)[sure], (large > 0.7)[sure])
    heat = Image.open(run.out / "pictures" / "in" / "bright.png")
    assert heat.size == (300, 150)
    lightness = np.asarray(heat.convert("L")).astype(int)
    assert lightness[mask > 0].min() > lightness[large < 0.3].max()
    assert np.asarray(Image.open(run.out / "masks" / "in" / "dark.png")).max() == 0
    assert np.asarray(Image.open(run.out / "pictures" / "in" / "dark.png").convert("L")).max() < 60


def test_what_cannot_be_read_costs_its_own_row_only(run, tmp_path, capsys):
    """Zero bytes, a text, a truncated picture, a score that is not finite: an empty score and a reason, exit status 1
    at the end; the other scores are those without them."""
    folder = tmp_path / "in"
    for i in range(12):
        picture(folder / f"{i:02d}.png", grey=20 * i)
    report.predict(run, Args(predict=[str(folder)]), darkness, 0.5)
    before = {row["path"]: row["score"] for row in read_predictions(run)}
    (folder / "02.png").write_bytes(b"")
    (folder / "03.png").write_text("no picture")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    bad = {str(folder / f"{name}.png") for name in ("02", "03", "07", "09")}

    def score(images, samples):
        maps, scores = darkness(images, samples)
        for i, sample in enumerate(samples):
            if sample.image.stem == "09":
                maps[i, 0, 0] = torch.nan
        return maps, scores

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        report.predict(run, Args(predict=[str(folder)]), score, 0.5, pixel_threshold=0.5)
    assert end.value.code == 1
    rows = read_predictions(run)
    assert len(rows) == 12
    for row in rows:
        if row["path"] in bad:
            assert row["score"] == row["ratio"] == row["verdict"] == "" and row["reason"]
        else:
            assert row["score"] == before[row["path"]] and row["reason"] == ""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "4 of 12" in captured.err and "02.png" in captured.err
    assert targets(run, "masks") == [f"in/{i:02d}.png" for i in range(12) if i not in (2, 3, 7, 9)]


def test_folders_mirror_the_inputs_and_nothing_is_overwritten(run, tmp_path):
    """Two inputs of one name, files of one stem, names that differ in case only, a file called like a folder's
    heat-map: as many pictures as rows, in the folders of the input."""
    for name in ("a/shots/x/1.png", "a/shots/x/1.bmp", "a/shots/2.png", "b/shots/2.png", "b/shots/B.png",
                 "b/shots/b.png", "c/x.png/4.png", "c/x.bmp", "2.png"):
        picture(tmp_path / "in" / name)
    inputs = ["a/shots", "b/shots", "c", "2.png"]
    report.predict(run, Args(predict=[str(tmp_path / "in" / name) for name in inputs]), darkness, 0.5)
    assert targets(run) == sorted([
        "shots/x/1.png.png", "shots/x/1.bmp.png", "shots/2.png", "shots-2/2.png", "shots-2/B.png.png",
        "shots-2/b.png-2.png", "c/x.png/4.png", "c/x-2.png", "2.png"])
    assert len(read_predictions(run)) == 9


def test_a_file_is_scored_once(run, tmp_path):
    """Links that lead back, and inputs that hold one another, make no further rows."""
    folder = tmp_path / "in"
    picture(folder / "deep" / "1.png")
    picture(folder / "2.png")
    (folder / "a-link").symlink_to(".")
    report.predict(run, Args(predict=[str(folder), str(folder / "deep"), str(folder / "2.png")]), darkness, 0.5)
    assert sorted(row["path"] for row in read_predictions(run)) == [str(folder / "2.png"),
                                                                    str(folder / "deep" / "1.png")]
    assert targets(run) == ["in/2.png", "in/deep/1.png"]


def test_names_that_are_no_utf8(run, tmp_path, capsys):
    """The bytes of the name stand in the csv as they are; what is printed can be printed, also on stderr."""
    folder = os.fsencode(tmp_path) + b"/gr\xf6\xdfe"
    try:
        picture(Path(os.fsdecode(folder + b"/\xe4.png")))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    picture(Path(os.fsdecode(folder + b"/\xe5.png"))).write_bytes(b"")
    with pytest.raises(SystemExit):
        report.predict(run, Args(predict=[os.fsdecode(folder)]), darkness, 0.5)
    assert folder + b"/\xe4.png,0.6" in (run.out / "predictions.csv").read_bytes()
    assert os.path.isfile(os.fsencode(run.out) + b"/pictures/gr\xf6\xdfe/\xe4.png")
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert ".png" in text
        text.encode("utf-8")
    with pytest.raises(UsageError, match="no images"):
        (Path(os.fsdecode(folder)) / "sub").mkdir()
        report.predict(run, Args(predict=[os.fsdecode(folder + b"/sub")]), darkness, 0.5)


def test_evaluation_survives_names_that_are_no_utf8(run, tiny_data, tmp_path):
    """scores.csv and metrics.json are written, the bytes of the name as they are."""
    shutil.copytree(tiny_data / "screw", tmp_path / "set" / "screw")
    good = os.fsencode(tmp_path / "set" / "screw" / "test" / "good")
    try:
        os.rename(good + b"/000.png", good + b"/gr\xf6\xdfe.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    report.evaluate(run, Args(), data.load(str(tmp_path / "set")), darkness, setting=SETTING, seconds=0)
    assert good + b"/gr\xf6\xdfe.png,screw,0," in (run.out / "scores.csv").read_bytes()
    assert (run.out / "metrics.json").is_file()


def test_scoring_that_an_earlier_pass_has_saved_counts(run, tiny_data):
    """CADA's base sees every image in the pass without calibration, whose maps the other one takes."""
    dataset = data.load(str(tiny_data), classes=["screw"])
    result = report.evaluate(run, Args(), dataset, darkness, setting=SETTING, seconds=0, saved=50.0)
    assert 50 < result["seconds"]["score"] < 60


def test_deep_pictures_are_scaled_as_in_the_training(run, tmp_path):
    """12 bits in 16: by the class's largest training value, and not by the picture's own."""
    run.depths = {"a": 4095}
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "in" / "1.png")
    report.predict(run, Args(predict=[str(tmp_path / "in")]), darkness, 0.5)
    row, = read_predictions(run)
    assert float(row["score"]) == pytest.approx(1 - (1000 >> 4) / 255, abs=1e-4)


def test_prediction_works_only_a_few_pictures_ahead(run, tmp_path, monkeypatch):
    """Memory must not grow with the number of pictures: those read but not yet written stay few."""
    for i in range(150):
        picture(tmp_path / "in" / f"{i:03d}.png", size=(4, 4))
    read_image, add, read, written, most = data.read_image, prediction.pages.Predictions.add, [], [], []

    def counted_read(path, top):
        read.append(path)
        most.append(len(read) - len(written))
        return read_image(path)

    def counted_add(page, *values):
        written.append(values)
        return add(page, *values)

    monkeypatch.setattr(data, "read_image", counted_read)
    monkeypatch.setattr(prediction, "AT_ONCE", 0)  # batches of two
    monkeypatch.setattr(prediction.pages.Predictions, "add", counted_add)
    report.predict(run, Args(predict=[str(tmp_path / "in")], batch_size=2), darkness, 0.5)
    assert len(read) == len(written) == 150
    assert max(most) <= 2 * (2 * 2 + 8) + 2 + 2  # both steps' share, a batch, and what has just begun


def test_interrupted_prediction_leaves_its_rows(run, tmp_path, monkeypatch):
    """What was scored before the end came is there, under a name that says that it is not all."""
    for i in range(60):
        picture(tmp_path / "in" / f"{i:02d}.png")

    def score(images, samples):
        if samples[0].image.stem == "50":
            raise KeyboardInterrupt
        return darkness(images, samples)

    monkeypatch.setattr(prediction, "AT_ONCE", 0)  # batches of Args.batch_size
    with pytest.raises(KeyboardInterrupt):
        report.predict(run, Args(predict=[str(tmp_path / "in")]), score, 0.5)
    assert not (run.out / "predictions.csv").exists() and not (run.out / "predictions.html").exists()
    with open(run.out / "predictions.part.csv") as file:
        rows = list(csv.DictReader(file))
    assert 20 <= len(rows) <= 50 and all(row["verdict"] == "defective" for row in rows)


def test_prediction_is_work_for_one_process(run, tmp_path):
    """Other processes of a torchrun would write the same files at the same time."""
    picture(tmp_path / "in" / "1.png")
    run.rank = 1
    report.predict(run, Args(predict=[str(tmp_path / "in")]), darkness, 0.5)
    assert not list(run.out.glob("predictions*")) and not (run.out / "pictures").exists()
