"""What names of folders and files mean: labels, masks of other tools, folders of one's own, joined and linked ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UsageError, data, layouts

RNG = np.random.default_rng(0)
SHAPE = (12, 16)


def save(path, pixels=None):
    """Write an array, or random pixels, as an image file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = RNG.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(row=3):
    """A mask with one defective row."""
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[row] = 255
    return pixels


def fill(folder, train="train/good", good="test/good", bad="test/hole"):
    """One class: three training images, two good and two defective test images, no mask."""
    for place, number in ((train, 3), (good, 2), (bad, 2)):
        for i in range(number):
            save(folder / place / f"{i:03}.png")
    return folder


def problem(dataset, kind):
    """The one problem line of a kind."""
    lines = [line for line in dataset.problems if line.startswith(kind + ": ")]
    assert len(lines) == 1, (kind, dataset.problems)
    return lines[0]


# ------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("name", [
    "good", "Good", "GOOD", "ok", "OK", "Ok", "okay", "normal", "Normal", "normals", "fine", "passed",
    "defect-free", "Defect_Free", "no defect", "nominal", "anomaly free"])
def test_normal_folders_in_any_spelling(tmp_path, name):
    """Protects the labels: images in test/OK and the like are good, in train and test, and called "good"."""
    fill(tmp_path / "nut", train=f"train/{name}", good=f"test/{name}")
    ds = data.load(str(tmp_path))
    assert len(ds.train) == 3
    assert [(s.label, s.defect) for s in ds.test if s.image.parent.name == name] == [(0, "good")] * 2
    assert sum(s.label for s in ds.test) == 2


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["good_2", "Good images", "goodparts", "ok1", "OK images", "normal-day", "IO", "gut",
                                  "negative"])
def test_what_only_looks_like_normal_is_refused(tmp_path, split, name):
    """Protects from a table of wrong labels: such a name ends in one line that names the folder."""
    fill(tmp_path / "nut")
    save(tmp_path / "nut" / split / name / "0.png")
    with pytest.raises(UsageError) as error:
        data.load(str(tmp_path))
    message = str(error.value)
    assert "\n" not in message and f"{split}/{name}" in message and "rename it to good" in message


@pytest.mark.parametrize("name", ["not_ok", "NOK", "ng", "no_good", "abnormal", "ko", "bad", "not good", "oklahoma",
                                  "broken", "label", "combined", "defective_ok"])
def test_defects_stay_defects(tmp_path, name):
    """Protects defects whose names only resemble: they are neither good nor refused."""
    fill(tmp_path / "nut", bad=f"test/{name}")
    assert [s.defect for s in data.load(str(tmp_path)).test if s.label] == [name] * 2


def test_splits_and_mask_folders_in_any_case(tmp_path):
    """Protects folders that come from Windows: Train, TEST, Ground_Truth, and images directly in train."""
    fill(tmp_path / "nut", train="Training", good="TEST/Good", bad="TEST/Hole")
    for i in range(2):
        save(tmp_path / f"nut/Ground_Truth/hole/{i:03}_Mask.PNG", mask())
    ds = data.load(str(tmp_path))
    assert len(ds.train) == 3 and len(ds.test) == 4
    assert [s.mask.name for s in ds.test if s.label] == ["000_Mask.PNG", "001_Mask.PNG"] and ds.problems == []


@pytest.mark.parametrize("more", ["Training/good", "testing/hole"])
def test_two_folders_for_one_split_are_refused(tmp_path, more):
    """Protects from images that vanish: which of the two is meant, only the user knows."""
    fill(tmp_path / "nut")
    save(tmp_path / "nut" / more / "9.png")
    with pytest.raises(UsageError, match="has both .*: put their images into one of them"):
        data.load(str(tmp_path))


def test_what_has_no_label_is_left_out_and_named(tmp_path):
    """Protects from guessed labels: images beside the folders that tell them, or in a third split (MVTec LOCO)."""
    fill(tmp_path / "nut")
    for place in ("train/loose.png", "test/loose.png", "validation/good/0.png", "train/scratched/0.png"):
        save(tmp_path / "nut" / place)
    ds = data.load(str(tmp_path))
    assert len(ds.train) == 3 and len(ds.test) == 4
    assert "tell" in problem(ds, "images left out, no folder tells their label")
    assert ": 2 (" in problem(ds, "images left out, no folder tells their label")
    assert "validation" in problem(ds, "images left out, neither in train nor in test")
    assert "scratched" in problem(ds, "training images left out, their folder is not called good")


# ------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("place", [
    "ground_truth/hole/{}_mask.png", "ground_truth/hole/{}.png", "ground_truth/hole/{}.bmp",
    "ground_truth/hole/{}-mask.png", "ground_truth/hole/{}_gt.png", "ground_truth/hole/{}_label.png",
    "ground_truth/hole/mask_{}.png", "ground_truth/hole/GT-{}.png", "ground_truth/hole/{}_ground_truth.png",
    "GT/hole/{}.png", "masks/hole/{}_mask.png", "Labels/hole/{}.png", "ground-truth/HOLE/{}_MASK.png",
    "ground_truth/{}_mask.png", "mask/{}.png",
    "test/hole/{}_mask.png", "test/hole/{}-gt.png", "test/hole/mask_{}.png", "test/hole/{}.mask.png",
    "test/hole/masks/{}.png", "test/hole/label/{}.png", "test/hole_mask/{}.png", "test/hole-masks/{}_mask.png",
    "test/ground_truth/hole/{}.png", "test/masks/{}.png",
    "ground_truth/hole/{}/000.png", "ground_truth/hole/{}/mask.png"])
def test_masks_wherever_tools_put_them(tmp_path, place):
    """Protects pixel labels: every defective image gets its own mask in each arrangement, no mask becomes an image."""
    fill(tmp_path / "nut")
    for i in range(2):
        save(tmp_path / "nut" / place.format(f"{i:03}"), mask(i))
    ds = data.load(str(tmp_path))
    assert len(ds.train) == 3
    assert [s.image.name for s in ds.test] == ["000.png", "001.png"] * 2
    assert [s.label for s in ds.test] == [0, 0, 1, 1]
    for i, sample in enumerate(ds.test[2:]):
        np.testing.assert_array_equal(data.read_mask(sample.mask), mask(i) > 0)
    assert [line for line in ds.problems if not line.startswith("masks found beside")] == []
    assert data.check(ds, progress=False) == []


def test_several_masks_of_an_image_add_up(tmp_path):
    """Protects MVTec LOCO: a folder per image, one file per region; the mask is their union."""
    fill(tmp_path / "nut")
    for i in range(2):
        for part in range(3):
            save(tmp_path / f"nut/ground_truth/hole/00{i}/00{part}.png", mask(2 * part + i))
    ds = data.load(str(tmp_path))
    expected = np.zeros(SHAPE, bool)
    expected[[1, 3, 5]] = True
    np.testing.assert_array_equal(data.Images(ds.test, 12, mask_rule="nearest").mask(3).any(1), expected.any(1))
    np.testing.assert_array_equal(data.read_mask(ds.test[3].mask), expected)
    save(tmp_path / "nut/ground_truth/hole/001/003.png", mask()[:5])
    with pytest.raises(UsageError, match="hole/001: the masks in it must have one size"):
        data.read_mask(ds.test[3].mask)
    with pytest.raises(UsageError, match="is 16x5, but its image"):
        data.check(ds, progress=False)


def test_masks_that_could_belong_to_several_images_are_named(tmp_path):
    """Protects from masks of the wrong image: hole/000 and crack/000 both could own ground_truth/000_mask.png."""
    fill(tmp_path / "nut")
    save(tmp_path / "nut/test/crack/000.png")
    for i in range(2):
        save(tmp_path / f"nut/ground_truth/{i:03}_mask.png", mask())
    ds = data.load(str(tmp_path))
    assert [(s.defect, s.mask and s.mask.name) for s in ds.test if s.label] == [
        ("crack", None), ("hole", None), ("hole", "001_mask.png")]
    assert "000_mask.png" in problem(ds, "masks without an image, or with several of its name")
    assert ": 2 (" in problem(ds, "defective test images without a mask")


def test_a_name_with_an_affix_alone_is_an_image(tmp_path):
    """Protects pictures called front_label.png: without a front.png beside, it is no mask."""
    fill(tmp_path / "nut")
    save(tmp_path / "nut/test/hole/front_label.png")
    save(tmp_path / "nut/test/label/000.png")  # a defect of labels
    ds = data.load(str(tmp_path))
    assert [s.image.name for s in ds.test if s.label] == ["000.png", "001.png", "front_label.png", "000.png"]


# ------------------------------------------------------------------------------------------------- folders of one's own


@pytest.mark.parametrize("places, classes, said", [
    (["nut/train/good", "bolt/train/good"], {"bolt": 2, "nut": 2}, "CLASS/train and CLASS/test"),
    (["nut/train", "bolt/Train/OK"], {"bolt": 2, "nut": 2}, "CLASS/train and CLASS/test"),
    (["nut/good", "bolt/OK"], {"bolt": 2, "nut": 2}, "CLASS/good, or good images directly in CLASS"),
    (["nut", "bolt"], {"bolt": 2, "nut": 2}, "CLASS/good, or good images directly in CLASS"),
    (["train/good"], {"mine": 2}, "one class: train and test"),
    (["good"], {"mine": 2}, "one class: a folder of good images"),
    (["Good", "bad"], {"mine": 2}, "one class: a folder of good images"),
    (["."], {"mine": 2}, "one class: all images directly in it are good")])
def test_training_without_a_test_set(tmp_path, places, classes, said):
    """Protects people who have good images only: their folder loads in the shape it has, and one line says how."""
    for place in places:
        for i in range(2):
            save(tmp_path / "mine" / place / f"{i}.png")
    ds = data.load(str(tmp_path / "mine"), need_test=False)
    assert ds.classes == list(classes) and ds.test == []
    assert {cls: [s.cls for s in ds.train].count(cls) for cls in ds.classes} == classes
    assert not any(s.label for s in ds.train)
    assert ds.reading.startswith(f"{tmp_path / 'mine'} read as {said}; ") and "none to test on" in ds.reading
    assert [line for line in ds.problems if "not in a good folder" not in line] == []
    with pytest.raises(UsageError, match="has no test images"):
        data.load(str(tmp_path / "mine"))


@pytest.mark.parametrize("place", ["nut/train/good", "nut/train", "nut/Good", "nut"])
def test_the_class_is_not_called_good(tmp_path, monkeypatch, place):
    """Protects tables and predictions: a folder deep in a data set is called by what lies in it, not "good"."""
    save(tmp_path / "nut/train/good/0.png")
    save(tmp_path / "nut/Good/0.png")
    assert data.load(str(tmp_path / place), need_test=False).classes == ["nut"]
    monkeypatch.chdir(tmp_path / place)
    assert data.load(".", need_test=False).classes == ["nut"]


def test_some_classes_without_a_test_set(tmp_path):
    """Protects a mixture: classes with test images keep them, the others are trained on."""
    fill(tmp_path / "nut")
    save(tmp_path / "bolt/train/good/0.png")
    ds = data.load(str(tmp_path), need_test=False)
    assert ds.classes == ["bolt", "nut"] and {s.cls for s in ds.test} == {"nut"}
    assert "4 good images to train on, 2 good and 2 defective to test on" in ds.reading
    with pytest.raises(UsageError, match="'bolt' has no test images"):
        data.load(str(tmp_path))


def test_defective_images_never_become_training_images(tmp_path):
    """Protects the training set of CLASS/good beside CLASS/bad: what is not good is left out and counted."""
    for place in ("nut/good/0.png", "nut/bad/0.png", "nut/bad/1.png", "nut/loose.png", "nut/mask/0.png"):
        save(tmp_path / place)
    ds = data.load(str(tmp_path), need_test=False)
    assert [s.image.parent.name for s in ds.train] == ["good"]
    assert ": 4 (" in problem(ds, "images left out, not in a good folder")


# ------------------------------------------------------------------------------------------------- problems


def test_each_kind_of_problem_is_one_line(tmp_path):
    """Protects the reader of a run with thirty classes: one line a kind, with the total and the first places."""
    for i in range(5):
        fill(tmp_path / f"set/class{i}")
    (tmp_path / "set/notes").mkdir()
    ds = data.load(str(tmp_path / "set"))
    assert len(ds.problems) == 2
    line = problem(ds, "defective test images without a mask")
    assert ": 10 (" in line and "class0/test/hole: 2 of 2, first 000.png" in line and "and 2 more places" in line
    assert "notes" in problem(ds, "folders left out, they are no class")


def test_copies_of_training_images_are_found(tmp_path):
    """Protects from a test on what was trained on: same content under any name, also where all are equally long."""
    fill(tmp_path / "nut")
    for i in range(4):  # uncompressed: equal lengths, equal heads and tails
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[20, 20] = i
        save(tmp_path / f"nut/train/good/b{i}.bmp", pixels)
        pixels[20, 20] = i + 2
        save(tmp_path / f"nut/test/good/c{i}.bmp", pixels)
    (tmp_path / "nut/train/good/empty.png").touch()
    (tmp_path / "nut/test/good/empty.png").touch()  # nothing is no copy of nothing
    ds = data.load(str(tmp_path))
    line = problem(ds, "test images that are copies of training images")
    assert ": 2 (nut: 2, first " in line and "c0.bmp is " in line and line.endswith("b2.bmp)")


# ------------------------------------------------------------------------------------------------- names


def test_commas_in_class_names(tmp_path):
    """Protects `--classes` for a class whose name holds a comma, given as one text or as its pieces."""
    for cls in ("a", "b", "a,b", "nut, large"):
        fill(tmp_path / cls)
    for given, expected in (("a,b", ["a,b"]), (["a", "b"], ["a,b"]), ("b,a", ["a", "b"]), ("b, a", ["a", "b"]),
                            ("nut, large", ["nut, large"]), ("a,nut, large,b", ["a", "b", "nut, large"]),
                            (["nut", " large"], ["nut, large"]), ("a,", ["a"]), ("", ["a", "a,b", "b", "nut, large"])):
        assert data.load(str(tmp_path), classes=given).classes == expected, given
    with pytest.raises(UsageError, match="no class 'large'"):
        data.load(str(tmp_path), classes="a,large")


def test_folders_of_equal_name_are_joined(tmp_path):
    """Protects line1/images+line2/images: told apart by the folder above; the same folder twice is refused."""
    for place in ("line1/images/nut", "line2/images/nut", "line2/images/bolt", "x/line1/images/nut"):
        fill(tmp_path / place)
    ds = data.load(f"{tmp_path}/line1/images+{tmp_path}/line2/images")
    assert ds.name == "line1-images+line2-images"
    assert ds.classes == ["line1-images-nut", "bolt", "line2-images-nut"]
    assert ds.reading.count(" read as CLASS/train and CLASS/test") == 2
    ds = data.load(f"{tmp_path}/line1/images+{tmp_path}/x/line1/images")  # the folders above are called alike, too
    assert len(set(ds.classes)) == 2 and "x-line1-images-nut" in ds.classes
    (tmp_path / "y").mkdir()
    (tmp_path / "y/images").symlink_to(tmp_path / "line1/images")
    with pytest.raises(UsageError, match="the same data set twice"):
        data.load(f"{tmp_path}/line1/images+{tmp_path}/y/images")


def test_classes_never_share_a_name(tmp_path):
    """Protects joined sets from two classes that their new names make one."""
    for place in ("a/b-c", "a/x", "a-b/c", "a-b/x", "q/b-c", "q/c"):
        fill(tmp_path / place)
    with pytest.raises(UsageError, match="2 classes would be called 'a-b-c'"):
        data.load(f"{tmp_path}/a+{tmp_path}/a-b+{tmp_path}/q")


def test_link_loops(tmp_path):
    """Protects --predict FOLDER: each picture once, though links lead back to the folder or to its parent."""
    save(tmp_path / "p/0.png")
    save(tmp_path / "p/sub/1.png")
    (tmp_path / "p/self").symlink_to(tmp_path / "p")
    (tmp_path / "p/sub/up").symlink_to("..")
    (tmp_path / "p/again").symlink_to(tmp_path / "p/sub")
    assert sorted(path.name for path in data.image_files(tmp_path / "p")) == ["0.png", "1.png"]
    fill(tmp_path / "set/nut")
    (tmp_path / "set/nut/test/good/loop").symlink_to(tmp_path / "set")
    assert len(data.load(str(tmp_path / "set")).test) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of raw bytes")
def test_names_that_are_not_utf8(tmp_path):
    """Protects files out of a zip made on Windows: they are indexed, read, checked and remembered like any other."""
    folder = fill(tmp_path / "nut")
    os.rename(folder / "test/good/000.png", os.fsencode(folder / "test/good") + b"/gr\xf6\xdfe.png")
    ds = data.load(str(tmp_path))
    assert [len(ds.train), len(ds.test)] == [3, 4]
    assert data.check(ds, progress=False) == []
    assert data.Images(ds.test, 8)[1].shape == (3, 8, 8)


def test_a_class_is_a_folder_name(tmp_path):
    """Protects the run's folder from a list whose class names lead out of it."""
    (tmp_path / "visa/split_csv").mkdir(parents=True)
    text = "object,split,label,image,mask\n../up,train,normal,a.JPG,\n"
    (tmp_path / "visa/split_csv/1cls.csv").write_text(text)
    with pytest.raises(UsageError, match="line 2 is damaged"):
        data.load("visa", tmp_path)


def test_nothing_heavy_is_imported():
    """Protects the start of `--help`: the table of benchmarks needs neither numpy nor torch."""
    code = ("import sys, json; from common.layouts import BENCHMARKS; "
            "print(json.dumps([m for m in ('torch', 'numpy', 'scipy', 'PIL', 'tqdm') if m in sys.modules]))")
    root = Path(layouts.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert json.loads(done.stdout) == []
