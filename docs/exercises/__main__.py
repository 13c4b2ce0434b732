"""python -m docs.exercises [NAME]: the list of exercises, or the check of one."""

import functools
import importlib
import sys
import traceback

from common.options import exit_with
from docs.exercises import ORDER, failure


def main(words):
    """Exit status: 0 right (or the list), 1 wrong, 2 no such exercise."""
    if not words:
        for number, name in enumerate(ORDER, 1):
            title = importlib.import_module(f"docs.exercises.{name}").__doc__.split("\n")[0]
            print(f"{number:>3}  {name:<18} {title}")
        return 0
    name = words[0]
    if len(words) > 1 or name not in ORDER:
        print(f"exercises: no exercise '{' '.join(words)}': one of {', '.join(ORDER)}", file=sys.stderr)
        return 2
    exercise = importlib.import_module(f"docs.exercises.{name}")
    try:
        wrong = failure(exercise)
    except Exception as error:  # whatever the reader's function raises
        traceback.print_exc()
        wrong = f"it raised {type(error).__name__}, as above"
    if wrong:
        print(f"{name}: {wrong}")
        return 1
    print(f"{name}: right, in {len(list(exercise.cases()))} cases.{what_next(name)}")
    return 0


def what_next(name):
    after = ORDER[ORDER.index(name) + 1 :]
    if not after:
        return " That was the last one."
    return f" Next: {after[0]}."


if __name__ == "__main__":
    exit_with(functools.partial(main, sys.argv[1:]))
