"""bench: measurements of this machine, as tables, JSON and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Task and rules.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the job.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Training time of every contender.")] = 20.0,
    rivals: Annotated[
        str | None, typer.Option(help="Names separated by commas; by default all there are.")
    ] = None,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Hessian-free beside torch's optimizers on a job's task: one model, batch and budget of seconds.

    Each rival gets the best of a small grid.
    """
    import json

    from hfdist.bench import optimizers as bench
    from hfdist.config.job import load_config
    from hfdist.errors import ConfigError
    from hfdist.tasks.loading import load_task

    config = load_config(job, overrides or ())
    arena = bench.Arena(
        load_task(config.task, config.task_args),
        seconds=seconds,
        weight_decay=config.optim.weight_decay,
        examples=config.batches.gradient,
        seed=config.seed,
    )
    try:
        found = bench.compare(arena, config.optim, rivals.split(",") if rivals else None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = bench.to_rows(found)
    if plot is not None:
        bench.plot(found, plot, f"{config.name}: one batch of {arena.num_examples} examples")
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(
            rows, title=f"{config.name}, {seconds:g} s each, a batch of {arena.num_examples}"
        )


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
