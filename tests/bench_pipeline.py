"""What one training step of the paper presets costs, and how fast batches are made.

    python -m tests.bench_pipeline count      operations, bytes and launches of a step, counted on
                                              tensors without data: no GPU is needed
    python -m tests.bench_pipeline loader     OneNIP's samples per second against --workers on this
                                              machine; then the same with simulated cores, on which a
                                              sample sleeps as long as it takes to make

The numbers of docs/gpu.md come from here.
"""

import argparse
import time

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cada
import omniad
import onenip
import roads
from common import runtime

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


NO_KERNEL = {torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format}


def _tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (list, tuple)):
        return [tensor for part in found for tensor in _tensors(part)]
    return []


def count(function):
    """(operations, bytes, launches) of function(); a multiply-add is two operations."""
    flops, traffic = FlopCounterMode(display=False), Traffic()
    with flops, traffic:
        function()
    return flops.get_total_flops(), traffic.bytes, traffic.launches


def steps_of_papers():
    """{preset: (args, frozen network, its calls a step with what each returns, function of losses)}.

    To be called under FakeTensorMode: shapes without data.
    """
    found = {}
    args = onenip.Args(**onenip.PRESETS["paper"])
    features = onenip.Features(args.backbone, "random", args.image_size)
    model = onenip.OneNIP(features.channels, features.side, args)
    x = torch.empty(args.batch_size, features.channels, features.side, features.side)
    mask = torch.empty(args.batch_size, args.image_size, args.image_size)
    loss = onenip.losses
    found["onenip"] = args, features, model, lambda: loss(model, x, x, x, mask, args)

    args = omniad.Args(**omniad.PRESETS["paper"])
    features, maps = pyramid_and_maps(args)
    student = omniad.OmniAD(features.channels, args)
    found["omniad"] = args, features, student, _bound(omniad.losses, student, maps, student.scale, args)

    args = roads.Args(**{**roads.PRESETS["paper"], "adapter_weights": "random"})
    features, maps = pyramid_and_maps(args)
    prompted = roads.ROADS(features.channels, 15, args)
    size = args.adapter_size or args.image_size
    view = torch.empty(args.batch_size, 3, size, size, dtype=torch.uint8)
    true = torch.empty(args.batch_size, dtype=torch.long)
    inputs = prompted, maps, view, true, view, args
    found["roads"] = args, features, prompted, _bound(roads.losses, *inputs)

    for base in cada.RECIPES:
        args = cada.Args(**{**cada.RECIPES[base]["paper"], "base": base, "weights": "random"})
        features = cada.BASES[base].features(args)
        maps = maps_of(features, args.batch_size)
        images = torch.empty(args.batch_size, 3, args.image_size, args.image_size, dtype=torch.uint8)
        trained = cada.BASES[base](args, features.channels, features.sides)
        inputs = trained, maps, images, 0.5, args
        found[f"cada, {base}"] = args, features, trained, _bound(cada.losses, *inputs)
    return found


def pyramid_and_maps(args):
    pyramid = omniad.backbones.Pyramid(args.backbone, "random", args.image_size)
    return pyramid, maps_of(pyramid, args.batch_size)


def maps_of(pyramid, batch):
    sides = zip(pyramid.channels, pyramid.sides)
    return [torch.empty(batch, channels, side, side) for channels, side in sides]


def _bound(losses, *inputs):
    return lambda: losses(*inputs)


def count_all():
    print("of one image; T: 10^12 operations, M: 10^6 bytes, float32, nothing fused")
    print(f"{'':18}{'batch':>6}{'frozen, T':>11}{'step, T':>9}{'step, MB':>10}{'launches/step':>15}"
          f"{'row, MB':>9}")
    with FakeTensorMode():
        for name, (args, features, model, losses) in steps_of_papers().items():
            shape = args.batch_size, 3, args.image_size, args.image_size
            images = torch.empty(shape, dtype=torch.uint8)
            rows = []
            frozen, _, _ = count(lambda: rows.append(features(images)))

            def step():
                losses()[0].backward()

            model.train()
            operations, moved, launches = count(step)
            n = args.batch_size
            row = rows[0][0].numel() * 4 / 1e6
            print(f"{name:18}{n:6}{frozen / n / 1e12:11.4f}{operations / n / 1e12:9.4f}"
                  f"{moved / n / 1e6:10.0f}{launches:15,}{row:9.2f}", flush=True)


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
        self.samples = [runtime.data.Sample("", None, 0, "class")] * len(self)


def speed(dataset, workers, batch_size, batches):
    """Samples per second of all batches but the first four, which the processes start with."""
    run = runtime.Run("onenip", None, torch.device("cpu"))
    loader = run.loader(dataset, run.batch_indices(0, batches + 4, batch_size), str(workers))
    for step, _ in enumerate(loader):
        if step == 3:
            began = time.monotonic()
    return batches * batch_size / (time.monotonic() - began)


def loader(args):
    method = onenip.Args(**onenip.PRESETS["paper"])
    torch.set_num_threads(1)
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
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 24])
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
