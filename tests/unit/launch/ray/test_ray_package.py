"""What of a folder travels with a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hfdist.errors import ConfigError
from hfdist.launch.ray.package import copy_files, files_of


@pytest.fixture(params=["repository", "folder"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    root = tmp_path / "project"
    for name in ("job.yaml", "task.py", "more/data.bin", "big/data.bin", "runs/a/x", "a b/ü.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "task.pyc").touch()
    (root / ".gitignore").write_text("big/\n")
    if request.param == "repository":
        subprocess.run(["git", "init", "-q", root], check=True)
        subprocess.run(["git", "-C", root, "add", "task.py"], check=True)
    return root


def test_what_is_ignored_stays_behind(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder, without=[folder / "runs"])
    assert [str(path) for path in files] == ["a b/ü.txt", "job.yaml", "more/data.bin", "task.py"]
    into = tmp_path / "package"
    assert copy_files(folder, files, into, limit=10_000) == 4000
    assert (into / "more" / "data.bin").read_bytes() == b"x" * 1000


def test_too_much_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"more than the 0\.0 MB .* largest: .*\.gitignore"):
        copy_files(folder, files_of(folder), tmp_path / "package", limit=3999)
    assert not (tmp_path / "package").exists()
