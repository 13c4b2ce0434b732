"""What a step takes beside other busy programs: OpenMP's threads that spin at barriers, and threads that give way.

    python -m tests.bench_stall                      all scripts, quiet and beside one and two busy processes
    python -m tests.bench_stall --only cada --busy 0 1

Laptop presets, milliseconds of a clock on the wall, median of --steps steps (fewer where ten seconds are over before),
each case in a process of its own. "before": nothing said, so that GNU's OpenMP spins for milliseconds. "after": as the
scripts start since `options.before_torch` makes the threads wait briefly (GOMP_SPINCOUNT=1000). Run it on a machine
that is otherwise quiet: every other program is one more busy process.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 10  # seconds of steps


@contextlib.contextmanager
def busy(number):
    """That many processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def times(name, threads, waits_briefly, steps):
    """Seconds of each step of a method (a key of `bench_methods.METHODS`), in a process of its own."""
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    case = name, str(threads), str(int(waits_briefly)), str(steps)
    words = [sys.executable, "-m", "tests.bench_stall", "--child", *case]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def child(name, threads, waits_briefly, steps):
    if waits_briefly == "1":
        from common import options

        options._wait_briefly()
    import torch

    from tests import bench_methods  # torch

    both = bench_methods.pair(name, "laptop", 4)
    torch.set_num_threads(int(threads))
    both.step()
    found, began = [], time.monotonic()
    while len(found) < int(steps) and (len(found) < 3 or time.monotonic() < began + LIMIT):
        start = time.monotonic()
        both.step()
        found.append(time.monotonic() - start)
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="onenip,omniad,roads,cada", help="methods, separated by commas")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    columns = [f"{number} busy" if number else "quiet" for number in args.busy]
    print(f"ms of a step, {os.cpu_count()} cores; before / after with {args.threads} threads / one thread\n")
    print(f"| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for name in args.only.split(","):
        cells = []
        for number in args.busy:
            with busy(number):
                cases = [(args.threads, False), (args.threads, True), (1, True)]
                found = [statistics.median(times(name, *case, args.steps)) for case in cases]
            cells.append(" / ".join(f"{1000 * seconds:.0f}" for seconds in found))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
