"""The four corruptions against slow, independent implementations of the benchmark's formulas."""

import numpy as np
import pytest
from scipy.ndimage import correlate, correlate1d
from skimage.color import hsv2rgb, rgb2hsv

from common import UsageError
from common.corruptions import NAMES, corrupt, parse


@pytest.fixture(scope="module")
def image():
    """Noise, a smooth ramp, every grey level, saturated colours: (96, 80, 3) uint8."""
    image = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    image[:32] = np.linspace(0, 255, 32 * 80 * 3).reshape(32, 80, 3)
    image[32:36, :64] = np.arange(256).reshape(4, 64)[..., None]
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 128), (90, 90, 20), (20, 90, 90), (90, 20, 90)]
    for i, colour in enumerate(colours):
        image[40:60, 10 * i : 10 * i + 10] = colour
    return image


def slow_brightness(image, severity):
    hsv = rgb2hsv(image / 255.0)
    amount = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    return (np.clip(hsv2rgb(hsv), 0, 1) * 255).astype(np.uint8)


def slow_contrast(image, severity):
    x = image / 255.0
    c = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    m = np.mean(x, axis=(0, 1))
    return (np.clip((x - m) * c + m, 0, 1) * 255).astype(np.uint8)


def slow_defocus(image, severity):
    """A loop over the disc, direct correlation; mode "mirror" is the border that OpenCV calls reflect-101."""
    radius = (3, 4, 6, 8, 10)[severity - 1]
    sigma = 0.1 if severity == 1 else 0.5
    half, reach = (8, 1) if radius <= 8 else (10, 2)
    disc = np.zeros((2 * half + 1, 2 * half + 1))
    for i in range(-half, half + 1):
        for j in range(-half, half + 1):
            disc[i + half, j + half] = i * i + j * j <= radius * radius
    k = np.arange(-reach, reach + 1)
    taps = np.exp(-k * k / (2 * sigma * sigma))
    kernel = disc / disc.sum()
    for axis in (0, 1):
        kernel = correlate1d(kernel, taps / taps.sum(), axis=axis, mode="mirror")
    channels = []
    for c in range(3):
        channels.append(correlate(image[..., c] / 255.0, kernel, mode="mirror"))
    x = np.stack(channels, axis=-1)
    return (np.clip(x + 1e-9, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("slow", [slow_brightness, slow_contrast, slow_defocus])
def test_equals_the_slow_implementation(image, slow, severity):
    """Protects constants, colour model, border, kernel and truncation: every pixel is the same, not one level off."""
    names = {slow_brightness: "brightness", slow_contrast: "contrast", slow_defocus: "defocus_blur"}
    name = names[slow]
    result = corrupt(image, name, severity)
    assert result.dtype == np.uint8 and result.shape == image.shape
    np.testing.assert_array_equal(result, slow(image, severity))
    assert (result != image).mean() > 0.5


def test_default_blur_has_the_published_size():
    """Protects the kernel of severity 3 through what can be counted by hand: i^2 + j^2 <= 36 holds for 113 pixels."""
    white = np.zeros((65, 65, 3), np.uint8)
    white[32, 32] = 255
    larger = white.repeat(3, 0).repeat(3, 1)  # a spot of 3x3
    wide = corrupt(larger, "defocus_blur")  # it reaches 6 + 1 + 1 pixels
    rows = np.flatnonzero(wide.any((1, 2)))
    assert rows.min() >= 97 - 8 and rows.max() <= 97 + 8
    # the middle of the disc is flat, so all nine pixels weigh 1/113
    assert wide[97, 97, 0] == int(9 * 255 / 113)


@pytest.mark.parametrize("severity, sigma", [(1, 0.08), (2, 0.12), (3, 0.18), (4, 0.26), (5, 0.38)])
def test_noise_has_the_stated_sigma_and_is_independent(severity, sigma):
    """Protects the strength of the noise (against many draws clipped and truncated alike) and its independence."""
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = corrupt(grey, "gaussian_noise", severity, seed=severity)
    draws = np.random.default_rng(1).normal(size=10**6) * sigma
    expected = np.floor(np.clip(128 / 255 + draws, 0, 1) * 255)
    assert noisy.std() == pytest.approx(expected.std(), rel=0.02)
    assert noisy.mean() == pytest.approx(expected.mean(), abs=1)
    channels = np.corrcoef(noisy.reshape(-1, 3).T.astype(float))  # (3, 3)
    assert np.abs(channels - np.eye(3)).max() < 0.03


def test_noise_is_seeded(image):
    """Protects reproducibility: the seed decides the noise, and nothing else does."""
    first = corrupt(image, "gaussian_noise", 3, seed=7)
    np.random.seed(0)  # the global generator must play no part
    np.testing.assert_array_equal(first, corrupt(image, "gaussian_noise", 3, seed=7))
    assert (first != corrupt(image, "gaussian_noise", 3, seed=8)).mean() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_input_is_left_alone_and_tiny_images_work(name):
    """Protects the caller's array, and images smaller than the kernel (one pixel included)."""
    for shape in ((1, 1, 3), (3, 40, 3)):
        image = np.full(shape, 200, np.uint8)
        assert corrupt(image, name, 5).shape == shape
        assert (image == 200).all()


@pytest.mark.parametrize("severity", [1, 2, 3])
@pytest.mark.parametrize("level", [0, 3, 128, 255])
def test_blur_keeps_a_flat_image(level, severity):
    """Protects against Fourier noise under truncation: a white background stays 255. (Severities 4 and 5 brighten.)"""
    flat = np.full((40, 40, 3), level, np.uint8)
    np.testing.assert_array_equal(corrupt(flat, "defocus_blur", severity), flat)


def test_parse():
    """Protects the option: NAME alone means severity 3, as in the benchmark."""
    assert parse("contrast") == ("contrast", 3)
    assert parse("defocus_blur:5") == ("defocus_blur", 5)


@pytest.mark.parametrize("text", ["", "fog", "Contrast", "contrast:", "contrast:0", "contrast:6", "contrast:x",
                                  "contrast:2.0", "contrast:3:1", ":3"])
def test_wrong_option_is_one_clear_line(text):
    """Protects users from a traceback, and from a typo that is silently taken for the default."""
    with pytest.raises(UsageError) as error:
        parse(text)
    assert "--corrupt" in str(error.value) and "\n" not in str(error.value)


def test_wrong_array_or_severity_is_refused(image):
    """Protects against a float image, which would come out black."""
    with pytest.raises(ValueError, match="uint8"):
        corrupt(image / 255.0, "contrast")
    with pytest.raises(UsageError, match="1 to 5"):
        corrupt(image, "contrast", 6)
