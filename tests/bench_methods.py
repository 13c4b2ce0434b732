"""How much faster our steps and our scoring are than the published form, transcribed literally (tests/published.py).

    python -m tests.bench_methods                      both tables: some ten minutes of one core
    python -m tests.bench_methods laptop --repeat 9    one of them
    python -m tests.bench_methods paper --only roads,cada --profile    and where our step's time goes

One process, one thread, random weights. Both forms take turns; a number is the median of --repeat times in seconds of
the processor, for --batch-size images. `paper`: the paper's models at 256 px. `laptop`: the presets, at their own size.
A step is forward pass, loss, backward pass, clipping, optimiser. Ours takes its frozen features from memory, as the
scripts do; the published form computes them. The making of pseudo-anomalies and shifted views is in neither. Scoring is
from pixels to maps and image scores. Ours is in float32 as well: --amp makes it faster where the processor has bf16.
"""

import argparse
import os
import statistics
import time
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch

import torch
from torch import nn

import cada
import kernels
import omniad
import onenip
import roads
from common import backbones, runtime
from tests import published

RUN = runtime.Run("bench", None, torch.device("cpu"))


def images_of(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def samples_of(n):
    return [SimpleNamespace(image=f"{i}.png", cls="class0", label=0, defect="good") for i in range(n)]


class Pair:
    """A method in both forms, with the same weights.

    ours, theirs: models. loss, their_loss, score, their_score: functions of no arguments.
    """

    clip = 0.0

    def __init__(self, args, n):
        self.args, self.n = args, n
        torch.manual_seed(0)
        self.images = images_of(n, args.image_size)
        self.build()

    def frozen(self, features, images):
        """Rows as `runtime.Frozen` keeps them, and the function that gives a batch of them."""
        rows = features(images)
        index = torch.arange(len(images))
        return lambda: features.split(rows[index].float())

    def score(self):
        self.ours.eval()
        return self.scorer(self.images, samples_of(self.n))

    def step(self):
        self.finish(self.loss(), self.ours, self.optimizer, foreach=True)

    def their_step(self):
        self.finish(self.their_loss(), self.theirs, self.their_optimizer)

    def finish(self, loss, model, optimizer, foreach=None):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip, foreach=foreach)
        optimizer.step()


class OneNIP(Pair):
    def build(self):
        args, n = self.args, self.n
        features = onenip.Features(args.backbone, args.weights, args.image_size)
        self.ours = onenip.OneNIP(features.channels, features.side, args)
        self.theirs = published.OneNIP(self.ours, args)
        self.optimizer = onenip.optimizer_of(self.ours, args)
        parameters = self.theirs.body.parameters()
        self.their_optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
        self.clip = args.clip
        self.triple = self.images, images_of(n, args.image_size, 1), images_of(n, args.image_size, 2)
        self.batches = [self.frozen(features, images) for images in self.triple]
        self.mask = torch.zeros(n, args.image_size, args.image_size)
        self.mask[:, 20:50, 20:50] = 1
        prompt = features(self.triple[2][:1])
        state = {"classes": ["class0"], "prompts": prompt, "scale": 3.0}
        self.scorer = onenip.Scorer(args, RUN, features, self.ours, state)
        self.prompts = self.triple[2][:1].repeat(n, 1, 1, 1)

    def loss(self):
        self.ours.train()
        return onenip.losses(self.ours, *(batch() for batch in self.batches), self.mask, self.args)[0]

    def their_loss(self):
        return self.theirs.train().loss(*self.triple, self.mask)

    def their_score(self):
        return self.theirs.eval().score(self.images, self.prompts, 3.0)


class OfMaps(Pair):
    """What the methods on a pyramid of maps share."""

    def their_loss(self):
        self.theirs.train()
        return self.theirs.loss(self.images)

    def their_score(self):
        self.theirs.eval()
        return self.theirs.score(self.images)

    def pyramid(self):
        args = self.args
        features = backbones.Pyramid(args.backbone, args.weights, args.image_size)
        self.batch = self.frozen(features, self.images)
        return features


class OmniAD(OfMaps):
    def build(self):
        args, features = self.args, self.pyramid()
        self.ours = omniad.OmniAD(features.channels, args)
        self.theirs = published.OmniAD(self.ours, args)
        self.optimizer = omniad.optimizer_of(self.ours, args)
        groups = [{"params": [p for p in self.theirs.parameters() if (p.ndim > 1) == decays],
                   "weight_decay": args.weight_decay * decays} for decays in (True, False)]
        self.their_optimizer = torch.optim.AdamW(groups, lr=args.lr)
        self.clip = args.clip
        self.scorer = omniad.Scorer(args, RUN, features, self.ours)

    def loss(self):
        self.ours.train()
        return omniad.losses(self.ours, self.batch(), self.ours.scale, self.args)[0]


class ROADS(OfMaps):
    def build(self):
        args, features = self.args, self.pyramid()
        names = [f"class{i}" for i in range(15)]
        self.ours = roads.ROADS(features.channels, len(names), args)
        self.theirs = published.ROADS(self.ours, args)
        self.optimizer = roads.optimizer_of(self.ours, args)
        self.their_optimizer = torch.optim.Adam(self.theirs.parameters(), lr=args.lr, betas=(0.5, 0.999))
        self.scorer = roads.Scorer(args, RUN, features, self.ours, names)
        size = args.adapter_size or args.image_size
        self.view = roads.resized(self.images, size)
        self.more = self.view, 255 - self.view, torch.zeros(self.n, dtype=torch.long)

    def loss(self):
        self.ours.train()
        view, shifted, class_number = self.more
        return roads.losses(self.ours, self.batch(), view, class_number, shifted, self.args)[0]

    def their_loss(self):
        self.theirs.train()
        return self.theirs.loss(self.images, *self.more)


class CADA(OfMaps):
    def build(self):
        args, features = self.args, self.pyramid()
        self.ours = cada.RevDist(args, features.channels, features.sides)
        calibration = cada.Calibration(args, self.ours.phi_channels, ["class0"]).eval()
        self.theirs = published.CADA(self.ours, calibration, args)
        self.optimizer = self.ours.optimizer(args)
        parameters = self.theirs.model.parameters()  # (the head is not trained here)
        self.their_optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
        base = cada.Trained(args, RUN, features, self.ours)
        self.scorer = cada.Scorer(args, RUN, base, calibration)

    def loss(self):
        self.ours.train()
        return cada.losses(self.ours, self.batch(), None, 0.5, self.args)[0]


PUBLISHED_MAP = {"norm_power": 0.0}
METHODS = {
    "onenip": (OneNIP, onenip.Args, onenip.PRESETS, PUBLISHED_MAP),
    "omniad": (OmniAD, omniad.Args, omniad.PRESETS, PUBLISHED_MAP),
    "roads": (ROADS, roads.Args, roads.PRESETS, {"adapter_weights": "random", **PUBLISHED_MAP}),
    "rd4ad": (ROADS, roads.Args, roads.PRESETS, {"prompts": False, "adapter": "none", **PUBLISHED_MAP}),
    "cada": (CADA, cada.Args, cada.RECIPES["revdist"], PUBLISHED_MAP),
}
TITLES = {
    "onenip": "`onenip.py`",
    "omniad": "`omniad.py`",
    "roads": "`roads.py`",
    "rd4ad": "`roads.py --no-prompts --no-adapter` (RD4AD)",
    "cada": "`cada.py` (reverse distillation, calibrated)",
}


def pair(name, preset, n, **changes):
    """A method in both forms; n: images of a batch. changes: options."""
    kind, Args, presets, own = METHODS[name]
    values = {**presets[preset], "weights": "random", "amp": "off", **own}
    if preset == "paper":
        values["image_size"] = 256
    return kind(Args(**{**values, **changes}), n)


def seconds(functions, repeat):
    """{name: function} -> {name: median of the processor's seconds}, called in turn."""
    taken = {name: [] for name in functions}
    for i in range(repeat + 1):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if i:  # the first warms up
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def line(name, preset, n, repeat):
    """One row of the table, in Markdown."""
    both = pair(name, preset, n)
    step = seconds({"theirs": both.their_step, "ours": both.step}, repeat)
    score = seconds({"theirs": both.their_score, "ours": both.score}, repeat)
    cells = [TITLES[name]]
    for found in (step, score):
        cells += [f"{1000 * found['theirs']:.0f}", f"{1000 * found['ours']:.0f}"]
        cells.append(f"{found['theirs'] / found['ours']:.2f}")
    return f"| {' | '.join(cells)} |"


def profile(name, preset, n):
    both = pair(name, preset, n)
    both.step()
    with torch.profiler.profile() as found:
        for _ in range(5):
            both.step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", default=["paper", "laptop"], metavar="paper|laptop")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--repeat", type=int, default=5, help="times of each form, after one to warm up")
    parser.add_argument("--batch-size", type=int, default=0, help="default: paper 2, laptop 4 (training batch)")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels.set_backend("torch")
    for table in args.tables:
        n = args.batch_size or {"paper": 2, "laptop": 4}[table]
        if not args.profile:
            print(f"\n{table} preset, batch of {n}, one thread, ms of the processor, torch {torch.__version__}\n")
            print("| | step, published | ours | ratio | scoring, published | ours | ratio |")
            print("|---|---|---|---|---|---|---|")
        for name in args.only.split(","):
            if args.profile:
                profile(name, table, n)
            else:
                print(line(name, table, n, args.repeat), flush=True)


if __name__ == "__main__":
    main()
