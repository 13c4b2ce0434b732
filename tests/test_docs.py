"""What the pages in docs/ say of the code is true of the code."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAPERS = {"OneNIP": 10, "Omni-AD": 6, "ROADS": 6, "CADA": 5}  # numbered equations


def equations():
    """(paper, number, file, function) of every row of docs/equations.md."""
    paper, rows = None, []
    for line in (DOCS / "equations.md").read_text().splitlines():
        if line.startswith("## "):
            paper = line.removeprefix("## ")
        found = re.match(r"\| (\d+)\*? \|.*\| `(\w+)\.py:([\w.]+)` \|$", line)
        if found:
            rows.append((paper, int(found[1]), found[2], found[3]))
    return rows


def test_every_equation_has_its_row():
    """All 27 numbered equations of the four papers, once each and in order."""
    rows = equations()
    for paper, count in PAPERS.items():
        assert [row[1] for row in rows if row[0] == paper] == list(range(1, count + 1))
    assert len(rows) == sum(PAPERS.values()) == 27


@pytest.mark.parametrize("paper, number, file, function", equations())
def test_the_function_carries_the_number(paper, number, file, function):
    """It exists, and its source names the equation."""
    found = importlib.import_module(file)
    for name in function.split("."):
        found = getattr(found, name)
    text = inspect.getsource(found)
    named = set()
    for first, last in re.findall(r"Eqs?\. (\d+)(?:(?: and | to )(\d+))?", text):
        named |= set(range(int(first), int(last or first) + 1))
    assert number in named, f"{file}.py:{function} does not say Eq. {number}"
