"""PyTorchHessianFree's small example: a fully connected regression of generated data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Batch, Outputs, Task


class SmallNet(Task):
    """A teacher network's outputs, with a little noise, learned by a student of the same shape; loss is
    the mean squared error.

    Args:
        examples: Number of training examples; an eighth as many are held out.
        inputs, hidden, outputs: Widths.
        dropout: Probability of dropping a hidden unit.
        noise: Standard deviation of the targets' noise.
    """

    def __init__(
        self,
        examples: int = 512,
        inputs: int = 10,
        hidden: int = 32,
        outputs: int = 3,
        dropout: float = 0.0,
        noise: float = 0.01,
    ) -> None:
        if min(examples, inputs, hidden, outputs) < 1:
            raise TaskError("task_args: examples, inputs, hidden and outputs must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise TaskError(f"task_args.dropout is {dropout}: it must be at least 0 and below 1")
        self._widths, self._dropout = (inputs, hidden, outputs), dropout
        # A generator of its own: the data must not depend on what else is drawn.
        generator = torch.Generator().manual_seed(17)
        total = examples + max(1, examples // 8)
        x = torch.randn(total, inputs, generator=generator)
        W1 = torch.randn(inputs, hidden, generator=generator) / inputs**0.5
        W2 = torch.randn(hidden, outputs, generator=generator) / hidden**0.5
        y = torch.tanh(x @ W1) @ W2 + noise * torch.randn(total, outputs, generator=generator)
        self._train = ArrayData(x[:examples], y[:examples])
        self._eval = ArrayData(x[examples:], y[examples:])

    def model(self) -> nn.Module:
        a, b, c = self._widths
        return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Dropout(self._dropout), nn.Linear(b, c))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])

    def train_data(self) -> ArrayData:
        return self._train

    def eval_data(self) -> ArrayData:
        return self._eval
