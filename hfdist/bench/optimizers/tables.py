"""Where contenders reach losses: thresholds, first places, ratios to the best rival."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from hfdist.bench.optimizers.curve import MEASURES, Curve, Measure
from hfdist.bench.optimizers.hessian_free import BEST, NAME


def thresholds_of(curves: Sequence[Curve], gradients: float) -> list[float]:
    """Losses that the best curve has reached after a quarter, half and all of the work, rounded up to
    three digits."""
    best = [min(c.loss_at(part * gradients) for c in curves) for part in (0.25, 0.5, 1.0)]
    return sorted({_rounded_up(loss) for loss in best if math.isfinite(loss)}, reverse=True)


def _rounded_up(loss: float) -> float:
    digit = 10.0 ** (math.floor(math.log10(abs(loss))) - 2) if loss else 1.0
    return float(f"{math.ceil(loss / digit - 1e-9) * digit:.3g}")


def first_places(curves: Sequence[Curve], thresholds: Sequence[float]) -> set[str]:
    """Settings that are first, by work, at some threshold; of losses that none reaches, the one with the
    lowest loss."""
    places = set()
    for loss in thresholds:
        best = min(curves, key=lambda c: (c.first(loss, "gradients"), c.lowest))
        places.add(best.setting)
    return places


def rows(curves: Sequence[Curve], thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """A table: per loss and contender the least work, seconds and updates of its settings, means over
    seeds, and their ratios to the best rival's; None where not all seeds reach the loss."""
    found = []
    for loss in thresholds:
        means = {
            name: {measure: _best_mean(of_one, loss, measure) for measure in MEASURES}
            for name, of_one in _by_optimizer(curves).items()
        }
        rivals = [values for name, values in means.items() if name not in (NAME, BEST)]
        best = {m: min((values[m] for values in rivals), default=math.inf) for m in MEASURES}
        for name, values in sorted(means.items(), key=lambda item: item[1]["gradients"]):
            row: dict[str, Any] = {"loss": loss, "optimizer": name}
            row |= {measure: _finite(values[measure]) for measure in MEASURES}
            row |= {
                f"{measure}_ratio": _finite(values[measure] / best[measure])
                if math.isfinite(best[measure]) and best[measure] > 0.0
                else None
                for measure in MEASURES
            }
            found.append(row)
    return found


def own_ratios(
    own: Sequence[Curve], defaults: Sequence[Curve], thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """A table: per loss the default's work and that of the best of Hessian-free's other options, on one
    seed, and their ratio; None where it is not reached."""
    found = []
    for loss in thresholds:
        default = min(c.first(loss, "gradients") for c in defaults)
        best = min([*own, *defaults], key=lambda c: c.first(loss, "gradients"))
        least = best.first(loss, "gradients")
        found.append(
            {
                "loss": loss,
                "defaults": _finite(default),
                "best": _finite(least),
                "of": best.setting if math.isfinite(least) else None,
                "ratio": _finite(default / least) if 0.0 < least < math.inf else None,
            }
        )
    return found


def _best_mean(curves: Sequence[Curve], loss: float, measure: Measure) -> float:
    """The least mean over seeds of one setting."""
    by_setting: dict[str, list[float]] = {}
    for curve in curves:
        by_setting.setdefault(curve.setting, []).append(curve.first(loss, measure))
    return min(statistics.fmean(values) for values in by_setting.values())


def _by_optimizer(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.optimizer, []).append(curve)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
