"""The data sets: tiny copies of every layout with its quirks, every kind of image file, and the pixels in memory."""

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import UsageError, corruptions, data, files, layouts

RNG = np.random.default_rng(0)


def noise(height=12, width=16, channels=3):
    return RNG.integers(0, 256, (height, width, channels) if channels else (height, width), dtype=np.uint8)


def save(path, pixels=None, **options):
    """Write an array (or random pixels, or a Pillow image) as an image file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise() if pixels is None else pixels
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def mask_of(value=255, height=12, width=16):
    mask = np.zeros((height, width), np.uint8)
    mask[3:7, 4:9] = value
    return mask


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def fill_class(folder, train=3, good=2, bad=2, channels=3):
    """One class in MVTec layout with a single kind of defect, `hole`."""
    for i in range(train):
        save(folder / f"train/good/{i:03}.png", noise(channels=channels))
    for i in range(good):
        save(folder / f"test/good/{i:03}.png", noise(channels=channels))
    for i in range(bad):
        save(folder / f"test/hole/{i:03}.png", noise(channels=channels))
        save(folder / f"ground_truth/hole/{i:03}_mask.png", mask_of())
    return folder


def names(samples):
    return [(s.cls, s.defect, s.image.name, s.mask and s.mask.name, s.label) for s in samples]


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- layouts


def test_mvtec_layout(tmp_path):
    """Protects labels, masks, order, 1-channel files, and that junk of file managers is passed over in silence."""
    root = tmp_path / "mvtec"
    fill_class(root / "screw", channels=0)
    fill_class(root / "bottle", train=2, good=1)
    save(root / "bottle/test/broken_small/000.png")
    save(root / "bottle/ground_truth/broken_small/000_mask.png", mask_of())
    for junk in ("bottle/train/good/Thumbs.db", "bottle/test/hole/.DS_Store", "bottle/test/hole/._000.png",
                 "bottle/ground_truth/hole/desktop.ini", ".git/train/x.png", "license.txt"):
        touch(root / junk)
    ds = data.load("mvtec", tmp_path)
    assert (ds.name, ds.root, ds.classes) == ("mvtec", root, ["bottle", "screw"])
    assert ds.groups == {"mvtec": ["bottle", "screw"]}
    assert names(ds.train) == [("bottle", "good", "000.png", None, 0), ("bottle", "good", "001.png", None, 0)] + [
        ("screw", "good", f"00{i}.png", None, 0) for i in range(3)]
    assert names(ds.test)[:4] == [("bottle", "broken_small", "000.png", "000_mask.png", 1),
                                  ("bottle", "good", "000.png", None, 0),
                                  ("bottle", "hole", "000.png", "000_mask.png", 1),
                                  ("bottle", "hole", "001.png", "001_mask.png", 1)]
    assert {s.dataset for s in ds.train + ds.test} == {"mvtec"}
    assert data.read_image(ds.train[-1].image).shape == (12, 16, 3)
    # The tiny copy differs from the published counts and lacks classes; nothing else is wrong with it.
    differing, missing, total = ds.problems
    assert differing.startswith("classes that differ from MVTec AD: 2 (bottle has 2 training, 1 good")
    assert "instead of 209 training, 20 good and 63 defective" in differing
    assert missing.startswith("classes of MVTec AD that are missing: 13 (cable, ") and "3629 training" in total


def test_complete_benchmark_has_no_problems(tmp_path):
    """Protects the published counts: an index of the right size is accepted, one image fewer is told."""
    for cls, train, good, bad in (("01", 400, 21, 49), ("02", 399, 30, 200), ("03", 1000, 400, 41)):
        for folder, number in (("train/ok", train), ("test/ok", good), ("test/ko", bad), ("ground_truth/ko", bad)):
            (tmp_path / cls / folder).mkdir(parents=True)
            for i in range(number):
                (tmp_path / cls / folder / f"{i:04}.png").touch()
    ds = data.load("btad", tmp_path)
    assert ds.problems == []
    ds.train[0].image.unlink()
    problems = data.load("btad", tmp_path).problems
    assert len(problems) == 2 and "(01 has 399 training" in problems[0]
    assert data.load("btad", tmp_path, ["02", "03"]).problems == []  # a choice of classes is no fault


def test_counts_of_the_sheet():
    """Protects the table of counts against typing errors: its classes add up to the published totals."""
    for benchmark in layouts.BENCHMARKS.values():
        if None not in benchmark.counts.values():
            assert tuple(map(sum, zip(*benchmark.counts.values()))) == benchmark.total
    assert [len(b.counts) for b in layouts.BENCHMARKS.values()] == [15, 12, 3, 30]
    assert sum(layouts.BENCHMARKS["mvtec"].total[1:]) == 1725 and sum(layouts.BENCHMARKS["visa"].total[1:]) == 2162


@pytest.mark.parametrize("folder", ["mvtec", "MVTec-AD", "mvtec_anomaly_detection", "mvtec/mvtec_ad", "."])
def test_conventional_folder_names(tmp_path, folder):
    """Protects users who unpack an archive as it is, or point --data-root at the data set itself."""
    fill_class(tmp_path / folder / "bottle")
    (tmp_path / "visa").mkdir()
    assert data.load("mvtec", tmp_path).classes == ["bottle"]


def test_btad_extensions(tmp_path):
    """Protects the match of masks by stem: images and masks are bmp/png, png/png and bmp/bmp in classes 01, 02, 03."""
    root = tmp_path / "BTech_Dataset_transformed"
    suffixes = ("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")
    for cls, image, mask in suffixes:
        save(root / cls / f"train/ok/0000.{image}")
        save(root / cls / f"test/ok/0001.{image}")
        save(root / cls / f"test/ko/0020.{image}")
        save(root / cls / f"ground_truth/ko/0020.{mask}", mask_of())
    ds = data.load("btad", tmp_path)
    assert names(ds.test) == [row for cls, image, mask in suffixes for row in (
        (cls, "ko", f"0020.{image}", f"0020.{mask}", 1), (cls, "good", f"0001.{image}", None, 0))]
    assert data.read_mask(ds.test[-2].mask).sum() == 20


@pytest.fixture
def visa(tmp_path):
    """The raw VisA: masks of 1..n, .JPG, and the split in a csv (here with the byte order mark of a spreadsheet)."""
    root = tmp_path / "VisA"
    rows = [("object", "split", "label", "image", "mask")]
    for cls in ("pcb1", "candle"):
        for i in range(5):
            image = save(root / cls / f"Data/Images/Normal/{i:04}.JPG")
            rows.append((cls, "train" if i < 3 else "test", "normal", image.relative_to(root).as_posix(), ""))
        for i in range(2):
            image = save(root / cls / f"Data/Images/Anomaly/{i:03}.JPG")
            mask = save(root / cls / f"Data/Masks/Anomaly/{i:03}.png", mask_of(i + 1))
            rows.append((cls, "test", "anomaly", image.relative_to(root).as_posix(), mask.relative_to(root).as_posix()))
    (root / "split_csv").mkdir()

    def write(rows):
        with open(root / "split_csv/1cls.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(rows)

    write(rows)
    return tmp_path, rows, write


def test_visa_csv(visa):
    """Protects the split of the csv, upper-case suffixes, and masks whose values are small integers."""
    root, _, _ = visa
    ds = data.load("visa", root)
    assert ds.classes == ["candle", "pcb1"]
    assert [s.image.name for s in ds.train] == ["0000.JPG", "0001.JPG", "0002.JPG"] * 2
    assert names(ds.test)[:4] == [
        ("candle", "bad", "000.JPG", "000.png", 1), ("candle", "bad", "001.JPG", "001.png", 1),
        ("candle", "good", "0003.JPG", None, 0), ("candle", "good", "0004.JPG", None, 0)]
    assert all(data.read_mask(s.mask).sum() == 20 for s in ds.test if s.mask)


def test_visa_csv_oddities(visa):
    """Protects what is noted and left out: an anomaly without mask, one in training, a line that stands twice."""
    root, rows, write = visa
    rows[-1] = (*rows[-1][:4], "")
    rows[6] = (rows[6][0], "train", *rows[6][2:])
    write(rows + [rows[1], rows[1]])
    ds = data.load("visa", root)
    text = "\n".join(ds.problems)
    assert "defective test images without a mask: 1 (1cls.csv, candle: 1, first 001.JPG)" in text
    assert "training images left out, they are defective: 1 (1cls.csv, pcb1: 1, first " in text
    assert "entries that a list holds twice, the copies left out: 2 (1cls.csv, pcb1: 2)" in text
    assert len(ds.train) == 6 and [s.label for s in ds.test if s.cls == "pcb1"] == [1, 0, 0]
    assert [s.label for s in ds.test if s.mask is None] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("damage, told", [
    (lambda rows: [row[:4] for row in rows], "no column 'mask'"),
    (lambda rows: [], "no column"),
    (lambda rows: rows + [("pcb1", "valid", "normal", "a.JPG", "")], "line 16 is damaged"),
    (lambda rows: rows + [("pcb1", "test", "normal", "x" * 200_000, "")], "is damaged"),
    (lambda rows: rows + [("pcb1", "test")], "line 16 is damaged"),
    (lambda rows: rows + [("pcb1", "test", "normal", "pcb1/lost.JPG", "")], "pcb1/lost.JPG); unpack"),
    (lambda rows: rows + [("pcb1", "test", *rows[1][2:])], "for training and for testing"),
])
def test_visa_csv_damage(visa, damage, told):
    """Protects from a wrong split: a damaged list, or one whose files are not all there, is refused by name."""
    root, rows, write = visa
    write(damage(rows))
    with pytest.raises(UsageError) as error:
        data.load("visa", root)
    assert "1cls.csv" in one_line(error) and told in one_line(error)
    if "lost" in told:
        assert data.load("visa", root, ["candle"]).classes == ["candle"]  # the class that is whole can be used


@pytest.mark.parametrize("folder", ["VisA_pytorch/1cls", "visa", "1cls"])
def test_visa_prepared(tmp_path, folder):
    """Protects the form that VisA's own script writes: 1cls/CLS in MVTec layout, masks named like their images."""
    cls = tmp_path / folder / "candle"
    for path in ("train/good/0000.JPG", "test/good/0001.JPG", "test/bad/000.JPG"):
        save(cls / path)
    save(cls / "ground_truth/bad/000.png", mask_of())
    ds = data.load("visa", tmp_path)
    assert names(ds.test) == [("candle", "bad", "000.JPG", "000.png", 1), ("candle", "good", "0001.JPG", None, 0)]


def fill_realiad(images, jsons, cls="usb", mask="NG/usb_1.png"):
    entries = {"meta": {"prefix": f"{cls}/"}, "train": [], "test": []}
    for split, i in (("train", 0), ("train", 1), ("test", 2)):
        save(images / cls / f"OK/S000{i}/{cls}_{i}_OK_C1_2023.jpg")
        entries[split].append({"category": cls, "anomaly_class": "OK", "mask_path": None,
                               "image_path": f"OK/S000{i}/{cls}_{i}_OK_C1_2023.jpg"})
    for i, path in ((3, mask), (4, None)):
        save(images / cls / f"NG/{cls}_{i}_NG_C2_2023.jpg")
        entries["test"].append({"anomaly_class": "HS", "image_path": f"NG/{cls}_{i}_NG_C2_2023.jpg", "mask_path": path})
    save(images / cls / mask, mask_of())
    jsons.mkdir(parents=True, exist_ok=True)
    (jsons / f"{cls}.json").write_text(json.dumps(entries))
    return entries


@pytest.mark.parametrize("images, jsons", [
    ("Real-IAD/realiad_256", "Real-IAD/realiad_jsons"), ("realiad/realiad_512", "realiad/realiad_jsons/realiad_jsons"),
    ("Real-IAD", "Real-IAD"), ("realiad_1024", "realiad_jsons"), ("real-iad/realiad_1024", "real-iad/realiad_1024")])
def test_realiad(tmp_path, images, jsons):
    """Protects the json lists wherever they lie, and defective images without mask: defective, noted, never good."""
    fill_realiad(tmp_path / images, tmp_path / jsons)
    (tmp_path / jsons / "meta.json").write_text("{}")  # other programs keep such lists beside
    ds = data.load("realiad", tmp_path)
    assert ds.classes == ["usb"] and len(ds.train) == 2
    assert [(s.defect, s.label, s.mask and s.mask.name) for s in ds.test] == [
        ("HS", 1, "usb_1.png"), ("HS", 1, None), ("good", 0, None)]
    assert all(s.image.is_file() for s in ds.train + ds.test)
    text = "\n".join(ds.problems)
    assert "defective test images without a mask: 1 (usb.json, usb: 1, first usb_4" in text
    assert "classes of Real-IAD that are missing: 29 (audiojack" in text


def test_realiad_resolutions(tmp_path):
    """Protects the choice of resolution: the largest there is, or the one that --data-root names."""
    for size in (256, 1024, 512):
        fill_realiad(tmp_path / f"realiad_{size}", tmp_path / "realiad_jsons")
    assert "realiad_1024" in str(data.load("realiad", tmp_path).train[0].image)
    assert "realiad_256" in str(data.load("realiad", tmp_path / "realiad_256").train[0].image)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"train": []}', '{"train": [{"image_path": "x"}], "test": []}'])
def test_realiad_damage(tmp_path, text):
    """Protects from a traceback on a damaged json."""
    fill_realiad(tmp_path / "realiad_256", tmp_path / "realiad_jsons")
    (tmp_path / "realiad_jsons/usb.json").write_text(text)
    with pytest.raises(UsageError) as error:
        data.load("realiad", tmp_path)
    assert "usb.json" in one_line(error)


def test_realiad_noisy_training_is_left_out(tmp_path):
    """Protects "training takes good images only" against lists with defects in training, and labels against masks."""
    entries = fill_realiad(tmp_path / "realiad_256", tmp_path / "realiad_jsons")
    entries["train"].append(entries["test"].pop())
    entries["test"][0]["mask_path"] = "NG/usb_1.png"  # of an image that the list calls OK
    (tmp_path / "realiad_jsons/usb.json").write_text(json.dumps(entries))
    ds = data.load("realiad", tmp_path)
    assert len(ds.train) == 2 and not any(s.label for s in ds.train)
    assert [(s.label, s.mask and s.mask.name) for s in ds.test] == [(1, "usb_1.png"), (0, None)]
    text = "\n".join(ds.problems)
    assert "training images left out, they are defective: 1 (usb.json, usb: 1, first usb_4" in text


def test_joined(tmp_path):
    """Protects unique class names over several data sets, and which class belongs to which."""
    for path in ("mvtec/toothbrush", "mvtec/bottle", "mine/toothbrush", "mine/nut"):
        fill_class(tmp_path / path)
    ds = data.load("mvtec+mine", tmp_path)
    assert (ds.name, ds.root) == ("mvtec+mine", tmp_path)
    assert ds.groups == {"mvtec": ["bottle", "mvtec-toothbrush"], "mine": ["nut", "mine-toothbrush"]}
    assert ds.classes == ["bottle", "mvtec-toothbrush", "nut", "mine-toothbrush"]
    assert [s.cls for s in ds.train[::3]] == ds.classes and [s.dataset for s in ds.train[::6]] == ["mvtec", "mine"]
    part = data.load("mvtec+mine", tmp_path, ["mine-toothbrush"])
    assert part.groups == {"mine": ["mine-toothbrush"]} and {s.cls for s in part.test} == {"mine-toothbrush"}
    # the noise of a picture does not depend on what its class was renamed to
    alone = data.Images(data.load("mine", tmp_path, ["toothbrush"]).test, 16, corrupt=("gaussian_noise", 3))
    joined = data.Images(part.test, 16, corrupt=("gaussian_noise", 3))
    assert all(torch.equal(a, b) for a, b in zip(alone, joined))


def test_joined_folders_of_any_place(tmp_path, monkeypatch):
    """Protects the cache of features, which lies in the folder that holds them all; and many folders, whose names
    together are longer than a path may be."""
    monkeypatch.chdir(fill_class(tmp_path / "elsewhere/nut").parent)
    places = [fill_class(tmp_path / f"all/{i:02d}-{'x' * 100}" / "nut").parent for i in range(40)]
    ds = data.load("+".join(map(str, places)))
    assert ds.root == tmp_path / "all" and len(ds.classes) == 40


def test_folder_of_ones_own(tmp_path, monkeypatch):
    """Protects the ways to name a folder, and what is noted about it instead of refused."""
    root = tmp_path / "a+b"
    fill_class(root / "nut")
    (root / "nut/ground_truth/hole/001_mask.png").rename(root / "nut/ground_truth/hole/777.png")
    save(root / "nut/ground_truth/hole/000.png", mask_of())  # a second mask of image 000
    save(root / "nut/test/hole/000.jpg")
    save(root / "nut/train/bad/000.png")
    save(root / "nut/ground_truth/lost/000.png", mask_of())
    save(root / "nut/ground_truth/good/000.png", mask_of())  # masks of good images play no part
    touch(root / "nut/test/good/notes.txt")
    (root / "docs").mkdir()
    ds = data.load(str(root))
    assert names(ds.test) == [("nut", "good", "000.png", None, 0), ("nut", "good", "001.png", None, 0),
                              ("nut", "hole", "000.jpg", "000.png", 1), ("nut", "hole", "000.png", "000.png", 1),
                              ("nut", "hole", "001.png", None, 1)]
    for kind, place in (("training images left out, their folder is not called good: 1 (", "train/bad: 1"),
                        ("files left out, no images by their suffix: 1 (", "test/good: 1, first notes.txt"),
                        ("images that share a name, and so a mask: 2 (", "test/hole: 2, first 000.jpg"),
                        ("masks left out, their image has another one: 1 (", "000_mask.png, used is 000.png"),
                        ("folders left out, they are no class: 1 (", "docs: neither train nor test in it"),
                        ("defective test images without a mask: 1 (", "test/hole: 1 of 3, first 001.png"),
                        ("masks without an image: 1 (", "ground_truth/hole: 1, first 777.png"),
                        ("mask folders without images: 1 (", "ground_truth/lost: no folder of this name")):
        assert [kind in line and place in line for line in ds.problems].count(True) == 1, (kind, ds.problems)
    assert len(ds.problems) == 8
    monkeypatch.chdir(tmp_path)
    assert data.load("a+b").name == "a+b"
    monkeypatch.chdir(root)
    assert (data.load(".").name, len(data.load(".").test)) == ("a+b", 5)
    monkeypatch.setenv("AD_DATA", str(tmp_path))
    monkeypatch.chdir("/")
    (tmp_path / "link").symlink_to(root)
    assert (data.load("link").name, data.load("link").classes) == ("link", ["nut"])


def test_synth_is_drawn_when_needed(tmp_path, monkeypatch):
    """Protects `--data synth`: the drawing code is asked for the folder, which is then read like any other."""
    from common import synth
    monkeypatch.setattr(synth, "ensure", lambda root: fill_class(root / "synth" / "nut").parent)
    ds = data.load("synth", tmp_path)
    assert (ds.name, ds.classes, len(ds.train), ds.problems) == ("synth", ["nut"], 3, [])
    (tmp_path / "synth" / synth.MARKER).touch()  # the root may also be the data set itself
    assert data.load("synth", tmp_path / "synth").root == tmp_path / "synth"
    assert not (tmp_path / "synth" / "synth").exists()


def test_missing_data_says_what_to_do(tmp_path):
    """Protects newcomers: expected folder, what is there instead, source and licence, all in one line."""
    (tmp_path / "VisA").mkdir()
    for name, words in {"mvtec": ("MVTec AD", "CC BY-NC-SA 4.0", "consent", str(tmp_path / "mvtec"), "VisA"),
                        "visa": ("split_csv/1cls.csv", "spot-diff", "CC BY 4.0", f"{tmp_path / 'VisA'} empty"),
                        "btad": ("BTAD", "01/train/ok", "CC BY-NC-SA"),
                        "realiad": ("Real-IAD", "realiad_jsons", "on request")}.items():
        with pytest.raises(UsageError) as error:
            data.load(name, tmp_path)
        assert all(word in one_line(error) for word in (f"--data {name}", "--data-root", *words))
    with pytest.raises(UsageError, match="no folder"):
        data.load("mvtec", tmp_path / "nowhere")


def test_one_benchmark_is_not_taken_for_another(tmp_path):
    """Protects from evaluating MVTec AD under BTAD's name when the root is a data set itself."""
    fill_class(tmp_path / "bottle")
    with pytest.raises(UsageError, match="BTAD not found"):
        data.load("btad", tmp_path)


def test_unusable_sets_are_refused(tmp_path):
    """Protects from numbers that mean nothing, each with the one line that names the fault."""
    def told(*arguments):
        with pytest.raises(UsageError) as error:
            data.load(*arguments)
        return one_line(error)

    root = tmp_path / "mine"
    fill_class(root / "nut")
    assert "'bolt'" in told("mine", tmp_path, ["nut", "bolt"]) and "known: nut" in told("mine", tmp_path, ["bolt"])
    assert "same data set twice" in told("mine+mine", tmp_path)
    assert "neither a folder nor one of synth, mvtec" in told("mvtecc", tmp_path)
    assert "neither a folder" in told("", tmp_path)
    assert "'nut' has no test images" in told(str(root / "nut/train/good"))
    assert "found" in told(str(touch(tmp_path / "texts/a/b.txt").parent.parent))
    assert "empty" in told(str(touch(tmp_path / "empty/.x").parent))
    shutil.rmtree(root / "nut/train/good")
    assert "'nut' has no good training images" in told("mine", tmp_path)
    fill_class(root / "bolt", good=0, bad=0)
    assert "'bolt' has no test images" in told("mine", tmp_path, ["bolt"])
    fill_class(tmp_path / "mvtec/bottle")
    (tmp_path / "mvtec/bottle/ground_truth/hole/000_mask.png").unlink()
    assert "defective images without a mask" in told("mvtec", tmp_path)
    assert "test/hole: 1 of 2, first 000.png; expected" in told("mvtec", tmp_path)


def test_one_sided_test_sets_are_noted(tmp_path):
    """Protects against an undefined AUROC that nobody announced."""
    fill_class(tmp_path / "nut", good=0)
    fill_class(tmp_path / "bolt", bad=0)
    problems = data.load(str(tmp_path)).problems
    assert problems == ["classes without a defective test image, whose metrics are undefined: 1 (bolt)",
                        "classes without a good test image, whose image metrics are undefined: 1 (nut)"]


def test_image_files(tmp_path):
    """Protects --predict and --textures: files as they are, folders searched to the bottom, junk passed over."""
    for path in ("b.JPG", "a.png", "sub/deep/c.bmp", "sub/Thumbs.db", ".hidden/d.png", "sub/notes.txt"):
        touch(tmp_path / path)
    assert data.image_files(tmp_path) == [tmp_path / path for path in ("a.png", "b.JPG", "sub/deep/c.bmp")]
    assert data.image_files(str(tmp_path / "sub/notes.txt")) == [tmp_path / "sub/notes.txt"]
    with pytest.raises(UsageError, match="nowhere: no such"):
        data.image_files(tmp_path / "nowhere")


def test_real_data(real_data):
    """Protects the index on real files: every folder a class, every file indexed, every defect with a mask."""
    ds = data.load(str(real_data))
    assert ds.classes == sorted(path.name for path in real_data.iterdir() if path.is_dir() and path.name[0] != ".")
    assert len(ds.train) == len(list(real_data.glob("*/train/good/*")))
    assert len(ds.test) == len(list(real_data.glob("*/test/*/*")))
    assert ds.problems == []
    assert all((s.mask is not None) == bool(s.label) for s in ds.test)
    images = data.Images(ds.test[::60], 64)
    assert [bool(images.mask(i).any()) for i in range(len(images))] == [bool(s.label) for s in images.samples]


# ------------------------------------------------------------------------------------------------------ kinds of files


def sixteen_bit_rgb(path, pixels):
    """A 16-bit RGB PNG, which Pillow cannot write. pixels: uint16 (H, W, 3)."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_every_mode_becomes_rgb(tmp_path):
    """Protects colour and brightness of every kind of file; 16 bits are scaled, which Pillow alone would clip."""
    rgb, grey, deep = noise(), noise(channels=0), RNG.integers(0, 65536, (12, 16), dtype=np.uint16)
    alpha = noise(channels=0)
    grey3 = np.repeat(grey[..., None], 3, 2)
    palette = Image.fromarray(rgb // 64 * 64).quantize(64)
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]  # (H, W, 3)
    floats = RNG.random((12, 16), dtype=np.float32)
    inks = [Image.fromarray(255 - rgb[..., c]) for c in range(3)] + [Image.new("L", (16, 12))]
    cases = {
        "rgb.png": (rgb, rgb), "rgb.bmp": (rgb, rgb), "rgb.tif": (rgb, rgb), "grey.png": (grey, grey3),
        "rgba.png": (np.dstack([rgb, alpha]), rgb),
        "la.png": (np.dstack([grey, alpha]), grey3),
        "bits.png": (grey > 127, np.repeat((grey > 127)[..., None], 3, 2) * np.uint8(255)),
        "palette.png": (palette, colours),
        "16.png": (deep, np.repeat((deep >> 8)[..., None], 3, 2)),
        "16.tif": (deep, np.repeat((deep >> 8)[..., None], 3, 2)),
        "32.tif": (deep.astype(np.int32), np.repeat((deep >> 8)[..., None], 3, 2)),
        "float.tif": (floats, np.repeat(np.rint(floats * 255)[..., None], 3, 2)),
        "float255.tif": (floats * 255, np.repeat(np.rint(floats * 255)[..., None], 3, 2)),
        "cmyk.tif": (Image.merge("CMYK", inks), rgb),
    }
    for name, (pixels, expected) in cases.items():
        result = data.read_image(save(tmp_path / name, pixels))
        assert result.dtype == np.uint8 and result.shape == (12, 16, 3), name
        np.testing.assert_array_equal(result, expected, err_msg=name)
    wide = np.dstack([deep, deep[::-1], 65535 - deep])
    sixteen_bit_rgb(tmp_path / "16rgb.png", wide)
    np.testing.assert_array_equal(data.read_image(tmp_path / "16rgb.png"), wide >> 8)


@pytest.mark.filterwarnings("error")
def test_transparent_palettes_keep_their_colours(tmp_path):
    """Protects palette files with transparency, which Pillow converts with a warning each."""
    palette = Image.fromarray(noise() // 64 * 64).quantize(64)
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]  # (H, W, 3)
    for name, transparency in (("bytes.png", bytes(range(0, 64))), ("index.png", 5)):
        path = save(tmp_path / name, palette, transparency=transparency)
        np.testing.assert_array_equal(data.read_image(path), colours)


def test_exif_orientation_is_ignored(tmp_path):
    """Protects the match of image and mask: both are read as stored, in formats that Pillow turns, too."""
    grey = noise(12, 16, 1)[..., 0]
    grey[0, 0] = 255
    deep = grey.astype(np.uint16) * 257
    for orientation in range(1, 9):  # 6: "turn by a quarter to display"
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert data.read_image(save(tmp_path / "a.jpg", noise(12, 16), exif=exif)).shape == (12, 16, 3)
        for name, pixels in (("a.png", grey), ("a.webp", noise(12, 16)), ("a.tif", grey), ("deep.tif", deep)):
            path = save(tmp_path / name, pixels, exif=exif)
            assert files.inspect(path)["size"] == [16, 12]
            if name != "a.webp":  # whose pixels are not kept exactly
                np.testing.assert_array_equal(data.read_image(path)[..., 0], grey)
        mask = save(tmp_path / "mask.tif", mask_of(), exif=exif)
        np.testing.assert_array_equal(data.read_mask(mask), mask_of() > 0)


def test_every_mask_is_larger_than_zero(tmp_path):
    """Protects the rule `> 0`: values 1..n, 16 bits below 256, palettes whose index 0 is white, transparent paper."""
    truth = mask_of() > 0
    white_first = Image.fromarray(np.where(truth, 0, 1).astype(np.uint8))
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    label_colours = Image.fromarray(np.where(truth, 1, 0).astype(np.uint8))
    label_colours.putpalette([0, 0, 0, 128, 0, 0])
    paper = np.full((12, 16, 4), 255, np.uint8)
    paper[..., 3] = mask_of(9)
    cases = {"255.png": mask_of(), "1.png": mask_of(1), "bits.png": truth, "16.png": mask_of(3).astype(np.uint16),
             "rgb.png": np.dstack([mask_of(0), mask_of(0), mask_of(2)]), "white_first.png": white_first,
             "labels.png": label_colours, "paper.png": paper, "la.png": np.dstack([mask_of(1), mask_of(0) + 255]),
             "bmp.bmp": mask_of(), "float.tif": mask_of().astype(np.float32) / 1e4,
             "white paper.png": np.where(truth, 9, 255).astype(np.uint8)}
    for name, pixels in cases.items():
        options = {"transparency": 255} if name.startswith("white paper") else {}
        mask = data.read_mask(save(tmp_path / name, pixels, **options))
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, truth, err_msg=name)


def unreadable_files(folder):
    whole = save(folder / "whole.png", noise(64, 64)).read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    whole = save(folder / "whole.jpg", noise(64, 64)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    touch(folder / "empty.png")
    (folder / "folder.png").mkdir()
    return [folder / name for name in ("cut.png", "cut.jpg", "text.png", "empty.png", "folder.png", "absent.png")]


def test_unreadable_files_are_named(tmp_path):
    """Protects from tracebacks, and from half-grey pictures out of truncated files."""
    for path in unreadable_files(tmp_path):
        for read in (data.read_image, data.read_mask):
            with pytest.raises(UsageError) as error:
                read(path)
            assert path.name in one_line(error)
    for name, values in (("big.tif", np.full((4, 4), 70000, np.int32)), ("minus.tif", np.full((4, 4), -1, np.int32)),
                         ("nan.tif", np.full((4, 4), np.nan, np.float32)),
                         ("float.tif", np.full((4, 4), 7e4, np.float32))):
        with pytest.raises(UsageError, match=name):
            data.read_image(save(tmp_path / name, values))


# ------------------------------------------------------------------------------------------------- resized, in memory


@pytest.mark.parametrize("height, width, size", [(90, 70, 32), (20, 24, 48)])
def test_resize_image_is_antialiased_bilinear(height, width, size):
    """Protects the resize that published numbers rest on, against torch's own antialiased one, within rounding."""
    image = noise(height, width)
    expected = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), (size, size), mode="bilinear",
                             antialias=True, align_corners=False)[0].permute(1, 2, 0)
    result = data.resize_image(image, size)
    assert result.shape == (size, size, 3) and result.dtype == np.uint8
    assert np.abs(result - expected.numpy()).max() <= 1.01


def test_resize_mask_rules():
    """Protects the three rules, each against its definition in torch; and the order in which they grow."""
    mask = RNG.random((90, 70)) > 0.6
    mask[:20, :20] = False
    size = 32
    source = torch.from_numpy(mask)[None, None].float()  # (1, 1, H, W)
    smooth = F.interpolate(source, (size, size), mode="bilinear", antialias=True)[0, 0]
    nearest = F.interpolate(source, (size, size), mode="nearest-exact")[0, 0]
    half, near, some = (data.resize_mask(mask, size, rule) for rule in ("half", "nearest", "any"))
    clear = (smooth - 0.5).abs().numpy() > 1 / 255
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(half[clear], (smooth > 0.5).numpy()[clear])
    np.testing.assert_array_equal(near, nearest.numpy() > 0)
    visible = ((smooth == 0) | (smooth > 1 / 255)).numpy()
    np.testing.assert_array_equal(some[visible], (smooth > 0).numpy()[visible])
    assert (half <= some).all() and half.sum() < some.sum()
    assert half.dtype == near.dtype == some.dtype == bool
    np.testing.assert_array_equal(data.resize_mask(mask, size), half)
    with pytest.raises(UsageError, match="half, nearest, any"):
        data.resize_mask(mask, size, "max")


def test_normalize():
    """Protects the ImageNet statistics and their channel order: each value by the formula, and white by hand."""
    batch = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    result = data.normalize(batch)
    assert result.dtype == torch.float32 and result.shape == batch.shape
    for c, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(result[:, c], (batch[:, c] / 255 - mean) / std)


@pytest.fixture
def tiny(tmp_path):
    """A data set in which one mask is so small that it vanishes at 8 px."""
    fill_class(tmp_path / "set/nut")
    mask = np.zeros((12, 16), np.uint8)
    mask[0, 0] = 255
    save(tmp_path / "set/nut/ground_truth/hole/001_mask.png", mask)
    return data.load(str(tmp_path / "set"))


def test_images(tiny):
    """Protects what `Images` hands out, from memory as from the file, and that the user's copy is his own."""
    images = data.Images(tiny.test, 8)
    expected = [torch.from_numpy(data.resize_image(data.read_image(s.image), 8)).permute(2, 0, 1) for s in tiny.test]
    assert len(images) == 4 and not images.cached
    assert all(torch.equal(image, other) for image, other in zip((images[i] for i in range(4)), expected))
    images.preload()
    assert images.cached
    for sample in tiny.test:
        sample.image.unlink()  # so they must come from memory
    images[0].zero_()
    assert all(torch.equal(images[i], other) and images[i].dtype == torch.uint8 for i, other in enumerate(expected))


def test_images_masks(tiny, tmp_path):
    """Protects pixel labels, the count of vanished defects, and an image and a mask that do not belong together."""
    images = data.Images(tiny.test, 8)
    masks = [images.mask(i) for i in (0, 1, 2, 3, 3)]
    assert all(mask.dtype == torch.bool and mask.shape == (8, 8) for mask in masks)
    assert [bool(mask.any()) for mask in masks] == [False, False, True, False, False] and images.vanished == 1
    assert [s.label for s in tiny.test] == [0, 0, 1, 1]  # vanished, yet still defective
    growing = data.Images(tiny.test, 8, mask_rule="any")
    assert growing.mask(3).any() and growing.vanished == 0
    save(tiny.test[2].mask, mask_of(height=24, width=32))
    with pytest.raises(UsageError) as error:
        images.mask(2)
    assert all(word in one_line(error) for word in (str(tiny.test[2].mask), str(tiny.test[2].image), "32x24", "16x12"))


def test_preload_keeps_to_its_share(tiny, monkeypatch):
    """Protects the machine: no cache beyond the share of free memory, also when processes of a torchrun divide it."""
    need = 4 * 3 * 8 * 8
    monkeypatch.setattr(data, "free_memory", lambda: 2 * need)
    for share, processes, fits in ((0.5, "1", True), (0.49, "1", False), (0.5, "2", False), (1, "2", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        images = data.Images(tiny.test, 8, memory_share=share, workers=2)
        images.preload()
        assert images.cached == fits
        assert images[3].shape == (3, 8, 8)
    monkeypatch.undo()
    assert 2**20 < data.free_memory() < 2**50


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_preload_in_a_container(tiny, monkeypatch):
    """Protects from the bus error of an overfull /dev/shm (64 MiB in many containers): then memory is not shared."""
    for free, shared in ((10**6, True), (10, False)):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        images = data.Images(tiny.test, 8)
        images.preload()
        assert images.cached and images._pixels.is_shared() == shared


def test_preload_stops_at_an_unreadable_file(tiny):
    """Protects from a hang or a silent hole in the cache."""
    tiny.train[1].image.write_bytes(b"no picture")
    images = data.Images(tiny.train, 8)
    with pytest.raises(UsageError, match=tiny.train[1].image.name):
        images.preload()
    assert not images.cached


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_images_in_workers(tiny, method):
    """Protects DataLoader workers, which receive the cache through fork or through pickling."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("fork is for Linux")
    images = data.Images(tiny.test, 8)
    expected = torch.stack([images[i] for i in range(4)])
    images.preload()
    for sample in tiny.test:
        sample.image.unlink()
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_images_decode_in_workers(tiny):
    """Protects workers without a cache."""
    images = data.Images(tiny.test, 8)
    loader = torch.utils.data.DataLoader(images, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.stack([images[i] for i in range(4)]))


def test_corrupted_at_the_original_resolution(tiny):
    """Protects the order of operations (corrupt, then resize): the other order is a far harder test."""
    images = data.Images(tiny.test, 8, corrupt=("defocus_blur", 2))
    for i, sample in enumerate(tiny.test):
        expected = data.resize_image(corruptions.corrupt(data.read_image(sample.image), "defocus_blur", 2), 8)
        np.testing.assert_array_equal(images[i].permute(1, 2, 0).numpy(), expected)


def test_noise_belongs_to_the_file(tiny, tmp_path):
    """Protects `--corrupt gaussian_noise`: the same noise wherever the data lie and in any order, one for each file."""
    for sample in tiny.test:
        save(sample.image, np.full((12, 16, 3), 128, np.uint8))
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere/set")
    there = data.load(str(tmp_path / "elsewhere/set"))
    here = data.Images(tiny.test, 16, corrupt=("gaussian_noise", 3))
    moved = data.Images(there.test[::-1], 16, corrupt=("gaussian_noise", 3))
    assert all(torch.equal(here[i], moved[3 - i]) for i in range(4))
    assert len({here[i].numpy().tobytes() for i in range(4)}) == 4  # good/000.png and hole/000.png differ too


# ------------------------------------------------------------------------------------------------- check


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What files are remembered by lies in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def set_back(folder):
    """Make all files a minute old: those of this moment are not remembered, as they may still change."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 60,) * 2)


@pytest.mark.parametrize("victim", ["train/good/001.png", "test/good/001.png", "test/hole/001.png",
                                    "ground_truth/hole/001_mask.png"])
@pytest.mark.parametrize("damage, told", [
    (b"", "the file is empty (zero bytes)"), (b"no picture", "no image, or of an unknown format"),
    (None, "no such file")])
def test_check_finds_unreadable_files(tmp_path, victim, damage, told):
    """Protects hours of training: images of both splits and masks are looked at first, and the line names the file."""
    ds = data.load(str(fill_class(tmp_path / "set/nut").parent))
    path = tmp_path / "set/nut" / victim
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(UsageError) as error:
        data.check(ds, progress=False)
    assert victim in one_line(error) and told in one_line(error)


def test_check_counts_the_other_files(tmp_path):
    """Protects the user from mending one file a run: the line says how many there are and what names them all."""
    ds = data.load(str(fill_class(tmp_path / "set/nut").parent))
    for victim in ("train/good/001.png", "test/good/001.png"):
        (tmp_path / "set/nut" / victim).write_bytes(b"")
    save(tmp_path / "set/nut/ground_truth/hole/001_mask.png", mask_of(height=5, width=4))
    with pytest.raises(UsageError, match="train/good/001.png.*and 2 more files; python -m common.data"):
        data.check(ds, progress=False)
    assert sum("problem: " in line for line in data.summary(ds).splitlines()) == 3


@pytest.mark.parametrize("name", ["png", "jpg", "bmp", "webp", "tif", "rgba.bmp", "progressive.jpg", "gif", "tga"])
def test_check_finds_what_was_cut_off(tmp_path, name):
    """Protects from half an image: files are found that lack their end, wherever they were cut; whole ones pass."""
    pixels = noise(64, 64, 4 if name == "rgba.bmp" else 3)
    whole = save(tmp_path / f"whole.{name}", pixels, **({"progressive": True} if name[0] == "p" else {}))
    assert files.inspect(whole)["size"] == [64, 64]
    content = whole.read_bytes()
    for share in (0.3, 0.6, 0.95):
        cut = tmp_path / f"cut.{name}"
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UsageError, match=cut.name):
            files.inspect(cut)
    more = tmp_path / f"more.{name}"
    more.write_bytes(content + b"written by a camera after the picture")
    assert files.inspect(more) == files.inspect(whole)


def blank_png(path, width, height):
    """A PNG whose header claims a size that its pixels do not have."""
    sixteen_bit_rgb(path, np.zeros((1, 1, 3), np.uint16))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    return path


def test_absurd_dimensions(tmp_path):
    """Protects the memory: 189 megapixels end in a line that says what to do, from the header alone."""
    for width, height, told in ((14000, 13500, "189 megapixels"), (2**30, 2**30, "shrink it or cut it into tiles")):
        path = blank_png(tmp_path / "huge.png", width, height)
        for look in (files.inspect, data.read_image, data.read_mask):
            with pytest.raises(UsageError, match=f"huge.png: {width}x{height} .*megapixels") as error:
                look(path)
            assert told in one_line(error) and "tiles" in one_line(error)


@pytest.mark.filterwarnings("error")
def test_check_names_what_is_odd(tmp_path, monkeypatch):
    """Protects the user's picture of his data: pages, 16-bit colour, large images, masks that mark nothing."""
    monkeypatch.setattr(data, "LARGE", 12 * 16)
    ds = data.load(str(fill_class(tmp_path / "set/nut", train=4).parent))
    assert data.check(ds, progress=False) == []
    train, masks = tmp_path / "set/nut/train/good", tmp_path / "set/nut/ground_truth/hole"
    pages = [Image.fromarray(noise()) for _ in range(3)]
    pages[0].save(train / "000.png", format="TIFF", save_all=True, append_images=pages[1:])
    sixteen_bit_rgb(train / "001.png", np.full((12, 16, 3), 4095, np.uint16))
    save(train / "002.png", noise(13, 16))
    save(masks / "000_mask.png", mask_of(0))
    shape_in_alpha = np.zeros((12, 16, 4), np.uint8)
    shape_in_alpha[..., 3] = mask_of(200)
    save(masks / "001_mask.png", shape_in_alpha)
    expected = [
        "files of several pages or frames, of which only the first is used: 1 (nut: 000.png, 3 pages)",
        "16-bit colour images, of which only the upper 8 bits are used: 1 (nut: 001.png)",
        "images of more than 0 megapixels, slow to decode (shrink them once): 1 (nut: 002.png, 16x13)",
        f"masks that mark nothing, though their images are defective: 1 (nut: {masks}/000_mask.png)",
        ("masks whose shape is only in the transparency, so that they mark nothing: 1 "
         f"(nut: {masks}/001_mask.png)")]
    assert data.check(ds, progress=False) == expected and ds.problems == expected
    assert data.check(ds, progress=False) == expected and ds.problems == expected  # told once


def test_check_names_masks_that_lose_something(tmp_path):
    """Protects defects: pages of a mask that nobody reads, and 16-bit colours that Pillow makes 0."""
    ds = data.load(str(fill_class(tmp_path / "set/nut").parent))
    masks = tmp_path / "set/nut/ground_truth/hole"
    pages = [Image.fromarray(mask_of()) for _ in range(2)]
    pages[0].save(masks / "000_mask.png", format="TIFF", save_all=True, append_images=pages[1:])
    sixteen_bit_rgb(masks / "001_mask.png", np.full((12, 16, 3), 700, np.uint16))
    assert data.check(ds, progress=False) == [
        f"masks of several pages, of which only the first is used: 1 (nut: {masks}/000_mask.png)",
        f"masks in 16-bit colour, in which values below 256 count as 0: 1 (nut: {masks}/001_mask.png)"]


def count_looks(monkeypatch):
    """The list that every path is appended to when its file is really looked at."""
    looked, inspect = [], files.inspect

    def counting(path, kind="image"):
        looked.append(path)
        return inspect(path, kind)

    monkeypatch.setattr(files, "inspect", counting)
    return looked


def test_check_remembers(tmp_path, monkeypatch, own_cache):
    """Protects the start of the second run: nothing is looked at twice, but what has changed, or was bad, is."""
    ds = data.load(str(fill_class(tmp_path / "set/nut").parent))
    set_back(tmp_path)
    looked = count_looks(monkeypatch)
    for expected in (9, 0):
        looked.clear()
        assert data.check(ds, progress=False) == []
        assert len(looked) == expected
    assert [path.name for path in (own_cache / "anomaly-detection").iterdir()] == ["set.json"]
    save(ds.test[0].image, noise())  # just now: looked at, but not remembered, as it may change within the clock's tick
    for _ in range(2):
        looked.clear()
        data.check(ds, progress=False)
        assert looked == [ds.test[0].image]
    ds.test[0].image.write_bytes(b"bad")
    set_back(tmp_path)
    for _ in range(2):
        with pytest.raises(UsageError):
            data.check(ds, progress=False)
    save(ds.test[0].image, noise())
    known = own_cache / "anomaly-detection/set.json"
    of_before = {key: [12, 34, None] for key in json.loads(known.read_text())}
    for damaged in ({"damaged": 3}, of_before):
        known.write_text(json.dumps(damaged))
        looked.clear()
        assert data.check(ds, progress=False) == [] and len(looked) == 9


@pytest.mark.parametrize("cache", ["file", "missing", "relative"])
def test_check_without_a_place_to_remember(tmp_path, monkeypatch, cache):
    """Protects read-only systems and users without a home: the check works, and leaves nothing elsewhere."""
    ds = data.load(str(fill_class(tmp_path / "set/nut").parent))
    set_back(tmp_path)
    value = {"file": str(touch(tmp_path / "set/file")), "missing": "/proc/none", "relative": "somewhere"}[cache]
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert data.check(ds, progress=False) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert (tmp_path / "set/file").read_bytes() == b""


def test_check_takes_a_millisecond_a_file(tmp_path):
    """A guard against decoding what only had to be opened: 200 images of a megapixel, in far less than it takes to
    decode them (measured: 0.2 ms a file)."""
    big = save(tmp_path / "set/nut/train/good/000.png", np.tile(noise(64, 64), (16, 16, 1)))
    for i in range(1, 200):
        os.link(big, big.with_name(f"{i:03}.png"))
    ds = data.load(str(tmp_path / "set"), need_test=False)
    start = time.process_time()
    data.check(ds, progress=False)
    looking = time.process_time() - start
    start = time.process_time()
    for sample in ds.train[:10]:
        data.read_image(sample.image)
    assert looking < 5 * (time.process_time() - start)


def test_threads_stop_with_their_listener():
    """Protects Ctrl-C: who stops listening does not wait for thousands of files that are still in the queue."""
    done = []

    def slow(i):
        time.sleep(0.01)
        done.append(i)
        return i

    results = data._in_threads(slow, range(5000), "slow", progress=False, workers=2)
    assert next(results) == 0
    results.close()
    assert len(done) < 2500


# ------------------------------------------------------------------------------------------------- depth


def deep_class(folder, *largest, kind=np.uint16, suffix="png"):
    """Training images whose grey values reach to `largest`, one image for each."""
    for i, top in enumerate(largest):
        values = np.linspace(0, top, 12 * 16).reshape(12, 16)
        save(folder / f"train/good/{i}.{suffix}", values.astype(kind))


@pytest.mark.parametrize("largest, kind, suffix, top", [
    ((200, 255), np.int32, "tif", 255), ((100, 256), np.uint16, "png", 1023), ((50, 4095), np.uint16, "png", 4095),
    ((4080, 3000), np.uint16, "tif", 4095), ((9000, 20), np.uint16, "png", 16383),
    ((255, 65535), np.int32, "tif", 65535), ((0.5, 1.0), np.float32, "tif", 1), ((0.5, 2.5), np.float32, "tif", 255),
    ((0.5, 1.0001), np.float32, "tif", 1),
    ((3000.0, 10), np.float32, "tif", 4095)])
def test_depth_is_found_on_a_class(tmp_path, largest, kind, suffix, top):
    """Protects grey levels: the brightest training image of a class decides for all, none becomes black, and 256 levels
    remain where there were as many."""
    deep_class(tmp_path / "nut", *largest, kind=kind, suffix=suffix)
    save(tmp_path / "bolt/train/good/0.png")
    ds = data.load(str(tmp_path), need_test=False)
    depths = data.depths(ds.train, progress=False)
    assert depths == {"bolt": None, "nut": top}
    assert data.depth_line(depths) == (
        f"grey values of more than 8 bits, scaled by what the training images hold: nut 0..{top}")
    images = data.Images(ds.train, 16, depths=depths)
    for i, brightest in enumerate(largest, start=1):  # 0 is the bolt
        expected = brightest / top * 255
        assert abs(int(images[i].max()) - expected) <= 1 + expected / 50, (i, images[i].max())
    levels = np.arange(256).reshape(16, 16)
    if kind != np.float32:
        factor = (top + 1) // 256
        path = save(tmp_path / "levels.tif", (levels * factor).astype(kind))
        np.testing.assert_array_equal(data.read_image(path, top)[..., 0], levels)
        bright = save(tmp_path / "bright.tif", np.full((4, 4), 65535, np.int32))
        assert (data.read_image(bright, top) == 255).all()  # clipped, not wrapped


def test_depth_belongs_to_the_class_not_to_the_image(tmp_path):
    """Protects brightness as a sign of defects: a dark image stays dark, at test and at prediction too."""
    deep_class(tmp_path / "nut", 4000, 400)
    ds = data.load(str(tmp_path), need_test=False)
    depths = data.depths(ds.train, progress=False)
    images = data.Images(ds.train, 16, depths=depths)
    assert images[0].max() > 9 * images[1].max()
    unknown = [data.Sample(s.image, None, 0, "", "", "") for s in ds.train]  # as --predict makes them
    for i in range(2):
        assert torch.equal(data.Images(unknown, 16, depths=depths)[i], images[i])
    several = {"nut": 4095, "bolt": 255}  # which one a picture of no class belongs to is not known
    assert data.Images(unknown, 16, depths=several)[1].max() > 9 * images[1].max() // 10
    assert data.depth_line({"bolt": None}) == ""


def test_depths_are_remembered(tmp_path, monkeypatch):
    """Protects the start of the second run: the pixels of deep images are read once."""
    deep_class(tmp_path / "nut", 4000, 400)
    set_back(tmp_path)
    ds = data.load(str(tmp_path), need_test=False)
    first = data.depths(ds.train, progress=False)
    monkeypatch.setattr(files, "largest_value", None)
    assert data.depths(ds.train, progress=False) == first == {"nut": 4095}


# -------------------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path):
    """Protects `python -m common.data`: a table, the problems, exit status 0; one line and 2 for a wrong call."""
    fill_class(tmp_path / "set/nut")
    save(tmp_path / "set/nut/train/good/000.png", noise(24, 32))
    (tmp_path / "set/nut/train/good/001.png").write_text("no picture")
    save(tmp_path / "set/nut/ground_truth/hole/000_mask.png", mask_of(height=5, width=4))
    root = Path(data.__file__).parent.parent
    run = subprocess.run([sys.executable, "-m", "common.data", "set", "--data-root", str(tmp_path), "--classes", "nut"],
                         capture_output=True, text=True, cwd=root)
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[1].split() == ["class", "train", "test", "good", "test", "defective", "masks", "size"]
    assert lines[2].split() == ["nut", "3", "2", "2", "2", "16x12", "to", "32x24"]
    assert lines[3].split() == ["all", "3", "2", "2", "2"]
    assert "good/001.png" in lines[4] and "is 4x5, but its image" in lines[5] and len(lines) == 6


def test_command_line_mistakes(tmp_path, capsys):
    """Protects the exit status 2, the single line on stderr, and the clean bill of a set without problems."""
    fill_class(tmp_path / "set/nut")
    assert data.main(["set", "--data-root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("no problems found\n")
    for arguments in (["nowhere"], ["mvtec", "--data-root", str(tmp_path)],
                      ["set", "--data-root", str(tmp_path), "--classes", "nut,bolt"]):
        assert data.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_masks_in_jpeg_are_noted(tmp_path):
    """Protects against masks that a lossy format has smeared."""
    fill_class(tmp_path / "nut", bad=1)
    save(tmp_path / "nut/test/hole/7.png")
    save(tmp_path / "nut/ground_truth/hole/7.jpg", mask_of())
    _, faults, notes = data.scan(data.load(str(tmp_path)))
    assert faults == [] and len(notes.lines()) == 1 and "7.jpg" in notes.lines()[0]
