"""The residuals of an objective and their Jacobian, summed over microbatches and ranks.

Of a microbatch with outputs z, loss sum L(z) and diagonal loss Hessian d: rows sqrt(d / weight) dz/dtheta and
residuals dL/dz / sqrt(d weight), weight that of the objective. So J'J is the Gauss-Newton matrix that
products are of, and J'r the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from hfdist.comm import Communicator
from hfdist.curvature.jacobian_rows import RowMethod, UseWatch, jacobian_rows, of_products
from hfdist.curvature.kronecker.recurrent import StepByStep
from hfdist.curvature.loss_hessian import LossHessian
from hfdist.curvature.memory import memory_left
from hfdist.curvature.microbatch import Evaluation, Microbatch
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.reverse import grad
from hfdist.curvature.symmetric import add_upper, mirror, product_of_parts
from hfdist.errors import ConfigError, TaskError

Evaluate = Callable[[Microbatch, UseWatch | None], Evaluation]
_AGREES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative difference of J'r and the gradient that is rounding."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A microbatch's part of the system."""

    microbatch: Microbatch
    z: Tensor
    """Outputs [rows]."""
    root: Tensor
    """sqrt(d) [rows], of the loss sum."""
    r: Tensor
    """dL/dz / sqrt(d) [rows]."""
    J: Tensor | None
    """sqrt(d) dz/dtheta [rows, P]; None where it is computed anew for every use."""
    work: float
    """Of the forward pass, the rows and the gradient: in gradients of an example."""
    work_of_product: float
    """Of J with a vector."""


class ResidualSystem:
    """A `hfdist.optim.least_squares.LeastSquares` of this rank's microbatches and those of its peers.

    Args:
        evaluate: A forward pass with graph, split from its loss.
        params, comm: The parameters and the ranks.
        method: How rows are computed; kept over the steps of a run.
        memory_budget: Bytes for this rank's rows and for matrices; None: what the device has left.
        weight_decay: Of the L2 term.
        at: Inside, the parameters have other values.

    Attributes:
        work: What its methods have taken so far, in gradients of all its examples (see
            `hfdist.optim.objective.Costs`); once `close` was called.

    Raises:
        ConfigError: (from its methods) A matrix does not fit into the memory.
        TaskError: A residual is not finite, or rows and gradient disagree.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        params: ParameterVector,
        comm: Communicator,
        method: RowMethod,
        *,
        memory_budget: int | None,
        weight_decay: float | Tensor,
        at: Callable[[Tensor], AbstractContextManager[None]],
        warn: Callable[[str], None],
    ) -> None:
        self._evaluate, self._params, self._comm, self._method = evaluate, params, comm, method
        self._budget = memory_left(params.device, comm.world_size)
        if memory_budget is not None:
            self._budget = memory_budget
        self.weight_decay, self._at, self._warn = weight_decay, at, warn
        self._parts: list[Rows] = []
        self._gradient = params.zeros()  # of this rank's parts
        self._kept = 0  # bytes
        self._weight: float | None = None
        self._counts: list[int] = []
        self.work = 0.0
        self._work_of_product = self._work_of_recomputation = 0.0

    # -- building --------------------------------------------------------------------------------

    def add(self, microbatch: Microbatch) -> tuple[Evaluation, list[Tensor]]:
        """Evaluate a microbatch and note its rows.

        Returns:
            The evaluation and the gradient of its loss sum.
        """
        e, part, gradient = self._rows(microbatch)
        self._gradient += gradient
        if part.J is not None and self._kept + part.J.nbytes <= self._budget:
            self._kept += part.J.nbytes
        else:
            part = dataclasses.replace(part, J=None)
        self._parts.append(part)
        return e, list(self._params.views(gradient))

    def close(self, weight: float) -> None:
        """All microbatches are added, and the objective divides by `weight`. Collective."""
        self._weight = weight
        W, parts = self._comm.world_size, self._parts
        sums = torch.zeros(W + 4, dtype=torch.float64, device=self._params.device)
        sums[self._comm.rank] = sum(len(part.z) for part in parts)
        sums[W] = sum(part.microbatch.num_examples for part in parts)
        sums[W + 1] = sum(part.work for part in parts)
        sums[W + 2] = sum(part.work for part in parts if part.J is None)
        sums[W + 3] = sum(part.work_of_product for part in parts)
        *counts, examples, work, recomputation, product = self._comm.all_reduce(sums).tolist()
        self._counts = [int(count) for count in counts]
        self.work = work / examples
        self._work_of_recomputation = recomputation / examples
        self._work_of_product = product / examples

    def _rows(self, microbatch: Microbatch) -> tuple[Evaluation, Rows, Tensor]:
        tensors = self._params.tensors
        watch = UseWatch(tensors, microbatch.num_examples)
        with StepByStep():  # in one operation no example's rows are to be seen
            e = self._evaluate(microbatch, watch)
        if len(e.outputs) != 1:
            raise TaskError(f"{microbatch.name}: residuals must be one tensor with a graph")
        z, leaf = e.outputs[0], e.loss_inputs[0]
        bad = int((~torch.isfinite(z.detach())).sum())
        if bad:
            raise TaskError(
                f"{microbatch.name}: {bad} of {z.numel()} residuals are NaN or infinite: look for a division "
                "by zero, a root or a logarithm at the edge of its domain, or points outside of the domain"
            )
        H: LossHessian | None = e.closed_form()
        is_checked = self._method.is_to_be_checked(microbatch.name)
        others = tensors if is_checked else []  # what else the loss may be a function of
        dz, *of_others = grad(e.loss_sum, [leaf, *others], retain_graph=True, allow_unused=True)
        is_plain = dz is not None and all(g is None for g in of_others)
        if H is None or not is_plain or (is_checked and not is_diagonal(H, z)):
            raise TaskError(
                f"{microbatch.name} is no sum of squares of what each output misses its target by: take "
                "mse_loss, or let Task.sum_of_squares be False"
            )
        d = H([torch.ones_like(z)])[0]
        root = d.detach().reshape(-1).clamp(min=0.0).sqrt()
        size = z.numel() * self._params.numel * z.element_size()
        if size > self._budget:
            raise ConfigError(
                f"{microbatch.name}: {z.numel()} residuals of {self._params.numel} parameters take "
                f"{_gib(size)} GiB, and {_gib(self._budget)} are free: give the term a smaller microbatch, "
                "or take optim.solver=krylov, which needs no rows"
            )
        assert dz is not None
        dz = dz.detach().reshape(-1)
        r = torch.where(root > 0, dz / root.clamp_min(1e-300), 0.0)
        uses = watch.finish()
        J = jacobian_rows(z, uses, tensors, self._method, root)
        if is_checked:
            J = self._checked(microbatch, z, root, r, J)
        # Not the gradient of the check: a step's bits do not depend on which steps this process checks.
        gradient = J.T @ r
        # Forward pass, rows, J'r; one after the other, each row is a pass over all examples.
        n = microbatch.num_examples
        of_rows = len(J) * (1 if self._method.sees_examples(z) else n)
        product = of_products(uses, len(J), self._params.numel, n) / 3
        part = Rows(
            microbatch=microbatch,
            z=z.detach().reshape(-1),
            root=root,
            r=r,
            J=J,
            work=n / 3 + 2 / 3 * of_rows + product,
            work_of_product=product,
        )
        return e, part, gradient

    def _checked(
        self, microbatch: Microbatch, z: Tensor, root: Tensor, r: Tensor, J: Tensor
    ) -> Tensor:
        """Rows of which J'r agrees with a backward pass for the gradient.

        Raises:
            TaskError: None do.
        """
        method, tensors = self._method, self._params.tensors
        back = grad(z, tensors, (root * r).view_as(z), retain_graph=True, allow_unused=True)
        gradient = self._params.flatten(back)

        if method.per_example and not agrees(J, r, gradient):
            method.per_example = False
            method.reason = "their gradients do not add up to the gradient"
            J = jacobian_rows(z, None, tensors, method, root)
        if method.reason is not None:
            self._warn(
                "rows of the Jacobian are computed one after the other, because examples interact or their "
                f"rows cannot be told apart: {method.reason}"
            )
        if not agrees(J, r, gradient):
            raise TaskError(
                f"{microbatch.name}: the rows of the Jacobian do not add up to the gradient: take "
                "optim.solver=krylov, and look for a custom autograd.Function with a wrong backward()"
            )
        return J

    # -- what solvers ask ------------------------------------------------------------------------

    @property
    def num_residuals(self) -> int:
        return sum(self._counts)

    @property
    def _scale(self) -> float:
        assert self._weight is not None
        return float(self._weight**-0.5)

    def _chunks(self, products: int) -> Iterator[tuple[Rows, Tensor]]:
        """This rank's rows, part by part, for so many products of all of them with a vector."""
        self.work += self._work_of_recomputation + products * self._work_of_product
        for part in self._parts:
            J = part.J
            if J is None:
                J = self._rows(part.microbatch)[1].J
            assert J is not None
            yield part, J

    def _gathered(self, pieces: Sequence[Tensor], columns: Sequence[int] = ()) -> Tensor:
        """[N, *columns] of all ranks, of this rank's pieces."""
        whole = torch.zeros(
            self.num_residuals, *columns, dtype=self._params.dtype, device=self._params.device
        )
        start = sum(self._counts[: self._comm.rank])
        for piece in pieces:
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return self._comm.all_reduce(whole).mul_(self._scale)

    def _own(self, w: Tensor) -> Iterator[Tensor]:
        """This rank's pieces of a vector [N], or of [N, k]."""
        start = sum(self._counts[: self._comm.rank])
        for part in self._parts:
            yield w[start : start + len(part.z)]
            start += len(part.z)

    def residuals(self) -> Tensor:
        return self._gathered([part.r for part in self._parts])

    def gradient(self) -> Tensor:
        return self._comm.all_reduce(self._gradient.clone()).mul_(self._scale**2)

    def gram(self) -> Tensor:
        P = self._params.numel
        self._check_matrix(P, "parameters", "sample_space or krylov")
        G = torch.zeros(P, P, dtype=self._params.dtype, device=self._params.device)
        for _, J in self._chunks(0):
            add_upper(G, J.T)
        return self._comm.all_reduce(mirror(G)).mul_(self._scale**2)

    def kernel(self) -> Tensor:
        """By columns: each rank gets all rows for its part of the parameters, and one sum makes the
        matrix."""
        N, W = self.num_residuals, self._comm.world_size
        self._check_matrix(N, "residuals", "dense or krylov, or give optim.sample_rank")
        if W == 1:
            return product_of_parts([J for _, J in self._chunks(0)]).mul_(self._scale**2)
        n = self._comm.shard_size(self._params.numel)
        rows = torch.zeros(W, N, n, dtype=self._params.dtype, device=self._params.device)
        start = sum(self._counts[: self._comm.rank])
        for _, J in self._chunks(0):
            padded = torch.nn.functional.pad(J, (0, W * n - J.shape[1]))
            rows[:, start : start + len(J)] = padded.view(len(J), W, n).transpose(0, 1)
            start += len(J)
        own = self._comm.reduce_scatter(rows.view(-1)).view(N, n)
        K = mirror(add_upper(own.new_zeros(N, N), own))
        return self._comm.all_reduce(K).mul_(self._scale**2)

    def kernel_times(self, w: Tensor) -> Tensor:
        """Two passes over the rows, whatever the number of columns: rows that were not kept are computed
        once for each."""
        columns = w.shape[1:]
        number = columns[0] if columns else 1
        if columns:
            self._check_sketch(len(w), number)
        JTw = torch.zeros(self._params.numel, *columns, dtype=w.dtype, device=w.device)
        for (_, J), piece in zip(self._chunks(number), self._own(w)):
            JTw += J.T @ piece
        self._comm.all_reduce(JTw).mul_(self._scale)
        return self._gathered([J @ JTw for _, J in self._chunks(number)], columns)

    def times(self, v: Tensor) -> Tensor:
        return self._gathered([J @ v for _, J in self._chunks(1)])

    def transposed_times(self, w: Tensor) -> Tensor:
        out = self._params.zeros()
        for (_, J), piece in zip(self._chunks(1), self._own(w)):
            out.addmv_(J.T, piece)
        return self._comm.all_reduce(out).mul_(self._scale)

    def remainder(self, v: Tensor, Jv: Tensor | None = None) -> Tensor:
        with self._at(self._params.read().add_(v)):
            moved = [self._evaluate(part.microbatch, None).outputs for part in self._parts]
        self.work += 1 / 3
        changes = [
            part.root * (outputs[0].detach().reshape(-1) - part.z)
            for part, outputs in zip(self._parts, moved)
        ]
        if Jv is not None:
            return self._gathered(changes).sub_(Jv)
        return self._gathered(
            [change.sub_(J @ v) for change, (_, J) in zip(changes, self._chunks(1))]
        )

    def _check_matrix(self, n: int, what: str, others: str) -> None:
        size = 3 * n * n * self._params.dtype.itemsize  # with a factor and a copy
        if size > self._budget:
            raise ConfigError(
                f"a matrix of {n} x {n} {what} takes {_gib(size)} GiB with its factor, and "
                f"{_gib(self._budget)} are free: take optim.solver={others}"
            )

    def _check_sketch(self, n: int, rank: int) -> None:
        # The random vectors, the products, their factor and its basis [n, rank]; J' of the vectors.
        size = rank * (4 * n + self._params.numel) * self._params.dtype.itemsize
        if size > self._budget:
            raise ConfigError(
                f"a sketch of rank {rank} of {n} residuals takes {_gib(size)} GiB, and {_gib(self._budget)} "
                f"are free: lower optim.sample_rank (below {rank}), or take optim.solver=krylov"
            )


def agrees(J: Tensor, r: Tensor, gradient: Tensor) -> bool:
    """Whether J'r is the gradient, but for rounding."""
    sizes = J.abs().T @ r.abs()  # what rounding is measured by
    allowed = _AGREES.get(J.dtype, 1e-2) * float(sizes.norm())
    return float((J.T @ r - gradient).norm()) <= allowed


def is_diagonal(H: LossHessian, z: Tensor) -> bool:
    """Whether each output has a curvature of its own, told by a vector of random numbers."""
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(z.shape, generator=generator, dtype=z.dtype).add_(0.5).to(z.device)
    expected = H([torch.ones_like(z)])[0] * v
    difference = (H([v])[0] - expected).abs().max()
    return float(difference) <= 1e-4 * float(expected.abs().max())


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
