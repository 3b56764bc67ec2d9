"""Time whole steps beside the same steps on BackPACK's products, and measure their memory.

Both follow PyTorchHessianFree's rules with the same number of CG iterations; only the product differs. As
PyTorchHessianFree does, BackPACK's step evaluates the model once for the products of `step`, and for
every minibatch and product of `acc_step`.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hfdist.bench.products import loss_of, medians, problem
from hfdist.bench.workloads import Workload, chosen, workloads
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.layout import Replicated
from hfdist.curvature.params import ParameterVector
from hfdist.devices import (
    allocated_memory,
    is_accelerator,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from hfdist.hessian_free import HessianFree
from hfdist.optim.options import HFOptions
from hfdist.optim.solvers.cg import CGResult, cg

How = Literal["hfdist", "lean", "backpack"]
"""Our step, ours with a memory budget of zero and iterates in bfloat16, or the same step on BackPACK's
products."""


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """One way to take steps on one workload."""

    workload: str
    kind: str
    """"step", or "acc_step" on 8 minibatches."""
    by: str
    seconds: float
    """Median of a step."""
    speedup: float
    """Over BackPACK's."""
    peak_bytes: int
    """Memory of a step beyond what model and data take; 0 if it was not measured."""
    relative_memory: float
    """Relative to BackPACK's."""
    phases: dict[str, float]
    """Median seconds by phase."""
    solver_share: float
    """Part of a CG iteration that is no product."""


@dataclass(kw_only=True)
class _Runner:
    """Takes the same step again and again, from the same start."""

    workload: Workload
    how: How
    cg_iterations: int
    minibatches: int
    device: torch.device

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = self.workload.task.model().to(self.device).train(self.workload.training)
            self.batch = tree_map(lambda t: t.to(self.device), self.workload.batch())
        self._start = copy.deepcopy(self.model.state_dict())

    def __call__(self) -> HessianFree:
        """One step from the start."""
        self.model.load_state_dict(self._start)
        optimizer = HessianFree(
            self.model.parameters(),
            preset="pytorch_hessianfree",
            cg_max_iter=self.cg_iterations,
            cg_tol=0.0,
            cg_stop_eps=0.0,
            memory_budget=0 if self.how == "lean" else None,
            cg_iterates="bfloat16" if self.how == "lean" else "full",
        )
        if self.minibatches == 1:
            mvp = self._backpack_product() if self.how == "backpack" else None
            optimizer.step(self._forward, mvp=mvp)
        else:
            self._acc_step(optimizer)
        return optimizer

    def _forward(self) -> tuple[Tensor, Any]:
        outputs = self.workload.task.forward(self.model, self.batch)
        return loss_of(self.workload, outputs, self.batch), outputs

    def _backpack_product(self) -> Callable[[Tensor], Tensor]:
        from backpack.hessianfree.ggnvp import ggn_vector_product

        params = ParameterVector(self.model.parameters())
        with FixedRandomness(self.device, self.model).evaluation(0):
            loss, outputs = self._forward()
        return lambda v: params.flatten(
            ggn_vector_product(loss, outputs, self.model, params.views(v))
        )

    def _acc_step(self, optimizer: HessianFree) -> None:
        parts = list(zip(*(t.chunk(self.minibatches) for t in self.batch)))
        data = [(part[0], part) for part in parts]
        wrapped = _FirstInput(self.model)

        def loss_func(outputs: Any, part: Any) -> Tensor:
            return loss_of(self.workload, outputs, part)

        if self.how != "backpack":
            optimizer.acc_step(wrapped, loss_func, data)
            return
        from backpack.hessianfree.ggnvp import ggn_vector_product

        params = ParameterVector(self.model.parameters())

        def product(v: Tensor) -> Tensor:
            total, views = params.zeros(), params.views(v)
            for x, part in data:
                with FixedRandomness(self.device, self.model).evaluation(0):
                    outputs = self.model(x)
                    loss = loss_func(outputs, part)
                total += params.flatten(ggn_vector_product(loss, outputs, self.model, views))
            return total.div_(len(data))

        def forward() -> tuple[Tensor, None]:
            # PyTorchHessianFree's losses and gradients also go over the minibatches one by one.
            losses = [loss_func(self.model(x), part) for x, part in data]
            return torch.stack(losses).mean(), None

        optimizer.step(forward, mvp=product)


class _FirstInput(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def measure(
    workload: Workload,
    *,
    repetitions: int,
    cg_iterations: int,
    minibatches: int,
    device: torch.device,
    memory: bool,
) -> list[StepTiming]:
    """Our steps and BackPACK's, in turn; memory in processes of their own."""
    ways: tuple[How, ...] = ("hfdist", "backpack")
    runners = {how: _Runner(workload=workload, how=how, cg_iterations=cg_iterations,
                            minibatches=minibatches, device=device) for how in ways}  # fmt: skip
    seconds: dict[How, list[float]] = {how: [] for how in ways}
    phases: dict[How, list[dict[str, float]]] = {how: [] for how in ways}
    iterations: dict[How, int] = {}
    for repetition in range(repetitions + 1):
        for how, runner in runners.items():
            synchronize(device)
            start = time.perf_counter()
            report = runner().report
            synchronize(device)
            assert report is not None
            iterations[how] = report.cg_iterations
            if repetition > 0:
                seconds[how].append(time.perf_counter() - start)
                phases[how].append(report.seconds)
    if len(set(iterations.values())) > 1:
        raise RuntimeError(
            f"{workload.name}: CG took different numbers of iterations: {iterations}"
        )
    kind = "step" if minibatches == 1 else f"acc_step on {minibatches}"
    median = {how: statistics.median(seconds[how]) for how in ways}
    peaks: dict[str, int] = {}
    if memory:
        for name in ("hfdist", "lean", "backpack"):
            peaks[name] = _peak_in_process(workload.name, name, cg_iterations, minibatches, device)
    share = solver_share(workload, repetitions=repetitions, device=device)
    results = []
    reported: list[How] = [*ways, *(["lean"] if memory else [])]  # type: ignore[list-item]
    for how in reported:
        known = how in median
        results.append(
            StepTiming(
                workload=workload.name,
                kind=kind,
                by=how,
                seconds=median[how] if known else float("nan"),
                speedup=median["backpack"] / median[how] if known else float("nan"),
                peak_bytes=peaks.get(how, 0),
                relative_memory=peaks[how] / peaks["backpack"] if memory else float("nan"),
                phases={
                    key: statistics.median(p.get(key, 0.0) for p in phases[how])
                    for key in (phases[how][0] if known else {})
                },
                solver_share=share if how == "hfdist" else float("nan"),
            )
        )
    return results


def solver_share(workload: Workload, *, repetitions: int, device: torch.device) -> float:
    """Part of a CG iteration that is no product: the 31st to 60th iteration of CG on a product that costs
    nothing, kept iterates included, beside one that does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = workload.task.model().to(device).train(workload.training)
        batch = tree_map(lambda t: t.to(device), workload.batch())
    p = problem(workload, model, batch)
    _, g = p.loss_and_gradient()
    B, ones, b = p.curvature(), torch.ones_like(g), g.neg()
    known = _Known(p.params.views(B(ones).clone()))
    free = Replicated(p.params, p.comm).summed([known], factor=1.0, abort_flag=lambda: 0.0)
    A = free.damped(shift=1.0)

    def solve(iterations: int) -> CGResult:
        rules = HFOptions(
            cg_max_iter=iterations, cg_stop="residual", cg_tol=0.0, nonpositive_curvature="ignore"
        )
        return cg(A, b, None, None, rules)

    per_product, short, long = medians(
        [lambda: B(ones), lambda: solve(30), lambda: solve(60)], max(repetitions, 5), device
    )
    per_iteration = (long - short) / 30
    return per_iteration / (per_iteration + per_product)


class _Known:
    """A product that costs nothing."""

    overlaps = False

    def __init__(self, result: Sequence[Tensor]) -> None:
        self._result = result

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor]:
        return self._result


def _peak_in_process(name: str, how: str, cg_iterations: int, minibatches: int, device: Any) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(
            _peak, (name, how, cg_iterations, minibatches, str(device), torch.get_num_threads())
        )


def _peak(
    name: str, how: How, cg_iterations: int, minibatches: int, device: str, threads: int
) -> int:
    """Peak memory of a step beyond what the process held before it."""
    torch.set_num_threads(threads)
    workload = next(w for w in workloads() if w.name == name)
    runner = _Runner(
        workload=workload,
        how=how,
        cg_iterations=cg_iterations,
        minibatches=minibatches,
        device=torch.device(device),
    )
    with torch.no_grad():  # libraries set up what they keep for good
        runner._forward()
    if is_accelerator(runner.device):
        reset_peak_memory(runner.device)
        before = allocated_memory(runner.device)
        runner()
        return int(peak_memory(runner.device)) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
    before = _status("VmRSS")
    runner()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def run(
    names: Sequence[str] | None = None,
    *,
    repetitions: int = 3,
    cg_iterations: int = 10,
    minibatches: Sequence[int] = (1, 8),
    threads: int | None = None,
    device: torch.device | None = None,
    memory: bool = True,
) -> list[StepTiming]:
    """Time and weigh steps on the workloads.

    Raises:
        ValueError: An unknown workload.
    """
    results = []
    with chosen(names, threads) as these:
        for workload in these:
            for number in minibatches:
                results += measure(
                    workload,
                    repetitions=repetitions,
                    cg_iterations=cg_iterations,
                    minibatches=number,
                    device=device or torch.device("cpu"),
                    memory=memory and number == 1,
                )
    return results


def to_rows(timings: Sequence[StepTiming]) -> list[dict[str, Any]]:
    """A table, one row a way."""
    return [asdict(t) for t in timings]
