"""One Hessian-free step: gradient, curvature, CG, backtracking, damping, line search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from hfdist.optim.backtracking import Choice, backtrack
from hfdist.optim.cg import CGResult, cg
from hfdist.optim.damping import levenberg_marquardt, raised, reduction_ratio
from hfdist.optim.line_search import LineSearchResult, line_search
from hfdist.optim.objective import Problem
from hfdist.optim.options import HFOptions
from hfdist.optim.report import StepReport, Stop
from hfdist.optim.space import Space


@dataclass(frozen=True, kw_only=True)
class HFState:
    """What one step hands to the next; all that resuming needs besides the parameters."""

    damping: float
    """lambda of the next step."""
    x0: Tensor | None = None
    """Last CG iterate of the last step, this rank's part [n] (not the backtracked one, [1] sec. 4.6)."""
    step: int = 0
    """Number of the next step."""


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self._start}


class _Candidates:
    """Losses of CG's iterates, each evaluated once; a zero iterate costs nothing."""

    def __init__(self, problem: Problem, result: CGResult, start_is_zero: bool) -> None:
        self._problem, self._result, self._iterates = problem, result, result.iterates
        self._start_is_zero = start_is_zero
        self.known: dict[int, float] = {}  # place -> loss
        self.num_evaluations = 0

    def __call__(self, places: Sequence[int]) -> list[float]:
        if self._start_is_zero and 0 in places and self._iterates[0][0] == 0:
            self.known.setdefault(0, self._problem.start_loss())
        new = [place for place in places if place not in self.known]
        if new:
            steps = ((1.0, self._result.iterate(place)) for place in new)
            self.known.update(zip(new, self._problem.losses(steps)))
            self.num_evaluations += len(new)
        return [self.known[place] for place in places]

    def by_iteration(self) -> tuple[tuple[int, float], ...]:
        return tuple((self._iterates[place][0], self.known[place]) for place in sorted(self.known))


def hf_step(
    problem: Problem,
    state: HFState,
    options: HFOptions,
    *,
    on_cg_iteration: Callable[[int, float], None] | None = None,
) -> tuple[StepReport, HFState]:
    """Take one step on `problem`.

    Args:
        problem: The frozen objective; its parameters are moved if the step is accepted, and are the
            same bits as before otherwise, also when this function raises.
        state: What the last step returned.
        options: Rules and constants.
        on_cg_iteration: Called after every CG iteration with its number and the problem's signal; it
            may raise to abandon the step.

    Returns:
        The report and the state of the next step.
    """
    clock = Clock()
    with clock.phase("gradient"):
        loss, g = problem.loss_and_gradient()  # g [P]
        space = _space(problem)
        grad_norm = math.sqrt(space.dots((g, g))[0])
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        return _no_step(state, options, clock, loss, grad_norm, Stop.NON_FINITE)

    x0 = _warm_start(state, options)
    with clock.phase("cg"):
        result = cg(
            problem.curvature(state.damping),
            g.neg(),
            x0,
            problem.preconditioner(state.damping),
            options,
            exact=problem.curvature(state.damping, exact=True)
            if options.cg_residual_replacement
            else None,
            keep_iterates=options.use_cg_backtracking or options.reduction_ratio_at == "last",
            on_iteration=on_cg_iteration,
            space=space,
        )
    problem.release()
    if result.iterations == 0 and result.stop is not Stop.EXACT_START:
        return _no_step(state, options, clock, loss, grad_norm, result.stop, result)

    candidates = _Candidates(problem, result, start_is_zero=x0 is None)
    last = len(result.iterates) - 1
    with clock.phase("backtracking"):
        loss_0 = problem.start_loss()
        if options.use_cg_backtracking:
            choice = backtrack(
                last + 1, candidates, options.cg_backtracking, options.candidates_per_pass
            )
        else:
            needed = options.adapt_damping or options.use_linesearch
            choice = Choice(last, candidates([last])[0] if needed else math.nan)
        chosen_iterate, delta = result.iterates[choice.place][0], result.iterate(choice.place)
        slope, delta_squared = space.dots((g, delta), (delta, delta))

    with clock.phase("damping"):
        damped_ratio, undamped_ratio = _reduction_ratios(
            problem, space, result, candidates, choice, loss_0, state.damping, options
        )
        rho = damped_ratio if options.reduction_ratio == "damped" else undamped_ratio
        next_damping = state.damping
        if options.adapt_damping:
            next_damping = levenberg_marquardt(state.damping, rho, options)

    num_evaluations = 0
    with clock.phase("line_search"):

        def losses_at(alphas: Sequence[float]) -> list[float]:
            nonlocal num_evaluations
            num_evaluations += len(alphas)
            return problem.losses((alpha, delta) for alpha in alphas)

        if options.use_linesearch:
            found = line_search(losses_at, loss_0, slope, options, loss_1=choice.loss)
        else:
            known = options.lr == 1.0 and not math.isnan(choice.loss)
            final = choice.loss if known else losses_at([options.lr])[0]
            found = LineSearchResult(options.lr if math.isfinite(final) else 0.0, final)
        moves = chosen_iterate > 0 or x0 is not None
        accepted = found.alpha > 0.0 and moves

    if not accepted and options.adapt_damping and options.raise_damping_on_reject:
        next_damping = max(next_damping, raised(state.damping, options))
    accepted, alpha, next_damping = problem.agree((accepted, found.alpha, next_damping))
    if accepted:
        problem.move(alpha, delta)
    else:
        alpha = 0.0

    report = StepReport(
        step=state.step,
        loss=loss,
        final_loss=found.loss if accepted else loss_0,
        accepted=accepted,
        alpha=alpha,
        damping=state.damping,
        next_damping=next_damping,
        reduction_ratio=rho,
        reduction_ratio_undamped=undamped_ratio,
        reduction_ratio_damped=damped_ratio,
        cg_iterations=result.iterations,
        chosen_iterate=chosen_iterate,
        stop=result.stop,
        residual=result.residual,
        grad_norm=grad_norm,
        update_norm=alpha * math.sqrt(delta_squared),
        directional_derivative=slope,
        num_products=result.num_products,
        product_engine=problem.product_engine,
        solver_bytes=result.num_bytes + (0 if x0 is None else x0.nbytes),
        num_loss_evaluations=candidates.num_evaluations + num_evaluations,
        seconds=clock.total(),
        quadratic=tuple(result.quadratic),
        candidates=candidates.by_iteration(),
    )
    keep_start = accepted or not options.reset_warm_start
    next_state = HFState(
        damping=next_damping,
        x0=result.x if keep_start else None,
        step=state.step + 1,
    )
    return report, next_state


def _warm_start(state: HFState, options: HFOptions) -> Tensor | None:
    """Decayed last solution [2, sec. 10]; the decay may rise over the run [9, A.6]."""
    if state.x0 is None:
        return None
    decay = options.cg_decay_x0
    if options.cg_decay_x0_max is not None:
        part = min(state.step / options.cg_decay_x0_steps, 1.0)
        decay += part * (options.cg_decay_x0_max - decay)
    return decay * state.x0 if decay > 0.0 else None


def _space(problem: Problem) -> Space:
    return Space(
        total_of=problem.total if problem.is_sharded else None,
        signal=lambda: problem.signal,
        whole_numel=problem.numel,
    )


def _reduction_ratios(
    problem: Problem,
    space: Space,
    result: CGResult,
    candidates: _Candidates,
    choice: Choice,
    loss_0: float,
    damping: float,
    options: HFOptions,
) -> tuple[float, float]:
    """rho against the damped and the undamped quadratic model.

    At "chosen": (f(delta) - f(0)) / q(delta) [2, sec. 8.5]. At "last", as PyTorchHessianFree has it:
    from CG's start to its last iterate, (f(x_n) - f(x_0)) / (q(x_n) - q(x_0)).
    """

    def damping_term(x: Tensor) -> float:  # lambda/2 |x|^2 in the damping metric
        scale = problem.damping_scale
        return 0.5 * damping * space.dots((x, x if scale is None else scale * x))[0]

    if options.reduction_ratio_at == "chosen":
        iteration = result.iterates[choice.place][0]
        actual, model = choice.loss - loss_0, result.quadratic[iteration]
        term = damping_term(result.iterate(choice.place))
    else:
        last = len(result.iterates) - 1
        f_first, f_last = candidates([0, last]) if options.adapt_damping else (math.nan, math.nan)
        actual, model = f_last - f_first, result.quadratic[-1] - result.quadratic[0]
        term = damping_term(result.iterate(last)) - damping_term(result.iterate(0))
    return reduction_ratio(actual, model), reduction_ratio(actual, model - term)


def _no_step(
    state: HFState,
    options: HFOptions,
    clock: Clock,
    loss: float,
    grad_norm: float,
    stop: Stop,
    result: CGResult | None = None,
) -> tuple[StepReport, HFState]:
    """A step that ends before there is a candidate: nothing moves, damping rises unless at rest."""
    next_damping = state.damping
    if options.adapt_damping and stop is not Stop.ZERO_GRADIENT:
        next_damping = raised(state.damping, options)
    report = StepReport(
        step=state.step,
        loss=loss,
        final_loss=loss,
        accepted=False,
        alpha=0.0,
        damping=state.damping,
        next_damping=next_damping,
        reduction_ratio=math.nan,
        reduction_ratio_undamped=math.nan,
        reduction_ratio_damped=math.nan,
        cg_iterations=0,
        chosen_iterate=0,
        stop=stop,
        residual=1.0 if result is None else result.residual,
        grad_norm=grad_norm,
        update_norm=0.0,
        directional_derivative=0.0,
        num_products=0 if result is None else result.num_products,
        num_loss_evaluations=0,
        seconds=clock.total(),
    )
    return report, replace(state, damping=next_damping, x0=None, step=state.step + 1)
