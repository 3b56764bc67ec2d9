"""What a step needs to know of the objective, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from hfdist.optim.least_squares import LeastSquares
from hfdist.optim.secants import Secants

T = TypeVar("T")

Operator = Callable[[Tensor], Tensor]
"""A symmetric matrix, seen through its product: v -> Av, of parts [n]. The result may be reused by the
operator's next call: copy it to keep it."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Work of a step's parts in gradients of its gradient batch: matrix products of a layer are 3 in a
    gradient, 4 in a Gauss-Newton product on kept activations, 6 in a Hessian product, 1 in a loss; times the
    part's share of the examples. Counted, not measured, so that what follows from it is the same in every
    run and on every rank.

    Of residuals, m an example: a row of the Jacobian is a backward pass that sums no weights' derivatives
    up, 2 products of a layer, so all rows take 2m/3 of a gradient; a product with rows that are known, Jv or
    J'w, multiplies each of their numbers once, as a layer does with its weights: m/3 (less where a weight is
    used several times, as in recurrent nets). Matrices of rows and their factors are no passes, and what is
    done once to learn how rows are computed, or to check them, is not counted."""

    gradient: float = 1.0
    """The gradient, and forward passes of the curvature's own examples; 0 where rows make it."""
    product: float = 4 / 3
    loss: float = 1 / 3
    curvature_share: float = 1.0
    """Of the gradient's examples, that the products are of."""
    metric: float = 0.0
    """Statistics of the preconditioner that this step took."""
    rows: float = 0.0
    """Rows of the Jacobian, their products and evaluations of residuals that this step took."""

    def step(self, products: int, losses: int) -> float:
        """A step of so many products and losses."""
        return (
            self.gradient + self.metric + self.rows + products * self.product + losses * self.loss
        )


class Objective(Protocol):
    """One step's frozen objective f around theta: the same batches and randomness in every call.

    All values are global (over ranks and microbatches) and contain the L2 term. Vectors are this
    rank's parts [n] of vectors [P]: all of them, or a shard (then n = P / W). What a step computes
    from parts it adds up by `total`.
    """

    @property
    def numel(self) -> int:
        """P."""
        ...

    def total(self, scalars: Tensor) -> Tensor:
        """Sums over ranks of dot products of parts; the identity where every rank has all of them."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether `total` costs a reduction, so that dot products are to be packed into few."""
        ...

    @property
    def signal(self) -> Tensor | None:
        """A scalar that the operator's last product carried along: how many ranks ask to abandon the
        step. `hf_step` hands it to `on_cg_iteration`."""
        ...

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """f(theta) and its gradient [P], on the gradient batch."""
        ...

    def curvature(self, damping: float = 0.0, exact: bool = False) -> Operator:
        """A = B + damping * (diag(damping_scale) + mu S), B the curvature matrix at theta on the curvature
        batch, S that of structural damping, if there is any.

        Args:
            damping: lambda >= 0 [1, sec. 4.1].
            exact: Without the rounding that `reduction_dtype` adds.
        """
        ...

    @property
    def structural_matrix(self) -> Operator | None:
        """S of structural damping [2, sec. 8.4], once `curvature` was called."""
        ...

    @property
    def product_engine(self) -> str:
        """How products are computed, once `curvature` was called."""
        ...

    @property
    def costs(self) -> Costs:
        """Work of the step's parts, once `curvature` was called."""
        ...

    def release(self) -> None:
        """Free what `curvature` keeps: no product will be asked for any more."""
        ...

    def preconditioner(self, damping: float | None) -> Operator | None:
        """Product with an approximation of (B + damping * I)^-1, if there is one.

        With None, with the inverse of the metric C of a Krylov space: an approximation of B that is made
        positive definite relative to itself, so that a factor on the loss is one on C, and other units of
        a layer's weights are other units of C.
        """
        ...

    @property
    def see(self) -> Callable[[Tensor, Tensor, Tensor], None] | None:
        """Is told of u, Bu and Cu [n] of every direction of a Krylov space in the metric C, for the next
        metric, once `preconditioner` was called; None: nobody is. Vectors must not be kept."""
        ...

    @property
    def secants(self) -> Secants | None:
        """What earlier steps showed of the curvature, for steps without products; None: nobody keeps it."""
        ...

    @property
    def damping_scale(self) -> Tensor | None:
        """Diagonal [P] of the damping metric (parameter groups); None is the identity."""
        ...

    @property
    def least_squares(self) -> LeastSquares | None:
        """Its residuals, where it is a sum of squares."""
        ...

    def start_loss(self) -> float:
        """f(theta) on the line-search batch; known without evaluation where that is the gradient's."""
        ...

    def losses(self, steps: Iterable[tuple[float, Tensor]]) -> list[float]:
        """f(theta + alpha * delta) on the line-search batch for every (alpha, delta [n]).

        theta is unchanged afterwards, bit for bit, also when an evaluation raises.
        """
        ...

    def move(self, alpha: float, delta: Tensor) -> None:
        """theta += alpha * delta, for good."""
        ...

    def agree(self, decision: T) -> T:
        """Rank 0's decision, on every rank."""
        ...
