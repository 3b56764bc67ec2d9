"""Module parameters <-> one flat vector theta [P]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

COMPLEX = (
    "hold real and imaginary part as a real parameter (torch.view_as_real), and make it complex in forward() "
    "(torch.view_as_complex)"
)
"""What to do about complex parameters."""


class ParameterVector:
    """The trainable tensors of a problem, seen as one vector [P].

    The tensors keep their own storage and dtype; the vector has the widest dtype among them.

    Args:
        tensors: Leaf tensors on one device, in a fixed order.

    Raises:
        ValueError: There is none, or they lie on several devices.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors: list[Tensor] = list(tensors)
        if not self.tensors:
            raise ValueError("no trainable parameter: unfreeze at least one")
        devices = {t.device for t in self.tensors}
        if len(devices) > 1:
            raise ValueError(
                f"parameters on several devices ({', '.join(sorted(map(str, devices)))}): "
                "move the model to one"
            )
        if any(t.is_complex() for t in self.tensors):
            raise ValueError(f"complex parameters are not supported: {COMPLEX}")
        self.device = self.tensors[0].device
        self.dtype = self.tensors[0].dtype
        for t in self.tensors[1:]:
            self.dtype = torch.promote_types(self.dtype, t.dtype)
        self._sizes = [t.numel() for t in self.tensors]
        self.numel = sum(self._sizes)  # P
        ends = list(accumulate(self._sizes))
        self.spans: list[tuple[int, int]] = [(e - n, e) for e, n in zip(ends, self._sizes)]
        """Where each tensor lies in the vector."""

    def zeros(self) -> Tensor:
        """A zero vector [P]."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Concatenate tensors shaped like the parameters into a vector [P]; None stands for zeros."""
        out = self.zeros() if out is None else out
        for piece, t in zip(out.split(self._sizes), tensors):
            if t is None:
                piece.zero_()
            else:
                piece.view(t.shape).copy_(t)
        return out

    def add(self, vector: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """vector [P] += the tensors, shaped like the parameters; None stands for zeros."""
        for piece, t in zip(vector.split(self._sizes), tensors):
            if t is not None:
                piece.view(t.shape).add_(t)

    def flatten_shifted(
        self, tensors: Sequence[Tensor | None], v: Tensor, shift: float | Tensor, out: Tensor
    ) -> Tensor:
        """out [P] = tensors + shift * v in one pass; shift is a scalar or a diagonal [P], None stands for
        zeros."""
        for (start, stop), t in zip(self.spans, tensors):
            piece, v_piece = out[start:stop], v[start:stop]
            if t is None:
                t = torch.zeros((), dtype=out.dtype, device=out.device)
            t = t.detach().reshape(-1).to(out.dtype)
            if isinstance(shift, Tensor):
                torch.addcmul(t, shift[start:stop], v_piece, out=piece)
            else:
                torch.add(t, v_piece, alpha=shift, out=piece)
        return out

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """Pieces of a vector [P], shaped like the parameters; always views."""
        return [piece.view(t.shape) for piece, t in zip(vector.split(self._sizes), self.tensors)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """Pieces of a vector [P], shaped and typed like the parameters; views where the dtype allows."""
        return [
            piece.view(t.shape).to(t.dtype)
            for piece, t in zip(vector.split(self._sizes), self.tensors)
        ]

    def read(self) -> Tensor:
        """A copy of the parameters as a vector [P]."""
        return self.flatten([t.detach() for t in self.tensors])

    @contextmanager
    def at(self, vector: Tensor) -> Iterator[None]:
        """Inside, the parameters have the values of a vector [P], without a copy where the dtype allows:
        their own storage stays as it is, and is theirs again afterwards."""
        own = [t.data for t in self.tensors]
        try:
            for piece, t in zip(vector.split(self._sizes), self.tensors):
                t.data = piece.view(t.shape).to(t.dtype)
            yield
        finally:
            for t, data in zip(self.tensors, own):
                t.data = data

    def moved(self, alpha: float, delta: Tensor, out: Tensor) -> Tensor:
        """out [P] = theta + alpha * delta [P]."""
        for (start, stop), t in zip(self.spans, self.tensors):
            theta, step = t.detach().reshape(-1), delta[start:stop]
            torch.add(theta, step, alpha=alpha, out=out[start:stop])
        return out

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy a vector [P] into the parameters' own storage."""
        for piece, t in zip(vector.split(self._sizes), self.tensors):
            # .data: trial values are no events for autograd's version counters.
            t.data.copy_(piece.view(t.shape))

    def spread(self, values: Sequence[float]) -> Tensor:
        """A vector [P] that repeats one value per tensor over that tensor's elements."""
        return torch.cat(
            [
                torch.full((n,), v, dtype=self.dtype, device=self.device)
                for v, n in zip(values, self._sizes)
            ]
        )
