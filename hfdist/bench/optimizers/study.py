"""The protocol: grids of the rivals on the first seed, then the best of each in turns with Hessian-free.

Curves of the grids are kept in the study's file and not measured again: only Hessian-free changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfdist.bench.optimizers.arena import Arena, Budget, race
from hfdist.bench.optimizers.curve import Curve
from hfdist.bench.optimizers.hessian_free import BEST, GRID, hessian_free
from hfdist.bench.optimizers.rivals import Setting, enter, rivals
from hfdist.bench.optimizers.tables import first_places, thresholds_of
from hfdist.config.job import RunConfig, with_overrides
from hfdist.rundir.files import write_atomically


@dataclass(kw_only=True)
class Study:
    """Curves on one problem."""

    problem: str
    job: dict[str, Any]
    """What the curves belong to: task, arguments, sizes, L2 coefficient, type."""
    budget: Budget
    thresholds: list[float]
    """Losses that contenders are compared at, falling."""
    grids: list[Curve] = field(default_factory=list)
    """Rivals' settings, each alone, on the first seed."""
    own: list[Curve] = field(default_factory=list)
    """Hessian-free with other options than its defaults, each alone, on the first seed."""
    races: list[Curve] = field(default_factory=list)
    """Hessian-free and each rival's best settings, in turns, on all seeds."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        values = {
            "problem": self.problem,
            "job": self.job,
            "budget": asdict(self.budget),
            "thresholds": self.thresholds,
            "grids": [curve.to_dict() for curve in self.grids],
            "own": [curve.to_dict() for curve in self.own],
            "races": [curve.to_dict() for curve in self.races],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(values))

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        values["budget"] = Budget(**values["budget"])
        for key in ("grids", "own", "races"):
            values[key] = [Curve(**curve) for curve in values.get(key, [])]
        return cls(**values)


def compare(
    problem: str,
    config: RunConfig,
    *,
    budget: Budget,
    seeds: Sequence[int],
    names: Sequence[str] | None = None,
    thresholds: Sequence[float] = (),
    path: Path | None = None,
    with_hessian_free: bool = True,
    with_own_grid: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Study:
    """Run them all.

    Args:
        problem: What the table calls it.
        config: Task, sizes and rules of the Hessian-free step.
        budget: Of every contender.
        seeds: Of the initialisations; the grids are searched on the first.
        names: Rivals; None: all that can run.
        thresholds: Losses to compare at; by default what the best rival has reached after a quarter, half
            and all of the budget.
        path: File of the study; curves of grids that it has, of the same job and budget, are kept.
        with_hessian_free: Whether Hessian-free takes part in the races.
        with_own_grid: Also try other options of Hessian-free than its own.
        progress: Told of every contender.
    """
    first, *others = (config.model_copy(update={"seed": seed}) for seed in seeds)
    arena = Arena(first)
    grids = rivals(arena, names)
    study = Study(problem=problem, job=identity(config), budget=budget, thresholds=[])
    known: dict[tuple[str, str, int], Curve] = {}
    if path is not None and path.is_file():
        former = Study.load(path)
        if former.job == study.job and former.budget == budget:
            known = {(c.optimizer, c.setting, c.seed): c for c in former.grids}
    for name, settings in grids.items():
        for setting in settings:
            curve = known.get((name, setting.text, first.seed))
            if curve is None:
                (curve,) = race(arena, [enter(arena, name, setting, budget.spent)], budget)
                progress(f"seed {first.seed}, {name} ({setting.text}): {curve.lowest:.5g}")
            study.grids.append(curve)
            if path is not None:
                study.save(path)
    study.thresholds = list(thresholds) or thresholds_of(study.grids, budget.gradients)
    for changes in GRID if with_own_grid else ():
        changed = with_overrides(first, changes.split())
        study.own += race(arena, [hessian_free(changed, BEST, changes)], budget)
        progress(f"seed {first.seed}, Hessian-free ({changes}): {study.own[-1].lowest:.5g}")
    best = _best_settings(study, grids)
    for job in (first, *others):
        arena = Arena(job)
        runs = [enter(arena, name, setting, budget.spent) for name, setting in best]
        if with_hessian_free:
            runs.insert(0, hessian_free(job))
        study.races += race(arena, runs, budget)
        for run in runs:
            curve = run.curve
            progress(
                f"seed {job.seed}, {curve.optimizer} ({curve.setting}): {curve.lowest:.5g}, in turns"
            )
        if path is not None:
            study.save(path)
    return study


def _best_settings(study: Study, grids: dict[str, list[Setting]]) -> list[tuple[str, Setting]]:
    """Of every rival the settings that come first at some threshold."""
    best = []
    for name, settings in grids.items():
        of_rival = [curve for curve in study.grids if curve.optimizer == name]
        firsts = first_places(of_rival, study.thresholds)
        best += [(name, setting) for setting in settings if setting.text in firsts]
    return best


def identity(config: RunConfig) -> dict[str, Any]:
    """What curves belong to: task, arguments, L2 coefficient, type."""
    return {
        "task": config.task,
        "task_args": config.task_args,
        "weight_decay": config.optim.weight_decay,
        "dtype": config.dtype,
    }
