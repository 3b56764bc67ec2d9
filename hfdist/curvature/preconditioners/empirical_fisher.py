"""Diagonal of the empirical Fisher matrix, Martens 2010, section 4.7.

diag(F) = 1/N sum_i g_i^2, where g_i is the gradient of example i's loss. The functions here give
local sums over a microbatch; the caller adds them over microbatches and ranks and divides once.

g_i = J_i' c_i: c_i is the gradient of the (unnormalised) loss in example i's outputs, J_i the
Jacobian of these outputs. So the g_i add up to the batch's gradient whatever the loss's normaliser
is, and an example whose targets are all padding has g_i = 0.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import backpack_squares
from hfdist.curvature.preconditioners.stateless import UntouchedModel, untouched
from hfdist.devices import rng_states, seeded, set_rng_states
from hfdist.tasks.task import Batch, Outputs, Weighted, num_examples

_log = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Batch], Outputs]
LossFunction = Callable[[Outputs, Batch], Tensor | Weighted]


def sum_of_squared_gradients(
    params: ParameterVector,
    model: nn.Module,
    loss_fn: LossFunction,
    forward: Forward,
    batch: Batch,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    use_backpack: bool = True,
    max_bytes: int = 2**28,
) -> Tensor:
    """sum_i g_i^2 over the examples of a batch, [P]; zeros for unused parameters.

    BackPACK where it covers every layer; torch.func's per-example gradients elsewhere; a loop over
    the examples where torch.func cannot. Neither the model, its gradients, nor the global random
    numbers change. Batch norm in training mode keeps the batch's statistics fixed. Dropout draws
    the masks of a forward pass from the present random state, if the batch fits `max_bytes`; else
    the masks of such passes over its parts.

    Args:
        params: The trainable tensors of `model` to differentiate in.
        model: The model, in the mode (train, eval) that is meant.
        loss_fn: (outputs, batch) -> a scalar, or a pair (sum, weight).
        forward: (model, batch) -> outputs.
        batch: A pytree of tensors whose leading axis is the example axis.
        reduction: What a scalar loss is over the examples; a pair is always taken as a sum.
        use_backpack: Allow BackPACK.
        max_bytes: Bound of the memory for per-example gradients.

    Returns:
        The local sum, of the parameters' dtype, [P].
    """
    model = getattr(model, "_orig_mod", model)  # torch.func cannot look into compiled code
    n = num_examples(batch)
    device = params.device
    with seeded(device), untouched(model, forward) as pure:
        start = rng_states(device)
        outputs = pure.record(batch)
        is_random = any(not torch.equal(s, start[k]) for k, s in rng_states(device).items())
        squares = _Squares(params, pure, loss_fn, reduction, n)
        whole = squares.cotangents(outputs, batch, n)

        def accumulate(method: Callable[..., list[Tensor | None]], size: int) -> Tensor:
            total = params.zeros()
            part_of = _Slicer(batch, n)
            set_rng_states(device, start)
            for low in range(0, n, size):
                high = min(low + size, n)
                part = batch if size >= n else part_of(low, high)
                before = rng_states(device)
                if not is_random or size >= n:
                    c = [w[low:high] for w in whole] if whole is not None else None
                else:  # the masks of this part decide its outputs, hence its cotangents
                    with torch.no_grad():
                        c = squares.cotangents(pure(model, part), part, high - low)
                    set_rng_states(device, before)
                total += params.flatten(method(part, c, high - low))
            return total

        if whole is not None and not whole:
            return params.zeros()  # the loss does not depend on the outputs
        itemsize = torch.finfo(params.dtype).bits // 8
        if use_backpack and whole and backpack_squares.is_supported(model):
            size = _at_most(n, max_bytes, itemsize * backpack_squares.expanded_numel(model))
            try:
                return accumulate(squares.by_backpack, size)
            except (backpack_squares.Unsupported, NotImplementedError):
                _log.debug("BackPACK does not cover this use of %s", type(model).__name__)
        try:
            return accumulate(squares.by_vmap, _at_most(n, max_bytes, itemsize * params.numel))
        except Exception as e:  # user code under vmap can fail in any way; the loop tells the truth
            _warn_of_loop(type(model).__name__, str(e).partition("\n")[0])
        return accumulate(squares.by_loop, 1)


def empirical_fisher_diagonal(
    model: nn.Module,
    loss_func: Callable[[Tensor, Any], Tensor],
    inputs: Any,
    targets: Any,
    reduction: Literal["mean", "sum"],
    use_backpack: bool = True,
    params: ParameterVector | None = None,
) -> Tensor:
    """Empirical Fisher diagonal in a model's trainable parameters, in their order, [P].

    Args:
        model: model(inputs) gives the outputs.
        loss_func: (outputs, targets) -> scalar, normalised as `reduction` says.
        inputs: Leading axis N.
        targets: Leading axis N.
        reduction: "sum": sum_i g_i^2; "mean": 1/N sum_i g_i^2.
        use_backpack: Allow BackPACK where it covers the model.
        params: The tensors to differentiate in, if not the model's trainable parameters.

    Raises:
        ValueError: An unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
    if params is None:
        params = ParameterVector(p for p in model.parameters() if p.requires_grad)
    batch = (inputs, targets)
    total = sum_of_squared_gradients(
        params,
        model,
        lambda outputs, b: loss_func(outputs, b[1]),
        lambda m, b: m(b[0]),
        batch,
        reduction=reduction,
        use_backpack=use_backpack,
    )
    return total / num_examples(batch) if reduction == "mean" else total


class _Squares:
    """The three ways to sum_i g_i^2 over a part of the batch, as one tensor a parameter."""

    def __init__(
        self,
        params: ParameterVector,
        pure: UntouchedModel,
        loss_fn: LossFunction,
        reduction: str,
        n: int,
    ) -> None:
        self.params = params
        self.pure = pure
        self.loss_fn = loss_fn
        self.reduction = reduction
        self.n = n
        self.call = _Call(pure)
        names = {id(p): f"model.{name}" for name, p in pure.model.named_parameters()}
        recurrent = {
            id(p) for m in pure.model.modules() if isinstance(m, nn.RNNBase) for p in m.parameters()
        }
        self.own = [i for i, t in enumerate(params.tensors) if id(t) in names]
        self.names = [names[id(params.tensors[i])] for i in self.own]
        self.is_recurrent = [id(params.tensors[i]) in recurrent for i in self.own]
        self.used: list[int] = []  # leaves of the outputs that the loss depends on

    def cotangents(self, outputs: Outputs, batch: Batch, n: int) -> list[Tensor] | None:
        """c: gradient of the unnormalised loss in the outputs it depends on, each [n, ...].

        None if the outputs have no example axis, so that there is no such thing.
        """
        leaves, spec = pytree.tree_flatten(outputs)
        places = [
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        if not places:
            return None
        for i in places:
            leaves[i] = leaves[i].detach().requires_grad_()
        with torch.enable_grad():
            value = self._unnormalised(pytree.tree_unflatten(leaves, spec), batch, n)
        if not value.requires_grad:
            return []
        grads = torch.autograd.grad(value, [leaves[i] for i in places], allow_unused=True)
        self.used = [i for i, c in zip(places, grads) if c is not None]
        found = [c for c in grads if c is not None]
        return found if all(c.shape[:1] == (n,) for c in found) else None

    def _unnormalised(self, outputs: Outputs, batch: Batch, n: int) -> Tensor:
        value = self.loss_fn(outputs, batch)
        if isinstance(value, tuple):
            return value[0]
        return value * n if self.reduction == "mean" else value

    def _score(self, values: list[Tensor], example: Batch, c: list[Tensor] | None) -> Tensor:
        """A scalar whose gradient in the parameters is g_i. `example` is a batch of one."""
        outputs = torch.func.functional_call(self.call, dict(zip(self.names, values)), (example,))
        if c is None:
            return self._unnormalised(outputs, example, 1)
        leaves = pytree.tree_leaves(outputs)
        return torch.stack([(leaves[i] * ci).sum() for i, ci in zip(self.used, c)]).sum()

    def _values(self) -> list[Tensor]:
        return [self.params.tensors[i].detach() for i in self.own]

    def _in_order(self, found: list[Tensor | None]) -> list[Tensor | None]:
        ordered: list[Tensor | None] = [None] * len(self.params.tensors)
        for i, value in zip(self.own, found):
            ordered[i] = value
        return ordered

    def by_backpack(self, part: Batch, c: list[Tensor], n: int) -> list[Tensor | None]:
        def outputs_of(twin: nn.Module) -> list[Tensor]:
            leaves = pytree.tree_leaves(self.pure(twin, part))
            return [leaves[i] for i in self.used]

        return backpack_squares.sum_of_squares(self.pure.model, outputs_of, c, self.params.tensors)

    def by_vmap(self, part: Batch, c: list[Tensor] | None, n: int) -> list[Tensor | None]:
        slicer = _Slicer(part, n)

        def gradient(
            values: list[Tensor], rows: list[Tensor], ci: list[Tensor] | None
        ) -> list[Tensor]:
            example = slicer.rebuild([row.unsqueeze(0) for row in rows])
            ci = None if ci is None else [x.unsqueeze(0) for x in ci]
            return torch.func.grad(self._score)(values, example, ci)

        # Recurrent layers write into (start state) x (weights), which has no example axis of its own:
        # these weights get one, without memory.
        values = [
            value.expand(n, *value.shape) if recurrent else value
            for value, recurrent in zip(self._values(), self.is_recurrent)
        ]
        in_dims = (
            [0 if recurrent else None for recurrent in self.is_recurrent],
            0,
            0 if c else None,
        )
        g = torch.func.vmap(gradient, in_dims=in_dims, randomness="different")(
            values, slicer.rows, c
        )  # each [n, *shape]
        return self._in_order([gi.square().sum(0) for gi in g])

    def by_loop(self, part: Batch, c: list[Tensor] | None, n: int) -> list[Tensor | None]:
        values = [v.requires_grad_() for v in self._values()]
        with torch.enable_grad():
            score = self._score(values, part, c)
        if not score.requires_grad:
            return self._in_order([None for _ in values])
        g = torch.autograd.grad(score, values, allow_unused=True)
        return self._in_order([None if gi is None else gi.square() for gi in g])


class _Call(nn.Module):
    """forward(model, batch) as a module, so that functional_call can exchange the parameters."""

    def __init__(self, pure: UntouchedModel) -> None:
        super().__init__()
        self.model = pure.model
        self.pure = pure

    def forward(self, batch: Batch) -> Outputs:
        return self.pure(self.model, batch)


class _Slicer:
    """Rows of a batch: of its tensors with the example axis; everything else is shared."""

    def __init__(self, batch: Batch, n: int) -> None:
        self._leaves, self._spec = pytree.tree_flatten(batch)
        self._places = [
            i
            for i, x in enumerate(self._leaves)
            if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == n
        ]
        self.rows = [self._leaves[i] for i in self._places]  # each [n, ...]

    def rebuild(self, rows: list[Tensor]) -> Batch:
        leaves = list(self._leaves)
        for i, row in zip(self._places, rows):
            leaves[i] = row
        return pytree.tree_unflatten(leaves, self._spec)

    def __call__(self, low: int, high: int) -> Batch:
        return self.rebuild([row[low:high] for row in self.rows])


def _at_most(n: int, max_bytes: int, bytes_each: int) -> int:
    return max(1, min(n, max_bytes // max(1, bytes_each)))


@functools.cache
def _warn_of_loop(model: str, reason: str) -> None:
    _log.warning(
        "empirical Fisher diagonal of %s: one backward pass an example, which is slow, because "
        "torch.func cannot vectorise the model: %s",
        model,
        reason,
    )
