"""The protocol: grids of the rivals on the first seed, then the best of each in turns with Hessian-free on
all seeds.

What a study's file has of the grids, of the same job and seconds, is not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfdist.bench.optimizers.arena import Arena, Budget, Run, race
from hfdist.bench.optimizers.hessian_free import hessian_free
from hfdist.bench.optimizers.rivals import Setting, enter, rivals
from hfdist.bench.optimizers.study import identity
from hfdist.bench.pinns.rivals import grids
from hfdist.bench.pinns.trace import Trace, Watch
from hfdist.config.job import RunConfig
from hfdist.errors import ConfigError
from hfdist.rundir.files import write_atomically

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: the process's own time, of all its threads, which does not pass while others have the machine."""


@dataclass(kw_only=True)
class Study:
    """Traces on one problem."""

    problem: str
    job: dict[str, Any]
    """What the traces belong to."""
    seconds: float
    """Of every contender."""
    clock: str
    """What its seconds are: wall or cpu."""
    threads: int
    """Of torch."""
    grids: list[Trace] = field(default_factory=list)
    """Rivals' settings, each alone, on the first seed."""
    races: list[Trace] = field(default_factory=list)
    """Hessian-free and each rival's best setting, in turns, on all seeds."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        for key in ("grids", "races"):
            values[key] = [Trace(**trace) for trace in values[key]]
        return cls(**values)


def compare(
    problem: str,
    config: RunConfig,
    *,
    seconds: float,
    seeds: Sequence[int],
    clock: str = "wall",
    threads: int = 1,
    names: Sequence[str] | None = None,
    path: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Study:
    """Run them all.

    Args:
        problem: What the table calls it.
        config: Task, sizes and rules of the Hessian-free step.
        seconds: Of every contender.
        seeds: Of initialisations and points; the grids are searched on the first.
        clock: wall, or cpu: the process's own time, on a machine that others use, too.
        threads: Of torch, for the record.
        names: Rivals; None: all that are installed.
        path: File of the study.
        progress: Told of every contender.

    Raises:
        ConfigError: There is no solution to compare with, or no such rival or clock.
    """
    if clock not in CLOCKS:
        raise ConfigError(f"clock is {clock!r}: choose from {', '.join(CLOCKS)}")
    first, *others = (config.model_copy(update={"seed": seed}) for seed in seeds)
    budget = Budget(gradients=float("inf"), seconds=seconds)
    study = Study(
        problem=problem, job=identity(config), seconds=seconds, clock=clock, threads=threads
    )

    def raced(arena: Arena, runs: Sequence[Run], watch: Watch) -> list[Trace]:
        race(arena, runs, budget, watch, CLOCKS[clock])
        return [watch.finish(run) for run in runs]

    arena = Arena(first)
    watch = Watch(arena.task, first, seconds)
    settings = rivals(arena, names, grids())
    known = _known(path, study, first.seed)
    for name, grid in settings.items():
        for setting in grid:
            trace = known.get((name, setting.text))
            if trace is None:
                (trace,) = raced(arena, [enter(arena, name, setting, budget.spent)], watch)
                progress(f"seed {first.seed}, {name} ({setting.text}): {trace.error:.2e}")
            study.grids.append(trace)
            if path is not None:
                study.save(path)
    best = [(name, _best(study, name, grid)) for name, grid in settings.items()]
    for job in (first, *others):
        arena = Arena(job)
        watch = Watch(arena.task, job, seconds)
        runs = [hessian_free(job), *(enter(arena, name, s, budget.spent) for name, s in best)]
        for trace in raced(arena, runs, watch):
            study.races.append(trace)
            progress(f"seed {job.seed}, {trace.optimizer}: {trace.error:.2e}, in turns")
        if path is not None:
            study.save(path)
    return study


def _known(path: Path | None, study: Study, seed: int) -> dict[tuple[str, str], Trace]:
    """Grids that were measured before."""
    if path is None or not path.is_file():
        return {}
    former = Study.load(path)
    same = ("job", "seconds", "clock", "threads")
    if any(getattr(former, key) != getattr(study, key) for key in same):
        return {}
    return {(t.optimizer, t.setting): t for t in former.grids if t.seed == seed}


def _best(study: Study, name: str, grid: Sequence[Setting]) -> Setting:
    """The setting with the lowest error at the end."""
    errors = {t.setting: t.error for t in study.grids if t.optimizer == name}
    return min(grid, key=lambda setting: errors[setting.text])
