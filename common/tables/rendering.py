"""Tables as text: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from tabulate import tabulate

from ..experiments.files import write_atomic
from .rows import Table
from .summaries import ContrastResult, RowSummary


def spread(mean: float | None, std: float | None, decimals: int) -> str:
    """Mean ± sample standard deviation; "-" without a mean, and only the mean without a deviation."""
    if mean is None:
        return "-"
    return f"{mean:.{decimals}f}" if std is None else f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def cells(summaries: Sequence[RowSummary], decimals: int = 2) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, cells and the sources that the published numbers refer to."""
    sources = list(dict.fromkeys(each.source for each in summaries if each.source))
    header = ["Row", "n", "Parameters", "Ratio", "Final", "Best", "Seconds", "Published"]
    rows = []
    for each in summaries:
        published = "n/a" if each.published is None else f"{each.published:g} [{sources.index(each.source) + 1}]"
        rows.append(
            [
                each.row,
                str(each.n),
                f"{each.parameters:,}" if each.parameters else "-",
                f"{each.ratio:.4f}" if each.ratio else "-",
                spread(each.final_mean, each.final_std, decimals),
                spread(each.best_mean, each.best_std, decimals),
                f"{each.seconds:.0f}" if each.seconds is not None else "-",
                published,
            ]
        )
    return header, rows, sources


def arranged_as_published(table: Table, summaries: Sequence[RowSummary]) -> str:
    """The table in the paper's layout, with a line per scheme and a column per setting: our number beside the published one.

    Empty if the rows have no place in it.
    """
    cells_of: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row, each in zip(table.rows, summaries, strict=True):
        if row.place is not None:
            ours = f"{spread(each.final_mean, each.final_std, table.decimals)} (n={each.n})" if each.n else "-"
            published = "n/a" if each.published is None else f"{each.published:g}"
            columns[row.place[1]] = None
            cells_of.setdefault(row.place[0], {})[row.place[1]] = f"{ours}; {published}"
    body = [[name, *(found.get(column, "") for column in columns)] for name, found in cells_of.items()]
    text = tabulate(body, ["Ours; published", *columns], tablefmt="github", disable_numparse=True)
    return f"{text}\n\n" if body else ""


def note(table: Table, summaries: Sequence[RowSummary]) -> str:
    runs, hours = sum(each.n for each in summaries), sum(each.n * (each.seconds or 0.0) for each in summaries) / 3600
    text = f"Final and best {table.score}, mean ± sample standard deviation over n seeds."
    cost = f" Seconds are of one run: {hours:.1f} hours of the {runs} {'run' if runs == 1 else 'runs'} together."
    return text + cost if runs else text


CONTRASTS_NOTE = (
    "Differences of final values, paired over the n seeds that both rows have: mean, its 95 % interval and p of Student's "
    "t-test, not corrected for the number of questions."
)


def interval(found: ContrastResult, decimals: int) -> str:
    """The 95 % interval, [low, high]; empty if there is none."""
    if found.low is None:
        return ""
    return f"[{found.low:+.{decimals}f}, {found.high:+.{decimals}f}]"


def p_value(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.0005 else "<0.001"


def contrast_cells(found: Sequence[ContrastResult], decimals: int = 2) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the differences."""
    rows = [
        [
            each.question,
            f"{each.row} - {each.base}",
            str(each.n),
            f"{each.mean:+.{decimals}f}" if each.mean is not None else "-",
            interval(each, decimals) or "-",
            p_value(each.p),
        ]
        for each in found
    ]
    return ["Question", "Rows", "n", "Difference", "95 % interval", "p"], rows


def to_markdown(table: Table, summaries: Sequence[RowSummary], found: Sequence[ContrastResult] = ()) -> str:
    header, rows, sources = cells(summaries, table.decimals)
    align = ("left", *["right"] * (len(header) - 1))
    text = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align if rows else None)
    notes = "".join(f"\n[{number}] {source}" for number, source in enumerate(sources, 1))
    arranged = arranged_as_published(table, summaries)
    contrasts = ""
    if found:
        header, rows = contrast_cells(found, table.decimals)
        align = ("left", "left", *["right"] * (len(header) - 2))
        below = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)
        contrasts = f"\n{below}\n\n{CONTRASTS_NOTE}\n"
    return f"**{table.title}**\n\n{arranged}{text}\n\n{note(table, summaries)}{notes}\n{contrasts}"


def to_latex(table: Table, summaries: Sequence[RowSummary], found: Sequence[ContrastResult] = ()) -> str:
    header, rows, sources = cells(summaries, table.decimals)
    text = tabulate(rows, header, tablefmt="latex_booktabs", disable_numparse=True).replace("±", r"$\pm$")
    notes = "".join(f"\n\n{{\\footnotesize [{number}] {source}}}" for number, source in enumerate(sources, 1))
    contrasts = ""
    if found:
        header, rows = contrast_cells(found, table.decimals)
        below = tabulate(rows, header, tablefmt="latex_booktabs", disable_numparse=True)
        contrasts = f"\n% {CONTRASTS_NOTE}\n{below}\n"
    return f"% {table.title}\n% {note(table, summaries)}\n{text}{notes}\n{contrasts}"


def to_csv(records: Sequence[RowSummary] | Sequence[ContrastResult], kind: type[RowSummary] | type[ContrastResult]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: "" if value is None else value for key, value in asdict(record).items()})
    return buffer.getvalue()


def write(table: Table, summaries: Sequence[RowSummary], directory: Path, found: Sequence[ContrastResult] = ()) -> None:
    """Write table.md (with the existing figures), table.csv, table.tex and, if the table has contrasts, contrasts.csv."""
    drawn = [figure.id for figure in table.figures if (directory / f"{figure.id}.png").exists()]
    figures = "".join(f"\n![{id}]({id}.png)\n" for id in drawn)
    write_atomic(directory / "table.md", to_markdown(table, summaries, found) + figures)
    write_atomic(directory / "table.csv", to_csv(summaries, RowSummary))
    write_atomic(directory / "table.tex", to_latex(table, summaries, found))
    if found:
        write_atomic(directory / "contrasts.csv", to_csv(found, ContrastResult))
