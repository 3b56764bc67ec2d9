"""Processes that load data ahead of the steps: torch's DataLoader, told what comes next."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hfdist.errors import UserError, WorkerError
from hfdist.seeds import mixed

_AHEAD = 2  # pieces of work that a process has in hand


@dataclass(frozen=True)
class _Failed:
    """An error as a value: DataLoader would wrap its traceback into the message."""

    error: UserError


def loaded(
    make: Callable[[Any], Any], work: Iterable[tuple[int, Any]], processes: int
) -> Iterator[Any]:
    """`make(item)` of every (seed, item), in order, in processes that go ahead.

    Random numbers drawn meanwhile belong to the item: its seed is that of Python's, numpy's and torch's.

    Args:
        make: Reads and collates, on the host.
        work: What to make.
        processes: How many; at least 1.

    Raises:
        UserError: `make`'s own; a `WorkerError` where a process is lost.
    """
    data = _Made(make)
    return _results(
        DataLoader(
            data,
            sampler=work,
            **_settings(processes),
        )
    )


def streamed(items: Iterable[Any]) -> Iterator[Any]:
    """The items, made in one process that goes ahead.

    Raises:
        UserError: As `loaded`.
    """
    return _results(DataLoader(_Items(items), **_settings(1)))


def _settings(processes: int) -> dict[str, Any]:
    return {
        "batch_size": None,
        "num_workers": processes,
        "prefetch_factor": _AHEAD,
        "collate_fn": _itself,
        "worker_init_fn": _begin,
        "generator": torch.Generator(),  # the run's own random numbers stay as they are
    }


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> Any:
        number, item = index
        seed(number)
        try:
            return self._make(item)
        except UserError as error:
            return _failed(error)


class _Items(IterableDataset[Any]):
    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._items
        except UserError as error:
            yield _failed(error)


def _failed(error: UserError) -> _Failed:
    return _Failed(type(error)(str(error)))  # without its cause, which may not be pickled


def _results(loader: DataLoader[Any]) -> Iterator[Any]:
    results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            raise WorkerError(
                f"a process that loads data is lost ({str(error).splitlines()[0]}): `batches.loaders=0` "
                "loads in this process, fewer loaders need less memory"
            ) from error
        if isinstance(result, _Failed):
            raise result.error
        yield result


def seed(number: int) -> None:
    """Seed what data sets draw from."""
    random.seed(number)
    numpy.random.seed(number % (1 << 32))  # noqa: NPY002  # it is what transforms draw from
    torch.manual_seed(number)


def seed_of(run_seed: int, step: int, number: int) -> int:
    """Of the random numbers that are drawn while a microbatch is loaded."""
    return mixed(run_seed, "load", step, number)


def _begin(number: int) -> None:
    # Ctrl-C is for the run, which ends its loaders; and handlers of the run are not theirs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _itself(made: Any) -> Any:
    return made
