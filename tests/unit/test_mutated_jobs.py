"""Whatever is wrong with a job, a task or a run: one message and a documented exit code, within seconds."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from mutated_jobs import JOB, SECRET, TASK, make

from hfdist.cli import main

EXIT_CODES = (0, 1, 2, 130)
"""What `hfdist --help` documents."""
SECONDS = 120.0
"""What a case may take at most on a busy machine."""


def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str]
) -> tuple[int, str, str]:
    """The program in this process, which has paid for torch already."""
    monkeypatch.setenv("HFDIST_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["hfdist", *words])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    return ended.value.code if isinstance(ended.value.code, int) else 0, out, err


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml

    import hfdist

    folder = tmp_path_factory.mktemp("good")
    (folder / "task.py").write_text(TASK)
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB | {"output": str(folder / "runs")}))
    return Path(hfdist.train(folder / "job.yaml", run_id="good")["run_dir"])


def check(
    number: int,
    folder: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    case = make(number, folder, run)
    monkeypatch.chdir(folder)
    began = time.monotonic()
    code, out, err = call(monkeypatch, capfd, case.words)
    took = time.monotonic() - began
    told = f"case {number}: {case.why}\nexit code {code}, {took:.1f} s\n{out[-500:]}\n{err[-1500:]}"
    assert code in EXIT_CODES, told
    assert "Traceback" not in out + err, told
    assert "a fault of hfdist" not in err, told  # an error that nobody has thought of
    assert took < SECONDS, told
    if code in (1, 2) and "Usage:" not in err:
        errors = re.findall(r"^error: (.*)$", err, re.MULTILINE)
        assert len(errors) == 1, told
        assert len(errors[0].strip()) > 5, told
        assert len(errors[0]) < 2500, told
    if case.has_secret:
        assert SECRET not in out + err, told
        for path in folder.rglob("*"):
            if (
                path.is_file()
                and path.name not in ("job.yaml", "task.py")
                and path.suffix != ".pyc"
            ):
                assert SECRET.encode() not in path.read_bytes(), f"{told}\n{path}"


@pytest.mark.parametrize("number", range(60))
def test_a_mutated_job_is_one_message(
    number: int,
    tmp_path: Path,
    good_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check(number, tmp_path, good_run, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60, 460))
def test_many_mutated_jobs_are_one_message_each(
    number: int,
    tmp_path: Path,
    good_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check(number, tmp_path, good_run, monkeypatch, capfd)
