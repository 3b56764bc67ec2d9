"""Calls into a task's own code: what goes wrong there is one message with task, method and line."""

from __future__ import annotations

import functools
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

from hfdist.errors import DataError, Interrupted, TaskError, UserError, first_line
from hfdist.tasks.task import Task

METHODS = (
    *("model", "forward", "loss", "train_data", "eval_data", "metrics"),
    *("example_costs", "example_inputs", "hidden_units", "summary", "draw"),
)
"""What a task may define, and any part of hfdist calls. `collate` is called by the loader alone."""

_PACKAGE = Path(__file__).parents[1]
_CALLERS = {
    str(Path(__file__).with_name(name)) for name in ("user_code.py", "loading.py", "task.py")
}
_LIBRARIES = tuple(
    f"{Path(folder).resolve()}/"
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
    )
)


@contextmanager
def user_code(
    what: str,
    owner: Any = None,
    kind: type[UserError] = TaskError,
    fix: str = "",
    passes: type[Exception] | tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Tell whatever the block raises as the user's error.

    Args:
        what: Task and method, as "Digits.loss()"; or what is called, as "Pairs[7] of Digits.train_data()".
        owner: Function, class or module whose line is named where the error passed none of the user's.
        kind: Class of the error that is raised.
        fix: What to do about it.
        passes: Errors that the caller explains itself.

    Raises:
        UserError: One message: what failed, the error, and the user's own line of it.
    """
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt):
        raise
    except SystemExit as error:
        at = where(error, owner)
        raise kind(
            f"{what} ends the program by sys.exit({error.code!r}){f' ({at})' if at else ''}: raise an "
            "exception that says what is wrong instead"
        ) from error
    except passes:
        raise
    except BaseException as error:
        raise kind(told(what, error, owner, fix)) from error


def told(what: str, error: BaseException, owner: Any = None, fix: str = "") -> str:
    """The message of an error of the user's code."""
    name, text = type(error).__name__, first_line(error)
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        fix = "Lower batches.microbatch, which bounds the memory of a forward pass"
    if "does not have a deterministic implementation" in text:
        fix = "Use another operation, or set deterministic=false"
    said = name if text == name else f"{name}: {text}"
    what, _, of = what.partition(" of ")
    at = ", ".join(part for part in (of, where(error, owner)) if part)
    return f"{what} fails: {said}" + (f" ({at})" if at else "") + (f". {fix}" if fix else "")


def where(error: BaseException, owner: Any = None) -> str:
    """FILE:LINE of the user's own line nearest to the error; "" where none is known."""
    home = _file_of(owner)
    lines = [
        (frame.tb_frame.f_code.co_filename, frame.tb_lineno)
        for frame in _frames(error.__traceback__)
        if _is_users(frame.tb_frame.f_code.co_filename, home)
    ]
    if not lines and isinstance(error, SyntaxError) and error.filename:
        lines = [(error.filename, error.lineno or 1)]
    code = getattr(owner, "__code__", None)
    if not lines and isinstance(code, CodeType) and _is_users(code.co_filename, home):
        lines = [(code.co_filename, code.co_firstlineno)]
    return f"{lines[-1][0]}:{lines[-1][1]}" if lines else ""


def guarded(task: Task) -> Task:
    """The task itself; calls of its methods from here on raise a `TaskError` for whatever they raise."""
    for name in METHODS:
        if isinstance(inspect.getattr_static(task, name, None), property):
            raise TaskError(f"{type(task).__name__}.{name} is a property: it must be a method")
        object.__setattr__(task, name, _Guarded(task, name, getattr(task, name, None)))
    return task


class _Guarded:
    """A method of a task. A class, so that what holds a task can still be pickled and copied."""

    def __init__(self, task: Task, name: str, method: Any) -> None:
        self._task, self._name, self._method = task, name, method
        if callable(method):
            functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task = type(self._task)
        if not callable(self._method):
            raise TaskError(
                f"{task.__name__}.{self._name} is a {type(self._method).__name__}: it must be a method"
            )
        with user_code(f"{task.__name__}.{self._name}()", _defined(self._task, self._name)):
            return self._method(*args, **kwargs)


def _defined(task: Task, name: str) -> Any:
    """The user's function that a line is named of: the method, or for an inherited forward the model."""
    for candidate in (name, "model"):
        function = getattr(type(task), candidate, None)
        if function is not getattr(Task, candidate):
            return function
    return type(task)


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _file_of(owner: Any) -> str:
    code = getattr(owner, "__code__", None)
    if code is not None:
        return str(code.co_filename)
    module = sys.modules.get(owner.__module__) if inspect.isclass(owner) else owner
    return str(getattr(module, "__file__", None) or "")


def _is_users(file: str, home: str) -> bool:
    """Whether a line of this file is the user's: of the owner's folder, or of no library."""
    if file in _CALLERS:
        return False
    if home and Path(file).parent == Path(home).parent:
        return True
    if file.startswith("<") or Path(file).is_relative_to(_PACKAGE):
        return False
    return not str(Path(file).resolve()).startswith(_LIBRARIES)


def length(data: Any, what: str, purpose: str) -> int | None:
    """Number of examples of a data set; None where there is none.

    Args:
        data: What the task's method returned.
        what: Task and method, as "Digits.train_data()".
        purpose: What the examples are for: "train on".

    Raises:
        DataError: It is no map-style data set, or empty.
    """
    if data is None:
        return None
    name = type(data).__name__
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"{what} returns a {name}, which is no data set: give it __len__ and __getitem__, or __iter__"
        )
    with user_code(f"len({name}) of {what}", type(data).__len__, DataError):
        n = len(data)
    if n == 0:
        raise DataError(f"{what} returns an empty {name}: there is nothing to {purpose}")
    return n
