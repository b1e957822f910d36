"""Claims of the paper, what decides each of them, and the verdict."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from .summaries import ContrastResult


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A difference that decides a claim.

    of:      two rows, "TABLE/ROW BASE", that are a contrast of their table.
    paper:   the sign, + or -, that the difference ROW - BASE has if the claim holds. Lower losses are better.
    label:   names the comparison, if a claim has several.
    planned: the seeds that were planned, if others were added after a look at the results. The verdict uses these alone.
    metric:  compares this metric after the last epoch instead of the final value; then any two rows of a table can be given.
    setting: of its runs, where it differs from that of the claim.
    """

    of: str
    paper: str
    label: str = ""
    planned: tuple[int, ...] = ()
    metric: str = ""
    setting: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim in one sentence, its place in the paper, and the setting of most runs here; its page is ``<id>.md``."""

    id: str
    claim: str
    paper: str
    setting: str
    comparisons: tuple[Comparison, ...]

    def by_setting(self) -> dict[str, list[Comparison]]:
        """The comparisons of each setting, in the order of the file."""
        found: dict[str, list[Comparison]] = {}
        for each in self.comparisons:
            found.setdefault(each.setting or self.setting, []).append(each)
        return found


def read(path: Path) -> list[Claim]:
    """The claims in a TOML file, [[claim]] entries with [[claim.comparison]] entries. Raises ValueError naming the claim."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not a TOML file: {error}") from error
    claims = []
    for entry in found.get("claim", []):
        where = f"{path.name}: claim {entry.get('id')!r}"
        try:
            entries = [each | {"planned": tuple(each.get("planned", ()))} for each in entry.pop("comparison", [])]
            comparisons = tuple(Comparison(**each) for each in entries)
            claim = Claim(**entry, comparisons=comparisons)
        except TypeError as error:
            raise ValueError(f"{where} has unknown fields or lacks some: {error}") from error
        if not comparisons or any(each.paper not in ("+", "-") for each in comparisons):
            raise ValueError(f'{where} needs comparisons, each with paper = "+" or "-"')
        if not path.with_name(f"{claim.id}.md").exists():
            raise ValueError(f"{where} has no page {claim.id}.md beside {path.name}")
        claims.append(claim)
    return claims


def verdict(found: ContrastResult, paper: str) -> str:
    """What a difference says about a claim that gives it the sign ``paper``."""
    if found.n < 2:
        return "exploratory (n = 1)" if found.n else "not tested"
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "inconclusive"
    return "supported" if (found.low > 0) == (paper == "+") else "not supported"
