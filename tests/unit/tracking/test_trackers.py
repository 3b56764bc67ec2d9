"""What every tracker must do, whatever it records in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from hfdist.config.tracking import TrackingConfig
from hfdist.tracking import CompositeTracker, NullTracker, RunInfo, Status, Tracker, make_tracker

KINDS = ["null", "composite", "mlflow"]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Folder of the runs; its database is set up once."""
    return tmp_path_factory.mktemp("runs")


def make(kind: str, output: Path) -> Tracker:
    config = TrackingConfig(enabled=kind != "null", system_metrics=False)
    tracker = make_tracker(config, output)
    return CompositeTracker([NullTracker(), tracker]) if kind == "composite" else tracker


@pytest.fixture(params=KINDS)
def tracker(request, output, monkeypatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(output)  # whatever MLflow leaves in the working folder shows
    return make(request.param, output)


def info(output: Path, name: str) -> RunInfo:
    run_dir = output / name
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("steps: 1\n")
    return RunInfo(run_id=name, name="test", run_dir=run_dir, params={"steps": 1})


def test_whole_life(tracker, output, request):
    """Before its start, through its life, and after its end, no call raises."""
    name = f"life-{request.node.callspec.id}"
    assert tracker.tracked_as is None
    assert tracker.flush()
    told = info(output, name)
    tracker.start(told)
    tracker.log_artifact(told.run_dir / "config.yaml")
    tracker.log_metrics({"loss": 2.0, "nan": float("nan"), "inf": float("inf")}, 0)
    tracker.log_metrics({"loss": torch.tensor(1.0)}, 1)
    tracker.log_artifact(told.run_dir / "missing.txt")
    tracker.log_model(nn.Linear(2, 1), torch.zeros(1, 2), 2)
    assert tracker.flush()
    known = tracker.tracked_as
    tracker.finish(Status.FINISHED)
    tracker.finish(Status.FAILED)
    tracker.log_metrics({"loss": 0.0}, 2)
    assert tracker.tracked_as == known
    if isinstance(tracker, NullTracker):
        assert known is None
        return
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    run = client.get_run(known)
    assert run.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(known, "loss")] == [2.0, 1.0]
    assert [f.path for f in client.list_artifacts(known)] == ["config.yaml"]
    assert run.info.artifact_uri.startswith((output / "mlartifacts").as_uri())
    assert not (output / "mlruns").exists()


def test_a_model_that_cannot_be_written_is_no_reason_to_fail(output, caplog):
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    tracker = make("mlflow", output)
    tracker.start(info(output, "stubborn"))
    tracker.log_model(Stubborn(2, 1), torch.zeros(1, 2), 0)
    tracker.finish(Status.FINISHED)
    assert "not to be copied" in caplog.text


def test_an_unusable_store_raises_nothing_and_says_how_to_go_on(output, caplog, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    config = TrackingConfig(uri=f"sqlite:///{blocked}/a.db", finish_timeout=0, system_metrics=False)
    tracker = make_tracker(config, output)
    tracker.start(info(output, "unusable"))
    tracker.log_metrics({"loss": 0.0}, 0)
    tracker.finish(Status.FINISHED)
    assert tracker.tracked_as is None
    assert f"hfdist sync {output / 'unusable'}" in caplog.text


def test_mlflow_is_loaded_by_the_first_run_only(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from hfdist.tracking import make_tracker\n"
        "from hfdist.config.tracking import TrackingConfig\n"
        "from hfdist.tracking.plots import draw_plots\n"
        "make_tracker(TrackingConfig(), pathlib.Path('.'))\n"
        "print([m for m in ('mlflow', 'matplotlib', 'psutil') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_new_store_is_mlflows_own_whether_made_or_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    from hfdist.tracking.client import connect

    def content(path: Path) -> tuple[list[str], list[str]]:
        with sqlite3.connect(path) as store:
            names = sorted(
                str(row) for row in store.execute("SELECT type, name FROM sqlite_master")
            )
            return names, [str(row) for row in store.execute("SELECT * FROM alembic_version")]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    connect(f"sqlite:///{tmp_path}/made.db")
    (kept,) = (tmp_path / "cache" / "hfdist").iterdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    client = connect(f"sqlite:///{tmp_path}/taken.db")
    assert content(tmp_path / "made.db") == content(tmp_path / "taken.db")
    client.create_run(client.create_experiment("e"))
    assert client.get_experiment("0").artifact_location == f"{tmp_path}/elsewhere/mlruns/0"
    kept.write_bytes(b"no database")  # it is not relied upon
    connect(f"sqlite:///{tmp_path}/again.db")
    assert content(tmp_path / "made.db") == content(tmp_path / "again.db")
