"""`python -m common.tables`: which commands make a table, that nothing is computed twice or lost,
and that every number stands in its place. A stand-in for the scripts answers at once; one table is
run with omniad.py itself."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import options as options_of_scripts
from common import papers, tables

ROOT = Path(__file__).resolve().parent.parent

# Writes the files of a run as the scripts do. Beside it: calls.txt, its command lines; BREAK, a
# word for which it fails; HANG, a word for which it stops after its first checkpoint.
STAND_IN = '''
import json, os, sys, time
from pathlib import Path
words, here = sys.argv[1:], Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    print(json.dumps([Path(__file__).stem, os.environ.get("OMP_NUM_THREADS"), *words]), file=calls)
def after(word):
    return words[words.index(word) + 1]
def named(name):
    return (here / name).is_file() and (here / name).read_text() in words
out = Path(after("--out"))
if named("BREAK"):
    sys.exit("stand-in: this cannot be")
if "--eval" in words:
    assert Path(after("--eval")).is_file()
if (out / "metrics.json").exists() or (out / "args.json").exists():
    assert "--resume" in words or "--overwrite" in words
if "--resume" in words:
    words = json.loads((out / "args.json").read_text())["words"]
(out / "args.json").write_text(json.dumps({"words": words, "preset": "laptop"}))
(out / "checkpoint.pt").write_text("")
if named("HANG"):
    (here / "pid.tmp").write_text(str(os.getpid()))
    (here / "pid.tmp").rename(here / "pid.txt")
    time.sleep(60)
    sys.exit("nobody stopped this")
level = 0.5 + (int(after("--seed")) / 10 if "--seed" in words else 0)
values = dict.fromkeys(
    ["i_auroc", "i_ap", "i_f1max", "p_auroc", "p_ap", "p_f1max", "p_aupro", "mad"], level)
views = {"mean": values, "mixed": {name: value / 2 for name, value in values.items()},
         "classes": {"screw": {**values, "i_auroc": 0.75}, "pill": {**values, "i_auroc": None}}}
result = {**views, "commit": "abc", "versions": {"torch": "2", "device": "none"},
          "seconds": {"train": 1, "evaluate": 2}}
if "--shift" in words:
    result["shift"] = {}
    for i, name in enumerate(["brightness", "contrast", "defocus_blur", "gaussian_noise"]):
        shifted = {"mean": {name: value - i / 10 for name, value in values.items()}}
        result["shift"][name + ":3"] = {**views, **shifted}
(out / "metrics.json").write_text(json.dumps(result))
'''


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """An empty folder to work in, with stand-ins for the scripts: desk.run("cada", "4") is the
    command there, desk.calls() what it made the scripts do since the last look."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for paper in papers.TITLES:
        (scripts / f"{paper}.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "SCRIPTS", scripts)
    monkeypatch.setattr(tables, "current_commit", lambda: "abc")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tables", *words])
        handler = signal.getsignal(signal.SIGTERM)
        status = tables.launch()
        signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    def calls():
        path = scripts / "calls.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return SimpleNamespace(run=run, calls=calls, scripts=scripts, folder=tmp_path)


def content(name):
    return json.loads(Path(f"runs/tables/{name}/table.json").read_text())


def cells_of(table, row):
    """{(condition, class, metric): cell} of a row of table.json."""
    (found,) = [r for r in table["rows"] if r["name"] == row]
    return {(c["condition"], c["class"], c["metric"]): c for c in found["cells"]}


def lines_of(text, start):
    """The cells of a row's lines: ours and the paper's, which follows it."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {start} "))
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[at : at + 2]]


def options(call):
    """A call without what is not its row: script, threads, data, seed, folders."""
    words, left = iter(call[2:]), []
    for word in words:
        if word in ("--data", "--seed", "--out", "--eval"):
            next(words)
        else:
            left.append(word)
    return left


# ---------------------------------------------------------------------------------- the commands


def test_every_row_is_one_command_and_the_papers_row_stands_beside(desk):
    done = desk.run("onenip", "4a")
    assert done.status == 0 and done.err == ""
    calls = desk.calls()
    rows = papers.rows("onenip", "4a")
    assert [options(call) for call in calls] == [list(row.options) for row in rows]
    for call in calls:
        assert f"python scripts/onenip.py {shlex.join(call[2:])}\n" in done.out
    ours, paper = lines_of(done.out, "1: static prompt")
    assert ours == ["ours, synth", "50.0", "50.0", "50.0", "50.0"]
    assert paper == ["paper, mvtec", "96.8", "98.9", "97.0", "45.8"]
    assert "of other data, mvtec" in done.out and "commit abc" in done.out
    written = Path("runs/tables/onenip-4a-synth/table.md").read_text()
    assert done.out[done.out.index("ours: synth") :].split("\nruns")[0] in written
    assert f"    python scripts/onenip.py {shlex.join(calls[1][2:])}\n" in written
    cell = cells_of(content("onenip-4a-synth"), "1: static prompt")["clean", "mean", "p_ap"]
    assert cell["of_seed"] == {"0": 50.0} and cell["paper"] == 45.8 and cell["deviation"] is None


def test_rows_that_are_only_an_evaluation_share_a_training(desk):
    """CADA's Table 4: one training and four calibrations of it. All of them name the paper's
    statistic, since the laptop preset has another."""
    assert desk.run("cada", "4").status == 0
    first, *others = desk.calls()
    assert options(first) == [] and "--eval" not in first
    folder = first[first.index("--out") + 1]
    given = [["--calibrate", name] for name in ("none", "given", "classifier")]
    paper = ["--statistic", "max"]
    assert [options(call) for call in others] == [*[words + paper for words in given], paper]
    for call in others:
        assert call[call.index("--eval") + 1] == f"{folder}/checkpoint.pt"


def test_a_training_option_beside_one_of_evaluation_makes_another_training(desk):
    """OneNIP's Table 4d: two trainings; each has a row of its own and one with another prompt."""
    desk.run("onenip", "4d")
    calls = desk.calls()
    assert sum("--eval" not in call for call in calls) == 2
    fixed = [call for call in calls if "-prompt-train-fixed" in str(call)]
    assert [options(call) for call in fixed] == [
        ["--prompt-train", "fixed"], ["--prompt-test", "random"]]


def test_words_after_the_dashes_go_to_every_command(desk):
    desk.run("cada", "4", "--", "--steps", "7")
    calls = desk.calls()
    assert len(calls) == 5 and all(options(call)[:2] == ["--steps", "7"] for call in calls)
    assert "--steps 7" in Path("runs/tables/cada-4-synth/table.md").read_text()
    desk.run("cada", "4")
    assert len(desk.calls()) == 5  # other options: other runs
    desk.run("cada", "4", "--", "--workers", "2", "--device", "cpu", "--steps", "7")
    assert desk.calls() == []  # which processes it takes makes no other run


def test_other_data_are_other_runs(desk):
    """Also two folders of the same name."""
    for name in ("a/tiles", "b/tiles"):
        Path(name, "tile", "train", "good").mkdir(parents=True)
        desk.run("omniad", "I", "--data", name)
        assert len(desk.calls()) == 1
    assert len({folder.name for folder in Path("runs/tables/runs").iterdir()}) == 2


def test_data_of_one_name_elsewhere_are_other_runs(desk, monkeypatch):
    """A folder that is found below $AD_DATA, below --data-root, or here: whichever it is, its runs
    are its own, and they are found again by another way to it."""
    for place in ("a", "b", "c"):
        Path(place, "tiles", "train", "good").mkdir(parents=True)
    words = "omniad", "I", "--data", "tiles"
    for place in ("a", "b"):
        monkeypatch.setenv("AD_DATA", place)
        assert desk.run(*words).status == 0 and len(desk.calls()) == 1
        assert desk.run(*words).status == 0 and desk.calls() == []
    for place, count in (("c", 1), ("a", 0)):
        for root in (("--data-root", place), (f"--data-root={place}",)):
            assert desk.run(*words, "--", *root).status == 0 and len(desk.calls()) == count
            count = 0
    Path("tiles", "train", "good").mkdir(parents=True)  # comes before those below the root
    assert desk.run(*words).status == 0 and len(desk.calls()) == 1
    monkeypatch.setenv("AD_DATA", "a")
    assert desk.run(*words).status == 0 and desk.calls() == []


# ------------------------------------------------------------------- nothing twice, nothing lost


def test_finished_runs_are_reused_also_by_another_table(desk):
    desk.run("onenip", "4a")
    assert len(desk.calls()) == 6
    first = desk.run("onenip", "4a")
    assert first.status == 0 and desk.calls() == [] and "finished before" in first.out
    assert lines_of(first.out, "0: UniAD")[0][1] == "50.0"
    desk.run("onenip", "1")  # UniAD and OneNIP
    assert desk.calls() == []
    desk.run("onenip", "4a", "--seeds", "0,1")
    assert len(desk.calls()) == 6


@pytest.mark.parametrize("name, content", [
    ("metrics.json", "{}"), ("metrics.json", "[]"), ("metrics.json", "{"), ("metrics.json", ""),
    ("args.json", "null"), ("args.json", "x"), ("costs.txt", ""), ("costs.txt", "total x y")])
def test_a_damaged_run_is_named_before_others_are_run(desk, name, content):
    """One line with the file and what to do; and not a traceback when all others are through."""
    desk.run("onenip", "1")
    desk.calls()
    run = next(path for path in Path("runs/tables/runs").iterdir() if path.name.startswith("onenip-synth-seed0"))
    (run / name).write_text(content)
    done = desk.run("onenip", "4a")
    assert done.status == 2 and f"{run / name}" in done.err and "damaged" in done.err
    assert done.err.count("\n") == 1 and desk.calls() == []
    for file in run.iterdir():  # as the line says
        file.unlink()
    assert desk.run("onenip", "4a").status == 0


def test_a_folder_may_have_any_name(desk):
    """One that is no UTF-8 is a name like others; the table is not lost."""
    name = os.fsdecode(b"tiles-\xe4")
    try:
        Path(name, "train", "good").mkdir(parents=True)
    except OSError:
        pytest.skip("the file system takes no such name")
    options_of_scripts.any_output()  # as `exit_with`
    assert desk.run("omniad", "I", "--data", name).status == 0
    (folder,) = Path("runs/tables").glob("omniad-I-*")
    assert json.loads((folder / "table.json").read_bytes())["data"] == name


def test_runs_of_another_commit_count_only_if_asked_for(desk, monkeypatch):
    desk.run("onenip", "1")
    before = set(Path("runs/tables/runs").iterdir())
    monkeypatch.setattr(tables, "current_commit", lambda: "def")
    desk.calls()
    assert desk.run("onenip", "1", "--any-commit").status == 0
    assert desk.calls() == []
    assert desk.run("onenip", "1").status == 0
    assert len(desk.calls()) == 2
    assert before < set(Path("runs/tables/runs").iterdir())  # those before are still there


def test_a_failed_row_is_reported_and_the_rest_goes_on(desk):
    (desk.scripts / "BREAK").write_text("static")
    done = desk.run("onenip", "4a")
    assert done.status == 1 and len(desk.calls()) == 6
    assert "1: static prompt, seed 0: stand-in: this cannot be" in done.out
    assert lines_of(done.out, "1: static prompt")[0][1] == "-"
    assert lines_of(done.out, "2: dynamic prompt")[0][1] == "50.0"
    (failed,) = [row["name"] for row in content("onenip-4a-synth")["rows"] if row["failed"]]
    assert failed == "1: static prompt"
    (desk.scripts / "BREAK").unlink()
    assert desk.run("onenip", "4a").status == 0
    assert [options(call)[:2] for call in desk.calls()] == [["--prompt", "static"]]


def test_a_failed_training_takes_its_evaluations_with_it(desk):
    (desk.scripts / "BREAK").write_text("uniad")
    done = desk.run("cada", "1")
    assert done.status == 1 and "UniAD, seed 0: stand-in" in done.out
    assert lines_of(done.out, "RevDist")[0][1] == "50.0"
    bases = ["--base" in call and "uniad" in call for call in desk.calls()]
    assert sum(bases) == 1 and len(bases) == 5


def test_a_result_for_some_seeds_says_so(desk):
    desk.run("omniad", "I", "--seeds", "1")
    (desk.scripts / "BREAK").write_text("0")
    done = desk.run("omniad", "I", "--seeds", "0,1")
    assert done.status == 1
    assert lines_of(done.out, "Omni-AD")[0][:2] == ["ours, synth, 1 of 2 seeds", "60.0"]


def heeds_ctrl_c():
    """A shell starts what it runs in the background so that it ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(desk, words, signal_number):
    """`python -m common.tables WORDS` in a process of its own, which gets the signal when a script
    has written its first checkpoint. Returns its exit status and what it wrote on stderr."""
    code = ("import sys, pathlib; from common import tables; "
            "tables.SCRIPTS = pathlib.Path('scripts'); tables.current_commit = lambda: 'abc'; "
            "sys.exit(tables.launch())")
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=heeds_ctrl_c)
    while not (desk.scripts / "pid.txt").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal_number)
    err = process.communicate(timeout=120)[1]  # a busy machine
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_scripts_and_goes_on_later(desk, number):
    """What was finished stays, the interrupted training is resumed, what was to come follows."""
    (desk.scripts / "HANG").write_text("static")
    status, err = interrupt(desk, ["onenip", "4a"], number)
    assert status == 130 and err.count("\n") == 1 and "goes on" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((desk.scripts / "pid.txt").read_text()), 0)
    assert len(desk.calls()) == 2
    (desk.scripts / "HANG").unlink()
    assert desk.run("onenip", "4a").status == 0
    resumed, *others = desk.calls()
    assert resumed[2] == "--out" and resumed[4] == "--resume" and "static" in resumed[3]
    assert len(others) == 4 and not any("--resume" in call for call in others)


def test_an_interrupted_evaluation_is_done_again(desk):
    (desk.scripts / "HANG").write_text("given")
    interrupt(desk, ["cada", "4"], signal.SIGINT)
    desk.calls()
    (desk.scripts / "HANG").unlink()
    assert desk.run("cada", "4").status == 0
    again, *others = desk.calls()
    assert "given" in again and again[-1] == "--overwrite" and "--eval" in again
    assert len(others) == 2 and "classifier" in others[0] and "--overwrite" not in others[0]


def test_two_processes_do_not_write_into_one_run(desk):
    desk.run("omniad", "I", "--dry-run")
    assert desk.calls() == [] and not Path("runs").exists()
    folder = Path("runs/tables/runs/omniad-synth-seed0@abc")
    folder.mkdir(parents=True)
    with open(folder / ".table.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = desk.run("omniad", "I")
        assert done.status == 1 and "another process" in done.out and desk.calls() == []
    assert desk.run("omniad", "I").status == 0


def test_several_at_once_have_one_thread_each(desk, monkeypatch):
    """Each stand-in waits for the other's start: alone it would never end."""
    meet = """
import os, time
from pathlib import Path
here = Path(__file__).parent
(here / f"met-{os.getpid()}").touch()
deadline = time.monotonic() + 20
while len(list(here.glob("met-*"))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""
    (desk.scripts / "onenip.py").write_text(meet + STAND_IN)
    assert desk.run("onenip", "1", "--jobs", "2").status == 0
    assert [call[1] for call in desk.calls()] == ["1", "1"]


# -------------------------------------------------------------------------------------- the numbers


def test_seeds_have_a_mean_and_a_standard_deviation(desk):
    done = desk.run("onenip", "4a", "--seeds", "0,1,3")
    values = [50.0, 60.0, 80.0]
    text = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert lines_of(done.out, "0: UniAD")[0] == ["ours, synth", *[text] * 4]
    cell = cells_of(content("onenip-4a-synth"), "0: UniAD")["clean", "mean", "i_ap"]
    assert cell["of_seed"] == {"0": 50, "1": 60, "3": 80}
    assert cell["mean"] == pytest.approx(np.mean(values))
    assert cell["deviation"] == pytest.approx(np.std(values, ddof=1))


def test_the_papers_own_spread(desk):
    out = desk.run("onenip", "4d").out
    assert lines_of(out, "training fixed, test rand")[1][1].startswith("96.05 ± 0.24")


def test_means_and_pool_are_columns(desk):
    out = desk.run("cada", "1").out
    head = [cell.strip() for cell in out[out.index("| row ") :].splitlines()[0].split("|")[3:-1]]
    ours = dict(zip(head, lines_of(out, "RevDist")[0][1:]))
    assert ours["mean I-AUROC"] == "50.0" and ours["mixed I-AUROC"] == "25.0"


def test_shifted_test_images(desk):
    """ROADS's Table 4: P-AUPRO on clean images and the mean over the four shifts."""
    out = desk.run("roads", "4").out
    assert lines_of(out, "ROADS-0") == [["ours, synth", "50.0", "35.0"],
                                        ["paper, mvtec", "91.15", "82.2"]]
    calls = desk.calls()
    assert len(calls) == 14  # ROADS-4 is ROADS-3
    assert all(("--shift" in call) == ("--eval" in call) for call in calls)


def test_classes_have_lines(desk):
    """On the paper's data beside the paper's numbers; undefined ones are dashes."""
    Path("data/mvtec/screw/train/good").mkdir(parents=True)
    out = desk.run("roads", "1", "--data", "mvtec").out
    assert lines_of(out, "ROADS, screw") == [["ours, mvtec", "75.0", "50.0"],
                                             ["paper, mvtec", "98.5", "99.6"]]
    assert lines_of(out, "ROADS, pill")[0] == ["ours, mvtec", "-", "50.0"]
    assert lines_of(out, "DiAD")[0][0] == "paper, mvtec"  # another method: the paper's line alone
    assert "| DiAD" not in desk.run("roads", "1").out


def test_other_metrics(desk):
    out = desk.run("roads", "1", "--metrics", "p_ap,i_auroc").out
    assert lines_of(out, "ROADS") == [["ours, synth", "50.0", "50.0"],
                                      ["paper, mvtec", "-", "98.83"]]


def test_dry_run_prints_commands_and_runs_none(desk):
    desk.run("onenip", "1")
    desk.calls()
    done = desk.run("onenip", "4a", "--dry-run")
    assert desk.calls() == [] and done.status == 0
    assert done.out.count("finished: python") == 2 and done.out.count("new: python") == 4


# ---------------------------------------------------------------------------------- command line


def test_overview_names_every_table_and_row(desk):
    out = desk.run().out
    for paper, of_paper in papers.TABLES.items():
        rows = desk.run(paper).out
        for table, about in of_paper.items():
            assert f"{paper} {table} " in out and about in out
            for row in papers.rows(paper, table):
                assert row.options is None or row.name in rows


def test_overview_says_how_long_a_training_takes(desk):
    """As the docstrings of the scripts do."""
    words = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
    for paper in papers.TITLES:
        text = (ROOT / f"{paper}.py").read_text()
        (said,) = re.findall(rf"python {paper}\.py  .*about (\w+) minutes", text)
        assert tables.MINUTES[paper] == words[said]
        assert f"{paper} {tables.MINUTES[paper]}" in desk.run().out.splitlines()[-5]


def test_starts_without_torch():
    code = "import sys; from common import tables; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("words, named", [
    (("patchcore",), "patchcore"),
    (("onenip", "9"), "Table 9"),
    (("onenip", "4a", "--seeds", "a"), "--seeds a"),
    (("onenip", "4a", "--metrics", "p_app"), "--metrics p_app"),
    (("onenip", "4a", "--jobs", "0"), "--jobs 0"),
    (("onenip", "4a", "--nonsense"), "--nonsense"),
    (("onenip", "4a", "--", "--seed", "3"), "--seed"),
    (("onenip", "4a", "--", "--eval=x"), "--eval"),
    (("onenip", "4a", "--", "--no-refiner"), "--no-refiner"),
    (("onenip", "4c", "--", "--alpha", "0.3"), "--alpha"),
    (("onenip", "4a", "--data", "nowhere"), "nowhere"),
    (("onenip", "4a", "--data", "synth+nowhere"), "nowhere"),
    (("onenip", "4a", "--data", "tiles", "--", "--data-root", "nowhere"), "tiles"),
    (("onenip", "4a", "--out", __file__), "is a file"),
    (("onenip", "4a", "--runs", __file__), "is a file"),
    (("onenip", "4a", "--out", f"{__file__}/x"), __file__),
], ids=str)
def test_wrong_words_end_in_one_line_before_anything_runs(desk, words, named):
    done = desk.run(*words)
    assert done.status == 2 and named in done.err and done.err.count("\n") == 1
    assert desk.calls() == [] and not Path("runs").exists()


def test_the_commit_is_the_checkouts():
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                          capture_output=True, check=False).stdout.strip()
    assert (tables.current_commit() or "none").rstrip("+") == (head or "none")


# ------------------------------------------------------------------------------------- the real one


def test_a_table_with_omniad_itself(tiny_data, tmp_path, monkeypatch, capsys):
    """Table VII: two encoders, mAD and the costs that --flops prints; the numbers are those of the
    runs' own files, and the second time none runs again."""
    monkeypatch.chdir(tmp_path)
    words = ["omniad", "VII", "--data", str(tiny_data), "--jobs", "2", "--",
             "--image-size", "64", "--depths", "1,1,1,1", "--weights", "random", "--steps", "2",
             "--classes", "screw"]
    assert tables.main(words) == 0
    first = capsys.readouterr().out
    (folder,) = Path("runs/tables").glob("omniad-*")
    table = json.loads((folder / "table.json").read_text())
    for row in table["rows"][:2]:
        run = Path(row["folders"][0])
        cells = {cell["metric"]: cell for cell in row["cells"]}
        result = json.loads((run / "metrics.json").read_text())
        assert cells["mad"]["of_seed"]["0"] == pytest.approx(100 * result["mean"]["mad"])
        assert row["options"][1] in result["setting"]["backbone"]
        trained = result["setting"]["parameters"] / 1e6
        assert cells["params_m"]["of_seed"]["0"] > trained  # the teacher's count as well
        assert cells["flops_g"]["of_seed"]["0"] > 0
    assert table["rows"][1]["cells"][0]["paper"] == 86.4
    assert tables.main(words) == 0
    again = capsys.readouterr().out
    assert again.count("finished before") == 2 and "python " not in again
    assert again[again.index("| row") :] == first[first.index("| row") :]
    assert not list(folder.parent.glob("**/*.tmp"))


def test_a_failed_count_of_costs_is_told_and_leaves_nothing(tmp_path):
    """Two tables may count the same model at once: what is unfinished has a drawn name, and goes."""
    words = ("-c", "import sys; sys.exit('no such model')")
    training = SimpleNamespace(folder=tmp_path, costs_command=lambda: words)
    runner = tables.Runner(1)
    runner._costs(training)
    assert runner.failed == {tmp_path: "--flops: no such model"}
    assert not list(tmp_path.iterdir())


def test_data_of_one_name_are_not_one(monkeypatch):
    """A folder below $AD_DATA is another one where that is elsewhere; the embedded data are the same everywhere."""
    names = {}
    for data in ("mine", "mine+synth", "synth", "mvtec"):
        for place in ("/a", "/b"):
            monkeypatch.setenv("AD_DATA", place)
            names[data, place] = tables.name_of("onenip", data, (), 0)
    assert names["mine", "/a"] != names["mine", "/b"] and names["mine+synth", "/a"] != names["mine+synth", "/b"]
    assert names["synth", "/a"] == names["synth", "/b"] and names["mvtec", "/a"] == names["mvtec", "/b"]
