"""Batches on the device; the next step's in the background."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from hfdist.data.plan import MicrobatchPlan
from hfdist.devices import CopyStream
from hfdist.errors import DataError
from hfdist.tasks.task import Batch, Task
from hfdist.tasks.user_code import user_code


class BatchLoader:
    """Makes batches on the device; the next step's in the background.

    Args:
        task: Its `collate` makes batches of examples.
        dataset: Map-style; None for a deterministic function, whose batches are None.
        device: Where batches go; beside what it computes, where it is an accelerator.
        dtype: Type of floating-point leaves.
        source: The task's method that gave the data set, for messages.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset | None,
        device: torch.device,
        dtype: torch.dtype,
        source: str = "train_data",
    ) -> None:
        self._source = source
        self._task, self._dataset, self._device, self._dtype = task, dataset, device, dtype
        self._copies = CopyStream(device)
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[int, bytes], Future[tuple[Batch, torch.Event | None]]] = {}
        whole = type(task).collate is Task.collate and hasattr(dataset, "batch")
        self._whole_batches = whole

    def load(self, plan: MicrobatchPlan) -> Batch:
        """The batch of a plan.

        Raises:
            DataError: The data set fails on an example, or the task cannot make a batch.
        """
        coming = self._coming.pop(_key(plan), None)
        batch, event = self._make(plan) if coming is None else coming.result()
        self._copies.arrived(event, [t for t in tree_leaves(batch) if isinstance(t, Tensor)])
        return batch

    def prefetch(self, plans: Sequence[MicrobatchPlan]) -> None:
        """Begin to make these batches; what is not loaded until the next call is dropped."""
        if self._dataset is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="hfdist-data")
        for future in self._coming.values():
            future.cancel()
        self._coming = {_key(plan): self._pool.submit(self._make, plan) for plan in plans}

    def close(self) -> None:
        """End the background thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._coming = {}

    def _make(self, plan: MicrobatchPlan) -> tuple[Batch, torch.Event | None]:
        if self._dataset is None:
            return None, None

        def to_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return self._copies.copy(
                leaf.to(self._dtype if leaf.is_floating_point() else leaf.dtype)
            )

        return tree_map(to_device, self._on_host(plan.indices)), self._copies.event()

    def _on_host(self, indices: Tensor) -> Batch:
        data: Any = self._dataset
        name, kind = f"{type(self._task).__name__}.{self._source}()", type(data).__name__
        if self._whole_batches:
            with user_code(f"{kind}.batch() of {name}", type(data).batch, DataError):
                return data.batch(indices)
        examples = []
        for index in indices.tolist():
            with user_code(f"{kind}[{index}] of {name}", type(data).__getitem__, DataError):
                examples.append(data[index])
        with user_code(
            f"{type(self._task).__name__}.collate() of a batch of {len(examples)} examples",
            type(self._task).collate,
            DataError,
            "Override collate() to pad or to stack them",
        ):
            return self._task.collate(examples)


def _key(plan: MicrobatchPlan) -> tuple[int, bytes]:
    return plan.number, plan.indices.numpy().tobytes()
