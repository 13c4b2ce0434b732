"""The comparison of docs/protocol.md: what is run, what is kept, and that the page has what was kept."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from common import UsageError
from docs import evidence

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured.md"


def test_the_page_has_the_tables_of_the_results():
    """Every line of every table in docs/measured.md is what the kept numbers give."""
    files = evidence.files(evidence.RESULTS)
    assert files
    for file in files:
        for line in evidence.text_of(evidence.read(file)).splitlines():
            assert line in PAGE.read_text(), f"{file.name}: measured.md lacks a line that is printed: {line}"


@pytest.fixture
def small(monkeypatch):
    """Rows that train for a moment."""
    small = "--image-size 64 --depths 1,1,1,1"
    monkeypatch.setattr(evidence, "ROWS", {
        "revdist": evidence.row("distillation", f"cada {small} --calibration-steps 2", 2, 2),
        "omniad": evidence.row("Omni-AD", f"omniad {small}", 2, 2),
    })
    monkeypatch.setattr(evidence, "CALIBRATION", ("--calibration-steps", "2"))


def test_rows_are_trained_asked_and_kept(small, tiny_data, tmp_path, capsys):
    """A row that calibrates itself and one whose maps are calibrated, this one under shifts too: the records are
    complete, without paths of this machine, and the same command again runs nothing."""
    words = ["--data", str(tiny_data), "--teacher", "efficientnet_lite0", "--minutes", "1", "--jobs", "2",
             "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert evidence.main([*words, "--rows", "revdist"]) == 0
    assert evidence.main([*words, "--rows", "omniad", "--shift", "--time"]) == 0
    file, = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    kinds = [(record["row"], record["calibration"]) for record in found]
    assert kinds == [(row, name) for row in ("revdist", "omniad") for name in ("cada", "given", "none")]
    for record in found:
        assert record["steps"] == 2 and record["parameters"] > 0 and record["classes"]
        assert record["amp"] in ("off", "bf16")
        assert "--data FOLDER" in record["command"] and str(tmp_path) not in file.read_text()
        assert set(evidence.METRICS) <= set(record["mean"])
    assert [len(record.get("shift", ())) for record in found] == [0, 0, 0, 0, 0, 4]
    assert [record.get("ms", 0) > 0 for record in found] == [False] * 3 + [True] * 3
    printed = capsys.readouterr().out
    assert "python omniad.py" in printed
    assert "| Omni-AD, 1 min | 1 |" in printed and "| P-AUPRO | seed | clean |" in printed
    assert not list(tmp_path.glob("runs/*/model/maps"))
    evidence.main([*words, "--rows", "revdist,omniad"])
    assert "python " not in capsys.readouterr().out
    assert json.loads(file.read_text()) == found
    # the same rows of other data are other runs
    other = shutil.copytree(tiny_data / "screw", tmp_path / "other" / "screw").parent
    assert evidence.main(["--data", str(other), *words[2:], "--rows", "revdist"]) == 0
    assert json.loads((tmp_path / "other-efficientnet_lite0.json").read_text())[0]["classes"].keys() == {"screw"}


def test_nothing_is_trained_for_the_nearest_neighbour():
    """It has no steps, and nothing to calibrate."""
    args = evidence.parse(["--data", "parts", "--rows", "nearest"])
    model = evidence.Model("nearest", 0, args)
    assert model.training().command()[:2] == ("-m", "docs.nearest")
    assert not {"--steps", "--save-maps"} & set(model.words()) and not model.questions() and model.minutes == 0


def test_a_command_that_fails_is_named(small, tiny_data, tmp_path, capsys):
    """One line says which and why, what depends on it is not run, and the exit status is 1."""
    words = ["--data", str(tiny_data), "--weights", "nowhere.pth", "--rows", "omniad", "--minutes", "1",
             "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert evidence.launch(words) == 1
    printed = capsys.readouterr().out
    assert "FAILED: " in printed and "nowhere.pth: no such file" in printed and printed.count("FAILED") == 1
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("words, said", [
    (("--rows", "onenipp"), "choose from nearest-class"), (("--seeds", "a"), "whole numbers"),
    (("--jobs", "0"), "--jobs 0"), (("--minutes", "0"), "--minutes 0")])
def test_wrong_options_are_refused(words, said, capsys):
    """In one line, before anything runs."""
    assert evidence.launch(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_spread():
    """Sample standard deviation; what is undefined is left out."""
    assert evidence.spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert evidence.spread([None, 3.0]) == "3.0"
    assert evidence.spread([None]) == "-"


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_readme_has_the_numbers_of_the_results():
    """README's table of seven real classes, twenty minutes: row by row what the kept numbers give."""
    titles = {"OneNIP": "onenip", "Omni-AD": "omniad", "ROADS": "roads-3", "ROADS without prompts": "roads-1",
              "reverse distillation, the base of CADA": "revdist", "nearest neighbour": "nearest"}
    lines = (PAGE.parent.parent / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| seven real classes"))
    rows = {cells_of(line)[0]: cells_of(line)[1:] for line in lines[first + 2 : first + 2 + len(titles)]}
    assert rows.keys() == titles.keys()

    def text(teacher, row, calibration, part, metric):
        found = evidence.read(evidence.RESULTS / f"real-{teacher}.json")
        found = [r for r in found if (r["row"], r["calibration"]) == (row, calibration)]
        found = [r[part][metric] for r in found if r["minutes"] in (0, 20)]
        return evidence.spread(found) if found else ""

    for title, row in titles.items():
        plain, pool = (row, "none", "mean"), (row, "cada", "mixed", "i_auroc")
        expected = [text("efficientnet_lite0", *plain, "i_auroc"),
                    text("efficientnet_lite0", row, "none", "mixed", "i_auroc"), text("efficientnet_lite0", *pool)]
        expected += [text("efficientnet_lite0", *plain, metric) for metric in ("p_auroc", "p_ap", "p_aupro")]
        expected += [text("resnet18", *plain, "i_auroc"), text("resnet18", *pool), text("resnet18", *plain, "p_ap")]
        assert rows[title] == expected, title


def test_another_budget_is_another_row(small, tiny_data, tmp_path, capsys):
    """Records of several budgets share a file and stay apart in it and in the tables; what is not trained has none."""
    words = ["--data", str(tiny_data), "--teacher", "efficientnet_lite0", "--rows", "revdist", "--runs",
             str(tmp_path / "runs"), "--results", str(tmp_path)]
    for minutes in ("2", "1"):
        assert evidence.main([*words, "--minutes", minutes]) == 0
    found = evidence.read(tmp_path / f"{tiny_data.name}-efficientnet_lite0.json")
    assert [(r["minutes"], r["steps"]) for r in found] == [(1, 2)] * 3 + [(2, 4)] * 3
    printed = capsys.readouterr().out
    assert "| distillation, 1 min | 1 |" in printed and "| distillation, 2 min | 1 |" in printed
    usual = [record | {"minutes": evidence.MINUTES} for record in found[:3]]
    assert "| distillation | 1 |" in evidence.main_table(usual)
    assert evidence.main_table([record | {"minutes": 0} for record in usual]) == evidence.main_table(usual)


def test_what_the_page_says_of_calibration():
    """The counts in "What holds of the papers' claims" are those of all models that were calibrated."""
    page = " ".join(PAGE.read_text().split())
    calibrated = []
    for teacher, name in (("efficientnet_lite0", "Lite0"), ("resnet18", "the ResNet")):
        models = {}
        for record in evidence.read(evidence.RESULTS / f"real-{teacher}.json"):
            model = record["row"], record["minutes"], record["seed"]
            models.setdefault(model, {})[record["calibration"]] = record
        models = [model for model in models.values() if "cada" in model]
        beaten = [m["cada"]["mixed"]["i_auroc"] > m["given"]["mixed"]["i_auroc"] for m in models]
        assert re.search(f"in {sum(beaten)} of {len(models)} (models )?with {name}", page)
        calibrated += models

    def gains(metric, part):
        return [m["cada"][part][metric] - m["none"][part][metric] for m in calibrated]

    falls = [-gain for gain in gains("i_auroc", "mean")]
    worst = [fall for fall in falls if fall > 0]
    assert f"falls in {len(worst)} of these {len(falls)} models, by {max(worst):.1f} at most" in page
    p_ap = gains("p_ap", "mixed")
    fallen = sum(gain < 0 for gain in p_ap)
    assert f"falls in {fallen} of the {len(p_ap)} models, by 4 points in the median" in page
    assert -4.5 < statistics.median(p_ap) <= -3.5
    fallen = sum(gain < 0 for gain in gains("p_auroc", "mixed"))
    risen = sum(gain > 0 for gain in gains("p_aupro", "mixed"))
    assert f"and P-AUROC in {fallen}, though P-AUPRO" in page and f"rises in {risen} (" in page


def test_results_of_other_data_are_not_mixed(small, tiny_data, tmp_path):
    """Two folders of one name share a file of results: refused before anything runs."""
    words = ["--teacher", "efficientnet_lite0", "--rows", "revdist", "--minutes", "1", "--runs", str(tmp_path / "runs"),
             "--results", str(tmp_path)]
    for place, cls in (("a", "screw"), ("b", "capsule")):
        shutil.copytree(tiny_data / cls, tmp_path / place / "images" / cls)
    assert evidence.main(["--data", str(tmp_path / "a" / "images"), *words]) == 0
    before = (tmp_path / "images-efficientnet_lite0.json").read_bytes()
    with pytest.raises(UsageError, match="images-efficientnet_lite0.json is of other classes"):
        evidence.main(["--data", str(tmp_path / "b" / "images"), *words])
    assert (tmp_path / "images-efficientnet_lite0.json").read_bytes() == before
    with pytest.raises(UsageError, match="nowhere"):
        evidence.main(["--data", str(tmp_path / "nowhere"), *words])


def test_results_of_other_images_or_weights_are_not_mixed(tiny_data, tmp_path):
    """The same classes do not make the same data; records that do not say what they were trained with are taken."""
    for place in ("a", "b"):
        shutil.copytree(tiny_data / "screw", tmp_path / place / "images" / "screw")
    next((tmp_path / "b").rglob("good/*.png")).unlink()
    weights = tmp_path / "some.pth", tmp_path / "same.pth", tmp_path / "other.pth"
    for file, content in zip(weights, (b"1", b"1", b"2")):
        file.write_bytes(content)

    def args_of(place, weights):
        return evidence.parse(["--data", str(tmp_path / place / "images"), "--teacher", "resnet18", "--weights",
                               str(weights), "--minutes", "10", "--results", str(tmp_path)])

    args = args_of("a", weights[0])
    evidence.check(args)
    assert str(tmp_path) not in json.dumps(args.inputs)
    record = json.loads((evidence.RESULTS / "real-resnet18.json").read_bytes())[0]
    record["classes"] = {"screw": record["mean"]}
    file = tmp_path / "images-resnet18.json"
    evidence.write(file, [record])
    evidence.check(args_of("b", weights[2]))
    evidence.write(file, [record | {"inputs": args.inputs}])
    evidence.check(args_of("a", weights[1]))
    for place, other in (("b", weights[0]), ("a", weights[2])):
        with pytest.raises(UsageError, match="images-resnet18.json is of other images or other --weights"):
            evidence.check(args_of(place, other))


WRONG_RESULTS = ["", "[", "3", "{}", "null", '""', '[{"row": 1}]', "[1]", "[[]]"]


@pytest.mark.parametrize("content", WRONG_RESULTS)
def test_damaged_results_are_named(content, tmp_path, capsys):
    """In one line, before anything is trained: and not in a traceback after it."""
    file = tmp_path / "real-resnet18.json"
    file.write_text(content)
    assert evidence.launch(["--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "real-resnet18.json is damaged" in error and error.count("\n") == 1
    assert file.read_text() == content


def test_a_row_that_is_no_more_is_named(tmp_path):
    """It has no place in the table, and none in the order in which records are written."""
    record = json.loads((evidence.RESULTS / "real-resnet18.json").read_bytes())[0]
    for row in ("padim", []):
        (tmp_path / "x.json").write_text(json.dumps([record | {"row": row}]))
        with pytest.raises(UsageError, match="x.json is damaged"):
            evidence.read(tmp_path / "x.json")


@pytest.mark.parametrize("content", ["{}", "[]", "null", "{"])
def test_a_damaged_run_is_named_before_others_are_trained(content, small, tiny_data, tmp_path, monkeypatch, capsys):
    words = ["--data", str(tiny_data), "--rows", "omniad", "--minutes", "1", "--runs", str(tmp_path / "runs"),
             "--results", str(tmp_path)]
    monkeypatch.setattr(evidence.tables.Runner, "run", lambda *_: pytest.fail("something was run"))
    args = evidence.parse(words)
    evidence.check(args)
    folder = evidence.Model("omniad", 0, args).folder("given")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(content)
    assert evidence.launch(words) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'metrics.json'} is damaged" in error and error.count("\n") == 1


def test_wrong_data_start_nothing(tmp_path, capsys):
    assert evidence.launch(["--data", str(tmp_path / "nowhere"), "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_names_that_are_no_utf8_are_kept(tmp_path):
    record = json.loads((evidence.RESULTS / "real-resnet18.json").read_bytes())[0]
    record["classes"] = {os.fsdecode(b"nut-\xe4"): record["mean"]}
    evidence.write(tmp_path / "x.json", [record])
    assert evidence.read(tmp_path / "x.json") == [record]


@pytest.mark.parametrize("module", ["docs.evidence", "docs.figures", "kernels.bench", "kernels.check"])
def test_help_without_docstrings(module):
    """python -OO has none."""
    root = Path(__file__).resolve().parent.parent
    words = [sys.executable, "-B", "-OO", "-W", "ignore", "-m", module, "--help"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "--help" in done.stdout and not done.stderr
