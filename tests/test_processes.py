"""Several processes of one run, two and four of them over gloo: what they compute together is what one computes."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cada
import omniad
import onenip
import roads
from common import data, report, runtime

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="several processes are tested on Linux and macOS"
)


def together(function, world, folder):
    """[function(run) of each rank], in processes forked from this one."""
    torch.multiprocessing.start_processes(
        _process, (function, world, str(folder)), nprocs=world, start_method="fork"
    )
    return [torch.load(folder / f"result-{world}-{rank}.pt") for rank in range(world)]


def _process(rank, function, world, folder):
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    run = runtime.Run("method", Path(folder), torch.device("cpu"), rank, world)
    torch.save(function(run), f"{folder}/result-{world}-{rank}.pt")
    dist.destroy_process_group()


def one(function, folder):
    """function(run) in this process alone."""
    return function(runtime.Run("method", folder, torch.device("cpu")))


def features_of_images(run):
    """`precompute` of 23 images by a convolution, four at a time; and how many this rank computed."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 5, 3).requires_grad_(False)
    images = list(torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8))
    computed = []

    def function(batch):
        computed.append(len(batch))
        return network(batch.float())

    rows = runtime.precompute(run, function, images, 4, memory_share=0.5)
    nothing = runtime.precompute(run, function, images, 4, memory_share=0.0)
    assert nothing is None
    return rows, sum(computed)


@pytest.mark.parametrize("world", [2, 4])
def test_frozen_features_are_shared_out(world, tmp_path):
    """Every rank has the bits that one process has, and computed its share only (and the first four images twice, to
    see how much there will be)."""
    expected, all_of_them = one(features_of_images, tmp_path)
    assert all_of_them == 23 + 4
    for rows, computed in together(features_of_images, world, tmp_path):
        assert torch.equal(rows, expected)
        assert computed <= 4 + -(-5 // world) * 4 + 4


# ------------------------------------------------------------------------------------------ losses

CHANNELS, SIDES = (4, 8, 16), (16, 8, 4)  # of the teacher's maps of an image of 64 px


def small_args(script, preset, **changes):
    args = script.Args(**preset, image_size=64)
    for name, value in {"amp": "off", "jitter": 0.0, "dropout": 0.0, **changes}.items():
        if hasattr(args, name):
            setattr(args, name, value)
    return args


def without(preset, *names):
    return {name: value for name, value in preset.items() if name not in ("image_size", *names)}


def two_maps(times):
    """Maps of the same two images, `times` times."""
    generator = torch.Generator().manual_seed(1)
    maps = []
    for c, side in zip(CHANNELS, SIDES):
        f = torch.randn(2, c, side, side, generator=generator)
        maps.append(f.repeat(times, 1, 1, 1))
    return maps


def step_of_onenip(times):
    args = small_args(onenip, without(onenip.PRESETS["laptop"]), hidden=8, heads=2, mlp=8)
    model = onenip.OneNIP(12, 4, args)
    generator = torch.Generator().manual_seed(1)
    triple = torch.randn(3, 2, 12, 4, 4, generator=generator).repeat(1, times, 1, 1, 1)
    mask = torch.rand(2, 64, 64, generator=generator).repeat(times, 1, 1).round()
    return model, lambda parallel: onenip.losses(parallel, *triple, mask, args)


def step_of_omniad(times):
    args = small_args(omniad, without(omniad.PRESETS["laptop"]), depths="1,1,1,1", heads=2)
    model = omniad.OmniAD(CHANNELS, args)
    return model, lambda parallel: omniad.losses(parallel, two_maps(times), model.scale, args)


def step_of_roads(times):
    args = small_args(roads, without(roads.PRESETS["laptop"]), depths="1,1,1,1", adapter="none")
    model = roads.ROADS(CHANNELS, 2, args)
    true = torch.tensor([0, 1] * times)
    return model, lambda parallel: roads.losses(parallel, two_maps(times), None, true, None, args)


def step_of_cada(base, times):
    args = small_args(cada, without(cada.RECIPES[base]["laptop"]), base=base, weights="random",
                      attention_dropout=0.0)
    images = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    images = images.byte().repeat(times, 1, 1, 1)
    features = cada.BASES[base].features(args)
    model = cada.BASES[base](args, features.channels, features.sides)
    maps = features.maps(images)
    return model, lambda parallel: cada.losses(parallel, maps, images, 0.5, args)


STEPS = {
    "onenip": step_of_onenip,
    "omniad": step_of_omniad,
    "roads": step_of_roads,
    "revdist": lambda times: step_of_cada("revdist", times),
    "recontrast": lambda times: step_of_cada("recontrast", times),
    "uniad": lambda times: step_of_cada("uniad", times),
}


def losses_and_gradients(run, times=1):
    """{method: (loss, the mean over the ranks, and the gradient of every weight)} of one step, in
    which every rank has the same two images, `times` times."""
    found = {}
    for name, step in STEPS.items():
        torch.manual_seed(0)
        model, losses = step(times)
        model, parallel = run.wrap(model)
        parallel.train()
        loss, _ = losses(parallel)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[name] = run.mean({"loss": loss})["loss"], gradients
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_is_that_of_one_process_with_all_images(world, tmp_path):
    """Every method, every base: loss and gradients. Each rank's two images are the same, so that on a CPU, where batch
    norms see one rank's images only, even these agree."""
    expected = one(lambda run: losses_and_gradients(run, world), tmp_path)
    for found in together(losses_and_gradients, world, tmp_path):
        for name, (loss, gradients) in expected.items():
            assert found[name][0] == pytest.approx(loss, rel=1e-5), name
            largest = max(g.abs().max() for g in gradients)
            for given, wanted in zip(found[name][1], gradients, strict=True):
                torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-5 * largest.item())


def mined_gradient(run):
    """The gradient that hard mining lets through, of this rank's share of eight images that differ."""
    generator = torch.Generator().manual_seed(2)
    target, rebuilt = torch.randn(2, 8, 5, 4, 4, generator=generator)
    rebuilt = rebuilt + target * torch.linspace(0, 4, 8)[:, None, None, None]  # the last ones are easy
    share = slice(run.rank * 8 // run.world, (run.rank + 1) * 8 // run.world)
    rebuilt = rebuilt[share].requires_grad_()
    cada.hard_mining(target[share], rebuilt, 0.5).sum().backward()
    return rebuilt.grad


@pytest.mark.parametrize("world", [2, 4])
def test_hard_mining_sees_the_whole_step(world, tmp_path):
    """ReContrast's threshold is one of all ranks' images: rank by rank it would be another."""
    expected = one(mined_gradient, tmp_path)
    parts = together(mined_gradient, world, tmp_path)
    assert torch.equal(torch.cat(parts), expected)
    shares = [part.mean() for part in parts]
    assert max(shares) > min(shares) + 0.2, "the easy images' rank has less to learn"


# -------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [2, 4])
def test_an_evaluation_is_shared_out(world, tiny_data, tmp_path):
    """Each rank scores its share; all have the report of one process, image by image and as a whole."""
    args = runtime.Options()
    args.image_size, args.batch_size = 64, 3
    dataset = data.load(str(tiny_data), None, ["screw", "capsule"])
    scored = []

    def measured(run):
        scored.clear()

        def score(images, samples):
            scored.extend(samples)
            maps = images.float().mean(1)
            return maps, maps.amax((1, 2))

        found = report.measure(run, args, dataset, score)
        return found.rows, found.rep["mean"], len(scored)

    rows, mean, _ = one(measured, tmp_path)
    parts = together(measured, world, tmp_path)
    assert sum(part[2] for part in parts) == len(dataset.test) == len(rows)
    assert all(part[:2] == (rows, mean) for part in parts)


# --------------------------------------------------------------------------------- one process dies


def batch_norm_of_a_training(run):
    """Its running mean at the end of a training, in the module and in the checkpoint; each rank has its own images."""
    args = runtime.Options(out=str(run.out), workers="0")
    args.batch_size, args.schedule = 2, "constant"
    model, parallel = run.wrap(torch.nn.BatchNorm1d(2))
    job = runtime.Training(run, args, model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(run.rank)
    for _ in range(3):
        loss = parallel(torch.randn(2, 2)).square().sum()
        loss.backward()
        job.record(loss, {})
    return model.running_mean, job.finish()["model"]["running_mean"]


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_evaluate_the_model_of_the_checkpoint(world, tmp_path):
    """Without SyncBatchNorm, on CPUs, the last step would leave each rank with its own statistics."""
    means = [mean for pair in together(batch_norm_of_a_training, world, tmp_path) for mean in pair]
    assert all(torch.equal(mean, means[0]) for mean in means)


def train_until_one_dies(rank, world, folder, ready):
    """A training whose last rank is killed after its checkpoint of step 5; stderr in a file."""
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank)}
    sys.stderr = open(folder / f"err-{rank}", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)  # what libraries say, too
    sys.argv = ["method.py"]
    store = f"file://{folder}/store"

    def main():
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        run = runtime.Run("method", folder, torch.device("cpu"), rank, world)
        args = runtime.Options(out=str(folder), log_every=1, checkpoint_every=5, workers="0")
        args.batch_size, args.schedule = 1, "constant"
        model, parallel = run.wrap(torch.nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        job = runtime.Training(run, args, model, optimizer)
        stream = runtime.Stream(torch.zeros(8, 2), 0, world, True)
        for step, batch in job.batches(stream, 10**6):
            loss = parallel(batch["image"]).sum()
            loss.backward()
            optimizer.step()
            job.record(loss, {})
            if step == 7 and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    ready.set()
    runtime.launch(main)


@pytest.mark.parametrize("world", [2, 4])
def test_when_one_process_is_killed_the_others_end_in_one_line(world, tmp_path):
    """Within a minute, with status 2; the checkpoint before is whole."""
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(world):
        ready = context.Event()
        arguments = rank, world, tmp_path, ready
        processes.append(context.Process(target=train_until_one_dies, args=arguments))
        processes[-1].start()
        ready.wait()
    began = time.monotonic()
    for process in processes:
        process.join(max(0, began + 60 - time.monotonic()))
        process.kill()  # if it is still there
    assert time.monotonic() - began < 60
    assert [process.exitcode for process in processes] == [2] * (world - 1) + [-signal.SIGKILL]
    for rank in range(world - 1):
        said = (tmp_path / f"err-{rank}").read_text()
        assert said.startswith(f"[rank {rank}] method.py: another process of this run has ended")
        assert said.count("\n") == 1, said
    assert runtime.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def wait_as_for_a_gpu(folder, ready):
    """A run whose main thread is in a C function that never returns, and handles no signal."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": "0"}
    sys.stderr = open(folder / "err", "w", buffering=1)
    sys.argv = ["method.py"]

    def main():
        loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        loader.start()
        loader.terminate()
        loader.join(10)
        assert loader.exitcode == -signal.SIGTERM, "a forked process ends as ever"
        mutex = ctypes.create_string_buffer(64)
        ready.set()
        for _ in range(2):  # the second time it waits for the first
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    runtime.launch(main)


@pytest.mark.skipif(sys.platform != "linux", reason="its mutex of zeros is a Linux one")
def test_a_process_that_waits_for_a_gpu_ends_in_one_line(tmp_path):
    """NCCL waits where no signal handler runs. When torchrun terminates what is left of a run, the process says so
    within seconds."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=wait_as_for_a_gpu, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(30)
        process.terminate()
        process.join(20)
        assert process.exitcode == 2
    finally:
        process.kill()
    said = (tmp_path / "err").read_text()
    assert said == "[rank 0] method.py: another process of this run has ended, or torchrun was stopped\n"
