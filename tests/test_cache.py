"""Features kept on disk: a second run starts at once with the very same bits, and nothing that decides them can change
unseen; nothing that happens to the files can stop or spoil a run."""

import multiprocessing
import os
import shutil
import sys

import pytest
import torch

from common import cache, data, runtime


BATCH = runtime.frozen_batch(torch.device("cpu"))


class Network(torch.nn.Module):
    """A frozen network that counts the images it has seen."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.seen = 0

    @torch.no_grad()
    def forward(self, images):
        self.seen += len(images)
        return images.float().flatten(1)[:, ::7] * self.weight

    def split(self, rows):
        return rows


@pytest.fixture
def home(tiny_data, tmp_path):
    """A data set of its own, 48 training images that were not written just now."""
    home = tmp_path / "data"
    shutil.copytree(tiny_data, home, ignore=shutil.ignore_patterns(cache.NAME))
    for path in home.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return home


def frozen(home, network=None, keep=True, **changes):
    """(`runtime.Frozen` of a new run on the data, number of images that the network saw)."""
    network = network or Network()
    samples = data.load(str(home)).train
    images = data.Images(samples, changes.pop("size", 32), progress=False, **changes)
    images.preload()
    run = runtime.Run("method", None, torch.device("cpu"), disk=cache.Folder(home) if keep else None)
    args = runtime.Options()
    return runtime.Frozen(run, network, images, args), network.seen


def entries(home):
    return sorted((home / cache.NAME).glob("*.rows"))


def test_a_second_run_computes_one_batch_and_has_the_same_bits(home):
    """That batch is what the file is held to."""
    expected, seen = frozen(home, keep=False)
    assert seen == 48 and not entries(home)
    for seen_by_run in 48, BATCH:
        found, seen = frozen(home)
        assert seen == seen_by_run and torch.equal(found.rows, expected.rows)
    assert len(entries(home)) == 1 and list((home / cache.NAME).iterdir()) == entries(home)


def test_what_decides_the_bits_is_part_of_the_key(home, monkeypatch):
    """A changed file, another file in the same place, size, weights, scale of deep images, number of threads, or code
    of the network: computed anew."""
    frozen(home)

    def is_computed(*args, **changes):
        before = len(entries(home))
        _, seen = frozen(home, *args, **changes)
        return seen == 48 and len(entries(home)) == before + 1

    assert not is_computed()
    assert is_computed(size=24)
    assert is_computed(Network(0.25))
    assert is_computed(depths={"screw": 4095})
    path = next(home.rglob("screw/train/good/*.png"))
    os.utime(path, (2e9 - 1e9, 1e9 + 1))
    assert is_computed()
    path.write_bytes(next(home.rglob("hex_nut/train/good/*.png")).read_bytes())
    os.utime(path, (1e9, 1e9 + 1))
    assert is_computed()
    first, second = sorted(home.rglob("screw/train/good/*.png"))[:2]  # swap them; they have one time
    size = max(path.stat().st_size for path in (first, second))
    for path in (first, second):
        path.write_bytes(path.read_bytes().ljust(size, b" "))  # and one size
        os.utime(path, (1e9, 1e9))
    assert is_computed()
    first.rename(home / "other")
    second.rename(first)
    (home / "other").rename(second)
    assert is_computed()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        assert is_computed()

    class Other(Network):
        pass

    assert is_computed(Other())
    assert not is_computed()


def test_a_file_written_just_now_is_not_trusted(home):
    """It may change again without a new time, so nothing is kept."""
    os.utime(next(home.rglob("screw/train/good/*.png")))
    assert frozen(home)[1] == 48 and not entries(home)


@pytest.mark.parametrize("damage, said", [
    (lambda content: content[:-40] + b"x" * 40, "is damaged"),
    (lambda content: content[:-1], "has not the length"),
    (lambda content: content + b"x", "has not the length"),
    (lambda content: b"", "no file of ours"),
    (lambda content: b"\xff\xfe" * 9000, "no file of ours"),
    (lambda content: content.replace(b'"shape": [48', b'"shape": [49'), "another form")])
def test_a_damaged_file_is_computed_anew(damage, said, home, capsys):
    """One line says so; the next run finds it whole again."""
    expected, _ = frozen(home)
    path, = entries(home)
    path.write_bytes(damage(path.read_bytes()))
    found, seen = frozen(home)
    assert seen == 48 and torch.equal(found.rows, expected.rows)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and said in err
    assert frozen(home)[1] == BATCH and capsys.readouterr().err == ""


def test_whole_files_with_other_numbers_are_refused(home, capsys):
    """Such as of a processor that rounds otherwise, which the key cannot know: the first batch tells."""
    found, _ = frozen(home)
    path, = entries(home)
    rows = found.rows.clone()
    rows[3, 5] += 1e-3
    cache.Entry(cache.Folder(home), "frozen features", path.stem).write(rows)
    again, seen = frozen(home)
    assert seen == 48 and torch.equal(again.rows, found.rows)
    assert "another machine or version; the frozen features are computed anew" in capsys.readouterr().err


@pytest.mark.parametrize("obstacle", ["no folder", "full disk"])
def test_where_nothing_can_be_written_nothing_is_said(obstacle, home, monkeypatch, capsys):
    """The run goes on, and leaves no rubbish."""
    if obstacle == "no folder":
        (home / cache.NAME).write_text("in the way")
    else:
        monkeypatch.setattr(cache.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
    for _ in range(2):
        assert frozen(home)[1] == 48
    assert capsys.readouterr().err == ""
    assert obstacle == "no folder" or not list((home / cache.NAME).iterdir())


def test_the_limit_is_kept_and_the_oldest_go_first(home, monkeypatch):
    """What was used lately stays; other people's files are neither counted nor deleted; what alone is too large is not
    kept; nor is anything on a disk with too little space."""
    frozen(home, Network(1.0))
    first, = entries(home)
    frozen(home, Network(2.0))
    second, = set(entries(home)) - {first}
    os.utime(first, (1e9, 1e9))
    os.utime(second, (1e9, 1e9 + 5))
    foreign = home / cache.NAME / "photo.rows"
    foreign.write_bytes(b"somebody's" * 1000)
    os.utime(foreign, (1e8, 1e8))
    frozen(home, Network(1.0))  # used again
    size = first.stat().st_size
    monkeypatch.setattr(cache, "LIMIT", 2.5 * size)
    frozen(home, Network(3.0))
    left = set(entries(home))
    assert first in left and second not in left and foreign in left and len(left) == 3
    monkeypatch.setattr(cache, "LIMIT", 0.5 * size)
    frozen(home, Network(4.0))
    assert set(entries(home)) == left
    monkeypatch.setattr(cache, "LIMIT", 10 * size)
    usage = shutil.disk_usage(home)._replace(free=6 * size)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    frozen(home, Network(5.0))
    assert set(entries(home)) == left, "a tenth of 6 + 2 sizes is less than one"


def _in_process(home, barrier, results):
    barrier.wait()
    found, _ = frozen(home)
    results.put(found.rows.double().sum().item())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_runs_at_once(home):
    """Both have the right features, and one whole file is left."""
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=_in_process, args=(home, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    found, seen = frozen(home)
    assert seen == BATCH and sums == [found.rows.double().sum().item()] * 2
    assert list((home / cache.NAME).iterdir()) == entries(home)


def test_what_killed_runs_left_is_swept_but_not_what_is_being_written(home):
    """Half-written files an hour old are nobody's; a younger one is another process's at this moment."""
    frozen(home)
    old, fresh = (home / cache.NAME / name for name in (".a.1.tmp", ".b.2.tmp"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    frozen(home, Network(0.25))
    assert not old.exists() and fresh.exists()
