"""Where checkpoints are stored: a folder, or an address that fsspec knows (s3://, gs://). Six operations.

A file is written completely or not at all. A checkpoint exists as long as its manifest does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hfdist.errors import StorageError
from hfdist.rundir.files import replace_file


class Storage(Protocol):
    """Files named FOLDER/NAME under one address. Errors are OSError."""

    def folders(self) -> list[str]:
        """Names of the folders, sorted."""
        ...

    def files(self, folder: str) -> list[str]:
        """Names of a folder's files; empty if there is no such folder."""
        ...

    def write(self, folder: str, name: str, data: bytes) -> None:
        """Make a file durable, all of it or nothing."""
        ...

    def read(self, folder: str, name: str) -> bytes:
        """A file's content."""
        ...

    def remove_file(self, folder: str, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all in it."""
        ...


class LocalStorage:
    """A folder of this machine, or one that all machines mount."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folders(self) -> list[str]:
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if path.is_dir())

    def files(self, folder: str) -> list[str]:
        path = self._root / folder
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []

    def write(self, folder: str, name: str, data: bytes) -> None:
        replace_file(self._root / folder / name, data)

    def read(self, folder: str, name: str) -> bytes:
        return (self._root / folder / name).read_bytes()

    def remove_file(self, folder: str, name: str) -> None:
        (self._root / folder / name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(self._root / folder, ignore_errors=True)


class RemoteStorage:
    """An object store, through fsspec; a put of an object is atomic there."""

    def __init__(self, address: str) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"output {address} cannot be used: {error} (for s3:// pip install 'hfdist[s3]', for gs:// "
                "'hfdist[gs]')"
            ) from error

    def folders(self) -> list[str]:
        return sorted(
            entry["name"].rstrip("/").rpartition("/")[2]
            for entry in self._entries(self._root)
            if entry["type"] == "directory"
        )

    def files(self, folder: str) -> list[str]:
        return sorted(
            entry["name"].rpartition("/")[2]
            for entry in self._entries(f"{self._root}/{folder}")
            if entry["type"] == "file"
        )

    def _entries(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()  # other machines write, too
        try:
            with _as_os_error():
                return self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return []

    def write(self, folder: str, name: str, data: bytes) -> None:
        with _as_os_error():
            self._fs.pipe_file(f"{self._root}/{folder}/{name}", data)

    def read(self, folder: str, name: str) -> bytes:
        with _as_os_error():
            return self._fs.cat_file(f"{self._root}/{folder}/{name}")

    def remove_file(self, folder: str, name: str) -> None:
        path = f"{self._root}/{folder}/{name}"
        with _as_os_error():
            if self._fs.exists(path):
                self._fs.rm_file(path)

    def remove_folder(self, folder: str) -> None:
        path = f"{self._root}/{folder}"
        with _as_os_error():
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Clients of object stores have errors of their own for what is no file's fault (no credentials, no
    connection)."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def open_storage(address: Path | str) -> Storage:
    """Storage at a path or an address with a scheme."""
    if "://" in str(address):
        return RemoteStorage(str(address).rstrip("/"))
    return LocalStorage(Path(address))
