"""The examples of CONTRIBUTING.md, carried out in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def section(title: str) -> tuple[str, str, str]:
    """(path of the new file, its content, line of the table) of an example."""
    text = TEXT.partition(f"### {title}\n")[2].partition("\n##")[0]
    content, line = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    path = re.findall(r"`(hfdist/[\w/]+\.py)`:$", text, re.MULTILINE)[0]
    return path, content, line.strip()


def add(tree: Path, title: str, table: str, options: str, key: str) -> str:
    """Do what an example says; returns the new name."""
    path, content, line = section(title)
    file = tree / path
    assert not file.exists()
    file.write_text(content)
    name = file.stem
    init = file.with_name("__init__.py")
    text = init.read_text()
    package = file.parent.relative_to(tree).as_posix().replace("/", ".")
    opening = re.search(rf"^{table}\b.*\{{$", text, re.MULTILINE)
    assert opening is not None
    text = text.replace(opening[0], f"{opening[0]}\n    {line}")
    first = re.search(r"^from hfdist", text, re.MULTILINE)
    assert first is not None
    text = f"{text[: first.start()]}from {package} import {name}\n{text[first.start() :]}"
    init.write_text(text)
    where = tree / options
    text, count = re.subn(rf"(\b{key}: Literal\[)", rf'\1"{name}", ', where.read_text())
    assert count == 1
    where.write_text(text)
    return name


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("hfdist", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


TRAIN = """
import sys
import hfdist

job, output, *changes = sys.argv[1:]
fixed = [f"output={output}", "tracking.enabled=false", "device=cpu"]
for change in changes:
    losses = [
        hfdist.train(job, [*fixed, change, f"steps={n}"])["final_loss"] for n in (1, 2)
    ]
    assert losses[1] < losses[0] < 60.0, (change, losses)
"""


def run(tree: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_the_examples_pass_the_conformance_tests_and_train(tree: Path) -> None:
    solvers = "hfdist/optim/solvers/__init__.py"
    solver = add(tree, "Example: a solver", "SOLVERS", solvers, "solver")
    options = "hfdist/optim/options.py"
    metric = add(tree, "Example: a preconditioner", "PRECONDITIONERS", options, "preconditioner")
    tests = (
        "tests/unit/optim/test_solvers.py",
        "tests/unit/curvature/test_preconditioner_table.py",
    )
    said = run(tree, "-m", "pytest", "-q", *tests, "-k", f"{solver} or {metric}")
    assert int(re.findall(r"(\d+) passed", said)[0]) > 15
    job = str(ROOT / "deploy" / "jobs" / "digits.yaml")
    changes = (f"optim.solver={solver}", f"optim.preconditioner={metric}")
    run(tree, "-c", TRAIN, job, str(tree / "runs"), *changes)


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`((?:tests|hfdist|deploy|docs)/[\w/.-]+)`", TEXT)
    new = {section(f"Example: a {what}")[0] for what in ("solver", "preconditioner")}
    old = [path for path in named if path not in new and "NAME" not in path]
    assert [path for path in old if not (ROOT / path).exists()] == []
