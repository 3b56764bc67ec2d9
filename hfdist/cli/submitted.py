"""The driver of a submitted job, run by the cluster in the job's package."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from hfdist.cli.app import errors_as_messages
from hfdist.cli.run import exit_as
from hfdist.errors import StorageError, UserError


def main() -> None:
    """Run, or go on with, what the package's submission names."""
    with errors_as_messages():
        result = _run(Path.cwd())
    exit_as(result)


def _run(package: Path) -> dict[str, str]:
    from hfdist import api
    from hfdist.checkpoint import mirror
    from hfdist.launch.ray.jobs import FOLDER, Submission
    from hfdist.launch.ray.queue import JOB_VARIABLE
    from hfdist.rundir import files
    from hfdist.rundir.locations import is_address, split
    from hfdist.tracking.provenance import SOURCE_FILE, SOURCE_VARIABLE

    submission = Submission(**json.loads((package / FOLDER / "submission.json").read_text()))
    os.environ.update(submission.environment)
    if submission.job_id:
        os.environ[JOB_VARIABLE] = submission.job_id
    home = submission.run_dir
    output, run_dir = split(home) if is_address(home) else ("", Path(home))
    # The package goes with the cluster; the run keeps its own copy, which all nodes see.
    code = run_dir / files.CODE
    if submission.job is not None:
        try:
            shutil.copytree(
                package, code, ignore=shutil.ignore_patterns(FOLDER), dirs_exist_ok=True
            )
            if SOURCE_VARIABLE in os.environ:
                (code / SOURCE_FILE).write_text(os.environ[SOURCE_VARIABLE])
            if output:
                shutil.make_archive(str(code), "gztar", code)
                mirror.push(output, run_dir, [files.CODE_ARCHIVE])
        except (OSError, shutil.Error) as error:
            raise StorageError(
                f"cannot write {run_dir} on the cluster: set `output` to a folder that all nodes share "
                f"({error})"
            ) from error
    elif output:
        mirror.pull(output, run_dir)  # the run's code, for a cluster that has never seen it
    if code.is_dir():
        os.chdir(code)
        sys.path.insert(0, str(code))
    here = ["launch.backend=ray", "launch.address=auto"]
    if submission.job is None:
        return api.resume(home, [*submission.overrides, *here], display="plain")
    try:
        return api.train(
            code / submission.job,
            [*submission.overrides, *here],
            display="plain",
            run_id=submission.run_id,
        )
    except UserError:
        if not (run_dir / files.METRICS).exists():  # nothing worth keeping
            os.chdir(package)
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()
