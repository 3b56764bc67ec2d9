"""The `evaluate` section of the job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When the held-out data is looked at."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    every: int = 1
    """Evaluate after every that many steps, and at the end; 0: at the end only."""
    batch: int = 512
    """Examples a forward pass."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every is {self.every}: it must be at least 0")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: it must be at least 1")
