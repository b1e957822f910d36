"""Parameter budgets: how many parameters a model has, and which setting of a method comes closest to a target number."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def least_ratio(floor: int, parameters: int) -> float:
    """The smallest ratio of six decimals that leaves at least ``floor`` of ``parameters``, for messages that name a minimum."""
    return math.ceil(1e6 * floor / parameters) / 1e6


def closest_index(count: Callable[[int], int], low: int, high: int, budget: float) -> int:
    """The integer from ``low`` to ``high``, both included, whose count is closest to the budget.

    ``count`` must be monotonic over the range, rising or falling. It is called about log2(high - low) times. The result is the
    first integer whose count reaches the budget (``high`` if none does), or the one before it if that is at least as close. If
    all counts are equal, the result is ``low``.
    """
    count = cache(count)
    if count(low) == count(high):
        return low
    falling = count(low) > count(high)

    def reached(index: int) -> bool:
        return count(index) <= budget if falling else count(index) >= budget

    first = low + bisect_left(range(low, high), True, key=reached)
    return min(max(first - 1, low), first, key=lambda index: abs(count(index) - budget))


def step_midpoints(dimensions: Iterable[int], low: float, high: float) -> list[float]:
    """Midpoints, in ascending order, of the intervals of rank scales between ``low`` and ``high`` in which no rank changes.

    The rank along a dimension d is ``max(1, round(scale * d))``, so it changes from k to k + 1 at the scale (k + 0.5) / d.
    """
    edges = {low, high}
    for dimension in set(dimensions):
        ranks = range(max(1, math.floor(low * dimension)), math.ceil(high * dimension) + 1)
        edges.update(edge for rank in ranks if low < (edge := (rank + 0.5) / dimension) < high)
    return [(left + right) / 2 for left, right in pairwise(sorted(edges))]
