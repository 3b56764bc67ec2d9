"""Streams: data sets without a length, read from their beginning in order, again and again."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset

from hfdist.errors import ConfigError, DataError
from hfdist.tasks.user_code import user_code

logger = logging.getLogger(__name__)

_END = object()
_TRIED = 8
"""Examples in which a state shows whether it leads to the right ones."""


def is_stream(data: Any) -> bool:
    """Whether a data set is read in order: it can be iterated over, and has no length and places."""
    if isinstance(data, (IterableDataset, DataLoader)):
        return True
    return hasattr(data, "__iter__") and not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    )


class Stream:
    """The examples of a streaming data set that this rank reads, without an end: after the last one comes
    the first.

    Where the data set can be divided (`shard_of(rank, world_size)`, or Hugging Face's with a multiple of
    so many shards) a rank reads its own part; else every rank reads all of it.

    It continues from a place by the data set's own `state_dict` and `load_state_dict`, where that proves to
    lead to the next example, and otherwise by reading as many again. `set_epoch` is told the epoch.

    Args:
        data: The data set.
        what: Task and method that gave it, for messages: "Lines.train_data()".
        rank, world_size: Of this process.

    Raises:
        DataError: It cannot be read more than once, or has no example.
    """

    def __init__(self, data: Any, what: str, rank: int = 0, world_size: int = 1) -> None:
        self._whole, self._what, self._rank, self._world_size = data, what, rank, world_size
        self._name = type(data).__name__
        if isinstance(data, DataLoader):
            raise DataError(
                f"{what} returns a DataLoader, which gives batches: return the data set itself; the size "
                "of batches is the job's"
            )
        self._set_sharded(_can_be_divided(data, world_size))
        if self._begun is None and iter(self._data) is self._data:
            raise DataError(
                f"{what} returns a {self._name}, which can be read only once: return an IterableDataset, "
                "whose __iter__ begins again"
            )
        self._epoch = self._offset = 0
        self._examples: Iterator[Any] | None = None
        self._ahead: list[Any] = []
        """Examples that were looked at and are still to come."""
        self._is_state_exact = False

    @property
    def is_sharded(self) -> bool:
        """Whether this rank reads its own part of the data only."""
        return self._is_sharded

    @property
    def num_read(self) -> int:
        """Examples of the present pass so far."""
        return self._offset

    def first(self, n: int) -> list[Any]:
        """The first examples, which are still to come; also tries whether the state leads where it should.

        Raises:
            DataError: The stream fails, or is empty.
        """
        self._begin(0)
        found = list(self._some(n))
        if not found:
            raise DataError(f"{self._what} returns an empty {self._name}: it gives no example")
        if self._begun is None:
            self._ahead = found
            return found
        state, following = self._own_state(), list(self._some(_TRIED))
        self._load(state)
        self._is_state_exact = _same(following, list(self._some(_TRIED))) and not (
            _is_hugging_face(self._data) and _has_shuffle_buffer(self._data)
        )
        if not self._is_state_exact:
            logger.warning(
                "%s.state_dict() of %s does not lead to the next example (a shuffled buffer is lost, or the "
                "state changes only after the example is given): a resumed run reads from the start of the "
                "epoch to find its place",
                self._name,
                self._what,
            )
        self._begin(0)
        return found

    def read(self) -> Any:
        """The next example.

        Raises:
            DataError: The stream fails, or is empty.
        """
        if self._ahead:
            self._offset += 1
            return self._ahead.pop(0)
        example = self._read()
        if example is _END:
            self._begin(self._epoch + 1)
            example = self._read()
        if example is _END:
            raise DataError(f"{self._what} returns an empty {self._name}: it gives no example")
        self._offset += 1
        return example

    def once(self) -> Iterator[Any]:
        """The examples from the first to the last."""
        self._begin(0)
        while (example := self._read()) is not _END:
            self._offset += 1
            yield example

    def state(self) -> dict[str, Any]:
        """Where the stream stands: plain values and tensors."""
        is_exact = self._is_state_exact and not self._ahead and self._examples is not None
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "is_sharded": self._is_sharded,
            "world_size": self._world_size,
            "own": self._own_state() if is_exact else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where a `state` was taken.

        Raises:
            ConfigError: It is the state of a rank's own part, and the number of ranks is another one.
            DataError: The stream fails.
        """
        if state["is_sharded"] and state["world_size"] != self._world_size:
            raise ConfigError(
                f"{self._what} is divided among workers, and the run was on {state['world_size']} of them: "
                f"go on with launch.workers={state['world_size']}"
            )
        if state["is_sharded"] != self._is_sharded:
            self._set_sharded(state["is_sharded"])
        self._begin(state["epoch"])
        if state["own"] is not None:
            self._load(state["own"])
            self._offset = state["offset"]
            return
        if state["offset"]:
            logger.info("reading %d examples of %s again", state["offset"], self._what)
        for _ in range(state["offset"]):
            if self._read() is _END:
                raise DataError(
                    f"{self._what} ends before example {state['offset']}, up to which the run had read: it "
                    "must give the same examples as before"
                )
            self._offset += 1

    # -- inside ------------------------------------------------------------------------------------

    def _set_sharded(self, is_sharded: bool) -> None:
        self._is_sharded, self._data = is_sharded, self._whole
        if is_sharded:
            self._data = _part(self._whole, self._what, self._rank, self._world_size)
        self._loaded: Any = None
        """State that the data set was given and may look at only when the next example is asked for."""
        self._begun: Any = None
        """State before the first example; None where the data set keeps none."""
        if hasattr(self._data, "state_dict") and hasattr(self._data, "load_state_dict"):
            self._begun = self._own_state()

    def _begin(self, epoch: int) -> None:
        self._epoch, self._offset, self._ahead = epoch, 0, []
        if hasattr(self._data, "set_epoch"):
            with user_code(
                f"{self._name}.set_epoch() of {self._what}", type(self._data), DataError
            ):
                self._data.set_epoch(epoch)
        if self._begun is not None:  # many keep their place in themselves
            self._load(self._begun)
        else:
            self._iterate()

    def _load(self, state: Any) -> None:
        with user_code(
            f"{self._name}.load_state_dict() of {self._what}", type(self._data), DataError
        ):
            self._data.load_state_dict(copy.deepcopy(state))
        self._iterate()
        self._loaded = state

    def _iterate(self) -> None:
        with user_code(f"{self._name}.__iter__() of {self._what}", type(self._data), DataError):
            self._examples = iter(self._data)

    def _read(self) -> Any:
        assert self._examples is not None
        where = f"example {self._offset} of {self._name} of {self._what}"
        with user_code(where, type(self._data).__iter__, DataError):
            example = next(self._examples, _END)
        self._loaded = None
        return example

    def _some(self, n: int) -> Iterator[Any]:
        for _ in range(n):
            example = self._read()
            if example is _END:
                return
            yield example

    def _own_state(self) -> Any:
        if self._loaded is not None:
            return copy.deepcopy(self._loaded)
        with user_code(f"{self._name}.state_dict() of {self._what}", type(self._data), DataError):
            state = self._data.state_dict()
        return _plain(state, f"{self._name}.state_dict() of {self._what}")


def _can_be_divided(data: Any, world_size: int) -> bool:
    if hasattr(data, "shard_of"):
        return True
    return _is_hugging_face(data) and world_size > 1 and data.num_shards % world_size == 0


def _part(data: Any, what: str, rank: int, world_size: int) -> Any:
    """This rank's part of a data set that can be divided."""
    if hasattr(data, "shard_of"):
        with user_code(
            f"{type(data).__name__}.shard_of() of {what}", type(data).shard_of, DataError
        ):
            return data.shard_of(rank, world_size)
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(data, rank, world_size)


def _is_hugging_face(data: Any) -> bool:
    datasets = sys.modules.get("datasets")  # who has such a data set has loaded it
    return datasets is not None and isinstance(data, datasets.IterableDataset)


def _has_shuffle_buffer(data: Any) -> bool:
    """Whether a Hugging Face stream keeps examples in memory that its state says nothing of."""
    found, steps = [getattr(data, "_ex_iterable", None)], 0
    while found and steps < 1000:
        step, steps = found.pop(), steps + 1
        if type(step).__name__.startswith("BufferShuffled"):
            return True
        found += [x for x in (getattr(step, "ex_iterable", None),) if x is not None]
        found += list(getattr(step, "ex_iterables", None) or ())
    return False


def _plain(state: Any, what: str) -> Any:
    """A copy of a state as checkpoints hold it."""
    if isinstance(state, Mapping):
        return {key: _plain(value, what) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([_plain(value, what) for value in state])
    if isinstance(state, Tensor):
        return state.detach().clone()
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if hasattr(state, "item") and getattr(state, "ndim", 1) == 0:  # numpy's numbers
        return state.item()
    raise DataError(
        f"{what} holds a {type(state).__name__}: a checkpoint holds tensors, numbers, strings, None, lists, "
        "tuples and dicts"
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two examples are equal for certain."""
    (ours, spec), (theirs, other) = tree_flatten(a), tree_flatten(b)
    if spec != other:
        return False
    try:
        return all(
            torch.equal(x, y)
            if isinstance(x, Tensor) and isinstance(y, Tensor)
            else bool(getattr(x == y, "all", lambda found=(x == y): found)())
            for x, y in zip(ours, theirs)
        )
    except Exception:  # what cannot be compared
        return False
