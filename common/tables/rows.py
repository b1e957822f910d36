"""Rows of tables as data: how each differs from the defaults, what it should give, and what it costs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any

from ..experiments.config import Config, config_hash, identity
from ..experiments.files import ROOT

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+=_-]*")


@dataclass(frozen=True)
class Published:
    """A published number to compare a row with."""

    value: float
    source: str  # where it was found, and whether it is the paper's own


@dataclass(frozen=True)
class Row:
    """One configuration of a program, one line of a table.

    flags:       flags that differ from the program's defaults, as words of a command line.
    label:       the row in words.
    hours:       rough GPU-hours of one seed, as the authors of the released code estimate them.
    parameters:  expected number of parameters.
    published:   number to compare with; None prints as n/a.
    script:      the program's file that runs the row.
    after:       a row that must run first, which the script ensures; ``{after}`` in the flags is the folder of its result.
    table:       id of the row's own table, if the row is the ``after`` of a row of another table.
    place:       line and column of the row in the paper's layout of the table, if it has one.
    """

    id: str
    label: str
    flags: tuple[str, ...]
    hours: float = 0.0
    parameters: int | None = None
    published: Published | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    script: str = "train.py"
    after: Row | None = None
    place: tuple[str, str] | None = None
    table: str = ""

    def __post_init__(self) -> None:
        if not SAFE.fullmatch(self.id):
            raise ValueError(f"row id {self.id!r} is not a safe file name: use letters, digits and . + = _ -")
        if not isinstance(self.flags, tuple) or not all(isinstance(word, str) for word in self.flags):
            raise ValueError(
                f"the flags of row {self.id!r} must be a tuple of words, such as ('--lr', '0.1'), got {self.flags!r}"
            )

    def chain(self) -> list[Row]:
        """The rows to run for this one, in order; the last is the row itself."""
        before = self.after.chain() if self.after is not None else []
        return [*(replace(row, table=row.table or self.table) for row in before), self]


@dataclass(frozen=True)
class CurveFigure:
    """A figure of metrics by epoch: a panel per metric, a line per row. ``metric/bound`` adds a dotted bound."""

    id: str
    metrics: tuple[str, ...] = ("test_accuracy", "frobenius_norm")


@dataclass(frozen=True)
class SweepFigure:
    """A figure of the final score against ``x``, a number of the configuration, on a log scale.

    ``series`` names the line that a configuration belongs to, and ``panel`` its panel.
    """

    id: str
    x: str
    series: Callable[[Mapping[str, Any]], str]
    panel: Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class ContrastFigure:
    """A figure of the table's contrasts: a point per seed, their mean and its 95 % interval."""

    id: str = "differences"


@dataclass(frozen=True)
class Contrast:
    """A question that the difference between two rows of a table answers, paired over the seeds that both have."""

    question: str
    row: str
    base: str


@dataclass(frozen=True)
class Table:
    """Rows that answer one question together.

    ``id`` names the folder. ``title`` says what the table shows, and ``score`` what its numbers are. They are shown with
    ``decimals`` decimal places.
    """

    id: str
    title: str
    rows: tuple[Row, ...]
    figures: tuple[CurveFigure | SweepFigure | ContrastFigure, ...] = ()
    score: str = "test accuracy in percent"
    contrasts: tuple[Contrast, ...] = ()
    decimals: int = 2

    def __post_init__(self) -> None:
        if not SAFE.fullmatch(self.id):
            raise ValueError(f"table id {self.id!r} is not a safe file name: use letters, digits and . + = _ -")
        ids = [row.id for row in self.rows]
        for row in self.rows:
            if ids.count(row.id) > 1:
                raise ValueError(f"table {self.id!r} has two rows {row.id!r}")
        for contrast in self.contrasts:
            for id in (contrast.row, contrast.base):
                if id not in ids:
                    raise ValueError(f"a contrast of table {self.id!r} names row {id!r}, which it does not have")

    def own_runs(self) -> list[Row]:
        """The rows to start: all except those that another row runs first."""
        before = {each.id for row in self.rows for each in row.chain()[:-1] if each.table in ("", self.id)}
        return [row for row in self.rows if row.id not in before]


@dataclass(frozen=True)
class Program:
    """A subproject: the configurations of its scripts, by file name, and its tables.

    own_seeds:    tables count only the seeds that a row names.
    own_process:  each run needs its own process, because the program changes the state of the process that it runs in.
    """

    name: str
    configs: Mapping[str, type[Config]]
    tables: tuple[Table, ...] = ()
    own_seeds: bool = False
    own_process: bool = False

    def config(self, row: Row) -> Config:
        """The configuration of a row. It is shared: do not change it. Raises ValueError, naming the row, for wrong flags."""
        try:
            return _parse(self.configs[row.script], row.flags)
        except SystemExit as error:  # the parser has printed why
            raise ValueError(f"row {row.id!r} of {self.name} has wrong flags: {' '.join(row.flags)}") from error

    def record(self, row: Row) -> dict[str, Any]:
        """The configuration of a row as its runs store it."""
        return self.config(row).record()

    def config_hash(self, row: Row) -> str:
        """The hash of a row's configuration, which identifies its runs."""
        return self.config(row).config_hash()

    def key(self, row: Row) -> Key:
        """The key by which the runs of a row are found among all runs."""
        return self.name, row.script, self.config_hash(row)

    def command(self, table: Table, row: Row) -> list[str]:
        """Words of the row's command after the interpreter, without the seed."""
        return [
            f"{self.name}/{row.script}",
            *row.flags,
            "--row",
            f"{row.table or table.id}/{row.id}",
            "--row-config",
            self.config_hash(row),
            "--resume",
            "auto",
        ]


@cache
def _parse(kind: type[Config], flags: tuple[str, ...]) -> Config:
    return kind.parse(flags)


Key = tuple[str, str, str]  # program, script and identity of a configuration
Kinds = Mapping[tuple[str, str], type[Config]]  # configurations by program and script


def kinds(found: Sequence[Program]) -> Kinds:
    """The configurations of the programs, by program and script."""
    return {(program.name, script): kind for program in found for script, kind in program.configs.items()}


def keys(record: Mapping[str, Any], known: Kinds, script: str = "") -> list[Key]:
    """The keys by which a stored configuration is found. The hash stored with it does not matter.

    If the script is unknown, as in results of format 1, there is one key for each script of the program. That is safe: because
    of the fields that scripts require, no configuration of one script equals one of another.
    """
    return [
        (program, name, config_hash(identity(kind, record)))
        for (program, name), kind in known.items()
        if program == record.get("program") and script in ("", name)
    ]


def programs(module: str = "rows") -> list[Program]:
    """PROGRAM of every subproject that has the module: ``rows``, with the paper's tables, or ``evidence``.

    Subprojects are those of the clone that contains this file, even if other packages of their names are on the path.
    """
    if __name__.partition(".")[0] != "common":
        raise ValueError(
            f"tables need a clone of the project, where this package is called common: run python -m common.tables in {ROOT}"
        )
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
    found = [import_module(f"{path.parent.name}.{module}").PROGRAM for path in sorted(ROOT.glob(f"*/{module}.py"))]
    if not found:
        raise ValueError(f"there are no programs in {ROOT}: run python -m common.tables in a clone of the project")
    tables = [table.id for program in found for table in program.tables]
    twice = next((id for id in tables if tables.count(id) > 1), None)
    if twice is not None:
        raise ValueError(f"two programs have a table {twice!r}: give each table its own id")
    return found


def select(
    found: Sequence[Program], *, program: str | None = None, table: str | None = None, row: str | None = None
) -> list[Program]:
    """The programs reduced to one program, one table, or the rows whose id matches a shell pattern.

    Raises ValueError, listing the alternatives, if nothing matches.
    """
    if program is not None and program not in [p.name for p in found]:
        raise ValueError(f"there is no program {program!r}: there are {', '.join(p.name for p in found)}")
    found = [p for p in found if program in (None, p.name)]
    ids = [t.id for p in found for t in p.tables]
    if table is not None and table not in ids:
        raise ValueError(f"there is no table {table!r}: there are {', '.join(ids)}")

    def matches(table: Table, each: Row) -> bool:
        return row is None or fnmatchcase(each.id, row) or fnmatchcase(f"{table.id}/{each.id}", row)

    chosen = []
    for p in found:
        tables = [_reduce(t, [r for r in t.rows if matches(t, r)]) for t in p.tables]
        chosen.append(replace(p, tables=tuple(t for t in tables if t.rows and table in (None, t.id))))
    if not any(p.tables for p in chosen):
        where = f" in table {table}" if table is not None else ""
        raise ValueError(f"no row{where} matches {row!r}: python -m common.tables list shows all rows")
    return [p for p in chosen if p.tables]


def _reduce(table: Table, rows: Sequence[Row]) -> Table:
    """The table with only these rows, and the contrasts between them."""
    ids = {row.id for row in rows}
    return replace(table, rows=tuple(rows), contrasts=tuple(c for c in table.contrasts if {c.row, c.base} <= ids))
