"""Ray Train's choice of a group's size, except that a group that is ending is left alone."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

_Policy: Any = ElasticScalingPolicy
_Trainer: Any = TorchTrainer


class PolicyUntilEnd(_Policy):
    """Does not restart a group to resize it once it has no step left, or is asked to stop: other nodes
    could only record the end again.

    Args:
        scaling_config: Ray Train's.
        relay: Handle of the `Relay` actor.
    """

    def __init__(self, scaling_config: Any, relay: Any) -> None:
        super().__init__(scaling_config)
        self._relay = relay

    def make_decision_for_running_worker_group(self, **status: Any) -> Any:
        decision = super().make_decision_for_running_worker_group(**status)
        if isinstance(decision, NoopDecision) or not ray.get(self._relay.is_ending.remote()):
            return decision
        return NoopDecision()


class Trainer(_Trainer):
    """A `TorchTrainer` with this policy, where the size of the group is not fixed.

    Args:
        relay: Handle of the `Relay` actor.
        arguments: As of `TorchTrainer`.
    """

    def __init__(self, *arguments: Any, relay: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._relay = relay

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if isinstance(arguments.get("scaling_policy"), ElasticScalingPolicy):
            arguments["scaling_policy"] = PolicyUntilEnd(self.scaling_config, self._relay)
        return super()._initialize_and_run_controller(**arguments)
