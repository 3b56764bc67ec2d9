"""What a job file may hold at most: it is read, compared and shown within seconds, on every rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from hfdist.addresses import has_user_information
from hfdist.errors import ConfigError

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 10_000
"""Values of a file, those behind aliases (`*name`) counted as often as they appear."""
MAX_DEPTH = 50
_MAX_INTEGER = 2**63 - 1
_REFERENCE = re.compile(r"\$\{\s*([\w.\-\[\]]+)\s*\}")
_NO_BOUND = "optim.damping_max"
"""The one number that may be infinite."""

_Loader = getattr(yaml, "CLoader", yaml.Loader)


def check_size(text: str, where: str) -> None:
    """Refuse a YAML text that would take minutes or all memory to read.

    Raises:
        ConfigError: It is too long, too deep, or its aliases make it so.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{where} has {len(text)} characters: a job has at most {MAX_CHARACTERS}. Let the task read "
            "large values from a file of its own"
        )
    depth = values = 0
    open_at: list[
        tuple[str | None, int]
    ] = []  # anchor, and count, where each open collection began
    sizes: dict[str | None, int] = {}
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                values += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                values += 1
                if event.anchor:
                    sizes[event.anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                values += 1
                open_at.append((event.anchor, values))
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
                anchor, began = open_at.pop()
                if anchor:
                    sizes[anchor] = values - began + 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{where} has more than {MAX_DEPTH} levels: make it flatter")
            if values > MAX_VALUES:
                raise ConfigError(
                    f"{where} has more than {MAX_VALUES} values: let the task read large values from a "
                    "file of its own"
                )
    except (yaml.YAMLError, ValueError):
        pass  # whoever reads it says what is wrong


def check_references(values: Mapping[str, Any], where: str) -> None:
    """Refuse references (`${steps}`) that go in circles, or that would be followed too often.

    Args:
        values: By dotted key, references not yet followed.
        where: What messages call the file.

    Raises:
        ConfigError: There are such references.
    """
    cost: dict[str, int] = {}

    def of(key: str, trail: tuple[str, ...]) -> int:
        if key in trail:
            circle = " -> ".join((*trail[trail.index(key) :], key))
            raise ConfigError(f"{where}: the references go in a circle: {circle}")
        if len(trail) > MAX_DEPTH:
            raise ConfigError(f"{where}: references follow each other more than {MAX_DEPTH} times")
        if key not in cost:
            names = _REFERENCE.findall(str(values.get(key, "")))
            cost[key] = 1 + sum(of(_absolute(name, key), (*trail, key)) for name in names)
            if cost[key] > MAX_VALUES:
                raise ConfigError(
                    f"{where}: {key} follows more than {MAX_VALUES} references: write its value"
                )
        return cost[key]

    for key in values:
        of(key, ())


def _absolute(name: str, key: str) -> str:
    """The key that a reference names; `${.x}` is beside the key that holds it."""
    dots = len(name) - len(name.lstrip("."))
    above = key.split(".")[:-dots] if dots else []
    return ".".join([*above, name.lstrip(".")])


def what_is_wrong(key: str, value: Any) -> str:
    """What no key may hold, in words that follow the key; "" where all is well.

    A task's arguments may be any numbers and texts, but of those that files can hold.
    """
    if isinstance(value, list | tuple):
        return next((found for v in value if (found := what_is_wrong(key, v))), "")
    if isinstance(value, str):
        if not _is_text(value):
            return f"is {value!r}: it holds characters that are no text (UTF-8)"
    elif not _is_text(key):
        return "is no text (UTF-8)"
    if key.startswith("task_args"):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        if (key, value) == (_NO_BOUND, math.inf):
            return ""
        return f"is {value}: it must be a finite number"
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return f"is about 1e{len(str(abs(value) >> 64)) + 19}: it must be below 2^63"
    if isinstance(value, str) and "\0" in value:
        return f"is {value!r}: it holds a NUL byte"
    if isinstance(value, str) and has_user_information(value):
        return (
            "holds a user's name or password: it would stand in every record of the run. Leave it out, and "
            "give it in the variables that the service reads (AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_PASSWORD)"
        )
    return ""


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
