"""Which examples a step sees, who evaluates them, and how they reach the device."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Tasks written for hfdist 0.1 import it from here.
    if name == "ArrayData":
        from hfdist.tasks.array_data import ArrayData

        return ArrayData
    raise AttributeError(f"module 'hfdist.data' has no attribute {name!r}")
