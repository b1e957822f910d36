"""The directory, lock and records of a run, and clean failure. All programs share them.

A run is one configuration with one seed. Its directory holds ``config.json``, ``metrics.jsonl`` (one line per epoch),
``status.json`` (a heartbeat), checkpoints and, after the run has finished, ``result.json``. Importing this module does not
import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from .config import Config, completed, config_hash, differing_values, identity
from .files import ROOT, finite, read_json, write_atomic, write_json
from .results import NAME as RESULT
from .results import RunResult

RESULTS = ROOT / "results"
REQUEUE = 75  # exit status (EX_TEMPFAIL) of a run that a signal stopped, that saved a checkpoint and that can be resumed
FAILURES = (OSError, FloatingPointError)  # errors that may end a training after a good start: of the disk or of the numbers


@contextlib.contextmanager
def clean_errors(prog: str, kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Generator[None]:
    """Turn exceptions of these kinds into one line on stderr and exit status 2."""
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split())
        print(f"{prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment(device: Any = "cpu", world_size: int = 1) -> dict[str, Any]:
    """The environment that produces a result: versions, commit, device, processes, threads and date."""
    import numpy as np
    import torch

    name = (
        torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{torch.device(device).type} ({name})",
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Run:
    """The directory of one run. The constructor only checks it; :meth:`begin` creates and locks it and writes to it.

    config:      resolved configuration without seed, device, workers and paths. The hash of its identity identifies the run.
    kind:        the class of the configuration. It gives the values that runs had before its fields existed.
    inputs:      digests of the files that the run reads. Paths are not part of the configuration, but files with other
                 contents make another run.
    resume:      whether the directory may hold an unfinished run of this configuration, which then resumes. A run that
                 stopped at another ``max_steps`` counts as this run, too, because the steps already made are the same.
    row:         name of the table row that the run is for.
    row_config:  hash of that row's configuration. If flags change the configuration, the hashes differ and the result
                 belongs to no row (``row`` is null). So a smoke test never counts as a row's result.
    main:        whether this process writes. The other processes of a distributed run pass False.

    Raises ValueError if the directory holds a run of another configuration, or an unfinished run while ``resume`` is false.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        seed: int,
        *,
        kind: type[Config] = Config,
        inputs: Mapping[str, str] | None = None,
        resume: bool = False,
        row: str | None = None,
        row_config: str | None = None,
        main: bool = True,
    ) -> None:
        self.path, self.config, self.seed, self.resume, self.main = path, dict(config), seed, resume, main
        self.kind, self.inputs = kind, dict(inputs or {})
        self.hash = config_hash(identity(kind, self.config))
        self.row = (
            row if row_config in (None, self.hash, config_hash(self.config)) else None
        )  # the last is the hash of format 1
        self.finished = False
        self._lock: IO[str] | None = None
        self._last_beat = 0.0
        self._progress: dict[str, Any] = {}
        if main:
            self._check()

    def _check(self) -> None:
        config_path, result_path = self.path / "config.json", self.path / RESULT
        if not config_path.exists():
            foreign = [name for name in ("result.json", "metrics.jsonl", "checkpoint.pt") if (self.path / name).exists()]
            if foreign:
                raise ValueError(f"{self.path} holds {foreign[0]} but no config.json: choose another --save-dir")
            return
        held = read_json(config_path)
        if not isinstance(held, dict):
            raise ValueError(f"{config_path} is not a run's configuration: choose another --save-dir")
        differing = self.differing_values(held, self._record())
        if differing and not (self.resume and list(differing) == ["max_steps"]):
            changes = ", ".join(differing.values())
            raise ValueError(f"{self.path} holds a run of another configuration ({changes}): choose another --save-dir")
        try:
            result = read_json(result_path) if result_path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{error}: remove the file, and the run resumes from its checkpoint") from error
        if not isinstance(result, dict) or not isinstance(result.get("config", {}), dict):
            raise ValueError(f"{result_path} is damaged: remove the file, and the run resumes from its checkpoint")
        if result.get("status") == "finished" and result.get("seed") == self.seed:
            self.finished = identity(self.kind, result.get("config", {})) == identity(self.kind, self.config)
        if self.finished:
            return
        if not self.resume:
            raise ValueError(f"{self.path} holds an unfinished run of this configuration: give --resume auto to resume it")

    def differing_values(self, held: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
        """The fields in which two stored configurations differ, each with a phrase that states both values.

        A field that one of them lacks has the value from before the field existed.
        """
        return differing_values(completed(self.kind, held), completed(self.kind, ours))

    def _record(self) -> dict[str, Any]:
        return {**self.config, "seed": self.seed, "inputs": self.inputs}

    def begin(self) -> None:
        """Create and lock the directory, and record the configuration.

        Raises ValueError if another process has locked the directory or has finished the run since this object was made, or as
        the constructor does.
        """
        if not self.main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is in use by another process") from error
        self._check()
        if self.finished:
            self._lock.close()
            raise ValueError(f"{self.path}: another process has just finished this run")
        for left in self.path.glob(".*.tmp"):  # left by a process that was killed while it wrote
            left.unlink()
        write_json(self.path / "config.json", self._record())
        held: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # there is no status.json yet, or it is damaged
            held = read_json(self.path / "status.json")
        self.heartbeat({key: held[key] for key in ("step", "steps", "saved_step") if key in held}, force=True)

    def say_finished(self) -> None:
        """Print the path of the finished run's result on stdout, and say on stderr that there is nothing to do."""
        print(f"{self.path} holds a finished run of this configuration and seed: nothing to do", file=sys.stderr)
        print(self.path / RESULT)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.main:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # the next checkpoint assumes that this line exists

    def truncate_log(self, epoch: int) -> None:
        """Drop the lines of epochs after ``epoch``, which were written after the checkpoint of that epoch."""
        path = self.path / "metrics.jsonl"
        if not self.main:
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a line that was half written when the process died
                if json.loads(line)["epoch"] <= epoch:
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def heartbeat(self, progress: Mapping[str, Any], *, status: str = "running", force: bool = False) -> None:
        """Record in status.json that the run is alive, at most every 20 seconds unless ``force`` is true.

        The entries of ``progress`` join those of earlier calls.
        """
        now = time.monotonic()
        self._progress |= progress
        if self.main and (force or now - self._last_beat > 20):
            self._last_beat = now
            record = {"status": status, "time": time.time(), "row": self.row, "seed": self.seed, **self._progress}
            write_json(self.path / "status.json", record)

    @contextlib.contextmanager
    def recorded(self) -> Generator[None]:
        """Record in status.json an exception that ends the run. Always unlock the directory at the end."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == REQUEUE)
            cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error
            message = f"{type(cause).__name__}: {cause}".splitlines()[0]
            with contextlib.suppress(OSError):  # a full disk may be the reason that the run ends
                self.heartbeat({"error": message}, status="stopped" if interrupted else "failed", force=True)
            raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def finish(self, **fields: Any) -> Path:
        """Write result.json with the run's identity and the given fields of :class:`RunResult`. Returns its path."""
        path = self.path / RESULT
        if self.main:
            RunResult(
                row=self.row,
                script=self.kind.script,
                config=self.config,
                config_hash=self.hash,
                seed=self.seed,
                inputs=self.inputs,
                **fields,
            ).save(path)
            self.heartbeat({}, status="finished", force=True)
        return path


def run_of(config: Any, *, main: bool = True) -> Run:
    """The run that a program's configuration describes, checked but not begun. Raises ValueError as :class:`Run` does."""
    return Run(
        directory_of(config),
        config.record(),
        config.seed,
        kind=type(config),
        inputs=config.inputs(),
        resume=config.resume is not None,
        row=config.row,
        row_config=config.row_config,
        main=main,
    )


def directory_of(config: Any) -> Path:
    """Directory of a run: --save-dir or, by default, results/<program>/<row or run_name()>/<hash>/seed<seed>."""
    parent = RESULTS / config.program / (config.row or config.run_name())
    return config.save_dir or run_directory(parent, type(config), config.record(), config.seed)


def run_directory(parent: Path, kind: type[Config], config: Mapping[str, Any], seed: int) -> Path:
    """The directory below ``parent`` that already holds this run, or else a new one whose name is the hash of its identity.

    An existing directory may have another name if an earlier version began the run.
    """
    wanted, found = identity(kind, config), []
    for path in sorted(parent.glob(f"*/seed{seed}/config.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # files of other programs, or damaged ones
            held = {key: value for key, value in read_json(path).items() if key not in ("seed", "inputs")}
            if identity(kind, held) == wanted:
                found.append(path.parent)
    finished = [path for path in found if (path / RESULT).exists()]
    return next(iter(finished or found), parent / config_hash(wanted) / f"seed{seed}")
