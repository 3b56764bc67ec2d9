"""RUN_DIR/logs/rank-N.log: what each worker logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfdist.rundir.files import LOGS


class StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the time: a live display puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def path_of(run_dir: Path, rank: int) -> Path:
    """A rank's log file."""
    return run_dir / LOGS / f"rank-{rank}.log"


@contextmanager
def logging_to_file(run_dir: Path, rank: int, *, to_stderr: bool = True) -> Iterator[None]:
    """Write this process's log records from INFO on to the rank's file, too, inside the block.

    Args:
        run_dir: The run's folder.
        rank: Named in every line.
        to_stderr: Let a program that has set up no logging see warnings on stderr, as it does without
            this.
    """
    path = path_of(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    root, own = logging.getLogger(), logging.getLogger("hfdist")
    handlers: list[logging.Handler] = [logging.FileHandler(path, delay=True)]
    handlers[0].setLevel(logging.INFO)
    handlers[0].setFormatter(
        logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s")
    )
    if to_stderr and not (root.handlers or own.handlers):
        # A handler anywhere switches logging's handler of last resort off.
        handlers.append(StderrHandler(logging.WARNING))
    level = own.level
    if own.level == logging.NOTSET:
        own.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        own.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
