"""Pictures of a run from its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hfdist.imports import without_collection

Record = Mapping[str, Any]

# Okabe & Ito's colours, told apart by colour-blind readers; line styles and markers differ as well.
_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_CURVES = 6  # steps whose solves are drawn
_FLOOR = 1e-3  # where a CG curve leaves the picture
_RATIOS = (-0.5, 2.0)  # a model that is far off must not flatten the picture
_SMALLEST, _LARGEST = 1e-100, 1e100  # axes have margins, whose limits must be finite, too
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
}


def draw_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw convergence.png, cg.png and damping.png.

    Args:
        records: Lines of metrics.jsonl; what one lacks is left out of the picture, and so is what no axis
            can show: infinity, NaN, and numbers close to the largest and smallest that there are.
        folder: Made if there is none.

    Returns:
        The files; none without records.
    """
    if not records:
        return []
    records = [_drawable(record) for record in records]
    # Figures of their own, without pyplot: a user's backend and open figures stay as they are.
    with without_collection():
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, tuple[int, Callable[[Sequence[Any], Sequence[Record]], None]]] = {
        "convergence": (3, _convergence),
        "cg": (2, _cg),
        "damping": (2, _damping),
    }
    paths = []
    for name, (panels, draw) in drawings.items():
        with rc_context(_STYLE):
            width, height = 1.2 + 3.9 * panels, 3.9
            figure = Figure(figsize=(width, height))
            FigureCanvasAgg(figure)
            # Margins in inches: a layout engine draws everything twice to find them.
            figure.subplots_adjust(
                left=0.8 / width,
                right=1 - 0.2 / width,
                bottom=0.6 / height,
                top=1 - 0.4 / height,
                wspace=0.1 if name == "convergence" else 0.22,
            )
            axes = figure.subplots(1, panels, sharey=name == "convergence")
            draw(axes, records)
            for axis in axes:
                if "step" in axis.get_xlabel() or "CG" in axis.get_xlabel():
                    axis.xaxis.get_major_locator().set_params(integer=True)
            path = folder / f"{name}.png"
            figure.savefig(path)
            paths.append(path)
    return paths


def _drawable(record: Record) -> Record:
    """A record without the numbers that an axis cannot show."""
    curve = record.get("quadratic", ())
    shown = {k: v for k, v in record.items() if not isinstance(v, (int, float)) or _can_show(v)}
    return shown | {"quadratic": curve if all(map(_can_show, curve)) else ()}


def _can_show(value: float) -> bool:
    return value == 0 or _SMALLEST < abs(value) < _LARGEST  # False for NaN


def _convergence(axes: Sequence[Any], records: Sequence[Record]) -> None:
    """Training and evaluation loss against what they cost."""
    units: tuple[tuple[str, Callable[[Record], float]], ...] = (
        ("steps", lambda r: r["step"] + 1),
        ("seconds of training", lambda r: r.get("wall_seconds", 0.0)),
        ("effective data passes", lambda r: r.get("data_passes", r["step"] + 1)),
    )
    if any("examples" in r for r in records):  # of a stream
        units = (*units[:2], ("training examples", lambda r: r.get("examples", 0.0)))
    trained = [r for r in records if "final_loss" in r]
    evaluated = _evaluations(records)
    start = [records[0]["loss"]] if records[0]["step"] == 0 and "loss" in records[0] else []
    losses = start + [r["final_loss"] for r in trained]
    evaluations = [r["eval/loss"] for r in evaluated]
    for axis, (label, x) in zip(axes, units):
        axis.plot(
            [0.0] * len(start) + [x(r) for r in trained],
            losses,
            color=_BLUE,
            label="training batch",
        )
        if evaluated:
            axis.plot(
                [x(r) for r in evaluated],
                evaluations,
                color=_ORANGE,
                linestyle="--",
                marker="o",
                markersize=3.5,
                markevery=max(1, len(evaluated) // 40),  # so many that they stand apart
                label="evaluation data",
            )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        if min(losses + evaluations, default=0.0) > 0:
            _log_scale(axis)
    axes[0].set_ylabel("loss")
    axes[0].legend()


def _evaluations(records: Sequence[Record]) -> list[Record]:
    """Records of steps that were evaluated: those between carry the last evaluation along."""
    known = [r for r in records if "eval/loss" in r]
    return known[:1] + [b for a, b in pairwise(known) if _evaluation(a) != _evaluation(b)]


def _evaluation(record: Record) -> dict[str, float]:
    return {k: v for k, v in record.items() if k.startswith("eval/")}


def _cg(axes: Sequence[Any], records: Sequence[Record]) -> None:
    """How the quadratic model falls in the solves of some steps, and how long the solves are."""
    from matplotlib import colormaps

    falls = [(r["step"], fall) for r in records if (fall := _fall(r.get("quadratic", ())))]
    count = min(_CURVES, len(falls))
    chosen = dict.fromkeys(round(k * (len(falls) - 1) / max(count - 1, 1)) for k in range(count))
    colours = colormaps["viridis"]
    for k, index in enumerate(chosen):
        step, fall = falls[index]
        colour = colours(0.9 * k / max(count - 1, 1))
        axes[0].plot(range(len(fall)), fall, color=colour, label=f"step {step}")
    axes[0].set(
        xlabel="CG iteration i",
        ylabel=r"$(\phi_i - \phi_{end})\,/\,(\phi_0 - \phi_{end})$",
        title="Quadratic model $\\phi$ still to fall, in some steps",
    )
    if falls:
        axes[0].set_yscale("log")
        axes[0].set_ylim(_FLOOR, 1.5)
        axes[0].set_xlim(left=0)
        axes[0].legend(fontsize=9)
    for key, shade, style, label in (
        ("cg_iterations", _BLUE, "-", "until CG stopped"),
        ("chosen_iterate", _ORANGE, "--", "iterate that was chosen"),
    ):
        known = [r for r in records if key in r]
        axes[1].plot(
            [r["step"] for r in known],
            [r[key] for r in known],
            color=shade,
            linestyle=style,
            label=label,
        )
    axes[1].set(xlabel="step", ylabel="CG iterations", title="Length of the solves")
    axes[1].set_ylim(bottom=0)
    axes[1].legend()


def _fall(phi: Sequence[float]) -> list[float]:
    """What is left of the model's fall after each iteration, 1 at the start; empty if it does not fall.
    The last iteration, at 0, is left out."""
    if len(phi) < 3 or not phi[0] > phi[-1]:
        return []
    whole = phi[0] - phi[-1]
    return [max((value - phi[-1]) / whole, 0.0) or _FLOOR / 10 for value in phi[:-1]]


def _damping(axes: Sequence[Any], records: Sequence[Record]) -> None:
    """The damping and the ratio that it follows."""
    damped = [r for r in records if "damping" in r]
    axes[0].step(
        [r["step"] for r in damped], [r["damping"] for r in damped], where="mid", color=_GREEN
    )
    if damped and min(r["damping"] for r in damped) > 0:
        _log_scale(axes[0])
    axes[0].set(xlabel="step", ylabel=r"$\lambda$", title="Damping")
    known = [r for r in records if "reduction_ratio" in r]
    low, high = _RATIOS
    for accepted, colour, marker, label in (
        (True, _BLUE, "o", "accepted"),
        (False, _PINK, "X", "rejected"),
    ):
        chosen = [r for r in known if bool(r.get("accepted")) is accepted]
        inside = [r for r in chosen if low < r["reduction_ratio"] < high]
        if chosen:
            axes[1].plot(
                [r["step"] for r in inside],
                [r["reduction_ratio"] for r in inside],
                marker,
                markersize=4.5,
                color=colour,
                label=label,
            )
        for edge, arrow in ((low, "v"), (high, "^")):
            beyond = [
                r
                for r in chosen
                if (r["reduction_ratio"] <= low if edge == low else r["reduction_ratio"] >= high)
            ]
            if beyond:
                axes[1].plot(
                    [r["step"] for r in beyond],
                    [edge] * len(beyond),
                    arrow,
                    color=colour,
                    clip_on=False,
                )
    axes[1].axhline(1.0, color="0.6", linewidth=1.0)
    for bound in (0.25, 0.75):  # between the usual bounds the damping stays as it is
        axes[1].axhline(bound, color="0.5", linewidth=1.0, linestyle=":")
    axes[1].set(
        xlabel="step",
        ylabel="actual / predicted reduction",
        title="Reduction ratio (dotted: 1/4, 3/4)",
        ylim=_RATIOS,
    )
    if known:
        axes[1].legend(loc="upper right")


def _log_scale(axis: Any) -> None:
    """A logarithmic axis whose labels are plain numbers where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high / low < 300:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if high / low < 20 else (1.0, 2.0, 5.0)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
