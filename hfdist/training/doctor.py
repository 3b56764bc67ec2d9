"""What could go wrong with a job, found before it does: its task looked at from all sides on one batch."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from hfdist.comm import SerialCommunicator
from hfdist.config.job import RunConfig
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import as_sum, from_task
from hfdist.curvature.objective import Problem
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan
from hfdist.devices import arithmetic, resolve
from hfdist.errors import TaskError, UserError
from hfdist.rundir.stop import StopRequest
from hfdist.tasks.task import Batch, num_examples
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker

FEW = 512
"""Examples of a gradient that is drawn anew each step, under which its noise decides."""
_MOST = 64
"""Examples that the checks of the loss look at."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    status: Literal["ok", "note", "wrong"]
    """Right; worth knowing; or a run would fail, or train something else than is meant."""
    text: str
    fix: str = ""


def examine(config: RunConfig) -> list[Finding]:
    """Check task, loss, gradient and product of a job, in this process, on its first batch.

    Nothing is written, and no step is taken.
    """
    optim = dataclasses.replace(config.optim, verify="always")
    config = config.model_copy(update={"optim": optim})
    try:
        device = resolve(config.device, local_rank=0)
    except UserError as error:
        return [_wrong("device", error, "choose another `device`")]
    with (
        tempfile.TemporaryDirectory() as folder,
        arithmetic(tf32=config.tf32, deterministic=config.deterministic),
    ):
        job = Job(config=config, run_dir=Path(folder) / "run")
        try:
            worker = Worker(job, SerialCommunicator(device), QuietDisplay(), StopRequest())
        except UserError as error:
            fix = "correct the task or the job where the message says; then ask again"
            return [_wrong("task", error, fix)]
        return list(_Examination(worker, config).findings())


def _wrong(check: str, error: Exception, fix: str) -> Finding:
    return Finding(check=check, status="wrong", text=str(error), fix=fix)


class _Examination:
    """The checks, in the order of their findings; each needs what those before it found right."""

    def __init__(self, worker: Worker, config: RunConfig) -> None:
        self.worker, self.config = worker, config
        self.task, self.model = worker.task, worker.model.train()
        n = worker.num_examples
        size = min(n or _MOST, _MOST, config.batches.gradient or _MOST)
        self.loader = None
        if n is not None:
            dtype = getattr(torch, config.dtype)
            self.loader = BatchLoader(self.task, worker.data, worker.comm.device, dtype)
        self.batch = worker.first_batch if self.loader is None else self._load(0, size)
        self.size = num_examples(self.batch)

    def findings(self) -> Iterator[Finding]:
        params = self.worker.params.numel
        n = self.worker.num_examples
        yield Finding(
            check="task",
            status="ok",
            text=f"{type(self.task).__name__}: {params:,} parameters, "
            + ("a function without data" if n is None else f"{n:,} training examples"),
        )
        try:
            yield from self._data()
            yield from self._plan()
            loss = self._loss()
            yield loss
            if loss.status == "wrong":
                return
            repeated = self._determinism()
            yield repeated
            yield from self._random_numbers()
            yield from self._batch_norm()
            yield from self._reduction()
            yield from self._unused()
            if repeated.status != "wrong":
                yield from self._derivatives()
        except UserError as error:
            yield _wrong("task", error, "correct the task's code where the message says")

    # -- data and batches ------------------------------------------------------------------------

    def _load(self, first: int, end: int) -> Batch:
        assert self.loader is not None
        return self.loader.load(MicrobatchPlan(number=0, indices=torch.arange(first, end)))

    def _data(self) -> Iterator[Finding]:
        leaves = [leaf for leaf in tree_leaves(self.batch) if isinstance(leaf, Tensor)]
        if any(leaf.is_floating_point() and not leaf.isfinite().all() for leaf in leaves):
            yield Finding(
                check="data",
                status="wrong",
                text=f"the first {self.size} examples contain NaN or infinite numbers",
                fix="clean the data, or mask what is missing in the loss",
            )
        if self.loader is None:
            return
        again = self._load(0, self.size)
        if not _equal(self.batch, again):
            yield Finding(
                check="data",
                status="note",
                text="an example is another one each time it is asked for (augmentation?): a resumed "
                "run does "
                "not repeat the steps of one that was not interrupted",
                fix="make it a function of its index, or of an epoch that the data set keeps",
            )

    def _plan(self) -> Iterator[Finding]:
        n, batches = self.worker.num_examples, self.config.batches
        if n is None:
            return
        workers = self.config.launch.max_workers
        if n < workers:
            yield Finding(
                check="batches",
                status="wrong",
                text=f"{workers} workers but {n} training examples",
                fix=f"lower launch.workers to at most {n}",
            )
        used = batches.gradient or n
        if used < n and used < FEW:
            yield Finding(
                check="batches",
                status="note",
                text=f"the gradient sees {used} of {n:,} examples, drawn anew each step: so few say little "
                "about curvature, and what a long step gains on them others lose",
                fix=f"raise batches.gradient to all data, or {FEW} and more; or use an optimizer of the "
                "first "
                "order, or solver=metric under newton_gradient",
            )

    # -- loss ------------------------------------------------------------------------------------

    @contextmanager
    def _evaluation(self, seed: int = 0) -> Iterator[None]:
        fixed = FixedRandomness(self.worker.params.device, self.model)
        with fixed.evaluation(seed), torch.enable_grad():
            yield

    def _loss_of(self, batch: Batch, seed: int = 0) -> tuple[float, float]:
        """(sum, weight)."""
        with self._evaluation(seed):
            total, weight = as_sum(
                self.task.loss(self.task.forward(self.model, batch), batch),
                num_examples(batch),
                self.task.loss_reduction,
                f"{type(self.task).__name__}.loss",
            )
        return float(total.detach()), float(weight)

    def _loss(self) -> Finding:
        total, weight = self._loss_of(self.batch)
        if weight == 0.0:
            return Finding(
                check="loss",
                status="wrong",
                text=f"the weights of the first {self.size} examples add up to 0: all targets masked?",
                fix="mask fewer targets, or make batches larger",
            )
        if not math.isfinite(total / weight):
            return Finding(
                check="loss",
                status="wrong",
                text=f"the loss at the start is {total / weight}: no step can begin there",
                fix="look for log(0), division by 0 and overflow in model and loss, or start with "
                "smaller weights",
            )
        return Finding(check="loss", status="ok", text=f"{total / weight:.6g} at the start")

    def _determinism(self) -> Finding:
        first, second = self._loss_of(self.batch)[0], self._loss_of(self.batch)[0]
        if first == second:
            return Finding(
                check="determinism", status="ok", text="two evaluations give the same bits"
            )
        close = math.isclose(first, second, rel_tol=1e-5)
        return Finding(
            check="determinism",
            status="note" if close else "wrong",
            text=f"two evaluations of the same batch differ: {first:.9g} and {second:.9g}, with the same "
            "parameters and random numbers",
            fix="resumed runs will differ by rounding; deterministic=true replaces the operation, or names it"
            if close
            else "forward or loss keep state between calls, or draw numbers that are not torch's: "
            "remove that, or "
            "draw them with torch",
        )

    def _random_numbers(self) -> Iterator[Finding]:
        dropping = [name for name, m in self.model.named_modules() if _drops(m)]
        differs = self._loss_of(self.batch, 0) != self._loss_of(self.batch, 1)
        if dropping or differs:
            where = _named(dropping) if dropping else "the forward pass"
            yield Finding(
                check="dropout",
                status="note",
                text=f"{where} draws random numbers: they are the same in all evaluations of a step, "
                "and new in "
                "the next",
                fix="for full batches less of it, or none, trains better: each step goes far on one mask",
            )
        else:
            yield Finding(check="dropout", status="ok", text="no random numbers in the model")

    def _batch_norm(self) -> Iterator[Finding]:
        norms = [
            name
            for name, m in self.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        if not norms:
            return
        n, workers = self.worker.num_examples or 1, self.config.launch.max_workers
        batches = self.config.batches
        share = math.ceil((batches.gradient or n) / workers)
        size = min(batches.microbatch or share, share)
        if workers == 1 and batches.microbatch is None:
            yield Finding(
                check="batch norm",
                status="ok",
                text=f"{_named(norms)}: statistics of the whole batch, which move once a step",
            )
            return
        yield Finding(
            check="batch norm",
            status="wrong" if size < 2 else "note",
            text=f"{_named(norms)}: every microbatch, of about {size} examples, has statistics of its "
            "own, so the "
            "loss depends on batches.microbatch and launch.workers",
            fix="at least 2 examples a microbatch are needed"
            if size < 2
            else "keep microbatches large (hundreds), or take GroupNorm or LayerNorm",
        )

    def _reduction(self) -> Iterator[Finding]:
        """The loss of a batch is that of its uneven parts, weighted; without dropout and batch "
        "statistics."""
        if self.loader is None or self.size < 3:
            return
        cut = max(1, self.size // 3)
        was_training = self.model.training
        self.model.eval()
        try:
            whole = self._loss_of(self.batch)
            parts = [self._loss_of(self._load(*at)) for at in ((0, cut), (cut, self.size))]
        finally:
            self.model.train(was_training)
        total, weight = (sum(values) for values in zip(*parts))
        if math.isclose(whole[0], total, rel_tol=1e-3, abs_tol=1e-9):
            text = f'loss_reduction = "{self.task.loss_reduction}" describes the loss'
            if whole[1] != self.size:
                text = f"the loss is a sum with the weight {whole[1]:g} of {self.size} examples"
            yield Finding(check="reduction", status="ok", text=text)
            return
        yield Finding(
            check="reduction",
            status="wrong",
            text=f"the loss of {self.size} examples is {whole[0] / whole[1]:.6g}, but "
            f"{total / weight:.6g} by those "
            f"of its first {cut} and its other {self.size - cut}: microbatches and workers would change "
            "what is "
            "trained",
            fix='loss_reduction = "sum" for a loss that is a sum; return (sum, weight) where it is a '
            "mean over "
            "something else than examples (tokens, class weights)",
        )

    # -- derivatives -----------------------------------------------------------------------------

    def _unused(self) -> Iterator[Finding]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        with self._evaluation():
            microbatch = from_task(self.task, self.model, self.batch, seed=0)
            loss = microbatch.evaluate(None, None).loss_sum
            gradient = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        unused = [(name, p) for (name, p), g in zip(named, gradient) if g is None]
        still = [name for (name, _), g in zip(named, gradient) if g is not None and not g.any()]
        if unused:
            size = sum(p.numel() for _, p in unused)
            yield Finding(
                check="parameters",
                status="note",
                text=f"the loss does not depend on {_named([name for name, _ in unused])} ({size:,} "
                "numbers)",
                fix="use them, or take them out (requires_grad_(False)): the solver's vectors hold them",
            )
        if still:
            yield Finding(
                check="parameters",
                status="note",
                text=f"the gradient of {_named(still)} is zero on {self.size} examples",
                fix="look for dead units, detached parts and initial weights of zero behind them",
            )
        if not unused and not still:
            yield Finding(check="parameters", status="ok", text="the loss depends on all of them")

    def _derivatives(self) -> Iterator[Finding]:
        """The run's own checks of gradient and products, on the first step's microbatches."""
        try:
            problem = self.worker.problem(0)
            problem.loss_and_gradient()
            B = problem.curvature(0.0)
        except TaskError as error:
            is_product = "product" in str(error).partition(":")[0]
            if is_product:
                yield Finding(
                    check="gradient", status="ok", text="agrees with differences of losses"
                )
            yield _wrong(
                "product" if is_product else "gradient",
                error,
                "replace the operation that the message names by torch's own; optim.verify=off trains "
                "without the "
                "check",
            )
            return
        yield Finding(check="gradient", status="ok", text="agrees with differences of losses")
        yield self._product(problem, B)
        problem.release()

    def _product(self, problem: Problem, B: Callable[[Tensor], Tensor]) -> Finding:
        generator = torch.Generator().manual_seed(0)
        shape, like = problem.params.numel, problem.params.zeros()
        v, w = (torch.randn(shape, generator=generator).to(like) for _ in range(2))
        Bv, Bw = B(v).clone(), B(w).clone()
        again = B(v)
        size = float(v.norm() * Bw.norm() + w.norm() * Bv.norm()) or 1.0
        asymmetry = abs(float(torch.dot(v, Bw) - torch.dot(w, Bv))) / size
        repeated = float((again - Bv).norm()) / (float(Bv.norm()) or 1.0)
        curvature = float(torch.dot(v, Bv)) / (float(v.norm() * Bv.norm()) or 1.0)
        engine = problem.product_engine
        fixes = "report the model: its products are wrong. optim.product_engine=recompute is another way"
        rounding = 1e3 * torch.finfo(v.dtype).eps
        if not bool(Bv.isfinite().all()):
            text = "a product with a random vector is not finite"
        elif asymmetry > rounding:
            text = f"v'Bw and w'Bv differ by {asymmetry:.1e} of their size"
        elif self.config.optim.curvature_opt == "ggn" and curvature < -rounding:
            text = f"v'Bv is negative ({curvature:.1e} of its size): the loss is not convex in the outputs"
            fixes = (
                "CG stops there; krylov goes on. Look for a loss that is no convex function of the "
            )
            "outputs"
            return Finding(check="product", status="note", text=text, fix=fixes)
        elif repeated > rounding:
            text = f"the same product twice differs by {repeated:.1e}"
        elif self.worker._engine.verifier.refused:
            refused = ", ".join(sorted(self.worker._engine.verifier.refused))
            return Finding(
                check="product",
                status="note",
                text=f"right, symmetric, by {engine}: {refused} was wrong for this model and is not used",
                fix="nothing to do; products cost more",
            )
        else:
            text = f"right, symmetric{', positive' if curvature > 0 else ''}, by {engine}"
            return Finding(check="product", status="ok", text=text)
        return Finding(check="product", status="wrong", text=text, fix=fixes)


def _drops(module: nn.Module) -> bool:
    rate: Any = getattr(module, "p", None)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return rate > 0.0
    inside: Any = getattr(module, "dropout", 0.0)  # of attention and recurrent layers
    return isinstance(inside, float) and inside > 0.0


def _named(names: list[str], most: int = 3) -> str:
    shown = ", ".join(name or "the model" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _equal(batch: Batch, other: Batch) -> bool:
    (a, one), (b, two) = tree_flatten(batch), tree_flatten(other)
    return one == two and all(
        torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
        else x is y or (type(x) is type(y) is not Tensor and x == y)
        for x, y in zip(a, b)
    )
