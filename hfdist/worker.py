"""One rank's life: build, resume, step, commit."""

from __future__ import annotations

import dataclasses
import logging
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hfdist import __version__
from hfdist.agreement import check_agreement
from hfdist.comm import Communicator
from hfdist.config import RunConfig
from hfdist.coordinator import Coordinator, Progress
from hfdist.curvature.frozen import Frozen
from hfdist.curvature.microbatch import Microbatch, from_task
from hfdist.curvature.preconditioners import DiagonalPreconditioner, sum_of_squared_gradients
from hfdist.curvature.problem import Overrides, Problem, Regularisation, Roles
from hfdist.data import BatchLoader, RolePlan, StepPlan, data_passes, plan_step
from hfdist.display import Display
from hfdist.errors import Interrupted, TaskError
from hfdist.evaluation import evaluate
from hfdist.optim.problem import Operator
from hfdist.optim.report import StepReport
from hfdist.optim.step import HFState, hf_step
from hfdist.params import ParameterVector
from hfdist.seeds import mixed
from hfdist.signals import StopRequest, stop_on_signals
from hfdist.tasks.loading import load_task
from hfdist.tasks.task import Batch, Task
from hfdist.tracking import NullTracker, Status, make_tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to start or to go on with."""

    config: RunConfig
    run_dir: Path
    resume: bool = False


def run(job: Job, comm: Communicator, display: Display) -> dict[str, Any]:
    """Train on this rank until the last step, a stop request or an error.

    Args:
        job: The run.
        comm: The ranks; each calls this function.
        display: The lead's; what the others show is their launcher's choice.

    Returns:
        The content of result.json; its `status` is FINISHED, or KILLED after Ctrl-C or SIGTERM.

    Raises:
        UserError: Bad input, or a peer that is gone; recorded as FAILED before it is raised.
    """
    with stop_on_signals() as stop:
        check_agreement(comm, job.config)
        return Worker(job, comm, display, stop).run()


class Worker:
    """Task, model and data of one rank, and the loop over steps."""

    def __init__(
        self, job: Job, comm: Communicator, display: Display, stop: StopRequest
    ) -> None:
        self.config, self.comm, self._display, self._stop = job.config, comm, display, stop
        self._resume = job.resume
        self.task, self.model = build(job.config, comm.device)
        self.params = ParameterVector(p for p in self.model.parameters() if p.requires_grad)
        self.data = self.task.train_data()
        self.num_examples = _length(self.data)
        dtype = getattr(torch, job.config.dtype)
        self._loader = BatchLoader(self.task, self.data, comm.device, dtype)
        self.eval_data = self.task.eval_data()
        self._eval_loader = BatchLoader(self.task, self.eval_data, comm.device, dtype)
        self._costs = self.task.example_costs()
        tracker = make_tracker(job.config.tracking, Path(job.config.output)) if comm.is_lead else None
        self._plan(0)  # a batch role larger than the data fails here, before anything is written
        self._coordinator = Coordinator(
            job.config, job.run_dir, self.model, comm, tracker or NullTracker(), display, stop
        )
        self._example: Any = None

    def run(self) -> dict[str, Any]:
        """The loop; see `run`."""
        self._warn_about_batch_norm()
        progress = self._coordinator.start(self._resume, self._info())
        self.model.train()
        status = Status.FINISHED
        try:
            while progress.state.step < self.config.steps:
                report = self._step(progress)
                if self._coordinator.commit(report, progress, self.params, self._extra(report)):
                    status = Status.KILLED
                    break
        except Interrupted:
            # The step in progress is abandoned: parameters and state are those before it.
            status = Status.KILLED
        except BaseException as error:
            self._coordinator.fail(progress, error)
            raise
        finally:
            self._loader.close()
            self._eval_loader.close()
        return self._coordinator.finish(status, progress, self._example)

    # -- a step ----------------------------------------------------------------------------------

    def _step(self, progress: Progress) -> StepReport:
        step = progress.state.step
        plan = self._plan(step)
        roles = self._roles(plan, step)
        if step + 1 < self.config.steps:
            self._loader.prefetch(_microbatch_plans(self._plan(step + 1)))
        problem = self._problem(roles)
        options = self.config.optim

        def on_cg_iteration(i: int) -> None:
            self._display.cg_iteration(step, i, options.cg_max_iter or self.params.numel)
            # Alone, a rank may leave a step at once; together, all leave after it (see `commit`).
            if self._stop.requested and self.comm.world_size == 1:
                raise Interrupted

        report, state = hf_step(problem, progress.state, options, on_cg_iteration=on_cg_iteration)
        report = dataclasses.replace(report, communication=self.comm.take_counters())
        progress.state = state
        progress.cg_iterations += report.cg_iterations
        progress.final_loss = report.final_loss
        every, done = self.config.evaluate.every, step + 1
        if self.eval_data is not None and (
            done == self.config.steps or (every and done % every == 0)
        ):
            progress.evaluation = self.evaluate()
        return report

    def _plan(self, step: int) -> StepPlan:
        return plan_step(
            self.config.batches,
            num_examples=self.num_examples,
            seed=self.config.seed,
            step=step,
            rank=self.comm.rank,
            world_size=self.comm.world_size,
            costs=self._costs,
        )

    def _roles(self, plan: StepPlan, step: int) -> Roles:
        seed = mixed(self.config.seed, "forward", step)

        def role(role_plan: RolePlan) -> list[Microbatch]:
            batches = []
            for place in role_plan.microbatches:
                batch = self._loader.load(place)
                if self._example is None and self.comm.is_lead:
                    self._example = _first_example(self.task.example_inputs(batch))
                batches.append(
                    from_task(self.task, self.model, batch, mixed(seed, place.number))
                )
            self._batches = batches
            return batches

        gradient = role(plan.gradient)
        curvature = gradient if plan.curvature is plan.gradient else role(plan.curvature)
        loss = gradient if plan.line_search is plan.gradient else role(plan.line_search)
        return Roles(gradient=gradient, curvature=curvature, loss=loss)

    def _problem(self, roles: Roles) -> Problem:
        options = self.config.optim
        frozen = Frozen(self.comm.device, self.model)
        make = None
        if options.preconditioner == "empirical_fisher":
            make = lambda damping: self._empirical_fisher(roles, frozen, damping)  # noqa: E731
        return Problem(
            params=self.params,
            roles=roles,
            comm=self.comm,
            curvature_opt=options.curvature_opt,
            reduction=self.task.loss_reduction,
            regularisation=Regularisation(weight_decay=options.weight_decay),
            overrides=Overrides(preconditioner=make),
            frozen=frozen,
        )

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the evaluation data."""
        n = _length(self.eval_data)
        if not n:
            return {}
        return evaluate(
            self.task, self.model, self._eval_loader, n, self.comm, self.config.evaluate.batch
        )

    # -- what is recorded ------------------------------------------------------------------------

    def _extra(self, report: StepReport) -> dict[str, float]:
        passes = data_passes(self.config.batches, self.num_examples, report.step + 1)
        before = data_passes(self.config.batches, self.num_examples, report.step)
        examples = (passes - before) * (self.num_examples or 1)
        return {
            "data_passes": passes,
            "examples_per_second": examples / max(report.seconds["total"], 1e-9),
            "peak_memory_bytes": _peak_memory(self.comm.device),
        }

    def _info(self) -> dict[str, Any]:
        name = type(self.task).__name__
        return {
            "task": name,
            "num_parameters": self.params.numel,
            "world_size": self.comm.world_size,
            "tags": {
                "task": name,
                "device": _device_name(self.comm.device),
                "world_size": str(self.comm.world_size),
                "num_parameters": str(self.params.numel),
                "hfdist": __version__,
            },
            "dataset": {
                "name": name,
                "num_examples": self.num_examples or 0,
                "num_eval_examples": _length(self.eval_data) or 0,
            },
        }

    def _warn_about_batch_norm(self) -> None:
        several = self.comm.world_size > 1 or self.config.batches.microbatch is not None
        has_batch_norm = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()
        )
        if several and has_batch_norm and self.comm.is_lead:
            logger.warning(
                "batch norm: every microbatch of every rank is normalised by its own statistics, in "
                "losses, gradients and products alike; the running statistics become the "
                "example-weighted mean of what each microbatch of the gradient makes of them"
            )


def build(config: RunConfig, device: torch.device) -> tuple[Task, nn.Module]:
    """The task and its model, initialised from the job's seed, on the device.

    Raises:
        TaskError: The task cannot be found or built, or its model cannot be trained.
    """
    torch.manual_seed(config.seed)
    task = load_task(config.task, config.task_args)
    name = type(task).__name__
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name}.model() must return a torch.nn.Module, not {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise TaskError(f"{name}.model() has no trainable parameter: unfreeze at least one")
    return task, model.to(device=device, dtype=getattr(torch, config.dtype))
