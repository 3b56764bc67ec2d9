"""Why a run on a cluster failed, told from what workers, and Ray, say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfdist.errors import ConfigError, WorkerError
from hfdist.launch.child import Failed
from hfdist.launch.ray.failures import cause_of, first_failure

ray_exceptions = pytest.importorskip("ray.exceptions")

# What Ray says of any process that is gone, whatever ended it.
GONE = (
    "A worker health check failed.\nWorker info: Worker(\n  node_id='4019a8b9',\n)\n"
    "The actor died unexpectedly before finishing this task.\n\tpid: 16202\n"
    "The actor is dead because its worker process has died. Some common causes include: (1) the process "
    "was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the "
    "worker crashed unexpectedly; consider enabling resource isolation to prevent node deaths"
)
OUT_OF_MEMORY = (
    "A worker health check failed.\n4 worker(s) were killed due to the node running low on memory. Memory "
    "on the node (IP: 192.0.2.2, ID: 74d5cb08) was 7.45GB used / 23.54GB limit (0.316375)"
)
UNREACHABLE = (
    "A worker health check failed.\nThe actor 3554fa42 is unavailable: RpcError: failed to connect"
)


def said(error_class: str, message: str, *, is_user_error: bool = True) -> Failed:
    return Failed(
        error_class=error_class,
        message=message,
        traceback="",
        is_user_error=is_user_error,
        is_interrupt=False,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GONE, "rank 1 ended without a word: killed, or crashed"),
        (OUT_OF_MEMORY, "rank 1 was killed because its node ran out of memory"),
        (UNREACHABLE, "rank 1 does not answer any more: its node died"),
        ("The actor died because its node has died.", "rank 1 does not answer any more"),
    ],
)
def test_a_lost_worker_is_named_with_what_ended_it(
    text: str, expected: str, tmp_path: Path
) -> None:
    peer = {0: (said("PeerError", "another rank died"), 1.0)}
    error = cause_of(peer, {1: RuntimeError(text), 0: RuntimeError("rank 0")}, None, tmp_path)
    assert str(error).startswith(expected)
    assert "rank-1.log" in str(error)


def test_a_workers_own_error_comes_before_what_it_did_to_others(tmp_path: Path) -> None:
    told = {
        0: (said("PeerError", "another rank died"), 1.0),
        1: (said("ConfigError", "damping is -1"), 3.0),
        2: (said("KeyError", "'x'", is_user_error=False), 2.0),
    }
    error = cause_of(told, {}, RuntimeError("Training failed"), tmp_path)
    assert isinstance(error, WorkerError)
    assert "rank 2 failed: KeyError: 'x'" in str(error)
    del told[2]
    error = cause_of(told, {}, RuntimeError("Training failed"), tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error) == "rank 1: damping is -1"
    peer = {1: (said("PeerError", "rank 1 of 2: sum did not finish"), 1.0)}
    assert str(cause_of(peer, {}, None, tmp_path)) == "rank 1 of 2: sum did not finish"


def test_a_controller_that_is_gone_is_named(tmp_path: Path) -> None:
    killed = cause_of({}, {}, ray_exceptions.ActorDiedError(), tmp_path)
    assert str(killed) == "Ray Train's controller ended without a word: killed, or crashed"
    starved = cause_of({}, {}, ray_exceptions.OutOfMemoryError(OUT_OF_MEMORY), tmp_path)
    assert "Ray Train's controller was killed because its node ran out of memory" in str(starved)
    other = cause_of({}, {}, RuntimeError("no such thing\nand more"), tmp_path)
    assert str(other) == "Ray Train gave up: no such thing"


def test_a_restart_names_rank_node_and_how_and_not_those_that_miss_a_peer() -> None:
    nodes = {0: "ann (10.0.0.1, process 7)", 1: "bob (10.0.0.2, process 8)"}
    peer = {0: (said("PeerError", "another rank died"), 1.0)}
    lost = {0: RuntimeError("rank 0"), 1: RuntimeError(GONE)}
    text = first_failure(peer, lost, nodes)
    assert text.startswith("rank 1 on bob (10.0.0.2, process 8) ended without a word: killed")
    assert "SIGKILL" in text
    assert "rank 0" not in text
    own = {**peer, 1: (said("KeyError", "'x'\nmore"), 2.0)}
    assert first_failure(own, lost, {}) == "rank 1 failed: KeyError: 'x'"
    both = first_failure({}, {0: RuntimeError(UNREACHABLE), 1: RuntimeError(OUT_OF_MEMORY)}, nodes)
    assert both.startswith("rank 0 on ann")
    assert "its node died" in both
    assert "; rank 1 on bob (10.0.0.2, process 8) was killed because its node ran out" in both
    early = first_failure(peer, {0: RuntimeError("rank 0")}, nodes)  # before Ray has seen it
    assert early.startswith("rank 1 on bob (10.0.0.2, process 8) does not answer any more")
    assert first_failure(peer, {}, {}) == "rank 0 failed: a peer is gone"
