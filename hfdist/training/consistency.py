"""Do all ranks run the same job with the same code, and do they hold the same parameters?"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfdist import __version__
from hfdist.comm import Communicator
from hfdist.errors import ConfigError, ReplicaError

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig

_RANK_0_ONLY = ("output",)
"""Keys that may differ between machines: only rank 0's value is used."""


def check_agreement(comm: Communicator, config: RunConfig) -> None:
    """Compare job, versions and code with the other ranks'. Collective.

    Raises:
        ConfigError: They differ; names the ranks and the first differing key.
    """
    if comm.world_size == 1:
        return
    mine = _facts(config)
    # A digest does when all is well; only ranks that differ need to say in what.
    if len(set(comm.all_gather_object(_digest(repr(sorted(mine.items())))))) == 1:
        return
    everyone = comm.all_gather_object(mine)
    keys = dict.fromkeys(key for facts in everyone for key in facts)
    for key in keys:
        values = [facts.get(key, "absent") for facts in everyone]
        if len(set(values)) > 1:
            odd, rest = _odd_ones_out(values)
            raise ConfigError(
                f"the workers do not agree on {key}: {_ranks(odd)} {_has(odd)} {values[odd[0]]}, "
                f"{_ranks(rest)} {_has(rest)} {values[rest[0]]}. Start all of them with the same job, "
                "code and versions"
            )


def check_replicas(comm: Communicator, tensors: Iterable[Tensor], flag: int = 0) -> int:
    """Compare a checksum of the ranks' parameters, and let ranks raise flags: one small gather.

    Args:
        tensors: What must be bitwise equal on all ranks, in the same order.
        flag: This rank's, one bit each.

    Returns:
        The flags that any rank has raised.

    Raises:
        ReplicaError: Parameters differ; names the ranks.
    """
    if comm.world_size == 1:
        return flag
    answers = comm.all_gather_object((checksum(tensors), flag))
    sums = [answer[0] for answer in answers]
    if len(set(sums)) > 1:
        odd, rest = _odd_ones_out(sums)
        raise ReplicaError(
            f"the parameters of {_ranks(odd)} differ from those of {_ranks(rest)}: the model's forward "
            "or a hook changes them on one rank only, or a device computes wrongly. "
            "`hfdist resume RUN_DIR` goes on from the newest checkpoint"
        )
    return functools.reduce(operator.or_, (answer[1] for answer in answers))


# -- checksum ------------------------------------------------------------------------------------

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ON_HOST, _CHUNK = 1 << 16, 1 << 22
"""Elements at a time: stay in cache; launch few kernels."""
# Odd constants of splitmix64, as signed 64-bit integers.
_STEP, _MIX1, _MIX2 = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> int:
    """A 64-bit checksum of bits and positions of all elements; computed on their device.

    Every element is mixed with its position by a bijection of 64-bit integers (the finaliser of Steele et
    al., Fast splittable pseudorandom number generators, 2014) and the results are added, so a change in
    one element always shows, and any other with probability 1 - 2^-64.
    """
    total: Tensor | None = None
    offset = 0
    for tensor in tensors:
        flat = _as_integers(tensor)
        for piece in flat.split(_CHUNK_ON_HOST if flat.device.type == "cpu" else _CHUNK):
            positions = torch.arange(
                offset + 1, offset + 1 + len(piece), dtype=torch.int64, device=piece.device
            )
            h = positions.mul_(_STEP).add_(piece)
            h = h.bitwise_xor_(_shifted(h, 30)).mul_(_MIX1)
            h = h.bitwise_xor_(_shifted(h, 27)).mul_(_MIX2)
            h = h.bitwise_xor_(_shifted(h, 31)).sum()
            total = h if total is None else total + h.to(total.device)
            offset += len(piece)
    return 0 if total is None else int(total)


def _shifted(h: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (h >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _as_integers(tensor: Tensor) -> Tensor:
    """The elements' bits, flat."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])


# -- what is compared ----------------------------------------------------------------------------


def _facts(config: RunConfig) -> dict[str, str]:
    """What must be the same, by the name that a message gives it."""
    facts = {
        "the version of hfdist": __version__,
        "the version of torch": str(torch.__version__),
        "the source of hfdist": _digest_of_folder(Path(__file__).parent),
    }
    for key, value in config.flatten().items():
        if key == "task":
            value = Path(value).name  # the folder is the machine's affair
        if key not in _RANK_0_ONLY:
            facts[key] = repr(value)
    facts["the file of the task"] = _digest_of_task(config.task)
    return facts


def _digest_of_task(spec: str) -> str:
    where = spec.rpartition(":")[0]
    try:
        if where.endswith(".py"):
            return _digest(Path(where).read_bytes())
        found = importlib.util.find_spec(where)
        return _digest(Path(found.origin).read_bytes()) if found and found.origin else "absent"
    except (ImportError, OSError, ValueError):
        return "absent"  # if it is on all ranks, loading the task says why


@cache
def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:12]


# -- how it is said ------------------------------------------------------------------------------


def _odd_ones_out(values: Sequence[object]) -> tuple[list[int], list[int]]:
    """The ranks outside the majority, and the majority; in a tie rank 0's side is the majority."""
    counts = Counter(values)
    common = max(values, key=lambda v: counts[v])  # the first of the greatest
    odd = [rank for rank, value in enumerate(values) if value != common]
    return odd, [rank for rank, value in enumerate(values) if value == common]


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:8]] + (["..."] if len(ranks) > 8 else [])
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
