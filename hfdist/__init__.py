"""Distributed Hessian-free (truncated Newton, Gauss-Newton-CG) training of PyTorch models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hfdist.api import train
    from hfdist.config.job import RunConfig, load_config
    from hfdist.hessian_free import HessianFree, newton_gradient
    from hfdist.optim.options import HFOptions
    from hfdist.optim.report import StepReport
    from hfdist.tasks.array_data import ArrayData
    from hfdist.tasks.task import Task

# Where each public name lives. It is loaded when it is first used: the command line asks for the
# version without paying for torch.
_MODULES = {
    "ArrayData": "hfdist.tasks.array_data",
    "HFOptions": "hfdist.optim.options",
    "HessianFree": "hfdist.hessian_free",
    "RunConfig": "hfdist.config.job",
    "StepReport": "hfdist.optim.report",
    "Task": "hfdist.tasks.task",
    "load_config": "hfdist.config.job",
    "newton_gradient": "hfdist.hessian_free",
    "train": "hfdist.api",
}

__all__ = [
    "ArrayData",
    "HFOptions",
    "HessianFree",
    "RunConfig",
    "StepReport",
    "Task",
    "__version__",
    "load_config",
    "newton_gradient",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hfdist' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
