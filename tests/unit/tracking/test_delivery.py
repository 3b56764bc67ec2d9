"""What MLflow refuses, and what it cannot store now, must not hold up the rest."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from hfdist.config.tracking import TrackingConfig
from hfdist.errors import UserError
from hfdist.tracking import RunInfo, Status, make_tracker, sync
from hfdist.tracking.spool import Spool


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def client(output):
    return MlflowClient(f"sqlite:///{output}/mlflow.db")


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def tracked(output, run_id: str, steps: int = 3, **config):
    (output / run_id).mkdir(exist_ok=True)
    tracker = make_tracker(TrackingConfig(system_metrics=False, **config), output)
    tracker.start(RunInfo(run_id=run_id, name="test", run_dir=output / run_id))
    for step in range(steps):
        tracker.log_metrics({"loss": float(step)}, step)
    return tracker


def history(client, run_id: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, "loss"))


def test_a_refused_metric_takes_no_other_with_it(output, client, caplog):
    tracker = tracked(output, "refused")
    tracker.log_metrics({"loss": 3.0, "../outside": 1.0}, 3)
    tracker.log_metrics({"loss": 4.0}, 4)
    tracker.finish(Status.FINISHED)
    assert history(client, tracker.tracked_as) == [(k, float(k)) for k in range(5)]
    assert "../outside of step 3" in caplog.text


def test_a_file_store_that_is_away_holds_up_no_numbers(output, client, caplog):
    tracker = tracked(output, "away", steps=0)
    assert tracker.flush()
    root = output / "mlartifacts"
    kept = output / "kept"
    if root.exists():
        root.rename(kept)
    root.write_text("in the way")
    file = output / "away" / "file.txt"
    file.write_text("x")
    tracker.log_artifact(file)
    for step in range(3):
        tracker.log_metrics({"loss": float(step)}, step)
    spool = tracker._spool
    for _ in range(200):
        if spool.aside and spool.num_pending == 1:
            break
        spool.wait(0.1)
    assert history(client, tracker.tracked_as) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert "cannot be stored now" in caplog.text
    root.unlink()
    if kept.exists():
        kept.rename(root)
    tracker.finish(Status.FINISHED)
    assert [f.path for f in client.list_artifacts(tracker.tracked_as)] == ["file.txt"]


def test_a_run_that_was_deleted_is_told_anew_when_it_goes_on(output, client):
    first = tracked(output, "deleted")
    first.finish(Status.KILLED)
    client.delete_run(first.tracked_as)
    again = tracked(output, "deleted", steps=5)
    again.finish(Status.FINISHED)
    assert again.tracked_as != first.tracked_as
    assert history(client, again.tracked_as) == [(k, float(k)) for k in range(5)]


def test_another_store_is_told_everything(output, client, tmp_path):
    tracked(output, "moves").finish(Status.FINISHED)
    uri = f"sqlite:///{tmp_path}/other.db"
    assert sync(output / "moves") == 0
    assert sync(output / "moves", uri) > 3
    other = MlflowClient(uri)
    [run] = other.search_runs([other.get_experiment_by_name("hfdist").experiment_id])
    assert history(other, run.info.run_id) == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_sync_refuses_what_it_cannot_deliver(output, tmp_path):
    with pytest.raises(UserError, match="nothing to deliver"):
        sync(tmp_path)
    tracker = tracked(output, "alive", steps=1)
    with pytest.raises(UserError, match="in use"):
        sync(output / "alive")
    tracker.finish(Status.FINISHED)
    assert sync(output / "alive") == 0


def test_passwords_stay_out_of_the_record(output, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        TrackingConfig(uri="http://ann:hunter2@localhost:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@localhost:1")
    tracker = tracked(tmp_path, "secret", finish_timeout=0)
    tracker.finish(Status.FINISHED)
    texts = [p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert any("localhost:1" in text for text in texts)
    assert not any("hunter2" in text for text in texts)


def test_a_spool_says_how_the_run_ended(output):
    tracked(output, "ended").finish(Status.KILLED)
    spool = Spool(output / "ended" / "spool")
    assert spool.status == "KILLED"
    spool.close()


def test_half_of_a_step_that_a_lost_machine_delivered_is_made_whole(output, client):
    """The server takes a thousand numbers a call: the machine may go between two calls."""
    first = tracked(output, "half")
    assert first.flush()
    client.log_metric(first.tracked_as, "loss", 3.0, 5000, 3)  # and not its damping
    first.finish(Status.KILLED)
    (output / "half" / "spool").rename(output / "lost")
    record = [{"step": k, "time": 2.0 + k, "loss": 3.0, "damping": 1.0} for k in range(4)]
    again = make_tracker(TrackingConfig(system_metrics=False), output)
    again.start(RunInfo(run_id="half", name="test", run_dir=output / "half", record=record))
    assert again.finish(Status.FINISHED)
    assert again.tracked_as == first.tracked_as
    assert history(client, again.tracked_as) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    damping = client.get_metric_history(again.tracked_as, "damping")
    assert sorted((m.step, m.timestamp) for m in damping) == [
        (k, 2000 + 1000 * k) for k in range(4)
    ]
