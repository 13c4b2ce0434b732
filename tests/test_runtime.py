"""The run: options and presets, seeds, who draws which sample, atomic files, checkpoints, the ends of a program."""

import dataclasses
import errno
import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from common import UsageError, backbones, runtime
from common.runtime import option


@dataclasses.dataclass
class Args(runtime.Options):
    width: int = option(8, "width", group="model", low=1)
    rate: float = option(0.5, "rate", group="training", low=0.0, high=1.0)
    trick: bool = option(True, "a trick", group="ablations")


PRESETS = {"paper": {}, "laptop": {"width": 2, "rate": 0.25}}


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["method.py"])


def parse(*words):
    return runtime.parse(Args, PRESETS, "One line.\n\nMore.", list(words))


def test_preset_follows_the_data_and_a_given_option_wins():
    """Contract: paper for the benchmarks, laptop otherwise; every value can be overridden, also back to its default."""
    assert (parse("--data", "mvtec").width, parse("--data", "mvtec").preset) == (8, "paper")
    assert parse("--data", "mvtec+btad").preset == "paper" and parse("--data", "mvtec+synth").preset == "laptop"
    assert (parse().width, parse().rate) == (2, 0.25)
    assert parse("--width", "8").width == 8
    assert parse("--data", "mvtec", "--preset", "laptop").width == 2
    assert parse("--no-trick").trick is False
    assert parse("--data", "mvtec").out == os.path.join("runs", "method-mvtec")
    assert parse("--data", "some/folder").out == os.path.join("runs", "method-folder")


@pytest.mark.parametrize("words, named", [
    (["--widht", "3"], "--widht"), (["--width", "three"], "--width"), (["--width", "0"], "--width"),
    (["--rate", "nan"], "--rate"), (["--rate", "1.5"], "--rate"), (["--device", "tpu"], "--device"),
    (["--workers", "many"], "--workers"), (["--workers", "-1"], "--workers"),
    (["--predict", "x.png"], "--eval"), (["--resume", "--overwrite"], "--resume"), (["--wid", "3"], "--wid"),
    (["--corrupt", "fog"], "fog"),
    (["--shift", "all", "--corrupt", "contrast"], "--shift")])
def test_wrong_options_are_named_in_one_line(words, named):
    """No usage dump, no traceback: one line that names the option. Abbreviations are refused: they rot."""
    with pytest.raises(UsageError) as error:
        parse(*words)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_help_explains_every_option(capsys):
    """Every field has its line in --help, with its default or its presets."""
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(Args):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"][:20] in " ".join(text.split())
    assert "laptop: 2" in text


def make_run(tmp_path, **more):
    return runtime.Run("method", tmp_path, torch.device("cpu"), **more)


def test_ranks_together_draw_what_one_process_draws(tmp_path):
    """torchrun: step by step, two ranks with batch 3 see the samples of one process with batch 6; a later start
    (resume) sees the same as the tail of the whole."""
    one = list(make_run(tmp_path).batch_indices(0, 4, 6))
    two = [list(make_run(tmp_path, rank=r, world=2).batch_indices(0, 4, 3)) for r in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one
    assert list(make_run(tmp_path).batch_indices(2, 4, 6)) == one[2:]


def test_seed_depends_on_every_number_and_on_the_rank(tmp_path):
    """Dropout noise must differ between steps and ranks, and repeat for the same ones."""
    def draw(rank, *numbers):
        make_run(tmp_path, rank=rank).seed(*numbers)
        return torch.rand(3).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(r, a, b)) for r in (0, 1) for a in (0, 1) for b in (0, 1)}) == 8


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    """Full disk in the middle of a checkpoint: the one before it stays whole."""
    path = tmp_path / "checkpoint.pt"
    runtime.write_atomic(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        runtime.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_real_full_device_ends_in_one_line(capsys):
    """/dev/full answers every write with 'no space left': the program says so and ends with status 2."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")

    def main():
        with open("/dev/full", "wb", buffering=0) as f:
            f.write(b"x")

    with pytest.raises(SystemExit) as end:
        runtime.launch(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "No space left" in err


def test_launch_prints_the_last_line_of_a_loader_error(capsys):
    """A UsageError in a DataLoader process arrives wrapped in a traceback; the user sees the message only."""
    class Bad(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            raise UsageError("photo.png: truncated; replace it")

    with pytest.raises(SystemExit) as end:
        runtime.launch(lambda: next(iter(torch.utils.data.DataLoader(Bad(), num_workers=1))))
    assert end.value.code == 2
    assert capsys.readouterr().err == "method.py: photo.png: truncated; replace it\n"


def test_other_errors_keep_their_traceback():
    """Our own faults must not be dressed up as the user's."""
    def main():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        runtime.launch(main)


def test_log_is_rewound_to_the_checkpoint(tmp_path):
    """Lines after the checkpoint, and a line cut short by a crash, are written again by the resumed run."""
    run = make_run(tmp_path)
    for step in (10, 20, 30):
        run.log({"step": step})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 4')
    run.rewind_log(20)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'


def test_bad_checkpoints_are_named(tmp_path):
    """Missing, no checkpoint at all, half a file, another script's, another model's: one line each."""
    path = tmp_path / "c.pt"
    for content, said in ((None, "no such"), (b"rubbish", "damaged")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=said):
            runtime.load_checkpoint(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of these scripts"):
        runtime.load_checkpoint(path)
    old = {"method": "roads", "args": {}, "model": torch.nn.Linear(2, 3).state_dict()}
    torch.save(old, path)
    with pytest.raises(UsageError, match="older version"):
        runtime.load_checkpoint(path)
    torch.save({**old, "finished": ["model"]}, path)
    with pytest.raises(UsageError, match="of roads.py, not of onenip.py"):
        runtime.load_checkpoint(path, "onenip")
    for model, said in ((torch.nn.Linear(2, 4), r"weight is \(3, 2\) in it and \(4, 2\) here"),
                        (torch.nn.Linear(2, 3, bias=False), "has no bias"),
                        (torch.nn.Sequential(torch.nn.Linear(2, 3)), "whose 0.weight it lacks")):
        with pytest.raises(UsageError, match=said) as error:
            runtime.load_model(model, runtime.load_checkpoint(path)["model"], path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(UsageError, match="training is not finished .* no normal_score; --resume"):
        runtime.load_checkpoint(path)["normal_score"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match="damaged"):
        runtime.load_checkpoint(path)


def test_checkpoints_of_unfinished_trainings(tmp_path):
    """They can be evaluated, if they have what that needs; to predict, the training must be over. Either says so."""
    path = tmp_path / "c.pt"
    state = {"method": "method", "args": {}, "model": {}, "finished": [], "step": 4, "depths": {"a": 255}}
    torch.save(state, path)
    run = make_run(tmp_path)
    assert dict(run.checkpoint_to_evaluate(parse("--eval", str(path)))) == state and run.depths == {"a": 255}
    args = parse("--eval", str(path), "--predict", "x.png")
    with pytest.raises(UsageError, match="not finished .step 4., so it has no threshold .* --resume --out"):
        run.checkpoint_to_evaluate(args)
    torch.save({**state, "finished": ["model"]}, path)
    assert run.checkpoint_to_evaluate(args)["step"] == 4


def test_nan_loss_stops_the_run(tmp_path):
    """A loss that is not finite ends the run before a checkpoint of it can be written."""
    run = make_run(tmp_path)
    run.check_finite(torch.tensor(0, dtype=torch.int32), 5)
    with pytest.raises(UsageError, match="NaN or infinite by step 5"):
        run.check_finite(torch.tensor(1, dtype=torch.int32), 5)


def test_precompute_keeps_within_its_share(tmp_path):
    """Features are computed once per image, in order, batch by batch; too large a result is not kept."""
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(7)]
    seen = []

    def function(batch):
        seen.append(len(batch))
        return batch.float().mean((1, 2, 3))[:, None]

    result = runtime.precompute(make_run(tmp_path), function, images, 3, memory_share=0.5)
    assert result.tolist() == [[float(i)] for i in range(7)] and seen == [3, 3, 1]
    assert runtime.precompute(make_run(tmp_path), function, images, 3, memory_share=0.0) is None


class Loop:
    """A training of one weight towards the images' numbers, with all that the ledger needs."""

    def __init__(self, out, *words, images=5):
        self.args = parse("--out", str(out), *words)
        self.args.batch_size, self.args.schedule = 2, "cosine"
        self.run = make_run(out)
        self.run.open(self.args)
        self.images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(images)]
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.job = runtime.Training(self.run, self.args, self.model, self.optimizer)

    def train(self, steps, fails_at=None, nan_at=None):
        """`steps` steps; ends with KeyboardInterrupt after step `fails_at`."""
        frozen = runtime.Frozen(self.run, Means(), self.images, self.args)
        dataset = runtime.Stream(self.images, 0, 2, frozen.needs_images)
        for step, batch in self.job.batches(dataset, steps):
            self.run.seed(0, step)
            self.job.set_rate(step)
            x = frozen(batch) + torch.rand(2, 1)
            loss = (self.model(x) - 1).square().mean()
            if step == nan_at:
                loss = loss * torch.nan
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.job.record(loss, {"half": loss / 2})
            if step == fails_at:
                raise KeyboardInterrupt
        return self.job.finish(more=1)


def test_the_log_says_what_the_loop_waits_for(tmp_path, monkeypatch):
    """A step of 10 ms whose batch of two takes 30 ms waits for data three quarters of the time; metrics.json gets the
    last line's figures."""
    now = [0.0]  # a clock of its own: a busy machine must not stretch the parts
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: now[0]))
    loop = Loop(tmp_path, "--log-every", "4", "--memory-share", "0", "--workers", "0")

    class Slow(runtime.Stream):
        def __getitem__(self, k):
            now[0] += 0.015
            return {"index": 0}

    for step, _ in loop.job.batches(Slow(loop.images, 0, 2, False), 8):
        now[0] += 0.01
        loop.job.set_rate(step)
        loop.job.record(loop.model.weight.sum(), {})
    last = lines_of(tmp_path)[-1]
    assert last["data_wait"] == 0.75 and last["images_per_s"] == 2 / 0.04 and "peak_gpu_gib" not in last
    assert loop.run.speed["model"].items() <= last.items()


class Means:
    """A frozen network: the mean of an image."""

    def __call__(self, images):
        return images.float().mean((1, 2, 3))[:, None]  # (B, 1)

    def split(self, rows):
        return rows


def lines_of(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def test_what_a_training_loop_keeps(tmp_path):
    """Log lines every --log-every steps and at the end, checkpoints every --checkpoint-every; the last one, by finish,
    says that the part is trained and holds what was given. Losses are averages over the ranks."""
    loop = Loop(tmp_path, "--log-every", "4", "--checkpoint-every", "6")
    saved, save = [], loop.run.save
    loop.run.save = lambda state: (saved.append(state["step"]), save(state))
    state = loop.train(13)
    assert [line["step"] for line in lines_of(tmp_path)] == [4, 8, 12, 13] and saved == [6, 12, 13]
    assert all(line["half"] == pytest.approx(line["loss"] / 2) for line in lines_of(tmp_path))
    assert all(line["images_per_s"] > 0 and 0 <= line["lr"] <= 0.01 for line in lines_of(tmp_path))
    assert state["finished"] == ["model"] and state["more"] == 1 and state["seconds"] > 0
    assert runtime.load_checkpoint(tmp_path / "checkpoint.pt", "method")["step"] == 13


def test_nan_stops_before_anything_of_it_is_kept(tmp_path):
    """The flag is looked at only where something is kept, and the checkpoint before it stays."""
    loop = Loop(tmp_path, "--log-every", "4", "--checkpoint-every", "6")
    with pytest.raises(UsageError, match="NaN or infinite by step 8"):
        loop.train(13, nan_at=6)
    assert [line["step"] for line in lines_of(tmp_path)] == [4]
    assert runtime.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


@pytest.mark.parametrize("fails_at", [0, 5, 6, 12])
def test_a_resumed_training_is_the_uninterrupted_one(fails_at, tmp_path):
    """Weights, optimiser, learning rate, order of images and noise go on where the checkpoint was written; the log has
    each line once. A finished training is not begun again."""
    words = ("--log-every", "1", "--checkpoint-every", "3")
    whole = Loop(tmp_path / "whole", *words).train(13)
    parts = Loop(tmp_path / "parts", *words)
    with pytest.raises(KeyboardInterrupt):
        parts.train(13, fails_at=fails_at)
    parts.run.finish_saving()  # as a process does before it ends
    loop = Loop(tmp_path / "parts", "--resume")
    assert bool(loop.job.resumed) == (fails_at >= 2) and not loop.job.finished
    state = loop.train(13)
    assert torch.equal(state["model"]["weight"], whole["model"]["weight"])
    a, b = ([(line["step"], line["loss"], line["lr"]) for line in lines_of(tmp_path / name)]
            for name in ("whole", "parts"))
    assert a == b
    again = Loop(tmp_path / "parts", "--resume").job
    assert again.finished and again.resumed["more"] == 1


def test_a_second_stage_keeps_what_the_first_one_wrote(tmp_path):
    """Steps are counted on, and the first part's weights stay in the checkpoint."""
    first = Loop(tmp_path, "--log-every", "1")
    state = first.train(3)
    head = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    job = runtime.Training(first.run, first.args, head, optimizer, part="head", before=state, steps_before=3,
                           schedule="constant", log_as={"stage": "two"})
    assert job.resumed is None and not job.finished
    for step, batch in job.batches(runtime.Stream(first.images, 0, 1, True), 2, batch_size=1):
        job.set_rate(step)
        assert batch["image"].shape == (1, 3, 2, 2)
        job.record(head(torch.ones(1, 1)).sum(), {})
    state = job.finish()
    assert [(line["step"], line.get("stage")) for line in lines_of(tmp_path)][-2:] == [(4, "two"), (5, "two")]
    assert state["finished"] == ["model", "head"] and "weight" in state["model"] and state["step"] == 5
    assert runtime.Training(first.run, first.args, head, optimizer, part="head", before=state, steps_before=3).finished


@pytest.mark.parametrize("share", ["0.5", "0"])
def test_frozen_features_are_the_images_own(share, tmp_path):
    """From memory or computed now, a batch's features are those of its images."""
    loop = Loop(tmp_path, "--memory-share", share)
    frozen = runtime.Frozen(loop.run, Means(), loop.images, loop.args)
    assert frozen.needs_images == (share == "0")
    dataset = runtime.Stream(loop.images, 0, 2, frozen.needs_images)
    batch = torch.utils.data.default_collate([dataset[k] for k in range(2)])
    assert ("image" in batch) == frozen.needs_images
    assert frozen(batch)[:, 0].tolist() == batch["index"].tolist()


def test_stream_drops_what_does_not_fill_a_step():
    """Ten images, four a step: two steps an epoch, each image at most once; or none is dropped."""
    stream = runtime.Stream(list(range(10)), 3, 4, True)
    first, second = ([stream.index(k) for k in range(8 * e, 8 * e + 8)] for e in (0, 1))
    assert len(set(first)) == len(set(second)) == 8 and first != second
    assert stream.steps(1) == 2 and stream.steps(0.5) == 1 and stream[0] == {"index": first[0], "image": first[0]}
    assert runtime.Stream(list(range(10)), 3, 16, False).per_epoch == 10, "fewer images than a step"

    class Whole(runtime.Stream):
        drop_incomplete = False

    whole = Whole(list(range(10)), 3, 4, False)
    assert whole.steps(1) == 3 and sorted(whole.index(k) for k in range(10)) == list(range(10))


def test_first_images_of_a_stream():
    """What a model takes from the data before its first step: other images for another seed, each once."""
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(10)]
    batch = runtime.Stream(images, 3, 4, needs_images=True).first(6)
    assert len(set(batch["index"].tolist())) == 6 and batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()
    assert batch["index"].tolist() == [runtime.Stream(images, 3, 1, True)[k]["index"] for k in range(6)]
    assert sorted(runtime.Stream(images, 4, 4, False).first(64)["index"].tolist()) == list(range(10))


def test_resume_takes_the_options_of_the_run_in_the_folder(tmp_path):
    """What is given again must not contradict them; a folder without a run, with an evaluation, with a run of another
    script or a damaged args.json is refused."""
    out = tmp_path / "run"

    def resume(*words):
        return runtime.parse(Args, PRESETS, "One line.", ["--out", str(out), "--resume", *words], method="method")

    runtime.start(parse("--out", str(out)), "method").open(parse("--out", str(out)))
    assert resume().rate == 0.25
    with pytest.raises(UsageError, match="--rate 0.25, not 0.75"):
        resume("--rate", "0.75")
    assert resume("--workers", "3", "--threads", "2").workers == "3"
    saved = json.loads((out / "args.json").read_text())
    for changes, said in (({"method": "roads"}, "a run of roads.py, not of method.py"),
                          ({"eval": "c.pt"}, "evaluation of c.pt")):
        (out / "args.json").write_text(json.dumps({**saved, **changes}))
        with pytest.raises(UsageError, match=said):
            resume()
    (out / "args.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        resume()
    (out / "args.json").unlink()
    with pytest.raises(UsageError, match="holds no run"):
        resume()


def test_learning_rate():
    """Paper: x 0.1 (or another drop) after 80 %. Cosine: rises to the full rate within 5 %, then falls to nearly
    nothing. Constant: neither."""
    assert runtime.lr_factor(79, 100, "step", 0.2) == 1.0 and runtime.lr_factor(80, 100, "step", 0.2) == 0.2
    assert {runtime.lr_factor(s, 100, "constant") for s in range(100)} == {1.0}
    assert [runtime.lr_factor(s, 100, "step") for s in (0, 79, 80, 99)] == [1.0, 1.0, 0.1, 0.1]
    curve = [runtime.lr_factor(s, 100, "cosine") for s in range(100)]
    assert max(curve) == curve[4] == 1.0 and curve[0] == 0.2 and curve[99] < 0.01
    assert curve[4:] == sorted(curve[4:], reverse=True)


@pytest.mark.parametrize("needs_images, cores, ranks, expected", [
    (True, 8, 1, 7), (True, 64, 1, 16), (True, 1, 1, 1), (True, 64, 8, 7), (False, 64, 1, 0)])
def test_auto_workers_feed_a_gpu(needs_images, cores, ranks, expected, monkeypatch):
    """All cores but one of a process's share prepare pixels, 16 at most; for numbers of images no process is started,
    and none on a CPU, whose cores train."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    stream = runtime.Stream([torch.zeros(3, 2, 2, dtype=torch.uint8)] * 5, 0, 2, needs_images)
    assert runtime.auto_workers(torch.device("cuda"), stream) == expected
    of_pixels = max(1, min(cores // ranks - 1, 16))
    assert runtime.auto_workers(torch.device("cuda"), ["test images"]) == of_pixels
    assert runtime.auto_workers(torch.device("cpu"), stream) == 0


@pytest.mark.parametrize("workers", ["auto", "0", "2"])
def test_batches_do_not_depend_on_who_draws_them(workers, tmp_path):
    """Any number of processes gives the same samples in the same order."""
    run = make_run(tmp_path)
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(5)]
    loader = run.loader(runtime.Stream(images, 0, 2, True), run.batch_indices(0, 6, 2), workers)
    alone = runtime.Stream(images, 0, 2, True)
    for step, batch in enumerate(loader):
        assert batch["index"].tolist() == [alone.index(2 * step), alone.index(2 * step + 1)]
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()


def test_rows_are_moved_where_that_costs_less_than_computing_them():
    """A convolution of known cost: 2 * 9 * 3 * 16 * 30 * 30 operations give 57,600 bytes of float32
    for 3,072 of pixels, 14 operations a byte. A row that is shorter than its image is always moved,
    and where the image would have to be decoded any row is."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def wide(x):
        return torch.conv2d(x.float(), torch.zeros(16, 3, 3, 3))

    def small(x):
        return wide(x).mean((2, 3))

    ratio_here = 2 * 9 * 3 * 16 * 30 * 30 / (57_600 - 3_072)
    for ratio, expected in (ratio_here + 1, False), (ratio_here - 1, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "OPERATIONS_PER_BYTE", ratio)
            assert runtime.worth_moving(wide, image, wide(image), [image[0]]) == expected
    assert runtime.worth_moving(small, image, small(image), [image[0]])
    undecoded = runtime.data.Images([], 32)
    assert runtime.worth_moving(wide, image, wide(image), undecoded)


def test_rows_fetched_one_by_one_are_the_batch(tmp_path):
    """How a GPU gets its rows from pinned memory, here from plain memory: those of the index, in its order; bfloat16
    rows are handed out in float32."""
    loop = Loop(tmp_path)
    frozen = runtime.Frozen(loop.run, Means(), loop.images, loop.args)
    assert frozen._fetch(torch.tensor([3, 0, 3]))[:, 0].tolist() == [3, 0, 3]
    frozen.rows = frozen.rows.bfloat16()
    given = frozen({"index": torch.tensor([4, 1])})
    assert given.dtype == torch.float32 and given[:, 0].tolist() == [4, 1]


@pytest.mark.skipif(not any(map(runtime.shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_training_computes_the_same(tmp_path):
    """--compile: outputs and gradients of a small network within float error; the weights are the model's own, under
    their own names."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 2))
    model, parallel = make_run(tmp_path, compile=True).wrap(network)
    assert parallel is not model and model is network
    parallel.train()
    found = []
    for function in model, parallel:
        model.zero_grad()
        out = function(torch.linspace(-1, 1, 24).reshape(4, 6))
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, given in zip(*found):
        torch.testing.assert_close(given, expected)


def test_compile_without_a_compiler_is_refused(tmp_path, monkeypatch):
    """Before anything is computed, in one line."""
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="--compile: PyTorch needs a C.. compiler"):
        runtime.start(parse("--compile", "--out", str(tmp_path / "run")), "method")


def test_options_reach_the_run(tmp_path, monkeypatch):
    """--compile and --amp are what the run does, from its start."""
    monkeypatch.setattr(runtime.shutil, "which", lambda name: name)
    words = "--compile", "--amp", "bf16", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "run")
    run = runtime.start(parse(*words), "method")
    assert run.compile is True and run.amp == "bf16" and run.depths == {}


@pytest.mark.parametrize("hardware, amp", [(True, "bf16"), (False, "off")])
def test_what_auto_has_become_is_kept(hardware, amp, tmp_path, monkeypatch):
    """Two machines with one command may have computed in different numbers: metrics.json tells."""
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: hardware)
    words = "--amp", "auto", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "run")
    run = runtime.start(parse(*words), "method")
    assert run.amp == run.environment()["amp"] == amp


def test_a_gpu_computes_frozen_networks_in_bf16_with_amp():
    """What `Run.place` asks for on a GPU, here on the CPU: bfloat16 outputs near the float32 ones, whose maps
    `Pyramid.maps` gives in float32; on a CPU it asks for nothing."""
    torch.manual_seed(0)
    pyramid = backbones.Pyramid("resnet18", "random", 64)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    exact = pyramid.maps(images)
    make_run(None, amp="bf16").place(pyramid)
    assert not pyramid.backbone.bf16
    pyramid.backbone.bf16 = True
    assert pyramid(images).dtype == torch.bfloat16
    for rounded, f in zip(pyramid.maps(images), exact):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - f).norm() < 0.02 * f.norm()


def test_a_checkpoint_is_written_beside_the_training(tmp_path, monkeypatch):
    """The file holds the state of its step though the training has changed the weights meanwhile; the next one waits
    for it."""
    run, weight = make_run(tmp_path), torch.zeros(3)
    state = {"method": "method", "args": {}, "model": {"w": weight}, "finished": [], "list": [weight]}
    go_on = threading.Event()
    write = runtime.write_atomic
    monkeypatch.setattr(runtime, "write_atomic", lambda *what: (go_on.wait(), write(*what)))
    run.save(state)
    assert not (tmp_path / "checkpoint.pt").exists(), "it waits, and `save` has returned"
    weight += 1
    go_on.set()
    run.finish_saving()
    kept = runtime.load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["model"]["w"].tolist() == kept["list"][0].tolist() == [0, 0, 0]
    run.save(state)
    run.save(state)
    run.finish_saving()
    assert runtime.load_checkpoint(tmp_path / "checkpoint.pt")["model"]["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("then", ["save", "finish_saving"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_later(then, tmp_path, monkeypatch):
    """A full disk shows at the next checkpoint or at the end; the checkpoint before is whole."""
    run, state = make_run(tmp_path), {"method": "method", "args": {}, "model": {}, "finished": []}
    run.save(state)
    run.finish_saving()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.save({**state, "step": 3})
    with pytest.raises(OSError, match="No space left"):
        run.save(state) if then == "save" else run.finish_saving()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
