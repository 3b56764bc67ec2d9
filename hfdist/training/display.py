"""What a person (or a program) sees of a run while it goes on."""

from __future__ import annotations

import atexit
import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from hfdist.rundir.locations import is_address, split

if TYPE_CHECKING:
    from rich.console import Console

    from hfdist.optim.report import StepReport

DISPLAYS = ("auto", "rich", "plain", "json", "quiet")


class Display(Protocol):
    """Called by rank 0."""

    def start(
        self, run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]
    ) -> None:
        """The run begins, or goes on, with `first_step`."""
        ...

    def cg_iteration(self, step: int, iteration: int, max_iter: int) -> None:
        """An iteration of a step's solve is done."""
        ...

    def step(self, step: int, report: StepReport, extra: Mapping[str, float]) -> None:
        """A step is done."""
        ...

    def message(self, text: str) -> None:
        """Something that is worth a line."""
        ...

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run has ended; `result` is what result.json holds."""
        ...


class QuietDisplay:
    """Shows nothing."""

    def start(
        self, run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]
    ) -> None:
        pass

    def cg_iteration(self, step: int, iteration: int, max_iter: int) -> None:
        pass

    def step(self, step: int, report: StepReport, extra: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def finish(self, result: Mapping[str, Any]) -> None:
        pass


class PlainDisplay(QuietDisplay):
    """A line a step."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout

    def start(
        self, run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]
    ) -> None:
        self._total = total_steps
        self._say(header(run_id, first_step, total_steps, info))

    def step(self, step: int, report: StepReport, extra: Mapping[str, float]) -> None:
        # The number under which metrics.jsonl and MLflow have it, then how many are done.
        width = len(str(self._total))
        self._say(f"step {step:>{width}} ({step + 1}/{self._total})  {line(report, extra)}")

    def message(self, text: str) -> None:
        self._say(text)

    def finish(self, result: Mapping[str, Any]) -> None:
        self._say(summary(result))

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class JsonDisplay(QuietDisplay):
    """A JSON object a line, with the key `event`: start, step, message, finish. What is not a finite
    number is left out of steps and null elsewhere."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout

    def start(
        self, run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]
    ) -> None:
        self._say("start", run_id=run_id, first_step=first_step, total_steps=total_steps, info=info)

    def step(self, step: int, report: StepReport, extra: Mapping[str, float]) -> None:
        numbers, evaluation = _split(extra)
        held_out = {f"eval/{name}": value for name, value in evaluation.items()}
        # The same names as in metrics.jsonl.
        values = {"step": step, **report.metrics(), **numbers, **held_out}
        self._say("step", **values, stop=str(report.stop))

    def message(self, text: str) -> None:
        self._say("message", text=text)

    def finish(self, result: Mapping[str, Any]) -> None:
        self._say("finish", **result)

    def _say(self, event: str, **values: Any) -> None:
        print(json.dumps(_finite({"event": event, **values})), file=self._out, flush=True)


class RichDisplay(QuietDisplay):
    """Progress of the steps, and beneath it of the present step's conjugate gradients."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.table import Column

        self._console = console or Console(highlight=False)
        note = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", table_column=note),
            console=self._console,
            refresh_per_second=8,
            expand=True,
        )

    def start(
        self, run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]
    ) -> None:
        self._console.print(header(run_id, first_step, total_steps, info), markup=False)
        self._steps = self._progress.add_task(
            "steps", total=total_steps, completed=first_step, note=""
        )
        self._cg = self._progress.add_task("   cg", total=None, note="")
        self._progress.start()
        atexit.register(self._progress.stop)  # however the run ends, the cursor comes back

    def cg_iteration(self, step: int, iteration: int, max_iter: int) -> None:
        if iteration <= 1:
            self._progress.reset(self._cg, total=max_iter)
        self._progress.update(self._cg, completed=iteration, total=max_iter)

    def step(self, step: int, report: StepReport, extra: Mapping[str, float]) -> None:
        self._progress.update(
            self._steps, completed=step + 1, note=line(report, extra, is_short=True)
        )
        accepted = f"alpha {report.alpha:.3g}" if report.accepted else "rejected"
        note = f"damping {report.damping:.3g}  {accepted}  stop: {report.stop}"
        self._progress.update(self._cg, completed=report.cg_iterations, note=note)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def finish(self, result: Mapping[str, Any]) -> None:
        if hasattr(self, "_cg"):
            self._progress.update(self._cg, visible=False)
        self._progress.stop()
        atexit.unregister(self._progress.stop)
        # Not wrapped: paths and commands are to be copied.
        self._console.print(summary(result), markup=False, soft_wrap=True)


def make_display(name: str) -> Display:
    """A display by name: rich, plain, json, quiet, or auto (rich on a terminal, plain elsewhere).

    Raises:
        ValueError: The name is not known.
    """
    if name == "auto":
        name = "rich" if sys.stdout.isatty() else "plain"
    if name not in DISPLAYS:
        raise ValueError(f"display is {name!r}: it must be one of {', '.join(DISPLAYS)}")
    kinds: dict[str, type[QuietDisplay]] = {
        "rich": RichDisplay,
        "plain": PlainDisplay,
        "json": JsonDisplay,
        "quiet": QuietDisplay,
    }
    return kinds[name]()


# -- words -------------------------------------------------------------------------------------------


def header(run_id: str, first_step: int, total_steps: int, info: Mapping[str, Any]) -> str:
    """What is trained, in a line."""
    about = [f"run {run_id}", str(info.get("task", ""))]
    if "num_parameters" in info:
        about.append(f"{info['num_parameters']:,} parameters")
    if info.get("world_size", 1) > 1:
        about.append(f"{info['world_size']} workers")
    if first_step:
        about.append(f"going on at step {first_step} of {total_steps}")
    return ", ".join(part for part in about if part)


def line(report: StepReport, extra: Mapping[str, float], is_short: bool = False) -> str:
    """A step in a line."""
    _, evaluation = _split(extra)
    parts = [f"loss {report.final_loss:.6g}"]
    if evaluation:
        parts.append("eval " + " ".join(f"{k} {v:.4g}" for k, v in evaluation.items()))
    if is_short:
        return "  ".join(parts)
    parts += [
        f"damping {report.damping:.3g}",
        f"cg {report.cg_iterations} ({report.stop})",
        f"alpha {report.alpha:.3g}" if report.accepted else "rejected",
        f"{report.seconds.get('total', 0.0):.2f}s",
    ]
    return "  ".join(parts)


def summary(result: Mapping[str, Any]) -> str:
    """How a run ended, and where to look."""
    loss = result.get("final_loss")
    lines = [
        f"{result['status']} after {result['steps']} {'step' if result['steps'] == 1 else 'steps'}, "
        f"{result['wall_seconds']:.1f} s, {result['cg_iterations']} CG iterations"
        + (f", loss {loss:.6g}" if loss is not None else "")
    ]
    evaluation = {k[5:]: v for k, v in result.items() if k.startswith("eval_") and v is not None}
    if evaluation:
        lines.append("evaluation: " + ", ".join(f"{k} {v:.6g}" for k, v in evaluation.items()))
    run_dir = result["run_dir"]
    lines.append(f"results:    {run_dir}  (result.json, metrics.jsonl, plots/, checkpoints/)")
    if result.get("tracking_url"):
        lines.append(f"look at it: {result['tracking_url']}")
    elif result.get("mlflow_run_id"):
        folder = split(run_dir)[1] if is_address(run_dir) else Path(run_dir)
        output = str(folder.parent)
        lines.append(f"look at it: hfdist ui --output {shlex.quote(output)}")
    if result["status"] != "FINISHED":
        lines.append(f"go on:      hfdist resume {shlex.quote(run_dir)}")
    return "\n".join(lines)


_NUMBERS = ("data_passes", "examples_per_second", "peak_memory_bytes")


def _split(extra: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What is told of a step besides its report: numbers of the machine, and held-out values."""
    numbers = {k: v for k, v in extra.items() if k in _NUMBERS}
    return numbers, {k: v for k, v in extra.items() if k not in _NUMBERS}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
