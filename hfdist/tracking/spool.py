"""Events for a tracking server, on disk first: nothing is lost while the server is away.

RUN_DIR/spool/events.jsonl holds one event a line, in order, each with its own time; `delivered.json` says
how far the server has them. The file only grows, so that it also tells which steps were told before a crash.
A step whose numbers then change is told `again`: what the file said of it, and of later steps, before that
event is void.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hfdist.errors import StorageError, UserError

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class BusyError(UserError):
    """A spool that another process has open."""


class Spool:
    """Events of a run, from its first attempt on. Safe to use from several threads.

    Args:
        folder: RUN_DIR/spool; made if there is none.
        wait: Seconds to wait for another process that has it open.
        take_over: Go on after them nevertheless.

    Raises:
        StorageError: The folder cannot be written.
        BusyError: Another process has it open.
    """

    def __init__(self, folder: Path, *, wait: float = 0.0, take_over: bool = False) -> None:
        self.folder = folder
        self._path = folder / "events.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: io.FileIO = open(self._path, "ab", buffering=0)  # noqa: SIM115 (see close)
            self._lock_file = open(folder / "lock", "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {error.strerror}") from error
        if not _acquire(self._lock_file.fileno(), wait):
            if not take_over:
                self.close()
                raise BusyError(f"{folder.parent} is in use: its own process delivers its record")
            logger.warning("%s is in use by another process: taking over", folder.parent)
        self._facts: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self.is_new = True
        """Whether no earlier attempt recorded anything."""
        self.last_step = -1
        """Greatest step whose metrics are in the spool."""
        self.total = 0
        """Number of events."""
        self.status: str | None = None
        """The last status that was recorded."""
        self.last_time = 0
        """Milliseconds of the last event."""
        self._end = 0  # bytes
        self._voids: list[tuple[int, int]] = []  # (place of an event `again`, its step)
        self._scan()
        delivered = self.recall("delivered")
        self._start = min(int(delivered.get("offset", 0)), self._end)
        self.num_delivered = min(int(delivered.get("count", 0)), self.total)
        """Events that the server has."""

    # -- writing ---------------------------------------------------------------------------------

    def append(self, kind: str, *, at: int | None = None, **values: Any) -> None:
        """Add an event, stamped with `at` or the present time, in milliseconds.

        Raises:
            StorageError: The disk is full.
        """
        event = {"kind": kind, "time": int(time.time() * 1000) if at is None else at, **values}
        # One write: a process that is killed leaves a torn last line at most.
        line = json.dumps(event, separators=(",", ":"), default=str).encode() + b"\n"
        with self._changed:
            try:
                written = self._file.write(line)
                if written != len(line):
                    os.ftruncate(self._file.fileno(), self._end)
                    raise OSError(28, "No space left on device")
            except OSError as error:
                raise StorageError(f"cannot write {self._path}: {error.strerror}") from error
            self._count(event, len(line))
            self._changed.notify_all()

    def secure(self) -> None:
        """Have the disk hold what was appended, so that a power cut takes nothing that was delivered."""
        os.fsync(self._file.fileno())

    # -- delivery --------------------------------------------------------------------------------

    def pending(self, most: int) -> list[tuple[Event, int]]:
        """The oldest undelivered events, each with the offset after it, which `acknowledge` takes."""
        with self._changed:
            start, end = self._start, self._end
        found: list[tuple[Event, int]] = []
        with self._path.open("rb") as file:
            file.seek(start)
            while start < end and len(found) < most:
                line = file.readline()
                start += len(line)
                event = _parse(line, self._path) or {"kind": "damaged", "time": 0}
                if self._is_void(event, start):
                    event = {"kind": "void", "time": event["time"]}
                found.append((event, start))
        return found

    def steps_told(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Every step that was told with its numbers, in order, as far as they still count."""
        place = 0
        with self._path.open("rb") as file:
            for line in file:
                place += len(line)
                event = _parse(line, self._path)
                if event and event["kind"] == "metrics" and not self._is_void(event, place):
                    yield event["step"], event["values"]

    def _is_void(self, event: Event, place: int) -> bool:
        return event["kind"] == "metrics" and any(
            place < end and event["step"] >= first for end, first in self._voids
        )

    def acknowledge(self, offset: int, count: int) -> None:
        """The server has everything up to this offset: `count` more events."""
        with self._changed:
            self._start = offset
            self.num_delivered += count
            self.remember("delivered", {"offset": offset, "count": self.num_delivered})
            self._changed.notify_all()

    def rewind(self) -> None:
        """Deliver everything again, to a server that has nothing of it."""
        self.acknowledge(0, -self.num_delivered)

    @property
    def aside(self) -> list[Event]:
        """Files whose delivery failed while everything else went on."""
        return list(self.recall("aside").get("events", []))

    def set_aside(self, event: Event) -> None:
        """Let others go first."""
        with self._changed:
            self.remember("aside", {"events": [*self.aside, event]})

    def take_back(self, event: Event) -> None:
        """An event that was set aside is delivered."""
        with self._changed:
            self.remember("aside", {"events": [e for e in self.aside if e != event]})
            self._changed.notify_all()

    @property
    def num_pending(self) -> int:
        """Events that the server has not got."""
        return self.total - self.num_delivered + len(self.aside)

    @property
    def is_delivered(self) -> bool:
        """Whether the server has everything."""
        return self._start >= self._end and not self.aside

    def wait(self, timeout: float) -> None:
        """Until something is appended or delivered, or somebody calls `wake`; at most so many seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def wait_pending(self, timeout: float) -> None:
        """Like `wait`, but not at all if something is pending."""
        with self._changed:
            if self._start >= self._end:
                self._changed.wait(timeout)

    def wake(self) -> None:
        """End the waits."""
        with self._changed:
            self._changed.notify_all()

    # -- facts -----------------------------------------------------------------------------------

    def remember(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a small fact beside the events."""
        self._facts[name] = dict(values)
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(dict(values)))
        temporary.replace(self.folder / f"{name}.json")

    def recall(self, name: str) -> dict[str, Any]:
        """A fact that was remembered; empty if there is none."""
        if name not in self._facts:
            try:
                self._facts[name] = json.loads((self.folder / f"{name}.json").read_text())
            except (FileNotFoundError, ValueError):
                return {}
        return dict(self._facts[name])

    def close(self) -> None:
        """No more events from here; others may write and deliver."""
        self._file.close()
        self._lock_file.close()

    # -- inside ----------------------------------------------------------------------------------

    def _scan(self) -> None:
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file.fileno(), self._end)  # torn by a kill
                    break
                self._count(_parse(line, self._path) or {"kind": "damaged", "time": 0}, len(line))
        self.is_new = self.total == 0

    def _count(self, event: Event, size: int) -> None:
        self.total += 1
        self._end += size
        self.last_time = max(self.last_time, event["time"])
        if event["kind"] == "metrics":
            self.last_step = max(self.last_step, event["step"])
        elif event["kind"] == "again":
            self.last_step = min(self.last_step, event["step"] - 1)
            self._voids.append((self._end, event["step"]))
        elif event["kind"] == "status":
            self.status = event["status"]


def _acquire(lock: int, wait: float) -> bool:
    """Lock a file until this process ends or closes it; whether that succeeded."""
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return True


def _parse(line: bytes, path: Path) -> Event | None:
    try:
        return json.loads(line)
    except ValueError:
        logger.warning("a line of %s is damaged and left out", path)
        return None
