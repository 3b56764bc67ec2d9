"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
RunDir = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="The run's folder, or its address s3://.../RUN_ID.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes of the job, like optim.damping=0.1 launch.workers=4; values are YAML.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print a line a step, also on a terminal.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard; by default RAY_API_SERVER_ADDRESS, else this machine's.",
        metavar="http://HEAD:8265",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the code that the run names, also where it is another user's.",
        envvar="HFDIST_TRUST",
    ),
]
