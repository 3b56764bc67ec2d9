"""Long proofs on real Ray nodes: workers and nodes that die at any moment lose nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray_nodes import Program, hfdist, nodes, workers_of, write_slow_job

from hfdist import api

GREEDY_TASK = """
import time
from pathlib import Path
import torch
import torch.distributed as dist
from slow import Slow

class Greedy(Slow):
    def __init__(self, marker, **arguments):
        super().__init__(**arguments)
        self.marker, self.calls = Path(marker), 0

    def loss(self, *arguments):
        self.calls += 1
        is_second = dist.is_initialized() and dist.get_rank() == 1
        if self.calls == 40 and is_second and not self.marker.exists():
            self.marker.touch()
            hoard = [torch.ones(2**26) for _ in range(32)]
            time.sleep(20)
        return super().loss(*arguments)
"""
SLOW_END_TASK = """
import time
from torch import nn
from hfdist.tasks.digits import DigitsClassifier

class SlowToCopy(nn.Sequential):
    def __deepcopy__(self, memo):
        time.sleep(25)
        return nn.Sequential(*self)

class SlowEnd(DigitsClassifier):
    def model(self):
        return SlowToCopy(*super().model())
"""
GIGABYTE = 10**9

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_slow_job(tmp_path)


def steps_of(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def groups_of(run_dir: Path) -> int:
    """How many groups of two workers there have been."""
    logs = list((run_dir / "logs").glob("rank-*.log"))
    counts = [log.read_text().count("process ") for log in logs]
    return min(counts) if len(counts) == 2 else 0


def group(number: int, workers: int) -> Callable[[Program], bool]:
    """Whether a group of so many workers has begun, after the first `number` groups."""

    def there(program: Program) -> bool:
        starts = program.events("start")[number:]
        return any(start["info"]["world_size"] == workers for start in starts)

    return there


def tracked_steps(run_dir: Path, mlflow_run_id: str) -> list[int]:
    """Steps of the loss in the run's MLflow store, as often as they are there."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    return [metric.step for metric in client.get_metric_history(mlflow_run_id, "loss")]


@pytest.mark.timeout(2400)
def test_twenty_kills_leave_the_same_parameters(tmp_path: Path, job: Path) -> None:
    """Workers are killed 20 times at random moments of a run of 40 steps."""
    dice, kills = random.Random(0), 20
    undisturbed = api.train(job, ["steps=40"], run_id="undisturbed")
    run_dir = tmp_path / "runs" / "killed"
    with nodes(tmp_path, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "killed", "steps=40"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            f"launch.max_failures={kills}",
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            for number in range(kills):
                program.wait_for(lambda p, n=number: groups_of(run_dir) > n, 180)
                if dice.random() < 0.5:  # else while the checkpoint is read, or in the first step
                    steps = len(program.events("step")) + dice.randrange(1, 4)
                    program.wait_for(lambda p, n=steps: len(p.events("step")) >= n, 60)
                time.sleep(dice.uniform(0.0, 1.0))
                assert not program.events("finish"), "the run was faster than its killer"
                dice.choice(workers_of(run_dir)).send_signal(signal.SIGKILL)
            assert program.end(300) == 0, program.output
    result = json.loads((run_dir / "result.json").read_text())
    begun = [event["first_step"] for event in program.events("start")]
    print(f"{kills} kills; groups went on at steps {begun}")
    assert groups_of(run_dir) == kills + 1
    assert result["status"] == "FINISHED"
    assert result["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert steps_of(run_dir) == list(range(40))
    assert tracked_steps(run_dir, result["mlflow_run_id"]) == list(range(40))


@pytest.mark.timeout(900)
def test_an_elastic_run_survives_a_node_and_uses_a_new_one(tmp_path: Path, job: Path) -> None:
    run_dir = tmp_path / "runs" / "elastic"
    with nodes(tmp_path, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "elastic", "steps=2000"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            *("launch.workers=[1, 2]", "launch.max_failures=5"),
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(group(0, 2), 120)
            program.wait_for(lambda p: len(p.events("step")) >= 5, 60)
            groups, steps = len(program.events("start")), len(program.events("step"))
            cluster.kill(cluster.members[1])
            shrunk = program.wait_for(group(groups, 1), 60)
            shrunk += program.wait_for(lambda p: len(p.events("step")) > steps + 1, 60 - shrunk)
            groups = len(program.events("start"))
            cluster.add(num_cpus=1)
            grown = program.wait_for(group(groups, 2), 60)
            program.wait_for(lambda p: len(p.events("step")) > steps + 5, 60)
            program.signal(signal.SIGINT)
            assert program.end(90) == 130, program.output
    print(f"went on after {shrunk:.1f} s, used the new node after {grown:.1f} s")
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "KILLED"
    assert steps_of(run_dir) == list(range(result["steps"]))
    assert tracked_steps(run_dir, result["mlflow_run_id"]) == list(range(result["steps"]))


@pytest.mark.timeout(400)
def test_an_elastic_run_that_is_ending_does_not_restart_to_grow(tmp_path: Path, job: Path) -> None:
    """A node comes while the lead records the model: longer than Ray Train takes to look for nodes."""
    (tmp_path / "slow_end.py").write_text(SLOW_END_TASK)
    run_dir = tmp_path / "runs" / "ending"
    with nodes(tmp_path, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "ending", "steps=3"),
            *("task=slow_end.py:SlowEnd", "tracking.log_model=true"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            *("launch.workers=[1, 2]", "launch.max_failures=5"),
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(lambda p: len(p.events("step")) == 3, 120)
            cluster.add(num_cpus=1)
            assert program.end(120) == 0, program.output
    assert len(program.events("start")) == 1, program.output
    assert json.loads((run_dir / "result.json").read_text())["status"] == "FINISHED"
    assert (run_dir / "model" / "MLmodel").is_file(), program.output


@pytest.mark.timeout(1000)
def test_a_node_that_drains_loses_no_committed_step(tmp_path: Path, job: Path) -> None:
    """The notice that a spot instance gets: checkpoints are far apart, and none of its steps is repeated."""
    with nodes(tmp_path, {"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "drained", "steps=4000"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            *("launch.workers=[1, 2]", "launch.max_failures=5", "checkpoint.every=100000"),
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(group(0, 2), 300)
            program.wait_for(lambda p: len(p.events("step")) >= 5, 120)
            drained = cluster.members[2]
            cluster.drain(drained, seconds=15)
            time.sleep(16)
            cluster.kill(drained)
            program.wait_for(lambda p: len(p.events("start")) >= 2, 240)
            known = len(program.events("step"))
            program.wait_for(lambda p: len(p.events("step")) > known + 3, 120)
            program.signal(signal.SIGINT)
            assert program.end(90) == 130, program.output
    steps = [event["step"] for event in program.events("step")]
    again = program.events("start")[1]["first_step"]
    print(f"went on at step {again} of {len(steps)}")
    assert again >= 5
    # At most the step that ended while the node was taken away is repeated.
    assert len(steps) - len(set(steps)) <= 1


@pytest.mark.timeout(600)
def test_a_node_that_was_taken_for_lost_comes_back(tmp_path: Path, job: Path) -> None:
    """The node of the lead is halted (as by a network that fails), the run goes on without it, and then it
    wakes in the middle of its step: nothing that it writes is mixed with what the others write."""
    run_dir = tmp_path / "runs" / "partition"
    with nodes(tmp_path, {"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "partition", "steps=2000"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            *("launch.workers=[1, 2]", "launch.max_failures=5", "launch.timeout_seconds=15"),
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(group(0, 2), 120)
            program.wait_for(lambda p: len(p.events("step")) >= 4, 60)
            groups, steps = len(program.events("start")), len(program.events("step"))
            lead = workers_of(run_dir)[0]
            lost = cluster.node_of(lead)
            cluster.pause(lost)
            seconds = program.wait_for(group(groups, 1), 60)
            seconds += program.wait_for(lambda p: len(p.events("step")) > steps + 1, 60 - seconds)
            known = len(program.events("step"))
            cluster.go_on(lost)
            cluster.reap(lost, 60)
            assert psutil.wait_procs([lead], timeout=60)[1] == []
            program.wait_for(lambda p: len(p.events("step")) > known + 5, 60)
            program.signal(signal.SIGINT)
            assert program.end(90) == 130, program.output
    print(f"went on {seconds:.1f} s after its lead's node was halted")
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "KILLED"
    assert steps_of(run_dir) == list(range(result["steps"]))
    assert tracked_steps(run_dir, result["mlflow_run_id"]) == list(range(result["steps"]))


@pytest.mark.timeout(600)
def test_a_worker_out_of_memory_is_started_again(tmp_path: Path, job: Path) -> None:
    """Ray ends workers before their node runs out of memory: the run goes on to the same parameters, or,
    where it may not, says what happened."""
    undisturbed = api.train(job, ["steps=8"], run_id="undisturbed")
    (tmp_path / "greedy.py").write_text(GREEDY_TASK)
    memory = psutil.virtual_memory()
    if memory.available < 16 * GIGABYTE:
        pytest.skip("16 GB of free memory are needed")
    limit = (memory.total - memory.available + 7 * GIGABYTE) / memory.total
    settings = {"RAY_memory_usage_threshold": f"{limit:.3f}"}
    with nodes(tmp_path, {"num_cpus": 2}, settings=settings) as cluster:
        for run_id, failures, code in (("greedy", 1, 0), ("refused", 0, 1)):
            marker = tmp_path / f"{run_id}.marker"
            arguments = [
                *("train", str(job), "--json", "--run-id", run_id, "steps=8"),
                *("task=greedy.py:Greedy", f"task_args.marker={marker}"),
                *("launch.backend=ray", f"launch.address={cluster.address}"),
                f"launch.max_failures={failures}",
            ]
            with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
                assert program.end(150) == code, program.output
            assert marker.exists()
    result = json.loads((tmp_path / "runs" / "greedy" / "result.json").read_text())
    assert result["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert steps_of(tmp_path / "runs" / "greedy") == list(range(8))
    refused = json.loads((tmp_path / "runs" / "refused" / "result.json").read_text())
    assert "rank 1 was killed because its node ran out of memory" in refused["error"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("failures", [1, 0])
def test_a_lost_controller_is_a_failure_like_another(
    tmp_path: Path, job: Path, failures: int
) -> None:
    """Ray Train's own processes die too, and with them what would free the workers' resources."""
    undisturbed = api.train(job, ["steps=30"], run_id="undisturbed")
    run_dir = tmp_path / "runs" / "orphaned"
    with nodes(tmp_path, {"num_cpus": 2}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "orphaned", "steps=30"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            f"launch.max_failures={failures}",
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(lambda p: len(p.events("step")) >= 3, 120)
            killed = cluster.kill_actors("PlacementGroupCleaner", "TrainController")
            assert killed == 2
            assert program.end(150) == 1 - failures, program.output
    result = json.loads((run_dir / "result.json").read_text())
    if failures:
        assert "Ray Train's controller failed: the workers restart" in program.output
        assert result["parameters_sha256"] == undisturbed["parameters_sha256"]
        assert steps_of(run_dir) == list(range(30))
    else:
        assert result["status"] == "FAILED"
        assert "Ray Train's controller ended without a word" in result["error"]


@pytest.mark.timeout(400)
def test_a_lost_head_is_one_message_and_the_run_goes_on_elsewhere(
    tmp_path: Path, job: Path
) -> None:
    run_dir = tmp_path / "runs" / "head"
    with nodes(tmp_path, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "head", "steps=200"),
            *("launch.backend=ray", f"launch.address={cluster.address}", "launch.max_failures=5"),
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(lambda p: len(p.events("step")) >= 3, 120)
            workers = workers_of(run_dir)
            cluster.kill(cluster.members[0])
            began = time.monotonic()
            assert program.end(90) == 1, program.output
            seconds = time.monotonic() - began
            assert "`hfdist resume" in program.output, program.output
    assert psutil.wait_procs(workers, timeout=90)[1] == []
    done = len(steps_of(run_dir))
    resumed = api.resume(run_dir, [f"steps={done + 2}", "launch.backend=local"])
    undisturbed = api.train(job, [f"steps={done + 2}"], run_id="undisturbed")
    print(f"the driver ended {seconds:.1f} s after the head")
    assert resumed["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert steps_of(run_dir) == list(range(done + 2))


@pytest.mark.timeout(400)
def test_a_killed_driver_leaves_no_process_and_its_run_goes_on(tmp_path: Path, job: Path) -> None:
    run_dir = tmp_path / "runs" / "driver"
    arguments = ["train", str(job), "--json", "--run-id", "driver", "steps=8", "launch.backend=ray"]
    with hfdist(*arguments, environment={"OMP_NUM_THREADS": "1"}, cwd=tmp_path) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 3, 180)
        family = psutil.Process(program.process.pid).children(recursive=True)
        program.signal(signal.SIGKILL)
        program.end(30)
    assert f"error: this process was ended: `hfdist resume {run_dir}` goes on" in program.output
    assert psutil.wait_procs(family, timeout=150)[1] == []
    resumed = api.resume(run_dir, ["launch.backend=local"])
    undisturbed = api.train(job, ["steps=8"], run_id="undisturbed")
    assert resumed["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert steps_of(run_dir) == list(range(8))
