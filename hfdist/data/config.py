"""The `batches` section of the job: how many examples a step uses, by role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

MAX_LOADERS = 1024


@dataclass(frozen=True, kw_only=True)
class BatchesConfig:
    """Examples of a step by role [Martens & Sutskever 2012, sec. 12], over all ranks.

    Raises:
        ValueError: A value is out of its range; the message names the key and the range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    gradient: int | None = None
    """Examples of the gradient; null: all training data."""
    curvature: int | float | Literal["auto"] | None = "auto"
    """Examples of the curvature products: a number, or a fraction (0.25) of the gradient's. Those are the
    first of the gradient's examples. auto: a fraction that grows as far as the steps need it, for the
    solver krylov; with `loaders` and for streams, which are read ahead, the gradient's. null: the
    gradient's."""
    line_search: int | None = None
    """Examples of backtracking and line search, none of them the gradient's where the data allows; null:
    the gradient's. On small batches others make for shorter steps than pay in the end (docs/choosing.md,
    Small batches)."""
    microbatch: int | None = None
    """Examples of a forward pass; bounds the memory. Random numbers (dropout) belong to a microbatch, so
    with this set they do not depend on the number of workers. null: one microbatch a worker."""
    growth: float = 1.0
    """Factor by which the numbers of examples grow with every step, up to all data."""
    loaders: int = 0
    """Processes of each worker that read and collate examples ahead of the steps, one where the data is a
    stream; 0: a thread of the worker."""

    def __post_init__(self) -> None:
        for key in ("gradient", "line_search", "microbatch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}: it must be at least 1, or null")
        if not 0 <= self.loaders <= MAX_LOADERS:
            raise ValueError(f"loaders is {self.loaders}: it must be from 0 to {MAX_LOADERS}")
        c = self.curvature
        if isinstance(c, str) and c != "auto":
            raise ValueError(f"curvature is {c!r}: it must be a number, auto, or null")
        if isinstance(c, float) and not 0.0 < c <= 1.0:
            raise ValueError(f"curvature is {c}: a fraction must be above 0 and at most 1")
        if isinstance(c, int) and c < 1:
            raise ValueError(f"curvature is {c}: it must be at least 1, or null")
        if not 1.0 <= self.growth < math.inf:
            raise ValueError(f"growth is {self.growth}: it must be at least 1")
