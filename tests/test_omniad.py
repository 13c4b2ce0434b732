"""Omni-AD: sizes and costs against the paper's, block and loss against literal transcriptions, what learns and what
must not, what the two faults of the released code do, the scoring, and the whole program through its command line."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

import contract
import omniad
import omniad_released
from common import backbones, data, papers

CHANNELS = (16, 24, 32)  # of a small teacher: the widths of the stages are 64, 32, 24, 16
TINY = dict(depths="1,1,1,1", tokens=4, heads=2, image_size=64, jitter=0.0)


def make(seed=0, channels=CHANNELS, **changes):
    args = omniad.Args(**{**TINY, **changes})
    torch.manual_seed(seed)
    return omniad.OmniAD(channels, args), args


def teacher_maps(b=3, size=64, channels=CHANNELS, seed=1):
    """Random maps of strides 4, 8 and 16, smooth as real ones are."""
    g = torch.Generator().manual_seed(seed)
    return [F.interpolate(torch.randn(b, c, 2, 2, generator=g), (size // s, size // s), mode="bilinear")
            for c, s in zip(channels, (4, 8, 16))]


def use_released(monkeypatch):
    monkeypatch.setattr(omniad, "TokenAttention", omniad_released.ReleasedAttention)
    monkeypatch.setattr(omniad, "OmniBlock", omniad_released.ReleasedBlock)


@pytest.fixture
def released(monkeypatch):
    """omniad.py with the released code's block."""
    use_released(monkeypatch)


def train(model, args, maps, steps, lr=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        loss, _ = omniad.losses(model, maps, model.scale, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# --------------------------------------------------------------------------------------------------------- sizes


def size(*parts):
    return sum(p.numel() for part in parts for p in part.parameters())


def test_parameter_counts_of_the_paper_model():
    """The neck is the released one to the last unit. The decoder is too, after two corrections: the 28 blocks have two
    output projections each (C² + C), and no post-softmax biases (2 x 8 heads x 64 tokens)."""
    model = omniad.OmniAD((64, 128, 256), omniad.Args())
    projections = size(*(m.to_out for m in model.modules() if isinstance(m, omniad.TokenAttention)))
    assert projections == sum(n * 2 * (c * c + c) for n, c in zip((3, 9, 9, 7), (512, 256, 128, 64))) == 3_115_648
    biases = 28 * 2 * 8 * 64
    assert size(model.neck) == 1_458_304
    assert size(model.stages, model.expands) - projections + biases == 20_298_304
    assert size(model) + 8_170_304 == 33_013_888


@pytest.mark.parametrize("changes, channels, teacher, millions", [
    (dict(tokens=16), (64, 128, 256), 8_170_304, 29.40), (dict(tokens=36), (64, 128, 256), 8_170_304, 29.62),
    (dict(), (64, 128, 256), 8_170_304, 29.93), (dict(tokens=100), (64, 128, 256), 8_170_304, 30.32),
    (dict(depths="2,2,2,2"), (64, 128, 256), 8_170_304, 19.02),
    (dict(depths="3,6,6,3"), (64, 128, 256), 8_170_304, 26.52),
    (dict(depths="6,12,11,9"), (64, 128, 256), 8_170_304, 42.70), (dict(), (64, 128, 256), 2_782_784, 24.54)])
def test_parameter_counts_of_every_variant(changes, channels, teacher, millions, monkeypatch):
    """Tables IV, VI and VII to 0.01 M, corrected as above (biases of 64 tokens a block); and the released block itself,
    whose biases follow the number of tokens, to the printed 0.1 M. So the published models had the biases and no
    trained output projection: what left their attentions were the random nets of the released code."""
    args = omniad.Args(**changes)
    with torch.device("meta"):
        model = omniad.OmniAD(channels, args)
    attentions = [m for m in model.modules() if isinstance(m, omniad.TokenAttention)]
    counted = size(model) - size(*(m.to_out for m in attentions)) + len(attentions) * 8 * 64 + teacher
    assert counted / 1e6 == pytest.approx(millions, abs=0.005)
    use_released(monkeypatch)
    with torch.device("meta"):
        model = omniad.OmniAD(channels, args)
    assert round((size(model) + teacher) / 1e6, 1) == round(millions, 1)
    if changes == {} and teacher == 8_170_304:
        assert size(model.neck) == 1_458_304 and size(model.stages, model.expands) == 20_298_304


@pytest.mark.parametrize("channels", [CHANNELS, (24, 40, 112), (8, 16, 64)])
def test_shapes(channels):
    """Whatever the encoder's widths and the picture's size, the outputs have the teacher's shapes; f1 comes first."""
    for image_size in (64, 96):
        model, _ = make(channels=channels, image_size=image_size)
        maps = teacher_maps(size=image_size, channels=channels)
        assert [r.shape for r in model(maps)] == [m.shape for m in maps]


@pytest.mark.parametrize("backbone, channels", [
    ("resnet18", [64, 128, 256]), ("resnet50", [256, 512, 1024]), ("efficientnet_lite0", [24, 40, 112])])
def test_features_are_frozen_and_survive_the_row(backbone, channels):
    """Maps of strides 4, 8, 16; no gradient, always eval; joined into rows and split again: the backbone's own."""
    features = backbones.Pyramid(backbone, "random", 64)
    assert list(features.channels) == channels and features.sides == [16, 8, 4]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    rows = features.train()(images)
    assert rows.shape == (2, sum(c * s * s for c, s in zip(channels, (16, 8, 4)))) and not rows.requires_grad
    assert not any(p.requires_grad for p in features.parameters())
    for got, own in zip(features.split(rows), features.backbone(data.normalize(images))):
        torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-3 * own.abs().max().item())


# --------------------------------------------------------------------------------- model, against transcriptions


def literal_attention(layer, query, memory):
    """One image: query (N, C), memory (M, C). Head by head, query by query, key by key; before the projection W^O."""
    q, k, v = layer.to_q(query), layer.to_k(memory), layer.to_v(memory)
    d = q.shape[1] // layer.heads
    out = torch.zeros_like(q)
    for head in range(layer.heads):
        part = slice(head * d, (head + 1) * d)
        for n in range(len(q)):
            weights = torch.stack([torch.exp((q[n, part] * k[m, part]).sum() / math.sqrt(d)) for m in range(len(k))])
            weights = weights / weights.sum()
            out[n, part] = sum(weights[m] * v[m, part] for m in range(len(k)))
    return out


def laid_out(rows, h, w):
    """(T, C) answers of a square grid of queries -> (h, w, C): each position takes the cell that it falls into."""
    side = math.isqrt(len(rows))

    def cell_of(i, j):
        return (i * side // h) * side + j * side // w

    return torch.stack([torch.stack([rows[cell_of(i, j)] for j in range(w)]) for i in range(h)])


@pytest.mark.parametrize("tokens", [4, 9, 36])
def test_global_branch_is_the_papers(tokens):
    """G1 = x + W^O attend(Q tokens, x), laid out; G = G1 + W^O attend(G1, KV tokens): loops in float64."""
    _, args = make(tokens=tokens)
    block = omniad.OmniBlock(16, args).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    for got, image in zip(block.global_branch(x), x):
        first, second = block.first, block.second
        g1 = image + laid_out(first.to_out(literal_attention(first, first.tokens, image.reshape(16, 16))), 4, 4)
        read = second.to_out(literal_attention(second, g1.reshape(16, 16), second.tokens))
        torch.testing.assert_close(got, g1 + read.reshape(4, 4, 16))


def test_released_attention_adds_its_bias_after_the_softmax(released):
    """(P + b) V, entry by entry, with b (heads, T, 1) for learned queries and (heads, 1, T) for learned keys."""
    _, args = make()
    for kind in ("q", "kv"):
        layer = omniad.TokenAttention(kind, 16, args).double()
        torch.nn.init.normal_(layer.bias)
        q, k, v = torch.randn(3, 2, 2, 4, 8, dtype=torch.float64)
        k, v = torch.cat([k, k + 1], 2)[:, :, :4], v
        weights = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) + layer.bias
        torch.testing.assert_close(layer.attend(q, k, v), weights @ v)


@pytest.mark.parametrize("changes, kinds", [
    (dict(), "q kv"), (dict(learnable="q"), "q self"), (dict(learnable="kv"), "self kv"),
    (dict(learnable="none"), "self self"),
    (dict(order="q+q"), "q q"), (dict(order="kv+kv"), "kv kv"), (dict(order="kv+q"), "kv q"),
    (dict(order="kv+q", learnable="q"), "self q")])
def test_what_is_learned_and_in_which_order(changes, kinds):
    """Tables II and III: tokens exist where a side is learned; elsewhere the map attends to itself."""
    _, args = make(**changes)
    block = omniad.OmniBlock(16, args)
    assert [block.first.kind, block.second.kind] == kinds.split()
    for attention in (block.first, block.second):
        assert hasattr(attention, "tokens") == (attention.kind != "self")
        if attention.kind == "self":
            x = torch.randn(1, 2, 2, 16)
            rows = x.reshape(4, 16)
            expected = attention.to_out(literal_attention(attention, rows, rows)).reshape(1, 2, 2, 16)
            torch.testing.assert_close(attention(x), expected)


def instance_norm(x):
    """Every channel of every image: mean 0, variance 1 over its positions. x (B, C, h, w)."""
    return torch.stack([torch.stack([(c - c.mean()) / torch.sqrt(((c - c.mean()) ** 2).mean() + 1e-5) for c in image])
                        for image in x])


def test_local_branch_and_combination():
    """3x3 and 5x5 depth-wise separable convolutions of x side by side, 1x1 back; then both branches are mixed; + x."""
    block = omniad.OmniBlock(16, make()[1])
    x = torch.randn(2, 4, 4, 16)

    def normed_silu(y):
        return instance_norm(y) * torch.sigmoid(instance_norm(y))

    parts = []
    for conv, k in ((block.local3, 3), (block.local5, 5)):
        depthwise, point = conv[0], conv[3]
        assert depthwise.weight.shape == (16, 1, k, k) and point.weight.shape == (16, 16, 1, 1)
        y = F.conv2d(x.permute(0, 3, 1, 2), depthwise.weight, depthwise.bias, padding=k // 2, groups=16)
        parts.append(normed_silu(F.conv2d(normed_silu(y), point.weight, point.bias)))
    merged = F.conv2d(torch.cat(parts, 1), block.merge[0].weight, block.merge[0].bias)
    local = normed_silu(merged).permute(0, 2, 3, 1)
    torch.testing.assert_close(block.local_branch(x), local)
    mixed = block.mix_in(block.global_branch(x) + local).permute(0, 3, 1, 2)
    mixed = normed_silu(mixed).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), x + block.mix_out(mixed))


def test_expand_places_every_part():
    """Output position (2i + a, 2j + b) is the layer norm of the quarter (a, b) of the linear map at (i, j)."""
    expand = omniad.Expand(12, 6)
    assert expand.linear.weight.shape == (24, 12) and expand.linear.bias is None
    x = torch.randn(2, 3, 5, 12)
    out, quarters = expand(x), expand.linear(x)
    assert out.shape == (2, 6, 10, 6)
    for i, j, a, b in [(0, 0, 0, 1), (2, 4, 1, 0), (1, 3, 1, 1), (2, 0, 0, 0)]:
        part = quarters[:, i, j, (2 * a + b) * 6:(2 * a + b + 1) * 6]
        torch.testing.assert_close(out[:, 2 * i + a, 2 * j + b], expand.norm(part))


def test_jitter_has_the_stated_scale_and_is_off_in_evaluation():
    """Noise of standard deviation ‖token‖ · 20 / C on every bottleneck token in training, none at test."""
    model, _ = make(jitter=20.0)
    model.neck.forward = lambda *maps: torch.ones(400, 64, 2, 2)
    seen = []
    model.stages[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train()(teacher_maps())
    model.eval()(teacher_maps())
    assert (seen[0] - 1).std().item() == pytest.approx(math.sqrt(64) * 20 / 64, rel=0.02)
    assert torch.equal(seen[1], torch.ones(400, 2, 2, 64))


# ---------------------------------------------------------------------------------------------------------- loss


def test_loss():
    """Mean over all elements of the squared error, scale by scale, summed."""
    model, args = make()
    maps = teacher_maps(b=2)
    total, parts = omniad.losses(model, maps, model.scale, args)
    for name, rebuilt, f in zip(("f1", "f2", "f3"), model(maps), maps):
        error = sum((a - b) ** 2 for a, b in zip(rebuilt.flatten().tolist(), f.flatten().tolist()))
        assert parts[name].item() == pytest.approx(error / f.numel(), rel=1e-4)
    assert total.item() == pytest.approx(sum(p.item() for p in parts.values()), rel=1e-6)


def test_standardized_loss():
    """--standardize: every map counts in units of its standard deviation about its channels' means, so that neither
    their magnitudes nor their offsets decide which of them is learned; what is rebuilt are the maps themselves."""
    maps = teacher_maps(b=2)
    scale = omniad.deviations([f * k + 3 * k for f, k in zip(maps, (1, 10, 0.01))])
    for f, k, deviation in zip(maps, (1, 10, 0.01), scale.tolist()):
        centred = [f[:, c].double() - f[:, c].double().mean() for c in range(f.shape[1])]
        assert deviation == pytest.approx(k * math.sqrt(sum((c ** 2).mean().item() for c in centred) / len(centred)))
    model, args = make(standardize=True)
    plain = model(maps)
    model.scale.copy_(scale)
    total, parts = omniad.losses(model, maps, model.scale, args)
    for name, f, before, unit in zip(parts, maps, plain, scale):
        assert parts[name].item() == pytest.approx((before - f / unit).square().mean().item(), rel=1e-4)
    assert total.item() == pytest.approx(sum(p.item() for p in parts.values()), rel=1e-6)


def test_gradient_reaches_every_parameter():
    """No part of the model is dead. By construction a few biases are: of a layer whose output a norm centres (also
    through sums: what is the same at every position is lost), and of keys, which softmax ignores. In float64, where
    their rounding noise lies far below any true gradient."""
    model, args = make()
    model.double()
    maps = [f.double() for f in teacher_maps()]
    omniad.losses(model, maps, model.scale, args)[0].backward()
    centred = ("local3.0.bias", "local3.3.bias", "local5.0.bias", "local5.3.bias", "merge.0.bias", "mix_in.bias",
               "to_k.bias", "second.to_v.bias", "second.to_out.bias", "point.0.bias", "point2.0.bias", "point3.0.bias")
    largest = max(p.grad.abs().max() for p in model.parameters())
    dead = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-13 * largest]
    assert [n for n in dead if not n.endswith(centred)] == []


def test_overfits_a_few_images():
    """150 steps on three images: the error falls below a tenth of the features' power, and the cosine map is low."""
    model, args = make()
    maps = teacher_maps()
    loss = train(model, args, maps, 150, lr=5e-3)
    assert loss < sum(f.square().mean().item() for f in maps) / 10
    with torch.no_grad():
        assert omniad.kernels.cosine_map(maps, model(maps), 64).mean() < 0.3


# ----------------------------------------------------------------------------------------- the faults of the code


def spread(tokens):
    """How far the tokens lie from their mean, relative to how large they are."""
    return ((tokens - tokens.mean(0)).norm() / tokens.norm()).item()


def share_of_second_attention(model, maps):
    """Relative change of the reconstructions when attention (b) is taken out everywhere."""
    with torch.no_grad():
        whole = model(maps)
        for module in model.modules():
            if hasattr(module, "second"):
                module.second.forward = torch.zeros_like
        without = model(maps)
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(whole, without))


def test_tokens_learn_to_differ_and_the_second_attention_works():
    """After training the key/value tokens have moved apart, each in its own direction, and attention (b) is used."""
    model, args = make()
    before = [m.second.tokens.detach().clone() for m in model.modules() if hasattr(m, "second")]
    maps = teacher_maps()
    train(model, args, maps, 40)
    after = [m.second.tokens.detach() for m in model.modules() if hasattr(m, "second")]
    assert len(after) == 4
    for old, new in zip(before, after):
        assert spread(new) > 0.1 and spread(new - old) > 0.1
    assert share_of_second_attention(model, maps) > 1e-3


def test_released_key_value_tokens_stay_identical_and_their_attention_is_dead(released):
    """The same training of the released block: 64 copies of one key/value token, and (b) changes nothing at all; only
    its query tokens separate."""
    model, args = make()
    maps = teacher_maps()
    train(model, args, maps, 40)
    blocks = [m for m in model.modules() if hasattr(m, "second")]
    assert len(blocks) == 4
    for block in blocks:
        assert (block.second.tokens - block.second.tokens.mean(0)).abs().max() < 1e-6
        assert spread(block.first.tokens) > 0.1
    assert share_of_second_attention(model, maps) < 1e-4


def test_released_output_nets_are_fixed(released):
    """Random, untrained, and part of the checkpoint."""
    model, _ = make()
    assert not any("to_out" in name for name, _ in model.named_parameters())
    nets = {name for name in model.state_dict() if "to_out" in name}
    assert len(nets) == 4 * 2 * 4
    other, _ = make(seed=1)
    other.load_state_dict(model.state_dict())
    maps = teacher_maps()
    assert all(torch.equal(a, b) for a, b in zip(model.eval()(maps), other.eval()(maps)))


# ------------------------------------------------------------------------------------------------------- scoring


class Passing(torch.nn.Module):
    """Stands in for the frozen features: "images" are tuples of maps already."""

    def maps(self, maps):
        return maps


def scorer(**changes):
    from common import runtime
    model, args = make(**changes)
    return omniad.Scorer(args, runtime.Run("omniad", None, torch.device("cpu")), Passing(), model), model, args


@pytest.mark.parametrize("power", [0.0, 0.25])
def test_map_and_image_score(power):
    """Sum over scales of 1 - cos, with --norm-power weighted by the teacher's root mean square, resized by bilinear
    interpolation with aligned corners, smoothed; maximum, or mean of the highest 1 % (40 of 4,096 pixels)."""
    score, model, _ = scorer(norm_power=power)
    maps = teacher_maps()
    got, value = score(maps, None)
    with torch.no_grad():
        expected = 0
        for r, m in zip(model(maps), maps):
            d = (1 - F.cosine_similarity(r, m, dim=1)) * m.square().mean(1).sqrt() ** power  # (B, h, w)
            expected = expected + F.interpolate(d[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0]
    expected = np.stack([scipy.ndimage.gaussian_filter(m, 4.0) for m in expected.numpy()])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    assert torch.equal(value, got.amax((1, 2)))
    top = scorer(score="top1", norm_power=power)[0](maps, None)[1]
    np.testing.assert_allclose(top.numpy(), np.sort(expected.reshape(3, -1))[:, -40:].mean(1), atol=1e-5)


def test_score_of_an_image_does_not_depend_on_its_batch():
    score, _, _ = scorer()
    maps = teacher_maps(b=4)
    alone = torch.cat([score([m[i:i + 1] for m in maps], None)[0] for i in range(4)])
    torch.testing.assert_close(score(maps, None)[0], alone)


def test_paper_numbers():
    """The column of the paper: found for its own setting only; mAD is the mean of the other seven, as printed."""
    def numbers(name, **changes):
        return papers.numbers("omniad", omniad.Args(**changes), {}, name)

    for name, first in (("mvtec", 0.990), ("visa", 0.946), ("realiad", 0.882)):
        mean = numbers(name)["mean"]
        assert mean["i_auroc"] == first
        assert np.mean([v for k, v in mean.items() if k != "mad"]) == pytest.approx(mean["mad"], abs=0.0006)
    assert numbers("synth") is None and numbers("mvtec", classes="screw") is None
    assert numbers("mvtec", image_size=320) is None and numbers("mvtec", corrupt="contrast") is None


# ---------------------------------------------------------------------------------- the program, as a user runs it


def costs(out):
    """The table of --flops: part -> (parameters, multiply-adds)."""
    lines = [line for line in out.splitlines()[1:] if not line.startswith("the paper")]
    rows = [line.rsplit(maxsplit=2) for line in lines]
    return {name.strip(): tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in rows}


def test_flops(command):
    """Attention by hand: four projections over h·w positions, four over the tokens, and QKᵀ and PV twice; the parts add
    up. With the released block plus its random nets (C → C → C over tokens and positions, which no parameter count
    shows): the 11.2 G of Table IV, so the published models contained those nets."""
    done = command("omniad", "--preset", "paper", "--flops")
    assert done.status == 0
    assert done.out.endswith("the paper: 29.9 M parameters, 11.2 G multiply-adds\n")
    parts = costs(done.out)
    stages = list(zip((3, 9, 9, 7), (512, 256, 128, 64), (64, 256, 1024, 4096)))  # blocks, C, h w
    assert parts["of these, attention"][1] == sum(n * (4 * (hw + 64) * c * c + 4 * 64 * hw * c) for n, c, hw in stages)
    assert parts["total"][0] == 33_013_888 and parts["neck"][0] == 1_458_304
    total = parts.pop("total")
    parts.pop("of these, attention")
    assert tuple(map(sum, zip(*parts.values()))) == total
    own = costs(command("omniad_released", "--preset", "paper", "--flops").out)["total"]
    nets = sum(n * 2 * (hw + 64) * c * c for n, c, hw in stages)
    assert own[0] == 29_926_912 and (own[1] + nets) / 1e9 == pytest.approx(11.2, rel=0.02)


SMALL = ("--image-size", 64, "--depths", "1,1,1,1", "--tokens", 4, "--batch-size", 8, "--steps", 12, "--log-every", 4,
         "--checkpoint-every", 4)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    return contract.first_run(omniad, ("--data", tiny_data, *SMALL), tmp_path_factory.mktemp("runs"))


def test_end_to_end(finished):
    """Train, evaluate, report: every file of the contract, and numbers in it that belong together."""
    result, log, state, kept = contract.check_files(finished, "omniad")
    assert result["mean"]["p_auroc"] > 0.55, "twelve steps on pretrained features beat chance by far"
    for maps, scores in kept.values():
        assert [score for _, score in scores] == pytest.approx(maps["maps"].max((1, 2)).tolist(), rel=1e-5)
    assert [line["step"] for line in log] == [4, 8, 12]
    assert {"loss", "f1", "f2", "f3", "lr", "images_per_s"} <= set(log[0])
    assert log[0]["loss"] == pytest.approx(log[0]["f1"] + log[0]["f2"] + log[0]["f3"], rel=1e-4)
    assert log[2]["loss"] < log[0]["loss"]
    assert state["step"] == 12 and state["normal_score"] > 0


def test_two_evaluations_of_one_checkpoint_give_the_same_bits(finished, tmp_path, command, metrics_of):
    """Which the released code does not: it draws its output nets anew. The run's own numbers too."""
    words = ("--eval", finished[0] / "checkpoint.pt", "--save-maps")
    for name in ("a", "b"):
        assert command("omniad", *words, "--out", tmp_path / name).status == 0
        assert metrics_of(tmp_path / name) == metrics_of(finished[0])
    assert (tmp_path / "a" / "scores.csv").read_bytes() == (tmp_path / "b" / "scores.csv").read_bytes()
    for file in (tmp_path / "a" / "maps").glob("*.npz"):
        assert np.array_equal(np.load(file)["maps"], np.load(tmp_path / "b" / "maps" / file.name)["maps"])


def test_every_step_goes_through_the_parallel_model(tiny_data, tmp_path, command, monkeypatch):
    """Protects torchrun, which averages the gradients of what goes through it."""
    words = ("--data", tiny_data, "--classes", "screw", *SMALL, "--steps", 2)
    contract.check_every_step_is_parallel(omniad, words, [2], tmp_path / "run", command, monkeypatch)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_is_uninterrupted(finished, tiny_data, tmp_path, command, metrics_of):
    """SIGKILL between two checkpoints, then --resume: the numbers, the log and the weights of the run that was never
    interrupted, jitter included."""
    words = ("--data", tiny_data, *SMALL)
    contract.check_killed_and_resumed(omniad, words, finished, tmp_path / "run", command, metrics_of)


def test_predict(finished, tiny_data, tmp_path, command):
    """The method's own column: the score as a share of the training images' 99 %."""
    contract.check_predict(omniad, (), finished, tiny_data, tmp_path / "p", command)


def test_corruption_and_options_at_evaluation(finished, tmp_path, command, metrics_of):
    """--corrupt and the scoring options act on a finished checkpoint; each leaves its trace in the numbers."""
    checkpoint = finished[0] / "checkpoint.pt"

    def numbers_and_scores(folder):
        return metrics_of(folder)["mean"], (folder / "scores.csv").read_text()

    for i, words in enumerate((("--corrupt", "gaussian_noise:5"), ("--sigma", 0), ("--score", "top1"))):
        assert command("omniad", "--eval", checkpoint, "--out", tmp_path / str(i), *words).status == 0, words
        assert numbers_and_scores(tmp_path / str(i)) != numbers_and_scores(finished[0]), words
    assert metrics_of(tmp_path / "0")["data"].endswith("gaussian_noise:5")


@pytest.mark.parametrize("words", [
    ("--learnable", "none"), ("--learnable", "q"), ("--learnable", "kv"), ("--order", "q+q"), ("--order", "kv+kv"),
    ("--order", "kv+q"), ("--tokens", 9), ("--branches", "global"), ("--branches", "local"), ("--depths", "2,1,1,2"),
    ("--upsample", "bilinear"), ("--backbone", "resnet18", "--weights", "random"),
    ("--standardize",), ("--memory-share", 0), ("--amp", "bf16")])
def test_every_ablation_runs(words, tiny_data, tmp_path, command, metrics_of):
    """Every row of Tables II to VII is one flag: it builds, trains and is evaluated."""
    out = tmp_path / "run"
    done = command("omniad", "--data", tiny_data, "--out", out, "--classes", "screw", *SMALL, "--steps", 2, *words)
    assert done.status == 0, done.err
    assert set(metrics_of(out)["classes"]) == {"screw"}
    scale = torch.load(out / "checkpoint.pt", weights_only=True)["model"]["scale"]
    assert (scale == 1).logical_xor(torch.tensor("--standardize" in words)).all()


@pytest.mark.parametrize("branches", ["global", "local"])
def test_one_branch_alone(branches):
    """Table V: that branch, mixed, around the residual."""
    block, x = omniad.OmniBlock(16, make(branches=branches)[1]), torch.randn(2, 4, 4, 16)
    mixed = block.mix_in(getattr(block, f"{branches}_branch")(x))
    mixed = F.instance_norm(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), x + block.mix_out(F.silu(mixed)))


def test_features_computed_on_the_fly_train_the_same_model(tiny_data, tmp_path, command):
    words = ("--data", tiny_data, "--classes", "screw,capsule", *SMALL, "--steps", 3, "--log-every", 1, "--amp", "off")
    contract.check_features_on_the_fly(omniad, words, tmp_path, command)


def test_released_behaviour_through_the_command_line(tiny_data, tmp_path, command, metrics_of):
    """The released block trains, is evaluated, and is never taken for omniad.py's own; which it leaves as it was."""
    out = tmp_path / "run"
    words = ("--data", tiny_data, "--classes", "screw", *SMALL, "--steps", 2)
    assert command("omniad_released", *words, "--out", out).status == 0
    assert metrics_of(out)["method"] == "omniad_released"
    assert omniad.OmniBlock is not omniad_released.ReleasedBlock
    assert command("omniad_released", "--eval", out / "checkpoint.pt", "--out", tmp_path / "eval").status == 0
    assert metrics_of(tmp_path / "eval") == metrics_of(out)
    refused = command("omniad", "--eval", out / "checkpoint.pt", "--out", tmp_path / "other")
    assert refused.status == 2 and "omniad_released.py" in refused.err


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tested on Linux and macOS")
def test_two_processes_follow_one_with_the_doubled_batch(tiny_data, tmp_path, command):
    """torchrun: with two training images each rank's half of a step holds both, so that even the batch statistics are
    those of one process, and the gradients (AdamW's running mean) agree within float error; rank 0 alone writes."""
    shutil.copytree(tiny_data / "screw", tmp_path / "two" / "screw")
    for file in sorted((tmp_path / "two" / "screw" / "train" / "good").iterdir())[2:]:
        file.unlink()
    words = [omniad.__file__, "--data", tmp_path / "two", *SMALL, "--steps", 2, "--jitter", 0, "--log-every", 1,
             "--clip", 1e9, "--amp", "off", "--lr", 1e-4]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words):
        return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=env)

    one = command("omniad", *words[1:], "--batch-size", 4, "--out", tmp_path / "a")
    two = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words,
              "--batch-size", 2, "--out", tmp_path / "b")
    assert one.status == 0, one.err
    assert two.returncode == 0, two.stderr
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys() and len(a["optimizer"]["state"]) > 100
    largest = max(state["exp_avg"].abs().max().item() for state in a["optimizer"]["state"].values())
    for i, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][i]["exp_avg"]
        torch.testing.assert_close(other, state["exp_avg"], rtol=2e-3, atol=1e-4 * largest)
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")] for name in "ab"]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(list(csv.reader(open(tmp_path / "b" / "scores.csv")))) == 8


def test_bad_input_ends_in_one_line_and_status_2(finished, tiny_data, tmp_path, command):
    """Mistakes of users: one clear line on stderr that names the culprit, status 2, no traceback, and neither a run
    folder nor a half-written file left behind. (Broken data sets: the tests of OneNIP and of common.)"""
    checkpoint = finished[0] / "checkpoint.pt"
    torch.save({"method": "roads", "args": {}, "model": {}}, tmp_path / "roads.pt")
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no picture")
    drawn = ("--data", tiny_data)
    cases = [
        (("--data", tmp_path / "nowhere"), "nowhere"),
        (("--data", "mvtec", "--data-root", tmp_path), "mvtec"),
        ((*drawn, "--classes", "screw,spoon"), "spoon"),
        ((*drawn, "--image-size", 100), "--image-size"),
        ((*drawn, "--image-size", 32), "--image-size"),
        ((*drawn, "--tokens", 60), "--tokens"),
        ((*drawn, "--tokens", 0), "--tokens"),
        ((*drawn, "--depths", "3,9,9"), "--depths"),
        ((*drawn, "--depths", "3,9,9,0"), "--depths"),
        ((*drawn, "--depths", "3,9,9,x"), "--depths"),
        ((*drawn, "--heads", 7), "--heads"),
        ((*drawn, "--heads", 7, "--flops"), "--heads"),
        ((*drawn, "--order", "q+v"), "--order"),
        ((*drawn, "--learnable", "v"), "--learnable"),
        ((*drawn, "--branches", "none"), "--branches"),
        ((*drawn, "--lr", "-1"), "--lr"),
        ((*drawn, "--sigma", "-1"), "--sigma"),
        ((*drawn, "--depth", "1,1,1,1"), "--depth"),
        ((*drawn, "--backbone", "vgg16"), "--backbone"),
        ((*drawn, "--weights", tmp_path / "none.pth"), "none.pth"),
        ((*drawn, "--corrupt", "fog"), "fog"),
        ((*drawn, "--out", finished[0]), "--overwrite"),
        ((*drawn, "--out", tmp_path / "none", "--resume"), "--resume"),
        (("--eval", finished[0] / "checkpoint.pt", "--predict", tiny_data, "--sigma", 0), "--sigma"),
        (("--eval", checkpoint, "--predict", tiny_data, "--norm-power", 1), "--norm-power"),
        (("--eval", tmp_path / "none.pt"), "none.pt"),
        (("--eval", tmp_path / "half.pt"), "half.pt"),
        (("--eval", tmp_path / "roads.pt"), "roads.pt"),
        (("--eval", checkpoint, "--depths", "2,1,1,1"), "checkpoint.pt"),
        (("--predict", tmp_path / "text.png"), "--eval"),
        ((*drawn, "--lr", "1e30", "--clip", "1e30", "--steps", 4), "NaN"),
    ]
    if not torch.cuda.is_available():
        cases += [((*drawn, "--device", "cuda"), "--device cuda"), ((*drawn, "--kernels", "triton"), "--kernels")]
    contract.check_bad_input(omniad, cases, SMALL, finished, tmp_path, command)


def test_real_classes(real_data, tmp_path, command, metrics_of):
    """Real photographs: a short training of two real classes localises defects far better than chance."""
    done = command("omniad", "--data", real_data, "--classes", "bottle,metal_plate", "--out", tmp_path / "run",
                   "--steps", 60, "--image-size", 128)
    assert done.status == 0, done.err
    assert metrics_of(tmp_path / "run")["mean"]["p_auroc"] > 0.7
