"""How time and memory grow with the size of the images and with their number.

    python -m tests.bench_growth size                     a step and scoring at 128, 256, 384 and 512 px
    python -m tests.bench_growth images                   what 100 and 1,000 training images take before the first step
    python -m tests.bench_growth images --counts 10000    a quarter of an hour for each script

Laptop presets (or --preset paper), random weights, one thread, seconds of the processor, batches of one image (`size`)
or of 32 (`images`). The memory of a step is its peak beyond its start (Linux). Beyond what is measured, `images` is
proportional: every image is decoded, computed and kept once, and a step does not depend on their number.
"""

import argparse
import os
import tempfile
import time

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch

import torch

import kernels
from common import backbones, cache, runtime
from tests import bench_methods
from tests.bench_omniad import peak

NAMES = ("onenip", "omniad", "roads", "cada")


def grow_with_size(args):
    print("| | " + " | ".join(f"{size} px: step, scoring ms; step MiB" for size in args.sizes) + " |")
    print("|---|" + "---|" * len(args.sizes))
    for name in args.only.split(","):
        cells = []
        for size in args.sizes:
            both = bench_methods.pair(name, args.preset, 1, image_size=size)
            found = bench_methods.seconds({"step": both.step, "score": both.score}, args.repeat)
            memory = peak(both.step)
            cells.append(f"{1000 * found['step']:.0f}, {1000 * found['score']:.0f}; {memory or 0:.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


class Many:
    """`count` pictures of 32 different ones, as `runtime.precompute` takes them."""

    def __init__(self, count, size):
        self.count, self.pictures = count, bench_methods.images_of(32, size)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        return self.pictures[i % 32]


def grow_with_images(args):
    print("| | images | pixels, MB | features, MB | computed, s | read again, s |")
    print("|---|---|---|---|---|---|")
    for name in args.only.split(","):
        _, Args, presets, own = bench_methods.METHODS[name]
        options = Args(**{**presets[args.preset], "weights": "random", **own})
        features = features_of(name, options)
        for count in args.counts:
            images = Many(count, options.image_size)
            with tempfile.TemporaryDirectory() as folder:
                run = runtime.Run("bench", None, torch.device("cpu"))
                entry = cache.Folder(folder).entry("features", [name, count])
                seconds = []
                for _ in range(2):
                    began = time.process_time()
                    batch_size, share = runtime.frozen_batch(run.device), options.memory_share
                    found = runtime.precompute(run, features, images, batch_size, share, entry=entry)
                    seconds.append(time.process_time() - began)
            pixels = count * 3 * options.image_size**2 / 1e6
            rows = 0 if found is None else found.nbytes / 1e6
            cells = f"{count:,} | {pixels:.0f} | {rows:.0f} | {seconds[0]:.1f} | {seconds[1]:.1f}"
            print(f"| {name} | {cells} |", flush=True)


def features_of(name, options):
    if name == "onenip":
        return bench_methods.onenip.Features(options.backbone, "random", options.image_size)
    return backbones.Pyramid(options.backbone, "random", options.image_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("size", "images"))
    parser.add_argument("--only", default=",".join(NAMES), help="methods, separated by commas")
    parser.add_argument("--preset", choices=("laptop", "paper"), default="laptop")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384, 512], help="sides of the images")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="numbers of images")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels.set_backend("torch")
    if args.what == "size":
        grow_with_size(args)
    else:
        grow_with_images(args)


if __name__ == "__main__":
    main()
