"""Time curvature products beside torch's own gradient and BackPACK's products, in one interleaved run.

Every repetition runs each contender once, in turn, so that what disturbs the machine disturbs all of
them; medians are compared, as ratios to the gradient of the same run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from hfdist.bench.workloads import Workload, chosen
from hfdist.curvature.engines import (
    DOUBLE_BACKWARD,
    LINEARIZE,
    RECOMPUTE,
    ProductEngine,
)
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import Verifier
from hfdist.devices import synchronize

GGN_ENGINES = (LINEARIZE, DOUBLE_BACKWARD, RECOMPUTE)
GGN_FLOOR, HESSIAN_FLOOR = 4 / 3, 2.0
"""Matrix products of a product over those of a gradient, layer for layer, with kept activations."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender on one workload."""

    workload: str
    product: str
    """"gradient", "ggn" or "hessian"."""
    by: str
    """Engine, or whose call it is."""
    seconds: float
    """Median."""
    gradients: float
    """Relative to torch's gradient (forward and backward pass) in the same run."""
    error: float
    """|product - BackPACK's| / |BackPACK's|; 0 for gradients."""
    preparation: float = 0.0
    """What the engine does before a step's first product (forward pass and gradient, and the program where
    there is one), in seconds."""


def problem(workload: Workload, model: torch.nn.Module, batch: Any, **settings: Any) -> Problem:
    """One batch of the workload in all roles."""
    role = [from_task(workload.task, model, batch, seed=0)]
    params = ParameterVector(model.parameters())
    return Problem(
        params=params,
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction=workload.task.loss_reduction,
        frozen=FixedRandomness(params.device, model),
        **settings,
    )


def loss_of(workload: Workload, outputs: Any, batch: Any) -> Tensor:
    """The workload's mean loss."""
    value = workload.task.loss(outputs, batch)
    return value[0] / value[1] if isinstance(value, tuple) else value


def measure(
    workload: Workload,
    repetitions: int,
    device: torch.device,
    hessian: bool = True,
) -> list[Timing]:
    """Time all contenders on one workload."""
    from backpack.hessianfree.ggnvp import ggn_vector_product
    from backpack.hessianfree.hvp import hessian_vector_product

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = workload.task.model().to(device).train(workload.training)
        batch = torch.utils._pytree.tree_map(lambda t: t.to(device), workload.batch())
        v = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    tensors = list(model.parameters())
    params = ParameterVector(tensors)
    views = params.views(v)

    def gradient() -> Any:
        return grad(loss_of(workload, workload.task.forward(model, batch), batch), tensors)

    # As PyTorchHessianFree calls them: the forward pass is shared by the step's products.
    with FixedRandomness(device, model).evaluation(0):
        outputs = workload.task.forward(model, batch)
        loss = loss_of(workload, outputs, batch)

    contenders: dict[tuple[str, str], Callable[[], Any]] = {
        ("gradient", "torch"): gradient,
        ("ggn", "backpack"): lambda: ggn_vector_product(loss, outputs, model, views),
    }
    preparations: dict[str, float] = {}
    for name in GGN_ENGINES:
        product = _product(workload, model, batch, v, name, "ggn")
        if product is None:
            continue
        contenders["ggn", name] = product
        synchronize(device)
        start = time.perf_counter()
        problem(workload, model, batch, engine=_engine(name)).loss_and_gradient()
        synchronize(device)
        preparations[name] = time.perf_counter() - start
    if hessian:
        contenders["hessian", "backpack"] = lambda: hessian_vector_product(loss, tensors, views)
        product = _product(workload, model, batch, v, DOUBLE_BACKWARD, "hessian")
        assert product is not None
        contenders["hessian", DOUBLE_BACKWARD] = product
    reference = {
        kind: params.flatten(contenders[kind, "backpack"]())
        for kind in ("ggn", "hessian")
        if (kind, "backpack") in contenders
    }
    seconds = medians(list(contenders.values()), repetitions, device)
    timings = []
    for (kind, by), f, s in zip(contenders, contenders.values(), seconds):
        error = 0.0
        if kind in reference and by != "backpack":
            error = float((f() - reference[kind]).norm() / reference[kind].norm())
        timings.append(
            Timing(
                workload=workload.name,
                product=kind,
                by=by,
                seconds=s,
                gradients=s / seconds[0],
                error=error,
                preparation=preparations.get(by, 0.0) if kind == "ggn" else 0.0,
            )
        )
    return timings


def _engine(name: str) -> ProductEngine:
    """Without the checks of a first step, which every other step does without."""
    return ProductEngine(requested=name, verifier=Verifier(mode="off"))


def _product(
    workload: Workload, model: torch.nn.Module, batch: Any, v: Tensor, engine: str, kind: Any
) -> Callable[[], Tensor] | None:
    """v -> Bv; None where the engine cannot have this model on this machine."""
    p = problem(workload, model, batch, curvature_opt=kind, engine=_engine(engine))
    p.loss_and_gradient()
    B = p.curvature()
    if p.product_engine != engine:
        return None
    return lambda: B(v)


def medians(
    functions: Sequence[Callable[[], Any]], repetitions: int, device: torch.device
) -> list[float]:
    """Median seconds of each function, called in turn; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in functions]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for repetition in range(repetitions + 1):
            for times, f in zip(seconds, functions):
                synchronize(device)
                start = time.perf_counter()
                f()
                synchronize(device)
                if repetition > 0:
                    times.append(time.perf_counter() - start)
    finally:
        if was_enabled:
            gc.enable()
    return [statistics.median(times) for times in seconds]


def run(
    names: Sequence[str] | None = None,
    *,
    repetitions: int = 7,
    threads: int | None = None,
    device: torch.device | None = None,
    hessian: bool = True,
) -> list[Timing]:
    """Time products on the workloads.

    Args:
        names: Of workloads; all by default.
        repetitions: Rounds that count.
        threads: Of torch; left alone by default.
        device: The CPU by default.
        hessian: Time Hessian products too.

    Raises:
        ValueError: An unknown workload.
    """
    timings = []
    with chosen(names, threads) as these:
        for workload in these:
            timings += measure(workload, repetitions, device or torch.device("cpu"), hessian)
    return timings


def to_rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """A table, one row a contender."""
    return [asdict(t) for t in timings]


def plot(timings: Sequence[Timing], path: Path) -> Path:
    """Gradients a product, a group of bars a workload, with the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {(t.workload, t.product, t.by): t.gradients for t in timings}
    kinds = [k for k in ("ggn", "hessian") if any(t.product == k for t in timings)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(6.5 * len(kinds), 4), squeeze=False)
    for (
        axis,
        kind,
    ) in zip(axes[0], kinds):
        names = list(dict.fromkeys(t.workload for t in timings))
        contenders = list(dict.fromkeys(t.by for t in timings if t.product == kind))
        for k, by in enumerate(contenders):
            heights = [found.get((n, kind, by), 0.0) for n in names]
            width = 0.8 / len(contenders)
            positions = [i - 0.4 + (k + 0.5) * width for i in range(len(names))]
            axis.bar(positions, heights, width, label=by)
        floor = GGN_FLOOR if kind == "ggn" else HESSIAN_FLOOR
        axis.axhline(floor, color="black", linestyle=":", label="floor, layer for layer")
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel("gradients a product")
        axis.set_title({"ggn": "Gauss-Newton product", "hessian": "Hessian product"}[kind])
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
