"""Find the task that a job names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfdist.errors import TaskError
from hfdist.tasks.task import Task
from hfdist.tasks.user_code import guarded, user_code

SOURCE = "__hfdist_source__"
"""Of a task file's module: what it was made of."""


def load_task(spec: str, task_args: Mapping[str, Any]) -> Task:
    """Build the task that `spec` names.

    Args:
        spec: "package.module:Class" or "path/to/file.py:Class".
        task_args: Keyword arguments of its constructor.

    Raises:
        TaskError: The file, module or class is missing, fails on import, or refuses the arguments.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise TaskError(f"task is {spec!r}: write package.module:Class or file.py:Class")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    cls = getattr(module, name, None)
    if cls is None:
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Task)]
        known = ", ".join(c for c in classes if c != "Task") or "none"
        raise TaskError(f"task {spec!r}: {where} has no class {name!r} (its tasks: {known})")
    if not (inspect.isclass(cls) and issubclass(cls, Task)):
        raise TaskError(f"task {spec!r}: {name} is no subclass of hfdist.Task")
    try:
        signature = inspect.signature(cls)
        signature.bind(**task_args)
    except (TypeError, ValueError) as error:
        raise TaskError(
            f"task_args of {name}: {error}. It takes {inspect.signature(cls.__init__)}"
        ) from error
    with user_code(f"{name}.__init__()", cls.__init__):
        task = cls(**task_args)
    return guarded(task)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise TaskError(f"task file {path} does not exist: correct `task` in the job file")
    # Under its own name, and with its folder on the path, so that it can import its neighbours and
    # its classes can be found again by other processes.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    file, source, name = str(path.resolve()), path.read_bytes(), path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) != file:
        name = f"hfdist_task_{name}"  # another module has the name
        loaded = sys.modules.get(name)
        if loaded is not None and getattr(loaded, "__file__", None) != file:
            loaded = None
    # The same program may train again after the file was edited, in a notebook say.
    if loaded is not None and getattr(loaded, SOURCE, source) == source:
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise TaskError(f"task file {path} cannot be loaded: is it a Python file?")
    module = importlib.util.module_from_spec(spec)
    setattr(module, SOURCE, source)
    sys.modules[name] = module
    try:
        with user_code(f"task file {path}", module):
            # Not by the loader: what it has compiled before counts as current for a second after an edit.
            exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _load_module(name: str) -> Any:
    try:
        with user_code(f"task module {name!r}", passes=ModuleNotFoundError):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(missing + "."):
            raise TaskError(
                f"task module {name!r} cannot be found: install its package, or name a file "
                "(file.py:Class) beside the job"
            ) from error
        raise TaskError(
            f"task module {name!r} needs {missing!r}, which is not installed"
        ) from error
