"""Four corruptions at five severities: the domain shifts that ROADS is tested under (`--corrupt NAME[:SEVERITY]`).

They are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), with the same constants; ADShift (ICCV 2023) took these four for anomaly detection, at
severity 3, and ROADS follows. With an image x in [0, 1], (H, W, 3):

    brightness       hue and saturation stay, V <- clip(V + c)       c  = .1   .2   .3   .4   .5
    contrast         x <- clip((x - m) c + m), m: mean per channel   c  = .4   .3   .2   .1   .05
    defocus_blur     x <- x * (disc of radius r, softened by a       r  = 3    4    6    8    10
                     small Gaussian s)                               s  = .1   .5   .5   .5   .5
    gaussian_noise   x <- clip(x + N(0, c^2)), per pixel and channel c  = .08  .12  .18  .26  .38

The result goes back to 8 bits by truncation, as the benchmark does, not by rounding.

Corrupt the image at its original resolution and resize afterwards (`data.Images` does so): on a resized image the
same constants are a far harder test, since the resize no longer averages the noise and shrinks the blur.
"""

import numpy as np

from common import UsageError

NAMES = ("brightness", "contrast", "defocus_blur", "gaussian_noise")
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, sigma of the softening, in pixels
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)


def parse(text):
    """`"NAME"` or `"NAME:SEVERITY"` -> (name, severity); the severity is 1 to 5, and 3 if not given.

    Raises `UsageError` for another name or severity.
    """
    name, colon, severity = text.partition(":")
    if name not in NAMES:
        raise UsageError(f"--corrupt {text}: '{name}' is no corruption; choose one of {', '.join(NAMES)}")
    if colon and severity not in ("1", "2", "3", "4", "5"):
        raise UsageError(f"--corrupt {text}: the severity must be a whole number from 1 to 5")
    return name, int(severity or 3)


def corrupt(image, name, severity=3, seed=0):
    """The corrupted copy of an image.

    image: uint8 (H, W, 3), RGB; name: one of `NAMES`; severity: 1 (weak) to 5 (strong); seed: of the noise, not used
    by the other three. Returns uint8 (H, W, 3). Raises `UsageError` for an unknown name or severity, `ValueError` for
    an array of another kind.
    """
    name, severity = parse(f"{name}:{severity}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    x = image / 255.0  # (H, W, 3) float64 in [0, 1]
    level = severity - 1
    if name == "brightness":
        x = _brighten(x, BRIGHTNESS[level])
    elif name == "contrast":
        mean = x.mean(axis=(0, 1), keepdims=True)  # (1, 1, 3)
        x = (x - mean) * CONTRAST[level] + mean
    elif name == "defocus_blur":
        x = _blur(x, _disc(*DEFOCUS[level]))
    else:
        x = x + np.random.default_rng(seed).normal(scale=NOISE[level], size=x.shape)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def _brighten(x, amount):
    """Add `amount` to V in HSV. x: (H, W, 3) in [0, 1]; returns the same.

    Scaling each pixel by V'/V would be the same in exact arithmetic, but the truncation to 8 bits turns the last bit
    of a float into a grey level, so this goes the way of the benchmark: to HSV and back, by the textbook.
    """
    r, g, b = np.moveaxis(x, -1, 0)  # (H, W) each, as are h, s, v below
    v = x.max(axis=-1)
    delta = v - x.min(axis=-1)
    grey = delta == 0
    safe = np.where(grey, 1, delta)
    blue_largest = 4 + (r - g) / safe
    green_largest = 2 + (b - r) / safe
    red_largest = (g - b) / safe
    h = np.select([b == v, g == v], [blue_largest, green_largest], red_largest) / 6 % 1
    h = np.where(grey, 0, h)
    s = np.where(grey, 0, delta / np.where(v == 0, 1, v))

    v = np.clip(v + amount, 0, 1)
    sextant = np.floor(h * 6)
    f = h * 6 - sextant
    p = v * (1 - s)
    q = v * (1 - f * s)
    t = v * (1 - (1 - f) * s)
    sextant = sextant.astype(int) % 6
    r = np.choose(sextant, (v, q, p, p, t, v))
    g = np.choose(sextant, (t, v, v, q, p, p))
    b = np.choose(sextant, (p, p, t, v, v, q))
    return np.stack([r, g, b], axis=-1)


def _disc(radius, sigma):
    """The defocus kernel: a disc of sum 1, its edge softened by a Gaussian of `sigma`. Returns (K, K), K odd.

    K is 17 up to radius 8 and 21 for radius 10; the Gaussian has 3 taps a side up to radius 8 and 5 beyond. At radius
    8 and 10 the disc touches the border of its array, where the reflected border makes the sum a little more than 1:
    so it is in the benchmark.
    """
    half, reach = (8, 1) if radius <= 8 else (radius, 2)
    i = np.arange(-half, half + 1)
    distance = i[:, None] ** 2 + i[None, :] ** 2  # (K, K), squared
    disc = (distance <= radius**2).astype(float)
    t = np.arange(-reach, reach + 1.0)
    taps = np.exp(-(t**2) / (2 * sigma**2))
    taps /= taps.sum()
    return _filter(disc / disc.sum(), np.outer(taps, taps))


def _blur(x, kernel):
    """Each channel of x (H, W, 3) filtered with the kernel (K, K)."""
    blurred = np.stack([_filter(x[..., c], kernel) for c in range(3)], axis=-1)  # (H, W, 3)
    # The Fourier transform errs by about 1e-15 either way; without this nudge the truncation would make 254 of 255.
    return blurred + 1e-9


def _filter(image, kernel):
    """image (H, W) * kernel (K, K), K odd, border mirrored without repeating the edge pixel. Returns (H, W).

    By Fourier transform: a 17x17 kernel on a photograph of 1024 px would take seconds otherwise.
    """
    from scipy.signal import fftconvolve  # half a second, for those who blur only

    return fftconvolve(np.pad(image, len(kernel) // 2, mode="reflect"), kernel, mode="valid")
