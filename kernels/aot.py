"""What the GPU compiler makes of the kernels, without a GPU: registers, spills, shared memory,
width of loads.

    with recording(80) as kernels:                     # 80 = A100, 90 = H100
        forward_triton(*tensors_on_the_meta_device)
    usage(kernels[0])

Launches inside `recording` compile for the given card exactly as they would there (same
specialisation on strides that are 1 or divisible by 16, same options), and launch nothing. Needs
Triton on Linux; not usable in a process with TRITON_INTERPRET=1, where kernels are plain Python.
"""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

from .backend import HAS_TRITON, INTERPRET, triton

ARCHS = (80, 90)  # what the kernels are compiled for in tests: A100, H100
# Bytes of shared memory one program may use on a GeForce RTX 30, 40 or 50 (A100: 166,912, H100:
# 232,448). A kernel needs about the same on all of them.
SHARED_LIMIT = 101376


def unavailable():
    """Why nothing can be compiled here, in words, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRET:
        return "TRITON_INTERPRET=1 turns the kernels into plain Python"
    return None if _tool("cuobjdump").exists() else "this Triton brings no cuobjdump"


@contextlib.contextmanager
def recording(arch):
    """Context: every kernel launch is compiled for sm_{arch} instead, and appended to the list
    this yields."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:  # stands in for the GPU driver: the four questions a compilation asks of it
        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return arch  # Triton caches what it compiled per device

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            return None

    kernels = []
    launch = JITFunction.__getitem__

    def compile_only(function, grid):
        def compile_it(*args, **options):
            kernels.append(function.run(*args, grid=grid, warmup=True, **options))

        return compile_it

    driver.set_active(NoDevice())
    JITFunction.__getitem__ = compile_only
    try:
        yield kernels
    finally:
        JITFunction.__getitem__ = launch
        if hasattr(driver, "_active"):
            # looked for again at the next real launch; reset_active() would fail without a GPU
            driver._active = None
        else:  # Triton before 3.5
            driver.reset_active()


def usage(kernel):
    """What a compiled kernel needs: dict(name, registers, stack, shared, vector).

    registers: per thread. stack: bytes per thread; these kernels have no arrays, so anything above
    0 is registers spilled to slow memory. shared: bytes per program. vector: bytes moved by the
    widest load from global memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [_tool("cuobjdump"), "-res-usage", cubin]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[^;]*;", kernel.asm["ptx"])
    return dict(
        name=kernel.metadata.name,
        registers=int(re.search(r"REG:(\d+)", report.stdout)[1]),
        stack=int(re.search(r"STACK:(\d+)", report.stdout)[1]),
        shared=kernel.metadata.shared,
        vector=max((_width(load) for load in loads), default=0),
    )


def _width(load):
    """Bytes moved by one PTX load instruction."""
    copy = re.search(r"cp\.async.*?,\s*(?:0x)?(\d+)", load)
    if copy:
        return int(copy[1], 16 if "0x" in load else 10)
    count = re.search(r"\.v(\d)\.", load)
    return int(count[1] if count else 1) * int(re.search(r"\.[bfus](\d+)\b", load)[1]) // 8


def _tool(name):
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
