"""CADA: sizes against the facts of the three bases, every loss and the gradient mask of hard mining against literal
transcriptions, what learns and what must not, the calibration on maps whose right answer is known, what is reported,
and the whole program through its command line: resumed in both stages, --base-run, and every ablation."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cada
import contract
import onenip
from common import UsageError, backbones, data, papers, runtime

CHANNELS, SIDES = (16, 24, 32), (16, 8, 4)  # of a small teacher at 64 px
BASES = ("revdist", "recontrast", "uniad")
TINY = dict(image_size=64, depths="1,1,1,1", backbone="efficientnet_lite0", weights="random", hidden=16, heads=2,
            mlp=32, layers=1, attention_dropout=0.0, jitter=0.0)


def size(*parts):
    return sum(p.numel() for part in parts for p in part.parameters())


def make(base="revdist", seed=0, **changes):
    """A small base, its frozen features and its options."""
    args = cada.Args(**{**TINY, **changes, "base": base})
    features = cada.BASES[base].features(args)
    torch.manual_seed(seed)
    return cada.BASES[base](args, features.channels, features.sides), features, args


def pictures(b=3, size=64, seed=1):
    """Random smooth uint8 images."""
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(b, 3, 5, 5, generator=g) * 255, (size, size), mode="bilinear").byte()


def forward(model, features, images):
    return model(features.split(features(images)), images)


def pairs(b=3, n=3, seed=2):
    """n target maps and reconstructions that resemble them, more so in some places."""
    g = torch.Generator().manual_seed(seed)
    targets = [torch.randn(b, c, s, s, generator=g) for c, s in zip(CHANNELS * 2, SIDES * 2)][:n]
    noise = [torch.randn(t.shape, generator=g) * torch.rand(b, 1, *t.shape[2:], generator=g) for t in targets]
    return targets, [t + n for t, n in zip(targets, noise)]


def sample(name, cls="a", label=0):
    return data.Sample(name, None, label, cls, "good" if label == 0 else "dent", "drawn")


# --------------------------------------------------------------------------------------------------------- sizes


def test_parameter_counts_of_the_paper_models():
    """Wide-ResNet-50-2: neck 58,885,120 and decoder 24,917,504; ReContrast's decoder with its six heads 27,673,600, and
    a second encoder. UniAD at 14x14 and 16x16."""
    wide = dict(depths="3,3,4,6", backbone="wide_resnet50_2", weights="random")
    with torch.device("meta"):
        teacher = backbones.build("wide_resnet50_2", "random", (1, 2, 3))
        revdist = cada.RevDist(cada.Args(**wide), teacher.channels, (64, 32, 16))
        recontrast = cada.ReContrast(cada.Args(**wide, base="recontrast"), teacher.channels, (64, 32, 16))
        uniad = {side: cada.UniAD(cada.Args(base="uniad"), [272], [side]) for side in (14, 16)}
    assert size(revdist.neck) == 58_885_120 and size(revdist.decoder) == 24_917_504
    assert size(recontrast.neck) == 58_885_120
    assert size(recontrast.decoder, recontrast.heads) == 27_673_600
    assert size(recontrast.encoder) == size(teacher) == 24_862_528
    assert size(uniad[14]) == 7_717_392 and size(uniad[14].encoder) == 3_159_040
    assert size(uniad[14].decoder) + size(uniad[14].norm) == 4_414_976
    assert size(uniad[16]) == 7_779_344
    assert revdist.phi_channels == 2048 and uniad[14].phi_channels == 256


def test_uniad_is_onenips_without_prompt():
    """The same weights in `onenip.py --prompt none` give the same reconstruction."""
    args = dict(hidden=16, heads=2, mlp=32, jitter=0.0)
    ours, _, _ = make("uniad", layers=2)
    theirs = onenip.OneNIP(ours.channels, ours.side, onenip.Args(
        **args, image_size=64, encoder_layers=2, decoder_layers=2, prompt="none", refiner=False, restoration=False))
    assert size(ours) == size(theirs)
    for mine, other in zip(ours.encoder, theirs.encoder):
        for a, b in ((mine.attentions[0], other.attention), (mine.mlp, other.mlp), (mine.norms[0], other.norm1),
                     (mine.norms[1], other.norm2)):
            b.load_state_dict(a.state_dict())
    for mine, other in zip(ours.decoder, theirs.decoder):
        other.query.data.copy_(mine.query)
        for a, b in ((mine.attentions[0], other.encoder_attention), (mine.attentions[1], other.previous_attention),
                     (mine.mlp, other.mlp), *zip(mine.norms, (other.norm1, other.norm2, other.norm3))):
            b.load_state_dict(a.state_dict())
    for name in ("input", "output", "norm"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    for name in ("row", "column"):
        getattr(theirs, name).data.copy_(getattr(ours, name))
    f = torch.randn(2, ours.channels, 4, 4)
    _, (rebuilt,), phi = ours.eval()([f], None)
    x = theirs.eval().encode(f)
    torch.testing.assert_close(rebuilt, theirs.decode(x, None))
    torch.testing.assert_close(phi, x.transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_shapes(base, backbone):
    """Reconstructions have their targets' shapes; φ has the announced channels; one map and one score per image."""
    for image_size in (64, 96):
        model, features, args = make(base, backbone=backbone, image_size=image_size)
        targets, rebuilt, phi = forward(model.eval(), features, pictures(2, image_size))
        assert [r.shape for r in rebuilt] == [t.shape for t in targets]
        assert len(rebuilt) == {"revdist": 3, "recontrast": 6, "uniad": 1}[base]
        side = image_size // (16 if base == "uniad" else 32)
        assert phi.shape == (2, model.phi_channels, side, side)
        maps = model.anomaly_map(targets, rebuilt, args)
        assert maps.shape == (2, image_size, image_size)


@pytest.mark.parametrize("backbone, signed", [("resnet18", False), ("efficientnet_lite0", True)])
def test_decoder_can_be_negative_where_its_teacher_is(backbone, signed):
    """ResNet's maps end with a ReLU, and a stage of the decoder with a GELU, whose least value is -0.17; EfficientNet's
    are signed, and what could not be rebuilt would be an error in every normal image."""
    model, features, _ = make(backbone=backbone)
    targets, rebuilt, _ = forward(model, features, pictures())
    for f, ours in zip(targets, rebuilt):
        assert (f < -0.2).any().item() is (ours < -0.2).any().item() is signed


def test_features_survive_the_row():
    """RevDist: the backbone's three maps; UniAD: all resized to stride 16 and joined. No gradient, always eval."""
    images = pictures(2)
    for base in ("revdist", "uniad"):
        args = cada.Args(**TINY, base=base)
        features = cada.BASES[base].features(args).train()
        stages = None if base == "uniad" else backbones.pyramid_stages(args.backbone)
        assert not any(p.requires_grad for p in features.parameters())
        backbone = backbones.build(args.backbone, args.weights, stages)
        expected = backbone(data.normalize(images))
        if base == "uniad":
            expected = [torch.cat([F.interpolate(m, (4, 4), mode="bilinear", align_corners=True) for m in expected], 1)]
        for got, own in zip(features.split(features(images)), expected, strict=True):
            torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-3 * own.abs().max().item())


# -------------------------------------------------------------------------------------------------------- losses


def cosine(a, b):
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("form", ["flat", "location"])
def test_cosine_losses(form):
    """flat: one cosine per image over C·h·w numbers; location: one per position over C. Mean, then sum over scales."""
    model, _, args = make(cosine=form)
    targets, rebuilt = pairs()
    expected = 0
    for t, r in zip(targets, rebuilt):
        t, r = t.numpy(), r.numpy()
        if form == "flat":
            each = [1 - cosine(a.ravel(), b.ravel()) for a, b in zip(t, r)]
        else:
            each = [1 - cosine(a[:, i, j], b[:, i, j]) for a, b in zip(t, r) for i in range(a.shape[1])
                    for j in range(a.shape[2])]
        expected += np.mean(each)
    assert model.loss(targets, rebuilt, 0.5, args).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("progress, k", [(0.0, -3.0), (0.05, -1.0), (0.1, 1.0), (0.7, 1.0)])
def test_recontrast_loss_and_its_gradient_mask(progress, k):
    """Literally: (Σ three scales)/2 + (Σ three scales)/2; the gradient of each reconstruction is that of the flattened
    cosine, times 0 where the distance is below mean + k std over the batch. The mask is a constant of the graph."""
    model, _, args = make("recontrast")
    targets, rebuilt = pairs(n=6)
    leaves = [r.clone().requires_grad_() for r in rebuilt]
    loss = model.loss(targets, leaves, progress, args)
    loss.backward()
    expected, masked = 0, 0
    for t, r, leaf in zip(targets, rebuilt, leaves):
        expected += np.mean([1 - cosine(a.ravel(), b.ravel()) for a, b in zip(t.numpy(), r.numpy())]) / 2
        t, r, b = t.double().numpy(), r.double().numpy(), len(t)
        distance = np.array([[[1 - cosine(t[n, :, i, j], r[n, :, i, j]) for j in range(t.shape[3])]
                              for i in range(t.shape[2])] for n in range(b)])
        threshold = distance.mean() + k * distance.std(ddof=1)
        for n in range(b):
            x, y = t[n].ravel(), r[n].ravel()
            nx, ny = np.linalg.norm(x), np.linalg.norm(y)
            gradient = -(x / (nx * ny) - np.dot(x, y) * y / (nx * ny ** 3)) / b / 2  # of (1 - cos) / b / 2
            gradient = gradient.reshape(t[n].shape) * (distance[n] >= threshold)
            np.testing.assert_allclose(leaf.grad[n].numpy(), gradient, rtol=1e-3, atol=1e-7)
        masked += (distance < threshold).mean() / 6
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert masked == 0 if k == -3 else 0.05 < masked < 0.95


def test_uniad_loss_and_map():
    """Mean squared error; map: mean over the channels of the squared error, bilinear, corners not aligned."""
    model, _, args = make("uniad")
    f, r = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    assert model.loss([f], [r], 0, args).item() == pytest.approx(np.mean((f - r).numpy() ** 2), rel=1e-5)
    got, error = model.anomaly_map([f], [r], args).numpy(), np.mean((f - r).numpy() ** 2, axis=1)
    assert got.shape == (2, 64, 64)

    def cell_of(pixel):
        return min(max((pixel + 0.5) / 16 - 0.5, 0), 3)

    for y, x in [(0, 0), (7, 8), (31, 32), (40, 3), (63, 50)]:
        (i, v), (j, u) = ((int(a), a - int(a)) for a in (cell_of(y), cell_of(x)))
        k, m = min(i + 1, 3), min(j + 1, 3)
        expected = ((1 - v) * ((1 - u) * error[:, i, j] + u * error[:, i, m])
                    + v * ((1 - u) * error[:, k, j] + u * error[:, k, m]))
        np.testing.assert_allclose(got[:, y, x], expected, rtol=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.25])
def test_cosine_map_is_the_mean_over_scales(power):
    """With --norm-power each distance counts by the root mean square of the target's channels."""
    model, _, args = make(norm_power=power)
    targets, rebuilt = pairs()
    scales = []
    for r, t in zip(rebuilt, targets):
        d = (1 - F.cosine_similarity(r, t, dim=1)) * t.square().mean(1).sqrt() ** power  # (B, h, w)
        scales.append(F.interpolate(d[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0].numpy())
    np.testing.assert_allclose(model.anomaly_map(targets, rebuilt, args).numpy(), np.mean(scales, axis=0), atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 10.0])
@pytest.mark.parametrize("statistic", ["max", "std", "score"])
def test_calibration_loss(alpha, statistic):
    """Smooth L1 of mean and top, each averaged over the batch: e²/(2α) below α, |e| - α/2 above. (u, σ): of u + 3 σ."""
    args = cada.Args(alpha=alpha, statistic=statistic)
    rng = np.random.default_rng(0)
    out, target = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    predicted = np.stack([out[:, 0], out[:, 0] + 3 * out[:, 1]], 1) if statistic == "std" else out

    def head(phi):
        return torch.tensor(out)

    def smooth(errors):
        return [e * e / (2 * alpha) if e < alpha else e - alpha / 2 for e in errors]

    got, _ = cada.calibration_losses(head, None, torch.tensor(target), None, args)
    expected = sum(np.mean(smooth(errors)) for errors in abs(predicted - target).T)
    assert got.item() == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------- what learns


@pytest.mark.parametrize("base", BASES)
def test_gradient_reaches_every_trainable_parameter_and_no_frozen_one(base, monkeypatch):
    """In float64; biases of keys are exempt, softmax ignores them."""
    model, features, args = make(base)
    model, images = model.double().train(), pictures(4)
    maps, normalize = [m.double() for m in features.split(features(images))], data.normalize
    monkeypatch.setattr(data, "normalize", lambda batch: normalize(batch).double())  # what ReContrast's encoder reads
    targets, rebuilt, _ = model(maps, images)
    assert not any(t.requires_grad for t in targets), "targets are constants"
    targets, rebuilt = [t.double() for t in targets], [r.double() for r in rebuilt]
    model.loss(targets, rebuilt, 1.0, args).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [n for n in dead if not n.endswith("to_k.bias")] == []
    assert not any(p.requires_grad or p.grad is not None for p in features.parameters())


def test_recontrasts_encoder_learns_with_the_statistics_of_imagenet():
    """Its weights need gradients, its batch norms stay in evaluation mode; at the start it is the frozen encoder."""
    model, features, _ = make("recontrast")
    model.train()
    assert all(p.requires_grad for p in model.parameters())
    norms = [m for m in model.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert all(m.training for m in model.neck.modules())
    targets, _, _ = forward(model, features, pictures())
    for frozen, own in zip(targets[:3], targets[3:]):
        torch.testing.assert_close(frozen, own, rtol=1e-3, atol=1e-3 * own.abs().max().item())


def test_recontrast_crosses_the_pairs():
    """What head set 1 makes of E's half is compared with E₀'s maps, set 2 of E₀'s half with E's; φ is E₀'s half."""
    model, features, _ = make("recontrast")
    model.eval()
    with torch.no_grad():
        model.encoder._conv_stem.weight.mul_(1.5)  # E is not E₀ any more
        images = pictures()
        maps = features.split(features(images))
        own = model.encoder(data.normalize(images))
        targets, rebuilt, phi = model(maps, images)

        def rebuilt_alone(feats, heads):
            decoded = model.decoder(model.neck(*feats))
            return [head(d) for head, d in zip(heads, decoded)]

        for got, expected in zip(targets, [*maps, *own], strict=True):
            torch.testing.assert_close(got, expected)
        alone = rebuilt_alone(own, model.heads[0]) + rebuilt_alone(maps, model.heads[1])
        for got, expected in zip(rebuilt, alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(phi, model.neck(*maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_overfits_a_few_images(base):
    """Forty steps on three images, and the loss is a fraction of the first."""
    model, features, args = make(base, hidden=64)
    images = pictures()
    maps, losses = features.split(features(images)), []
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(40):
        loss, _ = cada.losses(model, maps, images, 0.0, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.4


# --------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("regressor, dropouts, convolutions, linears", [
    ("0+1", 1, 0, 1), ("0+2", 2, 0, 2), ("0+3", 3, 0, 3), ("1+2", 2, 1, 2), ("2+2", 2, 2, 2)])
def test_head_structures(regressor, dropouts, convolutions, linears):
    """Table 3: the convolutions keep the channels, dropout stands before each linear layer, 256 inside, two outputs."""
    head = cada.Head(8, 2, cada.Args(regressor=regressor, head_kernel=3, dropout=0.5))

    def modules_of(kind):
        return [m for m in head.modules() if isinstance(m, kind)]

    assert [c.weight.shape for c in modules_of(torch.nn.Conv2d)] == [(8, 8, 3, 3)] * convolutions
    widths = [8] + [256] * (linears - 1) + [2]
    shapes = [(b, a) for a, b in zip(widths, widths[1:])]
    assert [m.weight.shape for m in modules_of(torch.nn.Linear)] == shapes
    assert [m.p for m in modules_of(torch.nn.Dropout)] == [0.5] * dropouts
    assert not isinstance(head.layers[-1], torch.nn.ReLU) and head(torch.randn(4, 8, 3, 3)).shape == (4, 2)
    assert head.eval()(torch.randn(4, 8, 1, 1)).shape == (4, 2), "pooled features of another script's run"


@pytest.mark.parametrize("regressor", ["0+1", "0+2", "0+3", "1+2", "2+2"])
def test_every_head_learns_at_the_papers_rate(regressor):
    """As many channels as a ResNet's bottleneck has, u and γ of eight classes: SGD at 0.05 diverged in the linear-only
    heads of Table 3 before their input was brought to norm 1. A constant would be wrong by 0.07 on average."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 8
    phi = 2 * torch.rand(8, 512, generator=g)[label] + 0.3 * torch.randn(400, 512, generator=g)
    phi = phi.relu()[:, :, None, None]
    target = 0.3 * torch.rand(8, 2, generator=g)[label] + 0.02 * torch.randn(400, 2, generator=g)
    args = cada.Args(regressor=regressor)
    torch.manual_seed(0)
    head = cada.Head(512, 2, args)
    optimizer = cada.calibration_optimizer(head, args)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = args.calibration_lr * runtime.lr_factor(step, 300, "cosine")
        index = torch.randint(400, (16,), generator=g)
        loss, _ = cada.calibration_losses(head, phi[index], target[index], label[index], args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (head.eval()(phi) - target).abs().mean() < 0.035 < (target - target.mean(0)).abs().mean() / 1.5


class Drawn:
    """Stands in for a base: classes whose normal maps differ in scale and offset by far, told by φ; a defect adds four
    times the normal range in some pixels. Images are named CLASS-NUMBER or CLASS-NUMBER-bad."""

    scales = {"a": (0.0, 1.0), "b": (0.3, 0.2), "c": (2.0, 3.0), "d": (0.5, 0.4)}
    phi_channels = 6

    def __call__(self, images, samples):
        maps, phi = [], []
        for s in samples:
            rng = np.random.default_rng([ord(c) for c in str(s.image)])
            low, width = self.scales[s.cls]
            m = low + width * rng.uniform(0, 1, (40, 40))
            if s.label:
                m[10:20, 5:15] += 4 * width
            one_hot = np.eye(4)["abcd".index(s.cls)]
            phi.append(np.concatenate([one_hot, [1, 0]])[:, None, None] + 0.05 * rng.normal(size=(6, 2, 2)))
            maps.append(m)
        return torch.from_numpy(np.stack(maps)).float(), torch.from_numpy(np.stack(phi)).float()


class Fixed:
    """Stands in for the calibration: what it expects is given, γ̂ - û is at least 1e-6."""

    floor = torch.tensor(1e-6)

    def __init__(self, u_hat, gamma_hat):
        self.expected = u_hat, gamma_hat, torch.full((len(u_hat),), -1)

    def __call__(self, phi, samples):
        return self.expected


def drawn_samples(per_class, label=0, start=0):
    return [sample(f"{c}-{i}{'-bad' * label}", c, label) for c in "abcd" for i in range(start, start + per_class)]


def calibrated(tmp_path, **changes):
    """Stage 2 on the drawn base: (calibration, state, args, run)."""
    args = cada.Args(image_size=40, **{"calibration_steps": 1000, "dropout": 0.0, "smoothing": 0, "batch_size": 8,
                                       "log_every": 500, "steps": 0, **changes})
    run = runtime.Run("cada", tmp_path, torch.device("cpu"))
    state = {"model": {}, "step": 0, "seconds": 0.0, "finished": ["model"]}
    return *cada.train_calibration(args, run, Drawn(), None, drawn_samples(20), state), args, run


@pytest.mark.parametrize("calibrate", ["none", "given", "classifier", "cada"])
@pytest.mark.parametrize("statistic", ["max", "std", "score"])
def test_calibration_makes_one_pool_of_very_different_classes(calibrate, statistic, tmp_path):
    """Without it a good image of class c scores above defects of the others; with any of the three kinds all defects of
    all classes score above all good images. CaDA-A's statistics are the means over the class's images."""
    calibration, state, args, run = calibrated(tmp_path, calibrate=calibrate, statistic=statistic)
    score, good, bad = cada.Scorer(args, run, Drawn(), calibration), drawn_samples(6, 0, 50), drawn_samples(6, 1, 50)
    normal, defective = (score(None, samples)[1] for samples in (good, bad))
    separate = normal.max() < defective.min()
    assert separate == (calibrate != "none")
    if calibrate == "none":
        assert torch.equal(score(None, good)[0], score.plain(None, good)[0])
    for c, cls in enumerate("abcd"):
        maps = Drawn()(None, [s for s in drawn_samples(20) if s.cls == cls])[0].numpy()
        u, top = maps.mean(), maps.max((1, 2)).mean()
        if statistic == "std":
            top = u + 3 * maps.std()  # over all pixels of the class
        elif statistic == "score":  # not smoothed here: the mean of the highest 16 of 1,600 pixels
            top = np.sort(maps.reshape(20, -1))[:, -16:].mean()
        assert calibration.statistics[c].tolist() == pytest.approx([u, top], rel=1e-4)
    if calibrate in ("given", "classifier"):
        _, u, gamma, chosen = score.estimate(None, bad)
        index = ["abcd".index(s.cls) for s in bad]
        assert torch.equal(torch.stack([u, gamma], 1), calibration.statistics[index])
        assert chosen.tolist() == index
    assert state["normal_score"] > 0 and state["step"] == (1000 if calibrate in ("classifier", "cada") else 0)


def test_the_smallest_range_is_that_of_a_training_image(tmp_path):
    """A head that expects γ̂ below û, or hardly above it, must not blow up a map: γ̂ - û is held to the smallest range
    that a training image's own map has."""
    calibration, _, args, run = calibrated(tmp_path, calibrate="given")
    maps, _ = Drawn()(None, drawn_samples(20))
    smallest = min((m.max() - m.mean()).item() for m in maps)
    assert calibration.floor.item() == pytest.approx(smallest)
    calibration.statistics[:, 1] = calibration.statistics[:, 0] - 1
    score, samples = cada.Scorer(args, run, Drawn(), calibration), drawn_samples(2)
    raw = Drawn()(None, samples)[0]
    u = calibration.statistics[["abcd".index(s.cls) for s in samples], 0][:, None, None]
    torch.testing.assert_close(score(None, samples)[0], (raw - u) / smallest)
    assert cada.findings(args, calibration, score.seen_of(samples))["clamped"] == len(samples)


def test_uniad_starts_as_its_authors_do():
    """Query, key and value projections are parts of one (3D, D) matrix at the start, uniform within √(6/4D); the others
    within √(6/(in + out))."""
    model, _, _ = make("uniad", hidden=64)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            joint = name.endswith(("to_q", "to_k", "to_v"))
            bound = (6 / (4 * 64 if joint else module.in_features + module.out_features)) ** 0.5
            assert 0.97 * bound < module.weight.abs().max() <= bound, name


def test_calibration_formula_comes_before_the_smoothing(tmp_path):
    """(M - û)/(γ̂ - û), at least 1e-6 in the denominator, then the 5x5 window, zeros outside; mean of the top 1 %."""
    u, gamma = torch.tensor([0.5, 0.2]), torch.tensor([2.0, 0.1])  # the second is clamped
    args = cada.Args(image_size=40)
    calibration = Fixed(u, gamma)
    score = cada.Scorer(args, runtime.Run("cada", tmp_path, torch.device("cpu")), Drawn(), calibration)
    samples = [sample("a-1"), sample("a-2")]
    raw = Drawn()(None, samples)[0].double().numpy()
    weight = np.exp(-0.5 * ((np.arange(5) - 2) / 4) ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    maps, scores = score(None, samples)
    for n, denominator in enumerate((1.5, 1e-6)):
        m = np.pad((raw[n] - u[n].item()) / denominator, 2)
        expected = np.array([[(m[i:i + 5, j:j + 5] * weight).sum() for j in range(40)] for i in range(40)])
        np.testing.assert_allclose(maps[n].numpy(), expected, rtol=1e-3, atol=1e-4 * abs(expected).max())
        assert scores[n].item() == pytest.approx(np.sort(expected.ravel())[-16:].mean(), rel=1e-3)
    rows = score.seen_of(samples)
    assert [(row.cls, row.label, row.chosen) for row in rows] == [("a", 0, -1)] * 2
    assert [row.u_hat for row in rows] == pytest.approx([0.5, 0.2])
    assert [row.gamma_hat for row in rows] == pytest.approx([2.0, 0.1])
    assert [row.gamma for row in rows] == pytest.approx(raw.max((1, 2)).tolist(), rel=1e-5)


@pytest.mark.parametrize("smoothing, score", [(0, "max"), (5, "max"), (5, "top1")])
def test_statistic_score_is_the_image_score(smoothing, score, tmp_path):
    """With --statistic score the target γ is what the scorer gives the same image without calibration; calibrated by
    its own u and γ every image would score 1, but for the border, where the window sees zeros."""
    args = cada.Args(image_size=40, statistic="score", smoothing=smoothing, score=score)
    samples = drawn_samples(3)
    maps = Drawn()(None, samples)[0]
    u, gamma = cada.map_statistics(maps, args)
    run = runtime.Run("cada", tmp_path, torch.device("cpu"))
    scorer = cada.Scorer(args, run, Drawn(), Fixed(u, gamma))
    assert torch.equal(gamma, scorer.plain(None, samples)[1])
    torch.testing.assert_close(scorer(None, samples)[1], torch.ones(12), rtol=0, atol=0.15 if smoothing else 1e-5)
    assert [row.gamma for row in scorer.seen_of(samples)] == gamma.tolist()


def test_remembered_maps_change_nothing(tmp_path):
    """Two passes over the test images ask the base once; numbers are the same bits, whatever the batches."""
    calibration, _, args, run = calibrated(tmp_path, calibration_steps=5)
    base, asked, test = Drawn(), [], drawn_samples(2, 0, 50)

    def counting(images, samples):
        asked.append(len(samples))
        return base(images, samples)

    fresh, keeping = (cada.Scorer(args, run, counting, calibration, remember) for remember in ((), test))
    expected = fresh(None, test)
    asked.clear()
    for function in (keeping, keeping, lambda *a: keeping.plain(*a)):
        function(None, test)
    assert asked == [len(test)] and torch.equal(keeping(None, test)[0], expected[0])
    keeping(None, drawn_samples(2))  # training images are not kept
    assert len(keeping.kept) == len(test)


# ------------------------------------------------------------------------------------------- what it reports


def test_correlations():
    """Pearson's r per class and label; undefined for constants and for fewer than three images."""
    rng = np.random.default_rng(0)
    def seen(cls, label, gamma_hat, gamma):
        return cada.Seen(cls, label, 0.0, gamma_hat, gamma, 0.0, -1)

    rows = [seen("a", label, *rng.normal(size=2)) for label in (0, 1) for _ in range(9)]
    rows += [seen("b", 0, 1.5, own) for own in rng.normal(size=5)]
    rows += [seen("b", 1, *pair) for pair in rng.normal(size=(2, 2))]
    found = cada.correlations(rows)
    for label, name in enumerate(("good", "defective")):
        mine = [row for row in rows if (row.cls, row.label) == ("a", label)]
        pairs = np.array([(row.gamma_hat, row.gamma) for row in mine])
        assert found[name]["a"] == pytest.approx(np.corrcoef(pairs.T)[0, 1])
        assert found[name]["b"] is None


def drawn_rows():
    """Sixty images of two classes, whose scores overlap and have ties."""
    rng = np.random.default_rng(1)
    return [(str(i), "ab"[i % 2], int(label), float(round(rng.normal() + 1.5 * label + i % 2, 1)))
            for i, label in enumerate(rng.integers(0, 2, 60))]


def f1(part, threshold):
    hits = sum(row[3] >= threshold and row[2] for row in part)
    return 2 * hits / (sum(row[3] >= threshold for row in part) + sum(row[2] for row in part))


def test_best_threshold():
    """The best F1 over every threshold, by trying all; ties go together; per class what that one threshold does."""
    rows = drawn_rows()
    got = cada.best_threshold(rows)
    assert got["f1"] == pytest.approx(max(f1(rows, r[3]) for r in rows)) == pytest.approx(f1(rows, got["threshold"]))
    for cls, values in got["classes"].items():
        part = [r for r in rows if r[1] == cls]
        good, bad = ([r[3] for r in part if r[2] == label] for label in (0, 1))
        assert values["f1"] == pytest.approx(f1(part, got["threshold"]))
        assert values["false_alarms"] == pytest.approx(np.mean([s >= got["threshold"] for s in good]))
        assert values["missed"] == pytest.approx(np.mean([s < got["threshold"] for s in bad]))
        right = (1 - values["false_alarms"] + 1 - values["missed"]) / 2
        assert values["balanced_accuracy"] == pytest.approx(right)
    assert "pool" in cada.threshold_table("best F1", {"before": got, "after": got})
    good = cada.best_threshold([row for row in rows if not row[2]])  # nothing to find
    assert good["f1"] == 0 and good["classes"]["a"]["missed"] is None and good["balanced_accuracy"] is None
    assert "-" in cada.threshold_table("best F1", {"good": good})


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_alarm_threshold(rate, monkeypatch):
    """No more than the stated share of good images above it, and no lower threshold of which that is true."""
    rows = drawn_rows()
    monkeypatch.setattr(cada, "FALSE_ALARMS", rate)
    got = cada.alarm_threshold(rows)
    good = np.array([row[3] for row in rows if not row[2]])
    assert got["false_alarms"] == np.mean(good > got["threshold"]) <= rate
    lower = good[good < got["threshold"]].max()
    assert np.mean(good > lower) > rate
    defective = np.array([row[3] for row in rows if row[2]])
    assert got["missed"] == np.mean(defective <= got["threshold"])
    held_out = np.linspace(0, 1, 41)  # 5 % of 41: two may be above it
    monkeypatch.setattr(cada, "FALSE_ALARMS", 0.05)
    fixed = cada.alarm_threshold(rows, held_out)
    assert fixed["threshold"] == pytest.approx(0.95) and (held_out > fixed["threshold"]).sum() == 2
    assert fixed["missed"] == np.mean(defective <= fixed["threshold"])
    assert cada.alarm_threshold([row for row in rows if row[2]]) is None
    assert cada.threshold_table("5 %", {"none": None}) == ""


def test_contamination_moves_the_right_images():
    """A share of each class's defective test images, the same for the same seed, becomes unlabelled training data."""
    def fresh(seed, share=0.3):
        train = [sample(f"{c}-t{i}", c) for c in "ab" for i in range(3)]
        test = [sample(f"{c}-{label}{i}", c, label) for c in "ab" for label in (0, 1) for i in range(10)]
        dataset = data.Dataset("drawn", None, list(train), list(test), ["a", "b"])
        cada.contaminate(dataset, share, seed)
        return train, test, dataset

    train, test, dataset = fresh(0)
    moved = dataset.train[6:]
    assert dataset.train[:6] == train and len(moved) == 6 and len(dataset.test) == 40 - 6
    assert {s.cls: sum(m.cls == s.cls for m in moved) for s in moved} == {"a": 3, "b": 3}
    labels = {s.image: s.label for s in test}
    assert all(labels[s.image] == 1 and s.label == 0 and s.mask is None for s in moved)
    assert {s.image for s in moved} | {s.image for s in dataset.test} == set(labels)

    def train_names(seed):
        return [s.image for s in fresh(seed)[2].train]

    assert train_names(0) == train_names(0) != train_names(1)
    assert fresh(0, 0.0)[2].train == train


def test_paper_numbers():
    """Found for the paper's own settings only; the presets of the bases are the paper's recipes."""
    def numbers(name, **changes):
        preset = cada.RECIPES[changes.get("base", "revdist")]["paper"]
        return papers.numbers("cada", cada.Args(**{**preset, **changes}), preset, name)

    assert numbers("mvtec")["mixed"]["i_auroc"] == 0.98 and numbers("mvtec")["mean"]["p_ap"] == 0.57
    assert numbers("visa", calibrate="none")["mixed"]["p_ap"] == pytest.approx(0.329)
    assert numbers("mvtec", base="uniad")["mean"]["i_ap"] == pytest.approx(0.991)
    for changes in (dict(base="uniad", image_size=256), dict(classes="a"), dict(image_size=320),
                    dict(contaminate=0.1), dict(statistic="score"), dict(base_run="x")):
        assert numbers("mvtec", **changes) is None
    assert numbers("synth") is None
    recipe = {base: cada.Args(**cada.RECIPES[base]["paper"]) for base in BASES}
    assert [(a.lr, a.weight_decay, a.steps, a.batch_size, a.alpha, a.calibration_steps) for a in recipe.values()] == [
        (2e-3, 1e-5, 5000, 16, 0.1, 5000), (2e-3, 1e-5, 5000, 16, 0.1, 5000), (3e-4, 1e-4, 50_000, 64, 10, 20_000)]

    def factor(step, args):
        return runtime.lr_factor(step, args.steps, args.schedule, args.lr_drop)

    for step, expected in ((0, 1), (3999, 1), (4000, 0.2), (4999, 0.2)):
        assert factor(step, recipe["revdist"]) == expected
    assert factor(40_000, recipe["uniad"]) == 0.1


# ---------------------------------------------------------------------------------- the program, as a user runs it

SMALL = ("--image-size", 64, "--depths", "1,1,1,1", "--batch-size", 8, "--steps", 12, "--calibration-steps", 10,
         "--calibration-batch", 8, "--log-every", 4, "--checkpoint-every", 4)
SMALL_UNIAD = ("--base", "uniad", "--hidden", 16, "--heads", 2, "--mlp", 32, "--layers", 1)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    return contract.first_run(cada, ("--data", tiny_data, *SMALL), tmp_path_factory.mktemp("runs"))


def test_end_to_end(finished):
    """Train, calibrate, evaluate, report: every file of the contract, both results in one table, CADA's own files."""
    result, log, state, kept = contract.check_files(finished, "cada")
    assert result["mean"]["p_auroc"] > 0.5
    for maps, scores in kept.values():
        highest = np.sort(maps["maps"].reshape(7, -1))[:, -40:]  # 1 % of 4,096 pixels
        assert [score for _, score in scores] == pytest.approx(highest.mean(1).tolist(), rel=1e-4)
    assert list(result["compare"]) == ["without calibration"]
    assert set(result["compare"]["without calibration"]) == {"classes", "mean", "mixed"}
    assert "absolute-unified" in finished[1].stdout and "one threshold" in finished[1].stdout
    assert [(line["stage"], line["step"]) for line in log] == [
        ("base", 4), ("base", 8), ("base", 12), ("calibration", 16), ("calibration", 20), ("calibration", 22)]
    assert {"loss", "lr", "images_per_s"} <= set(log[0])
    assert state["step"] == 22 and state["normal_score"] > 0 and len(state["classes"]) == 8
    assert result["setting"]["clamped"] >= 0 and result["setting"]["steps"] == 12
    setting, pooled = result["setting"], result["compare"]["without calibration"]
    assert setting["I-AUROC, not calibrated"] == pytest.approx(pooled["mean"]["i_auroc"])
    assert setting["pool's I-AUROC, not calibrated"] == pytest.approx(pooled["mixed"]["i_auroc"])
    own = json.loads((finished[0] / "calibration.json").read_text())
    for kind in ("threshold", "threshold at 5 % false alarms"):
        assert set(own[kind]) == {"without calibration", "calibration: cada"}
    assert set(own["correlation"]["good"]) == set(result["classes"])
    for name in ("distributions", "pixels", "changed"):
        assert (finished[0] / "pictures" / f"{name}.png").is_file()


def test_evaluation_repeats_the_run_and_does_stage_two_again_where_asked(finished, tmp_path, command, metrics_of):
    """--eval alone gives the run's own numbers. With another option of the calibration the base is kept, to the bit,
    and the result without calibration too; the new checkpoint is complete."""
    checkpoint = finished[0] / "checkpoint.pt"
    before, state = metrics_of(finished[0]), torch.load(checkpoint, weights_only=True)
    assert command("cada", "--eval", checkpoint, "--out", tmp_path / "same").status == 0
    assert metrics_of(tmp_path / "same") == before and not (tmp_path / "same" / "checkpoint.pt").exists()
    for i, words in enumerate((("--calibrate", "given"), ("--calibrate", "classifier"), ("--statistic", "std"),
                               ("--regressor", "0+1", "--dropout", 0))):
        out = tmp_path / str(i)
        assert command("cada", "--eval", checkpoint, "--out", out, *words).status == 0, words
        after, again = metrics_of(out), torch.load(out / "checkpoint.pt", weights_only=True)
        assert after["compare"] == before["compare"] and after["mixed"] != before["mixed"], words
        assert all(torch.equal(again["model"][name], value) for name, value in state["model"].items())
        assert ("class accuracy" in after["setting"]) == (words[1] == "classifier")
    assert command("cada", "--eval", tmp_path / "0" / "checkpoint.pt", "--out", tmp_path / "given").status == 0
    assert metrics_of(tmp_path / "given") == metrics_of(tmp_path / "0")
    assert command("cada", "--eval", checkpoint, "--calibrate", "none", "--out", tmp_path / "none").status == 0
    assert command("cada", "--eval", checkpoint, "--image-size", 96, "--out", tmp_path / "larger").status == 0
    larger = torch.load(tmp_path / "larger" / "checkpoint.pt", weights_only=True)
    assert not torch.equal(larger["calibration"]["statistics"], state["calibration"]["statistics"]), "those of 64 px"
    none = metrics_of(tmp_path / "none")
    assert "compare" not in none and none["mixed"] == before["compare"]["without calibration"]["mixed"]


def test_a_fit_on_other_data_must_be_asked_for(finished, tiny_data, tmp_path, command, metrics_of):
    """--eval on other data uses the calibration as it is; with another calibration it would be fitted on that data's
    training images: only with --refit, and the report says on what."""
    words = ("--eval", finished[0] / "checkpoint.pt", "--classes", "screw,capsule")
    assert command("cada", *words, "--out", tmp_path / "same").status == 0
    assert metrics_of(tmp_path / "same")["setting"]["fitted on"] == str(tiny_data)
    done = command("cada", *words, "--calibrate", "given", "--out", tmp_path / "refused")
    assert done.status == 2 and "--refit" in done.err and "--calibrate" in done.err and done.err.count("\n") == 1
    assert command("cada", *words, "--calibrate", "none", "--out", tmp_path / "none").status == 0, "it fits nothing"
    assert command("cada", *words, "--calibrate", "given", "--refit", "--out", tmp_path / "refit").status == 0
    fitted = f"{tiny_data}, screw,capsule only"
    assert metrics_of(tmp_path / "refit")["setting"]["fitted on"] == fitted
    # asked for once: who evaluates the result on other images does not fit it to them
    words = ("--eval", tmp_path / "refit" / "checkpoint.pt", "--classes", "capsule", "--out", tmp_path / "other")
    assert command("cada", *words).status == 0
    assert metrics_of(tmp_path / "other")["setting"]["fitted on"] == fitted


def test_contaminated_training_images_stay_out_of_the_test_set(tiny_data, tmp_path, command, metrics_of):
    """The defects that the base has seen are no test images at --eval either, whatever classes are evaluated; on other
    data nothing was moved, so nothing is."""
    words = ("--data", tiny_data, *SMALL, "--steps", 1, "--calibrate", "none", "--contaminate", 0.5)
    out, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint.pt"
    assert command("cada", *words, "--classes", "screw,capsule", "--out", out).status == 0
    tested = {row["path"] for row in csv.DictReader(open(out / "scores.csv"))}
    assert command("cada", "--eval", checkpoint, "--classes", "capsule", "--out", tmp_path / "one").status == 0
    again = {row["path"] for row in csv.DictReader(open(tmp_path / "one" / "scores.csv"))}
    assert again == {path for path in tested if "capsule" in path} and len(again) == 5
    for change in (("--contaminate", 0), ("--contaminate", 0.25), ("--seed", 3)):
        done = command("cada", "--eval", checkpoint, *change, "--out", tmp_path / "no")
        assert done.status == 2 and "--contaminate 0.5" in done.err and done.err.count("\n") == 1
    other = shutil.copytree(tiny_data / "hex_nut", tmp_path / "other" / "thing").parent
    words = ("--data", other, "--classes", "thing", "--out", tmp_path / "o")
    done = command("cada", "--eval", checkpoint, *words)
    assert done.status == 0 and "warning: the base has seen some defective images" in done.err, "a copy, perhaps"
    assert metrics_of(tmp_path / "o")["images"] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_names_that_are_not_utf8(tiny_data, tmp_path, command):
    """They come to the table of thresholds, which is made from scores.csv."""
    home = shutil.copytree(tiny_data / "screw", tmp_path / "home" / "screw")
    good = os.fsencode(next((home / "test" / "good").iterdir()))
    os.rename(good, os.path.join(os.path.dirname(good), b"caf\xe9.png"))
    words = ("--data", home.parent, *SMALL, "--steps", 1, "--calibration-steps", 1)
    assert command("cada", *words, "--out", tmp_path / "run").status == 0
    assert (tmp_path / "run" / "calibration.json").is_file()


def test_a_threshold_fixed_on_images_that_neither_stage_has_seen(tiny_data, tmp_path, command, metrics_of):
    """A share of every class's training images is trained on by nobody, in the evaluation neither; what the threshold
    does that is fixed on them stands beside the oracle's."""
    words = ("--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--fix-threshold", 0.34, "--save-maps")
    assert command("cada", *words, "--out", tmp_path / "run").status == 0
    assert len(np.load(tmp_path / "run" / "maps" / "train" / "screw.npz")["paths"]) == 4  # of 6
    found = json.loads((tmp_path / "run" / "calibration.json").read_text())["threshold fixed on training images"]
    assert set(found) == {"without calibration", "calibration: cada"}
    assert all(set(part["classes"]) == {"screw", "capsule"} for part in found.values())
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert command("cada", "--eval", checkpoint, "--out", tmp_path / "again").status == 0
    again = json.loads((tmp_path / "again" / "calibration.json").read_text())["threshold fixed on training images"]
    assert again == found
    done = command("cada", "--eval", checkpoint, "--fix-threshold", 0.5, "--out", tmp_path / "no")
    assert done.status == 2 and "--fix-threshold" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("statistic", ["score", "max"])
def test_statistic_score_follows_the_scoring_options(statistic, finished, tmp_path, command):
    """Where γ is the image score, as in the laptop preset, another --score or --smoothing asks for another head; else
    it does not."""
    first = finished[0] / "checkpoint.pt"
    if statistic == "max":
        assert command("cada", "--eval", first, "--statistic", statistic, "--out", tmp_path / "max").status == 0
        first = tmp_path / "max" / "checkpoint.pt"
    for i, words in enumerate(((), ("--score", "max"), ("--smoothing", 0))):
        out = tmp_path / str(i)
        assert command("cada", "--eval", first, "--out", out, *words).status == 0, words
        assert (out / "checkpoint.pt").exists() == (statistic == "score" and bool(words)), words


def test_scoring_options_and_shifts_at_evaluation(finished, tmp_path, command, metrics_of):
    """They act on the finished calibration, but where γ is the image score another rule for it asks for another head; a
    shifted pass sees shifted images, never maps kept of the clean ones."""
    checkpoint = finished[0] / "checkpoint.pt"

    def numbers_and_scores(folder):
        return metrics_of(folder)["mean"], (folder / "scores.csv").read_text()

    for i, words in enumerate((("--corrupt", "gaussian_noise:5"), ("--smoothing", 0), ("--score", "max"))):
        assert command("cada", "--eval", checkpoint, "--out", tmp_path / str(i), *words).status == 0, words
        assert numbers_and_scores(tmp_path / str(i)) != numbers_and_scores(finished[0]), words
        assert (tmp_path / str(i) / "checkpoint.pt").exists() == (words[0] != "--corrupt")
    words = ("--classes", "screw,capsule", "--shift", "all", "--out", tmp_path / "shift")
    done = command("cada", "--eval", checkpoint, *words)
    assert done.status == 0, done.err
    shifts = metrics_of(tmp_path / "shift")["shift"].values()
    assert len({json.dumps(s["mixed"]) for s in shifts}) == 4 and all("clamped" in s["setting"] for s in shifts)


def test_another_weight_of_the_distances_is_another_map(finished, tmp_path, command):
    """--norm-power changes what is calibrated, so that stage 2 is done again; where the map is no cosine it is
    refused."""
    checkpoint = finished[0] / "checkpoint.pt"
    assert command("cada", "--eval", checkpoint, "--norm-power", 0.5, "--out", tmp_path / "half").status == 0
    assert (tmp_path / "half" / "checkpoint.pt").exists()
    assert (tmp_path / "half" / "scores.csv").read_text() != (finished[0] / "scores.csv").read_text()
    done = command("cada", "--base", "uniad", "--norm-power", 0.5, "--out", tmp_path / "uniad")
    assert done.status == 2 and "--norm-power" in done.err and done.err.count("\n") == 1


def test_every_step_goes_through_the_parallel_model(tiny_data, tmp_path, command, monkeypatch):
    """Protects torchrun, which averages the gradients of what goes through it."""
    words = ("--data", tiny_data, "--classes", "screw", *SMALL, "--steps", 2, "--calibration-steps", 3)
    contract.check_every_step_is_parallel(cada, words, [2, 3], tmp_path / "run", command, monkeypatch)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_is_uninterrupted(finished, tiny_data, tmp_path, command, metrics_of):
    """SIGKILL in stage 1, then --resume: the numbers, the log and the weights of the run that was never interrupted."""
    words = ("--data", tiny_data, *SMALL)
    contract.check_killed_and_resumed(cada, words, finished, tmp_path / "run", command, metrics_of)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path / "run", finished[0]))
    assert all(torch.equal(a["calibration"][name], value) for name, value in b["calibration"].items())


@pytest.mark.parametrize("step", [12, 16])
def test_interrupted_in_stage_two_and_resumed(step, finished, tiny_data, tmp_path, command, metrics_of, monkeypatch):
    """The same when the run ends between the stages, and after the first checkpoint of stage 2."""
    out, save = tmp_path / "run", runtime.Run.save

    def save_and_die(self, state, *rest):
        save(self, state, *rest)
        if state["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.Run, "save", save_and_die)
    assert command("cada", "--data", tiny_data, *SMALL, "--out", out).status == 130
    monkeypatch.setattr(runtime.Run, "save", save)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == step and not (out / "metrics.json").exists()
    assert command("cada", "--out", out, "--resume").status == 0
    assert metrics_of(out) == metrics_of(finished[0])
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, finished[0]))
    for part in ("model", "calibration"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    losses = [[(line["step"], line["loss"]) for line in contract.read_log(folder)] for folder in (out, finished[0])]
    assert losses[0] == losses[1]


def test_predict(finished, tiny_data, tmp_path, command):
    """Without columns of its own: the calibrated scores."""
    contract.check_predict(cada, (), finished, tiny_data, tmp_path / "p", command)


@pytest.mark.parametrize("words", [
    ("--base", "recontrast"), SMALL_UNIAD, ("--cosine", "location"), ("--calibrate", "none"), ("--calibrate", "given"),
    ("--calibrate", "classifier"), ("--statistic", "std"), ("--statistic", "score"), ("--regressor", "0+3"),
    ("--regressor", "2+2", "--head-kernel", 3), ("--dropout", 0.75), ("--score", "top0.1"), ("--contaminate", 0.5),
    ("--padding", "reflect"),
    ("--schedule", "step"), ("--clip", 0.1), ("--depths", "2,1,2,1"),
    ("--backbone", "resnet18", "--weights", "random"), ("--memory-share", 0), ("--amp", "bf16")])
def test_every_base_and_ablation_runs(words, tiny_data, tmp_path, command, metrics_of):
    """Every row of Tables 1 to 5 is one flag: it trains, is calibrated and evaluated."""
    out = tmp_path / "run"
    done = command("cada", "--data", tiny_data, "--out", out, "--classes", "screw", *SMALL, "--steps", 2,
                   "--calibration-steps", 2, *words)
    assert done.status == 0, done.err
    result = metrics_of(out)
    assert set(result["classes"]) == {"screw"} and result["images"] == (5 if "--contaminate" in words else 7)
    stages = {line["stage"] for line in contract.read_log(out)}
    assert stages == {"base", *(["calibration"] if words[1] not in ("none", "given") else [])}


@pytest.mark.parametrize("base", ["revdist", "recontrast"])
def test_features_computed_on_the_fly_train_the_same_model(base, tiny_data, tmp_path, command):
    """Both stages, without memory for frozen features and for φ."""
    words = ("--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--base", base, "--steps", 3, "--log-every", 1,
             "--calibration-steps", 3, "--amp", "off")
    contract.check_features_on_the_fly(cada, words, tmp_path, command)


def test_stage_two_does_not_touch_the_base(tiny_data, tmp_path, command):
    """The base's weights and batch statistics at the end are those at the end of stage 1."""
    words = ("--data", tiny_data, "--classes", "screw", *SMALL, "--steps", 2)
    for steps in (1, 20):
        done = command("cada", *words, "--calibration-steps", steps, "--out", tmp_path / str(steps))
        assert done.status == 0, done.err
    a, b = (torch.load(tmp_path / str(steps) / "checkpoint.pt", weights_only=True) for steps in (1, 20))
    assert all(torch.equal(a["model"][name], value) for name, value in b["model"].items())
    assert any(not torch.equal(a["calibration"][name], value) for name, value in b["calibration"].items())


# -------------------------------------------------------------------------------------------------- --base-run


def test_base_run_calibrates_what_another_run_kept(finished, tmp_path, command, metrics_of):
    """On a run of this very script (any script's files look the same): without calibration its metrics come back, but
    for the image score; then all kinds of calibration, and their evaluation from the checkpoint."""
    base = metrics_of(finished[0])
    words = ("--base-run", finished[0], "--calibration-steps", 6, "--calibration-batch", 8)
    for kind in ("none", "cada", "given", "classifier"):
        done = command("cada", *words, "--calibrate", kind, "--out", tmp_path / kind)
        assert done.status == 0, done.err
    none, calibrated = metrics_of(tmp_path / "none"), metrics_of(tmp_path / "cada")
    for cls, row in none["classes"].items():
        assert row["p_auroc"] == pytest.approx(base["classes"][cls]["p_auroc"], abs=1e-4)
        assert row["i_auroc"] == pytest.approx(base["classes"][cls]["i_auroc"], abs=1e-4)
    assert calibrated["compare"]["without calibration"]["mixed"] == none["mixed"] != calibrated["mixed"]
    assert calibrated["setting"]["base"] == str(finished[0]) and "backbone" not in calibrated["setting"]
    words = ("--eval", tmp_path / "cada" / "checkpoint.pt", "--seed", 1)  # a head trained anew would be another one
    assert command("cada", *words, "--out", tmp_path / "again").status == 0
    again = metrics_of(tmp_path / "again")
    assert {**again, "seed": 0} == calibrated


def test_base_run_settles_preset_and_folder(tmp_path, monkeypatch):
    """They follow from the data of the run whose maps are calibrated, and so do the options that cannot differ."""
    monkeypatch.setattr(sys, "argv", ["cada.py"])
    (tmp_path / "args.json").write_text(json.dumps(
        {"data": "mvtec", "classes": "", "image_size": 224, "mask_rule": "any", "data_root": "/place/of/data"}))

    def parse(*words):
        argv = ["--base-run", str(tmp_path), *map(str, words)]
        return runtime.parse(cada.Args, cada.RECIPE_OF_A_RUN, "", argv, method="cada", inherited=cada.of_base_run)

    args = parse()
    assert (args.preset, args.out, args.calibration_steps) == ("paper", str(Path("runs", "cada-mvtec")), 5000)
    assert (args.data, args.image_size, args.data_root) == ("mvtec", 224, "/place/of/data")
    assert parse("--data", "mvtec", "--data-root", tmp_path).data_root == str(tmp_path)
    for words in (("--data", "visa"), ("--classes", "pcb1"), ("--image-size", 320), ("--mask-rule", "half")):
        with pytest.raises(UsageError, match=f"{words[0]} .*leave that option out"):
            parse(*words)


def test_bad_base_runs_end_in_one_line(finished, tiny_data, tmp_path, command):
    def changed(name, change):
        folder = tmp_path / name
        shutil.copytree(finished[0], folder)
        change(folder)
        return folder

    def without_features(folder):
        arrays = dict(np.load(folder / "maps" / "screw.npz"))
        del arrays["features"]
        np.savez(folder / "maps" / "screw.npz", **arrays)

    def rewrite(folder, **values):
        path = folder / "args.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    cases = [
        ((tmp_path / "nowhere",), "args.json"),
        ((changed("a", lambda f: shutil.rmtree(f / "maps")),), "--save-maps"),
        ((changed("b", lambda f: (f / "maps" / "train" / "screw.npz").unlink()),), "screw.npz"),
        ((changed("c", without_features),), "features"),
        ((changed("d", lambda f: rewrite(f, corrupt="contrast:3")),), "contrast:3"),
        ((changed("f", lambda f: rewrite(f, contaminate=0.2)),), "--contaminate"),
        ((changed("e", lambda f: rewrite(f, data=str(moved))),), "moved"),
        ((finished[0], "--corrupt", "contrast"), "--corrupt"),
        ((finished[0], "--shift", "all"), "--shift"),
        ((finished[0], "--contaminate", 0.1), "--contaminate"),
        ((finished[0], "--eval", finished[0] / "checkpoint.pt"), "--eval"),
    ]
    for i, (words, named) in enumerate(cases):
        done = command("cada", "--base-run", *words, "--out", tmp_path / f"out{i}")
        assert done.status == 2, (words, done)
        assert named in done.err and done.err.count("\n") == 1 and "Traceback" not in done.err, (words, done.err)
        assert not (tmp_path / f"out{i}").exists(), words


# ---------------------------------------------------------------------------------------------- the rest


def test_help_shows_the_values_of_the_named_base(command):
    helps = {base: command("cada", "--base", base, "--help").out for base in ("revdist", "uniad")}
    flat = {base: " ".join(text.split()) for base, text in helps.items()}
    assert "(paper: 256, laptop: 192)" in flat["revdist"] and "(paper: 224, laptop: 160)" in flat["uniad"]
    assert "paper: 50000" in flat["uniad"] and "paper: 10.0" in flat["uniad"]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tested on Linux and macOS")
def test_two_processes_follow_one_with_the_doubled_batch(tiny_data, tmp_path, command):
    """torchrun, on the base with most parts: with two training images each rank's half of a step holds both, so that
    even batch statistics and mined thresholds are those of one process; losses of both stages agree, rank 0 writes."""
    shutil.copytree(tiny_data / "screw", tmp_path / "two" / "screw")
    for file in sorted((tmp_path / "two" / "screw" / "train" / "good").iterdir())[2:]:
        file.unlink()
    words = [cada.__file__, "--data", tmp_path / "two", *SMALL, "--base", "recontrast", "--steps", 2, "--log-every", 1,
             "--amp", "off", "--calibration-steps", 2, "--dropout", 0, "--lr", 1e-4, "--calibration-lr", 1e-3]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words):
        return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=env)

    one = command("cada", *words[1:], "--batch-size", 4, "--calibration-batch", 4, "--out", tmp_path / "a")
    two = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words,
              "--batch-size", 2, "--calibration-batch", 2, "--out", tmp_path / "b")
    assert one.status == 0, one.err
    assert two.returncode == 0, two.stderr
    losses = [[line["loss"] for line in contract.read_log(tmp_path / name)] for name in "ab"]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(list(csv.reader(open(tmp_path / "b" / "scores.csv")))) == 8


def test_bad_input_ends_in_one_line_and_status_2(finished, tiny_data, tmp_path, command):
    """Mistakes of users: one clear line on stderr that names the culprit, status 2, no traceback."""
    checkpoint = finished[0] / "checkpoint.pt"
    torch.save({"method": "roads", "args": {}, "model": {}}, tmp_path / "roads.pt")
    drawn = ("--data", tiny_data)
    cases = [
        ((*drawn, "--image-size", 80), "--image-size"),
        ((*drawn, "--base", "uniad", "--image-size", 100), "--image-size"),
        ((*drawn, "--image-size", 32), "--image-size"),
        ((*drawn, "--base", "rd4ad"), "--base"),
        ((*drawn, "--base"), "--base"),
        ((*drawn, "--depths", "3,4,6"), "--depths"),
        ((*drawn, "--depths", "3,3,4,0"), "--depths"),
        ((*drawn, "--base", "uniad", "--heads", 7), "--heads"),
        ((*drawn, "--smoothing", 4), "--smoothing"),
        ((*drawn, "--base", "recontrast", "--cosine", "location"), "--cosine"),
        ((*drawn, "--refit"), "--refit"),
        ((*drawn, "--regressor", "3+1"), "--regressor"),
        ((*drawn, "--dropout", 1), "--dropout"),
        ((*drawn, "--score", "top5"), "--score"),
        ((*drawn, "--contaminate", 1.0), "--contaminate"),
        ((*drawn, "--calibrate", "cada-b"), "--calibrate"),
        ((*drawn, "--out", finished[0]), "--overwrite"),
        (("--eval", tmp_path / "roads.pt"), "roads.pt"),
        (("--eval", checkpoint, "--depths", "2,1,1,1"), "checkpoint.pt"),
        (("--eval", checkpoint, "--contaminate", 0.5), "--contaminate"),
        (("--eval", checkpoint, "--predict", tiny_data, "--calibrate", "given"), "given"),
        (("--eval", checkpoint, "--predict", tiny_data, "--dropout", 0.5), "--predict"),
        (("--eval", checkpoint, "--predict", tiny_data, "--smoothing", 0), "--smoothing"),
        ((*drawn, "--lr", "1e30", "--steps", 4), "NaN"),
    ]
    contract.check_bad_input(cada, cases, SMALL, finished, tmp_path, command)


def test_given_needs_the_classes_it_was_fitted_on(tiny_data, tmp_path, command):
    words = ("--data", tiny_data, *SMALL, "--steps", 0, "--calibrate", "given")
    assert command("cada", *words, "--classes", "screw", "--out", tmp_path / "a").status == 0
    done = command("cada", "--eval", tmp_path / "a" / "checkpoint.pt", "--classes", "capsule", "--out", tmp_path / "b")
    assert done.status == 2 and "capsule" in done.err and "screw" in done.err and done.err.count("\n") == 1


def test_real_classes(real_data, tmp_path, command, metrics_of):
    """Real photographs: a short training of two real classes localises defects far better than chance."""
    done = command("cada", "--data", real_data, "--classes", "bottle,metal_plate", "--out", tmp_path / "run",
                   "--steps", 60, "--calibration-steps", 60, "--image-size", 128)
    assert done.status == 0, done.err
    assert metrics_of(tmp_path / "run")["mean"]["p_auroc"] > 0.7


def test_start_of_uniad_at_the_principal_axes(command, tiny_data, tmp_path):
    """--init pca: as in onenip.py, whose start is held to scikit-learn's; other bases have no such layers."""
    uniad, _, args = make("uniad", init="pca")
    onenip_args = onenip.Args(hidden=args.hidden, heads=args.heads, mlp=args.mlp, image_size=64)
    other = onenip.OneNIP(uniad.channels, uniad.side, onenip_args)
    features = torch.randn(9, uniad.channels, uniad.side, uniad.side, generator=torch.Generator().manual_seed(4))
    for model in (uniad, other):
        model.start_at_axes(features)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(uniad.input, name), getattr(other.input, name))
        assert torch.equal(getattr(uniad.output, name), getattr(other.output, name))
    done = command("cada", "--data", tiny_data, "--base", "revdist", "--init", "pca", "--out", tmp_path / "run")
    assert done.status == 2 and "--base uniad" in done.err and done.err.count("\n") == 1
