"""Events of a spool, sent to MLflow. Sending an event twice has the effect of sending it once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfdist.tracking.client import connect, is_final, one_line
from hfdist.tracking.description import EXPERIMENT, RUN
from hfdist.tracking.find_or_create import OpenRun, has_steps_from, open_run, remove_twins
from hfdist.tracking.spool import Event, Spool
from hfdist.tracking.tracker import Status

logger = logging.getLogger(__name__)

MAX_PARAM, MAX_TAG = 6000, 8000
"""Characters that MLflow stores."""
_NOTE, _OWN_NOTE = "mlflow.note.content", "hfdist.description"
"""Tags: what the run's page says of it, and which text of it is hfdist's own."""
_TRIES = 3
"""Failures of a file's delivery before other events go first."""


class Delivery:
    """MLflow's side of a spool.

    Args:
        spool: Its facts name the target.
        moved: Called whenever the server took something.
    """

    def __init__(self, spool: Spool, moved: Callable[[], None] = lambda: None) -> None:
        self._spool, self._moved = spool, moved
        self._target = spool.recall("target")
        self._client: Any = None
        self._run: OpenRun | None = None
        self.count = 0
        """Events delivered."""
        self._failures = 0
        self._last_metrics: Event | None = None

    def open(self) -> bool:
        """Connect, and find or make the run, unless that is done; whether the spool starts again.

        Raises:
            Whatever the client raises, if the server cannot be reached.
        """
        if self._run is not None:
            return False
        if self._client is None:
            self._client = connect(self._target["uri"], self._target.get("workspace"))
        before = self._spool.num_delivered
        self._run = open_run(self._client, self._spool, self._target)
        self._moved()
        return self._spool.num_delivered != before

    def deliver(
        self, batch: Sequence[tuple[Event, int]], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Deliver in order, acknowledging as it goes. An event that the server refuses for good is left
        out with a warning.

        Raises:
            Whatever the client raises, if the server cannot be reached.
        """
        if self.open():
            return  # from the start, to a new run: the batch is an old one
        assert self._run is not None
        start = 0
        while start < len(batch) and not is_over():
            if batch[start][0]["kind"] == "again" and self._replaced(batch[start][0]["step"]):
                return
            stop = start + 1
            if _is_metrics(batch[start][0]):  # as many as come in a row in one call
                while stop < len(batch) and _is_metrics(batch[stop][0]):
                    stop += 1
            self._tell(self._run, [event for event, _ in batch[start:stop]])
            self._spool.acknowledge(batch[stop - 1][1], stop - start)
            self.count += stop - start
            self._moved()
            start = stop

    def _replaced(self, step: int) -> bool:
        """Whether the run is a new one, told from the start: MLflow takes no number back, and the old run
        has some of steps from `step` on, which were taken again with other results."""
        assert self._run is not None
        if not has_steps_from(self._client, self._run, step):
            return False
        self._client.delete_run(self._run.run_id)
        self._run = None
        self.open()
        return True

    def retry(self) -> None:
        """Try the files that were set aside again.

        Raises:
            Whatever the client raises: they stay aside.
        """
        self.open()
        assert self._run is not None
        for event in self._spool.aside:
            try:
                self._send(self._run, [event])
            except Exception as error:
                if not is_final(error):
                    raise
                logger.warning("MLflow refuses %s: %s", _described(event), error)
            self._spool.take_back(event)
            self.count += 1
            self._moved()

    def _tell(self, run: OpenRun, events: Sequence[Event]) -> None:
        try:
            self._send(run, events)
            self._failures = 0
        except Exception as error:
            event = events[0]
            if is_final(error):
                parts = _parts(events)  # one of them is at fault, not all
                if len(parts) > 1:
                    for part in parts:
                        self._tell(run, [part])
                else:
                    logger.warning("MLflow refuses %s: %s", _described(event), error)
                return
            if event["kind"] not in ("artifact", "plot", "model"):
                raise
            # If the tracking server itself answers, its file store must not hold up the numbers.
            self._client.get_run(run.run_id)
            self._failures += 1
            if self._failures < _TRIES:
                raise
            self._failures = 0
            logger.warning("%s cannot be stored now: %s", _described(event), one_line(error))
            self._spool.set_aside(event)

    def _send(self, run: OpenRun, events: Sequence[Event]) -> None:
        event = events[0]
        match event["kind"]:
            case "metrics" | "system":
                self._send_metrics(run, events)
            case "params":
                self._send_params(run, event["values"])
            case "tags":
                self._send_tags(run, event["values"])
            case "dataset":
                self._send_dataset(run, event["values"])
            case "description":
                self._send_description(run, event["text"])
            case "artifact":
                self._send_file(run, event)
            case "plot":
                self._send_plot(run, event)
            case "model":
                from hfdist.tracking.models import send_model

                send_model(self._client, run, self._spool, event, self._target, self._last_metrics)
            case "status":
                if event["status"] == Status.RUNNING:
                    self._client.update_run(run.run_id, status=event["status"])
                else:
                    remove_twins(self._client, run, self._target["run_id"])
                    self._client.set_terminated(run.run_id, event["status"], end_time=event["time"])

    def _send_metrics(self, run: OpenRun, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
            if event["kind"] == "system" or event["step"] > run.known_until.get(key, -1)
        ]
        for k in range(0, len(metrics), 1000):
            self._client.log_batch(run.run_id, metrics=metrics[k : k + 1000])
        steps = [event for event in events if event["kind"] == "metrics"]
        self._last_metrics = steps[-1] if steps else self._last_metrics

    def _send_params(self, run: OpenRun, values: Mapping[str, str]) -> None:
        """MLflow lets nobody change a parameter: what a resumed run changed becomes a tag."""
        from mlflow.entities import Param

        there = self._client.get_run(run.run_id).data.params
        clipped = {k: v[:MAX_PARAM] for k, v in values.items()}
        new = [Param(k, v) for k, v in clipped.items() if k not in there]
        for k in range(0, len(new), 100):
            self._client.log_batch(run.run_id, params=new[k : k + 100])
        changed = {f"changed.{k}": v for k, v in clipped.items() if there.get(k, v) != v}
        self._send_tags(run, changed)

    def _send_tags(self, run: OpenRun, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(k, v[:MAX_TAG]) for k, v in values.items()]
        for k in range(0, len(tags), 100):
            self._client.log_batch(run.run_id, tags=tags[k : k + 100])

    def _send_description(self, run: OpenRun, text: str) -> None:
        """Unless a person has written another one."""
        tags = self._client.get_run(run.run_id).data.tags
        if _NOTE in tags and tags.get(_OWN_NOTE) != _sha256(tags[_NOTE]):
            return
        text = text.replace(RUN, run.run_id).replace(EXPERIMENT, run.experiment_id)[:MAX_TAG]
        self._send_tags(run, {_NOTE: text, _OWN_NOTE: _sha256(text)})

    def _send_dataset(self, run: OpenRun, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = {k: v for k, v in values.items() if k not in ("name", "digest")}
        dataset = Dataset(
            name=str(values.get("name", "data")),
            digest=str(values.get("digest") or _digest(values))[:36],
            source_type="code",
            source=json.dumps({"task": values.get("name")}),
            profile=json.dumps(profile),
        )
        training = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run.run_id, [DatasetInput(dataset, [training])])

    def _send_file(self, run: OpenRun, event: Event) -> None:
        path = located(self._spool, event["path"])
        if path.is_dir():
            self._client.log_artifacts(run.run_id, str(path), event["folder"] or None)
        elif path.exists():
            self._client.log_artifact(run.run_id, str(path), event["folder"] or None)
        else:
            logger.warning("%s is gone: it is not recorded", path)

    def _send_plot(self, run: OpenRun, event: Event) -> None:
        """A picture among the charts of the run's page, once a step."""
        from PIL import Image

        path = located(self._spool, event["path"])
        # The small picture, named KEY+step+STEP+..., is stored last.
        names = [Path(file.path).name for file in self._client.list_artifacts(run.run_id, "images")]
        begins = [re.split(r"[+%]", name)[:3] for name in names if name.endswith(".webp")]
        if path.exists() and [path.stem, "step", str(event["step"])] not in begins:
            with Image.open(path) as picture:
                self._client.log_image(
                    *(run.run_id, picture), key=path.stem, step=event["step"], synchronous=True
                )


def located(spool: Spool, path: str) -> Path:
    """A path of an event: relative to the run's folder, which may have moved, or absolute."""
    return spool.folder.parent / path


def _is_metrics(event: Event) -> bool:
    return event["kind"] in ("metrics", "system")


def _parts(events: Sequence[Event]) -> list[Event]:
    if len(events) > 1 or not _is_metrics(events[0]):
        return list(events)
    return [{**events[0], "values": {k: v}} for k, v in events[0]["values"].items()]


def _described(event: Event) -> str:
    if _is_metrics(event):
        return f"{', '.join(event['values'])} of step {event['step']}"
    return f"{event['kind']} {event.get('path', '')}".rstrip()


def _digest(values: Mapping[str, Any]) -> str:
    """The same for the same data in every attempt of a run, so that it is recorded once."""
    return _sha256(json.dumps(dict(values), sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
