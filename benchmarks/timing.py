"""Time calls in turns, in this process or each in its own process, and print the results."""

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
    """A call in a separate process, with its own allocator, threads and peak memory.

    ``make`` is pickled and makes the call in that process. Calling this object runs the call and waits for it. ``warm_up`` is
    the duration of the first run in seconds.
    """

    def __init__(self, make: Callable[[], Call]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs))  # not a daemon: it may start loader processes
        self._process.start()
        theirs.close()
        self.warm_up = self._receive()

    def __call__(self) -> None:
        self._pipe.send("call")
        self._receive()

    def peak_memory(self) -> float:
        """Peak resident memory of a call, minus the resident memory before the first call, in MiB."""
        self._pipe.send("peak")
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> float:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process that runs the call has ended: see its error above") from None


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
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        call()
        pipe.send(resident("VmHWM") - before if wish == "peak" else 0.0)


def resident(key: str) -> float:
    """Resident memory of this process in MiB: "VmRSS" is the current value, "VmHWM" the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def interleaved(calls: Mapping[str, Call], repeats: int, *, rest: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call. The calls take turns, after one warm-up turn, with ``rest`` seconds before each call."""
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
    """How many times faster ``fast`` is than ``slow``: the median over turns."""
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def arguments(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that the benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=repeats, help="turns, after one warm-up turn")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, as in benchmarks/results.md")
    return parser


def show(args: argparse.Namespace, title: str, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Print a table with its title and what it was measured on."""
    print(f"### {title}\n" if args.markdown else title)
    print(f"{machine()}; {args.repeats} repeats{'.' if args.markdown else ''}\n")
    print(tabulate(lines, header, tablefmt="github" if args.markdown else "simple", disable_numparse=True), end="\n\n")


def machine() -> str:
    """The date, the processor and the version of torch of a measurement."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return f"{datetime.date.today()}, {torch.get_num_threads()} threads of {cpu}, torch {torch.__version__}"
