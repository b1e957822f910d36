"""NVIDIA's multi-process service (MPS): with it several runs compute on one GPU at once, without it they take turns."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

CONTROL = "nvidia-cuda-mps-control"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_FOLDERS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")


@contextmanager
def shared_gpus() -> Generator[None]:
    """Within the block, processes that this one starts share its GPUs, if any, through the service.

    The service numbers GPUs anew, so CUDA_VISIBLE_DEVICES holds UUIDs within the block, if it was set before.

    A service that is already running is used and left running; one that is started here is stopped at the end. If the service
    is missing or does not start, one line on stderr says so, and runs take turns.
    """
    gpus, before = visible_gpus(), os.environ.get(_VISIBLE)
    if not gpus or any(name in os.environ for name in _FOLDERS):
        yield
        return
    if shutil.which(CONTROL) is None:
        print(f"runs take turns on the GPU: {CONTROL} is not on PATH, so they cannot share it", file=sys.stderr)
        yield
        return
    if _call("get_server_list\n").returncode == 0:  # it is already running for this user
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        os.environ |= dict.fromkeys(_FOLDERS, folder)
        if before is not None:
            os.environ[_VISIBLE] = ",".join(gpus)
        try:
            started = _call(None, "-d")
            if started.returncode:
                reason = " ".join((started.stderr or started.stdout).split()) or f"status {started.returncode}"
                print(f"runs take turns on the GPU: {CONTROL} did not start: {reason}", file=sys.stderr)
                _restore(before)
                yield
                return
            try:
                yield
            finally:
                _call("quit\n")
        finally:
            _restore(before)


def _restore(visible: str | None) -> None:
    for name in _FOLDERS:
        os.environ.pop(name, None)
    if visible is not None:
        os.environ[_VISIBLE] = visible


def _call(order: str | None, *words: str) -> subprocess.CompletedProcess[str]:
    """Call the service's control program. No answer within a minute counts as a failure."""
    command = [CONTROL, *words]
    try:
        return subprocess.run(command, input=order, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def visible_gpus() -> list[str]:
    """UUIDs of the NVIDIA GPUs that CUDA_VISIBLE_DEVICES lets processes see, in its order.

    Numbers in it count GPUs as nvidia-smi does. Asks the driver, because torch takes seconds to load.
    """
    chosen = os.environ.get(_VISIBLE)
    if chosen in ("", "-1") or shutil.which("nvidia-smi") is None:
        return []
    printed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    found = dict(re.findall(r"^GPU (\d+): .*\(UUID: (\S+)\)", printed, re.MULTILINE))
    if chosen is None or not found:
        return list(found.values())
    return [found.get(name.strip(), name.strip()) for name in chosen.split(",")]
