"""The pages to look through: what stands in them, that they need nothing but themselves, and that a
browser agrees."""

import base64
import csv
import dataclasses
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

from common import UsageError, data, pages, report, runtime

SETTING = {"image size": 64}
TAGS_WITHOUT_END = {"meta", "img", "br", "option"}


@dataclasses.dataclass
class Args(runtime.Options):
    image_size: int = 64
    batch_size: int = 5


def darkness(images, samples):
    maps = 1 - images.float().mean(1) / 255
    return maps, maps.mean((1, 2))


def lightness(images, samples):
    maps = images.float().mean(1) / 255
    return maps, maps.amax((1, 2))


class Page(html.parser.HTMLParser):
    """What a test wants to know of a page; it fails where tags are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.links, self.figures, self.addresses = [], [], [], [], []
        self.texts = {"figcaption": [], "h3": [], "td": [], "h2": []}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in TAGS_WITHOUT_END:
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")
        if tag == "figure":
            self.figures.append(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        if tag == "a":
            self.links.append(attributes["href"])
        self.addresses += [attributes[name] for name in ("src", "srcset", "action", "data") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        for tag in self.texts:
            if tag in self.open:
                self.texts[tag][-1] += text


def check_alone(path):
    """All pictures are in the page, and nothing is asked from elsewhere."""
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert page.images and all(address.startswith("data:image/") for address in page.addresses)
    assert "http:" not in source and "https:" not in source and "@import" not in source and "url(" not in source
    return page


def opened(address):
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Folder of a prediction of 2 folders: 5 pictures, one of which cannot be read, with a name to
    be escaped and, if the file system takes it, one that is no UTF-8."""
    folder = tmp_path_factory.mktemp("predicted")
    for name, grey in (("one/a.png", 30), ("one/b <i>&.png", 220), ("two/c.png", 128), ("two/d.png", 90)):
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (60, 20), grey).save(folder / "in" / name)
    (folder / "in" / "two" / "e.png").write_bytes(b"")
    try:
        os.rename(folder / "in" / "two" / "d.png", os.fsencode(folder / "in" / "two") + b"/\xe4.png")
    except OSError:
        pass
    run = runtime.Run("method", folder / "out", torch.device("cpu"))
    run.out.mkdir()
    with pytest.raises(SystemExit):
        report.predict(run, Args(predict=[str(folder / "in")]), darkness, 0.5,
                       columns={"name": lambda s, v: "<&>"}, pixel_threshold=0.6)
    return run.out


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_data):
    """Folders of two runs with maps and one without, of the same images."""
    folders = []
    for name, score, keep in (("a", darkness, True), ("b", lightness, True), ("c", darkness, False)):
        run = runtime.Run("method", tmp_path_factory.mktemp(name), torch.device("cpu"))
        dataset = data.load(str(tiny_data), classes=["screw", "capsule"])
        paper = {"source": "Table <1>", "mean": {"i_auroc": 0.875}}
        report.evaluate(run, Args(save_maps=keep), dataset, score, setting=SETTING, seconds=0, paper=paper)
        folders.append(run.out)
    return folders


# -------------------------------------------------------------------------------------- predictions


def test_predictions_highest_first(predicted):
    """A figure for every row, in falling order of the scores, the picture without one last; names
    are escaped; every link leads to a file that is there; pictures are those of the files."""
    page = check_alone(predicted / "predictions.html")
    with open(predicted / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    scored = sorted((row for row in rows if row["score"]), key=lambda row: -float(row["score"]))
    assert len(page.figures) == len(rows) == 5 and len(page.images) == len(scored) == 4
    for row, figure, caption, address in zip(scored, page.figures, page.texts["figcaption"], page.images):
        assert figure["data-verdict"] == row["verdict"] and pages.readable(row["path"]) in caption
        assert f"score {float(row['score']):.4g}" in caption and "name <&>" in caption
        thumbnail = np.asarray(opened(address)).astype(int)
        assert thumbnail.shape == (20, 60 + 4 + 60, 3)
        assert abs(thumbnail[:, :60].mean() - data.read_image(row["path"]).mean()) < 2
    assert page.figures[-1]["data-verdict"] == "no score" and "cannot read" in page.texts["figcaption"][-1]
    assert len(page.links) == 3 * 4  # of each: the picture, "heat-map", "mask"
    for link in page.links:
        assert os.path.isfile(os.fsencode(predicted) + b"/" + unquote_to_bytes(link))


def test_folders_can_be_chosen(predicted):
    """The choice names every folder with its number of pictures, and each figure knows its own."""
    source = (predicted / "predictions.html").read_text(encoding="utf-8")
    page = Page(predicted / "predictions.html")
    assert [figure["data-folder"] for figure in page.figures].count("0") == 2
    assert [figure["data-folder"] for figure in page.figures].count("1") == 3
    assert "one (2)" in source and "two (3)" in source


def test_page_of_many_predictions_keeps_places_only(tmp_path):
    """Ten thousand figures: what stays in memory are their places, not their content."""
    page = pages.Predictions(tmp_path)
    for i in range(10000):
        page.add(b"x" * 2000, float(i % 100), "good", tmp_path)
    held = [page.places, page.numbers, page.folders, page.verdicts]
    assert len(repr(held)) < 400_000
    page.write(tmp_path / "predictions.html", "method", 0.5, None)
    assert (tmp_path / "predictions.html").stat().st_size > 10000 * 2000
    assert list(tmp_path.iterdir()) == [tmp_path / "predictions.html"]


# ------------------------------------------------------------------------------------------ one run


def failures(rows):
    """By trying every threshold: (misses, false alarms) of the rows at the best F1, at the highest
    such threshold."""
    labels = np.array([int(row["label"]) for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    best = max(scores, key=lambda t: (f1_score(labels, scores >= t), t))
    missed = {row["path"] for row in rows if row["label"] == "1" and float(row["score"]) < best}
    alarms = {row["path"] for row in rows if row["label"] == "0" and float(row["score"]) >= best}
    return missed, alarms


def test_run_page_shows_the_failures(evaluated, capsys):
    """Misses and false alarms of every class before anything else, each with picture, truth and
    overlay where maps were kept; the table has our numbers and the paper's; the pictures of the run
    are in the page."""
    for folder, panels in ((evaluated[0], 3), (evaluated[2], 1)):
        assert report.main([str(folder)]) == 0
        assert capsys.readouterr().out.strip() == str(folder / "run.html")
        page = check_alone(folder / "run.html")
        assert page.texts["h2"][:2] == ["Misses and false alarms", "Metrics in per cent"]
        result = json.loads((folder / "metrics.json").read_text())
        expected = {"missed": set(), "alarm": set()}
        rows = list(csv.DictReader(open(folder / "scores.csv")))
        for cls in result["classes"]:
            missed, alarms = failures([row for row in rows if row["class"] == cls])
            expected["missed"] |= missed
            expected["alarm"] |= alarms
            assert any(title.startswith(f"{cls}: {len(missed)} of 4") and f"{len(alarms)} false alarms on 3" in title
                       for title in page.texts["h3"])
        shown = {"missed": set(), "alarm": set()}
        for figure, caption in zip(page.figures, page.texts["figcaption"]):
            path, = [row["path"] for row in rows if row["path"] in caption]
            shown[figure["class"]].add(path)
        assert shown == expected and any(expected.values())
        assert opened(page.images[0]).width == 64 * panels + 4 * (panels - 1)
        for value in [*result["classes"]["screw"].values(), *result["mean"].values(), 0.875]:
            assert report.percent(value) in page.texts["td"]
        pictures = [address for address in page.images if "image/png" in address]
        assert len(pictures) == len(list((folder / "pictures").glob("*.png"))) == 3


def test_run_page_without_what_is_not_there(evaluated, tmp_path, capsys):
    """Undefined metrics are dashes; a class with good images only has no threshold; images that
    were moved away are said to be gone."""
    folder = tmp_path / "run"
    shutil.copytree(evaluated[0], folder)
    result = json.loads((folder / "metrics.json").read_text())
    result["classes"]["screw"]["i_auroc"] = None
    result["problems"] = ["one <b>remark</b>"]
    (folder / "metrics.json").write_text(json.dumps(result))
    rows = list(csv.reader(open(folder / "scores.csv")))
    with open(folder / "scores.csv", "w", newline="") as file:
        for path, cls, label, score in rows:
            if cls != "screw" or label == "0":
                csv.writer(file).writerow([path + "x" * (cls == "capsule"), cls, label, score])
    assert report.main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page, source = check_alone(tmp_path / "page.html"), (tmp_path / "page.html").read_text()
    assert page.texts["td"][page.texts["td"].index("screw") + 1] == "-"
    assert "None" not in source and "nan" not in page.texts["td"]
    assert "only good test images" in source and "no longer there" in source
    assert "one &lt;b&gt;remark" in source


# ------------------------------------------------------------------------------------- several runs


def test_compare_page_shows_the_same_images(evaluated, tmp_path, capsys):
    """A column for each run; every row holds the picture, its mask and one overlay a run; the
    numbers of each run."""
    out = tmp_path / "compare.html"
    assert report.main([str(evaluated[0]), str(evaluated[1]), "--out", str(out)]) == 0
    page = check_alone(out)
    assert len(page.images) % 4 == 0 and 2 * 4 * 4 <= len(page.images) <= 2 * 5 * 4
    assert {opened(address).size for address in page.images} == {(64, 64)}
    for folder in evaluated[:2]:
        result = json.loads((folder / "metrics.json").read_text())
        for part in ("mean", "mixed"):
            assert report.percent(result[part]["p_auroc"]) in page.texts["td"]
    overlays = [[np.asarray(opened(page.images[row + column])) for row in range(0, len(page.images), 4)]
                for column in (2, 3)]
    assert not any(np.array_equal(a, b) for a, b in zip(*overlays))


@pytest.mark.parametrize("case, named", [
    ("no run", "metrics.json"), ("maps", "--save-maps"), ("paths", "in common"), ("damaged", "damaged"),
    ("out", "nowhere")])
def test_what_is_missing_is_one_line(evaluated, tmp_path, capsys, case, named):
    """Status 2 and a line that names the folder or file and says what to do."""
    folder = tmp_path / "run"
    shutil.copytree(evaluated[0], folder)
    words = [str(evaluated[0]), str(folder)]
    if case == "no run":
        (folder / "metrics.json").unlink()
    elif case == "maps":
        words = [str(evaluated[0]), str(evaluated[2])]
    elif case == "paths":
        kept = dict(np.load(folder / "maps" / "screw.npz"))
        kept["paths"] = np.array([path + "x" for path in kept["paths"]])
        np.savez(folder / "maps" / "screw.npz", **kept)
    elif case == "damaged":
        (folder / "metrics.json").write_text("{")
    words += ["--out", str(tmp_path / ("nowhere/x.html" if case == "out" else "x.html"))]
    assert report.main(words) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


# ------------------------------------------------------------------------------------- in a browser


# Runs after the page's own script; what it found becomes the title.
PROBE = """
<script>
window.onload = () => {
  const found = {errors, wide: document.documentElement.scrollWidth - innerWidth,
                 images: [...document.images].map(i => (i.scrollIntoView(), i.naturalWidth)),
                 asked: performance.getEntriesByType("resource").map(e => e.name)
                                   .filter(name => !name.startsWith("data:")), shown: []};
  for (const [id, value] of CHOICES) {
    const choice = document.getElementById(id);
    choice.value = value;
    choice.dispatchEvent(new Event("change"));
    const visible = [...document.querySelectorAll("figure")].filter(f => f.offsetHeight > 0).length;
    found.shown.push([visible, +document.getElementById("shown").textContent]);
  }
  document.title = JSON.stringify(found);
};
</script>
"""


def browse(page, folder, choices=(), width=1300):
    """The page as Chromium shows it: {errors, wide: pixels that do not fit, images: widths, asked:
    addresses, shown: [figures visible, the number that the page says] after each choice}."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    watch = "<script>const errors = []; window.onerror = message => errors.push(message)</script>"
    probe = PROBE.replace("CHOICES", json.dumps(list(choices)))
    source = page.read_text(encoding="utf-8").replace("<head>", "<head>" + watch).replace("</body>", probe + "</body>")
    probed = page.with_name("probed.html")
    probed.write_text(source, encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
             f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    return json.loads(html.unescape(title))


@pytest.mark.parametrize("width", [1300, 500])
def test_browser_shows_the_predictions(predicted, tmp_path, width):
    """No error, no request, every picture drawn, nothing wider than the window; the choices of
    folder and verdict work together."""
    choices = [("folder", "0"), ("verdict", "defective"), ("folder", ""), ("verdict", "no score"), ("verdict", "")]
    found = browse(predicted / "predictions.html", tmp_path, choices, width)
    assert found["errors"] == [] and found["asked"] == [] and found["wide"] <= 0
    assert found["images"] == [60 + 4 + 60] * 4
    with open(predicted / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    bad = sum(row["verdict"] == "defective" for row in rows)
    assert found["shown"] == [[2, 2], [1, 1], [bad, bad], [1, 1], [5, 5]]


def test_browser_shows_the_runs(evaluated, tmp_path):
    """The page of a run and that of two: no error, no request, every picture drawn."""
    report.main([str(evaluated[0]), "--out", str(tmp_path / "run.html")])
    report.main([str(evaluated[0]), str(evaluated[1]), "--out", str(tmp_path / "compare.html")])
    for name in ("run.html", "compare.html"):
        found = browse(tmp_path / name, tmp_path)
        assert found["errors"] == [] and found["asked"] == [] and found["wide"] <= 0
        assert found["images"] and min(found["images"]) >= 64


def test_the_script_finds_what_it_asks_for(predicted):
    """Without a browser: every element that the page's script names is there; every figure has what it filters by."""
    source = (predicted / "predictions.html").read_text(encoding="utf-8")
    named = re.findall(r'getElementById\("(\w+)"\)', pages.SCRIPT) + ["folder", "verdict"]
    assert "shown" in named and all(re.search(rf"id={name}\b", source) for name in named)
    figures = re.findall(r"<figure[^>]*>", source)
    assert len(figures) == 5 and all("data-folder=" in tag and "data-verdict=" in tag for tag in figures)
    assert pages.SCRIPT in source


@pytest.mark.parametrize("name, content, said", [
    ("metrics.json", "[]", "metrics.json"), ("metrics.json", "null", "metrics.json"),
    ("metrics.json", "{}", "metrics.json"),
    ("metrics.json", "{", "metrics.json"), ("args.json", "[]", "args.json"), ("scores.csv", "", "scores.csv"),
    ("scores.csv", "path,class,label,score\na,b,7,0.5\n", "scores.csv"),
    ("scores.csv", "path,class,label,score\na,b,1,nan\n", "scores.csv"), ("maps/screw.npz", "cut", "screw.npz")])
def test_damaged_files_of_a_run_are_named(name, content, said, evaluated, tmp_path, capsys):
    """One line, status 2, no page."""
    folder = shutil.copytree(evaluated[0], tmp_path / "run")
    (folder / "run.html").unlink(missing_ok=True)
    if content == "cut":
        file = next((folder / "maps").glob("*.npz"))
        said, content = file.name, None
        file.write_bytes(file.read_bytes()[:500])
    else:
        (folder / name).write_text(content)
    capsys.readouterr()
    assert report.main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert said in err and "damaged" in err and err.count("\n") == 1 and not (folder / "run.html").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_byte_of_the_maps_is_wrong(save, tmp_path):
    """They are read as they are, or named as damaged in one line."""
    rng, path = np.random.default_rng(0), tmp_path / "screw.npz"
    arrays = {"maps": rng.random((3, 8, 8)), "masks": rng.random((3, 8, 8)) > 0.5, "scores": rng.random(3)}
    save(path, **arrays, labels=np.array([0, 1, 1]), paths=np.array(["a", "b", "c"]))
    whole, damaged = path.read_bytes(), []
    for length in range(0, len(whole), 50):
        damaged.append(whole[:length])
    for place in rng.integers(len(whole), size=500):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    one = io.BytesIO()
    np.save(one, arrays["maps"])
    refused = 0
    for content in (*damaged, one.getvalue()):
        path.write_bytes(content)
        try:
            kept = pages.load_maps(path)
        except UsageError as error:
            assert str(error) == f"{path}: damaged; evaluate again with --save-maps"
            refused += 1
        else:
            assert (kept["maps"] == arrays["maps"]).all()
    assert refused > len(damaged) / 2


def test_maps_are_complete(tmp_path):
    """All that is asked for, of the same images."""
    path = tmp_path / "screw.npz"
    for labels in ({}, {"labels": np.zeros(2)}):
        np.savez(path, maps=np.zeros((3, 8, 8)), **labels)
        assert pages.load_maps(path, ["maps"])["maps"].shape == (3, 8, 8)
        with pytest.raises(UsageError, match="damaged"):
            pages.load_maps(path, ["maps", "labels"])
