"""sweep: a grid of runs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hfdist.cli.options import JobFile, Json


def sweep(
    job: JobFile,
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE",
            help="Values to try, like optim.damping=1e-2,1e-1,1; several keys make a grid. A single "
            "value is a change of all runs.",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster; by default one of this machine's own.", metavar="HOST:6379"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a job with every combination of some values, through Ray Tune; ends with a table.

    The runs are nested in one MLflow run, and lie in OUTPUT as others do. Ctrl-C stops them after
    a checkpoint.
    """
    from pathlib import Path

    from hfdist import api
    from hfdist.config.job import load_config
    from hfdist.errors import ConfigError
    from hfdist.launch.ray import tune as ray_tune
    from hfdist.rundir.locations import is_address

    fixed, values = ray_tune.split_grid(grid)
    if not values:
        raise ConfigError(
            "there is nothing to vary: write several values, like optim.damping=0.1,1"
        )
    if address is not None:
        fixed.append(f"launch.address={address}")
    base = load_config(job, fixed)
    if is_address(base.output):
        raise ConfigError(f"output is {base.output}: a sweep wants a folder that all nodes share")
    output = str(Path(base.output).expanduser().resolve())
    fixed.append(f"output={output}")
    sweep_id = api.new_run_id(f"{base.name}-sweep")
    trials = [
        ray_tune.Trial(
            run_id=ray_tune.trial_id(sweep_id, point, number),
            values=point,
            # All of the grid is checked before any of it runs.
            config=load_config(job, [*fixed, *(f"{k}={v}" for k, v in point.items())]),
        )
        for number, point in enumerate(ray_tune.points(values))
    ]
    tell = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    if not as_json:
        print(f"sweep {sweep_id}: {len(trials)} runs", flush=True)
    rows = ray_tune.run(sweep_id, load_config(job, fixed), trials, tell)
    if as_json:
        import json

        print(json.dumps(rows))
    else:
        _print_table(rows, list(values))
        print(f"look at it: hfdist ui --output {output}")
    if any(row["status"] in ("KILLED", "PENDING") for row in rows):
        sys.exit(130)
    if all(row["status"] == "FAILED" for row in rows):
        sys.exit(1)


def _print_table(rows: list[dict[str, Any]], keys: list[str]) -> None:
    from hfdist.cli.tables import print_table

    measures = [k for k in dict.fromkeys(k for row in rows for k in row) if k.startswith("eval_")]
    best = min(
        (row for row in rows if row["status"] == "FINISHED" and row["final_loss"] is not None),
        key=lambda row: row.get("eval_loss", row["final_loss"]),
        default=None,
    )
    shown = [
        {
            **row["values"],
            "status": row["status"],
            "loss": row.get("final_loss"),
            **{f"eval {name.removeprefix('eval_')}": row.get(name) for name in measures},
            "cg": row.get("cg_iterations"),
            "s": row.get("wall_seconds"),
        }
        for row in rows
    ]
    print_table(shown, best=shown[rows.index(best)] if best is not None else None)
    if best is not None:
        print(f"best: {best['run_dir']}")
