"""Downloads whose failures tell the user what to do."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
from collections.abc import Generator

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
