"""Anomaly maps, (B, S, S): smoothing, and the image score that follows from a map."""

import functools

import torch
import torch.nn.functional as F

# --score: the share of a map's pixels whose mean is the image score; "max" is the highest pixel
SHARES = {"top0.1": 0.001, "top1": 0.01, "top2": 0.02}


def gaussian(maps, sigma):
    """scipy.ndimage's Gaussian filter with its defaults: cut off at 4 sigma, edges reflected.

    maps: (B, S, S) float. sigma: in pixels; 0 leaves the maps as they are. Returns (B, S, S).
    """
    if sigma == 0:
        return maps
    smooth = _gaussian_matrix(maps.shape[1], sigma, maps.device)  # (S, S)
    return smooth @ maps @ smooth.T


@functools.lru_cache(maxsize=4)
def _gaussian_matrix(size, sigma, device):
    """The matrix G (size, size) for which G · map · Gᵀ is the filtered map."""
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)  # (2r + 1,)
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    weight = (weight / weight.sum()).expand(size, -1)  # (size, 2r + 1)
    # Row i of G holds the weights of pixels i - r ... i + r, of a signal that is mirrored at its
    # edges and so has a period of 2 size.
    at = (torch.arange(size)[:, None] + offset) % (2 * size)  # (size, 2r + 1)
    at = torch.minimum(at, 2 * size - 1 - at)
    return torch.zeros(size, size).scatter_add_(1, at, weight).to(device)


def gaussian_window(maps, side, sigma=4.0, padding="zeros"):
    """A window of side² Gaussian weights: (B, S, S) -> (B, S, S).

    side: odd; 0 leaves the maps as they are. 5 with sigma 4 is nearly a box. padding: what lies
    outside the map, "zeros" or "reflect" (the map mirrored about its outermost pixels).
    """
    if side == 0:
        return maps
    if padding == "reflect" and side > 1:
        margin = side // 2
        wide = F.pad(maps[:, None], (margin, margin, margin, margin), mode="reflect")[:, 0]
        return gaussian_window(wide, side, sigma)[:, margin:-margin, margin:-margin]
    offset = torch.arange(side, device=maps.device) - side // 2
    line = torch.exp(-0.5 * (offset / sigma) ** 2)
    line = (line / line.sum()).view(1, 1, 1, side)
    x = F.conv2d(maps[:, None], line, padding=(0, side // 2))  # (B, 1, S, S)
    return F.conv2d(x, line.transpose(2, 3), padding=(side // 2, 0))[:, 0]


def box(maps, side):
    """Means of all side x side windows that lie inside: (B, S, S) -> (B, S - side + 1, likewise).

    A side larger than the map is taken for the map's own.
    """
    return F.avg_pool2d(maps[:, None], min(side, maps.shape[1]), stride=1)[:, 0]


def image_score(maps, rule):
    """(B, S, S) -> (B,): the maximum ("max"), or the mean of the highest share of the pixels.

    rule: "max" or one of SHARES ("top1": of 256 x 256 pixels the highest 655).
    """
    pixels = maps.flatten(1)  # (B, S, S) -> (B, S²)
    if rule == "max":
        return pixels.amax(1)
    count = max(1, int(SHARES[rule] * pixels.shape[1]))
    return pixels.topk(count, dim=1).values.mean(1)


def name_of_rule(rule):
    """How a report calls `rule`."""
    return "max" if rule == "max" else f"mean of the highest {100 * SHARES[rule]:g} %"


def name_of_sigma(sigma):
    """How a report calls --sigma."""
    return f"Gaussian, sigma {sigma:g}" if sigma else "none"


def name_of_power(power):
    """How a report calls --norm-power."""
    return f"magnitude of the features, to the power {power:g}" if power else "none"
