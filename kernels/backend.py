"""Which implementation runs: the Triton kernel or plain PyTorch, and the guarded import of Triton.

Triton exists on Linux only. Elsewhere `triton` is None here, the kernels are never compiled, and
the plain PyTorch path does all the work. Where it exists it can still fail (no C compiler, an old
driver, a card without bf16, or with too little shared memory for a wide map), so before "auto" uses
a kernel it runs a tiny example on this card, once per operation, dtype, what a program's memory
depends on, and process; if that fails, one line on stderr says so, and PyTorch does the work.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, or a Linux without the package

    class tl:  # only what the kernels' signatures mention while Python reads the file
        constexpr = None

    class triton:
        @staticmethod
        def jit(function=None, **options):
            return function or (lambda function: function)

    HAS_TRITON, VERSION, INTERLEAVE = False, None, None
else:
    HAS_TRITON = True
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
    # before 3.4 the compiler cannot transpose what `tl.interleave` makes
    INTERLEAVE = tl.constexpr(VERSION >= (3, 4))

# Triton decides when it reads a kernel, so do we
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("auto", "triton", "torch")
RESULTS = Path(__file__).parent / "results"  # what `python -m kernels.check` found, a file per card
_default = "auto"
_trials = {}  # operation -> function (device, dtype, *sizes) that raises if the kernel fails there


def set_backend(name):
    """What `backend="auto"` means in this process from now on (the scripts' `--kernels` option).

    name: "auto" (Triton for CUDA tensors where it works and is not slower, plain PyTorch
    otherwise), "triton" or "torch". Raises ValueError for any other name.
    """
    global _default
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: choose one of {', '.join(BACKENDS)}")
    _default = name


def use_triton(backend, operation, tensor, unsupported=None, shape="", sizes=()):
    """True if `operation` on `tensor` shall run the Triton kernel, False for plain PyTorch.

    unsupported: what the kernel cannot do with these arguments, or None; then "auto" takes
    PyTorch. shape: names the sizes; "auto" takes PyTorch for those where `kernels.check` saw the
    kernel lose or fail. sizes: numbers on which depends whether the kernel fits the card, for its
    trial. Raises ValueError for an unknown backend or if Triton was asked for and the kernel
    cannot do it, and RuntimeError if Triton was asked for and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _default
    if backend == "torch":
        return False
    if backend == "auto":
        if not HAS_TRITON or unsupported or not on_gpu(tensor):
            return False
        row = f"{operation} {shape} {dtype_name(tensor.dtype)}"
        tried = works(operation, tensor.device, tensor.dtype, sizes)
        return tried and not lost(row, tensor.device)
    if not HAS_TRITON:
        raise RuntimeError(
            'backend "triton" needs the triton package (Linux only); use "auto" or "torch"'
        )
    if not tensor.is_cuda and not INTERPRET:
        raise RuntimeError(
            f'backend "triton" needs CUDA tensors, got {tensor.device}; use "auto" or "torch", '
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, on the CPU"
        )
    if unsupported:
        raise ValueError(f'backend "triton": {unsupported}; use "auto" or "torch"')
    return True


def on_gpu(tensor):
    return tensor.is_cuda


def dtype_name(dtype):
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------
# What "auto" wants to know of this card
# --------------------------------------------------------------------------------------------------


def trial(operation):
    """Decorator of a function (device, dtype, *sizes) that tries an operation's kernels, forward
    and backward, on a tiny example, and raises if they fail or compute something wrong."""

    def register(function):
        _trials[operation] = function
        return function

    return register


def trial_tensors(shapes, device, dtype):
    """Normal numbers, always the same, whose gradients can be taken; the global generator is not
    touched."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def _constant(function):
    """torch.compile asks the function once, and does not look inside.

    Only where a kernel can run at all: to say so imports the compiler, which takes a second.
    """
    if INTERPRET or torch.cuda.is_available():
        return torch.compiler.assume_constant_result(function)
    return function


@_constant
def works(operation, device, dtype, sizes):
    """True if the operation's kernels pass their trial on this device, which is run once."""
    return _works(operation, device, dtype, sizes)


@functools.cache
def _works(operation, device, dtype, sizes):
    """True if the operation's kernels pass their trial; if not, one line on stderr, the first
    time."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(device):
            _trials[operation](device, dtype, *sizes)
    except Exception as error:  # whatever it is, PyTorch can still do the work
        reason = str(error).strip().splitlines() or [""]
        print(
            f"kernels: {operation} in {dtype_name(dtype)} does not work on {device} "
            f"({type(error).__name__}: {reason[0][:120]}): plain PyTorch is used; "
            "`python -m kernels.check` says more",
            file=sys.stderr,
        )
        return False
    return True


def no_autocast(device):
    return torch.autocast(device.type, enabled=False)


def compare(ours, expected, dtype):
    """Raise AssertionError unless two lists of tensors agree, each relative to its own size.

    The size is the largest absolute value expected. An error that is not a number does not agree.
    """
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    for i, (x, y) in enumerate(zip(ours, expected, strict=True)):
        if x.shape != y.shape:
            raise AssertionError(f"result {i} has shape {tuple(x.shape)}, not {tuple(y.shape)}")
        error = (x.double() - y.double()).abs().max().item()
        size = y.double().abs().max().item()
        if not error <= tolerance * size:
            raise AssertionError(f"result {i} is wrong by {error:.2g} of {size:.2g}")


@_constant
def lost(row, device):
    """True if PyTorch is better in this row on this device; the file is read once."""
    return row in _lost(device)


@functools.cache
def _lost(device):
    """The rows, "operation shape dtype", for which `kernels.check` on such a card saw PyTorch
    win, or the kernel compute something wrong, or fail."""
    if device.type != "cuda":
        return frozenset()
    file = results_file(torch.cuda.get_device_name(device))
    if not file.exists():
        return frozenset()
    rows = json.loads(file.read_bytes())["rows"]
    worse = ("slower", "wrong", "fails")
    return frozenset(row["row"] for row in rows if row["verdict"] in worse)


def results_file(card):
    """Where the results of a card of this name are kept."""
    return RESULTS / f"{card.replace(' ', '-').replace('/', '-')}.json"


@functools.cache
def cores(device):
    """Streaming multiprocessors of the device; those of an A100 where there is none."""
    if device.type != "cuda":
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count


# --------------------------------------------------------------------------------------------------
# Small helpers of the operations
# --------------------------------------------------------------------------------------------------


def autocast(*tensors):
    """The tensors in autocast's dtype if autocast is on for their device, else as they are.

    As `torch.matmul` does it: float64 stays float64.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(t.dtype == torch.float64 for t in tensors):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


_library = torch.library.Library("anomaly_kernels", "DEF")
# of an operation that reads a number on the CPU: a replayed graph would not ask again. Where PyTorch
# has no such tag, it makes no CUDA graph if anything is computed on the CPU, as a seed is
NO_CUDA_GRAPH = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def opaque(schema, shapes, tags=()):
    """Decorator: for torch.compile the function is one operation, which it does not look into.

    schema: its arguments and results, as `torch.library` writes them; it must not change its
    arguments, nor return them, nor two results that share memory. shapes: function of the same
    arguments that returns empty tensors like the results. Outside torch.compile the function is
    called directly, since going through PyTorch's dispatcher takes as long as launching a kernel.

    Why not `torch.library.triton_op`, into which torch.compile does look: it could fuse nothing
    into these kernels, and their launches depend on addresses (how many bytes a load may move),
    which do not exist while it traces. PyTorch 2.6 also takes no kernel that is interpreted, so
    that no test without a GPU could run what was compiled.
    """

    def decorate(function):
        name = function.__name__
        _library.define(name + schema, tags=tags)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"anomaly_kernels::{name}", shapes, lib=_library)
        operation = getattr(torch.ops.anomaly_kernels, name)

        @functools.wraps(function)
        def call(*arguments):
            if torch.compiler.is_compiling():
                return operation(*arguments)
            return function(*arguments)

        return call

    return decorate
