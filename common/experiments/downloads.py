"""Downloads that fail clearly."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
from collections.abc import Generator

IMAGES = "or train on embedded data with --data digits, or on a folder of images with --data imagefolder --data-dir PATH"


@contextlib.contextmanager
def downloading(name: str, by_hand: str, instead: str = IMAGES) -> Generator[None]:
    """Run a download with a time-out and its messages on stderr; a failure says how to get the data, or other data."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError, EOFError, shutil.ReadError) as error:
        raise OSError(
            f"{name} is not here and could not be downloaded ({error}). On a machine with a network, {by_hand}; {instead}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
