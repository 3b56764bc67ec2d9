"""Tasks that return residuals: least squares, and differential equations on sets of points."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from hfdist.errors import DataError, TaskError
from hfdist.seeds import mixed
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.robust import LOSSES, residual_loss
from hfdist.tasks.task import Batch, Outputs, Task, Weighted

Points = Any
"""A tensor, or any pytree of tensors, with a common leading axis."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """weight * (mean over the points of the sum of rho of a point's residuals), rho(r) = r^2 / 2.

    Raises:
        TaskError: A value is out of its range; the message names the term and the value.
    """

    name: str
    points: Points | Callable[[torch.Generator], Points]
    """The points [n, ..] (with targets, if there are any: any pytree of tensors), or a function that draws
    them with a generator; always as many."""
    residuals: Callable[[nn.Module, Points], Tensor]
    """(model, points) -> residuals [n] or [n, m], a row a point. Derivatives of the model in its inputs may
    be taken in any way that torch knows."""
    weight: float = 1.0
    every_step: bool = False
    """Draw the points anew in every step, as a function of the job's seed and the step."""
    microbatch: int | None = None
    """Points of a forward pass; bounds the memory. None: one microbatch a worker."""
    loss: str = "squares"
    """rho: squares, huber, soft_l1 or cauchy (see `hfdist.tasks.robust`)."""
    scale: float = 1.0
    """Size of a residual from which on robust losses take it for an outlier."""

    def __post_init__(self) -> None:
        for problem, is_wrong in {
            f"weight is {self.weight}: it must be above 0": not 0.0 < self.weight < float("inf"),
            f"scale is {self.scale}: it must be above 0": not 0.0 < self.scale < float("inf"),
            f"loss is {self.loss!r}: it must be one of {', '.join(LOSSES)}": self.loss
            not in LOSSES,
            f"microbatch is {self.microbatch}: it must be at least 1, or None": (
                self.microbatch is not None and self.microbatch < 1
            ),
            "every_step needs points that are drawn: a function of a generator": (
                self.every_step and not callable(self.points)
            ),
        }.items():
            if is_wrong:
                raise TaskError(f"term {self.name!r}: {problem}")


@dataclass(frozen=True, eq=False)
class Part:
    """A term in a batch: what of the objective the batch's points are."""

    term: Term
    scale: float
    """Weight of a point's loss in the objective."""
    share: float
    """One over the number of all points of all terms: the shares of a step's points add up to 1."""


class PointSets(Dataset[Any]):
    """The points of a task's terms.

    Args:
        terms: At least one; their names differ.
        seed: Of the points that are drawn.

    Raises:
        TaskError, DataError: There is no term, two have one name, or points do not fit together.
    """

    def __init__(self, terms: Sequence[Term], seed: int) -> None:
        self.terms, self._seed = list(terms), seed
        names = [term.name for term in self.terms]
        if not names:
            raise TaskError("terms() returns no term: there is nothing to train on")
        if len(set(names)) < len(names):
            raise TaskError(
                f"terms() returns two terms of one name ({', '.join(names)}): rename one"
            )
        self._drawn: dict[int, tuple[int, Points]] = {}
        self.sizes: list[int] = []
        for k in range(len(self.terms)):
            self.sizes.append(_length(self._draw(k, 0), names[k]))
        total = sum(self.sizes)
        self._parts = [
            Part(term, term.weight / size, 1.0 / total)
            for term, size in zip(self.terms, self.sizes)
        ]

    def __len__(self) -> int:
        """Points of all terms."""
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Any:
        for k, size in enumerate(self.sizes):
            if index < size:
                return self.points(k, 0, torch.tensor([index]))
            index -= size
        raise IndexError(index)

    def batch(self, indices: Tensor) -> Batch:
        """Points of the first term."""
        return self.points(0, 0, indices)

    def points(self, k: int, draw: int, indices: Tensor) -> Batch:
        """(part, points [n, ..]) of term k: those at `indices` of its draw of a number."""
        points = self._draw(k, draw)
        return self._parts[k], tree_map(lambda t: t[indices], points)

    def _draw(self, k: int, draw: int) -> Points:
        term = self.terms[k]
        known = self._drawn.get(k)
        if known is not None and known[0] == draw:
            return known[1]
        points = term.points
        if callable(points):
            generator = torch.Generator().manual_seed(mixed(self._seed, "points", k, draw))
            points = points(generator)
            size = _length(points, term.name)
            if k < len(self.sizes) and size != self.sizes[k]:
                raise DataError(
                    f"term {term.name!r} draws {size} points in step {draw}, {self.sizes[k]} in the first: "
                    "draw as many every time"
                )
        self._drawn[k] = draw, points
        return points


def _length(points: Points, name: str) -> int:
    leaves = tree_leaves(points)
    if not leaves or not all(isinstance(t, Tensor) and t.ndim > 0 for t in leaves):
        raise DataError(
            f"term {name!r}: its points are {_kind(points)}: give tensors with a leading axis of points"
        )
    sizes = {len(t) for t in leaves}
    if len(sizes) > 1:
        raise DataError(
            f"term {name!r}: its tensors have {sorted(sizes)} points: they must have the same number"
        )
    (size,) = sizes
    if size == 0:
        raise DataError(f"term {name!r} has no points: give at least one, or leave the term out")
    return size


def _kind(points: Points) -> str:
    return "a number" if isinstance(points, Tensor) else f"a {type(points).__name__}"


class ResidualTask(Task):
    """min over theta of sum_k weight_k * mean_i rho(r_ki(theta)): a `Task` that returns residuals, not a
    loss.

    Define `model` and `terms`; and `solution` and `evaluation_points`, if a solution is known: errors are
    then metrics, and two-dimensional problems are drawn. Solvers know that the objective is a sum of squares
    (`optim.solver` dense and sample_space).
    """

    @abc.abstractmethod
    def terms(self) -> Sequence[Term]:
        """The terms of the objective, the same on every rank."""

    def solution(self, points: Tensor) -> Tensor:
        """The known solution at points [n, d]: [n] or [n, m], as the model's outputs."""
        raise NotImplementedError

    def evaluation_points(self) -> Tensor | None:
        """Points [n, d] at which the model is compared with the solution."""
        return None

    # -- what makes it a task ------------------------------------------------------------------------

    def train_data(self) -> PointSets:
        return PointSets(self.terms(), torch.initial_seed() % 2**63)

    def eval_data(self) -> ArrayData | PointSets | None:
        points = self.evaluation_points()
        return None if points is None else ArrayData(points, self.solution(points))

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        part, points = batch
        if not isinstance(part, Part):  # of the evaluation
            return model(part)
        r = part.term.residuals(model, points)
        n = len(tree_leaves(points)[0])
        if not isinstance(r, Tensor) or r.ndim == 0 or len(r) != n:
            got = f"shape {list(r.shape)}" if isinstance(r, Tensor) else f"a {type(r).__name__}"
            raise TaskError(
                f"term {part.term.name!r}: residuals are {got} for {n} points: return a tensor with a row a "
                "point, [n] or [n, m]"
            )
        return r

    def loss(self, outputs: Outputs, batch: Batch) -> Weighted:
        part = batch[0]
        if not isinstance(part, Part):
            return 0.5 * _error(outputs, batch[1]).square().sum(), float(len(part))
        term = part.term
        total = residual_loss(outputs, term.loss, term.scale) * part.scale
        return total, len(outputs) * part.share

    def metrics(self, outputs: Outputs, batch: Batch) -> Mapping[str, Tensor | Weighted]:
        if isinstance(batch[0], Part):
            return {}
        exact = batch[1]
        squared = _error(outputs, exact).square().sum()
        return {
            "l2_error": (squared, float(len(exact))),
            "relative_error": (squared, exact.square().sum()),
        }

    def summary(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Roots of the mean squares: errors in L2."""
        roots = {name: value**0.5 for name, value in means.items() if name.endswith("_error")}
        return {**means, **roots}

    def batch_name(self, batch: Batch) -> str:
        part = batch[0]
        if not isinstance(part, Part):
            return super().batch_name(batch)
        return f"term {part.term.name!r} of {type(self).__name__}"

    def example_inputs(self, batch: Batch) -> Any:
        points = batch[1] if isinstance(batch[0], Part) else batch[0]
        return points if isinstance(points, Tensor) else tree_leaves(points)[0]

    def draw(self, model: nn.Module, folder: Path) -> list[Path]:
        """Pictures of the solution and its error, where the points lie in a plane and the solution is
        known."""
        from hfdist.tasks.solution_plot import draw_solution

        points = self.evaluation_points()
        if points is None or points.ndim != 2 or points.shape[1] != 2:
            return []
        return [draw_solution(model, points, self.solution(points), folder / "solution.png")]


def _error(outputs: Tensor, exact: Tensor) -> Tensor:
    if outputs.numel() != exact.numel():
        raise TaskError(
            f"solution() returns shape {list(exact.shape)} where the model gives {list(outputs.shape)}"
        )
    return outputs.reshape(exact.shape) - exact
