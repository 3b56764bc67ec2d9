"""Watch a forward pass below autograd, and write down the linear map of every operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from hfdist.curvature.dispatch import Watch
from hfdist.curvature.linearize.call import Call, Map, NoDerivative, Unsupported
from hfdist.curvature.linearize.generic import generic
from hfdist.curvature.linearize.program import REARRANGEMENTS, Program, Step
from hfdist.curvature.linearize.rules import READS_NO_CONSTANT, READS_RESULT_ONLY, RULES
from hfdist.curvature.linearize.rules.table import Rule
from hfdist.curvature.outputs import Edge, edge, is_met
from hfdist.devices import is_out_of_memory

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
    recorded faithfully (a custom autograd.Function, code compiled elsewhere, writing into memory that
    several tensors share) is noticed, and remembered as `failure`; the pass itself is not disturbed.

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
        self._kept: list[tuple[Tensor, int, str]] = []  # with their versions, and who needs them
        self._unversioned: list[tuple[Tensor, str]] = []
        # Autograd hands what it saved of an operation's result to the backward pass as a new tensor: the edge
        # of its graph says which value that is, if the pass differentiates in its inputs.
        self._edges: dict[Edge, int] = {}
        self._without_edge: list[tuple[Tensor, int]] = []
        self._constant: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._sources = {edge(t) for t in tensors if t.requires_grad}
        self._sharing: dict[int, list[ref[Tensor]]] = {}  # memory -> tensors with a tangent in it
        self._parts: WeakTensorKeyDictionary = (
            WeakTensorKeyDictionary()
        )  # tensor -> memory of its own
        for t in tensors:
            self._note_storage(t)

    def follow(self, tensor: Tensor, copy: Tensor) -> None:
        """`copy` has the tangent of `tensor`."""
        self._slots[copy] = self._slots[tensor]
        self._note_storage(copy)

    # -- watching --------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.failure is None and not isinstance(func, OpOverload):
            self._fail(
                Unsupported(f"{func} is no operation but a program (torch.cond and the like)")
            )
        if self.failure is not None:
            return func(*args, **kwargs)
        self._note_what_is_new()
        try:
            call = self._call(func, args, kwargs)
        except Unsupported as e:
            self._fail(e)
            call = None
        if call is None:
            return func(*args, **kwargs)
        if call.in_place and _base_name(func) not in READS_RESULT_ONLY:
            call.keep_target()
        out = call.out = func(*args, **kwargs)
        try:
            step = self._step(call)
        except Unsupported as e:
            self._fail(e)
            return out
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
            # Also through a view that was made by another operation, and is not followed.
            if mutates and any(self._tracked_in(self._memory(x)) for x in _tensors(args)):
                raise Unsupported(f"{func} writes into what is followed")
            return None
        call = Call(func, args, kwargs, None, self._is_tracked, in_place=mutates)
        if not call.inputs:
            return None
        call.slots = [self._slots[x] for x in call.inputs]
        if mutates:
            target = args[0]
            if not name.endswith("_") or not isinstance(target, Tensor) or "out" in kwargs:
                raise Unsupported(f"{func} writes into its arguments")
            if target._is_view() or self._is_shared(target, args, kwargs):
                raise Unsupported(f"{func} writes into memory that other tensors share")
            if name in _ERASES and len(call.inputs) == 1 and call.inputs[0] is target:
                del self._slots[target]
                return None
        return call

    def _is_shared(self, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a tensor with a tangent, or another argument, lies in the target's memory: its tangent
        would not follow what is written."""
        memory = self._memory(target)
        return any(t is not target for t in self._tracked_in(memory)) or any(
            self._memory(x) == memory for x in _tensors((list(args[1:]), kwargs))
        )

    def _tracked_in(self, memory: int) -> list[Tensor]:
        return [t for r in self._sharing.get(memory, ()) if (t := r()) is not None]

    def _memory(self, x: Tensor) -> int:
        """Tells pieces of memory apart."""
        part: int | None = self._parts.get(x)
        if part is not None:
            return part
        # A sparse tensor has no storage of its own.
        return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)

    def _note_storage(self, x: Tensor) -> None:
        sharing = self._sharing.setdefault(self._memory(x), [])
        sharing[:] = [r for r in sharing if r() is not None]
        sharing.append(ref(x))

    def _is_tracked(self, x: Any) -> bool:
        if not isinstance(x, Tensor):
            return False
        if x in self._slots:
            return True
        if x.requires_grad and torch.is_grad_enabled() and not self._rearrangements_only:
            if x.grad_fn is None or x in self._constant:
                return False  # a leaf that is no parameter, or computed from such: points, say
            slot = self._edges.get((x.grad_fn, x.output_nr))
            if slot is not None:
                self._slots[x] = slot
                self._note_storage(x)
                return True
            if not is_met((x.grad_fn, x.output_nr), self._sources):
                self._constant[x] = True
                return False
            raise Unsupported(
                f"a tensor of shape {list(x.shape)} depends on the parameters by an operation that "
                "cannot be watched (a custom autograd.Function, a dual number of torch.autograd.forward_ad, "
                "compiled code, or a write into a view)"
            )
        return False

    def _step(self, call: Call) -> Step:
        name = call.func._schema.name
        # Where autocast mixes dtypes in one operation (batch norm's), autograd knows who casts what.
        base = _base_name(call.func)
        rule = None if call.mixes_dtypes else RULES.get(base)
        try:
            linear_map = self._map(call, rule)
        except Unsupported:
            raise
        except Exception as e:
            if is_out_of_memory(e):
                raise
            raise Unsupported(f"{call.func}: {type(e).__name__}: {e}") from e
        if isinstance(linear_map, generic) or base not in READS_NO_CONSTANT:
            call.kept += call.constants()
        self._unversioned += [(x, name) for x in call.kept if not x.is_inference()]
        return Step(
            map=linear_map,
            inputs=call.slots,
            outputs=[],
            aliases=call.aliases,
            name=name,
        )

    @staticmethod
    def _map(call: Call, rule: Rule | None) -> Map:
        if rule is not None:
            try:
                return rule(call)
            except NoDerivative:
                raise
            except Unsupported:  # an unusual form of the operation
                if call.in_place and _base_name(call.func) in READS_RESULT_ONLY:
                    raise  # its argument was not kept
        return generic(call)

    def _track(self, call: Call, step: Step, out: Any) -> None:
        outs = out if isinstance(out, (tuple, list)) else [out]
        for k, y in enumerate(outs):
            slot = self._num_slots
            self._num_slots += 1
            step.outputs.append(slot)
            if isinstance(y, Tensor) and y.is_floating_point() and k not in call.constant:
                self._slots[y] = slot
                self._without_edge.append((y, slot))
                if call.func._schema.name.startswith("aten::unsafe_"):
                    self._parts[y] = -slot  # parts that are known not to overlap
                elif call.aliases and call.inputs[0] in self._parts:
                    self._parts[y] = self._parts[call.inputs[0]]
                if not call.in_place:
                    self._note_storage(y)
        self._steps.append(step)

    def _note_what_is_new(self) -> None:
        # Not at once: an operation in place counts its version up, and autograd gives a result its edge,
        # after the operation was seen here.
        if self._unversioned:
            self._kept += [(x, x._version, name) for x, name in self._unversioned]
            self._unversioned = []
        for y, slot in self._without_edge:
            if y.grad_fn is not None:
                self._edges[(y.grad_fn, y.output_nr)] = slot
        self._without_edge = []

    def _fail(self, reason: Unsupported) -> None:
        self.failure = str(reason)
        self._steps, self._kept, self._unversioned = [], [], []
        self._edges, self._without_edge = {}, []

    # -- results ---------------------------------------------------------------------------------

    def program(self, outputs: Sequence[Tensor]) -> Program:
        """The map v -> Jv to these outputs of the recorded pass.

        Raises:
            Unsupported: The pass could not be recorded.
        """
        self._note_what_is_new()
        if self.failure is None:
            late = next((name for x, version, name in self._kept if x._version != version), None)
            if late is not None:
                self.failure = f"a value that the derivative of {late} needs was overwritten later"
        if self.failure is not None:
            raise Unsupported(self.failure)
        results: list[int | None] = []
        for z in outputs:
            if z.requires_grad and z not in self._slots:
                raise Unsupported("an output depends on the parameters by an unwatched operation")
            results.append(self._slots.get(z))
        return Program(self._steps, self._num_sources, results)


def _base_name(func: Any) -> str:
    """Of an operation in place, the name of the one that it does."""
    name: str = func._schema.name
    return name.removesuffix("_") if func._schema.is_mutable else name


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
