"""Runs rows one after another in this process, or several at a time in workers that each import torch once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from ..experiments.config import Config
from ..experiments.files import ROOT
from ..experiments.runs import REQUEUE
from .commands import CommandError, RowRun, Words, commands_of, configuration, no_interrupts
from .mps import shared_gpus, visible_gpus
from .rows import SAFE, Program, select

LOGS = ROOT / "results" / "logs"
KILLED = 128 + signal.SIGKILL  # status of a process that was killed, as shells report it


@dataclass(frozen=True)
class Task:
    """One row, "table/row", and seed, with its commands as for :class:`RowRun`."""

    row: str
    seed: int
    commands: tuple[Words, ...]

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"


def log_of(task: Task) -> Path:
    """Where the standard error of a worker's run goes."""
    return LOGS / f"{task.row}-seed{task.seed}.txt"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, its standard output, and the seconds it took."""

    status: int
    printed: str = ""
    seconds: float = 0.0

    def describe(self) -> str:
        if self.status == 0:
            return f"finished in {self.seconds:.0f} s"
        if self.status == REQUEUE:
            return "stopped; run it again to resume"
        return "its process died: killed, or out of memory" if self.status == KILLED else f"failed with status {self.status}"


def tasks_of(programs: Sequence[Program], rows: Sequence[str], seeds: Sequence[int] | None, flags: Sequence[str]) -> list[Task]:
    """The runs of rows, given as TABLE or TABLE/PATTERN. Seeds default to each row's own.

    Rows that another row of their table runs first are omitted, as in lists of scripts. Raises ValueError if there is no such
    table or row.
    """
    found: dict[tuple[str, int], Task] = {}
    for word in rows:
        table_id, slash, pattern = word.partition("/")
        for program in select(programs, table=table_id, row=pattern if slash else None):
            for table in program.tables:
                for row in table.own_runs():
                    for seed in seeds or row.seeds:
                        task = Task(f"{table.id}/{row.id}", seed, commands_of(program, table, row, seed, flags))
                        found.setdefault((task.row, seed), task)
    return list(found.values())


def task_of_commands(row: str, commands: Sequence[Words], seed: int, flags: Sequence[str]) -> Task:
    """The run of exactly these commands for a seed, as a generated script passes them."""
    if not all(SAFE.fullmatch(part) for part in row.split("/")) or row.count("/") != 1:
        raise ValueError(f"--command needs one row such as quickstart/full, got {row!r}")
    if any("{after}" in word for word in commands[0]):
        raise ValueError("{after} in the first --command stands for nothing: it is the folder of the previous command's result")
    return Task(row, seed, tuple((*words, "--seed", str(seed), *flags) for words in commands))


def run(tasks: Sequence[Task], jobs: int = 1, launcher: Sequence[str] = (), minutes: float | None = None) -> int:
    """Run the tasks, ``jobs`` at a time, and print the paths of their results. Returns the exit status.

    After ``minutes``, all runs are told to save a checkpoint and stop. A run that fails does not keep the others from running.
    The status is 75 if runs were stopped. Otherwise it is that of the failed runs, or 1 if they failed differently. Flags are
    checked before any run starts; wrong ones end the process.
    """
    if launcher and shutil.which(launcher[0]) is None:
        raise ValueError(f"LAUNCHER, or --launcher, starts with {launcher[0]!r}, which is not a program on PATH: give its path")
    configs = [configuration(command) for task in tasks for command in task.commands]
    jobs = min(jobs, len(tasks))
    failed: list[tuple[Task, Outcome]] = []
    on_gpu = jobs > 1 and not all(getattr(config, "device", "") == "cpu" or getattr(config, "cpu", False) for config in configs)
    gpus = visible_gpus() if on_gpu and not launcher and all(map(_may_take_any_gpu, configs)) else []
    outcomes = _in_workers(tasks, jobs, launcher, gpus if len(gpus) > 1 else ()) if jobs > 1 else _here(tasks, launcher)
    stopped, number = False, 0
    with (
        shared_gpus() if on_gpu else nullcontext(),
        _time_limit(minutes),
        tqdm(total=len(tasks), desc="runs", unit="run", disable=None if jobs > 1 else True) as bar,
    ):
        for number, (task, outcome) in enumerate(outcomes, 1):
            bar.update()
            if outcome.printed:
                tqdm.write(outcome.printed.rstrip("\n"), file=sys.stdout)
                sys.stdout.flush()
            if len(tasks) > 1:
                tqdm.write(f"[{number}/{len(tasks)}] {task.name}: {outcome.describe()}", file=sys.stderr)
            stopped = stopped or outcome.status == REQUEUE
            if outcome.status not in (0, REQUEUE):
                failed.append((task, outcome))
    for task, outcome in failed if len(tasks) > 1 else ():
        print(f"failed: {task.name}: {outcome.describe()}{f'; see {log_of(task)}' if jobs > 1 else ''}", file=sys.stderr)
    if stopped or number < len(tasks):
        return REQUEUE
    if not failed:
        return 0
    statuses = {outcome.status for _, outcome in failed}
    return statuses.pop() if len(statuses) == 1 else 1


def _may_take_any_gpu(config: Config) -> bool:
    return getattr(config, "device", "auto") in ("auto", "cuda") and getattr(config, "distributed_world_size", 1) == 1


def _execute(task: Task, launcher: Sequence[str]) -> Outcome:
    started = time.monotonic()
    row_run = RowRun(task.commands, launcher)
    try:
        with row_run.stopped_by_signals():
            status, printed = 0, row_run()
    except CommandError as error:
        status, printed = error.status, ""
    except SystemExit as end:
        status, printed = end.code if isinstance(end.code, int) else 1, ""
    except Exception:  # from the run, or from the disk that holds its lock
        traceback.print_exc()
        status, printed = 1, ""
    return Outcome(status, printed, time.monotonic() - started)


def _here(tasks: Sequence[Task], launcher: Sequence[str]) -> Generator[tuple[Task, Outcome]]:
    with _stop_requests(lambda: None) as stop:  # between two runs; during one, the program itself is told
        for task in tasks:
            if stop.is_set():
                return
            outcome = _execute(task, launcher)
            yield task, outcome
            if outcome.status == REQUEUE:
                return


@contextmanager
def _time_limit(minutes: float | None) -> Generator[None]:
    """Send this process SIGTERM, which stops its runs, after the given minutes."""
    if minutes is None:
        yield
        return
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Worker:
    """A process that runs one task after another. It has its own pool, so that its death does not affect the others."""

    def __init__(self, threads: int, gpu: str | None) -> None:
        self.gpu = gpu
        context = multiprocessing.get_context("spawn")
        with no_interrupts():
            self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_worker, initargs=(threads, gpu))
            self.process = self.pool.submit(os.getpid).result()

    def start(self, task: Task, launcher: Sequence[str]) -> Future[Outcome]:
        return self.pool.submit(_execute_in_worker, task, launcher, log_of(task))

    def stop_task(self) -> None:
        """Tell the running program to save a checkpoint and stop."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGTERM)


def _in_workers(
    tasks: Sequence[Task], jobs: int, launcher: Sequence[str], gpus: Sequence[str] = ()
) -> Generator[tuple[Task, Outcome]]:
    """Run tasks in ``jobs`` processes, each of which sees one of the GPUs, or all of them if none are given."""
    waiting, idle = deque(tasks), list[_Worker]()
    free = deque(gpus[slot % len(gpus)] if gpus else None for slot in range(jobs))
    running: dict[Future[Outcome], tuple[Task, _Worker]] = {}
    threads = max(1, _cores() // jobs)

    def stop_all() -> None:
        for _, worker in list(running.values()):
            worker.stop_task()

    with _stop_requests(stop_all) as stop:
        try:
            while running or (waiting and not stop.is_set()):
                while waiting and len(running) < jobs and not stop.is_set():
                    worker = idle.pop() if idle else _Worker(threads, free.popleft())
                    task = waiting.popleft()
                    running[worker.start(task, launcher)] = task, worker
                    if stop.is_set():  # the request came while the worker started, and did not reach it
                        worker.stop_task()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task, worker = running.pop(future)
                    outcome = _outcome(future, task, stopped=stop.is_set())
                    if outcome.status == KILLED or (stop.is_set() and outcome.status == REQUEUE):
                        worker.pool.shutdown()
                        free.append(worker.gpu)
                    else:
                        idle.append(worker)
                    if outcome.status == REQUEUE and not stop.is_set():  # one run was stopped from outside: stop all
                        stop.set()
                        stop_all()
                    yield task, outcome
        finally:
            for worker in (*idle, *(worker for _, worker in running.values())):
                worker.pool.shutdown()


def _outcome(future: Future[Outcome], task: Task, *, stopped: bool) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(REQUEUE if stopped else KILLED)
    except OSError as error:  # its log cannot be written
        print(f"{task.name}: {error}", file=sys.stderr)
        return Outcome(1)


@contextmanager
def _stop_requests(stop_all: Callable[[], None]) -> Generator[threading.Event]:
    """An event that SIGTERM, SIGUSR2 and SIGINT set before ``stop_all``. A second SIGINT raises KeyboardInterrupt."""
    requested = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        requested.set()
        stop_all()

    numbers = [signal.SIGTERM, signal.SIGUSR2]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_worker(threads: int, gpu: str | None) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch, which reads both, is not loaded yet
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent passes it on
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Stop, after saving a checkpoint, when the process that started this one has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _execute_in_worker(task: Task, launcher: Sequence[str], path: Path) -> Outcome:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log:
        os.dup2(log.fileno(), 1)  # for libraries: what programs print is captured
        os.dup2(log.fileno(), 2)
    outcome = _execute(task, launcher)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(outcome.status)  # otherwise the pool would wait for its next task forever
    return outcome
