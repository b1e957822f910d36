"""Finished results to tables: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.runs import config_hash, read_json, write_atomic
from common.tables.rows import Contrast, Program, Row, Table


@dataclass(frozen=True)
class Result:
    """A finished run, as its result.json tells."""

    path: Path
    row: str | None
    config: dict[str, Any]
    hash: str
    seed: int
    final: float
    best: float
    parameters: dict[str, Any]
    seconds: float
    inputs: dict[str, str]


@dataclass(frozen=True)
class Line:
    """A row of a table: n seeds, mean and sample standard deviation of final and best value, and what is published."""

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
class Difference:
    """What a contrast shows: the mean difference of the final values over n shared seeds, and Student's paired t-test.

    ``low`` and ``high`` are the 95 % confidence interval; they and ``p`` are None below two seeds, or where all differences
    are the same.
    """

    question: str
    row: str
    base: str
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


def parse(path: Path) -> Result:
    """Read a result.json; raises ValueError saying what is wrong with it."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != 1:
        raise ValueError(f"{path} is not a result of this version")
    if content.get("status") != "finished":
        raise ValueError(f"{path} is not finished: its status is {content.get('status')!r}")
    try:
        metrics, config = content["metrics"], content["config"]
        row, seed, parameters, seconds = content["row"], content["seed"], content["parameters"], content["seconds"]
        final, best, seconds = float(metrics["final"]), float(metrics["best"]), float(seconds)
        parameters = {"compressed": int(parameters["compressed"]), "ratio": float(parameters["ratio"])}
        if not isinstance(row, str | None) or not isinstance(seed, int):
            raise ValueError(f"row {row!r}, seed {seed!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} lacks or garbles a field: {error}") from error
    if not isinstance(config, dict) or config_hash(config) != content.get("config_hash"):
        raise ValueError(f"{path} has a configuration that is not the one its hash was made of")
    if not (math.isfinite(final) and math.isfinite(best)):
        raise ValueError(f"{path} has a final or best value that is not finite")
    return Result(path, row, config, content["config_hash"], seed, final, best, parameters, seconds, content.get("inputs", {}))


def read(directory: Path) -> tuple[list[Result], list[str]]:
    """Every result.json below a directory that can be counted, and what is wrong with the others."""
    results, problems = [], []
    for path in sorted(directory.rglob("result.json")):
        try:
            results.append(parse(path))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return results, problems


def check(program: Program, table: Table, results: Sequence[Result]) -> None:
    """Raise ValueError where two results claim one row and seed of the table and have different configurations.

    Also where the table would compare runs on different files: images of ``--data imagefolder``, or prepared translations,
    for other data sets are part of the configuration.
    """
    hashes = {program.config_hash(row) for row in table.rows}
    first: Result | None = None
    for result in results:
        if result.hash in hashes:
            first = first or result
            if any(first.inputs.get(split) != result.inputs.get(split) for split in ("train", "test", "val", "data")):
                raise ValueError(
                    f"table {table.id} has runs on different data: {first.path} and {result.path}; move one of them away"
                )
    claims: dict[tuple[str, int], Result] = {}
    for result in results:
        if result.row is not None and result.row.startswith(f"{table.id}/"):
            other = claims.setdefault((result.row, result.seed), result)
            if other.hash != result.hash:
                raise ValueError(
                    f"two results of row {result.row} and seed {result.seed} have different configurations: "
                    f"{other.path} and {result.path}; move one of them away"
                )


def outdated(program: Program, table: Table, results: Iterable[Result]) -> list[Result]:
    """The results that claim a row of the table and are not of its configuration."""
    hashes = {f"{table.id}/{row.id}": program.config_hash(row) for row in table.rows}
    return [result for result in results if result.row in hashes and hashes[result.row] != result.hash]


def by_configuration(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by configuration hash, one a seed: the same seed run twice counts once.

    Raises ValueError where two results of one configuration and seed were made from different files.
    """
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        other = found.setdefault(result.hash, {}).setdefault(result.seed, result)
        if other.inputs != result.inputs:
            raise ValueError(
                f"two results of one configuration and seed {result.seed} were made from different files: "
                f"{other.path} and {result.path}; move one of them away"
            )
    return {hash: [seeds[seed] for seed in sorted(seeds)] for hash, seeds in found.items()}


def summarize(row: Row, results: Sequence[Result]) -> Line:
    """The line of a row from the results of its configuration."""
    finals, bests = [result.final for result in results], [result.best for result in results]
    several = len(results) > 1
    return Line(
        row=row.id,
        n=len(results),
        parameters=results[0].parameters["compressed"] if results else row.parameters,
        ratio=results[0].parameters["ratio"] if results else None,
        final_mean=statistics.mean(finals) if results else None,
        final_std=statistics.stdev(finals) if several else None,
        best_mean=statistics.mean(bests) if results else None,
        best_std=statistics.stdev(bests) if several else None,
        seconds=statistics.mean(result.seconds for result in results) if results else None,
        published=row.published.value if row.published else None,
        source=row.published.source if row.published else "",
        label=row.label,
    )


def of_row(program: Program, row: Row, results: Mapping[str, list[Result]]) -> list[Result]:
    """The results of exactly a row's configuration, by seed."""
    found = results.get(program.config_hash(row), [])
    return [result for result in found if result.seed in row.seeds or not program.own_seeds]


def lines(program: Program, table: Table, results: Mapping[str, list[Result]]) -> list[Line]:
    """The lines of a table."""
    return [summarize(row, of_row(program, row, results)) for row in table.rows]


def differences(program: Program, table: Table, results: Mapping[str, list[Result]]) -> list[tuple[Difference, list[float]]]:
    """The contrasts of a table over the seeds that both rows have finished, each with its difference seed by seed."""
    finals = {row.id: {result.seed: result.final for result in of_row(program, row, results)} for row in table.rows}
    found = []
    for contrast in table.contrasts:
        ours, base = finals[contrast.row], finals[contrast.base]
        # Rounded, so that equal differences of scores are equal.
        each = [round(ours[seed] - base[seed], 9) for seed in sorted(ours.keys() & base.keys())]
        found.append((_test(contrast, each), each))
    return found


def _test(contrast: Contrast, each: Sequence[float]) -> Difference:
    n, mean, low, high, p = len(each), None, None, None, None
    if each:
        mean = statistics.mean(each)
    if len(set(each)) > 1:
        from scipy.stats import ttest_1samp  # takes a second to load, which emitting scripts does not need

        test = ttest_1samp(each, 0.0)
        interval = test.confidence_interval(0.95)
        low, high, p = (float(f"{value:.6g}") for value in (interval.low, interval.high, test.pvalue))
    return Difference(contrast.question, contrast.row, contrast.base, n, mean, low, high, p)


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def cells(table_lines: Sequence[Line]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, cells and the sources that the published numbers refer to."""
    sources = list(dict.fromkeys(line.source for line in table_lines if line.source))
    header = ["Row", "n", "Parameters", "Ratio", "Final", "Best", "Seconds", "Published"]
    rows = []
    for line in table_lines:
        published = "n/a" if line.published is None else f"{line.published:g} [{sources.index(line.source) + 1}]"
        rows.append(
            [
                line.row,
                str(line.n),
                f"{line.parameters:,}" if line.parameters else "-",
                f"{line.ratio:.4f}" if line.ratio else "-",
                _spread(line.final_mean, line.final_std),
                _spread(line.best_mean, line.best_std),
                f"{line.seconds:.0f}" if line.seconds is not None else "-",
                published,
            ]
        )
    return header, rows, sources


def in_papers_shape(table: Table, table_lines: Sequence[Line]) -> str:
    """The table with a line per scheme and a column per setting, ours beside published; empty where rows have no place."""
    cells_of: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row, line in zip(table.rows, table_lines, strict=True):
        if row.place is not None:
            ours = f"{_spread(line.final_mean, line.final_std)} (n={line.n})" if line.n else "-"
            published = "n/a" if line.published is None else f"{line.published:g}"
            columns[row.place[1]] = None
            cells_of.setdefault(row.place[0], {})[row.place[1]] = f"{ours}; {published}"
    body = [[name, *(found.get(column, "") for column in columns)] for name, found in cells_of.items()]
    text = tabulate(body, ["Ours; published", *columns], tablefmt="github", disable_numparse=True)
    return f"{text}\n\n" if body else ""


def note(table: Table, table_lines: Sequence[Line]) -> str:
    runs, hours = sum(line.n for line in table_lines), sum(line.n * (line.seconds or 0.0) for line in table_lines) / 3600
    return (
        f"Final and best {table.score}, mean ± sample standard deviation over n seeds. Seconds are of one run: "
        f"{hours:.1f} hours of the {runs} {'run' if runs == 1 else 'runs'} together."
    )


CONTRASTS_NOTE = (
    "Differences of final values, paired over the n seeds that both rows have: mean, its 95 % interval and p of Student's "
    "t-test, not corrected for the number of questions."
)


def contrast_cells(found: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the differences."""
    rows = [
        [
            each.question,
            f"{each.row} - {each.base}",
            str(each.n),
            f"{each.mean:+.2f}" if each.mean is not None else "-",
            f"[{each.low:+.2f}, {each.high:+.2f}]" if each.low is not None else "-",
            "-" if each.p is None else f"{each.p:.3f}" if each.p >= 0.0005 else "<0.001",
        ]
        for each in found
    ]
    return ["Question", "Rows", "n", "Difference", "95 % interval", "p"], rows


def to_markdown(table: Table, table_lines: Sequence[Line], found: Sequence[Difference] = ()) -> str:
    header, rows, sources = cells(table_lines)
    align = ("left", *["right"] * (len(header) - 1))
    text = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align if rows else None)
    notes = "".join(f"\n[{number}] {source}" for number, source in enumerate(sources, 1))
    shape = in_papers_shape(table, table_lines)
    contrasts = ""
    if found:
        header, rows = contrast_cells(found)
        align = ("left", "left", *["right"] * (len(header) - 2))
        below = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)
        contrasts = f"\n{below}\n\n{CONTRASTS_NOTE}\n"
    return f"**{table.title}**\n\n{shape}{text}\n\n{note(table, table_lines)}{notes}\n{contrasts}"


def to_latex(table: Table, table_lines: Sequence[Line], found: Sequence[Difference] = ()) -> str:
    header, rows, sources = cells(table_lines)
    text = tabulate(rows, header, tablefmt="latex_booktabs", disable_numparse=True).replace("±", r"$\pm$")
    notes = "".join(f"\n\n{{\\footnotesize [{number}] {source}}}" for number, source in enumerate(sources, 1))
    contrasts = ""
    if found:
        header, rows = contrast_cells(found)
        below = tabulate(rows, header, tablefmt="latex_booktabs", disable_numparse=True)
        contrasts = f"\n% {CONTRASTS_NOTE}\n{below}\n"
    return f"% {table.title}\n% {note(table, table_lines)}\n{text}{notes}\n{contrasts}"


def to_csv(records: Sequence[Line] | Sequence[Difference], kind: type[Line] | type[Difference] = Line) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for line in records:
        writer.writerow({key: "" if value is None else value for key, value in asdict(line).items()})
    return buffer.getvalue()


def write(table: Table, table_lines: Sequence[Line], directory: Path, found: Sequence[Difference] = ()) -> None:
    """Write table.md (with the figures that are there), table.csv and table.tex, and contrasts.csv of a table that has some."""
    drawn = [figure.id for figure in table.figures if (directory / f"{figure.id}.png").exists()]
    figures = "".join(f"\n![{id}]({id}.png)\n" for id in drawn)
    write_atomic(directory / "table.md", to_markdown(table, table_lines, found) + figures)
    write_atomic(directory / "table.csv", to_csv(table_lines))
    write_atomic(directory / "table.tex", to_latex(table, table_lines, found))
    if found:
        write_atomic(directory / "contrasts.csv", to_csv(found, Difference))
