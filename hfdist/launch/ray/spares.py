"""Spare processes: a worker that is started again finds one that has imported everything already.

Ray ends all processes of a group when one is lost. What takes long then is not to see that, but to start
others: to import torch, Ray Train, hfdist and MLflow takes 6 to 10 s of a core.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from typing import Any

from hfdist.tracking import client

logger = logging.getLogger(__name__)

_MODULES = (
    "hfdist.launch.ray.worker",  # with Ray Train and torch
    "hfdist.launch.ray.metrics",
    "hfdist.training.worker",
    "ray.train.v2._internal.execution.worker_group.worker",
)
"""What a worker imports until its first step has ended."""
_KEPT_SECONDS = 30 * 24 * 3600
"""How long Ray keeps a process that nothing is run in; it goes with the job at the latest."""
_ASK_SECONDS = 10.0


def variables(threads: int, *, with_mlflow: bool) -> dict[str, str]:
    """Variables of the workers' processes, by which these warm up when they start.

    Args:
        threads: A worker's. Libraries read it when they are imported, before Ray would set it.
        with_mlflow: Whether rank 0, which may be any of them, will need it.
    """
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with contextlib.suppress(ImportError):  # private to Ray
        from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

        hook = warm_up_with_mlflow if with_mlflow else warm_up
        found[HOOK] = f"{__name__}.{hook.__name__}"
    return found


def warm_up() -> None:
    """Import what a worker needs. Ray calls this in each new process, before it gives it anything to do."""
    for name in _MODULES:
        # What cannot be imported is the worker's to tell of.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def warm_up_with_mlflow() -> None:
    """The same, for jobs that are recorded."""
    warm_up()
    with contextlib.suppress(Exception):
        client.prepare()


def keep_one() -> None:
    """Ask the node of this worker for a process like its own, for whoever follows it here.

    Without one the next worker starts as slowly as the first.
    """
    threading.Thread(target=ask, name="hfdist-spare", daemon=True).start()


def ask() -> None:
    """The request itself, to the daemon of this node; where it does not come off, a line says so."""
    try:
        import ray
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import (
            common_pb2,
            node_manager_pb2,
            node_manager_pb2_grpc,
            runtime_environment_pb2,
        )

        # Made at run time: their names are known to nobody before.
        messages: Any = node_manager_pb2
        environments: Any = runtime_environment_pb2
        languages: Any = common_pb2
        context = ray.get_runtime_context()
        (node,) = (n for n in ray.nodes() if n["NodeID"] == context.get_node_id())
        request = messages.PrestartWorkersRequest(
            language=languages.Language.Value("PYTHON"),
            job_id=bytes.fromhex(context.get_job_id()),
            runtime_env_info=environments.RuntimeEnvInfo(
                serialized_runtime_env=context.get_runtime_env_string(),
                runtime_env_config=environments.RuntimeEnvConfig(setup_timeout_seconds=600),
            ),
            num_workers=1,
            keep_alive_duration_secs=_KEPT_SECONDS,
        )
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        with init_grpc_channel(address) as channel:
            service = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
            service.PrestartWorkers(request, timeout=_ASK_SECONDS)
    except Exception as error:  # private to Ray, of many kinds, and only time is lost
        logger.info("no spare process is kept ready here: %s", error)
