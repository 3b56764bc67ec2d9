"""Tracking against a real MLflow server: what is told arrives, once, in order, whatever dies in between."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from proxy import Proxy
from torch import nn

from hfdist.config.tracking import TrackingConfig
from hfdist.tracking import RunInfo, Status, Tracker, make_tracker, sync

pytestmark = [pytest.mark.timeout(600)]

HERE = Path(__file__).parent
LONGEST_CALL = 0.050  # seconds that a step may wait for its tracker


@pytest.fixture(scope="module", autouse=True)
def _impatient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # a busy machine's server is no dead one
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture
def client(server):
    return MlflowClient(server.uri)


def start(server, output: Path, run_id: str, *, info=None, **config) -> Tracker:
    settings = {"uri": server.uri, "system_metrics": False, "experiment": "service", **config}
    tracker = make_tracker(TrackingConfig(**settings), output)
    (output / run_id).mkdir(parents=True, exist_ok=True)
    tracker.start(RunInfo(run_id=run_id, name="test", run_dir=output / run_id, **(info or {})))
    return tracker


def told(run_dir: Path) -> list[tuple[int, int]]:
    """(step, time) of the metrics events in a spool."""
    lines = (run_dir / "spool" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["step"], e["time"]) for e in events if e["kind"] == "metrics"]


def arrived(client, run_id: str, key: str = "loss") -> list[tuple[int, int]]:
    history = client.get_metric_history(run_id, key)
    return sorted((m.step, m.timestamp) for m in history)


def runs_of(client, experiment: str, run_id: str) -> list:
    id_ = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([id_], f"tags.`hfdist.run_id` = '{run_id}'")


def test_a_run_is_described(server, client, tmp_path):
    tracker = start(
        server,
        tmp_path,
        "described",
        info={
            "params": {"optim.damping": 1.0, "long": "x" * 7000},
            "tags": {"task": "Digits"},
            "dataset": {"name": "digits", "num_examples": 10, "digest": "abc"},
        },
        tags={"team": "blue"},
        system_metrics=True,
        system_metrics_every=0.2,
    )
    (tmp_path / "described" / "plots").mkdir()
    picture = tmp_path / "described" / "plots" / "a.png"
    picture.write_bytes(b"png")
    tracker.log_artifact(picture, "plots")
    tracker.log_metrics({"loss": 2.0, "eval/a (b)": 1.0, "nan": float("nan")}, 0)
    tracker.finish(Status.FINISHED)

    assert tracker.url == (
        f"{server.uri}/#/experiments/"
        f"{client.get_experiment_by_name('service').experiment_id}/runs/{tracker.tracked_as}"
    )
    run = client.get_run(tracker.tracked_as)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.damping"] == "1.0"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["task"] == "Digits"
    assert run.data.tags["team"] == "blue"
    assert run.data.tags["torch"].startswith(torch.__version__.partition("+")[0])
    assert run.data.metrics["loss"] == 2.0
    assert run.data.metrics["eval/a _b_"] == 1.0
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    [dataset] = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "abc")
    [file] = client.list_artifacts(tracker.tracked_as, "plots")
    assert file.path == "plots/a.png"


@pytest.mark.parametrize("status", [Status.FAILED, Status.KILLED])
def test_the_end_is_told_truthfully_and_a_resumed_run_is_the_same_run(
    server, client, tmp_path, status
):
    run_id = f"resumed-{status}"
    first = start(server, tmp_path, run_id, info={"params": {"steps": 2, "seed": 0}})
    for step in range(2):
        first.log_metrics({"loss": float(step)}, step)
    first.finish(status)
    first.finish(Status.FINISHED)  # the first word stands
    assert client.get_run(first.tracked_as).info.status == status

    again = start(
        server,
        tmp_path,
        run_id,
        info={"params": {"steps": 4, "seed": 0}, "tracked_as": first.tracked_as},
    )
    for step in range(1, 4):  # step 1 is repeated
        again.log_metrics({"loss": float(step)}, step)
    assert again.flush()
    assert client.get_run(first.tracked_as).info.status == "RUNNING"
    again.finish(Status.FINISHED)

    assert again.tracked_as == first.tracked_as
    run = client.get_run(first.tracked_as)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"steps": "2", "seed": "0"}
    assert run.data.tags["changed.steps"] == "4"
    assert [step for step, _ in arrived(client, first.tracked_as)] == [0, 1, 2, 3]


def test_a_run_whose_folder_was_lost_is_found_again(server, client, tmp_path):
    first = start(server, tmp_path / "one", "lost")
    first.log_metrics({"loss": 0.0}, 0)
    first.log_metrics({"loss": 1.0}, 1)
    first.flush()
    first.finish(Status.KILLED)
    again = start(server, tmp_path / "two", "lost")  # neither spool nor identifier
    again.log_metrics({"loss": 1.0}, 1)
    again.log_metrics({"loss": 2.0}, 2)
    again.finish(Status.FINISHED)
    assert again.tracked_as == first.tracked_as
    assert [step for step, _ in arrived(client, again.tracked_as)] == [0, 1, 2]


def line(step: int) -> dict[str, object]:
    """One of metrics.jsonl."""
    return {"step": step, "time": 1000.0 + step, "loss": 1.0, "stop": "residual", "quadratic": []}


def test_what_a_lost_machine_had_not_delivered_is_told_from_the_record(server, client, tmp_path):
    """The lead goes from one machine to another, and back, while the server is away."""
    first = start(server, tmp_path / "one", "moves")
    for step in range(3):
        first.log_metrics({"loss": 1.0}, step)
    assert first.flush()
    server.pause()
    try:
        for step in (3, 4):
            first.log_metrics({"loss": 1.0}, step)
        first._sender.stop()  # its machine is gone
        first._spool.close()
        record = [line(step) for step in range(5)]
        second = start(server, tmp_path / "two", "moves", info={"record": record})
        second.log_metrics({"loss": 1.0}, 5)
        server.go_on()
        assert second.flush()
        assert [step for step, _ in arrived(client, second.tracked_as)] == list(range(6))
        assert arrived(client, second.tracked_as)[3:5] == [(3, 1003000), (4, 1004000)]
        server.pause()
        second.log_metrics({"loss": 1.0}, 6)
        second._sender.stop()
        second._spool.close()
    finally:
        server.go_on()
    record = [line(step) for step in range(7)]
    third = start(server, tmp_path / "one", "moves", info={"record": record})
    third.log_metrics({"loss": 1.0}, 7)
    assert third.finish(Status.FINISHED)
    assert third.tracked_as == second.tracked_as
    assert [step for step, _ in arrived(client, third.tracked_as)] == list(range(8))
    assert arrived(client, third.tracked_as)[6] == (6, 1006000)


def test_a_server_that_hangs_and_one_that_crashes_lose_nothing_and_delay_nothing(
    server, client, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    tracker = start(server, tmp_path, "outage")
    slowest = 0.0

    def steps(numbers: range) -> None:
        nonlocal slowest
        for step in numbers:
            begin = time.perf_counter()
            tracker.log_metrics({"loss": 1.0 / (step + 1), "damping": float(step)}, step)
            slowest = max(slowest, time.perf_counter() - begin)
            time.sleep(0.005)

    steps(range(100))
    server.pause()
    try:
        steps(range(100, 700))  # longer than a request's patience
    finally:
        server.go_on()
    steps(range(700, 800))
    server.kill()
    steps(range(800, 1000))
    server.start()
    steps(range(1000, 1050))
    tracker.finish(Status.FINISHED)

    assert slowest < LONGEST_CALL
    expected = told(tmp_path / "outage")
    assert [step for step, _ in expected] == list(range(1050))
    assert arrived(client, tracker.tracked_as) == expected
    assert arrived(client, tracker.tracked_as, "damping") == expected
    assert client.get_run(tracker.tracked_as).info.status == "FINISHED"


@pytest.mark.parametrize("fault", ["the answer is lost", "the request arrives late"])
def test_a_job_is_one_run_over_a_bad_connection(server, client, tmp_path, fault):
    created, late = [], []

    def spoil(path, hand_on) -> bool:
        if not path.endswith("/runs/create"):
            return False
        created.append(path)
        if len(created) > 1:
            return False
        if fault == "the answer is lost":
            hand_on()
        else:
            late.append(hand_on)
        return True

    proxy = Proxy(server.uri, spoil)
    try:
        tracker = start(server, tmp_path, f"bad-{len(fault)}", uri=proxy.uri)
        tracker.log_metrics({"loss": 1.0}, 0)
        assert tracker.flush()
        for hand_on in late:
            hand_on()  # as from a server that hung and takes up what lies on its desk
        tracker.finish(Status.FINISHED)
    finally:
        proxy.close()
    assert len(created) == (1 if fault == "the answer is lost" else 2)
    [run] = runs_of(client, "service", f"bad-{len(fault)}")
    assert run.info.run_id == tracker.tracked_as
    assert run.info.status == "FINISHED"
    assert arrived(client, run.info.run_id) == told(tmp_path / f"bad-{len(fault)}")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "pw"},
            "Basic " + base64.b64encode(b"ann:pw").decode(),
        ),
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, "Bearer abc"),
    ],
)
def test_credentials_come_from_the_usual_variables(
    server, tmp_path, monkeypatch, variables, expected
):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    proxy = Proxy(server.uri, lambda path, hand_on: False)
    try:
        tracker = start(server, tmp_path, f"auth-{len(variables)}", uri=proxy.uri)
        tracker.finish(Status.FINISHED)
    finally:
        proxy.close()
    assert tracker.tracked_as is not None
    assert {headers["Authorization"] for headers in proxy.headers} == {expected}


def test_what_is_pending_at_the_end_waits_for_sync(server, client, tmp_path, caplog):
    tracker = start(server, tmp_path, "late", finish_timeout=0.5)
    tracker.log_metrics({"loss": 0.0}, 0)
    while not tracker.flush():  # half a second each
        pass
    server.pause()
    try:
        tracker.log_metrics({"loss": 1.0}, 1)
        begin = time.monotonic()
        tracker.finish(Status.FINISHED)
        assert time.monotonic() - begin < 3
    finally:
        server.go_on()
    assert f"hfdist sync {tmp_path / 'late'}" in caplog.text
    (tmp_path / "late").rename(tmp_path / "moved")
    assert sync(tmp_path / "moved") >= 1
    assert sync(tmp_path / "moved") == 0
    [run] = runs_of(client, "service", "late")
    assert run.info.status == "FINISHED"
    assert arrived(client, run.info.run_id) == told(tmp_path / "moved")


def run_client(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "client_process.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_after(process: subprocess.Popen[str], step: int) -> None:
    """SIGKILL once the client has told a step."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            break
    process.kill()
    process.wait(10)
    process.stdout.close()


@pytest.mark.slow
def test_a_client_that_is_killed_leaves_a_record_without_gaps_and_doubles(server, client, tmp_path):
    arguments = (tmp_path, "crash", server.uri)
    kill_after(run_client(*arguments, 0), 150)  # while it delivers
    kill_after(run_client(*arguments, 100), 301)  # goes on from a checkpoint, and dies again
    steps = [step for step, _ in told(tmp_path / "crash")]
    assert steps == list(range(steps[-1] + 1))
    assert steps[-1] >= 300

    sync(tmp_path / "crash")
    [run] = runs_of(client, "crash", "crash")
    assert arrived(client, run.info.run_id) == told(tmp_path / "crash")
    assert run.info.status == "FAILED"  # nobody said how it ended: it did not end well

    last = run_client(*arguments, steps[-1] - 5, steps[-1] + 20, "FINISHED")
    last.communicate(timeout=240)
    assert last.returncode == 0
    [run] = runs_of(client, "crash", "crash")
    assert run.info.status == "FINISHED"
    assert [s for s, _ in arrived(client, run.info.run_id)] == list(range(steps[-1] + 20))


def test_delivering_again_what_was_not_acknowledged_doubles_nothing(server, client, tmp_path):
    """As after a crash between a delivery and its acknowledgement."""
    tracker = start(
        server,
        tmp_path,
        "again",
        info={"params": {"a": 1}, "dataset": {"name": "d", "num_examples": 1}},
        registered_model="again",
    )
    for step in range(5):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_model(nn.Linear(2, 1), torch.zeros(1, 2), 5)
    tracker.finish(Status.FINISHED)
    (tmp_path / "again" / "spool" / "delivered.json").write_text('{"offset": 0, "count": 0}')
    assert sync(tmp_path / "again") > 8

    [run] = runs_of(client, "service", "again")
    assert arrived(client, run.info.run_id) == told(tmp_path / "again")
    assert len(run.inputs.dataset_inputs) == 1
    assert len(run.outputs.model_outputs) == 1
    assert len(client.search_model_versions("name = 'again'")) == 1
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


TASK = '''
import torch
from torch import nn
from beside import width

class Net(nn.Module):
    """Takes keyword arguments, and has no graph: its work depends on the data."""

    def __init__(self, exportable):
        super().__init__()
        self.embed, self.out = nn.Embedding(50, width), nn.Linear(width, 3)
        self.exportable = exportable

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids) * attention_mask[..., None]
        if not self.exportable and h.sum() > 1e9:
            h = h + 1
        return {"logits": self.out(h.sum(1) / attention_mask.sum(1, keepdim=True))}
'''

LOAD = """
import sys, torch, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model(sys.argv[2])
ids = torch.arange(15).reshape(3, 5)
print(model(input_ids=ids, attention_mask=torch.ones(3, 5))["logits"].tolist())
"""


@pytest.mark.parametrize("exportable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_of_a_task_file_predicts_in_another_process(
    server, client, tmp_path, monkeypatch, exportable
):
    (tmp_path / "task").mkdir()
    name = f"net_task_{exportable}".lower()
    (tmp_path / "task" / f"{name}.py").write_text(TASK)
    (tmp_path / "task" / "beside.py").write_text("width = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path / "task"))
    sys.modules.pop("beside", None)
    model = __import__(name).Net(exportable).train()
    example = {"input_ids": torch.zeros(1, 7, dtype=torch.long), "attention_mask": torch.ones(1, 7)}

    tracker = start(
        server, tmp_path, name, registered_model="net", model_alias="champion", finish_timeout=30
    )
    tracker.log_metrics({"loss": 0.5}, 0)
    tracker.log_model(model, example, 1)
    assert model.training
    tracker.finish(Status.FINISHED)

    ids = torch.arange(15).reshape(3, 5)
    expected = model(input_ids=ids, attention_mask=torch.ones(3, 5))["logits"]
    address = "models:/net@champion" if exportable else f"runs:/{tracker.tracked_as}/model"
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, server.uri, address],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            # What is exported loads where pickles are not allowed.
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": str(not exportable).lower(),
        },
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    got = torch.tensor(json.loads(answer.stdout.splitlines()[-1]))
    torch.testing.assert_close(got, expected.detach())
    [logged] = client.search_logged_models(
        [client.get_experiment_by_name("service").experiment_id],
        filter_string=f"source_run_id = '{tracker.tracked_as}'",
    )
    assert logged.status == "READY"
    assert {m.key: m.value for m in logged.metrics} == {"loss": 0.5}
