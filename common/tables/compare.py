"""Finished runs side by side, whether or not they are rows of a table: accuracy and, if it was measured, cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from ..experiments.files import read_json
from ..experiments.results import NAME, RunResult
from .rows import Kinds

_HEADER = ("run", "seed", "final", "best", "parameters", "non-zeros", "M multiply-adds", "ms at batch 1", "ms at batch 128")


def line(directory: Path, known: Kinds) -> list[str]:
    """The cells of a run, with the cost from its measure.json. Raises ValueError if a file is missing or malformed."""
    if not (directory / NAME).exists():
        raise ValueError(f"{directory} has no result.json: it is not a finished run")
    result = RunResult.load(directory / NAME)
    result.check(known)
    cells = [result.row or str(directory), str(result.seed), f"{result.final:.2f}", f"{result.best:.2f}"]
    if not (directory / "measure.json").exists():
        return [*cells, f"{int(result.parameters['compressed']):,}", "-", "-", "-", "-"]
    try:
        cost = read_json(directory / "measure.json")["models"]["as trained"]
        one, many = cost["batch1"], cost["batch128"]
        times = [f"{at['latency'] * 1e3:.1f}" for at in (one, many)]
        return [*cells, f"{cost['parameters']:,}", f"{cost['nonzero']:,}", f"{one['multiply_adds'] / 1e6:.1f}", *times]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / 'measure.json'} has a missing or malformed field: {error}") from error


def table(directories: Sequence[Path], known: Kinds) -> str:
    """A Markdown table with a line per run."""
    align = ("left", *["right"] * (len(_HEADER) - 1))
    lines = [line(directory, known) for directory in directories]
    return tabulate(lines, _HEADER, tablefmt="github", disable_numparse=True, colalign=align)
