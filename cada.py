"""CADA: absolute-unified multi-class anomaly detection via class-agnostic distribution alignment (2024).

https://arxiv.org/abs/2404.00724 · one file: three bases, their training, the calibration, scoring.

The idea. One detector for many classes gives normal images of one class higher scores than those of another, so that no
threshold serves all: its class-wise AUROC is high, that of all images in one pool is not. CADA predicts, from a feature
of the image, which mean and which maximum the anomaly map of a *normal* image of this kind has, and shifts and scales
the map by them. No class label is needed, neither in training nor at test. The base is not touched.

    image (B,3,256,256) ──frozen Wide-ResNet-50-2──> f1 (B,256,64,64), f2 (B,512,32,32), f3 (B,1024,16,16)
      neck    f1 ──/4──, f2 ──/2──, f3 ──concat──3 bottleneck blocks, /2──> φ (B,2048,8,8)           (stage 1: the base,
      decoder φ ──x2──> f̂3 ──x2──> f̂2 ──x2──> f̂1                                                     here RevDist)
      map     M (B,256,256) = mean over scales of 1 - cos(f̂ᵢ, fᵢ);   of each training image: its mean u, its maximum γ
      head    φ ──1x1 convolution, mean over positions, 2 linear layers──> û, γ̂ (B,)                          (stage 2)
      calibrated map (M - û) / (γ̂ - û), smoothed by 5x5 pixels;   image score = mean of its highest 1 %

    --base       φ, what the head reads                      M, and what the base learns
    revdist      neck of the frozen maps                     3 cosine maps; cosine distance
    recontrast   neck, the half of the frozen encoder        6 cosine maps; a second encoder is trained: cross pairs,
                                                             easy places get no gradient
    uniad        encoder tokens (B,256,14,14)                mean over channels of (F̂ - F)²; the same as loss

Commands
    python cada.py                               embedded data, small model, about two minutes on two CPU cores:
                                                 I-AUROC 83.8 as mean over classes, 81.6 in one pool (84.7 and 70.3
                                                 without calibration; base untrained: 54.0 and 51.4)
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
    Beside the common files: calibration.json (the one threshold with the best F1 over the pool and what it does to each
    class, with and without calibration; the correlations of departure 10) and pictures/distributions.png (Fig. 5).

Where this file differs from the paper (P), which has no public code, or from its authors' other code (C), and why
  1. What the head reads: P names the bottleneck twice and the pre-trained encoder once. Here the bottleneck φ; for
     UniAD, which has none, the output of its transformer's encoder.
  2. The head: a convolution that keeps the channels (1x1, as P stresses the small cost; --head-kernel 3), batch norm,
     ReLU, mean over positions, linear to 256, ReLU, linear; dropout before each linear layer. P names neither pooling
     nor norm nor activation. Without a convolution the pooled feature is normalised by its batch statistics instead,
     and divided by √C: at P's rate SGD diverges on features whose squared norm is large, as that of 512 channels is.
  3. Targets: u and γ of the map before smoothing, base in evaluation mode; calibration before smoothing, as C does.
     Smoothing lowers a map's maximum, in one class more than in another, and the image score is a mean of many pixels:
     --statistic score (not in P) takes the image score of the smoothed map for γ, so that this is what is calibrated.
  4. γ̂ - û is at least 1e-6; how often that was needed is in metrics.json ("clamped").
  5. (u, σ), --statistic std: the head predicts û and σ̂; u + 3σ stands for γ in loss and calibration, as P's text says.
  6. RevDist and ReContrast: flattened cosine per image as in C, not per location as in reverse distillation's paper
     (--cosine location). ReContrast follows C (amsgrad, eps 1e-10, encoder's batch norm in evaluation mode).
  7. Learning rate x 0.2 at 80 % of the steps from C (UniAD: x 0.1, and its clipping at 0.1, from UniAD's code).
  8. Maps of --base-run are divided by the mean maximum of the training images, so that α and the learning rate of the
     head suit every method. Calibration undoes it; no metric depends on it.
  9. Masks by the rule "any" in the paper's preset, since C has them so.
  10. Reported in addition: the correlation of γ̂ and the image's own γ inside a class. A head that followed the
     image instead of its class would cancel anomalies; near 0 is right.

Paper, MVTec AD, RevDist + CADA (without), 256 px: mean I-AUROC 98.2 (97.8), P-AUROC 96.1 (96.4); all classes in one
pool 98.0 (85.0) and 95.6 (94.5).
"""

import argparse
import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from common import UsageError, backbones, data, metrics, report, runtime
from common.runtime import Stream, option

# ------------------------------------------------------------------------------------------------------- options


@dataclass
class Args(runtime.Options):
    image_size: int = option(256, "images are resized to this square; a multiple of 32 (UniAD: of 16), at least 64",
                             group="data", low=64)
    contaminate: float = option(0.0, "share of each class's defective test images moved to training, unlabelled "
                                     "(Table 5's noisy data)", group="data", low=0.0, high=0.9)
    base: str = option("revdist", "the detector that is calibrated", group="model",
                       choices=("revdist", "recontrast", "uniad"))
    base_run: str = option("", "in place of a base: folder of a finished run of another script with --save-maps",
                           group="model")
    backbone: str = option("wide_resnet50_2", "frozen feature extractor", group="model", choices=backbones.NAMES)
    weights: str = option("", "file of the backbone's weights, or 'random' (default: the official ones)", group="model")
    depths: str = option("3,3,4,6", "blocks of the neck and of the decoder's three stages (RevDist, ReContrast)",
                         group="model")
    hidden: int = option(256, "width of UniAD's transformer; a multiple of --heads and of 2", group="model", low=8)
    heads: int = option(8, "UniAD's attention heads", group="model", low=1)
    mlp: int = option(1024, "width of UniAD's MLPs", group="model", low=1)
    layers: int = option(4, "UniAD's encoder layers, and as many decoder layers", group="model", low=1)
    attention_dropout: float = option(0.1, "dropout in UniAD's attention and MLPs", group="training", low=0.0, high=0.9)
    jitter: float = option(20.0, "scale of the noise on UniAD's training features", group="training", low=0.0)
    steps: int = option(5000, "training steps of the base; 0: untrained", group="training", low=0)
    batch_size: int = option(16, "training images a step and process", group="training", low=1)
    lr: float = option(2e-3, "AdamW's learning rate", group="training", low=0.0)
    encoder_lr: float = option(1e-5, "that of ReContrast's trainable encoder", group="training", low=0.0)
    schedule: str = option("step", "learning rate: x --lr-drop after 80 % of the steps, or one cosine after a warm-up "
                                   "of 5 %", group="training", choices=("step", "cosine"))
    lr_drop: float = option(0.2, "factor of the learning rate after 80 % of the steps", group="training", low=0.0)
    weight_decay: float = option(1e-5, "AdamW's weight decay", group="training", low=0.0)
    clip: float = option(0.0, "largest norm of the gradient; 0: no limit", group="training", low=0.0)
    cosine: str = option("flat", "RevDist's loss: one cosine of each image's flattened map, or one per location",
                         group="training", choices=("flat", "location"))
    calibrate: str = option("cada", "none; given: statistics of the true class (CaDA-A); classifier: of the predicted "
                                    "class (CaDA-B); cada: predicted statistics (Table 4)", group="calibration",
                            choices=("none", "given", "classifier", "cada"))
    regressor: str = option("1+2", "convolutions + linear layers of the head (Table 3)", group="calibration",
                            choices=("0+1", "0+2", "0+3", "1+2", "2+2"))
    head_kernel: int = option(1, "size of the head's convolutions", group="calibration", choices=(1, 3))
    dropout: float = option(0.25, "dropout before each linear layer of the head (Table 3)", group="calibration",
                            low=0.0, high=0.95)
    statistic: str = option("max", "γ, what stands for the top of a normal map: its maximum, mean + 3 standard "
                                   "deviations (Table 5), or the image score as --smoothing and --score make it",
                            group="calibration", choices=("max", "std", "score"))
    alpha: float = option(0.1, "where the head's smooth L1 loss turns from square to absolute", group="calibration",
                          low=1e-6)
    calibration_steps: int = option(5000, "training steps of the head", group="calibration", low=1)
    calibration_batch: int = option(16, "training images a step and process, for the head", group="calibration", low=2)
    calibration_lr: float = option(5e-2, "SGD's learning rate for the head", group="calibration", low=0.0)
    calibration_schedule: str = option("constant", "that learning rate: constant, or one cosine after a warm-up of 5 %",
                                       group="calibration", choices=("constant", "cosine"))
    smoothing: int = option(5, "side of the Gaussian window on the map, sigma 4; odd; 0: none", group="scoring", low=0)
    score: str = option("top1", "image score: the map's maximum, or the mean of its highest 0.1, 1 or 2 % (Table 3)",
                        group="scoring", choices=("max", "top0.1", "top1", "top2"))


# The recipe of each base, on top of the defaults above; "run" is --base-run, whose maps are smoothed already.
PRESETS = {
    "paper": {
        "revdist": dict(mask_rule="any"),
        "recontrast": dict(mask_rule="any"),
        "uniad": dict(mask_rule="any", image_size=224, backbone="efficientnet_b4", steps=50_000, batch_size=64, lr=3e-4,
                      weight_decay=1e-4, lr_drop=0.1, clip=0.1, alpha=10.0, calibration_steps=20_000),
        "run": dict(smoothing=0),
    },
    # For two CPU cores: a smaller backbone (the model's widths follow), picture and depth, and many small steps.
    "laptop": {
        "revdist": dict(image_size=192, backbone="efficientnet_lite0", depths="1,1,1,1", steps=2000, batch_size=4,
                        lr=5e-3, schedule="cosine", calibration_steps=2000, calibration_schedule="cosine", amp="auto"),
        "recontrast": dict(image_size=160, backbone="efficientnet_lite0", depths="1,1,1,1", steps=1000, batch_size=4,
                           schedule="cosine", calibration_steps=2000, calibration_schedule="cosine", amp="auto"),
        "uniad": dict(image_size=160, backbone="efficientnet_lite0", hidden=128, heads=4, mlp=256, layers=1, steps=3000,
                      attention_dropout=0.0, jitter=2.0, batch_size=4, lr=2e-3, weight_decay=1e-4, clip=0.1,
                      schedule="cosine", alpha=10.0, calibration_steps=2000, calibration_schedule="cosine", amp="auto"),
        "run": dict(smoothing=0, calibration_steps=2000, calibration_schedule="cosine"),
    },
}


def presets():
    """Both presets for the base that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--base", nargs="?")
    parser.add_argument("--base-run", nargs="?")
    known = parser.parse_known_args()[0]
    base = "run" if known.base_run else known.base
    return {name: recipes.get(base, recipes["revdist"]) for name, recipes in PRESETS.items()}


# ------------------------------------------------------------------------------------------------ bases: features


class Features(nn.Module):
    """Frozen backbone: uint8 images (B, 3, S, S) -> its maps, joined into one row per image.

    RevDist and ReContrast read three maps of strides 4, 8 and 16; UniAD one, F, of all maps resized to stride 16.
    """

    def __init__(self, args):
        super().__init__()
        self.joined = args.base == "uniad"
        self.backbone = pretrained(args).fuse().to(memory_format=torch.channels_last)
        self.channels = [sum(self.backbone.channels)] if self.joined else self.backbone.channels
        self.sides = [args.image_size // stride for stride in ([16] if self.joined else self.backbone.strides)]

    @torch.no_grad()
    def forward(self, images):
        maps = self.backbone(data.normalize(images).contiguous(memory_format=torch.channels_last))
        if self.joined:
            maps = [torch.cat([F.interpolate(m, (self.sides[0],) * 2, mode="bilinear", align_corners=True)
                               for m in maps], dim=1)]
        return torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1)  # (B, C, h, w) -> (B, h w C)

    def split(self, rows):
        """Rows -> list of maps (B, C, h, w), stored channels-last."""
        parts = rows.split([side * side * c for side, c in zip(self.sides, self.channels)], dim=1)
        return [part.unflatten(1, (side, side, c)).permute(0, 3, 1, 2)  # (B, h w C) -> (B, C, h, w)
                for part, side, c in zip(parts, self.sides, self.channels)]


def pretrained(args, frozen=True):
    """The backbone; for RevDist and ReContrast with its outputs of strides 4, 8 and 16 only."""
    efficient = args.backbone.startswith("efficientnet")
    stages = None if args.base == "uniad" else (2, 3, 4) if efficient else (1, 2, 3)
    return backbones.build(args.backbone, args.weights or None, stages, frozen)


# Each base is a module: forward(frozen maps, images) -> (targets, reconstructions, φ (B, C, h, w)), two lists of maps;
# loss(targets, reconstructions, progress from 0 to 1) -> scalar; anomaly_map(targets, reconstructions) -> (B, S, S).

# ---------------------------------------------------------------------------------- bases: reverse distillation

WIDEN = {"resnet50": 1, "wide_resnet50_2": 2}  # inner width of the bottleneck blocks; other backbones get basic blocks


class Neck(nn.Module):
    """f1, f2, f3 -> φ (B, 2 C3, h3/2, w3/2): each level is shrunk to f3's size, all are joined, blocks follow."""

    def __init__(self, channels, depth, widen):
        super().__init__()
        c1, c2, c3 = channels
        shrink = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.path1, self.path2 = nn.Sequential(shrink(c1, c2), shrink(c2, c3)), shrink(c2, c3)
        block = lambda c, stride: (backbones.Bottleneck(c, c3 // 2, stride, widen) if widen else
                                   backbones.BasicBlock(c, 2 * c3, stride, 1))
        self.blocks = nn.Sequential(block(3 * c3, 2), *(block(2 * c3, 1) for _ in range(depth - 1)))

    def forward(self, f1, f2, f3):
        return self.blocks(torch.cat([self.path1(f1), self.path2(f2), f3], dim=1))  # 3 x (B, C3, h3, w3)


class UpBlock(nn.Module):
    """Residual block of the decoder with GELU, (B, c_in, h, w) -> (B, c_out, h, w). With `up` the output is (2h, 2w):
    2x2 transposed convolutions of stride 2 stand in the place of the first 3x3 convolution, and on the skip."""

    def __init__(self, c_in, c_out, up, widen):
        super().__init__()
        conv = lambda a, b, size: nn.Conv2d(a, b, size, padding=size // 2, bias=False)
        grow = lambda a, b: nn.ConvTranspose2d(a, b, 2, stride=2, bias=False) if up else conv(a, b, 3)
        inner = c_out // 4 * widen
        layers = [conv(c_in, inner, 1), grow(inner, inner), conv(inner, c_out, 1)] if widen else [
            grow(c_in, c_out), conv(c_out, c_out, 3)]
        parts = [part for layer in layers for part in (layer, nn.BatchNorm2d(layer.out_channels), nn.GELU())]
        self.residual = nn.Sequential(*parts[:-1])
        self.skip = nn.Sequential(grow(c_in, c_out), nn.BatchNorm2d(c_out)) if up else nn.Identity()

    def forward(self, x):
        return F.gelu(self.residual(x) + self.skip(x))


class Decoder(nn.Module):
    """φ -> f̂1, f̂2, f̂3, of the shapes of f1, f2, f3."""

    def __init__(self, channels, depths, widen):
        super().__init__()
        widths = [2 * channels[2], *reversed(channels)]  # Wide-ResNet-50-2: 2048, 1024, 512, 256
        self.stages = nn.ModuleList(
            nn.Sequential(*(UpBlock(a if i == 0 else b, b, i == 0, widen) for i in range(depth)))
            for a, b, depth in zip(widths, widths[1:], depths))

    def forward(self, x):
        rebuilt = []
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

    def __init__(self, args, channels, sides):
        super().__init__()
        self.args, self.phi_channels = args, 2 * channels[2]
        neck, *stages = map(int, args.depths.split(","))
        widen = WIDEN.get(args.backbone, 0)
        self.neck, self.decoder = Neck(channels, neck, widen), Decoder(channels, stages, widen)
        initialize(self.neck, self.decoder)

    def forward(self, maps, images):
        phi = self.neck(*maps)
        return maps, [m.float() for m in self.decoder(phi)], phi

    def loss(self, targets, rebuilt, progress):
        return kernels.cosine_loss(targets, rebuilt, flat=self.args.cosine == "flat")

    def anomaly_map(self, targets, rebuilt):
        return kernels.cosine_map(targets, rebuilt, self.args.image_size, reduce="mean")


# ---------------------------------------------------------------------------------------------- bases: ReContrast


class ReContrast(RevDist):
    """ReContrast (Guo et al., NeurIPS 2023): reverse distillation between a frozen encoder E₀, whose maps come from
    `Features`, and a trainable copy E. What is rebuilt from E's maps is compared with E₀'s, and the other way round."""

    def __init__(self, args, channels, sides):
        super().__init__(args, channels, sides)
        self.encoder = pretrained(args, frozen=False).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList(nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels) for _ in range(2))
        initialize(self.heads)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()  # its batch norms keep ImageNet's statistics; its weights are trained all the same
        return self

    def forward(self, maps, images):
        own, b = self.encoder(data.normalize(images).contiguous(memory_format=torch.channels_last)), len(images)
        phi = self.neck(*(torch.cat(pair) for pair in zip(own, maps)))  # (2B, 2 C3, h, w): of E, of E₀
        decoded = self.decoder(phi)  # three (2B, C, h, w)
        rebuilt = [head(d[:b]) for head, d in zip(self.heads[0], decoded)]  # from E's half, for E₀'s maps
        rebuilt += [head(d[b:]) for head, d in zip(self.heads[1], decoded)]  # from E₀'s half, for E's maps
        return [*maps, *(m.detach().float() for m in own)], [m.float() for m in rebuilt], phi[b:]

    def loss(self, targets, rebuilt, progress):
        """Flattened cosine, (Σ over the first three scales) / 2 + (Σ over the last three) / 2, with hard mining: no
        gradient from locations whose distance is below mean + k std; k rises from -3 to 1 over the first tenth."""
        k = min(1.0, -3.0 + 4.0 * progress / 0.1)
        mined = [hard_mining(target, r, k) for target, r in zip(targets, rebuilt)]
        return kernels.cosine_loss(targets, mined) / 2


def hard_mining(target, rebuilt, k):
    """`rebuilt` (B, C, h, w) unchanged, but its gradient is 0 where 1 - cos is below mean + k std over the batch."""
    with torch.no_grad():
        distance = 1 - F.cosine_similarity(target, rebuilt, dim=1)  # (B, h, w)
        hard = (distance >= distance.mean() + k * distance.std())[:, None]
    mined = rebuilt.view_as(rebuilt)  # a node of its own in the graph
    if mined.requires_grad:
        mined.register_hook(lambda gradient: gradient * hard)
    return mined


# --------------------------------------------------------------------------------------------------- bases: UniAD


class Attention(nn.Module):
    """Multi-head attention in which a query may not see its own neighbourhood, `window` = (height, width, radius)."""

    def __init__(self, args):
        super().__init__()
        self.heads, self.dropout = args.heads, args.attention_dropout
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(args.hidden, args.hidden) for _ in range(4))

    def forward(self, query, key, value, window):  # each (B, N, D)
        q, k, v = (linear(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D/heads)
                   for linear, t in ((self.to_q, query), (self.to_k, key), (self.to_v, value)))
        out = kernels.cross_attention(q, k, v, window=window, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, N, D/heads) -> (B, N, D)


class Layer(nn.Module):
    """Post-norm transformer layer, (B, N, D) -> (B, N, D). `queries`: number of learned queries of a decoder layer,
    which ask the encoder's output, and then with the answer the layer before; 0: an encoder layer, which asks itself.
    """

    def __init__(self, args, queries=0):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, args.hidden)) if queries else None
        self.attentions = nn.ModuleList(Attention(args) for _ in range(2 if queries else 1))
        self.norms = nn.ModuleList(nn.LayerNorm(args.hidden) for _ in range(3 if queries else 2))
        self.mlp = nn.Sequential(nn.Linear(args.hidden, args.mlp), nn.ReLU(), nn.Dropout(args.attention_dropout),
                                 nn.Linear(args.mlp, args.hidden))
        self.dropout = nn.Dropout(args.attention_dropout)

    def forward(self, x, memories, pos, window):
        """memories: what each attention in turn reads, (B, N, D); pos: (N, D)."""
        x = x if self.query is None else self.query.expand_as(memories[0])
        for attention, norm, memory in zip(self.attentions, self.norms, memories):
            x = norm(x + self.dropout(attention(x + pos, memory + pos, memory, window)))
        return self.norms[-1](x + self.dropout(self.mlp(x)))


class UniAD(nn.Module):
    """UniAD (You et al., NeurIPS 2022): a transformer rebuilds F from tokens further away."""

    def __init__(self, args, channels, sides):
        super().__init__()
        (self.channels,), (self.side,), self.args = channels, sides, args
        self.phi_channels = args.hidden
        self.window = (self.side, self.side, self.side // 2 // 2)  # radius 3 at 14x14: a neighbourhood of 7x7
        self.input, self.output = nn.Linear(self.channels, args.hidden), nn.Linear(args.hidden, self.channels)
        self.row = nn.Parameter(torch.rand(self.side, args.hidden // 2))  # learned position, U(0, 1)
        self.column = nn.Parameter(torch.rand(self.side, args.hidden // 2))
        self.encoder = nn.ModuleList(Layer(args) for _ in range(args.layers))
        self.decoder = nn.ModuleList(Layer(args, queries=self.side ** 2) for _ in range(args.layers))
        self.norm = nn.LayerNorm(args.hidden)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps, images):
        f, = maps  # (B, C, h, w)
        tokens = f.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        if self.training and self.args.jitter > 0:  # every token gets noise of --jitter/C times its norm
            sigma = tokens.norm(dim=2, keepdim=True) * (self.args.jitter / self.channels)
            tokens = tokens + torch.randn_like(tokens) * sigma
        pos = torch.cat([self.column.expand(self.side, -1, -1), self.row[:, None].expand(-1, self.side, -1)],
                        dim=2).flatten(0, 1)  # two (h, w, D/2) -> (N, D)
        x = self.input(tokens)
        for layer in self.encoder:
            x = layer(x, [x], pos, self.window)
        answer = x
        for layer in self.decoder:
            answer = layer(None, [x, answer], pos, self.window)
        grid = lambda t: t.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, N, C) -> (B, C, h, w)
        return [f], [grid(self.output(self.norm(answer))).float()], grid(x)

    def loss(self, targets, rebuilt, progress):
        return F.mse_loss(rebuilt[0], targets[0])

    def anomaly_map(self, targets, rebuilt):
        error = (rebuilt[0] - targets[0]).square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        return F.interpolate(error, (self.args.image_size,) * 2, mode="bilinear", align_corners=False)[:, 0]


BASES = {"revdist": RevDist, "recontrast": ReContrast, "uniad": UniAD}


def base_function(run, features, model):
    """A trained base as a function (images, samples) -> (map (B, S, S) before smoothing, φ (B, C, h, w))."""
    @torch.no_grad()
    def base(images, samples):
        maps = features.split(features(images))
        with run.autocast():
            targets, rebuilt, phi = model.eval()(maps, images)
        return model.anomaly_map(targets, rebuilt), phi.float()
    return base


class Recorded:
    """--base-run: a finished run of any script as such a function, from the maps and pooled features, φ (B, C, 1, 1),
    that its --save-maps wrote; `images` are ignored."""

    def __init__(self, folder, dataset, device):
        self.kept, self.device = {}, device
        for cls in dataset.classes:
            for path in (folder / "maps" / "train" / f"{cls}.npz", folder / "maps" / f"{cls}.npz"):
                if not path.is_file():
                    raise UsageError(f"--base-run {folder}: no {path.relative_to(folder)}; do that run (or its --eval) "
                                     f"again with --save-maps")
                with np.load(path) as file:
                    if "features" not in file:
                        raise UsageError(f"{path}: holds no features; do that run again with --save-maps")
                    self.kept.update(zip(file["paths"].tolist(), zip(file["maps"], file["features"])))
        for sample in [*dataset.train, *dataset.test]:
            if str(sample.image) not in self.kept:
                raise UsageError(f"--base-run {folder}: its maps know no {sample.image}; the data changed, or "
                                 f"--data-root is another than in that run")
        self.phi_channels = len(self.kept[str(dataset.train[0].image)][1])
        self.scale = float(np.mean([self.kept[str(s.image)][0].max() for s in dataset.train]))

    def __call__(self, images, samples):
        maps, features = (torch.from_numpy(np.stack(values)).float().to(self.device)
                          for values in zip(*(self.kept[str(s.image)] for s in samples)))
        return maps / self.scale, features[:, :, None, None]  # (B, C) -> (B, C, 1, 1)


# ---------------------------------------------------------------------------------------------------- calibration


class Head(nn.Module):
    """φ (B, C, h, w) -> (B, outputs): the regressor of CADA, and the classifier of CaDA-B (§3.3)."""

    def __init__(self, channels, outputs, args):
        super().__init__()
        convolutions, linears = map(int, args.regressor.split("+"))
        conv = lambda: nn.Sequential(nn.Conv2d(channels, channels, args.head_kernel, padding=args.head_kernel // 2,
                                               bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.spatial = nn.Sequential(*(conv() for _ in range(convolutions)))
        self.norm = nn.Identity() if convolutions else nn.BatchNorm1d(channels, affine=False)
        self.gain = 1.0 if convolutions else channels ** -0.5  # normalised features: squared norm 1, not C
        widths, layers = [channels] + [256] * (linears - 1) + [outputs], []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Dropout(args.dropout), nn.Linear(a, b), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, phi):
        x = self.norm(self.spatial(phi).mean((2, 3)))  # (B, C, h, w) -> (B, C)
        return self.layers(x * self.gain)


class Calibration(nn.Module):
    """φ (B, C, h, w) and samples -> û and γ̂ (B,), what a normal image of this kind has as mean and top of its map."""

    def __init__(self, args, channels, classes):
        super().__init__()
        self.args, self.classes = args, classes
        outputs = {"cada": 2, "classifier": len(classes)}.get(args.calibrate)
        self.head = Head(channels, outputs, args) if outputs else None
        self.register_buffer("statistics", torch.zeros(len(classes), 2))  # u_c, γ_c of each class (CaDA-A)

    def forward(self, phi, samples):
        if self.args.calibrate == "none":
            return phi.new_zeros(len(phi)), phi.new_ones(len(phi))  # leaves M as it is
        if self.args.calibrate == "cada":
            return expected(self.head(phi), self.args.statistic)
        if self.args.calibrate == "classifier":
            return self.statistics[self.head(phi).argmax(1)].unbind(1)
        unknown = {s.cls for s in samples} - set(self.classes)
        if unknown:
            raise UsageError(f"--calibrate given: no statistics of class '{min(unknown)}'; known: "
                             f"{', '.join(self.classes)}; --calibrate cada needs no class")
        return self.statistics[[self.classes.index(s.cls) for s in samples]].unbind(1)


def expected(out, statistic):
    """The regressor's outputs (B, 2) -> û and γ̂, each (B,). With "std" the second output is σ̂: γ̂ = û + 3σ̂."""
    u, top = out.unbind(1)
    return (u, u + 3 * top) if statistic == "std" else (u, top)


def own_statistics(maps, args):
    """Maps M before smoothing, (B, S, S) -> their own u and γ, (B, 2): the targets of stage 2."""
    u = maps.mean((1, 2))
    if args.statistic == "max":
        gamma = maps.amax((1, 2))
    elif args.statistic == "std":
        gamma = u + 3 * maps.flatten(1).std(1)  # (B, S, S) -> (B, S²)
    else:
        _, gamma = scored(maps, args)
    return torch.stack([u, gamma], dim=1)


def calibration_loss(head, phi, target, label, args):
    """CADA: smooth L1 of û and γ̂ against the image's own u and γ, `target` (B, 2), each averaged over the batch, then
    added. CaDA-B: cross-entropy against the class, `label` (B,)."""
    out = head(phi)
    if args.calibrate == "classifier":
        return F.cross_entropy(out, label)
    return sum(F.smooth_l1_loss(o, t, beta=args.alpha) for o, t in zip(expected(out, args.statistic), target.unbind(1)))


# ------------------------------------------------------------------------------------------------------- training


def train_base(args, run, features, model, images, state):
    """Stage 1, the base by its own recipe, into `model`. `state`: a checkpoint to go on from, or None. Returns the
    state at the end of the stage; a state that is already in stage 2 is only loaded."""
    if state and state["step"] >= args.steps:
        runtime.load_model(model, state["model"], run.out / "checkpoint.pt")
        return state
    model, wrapped = run.wrap(model)
    if args.base == "recontrast":
        encoder = set(model.encoder.parameters())
        optimizer = torch.optim.AdamW(
            [{"params": list(model.encoder.parameters()), "lr": args.encoder_lr},
             {"params": [p for p in model.parameters() if p not in encoder]}],
            lr=args.lr, weight_decay=args.weight_decay, eps=1e-10, amsgrad=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    cache = runtime.precompute(run, features, images, args.batch_size, args.memory_share)
    dataset = Stream(images, args.seed, args.batch_size * run.world, cache is None or args.base == "recontrast")
    first, seconds = run.restore(state, model, optimizer)
    clock = runtime.Stopwatch(seconds)

    def state_now():
        return {"method": run.method, "args": runtime.as_dict(args), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": clock()}

    bad = torch.zeros((), dtype=torch.int32, device=run.device)
    step = first - 1
    loader = run.loader(dataset, run.positions(first, args.steps, args.batch_size), args.workers)
    wrapped.train()
    for step, batch in enumerate(run.progress(loader, "training", args.steps, first), first):
        run.seed(args.seed, 4, step)  # jitter and dropout
        image = run.to_device(batch["image"]) if dataset.whole_images else None
        rows = run.to_device(cache[batch["index"]]) if cache is not None else features(image)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * runtime.lr_factor(step, args.steps, args.schedule, args.lr_drop)
        with run.autocast():
            targets, rebuilt, _ = wrapped(features.split(rows), image)
        loss = model.loss(targets, rebuilt, step / args.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

        bad |= ~torch.isfinite(loss.detach())
        run.keep(args, step + 1, args.steps, bad, lambda: {
            "stage": "base", **run.mean({"loss": loss}), "lr": optimizer.param_groups[-1]["lr"],
            "images_per_s": round((step + 1) * args.batch_size * run.world / clock(), 1)}, state_now)
    state = state_now()
    run.save(state)
    return state


class Targets:
    """What the base makes of the training images, computed once: u and γ of every map before smoothing, and φ where
    memory allows (else φ is computed from the images, step by step)."""

    def __init__(self, args, run, base, channels, images, samples):
        self.args, self.run, self.base, self.channels = args, run, base, channels
        self.images, self.samples = images, samples
        once = lambda function, share: runtime.precompute(run, function, torch.arange(len(samples)), args.batch_size,
                                                          share, "calibration targets")
        self.rows = once(self.describe, args.memory_share)
        rows = self.rows if self.rows is not None else once(lambda index: self.describe(index)[:, :2], 1.0)
        self.target = rows[:, :2]  # u, γ: (N, 2)

    def describe(self, index):
        """Images -> the map's u and γ, and φ, one row each: (B,) -> (B, 2 + C h w)."""
        index = index.tolist()
        batch = None if self.images is None else torch.stack([self.images[i] for i in index]).to(self.run.device)
        maps, phi = self.base(batch, [self.samples[i] for i in index])
        return torch.cat([own_statistics(maps, self.args), phi.flatten(1)], dim=1)  # φ: (B, C, h, w) -> (B, C h w)

    def phi(self, index):
        rows = self.run.to_device(self.rows[index]) if self.rows is not None else self.describe(index)
        side = math.isqrt((rows.shape[1] - 2) // self.channels)
        return rows[:, 2:].unflatten(1, (self.channels, side, side))  # (B, C h w) -> (B, C, h, w)


def train_calibration(args, run, base, channels, images, samples, state):
    """Stage 2: the statistics of the classes and, for CaDA-B and CADA, the head. The base stays as it is.

    `state`: that of stage 1, or a checkpoint of stage 2 to go on from. Steps are counted on from stage 1. Returns the
    calibration and the finished state, which is saved.
    """
    classes = state["classes"] if "classes" in state else sorted({s.cls for s in samples})
    torch.manual_seed(args.seed)  # the head's initial weights
    calibration = Calibration(args, channels, classes).to(run.device)
    if "calibration" in state:
        runtime.load_model(calibration, state["calibration"], run.out / "checkpoint.pt")
    if "normal_score" in state:  # finished
        return calibration.eval(), state
    targets = Targets(args, run, base, channels, images, samples)
    label = torch.tensor([classes.index(s.cls) for s in samples])
    calibration.statistics.copy_(torch.stack([targets.target[label == c].mean(0) for c in range(len(classes))]))
    first, steps = state["step"] - args.steps, args.calibration_steps if calibration.head is not None else 0
    run.rewind_log(state["step"])
    clock = runtime.Stopwatch(state["seconds"])

    def state_at(step, **more):
        return {**state, "args": runtime.as_dict(args), "calibration": calibration.state_dict(), "classes": classes,
                "step": args.steps + step, "seconds": clock(), **more}

    if calibration.head is not None:
        calibration.head, wrapped = run.wrap(calibration.head)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=args.calibration_lr, momentum=0.9, weight_decay=1e-4)
        if "calibration" in state:
            optimizer.load_state_dict(state["optimizer"])
        stream = Stream(samples, args.seed, args.calibration_batch * run.world, whole_images=False)
        bad = torch.zeros((), dtype=torch.int32, device=run.device)
        wrapped.train()
    batches = run.positions(first, steps, args.calibration_batch)
    for step, places in enumerate(run.progress(batches, "calibration", steps, first), first):
        run.seed(args.seed, 5, step)  # dropout
        index = torch.tensor([stream.index(k) for k in places])
        u_gamma, cls = run.to_device(targets.target[index]), run.to_device(label[index])
        for group in optimizer.param_groups:
            group["lr"] = args.calibration_lr * runtime.lr_factor(step, steps, args.calibration_schedule)
        loss = calibration_loss(wrapped, targets.phi(index), u_gamma, cls, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        bad |= ~torch.isfinite(loss.detach())
        run.keep(args, args.steps + step + 1, args.steps + steps, bad,
                 lambda: {"stage": "calibration", **run.mean({"loss": loss})},
                 lambda: state_at(step + 1, optimizer=optimizer.state_dict()))
    score = Scorer(args, run, base, calibration.eval())
    final = state_at(steps, optimizer=None, normal_score=report.normal_score(run, args, score, samples, images))
    run.save(final)
    return calibration, final


# -------------------------------------------------------------------------------------------------------- scoring

SHARES = {"top0.1": 0.001, "top1": 0.01, "top2": 0.02}


def smooth(maps, side):
    """(B, S, S) -> (B, S, S): a window of side² Gaussian weights, σ = 4, zeros outside (5x5: nearly a box)."""
    if side == 0:
        return maps
    line = torch.exp(-0.5 * ((torch.arange(side, device=maps.device) - side // 2) / 4.0) ** 2)
    line = (line / line.sum()).view(1, 1, 1, side)
    x = F.conv2d(maps[:, None], line, padding=(0, side // 2))
    return F.conv2d(x, line.transpose(2, 3), padding=(side // 2, 0))[:, 0]


def image_score(maps, rule):
    """(B, S, S) -> (B,): the maximum, or the mean of the highest share of the pixels (of 256²: 655 for 1 %)."""
    flat = maps.flatten(1)  # (B, S, S) -> (B, S²)
    if rule == "max":
        return flat.amax(1)
    return flat.topk(max(1, int(SHARES[rule] * flat.shape[1])), dim=1).values.mean(1)


def scored(maps, args):
    """Maps, calibrated or not, (B, S, S) -> the same smoothed, and their image scores (B,)."""
    maps = smooth(maps, args.smoothing)
    return maps, image_score(maps, args.score)


class Scorer:
    """Base and calibration as a function (images, samples) -> (maps (B, S, S), image scores (B,)).

    remember: samples whose map and statistics are computed once and kept, as two passes need them.
    """

    def __init__(self, args, run, base, calibration, remember=()):
        self.args, self.run, self.base, self.calibration = args, run, base, calibration
        self.remember, self.kept, self.seen = {str(s.image) for s in remember}, {}, {}

    @torch.no_grad()
    def estimates(self, images, samples):
        """M (B, S, S), û and γ̂ (B,); γ̂ as predicted, it may be below û."""
        names = [str(s.image) for s in samples]
        if all(name in self.kept for name in names):
            return tuple(torch.stack(values).to(self.run.device) for values in zip(*(self.kept[n] for n in names)))
        maps, phi = self.base(images, samples)
        u, gamma = self.calibration(phi, samples)
        if self.remember.issuperset(names):
            self.kept.update(zip(names, zip(maps.cpu(), u.cpu(), gamma.cpu())))
        return maps, u, gamma

    def __call__(self, images, samples):
        maps, u, gamma = self.estimates(images, samples)
        seen = zip(u.tolist(), gamma.tolist(), own_statistics(maps, self.args)[:, 1].tolist())
        self.seen.update(zip([str(s.image) for s in samples], seen))
        return scored((maps - u[:, None, None]) / (gamma - u).clamp(min=1e-6)[:, None, None], self.args)

    def plain(self, images, samples):
        """The same without calibration."""
        return scored(self.estimates(images, samples)[0], self.args)

    def estimates_of(self, samples):
        """What the last pass saw of all samples: rows (class, label, û, γ̂, the map's own γ), on every rank."""
        rows = [(s.cls, s.label, *self.seen[str(s.image)]) for s in samples[self.run.rank::self.run.world]]
        return self.run.gather(rows)


# ------------------------------------------------------------------------------------------------ what it reports


def correlations(rows):
    """Rows (class, label, û, γ̂, own γ) -> {"good": {class: r}, "defective": {class: r}}, Pearson's r of γ̂ and
    the image's own. None: fewer than three images, or one of the two is constant."""
    found = {"good": {}, "defective": {}}
    for label, name in enumerate(found):
        for cls in sorted({row[0] for row in rows}):
            gamma, own = (np.array([row[i] for row in rows if row[:2] == (cls, label)]) for i in (3, 4))
            defined = len(own) >= 3 and np.ptp(gamma) > 0 and np.ptp(own) > 0
            found[name][cls] = float(np.corrcoef(gamma, own)[0, 1]) if defined else None
    return found


def pool_threshold(rows):
    """Rows (path, class, label, score) -> the threshold with the best F1 over all of them (defective: score >= it), and
    what it does per class: {"threshold", "f1", "classes": {class: {"f1", "false_alarms", "missed"}}}. The last two are
    shares of the good and of the defective images; None where there is none to count."""
    scores, labels = np.array([row[3] for row in rows]), np.array([row[2] for row in rows], bool)
    threshold = metrics.best_f1_threshold(scores, labels)
    if threshold is None:  # no defect among them
        threshold = float(scores.max())
    called = scores >= threshold
    share = lambda part: float(part.mean()) if len(part) else None

    def f1(called, truth):
        both = called.sum() + truth.sum()
        return float(2 * (called & truth).sum() / both) if both else None

    result = {"threshold": threshold, "f1": f1(called, labels), "classes": {}}
    for cls in dict.fromkeys(row[1] for row in rows):
        mine = np.array([row[1] == cls for row in rows])
        found, truth = called[mine], labels[mine]
        result["classes"][cls] = {"f1": f1(found, truth), "false_alarms": share(found[~truth]),
                                  "missed": share(~found[truth])}
    return result


def threshold_table(thresholds):
    """{title: `pool_threshold`} -> text: one threshold for all classes, what it does to each."""
    percent = lambda value: f"{report.percent(value):>9}"
    classes = next(iter(thresholds.values()))["classes"]
    width = max(14, *(len(name) + 2 for name in classes))
    out = ["", f"{'one threshold':<{width}}" + "".join(f"{title:^27}" for title in thresholds),
           " " * width + f"{'F1':>9}{'alarms':>9}{'missed':>9}" * len(thresholds)]
    for cls in classes:
        values = [value for t in thresholds.values() for value in t["classes"][cls].values()]
        out.append(f"{cls:<{width}}" + "".join(map(percent, values)))
    out.append(f"{'pool':<{width}}" + "".join(percent(t["f1"]) + " " * 18 for t in thresholds.values()))
    return "\n".join(out)


# ----------------------------------------------------------------------------------------------------------- main


def main():
    args = runtime.parse(Args, presets(), __doc__)
    if args.base_run:
        args = of_base_run(args)
    check(args)
    run = runtime.start(args, "cada")
    kernels.set_backend(args.kernels)
    if args.eval:
        state = stored(args, runtime.load_checkpoint(args.eval, "cada"))
    else:
        state = run.checkpoint(args)
    dataset = images = features = model = None
    if not args.predict:
        dataset = run.in_turn(lambda: data.load(args.data, args.data_root or None,
                                                [c for c in args.classes.split(",") if c] or None))
        contaminate(dataset, args.contaminate, args.seed)
    if args.base_run:
        base = Recorded(Path(args.base_run), dataset, run.device)
        channels, args.steps = base.phi_channels, 0
    else:
        features = run.in_turn(lambda: Features(args)).to(run.device)
        torch.manual_seed(args.seed)  # initial weights: the same on every rank
        model = BASES[args.base](args, features.channels, features.sides).to(run.device)
        base, channels = base_function(run, features, model), model.phi_channels
        if dataset:
            images = data.Images(dataset.train, args.image_size, memory_share=args.memory_share)
            if not args.eval:
                images.preload()
    run.open(args)
    if args.eval and model:
        runtime.load_model(model, state["model"], args.eval)
    elif model:
        state = train_base(args, run, features, model, images, state)
    elif state is None:
        state = {"method": run.method, "args": runtime.as_dict(args), "model": {}, "step": 0, "seconds": 0.0}
    calibration, state = train_calibration(args, run, base, channels, images, dataset and dataset.train, state)
    if args.predict:
        score = Scorer(args, run, base, calibration)
        return report.predict(run, args, score, {
            "ratio": lambda sample, value: value / state["normal_score"]})  # above 1: above 99 % of the training images
    evaluate(args, run, base, calibration, state, dataset, features, model)


def check(args):
    """What argparse cannot see: values that must fit each other."""
    multiple, depths = 16 if args.base == "uniad" else 32, args.depths.split(",")
    if args.base_run:
        for name in ("corrupt", "shift", "predict", "contaminate"):
            if getattr(args, name):
                raise UsageError(f"--{name} needs the base itself; --base-run has only the maps of its run")
    elif args.image_size % multiple:
        raise UsageError(f"--image-size {args.image_size}: must be a multiple of {multiple} for --base {args.base}")
    if args.hidden % args.heads or args.hidden % 2:
        raise UsageError(f"--hidden {args.hidden}: must be a multiple of --heads {args.heads} and of 2")
    if len(depths) != 4 or not all(depth.isdecimal() and int(depth) for depth in depths):
        raise UsageError(f"--depths {args.depths}: must be four numbers above 0, such as 3,3,4,6")
    if args.smoothing and args.smoothing % 2 == 0:
        raise UsageError(f"--smoothing {args.smoothing}: must be odd, or 0 for none")
    if args.predict and args.calibrate == "given":
        raise UsageError("--predict with --calibrate given: nobody knows the classes of these images; use cada or "
                         "classifier")


def of_base_run(args):
    """The options with the data of the run in --base-run."""
    folder, path = Path(args.base_run), Path(args.base_run) / "args.json"
    if not path.is_file():
        raise UsageError(f"--base-run {folder}: no run there (no args.json)")
    saved = json.loads(path.read_text())
    for name in ("corrupt", "contaminate"):
        if saved.get(name):
            raise UsageError(f"--base-run {folder}: a run with --{name} {saved[name]} has other test images; give one "
                             f"without")
    own = {name: saved[name] for name in ("data", "classes", "image_size", "mask_rule")}
    return dataclasses.replace(args, **own, data_root=args.data_root or saved["data_root"])


def stored(args, state):
    """The checkpoint to evaluate. If an option of the group "calibration" differs from the checkpoint's, its
    calibration is dropped, so that stage 2 is done again on the stored base."""
    before, args.steps = state["args"], min(args.steps, state["step"])  # fewer in the checkpoint of an unfinished run
    if args.contaminate and (args.contaminate, args.seed) != (before["contaminate"], before["seed"]):
        raise UsageError("--contaminate and --seed cannot change at --eval: they chose images that the base has seen")
    groups = ("calibration", "scoring") if args.statistic == "score" else ("calibration",)  # it follows the score
    names = [f.name for f in dataclasses.fields(Args) if f.metadata["group"] in groups]
    if "normal_score" in state and all(getattr(args, name) == before[name] for name in names):
        return state
    if args.predict:
        raise UsageError("--predict needs a checkpoint whose calibration is finished and has the same options; --eval "
                         "without --predict writes one")
    return {**{name: state[name] for name in ("method", "model", "seconds")}, "step": args.steps}


def contaminate(dataset, share, seed):
    """--contaminate: moves this share of each class's defective test images to the training images, as if good."""
    rng, moved = np.random.default_rng([seed, 6]), set()
    for cls in dataset.classes:
        bad = [s for s in dataset.test if s.cls == cls and s.label]
        moved.update(bad[i] for i in rng.choice(len(bad), round(share * len(bad)), replace=False))
    dataset.train += [dataclasses.replace(s, label=0, mask=None) for s in dataset.test if s in moved]
    dataset.test = [s for s in dataset.test if s not in moved]


def evaluate(args, run, base, calibration, state, dataset, features, model):
    """The report of the contract, with the result without calibration beside it, and CADA's own."""
    need = 4 * len(dataset.test) * args.image_size ** 2  # bytes
    both = args.calibrate != "none"
    keep = both and not args.shift and need < args.memory_share * data.free_memory()
    score = Scorer(args, run, base, calibration, dataset.test if keep else ())
    plain = report.measure(run, args, dataset, score.plain, corrupt=report.corruption(args)) if both else None
    passes = []

    def after_pass():
        passes.append(score.estimates_of(dataset.test))
        found = {"clamped": sum(gamma - u < 1e-6 for _, _, u, gamma, _ in passes[-1])}
        if args.calibrate == "classifier":  # images that got the statistics of their own class
            own = dict(zip(calibration.classes, calibration.statistics[:, 1].tolist()))
            found["class accuracy"] = float(np.mean([gamma == own.get(cls) for cls, _, _, gamma, _ in passes[-1]]))
        return found

    count = lambda module: sum(p.numel() for p in module.parameters())
    setting = {"image size": args.image_size, "base": args.base_run or args.base}
    if model is not None:
        setting |= {"backbone": f"{args.backbone} ({features.backbone.weights_note})", "parameters": count(model),
                    "steps": args.steps}
        if args.base == "revdist":
            setting["cosine"] = args.cosine
    setting["calibration"] = args.calibrate
    if both:
        setting["statistics"] = f"mean, {args.statistic}"
    if calibration.head is not None:
        setting |= {"regressor": args.regressor, "dropout": args.dropout, "head parameters": count(calibration),
                    "calibration steps": args.calibration_steps}
    if args.contaminate:
        setting["defective test images moved to training"] = args.contaminate
    setting |= {"smoothing": f"{args.smoothing}x{args.smoothing} Gaussian, sigma 4" if args.smoothing else
                "that of the base's run" if args.base_run else "none",
                "image score": "max" if args.score == "max" else f"mean of the highest {args.score[3:]} %"}
    report.evaluate(run, args, dataset, score, setting=setting, seconds=state["seconds"],
                    paper=paper_numbers(dataset, args), extra=after_pass,
                    pooled=(lambda images: base(images, None)[1].mean((2, 3))) if model is not None else None,
                    compare={"without calibration": plain.rep} if both else None)
    if run.main:
        with open(run.out / "scores.csv") as file:
            rows = [(r["path"], r["class"], int(r["label"]), float(r["score"])) for r in csv.DictReader(file)]
        parts = {"without calibration": plain.rows, f"calibration: {args.calibrate}": rows} if both else {
            "without calibration": rows}
        own_report(run, parts, correlations(passes[0]))


def own_report(run, parts, related):
    """calibration.json, Fig. 5 and the table of one threshold. parts: {title: rows (path, class, label, score)};
    related: `correlations`."""
    thresholds = {title: pool_threshold(rows) for title, rows in parts.items()}
    result = {"threshold": thresholds, "correlation": related}
    runtime.write_atomic(run.out / "calibration.json", (json.dumps(result, indent=1) + "\n").encode())
    report.distributions(run.out / "pictures" / "distributions.png", parts)
    run.say(threshold_table(thresholds))
    for name, values in related.items():
        known = [value for value in values.values() if value is not None]
        if known:
            run.say(f"correlation of predicted and own γ inside a class, {name} images: mean "
                    f"{np.mean(known):+.2f}, from {min(known):+.2f} to {max(known):+.2f}")


# The paper's numbers in per cent, 256 px (UniAD: 224): I-AUROC, I-AP, P-AUROC, P-AP, first the mean over classes, then
# of one pool. Tables 1 and 2; Tables 4 and 5 print 96.0/54.7 for the pixels of RevDist + CADA on MVTec AD.
PAPER = {
    ("mvtec", "revdist", "none"): ((97.8, 99.1, 96.4, 58.1), (85.0, 94.4, 94.5, 49.0)),
    ("mvtec", "revdist", "cada"): ((98.2, 99.2, 96.1, 57.0), (98.0, 99.3, 95.6, 53.1)),
    ("mvtec", "recontrast", "none"): ((98.5, 99.4, 97.6, 60.8), (90.7, 96.8, 96.8, 56.3)),
    ("mvtec", "recontrast", "cada"): ((98.7, 99.5, 97.8, 61.3), (98.6, 99.5, 97.2, 57.2)),
    ("mvtec", "uniad", "none"): ((97.1, 99.0, 97.1, 53.1), (91.4, 97.0, 96.4, 51.1)),
    ("mvtec", "uniad", "cada"): ((97.2, 99.1, 97.0, 52.7), (95.7, 98.4, 96.1, 50.9)),
    ("visa", "revdist", "none"): ((93.8, 94.8, 96.3, 44.2), (83.5, 88.2, 94.0, 32.9)),
    ("visa", "revdist", "cada"): ((93.4, 94.8, 96.2, 44.5), (92.8, 94.4, 95.4, 41.7)),
    ("visa", "recontrast", "none"): ((95.8, 96.7, 98.5, 48.4), (93.2, 95.0, 97.1, 42.1)),
    ("visa", "recontrast", "cada"): ((95.8, 96.7, 98.3, 48.1), (95.8, 96.7, 97.8, 45.0)),
    ("visa", "uniad", "none"): ((90.9, 93.4, 98.3, 40.4), (89.0, 91.8, 97.9, 34.7)),
    ("visa", "uniad", "cada"): ((90.5, 92.7, 98.2, 39.8), (90.7, 93.3, 98.3, 35.4)),
}


def paper_numbers(dataset, args):
    """What the paper reports for this data, base and calibration (None where it reports nothing, or not so)."""
    key = dataset.name, args.base, args.calibrate
    size = 224 if args.base == "uniad" else 256
    changed = args.classes or args.corrupt or args.base_run or args.contaminate or args.statistic != "max"
    if key not in PAPER or args.image_size != size or changed:
        return None
    named = lambda values: {k: v / 100 for k, v in zip(("i_auroc", "i_ap", "p_auroc", "p_ap"), values)}
    mean, mixed = PAPER[key]
    return {"source": "CADA (arXiv 2404.00724), Tables 1 and 2", "mean": named(mean), "mixed": named(mixed)}


if __name__ == "__main__":
    runtime.launch(main)
