"""What one training step of the paper presets costs, and how fast batches are made.

    python -m tests.bench_pipeline count      operations, bytes and launches of a step, counted in
                                              steps of two and three images: no GPU is needed
    python -m tests.bench_pipeline loader     OneNIP's samples per second against --workers on this
                                              machine; then the same with simulated cores, on which a
                                              sample sleeps as long as it takes to make

The numbers of docs/gpu.md come from here.
"""

import argparse
import contextlib
import time
import warnings
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cada
import omniad
import onenip
import roads
from common import runtime
from kernels import backend

# ------------------------------------------------------------------------------------------- count


class Traffic(TorchDispatchMode):
    """Counts operations that start a kernel, and the bytes that each reads and writes.

    Nothing is assumed to be fused or to stay in a cache: the traffic of eager execution.
    """

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function in NO_KERNEL:
            return result
        tensors = _tensors([args, result])
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


aten = torch.ops.aten
NO_KERNEL = {
    aten.detach.default, aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}


def _tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (list, tuple)):
        return [tensor for part in found for tensor in _tensors(part)]
    return []


@contextlib.contextmanager
def kernels_counted(traffic):
    """Context: on tensors without memory (device "meta") the kernels are chosen as on a GPU; none
    is launched, but counted, with the bytes of its tensors."""
    from triton.runtime.jit import JITFunction

    def launcher(kernel, grid):
        def launch(*args, **options):
            tensors = {id(t): t for t in _tensors(args)}.values()
            traffic.launches += 1
            traffic.bytes += sum(t.numel() * t.element_size() for t in tensors)

        return launch

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "__getitem__", launcher),
            (backend, "on_gpu", lambda tensor: True),
            (backend, "works", lambda *question: True),
            (torch, "is_autocast_enabled", lambda device: False),  # it does not know of "meta"
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def on_meta(x):
    """Tensors, lists and tuples of them without their memory; all else as it is."""
    if isinstance(x, (list, tuple)):
        return type(x)(on_meta(part) for part in x)
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def count(function):
    """(operations, bytes, launches) of function(); a multiply-add is two operations."""
    flops, traffic = FlopCounterMode(display=False), Traffic()
    with flops, traffic:
        function()
    return flops.get_total_flops(), traffic.bytes, traffic.launches


def presets():
    """{preset: (args, frozen network, model, function of a batch size that makes the inputs of the
    method's losses)}."""
    found = {}
    args = onenip.Args(**onenip.PRESETS["paper"])
    features = onenip.Features(args.backbone, "random", args.image_size)
    model = onenip.OneNIP(features.channels, features.side, args)

    def inputs_of_onenip(n, channels=features.channels, side=features.side, args=args):
        x = torch.randn(n, channels, side, side)
        mask = torch.ones(n, args.image_size, args.image_size)
        return x, x, x, mask, args

    found["onenip"] = args, features, model, onenip.losses, inputs_of_onenip
    args = omniad.Args(**omniad.PRESETS["paper"])
    features = omniad.backbones.Pyramid(args.backbone, "random", args.image_size)
    model = omniad.OmniAD(features.channels, args)

    def inputs_of_omniad(n, features=features, model=model, args=args):
        return maps_of(features, n), model.scale, args

    found["omniad"] = args, features, model, omniad.losses, inputs_of_omniad
    args = roads.Args(**{**roads.PRESETS["paper"], "adapter_weights": "random"})
    features = roads.backbones.Pyramid(args.backbone, "random", args.image_size)
    model = roads.ROADS(features.channels, 15, args)

    def inputs_of_roads(n, features=features, args=args):
        view = images_of(n, args.adapter_size or args.image_size)
        return maps_of(features, n), view, torch.zeros(n, dtype=torch.long), view, args

    found["roads"] = args, features, model, roads.losses, inputs_of_roads
    for base in cada.RECIPES:
        args = cada.Args(**{**cada.RECIPES[base]["paper"], "base": base, "weights": "random"})
        features = cada.BASES[base].features(args)
        model = cada.BASES[base](args, features.channels, features.sides)

        def inputs_of_cada(n, features=features, args=args):
            return maps_of(features, n), images_of(n, args.image_size), 0.5, args

        found[f"cada, {base}"] = args, features, model, cada.losses, inputs_of_cada
    return found


def maps_of(pyramid, n):
    return [torch.randn(n, c, side, side) for c, side in zip(pyramid.channels, pyramid.sides)]


def images_of(n, size):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8)


def count_all():
    """Counted at batches of 2 and 3 images; what a step moves grows linearly from there."""
    print("frozen, step: 10^9 operations of one image, the frozen network's forward and the trained")
    print("part's step; MB: 10^6 bytes that the step moves for one image, float32, nothing fused;")
    print("launches: of the step, any batch; then both with the Triton kernels, where they are")
    print("chosen in float32; row: 10^6 bytes of an image's features in float32")
    print(f"{'':16}{'batch':>6}{'frozen':>9}{'step':>9}{'MB':>9}{'launches':>10}", end="")
    print(f"{'MB':>9}{'launches':>10}{'row':>7}")
    for name, preset in presets().items():
        print(f"{name:16}" + row_of(*preset), flush=True)


def row_of(args, features, model, losses, inputs_of):
    """The numbers of one preset, as `presets` gives it, in one line."""
    frozen, _, _ = count(lambda: features(images_of(1, args.image_size)))
    moved = []
    for n in (2, 3):
        inputs = inputs_of(n)
        operations, bytes_moved, launches = count(partial(step, model, losses, inputs))
        moved.append(bytes_moved)
    slope, n = moved[1] - moved[0], args.batch_size
    per_image = (moved[0] + (n - 2) * slope) / n
    row = features(images_of(1, args.image_size)).numel() * 4 / 1e6
    counted = f"{frozen / 1e9:9.1f}{operations / 3e9:9.1f}{per_image / 1e6:9.0f}{launches:10,}"
    if backend.HAS_TRITON:
        traffic, inputs, model = Traffic(), on_meta(inputs_of(n)), model.to("meta")
        with kernels_counted(traffic), traffic:
            step(model, losses, inputs)
        counted += f"{traffic.bytes / n / 1e6:9.0f}{traffic.launches:10,}"
    return f"{n:6}{counted}{row:7.2f}"


def step(model, losses, inputs):
    model.zero_grad()
    loss, _ = losses(model, *inputs)
    loss.backward()


# ------------------------------------------------------------------------------------------ loader


class Cores(torch.utils.data.Dataset):
    """Samples of OneNIP's shapes that take `seconds` of sleep each: as many cores as processes."""

    def __init__(self, args, seconds):
        self.size, self.seconds = args.image_size, seconds

    def __getitem__(self, k):
        time.sleep(self.seconds)
        image = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        mask = torch.zeros(self.size, self.size, dtype=torch.bool)
        return {"normal": {"index": k}, "prompt": {"index": k},
                "synthetic": {"image": image, "mask": mask}}


class Pictures(list):
    """Pixels in memory, with the samples that `Triplets` asks for."""

    def __init__(self, size):
        super().__init__(torch.randint(256, (32, 3, size, size), dtype=torch.uint8))
        self.samples = [runtime.data.Sample("", None, 0, "class", "good", "")] * len(self)


def speed(dataset, workers, batch_size, batches):
    """Samples per second, after the batches that were ready when the first one was asked for."""
    run = runtime.Run("onenip", None, torch.device("cpu"))
    ready, timed = 4 * workers + 4, max(batches, 4 * workers)
    steps = run.batch_indices(0, ready + timed, batch_size)
    for step, _ in enumerate(run.loader(dataset, steps, str(workers))):
        if step == ready - 1:
            began = time.monotonic()
    return timed * batch_size / (time.monotonic() - began)


def loader(args):
    method = onenip.Args(**onenip.PRESETS["paper"])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # on purpose
    pictures = Pictures(method.image_size)
    made = onenip.Triplets(pictures, method, {"class": 0}, args.batch_size, needs_images=False)
    times = []
    for k in range(200):
        began = time.process_time()
        made[k]
        times.append(time.process_time() - began)
    seconds = float(np.mean(times))
    print(f"a sample of OneNIP's paper preset: {1000 * seconds:.1f} ms of one core")
    print(f"{'workers':>8}{'samples/s here':>16}{'samples/s, a core each':>24}")
    for workers in args.workers:
        here = ""
        if workers <= args.cores:
            here = f"{speed(made, workers, args.batch_size, args.batches):.0f}"
        cores = speed(Cores(method, seconds), workers, args.batch_size, args.batches)
        print(f"{workers:8}{here:>16}{cores:24.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("count", "loader"))
    parser.add_argument("--device", default="cpu", choices=("cpu",), help="what it runs on")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--cores", type=int, default=2, help="most workers that are not simulated")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12)
    args = parser.parse_args()
    if args.what == "count":
        count_all()
    else:
        loader(args)


if __name__ == "__main__":
    main()
