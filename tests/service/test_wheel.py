"""The wheel, installed where there is nothing of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import hfdist

ROOT = Path(__file__).resolve().parents[2]

WITHOUT = """
import sys
for name in ("ray", "mlflow", "backpack"):
    sys.modules[name] = None  # every import of it fails
import torch
import hfdist
assert hfdist.__file__.startswith(sys.prefix), hfdist.__file__
for name in hfdist.__all__:
    getattr(hfdist, name)
model = torch.nn.Linear(3, 1)
optimizer = hfdist.HessianFree(model.parameters())
inputs = torch.randn(8, 3)
def forward():
    outputs = model(inputs)
    return outputs.square().mean(), outputs
assert optimizer.step(forward) < forward()[0] + 1e-6
result = hfdist.train("job.yaml", ["tracking.enabled=false", "steps=1"])
assert result["status"] == "FINISHED", result
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FORCE_COLOR")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source archive gives."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and sees the packages it depends on, but no source tree."""
    folder = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=folder)
    # A line of a .pth file adds a folder to sys.path, not what the .pth files in that folder name: the
    # editable hfdist of this environment stays out.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def project(python: Path, tmp_path: Path) -> Path:
    """A project that `hfdist init` makes, and with it the templates that the wheel carries."""
    run(python.with_name("hfdist"), "init", tmp_path / "project", cwd=tmp_path)
    return tmp_path / "project"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"hfdist-{hfdist.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "hfdist/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "hfdist",
        f"hfdist-{hfdist.__version__}.dist-info",
    }
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hfdist").rglob("*.py")}
    assert source <= set(names)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(("tracking.log_model=false",), marks=pytest.mark.slow),
        ("launch.workers=2", "tracking.enabled=false"),
    ],
    ids=["recorded", "two workers"],
)
def test_it_trains_in_another_folder(python: Path, project: Path, changes: tuple[str, ...]) -> None:
    program = python.with_name("hfdist")
    done = run(program, "train", "job.yaml", "steps=2", *changes, cwd=project)
    assert "FINISHED after 2 steps" in done.stdout


def test_the_program_says_the_package_s_version(python: Path, tmp_path: Path) -> None:
    said = run(python, "-m", "hfdist", "version", cwd=tmp_path).stdout.splitlines()
    assert said[0] == f"hfdist {hfdist.__version__}"


def test_the_optimizer_and_a_serial_run_need_no_service(python: Path, project: Path) -> None:
    run(python, "-c", WITHOUT, cwd=project)
