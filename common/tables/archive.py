"""Runs in one archive, with which another machine can resume them."""

from __future__ import annotations

import fcntl
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..experiments import runs
from ..experiments.files import read_json

NAME = "runs.tar"
_LEFT_OUT = ("checkpoint-previous.pt", ".lock")


def pack(directories: Iterable[Path], path: Path) -> int:
    """Write those directories of runs that exist to an archive, and return their number.

    File names are relative to the results folder. The archive is written atomically. Previous checkpoints are omitted.
    Raises ValueError if a run is not below the results folder.
    """
    found = sorted({directory for directory in directories if (directory / "config.json").exists()})
    for directory in found:
        if not directory.is_relative_to(runs.RESULTS):
            raise ValueError(f"{directory} is not below {runs.RESULTS}: only runs below that folder can be archived")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(temporary, "w") as archive:
            for directory in found:
                for file in sorted(directory.rglob("*")):
                    if file.is_file() and file.name not in _LEFT_OUT and not file.name.endswith(".tmp"):
                        archive.add(file, str(file.relative_to(runs.RESULTS)), recursive=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(found)


def unpack(path: Path) -> int:
    """Move the runs of an archive to their places below the results folder, and return their number.

    If a run exists in both, the more advanced one is kept. Raises ValueError, without changing anything, if the archive is
    missing or damaged, or if a member would be written elsewhere.
    """
    runs.RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=runs.RESULTS) as folder:
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        except FileNotFoundError as error:
            raise ValueError(f"--from {path} does not exist: common.tables run --out DIR writes DIR/{NAME}") from error
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"--from {path} is not an archive of runs, or is damaged: {error}") from error
        found = sorted(config.parent for config in Path(folder).rglob("config.json"))
        for directory in found:
            place = runs.RESULTS / directory.relative_to(folder)
            if place.exists() and _progress(place) >= _progress(directory):
                print(f"kept {place}: the run in {path} is not ahead of it", file=sys.stderr)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                place.rename(directory.with_name(f"{directory.name}-behind"))
            directory.rename(place)
        return len(found)


def _progress(directory: Path) -> tuple[bool, int]:
    """Whether a run has finished, and the step of its last checkpoint. A run that another process works on compares highest.

    Where the step of the checkpoint is not recorded, as in translation, the last step counts.
    """
    if (directory / ".lock").exists():
        with open(directory / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, sys.maxsize
    status = read_json(directory / "status.json") if (directory / "status.json").exists() else {}
    return (directory / runs.RESULT).exists(), status.get("saved_step", status.get("step", 0))
