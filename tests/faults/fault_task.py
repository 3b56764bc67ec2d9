"""A task whose forward pass goes wrong on one rank, some steps into the run, once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Task


class Fault(Task):
    """Args: kind: none, raise, kill, stop or drift; marker: a file that says it has happened;
    only worker `rank` is hit."""

    sum_of_squares = False  # steps of many products

    def __init__(
        self,
        kind: str = "none",
        marker: str = "",
        rank: int = 1,
        calls: int = 30,
        examples: int = 64,
    ) -> None:
        self.kind, self.marker, self.calls_left = kind, Path(marker or "unused"), calls
        # The log file that a worker opens says its rank; nothing else tells a task.
        self.rank = rank
        g = torch.Generator().manual_seed(0)
        x = torch.randn(examples, 5, generator=g)
        self.data = ArrayData(x, x.sin().sum(1, keepdim=True))
        self.linear: Any = None

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.linear = model[0]
        return model

    def train_data(self) -> ArrayData:
        return self.data

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        self.calls_left -= 1
        if (
            self.calls_left == 0
            and self.kind in ("raise", "kill", "stop")
            and my_rank() == self.rank
        ):
            self._fail()
        return nn.functional.mse_loss(outputs, batch[1])

    def _fail(self) -> None:
        if self.marker.exists():
            return
        self.marker.write_text(str(os.getpid()))
        if self.kind == "raise":
            raise ValueError("the fault of rank one")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    def eval_data(self) -> ArrayData:
        return self.data

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """Drift: evaluation changes the parameters of one rank, in the last bits."""
        if self.kind == "drift" and my_rank() == self.rank:
            with torch.no_grad():
                self.linear.weight[0, 0] *= 1 + 1e-6
        return {}


def my_rank() -> int:
    """The rank of this process in the default group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0
