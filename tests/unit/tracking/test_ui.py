"""`hfdist ui` says what is in its way."""

from __future__ import annotations

import socket

import pytest

from hfdist.config.tracking import TrackingConfig, store_uri
from hfdist.errors import ConfigError
from hfdist.tracking.ui import command, serve


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_job_comes_before_the_environment_and_that_before_the_file(tmp_path, monkeypatch):
    assert store_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    relative = store_uri(TrackingConfig(), (tmp_path / "runs").relative_to(tmp_path))
    assert relative == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a:1")
    assert store_uri(TrackingConfig(), tmp_path) == "http://a:1"
    assert store_uri(TrackingConfig(uri="http://b:1"), tmp_path) == "http://b:1"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uri", "file:/tmp/mlruns"),
        ("experiment", ""),
        ("system_metrics_every", 0.0),
        ("finish_timeout", -1.0),
        ("model_alias", "champion"),
        ("model_stage", "Staging"),
    ],
)
def test_bad_values_name_their_key(key, value):
    with pytest.raises(ValueError, match=key):
        TrackingConfig(**{key: value})


def test_no_runs(tmp_path):
    with pytest.raises(ConfigError, match="no runs are recorded"):
        serve(tmp_path, host="127.0.0.1", port=0)


def test_runs_at_an_address_are_recorded_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HFDIST_SCRATCH", str(tmp_path))
    with pytest.raises(ConfigError, match="no runs of s3://runs/team are recorded on this machine"):
        serve("s3://runs/team", host="127.0.0.1", port=0)


def test_a_server_has_its_own_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a:1")
    with pytest.raises(ConfigError, match="open http://a:1"):
        serve(tmp_path, host="127.0.0.1", port=0)


def test_a_port_that_is_taken(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .* choose another with --port"):
            serve(tmp_path, host="127.0.0.1", port=port)


def test_the_server_listens_where_it_is_told():
    line = command("sqlite:///a.db", host="127.0.0.1", port=5001)
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert line[line.index("--port") + 1] == "5001"
