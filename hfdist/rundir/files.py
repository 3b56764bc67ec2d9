"""The files of a run's folder: their names, and the plain record, a line a step."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfdist.errors import StorageError

JOB = "config.yaml"
"""The resolved job."""
METRICS = "metrics.jsonl"
"""A line a step. A run has begun once it is there."""
RESULT = "result.json"
"""How the run ended."""
CHECKPOINTS, PLOTS, LOGS, MODEL = "checkpoints", "plots", "logs", "model"
"""Folders of the run's results."""
SPOOL = "spool"
"""Folder of what the tracking server has and has not received."""
LEASE = "lease"
"""Names the group of workers that may write."""
STOP_FILE = "stop-requested"
"""Asks for a stop where no signal reaches the workers (other machines)."""
CODE, CODE_ARCHIVE = "code", "code.tar.gz"
"""What a submitted job brought along: its folder, and the same in one file at an address."""
UNDELIVERED = "undelivered.tar"
"""At an address: what a tracking server has not received of a run that is over."""


class StepLog:
    """RUN_DIR/metrics.jsonl: append-only, one JSON object a step, readable while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a half-written last line (after a kill) is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break  # not a line that was written here
            records.append(record)
        return records

    def start(self, first_step: int) -> list[dict[str, Any]]:
        """Drop what lies at or after `first_step` (steps that will be repeated); return the rest."""
        kept = [record for record in self.read() if record["step"] < first_step]
        write_atomically(self.path, "".join(_line(record) for record in kept))
        return kept

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a step."""
        try:
            with self.path.open("a") as file:
                file.write(_line(record))
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part.

    Raises:
        StorageError: The folder cannot be written, or the disk is full.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}. Free some space, or choose another `output`"
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Make a file durable, all of it or nothing; its folder is made.

    Raises:
        OSError: It cannot be written; what was there before is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make a rename in a folder survive a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some shared file systems do not know how
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
