"""Smoothing and image scores, against scipy and numpy."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from common import maps


def drawn(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size, sigma", [(64, 4.0), (224, 4.0), (96, 1.5), (8, 4.0)])
def test_gaussian_is_scipys(size, sigma):
    """Two matrix products give the separable filter; also where the window is wider than the map. 0: none."""
    x = drawn(2, size, size)
    expected = np.stack([scipy.ndimage.gaussian_filter(m.double().numpy(), sigma) for m in x])
    np.testing.assert_allclose(maps.gaussian(x, sigma).numpy(), expected, atol=1e-6)
    assert maps.gaussian(x, 0.0) is x


@pytest.mark.parametrize("side", [1, 3, 5])
def test_window_pads_with_zeros(side):
    """Weights of a Gaussian of sigma 4, normalised over the window; what lies outside the map counts as 0."""
    x = drawn(2, 12, 12)
    weight = np.exp(-0.5 * ((np.arange(side) - side // 2) / 4) ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    expected = [scipy.ndimage.correlate(m, weight, mode="constant") for m in x.double().numpy()]
    np.testing.assert_allclose(maps.gaussian_window(x, side).numpy(), expected, atol=1e-6)
    assert maps.gaussian_window(x, 0) is x


@pytest.mark.parametrize("side", [3, 5])
def test_window_that_reflects(side):
    """The map is mirrored about its outermost pixels; a constant map stays what it is."""
    x = drawn(2, 12, 12)
    weight = np.exp(-0.5 * ((np.arange(side) - side // 2) / 4) ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    expected = [scipy.ndimage.correlate(m, weight, mode="mirror") for m in x.double().numpy()]
    np.testing.assert_allclose(maps.gaussian_window(x, side, padding="reflect").numpy(), expected, atol=1e-6)
    flat = maps.gaussian_window(torch.ones(1, 9, 9), side, padding="reflect")
    torch.testing.assert_close(flat, torch.ones(1, 9, 9))


@pytest.mark.parametrize("side", [1, 4, 12, 99])
def test_box_takes_whole_windows(side):
    """Means of all windows inside the map, literally; a window larger than the map is the map."""
    x = drawn(2, 12, 12)
    k = min(side, 12)
    n = 12 - k + 1
    expected = [[[m[i:i + k, j:j + k].mean() for j in range(n)] for i in range(n)] for m in x.numpy()]
    np.testing.assert_allclose(maps.box(x, side).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("rule, count", [("max", 1), ("top0.1", 65), ("top1", 655), ("top2", 1310)])
def test_image_scores(rule, count):
    """The maximum, or the mean of the highest share of the pixels, rounded down, at least one."""
    x = drawn(2, 256, 256)
    expected = np.sort(x.numpy().reshape(2, -1))[:, -count:].mean(1)
    np.testing.assert_allclose(maps.image_score(x, rule).numpy(), expected, rtol=1e-5)
    assert maps.image_score(x[:, :8, :8], "top0.1").tolist() == x[:, :8, :8].amax((1, 2)).tolist()
    assert maps.name_of_rule(rule).endswith({"max": "max", "top0.1": "0.1 %", "top1": "1 %", "top2": "2 %"}[rule])
