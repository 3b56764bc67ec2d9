"""Which model a checkpoint belongs to, and a digest that tells two parameter sets apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from hfdist.errors import CheckpointError


def parameters_sha256(named_tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the sorted order of the names.

    Sorted, so that the digest does not depend on the order in which a model registers its parts; nor
    does it depend on the device, the strides or shared storage. Equal digests mean equal bits.

    Args:
        named_tensors: For example `dict(model.named_parameters())`.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(named_tensors):
        t = named_tensors[name].detach()
        # JSON delimits the fields: no name can imitate another tensor's dtype or shape.
        digest.update(json.dumps([name, _dtype_name(t), list(t.shape)]).encode())
        digest.update(raw_bytes(t).numpy().data)
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's elements in row-major order as bytes, uint8 [numel * itemsize] on the host."""
    t = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return t.reshape(-1).view(torch.uint8)


def check(saved: Mapping[str, Tensor] | None, model_state: Mapping[str, Tensor]) -> None:
    """Whether saved parameters and buffers fit a model: same names, shapes and dtypes.

    Args:
        saved: Name -> tensor of a checkpoint.
        model_state: Name -> tensor of the model, for example `model.state_dict()`.

    Raises:
        CheckpointError: The first difference, in the model's order, and what to do.
    """
    if not isinstance(saved, Mapping) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise CheckpointError("the checkpoint holds no model: start a new run")
    difference = _first_difference(saved, model_state)
    if difference is not None:
        raise CheckpointError(
            f"the checkpoint is of another model: {difference}. Build the model as the run did "
            "(task, task_args and dtype are in its config.yaml), or start a new run"
        )


def _first_difference(saved: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> str | None:
    for name, t in model_state.items():
        if name not in saved:
            return f"the model has {name!r} {list(t.shape)}, the checkpoint has no such tensor"
        s = saved[name]
        if s.shape != t.shape:
            return f"{name!r} has shape {list(s.shape)} in the checkpoint and {list(t.shape)} in the model"
        if s.dtype != t.dtype:
            return (
                f"{name!r} is {_dtype_name(s)} in the checkpoint and {_dtype_name(t)} in the model"
            )
    for name, s in saved.items():
        if name not in model_state:
            return f"the checkpoint has {name!r} {list(s.shape)}, the model has no such tensor"
    return None


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
