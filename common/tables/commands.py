"""Runs the commands of one row and seed in order, for ``run`` (which generated scripts call) and for Slurm jobs."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ..experiments.config import Config
from ..experiments.files import ROOT
from ..experiments.runs import REQUEUE
from .rows import Program, Row, Table, programs

Words = tuple[str, ...]


class CommandError(Exception):
    """A command did not finish. ``status`` is its exit status; 75 means that it was told to stop and can be resumed."""

    def __init__(self, status: int, words: Sequence[str]) -> None:
        super().__init__(f"{words[0]} ended with status {status}")
        self.status = status


def commands_of(program: Program, table: Table, row: Row, seed: int, flags: Sequence[str] = ()) -> tuple[Words, ...]:
    """The commands of a row and seed: first those of the rows that must run before it, if any."""
    return tuple((*program.command(table, each), "--seed", str(seed), *flags) for each in row.chain())


@cache
def _programs() -> dict[str, Program]:
    return {program.name: program for program in [*programs("evidence"), *programs()]}


def _program_of(words: Sequence[str]) -> Program:
    name, _, script = words[0].partition("/") if words else ("", "", "")
    program = _programs().get(name)
    if program is None or script not in program.configs:
        known = ", ".join(f"{each.name}/{script}" for each in _programs().values() for script in each.configs)
        raise ValueError(f"a command must begin with a program, got {words[0] if words else 'no word'!r}: there are {known}")
    return program


def configuration(words: Sequence[str]) -> Any:
    """The configuration of a command. Wrong flags end the process with one line on stderr and exit status 2."""
    kind: type[Config] = _program_of(words).configs[words[0].partition("/")[2]]
    return kind.parse(words[1:])


class RowRun:
    """The commands of one row and seed. Each prints the path of its result; ``{after}`` in the next is the result's folder.

    commands:  each is a list of words, the first of which is a program such as "resnet_cifar/train.py". The last command is
               the row's own. Earlier ones may belong to other rows, too; processes that need the same one wait for each other.
    launcher:  words that replace the interpreter. Without them a program runs in this process, so that consecutive runs
               import torch only once, unless the program needs its own process.
    cwd:       directory of the subprocesses (default: the current one).
    process:   the current subprocess, if any.
    """

    def __init__(self, commands: Sequence[Sequence[str]], launcher: Sequence[str] = (), cwd: Path | None = None) -> None:
        self.commands, self.launcher, self.cwd = [tuple(command) for command in commands], list(launcher), cwd
        self.process: subprocess.Popen[str] | None = None
        self._told_to_stop = False

    def __call__(self) -> str:
        """Run the commands, and return what the last one printed. Raises CommandError if one fails or is stopped."""
        after = Path()
        for command in self.commands[:-1]:
            with _alone(command):
                after = self._result(command, self._run(command, after)).parent
        return self._run(self.commands[-1], after)

    def _result(self, command: Words, printed: str) -> Path:
        if not printed.strip():
            raise CommandError(1, (f"{command[0]}, which printed no path of a result,",))
        return Path(printed.strip().splitlines()[-1])

    def _run(self, command: Words, after: Path) -> str:
        words = [word.replace("{after}", str(after)) for word in command]
        if self.launcher or _program_of(words).own_process:
            status, printed = self._start(words)
        else:
            status, printed = _call(words)
        if status != 0:
            raise CommandError(status, words)
        return printed

    def _start(self, words: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of a command in its own process, which imports the packages of this clone."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        started = [*(self.launcher or [sys.executable]), str(ROOT / words[0]), *words[1:]]
        with no_interrupts():
            self.process = subprocess.Popen(
                started, stdout=subprocess.PIPE, text=True, cwd=self.cwd, env={**os.environ, "PYTHONPATH": path}
            )
        try:
            printed, _ = self.process.communicate()
            status = self.process.returncode
        finally:
            self.process = None
        if status != 0 and self._told_to_stop:
            return REQUEUE, printed  # a launcher may use another status for a stop
        return (status if status >= 0 else 128 - status), printed

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Generator[None]:
        """Within the block, SIGTERM, SIGUSR2 and SIGINT tell the program to save a checkpoint and stop.

        A second SIGINT raises KeyboardInterrupt.
        """

        def stop(number: int, frame: Any) -> None:
            if self.process is not None:
                self._told_to_stop = True
                self.process.terminate()
            else:  # the program is loading, or reading its data: there is nothing to save
                print("told to stop: run it again to resume", file=sys.stderr)
                raise SystemExit(REQUEUE)

        def interrupt(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGTERM)  # while a program trains, it handles this itself

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # workers and a script's background jobs ignore it
            before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _call(words: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a command that runs in this process, whose state is restored."""
    main = import_module(words[0].removesuffix(".py").replace("/", ".")).main
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main(list(words[1:]))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
            status = 1
    _clean_up()
    return status, printed.getvalue()


def _clean_up() -> None:
    """Undo a program's global changes, so that the next one starts as in a new process. Each seeds its own generators."""
    import torch

    gc.collect()  # frees models and open files of a failed run
    torch.set_flush_denormal(False)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code counts towards a limit, beyond which nothing more is compiled
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def no_interrupts() -> Generator[None]:
    """Make processes that start within the block ignore Ctrl-C, which the terminal sends to them and to their parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _alone(command: Words) -> Generator[None]:
    """Let only one process at a time run this configuration and seed, be it a script, a job or ``run``."""
    config = configuration(command)
    path = ROOT / "results" / f".{config.config_hash()}-{config.seed}.lock"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is running {config.row or command[0]} seed {config.seed}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
