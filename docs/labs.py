"""Runs the commands of docs/labs.md, and holds its numbers to what comes out.

    python -m docs.labs                         all labs, seed 0: what the page says, what came out
    python -m docs.labs --lab 5 --seeds 0,1,2   one lab, three seeds
    python -m docs.labs --write --seeds 0,1,2   puts mean ± standard deviation into the page

In the page a lab is a heading `## N ...` with blocks, in order: `bash`, commands that are run; `python`,
lines that are run; `diff`, a change of one script for the next block of commands. Then a table of
    | run or `printed` | what, ending with a key in back-quotes | value |
a key being a path in that run's metrics.json, or how a printed line begins whose last word is the number.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import tables
from common.options import exit_with

PAGE = Path(__file__).resolve().parent / "labs.md"
ROOT = PAGE.parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are imported from within the folder of the runs
ROW = re.compile(r"\| (?:`(runs/[\w-]+)`|printed) \| .*`([^`]+)` \| (.*) \|$")
RUN = re.compile(r"runs/[\w-]+")
DIFF = re.compile(r"--- (\w+)\.py\n- (.*)\n\+ (.*)\n")


@dataclass
class Lab:
    number: int
    title: str
    blocks: list = field(default_factory=list)  # (language, text)
    rows: list = field(default_factory=list)  # (run or None, key, value as it stands in the page)


def read(text):
    """The page -> list of Lab."""
    labs = []
    for part in re.split(r"^## (?=\d)", text, flags=re.M)[1:]:
        number, title = re.match(r"(\d+) (.*)", part).groups()
        lab = Lab(int(number), title)
        lab.blocks = re.findall(r"^```(bash|python|diff)\n(.*?)^```", part, flags=re.M | re.S)
        for line in part.splitlines():
            found = ROW.match(line)
            if found:
                lab.rows.append(found.groups())
        labs.append(lab)
    return labs


def needed(lab, labs):
    """The labs, in order, that make the runs which this one looks at and doesn't make itself."""
    named = {name for name, _, _ in lab.rows if name}
    named |= set(RUN.findall("".join(text for _, text in lab.blocks)))
    return [other for other in labs if other.number != lab.number and named & made_by(other)]


def made_by(lab):
    """The runs that a lab's commands write."""
    return set(re.findall(rf"--out ({RUN.pattern})", "".join(text for _, text in lab.blocks)))


# ------------------------------------------------------------------------------------- running


def prepare(lab, labs, seed, folder, small=None):
    """Runs the labs whose runs this one looks at, if one of these is missing below `folder`."""
    for other in needed(lab, labs):
        if not all((folder / name / "metrics.json").is_file() for name in made_by(other)):
            run(other, seed, folder, small)


def run(lab, seed, folder, small=None):
    """{(run or None, key): number} of a lab whose runs lie below `folder`.

    small: {script: words} that make a command's run smaller, for tests.
    """
    printed, change = "", None
    with _inside(folder):
        for language, text in lab.blocks:
            if language == "diff":
                change = DIFF.fullmatch(text).groups()
            elif language == "python":
                printed += _printed_by(_run_lines, text.replace("seed = 0", f"seed = {seed}"))
            else:
                for line in text.strip().splitlines():
                    printed += _printed_by(_run_command, line, seed, change, small or {})
                change = None
        return {(name, key): _number(name, key, printed) for name, key, _ in lab.rows}


@contextlib.contextmanager
def _inside(folder):
    """In this folder, with the data where they were."""
    folder.mkdir(parents=True, exist_ok=True)
    before, data = Path.cwd(), os.environ.get("AD_DATA")
    os.environ["AD_DATA"] = str(Path(data or "data").resolve())
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        if data is None:
            del os.environ["AD_DATA"]
        else:
            os.environ["AD_DATA"] = data


def _printed_by(function, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function(*arguments)
    return out.getvalue()


def _run_lines(text):
    exec(compile(text, "labs.md", "exec"), {"__name__": "lab"})


def _run_command(line, seed, change, small):
    """`python SCRIPT.py ...` or `python -m MODULE ...`, in this process."""
    _, *words = shlex.split(line)
    if words[0] == "-m":
        words = words[1:]
    script = words[0].removesuffix(".py")
    words = words[1:]
    if "--eval" not in words:
        words += ["--seed", str(seed), *small.get(script, ())]
    words.append("--overwrite")
    argv, sys.argv = sys.argv, [script, *words]
    try:
        _module(script, change).main()
    finally:
        sys.argv = argv


def _module(script, change):
    """The script as a module; changed, if the change is of this script."""
    module = importlib.import_module(script)
    if not change or change[0] != script:
        return module
    changed = types.ModuleType(f"{script}_changed")
    changed.__file__ = module.__file__
    sys.modules[changed.__name__] = changed  # where a dataclass looks for its own module
    exec(compile(changed_source(change), module.__file__, "exec"), changed.__dict__)
    return changed


def changed_source(change):
    """(script, line, the line in its place) -> the script's source. The line must be there once."""
    script, old, new = change
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    found = [line for line in source.splitlines() if line.strip() == old.strip()]
    if len(found) != 1:
        raise ValueError(f"{script}.py has {len(found)} lines '{old}'")
    indent = found[0][: len(found[0]) - len(found[0].lstrip())]
    return source.replace(found[0] + "\n", indent + new.strip() + "\n")


def _number(name, key, printed):
    if name is None:
        for line in printed.splitlines():
            if line.startswith(key):
                return float(line.split()[-1].replace(",", ""))
        raise ValueError(f"no printed line begins with '{key}'")
    value = json.loads(Path(name, "metrics.json").read_bytes())
    for word in key.split("/"):
        value = value[word]
    return 100 * value


# ------------------------------------------------------------------------------------- the page


def expectation(values):
    """Numbers of several seeds -> the text of the table's last column: mean ± the deviation of a
    sample, as in README's tables."""
    mean = np.mean(values)
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    if mean != 0 and abs(mean) < 0.1:
        return f"{mean:.1e}"
    digits = 0 if abs(mean) >= 1000 else 1
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {deviation:.{digits}f}" if deviation > 0 else text


def written(text, number, texts):
    """The page with the last column of a lab's table replaced. texts: {(run or None, key): text}."""
    lines, lab = text.split("\n"), None
    for i, line in enumerate(lines):
        heading = re.match(r"## (\d+) ", line)
        if heading:
            lab = int(heading[1])
        found = ROW.match(line)
        if found and lab == number and found.group(1, 2) in texts:
            lines[i] = line[: found.start(3)] + texts[found.group(1, 2)] + " |"
    return "\n".join(lines)


def numbers(lab, seed, folder, keep):
    """What `run` gives; it is kept beside the runs. keep: take what is there, if it is."""
    file = folder / f"lab{lab.number}.json"
    if keep and file.is_file():
        return {(name, key): value for name, key, value in json.loads(file.read_bytes())}
    found = run(lab, seed, folder)
    file.write_bytes(json.dumps([(*where, value) for where, value in found.items()]).encode())
    return found


def main(argv=None):
    parser = argparse.ArgumentParser("python -m docs.labs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lab", type=int, help="only this one, and before it those whose runs it needs")
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--out", default="runs/labs", help="folder of the runs (default: runs/labs)")
    parser.add_argument("--keep", action="store_true", help="do not run what was run there before")
    parser.add_argument("--write", action="store_true", help="put the numbers into the page")
    args = parser.parse_args(argv)
    seeds = tables.seeds_of(args.seeds)
    out = Path(args.out).resolve()
    page = labs = read(PAGE.read_text(encoding="utf-8"))
    if args.lab is not None:
        labs = [lab for lab in page if lab.number == args.lab]
        if not labs:
            parser.error(f"--lab {args.lab}: no such lab in {PAGE.name}")
    for lab in labs:
        results = []
        for seed in seeds:
            prepare(lab, page, seed, out / str(seed))
            results.append(numbers(lab, seed, out / str(seed), args.keep))
        print(f"\n{lab.number} {lab.title}")
        texts = {}
        for name, key, value in lab.rows:
            texts[name, key] = expectation([result[name, key] for result in results])
            print(f"  {name or 'printed':<22} {key:<44} {texts[name, key]:<16} page: {value}", flush=True)
        if args.write:
            text = written(PAGE.read_text(encoding="utf-8"), lab.number, texts)
            PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    exit_with(lambda: tables.ended("labs", main))
