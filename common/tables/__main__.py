"""Rows, scripts, tables and figures: python -m common.tables {list,emit,collect,plot}."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from common.runs import ROOT, FlagParser, clean_errors
from common.tables import collect, emit
from common.tables.rows import programs, select


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(prog="python -m common.tables", description="Rows, scripts, tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=FlagParser)
    help = {
        "list": "print the rows",
        "emit": "write the script of every row to generated-scripts/",
        "collect": "make tables of the finished results, with their figures",
    }
    for name, text in help.items():
        command = commands.add_parser(name, help=text, description=text)
        if name != "emit":
            command.add_argument("--subproject", help="only this subproject")
            command.add_argument("--table", help="only this table")
            command.add_argument("--row", metavar="PATTERN", help="only rows whose id matches, such as 'resnet20-*'")
        if name == "collect":
            command.add_argument("--results", type=Path, default=ROOT / "results", help="where runs wrote")
            command.add_argument("--out", type=Path, help="where tables go, in a folder each (default: the results folder)")
    args = parser.parse_args(argv)
    with clean_errors(parser.prog):
        if args.command == "emit":
            print(f"{emit.emit(programs())} scripts in {emit.SCRIPTS}", file=sys.stderr)
            return
        chosen = select(programs(), program=args.subproject, table=args.table, row=args.row)
        if args.command == "list":
            rows = [
                (f"{t.id}/{r.id}", p.config_hash(r), r.parameters, f"{r.hours * len(r.seeds):.1f}", r.label)
                for p in chosen
                for t in p.tables
                for r in t.rows
            ]
            print(tabulate(rows, ["row", "configuration", "parameters", "GPU-hours", "label"], tablefmt="plain", intfmt=","))
            return
        from common.tables import plot  # matplotlib takes a second to load

        found, problems = collect.read(args.results)
        for problem in problems:
            print(f"not counted: {problem}", file=sys.stderr)
        results = collect.by_configuration(found)
        for program in chosen:
            for table in program.tables:
                lines = collect.lines(program, table, results)
                if not any(line.n for line in lines) and args.table is None:
                    continue
                directory = (args.out or args.results) / table.id
                collect.write(table, lines, directory)
                print(collect.to_markdown(table, lines))
                for path in plot.write(program, table, results, directory):
                    print(f"figure: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
