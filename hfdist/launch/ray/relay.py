"""What workers on a cluster tell their driver: an actor between them, and a display that speaks to it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hfdist.launch.child import Failed

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from hfdist.optim.report import StepReport

Event = tuple[str, tuple[Any, ...]]
"""A display's method and its arguments."""

_CG_EVERY = 0.2  # seconds between reports of CG iterations: more than a person sees


class Standing(NamedTuple):
    """What has become of a run's groups of workers so far."""

    groups: int
    failures: int
    """How many of them failed."""
    placement_group: PlacementGroup | None
    """The resources that the last group's workers held."""


class Relay:
    """The actor's class: a queue of events, and how workers of the present group have failed.

    It runs beside the driver, so that it outlives workers and their nodes.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._failed: dict[int, tuple[Failed, float]] = {}
        self._groups = 0
        self._failures = 0
        self._nodes: dict[int, str] = {}
        self._world_size = 0
        self._placement_group: PlacementGroup | None = None
        self._is_stopping = False
        self._has_no_step_left = False

    def begin(self, placement_group: PlacementGroup | None, world_size: int) -> int:
        """Rank 0 of a new group reports; returns how many groups there were.

        Args:
            placement_group: The resources that the group's workers hold.
            world_size: How many they are.
        """
        self._groups += 1
        self._world_size = world_size
        self._placement_group = placement_group
        self._failed.clear()
        self._is_stopping = self._has_no_step_left = False
        return self._groups

    def tell(self, method: str, args: tuple[Any, ...]) -> None:
        """An event for the driver."""
        self._events.append((method, args))

    def fail(self, rank: int, failed: Failed) -> None:
        """A worker ends by an error of its own or a peer's."""
        self._failed[rank] = (failed, time.monotonic())

    def down(self, cause: str) -> Standing:
        """The present group has failed; `cause` says who failed first, and how."""
        self._failures += 1
        self._events.append(("_down", (cause, self._failures)))
        return self.standing()

    def at(self, rank: int, node: str) -> None:
        """A worker says where it is: node and process."""
        self._nodes[rank] = node

    def nodes(self) -> dict[int, str]:
        """Where each rank of the present group is or was."""
        return {rank: node for rank, node in self._nodes.items() if rank < self._world_size}

    def standing(self) -> Standing:
        """What has become of the run's groups so far."""
        return Standing(self._groups, self._failures, self._placement_group)

    def take(self) -> tuple[list[Event], int]:
        """The events since the last take, and how many groups there were."""
        events = list(self._events)
        self._events.clear()
        return events, self._groups

    def stop(self) -> None:
        """The driver asks the present group to stop."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Whether it does."""
        return self._is_stopping

    def last_step_done(self) -> None:
        """The present group has taken the run's last step."""
        self._has_no_step_left = True

    def is_ending(self) -> bool:
        """Whether the present group only records how the run ended, or soon will."""
        return self._is_stopping or self._has_no_step_left

    def failures(self) -> dict[int, tuple[Failed, float]]:
        """Errors of the present group's workers by rank, and when each came."""
        return dict(self._failed)


class RelayDisplay:
    """Rank 0's display on a cluster: forwards every call to the driver's.

    Args:
        relay: Handle of a `Relay` actor.
    """

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._cg_told = 0.0
        self._total_steps = 0

    def start(
        self, run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]
    ) -> None:
        self._total_steps = total_steps
        self._look_for_end(first_step)
        self._tell("start", run_id, first_step, total_steps, dict(info))

    def cg_iteration(self, step: int, iteration: int, max_iter: int) -> None:
        now = time.monotonic()
        if now - self._cg_told >= _CG_EVERY:
            self._cg_told = now
            self._tell("cg_iteration", step, iteration, max_iter)

    def step(self, step: int, report: StepReport, extra: Mapping[str, float]) -> None:
        self._look_for_end(step + 1)
        self._tell("step", step, report, dict(extra))

    def message(self, text: str) -> None:
        self._tell("message", text)

    def finish(self, result: Mapping[str, Any]) -> None:
        self._tell("finish", dict(result))

    def _look_for_end(self, done: int) -> None:
        if done >= self._total_steps:
            self._relay.last_step_done.remote()  # not waited for

    def _tell(self, method: str, *args: Any) -> None:
        self._relay.tell.remote(method, args)  # not waited for


class RelayHandler(logging.Handler):
    """Sends a worker's warnings to the driver, with its rank."""

    def __init__(self, relay: Any, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._relay, self._rank = relay, rank

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{record.levelname} [rank {self._rank}]: {record.getMessage()}"
            self._relay.tell.remote("message", (text,))
        except Exception:
            self.handleError(record)
