"""Deliver what a run's own process could not."""

from __future__ import annotations

import logging
from pathlib import Path

from hfdist.config.tracking import TrackingConfig, store_uri, workspace
from hfdist.errors import ConfigError, StorageError
from hfdist.rundir import files
from hfdist.tracking.client import connect, is_server, one_line, public
from hfdist.tracking.delivery import Delivery
from hfdist.tracking.find_or_create import runs_of
from hfdist.tracking.sender import BATCH
from hfdist.tracking.spool import Spool
from hfdist.tracking.tracker import Status

logger = logging.getLogger(__name__)


def deliver(run_dir: Path, uri: str | None = None, *, home: str) -> int:
    """Deliver what the server has not received of a run that is over; returns the number of events.

    A run whose process was killed before it could record its end is closed as FAILED, at the time of its
    last event.

    Args:
        run_dir: The run's folder.
        uri: Another server or store than the run's own: it is told everything.
        home: What messages call the run.

    Raises:
        ConfigError: The folder has no spool.
        BusyError: The run is still going: its own process delivers.
        StorageError: The server cannot be reached.
    """
    folder = run_dir / files.SPOOL
    if not (folder / "target.json").is_file():
        raise ConfigError(
            f"{home} has nothing to deliver here: it is no run, it was not tracked, or its record is on "
            "its way"
        )
    spool = Spool(folder)
    try:
        if uri is not None:
            spool.remember("target", spool.recall("target") | {"uri": uri, "tracked_as": None})
        if spool.status == Status.RUNNING:
            spool.append("status", at=spool.last_time, status=str(Status.FAILED))
        delivery = Delivery(spool)
        if spool.recall("run").get("uri") != spool.recall("target")["uri"]:
            delivery.open()  # everything is pending there
        while batch := spool.pending(BATCH):
            delivery.deliver(batch)
        if spool.aside:
            delivery.retry()
    except Exception as error:
        raise StorageError(
            f"{spool.recall('target')['uri']} does not take the record of {home}: "
            f"{one_line(error)}. {spool.num_pending} events are kept: try again later"
        ) from error
    finally:
        spool.close()
    return delivery.count


def close(config: TrackingConfig, run_dir: Path) -> None:
    """Close a run that nobody else can close, if it is at a server and still open."""
    uri = public(store_uri(config, run_dir.parent))
    if not is_server(uri):
        return
    try:
        client = connect(uri, workspace(config))
        experiment = client.get_experiment_by_name(config.experiment)
        for run in runs_of(client, experiment.experiment_id, run_dir.name) if experiment else []:
            if run.info.status == Status.RUNNING:
                client.set_terminated(run.info.run_id, str(Status.FAILED))
    except Exception as error:  # the run's own error matters more
        logger.warning("%s was not told that the run has failed: %s", uri, one_line(error))
