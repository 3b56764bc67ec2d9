"""Errors of the contenders, as rows and as a table of a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from hfdist.bench.optimizers.hessian_free import NAME
from hfdist.bench.pinns.study import Study
from hfdist.bench.pinns.trace import Trace

PARTS = {"error_quarter": 0.25, "error_half": 0.5}


def rows(study: Study) -> list[dict[str, Any]]:
    """A row a contender, the best first: medians over seeds of the relative error after a quarter, half and
    all of the seconds, the worst seed's, updates, and seconds until the best rival's error at the end. None
    where there is no number."""
    by_name: dict[str, list[Trace]] = {}
    for trace in study.races:
        by_name.setdefault(trace.optimizer, []).append(trace)
    finals = {name: statistics.median(t.error for t in of) for name, of in by_name.items()}
    goal = min((error for name, error in finals.items() if name != NAME), default=math.nan)
    found = []
    for name in sorted(by_name, key=finals.__getitem__):
        traces = by_name[name]
        row: dict[str, Any] = {"optimizer": name, "setting": traces[0].setting}
        row |= {
            key: _median([t.error_at(part * study.seconds) for t in traces])
            for key, part in PARTS.items()
        }
        row["error"] = _finite(finals[name])
        row["worst"] = _finite(max(t.error for t in traces))
        row["updates"] = round(statistics.median(t.updates for t in traces))
        row["seconds_to_best_rival"] = _median([t.first(goal) for t in traces])
        found.append(row)
    return found


def markdown(studies: Sequence[Study], descriptions: dict[str, str]) -> str:
    """A row a problem, a column a contender: median error at the end, and the worst seed's."""
    names = list(dict.fromkeys(t.optimizer for study in studies for t in study.races))
    lines = [
        f"| problem | budget | seeds | {' | '.join(names)} | {NAME} at the best rival's error after |",
        "|---" * (len(names) + 4) + "|",
    ]
    for study in studies:
        by_name = {row["optimizer"]: row for row in rows(study)}
        best = min((row["error"] for row in by_name.values() if row["error"]), default=None)
        unit = "CPU s" if study.clock == "cpu" else "s"
        cells = [descriptions.get(study.problem, study.problem), f"{study.seconds:g} {unit}"]
        cells.append(str(len({trace.seed for trace in study.races})))
        for name in names:
            row = by_name.get(name)
            cells.append("" if row is None else _cell(row, row["error"] == best))
        own = by_name.get(NAME, {}).get("seconds_to_best_rival")
        cells.append("not reached" if own is None else f"{own:.1f} {unit}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], is_best: bool) -> str:
    error = _short(row["error"])
    return f"{f'**{error}**' if is_best else error} ({_short(row['worst'])})"


def _short(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def _median(values: Sequence[float]) -> float | None:
    return _finite(statistics.median(values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
