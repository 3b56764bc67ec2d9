"""bench: measurements of this machine, as tables, JSON and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfdist.cli.tables import print_table

app = typer.Typer(
    no_args_is_help=True,
    help="Measure: products, steps, scaling over ranks, Hessian-free beside other optimizers; check models.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Plot = Annotated[Path | None, typer.Option(help="Draw to this file.", metavar="FILE.png")]


@app.command()
def products(
    workloads: Annotated[
        str | None,
        typer.Option(
            help="autoencoder, all-cnn-c, resnet-18, transformer; by default all.", metavar="NAMES"
        ),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Rounds; medians are reported.", min=1)] = 7,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; by default as many as cores.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..")] = "cpu",
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Time curvature products beside torch's gradient and BackPACK's products, interleaved."""
    import json

    from hfdist.bench import products as bench
    from hfdist.devices import resolve
    from hfdist.errors import ConfigError

    try:
        timings = bench.run(
            workloads.split(",") if workloads else None,
            repetitions=repetitions,
            threads=threads,
            device=resolve(device, local_rank=0),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plot is not None:
        bench.plot(timings, plot)
    if as_json:
        print(json.dumps(bench.to_rows(timings)))
    else:
        print_table(
            bench.to_rows(timings), title="Curvature products, in gradients of the same batch"
        )


@app.command()
def step(
    workloads: Annotated[
        str | None,
        typer.Option(
            help="autoencoder, all-cnn-c, resnet-18, transformer; by default all.", metavar="NAMES"
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(help="CG iterations a step.", min=1)] = 10,
    repetitions: Annotated[int, typer.Option(help="Rounds; medians are reported.", min=1)] = 3,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; by default as many as cores.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..")] = "cpu",
    as_json: Json = False,
) -> None:
    """Time steps by phase beside the same steps on BackPACK's products, and weigh their memory."""
    import json

    from hfdist.bench import steps as bench
    from hfdist.devices import resolve
    from hfdist.errors import ConfigError

    try:
        timings = bench.run(
            workloads.split(",") if workloads else None,
            repetitions=repetitions,
            cg_iterations=iterations,
            threads=threads,
            device=resolve(device, local_rank=0),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = bench.to_rows(timings)
    if as_json:
        print(json.dumps(rows))
        return
    phases = [row.pop("phases") for row in rows]
    print_table(rows, title=f"Steps of {iterations} CG iterations")
    print_table(
        [
            {"workload": row["workload"], "kind": row["kind"], "by": row["by"], **phase}
            for row, phase in zip(rows, phases)
            if phase
        ],
        title="Seconds by phase",
    )


@app.command()
def scaling(
    workers: Annotated[
        str, typer.Option(help="Numbers of ranks on this machine, separated by commas.")
    ] = "1,2",
    examples: Annotated[int, typer.Option(help="Examples a rank.")] = 2500,
    iterations: Annotated[int, typer.Option(help="CG iterations a step.")] = 5,
    repetitions: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads a rank.")] = 1,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Time steps on ranks of this machine, fit a model, check it, and foresee a cluster's efficiency."""
    import json

    from hfdist.bench import scaling as bench
    from hfdist.errors import ConfigError

    try:
        numbers = [int(part) for part in workers.split(",")]
    except ValueError as error:
        raise ConfigError(f"workers is {workers!r}: write numbers like 1,2,4") from error
    if min(numbers) < 1 or min(examples, iterations, repetitions, threads) < 1:
        raise ConfigError(
            "workers, examples, iterations, repetitions and threads must be at least 1"
        )
    report = bench.run(
        numbers,
        examples=examples,
        cg_iterations=iterations,
        repetitions=repetitions,
        threads=threads,
    )
    if plot is not None:
        bench.plot(report, plot)
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    print_table(
        [
            {
                "ranks": check.world_size,
                "examples a rank": check.point.examples,
                "CG iterations": check.point.cg_iterations,
                "delay (ms)": 1000 * check.point.delay,
                "measured (s)": check.measured,
                "foreseen (s)": check.foreseen,
                "error (%)": 100 * check.error,
            }
            for check in report.checks
        ],
        title=f"Steps on this machine ({report.num_parameters:,} parameters, {threads} thread(s) a rank)",
    )
    print_table(
        [
            {
                "busy ranks": W,
                "Gflop/s a rank": m.flops / 1e9,
                "vectors (GB/s)": m.memory_bandwidth / 1e9,
                "latency (us)": 1e6 * m.link.latency,
                "link (GB/s)": m.link.bandwidth / 1e9,
                "step / control": report.overhead.get(W, 1.0),
            }
            for W, m in report.machines.items()
        ],
        title="Fitted rates",
    )
    for name, rows in report.ahead.items():
        chosen = [row for row in rows if row["world_size"] in (1, 8, 64, 512, 4096)]
        print_table(chosen, title=f"Foreseen efficiency: {name}")


@app.command()
def optimizers(
    problems: Annotated[
        str,
        typer.Argument(
            metavar="PROBLEMS|JOB.yaml",
            help="Names separated by commas (`list` prints them), or a job file with a task of your own.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Changes of the job: Hessian-free's rules, sizes."
        ),
    ] = None,
    gradients: Annotated[
        float, typer.Option(help="Work of every contender, in gradient-equivalents.", min=1.0)
    ] = 600.0,
    seconds: Annotated[
        float, typer.Option(help="Training time of every contender.", min=0.1)
    ] = 600.0,
    seeds: Annotated[
        str, typer.Option(help="Seeds, separated by commas; grids are searched on the first.")
    ] = "0,1,2",
    rivals: Annotated[
        str | None, typer.Option(help="Names separated by commas; by default all that can run.")
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            help="Losses to compare at; by default the problem's, or what the best rival reaches."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; by default as many as cores.", min=1)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for PROBLEM.json and PROBLEM.png; grids that are there are not measured again.",
            metavar="FOLDER",
        ),
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Also try a grid of Hessian-free's own options.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hessian-free beside SOAP, Muon, Adam, L-BFGS, K-FAC and SGD: one model, one whole batch, one budget.

    Work is counted in gradient-equivalents: a gradient is 1, a Gauss-Newton product 4/3 and a metric's
    statistics 5/3 of their share of the examples, a loss 1/3. Each rival gets the best of a grid at every
    loss, Hessian-free its defaults. Seconds are those of contenders that take turns. SOAP, Muon and K-FAC are
    of packages in the extra `bench`.
    """
    import json
    import sys

    import torch

    from hfdist.bench import optimizers as bench

    if problems == "list":
        print_table(
            [{"problem": n, "description": c.description} for n, c in bench.COMPARISONS.items()],
            title="Problems",
        )
        return
    numbers = _numbers("seeds", seeds, int)
    goals = _numbers("losses", losses, float) if losses else []
    if threads is not None:
        torch.set_num_threads(threads)
    found = []
    for problem in problems.split(","):
        name, config, thresholds = bench.named(problem, overrides or ())
        study = bench.compare(
            name,
            config,
            budget=bench.Budget(gradients=gradients, seconds=seconds),
            seeds=numbers,
            names=rivals.split(",") if rivals else None,
            thresholds=sorted(goals, reverse=True) or thresholds,
            path=None if output is None else output / f"{name}.json",
            with_own_grid=own,
            progress=lambda text: print(text, file=sys.stderr),
        )
        if output is not None:
            bench.plot(study, output / f"{name}.png")
        rows = [{"problem": name, **row} for row in bench.rows(study.races, study.thresholds)]
        found += rows
        defaults = [
            c for c in study.races if c.optimizer == "Hessian-free" and c.seed == numbers[0]
        ]
        of_own = bench.own_ratios(study.own, defaults, study.thresholds) if own else []
        found += [{"problem": name, "optimizer": "Hessian-free's options", **row} for row in of_own]
        if not as_json and own:
            print_table(
                of_own, title=f"{name}: defaults beside a grid of Hessian-free's own options"
            )
        if not as_json:
            print_table(
                rows,
                title=f"{name}: means over {len(numbers)} seeds until a loss, ratios to the best rival",
            )
    if as_json:
        print(json.dumps(found))


@app.command()
def pinns(
    problems: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROBLEMS|JOB.yaml]",
            help="Names separated by commas (`list` prints them), or a job file with a task of your own; by "
            "default all.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Changes of the job: Hessian-free's rules, sizes."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Training time of every contender.", min=0.1)
    ] = 60.0,
    seeds: Annotated[
        str, typer.Option(help="Seeds, separated by commas; grids are searched on the first.")
    ] = "0,1,2",
    rivals: Annotated[
        str | None,
        typer.Option(
            help="Adam, L-BFGS, SOAP, 'Adam, then L-BFGS', separated by semicolons; by default all that are "
            "installed."
        ),
    ] = None,
    clock: Annotated[
        str,
        typer.Option(
            help="What seconds are: wall, or cpu, the process's own, on a machine that others use, too."
        ),
    ] = "wall",
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for PROBLEM.json, pinns.md and pinns.png; grids that are there are not measured "
            "again.",
            metavar="FOLDER",
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="Measure nothing: tables and picture of what FOLDER has."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Relative errors in L2 on differential equations, beside Adam, L-BFGS, both in turn, and SOAP.

    Every contender has the same start, points and seconds. Each rival has the best of a grid, searched on the
    first seed by its error at the end; Hessian-free has its defaults. Contenders take turns, so that a busy
    machine slows all of them alike; looking at errors is off the clock. SOAP is of a package in the extra
    `bench`. It takes about 24 times `--seconds` a problem.
    """
    import json
    import sys

    import torch

    from hfdist.bench import pinns as bench
    from hfdist.errors import ConfigError

    if problems == "list":
        print_table(
            [{"problem": n, "description": c.description} for n, c in bench.PROBLEMS.items()],
            title="Problems",
        )
        return
    numbers = _numbers("seeds", seeds, int)
    torch.set_num_threads(threads)
    chosen = [
        bench.named(problem, overrides or ())
        for problem in (problems.split(",") if problems else bench.PROBLEMS)
    ]
    studies: list[bench.Study] = []
    if show:
        if output is None:
            raise ConfigError("--show draws what was measured: name its folder, --output FOLDER")
        files = [output / f"{name}.json" for name, _ in chosen]
        chosen = []
        studies += [bench.Study.load(path) for path in files if path.is_file()]
        if not studies:
            raise ConfigError(f"{output} has nothing of these problems: measure them first")
    for name, config in chosen:
        study = bench.compare(
            name,
            config,
            seconds=seconds,
            seeds=numbers,
            clock=clock,
            threads=threads,
            names=[text.strip() for text in rivals.split(";")] if rivals else None,
            path=None if output is None else output / f"{name}.json",
            progress=lambda text: print(text, file=sys.stderr),
        )
        studies.append(study)
    found = []
    for study in studies:
        rows = bench.rows(study)
        found += [{"problem": study.problem, **row} for row in rows]
        if not as_json:
            num_seeds = len({trace.seed for trace in study.races})
            print_table(
                rows,
                title=f"{study.problem}: relative errors in L2, medians over {num_seeds} seeds, "
                f"{study.seconds:g} s ({study.clock})",
            )
    if output is not None:
        bench.plot(studies, output / "pinns.png")
        descriptions = {name: known.description for name, known in bench.PROBLEMS.items()}
        (output / "pinns.md").write_text(bench.markdown(studies, descriptions))
    if as_json:
        print(json.dumps(found))


def _numbers(key: str, text: str, kind: type) -> list[Any]:
    from hfdist.errors import ConfigError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{key} is {text!r}: write numbers separated by commas") from error


@app.command()
def coverage(
    families: Annotated[
        str | None,
        typer.Option(
            help="Parts of names or of libraries, by commas; all by default.", metavar="NAMES"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the table to this page.", metavar="FILE.md")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check gradients and products of tiny models of many families: engine and largest error of each.

    Models of torchvision, timm and transformers where these are installed (the extra `zoo`). Exit code 1 if
    a family is wrong.
    """
    import json
    import sys

    from hfdist.bench import coverage as bench
    from hfdist.errors import ConfigError

    try:
        results = bench.run(
            families.split(",") if families else None,
            progress=lambda name: print(name, file=sys.stderr),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if output is not None:
        bench.write(results, output)
    if as_json:
        print(json.dumps(bench.to_rows(results)))
    else:
        rows = bench.to_rows(results)
        notes = {f"{row['library']}: {row['family']}": row.pop("note") for row in rows}
        print_table(rows, title="Errors beside first derivatives, in float64")
        for family, note in notes.items():
            if note:
                print(f"{family}: {note}")
    if not all(result.is_right or result.refusal for result in results):
        raise typer.Exit(1)
