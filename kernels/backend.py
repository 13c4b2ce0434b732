"""Which implementation runs: the Triton kernel or plain PyTorch, and the guarded import of Triton.

Triton exists on Linux only. Elsewhere `triton` is None here, the kernels are never compiled, and the plain PyTorch
path does all the work.
"""

import os

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

    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides when it reads a kernel, so do we
BACKENDS = ("auto", "triton", "torch")
_default = "auto"


def set_backend(name):
    """What `backend="auto"` means in this process from now on (the scripts' `--kernels` option).

    name: "auto" (Triton for CUDA tensors, plain PyTorch for all others), "triton" or "torch". Raises ValueError for
    any other name.
    """
    global _default
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: choose one of {', '.join(BACKENDS)}")
    _default = name


def use_triton(backend, tensor, unsupported=None):
    """True if an operation on `tensor` shall run the Triton kernel, False for plain PyTorch.

    unsupported: what the kernel cannot do with these arguments, or None; then "auto" takes plain PyTorch.
    Raises ValueError for an unknown backend or if Triton was asked for and the kernel cannot do it, and RuntimeError
    if Triton was asked for and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _default
    if backend == "auto":
        return HAS_TRITON and tensor.is_cuda and unsupported is None
    if backend == "torch":
        return False
    if not HAS_TRITON:
        raise RuntimeError('backend "triton" needs the triton package (Linux only); use "auto" or "torch"')
    if not tensor.is_cuda and not INTERPRET:
        raise RuntimeError(
            f'backend "triton" needs CUDA tensors, got {tensor.device}; use "auto" or "torch", '
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, on the CPU"
        )
    if unsupported:
        raise ValueError(f'backend "triton": {unsupported}; use "auto" or "torch"')
    return True


def autocast(*tensors):
    """The tensors in autocast's dtype if autocast is on for their device (as `torch.matmul` does), else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
