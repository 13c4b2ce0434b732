"""Several processes of one run, two and four of them over gloo: what they compute together is what one computes."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common import runtime

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="several processes are tested on Linux and macOS"
)


def together(function, world, folder):
    """[function(run) of each rank], in processes forked from this one."""
    torch.multiprocessing.start_processes(
        _process, (function, world, str(folder)), nprocs=world, start_method="fork"
    )
    return [torch.load(folder / f"result-{world}-{rank}.pt") for rank in range(world)]


def _process(rank, function, world, folder):
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    run = runtime.Run("method", Path(folder), torch.device("cpu"), rank, world)
    torch.save(function(run), f"{folder}/result-{world}-{rank}.pt")
    dist.destroy_process_group()


def one(function, folder):
    """function(run) in this process alone."""
    return function(runtime.Run("method", folder, torch.device("cpu")))


def features_of_images(run):
    """`precompute` of 23 images by a convolution, four at a time; and how many this rank computed."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 5, 3).requires_grad_(False)
    images = list(torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8))
    computed = []

    def function(batch):
        computed.append(len(batch))
        return network(batch.float())

    rows = runtime.precompute(run, function, images, 4, memory_share=0.5)
    nothing = runtime.precompute(run, function, images, 4, memory_share=0.0)
    assert nothing is None
    return rows, sum(computed)


@pytest.mark.parametrize("world", [2, 4])
def test_frozen_features_are_shared_out(world, tmp_path):
    """Every rank has the bits that one process has, and computed its share only (and the first four images twice, to
    see how much there will be)."""
    expected, all_of_them = one(features_of_images, tmp_path)
    assert all_of_them == 23 + 4
    for rows, computed in together(features_of_images, world, tmp_path):
        assert torch.equal(rows, expected)
        assert computed <= 4 + -(-5 // world) * 4 + 4
