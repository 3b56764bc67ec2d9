"""A program that is killed or interrupted at any moment goes on to what it would have become."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Steps take a while, so that most moments lie within one.
JOB = """
name: kill
task: hfdist.tasks.digits:DigitsAutoencoder
task_args: {widths: [48, 8]}
steps: 14
batches: {gradient: 600, curvature: 300}
optim: {cg_max_iter: 25}
checkpoint: {every: 1, keep: 2}
tracking: {enabled: false}
evaluate: {every: 0}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(f"{JOB}output: {tmp_path}/runs\n")
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hfdist", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def end(process: subprocess.Popen[str], timeout: float) -> str:
    """Wait for the process; returns what it printed."""
    return process.communicate(timeout=timeout)[0]


def result_of(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "result.json").read_text())


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, number: int) -> None:
    log = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= number:
            return
        time.sleep(0.01)


@pytest.mark.parametrize(
    "after", [(1, 6), pytest.param((1, 3, 6, 10), marks=pytest.mark.slow)], ids=["twice", "often"]
)
def test_killed_at_any_moment_it_resumes_to_the_same_parameters(
    job: Path, after: tuple[int, ...]
) -> None:
    runs = job.parent / "runs"
    end(start("train", str(job), "--run-id", "whole", "--quiet"), 90)
    expected = result_of(runs / "whole")
    moments = random.Random(4)
    run_dir = runs / "killed"
    process = start("train", str(job), "--run-id", "killed", "--quiet")
    kills = 0
    for steps in after:
        wait_for_steps(process, run_dir, steps)
        time.sleep(moments.uniform(0.0, 0.15))
        if process.poll() is None:
            process.kill()
            kills += 1
        end(process, 30)
        if (run_dir / "result.json").exists():
            break
        process = start("resume", str(run_dir), "--quiet")
    out = end(process, 90)
    assert kills >= len(after) // 2
    assert process.returncode == 0, out
    found = result_of(run_dir)
    for key in ("parameters_sha256", "cg_iterations", "final_loss", "steps", "status"):
        assert found[key] == expected[key]
    steps_recorded = [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps_recorded == list(range(14))
    left = [p.name for p in (run_dir / "checkpoints").iterdir()]
    assert all((run_dir / "checkpoints" / name / "manifest.json").exists() for name in left)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
@pytest.mark.timeout(600)
def test_interrupted_it_saves_says_so_and_goes_on(job: Path, number: signal.Signals) -> None:
    runs = job.parent / "runs"
    changes = ["steps=400", "checkpoint.every=100"]
    process = start("train", str(job), "--run-id", "stopped", *changes)
    wait_for_steps(process, runs / "stopped", 2)
    process.send_signal(number)
    out = end(process, 60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert "hfdist resume" in out
    killed = result_of(runs / "stopped")
    assert killed["status"] == "KILLED"
    done = int(str(killed["steps"]))
    assert 2 <= done < 400
    goal = done + 2
    end(start("resume", str(runs / "stopped"), f"steps={goal}", "--quiet"), 60)
    end(start("train", str(job), "--run-id", "whole", f"steps={goal}", "--quiet"), 60)
    assert (
        result_of(runs / "stopped")["parameters_sha256"]
        == result_of(runs / "whole")["parameters_sha256"]
    )


PREEMPTED_TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class SlowLater(DigitsClassifier):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def loss(self, *arguments):
        self.calls += 1
        if self.calls > 400:
            time.sleep(0.5)
        return super().loss(*arguments)
"""
NOTICE = (
    20.0  # seconds, of which loading the machine may take some; a pass over the data takes 90 s
)


@pytest.mark.timeout(600)
def test_a_machine_that_is_taken_back_leaves_a_checkpoint_inside_its_notice(tmp_path: Path) -> None:
    """SIGTERM in the middle of a pass that takes longer than the notice, then SIGKILL."""
    (tmp_path / "later.py").write_text(PREEMPTED_TASK)
    job = tmp_path / "job.yaml"
    job.write_text(
        "task: later.py:SlowLater\nsteps: 50\nbatches: {microbatch: 8}\n"
        "optim: {solver: cg, preconditioner: none, cg_max_iter: 1}\n"
        f"checkpoint: {{every: 100}}\ntracking: {{enabled: false}}\noutput: {tmp_path}/runs\n"
    )
    run_dir = tmp_path / "runs" / "spot"
    process = start("train", str(job), "--run-id", "spot", "--quiet")
    wait_for_steps(process, run_dir, 1)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(NOTICE)
    except subprocess.TimeoutExpired:
        process.kill()
    end(process, 30)
    done = (run_dir / "metrics.jsonl").read_text().count("\n")
    newest = max(int(p.name.rpartition("-")[2]) for p in (run_dir / "checkpoints").iterdir())
    assert newest == done >= 1
    assert process.returncode == 130


def test_a_full_disk_is_one_message_and_leaves_a_checkpoint(job: Path) -> None:
    """A limit on file sizes stands for a disk that is full."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from hfdist.cli import main; sys.argv = ['hfdist', *sys.argv[1:]]; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "train", str(job), "--run-id", "full", "--quiet"],
        capture_output=True,
        text=True,
        timeout=360,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert "cannot be written" in run.stderr
    folder = job.parent / "runs" / "full" / "checkpoints"
    assert [p for p in folder.rglob("*") if p.is_file()] == []
