"""Runs in one archive: what an allocation of a machine leaves, and the next one, elsewhere and later, takes up."""

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
    """Write the directories of runs, as far as they exist, to an archive; returns how many there are.

    Files have names relative to the results folder. The archive appears whole or not at all. Previous checkpoints are left
    out. Raises ValueError for a run elsewhere.
    """
    found = sorted({directory for directory in directories if (directory / "config.json").exists()})
    for directory in found:
        if not directory.is_relative_to(runs.RESULTS):
            raise ValueError(f"{directory} is not below {runs.RESULTS}: runs of an archive are there")
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
    """Put the runs of an archive in their places below the results folder; returns how many there are.

    Of a run that is there already, the further one stays. Raises ValueError, with nothing changed, where the archive is missing
    or damaged, or a member would be written elsewhere.
    """
    runs.RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=runs.RESULTS) as folder:
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        except FileNotFoundError as error:
            raise ValueError(f"--from {path} does not exist: run with --out DIR writes DIR/{NAME}") from error
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"--from {path} is no archive of runs, or a damaged one: {error}") from error
        found = sorted(config.parent for config in Path(folder).rglob("config.json"))
        for directory in found:
            place = runs.RESULTS / directory.relative_to(folder)
            if place.exists() and _progress(place) >= _progress(directory):
                print(f"as far here as in {path}, and left as it is: {place}", file=sys.stderr)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                place.rename(directory.with_name(f"{directory.name}-behind"))
            directory.rename(place)
        return len(found)


def _progress(directory: Path) -> tuple[bool, int]:
    """Whether a run has finished, and its steps when it last said so. A run that another process makes is ahead of all."""
    if (directory / ".lock").exists():
        with open(directory / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, sys.maxsize
    status = read_json(directory / "status.json") if (directory / "status.json").exists() else {}
    return (directory / runs.RESULT).exists(), status.get("step", 0)
