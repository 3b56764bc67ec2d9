"""cluster: nodes of a Ray cluster on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Nodes of a Ray cluster on this machine: start-head, join, stop.", no_args_is_help=True
)
Cpus = Annotated[float | None, typer.Option(help="Cores that the node offers; by default all.")]
Gpus = Annotated[float | None, typer.Option(help="GPUs that the node offers; by default all.")]
Resources = Annotated[
    list[str] | None, typer.Option("--resource", help="A custom resource.", metavar="NAME=AMOUNT")
]


@app.command("start-head")
def start_head(
    host: Annotated[
        str, typer.Option(help="Address of this machine by which others reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the cluster.")] = 6379,
    dashboard_port: Annotated[int, typer.Option(help="Port of dashboard and jobs.")] = 8265,
    cpus: Cpus = None,
    gpus: Gpus = None,
    resource: Resources = None,
) -> None:
    """Start a cluster's first node here, for this machine alone unless --host says more.

    Whoever has the token (~/.ray/auth_token, made if there is none) may use the cluster.
    """
    from hfdist.launch.ray import nodes as ray_nodes
    from hfdist.launch.ray.token import token_path

    node = ray_nodes.start_head(
        host=host, port=port, dashboard_port=dashboard_port, size=_size(cpus, gpus, resource)
    )
    print(f"cluster:   {node.address} (process {node.pid}, log {node.log})")
    print(f"dashboard: http://{host}:{dashboard_port}")
    print(f"token:     {token_path()}")
    print(f"open to:   {_open_to(host)}")
    print(f"join it:   hfdist cluster join {node.address}")
    print(f"submit:    hfdist submit JOB.yaml --address http://{host}:{dashboard_port}")


@app.command()
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The head.")],
    host: Annotated[
        str | None, typer.Option(help="Address of this machine by which the head reaches it.")
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    resource: Resources = None,
) -> None:
    """Let this machine join a cluster, once more if it is in it already."""
    from hfdist.launch.ray import nodes as ray_nodes

    node = ray_nodes.join(address, host=host, size=_size(cpus, gpus, resource))
    print(f"joined {node.address} (process {node.pid}, log {node.log})")


@app.command()
def stop() -> None:
    """Stop the nodes that were started here."""
    from hfdist.launch.ray import nodes as ray_nodes

    for node in ray_nodes.stop_nodes():
        print(
            f"stopped {'the head of ' if node.is_head else ''}{node.address} (process {node.pid})"
        )


def _open_to(host: str) -> str:
    """Who can reach the node's ports, and how that is changed."""
    from hfdist.launch.ray.loopback import is_loopback

    if is_loopback(host):
        return "this machine alone: every port is at 127.0.0.1"
    return (
        f"whoever reaches this machine: the dashboard is at {host}, all else listens on all addresses. Jobs "
        "and cluster ask for the token; /metrics, and ranks that meet in a run, do not: let a firewall "
        "admit the cluster's nodes alone"
    )


def _size(cpus: float | None, gpus: float | None, resources: list[str] | None):  # type: ignore[no-untyped-def]
    from hfdist.errors import ConfigError
    from hfdist.launch.ray.nodes import Size

    parsed = {}
    for text in resources or []:
        name, _, amount = text.partition("=")
        try:
            parsed[name] = float(amount or "1")
        except ValueError:
            raise ConfigError(f"--resource {text}: write NAME=AMOUNT") from None
    return Size(cpus=cpus, gpus=gpus, resources=parsed or None)
