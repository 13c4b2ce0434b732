"""Time and peak memory of one training step of Omni-AD against the size of the image: learned tokens or self-attention.

    python -m tests.bench_omniad                            ResNet-34's widths, blocks 1,1,1,1, 128 to 512 px
    python -m tests.bench_omniad --depths 3,9,9,7           the paper's depth

Both kinds are stepped in turn in one process, on random teacher maps (the frozen teacher is the
same for both, and left out): forward, loss, backward. Learned tokens should cost in proportion to
the pixels: 4 times for twice the side. Self-attention (--learnable none) compares all positions
with one another: 16 times at the finest map. Seconds are the best of --repeat, on a CPU those of
the processor. Memory is the peak of one step beyond its start: of resident memory on a CPU (Linux
only), of CUDA's allocator on a GPU.
"""

import argparse
import contextlib
import ctypes
import time
from pathlib import Path

import torch

import omniad
from tests.bench_metrics import resident

CHANNELS = (64, 128, 256)  # ResNet-34


def step(model, maps, args):
    loss, _ = omniad.losses(model, maps, model.scale, args)
    loss.backward()
    model.zero_grad(set_to_none=True)


def cost(model, maps, args, device, repeat):
    """(seconds, MiB or None) of one step."""
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    seconds = []
    for _ in range(repeat + 1):  # the first warms up
        start = clock()
        step(model, maps, args)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, maps, args)
        return min(seconds[1:]), (torch.cuda.max_memory_allocated() - before) / 2**20
    return min(seconds[1:]), peak(lambda: step(model, maps, args))


def peak(function):
    """MiB of resident memory that function() takes beyond what was there; None but on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD: tensors above 64 KiB go back to the system when they are freed, and what
        # was freed before does so now; or they would be reused unseen.
        library.mallopt(-3, 1 << 16)
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        function()
        memory = resident("VmHWM") - before
        library.mallopt(-3, 1 << 25)
        return memory
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="128,256,384,512", help="sides of the image, separated by commas")
    parser.add_argument("--depths", default="1,1,1,1", help="Omni-blocks of the four stages")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, "
          f"torch {torch.__version__}, depths {args.depths}, batch {args.batch_size}")
    print("".join(f"{title:>12}" for title in ("px", "tokens s", "self s", "ratio", "tokens MiB", "self MiB", "ratio")))
    found = {}
    for size in map(int, args.sizes.split(",")):
        maps = [torch.rand(args.batch_size, channels, size // stride, size // stride, device=device)
                for channels, stride in zip(CHANNELS, (4, 8, 16))]
        for kind in ("q+kv", "none"):
            torch.manual_seed(0)
            options = omniad.Args(learnable=kind, depths=args.depths)
            model = omniad.OmniAD(CHANNELS, options).to(device).train()
            found[kind] = cost(model, maps, options, device, args.repeat)
        (seconds, memory), (self_seconds, self_memory) = found["q+kv"], found["none"]
        cells = [size, f"{seconds:.3f}", f"{self_seconds:.3f}", f"{self_seconds / seconds:.2f}"]
        if memory is not None:
            cells += [f"{memory:.0f}", f"{self_memory:.0f}", f"{self_memory / max(memory, 1e-9):.2f}"]
        print("".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
