"""Values that no record may hold: passwords, tokens and keys, told by the names of their keys, and users
and passwords in addresses, wherever they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hfdist.addresses import MASK, without_user_information

__all__ = ["MASK", "flatten", "is_secret", "masked", "masked_override"]

_SECRET = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|secret|credentials?|(?:api|access|private|secret|auth)_?key)$",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"(?:^|[_.-])(\w*?)_?token$", re.IGNORECASE)
# Language models have tokens, too: `pad_token: <pad>` is no secret.
_VOCABULARY = frozenset(
    {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "start", "end", "stop", "special"}
)


def is_secret(key: str, value: Any = "") -> bool:
    """Whether what stands under this (dotted) key must not be shown; only texts are secrets."""
    if not isinstance(value, str):
        return False
    token = _TOKEN.search(key)
    if token is not None:
        return token[1].lower().rpartition("_")[2] not in _VOCABULARY
    return _SECRET.search(key) is not None


def masked(values: Any, key: str = "") -> Any:
    """A copy of plain values in which every secret is `MASK`."""
    if isinstance(values, Mapping):
        return {
            without_user_information(name) if isinstance(name, str) else name: masked(
                value, str(name)
            )
            for name, value in values.items()
        }
    if isinstance(values, list):
        return [masked(value, key) for value in values]
    if isinstance(values, str):
        return MASK if values and is_secret(key, values) else without_user_information(values)
    return values


def masked_override(override: str) -> str:
    """A `key=value` that may be shown."""
    key, equals, value = override.partition("=")
    if value and is_secret(key.strip()):
        return f"{key}{equals}{MASK}"
    return without_user_information(override)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
