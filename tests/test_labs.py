"""The course's pages: every command of the labs runs, every number that they name comes out, every place exists."""

import importlib
import re
from pathlib import Path

import pytest

from docs import exercises, labs

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = labs.read(labs.PAGE.read_text())
NAMES = "--classes", "hex_nut,screw,wood_planks"  # as in most labs


@pytest.fixture(scope="module")
def small(tiny_data):
    """What makes every script's run as small as it can be."""
    data = "--data", str(tiny_data), "--image-size", "64"
    blocks = "--steps", "2", "--depths", "1,1,1,1"
    transformer = "--steps", "2", "--hidden", "32", "--heads", "2", "--mlp", "32"
    return {
        "docs.nearest": (*data, "--patches", "40"),
        "roads": (*data, *blocks),
        "omniad": (*data, *blocks),
        "onenip": (*data, *transformer, "--bank", "1"),
        "cada": (*data, *transformer, "--depths", "1,1,1,1", "--calibration-steps", "2"),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("labs")


@pytest.mark.parametrize("lab", PAGE, ids=[f"lab{lab.number}" for lab in PAGE])
def test_the_lab_runs(lab, small, runs):
    """In the page's order, as later labs look at the runs of earlier ones: each number of the tables comes out."""
    found = labs.run(lab, 0, runs, small)
    assert len(found) == len(lab.rows) >= 3
    assert all(value == value for value in found.values())  # not NaN


@pytest.mark.slow
@pytest.mark.parametrize("lab", PAGE, ids=[f"lab{lab.number}" for lab in PAGE])
def test_the_numbers_of_the_page_come_out(lab, tmp_path_factory):
    """The labs as a student runs them (`-n 0`: later labs look at the runs of earlier ones). Another machine sums in
    another order, so a number may lie some deviations of the three seeds, or a fifth of itself, off."""
    folder = tmp_path_factory.getbasetemp() / "page"
    for (name, key), value in labs.run(lab, 0, folder).items():
        text = next(row[2] for row in lab.rows if row[:2] == (name, key))
        mean, _, deviation = text.replace(",", "").partition(" ± ")
        allowed = max(5 * float(deviation or 0), abs(float(mean)) / 5)
        if abs(float(mean)) < 1e-3:  # rounding, or a gradient that vanishes: its size is meant
            allowed = 3 * abs(float(mean))
        assert abs(value - float(mean)) <= allowed, (lab.number, name, key, value, text)


def test_the_page_is_read():
    """Twelve labs in order; every row has a number that was measured, most with the spread over the seeds."""
    assert [lab.number for lab in PAGE] == list(range(1, 13))
    text = labs.PAGE.read_text()
    tables = [line for line in text.splitlines() if line.startswith(("| `runs/", "| printed"))]
    assert len(tables) == sum(len(lab.rows) for lab in PAGE)
    for lab in PAGE:
        for name, key, value in lab.rows:
            assert re.fullmatch(r"-?[\d,]+(\.\d+)?(e-?\d+)?( ± [\d.]+)?", value), (lab.number, name, key, value)
    assert text.count("*Questions.*") == text.count("*Change.*") == 12


def test_a_change_is_made():
    """A `diff` of a lab names one line of the script, and the changed script has the other in its place."""
    changes = []
    for lab in PAGE:
        changes += [labs.DIFF.fullmatch(text).groups() for kind, text in lab.blocks if kind == "diff"]
    assert len(changes) >= 2
    for script, old, new in changes:
        before = (labs.ROOT / f"{script}.py").read_text()
        after = labs.changed_source((script, old, new))
        assert after.count(new) == before.count(new) + 1 and len(after.split("\n")) == len(before.split("\n"))
    with pytest.raises(ValueError, match="0 lines"):
        labs.changed_source(("roads", "no such line", ""))


def test_numbers_are_written():
    """--write puts texts into the table of their lab, and nowhere else."""
    row, other = "| `runs/a` | x: `mean/mad` | {} |", "| printed | `gap:` | {} |"
    before = ["## 1 One", row.format("?"), "## 2 Two", row.format("?"), other.format(1), ""]
    after = ["## 1 One", row.format("?"), "## 2 Two", row.format("5.0 ± 0.1"), other.format(7), ""]
    texts = {("runs/a", "mean/mad"): "5.0 ± 0.1", (None, "gap:"): "7"}
    assert labs.written("\n".join(before), 2, texts) == "\n".join(after)
    assert labs.expectation([80.0, 82.0]) == "81.0 ± 1.0"
    assert labs.expectation([12345678.0]) == "12,345,678"
    assert labs.expectation([3e-8, 3e-8]) == "3.0e-08"


# ---------------------------------------------------------------------------------- the other pages


def places(page):
    """All `file.py:name` of a page."""
    return re.findall(r"`([\w/]+)\.py:([\w.]+)`", (DOCS / page).read_text())


@pytest.mark.parametrize("page", ["compare.md", "labs.md"])
def test_places_exist(page):
    found = places(page)
    assert found
    for file, name in found:
        part = importlib.import_module(file.replace("/", "."))
        for word in name.split("."):
            part = getattr(part, word)


def test_syllabus():
    """Twelve weeks, whose links lead to headings of the labs, with every exercise once and in order."""
    text = (DOCS / "syllabus.md").read_text()
    anchors = re.findall(r"labs\.md#([\w-]+)", text)
    headings = []
    for lab in PAGE:
        words = re.sub(r"[^\w -]", "", f"{lab.number} {lab.title}".lower())
        headings.append(words.replace(" ", "-"))
    assert anchors == headings
    named = [name for name in re.findall(r"`(\w+)`", text) if name in exercises.ORDER]
    assert sorted(set(named)) == sorted(exercises.ORDER)
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (DOCS / link).is_file(), link


def test_glossary():
    """At least 25 words, each once."""
    part = (DOCS / "compare.md").read_text().split("## Glossary")[1]
    words = re.findall(r"^\| ([^|]+) \| [^|]+ \| `", part, flags=re.M)
    assert len(words) >= 25 and len(set(words)) == len(words)


def test_a_lab_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        labs.main(["--lab", "99"])
    assert error.value.code == 2 and "--lab 99" in capsys.readouterr().err
