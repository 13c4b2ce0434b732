"""Runs test_kernels_triton.py on the CPU, in Triton's interpreter, in a process of its own: Triton decides between
interpreter and compiler when it reads a kernel, so one process cannot do both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.backend import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_in_the_interpreter():
    """Every test of test_kernels_triton.py passes."""
    file = Path(__file__).with_name("test_kernels_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "KERNELS_INTERPRETED": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "--durations=8", str(file)]
    done = subprocess.run(command, cwd=file.parent.parent, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
