"""init: a project of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
) -> None:
    """Make a project: task.py, job.yaml, its schema and a test. It trains as it stands."""
    import json
    from importlib.resources import files

    from hfdist.config.job import schema
    from hfdist.errors import StorageError

    try:
        if folder.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} is not empty: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files("hfdist.templates").iterdir(), key=lambda f: f.name):
            # The suffix keeps tools from taking templates for code of this package.
            if file.name.endswith(".txt"):
                (folder / file.name.removesuffix(".txt")).write_text(file.read_text())
        # The job file names it for editors.
        (folder / "schema.json").write_text(json.dumps(schema(), indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from error
    print(f"made {folder}: try `cd {folder} && hfdist train job.yaml`")
