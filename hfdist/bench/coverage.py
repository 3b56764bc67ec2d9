"""Which model families have right gradients and products, by which engine, and how right.

The reference uses nothing of `hfdist.curvature` but first derivatives: J a row at a time, the loss's
Hessian in the outputs a row at a time, the model called as its user calls it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfdist.bench.families import Family, families
from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector

SEED = 11


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of a family. Errors are relative to the largest element of what is expected."""

    family: Family
    parameters: int
    engine: str
    """What products were computed by, or "refused"."""
    loss_error: float = 0.0
    """The larger of those at the start and of a candidate."""
    gradient_error: float = 0.0
    product_error: float = 0.0
    refusal: str = ""
    """The message, where the family is refused."""

    @property
    def is_right(self) -> bool:
        errors = (self.loss_error, self.gradient_error, self.product_error)
        return not self.refusal and max(errors) <= self.family.tolerance


def run(
    names: Sequence[str] | None = None, progress: Callable[[str], None] = lambda name: None
) -> list[Coverage]:
    """Measure the families whose names contain one of `names`, all by default.

    Raises:
        ValueError: No family has such a name.
    """
    every = families()
    chosen = [f for f in every if names is None or any(n in f"{f.source} {f.name}" for n in names)]
    if not chosen:
        raise ValueError(f"no model family is called {', '.join(names or ())}")
    results = []
    for family in chosen:
        progress(family.name)
        results.append(measure(family))
    return results


def measure(family: Family) -> Coverage:
    """Loss, gradient and two products of a family beside their references."""
    task = family.task()
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = task.model()
        torch.manual_seed(2)
        batch = family.batch()
    params = [p for p in model.parameters() if p.requires_grad]
    vector = ParameterVector(params)
    v = torch.randn(2, vector.numel, dtype=vector.dtype, generator=torch.Generator().manual_seed(3))
    buffers = [b.clone() for b in model.buffers()]

    def plain_loss() -> Tensor:
        return _as_used(model, buffers, lambda: task.loss(task.forward(model, batch), batch))

    def logits() -> Tensor:
        return _as_used(model, buffers, lambda: family.logits(task.forward(model, batch)))

    loss = plain_loss()
    gradient = vector.flatten(_contiguous(grad(loss, params, allow_unused=True)))
    z = logits()
    expected = [reference_product(z, lambda t: family.criterion(t, batch), vector, vk) for vk in v]
    delta = -1e-2 * gradient / gradient.norm()

    role = [from_task(task, model, batch, SEED)]
    engine = ProductEngine()
    problem = Problem(
        params=vector,
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(vector.device, model),
        engine=engine,
    )
    try:
        got_loss, got_gradient = problem.loss_and_gradient()
        B = problem.curvature()
        products = [B(vk.clone()).clone() for vk in v]
        (candidate,) = problem.losses([(1.0, delta)])
    except Exception as error:  # of any library: that it is refused is what is to be told
        first = (str(error).strip().splitlines() or [""])[0]
        return Coverage(
            family=family,
            parameters=vector.numel,
            engine="refused",
            refusal=f"{type(error).__name__}: {first}",
        )
    with vector.at(vector.moved(1.0, delta, vector.zeros())):
        moved = plain_loss().detach()
    return Coverage(
        family=family,
        parameters=vector.numel,
        engine=problem.product_engine,
        loss_error=max(_error(got_loss, loss.detach()), _error(candidate, moved)),
        gradient_error=_error(got_gradient, gradient),
        product_error=max(_error(p, e) for p, e in zip(products, expected)),
    )


def _as_used(model: nn.Module, buffers: Sequence[Tensor], evaluate: Callable[[], Any]) -> Tensor:
    """A forward pass as the model's user makes it; its random numbers and its buffers stand still.

    The attention kernel is the one that has second derivatives: others differ from it by rounding.
    """
    with torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(SEED)
        result = evaluate()
    for buffer, before in zip(model.buffers(), buffers):
        buffer.data.copy_(before)
    return result


def reference_product(
    z: Tensor, criterion: Callable[[Tensor], Tensor], vector: ParameterVector, v: Tensor
) -> Tensor:
    """J' H_L J v [P] of outputs z with M elements, by M backward passes for J and M for H_L."""
    params, views = vector.tensors, vector.views(v)

    def row_times_v(zi: Tensor) -> Tensor:
        row = grad(zi, params, retain_graph=True, allow_unused=True)
        return sum((r * t).sum() for r, t in zip(row, views) if r is not None)  # type: ignore[return-value]

    Jv = torch.stack([row_times_v(zi) for zi in z.reshape(-1)])  # [M]
    leaf = z.detach().clone().requires_grad_()
    (dz,) = grad(criterion(leaf), leaf, create_graph=True)
    H = [grad(d, leaf, retain_graph=True)[0].reshape(-1) for d in dz.reshape(-1)]
    HJv = (torch.stack(H) @ Jv.to(z.dtype)).view_as(z)
    return vector.flatten(_contiguous(grad(z, params, HJv, retain_graph=True, allow_unused=True)))


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _error(got: Any, expected: Tensor) -> float:
    difference = torch.as_tensor(got, dtype=torch.float64) - expected
    largest = float(difference.abs().max()) / max(float(expected.abs().max()), 1e-12)
    return largest if largest == largest else float("inf")


def to_rows(results: Sequence[Coverage]) -> list[dict[str, Any]]:
    """For tables and JSON."""
    return [
        {
            "family": r.family.name,
            "library": r.family.source,
            "parameters": r.parameters,
            "engine": r.engine,
            "loss": r.loss_error,
            "gradient": r.gradient_error,
            "product": r.product_error,
            "note": r.refusal or ("" if r.is_right else "wrong"),
        }
        for r in results
    ]


def write(results: Sequence[Coverage], path: Path) -> None:
    """A page of one table, in Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_markdown(results))


def to_markdown(results: Sequence[Coverage]) -> str:
    right = sum(r.is_right for r in results)
    refused = sum(bool(r.refusal) for r in results)
    lines = [
        "# What is covered",
        "",
        "Written by `hfdist bench coverage --output docs/coverage.md`: tiny random models in float64, whose",
        "loss, gradient and Gauss-Newton products are compared with references that use first derivatives",
        "only (the Jacobian a row at a time). Errors are the largest ones, relative to the largest element",
        "of what is expected. Models that compute their own loss do so in float32.",
        "",
        f"{len(results)} families: {right} right, {refused} refused, "
        f"{len(results) - right - refused} wrong (torch {torch.__version__.partition('+')[0]}, "
        f"{platform.machine()}).",
        "",
        "| Family | Library | Parameters | Engine | Loss | Gradient | Product |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in results:
        errors = [f"{e:.0e}" for e in (r.loss_error, r.gradient_error, r.product_error)]
        if r.refusal:
            errors = [r.refusal.partition(". ")[0], "", ""]
        name = r.family.name + ("" if r.is_right or r.refusal else " (wrong)")
        lines.append(
            f"| {name} | {r.family.source} | {r.parameters:,} | {r.engine} | {' | '.join(errors)} |"
        )
    return "\n".join(lines) + "\n"
