"""What users meet beside the method: two runs in one folder, odd data, a data set without test images, files that are
bad or gone, loader processes that fail, busy machines, and a run that ends early. Each says what is wrong and what is
kept, and loses nothing."""

import csv
import dataclasses
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import contract
from common import UsageError, data, folder, options, runtime, thresholds
from common.options import option
from conftest import ROOT


@dataclasses.dataclass
class Args(options.Options):
    image_size: int = option(16, "size", group="data", low=1)
    batch_size: int = option(2, "images a step", group="training", low=1)
    weights: str = option("", "file of weights", group="model")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Facts about files are remembered elsewhere; no folder stays claimed, Ctrl-C works as before."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["method.py"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    folder.release()
    signal.signal(signal.SIGINT, handler)


def parse(*words):
    presets = {"paper": {}, "laptop": {}}
    return options.parse(Args, presets, "One line.", [str(word) for word in words], method="method")


def opened(out, *words):
    """(run, args) of a run that has taken its folder."""
    args = parse("--out", out, *words)
    run = runtime.start(args, "method")
    run.open(args)
    return run, args


# ---------------------------------------------------------------------------- a run owns its folder

CLAIM = """
import sys, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from common import UsageError, folder
args = types.SimpleNamespace(resume=False, overwrite=False)
print("ready", flush=True)
sys.stdin.readline()
try:
    folder.take(Path(sys.argv[2]), args)
    (Path(sys.argv[2]) / "args.json").write_text("{}")
    print("mine", flush=True)
    sys.stdin.read()
except UsageError as error:
    print(error)
"""


def claim(out):
    """A process that asks for the folder when it gets a line."""
    words = [sys.executable, "-c", CLAIM, str(ROOT), str(out)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_of_runs_that_start_at_once_one_gets_the_folder(tmp_path):
    """Six processes ask at the same moment; the others say who has it, and what to do."""
    processes = [claim(tmp_path / "run") for _ in range(6)]
    for process in processes:
        go(process)
    answers = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate()
    assert answers.count("mine\n") == 1
    others = [answer for answer in answers if answer != "mine\n"]
    assert all("another run is writing there" in answer and "--out" in answer for answer in others)


def test_a_killed_run_holds_its_folder_no_longer(tmp_path):
    """Not even --overwrite or --resume may disturb a running one; after SIGKILL its folder can be had."""
    process = claim(tmp_path / "run")
    go(process)
    assert process.stdout.readline() == "mine\n"
    for words in ((), ("--overwrite",), ("--resume",)):
        with pytest.raises(UsageError, match="another run is writing there at this moment"):
            runtime.start(parse("--out", tmp_path / "run", *words), "method")
    process.kill()
    process.communicate()
    opened(tmp_path / "run")


@pytest.mark.parametrize("result", folder.RESULTS)
def test_a_finished_run_is_told_by_what_it_leaves(result, tmp_path):
    """A table, a threshold, or predictions: each is written last, so a run with it is finished, one without is not."""
    out = tmp_path / "run"
    opened(out)
    (out / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="an interrupted run .--resume goes on"):
        runtime.start(parse("--out", out), "method")
    (out / result).write_text("")
    with pytest.raises(UsageError, match="a finished run; --overwrite replaces it"):
        runtime.start(parse("--out", out), "method")
    assert (out / result).is_file() and (out / "checkpoint.pt").is_file()


def test_a_corrected_command_needs_no_overwrite(tmp_path):
    """What a wrong one left (options, a few lines of the log, half of the predictions) is not worth keeping."""
    out = tmp_path / "run"
    run, _ = opened(out)
    run.log({"step": 1})
    (out / "predictions.part.csv").write_text("")
    (out / ".checkpoint.pt.1.tmp").write_text("")
    opened(out, "--seed", 3)
    assert json.loads((out / "args.json").read_text())["seed"] == 3
    assert sorted(path.name for path in out.iterdir()) == [".lock", "args.json"]


def test_overwrite_empties_the_folder_of_the_old_run_and_of_nothing_else(tmp_path):
    """Pictures, maps and masks of classes that the new run does not have; not what lies behind a link, nor notes."""
    out, mine = tmp_path / "run", tmp_path / "mine"
    opened(out)
    for name in ("metrics.json", "notes.txt", "pictures/bolt.png", "maps/train/bolt.npz", "other/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    mine.mkdir()
    (mine / "photo.png").write_text("")
    (out / "masks").symlink_to(mine, target_is_directory=True)
    opened(out, "--overwrite")
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir())
    assert left == [".lock", "args.json", "notes.txt", os.path.join("other", "x")]
    assert (mine / "photo.png").is_file()


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", ["pictures", "metrics.json", "checkpoint.pt"])
def test_a_folder_that_is_no_runs_is_left_alone(name, words, tmp_path):
    """Somebody's own pictures, or a downloaded checkpoint: neither replaced nor mixed with ours."""
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"there is {name} in it, but no run"):
        runtime.start(parse("--out", tmp_path, *words), "method")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        runtime.start(parse("--out", tmp_path / "file"), "method")


@pytest.mark.parametrize("name", ["eval", "predict", "weights", "data"])
def test_overwrite_does_not_delete_what_the_run_needs(name, tmp_path):
    out = tmp_path / "run"
    opened(out)
    path = out / "checkpoint.pt"
    path.write_text("")
    args = parse("--out", out, "--overwrite")
    setattr(args, name, [str(path)] if name == "predict" else str(path))
    with pytest.raises(UsageError, match=f"--{name} .*checkpoint.pt lies in --out"):
        runtime.start(args, "method")
    assert path.is_file()


# ------------------------------------------------------------------------- data, before the training


def good_only(home, counts):
    """A folder CLASS/good/*.png of that many noisy pictures a class."""
    rng = np.random.default_rng(0)
    for cls, count in counts.items():
        (home / cls / "good").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / cls / "good" / f"{i}.png")
    return home


def training_data(*words):
    args = parse("--out", "unused", *words)
    run = runtime.Run("method", Path("unused"), torch.device("cpu"))
    return run, args, *runtime.training_data(run, args)


def test_problems_are_said_once_a_kind_and_kept(tiny_data, tmp_path, capsys):
    """Sixteen defects lose their masks, and four images have no label: two lines on stderr, in the data set's list, and
    so in metrics.json; how the folder was read is on stdout."""
    home = tmp_path / "home"
    for cls in ("screw", "hex_nut"):
        shutil.copytree(tiny_data / cls, home / cls)
        shutil.rmtree(home / cls / "ground_truth")
        for i in (1, 2):
            shutil.copy(next((home / cls / "train" / "good").iterdir()), home / cls / "test" / f"{i}.png")
    _, _, dataset, _ = training_data("--data", home)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines == [f"problem: {line}" for line in dataset.problems] and len(lines) == 2
    assert ": 8 (" in err and ": 4 (" in err and "without a mask" in err
    assert str(home) in out and out.count("\n") == 1


@pytest.mark.parametrize("place, content, said", [
    ("test/good/000.png", b"", "zero bytes"), ("train/good/001.png", b"", "zero bytes"),
    ("test/good/001.png", b"rubbish", "no image"), ("train/good/002.png", "cut", "truncated"),
    ("ground_truth", "size", "must have the same size")])
def test_bad_files_are_found_before_the_training(place, content, said, tiny_data, tmp_path):
    """Of training and test images, and masks; the message names the file."""
    home = tmp_path / "home" / "screw"
    shutil.copytree(tiny_data / "screw", home)
    path = home / place
    if content == "size":
        path = next(path.rglob("*.png"))
        Image.new("L", (8, 8), 255).save(path)
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as error:
        training_data("--data", tmp_path / "home")
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_without_test_images_some_good_ones_are_held_out(tmp_path):
    """A share of each class, never trained on, the same for the same seed; a class of one image keeps it."""
    home = good_only(tmp_path / "home", {"a": 20, "b": 3, "c": 1})
    run, _, dataset, images = training_data("--data", home)
    held = [(sample.cls, sample.image.name) for sample in run.held_out]
    trained = [(sample.cls, sample.image.name) for sample in images.samples]
    assert [cls for cls, _ in held] == ["a", "a", "b"] and len(trained) == 21 and not set(held) & set(trained)
    assert dataset.train == images.samples and dataset.test == []
    again = training_data("--data", home)[0]
    assert again.held_out == run.held_out
    assert training_data("--data", home, "--seed", 1)[0].held_out != run.held_out
    assert training_data("--data", home, "--holdout", 0)[0].held_out == []
    assert len(training_data("--data", home, "--holdout", 0.5)[0].held_out) == 12


@pytest.mark.parametrize("words, said", [
    (("--shift", "all"), "--shift needs test images"), (("--corrupt", "contrast"), "--corrupt needs"),
    (("--save-maps",), "--save-maps needs")])
def test_options_that_need_test_images(words, said, tmp_path):
    home = good_only(tmp_path / "home", {"a": 2})
    with pytest.raises(UsageError, match=said):
        training_data("--data", home, *words)


@pytest.mark.parametrize("script, words", [
    ("roads", ("--class-at-test", "given")), ("cada", ("--calibrate", "given")), ("cada", ("--contaminate", 0.2)),
    ("cada", ("--fix-threshold", 0.2)), ("onenip", ("--eval-every", 1)), ("onenip", ("--prompt-class", "given"))])
def test_options_of_one_script_that_need_test_images(script, words, tmp_path, command):
    """The threshold is found as --predict scores, which knows no class: refused before, not after the training."""
    home = good_only(tmp_path / "home", {"a": 2, "b": 2})
    done = command(script, "--data", home, *words, "--out", tmp_path / "out")
    assert done.status == 2 and f"{words[0]}" in done.err and "needs test images" in done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, small", [
    ("onenip", "--hidden 32 --heads 2 --mlp 32 --bank 0"), ("omniad", "--depths 1,1,1,1 --tokens 4"),
    ("cada", "--base uniad --hidden 16 --heads 2 --mlp 32 --layers 1 --calibrate none")])
def test_clip_0_is_no_limit(script, small, tmp_path, command):
    """And not a gradient of zero."""
    home = good_only(tmp_path / "home", {"a": 3})
    words = ("--data", home, "--image-size", 64, "--batch-size", 2, "--steps", 2, *small.split())
    weights = []
    for clip in (0, 1e30):
        assert command(script, *words, "--clip", clip, "--out", tmp_path / str(clip)).status == 0
        weights.append(torch.load(tmp_path / str(clip) / "checkpoint.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_some_classes_with_and_some_without_test_images(tiny_data, tmp_path):
    """Neither a table that silently lacks a class nor one threshold beside metrics; an evaluation needs test images."""
    shutil.copytree(tiny_data / "screw", tmp_path / "home" / "screw")
    shutil.copytree(tiny_data / "screw" / "train", tmp_path / "home" / "bolt" / "train")
    with pytest.raises(UsageError, match="class 'bolt' has no test images, while others have"):
        training_data("--data", tmp_path / "home")
    args = parse("--data", good_only(tmp_path / "good", {"a": 2}))
    args.eval = "c.pt"
    with pytest.raises(UsageError, match="has no test images"):
        runtime.training_data(runtime.Run("method", None, torch.device("cpu")), args)


def test_a_threshold_that_cannot_be_written_is_no_result(tmp_path, monkeypatch):
    """A disk that is full by then ends the run, before threshold.json says that all is there."""
    args = parse("--data", good_only(tmp_path / "home", {"a": 3}), "--out", tmp_path / "run")
    run = runtime.start(args, "method")
    dataset, _ = runtime.training_data(run, args)
    run.open(args)
    state = {"method": "method", "args": {}, "model": {}, "finished": ["model"], "normal_score": -1.0, "seconds": 2.0}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runtime, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        thresholds.without_test_images(run, args, dataset, lambda batch, _: (batch[:, 0], batch[:, 0, 0, 0]), state)
    assert not folder.is_finished(tmp_path / "run")


def test_no_class_at_all_is_refused(tiny_data):
    """As from two empty variables of a shell."""
    with pytest.raises(UsageError, match="--classes ,: names no class; known: "):
        data.load(str(tiny_data), classes=",")


def test_an_interrupted_evaluation_is_not_to_be_resumed(tmp_path):
    """It leaves a checkpoint where it fits a calibration anew; what is said of it must work."""
    (tmp_path / "args.json").write_text(json.dumps({"eval": "c.pt"}))
    (tmp_path / "checkpoint.pt").write_text("")
    folder.take(tmp_path, parse("--out", tmp_path))
    assert "--resume" not in folder.kept()
    folder.release()


def test_a_folder_of_good_images_is_trained_and_gets_its_threshold(tmp_path, capsys):
    """The 99 % quantile of the scores of the images held out, as numpy computes it; in the checkpoint, in
    threshold.json and scores.csv; the classes are not told to the scorer, as in --predict."""
    home = good_only(tmp_path / "home", {"a": 30, "b": 10})
    args = parse("--data", home, "--out", tmp_path / "run")
    run = runtime.start(args, "method")
    dataset, images = runtime.training_data(run, args)
    run.open(args)
    state = {"method": "method", "args": {}, "model": {}, "finished": ["model"], "normal_score": -1.0, "seconds": 2.0}

    def score(batch, samples):
        assert {sample.cls for sample in samples} == {""}
        maps = batch.float().mean(1)  # (B, S, S)
        return maps, maps.mean((1, 2))

    assert thresholds.without_test_images(run, args, dataset, score, state) is None
    pixels = torch.stack([torch.from_numpy(data.resize_image(data.read_image(sample.image), 16).copy())
                          for sample in run.held_out]).double().mean(3)  # (4, 16, 16)
    kept = runtime.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "method")
    found = json.loads((tmp_path / "run" / "threshold.json").read_text())
    assert len(pixels) == 4 and found["held out"] == 4
    for value in (kept["normal_score"], found["threshold"]):
        assert value == pytest.approx(np.quantile(pixels.mean((1, 2)).numpy(), 0.99), rel=1e-6)
    for value in (kept["pixel_threshold"], found["pixel threshold"]):
        assert value == pytest.approx(np.quantile(pixels.amax((1, 2)).numpy(), 0.99), rel=1e-6)
    rows = list(csv.DictReader(open(tmp_path / "run" / "scores.csv")))
    assert [(row["class"], row["path"]) for row in rows] == [(s.cls, str(s.image)) for s in run.held_out]
    out = capsys.readouterr().out
    assert "no metrics" in out and "(4, --holdout 0.1)" in out and "--predict" in out.splitlines()[-1]
    assert folder.is_finished(tmp_path / "run")


def test_grey_values_are_scaled_as_in_the_training(tmp_path):
    """Images of 12 bits in 16: the rule goes into every checkpoint, and is taken from it, not found anew, at --eval."""
    (tmp_path / "home" / "a" / "good").mkdir(parents=True)
    for i in range(3):
        values = np.full((8, 8), 4000 + i, np.uint16)
        Image.fromarray(values).save(tmp_path / "home" / "a" / "good" / f"{i}.png")
    run, args, _, images = training_data("--data", tmp_path / "home")
    assert run.depths == {"a": 4095} and images[0].min() == 250
    args.schedule = "step"
    state = runtime.Training(run, args, torch.nn.Linear(1, 1), None).state(finished=["model"])
    torch.save(state, tmp_path / "c.pt")
    args.eval = str(tmp_path / "c.pt")
    again = runtime.Run("method", None, torch.device("cpu"))
    again.checkpoint_to_evaluate(args)
    assert again.depths == {"a": 4095}


# ------------------------------------------------------------------------------- loader processes


class Numbers(torch.utils.data.Dataset):
    """Image i is full of i; some kinds of trouble in the processes, from image `start` on."""

    def __init__(self, trouble="", pixels=4, start=0):
        self.trouble, self.pixels, self.start = trouble, pixels, start

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if self.trouble == "killed" and i >= self.start:
            time.sleep(0.5)  # what was read before is under way, in a thread of this process
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hangs" and i >= self.start:
            time.sleep(30)
        if self.trouble == "slow":
            time.sleep(0.7)
        if self.trouble == "missing":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.png")
        return {"image": torch.full((3, self.pixels, self.pixels), i, dtype=torch.uint8), "index": i}


def batches_of(trouble="", pixels=4):
    run = runtime.Run("method", None, torch.device("cpu"))
    return list(run.loader(Numbers(trouble, pixels), [[0, 1], [2, 3], [4, 5]], 2))


@pytest.mark.parametrize("free, shared", [(0, False), (2**40, True)])
def test_scarce_shared_memory_is_not_used(free, shared, monkeypatch):
    """A full /dev/shm would let the run wait for ever; the batches then come through the pipe, the same."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm here")
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    batches = batches_of()
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert all((batch["image"] == batch["index"][:, None, None, None]).all() for batch in batches)
    assert [batch["image"].is_shared() for batch in batches] == [shared] * 3
    batches[0]["image"][:] = 7  # nobody else's, and writable


def test_a_full_dev_shm(tmp_path):
    """The real thing: /dev/shm of 64 KB, batches of 400 KB, two processes."""
    text = """
import sys
sys.path[:0] = sys.argv[1:]
import torch, test_faults
batches = test_faults.batches_of(pixels=300)
assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
print("read")
"""
    python = [sys.executable, "-c", text, str(ROOT), str(ROOT / "tests")]
    small = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "-"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount /dev/shm anew")
    done = subprocess.run([*small, *python], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("read\n", "")


def test_processes_that_die_or_hang_end_in_one_line(monkeypatch):
    """Killed for memory, or waiting for a network disk: never a hang, never a traceback."""
    monkeypatch.setattr(runtime, "LOADER_CHECK", 1)
    with pytest.raises(UsageError, match="--workers 2: DataLoader worker .*use fewer, or --workers 0"):
        batches_of("killed")
    monkeypatch.setattr(runtime, "LOADER_SECONDS", 2)
    with pytest.raises(UsageError, match="--workers 2: DataLoader timed out after . seconds"):
        batches_of("hangs")


def test_a_process_that_dies_interrupts_no_step(monkeypatch):
    """PyTorch's own report of a death is an exception wherever the run is by then. What was read before counts."""
    monkeypatch.setattr(runtime, "LOADER_CHECK", 1)
    run, steps = runtime.Run("method", None, torch.device("cpu")), []
    with pytest.raises(UsageError, match="--workers 1: DataLoader worker"):
        for batch in run.loader(Numbers("killed", start=2), [[0, 1], [2, 3], [4, 5]], 1):
            time.sleep(2)  # the step, in which the process dies
            steps.append(batch["index"].tolist())
    assert steps == [[0, 1]]


def test_a_slow_process_is_waited_for(monkeypatch):
    """Longer than the interval at which its life is asked for: no batch is lost, none comes twice."""
    monkeypatch.setattr(runtime, "LOADER_CHECK", 0.5)
    assert [batch["index"].tolist() for batch in batches_of("slow")] == [[0, 1], [2, 3], [4, 5]]


def test_a_file_name_of_two_lines_is_told_in_one():
    """With its folder, also where the error comes from a loader process, as the text of its traceback."""
    told = "cannot read the image good/a\nb.png: the file is empty"
    from_process = f"Caught UsageError in DataLoader worker process 0.\nTraceback:\ncommon.UsageError: {told}\n"
    for text in told, from_process:
        assert runtime._message_of(UsageError(text)) == told.replace("\n", "\\n")


def test_other_errors_of_a_process_keep_their_kind(monkeypatch):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        batches_of("missing")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "_get_iterator", full)
    with pytest.raises(UsageError, match="No space left on device; is /dev/shm full"):
        batches_of()


# ---------------------------------------------------------------------------------------- threads


def test_number_of_threads_is_measured_and_said(monkeypatch, capsys):
    """All threads unless fewer are clearly faster: then the most of those that are as fast, with a line."""
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for seconds, chosen in (({8: 1, 4: 2, 2: 4, 1: 8}, 8), ({8: 1.2, 4: 1, 2: 1, 1: 1}, 8),
                            ({8: 9, 4: 3, 2: 1.1, 1: 1}, 2), ({8: 9, 4: 8, 2: 7, 1: 1}, 1)):
        monkeypatch.setattr(runtime, "_seconds_of_convolution", lambda _, times=seconds: times[set_to[-1]])
        assert runtime._measured_threads(8) == chosen
        err = capsys.readouterr().err
        assert (err == "") if chosen == 8 else (f"{chosen} of 8 threads" in err and "--threads" in err)


@pytest.mark.parametrize("threads, environment, expected", [("3", "1", 3), ("auto", "2", None), ("auto", None, 5)])
def test_threads_follow_option_environment_and_clock(threads, environment, expected, monkeypatch, tmp_path):
    """The number is the run's: in args.json (a resumed run has the same) and in metrics.json."""
    before = torch.get_num_threads()
    monkeypatch.setattr(runtime, "_measured_threads", lambda limit: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    try:
        _, args = opened(tmp_path / "run", "--threads", threads, "--device", "cpu")
        expected = expected or before
        assert torch.get_num_threads() == expected == runtime.environment()["threads"]
        assert args.threads == str(expected) == json.loads((tmp_path / "run" / "args.json").read_text())["threads"]
        assert parse("--out", tmp_path / "run", "--resume").threads == str(expected)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------- the ends


def ends(main, capsys):
    """(exit status, stderr) of a program that launch ends."""
    with pytest.raises(SystemExit) as end:
        runtime.launch(main)
    return end.value.code, capsys.readouterr().err


KEPT = {
    "": "nothing is kept of it; the same command starts anew",
    "checkpoint.pt": "the training is kept in .*checkpoint.pt: --resume",
    "predictions.part.csv": "the scores so far are in",
    "metrics.json": "the results in .* are complete",
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("error, said, status", [
    (KeyboardInterrupt(), "interrupted", 130), (UsageError("a.png: gone"), "a.png: gone", 2),
    (OSError(errno.ENOSPC, "No space left on device", "x.pt"), "x.pt: No space left on device", 2),
    (OSError(errno.EFBIG, "File too large", "x.pt"), "x.pt: File too large", 2),
    (MemoryError(), "out of memory: lower --batch-size", 2),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory", 2)])
def test_who_ends_early_says_what_is_kept(error, said, status, name, tmp_path, capsys):
    """One line, true in every state of the folder; before the folder was taken, nothing is said of it."""
    def main(out):
        if out:
            opened(out)
        if out and name:
            (out / name).write_text("")
        raise error

    found, err = ends(lambda: main(tmp_path / "run"), capsys)
    assert (found, err.count("\n")) == (status, 1) and err.startswith(f"method.py: {said}")
    assert re.search(KEPT[name], err)
    found, err = ends(lambda: main(None), capsys)
    assert found == status and "; the" not in err and "nothing" not in err


def test_a_fault_of_ours_keeps_its_traceback_and_says_what_is_kept(tmp_path, capsys):
    def main():
        opened(tmp_path / "run")
        (tmp_path / "run" / "checkpoint.pt").write_text("")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        runtime.launch(main)
    assert "--resume" in capsys.readouterr().err
    opened(tmp_path / "other")
    answer, _ = claim(tmp_path / "run").communicate("go\n")
    assert "another run is writing there" not in answer, "the folder is free again"


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path):
    """`| head -1` closes the pipe in the middle of a training, which must not cost the training."""
    text = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from common import runtime
def main():
    run = runtime.Run("m", None, torch.device("cpu"))
    for i in range(3):
        run.say("line" * 30000)
    open(sys.argv[2], "w").write("done")
runtime.launch(main)
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", text, ROOT, tmp_path / "x"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "x").read_text() == "done"


def heeds_ctrl_c():
    """In a new process, even if pytest runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_a_training_is_one_line_and_true(tiny_data, tmp_path):
    """The whole program: interrupted by the signal of the terminal, which loader processes get as well."""
    words = [sys.executable, ROOT / "omniad.py", "--data", tiny_data, "--classes", "screw", "--steps", "400",
             "--image-size", "64", "--depths", "1,1,1,1", "--batch-size", "2", "--memory-share", "0", "--workers", "1",
             "--checkpoint-every", "2", "--out", tmp_path / "run"]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=heeds_ctrl_c)
    while not (tmp_path / "run" / "checkpoint.pt").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    lines = err.splitlines()
    assert process.returncode == 130 and len(lines) == 1, err
    assert lines[0].startswith("omniad.py: interrupted; the training is kept in") and "--resume" in lines[0]
    state = runtime.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "omniad")
    assert state["step"] >= 2 and state["finished"] == []


SMALL = {
    "onenip": ("--steps", 2, "--image-size", 64, "--bank", 1),
    "omniad": ("--steps", 2, "--image-size", 64, "--depths", "1,1,1,1"),
    "roads": ("--steps", 2, "--image-size", 64),
    "cada": ("--steps", 2, "--image-size", 64, "--calibration-steps", 2),
}


@pytest.mark.parametrize("script", SMALL)
def test_good_images_only(script, tiny_data, tmp_path, command):
    """A folder of nothing but good pictures -> trained -> predicted, with each script."""
    contract.check_good_images_only(importlib.import_module(script), SMALL[script], tiny_data, tmp_path, command)


# ------------------------------------------------------------------------------ nothing is lost, nothing believed


@pytest.fixture(scope="module", params=SMALL)
def trained(request, tiny_data, tmp_path_factory):
    """(script, folder of its finished small run on a data set of its own, that data set)."""
    script, home = request.param, tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny_data / "screw", home / "data" / "screw")
    words = [sys.executable, ROOT / f"{script}.py", "--data", home / "data", *SMALL[script], "--checkpoint-every", 1]
    done = subprocess.run([str(word) for word in [*words, "--out", home / "run"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return script, home / "run", home / "data"


def content_of(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_command_that_cannot_be_deletes_no_results(trained, tmp_path, command):
    """--overwrite replaces what is there once it is known that something can come in its place."""
    script, run, home = trained
    checkpoint, out = run / "checkpoint.pt", tmp_path / "predictions"
    picture = next((home / "screw" / "test" / "good").iterdir())
    assert command(script, "--eval", checkpoint, "--predict", picture, "--out", out).status == 0
    before = content_of(out)
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:-1000])
    other = {"onenip": ("--hidden", 32), "omniad": ("--depths", "2,1,1,1"), "roads": ("--tokens", 3),
             "cada": ("--depths", "2,1,1,1")}[script]
    cases = [
        (checkpoint, (tmp_path / "nowhere.png",), "nowhere.png"), (checkpoint, (tmp_path / "empty",), "no images"),
        (checkpoint, (picture, *other), "does not fit"), (damaged, (picture,), "damaged"),
        (tmp_path / "none.pt", (picture,), "none.pt"),
        (checkpoint, (picture, "--image-size", 96), "--image-size" if script == "cada" else "leave"),
    ]
    for path, words, said in cases:
        done = command(script, "--eval", path, "--out", out, "--overwrite", "--predict", *words)
        assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err
        assert content_of(out) == before, words


def test_a_damaged_checkpoint_is_not_believed(trained, tmp_path, command):
    """A stretch of zeros in the midst of it, which torch.load reads without a word; a cut one; an empty one; text. What
    is said can be done."""
    script, run, _ = trained
    whole = (run / "checkpoint.pt").read_bytes()
    zeros = bytearray(whole)
    middle = len(zeros) // 2
    zeros[middle : middle + 4000] = bytes(4000)
    for i, content in enumerate((bytes(zeros), whole[:-5000], b"", b"text")):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(content)
        done = command(script, "--eval", path, "--out", tmp_path / f"eval{i}")
        assert done.status == 2 and f"{i}.pt" in done.err and "damaged" in done.err and done.err.count("\n") == 1
        out = shutil.copytree(run, tmp_path / f"run{i}")
        (out / "metrics.json").unlink()
        (out / "checkpoint.pt").write_bytes(content)
        done = command(script, "--resume", "--out", out)
        assert done.status == 2 and "--overwrite starts anew" in done.err and done.err.count("\n") == 1
        assert "goes on" not in done.err, "it does not"


def test_other_images_are_no_resumption(trained, tmp_path, command):
    """A training that saw other images is another one: it is not gone on with."""
    script, run, home = trained
    for change in ("removed", "changed"):
        out, data_home = shutil.copytree(run, tmp_path / change / "run"), shutil.copytree(home, tmp_path / change / "d")
        (out / "metrics.json").unlink()
        assert command(script, "--resume", "--out", out, "--data", data_home).status == 2, "the folder is another one"
        settings = json.loads((out / "args.json").read_text())
        (out / "args.json").write_text(json.dumps({**settings, "data": str(data_home)}))
        picture = next((data_home / "screw" / "train" / "good").iterdir())
        if change == "removed":
            picture.unlink()
        else:
            Image.new("RGB", (64, 64)).save(picture)
        done = command(script, "--resume", "--out", out)
        assert done.status == 2 and "training images" in done.err and done.err.count("\n") == 1, done.err


def test_an_interrupted_overwrite_can_be_done_again(tmp_path, monkeypatch):
    """Whatever is deleted first, the folder stays a run's until nothing of it is left."""
    opened(tmp_path / "run")
    for name in ("metrics.json", "pictures/bolt.png", "maps/bolt.npz"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    folder.release()

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder.shutil, "rmtree", interrupted)
        opened(tmp_path / "run", "--overwrite")
    folder.release()
    opened(tmp_path / "run", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "args.json"]


def test_folders_that_cannot_be_made(tmp_path):
    """A link to nothing, a link to itself, a place where nobody may write: one line that names --out."""
    (tmp_path / "nothing").symlink_to(tmp_path / "not" / "there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for out in ("nothing", "loop", "loop/run", "file/run"):
        with pytest.raises((UsageError, OSError)) as error:
            opened(tmp_path / out)
        message = runtime._message_of(error.value)
        assert message and out.split("/")[0] in message, out


def test_a_run_whose_folder_vanishes_ends_in_one_line(tmp_path, capsys):
    """`rm -rf` of the folder of a run: the line names the file that could not be written."""
    def main():
        run, _ = opened(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        run.log({"step": 1})

    status, err = ends(main, capsys)
    assert status == 2 and "log.jsonl: No such file or directory" in err and err.count("\n") == 1


def test_an_error_of_a_write_names_the_file(tmp_path):
    """And not the temporary one beside it."""
    with pytest.raises(OSError) as error:
        folder.write_atomic(tmp_path / "no" / "x.pt", b"")
    assert error.value.filename == str(tmp_path / "no" / "x.pt")


def test_two_writers_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """Not even with one process number, as in two containers: the file is one of the two contents, whole."""
    path, write = tmp_path / "x.pt", folder.os.replace

    def second_comes_first(source, target):
        monkeypatch.setattr(folder.os, "replace", write)
        folder.write_atomic(path, b"second")
        assert path.read_bytes() == b"second"
        write(source, target)

    monkeypatch.setattr(folder.os, "replace", second_comes_first)
    folder.write_atomic(path, b"first")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"3", b'"x"', b"\xff\xfe"])
def test_json_of_another_shape_is_a_line(content, tmp_path):
    """Files of ours that somebody else has written, or cut."""
    (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UsageError, match="args.json is damaged"):
        folder.read_json(tmp_path / "args.json")
    with pytest.raises(UsageError, match="args.json is damaged; --overwrite"):
        parse("--out", tmp_path, "--resume")
    (tmp_path / "args.json").write_text('{"seed": "x"}')
    assert folder.read_json(tmp_path / "args.json") == {"seed": "x"}
    with pytest.raises(UsageError, match="it has no data"):
        folder.read_json(tmp_path / "args.json", ("seed", "data"))
    with pytest.raises(UsageError, match="--seed 'x': must be a number"):
        parse("--out", tmp_path, "--resume")
    with pytest.raises(UsageError, match="No such file"):
        folder.read_json(tmp_path / "none.json")


def test_values_that_no_picture_can_have_are_found_before_the_training(tiny_data, tmp_path):
    """NaN, negative numbers, 32 bits: of a test image, which the training does not decode."""
    pictures = {"nan": np.full((64, 64), np.nan, np.float32), "negative": np.full((64, 64), -1, np.int32),
                "large": np.full((64, 64), 2**17, np.int32)}
    for name, pixels in pictures.items():
        home = tmp_path / name
        shutil.copytree(tiny_data / "screw", home / "screw")
        Image.fromarray(pixels).save(home / "screw" / "test" / "good" / f"{name}.tif")
        with pytest.raises(UsageError, match=f"{name}.tif"):
            training_data("--data", home)


def test_a_link_to_nothing_is_a_picture_that_is_missing(tiny_data, tmp_path):
    """As git-annex and DVC leave them: told, and not passed over."""
    home = shutil.copytree(tiny_data / "screw", tmp_path / "data" / "screw")
    (home / "train" / "good" / "dead.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="dead.png: No such file"):
        training_data("--data", tmp_path / "data")
    assert home / "train" / "good" / "dead.png" in data.image_files(home)


def test_pictures_of_runs_are_no_pictures_of_products(tmp_path):
    """--predict . with --out below it: what an earlier prediction has drawn is not predicted."""
    opened(tmp_path / "found")
    for name in ("a.png", "found/pictures/a.png", "found/masks/a.png", "found/mine/b.png", "other/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "other" / "args.json").write_text("{}")  # somebody else's
    assert [path.name for path in data.image_files(tmp_path)] == ["a.png", "c.png"]
    assert len(data.image_files(tmp_path / "found")) == 3, "who names it gets it"


def test_names_that_are_too_long(tiny_data, tmp_path):
    """Of a class: told before the training, as its files could not be written after it. Of a picture: shortened."""
    shutil.copytree(tiny_data / "screw", tmp_path / "data" / ("s" * 253))
    with pytest.raises(UsageError, match="class 'sss.*rename it"):
        training_data("--data", tmp_path / "data")
    first, second = ("ä" * 120 + name for name in "ab")
    short = folder.short_name(first)
    assert len(os.fsencode(short)) <= folder.LONGEST and short != folder.short_name(second)
    assert short.startswith("ä" * 90) and folder.short_name("bolt") == "bolt"
