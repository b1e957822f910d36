"""Numbers in Markdown documents, filled from results.

Text between ``<!-- NAME ARGUMENT ... -->`` and ``<!-- / -->`` is replaced by the content of the marker NAME. Within a line:

    row TABLE/ROW                  final value and seeds: 76.96 ± 0.85 (n = 3)
    final TABLE/ROW                final value alone: 76.96 ± 0.85
    contrast TABLE/ROW BASE        a contrast of the table: +4.33 points [+2.75, +5.91], p = 0.007, n = 3
    metric TABLE/ROW METRIC WHEN   mean over seeds of a metric of metrics.jsonl; WHEN: first, last or an epoch
    scatter TABLE                  smallest and largest standard deviation of a contrast's difference over seeds
    cost                           runs that tables count, and their hours

As a block of its own: ``table TABLE`` and ``contrasts TABLE``; ``bonferroni``, the tests of all tables; ``claims``, or
``claims ID`` for one, the verdicts on the claims of docs/findings/claims.toml; ``runs TABLE METRIC ...`` and
``compare PATTERN``, a line per run.
"""

from __future__ import annotations

import inspect
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate

from ..experiments.files import ROOT, write_atomic
from . import claims, compare
from .reading import Results, epochs_of
from .rendering import cells, contrast_cells, interval, p_value, spread
from .rows import Contrast, Kinds, Program, Row, Table
from .summaries import ContrastResult, contrast_results, paired, summarize, summarize_row

_MARKER = re.compile(r"<!-- (?!/ -->)(\S[^\n]*?) -->(.*?)<!-- / -->", re.DOTALL)
_LINE_START = re.compile(r"\s*(?:[-*+>]|\d+\.)?\s*")


class Evidence:
    """The tables of some programs, with the results of their rows."""

    def __init__(self, programs: Sequence[Program], results: Results, known: Kinds, root: Path = ROOT) -> None:
        self.results, self.known, self.root = results, known, root
        self.tables = {table.id: (program, table) for program in programs for table in program.tables}
        self._contrasts: dict[str, list[tuple[ContrastResult, list[float]]]] = {}

    def table(self, id: str) -> tuple[Program, Table]:
        if id not in self.tables:
            raise ValueError(f"there is no table {id!r}: there are {', '.join(self.tables)}")
        return self.tables[id]

    def row(self, name: str) -> tuple[Program, Table, Row]:
        table, _, id = name.partition("/")
        program, found = self.table(table)
        row = next((row for row in found.rows if row.id == id), None)
        if row is None:
            raise ValueError(f"table {table} has no row {id!r}: it has {', '.join(row.id for row in found.rows)}")
        return program, found, row

    def contrasts(self, table: str) -> list[tuple[ContrastResult, list[float]]]:
        if table not in self._contrasts:
            self._contrasts[table] = contrast_results(*self.table(table), self.results)
        return self._contrasts[table]

    def contrast(self, name: str, base: str) -> ContrastResult:
        _, table, row = self.row(name)
        found = next((each for each, _ in self.contrasts(table.id) if (each.row, each.base) == (row.id, base)), None)
        if found is None:
            pairs = "; ".join(f"{table.id}/{each.row} {each.base}" for each in table.contrasts)
            raise ValueError(f"table {table.id} has no contrast of {row.id} and {base!r}: it has {pairs or 'none'}")
        return found

    def metric_by_seed(self, name: str, metric: str, when: str) -> dict[int, float]:
        """A metric of a row's runs at the first or last of the epochs that have it, or at an epoch, by seed."""
        program, _, row = self.row(name)
        found, names = {}, set()
        for result in self.results.of(program, row):
            records = epochs_of(result)
            names |= {key for record in records for key in record}
            having = [record for record in records if metric in record and when in ("first", "last", str(record["epoch"]))]
            if having:
                found[result.seed] = float(having[-1 if when == "last" else 0][metric])
        if names and not found:
            raise ValueError(f"row {name} has no metric {metric!r} at epoch {when!r}: it has {', '.join(sorted(names))}")
        return found

    def compared(self, each: claims.Comparison) -> tuple[ContrastResult, ContrastResult]:
        """The difference that decides a claim: over the planned seeds, and over all seeds."""
        name, _, base = each.of.partition(" ")
        _, table, row = self.row(name)
        if each.metric:
            ours, other = (self.metric_by_seed(f"{table.id}/{id}", each.metric, "last") for id in (row.id, base))
            differences = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
            found = paired(Contrast(each.metric, row.id, base), differences)
            return found, found
        found = self.contrast(name, base)
        if not each.planned:
            return found, found
        ours, other = (self._finals(f"{table.id}/{id}") for id in (row.id, base))
        planned = [round(ours[seed] - other[seed], 9) for seed in each.planned if seed in ours and seed in other]
        return paired(Contrast(found.question, row.id, base), planned), found

    def _finals(self, name: str) -> dict[int, float]:
        program, _, row = self.row(name)
        return {result.seed: result.final for result in self.results.of(program, row)}

    def tests(self, table: str) -> tuple[int, float, list[ContrastResult]]:
        """How many contrasts of a table are tests, Bonferroni's threshold for p, and those that pass it."""
        found = [each for each, _ in self.contrasts(table) if each.p is not None]
        threshold = 0.05 / max(1, len(found))
        return len(found), threshold, [each for each in found if each.p is not None and each.p < threshold]


def _effect(found: ContrastResult, unit: str, decimals: int) -> str:
    if found.mean is None:
        return "not run"
    mean = f"{found.mean:+.{decimals}f}{unit}"
    if found.p is None:
        return f"{mean} (n = {found.n})"
    p = p_value(found.p)
    return f"{mean} {interval(found, decimals)}, p {p if p.startswith('<') else f'= {p}'}, n = {found.n}".replace("<0", "< 0")


def _unit(table: Table) -> str:
    return " nats" if "in nats" in table.score else " points"


def _row(evidence: Evidence, name: str) -> str:
    n = len(evidence.results.of(*evidence.row(name)[::2]))
    return f"{_final(evidence, name)} (n = {n})" if n else "not run"


def _final(evidence: Evidence, name: str) -> str:
    program, table, row = evidence.row(name)
    found = summarize_row(row, evidence.results.of(program, row))
    return spread(found.final_mean, found.final_std, table.decimals) if found.n else "not run"


def _contrast(evidence: Evidence, name: str, base: str) -> str:
    _, table, _ = evidence.row(name)
    return _effect(evidence.contrast(name, base), _unit(table), table.decimals)


def _metric(evidence: Evidence, name: str, metric: str, when: str) -> str:
    values = evidence.metric_by_seed(name, metric, when).values()
    return _three_digits(statistics.mean(values)) if values else "not run"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def _scatter(evidence: Evidence, table: str) -> str:
    unit, decimals = _unit(evidence.table(table)[1]), evidence.table(table)[1].decimals
    found = [statistics.stdev(each) for _, each in evidence.contrasts(table) if len(each) > 1]
    return f"{min(found):.{decimals}f} to {max(found):.{decimals}f}{unit}" if found else "not known (n = 1)"


def _cost(evidence: Evidence) -> str:
    counted = {program.key(row) for program, table in evidence.tables.values() for row in table.rows}
    runs = [run for run, found in evidence.results.runs if not counted.isdisjoint(found)]
    return f"{len(runs)} runs, {sum(run.seconds for run in runs) / 3600:.1f} hours in total with one thread a run"


def _table(evidence: Evidence, id: str) -> str:
    program, table = evidence.table(id)
    header, rows, _ = cells(summarize(program, table, evidence.results), table.decimals)
    shown = [header.index(name) for name in ("Row", "n", "Parameters", "Final", "Best")]
    return _grid([header[i] for i in shown], [[row[i] for i in shown] for row in rows], left=1)


def _contrasts(evidence: Evidence, id: str) -> str:
    found = [each for each, _ in evidence.contrasts(id)]
    header, rows = contrast_cells(found, evidence.table(id)[1].decimals)
    text = _grid(header[:1] + header[2:], [row[:1] + row[2:] for row in rows], left=1)
    count, threshold, passed = evidence.tests(id)
    if not count:
        return f"{text}\n\nTests: none, since no two rows share two seeds."
    excluding = len([each for each in found if each.p is not None and each.p < 0.05])
    return (
        f"{text}\n\nTests: {count}. Intervals that exclude zero: {excluding}. "
        f"Below the Bonferroni threshold of 0.05 / {count} = {threshold:.2g}: {len(passed)}."
    )


def _bonferroni(evidence: Evidence) -> str:
    rows = []
    for id in evidence.tables:
        count, threshold, passed = evidence.tests(id)
        names = "; ".join(f"{each.question}{_added(evidence, id, each)}" for each in passed)
        if count:
            rows.append([f"`{id}`", str(count), f"{threshold:.2g}", names or "none"])
    return _grid(["Table", "Tests", "Threshold for p", "Contrasts that pass"], rows, left=4)


def _added(evidence: Evidence, table: str, each: ContrastResult) -> str:
    """A remark on a contrast with seeds that were added after a look at the results."""
    comparisons = (comparison for claim in _read_claims(evidence) for comparison in claim.comparisons)
    added = any(other.planned and other.of == f"{table}/{each.row} {each.base}" for other in comparisons)
    return " (with seeds added later)" if added else ""


def _read_claims(evidence: Evidence) -> list[claims.Claim]:
    path = evidence.root / "docs" / "findings" / "claims.toml"
    return claims.read(path) if path.exists() else []


def _claims(evidence: Evidence, id: str = "") -> str:
    found = _read_claims(evidence)
    if id and id not in [claim.id for claim in found]:
        raise ValueError(f"there is no claim {id!r}: there are {', '.join(claim.id for claim in found)}")
    header = ["Claim", "In the paper", "Verdict", "Effect, 95 % interval", "Setting"]
    rows = []
    for claim in (each for each in found if id in ("", each.id)):
        named = [f"[{claim.claim}](findings/{claim.id}.md)", claim.paper]
        for setting, comparisons in claim.by_setting().items():
            rows.append([*named, *_verdicts(evidence, claim.id, comparisons), setting])
            named = ["", ""]  # further settings of the same claim
    if id:  # on the page of a claim
        header, rows = header[1:], [row[1:] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _verdicts(evidence: Evidence, claim: str, comparisons: Sequence[claims.Comparison]) -> tuple[str, str]:
    """Verdicts and effects of the comparisons that a claim rests on in one setting."""
    lines = [_compared(evidence, claim, each) for each in comparisons]
    verdicts = {said for _, said, _ in lines}
    if len(lines) > 1 and len(verdicts) == 1:
        said = f"{'both' if len(lines) == 2 else f'all {len(lines)}'}: {verdicts.pop()}"
    else:
        said = "<br>".join(label + said for label, said, _ in lines)
    return said, "<br>".join(label + effect for label, _, effect in lines)


def _compared(evidence: Evidence, claim: str, each: claims.Comparison) -> tuple[str, str, str]:
    """Label, verdict and effect of a comparison that a claim rests on."""
    try:
        planned, found = evidence.compared(each)
    except ValueError as error:
        raise ValueError(f"claim {claim!r} in claims.toml: {error}") from error
    table = evidence.table(each.of.partition("/")[0])[1]
    said = claims.verdict(planned, each.paper)
    if said.endswith("supported") and not each.metric:
        passed = planned.p is not None and planned.p < evidence.tests(table.id)[1]
        said += "; also after Bonferroni" if passed else "; not after Bonferroni"
    unit, decimals = ("", 2) if each.metric else (_unit(table), table.decimals)
    effect = _effect(planned, unit, decimals)
    effect += f"; expected {'above' if each.paper == '+' else 'below'} 0" if planned.n else ""
    if found.n > planned.n:
        effect += f" (with seeds added later: {_effect(found, unit, decimals)})"
    return f"{each.label}: " if each.label else "", said, effect


def _runs(evidence: Evidence, id: str, *metrics: str) -> str:
    program, table = evidence.table(id)
    rows = []
    for row in sorted(table.rows, key=lambda row: row.id):
        for result in evidence.results.of(program, row):
            values = {"seconds": result.seconds, **(epochs_of(result) or [{}])[-1], **result.metrics}
            unknown = next((metric for metric in metrics if metric not in values), None)
            if unknown is not None:
                raise ValueError(f"{result.path} has no metric {unknown!r}: it has {', '.join(sorted(values))}")
            digits = [3 if "loss" in metric else table.decimals for metric in metrics]
            scores = [f"{values[metric]:.{number}f}" for metric, number in zip(metrics, digits, strict=True)]
            rows.append([row.id, str(result.seed), *scores, f"{result.seconds:.0f}"])
    return _grid(["row", "seed", *(metric.replace("_", " ") for metric in metrics), "seconds"], rows, left=1)


def _compare(evidence: Evidence, pattern: str) -> str:
    found = sorted(evidence.root.glob(pattern), key=str)
    if not found:
        raise ValueError(f"no run is at {pattern}")
    return compare.table(found, evidence.known)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    align = (*["left"] * left, *["right"] * (len(header) - left))
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align if rows else None)


INLINE: dict[str, Callable[..., str]] = {
    "row": _row,
    "final": _final,
    "contrast": _contrast,
    "metric": _metric,
    "scatter": _scatter,
    "cost": _cost,
}
BLOCKS: dict[str, Callable[..., str]] = {
    "table": _table,
    "contrasts": _contrasts,
    "bonferroni": _bonferroni,
    "claims": _claims,
    "runs": _runs,
    "compare": _compare,
}


def documents(root: Path = ROOT) -> list[Path]:
    """The documents that have markers."""
    return [root / "README.md", root / "evidence" / "README.md", *sorted((root / "docs").rglob("*.md"))]


def fill(text: str, name: str, evidence: Evidence) -> str:
    """The text of a document with its markers filled. Raises ValueError naming the document and the line."""

    def filled(found: re.Match[str]) -> str:
        kind, *words = found[1].split()
        if "<!--" in found[2]:
            raise _error(name, text, found.start(), f"<!-- {found[1]} --> is not closed by <!-- / -->")
        try:
            function = (INLINE | BLOCKS).get(kind)
            if function is None:
                raise ValueError(f"there is no marker {kind!r}: there are {', '.join(INLINE | BLOCKS)}")
            try:
                inspect.signature(function).bind(evidence, *words)
            except TypeError as error:
                raise ValueError(f"marker {kind} cannot take {' '.join(words) or 'nothing'!r}: {error}") from error
            if kind in INLINE and _LINE_START.fullmatch(text, text.rfind("\n", 0, found.start()) + 1, found.start()):
                raise ValueError("a line that begins with a marker is no longer Markdown: put a word before it")
            content = function(evidence, *words)
        except ValueError as error:
            raise _error(name, text, found.start(), str(error)) from error
        content = f"\n\n{content}\n\n" if kind in BLOCKS else content
        return f"<!-- {found[1]} -->{content}<!-- / -->"

    rest = _MARKER.sub(lambda found: "." * len(found[0]), text)
    new = _MARKER.sub(filled, text)
    if "<!--" in rest:
        raise _error(
            name, text, rest.index("<!--"), "this comment is not a marker, or has no <!-- / --> or no marker before it"
        )
    return new


def _error(name: str, text: str, position: int, message: str) -> ValueError:
    return ValueError(f"{name}:{text.count(chr(10), 0, position) + 1}: {message}")


def fill_all(evidence: Evidence) -> list[Path]:
    """Fill every document, and return those that changed. If one has an error, none is written."""
    new = {
        path: fill(path.read_text(encoding="utf-8"), str(path.relative_to(evidence.root)), evidence)
        for path in documents(evidence.root)
    }
    changed = [path for path, text in new.items() if text != path.read_text(encoding="utf-8")]
    for path in changed:
        write_atomic(path, new[path])
    return changed
