"""Run a function on a device, in a process of its own.

The stand-in accelerator (`tests/standin`) is registered in a process for good, so the tests' own process
never has it: what runs there sees the machine as it is.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import standin
import torch

HERE = Path(__file__).parent
BUILDING = 600.0
"""Seconds that the first call may take: it compiles the stand-in where that was not done yet."""

needs_standin = pytest.mark.skipif(
    standin.why_not() is not None, reason=standin.why_not() or "it can be built"
)
needs_gpu = pytest.mark.skipif(
    torch.accelerator.current_accelerator(check_available=True) is None, reason="needs a GPU"
)
needs_two_gpus = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two GPUs")
DEVICES = [
    pytest.param("standin", marks=needs_standin),
    pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu]),
]
"""What tests of devices are parametrised with; `make gpu-test` runs the second kind on the machine's GPU."""

_workers: dict[str, ProcessPoolExecutor] = {}


def on(kind: str, function: Callable[..., Any], *arguments: Any, timeout: float = BUILDING) -> Any:
    """`function(device, *arguments)` with a device of this kind.

    Args:
        kind: "standin" or "gpu".
        function: Of a module's top level.
        arguments: Picklable, like the result.
        timeout: Seconds; the process is ended then.
    """
    if kind not in _workers:
        context = multiprocessing.get_context("spawn")
        _workers[kind] = ProcessPoolExecutor(1, mp_context=context)
    future = _workers[kind].submit(_call, kind, function, arguments)
    try:
        return future.result(timeout)
    except TimeoutError:
        end_all()
        raise


def _call(kind: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    device = device_of(kind)
    if gc.get_freeze_count() == 0:
        gc.freeze()  # what was imported stays: the many collections of tests look at what they made alone
    return function(device, *arguments)


def device_of(kind: str, index: int = 0) -> torch.device:
    """The device in this process, which has it from now on: "cpu", "standin", or "gpu" for the machine's."""
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "standin":
        standin.load()
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, index)


def environment(folder: Path) -> dict[str, str]:
    """Variables under which a new Python process knows the stand-in as soon as it imports torch.

    Args:
        folder: An empty one, which then declares the stand-in as torch's backends do: by an entry point.
    """
    info = folder / "standin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: standin\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nstandin = standin:load\n")
    return {"PYTHONPATH": ":".join([str(folder), str(HERE), *filter(None, sys.path)])}


def end_all() -> None:
    """End the processes."""
    for worker in _workers.values():
        for process in list(worker._processes.values()):
            process.kill()
        worker.shutdown(wait=False, cancel_futures=True)
    _workers.clear()


atexit.register(end_all)
