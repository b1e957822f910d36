"""Rows of tables as data: what differs from a recipe, what it should give, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from common.runs import ROOT, config_hash

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+=_-]*")


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
    after:       id of a row of the same table that must have run before; ``{after}`` in the flags is its directory.
    """

    id: str
    label: str
    flags: tuple[str, ...]
    hours: float = 0.0
    parameters: int | None = None
    published: Published | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    after: str | None = None

    def __post_init__(self) -> None:
        if not _SAFE.fullmatch(self.id):
            raise ValueError(f"row id {self.id!r} is not a safe file name: use letters, digits and . + = _ -")


@dataclass(frozen=True)
class Table:
    """Rows that are read together; ``id`` names its folder and ``title`` says what of the paper it is."""

    id: str
    title: str
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not _SAFE.fullmatch(self.id):
            raise ValueError(f"table id {self.id!r} is not a safe file name: use letters, digits and . + = _ -")
        ids = [row.id for row in self.rows]
        for row in self.rows:
            if ids.count(row.id) > 1:
                raise ValueError(f"table {self.id!r} has two rows {row.id!r}")
            if row.after is not None and row.after not in ids:
                raise ValueError(f"row {row.id!r} comes after {row.after!r}, which table {self.id!r} does not have")

    def row(self, id: str) -> Row:
        return next(row for row in self.rows if row.id == id)


@dataclass(frozen=True)
class Program:
    """A training program, how it reads its flags, and its tables. ``configure`` gives the resolved configuration."""

    name: str
    script: str
    configure: Callable[[Sequence[str]], dict[str, Any]]
    tables: tuple[Table, ...] = field(default=())

    def config_hash(self, row: Row) -> str:
        return config_hash(self.configure(row.flags))

    def command(self, table: Table, row: Row) -> list[str]:
        """Words of the row's command after the interpreter, without seed."""
        return [
            self.script,
            *row.flags,
            "--row",
            f"{table.id}/{row.id}",
            "--row-config",
            self.config_hash(row),
            "--resume",
            "auto",
        ]


def programs() -> list[Program]:
    """The program of every subproject: each folder with a ``rows.py`` has one, named PROGRAM there."""
    return [import_module(f"{path.parent.name}.rows").PROGRAM for path in sorted(ROOT.glob("*/rows.py"))]
