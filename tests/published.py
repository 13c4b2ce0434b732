"""The methods as papers and authors' code state them: literal, nothing fused, nothing kept. What tests/bench_methods.py
holds our speed against, and (tests/test_bench_methods.py) a second opinion on what is computed.

Each class takes a model of ours and has its weights, so that both must give the same losses, maps and scores:

    loss(images, ...)    one training pass, features included: they are computed in every step, by the whole network
    score(images)        maps (B, S, S) and image scores (B,), numpy

images: (B, 3, S, S) uint8. As published: the frozen network keeps its batch norms, NCHW, and the stages after the last
used one where the authors' code runs them; attention is scores, softmax, product, or `nn.MultiheadAttention`; the
neighbour mask is made in every pass; prompts go through the backbone at test; the distances of every scale are resized
apart and summed; each map is smoothed by scipy. Without jitter and dropout the training passes are deterministic.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import cada
import omniad
import onenip
import roads
from common import backbones, data
from common.maps import SHARES


class Teacher:
    """A frozen network as it comes: images -> its maps at `stages`.

    to_the_end: whether later layers run as well, whose output nobody reads.
    """

    def __init__(self, args, stages, to_the_end):
        self.network = backbones.build(args.backbone, args.weights or None, stages, full=to_the_end)
        self.to_the_end = to_the_end

    @torch.no_grad()
    def __call__(self, images):
        network = self.network
        found = network(data.normalize(images))
        if not self.to_the_end:
            return found
        rest = found[-1]
        if isinstance(network, backbones.ResNet):
            blocks = [network.layer4]
        else:
            blocks = network._blocks[network.taps[-1] + 1 :]
        for block in blocks:
            rest = block(rest)
        return found


def smoothed(maps, sigma):
    """Tensor (B, S, S) -> numpy, each smoothed by itself."""
    return np.stack([ndimage.gaussian_filter(m, sigma) for m in maps.numpy()])


def distances(maps, rebuilt, size):
    """Reverse distillation's map: of each scale 1 - cos of every location, resized; list of (B, S, S)."""
    found = []
    for f, g in zip(maps, rebuilt):
        distance = 1 - F.cosine_similarity(f, g, dim=1)[:, None]  # (B, 1, h, w)
        found.append(F.interpolate(distance, (size, size), mode="bilinear", align_corners=True)[:, 0])
    return found


def flat_cosine(maps, rebuilt):
    """RD4AD's loss: Σ over the scales of 1 - cos of each image's whole map, mean over the images."""
    total = 0.0
    for f, g in zip(maps, rebuilt):
        total = total + torch.mean(1 - F.cosine_similarity(f.reshape(len(f), -1), g.reshape(len(g), -1)))
    return total


def local_cosine(maps, rebuilt):
    """Eq. 5 of ROADS as printed: the mean over the locations."""
    return sum(torch.mean(1 - F.cosine_similarity(f, g, dim=1)) for f, g in zip(maps, rebuilt))


# ---------------------------------------------------------------------------------------------------------- OneNIP


def neighbour_mask(side):
    """UniAD's, made position by position: (N, N), -inf where a query may not look."""
    reach = side // 2 // 2
    mask = torch.ones(side, side, side, side)
    for r in range(side):
        for c in range(side):
            rows = slice(max(r - reach, 0), min(r + reach + 1, side))
            columns = slice(max(c - reach, 0), min(c + reach + 1, side))
            mask[r, c, rows, columns] = 0
    mask = mask.view(side * side, side * side)
    return mask.masked_fill(mask == 0, -math.inf).masked_fill(mask == 1, 0.0)


def multihead(ours):
    """`nn.MultiheadAttention` with the weights of an `Attention` of ours."""
    theirs = nn.MultiheadAttention(ours.to_q.in_features, ours.heads, ours.dropout)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.to_q.bias, ours.to_k.bias, ours.to_v.bias]))
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    return theirs


class OneNIP(nn.Module):
    """Tokens first: (N, B, D). The prompt is an image in every pass, in training and at test."""

    def __init__(self, ours, args):
        super().__init__()
        self.args, self.side, self.jitter, self.channels = args, ours.side, ours.jitter, ours.channels
        stages = backbones.all_stages(args.backbone)
        self.teacher = Teacher(args, stages, to_the_end=True)
        self.body = copy.deepcopy(ours)  # everything but the attention
        for module in [*self.body.encoder, *self.body.decoder, self.body]:
            for name, child in list(module.named_children()):
                if isinstance(child, onenip.Attention):
                    setattr(module, name, multihead(child))

    def features(self, images):
        size = (self.side, self.side)
        maps = [F.interpolate(f, size, mode="bilinear", align_corners=True) for f in self.teacher(images)]
        return torch.cat(maps, dim=1)  # (B, C, h, w)

    def encode(self, f):
        """(B, C, h, w) -> (N, B, D)."""
        tokens = f.flatten(2).permute(2, 0, 1)  # (B, C, h, w) -> (N, B, C)
        if self.training and self.jitter > 0:
            norms = tokens.norm(dim=2).unsqueeze(2) / self.channels
            tokens = tokens + torch.randn(tokens.shape) * norms * self.jitter
        x = self.body.input(tokens)
        pos, mask = self.body.position()[:, None], neighbour_mask(self.side)
        for layer in self.body.encoder:
            q = k = x + pos
            x = layer.norm1(x + layer.dropout(layer.attention(q, k, x, attn_mask=mask)[0]))
            x = layer.norm2(x + layer.dropout(layer.mlp(x)))
        return x

    def decode(self, x, p):
        """(N, B, D), (N, B, D) -> F̂ (B, C, h, w)."""
        pos, mask, body = self.body.position()[:, None], neighbour_mask(self.side), self.body
        for block in body.decoder:
            p = block.norm1(p + block.dropout(block.prompt_attention(p + pos, x + pos, x, attn_mask=mask)[0]))
            p = block.norm2(p + block.dropout(block.mlp(p)))
            x = block.norm3(x + block.dropout(block.feature_attention(x + pos, p + pos, p, attn_mask=mask)[0]))
        out = body.norm(p + body.dropout(body.final_attention(p + pos, x + pos, x)[0]))
        rebuilt = body.output(out)  # (N, B, C)
        return rebuilt.permute(1, 2, 0).unflatten(2, (self.side, self.side))  # -> (B, C, h, w)

    def mask_of(self, rebuilt, f):
        logits = self.body.refiner((rebuilt - f).abs())
        size = (self.args.image_size, self.args.image_size)
        return torch.sigmoid(F.interpolate(logits, size, mode="bilinear", align_corners=True))[:, 0]

    def loss(self, normal, synthetic, prompt, mask):
        """Images (B, 3, S, S), mask (B, S, S)."""
        f, f_synthetic, f_prompt = self.features(torch.cat([normal, synthetic, prompt])).chunk(3)
        x, x_synthetic, p = self.encode(torch.cat([f, f_synthetic, f_prompt])).chunk(3, dim=1)
        rebuilt = self.decode(torch.cat([x, x_synthetic], 1), torch.cat([p, p], 1))
        both = torch.cat([f, f_synthetic])
        feature_loss = F.mse_loss(rebuilt, torch.cat([f, f]))  # the mean of both: half of their sum
        predicted = self.mask_of(rebuilt, both)
        masks = torch.cat([torch.zeros_like(mask), mask])
        return 2 * feature_loss + onenip.dice_loss(predicted, masks, self.args.dice)

    @torch.no_grad()
    def score(self, images, prompts, scale):
        """prompts: images of the same class; scale: c."""
        f, f_prompt = self.features(torch.cat([images, prompts])).chunk(2)
        x, p = self.encode(torch.cat([f, f_prompt])).chunk(2, dim=1)
        rebuilt = self.decode(x, p)
        size = (self.args.image_size, self.args.image_size)
        error = torch.sqrt(torch.sum((rebuilt - f) ** 2, dim=1, keepdim=True))
        s_rec = F.interpolate(error, size, mode="bilinear", align_corners=True)[:, 0]
        s = (1 - self.args.alpha) * s_rec + self.args.alpha * scale * self.mask_of(rebuilt, f)
        scores = F.avg_pool2d(s[:, None], self.args.pool, stride=1).flatten(1).max(1).values
        return s.numpy(), scores.numpy()


# --------------------------------------------------------------------------------------------------------- Omni-AD


def softmax_attention(q, k, v):
    """(.., N, D), (.., M, D) -> (.., N, D)."""
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1) @ v


class LiteralTokenAttention(omniad.TokenAttention):
    def attend(self, q, k, v):
        batch = max(len(q), len(k))
        return softmax_attention(*(t.expand(batch, -1, -1, -1) for t in (q, k, v)))


class OmniAD(nn.Module):
    def __init__(self, ours, args):
        super().__init__()
        self.args = args
        self.teacher = Teacher(args, backbones.pyramid_stages(args.backbone), to_the_end=False)
        self.model = copy.deepcopy(ours)
        for module in self.model.modules():
            if isinstance(module, omniad.TokenAttention):
                module.__class__ = LiteralTokenAttention

    def loss(self, images):
        maps = self.teacher(images)
        return sum(F.mse_loss(g, f) for f, g in zip(maps, self.model(maps)))

    @torch.no_grad()
    def score(self, images):
        maps = self.teacher(images)
        summed = sum(distances(maps, self.model(maps), self.args.image_size))
        maps = smoothed(summed, self.args.sigma)
        if self.args.score == "max":
            return maps, maps.max((1, 2))
        count = int(SHARES[self.args.score] * maps[0].size)
        return maps, np.sort(maps.reshape(len(maps), -1))[:, -count:].mean(1)


# ----------------------------------------------------------------------------------------------------------- ROADS


class LiteralBlock(roads.CrossAttentionBlock):
    """Eq. 2 as printed: map and prompts are normed and projected, then attend."""

    def attend(self, x, y):
        x, y = self.norm_x(x), self.norm_y(y)
        q, k, v = (f(t).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, n, C) -> (B, heads, n, d)
                   for f, t in ((self.to_q, x), (self.to_k, y), (self.to_v, y)))
        return self.to_out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))


class LiteralAdaIN(roads.AdaIN):
    def forward(self, x, style=None):
        gamma, beta = (self.style if style is None else style)[..., None, None].unbind(1)
        mean = x.mean((2, 3), keepdim=True)
        deviation = torch.sqrt(x.var((2, 3), keepdim=True, unbiased=False) + 1e-5)
        return gamma * (x - mean) / deviation + beta


class ROADS(nn.Module):
    """With or without prompts and adapter; without both it is RD4AD."""

    def __init__(self, ours, args):
        super().__init__()
        self.args = args
        self.teacher = Teacher(args, backbones.pyramid_stages(args.backbone), to_the_end=True)
        self.model = copy.deepcopy(ours)
        for module in self.model.modules():
            if isinstance(module, roads.CrossAttentionBlock):
                module.__class__ = LiteralBlock
            elif isinstance(module, roads.AdaIN):
                module.__class__ = LiteralAdaIN
        if self.model.adapter:
            network = backbones.build(args.adapter_backbone, args.adapter_weights or None, (4,))
            self.model.adapter.network = network.requires_grad_(True)

    def loss(self, images, view, shifted, class_number):
        """view, shifted: of the images, at the adapter's size, uint8 (B, 3, s, s)."""
        args, maps = self.args, self.teacher(images)
        out = self.model(maps, view, class_number, shifted)
        distance = flat_cosine if args.distance == "flat" else local_cosine
        total = args.eta * distance(maps, out["maps"])
        if "selector" in out:
            total = total + args.delta * F.cross_entropy(out["classifier"], class_number)
            total = total + args.zeta * F.cross_entropy(out["selector"], class_number)
        if "code" in out:
            cosine = F.cosine_similarity(out["code"], out["shifted_code"], dim=1)
            total = total + args.mu * (1 - cosine).mean()
        return total

    @torch.no_grad()
    def score(self, images):
        maps = self.teacher(images)
        rebuilt = self.model(maps, images)["maps"]
        maps = smoothed(sum(distances(maps, rebuilt, self.args.image_size)), self.args.sigma)
        return maps, maps.max((1, 2))


# ------------------------------------------------------------------------------------------------------------ CADA


class CADA(nn.Module):
    """Its base RevDist, and the calibration at test."""

    def __init__(self, ours, calibration, args):
        super().__init__()
        self.args, self.calibration = args, copy.deepcopy(calibration)
        self.teacher = Teacher(args, backbones.pyramid_stages(args.backbone), to_the_end=True)
        self.model = copy.deepcopy(ours)

    def loss(self, images):
        maps = self.teacher(images)
        rebuilt = self.model.decoder(self.model.neck(*maps))
        return (flat_cosine if self.args.cosine == "flat" else local_cosine)(maps, rebuilt)

    @torch.no_grad()
    def score(self, images):
        maps = self.teacher(images)
        phi = self.model.neck(*maps)
        m = sum(distances(maps, self.model.decoder(phi), self.args.image_size)) / 3
        u, top = cada.expected(self.calibration.head(phi), self.args.statistic)
        span = torch.maximum(top - u, self.calibration.floor)
        m = (m - u[:, None, None]) / span[:, None, None]
        offset = torch.arange(5.0) - 2  # ReContrast's window, as a convolution in two dimensions
        line = torch.exp(-0.5 * (offset / 4.0) ** 2)
        window = line[:, None] * line
        m = F.conv2d(m[:, None], (window / window.sum())[None, None], padding=2)[:, 0]
        ordered = torch.sort(m.flatten(1), dim=1, descending=True).values
        count = int(SHARES[self.args.score] * ordered.shape[1])
        return m.numpy(), ordered[:, :count].mean(1).numpy()
