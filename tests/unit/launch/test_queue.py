"""Whose turn it is: priorities, the order of submission, limits, and jobs that get their workers."""

from __future__ import annotations

from typing import Any

import pytest

from hfdist.errors import ConfigError
from hfdist.launch.ray import queue
from hfdist.launch.ray.queue import Ticket, in_order, listed, what_it_waits_for


def job(name: str, since: float = 0, state: Any = "waiting", **more: Any) -> Ticket:
    return Ticket(job_id=name, since=since, state=state, **{"user": "ann", **more})


def turns(*tickets: Ticket, per_user: int | None = None) -> dict[str, str | None]:
    return {
        t.job_id: what_it_waits_for(t, tickets, 100.0, per_user)
        for t in tickets
        if t.state == "waiting"
    }


def test_first_come_first_served_unless_priorities_differ() -> None:
    assert turns(job("b", 2), job("a", 1)) == {"a": None, "b": "a is before it"}
    found = turns(job("low", 1), job("high", 9, priority=5), job("last", 3))
    assert found == {
        "low": "high (priority 5) is before it",
        "high": None,
        "last": "high (priority 5) is before it",
    }
    assert [t.job_id for t in in_order([job("a", 2), job("b", 1), job("c", 3, priority=1)])] == [
        *("c", "b", "a")
    ]


def test_a_limit_holds_back_its_own_jobs_alone() -> None:
    running = job("r", state="running", label="night")
    one, two = job("n1", 1, label="night", at_most=1), job("n2", 2, label="night", at_most=1)
    found = turns(running, one, two, job("day", 3))
    assert found["n1"] == "at most 1 jobs of label night run at a time, and 1 do"
    assert found["day"] is None
    assert turns(one, two) == {"n1": None, "n2": "n1 is before it"}
    assert turns(job("r", state="placing", label="night"), one)["n1"] is not None
    of_user = job("m", at_most=2)
    others = [job(f"r{k}", state="running") for k in range(2)]
    assert turns(of_user, others[0])["m"] is None
    assert turns(of_user, *others)["m"] == "at most 2 jobs of user ann run at a time, and 2 do"
    assert turns(of_user, *[job(f"b{k}", state="running", user="bob") for k in range(3)]) == {
        "m": None
    }


def test_a_cluster_may_have_a_limit_of_its_own() -> None:
    found = turns(job("a"), job("r", state="running"), job("b", 5, user="bob"), per_user=1)
    assert found["a"] == "at most 1 jobs of a user run at a time, and 1 of ann do"
    assert found["b"] is None


def test_who_gets_workers_is_not_overtaken_for_a_while() -> None:
    placing = job("p", state="placing", turn_at=50.0)
    assert turns(placing, job("a", priority=9)) == {"a": "p is getting its workers"}
    assert turns(job("p", state="placing", turn_at=1.0), job("a")) == {"a": None}


def test_exactly_one_goes_at_a_time() -> None:
    import random

    for seed in range(200):
        rng = random.Random(seed)
        tickets = [
            job(
                f"j{k}",
                rng.randrange(4),
                rng.choice(["waiting", "waiting", "running"]),
                priority=rng.randrange(3),
                label=rng.choice(["", "x"]),
                at_most=rng.choice([None, 1, 2]),
                user=rng.choice(["ann", "bob"]),
            )
            for k in range(6)
        ]
        free = [name for name, reason in turns(*tickets).items() if reason is None]
        assert len(free) <= 1
        if not free:  # then every one that waits is held back by a limit
            assert all("at most" in str(reason) for reason in turns(*tickets).values())


def test_what_a_submission_says() -> None:
    said = queue.metadata(3, "night", 2)
    made = queue.ticket("a", said, 7.0)
    assert made is not None
    assert (made.priority, made.label, made.at_most, made.state) == (3, "night", 2, "waiting")
    assert queue.ticket("a", {"task": "x"}, 0) is None
    for wrong in ((2000, "", None), (0, "", 0), (0, "x" * 300, None), (0, "two\nlines", None)):
        with pytest.raises(ConfigError):
            queue.metadata(*wrong)


@pytest.mark.parametrize(
    ("text", "is_limit"), [("2", True), ("", True), ("two", False), ("0", False)]
)
def test_a_limit_of_the_cluster_that_is_none_is_told(
    text: str, is_limit: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(queue.LIMIT_VARIABLE, text)
    queue.Queue("job")
    assert ("HFDIST_MAX_RUNS_PER_USER" not in caplog.text) == is_limit


def test_the_list_shows_places_and_reasons() -> None:
    def row(name: str, status: str, state: str, message: str, started: int, **more: str) -> Any:
        return {
            "id": name,
            "status": status,
            "message": message,
            "started": started,
            "queue": {"queue": state, "user": "ann", **more},
        }

    rows = listed(
        [
            row("done", "SUCCEEDED", "running", "Job finished successfully.", 1),
            row("late", "RUNNING", "waiting", "place 2 of 2 in the queue: night is before it", 5),
            row("new", "PENDING", "waiting", "Job has not started yet.", 9, priority="3"),
            row("night", "RUNNING", "running", "Job is currently running.", 2),
        ]
    )
    assert [(r["place"], r["id"], r["state"]) for r in rows] == [
        (None, "night", "running"),
        (1, "new", "waiting"),
        (2, "late", "waiting"),
    ]
    assert rows[1]["reason"] == "its driver is starting"
    assert "night is before it" in rows[2]["reason"]
