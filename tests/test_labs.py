"""The course's pages: every command of the labs runs, every number that they name comes out, every place exists."""

import importlib
import os
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
    """Each number of its table comes out, and whichever tests ran before, the runs that it looks at exist."""
    labs.prepare(lab, PAGE, 0, runs, small)
    found = labs.run(lab, 0, runs, small)
    assert len(found) == len(lab.rows) >= 3
    assert all(value == value for value in found.values())  # not NaN


@pytest.mark.slow
@pytest.mark.parametrize("lab", PAGE, ids=[f"lab{lab.number}" for lab in PAGE])
def test_the_numbers_of_the_page_come_out(lab, tmp_path_factory):
    """The labs as a student runs them. Another machine sums in another order, so a number may lie some deviations of
    the three seeds, or a fifth of itself, off."""
    folder = tmp_path_factory.getbasetemp() / "page"
    labs.prepare(lab, PAGE, 0, folder)
    for (name, key), value in labs.run(lab, 0, folder).items():
        text = next(row[2] for row in lab.rows if row[:2] == (name, key))
        mean, _, deviation = text.replace(",", "").partition(" ± ")
        allowed = max(5 * float(deviation or 0), abs(float(mean)) / 5)
        if abs(float(mean)) < 1e-3:  # rounding, or a gradient that vanishes: its size is meant
            allowed = 3 * abs(float(mean))
        assert abs(value - float(mean)) <= allowed, (lab.number, name, key, value, text)


def test_what_a_lab_needs_is_known():
    """Which labs look at the runs of which others is read off their commands and tables, as the page says it."""
    needs = {lab.number: [other.number for other in labs.needed(lab, PAGE)] for lab in PAGE}
    assert {number: others for number, others in needs.items() if others} == {2: [1], 6: [5], 10: [3]}
    assert "Labs 2, 6 and 10 use runs of labs 1, 5 and 3" in labs.PAGE.read_text()


@pytest.mark.parametrize("data", [None, "somewhere"])
def test_a_lab_leaves_the_process_as_it_was(data, tmp_path, monkeypatch):
    """Folder and AD_DATA are those of before; inside, AD_DATA names the same folder from the folder of the runs."""
    monkeypatch.delenv("AD_DATA", raising=False)
    if data:
        monkeypatch.setenv("AD_DATA", data)
    before = Path.cwd()
    lines = "import os\nprint('there:', int(os.environ['AD_DATA'] == os.environ['WANTED']))\n"
    monkeypatch.setenv("WANTED", str((before / (data or "data")).resolve()))
    lab = labs.Lab(1, "One", [("python", lines)], [(None, "there:", "1")])
    assert labs.run(lab, 0, tmp_path / "runs") == {(None, "there:"): 1}
    assert Path.cwd() == before and os.environ.get("AD_DATA") == data


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


def test_every_lab_has_its_answers():
    """docs/answers.md has the labs' headings, in order, and of each the questions and the change."""
    parts = (DOCS / "answers.md").read_text().split("\n## ")[1:]
    assert [part.split("\n")[0] for part in parts] == [f"{lab.number} {lab.title}" for lab in PAGE]
    assert all(part.count("\n- *") >= 3 for part in parts)


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
    assert labs.expectation([80.0, 82.0, 84.0]) == "82.0 ± 2.0"  # of a sample
    assert labs.expectation([80.0]) == "80.0"
    assert labs.expectation([12345678.0]) == "12,345,678"
    assert labs.expectation([3e-8, 3e-8]) == "3.0e-08"


# ---------------------------------------------------------------------------------- the other pages


def places(page):
    """All `file.py:name` of a page."""
    return re.findall(r"`([\w/]+)\.py:([\w.]+)`", (DOCS / page).read_text())


@pytest.mark.parametrize("page", ["answers.md", "compare.md", "labs.md"])
def test_places_exist(page):
    """A function that a page names by its file is there, so a reader who looks for it finds it."""
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
    """A mistyped number ends in one line that names the option, not in an empty success."""
    with pytest.raises(SystemExit) as error:
        labs.main(["--lab", "99"])
    assert error.value.code == 2 and "--lab 99" in capsys.readouterr().err
