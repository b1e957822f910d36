"""Rows, scripts, tables and figures: python -m common.tables {list,run,emit,status,collect,compare,plot,submit}."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from ..experiments.config import FlagParser, natural, positive_int, say_interrupted
from ..experiments.files import ROOT, write_atomic
from ..experiments.runs import clean_errors, directory_of
from . import archive, compare, documents, emit, reading, rendering, run, slurm, status
from .commands import configuration
from .rows import Program, Table, kinds, programs, select
from .summaries import contrast_results, summarize

_COMMANDS = {
    "list": "print the rows",
    "run": "run rows of the paper or of evidence/, and print the paths of their results",
    "emit": "write the script of every row to generated-scripts/",
    "status": "print the state of the runs and the remaining GPU-hours",
    "collect": "make tables of the finished results: Markdown, CSV and LaTeX",
    "compare": "print finished runs side by side, with their measured cost; they need not be rows of a table",
    "plot": "make the figures of tables with finished results: PNG and PDF",
    "submit": "submit every row and seed to Slurm as one job array",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked flags. Words after ``--`` are for the program, and are stored in ``flags``."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = FlagParser(prog="python -m common.tables", description="Rows, scripts, tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=FlagParser)
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in _COMMANDS.items()}
    for name, command in made.items():
        if name not in ("run", "emit", "compare"):
            command.add_argument("--subproject", help="only this subproject")
            command.add_argument("--table", help="only this table")
            command.add_argument("--row", metavar="PATTERN", help="only rows whose id matches, such as 'resnet20-*'")
            command.add_argument(
                "--evidence",
                action="store_true",
                help="the rows of evidence/ instead of the paper's; collect then also draws, and fills numbers in documents",
            )
        if name in ("status", "collect", "plot"):
            command.add_argument(
                "--results", type=Path, help="folder of the runs (default: results/; with --evidence, evidence/)"
            )
        if name in ("collect", "plot"):
            command.add_argument("--out", type=Path, help="where to write a folder per table (default: the results folder)")
    made["status"].add_argument("--all", action="store_true", help="also show rows that have not started")
    made["collect"].add_argument(
        "--html", action="store_true", help="also write index.html, one page with all tables and figures"
    )
    made["compare"].add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    job = made["submit"]
    job.add_argument("--parallel", type=positive_int, default=32, metavar="N", help="maximum number of jobs at a time")
    job.add_argument("--gpus", type=natural, default=1, help="GPUs per job")
    job.add_argument("--cpus", type=positive_int, default=4, help="processors per job")
    job.add_argument(
        "--minutes", type=positive_int, default=24 * 60, help="time limit of a job, after which it is queued again to resume"
    )
    job.add_argument("--partition")
    job.add_argument("--logs", type=Path, default=ROOT / "results" / "slurm", help="folder for the logs")
    _add_run_flags(made["run"])
    for name in ("run", "submit"):
        made[name].epilog = "Flags after -- go to the program."
    args = parser.parse_args(words)
    if flags and args.command not in ("run", "submit"):
        parser.error(f"flags after -- are only for run and submit, got {shlex.join(flags)}")
    args.flags = flags
    given = {word.partition("=")[0].replace("_", "-") for word in flags}
    for own in ("--seed", "--row", "--row-config"):
        if own in given:
            parser.error(f"{own} cannot be given to the program: {args.command} sets it (run takes --seeds, before the --)")
    if args.command == "run" and args.commands and (len(args.rows) != 1 or not args.seeds):
        parser.error("--command needs exactly one TABLE/ROW, and --seeds")
    if args.command in ("collect", "plot") and args.evidence and args.row and args.out is None:
        parser.error(f"--row {args.row} would overwrite complete tables of evidence/ with parts: give --out too")
    if args.command in ("status", "collect", "plot") and args.results is None:
        args.results = ROOT / ("evidence" if args.evidence else "results")
    return args


def _words(text: str) -> tuple[str, ...]:
    """The words of a text, split as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot be split into words: {error}, got {text!r}") from error


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be above 0 and below a million, got {text}")
    return value


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("rows", nargs="+", metavar="TABLE[/ROW]", help="rows; ROW may be a pattern, such as 'spectral*'")
    command.add_argument("--seeds", type=natural, nargs="+", metavar="SEED", help="seeds to run (default: each row's own)")
    command.add_argument(
        "--jobs", type=positive_int, default=1, metavar="N", help=f"number of runs at a time; above 1, logs go to {run.LOGS}"
    )
    command.add_argument(
        "--launcher",
        type=_words,
        default=os.environ.get("LAUNCHER", ""),
        metavar="WORDS",
        help="command that starts the programs, such as 'torchrun --nproc-per-node 4'; the variable LAUNCHER sets the default",
    )
    command.add_argument(
        "--minutes", type=_minutes, metavar="M", help="stop all runs after M minutes; each saves a checkpoint to resume from"
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help=f"at the end, put results and checkpoints of these runs in DIR/{archive.NAME}"
    )
    command.add_argument(
        "--from", dest="archive", type=Path, metavar="ARCHIVE", help="first, restore the runs of an archive that --out wrote"
    )
    command.add_argument(
        "--command",
        dest="commands",
        action="append",
        type=_words,
        metavar="WORDS",
        help="run this instead of the row's command, as generated scripts do; if repeated, the commands run in order, and "
        "{after} stands for the folder of the previous command's result",
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with clean_errors("python -m common.tables"):
        if args.command == "emit":
            print(f"{emit.emit([*programs(), *programs('evidence')])} scripts in {emit.SCRIPTS}", file=sys.stderr)
            return
        if args.command == "compare":
            print(compare.table(args.runs, kinds(programs())))
            return
        if args.command == "run":
            run_rows(args)
            return
        chosen = select(
            programs("evidence" if args.evidence else "rows"), program=args.subproject, table=args.table, row=args.row
        )
        if args.command == "list":
            print_rows(chosen)
        elif args.command == "status":
            if not args.results.is_dir():
                raise ValueError(f"--results {args.results} is not a folder: no run has been written there yet")
            states, problems = status.scan(args.results, kinds(programs()))
            for problem in problems:
                print(f"not read: {problem}", file=sys.stderr)
            print(status.render(chosen, states, all_rows=args.all))
        elif args.command == "submit":
            size = {"parallel": args.parallel, "gpus": args.gpus, "cpus": args.cpus, "minutes": args.minutes}
            jobs = slurm.submit(chosen, args.logs, flags=args.flags, partition=args.partition, **size)
            print(f"submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}; logs in {args.logs}", file=sys.stderr)
        else:
            make_tables(chosen, args)


def run_rows(args: argparse.Namespace) -> None:
    """Run rows, and raise SystemExit with their exit status if it is not 0."""
    if args.commands:
        tasks = [run.task_of_commands(args.rows[0], args.commands, seed, args.flags) for seed in args.seeds]
    else:
        tasks = run.tasks_of([*programs(), *programs("evidence")], args.rows, args.seeds, args.flags)
    named = {word.partition("=")[0].replace("_", "-") for word in args.flags} & {"--save-dir", "--log-dir"}
    runs = sum(len(task.commands) for task in tasks)
    if named and (runs > 1 or args.out is not None):
        raise ValueError(
            f"{named.pop()} names the folder of a single run: leave it out for several runs (got {runs}) and with --out"
        )
    if args.archive is not None:
        print(f"{archive.unpack(args.archive)} runs found in {args.archive}", file=sys.stderr)
    try:
        ended = run.run(tasks, args.jobs, args.launcher, args.minutes)
    finally:
        if args.out is not None:
            directories = [directory_of(configuration(words)) for task in tasks for words in task.commands]
            print(
                f"{archive.pack(directories, args.out / archive.NAME)} runs put in {args.out / archive.NAME}", file=sys.stderr
            )
    if ended:
        raise SystemExit(ended)


def print_rows(chosen: Sequence[Program]) -> None:
    rows = [
        (f"{table.id}/{row.id}", program.config_hash(row), row.parameters, f"{row.hours * len(row.seeds):.1f}", row.label)
        for program in chosen
        for table in program.tables
        for row in table.rows
    ]
    print(tabulate(rows, ["row", "configuration", "parameters", "GPU-hours, all seeds", "label"], tablefmt="plain", intfmt=","))


def make_tables(chosen: Sequence[Program], args: argparse.Namespace) -> None:
    """Write tables (collect), figures (plot) or both (collect --evidence or --html) for all tables that have results."""
    known = kinds(programs())
    found, problems = reading.read(args.results, known)
    for problem in problems:
        print(f"not counted: {problem}", file=sys.stderr)
    results = reading.Results(found, known)
    out = args.out or args.results
    html = args.command == "collect" and args.html
    begun: list[tuple[Program, Table, Sequence[Path]]] = []
    stopped: list[str] = []
    named: list[Path] = []
    for program in chosen:
        for table in program.tables:
            for result in results.outdated(program, table):
                named.append(result.path)
                print(
                    f"not counted in {table.id}: {result.path} is recorded as row {result.row} but has another configuration",
                    file=sys.stderr,
                )
            summaries = summarize(program, table, results)
            if not any(each.n for each in summaries) and args.table is None:
                continue
            try:
                results.check(program, table)
            except ValueError as error:
                stopped.append(str(error))
                continue
            figures: list[Path] = []
            if args.command == "plot" or html or args.evidence:
                from . import plot  # matplotlib takes a second to load

                figures = plot.write(program, table, results, out / table.id)
            if args.command == "collect":
                contrasts = [result for result, _ in contrast_results(program, table, results)]
                rendering.write(table, summaries, out / table.id, contrasts)
                print(rendering.to_markdown(table, summaries, contrasts))
            elif figures:
                print(*figures, sep="\n")
            else:
                why = "none of its figures has results yet" if table.figures else "it has no figures"
                print(f"nothing to plot for {table.id}: {why}", file=sys.stderr)
            begun.append((program, table, figures))
    if not begun and not stopped:
        if not args.results.is_dir():
            raise ValueError(f"--results {args.results} is not a folder: no run has been written there yet")
        others = f"; the finished runs there ({len(found)}) are of other rows or of none: common.tables compare shows them"
        raise ValueError(f"no row has a finished result in {args.results}{others if found else ''}")
    if args.table is None and args.row is None:
        for result in results.of_no_row([*programs(), *programs("evidence")]):
            if result.path not in named:
                print(f"in no table: {result.path} belongs to no row; common.tables compare shows it", file=sys.stderr)
    if html:
        from . import page

        write_atomic(out / "index.html", page.render(begun, results, problems, out / "index.html"))
        print(f"page: {out / 'index.html'}", file=sys.stderr)
    if stopped:
        raise ValueError("; ".join(stopped))
    everything = args.out is None and args.results == ROOT / "evidence" and not (args.subproject or args.table or args.row)
    if args.command == "collect" and args.evidence and everything:
        for path in documents.fill_all(documents.Evidence(chosen, results, known)):
            print(f"filled: {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    say_interrupted("python -m common.tables")
    main()
