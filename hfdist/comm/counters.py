"""What a communicator counts about itself."""

from __future__ import annotations

KINDS = ("sum", "object", "reduce_scatter", "all_gather", "barrier")

SCALAR_NUMEL = 64
"""Sums of more elements than this count as vector sums."""


class Counters:
    """Calls, bytes and seconds by kind of collective."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self._values = {
            f"{kind}_{what}": 0.0 for kind in KINDS for what in ("calls", "bytes", "seconds")
        }
        self._values |= {"vector_sums": 0.0, "scalar_sums": 0.0, "seconds": 0.0}

    def add(self, kind: str, num_bytes: int, seconds: float) -> None:
        """Count one call of `kind`."""
        self._values[f"{kind}_calls"] += 1
        self._values[f"{kind}_bytes"] += num_bytes
        self._values[f"{kind}_seconds"] += seconds
        self._values["seconds"] += seconds

    def add_sum(self, numel: int) -> None:
        """Count a sum as one of vectors or one of scalars."""
        self._values["vector_sums" if numel > SCALAR_NUMEL else "scalar_sums"] += 1

    def take(self) -> dict[str, float]:
        """The counts since the last take; resets them."""
        values = self._values
        self._reset()
        return values
