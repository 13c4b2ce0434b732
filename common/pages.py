"""Pages to look through in a browser: each is one file, pictures included, and needs no network.

    predictions.html   what --predict gave, the highest score first           (`Predictions`)
    run.html           a finished run: misses and false alarms, table, classes   (`run_page`)
    compare.html       the same images as several runs see them                  (`compare_page`)
"""

import base64
import csv
import html
import io
import math
import os
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
from PIL import Image

from common import UsageError, data, metrics, pictures
from common.folder import read_json, temporary_beside

THUMBNAIL = 160  # pixels of a picture's longer side
FAILURES = 12  # at most so many misses of a class are shown, and as many false alarms

STYLE = """
:root { color-scheme: light dark; --pale: #8884;
        --red: #c8352f; --green: #2f7d3b; --amber: #a66300 }
@media (prefers-color-scheme: dark) { :root { --red: #ff7b72; --green: #7ccf86; --amber: #e3a04f } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 90rem; margin: 1.5rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.note { opacity: .75; max-width: 60rem; margin: .3rem 0 }
nav { position: sticky; top: 0; background: Canvas; padding: .6rem 0; display: flex; gap: 1.2rem;
      flex-wrap: wrap; align-items: center; border-bottom: 1px solid var(--pale); z-index: 1 }
a { white-space: nowrap }
select { font: inherit; max-width: 30rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .8rem;
           margin-top: .8rem }
figure { margin: 0; padding: .5rem; border: 1px solid var(--pale); border-radius: 6px;
         border-left: 5px solid var(--pale); content-visibility: auto;
         contain-intrinsic-size: auto 14rem; overflow-wrap: anywhere }
figure[hidden] { display: none }
figure.defective, figure.missed { border-left-color: var(--red) }
figure.good { border-left-color: var(--green) } figure.alarm { border-left-color: var(--amber) }
.defective b, .missed b { color: var(--red) }
.good b { color: var(--green) } .alarm b { color: var(--amber) }
figure img { width: 100%; height: auto; display: block; margin-bottom: .3rem }
figcaption { font-size: .87rem } figcaption .path { opacity: .75 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
thead th, tr.line td { border-bottom: 1px solid var(--pale) } tr.paper td { opacity: .7 }
.compare td, .compare th { text-align: center; vertical-align: top; padding: .2rem;
                           font-size: .87rem }
.compare td:first-child { text-align: left; white-space: normal; max-width: 14rem;
                          overflow-wrap: anywhere }
.wide { max-width: 100%; height: auto; background: white }
"""

# Shows the figures that both choices allow, and their number.
SCRIPT = """
const choices = ["folder", "verdict"].map(name => document.getElementById(name));
const figures = [...document.querySelectorAll("figure")];
function show() {
  let shown = 0;
  for (const figure of figures) {
    figure.hidden = choices.some(c => c.value && figure.dataset[c.id] !== c.value);
    shown += !figure.hidden;
  }
  document.getElementById("shown").textContent = shown;
}
for (const choice of choices) choice.addEventListener("change", show);
show();
"""


# ------------------------------------------------------------------------------------------- pieces


def readable(path):
    """A path, or text with paths in it, to be printed: bytes that are not UTF-8 become U+FFFD."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def text(value):
    """A value for people: floats short, "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return readable(value)


def percent(value):
    """Fraction -> "12.3"; None, an undefined metric, -> "-"."""
    return "-" if value is None else f"{100 * value:.1f}"


def escaped(value):
    return html.escape(text(value))


def link(path):
    """A relative path as an address, whatever bytes are in it."""
    return quote_from_bytes(os.fsencode(path))


def jpeg(picture):
    """Picture -> bytes; small, for thumbnails only."""
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=75)
    return buffer.getvalue()


def embedded(content, kind="jpeg"):
    """Bytes of a picture -> an address (data:...) that contains them."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure(caption, picture=None, links=None):
    """The inside of <figure>, bytes. picture: the bytes of a JPEG; links: {name: path from the
    page}."""
    parts, addresses = [], {name: link(path) for name, path in (links or {}).items()}
    if picture is not None:
        image = f'<img alt="" loading="lazy" src="{embedded(picture)}">'
        first = next(iter(addresses.values()), None)
        parts.append(f'<a href="{first}">{image}</a>' if first else image)
    named = [f'<a href="{address}">{name}</a>' for name, address in addresses.items()]
    parts.append(f"<figcaption>{caption} {' '.join(named)}</figcaption>")
    return "".join(parts).encode()


def caption(path, score, ratio, verdict, own):
    """What stands below a predicted picture, HTML."""
    parts = [f"<b>{verdict}</b>", f"score {text(score)}", f"ratio {text(ratio)}"]
    parts += [f"{html.escape(name)} {escaped(value)}" for name, value in own.items()]
    return f"{', '.join(parts)}<br><span class=path>{escaped(path)}</span>"


def failed_caption(path, reason):
    return f"<b>no score</b>, {escaped(reason)}<br><span class=path>{escaped(path)}</span>"


def document(title, body):
    """A whole page."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n")


# -------------------------------------------------------------------------------------- predictions


class Predictions:
    """The figures of predictions.html. They wait in a temporary file until all are there, as
    thousands would fill the memory; only their places are kept."""

    def __init__(self, folder):
        self.file = tempfile.TemporaryFile(dir=folder)
        self.places = []  # (score or None, offset, length)
        self.numbers = {}  # folder -> its number on the page
        self.folders, self.verdicts = Counter(), Counter()  # figures of each

    def add(self, content, score, verdict, folder):
        """content: by `figure`; score: None if there is none; folder: one choice of the filter."""
        number = self.numbers.setdefault(folder, len(self.numbers))
        kind = verdict or "no score"
        self.folders[folder] += 1
        self.verdicts[kind] += 1
        head = f'<figure class="{verdict}" data-folder="{number}" data-verdict="{kind}">'
        content = head.encode() + content + b"</figure>\n"
        self.places.append((score, self.file.tell(), len(content)))
        self.file.write(content)

    def write(self, path, method, threshold, pixel_threshold):
        """The page, highest score first, those without a score last."""
        before, after = document(f"{method}: predictions", "FIGURES").split("FIGURES")
        ordered = sorted(self.places, key=lambda place: (place[0] is None, -(place[0] or 0)))
        unfinished = temporary_beside(path)
        with open(unfinished, "wb") as page:
            page.write((before + self._head(method, threshold, pixel_threshold)).encode())
            for _, offset, length in ordered:
                self.file.seek(offset)
                page.write(self.file.read(length))
            page.write(f"</div>\n<script>{SCRIPT}</script>{after}".encode())
        os.replace(unfinished, path)
        self.file.close()

    def _head(self, method, threshold, pixel_threshold):
        colours = "from a map's lowest to its highest value"
        if pixel_threshold is not None:
            colours += f", but at least to the pixel threshold {text(float(pixel_threshold))}"
        folders = [f'<option value="">all ({len(self.places)})']
        for folder, count in self.folders.items():
            folders.append(f'<option value="{self.numbers[folder]}">{escaped(folder)} ({count})')
        verdicts = [f'<option value="">all ({len(self.places)})']
        for verdict, count in sorted(self.verdicts.items()):
            verdicts.append(f'<option value="{verdict}">{verdict} ({count})')
        return (f"<h1>Predictions of {escaped(method)}</h1>"
                f"<p class=note>Highest score first. Defective: score above "
                f"{text(float(threshold))}; ratio: score divided by it. Left the picture, right "
                f"its anomaly map over it, coloured {colours}; a click opens the map at the "
                f"picture's own resolution.</p>"
                f"<nav><label>folder <select id=folder>{''.join(folders)}</select></label>"
                f"<label>verdict <select id=verdict>{''.join(verdicts)}</select></label>"
                f"<span><span id=shown>{len(self.places)}</span> shown</span></nav>\n"
                f"<div class=figures>\n")


# ------------------------------------------------------------------------------------------ one run


def run_page(folder, columns):
    """The page of a finished run, HTML, from what is in its folder.

    columns: {metric: title}. Raises UsageError if it is not a finished run.
    """
    result, rows = _read_run(folder)
    seconds = result["seconds"]
    setting = [f"{escaped(name)}: {escaped(value)}" for name, value in result["setting"].items()]
    body = [f"<h1>{escaped(result['method'])} on {escaped(result['data'])}</h1>",
            f"<p class=note>{', '.join(setting)}</p>",
            (f"<p class=note>{result['images']} test images, seed {result['seed']}, commit "
             f"{escaped(result['commit'])}, {text(seconds.get('train'))} s of training</p>"),
            *_problems(result), *_failures(folder, rows), *_table(result, columns),
            *_class_pictures(folder, result)]
    return document(f"{result['method']}: {result['data']}", "\n".join(body))


def _read_run(folder):
    """metrics.json, and the rows (path, class, label, score) of scores.csv."""
    for name in ("metrics.json", "scores.csv"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: not a finished run of these scripts (no {name} in it)")
    needed = "method", "data", "setting", "classes", "mean", "mixed", "images", "seconds", "seed", "commit"
    return read_json(folder / "metrics.json", needed), read_scores(folder / "scores.csv")


def read_scores(path):
    """The rows (path, class, label, score) of a run's scores.csv. Raises UsageError if it is not
    there or damaged."""
    rows = []
    try:
        scores = path.read_text(encoding="utf-8", errors="surrogateescape")
        for row in csv.DictReader(io.StringIO(scores, newline="")):
            rows.append((row["path"], row["class"], int(row["label"]), float(row["score"])))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error):
        rows = []
    whole = all(label in (0, 1) and math.isfinite(score) for _, _, label, score in rows)
    if not rows or not whole:
        raise UsageError(f"{path}: damaged, its rows are no path, class, label and score; do the "
                         "run's --eval again")
    return rows


MAPS = ("maps", "masks", "scores", "labels", "paths")  # arrays of maps/CLASS.npz


def load_maps(path, names=MAPS):
    """What --save-maps kept of a class: {name: array (N, ...)}. Raises UsageError if it is damaged
    or lacks one of these arrays."""
    try:
        with np.load(path) as file:
            kept = dict(file)
        lengths = {len(kept[name]) for name in names}
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            NotImplementedError, zipfile.BadZipFile, zlib.error):
        # what zipfile, zlib and numpy raise, depending on which byte is wrong
        lengths = set()
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"{path}: damaged; evaluate again with --save-maps")
    return kept


def _problems(result):
    problems = result.get("problems", [])
    if not problems:
        return []
    lines = "".join(f"<li>{escaped(problem)}</li>" for problem in problems)
    summary = f"<summary>{len(problems)} remarks on the data</summary>"
    return [f"<details>{summary}<ul>{lines}</ul></details>"]


def _failures(folder, rows):
    """Misses and false alarms: the class with the most first, of each class the worst first."""
    parts = ["<h2>Misses and false alarms</h2>",
             ("<p class=note>For each class at the threshold of its best F1 on these test images; "
              "one that is chosen without their labels does no better in F1. Left the picture, "
              "then, where --save-maps kept them, the true region and the anomaly map over the "
              "picture, one colour scale a class.</p>")]
    corrupt = _args(folder).get("corrupt")
    if corrupt:
        parts.append(f"<p class=note>Scored under --corrupt {escaped(corrupt)}, shown without.</p>")
    sections = []
    for cls in dict.fromkeys(row[1] for row in rows):
        of_class = [row for row in rows if row[1] == cls]
        sections.append(_failures_of_class(folder, cls, of_class))
    sections.sort(key=lambda section: -section[0])
    return parts + [content for _, content in sections]


def _args(folder):
    """The options of the run; empty if they are not there."""
    file = folder / "args.json"
    if not file.is_file():
        return {}
    return read_json(file)


def _failures_of_class(folder, cls, rows):
    """(number of failures, HTML)."""
    threshold = metrics.best_f1_threshold([row[3] for row in rows], [row[2] for row in rows])
    bad = [row for row in rows if row[2]]
    good = [row for row in rows if not row[2]]
    if not bad or not good:
        note = "only defective test images" if bad else "only good test images"
        return 0, f"<h3>{escaped(cls)}</h3><p class=note>{note}: no threshold</p>"
    misses = sorted((row for row in bad if row[3] < threshold), key=lambda row: row[3])
    alarms = sorted((row for row in good if row[3] >= threshold), key=lambda row: -row[3])
    parts = [(f"<h3>{escaped(cls)}: {len(misses)} of {len(bad)} defective images missed, "
              f"{len(alarms)} false alarms on {len(good)} good ones "
              f"(threshold {threshold:.4g})</h3>")]
    if misses or alarms:
        maps = _Maps(folder, cls)
        parts.append("<div class=figures>")
        parts += [_failure(row, "missed", "missed", maps) for row in misses[:FAILURES]]
        parts += [_failure(row, "alarm", "false alarm", maps) for row in alarms[:FAILURES]]
        parts.append("</div>")
    left_out = len(misses[FAILURES:]) + len(alarms[FAILURES:])
    if left_out:
        parts.append(f"<p class=note>and {left_out} more, see scores.csv</p>")
    return len(misses) + len(alarms), "".join(parts)


def _failure(row, kind, what, maps):
    path, _, _, score = row
    below = (f"<b>{what}</b>, score {text(score)}, {escaped(Path(path).parent.name)}<br>"
             f"<span class=path>{escaped(path)}</span>")
    try:
        content = figure(below, jpeg(pictures.in_row(maps.panels(path))))
    except UsageError:
        content = figure(f"{below}<br>(the picture is no longer there)")
    return f"<figure class={kind}>{content.decode()}</figure>"


class _Maps:
    """The kept maps of a class, if there are any. Arrays (N, S, S)."""

    def __init__(self, folder, cls):
        self.index, file = {}, folder / "maps" / f"{cls}.npz"
        if file.is_file():
            kept = load_maps(file)
            self.maps, self.masks = kept["maps"], kept["masks"]
            self.scores, self.labels = kept["scores"], kept["labels"]
            self.index = {path: i for i, path in enumerate(kept["paths"].tolist())}
            self.low, self.high = self.maps.min(), self.maps.max()

    def panels(self, path):
        """Picture and, where its map was kept, true region and overlay: uint8 (h, w, 3) each."""
        picture = thumbnail(path)
        if path not in self.index:
            return [picture]
        return [picture, self.truth(path, picture), self.overlay(path, picture)]

    def truth(self, path, picture):
        mask = Image.fromarray(self.masks[self.index[path]])
        resized = mask.convert("L").resize((picture.shape[1], picture.shape[0]))
        return np.asarray(resized.convert("RGB"))

    def overlay(self, path, picture):
        return pictures.overlaid(picture, self.maps[self.index[path]], self.low, self.high)


def thumbnail(path):
    """uint8 (h, w, 3), the longer side at most THUMBNAIL. Raises UsageError as
    `data.read_image` does."""
    picture = Image.fromarray(data.read_image(Path(path)))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _table(result, columns):
    """The metrics of `columns` in per cent, the paper's below ours."""
    paper = result.get("paper") or {}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    lines = ["<h2>Metrics in per cent</h2><div class=scroll><table>",
             f"<thead><tr><th></th>{head}</tr></thead>"]

    def add(name, values, of_paper, kind=""):
        cells = "".join(f"<td>{percent(values.get(key))}</td>" for key in columns)
        lines.append(f"<tr{kind}><td>{escaped(name)}</td>{cells}</tr>")
        if of_paper:
            add("\u2003paper", of_paper, None, " class=paper")

    for name, values in result["classes"].items():
        add(name, values, paper.get("classes", {}).get(name))
    lines.append(f"<tr class=line><td colspan={len(columns) + 1}></td></tr>")
    for name, values in result.get("datasets", {}).items():
        add(f"mean {name}", values, paper.get("datasets", {}).get(name))
    add("mean", result["mean"], paper.get("mean"))
    add("mixed", result["mixed"], paper.get("mixed"))
    source = f"<p class=note>paper: {escaped(paper['source'])}</p>" if paper.get("source") else ""
    return [*lines, f"</table></div>{source}"]


def _class_pictures(folder, result):
    """Every picture of the run: the class with the lowest I-AUROC first, then the others."""
    def auroc(cls):
        value = result["classes"][cls].get("i_auroc")
        return 2 if value is None else value

    parts = ["<h2>Classes</h2>",
             ("<p class=note>The class with the lowest I-AUROC first. Picture, true region, anomaly "
              "map, both; below them the scores.</p>")]
    names = sorted(result["classes"], key=auroc)
    files = {folder / "pictures" / pictures.file_of(name, names): name for name in names}
    for file in sorted((folder / "pictures").glob("*.png")):
        files.setdefault(file, file.stem)
    for file, name in files.items():
        if file.is_file():
            source = embedded(file.read_bytes(), "png")
            image = f'<img class=wide alt="" loading="lazy" src="{source}">'
            parts.append(f"<h3>{escaped(name)}</h3>{image}")
    return parts


# ------------------------------------------------------------------------------------- several runs


def compare_page(folders, columns):
    """The page of several finished runs, HTML: their metrics, and the same images as each of them
    sees them.

    Raises UsageError if one of them is not a finished run or keeps no maps, if they have no class
    in common, or if they have no image of such a class in common.
    """
    results = [_read_run(folder)[0] for folder in folders]
    names = [f"{folder.name} ({result['method']})" for folder, result in zip(folders, results)]
    body = [f"<h1>{len(folders)} runs side by side</h1>"]
    for title, part in (("mean over classes", "mean"), ("all classes in one pool", "mixed")):
        head = "".join(f"<th>{column}</th>" for column in columns.values())
        body.append(f"<h2>{title}, in per cent</h2><div class=scroll><table>"
                    f"<thead><tr><th></th>{head}</tr></thead>")
        for name, result in zip(names, results):
            cells = "".join(f"<td>{percent(result[part].get(key))}</td>" for key in columns)
            body.append(f"<tr><td>{escaped(name)}</td>{cells}</tr>")
        body.append("</table></div>")
    classes = set(results[0]["classes"])
    for result in results[1:]:
        classes &= result["classes"].keys()
    if not classes:
        raise UsageError(f"{', '.join(map(str, folders))}: no class in common")
    body.append("<h2>The same images</h2><p class=note>The image whose rank among its class's test "
                "images differs most from run to run, then defective images with the highest, the "
                "median and the lowest rank, then the good one with the highest. One colour scale "
                "for each run and class.</p>")
    for cls in sorted(classes):
        body += _compared_class(cls, folders, names)
    return document("runs side by side", "\n".join(body))


def _compared_class(cls, folders, names):
    kept = []
    for folder in folders:
        maps = _Maps(folder, cls)
        if not maps.index:
            raise UsageError(f"{folder}: no maps/{cls}.npz, which the comparison needs; evaluate "
                             f"it again: --eval {folder / 'checkpoint.pt'} --save-maps")
        kept.append(maps)
    common = [path for path in kept[0].index if all(path in maps.index for maps in kept)]
    if not common:
        raise UsageError(f"{folders[0]} and {folders[1]}: no image of class '{cls}' in common "
                         f"(paths must be the same)")
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    lines = [f"<h3>{escaped(cls)}</h3><div class=scroll><table class=compare>",
             f"<thead><tr><th></th><th>picture</th><th>true region</th>{head}</tr></thead>"]
    for what, path in _interesting(kept, common):
        lines.append(_compared_row(what, path, kept))
    return [*lines, "</table></div>"]


def _interesting(kept, paths):
    """[(what, path)] of the images that `compare_page` describes."""
    ranks = []  # of each run: {path: share of the images that score lower}
    for maps in kept:
        order = np.argsort([maps.scores[maps.index[path]] for path in paths], kind="stable")
        ranks.append({paths[i]: rank / len(paths) for rank, i in enumerate(order)})
    spread, mean = {}, {}
    for path in paths:
        of_runs = [rank[path] for rank in ranks]
        spread[path], mean[path] = max(of_runs) - min(of_runs), sum(of_runs) / len(of_runs)
    label = {path: kept[0].labels[kept[0].index[path]] for path in paths}
    bad = sorted((path for path in paths if label[path]), key=mean.get)
    good = sorted((path for path in paths if not label[path]), key=mean.get)
    chosen = {}
    if len(kept) > 1:
        chosen[max(paths, key=spread.get)] = "differs most"
    if bad:
        chosen.setdefault(bad[-1], "highest rank")
        chosen.setdefault(bad[len(bad) // 2], "median")
        chosen.setdefault(bad[0], "lowest rank")
    if good:
        chosen.setdefault(good[-1], "good, highest rank")
    return [(what, path) for path, what in chosen.items()]


def _image(array):
    return f'<img alt="" src="{embedded(jpeg(Image.fromarray(array)))}">'


def _compared_row(what, path, kept):
    first = kept[0]
    cells = [f"<b>{what}</b><br>{escaped(Path(path).parent.name)}<br>{escaped(Path(path).name)}"]
    try:
        picture = thumbnail(path)
        panels = [picture, first.truth(path, picture)]
        panels += [maps.overlay(path, picture) for maps in kept]
        images = [_image(panel) for panel in panels]
    except UsageError:
        images = ["(the picture is no longer there)"] + [""] * (1 + len(kept))
    scores = [f"score {maps.scores[maps.index[path]]:.4g}" for maps in kept]
    for image, below in zip(images, ["", "", *scores]):
        cells.append(f"{image}<br>{below}")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
