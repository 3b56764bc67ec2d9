"""Preconditioned conjugate gradients for the step's linear system, [2] algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hfdist.optim.objective import Operator
from hfdist.optim.option_group import OptionGroup
from hfdist.optim.report import Stop
from hfdist.optim.solvers.solution import Candidate, Solution, System
from hfdist.optim.space import WHOLE, Space


@dataclass(frozen=True, kw_only=True)
class CGOptions(OptionGroup):
    """Conjugate gradients."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "cg_max_iter": (1, math.inf),
        "cg_decay_x0": (0.0, 1.0),
        "cg_decay_x0_steps": (1, math.inf),
        "cg_stop_eps": (0.0, math.inf),
        "cg_stop_window": (1, math.inf),
        "cg_tol": (0.0, math.inf),
        "cg_atol": (0.0, math.inf),
        "cg_residual_replacement": (1, math.inf),
    }

    cg_max_iter: int | None = 250
    """Most CG iterations a step [2, sec. 8.7]; null: the number of parameters."""
    cg_decay_x0: float = 0.95
    """CG starts from this times the last step's CG solution [2, sec. 10]; 0 starts from zero."""
    cg_decay_x0_max: float | None = None
    """If given, the decay rises linearly to this value [9, A.6] ..."""
    cg_decay_x0_steps: int = 1000
    """... over this many steps."""
    reset_warm_start: bool = True
    """Start CG from zero after a rejected step."""
    cg_stop: Literal["martens", "relative_progress", "residual"] = "martens"
    """Stopping rule: per-iteration progress [1, sec. 4.4], PyTorchHessianFree's variant of it, or the
    residual alone."""
    cg_stop_eps: float = 5e-4
    """Progress of the quadratic under which CG stops."""
    cg_stop_window: int = 10
    """Progress is measured over max(this, i/10) iterations [1, sec. 4.4]."""
    cg_tol: float = 1e-5
    """CG stops once |r| <= max(cg_tol |b|, cg_atol)."""
    cg_atol: float = 0.0
    """See cg_tol."""
    cg_residual_replacement: int | None = None
    """Compute the residual anew, as Ax - b, every so many iterations, at the price of a product: rounding
    (of `reduction_dtype`, or of long solves in float32) no longer piles up in it."""
    nonpositive_curvature: Literal["stop", "use", "absolute", "ignore"] = "stop"
    """When p'Ap <= 0: keep the iterate so far; move along p (a descent direction) and stop; go on with
    |p'Ap| (saddle-free); or go on as if nothing happened (PyTorchHessianFree)."""
    cg_grid_gamma: float = 1.3
    """Iterates ceil(gamma^j) - 1 are kept for backtracking [1, sec. 4.6]."""
    cg_iterates: Literal["full", "bfloat16", "host"] = "full"
    """How they are kept: as they are, rounded to bfloat16 (the step taken is the rounded one, whose loss
    was evaluated), or in the host's memory."""

    def check(self) -> None:
        if not self.cg_grid_gamma > 1.0:
            raise ValueError(f"cg_grid_gamma is {self.cg_grid_gamma}: it must be greater than 1")
        if self.cg_decay_x0_max is not None and not self.cg_decay_x0 <= self.cg_decay_x0_max <= 1.0:
            raise ValueError(
                f"cg_decay_x0_max is {self.cg_decay_x0_max}: it must lie between cg_decay_x0 "
                f"({self.cg_decay_x0}) and 1"
            )


@dataclass(frozen=True, kw_only=True)
class CGResult:
    """Outcome of a solve of Ax = b, that is, of min phi(x) = x'Ax/2 - b'x."""

    x: Tensor
    """Last iterate [n]."""
    iterates: list[tuple[int, Tensor]]
    """(iteration, x [n] as `cg_iterates` keeps it) on the backtracking grid, in order; the last is `x`."""
    quadratic: list[float]
    """phi after 0, 1, .. iterations."""
    iterations: int
    stop: Stop
    residual: float
    """|b - Ax| / |b|."""
    num_products: int

    @property
    def num_bytes(self) -> int:
        """Memory of the solver's vectors and kept iterates on this rank's device: x, r, p, Ap and b, and
        the iterates (without x itself)."""
        kept = (x for _, x in self.iterates if x is not self.x and x.device == self.x.device)
        return 5 * self.x.nbytes + sum(x.nbytes for x in kept)

    def iterate(self, place: int) -> Tensor:
        """Kept iterate [n], in the solver's dtype and on its device."""
        return self.iterates[place][1].to(self.x)


def backtracking_grid(gamma: float) -> Callable[[int], bool]:
    """Whether iteration i is ceil(gamma^j) - 1 for some j >= 0 [1, sec. 4.6]."""

    def on_grid(i: int) -> bool:
        # The smallest j with gamma^j >= i + 1, up to rounding; its neighbours cover the rounding.
        j = round(math.log(i + 1) / math.log(gamma))
        return any(math.ceil(gamma**k) - 1 == i for k in range(max(j - 1, 0), j + 2))

    return on_grid


def made_too_little_progress(phi: list[float], options: CGOptions) -> bool:
    """The stopping rule on the quadratic's progress.

    "martens" [1, sec. 4.4]: i > k, phi_i < 0 and (phi_i - phi_{i-k}) / phi_i < k eps.
    "relative_progress" (PyTorchHessianFree): (phi_i - phi_{i-k}) / (phi_i - phi_0) < eps, no factor k.
    In both k = max(window, i/10).
    """
    i = len(phi) - 1
    k = max(options.cg_stop_window, i // 10)
    if i <= k:
        return False
    progress = phi[i] - phi[i - k]
    if options.cg_stop == "martens":
        return phi[i] < 0 and progress / phi[i] < k * options.cg_stop_eps
    if options.cg_stop == "relative_progress":
        total = phi[i] - phi[0]
        return total == 0 or progress / total < options.cg_stop_eps
    return False


def cg(
    A: Operator,
    b: Tensor,
    x0: Tensor | None,
    M: Operator | None,
    options: CGOptions,
    *,
    exact: Operator | None = None,
    keep_iterates: bool = True,
    on_iteration: Callable[[int, float], None] | None = None,
    space: Space = WHOLE,
    lagged: bool | None = None,
) -> CGResult:
    """Solve Ax = b approximately.

    Args:
        A: The damped curvature matrix.
        b: Right-hand side [n], finite.
        x0: Start [n]; None is zero, which saves a product.
        M: Approximation of the inverse of A, symmetric positive definite; None is the identity.
        options: The `cg_*` and `nonpositive_curvature` rules.
        exact: A with less rounding, for `cg_residual_replacement`; by default A itself. What it returns
            may share memory with what A returns.
        keep_iterates: Keep the iterates of the backtracking grid, not only the last.
        on_iteration: Called with the number of each finished iteration and the space's signal; what
            it raises propagates.
        space: How vectors lie over ranks; n is P, or this rank's share of it.
        lagged: Start the next product before reading this iteration's scalars, so that a device never
            waits for the host, at the price of one product too many a solve. By default on devices
            that run beside the host.

    Returns:
        The result; `x` is finite whatever A returns.

    The host reads one small packed tensor of scalars an iteration and waits for nothing else.
    """
    lagged = b.device.type != "cpu" if lagged is None else lagged
    max_iter = space.numel(b) if options.cg_max_iter is None else options.cg_max_iter
    on_grid = backtracking_grid(options.cg_grid_gamma)
    (b_squared,) = space.dots((b, b))
    b_norm = math.sqrt(b_squared)
    bound = max(options.cg_tol * b_norm, options.cg_atol)

    x = torch.zeros_like(b) if x0 is None else x0.clone()
    num_products = 0
    if b_norm == 0.0:
        x.zero_()
        return _result(x, [(0, x)], [0.0], Stop.ZERO_GRADIENT, 0.0, 0.0, num_products)

    phi = [0.0]
    rr = b_squared
    if x0 is None:
        r = b.clone()  # r = b - Ax, minus the gradient of phi
    else:
        r = b - A(x)
        num_products += 1
        rr, rx, bx = space.dots((r, r), (r, x), (b, x))
        phi = [-0.5 * (rx + bx)]
        if not math.isfinite(rr):
            # A non-finite product of a finite start: nothing about A can be trusted.
            x.zero_()
            return _result(x, [(0, x)], [0.0], Stop.NON_FINITE, 1.0, b_norm, num_products)
    r_norm = math.sqrt(rr)
    keep = _KEPT[options.cg_iterates]
    iterates = [(0, keep(x))] if keep_iterates else []
    if r_norm <= bound:
        iterates = iterates or [(0, x)]
        return _result(x, iterates, phi, Stop.EXACT_START, r_norm, b_norm, num_products)

    advance = _advance_shared if space.is_sharded else _advance
    now = _Iterate(x=x, r=r, y=r if M is None else M(r).clone())
    p = now.y.clone()
    Ap = A(p)
    num_products += 1
    replace_every = options.cg_residual_replacement or 0
    i = 0
    while True:
        i += 1
        scalars, beta = advance(now, p, Ap, M, options.nonpositive_curvature, space)
        phi_exact: Tensor | None = None
        if replace_every and i % replace_every == 0:
            scalars, beta, phi_exact = _replace_residual(now, exact or A, b, M, scalars, space)
            num_products += 1
        torch.addcmul(now.y, p, beta.to(p.dtype), out=p)  # p = y + beta p
        if lagged:
            Ap = A(p)
            num_products += 1
        # The only host synchronisation of an iteration.
        curvature, a, ry, rr, signal = scalars.tolist()

        # phi(x + ap) = phi(x) - a p'r + a^2 p'Ap/2, and p'r = r'y for conjugate directions.
        phi_next = phi[-1] - a * ry + 0.5 * a * a * curvature
        if phi_exact is not None and math.isfinite(rr):
            phi_next = float(phi_exact)
        stop: Stop | None = None
        if not math.isfinite(curvature) or not math.isfinite(phi_next):
            stop = Stop.NON_FINITE  # alpha was 0: x is still the last good iterate
            i -= 1
        elif curvature <= 0 and options.nonpositive_curvature == "stop":
            stop = Stop.NONPOSITIVE_CURVATURE
            i -= 1
        else:
            phi.append(phi_next)
            r_norm = math.sqrt(max(rr, 0.0))
            if curvature <= 0 and options.nonpositive_curvature == "use":
                stop = Stop.NONPOSITIVE_CURVATURE
            elif not math.isfinite(rr):
                stop = Stop.NON_FINITE
            elif made_too_little_progress(phi, options):
                stop = Stop.PROGRESS
            elif i >= max_iter:
                stop = Stop.MAX_ITERATIONS
            elif r_norm <= bound:
                stop = Stop.RESIDUAL
            if keep_iterates and on_grid(i):
                iterates.append((i, keep(x)))
        if on_iteration is not None:
            on_iteration(i, signal)
        if stop is not None:
            break
        if not lagged:
            Ap = A(p)
            num_products += 1

    if iterates and iterates[-1][0] == i:
        iterates.pop()
    iterates.append((i, x))
    return _result(x, iterates, phi, stop, r_norm, b_norm, num_products)


def solve(system: System, options: CGOptions) -> Solution:
    """`cg` on the damped system; the kept iterates are the candidates."""
    result = cg(
        system.curvature(system.damping),
        system.b,
        system.start,
        system.preconditioner(system.damping),
        options,
        exact=system.exact_curvature(system.damping) if options.cg_residual_replacement else None,
        keep_iterates=system.keep_path,
        on_iteration=system.on_iteration,
        space=system.space,
    )
    return solution(result, system.damping)


def solution(result: CGResult, damping: float) -> Solution:
    """A solve's outcome in the words of every solver; `damping` is lambda in its quadratic."""
    return Solution(
        candidates=[
            Candidate(iteration=i, model=result.quadratic[i], damping=damping)
            for i, _ in result.iterates
        ],
        step=result.iterate,
        is_path=True,
        next_start=result.x,
        quadratic=result.quadratic,
        iterations=result.iterations,
        stop=result.stop,
        residual=result.residual,
        num_products=result.num_products,
        num_bytes=result.num_bytes,
    )


_KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "full": torch.clone,
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "host": lambda x: x.to("cpu", copy=True),
}
"""Ways to keep an iterate."""


@dataclass(kw_only=True)
class _Iterate:
    """The vectors that an iteration moves, in place."""

    x: Tensor
    r: Tensor
    """b - Ax."""
    y: Tensor
    """Mr; r itself without a preconditioner."""
    ry: Tensor | None = None
    """r'y, where the last iteration has it."""


def _advance(
    now: _Iterate, p: Tensor, Ap: Tensor, M: Operator | None, rule: str, space: Space
) -> tuple[Tensor, Tensor]:
    """One iteration on whole vectors; returns [p'Ap, alpha, r'y, r'r after it, signal] and beta."""
    ry = torch.dot(now.r, now.y).double() if now.ry is None else now.ry
    pAp = torch.dot(p, Ap).double()
    alpha = _step_length(ry, pAp, rule)
    now.x.addcmul_(p, alpha.to(p.dtype))
    now.r.addcmul_(Ap, alpha.to(p.dtype), value=-1)
    if M is not None:
        now.y = M(now.r)
    now.ry = torch.dot(now.r, now.y).double()
    rr = now.ry if M is None else torch.dot(now.r, now.r).double()
    # beta = r'y (new) / r'y (old)
    return torch.stack((pAp, alpha, ry, rr, space.read_signal(pAp))), now.ry / ry


def _advance_shared(
    now: _Iterate, p: Tensor, Ap: Tensor, M: Operator | None, rule: str, space: Space
) -> tuple[Tensor, Tensor]:
    """The same on shards, with one reduction: products after the move follow from those before it,
    (r - a Ap)'M(r - a Ap) = r'y - 2a r'z + a^2 (Ap)'z with z = M Ap. Every iteration computes r'y and
    r'r anew, so that the expansion's rounding does not pile up."""
    z = Ap if M is None else M(Ap)
    pairs = [(p, Ap), (now.r, now.y), (now.r, z), (Ap, z)]
    if M is not None:
        pairs += [(now.r, now.r), (now.r, Ap), (Ap, Ap)]
    sums = torch.stack([torch.dot(u, v).double() for u, v in pairs])
    sums = space.total(torch.cat((sums, space.read_signal(sums).reshape(1))))
    pAp, ry, rz, Apz = sums[:4]
    rr, rAp, ApAp = sums[4:7] if M is not None else (ry, rz, Apz)
    alpha = _step_length(ry, pAp, rule)
    step = alpha.to(p.dtype)
    now.x.addcmul_(p, step)
    now.r.addcmul_(Ap, step, value=-1)
    if M is not None:
        now.y.addcmul_(z, step, value=-1)
    ry_next = ry - alpha * (2 * rz - alpha * Apz)
    rr_next = rr - alpha * (2 * rAp - alpha * ApAp)
    return torch.stack((pAp, alpha, ry, rr_next, sums[-1])), ry_next / ry


def _replace_residual(
    now: _Iterate, A: Operator, b: Tensor, M: Operator | None, scalars: Tensor, space: Space
) -> tuple[Tensor, Tensor, Tensor]:
    """r = b - Ax anew; returns the iteration's scalars with the new r'r, beta, and phi(x)."""
    torch.sub(b, A(now.x), out=now.r)
    if M is not None:
        now.y = M(now.r).clone()
    pairs = [(now.r, now.y), (now.r, now.r), (now.r, now.x), (b, now.x)]
    sums = space.total(torch.stack([torch.dot(u, v).double() for u, v in pairs]))
    ry, rr, rx, bx = sums
    if now.ry is not None:
        now.ry = ry
    pAp, alpha, ry_before, _, signal = scalars
    return torch.stack((pAp, alpha, ry_before, rr, signal)), ry / ry_before, -0.5 * (rx + bx)


def _step_length(ry: Tensor, pAp: Tensor, rule: str) -> Tensor:
    """alpha = r'y / p'Ap on the device, without a look from the host; 0 where x must not move."""
    if rule in ("absolute", "use"):
        pAp_used = pAp.abs()
    else:
        pAp_used = pAp
    alpha = ry / pAp_used
    usable = torch.isfinite(alpha) & torch.isfinite(pAp)
    if rule == "stop":
        usable &= pAp > 0
    return torch.where(usable, alpha, torch.zeros_like(alpha))


def _result(
    x: Tensor,
    iterates: list[tuple[int, Tensor]],
    phi: list[float],
    stop: Stop,
    r_norm: float,
    b_norm: float,
    num_products: int,
) -> CGResult:
    return CGResult(
        x=x,
        iterates=iterates,
        quadratic=phi,
        iterations=len(phi) - 1,
        stop=stop,
        residual=r_norm / b_norm if b_norm > 0 else 0.0,
        num_products=num_products,
    )
