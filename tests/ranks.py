"""Run a function on several real ranks: processes with a gloo group between them.

The processes are started once and serve all tests; every call makes a group of its own. A call that
takes too long ends the processes, so that no test hangs.
"""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

_workers: dict[tuple[str, int], ProcessPoolExecutor] = {}  # by kind of device and rank


def on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 240.0,
    kind: str = "cpu",
) -> list[Any]:
    """Call `function(comm, *arguments)` on ranks 0 .. W-1 of a new group.

    Args:
        world_size: W.
        function: Of a module's top level.
        arguments: The same for every rank, picklable.
        timeout: Seconds.
        kind: "cpu", or a kind of device (see `devices.device_of`), one for each rank.

    Returns:
        What the ranks returned, in their order.

    Raises:
        RuntimeError: A rank raised, named; the others' errors follow from it.
        TimeoutError: It took too long; the processes are ended.
    """
    for rank in range(world_size):
        if (kind, rank) not in _workers:
            context = multiprocessing.get_context("spawn")
            _workers[kind, rank] = ProcessPoolExecutor(1, mp_context=context)
    with tempfile.TemporaryDirectory() as folder:
        futures = [
            _workers[kind, rank].submit(
                _on_rank, kind, rank, world_size, f"{folder}/meet", function, arguments
            )
            for rank in range(world_size)
        ]
        try:
            errors = {r: e for r, f in enumerate(futures) if (e := f.exception(timeout))}
        except TimeoutError:
            running = [rank for rank, f in enumerate(futures) if not f.done()]
            end_all()
            raise TimeoutError(f"ranks {running} of {world_size} did not return") from None
    if any(isinstance(error, BrokenExecutor) for error in errors.values()):
        end_all()  # the next call starts others
    if errors:
        rank, error = min(errors.items(), key=lambda item: _is_consequence(item[1]))
        raise RuntimeError(
            f"rank {rank} of {world_size}: {type(error).__name__}: {error}"
        ) from error
    return [_value(f) for f in futures]


def _value(future: Future[Any]) -> Any:
    return future.result()


def _is_consequence(error: BaseException) -> bool:
    return type(error).__name__ == "PeerError"


def _on_rank(
    kind: str,
    rank: int,
    world_size: int,
    path: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    import torch
    from devices import device_of

    from hfdist.comm.environment import join
    from hfdist.devices import use
    from hfdist.training import coordinator

    torch.set_num_threads(1)
    coordinator.draw_plots = nothing_drawn
    device = device_of(kind, rank)
    use(device)
    comm = join(
        device,
        rank=rank,
        world_size=world_size,
        init_method=f"file://{path}",
        timeout_seconds=30.0,
    )
    try:
        return function(comm, *arguments)
    finally:
        comm.close()


def nothing_drawn(records: Sequence[Any], folder: Path) -> list[Path]:
    """In place of `draw_plots`, which takes longer than the steps of a small run."""
    return []


def end_all() -> None:
    """End the processes."""
    for worker in _workers.values():
        for process in list(worker._processes.values()):
            process.kill()
        worker.shutdown(wait=False, cancel_futures=True)
    _workers.clear()


atexit.register(end_all)
