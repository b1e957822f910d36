"""The numbers of tables: rows summarized over their seeds, and contrasts of rows tested over the seeds they share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..experiments.results import RunResult
from .reading import Results
from .rows import Contrast, Program, Row, Table


@dataclass(frozen=True)
class RowSummary:
    """A row of a table: n seeds, mean and sample standard deviation of final and best value, and the published number.

    ``seconds`` is the mean time of one run.
    """

    row: str
    n: int
    parameters: int | None
    ratio: float | None
    final_mean: float | None
    final_std: float | None
    best_mean: float | None
    best_std: float | None
    seconds: float | None
    published: float | None
    source: str
    label: str


@dataclass(frozen=True)
class ContrastResult:
    """What a contrast shows: the mean difference of the final values over n shared seeds, and Student's paired t-test.

    ``low`` and ``high`` are the 95 % confidence interval; they and ``p`` are None with fewer than two seeds, or if all
    differences are equal.
    """

    question: str
    row: str
    base: str
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


def summarize_row(row: Row, results: Sequence[RunResult]) -> RowSummary:
    """The summary of a row over the results of its configuration."""
    finals, bests = [result.final for result in results], [result.best for result in results]
    several = len(results) > 1
    return RowSummary(
        row=row.id,
        n=len(results),
        parameters=int(results[0].parameters["compressed"]) if results else row.parameters,
        ratio=float(results[0].parameters["ratio"]) if results else None,
        final_mean=statistics.mean(finals) if results else None,
        final_std=statistics.stdev(finals) if several else None,
        best_mean=statistics.mean(bests) if results else None,
        best_std=statistics.stdev(bests) if several else None,
        seconds=statistics.mean(float(result.seconds) for result in results) if results else None,
        published=row.published.value if row.published else None,
        source=row.published.source if row.published else "",
        label=row.label,
    )


def summarize(program: Program, table: Table, results: Results) -> list[RowSummary]:
    """The summaries of a table's rows."""
    return [summarize_row(row, results.of(program, row)) for row in table.rows]


def contrast_results(program: Program, table: Table, results: Results) -> list[tuple[ContrastResult, list[float]]]:
    """The contrasts of a table over the seeds that both rows have finished, each with its differences seed by seed."""
    finals = {row.id: {result.seed: result.final for result in results.of(program, row)} for row in table.rows}
    found = []
    for contrast in table.contrasts:
        ours, base = finals[contrast.row], finals[contrast.base]
        # Rounded, so that equal differences of scores are equal.
        each = [round(ours[seed] - base[seed], 9) for seed in sorted(ours.keys() & base.keys())]
        found.append((paired(contrast, each), each))
    return found


def paired(contrast: Contrast, each: Sequence[float]) -> ContrastResult:
    """Student's t-test of the differences of a contrast, seed by seed."""
    n, mean, low, high, p = len(each), None, None, None, None
    if each:
        mean = statistics.mean(each)
    if len(set(each)) > 1:
        from scipy.stats import ttest_1samp  # takes a second to load; emitting scripts does not need it

        test = ttest_1samp(each, 0.0)
        interval = test.confidence_interval(0.95)
        low, high, p = (float(f"{value:.6g}") for value in (interval.low, interval.high, test.pvalue))
    return ContrastResult(contrast.question, contrast.row, contrast.base, n, mean, low, high, p)
