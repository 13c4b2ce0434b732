"""OneNIP: learning to detect multi-class anomalies with just one normal image prompt (ECCV 2024).

https://arxiv.org/abs/2505.09264 · one file: model, losses, pseudo-anomalies, training, scoring.

The idea. UniAD reconstructs frozen features with a transformer; what it cannot reconstruct is
anomalous. OneNIP shows the transformer one normal image of the same class, the *prompt*, and lets
features and prompt attend to each other. It also learns to *restore* pseudo-anomalies to the normal
features they were made from, and a supervised *refiner* sharpens the error of the reconstruction.

    image (B,3,224,224) ──frozen EfficientNet-B4──> 4 maps ──resize, concat──> F (B,272,14,14)
      F ──jitter, Linear──> (B,196,256) ──encoder, 4 layers──> x           prompt P ──same──> p
      [ p <- attend(p, x), MLP      x <- attend(x, p) ] x 4      p <- attend(p, x)         (Eq. 3)
      p ──Linear──> F̂ (B,272,14,14);     S_rec = ||F̂ - F||₂ ──x16──> (B,224,224)
      |F̂ - F| ──2 x [conv, BN, ReLU, deconv], conv──> (B,1,56,56) ──x4, sigmoid──> M̂       (Eq. 6)
      map S = (1 - α) S_rec + α c M̂, α = 0.5, c: 4. below;   image score: 5. below        (Eq. 10)

Commands
    python onenip.py                           embedded data, small model, about four minutes on one core:
                                               I-AUROC 88.4, P-AUROC 94.9, P-AP 45.1 (three seeds, README)
    python onenip.py --data mvtec              the paper's model and schedule (1,000 epochs: a GPU)
    torchrun --nproc_per_node=8 onenip.py --data mvtec --batch-size 8     on 8 GPUs: 64 images a step
    python onenip.py --eval runs/onenip-mvtec/checkpoint.pt --corrupt brightness:3
    python onenip.py --eval runs/onenip-mvtec/checkpoint.pt --predict photo.png folder/

Where this file differs from the paper (P) or from the authors' code (C), and why
  1. Decoder: features attend to the prompt, as in P Eq. 3. The code behind the published tables
     added the prompt's MLP output instead, by mistake; the authors mended it later ("v2"), which
     changed the means by +0.1 I-AUROC.
  2. The MLP, residuals, post-norms, and the neighbour mask in *both* cross-attentions come from C;
     P does not show them.
  3. Losses: C averages restoration and reconstruction, so that L_rec : L_res : L_seg = 1 : 1 : 1.
     Default as C (it gave the numbers); --loss-weights paper is P Eq. 8 with λ = 0.5. Likewise
     --dice code|paper|smooth (C has no factor 2 and smooths by 1). L_rec and L_res are as large as
     the features' variance, L_seg is at most 1: where the features are small, as a ResNet's are,
     L_seg outweighs them and little is reconstructed, but with --loss-weights relative (in neither).
  4. c puts M̂ on the scale of S_rec; P has none. C takes (max + min)/2 of S_rec over the whole *test
     set*. Here over training images and pseudo-anomalies: nothing is learned from the test set;
     --score-scale test is C (with --shift that of the clean images), none is P.
  5. Image score: P takes the maximum of S (--pool 1), C and default after a 16x16 average pooling.
  6. Prompt at test: P picks from a pool with one training image per class the one whose feature is
     most similar; C takes a random training image of the *true* class. Here P (no class label is
     needed); --prompt-class given is C.
  7. Image label from the folder, not from the resized mask; AUROC below 0.5 is not flipped; the
     last checkpoint is the result (C keeps a copy chosen on the test set as well).
  8. Without --textures DIR (such as DTD) the textures of the pseudo-anomalies are drawn by code. C
     reads them with red and blue swapped, and changes their brightness in one of imgaug's colour
     spaces; here in HSV or YCbCr, or by the grey value.
  9. C's total loss is half of ours, which matters to --clip alone; its layers start as copies of
     each other, and its learning rate drops one epoch later; its refiner's BatchNorm sees the 16
     images (8 normal, 8 synthetic) of one GPU, ours all of a step.
 10. --init pca (neither P nor C, off in the paper preset): the first layer starts at the principal
     axes of the features and the last one takes back what it does, so that a short training need
     not learn to copy first.
 11. --norm-power ρ (neither P nor C, off in the paper preset) multiplies Eq. 9 by
     (max(||F||₂, t/1000) / t)^ρ, t the mean of ||F||₂ over the fixed prompts. Long features have
     large errors, normal or not; ρ < 0 takes some of that back.
 12. VisA: the 8,659 training images of its csv. C's list has 10,821 lines, since it names one image
     of each class again and again, so its model saw that one up to 200 times an epoch.

Paper, MVTec, 224 px (v2 log in brackets): I-AUROC 97.9 (98.0), I-AP 99.3, P-AUROC 97.9 (97.9),
P-AP 63.7 (63.9).
"""

import math
import zlib
from dataclasses import dataclass

from common import UsageError
from common.options import BACKBONES, Options, before_torch, option

# ----------------------------------------------------------------------------------------- options


@dataclass
class Args(Options):
    image_size: int = option(
        224, "images are resized to this square; a multiple of 16", group="data", low=32
    )
    textures: str = option(
        "",
        "folder of texture images for pseudo-anomalies, such as DTD (default: drawn by code)",
        group="data",
    )
    backbone: str = option(
        "efficientnet_b4", "frozen feature extractor", group="model", choices=BACKBONES
    )
    weights: str = option(
        "",
        "file of the backbone's weights, or 'random' (default: the official ones)",
        group="model",
    )
    hidden: int = option(
        256, "width of the transformer; a multiple of --heads and of 2", group="model", low=8
    )
    heads: int = option(8, "attention heads", group="model", low=1)
    mlp: int = option(1024, "width of the MLPs", group="model", low=1)
    encoder_layers: int = option(4, "encoder layers (Table 4b)", group="model", low=0)
    decoder_layers: int = option(4, "decoder blocks (Table 4b)", group="model", low=1)
    refiner_width: int = option(128, "channels of the refiner", group="model", low=1)
    dropout: float = option(
        0.1,
        "dropout in attention, after it, and in the encoder's MLPs",
        group="model",
        low=0.0,
        high=0.9,
    )
    epochs: float = option(
        1000,
        "passes over the training images; 0 (and --steps 0): untrained",
        group="training",
        low=0,
    )
    steps: int = option(
        0, "training steps, in place of --epochs when above 0", group="training", low=0
    )
    batch_size: int = option(64, "training images a step and process", group="training", low=1)
    lr: float = option(1e-4, "AdamW's learning rate", group="training", low=0.0)
    schedule: str = option(
        "step",
        "learning rate: x 0.1 after 80 % of the steps, or one cosine after a warm-up of 5 %",
        group="training",
        choices=("step", "cosine"),
    )
    weight_decay: float = option(1e-4, "AdamW's weight decay", group="training", low=0.0)
    clip: float = option(
        0.1, "largest norm of the gradient; 0: no limit", group="training", low=0.0
    )
    jitter: float = option(
        20.0, "scale of the noise on training features", group="training", low=0.0
    )
    bank: int = option(
        0,
        "pseudo-anomalies made of each training image, once; 0: a new one for every sample",
        group="training",
        low=0,
    )
    init: str = option(
        "xavier",
        "start of the first and the last layer: random (xavier), or to the principal axes of the "
        "training images' features and back (pca)",
        group="training",
        choices=("xavier", "pca"),
    )
    loss_weights: str = option(
        "code",
        "L_rec : L_res : L_seg = 1:1:1 (code) or 1:1:0.5 (paper, Eq. 8); relative: as code, but the "
        "first two count as if the features were as large as EfficientNet-Lite0's, whatever the "
        "backbone",
        group="training",
        choices=("code", "paper", "relative"),
    )
    dice: str = option(
        "code",
        "segmentation loss: the authors' code (no factor 2, smoothed by 1), the paper's Eq. 7 "
        "(constant on normal images, whose masks are empty: the refiner learns nothing from them), "
        "or smooth: factor 2 and smoothed by 1",
        group="training",
        choices=("code", "paper", "smooth"),
    )
    alpha: float = option(
        0.5, "share of the refiner in the map (Table 4c)", group="scoring", low=0.0, high=1.0
    )
    norm_power: float = option(
        0.0,
        "the error counts by the magnitude of the features there, to this power; 0: not at all, as "
        "in the paper",
        group="scoring",
        low=-2.0,
        high=2.0,
    )
    score_scale: str = option(
        "train",
        "images whose S_rec gives the refiner's scale c: training or (leaking) test; none: c = 1, "
        "Eq. 10 as printed",
        group="scoring",
        choices=("train", "test", "none"),
    )
    pool: int = option(
        16,
        "side of the average pooling before the maximum that scores an image",
        group="scoring",
        low=1,
    )
    prompt_class: str = option(
        "selected",
        "class of the prompt at test: most similar, or given by the true label",
        group="scoring",
        choices=("selected", "given"),
    )
    prompt_test: str = option(
        "fixed",
        "prompt at test: the class's fixed image, a random training image of the class, or "
        "(wrong) the fixed image of another class (Table 4d)",
        group="scoring",
        choices=("fixed", "random", "wrong"),
    )
    prompt_of: str = option(
        "", "at test every image gets the prompt of this class, whatever it shows", group="scoring"
    )
    eval_every: float = option(
        0.0,
        "measure the test images every so many epochs, as a line of log.jsonl (Fig. 1b); selects "
        "nothing, and counts as time of the training; 0: never",
        low=0.0,
    )
    prompt_seed: int = option(
        -1,
        "seed that draws the fixed prompts, and those of --prompt-test random; with --eval it "
        "draws fixed prompts anew, from the training images of --data (Table 4d); -1: that of --seed",
        low=-1,
    )
    prompt: str = option(
        "dynamic",
        "none: UniAD's learned queries; static: the prompt is a query only (Eq. 2); "
        "dynamic: both attend (Eq. 3)",
        group="ablations",
        choices=("none", "static", "dynamic"),
    )
    restoration: bool = option(True, "restore pseudo-anomalies", group="ablations")
    refiner: bool = option(True, "sharpen the map by the supervised refiner", group="ablations")
    prompt_train: str = option(
        "random",
        "prompt in training: a random image of the class, or one fixed image (Table 4d)",
        group="ablations",
        choices=("random", "fixed"),
    )


PRESETS = {
    "paper": dict(mask_rule="nearest"),  # the authors' way to resize masks
    # For two CPU cores: a smaller model and picture, many small steps, pseudo-anomalies made once.
    # As wide as the features are, so that the start at their axes loses nothing. The paper's Dice
    # form, since the code's (no factor 2, smoothed by 1) lets a short training settle on empty
    # masks; less jitter, since a short training does not get past the noise of the paper's. Width,
    # start, epochs, alpha and the power were chosen on a second drawing of the data
    # (docs/measured.md).
    "laptop": dict(
        image_size=160,
        backbone="efficientnet_lite0",
        hidden=192,
        heads=4,
        mlp=384,
        encoder_layers=1,
        decoder_layers=2,
        refiner_width=64,
        dropout=0.0,
        jitter=2.0,
        init="pca",
        dice="paper",
        bank=10,
        epochs=24,
        batch_size=4,
        lr=2e-3,
        schedule="cosine",
        alpha=0.3,
        norm_power=-0.5,
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
from torch.utils.data import default_collate

import kernels
from common import backbones, data, papers, report, runtime, thresholds
from common.maps import box, image_score, name_of_power

# ------------------------------------------------------------------------------------------- model


class Features(nn.Module):
    """Frozen backbone and neck: uint8 images (B, 3, S, S) -> F (B, C, S/16, S/16), float32."""

    def __init__(self, backbone, weights, image_size):
        super().__init__()
        self.backbone = backbones.build(backbone, weights or None).fuse()
        self.backbone.to(memory_format=torch.channels_last)
        self.channels = sum(self.backbone.channels)
        self.side = image_size // 16

    @torch.no_grad()
    def forward(self, images):
        x = data.normalize(images).contiguous(memory_format=torch.channels_last)
        size = (self.side, self.side)
        resized = []
        for f in self.backbone(x):  # (B, C_i, h_i, w_i) of strides 2, 4, 8 and 16
            f = F.interpolate(f.float(), size, mode="bilinear", align_corners=True)
            resized.append(f)
        return torch.cat(resized, dim=1)

    def split(self, rows):
        """The rows of `runtime.Frozen` are the model's input as they are."""
        return rows


class Attention(nn.Module):
    """Multi-head attention: query (B, N, D), key and value (B, M, D) -> (B, N, D).

    `window` = (height, width, radius) forbids each query its own neighbourhood (UniAD).
    """

    def __init__(self, args):
        super().__init__()
        self.heads, self.dropout = args.heads, args.dropout
        self.to_q = nn.Linear(args.hidden, args.hidden)
        self.to_k = nn.Linear(args.hidden, args.hidden)
        self.to_v = nn.Linear(args.hidden, args.hidden)
        self.to_out = nn.Linear(args.hidden, args.hidden)

    def forward(self, query, key, value, window=None):
        q = self.split_heads(self.to_q(query))
        k = self.split_heads(self.to_k(key))
        v = self.split_heads(self.to_v(value))
        dropout = self.dropout if self.training else 0.0
        # Eq. 1, softmax(Q Kᵀ / √d) V
        out = kernels.cross_attention(q, k, v, window=window, dropout_p=dropout)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, N, D/heads) -> (B, N, D)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,N,D) -> (B,heads,N,D/heads)


def mlp(args, dropout):
    return nn.Sequential(
        nn.Linear(args.hidden, args.mlp),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(args.mlp, args.hidden),
    )


class EncoderLayer(nn.Module):
    """Post-norm self-attention with the neighbour mask: a token must be explained by tokens further
    away. (B, N, D) -> (B, N, D); pos: (N, D)."""

    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.mlp = mlp(args, args.dropout)
        self.norm1 = nn.LayerNorm(args.hidden)
        self.norm2 = nn.LayerNorm(args.hidden)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, pos, window):
        x = self.norm1(x + self.dropout(self.attention(x + pos, x + pos, x, window)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DynamicBlock(nn.Module):
    """Eq. 3: the prompt is updated from the features, then the features from the prompt.

    Prompt p and features x, each (B, N, D) -> the same.
    """

    def __init__(self, args):
        super().__init__()
        self.prompt_attention = Attention(args)
        self.feature_attention = Attention(args)
        self.mlp = mlp(args, dropout=0.0)  # the authors define one here, and never apply it
        self.norm1 = nn.LayerNorm(args.hidden)
        self.norm2 = nn.LayerNorm(args.hidden)
        self.norm3 = nn.LayerNorm(args.hidden)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, p, x, pos, window):
        # Eq. 3, p <- attend(p, x)
        p = self.norm1(p + self.dropout(self.prompt_attention(p + pos, x + pos, x, window)))
        p = self.norm2(p + self.dropout(self.mlp(p)))
        # Eq. 3, x <- attend(x, p)
        x = self.norm3(x + self.dropout(self.feature_attention(x + pos, p + pos, p, window)))
        return p, x


class QueryBlock(nn.Module):
    """UniAD's decoder layer: a query asks the encoder's output x, then the `answer` of the layer
    before; each (B, N, D). The query is the encoded prompt (Eq. 2, --prompt static) or a learned
    table of this layer (--prompt none)."""

    def __init__(self, args, tokens):
        super().__init__()
        self.query = None
        if args.prompt == "none":
            self.query = nn.Parameter(torch.randn(tokens, args.hidden))
        self.encoder_attention = Attention(args)
        self.previous_attention = Attention(args)
        self.mlp = mlp(args, args.dropout)
        self.norm1 = nn.LayerNorm(args.hidden)
        self.norm2 = nn.LayerNorm(args.hidden)
        self.norm3 = nn.LayerNorm(args.hidden)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, p, x, answer, pos, window):
        q = p if self.query is None else self.query.expand_as(x)
        # Eq. 2: q asks x
        q = self.norm1(q + self.dropout(self.encoder_attention(q + pos, x + pos, x, window)))
        attended = self.previous_attention(q + pos, answer + pos, answer, window)
        q = self.norm2(q + self.dropout(attended))
        return self.norm3(q + self.dropout(self.mlp(q)))


class Refiner(nn.Module):
    """|F̂ - F| (B, C, h, w) -> logits (B, 1, 4h, 4w)."""

    def __init__(self, channels, width):
        super().__init__()
        self.layers = nn.Sequential(
            *self.doubling(channels, width),
            *self.doubling(width, width),
            nn.Conv2d(width, 1, 1),
        )

    @staticmethod
    def doubling(c_in, c_out):
        """(B, c_in, h, w) -> (B, c_out, 2h, 2w)."""
        return [
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.ConvTranspose2d(c_out, c_out, 2, stride=2),
        ]

    def forward(self, error):
        return self.layers(error)


class OneNIP(nn.Module):
    """The trainable part (Fig. 2): features and prompt features (B, C, h, w) -> reconstruction F̂
    (B, C, h, w) and the refiner's mask M̂ (B, S, S)."""

    def __init__(self, channels, side, args):
        super().__init__()
        self.channels, self.side, self.prompt = channels, side, args.prompt
        self.image_size, self.jitter = args.image_size, args.jitter
        # the neighbourhood is side // 2 wide, one more where that is even
        self.window = (side, side, side // 2 // 2)
        self.input = nn.Linear(channels, args.hidden)
        self.output = nn.Linear(args.hidden, channels)
        self.row = nn.Parameter(torch.rand(side, args.hidden // 2))  # learned position, U(0, 1)
        self.column = nn.Parameter(torch.rand(side, args.hidden // 2))
        self.encoder = nn.ModuleList(EncoderLayer(args) for _ in range(args.encoder_layers))
        blocks = range(args.decoder_layers)
        if args.prompt == "dynamic":
            self.decoder = nn.ModuleList(DynamicBlock(args) for _ in blocks)
            self.final_attention = Attention(args)
            self.dropout = nn.Dropout(args.dropout)
        else:
            self.decoder = nn.ModuleList(QueryBlock(args, side * side) for _ in blocks)
        self.norm = nn.LayerNorm(args.hidden)
        self.refiner = Refiner(channels, args.refiner_width) if args.refiner else None
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                # the authors' queries, keys and values keep nn.MultiheadAttention's start: Xavier
                # over one (3D, D) matrix, √½ of what it is over a (D, D) matrix
                gain = 0.5**0.5 if name.endswith(("to_q", "to_k", "to_v")) else 1.0
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
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

    def position(self):
        """Column table and row table side by side: (N, D) with N = side²."""
        column = self.column.expand(self.side, -1, -1)  # (h, w, D/2)
        row = self.row[:, None].expand(-1, self.side, -1)  # (h, w, D/2)
        return torch.cat([column, row], dim=2).flatten(0, 1)  # (h, w, D) -> (N, D)

    def encode(self, features):
        """(B, C, h, w) -> (B, N, D), of features and prompts alike.

        In training every token is jittered by noise of --jitter/C times its norm.
        """
        tokens = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        if self.training and self.jitter > 0:
            sigma = tokens.norm(dim=2, keepdim=True) * (self.jitter / self.channels)
            tokens = tokens + torch.randn_like(tokens) * sigma
        x = self.input(tokens)
        pos = self.position()
        for layer in self.encoder:
            x = layer(x, pos, self.window)
        return x

    def decode(self, x, p):
        """Encoded features and encoded prompt (B, N, D) -> F̂ (B, C, h, w).

        p is None for --prompt none.
        """
        if self.prompt == "dynamic":
            out = self.decode_both_ways(x, p)
        else:
            out = self.decode_one_way(x, p)
        out = self.output(self.norm(out))
        return out.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B,N,C) -> (B,C,h,w)

    def decode_both_ways(self, x, p):
        """Eq. 3, block after block; what is read at the end is the prompt's stream."""
        pos = self.position()
        for block in self.decoder:
            p, x = block(p, x, pos, self.window)
        return p + self.dropout(self.final_attention(p + pos, x + pos, x))

    def decode_one_way(self, x, p):
        """Eq. 2: the prompt only asks (or UniAD's learned queries, p = None)."""
        pos = self.position()
        answer = x
        for block in self.decoder:
            answer = block(p, x, answer, pos, self.window)
        return answer

    def refine(self, reconstruction, features):
        """Eq. 6: |F̂ - F| (B, C, h, w) -> logits of the mask M̂ (B, 1, 4h, 4w)."""
        return self.refiner((reconstruction - features).abs()).float()  # Eq. 6

    def forward(self, normal, synthetic, prompt):
        """One pass of training.

        Args:
            normal, synthetic, prompt: features (B, C, h, w). synthetic: None if neither restoration
                nor the refiner is trained. prompt: None for --prompt none.
        Returns:
            F̂ of the normal and of the synthetic features (B, C, h, w), M̂ of both (2B, S, S); None
            for what is not there.
        """
        both = normal if synthetic is None else torch.cat([normal, synthetic])  # (2B, C, h, w)
        if prompt is None:
            x, p = self.encode(both), None
        else:
            encoded = self.encode(torch.cat([both, prompt]))  # (3B, N, D)
            x, p = encoded.split([len(both), len(prompt)])
            p = p.repeat(len(both) // len(prompt), 1, 1)  # (B, N, D) -> (2B, N, D)
        reconstruction = self.decode(x, p).float()
        reconstructed, restored = reconstruction[: len(normal)], None
        if synthetic is not None:
            restored = reconstruction[len(normal) :]
        predicted = None
        if self.refiner is not None:
            predicted = mask_of(self.refine(reconstruction, both), self.image_size)
        return reconstructed, restored, predicted


def resize(maps, size):
    """(B, C, h, w) -> (B, C, size, size)."""
    return F.interpolate(maps, (size, size), mode="bilinear", align_corners=True)


def mask_of(logits, size):
    """M̂ in (0, 1): (B, 1, 4h, 4w) -> (B, size, size)."""
    return torch.sigmoid(resize(logits, size)).squeeze(1)


# ------------------------------------------------------------------------------------------ losses


def dice_loss(predicted, mask, form):
    """Segmentation loss per image, then mean. predicted in (0, 1), mask in {0, 1}: (B, H, W).

    paper (Eq. 7): 1 - 2 Σ M̂M / (Σ M̂² + Σ M²). code: 1 - (Σ M̂M + 1) / (Σ M̂² + Σ M² + 1).
    smooth: 1 - (2 Σ M̂M + 1) / (Σ M̂² + Σ M² + 1). Of an empty mask, `paper` is 1 whatever M̂ is; of
    a perfect M̂, `code` is about ½.
    """
    overlap = (predicted * mask).sum((1, 2))
    squares = predicted.square().sum((1, 2)) + mask.square().sum((1, 2))
    if form == "paper":
        # Eq. 7. Below 1 the denominator is only if the mask is empty: then its size is no matter
        # as long as it is not 0
        return (1 - 2 * overlap / squares.clamp_min(1)).mean()
    if form == "smooth":
        return (1 - (2 * overlap + 1) / (squares + 1)).mean()
    return (1 - (overlap + 1) / (squares + 1)).mean()


def losses(model, normal, synthetic, prompt, mask, args, balance=1.0):
    """Reconstruction, restoration, segmentation. Both of the first have the *normal* features,
    before jitter, as target.

    Args:
        normal, synthetic, prompt: as `OneNIP.forward` takes them.
        mask: of the pseudo-anomalies, (B, S, S) in {0, 1}; normal images have an empty one.
        balance: what the first two are multiplied by (departure 3).
    Returns:
        The total and {"rec", "res", "seg"} (scalars; parts that are not trained are left out).
    """
    reconstructed, restored, predicted = model(normal, synthetic, prompt)
    parts = {"rec": F.mse_loss(reconstructed, normal)}  # Eq. 4
    total = balance * parts["rec"]
    if args.restoration:
        parts["res"] = F.mse_loss(restored, normal)  # Eq. 5
        total = total + balance * parts["res"]
    if args.refiner:
        masks = torch.cat([torch.zeros_like(mask), mask])  # (2B, S, S)
        parts["seg"] = dice_loss(predicted, masks, args.dice)  # Eq. 7
        weight = 0.5 if args.loss_weights == "paper" else 1.0  # λ
        total = total + weight * parts["seg"]  # Eq. 8
    return total, parts


def balance_of(features):
    """--loss-weights relative: what L_rec and L_res are multiplied by, 32 / V.

    features: of training images, (N, C, h, w). V: their variance about the means of their channels;
    about 32 for EfficientNet-Lite0 at 224 px, with which 1:1:1 works (docs/measured.md).
    """
    variance = features.var((0, 2, 3), correction=0).mean().item()
    return 32.0 / max(variance, 1e-6)  # not infinite for images of one colour


# -------------------------------------------------------------------------------- pseudo-anomalies


def synthesize(image, rng, texture):
    """A pseudo-anomaly: CutPaste or DRAEM style, half and half.

    Args:
        image: uint8 (S, S, 3), a normal image. rng: numpy Generator.
        texture: rng -> uint8 (S, S, 3).
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
    w = min(size, max(1, int(math.sqrt(area * aspect))))
    h = min(size, max(1, int(math.sqrt(area / aspect))))
    (y0, x0), (y1, x1) = rng.integers(0, [size - h + 1, size - w + 1], (2, 2))
    patch = Image.fromarray(image[y0 : y0 + h, x0 : x0 + w])
    out, mask = image.copy(), np.zeros((size, size), bool)
    out[y1 : y1 + h, x1 : x1 + w] = colour_jitter(patch, rng)
    mask[y1 : y1 + h, x1 : x1 + w] = True
    return out, mask


def cutpaste_scar(image, rng):
    """A thin strip of 2-16 x 10-25 px, recoloured, turned by up to 45°, pasted elsewhere through its
    alpha."""
    size = image.shape[0]
    w, h = int(rng.integers(2, 17)), int(rng.integers(10, 26))
    y0, x0 = rng.integers(0, [size - h + 1, size - w + 1])
    scar = colour_jitter(Image.fromarray(image[y0 : y0 + h, x0 : x0 + w]), rng)
    scar.putalpha(255)
    scar = scar.rotate(rng.uniform(-45, 45), expand=True)
    # its place is drawn for the upright size: a turned scar may be clipped
    y1, x1 = rng.integers(0, [size - h + 1, size - w + 1])
    place = int(x1), int(y1)
    out, alpha = Image.fromarray(image), Image.new("L", (size, size))
    out.paste(scar, place, scar)
    alpha.paste(scar.getchannel("A"), place)
    return np.array(out), np.asarray(alpha) > 0


def colour_jitter(patch, rng):
    """Brightness, contrast and saturation by 1 ± 0.4, hue by ± 0.1 of the circle, in random order
    (PIL image)."""
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for i in rng.permutation(4):
        if i < 3:
            patch = enhancers[i](patch).enhance(rng.uniform(0.6, 1.4))
        else:
            hsv = np.array(patch.convert("HSV"))
            shift = int(rng.uniform(-0.1, 0.1) * 255)
            hsv[..., 0] += np.uint8(shift % 256)  # wraps around the circle
            patch = Image.fromarray(hsv, "HSV").convert("RGB")
    return patch


def draem(image, rng, texture):
    """DRAEM: a recoloured texture blended in where Perlin noise is high; opacity 1 - β with
    β ~ U(0, 0.8)."""
    size = image.shape[0]
    for i in rng.choice(len(TEXTURE_OPS), 3, replace=False):
        texture = TEXTURE_OPS[i](texture, rng)
    cells = 2 ** rng.integers(1, 6, 2)
    noise = Image.fromarray(perlin(size, cells, rng), "F")
    noise = noise.rotate(rng.uniform(-5, 5), Image.Resampling.BILINEAR)
    mask = np.asarray(noise) > 0.5
    beta = rng.uniform(0, 0.8)
    out = image.copy()
    out[mask] = (1 - beta) * texture[mask] + beta * image[mask]  # (pixels of the mask, 3)
    return out, mask


def perlin(size, cells, rng):
    """Perlin noise (size, size), float32, times √2 so that it spans about ±1; `cells` = lattice cells
    per axis.

    At a point it is the mean, with weights 1 - t and t along each axis, of what the four corners of
    its cell say: the product of a corner's gradient with the offset from there. Weights and offsets
    are separable: first along x for every row of the lattice, then along y.
    """
    angle = rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1))
    gradient_y, gradient_x = math.sqrt(2) * np.cos(angle), math.sqrt(2) * np.sin(angle)
    i, f, t = _places(size, cells[1])  # each (size,)
    left, right = 1 - t, t
    # what the gradients' x and y components give: (rows of the lattice, size)
    of_x = gradient_x[:, i] * left * f + gradient_x[:, i + 1] * right * (f - 1)
    of_y = gradient_y[:, i] * left + gradient_y[:, i + 1] * right
    of_x, of_y = of_x.astype(np.float32), of_y.astype(np.float32)
    i, f, t = _places(size, cells[0])
    f, t = f[:, None].astype(np.float32), t[:, None].astype(np.float32)
    above = of_y[i] * f + of_x[i]  # (size, size)
    below = of_y[i + 1] * (f - 1) + of_x[i + 1]
    return above + (below - above) * t


def _places(size, cells):
    """Of each pixel of an axis: its cell, its position in the cell from 0 to 1, and that faded."""
    x = np.arange(size) * cells / size
    cell = x.astype(int)
    f = x - cell
    return cell, f, f * f * f * (f * (f * 6 - 15) + 10)


# The ten changes of a texture: uint8 (S, S, 3), rng -> uint8 (S, S, 3).

LEVELS = np.arange(256, dtype=np.float32)  # of a channel: a change of levels is a table of 256


def _gamma(t, rng):
    table = (LEVELS[:, None] / 255) ** rng.uniform(0.5, 2.0, 3) * 255  # (256, 3)
    return _look_up(t, table)


def _brightness(t, rng):
    space = ("HSV", "YCbCr", "LAB")[rng.integers(3)]
    changed = _multiply_add(LEVELS, rng)  # (256,)
    if space == "LAB":
        # Pillow converts to LAB only through colour profiles: take grey as lightness there
        v = np.asarray(Image.fromarray(t).convert("L"))
        change = (changed - LEVELS)[v]  # (S, S)
        return (t + change[..., None]).clip(0, 255).astype(np.uint8)
    channels = np.array(Image.fromarray(t).convert(space))
    light = 2 if space == "HSV" else 0
    channels[..., light] = changed.astype(np.uint8)[channels[..., light]]
    return np.asarray(Image.fromarray(channels, space).convert("RGB"))


def _multiply_add(v, rng):
    factor, shift = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
    changed = v * factor + shift if rng.random() < 0.5 else (v + shift) * factor
    return changed.clip(0, 255)


def _hue_saturation(t, rng):
    hue, saturation = rng.integers(-50, 51, 2)
    tables = (LEVELS + hue) % 256, LEVELS + saturation, LEVELS  # the hue is a circle
    hsv = np.asarray(Image.fromarray(t).convert("HSV"))
    changed = _look_up(hsv, np.stack(tables, axis=1).clip(0, 255))
    return np.asarray(Image.fromarray(changed, "HSV").convert("RGB"))


def _solarize(t, rng):
    if rng.random() >= 0.5:
        return t
    threshold = rng.uniform(32, 128)
    table = np.where(LEVELS >= threshold, 255 - LEVELS, LEVELS)
    return table.astype(np.uint8)[t]


def _look_up(t, table):
    """Each channel by its own table: uint8 (S, S, 3), (256, 3) from 0 to 255 -> uint8 (S, S, 3)."""
    flat = table.astype(np.uint8).T.ravel().tolist()  # 256 of the first channel, 256 of the next...
    return np.asarray(Image.fromarray(t).point(flat))


def _sharpness(t, rng):
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(t)).enhance(rng.uniform(0, 2)))


def _posterize(t, rng):
    return np.asarray(ImageOps.posterize(Image.fromarray(t), int(rng.integers(1, 9))))


def _mirror(t, rng):
    return t[:, ::-1] if rng.random() < 0.5 else t


def _invert(t, rng):
    return 255 - t


def _autocontrast(t, rng):
    return np.asarray(ImageOps.autocontrast(Image.fromarray(t), cutoff=rng.uniform(0, 20)))


def _equalize(t, rng):
    return np.asarray(ImageOps.equalize(Image.fromarray(t)))


TEXTURE_OPS = (
    _gamma,
    _brightness,
    _hue_saturation,
    _solarize,
    _sharpness,
    _posterize,
    _mirror,
    _invert,
    _autocontrast,
    _equalize,
)


class Textures:
    """Texture source: rng -> uint8 (S, S, 3). Images of a folder, or (without one) drawn: coloured
    noise of random grain, turned into stripes or spots half of the time."""

    def __init__(self, folder, size):
        self.size, self.files = size, []
        if folder:
            self.files = data.image_files(folder)
            if not self.files:
                raise UsageError(f"--textures {folder}: no images in it")

    def __call__(self, rng):
        if self.files:
            file = self.files[rng.integers(len(self.files))]
            return data.resize_image(data.read_image(file), self.size)
        return self.drawn(rng)

    def drawn(self, rng):
        size = self.size
        cells = 2 ** rng.integers(2, 7, 2)
        grain = perlin(size, cells, rng) + 0.5 * perlin(size, np.minimum(2 * cells, size), rng)
        if rng.random() < 0.5:
            grain = np.sin(grain * rng.uniform(3, 20))
        low, high = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        weight = (grain - grain.min()) / (np.ptp(grain) + 1e-9)  # (S, S) in [0, 1]
        noise = rng.uniform(0, 20) * rng.standard_normal((size, size), dtype=np.float32)
        channels = []
        for first, last in zip(low, high):
            channel = weight * (last - first) + (noise + first)  # (S, S)
            channels.append(channel.clip(0, 255).astype(np.uint8))
        return np.stack(channels, axis=-1)  # (S, S, 3)


def seed_of_prompts(args):
    return args.seed if args.prompt_seed < 0 else args.prompt_seed


def fixed_prompts(samples, args):
    """One training image of each class: {class: its index in samples}, classes in order."""
    rng = np.random.default_rng([seed_of_prompts(args), 0])
    chosen = {}
    for cls in sorted({sample.cls for sample in samples}):
        members = [i for i, sample in enumerate(samples) if sample.cls == cls]
        chosen[cls] = int(rng.choice(members))
    return chosen


def prompts_of_images(run, features, images, fixed):
    """The part of a checkpoint that says which prompts are fixed: {"classes": names, "prompts":
    their features (classes, C, h, w), "prompt_files": paths}."""
    prompts = [features(run.to_device(images[i][None])).cpu() for i in fixed.values()]
    return {
        "classes": list(fixed),
        "prompts": torch.cat(prompts),
        "prompt_files": [str(images.samples[i].image) for i in fixed.values()],
    }


class Triplets(runtime.Stream):
    """The training stream: a normal image, a prompt of its class, a pseudo-anomaly made of it.

    Sample k is {"normal": {"index", "image"}, "prompt": the same}, as `Stream` makes them, and, if
    they are trained on, "synthetic": {"image", "mask"}, or with --bank {"index"} into the bank.
    """

    drop_incomplete = False

    def __init__(self, images, args, fixed, images_per_step, needs_images):
        super().__init__(images, args.seed, images_per_step, needs_images)
        self.args = args
        self.cls = [sample.cls for sample in images.samples]
        self.fixed = fixed  # class -> index of its fixed prompt
        self.members = {name: [] for name in fixed}  # class -> indices of its images
        for i, name in enumerate(self.cls):
            self.members[name].append(i)
        self.textures = Textures(args.textures, args.image_size)
        self.synthetic = args.restoration or args.refiner

    def __getitem__(self, k):
        index = self.index(k)
        cls = self.cls[index]
        rng = np.random.default_rng([self.args.seed, 2, k])
        prompt = self.fixed[cls]
        if self.args.prompt_train == "random":
            prompt = self.members[cls][rng.integers(len(self.members[cls]))]
        item = {"normal": self.sample(index), "prompt": self.sample(prompt)}
        if self.synthetic and self.args.bank:
            number = int(rng.integers(self.args.bank))
            item["synthetic"] = {"index": index * self.args.bank + number}
        elif self.synthetic:
            image, mask = self.pseudo_anomaly(index, k)
            item["synthetic"] = {"image": image, "mask": mask}
        return item

    def pseudo_anomaly(self, index, number):
        """Of training image `index`, all its randomness from (seed, number): uint8 (3, S, S), and
        its mask, bool (S, S)."""
        rng = np.random.default_rng([self.args.seed, 3, number])
        image = self.images[index].permute(1, 2, 0).contiguous().numpy()  # (3,S,S) -> (S,S,3)
        image, mask = synthesize(image, rng, self.textures)
        image = torch.from_numpy(image).permute(2, 0, 1)  # (S, S, 3) -> (3, S, S)
        return image.contiguous(), torch.from_numpy(mask)


class Made(torch.utils.data.Dataset):
    """The pseudo-anomalies of --bank, by number: uint8 (3, S, S) and their masks, bool (S, S)."""

    def __init__(self, stream, each):
        self.stream, self.each = stream, each

    def __len__(self):
        return len(self.stream.cls) * self.each

    def __getitem__(self, number):
        return self.stream.pseudo_anomaly(number // self.each, number)


class Bank:
    """--bank: pseudo-anomalies made of every training image, once, and their frozen features.

    Called with {"index": (B,)}: features (B, C, h, w) and masks (B, S, S), on the device.
    """

    def __init__(self, args, run, features, stream):
        made = Made(stream, args.bank)
        pictures = len(made), 3, args.image_size, args.image_size
        images = torch.empty(pictures, dtype=torch.uint8)
        self.masks = torch.empty(pictures[:1] + pictures[2:], dtype=torch.bool)  # (N · bank, S, S)
        batches = runtime.in_order(len(made), 16)
        loader = run.loader(made, batches, args.workers)
        parts = zip(batches, run.progress(loader, "pseudo-anomalies", len(batches)))
        for numbers, (image, mask) in parts:
            images[numbers], self.masks[numbers] = image, mask
        self.run = run
        self.frozen = runtime.Frozen(run, features, images, args)
        if self.frozen.needs_images:
            raise self.too_large(args)

    @classmethod
    def check_memory(cls, args, run, n_images):
        """Raises UsageError if the pictures would take more than --memory-share of what is free."""
        trains = args.steps or args.epochs
        if not trains or not (args.restoration or args.refiner):
            return
        # a picture has three channels, its mask is one; every process makes its own
        need = run.processes * n_images * args.bank * 4 * args.image_size**2  # bytes
        if need > args.memory_share * data.free_memory():
            raise cls.too_large(args)

    @staticmethod
    def too_large(args):
        return UsageError(
            f"--bank {args.bank} does not fit into --memory-share {args.memory_share}; use --bank 0"
        )

    def __call__(self, batch):
        masks = self.run.to_device(self.masks[batch["index"]])
        return self.frozen(batch), masks.float()


# ---------------------------------------------------------------------------------------- training


def optimizer_of(model, args):
    return torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
    )


def train(args, run, features, model, images, dataset):
    """The flat training loop: trains `model` in place. Returns the finished checkpoint state.

    images: pixels of the training images. dataset: for --eval-every.
    """
    model, parallel = run.wrap(model)
    optimizer = optimizer_of(model, args)
    job = runtime.Training(run, args, model, optimizer)
    if job.finished:  # only the evaluation is missing
        return job.resumed
    frozen = runtime.Frozen(run, features, images, args)
    fixed = fixed_prompts(images.samples, args)
    job.contents |= prompts_of_images(run, features, images, fixed)
    images_per_step = args.batch_size * run.world
    stream = Triplets(images, args, fixed, images_per_step, frozen.needs_images)
    steps = args.steps or stream.steps(args.epochs)
    bank = None
    if args.bank and stream.synthetic and steps:
        bank = Bank(args, run, features, stream)
    balance = 1.0
    if args.loss_weights == "relative":
        balance = balance_of(frozen(stream.first(64)))
    if args.init == "pca" and not job.resumed:
        model.start_at_axes(frozen(stream.first(64)))

    def statistics():
        return training_statistics(args, run, frozen, features, model, stream, job.contents)

    parallel.train()
    for step, batch in job.batches(stream, steps):
        run.seed(args.seed, 4, step)  # jitter and dropout
        job.set_rate(step)
        normal = frozen(batch["normal"])  # (B, C, h, w), like all three
        prompt = frozen(batch["prompt"]) if args.prompt != "none" else None
        synthetic = mask = None
        if bank is not None:
            synthetic, mask = bank(batch["synthetic"])
        elif stream.synthetic:
            synthetic = features(run.to_device(batch["synthetic"]["image"]))
            mask = run.to_device(batch["synthetic"]["mask"]).float()  # (B, S, S)
        with run.autocast():
            loss, parts = losses(parallel, normal, synthetic, prompt, mask, args, balance)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip, foreach=True)
        optimizer.step()
        if args.eval_every and (step + 1) % stream.steps(args.eval_every) == 0:
            job.share_buffers()
            model.eval()
            epoch = (step + 1) * images_per_step / len(images)
            score = scorer(args, run, features, model, job.contents | statistics(), dataset, images)
            test = report.measure(run, args, dataset, score, corrupt=report.corruption(args))
            run.log({"step": step + 1, "epoch": round(epoch, 2), "test": test.rep["mean"]})
            parallel.train()
        job.record(loss, parts)
    model.eval()
    return job.finish(**statistics())


def training_statistics(args, run, frozen, features, model, stream, contents):
    """What scoring takes from training images (N, up to 256) and pseudo-anomalies made of them.

    contents: of the checkpoint, with the fixed prompts.
    Returns {"scale": c = (max + min)/2 of S_rec over both, "normal_errors": (N, 1, h, w),
    "normal_logits": (N, 1, 4h, 4w) or None}: of the normal images, for `normal_score`.
    """
    classes = contents["classes"]
    chosen = runtime.epoch_order(args.seed, 0, len(stream.cls))[: thresholds.AT_MOST].tolist()
    errors, all_logits = [], []  # of each batch of normal images
    extremes = []  # of every batch's S_rec
    prompts = run.to_device(contents["prompts"])
    typical = typical_norm(prompts)
    encoded = encoded_prompts(run, model, prompts)
    for first in run.progress(range(0, len(chosen), args.batch_size), "training statistics"):
        indices = chosen[first : first + args.batch_size]
        batch = default_collate([stream.sample(i) for i in indices])
        p = None
        if encoded is not None:
            p = encoded[[classes.index(stream.cls[i]) for i in indices]]
        error, logits, _ = reconstruct(run, model, frozen(batch), p, typical, args.norm_power)
        errors.append(error)
        all_logits.append(logits)
        extremes += extremes_of(error, args)
        if stream.synthetic:
            made = []
            for place, i in enumerate(indices, first):
                made.append(stream.pseudo_anomaly(i, 2**40 + place))  # training never gets so far
            pictures = torch.stack([image for image, _ in made])  # (B, 3, S, S)
            x = features(run.to_device(pictures))
            error, _, _ = reconstruct(run, model, x, p, typical, args.norm_power)
            extremes += extremes_of(error, args)
    return {
        "scale": (max(extremes) + min(extremes)) / 2,
        "normal_errors": torch.cat(errors).cpu(),
        "normal_logits": torch.cat(all_logits).cpu() if args.refiner else None,
    }


def extremes_of(error, args):
    """Lowest and highest value of S_rec, from what `reconstruct` gave."""
    s_rec = resize(error, args.image_size)
    return [s_rec.min().item(), s_rec.max().item()]


# ----------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def encoded_prompts(run, model, prompts):
    """Features (B, C, h, w) -> (B, N, D); None if the model takes no prompt."""
    if model.prompt == "none":
        return None
    with run.autocast():
        return model.encode(prompts)


def typical_norm(prompts):
    """Mean of ||F||₂ over the prompts (classes, C, h, w); a scalar."""
    return prompts.norm(dim=1).mean()


@torch.no_grad()
def reconstruct(run, model, x, p, typical=1.0, power=0.0):
    """Features x (B, C, h, w), with encoded prompts p (B, N, D) or None, as the model sees them.

    typical, power: of --norm-power (departure 11).
    Returns ||F̂ - F||₂ (B, 1, h, w), weighted, the logits of M̂ (B, 1, 4h, 4w), None without a refiner, and the
    encoded features (B, N, D).
    """
    with run.autocast():
        tokens = model.encode(x)
        reconstruction = model.decode(tokens, p).float()
        error = (reconstruction - x).norm(dim=1, keepdim=True)  # Eq. 9, not yet resized
        if power:
            # (B, 1, h, w); not zero, for a power below 0
            norm = x.norm(dim=1, keepdim=True).clamp(min=1e-3 * typical)
            error = error * (norm / typical) ** power
        logits = None
        if model.refiner is not None:
            logits = model.refine(reconstruction, x)
    return error, logits, tokens


def combine(error, logits, scale, args):
    """What `reconstruct` gave -> S (B, S, S) and image scores (B,). `scale`: c (departure 4)."""
    s_rec = resize(error, args.image_size).squeeze(1)  # Eq. 9: (B, 1, h, w) -> (B, S, S)
    s = s_rec
    if logits is not None:
        mask = mask_of(logits, args.image_size)
        s = (1 - args.alpha) * s_rec + args.alpha * scale * mask  # Eq. 10
    return s, image_score(box(s, args.pool), "max")


def normal_thresholds(args, state, scale):
    """The thresholds of --predict, {"normal_score", "pixel_threshold"}: of good images that were held
    out, else of training images, as the scoring options of this call make their scores."""
    if "normal_score" in state:
        return {name: state[name] for name in ("normal_score", "pixel_threshold")}
    scores, peaks = [], []
    for i in range(len(state["normal_errors"])):
        error, logits = state["normal_errors"][i : i + 1], None
        if args.refiner:
            logits = state["normal_logits"][i : i + 1]
        s, value = combine(error, logits, scale, args)
        scores.append(value.item())
        peaks.append(s.max().item())
    return thresholds.quantiles(scores, peaks)


class Scorer:
    """A trained model as a function (images, samples) -> (maps (B, S, S), image scores (B,)).

    The fixed prompts are encoded once. `images`, pixels of the training images, are needed for
    --prompt-test random only.
    """

    def __init__(self, args, run, features, model, state, images=None):
        self.args, self.run, self.features, self.model = args, run, features, model.eval()
        self.classes, self.scale = state["classes"], state["scale"]
        self.chosen = {}  # path of an image -> class of the most similar prompt
        prompts = run.to_device(state["prompts"])  # (classes, C, h, w)
        self.typical = typical_norm(prompts)
        self.fingerprints = fingerprint(prompts)
        self.encoded = encoded_prompts(run, model, prompts)  # (classes, N, D)
        self.images = images
        self.members = {cls: [] for cls in self.classes}  # class -> indices of its training images
        if args.prompt_test == "random" and args.prompt != "none":
            for i, sample in enumerate(images.samples):
                if sample.cls in self.members:
                    self.members[sample.cls].append(i)

    def __call__(self, images, samples):
        anomaly, scores, _ = self.described(images, samples)
        return anomaly, scores

    def described(self, images, samples):
        """The same, and the encoded tokens' average (B, D), for CADA."""
        error, logits, tokens = self.reconstruct(images, samples)
        return *combine(error, logits, self.scale, self.args), tokens.float().mean(1)

    @torch.no_grad()
    def reconstruct(self, images, samples):
        """As the function of this name: (B, 1, h, w), (B, 1, 4h, 4w), (B, N, D)."""
        x = self.features(images)
        p = self.prompts_of(x, samples)
        return reconstruct(self.run, self.model, x, p, self.typical, self.args.norm_power)

    def prompts_of(self, x, samples):
        """Encoded prompts (B, N, D) for features x (B, C, h, w); None for --prompt none."""
        if self.encoded is None:
            return None
        similar = (fingerprint(x) @ self.fingerprints.T).argmax(1).tolist()
        for sample, i in zip(samples, similar):
            self.chosen[str(sample.image)] = self.classes[i]
        rows = [self.row_of_prompt(sample, i) for sample, i in zip(samples, similar)]
        if self.args.prompt_test == "random":
            return self.random_prompts(samples, rows)
        return self.encoded[rows]

    def row_of_prompt(self, sample, similar):
        """Which class's prompt a sample gets; `similar`: the class whose prompt is most similar."""
        if self.args.prompt_of:
            return self.classes.index(self.args.prompt_of)
        row, wrong = similar, self.args.prompt_test == "wrong"
        if (self.args.prompt_class == "given" or wrong) and sample.cls in self.classes:
            row = self.classes.index(sample.cls)
        return (row + 1) % len(self.classes) if wrong else row

    def random_prompts(self, samples, rows):
        """Encoded prompts (B, N, D): a random training image of each sample's row of classes."""
        pictures, seed = [], seed_of_prompts(self.args)
        for sample, row in zip(samples, rows):
            # drawn by the image's own name: the same in any batch on any rank
            name = f"{sample.cls}/{sample.defect}/{sample.image.name}"
            rng = np.random.default_rng([seed, 5, zlib.crc32(name.encode())])
            members = self.members[self.classes[row]]
            pictures.append(self.images[int(rng.choice(members))])
        x = self.features(self.run.to_device(torch.stack(pictures)))
        return encoded_prompts(self.run, self.model, x)


def fingerprint(x):
    """Features averaged over the positions, of length 1: (B, C, h, w) -> (B, C). Their product is
    the cosine similarity that selects prompts."""
    return F.normalize(x.mean((2, 3)), dim=1)


def selection_accuracy(run, score, samples):
    """Share of scored images whose most similar prompt is of their own class; None if the model
    knows none of their classes."""
    right = []
    for sample in samples[run.rank :: run.world]:
        if sample.cls in score.classes:
            right.append(score.chosen[str(sample.image)] == sample.cls)
    right = run.gather(right)
    return sum(right) / len(right) if right else None


def scorer(args, run, features, model, state, dataset, images):
    """A `Scorer` with c by --score-scale (departure 4)."""
    score = Scorer(args, run, features, model, state, images)
    if args.score_scale == "none":
        score.scale = 1.0
    elif args.score_scale == "test":
        score.scale = scale_of_test_set(args, run, score, dataset)
    return score


def scale_of_test_set(args, run, score, dataset):
    """The authors' c: (max + min)/2 of S_rec over the whole test set (departure 4)."""
    samples = dataset.test[run.rank :: run.world]
    corrupt = report.corruption(args)
    images = report.images_of(run, args, samples, corrupt)
    batches = runtime.in_order(len(samples), args.batch_size)
    loader = run.loader(images, batches, args.workers)
    extremes = []
    for numbers, batch in zip(batches, run.progress(loader, "scale on the test set", len(batches))):
        part = [samples[i] for i in numbers]
        error, _, _ = score.reconstruct(run.to_device(batch), part)
        extremes += extremes_of(error, args)
    extremes = run.gather(extremes)
    return (max(extremes) + min(extremes)) / 2


# -------------------------------------------------------------------------------------------- main


def main():
    args = runtime.parse(Args, PRESETS, __doc__, method="onenip")
    check(args)
    run = runtime.start(args, "onenip")
    kernels.set_backend(args.kernels)
    state = run.checkpoint_to_evaluate(args)
    dataset, images = runtime.training_data(run, args)
    check_prompts(args, state, dataset)
    check_scale(args, state, dataset)
    check_thresholds(args, state)
    if state is None:
        Textures(args.textures, args.image_size)  # a folder without any is refused
        Bank.check_memory(args, run, len(images))
    features = run.rank0_first(Features, args.backbone, args.weights, args.image_size)
    run.place(features)
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    model = OneNIP(features.channels, features.side, args).to(run.device)
    if state:
        runtime.load_model(model, state["model"], args.eval)
    else:
        images.preload()
    run.open(args)
    if not state:
        state = train(args, run, features, model, images, dataset)
    elif draws_prompts(args, state):
        fixed = fixed_prompts(images.samples, args)
        state |= prompts_of_images(run, features, images, fixed)
    score = scorer(args, run, features, model, state, dataset, images)
    if args.predict:
        found = normal_thresholds(args, state, score.scale)
        normal, pixel = found["normal_score"], found["pixel_threshold"]
        columns = columns_of(args, score)
        return report.predict(run, args, score, normal, columns, pixel_threshold=pixel)
    if not dataset.test:
        state |= normal_thresholds(args, state, score.scale)
        return thresholds.without_test_images(run, args, dataset, score, state)

    def accuracy():
        if args.prompt == "none":
            return {}
        return {"prompt selection accuracy": selection_accuracy(run, score, dataset.test)}

    report.evaluate(
        run,
        args,
        dataset,
        score,
        setting=setting_of(args, features, model, state, dataset),
        seconds=state["seconds"],
        paper=papers.numbers("onenip", args, PRESETS["paper"], dataset.name, run.world),
        extra=accuracy,
        described=score.described,
    )


def check(args):
    """What single options cannot check about themselves."""
    if args.image_size % 16:
        raise UsageError(f"--image-size {args.image_size}: must be a multiple of 16")
    if args.hidden % args.heads or args.hidden % 2:
        raise UsageError(f"--hidden {args.hidden}: must be a multiple of --heads and of 2")
    if args.predict and args.score_scale == "test":
        raise UsageError("--predict has no test set: give --score-scale train (or none)")
    if args.predict and args.prompt != "none" and args.prompt_class == "given":
        raise UsageError(
            "--prompt-class given: the class of files for --predict is not known; give selected"
        )
    if args.prompt_of and (args.prompt == "none" or args.prompt_test == "wrong"):
        raise UsageError("--prompt-of cannot be combined with --prompt none or --prompt-test wrong")
    if args.predict and args.prompt != "none" and args.prompt_test != "fixed":
        raise UsageError(
            f"--prompt-test {args.prompt_test} needs training images and labels, which --predict "
            "does not have: give --prompt-test fixed"
        )


def draws_prompts(args, state):
    """Whether an evaluation takes other fixed prompts than its checkpoint's."""
    return args.prompt_seed != state["args"]["prompt_seed"]


def check_prompts(args, state, dataset):
    """Whether the checkpoint `state` (None: a training) and the data (None: --predict) have what
    the options of the prompt ask for."""
    if state and "model" not in state["finished"]:
        raise UsageError(state.unfinished("scale c"))
    new = state is None or draws_prompts(args, state)
    if new and dataset is None:
        raise UsageError("--predict has no training images: leave --prompt-seed out")
    classes = dataset.classes if new else state["classes"]  # those that have a prompt
    if args.prompt_of and args.prompt_of not in classes:
        known = ", ".join(sorted(classes))
        raise UsageError(f"--prompt-of {args.prompt_of}: no such class; known: {known}")
    if args.prompt == "none" or args.prompt_test == "fixed":
        return
    if args.prompt_test == "wrong" and len(classes) == 1:
        raise UsageError("--prompt-test wrong: there is one class only; its prompt is the right one")
    lacking = sorted(classes_of_prompts(args, classes, dataset) - set(dataset.classes))
    if args.prompt_test == "random" and lacking:
        raise UsageError(
            f"--prompt-test random: --data has no training images of {lacking[0]}, of which "
            "prompts may be drawn; give --prompt-test fixed, or --prompt-class given"
        )


def check_scale(args, state, dataset):
    """Whether there is a c (departure 4) for the errors as these options weigh them."""
    if dataset and not dataset.test and args.score_scale == "test":
        raise UsageError("--score-scale test needs test images, and --data has none: give train")
    if not state or not args.refiner or args.score_scale != "train":
        return
    trained = state["args"].get("norm_power", 0.0)  # an older run had none
    if args.norm_power != trained:
        raise UsageError(
            f"--norm-power {args.norm_power:g}: the checkpoint's scale c is of errors weighted "
            f"with {trained:g}; leave that option out, or give --score-scale test or none"
        )


def check_thresholds(args, state):
    """--predict: whether these options score files as they score the images of the threshold."""
    names = ("norm_power",)
    if state and "normal_score" in state:  # else they follow from the errors that were kept
        names += ("image_size", "alpha", "pool", "score_scale", "prompt_of")
    runtime.check_normal_score(args, state, names)


def classes_of_prompts(args, classes, dataset):
    """The classes whose prompts test images may get, of `classes`."""
    if args.prompt_of:
        return {args.prompt_of}
    if args.prompt_class == "given" and set(dataset.classes) <= set(classes):
        return set(dataset.classes)
    return set(classes)


def columns_of(args, score):
    """Of predictions.csv, besides path, score and ratio."""
    if args.prompt == "none":
        return {}

    def prompt(sample, value):
        return args.prompt_of or score.chosen[str(sample.image)]

    return {"prompt": prompt}


def name_of_prompt(args, state, dataset):
    """What the report says of the prompts at test."""
    if args.prompt == "none":
        return "none"
    if args.prompt_of:
        return f"{args.prompt}, {args.prompt_test}, of {args.prompt_of}"
    name = f"{args.prompt}, {args.prompt_test}, {args.prompt_class}"
    unknown = sorted(set(dataset.classes) - set(state["classes"]))
    if args.prompt_class == "given" and unknown:
        name += f" (selected for the classes without a prompt: {', '.join(unknown)})"
    return name


def setting_of(args, features, model, state, dataset):
    """What stands above the table."""
    return {
        "image size": args.image_size,
        "backbone": f"{args.backbone} ({features.backbone.weights_note})",
        "prompt": name_of_prompt(args, state, dataset),
        "textures": args.textures or "drawn by code",
        "weight of an error": name_of_power(args.norm_power),
        "alpha": args.alpha if args.refiner else 0.0,
        "smoothing": "none",
        "image score": f"max after {args.pool}x{args.pool} average pooling",
        "scale c": args.score_scale,
        "parameters": runtime.count_parameters(model),
        "steps": state["step"],
    }


if __name__ == "__main__":
    runtime.launch(main)
