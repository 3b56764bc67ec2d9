"""Batches of a data set with a length, on the device; the next step's in the background."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import Dataset

from hfdist.data.batches import Sent, collated, on_device, send
from hfdist.data.plan import MicrobatchPlan, StepPlan
from hfdist.data.processes import loaded, seed_of
from hfdist.errors import DataError
from hfdist.tasks.task import Batch, Task
from hfdist.tasks.user_code import user_code


class BatchLoader:
    """Makes batches on the device; the next step's in the background, by a thread or by processes.

    Args:
        task: Its `collate` makes batches of examples.
        dataset: Map-style; None for a deterministic function, whose batches are None.
        device: Where batches go; beside what it computes, where it is an accelerator.
        dtype: Type of floating-point leaves.
        source: The task's method that gave the data set, for messages.
        processes: That read and collate; 0: a thread of this process.
        seed: The run's, of random numbers that are drawn in those processes.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset | None,
        device: torch.device,
        dtype: torch.dtype,
        source: str = "train_data",
        processes: int = 0,
        seed: int = 0,
    ) -> None:
        self._source, self._processes, self._seed = source, processes, seed
        self._task, self._dataset, self._device, self._dtype = task, dataset, device, dtype
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[Any, Future[Sent]] = {}
        self._made: Iterator[tuple[Any, Batch]] | None = None
        # Hugging Face's data sets have a `batch`, too, which is another thing.
        is_array_like = hasattr(dataset, "batch") and not hasattr(dataset, "__getitems__")
        self._whole_batches = type(task).collate is Task.collate and is_array_like

    def first(self, n: int, term: int | None = None) -> Batch:
        """The first examples of the data set, or of a term."""
        return self._make(MicrobatchPlan(number=0, indices=torch.arange(n), term=term)).arrived()

    def expect(self, plans: Iterable[tuple[int, MicrobatchPlan]]) -> None:
        """What will be loaded, in its order: processes, if there are any, begin with it."""
        if self._processes and self._dataset is not None:
            work = ((seed_of(self._seed, step, plan.number), plan) for step, plan in plans)
            self._made = loaded(self._made_by_process, work, self._processes)

    def begin(self, step: int, plan: StepPlan) -> None:
        """A step begins: batches are loaded one by one."""

    def load(self, plan: MicrobatchPlan) -> Batch:
        """The batch of a plan.

        Raises:
            DataError: The data set fails on an example, or the task cannot make a batch.
            WorkerError: A process that loads is lost.
        """
        if self._made is not None:
            key, batch = next(self._made)
            assert key == _key(plan), "batches are loaded in another order than was said"
            return on_device(batch, self._device, self._dtype)
        coming = self._coming.pop(_key(plan), None)
        return (self._make(plan) if coming is None else coming.result()).arrived()

    def prepare(self, step: int, plan: StepPlan) -> None:
        """Begin to make the next step's batches."""
        self.prefetch(plan.microbatches())

    def prefetch(self, plans: Sequence[MicrobatchPlan]) -> None:
        """Begin to make these batches; what is not loaded until the next call is dropped."""
        if self._dataset is None or self._made is not None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="hfdist-data")
        for future in self._coming.values():
            future.cancel()
        self._coming = {_key(p): self._pool.submit(self._make, p) for p in plans}

    def close(self) -> None:
        """End the background's thread and processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._coming, self._made = {}, None

    def _make(self, plan: MicrobatchPlan) -> Sent:
        batch = None if self._dataset is None else self._on_host(plan)
        return send(batch, self._device, self._dtype)

    def _made_by_process(self, plan: MicrobatchPlan) -> tuple[Any, Batch]:
        return _key(plan), self._on_host(plan)

    def _on_host(self, plan: MicrobatchPlan) -> Batch:
        data: Any = self._dataset
        indices = plan.indices
        name, kind = f"{type(self._task).__name__}.{self._source}()", type(data).__name__
        if plan.term is not None:
            with user_code(f"drawing points of {name}", type(self._task), DataError):
                return data.points(plan.term, plan.draw, indices)
        if self._whole_batches:
            with user_code(f"{kind}.batch() of {name}", type(data).batch, DataError):
                return data.batch(indices)
        if hasattr(data, "__getitems__"):  # torch's name for several examples at once
            with user_code(f"{kind}.__getitems__() of {name}", type(data).__getitems__, DataError):
                return collated(self._task, data.__getitems__(indices.tolist()))
        examples = []
        for index in indices.tolist():
            with user_code(f"{kind}[{index}] of {name}", type(data).__getitem__, DataError):
                examples.append(data[index])
        return collated(self._task, examples)


def _key(plan: MicrobatchPlan) -> Any:
    return plan.number, plan.term, plan.draw, plan.indices.numpy().tobytes()
