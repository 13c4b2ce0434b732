"""The published form that our speed is held against computes what we compute, and its comparison is fair."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import bench_growth, bench_methods

SMALL = {
    "onenip": dict(hidden=32, heads=2, mlp=64, encoder_layers=1, decoder_layers=2, refiner_width=8, image_size=96,
                   jitter=0.0, dropout=0.0, pool=8),
    "omniad": dict(depths="1,1,1,1", image_size=96, jitter=0.0, tokens=9),
    "roads": dict(depths="1,1,1,1", image_size=96, adapter_size=64, adapter_backbone="efficientnet_lite0",
                  adapter_weights="", tokens=3),
    "rd4ad": dict(depths="2,1,2,1", image_size=64, distance="flat"),
    "cada": dict(depths="1,1,1,1", image_size=64),
}


@pytest.mark.parametrize("name", SMALL)
def test_both_forms_compute_the_same(name, one_thread):
    """Loss, gradient, maps and image scores within float error, the published form by itself: its own attention, its
    own features of the whole network, its own smoothing."""
    changes = dict(backbone="efficientnet_lite0", weights="", **SMALL[name])
    both = bench_methods.pair(name, "laptop", 3, **changes)
    with torch.no_grad():  # what starts at zero would hide a part
        theirs = dict(both.theirs.named_parameters())
        for key, ours in both.ours.named_parameters():
            if not ours.any() and f"model.{key}" in theirs:
                theirs[f"model.{key}"].copy_(ours.normal_(std=0.05))
    losses, gradients = [], []
    for loss, model in ((both.loss, both.ours), (both.their_loss, both.theirs)):
        losses.append(loss())
        losses[-1].backward()
        gradients.append(torch.stack([p.grad.norm() for p in trained(model)]).norm())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    maps, scores = both.score()
    their_maps, their_scores = both.their_score()
    assert maps.shape == their_maps.shape == (3, both.args.image_size, both.args.image_size)
    np.testing.assert_allclose(their_maps, maps.numpy(), rtol=2e-3, atol=2e-3 * np.ptp(their_maps))
    np.testing.assert_allclose(their_scores, scores.numpy(), rtol=2e-3)


def trained(model):
    """The parameters that have a gradient, but for the adapter's network: ours has its batch norms folded, so that its
    weights are others."""
    return [p for key, p in model.named_parameters() if p.grad is not None and "adapter.network" not in key]


def test_median_and_turns():
    """The first call of each warms up and does not count; they take turns."""
    calls = []
    found = bench_methods.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4 and set(found) == {"a", "b"} and all(value >= 0 for value in found.values())


def test_growth_with_the_number_of_images(capsys):
    """Counts, megabytes of pixels and of features; what is read again costs less than what is computed."""
    args = SimpleNamespace(only="omniad", preset="laptop", counts=[40])
    bench_growth.grow_with_images(args)
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == ["omniad", "40", f"{40 * 3 * 192 * 192 / 1e6:.0f}"]
    features, computed, again = map(float, cells[3:])
    assert features > 0 and again < computed
