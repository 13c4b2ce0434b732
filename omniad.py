"""Omni-AD: learning to reconstruct global and local features for multi-class anomaly detection (ICME 2025).

https://arxiv.org/abs/2503.21125 · one file: model, loss, training, scoring.

The idea. Reverse distillation: a decoder rebuilds the maps of a frozen teacher from a narrow bottleneck, and where it
fails the picture is anomalous. It must be able to rebuild every class's normal features and no others. Omni-AD builds
it of *Omni-blocks* with two branches. The global one exchanges information with a few learned tokens, which come to
hold the normal patterns; the local one, depth-wise convolutions of two sizes, keeps the fine structure.

    image (B,3,256,256) ──frozen ResNet-34──> f1 (B,64,64,64), f2 (B,128,32,32), f3 (B,256,16,16)
      neck     f1 ──/2──> + f2 ──/2──> + f3 ──3 bottleneck blocks, /2──> (B,512,8,8), jittered in training
      decoder  ──3 Omni-blocks──expand x2──9 blocks──> f̂3 ──expand x2──9 blocks──> f̂2 ──expand x2──7 blocks──> f̂1
      loss Σᵢ mean (f̂ᵢ - fᵢ)²;   map Σᵢ 1 - cos(f̂ᵢ, fᵢ), resized to 256, Gaussian σ = 4;   image score = maximum

    Omni-block, x (B,h,w,C) -> (B,h,w,C)
      global   G₁ = x  + W^O attend(64 learned queries, x), an 8x8 grid resized to hxw                             (a)
               G  = G₁ + W^O attend(G₁, 64 learned keys, values both)                                              (b)
      local    L  = 1x1 convolution of [3x3 and 5x5 depth-wise separable convolutions of x]
      output   x + Linear(SiLU(InstanceNorm(Linear(G + L))))                                                    (Eq. 5)

Commands
    python omniad.py                             embedded data, small model, about four minutes on two CPU cores:
                                                 mean I-AUROC 87.0, P-AUROC 91.2, P-AP 38.3 (untrained: 54.1, 47.0, 1.4)
    python omniad.py --data mvtec                the paper's model and schedule (500 epochs: a GPU)
    torchrun --nproc_per_node=8 omniad.py --data mvtec --batch-size 2        the same on 8 GPUs: 16 images a step
    python omniad.py --preset paper --flops      parameters and multiply-adds, part by part
    python omniad.py --eval runs/omniad-mvtec/checkpoint.pt --predict photo.png folder/
    python tests/omniad_released.py              the same training with the released code's global branch (1, 2, 3)

Where this file differs from the paper (P) or from the authors' code (C), and why
  1. Output projection W^O of the attentions: a trained matrix, as in P. C creates a two-layer net with new random
     weights inside every forward pass: never trained, and two evaluations of one checkpoint differ.
  2. Tokens start as normal noise (--token-std 1). In C they start at zero; then all 64 key/value tokens get the same
     gradient for ever, every position reads the same vector, InstanceNorm removes it, and attention (b) is dead. The
     usual 0.02 is as bad: (b) is then the same everywhere but for 1e-6, and its gradients drown in AdamW's eps.
  3. C also adds a learned bias after the softmax, and x once more after (b). P has neither, nor does this file.
     Counts: C's model without output nets has 29,926,912 parameters (P: 29.9 M). Minus 28,672 for these biases, plus
     3,115,648 for W^O, ours has 33,013,888.
  4. InstanceNorm (without parameters) and SiLU inside the block, nearest upsampling of the tokens (--upsample) and the
     jitter of the bottleneck (--jitter) come from C.
  5. Teacher maps: layers 1 to 3, as in C; P says "the last three stages".
  6. 500 epochs (P). C: 1,000 for MVTec AD and VisA, 100 for Real-IAD (--epochs).
  7. C divides the map by 9, a constant; here it is the plain sum.
  8. Image labels from the folder; the last checkpoint is the result (C also prints each metric's best over all tests).
     P-F1max and P-AUPRO are exact; the paper's come from 21 and 100 thresholds.
  9. --standardize (not in P or C, off by default) measures every teacher map in units of its standard deviation over
     64 training images, so that the three weigh alike in the loss. ResNet maps are far apart there (ResNet-18: 0.39,
     0.27, 0.21), and in a short training f3, which tells most about an image, is hardly learned.
 10. Other encoders (Table VII): neck and decoder widths follow the encoder's channels. For ResNet-18 this is P's; P's
     468 M with ResNet-50 needs a wider model that was never released.

Paper, MVTec AD, 256 px: I-AUROC 99.0, I-AP 99.7, P-AUROC 97.9, P-AP 56.8, P-AUPRO 93.4.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from common import UsageError, backbones, data, report, runtime
from common.runtime import Stream, option

# ------------------------------------------------------------------------------------------------------- options


@dataclass
class Args(runtime.Options):
    # InstanceNorm needs more than one position, so the deepest map must be 2x2 at least: 64 px.
    image_size: int = option(256, "images are resized to this square; a multiple of 32, at least 64", group="data",
                             low=64)
    backbone: str = option("resnet34", "frozen teacher (Table VII); the widths of the model follow its channels",
                           group="model", choices=backbones.NAMES)
    weights: str = option("", "file of the backbone's weights, or 'random' (default: the official ones)", group="model")
    depths: str = option("3,9,9,7", "Omni-blocks of the four decoder stages (Table VI)", group="model")
    tokens: int = option(64, "learned queries, and learned keys/values; a square number (Table IV)", group="model",
                         low=1)
    token_std: float = option(1.0, "standard deviation of the tokens at the start (with 0.02 attention (b) stays dead)",
                              group="model", low=0.0)
    heads: int = option(8, "attention heads; must divide the widths of all four stages", group="model", low=1)
    epochs: float = option(500, "passes over the training images; 0 (and --steps 0): untrained", group="training",
                           low=0)
    steps: int = option(0, "training steps, in place of --epochs when above 0", group="training", low=0)
    batch_size: int = option(16, "training images a step and process", group="training", low=1)
    lr: float = option(1e-3, "AdamW's learning rate", group="training", low=0.0)
    schedule: str = option("step", "learning rate: x 0.1 after 80 % of the steps, or one cosine after a warm-up of 5 %",
                           group="training", choices=("step", "cosine"))
    weight_decay: float = option(1e-4, "AdamW's weight decay, except of biases and norms", group="training", low=0.0)
    clip: float = option(5.0, "largest norm of the gradient", group="training", low=0.0)
    jitter: float = option(20.0, "scale of the noise on the bottleneck in training", group="training", low=0.0)
    standardize: bool = option(False, "all three teacher maps weigh alike in the loss, whatever their magnitudes",
                               group="training")
    sigma: float = option(4.0, "Gaussian smoothing of the map, in pixels; 0: none", group="scoring", low=0.0)
    score: str = option("max", "image score: the map's maximum, or the mean of its highest 1 %", group="scoring",
                        choices=("max", "top1"))
    learnable: str = option("q+kv", "which sides are learned tokens; the others come from the map itself, so that none "
                                    "means plain self-attention twice (Table II)", group="ablations",
                            choices=("q+kv", "q", "kv", "none"))
    order: str = option("q+kv", "what is learned in the first and in the second attention (Table III)",
                        group="ablations", choices=("q+kv", "q+q", "kv+kv", "kv+q"))
    branches: str = option("both", "branches of the Omni-block (Table V)", group="ablations",
                           choices=("both", "global", "local"))
    upsample: str = option("nearest", "how answers to the learned queries are resized to the map", group="ablations",
                           choices=("nearest", "bilinear"))
    flops: bool = option(False, "print parameters and multiply-adds of every part, and stop")


PRESETS = {
    "paper": {},
    # For two CPU cores: a smaller teacher (the model's widths follow), picture and depth, and many small steps.
    "laptop": dict(image_size=192, backbone="efficientnet_lite0", depths="2,2,1,1", epochs=17, batch_size=4, lr=2e-3,
                   schedule="cosine", amp="auto"),
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


def widths(channels):
    """Of the four decoder stages: the bottleneck's, then those of f3, f2, f1. ResNet-34: 512, 256, 128, 64."""
    return [2 * channels[2], *reversed(channels)]


class Neck(nn.Module):
    """f1, f2, f3 -> one bottleneck map (B, 2 C3, h3/2, w3/2): each level is shrunk onto the next one and added."""

    def __init__(self, channels):
        super().__init__()
        c1, c2, c3 = channels
        shrink = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        point = lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU())
        self.shrink1, self.shrink2 = shrink(c1, c2), shrink(c2, c3)
        self.point2, self.point3, self.point = point(c2), point(c3), point(c3)
        # ResNet's bottleneck block: inner width c3/2, output four times that
        self.blocks = nn.Sequential(*(backbones.Bottleneck(c, c3 // 2, stride, widen=1)
                                      for c, stride in ((c3, 2), (2 * c3, 1), (2 * c3, 1))))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, f1, f2, f3):
        y = self.shrink1(f1) + self.point2(f2)  # (B, C2, h2, w2)
        y = self.shrink2(y) + self.point3(f3)  # (B, C3, h3, w3)
        return self.blocks(self.point(y))


class TokenAttention(nn.Module):
    """Multi-head attention of which one side is learned tokens. (B, h, w, C) -> (B, h, w, C).

    kind "q": a square grid of learned queries reads the map, and what they read is laid out over the map (a).
    "kv": every position reads the learned tokens, which are keys and values both (b).
    "self": nothing is learned; every position reads the map (Table II). Its cost is quadratic in h w, not linear.
    """

    def __init__(self, kind, width, args):
        super().__init__()
        self.kind, self.heads, self.upsample = kind, args.heads, args.upsample
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        if kind != "self":
            self.tokens = nn.Parameter(torch.randn(args.tokens, width) * args.token_std)

    def forward(self, x):
        h, w = x.shape[1:3]
        rows = x.flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
        query = self.tokens[None] if self.kind == "q" else rows
        memory = self.tokens[None] if self.kind == "kv" else rows  # (1, T, C): shared by all images
        q, k, v = (linear(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, C/heads)
                   for linear, t in ((self.to_q, query), (self.to_k, memory), (self.to_v, memory)))
        out = self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))  # (B, heads, N, C/heads) -> (B, N, C)
        if self.kind != "q":
            return out.unflatten(1, (h, w))  # (B, h w, C) -> (B, h, w, C)
        side = math.isqrt(out.shape[1])
        grid = out.transpose(1, 2).unflatten(2, (side, side))  # (B, T, C) -> (B, C, √T, √T)
        return F.interpolate(grid, (h, w), mode=self.upsample).permute(0, 2, 3, 1)  # -> (B, h, w, C)

    def attend(self, q, k, v):  # a method of its own, to which the released code's behaviour adds a bias
        return kernels.cross_attention(q, k, v)


def separable(width, size):
    """Depth-wise convolution, then 1x1, each with InstanceNorm and SiLU."""
    return nn.Sequential(nn.Conv2d(width, width, size, padding=size // 2, groups=width), nn.InstanceNorm2d(width),
                         nn.SiLU(), nn.Conv2d(width, width, 1), nn.InstanceNorm2d(width), nn.SiLU())


class OmniBlock(nn.Module):
    """Global branch + local branch, mixed, around a residual: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, width, args):
        super().__init__()
        self.branches = {"both": ("global", "local")}.get(args.branches, (args.branches,))
        if "global" in self.branches:
            self.first, self.second = (
                TokenAttention(kind if kind in args.learnable.split("+") else "self", width, args)
                for kind in args.order.split("+"))
        if "local" in self.branches:
            self.local3, self.local5 = separable(width, 3), separable(width, 5)
            self.merge = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.InstanceNorm2d(width), nn.SiLU())
        self.mix_in, self.mix_out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.InstanceNorm2d(width)

    def global_branch(self, x):
        g = x + self.first(x)  # (a)
        return g + self.second(g)  # (b)

    def local_branch(self, x):
        x = x.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return self.merge(torch.cat([self.local3(x), self.local5(x)], dim=1)).permute(0, 2, 3, 1)  # -> (B, h, w, C)

    def forward(self, x):
        y = sum(getattr(self, f"{name}_branch")(x) for name in self.branches)
        mixed = self.norm(self.mix_in(y).permute(0, 3, 1, 2))  # (B, h, w, C) -> (B, C, h, w)
        return x + self.mix_out(F.silu(mixed).permute(0, 2, 3, 1))  # (B, C, h, w) -> (B, h, w, C)


class Expand(nn.Module):
    """Twice the size: (B, h, w, C) -> (B, 2h, 2w, C'). C' = C/2 in ResNets, so the linear map is C -> 2C there."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear, self.norm = nn.Linear(c_in, 4 * c_out, bias=False), nn.LayerNorm(c_out)

    def forward(self, x):
        y = self.linear(x).unflatten(3, (2, 2, -1))  # (B, h, w, 4C') -> (B, h, w, 2, 2, C')
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # -> (B, h, 2, w, 2, C') -> (B, 2h, 2w, C')
        return self.norm(y)


class OmniAD(nn.Module):
    """The trainable part: the teacher's f1, f2, f3 (B, C, h, w) -> their reconstructions, of the same shapes."""

    def __init__(self, channels, args):
        super().__init__()
        self.jitter, stages = args.jitter, widths(channels)
        self.neck = Neck(channels)
        self.stages = nn.ModuleList(nn.Sequential(*(OmniBlock(width, args) for _ in range(int(depth))))
                                    for width, depth in zip(stages, args.depths.split(",")))
        self.expands = nn.ModuleList(Expand(a, b) for a, b in zip(stages, stages[1:]))
        self.register_buffer("scale", torch.ones(3))  # of f1, f2, f3; set by --standardize
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps):
        x = self.neck(*maps).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        if self.training and self.jitter > 0:  # every token gets noise of --jitter/C times its norm
            sigma = x.norm(dim=3, keepdim=True) * (self.jitter / x.shape[3])
            x = x + torch.randn_like(x) * sigma
        x, rebuilt = self.stages[0](x), []
        for expand, stage, scale in zip(self.expands, self.stages[1:], self.scale.flip(0)):
            x = stage(expand(x))
            rebuilt.append(x.permute(0, 3, 1, 2) * scale)  # (B, h, w, C) -> (B, C, h, w)
        return rebuilt[::-1]  # f̂1, f̂2, f̂3


# ---------------------------------------------------------------------------------------------------------- loss


def losses(model, maps, scale=(1, 1, 1)):
    """Mean squared error of every map, in units of `scale`. Returns their sum and the parts {"f1", "f2", "f3"}."""
    parts = {f"f{i}": F.mse_loss(rebuilt.float(), f) / unit ** 2
             for i, (rebuilt, f, unit) in enumerate(zip(model(maps), maps, scale), 1)}
    return sum(parts.values()), parts


@torch.no_grad()
def deviations(maps):
    """[(B, C, h, w)] -> standard deviation of each map about the means of its channels, (len(maps),)."""
    return torch.stack([f.var((0, 2, 3), correction=0).mean().sqrt() for f in maps])


# ------------------------------------------------------------------------------------------------------ training


def train(args, run, features, images):
    """The flat training loop. Returns the finished checkpoint state."""
    before = run.checkpoint(args)
    if before and "normal_score" in before:  # training was over, only the evaluation is missing
        return before
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    model = OmniAD(features.channels, args).to(run.device)
    model, wrapped = run.wrap(model)
    flat = lambda name, p: p.ndim == 1 or name.endswith("bias")
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in model.named_parameters() if not flat(n, p)], "weight_decay": args.weight_decay},
        {"params": [p for n, p in model.named_parameters() if flat(n, p)], "weight_decay": 0.0}], lr=args.lr)
    cache = runtime.precompute(run, features, images, args.batch_size, args.memory_share)
    images_per_step = args.batch_size * run.world
    dataset = Stream(images, args.seed, images_per_step, whole_images=cache is None)
    steps = args.steps or math.ceil(args.epochs * dataset.per_epoch / images_per_step)

    if args.standardize and before is None:  # a checkpoint brings its own
        sample = torch.stack([images[i] for i in runtime.epoch_order(args.seed, 0, len(images))[:64]])
        model.scale.copy_(deviations(features.split(features(run.to_device(sample)))))
    first, seconds = run.restore(before, model, optimizer)
    clock = runtime.Stopwatch(seconds)

    def state(**more):
        return {"method": run.method, "args": runtime.as_dict(args), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": clock(), **more}

    bad = torch.zeros((), dtype=torch.int32, device=run.device)
    step = first - 1
    loader = run.loader(dataset, run.positions(first, steps, args.batch_size), args.workers)
    wrapped.train()
    for step, batch in enumerate(run.progress(loader, "training", steps, first), first):
        run.seed(args.seed, 4, step)  # jitter
        rows = run.to_device(cache[batch["index"]]) if cache is not None else features(run.to_device(batch["image"]))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * runtime.lr_factor(step, steps, args.schedule)
        with run.autocast():
            loss, parts = losses(wrapped, features.split(rows), model.scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

        bad |= ~torch.isfinite(loss.detach())
        run.keep(args, step + 1, steps, bad, lambda: {
            **run.mean({"loss": loss, **parts}), "lr": optimizer.param_groups[0]["lr"],
            "images_per_s": round((step + 1) * images_per_step / clock(), 1)}, state)
    score = Scorer(args, run, features, model)
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
    """A trained model as a function (images, samples) -> (maps (B, S, S), image scores (B,))."""

    def __init__(self, args, run, features, model):
        self.args, self.run, self.features, self.model = args, run, features, model.eval()

    @torch.no_grad()
    def __call__(self, images, samples):
        maps, size = self.features.split(self.features(images)), self.args.image_size
        with self.run.autocast():
            rebuilt = self.model(maps)
        s = kernels.cosine_map(maps, [r.float() for r in rebuilt], size, reduce="sum")
        if self.args.sigma > 0:
            smooth = gaussian(size, self.args.sigma, s.device)
            s = smooth @ s @ smooth.T
        flat = s.flatten(1)  # (B, S, S) -> (B, S²)
        return s, flat.amax(1) if self.args.score == "max" else flat.topk(flat.shape[1] // 100, dim=1).values.mean(1)

    @torch.no_grad()
    def pooled(self, images):
        """The bottleneck averaged over its positions, (B, 3, S, S) -> (B, 2 C3): --save-maps keeps it for CADA."""
        with self.run.autocast():
            return self.model.neck(*self.features.split(self.features(images))).mean((2, 3))


# ---------------------------------------------------------------------------------------------------------- main


def main(method="omniad"):
    args = runtime.parse(Args, PRESETS, __doc__)
    depths = args.depths.split(",")
    if args.image_size % 32:
        raise UsageError(f"--image-size {args.image_size}: must be a multiple of 32: the bottleneck is 1/32 of it")
    if math.isqrt(args.tokens) ** 2 != args.tokens:
        raise UsageError(f"--tokens {args.tokens}: must be a square number, since they are laid out as a square grid")
    if len(depths) != 4 or not all(depth.isdecimal() and int(depth) for depth in depths):
        raise UsageError(f"--depths {args.depths}: must be four numbers above 0, such as 3,9,9,7")
    if args.flops:
        return costs(args)
    run = runtime.start(args, method)
    kernels.set_backend(args.kernels)
    state = runtime.load_checkpoint(args.eval, method) if args.eval else None
    dataset = images = None
    if not args.predict:
        dataset = run.in_turn(lambda: data.load(args.data, args.data_root or None,
                                                [c for c in args.classes.split(",") if c] or None))
        images = data.Images(dataset.train, args.image_size, memory_share=args.memory_share)
    features = run.in_turn(lambda: Features(args.backbone, args.weights, args.image_size)).to(run.device)
    check_heads(features.channels, args)
    if images and state is None:
        images.preload()
    run.open(args)
    if state is None:
        state = train(args, run, features, images)
    model = OmniAD(features.channels, args).to(run.device)
    runtime.load_model(model, state["model"], args.eval or run.out / "checkpoint.pt")
    score = Scorer(args, run, features, model)

    if args.predict:
        return report.predict(run, args, score, {
            "ratio": lambda sample, value: value / state["normal_score"]})  # above 1: above 99 % of the training images
    setting = {
        "image size": args.image_size, "backbone": f"{args.backbone} ({features.backbone.weights_note})",
        "depths": args.depths, "tokens": args.tokens, "learnable": args.learnable, "order": args.order,
        "branches": args.branches, "smoothing": f"Gaussian, sigma {args.sigma:g}" if args.sigma else "none",
        "image score": "max" if args.score == "max" else "mean of the highest 1 %",
        "parameters": sum(p.numel() for p in model.parameters()), "steps": state["step"]}
    report.evaluate(run, args, dataset, score, setting=setting, seconds=state["seconds"],
                    paper=paper_numbers(dataset, args), pooled=score.pooled)


def check_heads(channels, args):
    if any(width % args.heads for width in widths(channels)):
        raise UsageError(f"--heads {args.heads}: must divide the widths of all stages, which {args.backbone} makes "
                         f"{', '.join(map(str, widths(channels)))}")


def costs(args):
    """--flops: parameters, and multiply-adds of one image, part by part (Tables IV, VI and VII). Convolutions, linear
    maps and attention count; norms and activations do not."""
    frozen = teacher(args.backbone, "random")
    check_heads(frozen.channels, args)
    model, spent = OmniAD(frozen.channels, args).eval(), {}

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            spent[module] = output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            spent[module] = output.numel() * module.in_features
        elif isinstance(module, TokenAttention):
            positions, width = output[0, ..., 0].numel(), output.shape[3]
            spent[module] = 2 * positions * (positions if module.kind == "self" else args.tokens) * width  # QKᵀ and PV

    for module in [*frozen.modules(), *model.modules()]:
        module.register_forward_hook(count)
    with torch.no_grad():
        model(frozen(torch.zeros(1, 3, args.image_size, args.image_size)))
    attentions = nn.ModuleList(m for m in model.modules() if isinstance(m, TokenAttention))
    parts = {f"teacher, {args.backbone}": frozen, "neck": model.neck,
             **{f"decoder stage {i}": stage for i, stage in enumerate(model.stages, 1)}, "expansions": model.expands}
    rows = [*parts.items(), ("of these, attention", attentions), ("total", nn.ModuleList(parts.values()))]
    print(f"{'':<28}{'parameters':>14}{'multiply-adds':>20}")
    for name, part in rows:
        print(f"{name:<28}{sum(p.numel() for p in part.parameters()):>14,}"
              f"{sum(spent.get(m, 0) for m in part.modules()):>20,}")


PAPER_MEANS = {  # Table I, 256 px, per cent: I-AUROC, I-AP, I-F1max, P-AUROC, P-AP, P-F1max, P-AUPRO, mAD
    "mvtec": (99.0, 99.7, 98.3, 97.9, 56.8, 59.9, 93.4, 86.4),
    "visa": (94.6, 95.0, 90.3, 98.8, 38.7, 43.3, 91.9, 78.9),
    "realiad": (88.2, 86.5, 79.1, 98.8, 34.3, 39.7, 91.6, 74.0),
}


def paper_numbers(dataset, args):
    """What the paper reports for this data (None where it reports nothing, or not for these classes or this size)."""
    if dataset.name not in PAPER_MEANS or args.image_size != 256 or args.classes or args.corrupt:
        return None
    return {"source": "Omni-AD (ICME 2025), Table I; P-F1max and P-AUPRO from a few thresholds",
            "mean": {name: value / 100 for name, value in zip(report.COLUMNS, PAPER_MEANS[dataset.name])}}


if __name__ == "__main__":
    runtime.launch(main)
