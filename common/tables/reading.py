"""Reads finished results, and finds them by the identity of the configuration that they store."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..experiments.results import NAME, RunResult
from .rows import Key, Kinds, Program, Row, Table, keys


def read(directory: Path, known: Kinds) -> tuple[list[RunResult], list[str]]:
    """The valid results below a directory, and a message for each invalid one."""
    results, problems = [], []
    for path in sorted(directory.rglob(NAME)):
        try:
            result = RunResult.load(path)
            result.check(known)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            results.append(result)
    return results, problems


_DATA = {"train", "valid", "val", "dev", "test", "data"}  # inputs that are data: the whole name, or its part before a slash


def _data(run: RunResult) -> dict[str, str]:
    """Digests of the data of a run: all its inputs except the checkpoints that it starts from."""
    return {name: digest for name, digest in run.inputs.items() if name.partition("/")[0] in _DATA}


def epochs_of(result: RunResult) -> list[dict[str, Any]]:
    """The records of whole epochs in the run's metrics.jsonl."""
    path = result.path.with_name("metrics.jsonl")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # half written when the process died
            records.append(json.loads(line))
    return [record for record in records if not record.get("partial")]


class Results:
    """Finished runs of some programs, indexed by row.

    Two runs of one configuration and seed count once; :meth:`check` refuses them if they were made from different files.
    """

    def __init__(self, runs: Iterable[RunResult], known: Kinds) -> None:
        self.runs = [(run, keys(run.config, known, run.script)) for run in runs]
        self._found: dict[Key, dict[int, RunResult]] = {}
        self._of_other_files: dict[Key, tuple[RunResult, RunResult]] = {}
        for run, found in self.runs:
            for key in found:
                other = self._found.setdefault(key, {}).setdefault(run.seed, run)
                if other.inputs != run.inputs:
                    self._of_other_files[key] = other, run

    def of(self, program: Program, row: Row) -> list[RunResult]:
        """The results that count for a row, ordered by seed. Their configuration is exactly the row's."""
        found = self._found.get(program.key(row), {})
        return [found[seed] for seed in sorted(found) if seed in row.seeds or not program.own_seeds]

    def outdated(self, program: Program, table: Table) -> list[RunResult]:
        """The results that name a row of the table but have another configuration."""
        wanted = {f"{table.id}/{row.id}": program.key(row) for row in table.rows}
        return [run for run, found in self.runs if run.row in wanted and wanted[run.row] not in found]

    def of_no_row(self, programs: Iterable[Program]) -> list[RunResult]:
        """The results that no row of the programs counts."""
        wanted = {program.key(row) for program in programs for table in program.tables for row in table.rows}
        return [run for run, found in self.runs if wanted.isdisjoint(found)]

    def check(self, program: Program, table: Table) -> None:
        """Raise ValueError if two results name the same row and seed of the table but have different configurations.

        Also raise it if two results of one row and seed were made from different files, or if the table would compare runs on
        different files. This matters for ``--data imagefolder`` and for prepared text; other data sets are part of the
        configuration.
        """
        wanted = {program.key(row) for row in table.rows}
        for key in wanted & self._of_other_files.keys():
            one, other = self._of_other_files[key]
            raise ValueError(
                f"two results of one configuration and seed {one.seed} were made from different files: "
                f"{one.path} and {other.path}; move one of them away"
            )
        first: RunResult | None = None
        for run, found in self.runs:
            if not wanted.isdisjoint(found):
                first = first or run
                if _data(first) != _data(run):
                    raise ValueError(
                        f"table {table.id} has runs on different data: {first.path} and {run.path}; move one of them away"
                    )
        claims: dict[tuple[str, int], tuple[RunResult, list[Key]]] = {}
        for run, found in self.runs:
            if found and run.row is not None and run.row.startswith(f"{table.id}/"):
                other, others = claims.setdefault((run.row, run.seed), (run, found))
                if set(others).isdisjoint(found):
                    raise ValueError(
                        f"two results of row {run.row} and seed {run.seed} have different configurations: "
                        f"{other.path} and {run.path}; move one of them away"
                    )
