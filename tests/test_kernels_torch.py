"""The plain PyTorch path of kernels/: what runs on CPUs, and the specification that the Triton kernels are held to."""

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import bench, cosine_loss, cosine_map, cross_attention
from kernels.backend import HAS_TRITON
from kernels.cosine_map import cosine_loss_formula, cosine_map_formula
from kernels.cross_attention import attention_formula, neighbours


def heads(batch, H, N, D, dtype=torch.float64):
    """A random (batch, H, N, D) tensor as head splitting makes it: a view of (batch, N, H*D)."""
    return torch.randn(batch, N, H * D).to(dtype).unflatten(-1, (H, D)).transpose(1, 2).requires_grad_()


def literal_attention(q, k, v, scale, window=None):
    """The formula, one query at a time."""
    o = torch.zeros(max(len(q), len(k)), q.shape[1], q.shape[2], q.shape[3], dtype=q.dtype)
    for b in range(o.shape[0]):
        for h in range(o.shape[1]):
            for n in range(o.shape[2]):
                scores = scale * k[b % len(k), h] @ q[b % len(q), h, n]  # (M,)
                if window is not None:
                    height, width, radius = window
                    for m in range(height * width):
                        if abs(n // width - m // width) <= radius and abs(n % width - m % width) <= radius:
                            scores[m] = -math.inf
                if (scores > -math.inf).any():
                    o[b, h, n] = scores.softmax(0) @ v[b % len(k), h]
    return o


@pytest.mark.parametrize("batches", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("window", [None, (3, 4, 1), (4, 3, 0), (3, 4, 2), (3, 4, 9)])
def test_attention_is_the_formula(batches, window):
    """Output equals the formula written out, with tokens shared by the batch and with every kind of window: some keys
    forbidden, only oneself, all keys of the middle queries (their output is zero, not NaN), all keys of all."""
    q, k, v = heads(batches[0], 2, 12, 8), heads(batches[1], 2, 12, 8), heads(batches[1], 2, 12, 8)
    expected = literal_attention(q, k, v, 8**-0.5, window).detach()
    forbidden = None if window is None else neighbours(*window)
    torch.testing.assert_close(attention_formula(q, k, v, 8**-0.5, forbidden), expected)
    o = cross_attention(q, k, v, window=window)
    torch.testing.assert_close(o, expected)
    grads = torch.autograd.grad(o.square().sum(), (q, k, v))
    assert all(g.isfinite().all() and g.shape == x.shape for g, x in zip(grads, (q, k, v)))


@pytest.mark.parametrize("window, dropout_p", [(None, 0.0), ((2, 3, 1), 0.0), (None, 0.3)])
def test_attention_gradients(window, dropout_p):
    """Gradients agree with finite differences; with dropout too, where the seed must fix the mask."""
    q, k, v = heads(1, 2, 6, 3), heads(2, 2, 6, 3), heads(2, 2, 6, 3)
    assert torch.autograd.gradcheck(
        lambda *x: cross_attention(*x, scale=0.7, window=window, dropout_p=dropout_p, seed=3), (q, k, v)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_precision(dtype):
    """In every dtype, on both code paths, the error against float64 is of the order of one rounding."""
    q, k, v = (heads(2, 3, n, 16, dtype) for n in (10, 49, 49))
    exact = cross_attention(*(x.double() for x in (q, k, v)))
    for dropout_p in (0.0, 1e-9):  # 1e-9 rounds to no dropout at all, but takes the other branch
        o = cross_attention(q, k, v, dropout_p=dropout_p)
        assert o.dtype == dtype
        assert (o - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_dropout_is_reproducible_and_unbiased():
    """torch.manual_seed governs the mask; one call costs one draw of the global generator (so that runs resume to
    the same bits); the dropped fraction is dropout_p; and the mean over many masks is the output without dropout."""
    q, k, v = (heads(1, 4, 100, 8, torch.float32).detach() for _ in range(3))
    nearly_all = cross_attention(q, k, v, dropout_p=1 - 1e-6)  # rounded to 65535 / 65536
    assert (nearly_all == 0).float().mean() > 0.9
    torch.manual_seed(5)
    first, second = (cross_attention(q, k, v, dropout_p=0.25) for _ in range(2))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(first, cross_attention(q, k, v, dropout_p=0.25)) and not torch.equal(first, second)
    torch.randint(2**31 - 1, ())
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(5)
    cross_attention(q, k, v)
    torch.randint(2**31 - 1, ()), torch.randint(2**31 - 1, ())
    assert torch.equal(after, torch.rand(1)), "without dropout nothing may be drawn"

    eye = torch.eye(100).expand(1, 4, -1, -1)  # values that make the output the weights themselves
    q100 = torch.zeros(1, 4, 100, 100)  # equal scores: every weight is 1/100
    weights = torch.stack([cross_attention(q100, q100, eye, dropout_p=0.25, seed=i) for i in range(30)])
    assert abs((weights == 0).float().mean() - 0.25) < 4 * (0.25 * 0.75 / weights.numel()) ** 0.5
    assert abs(weights.mean() * 100 - 1) < 0.005
    assert weights.unique().numel() == 2  # 0 and 1/75


def test_attention_under_autocast():
    """Mixed inputs, as autocast produces them (fp32 tokens, bf16 features), come out in autocast's dtype."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(2, 2, 7, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_attention(q, k, k).dtype == torch.bfloat16
        assert cross_attention(q.double(), k.double(), k.double()).dtype == torch.float64  # as torch.matmul does


def test_large_scores_in_half_precision():
    """Scores above 65,504, the largest fp16 number, decide for one key as they should, with dropout or without."""
    q = torch.full((1, 1, 2, 16), 200.0, dtype=torch.float16)
    k = torch.cat([q, -q], dim=2)
    v = torch.randn(1, 1, 4, 16).half()
    for dropout_p in (0.0, 1e-9):  # 1e-9 rounds to no dropout at all, but takes the other branch
        o = cross_attention(q, k, v, scale=1.0, dropout_p=dropout_p)
        torch.testing.assert_close(o, v[:, :, :2].mean(dim=2, keepdim=True).expand(o.shape))


def test_window_after_inference_mode():
    """A window first used under inference_mode (an evaluation) serves a training afterwards: the cached mask is an
    ordinary tensor."""
    x = torch.randn(1, 1, 35, 8, requires_grad=True)
    with torch.inference_mode():
        cross_attention(x, x, x, window=(5, 7, 1))
    for dropout_p in (0.0, 0.1):
        cross_attention(x, x, x, window=(5, 7, 1), dropout_p=dropout_p).sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(2, 4, 8)), r"expected q \(B\|1, H, N, D\)"),
        (dict(k=torch.zeros(3, 2, 6, 8), v=torch.zeros(3, 2, 6, 8)), "batch 2 of q and 3 of k, v"),
        (dict(v=torch.zeros(2, 2, 5, 8)), "expected q"),
        (dict(v=torch.zeros(2, 2, 6, 8).double()), "one floating dtype"),
        (dict(window=(2, 2, 1)), "needs radius >= 0 and 4 queries"),
        (dict(q=torch.zeros(0, 2, 6, 8)), "batch 0 of q and 2 of k, v"),
        (dict(q=torch.zeros(2, 2, 0, 8)), "nothing to attend to"),
        (dict(k=torch.zeros(2, 2, 0, 8), v=torch.zeros(2, 2, 0, 8)), "nothing to attend to"),
        (dict(scale=-1.0), "scale -1.0: a number above 0"),
        (dict(dropout_p=1.0), "dropout_p 1.0"),
        (dict(backend="cuda"), "choose one of auto, triton, torch"),
    ],
)
def test_attention_refuses(change, message):
    """Arguments that do not fit end with one line that says what is wrong."""
    arguments = dict(q=torch.zeros(2, 2, 6, 8), k=torch.zeros(2, 2, 6, 8), v=torch.zeros(2, 2, 6, 8)) | change
    with pytest.raises(ValueError, match=message):
        cross_attention(**arguments)


# --------------------------------------------------------------------------------------------------------------------


def features(batch, shapes, dtype=torch.float64):
    """Random teachers and students that resemble them."""
    teachers = [torch.randn(batch, *shape).to(dtype) for shape in shapes]
    return teachers, [(t + 0.5 * torch.randn(t.shape)).to(dtype).requires_grad_() for t in teachers]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "view"])
def test_map_is_the_published_one(reduce, layout):
    """Equals cosine similarity, bilinear interpolation and reduction, whatever the memory layout; without gradient."""
    teachers, students = features(3, [(19, 13, 7), (1, 4, 5), (8, 1, 1)])
    if layout == "channels_last":
        teachers = [t.contiguous(memory_format=torch.channels_last) for t in teachers]
    if layout == "view":
        students = [F.pad(s, (1, 2, 3, 1))[:, :, 3:-1, 1:-2] for s in students]
    for size in ((20, 17), 20):
        maps = cosine_map(teachers, students, size, reduce)
        expected = cosine_map_formula(teachers, students, size, reduce)
        torch.testing.assert_close(maps, expected.detach())
        assert not maps.requires_grad


def test_scales_of_different_dtypes():
    """The map has the widest of the scales' dtypes, in whatever order they come."""
    teachers, students = features(2, [(8, 4, 5), (8, 2, 2)])
    for wide in (0, 1):
        mixed = [[f if i == wide else f.float() for i, f in enumerate(part)] for part in (teachers, students)]
        maps = cosine_map(*mixed, 9)
        assert maps.dtype == torch.float64
        torch.testing.assert_close(maps, cosine_map(teachers, students, 9), rtol=0, atol=1e-6)


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_weighted_map(power):
    """A distance counts by the teacher's root mean square there, to this power: c times as long features, c^power
    times the map, whatever the student's length; where the teacher is zero so is the map."""
    teachers, students = features(3, [(19, 13, 7), (1, 4, 5), (8, 1, 1)])
    maps = cosine_map(teachers, students, (20, 17), power=power)
    torch.testing.assert_close(maps, cosine_map_formula(teachers, students, (20, 17), power=power).detach())
    longer = cosine_map([3 * t for t in teachers], [5 * s for s in students], (20, 17), power=power)
    torch.testing.assert_close(longer, 3**power * maps)
    sign = torch.ones(1, 4, 2, 2)  # of root mean square 1
    assert torch.equal(cosine_map([sign], [-sign], 2, power=power), torch.full((1, 2, 2), 2.0))
    assert torch.equal(cosine_map([0 * sign], [sign], 2, power=power), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("flat", [True, False])
def test_loss_is_the_published_one(flat):
    """flat=True is the authors' code (one cosine per image), flat=False the paper's formula (one per location)."""
    teachers, students = features(3, [(19, 13, 7), (1, 4, 5)])
    expected = cosine_loss_formula(teachers, students, flat)
    torch.testing.assert_close(cosine_loss(teachers, students, flat), expected)


def test_loss_gradients():
    """Gradients in the students agree with finite differences; teachers are constants."""
    teachers, students = features(2, [(3, 4, 3), (2, 1, 2)])
    for flat in (True, False):
        def loss(*student_maps, flat=flat):
            return cosine_loss(teachers, student_maps, flat)

        assert torch.autograd.gradcheck(loss, students)
    as_teachers = [t.clone().requires_grad_() for t in teachers]
    cosine_loss(as_teachers, students).backward()
    assert all(t.grad is None for t in as_teachers)


@given(scale=st.floats(1e-3, 1e3), angle=st.floats(0, math.pi), channels=st.integers(2, 40))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_distance_depends_on_the_angle_only(scale, angle, channels):
    """1 - cos(angle), whatever the lengths of the vectors and the number of channels; within [0, 2]."""
    random = torch.randn(channels, 2, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(random).Q  # two orthogonal unit vectors
    t = basis[:, 0].view(1, -1, 1, 1)
    s = scale * (math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1]).view(1, -1, 1, 1)
    d = cosine_map([t], [s], 1).item()
    assert abs(d - (1 - math.cos(angle))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_features(dtype):
    """An all-zero feature vector (a dead ReLU) has distance 1 and no direction: its gradient is exactly zero. (That of
    the published code is the teacher's direction divided by 1e-8, which is infinite in fp16.)"""
    teachers, students = features(1, [(4, 2, 2)], dtype)
    half_dead = students[0].detach().clone()
    half_dead[:, :, 0] = 0
    half_dead.requires_grad_()
    dead = torch.zeros_like(half_dead).requires_grad_()
    assert torch.equal(cosine_map(teachers, [dead], 2), torch.ones(1, 2, 2))
    assert cosine_loss([dead], teachers).isfinite()
    for flat in (True, False):
        assert torch.equal(cosine_loss(teachers, [dead], flat=flat), torch.ones(()))
        assert (torch.autograd.grad(cosine_loss(teachers, [dead], flat=flat), dead)[0] == 0).all()
    grad = torch.autograd.grad(cosine_loss(teachers, [half_dead], flat=False), half_dead)[0]
    assert (grad[:, :, 0] == 0).all() and (grad[:, :, 1] != 0).any() and grad.isfinite().all()


def test_half_precision_features():
    """bf16 features are summed in fp32: the map is as exact as the rounded features allow."""
    teachers, students = features(2, [(272, 6, 6)], torch.bfloat16)
    exact = cosine_map([t.double() for t in teachers], [s.double() for s in students], 12)
    maps = cosine_map(teachers, students, 12)
    assert maps.dtype == torch.float32 and (maps - exact).abs().max() < 1e-6
    loss = cosine_loss(teachers, students)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, students)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(students=[]), "1 teacher and 0 student maps"),
        (dict(students=[torch.zeros(2, 3, 4, 5)]), "scale 0: expected two"),
        (dict(students=[torch.zeros(2, 3, 4, 4, dtype=torch.long)]), "floating-point maps"),
        (dict(reduce="max"), "choose one of sum, mean"),
        (dict(power=-1.0), "power -1.0: must be at least 0"),
        (dict(teachers=[torch.zeros(0, 3, 4, 4)], students=[torch.zeros(0, 3, 4, 4)]), "scale 0: empty maps"),
        (dict(teachers=[torch.zeros(2, 3, 0, 4)], students=[torch.zeros(2, 3, 0, 4)]), "scale 0: empty maps"),
        (dict(size=0), "size 0: one positive int"),
        (dict(size=(8, 8, 8)), r"size \(8, 8, 8\): one positive int"),
        (dict(size=(8, 0.5)), r"size \(8, 0.5\): one positive int"),
        (dict(size=8.5), "size 8.5: one positive int"),
        (dict(size=None), "size None: one positive int"),
    ],
)
def test_map_refuses(change, message):
    """Arguments that do not fit end with one line that says what is wrong."""
    arguments = dict(teachers=[torch.zeros(2, 3, 4, 4)], students=[torch.zeros(2, 3, 4, 4)], size=8) | change
    with pytest.raises(ValueError, match=message):
        cosine_map(**arguments)


@torch.no_grad()
def test_map_is_fast_on_a_cpu(one_thread):
    """A guard against losing the speed: at the feature sizes of reverse distillation, at least twice as fast as the
    published code (3 to 4 times on a quiet machine, `python -m kernels.bench --cpu`; 2.7 measured beside programs that
    take memory's bandwidth, of which ours, which computes less, needs as much).

    Processor time on one thread, best of many in turns, so that other programs on the machine do not decide it.
    """
    shapes = [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]
    arguments = *features(2, shapes, torch.float32), 256, "sum"
    best = bench.best_of({
        "published": partial(cosine_map_formula, *arguments),
        "ours": partial(cosine_map, *arguments),
    }, rounds=20, clock=time.process_time)
    assert best["published"] > 2 * best["ours"], best


# --------------------------------------------------------------------------------------------------------------------


def test_backend_choice():
    """"triton" on CPU tensors is refused with a clear line, by option and by set_backend; "auto" and "torch" run."""
    x = torch.randn(1, 1, 4, 8)
    expected = cross_attention(x, x, x, backend="torch")
    assert torch.equal(cross_attention(x, x, x), expected)
    message = "needs CUDA tensors" if HAS_TRITON else "needs the triton package"
    with pytest.raises(RuntimeError, match=message):
        cross_attention(x, x, x, backend="triton")
    with pytest.raises(ValueError, match="choose one of"):
        kernels.set_backend("fast")
    try:
        kernels.set_backend("triton")
        with pytest.raises(RuntimeError, match=message):
            cosine_map([x], [x], 4)
        kernels.set_backend("torch")
        assert torch.equal(cross_attention(x, x, x), expected)
    finally:
        kernels.set_backend("auto")


def test_without_triton():
    """Where Triton is not installed (macOS, Windows) everything imports and runs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "x = torch.randn(1, 2, 4, 8, requires_grad=True)\n"
        "kernels.cross_attention(x, x, x).sum().backward()\n"
        "kernels.cosine_map([x], [x], 4)\n"
        "kernels.cosine_loss([x], [x]).backward()\n"
        "try: kernels.cosine_loss([x], [x], backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs the triton package" in done.stdout


# --------------------------------------------------------------------------------------------------------------------


COMPILED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, kernels
backend = sys.argv[1]
torch.manual_seed(0)
q, k, v = (torch.randn(2, 2, 12, 16, requires_grad=True) for _ in range(3))
teacher, student = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3, requires_grad=True)
parts = [torch.nn.LayerNorm(16), torch.nn.LayerNorm(16), *(torch.nn.Linear(16, 16) for _ in range(4))]
few, many = torch.randn(2, 2, 16, requires_grad=True), torch.randn(2, 50, 16, requires_grad=True)
options = dict(backend=backend)
calls = [
    (lambda q, k, v: kernels.cross_attention(q, k, v, window=(3, 4, 1), **options), (q, k, v)),
    (lambda q, k: kernels.cross_attention(q, k, k, dropout_p=0.2, seed=4, **options), (q, k)),
    (lambda x, y: kernels.few_token_attention(x, y, *parts, 2, **options), (few, many)),
    (lambda x, y: kernels.few_token_attention(y, x, *parts, 2, **options), (few, many)),
    (lambda s: kernels.cosine_loss([teacher], [s], flat=False, **options), (student,)),
    (lambda s: kernels.cosine_map([teacher], [s], 8, **options), (student,)),
]
for function, arguments in calls:
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = run(*arguments)
        results.append([out.detach()])
        if out.requires_grad:
            results[-1] += torch.autograd.grad(out.square().sum(), arguments)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
torch.compile(lambda q: kernels.cross_attention(q, q, q, dropout_p=0.2), fullgraph=True, backend="aot_eager")(q)
if backend == "triton":  # as on a GPU: "auto" runs its trial while torch.compile traces
    kernels.backend.on_gpu = lambda tensor: True
    compiled = torch.compile(lambda q: kernels.cross_attention(q, q, q), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), kernels.cross_attention(q, q, q, backend="triton"))
    assert kernels.backend._works.cache_info().currsize == 1

    def traced(name, *arguments):  # what torch.compile believes of the results is what they are, strides too
        operation = getattr(torch.ops.anomaly_kernels, name)
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))
        return operation(*arguments)

    q, k = (torch.randn(2, n, 2, 16).transpose(1, 2) for n in (12, 20))
    options = torch.tensor(4), 0.25, [], 0.2
    o, rows = traced("attention_triton", q, k[:1], k[:1], *options)
    traced("attention_grad_triton", o, q, k[:1], k[:1], o, rows, *options)
    x, folded, bias = torch.randn(2, 16, 50).transpose(1, 2), torch.randn(2, 6, 16), torch.randn(2, 6)
    out, rows = traced("tokens_read_triton", folded, x.contiguous(), 1e-5)
    traced("tokens_read_grad_triton", out, folded, x.contiguous(), out, rows, 1e-5)
    out = traced("map_reads_triton", x.contiguous(), folded, bias, folded, torch.randn(16), 2, 1e-5)
    traced("map_reads_grad_triton", x, x.contiguous(), folded, bias, folded, 2, 1e-5)
    maps = [torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last), torch.randn(2, 7, 2, 2)]
    traced("map_triton", maps, maps, 8, 6, True, 0.25)
    loss, factors = traced("loss_triton", maps, maps, False)
    traced("loss_grad_triton", maps, maps, factors, loss)
    traced("_dropout_keep", q, 0.5, torch.tensor(1))
print("equal")
"""


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_in_one_graph(backend):
    """torch.compile(fullgraph=True) traces every operation, forward and backward, to the same
    results: the PyTorch path, and the kernels (in the interpreter, so the compiled graph really
    runs them, and each of them as a fake tensor sees it)."""
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", COMPILED, backend], cwd=root, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
