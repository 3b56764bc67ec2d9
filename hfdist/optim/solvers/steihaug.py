"""Truncated CG with a trust region in place of damping, Steihaug 1983 [8]."""

from __future__ import annotations

import math

import torch

from hfdist.optim.report import Stop
from hfdist.optim.solvers.cg import CGOptions, made_too_little_progress
from hfdist.optim.solvers.solution import Candidate, Solution, System


def solve(system: System, options: CGOptions) -> Solution:
    """min of m(x) = x'Bx/2 - b'x over |x| <= Delta, by CG from zero that stops at the boundary.

    Where an iterate would leave the region, or p'Bp <= 0, x moves along p to the boundary and is the
    result. |x|^2 = x'M^-1 x is the norm of the preconditioner M, which CG's own recurrence gives.

    Delta = |b| / lambda, with |b|^2 = b'Mb: the length of a gradient step of size 1 / lambda. So the rules
    that raise and lower lambda lower and raise the radius, and scaling the loss scales lambda with it.

    Args:
        system: Its start is not used: the norm of an iterate must grow from zero.
        options: The `cg_*` keys of stopping; `nonpositive_curvature` does not apply.
    """
    space = system.space
    A, M = system.curvature(0.0), system.preconditioner(system.damping)
    max_iter = space.numel(system.b) if options.cg_max_iter is None else options.cg_max_iter
    x = torch.zeros_like(system.b)
    r = system.b.clone()
    y = r if M is None else M(r).clone()
    ry, rr = space.dots((r, y), (r, r))
    b_norm = math.sqrt(rr)
    bound = max(options.cg_tol * b_norm, options.cg_atol)
    radius_squared = ry / system.damping**2 if system.damping > 0.0 else math.inf
    phi, num_products, i = [0.0], 0, 0
    xx, xp, pp = 0.0, 0.0, ry  # squares in the norm of M^-1
    p = y.clone()
    stop = Stop.ZERO_GRADIENT if b_norm == 0.0 else None
    while stop is None:
        Ap = A(p)
        num_products += 1
        (pAp,) = space.dots((p, Ap))
        signal = float(space.read_signal(x))
        if not math.isfinite(pAp) or not math.isfinite(ry):
            stop = Stop.NON_FINITE
            break
        alpha = ry / pAp if pAp > 0.0 else math.inf
        if xx + 2.0 * alpha * xp + alpha * alpha * pp >= radius_squared or pAp <= 0.0:
            stop = Stop.NONPOSITIVE_CURVATURE if pAp <= 0.0 else Stop.BOUNDARY
            if math.isinf(radius_squared):
                break  # without damping there is no boundary to move to
            # The positive root of |x + alpha p| = Delta.
            root = math.sqrt(max(xp * xp + pp * (radius_squared - xx), 0.0))
            alpha = (root - xp) / pp
        i += 1
        x.add_(p, alpha=alpha)
        r.sub_(Ap, alpha=alpha)
        phi.append(phi[-1] - alpha * ry + 0.5 * alpha * alpha * pAp)
        y = r if M is None else M(r).clone()
        ry_next, rr = space.dots((r, y), (r, r))
        if system.on_iteration is not None:
            system.on_iteration(i, signal)
        if stop is None:
            if made_too_little_progress(phi, options):
                stop = Stop.PROGRESS
            elif i >= max_iter:
                stop = Stop.MAX_ITERATIONS
            elif math.sqrt(max(rr, 0.0)) <= bound:
                stop = Stop.RESIDUAL
        beta = ry_next / ry
        xx, xp, pp = (
            xx + 2.0 * alpha * xp + alpha * alpha * pp,
            beta * (xp + alpha * pp),
            ry_next + beta * beta * pp,
        )
        p = torch.add(y, p, alpha=beta)
        ry = ry_next
    return Solution(
        candidates=[Candidate(iteration=i, model=phi[-1], damping=0.0, undamped_model=phi[-1])],
        step=lambda index: x,
        is_path=True,
        next_start=None,
        quadratic=phi,
        iterations=i,
        stop=stop,
        residual=math.sqrt(max(rr, 0.0)) / b_norm if b_norm > 0.0 else 0.0,
        num_products=num_products,
        num_bytes=5 * x.nbytes,
    )
