"""deploy/slurm under a scheduler that exists in these tests alone (slurm.py): real torchrun, Ray and runs."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm import DIRECTIVES, ROOT, Slurm, directives

SCRIPTS = sorted((ROOT / "deploy" / "slurm").glob("*.sbatch"))
JOB = """
name: slow
task: task.py:Slow
steps: 12
tracking: {enabled: false}
checkpoint: {every: 1000}
"""
TASK = """
import time
import torch
from torch import nn
from hfdist import Task
from hfdist.tasks.array_data import ArrayData

class Slow(Task):
    sum_of_squares = False  # steps of many losses

    def model(self):
        return nn.Linear(4, 1)

    def loss(self, outputs, batch):
        time.sleep(0.02)
        return nn.functional.mse_loss(outputs, batch[1])

    def train_data(self):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return ArrayData(x, x.sin().sum(1, keepdim=True))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


@pytest.fixture
def slurm(folder: Path) -> Iterator[Slurm]:
    scheduler = Slurm(folder)
    yield scheduler
    scheduler.kill()


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def wait_for_steps(run_dir: Path, number: int, slurm: Slurm) -> None:
    deadline = time.monotonic() + 360
    path = run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert time.monotonic() < deadline, slurm.log
        time.sleep(0.1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_the_directives(script: Path) -> None:
    found = directives(script)
    assert {"nodes", "signal", "requeue", "open-mode"} <= set(found)
    for name, value in found.items():
        assert re.fullmatch(DIRECTIVES[name], value), f"--{name}={value}"
    lines = script.read_text().splitlines()
    assert sum(line.startswith("#SBATCH") for line in lines) == len(found)


def test_shell_scripts_are_clean() -> None:
    from shutil import which

    program = which("shellcheck", path=str(Path(sys.executable).parent)) or which("shellcheck")
    assert program, "shellcheck is not installed: make install"
    files = [*SCRIPTS, ROOT / "deploy" / "kuberay" / "job" / "train"]
    found = subprocess.run([program, *map(str, files)], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout


# -- torchrun ------------------------------------------------------------------------------------------


@pytest.fixture
def words_only(folder: Path) -> Slurm:
    """A cluster with eight GPUs a node, whose `torchrun` says what it is asked."""
    program = folder / "programs" / "bin" / "torchrun"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"torchrun-$SLURM_PROCID"\nexit "${EXIT:-0}"\n'
    )
    program.chmod(0o755)
    return Slurm(folder, gpus=8)


def test_one_worker_a_gpu(words_only: Slurm) -> None:
    folder = words_only.folder
    environment = {"HFDIST_ENV": str(folder / "programs"), "HFDIST_OUTPUT": "/shared/runs"}
    words_only.start("torchrun.sbatch", "job.yaml", "steps=3", HFDIST_RUN_ID="a", **environment)
    assert words_only.end() == 0, words_only.log
    said = (folder / "torchrun-0").read_text()
    assert said == (folder / "torchrun-1").read_text()
    words = said.split()
    asked = dict(zip(words[0:10:2], words[1:10:2], strict=True))
    assert asked["--nnodes"] == "2"
    assert asked["--nproc-per-node"] == "8"
    assert asked["--rdzv-endpoint"] == f"127.0.0.1:{words_only.job_id}"
    assert " ".join(words[10:]) == (
        "-m hfdist train job.yaml output=/shared/runs steps=3 --run-id a --plain"
    )


def test_in_a_container(words_only: Slurm) -> None:
    folder = words_only.folder
    environment = {"HFDIST_ENV": str(folder / "programs"), "HFDIST_IMAGE": "hfdist.sqsh"}
    words_only.start("torchrun.sbatch", "job.yaml", **environment)
    assert words_only.end() == 0, words_only.log
    (step,) = words_only.steps
    assert step["container_image"] == "hfdist.sqsh"
    assert step["container_mounts"] == f"{folder}:{folder},{folder}/runs:{folder}/runs"
    assert step["container_workdir"] == str(folder)


def test_only_a_run_that_was_stopped_comes_back(words_only: Slurm) -> None:
    folder = words_only.folder
    environment = {"HFDIST_ENV": str(folder / "programs"), "EXIT": "2"}
    words_only.start("torchrun.sbatch", "job.yaml", **environment)
    assert words_only.end() != 0
    # What an earlier try has left does not count: this one failed before it began.
    run_dir = folder / "runs" / f"slurm-{words_only.job_id}"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    (run_dir / "result.json").write_text('{"status": "KILLED"}')
    words_only.start("torchrun.sbatch", "job.yaml", **environment)
    assert words_only.end() != 0
    # The node that fails first ends the other, perhaps before that has written its words.
    words = [(folder / f"torchrun-{node}") for node in range(2)]
    assert any("resume" in path.read_text() for path in words if path.exists())
    assert words_only.requeued == []


def test_without_a_job_it_says_so(words_only: Slurm) -> None:
    words_only.start("torchrun.sbatch")
    assert words_only.end() != 0
    assert "name a job file" in words_only.log


@pytest.mark.ranks
@pytest.mark.slow
def test_torchrun_is_stopped_and_goes_on(slurm: Slurm) -> None:
    """Two nodes train; time runs out; the job is put back, and goes on to the end."""
    run_dir = slurm.folder / "runs" / f"slurm-{slurm.job_id}"
    slurm.start("torchrun.sbatch", "job.yaml")
    wait_for_steps(run_dir, 3, slurm)
    slurm.time_is_nearly_up()
    assert slurm.end() != 0
    stopped = result(run_dir)
    assert stopped["status"] == "KILLED", slurm.log
    assert 3 <= stopped["steps"] < 12
    assert slurm.requeued == [slurm.job_id]

    slurm.restarts = 1
    slurm.start("torchrun.sbatch", "job.yaml")
    assert slurm.end() == 0, slurm.log
    assert (result(run_dir)["status"], result(run_dir)["steps"]) == ("FINISHED", 12)
    assert slurm.requeued == [slurm.job_id]
    steps = [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert len(steps) == 12
    assert slurm.log.count(", 2 workers") == 2


# -- Ray -----------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_is_stopped_and_goes_on(slurm: Slurm) -> None:
    """A head and a node; time runs out; the job is put back, and goes on on a new cluster."""
    run_dir = slurm.folder / "runs" / f"slurm-{slurm.job_id}"
    slurm.start("ray.sbatch", "job.yaml", "launch.max_failures=1")
    wait_for_steps(run_dir, 3, slurm)
    assert stat.S_IMODE(next(slurm.folder.glob(".hfdist-*")).stat().st_mode) == 0o700
    slurm.time_is_nearly_up()
    assert slurm.end() == 130, slurm.log
    assert result(run_dir)["status"] == "KILLED"
    assert slurm.requeued == [slurm.job_id]
    assert not list((slurm.own / "tasks").iterdir())
    assert not list(slurm.folder.glob(".hfdist-*"))  # the token went with the cluster

    slurm.restarts = 1
    slurm.start("ray.sbatch", "job.yaml", "launch.max_failures=1")
    assert slurm.end() == 0, slurm.log
    assert (result(run_dir)["status"], result(run_dir)["steps"]) == ("FINISHED", 12)
    assert slurm.log.count(", 2 workers") == 2
    commands = [" ".join(step["command"]) for step in slurm.steps]
    assert len(commands) == 4
    assert [" --head " in command for command in commands] == [True, False] * 2
