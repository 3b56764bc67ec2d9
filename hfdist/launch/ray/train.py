"""Workers that Ray Train places on a cluster; the driver watches, shows, stops and judges."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.checkpoint import mirror
from hfdist.errors import ConfigError, UserError, WorkerError, first_line
from hfdist.launch.failures import record_cause
from hfdist.launch.last_words import last_words
from hfdist.launch.ray.cluster import (
    connected,
    free_resources,
    node_resources,
    resources_in_use,
    room_asked_for,
    scales_itself,
)
from hfdist.launch.ray.placement import Demand, suggest_fix, what_is_missing
from hfdist.launch.ray.queue import JOB_VARIABLE, Queue
from hfdist.rundir import files
from hfdist.rundir.locations import home_of, is_address
from hfdist.rundir.stop import SignalCount, signals_counted
from hfdist.tracking.provenance import SOURCE_VARIABLE, folder_of, source

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig
    from hfdist.launch.ray.relay import Standing
    from hfdist.training.display import Display

logger = logging.getLogger(__name__)

_POLL = 0.1  # seconds between looks at the workers' events
_RELAY_SECONDS = 30.0  # in which the relay of events must answer
_BROKEN_SECONDS = 10.0  # in which a connection to it may come back
_TELL_EVERY = 15.0  # seconds between messages of a job that waits for resources
_AUTOSCALER_PATIENCE = 900.0
"""Seconds that an autoscaling cluster has to add nodes."""
_SETUP_TRIES = 3
"""Times that a process group which cannot be set up is tried; they do not count as failures."""
_GROUP_SECONDS = 120
"""Seconds that ranks have to find each other: a cold start takes longer than a collective."""
# Ray's own defaults answer slowly: 2 s to see a failure, 60 s at the old size after a node's loss.
_TUNING = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1.0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
_FOR_WORKERS = ("MLFLOW_", "HFDIST_", "AWS_")
"""Beginnings of the names of variables that workers get from the driver."""


def run(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    """Run the job on a Ray cluster; see `hfdist.launch.start`.

    A worker, or a node, that is lost restarts all workers from the newest checkpoint, at most
    `launch.max_failures` times; on as many workers as the cluster can hold where `launch.workers` is
    [min, max]. Growing, shrinking and a node that its owner takes back do not count, nor does a process
    group that could not be set up, which is tried three times.

    Raises:
        UserError: Bad input, a resource that the cluster does not have, or a worker's own error.
        KeyboardInterrupt: A second Ctrl-C, or one before training began.
    """
    from hfdist.training.display import make_display

    for key, value in _TUNING.items():
        os.environ.setdefault(key, value)
    shown = make_display(display)
    # Ray ends a process whose node is lost from within, before Python can say anything.
    words = (
        f"error: this process was ended: `hfdist resume {home_of(config.output, run_dir)}` goes on"
    )
    with connected(config.launch.address), last_words(words):
        return _Driver(config, run_dir, resume, shown).run()


class _Driver:
    """One run as its driver sees it."""

    def __init__(self, config: RunConfig, run_dir: Path, resume: bool, display: Display) -> None:
        self._config, self._run_dir, self._resume = config, run_dir, resume
        self._display = display
        self._home = home_of(config.output, run_dir)
        self._signals = SignalCount()
        self._queue = Queue(job) if (job := os.environ.get(JOB_VARIABLE)) else None
        self._has_begun = False
        self._groups = 0
        self._is_down = False
        """Whether the last group has failed, and no new one is there."""
        self._ended = threading.Event()
        self._result: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._relay: Any = None
        self._waiting_since = self._told = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Place the workers and stay until they have ended."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from hfdist.launch.ray.relay import Relay

        (self._run_dir / files.STOP_FILE).unlink(missing_ok=True)
        try:
            with signals_counted() as self._signals:
                if self._queue is not None:
                    self._queue.wait(
                        self._what_is_taken, self._display.message, lambda: self._signals.number > 0
                    )
                self._wait_for_resources()
                beside = NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                )
                self._relay = (
                    ray.remote(Relay).options(num_cpus=0, scheduling_strategy=beside).remote()
                )
                threading.Thread(target=self._fit, name="hfdist-ray-train", daemon=True).start()
                self._watch()
            return self._conclude()
        finally:
            shutil.rmtree(self._run_dir / "ray", ignore_errors=True)
            (self._run_dir / files.STOP_FILE).unlink(missing_ok=True)

    # -- placement -------------------------------------------------------------------------------

    def _what_is_taken(self) -> str | None:
        """What the workers lack of what is free now; None also where the cluster would have to grow."""
        nodes = node_resources()
        if what_is_missing(self._demand(nodes), nodes) is not None:
            return None
        return what_is_missing(self._demand(nodes), free_resources())

    def _wait_for_resources(self) -> None:
        """Return once the cluster can hold the fewest workers that the run may start with."""
        patience = self._patience()
        began = told = time.monotonic()
        with contextlib.ExitStack() as stack:
            while True:
                nodes = node_resources()
                missing = what_is_missing(self._demand(nodes), nodes)
                if missing is None:
                    return
                now = time.monotonic()
                if now - began >= patience:
                    waited = f" (waited {patience:.0f} s)" if patience else ""
                    raise ConfigError(
                        f"the job cannot be placed: {missing}{waited}; "
                        f"{suggest_fix(self._demand(nodes), nodes)}"
                    )
                if told == began:  # an autoscaler adds nodes for what waits
                    stack.enter_context(room_asked_for(self._demand(nodes)))
                if now - told >= _TELL_EVERY or told == began:
                    self._display.message(f"waiting for the cluster to grow: {missing}")
                    told = now
                if self._signals.number:
                    raise KeyboardInterrupt
                time.sleep(1.0)

    def _patience(self) -> float:
        told = self._config.launch.placement_timeout
        if told is not None:
            return told
        return _AUTOSCALER_PATIENCE if scales_itself() else 0.0

    def _demand(self, nodes: list[dict[str, float]]) -> Demand:
        launch = self._config.launch
        fewest = launch.workers if isinstance(launch.workers, int) else launch.workers[0]
        kind = launch.accelerator_type
        return Demand(
            num_workers=fewest,
            per_worker=_per_worker(self._config, nodes)
            | ({f"accelerator_type:{kind}": 0.001} if kind else {}),
            placement=launch.placement,
        )

    # -- Ray Train, in a thread ------------------------------------------------------------------

    def _fit(self) -> None:
        from ray.exceptions import ActorDiedError, OutOfMemoryError
        from ray.train import ControllerError

        from hfdist.launch.ray.relay import Standing

        before, setups = Standing(groups=0, failures=0, placement_group=None), 0
        try:
            while True:
                try:
                    trainer = self._trainer(f"group-{before.groups}-{setups}", before.failures)
                    self._result = trainer.fit().return_value
                    return
                except (ControllerError, ActorDiedError, OutOfMemoryError) as error:
                    now = self._standing_after(error, before)
                    setups = setups + 1 if now.groups == before.groups else 0
                    if setups == _SETUP_TRIES:
                        raise
                    what = "could not set the workers up" if setups else "gave up"
                    logger.warning(
                        "Ray Train %s (%s): trying again", what, first_line(_cause(error))
                    )
                    before = now
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _standing_after(self, error: Exception, before: Standing) -> Standing:
        """What the run can resume from when Ray Train has given up; raises `error` if there is nothing."""
        import ray

        from hfdist.launch.ray.worker import DoNotRetry

        if isinstance(_cause(error), DoNotRetry) or self._signals.number:
            raise error
        now: Standing = ray.get(self._relay.standing.remote())
        if now.groups > before.groups:
            if now.failures == before.failures:  # no worker: the controller itself
                now = ray.get(self._relay.down.remote("Ray Train's controller failed"))
            if now.failures > self._config.launch.max_failures:
                raise error
        if now.placement_group is not None:  # taken for ever, where the controller is lost
            ray.util.remove_placement_group(now.placement_group)
        return now

    def _trainer(self, name: str, failures: int) -> Any:
        import ray.train

        from hfdist.launch.ray import spares
        from hfdist.launch.ray.scaling import Trainer
        from hfdist.launch.ray.worker import Assignment, FailureWatch, GroupConfig, work

        train: Any = ray.train  # the second version of its API, of which its types know nothing
        launch = self._config.launch
        per_worker = _per_worker(self._config, node_resources())
        gpus = per_worker.get("GPU", 0.0)
        assignment = Assignment(
            config=self._config,
            run_dir=self._run_dir,
            resume=self._resume,
            threads=launch.threads_per_worker or max(1, int(launch.cpus_per_worker)),
            gpus_per_worker=gpus,
            relay=self._relay,
            folder=Path.cwd(),
            environment={
                # A worker may see neither git nor the repository.
                SOURCE_VARIABLE: json.dumps(source(folder_of(self._config.task))),
                **{k: v for k, v in os.environ.items() if k.startswith(_FOR_WORKERS)},
            },
        )
        workers = launch.workers if isinstance(launch.workers, int) else tuple(launch.workers)
        return Trainer(
            work,
            relay=self._relay,
            train_loop_config={"assignment": assignment},
            # Workers that share a GPU cannot use nccl, which wants one each.
            torch_config=GroupConfig(
                backend="nccl" if gpus >= 1 else "gloo", timeout_s=_GROUP_SECONDS
            ),
            scaling_config=train.ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker=dict(per_worker),
                placement_strategy=launch.placement,
                accelerator_type=launch.accelerator_type,
                elastic_resize_monitor_interval_s=10.0,
            ),
            run_config=train.RunConfig(
                name=name,
                # Ray Train wants a folder; checkpoints are hfdist's own.
                storage_path=str(self._run_dir / "ray"),
                failure_config=train.FailureConfig(max_failures=launch.max_failures - failures),
                logging_config=train.LoggingConfig(log_level="ERROR"),
                callbacks=[FailureWatch(self._relay)],
                worker_runtime_env={
                    "env_vars": spares.variables(
                        assignment.threads, with_mlflow=self._config.tracking.enabled
                    )
                },
            ),
        )

    # -- while it runs ---------------------------------------------------------------------------

    def _watch(self) -> None:
        """Show events and hand stop requests on, until Ray Train has ended."""
        try:
            while not self._ended.wait(_POLL):
                self._show()
                if self._signals.number:
                    self._stop()
                if not self._is_training:
                    self._watch_resources()
            self._show()
        except WorkerError as error:  # the workers are lost
            self._record(error)
            raise

    @property
    def _is_training(self) -> bool:
        return self._groups > 0 and not self._is_down

    def _show(self) -> None:
        import ray

        deadline = time.monotonic() + _BROKEN_SECONDS
        while True:
            try:
                events, groups = ray.get(self._relay.take.remote(), timeout=_RELAY_SECONDS)
                break
            except ray.exceptions.RayError as error:
                # A connection that broke may come back; an actor that died does not.
                can_wait = isinstance(error, ray.exceptions.ActorUnavailableError)
                if can_wait and time.monotonic() < deadline:
                    time.sleep(_POLL)
                    continue
                raise WorkerError(
                    f"the connection to the Ray cluster is lost ({first_line(error)}): `hfdist resume "
                    f"{self._home}` goes on from the newest checkpoint once it is back"
                ) from error
        for method, arguments in events:
            if method == "_down":
                self._is_down, self._waiting_since = True, time.monotonic()
                self._told = self._waiting_since
                cause, failures = arguments
                allowed = self._config.launch.max_failures
                if failures <= allowed:  # or it is the run's own error
                    self._display.message(
                        f"{cause}: the workers restart from the newest checkpoint (failure {failures} of "
                        f"{allowed} allowed)"
                    )
                continue
            if method in ("start", "step") and is_address(self._config.output):
                (self._run_dir / files.METRICS).touch()  # that it grows, where others write it
            if method == "start":
                if self._queue is not None and not self._has_begun:
                    self._queue.begin()
                self._is_down = False
                self._has_begun = True
            getattr(self._display, method)(*arguments)
        self._groups = groups

    def _stop(self) -> None:
        """Ask the workers to stop; without workers there is nothing to wait for."""
        if self._signals.number > 1 or not self._is_training:
            raise KeyboardInterrupt
        # Again and again: workers that begin take away a request to those before them.
        (self._run_dir / files.STOP_FILE).touch()
        self._relay.stop.remote()

    def _watch_resources(self) -> None:
        """Say why nothing runs, where workers are waited for."""
        now = time.monotonic()
        if now - self._told < _TELL_EVERY:
            return
        self._told = now
        nodes = node_resources()
        demand = self._demand(nodes)
        missing = what_is_missing(demand, nodes)
        if missing is None:
            if used := resources_in_use(demand):
                self._display.message(used)
            return
        self._display.message(f"waiting for nodes: {missing}")
        patience = self._patience() or _AUTOSCALER_PATIENCE
        if now - self._waiting_since > patience:
            raise WorkerError(
                f"the run cannot go on: {missing} (waited {patience:.0f} s). `hfdist resume "
                f"{self._home}` goes on from the newest checkpoint"
            )

    # -- at the end ------------------------------------------------------------------------------

    def _conclude(self) -> dict[str, Any]:
        if self._error is None and self._result is not None:
            self._fetch()
            return self._result
        cause = self._cause()
        self._record(cause)
        raise cause

    def _record(self, cause: UserError) -> None:
        """Close the run's records: workers leave a failure that may be retried to their driver."""
        from hfdist.tracking import close_failed, sync

        self._fetch()
        record_cause(self._run_dir, cause)
        if (self._run_dir / files.SPOOL).is_dir():
            with contextlib.suppress(UserError):  # the error itself matters more
                sync(self._run_dir)
        if is_address(self._config.output):  # the spool is on the machine of rank 0
            close_failed(self._config.tracking, self._run_dir)

    def _fetch(self) -> None:
        """Fetch what rank 0 wrote: where nodes share no folder, it is on another machine."""
        if is_address(self._config.output):
            with contextlib.suppress(UserError):
                mirror.pull(self._config.output, self._run_dir, also=[files.RESULT])
            if self._has_begun:  # if only since the last checkpoint
                (self._run_dir / files.METRICS).touch()

    def _cause(self) -> UserError:
        """The error of the worker that failed first, in its own words."""
        import ray
        from ray.train import WorkerGroupError

        from hfdist.launch.ray.failures import cause_of

        failures = ray.get(self._relay.failures.remote())
        lost = self._error.worker_failures if isinstance(self._error, WorkerGroupError) else {}
        return cause_of(failures, lost, self._error, self._run_dir)


def _per_worker(config: RunConfig, nodes: list[dict[str, float]]) -> dict[str, float]:
    """Resources of a worker, by Ray's names."""
    launch = config.launch
    gpus = launch.gpus_per_worker
    if config.device == "cpu":
        if gpus:
            raise ConfigError(
                f"launch.gpus_per_worker is {gpus:g} but device is cpu: set device=cuda"
            )
        gpus = 0.0
    elif config.device != "auto":
        if gpus == 0:
            raise ConfigError(f"device is {config.device} but launch.gpus_per_worker is 0")
        gpus = 1.0 if gpus is None else gpus
    elif gpus is None:  # auto: GPUs where there are any
        gpus = 1.0 if any(node.get("GPU", 0.0) >= 1.0 for node in nodes) else 0.0
    demand = {"CPU": launch.cpus_per_worker}
    if gpus:
        demand["GPU"] = gpus
    return demand | dict(launch.resources)


def _cause(error: Exception) -> object:
    return getattr(error, "controller_failure", error)
