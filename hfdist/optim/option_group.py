"""Options in groups: each is declared, bounded and documented by the part of a step that owns it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base of the groups that `HFOptions` is composed of.

    Raises:
        ValueError: A value is out of its range; the message names the key and the range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {}
    """Least and greatest value of the group's own numeric fields, both allowed; null always is."""

    UNBOUNDED: ClassVar[set[tuple[str, float]]] = {("damping_max", math.inf)}
    """Values without a bound that mean something."""

    def __post_init__(self) -> None:
        options: Any = type(self)
        for key, kind in _numbers(options).items():
            value: Any = getattr(self, key)
            if value is None or value in _words(options).get(key, ()):
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "a number" if kind is Real else "a whole number"
                words = "".join(f" or {word!r}" for word in _words(options).get(key, ()))
                raise ValueError(f"{key} is {value!r}: it must be {what}{words}")
            if not -math.inf < value < math.inf and (key, value) not in self.UNBOUNDED:  # type: ignore[operator]
                raise ValueError(f"{key} is {value}: it must be finite")
        groups = options.__mro__[::-1]
        for group in groups:
            for key, (low, high) in vars(group).get("RANGES", {}).items():
                value = getattr(self, key)
                if value is None or value in _words(options).get(key, ()):
                    continue
                if not low <= value <= high:
                    raise ValueError(f"{key} is {value}: it must be {_range(low, high)}")
        for key, allowed in _choices(options).items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}: it must be one of "
                    + ", ".join(map(repr, allowed))
                )
        for group in groups:
            if "check" in vars(group):
                vars(group)["check"](self)

    def check(self) -> None:
        """What a group asks of several of its fields together."""


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"


@cache
def _numbers(options: Any) -> dict[str, type]:
    """The fields that are numbers, or null."""
    kinds = {float: Real, int: Integral}
    hints = get_type_hints(options)
    found = {
        key: next((k for k in (get_args(h) or (h,)) if k in kinds), None)
        for key, h in hints.items()
    }
    return {key: kinds[kind] for key, kind in found.items() if kind is not None}


@cache
def _words(options: Any) -> dict[str, tuple[Any, ...]]:
    """What fields that are numbers may be instead."""
    hints = get_type_hints(options)
    return {
        key: get_args(part)
        for key, hint in hints.items()
        for part in get_args(hint)
        if get_origin(part) is Literal
    }


@cache
def _choices(options: Any) -> dict[str, tuple[Any, ...]]:
    """The allowed values of the fields that are choices."""
    hints = get_type_hints(options)
    return {key: get_args(hint) for key, hint in hints.items() if get_origin(hint) is Literal}
