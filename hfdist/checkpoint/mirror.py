"""The files of a run whose `output` is an address: worked on in a scratch folder, kept at the address.

Checkpoints are written there directly. The record goes there before each of them, so that a run which goes
on from a checkpoint, on whatever machine, finds the record of all steps before it.
"""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Iterable
from pathlib import Path

from hfdist.checkpoint.storage import Storage, open_storage
from hfdist.errors import ConfigError, StorageError
from hfdist.rundir import files
from hfdist.rundir.files import write_atomically
from hfdist.rundir.locations import is_address

JOB, RECORD, RESULTS = (files.JOB,), (files.METRICS,), (files.RESULT, f"{files.PLOTS}/*")
"""Files of a run, by when they are written."""
LOGS = (f"{files.LOGS}/*",)
"""On a cluster each rank's own is the one that counts: a node may have older ones of others."""
_TOLD = (files.SPOOL, files.MODEL, files.PLOTS, files.RESULT, *JOB, *RECORD)
"""What a tracking server is to get: its events, and the files that they name."""


def push(output: str, run_dir: Path, patterns: Iterable[str]) -> None:
    """Copy files of the run's folder to its address; nothing to do where `output` is a folder.

    Raises:
        StorageError: The address does not take them.
    """
    if not is_address(output):
        return
    storage = open_storage(output)
    for path in sorted(path for pattern in patterns for path in run_dir.glob(pattern)):
        folder = (Path(run_dir.name) / path.relative_to(run_dir)).parent
        try:
            storage.write(folder.as_posix(), path.name, path.read_bytes())
        except OSError as error:
            raise _failed(output, "written", error) from error


def pull(output: str, run_dir: Path, also: Iterable[str] = ()) -> None:
    """Fetch job, code and record of a run into its scratch folder.

    Args:
        output: The address.
        run_dir: The scratch folder.
        also: More of the run's files.

    Raises:
        StorageError: The address cannot be read.
        ConfigError: There is no such run.
    """
    storage = open_storage(output)
    for name in (*JOB, *RECORD):
        content = _read(storage, output, run_dir.name, name)
        if content is None and name in JOB:
            raise ConfigError(f"{output}/{run_dir.name} is no run: it has no {name}")
        path = run_dir / name
        # The run may be going on here: its own record is then ahead of what it has pushed.
        is_ahead = name in RECORD and path.exists() and path.read_bytes().startswith(content or b"")
        if content is not None and not is_ahead:
            write_atomically(path, content.decode())
    for name in also:
        path = run_dir / name
        folder = (Path(run_dir.name) / name).parent.as_posix()
        content = _read(storage, output, folder, path.name)
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    code = _read(storage, output, run_dir.name, files.CODE_ARCHIVE)
    if code is not None and not (run_dir / files.CODE).is_dir():
        with tarfile.open(fileobj=io.BytesIO(code)) as archive:
            archive.extractall(run_dir / files.CODE, filter="data")


def push_undelivered(output: str, run_dir: Path) -> None:
    """Keep what a tracking server has not received at the address: this machine may be gone tomorrow.

    Raises:
        StorageError: The address does not take it.
    """
    if not is_address(output):
        return
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in _TOLD:
            if (run_dir / name).exists():
                archive.add(run_dir / name, name)
    try:
        open_storage(output).write(run_dir.name, files.UNDELIVERED, packed.getvalue())
    except OSError as error:
        raise _failed(output, "written", error) from error


def pull_undelivered(output: str, run_dir: Path) -> None:
    """Fetch what `push_undelivered` left, unless this machine has a spool of the run.

    Raises:
        StorageError: The address cannot be read.
    """
    if not is_address(output) or (run_dir / files.SPOOL).is_dir():
        return
    packed = _read(open_storage(output), output, run_dir.name, files.UNDELIVERED)
    if packed is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            absent = [m for m in archive.getmembers() if not (run_dir / m.name).exists()]
            archive.extractall(run_dir, absent, filter="data")


def forget_undelivered(output: str, run_dir: Path) -> None:
    """Remove what `push_undelivered` left: it is delivered, or a new attempt of the run sends it.

    Raises:
        StorageError: It cannot be removed.
    """
    if not is_address(output):
        return
    try:
        open_storage(output).remove_file(run_dir.name, files.UNDELIVERED)
    except OSError as error:
        raise _failed(output, "written", error) from error


def check_writable(output: str) -> None:
    """Find out, before a run starts, whether its files can be written there.

    Raises:
        StorageError: They cannot.
    """
    if not is_address(output):
        return
    storage, folder = open_storage(output), f".probe-{secrets.token_hex(4)}"
    try:
        storage.write(folder, "probe", b"")
        storage.remove_folder(folder)  # checkpoints come and go
    except OSError as error:
        raise _failed(output, "written", error) from error


def exists(output: str, run_dir: Path) -> bool:
    """Whether a run of this name is there.

    Raises:
        StorageError: The address cannot be read.
    """
    if not is_address(output):
        return (run_dir / files.JOB).exists()
    return _read(open_storage(output), output, run_dir.name, files.JOB) is not None


def forget(output: str, run_dir: Path) -> None:
    """Remove what `push` wrote."""
    if is_address(output):
        open_storage(output).remove_folder(run_dir.name)


def _read(storage: Storage, output: str, folder: str, name: str) -> bytes | None:
    try:
        return storage.read(folder, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(output, "read", error) from error


def _failed(output: str, done: str, error: OSError) -> StorageError:
    return StorageError(
        f"output {output} cannot be {done} ({error}): check the address, and the credentials in the "
        "environment"
    )
