"""A picture of a solution in the plane, and of its error."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_solution(model: nn.Module, points: Tensor, exact: Tensor, path: Path) -> Path:
    """Model, and model minus solution, over points [n, 2]; the first output if there are several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    example = next(model.parameters())
    n = len(points)
    u = model(points.to(example)).reshape(n, -1)[:, 0].double().cpu()
    error = u - exact.reshape(n, -1)[:, 0].double().cpu()
    x, y = points[:, 0].double().cpu(), points[:, 1].double().cpu()
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    rms = float(error.square().mean().sqrt())
    for axis, values, title, colors in zip(
        figure.subplots(1, 2),
        (u, error),
        ("solution", f"error (RMS {rms:.1e})"),
        ("viridis", "RdBu"),
    ):
        bound = float(error.abs().max()) or 1.0
        limits = {"vmin": -bound, "vmax": bound} if colors == "RdBu" else {}
        image = axis.tripcolor(x, y, values, shading="gouraud", cmap=colors, **limits)
        figure.colorbar(image, ax=axis)
        axis.set_title(title)
        axis.set_xlabel("first coordinate")
    figure.axes[0].set_ylabel("second coordinate")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
