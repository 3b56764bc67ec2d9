"""What is to be told to a tracking server, on disk first: nothing is lost while the server is away.

RUN_DIR/spool/events.jsonl holds one event a line, in order, with its own time; `delivered` holds how many
of them the server has. Only one process at a time writes and delivers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Spool:
    """Events of a run, from its first life on.

    Args:
        folder: RUN_DIR/spool; made if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._events = folder / "events.jsonl"
        self._delivered = folder / "delivered"
        self._lock = threading.Lock()
        self.arrived = threading.Condition(self._lock)
        self._cut_torn_line()
        self.last_step = -1
        """Greatest step whose metrics are in the spool."""
        self.total = 0
        """Number of events."""
        for event in self._read(0):
            self._count(event)
        self._file = self._events.open("a")

    @property
    def num_delivered(self) -> int:
        """Events that the server has."""
        try:
            return int(self._delivered.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def append(self, kind: str, **values: Any) -> None:
        """Add an event, stamped with the present time in milliseconds."""
        event = {"kind": kind, "time": int(time.time() * 1000), **values}
        with self.arrived:
            # One write: a killed process leaves a torn last line at most.
            self._file.write(json.dumps(event, separators=(",", ":")) + "\n")
            self._file.flush()
            self._count(event)
            self.arrived.notify_all()

    def pending(self) -> list[Event]:
        """Events that were not delivered, oldest first."""
        return list(self._read(self.num_delivered))

    def acknowledge(self, count: int) -> None:
        """The server has `count` more events."""
        temporary = self._delivered.with_suffix(".tmp")
        temporary.write_text(str(self.num_delivered + count))
        temporary.replace(self._delivered)
        with self.arrived:
            self.arrived.notify_all()

    def remember(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a small fact beside the events."""
        temporary = self.folder / f"{name}.tmp"
        temporary.write_text(json.dumps(dict(values)))
        temporary.replace(self.folder / f"{name}.json")

    def recall(self, name: str) -> dict[str, Any]:
        """A fact that was remembered; empty if there is none."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def close(self) -> None:
        """No more events."""
        self._file.close()

    def _count(self, event: Event) -> None:
        self.total += 1
        if event["kind"] == "metrics":
            self.last_step = max(self.last_step, event["step"])

    def _read(self, start: int) -> Iterator[Event]:
        if not self._events.exists():
            return
        with self._events.open() as file:
            for number, text in enumerate(file):
                if number >= start and text.endswith("\n"):
                    yield json.loads(text)

    def _cut_torn_line(self) -> None:
        if not self._events.exists():
            return
        data = self._events.read_bytes()
        if data and not data.endswith(b"\n"):
            with self._events.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
