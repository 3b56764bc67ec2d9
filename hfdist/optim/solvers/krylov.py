"""A short Krylov space in the metric of a preconditioner; damping is chosen after the solve.

The Krylov space of C^-1 B and C^-1 g is that of B + lambda C for every lambda. So it is built once, by
Lanczos' process in the inner product of the metric C, and the subproblem in it is solved afterwards for many
lambda on its projection (see `subproblems`). The step's candidates are these solutions; their true losses
decide, and lambda follows. The last step joins as one more basis vector, as in Krylov subspace descent
(Vinyals & Povey 2012).

With structural damping the space is the same, and in it the damping's matrix C + mu S takes the place of C,
for every candidate's own lambda: S is projected, too, and scaled so that with mu = 1 it damps the
preconditioned gradient as much as C.

lambda is dimensionless: it counts in units of the curvature along the preconditioned gradient, u'Bu / u'Cu
for u = C^-1 g. Scaling the loss or (in a metric that follows it) a layer's weights changes no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hfdist.optim.objective import Costs, Operator
from hfdist.optim.option_group import OptionGroup
from hfdist.optim.report import Stop
from hfdist.optim.solvers import secant
from hfdist.optim.solvers.basis import Basis, Window
from hfdist.optim.solvers.short_recurrence import Shifts, positive
from hfdist.optim.solvers.solution import Candidate, Solution, System
from hfdist.optim.solvers.subproblems import (
    SUBPROBLEMS,
    Matrix,
    Projected,
    Small,
    Subproblem,
    Vector,
)


@dataclass(frozen=True, kw_only=True)
class KrylovOptions(OptionGroup):
    """A Krylov space, and what is solved in it."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "krylov_max_dim": (1, 1000),
        "krylov_min_dim": (1, 1000),
        "krylov_tol": (0.0, 1.0),
        "secant_pairs": (0, 1000),
    }

    krylov_subproblem: Literal["damping", "trust_region", "cubic", "minres"] = "damping"
    """What is solved in the space for each candidate: a shift, a trust region, cubic regularisation, or the
    least residual."""
    krylov_max_dim: int = 50
    """Most products a space is built from."""
    krylov_min_dim: int = 2
    """Fewest, unless the space is exhausted."""
    krylov_length: Literal["progress", "full"] = "progress"
    """Stop when a product buys less of the model's decrease than the step's work so far did on average, in
    counted work, so that a resumed run takes the same steps; or build the whole space."""
    krylov_tol: float = 1e-8
    """The space is exhausted when a new direction is this small beside the product it comes from."""
    krylov_momentum: bool = True
    """The last step joins the space, at the price of a product."""
    secant_pairs: int = 10
    """Where the loss is the same in every step (whole batches): take steps without products, from the changes
    of the gradient over so many of the last steps (L-BFGS in the metric), as long as they gain enough for
    their work beside solves. 2 vectors each, kept where `krylov_basis` is full and there is no structural
    damping; 0: solves alone."""
    krylov_basis: Literal["full", "bfloat16", "host", "none"] = "full"
    """How the basis (2 vectors a dimension) is kept: as it is, rounded to bfloat16, in the host's memory; or
    not at all: then the steps of five lambda, fourfold apart, are updated along a short recurrence, and
    `krylov_subproblem` must be `damping`."""

    def check(self) -> None:
        if self.krylov_min_dim > self.krylov_max_dim:
            raise ValueError(
                f"krylov_min_dim is {self.krylov_min_dim}: it must not be above krylov_max_dim "
                f"({self.krylov_max_dim})"
            )
        if self.krylov_basis == "none" and self.krylov_subproblem != "damping":
            raise ValueError(
                f"krylov_basis is none: without a basis only krylov_subproblem=damping can be solved, not "
                f"{self.krylov_subproblem}"
            )


FACTOR = 4.0
"""Between the lambdas of neighbouring candidates."""
RUNGS = 16
"""Candidates on each side of the step's lambda, at most."""
WORTH = 1.5
"""A product must buy this much more of the decrease than the step so far did on average: the next step, with
a new gradient and the last step beside it, buys more than the average."""
NOTHING = 1e-6
"""Part of the last step's curvature outside the space under which it has nothing outside."""
SHIFT_RUNGS = 2
"""Candidates on each side of the step's lambda where there is no basis: each takes up to three vectors."""
TINY = float(np.finfo(np.float64).tiny)
SAME = 1e-2
"""Candidates whose steps differ by less, in the metric and relative to their length, are one."""


def takes_secants(options: Any) -> bool:
    """Whether steps are kept for steps without products: not where memory is short, nor where a solve has
    damping that the gradient's changes do not show."""
    return bool(
        options.secant_pairs and options.krylov_basis == "full" and not options.structural_damping
    )


def solve(system: System, options: Any) -> Solution:
    """Candidates of several lambda from one Krylov space.

    Args:
        system: Its start is the last step; `preconditioner(None)` gives C^-1, and None stands for C = I.
        options: The `krylov_*` keys, and mu of structural damping.
    """
    secants = system.secants if takes_secants(options) else None
    if secants is not None:
        secants.begin(system.b, system.start, system.loss, options.secant_pairs, system.space)
        if secants.leads:
            return secant.solve(system)
    shifts = None
    if options.krylov_basis == "none":
        shifts = Shifts(system, [FACTOR**rung for rung in range(-SHIFT_RUNGS, SHIFT_RUNGS + 1)])
    space = build(system, options, shifts)
    projected, basis = space.projected()
    unit = space.unit
    shift = system.damping * unit
    if shifts is None:
        ladder = _ladder(projected, shift, SUBPROBLEMS[options.krylov_subproblem], RUNGS)
    else:
        ladder = _ladder(projected, shift, positive, SHIFT_RUNGS)

    def step(index: int) -> Tensor:
        y = ladder[index].y
        if shifts is None:
            return space.step(y, basis)
        return shifts.step(ladder[index].shift, y @ basis)

    candidates = []
    for small in ladder:
        undamped = projected.model(small.y)
        damping_term = 0.5 * small.shift * float(small.y @ small.y)
        candidates.append(
            Candidate(
                iteration=space.dim,
                model=undamped + damping_term,
                damping=small.shift / unit,
                undamped_model=undamped,
            )
        )
    return Solution(
        candidates=candidates,
        step=step,
        is_path=False,
        centre=_nearest([candidate.damping for candidate in candidates], system.damping),
        next_start=None,
        starts_from_step=options.krylov_momentum or secants is not None,
        quadratic=space.quadratic,
        iterations=space.dim,
        stop=space.stop,
        residual=space.residual,
        num_products=space.num_products,
        num_bytes=space.num_bytes + (0 if shifts is None else shifts.num_bytes),
        start_curvature=None if space.last is None else space.last.curvature,
        secants=secants,
    )


def _ladder(projected: Projected, shift: float, rule: Subproblem, most: int) -> list[Small]:
    """Steps by falling lambda, FACTOR apart, at most so many on each side, without those that hardly differ
    from their neighbour: so lambda ends where it ceases to matter. The step of lambda itself is always among
    them, or a twin of it."""
    if not projected.b.size:
        return [Small(projected.b, 0.0)]
    found: list[Small] = []
    rungs = range(most, -most - 1, -1) if shift > 0.0 else (0,)
    for rung in rungs:
        small = rule(projected, shift, FACTOR**rung)
        if not np.isfinite(small.y).all():
            continue
        if found and _far(small.y, found[-1].y) <= SAME:
            break
        found.append(small)
    return found or [Small(np.zeros_like(projected.b), shift)]


def _far(y: Vector, other: Vector) -> float:
    return float(np.linalg.norm(y - other) / max(float(np.linalg.norm(y)), 1e-300))


def _nearest(dampings: Sequence[float], damping: float) -> int:
    """Place of the lambda that is nearest, by its logarithm."""

    def distance(k: int) -> float:
        return abs(math.log(max(dampings[k], 1e-300)) - math.log(max(damping, 1e-300)))

    return min(range(len(dampings)), key=distance)


# -- the space ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LastStep:
    """The last step d, which joins the space."""

    d: Tensor
    Bd: Tensor
    curvature: float
    """d'Bd."""
    slope: float
    """-g'd."""
    Sd: Tensor | None = None
    """With structural damping."""
    structural: float = 0.0
    """d'Sd."""


@dataclass(kw_only=True)
class KrylovSpace:
    """U [m, n] and the step's model in it; U is orthonormal in the metric, V = C U."""

    U: Basis
    V: Basis
    last: LastStep | None = None
    T: list[list[float]] = field(default_factory=list)
    """Column j: u_i'B u_j for i <= j."""
    to_last: list[tuple[float, float]] = field(default_factory=list)
    """u_j'Bd and u_j'Cd."""
    mu: float = 0.0
    """Structural damping's part."""
    structural: list[list[float]] = field(default_factory=list)
    """Column j: u_i'S u_j for i <= j, and then u_j'Sd."""
    b: list[float] = field(default_factory=list)
    """U'(-g)."""
    quadratic: list[float] = field(default_factory=list)
    """The damped model after 0, 1, .. vectors."""
    stop: Stop = Stop.MAX_ITERATIONS
    beta: float = 0.0
    """What the last product has outside the space."""
    residual: float = 1.0
    """|b - (B + lambda C) x| / |b| in the metric's inverse, at the step's lambda."""
    num_products: int = 0

    @property
    def dim(self) -> int:
        """Without the last step."""
        return len(self.T)

    @property
    def num_bytes(self) -> int:
        """On the vectors' device."""
        return self.U.num_bytes + self.V.num_bytes

    @property
    def unit(self) -> float:
        """Curvature along the preconditioned gradient: lambda counts in it."""
        size = abs(self.T[0][0]) if self.T else 1.0
        return size if size > 0.0 else 1.0

    def projected(self) -> tuple[Projected, Matrix]:
        """The model in an orthonormal basis, and that basis: coordinates of each of its vectors [m, k + 1] in
        u_1 .. u_k and d.

        d less what U has of it completes U. Its size in the metric is not known (that would be a product
        with C); it is given the one that makes its curvature the unit of lambda.
        """
        projected, basis = self._projected()
        if not self.mu or not self.dim:
            return projected, basis
        # Coordinates w = R y with R'R = 1 + mu S, in which that is the metric.
        S = basis @ self._structural_matrix() @ basis.T
        R = np.linalg.cholesky(np.eye(len(S)) + self.mu / max(S[0, 0], TINY) * S).T
        inverse = np.linalg.inv(R)
        T, b = inverse.T @ projected.T @ inverse, inverse.T @ projected.b
        return Projected(T=0.5 * (T + T.T), b=b), inverse.T @ basis

    def _structural_matrix(self) -> Matrix:
        """S between u_1 .. u_k and d [k + 1, k + 1]."""
        k = self.dim
        S = np.zeros((k + 1, k + 1))
        for j, column in enumerate(self.structural):
            S[: j + 1, j] = S[j, : j + 1] = column[: j + 1]
            S[j, k] = S[k, j] = column[j + 1]
        S[k, k] = 0.0 if self.last is None else self.last.structural
        return S

    def _projected(self) -> tuple[Projected, Matrix]:
        k = self.dim
        T = np.zeros((k + 1, k + 1))
        for j, column in enumerate(self.T):
            T[: j + 1, j] = T[j, : j + 1] = column
        b = np.append(np.array(self.b), 0.0)
        last = self.last
        if last is not None:
            a, c = np.array(self.to_last).reshape(k, 2).T
            mixed, own = a - T[:k, :k] @ c, last.curvature - 2.0 * c @ a + c @ T[:k, :k] @ c
            size = math.sqrt(abs(own) / self.unit)
            # Where U has all of d, what is left is rounding.
            if size > 0.0 and abs(own) > NOTHING * abs(last.curvature):
                T[:k, k] = T[k, :k] = mixed / size
                T[k, k], b[k] = own / size**2, (last.slope - c @ b[:k]) / size
                basis = np.eye(k + 1)
                basis[k] = np.append(-c, 1.0) / size
                return Projected(T=T, b=b, beta=self.beta, last=k - 1), basis
        return Projected(T=T[:k, :k], b=b[:k], beta=self.beta, last=k - 1), np.eye(k, k + 1)

    def step(self, y: Vector, basis: Matrix) -> Tensor:
        """The vector [n] of coordinates y in the basis that `projected` gives."""
        coordinates = y @ basis
        x = self.U.combine(coordinates[:-1])
        if self.last is not None and coordinates[-1] != 0.0:
            x.add_(self.last.d, alpha=float(coordinates[-1]))
        return x


def build(system: System, options: Any, shifts: Shifts | None = None) -> KrylovSpace:
    """Lanczos' process for C^-1 B from C^-1 b in the inner product of C, with full reorthogonalisation:
    one product with B and one with C^-1 a dimension.

    With `shifts` no basis is kept: their steps are updated along, and vectors are orthogonalised to the last
    two.

    The host reads one small tensor an iteration, on devices that run beside it after the next product was
    started.
    """
    vectors, M = system.space, system.preconditioner(None)
    B = system.curvature(0.0)
    max_dim = min(options.krylov_max_dim, vectors.numel(system.b))

    def basis() -> Basis:
        if shifts is not None:
            return Window(system.b, vectors)
        return Basis(system.b, options.krylov_basis, vectors)

    S = system.structural()
    space = KrylovSpace(U=basis(), V=basis(), mu=0.0 if S is None else options.structural_damping)
    lagged = system.b.device.type != "cpu"
    y = system.b.clone()  # [n]; this rank's part, as all vectors here
    u = y if M is None else M(y)
    (squared,) = vectors.dots((u, y))
    if not math.isfinite(squared) or squared <= 0.0:
        # Nowhere to go, or a metric that is none.
        space.stop = Stop.ZERO_GRADIENT if squared == 0.0 else Stop.NON_FINITE
        return space
    norm = torch.full((), squared, dtype=torch.float64, device=y.device).sqrt()
    space.V.append(y, norm)
    kept = space.U.append(u, norm)
    if system.start is not None and options.krylov_momentum:
        _add_last_step(space, B, S, system)
    _follow(space, system.damping)
    space.b.append(math.sqrt(squared))
    exhausted = max(options.krylov_tol, 10.0 * torch.finfo(y.dtype).eps)
    see = system.see()
    last, zero = space.last, torch.zeros((), dtype=torch.float64, device=y.device)
    w = B(kept)
    space.num_products += 1
    while True:
        if see is not None:
            see(kept, w, space.V.vector(space.V.size - 1))
        # h = U'Bu: a column of T, and the coefficients of Gram and Schmidt; twice is enough.
        to_last = (zero, zero)
        if last is not None:
            to_last = torch.dot(kept, last.Bd), space.V.dot(-1, last.d)
        scalars = space.U.dots(w, *to_last, vectors.read_signal(w))
        h = scalars[: space.U.size]
        of_hidden: list[Tensor] = []
        if S is not None:
            with_Sd = zero if last is None or last.Sd is None else torch.dot(kept, last.Sd)
            of_hidden = [space.U.dots(S(kept), with_Sd)]
        y.copy_(w)
        space.V.subtract(y, h)
        space.V.subtract(y, space.U.dots(y))
        u = y if M is None else M(y)
        rest = vectors.total(torch.dot(u, y).double().reshape(1))
        norm = rest[0].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        more = space.dim + 1 < max_dim
        if more:
            space.V.append(y, norm)
            kept = space.U.append(u, norm)
            if lagged:
                w = B(kept)
                space.num_products += 1
        size = len(h)
        found = torch.cat((scalars, rest, *of_hidden)).tolist()
        column, hidden = found[:size], found[size + 4 :]
        with_Bd, with_Cd, signal, squared = found[size : size + 4]
        if not all(map(math.isfinite, column + hidden)):
            space.stop = Stop.NON_FINITE
            break
        if space.T:
            space.b.append(0.0)
        space.T.append(column)
        space.to_last.append((with_Bd, with_Cd))
        space.structural.append(hidden)
        if shifts is not None and space.dim > 1:
            # A vector behind: the next one has a part in its own.
            shifts.add(space, space.dim - 2, is_last=False)
        space.beta = math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else 0.0
        _follow(space, system.damping)
        if system.on_iteration is not None:
            system.on_iteration(space.dim, signal)
        may_stop = space.dim >= options.krylov_min_dim and options.krylov_length == "progress"
        if not math.isfinite(squared) or space.beta <= exhausted * math.hypot(*column, space.beta):
            space.stop = Stop.RESIDUAL
        elif not more:
            space.stop = Stop.MAX_ITERATIONS
        elif may_stop and not _is_worth_it(space, system.costs()):
            space.stop = Stop.PROGRESS
        else:
            if not lagged:
                w = B(kept)
                space.num_products += 1
            continue
        break
    if shifts is not None and space.dim:
        shifts.add(space, space.dim - 1, is_last=True)
    space.b = space.b[: space.dim]
    space.U.size = space.V.size = space.dim
    return space


def _add_last_step(space: KrylovSpace, B: Operator, S: Operator | None, system: System) -> None:
    """The last step's own product."""
    d = system.start
    assert d is not None
    Bd = B(d).clone()
    space.num_products += 1
    curvature, slope = system.space.dots((d, Bd), (d, system.b))
    Sd = None if S is None else S(d).clone()
    structural = 0.0 if Sd is None else system.space.dots((d, Sd))[0]
    if all(map(math.isfinite, (curvature, slope, structural))) and curvature != 0.0:
        space.last = LastStep(
            d=d, Bd=Bd, curvature=curvature, slope=slope, Sd=Sd, structural=structural
        )


def _follow(space: KrylovSpace, damping: float) -> None:
    """The damped model's least value in the space so far, and the residual there."""
    projected, basis = space.projected()
    if not projected.b.size:
        space.quadratic.append(0.0)
        return
    small = SUBPROBLEMS["damping"](projected, damping * space.unit, 1.0)
    space.quadratic.append(projected.model(small.y) + 0.5 * small.shift * float(small.y @ small.y))
    if space.dim:
        along = small.y if not space.mu else small.y @ basis
        space.residual = space.beta * abs(float(along[space.dim - 1])) / space.b[0]


def _is_worth_it(space: KrylovSpace, costs: Costs) -> bool:
    """Whether the last two products bought at least the step's average decrease for its work: where they did
    not, the work is better spent on the next step (marginal value theorem, Charnov 1976)."""
    quadratic, k = space.quadratic, space.dim
    average = -quadratic[-1] / costs.step(k + (space.last is not None), losses=3)
    recent = min(2, k)
    return (quadratic[-1 - recent] - quadratic[-1]) / (recent * costs.product) >= WORTH * average
