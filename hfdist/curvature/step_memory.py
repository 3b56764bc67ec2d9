"""A step's memory by its parts, and the one message of a step that runs out of it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hfdist.curvature.memory import preconditioner_numbers
from hfdist.curvature.params import ParameterVector
from hfdist.devices import allocated_memory, is_accelerator, is_out_of_memory, memory_info
from hfdist.errors import StepMemoryError, UserError, first_line
from hfdist.optim.memory import solver_vectors
from hfdist.optim.options import HFOptions

BEFORE = "model, and what was there before the step"
BATCHES = "batches"
GRAPHS = "gradient, and graphs kept for products"
METRIC = "preconditioner"
LOSSES = "passes of losses"
SOLVER = "solver's vectors, and the product at work"
_AT = {
    BATCHES: "loading",
    GRAPHS: "gradient and curvature",
    METRIC: "the preconditioner",
    LOSSES: "losses of candidates",
}
"""What a step is doing while it fills a part."""


@dataclass
class StepMemory:
    """Bytes of an accelerator that the parts of a step hold, as torch's allocator counts them: looking costs
    nothing, and no wait. Of the host's memory nothing is known but the formulas.

    Args:
        device: The step's.
    """

    device: torch.device
    parts: dict[str, int] = field(default_factory=dict)
    now: str | None = None
    """The part at work."""

    def __post_init__(self) -> None:
        self._is_known = is_accelerator(self.device)
        self._before = allocated_memory(self.device) if self._is_known else 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is allocated inside, and stays, is this part's."""
        outer, self.now = self.now, name
        before = allocated_memory(self.device) if self._is_known else 0
        failed = True
        try:
            yield
            failed = False
        finally:
            if self._is_known and outer is None:
                held = allocated_memory(self.device) - before
                self.parts[name] = max(self.parts.get(name, 0) + held, 0)
            if not failed:
                self.now = outer

    def held(self) -> dict[str, int]:
        """Bytes by part now, the largest first; empty on a CPU."""
        if not self._is_known:
            return {}
        rest = allocated_memory(self.device) - self._before - sum(self.parts.values())
        found = {BEFORE: self._before, **self.parts, SOLVER: max(rest, 0)}
        return dict(sorted(found.items(), key=lambda part: -part[1]))


@contextmanager
def told_when_out_of_memory(
    memory: StepMemory,
    params: ParameterVector,
    options: HFOptions,
    *,
    step: int,
    world_size: int = 1,
    microbatch: int | None = None,
    in_job: bool = True,
    then: str = "",
) -> Iterator[None]:
    """An error of the step inside that says there is no memory left becomes one message.

    Args:
        memory: Of the step.
        params, options: Of the step.
        step: Its number.
        world_size: Number of ranks.
        microbatch: Most examples of a forward pass, if that is known.
        in_job: Keys are those of a job, not arguments of `HessianFree`.
        then: How to go on, as the message's end.

    Raises:
        StepMemoryError: The step ran out of memory.
    """
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        parts = memory.held()
        where = _AT.get(memory.now or SOLVER, "the solve")
        known = parts or _expected(params, options, world_size)
        listed = "; ".join(f"{name} {_bytes(size)}" for name, size in known.items() if size)
        held = f"it held {_bytes(sum(parts.values()))}" if parts else "by the formulas it takes"
        total = ""
        if parts:
            total = f" of {_bytes(memory_info(memory.device)[1])}"
        advice = _advice(known, options, world_size, microbatch, in_job)
        raise StepMemoryError(
            f"step {step} ran out of memory on {memory.device} in {where}: {held}{total} ({listed}; "
            f"{_said(error, cause)}). Parameters and state are those before "
            f"the step. Set {_any_of(advice)}{then}"
        ) from _without_tensors(error)


def _cause(error: BaseException | None) -> BaseException | None:
    """What says in an error, or in one that it came from, that there is no memory left: calls of a task's
    code give their errors another class."""
    while error is not None:
        if is_out_of_memory(error):
            return error
        error = error.__cause__ if isinstance(error, UserError) else None
    return None


def _without_tensors(error: BaseException) -> BaseException:
    """The error, whose traceback no longer holds what the step's functions had: their memory is free."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error


def _expected(params: ParameterVector, options: HFOptions, world_size: int) -> dict[str, int]:
    """Bytes by the formulas, the largest first."""
    n = -(-params.numel // (world_size if options.shard_solver_state else 1))
    itemsize = params.dtype.itemsize
    found = {
        SOLVER: int(solver_vectors(options, n, itemsize) * n * itemsize),
        METRIC: preconditioner_numbers(params, options) * itemsize,
        GRAPHS: 0,  # not known
    }
    return dict(sorted(found.items(), key=lambda part: -part[1]))


def _advice(
    parts: dict[str, int],
    options: HFOptions,
    world_size: int,
    microbatch: int | None,
    in_job: bool,
) -> list[str]:
    """What to set, for the largest part first; what is set already is left out."""
    found: list[str] = []
    key = "optim." if in_job else ""
    for name in (*parts, GRAPHS, SOLVER, METRIC):
        if name in (GRAPHS, LOSSES, BATCHES) and microbatch != 1:
            below = f" (below {microbatch})" if microbatch is not None else ""
            found.append(
                f"batches.microbatch{below}" if in_job else "smaller minibatches, acc_step"
            )
        if name == GRAPHS and options.memory_budget != 0 and options.product_engine != "recompute":
            found.append(f"{key}memory_budget=0 (no graph is kept)")
        if name == SOLVER:
            found += [key + what for what in _of_solver(options)]
            if not options.shard_solver_state and options.solver not in ("dense", "sample_space"):
                workers = "" if world_size > 1 else " on more than one worker"
                found.append(f"{key}shard_solver_state=true{workers}")
        if name == METRIC and options.preconditioner == "nystrom":
            found.append(f"{key}nystrom_rank (below {options.nystrom_rank})")
        if name == METRIC and options.preconditioner in ("kfac", "ekfac", "auto"):
            other = "empirical_fisher" if in_job else "none"  # which an own loop gives as M_func
            found.append(f"{key}preconditioner={other}")
    return list(dict.fromkeys(found))


def _of_solver(options: HFOptions) -> list[str]:
    if options.solver == "cg":
        return [] if options.cg_iterates == "host" else ["cg_iterates=host"]
    if options.solver in ("dense", "sample_space"):
        return ["solver=krylov"]
    if options.solver in ("auto", "krylov"):
        fewer = [f"krylov_max_dim (below {options.krylov_max_dim})"]
        if options.krylov_basis == "none":
            return []
        return fewer if options.krylov_basis == "host" else ["krylov_basis=host", *fewer]
    return []


def _any_of(advice: list[str]) -> str:
    if not advice:
        return "a smaller model: every key that saves memory is set"
    return advice[0] if len(advice) == 1 else f"{', '.join(advice[:-1])}, or {advice[-1]}"


def _said(error: BaseException, cause: BaseException) -> str:
    """What was said of it, in a task's code with method and line; without advice, which follows."""
    if isinstance(error, UserError):
        return first_line(error).partition(". Lower ")[0]
    text = first_line(cause).rstrip(". ")
    name = type(cause).__name__
    return name if text == name else f"{name}: {text}"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1024:.1f} KiB"
