"""A run's folder: made before its workers start."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hfdist.checkpoint import mirror
from hfdist.errors import StorageError, UserError
from hfdist.rundir import files

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig


@contextmanager
def run_folder(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Make the run's folder and save the job in it (and at its address, where `output` is one); take it
    away again if bad input leaves nothing worth keeping there. In the end, results are at the address."""
    is_new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / files.JOB).exists():
            config.save(run_dir / files.JOB)
    except OSError as error:
        raise StorageError(
            f"cannot write {run_dir}: {error.strerror}. Choose another `output`"
        ) from error
    try:
        mirror.push(config.output, run_dir, mirror.JOB)
        yield
    except UserError as error:
        # Training begins with the record: before it, a mistake of the user's leaves no run behind.
        if is_new and error.exit_code == 2 and not (run_dir / files.METRICS).exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            with contextlib.suppress(OSError):
                mirror.forget(config.output, run_dir)
        raise
    finally:
        # On a cluster the others are in the folders of their nodes, and from there at the address.
        results = (
            (files.RESULT,) if config.launch.backend == "ray" else (*mirror.RESULTS, *mirror.LOGS)
        )
        with contextlib.suppress(StorageError):  # an error on the way is more important
            mirror.push(config.output, run_dir, results)
