"""Rows as a Slurm array: one job per row and seed, which is requeued after preemption and resumed from its checkpoint."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.files import ROOT
from ..experiments.runs import REQUEUE
from .commands import CommandError, RowRun, commands_of, configuration
from .rows import Program, Row, Table

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission


class RowJob:
    """The commands of one row and seed as a job (see :class:`RowRun`). Each runs in its own process.

    Slurm announces preemption and time limits by sending SIGUSR2 to the processes of the job. The program then saves a
    checkpoint and exits with status 75. submitit calls :meth:`checkpoint`, which waits for that, and queues the job again.
    Commands resume by themselves.
    """

    def __init__(self, commands: Sequence[Sequence[str]], launcher: Sequence[str] = (sys.executable,)) -> None:
        self.commands, self.launcher = [list(command) for command in commands], list(launcher)
        self._run: RowRun | None = None

    def __call__(self) -> str:
        self._run = RowRun(self.commands, self.launcher, cwd=ROOT)
        while True:
            try:
                return self._run().strip()
            except CommandError as error:
                if error.status != REQUEUE:  # 75: it was told to stop although the job was not, so resume at once
                    raise

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit, in its signal handler, before it queues the job again."""
        from submitit.helpers import DelayedSubmission

        process = self._run.process if self._run else None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                process.send_signal(signal.SIGUSR2)
                # Not Popen.wait: the handler may have interrupted such a call, which holds its lock.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(RowJob(self.commands, self.launcher))


def job(program: Program, table: Table, row: Row, seed: int, flags: Sequence[str] = ()) -> RowJob:
    """The job of a row and seed."""
    return RowJob(commands_of(program, table, row, seed, flags))


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
    """Submit every row and seed as one array with at most ``parallel`` jobs at a time. Returns submitit's jobs.

    Logs and the array's script go to ``folder``. Raises ValueError if submitit or Slurm is missing, or sbatch fails.
    """
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError
    except ModuleNotFoundError as error:
        raise ValueError(
            "submitting to Slurm needs submitit: .venv/bin/pip install -c constraints.txt -e '.[slurm]'"
        ) from error
    if SlurmExecutor.affinity() < 0:
        raise ValueError("Slurm is unavailable: srun is not on PATH")
    executor = SlurmExecutor(folder, max_num_timeout=1000)
    options: dict[str, Any] = {"gpus_per_node": gpus} if gpus else {}
    # The job imports the packages of this clone, not folders of the same names in the current directory.
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    options["setup"] = [path, "export PYTHONSAFEPATH=1"]
    if partition:
        options["partition"] = partition
    executor.update_parameters(time=minutes, array_parallelism=parallel, cpus_per_task=cpus, **options)
    jobs = [job(p, t, row, seed, flags) for p in programs for t in p.tables for row in t.own_runs() for seed in row.seeds]
    for command in (command for each in jobs for command in each.commands):
        configuration(command)  # refuses wrong flags now, instead of in every job
    try:
        return executor.submit_array(jobs)
    except FailedJobError as error:
        raise ValueError(f"sbatch refused the array: {error}") from error
