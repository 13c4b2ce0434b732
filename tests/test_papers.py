"""The papers' numbers: the tables against their own means and against each other, rows against the
options of our scripts, and that no number stands beside a run to which it does not belong."""

import dataclasses
import functools

import numpy as np
import pytest

import cada
import omniad
import onenip
import roads
from common import corruptions, data, papers, runtime

SCRIPTS = {"onenip": onenip, "omniad": omniad, "roads": roads, "cada": cada}
SUMMARIES = ("mean", "mixed", "gain", "mean mvtec", "mean visa", "mean btad")
ROUNDING = 0.06  # of a rounded mean of rounded numbers, in per cent
CLASSES = {name: set(benchmark.counts) for name, benchmark in data.BENCHMARKS.items()}


def preset(paper, base, name="paper"):
    """A preset of the script; CADA has one for each base."""
    presets = cada.RECIPES[base] if paper == "cada" else SCRIPTS[paper].PRESETS
    return presets[name]


def args_of(paper, words=(), **changes):
    """The options of `script --preset paper WORDS`, some of them changed."""
    values = preset(paper, papers.settings(words).get("base", "revdist"))
    words = ["--preset", "paper", *words]
    args = runtime.parse(SCRIPTS[paper].Args, {"paper": values}, "title", words)
    return dataclasses.replace(args, **changes)


def numbers(paper, words=(), name="mvtec", world=1, **changes):
    """As the scripts call it."""
    args = args_of(paper, words, **changes)
    return papers.numbers(paper, args, preset(paper, getattr(args, "base", "")), name, world)


def column(line):
    """What the lines of one column of a per-class table have in common."""
    return line.paper, line.table, line.row, line.data, line.condition


# ------------------------------------------------------------------------------------- the tables


def test_every_table_has_rows_and_no_line_stands_twice():
    keys = [(*column(line), line.cls) for line in papers.lines()]
    assert len(set(keys)) == len(keys)
    tables = {(paper, table) for paper in papers.TABLES for table in papers.TABLES[paper]}
    assert {(line.paper, line.table) for line in papers.lines()} == tables
    assert papers.TITLES.keys() == papers.TABLES.keys() == SCRIPTS.keys()


def test_names_in_the_tables_are_ours():
    """Data sets, classes, conditions and metrics are called as everywhere else."""
    conditions = {"clean", "ood", *(f"{name}:3" for name in corruptions.NAMES)}
    for line in papers.lines():
        parts = line.data.split("+")
        assert parts == sorted(parts)
        known = set().union(*(CLASSES[part] for part in parts))
        assert line.cls in known or line.cls in SUMMARIES, line
        assert line.condition in conditions, line
        assert line.values and line.values.keys() <= {*papers.QUALITY, *papers.COSTS}, line


def test_per_cents_are_per_cents():
    for line in papers.lines():
        if line.cls == "gain":
            continue
        for metric in papers.QUALITY:
            assert 0 < line.values.get(metric, 50) <= 100, line


@pytest.mark.parametrize("paper, table", [("onenip", "5"), ("onenip", "6"), ("roads", "1"),
                                          ("roads", "2")])
def test_tables_by_class_have_every_class(paper, table):
    found = {}
    for row in papers.rows(paper, table):
        for line in row.lines:
            found.setdefault(column(line), set()).add(line.cls)
    for (_, _, _, name, _), classes in found.items():
        assert classes == {*CLASSES[name], "mean"}


def test_printed_means_are_those_of_the_classes():
    """A digit copied wrongly shows here; where the paper itself is wrong, a note says so."""
    classes = {}
    for line in papers.lines():
        if line.cls not in SUMMARIES:
            classes.setdefault(column(line), []).append(line)
    checked = 0
    for line in papers.lines():
        if line.cls != "mean" or column(line) not in classes:
            continue
        for metric, printed in line.values.items():
            own = np.mean([other.values[metric] for other in classes[column(line)]])
            assert abs(own - printed) < ROUNDING or line.note, (line, metric, own)
            checked += 1
    assert checked == 2 * (2 * 9 * 3 + 9 + 4 * 4)  # OneNIP's Tables 5 and 6; ROADS's 1 and 2


def test_mad_is_the_mean_of_the_other_seven():
    whole = [line for line in papers.lines() if {*papers.QUALITY} == line.values.keys()]
    assert len(whole) == 8 + 7 + 6 - 1  # Omni-AD's Table I, but for RLR
    for line in whole:
        others = [value for metric, value in line.values.items() if metric != "mad"]
        assert abs(np.mean(others) - line.values["mad"]) < ROUNDING, line


def test_gains_are_differences():
    """CADA's Tables 1 and 2 print what calibration adds to the pool."""
    pools = {column(line): line.values for line in papers.lines() if line.cls == "mixed"}
    gains = [line for line in papers.lines() if line.cls == "gain"]
    assert len(gains) == 6
    for line in gains:
        base = dataclasses.replace(line, row=line.row.removesuffix("+CADA"))
        before, after = pools[column(base)], pools[column(line)]
        for metric, gain in line.values.items():
            assert after[metric] - before[metric] == pytest.approx(gain), line


def test_ood_is_the_mean_of_the_four_shifts():
    """ROADS's Table 4 against its Table 2."""
    found = numbers("roads", shift="all")["shift"]
    four = [found[f"{name}:3"]["mean"]["p_aupro"] for name in corruptions.NAMES]
    assert np.mean(four) == pytest.approx(found["ood"]["mean"]["p_aupro"], abs=1e-4)


def test_tables_agree():
    """A number that several tables print is the same in all of them, or a note says it is not."""
    resolved, found = functools.cache(args_of), {}
    for line in papers.lines():
        method = line.row
        if line.options is not None:  # --alpha 0.5 is the paper's preset as well
            method = str(resolved(line.paper, line.options))
        for metric, value in line.values.items():
            key = line.paper, method, line.data, line.condition, line.cls, metric
            found.setdefault(key, []).append((value, line.note))
    several = {key: cells for key, cells in found.items() if len(cells) > 1}
    assert len(several) > 100
    for key, cells in several.items():
        values, notes = zip(*cells)
        assert max(values) - min(values) < ROUNDING or all(notes), (key, cells)


@pytest.mark.parametrize("paper, table, row, name, condition, cls, values", [
    ("onenip", "1", "SimpleNet", "visa", "clean", "mean",
     {"i_auroc": 89.2, "i_ap": 92.2, "p_auroc": 95.3, "p_ap": 33.1}),
    ("onenip", "2", "UniAD", "btad+mvtec+visa", "clean", "mean btad",
     {"i_auroc": 92.0, "i_ap": 97.1, "p_auroc": 97.1, "p_ap": 48.0}),
    ("onenip", "4a", "4: dynamic prompt, restoration", "mvtec", "clean", "mean",
     {"i_auroc": 97.4, "i_ap": 99.1, "p_auroc": 97.3, "p_ap": 48.4}),
    ("onenip", "4d", "training fixed, test rand", "mvtec", "clean", "mean",
     {"i_auroc": 96.05, "i_ap": 98.34, "p_auroc": 97.49, "p_ap": 60.65}),
    ("omniad", "I", "RLR", "mvtec", "clean", "mean", {"i_auroc": 98.6, "p_auroc": 98.5}),
    ("omniad", "III", "KV+Q", "mvtec", "clean", "mean",
     {"i_auroc": 99.0, "i_ap": 99.7, "i_f1max": 98.4, "p_auroc": 98.0, "p_ap": 55.4,
      "p_f1max": 59.1, "p_aupro": 93.0}),
    ("omniad", "VI", "6-12-11-9", "mvtec", "clean", "mean",
     {"mad": 86.3, "params_m": 42.7, "flops_g": 13.7}),
    ("roads", "2", "GNL", "mvtec", "gaussian_noise:3", "screw",
     {"i_auroc": 43.9, "p_aupro": 69.9}),
    ("roads", "3", "RD++", "visa", "defocus_blur:3", "mean",
     {"i_auroc": 92.58, "p_aupro": 88.52}),
    ("cada", "2", "CFA", "visa", "clean", "mixed",
     {"i_auroc": 42.9, "i_ap": 50.1, "p_auroc": 72.9, "p_ap": 1.6}),
    ("cada", "5", "+CADA, (u, sigma)", "btad", "clean", "mixed",
     {"i_auroc": 98.4, "i_ap": 97.6, "p_auroc": 97.6, "p_ap": 51.4}),
])
def test_cells(paper, table, row, name, condition, cls, values):
    """Cells copied by hand: no columns are swapped."""
    wanted = paper, table, row, name, condition
    found = [line for line in papers.lines() if column(line) == wanted and line.cls == cls]
    assert [line.values for line in found] == [values]


def test_spread():
    """Table 4d prints mean ± standard deviation over ten seeds."""
    first, *_, last = papers.rows("onenip", "4d")
    assert first.lines[0].spread == {"i_auroc": 0.01, "i_ap": 0.01, "p_auroc": 0.0, "p_ap": 0.01}
    assert last.lines[0].spread["i_auroc"] == 0.24


def test_rows_are_in_the_papers_order():
    assert [row.name for row in papers.rows("roads", "4")] == [f"ROADS-{i}" for i in range(8)]
    tokens = [row.options for row in papers.rows("omniad", "IV")]
    assert tokens == [("--tokens", "16"), ("--tokens", "36"), (), ("--tokens", "100")]
    encoders = [row.options for row in papers.rows("omniad", "VII")]
    assert encoders == [("--backbone", "resnet18"), ("--backbone", "resnet34"), None, None]
    with pytest.raises(KeyError, match="OneNIP .* has no Table 7; it has 1, 2, 3, 4a"):
        papers.rows("onenip", "7")


# --------------------------------------------------------------------------- which belong to a run


@pytest.mark.parametrize("paper", papers.TABLES)
def test_the_laptop_preset_changes_no_row_of_a_table(paper):
    """What a table varies is the same in its rows with both presets: what a row leaves open has one
    value in both, or the rows would be others on the embedded data."""
    for table in papers.TABLES[paper]:
        rows = [row for row in papers.rows(paper, table) if row.options is not None]
        varied = set().union(*(papers.settings(row.options) for row in rows)) - {"base"}
        for row in rows:
            named = papers.settings(row.options)
            of_paper = args_of(paper, row.options)
            laptop = preset(paper, named.get("base", "revdist"), "laptop")
            of_laptop = {**dataclasses.asdict(SCRIPTS[paper].Args()), **laptop}
            for name in varied - named.keys():
                assert of_laptop[name] == getattr(of_paper, name), (table, row.name, name)


@pytest.mark.parametrize("paper", papers.TABLES)
def test_at_evaluation_are_the_options_that_change_no_training(paper):
    groups = {}
    for field in dataclasses.fields(SCRIPTS[paper].Args):
        groups[field.name] = field.metadata["group"]
    used = set()
    for line in papers.lines():
        if line.paper == paper and line.options:
            used |= papers.settings(line.options).keys()
    asked = {name for name in used if groups[name] in ("scoring", "calibration")}
    assert asked == set(papers.AT_EVALUATION[paper])


def rows_of_ours():
    """Test parameters: every row that our scripts can be."""
    for paper, tables in papers.TABLES.items():
        for table in tables:
            for row in papers.rows(paper, table):
                if row.options is not None:
                    yield pytest.param(row, id=f"{paper}-{table}-{row.name}")


@pytest.mark.parametrize("row", list(rows_of_ours()))
def test_options_of_a_row_find_it(row):
    """The words are options of our script, they make the row's image size, and find its numbers."""
    for line in row.lines:
        if line.cls == "gain":
            continue
        assert args_of(line.paper, row.options).image_size == line.size
        if line.condition == "ood":
            found = numbers(line.paper, row.options, line.data, shift="all")["shift"]["ood"]
        else:
            corrupt = line.condition.replace("clean", "")
            found = numbers(line.paper, row.options, line.data, corrupt=corrupt)
        places = {**found, **found.get("classes", {})}
        for name, part in found.get("datasets", {}).items():
            places[f"mean {name}"] = part
        for metric, value in line.values.items():
            if metric in papers.QUALITY:
                error = 100 * places[line.cls][metric] - value
                assert abs(error) < ROUNDING or "Tables 4 and 5" in line.note, (line, metric)


def test_onenip():
    """The numbers beside a run of the paper's setting: Table 1, and Tables 5 and 6 for each class."""
    found = numbers("onenip")
    assert found.keys() == {"source", "mean", "classes"}
    assert found["source"] == "OneNIP (ECCV 2024), Tables 1, 5 and 6"
    assert found["classes"].keys() == CLASSES["mvtec"]
    assert found["classes"]["screw"] == {"i_auroc": .914, "i_ap": .966, "p_auroc": .989,
                                         "p_ap": .398}
    assert found["mean"]["p_ap"] == 0.637
    other = numbers("onenip", image_size=320)
    assert other == {"source": "OneNIP (ECCV 2024), Table 3", "mean": other["mean"]}
    assert other["mean"]["p_ap"] == 0.659


def test_onenip_on_joined_data():
    for name in ("btad+mvtec+visa", "mvtec+btad+visa"):
        found = numbers("onenip", name=name)
        assert found.keys() == {"source", "mean", "datasets"}
        assert found["mean"]["p_ap"] == 0.524
        assert found["datasets"]["btad"]["p_ap"] == 0.59


def test_an_ablation_has_its_own_numbers():
    found = numbers("onenip", ("--prompt", "static", "--no-restoration", "--no-refiner"))
    assert found == {"source": "OneNIP (ECCV 2024), Table 4a",
                     "mean": {"i_auroc": .968, "i_ap": .989, "p_auroc": .970, "p_ap": .458}}
    uniad = numbers("onenip", ("--prompt", "none", "--no-restoration", "--no-refiner"), "btad")
    assert uniad["classes"]["03"]["p_ap"] == 0.564
    assert "row repeated" in uniad["notes"][0]


@pytest.mark.parametrize("words", [(), ("--no-refiner",), ("--alpha", "0.0"),
                                   ("--prompt-test", "random")], ids=str)
def test_the_authors_choices_are_the_papers_rows_too(words):
    """The published numbers came from --score-scale test --prompt-class given; the preset leaves
    the test images alone and knows no class. Both stand beside the same numbers."""
    published = {"score_scale": "test", "prompt_class": "given"}
    assert numbers("onenip", words) is not None
    assert numbers("onenip", words, **published) == numbers("onenip", words)


@pytest.mark.parametrize("change", [
    {"backbone": "resnet18"}, {"weights": "random"}, {"encoder_layers": 3}, {"epochs": 10},
    {"steps": 100}, {"batch_size": 8}, {"loss_weights": "paper"}, {"alpha": 0.3},
    {"prompt_test": "wrong"}, {"classes": "screw"}, {"image_size": 160}, {"mask_rule": "any"},
    {"corrupt": "contrast"}, {"restoration": False, "refiner": False, "prompt": "none",
                              "encoder_layers": 1},
], ids=str)
def test_no_numbers_beside_another_run(change):
    """One option that the paper has otherwise is enough, also beside an ablation."""
    assert numbers("onenip", **change) is None


@pytest.mark.parametrize("change", [
    {"seed": 7}, {"out": "x"}, {"device": "cpu"}, {"workers": 2}, {"weights": "b4.pth"},
    {"textures": "dtd"}, {"batch_size": 8, "world": 8},
], ids=str)
def test_what_changes_no_result_does_not_matter(change):
    assert numbers("onenip", **change) == numbers("onenip")


def test_no_numbers_for_other_data_or_another_preset():
    for name in ("synth", "mvtec+visa", "realiad"):
        assert numbers("onenip", name=name) is None
    laptop = dataclasses.replace(args_of("onenip"), **onenip.PRESETS["laptop"])
    assert papers.numbers("onenip", laptop, onenip.PRESETS["paper"], "mvtec") is None
    assert numbers("onenip", world=8) is None  # 8 times the batch


def test_roads_under_shift():
    """--shift adds the conditions; --corrupt takes one of them in place of the clean images."""
    assert "shift" not in numbers("roads")
    screw = {"i_auroc": 0.905, "p_aupro": 0.94}
    for shift in ("all", "curve"):
        found = numbers("roads", shift=shift)
        assert found["mean"] == {"i_auroc": 0.9883, "p_auroc": 0.9836, "p_aupro": 0.9369}
        assert found["shift"]["contrast:3"]["classes"]["screw"] == screw
        assert found["source"] == "ROADS (WACV 2025), Tables 1, 2 and 4"
        assert "misprint" in " ".join(found["notes"])
    for corrupt in ("contrast", "contrast:3"):
        found = numbers("roads", corrupt=corrupt)
        assert found["classes"]["screw"] == screw and "shift" not in found
    assert numbers("roads", corrupt="contrast:4") is None


def test_roads_without_prompts_and_adapter():
    """ROADS-0 exists on MVTec AD only."""
    plain = ("--no-prompts", "--adapter", "none")
    found = numbers("roads", plain, shift="all")
    assert found["mean"] == {"p_aupro": 0.9115}
    assert found["shift"] == {"ood": {"mean": {"p_aupro": 0.822}}}
    assert numbers("roads", plain, "visa") is None


def test_cada():
    """The numbers beside a run of the paper's setting: Table 1, with those of the pool."""
    found = numbers("cada")
    assert found["source"] == "CADA (arXiv 2404.00724), Table 1"
    assert found["mean"]["p_ap"] == 0.57 and found["mixed"]["p_ap"] == 0.531
    assert "96.0/54.7 in Tables 4 and 5" in found["notes"][0]
    assert numbers("cada", ("--base", "uniad"))["mean"]["i_ap"] == 0.991
    assert numbers("cada", ("--calibrate", "none"), "visa")["mixed"]["p_ap"] == 0.329
    assert numbers("cada", ("--statistic", "std"))["mixed"]["p_ap"] == 0.482


@pytest.mark.parametrize("change", [{"base": "uniad"}, {"contaminate": 0.1}, {"base_run": "x"},
                                    {"statistic": "score"}, {"calibration_steps": 9}], ids=str)
def test_no_numbers_beside_another_calibration(change):
    """For "base": with the image size and the recipe of another base."""
    assert numbers("cada", **change) is None


def test_costs():
    """Of Omni-AD's models, for --flops: whatever the data and the training."""
    def costs(**changes):
        return papers.costs("omniad", args_of("omniad", **changes), omniad.PRESETS["paper"])

    assert costs() == {"params_m": 29.9, "flops_g": 11.2}
    assert costs(data="synth", epochs=3, batch_size=2, classes="a") == costs()
    assert costs(tokens=16) == {"params_m": 29.4, "flops_g": 10.1}
    assert costs(backbone="resnet18") == {"params_m": 24.5, "flops_g": 9.0}
    for change in ({"tokens": 16, "depths": "2,2,2,2"}, {"backbone": "resnet50"},
                   {"image_size": 320}):
        assert costs(**change) == {}
