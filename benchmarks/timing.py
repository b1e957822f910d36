"""Timing calls side by side in one process."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns, after one turn of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(seconds: list[float]) -> str:
    """Median and range in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.0f} ({min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f})"


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster, as the median over turns."""
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def machine() -> str:
    """What the figures were measured on."""
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, torch {torch.__version__}"
