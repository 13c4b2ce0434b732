"""OneNIP: learning to detect multi-class anomalies with just one normal image prompt (Gao, ECCV 2024).

https://arxiv.org/abs/2505.09264 · one file: model, losses, pseudo-anomalies, training, scoring.

The idea. UniAD reconstructs frozen features with a transformer; what it cannot reconstruct is anomalous. OneNIP shows
the transformer one normal image of the same class, the *prompt*, and lets features and prompt attend to each other.
It also learns to *restore* pseudo-anomalies to the normal features that they were made from, and a small supervised
*refiner* turns the error of the reconstruction into a sharp map.

    image (B,3,224,224) ──frozen EfficientNet-B4──> 4 maps ──resize, concat──> F (B,272,14,14)       prompt P likewise
      F ──jitter, Linear──> tokens (B,196,256) ──encoder, 4 layers, neighbour mask──> x              P ──same──> p
      [ p <- attend(p, x), MLP        x <- attend(x, p) ] x 4      p <- attend(p, x)                         (Eq. 3)
      p ──Linear──> F̂ (B,272,14,14)     S_rec = ||F̂ - F||₂ ──x16──> (B,224,224)
      |F̂ - F| ──refiner: 2 x [conv, BN, ReLU, deconv], conv──> (B,1,56,56) ──x4, sigmoid──> M̂ (B,224,224)  (Eq. 6)
      map S = (1 - α) S_rec + α c M̂,  α = 0.5;   image score = max of S after a 16x16 average pooling

Commands
    python onenip.py                             embedded data, small model, about five minutes on two CPU cores:
                                                 mean I-AUROC 85.2, P-AUROC 95.1, P-AP 44.3 (untrained: 56.1, 61.6, 4.9)
    python onenip.py --data mvtec                the paper's model and schedule (1,000 epochs: a GPU)
    torchrun --nproc_per_node=8 onenip.py --data mvtec --batch-size 8        the same on 8 GPUs: 64 images a step
    python onenip.py --eval runs/onenip-mvtec/checkpoint.pt --corrupt brightness:3
    python onenip.py --eval runs/onenip-mvtec/checkpoint.pt --predict photo.png folder/

Where this file differs from the paper (P) or from the authors' code (C), and why
  1. Decoder: features attend to the prompt, as in P Eq. 3. The code behind the published tables added the prompt's MLP
     output instead, by mistake; the authors mended it later ("v2"), which changed the means by +0.1 I-AUROC.
  2. The MLP, residuals, post-norms, and the neighbour mask in *both* cross-attentions come from C; P does not show them.
  3. Loss weights: C averages restoration and reconstruction, so that L_rec : L_res : L_seg = 1 : 1 : 1. Default as C
     (it gave the numbers); --loss-weights paper is P Eq. 8 with λ = 0.5. Likewise --dice code|paper (C has no factor 2
     and smooths by 1).
  4. c puts M̂ on the scale of S_rec. C takes (max + min)/2 of S_rec over the whole *test set*. Here over training images
     and pseudo-anomalies, so that nothing is learned from the test set; --score-scale test is C.
  5. Prompt at test: P picks from a pool with one training image per class the one whose feature is most similar; C takes
     a random training image of the *true* class. Here P (no class label is needed); --prompt-class given is C.
  6. Image label from the folder, not from the resized mask; AUROC below 0.5 is not flipped; the last checkpoint is the
     result (C keeps a copy chosen on the test set as well).
  7. Without --textures DIR (such as DTD) the texture source of the pseudo-anomalies is drawn by code, and the report
     says so.

Paper, MVTec, 224 px (v2 log in brackets): I-AUROC 97.9 (98.0), I-AP 99.3, P-AUROC 97.9 (97.9), P-AP 63.7 (63.9).
"""

import dataclasses
import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import kernels
from common import UsageError, backbones, data, report, runtime
from common.runtime import option

# ------------------------------------------------------------------------------------------------------- options


@dataclass
class Args(runtime.Options):
    image_size: int = option(224, "images are resized to this square; a multiple of 16", group="data", low=32)
    textures: str = option("", "folder of texture images for pseudo-anomalies, such as DTD (default: drawn by code)",
                           group="data")
    backbone: str = option("efficientnet_b4", "frozen feature extractor", group="model", choices=backbones.NAMES)
    weights: str = option("", "file of the backbone's weights, or 'random' (default: the official ones)", group="model")
    hidden: int = option(256, "width of the transformer; a multiple of --heads and of 2", group="model", low=8)
    heads: int = option(8, "attention heads", group="model", low=1)
    mlp: int = option(1024, "width of the MLPs", group="model", low=1)
    encoder_layers: int = option(4, "encoder layers (Table 4b)", group="model", low=0)
    decoder_layers: int = option(4, "decoder blocks (Table 4b)", group="model", low=1)
    refiner_width: int = option(128, "channels of the refiner", group="model", low=1)
    dropout: float = option(0.1, "dropout in attention, after it, and in the MLPs", group="model", low=0.0, high=0.9)
    epochs: float = option(1000, "passes over the training images; 0 (and --steps 0): untrained", group="training", low=0)
    steps: int = option(0, "training steps, in place of --epochs when above 0", group="training", low=0)
    batch_size: int = option(64, "training images a step and process", group="training", low=1)
    lr: float = option(1e-4, "AdamW's learning rate", group="training", low=0.0)
    schedule: str = option("step", "learning rate: x 0.1 after 80 % of the steps, or one cosine after a warm-up of 5 %",
                           group="training", choices=("step", "cosine"))
    weight_decay: float = option(1e-4, "AdamW's weight decay", group="training", low=0.0)
    clip: float = option(0.1, "largest norm of the gradient", group="training", low=0.0)
    jitter: float = option(20.0, "scale of the noise on training features", group="training", low=0.0)
    bank: int = option(0, "pseudo-anomalies made of each training image, once; 0: a new one for every sample",
                       group="training", low=0)
    loss_weights: str = option("code", "L_rec : L_res : L_seg = 1:1:1 (code) or 1:1:0.5 (paper, Eq. 8)",
                               group="training", choices=("code", "paper"))
    dice: str = option("code", "segmentation loss: the code's form or the paper's Eq. 7", group="training",
                       choices=("code", "paper"))
    alpha: float = option(0.5, "share of the refiner in the map (Table 4c)", group="scoring", low=0.0, high=1.0)
    score_scale: str = option("train", "images whose S_rec gives the refiner's scale c: training or (leaking) test",
                              group="scoring", choices=("train", "test"))
    pool: int = option(16, "window of the average pooling before the maximum that scores an image", group="scoring", low=1)
    prompt_class: str = option("selected", "class of the prompt at test: most similar, or given by the true label",
                               group="scoring", choices=("selected", "given"))
    prompt_test: str = option("fixed", "prompt at test: the class's fixed image, a random training image of the class, "
                                       "or (wrong) the fixed image of another class (Table 4d)", group="scoring",
                              choices=("fixed", "random", "wrong"))
    prompt: str = option("dynamic", "none: UniAD's learned queries; static: the prompt is a query only (Eq. 2); "
                                    "dynamic: both attend (Eq. 3)", group="ablations",
                         choices=("none", "static", "dynamic"))
    restoration: bool = option(True, "restore pseudo-anomalies", group="ablations")
    refiner: bool = option(True, "sharpen the map by the supervised refiner", group="ablations")
    prompt_train: str = option("random", "prompt in training: a random image of the class, or one fixed image (Table 4d)",
                               group="ablations", choices=("random", "fixed"))


PRESETS = {
    "paper": {},
    # For two CPU cores: a smaller model and picture, many small steps, pseudo-anomalies made once. The paper's Dice form,
    # since the code's (no factor 2, smoothed by 1) lets a short training settle on empty masks; less jitter, since a
    # short training does not get past the noise of the paper's. alpha was chosen on a second drawing of the data (README).
    "laptop": dict(image_size=160, backbone="efficientnet_lite0", hidden=128, heads=4, mlp=256, encoder_layers=1,
                   decoder_layers=2, refiner_width=64, dropout=0.0, jitter=2.0, dice="paper", bank=10, epochs=44,
                   batch_size=4, lr=2e-3, schedule="cosine", alpha=0.15, amp="auto"),
}

# --------------------------------------------------------------------------------------------------------- model


class Features(nn.Module):
    """Frozen backbone and neck: uint8 images (B, 3, S, S) -> F (B, C, S/16, S/16)."""

    def __init__(self, backbone, weights, image_size):
        super().__init__()
        self.backbone = backbones.build(backbone, weights or None).fuse().to(memory_format=torch.channels_last)
        self.channels, self.side = sum(self.backbone.channels), image_size // 16

    @torch.no_grad()
    def forward(self, images):
        maps = self.backbone(data.normalize(images).contiguous(memory_format=torch.channels_last))
        maps = [F.interpolate(m.float(), (self.side, self.side), mode="bilinear", align_corners=True) for m in maps]
        return torch.cat(maps, dim=1)


class Attention(nn.Module):
    """Multi-head attention; `window` = (height, width, radius) forbids each query its own neighbourhood (UniAD)."""

    def __init__(self, args):
        super().__init__()
        self.heads, self.dropout = args.heads, args.dropout
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(args.hidden, args.hidden) for _ in range(4))

    def forward(self, query, key, value, window=None):  # each (B, N, D)
        q, k, v = (
            linear(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D/heads)
            for linear, t in ((self.to_q, query), (self.to_k, key), (self.to_v, value))
        )
        out = kernels.cross_attention(q, k, v, window=window, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, N, D/heads) -> (B, N, D)


def mlp(args):
    return nn.Sequential(nn.Linear(args.hidden, args.mlp), nn.ReLU(), nn.Dropout(args.dropout),
                         nn.Linear(args.mlp, args.hidden))


class EncoderLayer(nn.Module):
    """Post-norm self-attention with the neighbour mask: a token must be explained by tokens further away."""

    def __init__(self, args):
        super().__init__()
        self.attention, self.mlp = Attention(args), mlp(args)
        self.norm1, self.norm2 = nn.LayerNorm(args.hidden), nn.LayerNorm(args.hidden)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, pos, window):  # (B, N, D), (N, D)
        x = self.norm1(x + self.dropout(self.attention(x + pos, x + pos, x, window)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DynamicBlock(nn.Module):
    """Eq. 3: the prompt is updated from the features, then the features from the prompt."""

    def __init__(self, args):
        super().__init__()
        self.prompt_attention, self.feature_attention, self.mlp = Attention(args), Attention(args), mlp(args)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(args.hidden) for _ in range(3))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, p, x, pos, window):  # each (B, N, D)
        p = self.norm1(p + self.dropout(self.prompt_attention(p + pos, x + pos, x, window)))
        p = self.norm2(p + self.dropout(self.mlp(p)))
        x = self.norm3(x + self.dropout(self.feature_attention(x + pos, p + pos, p, window)))
        return p, x


class QueryBlock(nn.Module):
    """UniAD's decoder layer: a query asks the encoder's output, the answer asks the layer before. The query is the
    encoded prompt (Eq. 2, --prompt static) or a learned table of this layer (--prompt none)."""

    def __init__(self, args, tokens):
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, args.hidden)) if args.prompt == "none" else None
        self.encoder_attention, self.previous_attention, self.mlp = Attention(args), Attention(args), mlp(args)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(args.hidden) for _ in range(3))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, query, x, previous, pos, window):  # each (B, N, D)
        q = self.query.expand_as(x) if self.query is not None else query
        q = self.norm1(q + self.dropout(self.encoder_attention(q + pos, x + pos, x, window)))
        q = self.norm2(q + self.dropout(self.previous_attention(q + pos, previous + pos, previous, window)))
        return self.norm3(q + self.dropout(self.mlp(q)))


class Refiner(nn.Module):
    """|F̂ - F| (B, C, 14, 14) -> logits (B, 1, 56, 56)."""

    def __init__(self, channels, width):
        super().__init__()
        stage = lambda c: [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                           nn.ConvTranspose2d(width, width, 2, stride=2)]
        self.layers = nn.Sequential(*stage(channels), *stage(width), nn.Conv2d(width, 1, 1))

    def forward(self, error):
        return self.layers(error)


class OneNIP(nn.Module):
    """The trainable part: features and prompt features (B, C, h, w) -> reconstruction F̂ (B, C, h, w), logits of M̂."""

    def __init__(self, channels, side, args):
        super().__init__()
        self.channels, self.side, self.prompt = channels, side, args.prompt
        self.image_size, self.jitter = args.image_size, args.jitter
        self.window = (side, side, side // 2 // 2)  # the neighbourhood is (side // 2), one more where that is even
        self.input, self.output = nn.Linear(channels, args.hidden), nn.Linear(args.hidden, channels)
        self.row = nn.Parameter(torch.rand(side, args.hidden // 2))  # learned position, U(0, 1)
        self.column = nn.Parameter(torch.rand(side, args.hidden // 2))
        self.encoder = nn.ModuleList(EncoderLayer(args) for _ in range(args.encoder_layers))
        if args.prompt == "dynamic":
            self.decoder = nn.ModuleList(DynamicBlock(args) for _ in range(args.decoder_layers))
            self.final_attention, self.dropout = Attention(args), nn.Dropout(args.dropout)
        else:
            self.decoder = nn.ModuleList(QueryBlock(args, side * side) for _ in range(args.decoder_layers))
        self.norm = nn.LayerNorm(args.hidden)
        self.refiner = Refiner(channels, args.refiner_width) if args.refiner else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def position(self):
        """Column table and row table side by side: (N, D) with N = side²."""
        column = self.column.expand(self.side, -1, -1)  # (h, w, D/2)
        row = self.row[:, None].expand(-1, self.side, -1)  # (h, w, D/2)
        return torch.cat([column, row], dim=2).flatten(0, 1)  # (h, w, D) -> (N, D)

    def encode(self, features):
        """(B, C, h, w) -> (B, N, D). In training every token is jittered by noise of --jitter/C times its norm."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        if self.training and self.jitter > 0:
            sigma = tokens.norm(dim=2, keepdim=True) * (self.jitter / self.channels)
            tokens = tokens + torch.randn_like(tokens) * sigma
        x, pos = self.input(tokens), self.position()
        for layer in self.encoder:
            x = layer(x, pos, self.window)
        return x

    def decode(self, x, p):
        """Encoded features and encoded prompt (B, N, D) -> F̂ (B, C, h, w); p is None for --prompt none."""
        pos, previous = self.position(), x
        for block in self.decoder:
            if self.prompt == "dynamic":
                p, x = block(p, x, pos, self.window)
            else:
                previous = block(p, x, previous, pos, self.window)
        if self.prompt == "dynamic":
            previous = p + self.dropout(self.final_attention(p + pos, x + pos, x))
        out = self.output(self.norm(previous))
        return out.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, N, C) -> (B, C, h, w)

    def refine(self, reconstruction, features):
        """|F̂ - F| -> M̂ in (0, 1), (B, S, S)."""
        logits = self.refiner((reconstruction - features).abs()).float()
        return torch.sigmoid(resize(logits, self.image_size)).squeeze(1)

    def forward(self, normal, synthetic, prompt):
        """One pass of training. Returns F̂ of the normal and of the synthetic features, and M̂ of both ((2B, S, S) or
        None). `synthetic` is None when neither restoration nor the refiner is trained; `prompt` for --prompt none."""
        inputs = [f for f in (normal, synthetic, prompt) if f is not None]
        encoded = self.encode(torch.cat(inputs)).chunk(len(inputs))
        both = normal if synthetic is None else torch.cat([normal, synthetic])
        x = torch.cat(encoded[: len(inputs) - (prompt is not None)])
        p = None if prompt is None else encoded[-1].repeat(len(both) // len(prompt), 1, 1)
        reconstruction = self.decode(x, p).float()
        mask = None if self.refiner is None else self.refine(reconstruction, both)
        restored = None if synthetic is None else reconstruction[len(normal):]
        return reconstruction[: len(normal)], restored, mask


def resize(maps, size):
    """(B, C, h, w) -> (B, C, size, size)."""
    return F.interpolate(maps, (size, size), mode="bilinear", align_corners=True)


# -------------------------------------------------------------------------------------------------------- losses


def dice_loss(predicted, mask, form):
    """Segmentation loss per image, then mean. predicted in (0, 1) and mask in {0, 1}: (B, H, W).

    paper (Eq. 7): 1 - 2 Σ M̂M / (Σ M̂² + Σ M²);   code: 1 - (Σ M̂M + 1) / (Σ M̂² + Σ M² + 1).
    """
    overlap = (predicted * mask).sum((1, 2))
    squares = predicted.square().sum((1, 2)) + mask.square().sum((1, 2))
    if form == "paper":
        return (1 - 2 * overlap / squares).mean()
    return (1 - (overlap + 1) / (squares + 1)).mean()


def losses(model, normal, synthetic, prompt, mask, args):
    """Eqs. 4, 5, 7 and 8. Both MSEs have the *normal* features as target, before jitter.

    Returns the total and the parts {"rec", "res", "seg"} (scalars; absent parts are left out).
    """
    reconstructed, restored, predicted = model(normal, synthetic, prompt)
    parts = {"rec": F.mse_loss(reconstructed, normal)}
    if args.restoration:
        parts["res"] = F.mse_loss(restored, normal)
    if args.refiner:
        parts["seg"] = dice_loss(predicted, torch.cat([torch.zeros_like(mask), mask]), args.dice)
    weight = {"rec": 1.0, "res": 1.0, "seg": 1.0 if args.loss_weights == "code" else 0.5}
    return sum(weight[name] * value for name, value in parts.items()), parts


# ---------------------------------------------------------------------------------------------- pseudo-anomalies


def synthesize(image, rng, texture):
    """A pseudo-anomaly: CutPaste or DRAEM style, half and half.

    Args:
        image: uint8 (S, S, 3), a normal image. rng: numpy Generator. texture: rng -> uint8 (S, S, 3).
    Returns:
        uint8 (S, S, 3), and the mask as bool (S, S).
    """
    style = rng.integers(4)
    if style == 0:
        return cutpaste_patch(image, rng)
    if style == 1:
        return cutpaste_scar(image, rng)
    return draem(image, rng, texture(rng))


def cutpaste_patch(image, rng):
    """A rectangle of 2 % to 15 % of the area, recoloured, pasted elsewhere."""
    size = image.shape[0]
    area = rng.uniform(0.02, 0.15) * size * size
    aspect = rng.uniform(0.3, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 3.3)
    w, h = min(size, max(1, int(math.sqrt(area * aspect)))), min(size, max(1, int(math.sqrt(area / aspect))))
    (y0, x0), (y1, x1) = rng.integers(0, [size - h + 1, size - w + 1], (2, 2))
    out, mask = image.copy(), np.zeros((size, size), bool)
    out[y1:y1 + h, x1:x1 + w] = colour_jitter(Image.fromarray(image[y0:y0 + h, x0:x0 + w]), rng)
    mask[y1:y1 + h, x1:x1 + w] = True
    return out, mask


def cutpaste_scar(image, rng):
    """A thin strip of 2-16 x 10-25 px, recoloured, turned by up to 45°, pasted elsewhere through its alpha."""
    size = image.shape[0]
    w, h = int(rng.integers(2, 17)), int(rng.integers(10, 26))
    y0, x0 = rng.integers(0, [size - h + 1, size - w + 1])
    scar = colour_jitter(Image.fromarray(image[y0:y0 + h, x0:x0 + w]), rng)
    scar.putalpha(255)
    scar = scar.rotate(rng.uniform(-45, 45), expand=True)
    y1, x1 = rng.integers(0, [size - h + 1, size - w + 1])  # from the upright size: a turned scar may be clipped
    out, alpha = Image.fromarray(image), Image.new("L", (size, size))
    out.paste(scar, (int(x1), int(y1)), scar)
    alpha.paste(scar.getchannel("A"), (int(x1), int(y1)))
    return np.array(out), np.asarray(alpha) > 0


def colour_jitter(patch, rng):
    """Brightness, contrast and saturation by 1 ± 0.4, hue by ± 0.1 of the circle, in random order (PIL image)."""
    def hue(p):
        hsv = np.array(p.convert("HSV"))
        hsv[..., 0] += np.uint8(int(rng.uniform(-0.1, 0.1) * 255) % 256)  # wraps around the circle
        return Image.fromarray(hsv, "HSV").convert("RGB")

    enhance = lambda kind: lambda p: kind(p).enhance(rng.uniform(0.6, 1.4))
    ops = [enhance(ImageEnhance.Brightness), enhance(ImageEnhance.Contrast), enhance(ImageEnhance.Color), hue]
    for i in rng.permutation(4):
        patch = ops[i](patch)
    return patch


def draem(image, rng, texture):
    """DRAEM: a recoloured texture blended in where Perlin noise is high; opacity 1 - β with β ~ U(0, 0.8)."""
    size = image.shape[0]
    for i in rng.choice(len(TEXTURE_OPS), 3, replace=False):
        texture = TEXTURE_OPS[i](texture, rng)
    cells = 2 ** rng.integers(1, 6, 2)
    noise = Image.fromarray(perlin(size, cells, rng).astype(np.float32), "F")
    mask = np.asarray(noise.rotate(rng.uniform(-5, 5), Image.Resampling.BILINEAR)) > 0.5
    beta = rng.uniform(0, 0.8)
    blended = (1 - beta) * texture.astype(np.float32) + beta * image
    return np.where(mask[..., None], blended.astype(np.uint8), image), mask


def perlin(size, cells, rng):
    """Perlin noise (size, size), times √2 so that it spans about ±1; `cells` = lattice cells per axis."""
    angle = rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1))
    gradient = np.stack([np.cos(angle), np.sin(angle)], -1)  # (cells+1, cells+1, 2)
    y, x = np.arange(size) * cells[0] / size, np.arange(size) * cells[1] / size
    iy, ix = y.astype(int), x.astype(int)
    fy, fx = (y - iy)[:, None], (x - ix)[None, :]  # position inside the cell

    def corner(dy, dx):  # dot product of the corner's gradient with the offset from that corner: (size, size)
        g = gradient[iy + dy][:, ix + dx]
        return g[..., 0] * (fy - dy) + g[..., 1] * (fx - dx)

    fade = lambda t: t * t * t * (t * (t * 6 - 15) + 10)
    ty, tx = fade(fy), fade(fx)
    top = corner(0, 0) * (1 - tx) + corner(0, 1) * tx
    bottom = corner(1, 0) * (1 - tx) + corner(1, 1) * tx
    return math.sqrt(2) * (top * (1 - ty) + bottom * ty)


def _by_pil(change):
    return lambda t, rng: np.asarray(change(Image.fromarray(t), rng))


def _gamma(t, rng):
    lut = (np.arange(256)[:, None] / 255) ** rng.uniform(0.5, 2.0, 3) * 255  # (256, 3)
    return np.stack([lut[t[..., c], c] for c in range(3)], -1).astype(np.uint8)


def _brightness(t, rng):
    space = ("HSV", "YCbCr", "LAB")[rng.integers(3)]
    if space == "LAB":  # Pillow converts to LAB only through colour profiles: take grey as lightness there
        v = np.asarray(Image.fromarray(t).convert("L")).astype(np.float32)
        return (t + (_multiply_add(v, rng) - v)[..., None]).clip(0, 255).astype(np.uint8)
    channels, light = np.array(Image.fromarray(t).convert(space)), 2 if space == "HSV" else 0
    channels[..., light] = _multiply_add(channels[..., light].astype(np.float32), rng)
    return np.asarray(Image.fromarray(channels, space).convert("RGB"))


def _multiply_add(v, rng):
    factor, shift = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
    return (v * factor + shift if rng.random() < 0.5 else (v + shift) * factor).clip(0, 255)


def _hue_saturation(t, rng):
    hsv, shift = np.array(Image.fromarray(t).convert("HSV")).astype(int), int(rng.integers(-50, 51))
    hsv[..., 0] = (hsv[..., 0] + shift) % 256
    hsv[..., 1] = (hsv[..., 1] + shift).clip(0, 255)
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


def _solarize(t, rng):
    return np.where(t >= rng.uniform(32, 128), 255 - t, t).astype(np.uint8) if rng.random() < 0.5 else t


TEXTURE_OPS = (
    _gamma, _brightness, _hue_saturation, _solarize,
    _by_pil(lambda p, rng: ImageEnhance.Sharpness(p).enhance(rng.uniform(0, 2))),
    _by_pil(lambda p, rng: ImageOps.posterize(p, int(rng.integers(1, 9)))),
    _by_pil(lambda p, rng: ImageOps.mirror(p) if rng.random() < 0.5 else p),
    _by_pil(lambda p, rng: ImageOps.invert(p)),
    _by_pil(lambda p, rng: ImageOps.autocontrast(p, cutoff=rng.uniform(0, 20))),
    _by_pil(lambda p, rng: ImageOps.equalize(p)),
)


class Textures:
    """Texture source: rng -> uint8 (S, S, 3). Images of a folder, or (without one) drawn: coloured noise of random
    grain, turned into stripes or spots half of the time."""

    def __init__(self, folder, size):
        self.size, self.files = size, []
        if folder:
            self.files = data.image_files(folder)
            if not self.files:
                raise UsageError(f"--textures {folder}: no images in it")

    def __call__(self, rng):
        if self.files:
            return data.resize_image(data.read_image(self.files[rng.integers(len(self.files))]), self.size)
        cells = 2 ** rng.integers(2, 7, 2)
        grain = perlin(self.size, cells, rng) + 0.5 * perlin(self.size, np.minimum(2 * cells, self.size), rng)
        if rng.random() < 0.5:
            grain = np.sin(grain * rng.uniform(3, 20))
        low, high = rng.uniform(0, 255, (2, 3))
        weight = ((grain - grain.min()) / (np.ptp(grain) + 1e-9))[..., None]  # (S, S, 1) in [0, 1]
        noise = rng.normal(0, rng.uniform(0, 20), (self.size, self.size, 1))
        return (low + (high - low) * weight + noise).clip(0, 255).astype(np.uint8)


class Triplets(runtime.Stream):
    """The training stream, of which no image is dropped: a normal image, a prompt of its class, a pseudo-anomaly."""

    def __init__(self, images, samples, args, fixed, whole_images):
        super().__init__(images, args.seed, 1, whole_images)
        self.args = args
        self.cls, self.fixed = [s.cls for s in samples], fixed  # fixed: class -> index of its fixed prompt
        self.members = {c: [i for i, s in enumerate(samples) if s.cls == c] for c in fixed}
        self.textures = Textures(args.textures, args.image_size)
        self.synthetic = args.restoration or args.refiner

    def __getitem__(self, k):
        index = self.index(k)
        rng, cls = np.random.default_rng([self.args.seed, 2, k]), self.cls[index]
        members = self.members[cls]
        prompt = members[rng.integers(len(members))] if self.args.prompt_train == "random" else self.fixed[cls]
        item = {"index": index, "prompt": prompt}
        if self.synthetic and self.args.bank:
            item["number"] = index * self.args.bank + int(rng.integers(self.args.bank))
        elif self.synthetic:
            item["synthetic"], item["mask"] = self.pseudo_anomaly(index, k)
        if self.whole_images:  # frozen features did not fit into memory: compute them from the images
            item["normal_image"], item["prompt_image"] = self.images[index], self.images[prompt]
        return item

    def pseudo_anomaly(self, index, number):
        """Of training image `index`, all its randomness from (seed, number): uint8 (3, S, S), mask bool (S, S)."""
        rng = np.random.default_rng([self.args.seed, 3, number])
        image, mask = synthesize(self.images[index].permute(1, 2, 0).numpy(), rng, self.textures)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)  # (S, S, 3) -> (3, S, S)


# ------------------------------------------------------------------------------------------------------ training


def train(args, run, features, samples, images):
    """The flat training loop. Returns the finished checkpoint state."""
    before = run.checkpoint(args)
    if before and "scale" in before:  # training was over, only the evaluation is missing
        return before
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    classes = sorted({s.cls for s in samples})
    model = OneNIP(features.channels, features.side, args).to(run.device)
    model, wrapped = run.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = args.steps or math.ceil(args.epochs * len(samples) / (args.batch_size * run.world))

    rng = np.random.default_rng([args.seed, 0])
    fixed = {c: int(rng.choice([i for i, s in enumerate(samples) if s.cls == c])) for c in classes}
    cache = runtime.precompute(run, features, images, args.batch_size, args.memory_share)
    pool = torch.stack([cache[fixed[c]] if cache is not None else
                        features(images[fixed[c]][None].to(run.device))[0].cpu() for c in classes])
    dataset = Triplets(images, samples, args, fixed, whole_images=cache is None)
    bank, bank_masks = make_bank(args, run, features, dataset) if args.bank and dataset.synthetic else (None, None)

    first, seconds = run.restore(before, model, optimizer)
    clock = runtime.Stopwatch(seconds)

    def state(**more):
        return {"method": run.method, "args": runtime.as_dict(args), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": clock(), "classes": classes,
                "pool": pool, "pool_files": [str(samples[fixed[c]].image) for c in classes], **more}

    bad = torch.zeros((), dtype=torch.int32, device=run.device)
    step = first - 1
    loader = run.loader(dataset, run.positions(first, steps, args.batch_size), args.workers)
    wrapped.train()
    for step, batch in enumerate(run.progress(loader, "training", steps, first), first):
        run.seed(args.seed, 4, step)  # jitter and dropout
        normal, prompt = (run.to_device(cache[batch[key]]) if cache is not None else
                          features(run.to_device(batch[image]))
                          for key, image in (("index", "normal_image"), ("prompt", "prompt_image")))
        synthetic = mask = None
        if bank is not None:
            synthetic, mask = run.to_device(bank[batch["number"]]), run.to_device(bank_masks[batch["number"]]).float()
        elif dataset.synthetic:
            synthetic, mask = features(run.to_device(batch["synthetic"])), run.to_device(batch["mask"]).float()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * runtime.lr_factor(step, steps, args.schedule)
        with run.autocast():
            loss, parts = losses(wrapped, normal, synthetic, None if args.prompt == "none" else prompt, mask, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

        bad |= ~torch.isfinite(loss.detach())
        run.keep(args, step + 1, steps, bad, lambda: {
            **run.mean({"loss": loss, **parts}), "lr": optimizer.param_groups[0]["lr"],
            "images_per_s": round((step + 1) * args.batch_size * run.world / clock(), 1)}, state)
    scale, normal_score = training_statistics(args, run, features, model.eval(), dataset, cache, pool)
    final = state(scale=scale, normal_score=normal_score)
    run.save(final)
    return final


def make_bank(args, run, features, dataset):
    """--bank pseudo-anomalies of every training image: their features (N · bank, C, h, w) and masks (N · bank, S, S)."""
    made = [dataset.pseudo_anomaly(number // args.bank, number)
            for number in run.progress(range(len(dataset.cls) * args.bank), "pseudo-anomalies")]
    bank = runtime.precompute(run, features, [image for image, _ in made], args.batch_size, args.memory_share)
    if bank is None:
        raise UsageError(f"--bank {args.bank} does not fit into --memory-share {args.memory_share}; use --bank 0")
    return bank, torch.stack([mask for _, mask in made])


# ------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def raw_maps(model, x, p, args):
    """S_rec and M̂ of features x (B, C, h, w), whose prompts are encoded (B, N, D) or None: two (B, S, S) maps."""
    reconstruction = model.decode(model.encode(x), p).float()
    s_rec = resize((reconstruction - x).norm(dim=1, keepdim=True), args.image_size).squeeze(1)
    return s_rec, model.refine(reconstruction, x).float() if args.refiner else torch.zeros_like(s_rec)


def combine(s_rec, mask, c, args):
    """S = (1 - α) S_rec + α c M̂ (§3.4; c: departure 4), and its image score (B,)."""
    s = (1 - args.alpha) * s_rec + args.alpha * c * mask if args.refiner else s_rec
    window = min(args.pool, args.image_size)
    return s, F.avg_pool2d(s[:, None], window, stride=1).amax((1, 2, 3))


def training_statistics(args, run, features, model, dataset, cache, pool):
    """c = (max + min)/2 of S_rec over up to 256 training images and their pseudo-anomalies, and the 99 % quantile of
    the normal ones' image scores (what --predict compares with)."""
    known = sorted(dataset.fixed)
    scored = {"normal": [], "synthetic": []}
    with run.autocast(), torch.no_grad():
        encoded = None if args.prompt == "none" else model.encode(run.to_device(pool))
        starts = range(0, min(256, len(dataset.cls)), args.batch_size)
        for first in run.progress(starts, "training statistics"):
            # numbers of the stream that training never reaches: 2^40 and on
            numbers = range(2**40 + first, 2**40 + min(first + args.batch_size, starts.stop))
            items = [dataset[k] for k in numbers]
            index = [item["index"] for item in items]
            p = None if encoded is None else encoded[[known.index(dataset.cls[i]) for i in index]]
            x = cache[index].to(run.device) if cache is not None else features(
                torch.stack([item["normal_image"] for item in items]).to(run.device))
            scored["normal"].append(raw_maps(model, x, p, args))
            if dataset.synthetic:
                made = [dataset.pseudo_anomaly(i, k)[0] if args.bank else item["synthetic"]
                        for i, k, item in zip(index, numbers, items)]
                x = features(torch.stack(made).to(run.device))
                scored["synthetic"].append(raw_maps(model, x, p, args))
    s_rec = [s for pairs in scored.values() for s, _ in pairs]
    c = (max(s.max().item() for s in s_rec) + min(s.min().item() for s in s_rec)) / 2
    scores = torch.cat([combine(s, m, c, args)[1] for s, m in scored["normal"]])
    return c, scores.quantile(0.99).item()


class Scorer:
    """A trained model as a function (images, samples) -> (maps, scores). Encodes the prompt pool once."""

    def __init__(self, args, run, features, model, state, samples=None, images=None):
        self.args, self.run, self.features, self.model = args, run, features, model.eval()
        self.classes, self.scale, self.chosen = state["classes"], state["scale"], {}
        self.fingerprints = F.normalize(run.to_device(state["pool"]).mean((2, 3)), dim=1)  # (classes, C)
        self.images, self.members = images, {}
        if args.prompt_test == "random" and args.prompt != "none":
            self.members = {c: [i for i, s in enumerate(samples) if s.cls == c] for c in self.classes}
        with torch.no_grad(), run.autocast():
            self.encoded = model.encode(run.to_device(state["pool"])) if args.prompt != "none" else None

    @torch.no_grad()
    def __call__(self, images, samples):
        x = self.features(images)
        with self.run.autocast():
            s_rec, mask = raw_maps(self.model, x, self.prompt_of(x, samples), self.args)
        return combine(s_rec, mask, self.scale, self.args)

    @torch.no_grad()
    def pooled(self, images):
        """The encoded tokens' average, (B, 3, S, S) -> (B, D): --save-maps keeps it for CADA."""
        with self.run.autocast():
            return self.model.encode(self.features(images)).mean(1)

    def prompt_of(self, x, samples):
        """Encoded prompts (B, N, D): of the class whose pooled feature is most similar (cosine), no label needed."""
        similar = (F.normalize(x.mean((2, 3)), dim=1) @ self.fingerprints.T).argmax(1).tolist()
        self.chosen.update({str(s.image): self.classes[i] for s, i in zip(samples, similar)})
        if self.encoded is None:
            return None
        index = similar
        if self.args.prompt_class == "given" or self.args.prompt_test == "wrong":
            index = [self.classes.index(s.cls) if s.cls in self.classes else i for s, i in zip(samples, similar)]
        if self.args.prompt_test == "wrong":
            index = [(i + 1) % len(self.classes) for i in index]
        if self.args.prompt_test != "random":
            return self.encoded[index]
        picks = []
        for s, i in zip(samples, index):  # drawn by the image's own name: the same in any batch on any rank
            rng = np.random.default_rng([self.args.seed, 5, zlib.crc32(f"{s.cls}/{s.defect}/{s.image.name}".encode())])
            picks.append(self.images[int(rng.choice(self.members[self.classes[i]]))])
        return self.model.encode(self.features(torch.stack(picks).to(x.device)))

    def selection(self, samples):
        """Share of images whose most similar prompt is of their own class; None when no class is known."""
        pairs = [(self.chosen[str(s.image)], s.cls) for s in samples if str(s.image) in self.chosen]
        known = [c == cls for c, cls in pairs if cls in self.classes]
        return sum(known) / len(known) if known else None


# ---------------------------------------------------------------------------------------------------------- main


def main():
    args = runtime.parse(Args, PRESETS, __doc__)
    if args.image_size % 16 or args.hidden % args.heads or args.hidden % 2:
        raise UsageError("--image-size must be a multiple of 16, --hidden of --heads and of 2")
    run = runtime.start(args, "onenip")
    kernels.set_backend(args.kernels)
    state = runtime.load_checkpoint(args.eval, "onenip") if args.eval else None
    dataset = images = None
    if not args.predict:
        dataset = run.in_turn(lambda: data.load(args.data, args.data_root or None,
                                                [c for c in args.classes.split(",") if c] or None))
        images = data.Images(dataset.train, args.image_size, memory_share=args.memory_share)
    features = run.in_turn(lambda: Features(args.backbone, args.weights, args.image_size)).to(run.device)
    if images and state is None:
        images.preload()
    run.open(args)
    if state is None:
        state = train(args, run, features, dataset.train, images)
    model = OneNIP(features.channels, features.side, args).to(run.device)
    runtime.load_model(model, state["model"], args.eval or run.out / "checkpoint.pt")
    if args.score_scale == "test" and dataset:
        state["scale"] = test_scale(args, run, features, model, state, dataset)
    score = Scorer(args, run, features, model, state, dataset and dataset.train, images)

    if args.predict:
        return report.predict(run, args, score, {
            "ratio": lambda sample, value: value / state["normal_score"],  # above 1: above 99 % of the training images
            "prompt": lambda sample, value: score.chosen[str(sample.image)]})
    setting = {
        "image size": args.image_size, "backbone": f"{args.backbone} ({features.backbone.weights_note})",
        "prompt": args.prompt if args.prompt == "none" else f"{args.prompt}, {args.prompt_test}, {args.prompt_class}",
        "textures": args.textures or "drawn by code", "smoothing": "none",
        "image score": f"max after {args.pool}x{args.pool} average pooling", "scale c": args.score_scale,
        "parameters": sum(p.numel() for p in model.parameters()), "steps": state["step"]}
    accuracy = lambda: {"prompt selection accuracy": np.mean(run.gather(
        [score.selection([s]) for s in dataset.test[run.rank::run.world] if s.cls in score.classes]) or [0.0]).item()}
    report.evaluate(run, args, dataset, score, setting=setting, seconds=state["seconds"],
                    paper=paper_numbers(dataset, args), extra=accuracy, pooled=score.pooled)


def test_scale(args, run, features, model, state, dataset):
    """The authors' c: (max + min)/2 of S_rec over the whole test set (departure 4)."""
    rec_only = dataclasses.replace(args, alpha=0.0)
    score = Scorer(rec_only, run, features, model, state, dataset.train,
                   data.Images(dataset.train, args.image_size))
    samples = dataset.test[run.rank::run.world]
    images, extremes = data.Images(samples, args.image_size, corrupt=report.corruption(args)), []
    for first in run.progress(range(0, len(samples), args.batch_size), "scale on the test set"):
        part = samples[first:first + args.batch_size]
        maps, _ = score(torch.stack([images[first + i] for i in range(len(part))]).to(run.device), part)
        extremes += [(maps.min().item(), maps.max().item())]
    lows, highs = zip(*run.gather(extremes))
    return (max(highs) + min(lows)) / 2


# The paper's numbers in per cent, for the column beside ours: I-AUROC, I-AP (Table 6), P-AUROC, P-AP (Table 5), 224 px.
PAPER_CLASSES = """
mvtec  bottle 100 100 98.5 81.6   cable 99.0 99.4 98.2 67.5   capsule 91.1 97.8 98.6 49.9   hazelnut 100 100 98.7 70.2
       metal_nut 99.8 100 96.5 74.1   pill 96.9 99.5 96.0 47.6   screw 91.4 96.6 98.9 39.8   toothbrush 93.3 97.3 98.8 53.4
       transistor 99.8 99.7 98.8 84.1   zipper 99.0 99.7 97.6 59.1   carpet 99.9 100 99.0 69.5   grid 99.0 99.7 98.4 45.6
       leather 100 100 99.6 71.7   tile 100 100 95.3 76.6   wood 98.8 99.6 94.9 65.3
btad   01 98.8 99.6 97.3 58.7   02 79.0 96.5 95.2 46.9   03 100 99.5 99.8 64.7
visa   candle 96.8 97.1 99.2 33.7   capsules 79.0 89.0 98.4 55.6   cashew 93.7 96.7 99.2 74.6
       chewinggum 99.3 99.7 99.1 61.1   fryum 86.9 93.8 97.7 49.5   macaroni1 91.9 91.6 99.2 21.3
       macaroni2 84.1 86.5 97.9 7.6   pcb1 95.8 94.8 99.6 70.0   pcb2 94.1 94.6 98.1 11.0   pcb3 91.9 92.6 98.2 17.7
       pcb4 99.5 99.5 98.1 41.6   pipe_fryum 97.3 98.5 99.5 76.5
"""
PAPER_MEANS = {  # Tables 1 and 3: (data, image size); Table 2: one model for 30 classes
    ("mvtec", 224): (97.9, 99.3, 97.9, 63.7), ("mvtec", 256): (97.6, 99.2, 97.8, 64.7), ("mvtec", 320): (97.9, 99.3, 97.9, 65.9),
    ("btad", 224): (92.6, 98.5, 97.4, 56.8), ("btad", 256): (94.9, 99.0, 97.6, 57.0), ("btad", 320): (95.3, 98.9, 97.8, 57.6),
    ("visa", 224): (92.5, 94.5, 98.7, 43.3), ("visa", 256): (93.3, 94.3, 98.8, 44.1), ("visa", 320): (94.2, 95.7, 98.8, 46.1),
    ("btad+mvtec+visa", 224): (94.5, 96.8, 98.0, 52.4),
}
PAPER_JOINED = {"mvtec": (97.1, 99.0, 97.6, 61.1), "btad": (92.0, 97.5, 97.9, 59.0), "visa": (91.9, 93.9, 98.6, 40.6)}


def paper_numbers(dataset, args):
    """What the paper reports for this data and size (None where it reports nothing, or not for these classes)."""
    named = lambda values: {k: v / 100 for k, v in zip(("i_auroc", "i_ap", "p_auroc", "p_ap"), map(float, values))}
    joined = "+".join(sorted(dataset.name.split("+")))
    if (joined, args.image_size) not in PAPER_MEANS or args.classes or args.corrupt:
        return None
    found = {"source": "OneNIP (ECCV 2024), Tables 1, 2, 3, 5 and 6", "mean": named(PAPER_MEANS[joined, args.image_size])}
    if "+" in joined:
        found["datasets"] = {name: named(values) for name, values in PAPER_JOINED.items()}
    elif args.image_size == 224:
        words = PAPER_CLASSES.split()
        start = words.index(joined) + 1
        found["classes"] = {words[i]: named(words[i + 1:i + 5])
                            for i in range(start, start + 5 * len(dataset.classes), 5)}
    return found


if __name__ == "__main__":
    runtime.launch(main)
