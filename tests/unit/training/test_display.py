"""What people and programs see of a run."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from hfdist.optim.report import StepReport, Stop
from hfdist.training.display import (
    JsonDisplay,
    PlainDisplay,
    QuietDisplay,
    RichDisplay,
    make_display,
    summary,
)

INFO = {"task": "Digits", "num_parameters": 12345, "world_size": 2, "tags": {}}
EXTRA = {"loss": 0.75, "accuracy": 0.5, "data_passes": 1.0, "examples_per_second": 7.0}
RESULT: dict[str, Any] = {
    "run_id": "digits-1",
    "status": "FINISHED",
    "steps": 20,
    "final_loss": 0.25,
    "cg_iterations": 99,
    "wall_seconds": 3.21,
    "run_dir": "/data/my runs/digits-1",
    "eval_accuracy": 0.9,
    "mlflow_run_id": "abc",
    "tracking_url": None,
}


def report(**changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "step": 2,
        "loss": 0.5,
        "final_loss": 0.25,
        "accepted": True,
        "alpha": 0.8,
        "damping": 0.1,
        "next_damping": 0.1,
        "reduction_ratio": math.nan,
        "reduction_ratio_undamped": math.nan,
        "reduction_ratio_damped": 1.0,
        "cg_iterations": 5,
        "chosen_iterate": 4,
        "stop": Stop.PROGRESS,
        "residual": 0.1,
        "grad_norm": 1.0,
        "update_norm": 1.0,
        "directional_derivative": -1.0,
        "solver_bytes": 8,
        "quadratic": (0.0, -1.0),
        "seconds": {"total": 0.5},
        "num_products": 6,
        "num_loss_evaluations": 3,
        "communication": {},
    }
    fields = StepReport.__dataclass_fields__
    return StepReport(**{k: v for k, v in (values | changes).items() if k in fields})


def show(display: Any, result: dict[str, Any] = RESULT) -> None:
    """A run's last step."""
    display.start("digits-1", 2, 20, INFO)
    for i in range(1, 6):
        display.cg_iteration(2, i, 250)
    display.step(2, report(), EXTRA)
    display.message("a word")
    display.finish(result)


def test_plain_is_a_line_a_step() -> None:
    out = io.StringIO()
    show(PlainDisplay(out))
    first, step, message, *end = out.getvalue().splitlines()
    for word in ("digits-1", "Digits", "12,345 parameters", "2 workers", "step 2 of 20"):
        assert word in first
    for word in ("3/20", "loss 0.25", "accuracy 0.5", "loss 0.75", "cg 5", "progress", "alpha 0.8"):
        assert word in step
    assert message == "a word"
    assert "\n".join(end) == summary(RESULT)
    assert "\x1b" not in out.getvalue()


def test_a_rejected_step_says_so() -> None:
    out = io.StringIO()
    display = PlainDisplay(out)
    display.start("r", 0, 20, INFO)
    display.step(2, report(accepted=False, alpha=0.0), {})
    assert "rejected" in out.getvalue().splitlines()[-1]


def test_json_is_one_strict_object_an_event() -> None:
    out = io.StringIO()
    show(JsonDisplay(out), RESULT | {"final_loss": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    events = [json.loads(line, parse_constant=refuse) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "step", "message", "finish"]
    start, step, _, finish = events
    assert start["info"]["num_parameters"] == 12345
    # The training loss and that of held-out data are told apart.
    assert (step["step"], step["loss"], step["eval/loss"]) == (2, 0.5, 0.75)
    assert step["eval/accuracy"] == 0.5
    assert step["data_passes"] == 1.0
    assert step["stop"] == "progress"
    assert "reduction_ratio" not in step
    assert finish["final_loss"] is None
    assert finish["run_dir"] == RESULT["run_dir"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show(QuietDisplay())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_rich_shows_both_bars_on_one_line_each(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, highlight=False)
    display = RichDisplay(console)
    display.start("digits-1", 0, 20, INFO)
    display.cg_iteration(2, 7, 250)
    display._progress.refresh()
    during = _text(out)
    assert re.search(r"steps .* 0/20 ", during)
    assert re.search(r"cg .* 7/250 ", during)
    display.step(2, report(), EXTRA)
    display._progress.refresh()
    lines = [line for line in _text(out).splitlines() if "3/20" in line]
    assert "loss 0.25" in lines[-1]
    assert len(lines[-1].rstrip()) <= width
    display.finish(RESULT)
    assert summary(RESULT) in _text(out)  # paths are not broken over lines
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # cursor is back


def test_text_in_brackets_is_shown_as_it_is() -> None:
    out = io.StringIO()
    display = RichDisplay(Console(file=out, force_terminal=True, width=80, highlight=False))
    display.message("shape [2, 3] of [bold]x[/bold]")
    assert "shape [2, 3] of [bold]x[/bold]" in out.getvalue()


def test_the_summary_says_where_to_look() -> None:
    text = summary(RESULT)
    for words in (
        "FINISHED after 20 steps",
        "loss 0.25",
        "99 CG iterations",
        "accuracy 0.9",
        "/data/my runs/digits-1",
        "hfdist ui --output '/data/my runs'",
    ):
        assert words in text
    assert "resume" not in text
    on_server = summary(RESULT | {"tracking_url": "http://host/#/run"})
    assert "http://host/#/run" in on_server
    assert "hfdist ui" not in on_server
    untracked = summary(RESULT | {"mlflow_run_id": None})
    assert "look at it" not in untracked


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_the_summary_of_an_unfinished_run_says_how_to_go_on(status: str) -> None:
    text = summary(RESULT | {"status": status, "final_loss": None, "steps": 1})
    assert f"{status} after 1 step," in text
    assert "hfdist resume '/data/my runs/digits-1'" in text


def test_displays_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_display("auto")) is PlainDisplay  # the tests' stdout is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert type(make_display("auto")) is RichDisplay
    assert type(make_display("plain")) is PlainDisplay
    assert type(make_display("json")) is JsonDisplay
    assert type(make_display("quiet")) is QuietDisplay
    with pytest.raises(ValueError, match="loud"):
        make_display("loud")


def _text(out: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
