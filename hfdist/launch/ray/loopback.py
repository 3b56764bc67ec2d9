"""A cluster of one machine that listens on 127.0.0.1 alone.

Ray replaces 127.0.0.1 by an address of the machine that others reach, and then listens on all addresses;
except on Windows and macOS, unless `VARIABLE` is 1. There, and with the variable at 0 on Linux, a node whose
address is 127.0.0.1 listens there alone: gcs, raylet, workers, dashboard, metrics.

`python -m hfdist.launch.ray.loopback start ...` is `ray start ...` of such a node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
HERE = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether an address leads nowhere but to this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have Ray leave 127.0.0.1 as it is inside the block, in this process and those that it starts."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    before = os.environ.get(VARIABLE), getattr(constants, "ENABLE_RAY_CLUSTER", True)
    os.environ[VARIABLE], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before[0]


def is_closed(host: str, port: int) -> bool:
    """Whether what answers at a loopback address answers at no other address of this machine."""
    from ray._private import services

    if not is_loopback(host):
        return False
    try:
        socket.create_connection((services.get_node_ip_address(), port), timeout=5.0).close()
    except OSError:
        return True
    return is_loopback(services.get_node_ip_address())


def main() -> None:
    """Ray's command line, for a node of this machine alone."""
    from ray._private import ray_constants, services

    os.environ[VARIABLE] = "0"
    own: Any = services
    own.get_node_ip_address = lambda address=None: HERE
    constants: Any = ray_constants
    constants.ENABLE_RAY_CLUSTER = (
        True  # a second node may join, which Ray does not expect of such a cluster
    )
    from ray.scripts import scripts

    commands: Any = scripts
    # Without Ray's server for clients of other machines: it has one port for all clusters of a machine, and
    # where the machine is busy it ends 30 s after its start, and the node with it.
    commands.get_ray_client_dependency_error = lambda: "nobody comes from elsewhere"
    commands.main()


if __name__ == "__main__":
    main()
