"""The Triton kernels against plain PyTorch in float64, on a GPU (`pytest -m gpu`) or in Triton's interpreter on a CPU.

Without a GPU, test_kernels_interpreter.py runs this file in a process of its own with TRITON_INTERPRET=1. There bf16
matrices are multiplied in fp32 (the interpreter cannot), and its conversions to bf16 truncate; only a GPU tests those.

Every test is held to twice the error of plain PyTorch in the same dtype. All inputs lie in red zones of NaN, and all
memory the kernels' launchers allocate is filled with NaN and lies in red zones too, so that a read out of place, a
write out of place and a forgotten write fail the test.
"""

import math
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

from kernels import cosine_loss, cosine_map, cross_attention, few_token_attention
from kernels.backend import INTERPRET, HAS_TRITON, _trials
from kernels.few_tokens import map_reads, tokens_read

pytestmark = [] if INTERPRET else [pytest.mark.gpu]
if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRET and os.environ.get("KERNELS_INTERPRETED") != "1":
    pytest.skip("run by test_kernels_interpreter.py", allow_module_level=True)

DEVICE = "cpu" if INTERPRET else "cuda"
PAD = 64  # elements of red zone on either side; a multiple of 16 bytes keeps alignment as it would be without


class RedZones:
    """Hands out memory filled with NaN between margins of NaN, and checks afterwards that the margins are untouched."""

    def __init__(self):
        self.buffers = []

    def empty(self, n, dtype, device):
        buffer = real_full((n + 2 * PAD,), math.nan, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[PAD : PAD + n]

    def strided(self, shape, strides, dtype, device):
        """A tensor with these strides, NaN in it and in the gaps between its elements."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        return self.empty(span, dtype, device).as_strided(shape, strides, PAD)

    def around(self, x, strides):
        """A copy of x with these strides."""
        return self.strided(x.shape, strides, x.dtype, x.device).copy_(x.detach())

    def check(self):
        for buffer in self.buffers:
            assert buffer[:PAD].isnan().all() and buffer[-PAD:].isnan().all(), "a kernel wrote outside its output"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(int(os.environ.get("KERNELS_SEED", "0")))


real_full, real_empty, real_empty_like = torch.full, torch.empty, torch.empty_like


@pytest.fixture
def zones(monkeypatch):
    zones = RedZones()

    def empty(*shape, dtype=None, device=None, **rest):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.float32
        if not dtype.is_floating_point or rest:
            return real_empty(shape, dtype=dtype, device=device, **rest)
        return zones.empty(math.prod(shape), dtype, device or "cpu").view(shape)

    def empty_like(x):
        return zones.strided(x.shape, real_empty_like(x).stride(), x.dtype, x.device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield zones
    zones.check()


def check(ours, torch_same_dtype, exact):
    """Each of our results is at most twice as wrong as PyTorch's in the same dtype; a floor of 2e-6 of the result's
    size allows for fp32 rounding where PyTorch happens to be exact. A result that is zero in exact arithmetic (the
    cosine's gradient when there is one channel: two terms that cancel) is rounding noise on both sides, whose ratio
    means nothing: it need only be small beside those terms, which are of size 1 and more."""
    for i, (x, y, z) in enumerate(zip(ours, torch_same_dtype, exact, strict=True)):
        assert x.shape == z.shape and x.isfinite().all(), f"result {i}"
        size = z.abs().max().item()
        allowed = 2 * (y.double() - z).abs().max().item() + 2e-6 * size if size > 1e-9 else 1e-4
        if INTERPRET and x.dtype == torch.bfloat16:
            allowed += torch.finfo(x.dtype).eps * size  # its conversion to bf16 truncates
        error = (x.double() - z).abs().max().item()
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


# --------------------------------------------------------------------------------------------------------------------
# cross_attention
# --------------------------------------------------------------------------------------------------------------------


def heads(batch, H, N, D, layout="split"):
    """Random (batch, H, N, D). Layouts: "split", as head splitting makes it; "slice", part of a joint projection;
    "plain", contiguous; "odd", rows that start at no aligned address; "reversed", channels not contiguous."""
    if layout == "split":
        return torch.randn(batch, N, H, D).transpose(1, 2)
    if layout == "slice":
        return torch.randn(batch, N, 3, H, D)[:, :, 1].transpose(1, 2)
    if layout == "odd":
        return torch.randn(batch, H, N, D + 1)[..., 1:]
    if layout == "reversed":
        return torch.randn(batch, H, D, N).transpose(2, 3)
    return torch.randn(batch, H, N, D)


def want_programs(monkeypatch, programs):
    """A long side is split until a launch has this many programs, into as little as one block each."""
    module = sys.modules["kernels.cross_attention"]  # the function of this name hides it in the package
    monkeypatch.setattr(module, "cores", lambda device: programs)
    monkeypatch.setattr(module, "WARPS_PER_CORE", 4)  # a program has four, or eight
    monkeypatch.setattr(module, "BLOCKS_PER_SPLIT", 1)


def run_attention(inputs, upstream, dtype, backend, zones=None, strides=None, **options):
    """Output and gradients of q, k, v; with zones, from inputs with the given strides between red zones."""
    inputs, upstream = [x.to(DEVICE, dtype) for x in inputs], upstream.to(DEVICE, dtype)
    if zones is not None:
        inputs = [zones.around(x, s) for x, s in zip(inputs, strides or [x.stride() for x in inputs])]
        upstream = zones.around(upstream, upstream.stride())
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = cross_attention(*inputs, backend=backend, **options)
    return [o.detach(), *torch.autograd.grad(o, inputs, upstream)]


def compare_attention(zones, q, k, v, dtype=torch.float32, **options):
    """Hold the kernels to twice the error of plain PyTorch in the same dtype."""
    strides = [x.stride() for x in (q, k, v)]
    upstream = heads(max(len(q), len(k)), q.shape[1], q.shape[2], q.shape[3]).to(dtype)
    inputs = [x.to(dtype) for x in (q, k, v)]  # rounded once, so that all three start from the same numbers
    exact = run_attention(inputs, upstream, torch.float64, "torch", **options)
    plain = run_attention(inputs, upstream, dtype, "torch", **options)
    check(run_attention(inputs, upstream, dtype, "triton", zones, strides, **options), plain, exact)


@pytest.mark.parametrize(
    "batches, H, N, M, D, dtype, layout",
    [
        # many queries, few keys
        ((2, 2), 2, 91, 10, 32, "float32", "split"),
        ((2, 1), 2, 49, 10, 72, "float32", "slice"),  # shared keys: gradients summed over the batch
        ((2, 1), 1, 196, 64, 8, "float16", "split"),
        ((1, 2), 2, 20, 1, 20, "float32", "odd"),
        # few queries, many keys
        ((1, 2), 2, 10, 91, 32, "float32", "split"),  # shared queries
        ((2, 2), 1, 64, 196, 8, "bfloat16", "slice"),
        ((2, 2), 2, 1, 100, 20, "float32", "odd"),
        ((1, 1), 1, 10, 400, 64, "float32", "plain"),
        # both long
        ((1, 2), 1, 91, 91, 20, "float32", "split"),
        ((2, 1), 1, 196, 196, 32, "float16", "split"),
        ((1, 1), 1, 70, 130, 128, "bfloat16", "reversed"),
        ((1, 1), 2, 10, 10, 8, "float32", "split"),
    ],
)
def test_attention(zones, monkeypatch, batches, H, N, M, D, dtype, layout):
    """Output and all gradients, in each regime, at awkward sizes, shared tokens, layouts and dtypes; long sides split
    among many programs (merging), and walked over by one (the online softmax)."""
    q, k, v = heads(batches[0], H, N, D, layout), heads(batches[1], H, M, D, layout), heads(batches[1], H, M, D, layout)
    for programs in (256, 1) if max(N, M) > 64 else (256,):
        want_programs(monkeypatch, programs)
        compare_attention(zones, q, k, v, getattr(torch, dtype))


@pytest.mark.parametrize("height, width, radius", [(7, 7, 1), (7, 7, 4), (5, 3, 0), (13, 7, 2), (9, 9, 4), (2, 3, 5)])
def test_attention_window(zones, height, width, radius):
    """The neighbour mask, in the few-keys and the many-keys kernels; queries in the middle of small grids lose all
    their keys: their output and gradients are exactly zero, in both kernels."""
    n = height * width
    compare_attention(zones, *(heads(1, 1, n, 8) for _ in range(3)), window=(height, width, radius))
    inputs, upstream = [heads(1, 1, n, 8) for _ in range(3)], torch.randn(1, 1, n, 8)
    o, dq, _, _ = run_attention(inputs, upstream, torch.float32, "triton", window=(height, width, radius))
    o, dq = o.cpu(), dq.cpu()
    cell = np.arange(n)
    near = abs(cell[:, None] // width - cell // width) <= radius
    near &= abs(cell[:, None] % width - cell % width) <= radius
    empty = torch.from_numpy(near.all(axis=1))
    assert (o[0, 0, empty] == 0).all() and (dq[0, 0, empty] == 0).all() and (o[0, 0, ~empty] != 0).any(dim=1).all()


def test_one_key():
    """With one key the weights are all 1: the output is the value, and the gradient of the scores is zero."""
    q, k, v = heads(1, 1, 5, 16), heads(1, 1, 1, 16), heads(1, 1, 1, 16)
    upstream = torch.randn(1, 1, 5, 16)
    o, dq, dk, dv = (x.cpu() for x in run_attention((q, k, v), upstream, torch.float32, "triton"))
    torch.testing.assert_close(o, v.expand(1, 1, 5, 16))
    torch.testing.assert_close(dv, upstream.sum(dim=2, keepdim=True))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


def philox(seed, c0, c1, rounds=10):
    """The four words of Philox 4x32 (Salmon et al., SC 2011) for the counter (c0, c1, 0, 0)."""
    word = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = np.uint64(seed) & word, np.uint64(seed) >> half
    c0, c1 = np.broadcast_arrays(np.uint64(c0), np.uint64(c1))
    c2 = c3 = np.zeros_like(c0)
    for _ in range(rounds):
        product0, product2 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product2 >> half) ^ c1 ^ k0, product2 & word
        c2, c3 = (product0 >> half) ^ c3 ^ k1, product0 & word
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & word, (k1 + np.uint64(0xBB67AE85)) & word
    return np.stack([c0, c1, c2, c3], axis=-1)


@pytest.mark.parametrize("N, M, interleave", [(70, 10, True), (10, 70, False), (70, 91, True), (70, 91, False)])
def test_attention_dropout(zones, monkeypatch, N, M, interleave):
    """Dropout is the published generator applied to the weight's position (a counter for four keys that follow each
    other, a word for each), the same in the forward and in all backward kernels: a second implementation of both gives
    the same output and gradients, however the kernels lay out the words."""
    if INTERPRET:  # a compiled kernel must not find it changed
        monkeypatch.setattr(sys.modules["kernels.cross_attention"], "INTERLEAVE", interleave)
    B, H, D, dropout_p, seed = 2, 2, 16, 0.3, 1234567
    q, k, v, upstream = heads(1, H, N, D), heads(B, H, M, D), heads(B, H, M, D), heads(B, H, N, D)
    fours = -(-M // 4)
    image_head, position = np.arange(B * H)[:, None], np.arange(N * fours)[None, :]
    words = philox(seed, position, image_head).reshape(B, H, N, 4 * fours)[..., :M]
    uniform = (words >> np.uint64(8)).astype(np.float64) / 2**24
    keep = torch.from_numpy(uniform >= dropout_p).to(DEVICE)
    assert abs(keep.double().mean() - 0.7) < 4 * (0.7 * 0.3 / keep.numel()) ** 0.5

    def reference(dtype):
        x = [t.to(DEVICE, dtype).requires_grad_() for t in (q, k, v)]
        weights = (x[0] @ x[1].transpose(2, 3) * D**-0.5).softmax(-1)
        o = (weights * keep / (1 - dropout_p)) @ x[2]
        return [o.detach(), *torch.autograd.grad(o, x, upstream.to(DEVICE, dtype))]

    ours = run_attention((q, k, v), upstream, torch.float32, "triton", zones, dropout_p=dropout_p, seed=seed)
    check(ours, reference(torch.float32), reference(torch.float64))


def test_splits(monkeypatch):
    """However many programs share a long side, the result is the same to rounding; and run after run to the bit."""
    for N, M in ((10, 300), (300, 10)):
        inputs, upstream = (heads(1, 1, N, 16), heads(2, 1, M, 16), heads(2, 1, M, 16)), heads(2, 1, N, 16)
        results = []
        for programs in (256, 256, 1, 6):
            want_programs(monkeypatch, programs)
            results.append(run_attention(inputs, upstream, torch.float32, "triton"))
        assert all(torch.equal(x, y) for x, y in zip(results[0], results[1]))
        for other in results[2:]:
            for x, y in zip(results[0], other):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("N, M", [(10, 300), (300, 10), (70, 90)])
def test_large_scores(N, M):
    """Gradients hold at scores of 1e5, where the logarithm of a sum in fp32 is off by 0.004: largest product and sum
    are saved apart. Products of small integers are exact, and many keys of a query share the largest."""
    q, k = (torch.randint(-2, 3, (1, 1, n, 16)).float() for n in (N, M))
    v, upstream = torch.randn(1, 1, M, 16), torch.randn(1, 1, N, 16)
    assert 8192 * (q @ k.transpose(2, 3)).max() > 1e5
    exact = run_attention((q, k, v), upstream, torch.float64, "torch", scale=8192.0)
    ours = run_attention((q, k, v), upstream, torch.float32, "triton", scale=8192.0)
    for x, z, size in zip(ours, exact, (1, 8192, 8192, 1), strict=True):  # scores' gradients carry the scale
        assert (x.double() - z).abs().max() <= 1e-5 * max(size, z.abs().max())


def test_far_apart():
    """Offsets beyond 2^31 elements (here: batch stride 2^31 + 64 over memory that is never touched in between)."""
    stride = 2**31 + 64
    x = real_empty(stride + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 2, 8), (stride, 16, 8, 1))
    x.copy_(torch.randn(2, 1, 2, 8))
    expected = cross_attention(x.clone(), x.clone(), x.clone(), backend="torch")
    torch.testing.assert_close(cross_attention(x, x, x, backend="triton"), expected, rtol=1e-2, atol=1e-2)


def test_attention_refuses():
    """What the kernels cannot do is said, not computed wrongly; "auto" then takes plain PyTorch."""
    for shape, dtype in (((1, 1, 4, 8), torch.float64), ((1, 1, 4, 4), torch.float32), ((1, 1, 4, 130), torch.float32)):
        x = torch.randn(shape, dtype=dtype, device=DEVICE)
        with pytest.raises(ValueError, match="cross_attention takes"):
            cross_attention(x, x, x, backend="triton")
        assert cross_attention(x, x, x).shape == shape


# --------------------------------------------------------------------------------------------------------------------
# cosine_map, cosine_loss
# --------------------------------------------------------------------------------------------------------------------


def run_cosine(teachers, students, size, reduce, dtype, backend, zones=None):
    """The map, plain and weighted, and both losses with the gradients of the students."""

    def place(x):
        return x.to(DEVICE, dtype) if zones is None else zones.around(x.to(DEVICE, dtype), x.stride())

    teachers, students = [place(t) for t in teachers], [place(s).detach().requires_grad_() for s in students]
    results = []
    for power in (0.0, 0.25):
        results.append(cosine_map(teachers, students, size, reduce, power=power, backend=backend))
    for flat in (True, False):
        loss = cosine_loss(teachers, students, flat, backend=backend)
        results += [loss.detach(), *torch.autograd.grad(loss, students, torch.full_like(loss, 0.7))]
    return results


def layout_of(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "crop":  # rows with gaps between them
        return torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2]
    return x


@pytest.mark.parametrize(
    "shapes, size, reduce, dtype, layouts",
    [
        ([(19, 13, 7), (1, 4, 5)], (20, 17), "sum", "float32", ("nchw", "nchw")),
        ([(19, 13, 7), (5, 3, 1), (8, 1, 1)], (20, 1), "mean", "float32", ("nchw", "channels_last")),
        ([(19, 5, 4), (8, 3, 3)], (6, 7), "sum", "float32", ("channels_last", "crop")),
        ([(272, 7, 7)], (9, 9), "sum", "bfloat16", ("nchw", "nchw")),
        ([(33, 4, 4), (64, 8, 8)], (8, 8), "mean", "float16", ("channels_last", "channels_last")),
        ([(16, 8, 8), (8, 4, 4)], (3, 2), "sum", "float32", ("crop", "crop")),  # a map smaller than the features
        ([(4, 2, 2), (3, 1, 1)], (1, 1), "sum", "float32", ("nchw", "nchw")),
    ],
)
def test_cosine(zones, monkeypatch, shapes, size, reduce, dtype, layouts):
    """Map, losses and gradients: both reductions, memory layouts of teacher and student, awkward sizes; on a card that
    is too large for these maps, where programs take all channels at once, and on one with a single core."""
    dtype = getattr(torch, dtype)
    teachers = [layout_of(torch.randn(2, *shape).to(dtype), layouts[0]) for shape in shapes]
    students = [t + 0.7 * torch.randn(t.shape) for t in teachers]
    # One channel: a norm near 0 has no direction.
    students = [s.sign() * (s.abs() + 0.1) if s.shape[1] == 1 else s for s in students]
    students = [layout_of(s.to(dtype).contiguous(), layouts[1]) for s in students]
    exact = run_cosine(teachers, students, size, reduce, torch.float64, "torch")
    plain = run_cosine(teachers, students, size, reduce, dtype, "torch")
    for cores in (108, 1):
        monkeypatch.setattr(sys.modules["kernels.cosine_map"], "cores", lambda device, cores=cores: cores)
        check(run_cosine(teachers, students, size, reduce, dtype, "triton", zones), plain, exact)


def test_cosine_of_zeros():
    """All-zero features (dead ReLUs) have distance 1, or 0 if weighted, and no gradient in the kernels as well."""
    teacher = torch.randn(1, 8, 2, 2, device=DEVICE)
    dead = torch.zeros_like(teacher).requires_grad_()
    maps = cosine_map([teacher], [dead], 4, backend="triton")
    assert torch.equal(maps, torch.ones_like(maps))
    weighted = cosine_map([dead.detach()], [teacher], 4, power=0.25, backend="triton")
    assert not weighted.any(), "where the teacher is zero a weighted distance is too"
    for flat in (True, False):
        loss = cosine_loss([teacher], [dead], flat, backend="triton")
        assert loss == 1 and (torch.autograd.grad(loss, dead)[0] == 0).all()


def test_cosine_of_mixed_dtypes(zones):
    """Under autocast students are bf16 and teachers fp32: no copy is needed, each is read as it is."""
    teachers = [zones.around(torch.randn(2, 19, 5, 4).to(DEVICE), (380, 20, 4, 1))]
    students = [torch.randn(2, 19, 5, 4).to(DEVICE, torch.bfloat16).requires_grad_()]
    for flat in (True, False):
        ours, plain = (cosine_loss(teachers, students, flat, backend=backend) for backend in ("triton", "torch"))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, plain)
        grads = [torch.autograd.grad(loss, students)[0] for loss in (ours, plain)]
        assert grads[0].dtype == torch.bfloat16
        torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-5)  # the interpreter truncates to bf16


# --------------------------------------------------------------------------------------------------------------------
# few_token_attention
# --------------------------------------------------------------------------------------------------------------------


def run_tokens_read(inputs, upstream, dtype, backend, zones=None):
    """What the folded tokens read, and the gradients of tokens and map."""
    tokens, x = (place(t, dtype, zones) for t in inputs)
    out = tokens_read(tokens, x, 1e-5, backend)
    return [out.detach(), *torch.autograd.grad(out, (tokens, x), upstream.to(DEVICE, dtype))]


def run_map_reads(inputs, upstream, dtype, backend, zones=None):
    """What a map reads from 3 heads' tokens, and the gradients of map, keys, bias, values and output bias."""
    inputs = [place(t, dtype, zones) for t in inputs]
    out = map_reads(*inputs, 3, 1e-5, backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, place(upstream, dtype, zones).detach())]


def place(x, dtype, zones):
    x = x.to(DEVICE, dtype)
    return (x if zones is None else zones.around(x, x.stride())).detach().requires_grad_()


@pytest.mark.parametrize(
    "tokens, positions, width, dtype",
    [
        (3, 50, 24, "float32"),
        (1, 7, 40, "float32"),  # one token a head
        (10, 90, 33, "float32"),  # rows that start at odd addresses
        (17, 70, 64, "float32"),  # two blocks of tokens a head
        (10, 49, 24, "float16"),
        (3, 90, 40, "bfloat16"),
    ],
)
def test_few_tokens(zones, monkeypatch, tokens, positions, width, dtype):
    """Both directions with LayerNorm, output and gradients, for maps with a mean and a deviation of their own, which
    are stored with gaps between rows; few and many programs a map."""
    torch.manual_seed(0)
    few = 0.3 * torch.randn(2, 3 * tokens, width)
    many = (2 * torch.randn(2, positions, width + 8) + 3)[..., :width]
    values, bias, out_bias = torch.randn(2, 3 * tokens, width), torch.randn(2, 3 * tokens), torch.randn(width)
    dtype = getattr(torch, dtype)
    for programs in (64, 1):
        want_programs(monkeypatch, programs)
        for run, inputs, rows in (
            (run_tokens_read, (few, many), 3 * tokens),
            (run_map_reads, (many, few, bias, values, out_bias), positions),
        ):
            inputs = [t.to(dtype).float() for t in inputs]
            upstream = torch.randn(2, rows, width)
            exact = run(inputs, upstream.to(dtype), torch.float64, "torch")
            check(run(inputs, upstream, dtype, "triton", zones), run(inputs, upstream, dtype, "torch"), exact)


def test_few_tokens_whole():
    """The function with its norms and projections, in both directions, all gradients; and under autocast, where the
    map is fp32 and what is multiplied bf16."""
    parts = [nn.LayerNorm(24), nn.LayerNorm(24), *(nn.Linear(24, 24) for _ in range(4))]
    parts = [part.to(DEVICE) for part in parts]
    few, many = torch.randn(2, 3, 24, device=DEVICE), torch.randn(2, 60, 24, device=DEVICE) + 2
    for x, y in ((few, many), (many, few)):
        leaves = [x.requires_grad_(), y.requires_grad_(), *(p for part in parts for p in part.parameters())]
        for autocast in (False, True):
            results = []
            for backend in ("triton", "torch"):
                with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
                    out = few_token_attention(x, y, *parts, 2, backend=backend)
                assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
            tolerance = 0.05 if autocast else 1e-5
            for ours, plain in zip(*results, strict=True):
                size = plain.abs().max().item() + 1  # a gradient that is zero is noise
                assert (ours - plain).abs().max() <= tolerance * size


# --------------------------------------------------------------------------------------------------------------------
# Whole blocks of the methods, written out
# --------------------------------------------------------------------------------------------------------------------


def attend(q, k, v, n_heads, backend, **options):
    """Split the heads of (B, N, C), attend, merge them again."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    return cross_attention(q, k, v, backend=backend, **options).transpose(1, 2).flatten(2)  # (B, N, C)


class OmniBlock(nn.Module):
    """Omni-AD, section 3: learnable queries read the image, it reads learnable keys and values; a local branch."""

    def __init__(self, C=32, tokens=16, n_heads=4):
        super().__init__()
        self.n_heads, self.side = n_heads, int(tokens**0.5)
        self.q_tokens, self.kv_tokens = (nn.Parameter(torch.randn(1, tokens, C)) for _ in range(2))
        self.q1, self.kv1, self.o1, self.q2, self.kv2, self.o2, self.mix, self.out = (
            nn.Linear(C, width) for width in (C, 2 * C, C, C, 2 * C, C, C, C)
        )
        self.local = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(C, C, n, padding=n // 2, groups=C), nn.InstanceNorm2d(C), nn.SiLU(), nn.Conv2d(C, C, 1)
            )
            for n in (3, 5)
        )
        self.join = nn.Conv2d(2 * C, C, 1)

    def forward(self, x, backend):
        B, C, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        read = attend(self.q1(self.q_tokens), *self.kv1(tokens).chunk(2, -1), self.n_heads, backend)
        read = self.o1(read)  # (B, 16, C)
        grid = read.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, C, 4, 4)
        G = tokens + nn.functional.interpolate(grid, size=(h, w)).flatten(2).transpose(1, 2)
        G = G + self.o2(attend(self.q2(G), *self.kv2(self.kv_tokens).chunk(2, -1), self.n_heads, backend))
        local = self.join(torch.cat([branch(x) for branch in self.local], 1)).flatten(2).transpose(1, 2)
        return tokens + self.out(nn.functional.silu(self.mix(G + local)))


class PromptBlock(nn.Module):
    """ROADS, Eqs. 1 and 3: the class's prompts read the image, the image reads the prompts."""

    def __init__(self, C=64, length=10):
        super().__init__()
        self.z = nn.Parameter(torch.randn(3, length, C))  # prompts of three classes
        self.steps = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    norm_q=nn.LayerNorm(C), norm_kv=nn.LayerNorm(C),
                    q=nn.Linear(C, C), k=nn.Linear(C, C), v=nn.Linear(C, C), o=nn.Linear(C, C),
                    ffn=nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)),
                )
            )
            for _ in range(2)
        )

    def step(self, net, a, b, backend):
        n, m = net["norm_q"](a), net["norm_kv"](b)
        read = attend(net["q"](n), net["k"](m), net["v"](m), a.shape[-1] // 32, backend)
        return net["ffn"](net["o"](read) + a) + a

    def forward(self, x, backend):
        tokens = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        z = self.step(self.steps[0], self.z[torch.arange(len(x)) % 3], tokens, backend)  # (B, 10, C)
        return self.step(self.steps[1], tokens, z, backend)


class RestorationBlock(nn.Module):
    """OneNIP's two-way decoder block: the prompt reads the features, then the features read the prompt, both without
    their neighbours."""

    def __init__(self, C=32, n_heads=2, grid=(7, 7)):
        super().__init__()
        self.n_heads, self.window = n_heads, (*grid, 1)
        self.pos = nn.Parameter(torch.rand(1, grid[0] * grid[1], C))
        self.read_q, self.read_k, self.read_v, self.read_o, self.back_q, self.back_k, self.back_v, self.back_o = (
            nn.Linear(C, C) for _ in range(8)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x, backend):
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        p, pos = x.roll(1, 0), self.pos
        options = dict(n_heads=self.n_heads, backend=backend, window=self.window)
        read = attend(self.read_q(p + pos), self.read_k(x + pos), self.read_v(x), **options)
        p = self.norms[0](p + self.read_o(read))
        p = self.norms[1](p + self.mlp(p))
        read = attend(self.back_q(x + pos), self.back_k(p + pos), self.back_v(p), **options)
        return torch.cat([p, self.norms[2](x + self.back_o(read))])


BLOCKS = [(OmniBlock, (2, 32, 8, 8)), (PromptBlock, (2, 64, 7, 7)), (RestorationBlock, (2, 32, 7, 7))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trials_pass(dtype):
    """What "auto" tries before it trusts a kernel, at the sizes of ROADS's presets: a right kernel passes."""
    for operation in ("cosine", "cross_attention"):
        _trials[operation](torch.device(DEVICE), dtype)
    for width, per_head in ((24, 0), (24, 10), (40, 10)) if dtype == torch.float32 else ((112, 5), (512, 0), (512, 10)):
        _trials["few_token_attention"](torch.device(DEVICE), dtype, width, per_head)


@pytest.mark.parametrize("block, shape", BLOCKS)
def test_whole_block(block, shape):
    """A method's whole block gives the same output and the same gradient for every parameter on both paths."""
    torch.manual_seed(0)
    net, x = block().to(DEVICE), torch.randn(shape, device=DEVICE)

    def run(dtype, backend):
        net.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = net(leaf, backend)
        weights = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=dtype).view(y.shape)
        return [y.detach(), *torch.autograd.grad((y * weights).sum(), [leaf, *net.parameters()])]

    exact = run(torch.float64, "torch")
    for ours, plain, z in zip(run(torch.float32, "triton"), run(torch.float32, "torch"), exact, strict=True):
        # gradients that are zero in exact arithmetic (a bias before a norm) are rounding noise on both paths
        assert (ours - z).abs().max() <= 2 * (plain - z).abs().max() + 1e-4 * z.abs().mean() + 1e-5
