"""The states of rows' runs (finished, running, stopped, failed or missing), and the remaining GPU-hours."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..experiments.files import read_json
from ..experiments.results import NAME, RunResult
from .reading import read
from .rows import Key, Kinds, Program, Row, keys

STALE = 900  # seconds without a heartbeat after which a run no longer counts as running
_STATES = ("finished", "running", "stopped", "failed")


@dataclass(frozen=True)
class RunState:
    """One run's state, the share of its steps that are done, and its last error."""

    state: str
    done: float = 0.0
    error: str = ""


def _state(directory: Path, found: Sequence[Key], seed: int, known: Kinds, now: float) -> RunState:
    if (directory / NAME).exists():
        try:
            result = RunResult.load(directory / NAME)
            result.check(known)
        except ValueError as error:
            return RunState("failed", 0.0, f"{error}; remove it, and the run resumes from its checkpoint")
        if result.seed == seed and not set(found).isdisjoint(keys(result.config, known, result.script)):
            return RunState("finished", 1.0)
    status: dict[str, Any] = read_json(directory / "status.json") if (directory / "status.json").exists() else {}
    done = min(status.get("step", 0) / status["steps"], 1.0) if status.get("steps") else 0.0
    if status.get("status") == "running":
        fresh = now - status["time"] < STALE
        return RunState("running" if fresh else "failed", done, "" if fresh else "no heartbeat: killed, or its machine is gone")
    if status.get("status") == "stopped":
        return RunState("stopped", done)
    return RunState("failed", done, status.get("error", "no status"))


def scan(directory: Path, known: Kinds) -> tuple[dict[tuple[Key, int], RunState], list[str]]:
    """The state of every run below a directory, by key and seed, and messages for unreadable files.

    If several runs share a key and seed, the furthest one counts. A run of which only the result was kept, as in evidence/, is
    finished.
    """
    found = {
        (key, run.seed): RunState("finished", 1.0)
        for run in read(directory, known)[0]
        for key in keys(run.config, known, run.script)
    }
    problems = []
    now = time.time()
    for path in sorted(directory.rglob("config.json")):
        try:
            config = read_json(path)
            seed, _ = config.pop("seed"), config.pop("inputs", None)
            of_run = keys(config, known)
            state = _state(path.parent, of_run, seed, known, now)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        except (KeyError, TypeError, AttributeError):
            continue  # not the configuration of a run
        for key in of_run:
            best = found.setdefault((key, seed), state)
            if (_STATES.index(state.state), -state.done) < (_STATES.index(best.state), -best.done):
                found[key, seed] = state
    return found, problems


def hours_left(row: Row, states: Sequence[RunState]) -> float:
    return row.hours * sum(1 - state.done for state in states)


def render(programs: Sequence[Program], found: Mapping[tuple[Key, int], RunState], *, all_rows: bool) -> str:
    """A line per row that has started (or per row, with ``all_rows``), the last errors, and totals."""
    lines, errors = [], []
    totals = dict.fromkeys((*_STATES, "missing"), 0)
    hours, rows = 0.0, 0
    for program in programs:
        for table in program.tables:
            for row in table.rows:
                key = program.key(row)
                states = {seed: found.get((key, seed), RunState("missing")) for seed in row.seeds}
                counts = {name: sum(state.state == name for state in states.values()) for name in totals}
                left = hours_left(row, list(states.values()))
                rows, hours = rows + 1, hours + left
                totals = {name: totals[name] + counts[name] for name in totals}
                if all_rows or counts["missing"] < len(states):
                    lines.append([f"{table.id}/{row.id}", *(counts[name] or "" for name in totals), f"{left:.1f}"])
                errors += [
                    f"{table.id}/{row.id} seed {s}: {state.error}" for s, state in states.items() if state.state == "failed"
                ]
    text = tabulate(lines, ["row", *totals, "GPU-hours left"], tablefmt="simple", disable_numparse=True)
    summary = ", ".join(f"{count} {name}" for name, count in totals.items() if count)
    hidden = f" ({rows - len(lines)} rows have not started and are not shown; --all shows them)" if len(lines) < rows else ""
    return "\n".join(
        [text, *(f"failed: {error}" for error in errors), f"{rows} rows{hidden}: {summary}; {hours:.1f} GPU-hours left"]
    )
