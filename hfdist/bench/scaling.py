"""Measure steps on ranks of this machine, fit the alpha-beta model, check it, and look ahead.

What is timed are whole steps on the CURVES autoencoder with made-up pixels, the number of CG iterations
fixed. Every process runs all points in turn, and the points are interleaved over the repetitions, so
that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.bench.scaling_model import (
    Link,
    Machine,
    Step,
    efficiency,
    fit_link,
    fit_rates,
    seconds,
    weak_efficiency,
)
from hfdist.comm import Communicator, SerialCommunicator
from hfdist.comm.environment import join
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.layout import Replicated
from hfdist.curvature.microbatch import Microbatch, from_parts
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState, hf_step

WIDTHS = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
"""The CURVES autoencoder, 842,340 parameters."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A step to be timed."""

    examples: int
    """On each rank, in all roles."""
    cg_iterations: int = 5
    connected: bool = True
    """Whether ranks talk; otherwise each does the same work alone, as a control."""
    delay: float = 0.0
    """Seconds added to every reduction."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Medians of one world size."""

    world_size: int
    steps: list[tuple[Point, float]]
    """(point, seconds of the slowest rank)."""
    all_reduces: list[tuple[int, float]]
    """(bytes, seconds)."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A measured step that no parameter was fitted to."""

    world_size: int
    point: Point
    measured: float
    foreseen: float

    @property
    def error(self) -> float:
        """Relative to the measured time."""
        return self.foreseen / self.measured - 1.0


@dataclass(frozen=True, kw_only=True)
class ScalingReport:
    """What `hfdist bench scaling` found."""

    threads: int
    num_parameters: int
    timings: list[Timings]
    machines: dict[int, Machine]
    """Fitted rates by the number of busy ranks: cores share caches and memory."""
    checks: list[Check]
    overhead: dict[int, float]
    """World size -> step seconds relative to the control's."""
    ahead: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        values["checks"] = [asdict(check) | {"error": check.error} for check in self.checks]
        return values


class _Delayed:
    """A communicator whose reductions take longer."""

    def __init__(self, comm: Communicator, delay: float) -> None:
        self._comm, self._delay = comm, delay

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def sum(self, tensor: Tensor) -> Tensor:
        time.sleep(self._delay)
        return self._comm.all_reduce(tensor)

    @contextmanager
    def overlapped_all_reduce(self) -> Iterator[Callable[[Tensor], None]]:
        with self._comm.overlapped_all_reduce() as start:
            yield start
        time.sleep(self._delay)


def measure(
    world_size: int,
    points: Sequence[Point],
    *,
    repetitions: int,
    threads: int = 1,
    sizes: Sequence[int] = (8, 2**16, 2**18, 2**20, 2**22),
    timeout_seconds: float = 600.0,
) -> Timings:
    """Time steps and all-reduces on new processes of this machine.

    Args:
        world_size: Number of processes.
        points: Steps.
        repetitions: Rounds over all points.
        threads: Threads of each process.
        sizes: Bytes of the all-reduces.
        timeout_seconds: For the whole measurement.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(world_size) as pool:
        jobs = [
            (rank, world_size, f"{folder}/meet", list(points), repetitions, threads, list(sizes))
            for rank in range(world_size)
        ]
        # One job a process: chunks of one, and none returns before all have met.
        answers = pool.map_async(_on_rank, jobs, chunksize=1).get(timeout_seconds)
    steps = [
        (
            point,
            statistics.median(
                max(answer[0][k][r] for answer in answers) for r in range(repetitions)
            ),
        )
        for k, point in enumerate(points)
    ]
    reduces = [
        (
            size,
            statistics.median(
                max(answer[1][k][r] for answer in answers) for r in range(repetitions)
            ),
        )
        for k, size in enumerate(sizes)
    ]
    return Timings(
        world_size=world_size, steps=steps, all_reduces=reduces if world_size > 1 else []
    )


def _on_rank(
    job: tuple[int, int, str, list[Point], int, int, list[int]],
) -> tuple[list[list[float]], list[list[float]]]:
    rank, world_size, path, points, repetitions, threads, sizes = job
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    alone = SerialCommunicator(device)
    with _joined(device, rank, world_size, path) as comm:
        runs = [_StepRun(point, comm if point.connected else alone) for point in points]
        buffers = [torch.zeros(size // 4) for size in sizes]
        step_seconds: list[list[float]] = [[] for _ in points]
        sum_seconds: list[list[float]] = [[] for _ in sizes]
        for repetition in range(repetitions + 1):
            for k, run in enumerate(runs):
                comm.barrier()
                elapsed = run.time()
                if repetition:  # the first round warms up
                    step_seconds[k].append(elapsed)
            for k, buffer in enumerate(buffers):
                comm.barrier()
                start = time.perf_counter()
                for _ in range(5):
                    comm.all_reduce(buffer)
                if repetition:
                    sum_seconds[k].append((time.perf_counter() - start) / 5)
        comm.barrier()
    return step_seconds, sum_seconds


@contextmanager
def _joined(device: torch.device, rank: int, world_size: int, path: str) -> Iterator[Communicator]:
    if world_size == 1:
        yield SerialCommunicator(device)
        return
    comm = join(
        device,
        rank=rank,
        world_size=world_size,
        init_method=f"file://{path}",
        timeout_seconds=300.0,
    )
    try:
        yield comm
    finally:
        comm.close()


class _StepRun:
    """The same step, again and again."""

    def __init__(self, point: Point, comm: Communicator) -> None:
        torch.manual_seed(comm.rank)
        pixels = torch.rand(point.examples, WIDTHS[0])
        torch.manual_seed(0)
        layers = [[nn.Linear(a, b), nn.Sigmoid()] for a, b in itertools.pairwise(WIDTHS)]
        model = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])
        self._comm: Any = _Delayed(comm, point.delay) if point.delay else comm
        self._params = ParameterVector(model.parameters())
        self._layout = Replicated(self._params, self._comm)
        self._theta = self._params.read()
        loss = nn.BCEWithLogitsLoss(reduction="sum")
        self._roles: list[Microbatch] = [
            from_parts(
                lambda: model(pixels), lambda z: (loss(z, pixels), float(point.examples)), seed=0
            )
        ]
        self._fixed = FixedRandomness(self._params.device, model)
        self._options = HFOptions(
            cg_max_iter=point.cg_iterations,
            cg_stop="residual",
            cg_tol=0.0,
            use_cg_backtracking=False,
            use_linesearch=False,
            adapt_damping=False,
        )

    def time(self) -> float:
        """Seconds of one step."""
        roles = Roles(gradient=self._roles, curvature=self._roles, loss=self._roles)
        start = time.perf_counter()
        problem = Problem(
            params=self._params,
            roles=roles,
            comm=self._comm,
            layout=self._layout,
            frozen=self._fixed,
        )
        report, _ = hf_step(problem, HFState(damping=1.0), self._options)
        elapsed = time.perf_counter() - start
        if report.cg_iterations != self._options.cg_max_iter:
            raise RuntimeError(f"the step took {report.cg_iterations} CG iterations: {report.stop}")
        self._params.write(self._theta)
        return elapsed


def work(point: Point, world_size: int, num_parameters: int) -> Step:
    """What a timed step consists of."""
    n = point.examples * (world_size if point.connected else 1)
    return Step(
        num_parameters=num_parameters,
        gradient=n,
        curvature=n,
        line_search=n,
        cg_iterations=point.cg_iterations,
        loss_evaluations=1,
    )


def run(
    world_sizes: Sequence[int] = (1, 2),
    *,
    examples: int = 1200,
    cg_iterations: int = 5,
    repetitions: int = 7,
    delay: float = 0.05,
    threads: int = 1,
) -> ScalingReport:
    """Measure, fit and check.

    Strong points share `examples` x max(W) examples over the ranks, weak ones have `examples` on each.
    Rates are fitted to controls that do not talk, links to bare all-reduces; every step on connected
    ranks is then a check.

    Args:
        world_sizes: Numbers of ranks; 1 is always among them.
        examples: Examples a rank of the weak points.
        cg_iterations: k of every step.
        repetitions: Rounds; medians are reported.
        delay: Seconds injected into every reduction of some points.
        threads: Threads a rank.
    """
    sizes = sorted({1, *world_sizes})
    total = examples * max(sizes)
    P = sum(a * b + b for a, b in itertools.pairwise(WIDTHS))
    timings, machines, checks, overhead = [], {}, [], {}
    for W in sizes:
        controls = [
            Point(examples=n, cg_iterations=cg_iterations, connected=False)
            for n in (max(examples // 4, 1), examples, total // W)
        ]
        connected = [
            Point(examples=examples, cg_iterations=cg_iterations),
            Point(examples=total // W, cg_iterations=cg_iterations),
            Point(examples=examples // 2, cg_iterations=2 * cg_iterations),
        ]
        if W > 1:
            connected.append(Point(examples=examples, cg_iterations=cg_iterations, delay=delay))
        points = list(dict.fromkeys([*controls, *connected]))
        found = measure(W, points, repetitions=repetitions, threads=threads)
        timings.append(found)
        by_point = dict(found.steps)
        flops, memory = fit_rates([(work(c, 1, P), by_point[c]) for c in dict.fromkeys(controls)])
        link = Link(latency=0.0, bandwidth=float("inf"))
        if W > 1:
            link = fit_link([(W, size, s) for size, s in found.all_reduces])
            overhead[W] = by_point[connected[0]] / by_point[controls[1]]
        machines[W] = Machine(flops=flops, memory_bandwidth=memory, link=link)
        for point in dict.fromkeys(connected):
            step = work(point, W, P)
            # The gradient's loss, the curvature's weight and each evaluation are reductions, too.
            reductions = point.cg_iterations + step.loss_evaluations + 2 if W > 1 else 0
            foreseen = seconds(step, machines[W], W) + reductions * point.delay
            checks.append(
                Check(world_size=W, point=point, measured=by_point[point], foreseen=foreseen)
            )
    report = ScalingReport(
        threads=threads,
        num_parameters=P,
        timings=timings,
        machines=machines,
        checks=checks,
        overhead=overhead,
    )
    report.ahead.update(look_ahead())
    return report


CLUSTERS = {
    # A GPU of today at a third of its peak in float32 with tensor cores; links as vendors state them.
    "100 Gb/s Ethernet": Machine(
        flops=2e14,
        memory_bandwidth=3e12,
        link=Link(latency=2e-5, bandwidth=12.5e9),
    ),
    "NVLink + 400 Gb/s InfiniBand": Machine(
        flops=2e14,
        memory_bandwidth=3e12,
        link=Link(latency=5e-6, bandwidth=50e9),
        local=Link(latency=2e-6, bandwidth=450e9),
        ranks_per_node=8,
    ),
}


def look_ahead(step: Step | None = None) -> dict[str, list[dict[str, float]]]:
    """Foreseen efficiency on 1 to 4,096 ranks, with and without overlap, by kind of cluster.

    Args:
        step: The work; by default 100 million parameters, a gradient on 2^20 examples and curvature on
            a quarter of them, 50 CG iterations, 6 evaluations.
    """
    step = step or Step(
        num_parameters=100_000_000,
        gradient=2**20,
        curvature=2**18,
        line_search=2**20,
        cg_iterations=50,
        loss_evaluations=6,
    )
    return {
        name: [
            {
                "world_size": W,
                "strong": efficiency(step, machine, W),
                "strong_overlap": efficiency(step, machine, W, overlap=0.9),
                "weak": weak_efficiency(step, machine, W),
                "weak_overlap": weak_efficiency(step, machine, W, overlap=0.9),
            }
            for W in (2**j for j in range(13))
        ]
        for name, machine in CLUSTERS.items()
    }


def plot(report: ScalingReport, path: Path) -> Path:
    """Draw checks and foreseen efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, 1 + len(report.ahead), figsize=(5 * (1 + len(report.ahead)), 4.2)
    )
    measured = [check.measured for check in report.checks]
    foreseen = [check.foreseen for check in report.checks]
    for world_size in report.machines:
        chosen = [check for check in report.checks if check.world_size == world_size]
        axes[0].scatter(
            [c.measured for c in chosen],
            [c.foreseen for c in chosen],
            zorder=3,
            label=f"{world_size} ranks",
        )
    ends = [min(measured + foreseen) * 0.9, max(measured + foreseen) * 1.1]
    axes[0].plot(ends, ends, color="0.6", linewidth=1)
    axes[0].fill_between(
        ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="0.9", label="within 15%"
    )
    axes[0].set(
        xlabel="measured step (s)", ylabel="foreseen step (s)", title="Model against this machine"
    )
    axes[0].legend()
    for axis, (name, rows) in zip(axes[1:], report.ahead.items()):
        ranks = [row["world_size"] for row in rows]
        for key, label, style in (
            ("weak_overlap", "weak, overlapped", "-"),
            ("weak", "weak", "--"),
            ("strong_overlap", "strong, overlapped", "-"),
            ("strong", "strong", "--"),
        ):
            colour = "C0" if key.startswith("weak") else "C1"
            axis.plot(ranks, [row[key] for row in rows], style, color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="ranks", ylabel="efficiency", ylim=(0, 1.05), title=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
