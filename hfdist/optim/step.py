"""One Hessian-free step: gradient, solve, choice among candidates, line search, damping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hfdist.optim.backtracking import Choice, backtrack, climb, first_descent, further_descent
from hfdist.optim.curvature_share import CurvatureShare
from hfdist.optim.damping import Outcome, next_damping, reduction_ratio, rule_of
from hfdist.optim.kept_gain import KeptGain
from hfdist.optim.line_search import LineSearchResult, line_search
from hfdist.optim.objective import Objective, Operator
from hfdist.optim.options import HFOptions
from hfdist.optim.report import StepReport, Stop
from hfdist.optim.solvers import SOLVERS, Solution, System
from hfdist.optim.space import Space


@dataclass(frozen=True, kw_only=True)
class HFState:
    """What one step hands to the next; all that resuming needs besides the parameters."""

    damping: float
    """lambda of the next step."""
    x0: Tensor | None = None
    """Last CG iterate of the last step, this rank's part [n] (not the backtracked one, [1] sec. 4.6)."""
    """... or, for the solver krylov, the last step itself."""
    step: int = 0
    """Number of the next step."""
    explore: bool = True
    """Nothing is known of the right lambda: candidates of all sizes are looked at."""
    curvature_seen: float | None = None
    """d'Bd of the last step d, on the examples that it was computed from."""
    curvature_share: CurvatureShare = field(default_factory=CurvatureShare)
    """Of the examples, where `batches.curvature` is auto."""
    kept_gain: KeptGain = field(default_factory=KeptGain)
    """Whether batches are too small."""

    def scalars(self) -> dict[str, Any]:
        """All but the vector, as plain numbers: what a checkpoint keeps."""
        scalars = asdict(replace(self, x0=None))
        del scalars["x0"]
        return scalars

    @classmethod
    def restored(cls, scalars: Mapping[str, Any], x0: Tensor | None) -> HFState:
        """From `scalars()`, of this version or an earlier one."""
        known = {key: value for key, value in scalars.items() if key in cls.__dataclass_fields__}
        share = CurvatureShare(**known.pop("curvature_share", {}))
        kept = KeptGain(**known.pop("kept_gain", {}))
        own = {"x0": x0, "curvature_share": share, "kept_gain": kept}
        return cls(**{"explore": False, **known, **own})


ROUNDING = 10.0
"""Gains are seen in the loss from this many times its last digit on."""


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
    """Losses of the solver's candidates, each evaluated once; a zero step costs nothing."""

    def __init__(self, problem: Objective, solution: Solution, start_is_zero: bool) -> None:
        self._problem, self._solution = problem, solution
        self._start_is_zero = start_is_zero
        self.known: dict[int, float] = {}  # index -> loss
        self.num_evaluations = 0

    def __call__(self, indices: Sequence[int]) -> list[float]:
        if self._start_is_zero and 0 in indices and self._solution.candidates[0].iteration == 0:
            self.known.setdefault(0, self._problem.start_loss())
        new = [index for index in indices if index not in self.known]
        if new:
            steps = ((1.0, self._solution.step(index)) for index in new)
            self.known.update(zip(new, self._problem.losses(steps)))
            self.num_evaluations += len(new)
        return [self.known[index] for index in indices]

    def by_iteration(self) -> tuple[tuple[int, float], ...]:
        return tuple(
            (self._solution.candidates[index].iteration, self.known[index])
            for index in sorted(self.known)
        )


def hf_step(
    problem: Objective,
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

    kept_gain = state.kept_gain.seen(loss)
    x0 = _warm_start(state, options)
    with clock.phase("cg"):
        solution = SOLVERS[options.solver](
            System(
                curvature=problem.curvature,
                exact_curvature=lambda damping: problem.curvature(damping, exact=True),
                b=g.neg(),
                damping=state.damping,
                loss=loss,
                secants=problem.secants,
                preconditioner=lambda damping: _preconditioner(problem, damping),
                see=lambda: problem.see,
                start=x0,
                costs=lambda: problem.costs,
                keep_path=options.use_cg_backtracking or options.reduction_ratio_at == "last",
                damping_scale=problem.damping_scale,
                structural=lambda: problem.structural_matrix,
                least_squares=problem.least_squares,
                space=space,
                on_iteration=on_cg_iteration,
            ),
            options,
        )
    # Path solvers' models are freed of structural damping below.
    keeps = solution.takes_first or (options.structural_damping > 0.0 and solution.is_path)
    if not keeps:
        problem.release()
    if solution.iterations == 0 and solution.stop is not Stop.EXACT_START:
        return _no_step(state, options, clock, loss, grad_norm, solution.stop, solution)

    candidates = _Candidates(problem, solution, start_is_zero=x0 is None)
    last = len(solution.candidates) - 1
    climbed = not solution.is_path and rule_of(options, "chosen") == "chosen"
    with clock.phase("backtracking"):
        loss_0 = problem.start_loss()
        if solution.takes_first:
            choice = first_descent(last + 1 - len(solution.falling), candidates, loss_0)
            adapts = rule_of(options, "trials") == "trials"
            if adapts and state.explore and choice.index == 0 and choice.loss < loss_0:
                choice = further_descent(choice, solution.falling, candidates)
        elif not solution.is_path:
            if climbed:
                choice = _climb(solution, candidates, loss_0, state.explore, g.dtype)
            else:  # the rule's own lambda, and no other
                choice = Choice(solution.centre, candidates([solution.centre])[0])
        elif options.use_cg_backtracking:
            choice = backtrack(
                last + 1, candidates, options.cg_backtracking, options.candidates_per_pass
            )
        else:
            needed = options.adapt_damping or options.use_linesearch
            choice = Choice(last, candidates([last])[0] if needed else math.nan)
        chosen, delta = solution.candidates[choice.index], solution.step(choice.index)
        slope, delta_squared = space.dots((g, delta), (delta, delta))

    with clock.phase("damping"):
        damped_ratio, undamped_ratio = _reduction_ratios(
            problem, space, solution, candidates, choice, loss_0, options
        )
        rho = damped_ratio if options.reduction_ratio == "damped" else undamped_ratio

    num_evaluations = 0
    with clock.phase("line_search"):

        def losses_at(alphas: Sequence[float]) -> list[float]:
            nonlocal num_evaluations
            num_evaluations += len(alphas)
            return problem.losses((alpha, delta) for alpha in alphas)

        if (
            climbed and not choice.loss < loss_0
        ):  # the candidates were a search to the shortest steps
            found = LineSearchResult(0.0, loss_0)
        elif options.use_linesearch:
            found = line_search(losses_at, loss_0, slope, options, loss_1=choice.loss)
        else:
            known = options.lr == 1.0 and not math.isnan(choice.loss)
            final = choice.loss if known else losses_at([options.lr])[0]
            found = LineSearchResult(options.lr if math.isfinite(final) else 0.0, final)
        moves = chosen.iteration > 0 or x0 is not None
        accepted = found.alpha > 0.0 and moves

    outcome = Outcome(
        damping=state.damping,
        rho=rho,
        accepted=accepted,
        candidate_damping=None if solution.is_path else chosen.damping,
    )
    following = state.damping
    if not solution.is_of_secants:
        following = next_damping(outcome, options, _auto_damping_rule(solution))
    accepted, alpha, following = problem.agree((accepted, found.alpha, following))
    if accepted:
        problem.move(alpha, delta)
    else:
        alpha = 0.0

    ratio, share = _curvature_ratio(state, solution), problem.costs.curvature_share
    report = StepReport(
        step=state.step,
        loss=loss,
        final_loss=found.loss if accepted else loss_0,
        accepted=accepted,
        alpha=alpha,
        damping=state.damping,
        next_damping=following,
        reduction_ratio=rho,
        reduction_ratio_undamped=undamped_ratio,
        reduction_ratio_damped=damped_ratio,
        cg_iterations=solution.iterations,
        chosen_iterate=chosen.iteration,
        stop=solution.stop,
        residual=solution.residual,
        grad_norm=grad_norm,
        update_norm=alpha * math.sqrt(delta_squared),
        directional_derivative=slope,
        num_products=solution.num_products,
        product_engine=problem.product_engine,
        solver_bytes=solution.num_bytes + (0 if x0 is None else x0.nbytes),
        num_loss_evaluations=candidates.num_evaluations + num_evaluations,
        curvature_ratio=ratio,
        curvature_share=share,
        kept_gain=kept_gain.ratio,
        finds_noise=kept_gain.is_noise and not state.kept_gain.was_noise,
        work=problem.costs.step(
            solution.num_products, candidates.num_evaluations + num_evaluations
        ),
        seconds=clock.total(),
        quadratic=tuple(solution.quadratic),
        candidates=candidates.by_iteration(),
    )
    gain = loss_0 - found.loss if accepted else 0.0
    if solution.secants is not None:
        solution.secants.after(gain, report.work, report.final_loss, accepted)
    keep_start = accepted or not options.reset_warm_start
    # d'Bd, from m(d) = g'd + d'Bd/2.
    curvature = 2.0 * ((chosen.undamped_model or math.nan) - slope)
    if solution.is_of_secants:
        curvature = math.nan  # not seen
    start = solution.next_start
    if solution.starts_from_step:
        start = delta.mul_(alpha) if accepted else x0
    next_state = HFState(
        damping=following,
        x0=start if keep_start else None,
        step=state.step + 1,
        explore=state.explore if solution.is_of_secants else not accepted,
        curvature_seen=curvature * alpha**2 if accepted and math.isfinite(curvature) else None,
        curvature_share=state.curvature_share
        if solution.is_of_secants
        else state.curvature_share.after(ratio, undamped_ratio, accepted, share),
        kept_gain=kept_gain.after(loss, gain),
    )
    return report, next_state


def _climb(
    solution: Solution, candidates: _Candidates, loss_0: float, wide: bool, dtype: torch.dtype
) -> Choice:
    """`climb` among the candidates whose gain is more than rounding of the loss: what the loss says of
    shorter steps is noise, and would throw lambda far up."""
    least = ROUNDING * torch.finfo(dtype).eps * abs(loss_0)
    last = len(solution.candidates) - 1
    gains = (-(candidate.undamped_model or 0.0) for candidate in solution.candidates)
    first = next((k for k, gain in enumerate(gains) if gain > least), last)
    choice = climb(
        last + 1 - first,
        max(solution.centre - first, 0),
        lambda indices: candidates([first + k for k in indices]),
        loss_0,
        wide,
    )
    return replace(choice, index=first + choice.index)


def _auto_damping_rule(solution: Solution | None) -> str:
    """damping_rule=auto: candidates of several lambda choose among them by their losses."""
    if solution is None or solution.is_path:
        return "lm"
    return "trials" if solution.takes_first else "chosen"


def _curvature_ratio(state: HFState, solution: Solution) -> float:
    """d'Bd of the last step d on this step's curvature examples, over that on those which it was computed
    from; NaN where it is not known.

    A step that fits its own examples too closely finds more curvature on others: with the ratio r the step
    of a quadratic earns 2 - r of what its model says.
    """
    seen, now = state.curvature_seen, solution.start_curvature
    return now / seen if seen and now is not None else math.nan


def _preconditioner(problem: Objective, damping: float | None) -> Operator | None:
    """The problem's; parameter groups with a damping of their own scale the metric."""
    M, scale = problem.preconditioner(damping), problem.damping_scale
    if damping is not None or scale is None:
        return M
    root = scale.rsqrt()  # C -> D^1/2 C D^1/2
    return (lambda v: root * root * v) if M is None else (lambda v: root * M(root * v))


def _warm_start(state: HFState, options: HFOptions) -> Tensor | None:
    """Decayed last solution [2, sec. 10]; the decay may rise over the run [9, A.6]."""
    if state.x0 is None or options.solver != "cg":
        return state.x0
    decay = options.cg_decay_x0
    if options.cg_decay_x0_max is not None:
        part = min(state.step / options.cg_decay_x0_steps, 1.0)
        decay += part * (options.cg_decay_x0_max - decay)
    return decay * state.x0 if decay > 0.0 else None


def _space(problem: Objective) -> Space:
    return Space(
        total_of=problem.total if problem.is_sharded else None,
        signal=lambda: problem.signal,
        whole_numel=problem.numel,
    )


def _reduction_ratios(
    problem: Objective,
    space: Space,
    solution: Solution,
    candidates: _Candidates,
    choice: Choice,
    loss_0: float,
    options: HFOptions,
) -> tuple[float, float]:
    """rho against the damped and the undamped quadratic model.

    At "chosen": (f(delta) - f(0)) / q(delta) [2, sec. 8.5]. At "last", as PyTorchHessianFree has it:
    from CG's start to its last iterate, (f(x_n) - f(x_0)) / (q(x_n) - q(x_0)).
    """

    structural = problem.structural_matrix if solution.is_path else None

    def model(index: int) -> tuple[float, float]:  # damped, undamped
        candidate = solution.candidates[index]
        if candidate.undamped_model is not None:
            return candidate.model, candidate.undamped_model
        # Without lambda/2 |x|^2 in the damping metric.
        x, scale = solution.step(index), problem.damping_scale
        metric = x if scale is None else scale * x
        if structural is not None:
            metric = metric + options.structural_damping * structural(x)
        x_squared = space.dots((x, metric))[0]
        return candidate.model, candidate.model - 0.5 * candidate.damping * x_squared

    if options.reduction_ratio_at == "chosen" or not solution.is_path:
        actual = choice.loss - loss_0
        damped, undamped = model(choice.index)
    else:
        last = len(solution.candidates) - 1
        f_first, f_last = candidates([0, last]) if options.adapt_damping else (math.nan, math.nan)
        actual = f_last - f_first
        (damped, undamped), (damped_0, undamped_0) = model(last), model(0)
        damped, undamped = damped - damped_0, undamped - undamped_0
    return reduction_ratio(actual, damped), reduction_ratio(actual, undamped)


def _no_step(
    state: HFState,
    options: HFOptions,
    clock: Clock,
    loss: float,
    grad_norm: float,
    stop: Stop,
    solution: Solution | None = None,
) -> tuple[StepReport, HFState]:
    """A step that ends before there is a candidate: nothing moves, damping rises unless at rest."""
    following = state.damping
    if stop is not Stop.ZERO_GRADIENT:
        rule = _auto_damping_rule(solution)
        following = next_damping(Outcome(damping=state.damping), options, rule)
    report = StepReport(
        step=state.step,
        loss=loss,
        final_loss=loss,
        accepted=False,
        alpha=0.0,
        damping=state.damping,
        next_damping=following,
        reduction_ratio=math.nan,
        reduction_ratio_undamped=math.nan,
        reduction_ratio_damped=math.nan,
        cg_iterations=0,
        chosen_iterate=0,
        stop=stop,
        residual=1.0 if solution is None else solution.residual,
        grad_norm=grad_norm,
        update_norm=0.0,
        directional_derivative=0.0,
        num_products=0 if solution is None else solution.num_products,
        num_loss_evaluations=0,
        seconds=clock.total(),
    )
    following_state = replace(
        state, damping=following, x0=None, curvature_seen=None, step=state.step + 1
    )
    return report, following_state
