"""Rows as a Slurm array: one job a row and seed, preempted, queued again and gone on with exactly where it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.runs import REQUEUE, ROOT, config_hash
from common.tables.rows import Program, Row, Table

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission


class RowJob:
    """Commands of one row and seed; each prints the path of its result, whose directory is ``{after}`` in the next.

    Slurm announces preemption and time limits by SIGUSR2 to the processes of the job. The program then saves a checkpoint and
    exits with status 75; submitit calls :meth:`checkpoint`, which waits for that, and queues the job again. Commands
    resume by themselves.
    """

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self.commands = [list(command) for command in commands]
        self._process: subprocess.Popen[str] | None = None

    def __call__(self) -> str:
        result = ""
        for command in self.commands[:-1]:  # that other jobs may need as well: they wait for the one that runs it
            with _alone(command):
                result = self._run(command, result)
        return self._run(self.commands[-1], result)

    def _run(self, command: Sequence[str], result: str) -> str:
        words = [word.replace("{after}", str(Path(result).parent)) for word in command]
        status = REQUEUE
        while status == REQUEUE:  # told to stop although the job was not: go on at once
            self._process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            output, _ = self._process.communicate()
            status = self._process.returncode
        if status != 0:
            raise subprocess.CalledProcessError(status, words)
        return output.strip()

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit, in its signal handler, before it queues the job again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                self._process.send_signal(signal.SIGUSR2)
                # Not Popen.wait: the handler may have interrupted one, which holds its lock.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(RowJob(self.commands))


@contextlib.contextmanager
def _alone(command: Sequence[str]) -> Generator[None]:
    """Let one job at a time run a command."""
    (ROOT / "results").mkdir(exist_ok=True)
    with open(ROOT / "results" / f".{config_hash({'command': list(command)})}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def job(program: Program, table: Table, row: Row, seed: int, flags: Sequence[str] = ()) -> RowJob:
    """The job of a row and seed: first the row that must have run before, if any."""
    rows = [row] if row.after is None else [row.after, row]
    return RowJob([[*program.command(table, each), "--seed", str(seed), *flags] for each in rows])


def submit(
    programs: Sequence[Program],
    folder: Path,
    *,
    parallel: int = 32,
    gpus: int = 1,
    cpus: int = 4,
    minutes: int = 24 * 60,
    flags: Sequence[str] = (),
    partition: str | None = None,
) -> list[Job[str]]:
    """Submit every row and seed as one array with at most ``parallel`` jobs at a time; returns submitit's jobs.

    Logs and the array's script go to ``folder``. Raises ValueError where submitit or Slurm is missing.
    """
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError
    except ModuleNotFoundError as error:
        raise ValueError(
            "submitting to Slurm needs submitit: .venv/bin/pip install -c constraints.txt -e '.[slurm]'"
        ) from error
    if SlurmExecutor.affinity() < 0:
        raise ValueError("there is no Slurm here: srun is not on PATH")
    executor = SlurmExecutor(folder, max_num_timeout=1000)
    options: dict[str, Any] = {"gpus_per_node": gpus} if gpus else {}
    if partition:
        options["partition"] = partition
    executor.update_parameters(time=minutes, array_parallelism=parallel, cpus_per_task=cpus, **options)
    jobs = [job(p, t, row, seed, flags) for p in programs for t in p.tables for row in t.own_runs() for seed in row.seeds]
    try:
        return executor.submit_array(jobs)
    except FailedJobError as error:
        raise ValueError(f"sbatch refused the array: {error}") from error
