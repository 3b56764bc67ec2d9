"""Sums of squared per-example gradients by BackPACK, for plain feed-forward networks.

BackPACK needs no per-example gradients for a Linear layer: (g_out^2)' (input^2) is one product.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PARAMETER_FREE = {
    f"torch.nn.modules.{name}" for name in ("activation", "dropout", "padding", "pooling")
}
_SAVED = "sum_grad_squared"


class Unsupported(Exception):
    """BackPACK does not cover this model, or not this use of it."""


def is_supported(model: nn.Module) -> bool:
    """Whether the model is a chain of layers whose squares BackPACK computes exactly."""
    leaves = _leaves(model)
    if leaves is None or len(set(map(id, leaves))) < len(leaves):
        return False
    owned = [id(p) for leaf in leaves for p in leaf.parameters()]
    return len(set(owned)) == len(owned) and all(map(_is_supported_leaf, leaves))


def _leaves(module: nn.Module) -> list[nn.Module] | None:
    """Layers of nested nn.Sequential in order of execution; None for any other container."""
    if type(module) is not nn.Sequential:
        return None if any(module.children()) else [module]
    found = []
    for child in module:
        leaves = _leaves(child)
        if leaves is None:
            return None
        found += leaves
    return found


def _is_supported_leaf(leaf: Any) -> bool:
    kind = type(leaf)  # exact: a subclass may compute anything
    if leaf._forward_hooks or leaf._backward_hooks or leaf._backward_pre_hooks:
        return False
    if kind in _CONV:
        return leaf.padding_mode == "zeros" and not isinstance(leaf.padding, str)
    if kind is nn.Flatten:
        return leaf.start_dim >= 1
    if kind is nn.Linear or kind in _NORM or kind is nn.Identity:
        return True
    return kind.__module__ in _PARAMETER_FREE and not any(leaf.parameters())


def expanded_numel(model: nn.Module) -> int:
    """Most numbers that one example needs at a time: convolutions do expand their gradients."""
    return max((m.weight.numel() for m in model.modules() if isinstance(m, _CONV)), default=1)


def _shadow(module: nn.Module) -> nn.Module:
    """The same layers on the same storage, free of hooks and with parameters of their own.

    BackPACK's hooks, its saved inputs and its results on the parameters stay on the shadow.
    """
    twin: Any = copy.copy(module)
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        twin.__dict__[name] = type(twin.__dict__[name])()
    twin._buffers = dict(module._buffers)
    twin._parameters = {
        k: None if p is None else nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for k, p in module._parameters.items()
    }
    twin._modules = {k: _shadow(m) for k, m in module._modules.items() if m is not None}
    if getattr(twin, "inplace", False):
        twin.inplace = False  # backward hooks forbid in-place changes of a layer's output
    return twin


def sum_of_squares(
    model: nn.Module,
    outputs_of: Callable[[nn.Module], Sequence[Tensor]],
    cotangents: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> list[Tensor | None]:
    """sum_i (J_i' c_i)^2 for every tensor; None for one that is not of the model.

    Args:
        model: A model for which `is_supported`, batch norm with fixed statistics.
        outputs_of: Evaluates its argument, a twin of the model, on N examples.
        cotangents: c, one for every output, [N, ...].
        tensors: The model's parameters of interest.

    Raises:
        Unsupported: The model is called more than once, or on something else than N rows.
    """
    from backpack import backpack, hook_run_extensions, hook_store_io
    from backpack.extensions import SumGradSquared

    n = cotangents[0].shape[0]
    twin = _shadow(model)
    calls: dict[int, int] = {}

    def check(layer: nn.Module, args: tuple[Any, ...]) -> None:
        calls[id(layer)] = calls.get(id(layer), 0) + 1
        x = args[0]
        if calls[id(layer)] > 1 or x.shape[0] != n or (type(layer) is nn.Linear and x.ndim != 2):
            raise Unsupported

    for layer in twin.modules():
        if layer._parameters:
            layer.register_forward_pre_hook(check)
            # What backpack.extend does, less its global list that never forgets a hook.
            layer.register_forward_hook(hook_store_io)
            layer.register_full_backward_hook(hook_run_extensions)

    twins = {id(p): q for p, q in zip(model.parameters(), twin.parameters())}
    with torch.enable_grad(), backpack(SumGradSquared()), warnings.catch_warnings():
        # The first layer's input needs no gradient, and its hook says so.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.autograd.backward(outputs_of(twin), cotangents)
    return [getattr(twins.get(id(t)), _SAVED, None) for t in tensors]
