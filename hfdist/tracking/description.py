"""What the page of a run says of it: Markdown for MLflow's description."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from hfdist.rundir import files
from hfdist.tracking.links import TRAINING

RUN, EXPERIMENT = "{mlflow_run_id}", "{mlflow_experiment_id}"
"""Stand for identifiers that are not known before the server answers."""
_FILES = (files.JOB, files.METRICS, files.RESULT)


def describe(
    info: Mapping[str, Any],
    rules: Mapping[str, Any],
    steps: int,
    home: str,
    result: Mapping[str, Any] | None = None,
    plots: Sequence[str] = (),
) -> str:
    """A run in a table, its files and plots; of its end, once there is a `result`.

    Args:
        info: `task`, `num_parameters`, `world_size`, `tags`, `dataset`, as displays get it.
        rules: What the job changes of the defaults, by key.
        steps: That the job asks for.
        home: Where a person finds the run.
        result: The content of result.json.
        plots: Names of the files among the run's artifacts.
    """
    workers, dataset = int(info.get("world_size", 1)), info.get("dataset", {})
    rows = {"Status": f"RUNNING, {steps} steps"}  # MLflow folds the description after a few lines
    if result is not None:
        rows["Status"] = f"**{result['status']}** after {result['steps']} of {steps} steps"
        if (loss := result.get("final_loss")) is not None:
            rows["Loss"] = f"{loss:.6g}"
        # None: a number that is not finite, as result.json has it.
        held_out = {k[5:]: v for k, v in result.items() if k.startswith("eval_") and v is not None}
        if held_out:
            rows["Evaluation"] = ", ".join(f"{k} {v:.6g}" for k, v in held_out.items())
        rows["Cost"] = f"{result['wall_seconds']:.1f} s, {result['cg_iterations']} CG iterations"
        if result.get("error"):
            rows["Error"] = _cell(result["error"])[:500]
    rows |= {
        "Task": f"{_code(info.get('task', ''))}, {info.get('num_parameters', 0):,} parameters",
        "Data": _data(dataset),
        "Workers": f"{workers} on {info.get('tags', {}).get('device', 'cpu')}",
    }
    if rules:
        changed = (f"{key}={value}" for key, value in rules.items())
        rows["Job"] = ", ".join(_code(text[:120]) for text in changed)[:2000]
    rows["Folder"] = _code(home)
    files = _FILES if result is not None else _FILES[:1]
    charts = f"[charts](#/experiments/{EXPERIMENT}/runs/{RUN}/model-metrics?{TRAINING})"
    rows["Look at"] = ", ".join([charts, *(f"[{name}]({_address(name)})" for name in files)])
    lines = [
        "| Hessian-free run | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items() if v),
    ]
    if result is not None and result["status"] != "FINISHED":
        lines += ["", f"Go on with it: {_code(f'hfdist resume {home}')}"]
    for name in plots:
        lines += ["", f"![{name}]({_address(name)})"]
    return "\n".join(lines)


def _data(dataset: Mapping[str, Any]) -> str:
    counts = (
        (dataset.get("num_examples"), "training"),
        (dataset.get("num_eval_examples"), "evaluation"),
    )
    return ", ".join(f"{n:,} {what} examples" for n, what in counts if n)


def _address(artifact: str) -> str:
    """Relative to MLflow's page, wherever that is served."""
    return f"get-artifact?path={urllib.parse.quote(artifact, safe='')}&run_uuid={RUN}"


def _code(text: object) -> str:
    return f"`{_cell(text).replace('`', '')}`" if text else ""


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "/").split())
