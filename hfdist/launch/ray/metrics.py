"""A run's numbers for Prometheus, by way of Ray's metrics agent on each node."""

from __future__ import annotations

from collections.abc import Mapping

from hfdist.tracking import NullTracker, RunInfo

_GAUGES = {
    "final_loss": "Loss after the last step",
    "damping": "Damping of the last step",
    "data_passes": "Effective passes over the training data",
    "examples_per_second": "Examples a second in the last step",
}
_PHASE = "seconds/"


class RayMetricsTracker(NullTracker):
    """A `Tracker` that sets metrics: hfdist_loss, hfdist_step, hfdist_cg_iterations_total,
    hfdist_phase_seconds_total by phase, and a few more; all with the run's id and task."""

    def start(self, info: RunInfo) -> None:
        from ray.util.metrics import Counter, Gauge

        keys = ("run_id", "task")
        tags = {"run_id": info.run_id, "task": str(info.tags.get("task", ""))}
        self._gauges = {
            name: Gauge(f"hfdist_{_name(name)}", text, tag_keys=keys)
            for name, text in _GAUGES.items()
        }
        self._step = Gauge("hfdist_step", "Finished steps", tag_keys=keys)
        self._cg = Counter("hfdist_cg_iterations", "CG iterations", tag_keys=keys)
        self._phases = Counter(
            "hfdist_phase_seconds", "Seconds by phase of the step", tag_keys=(*keys, "phase")
        )
        for metric in (*self._gauges.values(), self._step, self._cg, self._phases):
            metric.set_default_tags(tags)

    def log_metrics(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        self._step.set(step + 1)
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name])
        if values.get("cg_iterations"):
            self._cg.inc(values["cg_iterations"])
        for name, seconds in values.items():
            if name.startswith(_PHASE) and seconds > 0:
                self._phases.inc(seconds, tags={"phase": name.removeprefix(_PHASE)})
        return values


def _name(key: str) -> str:
    return "loss" if key == "final_loss" else key
