"""Addresses without the user names and passwords that stand in them."""

from __future__ import annotations

import re

MASK = "********"

# What stands between :// and the last @ before the path. A password that holds a slash ends later: told by
# a colon that no port follows.
_USER_INFORMATION = re.compile(
    r"(?<=://)(?:[^\s/?#'\"]*|[^\s/?#:@\['\"]*:(?!\d*(?:[/?#\s'\"]|$))[^\s'\"]*)@"
)
_REFERENCE = re.compile(r"\$\{[^{}]*\}")


def without_user_information(text: str) -> str:
    """The text with `USER:PASSWORD@` of every address in it masked."""
    return _USER_INFORMATION.sub(f"{MASK}@", text) if "@" in text else text


def has_user_information(text: str) -> bool:
    """Whether an address in the text names a user or a password."""
    return without_user_information(text) != text


def is_all_reference(text: str) -> bool:
    """Whether what is secret in an address stands elsewhere: postgres://me:${oc.env:PASSWORD}@host."""
    found = _USER_INFORMATION.findall(_REFERENCE.sub("$", text))
    return "${" in text and all(part in ("$@",) or part.endswith(":$@") for part in found)
