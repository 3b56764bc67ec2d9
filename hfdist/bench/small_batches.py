"""Small batches drawn anew each step: Hessian-free under its defaults against Adam and SOAP on a grid.

    python -m hfdist.bench.small_batches deploy/jobs/digits_classifier.yaml --batch 256 --gradients 10 30 100

Every contender sees the same examples in the same order. Losses are of all training examples, and of the
held-out ones, after the given work in gradients of all training examples; the rivals' learning rate falls as
half a cosine to that end, and each end has the best of their grid.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfdist.bench.optimizers.problems import named
from hfdist.bench.optimizers.rivals import WARM_UP
from hfdist.comm import SerialCommunicator
from hfdist.config.evaluate import EvaluateConfig
from hfdist.config.job import RunConfig
from hfdist.config.tracking import TrackingConfig
from hfdist.curvature.microbatch import as_sum
from hfdist.data.config import BatchesConfig
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import plan_step
from hfdist.devices import resolve
from hfdist.optim.step import HFState
from hfdist.rundir.stop import StopRequest
from hfdist.tasks.task import Batch, num_examples
from hfdist.training.coordinator import Progress
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker, build

RATES: dict[str, tuple[float, ...]] = {
    "Adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "SOAP": (3e-3, 1e-2, 3e-2),
}


@dataclass(frozen=True)
class Stand:
    """Where a contender stands."""

    updates: int
    passes: float
    """Gradient examples seen, in passes over the data."""
    train: float
    held_out: float


class Measure:
    """Loss of all training examples, regularisation included, and of the held-out ones."""

    def __init__(self, config: RunConfig) -> None:
        self.config, device = config, resolve(config.device, local_rank=0)
        self.task, _ = build(config, device)
        data: Any = self.task.train_data()
        self.num_examples = len(data)
        self._loader = BatchLoader(self.task, data, device, getattr(torch, config.dtype))
        plan = plan_step(
            BatchesConfig(), num_examples=self.num_examples, seed=0, step=0, rank=0, world_size=1
        )
        self._train = [self._loader.load(part) for part in plan.gradient.microbatches]
        held_out: Any = self.task.eval_data()
        self._held_out: list[Batch] = []
        if held_out is not None:
            loader = BatchLoader(self.task, held_out, device, getattr(torch, config.dtype))
            self._held_out = [loader.first(len(held_out))]
        self.device = device

    def batches(self) -> Iterator[list[Batch]]:
        """Those of the steps, as a job draws them."""
        step = 0
        while True:
            plan = plan_step(
                self.config.batches,
                num_examples=self.num_examples,
                seed=self.config.seed,
                step=step,
                rank=0,
                world_size=1,
            )
            yield [self._loader.load(part) for part in plan.gradient.microbatches]
            step += 1

    def mean(self, model: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
        sums = []
        for batch in batches:
            loss = self.task.loss(self.task.forward(model, batch), batch)
            sums.append(as_sum(loss, num_examples(batch), self.task.loss_reduction, "loss"))
        total = sum(part for part, _ in sums) / sum(weight for _, weight in sums)
        coefficient = self.config.optim.weight_decay
        if coefficient:
            squares = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
            total = total + 0.5 * coefficient * squares
        assert isinstance(total, torch.Tensor)
        return total

    def stand(self, model: nn.Module, updates: int, passes: float) -> Stand:
        training = model.training
        model.eval()
        with torch.no_grad():
            train = float(self.mean(model, self._train))
            held_out = float(self.mean(model, self._held_out)) if self._held_out else math.nan
        model.train(training)
        return Stand(updates, passes, train, held_out)


def hessian_free(measure: Measure, ends: Sequence[float], log: Callable[..., None]) -> list[Stand]:
    """Its stands at each end, by the steps that a job of the config takes."""
    config = measure.config
    quiet = config.model_copy(
        update={
            "tracking": TrackingConfig(enabled=False),
            "evaluate": EvaluateConfig(every=0),
            "steps": 1_000_000,
        }
    )
    folder = Path(tempfile.gettempdir()) / "hfdist-bench"  # nothing is written there
    comm = SerialCommunicator(measure.device)
    worker = Worker(Job(config=quiet, run_dir=folder), comm, QuietDisplay(), StopRequest())
    worker.model.train()
    progress = Progress(state=HFState(damping=config.optim.damping))
    share = (config.batches.gradient or measure.num_examples) / measure.num_examples
    stands: list[Stand] = []
    work, updates = 0.0, 0
    for end in ends:
        while work < end:
            report = worker.step(progress)
            work, updates = work + share * report.work, updates + 1
            log(work, report)
        stands.append(measure.stand(worker.model, updates, updates * share))
    return stands


def first_order(measure: Measure, name: str, lr: float, end: float) -> Stand:
    """A rival's stand at one end."""
    model = build(measure.config, measure.device)[1].train()
    optimizer: torch.optim.Optimizer
    if name == "SOAP":
        import pytorch_optimizer

        optimizer = pytorch_optimizer.SOAP(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    share = (measure.config.batches.gradient or measure.num_examples) / measure.num_examples
    number = max(1, round(end / share))
    for k, batches in zip(range(number), measure.batches()):
        spent = k / number
        rise = (spent + 0.01) / (WARM_UP + 0.01)
        fall = 0.5 * (1.0 + math.cos(math.pi * (spent - WARM_UP) / (1.0 - WARM_UP)))
        for group in optimizer.param_groups:
            group["lr"] = lr * (rise if spent < WARM_UP else fall)
        optimizer.zero_grad()
        measure.mean(model, batches).backward()
        optimizer.step()
    return measure.stand(model, number, end)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", help="a name of `hfdist bench optimizers`, or a job file")
    parser.add_argument("overrides", nargs="*", help="changes of the job, KEY=VALUE")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--gradients", type=float, nargs="+", default=[10.0, 30.0, 100.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["hf", "rivals"])
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_intermixed_args(arguments)
    ends = sorted(given.gradients)
    rows: dict[str, list[list[Stand]]] = {}
    for seed in given.seeds:
        overrides = [f"seed={seed}", f"batches.gradient={given.batch}", *given.overrides]
        config = named(given.problem, overrides)[1]
        measure = Measure(config)

        def log(work: float, report: Any) -> None:
            if given.verbose:
                print(
                    f"{report.step:4d} work {work:7.2f} loss {report.loss:.4f} -> {report.final_loss:.4f} "
                    f"lambda {report.damping:.2e} rho {report.reduction_ratio:6.2f} k {report.cg_iterations} "
                    f"ratio {report.curvature_ratio:5.2f} share {report.curvature_share:.2f} "
                    f"losses {report.num_loss_evaluations} step {report.update_norm:.3f} "
                    f"{report.accepted} work {report.work:.1f}",
                    flush=True,
                )

        if given.only != "rivals":
            rows.setdefault("Hessian-free", []).append(hessian_free(measure, ends, log))
        if given.only != "hf":
            for name, rates in RATES.items():
                for lr in rates:
                    stands = [first_order(measure, name, lr, end) for end in ends]
                    rows.setdefault(f"{name} lr {lr:g}", []).append(stands)
    print(f"{given.problem}, batches of {given.batch}, seeds {given.seeds}, {given.overrides}")
    print("loss of all training examples (held-out) [updates, passes]; means over the seeds")
    print("gradients".ljust(22), *(f"{end:>28g}" for end in ends))
    for label, by_seed in rows.items():
        cells = []
        for same_end in zip(*by_seed):
            train = statistics.fmean(s.train for s in same_end)
            held = statistics.fmean(s.held_out for s in same_end)
            updates = statistics.fmean(s.updates for s in same_end)
            passes = statistics.fmean(s.passes for s in same_end)
            cells.append(f"{train:9.4f} ({held:.4f}) [{updates:.0f}, {passes:.0f}]".rjust(28))
        print(label.ljust(22), *cells, flush=True)


if __name__ == "__main__":
    main()
