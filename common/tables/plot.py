"""Figures of tables: curves over the epochs, and scores against a setting. Readable in print and without color."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .reading import Results, epochs_of
from .rows import ContrastFigure, CurveFigure, Program, SweepFigure, Table
from .summaries import contrast_results

# Okabe and Ito's palette, which color-blind readers can distinguish. Line styles and markers distinguish lines in gray print.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C8C8C")
STYLES = (
    "-",
    "--",
    "-.",
    (0, (8, 2)),
    (0, (5, 1, 1, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 1)),
    (0, (8, 2, 2, 2)),
)  # dotted lines are bounds
MARKERS = "osD^vPX*"
LABELS = {
    "test_accuracy": "test accuracy (%)",
    "train_accuracy": "training accuracy (%)",
    "valid_loss": "masked loss on the validation split (nats)",
    "quekey_norm": "mean norm of query-key products",
    "outval_norm": "mean norm of output-value products",
    "frobenius_norm": r"Frobenius norm $\|UV^T\|_F$",
    "nuclear_norm": r"nuclear norm $\|UV^T\|_*$",
    "effective_lr": r"effective step $\eta/\|UV^T\|_F^2$",
    "non_orthogonality": "non-orthogonality of factors",
    "weight_decay": "decay strength",
    "rank_scale": "rank scale",
}
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "tables",
}


def _mean_curve(runs: Sequence[list[dict[str, Any]]], metric: str) -> tuple[list[int], list[float], list[float]]:
    """Epochs, mean and standard deviation over the runs that have the metric."""
    values: dict[int, list[float]] = {}
    for records in runs:
        for record in records:
            if record.get(metric) is not None:
                values.setdefault(record["epoch"], []).append(record[metric])
    epochs = sorted(values)
    spreads = [statistics.stdev(values[epoch]) if len(values[epoch]) > 1 else 0.0 for epoch in epochs]
    return epochs, [statistics.mean(values[epoch]) for epoch in epochs], spreads


def curves(figure: CurveFigure, program: Program, table: Table, results: Results) -> Figure | None:
    """Metrics by epoch: a panel per metric, a line per row, and a band of one standard deviation over its seeds."""
    runs = {row.id: [epochs_of(result) for result in results.of(program, row)] for row in table.rows}
    runs = {id: records for id, records in runs.items() if any(records)}  # results may be kept without their metrics
    if not runs:
        return None
    # The legend omits the common prefix of the names. They are compared by character, because they are not paths.
    shared = os.path.commonprefix(list(runs)).rfind("-") + 1 if len(runs) > 1 else 0  # noqa: RUF071
    drawn = Figure(figsize=(4.2 * len(figure.metrics), 3.4 + 0.17 * math.ceil(len(runs) / 3)), layout="constrained")
    for axes, entry in zip(drawn.subplots(1, len(figure.metrics), squeeze=False)[0], figure.metrics, strict=True):
        metric, _, bound = entry.partition("/")
        for index, (id, records) in enumerate(runs.items()):
            color, style = COLORS[index % len(COLORS)], STYLES[index % len(STYLES)]
            epochs, means, spreads = _mean_curve(records, metric)
            label = f"{id[shared:]} (n={len(records)})"
            axes.plot(epochs, means, color=color, linestyle=style, linewidth=1.5, label=label)
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(epochs, low, high, color=color, alpha=0.12, linewidth=0)
            if bound:
                epochs, means, _ = _mean_curve(records, bound)
                axes.plot(epochs, means, color=color, linestyle=":", linewidth=1)
        values = [value for line in axes.lines for value in line.get_ydata()]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(LABELS.get(metric, metric) + (" (dotted: bound)" if bound else ""))
    handles, names = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)))
    drawn.suptitle(textwrap.fill(table.title, int(13 * drawn.get_figwidth())), fontsize=10)
    return drawn


def sweep(figure: SweepFigure, program: Program, table: Table, results: Results) -> Figure | None:
    """Final score against a setting: a panel per network and data set, a line per scheme, error bars over seeds."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in table.rows:
        found = results.of(program, row)
        if found:
            config, finals = found[0].config, [result.final for result in found]
            spread = statistics.stdev(finals) if len(finals) > 1 else 0.0
            point = (config[figure.x], statistics.mean(finals), spread)
            panels.setdefault(figure.panel(config), {}).setdefault(figure.series(config), []).append(point)
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(1.2 + 3.6 * columns, 0.8 + 2.9 * rows), layout="constrained")
    names = sorted({name for series in panels.values() for name in series})
    grid = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, series) in zip(grid, panels.items(), strict=False):
        for name, points in series.items():
            index = names.index(name)
            x, mean, spread = zip(*sorted(points), strict=True)
            style = {"color": COLORS[index % 8], "linestyle": STYLES[index % 8], "marker": MARKERS[index % 8], "markersize": 4}
            axes.errorbar(x, mean, spread, capsize=2, linewidth=1.3, label=name, **style)
        ticks = sorted({point[0] for points in series.values() for point in points})
        axes.set(
            xscale="log", xlabel=LABELS.get(figure.x, figure.x), ylabel=f"final {table.score.partition(' (')[0]}", title=title
        )
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axes.minorticks_off()
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = {name: handle for axes in drawn.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    inches = 0.6 + 0.075 * max(len(name) for name in names)  # width of a name and its line
    fit = max(1, int(drawn.get_figwidth() / inches))
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, fit, len(handles)))
    drawn.suptitle(textwrap.fill(table.title, int(13 * drawn.get_figwidth())), fontsize=10)
    return drawn


def contrasts(program: Program, table: Table, results: Results) -> Figure | None:
    """The table's contrasts, one below the other: a ring per seed, their mean, and its 95 % interval if there is one.

    The axis reaches at most four times the largest difference of any seed; longer intervals are cut off there.
    """
    found = [(result, each) for result, each in contrast_results(program, table, results) if each]
    if not found:
        return None
    drawn = Figure(figsize=(8, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = drawn.subplots()
    axes.axvline(0, color="#000000", linewidth=0.8)
    for height, (result, each) in enumerate(found):
        if result.low is not None and result.high is not None:
            axes.plot((result.low, result.high), (height, height), color="#0072B2", linewidth=2, zorder=1)
        axes.plot(each, [height] * len(each), "o", markersize=5, markerfacecolor="none", color="#000000", zorder=3)
        if len(each) > 1:
            axes.plot(statistics.mean(each), height, "D", markersize=5, color="#0072B2", zorder=2)
    axes.set_yticks(range(len(found)), [f"{c.question}\n{c.row} - {c.base} (n={c.n})" for c, _ in found], fontsize=7)
    axes.set_ylim(len(found) - 0.5, -0.5)
    reach = 4 * max(abs(value) for _, each in found for value in each) or 1.0
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -reach), min(high, reach))
    unit = table.score.partition(" (")[0].replace("in percent", "in points")
    drawn.supxlabel(f"difference in {unit}: seeds (rings), mean and 95 % interval", fontsize=9)
    drawn.suptitle(textwrap.fill(table.title, int(13 * drawn.get_figwidth())), fontsize=10)
    return drawn


def write(program: Program, table: Table, results: Results, directory: Path) -> list[Path]:
    """Write the figures of a table that have results, as PNG and PDF. Returns the paths of the PNG files."""
    paths = []
    with mpl.rc_context(_RC):
        for figure in table.figures:
            if isinstance(figure, CurveFigure):
                drawn = curves(figure, program, table, results)
            elif isinstance(figure, ContrastFigure):
                drawn = contrasts(program, table, results)
            else:
                drawn = sweep(figure, program, table, results)
            if drawn is not None:
                directory.mkdir(parents=True, exist_ok=True)
                path = directory / f"{figure.id}.png"
                drawn.savefig(path, dpi=160, metadata={"Software": None})
                drawn.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
                paths.append(path)
    return paths
