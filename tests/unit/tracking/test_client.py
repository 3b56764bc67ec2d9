"""The embedded store: made whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfdist.tracking.client import connect

CONNECT = "import sys; from hfdist.tracking.client import connect; connect(sys.argv[1])"


@pytest.mark.parametrize("size", [1, pytest.param(100_000, marks=pytest.mark.slow), 300_000])
def test_a_kill_while_the_store_is_made_leaves_none(tmp_path: Path, size: int) -> None:
    """Killed when so many bytes are written: the next run makes the store."""
    path = tmp_path / "mlflow.db"
    # Nothing is kept of earlier stores: MLflow itself makes this one.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", CONNECT, f"sqlite:///{path}"], env=environment
    )
    deadline = time.monotonic() + 400
    while sum(f.stat().st_size for f in tmp_path.rglob("mlflow.db")) < size:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not path.exists()
    client = connect(f"sqlite:///{path}")
    run = client.create_run(client.create_experiment("after"))
    assert connect(f"sqlite:///{path}").get_run(run.info.run_id)


def test_the_first_two_of_a_store_share_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    both = [subprocess.Popen([sys.executable, "-c", CONNECT, uri]) for _ in range(2)]
    assert [process.wait(100) for process in both] == [0, 0]
    assert [e.name for e in connect(uri).search_experiments()] == ["Default"]
    assert [f.name for f in tmp_path.iterdir()] == ["mlflow.db"]
