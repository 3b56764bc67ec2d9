"""Streams: a step sees the next examples, and a stream that goes on sees the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hfdist import Task
from hfdist.data.config import BatchesConfig
from hfdist.data.plan import plan_stream_step
from hfdist.data.stream import Stream, is_stream
from hfdist.data.stream_loader import StreamLoader, stream_batches
from hfdist.errors import ConfigError, DataError

N = 7


class Plain(IterableDataset[Any]):
    """Begins again whenever it is asked to."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(N))


class Positioned(IterableDataset[Any]):
    """Keeps its place in itself, as a file does."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < N:
            self.position += 1
            yield self.position - 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Started(Positioned):
    """Goes on from where it was loaded, in every pass that follows."""

    def __iter__(self) -> Iterator[Any]:
        for k in range(self.position, N):
            self.position = k + 1
            yield k


class Late(Positioned):
    """Its state leads to the example that was given last."""

    def __iter__(self) -> Iterator[Any]:
        while self.position < N:
            yield self.position
            self.position += 1


class Shuffled(Positioned):
    """Another order in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = list(range(N))
        random.Random(self.epoch).shuffle(order)
        while self.position < N:
            self.position += 1
            yield order[self.position - 1]


class Itself(Positioned):
    """An iterator with a state."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> int:
        if self.position == N:
            raise StopIteration
        self.position += 1
        return self.position - 1


def hugging_face(**settings: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"k": list(range(N))})
    found = rows.to_iterable_dataset(num_shards=settings.get("num_shards", 1))
    return found.shuffle(seed=3, buffer_size=4) if settings.get("shuffle") else found


KINDS = {
    **{kind.__name__: kind for kind in (Plain, Positioned, Started, Late, Shuffled, Itself)},
    "hugging-face": hugging_face,
    "hugging-face-shuffled": lambda: hugging_face(shuffle=True),
}


def values(stream: Stream, n: int) -> list[int]:
    read = [stream.read() for _ in range(n)]
    return [example["k"] if isinstance(example, dict) else example for example in read]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_exactly_from_any_place(kind: str) -> None:
    stream = Stream(KINDS[kind](), "T.train_data()")
    stream.first(3)
    undisturbed = values(stream, 3 * N)
    assert sorted(undisturbed[:N]) == list(range(N))
    assert len(set(map(tuple, (undisturbed[:N], undisturbed[N : 2 * N])))) == (
        2 if "huffled" in kind else 1
    )
    for done in (0, 1, 2, N - 1, N, N + 1, 2 * N, 2 * N + 3):
        before = Stream(KINDS[kind](), "T.train_data()")
        before.first(2)
        values(before, done)
        state = before.state()
        after = Stream(KINDS[kind](), "T.train_data()")
        after.first(4)
        after.restore(state)
        assert values(after, 3 * N - done) == undisturbed[done:], done


def test_a_state_that_leads_astray_is_told_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    for kind, is_exact in ((Late, False), (Positioned, True), (Plain, True)):
        caplog.clear()
        stream = Stream(kind(), "T.train_data()")
        stream.first(2)
        assert ("does not lead to the next example" in caplog.text) is not is_exact
        values(stream, 2)
        assert (stream.state()["own"] is not None) is (kind is Positioned)


class Divided(Plain):
    def __init__(self, numbers: range = range(N)) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers)

    def shard_of(self, rank: int, world_size: int) -> Divided:
        return Divided(self.numbers[rank::world_size])


def test_a_divided_stream_gives_each_rank_its_own_and_wants_as_many_ranks_again() -> None:
    streams = [Stream(Divided(), "T.train_data()", rank, 2) for rank in (0, 1)]
    for stream in streams:
        stream.first(2)
    assert [values(stream, 4) for stream in streams] == [[0, 2, 4, 6], [1, 3, 5, 1]]
    with pytest.raises(ConfigError, match=r"launch\.workers=2"):
        Stream(Divided(), "T.train_data()", 0, 3).restore(streams[0].state())


def test_shards_of_hugging_face_are_divided_where_they_can_be() -> None:
    made = [Stream(hugging_face(num_shards=2), "T.train_data()", rank, 2) for rank in (0, 1)]
    assert all(stream.is_sharded for stream in made)
    for stream in made:
        stream.first(1)
    assert sorted(values(made[0], 4) + values(made[1], 3)) == list(range(N))
    assert not Stream(hugging_face(num_shards=2), "T.train_data()", 0, 3).is_sharded
    alone = Stream(hugging_face(num_shards=2), "T.train_data()")
    alone.first(1)
    values(alone, 3)
    made[0].restore(alone.state())  # what one rank read whole, two read whole as well
    assert values(made[0], 2) == values(alone, 2)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("sizes", [(5, None, None), (5, 2, 3), (4, 6, None), (6, 0.5, None)])
def test_every_rank_count_evaluates_a_steps_examples_once(
    is_sharded: bool, microbatch: int | None, sizes: tuple[Any, ...]
) -> None:
    config = BatchesConfig(
        gradient=sizes[0], curvature=sizes[1], line_search=sizes[2], microbatch=microbatch
    )
    for world_size in (1, 2, 3):
        plans = [
            plan_stream_step(config, step=3, rank=r, world_size=world_size, is_sharded=is_sharded)
            for r in range(world_size)
        ]
        for role in ("gradient", "curvature", "line_search"):
            roles = [getattr(plan, role) for plan in plans]
            taken = [m for role in roles for m in role.microbatches]
            assert sum(len(m.indices) for m in taken) == roles[0].num_examples
            assert len({m.number for m in taken}) == len(taken)
            if not is_sharded:  # the same examples, whatever the number of ranks
                places = sorted(int(k) for m in taken for k in m.indices)
                assert places == list(range(places[0], places[0] + len(places)))
        reads = [plan.num_read for plan in plans]
        if is_sharded:
            parts = (max(sizes[0], plans[0].curvature.num_examples), sizes[2] or 0)
            assert sum(reads) >= sum(parts)
        else:
            assert len(set(reads)) == 1


class Numbers(Task):
    def model(self) -> nn.Module:
        return nn.Identity()

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs.sum()


def loader(data: Any, rank: int = 0, world_size: int = 1, **settings: Any) -> StreamLoader:
    stream = Stream(data, "T.train_data()", rank, world_size)
    made = StreamLoader(Numbers(), stream, torch.device("cpu"), torch.float32, **settings)
    made.first(2)
    return made


@pytest.mark.parametrize("how", ["thread", "process"])
def test_steps_and_the_state_between_them(how: str) -> None:
    config = BatchesConfig(gradient=3, line_search=1)
    plans = [
        plan_stream_step(config, step=s, rank=0, world_size=1, is_sharded=False) for s in range(5)
    ]
    for resumed_at in range(4):
        made = loader(Positioned(), in_process=how == "process")
        states, seen = [made.state()], []
        first = 0
        for again in (False, True):
            if again:
                made = loader(Positioned(), in_process=how == "process")
                made.restore(states[resumed_at])
                seen, first = seen[:resumed_at], resumed_at
            made.expect((s, plans[s]) for s in range(first, 5))
            for step in range(first, 5):
                made.begin(step, plans[step])
                if step < 4:
                    made.prepare(step + 1, plans[step + 1])
                seen.append([made.load(m).tolist() for m in plans[step].microbatches()])
                states.append(made.state())  # not that of what is read ahead
            made.close()
            endless = [k % N for k in range(20)]
            assert seen == [[endless[4 * s : 4 * s + 3], [endless[4 * s + 3]]] for s in range(5)]
        if how == "process":
            break  # processes are slow to start; the thread has tried all places


def test_evaluation_is_one_pass_shared_by_ranks() -> None:
    for kind in (Plain, Positioned):
        for world_size in (1, 2, 3):
            batches = [
                list(
                    stream_batches(
                        *(Numbers(), Stream(kind(), "T.eval_data()"), 2, rank, world_size),
                        *(torch.device("cpu"), torch.float32),
                    )
                )
                for rank in range(world_size)
            ]
            found = sorted(int(k) for mine in batches for batch in mine for k in batch)
            assert found == list(range(N))


class Broken(Plain):
    def __iter__(self) -> Iterator[Any]:
        yield 0
        raise ZeroDivisionError("no such line")


class Odd(Positioned):
    def state_dict(self) -> dict[str, Any]:
        return {"handle": object()}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: (k for k in range(3)), ["only once", "IterableDataset"]),
        (lambda: map(str, range(3)), ["only once"]),
        (lambda: DataLoader(range(3)), ["DataLoader", "`batches`|the job's"]),  # type: ignore[arg-type]
        (Broken, ["example 0 fails", "Broken of T.train_data()", "no such line"]),
        (Odd, ["object", "checkpoint"]),
        (lambda: Divided(range(0)), ["empty"]),
    ],
)
def test_what_cannot_be_read_is_one_message(data: Any, words: list[str]) -> None:
    assert is_stream(data())
    with pytest.raises(DataError) as told:
        Stream(data(), "T.train_data()").first(3)
    for word in words:
        assert any(part in str(told.value) for part in word.split("|")), told.value
