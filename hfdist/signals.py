"""A request that a run stops, looked at when it is safe to stop: Ctrl-C, SIGTERM, or a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "stop-requested"
"""In the run's folder: asks for a stop where no signal reaches the workers (other machines)."""

_LOOK_EVERY = 0.5  # seconds between looks at the file: a shared folder may be slow


class StopRequest:
    """Whether somebody asked the run to stop.

    Args:
        file: Its existence is a request, too.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._looked = 0.0
        self._requested = False

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for; once True, always True."""
        if not self._requested and self._file is not None:
            now = time.monotonic()
            if now - self._looked >= _LOOK_EVERY:
                self._looked = now
                self._requested = self._file.exists()
        return self._requested

    def request(self) -> None:
        """Ask for a stop."""
        self._requested = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._requested = True


@contextmanager
def stop_on_signals(file: Path | None = None) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` inside the block; a second SIGINT interrupts.

    Outside the main thread, where handlers cannot be set, only the file is looked at.
    """
    request = StopRequest(file)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, request._handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
