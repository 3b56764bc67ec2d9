"""Servers that ask who one is: MLflow's users (mlflow[auth]), its workspaces, a proxy that wants a token."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from server import MlflowServer

from hfdist import api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")

PASSWORD, TOKEN = "correct-horse-7", "eyJhbGciOi.of-the-proxy"
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
JOB = """
name: users
task: hfdist.tasks.functions:Quadratic
steps: 2
optim: {cg_max_iter: 3}
tracking: {system_metrics: false, log_model: false, experiment: users, finish_timeout: 60}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = MlflowServer(
        *(folder, "--app-name", "basic-auth", "--enable-workspaces"),
        MLFLOW_AUTH_CONFIG_PATH=str(folder / "auth.ini"),
        MLFLOW_AUTH_ADMIN_PASSWORD=PASSWORD,
        MLFLOW_FLASK_SERVER_SECRET_KEY="of-this-test",
    )
    server.start(timeout=120)
    yield server
    server.kill()


@pytest.fixture
def call(server: MlflowServer) -> Callable[..., Any]:
    """A request to the server, as admin."""

    def call(path: str, body: dict[str, Any] | None = None, workspace: str = "default") -> Any:
        import base64

        pair = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        headers = {
            "Authorization": f"Basic {pair}",
            "Content-Type": "application/json",
            "X-MLFLOW-WORKSPACE": workspace,
        }
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{server.uri}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    return call


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("USERNAME", "PASSWORD", "TOKEN", "URI"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    (tmp_path / "job.yaml").write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    return tmp_path / "job.yaml"


def runs(call: Callable[..., Any], name: str, workspace: str = "default") -> list[dict[str, Any]]:
    found = call("/api/2.0/mlflow/experiments/search", {"max_results": 100}, workspace).get(
        "experiments", []
    )
    ids = [e["experiment_id"] for e in found]
    body = {"experiment_ids": ids, "filter": f"tags.`hfdist.run_id` = '{name}'"}
    return call("/api/2.0/mlflow/runs/search", body, workspace).get("runs", []) if ids else []


def test_a_user_with_a_password(
    server: MlflowServer,
    call: Callable[..., Any],
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    at = [f"tracking.uri={server.uri}", "tracking.finish_timeout=1"]
    result = api.train(job, at, run_id="user")
    assert result["status"] == "FINISHED"  # the record waits
    assert "does not take the record" in caplog.text
    assert runs(call, "user") == []
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert api.sync(result["run_dir"]) > 0
    (run,) = runs(call, "user")
    assert run["info"]["status"] == "FINISHED"
    metrics = {m["key"]: m["value"] for m in run["data"]["metrics"]}
    assert metrics["final_loss"] == result["final_loss"]
    for path in Path(result["run_dir"]).rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


def test_a_workspace_of_the_job_or_the_environment(
    server: MlflowServer, call: Callable[..., Any], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in ADMIN.items():
        monkeypatch.setenv(key, value)
    for name in ("team-a", "team-b"):
        call("/api/3.0/mlflow/workspaces", {"name": name})
    at = f"tracking.uri={server.uri}"
    result = api.train(job, [at, "tracking.workspace=team-a"], run_id="ours")
    assert "workspace=team-a" in result["tracking_url"]
    assert len(runs(call, "ours", "team-a")) == 1
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-b")
    theirs = api.train(job, [at], run_id="theirs")
    assert "workspace=team-b" in theirs["tracking_url"]
    assert len(runs(call, "theirs", "team-b")) == 1
    # The job's own goes first, and what one run set is not the next one's.
    monkeypatch.delenv("MLFLOW_WORKSPACE")
    resumed = api.resume(result["run_dir"], ["steps=3"])
    (run,) = runs(call, "ours", "team-a")
    assert run["info"]["run_id"] == resumed["mlflow_run_id"]
    for name in ("ours", "theirs"):
        assert runs(call, name) == []


class _Proxy(ThreadingHTTPServer):
    """What stands before a server in a company: no token, no answer."""

    target = ""


class _Handler(BaseHTTPRequestHandler):
    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send_error(401)
            return
        kept = {k: v for k, v in self.headers.items() if k not in ("Host", "Authorization")}
        import base64

        pair = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        kept |= {"Authorization": f"Basic {pair}"}
        assert isinstance(self.server, _Proxy)
        request = urllib.request.Request(
            self.server.target + self.path, body or None, kept, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    def log_message(self, *_: object) -> None:
        pass


def test_a_proxy_that_wants_a_token(
    server: MlflowServer, call: Callable[..., Any], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = _Proxy(("127.0.0.1", 0), _Handler)
    proxy.daemon_threads, proxy.target = True, server.uri
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
        uri = f"http://127.0.0.1:{proxy.server_address[1]}"
        result = api.train(job, [f"tracking.uri={uri}"], run_id="token")
        assert len(runs(call, "token")) == 1
    finally:
        proxy.shutdown()
        proxy.server_close()
    for path in Path(result["run_dir"]).rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
