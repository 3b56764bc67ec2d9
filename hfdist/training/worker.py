"""The loop of one rank: build, resume, step, commit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hfdist import __version__
from hfdist.checkpoint import CheckpointStore, check, mirror
from hfdist.comm import Communicator, SerialCommunicator
from hfdist.config.job import RunConfig
from hfdist.curvature.damping_metric import make_damping_metric
from hfdist.curvature.dispatch import Watch
from hfdist.curvature.engines import ProductEngine, autocast_dtype
from hfdist.curvature.example_signs import example_seeds
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.layout import Sharded, make_layout
from hfdist.curvature.memory import reserved_bytes
from hfdist.curvature.microbatch import Evaluation, LossTraits, Microbatch, from_task
from hfdist.curvature.objective import Overrides, Problem, Regularisation, Roles
from hfdist.curvature.params import COMPLEX, ParameterVector
from hfdist.curvature.preconditioners import Context, make_preconditioner
from hfdist.curvature.preconditioners.memory import PreconditionerMemory
from hfdist.curvature.squares import EXAMPLES, is_sum_of_squares
from hfdist.curvature.step_memory import BATCHES, StepMemory, told_when_out_of_memory
from hfdist.curvature.structural import StructuralDamping, hidden_modules
from hfdist.curvature.verify import Verifier
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import (
    MicrobatchPlan,
    RolePlan,
    StepPlan,
    data_passes,
    examples_until,
    gradient_examples,
    plan_step,
    plan_stream_step,
)
from hfdist.data.points import TermSize, plan_points
from hfdist.data.stream import Stream, is_stream
from hfdist.data.stream_loader import StreamLoader
from hfdist.devices import arithmetic, device_name, peak_memory, resolve
from hfdist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    Leaving,
    StepMemoryError,
    TaskError,
    TaskFailure,
    UserError,
    WorkerError,
)
from hfdist.optim.kept_gain import ADVICE
from hfdist.optim.report import StepReport
from hfdist.optim.solvers.auto import choice
from hfdist.optim.step import HFState, hf_step
from hfdist.rundir import files
from hfdist.rundir.locations import home_of, is_address, normal, split
from hfdist.rundir.stop import StopRequest, stop_on_signals
from hfdist.seeds import mixed
from hfdist.tasks.loading import load_task
from hfdist.tasks.residuals import PointSets
from hfdist.tasks.task import Batch, Task
from hfdist.tasks.user_code import length, told, user_code, where
from hfdist.tracking import CompositeTracker, NullTracker, Status, Tracker, make_tracker
from hfdist.training.consistency import check_agreement
from hfdist.training.coordinator import Coordinator, Progress, model_tensors
from hfdist.training.display import Display
from hfdist.training.evaluation import Evaluator

logger = logging.getLogger(__name__)

_STOP, _LEAVE = 1.0, 2.0**-17
"""By which a rank asks to abandon a step; of all ranks that leave together it is less than one stop."""
LARGEST_FOUND, MOST_OUTPUTS, MOST_BYTES = 1000, 8, 2**28
"""Rows of a matrix, outputs an example, and bytes of rows up to which solvers of residuals take a loss that
was found to be a sum of squares (docs/own-model.md)."""
SMALL_BATCH = 256
"""Examples of a gradient, drawn anew each step, under which a job is warned (docs/choosing.md)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to start or to go on with."""

    config: RunConfig
    run_dir: Path
    resume: bool = False
    extra_tracker: Tracker | None = None
    """A tracker of the launcher's own, which gets the same calls as the configured one."""
    retried: bool = False
    """The launcher tries again after failures that need not repeat, and records the last one itself."""
    is_leaving: Callable[[], bool] | None = None
    """Whether a worker's machine will soon be taken away: every step is then checkpointed at once."""


def run(job: Job, comm: Communicator, display: Display) -> dict[str, Any]:
    """Train on this rank until the last step, a stop request or an error.

    Args:
        job: The run.
        comm: The ranks; each calls this function.
        display: Rank 0's; what the others show is their launcher's choice.

    Returns:
        The content of result.json; its `status` is FINISHED, KILLED after Ctrl-C or SIGTERM, or FAILED,
        with an `error`, if all steps were done and the model is no better for it.

    Raises:
        UserError: Bad input, or a peer that is gone; recorded as FAILED before it is raised.
    """
    config = job.config
    with (
        stop_on_signals(job.run_dir / files.STOP_FILE) as stop,
        arithmetic(tf32=config.tf32, deterministic=config.deterministic),
    ):
        check_agreement(comm, config)
        return Worker(job, comm, display, stop).run()


class Worker:
    """Task, model and data of one rank, and the loop over steps."""

    def __init__(self, job: Job, comm: Communicator, display: Display, stop: StopRequest) -> None:
        self.config, self.comm, self._display, self._stop = job.config, comm, display, stop
        self._resume, self._retried = job.resume, job.retried
        self.task, self.model = build(job.config, comm.device)
        self.params = ParameterVector(p for p in self.model.parameters() if p.requires_grad)
        optim = job.config.optim
        self._layout = make_layout(self.params, comm, optim)
        self._engine = ProductEngine(
            requested=optim.product_engine,
            memory_budget=optim.memory_budget,
            reserved=reserved_bytes(self.params, optim, comm.world_size),
            captures=optim.capture_products,
            verifier=Verifier(mode=optim.verify),
        )
        name = type(self.task).__name__
        self.data = self.task.train_data()
        self.num_examples: int | None = None
        """Of data with a length."""
        if is_stream(self.data):
            _check_sizes(job.config, name)
        else:
            self.num_examples = length(self.data, f"{name}.train_data()", "train on")
        self._loader, self._stream = self._make_loader()
        self._evaluation = Evaluator(self.task, job.config, comm, job.config.batches.loaders)
        self._costs = _costs(self.task, self.num_examples)
        self._terms = term_sizes(self.data)
        # What is wrong with the job shows here, before anything is written.
        if self.num_examples is not None and self.num_examples < comm.world_size:
            raise DataError(
                f"{comm.world_size} workers but {self.num_examples} training examples: lower "
                f"launch.workers to at most {self.num_examples}"
            )
        self._outputs_per_example = 1  # known once the task was tried
        self._plan(0)
        self.first_batch = self._try_task()
        """Of a few examples."""
        self._check_batch_norm()
        self._is_sum_of_squares = self._finds_squares()
        self._hidden_modules: list[nn.Module] = []
        if optim.structural_damping:
            self._hidden_modules = hidden_modules(self.task.hidden_units(self.model))
        tracker = _tracker(job) if comm.is_rank_0 else NullTracker()
        self._coordinator = Coordinator(
            job.config,
            job.run_dir,
            self.model,
            self._layout,
            comm,
            tracker,
            display,
            stop,
            job.is_leaving,
        )

    def run(self) -> dict[str, Any]:
        """The loop; see `run`."""
        self._warn_about_batch_norm()
        self._warn_about_small_batches()
        progress = self._coordinator.start(self._resume, self._info())
        self._go_to(progress)
        self.model.train()
        try:
            status = self._loop(progress)
            problem = self._coordinator.what_came_of_it(status, progress)
            if problem is None:
                return self._coordinator.finish(
                    status, progress, self._example_inputs, draw=self._draw
                )
            return self._coordinator.finish(Status.FAILED, progress, error=problem, save=True)
        except BaseException as error:
            failure = self._told(error)
            # A rank that was cut off must not write: the run may go on elsewhere.
            if not self._retried or getattr(failure, "exit_code", 1) == 2:
                # Where a step ran out of memory, the state is whole: no step before it is lost.
                is_whole = isinstance(failure, StepMemoryError) and self.comm.world_size == 1
                self._coordinator.fail(progress, failure, save=is_whole)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._loader.close()
            self._evaluation.close()

    def _go_back(self, progress: Progress) -> None:
        """Load a step's data once more."""
        self._loader.close()
        self._loader, self._stream = self._make_loader()
        self._go_to(progress)

    def _make_loader(self) -> tuple[BatchLoader | StreamLoader, Stream | None]:
        """What loads the data, and the stream that it is where it has no length."""
        config, comm = self.config, self.comm
        dtype, loaders = getattr(torch, config.dtype), config.batches.loaders
        if is_stream(self.data):
            name = f"{type(self.task).__name__}.train_data()"
            stream = Stream(self.data, name, comm.rank, comm.world_size)
            return (
                StreamLoader(self.task, stream, comm.device, dtype, in_process=loaders > 0),
                stream,
            )
        return (
            BatchLoader(
                *(self.task, self.data, comm.device, dtype),
                # Terms hold functions, which do not go from process to process.
                processes=0 if isinstance(self.data, PointSets) else loaders,
                seed=config.seed,
            ),
            None,
        )

    def _go_to(self, progress: Progress) -> None:
        """Begin to load the next steps' data."""
        if isinstance(self._loader, StreamLoader):
            if progress.data is not None:
                self._loader.restore(progress.data)
            elif progress.state.step:
                raise CheckpointError(
                    f"the checkpoint of step {progress.state.step} does not say where the stream of "
                    f"{type(self.task).__name__}.train_data() stood: start a new run"
                )
            progress.data = self._loader.state()
            self._loader.expect(self._plans_from(progress.state.step))
            return
        progress.data = None
        self._loader.expect(
            (step, microbatch)
            for step, plan in self._plans_from(progress.state.step)
            for microbatch in plan.microbatches()
        )

    def _plans_from(self, first: int) -> Iterator[tuple[int, StepPlan]]:
        return ((step, self._plan(step)) for step in range(first, self.config.steps))

    def _loop(self, progress: Progress) -> Status:
        """Step until the last step, or until somebody asks to stop."""
        try:
            while progress.state.step < self.config.steps:
                before = progress.memory.copy()
                try:
                    report = self.step(progress)
                except BaseException as error:
                    progress.memory = before  # of a step that was not taken
                    if not isinstance(error, Leaving):
                        raise
                    self._coordinator.save_at_once(progress)
                    self._go_back(progress)
                    continue
                if report.finds_noise and self.comm.is_rank_0:
                    kept = max(report.kept_gain, 0.0)
                    logger.warning(ADVICE.format(kept=kept, key="batches.gradient"))
                if self._coordinator.commit(report, progress, self.params, self._extra(report)):
                    return Status.KILLED
        except Interrupted:
            # The step in progress is abandoned: parameters and state are those before it.
            return Status.KILLED
        return Status.FINISHED

    def _told(self, error: BaseException) -> BaseException:
        """What a failure of the loop is called: the task's own code had worked before it."""
        if isinstance(error, TaskError):
            return error if isinstance(error, TaskFailure) else TaskFailure(str(error))
        if isinstance(error, UserError | Interrupted | KeyboardInterrupt):
            return error
        # Hooks, and backward passes of the user's own, are not called by the task's methods.
        task = type(self.task)
        if isinstance(error, SystemExit) or where(error, task):
            return TaskFailure(told(f"{task.__name__}'s own code in a step", error, task))
        return error

    def _try_task(self) -> Batch:
        """Run model and loss on a few examples, so that an error of the task is reported as such.

        Returns:
            The batch of these examples.
        """
        name = type(self.task).__name__
        n = 4 if self._stream else min(4, self.num_examples or 0)
        batches = self._first_batches(n) if n else [None]
        seen = (
            f"its first {n} examples" if n else "the batch None, as its train_data() returns None"
        )
        with (
            user_code(f"{name} on {seen}", type(self.task).forward),
            FixedRandomness(self.comm.device, self.model).evaluation(seed=0),
            torch.enable_grad(),
        ):
            try:
                for batch in batches:
                    e = from_task(self.task, self.model, batch, seed=0).evaluate(None, None)
                    self._outputs_per_example = sum(z.numel() for z in e.outputs) // max(n, 1)
            except TaskError as error:
                if n:
                    raise
                raise TaskError(
                    f"{error}. Its batch is None, because {name}.train_data() returns None: return a data "
                    "set there, unless the loss is a function of the parameters alone"
                ) from error
        return batches[0]

    def _first_batches(self, n: int) -> list[Batch]:
        """The first n examples, of every term where the data is in terms."""
        if self._terms is None or isinstance(self._loader, StreamLoader):
            return [self._loader.first(n)]
        return [
            self._loader.first(min(n, term.num_points), k) for k, term in enumerate(self._terms)
        ]

    def _check_batch_norm(self) -> None:
        """No microbatch of any rank is a single example that batch norm has no statistics of.

        Raises:
            ConfigError: One is.
        """
        if self.data is None or not self._has_batch_norm():
            return
        sizes = {
            len(microbatch.indices)
            for step in (0, self.config.steps - 1)
            for rank in range(self.comm.world_size)
            for microbatch in self._plan(step, rank).microbatches()
        }
        if 1 not in sizes:
            return
        one = self._first_batches(1)[0]
        try:
            with FixedRandomness(self.comm.device, self.model).evaluation(seed=0):
                self.task.forward(self.model.train(), one)
        except (ValueError, TaskError) as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                "batch norm cannot normalise a microbatch of 1 example: choose batches.microbatch, the sizes "
                "of the roles and launch.workers so that every microbatch has at least 2"
            ) from error

    def _has_batch_norm(self) -> bool:
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())

    def _example_inputs(self) -> Any:
        """What the model takes of a batch, for one example: no step need have been taken here."""
        return _first_example(self.task.example_inputs(self.first_batch))

    def _draw(self, folder: Path) -> Sequence[Path]:
        """The task's own pictures."""
        self.model.eval()
        return self.task.draw(self.model, folder)

    # -- a step ----------------------------------------------------------------------------------

    def step(self, progress: Progress) -> StepReport:
        """Take the next step; `progress` moves on with it."""
        step = progress.state.step
        share = self._curvature_share(progress.state)
        plan = self._plan(step, share=share)
        memory = StepMemory(self.comm.device)
        with self._told_when_out_of_memory(memory, step, plan):
            report, state = self._taken(step, plan, share, progress, memory)
        report = dataclasses.replace(report, communication=self.comm.take_counters())
        progress.state = state
        progress.cg_iterations += report.cg_iterations
        progress.final_loss = report.final_loss
        if isinstance(self._loader, StreamLoader):
            progress.data = self._loader.state()
        every, done = self.config.evaluate.every, step + 1
        if self._evaluation.has_data and (
            done == self.config.steps or (every and done % every == 0)
        ):
            progress.evaluation = self._evaluation.of(self.model)
        return report

    def _taken(
        self, step: int, plan: StepPlan, share: float, progress: Progress, memory: StepMemory
    ) -> tuple[StepReport, HFState]:
        """`hf_step` on the step's data."""
        try:
            with memory.part(BATCHES):
                self._loader.begin(step, plan)
                problem = self._problem(plan, progress.state, progress.memory, memory)
        except WorkerError:
            if self._stop.requested:  # whoever asked this process to end asked its loaders, too
                raise Interrupted from None
            raise
        if step + 1 < self.config.steps:
            # With this step's share, which is most likely the next one's, too.
            self._loader.prepare(step + 1, self._plan(step + 1, share=share))
        options = self.config.optim

        def on_cg_iteration(i: int, signal: float) -> None:
            self._display.cg_iteration(step, i, options.cg_max_iter or self.params.numel)
            if signal >= _STOP:
                raise Interrupted
            if signal > 0:
                raise Leaving

        report, state = hf_step(problem, progress.state, options, on_cg_iteration=on_cg_iteration)
        progress.memory.after(report.work - problem.costs.metric, report.accepted)
        return report, state

    def _told_when_out_of_memory(
        self, memory: StepMemory, step: int, plan: StepPlan
    ) -> AbstractContextManager[None]:
        """One message where the step inside runs out of memory."""
        return told_when_out_of_memory(
            memory,
            self.params,
            self.config.optim,
            step=step,
            world_size=self.comm.world_size,
            microbatch=max((len(m.indices) for m in plan.microbatches()), default=None),
            then=f"; `hfdist resume {self._coordinator.home} KEY=VALUE` goes on from its last checkpoint",
        )

    def problem(self, step: int) -> Problem:
        """The objective of a step, with all examples of the curvature's role."""
        plan = self._plan(step)
        self._loader.begin(step, plan)
        state = HFState(damping=self.config.optim.damping, step=step)
        return self._problem(plan, state, PreconditionerMemory())

    def _curvature_share(self, state: HFState) -> float:
        """Of the gradient's examples, where `batches.curvature` is auto."""
        is_fixed = self.config.batches.loaders > 0  # processes that load know the plans beforehand
        grows = (
            self.config.optim.solver in ("auto", "krylov")
            and self._terms is None
            and not self._solves_rows()
        )
        if not grows or self.num_examples is None or is_fixed:
            return 1.0
        return state.curvature_share.at(self.config.batches.gradient or self.num_examples)

    def _plan(self, step: int, rank: int | None = None, share: float = 1.0) -> StepPlan:
        rank = self.comm.rank if rank is None else rank
        if self._terms is not None:
            return plan_points(
                self.config.batches,
                self._terms,
                step=step,
                rank=rank,
                world_size=self.comm.world_size,
            )
        if self._stream is not None:
            return plan_stream_step(
                self.config.batches,
                step=step,
                rank=rank,
                world_size=self.comm.world_size,
                is_sharded=self._stream.is_sharded,
            )
        return plan_step(
            self.config.batches,
            num_examples=self.num_examples,
            seed=self.config.seed,
            step=step,
            rank=rank,
            world_size=self.comm.world_size,
            costs=self._costs,
            curvature_share=share,
        )

    def _load(self, role: RolePlan) -> list[tuple[MicrobatchPlan, Batch]]:
        return [(plan, self._loader.load(plan)) for plan in role.microbatches]

    def _problem(
        self,
        plan: StepPlan,
        state: HFState,
        kept: PreconditionerMemory,
        memory: StepMemory | None = None,
    ) -> Problem:
        seed = mixed(self.config.seed, "forward", state.step)

        def role(batches: list[tuple[MicrobatchPlan, Batch]]) -> list[Microbatch]:
            return [
                self._stoppable(
                    from_task(
                        self.task,
                        self.model,
                        batch,
                        mixed(seed, plan.number),
                        example_seeds(
                            seed if plan.term is None else mixed(seed, "term", plan.term),
                            plan.indices,
                        )
                        if len(plan.indices)
                        else None,
                    )
                )
                for plan, batch in batches
            ]

        loaded = self._load(plan.gradient)
        gradient = role(loaded)
        same_curvature = plan.curvature is plan.gradient
        curvature = gradient if same_curvature else role(self._load(plan.curvature))
        same_loss = plan.line_search is plan.gradient
        loss = gradient if same_loss else role(self._load(plan.line_search))
        options = self.config.optim
        is_finite = self._terms is None and self._stream is None
        sees_all_examples = is_finite and plan.gradient.num_examples == (self.num_examples or 1)
        context = Context(
            task=self.task,
            model=self.model,
            gradient=[(microbatch, batch) for microbatch, (_, batch) in zip(gradient, loaded)],
            options=options,
            damping=state.damping,
            sees_all_examples=sees_all_examples,
            memory=kept,
        )
        return Problem(
            memory=memory,
            params=self.params,
            roles=Roles(gradient=gradient, curvature=curvature, loss=loss),
            comm=self.comm,
            curvature_opt=options.curvature_opt,
            reduction=self.task.loss_reduction,
            regularisation=Regularisation(weight_decay=options.weight_decay),
            frozen=FixedRandomness(self.comm.device, self.model),
            layout=self._layout,
            engine=self._engine,
            autocast=autocast_dtype(options),
            residuals=self._solves_rows(),  # no other solver is to wait for them
            row_solver=self._solves_rows(),
            abandon=self._asks_to_abandon,
            overrides=Overrides(
                preconditioner=make_preconditioner(context),
                damping_metric=make_damping_metric(context),
                secants=kept.secants,
            ),
            structural=StructuralDamping(
                modules=self._hidden_modules,
                mu=options.structural_damping,
                share=options.structural_examples,
            )
            if options.structural_damping
            else None,
        )

    def _asks_to_abandon(self) -> float:
        if self._stop.requested:
            return _STOP
        return _LEAVE if self._coordinator.is_in_a_hurry() else 0.0

    @property
    def _num_residuals(self) -> int | None:
        """Of a step."""
        if self._terms is not None or self.num_examples is None:
            return self.num_examples
        n = self.config.batches.gradient or self.num_examples
        return min(n, self.num_examples) * self._outputs_per_example

    def _solves_rows(self) -> bool:
        """Whether the solver works on rows of the Jacobian."""
        if self._terms is None and not self._is_sum_of_squares:
            return False
        options = self.config.optim
        name: str = options.solver
        if options.structural_damping:
            return False
        if name == "auto" and not isinstance(self._layout, Sharded):
            name = choice(self._num_residuals, self.params.numel, options.sample_rank)
        return name in ("dense", "sample_space") and options.curvature_opt == "ggn"

    def _finds_squares(self) -> bool:
        """Whether solvers of residuals may take the task's loss; decided before the first step, from what is
        the same on every rank and in a resumed run."""
        if self.task.sum_of_squares is not None:
            return self.task.sum_of_squares
        if self._terms is not None or self.num_examples is None or self.data is None:
            return False
        options = self.config.optim
        is_asked_for = options.solver in ("dense", "sample_space")
        if not is_asked_for and not (options.solver == "auto" and self._suits_rows()):
            return False
        n = min(EXAMPLES, self.num_examples)
        batch, again = self._first_batches(n)[0], self._first_batches(n)[0]
        leaves = zip(tree_leaves(batch), tree_leaves(again), strict=True)
        if not all(torch.equal(a, b) for a, b in leaves if isinstance(a, Tensor)):
            return False  # examples are drawn anew whenever they are read
        self.model.train()
        found = is_sum_of_squares(
            lambda seed: from_task(self.task, self.model, batch, seed),
            self.params.tensors,
            FixedRandomness(self.comm.device, self.model),
        )
        if found and self.comm.is_rank_0:
            logger.info(
                "the loss is a sum of squares: solvers of residuals take it (docs/own-model.md, Squares)"
            )
        return found

    def _suits_rows(self) -> bool:
        """Whether a step by rows is better than one by products, where the task does not say so: the same
        examples in every step (on new ones it would fit their noise), a matrix that costs no more than
        products would, few rows an example, each a backward pass, and nothing set that needs products."""
        options, batches, N = self.config.optim, self.config.batches, self.num_examples or 0
        sees_all = all(
            n is None or n >= N for n in (batches.gradient, batches.line_search)
        ) and batches.curvature in ("auto", None, 1.0)
        rows, P = N * self._outputs_per_example, self.params.numel
        itemsize = self.params.dtype.itemsize
        return (
            sees_all
            and self._outputs_per_example <= MOST_OUTPUTS
            and choice(rows, P, largest=LARGEST_FOUND) != "krylov"
            and rows * P * itemsize <= min(MOST_BYTES, options.memory_budget or MOST_BYTES)
            and options.curvature_opt == "ggn"
            and options.damping_metric == "identity"
            and not options.structural_damping
            and autocast_dtype(options) is None
            and not isinstance(self._layout, Sharded)
        )

    def _stoppable(self, microbatch: Microbatch) -> Microbatch:
        """A microbatch that abandons the step where a stop was asked for: a pass over many may take longer
        than a machine that is taken back still has. Several ranks agree on that between passes only."""
        if self.comm.world_size > 1:
            return microbatch

        def evaluate(traits: LossTraits | None, recorder: Watch | None = None) -> Evaluation:
            if self._stop.requested:
                raise Interrupted
            return microbatch.evaluate(traits, recorder)

        return dataclasses.replace(microbatch, evaluate=evaluate)

    # -- what is recorded ------------------------------------------------------------------------

    def _extra(self, report: StepReport) -> dict[str, float]:
        batches = self.config.batches
        if self._stream is not None:
            examples: float = gradient_examples(batches, report.step)
            seen = {"examples": float(examples_until(batches, report.step + 1))}
        else:
            whole = None if self._terms is not None else self.num_examples  # None: all, every step
            passes = data_passes(batches, whole, report.step + 1)
            before = data_passes(batches, whole, report.step)
            examples = (passes - before) * (self.num_examples or 1)
            seen = {"data_passes": passes}
        return {
            **seen,
            "examples_per_second": examples / max(report.seconds["total"], 1e-9),
            "peak_memory_bytes": peak_memory(self.comm.device),
        }

    def _info(self) -> dict[str, Any]:
        name = type(self.task).__name__
        return {
            "task": name,
            "num_parameters": self.params.numel,
            "world_size": self.comm.world_size,
            "tags": {
                "task": name,
                "device": device_name(self.comm.device),
                "world_size": str(self.comm.world_size),
                "num_parameters": str(self.params.numel),
                "hfdist": __version__,
            },
            "dataset": {
                "name": name,
                "num_examples": self.num_examples or 0,
                "num_eval_examples": self._evaluation.num_examples or 0,
            },
        }

    def _warn_about_small_batches(self) -> None:
        batches = self.config.batches
        is_new = self._stream is not None or (
            self._terms is None and (batches.gradient or 0) < (self.num_examples or 0)
        )
        solves = self.config.optim.solver in ("auto", "krylov", "cg", "steihaug")
        n = batches.gradient
        if n is None or not is_new or not solves or n >= SMALL_BATCH or not self.comm.is_rank_0:
            return
        logger.warning(
            "batches.gradient is %d, drawn anew each step: below about %d examples Hessian-free is mostly "
            "behind optimizers of many cheap steps. Take more, or one of those: Adam or SOAP, say, alone or "
            "on hfdist.newton_gradient with solver=metric",
            *(n, SMALL_BATCH),
        )

    def _warn_about_batch_norm(self) -> None:
        several = self.comm.world_size > 1 or self.config.batches.microbatch is not None
        if several and self._has_batch_norm() and self.comm.is_rank_0:
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
    for key, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            fix = (
                "run the model once on a batch in model(), so that its lazy layers know their sizes"
            )
            raise TaskError(f"{name}.model(): parameter {key} has no shape yet: {fix}")
        if p.numel() == 0:
            raise TaskError(
                f"{name}.model(): parameter {key} of shape {list(p.shape)} has no elements: a layer is 0 wide"
            )
        if p.is_complex():  # the move below would drop the imaginary part
            raise TaskError(f"{name}.model(): parameter {key} is complex: {COMPLEX}")
    return task, model.to(device=device, dtype=getattr(torch, config.dtype))


def local_folder(home: Path | str) -> tuple[Path, str]:
    """A run's folder on this machine, with job and record in it, and its `output`.

    Args:
        home: The run's folder, or ADDRESS/RUN_ID.

    Raises:
        UserError: An address at which there is no such run.
    """
    try:
        home = normal(str(home))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not is_address(home):
        run_dir = Path(home).expanduser().resolve()
        return run_dir, str(run_dir.parent)
    output, run_dir = split(home)
    mirror.pull(output, run_dir)
    return run_dir, output


def evaluate_run(
    home: Path | str,
    checkpoint: int | Literal["best"] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Loss and metrics of a run's checkpoint on its task's evaluation data, in this process.

    Args:
        home: The run's folder, or ADDRESS/RUN_ID.
        checkpoint: Step of the checkpoint, "best", or None for the newest.
        overrides: Changes of the run's job: its secrets, say, which are not written down.

    Raises:
        CheckpointError: There is no such checkpoint, or it is of another model.
        DataError: The task has no evaluation data.
    """
    run_dir, output = local_folder(home)
    config = RunConfig.from_run(run_dir, overrides)
    comm = SerialCommunicator(resolve(config.device, local_rank=0))
    task, model = build(config, comm.device)
    evaluation = Evaluator(task, config, comm)
    if not evaluation.has_data:
        raise DataError(f"{type(task).__name__} has no evaluation data: define eval_data()")
    folder = f"{home_of(output, run_dir)}/{files.CHECKPOINTS}"
    store = CheckpointStore(folder, config.checkpoint, comm)
    if not store.steps():
        raise CheckpointError(f"no checkpoint in {folder}")
    step, saved = store.load(checkpoint)
    tensors = model_tensors(model)
    check(saved.get("model"), tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.data.copy_(saved["model"][name])
    try:
        with arithmetic(tf32=config.tf32, deterministic=config.deterministic):
            values = evaluation.of(model)
    finally:
        evaluation.close()
    return {
        "run_id": run_dir.name,
        "step": step,
        "num_examples": evaluation.num_examples,
        **values,
    }


def _tracker(job: Job) -> Tracker:
    configured = make_tracker(job.config.tracking, job.run_dir.parent)
    if job.extra_tracker is None:
        return configured
    return CompositeTracker([configured, job.extra_tracker])


def term_sizes(data: Any) -> list[TermSize] | None:
    """Sizes of the terms that the data is in; None for examples."""
    if not isinstance(data, PointSets):
        return None
    return [
        TermSize(num_points=n, microbatch=term.microbatch, every_step=term.every_step)
        for term, n in zip(data.terms, data.sizes)
    ]


def _costs(task: Task, num_examples: int | None) -> Tensor | None:
    """Relative work of every training example, float64 [N]; None where the task does not say.

    Raises:
        TaskError: It is no list of so many finite numbers from 0 on.
    """
    costs = task.example_costs()
    if costs is None or num_examples is None:
        return None
    what = f"{type(task).__name__}.example_costs()"
    with user_code(what, type(task).example_costs, fix="Return a number for every example"):
        values = torch.as_tensor(costs, dtype=torch.float64)
    if values.shape != (num_examples,):
        raise TaskError(
            f"{what} returns {list(values.shape)} numbers for {num_examples} training examples: return one "
            "for each"
        )
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise TaskError(f"{what} returns numbers below 0 or not finite: costs are relative work")
    return values


def _check_sizes(config: RunConfig, name: str) -> None:
    """A stream has no "all examples".

    Raises:
        DataError: The job asks for them.
    """
    if config.batches.gradient is None:
        raise DataError(
            f"{name}.train_data() returns a stream, of which a step sees the next examples: say how many, "
            "batches.gradient=1000"
        )


def _first_example(inputs: Any) -> Any:
    """A batch of one, on the host: the example that the recorded model's signature is made of."""
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf[:1].detach().cpu() if isinstance(leaf, Tensor) and leaf.ndim else leaf,
        inputs,
    )
