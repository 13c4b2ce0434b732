"""ROADS: robust prompt-driven multi-class anomaly detection under domain shift (WACV 2025).

https://arxiv.org/abs/2411.16049 · one file: model, losses, out-of-domain views, training, scoring. The authors have
published no code: what the paper leaves open is decided here, in the table below.

The idea. Reverse distillation: a student rebuilds the maps of a frozen teacher from a narrow bottleneck, and where it
fails the picture is anomalous. Two things are added to the student. *Prompts*: a few learned tokens for every product
class, which read the student's map and are read by it, so that one model keeps its classes apart. A *domain adapter*:
a second network, taught to see the same in a picture and in its recoloured copy, sets scale and offset of the norms in
the student's residual blocks (AdaIN), so that the student follows a change of light or camera.

    image (B,3,256,256) ──frozen WRN-50-2──> f1 (B,256,64,64), f2 (B,512,32,32), f3 (B,1024,16,16)
      bottleneck  f1 ──/4──┐ f2 ──/2──┐ f3 ──> concatenation ──3 residual blocks, /2──> φ (B,2048,8,8)
      selector    ζ: mean of φ over positions = ẑ0 (B,2048) ──linear──> class; picks the prompts z at test
      adapter     ξ: image ──ResNet-18, mean over positions, linear──> γ, β of every residual block (B, 2 x 6656)
      student     φ ──3 blocks, x2──prompts──> f̂3 ──4 blocks, x2──prompts──> f̂2 ──6 blocks, x2──prompts──> f̂1
      loss        0.95 L_KD + 0.025 (L_CE + L_ζ) + 0.025 L_CS                                        (Eqs. 4 to 6)
      map         Σᵢ 1 - cos(f̂ᵢ, fᵢ), resized to 256, Gaussian σ = 4;   image score = maximum

    prompts of one stage, F (B,n,C) the map's positions, z (B,10,C) the prompts of the class
      ẑ  = FFN(LN(attend(LN(z), LN(F)) + z)) + z        the prompts read the map                           (Eq. 1)
      F' = FFN(LN(attend(LN(F), LN(ẑ)) + F)) + F        the map reads the prompts                          (Eq. 3)
      the ẑ of all stages and ẑ0 ──mean over tokens, concatenation, linear──> class, for L_CE

Commands
    python roads.py                              embedded data, small model, about three minutes on two CPU cores:
                                                 mean I-AUROC 91.6, P-AUROC 85.0, P-AP 42.1
    python roads.py --shift all                  the same, also under brightness, contrast, blur and noise: I-AUROC
                                                 87.1, 83.7, 81.1, 61.2; ζ is right for every image
    python roads.py --data mvtec --shift all     the paper's model, clean and corrupted test images (a GPU)
    torchrun --nproc_per_node=4 roads.py --data mvtec --batch-size 4         the same on 4 GPUs: 16 images a step
    python roads.py --no-prompts --no-adapter    Table 4's rows: plain reverse distillation (ROADS-0); with one
                                                 of the two options ROADS-1, ROADS-2; with none of them ROADS-3
    python roads.py --adapter instance-norm      the control that the paper lacks: AdaIN whose γ, β see no image
    python roads.py --eval runs/roads-mvtec/checkpoint.pt --predict photo.png folder/

What the paper leaves open, and what this file does
    open                          here (option)                              why
    class in training             the true one                               ζ's guess is poor at the start
    class at test                 ζ's arg-max (--class-at-test)              the text says "via ζ(x)"; the report adds
                                                                             what the given class would yield
    ζ                             linear, on the mean of φ (its gradient     needs no second network
                                  reaches φ, or not: --detach-selector)
    loss of ζ                     cross-entropy of its own, weight δ         see trap 1
    token width M_t               the stage's width, a pool each (--pool)    the equations add z to maps of all widths
    tokens, head width, FFN       10, 32, 4 C with GELU (--tokens,           Hermes (CVPR 2024): the same two steps of
                                  --head-width, --ffn); heads divide C       attention
    residual of Eqs. 1, 3         from z and F, as printed (--residual)      the usual one starts after the attention
    start of the prompts          last FFN layer zero: F' = F                training starts as reverse distillation
    map held to the teacher's     F', which also feeds the next stage; no    in Eq. 3 it is called F of stage i+1
                                  ReLU after it
    norm that AdaIN replaces      the last of each residual block            13 of them, before the skip is added
    adapter                       ResNet-18, layer 4 (--adapter-backbone,    "a pre-trained ResNet"; its batch norms
                                  -weights, -size, -lr; rate 0: frozen)      keep ImageNet's statistics, folded
    code in L_CS (Eq. 4)          all γ and β (--style-code)                 the text aligns "affine parameters"
    L_KD (Eq. 5)                  a map as one vector (--distance)           RD4AD's code; it reports less from Eq. 5
                                                                             as printed; Σ (1 - cos), not 1 - Σ cos
    who sees out-of-domain views  the adapter only                           the student learns from normal ID data
    out-of-domain views           AugMix of six operations (--ood-severity)  GNL's (ICCV 2023), whose benchmark this is;
                                                                             but sharpness only sharpens here: GNL's
                                                                             factors below 1 blur, as a test does
    epochs, optimiser             100; Adam as in RD4AD (--epochs, --lr,     reverse distillation of many classes gets
                                  --schedule)                                worse when trained longer
    result                        the last checkpoint                        the best on the test set flatters

Three traps, and what answers them
  1. L_CE leaks the label: the prompts are chosen by the true class, so ẑ tells the class whatever the picture shows,
     and no gradient passes ζ's arg-max. So ζ has its own loss, L_ζ, which depends on nothing but φ.
  2. L_CS is least for an adapter that gives one code to all pictures. So the log has the variance of the codes between
     the images of a batch (code_variance), and `--adapter instance-norm` shows what AdaIN does without any code.
  3. A shift can mislead ζ. Its accuracy stands in metrics.json for every condition.

Paper: MVTec AD, 256 px: I-AUROC 98.8, P-AUROC 98.4, P-AUPRO 93.7; under brightness, contrast, blur, noise (severity 3)
I-AUROC 96.6 (printed 96.0), 97.1, 97.8, 93.2 and P-AUPRO 89.7, 91.4, 93.3, 87.8. VisA: I-AUROC 95.4, P-AUPRO 92.3.
Table 4, P-AUPRO clean / mean of the four: ROADS-0 91.2 / 82.2, -1 91.2 / 86.5, -2 93.7 / 85.0, -3 93.7 / 90.6.
"""

import functools
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import kernels
from common import UsageError, backbones, data, metrics, report, runtime
from common.runtime import option

# ------------------------------------------------------------------------------------------------------- options


@dataclass
class Args(runtime.Options):
    image_size: int = option(256, "images are resized to this square; a multiple of 32, at least 64", group="data",
                             low=64)
    backbone: str = option("wide_resnet50_2", "frozen teacher; the student mirrors its widths", group="model",
                           choices=backbones.NAMES)
    weights: str = option("", "file of the teacher's weights, or 'random' (default: the official ones)", group="model")
    depths: str = option("3,4,6", "residual blocks of the student's three stages, deepest first", group="model")
    tokens: int = option(10, "prompts of a class and stage (l)", group="model", low=1)
    head_width: int = option(32, "channels of an attention head (more where this does not divide the stage's width)",
                             group="model", low=1)
    ffn: int = option(4, "hidden width of the prompts' FFN, in multiples of the stage's width", group="model", low=1)
    pool: str = option("stage", "prompts: one pool per stage, or one for all and a linear map to each width",
                       group="model", choices=("stage", "shared"))
    residual: str = option("printed", "outer skip of Eqs. 1 and 3: from their input (printed), or from the "
                                      "attention's sum (standard)", group="model", choices=("printed", "standard"))
    detach_selector: bool = option(False, "the selector's loss does not reach the bottleneck", group="model")
    adapter_backbone: str = option("resnet18", "the adapter's network, up to stage 4", group="model",
                                   choices=backbones.NAMES)
    adapter_weights: str = option("", "file of its initial weights, or 'random' (default: the official ones)",
                                  group="model")
    adapter_size: int = option(0, "its images are resized to this square; 0: --image-size", group="model", low=0)
    style_code: str = option("affine", "what L_CS aligns: all γ and β, or the pooled features before the linear map",
                             group="model", choices=("affine", "pooled"))
    epochs: float = option(100, "passes over the training images; 0 (and --steps 0): untrained", group="training",
                           low=0)
    steps: int = option(0, "training steps, in place of --epochs when above 0", group="training", low=0)
    batch_size: int = option(16, "training images a step and process", group="training", low=1)
    lr: float = option(5e-3, "Adam's learning rate", group="training", low=0.0)
    adapter_lr: float = option(1e-4, "that of the adapter's network, which is pre-trained; 0: it stays frozen",
                               group="training", low=0.0)
    schedule: str = option("constant", "learning rate: constant, x 0.1 after 80 % of the steps, or one cosine after a "
                                       "warm-up of 5 %", group="training", choices=("constant", "step", "cosine"))
    eta: float = option(0.95, "weight of L_KD (η of Eq. 6)", group="training", low=0.0)
    delta: float = option(0.025, "weight of L_CE and of the selector's loss (δ)", group="training", low=0.0)
    mu: float = option(0.025, "weight of L_CS (μ)", group="training", low=0.0)
    distance: str = option("flat", "L_KD: cosine of whole maps, or location by location as printed", group="training",
                           choices=("flat", "location"))
    ood_severity: int = option(3, "highest level of the operations that make out-of-domain views", group="training",
                               low=0, high=10)
    sigma: float = option(4.0, "Gaussian smoothing of the map, in pixels; 0: none", group="scoring", low=0.0)
    class_at_test: str = option("selector", "which prompts a test image gets: the selector's choice, or its class's",
                                group="scoring", choices=("selector", "given"))
    prompts: bool = option(True, "class-aware prompts, class selector and their losses", group="ablations")
    adapter: str = option("style", "last norm of a residual block: AdaIN by the adapter, AdaIN by plain parameters, or "
                                   "batch norm (none; in short --no-adapter)", group="ablations",
                          choices=("style", "instance-norm", "none"))


PRESETS = {
    "paper": {},
    # For two CPU cores: a small teacher (the student mirrors its widths), fewer blocks, and many small steps. Distance,
    # epochs and learning rate were chosen on a second drawing of the embedded data.
    "laptop": dict(image_size=192, backbone="efficientnet_lite0", depths="2,2,2", adapter_backbone="efficientnet_lite0",
                   adapter_size=64, epochs=14, batch_size=4, lr=2e-3, schedule="cosine", distance="location",
                   amp="auto"),
}

# --------------------------------------------------------------------------------------------------------- model


class Features(nn.Module):
    """Frozen teacher: uint8 images (B, 3, S, S) -> its maps of strides 4, 8 and 16, joined into one row per image."""

    def __init__(self, backbone, weights, image_size):
        super().__init__()
        self.backbone = teacher(backbone, weights).fuse().to(memory_format=torch.channels_last)
        self.channels = self.backbone.channels
        self.sides = [image_size // stride for stride in self.backbone.strides]

    @torch.no_grad()
    def forward(self, images):
        maps = self.backbone(data.normalize(images).contiguous(memory_format=torch.channels_last))
        return torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1)  # (B, C, h, w) -> (B, h w C)

    def split(self, rows):
        """Rows -> [f1, f2, f3], each (B, C, h, w), stored channels-last."""
        parts = rows.split([side * side * c for side, c in zip(self.sides, self.channels)], dim=1)
        return [part.unflatten(1, (side, side, c)).permute(0, 3, 1, 2)  # (B, h w C) -> (B, C, h, w)
                for part, side, c in zip(parts, self.sides, self.channels)]


def teacher(backbone, weights):
    """The backbone with its outputs of strides 4, 8 and 16."""
    return backbones.build(backbone, weights or None, (2, 3, 4) if backbone.startswith("efficientnet") else (1, 2, 3))


def inner_divisor(backbone):
    """Width of a residual block over that of its middle convolution: 4 and 2 in (Wide-)ResNet-50's, which have three
    convolutions; 1 in blocks of two, which mirror all other teachers."""
    return {"resnet50": 4, "wide_resnet50_2": 2}.get(backbone, 1)


class Bottleneck(nn.Module):
    """f1, f2, f3 -> φ (B, 2 C3, h3/2, w3/2): all shrunk to f3's size, concatenated, fused by three residual blocks."""

    def __init__(self, channels, backbone):
        super().__init__()
        c1, c2, c3 = channels
        shrink = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.shrink1, self.shrink2 = nn.Sequential(shrink(c1, c2), shrink(c2, c3)), shrink(c2, c3)
        divisor = inner_divisor(backbone)
        block = functools.partial(backbones.BasicBlock, width=2 * c3, widen=1) if divisor == 1 else \
            functools.partial(backbones.Bottleneck, width=c3 // 2, widen=4 // divisor)  # output 4 x width
        self.blocks = nn.Sequential(block(3 * c3, stride=2), block(2 * c3, stride=1), block(2 * c3, stride=1))

    def forward(self, f1, f2, f3):
        return self.blocks(torch.cat([self.shrink1(f1), self.shrink2(f2), f3], dim=1))  # (B, 3 C3, h3, w3)


class Selector(nn.Module):
    """ζ: φ (B, 2 C3, h, w) -> logits over the N classes (B, N), and ẑ0 (B, 2 C3), the mean of φ over its positions."""

    def __init__(self, width, classes, detach):
        super().__init__()
        self.linear, self.detach = nn.Linear(width, classes), detach

    def forward(self, phi):
        z0 = phi.mean((2, 3))  # (B, 2 C3, h, w) -> (B, 2 C3)
        return self.linear(z0.detach() if self.detach else z0), z0


class Pool(nn.Module):
    """Z: the prompts of all classes. Classes (B,) -> [z (B, l, C)] of the three stages."""

    def __init__(self, classes, widths, args):
        super().__init__()
        self.shared = args.pool == "shared"
        self.z = nn.ParameterList(nn.Parameter(torch.empty(classes, args.tokens, width))
                                  for width in (widths[:1] if self.shared else widths))
        for matrix in (matrix for z in self.z for matrix in z.data):
            nn.init.xavier_uniform_(matrix)  # the (l, C) matrix of one class
        if self.shared:
            self.to_width = nn.ModuleList(nn.Linear(widths[0], width, bias=False) for width in widths)

    def forward(self, classes):
        rows = [z[classes] for z in self.z]  # each (B, l, C)
        return [linear(rows[0]) for linear in self.to_width] if self.shared else rows


class Attention(nn.Module):
    """MCA, multi-head cross-attention (Eq. 2): queries (B, n, C), memory (B, m, C) -> (B, n, C)."""

    def __init__(self, width, head_width):
        super().__init__()
        at_most = max(1, width // head_width)
        self.heads = max(heads for heads in range(1, at_most + 1) if width % heads == 0)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries, memory):
        q, k, v = (linear(t).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, n, C) -> (B, heads, n, C/heads)
                   for linear, t in ((self.to_q, queries), (self.to_k, memory), (self.to_v, memory)))
        out = kernels.cross_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, n, C/heads) -> (B, n, C)


class Read(nn.Module):
    """One step of Eqs. 1 and 3, where x reads y: x (B, n, C), y (B, m, C) -> (B, n, C)."""

    def __init__(self, width, args):
        super().__init__()
        self.standard = args.residual == "standard"
        self.norm_x, self.norm_y, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, args.head_width)
        self.ffn = nn.Sequential(nn.Linear(width, args.ffn * width), nn.GELU(), nn.Linear(args.ffn * width, width))
        nn.init.zeros_(self.ffn[2].weight)  # so that x' = x at the start
        nn.init.zeros_(self.ffn[2].bias)

    def forward(self, x, y):
        a = self.attention(self.norm_x(x), self.norm_y(y)) + x
        return self.ffn(self.norm(a)) + (a if self.standard else x)


class Prompting(nn.Module):
    """The two steps of one stage: map (B, C, h, w), z (B, l, C) -> the prompted map, and the posterior tokens ẑ."""

    def __init__(self, width, args):
        super().__init__()
        self.read, self.write = Read(width, args), Read(width, args)

    def forward(self, x, z):
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, h, w) -> (B, h w, C)
        z = self.read(z, tokens)  # (Eq. 1)
        tokens = self.write(tokens, z)  # (Eq. 3)
        return tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), z  # (B, h w, C) -> (B, C, h, w)


class AdaIN(nn.Module):
    """γ (x - mean) / standard deviation + β, both of each image and channel over its positions. x (B, C, h, w).

    style: γ and β of each image (B, 2, C), from the adapter; None: parameters of this layer, the same for all images.
    """

    def __init__(self, width, learned):
        super().__init__()
        if learned:
            self.style = nn.Parameter(torch.stack([torch.ones(width), torch.zeros(width)])[None])  # (1, 2, C)

    def forward(self, x, style=None):
        gamma, beta = (self.style if style is None else style)[..., None, None].unbind(1)  # each (B or 1, C, 1, 1)
        return gamma * F.instance_norm(x) + beta


class Block(nn.Module):
    """Residual block of the student: (B, c_in, h, w) -> (B, width, up h, up w), up = 2 by 2x2 transposed convolutions.

    divisor: 1 makes a block of two convolutions, more one of three whose middle is `width / divisor` wide. signed: no
    ReLU at the end.
    """

    def __init__(self, c_in, width, up, divisor, adapter, signed):
        super().__init__()
        inner, self.signed = width // divisor, signed
        spread = lambda a: nn.ConvTranspose2d(a, inner, 2, 2, bias=False) if up == 2 else \
            nn.Conv2d(a, inner, 3, padding=1, bias=False)
        act = lambda: (nn.BatchNorm2d(inner), nn.ReLU())
        self.body = nn.Sequential(spread(c_in), *act(), nn.Conv2d(width, width, 3, padding=1, bias=False)) \
            if divisor == 1 else nn.Sequential(nn.Conv2d(c_in, inner, 1, bias=False), *act(), spread(inner), *act(),
                                               nn.Conv2d(inner, width, 1, bias=False))
        self.norm = nn.BatchNorm2d(width) if adapter == "none" else AdaIN(width, learned=adapter == "instance-norm")
        self.skip = nn.Sequential(nn.ConvTranspose2d(c_in, width, 2, 2, bias=False), nn.BatchNorm2d(width)) \
            if up == 2 else nn.Identity()

    def forward(self, x, style=None):
        y = self.body(x)
        y = self.norm(y) if style is None else self.norm(y, style)
        y = y + self.skip(x)
        return y if self.signed else F.relu(y)


class Adapter(nn.Module):
    """ξ: uint8 images (B, 3, S, S) of any size -> pooled features (B, P), and all γ, then all β (B, 2 Σ widths).

    At the start the linear map's weights are zero and its biases give γ = 1, β = 0: plain instance norm.
    """

    def __init__(self, widths, args):
        super().__init__()
        self.size, self.widths = args.adapter_size or args.image_size, widths
        # .frozen stays true, so that the network is never in training mode; what is tuned are its folded weights
        self.network = backbones.build(args.adapter_backbone, args.adapter_weights or None, stages=(4,)).fuse()
        self.network.to(memory_format=torch.channels_last).requires_grad_(args.adapter_lr > 0)
        self.linear = nn.Linear(self.network.channels[0], 2 * sum(widths))
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data = torch.cat([torch.ones(sum(widths)), torch.zeros(sum(widths))])

    def forward(self, images):
        x = data.normalize(shrink(images, self.size)).contiguous(memory_format=torch.channels_last)
        pooled = self.network(x)[0].mean((2, 3))  # (B, P, h, w) -> (B, P)
        return pooled, self.linear(pooled)

    def styles(self, affine):
        """(B, 2 Σ widths) -> [(B, 2, C)] of all residual blocks."""
        return affine.unflatten(1, (2, -1)).split(self.widths, dim=2)  # (B, 2, Σ widths) -> each (B, 2, C)


def shrink(images, size):
    """uint8 images (B, 3, S, S) -> uint8 (B, 3, size, size); the same ones if that is their size."""
    if images.shape[2] == size:
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)


class ROADS(nn.Module):
    """The trainable part: the teacher's maps, and the images for the adapter, -> the rebuilt maps and what the losses
    need.

    maps      [f1, f2, f3], each (B, C, h, w)
    images    uint8 (B, 3, s, s), what the adapter sees (used with --adapter style only)
    classes   (B,) whose prompts are used; None: the selector's choice
    shifted   out-of-domain views of the images, for L_CS; None: not wanted
    Returns a dict: "maps", the reconstructions [f̂1, f̂2, f̂3]; with prompts "selector" and "classifier", logits
    (B, N); with the adapter "code" and, if views are given, "shifted_code" (B, ...).
    """

    def __init__(self, channels, classes, args):
        super().__init__()
        widths, depths = channels[::-1], [int(depth) for depth in args.depths.split(",")]
        divisor, self.style_code = inner_divisor(args.backbone), args.style_code
        self.bottleneck = Bottleneck(channels, args.backbone)
        self.selector = self.adapter = None
        if args.prompts:
            self.selector = Selector(2 * channels[2], classes, args.detach_selector)
            self.pool = Pool(classes, widths, args)
            self.promptings = nn.ModuleList(Prompting(width, args) for width in widths)
            self.classifier = nn.Linear(sum(widths) + 2 * channels[2], classes)
        # ResNet's maps end with a ReLU and so do the student's; EfficientNet's have negative values too
        signed = args.backbone.startswith("efficientnet")
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(c_in if i == 0 else width, width, 2 if i == 0 else 1, divisor, args.adapter,
                                signed and i == depth - 1) for i in range(depth))
            for c_in, width, depth in zip([2 * channels[2], *widths], widths, depths))
        for module in self.modules():  # as RD4AD does; transposed convolutions keep PyTorch's own start
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if args.adapter == "style":
            self.adapter = Adapter([width for width, depth in zip(widths, depths) for _ in range(depth)], args)

    def forward(self, maps, images=None, classes=None, shifted=None):
        out, posterior, x = {}, [], self.bottleneck(*maps)
        styles = iter([None] * sum(len(stage) for stage in self.stages))
        if self.adapter:
            pooled, affine = self.adapter(images if shifted is None else torch.cat([images, shifted]))
            styles = iter(self.adapter.styles(affine[:len(images)]))
            codes = affine if self.style_code == "affine" else pooled
            out["code"], out["shifted_code"] = codes[:len(images)], codes[len(images):]
        if self.selector:
            out["selector"], z0 = self.selector(x)
            prompts = self.pool(out["selector"].argmax(1) if classes is None else classes)
        rebuilt = []
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, next(styles))
            if self.selector:
                x, z = self.promptings[i](x, prompts[i])
                posterior.append(z.mean(1))  # (B, l, C) -> (B, C)
            rebuilt.append(x)
        if self.selector:
            out["classifier"] = self.classifier(torch.cat([*posterior, z0], dim=1))
        return {"maps": rebuilt[::-1], **out}


# -------------------------------------------------------------------------------------------------------- losses


def losses(model, args, maps, images=None, classes=None, shifted=None):
    """Eq. 6, with the selector's loss beside L_CE. Arguments as for ROADS; classes are the true ones.

    Returns the total and the parts (scalars): kd (Eq. 5), with prompts ce and selector, with the adapter cs (Eq. 4) and
    code_variance, which is no loss: the variance of the codes between the images, averaged over the code's entries.
    """
    out = model(maps, images, classes, shifted)
    parts = {"kd": kernels.cosine_loss(maps, [m.float() for m in out["maps"]], flat=args.distance == "flat")}
    total = args.eta * parts["kd"]
    if "selector" in out:
        parts["ce"] = F.cross_entropy(out["classifier"].float(), classes)
        parts["selector"] = F.cross_entropy(out["selector"].float(), classes)
        total = total + args.delta * (parts["ce"] + parts["selector"])
    if "code" in out:
        code, shifted_code = out["code"].float(), out["shifted_code"].float()
        parts["cs"] = (1 - F.cosine_similarity(code, shifted_code, dim=1)).mean()
        total = total + args.mu * parts["cs"]
        parts["code_variance"] = code.detach().var(0, correction=0).mean()
    return total, parts


# ------------------------------------------------------------------------------------------- out-of-domain views


# What may change: colours and their resolution. Brightness, contrast, blur and noise are left to the test. `level`: 0
# to 10, of which training uses up to --ood-severity.
OPERATIONS = {
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "posterize": lambda image, level: ImageOps.posterize(image, max(1, 4 - int(level * 4 / 10))),
    "solarize": lambda image, level: ImageOps.solarize(image, 256 - int(level * 256 / 10)),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(level * 1.8 / 10 + 0.1),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(level * 1.8 / 10 + 1),
}


def out_of_domain(image, rng, severity):
    """AugMix: three chains of one to three operations, mixed with random weights, and that with the image itself.

    image: uint8 array (H, W, 3); rng: numpy generator; severity: highest level. Returns an array of the same kind.
    """
    names, mixed = list(OPERATIONS), np.zeros(image.shape)
    for weight in rng.dirichlet([1.0, 1.0, 1.0]):
        chain = Image.fromarray(image)
        for name in rng.choice(names, size=rng.integers(1, 4)):
            chain = OPERATIONS[name](chain, rng.uniform(0.1, max(0.1, rng.integers(0, severity + 1))))
        mixed += weight * np.asarray(chain)
    share = rng.beta(1.0, 1.0)
    return (share * image + (1 - share) * mixed).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ training


class Stream(runtime.Stream):
    """The training stream, with what the adapter sees. views: (size, severity) of its pictures, or None."""

    def __init__(self, images, seed, images_per_step, whole_images, views):
        super().__init__(images, seed, images_per_step, whole_images)
        self.views = views

    def __getitem__(self, k):
        sample = super().__getitem__(k)
        if self.views:
            size, severity = self.views
            image = sample["image"] if self.whole_images else self.images[sample["index"]]
            view = shrink(image[None], size)[0]
            shifted = out_of_domain(view.permute(1, 2, 0).numpy(), np.random.default_rng([self.seed, 2, k]), severity)
            sample |= {"view": view, "shifted": torch.from_numpy(shifted).permute(2, 0, 1)}  # (H, W, 3) -> (3, H, W)
        return sample


def train(args, run, features, model, images, classes):
    """The flat training loop: trains `model` in place. Returns the finished checkpoint state."""
    before = run.checkpoint(args)
    if before and "normal_score" in before:  # training was over, only the evaluation is missing
        return before
    model, wrapped = run.wrap(model)
    pretrained = list(model.adapter.network.parameters()) if model.adapter and args.adapter_lr > 0 else []
    new = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in pretrained)]
    groups = [{"params": params, "lr": lr, "full_lr": lr}
              for params, lr in ((new, args.lr), (pretrained, args.adapter_lr)) if params]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)
    cache = runtime.precompute(run, features, images, args.batch_size, args.memory_share)
    images_per_step = args.batch_size * run.world
    views = (model.adapter.size, args.ood_severity) if model.adapter else None
    dataset = Stream(images, args.seed, images_per_step, whole_images=cache is None, views=views)
    steps = args.steps or math.ceil(args.epochs * dataset.per_epoch / images_per_step)
    label = torch.tensor([classes.index(sample.cls) for sample in images.samples])  # (N,)

    first, seconds = run.restore(before, model, optimizer)
    clock = runtime.Stopwatch(seconds)

    def state(**more):
        return {"method": run.method, "args": runtime.as_dict(args), "classes": classes, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": clock(), **more}

    bad = torch.zeros((), dtype=torch.int32, device=run.device)
    step = first - 1
    loader = run.loader(dataset, run.positions(first, steps, args.batch_size), args.workers)
    wrapped.train()
    for step, batch in enumerate(run.progress(loader, "training", steps, first), first):
        rows = run.to_device(cache[batch["index"]]) if cache is not None else features(run.to_device(batch["image"]))
        view, shifted = (run.to_device(batch[name]) if views else None for name in ("view", "shifted"))
        target = run.to_device(label[batch["index"]])
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * runtime.lr_factor(step, steps, args.schedule)
        with run.autocast():
            loss, parts = losses(wrapped, args, features.split(rows), view, target, shifted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        bad |= ~torch.isfinite(loss.detach())
        run.keep(args, step + 1, steps, bad, lambda: {
            **run.mean({"loss": loss, **parts}), "lr": optimizer.param_groups[0]["lr"],
            "images_per_s": round((step + 1) * images_per_step / clock(), 1)}, state)
    score = Scorer(args, run, features, model, classes)
    final = state(normal_score=report.normal_score(run, args, score, images.samples, images))
    run.save(final)
    return final


# ------------------------------------------------------------------------------------------------------- scoring


@functools.lru_cache(maxsize=4)
def gaussian(size, sigma, device):
    """The matrix G (size, size) for which G · map · Gᵀ is scipy's Gaussian filter: cut off at 4 σ, edges reflected."""
    offset = torch.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)  # (2r + 1,)
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    at = (torch.arange(size)[:, None] + offset) % (2 * size)  # (size, 2r + 1): the reflected signal has period 2 size
    at = torch.minimum(at, 2 * size - 1 - at)
    return torch.zeros(size, size).scatter_add_(1, at, (weight / weight.sum()).expand(at.shape)).to(device)


class Scorer:
    """A trained model as a function (images, samples) -> (maps (B, S, S), image scores (B,)).

    With prompts it also keeps account of the selector: `chosen`, {path: class}, and what `selection` reports.
    """

    def __init__(self, args, run, features, model, classes):
        self.args, self.run, self.features, self.model, self.classes = args, run, features, model.eval(), classes
        self.chosen, self.account = {}, []

    @torch.no_grad()
    def __call__(self, images, samples):
        maps = self.features.split(self.features(images))
        if not self.args.prompts:
            return self.score(maps, images)[:2]
        number = {name: i for i, name in enumerate(self.classes)}
        true = torch.tensor([number.get(sample.cls, -1) for sample in samples], device=images.device)  # -1: not known
        given = self.args.class_at_test == "given"
        s, value, guess = self.score(maps, images, true if given else None)
        wrong, value_given = (guess != true) & (true >= 0), value.clone()
        if wrong.any() and not given:
            value_given[wrong] = self.score([m[wrong] for m in maps], images[wrong], true[wrong])[1]
        self.chosen |= {sample.image: self.classes[i] for sample, i in zip(samples, guess.tolist())}
        self.account += [(right, v, sample.label, sample.cls) for sample, right, v in
                         zip(samples, (~wrong).tolist(), value_given.tolist()) if sample.cls in number]
        return s, value

    def score(self, maps, images, classes=None):
        """Maps (B, S, S), image scores (B,), and the selector's choices (B,) or None without prompts."""
        with self.run.autocast():
            out = self.model(maps, images, classes)
        s = kernels.cosine_map(maps, [m.float() for m in out["maps"]], self.args.image_size, reduce="sum")
        if self.args.sigma > 0:
            smooth = gaussian(self.args.image_size, self.args.sigma, s.device)
            s = smooth @ s @ smooth.T
        return s, s.amax((1, 2)), out["selector"].argmax(1) if "selector" in out else None

    @torch.no_grad()
    def pooled(self, images):
        """ẑ0, the mean of φ over its positions: (B, 3, S, S) -> (B, 2 C3). --save-maps keeps it for CADA."""
        with self.run.autocast():
            return self.model.bottleneck(*self.features.split(self.features(images))).mean((2, 3))

    def selection(self):
        """Of the images scored since the last call, on all ranks, whose class was trained: the share for which the
        selector chose it, and the mean I-AUROC if all images get the prompts of their own class."""
        account, self.account = self.run.gather(self.account), []
        if not account:
            return {}
        right, scores, labels, classes = zip(*account)
        scores, labels = np.array(scores, np.float32), np.array(labels)
        one_pixel = scores[:, None, None], labels[:, None, None]  # only the image metrics are wanted
        rep = metrics.evaluate(*one_pixel, scores, labels, np.array(classes))
        return {"selector accuracy": sum(right) / len(right), "I-AUROC, class given": rep["mean"]["i_auroc"]}


# ---------------------------------------------------------------------------------------------------------- main


def main(method="roads"):
    # what argparse has no word for: a short form of one value
    words = ["--adapter=none" if word == "--no-adapter" else word for word in sys.argv[1:]]
    args = runtime.parse(Args, PRESETS, __doc__, words)
    check(args)
    run = runtime.start(args, method)
    kernels.set_backend(args.kernels)
    state = runtime.load_checkpoint(args.eval, method) if args.eval else None
    dataset = images = None
    if not args.predict:
        dataset = run.in_turn(lambda: data.load(args.data, args.data_root or None,
                                                [c for c in args.classes.split(",") if c] or None))
        images = data.Images(dataset.train, args.image_size, memory_share=args.memory_share)
    classes = state["classes"] if state else dataset.classes
    if dataset and args.class_at_test == "given" and args.prompts:
        unknown = [name for name in dataset.classes if name not in classes]
        if unknown:
            raise UsageError(f"--class-at-test given: {args.eval} knows no class '{unknown[0]}'; it was trained on "
                             f"{', '.join(classes)}")
    features = run.in_turn(lambda: Features(args.backbone, args.weights, args.image_size)).to(run.device)
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    model = run.in_turn(lambda: ROADS(features.channels, len(classes), args)).to(run.device)
    if images and state is None:
        images.preload()
    run.open(args)
    if state is None:
        state = train(args, run, features, model, images, classes)
    runtime.load_model(model, state["model"], args.eval or run.out / "checkpoint.pt")
    score = Scorer(args, run, features, model, classes)

    if args.predict:
        chosen = {"class": lambda sample, value: score.chosen[sample.image]} if args.prompts else {}
        return report.predict(run, args, score, {
            "ratio": lambda sample, value: value / state["normal_score"], **chosen})  # above 1: above 99 % of training
    setting = {
        "image size": args.image_size, "backbone": f"{args.backbone} ({features.backbone.weights_note})",
        "depths": args.depths,
        "prompts": f"{args.tokens} a class, {args.residual} residual" if args.prompts else "none",
        **({"class at test": args.class_at_test} if args.prompts else {}),
        "adapter": f"{args.adapter_backbone} at {model.adapter.size} px (start: {model.adapter.network.weights_note}; "
                   f"{'tuned' if args.adapter_lr > 0 else 'frozen'})" if model.adapter else args.adapter,
        "distillation": args.distance, "weights of the losses": f"{args.eta:g}, {args.delta:g}, {args.mu:g}",
        "smoothing": f"Gaussian, sigma {args.sigma:g}" if args.sigma else "none", "image score": "max",
        "parameters": sum(p.numel() for p in model.parameters()), "steps": state["step"]}
    report.evaluate(run, args, dataset, score, setting=setting, seconds=state["seconds"],
                    paper=paper_numbers(dataset, args), extra=score.selection, pooled=score.pooled)


def check(args):
    """What single options cannot check about themselves."""
    depths = args.depths.split(",")
    if args.image_size % 32:
        raise UsageError(f"--image-size {args.image_size}: must be a multiple of 32: the bottleneck is 1/32 of it")
    if args.adapter_size % 32:
        raise UsageError(f"--adapter-size {args.adapter_size}: must be a multiple of 32, or 0 for --image-size")
    if len(depths) != 3 or not all(depth.isdecimal() and int(depth) for depth in depths):
        raise UsageError(f"--depths {args.depths}: must be three numbers above 0, such as 3,4,6")
    if args.predict and args.prompts and args.class_at_test == "given":
        raise UsageError("--class-at-test given: the class of files for --predict is not known; use selector")


PAPER_MVTEC = {  # Table 1, per cent: I-AUROC, P-AUROC
    "bottle": (100, 99.1), "cable": (99.3, 99.0), "capsule": (96.0, 99.1), "carpet": (99.4, 99.2), "grid": (100, 99.3),
    "hazelnut": (100, 98.9), "leather": (100, 99.5), "metal_nut": (99.7, 98.2), "pill": (96.2, 98.0),
    "screw": (98.5, 99.6), "tile": (99.2, 96.5), "toothbrush": (99.2, 98.7), "transistor": (96.3, 95.8),
    "wood": (99.1, 96.0), "zipper": (99.6, 98.5)}
PAPER_MEANS = {"mvtec": {"i_auroc": 0.9883, "p_auroc": 0.9836, "p_aupro": 0.9369},
               "visa": {"i_auroc": 0.9542, "p_aupro": 0.9227}}


def paper_numbers(dataset, args):
    """What the paper reports for this data (None where it reports nothing, or not for these classes or this size)."""
    if dataset.name not in PAPER_MEANS or args.image_size != 256 or args.classes or args.corrupt:
        return None
    rows = PAPER_MVTEC if dataset.name == "mvtec" else {}
    return {"source": "ROADS (WACV 2025), Tables 1, 3 and 4",
            "classes": {name: {"i_auroc": i / 100, "p_auroc": p / 100} for name, (i, p) in rows.items()},
            "mean": PAPER_MEANS[dataset.name]}


if __name__ == "__main__":
    runtime.launch(main)
