"""The numbers of docs/gpu.md are counted right."""

import pytest
import torch

from kernels import cross_attention
from kernels.backend import HAS_TRITON
from tests import bench_pipeline


def test_what_is_counted():
    """A product (3, 4) x (4, 5) and a sum: 2 * 3 * 4 * 5 operations, two launches, the bytes that they read
    and write; the transposition before is a view and costs nothing."""
    a, b = torch.ones(3, 4), torch.ones(5, 4)
    operations, moved, launches = bench_pipeline.count(lambda: (a @ b.T).sum())
    assert operations == 2 * 3 * 4 * 5
    assert launches == 2
    assert moved == 4 * (12 + 20 + 15) + 4 * (15 + 1)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_are_counted():
    """Attention over ten keys: one launch forward, two backward (delta; then all three gradients), with each tensor
    once: three inputs, the output, two numbers a query."""
    q, k = torch.ones(2, 2, 50, 16, device="meta"), torch.ones(2, 2, 10, 16, device="meta")
    q.requires_grad_()
    traffic = bench_pipeline.Traffic()
    with bench_pipeline.kernels_counted(traffic), traffic:
        o = cross_attention(q, k, k)
        forward = traffic.launches, traffic.bytes
        torch.autograd.grad(o, q, o.detach())
    assert forward == (1, 4 * (2 * 2 * 16 * (50 + 10 + 10 + 50) + 2 * 2 * 2 * 50))
    assert traffic.launches == 3


def test_simulated_cores_add_up():
    """Two processes whose samples take 20 ms of sleep give more of them than one process does."""
    args = bench_pipeline.onenip.Args(image_size=32)
    cores = bench_pipeline.Cores(args, 0.02)
    alone, two = [bench_pipeline.speed(cores, workers, 4, 8) for workers in (0, 2)]
    assert alone < 50 and two > 1.2 * alone
