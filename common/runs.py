"""What every program shares about a run: its flags, identity, directory, records and clean failure.

A run is one configuration and one seed. Its directory holds ``config.json``, ``metrics.jsonl`` (one line an epoch),
``status.json`` (a heartbeat), checkpoints and, once it has finished, ``result.json``. This module loads without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
REQUEUE = 75  # exit status (EX_TEMPFAIL) of a run that was told to stop, saved a checkpoint and can go on


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """argparse whose flags take both ``-`` and ``_``, take no abbreviation, and fail in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
        def canonical(word: str) -> str:
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and value == "--":  # which argparse drops, and gives an empty list in its place
                self.error(f"argument {flag}: expected a value, got '--'")
            dashed = flag.replace("_", "-")
            known = flag.startswith("--") and flag not in self._option_string_actions and dashed in self._option_string_actions
            return dashed + equals + value if known else word

        return super().parse_known_args(
            [canonical(word) for word in (sys.argv[1:] if args is None else args)], namespace, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


def positive_int(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least 1 and below 2^31, got {text}")
    return value


def non_negative(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must not be negative and below 2^63, got {text}")
    return value


FAILURES = (OSError, FloatingPointError)  # what may end a training that began well: the disk, or the numbers


@contextlib.contextmanager
def clean_errors(prog: str, kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Generator[None]:
    """Turn exceptions of these kinds into one line on stderr and exit status 2."""
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split())
        print(f"{prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def config_hash(config: Mapping[str, Any]) -> str:
    """Identity of a configuration: 12 hexadecimal digits of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def differences(held: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """The keys at which two records differ, each with both values in words."""
    keys = sorted(key for key in held.keys() | ours.keys() if held.get(key) != ours.get(key))
    return {key: f"{key} {held.get(key)!r} there, {ours.get(key)!r} here" for key in keys}


def write_atomic(path: Path, content: str | bytes, *, keep: Path | None = None) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new and nothing between.

    The old file moves to ``keep``, if given: a crash then leaves it there or here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with null, which is JSON, for numbers that are not finite, which are not."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Content of a JSON file; raises ValueError naming the file where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def digest(path: Path) -> str:
    """12 hexadecimal digits that tell a file's content or, of a folder, the names and sizes of its files, from others."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    # rglob does not look into folders that are links, which data sets may have for classes.
    found = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
    files = sorted((str(file.relative_to(path)), file.stat().st_size) for file in found if file.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment(device: Any = "cpu", world_size: int = 1) -> dict[str, Any]:
    """What a result was made with: versions, commit, device, processes, threads, date."""
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
    """The directory of one run. Making the object only checks; :meth:`begin` creates, locks and writes.

    config:    resolved configuration without seed, device, workers and paths; its hash is the run's identity.
    inputs:    digests of the files the run reads (see :func:`digest`): other content is another run, though its paths are
               no part of the configuration.
    resume:    whether the directory may hold an unfinished run of this configuration, to be gone on with. One that
               stopped at another ``max_steps`` counts as this run too: the steps already made are the same.
    row:       name of the table row the run is for, and ``row_config`` the hash that row must have; flags that change the
               configuration make the result nobody's (``row`` null), so that a smoke run never stands in for a row.
    main:      whether this process writes; the other processes of a distributed run pass False.

    Raises ValueError where the directory holds another configuration, or an unfinished run and ``resume`` is false.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        seed: int,
        *,
        inputs: Mapping[str, str] | None = None,
        resume: bool = False,
        row: str | None = None,
        row_config: str | None = None,
        main: bool = True,
    ) -> None:
        self.path, self.config, self.seed, self.resume, self.main = path, dict(config), seed, resume, main
        self.hash, self.inputs = config_hash(self.config), dict(inputs or {})
        self.row = row if row_config in (None, self.hash) else None
        self.finished = False
        self._lock: IO[str] | None = None
        self._last_beat = 0.0
        self._progress: dict[str, Any] = {}
        if main:
            self._check()

    def _check(self) -> None:
        config_path, result_path = self.path / "config.json", self.path / "result.json"
        if not config_path.exists():
            foreign = [name for name in ("result.json", "metrics.jsonl", "checkpoint.pt") if (self.path / name).exists()]
            if foreign:
                raise ValueError(f"{self.path} holds {foreign[0]} but no config.json: choose another --save-dir")
            return
        held = read_json(config_path)
        differing = differences(held, self._record())
        if differing and not (self.resume and list(differing) == ["max_steps"]):
            changes = ", ".join(differing.values())
            raise ValueError(f"{self.path} holds a run of another configuration ({changes}): choose another --save-dir")
        result = read_json(result_path) if result_path.exists() else {}
        if result.get("status") == "finished" and (result.get("config_hash"), result.get("seed")) == (self.hash, self.seed):
            self.finished = True
        elif not self.resume:
            raise ValueError(f"{self.path} holds an unfinished run of this configuration: --resume auto goes on with it")

    def _record(self) -> dict[str, Any]:
        return {**self.config, "seed": self.seed, "inputs": self.inputs}

    def begin(self) -> None:
        """Create and lock the directory and record the configuration; raises ValueError where another process holds it."""
        if not self.main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is in use by another process") from error
        self._check()
        for left in self.path.glob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        write_json(self.path / "config.json", self._record())
        self.heartbeat({}, force=True)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.main:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # the checkpoint that follows knows of this line

    def truncate_log(self, epoch: int) -> None:
        """Drop the lines of epochs after ``epoch``: those that a checkpoint of that epoch does not know of."""
        path = self.path / "metrics.jsonl"
        if not self.main:
            return
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a line half written when the process died
                if json.loads(line)["epoch"] <= epoch:
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def heartbeat(self, progress: Mapping[str, Any], *, status: str = "running", force: bool = False) -> None:
        """Say in status.json that the run is alive, at most every 20 seconds."""
        now = time.monotonic()
        self._progress |= progress
        if self.main and (force or now - self._last_beat > 20):
            self._last_beat = now
            record = {"status": status, "time": time.time(), "row": self.row, "seed": self.seed, **self._progress}
            write_json(self.path / "status.json", record)

    @contextlib.contextmanager
    def recorded(self) -> Generator[None]:
        """Record in status.json an exception that ends the run, and unlock the directory in the end."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == REQUEUE)
            cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error
            message = f"{type(cause).__name__}: {cause}".splitlines()[0]
            with contextlib.suppress(OSError):  # a disk that is full may be what ends the run
                self.heartbeat({"error": message}, status="stopped" if interrupted else "failed", force=True)
            raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def finish(self, **fields: Any) -> Path:
        """Write result.json with status "finished", the run's identity and the given fields; returns its path."""
        path = self.path / "result.json"
        if self.main:
            identity = {
                "row": self.row,
                "config": self.config,
                "config_hash": self.hash,
                "seed": self.seed,
                "inputs": self.inputs,
            }
            write_json(path, {"format": 1, "status": "finished", **identity, **fields})
            self.heartbeat({}, status="finished", force=True)
        return path
