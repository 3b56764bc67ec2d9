"""Pictures of a run from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

_CURVES = 6  # steps whose solves are drawn
# Okabe & Ito's colours, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def draw_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw convergence.png, cg.png and damping.png.

    Args:
        records: Lines of metrics.jsonl.
        folder: Made if there is none.

    Returns:
        The files.
    """
    if not records:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    drawings = {"convergence": _convergence, "cg": _cg_curves, "damping": _damping}
    with plt.rc_context({"axes.grid": True, "grid.alpha": 0.3, "font.size": 10}):
        for name, draw in drawings.items():
            figure = draw(plt, records)
            figure.tight_layout()
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
            plt.close(figure)
    return paths


def _convergence(plt: Any, records: Sequence[Record]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    evaluated = [r for r in records if "eval/loss" in r]
    losses = [r["final_loss"] for r in records if "final_loss" in r]
    losses += [r["eval/loss"] for r in evaluated]
    for axis, label, x in (
        (axes[0], "steps", lambda r: r["step"] + 1),
        (axes[1], "seconds", lambda r: r["wall_seconds"]),
        (axes[2], "effective data passes", lambda r: r.get("data_passes", r["step"] + 1)),
    ):
        trained = [r for r in records if "final_loss" in r]
        axis.plot(
            [x(r) for r in trained],
            [r["final_loss"] for r in trained],
            color=_BLUE,
            label="training batch",
        )
        if evaluated:
            axis.plot(
                [x(r) for r in evaluated],
                [r["eval/loss"] for r in evaluated],
                color=_ORANGE,
                linestyle="--",
                label="evaluation data",
            )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        if losses and min(losses) > 0:
            axis.set_yscale("log")
    axes[0].set_ylabel("loss")
    axes[0].legend()
    figure.suptitle("Convergence")
    return figure


def _cg_curves(plt: Any, records: Sequence[Record]) -> Any:
    """phi of chosen steps, relative to where the solve ended: how fast the model falls."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    solved = [r for r in records if len(r.get("quadratic", ())) > 1]
    count = min(_CURVES, len(solved))
    places = [round(k * (len(solved) - 1) / max(count - 1, 1)) for k in range(count)]
    colours = plt.get_cmap("viridis")
    for k, place in enumerate(dict.fromkeys(places)):
        record = solved[place]
        phi = record["quadratic"]
        axes[0].plot(
            range(len(phi)), phi, color=colours(0.9 * k / _CURVES), label=f"step {record['step']}"
        )
    axes[0].set(
        xlabel="CG iteration", ylabel="quadratic model", title="Conjugate gradients of some steps"
    )
    axes[0].set_yscale("symlog", linthresh=1e-3)
    if solved:
        axes[0].legend(fontsize=8)
    steps = [r["step"] for r in records]
    axes[1].plot(
        steps, [r.get("cg_iterations", 0) for r in records], color=_BLUE, label="iterations"
    )
    axes[1].plot(
        steps,
        [r.get("chosen_iterate", 0) for r in records],
        color=_ORANGE,
        linestyle="--",
        label="chosen iterate",
    )
    axes[1].set(xlabel="step", ylabel="CG iterations", title="Iterations, and the one chosen")
    axes[1].legend()
    return figure


def _damping(plt: Any, records: Sequence[Record]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    steps = [r["step"] for r in records]
    damping = [r.get("damping", 0.0) for r in records]
    axes[0].plot(steps, damping, color=_GREEN)
    if damping and min(damping) > 0:
        axes[0].set_yscale("log")
    axes[0].set(xlabel="step", ylabel="lambda", title="Damping")
    known = [r for r in records if "reduction_ratio" in r]
    accepted = [r for r in known if r.get("accepted")]
    rejected = [r for r in known if not r.get("accepted")]
    for chosen, colour, label in ((accepted, _BLUE, "accepted"), (rejected, _PINK, "rejected")):
        if chosen:
            axes[1].plot(
                [r["step"] for r in chosen],
                [r["reduction_ratio"] for r in chosen],
                ".",
                color=colour,
                label=label,
            )
    for bound in (0.25, 0.75):
        axes[1].axhline(bound, color="0.5", linewidth=1, linestyle=":")
    # A model that is far off must not flatten the picture.
    axes[1].set(xlabel="step", ylabel="actual / predicted reduction", title="Reduction ratio")
    axes[1].set_ylim(-0.5, 2.0)
    if known:
        axes[1].legend()
    return figure
