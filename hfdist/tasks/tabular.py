"""Regression of a table: Levenberg-Marquardt on scikit-learn's packaged data, nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.residuals import ResidualTask, Term

_TABLES = ("diabetes", "linnerud")


class Tabular(ResidualTask):
    """Columns predicted from columns: diabetes (442 patients, 10 columns, one target) or linnerud (20
    athletes, 3 columns, 3 targets), both standardised.

    Args:
        table: diabetes or linnerud.
        hidden: Width of the hidden layer.
        loss, scale: Of a residual, see `hfdist.tasks.robust`.
        held_out: Part of the rows that is kept for evaluation.
        ridge: Weight of |W|^2 / 2 of the layers' matrices, as residuals of their own.
    """

    def __init__(
        self,
        table: str = "diabetes",
        hidden: int = 16,
        loss: str = "squares",
        scale: float = 1.0,
        held_out: float = 0.25,
        ridge: float = 1e-2,
    ) -> None:
        if table not in _TABLES:
            raise TaskError(f"task_args.table is {table!r}: it must be {' or '.join(_TABLES)}")
        if hidden < 1 or not 0.0 <= held_out < 1.0 or ridge < 0.0:
            raise TaskError(
                f"task_args: hidden is {hidden}, held_out {held_out}, ridge {ridge}: hidden must be at least "
                "1, held_out at least 0 and below 1, ridge at least 0"
            )
        self._hidden, self._loss, self._scale, self._ridge = hidden, loss, scale, ridge
        x, y = _table(table)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
        n = len(x) - round(held_out * len(x))
        self._train, self._held_out = order[:n], order[n:]
        self._x = (x - x[self._train].mean(0)) / x[self._train].std(0)
        self._y = (y - y[self._train].mean(0)) / y[self._train].std(0)

    def model(self) -> nn.Module:
        inputs, outputs = self._x.shape[1], self._y.shape[1]
        return nn.Sequential(
            nn.Linear(inputs, self._hidden), nn.Tanh(), nn.Linear(self._hidden, outputs)
        )

    def terms(self) -> list[Term]:
        data = Term(
            name="data",
            points=(self._x[self._train], self._y[self._train]),
            residuals=lambda model, points: model(points[0]) - points[1],
            loss=self._loss,
            scale=self._scale,
        )
        if self._ridge == 0.0:
            return [data]
        ridge = Term(
            name="ridge",
            points=torch.zeros(1),
            residuals=lambda model, points: torch.cat(
                [p.reshape(-1) for p in model.parameters() if p.ndim == 2]
            ).unsqueeze(0),
            weight=self._ridge,
        )
        return [data, ridge]

    def eval_data(self) -> ArrayData | None:
        if not len(self._held_out):
            return None
        return ArrayData(self._x[self._held_out], self._y[self._held_out])


def _table(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.from_numpy(x).double(), torch.from_numpy(y).double().reshape(len(x), -1)
