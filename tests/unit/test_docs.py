"""The user's guide builds without a warning, needs no other host, and its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages. `--strict` fails on a dead link, a dead anchor, a docstring that cannot be read."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        text = (site / page.with_suffix(".html").name).read_text()
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", text
        )
        assert not loaded, f"{page.name} loads {loaded}"
        assert 'class="mermaid"' not in text  # the theme would load a script for it


def test_equations_are_mathml(site: Path) -> None:
    text = (site / "design.html").read_text()
    assert text.count("<math ") > 40
    assert "arithmatex" not in text


def test_public_names_and_job_keys_are_in_the_reference(site: Path) -> None:
    text = (site / "reference.html").read_text()
    for name in (
        "HessianFree.step",
        "HFOptions.damping",
        "RunConfig.steps",
        "Task.loss",
        "StepReport.loss",
    ):
        assert f'id="hfdist.{name}"' in text, name
    for name in ("train", "load_config", "ArrayData"):
        assert f'id="hfdist.{name}"' in text, name


def test_the_code_of_a_page_runs_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "own-model.md").read_text()
    task, *rest = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (job,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "task.py").write_text(task)
    (tmp_path / "job.yaml").write_text(job)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "own_model"}
    for block in (task, *rest):
        exec(block, namespace)
    result = namespace["result"]
    assert isinstance(result, dict)
    assert result["status"] == "FINISHED"
    assert result["final_loss"] < 0.1
    assert float(namespace["final_loss"]) < 0.5  # type: ignore[arg-type]


def test_the_equation_of_the_page_on_pdes_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "pdes.md").read_text()
    task, train = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (job,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "cubic.py").write_text(task)
    (tmp_path / "cubic.yaml").write_text(job)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "pdes"}
    exec(train, namespace)
    result = namespace["result"]
    assert isinstance(result, dict)
    assert result["status"] == "FINISHED"
    assert result["eval_relative_error"] < 1e-3
    assert (Path(result["run_dir"]) / "plots" / "solution.png").is_file()


def test_links_between_the_repository_s_files_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy" / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
