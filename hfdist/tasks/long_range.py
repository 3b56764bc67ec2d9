"""Problems that a recurrent net solves only if it remembers over many steps, as least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.seeds import mixed
from hfdist.tasks.residuals import PointSets, ResidualTask, Term
from hfdist.tasks.sequences import CELLS, Recurrent
from hfdist.tasks.task import Batch, Outputs, Weighted

Sequences = tuple[Tensor, Tensor]
"""Numbers and marks, padded with zeros [n, time, 2], and lengths [n]."""


def draw(generator: torch.Generator, number: int, length: int) -> tuple[Sequences, Tensor]:
    """Sequences and the two marked numbers [number, 2] of each.

    Numbers are uniform in [0, 1). A sequence has from T to 1.1 T of them, T = `length`; the first mark is in
    the first tenth of T, the second one behind it in the first half, so that at least T/2 numbers follow
    [Hochreiter & Schmidhuber 1997, sec. 5.4, 5.5].
    """
    tenth, longest = length // 10, length + length // 10
    lengths = torch.randint(length, longest + 1, (number,), generator=generator)
    numbers = torch.rand(number, longest, generator=generator)
    numbers *= torch.arange(longest) < lengths[:, None]
    marked = torch.stack(
        (
            torch.randint(0, tenth, (number,), generator=generator),
            torch.randint(tenth, length // 2, (number,), generator=generator),
        ),
        1,
    )
    marks = torch.zeros(number, longest).scatter_(1, marked, 1.0)
    return (torch.stack((numbers, marks), -1), lengths), numbers.gather(1, marked)


def remember(layer: nn.RNNBase, length: int) -> None:
    """A start from which derivatives reach back over so many steps.

    An LSTM forgets over times between 1 and `length`, each unit over its own [Tallec & Ollivier 2018,
    arXiv:1804.11188]; a tanh layer turns its states, as an orthogonal matrix does. Other biases are zero.
    """
    h = layer.hidden_size
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("bias"):
                p.zero_()
            elif isinstance(layer, nn.RNN) and name.startswith("weight_hh"):
                nn.init.orthogonal_(p)
        if isinstance(layer, nn.LSTM):
            times = torch.empty(h).uniform_(1.0, length - 1.0).log()
            bias = layer.get_parameter("bias_ih_l0")
            bias[:h], bias[h : 2 * h] = -times, times


class LongAddition(ResidualTask):
    """The addition problem over a long time, sequences drawn anew in every step: half the mean squared error.

    Args:
        sequences: Of a step.
        evaluation: Held-out sequences.
        hidden: Units of the net.
        length: T; sequences have up to a tenth more.
        cell: "lstm", or "tanh" for a simple recurrent net.
    """

    variance: ClassVar[float] = 1 / 6
    """Of the results: the squared error of the best constant."""

    def __init__(
        self,
        sequences: int = 500,
        evaluation: int = 2000,
        hidden: int = 12,
        length: int = 80,
        cell: str = "lstm",
    ) -> None:
        if length < 20:
            raise TaskError(f"task_args.length is {length}: it must be at least 20")
        if cell not in CELLS:
            raise TaskError(f"task_args.cell is {cell!r}: it must be one of {', '.join(CELLS)}")
        self._sizes, self._hidden, self._length = (sequences, evaluation), hidden, length
        self._cell = cell

    def result(self, two: Tensor) -> Tensor:
        """What is to be found of the marked numbers [n, 2]."""
        return two.sum(1)

    def model(self) -> nn.Module:
        model = Recurrent(self._hidden, self._cell)
        remember(model.recurrent, self._length)
        return model

    def _drawn(self, generator: torch.Generator, number: int) -> tuple[Sequences, Tensor]:
        sequences, two = draw(generator, number, self._length)
        return sequences, self.result(two)

    def _residuals(self, model: nn.Module, points: tuple[Sequences, Tensor]) -> Tensor:
        sequences, results = points
        found: Tensor = model(*sequences)
        return found - results

    def terms(self) -> Sequence[Term]:
        return [
            Term(
                name="results",
                points=lambda generator: self._drawn(generator, self._sizes[0]),
                residuals=self._residuals,
                every_step=True,
            )
        ]

    def eval_data(self) -> PointSets | None:
        if not self._sizes[1]:
            return None
        generator = torch.Generator().manual_seed(mixed(0, "held out"))
        points = self._drawn(generator, self._sizes[1])
        return PointSets([Term(name="results", points=points, residuals=self._residuals)], 0)

    def metrics(self, outputs: Outputs, batch: Batch) -> Mapping[str, Tensor | Weighted]:
        """The mean squared error, and the part of the results' variance that it is."""
        squares, n = outputs.square().sum(), float(len(outputs))
        return {"squares": (squares, n), "unexplained": (squares / self.variance, n)}

    def example_inputs(self, batch: Batch) -> Any:
        (sequence, length), _ = batch[1]
        return {"sequence": sequence, "length": length}

    def draw(self, model: nn.Module, folder: Path) -> list[Path]:
        return []


class LongMultiplication(LongAddition):
    """The same with the product of the two marked numbers."""

    variance = 7 / 144

    def result(self, two: Tensor) -> Tensor:
        return two.prod(1)
