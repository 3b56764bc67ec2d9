"""Makes the helpers beside this file (cases, dense, ranks, ..) importable from every test; orders tests and
says which may run at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

# Tests share the cores with the processes that some of them start.
torch.set_num_threads(1)

FOLDERS = ("unit", "distributed", "service", "faults", "bench")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: what is wrong with the mathematics shows before any process is started.

    With `pytest -n 2 --dist loadgroup`, tests that start processes stay together by file (they share
    servers), and no two clusters of Ray are there at a time.
    """

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(HERE).parts[0]
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif place(item) > FOLDERS.index("unit"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
