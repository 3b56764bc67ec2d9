"""Nested state <-> JSON and named tensors.

JSON objects hold dicts whose keys are plain strings. What JSON lacks is tagged with a `$` key:
{"$tensor": name}, {"$dict": [[key, value], ..]}, {"$tuple": [..]}, {"$float": "nan"}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hfdist.checkpoint.identity import raw_bytes
from hfdist.comm.balance import balanced

# What safetensors stores under its own dtype, in every version that is supported. The bytes of any
# other dtype are stored as uint8 beside the dtype's name.
_NATIVE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


class Encoder:
    """Encodes one state; `tensors` then names every distinct tensor, in the order of the state.

    Tensors that are the same view of the same storage (tied weights) are stored once, and are one
    tensor again after decoding. Other views are stored as values of their own.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # "" and the header's own key cannot name a tensor in a safetensors file.
        self._taken = {"", "__metadata__"}
        self._aliases: dict[Any, str] = {}

    def encode(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """JSON value of `value`.

        Raises:
            TypeError: It holds what a checkpoint cannot; the message says where.
        """
        match value:
            case None | bool() | str():
                return value
            case int():
                return int(value)
            case float():
                return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
            case Tensor():
                return self._reference(value, path)
            case list() | tuple():
                items = [self.encode(v, (*path, str(i))) for i, v in enumerate(value)]
                return items if isinstance(value, list) else {"$tuple": items}
            case Mapping():
                return self._encode_mapping(value, path)
        raise TypeError(
            f"{'/'.join(path) or 'the state'} is a {type(value).__name__}: a checkpoint holds tensors, "
            "numbers, strings, bools, None, lists, tuples and dicts"
        )

    def _encode_mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(
                    f"{'/'.join(path) or 'the state'} has the key {key!r}: keys must be strings or ints"
                )
        pairs = [(k, self.encode(v, (*path, str(k)))) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return dict(pairs)
        return {"$dict": [list(pair) for pair in pairs]}

    def _reference(self, tensor: Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise TypeError(
                f"{'/'.join(path)} is a sparse, quantized or meta tensor: a checkpoint holds dense ones"
            )
        identity = _identity(tensor)
        name = self._aliases.get(identity) if identity is not None else None
        if name is None:
            name = self._new_name(path)
            self.tensors[name] = tensor
            if identity is not None:
                self._aliases[identity] = name
        reference: dict[str, Any] = {"$tensor": name}
        if tensor.dtype not in _NATIVE:
            reference |= {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
            }
        return reference

    def _new_name(self, path: tuple[str, ...]) -> str:
        # Lone surrogates are legal in a Python string and not in UTF-8.
        name = base = "/".join(path).encode("utf-8", "backslashreplace").decode()
        number = 1
        while name in self._taken:
            number += 1
            name = f"{base}#{number}"
        self._taken.add(name)
        return name


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0:  # empty storages share the null address
        return None
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.device,
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The state of a JSON value; `tensor` gives a stored tensor by name.

    Raises:
        KeyError: A tensor or a tag that is not known.
    """
    if isinstance(value, list):
        return [decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next((k for k in value if k.startswith("$")), None)
    match tag:
        case None:
            return {k: decode(v, tensor) for k, v in value.items()}
        case "$tensor":
            return _dereference(value, tensor)
        case "$dict":
            return {k: decode(v, tensor) for k, v in value["$dict"]}
        case "$tuple":
            return tuple(decode(v, tensor) for v in value["$tuple"])
        case "$float":
            return float(value["$float"])
    raise KeyError(tag)


def _dereference(reference: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Tensor:
    stored = tensor(reference["$tensor"])
    if "dtype" not in reference:
        return stored
    return stored.view(getattr(torch, reference["dtype"])).view(reference["shape"])


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory as a safetensors file takes it: dense, of a dtype of its own."""
    if tensor.dtype not in _NATIVE:
        stored = raw_bytes(tensor)
    else:
        stored = tensor.detach().resolve_neg().cpu().contiguous()
    if stored.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        stored = stored.clone(memory_format=torch.contiguous_format)
    return stored


def shares(tensors: Mapping[str, Tensor], world_size: int) -> list[list[str]]:
    """Names for each rank to write, balanced by bytes."""
    names = sorted(tensors)
    sizes = [tensors[name].nbytes for name in names]
    return [[names[i] for i in mine] for mine in balanced(sizes, world_size)]
