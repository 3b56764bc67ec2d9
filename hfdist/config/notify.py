"""Who is told how a run ends, or that it stalls: the `notify.*` keys of a job file."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class NotifyConfig:
    """An address or a command that is told of the run's end, failure and stalls.

    Raises:
        ValueError: A value does not fit; the message names the key.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    url: str | None = None
    """Address that gets a JSON object by POST: event (finished, stopped, failed, stalled), text, run_id,
    run_dir, status, result. By default HFDIST_NOTIFY_URL, which is written down nowhere: use it for an
    address that is itself a secret."""
    command: str | None = None
    """Command of the shell that gets the same object on its input, and HFDIST_EVENT, HFDIST_TEXT,
    HFDIST_RUN_ID, HFDIST_RUN_DIR and HFDIST_STATUS in its environment."""
    stall_seconds: float | None = 1800.0
    """Seconds without a finished step after which the run counts as stalled; null: never."""
    timeout_seconds: float = 10.0
    """Seconds that an address or a command has to take a notice."""

    def __post_init__(self) -> None:
        if self.url is not None:
            parsed = urllib.parse.urlsplit(self.url)
            if parsed.scheme not in ("http", "https") or not parsed.hostname:
                raise ValueError("url is no address: write http://HOST/PATH or https://HOST/PATH")
            if parsed.username or parsed.password:
                raise ValueError("url holds a password: put the address into HFDIST_NOTIFY_URL")
        for key in ("stall_seconds", "timeout_seconds"):
            value = getattr(self, key)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{key} is {value}: it must be above 0")
