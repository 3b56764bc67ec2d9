"""Sends a spool to its server in a background thread."""

from __future__ import annotations

import logging
import threading
import time

from hfdist.tracking.client import one_line
from hfdist.tracking.delivery import Delivery
from hfdist.tracking.spool import Spool

logger = logging.getLogger(__name__)

BATCH = 500
"""Events that are read at once."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
_RETRY = 30.0
"""Seconds between tries of files that were set aside."""
_GATHER = 0.05
"""Seconds in which events gather, so that what comes together is delivered together."""


class Sender:
    """Delivers a spool to its server, in order, until it is stopped.

    Args:
        spool: Knows its target.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self.problem = ""
        """What keeps it from delivering, if something does."""
        self._ending = threading.Event()
        self._hurry = threading.Event()
        self._progress = time.monotonic()
        self._asked = 0.0
        self._thread = threading.Thread(target=self._run, name="hfdist-tracking", daemon=True)
        self._thread.start()

    def flush(self, timeout: float) -> bool:
        """Wait until all is delivered, or until nothing was for so many seconds; whether all is.

        Flushes that follow one another without any delivery share the seconds.
        """
        if self._asked <= self._progress:
            self._asked = time.monotonic()
        self._hurry.set()
        self._spool.wake()
        while not self._spool.is_delivered and self._thread.is_alive():
            left = max(self._progress, self._asked) + timeout - time.monotonic()
            if left <= 0:
                return False
            self._spool.wait(min(left, 0.2))
        return self._spool.is_delivered

    def stop(self) -> None:
        """End; what is not delivered stays in the spool. A call that hangs is left behind."""
        self._ending.set()
        self._hurry.set()
        self._spool.wake()
        self._thread.join(0.5)

    def _run(self) -> None:
        delivery, pause, retry_at = Delivery(self._spool, self._moved), _FIRST_PAUSE, 0.0
        while not self._ending.is_set():
            self._spool.wait_pending(5.0)
            if not self._hurry.is_set():
                time.sleep(_GATHER)
            batch = self._spool.pending(BATCH)
            try:
                if batch:
                    self._spool.secure()
                    delivery.deliver(batch, self._ending.is_set)
                elif self._spool.aside and (self._hurry.is_set() or time.monotonic() > retry_at):
                    retry_at = time.monotonic() + _RETRY
                    delivery.retry()
                self.problem, pause = "", _FIRST_PAUSE
            except Exception as error:
                if self._ending.is_set():
                    return
                if not self.problem:
                    logger.warning(
                        "tracking: %s does not take the record (%s); the run goes on, and its record "
                        "is kept in %s until it does",
                        self._spool.recall("target")["uri"],
                        one_line(error),
                        self._spool.folder,
                    )
                self.problem = one_line(error)
                # A flush asks for a try at once; after that the pauses are short.
                self._hurry.wait(pause)
                if self._hurry.is_set():
                    self._ending.wait(_FIRST_PAUSE)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _moved(self) -> None:
        self._progress = time.monotonic()
        if self.problem:
            logger.info("tracking: %s answers again", self._spool.recall("target")["uri"])
            self.problem = ""
