"""One self-contained page of results: tables, figures, and the details of each row. It loads nothing from the network."""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..experiments.results import RunResult
from .emit import SCRIPTS
from .reading import Results
from .rendering import CONTRASTS_NOTE, cells, contrast_cells, note
from .rows import Program, Row, Table
from .summaries import contrast_results, summarize

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.empty { color: var(--quiet); }
img { max-width: 100%; height: auto; background: white; margin: 1rem 0; }
details { margin: .2rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; padding: .5rem; border: 1px solid var(--line); font-size: 12px; }
.quiet, footer { color: var(--quiet); font-size: .85rem; }
"""

# A link to a row's details opens them.
_SCRIPT = """
function show() {
  for (let e = document.getElementById(decodeURIComponent(location.hash.slice(1))); e; e = e.parentElement)
    if (e.tagName == "DETAILS") e.open = true;
}
addEventListener("hashchange", show);
show();
"""


def _link(target: Path, page: Path, text: str) -> str:
    return f'<a href="{html.escape(os.path.relpath(target, page.parent))}">{html.escape(text)}</a>'


def _behind(program: Program, table: Table, row: Row, results: Sequence[RunResult], page: Path) -> str:
    """The details of a row: script, command, configuration, and the result of each seed."""
    script = SCRIPTS / program.name / table.id / f"{row.id}.sh"
    digits = f".{table.decimals}f"
    runs = "".join(
        f"<li>seed {run.seed}: final {run.final:{digits}}, best {run.best:{digits}}, "
        f"{_link(run.path, page, 'result.json')}</li>"
        for run in results
    )
    anchor = html.escape(f"{table.id}/{row.id}")
    command = html.escape(shlex.join(["python", f"{program.name}/{row.script}", *row.flags]))
    config = html.escape(json.dumps(program.record(row), indent=1, sort_keys=True))
    return (
        f'<details id="{anchor}"><summary>{html.escape(row.id)}: {html.escape(row.label)}</summary>'
        f"<p>{_link(script, page, script.name)}, configuration {program.config_hash(row)}</p>"
        f"<pre>{command}</pre><pre>{config}</pre><ul>{runs}</ul></details>"
    )


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(program: Program, table: Table, results: Results, figures: Sequence[Path], page: Path) -> str:
    summaries = summarize(program, table, results)
    header, rows, sources = cells(summaries, table.decimals)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = ""
    for row, (name, n, *rest) in zip(table.rows, rows, strict=True):
        link = f'<a href="#{html.escape(f"{table.id}/{row.id}")}" title="{html.escape(row.label)}">{html.escape(name)}</a>'
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in (n, *rest))
        body += f"<tr{' class=empty' if n == '0' else ''}><td>{link}</td>{columns}</tr>"
    notes = "".join(f"<br>[{number}] {html.escape(source)}" for number, source in enumerate(sources, 1))
    images = "".join(
        f'<img alt="{html.escape(path.stem)} of {html.escape(table.id)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in figures
    )
    behind = "".join(_behind(program, table, row, results.of(program, row), page) for row in table.rows)
    contrasts = ""
    if table.contrasts:
        contrasts = _grid(*contrast_cells([result for result, _ in contrast_results(program, table, results)], table.decimals))
        contrasts += f'<p class="quiet">{html.escape(CONTRASTS_NOTE)}</p>'
    return (
        f'<section id="{html.escape(table.id)}"><h2>{html.escape(table.title)}</h2>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="quiet">{html.escape(note(table, summaries))}{notes}</p>{contrasts}{images}'
        f"<details><summary>Scripts, configurations and results behind these rows</summary>{behind}</details></section>"
    )


def render(
    tables: Sequence[tuple[Program, Table, Sequence[Path]]],
    results: Results,
    problems: Sequence[str],
    page: Path,
) -> str:
    """The HTML of the page, to be written to ``page``. ``tables`` include the PNG files of their figures."""
    sections = "".join(_section(program, table, results, figures, page) for program, table, figures in tables)
    contents = "".join(f'<li><a href="#{html.escape(t.id)}">{html.escape(t.title)}</a></li>' for _, t, _ in tables)
    skipped = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    footer = f"<footer><p>Not counted:</p><ul>{skipped}</ul></footer>" if problems else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Factorized Neural Layers: results</title><style>{_STYLE}</style></head>"
        f"<body><h1>Factorized Neural Layers: results</h1><ul>{contents}</ul>{sections}{footer}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
