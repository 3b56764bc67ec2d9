"""How a job's workers are started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

MAX_WORKERS = 1 << 16
MAX_THREADS = 4096
_PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The `launch` section of a job. Under torchrun, its command line decides on the workers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    workers: int | tuple[int, int] = 1
    """Number of processes, one a GPU where there are GPUs; [min, max] for an elastic run on Ray."""
    backend: Literal["local", "ray"] = "local"
    """Processes on this machine, or workers that Ray places on a cluster."""
    address: str | None = None
    """Ray: the cluster ("auto", "ray://HOST:10001"); by default RAY_ADDRESS, else a cluster of this
    machine's own."""
    threads_per_worker: int | None = None
    """CPU threads of a worker. By default the cores are shared out among a machine's workers."""
    timeout_seconds: float = 60.0
    """A collective that takes longer means that a worker is dead or stalls; the run then ends."""
    max_failures: int = 0
    """Restarts of all workers from the newest checkpoint after one of them failed; mistakes in job, task
    or data are not tried again."""
    cpus_per_worker: float = 1.0
    """Ray: cores reserved for a worker."""
    gpus_per_worker: float | None = None
    """Ray: GPUs reserved for a worker; by default 1 where `device` asks for GPUs, else 0."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray: how workers are placed on nodes."""
    accelerator_type: str | None = None
    """Ray: only nodes with this kind of GPU ("A100", "H100")."""
    resources: dict[str, float] = field(default_factory=dict)
    """Ray: custom resources reserved for a worker."""

    spares: bool = True
    """Ray, where workers may be started again (`max_failures`, [min, max]): beside each worker its node keeps
    a process that has imported everything, for the next one. Without it a restart takes longer, but less
    memory is used."""
    placement_timeout: float | None = None
    """Ray: seconds that a job waits for resources which the cluster does not have; by default 900 where
    it scales itself, else 0."""

    def __post_init__(self) -> None:
        self._check_workers()
        if self.backend not in ("local", "ray"):
            raise ValueError(f"backend is {self.backend!r}: it must be 'local' or 'ray'")
        if self.placement not in _PLACEMENTS:
            raise ValueError(
                f"placement is {self.placement!r}: it must be one of {', '.join(_PLACEMENTS)}"
            )
        if self.threads_per_worker is not None and not 1 <= self.threads_per_worker <= MAX_THREADS:
            raise ValueError(
                f"threads_per_worker is {self.threads_per_worker}: it must be from 1 to {MAX_THREADS}"
            )
        if not 0.0 < self.timeout_seconds < float("inf"):
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}: it must be above 0")
        if self.max_failures < 0:
            raise ValueError(f"max_failures is {self.max_failures}: it must be at least 0")
        for key in ("cpus_per_worker", "gpus_per_worker"):
            value = getattr(self, key)
            if value is not None and not value >= 0.0:
                raise ValueError(f"{key} is {value}: it must be at least 0")
        if self.placement_timeout is not None and not self.placement_timeout >= 0.0:
            raise ValueError(
                f"placement_timeout is {self.placement_timeout}: it must be at least 0"
            )
        for name, amount in self.resources.items():
            if not amount >= 0.0:
                raise ValueError(f"resources.{name} is {amount}: it must be at least 0")

    def _check_workers(self) -> None:
        if self.max_workers > MAX_WORKERS:
            raise ValueError(f"workers is {self.workers}: at most {MAX_WORKERS}")
        if isinstance(self.workers, int):
            if self.workers < 1:
                raise ValueError(f"workers is {self.workers}: it must be at least 1")
            return
        if len(self.workers) != 2:
            raise ValueError(f"workers is {list(self.workers)}: write a number, or [min, max]")
        low, high = self.workers
        if not 1 <= low <= high:
            raise ValueError(f"workers is {[low, high]}: [min, max] with 1 <= min <= max")
        if self.backend != "ray" and low != high:
            raise ValueError(
                f"workers is {[low, high]}: a range needs launch.backend=ray; on this machine, "
                f"set workers={high}"
            )

    @property
    def max_workers(self) -> int:
        """Number of workers, the greatest where it is a range."""
        return self.workers if isinstance(self.workers, int) else max(self.workers, default=0)
