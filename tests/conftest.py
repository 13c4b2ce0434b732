"""Shared by all tests: the scripts' folder on the path, a cache folder of their own, the `gpu`
marker, tiny data, and running a script in-process."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before torch: tests run side by side (pytest -n), and are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What the tests remember of their files stays out of the user's cache, and goes with the session.
# Downloaded weights are still found there: torch reads the first variable before the second.
os.environ.setdefault(
    "TORCH_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tests-cache-")

import pytest
import torch

CACHE = os.environ["XDG_CACHE_HOME"]
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("contract")  # its assertions show their values too


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skipped by name without one)")
    config.addinivalue_line("markers", "slow: takes minutes (skipped by name unless AD_SLOW is set)")


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if not os.environ.get("AD_SLOW"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; set AD_SLOW=1"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def real_data():
    """The folder of real classes in MVTec layout that the environment names, or a skip."""
    folder = os.environ.get("AD_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("AD_REAL_DATA names no folder of real images")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Eight drawn classes in MVTec layout, a few images of 64 px each."""
    from common import synth
    return synth.ensure(tmp_path_factory.mktemp("tiny"), train=6, test_good=3, test_bad=4, size=64)


@pytest.fixture(autouse=True)
def no_claims():
    """What a test's run has claimed is free for the next test, and forked processes know nothing of it."""
    yield
    from common import folder

    folder.release()


@pytest.fixture
def command(monkeypatch, capsys):
    """command("onenip", "--data", ...) runs the script's main in this process, as the shell would: returns .status,
    .out, .err. (A new Python would spend its seconds on importing torch.)"""
    import importlib
    from common import runtime

    def run(script, *words):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        status = 0
        try:
            runtime.launch(module.main)
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def one_thread():
    """PyTorch computes on one thread during the test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def metrics_of():
    """Folder of a run -> its metrics.json without what may differ between equal runs (times)."""
    def read(folder):
        result = json.loads((Path(folder) / "metrics.json").read_text())
        result.pop("seconds")
        result.pop("speed", None)
        return result

    return read
