"""What is wrong with a job, in one line: pydantic's findings in the words of a job file."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from hfdist.config.redaction import MASK, is_secret

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text (put it in quotes)",
    "string_too_short": "a text of at least 1 character",
    "list_type": "a list",
    "tuple_type": "a list [min, max]",
    "dict_type": "a section of its own, `key: value` lines beneath it",
    "dataclass_type": "a section of its own, `key: value` lines beneath it",
}
_BRANCHES = ("int", "float", "str", "bool", "none")


def explain(error: ValidationError, known: Collection[str]) -> str:
    """One message: the key at fault, its value, and what it should be.

    Args:
        error: All findings; the most telling one is explained, the others are counted.
        known: All dotted keys of a job.
    """
    findings: dict[str, list[Mapping[str, Any]]] = {}
    for finding in error.errors(include_url=False):
        findings.setdefault(_key(finding["loc"]), []).append(finding)
    # An unknown key first: a misspelt one is often missed elsewhere, too.
    key = min(findings, key=lambda k: not _is_unknown(findings[k][0]))
    others = len(findings) - 1
    more = f" (and {others} more {'problem' if others == 1 else 'problems'})" if others else ""
    return _explain(key, findings[key], known) + more


def _explain(key: str, findings: list[Mapping[str, Any]], known: Collection[str]) -> str:
    first = findings[0]
    kind, message = first["type"], str(first["msg"])
    if _is_unknown(first):
        return f"unknown key {short(key)!r}{nearest(key, known)}"
    if kind == "missing":
        return f"key {key!r} is missing"
    if kind == "value_error":
        # The owner's own words; they begin with the key inside its section.
        message = message.removeprefix("Value error, ")
        return f"{key}.{message}" if key and isinstance(first["input"], Mapping) else message
    wanted = " or ".join(dict.fromkeys(_expected(finding) for finding in findings))
    whole = min(findings, key=lambda finding: len(finding["loc"]))
    value = MASK if is_secret(key, whole["input"]) else _as_yaml(whole["input"])
    return f"{key} is {value}: it must be {wanted}"


def nearest(key: str, known: Collection[str]) -> str:
    """The end of a message on an unknown key: the known one that is most like it."""
    if key in known:  # the whole dotted key was written at the top of a file
        section, _, name = key.rpartition(".")
        return f" at the top: write `{name}:` indented beneath `{section}:`"
    name = key.rpartition(".")[2]
    by_name = {k.rpartition(".")[2]: k for k in known}
    # A slip of the pen; the right key in the wrong section; a guess.
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    found = found or ([by_name[name]] if name in by_name else [])
    found = found or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    found = found or [by_name[n] for n in difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)]
    return f": did you mean {found[0]!r}?" if found else " (`hfdist schema` lists all keys)"


def _is_unknown(finding: Mapping[str, Any]) -> bool:
    return finding["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def _expected(finding: Mapping[str, Any]) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if any(str(part).startswith("tuple[") for part in finding["loc"]):
        return _EXPECTED["tuple_type"]
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "greater_than_equal":
        return f"at least {context['ge']}"
    return _EXPECTED.get(kind) or f"valid ({finding['msg']})"


def _key(location: tuple[int | str, ...]) -> str:
    parts: list[str] = []
    for part in map(str, location):
        # From here on pydantic names branches of a union, or indices of a list.
        if len(parts) > 1 and (part in _BRANCHES or part.startswith(("tuple[", "literal["))):
            break
        if part != "[key]":
            parts.append(part)
    return ".".join(parts)


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return short(repr(value))


def short(text: str) -> str:
    """A text as a part of a message."""
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
