"""Hessian-free as a contender: the steps that a job of these rules takes, on one process."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hfdist.bench.optimizers.arena import Run
from hfdist.bench.optimizers.curve import Curve, Update
from hfdist.comm import SerialCommunicator
from hfdist.config.evaluate import EvaluateConfig
from hfdist.config.job import RunConfig
from hfdist.config.tracking import TrackingConfig
from hfdist.devices import resolve
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState
from hfdist.rundir.stop import StopRequest
from hfdist.training.coordinator import Progress
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker

NAME = "Hessian-free"
BEST = "Hessian-free, best options"
GRID: tuple[str, ...] = (
    *(f"optim.damping={value:g}" for value in (1e-3, 1e-2, 1e-1, 10.0, 100.0)),
    *(f"optim.krylov_max_dim={value}" for value in (2, 5, 10, 20)),
    *(f"optim.krylov_length=full optim.krylov_max_dim={value}" for value in (5, 10, 20)),
    *(f"batches.curvature={value}" for value in (0.25, 0.5, 1.0)),
    *(f"optim.preconditioner_examples={value}" for value in (0.1, 1.0)),
    "optim.preconditioner_refresh=4",
    "optim.krylov_momentum=false",
    *(f"optim.secant_pairs={value}" for value in (0, 5, 20)),
    "optim.krylov_subproblem=trust_region",
    "optim.preconditioner=none",
)
"""Changes of one option or two, to see what the defaults leave lying."""


def hessian_free(config: RunConfig, name: str = NAME, setting: str | None = None) -> Run:
    """Hessian-free at the start, under the job's own rules.

    Args:
        config: The job.
        name, setting: What tables call it; by default what is not the options' default.
    """
    changed = {f.name for f in dataclasses.fields(HFOptions)} - {"weight_decay"}
    rules, defaults = config.optim, HFOptions()
    settings = [
        f"{key} {getattr(rules, key)}"
        for key in sorted(changed)
        if getattr(rules, key) != getattr(defaults, key)
    ]
    folder = Path(tempfile.gettempdir()) / "hfdist-bench"  # nothing is written there
    quiet = config.model_copy(
        update={
            "tracking": TrackingConfig(enabled=False),
            "evaluate": EvaluateConfig(every=0),
            "steps": 1_000_000,
        }
    )
    comm = SerialCommunicator(resolve(config.device, local_rank=0))
    worker = Worker(Job(config=quiet, run_dir=folder), comm, QuietDisplay(), StopRequest())
    worker.model.train()
    setting = setting or ", ".join(settings) or "defaults"
    curve = Curve(optimizer=name, setting=setting, seed=config.seed)
    return Run(curve=curve, model=worker.model, updates=_updates(worker))


def _updates(worker: Worker) -> Iterator[Update]:
    progress = Progress(state=HFState(damping=worker.config.optim.damping))
    while True:
        report = worker.step(progress)
        yield Update(loss=report.loss, work=report.work)
