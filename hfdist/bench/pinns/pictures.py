"""Errors by seconds, a panel a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hfdist.bench.optimizers.hessian_free import NAME
from hfdist.bench.pinns.study import Study


def plot(studies: Sequence[Study], path: Path) -> Path:
    """All contenders of the races, all seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(studies) == 4 else min(len(studies), 3)
    lines = math.ceil(len(studies) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 3.1 * lines + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    others = sorted({t.optimizer for study in studies for t in study.races} - {NAME})
    names = [NAME, *others]
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, study in zip(axes.flat, studies):
        for trace in study.races:
            is_own = trace.optimizer == NAME
            axis.plot(
                trace.seconds,
                [error if math.isfinite(error) else math.nan for error in trace.errors],
                color=f"C{names.index(trace.optimizer)}",
                linewidth=2.0 if is_own else 1.1,
                alpha=0.9 if is_own else 0.7,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(study.problem)
        axis.set_xlabel("CPU seconds" if study.clock == "cpu" else "seconds, in turns")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(studies) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("relative error in L2")
    handles = [
        figure.axes[0].plot([], [], color=f"C{k}", linewidth=2.0, label=name)[0]
        for k, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
