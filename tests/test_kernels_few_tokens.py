"""Folded attention (kernels/few_tokens.py) against the usual order of norms, projections and attention."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from kernels import bench, few_token_attention
from kernels.few_tokens import few_token_formula, folding_pays


def modules(width, dtype=torch.float64):
    """norm_q, norm_m, to_q, to_k, to_v, to_out, none of whose parameters is 0 or 1."""
    parts = [nn.LayerNorm(width), nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(4))]
    for part in parts:
        nn.init.normal_(part.bias)
    for norm in parts[:2]:
        nn.init.normal_(norm.weight)
    return [part.to(dtype) for part in parts]


def results(function, queries, memory, parts, heads, upstream):
    """Output, gradients of both inputs and of all twelve parameters."""
    leaves = [queries, memory, *(p for part in parts for p in part.parameters())]
    out = function(queries, memory, *parts, heads)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("N, M", [(3, 50), (50, 3), (1, 20), (20, 1), (30, 31)])
def test_folded_is_the_formula(N, M):
    """In float64 the output and every gradient equal the unfolded form's, whichever side is short; maps with a mean
    and a deviation of their own, so that a forgotten part of LayerNorm shows. The last case is not worth folding."""
    torch.manual_seed(0)
    B, C, H = 2, 24, 3
    parts = modules(C)
    queries = (3 * torch.randn(B, N, C, dtype=torch.float64) + 5).requires_grad_()
    memory = (2 * torch.randn(B, M, C, dtype=torch.float64) - 4).requires_grad_()
    upstream = torch.randn(B, N, C, dtype=torch.float64)
    assert folding_pays(N, M, C, H) == (min(N, M) < 30)
    ours = results(few_token_attention, queries, memory, parts, H, upstream)
    exact = results(few_token_formula, queries, memory, parts, H, upstream)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_gradients_by_finite_differences():
    """Both directions, as torch.autograd.gradcheck sees them."""
    torch.manual_seed(0)
    parts = modules(8)
    few = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    many = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    for x, y in ((few, many), (many, few)):
        assert torch.autograd.gradcheck(lambda a, b: few_token_attention(a, b, *parts, 2), (x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_worse(dtype):
    """In fp32, and in bf16 under autocast, at most twice the error of the unfolded form, plus a few roundings."""
    torch.manual_seed(0)
    parts = modules(64, torch.float32)
    few, many = torch.randn(2, 10, 64), torch.randn(2, 100, 64) + 2
    for x, y in ((few, many), (many, few)):
        exact = few_token_formula(x.double(), y.double(), *(part.double() for part in parts), 2)
        for part in parts:
            part.float()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            ours = few_token_attention(x, y, *parts, 2)
            usual = few_token_formula(x, y, *parts, 2)
        assert ours.dtype == usual.dtype == dtype
        allowed = 2 * (usual - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() < allowed


def test_folding_pays_where_it_computes_less():
    """ROADS's stages fold, whichever side reads; two long sides, or as many tokens as channels a head, do not."""
    for width, positions in ((256, 4096), (512, 1024), (1024, 256)):
        assert folding_pays(10, positions, width, width // 32)
        assert folding_pays(positions, 10, width, width // 32)
    assert not folding_pays(196, 196, 256, 8)  # OneNIP
    assert not folding_pays(64, 4096, 64, 8)  # Omni-AD: 512 folded tokens of width 64


@torch.no_grad()
def test_a_map_that_reads_is_not_slower_folded(one_thread):
    """At the largest map of ROADS's laptop preset, whose softmax over ten tokens once took longer than all that
    folding saved. Processor time on one thread, best of several in turns, as in test_map_is_fast_on_a_cpu."""
    batch, tokens, positions, width, heads = bench.FEW_TOKENS_LAPTOP["ROADS laptop 48x48"]
    inputs = torch.randn(batch, positions, width), torch.randn(batch, tokens, width), *modules(width, torch.float32)
    best = bench.best_of({
        "published": partial(few_token_formula, *inputs, heads),
        "ours": partial(few_token_attention, *inputs, heads),
    }, rounds=30, clock=time.process_time)
    assert best["published"] > 0.95 * best["ours"], best


@pytest.mark.parametrize(
    "queries, memory, heads, message",
    [
        ((2, 3, 8), (1, 9, 8), 2, r"expected queries \(B, N, C\)"),
        ((2, 3, 8), (2, 9, 4), 2, r"expected queries \(B, N, C\)"),
        ((0, 3, 8), (0, 9, 8), 2, "nothing to attend to"),
        ((2, 3, 8), (2, 0, 8), 2, "nothing to attend to"),
        ((2, 3, 8), (2, 9, 8), 3, "3 heads do not divide 8 channels"),
    ],
)
def test_refuses(queries, memory, heads, message):
    """Arguments that do not fit end with one line that says what is wrong."""
    with pytest.raises(ValueError, match=message):
        few_token_attention(torch.zeros(queries), torch.zeros(memory), *modules(8, torch.float32), heads)
