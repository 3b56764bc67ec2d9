"""A message from a process that is killed in the middle of a call, by others or by native code."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# Waits for a line; when the pipe is closed without one, it prints the message.
_GUARD = 'read -r word || printf "%s\\n" "$0" >&2'


@contextmanager
def last_words(message: str) -> Iterator[None]:
    """Have `message` printed to stderr if this process ends inside the block without leaving it.

    A shell of a few hundred kilobytes does it. Without a shell nothing is printed.
    """
    try:
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, message],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=os.sep,
            start_new_session=True,  # Ctrl-C is for the run
        )
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody has ended the guard
            guard.communicate(b"word\n")
