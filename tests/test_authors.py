"""What our models compute is what the authors' code computed, and the paper presets train by the authors' recipes.

First part, in float64: tests/authors/ holds figures of five published implementations whose parameters and inputs were
made by a formula. Our models, filled by the same formula, must give the same figures: outputs, losses, every
parameter's gradient, what three optimiser steps move, maps and scores. All that touches a script stands in the classes
`OneNIP` to `ReContrast` below; where a script names a parameter otherwise than the figures, RENAMED says so.

Second part: optimiser, its hyper-parameters, schedule, clipping, epochs, batch, sizes and weights of every paper
preset, as the paper or the authors' code has them, read from the training loop while it runs.
"""

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

OUTPUTS, GRADIENT, STEPS = 1e-9, 1e-9, 1e-6  # largest relative differences; Adam multiplies rounding

# {case: {regular expression in our name of a parameter: what the figures have in its place}}
RENAMED = {}

# ------------------------------------------------------------------------------------------ filling and inputs


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


def teacher_maps(step):
    """f1, f2, f3 of two images of 64 px, for Omni-AD and reverse distillation."""
    shapes = (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)
    return [normal(100 * step + i, *shape) for i, shape in enumerate(shapes, 1)]


class Teacher:
    """In the place of a frozen network: gives the maps that it was made with, whatever the images."""

    def __init__(self, maps):
        self.given = maps

    def __call__(self, images):
        return self.given

    maps = __call__

    def split(self, rows):
        return rows


def run_stub():
    """What the parts of a script ask of a run, in one process without mixed precision."""
    run = runtime.Run("test", Path(), torch.device("cpu"))
    run.wrap = lambda model: (model, model)
    run.checkpoint = lambda args: None
    return run


class Made(Exception):
    """Carries the optimiser that a training loop has just made."""


def optimizer_in(train, *arguments):
    """The first optimiser that the function `train` makes, which is ended there."""
    def caught(kind):
        def make(*words, **options):
            raise Made(kind(*words, **options))
        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in ("Adam", "AdamW"):
            patch.setattr(torch.optim, name, caught(getattr(torch.optim, name)))
        with pytest.raises(Made) as made:
            train(*arguments)
    return made.value.args[0]


# -------------------------------------------------------------------- the scripts: all that the tests know of them

# A class has: file, case (in that file), loss_factor and map_factor (ours / theirs), model, args, clip;
#   batch(step); noise(step), the normal numbers of that step's jitter or None;
#   scoring(batch) and training(batch) -> {figure: tensor}; loss(batch, step) -> total, {figure: part}; optimizer().


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
        s_rec, mask = onenip.raw_maps(self.model, x, p, self.args)
        s, score = onenip.combine(s_rec, mask, 5.0, self.args)
        reconstruction = self.model.decode(self.model.encode(x), p)
        return {"reconstruction": reconstruction, "s_rec": s_rec, "mask": mask, "map": s, "score": score}

    def training(self, batch):
        reconstruction, restored, mask = self.model(*batch[:3])
        return {"reconstruction": reconstruction, "restoration": restored, "mask": mask}

    def loss(self, batch, step):
        total, parts = onenip.losses(self.model, *batch, self.args)
        return total, {"mse": (parts["rec"] + parts["res"]) / 2, "dice": parts["seg"]}

    def optimizer(self):
        if hasattr(onenip, "optimizer_of"):
            return onenip.optimizer_of(self.model, self.args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onenip, "OneNIP", lambda *arguments: self.model)
            features = SimpleNamespace(channels=272, side=14)
            return optimizer_in(onenip.train, self.args, run_stub(), features, [], None)


class UniADInOneNIP(OneNIP):
    file, case = "uniad", "none"
    loss_factor = 1.0
    changes = dict(prompt="none", restoration=False, refiner=False)

    def batch(self, step):
        return normal(100 * step + 1, 2, 272, 14, 14), None, None, None

    def noise(self, step):
        return normal(100 * step + 5, 2, 196, 272)

    def scoring(self, batch):
        s_rec, mask = onenip.raw_maps(self.model, batch[0], None, self.args)
        s, score = onenip.combine(s_rec, mask, 5.0, self.args)
        reconstruction = self.model.decode(self.model.encode(batch[0]), None)
        return {"reconstruction": reconstruction, "map": s, "score": score}

    def training(self, batch):
        return {"reconstruction": self.model(*batch[:3])[0]}

    def loss(self, batch, step):
        return onenip.losses(self.model, *batch, self.args)[0], {}


class UniADInCADA:
    file, case = "uniad", "cada"
    loss_factor, map_factor, clip = 1.0, 1.0, 0.1

    def __init__(self):
        self.args = cada.Args(
            base="uniad", image_size=224, layers=2, attention_dropout=0.0, lr=1e-4, weight_decay=1e-4, clip=self.clip
        )
        self.model = fill(cada.UniAD(self.args, [272], [14]), self.case)

    def batch(self, step):
        return [normal(100 * step + 1, 2, 272, 14, 14)]

    def noise(self, step):
        return normal(100 * step + 5, 2, 196, 272)

    def training(self, batch):
        _, rebuilt, _ = self.model(batch, None)
        return {"reconstruction": rebuilt[0]}

    scoring = training

    def loss(self, batch, step):
        targets, rebuilt, _ = self.model(batch, None)
        return self.model.loss(targets, rebuilt, 0.0), {}

    def optimizer(self):
        return optimizer_of_base(self.model, self.args)


def optimizer_of_base(model, args):
    if hasattr(model, "optimizer"):
        return model.optimizer(args)
    return optimizer_in(cada.train_base, args, run_stub(), None, model, None, None)


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
        found = {"neck": self.model.neck(*batch), **self.training(batch), "loss": self.loss(batch, 0)[0]}
        for name, sigma in (("map", 0.0), ("smoothed", 4.0)):
            self.args.sigma = sigma
            score = omniad.Scorer(self.args, run_stub(), Teacher(batch), self.model)
            found[name], found["score"] = score(None, None)
        return found

    def training(self, batch):
        return {f"rebuilt{i}": f for i, f in enumerate(self.model(batch), 1)}

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
            prompts=False, adapter="none", backbone=self.backbone, depths="3,4,6", eta=1.0, image_size=64
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
            found[name], found["score"] = score(None, None)
        return found

    def training(self, batch):
        rebuilt = self.model(batch)["maps"]
        maps = {f"rebuilt{i}": f for i, f in enumerate(rebuilt, 1)}
        return {"phi": self.model.bottleneck(*batch), **maps}

    def loss(self, batch, step):
        return roads.losses(self.model, self.args, batch)[0], {}

    def optimizer(self):
        if hasattr(roads, "optimizer_of"):
            return roads.optimizer_of(self.model, self.args)
        return optimizer_in(roads.train, self.args, run_stub(), None, self.model, None, [])


class ReverseDistillation34(ReverseDistillation):
    case, backbone = "resnet34", "resnet34"


class RevDist:
    """CADA's reverse distillation, with GELU in the decoder."""

    file, case = "rd4ad", "gelu"
    loss_factor, map_factor, clip = 1.0, 1 / 3, None

    def __init__(self):
        self.args = cada.Args(base="revdist", image_size=64)
        self.model = fill(cada.RevDist(self.args, [64, 128, 256], [16, 8, 4]), self.case)

    batch = staticmethod(teacher_maps)

    def noise(self, step):
        return None

    def scoring(self, batch):
        targets, rebuilt, phi = self.model(batch, None)
        maps = {f"rebuilt{i}": f for i, f in enumerate(rebuilt, 1)}
        anomaly = self.model.anomaly_map(targets, rebuilt)
        return {"phi": phi, **maps, "loss": self.model.loss(targets, rebuilt, 0.0), "map": anomaly}

    def training(self, batch):
        _, rebuilt, phi = self.model(batch, None)
        return {"phi": phi, **{f"rebuilt{i}": f for i, f in enumerate(rebuilt, 1)}}

    def loss(self, batch, step):
        targets, rebuilt, _ = self.model(batch, None)
        return self.model.loss(targets, rebuilt, 0.0), {}

    def optimizer(self):
        return optimizer_of_base(self.model, self.args)


class ReContrast:
    file, case = "recontrast", "resnet18"
    loss_factor, map_factor, clip = 1.0, 1.0, None
    progress = 0.0, 0.05, 1.0  # of the training, at the three steps

    def __init__(self):
        self.args = cada.Args(
            base="recontrast", backbone="resnet18", depths="2,2,2,2", weights="random", image_size=64
        )
        self.model = fill(cada.ReContrast(self.args, [64, 128, 256], [16, 8, 4]), self.case)
        self.frozen = fill(backbones.build("resnet18", "random", (1, 2, 3)).double(), "frozen", "frozen.")

    def batch(self, step):
        images = np.random.RandomState(100 * step + 1).randint(0, 256, (2, 3, 64, 64))
        return torch.from_numpy(images.astype(np.uint8))

    def noise(self, step):
        return None

    def pairs(self, images):
        """The six targets and the six maps that are compared with them."""
        maps = self.frozen(data.normalize(images))
        targets, rebuilt, _ = self.model(maps, images)
        return targets, rebuilt

    def training(self, batch):
        targets, rebuilt = self.pairs(batch)
        maps = {f"target{i}": f for i, f in enumerate(targets, 1)}
        return {**maps, **{f"rebuilt{i}": f for i, f in enumerate(rebuilt, 1)}}

    def scoring(self, batch):
        anomaly = self.model.anomaly_map(*self.pairs(batch))
        smoothed, score = cada.scored(anomaly, self.args)
        return {**self.training(batch), "map": anomaly, "smoothed": smoothed, "score": score}

    def loss(self, batch, step):
        targets, rebuilt = self.pairs(batch)
        for f in rebuilt:
            f.retain_grad()
        self.rebuilt = rebuilt
        return self.model.loss(targets, rebuilt, self.progress[step]), {}

    def masked(self):
        """After the backward pass: locations of the six maps that got no gradient, sorted numbers."""
        return sorted(int((f.grad == 0).all(dim=1).sum()) for f in self.rebuilt)

    def optimizer(self):
        return optimizer_of_base(self.model, self.args)


CASES = [OneNIP, UniADInOneNIP, UniADInCADA, OmniADReleased, OmniAD, ReverseDistillation, ReverseDistillation34,
         RevDist, ReContrast]

# ------------------------------------------------------------------------------------------------- comparison


def figures_of(kind):
    file = json.loads((Path(__file__).parent / "authors" / f"{kind.file}.json").read_text())
    return file["cases"][kind.case]


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
    """{name: tensor or number} against the figures of the same names: of each, nothing is left out."""
    factors = {"map": map_factor, "smoothed": map_factor, "score": map_factor}
    figures = {name: figure for name, figure in figures.items() if name != "mode" and name != "c"}
    assert found.keys() == figures.keys()
    check({name: difference(found[name] / factors.get(name, 1.0), figure)
           for name, figure in figures.items()}, tolerance)


def compare_by_parameter(vectors, figures, title, idle, tolerance, factor=1.0):
    """{name in the figures: tensor} against norms, total norm and checksum; those of `idle` are rounding noise."""
    vectors = {name: v.double().numpy() / factor for name, v in vectors.items() if name not in idle}
    norms = {name: np.linalg.norm(v) for name, v in vectors.items()}
    assert norms.keys() == figures["norms"].keys()
    differences = {name: relative(norms[name], figure) for name, figure in figures["norms"].items()}
    total = np.sqrt(sum(norm**2 for norm in norms.values()))
    differences["total"] = relative(total, figures["total"])
    checksum = sum((v * seeded(f"{title} of {name}", v.shape)).sum() for name, v in vectors.items())
    differences["checksum"] = abs(checksum - figures["checksum"]) / figures["total"]
    check(differences, tolerance)


def parameters(kind):
    """{name in the figures: parameter} of all that are trained."""
    named = kind.model.named_parameters()
    return {name_in_figures(kind.case, name): p for name, p in named if p.requires_grad}


def buffers(kind, names):
    """{name in the figures: L2 norm} of the running statistics `names`."""
    state = {name_in_figures(kind.case, name): value for name, value in kind.model.state_dict().items()}
    running = {name: value.norm() for name, value in state.items() if "running_" in name}
    return {name: value for name, value in running.items() if name in names or not name.startswith("encoder.")}


@pytest.fixture
def float64(monkeypatch):
    """New tensors are float64, and what a script turns into float becomes that too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    forget_constants()
    yield
    torch.set_default_dtype(before)
    forget_constants()


def forget_constants():
    """Empty the scripts' caches of constant tensors, which have the dtype of their first use."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("onenip", "omniad", "roads", "cada", "common"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.fixture
def jitter(monkeypatch):
    """jitter(noise): the next call of torch.randn_like gives these numbers; there must be exactly one (None: none)."""
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


# -------------------------------------------------------------------------------- our models give their figures

every_case = pytest.mark.parametrize("kind", CASES, ids=lambda kind: f"{kind.file}-{kind.case}")


@every_case
def test_scoring_of_the_authors(kind, float64):
    """In evaluation mode: reconstructions, raw and smoothed maps, image scores."""
    ours = kind()
    ours.model.eval()
    with torch.no_grad():
        found = ours.scoring(ours.batch(0))
    compare_all(found, figures_of(kind)["scoring"], OUTPUTS, kind.map_factor)


@every_case
def test_training_pass_of_the_authors(kind, float64, jitter):
    """With batch statistics and jitter."""
    ours = kind()
    ours.model.train()
    jitter(ours.noise(0))
    with torch.no_grad():
        found = ours.training(ours.batch(0))
    figures = figures_of(kind)
    compare_all(found, figures["training"], OUTPUTS)
    if "buffers_after_one_forward" in figures:
        after = figures["buffers_after_one_forward"]
        compare_all(buffers(ours, after), after, OUTPUTS)


def backward(ours, step, jitter):
    """One training pass and its backward pass: the total loss, and its parts."""
    ours.model.train()
    ours.model.zero_grad(set_to_none=True)
    jitter(ours.noise(step))
    total, parts = ours.loss(ours.batch(step), step)
    total.backward()
    return total.item(), {name: part.item() for name, part in parts.items()}


@every_case
def test_loss_and_gradient_of_the_authors(kind, float64, jitter):
    """The loss and its gradient, parameter by parameter."""
    figures = figures_of(kind)
    ours = kind()
    points = figures["mining"].values() if "mining" in figures else [{**figures["gradient"], "loss": figures["loss"]}]
    for step, point in enumerate(points):
        if "mining" in figures:  # the same batch at three points of training
            ours.batch = lambda step: kind.batch(ours, 0)
        total, parts = backward(ours, step, jitter)
        losses = point["loss"] if isinstance(point["loss"], dict) else {"total": point["loss"]}
        compare_all({"total": total / kind.loss_factor, **parts}, losses, OUTPUTS)
        gradients = {name: p.grad for name, p in parameters(ours).items() if p.grad is not None}
        idle = set(figures.get("idle", ()))
        assert all(gradients[name].norm() < 1e-12 * point["total"] for name in idle)
        compare_by_parameter(gradients, point, "gradient", idle, GRADIENT, kind.loss_factor)
        if "mining" in figures:
            assert ours.masked() == point["masked_locations_sorted"]


@every_case
def test_three_steps_of_the_authors(kind, float64, jitter):
    """The script's own optimiser, three times: losses, norms of the gradient, what each parameter moved, buffers."""
    figures = figures_of(kind)
    ours, steps = kind(), figures["steps"]
    optimizer, filled = ours.optimizer(), {n: p.detach().clone() for n, p in parameters(ours).items()}
    differences = {}
    for step, loss in enumerate(steps["loss"]):
        found, _ = backward(ours, step, jitter)
        differences[f"loss before step {step}"] = relative(found / kind.loss_factor, loss)
        if kind.clip:
            norm = torch.nn.utils.clip_grad_norm_(ours.model.parameters(), kind.clip) / kind.loss_factor
            figure = steps["gradient_norm"][step]
            differences[f"gradient before step {step}"] = relative(norm, figure)
        optimizer.step()
    check(differences, STEPS)
    moved = {name: p.detach() - filled[name] for name, p in parameters(ours).items()}
    compare_by_parameter(moved, steps, "change", set(figures.get("idle", ())), STEPS)
    if steps["buffers"]:
        compare_all(buffers(ours, steps["buffers"]), steps["buffers"], STEPS)


def test_parts_of_omniad(float64):
    """Neck, local branch and expansion of Omni-AD, which none of the released code's faults touches."""
    file = json.loads((Path(__file__).parent / "authors" / "omniad.json").read_text())
    ours = OmniAD()
    ours.model.eval()
    with torch.no_grad():
        found = ours.parts()
    compare_all(found, file["cases"]["parts"]["outputs"], OUTPUTS)


# ------------------------------------------------------------------------------------------ the papers' recipes


def options_of(script, monkeypatch, *words):
    """The options of `python SCRIPT.py --data mvtec WORDS`: the paper preset."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--data", "mvtec", *words])
    presets = script.presets() if hasattr(script, "presets") else script.PRESETS
    args = runtime.parse(script.Args, presets, script.__doc__)
    assert args.preset == "paper"
    return args


# What the paper (P) or the authors' code (C) says, as options of ours. One line of a source each; what neither says,
# such as the tokens of a prompt in ROADS, is declared in the script and not here.
UNIAD_NETWORK = dict(image_size=224, backbone="efficientnet_b4", hidden=256, heads=8, mlp=1024, jitter=20.0)  # P, C
REVERSE_DISTILLATION = dict(image_size=256, backbone="wide_resnet50_2", batch_size=16)  # C
CADA_HEAD = dict(
    calibrate="cada", regressor="1+2", dropout=0.25, statistic="max",  # P 3.3 and 4.2
    calibration_lr=5e-2, calibration_batch=16, calibration_schedule="constant",  # P 4.1
    smoothing=5, score="top1", mask_rule="any",  # C: ReContrast's evaluation; P: the highest 1 %
)
PRESETS = {
    "onenip": (onenip, [], dict(
        **UNIAD_NETWORK, encoder_layers=4, decoder_layers=4, dropout=0.1, refiner_width=128,  # P Table 4b, C
        epochs=1000, batch_size=64, lr=1e-4, weight_decay=1e-4, schedule="step",  # P 4.1, C
        clip=0.1, loss_weights="code", dice="code",  # C: L_rec : L_res : L_seg = 1 : 1 : 1
        alpha=0.5, pool=16, prompt="dynamic", prompt_train="random", restoration=True, refiner=True)),  # P, pool C
    "omniad": (omniad, [], dict(
        image_size=256, backbone="resnet34", depths="3,9,9,7", tokens=64, heads=8,  # P IV-A, Tables IV, VI, VII
        epochs=500, batch_size=16, learnable="q+kv", order="q+kv", branches="both",  # P
        lr=1e-3, weight_decay=1e-4, schedule="step", clip=5.0, jitter=20.0, upsample="nearest",  # C
        standardize=False, sigma=4.0, score="max", mask_rule="half")),  # C
    "roads": (roads, [], dict(
        **REVERSE_DISTILLATION, depths="3,4,6", eta=0.95, delta=0.025, mu=0.025,  # P Eq. 6, row ROADS-4
        lr=5e-3, schedule="constant", distance="flat", sigma=4.0, mask_rule="half")),  # C: RD4AD, as P says
    "revdist": (cada, [], dict(
        **REVERSE_DISTILLATION, **CADA_HEAD, depths="3,3,4,6", cosine="flat",  # C
        steps=5000, lr=2e-3, weight_decay=1e-5, alpha=0.1, calibration_steps=5000,  # P 4.1
        schedule="step", lr_drop=0.2, clip=0.0)),  # C: ReContrast's multi-class script
    "recontrast": (cada, ["--base", "recontrast"], dict(
        **REVERSE_DISTILLATION, **CADA_HEAD, depths="3,3,4,6",  # C
        steps=5000, lr=2e-3, weight_decay=1e-5, alpha=0.1, calibration_steps=5000,  # P 4.1
        encoder_lr=1e-5, schedule="step", lr_drop=0.2, clip=0.0)),  # C
    "uniad": (cada, ["--base", "uniad"], dict(
        **UNIAD_NETWORK, **CADA_HEAD, layers=4, attention_dropout=0.1,  # P, C
        steps=50_000, batch_size=64, lr=3e-4, weight_decay=1e-4, alpha=10.0, calibration_steps=20_000,  # P 4.1
        schedule="step", lr_drop=0.1, clip=0.1)),  # C: UniAD's own
}


@pytest.mark.parametrize("name", PRESETS)
def test_paper_preset_has_the_values_of_paper_and_code(name, monkeypatch):
    script, words, expected = PRESETS[name]
    args = options_of(script, monkeypatch, *words)
    assert {option: getattr(args, option) for option in expected} == expected


@pytest.fixture
def steps_of(monkeypatch, command, tiny_data, tmp_path):
    """steps_of(script, ...) trains the paper preset on 12 images and returns what each optimiser step was: .kind,
    .groups (dicts without the parameters) and .clip, the norm that the gradient was cut to (None: it was not)."""
    steps, cuts = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def record_clip(parameters, max_norm, *words, **options):
        cuts.append(max_norm)
        return clip(parameters, max_norm, *words, **options)

    def record_step(optimizer, *_):
        groups = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        cut = cuts.pop() if cuts else None
        assert not cuts
        steps.append(SimpleNamespace(kind=type(optimizer), groups=groups, clip=cut))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record_clip)
    hook = register_optimizer_step_pre_hook(record_step)

    def run(script, *words):
        classes = ",".join(sorted(folder.name for folder in tiny_data.iterdir())[:2])
        small = "--backbone efficientnet_lite0 --weights random --image-size 64".split()
        done = command(script, "--data", tiny_data, "--classes", classes, "--preset", "paper", *small, *words,
                       "--out", tmp_path / script)
        assert done.status == 0, done.err
        return list(steps)

    yield run
    hook.remove()


def check_steps(steps, kind, groups, rates, clip):
    """Every step is of this kind and clipping, with these groups; rates: [what the groups' lr is multiplied by]."""
    assert len(steps) == len(rates)
    for step, rate in zip(steps, rates):
        assert step.kind is kind and step.clip == clip and len(step.groups) == len(groups)
        for found, expected in zip(step.groups, groups):
            assert found["lr"] == pytest.approx(rate * expected["lr"], rel=1e-12)
            same = {key: value for key, value in expected.items() if key != "lr"}
            assert {key: found[key] for key in same} == same


ADAMW = dict(betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
SMALL = {
    "onenip": "--hidden 16 --heads 2 --mlp 16 --encoder-layers 1 --decoder-layers 1 --refiner-width 8".split(),
    "omniad": "--depths 1,1,1,1 --tokens 4".split(),
    "roads": "--depths 1,1,1 --adapter-backbone efficientnet_lite0 --adapter-weights random".split(),
    "cada": "--depths 1,1,1,1 --hidden 16 --heads 2 --mlp 16 --layers 1 --calibration-steps 3".split(),
}


def test_onenip_is_trained_as_by_its_authors(steps_of):
    """AdamW, every parameter with decay; x 0.1 after 80 % of the epochs; an incomplete batch is not lost (57 steps an
    epoch for MVTec AD's 3,629 images in batches of 64)."""
    steps = steps_of("onenip", *SMALL["onenip"], "--epochs", 5, "--batch-size", 5)
    group = dict(ADAMW, lr=1e-4, weight_decay=1e-4)
    check_steps(steps, torch.optim.AdamW, [group], [1] * 10 + [0.1] * 2, clip=0.1)


def test_omniad_is_trained_as_by_its_authors(steps_of):
    """AdamW, vectors without decay; x 0.1 after 80 %; incomplete batches are dropped (226 steps an epoch of 16)."""
    steps = steps_of("omniad", *SMALL["omniad"], "--epochs", 5, "--batch-size", 5)
    groups = [dict(ADAMW, lr=1e-3, weight_decay=1e-4), dict(ADAMW, lr=1e-3, weight_decay=0.0)]
    check_steps(steps, torch.optim.AdamW, groups, [1] * 8 + [0.1] * 2, clip=5.0)


def test_roads_is_trained_as_reverse_distillation(steps_of):
    """Adam with RD4AD's betas, no decay, a constant rate, no clipping. The rate of the pre-trained adapter is ours."""
    steps = steps_of("roads", *SMALL["roads"], "--steps", 6, "--batch-size", 4)
    adam = dict(betas=(0.5, 0.999), eps=1e-8, weight_decay=0, amsgrad=False)
    groups = [dict(adam, lr=5e-3), dict(adam, lr=1e-4)]
    check_steps(steps, torch.optim.Adam, groups, [1] * 6, clip=None)


@pytest.mark.parametrize("base, groups, drop, clip", [
    ("revdist", [dict(ADAMW, lr=2e-3, weight_decay=1e-5)], 0.2, None),
    ("recontrast", [dict(ADAMW, lr=rate, weight_decay=1e-5, amsgrad=True, eps=1e-10) for rate in (1e-5, 2e-3)], 0.2, None),
    ("uniad", [dict(ADAMW, lr=3e-4, weight_decay=1e-4)], 0.1, 0.1)])
def test_bases_and_head_of_cada_are_trained_as_in_the_paper(steps_of, base, groups, drop, clip):
    """AdamW for the base, its rate dropped at 80 % of the steps; then SGD for the head, at a constant rate."""
    steps = steps_of("cada", *SMALL["cada"], "--base", base, "--steps", 5, "--batch-size", 4)
    check_steps(steps[:5], torch.optim.AdamW, groups, [1] * 4 + [drop], clip)
    sgd = dict(lr=5e-2, momentum=0.9, weight_decay=1e-4, dampening=0, nesterov=False)
    check_steps(steps[5:], torch.optim.SGD, [sgd], [1] * 3, clip=None)


def settings(kind):
    """{name of a parameter: its group} of the script's own optimiser."""
    ours = kind()
    names = {id(p): name for name, p in ours.model.named_parameters() if p.requires_grad}
    groups = ours.optimizer().param_groups
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups), "each parameter once"
    return found, dict(ours.model.named_parameters())


@pytest.mark.parametrize("kind", [OmniAD, OmniADReleased], ids=["mended", "released"])
def test_omniad_decays_all_but_vectors(kind):
    """Released code: no decay of one-dimensional parameters. Its biases after the softmax have three, and decay."""
    groups, named = settings(kind)
    assert all((group["weight_decay"] > 0) == (named[name].ndim > 1) for name, group in groups.items())
    if kind is OmniADReleased:
        assert any(name.endswith("first.bias") and named[name].ndim == 3 for name in groups)


def test_recontrast_trains_its_encoder_slowly():
    groups, _ = settings(ReContrast)
    assert all(group["lr"] == (1e-5 if name.startswith("encoder.") else 2e-3) for name, group in groups.items())


@pytest.mark.parametrize("kind", [OneNIP, UniADInOneNIP, UniADInCADA, ReverseDistillation, RevDist])
def test_one_group_of_parameters(kind):
    """Nothing is left out of training, nothing is treated apart."""
    groups, _ = settings(kind)
    assert len({id(group) for group in groups.values()}) == 1
