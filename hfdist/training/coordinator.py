"""What rank 0 does around the steps: resume, record, checkpoint, stop; the others follow."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfdist.checkpoint import CheckpointStore, check, mirror, parameters_sha256
from hfdist.checkpoint.lease import Lease
from hfdist.comm import Communicator
from hfdist.config.job import RunConfig
from hfdist.curvature.layout import Layout
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners.memory import PreconditionerMemory
from hfdist.devices import rng_states, set_rng_states
from hfdist.errors import CheckpointError, ConfigError, StorageError, first_line
from hfdist.optim.report import StepReport, Stop
from hfdist.optim.step import HFState
from hfdist.rundir import files
from hfdist.rundir.files import StepLog, write_json
from hfdist.rundir.locations import home_of, is_address
from hfdist.rundir.stop import StopRequest
from hfdist.tracking import RunInfo, Status, Tracker
from hfdist.tracking.description import describe
from hfdist.tracking.links import for_training
from hfdist.tracking.plots import draw_plots
from hfdist.training.consistency import check_replicas
from hfdist.training.display import Display

logger = logging.getLogger(__name__)

_STOP, _LEAVING = 1, 2  # what a rank says at the end of a step, as bits
_DESCRIBED = ("seed", "dtype", "tf32", "deterministic", "optim.", "batches.", "task_args.")
"""Keys of the job that say how it trains."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: what a checkpoint holds besides the model."""

    state: HFState
    cg_iterations: int = 0
    wall_seconds: float = 0.0
    """Training time of all attempts of the run so far."""
    final_loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    """Last evaluation: {"loss": .., metric: ..}."""
    tracked_as: str | None = None
    data: dict[str, Any] | None = None
    """Where this rank's stream of training data stands; None where the data has a length."""
    memory: PreconditionerMemory = field(default_factory=PreconditionerMemory)


class Coordinator:
    """One a rank; only rank 0's touches disk, tracker and display, and its decisions hold for all.

    Args:
        config, run_dir: The job and its folder.
        model: Its parameters and buffers are what checkpoints hold.
        layout: How the solver's vectors lie over the ranks; checkpoints hold whole ones, so that a run
            can go on at another world size.
        comm: The ranks.
        tracker, display: Rank 0's; others pass ones that do nothing.
        stop: This process's signals.
        is_leaving: Whether a worker's machine will soon be taken away.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        model: nn.Module,
        layout: Layout,
        comm: Communicator,
        tracker: Tracker,
        display: Display,
        stop: StopRequest,
        is_leaving: Callable[[], bool] | None = None,
    ) -> None:
        self._config, self._run_dir, self._model, self._comm = config, run_dir, model, comm
        self._layout = layout
        self._tracker, self._display, self._stop = tracker, display, stop
        self._is_leaving = is_leaving
        self._home = home_of(config.output, run_dir)
        self._store = CheckpointStore(f"{self._home}/{files.CHECKPOINTS}", config.checkpoint, comm)
        output = config.output if is_address(config.output) else run_dir.parent
        self._lease = Lease(output, run_dir.name)
        self._log = StepLog(run_dir / files.METRICS)
        self._info: Mapping[str, Any] = {}
        self._records: list[dict[str, Any]] = []
        self._saved_at: int | None = None
        self._done = 0
        """Steps that are committed."""
        self._clock = time.perf_counter()

    # -- start -----------------------------------------------------------------------------------

    def start(self, resume: bool, info: Mapping[str, Any]) -> Progress:
        """Load the newest good checkpoint if asked to and there is one; open the record."""
        progress = Progress(state=HFState(damping=self._config.optim.damping))
        if resume and self._store.steps():
            progress = self._restore()
            done, asked = progress.state.step, self._config.steps
            if asked < done:
                raise ConfigError(
                    f"steps is {asked}, but the run has done {done}: more steps, like steps={done + 10}, go "
                    "on with it; `hfdist train` starts another"
                )
        elif resume:
            logger.warning("no checkpoint in %s: starting from step 0", self._home)
        if self._comm.is_rank_0:
            self._lease.take()
            (self._run_dir / files.STOP_FILE).unlink(
                missing_ok=True
            )  # it was for an earlier attempt
            if resume:
                mirror.pull_undelivered(self._config.output, self._run_dir)
                mirror.forget_undelivered(self._config.output, self._run_dir)
            self._records = self._log.start(progress.state.step)
            self._tracker.start(
                RunInfo(
                    run_id=self._run_dir.name,
                    name=self._config.name,
                    run_dir=self._run_dir,
                    params=self._config.flatten(),
                    tags=info.get("tags", {}),
                    dataset=info.get("dataset", {}),
                    tracked_as=progress.tracked_as,
                    record=self._records,
                    first_step=progress.state.step,
                    home=self._home,
                )
            )
            self._log_artifact(self._run_dir / files.JOB)
            self._info = info
            self._describe()
            self._display.start(
                self._run_dir.name, progress.state.step, self._config.steps, dict(info)
            )
        self._clock = time.perf_counter() - progress.wall_seconds
        return progress

    def _restore(self) -> Progress:
        step, saved = self._store.load()
        tensors = model_tensors(self._model)
        check(saved.get("model"), tensors)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.data.copy_(saved["model"][name])
        self._saved_at = self._done = step
        try:
            run, hf, data = saved["run"], saved["optimizer"], saved.get("data")
            x0 = hf.get("x0")
            set_rng_states(self._comm.device, saved["rng"])
            memory = PreconditionerMemory()
            memory.load_state_dict(saved.get("preconditioner", {}))
            asked = self._config.optim.damping
            is_changed = asked != saved["config"]["optim"]["damping"]
            return Progress(
                state=HFState.restored(
                    {**hf, "damping": asked if is_changed else hf["damping"]},
                    None if x0 is None else self._layout.part(x0.to(self._comm.device)).clone(),
                ),
                cg_iterations=run["cg_iterations"],
                wall_seconds=run["wall_seconds"],
                final_loss=run["final_loss"],
                evaluation=dict(run["evaluation"]),
                tracked_as=run["tracked_as"],
                # Of fewer or more ranks than now: those that read the whole stream stand at one place.
                data=data[self._comm.rank % len(data)] if data else None,
                memory=memory,
            )
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._home}/checkpoints does not hold what a run needs "
                f"({type(error).__name__}: {first_line(error)}): start a new run"
            ) from error

    # -- steps -----------------------------------------------------------------------------------

    def commit(
        self,
        report: StepReport,
        progress: Progress,
        params: ParameterVector,
        extra: dict[str, float],
    ) -> bool:
        """Record a finished step; save a checkpoint when one is due.

        Returns:
            Whether the run is to stop now, the same on every rank.
        """
        progress.wall_seconds = time.perf_counter() - self._clock
        flag = _STOP * self._stop.requested
        flag |= _LEAVING * (self._is_leaving is not None and self._is_leaving())
        flag = check_replicas(self._comm, params.tensors, flag)
        self._done = done = report.step + 1
        if self._comm.is_rank_0:
            if self._lease.is_cheap:
                self._lease.check()
            values = report.metrics() | extra | {"wall_seconds": progress.wall_seconds}
            values |= {f"eval/{name}": value for name, value in progress.evaluation.items()}
            # A step that was recorded before a kill, and comes out the same, stays as it is recorded.
            values = dict(self._tracker.log_metrics(values, report.step))
            late = values["wall_seconds"] - progress.wall_seconds
            if late > 0:  # and its time counts
                self._clock -= late
                progress.wall_seconds += late
            record = {
                "step": report.step,
                "time": time.time(),
                **values,
                "stop": str(report.stop),
                "quadratic": list(report.quadratic),
            }
            self._log.append(record)
            self._records.append(record)
            self._display.step(report.step, report, extra | progress.evaluation)
        is_due = done % self._config.checkpoint.every == 0 or flag & _LEAVING
        if is_due and done < self._config.steps:
            if flag & _LEAVING:  # the machine may be gone before the next step ends
                self.save_at_once(progress)
            else:
                self.save(progress)
        return bool(flag & _STOP)

    def is_in_a_hurry(self) -> bool:
        """Whether a machine will soon be taken away while there are steps that no checkpoint has: the step
        in progress may take longer than that."""
        is_unsaved = self._done > (self._saved_at or 0)
        return is_unsaved and self._is_leaving is not None and self._is_leaving()

    def save_at_once(self, progress: Progress) -> None:
        """Write a checkpoint of the present state, and stay until it is written."""
        self.save(progress)
        self._store.wait()

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the present state, unless it is written already."""
        step = progress.state.step
        if step == self._saved_at:
            return
        seconds = time.perf_counter() - self._clock
        # Clocks and trackers differ between ranks; what is saved is rank 0's.
        progress.wall_seconds, progress.tracked_as = self._comm.broadcast_object(
            (seconds, self._tracker.tracked_as or progress.tracked_as)
        )
        if self._comm.is_rank_0:  # before the checkpoint: it is never without its record
            self._lease.check()
            mirror.push(self._config.output, self._run_dir, mirror.RECORD)
        streams = {}
        if progress.data is not None:
            streams = {"data": self._comm.all_gather_object(progress.data)}
        x0 = progress.state.x0
        monitored = progress.evaluation.get("loss", progress.final_loss)
        self._store.save(
            step,
            {
                "model": model_tensors(self._model),
                "optimizer": {
                    **progress.state.scalars(),
                    "step": step,
                    "x0": None if x0 is None else self._layout.whole(x0),
                },
                "run": {
                    "cg_iterations": progress.cg_iterations,
                    "wall_seconds": progress.wall_seconds,
                    "final_loss": progress.final_loss,
                    "evaluation": dict(progress.evaluation),
                    "tracked_as": progress.tracked_as,
                },
                "preconditioner": progress.memory.state_dict(self._layout.whole),
                "rng": rng_states(self._comm.device),
                **streams,
                "config": self._config.to_dict(),
            },
            monitored,
        )
        self._saved_at = step

    # -- end -------------------------------------------------------------------------------------

    def what_came_of_it(self, status: Status, progress: Progress) -> str | None:
        """What a person should look at who takes this run for a success; None if nothing. Collective."""
        problem = None
        if self._comm.is_rank_0 and status is Status.FINISHED:
            problem = _no_success(self._records, progress.final_loss)
        return self._comm.broadcast_object(problem)

    def finish(
        self,
        status: Status,
        progress: Progress,
        example_inputs: Callable[[], Any] = lambda: None,
        error: str | None = None,
        save: bool | None = None,
        draw: Callable[[Path], Sequence[Path]] = lambda folder: (),
    ) -> dict[str, Any]:
        """Close the run: last checkpoint (by default, unless it has failed), plots, model, result.json.

        Plots, model and other files are extras: where one cannot be made, a warning says so.

        Returns:
            The content of result.json.
        """
        if status is not Status.FAILED if save is None else save:
            self.save(progress)
            self._store.wait()
        result: dict[str, Any] = {
            "run_id": self._run_dir.name,
            "status": str(status),
            "steps": progress.state.step,
            "final_loss": _finite(progress.final_loss),
            "parameters_sha256": parameters_sha256(dict(self._model.named_parameters())),
            "cg_iterations": progress.cg_iterations,
            "wall_seconds": progress.wall_seconds,
            "world_size": self._comm.world_size,
            "run_dir": self._home,
            **{f"eval_{name}": _finite(value) for name, value in progress.evaluation.items()},
        }
        if error is not None:
            result["error"] = error
        if not self._comm.is_rank_0:
            return result
        self._lease.check()
        plots: list[Path] = []
        with _never_failing("the plots are not drawn"):
            plots = draw_plots(self._records, self._run_dir / files.PLOTS)
            plots += draw(self._run_dir / files.PLOTS)
            for path in plots:
                self._tracker.log_plot(path, progress.state.step)
        if self._log.path.exists():
            self._log_artifact(self._log.path)
        if status is Status.FINISHED and self._config.tracking.log_model:
            with _never_failing("the model is not recorded"):
                self._tracker.log_model(self._model, example_inputs(), progress.state.step)
        self._tracker.flush()  # short runs end before their tracker has answered
        result["mlflow_run_id"] = self._tracker.tracked_as or progress.tracked_as
        url = self._tracker.url
        result["tracking_url"] = for_training(url) if url else None
        write_json(self._run_dir / files.RESULT, result)
        mirror.push(self._config.output, self._run_dir, (*mirror.RECORD, *mirror.RESULTS))
        self._log_artifact(self._run_dir / files.RESULT)
        self._describe(result, [f"plots/{path.name}" for path in plots])
        if not self._tracker.finish(status):
            self._leave_undelivered()
        self._display.finish(result)
        return result

    def _describe(self, result: Mapping[str, Any] | None = None, plots: Sequence[str] = ()) -> None:
        """Tell people what the run is, on its page, unless the job does."""
        with _never_failing("the run is not described"):
            config = self._config
            if "mlflow.note.content" in config.tracking.tags:
                return
            usual = RunConfig(task=config.task).flatten()
            rules = {
                key: value
                for key, value in config.flatten().items()
                if key.startswith(_DESCRIBED) and value != usual.get(key)
            }
            text = describe(self._info, rules, config.steps, self._home, result, plots)
            self._tracker.describe(text)

    def _log_artifact(self, path: Path) -> None:
        with _never_failing(f"{path.name} is not recorded"):
            self._tracker.log_artifact(path)

    def _leave_undelivered(self) -> None:
        try:
            mirror.push_undelivered(self._config.output, self._run_dir)
        except StorageError as error:  # the run itself is complete
            logger.warning("what is not delivered stays in %s: %s", self._run_dir, error)

    @property
    def home(self) -> str:
        """Where the run is: its folder, or its address."""
        return self._home

    def fail(self, progress: Progress, error: BaseException, save: bool = False) -> None:
        """Record a failure, and a checkpoint if `save`; never hides the error by one of its own."""
        try:
            told = f"{type(error).__name__}: {error}"
            self.finish(Status.FAILED, progress, error=told, save=save)
        except Exception as second:
            logger.warning("the failure is not recorded in %s: %s", self._run_dir, second)
            logger.debug("where it was not recorded", exc_info=True)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _no_success(records: Sequence[Mapping[str, Any]], final_loss: float | None) -> str | None:
    if final_loss is not None and not math.isfinite(final_loss):
        return (
            f"the loss is {final_loss} after {len(records)} steps: look for a division by zero, log(0) or an "
            "overflow in the task's model and loss, or for NaN in its data"
        )
    at_rest = any(
        record.get("stop") in (Stop.ZERO_GRADIENT, Stop.EXACT_START) for record in records
    )
    if not records or at_rest or any(record.get("accepted", True) for record in records):
        return None
    return (
        f"none of {len(records)} steps was accepted (the last ended by {records[-1].get('stop')}): the "
        "parameters are as they were. Look at the losses and ratios in metrics.jsonl, and try another "
        "optim.damping, or more examples in batches.line_search"
    )


@contextlib.contextmanager
def _never_failing(what: str) -> Iterator[None]:
    """Turn any error of what a run can do without into a warning."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
        logger.debug("where it happened", exc_info=True)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each tensor once: what a checkpoint keeps of a model."""
    return dict([*model.named_parameters(), *model.named_buffers()])
