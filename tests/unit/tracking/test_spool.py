"""The spool keeps what it was told, in order, through crashes."""

from __future__ import annotations

import json
import threading

import pytest

from hfdist.errors import UserError
from hfdist.tracking.spool import Spool


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close()


def steps(spool: Spool, most: int = 1000) -> list[int]:
    return [event["step"] for event, _ in spool.pending(most)]


def reopened(spool: Spool) -> Spool:
    spool.close()
    return Spool(spool.folder)


def test_events_are_delivered_in_order_and_once(spool):
    for step in range(10):
        spool.append("metrics", values={"loss": 1.0}, step=step)
    first = spool.pending(4)
    assert [event["step"] for event, _ in first] == [0, 1, 2, 3]
    assert steps(spool) == list(range(10))  # nothing is acknowledged yet
    spool.acknowledge(first[-1][1], len(first))
    assert steps(spool) == [4, 5, 6, 7, 8, 9]
    assert spool.num_pending == 6
    assert not spool.is_delivered

    again = reopened(spool)
    assert steps(again) == [4, 5, 6, 7, 8, 9]
    assert again.num_pending == 6
    assert again.last_step == 9
    again.rewind()
    assert steps(again) == list(range(10))
    assert again.num_pending == 10
    again.close()


def test_a_line_torn_by_a_kill_is_forgotten(spool):
    spool.append("metrics", values={"loss": 1.0}, step=0)
    spool.append("metrics", values={"loss": 1.0}, step=1)
    spool.close()
    path = spool.folder / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = Spool(spool.folder)
    assert again.last_step == 0  # step 1 will be told again
    again.append("metrics", values={"loss": 2.0}, step=1)
    assert steps(again) == [0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    again.close()


def test_a_damaged_line_costs_no_other(spool, caplog):
    for step in range(3):
        spool.append("metrics", values={"loss": 1.0}, step=step)
    spool.close()
    path = spool.folder / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[2])
    again = Spool(spool.folder)
    kinds = [event["kind"] for event, _ in again.pending(10)]
    assert kinds == ["metrics", "damaged", "metrics"]
    assert "damaged" in caplog.text
    again.close()


def test_one_process_at_a_time(spool):
    with pytest.raises(UserError, match="in use"):
        Spool(spool.folder)
    taken = Spool(spool.folder, take_over=True)
    taken.close()
    reopened(spool).close()


def test_threads_do_not_mix_their_lines(spool):
    def write(first: int) -> None:
        for step in range(first, first + 200):
            spool.append(
                "metrics", values={"long name": 1.0} | {str(k): 0.0 for k in range(20)}, step=step
            )

    threads = [threading.Thread(target=write, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = steps(spool)
    assert len(told) == 800
    assert set(told) == {1000 * k + i for k in range(4) for i in range(200)}


def test_what_is_set_aside_counts_as_pending(spool):
    spool.append("artifact", path="a", folder="")
    [(event, place)] = spool.pending(1)
    spool.set_aside(event)
    spool.acknowledge(place, 1)
    assert spool.pending(1) == []
    assert not spool.is_delivered
    again = reopened(spool)
    assert again.num_pending == 1
    again.take_back(again.aside[0])
    assert again.is_delivered
    again.close()
