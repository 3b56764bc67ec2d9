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


def hessian_free(config: RunConfig) -> Run:
    """Hessian-free at the start, under the job's own rules."""
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
    curve = Curve(optimizer=NAME, setting=", ".join(settings) or "defaults", seed=config.seed)
    return Run(curve=curve, model=worker.model, updates=_updates(worker))


def _updates(worker: Worker) -> Iterator[Update]:
    progress = Progress(state=HFState(damping=worker.config.optim.damping))
    while True:
        report = worker.step(progress)
        yield Update(loss=report.loss, work=report.work)
