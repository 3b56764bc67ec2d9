"""Examples into batches, and batches onto the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hfdist.errors import DataError
from hfdist.tasks.task import Batch, Task
from hfdist.tasks.user_code import user_code


def collated(task: Task, examples: Sequence[Any]) -> Batch:
    """A batch of examples, on the host.

    Raises:
        DataError: The task cannot make one.
    """
    with user_code(
        f"{type(task).__name__}.collate() of a batch of {len(examples)} examples",
        type(task).collate,
        DataError,
        "Override collate() to pad or to stack them",
    ):
        return task.collate(examples)


def on_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch on the device; from pinned memory and without waiting, where it is a GPU.

    Args:
        batch: Any pytree of tensors.
        device: Where it goes.
        dtype: Type of floating-point leaves.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        kind = dtype if leaf.is_floating_point() else leaf.dtype
        if device.type == "cuda" and leaf.device.type == "cpu":
            return leaf.to(kind).pin_memory().to(device, non_blocking=True)
        return leaf.to(device, kind)

    return tree_map(moved, batch)
