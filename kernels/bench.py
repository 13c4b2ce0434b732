"""Sizes of the four methods: predicted traffic, compiled kernels, and times of the PyTorch path on
a CPU.

    python -m kernels.bench         the bytes that must move, and what the compiler makes of it all
    python -m kernels.bench --cpu   times of the PyTorch path on this CPU against the published code

Times on a GPU: `python -m kernels.check`, which proves the kernels before it times them.
"""

import argparse
import functools
import math
import time

import torch
import torch.nn.functional as F

from . import aot
from .cosine_map import (
    cosine_loss, cosine_loss_formula, cosine_map, cosine_map_formula, loss_grad_triton, loss_triton,
    map_triton,
)
from .cross_attention import (
    _window_bias, attention_grad_triton, attention_triton, cross_attention,
)
from .few_tokens import (
    few_token_attention, few_token_formula, map_reads_grad_triton, map_reads_triton,
    tokens_read_grad_triton, tokens_read_triton,
)

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
# name: (batch, tokens, positions of the map, width, heads)
FEW_TOKENS = {
    "ROADS 16x16": (16, 10, 256, 1024, 32),
    "ROADS 32x32": (16, 10, 1024, 512, 16),
    "ROADS 64x64": (16, 10, 4096, 256, 8),
}
# those of its laptop preset, as the CPU meets them
FEW_TOKENS_LAPTOP = {
    "ROADS laptop 12x12": (4, 10, 144, 112, 2),
    "ROADS laptop 24x24": (4, 10, 576, 40, 1),
    "ROADS laptop 48x48": (4, 10, 2304, 24, 1),
}
# for the compiler: odd and padded heads, which no method has; maps where programs are few, or wide
ODD_ATTENTION = {
    "D = 33": (2, 2, 4, 300, 300, 33, None, 0.1),
    "D = 100": (2, 2, 4, 300, 300, 100, None, 0.1),
}
ODD_COSINE = {
    "one image": (1, [(1024, 16, 16)], (256, 256)),
    "w = 512": (1, [(64, 512, 512)], (512, 512)),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# Predictions: the bytes that must move, whoever computes, and the arithmetic
# --------------------------------------------------------------------------------------------------


def attention_traffic(shape, dtype):
    """(bytes forward, bytes forward + backward, floating-point operations forward) of one call."""
    q_batch, kv_batch, H, N, M, D, _, _ = shape
    B, e = max(q_batch, kv_batch), dtype.itemsize
    q = q_batch * H * N * D * e
    kv = 2 * kv_batch * H * M * D * e
    o = B * H * N * D * e
    rows = 8 * B * H * N  # largest score and sum of each query, fp32
    forward = q + kv + o + rows
    # read q, k, v, o, its gradient and rows; write three gradients
    backward = 2 * (q + kv) + 2 * o + rows
    return forward, forward + backward, 4 * B * H * N * M * D


def few_token_traffic(shape, dtype):
    """((bytes forward, both, operations) of tokens that read, the same of a map that reads), per
    call.

    The map alone: x is read once forward; backward x twice (its gradient, the tokens' gradient), dO
    likewise where the map reads, dx written. The folded tokens stay in cache.
    """
    B, tokens, positions, width, heads = shape
    x = B * positions * width * dtype.itemsize
    operations = 4 * B * heads * tokens * positions * width
    return (x, 4 * x, operations), (2 * x, 7 * x, operations)


def cosine_traffic(shape, dtype):
    """(bytes of the map, bytes of the loss and its gradient, floating-point operations of the map)
    of one call."""
    B, scales, (H, W) = shape
    numbers = B * sum(C * h * w for C, h, w in scales)
    moments = 12 * B * sum(h * w for _, h, w in scales)
    forward = 2 * numbers * dtype.itemsize + moments
    return forward + 4 * B * H * W, forward + moments + 3 * numbers * dtype.itemsize, 6 * numbers


# --------------------------------------------------------------------------------------------------
# Without a GPU: what the compiler makes of the kernels
# --------------------------------------------------------------------------------------------------


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
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p > 0 else None
    options = (seed, q.shape[3] ** -0.5, list(window or []), dropout_p)
    with aot.recording(arch) as kernels:
        o, rows = attention_triton(q, k, v, *options)
        attention_grad_triton(torch.empty_like(o), q, k, v, o, rows, *options)
    return kernels


def compile_few_tokens(shape, dtype, arch):
    """The kernels of both directions, forward and backward, compiled for sm_{arch}; width 512 at
    most."""
    B, tokens, positions, width, heads = shape
    x = torch.empty(B, positions, width, dtype=dtype, device="meta")
    folded = torch.empty(B, heads * tokens, width, dtype=dtype, device="meta")
    bias = torch.empty(B, heads * tokens, device="meta")
    with aot.recording(arch) as kernels:
        out, rows = tokens_read_triton(folded, x, 1e-5)
        tokens_read_grad_triton(out, folded, x, out, rows, 1e-5)
        out = map_reads_triton(x, folded, bias, folded, bias[0, :width], heads, 1e-5)
        map_reads_grad_triton(out, x, folded, bias, folded, heads, 1e-5)
    return kernels


def compile_cosine(shape, dtype, arch, memory_format=torch.contiguous_format):
    """The kernels of one map and one loss with its gradient, compiled for sm_{arch}."""
    B, scales, (height, width) = shape
    maps = []
    for scale in scales:
        x = torch.empty(B, *scale, dtype=dtype, device="meta")
        maps.append(x.to(memory_format=memory_format))
    with aot.recording(arch) as kernels:
        map_triton(maps, maps, height, width, False, 0.25)
        loss, factors = loss_triton(maps, maps, False)
        loss_grad_triton(maps, maps, factors, loss)
    return kernels


def predictions(dtype):
    """Lines of a table: bytes that must move and arithmetic intensity of every shape."""
    yield f"| {str(dtype)[6:]} | MB forward | MB forward + backward | operations per byte |"
    yield "|---|---|---|---|"
    for shapes, traffic in ((ATTENTION, attention_traffic), (COSINE, cosine_traffic)):
        for name, shape in shapes.items():
            yield prediction(name, *traffic(shape, dtype))
    for name, shape in FEW_TOKENS.items():
        for who, of in zip(("prompts read", "image reads"), few_token_traffic(shape, dtype)):
            yield prediction(f"{name}, {who}, folded, with norm and projections", *of)


def prediction(title, forward, both, operations):
    megabytes = f"{forward / 1e6:.2f} | {both / 1e6:.2f}"
    return f"| {title} | {megabytes} | {operations / forward:.1f} |"


def compiled(dtype):
    """Lines of a table: the most registers, stack and shared memory of any kernel, per shape, for
    sm_80 and sm_90."""
    yield "| | kernels | registers, sm_80 / sm_90 | stack (spills), bytes | shared memory, bytes |"
    yield "|---|---|---|---|---|"
    families = [(ATTENTION, compile_attention), (COSINE, compile_cosine)]
    if dtype != torch.float32:  # which takes the PyTorch path at these widths, as 1024 does
        narrow = {name: shape for name, shape in FEW_TOKENS.items() if shape[3] <= 512}
        families.append((narrow, compile_few_tokens))
    for shapes, build in families:
        for name, shape in shapes.items():
            used = []
            for arch in aot.ARCHS:
                used.append([aot.usage(kernel) for kernel in build(shape, dtype, arch)])
            keys = ("registers", "stack", "shared")
            most = (" / ".join(str(max(u[key] for u in one)) for one in used) for key in keys)
            yield f"| {name} | {len({u['name'] for u in used[0]})} | {' | '.join(most)} |"


# --------------------------------------------------------------------------------------------------
# On a CPU: the plain PyTorch path against the published code
# --------------------------------------------------------------------------------------------------


def best_of(functions, rounds=15, clock=time.perf_counter):
    """{name: least ms by that clock} of functions run in turns, so that a busy machine slows all of
    them alike."""
    best = dict.fromkeys(functions, math.inf)
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if i:  # the first round warms up
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def on_cpu():
    """Lines of a table: our PyTorch path and the published code, on this CPU."""
    threads, version = torch.get_num_threads(), torch.__version__
    yield f"{threads} threads, PyTorch {version}, least of 15 runs in turns, ms\n"
    yield "| | published | ours | times faster |"
    yield "|---|---|---|---|"
    for title, times in (*cosine_times(), *attention_times(), *few_token_times()):
        ratio = times["published"] / times["ours"]
        yield f"| {title} | {times['published']:.1f} | {times['ours']:.1f} | {ratio:.1f} |"


def cosine_times():
    """(title, times) of map and loss."""
    formats = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
    for name, (_, scales, size) in COSINE.items():
        for batch, layout in ((1, "NCHW"), (1, "channels-last"), (8, "NCHW"), (8, "channels-last")):
            teachers, students = [], []
            for scale in scales:
                t = torch.randn(batch, *scale).to(memory_format=formats[layout])
                teachers.append(t)
                students.append((t + 0.5 * torch.randn_like(t)).requires_grad_())
            where = f"batch {batch}, {layout}"
            with torch.no_grad():
                times = best_of({
                    "published": functools.partial(cosine_map_formula, teachers, students, size),
                    "ours": functools.partial(cosine_map, teachers, students, size),
                })
            yield f"{name}, map, {where}", times
            yield f"{name}, loss and gradient, {where}", best_of({
                "published": gradient(cosine_loss_formula, (teachers, students), students),
                "ours": gradient(cosine_loss, (teachers, students), students),
            })


def attention_times():
    """(title, times) of OneNIP's attention, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for dropout_p in (0.0, 0.1):
            shape = (16, 16, 8, 196, 196, 32, None, 0)
            inputs = [x.requires_grad_() for x in attention_inputs(shape, dtype, "cpu")]
            bias = _window_bias(14, 14, 3, dtype, torch.device("cpu"))[0]
            published = functools.partial(published_attention, bias=bias, dropout_p=dropout_p)
            ours = functools.partial(cross_attention, window=(14, 14, 3), dropout_p=dropout_p)
            title = f"OneNIP attention, forward + backward, batch 16, {dtype}, dropout {dropout_p}"
            yield title, best_of({
                "published": gradient(published, inputs, inputs),
                "ours": gradient(ours, inputs, inputs),
            })


def published_attention(q, k, v, bias, dropout_p):
    """OneNIP's attention as it is published. q, k, v (..., N, 32), bias (N, N) -> (..., N, 32)."""
    weights = ((q * 32**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


def few_token_times():
    """(title, times) of ROADS's reads with their norms and projections; "published" is the usual
    form."""
    for name, shape in (FEW_TOKENS | FEW_TOKENS_LAPTOP).items():
        batch, tokens, positions, width, heads = shape
        batch = min(batch, 4)
        parts = [torch.nn.LayerNorm(width) for _ in range(2)]
        parts += [torch.nn.Linear(width, width) for _ in range(4)]
        few = torch.randn(batch, tokens, width, requires_grad=True)
        many = torch.randn(batch, positions, width, requires_grad=True)
        leaves = [few, many, *(p for part in parts for p in part.parameters())]
        for title, pair in (("prompts read", (few, many)), ("image reads", (many, few))):
            inputs = (*pair, *parts, heads)
            with torch.no_grad():
                times = best_of({
                    "published": functools.partial(few_token_formula, *inputs),
                    "ours": functools.partial(few_token_attention, *inputs),
                })
            yield f"{name}, {title}, forward, batch {batch}", times
            yield f"{name}, {title}, forward + backward, batch {batch}", best_of({
                "published": gradient(few_token_formula, inputs, leaves),
                "ours": gradient(few_token_attention, inputs, leaves),
            })


def gradient(function, inputs, leaves):
    """Function without arguments: function(*inputs) and the gradient of its sum of squares."""

    def run():
        return torch.autograd.grad(function(*inputs).square().sum(), leaves)

    return run


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cpu", action="store_true", help="time the PyTorch path on this CPU")
    if parser.parse_args().cpu:
        for text in on_cpu():
            print(text, flush=True)
        return
    print("Predicted traffic (what must move, whoever computes):\n")
    for dtype in (torch.float32, torch.bfloat16):
        print(*predictions(dtype), sep="\n", end="\n\n")
    if reason := aot.unavailable():
        print(f"The kernels were not compiled: {reason}.")
        return
    for dtype in DTYPES:
        print(f"Compiled for {dtype}; the most that any kernel of both passes needs:\n")
        for text in compiled(dtype):
            print(text, flush=True)
        print()


if __name__ == "__main__":
    from common.options import exit_with

    exit_with(main)
