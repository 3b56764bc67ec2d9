"""Of two groups of workers with one run, the later one writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfdist.checkpoint.lease import Lease
from hfdist.errors import StorageError, SupersededError


@pytest.mark.parametrize("place", ["folder", "address"])
def test_the_later_group_writes(tmp_path: Path, place: str) -> None:
    output = str(tmp_path) if place == "folder" else f"memory://{tmp_path.name}"
    first, second = Lease(output, "run"), Lease(output, "run")
    first.check()  # nobody has taken it
    first.take()
    first.check()
    second.take()
    second.check()
    with pytest.raises(SupersededError, match="run run goes on in another group"):
        first.check()
    Lease(output, "other").take()
    second.check()


def test_a_lease_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(StorageError, match="cannot write the lease of run run"):
        Lease(str(tmp_path), "run").take()
