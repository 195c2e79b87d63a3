"""Root of an increasing function of a positive number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

# A Newton step this small, relative to x, leaves an error of about its square.
_STEP = 1e-8
_WIDTH = 1e-14
# On a logarithmic scale. Newton steps from where the slope is tiny go astray.
_LONGEST = math.log(64)


class Root(NamedTuple):
    """Where the search ended."""

    x: float
    converged: bool
    n_iterations: int


def find_root(
    evaluate: Callable[[float], tuple[float, float]], start: float, max_iterations: int = 200
) -> Root:
    """Find the root by Newton steps that may not leave a shrinking bracket.

    The bracket starts as all positive numbers. A Newton step is taken if it leads into the bracket
    and is at most half as long, on a logarithmic scale, as the step before the last. Instead of any
    other, the bracket is halved on that scale or, as long as an end of it is missing, a step is
    taken whose length doubles each time: a start that is wrong by many orders of magnitude costs
    few evaluations.

    Args:
        evaluate: Returns the value at x and the Newton step relative to x, NaN if there is none.
        start: First x, > 0.
        max_iterations: Evaluations at most.

    Returns:
        The root; not converged if evaluations or floating-point numbers ran out.
    """
    lower, upper, x = 0.0, math.inf, start
    last, before_last, octaves = math.inf, math.inf, 1.0
    for iteration in range(1, max_iterations + 1):
        value, step = evaluate(x)
        if value == 0:
            return Root(x, True, iteration)
        lower, upper = (x, upper) if value < 0 else (lower, x)
        newton = x * (1 + step)
        if abs(step) <= _STEP or upper <= lower * (1 + _WIDTH):
            return Root(newton if lower <= newton <= upper else x, True, iteration)
        length = abs(math.log(newton / x)) if lower < newton < upper else math.inf
        if length <= min(before_last / 2, _LONGEST):
            following = newton
        elif lower > 0 and upper < math.inf:
            following = math.sqrt(lower) * math.sqrt(upper)
        else:
            following = x * 2.0 ** (octaves if value < 0 else -octaves)
            octaves = min(2 * octaves, 256.0)
        if not 0 < following < math.inf:
            return Root(x, False, iteration)
        last, before_last = abs(math.log(following / x)), last
        x = following
    return Root(x, False, max_iterations)
