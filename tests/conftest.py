"""Makes the helpers beside this file (cases, dense, ranks, ..) importable from every test; orders tests."""

from __future__ import annotations

from pathlib import Path

import figures
import pytest
import torch

HERE = Path(__file__).parent

# Tests share the cores with the processes that some of them start.
torch.set_num_threads(1)

FOLDERS = ("unit", "distributed", "service", "faults", "bench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: what is wrong with the mathematics shows before any process is started."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(HERE).parts[0]
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="end with a table of what was measured")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--figures"):
        reports = [
            r for kind in ("passed", "failed", "skipped") for r in terminalreporter.getreports(kind)
        ]
        for line in figures.table(reports):
            terminalreporter.write_line(line)
