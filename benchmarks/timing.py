"""Timing calls side by side, in this process or each in one of its own, and printing what was found."""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from common.experiments.config import positive_int

Call = Callable[[], Any]


class IsolatedCall:
    """A call in a process of its own, with its own allocator, threads and peak memory.

    ``make`` is pickled, and makes the call there. Calling this makes that call and waits for it; ``warm_up`` is how long
    the first one took, in seconds.
    """

    def __init__(self, make: Callable[[], Call]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs))  # no daemon: it may start loader processes
        self._process.start()
        theirs.close()
        self.warm_up = self._receive()

    def __call__(self) -> None:
        self._pipe.send("call")
        self._receive()

    def peak_memory(self) -> float:
        """Most resident memory of a call beyond what was there before the first one, in MiB."""
        self._pipe.send("peak")
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> float:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process that makes the call ended: see its error above") from None


def _serve(make: Callable[[], Call], pipe: Connection) -> None:
    call = make()
    before = resident("VmRSS")
    started = time.perf_counter()
    call()
    pipe.send(time.perf_counter() - started)
    while True:
        try:
            wish = pipe.recv()
        except EOFError:
            return
        if wish == "peak":
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        call()
        pipe.send(resident("VmHWM") - before if wish == "peak" else 0.0)


def resident(key: str) -> float:
    """Memory of this process in MiB: "VmRSS" now, "VmHWM" at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def interleaved(calls: Mapping[str, Call], repeats: int, *, rest: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns, after one turn of warming up, with ``rest`` seconds between turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            time.sleep(rest)
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(seconds: list[float]) -> str:
    """Median and range in milliseconds."""
    digits = 0 if statistics.median(seconds) > 0.02 else 2
    low, middle, high = (f"{1e3 * each:.{digits}f}" for each in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle} ({low} to {high})"


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster, as the median over turns."""
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def arguments(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser of the flags that the benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=repeats, help="turns, after one of warming up")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, as benchmarks/results.md holds")
    return parser


def show(args: argparse.Namespace, title: str, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Print a table under its title, and what it was measured on."""
    print(f"### {title}\n" if args.markdown else title)
    print(f"{machine()}; {args.repeats} repeats{'.' if args.markdown else ''}\n")
    print(tabulate(lines, header, tablefmt="github" if args.markdown else "simple", disable_numparse=True), end="\n\n")


def machine() -> str:
    """What the figures were measured on, and when."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return f"{datetime.date.today()}, {torch.get_num_threads()} threads of {cpu}, torch {torch.__version__}"
