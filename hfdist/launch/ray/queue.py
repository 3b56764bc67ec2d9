"""Whose turn it is, among the submitted jobs of a cluster.

There is no scheduler: Ray's own table of jobs says who waits and since when, with which priority and limit,
and the driver of every job that waits works out from it whether it is its turn. What it waits for it writes
into that table as the job's message, which Ray's pages show, too. A job whose turn it is gets its workers as
others do.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfdist.errors import ConfigError

logger = logging.getLogger(__name__)

JOB_VARIABLE = "HFDIST_JOB_ID"
"""Names the job in its driver's environment."""
LIMIT_VARIABLE = "HFDIST_MAX_RUNS_PER_USER"
"""In the environment of a cluster's head: jobs of a user that may run at a time."""
PRIORITIES = range(-1000, 1001)
_POLL = 1.0  # seconds between looks at the table
_PLACED_IN = 90.0
"""Seconds that a job whose turn it is has to get its workers before others have theirs."""

State = Literal["waiting", "placing", "running"]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A job of the queue, as the cluster's table has it."""

    job_id: str
    state: State
    since: float
    """When it was submitted, in milliseconds."""
    priority: int = 0
    user: str = ""
    label: str = ""
    at_most: int | None = None
    """Jobs of its label, or of its user where it has none, that may run at a time."""
    turn_at: float = 0.0
    """When its turn came, in seconds since 1970."""


def metadata(priority: int = 0, label: str = "", at_most: int | None = None) -> dict[str, str]:
    """What a submission says of its place in the queue.

    Raises:
        ConfigError: A value is out of its range.
    """
    if priority not in PRIORITIES:
        raise ConfigError(f"priority is {priority}: it must be from -1000 to 1000, 0 is usual")
    if at_most is not None and at_most < 1:
        raise ConfigError(f"at-most is {at_most}: it must be at least 1")
    if len(label) > 200 or not label.isprintable():
        raise ConfigError(f"label is {label[:40]!r}: use at most 200 characters, all in one line")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    found = {"priority": str(priority), "user": user, "label": label}
    if at_most is not None:
        found["at_most"] = str(at_most)
    return {"queue": "waiting", **{k: v for k, v in found.items() if v}}


def ticket(job_id: str, metadata: Mapping[str, str], since: float) -> Ticket | None:
    """A job of the table that takes part in the queue; None if it does not."""
    state = metadata.get("queue", "")
    if state not in ("waiting", "placing", "running"):
        return None
    at_most = metadata.get("at_most", "")
    return Ticket(
        job_id=job_id,
        state=state,  # type: ignore[arg-type]  # one of them
        since=since,
        priority=_number(metadata.get("priority", ""), 0),
        user=metadata.get("user", ""),
        label=metadata.get("label", ""),
        at_most=_number(at_most, 1) if at_most else None,
        turn_at=float(_number(metadata.get("turn_at", ""), 0)),
    )


def in_order(tickets: Sequence[Ticket]) -> list[Ticket]:
    """Those that wait, the next one first: by priority, then by the time of submission."""
    waiting = [t for t in tickets if t.state == "waiting"]
    return sorted(waiting, key=lambda t: (-t.priority, t.since, t.job_id))


def what_it_waits_for(
    mine: Ticket, tickets: Sequence[Ticket], now: float, per_user: int | None = None
) -> str | None:
    """Why it is not a job's turn; None if it is, as far as other jobs are concerned.

    A job whose own limit holds it back does not hold up those behind it.

    Args:
        mine: The job.
        tickets: All jobs that wait or run, `mine` among them.
        now: Seconds since 1970.
        per_user: The cluster's own limit.
    """
    if (limit := _limit(mine, tickets, per_user)) is not None:
        return limit
    placing = [
        t
        for t in tickets
        if t.state == "placing" and t.job_id != mine.job_id and now - t.turn_at < _PLACED_IN
    ]
    if placing:
        return f"{placing[0].job_id} is getting its workers"
    for other in in_order(tickets):
        if other.job_id == mine.job_id:
            return None
        if _limit(other, tickets, per_user) is None:
            words = f" (priority {other.priority})" if other.priority != mine.priority else ""
            return f"{other.job_id}{words} is before it"
    return None


def _limit(mine: Ticket, tickets: Sequence[Ticket], per_user: int | None) -> str | None:
    going = [t for t in tickets if t.state != "waiting" and t.job_id != mine.job_id]
    ours = [t for t in going if t.user == mine.user]
    if per_user is not None and len(ours) >= per_user:
        return f"at most {per_user} jobs of a user run at a time, and {len(ours)} of {mine.user} do"
    if mine.at_most is None:
        return None
    alike = [t for t in going if t.label == mine.label] if mine.label else ours
    if len(alike) < mine.at_most:
        return None
    whose = f"label {mine.label}" if mine.label else f"user {mine.user}"
    return f"at most {mine.at_most} jobs of {whose} run at a time, and {len(alike)} do"


def listed(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The jobs that have not ended, as `describe` has them: those that run, then the queue in its order, each
    with its place in it and what it waits for."""
    alive = {job["id"]: job for job in jobs if job["status"] in ("PENDING", "RUNNING")}
    found = {id_: ticket(id_, job["queue"], job["started"] or 0) for id_, job in alive.items()}
    order = [t.job_id for t in in_order([t for t in found.values() if t is not None])]
    rows = []
    for id_ in [*(i for i in alive if i not in order), *order]:
        job, mine = alive[id_], found[id_]
        is_waiting = id_ in order
        reason = (job["message"] or "") if is_waiting else ""
        rows.append(
            {
                "place": order.index(id_) + 1 if is_waiting else None,
                "id": id_,
                "state": mine.state if mine else str(job["status"]).lower(),
                "priority": mine.priority if mine else 0,
                "user": mine.user if mine else "",
                "label": mine.label if mine else "",
                "started": job["started"],
                # Ray's own words, before the driver has begun
                "reason": "its driver is starting" if reason.startswith("Job ") else reason,
            }
        )
    return rows


# -- in a job's driver ---------------------------------------------------------------------------------


class Queue:
    """The queue as the driver of a job sees it: Ray's table of jobs.

    Args:
        job_id: The job's.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._said = ""
        limit = os.environ.get(LIMIT_VARIABLE, "").strip()
        self._per_user = int(limit) if limit.isdecimal() and int(limit) > 0 else None
        if limit and self._per_user is None:
            logger.warning(
                "%s is %r, which is no limit: set it to a number from 1 where the cluster's head is started",
                *(LIMIT_VARIABLE, limit[:40]),
            )

    def wait(
        self,
        is_room: Callable[[], str | None],
        tell: Callable[[str], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        """Return when it is the job's turn.

        Args:
            is_room: What the job's workers lack on the cluster as it is now; None if they fit.
            tell: Gets place and reason, whenever they change.
            is_stopping: Whether somebody has asked for a stop.

        Raises:
            KeyboardInterrupt: Somebody has.
        """
        while True:
            tickets = self._tickets()
            mine = next((t for t in tickets if t.job_id == self._job_id), None)
            if mine is None:
                return  # submitted by other means than hfdist's
            reason = what_it_waits_for(mine, tickets, time.time(), self._per_user) or is_room()
            if reason is None:
                self._write("placing", "its workers are being placed")
                return
            order = [t.job_id for t in in_order(tickets)]
            place = order.index(self._job_id) + 1 if self._job_id in order else 1
            text = f"place {place} of {max(len(order), 1)} in the queue: {reason}"
            if text != self._said:
                self._said = text
                self._write("waiting", text)
                tell(text)
            if is_stopping():
                raise KeyboardInterrupt
            time.sleep(_POLL)

    def begin(self) -> None:
        """The job has its workers."""
        self._write("running", "Job is currently running.")

    def _tickets(self) -> list[Ticket]:
        """Of all jobs that have not ended."""
        found = []
        for job_id, info in _table():
            if info.get("status") in ("PENDING", "RUNNING"):
                made = ticket(job_id, info.get("metadata") or {}, info.get("start_time") or 0)
                found += [made] if made is not None else []
        return found

    def _write(self, state: State, message: str) -> None:
        info = _info(self._job_id)
        if info is None or info.get("status") != "RUNNING":
            return
        info["metadata"] = {**(info.get("metadata") or {}), "queue": state}
        if state == "placing":
            info["metadata"]["turn_at"] = str(int(time.time()))
        info["message"] = message
        _put(self._job_id, info)


def _table() -> list[tuple[str, dict[str, Any]]]:
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental.internal_kv import _internal_kv_list

    prefix = JobInfoStorageClient.JOB_DATA_KEY_PREFIX
    keys = _internal_kv_list(prefix.encode(), namespace=_namespace()) or []
    ids = [key.decode().removeprefix(prefix) for key in keys]
    return [(job_id, info) for job_id in ids if (info := _info(job_id)) is not None]


def _info(job_id: str) -> dict[str, Any] | None:
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(_key(job_id), namespace=_namespace())
    return json.loads(found) if found else None


def _put(job_id: str, info: Mapping[str, Any]) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(
        _key(job_id), json.dumps(info).encode(), overwrite=True, namespace=_namespace()
    )


def _key(job_id: str) -> bytes:
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    return JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job_id).encode()


def _namespace() -> Any:
    from ray._private.ray_constants import KV_NAMESPACE_JOB

    return KV_NAMESPACE_JOB


def _number(text: str, default: int) -> int:
    try:
        return int(text)
    except ValueError:
        return default
