"""The program `hfdist`, as a person or a script starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hfdist
from hfdist.cli import main

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    *("bench", "cluster", "config", "evaluate", "init", "jobs", "resume"),
    *("schema", "submit", "sweep", "sync", "train", "ui", "version"),
)

TASK = """
import time
import torch
from torch import nn
from hfdist import Task
from hfdist.tasks.array_data import ArrayData

class Own(Task):
    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.x = torch.linspace(-1, 1, 24).reshape(-1, 1)
    def model(self):
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    def loss(self, outputs, batch):
        time.sleep(self.seconds)
        return nn.functional.mse_loss(outputs, batch[1])
    def train_data(self):
        return ArrayData(self.x, self.x.sin())
    def eval_data(self):
        return ArrayData(self.x[:8], self.x[:8].sin())
"""

JOB = """
name: own job
task: task.py:Own
steps: 3
checkpoint:
  every: 1
tracking:
  enabled: false
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HFDIST_DEBUG", "FORCE_COLOR")}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | changes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call of the program gave."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs the program in this process, which has paid for torch already."""
    for name in ("HFDIST_DEBUG", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # what the program sets is undone afterwards
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hfdist", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Answer(returncode=int(ended.value.code or 0), stdout=out, stderr=err)

    return call


def run(*arguments: Any, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hfdist", *map(str, arguments)],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


# -- help


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - begin)
        assert result.returncode == 0
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", result.stdout), verb
    assert min(seconds) < 1.5  # about 0.3 on an idle machine; this one may be busy
    code = (
        "import sys, hfdist.cli;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pydantic', 'omegaconf', 'numpy')"
        " if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "code", "never"),
    [
        (["jobs", "list", "--address", "http://127.0.0.1:1"], 2, "torch"),
        # torch's compiler takes seconds to import, sympy alone one or two: no product by replay needs it.
        (
            ["train", ROOT / "deploy/jobs/digits.yaml", "steps=2", "tracking.enabled=false"],
            0,
            "sympy",
        ),
        # ... nor rows of a Jacobian.
        (
            [
                "train",
                ROOT / "deploy/jobs/heat1d.yaml",
                "steps=1",
                "tracking.enabled=false",
                "task_args.interior=40",
                "task_args.conditions=8",
                "evaluate.every=0",
            ],
            0,
            "sympy",
        ),
    ],
)
def test_what_a_verb_does_not_need_is_not_loaded(
    words: list[Any], code: int, never: str, tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "from hfdist.cli import main\n"
        "try: main()\n"
        f"finally: print({never!r} in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    command += [f"output={tmp_path}"] if words[0] == "train" else []
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_of_every_verb_fits_the_terminal(
    call: Any, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for verb in ("train", "resume", "evaluate", "config", "schema", "init", "ui", "sync"):
        result = call(verb, "-h")
        assert result.returncode == 0
        assert f"hfdist {verb} [OPTIONS]" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= int(columns)


def test_version_is_the_package_s(call: Any) -> None:
    first = call("version").stdout.splitlines()[0]
    assert first == call("--version").stdout.splitlines()[0] == f"hfdist {hfdist.__version__}"


def test_public_names_are_loaded_when_used() -> None:
    for name in hfdist.__all__:
        assert getattr(hfdist, name) is not None
    assert set(hfdist.__all__) <= set(dir(hfdist))
    with pytest.raises(AttributeError, match="nothing"):
        hfdist.nothing  # noqa: B018
    assert (Path(hfdist.__file__).parent / "py.typed").exists()


# -- jobs


def test_config_prints_the_resolved_job(job: Path, call: Any) -> None:
    result = call("config", job, "optim.preset=seed", "steps=7", "task_args.token=hunter2")
    assert result.returncode == 0
    assert "hunter2" not in result.stdout
    (job.parent / "resolved.yaml").write_text(result.stdout)
    again = call("config", job.parent / "resolved.yaml", "task_args.token=hunter2")
    assert again.stdout == result.stdout
    for line in ("steps: 7", "cg_stop: relative_progress", f"task: {job.parent}/task.py:Own"):
        assert line in result.stdout


def test_schema_is_json(call: Any) -> None:
    assert "optim" in json.loads(call("schema").stdout)["properties"]


def test_train_resume_and_evaluate(job: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job.parent
    result = run("train", "job.yaml", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "step", "step", "step", "finish"]
    run_id = events[-1]["run_id"]
    assert re.fullmatch(r"own-job-\d{8}-\d{6}-[0-9a-f]{4}", run_id)
    run_dir = folder / "runs" / run_id
    for name in ("config.yaml", "metrics.jsonl", "checkpoints", "plots", "result.json"):
        assert (run_dir / name).exists(), name

    # From elsewhere, and plain because the output is no terminal.
    monkeypatch.chdir("/")
    resumed = call("resume", run_dir, "steps=5")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on at step 3 of 5" in resumed.stdout
    assert [line.split("  ")[0] for line in resumed.stdout.splitlines()[1:3]] == [
        "step 3 (4/5)",
        "step 4 (5/5)",
    ]
    assert str(run_dir) in resumed.stdout
    assert "steps: 5" in (run_dir / "config.yaml").read_text()

    newest = json.loads(call("evaluate", run_dir, "--json").stdout)
    assert newest["step"] == 5
    older = call("evaluate", run_dir, "--checkpoint", "3")
    assert "step: 3" in older.stdout
    best = json.loads(call("evaluate", run_dir, "--checkpoint", "best", "--json").stdout)
    assert best["loss"] <= newest["loss"]
    missing = call("evaluate", run_dir, "--checkpoint", "77")
    assert missing.returncode == 2
    assert "77" in _only_message(missing)


def test_ctrl_c_leaves_a_checkpoint_and_exit_code_130(job: Path, call: Any) -> None:
    command = [sys.executable, "-m", "hfdist", "train", str(job), "--run-id", "stopped", "--plain"]
    changes = ["steps=1000", "task_args.seconds=0.05", f"output={job.parent}/runs"]
    process = subprocess.Popen(
        [*command, *changes], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    run_dir = job.parent / "runs" / "stopped"
    assert process.returncode == 130
    assert "KILLED after" in output
    assert f"hfdist resume {run_dir}" in output
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "KILLED"
    done = result["steps"]
    resumed = call("resume", run_dir, f"steps={done + 1}", "task_args.seconds=0", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == ""
    assert json.loads((run_dir / "result.json").read_text())["steps"] == done + 1


def test_changes_that_do_not_fit_leave_a_run_s_job_as_it_was(job: Path, call: Any) -> None:
    out = f"output={job.parent}/runs"
    assert call("train", job, "--run-id", "one", "steps=1", out, "--quiet").returncode == 0
    path = job.parent / "runs" / "one" / "config.yaml"
    before = path.read_text()
    for change in ("batches.gradient=9999", "dtype=float64"):
        refused = call("resume", path.parent, "steps=2", change)
        assert refused.returncode == 2
        assert len(_only_message(refused)) > 20
        assert path.read_text() == before


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no.yaml"], ["no.yaml", "does not exist"]),
        (["train", "."], ["folder"]),
        (["train", "broken.yaml"], ["broken.yaml", "line 2"]),
        (["train", "job.yaml", "stepz=1"], ["'stepz'", "'steps'"]),
        (["train", "job.yaml", "steps=few"], ["steps is 'few'", "whole number"]),
        (["train", "job.yaml", "steps"], ["key=value"]),
        (["train", "job.yaml", "task=gone.py:Own"], ["gone.py", "does not exist"]),
        (["train", "job.yaml", "task=task.py:Gone"], ["Gone", "Own"]),
        (["train", "job.yaml", "output=task.py/runs"], ["output", "cannot be written"]),
        (["train", "job.yaml", "output=s3://bucket"], ["s3://bucket", "credentials"]),
        (["train", "job.yaml", "--run-id", "a/b"], ["a/b"]),
        (["train", "job.yaml", "--quiet", "--json"], ["--quiet, --json"]),
        (["config", "job.yaml", "optim.dampng=1"], ["'optim.damping'"]),
        (["resume", "."], ["no run's folder"]),
        (["evaluate", "."], ["no run's folder"]),
        (["evaluate", ".", "--checkpoint", "newish"], ["newish", "best"]),
        (["sync", "."], ["nothing to deliver"]),
        (["ui", "--output", "nowhere"], ["nowhere"]),
        (["init", "."], ["not empty"]),
        (["init", "job.yaml"], ["job.yaml"]),
    ],
    ids=lambda value: " ".join(value) if value[0].isalpha() and len(value) > 1 else None,
)
def test_bad_input_is_one_message_and_exit_code_2(
    job: Path,
    call: Any,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    (job.parent / "broken.yaml").write_text("task: [1\nname: x\n")
    before = sorted(job.parent.rglob("*"))
    monkeypatch.chdir(job.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = call(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    message = _only_message(result)
    for word in words:
        assert word in message
    made = {p.name for p in set(job.parent.rglob("*")) - set(before)}
    assert not {name for name in made if "pycache" not in name and not name.endswith(".pyc")}


def test_the_process_ends_with_that_code(job: Path) -> None:
    result = run("train", job, "stepz=1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_traceback_is_for_those_who_ask(
    job: Path, call: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        monkeypatch.setenv("HFDIST_DEBUG", "1")
    options = ["--debug"] if how == "option" else []
    result = call(*options, "config", job, "stepz=1")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def _only_message(result: Answer) -> str:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# -- a project of one's own


def test_init_makes_a_project_that_trains_and_tests_itself(tmp_path: Path, call: Any) -> None:
    made = call("init", tmp_path / "my project")
    assert made.returncode == 0
    assert "hfdist train job.yaml" in made.stdout
    folder = tmp_path / "my project"
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "job.yaml",
        "schema.json",  # which the job file names
        "task.py",
        "test_task.py",
    }
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env=environment(PYTHONPATH=str(Path(hfdist.__file__).parents[1])),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert tested.returncode == 0, tested.stdout
    assert "1 passed" in tested.stdout


# -- what people read


def commands(app: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    import typer

    found = [above]
    command = typer.main.get_command(app) if not above else app
    for name, sub in getattr(command, "commands", {}).items():
        found += commands(sub, (*above, name))
    return found


def test_no_help_shows_a_type_beside_a_flag(call: Any) -> None:
    from hfdist.cli.app import app

    for words in commands(app):
        shown = call(*words, "--help").stdout
        assert "<bool>" not in shown, words
        assert "--help" in shown


def test_the_help_says_what_exit_codes_mean(call: Any) -> None:
    shown = " ".join(call("--help").stdout.split())
    for words in ("0 done", "1 the run failed", "2 a mistake", "130 stopped"):
        assert words in shown


ROWS = [
    {
        "workload": "autoencoder-of-digits",
        **{f"figure {k}": 0.0531234567 + k for k in range(9)},
        "n": 7,
    }
]


def test_tables_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    from hfdist.cli.tables import print_table

    print_table(ROWS, title="Speed")
    shown = capsys.readouterr().out
    assert "autoencoder-of-digits" in shown
    for k in range(9):
        assert f"figure {k}" in shown
        assert f"{0.0531234567 + k:.4g}" in shown
    assert "…" not in shown


@pytest.mark.parametrize("width", [20, 40, 80, 100, 300])
def test_a_narrow_terminal_has_fewer_columns_and_no_parts_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    from hfdist.cli.tables import print_table

    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(ROWS, dispensable=("figure 0",))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    table = shown.partition("not shown")[0]
    assert "…" not in table
    assert "autoencoder-of-digits" in "".join(table.split()) or width < 30
    if width > 30:
        assert all(len(line) <= width for line in table.splitlines())
    if width < 300:
        assert "not shown: figure 0" in shown.replace("\n", " ")
    else:
        assert "not shown" not in shown


# -- whose code is run


def test_code_of_somebody_else_is_run_on_request_only(
    job: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = call(
        "train", job, "--run-id", "theirs", "steps=1", f"output={job.parent}/runs", "--quiet"
    )
    assert trained.returncode == 0, trained.stderr
    run_dir = job.parent / "runs" / "theirs"
    own = os.getuid()
    if own == 0:
        os.chown(job.parent / "task.py", 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
    for verb in (["resume", run_dir, "steps=2"], ["evaluate", run_dir]):
        refused = call(*verb)
        assert refused.returncode == 2
        assert "--trust" in _only_message(refused)
        assert "task.py" in refused.stderr or "config.yaml" in refused.stderr
    assert call("evaluate", run_dir, "--trust").returncode == 0
    trusted = call("resume", run_dir, "steps=2", "--trust", "--quiet")
    assert trusted.returncode == 0, trusted.stderr


def test_an_error_that_nobody_thought_of_is_one_message_too(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfdist.config import job as config

    def broken() -> None:
        raise RuntimeError("first line\nsecond line at http://me:hidden@host")

    monkeypatch.setattr(config, "schema", broken)
    answer = call("schema")
    assert answer.returncode == 1
    assert "unexpected RuntimeError: first line" in _only_message(answer)
    answer = call("--debug", "schema")
    assert "Traceback" in answer.stderr
    assert "hidden" not in answer.stderr
