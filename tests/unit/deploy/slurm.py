"""A Slurm that exists in a test alone: jobs run on this machine, their nodes are 127.0.0.1 and 127.0.0.2.

What is real: the batch script, and the processes that its `srun` (slurm_bin/srun) starts. What is not: `srun`
and `scontrol` themselves, and who sends the signal that --signal asks for.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(__file__).resolve().parent / "slurm_bin"
DIRECTIVES = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "exclusive": "",
    "time": r"\d\d:\d\d:\d\d",
    "output": r"\S+%j\S*",
    "open-mode": "append|truncate",
    "signal": r"(B:)?[A-Z]+@\d+",
    "requeue": "",
    "no-kill": "",
}
"""Options of sbatch that deploy/slurm uses, and what they look like."""


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines: Slurm reads them up to the first command."""
    found = {}
    for line in script.read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
    return found


class Slurm:
    """One job's scheduler.

    Args:
        folder: Where the job is submitted.
        gpus: GPUs of a node; None for a cluster without.
    """

    def __init__(self, folder: Path, *, gpus: int | None = None) -> None:
        self.folder = folder
        self.own = folder / ".slurm"
        (self.own / "tasks").mkdir(parents=True)
        self.restarts = 0
        with socket.socket() as free:  # the scripts make their port of the job's number
            free.bind(("127.0.0.1", 0))
            self.job_id = free.getsockname()[1] % 20000 + 20000
        self._gpus = gpus
        self._process: subprocess.Popen[bytes] | None = None
        self._script = Path()

    def start(self, script: str, *arguments: str, **environment: str) -> None:
        """Run deploy/slurm/SCRIPT as sbatch does: a copy of it, in the folder of submission."""
        self._script = ROOT / "deploy" / "slurm" / script
        copy = self.own / "slurm_script"
        copy.write_text(self._script.read_text())
        asked = directives(self._script)
        nodes = int(asked["nodes"])
        known = {
            "SLURM_TEST_FOLDER": str(self.own),
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"],
            "SLURM_CPUS_ON_NODE": "1",
            **({"SLURM_GPUS_ON_NODE": str(self._gpus)} if self._gpus else {}),
            **({"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {}),
        }
        with (self.own / "log").open("a") as log:
            self._process = subprocess.Popen(
                ["bash", str(copy), *arguments],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "GLOO_SOCKET_IFNAME": "lo",
                    "OMP_NUM_THREADS": "1",
                    "HFDIST_ENV": sys.prefix,
                    **known,
                    **environment,
                    "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
                },
            )

    def end(self, timeout: float = 360.0) -> int:
        """Wait for the script; returns its exit status."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.log}") from None

    def time_is_nearly_up(self) -> None:
        """Send what --signal asks for: to the batch script (B:), or to the tasks."""
        assert self._process is not None
        to, name, _ = re.fullmatch(
            r"(B:)?([A-Z]+)@(\d+)", directives(self._script)["signal"]
        ).groups()  # type: ignore[union-attr]
        number = signal.Signals[f"SIG{name}"]
        ids = [self._process.pid] if to else [int(p.name) for p in (self.own / "tasks").iterdir()]
        assert ids, "no task runs"
        for each in ids:
            os.kill(each, number)

    def kill(self) -> None:
        """End what is left, as the end of an allocation does."""
        if self._process is None:
            return
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        if self._process.poll() is None:
            self._process.kill()
        for each in family:
            if each.is_running():
                each.kill()

    @property
    def requeued(self) -> list[int]:
        path = self.own / "requeued"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The options and the command of every srun."""
        return [json.loads(line) for line in (self.own / "steps").read_text().splitlines()]

    @property
    def log(self) -> str:
        return (self.own / "log").read_text()
