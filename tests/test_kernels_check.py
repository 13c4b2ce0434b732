"""What keeps the kernels from misleading: the guard of "auto", `python -m kernels.check`, and how
long sides are split."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend, bench, check, cross_attention, few_tokens
from kernels.backend import HAS_TRITON, compare
from kernels.cross_attention import split

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture
def card(monkeypatch):
    """Tensors pass as a GPU's, and nothing is known of it yet."""
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "on_gpu", lambda tensor: True)
    for cached in (backend._works, backend._lost):
        cached.cache_clear()
    yield
    for cached in (backend._works, backend._lost):
        cached.cache_clear()


def test_auto_survives_a_kernel_that_fails(card, monkeypatch, capsys):
    """A kernel that cannot be compiled costs one line on stderr; the call, and all after it, are done by PyTorch."""
    tries = []

    def broken(device, dtype):
        tries.append(dtype)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setitem(backend._trials, "cross_attention", broken)
    x = torch.randn(1, 2, 6, 16)
    expected = cross_attention(x, x, x, backend="torch")
    for _ in range(3):
        assert torch.equal(cross_attention(x, x, x), expected)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and len(tries) == 1
    assert "cross_attention in float32 does not work" in lines[0] and "Failed to find C compiler" in lines[0]


def test_auto_survives_a_kernel_that_is_wrong(card, monkeypatch, capsys):
    """So does one that runs and computes something else, in the dtype where it does; other dtypes keep it."""
    def trial(device, dtype):
        right = torch.ones(3)
        compare([right * 1.4 if dtype == torch.bfloat16 else right], [right], dtype)

    monkeypatch.setitem(backend._trials, "cross_attention", trial)
    x = torch.zeros(1)
    assert backend.use_triton("auto", "cross_attention", x)
    assert not backend.use_triton("auto", "cross_attention", x.bfloat16())
    assert "is wrong by 0.4 of 1" in capsys.readouterr().err


def test_auto_takes_pytorch_where_the_kernel_lost(card, monkeypatch, tmp_path):
    """A file of `kernels.check` for this card decides for the rows that it calls slower, wrong or failing, and for no
    others."""
    rows = [{"row": "cross_attention 8x10x64x32 float32", "verdict": "slower"},
            {"row": "cross_attention 8x11x64x32 float32", "verdict": "wrong"},
            {"row": "cross_attention 8x12x64x32 float32", "verdict": "fails"},
            {"row": "cross_attention 8x64x10x32 float32", "verdict": "faster"}]
    (tmp_path / "Some-GPU.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    monkeypatch.setattr(backend, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(backend, "works", lambda *_: True)

    class OnCuda:
        dtype, device = torch.float32, torch.device("cuda", 0)

    use = functools.partial(backend.use_triton, "auto", "cross_attention", OnCuda, None)
    assert not use("8x10x64x32") and not use("8x11x64x32") and not use("8x12x64x32")
    assert use("8x64x10x32") and use("8x99x10x32")


def test_auto_tries_the_sizes_that_will_run(card, monkeypatch, capsys):
    """Whether a program fits the card depends on the width of the map and on the tokens of a head: where these do not
    fit, PyTorch does the work, and the kernel keeps all others."""
    def trial(device, dtype, width, per_head):
        if width * per_head > 1000:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(backend._trials, "few_token_attention", trial)

    def runs(width, tokens, heads):
        x, folded = torch.zeros(1, 40, width), torch.zeros(1, tokens * heads, width)
        return few_tokens._use_triton("auto", folded.bfloat16(), x.bfloat16(), "", heads)

    assert runs(64, 10, 2) and runs(512, 1, 4) and not runs(512, 10, 4)
    error = capsys.readouterr().err
    assert error.count("out of resource") == error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comparison_is_relative(dtype):
    """Results of any size: an error of 40 % does not pass, nor NaN, nor something where zero is expected; one rounding
    does."""
    for size in (1e-6, 1.0, 1e6):
        exact = size * torch.linspace(-1, 1, 50, dtype=torch.float64)
        compare([exact * (1 + torch.finfo(dtype).eps)], [exact], dtype)
        for wrong in (exact * 1.4, exact * torch.nan):
            with pytest.raises(AssertionError, match="result 0 is wrong"):
                compare([wrong], [exact], dtype)
    with pytest.raises(AssertionError):
        compare([torch.full((3,), 1e-3)], [torch.zeros(3)], dtype)


def test_verdicts():
    """A candidate whose output is right and whose gradient is wrong is wrong; one that raises fails; both say why."""
    x = torch.randn(5, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, grad):
            return 0.9 * grad

    def raises():
        raise RuntimeError("no such card")

    verdicts = []
    for function in (x.exp, lambda: WrongGradient.apply(x), raises):
        case = check.Case("op 5 float32", "title", {"triton": function}, [x], exact_x.exp, [exact_x])
        verdicts.append(check.judge(case, torch.float32, timed=False))
    assert [v["verdict"] for v in verdicts] == ["right", "wrong", "fails"]
    assert "result 1" in verdicts[1]["why"] and "no such card" in verdicts[2]["why"]
    assert "no such card" in check.describe(verdicts[2])


def test_every_shape_compiles_afresh(monkeypatch):
    """What is labelled torch.compile is compiled, for each of ten shapes (after eight,
    torch.compile would run eagerly), and static: the compiler is reset in between."""
    graphs = []
    monkeypatch.setattr(check, "compiled", functools.partial(
        torch.compile, dynamic=False, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    monkeypatch.setattr(check, "times", lambda function, tensors: {"gpu": function().sum().item(), "host": 0.0})
    x = torch.ones(1, 1, 1, 8)
    for n in range(1, 11):
        def formula(q):
            return q * 2
        q = x.expand(1, 1, n, 8)
        candidates = {name: functools.partial(check.compiled(formula) if name == "compile" else formula, q)
                      for name in ("triton", "torch", "compile")}
        case = check.Case("op", "title", candidates, [q], functools.partial(formula, q.double()), [])
        assert check.judge(case, torch.float32, timed=True)["verdict"] == "faster"
    assert len(graphs) == 10


def test_long_sides_are_split_until_the_card_is_full():
    """A launch with enough programs is not split, nor one whose blocks are few (OneNIP's 196 tokens for one image);
    a lone image of ROADS is, into pieces of at least four blocks; and programs of twice the warps half as often."""
    cpu = torch.device("cpu")  # counts as an A100, with 108 cores
    assert split(8 * 4, 4, 196, 64, cpu) == (1, 256) and split(8 * 7, 4, 196, 32, cpu) == (1, 224)
    assert split(16 * 8 * 4, 4, 4096, 64, cpu)[0] == 1
    splits, chunk = split(8, 4, 4096, 64, cpu)
    assert splits == 16 and chunk == 4 * 64
    assert split(1, 4, 100, 64, cpu) == (1, 128)
    assert split(50, 4, 4096, 32, cpu)[0] == 8 and split(50, 8, 4096, 32, cpu)[0] == 4


@needs_triton
def test_check_in_the_interpreter(tmp_path):
    """`python -m kernels.check --json FILE` proves small cases of every operation where there is no GPU."""
    file = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "kernels.check", "--json", str(file)], cwd=ROOT,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert {row["verdict"] for row in result["rows"]} == {"right"}
    assert {row["row"].split()[0] for row in result["rows"]} == {"cross_attention", "cosine", "few_token_attention"}
    assert any("dropout 0.1" in row["title"] for row in result["rows"])
    assert result["machine"]["torch"] == torch.__version__


def test_check_without_triton(monkeypatch, capsys):
    """Without a GPU and without Triton it says what it would do, and that there is nothing to run."""
    monkeypatch.setattr(check, "HAS_TRITON", False)
    assert check.without_gpu(None) == 0
    out = capsys.readouterr().out
    assert "No CUDA device" in out and "nothing to run" in out


def test_rows_are_named_as_auto_names_them(monkeypatch):
    """The rows of `kernels.check` are those that "auto" looks up: every case asks for exactly its own row."""
    asked = []

    def spy(backend, operation, tensor, unsupported=None, shape="", sizes=()):
        asked.append(f"{operation} {shape} {str(tensor.dtype)[6:]}")
        return False

    for module in ("cross_attention", "cosine_map", "few_tokens"):
        monkeypatch.setattr(sys.modules[f"kernels.{module}"], "use_triton", spy)
    shapes = (check.without_dropout(check.SMALL[0]), *check.SMALL[1:])
    count = 0
    for case in check.cases(shapes, torch.float32, "cpu"):
        asked.clear()
        case.candidates["triton"]()
        assert asked == [case.row]
        count += 1
    assert count == 9


@needs_triton
def test_first_kernel_of_the_tour(tmp_path):
    """The small kernel that opens kernels/README.md runs as it stands there."""
    text = (ROOT / "kernels" / "README.md").read_text()
    code = re.search(r"```python\n(# first\.py.*?)```", text, flags=re.DOTALL)[1]
    (tmp_path / "first.py").write_text(code)
    done = subprocess.run([sys.executable, "-W", "ignore", "first.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_predicted_bytes_of_the_folded_read():
    """ROADS's largest stage in bf16: 34 MB where the prompts read, 67 MB where the image reads, whatever the tokens."""
    tokens_read, map_reads = bench.few_token_traffic(bench.FEW_TOKENS["ROADS 64x64"], torch.bfloat16)
    assert round(tokens_read[0] / 1e6) == 34 and round(map_reads[0] / 1e6) == 67
    assert round(tokens_read[2] / 1e9, 1) == 5.4


def test_a_place_for_the_result_is_looked_for_first(tmp_path, monkeypatch, capsys):
    """The check takes minutes, on a card that may not be had again."""
    monkeypatch.setattr(check, "without_gpu", lambda file: pytest.fail("it has begun"))
    monkeypatch.setattr(check, "INTERPRET", False)
    (tmp_path / "file").touch()
    for place in (tmp_path / "no" / "x.json", tmp_path / "file" / "x.json", tmp_path, Path("/proc/x.json")):
        monkeypatch.setattr("sys.argv", ["check", "--json", str(place)])
        assert check.main() == 2
        err = capsys.readouterr().err
        assert str(place) in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
