"""Measure time and memory of the table code at the size of a finished project: python -m benchmarks.tables.

It writes the scripts of 600 rows to an empty folder, and collects 2,000 result files (of 10 epochs each) into tables.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

from common.tables.emit import emit
from common.tables.reading import Results, read
from common.tables.rendering import write
from common.tables.rows import Program, Row, Table, kinds
from common.tables.summaries import summarize
from resnet_cifar.config import ResNetConfig

ROWS, RESULTS = 600, 2000


def program() -> Program:
    rows = [
        Row(f"row{i}", f"row {i}", ("--arch", "resnet20", "--rank-scale", "0.1", "--lr", f"{i + 1}e-4")) for i in range(ROWS)
    ]
    tables = tuple(Table(f"table{t}", f"table {t}", tuple(rows[t::10])) for t in range(10))
    return Program(ResNetConfig.program, {"train.py": ResNetConfig}, tables)


def write_results(made: Program, directory: Path) -> None:
    runs = [(table, row, seed) for seed in (1, 2, 3, 4) for table in made.tables for row in table.rows][:RESULTS]
    for table, row, seed in runs:
        path = directory / table.id / row.id / f"seed{seed}"
        path.mkdir(parents=True)
        result = {
            "format": 2,
            "status": "finished",
            "row": f"{table.id}/{row.id}",
            "script": row.script,
            "config": made.record(row),
            "config_hash": made.config_hash(row),
            "seed": seed,
            "metrics": {"final": 90.0 + seed, "best": 91.0 + seed},
            "parameters": {"original": 269_722, "compressed": 63_850, "ratio": 0.2367},
            "seconds": 10.0,
        }
        (path / "result.json").write_text(json.dumps(result, indent=2))
        (path / "metrics.jsonl").write_text(
            "".join(json.dumps({"epoch": e, "test_accuracy": 9.0 * e}) + "\n" for e in range(10))
        )


def main() -> None:
    made = program()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        started = time.perf_counter()
        count = emit([made], directory / "scripts")
        print(f"emit {count} scripts: {time.perf_counter() - started:.2f} s")
        write_results(made, directory / "results")
        started = time.perf_counter()
        found, problems = read(directory / "results", kinds([made]))
        results = Results(found, kinds([made]))
        for table in made.tables:
            write(table, summarize(made, table, results), directory / "tables" / table.id)
        print(f"collect {len(found)} results: {time.perf_counter() - started:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory: {peak:.0f} MiB; {len(problems)} problems")


if __name__ == "__main__":
    main()
