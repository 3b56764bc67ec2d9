"""Figures that tests note beside their verdict, and the table of them that `make gpu-test` ends with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hfdist.devices import device_name, memory_info

_noted: dict[str, dict[str, Any]] = {}


def note(**figures: Any) -> None:
    """Figures of the test that runs now."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    _noted.setdefault(test, {}).update(figures)


def table(reports: Sequence[Any]) -> Iterator[str]:
    """Lines: the machine, then a row for each test with its verdict, seconds and figures.

    Args:
        reports: pytest's.
    """
    yield ""
    yield f"torch {torch.__version__}; {'; '.join(_devices()) or 'no accelerator'}"
    rows = [(_name(r.nodeid), r.outcome, f"{r.duration:.1f} s", _figures(r)) for r in reports]
    rows.sort()
    widths = [max([len(row[k]) for row in rows], default=0) for k in range(3)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()


def _devices() -> Iterator[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    for k in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, k)
        free, total = (x / 2**30 for x in memory_info(device))
        yield f"{device} {device_name(device)}, {free:.1f} of {total:.1f} GiB free"


def _name(test: str) -> str:
    return test.rpartition("/")[2].replace(".py::", ": ").removeprefix("test_").replace("_", " ")


def _figures(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    found = _noted.get(report.nodeid, {})
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in found.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
