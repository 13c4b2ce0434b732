"""CADA: absolute-unified multi-class anomaly detection via class-agnostic distribution alignment (2024).

https://arxiv.org/abs/2404.00724 · one file: the calibration, three bases, their training, scoring.

The idea. One detector for many classes gives normal images of one class higher scores than those of another, so that no
threshold serves all: its class-wise AUROC is high, that of all images in one pool is not. CADA predicts, from a feature
of the image, which mean and which maximum the anomaly map of a *normal* image of this kind has, and shifts and scales
the map by them. No class label is needed, neither in training nor at test. The base is not touched.

    image (B,3,256,256) ──frozen Wide-ResNet-50-2──> f1 (B,256,64,64), f2 (B,512,32,32), f3 (B,1024,16,16)
      neck    f1 ──/4──, f2 ──/2──, f3 ──concat──3 bottleneck blocks, /2──> φ (B,2048,8,8)           (stage 1: the base,
      decoder φ ──x2──> f̂3 ──x2──> f̂2 ──x2──> f̂1                                                     here RevDist)
      map     M (B,256,256) = mean over scales of 1 - cos(f̂ᵢ, fᵢ)
              its own mean u and maximum γ: of each training image, the targets of stage 2
      head    φ ──1x1 convolution, mean over positions, 2 linear layers──> expected û, γ̂ (B,)         (stage 2, Fig. 3)
      calibrated map (M - û) / (γ̂ - û), smoothed by 5x5 pixels;   image score = mean of its highest 1 %      (Eq. 5)

    --base       φ, what the head reads                      M, and what the base learns
    revdist      neck of the frozen maps                     3 cosine maps; cosine distance
    recontrast   neck, the half of the frozen encoder        6 cosine maps; a second encoder is trained: cross pairs,
                                                             easy places get no gradient
    uniad        encoder tokens (B,256,14,14)                mean over channels of (F̂ - F)²; the same as loss

Reading order. The paper's method is the section "calibration": functions for Eqs. 1, 3, 4 and 5, the head, and what is
expected of an image (Eq. 2). How the head is trained: `train_calibration`. How maps are scored: `Scorer`. The bases are
three detectors of others, to be read when their turn comes: `RevDist` first.

Commands
    python cada.py                               embedded data, small model, about three minutes on one core:
                                                 I-AUROC 87.1 as mean over classes, 86.9 in one pool (88.0 and 73.9
                                                 without calibration; three seeds, README)
    python cada.py --base uniad                  another base (--base uniad --help shows the values of that base)
    python cada.py --data mvtec                  the paper's model and schedule (5,000 + 5,000 steps: a GPU)
    torchrun --nproc_per_node=8 cada.py --data mvtec --batch-size 2 --calibration-batch 2
                                                 the same on 8 GPUs: 16 images a step
    python cada.py --eval runs/cada-mvtec/checkpoint.pt --calibrate given --out runs/cada-a
                                                 keeps the base and does stage 2 again, as for every option of the
                                                 group "calibration" (Tables 3, 4 and 5; with --statistic score also
                                                 --score and --smoothing)
    python cada.py --base-run runs/onenip-mvtec --out runs/cada-onenip
                                                 calibrates what another script's run kept by --save-maps
    Beside the common files: calibration.json (one threshold for the pool, with the best F1 or with 5 % false alarms,
    and what it does to each class, with and without calibration; the correlations of departure 11) and, in pictures/,
    distributions.png (Fig. 5), pixels.png (the same of pixels), changed.png (Fig. 6).

Where this file differs from the paper (P), which has no public code, or from its authors' other code (C), and why
  1. What the head reads: P names the bottleneck twice and the pre-trained encoder once. Here the bottleneck φ; for
     UniAD, which has none, the output of its transformer's encoder.
  2. The head: a convolution that keeps the channels (1x1, as P stresses the small cost; --head-kernel 3), batch norm,
     ReLU, mean over positions, linear to 256, ReLU, linear; dropout before each linear layer. P names neither pooling
     nor norm nor activation. Without a convolution the pooled feature is normalised by its batch statistics instead,
     and divided by √C: at P's rate SGD diverges on features whose squared norm is large, as that of 512 channels is.
  3. Targets: u and γ of the map before smoothing, base in evaluation mode; calibration before smoothing, as C does.
     Smoothing pads with zeros, as C does, after û was subtracted: so, against what P says, calibration is not
     order-preserving inside a class (--padding reflect). And it lowers a map's maximum, in one class more than in
     another, while the image score is a mean of many pixels: --statistic score (not in P) takes the image score of the
     smoothed map for γ, so that this is what is calibrated.
  4. γ̂ - û is at least the smallest γ - u of a training image; metrics.json says how often it was not ("clamped").
  5. (u, σ), --statistic std: the head predicts û and σ̂; u + 3σ stands for γ in loss and calibration, as P's text says.
  6. RevDist and ReContrast: flattened cosine per image as in C, not per location as in reverse distillation's paper
     (--cosine location). No GELU ends RevDist's stages where the backbone's maps have negative values (EfficientNet).
     ReContrast follows C's newest script (amsgrad, eps 1e-10: steadier; when P was written it had neither), encoder's
     batch norm in evaluation mode.
     UniAD's map is the mean over channels of the squared error, resized with corners not aligned, as in C (Dinomaly's
     evaluation of UniAD); UniAD's own code takes the norm, with corners aligned.
  7. Learning rate x 0.2 at 80 % of the steps from C (UniAD: x 0.1, and its clipping at 0.1, from UniAD's code).
  8. Maps of --base-run are divided by the mean maximum of the training images, so that α and the learning rate of the
     head suit every method. Calibration undoes it; no metric depends on it.
  9. --norm-power p (not in P, off in its preset) weighs a cosine distance by the root mean square of the target's
     channels there, to the power p. (Three of ReContrast's six targets are maps of the encoder that it trains.) On a
     plain background these are small and their direction is mostly noise, which no decoder rebuilds: without a weight
     it outshines the object.
 10. Masks by the rule "any" in the paper's preset, since C has them so.
 11. Reported in addition: the correlation of the expected γ̂ and the image's own γ inside a class; 0 if the head knows
     the class alone. One that follows the image might cancel anomalies; on seven real classes it helps, since good
     images of one class differ, too (docs/measured.md).

Paper, MVTec AD, RevDist + CADA (without), 256 px: mean I-AUROC 98.2 (97.8), P-AUROC 96.1 (96.4); all classes in one
pool 98.0 (85.0) and 95.6 (94.5).
"""

import argparse
import csv
import dataclasses
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

from common import UsageError
from common.options import BACKBONES, Options, before_torch, option

# ----------------------------------------------------------------------------------------- options

# What each base changes of the defaults below, in the two presets.
RECIPES = {
    "revdist": {
        "paper": dict(mask_rule="any"),
        # For two CPU cores: a smaller backbone (the model's widths follow), picture and depth, and
        # many small steps; likewise below. Loss, statistic and steps of the head were chosen on a
        # second drawing of the embedded data (docs/measured.md).
        "laptop": dict(
            image_size=192,
            backbone="efficientnet_lite0",
            depths="1,1,1,1",
            steps=2000,
            batch_size=4,
            lr=5e-3,
            schedule="cosine",
            cosine="location",
            norm_power=0.25,
            statistic="score",
            calibration_steps=500,
            calibration_schedule="cosine",
            amp="auto",
        ),
    },
    "recontrast": {
        "paper": dict(mask_rule="any"),
        "laptop": dict(
            image_size=160,
            backbone="efficientnet_lite0",
            depths="1,1,1,1",
            steps=1000,
            batch_size=4,
            schedule="cosine",
            calibration_steps=2000,
            calibration_schedule="cosine",
            amp="auto",
        ),
    },
    "uniad": {
        "paper": dict(
            mask_rule="any",
            image_size=224,
            backbone="efficientnet_b4",
            steps=50_000,
            batch_size=64,
            lr=3e-4,
            weight_decay=1e-4,
            lr_drop=0.1,
            clip=0.1,
            alpha=10.0,
            calibration_steps=20_000,
        ),
        "laptop": dict(
            image_size=160,
            backbone="efficientnet_lite0",
            hidden=192,
            heads=4,
            mlp=384,
            layers=1,
            init="pca",
            steps=2000,
            attention_dropout=0.0,
            jitter=2.0,
            batch_size=4,
            lr=2e-3,
            weight_decay=1e-4,
            clip=0.1,
            schedule="cosine",
            alpha=10.0,
            calibration_steps=2000,
            calibration_schedule="cosine",
            amp="auto",
        ),
    },
}
RECIPE_OF_A_RUN = {  # --base-run, whose maps are smoothed already
    "paper": dict(smoothing=0),
    "laptop": dict(smoothing=0, calibration_steps=2000, calibration_schedule="cosine"),
}


@dataclass
class Args(Options):
    image_size: int = option(
        256,
        "images are resized to this square; a multiple of 32 (UniAD: of 16), at least 64",
        group="data",
        low=64,
    )
    contaminate: float = option(
        0.0,
        "share of each class's defective test images moved to training, unlabelled "
        "(Table 5's noisy data)",
        group="data",
        low=0.0,
        high=0.9,
    )
    fix_threshold: float = option(
        0.0,
        "share of each class's training images that neither stage sees: the one threshold that "
        "the report then fixes on them alone",
        group="data",
        low=0.0,
        high=0.9,
    )
    base: str = option(
        "revdist", "the detector that is calibrated", group="model", choices=tuple(RECIPES)
    )
    base_run: str = option(
        "",
        "in place of a base: folder of a finished run of another script with --save-maps",
        group="model",
    )
    backbone: str = option(
        "wide_resnet50_2", "frozen feature extractor", group="model", choices=BACKBONES
    )
    weights: str = option(
        "",
        "file of the backbone's weights, or 'random' (default: the official ones)",
        group="model",
    )
    depths: str = option(
        "3,3,4,6",
        "blocks of the neck and of the decoder's three stages (RevDist, ReContrast)",
        group="model",
    )
    hidden: int = option(
        256,
        "width of UniAD's transformer; a multiple of --heads and of 2",
        group="model",
        low=8,
    )
    heads: int = option(8, "UniAD's attention heads", group="model", low=1)
    mlp: int = option(1024, "width of UniAD's MLPs", group="model", low=1)
    layers: int = option(
        4, "UniAD's encoder layers, and as many decoder layers", group="model", low=1
    )
    attention_dropout: float = option(
        0.1, "dropout in UniAD's attention and MLPs", group="training", low=0.0, high=0.9
    )
    jitter: float = option(
        20.0, "scale of the noise on UniAD's training features", group="training", low=0.0
    )
    init: str = option(
        "xavier",
        "start of UniAD's first and last layer: random (xavier), or to the principal axes of the "
        "training images' features and back (pca)",
        group="training",
        choices=("xavier", "pca"),
    )
    steps: int = option(
        5000, "training steps of the base; 0: untrained", group="training", low=0
    )
    batch_size: int = option(16, "training images a step and process", group="training", low=1)
    lr: float = option(2e-3, "AdamW's learning rate", group="training", low=0.0)
    encoder_lr: float = option(
        1e-5, "that of ReContrast's trainable encoder", group="training", low=0.0
    )
    schedule: str = option(
        "step",
        "learning rate: x --lr-drop after 80 % of the steps, or one cosine after a warm-up of 5 %",
        group="training",
        choices=("step", "cosine"),
    )
    lr_drop: float = option(
        0.2, "factor of the learning rate after 80 % of the steps", group="training", low=0.0
    )
    weight_decay: float = option(1e-5, "AdamW's weight decay", group="training", low=0.0)
    clip: float = option(
        0.0, "largest norm of the gradient; 0: no limit", group="training", low=0.0
    )
    cosine: str = option(
        "flat",
        "RevDist's loss: one cosine of each image's flattened map, or one per location",
        group="training",
        choices=("flat", "location"),
    )
    # of this group, and not of "scoring": it changes M, so u and γ, so stage 2 must be done again
    norm_power: float = option(
        0.0,
        "a distance on the map counts by the magnitude of the teacher's features there, to this "
        "power; 0: not at all, as in the paper",
        group="calibration",
        low=0.0,
        high=2.0,
    )
    calibrate: str = option(
        "cada",
        "none; given: statistics of the true class (CaDA-A); classifier: of the predicted class "
        "(CaDA-B); cada: predicted statistics (Table 4)",
        group="calibration",
        choices=("none", "given", "classifier", "cada"),
    )
    regressor: str = option(
        "1+2",
        "convolutions + linear layers of the head (Table 3)",
        group="calibration",
        choices=("0+1", "0+2", "0+3", "1+2", "2+2"),
    )
    head_kernel: int = option(
        1, "size of the head's convolutions", group="calibration", choices=(1, 3)
    )
    dropout: float = option(
        0.25,
        "dropout before each linear layer of the head (Table 3)",
        group="calibration",
        low=0.0,
        high=0.95,
    )
    statistic: str = option(
        "max",
        "γ, what stands for the top of a normal map: its maximum, mean + 3 standard deviations "
        "(Table 5), or the image score as --smoothing and --score make it",
        group="calibration",
        choices=("max", "std", "score"),
    )
    refit: bool = option(
        False,
        "with --eval: do stage 2 again, on the training images of --data, whatever they are",
        group="calibration",
    )
    alpha: float = option(
        0.1,
        "where the head's smooth L1 loss turns from square to absolute",
        group="calibration",
        low=1e-6,
    )
    calibration_steps: int = option(
        5000, "training steps of the head", group="calibration", low=1
    )
    calibration_batch: int = option(
        16, "training images a step and process, for the head", group="calibration", low=2
    )
    calibration_lr: float = option(
        5e-2, "SGD's learning rate for the head", group="calibration", low=0.0
    )
    calibration_schedule: str = option(
        "constant",
        "that learning rate: constant, or one cosine after a warm-up of 5 %",
        group="calibration",
        choices=("constant", "cosine"),
    )
    smoothing: int = option(
        5,
        "side of the Gaussian window on the map, sigma 4; odd; 0: none",
        group="scoring",
        low=0,
    )
    padding: str = option(
        "zeros",
        "what the window sees beyond the map's edge: zeros, as the authors' other code has it, or "
        "the map reflected",
        group="scoring",
        choices=("zeros", "reflect"),
    )
    score: str = option(
        "top1",
        "image score: the map's maximum, or the mean of its highest 0.1, 1 or 2 % (Table 3)",
        group="scoring",
        choices=("max", "top0.1", "top1", "top2"),
    )


def presets():
    """Both presets of the base that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--base", nargs="?", default="revdist")
    parser.add_argument("--base-run", nargs="?")
    known, _ = parser.parse_known_args()
    if known.base_run:
        return RECIPE_OF_A_RUN
    if known.base is not None and known.base not in RECIPES:
        raise UsageError(f"--base {known.base}: unknown; choose one of {', '.join(RECIPES)}")
    return RECIPES[known.base or "revdist"]


if __name__ == "__main__":
    before_torch(Args, presets, __doc__)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import kernels
from common import backbones, data, metrics, options, pages, papers, pictures, report, runtime
from common import thresholds
from common.folder import read_json
from common.maps import gaussian_window, image_score, name_of_power, name_of_rule

# ------------------------------------------------------------------------------------- calibration
#
# Two kinds of statistics, everywhere in this file: an image's *own* u and γ, of its map; and the
# *expected* û and γ̂, of the map that a normal image of its kind would have.


def map_statistics(maps, args):
    """The own u and γ of each image's map M (§3.3): the targets of stage 2.

    maps: (B, S, S) before smoothing. Returns two (B,).
    """
    u = maps.mean((1, 2))
    if args.statistic == "max":
        gamma = maps.amax((1, 2))
    elif args.statistic == "std":
        gamma = u + 3 * maps.flatten(1).std(1, correction=0)  # (B, S, S) -> (B, S²)
    else:
        _, gamma = smoothed(maps, args)
    return u, gamma


def class_statistics(u, gamma, label, classes, statistic):
    """u_c and γ_c of Eq. 1: what is expected of a class, the means over its training images.

    With --statistic std γ_c = u_c + 3 σ_c, σ_c over all pixels of the class's maps.
    u, gamma: (N,) own statistics. label: (N,) class numbers. Returns (len(classes), 2).
    """
    rows = []
    for c in range(len(classes)):
        u_of_class, gamma_of_class = u[label == c], gamma[label == c]
        u_c, gamma_c = u_of_class.mean(), gamma_of_class.mean()  # of Eq. 1
        if statistic == "std":
            sigma = (gamma_of_class - u_of_class) / 3  # of each image, about its own mean
            variance = sigma.square().mean() + u_of_class.var(correction=0)
            gamma_c = u_c + 3 * variance.sqrt()
        rows.append(torch.stack([u_c, gamma_c]))
    return torch.stack(rows)


def regression_loss(u_hat, gamma_hat, u, gamma, alpha):
    """Eq. 3: smooth L1 of the expected against the own statistics, all (B,); each term is Eq. 4."""
    loss_u = F.smooth_l1_loss(u_hat, u, beta=alpha)  # Eq. 4
    loss_gamma = F.smooth_l1_loss(gamma_hat, gamma, beta=alpha)  # Eq. 4
    return loss_u + loss_gamma  # Eq. 3


def calibrate(maps, u_hat, gamma_hat, floor=1e-6):
    """Eq. 5: maps (B, S, S), û and γ̂ (B,) -> (M - û) / (γ̂ - û). With those of Eq. 1: CaDA-A
    and CaDA-B.

    floor: γ̂ - û is at least this.
    """
    width = (gamma_hat - u_hat).clamp(min=floor)
    return (maps - u_hat[:, None, None]) / width[:, None, None]  # Eq. 5


def smoothed(maps, args):
    """Maps, calibrated or not, (B, S, S) -> the same smoothed, and their image scores (B,)."""
    maps = gaussian_window(maps, args.smoothing, padding=args.padding)
    return maps, image_score(maps, args.score)


class Head(nn.Module):
    """φ (B, C, h, w) -> (B, outputs): the regressor of CADA (Fig. 3), the classifier of CaDA-B."""

    def __init__(self, channels, outputs, args):
        super().__init__()
        convolutions, linears = map(int, args.regressor.split("+"))
        self.spatial = nn.Sequential()
        for _ in range(convolutions):
            self.spatial.append(head_convolution(channels, args.head_kernel))
        self.norm = nn.Identity()
        self.gain = 1.0
        if convolutions == 0:  # normalised features of squared norm 1, not C
            self.norm = nn.BatchNorm1d(channels, affine=False)
            self.gain = channels**-0.5
        widths = [channels] + [256] * (linears - 1) + [outputs]
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Dropout(args.dropout), nn.Linear(c_in, c_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU at the end

    def forward(self, phi):
        x = self.spatial(phi).mean((2, 3))  # (B, C, h, w) -> (B, C)
        return self.layers(self.norm(x) * self.gain)


def head_convolution(channels, size):
    """Convolution that keeps the channels, batch norm, ReLU."""
    layer = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


class Calibration(nn.Module):
    """What is expected of an image: φ (B, C, h, w) and samples -> û, γ̂ (B,), and the number of the
    class that they were taken from, (B,), -1 where they were not."""

    def __init__(self, args, channels, classes):
        super().__init__()
        self.args, self.classes = args, classes
        self.head = None
        if args.calibrate == "cada":
            self.head = Head(channels, 2, args)
        elif args.calibrate == "classifier":
            self.head = Head(channels, len(classes), args)
        self.register_buffer("statistics", torch.zeros(len(classes), 2))  # u_c and γ_c of Eq. 1
        # the smallest γ - u that a training image has: what γ̂ - û is at least
        self.register_buffer("floor", torch.tensor(0.0))

    def forward(self, phi, samples):
        nothing = torch.full((len(phi),), -1, device=phi.device)
        if self.args.calibrate == "none":
            return phi.new_zeros(len(phi)), phi.new_ones(len(phi)), nothing  # leaves M as it is
        if self.args.calibrate == "cada":
            return *expected(self.head(phi), self.args.statistic), nothing
        if self.args.calibrate == "classifier":  # CaDA-B
            chosen = self.head(phi).argmax(1)
        else:  # CaDA-A
            chosen = torch.tensor(self.numbers_of(samples), device=phi.device)
        u_hat, gamma_hat = self.statistics[chosen].unbind(1)
        return u_hat, gamma_hat, chosen

    def numbers_of(self, samples):
        """Class numbers of the samples. Raises UsageError for a class that was not trained."""
        unknown = {sample.cls for sample in samples} - set(self.classes)
        if unknown:
            raise UsageError(
                f"--calibrate given: no statistics of class '{min(unknown)}'; known: "
                f"{', '.join(self.classes)}; --calibrate cada needs no class"
            )
        return [self.classes.index(sample.cls) for sample in samples]


def expected(out, statistic):
    """The regressor's outputs (B, 2) -> û and γ̂, each (B,) (Eq. 2).

    With --statistic std the second output is σ̂, and γ̂ = û + 3 σ̂.
    """
    u_hat, top = out.unbind(1)
    if statistic == "std":
        return u_hat, u_hat + 3 * top
    return u_hat, top


# ------------------------------------------------------------- bases: reverse distillation, RevDist
#
# A base is a module with
#     recipe              its options in both presets, of `RECIPES`
#     size_multiple       what --image-size must be a multiple of
#     needs_images        whether a training step needs the images, besides the frozen features
#     features(args)      its frozen network: uint8 (B, 3, S, S) -> rows; .split(rows) -> maps
#     base(args, channels, sides)    made for maps of these channels and sides; .phi_channels
#     optimizer(args)
#     forward(maps, images)          -> targets, reconstructions (lists of maps), φ (B, C, h, w)
#     loss(targets, rebuilt, progress, args)    progress from 0 to 1 -> scalar
#     anomaly_map(targets, rebuilt, args)       -> (B, S, S)
# and stands in `BASES`.

# Inner width of the bottleneck blocks, in multiples of ResNet's; other backbones get basic blocks.
WIDEN = {"resnet50": 1, "wide_resnet50_2": 2}


def halving(c_in, c_out):
    """3x3 convolution of stride 2, batch norm, ReLU."""
    layer = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())


class Neck(nn.Module):
    """f1, f2, f3 -> φ (B, 2 C3, h3/2, w3/2): each level is shrunk to f3's size, all are joined,
    blocks follow."""

    def __init__(self, channels, depth, widen):
        super().__init__()
        c1, c2, c3 = channels
        self.path1 = nn.Sequential(halving(c1, c2), halving(c2, c3))
        self.path2 = halving(c2, c3)
        self.blocks = nn.Sequential()
        for i in range(depth):
            c_in, stride = (3 * c3, 2) if i == 0 else (2 * c3, 1)
            if widen:
                self.blocks.append(backbones.Bottleneck(c_in, c3 // 2, stride, widen))
            else:
                self.blocks.append(backbones.BasicBlock(c_in, 2 * c3, stride, 1))

    def forward(self, f1, f2, f3):
        joined = torch.cat([self.path1(f1), self.path2(f2), f3], dim=1)  # (B, 3 C3, h3, w3)
        return self.blocks(joined)


def spread(c_in, c_out, up):
    """3x3 convolution; with `up` a 2x2 transposed one of stride 2, which doubles the size."""
    if up:
        return nn.ConvTranspose2d(c_in, c_out, 2, stride=2, bias=False)
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)


class UpBlock(nn.Module):
    """Residual block of the decoder with GELU, (B, c_in, h, w) -> (B, c_out, h, w).

    With `up` the output is (2h, 2w): 2x2 transposed convolutions of stride 2 stand in the place of
    the first 3x3 convolution, and on the skip. widen: see WIDEN; 0: a block of two convolutions.
    signed: no GELU at the end.
    """

    def __init__(self, c_in, c_out, up, widen, signed):
        super().__init__()
        self.signed = signed
        if widen:
            inner = c_out // 4 * widen
            layers = [
                nn.Conv2d(c_in, inner, 1, bias=False),
                spread(inner, inner, up),
                nn.Conv2d(inner, c_out, 1, bias=False),
            ]
        else:
            layers = [spread(c_in, c_out, up), spread(c_out, c_out, up=False)]
        self.residual = nn.Sequential()
        for i, layer in enumerate(layers):
            if i > 0:
                self.residual.append(nn.GELU())
            self.residual.append(layer)
            self.residual.append(nn.BatchNorm2d(layer.out_channels))
        self.skip = nn.Identity()
        if up:
            self.skip = nn.Sequential(spread(c_in, c_out, up), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.residual(x) + self.skip(x)
        return y if self.signed else F.gelu(y)


class Decoder(nn.Module):
    """φ -> f̂1, f̂2, f̂3, of the shapes of f1, f2, f3. signed: these may have negative values."""

    def __init__(self, channels, depths, widen, signed):
        super().__init__()
        widths = [2 * channels[2], *reversed(channels)]  # Wide-ResNet-50-2: 2048, 1024, 512, 256
        self.stages = nn.ModuleList()
        for c_in, c_out, depth in zip(widths, widths[1:], depths):
            blocks = nn.Sequential()
            for i in range(depth):
                is_last = i == depth - 1
                blocks.append(UpBlock(c_in, c_out, i == 0, widen, signed and is_last))
                c_in = c_out
            self.stages.append(blocks)

    def forward(self, x):
        rebuilt = []  # f̂3, f̂2, f̂1
        for stage in self.stages:
            x = stage(x)
            rebuilt.append(x)
        return rebuilt[::-1]


def initialize(*parts):
    """Kaiming-normal for convolutions; transposed ones keep PyTorch's default, as in RD4AD."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class RevDist(nn.Module):
    """Reverse distillation (Deng & Li, CVPR 2022)."""

    recipe = RECIPES["revdist"]
    size_multiple = 32
    needs_images = False
    direct = True  # the decoder's maps themselves are compared with the teacher's

    def __init__(self, args, channels, sides):
        super().__init__()
        self.phi_channels = 2 * channels[2]
        neck_depth, *depths = map(int, args.depths.split(","))
        widen = WIDEN.get(args.backbone, 0)
        self.neck = Neck(channels, neck_depth, widen)
        signed = self.direct and backbones.signed(args.backbone)
        self.decoder = Decoder(channels, depths, widen, signed)
        initialize(self.neck, self.decoder)

    @staticmethod
    def features(args):
        return backbones.Pyramid(args.backbone, args.weights, args.image_size)

    def optimizer(self, args):
        return torch.optim.AdamW(
            self.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )

    def forward(self, maps, images):
        phi = self.neck(*maps)
        return maps, self.decoder(phi), phi

    @staticmethod
    def loss(targets, rebuilt, progress, args):
        return kernels.cosine_loss(targets, rebuilt, flat=args.cosine == "flat")

    @staticmethod
    def anomaly_map(targets, rebuilt, args):
        size, power = args.image_size, args.norm_power
        return kernels.cosine_map(targets, rebuilt, size, reduce="mean", power=power)


# ------------------------------------------------------------------------------ bases: ReContrast


class ReContrast(RevDist):
    """ReContrast (Guo et al., NeurIPS 2023): reverse distillation between a frozen encoder E₀, whose
    maps come from `features`, and a trainable copy E. What is rebuilt from E's maps is compared
    with E₀'s, and the other way round."""

    recipe = RECIPES["recontrast"]
    needs_images = True
    direct = False  # `heads` stand between

    def __init__(self, args, channels, sides):
        super().__init__(args, channels, sides)
        stages = backbones.pyramid_stages(args.backbone)
        self.encoder = backbones.build(args.backbone, args.weights or None, stages, frozen=False)
        self.encoder.to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList()
        for _ in range(2):
            self.heads.append(nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels))
        initialize(self.heads)

    def optimizer(self, args):
        encoder = list(self.encoder.parameters())
        known = set(encoder)
        others = [p for p in self.parameters() if p not in known]
        return torch.optim.AdamW(
            [{"params": others, "lr": args.lr}, {"params": encoder, "lr": args.encoder_lr}],
            weight_decay=args.weight_decay,
            eps=1e-10,
            amsgrad=True,
            fused=True,
        )

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()  # its batch norms keep ImageNet's statistics; its weights are trained
        return self

    def forward(self, maps, images):
        x = data.normalize(images).contiguous(memory_format=torch.channels_last)
        trained = self.encoder(x)  # E's f1, f2, f3; `maps` are E₀'s
        b = len(images)
        phi = self.neck(*[torch.cat(pair) for pair in zip(trained, maps)])  # (2B, 2 C3, h, w)
        decoded = self.decoder(phi)  # three (2B, C, h, w): from E's maps, from E₀'s
        rebuilt = []
        for head, f in zip(self.heads[0], decoded):
            rebuilt.append(head(f[:b]))  # from E's half, for E₀'s maps
        for head, f in zip(self.heads[1], decoded):
            rebuilt.append(head(f[b:]))  # from E₀'s half, for E's maps
        targets = [*maps, *(f.detach() for f in trained)]
        return targets, rebuilt, phi[b:]

    @staticmethod
    def loss(targets, rebuilt, progress, args):
        """Flattened cosine, (Σ over the first three scales) / 2 + (Σ over the last three) / 2, with
        hard mining: no gradient from locations whose distance is below mean + k std; k rises from
        -3 to 1 over the first tenth."""
        k = min(1.0, -3.0 + 4.0 * progress / 0.1)
        mined = [hard_mining(target, f, k) for target, f in zip(targets, rebuilt)]
        return kernels.cosine_loss(targets, mined) / 2


def hard_mining(target, rebuilt, k):
    """`rebuilt` (B, C, h, w) unchanged, but no gradient where 1 - cos is below mean + k std of the
    step's whole batch, the other processes' images included."""
    with torch.no_grad():
        distance = 1 - F.cosine_similarity(target.float(), rebuilt.float(), dim=1)  # (B, h, w)
        mean, std = moments(distance)
        hard = (distance >= mean + k * std)[:, None]  # (B, 1, h, w)
    mined = rebuilt.view_as(rebuilt)  # a node of its own in the graph
    if mined.requires_grad:
        mined.register_hook(lambda gradient: gradient * hard)
    return mined


def moments(values):
    """Mean and standard deviation of the values of all processes (each has as many), scalars."""
    if not dist.is_initialized():
        return values.mean(), values.std()
    count = values.numel() * dist.get_world_size()
    mean = values.sum() / count
    dist.all_reduce(mean)
    variance = (values - mean).square().sum() / (count - 1)
    dist.all_reduce(variance)
    return mean, variance.sqrt()


# ----------------------------------------------------------------------------------- bases: UniAD


class JoinedMaps(backbones.Pyramid):
    """UniAD's input: all maps of the backbone, resized to stride 16 and joined: F (B, C, h, w)."""

    def __init__(self, name, weights, image_size):
        super().__init__(name, weights, image_size, backbones.all_stages(name))
        self.channels = [sum(self.backbone.channels)]
        self.sides = [image_size // 16]

    @staticmethod
    def channels_last(device):
        return True  # a transformer takes them as tokens of C numbers

    def join(self, maps):
        size = (self.sides[0], self.sides[0])
        resized = []
        for f in maps:
            resized.append(F.interpolate(f, size, mode="bilinear", align_corners=True))
        return super().join([torch.cat(resized, dim=1)])


class Attention(nn.Module):
    """Multi-head attention in which a query may not see its own neighbourhood,
    `window` = (height, width, radius)."""

    def __init__(self, args):
        super().__init__()
        self.heads, self.dropout = args.heads, args.attention_dropout
        self.to_q = nn.Linear(args.hidden, args.hidden)
        self.to_k = nn.Linear(args.hidden, args.hidden)
        self.to_v = nn.Linear(args.hidden, args.hidden)
        self.to_out = nn.Linear(args.hidden, args.hidden)

    def forward(self, query, key, value, window):  # each (B, N, D)
        q = self.split_heads(self.to_q(query))
        k = self.split_heads(self.to_k(key))
        v = self.split_heads(self.to_v(value))
        dropout = self.dropout if self.training else 0.0
        # softmax(Q Kᵀ/√d) V, the window masked
        out = kernels.cross_attention(q, k, v, window=window, dropout_p=dropout)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, N, D/heads) -> (B, N, D)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,N,D) -> (B,heads,N,D/heads)


class Layer(nn.Module):
    """Post-norm transformer layer, (B, N, D) -> (B, N, D).

    queries: number of learned queries of a decoder layer, which ask the encoder's output, and then
    with the answer the layer before; 0: an encoder layer, which asks itself.
    """

    def __init__(self, args, queries=0):
        super().__init__()
        attentions = 1
        self.query = None
        if queries:
            attentions = 2
            self.query = nn.Parameter(torch.randn(queries, args.hidden))
        self.attentions = nn.ModuleList(Attention(args) for _ in range(attentions))
        self.norms = nn.ModuleList(nn.LayerNorm(args.hidden) for _ in range(attentions + 1))
        self.mlp = nn.Sequential(
            nn.Linear(args.hidden, args.mlp),
            nn.ReLU(),
            nn.Dropout(args.attention_dropout),
            nn.Linear(args.mlp, args.hidden),
        )
        self.dropout = nn.Dropout(args.attention_dropout)

    def forward(self, x, memories, pos, window):
        """memories: what each attention in turn reads, (B, N, D); pos: (N, D)."""
        if self.query is not None:
            x = self.query.expand_as(memories[0])
        for attention, norm, memory in zip(self.attentions, self.norms, memories):
            x = norm(x + self.dropout(attention(x + pos, memory + pos, memory, window)))
        return self.norms[-1](x + self.dropout(self.mlp(x)))


class UniAD(nn.Module):
    """UniAD (You et al., NeurIPS 2022): a transformer rebuilds F from tokens further away."""

    recipe = RECIPES["uniad"]
    size_multiple = 16
    needs_images = False

    def __init__(self, args, channels, sides):
        super().__init__()
        self.jitter, self.phi_channels = args.jitter, args.hidden
        self.channels, self.side = channels[0], sides[0]
        self.window = (self.side, self.side, self.side // 2 // 2)  # radius 3 at 14x14: 7x7 tokens
        self.input = nn.Linear(self.channels, args.hidden)
        self.output = nn.Linear(args.hidden, self.channels)
        self.row = nn.Parameter(torch.rand(self.side, args.hidden // 2))  # position, U(0, 1)
        self.column = nn.Parameter(torch.rand(self.side, args.hidden // 2))
        self.encoder = nn.ModuleList(Layer(args) for _ in range(args.layers))
        self.decoder = nn.ModuleList(Layer(args, self.side**2) for _ in range(args.layers))
        self.norm = nn.LayerNorm(args.hidden)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # the authors' three input projections are one matrix, (3D, D), at the start
                joint = name.endswith(("to_q", "to_k", "to_v"))
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if joint else 1.0)
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def start_at_axes(self, features):
        """--init pca: the first layer projects to the principal axes of `features` (N, C, h, w), each
        scaled to variance 1, and the last one maps back. With fewer axes than --hidden the other
        units keep their random start; with more, the axes of the least variance are left out."""
        tokens = features.transpose(1, 3).flatten(0, 2)  # (N, C, h, w) -> (N·w·h, C)
        mean = tokens.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(tokens.T))  # ascending
        count = min(self.input.out_features, self.channels)
        variances, axes = variances[-count:], axes[:, -count:]  # (k,), (C, k)
        deviations = variances.clamp_min(1e-6 * variances.max()).sqrt()
        projection = (axes / deviations).T  # (k, C)
        self.input.weight[:count] = projection
        self.input.bias[:count] = -projection @ mean
        self.output.weight[:, :count] = axes * deviations
        self.output.bias.copy_(mean)

    @staticmethod
    def features(args):
        return JoinedMaps(args.backbone, args.weights, args.image_size)

    def optimizer(self, args):
        return torch.optim.AdamW(
            self.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )

    def forward(self, maps, images):
        f = maps[0]  # (B, C, h, w)
        tokens = f.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        if self.training and self.jitter > 0:  # every token gets noise of --jitter/C times its norm
            sigma = tokens.norm(dim=2, keepdim=True) * (self.jitter / self.channels)
            tokens = tokens + torch.randn_like(tokens) * sigma
        pos = self.position()
        x = self.input(tokens)
        for layer in self.encoder:
            x = layer(x, [x], pos, self.window)
        answer = x
        for layer in self.decoder:
            answer = layer(None, [x, answer], pos, self.window)
        rebuilt = self.output(self.norm(answer))
        return [f], [self.grid(rebuilt).float()], self.grid(x)

    def position(self):
        """Column table and row table side by side: (N, D)."""
        column = self.column.expand(self.side, -1, -1)  # (h, w, D/2)
        row = self.row[:, None].expand(-1, self.side, -1)  # (h, w, D/2)
        return torch.cat([column, row], dim=2).flatten(0, 1)  # (h, w, D) -> (N, D)

    def grid(self, tokens):
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B,N,C) -> (B,C,h,w)

    @staticmethod
    def loss(targets, rebuilt, progress, args):
        return F.mse_loss(rebuilt[0], targets[0])

    @staticmethod
    def anomaly_map(targets, rebuilt, args):
        size = (args.image_size, args.image_size)
        error = (rebuilt[0] - targets[0]).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        return F.interpolate(error, size, mode="bilinear", align_corners=False)[:, 0]


BASES = {"revdist": RevDist, "recontrast": ReContrast, "uniad": UniAD}


class Trained:
    """A trained base as a function (images, samples) -> (M (B, S, S) before smoothing,
    φ (B, C, h, w))."""

    def __init__(self, args, run, features, model):
        self.args, self.run, self.features, self.model = args, run, features, model.eval()
        self.phi_channels = model.phi_channels

    @torch.no_grad()
    def __call__(self, images, samples):
        maps = self.features.maps(images)
        with self.run.autocast():
            targets, rebuilt, phi = self.model(maps, images)
        return self.model.anomaly_map(targets, rebuilt, self.args), phi.float()


class Recorded:
    """--base-run: a finished run of any script as such a function, from the maps and pooled
    features, φ (B, C, 1, 1), that its --save-maps wrote; `images` are ignored."""

    def __init__(self, args, run, dataset):
        folder = Path(args.base_run)
        self.check_memory(folder, args, run)
        self.kept, self.device = {}, run.device  # path -> (map, feature)
        for cls in dataset.classes:
            self.read(folder, Path("maps", "train", f"{cls}.npz"))
            self.read(folder, Path("maps", f"{cls}.npz"))
        for sample in [*dataset.train, *dataset.test]:
            if str(sample.image) not in self.kept:
                raise UsageError(
                    f"--base-run {folder}: its maps know no {sample.image}; the data changed, or "
                    "--data-root is another than in that run"
                )
        training = [self.kept[str(sample.image)] for sample in dataset.train]
        self.phi_channels = len(training[0][1])
        self.scale = float(np.mean([values.max() for values, _ in training]))

    @staticmethod
    def check_memory(folder, args, run):
        """Raises UsageError if the maps would take more than --memory-share of what is free."""
        files = [*(folder / "maps").glob("*.npz"), *(folder / "maps" / "train").glob("*.npz")]
        need = run.processes * sum(file.stat().st_size for file in files)
        if need > args.memory_share * data.free_memory():
            raise UsageError(
                f"--base-run {folder}: its maps take {need / 2**30:.1f} GiB, more than "
                f"--memory-share {args.memory_share:g} of the free memory; do that run again with "
                "fewer --classes or a smaller --image-size"
            )

    def read(self, folder, name):
        if not (folder / name).is_file():
            raise UsageError(
                f"--base-run {folder}: no {name}; do that run (or its --eval) again with "
                "--save-maps"
            )
        file = pages.load_maps(folder / name, ("maps", "paths"))
        if "features" not in file:
            raise UsageError(
                f"{folder / name}: holds no features; do that run again with --save-maps"
            )
        pairs = zip(file["maps"], file["features"])
        self.kept.update(zip(file["paths"].tolist(), pairs))

    def __call__(self, images, samples):
        pairs = [self.kept[str(sample.image)] for sample in samples]
        maps, features = [self.tensor(values) for values in zip(*pairs)]
        return maps / self.scale, features[:, :, None, None]  # (B, C) -> (B, C, 1, 1)

    def tensor(self, arrays):
        return torch.from_numpy(np.stack(arrays)).float().to(self.device)


# ---------------------------------------------------------------------------------------- training


def losses(model, maps, images, progress, args):
    """Of stage 1, as the base has it: the total, and no parts."""
    targets, rebuilt, _ = model(maps, images)
    return BASES[args.base].loss(targets, rebuilt, progress, args), {}


def train_base(args, run, features, model, images):
    """Stage 1: the base, by its own recipe, in place. Returns the state at the end of the stage, or
    a resumed one that is in stage 2 already."""
    model, parallel = run.wrap(model)
    optimizer = model.optimizer(args)
    job = runtime.Training(
        run, args, model, optimizer, drop=args.lr_drop, log_as={"stage": "base"}
    )
    if job.finished:
        return job.resumed
    frozen = runtime.Frozen(run, features, images, args)
    images_per_step = args.batch_size * run.world
    needs_images = frozen.needs_images or model.needs_images
    stream = runtime.Stream(images, args.seed, images_per_step, needs_images)
    if args.init == "pca" and not job.resumed:
        model.start_at_axes(*frozen(stream.first(64)))

    parallel.train()
    for step, batch in job.batches(stream, args.steps):
        run.seed(args.seed, 4, step)  # jitter and dropout
        job.set_rate(step)
        maps = frozen(batch)
        image = run.to_device(batch["image"]) if model.needs_images else None
        with run.autocast():
            loss, parts = losses(parallel, maps, image, step / args.steps, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip, foreach=True)
        optimizer.step()
        job.record(loss, parts)
    return job.finish()


class Described:
    """The training images as stage 2 sees them, in the manner of a frozen network: numbers of
    images (B,) -> rows (B, 2 + C h w), the own u and γ of each map, and φ."""

    def __init__(self, args, run, base, images, samples):
        self.args, self.run, self.base = args, run, base
        self.images, self.samples = images, samples

    def __call__(self, index):
        index = index.tolist()
        batch = None
        if self.images is not None:
            batch = torch.stack([self.images[i] for i in index]).to(self.run.device)
        maps, phi = self.base(batch, [self.samples[i] for i in index])
        own = torch.stack(map_statistics(maps, self.args), dim=1)  # (B, 2)
        return torch.cat([own, phi.flatten(1)], dim=1)  # φ: (B, C, h, w) -> (B, C h w)

    def own_statistics(self, index):
        return self(index)[:, :2]

    def split(self, rows):
        """Rows -> φ (B, C, h, w)."""
        channels = self.base.phi_channels
        side = math.isqrt((rows.shape[1] - 2) // channels)
        return rows[:, 2:].unflatten(1, (channels, side, side))  # (B, C h w) -> (B, C, h, w)


def calibration_losses(model, phi, own, label, args):
    """Of stage 2. model: the head; own: u and γ (B, 2); label: class numbers (B,)."""
    out = model(phi)
    if args.calibrate == "classifier":  # CaDA-B
        return F.cross_entropy(out, label), {}
    u, gamma = own.unbind(1)
    u_hat, gamma_hat = expected(out, args.statistic)
    return regression_loss(u_hat, gamma_hat, u, gamma, args.alpha), {}


def calibration_optimizer(head, args):
    return torch.optim.SGD(
        head.parameters(), lr=args.calibration_lr, momentum=0.9, weight_decay=1e-4
    )


def train_calibration(args, run, base, images, samples, state):
    """Stage 2: the statistics of the classes and, for CaDA-B and CADA, the head. The base stays.

    state: that of stage 1, or a checkpoint of stage 2 to go on from. Returns the calibration and
    the finished state, which is saved.
    """
    classes = state.get("classes") or sorted({sample.cls for sample in samples})
    torch.manual_seed(args.seed)  # the head's initial weights
    calibration = Calibration(args, base.phi_channels, classes).to(run.device)
    parallel = optimizer = None
    if calibration.head is not None:
        calibration.head, parallel = run.wrap(calibration.head)
        optimizer = calibration_optimizer(calibration.head, args)
    job = runtime.Training(
        run,
        args,
        calibration,
        optimizer,
        part="calibration",
        before=state,
        steps_before=args.steps,
        schedule=args.calibration_schedule,
        log_as={"stage": "calibration"},
    )
    job.contents |= {"classes": classes, "fitted_on": data_of(args)}
    if job.finished:
        return calibration.eval(), job.resumed

    numbers = torch.arange(len(samples))  # of the training images, in the place of their pixels
    described = Described(args, run, base, images, samples)
    frozen = runtime.Frozen(run, described, numbers, args, "calibration targets")
    if frozen.rows is not None:
        own = frozen.rows[:, :2]  # (N, 2)
    else:
        own = runtime.precompute(
            run, described.own_statistics, numbers, args.batch_size, 1.0, "calibration targets"
        )
    own = own.to(run.device)
    label = [classes.index(sample.cls) for sample in samples]
    label = torch.tensor(label, device=run.device)  # (N,)
    u, gamma = own.unbind(1)
    calibration.statistics.copy_(class_statistics(u, gamma, label, classes, args.statistic))
    if args.calibrate != "none":
        calibration.floor.copy_((gamma - u).min().clamp(min=1e-6))
    images_per_step = args.calibration_batch * run.world
    stream = runtime.Stream(numbers, args.seed, images_per_step, frozen.needs_images)

    steps = args.calibration_steps if parallel is not None else 0
    if parallel is not None:
        parallel.train()
    for step, batch in job.batches(stream, steps, args.calibration_batch, "calibration"):
        run.seed(args.seed, 5, step)  # dropout
        job.set_rate(step)
        index = run.to_device(batch["index"])
        phi = frozen(batch)  # (B, C, h, w)
        target, cls = own[index], label[index]
        loss, parts = calibration_losses(parallel, phi, target, cls, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        job.record(loss, parts)
    score = Scorer(args, run, base, calibration.eval())
    found = thresholds.of_training_images(run, args, score, samples, images)
    return calibration, job.finish(**found)


# ----------------------------------------------------------------------------------------- scoring


class Scorer:
    """Base and calibration as a function (images, samples) -> (maps (B, S, S), image scores (B,)).

    remember: samples whose map and statistics are computed once and kept, as two passes need them.
    """

    def __init__(self, args, run, base, calibration, remember=()):
        self.args, self.run, self.base, self.calibration = args, run, base, calibration
        self.remember = {str(sample.image) for sample in remember}
        self.kept = {}  # path -> M, û, γ̂, class number
        self.seen = {}  # path -> `Seen`

    @torch.no_grad()
    def estimate(self, images, samples):
        """M (B, S, S), û and γ̂ (B,), class number (B,); γ̂ as predicted, it may be below û."""
        names = [str(sample.image) for sample in samples]
        if all(name in self.kept for name in names):
            columns = zip(*[self.kept[name] for name in names])
            return [torch.stack(column).to(self.run.device) for column in columns]
        maps, phi = self.base(images, samples)
        found = [maps, *self.calibration(phi, samples)]
        if self.remember.issuperset(names):
            rows = zip(*[values.cpu() for values in found])
            self.kept.update(zip(names, rows))
        return found

    def __call__(self, images, samples):
        return self.calibrated(samples, *self.estimate(images, samples))

    def calibrated(self, samples, maps, u_hat, gamma_hat, chosen):
        self.see(samples, maps, u_hat, gamma_hat, chosen)
        maps = calibrate(maps, u_hat, gamma_hat, self.calibration.floor)
        return smoothed(maps, self.args)

    @torch.no_grad()
    def described(self, images, samples):
        """The same, and φ averaged over its positions, (B, C): what --save-maps keeps."""
        maps, phi = self.base(images, samples)
        found = self.calibrated(samples, maps, *self.calibration(phi, samples))
        return *found, phi.mean((2, 3))

    def plain(self, images, samples):
        """The same without calibration."""
        maps = self.estimate(images, samples)[0]
        return smoothed(maps, self.args)

    def see(self, samples, maps, u_hat, gamma_hat, chosen):
        """Take account of what the images had, for `seen_of`."""
        _, gamma = map_statistics(maps, self.args)
        _, plain = smoothed(maps, self.args)
        columns = [values.tolist() for values in (u_hat, gamma_hat, gamma, plain, chosen)]
        for sample, *row in zip(samples, *columns):
            self.seen[str(sample.image)] = Seen(sample.cls, sample.label, *row)

    def seen_of(self, samples):
        """What the last pass saw of all samples, on every rank: list of `Seen`."""
        mine = samples[self.run.rank :: self.run.world]
        return self.run.gather([self.seen[str(sample.image)] for sample in mine])


@dataclass
class Seen:
    """What a pass over the test images saw of one of them."""

    cls: str
    label: int
    u_hat: float
    gamma_hat: float
    gamma: float  # the map's own
    plain: float  # image score without calibration
    chosen: int  # number of the class whose statistics were used; -1: none


# -------------------------------------------------------------------------------- what it reports


def correlations(rows):
    """`Seen` rows -> {"good": {class: r}, "defective": {class: r}}, Pearson's r of the expected γ̂ and
    the image's own γ. None: fewer than three images, or one of the two is constant."""
    found = {"good": {}, "defective": {}}
    for label, name in enumerate(found):
        for cls in sorted({row.cls for row in rows}):
            mine = [row for row in rows if (row.cls, row.label) == (cls, label)]
            found[name][cls] = correlation(
                np.array([row.gamma_hat for row in mine]), np.array([row.gamma for row in mine])
            )
    return found


def correlation(x, y):
    """Pearson's r of two (N,), or None where it is not defined."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def best_threshold(rows):
    """The threshold with the best F1 over the pool (the oracle's: it looks at the labels), and
    `outcome`. rows: (path, class, label, score), as `report.measure` gives them."""
    classes, labels, scores = columns_of(rows)
    threshold = metrics.best_f1_threshold(scores, labels)
    if threshold is None:  # no defect among them
        threshold = float(scores.max())
    return {"threshold": threshold, **outcome(scores >= threshold, labels, classes)}


FALSE_ALARMS = 0.05  # the share of good images that a threshold may call defective


def alarm_threshold(rows, good=None):
    """The lowest threshold at which no more than FALSE_ALARMS of all good images are called
    defective, and `outcome`; None without a good image.

    rows: (path, class, label, score) of the test images. good: scores of good images (N,) to fix the
    threshold on; None: the good ones among the test images (the oracle's: it looks at the labels).
    """
    classes, labels, scores = columns_of(rows)
    if good is None:
        good = scores[~labels]
    if len(good) == 0:
        return None
    threshold = float(np.quantile(good, 1 - FALSE_ALARMS, method="higher"))
    return {"threshold": threshold, **outcome(scores > threshold, labels, classes)}


def columns_of(rows):
    """Rows (path, class, label, score) -> classes, labels (bool) and scores, each (N,)."""
    classes = np.array([row[1] for row in rows])
    labels = np.array([row[2] for row in rows], bool)
    scores = np.array([row[3] for row in rows])
    return classes, labels, scores


def outcome(called, labels, classes):
    """What calling images defective, (N,) bool, does to the pool and to each class: `judged` of the
    pool, and {"classes": {class: `judged`}}."""
    found = {**judged(called, labels), "classes": {}}
    for cls in dict.fromkeys(classes.tolist()):
        mine = classes == cls
        found["classes"][cls] = judged(called[mine], labels[mine])
    return found


def judged(called, labels):
    """{"f1", "false_alarms", "missed", "balanced_accuracy"} of two bool (N,).

    The shares of the good and of the defective images that are called wrongly, and one minus their
    mean. F1 hardly minds false alarms where most test images are defective; a factory does. None
    where there is nothing to count.
    """
    both = int(called.sum() + labels.sum())
    alarms, missed = share(called[~labels]), share(~called[labels])
    balanced = None
    if alarms is not None and missed is not None:
        balanced = 1 - (alarms + missed) / 2
    return {
        "f1": float(2 * (called & labels).sum() / both) if both else None,
        "false_alarms": alarms,
        "missed": missed,
        "balanced_accuracy": balanced,
    }


def share(part):
    """The share of True in a bool (N,), None for N = 0."""
    return float(part.mean()) if len(part) else None


def threshold_table(title, thresholds):
    """{way of scoring: result of one of the functions above} -> text: one threshold for all classes,
    what it does to each."""
    thresholds = {name: found for name, found in thresholds.items() if found}
    if not thresholds:
        return ""
    first = next(iter(thresholds.values()))
    width = max(len(title) + 2, *(len(name) + 2 for name in first["classes"]))
    headings = "".join(f"{name:^36}" for name in thresholds)
    columns = f"{'F1':>9}{'alarms':>9}{'missed':>9}{'balanced':>9}" * len(thresholds)
    out = ["", f"{title:<{width}}" + headings, " " * width + columns]
    for cls in [*first["classes"], "pool"]:
        line = f"{cls:<{width}}"
        for found in thresholds.values():
            values = found if cls == "pool" else found["classes"][cls]
            for key in ("f1", "false_alarms", "missed", "balanced_accuracy"):
                line += f"{report.percent(values[key]):>9}"
        out.append(line)
    return "\n".join(out)


def draw_changed(args, run, dataset, score, plain, rows, number=6):
    """pictures/changed.png, as Fig. 6: the images whose rank in the pool calibration changes most;
    image, truth, map before and map after, each map on one scale for all images.

    plain, rows: (path, class, label, score) before and after.
    """
    order = {}
    for part in (plain, rows):
        for rank, row in enumerate(sorted(part, key=lambda row: row[3])):
            order.setdefault(row[0], []).append(rank)
    moved = sorted(order, key=lambda path: -abs(order[path][1] - order[path][0]))[:number]
    known = {str(sample.image): sample for sample in dataset.test}
    corrupt = report.corruption(args)
    images = report.images_of(run, args, [known[path] for path in moved], corrupt)
    batch = torch.stack([images[i] for i in range(len(images))])
    maps = []  # before, after
    for function in (score.plain, score):
        maps.append(function(batch.to(run.device), images.samples)[0].float().cpu().numpy())
    strips = []
    for i, path in enumerate(moved):
        strip = [pictures.pixels(batch[i]), pictures.truth(images.mask(i).numpy())]
        strip += [pictures.heat(m[i], m.min(), m.max()) for m in maps]
        before, after = order[path]
        title = f"{known[path].cls}: {known[path].defect}, rank {before} -> {after} of {len(rows)}"
        strips.append(pictures.titled(pictures.in_row(strip), title))
    pictures.in_column(strips).save(run.out / "pictures" / "changed.png")


def draw_pixels(args, run, dataset, score, per_class=8, step=16):
    """pictures/pixels.png: the scores of pixels, good and defective, of every class on one axis,
    before and after calibration; of a few images a class, every `step`-th pixel."""
    parts = {"without calibration": [], f"calibration: {args.calibrate}": []}
    for cls in dataset.classes:
        samples = [sample for sample in dataset.test if sample.cls == cls]
        chosen = samples[:: -(-len(samples) // per_class)]
        images = report.images_of(run, args, chosen, report.corruption(args))
        batch = torch.stack([images[i] for i in range(len(images))]).to(run.device)
        masks = torch.stack([images.mask(i) for i in range(len(images))])
        labels = masks.flatten()[::step].tolist()  # (n, S, S) -> (n S²)
        for rows, function in zip(parts.values(), (score.plain, score)):
            maps = function(batch, chosen)[0].float().cpu()  # (n, S, S)
            values = maps.flatten()[::step].tolist()  # (n S²)
            rows += [("", cls, int(label), value) for label, value in zip(labels, values)]
    pictures.distributions(run.out / "pictures" / "pixels.png", parts)


# -------------------------------------------------------------------------------------------- main


def main():
    args = runtime.parse(Args, presets, __doc__, method="cada", inherited=of_base_run)
    check(args)
    run = runtime.start(args, "cada")
    kernels.set_backend(args.kernels)
    state = run.checkpoint_to_evaluate(args)
    if state:
        state = base_of_checkpoint(args, state)
    runtime.check_normal_score(args, state, ("image_size", "smoothing", "padding", "score"))
    dataset, images = runtime.training_data(run, args)
    if dataset and (args.contaminate or args.fix_threshold):
        contaminate(dataset, args.contaminate, args.seed)
        if dataset.test:
            parts = runtime.hold_out(dataset.train, args.fix_threshold, args.seed)
            dataset.train, run.held_out = parts
        images = data.Images(
            dataset.train, args.image_size, memory_share=args.memory_share, depths=run.depths
        )
    if args.base_run:
        calibrate_run(args, run, dataset, state)
    else:
        calibrate_base(args, run, dataset, images, state)


def calibrate_base(args, run, dataset, images, state):
    """The usual run: a base is trained, or taken from the checkpoint `state`, and calibrated."""
    Base = BASES[args.base]
    features = run.rank0_first(Base.features, args)
    run.place(features)
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    model = Base(args, features.channels, features.sides).to(run.device)
    if state:
        runtime.load_model(model, state["model"], args.eval)
    calibrated = state and "calibration" in state["finished"]
    if images and not calibrated:  # stage 2 reads them, with --eval too if an option changed
        images.preload()
    run.open(args)
    if not state:
        state = train_base(args, run, features, model, images)
    base = Trained(args, run, features, model)
    samples = dataset.train if dataset else None
    calibration, state = train_calibration(args, run, base, images, samples, state)
    if args.predict:
        score = Scorer(args, run, base, calibration)
        normal, pixel = state["normal_score"], state["pixel_threshold"]
        return report.predict(run, args, score, normal, pixel_threshold=pixel)
    if not dataset.test:
        score = Scorer(args, run, base, calibration)
        return thresholds.without_test_images(run, args, dataset, score, state)
    evaluate(args, run, base, calibration, state, dataset)


def calibrate_run(args, run, dataset, state):
    """--base-run: the maps of a finished run are calibrated. state: the checkpoint to evaluate."""
    base = Recorded(args, run, dataset)
    args.steps = 0
    run.open(args)
    untrained = {"model": {}, "step": 0, "seconds": 0.0, "finished": ["model"]}
    state = state or run.checkpoint_to_resume(args) or untrained
    calibration, state = train_calibration(args, run, base, None, dataset.train, state)
    evaluate(args, run, base, calibration, state, dataset)


def check(args):
    """What single options cannot check about themselves: values that must fit each other."""
    if args.base_run:
        check_base_run(args)
    else:
        check_base(args)
    options.check_depths(args.depths)
    if args.refit and not args.eval:
        raise UsageError("--refit needs --eval CHECKPOINT: a training always fits its calibration")
    if args.smoothing and args.smoothing % 2 == 0:
        raise UsageError(f"--smoothing {args.smoothing}: must be odd, or 0 for none")
    if args.predict and args.calibrate == "given":
        raise UsageError(
            "--predict with --calibrate given: nobody knows the classes of these images; use cada "
            "or classifier"
        )


def check_base_run(args):
    """--base-run goes without what a base would have to compute anew."""
    for name in ("corrupt", "shift", "predict", "contaminate", "fix_threshold", "norm_power"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} needs the base itself; --base-run has only the maps of its run"
            )


def check_base(args):
    """Options of the base: whether it has them, and whether their values suit it."""
    multiple = BASES[args.base].size_multiple
    if args.image_size % multiple:
        raise UsageError(
            f"--image-size {args.image_size}: must be a multiple of {multiple} for "
            f"--base {args.base}"
        )
    if args.hidden % args.heads or args.hidden % 2:
        raise UsageError(
            f"--hidden {args.hidden}: must be a multiple of --heads {args.heads} and of 2"
        )
    if args.norm_power and args.base == "uniad":
        raise UsageError(
            "--norm-power weighs cosine distances, which the maps of --base uniad are not"
        )
    if args.cosine == "location" and args.base != "revdist":
        raise UsageError(f"--cosine location is a loss of --base revdist, not of {args.base}")
    if args.init == "pca" and args.base != "uniad":
        raise UsageError(f"--init pca is a start of --base uniad, which {args.base} does not have")


def of_base_run(given, saved):
    """What the run in --base-run has settled: its data and their size.

    given: {option: value} of the command line. saved: those of the checkpoint to evaluate, if any.
    Raises: UsageError if there is no such run, or other options were given.
    """
    if not given.get("base_run"):
        return {}
    folder = Path(given["base_run"])
    if given.get("eval") and not saved["base_run"]:
        raise UsageError("--base-run: the checkpoint of --eval has its own base; leave that option out")
    if not (folder / "args.json").is_file():
        raise UsageError(f"--base-run {folder}: no run there (no args.json)")
    of_run = read_json(folder / "args.json", ("data", "data_root", "classes", "image_size", "mask_rule"))
    for name in ("corrupt", "contaminate"):
        if of_run.get(name):
            raise UsageError(
                f"--base-run {folder}: a run with --{name} {of_run[name]} has other test images; "
                "give one without"
            )
    settled = {name: of_run[name] for name in ("data", "classes", "image_size", "mask_rule")}
    for name, value in settled.items():
        if given.get(name, value) != value:
            raise UsageError(
                f"--{name.replace('_', '-')} {given[name]}: the run in --base-run has "
                f"{value or 'all'}; leave that option out"
            )
    if not given.get("data_root"):
        settled["data_root"] = of_run["data_root"]
    return settled


def data_of(args):
    """What names the training images of a run."""
    return args.data + (f", {args.classes} only" if args.classes else "")


def base_of_checkpoint(args, state):
    """The checkpoint to evaluate. If an option of the group "calibration" differs from the
    checkpoint's, its calibration is dropped, so that stage 2 is done again on the stored base."""
    saved = state["args"]
    args.steps = min(args.steps, state["step"])  # fewer in the checkpoint of an unfinished run
    settle_contamination(args, saved)
    groups = ["calibration"]
    if args.statistic == "score":  # γ follows the score
        groups.append("scoring")
    changed = []
    for field in dataclasses.fields(Args):
        of_the_maps = field.metadata["group"] in groups or field.name == "image_size"
        if of_the_maps and field.name != "refit":
            before = saved.get(field.name, field.default)  # an older run had the default
            if getattr(args, field.name) != before:
                changed.append(field.name)
    if args.refit:
        changed.append("refit")
    if "calibration" in state["finished"] and not changed:
        return state
    named = ", ".join("--" + name.replace("_", "-") for name in changed) or "no calibration"
    if args.predict:
        raise UsageError(
            f"--predict with {named}: needs a checkpoint whose calibration is finished and has the "
            "same options; --eval without --predict writes one"
        )
    fitted_on = state.get("fitted_on", data_of(Args(data=saved["data"], classes=saved["classes"])))
    fits = args.calibrate != "none"
    if fits and data_of(args) != fitted_on and not args.refit:
        raise UsageError(
            f"--eval on other data than the calibration was fitted on ({fitted_on}), with {named} "
            "changed: --refit fits it anew, on the training images of --data"
        )
    parts = {name: state[name] for name in ("method", "model", "seconds")}
    return {**parts, "step": args.steps, "finished": ["model"]}


def settle_contamination(args, saved):
    """What the base has seen must not come back into the test set, or fix a threshold. On other data
    nothing was moved."""
    contaminated = saved.get("contaminate", 0.0)  # older runs had neither
    held_out = saved.get("fix_threshold", 0.0)
    if args.data != saved["data"]:
        if contaminated:
            options.tell(
                f"warning: the base has seen some defective images of {saved['data']} as good "
                "ones; if --data is a copy of it, they are tested now"
            )
        args.contaminate = args.fix_threshold = 0.0
        return
    if args.fix_threshold != held_out:
        raise UsageError(
            f"--eval: the base was trained with --fix-threshold {held_out}, so it has "
            f"seen images that {args.fix_threshold} would hold out; leave that option out"
        )
    same_images = args.seed == saved["seed"] or not (contaminated or args.fix_threshold)
    if args.contaminate != contaminated or not same_images:
        raise UsageError(
            f"--eval: the base was trained with --contaminate {contaminated} and --seed "
            f"{saved['seed']}, which chose images that it has seen; leave both options out"
        )


def contaminate(dataset, share, seed):
    """--contaminate: moves this share of each class's defective test images to the training images,
    as if good. Which, follows from seed and class alone."""
    moved = set()
    for cls in dataset.classes:
        rng = np.random.default_rng([seed, 6, zlib.crc32(cls.encode())])
        defective = [s for s in dataset.test if s.cls == cls and s.label]
        count = round(share * len(defective))
        moved.update(defective[i] for i in rng.choice(len(defective), count, replace=False))
    for sample in dataset.test:
        if sample in moved:
            dataset.train.append(dataclasses.replace(sample, label=0, mask=None))
    dataset.test = [sample for sample in dataset.test if sample not in moved]


def evaluate(args, run, base, calibration, state, dataset):
    """The report of the contract, with the result without calibration beside it, and CADA's own."""
    recipe = BASES[args.base].recipe
    plain, remember = None, ()
    if args.calibrate != "none":
        need = 4 * len(dataset.test) * args.image_size**2  # bytes of all maps
        if not args.shift and need < args.memory_share * data.free_memory():
            remember = dataset.test
    score = Scorer(args, run, base, calibration, remember)
    if args.calibrate != "none":
        corrupt = report.corruption(args)
        plain = report.measure(run, args, dataset, score.plain, corrupt=corrupt)
    passes = []  # a list of `Seen` for each pass over the test images, the first one clean

    def after_pass():
        passes.append(score.seen_of(dataset.test))
        return findings(args, calibration, passes[-1])

    report.evaluate(
        run,
        args,
        dataset,
        score,
        setting=setting_of(args, base, calibration, state),
        seconds=state["seconds"],
        paper=papers.numbers("cada", args, recipe["paper"], dataset.name, run.world),
        extra=after_pass,
        described=score.described if isinstance(base, Trained) else None,
        compare={"without calibration": plain.rep} if plain else None,
        saved=plain.seconds if remember else 0.0,
    )
    if run.is_rank0:
        rows = report_thresholds(args, run, score, plain, correlations(passes[0]))
        if plain:
            draw_changed(args, run, dataset, score, plain.rows, rows)
            draw_pixels(args, run, dataset, score)


def findings(args, calibration, rows):
    """What metrics.json says of one pass besides its metrics. rows: list of `Seen`."""
    found = {}
    if args.calibrate != "none":
        floor = calibration.floor.item()
        found["clamped"] = sum(row.gamma_hat - row.u_hat < floor for row in rows)
        found |= without_calibration(rows)
    if args.calibrate == "classifier":
        known = [row for row in rows if row.cls in calibration.classes]
        right = [calibration.classes[row.chosen] == row.cls for row in known]
        found["class accuracy"] = sum(right) / len(right) if right else None
    return found


def without_calibration(rows):
    """Image AUROC of the scores that the same pass would have given without calibration."""
    labels = np.array([row.label for row in rows])
    scores = np.array([row.plain for row in rows])
    classes = np.array([row.cls for row in rows])
    rep = metrics.of_image_scores(scores, labels, classes)
    return {
        "I-AUROC, not calibrated": rep["mean"]["i_auroc"],
        "pool's I-AUROC, not calibrated": rep["mixed"]["i_auroc"],
    }


def setting_of(args, base, calibration, state):
    """What stands above the table."""
    setting = {"image size": args.image_size, "base": args.base_run or args.base}
    if isinstance(base, Trained):
        note = base.features.backbone.weights_note
        setting["backbone"] = f"{args.backbone} ({note})"
        setting["parameters"] = runtime.count_parameters(base.model)
        setting["steps"] = args.steps
        if args.base == "revdist":
            setting["cosine"] = args.cosine
        if args.base != "uniad":
            setting["weight of a distance"] = name_of_power(args.norm_power)
    setting["calibration"] = args.calibrate
    if args.calibrate != "none":
        setting["statistics"] = f"mean, {args.statistic}"
        setting["fitted on"] = state["fitted_on"]
    if calibration.head is not None:
        setting["regressor"] = args.regressor
        setting["dropout"] = args.dropout
        setting["head parameters"] = runtime.count_parameters(calibration)
        setting["calibration steps"] = args.calibration_steps
    if args.contaminate:
        setting["defective test images moved to training"] = args.contaminate
    if args.smoothing:
        window = f"{args.smoothing}x{args.smoothing} Gaussian, sigma 4"
        setting["smoothing"] = f"{window}, {args.padding} outside"
    else:
        setting["smoothing"] = "that of the base's run" if args.base_run else "none"
    setting["image score"] = name_of_rule(args.score)
    return setting


def report_thresholds(args, run, score, plain, related):
    """calibration.json, Fig. 5 and the tables of one threshold.

    score: the `Scorer`. plain: the pass without calibration, or None. related: `correlations`.
    Returns the rows (path, class, label, score).
    """
    text = dict(encoding="utf-8", errors="surrogateescape")  # as it was written
    with open(run.out / "scores.csv", **text) as file:
        records = list(csv.DictReader(file))
    rows = [(r["path"], r["class"], int(r["label"]), float(r["score"])) for r in records]
    parts = {"without calibration": rows}
    if plain:
        parts = {"without calibration": plain.rows, f"calibration: {args.calibrate}": rows}
    best = {title: best_threshold(part) for title, part in parts.items()}
    alarms = {title: alarm_threshold(part) for title, part in parts.items()}
    fixed = {}  # on training images that neither stage has seen
    for title, part in parts.items():
        function = score.plain if title == "without calibration" else score
        if run.held_out:
            fixed[title] = alarm_threshold(part, scores_of_held_out(args, run, function))
    content = {
        "threshold": best,
        "threshold at 5 % false alarms": alarms,
        "threshold fixed on training images": fixed,
        "correlation": related,
    }
    content = json.dumps(content, indent=1) + "\n"
    runtime.write_atomic(run.out / "calibration.json", content.encode())
    pictures.distributions(run.out / "pictures" / "distributions.png", parts)
    run.say(threshold_table("one threshold: best F1", best))
    run.say(threshold_table("5 % false alarms", alarms))
    if fixed:
        title = f"fixed on {len(run.held_out)} held out"
        run.say(threshold_table(title, fixed))
    for name, values in related.items():
        known = [value for value in values.values() if value is not None]
        if known:
            run.say(
                f"correlation of expected and own γ inside a class, {name} images: mean "
                f"{np.mean(known):+.2f}, from {min(known):+.2f} to {max(known):+.2f}"
            )
    return rows


def scores_of_held_out(args, run, function):
    """Image scores of the training images that neither stage has seen, (N,)."""
    images = data.Images(run.held_out, args.image_size, depths=run.depths)
    order = range(len(images))
    scores, _ = thresholds.scores_of(run, args, function, run.held_out, images, order)
    return np.array(scores)


if __name__ == "__main__":
    runtime.launch(main)
