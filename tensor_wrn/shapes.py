"""Shapes of the 3-way tensors as which the weights of 1x1 convolutions are read; loads without torch."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

RULES = ("released", "nearest")
Shape = tuple[int, int, int]


def split(count: int, rule: str = "released") -> Shape:
    """Shape of the tensor as which ``count`` weights are read: three factors of the count, near its cube root.

    "released":  each of the first two is the smallest divisor of the remaining count that is at least the rounded cube root;
                 the last is the rest. This is the rule of the released code (its models/decomposed.py, which is that of
                 github.com/BayesWatch/deficient-efficient, lines 13-46).
    "nearest":   the first is the divisor nearest to the cube root. The last is the divisor of the rest that is nearest to the
                 square root of the rest.
    """
    assert rule in RULES, rule
    if rule == "nearest":
        first = _nearest_divisor(count, count ** (1 / 3))
        rest = count // first
        last = _nearest_divisor(rest, math.sqrt(rest))
        return first, rest // last, last
    wish = round(count ** (1 / 3))
    first = _divisor_from(count, wish)
    second = _divisor_from(count // first, wish)
    return first, second, count // first // second


def _divisor_from(count: int, least: int) -> int:
    """The smallest divisor of ``count`` that is at least ``least``, or ``count`` if that is smaller."""
    return next(divisor for divisor in range(min(least, count), count + 1) if count % divisor == 0)


def _nearest_divisor(count: int, wish: float) -> int:
    divisors = [divisor for low in range(1, math.isqrt(count) + 1) if count % low == 0 for divisor in (low, count // low)]
    return min(divisors, key=lambda divisor: (abs(divisor - wish), divisor))


def stage_channels(width: float) -> tuple[int, int, int, int]:
    """Channels of a WideResNet: after its first convolution, and of each of its stages."""
    return 16, int(16 * width), int(32 * width), int(64 * width)


@cache
def alike(width: float) -> bool:
    """Whether both rules give a WideResNet of this width the same tensors."""
    channels = stage_channels(width)
    pairs = [*pairwise(channels), *((count, count) for count in channels[1:])]
    return all(len({split(inputs * outputs, rule) for rule in RULES}) == 1 for inputs, outputs in pairs)
