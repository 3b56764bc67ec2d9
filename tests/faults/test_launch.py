"""Workers that die, stall, raise or drift apart; groups by torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
MARK = "HFDIST_TEST_FOLDER"


def write_job(folder: Path) -> Path:
    path = folder / "job.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "fault",
                "task": f"{HERE / 'fault_task.py'}:Fault",
                "task_args": {"marker": str(folder / "happened")},
                "steps": 12,
                "output": str(folder / "runs"),
                "optim": {"solver": "cg", "preconditioner": "none", "cg_max_iter": 5},
                "evaluate": {"batch": 16},
                "checkpoint": {"every": 1},
                "launch": {"workers": 2, "timeout_seconds": 8, "threads_per_worker": 1},
                "tracking": {"enabled": False},
            }
        )
    )
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def hfdist(
    *arguments: str, timeout: float = 360, **environment: str
) -> subprocess.CompletedProcess[str]:
    mark = {MARK: str(Path(arguments[1]).parent)}
    return subprocess.run(
        [sys.executable, "-m", "hfdist", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | mark | environment,
    )


def result(job: Path, run_id: str) -> dict[str, Any]:
    return json.loads((job.parent / "runs" / run_id / "result.json").read_text())


def left_behind(job: Path) -> list[str]:
    """Workers that are still there, of this test's runs: they have its mark from their parent."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if "hfdist.launch.child" in command and process.environ().get(MARK) == str(job.parent):
                found.append(command)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run becomes when nothing happens."""
    job = write_job(tmp_path_factory.mktemp("undisturbed"))
    run = hfdist("train", str(job), "--run-id", "undisturbed", "--quiet")
    assert run.returncode == 0, run.stderr
    return result(job, "undisturbed")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        pytest.param(
            "raise",
            ["rank 1", "Fault.loss()", "ValueError", "the fault of rank one", "fault_task.py:"],
            marks=pytest.mark.slow,
        ),
        ("kill", ["rank 1", "SIGKILL"]),
        pytest.param("stop", ["rank 1"], marks=pytest.mark.slow),
    ],
)
def test_the_failing_rank_is_named_all_end_and_resume_goes_on(
    kind: str, words: list[str], job: Path, undisturbed: dict[str, Any]
) -> None:
    start = time.monotonic()
    run = hfdist("train", str(job), "--run-id", kind, "--quiet", f"task_args.kind={kind}")
    seconds = time.monotonic() - start
    assert run.returncode == 1, run.stderr
    for word in words:
        assert word in run.stderr
    assert "Traceback" not in run.stderr
    assert seconds < 60  # start-up included; the timeout is 8 s
    assert left_behind(job) == []
    assert result(job, kind)["status"] == "FAILED"

    again = hfdist("resume", str(job.parent / "runs" / kind), "--quiet")
    assert again.returncode == 0, again.stderr
    assert result(job, kind)["parameters_sha256"] == undisturbed["parameters_sha256"]


@pytest.mark.slow
def test_a_group_is_restarted_as_often_as_the_job_allows(
    job: Path, undisturbed: dict[str, Any]
) -> None:
    changes = ["task_args.kind=kill", "launch.max_failures=1"]
    run = hfdist("train", str(job), "--run-id", "again", "--quiet", *changes)
    assert run.returncode == 0, run.stderr
    assert result(job, "again")["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert left_behind(job) == []


def test_replicas_that_drift_apart_stop_the_run(job: Path) -> None:
    run = hfdist("train", str(job), "--run-id", "drift", "--quiet", "task_args.kind=drift")
    assert run.returncode == 1
    assert "parameters of rank" in run.stderr
    assert "differ" in run.stderr


def torchrun(job: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *arguments, "-m", "hfdist", "train", str(job), "--quiet"),
            "--run-id=torchrun",
        ],
        capture_output=True,
        text=True,
        timeout=480,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_torchrun_gives_the_same_run(job: Path, undisturbed: dict[str, Any]) -> None:
    run = torchrun(job)
    assert run.returncode == 0, run.stderr
    assert result(job, "torchrun")["parameters_sha256"] == undisturbed["parameters_sha256"]


@pytest.mark.slow
def test_elastic_torchrun_goes_on_from_the_checkpoint(
    job: Path, undisturbed: dict[str, Any]
) -> None:
    text = yaml.safe_load(job.read_text())
    text["task_args"]["kind"] = "kill"
    job.write_text(yaml.safe_dump(text))
    run = torchrun(job, "--max-restarts", "1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert run.returncode == 0, run.stderr
    found = result(job, "torchrun")
    assert found["parameters_sha256"] == undisturbed["parameters_sha256"]
    log = (job.parent / "runs" / "torchrun" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(12))


def test_workers_that_disagree_are_told_in_what(job: Path) -> None:
    other = job.with_name("other.yaml")
    other.write_text(job.read_text().replace("cg_max_iter: 5", "cg_max_iter: 6"))
    script = (
        "import os, sys; job = sys.argv[1 + int(os.environ['RANK'])]; "
        "sys.argv = ['hfdist', 'train', job, '--quiet']; from hfdist.cli import main; main()"
    )
    path = job.with_name("program.py")
    path.write_text(script)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(path), str(job), str(other)),
        ],
        capture_output=True,
        text=True,
        timeout=480,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode != 0
    assert "do not agree on optim.cg_max_iter" in run.stderr


def test_more_workers_than_gpus_is_one_message(job: Path) -> None:
    run = hfdist("train", str(job), "device=cuda", "--quiet", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert "2 workers but 0 GPUs" in run.stderr


def test_more_workers_than_examples_is_one_message(job: Path) -> None:
    run = hfdist("train", str(job), "task_args.examples=1", "--quiet")
    assert run.returncode == 2, run.stderr
    assert "2 workers but 1 training examples" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_taken_port_is_one_message(job: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = hfdist(
            *("train", str(job), "--quiet"),
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert run.returncode == 2, run.stderr
    assert f"port {port}" in run.stderr
    assert "Traceback" not in run.stderr
