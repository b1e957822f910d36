"""Rows of tables as data: what differs from a recipe, what it should give, and what it costs."""

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
    """A number from elsewhere that a row is compared with."""

    value: float
    source: str  # where it was read, and whether it is the paper's own


@dataclass(frozen=True)
class Row:
    """One configuration of a program, one line of a table.

    flags:       what differs from the program's defaults, as words of a command line.
    label:       the row in words.
    hours:       rough GPU-hours of one seed, as the authors of the released code estimate them.
    parameters:  expected parameter count.
    published:   number to compare with; None prints as n/a.
    script:      the program's file that runs the row.
    after:       a row that must have run before, which the script makes sure of; ``{after}`` in the flags is its directory.
    table:       id of the row's table, where it is the ``after`` of a row of another one.
    place:       line and column of the row in the paper's shape of the table, if it has one.
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

    def chain(self) -> list[Row]:
        """The rows to run for this one, in order; the last is the row itself."""
        before = self.after.chain() if self.after is not None else []
        return [*(replace(row, table=row.table or self.table) for row in before), self]


@dataclass(frozen=True)
class CurveFigure:
    """A figure of metrics against the epoch, a panel each and a line per row; ``metric/bound`` adds a dotted bound."""

    id: str
    metrics: tuple[str, ...] = ("test_accuracy", "frobenius_norm")


@dataclass(frozen=True)
class SweepFigure:
    """A figure of the final score against a number of the configuration, on a log scale.

    ``series`` names the line a configuration belongs to and ``panel`` the panel.
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
    """Rows that are read together.

    ``id`` names its folder, ``title`` says what of the paper it is, ``score`` what counts, shown with so many ``decimals``.
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
        """The rows to start: all but those that another one runs before its own."""
        before = {each.id for row in self.rows for each in row.chain()[:-1] if each.table in ("", self.id)}
        return [row for row in self.rows if row.id not in before]


@dataclass(frozen=True)
class Program:
    """A subproject: the configurations of its scripts, by file name, and its tables.

    own_seeds:    tables count no other seeds than those that a row names.
    own_process:  a row needs a process of its own, because the program leaves the one it ran in changed.
    """

    name: str
    configs: Mapping[str, type[Config]]
    tables: tuple[Table, ...] = ()
    own_seeds: bool = False
    own_process: bool = False

    def config(self, row: Row) -> Config:
        """The configuration of a row. It is shared: do not change it."""
        return _parse(self.configs[row.script], row.flags)

    def record(self, row: Row) -> dict[str, Any]:
        """The configuration of a row as its runs store it."""
        return self.config(row).record()

    def config_hash(self, row: Row) -> str:
        """The identity of a row's runs."""
        return self.config(row).config_hash()

    def key(self, row: Row) -> Key:
        """What finds the runs of a row among all runs."""
        return self.name, row.script, self.config_hash(row)

    def command(self, table: Table, row: Row) -> list[str]:
        """Words of the row's command after the interpreter, without seed."""
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
    """What a stored configuration is found by; its stored hash does not matter.

    Where it is not known which script of its program it is of, as with results of format 1, there is a key for each. That is
    safe: the scripts of a program have fields that must be given, so that no configuration of one equals one of another.
    """
    return [
        (program, name, config_hash(identity(kind, record)))
        for (program, name), kind in known.items()
        if program == record.get("program") and script in ("", name)
    ]


def programs(module: str = "rows") -> list[Program]:
    """The program of every subproject that has the module, ``rows`` of the paper or ``evidence``: PROGRAM there.

    They are those of the clone that this file is in, whatever else of their names is on the path.
    """
    if __name__.partition(".")[0] != "common":
        raise ValueError(f"tables are of a clone, whose programs import it as common: run python -m common.tables in {ROOT}")
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
    found = [import_module(f"{path.parent.name}.{module}").PROGRAM for path in sorted(ROOT.glob(f"*/{module}.py"))]
    if not found:
        raise ValueError(f"there are no programs in {ROOT}: tables need a clone of the project, python -m common.tables in it")
    tables = [table.id for program in found for table in program.tables]
    twice = next((id for id in tables if tables.count(id) > 1), None)
    if twice is not None:
        raise ValueError(f"two programs have a table {twice!r}: tables need ids of their own")
    return found


def select(
    found: Sequence[Program], *, program: str | None = None, table: str | None = None, row: str | None = None
) -> list[Program]:
    """The programs reduced to one program, one table, or the rows whose id matches a shell pattern.

    Raises ValueError, listing what there is, where nothing matches.
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
        raise ValueError(f"no row matches {row!r}: python -m common.tables list shows them")
    return [p for p in chosen if p.tables]


def _reduce(table: Table, rows: Sequence[Row]) -> Table:
    """The table with these rows alone, and the contrasts between them."""
    ids = {row.id for row in rows}
    return replace(table, rows=tuple(rows), contrasts=tuple(c for c in table.contrasts if {c.row, c.base} <= ids))
