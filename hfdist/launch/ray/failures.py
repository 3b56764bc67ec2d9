"""Why a run on a cluster failed, in the words of who failed first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hfdist.errors import UserError, WorkerError, first_line
from hfdist.launch.child import Failed
from hfdist.launch.failures import error_of
from hfdist.launch.logs import path_of

_PEER = "PeerError"
_SILENT = "ended without a word: killed, or crashed"
_LOST = ("ActorDiedError", "OutOfMemoryError")
"""Ray's errors of an actor that is gone."""


def cause_of(
    said: Mapping[int, tuple[Failed, float]],
    lost: Mapping[int, BaseException],
    error: BaseException | None,
    run_dir: Path,
) -> UserError:
    """The error that ended a run.

    Args:
        said: What workers said of themselves, by rank, and when.
        lost: What Ray says of them, by rank: an exception of theirs, or that the process is gone.
        error: What Ray Train says of the whole.
        run_dir: The run's folder.
    """
    own = {r: f for r, (f, _) in said.items() if f.error_class != _PEER}
    if own:
        rank = min(own, key=lambda r: said[r][1])
        return error_of(rank, own[rank])
    silent = {r: e for r, e in lost.items() if r not in said}
    for rank, exception in silent.items():
        return WorkerError(f"rank {rank} {_how(exception)}; its log is {path_of(run_dir, rank)}")
    if said:
        rank = min(said, key=lambda r: said[r][1])
        return error_of(rank, said[rank][0])
    if type(error).__name__ in _LOST:
        return WorkerError(f"Ray Train's controller {_how(error)}")
    return WorkerError(f"Ray Train gave up: {first_line(error)}")


def first_failure(
    said: Mapping[int, tuple[Failed, float]],
    lost: Mapping[int, BaseException],
    nodes: Mapping[int, str],
) -> str:
    """Which ranks of a group failed by themselves, where and how, in a clause; those that only miss a peer
    are left out.

    Args:
        said, lost: As of `cause_of`.
        nodes: Where each rank's worker was.
    """
    own = {
        r: f"failed: {f.error_class}: {f.message}"
        for r, (f, _) in said.items()
        if f.error_class != _PEER
    }
    silent = {rank: _how(error) for rank, error in lost.items() if rank not in said}
    # Ray does not say which signal it was; of all, only this one leaves a process no last word in its log.
    hint = " (by SIGKILL, by hand or because memory ran out, if its log says nothing)"
    silent = {rank: how + hint if how == _SILENT else how for rank, how in silent.items()}
    if not own and not silent:  # Ray has not seen yet what their peers miss
        gone = "does not answer any more: its process or its node is lost"
        silent = {rank: gone for rank in nodes if rank not in said}
    if not own and not silent:
        ranks = ", ".join(map(str, sorted({*said, *lost})))
        return f"rank {ranks} failed: a peer is gone"
    parts = []
    for rank, how in sorted((own | silent).items()):
        where = f" on {nodes[rank]}" if rank in nodes else ""
        parts.append(f"rank {rank}{where} {first_line(how)}")
    return "; ".join(parts)


def _how(exception: BaseException | None) -> str:
    # In Ray's own words: what it says of any lost process names memory and nodes among possible causes.
    text = str(exception)
    if "running low on memory" in text:
        return (
            "was killed because its node ran out of memory (fewer workers on a node, or smaller "
            "batches, need less)"
        )
    if "its node has died" in text or "is unavailable" in text:
        return "does not answer any more: its node died, or cannot be reached"
    return _SILENT
