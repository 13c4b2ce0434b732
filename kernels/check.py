"""Proves the kernels on this machine, then times them: `python -m kernels.check [--json FILE]`.

Every kernel at the sizes of the four methods, forward and gradients, in each dtype and with
dropout, is compared with the formula in float64. What agrees is timed, as GPU time and as the time
the CPU needs to issue it: ours ("triton"), the PyTorch path that "auto" would take instead
("torch"; for attention this is `scaled_dot_product_attention`), the formula ("eager") and
`torch.compile` of the formula. Each row ends in a verdict: faster, slower, wrong or fails. A file
kernels/results/<card>.json makes "auto" take PyTorch for the rows that are slower; --json writes
such a file.

Without a GPU nothing is timed: it says what it would do, runs small cases in Triton's interpreter
and compiles a few for an A100 and an H100.
"""

import argparse
import copy
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import UsageError
from common.folder import check_place, write_atomic

from . import aot, bench
from .backend import HAS_TRITON, INTERPRET, compare, dtype_name, results_file, triton
from .cosine_map import (
    cosine_loss, cosine_loss_formula, cosine_map, cosine_map_formula, shape_name,
)
from .cross_attention import attention_formula, cross_attention, neighbours
from .few_tokens import WIDEST, few_token_attention, few_token_formula

# what the interpreter can run in seconds; as `bench.ATTENTION`, `bench.COSINE`, `bench.FEW_TOKENS`
SMALL = (
    {
        "few keys": (2, 1, 2, 40, 10, 16, None, 0.1),
        "few queries": (1, 2, 2, 10, 70, 16, None, 0.1),
        "window": (1, 1, 2, 49, 49, 32, (7, 7, 1), 0.1),
    },
    {"two scales": (2, [(20, 5, 4), (8, 3, 3)], (9, 7))},
    {"prompts": (1, 3, 40, 32, 2)},
)


class Case:
    """One row: what is compared and timed.

    row: "operation shape dtype", the name by which "auto" finds the verdict. candidates: {name:
    function without arguments}. tensors: those whose gradients are compared. exact: the formula in
    float64 on the same numbers, and its tensors. own_mask: with the dropout mask of the kernel,
    which the other candidates do not share.
    """

    def __init__(self, row, title, candidates, tensors, exact, exact_tensors, own_mask=False):
        self.row, self.title, self.own_mask = row, title, own_mask
        self.candidates, self.tensors = candidates, tensors
        self.exact, self.exact_tensors = exact, exact_tensors


def double(tensors):
    """Copies in float64 that take gradients."""
    return [x.detach().double().requires_grad_() for x in tensors]


def compiled(function):
    """torch.compile of a function for one shape."""
    return torch.compile(function, dynamic=False)


def attention_case(name, shape, dtype, device):
    _, _, H, N, M, D, window, dropout_p = shape
    tensors = [x.requires_grad_() for x in bench.attention_inputs(shape, dtype, device)]
    forbidden = None if window is None else neighbours(*window).to(device)
    options = dict(window=window, dropout_p=dropout_p, seed=1)
    candidates = {}
    for backend in ("triton", "torch"):
        function = functools.partial(cross_attention, backend=backend, **options)
        candidates[backend] = functools.partial(function, *tensors)

    def eager(q, k, v):
        return attention_formula(q, k, v, D**-0.5, forbidden)

    exact_tensors = double(tensors)
    exact = functools.partial(eager, *exact_tensors)
    if dropout_p == 0:
        candidates["eager"] = functools.partial(eager, *tensors)
        candidates["compile"] = functools.partial(compiled(eager), *tensors)
    else:  # the formula with the mask that the kernel draws
        B = max(len(tensors[0]), len(tensors[1]))
        factor = own_mask((B, H, N, M, D), dropout_p, device).double() / (1 - dropout_p)

        def exact():
            q, k, v = exact_tensors
            scores = D**-0.5 * q @ k.transpose(-2, -1)  # (B, H, N, M)
            if forbidden is not None:
                scores = scores.masked_fill(forbidden, -torch.inf)
            return (scores.softmax(dim=-1).nan_to_num(0.0) * factor) @ v

    row = f"cross_attention {H}x{N}x{M}x{D} {dtype_name(dtype)}"
    title = f"{name}, dropout {dropout_p}"
    return [Case(row, title, candidates, tensors, exact, exact_tensors, own_mask=dropout_p > 0)]


def own_mask(shape, dropout_p, device):
    """The weights that the kernel keeps with seed 1, (B, H, N, M) bool: equal scores, one-hot
    values."""
    B, H, N, M, D = shape
    q, k = torch.zeros(B, H, N, D, device=device), torch.zeros(B, H, M, D, device=device)
    kept = []
    for start in range(0, M, D):
        width = min(D, M - start)
        v = torch.zeros(B, H, M, D, device=device)
        v[:, :, start : start + width, :width] = torch.eye(width, device=device)
        o = cross_attention(q, k, v, dropout_p=dropout_p, seed=1, backend="triton")
        kept.append(o[..., :width] > 0)
    return torch.cat(kept, dim=-1)


def cosine_cases(name, shape, dtype, device):
    B, scales, size = shape
    teachers, students = [], []
    for scale in scales:
        t = torch.randn(B, *scale, device=device)
        teachers.append(t.to(dtype))
        students.append((t + 0.5 * torch.randn_like(t)).to(dtype).requires_grad_())
    exact_teachers, exact_students = double(teachers), double(students)
    row = f"cosine {'+'.join(shape_name(s.shape) for s in students)} {dtype_name(dtype)}"
    functions = {
        "map": (
            functools.partial(cosine_map, size=size),
            functools.partial(cosine_map_formula, size=size),
        ),
        "weighted map": (
            functools.partial(cosine_map, size=size, power=0.25),
            functools.partial(cosine_map_formula, size=size, power=0.25),
        ),
        "flat loss": (cosine_loss, cosine_loss_formula),
        "loss by location": (
            functools.partial(cosine_loss, flat=False),
            functools.partial(cosine_loss_formula, flat=False),
        ),
    }
    cases = []
    for kind, (ours, formula) in functions.items():
        exact = functools.partial(formula, exact_teachers, exact_students)
        if kind.endswith("map"):
            formula = torch.no_grad()(formula)
            exact = torch.no_grad()(exact)
        candidates = {
            "triton": functools.partial(ours, teachers, students, backend="triton"),
            "torch": functools.partial(ours, teachers, students, backend="torch"),
            "eager": functools.partial(formula, teachers, students),
            "compile": functools.partial(compiled(formula), teachers, students),
        }
        cases.append(Case(row, f"{name}, {kind}", candidates, students, exact, exact_students))
    return cases


def few_token_cases(name, shape, dtype, device):
    B, tokens, positions, width, heads = shape
    if width > WIDEST[dtype == torch.float32]:
        return []  # the PyTorch path's
    parts = [torch.nn.LayerNorm(width) for _ in range(2)]
    parts += [torch.nn.Linear(width, width) for _ in range(4)]
    parts = [part.to(device, dtype) for part in parts]
    exact_parts = [copy.deepcopy(part).double() for part in parts]
    few = torch.randn(B, tokens, width, device=device).to(dtype).requires_grad_()
    many = torch.randn(B, positions, width, device=device).to(dtype).requires_grad_()
    exact_few, exact_many = double((few, many))
    R = heads * tokens
    cases = []
    for who, pair, exact_pair, key in (
        ("prompts read", (few, many), (exact_few, exact_many), f"tokens{R}x{positions}x{width}"),
        ("image reads", (many, few), (exact_many, exact_few), f"map{positions}x{R}x{width}"),
    ):
        inputs = (*pair, *parts, heads)
        candidates = {
            "triton": functools.partial(few_token_attention, *inputs, backend="triton"),
            "torch": functools.partial(few_token_attention, *inputs, backend="torch"),
            "eager": functools.partial(few_token_formula, *inputs),
            "compile": functools.partial(compiled(few_token_formula), *inputs),
        }
        exact = functools.partial(few_token_formula, *exact_pair, *exact_parts, heads)
        row = f"few_token_attention {key} {dtype_name(dtype)}"
        cases.append(Case(row, f"{name}, {who}", candidates, pair, exact, exact_pair))
    return cases


def cases(shapes, dtype, device):
    """All cases of (attention, cosine, few tokens) shapes, built one by one."""
    for build, family in zip((attention_case, cosine_cases, few_token_cases), shapes):
        for name, shape in family.items():
            yield from build(name, shape, dtype, device)


# --------------------------------------------------------------------------------------------------
# Proof and time
# --------------------------------------------------------------------------------------------------


def results(function, tensors):
    """The output, and the gradients of its product with fixed numbers if it has any."""
    out = function()
    if not out.requires_grad:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).cos().view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights.to(out.dtype))]


def prove(case, dtype, which="triton"):
    """Raise AssertionError unless a candidate gives what the formula gives in float64, gradients
    too."""
    expected = results(case.exact, case.exact_tensors)
    compare(results(case.candidates[which], case.tensors), expected, dtype)


def times(function, tensors):
    """{"gpu": median ms, "host": ms until the CPU has issued it} of forward and backward
    together."""
    from triton.testing import do_bench

    run = functools.partial(results, function, tensors)
    gpu = do_bench(run, return_mode="median")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        run()
    host = (time.perf_counter() - start) / 20
    torch.cuda.synchronize()
    return {"gpu": gpu, "host": 1e3 * host}


def judge(case, dtype, timed):
    """One row of the result: dict(row, title, verdict, and, if timed, ms)."""
    record = {"row": case.row, "title": case.title}
    try:
        prove(case, dtype)
    except AssertionError as error:
        return record | {"verdict": "wrong", "why": str(error)}
    except Exception as error:  # whatever the compiler or the driver says belongs into the report
        return record | {"verdict": "fails", "why": f"{type(error).__name__}: {error}"[:500]}
    if not timed:
        return record | {"verdict": "right"}
    record["ms"] = {}
    for name, function in case.candidates.items():
        torch._dynamo.reset()  # else torch.compile falls back to eager after eight shapes
        try:
            if name != "triton" and not case.own_mask:
                prove(case, dtype, name)
            record["ms"][name] = times(function, case.tensors)
        except Exception as error:
            record.setdefault("not timed", {})[name] = f"{type(error).__name__}: {error}"[:200]
    ms = record["ms"]
    if "triton" not in ms or "torch" not in ms:
        return record | {"verdict": "right"}
    slower = ms["triton"]["gpu"] > ms["torch"]["gpu"]
    return record | {"verdict": "slower" if slower else "faster"}


def describe(record):
    """A line for the screen."""
    line = f"{record['verdict']:7} {record['row']}: {record['title']}"
    for name, ms in record.get("ms", {}).items():
        line += f" | {name} {ms['gpu']:.3f} (host {ms['host']:.3f})"
    return line + (f" | {record['why']}" if "why" in record else "")


def machine():
    """dict: card, capability, driver, versions, C compiler."""
    facts = {
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "python": platform.python_version(),
        "compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
    }
    if torch.cuda.is_available():
        facts["card"] = torch.cuda.get_device_name()
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["cuda"], facts["hip"] = torch.version.cuda, torch.version.hip
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def without_dropout(shapes):
    return {name: (*shape[:-1], 0.0) for name, shape in shapes.items()}


def on_gpu():
    """The records of this card, printed as they come."""
    records = []
    with_dropout = {name: shape for name, shape in bench.ATTENTION.items() if shape[-1] > 0}
    families = [
        (without_dropout(bench.ATTENTION), bench.COSINE, bench.FEW_TOKENS),
        (with_dropout, {}, {}),
    ]
    for dtype in bench.DTYPES:
        for shapes in families:
            for case in cases(shapes, dtype, "cuda"):
                records.append(judge(case, dtype, timed=True))
                print(describe(records[-1]), flush=True)
    return records


def interpreted():
    """The records of small cases in the interpreter; bf16 matrices it cannot multiply."""
    records = []
    for dtype in (torch.float32, torch.float16):
        for shapes in ((without_dropout(SMALL[0]), *SMALL[1:]), (SMALL[0], {}, {})):
            for case in cases(shapes, dtype, "cpu"):
                records.append(judge(case, dtype, timed=False))
                print(describe(records[-1]), flush=True)
    return records


def without_gpu(file):
    """What can be done without a card; returns the exit status."""
    rows = 2 * len(bench.ATTENTION) + 3 * len(bench.COSINE) + 2 * len(bench.FEW_TOKENS)
    print(
        f"No CUDA device. On one this would prove and time about {rows} rows in each of "
        f"{len(bench.DTYPES)} dtypes."
    )
    if not HAS_TRITON:
        print("Triton is not installed: there is nothing to run.")
        return 0
    print("Small cases in the interpreter, against float64:", flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "kernels.check"]
    command += ["--json", str(file)] if file else []
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"})
    if reason := aot.unavailable():
        print(f"Nothing was compiled: {reason}.")
        return done.returncode
    print("Compiled:", flush=True)
    spilled = False
    for arch in aot.ARCHS:
        shape = bench.ATTENTION["ROADS 64x64, image reads"]
        kernels = bench.compile_attention(shape, torch.float16, arch)
        kernels += bench.compile_cosine(next(iter(bench.COSINE.values())), torch.float16, arch)
        for kernel in kernels:
            used = aot.usage(kernel)
            spilled |= used["stack"] > 0
            print(
                f"sm_{arch} {used['name']}: {used['registers']} registers, {used['stack']} bytes "
                f"spilled, {used['shared']} bytes of shared memory",
                flush=True,
            )
    return 1 if spilled else done.returncode


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    file = parser.parse_args().json
    file = file.absolute() if file else None
    if file:
        try:
            check_place(file)
        except UsageError as error:
            print(f"kernels.check: --json {error}", file=sys.stderr)
            return 2
    if not torch.cuda.is_available() and not INTERPRET:
        return without_gpu(file)
    torch.manual_seed(0)
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    records = on_gpu() if torch.cuda.is_available() else interpreted()
    counts = {}
    for record in records:
        counts[record["verdict"]] = counts.get(record["verdict"], 0) + 1
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if file:
        content = json.dumps({"machine": facts, "rows": records}, indent=1) + "\n"
        write_atomic(file, content.encode())
        print(f"written to {file}")
    if torch.cuda.is_available() and counts.get("slower"):
        print(f'for "auto" to take PyTorch where it is faster: {results_file(facts["card"])}')
    return 1 if counts.get("wrong") or counts.get("fails") else 0


if __name__ == "__main__":
    from common.options import exit_with

    exit_with(main)
