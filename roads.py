"""ROADS: robust prompt-driven multi-class anomaly detection under domain shift (WACV 2025).

https://arxiv.org/abs/2411.16049 · one file: model, losses, out-of-domain views, training, scoring.

The idea. Reverse distillation: a student rebuilds the maps of a frozen teacher from a narrow
bottleneck, and where it fails the picture is anomalous. Two things are added to the student.
*Prompts*: a few learned tokens for every product class, which read the student's map and are read
by it, so that one model keeps its classes apart. A *domain adapter*: a second network, taught to
see the same in a picture and in its recoloured copy, sets scale and offset of the norms in the
student's residual blocks (AdaIN), so that the student follows a change of light or camera.

    image (B,3,256,256) ──frozen WRN-50-2──> f1 (B,256,64,64), f2 (B,512,32,32), f3 (B,1024,16,16)
      bottleneck  f1 ──/4──┐ f2 ──/2──┐ f3 ──> joined ──3 residual blocks, /2──> φ (B,2048,8,8)
      selector    ζ: mean of φ over positions = ẑ0 (B,2048) ──linear──> class; picks z at test
      adapter     ξ: image ──ResNet-18, mean, linear──> γ, β of every residual block (B, 2 x 6656)
      student     φ ──3 blocks, x2──prompts──> f̂3 ──4, x2──prompts──> f̂2 ──6, x2──prompts──> f̂1
      loss        0.95 L_KD + 0.025 L_CE + 0.025 L_CS (Eqs. 4 to 6) + 0.025 L_ζ
      map         Σᵢ 1 - cos(f̂ᵢ, fᵢ), resized to 256, Gaussian σ = 4;   image score = maximum

    prompts of one stage, F (B,n,C) the map's positions, z (B,10,C) the prompts of the class
      ẑ  = FFN(LN(MCA(LN(z), LN(F)) + z)) + z        the prompts read the map               (Eq. 1)
      F' = FFN(LN(MCA(LN(F), LN(ẑ)) + F)) + F        the map reads the prompts              (Eq. 3)
      ẑ of all stages and ẑ0 ──mean over tokens, joined, linear──> class, for L_CE

Commands
    python roads.py                              embedded data, small model, about six minutes on
                                                 one core: mean I-AUROC 91.1, P-AUROC 89.2 (README)
    python roads.py --shift all                  also under brightness, contrast, blur and noise
    python roads.py --data mvtec --shift all     the paper's model and its tables (a GPU)
    torchrun --nproc_per_node=4 roads.py --data mvtec --batch-size 4         the same on 4 GPUs
    python roads.py --no-prompts                 Table 4: ROADS-1, the adapter alone;
                                                 --no-adapter: ROADS-2, the prompts alone; both
                                                 options: ROADS-0, distillation; neither: ROADS-3
    python roads.py --adapter instance-norm      a control: AdaIN whose γ, β see no image
    python roads.py --eval runs/roads-mvtec/checkpoint.pt --predict photo.png folder/

The authors have published no code. Where the paper leaves something open, this file does the
following; the reasons, and what was measured, are in docs/roads-choices.md.
    class               the true one in training, ζ's arg-max at test (--class-at-test)
    ζ                   linear on the mean of φ, with a cross-entropy of its own, L_ζ
    prompts             10 tokens per stage, as wide as the stage; FFN's last layer starts at zero
    student's output    F', held to the teacher's map and fed to the next stage; no ReLU after it
    AdaIN               in place of the last norm of each residual block, before the skip is added
    adapter             ResNet-18 up to layer 4, tuned with a rate of its own (--adapter-lr)
    code of L_CS        all γ and β
    L_KD                cosine of a whole map, as in RD4AD's code (--distance location: as printed)
    out-of-domain views AugMix of six operations, for the adapter only
    map                 as RD4AD's; not in the paper and off in its preset: --norm-power p, a distance
                        counts by the teacher's magnitude there, to the power p, so that the noise
                        of a plain background does not outshine the object
    epochs, optimiser   100 (RD4AD: 200 per class); Adam as RD4AD; incomplete batches are dropped
    test under shift    each condition is a test set of its own; the last checkpoint is the result

Paper: MVTec AD, 256 px: I-AUROC 98.8, P-AUROC 98.4, P-AUPRO 93.7; under brightness, contrast, blur,
noise (severity 3) I-AUROC 96.6 (printed 96.0), 97.1, 97.9 (printed 97.8), 93.2 and P-AUPRO 89.7,
91.4, 93.3, 87.8. VisA: I-AUROC 95.4, P-AUPRO 92.3. Table 4, P-AUPRO clean / mean of the four:
ROADS-0 91.2 / 82.2, ROADS-1 91.2 / 86.5, ROADS-2 93.7 / 85.0, ROADS-3 93.7 / 90.6.
"""

from dataclasses import dataclass

from common.options import BACKBONES, Options, before_torch, option

# ----------------------------------------------------------------------------------------- options


@dataclass
class Args(Options):
    image_size: int = option(
        256,
        "images are resized to this square; a multiple of 32, at least 64",
        group="data",
        low=64,
    )
    backbone: str = option(
        "wide_resnet50_2",
        "frozen teacher; the student mirrors its widths",
        group="model",
        choices=BACKBONES,
    )
    weights: str = option(
        "",
        "file of the teacher's weights, or 'random' (default: the official ones)",
        group="model",
    )
    depths: str = option(
        "3,3,4,6",
        "residual blocks of the bottleneck and of the student's three stages, deepest first "
        "(RD4AD with ResNet-18: 2,2,2,2)",
        group="model",
    )
    tokens: int = option(10, "prompts of a class and stage (l)", group="model", low=1)
    head_width: int = option(
        32,
        "channels of an attention head (more where this does not divide the stage's width)",
        group="model",
        low=1,
    )
    ffn: int = option(
        4,
        "hidden width of the prompts' FFN, in multiples of the stage's width",
        group="model",
        low=1,
    )
    detach_selector: bool = option(
        False,
        "the selector's loss does not reach the bottleneck (it then mistakes classes under noise)",
        group="model",
    )
    adapter_backbone: str = option(
        "resnet18", "the adapter's network, up to stage 4", group="model", choices=BACKBONES
    )
    adapter_weights: str = option(
        "",
        "file of its initial weights, or 'random' (default: the official ones)",
        group="model",
    )
    adapter_size: int = option(
        0, "its images are resized to this square; 0: --image-size", group="model", low=0
    )
    epochs: float = option(
        100,
        "passes over the training images; 0 (and --steps 0): untrained",
        group="training",
        low=0,
    )
    steps: int = option(
        0, "training steps, in place of --epochs when above 0", group="training", low=0
    )
    batch_size: int = option(16, "training images a step and process", group="training", low=1)
    lr: float = option(5e-3, "Adam's learning rate", group="training", low=0.0)
    adapter_lr: float = option(
        1e-4,
        "that of the adapter's network, which is pre-trained; 0: it stays frozen",
        group="training",
        low=0.0,
    )
    schedule: str = option(
        "constant",
        "learning rate: constant, x 0.1 after 80 % of the steps, or one cosine after a warm-up "
        "of 5 %",
        group="training",
        choices=("constant", "step", "cosine"),
    )
    eta: float = option(0.95, "weight of L_KD (η of Eq. 6)", group="training", low=0.0)
    delta: float = option(0.025, "weight of L_CE (δ)", group="training", low=0.0)
    zeta: float = option(
        0.025, "weight of L_ζ, the selector's own loss (not in Eq. 6)", group="training", low=0.0
    )
    mu: float = option(0.025, "weight of L_CS (μ)", group="training", low=0.0)
    distance: str = option(
        "flat",
        "L_KD: cosine of whole maps, or location by location as printed",
        group="training",
        choices=("flat", "location"),
    )
    ood_severity: int = option(
        3,
        "highest level of the operations that make out-of-domain views",
        group="training",
        low=0,
        high=10,
    )
    norm_power: float = option(
        0.0,
        "a distance on the map counts by the magnitude of the teacher's features there, to this "
        "power; 0: not at all, as in the paper",
        group="scoring",
        low=0.0,
        high=2.0,
    )
    sigma: float = option(
        4.0,
        "Gaussian smoothing of the map, in pixels; 0: none",
        group="scoring",
        low=0.0,
        high=100.0,
    )
    class_at_test: str = option(
        "selector",
        "which prompts a test image gets: the selector's choice, or its class's",
        group="scoring",
        choices=("selector", "given"),
    )
    prompts: bool = option(
        True, "class-aware prompts, class selector and their losses", group="ablations"
    )
    adapter: str = option(
        "style",
        "last norm of a residual block: AdaIN by the adapter, AdaIN by plain parameters, or "
        "batch norm (none)",
        group="ablations",
        choices=("style", "instance-norm", "none"),
        words={"--no-adapter": "none"},
    )


PRESETS = {
    "paper": {},
    # For two CPU cores: a small teacher (the student mirrors its widths), fewer blocks, and many
    # small steps. Distance, epochs, learning rate and the power were chosen on a second drawing of
    # the embedded data.
    "laptop": dict(
        image_size=192,
        backbone="efficientnet_lite0",
        depths="3,2,2,2",
        adapter_backbone="efficientnet_lite0",
        adapter_size=64,
        epochs=14,
        batch_size=4,
        lr=2e-3,
        schedule="cosine",
        distance="location",
        norm_power=0.25,
        amp="auto",
    ),
}

if __name__ == "__main__":
    before_torch(Args, PRESETS, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import kernels
from common import UsageError, backbones, data, metrics, options, papers, report, runtime
from common import thresholds
from common.maps import gaussian, image_score, name_of_power, name_of_rule, name_of_sigma

# ------------------------------------------------------------------------------------------- model


def inner_divisor(backbone):
    """Width of a residual block over that of its middle convolution: 4 and 2 in (Wide-)ResNet-50's,
    which have three convolutions; 1 in blocks of two, which mirror all other teachers."""
    return {"resnet50": 4, "wide_resnet50_2": 2}.get(backbone, 1)


def halving(c_in, c_out):
    """3x3 convolution with stride 2, batch norm, ReLU."""
    layer = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())


class Bottleneck(nn.Module):
    """f1, f2, f3 -> φ (B, 2 C3, h3/2, w3/2): all shrunk to f3's size, joined, fused by `depth`
    residual blocks."""

    def __init__(self, channels, depth, backbone):
        super().__init__()
        c1, c2, c3 = channels
        self.shrink1 = nn.Sequential(halving(c1, c2), halving(c2, c3))
        self.shrink2 = halving(c2, c3)
        self.blocks = nn.Sequential(self.block(backbone, 3 * c3, 2 * c3, stride=2))
        for _ in range(depth - 1):
            self.blocks.append(self.block(backbone, 2 * c3, 2 * c3, stride=1))

    @staticmethod
    def block(backbone, c_in, width, stride):
        """A residual block of the teacher's kind: (B, c_in, h, w) -> (B, width, h/stride, ...)."""
        divisor = inner_divisor(backbone)
        if divisor == 1:
            return backbones.BasicBlock(c_in, width, stride, widen=1)
        return backbones.Bottleneck(c_in, width // 4, stride, widen=4 // divisor)

    def forward(self, f1, f2, f3):
        joined = torch.cat([self.shrink1(f1), self.shrink2(f2), f3], dim=1)  # (B, 3 C3, h3, w3)
        return self.blocks(joined)


class Selector(nn.Module):
    """ζ: φ (B, 2 C3, h, w) -> logits over the N classes (B, N), and ẑ0 (B, 2 C3), the mean of φ
    over its positions."""

    def __init__(self, width, n_classes, detach):
        super().__init__()
        self.linear, self.detach = nn.Linear(width, n_classes), detach

    def forward(self, phi):
        z0 = phi.mean((2, 3))  # (B, 2 C3, h, w) -> (B, 2 C3)
        read = z0.detach() if self.detach else z0
        return self.linear(read), z0


class PromptPool(nn.Module):
    """Z: the prompts of all classes. Class numbers (B,) -> [z (B, l, C)] of the three stages."""

    def __init__(self, n_classes, widths, args):
        super().__init__()
        self.z = nn.ParameterList()
        for width in widths:
            z = nn.Parameter(torch.empty(n_classes, args.tokens, width))
            for of_class in z.data:
                nn.init.xavier_uniform_(of_class)  # the (l, C) matrix of one class
            self.z.append(z)

    def forward(self, class_number):
        return [z[class_number] for z in self.z]


class CrossAttentionBlock(nn.Module):
    """Eqs. 1 and 3, which are one formula: x reads y. x (B, n, C), y (B, m, C) -> (B, n, C).

    The outer skip starts from x, as printed, and not from the attention's sum. With the FFN's last
    layer at zero, x' = x at the start of the training: plain reverse distillation.
    """

    def __init__(self, width, args):
        super().__init__()
        self.heads = number_of_heads(width, args.head_width)
        self.norm_x, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.Linear(width, args.ffn * width), nn.GELU(), nn.Linear(args.ffn * width, width)
        )
        nn.init.zeros_(self.ffn[2].weight)
        nn.init.zeros_(self.ffn[2].bias)

    def attend(self, x, y):
        """Multi-head cross-attention of LN(x) and LN(y) (Eq. 2): -> (B, n, C).

        As printed, in every head with blocks W of d = C/heads rows (of W_o: columns):

            q = LN(x) W_qᵀ,  k = LN(y) W_kᵀ,  v = LN(y) W_vᵀ
            MCA = sum over heads of softmax(q kᵀ/√d) v W_oᵀ

        One of x and y is a map of thousands of positions, the other the ten prompts. So that the
        map is never projected, its matrices act on the prompts instead, which is the same sum:

            the prompts read   softmax((q W_k) LN(y)ᵀ/√d) LN(y),  and then W_vᵀ, W_oᵀ
            the map reads      softmax(LN(x) (k W_q)ᵀ/√d) (v W_oᵀ)
        """
        norms = self.norm_x, self.norm_y
        projections = self.to_q, self.to_k, self.to_v, self.to_out
        return kernels.few_token_attention(x, y, *norms, *projections, self.heads)  # Eq. 2

    def forward(self, x, y):
        attended = self.attend(x, y) + x
        return self.ffn(self.norm(attended)) + x


def number_of_heads(width, head_width):
    """The most heads that divide `width` and leave each at least `head_width` channels."""
    heads = max(1, width // head_width)
    while width % heads:
        heads -= 1
    return heads


class Prompting(nn.Module):
    """The prompts of one stage: map F (B, C, h, w), z (B, l, C) -> F' (B, C, h, w), ẑ (B, l, C)."""

    def __init__(self, width, args):
        super().__init__()
        self.prompts_read = CrossAttentionBlock(width, args)
        self.map_reads = CrossAttentionBlock(width, args)

    def forward(self, x, z):
        positions = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, h, w) -> (B, h w, C)
        z_hat = self.prompts_read(z, positions)  # Eq. 1
        positions = self.map_reads(positions, z_hat)  # Eq. 3
        grid = positions.unflatten(1, x.shape[2:])  # (B, h w, C) -> (B, h, w, C)
        return grid.permute(0, 3, 1, 2), z_hat  # (B, h, w, C) -> (B, C, h, w)


class AdaIN(nn.Module):
    """γ (x - mean) / standard deviation + β, both of each image and channel over its positions.

    x (B, C, h, w). style: γ and β of each image (B, 2, C), from the adapter; None: this layer's own
    parameters, the same for all images.
    """

    def __init__(self, width, learned):
        super().__init__()
        if learned:
            style = torch.stack([torch.ones(width), torch.zeros(width)])  # (2, C)
            self.style = nn.Parameter(style[None])  # (1, 2, C)

    def forward(self, x, style=None):
        if style is None:
            style = self.style
        gamma, beta = style[..., None, None].unbind(1)  # (B, 2, C, 1, 1) -> twice (B, C, 1, 1)
        return (gamma * F.instance_norm(x) + beta).to(x.dtype)


class Block(nn.Module):
    """Residual block of the student: (B, c_in, h, w) -> (B, width, up h, up w), up = 1 or 2.

    divisor: 1 makes a block of two convolutions, more one of three whose middle one is
    `width / divisor` wide. norm: the last one. signed: no ReLU at the end.
    """

    def __init__(self, c_in, width, up, divisor, norm, signed):
        super().__init__()
        self.signed = signed
        if divisor == 1:
            self.body = nn.Sequential(
                spread(c_in, width, up),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
            )
        else:
            inner = width // divisor
            self.body = nn.Sequential(
                nn.Conv2d(c_in, inner, 1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                spread(inner, inner, up),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 1, bias=False),
            )
        self.norm = norm
        self.skip = nn.Identity()
        if up == 2:
            self.skip = nn.Sequential(spread(c_in, width, up), nn.BatchNorm2d(width))

    def forward(self, x, style=None):
        y = self.body(x)
        if style is None:
            y = self.norm(y)
        else:
            y = self.norm(y, style)
        y = y + self.skip(x)
        return y if self.signed else F.relu(y)


def spread(c_in, c_out, up):
    """A 3x3 convolution, or, where the size is to double, a 2x2 transposed one."""
    if up == 2:
        return nn.ConvTranspose2d(c_in, c_out, 2, stride=2, bias=False)
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)


def last_norm(width, args):
    """The norm of a residual block that the adapter may set (--adapter)."""
    if args.adapter == "none":
        return nn.BatchNorm2d(width)
    return AdaIN(width, learned=args.adapter == "instance-norm")


class Adapter(nn.Module):
    """ξ: uint8 images (B, 3, S, S) of any size -> codes (B, 2 Σ widths): all γ, then all β.

    widths, depths: of the student's stages. At the start the linear map's weights are zero and its
    biases give γ = 1, β = 0: plain instance norm.
    """

    def __init__(self, widths, depths, args):
        super().__init__()
        self.size = args.adapter_size or args.image_size
        self.widths, self.depths = widths, depths
        # .frozen stays true, so that the network is never in training mode; what is tuned are its
        # folded weights
        weights = args.adapter_weights or None
        name = args.adapter_backbone
        self.network = backbones.build(name, weights, stages=(4,), prefix="adapter-").fuse()
        self.network.to(memory_format=torch.channels_last).requires_grad_(args.adapter_lr > 0)
        norms = sum(width * depth for width, depth in zip(widths, depths))
        self.linear = nn.Linear(self.network.channels[0], 2 * norms)
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data = torch.cat([torch.ones(norms), torch.zeros(norms)])

    def forward(self, images):
        x = data.normalize(resized(images, self.size))
        x = self.network(x.contiguous(memory_format=torch.channels_last))[0]
        pooled = x.to(self.linear.weight.dtype).mean((2, 3))  # (B, P, h, w) -> (B, P)
        with torch.autocast(x.device.type, enabled=False):  # near γ = 1 bfloat16 has steps of 1/128
            return self.linear(pooled)  # (B, 2 Σ widths)

    def styles(self, code):
        """Codes (B, 2 Σ widths) -> for each stage, the γ and β (B, 2, C) of each of its blocks."""
        sizes = [width * depth for width, depth in zip(self.widths, self.depths)]
        stages = code.unflatten(1, (2, -1)).split(sizes, dim=2)  # each (B, 2, depth C)
        styles = []
        for stage, depth in zip(stages, self.depths):
            styles.append(stage.unflatten(2, (depth, -1)).unbind(2))  # depth times (B, 2, C)
        return styles


def resized(images, size):
    """uint8 images (B, 3, S, S) -> (B, 3, size, size); the same ones if that is their size."""
    if images.shape[2] == size:
        return images
    images = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return images.round().to(torch.uint8)


class ROADS(nn.Module):
    """The trainable part (Fig. 2): the teacher's maps, and the images for the adapter, -> the
    rebuilt maps and what the losses need.

    maps          [f1, f2, f3], each (B, C, h, w)
    images        uint8 (B, 3, s, s), what the adapter sees (used with --adapter style only)
    class_number  (B,) whose prompts are used; None: the selector's choice
    shifted       out-of-domain views of the images, for L_CS; None: not wanted
    Returns a dict: "maps", the reconstructions [f̂1, f̂2, f̂3]; "pooled", the mean of φ (B, 2 C3);
    with prompts "selector" and "classifier", logits (B, N); with the adapter "code" and, if views
    are given, "shifted_code", each (B, 2 Σ widths).
    """

    def __init__(self, channels, n_classes, args):
        super().__init__()
        widths = channels[::-1]
        neck_depth, *depths = map(int, args.depths.split(","))
        self.depths = depths
        phi_width = 2 * channels[2]
        self.bottleneck = Bottleneck(channels, neck_depth, args.backbone)
        self.selector = self.adapter = None
        if args.prompts:
            self.selector = Selector(phi_width, n_classes, args.detach_selector)
            self.pool = PromptPool(n_classes, widths, args)
            self.promptings = nn.ModuleList(Prompting(width, args) for width in widths)
            self.classifier = nn.Linear(sum(widths) + phi_width, n_classes)
        self.stages = nn.ModuleList()
        c_in = phi_width
        for width, depth in zip(widths, depths):
            self.stages.append(self.stage(c_in, width, depth, args))
            c_in = width
        for module in self.modules():  # as in RD4AD; transposed convolutions keep PyTorch's start
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if args.adapter == "style":
            self.adapter = Adapter(widths, depths, args)

    @staticmethod
    def stage(c_in, width, depth, args):
        """`depth` residual blocks, of which the first doubles the size."""
        signed = backbones.signed(args.backbone)  # else a ReLU ends the student's maps, too
        divisor = inner_divisor(args.backbone)
        blocks = nn.ModuleList()
        for i in range(depth):
            up = 2 if i == 0 else 1
            is_last = i == depth - 1
            norm = last_norm(width, args)
            blocks.append(Block(c_in, width, up, divisor, norm, signed and is_last))
            c_in = width
        return blocks

    def forward(self, maps, images=None, class_number=None, shifted=None):
        phi = self.bottleneck(*maps)
        out = {"pooled": phi.float().mean((2, 3))}  # (B, C, h, w) -> (B, C)
        styles = [[None] * depth for depth in self.depths]
        if self.adapter:
            out |= self.codes(images, shifted)
            styles = self.adapter.styles(out["code"])
        if self.selector:
            out["selector"], z0 = self.selector(phi)
            if class_number is None:
                class_number = out["selector"].argmax(1)
            z = self.pool(class_number)
        x = phi
        rebuilt, posterior = [], []  # f̂3, f̂2, f̂1; the mean ẑ of each stage
        for i, blocks in enumerate(self.stages):
            for block, style in zip(blocks, styles[i]):
                x = block(x, style)
            if self.selector:
                x, z_hat = self.promptings[i](x, z[i])
                posterior.append(z_hat.mean(1))  # (B, l, C) -> (B, C)
            rebuilt.append(x)
        if self.selector:
            out["classifier"] = self.classifier(torch.cat([*posterior, z0], dim=1))
        out["maps"] = rebuilt[::-1]
        return out

    def codes(self, images, shifted):
        """ξ of the images, and of their out-of-domain views if there are any."""
        if shifted is None:
            return {"code": self.adapter(images)}
        code, shifted_code = self.adapter(torch.cat([images, shifted])).chunk(2)
        return {"code": code, "shifted_code": shifted_code}


# ------------------------------------------------------------------------------------------ losses


def losses(model, maps, images, class_number, shifted, args):
    """Eq. 6, and the selector's own loss L_ζ. Arguments as for ROADS; class_number is the true one.

    Returns the total and the parts (scalars): kd (Eq. 5); with prompts ce and selector; with the
    adapter cs (Eq. 4) and code_variance, which is no loss: the variance of the codes between the
    images, averaged over the code's entries.
    """
    out = model(maps, images, class_number, shifted)
    flat = args.distance == "flat"
    L_KD = kernels.cosine_loss(maps, out["maps"], flat=flat)  # Eq. 5: Σ (1 - cos)
    L_CE = L_zeta = L_CS = 0.0
    parts = {"kd": L_KD}
    if "selector" in out:
        L_CE = F.cross_entropy(out["classifier"].float(), class_number)
        # L_CE alone never teaches ζ: the prompts, chosen by the true class, tell that class
        # whatever the picture shows, and no gradient passes the arg-max
        L_zeta = F.cross_entropy(out["selector"].float(), class_number)
        parts |= {"ce": L_CE, "selector": L_zeta}
    if "code" in out:
        code, shifted_code = out["code"].float(), out["shifted_code"].float()
        L_CS = (1 - F.cosine_similarity(code, shifted_code, dim=1)).mean()  # Eq. 4
        # one code for all pictures makes L_CS least; the log would show it here
        variance = code.detach().var(0, correction=0).mean()
        parts |= {"cs": L_CS, "code_variance": variance}
    total = args.eta * L_KD + args.delta * L_CE + args.mu * L_CS  # Eq. 6
    return total + args.zeta * L_zeta, parts


# ----------------------------------------------------------------------------- out-of-domain views

# As in GNL's AugMix: what changes colours and their resolution, and nothing that the benchmark's
# corruptions do (brightness, blur, noise; contrast only as far as autocontrast and equalize change
# it). level: 0 to 10, of which training uses up to --ood-severity.


def autocontrast(image, level):
    return ImageOps.autocontrast(image)


def equalize(image, level):
    return ImageOps.equalize(image)


def posterize(image, level):
    return ImageOps.posterize(image, max(1, 4 - int(level * 4 / 10)))


def solarize(image, level):
    return ImageOps.solarize(image, 256 - int(level * 256 / 10))


def color(image, level):
    return ImageEnhance.Color(image).enhance(level * 1.8 / 10 + 0.1)


def sharpness(image, level):
    """Sharpens only: GNL's factors below 1 blur, as a test corruption does."""
    return ImageEnhance.Sharpness(image).enhance(level * 1.8 / 10 + 1)


OPERATIONS = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "posterize": posterize,
    "solarize": solarize,
    "color": color,
    "sharpness": sharpness,
}


def out_of_domain(image, rng, severity):
    """AugMix: three chains of one to three operations, mixed with random weights, and that with the
    image itself. The level is drawn anew for every operation.

    image: uint8 array (H, W, 3); rng: numpy generator; severity: highest level. Returns an array of
    the same kind.
    """
    mixed = np.zeros(image.shape)
    for weight in rng.dirichlet([1.0, 1.0, 1.0]):
        chain = Image.fromarray(image)
        length = rng.integers(1, 4)
        for name in rng.choice(list(OPERATIONS), size=length):
            highest = max(0.1, rng.integers(0, severity + 1))
            chain = OPERATIONS[name](chain, rng.uniform(0.1, highest))
        mixed += weight * np.asarray(chain)
    share = rng.beta(1.0, 1.0)
    return (share * image + (1 - share) * mixed).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------- training


class Stream(runtime.Stream):
    """The training stream, with what the adapter sees of every picture: {"view", "shifted"}, the
    picture at the adapter's size and an out-of-domain view of it, uint8 (3, size, size)."""

    def __init__(self, images, seed, images_per_step, needs_images, size, severity):
        super().__init__(images, seed, images_per_step, needs_images)
        self.size, self.severity = size, severity

    def __getitem__(self, k):
        sample = super().__getitem__(k)
        image = sample["image"] if self.needs_images else self.images[sample["index"]]
        view = resized(image[None], self.size)[0]
        pixels = view.permute(1, 2, 0).numpy()  # (3, size, size) -> (size, size, 3)
        shifted = out_of_domain(pixels, np.random.default_rng([self.seed, 2, k]), self.severity)
        shifted = torch.from_numpy(shifted).permute(2, 0, 1)  # (size, size, 3) -> (3, size, size)
        return {**sample, "view": view, "shifted": shifted}


def optimizer_of(model, args):
    """Adam as in RD4AD; the adapter's pre-trained network has a learning rate of its own."""
    new, pretrained = [], []
    for name, parameter in model.named_parameters():
        if name.startswith("adapter.network."):
            pretrained.append(parameter)
        else:
            new.append(parameter)
    groups = [{"params": new, "lr": args.lr}]
    if pretrained and args.adapter_lr > 0:
        groups.append({"params": pretrained, "lr": args.adapter_lr})
    return torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)


def train(args, run, features, model, images, class_names):
    """The flat training loop: trains `model` in place. Returns the finished checkpoint state."""
    model, parallel = run.wrap(model)
    optimizer = optimizer_of(model, args)
    job = runtime.Training(run, args, model, optimizer)
    if job.finished:  # only the evaluation is missing
        return job.resumed
    job.contents |= {"classes": class_names}
    frozen = runtime.Frozen(run, features, images, args)
    common = images, args.seed, args.batch_size * run.world, frozen.needs_images
    if model.adapter:
        stream = Stream(*common, model.adapter.size, args.ood_severity)
    else:
        stream = runtime.Stream(*common)
    steps = args.steps or stream.steps(args.epochs)
    class_number = torch.tensor(class_numbers(images.samples, class_names))
    class_number = class_number.to(run.device)  # (N,)

    parallel.train()
    for step, batch in job.batches(stream, steps):
        job.set_rate(step)
        maps = frozen(batch)  # f1, f2, f3: (B, C, h, w)
        true = class_number[run.to_device(batch["index"])]  # (B,)
        view = shifted = None
        if model.adapter:
            view, shifted = run.to_device(batch["view"]), run.to_device(batch["shifted"])
        with run.autocast():
            loss, parts = losses(parallel, maps, view, true, shifted, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        job.record(loss, parts)
    score = Scorer(args, run, features, model, class_names)
    return job.finish(**thresholds.of_training_images(run, args, score, images.samples, images))


def class_numbers(samples, class_names):
    """The number of each sample's class, -1 for a class that is not among `class_names`."""
    number = {name: i for i, name in enumerate(class_names)}
    return [number.get(sample.cls, -1) for sample in samples]


# ----------------------------------------------------------------------------------------- scoring


class Scorer:
    """A trained model as a function (images, samples) -> (maps (B, S, S), image scores (B,)).

    With prompts it keeps account of the selector: `class_of`, {path: chosen class}, and what
    `selection` reports. After `follow` it keeps codes of the adapter, for `code_cosines`.
    """

    def __init__(self, args, run, features, model, class_names):
        self.args, self.run, self.features, self.model = args, run, features, model.eval()
        self.class_names = class_names
        self.class_of = {}
        self.account = []  # (class, label, selector was right, score with the true class's prompts)
        self.followed = set()  # paths
        self.codes, self.clean_codes = {}, {}  # {path: code of norm 1}, of this and the first pass

    def __call__(self, images, samples):
        anomaly, scores, _ = self.described(images, samples)
        return anomaly, scores

    @torch.no_grad()
    def described(self, images, samples):
        """The same, and the mean of φ over its positions, (B, 2 C3), for CADA."""
        maps = self.features.maps(images)
        true = torch.tensor(class_numbers(samples, self.class_names), device=images.device)  # (B,)
        given = self.args.class_at_test == "given"
        anomaly, scores, out = self.score(maps, images, true if given else None)
        if "selector" in out:
            chosen = out["selector"].argmax(1)  # (B,)
            scores_given = scores
            if not given:
                scores_given = self.score_given(maps, images, true, chosen, scores)
            self.keep_account(samples, true, chosen, scores_given)
        if "code" in out:
            self.keep_codes(samples, out["code"])
        return anomaly, scores, out["pooled"]

    def score(self, maps, images, class_number=None):
        """Anomaly maps (B, S, S), image scores (B,), and all that the model gave."""
        with self.run.autocast():
            out = self.model(maps, images, class_number)
        size = self.args.image_size
        anomaly = kernels.cosine_map(maps, out["maps"], size, power=self.args.norm_power)
        anomaly = gaussian(anomaly, self.args.sigma)
        return anomaly, image_score(anomaly, "max"), out

    def score_given(self, maps, images, true, chosen, scores):
        """The image scores if each image gets its own class's prompts: only where the selector
        chose others must they be computed. All of class numbers and scores are (B,)."""
        wrong = (chosen != true) & (true >= 0)
        scores = scores.clone()
        if wrong.any():
            of_wrong = [f[wrong] for f in maps]
            scores[wrong] = self.score(of_wrong, images[wrong], true[wrong])[1]
        return scores

    def keep_account(self, samples, true, chosen, scores_given):
        """The two class numbers and the scores, (B,), of a batch."""
        rows = zip(samples, true.tolist(), chosen.tolist(), scores_given.tolist())
        for sample, own, choice, value in rows:
            self.class_of[sample.image] = self.class_names[choice]
            if own >= 0:
                self.account.append((sample.cls, sample.label, choice == own, value))

    def class_chosen(self, sample, value):
        """The column `class` of --predict."""
        return self.class_of[sample.image]

    def follow(self, samples):
        """Keep the codes of 256 of these images at most, from all parts of the data."""
        every = -(-len(samples) // 256)
        self.followed = {sample.image for sample in samples[::every]}

    def keep_codes(self, samples, code):
        code = F.normalize(code.float(), dim=1).cpu()  # (B, 2 Σ widths)
        for sample, row in zip(samples, code):
            if sample.image in self.followed:
                self.codes[sample.image] = row

    def of_pass(self):
        """What the report says of the images scored since the last call, on all ranks."""
        found = {}
        if self.args.prompts:
            found |= self.selection()
        if self.followed:
            found |= self.code_cosines()
        return found

    def selection(self):
        """Over the images whose class was trained: the share for which the selector chose it, and
        the mean I-AUROC if all images get the prompts of their own class. None without such."""
        account, self.account = self.run.gather(self.account), []
        accuracy = given = None
        if account:
            names, labels, right, scores = zip(*account)
            names, labels, scores = np.array(names), np.array(labels), np.array(scores, np.float32)
            given = metrics.of_image_scores(scores, labels, names)["mean"]["i_auroc"]
            accuracy = sum(right) / len(right)
        return {"selector accuracy": accuracy, "I-AUROC, class given": given}

    def code_cosines(self):
        """Mean cosine of the adapter's codes of an image and of the same image in the first pass,
        which is the clean one (None in that), and of two different images.

        A code that follows the image and not its domain has the first near 1 and the second lower.
        """
        codes, self.codes = dict(self.run.gather(list(self.codes.items()))), {}
        same = None
        if self.clean_codes:
            products = [codes[path] @ self.clean_codes[path] for path in codes]
            same = torch.stack(products).mean().item()
        else:
            self.clean_codes = codes
        n = len(codes)
        different = None
        if n > 1:
            # of the n² products of all with all, whose sum is |Σ code|², n are with oneself
            total = torch.stack(list(codes.values())).sum(0).square().sum().item()
            different = (total - n) / (n * (n - 1))
        return {"code cosine, clean copy": same, "code cosine, others": different}


# -------------------------------------------------------------------------------------------- main


def main(method="roads"):
    args = runtime.parse(Args, PRESETS, __doc__, method=method)
    check(args)
    run = runtime.start(args, method)
    kernels.set_backend(args.kernels)
    state = run.checkpoint_to_evaluate(args)
    # (--class-at-test may differ, since the selector knows its training images)
    scored_by = ("image_size", "adapter_size", "norm_power", "sigma")
    runtime.check_normal_score(args, state, scored_by)
    dataset, images = runtime.training_data(run, args)
    class_names = state["classes"] if state else dataset.classes
    check_classes(args, dataset, class_names)
    features = run.rank0_first(backbones.Pyramid, args.backbone, args.weights, args.image_size)
    run.place(features)
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    model = run.rank0_first(ROADS, features.channels, len(class_names), args).to(run.device)
    if state:
        runtime.load_model(model, state["model"], args.eval)
    else:
        images.preload()
    run.open(args)
    if not state:
        state = train(args, run, features, model, images, class_names)
    score = Scorer(args, run, features, model, class_names)
    if args.predict:
        columns = {}
        if args.prompts:
            columns["class"] = score.class_chosen
        normal, pixel = state["normal_score"], state["pixel_threshold"]
        return report.predict(run, args, score, normal, columns, pixel_threshold=pixel)
    if not dataset.test:
        return thresholds.without_test_images(run, args, dataset, score, state)
    if args.shift and model.adapter:
        score.follow(dataset.test)
    report.evaluate(
        run,
        args,
        dataset,
        score,
        setting=setting_of(args, features, model, state),
        seconds=state["seconds"],
        paper=papers.numbers("roads", args, PRESETS["paper"], dataset.name, run.world),
        extra=score.of_pass,
        described=score.described,
    )


def check(args):
    """What single options cannot check about themselves."""
    if args.image_size % 32:
        raise UsageError(
            f"--image-size {args.image_size}: must be a multiple of 32, for a bottleneck of 1/32"
        )
    if args.adapter_size % 32:
        raise UsageError(
            f"--adapter-size {args.adapter_size}: must be a multiple of 32, or 0 for --image-size"
        )
    options.check_depths(args.depths)
    if args.predict and args.prompts and args.class_at_test == "given":
        raise UsageError(
            "--class-at-test given: the class of files for --predict is not known; use selector"
        )


def check_classes(args, dataset, class_names):
    """--class-at-test given: every class of the data must have prompts."""
    if not dataset or not args.prompts or args.class_at_test != "given":
        return
    for name in dataset.classes:
        if name not in class_names:
            raise UsageError(
                f"--class-at-test given: {args.eval} knows no class '{name}'; it was trained on "
                f"{', '.join(class_names)}"
            )


def setting_of(args, features, model, state):
    """What stands above the table."""
    setting = {
        "image size": args.image_size,
        "backbone": f"{args.backbone} ({features.backbone.weights_note})",
        "depths": args.depths,
        "prompts": f"{args.tokens} a class and stage" if args.prompts else "none",
    }
    if args.prompts:
        setting["class at test"] = args.class_at_test
    setting["adapter"] = args.adapter
    if model.adapter:
        tuned = "tuned" if args.adapter_lr > 0 else "frozen"
        start = model.adapter.network.weights_note
        setting["adapter"] = (
            f"{args.adapter_backbone} at {model.adapter.size} px (start: {start}; {tuned})"
        )
    return setting | {
        "distillation": args.distance,
        "weights of the losses": f"η {args.eta:g}, δ {args.delta:g}, μ {args.mu:g}, "
        f"L_ζ {args.zeta:g}",
        "weight of a distance": name_of_power(args.norm_power),
        "smoothing": name_of_sigma(args.sigma),
        "image score": name_of_rule("max"),
        "parameters": runtime.count_parameters(model),
        "steps": state["step"],
    }


if __name__ == "__main__":
    runtime.launch(main)
