"""ROADS: sizes against the paper's base and the sheet's counts, every equation against a literal transcription, the
three traps, what learns and what must not, the out-of-domain views, and the whole program through its command line."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score

import contract
import roads
from common import corruptions, data, runtime
from kernels import few_tokens

CHANNELS = [16, 24, 32]  # of a small teacher; the student's widths are 32, 24, 16
CLASSES = 3
TINY = dict(image_size=64, backbone="resnet18", depths="3,2,1,1", tokens=4, head_width=8,
            adapter_backbone="efficientnet_lite0", adapter_weights="random", adapter_size=32)


def make(seed=0, channels=CHANNELS, **changes):
    args = roads.Args(**{**TINY, **changes})
    torch.manual_seed(seed)
    return roads.ROADS(channels, CLASSES, args), args


def stirred(model):
    """The model with random numbers where it starts at zero, so that nothing is hidden by a product with zero."""
    torch.manual_seed(5)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def teacher_maps(b=3, size=64, channels=CHANNELS, seed=1):
    """Random maps of strides 4, 8 and 16, smooth as real ones are."""
    g = torch.Generator().manual_seed(seed)
    return [F.interpolate(torch.randn(b, c, 2, 2, generator=g), (size // s, size // s), mode="bilinear")
            for c, s in zip(channels, (4, 8, 16))]


def pictures(b=3, size=32, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, 3, size, size), generator=g, dtype=torch.uint8)


LABELS = torch.tensor([2, 0, 1])


# --------------------------------------------------------------------------------------------------------- sizes


def size(*parts):
    return sum(p.numel() for part in parts for p in part.parameters())


def norm_widths(model):
    """Channels of the norm that the adapter sets, block by block."""
    return [w for w, depth in zip(model.adapter.widths, model.adapter.depths) for _ in range(depth)]


def paper_model(classes=15, **changes):
    args = roads.Args(adapter_weights="random", **changes)
    return roads.ROADS([256, 512, 1024], classes, args)


def test_parameter_counts_of_plain_reverse_distillation():
    """Wide-ResNet-50: the bottleneck without the two layers that RD4AD creates and never uses, the decoder with its
    batch norms; nothing else."""
    model = paper_model(prompts=False, adapter="none")
    assert size(model.bottleneck) == 58_885_120 and size(model.stages) == 24_917_504
    assert size(model) == 58_885_120 + 24_917_504
    narrow = paper_model(backbone="resnet50", prompts=False, adapter="none")
    assert narrow.stages[0][1].body[3].weight.shape == (256, 256, 3, 3), "ResNet-50's blocks have half the inner width"


def test_parameter_counts_of_prompts_and_adapter():
    """24 C² weights and 30 C biases and norms a stage, 150 prompts of width C: 33.35 M with 15 classes. The adapter's
    linear map has 13,312 outputs, two for each of the 6,656 channels of 13 norms, whose own parameters go."""
    model = paper_model()
    widths = (1024, 512, 256)
    assert size(model.promptings) == sum(24 * c * c + 30 * c for c in widths)
    assert [tuple(z.shape) for z in model.pool.z] == [(15, 10, c) for c in widths]
    assert round(size(model.promptings, model.pool) / 1e6, 2) == 33.35
    blocks = [m for m in model.modules() if isinstance(m, roads.CrossAttentionBlock)]
    assert [block.heads for block in blocks] == [32, 32, 16, 16, 8, 8]
    norms = [m for m in model.modules() if isinstance(m, roads.AdaIN)]
    assert len(norms) == 13 and size(*norms) == 0
    assert model.adapter.linear.weight.shape == (13_312, 512) and sum(norm_widths(model)) == 6_656
    assert size(model.stages) == 24_917_504 - 13_312
    assert size(model.adapter.network) == 11_176_512 - 4_800  # of each folded batch norm one of two vectors remains
    assert (model.selector.linear.in_features, model.classifier.in_features) == (2048, 1024 + 512 + 256 + 2048)


@pytest.mark.parametrize("channels, backbone, depths", [
    (CHANNELS, "resnet34", "2,3,4,6"), ([24, 40, 112], "efficientnet_lite0", "1,1,2,1"),
    ([16, 32, 64], "resnet50", "3,1,1,2")])
def test_shapes(channels, backbone, depths):
    """Whatever the teacher's widths and the picture's size, the outputs have the teacher's shapes; f1 comes first; φ is
    twice as wide as f3 and half its size; an attention head divides its width."""
    for image_size in (64, 96):
        model, _ = make(channels=channels, image_size=image_size, backbone=backbone, depths=depths)
        maps = teacher_maps(size=image_size, channels=channels)
        assert model.bottleneck(*maps).shape == (3, 2 * channels[2], image_size // 32, image_size // 32)
        out = model(maps, pictures(), LABELS, pictures(seed=3))
        assert [r.shape for r in out["maps"]] == [m.shape for m in maps]
        assert out["selector"].shape == out["classifier"].shape == (3, CLASSES)
        norms = sum(int(d) * c for d, c in zip(depths.split(",")[1:], reversed(channels)))
        assert len(model.bottleneck.blocks) == int(depths[0])
        assert out["code"].shape == out["shifted_code"].shape == (3, 2 * norms)


@pytest.mark.parametrize("backbone, signed", [("resnet18", False), ("efficientnet_lite0", True)])
def test_student_can_be_negative_where_its_teacher_is(backbone, signed):
    """ResNet's maps end with a ReLU, and so does a stage of the student without prompts; EfficientNet's do not."""
    model, _ = make(backbone=backbone, prompts=False)
    assert all((m < 0).any().item() is signed for m in model(teacher_maps(), pictures())["maps"])
    kept = [[block.signed for block in stage] for stage in model.stages]
    assert kept == [[False, signed], [signed], [signed]]


# ----------------------------------------------------------------------------------- equations, transcribed slowly


def layer_norm(row, module):
    mean = sum(row.tolist()) / len(row)
    variance = sum((v - mean) ** 2 for v in row.tolist()) / len(row)
    return (row - mean) / math.sqrt(variance + module.eps) * module.weight + module.bias


def literal_attention(block, queries, memory):
    """Eq. 2 of one image, head by head, query by query, key by key: queries (n, C), memory (m, C) -> (n, C)."""
    q, k, v = block.to_q(queries), block.to_k(memory), block.to_v(memory)
    d = q.shape[1] // block.heads
    out = torch.zeros_like(q)
    for head in range(block.heads):
        part = slice(head * d, (head + 1) * d)
        for n in range(len(q)):
            weights = torch.stack([torch.exp((q[n, part] * k[m, part]).sum() / math.sqrt(d)) for m in range(len(k))])
            out[n, part] = sum(w * row for w, row in zip(weights / weights.sum(), v[:, part]))
    return block.to_out(out)


def literal_step(block, x, y):
    """Eq. 1 (x the prompts, y the map) and Eq. 3 (the other way round) of one image."""

    def normalised(t, norm):
        return torch.stack([layer_norm(row, norm) for row in t])

    attended = literal_attention(block, normalised(x, block.norm_x), normalised(y, block.norm_y)) + x
    hidden = block.ffn[0](normalised(attended, block.norm))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    return block.ffn[2](hidden) + x


def test_prompting_is_equations_1_to_3():
    """The prompts read the map, then the map reads what they have become; in float64."""
    prompting = roads.Prompting(16, make()[1]).double()
    assert prompting.prompts_read.heads == 2
    for p in prompting.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, z = torch.randn(2, 16, 3, 4, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    prompted, posterior = prompting(x, z)
    for i in range(2):
        tokens = torch.stack([x[i, :, r, c] for r in range(3) for c in range(4)])
        z_hat = literal_step(prompting.prompts_read, z[i], tokens)
        expected = literal_step(prompting.map_reads, tokens, z_hat)
        torch.testing.assert_close(posterior[i], z_hat)
        for r, c in [(0, 0), (0, 3), (1, 2), (2, 3)]:
            torch.testing.assert_close(prompted[i, :, r, c], expected[4 * r + c])


@pytest.mark.parametrize("few, many", [("x", "y"), ("y", "x")])
def test_attention_that_never_projects_the_map_is_the_printed_one(few, many):
    """Eq. 2 with all projections, head by head, in float64: the same output and the same gradients of both inputs and
    of every parameter, whichever side the map is."""
    block = roads.CrossAttentionBlock(16, make()[1]).double()
    parameters = [p for name, p in block.named_parameters() if name.startswith(("to_", "norm_"))]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.5)
    sides = {few: torch.randn(4, 16).double().requires_grad_(), many: 3 * torch.randn(12, 16).double() + 2}
    sides[many].requires_grad_()
    x, y = sides["x"], sides["y"]
    assert few_tokens.folding_pays(len(x), len(y), 16, block.heads), "or the test would compare the formula to itself"
    folded = block.attend(x[None], y[None])[0]
    printed = literal_attention(block, block.norm_x(x), block.norm_y(y))
    torch.testing.assert_close(folded, printed, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(printed)
    ours = torch.autograd.grad(folded, [x, y, *parameters], upstream)
    exact = torch.autograd.grad(printed, [x, y, *parameters], upstream)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_prompts_start_as_plain_reverse_distillation():
    """At the start F' = F and ẑ = z, to the last bit."""
    prompting = roads.Prompting(16, make()[1])
    x, z = torch.randn(2, 16, 4, 4), torch.randn(2, 4, 16)
    prompted, posterior = prompting(x, z)
    assert torch.equal(prompted, x) and torch.equal(posterior, z)


def test_heads():
    """The most that divide the width and are not narrower than asked; one where the width is less than that."""
    cases = {(1024, 32): 32, (40, 16): 2, (112, 32): 2, (24, 32): 1, (7, 2): 1, (9, 2): 3}
    for (width, head_width), heads in cases.items():
        assert roads.number_of_heads(width, head_width) == heads


def test_pool_gives_a_class_its_own_prompts():
    model, _ = make()
    rows = model.pool(torch.tensor([1, 0, 1]))
    assert [tuple(z.shape) for z in rows] == [(3, 4, 32), (3, 4, 24), (3, 4, 16)]
    for stage, z in enumerate(rows):
        assert torch.equal(z[0], model.pool.z[stage][1])
        assert torch.equal(z[0], z[2]) and not torch.equal(z[0], z[1])
    bound = math.sqrt(6 / (4 + 32))  # Xavier, of the (l, C) matrix
    assert 0.9 * bound < model.pool.z[0].abs().max() <= bound


def test_adain():
    """γ (x - mean) / σ + β, channel by channel; the adapter's start gives plain instance norm."""
    x, style = torch.randn(2, 16, 4, 5), torch.randn(2, 2, 16)
    got = roads.AdaIN(16, learned=False)(x, style)
    for i in range(2):
        for c in range(16):
            mean, variance = x[i, c].mean(), ((x[i, c] - x[i, c].mean()) ** 2).mean()
            expected = style[i, 0, c] * (x[i, c] - mean) / torch.sqrt(variance + 1e-5) + style[i, 1, c]
            torch.testing.assert_close(got[i, c], expected)
    learned = roads.AdaIN(16, learned=True)
    torch.testing.assert_close(learned(x), F.instance_norm(x))
    assert size(learned) == 32
    model, _ = make()
    styles = model.adapter.styles(model.adapter(pictures()))
    assert [len(stage) for stage in styles] == [2, 1, 1]
    for stage, width in zip(styles, (32, 24, 16)):
        for style in stage:
            assert style.shape == (3, 2, width)
            assert torch.equal(style[:, 0], torch.ones(3, width)) and not style[:, 1].any()


def test_adapter_and_its_control_start_as_the_same_function():
    """--adapter style and instance-norm differ by nothing but where γ and β come from."""
    maps, outputs = teacher_maps(), []
    for adapter in ("style", "instance-norm"):
        outputs.append(make(adapter=adapter, prompts=False)[0](maps, pictures())["maps"])
    for a, b in zip(*outputs):
        torch.testing.assert_close(a, b)


def test_block_follows_its_own_images_style():
    """Block k of image i gets γ and β number k of image i; the norm before the skip is the one replaced."""
    model, _ = make()
    seen = []
    for module in model.modules():
        if isinstance(module, roads.AdaIN):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    torch.nn.init.normal_(model.adapter.linear.weight)
    model(teacher_maps(), pictures(), LABELS)
    gamma, beta = model.adapter(pictures()).chunk(2, dim=1)
    assert torch.equal(torch.cat([style[:, 0] for style in seen], 1), gamma)
    assert torch.equal(torch.cat([style[:, 1] for style in seen], 1), beta)
    block, x, style = model.stages[0][1].eval(), torch.randn(1, 32, 4, 4), torch.randn(1, 2, 32)
    torch.testing.assert_close(block(x, style), F.relu(block.norm(block.body(x), style) + x))


@pytest.mark.parametrize("distance", ["flat", "location"])
def test_losses_are_equations_4_to_6(distance):
    """L_KD: 1 - cos per scale, of whole maps or location by location; L_CE and L_ζ: cross-entropies of the true class;
    L_CS: 1 - cos of the two codes; weights η, δ, ζ, μ."""
    model, args = make(distance=distance, zeta=0.5)
    stirred(model)
    maps, view, shifted = teacher_maps(), pictures(), pictures(seed=3)
    total, parts = roads.losses(model, maps, view, LABELS, shifted, args)
    out = model(maps, view, LABELS, shifted)

    def cos(a, b):
        return sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))

    kd = 0
    for f, rebuilt in zip(maps, out["maps"]):
        f, rebuilt = f.detach().double().numpy(), rebuilt.detach().double().numpy()
        if distance == "flat":
            kd += np.mean([1 - cos(f[i].ravel(), rebuilt[i].ravel()) for i in range(3)])
        else:
            h, w = f.shape[2:]
            kd += np.mean([1 - cos(f[i, :, r, c], rebuilt[i, :, r, c]) for i in range(3) for r in range(h)
                           for c in range(w)])
    assert parts["kd"].item() == pytest.approx(kd, rel=1e-4)
    for name, logits in (("ce", out["classifier"]), ("selector", out["selector"])):
        likelihood = logits.detach().double().exp().numpy()
        expected = -np.mean([math.log(row[k] / row.sum()) for row, k in zip(likelihood, LABELS)])
        assert parts[name].item() == pytest.approx(expected, rel=1e-4)
    codes, others = (out[name].detach().double().numpy() for name in ("code", "shifted_code"))
    assert parts["cs"].item() == pytest.approx(np.mean([1 - cos(a, b) for a, b in zip(codes, others)]), rel=1e-3)
    assert parts["code_variance"].item() == pytest.approx(codes.var(0).mean(), rel=1e-4)
    value = {name: part.item() for name, part in parts.items()}
    assert total.item() == pytest.approx(
        0.95 * value["kd"] + 0.025 * (value["ce"] + value["cs"]) + 0.5 * value["selector"], rel=1e-5)


def test_out_of_domain_views_pass_through_the_adapter_only():
    """The student learns from the plain pictures: what it rebuilds does not depend on the views, the codes do."""
    model = stirred(make()[0]).eval()
    outs = [model(teacher_maps(), pictures(), LABELS, view) for view in (None, pictures(seed=3), pictures(seed=4))]
    for out in outs[1:]:
        for a, b in zip(out["maps"], outs[0]["maps"]):
            torch.testing.assert_close(a, b)
    assert not torch.allclose(outs[1]["shifted_code"], outs[2]["shifted_code"])


# ------------------------------------------------------------------------------------------------------ the traps


def test_label_leak():
    """With the true class choosing the prompts, L_CE can be solved without looking at the picture; so the selector's
    loss must depend on the picture alone: not on the prompts, nor on the class that chooses them."""
    model, _ = make()
    stirred(model)
    maps, view = teacher_maps(), pictures()
    before = model(maps, view, LABELS)
    with torch.no_grad():
        for z in model.pool.z:
            z.normal_()
    after, other = model(maps, view, LABELS), model(maps, view, (LABELS + 1) % CLASSES)
    assert torch.equal(before["selector"], after["selector"]) and torch.equal(after["selector"], other["selector"])
    assert not torch.equal(after["classifier"], other["classifier"])
    model.zero_grad()
    F.cross_entropy(after["selector"], LABELS).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"bottleneck", "selector"}


def test_detached_selector_leaves_the_bottleneck_alone():
    model, _ = make(detach_selector=True)
    F.cross_entropy(model(teacher_maps(), pictures(), LABELS)["selector"], LABELS).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"selector.linear.weight", "selector.linear.bias"}


def test_style_loss_has_a_trivial_minimum_which_the_log_betrays():
    """A constant code costs nothing, and its variance between images is zero."""
    model, args = make()
    _, parts = roads.losses(model, teacher_maps(), pictures(), LABELS, pictures(seed=3), args)
    assert parts["cs"].item() == pytest.approx(0, abs=1e-6) and parts["code_variance"].item() == 0
    torch.nn.init.normal_(model.adapter.linear.weight)
    _, parts = roads.losses(model, teacher_maps(), pictures(), LABELS, pictures(seed=3), args)
    assert parts["cs"] > 1e-4 and parts["code_variance"] > 1e-4


def test_without_a_class_the_selector_chooses():
    model, _ = make()
    stirred(model.eval())
    maps, view = teacher_maps(), pictures()
    out = model(maps, view)
    again = model(maps, view, out["selector"].argmax(1))
    other = model(maps, view, (out["selector"].argmax(1) + 1) % CLASSES)
    for a, b, c in zip(out["maps"], again["maps"], other["maps"]):
        assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("changes, frozen", [
    (dict(), ()), (dict(adapter_lr=0.0), ("adapter.network",)), (dict(adapter="instance-norm"), ()),
    (dict(adapter="none"), ()), (dict(prompts=False), ())])
def test_gradient_reaches_every_trainable_parameter(changes, frozen):
    """No part is dead, and nothing frozen is touched. By construction the biases of keys get none: softmax ignores
    them. In float64, where their rounding noise lies far below any true gradient."""
    model, args = make(**changes)
    model = stirred(model).double()
    normalize = data.normalize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "normalize", lambda images: normalize(images).double())
        maps = [f.double() for f in teacher_maps()]
        roads.losses(model, maps, pictures(), LABELS, pictures(seed=3), args)[0].backward()
    trainable = {name: p for name, p in model.named_parameters() if not name.startswith(frozen or "-")}
    largest = max(p.grad.abs().max() for p in trainable.values() if p.grad is not None)
    dead = [n for n, p in trainable.items() if p.grad is None or p.grad.abs().max() < 1e-14 * largest]
    assert [n for n in dead if not n.endswith("to_k.bias")] == []
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if n not in trainable)
    assert not model.adapter or not model.train().adapter.network.training


def reached(model, args):
    """The first names of the parameters that get a gradient from the total loss."""
    stirred(model)
    roads.losses(model, teacher_maps(), pictures(), LABELS, pictures(seed=3), args)[0].backward()
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_every_loss_has_its_own_weight():
    """δ = 0 leaves ζ trained, as ζ's weight 0 leaves the classifier; with μ = 0 the adapter learns from L_KD alone."""
    everything = {"bottleneck", "stages", "pool", "promptings", "selector", "classifier", "adapter"}
    assert reached(*make()) == everything
    assert reached(*make(delta=0.0)) == everything - {"classifier"}
    assert reached(*make(zeta=0.0)) == everything - {"selector"}
    zeta_alone = make(eta=0.0, delta=0.0, mu=0.0)
    assert reached(*zeta_alone) == {"bottleneck", "selector"}
    assert reached(*make(prompts=False, mu=0.0)) == {"bottleneck", "stages", "adapter"}
    assert reached(*make(prompts=False, mu=0.0, eta=0.0)) == set()


def test_overfits_a_few_images():
    """120 steps on three images: the distance falls below a tenth of its start, both classifiers know the classes, and
    the prompts have come into use."""
    model, args = make(adapter_lr=0.0)
    maps, view, shifted = teacher_maps(), pictures(), pictures(seed=3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3, betas=(0.5, 0.999))
    first = None
    for _ in range(120):
        loss, parts = roads.losses(model, maps, view, LABELS, shifted, args)
        first = first or parts["kd"].item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["kd"].item() < first / 10 and parts["ce"].item() < 0.1 and parts["selector"].item() < 0.1
    with torch.no_grad():
        own, other = (model(maps, view, labels)["maps"] for labels in (LABELS, (LABELS + 1) % CLASSES))
    assert max(((a - b).norm() / a.norm()).item() for a, b in zip(own, other)) > 1e-3


# ------------------------------------------------------------------------------------------- out-of-domain views


def photo(size=48):
    """A smooth coloured picture with an edge."""
    y, x = np.mgrid[:size, :size] / size
    image = np.stack([x, y, 0.5 + 0.3 * np.sin(6 * x * y)], -1)
    image[size // 3:size // 2, size // 4:] = 0.2, 0.5, 0.7
    return (255 * image).astype(np.uint8)


def test_operations_are_the_six_that_no_test_corruption_uses():
    assert list(roads.OPERATIONS) == ["autocontrast", "equalize", "posterize", "solarize", "color", "sharpness"]
    assert not set(roads.OPERATIONS) & {"brightness", "contrast", *corruptions.NAMES}


@pytest.mark.parametrize("name", list(roads.OPERATIONS))
def test_no_operation_is_a_test_corruption(name):
    """At all levels: flat pictures stay flat (no noise), no corruption of any severity does about the same to a picture
    (no brightness, no contrast), and what concerns edges makes them stronger (no blur)."""

    def apply(array, level):
        return np.asarray(roads.OPERATIONS[name](Image.fromarray(array), level)).astype(float)

    def variation(array):
        return np.abs(np.diff(array.astype(float), axis=0)).sum()

    image = photo()
    for level in (0.1, 1, 3, 10):
        for grey in (40, 128, 220):
            assert np.ptp(apply(np.full((8, 8, 3), grey, np.uint8), level), axis=(0, 1)).max() == 0
        changed = apply(image, level)
        for other in corruptions.NAMES:
            for severity in range(1, 6):
                shifted = corruptions.corrupt(image, other, severity).astype(float)
                assert np.abs(changed - shifted).mean() > 2, (other, severity)
        if name == "sharpness":
            assert variation(changed) >= variation(image)


def test_view_is_a_function_of_its_generator():
    """The same draw is the same view, another one is another; a view is clearly not the picture; every level runs."""
    image = photo()

    def view(*seed):
        return roads.out_of_domain(image, np.random.default_rng(seed), 3)

    assert view(1).shape == image.shape and view(1).dtype == np.uint8
    assert np.array_equal(view(1), view(1)) and not np.array_equal(view(1), view(2))
    assert np.mean([np.abs(view(k).astype(float) - image).mean() for k in range(20)]) > 5
    roads.out_of_domain(image, np.random.default_rng(0), 0)  # the weakest
    for k in range(10):
        roads.out_of_domain(image, np.random.default_rng(k), 10)  # the strongest


def test_view_is_augmix(monkeypatch):
    """Three chains of one to three operations each; the result lies between the picture and the mix of the chains."""
    calls = []
    monkeypatch.setattr(roads, "OPERATIONS", {
        name: lambda image, level, name=name: calls.append((name, level)) or Image.new("RGB", image.size, (90, 90, 90))
        for name in roads.OPERATIONS})
    depths, values = set(), []
    for k in range(60):
        calls.clear()
        got = roads.out_of_domain(np.zeros((2, 2, 3), np.uint8), np.random.default_rng(k), 3)
        assert len(np.unique(got)) == 1, "one share for the whole picture"
        assert 3 <= len(calls) <= 9 and all(0.1 <= level <= 3 for _, level in calls)
        depths.add(len(calls))
        values.append(got[0, 0, 0])
    assert depths == set(range(3, 10))
    assert max(values) <= 90 and 30 < np.mean(values) < 60, "between the picture, 0, and the mix of the chains, 90"


def test_training_stream():
    """Sample k is a function of (seed, k); an epoch shows an image at most once; every view has a draw of its own, and
    the plain view is the picture at the adapter's size."""
    images = pictures(10, 16)
    stream = roads.Stream(images, 3, images_per_step=4, needs_images=True, size=8, severity=3)
    index = [stream[k]["index"] for k in range(24)]
    assert stream.per_epoch == 8
    assert all(len(set(index[start:start + 8])) == 8 for start in (0, 8, 16)) and index[:8] != index[8:16]
    a, b = stream[13], stream[13]
    assert all(torch.equal(a[name], b[name]) for name in ("image", "view", "shifted"))
    assert torch.equal(a["image"], images[a["index"]])
    assert torch.equal(a["view"], roads.resized(images[a["index"]][None], 8)[0]) and a["shifted"].shape == (3, 8, 8)
    again = next(k for k in range(14, 100) if stream[k]["index"] == a["index"])
    assert torch.equal(stream[again]["view"], a["view"]) and not torch.equal(stream[again]["shifted"], a["shifted"])
    assert set(roads.Stream(images, 3, 4, False, 8, 3)[0]) == {"index", "view", "shifted"}


def test_shrink():
    """Antialiased: a fine checkerboard becomes grey; the same size changes nothing."""
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).mul(255).to(torch.uint8).expand(1, 3, 32, 32)
    assert torch.equal(roads.resized(board, 32), board)
    small = roads.resized(board, 8)
    assert small.dtype == torch.uint8 and small.shape == (1, 3, 8, 8)
    assert (small[:, :, 1:-1, 1:-1].float() - 127.5).abs().max() <= 1


# ------------------------------------------------------------------------------------------------------- scoring


class Passing(torch.nn.Module):
    """Stands in for the frozen features: the maps follow from the pictures, one from another."""

    def forward(self, images):
        return images

    def split(self, images):
        rows = images.float()[:, :, ::4, ::4]  # (B, 3, 16, 16)
        return [F.avg_pool2d(rows, k)[:, :1].repeat(1, c, 1, 1) * torch.linspace(0.5, 2, c)[:, None, None] + 1
                for k, c in zip((1, 2, 4), CHANNELS)]

    def maps(self, images):
        return self.split(self(images))


def scorer(**changes):
    model, args = make(**changes)
    stirred(model)
    return roads.Scorer(args, runtime.Run("roads", None, torch.device("cpu")), Passing(), model, ["a", "b", "c"]), model


def samples(classes, labels=None):
    return [data.Sample(f"{i}.png", None, label, cls, "", "")
            for i, (cls, label) in enumerate(zip(classes, labels or [0] * len(classes)))]


@pytest.mark.parametrize("power", [0.0, 0.25])
def test_map_and_image_score(power):
    """Sum over scales of 1 - cos, with --norm-power weighted by the teacher's root mean square, resized by bilinear
    interpolation with aligned corners, smoothed; its maximum."""
    import scipy.ndimage
    score, model = scorer(norm_power=power)
    images = pictures(3, 64)
    got, value = score(images, samples("abc"))
    maps = Passing().split(images)
    with torch.no_grad():
        expected = summed(model(maps, images)["maps"], maps, power)
    expected = np.stack([scipy.ndimage.gaussian_filter(m, 4.0) for m in expected.numpy()])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    assert torch.equal(value, got.amax((1, 2)))


def summed(rebuilt, maps, power):
    """Distance maps (B, 64, 64), by their definition."""
    total = 0
    for r, m in zip(rebuilt, maps):
        d = (1 - F.cosine_similarity(r, m, dim=1)) * m.square().mean(1).sqrt() ** power  # (B, h, w)
        total = total + F.interpolate(d[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0]
    return total


def test_score_of_an_image_does_not_depend_on_its_batch():
    score, _ = scorer()
    images, four = pictures(4, 64), samples("abca")
    alone = torch.cat([score(images[i:i + 1], four[i:i + 1])[0] for i in range(4)])
    torch.testing.assert_close(score(images, four)[0], alone)


def test_selection_report():
    """Accuracy over images whose class was trained; what the given class would yield: I-AUROC from scores with the
    prompts of the true class. Every pass starts a new account."""
    score, model = scorer()
    images, labels = pictures(8, 64), [0, 1, 0, 1, 0, 1, 0, 1]
    maps = Passing().split(images)
    with torch.no_grad():
        guess = model(maps, images)["selector"].argmax(1)
    true = ["abc"[g] for g in guess]
    true[0], true[1] = ("abc"[(guess[i] + 1) % 3] for i in (0, 1))
    true[2] = "spoon"
    _, value = score(images[:5], samples(true, labels)[:5])
    score(images[5:], samples(true, labels)[5:])
    given = scorer(class_at_test="given")[0]
    known = [0, 1, 3, 4, 5, 6, 7]
    part = [samples(true, labels)[i] for i in known]
    _, expected = given(images[known], part)
    assert not torch.allclose(value[:2], expected[:2])
    assert [value for *_, value in score.account] == pytest.approx(expected.tolist(), rel=1e-5)
    report = score.of_pass()
    assert report["selector accuracy"] == pytest.approx(5 / 7)
    aucs = [roc_auc_score([s.label for s in part if s.cls == cls], [v for s, v in zip(part, expected) if s.cls == cls])
            for cls in "abc" if len({s.label for s in part if s.cls == cls}) == 2]
    assert report["I-AUROC, class given"] == pytest.approx(np.mean(aucs))
    assert given.of_pass() == pytest.approx(report)
    assert score.of_pass() == {"selector accuracy": None, "I-AUROC, class given": None}
    assert list(score.class_of.values())[:3] == ["abc"[g] for g in guess[:3]]


def test_code_cosines():
    """Cosines of the adapter's codes: of an image with itself in the first pass, of each image with each other one.
    Of followed images only; without prompts there is nothing else to report; in the first pass no clean copy."""
    score, model = scorer(prompts=False)
    images, eight = pictures(8, 64), samples("abcabcab")
    assert score(images, eight) and score.of_pass() == {}, "only where it is asked for"
    score.follow(eight[:6])
    mean_of = {}
    codes = {}
    for name, shown in (("clean", images), ("shifted", 255 - images)):
        for part in (slice(0, 5), slice(5, 8)):
            score(shown[part], eight[part])
        mean_of[name] = score.of_pass()
        with torch.no_grad():
            codes[name] = model.adapter(shown)[:6].double()
    for name, code in codes.items():
        pairs = [F.cosine_similarity(code[i], code[j], dim=0).item() for i in range(6) for j in range(6) if i != j]
        assert mean_of[name]["code cosine, others"] == pytest.approx(np.mean(pairs), rel=1e-5)
    same = F.cosine_similarity(codes["clean"], codes["shifted"]).mean().item()
    assert mean_of["clean"]["code cosine, clean copy"] is None
    assert mean_of["shifted"]["code cosine, clean copy"] == pytest.approx(same, rel=1e-5)
    many = [dataclasses.replace(eight[0], image=str(i)) for i in range(511)]
    score.follow(many)
    assert len(score.followed) == 256 and score.followed == {s.image for s in many[::2]}, "spread over all of the data"


# ---------------------------------------------------------------------------------- the program, as a user runs it


SMALL = ("--image-size", 64, "--adapter-size", 32, "--depths", "3,1,1,1", "--batch-size", 8, "--steps", 12,
         "--log-every", 4, "--checkpoint-every", 4)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    return contract.first_run(roads, ("--data", tiny_data, *SMALL), tmp_path_factory.mktemp("runs"))


def test_end_to_end(finished):
    """Train, evaluate, report: every file of the contract, and numbers in it that belong together."""
    result, log, state, kept = contract.check_files(finished, "roads")
    assert result["mean"]["p_auroc"] > 0.55, "twelve steps on pretrained features beat chance by far"
    for maps, scores in kept.values():
        assert [score for _, score in scores] == pytest.approx(maps["maps"].max((1, 2)).tolist(), rel=1e-5)
    assert [line["step"] for line in log] == [4, 8, 12]
    parts = {"kd", "ce", "selector", "cs", "code_variance"}
    assert set(log[0]) == {"step", "loss", "lr", "images_per_s", "data_wait"} | parts
    assert log[0]["loss"] == pytest.approx(
        0.95 * log[0]["kd"] + 0.025 * (log[0]["ce"] + log[0]["selector"] + log[0]["cs"]), rel=1e-4)
    assert log[2]["kd"] < log[0]["kd"] and log[0]["code_variance"] > 0
    assert state["step"] == 12 and state["normal_score"] > 0 and state["classes"] == sorted(result["classes"])
    assert 0.125 < result["setting"]["selector accuracy"] <= 1
    assert 0 <= result["setting"]["I-AUROC, class given"] <= 1


def test_every_step_goes_through_the_parallel_model(tiny_data, tmp_path, command, monkeypatch):
    """Protects torchrun, which averages the gradients of what goes through it."""
    words = ("--data", tiny_data, "--classes", "screw", *SMALL, "--steps", 2)
    contract.check_every_step_is_parallel(roads, words, [2], tmp_path / "run", command, monkeypatch)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_is_uninterrupted(finished, tiny_data, tmp_path, command, metrics_of):
    """SIGKILL between two checkpoints, then --resume: the numbers, the log and the weights of the run that was never
    interrupted, out-of-domain views included."""
    words = ("--data", tiny_data, *SMALL)
    contract.check_killed_and_resumed(roads, words, finished, tmp_path / "run", command, metrics_of)


def test_predict(finished, tiny_data, tmp_path, command):
    """The method's own column: the class whose prompts were used, empty where a picture could not be read."""
    contract.check_predict(roads, ("class",), finished, tiny_data, tmp_path / "p", command)
    chosen = [row["class"] for row in csv.DictReader(open(tmp_path / "p" / "predictions.csv"))]
    assert set(chosen) - {""} <= set(torch.load(finished[0] / "checkpoint.pt", weights_only=True)["classes"])


def test_shift(finished, tmp_path, command, metrics_of):
    """--shift all: each condition has its numbers, and says how often the selector chose right. Of a class that was
    not trained nothing is said."""
    out = tmp_path / "shift"
    done = command("roads", "--eval", finished[0] / "checkpoint.pt", "--out", out, "--shift", "all",
                   "--classes", "screw,woven_cloth")
    assert done.status == 0, done.err
    shift = metrics_of(out)["shift"]
    assert set(shift) == {f"{name}:3" for name in corruptions.NAMES}
    for condition in [metrics_of(out), *shift.values()]:
        assert 0 <= condition["setting"]["selector accuracy"] <= 1
        assert 0 <= condition["setting"]["I-AUROC, class given"] <= 1
        assert set(condition["classes"]) == {"screw", "woven_cloth"}
        assert 0 < condition["setting"]["code cosine, others"] <= 1
    assert metrics_of(out)["setting"]["code cosine, clean copy"] is None
    for condition in shift.values():
        assert 0 < condition["setting"]["code cosine, clean copy"] <= 1
    assert "code cosine, clean copy" in done.out


def test_class_at_test_given(finished, tiny_data, tmp_path, command, metrics_of):
    """Then the image score of the table is the one that the selector's report calls "class given"; a class that was
    never trained cannot be given, but can be selected for."""
    checkpoint, out = finished[0] / "checkpoint.pt", tmp_path / "given"
    done = command("roads", "--eval", checkpoint, "--class-at-test", "given", "--out", out)
    assert done.status == 0, done.err
    result, selected = metrics_of(out), metrics_of(finished[0])
    given = result["setting"]["I-AUROC, class given"]
    assert result["mean"]["i_auroc"] == pytest.approx(given)
    assert selected["setting"]["I-AUROC, class given"] == pytest.approx(given)
    assert result["setting"]["selector accuracy"] == selected["setting"]["selector accuracy"]
    shutil.copytree(tiny_data / "screw", tmp_path / "other" / "bolt")
    words = ("--eval", checkpoint, "--data", tmp_path / "other")
    refused = command("roads", *words, "--class-at-test", "given", "--out", tmp_path / "refused")
    assert refused.status == 2 and "'bolt'" in refused.err and refused.err.count("\n") == 1
    assert command("roads", *words, "--out", tmp_path / "bolt").status == 0
    assert metrics_of(tmp_path / "bolt")["setting"]["selector accuracy"] is None
    assert metrics_of(tmp_path / "bolt")["setting"]["I-AUROC, class given"] is None


def test_interrupted_run(finished, tiny_data, tmp_path, command, metrics_of):
    """Its checkpoint can be evaluated, and the report says after how many steps; --predict, which lacks the normal
    score, ends in one line."""
    state = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    state["finished"] = []
    state["step"] = 4
    del state["normal_score"]
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(state, checkpoint)
    done = command("roads", "--eval", checkpoint, "--out", tmp_path / "eval", "--classes", "screw")
    assert done.status == 0, done.err
    assert metrics_of(tmp_path / "eval")["setting"]["steps"] == 4
    done = command("roads", "--eval", checkpoint, "--predict", tiny_data / "screw", "--out", tmp_path / "p")
    assert done.status == 2 and "--resume" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("words, adapter, logged", [
    (("--no-prompts", "--mu", 0), "efficientnet_lite0", {"kd", "cs", "code_variance"}),
    (("--no-adapter",), "none", {"kd", "ce", "selector"}),
    (("--no-prompts", "--no-adapter"), "none", {"kd"}),
    (("--adapter", "none", "--detach-selector"), "none", {"kd", "ce", "selector"}),
    (("--adapter", "instance-norm", "--distance", "location"), "instance-norm", {"kd", "ce", "selector"}),
    (("--tokens", 3, "--head-width", 8, "--ffn", 2),
     "efficientnet_lite0", {"kd", "ce", "selector", "cs", "code_variance"}),
    (("--adapter-lr", 0, "--eta", 0.9, "--delta", 0.05, "--mu", 0.05, "--amp", "bf16"),
     "frozen", {"kd", "ce", "selector", "cs", "code_variance"}),
    (("--backbone", "resnet18", "--weights", "random", "--adapter-backbone", "resnet18", "--adapter-weights", "random",
      "--schedule", "constant"), "random", {"kd", "ce", "selector", "cs", "code_variance"})])
def test_every_ablation_runs(words, adapter, logged, tiny_data, tmp_path, command, metrics_of):
    """Every row of Table 4, the control with instance norm, and every open choice: it builds, trains, is evaluated, and
    says what it is."""
    out = tmp_path / "run"
    done = command("roads", "--data", tiny_data, "--out", out, "--classes", "screw", *SMALL, "--steps", 2, *words)
    assert done.status == 0, done.err
    setting = metrics_of(out)["setting"]
    assert adapter in setting["adapter"] and ("selector accuracy" in setting) is ("selector" in logged)
    assert set(contract.read_log(out)[0]) == {"step", "loss", "lr", "images_per_s", "data_wait"} | logged


def test_features_computed_on_the_fly_train_the_same_model(tiny_data, tmp_path, command):
    words = ("--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--steps", 3, "--log-every", 1, "--amp", "off")
    contract.check_features_on_the_fly(roads, words, tmp_path, command)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tested on Linux and macOS")
def test_two_processes_follow_one_with_the_doubled_batch(tiny_data, tmp_path, command):
    """torchrun: with two training images each rank's half of a step holds both, so that even the batch statistics are
    those of one process. The losses agree, L_CS included, since a view belongs to its sample and not to the process
    that draws it; rank 0 alone writes; the selector's account covers all ranks' images."""
    shutil.copytree(tiny_data / "screw", tmp_path / "two" / "screw")
    for file in sorted((tmp_path / "two" / "screw" / "train" / "good").iterdir())[2:]:
        file.unlink()
    words = [roads.__file__, "--data", tmp_path / "two", *SMALL, "--steps", 2, "--log-every", 1, "--amp", "off",
             "--lr", 1e-4, "--norm-power", 0]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = command("roads", *words[1:], "--batch-size", 4, "--out", tmp_path / "a")
    two = subprocess.run([str(w) for w in (sys.executable, "-m", "torch.distributed.run", "--standalone",
                                           "--nproc_per_node=2", *words, "--batch-size", 2, "--out", tmp_path / "b")],
                         capture_output=True, text=True, env=env)
    assert one.status == 0, one.err
    assert two.returncode == 0, two.stderr
    for name in ("loss", "kd", "ce", "selector", "cs"):
        losses = [[line[name] for line in contract.read_log(tmp_path / folder)] for folder in "ab"]
        assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-6), name
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert a["images"] == b["images"] == 7
    assert a["setting"]["I-AUROC, class given"] == b["setting"]["I-AUROC, class given"]


def test_bad_input_ends_in_one_line_and_status_2(finished, tiny_data, tmp_path, command):
    """Mistakes of users: one clear line on stderr that names the culprit, status 2, no traceback, and neither a run
    folder nor a half-written file left behind. (Broken data sets: the tests of OneNIP and of common.)"""
    checkpoint = finished[0] / "checkpoint.pt"
    torch.save({"method": "omniad", "args": {}, "model": {}}, tmp_path / "omniad.pt")
    drawn = ("--data", tiny_data)
    cases = [
        ((*drawn, "--image-size", 100), "--image-size"),
        ((*drawn, "--image-size", 32), "--image-size"),
        ((*drawn, "--adapter-size", 50), "--adapter-size"),
        ((*drawn, "--depths", "3,4,6"), "--depths"),
        ((*drawn, "--depths", "3,3,4,0"), "--depths"),
        ((*drawn, "--tokens", 0), "--tokens"),
        ((*drawn, "--head-width", 0), "--head-width"),
        ((*drawn, "--adapter", "batch-norm"), "--adapter"),
        ((*drawn, "--adapter-backbone", "vgg16"), "--adapter-backbone"),
        ((*drawn, "--adapter-weights", tmp_path / "none.pth"), "--adapter-weights"),
        ((*drawn, "--weights", tmp_path / "none.pth"), "none.pth"),
        ((*drawn, "--ood-severity", 11), "--ood-severity"),
        ((*drawn, "--mu", "-1"), "--mu"),
        ((*drawn, "--out", finished[0]), "--overwrite"),
        (("--eval", tmp_path / "omniad.pt"), "omniad.pt"),
        (("--eval", checkpoint, "--depths", "2,1,1,1"), "checkpoint.pt"),
        (("--eval", checkpoint, "--no-prompts"), "checkpoint.pt"),
        (("--eval", checkpoint, "--predict", tiny_data, "--class-at-test", "given"), "--class-at-test"),
        (("--eval", checkpoint, "--predict", tiny_data, "--sigma", 2), "--sigma"),
        (("--eval", checkpoint, "--predict", tiny_data, "--norm-power", 1), "--norm-power"),
        (("--eval", checkpoint, "--predict", tiny_data, "--image-size", 96), "--image-size"),
        ((*drawn, "--lr", "1e30", "--steps", 4), "NaN"),
    ]
    contract.check_bad_input(roads, cases, SMALL, finished, tmp_path, command)


def test_real_classes(real_data, tmp_path, command, metrics_of):
    """Real photographs: a short training of two real classes localises defects far better than chance."""
    done = command("roads", "--data", real_data, "--classes", "bottle,metal_plate", "--out", tmp_path / "run",
                   "--steps", 60, "--image-size", 128)
    assert done.status == 0, done.err
    result = metrics_of(tmp_path / "run")
    assert result["mean"]["p_auroc"] > 0.7 and result["setting"]["selector accuracy"] > 0.8
