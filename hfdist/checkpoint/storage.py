"""Where checkpoints lie: the few file operations they need, and how a checkpoint becomes visible.

A checkpoint is written in a place of its own that no reader looks at, and committed at once.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from hfdist.errors import StorageError

MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{6,})-step-(\d{8,})")


def checkpoint_name(number: int, step: int) -> str:
    """`number` orders a store's checkpoints by their writing: a step may be written again."""
    return f"{number:06d}-step-{step:08d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """(number, step) of a checkpoint's name; None for anything else."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


class Storage(Protocol):
    """A place for checkpoints. Errors are OSError; `explain` turns them into the user's words.

    `place` is what `begin` returned, or the name of a committed checkpoint.
    """

    def list(self) -> list[str]:
        """Names of the committed checkpoints, the oldest first."""
        ...

    def begin(self, step: int) -> str:
        """A fresh place to write a checkpoint into. The lead alone calls it."""
        ...

    def visible(self, place: str) -> bool:
        """Whether this rank sees a place that another rank began."""
        ...

    def free_bytes(self) -> int | None:
        """Free space, if the storage has a bound."""
        ...

    def scratch(self, place: str, file: str) -> Path:
        """A local path to write a file's content to, before `put`."""
        ...

    def put(self, place: str, file: str) -> None:
        """Make the content of `scratch(place, file)` durable under `place`, all of it or nothing."""
        ...

    def read(self, place: str, file: str) -> bytes:
        """Content of a small file."""
        ...

    def size(self, place: str, file: str) -> int:
        """Bytes of a file, as stored."""
        ...

    def local(self, place: str, file: str) -> contextlib_path:
        """Context manager: a local path that holds the file's content."""
        ...

    def remove(self, place: str, file: str) -> None:
        """Remove one file."""
        ...

    def commit(self, place: str, step: int) -> str:
        """Make a place whose manifest has been put visible to readers; returns its name."""
        ...

    def discard(self, place: str) -> None:
        """Remove a place or a checkpoint; a reader never sees a part of it."""
        ...

    def leftovers(self) -> list[str]:
        """Places that were begun and neither committed nor discarded."""
        ...
