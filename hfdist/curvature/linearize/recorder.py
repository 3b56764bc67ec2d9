"""Watch a forward pass below autograd, and write down the linear map of every operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hfdist.curvature.dispatch import Watch
from hfdist.curvature.linearize.call import Call, Unsupported
from hfdist.curvature.linearize.generic import generic
from hfdist.curvature.linearize.program import REARRANGEMENTS, Program, Step
from hfdist.curvature.linearize.rules import RULES

_STOPS = {"aten::detach"}  # what is computed from it does not depend on the parameters
_CONSTANT = {
    f"aten::{name}"
    for name in (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros",
        "new_ones", "new_full", "new_empty", "bernoulli", "sign", "floor", "ceil", "round", "trunc",
        "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "argmax", "argmin", "argsort",
        "_local_scalar_dense", "is_same_size", "sym_size", "sym_numel", "equal", "logical_not",
    )
}  # fmt: skip
_ERASES = {"aten::zero_", "aten::fill_", "aten::normal_", "aten::uniform_", "aten::bernoulli_"}


class Recorder(Watch):
    """Records the operations that run inside the context and depend on the parameters.

    The forward pass is the one that autograd records for the gradient: it runs once. What cannot be
    recorded faithfully (a custom autograd.Function, code compiled elsewhere, writing into views) is
    noticed, and remembered as `failure`; the pass itself is not disturbed.

    Args:
        tensors: The parameters.
        rearrangements_only: Follow the tensors only through operations that move numbers about.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        rearrangements_only: bool = False,
    ) -> None:
        super().__init__()
        self._rearrangements_only = rearrangements_only
        self.failure: str | None = None
        self._slots: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._num_slots = self._num_sources = len(tensors)
        for k, t in enumerate(tensors):
            self._slots[t] = k
        self._steps: list[Step] = []
        self._kept: list[tuple[Tensor, int]] = []  # with their versions
        self._unversioned: list[Tensor] = []

    # -- watching --------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.failure is not None:
            return func(*args, **kwargs)
        self._note_versions()
        try:
            call = self._call(func, args, kwargs)
        except Unsupported as e:
            self._fail(e)
            call = None
        if call is None:
            return func(*args, **kwargs)
        if not call.in_place:
            call.out = func(*args, **kwargs)
        try:
            # In place, the rule comes first: it may need what the operation is about to overwrite.
            out = call.out
            step = self._step(call)
        except Unsupported as e:
            self._fail(e)
            return func(*args, **kwargs) if call.in_place else call.out
        if call.in_place:
            func(*args, **kwargs)
        self._track(call, step, out)
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, if its result depends on the parameters."""
        name = func._schema.name
        if name in _CONSTANT:
            return None
        mutates = func._schema.is_mutable
        grad_mode = torch.is_grad_enabled()
        if name in _STOPS or not grad_mode:
            if mutates and any(map(self._is_tracked, args)):
                raise Unsupported(f"{func} without gradient on a tensor that has one")
            return None
        if self._rearrangements_only and name not in REARRANGEMENTS:
            if mutates and any(map(self._is_tracked, args)):
                raise Unsupported(f"{func} writes into what is followed")
            return None
        call = Call(func, args, kwargs, None, self._is_tracked, in_place=mutates)
        if not call.inputs:
            return None
        if mutates:
            target = args[0]
            if not name.endswith("_") or not isinstance(target, Tensor) or kwargs.get("out"):
                raise Unsupported(f"{func} writes into its arguments")
            if target._is_view():
                raise Unsupported(f"{func} writes into a view")
            if name in _ERASES:
                del self._slots[target]
                return None
            call.out = target
        return call

    def _is_tracked(self, x: Any) -> bool:
        if not isinstance(x, Tensor):
            return False
        if x in self._slots:
            return True
        if x.requires_grad and torch.is_grad_enabled() and not self._rearrangements_only:
            raise Unsupported(
                f"a tensor of shape {list(x.shape)} depends on the parameters by an operation that "
                "cannot be watched (a custom autograd.Function, compiled code, or a write into a view)"
            )
        return False

    def _step(self, call: Call) -> Step:
        name = call.func._schema.name
        # Where autocast mixes dtypes in one operation (batch norm's), autograd knows who casts what.
        rule = None if call.mixes_dtypes else RULES.get(name[:-1] if call.in_place else name)
        try:
            linear_map = generic(call) if rule is None else rule(call)
        except Unsupported:
            raise
        except Exception as e:
            raise Unsupported(f"{call.func}: {type(e).__name__}: {e}") from e
        self._unversioned += call.kept
        return Step(
            map=linear_map,
            inputs=[self._slots[x] for x in call.inputs],
            outputs=[],
            aliases=call.aliases,
            name=name,
        )

    def _track(self, call: Call, step: Step, out: Any) -> None:
        outs = out if isinstance(out, (tuple, list)) else [out]
        for k, y in enumerate(outs):
            slot = self._num_slots
            self._num_slots += 1
            step.outputs.append(slot)
            if isinstance(y, Tensor) and y.is_floating_point() and k not in call.constant:
                self._slots[y] = slot
        self._steps.append(step)

    def _note_versions(self) -> None:
        # Not when they are kept: an operation in place counts its version up after it was seen here.
        if self._unversioned:
            self._kept += [(x, x._version) for x in self._unversioned]
            self._unversioned = []

    def _fail(self, reason: Unsupported) -> None:
        self.failure = str(reason)
        self._steps, self._kept, self._unversioned = [], [], []

    # -- results ---------------------------------------------------------------------------------

    def program(self, outputs: Sequence[Tensor]) -> Program:
        """The map v -> Jv to these outputs of the recorded pass.

        Raises:
            Unsupported: The pass could not be recorded.
        """
        self._note_versions()
        if self.failure is None and any(x._version != version for x, version in self._kept):
            self.failure = "a value that the derivative needs was overwritten"
        if self.failure is not None:
            raise Unsupported(self.failure)
        results: list[int | None] = []
        for z in outputs:
            if z.requires_grad and z not in self._slots:
                raise Unsupported("an output depends on the parameters by an unwatched operation")
            results.append(self._slots.get(z))
        return Program(self._steps, self._num_sources, results)
