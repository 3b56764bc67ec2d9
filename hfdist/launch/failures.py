"""Which of a group's workers failed first, and the message that says so."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfdist import errors
from hfdist.errors import UserError, WorkerError
from hfdist.launch.child import Failed, Finished
from hfdist.launch.logs import path_of
from hfdist.rundir import files
from hfdist.rundir.files import write_json


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The state of a worker process, or how it ended."""

    rank: int
    answer: Finished | Failed | None = None
    """Its own report."""
    at: float = 0.0
    """When the report came, or its end was noticed."""
    exit_code: int | None = None
    """None while it runs; minus the signal's number if a signal ended it."""
    is_stopped: bool = False
    """Halted by SIGSTOP or a debugger."""

    @property
    def has_failed(self) -> bool:
        return isinstance(self.answer, Failed) or (
            self.answer is None and self.exit_code is not None
        )

    @property
    def misses_peer(self) -> bool:
        """Whether it failed only because another did."""
        return isinstance(self.answer, Failed) and self.answer.error_class == "PeerError"


class WorkerTraceback(Exception):
    """The traceback in the worker process, as the cause of the error raised in its parent."""


def root_cause(
    endings: Sequence[Ended], run_dir: Path, timeout_seconds: float
) -> UserError | KeyboardInterrupt | None:
    """The error of the worker that failed first; None if none failed.

    A worker that misses a peer is never the cause while another one failed by itself, or did not report.
    """
    failed = [ending for ending in endings if ending.has_failed]
    if not failed:
        return None
    own = [ending for ending in failed if not ending.misses_peer]
    if own:
        return _error(min(own, key=lambda e: e.at), run_dir)
    silent = [e for e in endings if e.answer is None]
    if silent:
        return _stalled(silent, timeout_seconds)
    return _error(min(failed, key=lambda e: e.at), run_dir)


def _error(ending: Ended, run_dir: Path) -> UserError | KeyboardInterrupt:
    rank, answer = ending.rank, ending.answer
    if isinstance(answer, Failed):
        return KeyboardInterrupt() if answer.is_interrupt else error_of(rank, answer)
    assert ending.exit_code is not None
    log = path_of(run_dir, rank)
    return WorkerError(f"rank {rank} {_how(ending.exit_code)}{_last_words(log)}")


def error_of(rank: int, failed: Failed) -> UserError:
    """The error of a worker, to be raised where its traceback is not: a user's error as itself."""
    error: UserError
    if failed.is_user_error:
        # What rank 0 says needs no sender: a run in one process says it in the same words.
        says_so = rank == 0 or failed.message.startswith(f"rank {rank} ")
        sender = "" if says_so else f"rank {rank}: "
        error = getattr(errors, failed.error_class, WorkerError)(sender + failed.message)
    else:
        error = WorkerError(f"rank {rank} failed: {failed.error_class}: {failed.message}")
    error.__cause__ = WorkerTraceback("\n\n" + failed.traceback)
    return error


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and no word"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (by hand, or because memory ran out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"; the last line of {log}: {lines[-1]}" if lines else ""


def _stalled(silent: Sequence[Ended], timeout_seconds: float) -> WorkerError:
    names = ", ".join(
        f"rank {e.rank}" + (" (its process is stopped)" if e.is_stopped else "") for e in silent
    )
    return WorkerError(
        f"{names} did not answer for launch.timeout_seconds={timeout_seconds:g}: ended. Raise the "
        "timeout if a step of one worker may take longer than another's by that much"
    )


def record_cause(run_dir: Path, error: UserError) -> None:
    """Make the cause the `error` of result.json: rank 0 itself saw at most that a peer was gone."""
    if not (run_dir / files.METRICS).exists():
        return  # the run had not begun
    path = run_dir / files.RESULT
    try:
        result = json.loads(path.read_text()) if path.exists() else {}
        result |= {
            "run_id": run_dir.name,
            "status": "FAILED",
            "error": f"{type(error).__name__}: {error}",
            "run_dir": str(run_dir),
        }
        write_json(path, result)
    except (OSError, ValueError, UserError):
        pass  # the error itself matters more than its record
