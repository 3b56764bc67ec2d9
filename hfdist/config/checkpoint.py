"""When checkpoints are written and how many are kept: the `checkpoint.*` keys of a job file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Raises:
        ValueError: A value is out of its range; the message names the key and the range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    every: int = 10
    """Steps between checkpoints; the last step is always one."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    best: bool = True
    """Also keep the checkpoint with the lowest monitored loss."""
    asynchronous: bool = True
    """Write in the background; training waits only for the copy to host memory."""

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            value = getattr(self, key)
            if value < 1:
                raise ValueError(f"{key} is {value}: it must be at least 1")
