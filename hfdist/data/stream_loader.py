"""Batches of a stream, on the device; the next step's in the background."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from hfdist.data.batches import collated, on_device
from hfdist.data.plan import MicrobatchPlan, StepPlan
from hfdist.data.processes import streamed
from hfdist.data.stream import Stream
from hfdist.tasks.task import Batch, Task


@dataclass(frozen=True)
class _Read:
    """A step's batches, on the host, and where the stream then stands."""

    step: int
    batches: dict[int, Batch]
    """By the place of their plan in the step."""
    state: dict[str, Any]


class StreamLoader:
    """Reads a stream step by step; a step ahead in a thread, or further in a process of its own.

    Args:
        task: Its `collate` makes batches of examples.
        stream: This rank's.
        device: Where batches go.
        dtype: Type of floating-point leaves.
        in_process: Read and collate in a process of its own.
    """

    def __init__(
        self,
        task: Task,
        stream: Stream,
        device: torch.device,
        dtype: torch.dtype,
        in_process: bool = False,
    ) -> None:
        self._task, self._stream, self._device, self._dtype = task, stream, device, dtype
        self._in_process = in_process
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hfdist-data")
        self._coming: Future[_Read] | None = None
        self._made: Iterator[_Read] | None = None
        self._now: _Read | None = None
        self._keys: list[MicrobatchPlan] = []
        self._state = stream.state()

    def first(self, n: int) -> Batch:
        """The first examples of the stream, which are still to come."""
        examples = self._stream.first(n)
        return on_device(collated(self._task, examples), self._device, self._dtype)

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where the stream stood after a step, before anything is loaded."""
        self._stream.restore(state)
        self._state = dict(state)

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the steps that have begun."""
        return self._state

    def expect(self, plans: Iterable[tuple[int, StepPlan]]) -> None:
        """The steps to come, in order: a process, if there is to be one, begins with them."""
        if self._in_process:
            self._made = streamed(self._read(step, plan) for step, plan in plans)

    def begin(self, step: int, plan: StepPlan) -> None:
        """Have a step's batches.

        Raises:
            DataError: The stream fails, or the task cannot make a batch.
            WorkerError: The process that reads is lost.
        """
        if self._made is not None:
            self._now = next(self._made)
        elif self._coming is not None:
            self._now, self._coming = self._coming.result(), None
        else:
            self._now = self._read(step, plan)
        assert self._now.step == step, "a stream is read step by step"
        self._keys, self._state = plan.microbatches(), self._now.state

    def load(self, plan: MicrobatchPlan) -> Batch:
        """A batch of the step that has begun."""
        assert self._now is not None
        place = next(k for k, known in enumerate(self._keys) if _is_same(known, plan))
        return on_device(self._now.batches[place], self._device, self._dtype)

    def prepare(self, step: int, plan: StepPlan) -> None:
        """Begin to read the next step's examples."""
        if self._made is None:
            self._coming = self._pool.submit(self._read, step, plan)

    def close(self) -> None:
        """End the background's thread and process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._coming = self._made = self._now = None

    def _read(self, step: int, plan: StepPlan) -> _Read:
        microbatches = plan.microbatches()
        wanted = {int(k) for microbatch in microbatches for k in microbatch.indices}
        examples = {}
        for k in range(plan.num_read):
            example = self._stream.read()
            if k in wanted:  # the others are those of other ranks
                examples[k] = example
        batches = {
            place: collated(self._task, [examples[int(k)] for k in microbatch.indices])
            for place, microbatch in enumerate(microbatches)
        }
        return _Read(step, batches, self._stream.state())


def _is_same(a: MicrobatchPlan, b: MicrobatchPlan) -> bool:
    return a is b or (a.number == b.number and torch.equal(a.indices, b.indices))


def stream_batches(
    task: Task,
    stream: Stream,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Batch]:
    """This rank's batches of one pass over a stream, from its beginning.

    Raises:
        DataError: The stream fails, or the task cannot make a batch.
    """
    examples: list[Any] = []
    number = 0
    for example in stream.once():
        examples.append(example)
        if len(examples) == batch_size:
            if number % world_size == rank:
                yield on_device(collated(task, examples), device, dtype)
            number, examples = number + 1, []
    if examples and number % world_size == rank:
        yield on_device(collated(task, examples), device, dtype)
