"""A request that a run stops, looked at when it is safe to stop: Ctrl-C, SIGTERM, or a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

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
    with signals_handled_by(request._handle):
        yield request


class SignalCount:
    """How often somebody asked a driver to stop: the first time it hands that on, then it ends."""

    number = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number += 1


@contextmanager
def signals_counted() -> Iterator[SignalCount]:
    """Count SIGINT and SIGTERM inside the block, in the main thread; elsewhere there are none."""
    count = SignalCount()
    with signals_handled_by(count._handle):
        yield count


@contextmanager
def signals_handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to `handler` inside the block; outside the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
