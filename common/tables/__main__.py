"""Rows, scripts, tables and figures: python -m common.tables {list,emit,status,collect,compare,plot,submit}."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from common.runs import ROOT, FlagParser, clean_errors, write_atomic
from common.tables import collect, compare, emit, slurm, status
from common.tables.rows import Program, Table, programs, select

_COMMANDS = {
    "list": "print the rows",
    "emit": "write the script of every row to generated-scripts/",
    "status": "print where the runs stand and what is left",
    "collect": "make tables of the finished results: Markdown, CSV and LaTeX",
    "compare": "print finished runs beside each other, rows or not, with what measuring found",
    "plot": "make the figures of tables with finished results: PNG and PDF",
    "submit": "submit every row and seed to Slurm, as one array",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = FlagParser(prog="python -m common.tables", description="Rows, scripts, tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=FlagParser)
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in _COMMANDS.items()}
    for name, command in made.items():
        if name not in ("emit", "compare"):
            command.add_argument("--subproject", help="only this subproject")
            command.add_argument("--table", help="only this table")
            command.add_argument("--row", metavar="PATTERN", help="only rows whose id matches, such as 'resnet20-*'")
            command.add_argument(
                "--evidence", action="store_true", help="the rows of evidence/ in place of the paper's; collect also draws"
            )
        if name in ("status", "collect", "plot"):
            command.add_argument("--results", type=Path, help="where runs wrote (default: results/, --evidence: evidence/)")
        if name in ("collect", "plot"):
            command.add_argument("--out", type=Path, help="where a folder per table goes (default: the results folder)")
    made["status"].add_argument("--all", action="store_true", help="also show rows that were not begun")
    made["collect"].add_argument("--html", action="store_true", help="also make one page of tables and figures, index.html")
    made["compare"].add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
    job = made["submit"]
    job.add_argument("--parallel", type=int, default=32, metavar="N", help="jobs at a time")
    job.add_argument("--gpus", type=int, default=1, help="GPUs of a job")
    job.add_argument("--cpus", type=int, default=4, help="processors of a job")
    job.add_argument("--minutes", type=int, default=24 * 60, help="time limit of a job, after which it is queued again")
    job.add_argument("--partition")
    job.add_argument("--logs", type=Path, default=ROOT / "results" / "slurm", help="where logs go")
    job.add_argument("flags", nargs="*", help="after --: flags for the program")
    args = parser.parse_args(argv)
    if args.command in ("collect", "plot") and args.evidence and args.row and args.out is None:
        parser.error(f"--row {args.row} would write parts of tables over those of evidence/: give --out too")
    if args.command in ("status", "collect", "plot") and args.results is None:
        args.results = ROOT / ("evidence" if args.evidence else "results")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with clean_errors("python -m common.tables"):
        if args.command == "emit":
            print(f"{emit.emit([*programs(), *programs('evidence')])} scripts in {emit.SCRIPTS}", file=sys.stderr)
            return
        if args.command == "compare":
            print(compare.table(args.runs))
            return
        chosen = select(
            programs("evidence" if args.evidence else "rows"), program=args.subproject, table=args.table, row=args.row
        )
        if args.command == "list":
            print_rows(chosen)
        elif args.command == "status":
            if not args.results.is_dir():
                raise ValueError(f"--results {args.results} is not a folder: no run has written there yet")
            states, problems = status.scan(args.results)
            for problem in problems:
                print(f"not read: {problem}", file=sys.stderr)
            print(status.render(chosen, states, all_rows=args.all))
        elif args.command == "submit":
            size = {"parallel": args.parallel, "gpus": args.gpus, "cpus": args.cpus, "minutes": args.minutes}
            jobs = slurm.submit(chosen, args.logs, flags=args.flags, partition=args.partition, **size)
            print(f"submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}; logs in {args.logs}", file=sys.stderr)
        else:
            make_tables(chosen, args)


def print_rows(chosen: Sequence[Program]) -> None:
    rows = [
        (f"{table.id}/{row.id}", program.config_hash(row), row.parameters, f"{row.hours * len(row.seeds):.1f}", row.label)
        for program in chosen
        for table in program.tables
        for row in table.rows
    ]
    print(tabulate(rows, ["row", "configuration", "parameters", "GPU-hours", "label"], tablefmt="plain", intfmt=","))


def make_tables(chosen: Sequence[Program], args: argparse.Namespace) -> None:
    """Tables (collect), figures (plot) or both (collect --evidence or --html) of the tables that have results."""
    found, problems = collect.read(args.results)
    for problem in problems:
        print(f"not counted: {problem}", file=sys.stderr)
    results = collect.by_configuration(found)
    out = args.out or args.results
    html = args.command == "collect" and args.html
    begun: list[tuple[Program, Table, Sequence[Path]]] = []
    stopped: list[str] = []
    for program in chosen:
        for table in program.tables:
            lines = collect.lines(program, table, results)
            if not any(line.n for line in lines) and args.table is None:
                continue
            for result in collect.outdated(program, table, found):
                print(
                    f"not counted in {table.id}: {result.path} is of row {result.row} in another configuration", file=sys.stderr
                )
            try:
                collect.check(program, table, found)
            except ValueError as error:
                stopped.append(str(error))
                continue
            figures: list[Path] = []
            if args.command == "plot" or html or args.evidence:
                from common.tables import plot  # matplotlib takes a second to load

                figures = plot.write(program, table, results, out / table.id)
            if args.command == "collect":
                contrasts = [difference for difference, _ in collect.differences(program, table, results)]
                collect.write(table, lines, out / table.id, contrasts)
                print(collect.to_markdown(table, lines, contrasts))
            else:
                print(*figures, sep="\n")
            begun.append((program, table, figures))
    if not begun and not stopped:
        raise ValueError(f"no row has a finished result in {args.results}")
    if html:
        from common.tables import page

        write_atomic(out / "index.html", page.render(begun, results, problems, out / "index.html"))
        print(f"page: {out / 'index.html'}", file=sys.stderr)
    if stopped:
        raise ValueError("; ".join(stopped))


if __name__ == "__main__":
    main()
