"""Fourteen exercises: a formula, its shapes, and a function to write.

    python -m docs.exercises                what there is, in the order of the course
    python -m docs.exercises auroc          checks what you wrote into docs/exercises/auroc.py

Write the function in place of its `...`. It is held to the project's own function, which each file
calls as `reference`; look there only afterwards. What is wrong is said in one line: the shape, the
value and its place, or the gradient. Every case has a name, and the name says what it is about.

This module is the checker. An exercise is a module with
    the function    of the module's name
    reference       the project's own function, of the same arguments
    cases()         yields (name of the case, arguments)
    RETURNS         names of the results, if there are several
    given           what the function gets, made of these arguments, if it is not themselves
"""

import copy

import numpy as np
import torch
from torch import nn

ORDER = (
    "auroc",
    "average_precision",
    "aupro",
    "cosine_map",
    "cosine_loss",
    "neighbour_mask",
    "dynamic_prompt",
    "cutpaste",
    "learned_queries",
    "read_prompts",
    "adain",
    "calibrate",
    "online_softmax",
    "merge_splits",
)
TOLERANCE = 1e-4  # of a value, relative to the largest one expected


def failure(exercise):
    """The first thing that is wrong with an exercise's function, in one line; None: nothing is.

    exercise: the module. Whatever the function raises is raised.
    """
    function = getattr(exercise, exercise.__name__.rsplit(".", 1)[-1])
    for name, arguments in exercise.cases():
        wrong = failure_of_case(exercise, function, arguments)
        if wrong:
            return f"case '{name}': {wrong}"
    return None


def failure_of_case(exercise, function, arguments):
    before = given(exercise, arguments)
    after = copy.deepcopy(before)
    own = function(*after)
    if own is None or own is Ellipsis:
        return "the function returns nothing yet"
    expected = exercise.reference(*copy.deepcopy(arguments))
    names = getattr(exercise, "RETURNS", ("the result",))
    if len(names) == 1:
        own, expected = (own,), (expected,)
    if not isinstance(own, (tuple, list)) or len(own) != len(names):
        return f"should return {len(names)} things: {', '.join(names)}"
    for name, mine, right in zip(names, own, expected):
        wrong = difference(name, mine, right)
        if wrong:
            return wrong
    return failure_of_gradients(exercise, function, arguments) or change(before, after)


def given(exercise, arguments):
    """What the function gets."""
    if hasattr(exercise, "given"):
        return exercise.given(*arguments)
    return arguments


def difference(name, own, expected):
    """How `own` differs from `expected` (numbers, arrays, tensors): one line, or None."""
    own, expected = array(own), array(expected)
    if own is None:
        return f"{name} should be a number, an array or a tensor"
    if own.shape != expected.shape:
        return f"{name} has shape {own.shape}, expected {expected.shape}"
    if (own.dtype == bool) != (expected.dtype == bool):
        return f"{name} has type {own.dtype}, expected {expected.dtype}"
    own, expected = own.astype(np.float64), expected.astype(np.float64)
    # gradients that are zero but for rounding must not be compared with one another
    allowed = TOLERANCE * max(0.01, np.abs(expected).max(initial=0))
    wrong = ~(np.abs(own - expected) <= allowed)  # ~: NaN is wrong, too
    if not wrong.any():
        return None
    place = np.unravel_index(wrong.argmax(), wrong.shape)  # the first one
    where = f" at {[int(i) for i in place]}" if wrong.ndim else ""
    count = f" ({wrong.sum()} of {wrong.size} values differ)" if wrong.size > 1 else ""
    return f"{name}{where} is {own[place]:.6g}, expected {expected[place]:.6g}{count}"


def array(value):
    """As a numpy array; None if it is nothing of the kind."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        return np.asarray(value)
    return None


def failure_of_gradients(exercise, function, arguments):
    """What is wrong with the gradients, if any argument wants one; None: nothing is."""
    names = [name for name, _ in wanting_gradients(arguments)]
    if not names:
        return None
    own = gradients(function, arguments)
    if own is None:
        return "no gradient reaches the arguments: compute with tensors throughout"
    for name, mine, right in zip(names, own, gradients(exercise.reference, arguments)):
        if right is None:
            continue
        if mine is None:
            return f"the gradient of {name} is missing"
        wrong = difference(f"the gradient of {name}", mine, right)
        if wrong:
            return f"the values are right, but {wrong}"
    return None


def gradients(function, arguments):
    """Of a weighted sum of the results, with respect to all that wants a gradient; None: the results
    depend on nothing that does."""
    arguments = copy.deepcopy(arguments)
    results = function(*arguments)
    if isinstance(results, torch.Tensor):
        results = [results]
    total = 0.0
    for result in results:
        weights = torch.linspace(0.5, 1.5, result.numel()).view(result.shape)  # all different
        total = total + (result * weights).sum()
    if not total.requires_grad:
        return None
    inputs = [tensor for _, tensor in wanting_gradients(arguments)]
    return torch.autograd.grad(total, inputs, allow_unused=True)


def wanting_gradients(arguments):
    """[(name, tensor)] of the tensors, tensors in lists, and parameters of modules that need one."""
    found = []
    for number, argument in enumerate(arguments, 1):
        if isinstance(argument, nn.Module):
            found += [(f"its parameter {name}", p) for name, p in argument.named_parameters()]
        elif isinstance(argument, list):
            found += [(f"argument {number}[{i}]", t) for i, t in enumerate(argument)]
        elif isinstance(argument, torch.Tensor):
            found.append((f"argument {number}", argument))
    return [(name, tensor) for name, tensor in found if tensor.requires_grad]


def change(before, after):
    """Which argument the function has changed, in one line; None: no array, no tensor."""
    for number, (old, new) in enumerate(zip(before, after), 1):
        old, new = array(old), array(new)
        if old is not None and not np.array_equal(old, new):
            return f"the result is right, but argument {number} was changed: work on a copy"
    return None
