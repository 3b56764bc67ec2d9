"""A real MLflow server on a free port of this machine, which can be stopped, killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from hfdist.tracking.client import connect
from hfdist.tracking.ui import command, environment


class MlflowServer:
    """Keeps its records in a folder, so that it can be killed and started again.

    Args:
        folder: For its database, artifacts and log.
        options: More of its command line.
        variables: More of its environment.
    """

    def __init__(self, folder: Path, *options: str, **variables: str) -> None:
        self._folder, self._options, self._variables = folder, options, variables
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self, timeout: float = 240.0) -> None:
        """Start it and wait until it answers."""
        store = f"sqlite:///{self._folder}/server.db"
        connect(store)  # makes it of a kept empty one: MLflow's migrations take seconds
        arguments = command(store, host="127.0.0.1", port=self.port)
        arguments += ["--artifacts-destination", str(self._folder / "artifacts"), *self._options]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments,
                env={**environment(), **self._variables},
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,  # so that its workers get its signals
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        text = (self._folder / "server.log").read_text()[-2000:]
        self.kill()
        raise RuntimeError(f"the MLflow server does not answer:\n{text}")

    def revive(self) -> None:
        """Have it answer, whether it hangs, is dead or was never started."""
        if self._process is not None:
            self.go_on()
        if self._process is None or self._process.poll() is not None:
            self.start()

    def pause(self) -> None:
        """It hangs: connections are taken and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a `pause`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
