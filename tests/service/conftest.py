"""One MLflow server for the files of this folder: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server import MlflowServer


@pytest.fixture(scope="session")
def _session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def server(_session_server: MlflowServer) -> MlflowServer:
    """It answers, whatever the file before has done to it; tests have experiments and runs of their own."""
    _session_server.revive()
    return _session_server
