"""Examples in tensors, from which whole batches are taken at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from hfdist.tasks.task import Batch


class ArrayData(Dataset[Any]):
    """Examples in tensors with a common leading axis: a data set that gives whole batches at once.

    Args:
        tensors: One tensor a part of an example; or tensors by name, for batches that are dicts.
    """

    def __init__(self, *tensors: Tensor, **named: Tensor) -> None:
        self._parts: tuple[Tensor, ...] | dict[str, Tensor] = named if named else tensors
        sizes = {len(t) for t in (*tensors, *named.values())}
        if len(sizes) != 1:
            raise ValueError(
                f"the tensors have {sorted(sizes)} examples: they must have the same number"
            )
        self._length = sizes.pop()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.batch(index)

    def batch(self, indices: Any) -> Batch:
        """The examples at `indices`, stacked."""
        if isinstance(self._parts, Mapping):
            return {name: t[indices] for name, t in self._parts.items()}
        return tuple(t[indices] for t in self._parts)
