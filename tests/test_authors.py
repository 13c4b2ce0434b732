"""What our models compute is what the authors' code computed, and the paper presets train by the
authors' recipes.

First part, in float64: tests/authors/ holds figures of five published implementations whose
parameters and inputs were made by a formula. Our models, filled by the same formula, must give the
same figures: outputs, losses, every parameter's gradient, what three optimiser steps move, maps and
scores. All that touches a script stands in the classes `OneNIP` to `ReContrast` below; where a
script names a parameter otherwise than the figures, RENAMED says so.

Second part: optimiser, its hyper-parameters, schedule, clipping, epochs, batch, sizes and weights
of every paper preset, as the paper or the authors' code has them, read from the training loop while
it runs.
"""

import contextlib
import copy
import json
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import cada
import omniad
import omniad_released
import onenip
import roads
from common import backbones, data, runtime

FIGURES = Path(__file__).resolve().parent / "authors"
# Largest relative differences. Adam divides by the size of gradients, which multiplies rounding.
OUTPUTS, GRADIENT, STEPS = 1e-9, 1e-9, 1e-6

# {case: {regular expression in our name of a parameter: what the figures have in its place}}
RENAMED = {}

# ------------------------------------------------------------------------------- filling and inputs


def name_in_figures(case, name):
    for ours, theirs in RENAMED.get(case, {}).items():
        name = re.sub(ours, theirs, name)
    return name


def seeded(text, shape):
    """Normal numbers that follow from a text."""
    return np.random.RandomState(zlib.crc32(text.encode()) & 0x7FFFFFFF).standard_normal(shape)


def formula(name, shape):
    """The values of the parameter or buffer that the figures call `name`; None: as built."""
    last = name.rsplit(".", 1)[-1]
    if last in ("num_batches_tracked", "scale"):
        return None
    r = seeded(name, shape)
    if last == "running_var":
        return 1 + 0.1 * abs(r)
    if last == "running_mean" or last.startswith("bias"):
        return 0.1 * r
    if last in ("row", "column", "query", "tokens"):
        return r
    if len(shape) == 1:
        return 1 + 0.1 * r  # weights of norms
    return r / np.sqrt(np.prod(shape[1:]))


@torch.no_grad()
def fill(module, case, prefix=""):
    for name, tensor in module.state_dict().items():
        values = formula(prefix + name_in_figures(case, name), tuple(tensor.shape))
        if values is not None:
            tensor.copy_(torch.from_numpy(np.asarray(values)))
    return module


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def numbered(name, maps):
    """{"name1": the first map, ...}, as the figures call them."""
    return {f"{name}{i}": f for i, f in enumerate(maps, 1)}


def teacher_maps(step):
    """f1, f2, f3 of two images of 64 px, for Omni-AD and reverse distillation."""
    shapes = (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)
    return [normal(100 * step + i, *shape) for i, shape in enumerate(shapes, 1)]


class Teacher:
    """In the place of a frozen network: gives the maps that it was made with, whatever the
    images."""

    def __init__(self, maps):
        self.given = maps

    def __call__(self, images):
        return self.given

    maps = __call__

    def split(self, rows):
        return rows


def run_stub():
    """What a script's parts ask of a run: one process, no mixed precision."""
    return runtime.Run("test", Path(), torch.device("cpu"))


# ----------------------------------------------------- the scripts: all that the tests know of them

# A class has
#   file, case        where its figures are
#   loss_factor, map_factor     ours / theirs
#   model, args, clip           clip: the largest norm of the gradient in the three steps, or None
#   batch(step)       what one step reads
#   noise(step)       the normal numbers of that step's jitter, or None
#   scoring(batch), training(batch)     {figure: tensor}
#   loss(batch, step)           the total, and {figure: part}
#   optimizer()       the script's own, for `model`


class OneNIP:
    file, case = "onenip", "onenip"
    loss_factor, map_factor, clip = 2.0, 1.0, 0.1
    changes = {}

    def __init__(self):
        self.args = onenip.Args(encoder_layers=2, decoder_layers=2, dropout=0.0, **self.changes)
        self.model = fill(onenip.OneNIP(272, 14, self.args), self.case)

    def batch(self, step):
        features = [normal(100 * step + i, 2, 272, 14, 14) for i in (1, 2, 3)]
        uniform = np.random.RandomState(100 * step + 4).random_sample((2, 224, 224))
        mask = torch.from_numpy(uniform > 0.9).double()
        return *features, mask

    def noise(self, step):
        return normal(100 * step + 5, 6, 196, 272)

    def scoring(self, batch):
        _, x, prompt, _ = batch
        p = self.model.encode(prompt)
        error, logits, _ = onenip.reconstruct(run_stub(), self.model, x, p)
        s, score = onenip.combine(error, logits, 5.0, self.args)
        s_rec = onenip.resize(error, 224).squeeze(1)
        mask = onenip.mask_of(logits, 224)
        reconstruction = self.model.decode(self.model.encode(x), p)
        maps = {"s_rec": s_rec, "mask": mask, "map": s}
        return {"reconstruction": reconstruction, **maps, "score": score}

    def training(self, batch):
        reconstruction, restored, mask = self.model(*batch[:3])
        return {"reconstruction": reconstruction, "restoration": restored, "mask": mask}

    def loss(self, batch, step):
        total, parts = onenip.losses(self.model, *batch, self.args)
        return total, {"mse": (parts["rec"] + parts["res"]) / 2, "dice": parts["seg"]}

    def optimizer(self):
        return onenip.optimizer_of(self.model, self.args)


class UniADInOneNIP(OneNIP):
    file, case = "uniad", "none"
    loss_factor = 1.0
    changes = dict(prompt="none", restoration=False, refiner=False)

    def batch(self, step):
        return normal(100 * step + 1, 2, 272, 14, 14), None, None, None

    def noise(self, step):
        return normal(100 * step + 5, 2, 196, 272)

    def scoring(self, batch):
        error, logits, _ = onenip.reconstruct(run_stub(), self.model, batch[0], None)
        s, score = onenip.combine(error, logits, 5.0, self.args)
        reconstruction = self.model.decode(self.model.encode(batch[0]), None)
        return {"reconstruction": reconstruction, "map": s, "score": score}

    def training(self, batch):
        return {"reconstruction": self.model(*batch[:3])[0]}

    def loss(self, batch, step):
        return onenip.losses(self.model, *batch, self.args)[0], {}


class Base:
    """A base of cada.py: what the three have in common."""

    loss_factor, map_factor, clip = 1.0, 1.0, None
    kind = None  # the class in cada.py
    channels, sides = [64, 128, 256], [16, 8, 4]
    changes = {}

    def __init__(self):
        self.args = cada.Args(image_size=64, calibrate="none", **self.changes)
        self.model = fill(self.kind(self.args, self.channels, self.sides), self.case)

    batch = staticmethod(teacher_maps)  # the frozen maps

    def images(self, batch):
        return None

    def noise(self, step):
        return None

    def progress(self, step):
        return 0.0

    def forward(self, batch):
        """Targets, rebuilt maps, φ."""
        return self.model(batch, self.images(batch))

    def anomaly_map(self, batch, smoothing):
        """The map without calibration, and its image score."""
        self.args.smoothing = smoothing
        base = cada.Trained(self.args, run_stub(), Teacher(batch), self.model)
        calibration = cada.Calibration(self.args, base.phi_channels, [])
        samples = [SimpleNamespace(image=name, cls="", label=0) for name in "ab"]
        return cada.Scorer(self.args, run_stub(), base, calibration)(self.images(batch), samples)

    def loss(self, batch, step):
        images, progress = self.images(batch), self.progress(step)
        return cada.losses(self.model, batch, images, progress, self.args)[0], {}

    def optimizer(self):
        return self.model.optimizer(self.args)


class UniADInCADA(Base):
    file, case, clip = "uniad", "cada", 0.1
    kind, channels, sides = cada.UniAD, [272], [14]
    changes = dict(
        base="uniad", layers=2, attention_dropout=0.0, lr=1e-4, weight_decay=1e-4, clip=clip
    )

    def batch(self, step):
        return [normal(100 * step + 1, 2, 272, 14, 14)]

    def noise(self, step):
        return normal(100 * step + 5, 2, 196, 272)

    def training(self, batch):
        return {"reconstruction": self.forward(batch)[1][0]}

    scoring = training


class OmniAD:
    file, case = "omniad", "mended"
    loss_factor, map_factor, clip = 1.0, 9.0, 5.0
    exchanged = {}  # names in omniad.py -> what stands there instead

    def __init__(self):
        self.args = omniad.Args(depths="2,1,2,1", image_size=64)
        with pytest.MonkeyPatch.context() as patch:
            for name, kind in self.exchanged.items():
                patch.setattr(omniad, name, kind)
            self.model = fill(omniad.OmniAD([64, 128, 256], self.args), self.case)

    batch = staticmethod(teacher_maps)

    def noise(self, step):
        return normal(100 * step + 5, 2, 4, 512)

    def scoring(self, batch):
        found = {"neck": self.model.neck(*batch), **self.training(batch)}
        found["loss"], _ = self.loss(batch, 0)
        for name, sigma in (("map", 0.0), ("smoothed", 4.0)):
            self.args.sigma = sigma
            score = omniad.Scorer(self.args, run_stub(), Teacher(batch), self.model)
            found[name], found["score"] = score(None, None)
        return found

    def training(self, batch):
        return numbered("rebuilt", self.model(batch))

    def loss(self, batch, step):
        return omniad.losses(self.model, batch, self.model.scale, self.args)[0], {}

    def optimizer(self):
        return omniad.optimizer_of(self.model, self.args)

    def parts(self):
        """The untouched parts, by the figures' names: the neck, local branches and expansions."""
        found = {"neck": self.model.neck(*self.batch(0))}
        for i, stage in enumerate(self.model.stages):
            shape = 2, 2 * 2**i, 2 * 2**i, 512 // 2**i
            found[f"local{i}"] = stage[0].local_branch(normal(20 + i, *shape))
            if i < 3:
                found[f"expand{i}"] = self.model.expands[i](normal(30 + i, *shape))
        return found


class OmniADReleased(OmniAD):
    case = "released"
    exchanged = {
        "TokenAttention": omniad_released.ReleasedAttention,
        "OmniBlock": omniad_released.ReleasedBlock,
    }


class ReverseDistillation:
    """ROADS without prompts and adapter."""

    file, case, backbone = "rd4ad", "wide", "wide_resnet50_2"
    loss_factor, map_factor, clip = 1.0, 1.0, None

    def __init__(self):
        self.args = roads.Args(
            image_size=64, backbone=self.backbone, prompts=False, adapter="none", eta=1.0
        )
        self.model = fill(roads.ROADS([64, 128, 256], 1, self.args), self.case)

    batch = staticmethod(teacher_maps)

    def noise(self, step):
        return None

    def scoring(self, batch):
        found = {**self.training(batch), "loss": self.loss(batch, 0)[0]}
        for name, sigma in (("map", 0.0), ("smoothed", 4.0)):
            self.args.sigma = sigma
            score = roads.Scorer(self.args, run_stub(), Teacher(batch), self.model, [])
            images, samples = torch.zeros(2, 3, 64, 64), []  # read by neither teacher nor student
            found[name], found["score"] = score(images, samples)
        return found

    def training(self, batch):
        maps = numbered("rebuilt", self.model(batch)["maps"])
        return {"phi": self.model.bottleneck(*batch), **maps}

    def loss(self, batch, step):
        return roads.losses(self.model, batch, None, None, None, self.args)[0], {}

    def optimizer(self):
        return roads.optimizer_of(self.model, self.args)


class ReverseDistillation34(ReverseDistillation):
    case, backbone = "resnet34", "resnet34"


class RevDist(Base):
    """CADA's reverse distillation, with GELU in the decoder."""

    file, case, map_factor = "rd4ad", "gelu", 1 / 3
    kind, changes = cada.RevDist, dict(base="revdist")

    def training(self, batch):
        _, rebuilt, phi = self.forward(batch)
        return {"phi": phi, **numbered("rebuilt", rebuilt)}

    def scoring(self, batch):
        anomaly, _ = self.anomaly_map(batch, smoothing=0)
        return {**self.training(batch), "loss": self.loss(batch, 0)[0], "map": anomaly}


class PairedMaps(list):
    """The frozen encoder's maps, with the images that the trained encoder sees."""


class ReContrast(Base):
    file, case = "recontrast", "resnet18"
    kind = cada.ReContrast
    changes = dict(base="recontrast", backbone="resnet18", depths="2,2,2,2", weights="random")

    def __init__(self):
        super().__init__()
        frozen = backbones.build("resnet18", "random", (1, 2, 3))
        self.frozen = fill(frozen.double(), "frozen", "frozen.")

    def batch(self, step):
        pixels = np.random.RandomState(100 * step + 1).randint(0, 256, (2, 3, 64, 64))
        images = torch.from_numpy(pixels.astype(np.uint8))
        maps = PairedMaps(self.frozen(data.normalize(images)))
        maps.images = images
        return maps

    def images(self, batch):
        return batch.images

    def progress(self, step):
        return (0.0, 0.05, 1.0)[step]

    def training(self, batch):
        targets, rebuilt, _ = self.forward(batch)
        return {**numbered("target", targets), **numbered("rebuilt", rebuilt)}

    def scoring(self, batch):
        found = self.training(batch)
        found["map"], _ = self.anomaly_map(batch, smoothing=0)
        found["smoothed"], found["score"] = self.anomaly_map(batch, smoothing=5)
        return found

    def loss(self, batch, step):
        def keep(module, inputs, outputs):
            self.rebuilt = outputs[1]
            for f in self.rebuilt:
                f.retain_grad()

        hook = self.model.register_forward_hook(keep)
        found = super().loss(batch, step)
        hook.remove()
        return found

    def masked(self):
        """After the backward pass: locations of the six maps that got no gradient, sorted
        numbers."""
        return sorted(int((f.grad == 0).all(dim=1).sum()) for f in self.rebuilt)


CASES = [
    OneNIP, UniADInOneNIP, UniADInCADA, OmniADReleased, OmniAD, ReverseDistillation,
    ReverseDistillation34, RevDist, ReContrast,
]

# --------------------------------------------------------------------------------------- comparison


def figures_of(ours):
    return json.loads((FIGURES / f"{ours.file}.json").read_text())["cases"][ours.case]


def relative(found, figure):
    return abs(float(found) - figure) / abs(figure)


def difference(found, figure):
    """Largest relative difference of a tensor, or a number, and its figure."""
    if not isinstance(figure, dict):
        return relative(found, figure)
    values = found.detach().double().numpy()
    assert list(values.shape) == figure["shape"]
    flat = values.ravel()
    places = np.random.RandomState(0).choice(flat.size, min(32, flat.size), replace=False)
    size = figure["norm"] / np.sqrt(flat.size)  # root mean square
    entries = abs(flat[places] - figure["values"]).max()
    mean, std = abs(flat.mean() - figure["mean"]), abs(flat.std() - figure["std"])
    return max(max(entries, mean, std) / size, relative(np.linalg.norm(flat), figure["norm"]))


def check(differences, tolerance):
    """differences: {name: relative difference}."""
    assert differences
    worst = max(differences, key=differences.get)
    print(f"largest relative difference {differences[worst]:.1e}: {worst}")
    assert differences[worst] <= tolerance, worst


def compare_all(found, figures, tolerance, map_factor=1.0):
    """{name: tensor or number} against the figures of the same names: of each, nothing is left
    out."""
    factors = {"map": map_factor, "smoothed": map_factor, "score": map_factor}
    figures = {name: figure for name, figure in figures.items() if name != "mode" and name != "c"}
    assert found.keys() == figures.keys()
    check({name: difference(found[name] / factors.get(name, 1.0), figure)
           for name, figure in figures.items()}, tolerance)


def compare_by_parameter(vectors, figures, title, idle, tolerance, factor=1.0):
    """{name in the figures: tensor} against norms, total norm and checksum; those of `idle` are
    rounding noise."""
    vectors = {name: v.double().numpy() / factor for name, v in vectors.items() if name not in idle}
    norms = {name: np.linalg.norm(v) for name, v in vectors.items()}
    assert norms.keys() == figures["norms"].keys()
    differences = {name: relative(norms[name], figure) for name, figure in figures["norms"].items()}
    total = np.sqrt(sum(norm**2 for norm in norms.values()))
    differences["total"] = relative(total, figures["total"])
    checksum = sum((v * seeded(f"{title} of {name}", v.shape)).sum() for name, v in vectors.items())
    differences["checksum"] = abs(checksum - figures["checksum"]) / figures["total"]
    check(differences, tolerance)


def parameters(ours):
    """{name in the figures: parameter} of all that are trained."""
    named = ours.model.named_parameters()
    return {name_in_figures(ours.case, name): p for name, p in named if p.requires_grad}


def buffers(ours):
    """{name in the figures: L2 norm} of all running statistics."""
    norms = {}
    for name, value in ours.model.state_dict().items():
        if "running_" in name:
            norms[name_in_figures(ours.case, name)] = value.norm()
    return norms


@contextlib.contextmanager
def in_float64():
    """New tensors are float64, and what a script turns into float becomes that too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    forget_constants()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield
    finally:
        torch.set_default_dtype(before)
        forget_constants()


def forget_constants():
    """Empty the scripts' caches of constant tensors, which have the dtype of their first use."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("onenip", "omniad", "roads", "cada", "common"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.fixture(scope="module", params=CASES, ids=lambda kind: f"{kind.file}-{kind.case}")
def built(request):
    """One of CASES, and a copy of its filled weights and buffers."""
    with in_float64():
        ours = request.param()
        return ours, copy.deepcopy(ours.model.state_dict())


@pytest.fixture
def ours(built):
    """One of CASES with its filled weights and buffers; while the test runs, all is computed in
    float64."""
    ours, filled = built
    ours.model.load_state_dict(filled)
    ours.model.zero_grad(set_to_none=True)
    with in_float64():
        yield ours


@pytest.fixture
def jitter(monkeypatch):
    """jitter(noise): the next call of torch.randn_like gives these numbers; there must be exactly
    one (None: none)."""
    waiting = []

    def randn_like(x):
        assert waiting, "more noise than in the authors' code"
        noise = waiting.pop()
        assert noise.numel() == x.numel()
        return noise.reshape(x.shape)  # tokens in a row or in a grid

    def expect(noise):
        assert not waiting, "less noise than in the authors' code"
        if noise is not None:
            waiting.append(noise)

    monkeypatch.setattr(torch, "randn_like", randn_like)
    yield expect
    assert not waiting, "less noise than in the authors' code"


# -------------------------------------------------------------------- our models give their figures


def test_scoring_of_the_authors(ours):
    """In evaluation mode: reconstructions, raw and smoothed maps, image scores."""
    ours.model.eval()
    with torch.no_grad():
        found = ours.scoring(ours.batch(0))
    compare_all(found, figures_of(ours)["scoring"], OUTPUTS, ours.map_factor)


def test_training_pass_of_the_authors(ours, jitter):
    """With batch statistics and jitter."""
    figures = figures_of(ours)
    ours.model.train()
    jitter(ours.noise(0))
    with torch.no_grad():
        found = ours.training(ours.batch(0))
    compare_all(found, figures["training"], OUTPUTS)
    if "buffers_after_one_forward" in figures:
        compare_all(buffers(ours), figures["buffers_after_one_forward"], OUTPUTS)


def backward(ours, batch, step, jitter):
    """One training pass and its backward pass: the total loss, and its parts."""
    ours.model.train()
    ours.model.zero_grad(set_to_none=True)
    jitter(ours.noise(step))
    total, parts = ours.loss(batch, step)
    total.backward()
    return total.item(), {name: part.item() for name, part in parts.items()}


def test_loss_and_gradient_of_the_authors(ours, jitter):
    """The loss and its gradient, parameter by parameter; ReContrast's at three points of
    training."""
    figures = figures_of(ours)
    if "mining" in figures:
        points = list(figures["mining"].values())
    else:
        points = [{"loss": figures["loss"], **figures["gradient"]}]
    for step, point in enumerate(points):
        total, parts = backward(ours, ours.batch(0), step, jitter)
        losses = point["loss"] if isinstance(point["loss"], dict) else {"total": point["loss"]}
        compare_all({"total": total / ours.loss_factor, **parts}, losses, OUTPUTS)
        gradients = {name: p.grad for name, p in parameters(ours).items() if p.grad is not None}
        idle = figures.get("idle", [])
        assert all(gradients[name].norm() < 1e-12 * point["total"] for name in idle)
        compare_by_parameter(gradients, point, "gradient", idle, GRADIENT, ours.loss_factor)
        if "mining" in figures:
            assert ours.masked() == point["masked_locations_sorted"]


def test_three_steps_of_the_authors(ours, jitter):
    """The script's own optimiser, three times: losses, norms of the gradient, what each parameter
    moved, buffers."""
    figures = figures_of(ours)
    steps, optimizer = figures["steps"], ours.optimizer()
    filled = {name: p.detach().clone() for name, p in parameters(ours).items()}
    differences = {}
    for step, loss in enumerate(steps["loss"]):
        found, _ = backward(ours, ours.batch(step), step, jitter)
        differences[f"loss before step {step}"] = relative(found / ours.loss_factor, loss)
        if ours.clip:
            norm = torch.nn.utils.clip_grad_norm_(ours.model.parameters(), ours.clip)
            figure = steps["gradient_norm"][step]
            differences[f"gradient before step {step}"] = relative(norm / ours.loss_factor, figure)
        optimizer.step()
    check(differences, STEPS)
    moved = {name: p.detach() - filled[name] for name, p in parameters(ours).items()}
    compare_by_parameter(moved, steps, "change", figures.get("idle", []), STEPS)
    if steps["buffers"]:
        compare_all(buffers(ours), steps["buffers"], STEPS)


def test_parts_of_omniad():
    """Neck, local branch and expansion of Omni-AD, which none of the released code's faults
    touches."""
    figures = json.loads((FIGURES / "omniad.json").read_text())["cases"]["parts"]["outputs"]
    with in_float64(), torch.no_grad():
        ours = OmniAD()
        ours.model.eval()
        found = ours.parts()
    compare_all(found, figures, OUTPUTS)


# ------------------------------------------------------------------------------ the papers' recipes


def options_of(script, monkeypatch, *words):
    """The options of `python SCRIPT.py --data mvtec WORDS`: the paper preset."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--data", "mvtec", *words])
    presets = script.presets() if hasattr(script, "presets") else script.PRESETS
    args = runtime.parse(script.Args, presets, script.__doc__)
    assert args.preset == "paper"
    return args


# What the paper (P) or the authors' code (C) says, in our options' names. For ROADS, which has no
# public code, C is RD4AD's, to which the paper refers; for CADA that of its authors' ReContrast.
# What neither says, such as ROADS's prompts, is declared in the script and held to nothing here.
UNIAD_NETWORK = dict(  # P, C
    image_size=224, backbone="efficientnet_b4", hidden=256, heads=8, mlp=1024, jitter=20.0,
)
REVERSE_DISTILLATION = dict(  # P, C
    image_size=256, backbone="wide_resnet50_2", batch_size=16,
)
CADA_HEAD = dict(
    calibrate="cada", regressor="1+2", dropout=0.25, statistic="max", score="top1",  # P, Table 3
    calibration_lr=5e-2, calibration_batch=16, calibration_schedule="constant",  # P
    smoothing=5, mask_rule="any",  # C
)
ONENIP = dict(
    **UNIAD_NETWORK, encoder_layers=4, decoder_layers=4, dropout=0.1, refiner_width=128,  # P, C
    epochs=1000, batch_size=64, lr=1e-4, weight_decay=1e-4, schedule="step",  # P, C
    clip=0.1, loss_weights="code", dice="code", pool=16,  # C
    prompt="dynamic", prompt_train="random", restoration=True, refiner=True, alpha=0.5,  # P, C
    mask_rule="nearest",  # C
)
OMNIAD = dict(
    image_size=256, backbone="resnet34", depths="3,9,9,7", tokens=64, heads=8,  # P, C
    epochs=500, learnable="q+kv", order="q+kv", branches="both",  # P
    batch_size=16, lr=1e-3, weight_decay=1e-4, schedule="step", clip=5.0,  # C
    jitter=20.0, upsample="nearest", standardize=False,  # C
    sigma=4.0, score="max", mask_rule="half",  # C
)
ROADS = dict(
    **REVERSE_DISTILLATION, depths="3,3,4,6",
    eta=0.95, delta=0.025, zeta=0.025, mu=0.025,  # P, Eq. 6 and row ROADS-4
    lr=5e-3, schedule="constant", distance="flat", sigma=4.0, mask_rule="half",  # C
)
REVDIST = dict(
    **REVERSE_DISTILLATION, **CADA_HEAD, depths="3,3,4,6", cosine="flat",  # C
    steps=5000, lr=2e-3, weight_decay=1e-5, alpha=0.1, calibration_steps=5000,  # P
    schedule="step", lr_drop=0.2, clip=0.0,  # C
)
RECONTRAST = dict(REVDIST, encoder_lr=1e-5)  # C
UNIAD = dict(
    **UNIAD_NETWORK, **CADA_HEAD, layers=4, attention_dropout=0.1,  # P, C
    steps=50_000, batch_size=64, lr=3e-4, weight_decay=1e-4,  # P
    alpha=10.0, calibration_steps=20_000,  # P
    schedule="step", lr_drop=0.1, clip=0.1,  # UniAD's code
)
PRESETS = {
    "onenip": (onenip, [], ONENIP),
    "omniad": (omniad, [], OMNIAD),
    "roads": (roads, [], ROADS),
    "revdist": (cada, [], REVDIST),
    "recontrast": (cada, ["--base", "recontrast"], RECONTRAST),
    "uniad": (cada, ["--base", "uniad"], UNIAD),
}


@pytest.mark.parametrize("name", PRESETS)
def test_paper_preset_has_the_values_of_paper_and_code(name, monkeypatch):
    """Each value as the paper prints it, or, where that is silent, as the authors' code has it."""
    script, words, expected = PRESETS[name]
    args = options_of(script, monkeypatch, *words)
    assert {option: getattr(args, option) for option in expected} == expected


@pytest.fixture
def steps_of(monkeypatch, command, tiny_data, tmp_path):
    """steps_of(script, ...) trains the paper preset on 12 images and returns its optimiser's steps.

    Each has .kind, the optimiser's class, .groups, dicts without the parameters, and .clip, the
    norm that the gradient was cut to (None: it was not).
    """
    steps, cuts = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def record_clip(parameters, max_norm, *words, **options):
        cuts.append(max_norm)
        return clip(parameters, max_norm, *words, **options)

    def record_step(optimizer, *_):
        groups = [dict(group, params=None) for group in optimizer.param_groups]
        cut = cuts.pop() if cuts else None
        assert not cuts
        steps.append(SimpleNamespace(kind=type(optimizer), groups=groups, clip=cut))

    def run(script, *words):
        classes = ",".join(sorted(folder.name for folder in tiny_data.glob("[!.]*"))[:2])
        where = ["--data", tiny_data, "--classes", classes, "--out", tmp_path / script]
        small = "--backbone efficientnet_lite0 --weights random --image-size 64".split()
        done = command(script, "--preset", "paper", *where, *small, *SMALL[script].split(), *words)
        assert done.status == 0, done.err
        return steps

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record_clip)
    hook = register_optimizer_step_pre_hook(record_step)
    yield run
    hook.remove()


# Sizes of a model that is trained at once; nothing of the recipe.
SMALL = {
    "onenip": "--hidden 16 --heads 2 --mlp 16 --encoder-layers 1 --decoder-layers 1",
    "omniad": "--depths 1,1,1,1 --tokens 4",
    "roads": "--depths 1,1,1,1 --adapter-backbone efficientnet_lite0 --adapter-weights random",
    "cada": "--depths 1,1,1,1 --hidden 16 --heads 2 --mlp 16 --layers 1",
}
ADAMW = dict(betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
AMSGRAD = dict(betas=(0.9, 0.999), eps=1e-10, amsgrad=True, weight_decay=1e-5)  # ReContrast's


def check_steps(steps, kind, groups, rates, clip):
    """Every step is of this kind and clipping, and has these groups, listed by rate and decay.

    rates: what the groups' learning rates are multiplied by at each step.
    """
    assert len(steps) == len(rates)
    for step, rate in zip(steps, rates):
        assert step.kind is kind and step.clip == clip and len(step.groups) == len(groups)
        found = sorted(step.groups, key=lambda group: (group["lr"], group["weight_decay"]))
        for group, expected in zip(found, groups):
            assert group["lr"] == pytest.approx(rate * expected["lr"], rel=1e-12)
            same = {key: value for key, value in expected.items() if key != "lr"}
            assert {key: group[key] for key in same} == same


def test_onenip_is_trained_as_by_its_authors(steps_of):
    """AdamW, every parameter with decay; x 0.1 after 80 % of the epochs; an incomplete batch is not
    lost (57 steps an epoch for MVTec AD's 3,629 images in batches of 64)."""
    steps = steps_of("onenip", "--epochs", 5, "--batch-size", 5)
    group = dict(ADAMW, lr=1e-4, weight_decay=1e-4)
    check_steps(steps, torch.optim.AdamW, [group], [1] * 10 + [0.1] * 2, clip=0.1)


def test_omniad_is_trained_as_by_its_authors(steps_of):
    """AdamW, vectors without decay; x 0.1 after 80 %; incomplete batches are dropped (226 steps an
    epoch of 16)."""
    steps = steps_of("omniad", "--epochs", 5, "--batch-size", 5)
    groups = [dict(ADAMW, lr=1e-3, weight_decay=decay) for decay in (0.0, 1e-4)]
    check_steps(steps, torch.optim.AdamW, groups, [1] * 8 + [0.1] * 2, clip=5.0)


def test_roads_is_trained_as_reverse_distillation(steps_of):
    """Adam with RD4AD's betas, no decay, a constant rate, no clipping. The rate of the pre-trained
    adapter is ours."""
    steps = steps_of("roads", "--steps", 6, "--batch-size", 4)
    adam = dict(betas=(0.5, 0.999), eps=1e-8, weight_decay=0, amsgrad=False)
    groups = [dict(adam, lr=rate) for rate in (1e-4, 5e-3)]
    check_steps(steps, torch.optim.Adam, groups, [1] * 6, clip=None)


@pytest.mark.parametrize("base, groups, drop, clip", [
    ("revdist", [dict(ADAMW, lr=2e-3, weight_decay=1e-5)], 0.2, None),
    ("recontrast", [dict(AMSGRAD, lr=1e-5), dict(AMSGRAD, lr=2e-3)], 0.2, None),
    ("uniad", [dict(ADAMW, lr=3e-4, weight_decay=1e-4)], 0.1, 0.1)])
def test_bases_and_head_of_cada_are_trained_as_in_the_paper(steps_of, base, groups, drop, clip):
    """AdamW for the base, its rate dropped at 80 % of the steps; then SGD for the head, at a
    constant rate."""
    steps = steps_of(
        "cada", "--base", base, "--steps", 5, "--calibration-steps", 3, "--batch-size", 4
    )
    check_steps(steps[:5], torch.optim.AdamW, groups, [1] * 4 + [drop], clip)
    sgd = dict(lr=5e-2, momentum=0.9, weight_decay=1e-4, dampening=0, nesterov=False)
    check_steps(steps[5:], torch.optim.SGD, [sgd], [1] * 3, clip=None)


def settings(kind):
    """{name of a parameter: its group} of the script's own optimiser."""
    ours = kind()
    names = {id(p): name for name, p in ours.model.named_parameters() if p.requires_grad}
    found = {}
    for group in ours.optimizer().param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found, "each parameter once"
            found[names[id(p)]] = group
    assert found.keys() == set(names.values())
    return found, dict(ours.model.named_parameters())


@pytest.mark.parametrize("kind", [OmniAD, OmniADReleased], ids=["mended", "released"])
def test_omniad_decays_all_but_vectors(kind):
    """Released code: no decay of one-dimensional parameters. Its biases after the softmax have
    three, and decay."""
    groups, named = settings(kind)
    for name, group in groups.items():
        assert group["weight_decay"] == (1e-4 if named[name].ndim > 1 else 0.0), name
    if kind is OmniADReleased:
        assert any(name.endswith("first.bias") and named[name].ndim == 3 for name in groups)


def test_recontrast_trains_its_encoder_slowly():
    groups, _ = settings(ReContrast)
    for name, group in groups.items():
        assert group["lr"] == (1e-5 if name.startswith("encoder.") else 2e-3), name


@pytest.mark.parametrize("kind", [OneNIP, UniADInOneNIP, UniADInCADA, ReverseDistillation, RevDist])
def test_one_group_of_parameters(kind):
    """Nothing is left out of training, nothing is treated apart."""
    groups, _ = settings(kind)
    assert len({id(group) for group in groups.values()}) == 1
