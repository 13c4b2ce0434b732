"""Pictures for slides: every method's from a tiny run, the hero of four, and what is drawn is what the model has."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import onenip
from common import data
from docs import figures

BLOCKS = "--depths", "1,1,1,1", "--steps", 2
TRANSFORMER = "--hidden", 32, "--heads", 2, "--mlp", 32, "--steps", 2
WORDS = {
    "onenip": (*TRANSFORMER, "--bank", 1),
    "omniad": (*BLOCKS, "--tokens", 16),
    "roads": BLOCKS,
    "cada": (*BLOCKS, "--calibration-steps", 2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture
def finished(runs, tiny_data, command):
    """finished(method): the folder of its tiny run, with --save-maps."""

    def of(method):
        out = runs / method
        if not (out / "metrics.json").is_file():
            small = "--data", tiny_data, "--classes", "screw,terrazzo", "--image-size", 64
            done = command(method, *small, *WORDS[method], "--out", out, "--save-maps")
            assert done.status == 0, done.err
        return out

    return of


@pytest.mark.parametrize("method", WORDS)
def test_pictures_of_a_run(method, finished, capsys):
    """All of the method's pictures are written, large enough, and no panel of a map is of one colour."""
    out = finished(method)
    before = (out / "metrics.json").read_bytes(), (out / "checkpoint.pt").read_bytes()
    assert figures.main([str(out)]) == 0
    names = [line.split("/")[-1] for line in capsys.readouterr().out.split()]
    assert names == [f"{name}.png" for name in figures.PICTURES[method]]
    for name in names:
        picture = np.asarray(Image.open(out / "figures" / name).convert("RGB"))
        assert min(picture.shape[:2]) >= 2 * figures.PANEL
        if name != "codes.png":  # the last panel of the first row
            last = picture[figures.TEXT + 12 :, -figures.PANEL :][: figures.PANEL]
            assert len(np.unique(last.reshape(-1, 3), axis=0)) > 2
    assert before == ((out / "metrics.json").read_bytes(), (out / "checkpoint.pt").read_bytes())


def test_deep_images_are_shown_as_the_run_saw_them(tmp_path):
    """12 bits in 16: scaled by the largest of the class's training images, not each by its own."""
    path = tmp_path / "0.png"
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(path)
    args = SimpleNamespace(image_size=8, mask_rule="half")
    sample = data.Sample(path, None, 0, "a", "", "")
    chosen = figures.Chosen(figures.Found(args, None, None, {"a": 4095}), [sample])
    assert (chosen.batch == round(1000 / 4095 * 255)).all()


def test_attention_is_that_of_the_layer():
    """With one head, the weights times the values, projected, are what the layer gives; mask included."""
    torch.manual_seed(0)
    layer = onenip.Attention(onenip.Args(hidden=16, heads=1, dropout=0.0)).eval()
    x, p = torch.randn(2, 2, 9, 16)
    q, k, v = layer.to_q(x), layer.to_k(p), layer.to_v(p)
    weights = figures.attention_weights(q, k, 1, figures.neighbours(3, 3, 0))
    torch.testing.assert_close(layer.to_out(weights @ v), layer(x, p, p, (3, 3, 0)))


def test_hero(finished, capsys, tmp_path):
    """Four methods and the truth, a column for each class; what is missed is said."""
    folders = [str(finished(method)) for method in WORDS]
    assert figures.main(["hero", *folders, "--out", str(tmp_path / "hero.png")]) == 0
    assert "not at the defect (red frame): " in capsys.readouterr().out
    width, height = Image.open(tmp_path / "hero.png").size
    assert width > 2 * figures.PANEL and height > 6 * figures.PANEL


def test_hero_is_not_chosen_by_hand():
    """Of each class the median by the mean rank over the methods; good images never."""
    paths = np.array([f"{i}.png" for i in range(6)])
    labels = np.array([0, 1, 1, 1, 1, 1])
    one = {"paths": paths, "labels": labels, "scores": np.array([99, 1, 2, 3, 4, 5])}
    other = {"paths": paths[::-1], "labels": labels[::-1], "scores": np.array([50, 10, 40, 30, 20, 99])}
    # ranks of images 1 to 5: 0, 1, 2, 3, 4 and 1, 2, 3, 0, 4; sums 1, 3, 5, 3, 8
    assert figures.median_defect([one]) == "3.png"
    assert figures.median_defect([one, other]) == "4.png"


def test_bad_input(finished, tmp_path, capsys):
    out = str(finished("cada"))
    nearest = tmp_path / "nearest"
    nearest.mkdir()
    torch.save({"method": "nearest", "args": {}, "model": {}, "finished": ["model"]}, nearest / "checkpoint.pt")
    cases = [
        ([str(tmp_path)], "no such checkpoint"),
        ([out, "--classes", "moon"], "--classes moon"),
        (["hero", str(tmp_path)], "no finished run"),
        (["hero"], "folders of finished runs"),
        (["hero", out, "--out", str(tmp_path / "no" / "h.png")], "there is no folder"),
        (["hero", out, "--out", str(tmp_path / "h.xyz")], "h.xyz"),
        (["hero", out, "--out", str(tmp_path / "h.jpg")], "h.jpg"),
        (["hero", out, "--out", str(tmp_path / ("h" * 300 + ".png"))], "too long"),
        ([str(nearest)], "no pictures for nearest"),
    ]
    for words, named in cases:
        assert figures.main(words) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


@pytest.mark.parametrize("name, content", [
    ("metrics.json", "[]"), ("metrics.json", "{}"), ("metrics.json", "{"), ("scores.csv", ""), ("scores.csv", None),
    ("scores.csv", "path,class,label,score\na,b,1,nan\n"), ("maps/screw.npz", "cut"), ("maps/screw.npz", "")])
def test_damaged_files_of_a_run_are_named(name, content, finished, tmp_path, capsys):
    """One line, status 2, no picture."""
    folder = shutil.copytree(finished("omniad"), tmp_path / "run", ignore=shutil.ignore_patterns("figures"))
    if content is None:
        (folder / name).unlink()
    elif content == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    else:
        (folder / name).write_text(content)
    words = [str(folder)] if name == "scores.csv" else ["hero", str(folder), "--out", str(tmp_path / "hero.png")]
    capsys.readouterr()
    assert figures.main(words) == 2
    error = capsys.readouterr().err
    assert str(folder / name) in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.png")) or not (tmp_path / "hero.png").exists()


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves the picture of before, and nothing beside it."""
    path = tmp_path / "hero.png"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        figures.save(Image.new("RGB", (8, 8)), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", ["omniad.py", "roads.py"])
def test_training(script, tiny_data, tmp_path, capsys):
    """A picture of each checkpoint and a strip; the last checkpoint is the run's; the maps change."""
    run, frames = tmp_path / "run", tmp_path / "run-frames"
    own = "--data", tiny_data, "--classes", "screw,terrazzo", "--image-size", 64
    own += "--depths", "1,1,1,1", "--steps", 40
    words = ["training", run, "--script", script, "--every", 10, "--", *own]
    assert figures.main([str(word) for word in words]) == 0
    steps = sorted(int(path.stem) for path in frames.glob("*.pt") if path.stem.isdigit())
    assert steps[-1] == 40 and set(steps) <= {10, 20, 30, 40} and len(steps) > 1
    assert (frames / "40.pt").read_bytes() == (run / "checkpoint.pt").read_bytes()
    pictures = [f"{n:03d}.png" for n in range(1, len(steps) + 1)]
    printed = [line.split("/")[-1] for line in capsys.readouterr().out.split()]
    assert printed == [*pictures, "strip.png"]
    strip = np.asarray(Image.open(frames / "strip.png").convert("RGB"))
    assert strip.shape[1] > (2 + len(steps)) * figures.PANEL
    of_two = [Image.open(frames / name).convert("RGB") for name in (pictures[0], pictures[-1])]
    first, last = (np.asarray(picture)[-figures.PANEL :, -figures.PANEL :] for picture in of_two)
    assert (first != last).any()  # the map of the last image


def test_training_refuses(tmp_path, capfd):
    """Scripts that evaluate no unfinished checkpoint, before anything is trained; a failed script."""
    run = str(tmp_path / "run")
    cases = [
        (["training", run, "--script", "onenip.py"], "--script onenip.py"),
        (["training"], "training: give one folder"),
        (["training", run, "--", "--image-size", "1"], "no training, so no pictures"),
    ]
    for words, named in cases:
        assert figures.main(words) == 2
        assert named in capfd.readouterr().err.splitlines()[-1]
    assert not Path(run).exists()


def test_what_is_a_miss():
    """The highest pixel in the defect or close to it is a hit; elsewhere the panel gets a red frame."""
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 10:13, 10:13] = True
    for place, right in (((11, 11), True), ((14, 11), True), ((16, 11), False)):
        maps = np.zeros((1, 40, 40))
        maps[0][place] = 1.0
        array, hit = figures.map_of({"paths": np.array(["a"]), "maps": maps, "masks": mask}, "a")
        assert hit is right
        assert (array[0, 0].tolist() == [255, 40, 40]) is not right
