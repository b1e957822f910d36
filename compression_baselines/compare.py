"""Finished runs beside each other: python compression_baselines/compare.py RUN... prints accuracy and measured cost.

A run is a directory with result.json and, for its cost, measure.json: written by --measure, or by measure.py CHECKPOINT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from common.runs import FlagParser, clean_errors, read_json
from common.tables.collect import parse

HEADER = ("run", "final", "best", "parameters", "non-zeros", "M multiply-adds", "ms at batch 1", "ms at batch 128")


def line(directory: Path) -> list[str]:
    """The cells of a run; raises ValueError where its result is missing or garbled."""
    if not (directory / "result.json").exists():
        raise ValueError(f"{directory} holds no result.json: it is not a finished run")
    result = parse(directory / "result.json")
    cells = [directory.name, f"{result.final:.2f}", f"{result.best:.2f}"]
    if not (directory / "measure.json").exists():
        return [*cells, "-", f"{result.parameters['compressed']:,}", "-", "-", "-"]
    cost = read_json(directory / "measure.json")["models"]["as trained"]
    one, many = cost["batch1"], cost["batch128"]
    times = [f"{at['latency'] * 1e3:.1f}" for at in (one, many)]
    return [*cells, f"{cost['parameters']:,}", f"{cost['nonzero']:,}", f"{one['multiply_adds'] / 1e6:.1f}", *times]


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(prog="compression_baselines/compare.py", description="Finished runs beside each other.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
    args = parser.parse_args(argv)
    with clean_errors(parser.prog):
        rows = [line(run) for run in args.runs]
    align = ("left", *["right"] * (len(HEADER) - 1))
    print(tabulate(rows, HEADER, tablefmt="github", disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
