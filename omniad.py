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
    python omniad.py                             embedded data, small model, about seven minutes on one core:
                                                 mean I-AUROC 87.5, P-AUROC 93.1, P-AP 39.6 (three seeds, README)
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
     Parameters, the teacher's 8,170,304 included: C's model without output nets has 29,926,912 (P: 29.9 M). Minus
     28,672 for these biases, plus 3,115,648 for W^O, ours has 33,013,888; the report's "parameters" are the 24,843,584
     that are trained.
  4. From C come InstanceNorm (without parameters) and SiLU inside the block, nearest upsampling of the tokens
     (--upsample), the jitter of the bottleneck (--jitter), its three blocks, and of the training the learning rate and
     its drop at 80 % of the steps, weight decay, batch and clipping.
  5. Teacher maps: layers 1 to 3, as in C; P says "the last three stages".
  6. 500 epochs (P). C: 1,000 for MVTec AD and VisA, 100 for Real-IAD (--epochs).
  7. C divides the map by 9, a constant; here it is the plain sum.
  8. Image labels from the folder; the last checkpoint is the result (C also prints each metric's best over all tests).
     P-F1max and P-AUPRO are exact; the paper's come from 21 and 100 thresholds.
  9. --standardize (not in P or C, off by default) measures every teacher map in units of its standard deviation over
     64 training images, so that the three weigh alike in the loss. ResNet maps are far apart there (ResNet-18: 0.39,
     0.27, 0.21), and in a short training f3, which tells most about an image, is hardly learned.
 10. --norm-power p (not in P or C, off in the paper's preset) weighs a distance of the map by the root mean square of
     the teacher's channels there, to the power p. On a plain background these are small and their direction is mostly
     noise, which no decoder rebuilds: without a weight it outshines the object.
 11. Other encoders (Table VII): neck and decoder widths follow the encoder's channels. For ResNet-18 this is P's; P's
     468 M with ResNet-50 needs a wider model that was never released.

Paper, MVTec AD, 256 px: I-AUROC 99.0, I-AP 99.7, P-AUROC 97.9, P-AP 56.8, P-AUPRO 93.4.
"""

import math
from dataclasses import dataclass

from common.options import BACKBONES, Options, before_torch, option

# ----------------------------------------------------------------------------------------- options


@dataclass
class Args(Options):
    # InstanceNorm needs more than one position, so the deepest map must be 2x2 at least: 64 px.
    image_size: int = option(
        256,
        "images are resized to this square; a multiple of 32, at least 64",
        group="data",
        low=64,
    )
    backbone: str = option(
        "resnet34",
        "frozen teacher (Table VII); the widths of the model follow its channels",
        group="model",
        choices=BACKBONES,
    )
    weights: str = option(
        "",
        "file of the backbone's weights, or 'random' (default: the official ones)",
        group="model",
    )
    depths: str = option(
        "3,9,9,7", "Omni-blocks of the four decoder stages (Table VI)", group="model"
    )
    tokens: int = option(
        64,
        "learned queries, and learned keys/values; a square number (Table IV)",
        group="model",
        low=1,
    )
    token_std: float = option(
        1.0,
        "standard deviation of the tokens at the start (with 0.02 attention (b) stays dead)",
        group="model",
        low=0.0,
    )
    heads: int = option(
        8, "attention heads; must divide the widths of all four stages", group="model", low=1
    )
    epochs: float = option(
        500,
        "passes over the training images; 0 (and --steps 0): untrained",
        group="training",
        low=0,
    )
    steps: int = option(
        0, "training steps, in place of --epochs when above 0", group="training", low=0
    )
    batch_size: int = option(16, "training images a step and process", group="training", low=1)
    lr: float = option(1e-3, "AdamW's learning rate", group="training", low=0.0)
    schedule: str = option(
        "step",
        "learning rate: x 0.1 after 80 % of the steps, or one cosine after a warm-up of 5 %",
        group="training",
        choices=("step", "cosine"),
    )
    weight_decay: float = option(
        1e-4, "AdamW's weight decay, except of biases and norms", group="training", low=0.0
    )
    clip: float = option(
        5.0, "largest norm of the gradient; 0: no limit", group="training", low=0.0
    )
    jitter: float = option(
        20.0, "scale of the noise on the bottleneck in training", group="training", low=0.0
    )
    standardize: bool = option(
        False,
        "all three teacher maps weigh alike in the loss, whatever their magnitudes",
        group="training",
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
    score: str = option(
        "max",
        "image score: the map's maximum, or the mean of its highest 1 %",
        group="scoring",
        choices=("max", "top1"),
    )
    learnable: str = option(
        "q+kv",
        "which sides are learned tokens; the others come from the map itself, so that none means "
        "plain self-attention twice (Table II)",
        group="ablations",
        choices=("q+kv", "q", "kv", "none"),
    )
    order: str = option(
        "q+kv",
        "what is learned in the first and in the second attention (Table III)",
        group="ablations",
        choices=("q+kv", "q+q", "kv+kv", "kv+q"),
    )
    branches: str = option(
        "both",
        "branches of the Omni-block (Table V)",
        group="ablations",
        choices=("both", "global", "local"),
    )
    upsample: str = option(
        "nearest",
        "how answers to the learned queries are resized to the map",
        group="ablations",
        choices=("nearest", "bilinear"),
    )
    flops: bool = option(False, "print parameters and multiply-adds of every part, and stop")


PRESETS = {
    "paper": {},
    # For two CPU cores: a smaller teacher (the model's widths follow), picture and depth, and many
    # small steps.
    "laptop": dict(
        image_size=192,
        backbone="efficientnet_lite0",
        depths="2,2,1,1",
        epochs=17,
        batch_size=4,
        lr=2e-3,
        schedule="cosine",
        norm_power=0.25,
        amp="auto",
    ),
}

if __name__ == "__main__":
    before_torch(Args, PRESETS, __doc__)

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from common import UsageError, backbones, options, papers, report, runtime, thresholds
from common.maps import gaussian, image_score, name_of_power, name_of_rule, name_of_sigma

# ------------------------------------------------------------------------------------------- model


def widths(channels):
    """Of the four decoder stages: the bottleneck's, then those of f3, f2, f1.

    ResNet-34: 512, 256, 128, 64.
    """
    return [2 * channels[2], *reversed(channels)]


def convolution(c_in, c_out, size, stride=1):
    """Convolution, batch norm, ReLU. A bias only where the authors' code has one: with 1x1."""
    layer = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=size == 1)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())


class Neck(nn.Module):
    """f1, f2, f3 -> one bottleneck map (B, 2 C3, h3/2, w3/2): each level is shrunk onto the next one
    and added (Fig. 2)."""

    def __init__(self, channels):
        super().__init__()
        c1, c2, c3 = channels
        self.shrink1 = convolution(c1, c2, 3, stride=2)
        self.shrink2 = convolution(c2, c3, 3, stride=2)
        self.point2 = convolution(c2, c2, 1)
        self.point3 = convolution(c3, c3, 1)
        self.point = convolution(c3, c3, 1)
        # ResNet's bottleneck block: inner width c3/2, output four times that
        self.blocks = nn.Sequential(
            backbones.Bottleneck(c3, c3 // 2, stride=2, widen=1),
            backbones.Bottleneck(2 * c3, c3 // 2, stride=1, widen=1),
            backbones.Bottleneck(2 * c3, c3 // 2, stride=1, widen=1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, f1, f2, f3):
        y = self.shrink1(f1) + self.point2(f2)  # (B, C2, h2, w2)
        y = self.shrink2(y) + self.point3(f3)  # (B, C3, h3, w3)
        return self.blocks(self.point(y))


class TokenAttention(nn.Module):
    """Multi-head attention of which one side is learned tokens. (B, h, w, C) -> (B, h, w, C).

    kind "q": a square grid of learned queries reads the map, and what they read is laid out over
    the map (a). "kv": every position reads the learned tokens, which are keys and values both (b).
    "self": nothing is learned; every position reads the map (Table II). Its cost is quadratic in
    h w, not linear.
    """

    def __init__(self, kind, width, args):
        super().__init__()
        self.kind, self.heads, self.upsample = kind, args.heads, args.upsample
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        if kind != "self":
            self.tokens = nn.Parameter(torch.randn(args.tokens, width) * args.token_std)

    def forward(self, x):
        h, w = x.shape[1:3]
        positions = x.flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
        queries = self.tokens[None] if self.kind == "q" else positions
        memory = self.tokens[None] if self.kind == "kv" else positions  # (1, T, C): for all images
        q = self.split_heads(self.to_q(queries))
        k = self.split_heads(self.to_k(memory))
        v = self.split_heads(self.to_v(memory))
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)  # (B, heads, N, C/heads) -> (B, N, C)
        out = self.to_out(out)  # W^O
        if self.kind != "q":
            return out.unflatten(1, (h, w))  # (B, h w, C) -> (B, h, w, C)
        side = math.isqrt(out.shape[1])
        grid = out.transpose(1, 2).unflatten(2, (side, side))  # (B, T, C) -> (B, C, √T, √T)
        return F.interpolate(grid, (h, w), mode=self.upsample).permute(0, 2, 3, 1)  # (B, h, w, C)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,N,C) -> (B,heads,N,C/heads)

    def attend(self, q, k, v):  # a method of its own, to which the released code adds a bias
        return kernels.cross_attention(q, k, v)  # softmax(Q Kᵀ/√d) V: Eq. 1 ("q"), Eq. 3 ("kv")


def separable(width, size):
    """Depth-wise convolution, then 1x1, each with InstanceNorm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(width, width, size, padding=size // 2, groups=width),
        nn.InstanceNorm2d(width),
        nn.SiLU(),
        nn.Conv2d(width, width, 1),
        nn.InstanceNorm2d(width),
        nn.SiLU(),
    )


class OmniBlock(nn.Module):
    """Global branch + local branch, mixed, around a residual (Fig. 3): (B, h, w, C) -> the same."""

    def __init__(self, width, args):
        super().__init__()
        self.branches = args.branches
        if self.branches != "local":
            first, second = args.order.split("+")
            self.first = TokenAttention(self.kind(first, args), width, args)
            self.second = TokenAttention(self.kind(second, args), width, args)
        if self.branches != "global":
            self.local3 = separable(width, 3)
            self.local5 = separable(width, 5)
            self.merge = nn.Sequential(
                nn.Conv2d(2 * width, width, 1), nn.InstanceNorm2d(width), nn.SiLU()
            )
        self.mix_in = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, width)
        self.norm = nn.InstanceNorm2d(width)

    @staticmethod
    def kind(side, args):
        """Of the attention that learns `side`: plain self-attention if that side is not learned."""
        return side if side in args.learnable.split("+") else "self"

    def global_branch(self, x):
        g = x + self.first(x)  # (a), Eqs. 1 and 2
        return g + self.second(g)  # (b), Eqs. 3 and 4

    def local_branch(self, x):
        x = x.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        both = torch.cat([self.local3(x), self.local5(x)], dim=1)  # (B, 2C, h, w)
        return self.merge(both).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)

    def forward(self, x):
        if self.branches == "both":
            y = self.global_branch(x) + self.local_branch(x)  # Eq. 5
        elif self.branches == "global":
            y = self.global_branch(x)
        else:
            y = self.local_branch(x)
        y = self.mix_in(y).permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        y = F.silu(self.norm(y)).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        return x + self.mix_out(y)


class Expand(nn.Module):
    """Twice the size: (B, h, w, C) -> (B, 2h, 2w, C').

    C' = C/2 in ResNets, so the linear map is C -> 2C there.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear = nn.Linear(c_in, 4 * c_out, bias=False)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x):
        y = self.linear(x).unflatten(3, (2, 2, -1))  # (B, h, w, 4C') -> (B, h, w, 2, 2, C')
        y = y.transpose(2, 3)  # -> (B, h, 2, w, 2, C')
        y = y.flatten(3, 4).flatten(1, 2)  # -> (B, 2h, 2w, C')
        return self.norm(y)


class OmniAD(nn.Module):
    """The trainable part (Fig. 2): f1, f2, f3 (B, C, h, w) -> reconstructions of these shapes."""

    def __init__(self, channels, args):
        super().__init__()
        self.jitter = args.jitter
        self.neck = Neck(channels)
        self.stages = nn.ModuleList()
        for width, depth in zip(widths(channels), args.depths.split(",")):
            blocks = [OmniBlock(width, args) for _ in range(int(depth))]
            self.stages.append(nn.Sequential(*blocks))
        self.expands = nn.ModuleList()
        for c_in, c_out in zip(widths(channels), widths(channels)[1:]):
            self.expands.append(Expand(c_in, c_out))
        self.register_buffer("scale", torch.ones(3))  # of f1, f2, f3; set by --standardize
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps):
        return self.decode(self.neck(*maps))

    def decode(self, phi):
        """The bottleneck map φ (B, 2 C3, h3/2, w3/2) -> f̂1, f̂2, f̂3."""
        x = phi.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        if self.training and self.jitter > 0:  # every token gets noise of --jitter/C times its norm
            sigma = x.norm(dim=3, keepdim=True) * (self.jitter / x.shape[3])
            x = x + torch.randn_like(x) * sigma
        x = self.stages[0](x)
        rebuilt = []  # f̂3, f̂2, f̂1
        for i in (1, 2, 3):
            x = self.stages[i](self.expands[i - 1](x))
            f = x.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
            rebuilt.append(f * self.scale[3 - i])
        return rebuilt[::-1]


# -------------------------------------------------------------------------------------------- loss


def losses(model, maps, scale, args):
    """Mean squared error of every map (Eq. 6); with --standardize in units of `scale` (3,).

    maps: the teacher's f1, f2, f3, each (B, C, h, w). Returns the sum and {"f1", "f2", "f3"}.
    """
    parts = {}
    for i, (rebuilt, f) in enumerate(zip(model(maps), maps)):
        parts[f"f{i + 1}"] = F.mse_loss(rebuilt.float(), f)  # Eq. 6, one scale
        if args.standardize:
            parts[f"f{i + 1}"] = parts[f"f{i + 1}"] / scale[i] ** 2
    return sum(parts.values()), parts  # Eq. 6


@torch.no_grad()
def deviations(maps):
    """Standard deviation of each map about the means of its channels: 3 x (B, C, h, w) -> (3,)."""
    variances = [f.var((0, 2, 3), correction=0).mean() for f in maps]
    return torch.stack(variances).sqrt()


# ---------------------------------------------------------------------------------------- training


def optimizer_of(model, args):
    """AdamW, without decay of biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=args.lr,
        fused=True,
    )


def train(args, run, features, model, images):
    """The flat training loop: trains `model` in place. Returns the finished checkpoint state."""
    model, parallel = run.wrap(model)
    optimizer = optimizer_of(model, args)
    job = runtime.Training(run, args, model, optimizer)
    if job.finished:  # only the evaluation is missing
        return job.resumed
    frozen = runtime.Frozen(run, features, images, args)
    images_per_step = args.batch_size * run.world
    stream = runtime.Stream(images, args.seed, images_per_step, frozen.needs_images)
    steps = args.steps or stream.steps(args.epochs)
    if args.standardize and not job.resumed:  # a checkpoint brings its own
        model.scale.copy_(deviations(frozen(stream.first(64))))

    parallel.train()
    for step, batch in job.batches(stream, steps):
        run.seed(args.seed, 4, step)  # jitter
        job.set_rate(step)
        maps = frozen(batch)  # f1, f2, f3: (B, C, h, w)
        with run.autocast():
            loss, parts = losses(parallel, maps, model.scale, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip, foreach=True)
        optimizer.step()
        job.record(loss, parts)
    score = Scorer(args, run, features, model)
    return job.finish(**thresholds.of_training_images(run, args, score, images.samples, images))


# ----------------------------------------------------------------------------------------- scoring


class Scorer:
    """A trained model as a function (images, samples) -> (maps (B, S, S), image scores (B,))."""

    def __init__(self, args, run, features, model):
        self.args, self.run, self.features, self.model = args, run, features, model.eval()

    def __call__(self, images, samples):
        anomaly, scores, _ = self.described(images, samples)
        return anomaly, scores

    @torch.no_grad()
    def described(self, images, samples):
        """The same, and the bottleneck averaged over its positions, (B, 2 C3), for CADA."""
        maps = self.features.maps(images)
        with self.run.autocast():
            phi = self.model.neck(*maps)
            rebuilt = self.model.decode(phi)
        anomaly = kernels.cosine_map(
            maps, rebuilt, self.args.image_size, power=self.args.norm_power
        )
        anomaly = gaussian(anomaly, self.args.sigma)
        return anomaly, image_score(anomaly, self.args.score), phi.float().mean((2, 3))


# -------------------------------------------------------------------------------------------- main


def main(method="omniad"):
    args = runtime.parse(Args, PRESETS, __doc__, method=method)
    check(args)
    if args.flops:
        return costs(args)
    run = runtime.start(args, method)
    kernels.set_backend(args.kernels)
    state = run.checkpoint_to_evaluate(args)
    runtime.check_normal_score(args, state, ("image_size", "norm_power", "sigma", "score"))
    dataset, images = runtime.training_data(run, args)
    features = run.rank0_first(backbones.Pyramid, args.backbone, args.weights, args.image_size)
    run.place(features)
    check_heads(features.channels, args)
    torch.manual_seed(args.seed)  # initial weights: the same on every rank
    model = OmniAD(features.channels, args).to(run.device)
    if state:
        runtime.load_model(model, state["model"], args.eval)
    else:
        images.preload()
    run.open(args)
    if not state:
        state = train(args, run, features, model, images)
    score = Scorer(args, run, features, model)
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
        setting=setting_of(args, features, model, state),
        seconds=state["seconds"],
        paper=papers.numbers("omniad", args, PRESETS["paper"], dataset.name, run.world),
        described=score.described,
    )


def check(args):
    """What single options cannot check about themselves."""
    if args.image_size % 32:
        raise UsageError(
            f"--image-size {args.image_size}: must be a multiple of 32, for a bottleneck of 1/32"
        )
    if math.isqrt(args.tokens) ** 2 != args.tokens:
        raise UsageError(
            f"--tokens {args.tokens}: must be a square number, since they are laid out as a square"
        )
    options.check_depths(args.depths)


def check_heads(channels, args):
    if any(width % args.heads for width in widths(channels)):
        found = ", ".join(map(str, widths(channels)))
        raise UsageError(
            f"--heads {args.heads}: must divide the widths of all stages, which {args.backbone} "
            f"makes {found}"
        )


def setting_of(args, features, model, state):
    """What stands above the table."""
    return {
        "image size": args.image_size,
        "backbone": f"{args.backbone} ({features.backbone.weights_note})",
        "depths": args.depths,
        "tokens": args.tokens,
        "learnable": args.learnable,
        "order": args.order,
        "branches": args.branches,
        "weight of a distance": name_of_power(args.norm_power),
        "smoothing": name_of_sigma(args.sigma),
        "image score": name_of_rule(args.score),
        "parameters": runtime.count_parameters(model),
        "steps": state["step"],
    }


def costs(args):
    """--flops: parameters, and multiply-adds of one image, part by part (Tables IV, VI and VII).

    Convolutions, linear maps and attention count; norms and activations do not.
    """
    frozen = backbones.build(args.backbone, "random", backbones.pyramid_stages(args.backbone))
    check_heads(frozen.channels, args)
    model = OmniAD(frozen.channels, args).eval()
    spent = {}  # module -> multiply-adds

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            spent[module] = output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            spent[module] = output.numel() * module.in_features
        elif isinstance(module, TokenAttention):
            positions, width = output[0, ..., 0].numel(), output.shape[3]
            others = positions if module.kind == "self" else args.tokens
            spent[module] = 2 * positions * others * width  # QKᵀ and PV

    for module in [*frozen.modules(), *model.modules()]:
        module.register_forward_hook(count)
    with torch.no_grad():
        model(frozen(torch.zeros(1, 3, args.image_size, args.image_size)))

    parts = {f"teacher, {args.backbone}": frozen, "neck": model.neck}
    for i, stage in enumerate(model.stages, 1):
        parts[f"decoder stage {i}"] = stage
    parts["expansions"] = model.expands
    attentions = [m for m in model.modules() if isinstance(m, TokenAttention)]
    total = nn.ModuleList(parts.values())
    parts |= {"of these, attention": nn.ModuleList(attentions), "total": total}
    print(f"{'':<28}{'parameters':>14}{'multiply-adds':>20}")
    for name, part in parts.items():
        parameters = runtime.count_parameters(part)
        operations = sum(spent.get(m, 0) for m in part.modules())
        print(f"{name:<28}{parameters:>14,}{operations:>20,}")
    theirs = papers.costs("omniad", args, PRESETS["paper"])
    if theirs:  # of the released code's model, departures 1 and 3
        print(f"the paper: {theirs['params_m']} M parameters, {theirs['flops_g']} G multiply-adds")


if __name__ == "__main__":
    runtime.launch(main)
