"""Preconditioned conjugate gradients for the step's linear system, [2] algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfdist.optim.options import HFOptions
from hfdist.optim.problem import Operator
from hfdist.optim.report import Stop


@dataclass(frozen=True, kw_only=True)
class CGResult:
    """Outcome of a solve of Ax = b, that is, of min phi(x) = x'Ax/2 - b'x."""

    x: Tensor
    """Last iterate [P]."""
    iterates: list[tuple[int, Tensor]]
    """(iteration, x [P]) on the backtracking grid, in order; the last is `x`."""
    quadratic: list[float]
    """phi after 0, 1, .. iterations."""
    iterations: int
    stop: Stop
    residual: float
    """|b - Ax| / |b|."""
    num_products: int


def backtracking_grid(gamma: float) -> Callable[[int], bool]:
    """Whether iteration i is ceil(gamma^j) - 1 for some j >= 0 [1, sec. 4.6]."""

    def on_grid(i: int) -> bool:
        # The smallest j with gamma^j >= i + 1, up to rounding; its neighbours cover the rounding.
        j = round(math.log(i + 1) / math.log(gamma))
        return any(math.ceil(gamma**k) - 1 == i for k in range(max(j - 1, 0), j + 2))

    return on_grid


def made_too_little_progress(phi: list[float], options: HFOptions) -> bool:
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
    options: HFOptions,
    *,
    keep_iterates: bool = True,
    on_iteration: Callable[[int], None] | None = None,
) -> CGResult:
    """Solve Ax = b approximately.

    Args:
        A: The damped curvature matrix.
        b: Right-hand side [P], finite.
        x0: Start [P]; None is zero, which saves a product.
        M: Approximation of the inverse of A, symmetric positive definite; None is the identity.
        options: The `cg_*` and `nonpositive_curvature` rules.
        keep_iterates: Keep the iterates of the backtracking grid, not only the last.
        on_iteration: Called with the number of each finished iteration; what it raises propagates.

    Returns:
        The result; `x` is finite whatever A returns.

    The host reads one small packed tensor of scalars an iteration and waits for nothing else.
    """
    max_iter = b.numel() if options.cg_max_iter is None else options.cg_max_iter
    on_grid = backtracking_grid(options.cg_grid_gamma)
    b_norm = _norm(b)
    bound = max(options.cg_tol * b_norm, options.cg_atol)

    x = torch.zeros_like(b) if x0 is None else x0.clone()
    num_products = 0
    if b_norm == 0.0:
        x.zero_()
        return _result(x, [(0, x)], [0.0], Stop.ZERO_GRADIENT, 0.0, 0.0, num_products)

    if x0 is None:
        r = -b  # r = Ax - b, the gradient of phi
    else:
        r = A(x).clone()
        num_products += 1
        r.sub_(b)
        if not math.isfinite(_norm(r)):
            # A non-finite product of a finite start: nothing about A can be trusted.
            x.zero_()
            return _result(x, [(0, x)], [0.0], Stop.NON_FINITE, 1.0, b_norm, num_products)
    phi = [0.5 * _dots((r, x), (b, x), sign=-1.0) if x0 is not None else 0.0]
    r_norm = _norm(r)
    iterates = [(0, x.clone())] if keep_iterates else []
    if r_norm <= bound:
        iterates = iterates or [(0, x)]
        return _result(x, iterates, phi, Stop.EXACT_START, r_norm, b_norm, num_products)

    y = r if M is None else M(r)
    ry = torch.dot(r, y).double()
    p = y.neg()
    i = 0
    while True:
        i += 1
        Ap = A(p)
        num_products += 1
        pAp = torch.dot(p, Ap).double()
        alpha = _step_length(ry, pAp, options.nonpositive_curvature)
        x.addcmul_(p, alpha.to(x.dtype))
        r.addcmul_(Ap, alpha.to(r.dtype))
        y = r if M is None else M(r)
        ry_next = torch.dot(r, y).double()
        rr = ry_next if M is None else torch.dot(r, r).double()
        # The only host synchronisation of an iteration.
        curvature, a, ry_now, rr_now = torch.stack((pAp, alpha, ry, rr)).tolist()

        # phi(x + ap) = phi(x) + a p'r + a^2 p'Ap/2, and p'r = -r'y for conjugate directions.
        phi_next = phi[-1] - a * ry_now + 0.5 * a * a * curvature
        stop: Stop | None = None
        if not math.isfinite(curvature) or not math.isfinite(phi_next):
            stop = Stop.NON_FINITE  # alpha was 0: x is still the last good iterate
            i -= 1
        elif curvature <= 0 and options.nonpositive_curvature == "stop":
            stop = Stop.NONPOSITIVE_CURVATURE
            i -= 1
        else:
            phi.append(phi_next)
            r_norm = math.sqrt(max(rr_now, 0.0))
            if curvature <= 0 and options.nonpositive_curvature == "use":
                stop = Stop.NONPOSITIVE_CURVATURE
            elif not math.isfinite(rr_now):
                stop = Stop.NON_FINITE
            elif made_too_little_progress(phi, options):
                stop = Stop.PROGRESS
            elif i >= max_iter:
                stop = Stop.MAX_ITERATIONS
            elif r_norm <= bound:
                stop = Stop.RESIDUAL
            if keep_iterates and on_grid(i):
                iterates.append((i, x.clone()))
        if on_iteration is not None:
            on_iteration(i)
        if stop is not None:
            break
        p.mul_((ry_next / ry).to(p.dtype)).sub_(y)  # beta = r'y (new) / r'y (old)
        ry = ry_next

    if not iterates or iterates[-1][0] != i:
        iterates.append((i, x))
    return _result(x, iterates, phi, stop, r_norm, b_norm, num_products)


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


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v))


def _dots(*pairs: tuple[Tensor, Tensor], sign: float) -> float:
    """u1'v1 + sign * u2'v2, in float64."""
    (u1, v1), (u2, v2) = pairs
    return float(torch.dot(u1, v1).double() + sign * torch.dot(u2, v2).double())


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
