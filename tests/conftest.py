"""Makes the helpers beside this file (cases, dense, ranks, ..) importable from every test; orders tests, and
shares them out over processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import figures
import pytest
import torch
from ranks import nothing_drawn

HERE = Path(__file__).parent

# Tests share the cores with the processes that some of them start.
torch.set_num_threads(1)

# Two clusters of one machine disturb each other; one MLflow server is enough.
TOGETHER = ("test_ray_", "test_mlflow")
FOLDERS = ("unit", "distributed", "service", "faults", "bench")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast ones first: what is wrong with the mathematics shows before any process is started.

    Of several processes one begins with Ray's: the longest, and they wait much.
    """
    is_one_of_several = hasattr(config, "workerinput")  # of pytest-xdist

    def place(item: pytest.Item) -> int:
        if is_one_of_several and item.get_closest_marker("ray"):
            return -1
        folder = item.path.relative_to(HERE).parts[0]
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2 --dist loadfile` a file stays in one process, and some files do so together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((name for name in TOGETHER if Path(file).name.startswith(name)), file)

    return Files(config, log)


@pytest.fixture
def pictures() -> None:
    """For a test that looks at the pictures of a run in its own process."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' runs draw none: that takes a second, and the rest of a small run much less."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("hfdist.training.coordinator.draw_plots", nothing_drawn)


def pytest_sessionfinish() -> None:
    """End the processes of ranks and devices: pytest-xdist's own end without what `atexit` was told."""
    for name in ("ranks", "devices"):
        if name in sys.modules:
            sys.modules[name].end_all()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="end with a table of what was measured")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--figures"):
        reports = [
            r for kind in ("passed", "failed", "skipped") for r in terminalreporter.getreports(kind)
        ]
        for line in figures.table(reports):
            terminalreporter.write_line(line)
