"""Examples into batches, and batches onto the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hfdist.devices import CopyStream
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


def on_device(
    batch: Batch, device: torch.device, dtype: torch.dtype, copies: CopyStream | None = None
) -> Batch:
    """A batch on the device.

    Args:
        batch: Any pytree of tensors.
        device: Where it goes.
        dtype: Type of floating-point leaves.
        copies: Beside what the device computes; use the batch after their `arrived` only.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        kind = dtype if leaf.is_floating_point() else leaf.dtype
        return leaf.to(device, kind) if copies is None else copies.copy(leaf.to(kind))

    return tree_map(moved, batch)
