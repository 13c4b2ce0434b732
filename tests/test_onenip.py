"""OneNIP: sizes against the paper's, every loss against a literal transcription, what learns and what must not, the
pseudo-anomalies, the scoring, and the whole program through its command line."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import contract
import onenip
from common import UsageError, data, runtime

TINY = dict(hidden=32, heads=2, mlp=64, encoder_layers=1, decoder_layers=2, refiner_width=8, image_size=64, dropout=0.0)


def make(channels=24, seed=0, **changes):
    args = onenip.Args(**{**TINY, **changes})
    torch.manual_seed(seed)
    return onenip.OneNIP(channels, args.image_size // 16, args), args


def batch(b=3, channels=24, side=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, channels, side, side, generator=g) for _ in range(3)]


# --------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("changes, count", [
    (dict(image_size=224), 8_372_625), (dict(image_size=256), 8_373_137), (dict(image_size=320), 8_374_161),
    (dict(image_size=224, prompt="none", refiner=False), 7_717_392),  # UniAD, whose query tables grow with the size
    (dict(image_size=256, prompt="none", refiner=False), 7_779_344),
    (dict(image_size=320, prompt="none", refiner=False), 7_927_824)])
def test_parameter_counts_of_the_paper(changes, count):
    """The trainable part has exactly the size of the authors' model, at every resolution of Table 3."""
    model = onenip.OneNIP(272, changes["image_size"] // 16, onenip.Args(**changes))
    assert sum(p.numel() for p in model.parameters()) == count


def test_parts_of_the_paper_model():
    model = onenip.OneNIP(272, 14, onenip.Args())

    def size(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    assert size(model.encoder) == 3_159_040
    assert size(model.decoder, model.final_attention, model.norm) == 4_477_440
    assert size(model.refiner) == 592_769


@pytest.mark.parametrize("prompt", ["none", "static", "dynamic"])
def test_shapes(prompt):
    """Reconstructions have the features' shape, the mask is four times as fine, with every kind of prompt."""
    model, args = make(prompt=prompt)
    normal, synthetic, p = batch()
    reconstructed, restored, mask = model(normal, synthetic, None if prompt == "none" else p)
    assert reconstructed.shape == restored.shape == (3, 24, 4, 4)
    assert mask.shape == (6, 64, 64) and 0 < mask.min() and mask.max() < 1


def test_features_are_frozen_and_of_the_paper_size():
    """Four maps of EfficientNet-B4 on one grid: 24 + 32 + 56 + 160 = 272 channels; no gradient, always eval."""
    features = onenip.Features("efficientnet_b4", "random", 64)
    assert features.channels == 272
    out = features.train()(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    assert out.shape == (1, 272, 4, 4) and not out.requires_grad
    assert not any(p.requires_grad for p in features.parameters())
    assert not any(m.training for m in features.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_paper_preset_resizes_masks_as_the_authors_do():
    """By nearest neighbour, which moves P-AP; our own default, half, elsewhere."""
    preset = {data: runtime.parse(onenip.Args, onenip.PRESETS, "", ["--data", data]) for data in ("mvtec", "synth")}
    assert (preset["mvtec"].mask_rule, preset["synth"].mask_rule) == ("nearest", "half")


# --------------------------------------------------------------------------------- model, against transcriptions


def literal_attention(layer, query, key, value, mask=None):
    """Multi-head attention head by head, as in the formula."""
    b, n, d = query.shape
    q, k, v, width = layer.to_q(query), layer.to_k(key), layer.to_v(value), d // layer.heads
    heads = []
    for h in range(layer.heads):
        part = slice(h * width, (h + 1) * width)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        if mask is not None:
            logits = logits.masked_fill(mask, -math.inf)
        heads.append(logits.softmax(-1) @ v[..., part])
    return layer.to_out(torch.cat(heads, -1))


def neighbours(side, size):
    """UniAD's mask, position by position: True where the key lies in the size x size neighbourhood of the query."""
    mask = torch.zeros(side * side, side * side, dtype=torch.bool)
    for r in range(side):
        for c in range(side):
            for rr in range(max(0, r - size // 2), min(side, r + size // 2 + 1)):
                for cc in range(max(0, c - size // 2), min(side, c + size // 2 + 1)):
                    mask[r * side + c, rr * side + cc] = True
    return mask


@pytest.mark.parametrize("image_size", [64, 96, 224])
def test_attention_and_neighbour_mask(image_size):
    """Multi-head attention with the mask n x n, n = side // 2, from coordinates = with the mask of the sheet."""
    model, args = make(image_size=image_size)
    side = image_size // 16
    x, y = torch.randn(2, 2, side * side, 32)
    layer = model.decoder[0].prompt_attention
    expected = literal_attention(layer, x, y, y, neighbours(side, side // 2))
    torch.testing.assert_close(layer(x, y, y, model.window), expected)
    torch.testing.assert_close(layer(x, y, y), literal_attention(layer, x, y, y))


def test_decoder_is_equation_3():
    """p <- MLP(attend(p, x)), x <- attend(x, p), with residuals and post-norms; the result is read from the prompt.
    (The code behind the published tables used the MLP's output in place of the second attention.)"""
    model, _ = make()
    model.eval()
    x, p = torch.randn(2, 2, 16, 32)
    got, pos, mask = model.decode(x, p), model.position(), neighbours(4, 2)
    for block in model.decoder:
        p = block.norm1(p + literal_attention(block.prompt_attention, p + pos, x + pos, x, mask))
        p = block.norm2(p + block.mlp(p))
        x = block.norm3(x + literal_attention(block.feature_attention, x + pos, p + pos, p, mask))
    out = model.norm(p + literal_attention(model.final_attention, p + pos, x + pos, x))
    expected = model.output(out).transpose(1, 2).reshape(2, 24, 4, 4)
    torch.testing.assert_close(got, expected)


def test_dropout_is_where_the_authors_apply_it():
    """In the encoder's MLPs and in UniAD's, not in those of OneNIP's decoder."""
    model, _ = make(dropout=0.5)
    uniad, _ = make(dropout=0.5, prompt="none")
    model.train()
    x = torch.randn(2, 16, 32)
    for layer, random in ((model.encoder[0], True), (model.decoder[0], False), (uniad.decoder[0], True)):
        assert torch.equal(layer.mlp(x), layer.mlp(x)) != random


@pytest.mark.parametrize("prompt", ["none", "static"])
def test_query_decoder_is_uniad(prompt):
    """Each layer's query (a learned table, or the encoded prompt) asks the encoder, then the layer before."""
    model, _ = make(prompt=prompt)
    model.eval()
    x, p = torch.randn(2, 2, 16, 32)
    pos, mask, previous = model.position(), neighbours(4, 2), x
    for block in model.decoder:
        q = block.query.expand(2, -1, -1) if prompt == "none" else p
        q = block.norm1(q + literal_attention(block.encoder_attention, q + pos, x + pos, x, mask))
        q = block.norm2(q + literal_attention(block.previous_attention, q + pos, previous + pos, previous, mask))
        previous = block.norm3(q + block.mlp(q))
    expected = model.output(model.norm(previous)).transpose(1, 2).reshape(2, 24, 4, 4)
    torch.testing.assert_close(model.decode(x, None if prompt == "none" else p), expected)


def test_position_is_column_then_row():
    model, _ = make()
    pos = model.position()
    for r in range(4):
        for c in range(4):
            torch.testing.assert_close(pos[4 * r + c], torch.cat([model.column[c], model.row[r]]))


def test_start_of_the_weights():
    """Queries, keys and values start as in torch's own multi-head attention, all else Xavier; biases are zero."""
    torch.manual_seed(0)
    model = onenip.OneNIP(272, 14, onenip.Args(encoder_layers=1, decoder_layers=1))
    layer = model.encoder[0].attention
    torchs = torch.nn.MultiheadAttention(256, 8)
    ours = torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight])
    assert ours.std().item() == pytest.approx(torchs.in_proj_weight.std().item(), rel=0.01)
    assert ours.abs().max().item() == pytest.approx(math.sqrt(6 / (4 * 256)), rel=0.001)
    for linear in (layer.to_out, model.input, model.encoder[0].mlp[0]):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.001)
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("hidden", [16, 32])
def test_start_at_the_principal_axes(hidden):
    """--init pca: the first layer is scikit-learn's PCA with whitening, the last one its inverse; what of the 32 units
    is more than the 24 channels stays as it was drawn."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    model, _ = make(hidden=hidden)
    before = model.input.weight.clone()
    features = batch(b=40, seed=3)[0] * torch.linspace(0.1, 3, 24)[:, None, None] + 1
    model.start_at_axes(features)
    tokens = features.flatten(2).transpose(1, 2).reshape(-1, 24).double()  # (40, 24, 4, 4) -> (640, 24)
    count = min(hidden, 24)
    pca = decomposition.PCA(count, whiten=True, svd_solver="full").fit(tokens)
    with torch.no_grad():
        projected = model.double().input(tokens)[:, :count].flip(1)  # PCA's first axis is our last
        there_and_back = F.linear(projected.flip(1), model.output.weight[:, :count], model.output.bias)
    expected = torch.from_numpy(pca.transform(tokens.numpy()))
    signs = (projected * expected).sum(0).sign()
    torch.testing.assert_close(projected * signs, expected, atol=1e-4, rtol=1e-4)
    expected = torch.from_numpy(pca.inverse_transform(expected.numpy()))
    torch.testing.assert_close(there_and_back, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.input.weight[count:].float(), before[count:])


def test_jitter_has_the_stated_scale_and_is_off_in_evaluation():
    """Noise of standard deviation ‖token‖ · 20 / C on every token in training (feature jitter of UniAD)."""
    model, args = make(encoder_layers=0)
    torch.nn.init.eye_(model.input.weight)  # encode() = the first 24 of 32 entries are the jittered token
    features = torch.ones(400, 24, 4, 4)
    noise = model.train().encode(features)[..., :24] - 1
    assert noise.std().item() == pytest.approx(math.sqrt(24) * 20 / 24, rel=0.02)
    assert torch.equal(model.eval().encode(features)[..., :24], torch.ones(400, 16, 24))


# -------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("form, factor, smoothing", [("code", 1, 1), ("paper", 2, 0), ("smooth", 2, 1)])
def test_dice_loss(form, factor, smoothing):
    """Pixel by pixel against Eq. 7, against the form of the code, and against both together."""
    g = torch.Generator().manual_seed(0)
    predicted, mask = torch.rand(2, 5, 7, generator=g), (torch.rand(2, 5, 7, generator=g) > 0.7).float()
    total = 0.0
    for m_hat, m in zip(predicted.tolist(), mask.tolist()):
        overlap = squares_hat = squares = 0.0
        for row_hat, row in zip(m_hat, m):
            for a, b in zip(row_hat, row):
                overlap, squares_hat, squares = overlap + a * b, squares_hat + a * a, squares + b * b
        total += 1 - (factor * overlap + smoothing) / (squares_hat + squares + smoothing)
    assert onenip.dice_loss(predicted, mask, form).item() == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.parametrize("form, learns", [("code", True), ("paper", False), ("smooth", True)])
def test_dice_loss_of_a_normal_image(form, learns):
    """An empty mask: Eq. 7 as printed is the constant 1, so that nothing is learned from it, the smoothed forms push M̂
    down; and zeros against zeros give a number."""
    predicted = torch.full((2, 5, 7), 0.3, requires_grad=True)
    loss = onenip.dice_loss(predicted, torch.zeros(2, 5, 7), form)
    loss.backward()
    assert bool((predicted.grad > 0).all()) == learns and bool(predicted.grad.any()) == learns
    empty = torch.zeros(2, 5, 7, requires_grad=True)
    loss = onenip.dice_loss(empty, torch.zeros(2, 5, 7), form)
    loss.backward()
    assert loss.item() == (0 if learns else 1) and torch.isfinite(empty.grad).all()


def test_dice_loss_of_a_perfect_mask():
    """0 with factor 2; the code's form, which lacks it, stays at about one half."""
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:30, 10:30] = 1
    assert [round(onenip.dice_loss(mask, mask, form).item(), 2) for form in ("paper", "smooth", "code")] == [0, 0, 0.5]


@pytest.mark.parametrize("weights, factor, balance", [("code", 1.0, 1.0), ("paper", 0.5, 1.0), ("relative", 1.0, 8.0)])
def test_total_loss(weights, factor, balance):
    """Eq. 8: L_rec + L_res + λ L_seg; both feature losses have the normal features as target; L_seg runs over the
    normal images (empty mask) and the pseudo-anomalies."""
    model, args = make(loss_weights=weights, jitter=0.0)
    normal, synthetic, prompt = batch()
    mask = (torch.rand(3, 64, 64) > 0.9).float()
    model.eval()  # fixed batch statistics, so that two passes agree
    total, parts = onenip.losses(model, normal, synthetic, prompt, mask, args, balance)
    reconstructed, restored, predicted = model(normal, synthetic, prompt)
    rec, res = ((reconstructed - normal) ** 2).mean(), ((restored - normal) ** 2).mean()
    seg = (sum(onenip.dice_loss(predicted[i:i + 1], torch.zeros(1, 64, 64), "code") for i in range(3)) +
           sum(onenip.dice_loss(predicted[3 + i:4 + i], mask[i:i + 1], "code") for i in range(3))) / 6
    torch.testing.assert_close(torch.stack([parts["rec"], parts["res"], parts["seg"]]), torch.stack([rec, res, seg]))
    torch.testing.assert_close(total, balance * (rec + res) + factor * seg)


def test_relative_losses_do_not_depend_on_the_size_of_the_features():
    """--loss-weights relative: the errors of features a hundred times as small count as much; a variance of 32 counts
    as with code, and images of one colour give a number."""
    features = torch.randn(8, 5, 4, 4) * torch.arange(1, 6)[:, None, None] + 7
    for k in (1.0, 0.01):
        small, rebuilt = features * k, features * k + k * torch.ones_like(features)
        error = onenip.balance_of(small) * (rebuilt - small).square().mean()
        variance = features.var((0, 2, 3), correction=0).mean()
        torch.testing.assert_close(error, 32 / variance)
    assert math.isfinite(onenip.balance_of(torch.ones(2, 3, 4, 4)))


def test_ablations_drop_their_loss():
    for changes, names in ((dict(restoration=False), {"rec", "seg"}), (dict(refiner=False), {"rec", "res"}),
                           (dict(restoration=False, refiner=False), {"rec"})):
        model, args = make(**changes)
        normal, synthetic, prompt = batch()
        if names == {"rec"}:
            synthetic = None
        _, parts = onenip.losses(model, normal, synthetic, prompt, torch.zeros(3, 64, 64), args)
        assert set(parts) == names


@pytest.mark.parametrize("prompt", ["none", "static", "dynamic"])
def test_gradient_reaches_every_parameter(prompt):
    """No part of the model is dead, and the segmentation loss alone trains the transformer too (no detach)."""
    model, args = make(prompt=prompt)
    normal, synthetic, p = batch()
    p = None if prompt == "none" else p
    mask = (torch.rand(3, 64, 64) > 0.5).float()
    total, parts = onenip.losses(model, normal, synthetic, p, mask, args)
    parts["seg"].backward(retain_graph=True)
    assert model.input.weight.grad.abs().sum() > 0
    model.zero_grad()
    total.backward()
    # A key's bias shifts all logits of a query alike, which softmax ignores: its gradient is zero by construction. The
    # last dynamic block's x is read by the final attention, so everything else must have one.
    dead = [n for n, q in model.named_parameters() if not n.endswith("to_k.bias") and
            (q.grad is None or q.grad.abs().sum() == 0)]
    assert dead == []


def test_overfits_a_few_images():
    """200 steps on three images: the reconstruction error falls below a twentieth of the features' power, the mask is
    found (paper's Dice below 0.2)."""
    model, args = make(jitter=0.0, dice="paper")
    normal, synthetic, prompt = batch()
    normal = F.interpolate(F.avg_pool2d(normal, 2), scale_factor=2)  # smooth, as real features are
    mask = torch.zeros(3, 64, 64)
    mask[:, 16:40, 8:32] = 1
    synthetic = normal + 3 * F.interpolate(mask[:, None], (4, 4)) * synthetic
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss, parts = onenip.losses(model, normal, synthetic, prompt, mask, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        _, restored, predicted = model(normal, synthetic, prompt)
    assert F.mse_loss(restored, normal) < normal.square().mean() / 20
    assert onenip.dice_loss(predicted[3:], mask, "paper") < 0.2


# ----------------------------------------------------------------------------------------------- pseudo-anomalies


def photo(size=96, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((size, size)))


@pytest.mark.parametrize("kind", ["patch", "scar", "draem"])
def test_pseudo_anomalies_change_the_image_inside_the_mask_only(kind):
    textures = onenip.Textures("", 96)
    make = {"patch": onenip.cutpaste_patch, "scar": onenip.cutpaste_scar,
            "draem": lambda image, rng: onenip.draem(image, rng, textures(rng))}[kind]
    changed, areas = [], []
    for seed in range(60):
        image, rng = photo(seed=seed), np.random.default_rng(seed)
        before = image.copy()
        out, mask = make(image, rng)
        assert out.shape == image.shape and out.dtype == np.uint8 and mask.shape == (96, 96) and mask.dtype == bool
        assert np.array_equal(image, before), "the normal image itself must stay as it is"
        assert np.array_equal(out[~mask], image[~mask])
        areas.append(mask.mean())
        if mask.any():
            changed.append((out[mask] != image[mask]).any(-1).mean())
    assert np.median(changed) > 0.5
    low, high = {"patch": (0.015, 0.15), "scar": (0.0, 0.08), "draem": (0.0, 0.3)}[kind]
    assert low <= min(areas) and max(areas) <= high


def test_pseudo_anomalies_are_half_cutpaste_and_half_draem(monkeypatch):
    count = {"patch": 0, "scar": 0, "draem": 0}

    def counted(name):
        def stand_in(*_):
            count[name] += 1
            return photo(16), np.zeros((16, 16), bool)
        return stand_in

    monkeypatch.setattr(onenip, "cutpaste_patch", counted("patch"))
    monkeypatch.setattr(onenip, "cutpaste_scar", counted("scar"))
    monkeypatch.setattr(onenip, "draem", counted("draem"))
    rng = np.random.default_rng(0)
    for _ in range(4000):
        onenip.synthesize(photo(16), rng, lambda rng: None)
    assert count["patch"] + count["scar"] == pytest.approx(2000, abs=150)
    assert count["patch"] == pytest.approx(1000, abs=120)


def literal_perlin(size, cells, rng):
    """Perlin noise pixel by pixel, corner by corner."""
    angle = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    noise = np.zeros((size, size))
    for y, x in np.ndindex(size, size):
        at_y, at_x = y * cells[0] / size, x * cells[1] / size
        for i in (int(at_y), int(at_y) + 1):
            for j in (int(at_x), int(at_x) + 1):
                dy, dx = at_y - i, at_x - j
                weight = np.prod([1 - (6 * d**5 - 15 * d**4 + 10 * d**3) for d in (abs(dy), abs(dx))])
                noise[y, x] += weight * (np.cos(angle[i, j]) * dy + np.sin(angle[i, j]) * dx)
    return np.sqrt(2) * noise


@pytest.mark.parametrize("cells", [(1, 4), (8, 2), (16, 32)])
def test_perlin_noise_is_what_its_definition_gives(cells):
    """The separable form against the definition, with the same draws."""
    given = onenip.perlin(32, cells, np.random.default_rng(7))
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, literal_perlin(32, cells, np.random.default_rng(7)), atol=1e-6)


def literal_changes(t, rng_of):
    """Four of the changes of a texture, computed pixel by pixel in place of tables: {name: result}."""
    rng = rng_of()
    gamma = (t / 255) ** rng.uniform(0.5, 2.0, 3) * 255
    rng = rng_of()
    hsv, (hue, saturation) = np.array(Image.fromarray(t).convert("HSV")).astype(int), rng.integers(-50, 51, 2)
    hsv[..., 0] = (hsv[..., 0] + hue) % 256
    hsv[..., 1] = (hsv[..., 1] + saturation).clip(0, 255)
    rng = rng_of()
    solarized = t if rng.random() >= 0.5 else np.where(t >= rng.uniform(32, 128), 255 - t.astype(int), t)
    return {
        "_gamma": gamma.astype(np.uint8),
        "_hue_saturation": np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")),
        "_solarize": solarized,
    }


@pytest.mark.parametrize("seed", range(6))
def test_changes_of_levels_are_those_of_every_pixel(seed):
    """Tables of 256 levels give what the formula gives pixel by pixel (the gamma within one level: float32)."""
    texture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def rng_of():
        return np.random.default_rng(seed)

    for name, expected in literal_changes(texture, rng_of).items():
        given = getattr(onenip, name)(texture, rng_of())
        assert given.dtype == np.uint8
        assert np.abs(given.astype(int) - expected).max() <= (name == "_gamma"), name


def test_drawn_textures_have_the_colours_and_the_noise_that_were_drawn():
    """Two colours for all pixels and white noise of the drawn strength: where the grain is smooth, neighbours differ by
    the noise; over many textures its strength is uniform up to 20, as are the colours from 0 to 255."""
    draw = onenip.Textures("", 64).drawn
    strengths, means = [], []
    for seed in range(120):
        texture = draw(np.random.default_rng(seed)).astype(float)
        second = texture[:, 2:] - 2 * texture[:, 1:-1] + texture[:, :-2]
        strengths.append(np.median(np.abs(second)) / 0.6745 / 6**0.5)
        means.append(texture.mean((0, 1)))
    assert np.array(means).mean() == pytest.approx(127.5, abs=15)
    assert np.quantile(strengths, 0.1) < 8 and 8 < np.median(strengths) < 22


def test_perlin_noise():
    """Zero at the lattice points, within ±1 after the factor √2, smooth from pixel to pixel; and the mean area of
    DRAEM's masks is the measured 5 % (facts sheet: 5.2 %)."""
    rng = np.random.default_rng(0)
    noise = onenip.perlin(64, (4, 8), rng)
    assert np.abs(noise[::16, ::8]).max() < 1e-12 and np.abs(noise).max() <= 1.0
    assert np.abs(np.diff(noise, axis=0)).max() < 0.5
    flat = np.zeros((128, 128, 3), np.uint8)
    areas = [onenip.draem(flat, np.random.default_rng(i), flat)[1].mean() for i in range(150)]
    assert 0.04 < np.mean(areas) < 0.065


def test_texture_ops_keep_shape_and_type():
    """All ten changes of a texture, many draws: uint8 (S, S, 3) in, the same out; the input stays as it is."""
    assert len(onenip.TEXTURE_OPS) == 10
    for op in onenip.TEXTURE_OPS:
        for seed in range(8):
            texture = photo(32, seed)
            before = texture.copy()
            out = np.asarray(op(texture, np.random.default_rng(seed)))
            assert out.shape == (32, 32, 3) and out.dtype == np.uint8 and np.array_equal(texture, before)


def test_hue_and_saturation_shift_independently():
    """DRAEM adds one number of ±50 to the hue and another to the saturation (AddToHueAndSaturation, per channel)."""
    hsv = np.full((8, 8, 3), (100, 120, 200), np.uint8)
    texture = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    before, shifts = np.asarray(Image.fromarray(texture).convert("HSV")).astype(int)[0, 0], []
    for seed in range(300):
        changed = onenip._hue_saturation(texture, np.random.default_rng(seed))
        shifts.append(np.asarray(Image.fromarray(changed).convert("HSV")).astype(int)[0, 0] - before)
    shifts = np.array(shifts)
    assert np.abs(shifts[:, :2]).max() <= 53 and shifts[:, 0].std() > 24 and shifts[:, 1].std() > 24  # ±3: rounding
    assert abs(np.corrcoef(shifts[:, 0], shifts[:, 1])[0, 1]) < 0.2
    assert np.abs(shifts[:, 2]).max() <= 1


def test_solarize_inverts_what_is_at_or_above_its_threshold():
    """imgaug's Solarize(0.5, threshold=(32, 128)): half of the textures; dark values stay, bright ones are inverted."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    inverted = 0
    for seed in range(100):
        out = onenip._solarize(ramp, np.random.default_rng(seed))
        if np.array_equal(out, ramp):
            continue
        inverted += 1
        first = int(np.argmax(out.reshape(-1, 3)[:, 0] != np.arange(256)))
        assert 32 <= first <= 128
        expected = np.where(ramp < first, ramp, 255 - ramp)
        assert np.array_equal(out, expected)
    assert 35 < inverted < 65


def test_training_stream(tiny_data):
    """Sample k is a function of (seed, k); an epoch shows every image once; prompts are of the image's own class, all
    of them over time, or always the fixed one; a texture folder is used."""
    samples = data.load(str(tiny_data)).train
    images = data.Images(samples, 64)
    fixed = onenip.fixed_prompts(samples, onenip.Args(seed=3))
    assert fixed == onenip.fixed_prompts(samples, onenip.Args(prompt_seed=3))
    assert fixed != onenip.fixed_prompts(samples, onenip.Args())
    assert list(fixed) == sorted({s.cls for s in samples})
    assert all(samples[i].cls == cls for cls, i in fixed.items())
    args = onenip.Args(**TINY, seed=3)
    stream = onenip.Triplets(images, args, fixed, 7, needs_images=True)
    n = len(samples)
    assert stream.steps(epochs=2) == math.ceil(2 * n / 7), "no image of an epoch is dropped"
    items = [stream[k] for k in range(2 * n)]
    normal = [item["normal"]["index"] for item in items]
    prompt = [item["prompt"]["index"] for item in items]
    assert sorted(normal[:n]) == sorted(normal[n:]) == list(range(n)) and normal[:n] != normal[n:]
    assert all(samples[i].cls == samples[p].cls for i, p in zip(normal, prompt))
    assert normal != prompt
    again = onenip.Triplets(images, args, fixed, 7, needs_images=True)[n + 5]
    for part in ("normal", "prompt", "synthetic"):
        for key, value in again[part].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(items[n + 5][part][key]))
    for part in ("normal", "prompt"):
        assert torch.equal(again[part]["image"], images[again[part]["index"]])
    banked = onenip.Triplets(images, dataclasses.replace(args, bank=3), fixed, 7, needs_images=False)
    numbers = [banked[k]["synthetic"]["index"] for k in range(n)]
    assert [number // 3 for number in numbers] == normal[:n], "a pseudo-anomaly of this very image"
    assert {number % 3 for number in numbers} == {0, 1, 2} and banked[0]["normal"].keys() == {"index"}
    once = onenip.Triplets(images, dataclasses.replace(args, prompt_train="fixed"), fixed, 7, False)
    assert all(once[k]["prompt"]["index"] == fixed[samples[normal[k]].cls] for k in range(8))


def test_textures_from_a_folder(tmp_path):
    with pytest.raises(UsageError, match="none: no such"):
        onenip.Textures(str(tmp_path / "none"), 32)
    with pytest.raises(UsageError, match="--textures"):
        onenip.Textures(str(tmp_path), 32)
    Image.new("RGB", (40, 50), (10, 200, 30)).save(tmp_path / "green.jpg")
    assert np.abs(onenip.Textures(str(tmp_path), 32)(np.random.default_rng(0)).astype(int) - [10, 200, 30]).max() < 6


# ------------------------------------------------------------------------------------------------------- scoring


def test_combined_map_and_image_score():
    """S = (1 - α) S_rec + α c M̂; the score is the largest mean of a 16 x 16 window that lies inside the image."""
    g = torch.Generator().manual_seed(0)
    s_rec, mask = 10 * torch.rand(2, 24, 24, generator=g), torch.rand(2, 24, 24, generator=g)
    args = onenip.Args(alpha=0.25, image_size=24)
    s, score = onenip.combine(s_rec[:, None], mask[:, None].logit(), 7.0, args)
    torch.testing.assert_close(s, 0.75 * s_rec + 0.25 * 7.0 * mask)
    best = [max(s[b, i:i + 16, j:j + 16].mean() for i in range(9) for j in range(9)) for b in range(2)]
    torch.testing.assert_close(score, torch.stack(best))
    assert torch.equal(onenip.combine(s_rec[:, None], None, 7.0, args)[0], s_rec)


class Passing(torch.nn.Module):
    """Stands in for the frozen features: images are features already."""

    def forward(self, images):
        return images


def scorer(**changes):
    model, args = make(**changes)
    prompts = torch.randn(3, 24, 4, 4, generator=torch.Generator().manual_seed(5))
    run = runtime.Run("onenip", None, torch.device("cpu"))
    state = {"classes": ["a", "b", "c"], "scale": 2.0, "prompts": prompts}
    return onenip.Scorer(args, run, Passing(), model, state), prompts, model.eval(), args


def sample(name, cls):
    from pathlib import Path
    return data.Sample(Path(f"{name}.png"), None, 0, cls, "good", "")


def test_an_error_counts_by_the_magnitude_of_its_features():
    """--norm-power p: S_rec is multiplied by (||F|| / t)^p, t the mean of ||F|| over the prompts; of features of zero
    it stays finite."""
    x = torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(6))
    x = x * torch.tensor([0.2, 3.0])[:, None, None, None]
    plain, prompts, _, _ = scorer(refiner=False)
    error, _, _ = plain.reconstruct(x, [sample("x", "a"), sample("y", "b")])
    for power in (-0.5, 1.0):
        score, _, _, _ = scorer(refiner=False, norm_power=power)
        found, _, _ = score.reconstruct(x, [sample("x", "a"), sample("y", "b")])
        weight = (x.norm(dim=1, keepdim=True) / prompts.norm(dim=1).mean()) ** power
        torch.testing.assert_close(found, error * weight)
    score, _, _, _ = scorer(refiner=False, norm_power=-0.5)
    assert score.reconstruct(0 * x, [sample("x", "a"), sample("y", "b")])[0].isfinite().all()


def test_prompt_is_chosen_by_cosine_without_the_label():
    """Each image gets the prompt with the most similar pooled features, whatever its length and its label."""
    score, prompts, model, args = scorer()
    x = torch.stack([5 * prompts[2], 0.1 * prompts[0]])
    samples = [sample("x", "a"), sample("y", "a")]
    maps, scores = score(x, samples)
    assert [score.chosen["x.png"], score.chosen["y.png"]] == ["c", "a"]
    run = score.run
    assert onenip.selection_accuracy(run, score, samples) == 0.5
    unknown = [sample("x", "z"), sample("y", "z")]
    assert onenip.selection_accuracy(run, score, unknown) is None, "no accuracy is not an accuracy of 0"
    with torch.no_grad():
        s_rec = (model.decode(model.encode(x), model.encode(prompts[[2, 0]])) - x).norm(dim=1, keepdim=True)
    expected = F.interpolate(s_rec, (64, 64), mode="bilinear", align_corners=True)[:, 0]
    rest = (maps - 0.5 * expected) / (0.5 * 2.0)
    assert 0 < rest.min() and rest.max() < 1, "what is left must be the refiner's map"


@pytest.mark.parametrize("changes, used", [(dict(prompt_class="given"), 0), (dict(prompt_test="wrong"), 1),
                                           (dict(prompt_of="b"), 1), (dict(prompt_of="a"), 0)])
def test_prompt_of_the_given_or_of_a_wrong_class(changes, used):
    """Given: the true class's prompt though another is more similar; wrong: never that; or a named class's prompt."""
    score, prompts, model, args = scorer(**changes)
    p = score.prompts_of(prompts[[2]], [sample("x", "a")])
    with torch.no_grad():
        torch.testing.assert_close(p, model.encode(prompts[[used]]))


@pytest.mark.parametrize("prompt_test", ["fixed", "random"])
def test_frozen_features_are_never_computed_in_mixed_precision(prompt_test, tiny_data):
    """--amp is for the trained part: scoring, prompts and pooled features see the backbone as training saw it."""
    model, args = make(channels=3, prompt_test=prompt_test, image_size=64)
    seen = []

    class Watching(Passing):
        def forward(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return F.avg_pool2d(images.float(), 16)

    images = data.Images(data.load(str(tiny_data)).train, 64)
    classes = sorted({s.cls for s in images.samples})
    state = {"classes": classes, "scale": 1.0, "prompts": torch.randn(len(classes), 3, 4, 4)}
    run = runtime.Run("onenip", None, torch.device("cpu"), amp="bf16")
    score = onenip.Scorer(args, run, Watching(), model, state, images)
    score(images[0][None], images.samples[:1])
    assert seen == [False] * (2 if prompt_test == "random" else 1)


def test_a_random_prompt_is_of_the_chosen_class(tiny_data):
    """Table 4d: another image, but of the class whose prompt is wanted."""
    images, seen = data.Images(data.load(str(tiny_data)).train, 64), []

    class Watching(Passing):
        def forward(self, batch):
            seen.extend(batch)
            return F.avg_pool2d(batch.float(), 16)

    model, args = make(channels=3, prompt_test="random", prompt_class="given", image_size=64)
    classes = sorted({sample.cls for sample in images.samples})
    state = {"classes": classes, "scale": 1.0, "prompts": torch.randn(8, 3, 4, 4)}
    run = runtime.Run("onenip", None, torch.device("cpu"))
    score = onenip.Scorer(args, run, Watching(), model, state, images)
    samples = images.samples[::6]  # one of each class
    score.prompts_of(torch.randn(8, 3, 4, 4), samples)
    assert len(seen) == 8
    for picture, of_class in zip(seen, samples):
        own = [images[i] for i, other in enumerate(images.samples) if other.cls == of_class.cls]
        assert any(torch.equal(picture, image) for image in own), of_class.cls


def test_the_scale_is_midway_over_normal_and_pseudo_anomalous_errors(tiny_data, monkeypatch):
    """Departure 4: c = (max + min)/2 of S_rec over both."""
    images = data.Images(data.load(str(tiny_data), classes=["screw"]).train, 64)
    args = onenip.Args(image_size=64, prompt="none", refiner=False, batch_size=6)
    errors = iter([torch.linspace(1, 3, 96).view(6, 1, 4, 4), torch.linspace(2, 9, 96).view(6, 1, 4, 4)])
    monkeypatch.setattr(onenip, "reconstruct", lambda *_: (next(errors), None, None))
    run = runtime.Run("onenip", None, torch.device("cpu"))
    stream = onenip.Triplets(images, args, {"screw": 0}, 6, False)
    seen = []

    def frozen(batch):
        seen.extend(batch["index"].tolist())

    found = onenip.training_statistics(args, run, frozen, lambda x: None, SimpleNamespace(prompt="none"), stream,
                                       {"classes": ["screw"], "prompts": torch.ones(1, 3, 4, 4)})
    assert found["scale"] == pytest.approx((1 + 9) / 2)
    assert sorted(seen) == list(range(6)), "every training image once"
    assert found["normal_errors"].shape == (6, 1, 4, 4) and found["normal_logits"] is None


def test_the_scale_of_the_test_set_is_midway_over_its_errors(tiny_data):
    """The authors' c, over all test images, in batches whose last one is smaller."""
    dataset = data.load(str(tiny_data), classes=["screw"])  # 7 test images
    args = onenip.Args(image_size=64, batch_size=3, workers="0")
    run = runtime.Run("onenip", None, torch.device("cpu"))
    seen = []

    def reconstruct(batch, samples):
        assert len(batch) == len(samples)
        first = len(seen)
        seen.extend(samples)
        errors = torch.arange(first, first + len(batch)).float() + 1  # 1 to 7
        return errors.view(-1, 1, 1, 1).expand(-1, 1, 4, 4), None, None

    found = onenip.scale_of_test_set(args, run, SimpleNamespace(reconstruct=reconstruct), dataset)
    assert seen == dataset.test and found == pytest.approx((1 + 7) / 2)


def test_opacity_of_draem(monkeypatch):
    """Opacity 1 - β, β ~ U(0, 0.8): of a texture on black a fifth to all is seen."""
    monkeypatch.setattr(onenip, "TEXTURE_OPS", [lambda texture, rng: texture] * 10)
    image, texture, shares = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 250, np.uint8), []
    for seed in range(200):
        out, mask = onenip.draem(image, np.random.default_rng(seed), texture)
        if mask.any():
            shares.append(out[mask].mean() / 250)
    assert min(shares) > 0.19 and max(shares) > 0.95 and np.mean(shares) == pytest.approx(0.6, abs=0.05)


def test_colour_jitter_has_the_stated_ranges():
    """Brightness by 1 ± 0.4, hue by ± 0.1 of the circle (of which PIL makes 256 parts)."""
    grey, red = (Image.new("RGB", (4, 4), colour) for colour in ((120, 120, 120), (200, 40, 40)))
    levels, hues = [], []
    for seed in range(300):
        levels.append(np.asarray(onenip.colour_jitter(grey, np.random.default_rng(seed)))[0, 0, 0] / 120)
        hsv = onenip.colour_jitter(red, np.random.default_rng(seed)).convert("HSV")
        hues.append(np.asarray(hsv)[0, 0, 0].astype(np.int8))
    assert 0.59 <= min(levels) < 0.65 and 1.35 < max(levels) <= 1.41
    assert -28 <= min(hues) < -20 and 20 < max(hues) <= 28


def test_score_of_an_image_does_not_depend_on_its_batch():
    score, _, _, _ = scorer()
    x, samples = torch.randn(4, 24, 4, 4), [sample(i, "a") for i in range(4)]
    together = score(x, samples)[0]
    alone = torch.cat([score(x[i:i + 1], samples[i:i + 1])[0] for i in range(4)])
    torch.testing.assert_close(together, alone)


# ---------------------------------------------------------------------------------- the program, as a user runs it


SMALL = ("--image-size", 64, "--hidden", 32, "--heads", 2, "--mlp", 64, "--encoder-layers", 1, "--decoder-layers", 1,
         "--refiner-width", 8, "--batch-size", 8, "--steps", 12, "--bank", 0, "--log-every", 4, "--checkpoint-every", 4)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    return contract.first_run(onenip, ("--data", tiny_data, *SMALL), tmp_path_factory.mktemp("runs"))


def test_end_to_end(finished):
    """Train, evaluate, report: every file of the contract, and numbers in it that belong together."""
    result, log, state, _ = contract.check_files(finished, "onenip")
    assert result["setting"]["textures"] == "drawn by code"
    assert result["mean"]["p_auroc"] > 0.55, "twelve steps on pretrained features beat chance by far"
    assert [line["step"] for line in log] == [4, 8, 12] and {"loss", "rec", "res", "seg", "lr"} <= set(log[0])
    assert state["step"] == 12 and state["classes"] == sorted(result["classes"])


def test_second_run_and_evaluation_of_the_checkpoint_are_identical(finished, tiny_data, tmp_path, command, metrics_of):
    """Same seed, same machine: the same bits; --eval of the checkpoint gives its numbers; another seed others."""
    first = metrics_of(finished[0])
    assert command("onenip", "--data", tiny_data, "--out", tmp_path / "again", *SMALL).status == 0
    assert metrics_of(tmp_path / "again") == first
    done = command("onenip", "--eval", finished[0] / "checkpoint.pt", "--out", tmp_path / "eval")
    assert done.status == 0 and metrics_of(tmp_path / "eval") == first
    assert command("onenip", "--data", tiny_data, "--out", tmp_path / "other", *SMALL, "--seed", 1).status == 0
    assert metrics_of(tmp_path / "other")["mean"] != first["mean"]


def test_metrics_by_epoch_change_nothing_and_end_at_the_result(tiny_data, tmp_path, command, metrics_of, monkeypatch):
    """--eval-every: the test metrics on the way are lines of the log; weights and result are those of the run without
    it, and the last line is the result itself. An interrupted and resumed run has the same lines."""
    words = ("--data", tiny_data, *SMALL, "--classes", "screw,capsule",  # 12 images, 8 a step
             "--dropout", 0.1, "--loss-weights", "relative")
    every = ("--eval-every", 1.4, "--steps", 12)  # 3 steps
    assert command("onenip", *words, "--out", tmp_path / "plain").status == 0
    assert command("onenip", *words, *every, "--out", tmp_path / "run").status == 0
    plain, result = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "run")
    assert result == plain
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("plain", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    log = contract.read_log(tmp_path / "run")
    tests = [line for line in log if "test" in line]
    assert [(line["step"], line["epoch"]) for line in tests] == [(3, 2), (6, 4), (9, 6), (12, 8)]
    assert tests[-1]["test"] == result["mean"] != tests[0]["test"]
    losses = [[line["loss"] for line in lines if "loss" in line]
              for lines in (log, contract.read_log(tmp_path / "plain"))]
    assert losses[0] == losses[1] and len(losses[0]) == 3

    seen, losses = [], onenip.losses

    def interrupted(*inputs):
        seen.append(inputs)
        if len(seen) == 7:  # after a checkpoint at step 4 and a test at step 6
            raise KeyboardInterrupt
        return losses(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(onenip, "losses", interrupted)
        assert command("onenip", *words, *every, "--out", tmp_path / "resumed").status == 130
    assert {inputs[-1] for inputs in seen} != {1.0}  # --loss-weights relative reaches the losses
    assert command("onenip", "--resume", "--out", tmp_path / "resumed").status == 0
    again = contract.read_log(tmp_path / "resumed")
    assert [line for line in again if "test" in line] == tests and len(again) == len(log)
    assert metrics_of(tmp_path / "resumed") == plain


def test_every_step_goes_through_the_parallel_model(tiny_data, tmp_path, command, monkeypatch):
    """Protects torchrun, which averages the gradients of what goes through it."""
    words = ("--data", tiny_data, "--classes", "screw", *SMALL, "--steps", 2)
    contract.check_every_step_is_parallel(onenip, words, [2], tmp_path / "run", command, monkeypatch)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_is_uninterrupted(finished, tiny_data, tmp_path, command, metrics_of):
    """SIGKILL between two checkpoints, then --resume: the numbers and the log of the run that was never interrupted."""
    words = ("--data", tiny_data, *SMALL)
    contract.check_killed_and_resumed(onenip, words, finished, tmp_path / "run", command, metrics_of)


def test_predict(finished, tiny_data, tmp_path, command):
    """The method's own columns: the score as a share of the training images' 99 %, and the class of the prompt."""
    contract.check_predict(onenip, ("prompt",), finished, tiny_data, tmp_path / "p", command)


def test_prompts_of_another_draw_and_of_a_named_class(finished, tmp_path, command, metrics_of):
    """Table 4d by evaluations of one checkpoint: other fixed prompts by --prompt-seed, and a class's by --prompt-of."""
    checkpoint = finished[0] / "checkpoint.pt"

    def scores(name, *words):
        done = command("onenip", "--eval", checkpoint, "--out", tmp_path / name, *words)
        assert done.status == 0, done.err
        return (tmp_path / name / "scores.csv").read_text()

    trained = (finished[0] / "scores.csv").read_text()
    drawn = {seed: scores(f"seed{seed}", "--prompt-seed", seed) for seed in (0, 1, 2)}
    assert drawn[0] == trained, "the training drew its prompts with --seed 0"
    assert len({trained, *drawn.values()}) == 3
    assert scores("seed", "--seed", 9) == trained
    random = scores("random", "--prompt-test", "random")
    assert scores("again", "--prompt-test", "random", "--prompt-seed", 0) == random
    assert scores("other", "--prompt-test", "random", "--prompt-seed", 1) != random
    named = scores("named", "--prompt-of", "screw").split()
    for before, now in zip(trained.split(), named):
        assert (before == now) == ("path" in before or "screw" in before), "screws have this prompt anyway"
    assert metrics_of(tmp_path / "named")["setting"]["prompt"] == "dynamic, fixed, of screw"


def test_evaluation_on_classes_that_the_model_does_not_know(tiny_data, tmp_path, command, metrics_of):
    """Nothing is said that is not so: no accuracy of the selection, no true class's prompt; --prompt-seed gives these
    classes prompts of their own."""
    words = ("--data", tiny_data, *SMALL, "--steps", 1)
    assert command("onenip", *words, "--classes", "screw,capsule", "--out", tmp_path / "run").status == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    words = ("--eval", checkpoint, "--classes", "hex_nut,wood_planks", "--prompt-class", "given")
    assert command("onenip", *words, "--out", tmp_path / "unknown").status == 0
    setting = metrics_of(tmp_path / "unknown")["setting"]
    assert setting["prompt selection accuracy"] is None
    assert setting["prompt"] == ("dynamic, fixed, given (selected for the classes without a prompt: "
                                 "hex_nut, wood_planks)")
    assert command("onenip", *words, "--prompt-seed", 0, "--out", tmp_path / "drawn").status == 0
    assert metrics_of(tmp_path / "drawn")["setting"]["prompt"] == "dynamic, fixed, given"
    assert metrics_of(tmp_path / "drawn")["setting"]["prompt selection accuracy"] is not None


def test_predict_compares_with_normal_images_scored_alike(finished, tmp_path, command):
    """With other scoring options the training images' score is made anew. Eq. 10 as printed, in which M̂ weighs next to
    nothing beside S_rec, must give the ratio of S_rec alone, though its scores are smaller."""
    path = list(csv.DictReader(open(finished[0] / "scores.csv")))[3]["path"]

    def predicted(*words):
        out = tmp_path / "-".join(map(str, words))
        done = command("onenip", "--eval", finished[0] / "checkpoint.pt", "--predict", path, "--out", out, *words)
        assert done.status == 0, done.err
        row = next(csv.DictReader(open(out / "predictions.csv")))
        return float(row["score"]), float(row["ratio"])

    score, ratio = predicted("--alpha", 0)
    printed, printed_ratio = predicted("--score-scale", "none")
    alpha = onenip.PRESETS["laptop"]["alpha"]
    assert (1 - alpha) * score <= printed <= (1 - alpha) * score + alpha
    assert printed_ratio == pytest.approx(ratio, rel=0.1)
    one_pixel, ratio_of_pixels = predicted("--alpha", 0, "--pool", 1)
    assert one_pixel > score and ratio_of_pixels == pytest.approx(ratio, rel=0.5)

    state = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    args = onenip.Args(**{**state["args"], "alpha": 0.0, "pool": 64})
    means = F.interpolate(state["normal_errors"], (64, 64), mode="bilinear", align_corners=True).mean((1, 2, 3))
    found = onenip.normal_thresholds(args, state, 1.0)
    assert found["normal_score"] == pytest.approx(means.quantile(0.99).item(), rel=1e-5)


def test_corruption_and_options_at_evaluation(finished, tmp_path, command, metrics_of):
    """--corrupt and the scoring options act on a finished checkpoint; each leaves its trace in the numbers."""
    first, checkpoint = metrics_of(finished[0]), finished[0] / "checkpoint.pt"
    for i, words in enumerate((("--corrupt", "gaussian_noise:5"), ("--alpha", 0), ("--prompt-test", "wrong"),
                               ("--prompt-test", "random"), ("--score-scale", "test"),
                               ("--score-scale", "none"))):
        assert command("onenip", "--eval", checkpoint, "--out", tmp_path / str(i), *words).status == 0, words
        assert metrics_of(tmp_path / str(i))["mean"] != first["mean"], words
    assert metrics_of(tmp_path / "0")["data"].endswith("gaussian_noise:5")


@pytest.mark.parametrize("words", [
    ("--prompt", "none"), ("--prompt", "static"), ("--no-restoration",), ("--no-refiner",),
    ("--no-refiner", "--no-restoration"), ("--prompt-train", "fixed"), ("--memory-share", 0), ("--amp", "bf16"),
    ("--dropout", 0.1), ("--loss-weights", "relative"),
    ("--bank", 2)])
def test_every_ablation_runs(words, tiny_data, tmp_path, command, metrics_of):
    """Every row of Tables 2 to 4 is one flag; memory that is too small changes the way, not the result's form."""
    out = tmp_path / "run"
    small = ("--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--steps", 2)
    done = command("onenip", *small, *words, "--out", out)
    assert done.status == 0, done.err
    assert set(metrics_of(out)["classes"]) == {"screw", "capsule"}
    assert ("prompt selection accuracy" in metrics_of(out)["setting"]) == ("none" not in words)


def test_features_computed_on_the_fly_train_the_same_model(tiny_data, tmp_path, command):
    # principal axes of nearly equal variance turn with the last digits of the features
    words = ("--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--steps", 3, "--log-every", 1,
             "--init", "xavier")
    contract.check_features_on_the_fly(onenip, words, tmp_path, command)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tested on Linux and macOS")
def test_two_processes_follow_one_with_the_doubled_batch(tiny_data, tmp_path):
    """torchrun: the gradients of two steps (AdamW's running mean of them) agree within float error where
    nothing depends on batch statistics or noise; evaluation is shared out and gathered; rank 0 alone writes."""
    words = [onenip.__file__, "--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--steps", 2, "--no-refiner",
             "--jitter", 0, "--dropout", 0, "--log-every", 1, "--clip", 1e9, "--amp", "off", "--lr", 1e-4]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words):
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env)

    one = run(sys.executable, *words, "--batch-size", 8, "--out", tmp_path / "one")
    two = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words,
              "--batch-size", 4, "--out", tmp_path / "two")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys() and len(a["optimizer"]["state"]) > 20
    largest = max(state["exp_avg"].abs().max().item() for state in a["optimizer"]["state"].values())
    for i, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][i]
        torch.testing.assert_close(other["exp_avg"], state["exp_avg"], rtol=2e-3, atol=1e-5 * largest)
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")] for name in ("one", "two")]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert a["images"] == b["images"] == 14
    for key, value in a["mean"].items():
        assert b["mean"][key] == pytest.approx(value, abs=0.02)
    assert len(list(csv.reader(open(tmp_path / "two" / "scores.csv")))) == 15


def test_bad_input_ends_in_one_line_and_status_2(finished, tiny_data, tmp_path, command):
    """Forty mistakes of users: one clear line on stderr that names the culprit, status 2, no traceback, and neither
    a run folder nor a half-written file left behind."""
    checkpoint = finished[0] / "checkpoint.pt"
    bad = tmp_path / "bad"

    def picture(mode="RGB"):
        return Image.new(mode, (32, 32))

    def layout(name, **files):
        """A folder in MVTec layout with one class 'nut', then changed by `files` (path with __ for /: content)."""
        root = bad / name / "nut"
        for where in ("train/good/0.png", "test/good/0.png", "test/hole/0.png"):
            (root / where).parent.mkdir(parents=True, exist_ok=True)
            picture().save(root / where)
        (root / "ground_truth/hole").mkdir(parents=True)
        picture(mode="L").save(root / "ground_truth/hole/0_mask.png")
        for where, content in files.items():
            path = root / where.replace("__", "/").replace("_png", ".png")
            path.unlink() if content is None else path.write_bytes(content)
        return bad / name

    cut = (tiny_data / "screw/train/good/000.png").read_bytes()[:900]
    good = layout("good")
    Image.new("L", (16, 32), 255).save(layout("mask_size") / "nut/ground_truth/hole/0_mask.png")
    (bad / "empty").mkdir()
    torch.save({"method": "roads", "args": {}, "model": {}}, bad / "roads.pt")
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "finished": [], "step": 4}, bad / "interrupted.pt")
    (bad / "half.pt").write_bytes(checkpoint.read_bytes()[:5000])
    (bad / "a_file").write_text("")
    (bad / "text").mkdir()
    (bad / "text" / "photo.png").write_text("no picture")
    cases = [
        (("--data", tiny_data / "screw" / "train", "--score-scale", "test"), "--score-scale"),
        (("--data", bad / "nowhere"), "nowhere"),
        (("--data", "mvtec", "--data-root", bad), "mvtec"),
        (("--data", bad / "empty"), "empty"),
        (("--data", layout("untrained", train__good__0_png=None)), "nut"),
        (("--data", layout("unreadable", train__good__0_png=b"not a picture")), "0.png"),
        (("--data", layout("truncated", test__good__0_png=cut)), "0.png"),
        (("--data", bad / "mask_size"), "0_mask.png"),
        (("--data", tiny_data, "--classes", "screw,spoon"), "spoon"),
        (("--data", tiny_data, "--steps", "many"), "--steps"),
        (("--data", tiny_data, "--lr", "-1"), "--lr"),
        (("--data", tiny_data, "--image-size", "100"), "--image-size"),
        (("--data", tiny_data, "--heads", "3"), "--hidden"),
        (("--data", tiny_data, "--bank", "2", "--memory-share", "0"), "--bank"),
        (("--data", tiny_data, "--hiden", "100"), "--hiden"),
        (("--data", tiny_data, "--backbone", "vgg16"), "--backbone"),
        (("--data", tiny_data, "--weights", bad / "none.pth"), "none.pth"),
        (("--data", tiny_data, "--weights", bad / "a_file"), "a_file"),
        (("--data", tiny_data, "--corrupt", "fog"), "fog"),
        (("--data", tiny_data, "--corrupt", "brightness:9"), "9"),
        (("--data", tiny_data, "--textures", bad / "empty"), "--textures"),
        (("--data", tiny_data, "--out", bad / "a_file"), "a_file"),
        (("--data", tiny_data, "--out", finished[0]), "--overwrite"),
        (("--data", tiny_data, "--out", bad / "none", "--resume"), "--resume"),
        (("--eval", bad / "none.pt"), "none.pt"),
        (("--eval", bad / "half.pt"), "half.pt"),
        (("--eval", bad / "roads.pt"), "roads.pt"),
        (("--eval", checkpoint, "--encoder-layers", "3"), "checkpoint.pt"),
        (("--predict", bad / "text" / "photo.png"), "--eval"),
        (("--eval", checkpoint, "--predict", bad / "empty"), "empty"),
        (("--eval", checkpoint, "--predict", good, "--score-scale", "test"), "--score-scale train"),
        (("--eval", checkpoint, "--predict", good, "--prompt-test", "random"), "--prompt-test fixed"),
        (("--eval", checkpoint, "--predict", good, "--prompt-seed", "1"), "--prompt-seed"),
        (("--eval", checkpoint, "--predict", good, "--norm-power", "1"), "--norm-power"),
        (("--eval", checkpoint, "--predict", good, "--prompt-class", "given"), "--prompt-class"),
        (("--eval", checkpoint, "--norm-power", "1"), "--score-scale"),
        (("--eval", checkpoint, "--prompt-test", "random", "--data", good), "no training images of capsule"),
        (("--eval", checkpoint, "--prompt-test", "random", "--classes", "screw"), "no training images of capsule"),
        (("--eval", checkpoint, "--prompt-of", "spoon"), "spoon"),
        (("--eval", checkpoint, "--prompt-of", "screw", "--prompt-test", "wrong"), "--prompt-of"),
        (("--data", tiny_data, "--classes", "screw", "--prompt-test", "wrong"), "one class only"),
        (("--eval", bad / "interrupted.pt"), "step 4"),
        (("--data", tiny_data, "--lr", "1e30", "--clip", "1e30"), "NaN"),
    ]
    if not torch.cuda.is_available():
        cases += [(("--data", tiny_data, "--device", "cuda"), "--device cuda"),
                  (("--data", tiny_data, "--kernels", "triton"), "--kernels")]
    contract.check_bad_input(onenip, cases, SMALL, finished, tmp_path, command)
    # the layout itself is fine
    assert command("onenip", "--data", good, "--out", tmp_path / "good", *SMALL).status == 0


def test_real_classes(real_data, tmp_path, command, metrics_of):
    """Real photographs: a short training of two real classes localises defects far better than chance."""
    done = command("onenip", "--data", real_data, "--classes", "bottle,metal_plate", "--out", tmp_path / "run",
                   "--steps", 80, "--image-size", 128)
    assert done.status == 0, done.err
    assert metrics_of(tmp_path / "run")["mean"]["p_auroc"] > 0.7


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_bank_is_what_one_process_makes_one_by_one(workers, tiny_data, tmp_path):
    """Whoever makes them: picture by picture those of `pseudo_anomaly`. What does not fit is refused before any is
    made."""
    dataset = onenip.data.load(str(tiny_data), None, ["screw"])
    args = onenip.Args(bank=3, image_size=64, workers=workers)
    images = onenip.data.Images(dataset.train, 64)
    stream = onenip.Triplets(images, args, {"screw": 0}, 2, False)
    run = onenip.runtime.Run("onenip", tmp_path, torch.device("cpu"))

    class Pixels:
        def __call__(self, pictures):
            return pictures.float()

        def split(self, rows):
            return rows

    bank = onenip.Bank(args, run, Pixels(), stream)
    numbers = torch.tensor([17, 0, 4])
    pictures, masks = bank({"index": numbers})
    for k, picture, mask in zip(numbers.tolist(), pictures, masks):
        expected, expected_mask = stream.pseudo_anomaly(k // 3, k)
        assert torch.equal(picture, expected.float()) and torch.equal(mask, expected_mask.float())
    args.memory_share = 0.0
    with pytest.raises(UsageError, match="--bank 3 does not fit"):
        onenip.Bank.check_memory(args, run, len(images))
