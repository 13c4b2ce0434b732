"""Benchmark of the two kernels at the sizes of the four methods.

    python -m kernels.bench            with a GPU: times, memory and GB/s, written to kernels/results/<gpu>.md
                                       without: predicted bytes and what the compiler makes of the kernels; no times
    python -m kernels.bench --cpu      times of the plain PyTorch path on this CPU against the published code

Every candidate is checked against plain PyTorch before it is timed. Attention with heads this narrow is a matter of
launches and memory traffic: do not expect a large factor over `scaled_dot_product_attention` where that applies.
"""

import argparse
import functools
import math
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import aot
from .cosine_map import cosine_loss, cosine_map, moments_grad_triton, moments_triton, sample_triton
from .cross_attention import _window_bias, backward_triton, cross_attention, forward_triton

# name: (batch of q, batch of k and v, heads, queries N, keys M, head width D, window, dropout_p)
ATTENTION = {
    "OneNIP 14x14, neighbour mask": (24, 24, 8, 196, 196, 32, (14, 14, 3), 0.1),
    "OneNIP 14x14, last layer": (8, 8, 8, 196, 196, 32, None, 0.1),
    "OneNIP 14x14, inference": (8, 8, 8, 196, 196, 32, (14, 14, 3), 0.0),
    "OneNIP 20x20, neighbour mask": (24, 24, 8, 400, 400, 32, (20, 20, 5), 0.1),
    "Omni-AD 8x8, tokens read": (1, 16, 8, 64, 64, 64, None, 0.0),
    "Omni-AD 8x8, image reads": (16, 1, 8, 64, 64, 64, None, 0.0),
    "Omni-AD 16x16, tokens read": (1, 16, 8, 64, 256, 32, None, 0.0),
    "Omni-AD 16x16, image reads": (16, 1, 8, 256, 64, 32, None, 0.0),
    "Omni-AD 32x32, tokens read": (1, 16, 8, 64, 1024, 16, None, 0.0),
    "Omni-AD 32x32, image reads": (16, 1, 8, 1024, 64, 16, None, 0.0),
    "Omni-AD 64x64, tokens read": (1, 16, 8, 64, 4096, 8, None, 0.0),
    "Omni-AD 64x64, image reads": (16, 1, 8, 4096, 64, 8, None, 0.0),
    "ROADS 16x16, prompts read": (16, 16, 32, 10, 256, 32, None, 0.0),
    "ROADS 16x16, image reads": (16, 16, 32, 256, 10, 32, None, 0.0),
    "ROADS 32x32, prompts read": (16, 16, 16, 10, 1024, 32, None, 0.0),
    "ROADS 32x32, image reads": (16, 16, 16, 1024, 10, 32, None, 0.0),
    "ROADS 64x64, prompts read": (16, 16, 8, 10, 4096, 32, None, 0.0),
    "ROADS 64x64, image reads": (16, 16, 8, 4096, 10, 32, None, 0.0),
}
# name: (batch, [(C, h, w) per scale], map size)
COSINE = {
    "ROADS, CADA (WideResNet-50)": (16, [(256, 64, 64), (512, 32, 32), (1024, 16, 16)], (256, 256)),
    "Omni-AD (ResNet-34)": (16, [(64, 64, 64), (128, 32, 32), (256, 16, 16)], (256, 256)),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------------
# Predictions: the bytes that must move, whoever computes, and the arithmetic
# --------------------------------------------------------------------------------------------------------------------


def attention_traffic(shape, dtype):
    """(bytes forward, bytes forward + backward, floating-point operations forward) of one call."""
    q_batch, kv_batch, H, N, M, D, _, _ = shape
    B, e = max(q_batch, kv_batch), dtype.itemsize
    q, kv, o, lse = q_batch * H * N * D * e, 2 * kv_batch * H * M * D * e, B * H * N * D * e, 4 * B * H * N
    forward = q + kv + o + lse
    backward = 2 * (q + kv) + 2 * o + lse  # read q, k, v, o, its gradient and lse; write three gradients
    return forward, forward + backward, 4 * B * H * N * M * D


def cosine_traffic(shape, dtype):
    """(bytes of the map, bytes of the loss and its gradient, floating-point operations of the map) of one call."""
    B, scales, (H, W) = shape
    numbers = B * sum(C * h * w for C, h, w in scales)
    moments = 12 * B * sum(h * w for _, h, w in scales)
    forward = 2 * numbers * dtype.itemsize + moments
    return forward + 4 * B * H * W, forward + moments + 3 * numbers * dtype.itemsize, 6 * numbers


# --------------------------------------------------------------------------------------------------------------------
# Without a GPU: what the compiler makes of the kernels
# --------------------------------------------------------------------------------------------------------------------


def attention_inputs(shape, dtype, device):
    """q, k, v as head splitting makes them: (B, H, N, D) views of (B, N, H*D)."""
    q_batch, kv_batch, H, N, M, D, _, _ = shape
    make = torch.empty if device == "meta" else torch.randn
    sizes = ((q_batch, N), (kv_batch, M), (kv_batch, M))
    return [make(b, n, H, D, dtype=dtype, device=device).transpose(1, 2) for b, n in sizes]


def compile_attention(shape, dtype, arch):
    """The kernels of one forward and backward call, compiled for sm_{arch}."""
    *_, window, dropout_p = shape
    q, k, v = attention_inputs(shape, dtype, "meta")
    options = (q.shape[3] ** -0.5, window, dropout_p, 12345)
    with aot.recording(arch) as kernels:
        o, lse = forward_triton(q, k, v, *options)
        backward_triton(torch.empty_like(o), q, k, v, o, lse, *options)
    return kernels


def compile_cosine(shape, dtype, arch, memory_format=torch.contiguous_format):
    """The kernels of one map and one loss with its gradient, compiled for sm_{arch}."""
    B, scales, size = shape
    cells = [h * w for _, h, w in scales]
    moments = torch.empty(3, B, sum(cells), device="meta")
    with aot.recording(arch) as kernels:
        for scale, part in zip(scales, moments.split(cells, dim=2)):
            x = torch.empty(B, *scale, dtype=dtype, device="meta").to(memory_format=memory_format)
            moments_triton(x, x, part)
            moments_grad_triton(x, x, part)
        sample_triton(moments, tuple((h, w) for _, h, w in scales), size, "sum")
    return kernels


def predictions(dtype):
    """Lines of a table: bytes that must move and arithmetic intensity of every shape."""
    yield f"| {str(dtype)[6:]} | MB forward | MB forward + backward | operations per byte |"
    yield "|---|---|---|---|"
    for shapes, traffic in ((ATTENTION, attention_traffic), (COSINE, cosine_traffic)):
        for name, shape in shapes.items():
            forward, both, operations = traffic(shape, dtype)
            yield f"| {name} | {forward / 1e6:.2f} | {both / 1e6:.2f} | {operations / forward:.1f} |"


def compiled(dtype):
    """Lines of a table: the most registers, stack and shared memory of any kernel, per shape, for sm_80 and sm_90."""
    yield "| | kernels | registers, sm_80 / sm_90 | stack (spills), bytes | shared memory, bytes |"
    yield "|---|---|---|---|---|"
    for shapes, build in ((ATTENTION, compile_attention), (COSINE, compile_cosine)):
        for name, shape in shapes.items():
            used = [[aot.usage(kernel) for kernel in build(shape, dtype, arch)] for arch in aot.SHARED_LIMIT]
            keys = ("registers", "stack", "shared")
            most = (" / ".join(str(max(u[key] for u in one)) for one in used) for key in keys)
            yield f"| {name} | {len({u['name'] for u in used[0]})} | {' | '.join(most)} |"


# --------------------------------------------------------------------------------------------------------------------
# With a GPU: times
# --------------------------------------------------------------------------------------------------------------------


def eager_attention(q, k, v, bias):
    """The textbook lines, with the N x M matrix in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def sdpa_attention(q, k, v, bias):
    batch = max(len(q), len(k))
    return F.scaled_dot_product_attention(*(x.expand(batch, -1, -1, -1) for x in (q, k, v)), attn_mask=bias)


def eager_map(teachers, students, size):
    """The published code of reverse distillation."""
    total = 0
    for t, s in zip(teachers, students):
        d = 1 - F.cosine_similarity(t, s)
        total = total + F.interpolate(d[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]
    return total


def eager_loss(teachers, students):
    """The published code of reverse distillation."""
    return sum((1 - F.cosine_similarity(t.flatten(1), s.flatten(1))).mean() for t, s in zip(teachers, students))


def attention_candidates(shape, dtype, device):
    """({name: function without arguments -> output}, tensors whose gradients to take). No dropout, for a fair race."""
    q, k, v = (x.requires_grad_() for x in attention_inputs(shape, dtype, device))
    window = shape[6]
    bias = None if window is None else _window_bias(*window, dtype, q.device)[0]
    compiled_attention = torch.compile(eager_attention)
    return {
        "ours": lambda: cross_attention(q, k, v, window=window),
        "eager": lambda: eager_attention(q, k, v, bias),
        "torch.compile": lambda: compiled_attention(q, k, v, bias),
        "sdpa": lambda: sdpa_attention(q, k, v, bias),
    }, (q, k, v)


def cosine_candidates(shape, dtype, device):
    """As for attention: {name: (map, loss)}, students."""
    B, scales, size = shape
    teachers = [torch.randn(B, *s, dtype=dtype, device=device) for s in scales]
    students = [(t + 0.5 * torch.randn_like(t)).requires_grad_() for t in teachers]
    compiled_map, compiled_loss = torch.compile(eager_map), torch.compile(eager_loss)
    return {
        "ours": (lambda: cosine_map(teachers, students, size), lambda: cosine_loss(teachers, students)),
        "eager": (lambda: eager_map(teachers, students, size), lambda: eager_loss(teachers, students)),
        "torch.compile": (lambda: compiled_map(teachers, students, size), lambda: compiled_loss(teachers, students)),
    }, students


def measure(function, tensors):
    """(forward ms, forward + backward ms, peak MiB of forward + backward beyond the inputs), medians."""
    from triton.testing import do_bench

    output = function().detach()
    upstream = torch.randn_like(output)

    def forward():
        with torch.no_grad():
            function()

    def both():
        torch.autograd.grad(function(), tensors, upstream)

    times = [do_bench(f, return_mode="median") for f in (forward, both)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    return *times, (torch.cuda.max_memory_allocated() - before) / 2**20


def agree(name, candidates, dtype):
    """Stop unless all candidates give what eager PyTorch gives: a faster kernel that is wrong is not faster."""
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    expected = candidates["eager"]().float()
    for which, function in candidates.items():
        difference = (function().float() - expected).abs().max().item()
        if not difference <= tolerance * max(1.0, expected.abs().max().item()):
            raise SystemExit(f"{name}, {dtype}: {which} is wrong by {difference:.2g}: nothing is timed")


def copy_speed():
    """Bytes per second that a plain copy of 1 GiB moves: the peak that a memory-bound kernel can reach on this card."""
    from triton.testing import do_bench

    x = torch.empty(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / (do_bench(lambda: y.copy_(x), return_mode="median") / 1e3)


def on_gpu():
    """Lines of the report of this GPU."""
    peak = copy_speed()
    yield f"# {torch.cuda.get_device_name()}\n"
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    yield f"{versions}, `python -m kernels.bench`, {time.strftime('%Y-%m-%d')}."
    yield f"A plain copy moves {peak / 1e9:.0f} GB/s; shares are of that. Medians; no dropout; ms.\n"
    for dtype in DTYPES:
        yield f"## {str(dtype)[6:]}\n"
        yield "| | | forward | forward + backward | peak MiB | GB/s forward | share |"
        yield "|---|---|---|---|---|---|---|"
        for name, shape in ATTENTION.items():
            candidates, tensors = attention_candidates(shape, dtype, "cuda")
            agree(name, candidates, dtype)
            moved = attention_traffic(shape, dtype)[0]
            for which, function in candidates.items():
                yield line(name, which, *measure(function, tensors), moved, peak)
        for name, shape in COSINE.items():
            candidates, students = cosine_candidates(shape, dtype, "cuda")
            for kind, title in enumerate(("map", "loss")):
                agree(name, {which: pair[kind] for which, pair in candidates.items()}, dtype)
                moved = cosine_traffic(shape, dtype)[0] - (4 * shape[0] * math.prod(shape[2]) if kind else 0)
                for which, pair in candidates.items():
                    yield line(f"{name}, {title}", which, *measure(pair[kind], students), moved, peak)
        yield ""


def line(name, which, forward, both, memory, moved, peak):
    speed = moved / (forward / 1e3)
    return f"| {name} | {which} | {forward:.3f} | {both:.3f} | {memory:.1f} | {speed / 1e9:.0f} | {speed / peak:.0%} |"


# --------------------------------------------------------------------------------------------------------------------
# On a CPU: the plain PyTorch path against the published code
# --------------------------------------------------------------------------------------------------------------------


def best_of(functions, rounds=15):
    """{name: least ms} of functions run in turns, so that a busy machine slows all of them alike."""
    best = dict.fromkeys(functions, math.inf)
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:  # the first round warms up
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def on_cpu():
    """Lines of a table: our PyTorch path and the published code, on this CPU."""
    yield f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, least of 15 runs in turns, ms\n"
    yield "| | published | ours | times faster |"
    yield "|---|---|---|---|"
    for name, (_, scales, size) in COSINE.items():
        for batch in (1, 8):
            for memory_format, layout in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels-last")):
                teachers = [torch.randn(batch, *s).to(memory_format=memory_format) for s in scales]
                students = [(t + 0.5 * torch.randn_like(t)).requires_grad_() for t in teachers]
                with torch.no_grad():
                    maps = best_of({
                        "published": functools.partial(eager_map, teachers, students, size),
                        "ours": functools.partial(cosine_map, teachers, students, size),
                    })
                losses = best_of({
                    "published": lambda: torch.autograd.grad(eager_loss(teachers, students), students),
                    "ours": lambda: torch.autograd.grad(cosine_loss(teachers, students), students),
                })
                for what, t in (("map", maps), ("loss and gradient", losses)):
                    ratio = t["published"] / t["ours"]
                    title = f"{name}, {what}, batch {batch}, {layout}"
                    yield f"| {title} | {t['published']:.1f} | {t['ours']:.1f} | {ratio:.1f} |"
    for dtype in (torch.float32, torch.bfloat16):
        for dropout_p in (0.0, 0.1):
            q, k, v = (x.requires_grad_() for x in attention_inputs((16, 16, 8, 196, 196, 32, None, 0), dtype, "cpu"))
            bias = _window_bias(14, 14, 3, dtype, q.device)[0]
            upstream = torch.randn_like(q)

            def published():
                weights = F.dropout(((q * 32**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1), dropout_p)
                torch.autograd.grad(weights @ v, (q, k, v), upstream)

            def ours():
                o = cross_attention(q, k, v, window=(14, 14, 3), dropout_p=dropout_p)
                torch.autograd.grad(o, (q, k, v), upstream)

            t = best_of({"published": published, "ours": ours})
            title = f"OneNIP attention, forward + backward, batch 16, {str(dtype)[6:]}, dropout {dropout_p}"
            yield f"| {title} | {t['published']:.1f} | {t['ours']:.1f} | {t['published'] / t['ours']:.1f} |"


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="time the plain PyTorch path on this CPU instead")
    if parser.parse_args().cpu:
        for text in on_cpu():
            print(text, flush=True)
    elif torch.cuda.is_available():
        lines = []
        for text in on_gpu():
            print(text, flush=True)
            lines.append(text)
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        file = folder / f"{torch.cuda.get_device_name().replace(' ', '-').replace('/', '-')}.md"
        file.write_text("\n".join(lines) + "\n")
        print(f"written to {file}")
    else:
        print("No CUDA device: nothing is timed. Predicted traffic (what must move, whoever computes):\n")
        for dtype in (torch.float32, torch.bfloat16):
            print(*predictions(dtype), sep="\n", end="\n\n")
        if reason := aot.unavailable():
            print(f"The kernels were not compiled: {reason}.")
            return
        for dtype in DTYPES:
            print(f"Compiled for {str(dtype)[6:]}; the most that any kernel of a forward and backward call needs:\n")
            for text in compiled(dtype):
                print(text, flush=True)
            print()


if __name__ == "__main__":
    sys.exit(main())
