"""Loss against work, seconds and updates."""

from __future__ import annotations

import math
from pathlib import Path

from hfdist.bench.optimizers.curve import MEASURES
from hfdist.bench.optimizers.hessian_free import NAME
from hfdist.bench.optimizers.study import Study

_LABELS = {
    "gradients": "gradient-equivalents of the batch",
    "seconds": "seconds, in turns",
    "updates": "updates",
}


def plot(study: Study, path: Path) -> Path:
    """Every contender of the races, all seeds; of a rival with several settings the one with the lowest
    loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = study.races or study.grids
    shown = {}
    for curve in sorted(curves, key=lambda c: c.lowest, reverse=True):
        shown[curve.optimizer] = curve.setting
    order = sorted(shown, key=lambda name: (name != NAME, name))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, measure in zip(axes, MEASURES):
        for number, name in enumerate(order):
            mine = [c for c in curves if (c.optimizer, c.setting) == (name, shown[name])]
            for k, curve in enumerate(mine):
                axis.plot(
                    getattr(curve, measure),
                    [loss if math.isfinite(loss) else math.nan for loss in curve.losses],
                    color=f"C{number}",
                    label=f"{name} ({shown[name]})" if k == 0 else None,
                    linewidth=2.2 if name == NAME else 1.2,
                    alpha=1.0 if k == 0 else 0.5,
                )
        axis.set_yscale("log")
        axis.set_xlabel(_LABELS[measure])
        axis.grid(alpha=0.3, which="both")
        axis.set_xlim(left=0 if measure == "seconds" else 1)
        if measure != "seconds":
            axis.set_xscale("log")
        for loss in study.thresholds:
            axis.axhline(loss, color="grey", linewidth=0.5)
    lowest = min(curve.lowest for curve in curves)
    first = max(curve.losses[0] for curve in curves)
    axes[0].set_ylim(lowest * 0.97, first * 1.05)
    axes[0].set_ylabel("training loss")
    axes[-1].legend(fontsize=8)
    figure.suptitle(study.problem)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
