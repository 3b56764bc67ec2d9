"""docker/requirements.py, run as the Dockerfile runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def write(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "docker" / "requirements.py"), *arguments]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=120)


def lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


def test_the_project_s_own_without_extras(folder: Path) -> None:
    assert write(folder).returncode == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lines(folder, "requirements.txt") == project["dependencies"]
    assert (folder / "pins.txt").read_text() == (ROOT / "constraints.txt").read_text()
    assert [line.split("==")[0] for line in lines(folder, "torch.txt")] == ["torch", "torchvision"]


def test_extras_of_the_dockerfile(folder: Path) -> None:
    assert write(folder, "--extras", "s3, server").returncode == 0
    wanted = lines(folder, "requirements.txt")
    for part in ("s3fs", "boto3", "psycopg2-binary", "mlflow[auth]"):
        assert any(line.startswith(part) for line in wanted), part
    assert not any(line.startswith(("pytest", "ruff")) for line in wanted)


def test_another_torch_leaves_other_pins(folder: Path) -> None:
    assert write(folder, "--torch", "9.8.7+cpu", "--torchvision", "").returncode == 0
    before, after = lines(ROOT, "constraints.txt"), lines(folder, "pins.txt")
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["torch==9.8.7+cpu"]
    assert "torch==9.8.7+cpu" in lines(folder, "torch.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--extras", "s3,gpu"), "no extra 'gpu', but s3, gs, server"),
        (
            ("--torchvision", "1.0"),
            "TORCHVISION_VERSION: constraints.txt has no line torchvision==",
        ),
    ],
)
def test_mistakes_are_one_message(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    (folder / "constraints.txt").write_text("torch==2.14.1\n")
    done = write(folder, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "requirements.txt").exists()
