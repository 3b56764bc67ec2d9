"""Dot products of vectors that lie whole on every rank, or a part on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where the solver's vectors [n] live.

    Args:
        total: Sums over ranks of what each computed from its part of the vectors; None: each rank has
            whole vectors, and computes the same.
        signal: A scalar that the operator's last product summed over ranks (with whole vectors) or
            that is to be summed with the next scalars (with parts); None is zero.
        whole_numel: P, where n is less.
    """

    total_of: Callable[[Tensor], Tensor] | None = None
    signal: Callable[[], Tensor | None] = lambda: None
    whole_numel: int | None = None

    @property
    def is_sharded(self) -> bool:
        return self.total_of is not None

    def numel(self, v: Tensor) -> int:
        """P."""
        return v.numel() if self.whole_numel is None else self.whole_numel

    def total(self, scalars: Tensor) -> Tensor:
        """Sums over ranks of scalars [k], in place."""
        return scalars if self.total_of is None else self.total_of(scalars)

    def read_signal(self, like: Tensor) -> Tensor:
        """The signal, a scalar of `like`'s dtype and device."""
        signal = self.signal()
        return like.new_zeros(()) if signal is None else signal.to(like)

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """u'v of each pair, in one reduction and one look from the host."""
        return self.total(torch.stack([torch.dot(u, v).double() for u, v in pairs])).tolist()


WHOLE = Space()
