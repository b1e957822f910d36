"""Downloads whose failures tell the user what to do."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
import sys
from collections.abc import Generator
from pathlib import Path

IMAGES = "or train on embedded data with --data digits, or on a folder of images with --data imagefolder --data-dir PATH"


@contextlib.contextmanager
def downloading(name: str, by_hand: str, instead: str = IMAGES) -> Generator[None]:
    """Run the block, a download, with a time-out of 30 seconds per socket operation. Its messages go to stderr.

    name:     the data set, for the error message.
    by_hand:  how to get the data on a machine with a network.
    instead:  which other data to use.

    Raises OSError with ``by_hand`` and ``instead`` if the download fails.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError, EOFError, shutil.ReadError) as error:
        raise OSError(
            f"{name} is missing and could not be downloaded ({error}). On a machine with a network, {by_hand}; {instead}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def one_at_a_time(folder: Path, name: str) -> Generator[None]:
    """Let only one process at a time run the block, of all that use the same folder and name. Creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
