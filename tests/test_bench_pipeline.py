"""The numbers of docs/gpu.md are counted right."""

import torch

from tests import bench_pipeline


def test_what_is_counted():
    """A product (3, 4) x (4, 5) and a sum: 2 * 3 * 4 * 5 operations, two launches, the bytes that they read
    and write; the transposition before is a view and costs nothing."""
    a, b = torch.ones(3, 4), torch.ones(5, 4)
    operations, moved, launches = bench_pipeline.count(lambda: (a @ b.T).sum())
    assert operations == 2 * 3 * 4 * 5
    assert launches == 2
    assert moved == 4 * (12 + 20 + 15) + 4 * (15 + 1)


def test_simulated_cores_add_up():
    """Two processes whose samples take 20 ms of sleep give more of them than one process does."""
    args = bench_pipeline.onenip.Args(image_size=32)
    cores = bench_pipeline.Cores(args, 0.02)
    alone, two = [bench_pipeline.speed(cores, workers, 4, 8) for workers in (0, 2)]
    assert alone < 50 and two > 1.2 * alone
