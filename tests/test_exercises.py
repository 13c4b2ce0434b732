"""The exercises of docs/: each can be solved, what is wrong is named, and nothing of a solution is in the files."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from docs import exercises
from docs.exercises import __main__ as program

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------ solutions


def auroc(scores, labels):
    _, where, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)  # highest rank of each distinct score
    ranks = (last - (count - 1) / 2)[where]
    p, g = labels.sum(), (~labels).sum()
    return (ranks[labels].sum() - p * (p + 1) / 2) / (p * g)


def average_precision(scores, labels):
    value, before = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        called = scores >= threshold
        recall = (called & labels).sum() / labels.sum()
        value += (called & labels).sum() / called.sum() * (recall - before)
        before = recall
    return value


def aupro(maps, masks, corners=True, ties=True, cut=True):
    weight = np.zeros(maps.shape)
    regions = 0
    for i, mask in enumerate(masks):
        found, count = ndimage.label(mask, np.ones((3, 3)) if corners else None)
        regions += count
        for region in range(1, count + 1):
            weight[i][found == region] = 1 / (found == region).sum()
    order = np.argsort(-maps.ravel(), kind="stable")
    scores = maps.ravel()[order]
    pro = np.cumsum(weight.ravel()[order]) / regions
    fpr = np.cumsum(~masks.ravel()[order]) / (~masks).sum()
    if ties:
        last = np.append(scores[1:] != scores[:-1], True)
        pro, fpr = pro[last], fpr[last]
    pro, fpr = np.append(0.0, pro), np.append(0.0, fpr)
    if cut:
        inside = fpr < 0.3
        pro = np.append(pro[inside], np.interp(0.3, fpr, pro))
        fpr = np.append(fpr[inside], 0.3)
    return np.sum((fpr[1:] - fpr[:-1]) * (pro[1:] + pro[:-1]) / 2) / 0.3


def cosine_map(teachers, students, size):
    total = 0.0
    for t, s in zip(teachers, students):
        d = 1 - F.cosine_similarity(t, s, dim=1)[:, None]
        total = total + F.interpolate(d, (size, size), mode="bilinear", align_corners=True)[:, 0]
    return total


def cosine_loss(teachers, students, flat):
    total = 0.0
    for t, s in zip(teachers, students):
        if flat:
            t, s = t.flatten(1), s.flatten(1)
        total = total + (1 - F.cosine_similarity(t, s, dim=1)).mean()
    return total


def neighbour_mask(height, width, radius):
    cell = torch.arange(height * width)
    rows, columns = cell // width, cell % width
    apart = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    return apart <= radius


def dynamic_prompt(block, p, x, pos, window):
    p = block.norm1(p + block.prompt_attention(p + pos, x + pos, x, window))
    p = block.norm2(p + block.mlp(p))
    x = block.norm3(x + block.feature_attention(x + pos, p + pos, p, window))
    return p, x


def cutpaste(image, rng, recolour):
    size = len(image)
    area = rng.uniform(0.02, 0.15) * size * size
    aspect = rng.uniform(0.3, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 3.3)
    w = min(size, max(1, int((area * aspect) ** 0.5)))
    h = min(size, max(1, int((area / aspect) ** 0.5)))
    (y0, x0), (y1, x1) = rng.integers(0, [size - h + 1, size - w + 1], (2, 2))
    out, mask = image.copy(), np.zeros((size, size), bool)
    out[y1 : y1 + h, x1 : x1 + w] = recolour(image[y0 : y0 + h, x0 : x0 + w])
    mask[y1 : y1 + h, x1 : x1 + w] = True
    return out, mask


def learned_queries(layer, x):
    b, h, w, c = x.shape
    d = c // layer.heads
    q = layer.to_q(layer.tokens).view(-1, layer.heads, d).transpose(0, 1)  # (heads, T, d)
    k = layer.to_k(x).view(b, h * w, layer.heads, d).transpose(1, 2)  # (B, heads, h w, d)
    v = layer.to_v(x).view(b, h * w, layer.heads, d).transpose(1, 2)
    weights = (q @ k.transpose(2, 3) / d**0.5).softmax(3)
    out = layer.to_out((weights @ v).transpose(1, 2).reshape(b, -1, c))  # (B, T, C)
    side = int(out.shape[1] ** 0.5)
    grid = out.view(b, side, side, c).permute(0, 3, 1, 2)
    return F.interpolate(grid, (h, w), mode="nearest").permute(0, 2, 3, 1)


def read_prompts(block, z, positions):
    attended = block.attend(z, positions) + z
    return block.ffn(block.norm(attended)) + z


def adain(x, gamma, beta):
    mean = x.mean((2, 3), keepdim=True)
    variance = x.var((2, 3), correction=0, keepdim=True)
    normal = (x - mean) / (variance + 1e-5).sqrt()
    return gamma[:, :, None, None] * normal + beta[:, :, None, None]


def calibrate(maps, u_hat, gamma_hat, floor):
    width = (gamma_hat - u_hat).clamp(min=floor)
    return (maps - u_hat[:, None, None]) / width[:, None, None]


def merge_splits(parts, tops, totals):
    top = tops.amax(0)
    share = totals * (tops - top.masked_fill(top.isinf(), 0.0)).exp()  # (splits, N)
    total = share.sum(0)
    merged = (share[:, :, None] * parts).sum(0)
    return merged / total.masked_fill(total == 0, 1.0)[:, None]


SOLUTIONS = {name: globals()[name] for name in exercises.ORDER if name in globals()}

# ------------------------------------------------------------------------------------- mistakes


def steps_of_ties(scores, labels):
    order = np.argsort(-scores, kind="stable")
    tp = np.cumsum(labels[order])
    return float((tp / np.arange(1, len(tp) + 1))[labels[order]].sum() / labels.sum())


def old_second_line(block, p, x, pos, window):
    p = block.norm1(p + block.prompt_attention(p + pos, x + pos, x, window))
    p = block.norm2(p + block.mlp(p))
    return p, block.norm3(x + block.mlp(p))


def pasted_into_the_input(image, rng, recolour):
    out, mask = cutpaste(image, rng, recolour)
    image[:] = out
    return image, mask


def wide_for_tall(image, rng, recolour):
    out, mask = cutpaste(image, rng, recolour)
    return out, mask.T


def without_heads(layer, x):
    heads, layer.heads = layer.heads, 1
    out = learned_queries(layer, x)
    layer.heads = heads
    return out


def skip_of_the_sum(block, z, positions):
    attended = block.attend(z, positions) + z
    return block.ffn(block.norm(attended)) + attended


def detached(teachers, students, flat):
    return cosine_loss(teachers, [s.detach() for s in students], flat)


def half_the_gradient(x, gamma, beta):
    return adain(x, gamma, beta.detach() if beta.requires_grad else beta)


def columns_of_images(maps, u_hat, gamma_hat, floor):
    return (maps - u_hat) / (gamma_hat - u_hat).clamp(min=floor)


def no_floor(maps, u_hat, gamma_hat, floor):
    return calibrate(maps, u_hat, gamma_hat, -torch.inf)


def plain_mean(parts, tops, totals):
    return parts.mean(0)


def no_top(parts, tops, totals):
    share = totals * tops.exp()
    return (share[:, :, None] * parts).sum(0) / share.sum(0)[:, None]


MISTAKES = [
    ("auroc", lambda s, y: None, "returns nothing yet"),
    ("auroc", lambda s, y: "0.5", "should be a number"),
    ("auroc", lambda s, y: auroc(s + 1e-9 * np.arange(len(s)), y), "case 'many ties'"),
    ("auroc", lambda s, y: max(auroc(s, y), 1 - auroc(s, y)), "worse than chance"),
    ("average_precision", steps_of_ties, "case 'many ties'"),
    ("aupro", lambda m, k: aupro(m, k, corners=False), "touch at a corner"),
    ("aupro", lambda m, k: aupro(m, k, ties=False), "case 'many ties'"),
    ("aupro", lambda m, k: aupro(m, k, cut=False), "the result is"),
    ("cosine_map", lambda t, s, n: cosine_map(t, s, n)[:, None], "has shape (2, 1, 8, 8), expected"),
    ("cosine_map", lambda t, s, n: cosine_map(t, s, n) / len(t), "three scales"),
    ("cosine_map", lambda t, s, n: cosine_map(t[:1], s[:1], n), "three scales"),
    ("cosine_loss", lambda t, s, flat: cosine_loss(t, s, False), "case 'two scales, flat'"),
    ("cosine_loss", detached, "no gradient reaches"),
    ("neighbour_mask", lambda h, w, r: neighbour_mask(h, h, r), "has shape (4, 4), expected (10, 10)"),
    ("neighbour_mask", lambda h, w, r: neighbour_mask(h, w, r).float(), "has type float32, expected bool"),
    ("neighbour_mask", lambda h, w, r: ~neighbour_mask(h, w, r), "at [0, 0] is 0, expected 1"),
    ("dynamic_prompt", old_second_line, "x at [0, 0, 0]"),
    ("dynamic_prompt", lambda b, p, x, *more: dynamic_prompt(b, p, x, *more)[0], "return 2 things: p, x"),
    ("dynamic_prompt", lambda *a: dynamic_prompt(*a[:4], (3, 3, 0)), "case 'the neighbour mask'"),
    ("cutpaste", wide_for_tall, "the mask at"),
    ("cutpaste", pasted_into_the_input, "argument 1 was changed"),
    ("learned_queries", without_heads, "case 'two heads'"),
    ("learned_queries", lambda y, x: learned_queries(y, x).transpose(1, 2), "the result"),
    ("read_prompts", skip_of_the_sum, "at the start"),
    ("adain", lambda x, g, b: adain(x, g, b) * (0.9**0.5), "γ = 1"),
    ("adain", half_the_gradient, "the gradient of argument 3 is missing"),
    ("calibrate", columns_of_images, "case 'four images, each with its own statistics': the result at"),
    ("calibrate", no_floor, "a width below the floor"),
    ("merge_splits", plain_mean, "two equal splits"),
    ("merge_splits", no_top, "exp is too large"),
]


def module(name):
    return importlib.import_module(f"docs.exercises.{name}")


@pytest.mark.parametrize("name", SOLUTIONS)
def test_can_be_solved(name, monkeypatch):
    """The definition, written out again, passes; what is in the file does not."""
    assert "returns nothing yet" in exercises.failure(module(name))
    monkeypatch.setattr(module(name), name, SOLUTIONS[name])
    assert exercises.failure(module(name)) is None


@pytest.mark.parametrize("name, mistake, said", MISTAKES)
def test_names_the_mistake(name, mistake, said, monkeypatch):
    monkeypatch.setattr(module(name), name, mistake)
    assert said in exercises.failure(module(name))


def test_every_exercise_is_tested():
    """All are in the list, and all but the Triton one, below, are solved above."""
    files = {path.stem for path in Path(exercises.__file__).parent.glob("[a-z]*.py")}
    assert files == set(exercises.ORDER)
    assert set(SOLUTIONS) == files - {"online_softmax"}
    assert {name for name, _, _ in MISTAKES} == set(SOLUTIONS)


LOOP = """
        s = tl.load(k + at, mask=m[:, None] < M, other=0.0) * query[None, :]
        s = tl.where(m < M, tl.sum(s, axis=1), -float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=0))
        shrink = tl.exp(top - new_top)
        p = tl.exp(s - new_top)
        values = tl.load(v + at, mask=m[:, None] < M, other=0.0)
        total = total * shrink + tl.sum(p, axis=0)
        out = out * shrink + tl.sum(p[:, None] * values, axis=0)
        top = new_top
"""


def test_online_softmax(tmp_path):
    """The kernel, in the interpreter and so in a process of its own: right; with keys that do not exist;
    with old sums that do not shrink."""
    pytest.importorskip("triton")
    loops = {
        "right": LOOP,
        "ghosts": LOOP.replace('tl.where(m < M, tl.sum(s, axis=1), -float("inf"))', "tl.sum(s, axis=1)"),
        "no_shrink": LOOP.replace("out * shrink", "out"),
    }
    kernel, rest = (ROOT / "docs" / "exercises" / "online_softmax.py").read_text().split("        ...\n")
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
    program += "from docs.exercises import failure\n"
    for name, loop in loops.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "online_softmax.py").write_text(kernel + loop + rest)
        program += f"import {name}.online_softmax; print(failure({name}.online_softmax))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right, ghosts, no_shrink = done.stdout.strip().split("\n")
    assert right == "None"
    assert "case 'the last block is not full'" in ghosts
    assert "case 'three blocks'" in no_shrink


def test_the_command(monkeypatch, capsys):
    """The list, a wrong name, an unsolved and a solved exercise, and one that raises."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the list imports all, and one of them sets it
    assert program.main(["adain"]) == 1
    assert capsys.readouterr().out == "adain: case 'γ = 1, β = 0: instance norm': the function returns nothing yet\n"
    monkeypatch.setattr(module("adain"), "adain", adain)
    assert program.main(["adain"]) == 0
    assert capsys.readouterr().out == "adain: right, in 2 cases. Next: calibrate.\n"
    monkeypatch.setattr(module("adain"), "adain", lambda x, gamma, beta: gamma @ x)
    assert program.main(["adain"]) == 1
    assert "it raised RuntimeError" in capsys.readouterr().out
    assert program.main(["nothing"]) == 2
    assert "one of auroc, " in capsys.readouterr().err
