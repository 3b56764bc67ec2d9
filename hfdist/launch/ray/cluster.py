"""A connection to a Ray cluster: the job's, or a private one of this machine that ends with the run."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hfdist.errors import ConfigError, WorkerError, first_line
from hfdist.launch.ray.loopback import is_closed, on_loopback
from hfdist.launch.ray.nodes import TOO_SLOW, head_here
from hfdist.launch.ray.placement import Demand
from hfdist.launch.ray.token import (
    private_token,
    read_authentication_again,
    token_path,
    use_token,
)

logger = logging.getLogger(__name__)

_START_TRIES = 3
"""Times that a node is started which is too slow for Ray: it waits half a minute, and not a second more."""
_OBJECT_STORE = 128 * 1024 * 1024  # bytes; nothing but the job and its events passes through it

QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to Ray inside the block; a connection that the program had before stays as it is.

    Args:
        address: HOST:PORT or ray://HOST:PORT; "auto": RAY_ADDRESS, a cluster that `hfdist cluster` has
            started here, or Ray's latest; by default RAY_ADDRESS, else a private cluster.

    Raises:
        ConfigError: There is no cluster at the address, or it does not accept this user's token.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield
        return
    if address in (None, "auto"):  # in a job it names the job's own cluster, of all on the machine
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto":
        address = head_here() or address
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_reports())
        if address:
            host, port = _host_and_port(address)
            if port and is_closed(host, port):
                stack.enter_context(on_loopback())
            _attach(address)
            stack.callback(ray.shutdown)
        else:
            stack.enter_context(_private())
        yield


def _attach(address: str) -> None:
    import ray

    use_token()

    try:
        _knock(address)
        if _refuses_token(address):
            raise RuntimeError("Unauthenticated")
        ray.init(address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = first_line(error)
        if "uthentication" in str(error) or "nauthenticated" in str(error):
            raise ConfigError(
                f"the Ray cluster at {address} does not accept this user: put its token into a file of "
                "mode 0600, name it in RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token"
            ) from error
        raise ConfigError(
            f"no Ray cluster answers at {address}: start one with `hfdist cluster start-head`, or leave "
            f"launch.address and RAY_ADDRESS out for one of this machine's own ({reason})"
        ) from error


def _knock(address: str) -> None:
    """See whether anything listens there: Ray itself asks for minutes."""
    host, port = _host_and_port(address)
    if port:
        socket.create_connection((host, port), timeout=10.0).close()


def _host_and_port(address: str) -> tuple[str, int]:
    """Of HOST:PORT or ray://HOST:PORT; ("", 0) if it is another thing."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else ("", 0)


def _refuses_token(address: str) -> bool:
    """Whether a head answers that this user's token is wrong or missing. Ray itself asks again and again, and
    then says only that nothing answered."""
    where = address.rpartition("://")[2]
    if "://" in address or not where.rpartition(":")[2].isdigit():
        return False
    try:
        import grpc
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    except ImportError:  # private to Ray
        return False
    messages: Any = gcs_service_pb2  # made at run time: its names are known to nobody before
    metadata = []
    if os.environ.get("RAY_AUTH_MODE") == "token":
        token = os.environ.get("RAY_AUTH_TOKEN") or ""
        with contextlib.suppress(OSError):
            token = token or token_path().read_text().strip()
        metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(where) as channel:
        try:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(
                messages.GetClusterIdRequest(), metadata=metadata, timeout=10.0
            )
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
        except (AttributeError, ValueError):
            return False
    return False


@contextmanager
def _private() -> Iterator[None]:
    """A cluster of this machine's own: no dashboard, 127.0.0.1 alone, and nobody else has its token."""
    import ray

    # Other users of this machine reach 127.0.0.1, too: the token keeps them out.
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(private_token())}
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo takes the address of the host's name, which may be that of another machine.
        environment["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    folder = tempfile.mkdtemp(prefix="hfdist-ray-")  # short: sockets have short names
    try:
        with _environment(environment), on_loopback():
            read_authentication_again()
            _start(folder)
            try:
                yield
            finally:
                ray.shutdown()
        read_authentication_again()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: str) -> None:
    import psutil
    import ray

    before = set(psutil.Process().children(recursive=True))
    for left in reversed(range(_START_TRIES)):
        try:
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _temp_dir=folder,
                **QUIET,
            )
            return
        except Exception as error:  # of many kinds: ports, memory, a machine that is too busy
            ray.shutdown()
            # It forgets the processes of a node that it gave up.
            family = set(psutil.Process().children(recursive=True)) - before
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
            if not left or TOO_SLOW not in str(error):
                raise WorkerError(
                    f"Ray does not start on this machine: {first_line(error)}"
                ) from error
            logger.info("Ray's node did not start in time: trying again")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def node_resources() -> list[dict[str, float]]:
    """What each node that is alive has in all."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[dict[str, float]]:
    """What each node that is alive has free; of all nodes together where Ray does not say."""
    import ray

    try:
        from ray._private.state import available_resources_per_node

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        free = available_resources_per_node()
        return [dict(resources) for node, resources in free.items() if node in alive]
    except (ImportError, AttributeError):  # private to Ray
        return [dict(ray.available_resources())]


def scales_itself() -> bool:
    """Whether an autoscaler may add nodes."""
    try:
        from ray._private.state import state

        return bool(state.get_max_resources_from_cluster_config())
    except Exception:  # private to Ray: an answer of "no" costs only patience
        return False


@contextmanager
def room_asked_for(demand: Demand) -> Iterator[None]:
    """Let workers wait for resources inside the block: what waits makes an autoscaler add nodes."""
    import ray

    bundle = {name: amount for name, amount in demand.per_worker.items() if amount > 0}
    if not bundle:
        yield
        return
    group = ray.util.placement_group([bundle] * demand.num_workers, strategy=demand.placement)
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)


def resources_in_use(demand: Demand) -> str | None:
    """What workers that are not there yet wait for; None if none wait."""
    import ray

    groups = ray.util.placement_group_table().values()
    if not any(group["state"] == "PENDING" for group in groups):
        return None
    free, there = ray.available_resources(), ray.cluster_resources()
    asked = {n: amount * demand.num_workers for n, amount in demand.per_worker.items()}
    if all(free.get(name, 0.0) >= amount for name, amount in asked.items()):
        return "there is room for the workers: Ray Train is about to start them"
    short = (n for n, amount in asked.items() if free.get(n, 0.0) < amount)
    used = ", ".join(f"{free.get(n, 0.0):g} of {there.get(n, 0.0):g} {n} free" for n in short)
    return f"waiting for other jobs to end: {used}"


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep what Ray says of lost nodes and workers out of the driver's output, dumps of raylets and colour
    codes included: the driver says itself which rank was lost, where, and what happens next."""
    from ray._private import worker

    module: Any = worker
    ordinary = module.print_to_stdstream

    def keep(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        logger.debug("Ray: %s", " ".join(map(str, data.get("lines", ())))[:2000])

    module.print_to_stdstream = keep
    try:
        yield
    finally:
        module.print_to_stdstream = ordinary
