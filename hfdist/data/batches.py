"""Examples into batches, and batches onto the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hfdist.devices import copy_stream
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


@dataclass(frozen=True)
class Sent:
    """A batch on its way to the device."""

    batch: Batch
    device: torch.device
    copies: torch.Event | None

    def arrived(self) -> Batch:
        """The batch, for what the calling thread computes from now on."""
        tensors = [t for t in tree_leaves(self.batch) if isinstance(t, Tensor)]
        copy_stream(self.device).wait(self.copies, tensors)
        return self.batch


def send(batch: Batch, device: torch.device, dtype: torch.dtype) -> Sent:
    """Begin to copy a batch to the device, beside what it computes.

    Args:
        batch: Any pytree of tensors.
        device: Where it goes.
        dtype: Type of floating-point leaves.
    """
    stream = copy_stream(device)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return stream.copy(leaf.to(dtype) if leaf.is_floating_point() else leaf)

    return Sent(tree_map(moved, batch), device, stream.event())


def on_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch on the device; arguments as `send`'s."""
    return send(batch, device, dtype).arrived()
