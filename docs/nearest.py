"""Nearest neighbour: the simplest honest detector, and the template of a script.

Nothing is trained. Patches of the good training images, as a frozen network describes them, are
kept in a memory; a patch of a test image is as anomalous as it is far from the nearest of them.

    image (B,3,224,224) ──frozen EfficientNet-Lite0──> f2 (B,40,28,28), f3 (B,112,14,14)
      F = f2 and f3 resized to it, joined (B,152,28,28);   memory (classes, 8000, 152)
      distance of each position of F to its nearest neighbour in the memory (B,28,28)
      map = distance, resized to 224, Gaussian σ = 4;   image score = the largest distance

    --memory class   an image is compared with its own class: somebody must tell the class
    --memory all     with all classes at once: one detector for all, as those of the four scripts

Commands
    python -m docs.nearest                          embedded data, one memory for each class: about a
                                                    minute, I-AUROC 87.5, P-AUROC 92.1; mixed 78.6
    python -m docs.nearest --memory all             the same as one detector for all classes
    python -m docs.nearest --average 3 --data FOLDER        your images, in MVTec layout. Five real
                                                    classes (docs/measured.md): I-AUROC 87.9, P-AUROC 94.5,
                                                    P-AP 50.3; mixed 82.6

The table's last two lines are the "mixed" problem: inside a class the scores order good and defective
images well, but a score that is normal for one class is a defect's in another, so that in one pool of
all classes (*mixed*) fewer pairs are in order than on average within a class (*mean*).

The idea is SPADE's and PatchCore's (Cohen & Hoshen, 2020; Roth et al., CVPR 2022), without the latter's
choice of patches and weights: here they are drawn by chance.
"""

from dataclasses import dataclass

from common.options import BACKBONES, Options, before_torch, option

# ----------------------------------------------------------------------------------------- options


@dataclass
class Args(Options):
    image_size: int = option(
        224, "images are resized to this square; a multiple of 16", group="data", low=32
    )
    backbone: str = option(
        "efficientnet_lite0", "frozen feature extractor", group="model", choices=BACKBONES
    )
    weights: str = option(
        "",
        "file of the backbone's weights, or 'random' (default: the official ones)",
        group="model",
    )
    average: int = option(
        1,
        "features are averaged over windows of this side first, as in PatchCore; odd; 1: not",
        group="model",
        low=1,
    )
    patches: int = option(8000, "patches remembered of each class", group="model", low=1)
    memory: str = option(
        "class",
        "what an image is compared with: its own class's patches, or those of all classes",
        group="model",
        choices=("class", "all"),
    )
    batch_size: int = option(4, "images at a time", group="scoring", low=1)
    sigma: float = option(
        4.0,
        "Gaussian smoothing of the map, in pixels; 0: none",
        group="scoring",
        low=0.0,
        high=100.0,
    )


PRESETS = {"paper": {}, "laptop": {}}  # there is nothing to make smaller

if __name__ == "__main__":
    before_torch(Args, PRESETS, __doc__)

import torch
import torch.nn.functional as F
from torch import nn

from common import UsageError, backbones, report, runtime, thresholds
from common.maps import gaussian

# ------------------------------------------------------------------------------------------- model


class Features(nn.Module):
    """The frozen network: uint8 images (B, 3, S, S) -> F (B, C, S/8, S/8)."""

    def __init__(self, args):
        super().__init__()
        stages = backbones.pyramid_stages(args.backbone)[1:]  # of strides 8 and 16
        self.pyramid = backbones.Pyramid(args.backbone, args.weights, args.image_size, stages)
        self.channels = sum(self.pyramid.channels)
        self.average = nn.AvgPool2d(args.average, stride=1, padding=args.average // 2)

    def forward(self, images):
        f2, f3 = self.pyramid.maps(images)  # (B, C2, h, w), (B, C3, h/2, w/2)
        f2, f3 = self.average(f2), self.average(f3)
        f3 = F.interpolate(f3, f2.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([f2, f3], dim=1)  # (B, C2 + C3, h, w)


class Memory(nn.Module):
    """Patches of normal images: .patches (classes, M, C), of which a class number chooses M."""

    def __init__(self, n_classes, count, channels):
        super().__init__()
        self.register_buffer("patches", torch.zeros(n_classes, count, channels))

    def distance(self, patches, class_number):
        """Of each patch (n, C) to its nearest neighbour in one class's memory: (n,)."""
        return torch.cdist(patches, self.patches[class_number]).amin(1)  # (n, M) -> (n,)


# ----------------------------------------------------------------------------------- "training"


def fill(args, run, features, memory, images, class_names):
    """Fill the memory with patches of the training images. Returns the finished checkpoint state."""
    job = runtime.Training(run, args, memory, None, schedule="constant")
    if job.finished:  # only the evaluation is missing
        return job.resumed
    job.contents |= {"classes": class_names}
    for number, name in enumerate(run.progress(class_names, "memory")):
        of_class = [i for i, sample in enumerate(images.samples) if sample.cls == name]
        memory.patches[number] = patches_of(args, run, features, images, of_class)
    score = Scorer(args, run, features, memory, class_names)
    # these images' own patches are in the memory, so their scores are a little too low
    return job.finish(**thresholds.of_training_images(run, args, score, images.samples, images))


def patches_of(args, run, features, images, indices):
    """--patches patches of these images, (M, C), drawn by chance from all places of all of them.

    If there are fewer, they are repeated, which moves no nearest neighbour.
    """
    places = (args.image_size // 8) ** 2
    torch.manual_seed(args.seed)  # the same whatever other classes there are, and on every rank
    order = torch.randperm(len(indices) * places)
    chosen = order.repeat(-(-args.patches // len(order)))[: args.patches]
    chosen = chosen.sort().values
    found = []
    for first in range(0, len(indices), args.batch_size):  # not all at once: they may be gigabytes
        batch = torch.stack([images[i] for i in indices[first : first + args.batch_size]])
        patches = features(run.to_device(batch)).flatten(2).transpose(1, 2)  # (B, h w, C)
        here = chosen - first * places
        here = here[(here >= 0) & (here < len(batch) * places)]
        found.append(patches.flatten(0, 1)[here.to(run.device)])  # (B, h w, C) -> (B h w, C)
    return torch.cat(found)


# ----------------------------------------------------------------------------------------- scoring


class Scorer:
    """The memory as a function (images, samples) -> (maps (B, S, S), image scores (B,))."""

    def __init__(self, args, run, features, memory, class_names):
        self.args, self.run, self.features, self.memory = args, run, features, memory
        self.class_names = class_names

    def __call__(self, images, samples):
        anomaly, scores, _ = self.described(images, samples)
        return anomaly, scores

    @torch.no_grad()
    def described(self, images, samples):
        """The same, and F averaged over its positions, (B, C), for CADA."""
        features = self.features(images)  # (B, C, h, w)
        distances = []
        for f, sample in zip(features, samples):  # f: (C, h, w)
            patches = f.flatten(1).T  # (C, h, w) -> (h w, C)
            nearest = [self.memory.distance(patches, c) for c in self.compared_with(sample)]
            distances.append(torch.stack(nearest).amin(0).unflatten(0, f.shape[1:]))  # (h, w)
        distance = torch.stack(distances)[:, None]  # (B, 1, h, w)
        size = (self.args.image_size, self.args.image_size)
        anomaly = F.interpolate(distance, size, mode="bilinear", align_corners=False)[:, 0]
        anomaly = gaussian(anomaly, self.args.sigma)
        return anomaly, distance.amax((1, 2, 3)), features.mean((2, 3))

    def compared_with(self, sample):
        """The class numbers whose memories an image is compared with."""
        if self.args.memory == "all":
            return range(len(self.class_names))
        if sample.cls not in self.class_names:
            raise UsageError(
                f"--memory class: nothing is remembered of class '{sample.cls}', only of "
                f"{', '.join(self.class_names)}; --memory all needs no class"
            )
        return [self.class_names.index(sample.cls)]


# -------------------------------------------------------------------------------------------- main


def main():
    args = runtime.parse(Args, PRESETS, __doc__, method="nearest")
    check(args)
    run = runtime.start(args, "nearest")
    state = run.checkpoint_to_evaluate(args)
    if state and args.average != state["args"]["average"]:
        raise UsageError(
            f"--average {args.average}: the memory in {args.eval} is of --average "
            f"{state['args']['average']}; leave that option out"
        )
    runtime.check_normal_score(args, state, ("image_size", "memory", "sigma"))
    dataset, images = runtime.training_data(run, args)
    check_test_images(args, dataset)
    class_names = state["classes"] if state else dataset.classes
    features = run.rank0_first(Features, args).to(run.device)
    memory = Memory(len(class_names), args.patches, features.channels).to(run.device)
    if state:
        runtime.load_model(memory, state["model"], args.eval)
    run.open(args)
    if not state:
        state = fill(args, run, features, memory, images, class_names)
    score = Scorer(args, run, features, memory, class_names)
    if args.predict:
        normal, pixel = state["normal_score"], state["pixel_threshold"]
        return report.predict(run, args, score, normal, pixel_threshold=pixel)
    if not dataset.test:
        return thresholds.without_test_images(run, args, dataset, score, state)
    report.evaluate(
        run,
        args,
        dataset,
        score,
        setting=setting_of(args, features),
        seconds=state["seconds"],
        described=score.described,
    )


def check(args):
    """What single options cannot check about themselves."""
    if args.image_size % 16:
        raise UsageError(f"--image-size {args.image_size}: must be a multiple of 16")
    if args.average % 2 == 0:
        raise UsageError(f"--average {args.average}: must be odd")
    if args.predict and args.memory == "class":
        raise UsageError(
            "--predict: nobody knows the class of these images; give the checkpoint of a run with "
            "--memory all"
        )


def check_test_images(args, dataset):
    if dataset and not dataset.test and args.memory == "class":
        raise UsageError("--memory class: without test images take --memory all, for --predict")


def setting_of(args, features):
    """What stands above the table."""
    return {
        "image size": args.image_size,
        "backbone": f"{args.backbone} ({features.pyramid.backbone.weights_note})",
        "features averaged": f"{args.average}x{args.average}" if args.average > 1 else "not",
        "patches": f"{args.patches} of each class",
        "memory": args.memory,
        "smoothing": f"Gaussian, sigma {args.sigma:g}" if args.sigma else "none",
        "image score": "the largest distance",
    }


if __name__ == "__main__":
    runtime.launch(main)
