"""The Triton kernels as compiled for real GPUs, without one: registers, shared memory, width of loads.

Each architecture has a process of its own, since Triton must not be in interpreter mode and both run at once. To save
time fp32 is compiled for sm_80 only, bf16 for sm_90 only; with KERNELS_COMPILE=all every dtype for both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).resolve().parent.parent

CODE = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from kernels import aot, backend, bench, few_tokens

arch = int(sys.argv[1])
seen = 0
spilled = 0 if backend.VERSION >= (3, 5) else 600  # bytes; older compilers find no better: docs/gpu.md

def wide(kernel):  # sampling gathers single cells; the sum of dO * O and of parts, and the loss, are tiny
    return 4 if kernel in ("_sample_kernel", "_delta_kernel", "_sum_parts_kernel", "_loss_kernel") else 16

def check(name, dtype, kernels):
    global seen
    for kernel in kernels:
        if id(kernel) in done:
            continue  # the same specialisation, already checked for another shape
        done[id(kernel)] = kernel
        seen += 1
        used = aot.usage(kernel)
        where = f"{name}, {dtype}, sm_{arch}: {used}"
        assert used["stack"] <= spilled, "registers spill: " + where
        assert used["shared"] <= aot.SHARED_LIMIT, "too much shared memory: " + where
        if name not in bench.ODD_ATTENTION:  # whose rows start at odd addresses
            assert used["vector"] >= wide(used["name"]), "narrow loads: " + where
        assert dtype != torch.float32 or "tf32" not in kernel.asm["ptx"], "TF32 instead of IEEE: " + where

done = {}
some = {80: [torch.float32], 90: [torch.bfloat16]}[arch]
for dtype in bench.DTYPES if os.environ.get("KERNELS_COMPILE") == "all" else some:
    for name, shape in (bench.ATTENTION | bench.ODD_ATTENTION).items():
        check(name, dtype, bench.compile_attention(shape, dtype, arch))
    for name, shape in bench.FEW_TOKENS.items():
        if shape[3] <= few_tokens.WIDEST[dtype == torch.float32]:
            check(name, dtype, bench.compile_few_tokens(shape, dtype, arch))
    for name, shape in (bench.COSINE | bench.ODD_COSINE).items():
        for layout in (torch.contiguous_format, torch.channels_last):
            kernels = bench.compile_cosine(shape, dtype, arch, layout)
            check(name, dtype, kernels)
            # launches: a map, a loss and its gradient take one a scale each, map and loss one more
            assert len(kernels) == 3 * len(shape[1]) + 2
print(seen, "kernels")
"""


@pytest.mark.skipif(aot.unavailable() is not None, reason=f"nothing can be compiled here: {aot.unavailable()}")
def test_compiled_kernels():
    """At every shape the scripts use, the window with dropout among them, at odd widths, for one image and for wide
    maps, for A100 (sm_80) and H100 (sm_90): no spilled register from Triton 3.5 on, shared memory that a GeForce has
    too, 16-byte loads, and fp32 without TF32. .ci/run does the same with the oldest Triton, 3.2."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen([sys.executable, "-c", CODE, str(arch)], cwd=ROOT, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for arch in aot.ARCHS
    ]
    results = [process.communicate() for process in running]
    for process, (output, errors) in zip(running, results):
        assert process.returncode == 0, errors
        assert int(output.split()[0]) > 40
