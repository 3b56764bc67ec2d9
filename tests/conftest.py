"""Makes the helpers beside this file (cases, dense, ranks, ..) importable from every test; orders tests."""

from __future__ import annotations

from pathlib import Path

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
