"""Errors that a person can fix: one message that names what is wrong and what to do about it."""

from __future__ import annotations

from hfdist.addresses import without_user_information

_LONGEST = 400  # characters of another program's message


class UserError(Exception):
    """Bad input. The message names the key or file at fault and the fix.

    The command line prints it without a traceback and exits with code 2. What is written of it anywhere
    (result.json, logs, MLflow) is this message, so no address in it keeps its user and password.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(without_user_information(message))


class ConfigError(UserError):
    """A job file, an override or an option that does not fit; names the key."""


class TaskError(UserError):
    """A task that cannot be imported, built or differentiated; names the task and the method."""


class TaskFailure(TaskError):
    """The task's own code failed after training had begun: another try may go better."""

    exit_code = 1


class StepMemoryError(UserError):
    """A step for which the device's memory is too small; names the largest parts and what to set. Parameters
    and state are those before the step."""

    exit_code = 1


class DataError(UserError):
    """Data that cannot be batched as asked: empty, or smaller than a batch role."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, or of another model; names the file."""


class StorageError(UserError):
    """An output folder that cannot be written: permissions, a full disk."""


class ReplicaError(UserError):
    """Ranks that should hold identical parameters do not; names the ranks."""

    exit_code = 1


class PeerError(UserError):
    """A collective that did not finish because another rank died or stalled. Seldom the cause: the
    other rank's own error says more."""

    exit_code = 1


class SupersededError(UserError):
    """A group of workers that was taken for lost and is back: another one has its run."""

    exit_code = 1


class WorkerError(UserError):
    """A worker process that failed: carries its own error, or how the process ended."""

    exit_code = 1


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during a step. Not an error: the run stops as KILLED and can be resumed."""


class Leaving(Interrupted):
    """A step is abandoned so that those before it are saved: a machine will soon be taken away."""


def first_line(error: object) -> str:
    """What an error of a library says in its first line: those after it are for its developers."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a message that cannot be made must not hide the error
        lines = []
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
