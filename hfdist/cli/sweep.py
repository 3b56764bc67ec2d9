"""sweep: runs of a job with several values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdist.cli.options import Json

if TYPE_CHECKING:
    from hfdist.launch.ray.tune import Plan


def sweep(
    job: Annotated[
        Path, typer.Argument(metavar="JOB.yaml", help="The job; with --resume a sweep's folder.")
    ],
    grid: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE,VALUE",
            help="Values to try, like optim.damping=1e-2,1e-1,1; several keys make a grid. A single "
            "value is a change of all runs. With --samples also uniform(A,B), loguniform(A,B), randint(A,B).",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Try so many random points instead of the grid.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random points.", min=0)] = None,
    halving: Annotated[
        int | None,
        typer.Option(
            help="Compare runs after so many steps, ETA times as many, ..., and stop all but the best.",
            min=1,
            metavar="STEPS",
        ),
    ] = None,
    eta: Annotated[
        int | None,
        typer.Option(help="With --halving: one in ETA goes on; by default 3.", min=2),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="With --halving: what runs are compared by, of metrics.jsonl; by default the held-out loss."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a sweep that was stopped, or killed.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster; by default one of this machine's own.", metavar="HOST:6379"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a job with combinations of some values, through Ray Tune; ends with a table.

    All combinations, or with --samples random ones; with --halving those that do badly are stopped early
    (ASHA). The runs are nested in one MLflow run, and lie in OUTPUT as others do. Ctrl-C stops them after
    a checkpoint; [bold]hfdist sweep OUTPUT/SWEEP_ID --resume[/] goes on.
    """
    from hfdist.launch.ray import tune as ray_tune

    at = [f"launch.address={address}"] if address is not None else []
    given = {"samples": samples, "seed": seed, "halving": halving, "eta": eta, "metric": metric}
    _check_together({name for name, value in given.items() if value is not None}, resume)
    if resume:
        plan = ray_tune.load(job, [*(grid or ()), *at])
    else:
        plan = _new(job, grid or [], at, samples, seed or 0, halving, eta or 3, metric)
    tell = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    if not as_json:
        print(f"sweep {plan.sweep_id}: {len(plan.trials)} runs", flush=True)
    rows = ray_tune.run(plan, tell)
    if as_json:
        import json

        print(json.dumps(rows))
    else:
        _print_table(rows, list(dict.fromkeys(k for t in plan.trials for k in t.values)))
        print(f"look at it: hfdist ui --output {plan.config.output}")
    if any(row["status"] in ("KILLED", "PENDING") for row in rows):
        print(f"go on:      hfdist sweep {plan.folder} --resume", file=sys.stderr)
        sys.exit(130)
    if all(row["status"] == "FAILED" for row in rows):
        sys.exit(1)


def _check_together(given: set[str], resume: bool) -> None:
    from hfdist.errors import ConfigError

    if resume and given:
        names = ", ".join(f"--{name}" for name in sorted(given))
        raise ConfigError(f"a sweep goes on as it was planned: leave {names} out")
    for name, wanted in (("seed", "samples"), ("eta", "halving"), ("metric", "halving")):
        if name in given and wanted not in given:
            raise ConfigError(f"--{name} is for --{wanted}: give both, or leave it out")


def _new(
    job: Path,
    grid: list[str],
    at: list[str],
    samples: int | None,
    seed: int,
    halving: int | None,
    eta: int,
    metric: str | None,
) -> Plan:
    from hfdist import api
    from hfdist.config.job import load_config
    from hfdist.errors import ConfigError
    from hfdist.launch.ray import tune as ray_tune
    from hfdist.rundir.locations import is_address

    fixed, values = ray_tune.split_grid(grid)
    ranges = [f"{k}={v[0]}" for k, v in values.items() if len(v) == 1]
    if ranges and samples is None:
        raise ConfigError(f"{ranges[0]} is a range: say how many points to draw, --samples=20")
    if not values:
        raise ConfigError(
            "there is nothing to vary: write several values, like optim.damping=0.1,1, or with --samples "
            "a range: uniform(A,B), loguniform(A,B), randint(A,B)"
        )
    fixed += at
    base = load_config(job, fixed)
    if is_address(base.output):
        raise ConfigError(f"output is {base.output}: a sweep wants a folder that all nodes share")
    output = str(Path(base.output).expanduser().resolve())
    fixed.append(f"output={output}")
    if halving is not None and halving >= base.steps:
        raise ConfigError(f"halving is {halving}: it must be below steps ({base.steps})")
    points = ray_tune.points(values) if samples is None else ray_tune.samples(values, samples, seed)
    sweep_id = api.new_run_id(f"{base.name}-sweep")
    plan = ray_tune.Plan(
        sweep_id=sweep_id,
        config=load_config(job, fixed),
        trials=[
            ray_tune.Trial(
                run_id=ray_tune.trial_id(sweep_id, point, number),
                values=point,
                # All of the sweep is checked before any of it runs.
                config=load_config(job, [*fixed, *(f"{k}={v}" for k, v in point.items())]),
            )
            for number, point in enumerate(points)
        ],
        halving=halving,
        eta=eta,
        metric=metric,
    )
    ray_tune.save(plan, job, fixed)
    return plan


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
