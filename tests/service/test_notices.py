"""Notices of real runs, taken by a real server and by real commands."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hfdist
from hfdist.config.notify import NotifyConfig
from hfdist.errors import UserError

JOB = """
name: told
task: own.py:Own
steps: 3
optim: {{cg_max_iter: 2}}
tracking: {{enabled: false}}
output: {folder}/runs
"""
TASK = """
import os, time
from hfdist.tasks.digits import DigitsClassifier

class Own(DigitsClassifier):
    def __init__(self, pause=0.0, marker="", fails=False):
        super().__init__()
        self.pause, self.marker, self.fails, self.calls = pause, marker, fails, 0

    def loss(self, *arguments):
        self.calls += 1
        if self.calls == 6:
            time.sleep(self.pause)
        if self.calls >= 6 and self.fails:
            raise RuntimeError("the disk is on fire")
        return super().loss(*arguments)
"""


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it is told; refuses the first `refuse` requests."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.refuse = 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuse:
            self.server.refuse -= 1
            self.send_error(503)
            return
        self.server.headers.append(self.headers)
        self.server.told.append(json.loads(body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(TASK)
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(folder=tmp_path))
    return path


def test_the_end_is_told_with_the_result(job: Path, server: Server) -> None:
    server.refuse = 1  # and told again
    result = hfdist.train(job, [f"notify.url={server.url}"])
    [notice] = server.told
    assert notice["event"] == "finished"
    assert notice["result"] == result
    assert notice["run_id"] == result["run_id"]
    assert f"{result['run_id']}: FINISHED after 3 steps" in notice["text"]


def test_a_failure_is_told_in_its_own_words(job: Path, server: Server) -> None:
    with pytest.raises((UserError, RuntimeError)):
        hfdist.train(job, [f"notify.url={server.url}", "task_args.fails=true"], run_id="fails")
    [notice] = server.told
    assert notice["event"] == "failed"
    assert notice["status"] == "FAILED"
    assert "the disk is on fire" in notice["text"]
    assert notice["run_dir"] == str(job.parent / "runs" / "fails")


@pytest.mark.parametrize(
    "launch",
    [[], pytest.param(["launch.workers=2"], marks=pytest.mark.slow)],
    ids=["alone", "two workers"],
)
def test_a_stall_is_told_once_and_the_run_goes_on(
    job: Path, server: Server, launch: list[str]
) -> None:
    pause = 5 if launch else 2  # two workers take a while to start
    changes = [f"notify.url={server.url}", f"task_args.pause={2 * pause}", *launch]
    result = hfdist.train(job, [*changes, f"notify.stall_seconds={pause}"])
    assert result["status"] == "FINISHED"
    events = [notice["event"] for notice in server.told]
    assert events[-2:] == ["stalled", "finished"]
    assert f"no step for {pause} s" in server.told[-2]["text"]


def test_a_command_gets_the_notice(job: Path, tmp_path: Path) -> None:
    file = tmp_path / "notice.json"
    result = hfdist.train(
        job, [f'notify.command="cat > {file}; echo $HFDIST_EVENT $HFDIST_RUN_ID >> {file}"']
    )
    notice, variables = file.read_text().split("\n")[0], file.read_text().split("}")[-1]
    assert json.loads(notice[: notice.rindex("}") + 1])["result"] == result
    assert variables.split() == ["finished", result["run_id"]]


def test_a_secret_address_is_written_nowhere(
    job: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = server.url.replace("http://", "http://ann:hunter2@") + "/T0K3N"
    monkeypatch.setenv("HFDIST_NOTIFY_URL", secret)
    result = hfdist.train(job, ["tracking.enabled=true", "tracking.log_model=false"])
    assert [notice["event"] for notice in server.told] == ["finished"]
    assert server.headers[0]["Authorization"] == "Basic YW5uOmh1bnRlcjI="
    files = [path for path in Path(result["run_dir"]).parent.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert b"hunter2" not in path.read_bytes()
        assert b"T0K3N" not in path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        "notify.url=http://127.0.0.1:9/nobody",
        "notify.command=exit 3",
        "notify.command=sleep 900",
        "notify.command=/no/such/program",
    ],
)
def test_a_notice_that_is_not_taken_fails_nothing(
    job: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    result = hfdist.train(job, [change, "notify.timeout_seconds=1"])
    assert result["status"] == "FINISHED"
    assert time.monotonic() - began < 300
    key = change.partition("=")[0]
    assert f"{key} does not take the notice 'finished'" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {"url": "ftp://host"},
        {"url": "host/path"},
        {"url": "http://a:b@host"},
        {"stall_seconds": 0},
        {"stall_seconds": float("nan")},
        {"timeout_seconds": float("inf")},
    ],
)
def test_values_that_do_not_fit_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        NotifyConfig(**values)
