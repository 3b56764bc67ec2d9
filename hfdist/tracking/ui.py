"""`hfdist ui`: MLflow's own pages on the store of a folder of runs."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from hfdist.config.tracking import TrackingConfig, store_uri
from hfdist.errors import ConfigError
from hfdist.rundir.locations import folder_of_runs, is_address


def serve(output: Path | str, *, host: str, port: int) -> None:
    """Replace this process by a server of the pages, until Ctrl-C. Does not return.

    Raises:
        ConfigError: There are no runs, the store is a server with pages of its own, or the port is taken.
    """
    uri = store_uri(TrackingConfig(), folder_of_runs(str(output)))
    if uri.startswith(("http:", "https:")):
        raise ConfigError(f"runs are tracked on a server: open {uri} in a browser")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(
            f"no runs of {output} are recorded on this machine: give jobs that run elsewhere a "
            "tracking.uri, which is where to look"
            if is_address(output)
            else f"no runs are recorded in {output}: train one first, or name the folder with --output"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {host} cannot be used ({error.strerror}): choose another with --port"
            ) from error
    print(f"MLflow UI: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
    # Replaces this process: Ctrl-C and SIGTERM reach the server, and no process is left behind.
    os.execve(sys.executable, command(uri, host=host, port=port), environment())


def command(uri: str, *, host: str, port: int) -> list[str]:
    """Command line of a small server: one worker."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def environment() -> dict[str, str]:
    """Without the server's job queue, which nobody here needs and which takes a dozen processes."""
    return {
        **{k: v for k, v in os.environ.items() if k != "MLFLOW_WORKSPACE"},  # it is for clients
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
