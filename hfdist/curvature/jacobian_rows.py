"""Rows of a Jacobian, J [n, P], of outputs one an example: all of them from one backward pass.

Where examples do not interact, the derivative of the sum of the outputs in what an operation returned holds,
example by example, the derivative of that example's own output; and the derivative in a parameter that the
operation uses is a sum over its rows, which is not taken (Goodfellow 2015, arXiv:1510.01799, for linear
layers). So a pass is watched below autograd for operations in which a parameter, or what is computed from
parameters alone, meets examples: also those that derivatives in the model's inputs are made of, whatever form
they have.

Which element belongs to which example is found out, not assumed: the same backward pass with the outputs
weighted by powers of two has gradients that differ by just these factors, to the last bit, a pass for each
digit of the examples' numbers. What does not fit in (batch norm, attention over examples) has its rows one
after the other, by batched backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from hfdist.curvature.dispatch import Watch
from hfdist.curvature.outputs import Edge, edge
from hfdist.curvature.reverse import grad
from hfdist.devices import is_out_of_memory

_LEAST_EXAMPLES = 4
"""Of fewer, rows one after the other are as fast."""
_NUMBERS = 16
"""So many examples are told apart by a pass, by factors up to 2^15."""
_DIRECT = 1024
"""Numbers of a parameter from which on batched products are written straight into the rows: of smaller
matrices they are slower than their detour through memory of their own."""


class Interacts(Exception):
    """The outputs of examples are not independent, or what computes them is not understood."""


@dataclass(kw_only=True)
class Use:
    """An operation in which tensors of the parameters meet examples."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: list[int]
    """Which arguments are computed from parameters alone."""
    shape: torch.Size
    """Of the result."""
    result: Tensor | None
    """Until its edge is known."""
    edge: Edge = (None, 0)


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in a result: dimension `axis` is examples x inner, or outer x examples."""

    axis: int
    inner: bool = True

    def split(self, x: Tensor, n: int, axis: int | None = None) -> Tensor:
        """x with the dimension of examples in front: [n, .., s, ..], s in the old place, plus one."""
        axis = self.axis if axis is None else axis
        s = x.shape[axis] // n
        two = (n, s) if self.inner else (s, n)
        x = x.unflatten(axis, two)
        return x.movedim(axis if self.inner else axis + 1, 0)


class UseWatch(Watch):
    """Notes the uses of the parameters in what runs inside the context.

    Args:
        tensors: The parameters.
        num_examples: A tensor with a dimension of this length, or a multiple of it, is taken for one of
            examples.
    """

    def __init__(self, tensors: Sequence[Tensor], num_examples: int) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._n = num_examples
        # Parameters, and what is computed from them alone: the tensor itself, which its gradient goes on
        # from.
        self._weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._edges: dict[Edge, Tensor] = {}
        self._new: list[Tensor] = []
        self._unfinished: list[Use] = []
        for t in tensors:
            self._weights[t] = True

    def finish(self) -> list[Use]:
        """The uses, with their edges."""
        self._note_what_is_new()
        return self.uses

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._note_what_is_new()
        out = func(*args, **kwargs)
        if (
            torch.is_grad_enabled()
            and isinstance(func, OpOverload)
            and func._schema.name != "aten::detach"
        ):
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        weights = [k for k, x in enumerate(args) if self._is_weight(x)]
        inside = any(
            self._is_weight(x)
            for x in tree_leaves([a for a in args if isinstance(a, (list, tuple))])
        )
        if not weights and not inside:
            return
        results = [y for y in tree_leaves(out) if isinstance(y, Tensor)]
        others = [
            x
            for k, x in enumerate(tree_leaves(args))
            if isinstance(x, Tensor) and not self._is_weight(x)
        ]
        grows = any(self._has_examples(y) for y in results) and not any(
            self._has_examples(args[k]) for k in weights
        )
        if not grows and not any(self._has_examples(x) or x.requires_grad for x in others):
            for y in results:
                if y.is_floating_point():
                    self._weights[y] = True
                    self._new.append(y)
            return
        use = Use(
            func=func,
            args=args,
            kwargs=kwargs,
            weights=weights,
            shape=results[0].shape if results else torch.Size(),
            # Of several results, as layer norm's with mean and deviation, the first is what goes on.
            result=None if inside or not results else results[0],
        )
        self.uses.append(use)
        self._unfinished.append(use)

    def _is_weight(self, x: Any) -> bool:
        if not isinstance(x, Tensor):
            return False
        if x in self._weights:
            return True
        return x.grad_fn is not None and (x.grad_fn, x.output_nr) in self._edges

    def _has_examples(self, x: Tensor) -> bool:
        return any(size and size % self._n == 0 for size in x.shape)

    def _note_what_is_new(self) -> None:
        # Results have their edges once the operation's own autograd is done with them.
        for y in self._new:
            if y.grad_fn is not None:
                self._edges[(y.grad_fn, y.output_nr)] = y
        self._new = []
        for use in self._unfinished:
            if use.result is not None and use.result.requires_grad:
                use.edge = edge(use.result)
            use.result = None
        self._unfinished = []


@dataclass(kw_only=True)
class RowMethod:
    """How rows are computed; kept from step to step.

    Attributes:
        per_example: False once outputs of examples were found to interact.
        reason: Why.
        layouts: Of a pass of so many examples and such outputs: the layout of every use, None where the use
            had no derivative.
    """

    per_example: bool = True
    reason: str | None = None
    layouts: dict[Any, list[Layout | None]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)

    def sees_examples(self, outputs: Tensor) -> bool:
        """Whether the rows of outputs [n, ..] are taken example by example."""
        return self.per_example and len(outputs) >= _LEAST_EXAMPLES

    def is_to_be_checked(self, name: str) -> bool:
        """Whether the rows of something of this name are to be compared with the gradient: at first, and now
        and then."""
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        return calls <= 3 or calls % 20 == 0


def per_example_rows(
    outputs: Tensor,
    uses: Sequence[Use],
    tensors: Sequence[Tensor],
    method: RowMethod,
    out: Tensor,
    scales: Tensor | None = None,
) -> Tensor:
    """out [n * m, P] = scales dz/dtheta for outputs z [n, ..], m numbers an example; its graph is kept.

    Raises:
        Interacts: Examples are not independent, or an operation is not understood.
    """
    n = len(outputs)
    z = outputs.reshape(n, -1)
    seeds = torch.ones_like(z) if scales is None else scales.reshape(n, -1)
    edges = [GradientEdge(*use.edge) for use in uses if use.edge[0] is not None]
    known = [use for use in uses if use.edge[0] is not None]
    if len(known) < sum(1 for use in uses):
        raise Interacts("parameters are used where autograd does not see it")
    rows = out.view(n, z.shape[1], -1)
    key = (n, z.shape[1], tuple((use.func, use.shape) for use in known))
    for k in range(z.shape[1]):
        column, seed = z[:, k], seeds[:, k]
        G = grad(column, edges, seed, retain_graph=True, allow_unused=True) if edges else ()
        layouts = method.layouts.get((key, k))
        if layouts is None or any(
            g is not None and layout is None and bool(g.any()) for g, layout in zip(G, layouts)
        ):
            layouts = _find_layouts(column, edges, G, seed)
            method.layouts[(key, k)] = layouts
        of_column = _Rows(rows[:, k], tensors)
        for use, g, layout in zip(known, G, layouts):
            if g is not None and layout is not None:
                _add(of_column, use, g, layout, n)
        of_column.close()
    return out


def _find_layouts(
    column: Tensor, edges: Sequence[Any], G: Sequence[Tensor | None], seed: Tensor
) -> list[Layout | None]:
    n = len(column)
    digits = torch.arange(n, device=column.device)
    passes: list[tuple[Tensor | None, ...]] = []
    while not passes or bool(digits.any()):  # a digit of each example's number a pass
        factors = torch.exp2((digits % _NUMBERS).to(column.dtype))
        passes.append(grad(column, edges, seed * factors, retain_graph=True, allow_unused=True))
        digits = digits // _NUMBERS
    return [
        None if g is None else _layout(g, [w for w in weighted if w is not None], n)
        for g, weighted in zip(G, zip(*passes))
    ]


def _layout(g: Tensor, passes: Sequence[Tensor], n: int) -> Layout | None:
    """From gradients with equal and with numbered outputs, a digit of the numbers a pass.

    A power of two is no rounding: an example's small gradients, sums of large ones of both signs as after
    many time steps, follow it as exactly as its others.
    """
    size = g.abs()
    counts = size > 1e-8 * size.max()
    if not bool(counts.any()):
        return None
    number = torch.zeros_like(g[counts])
    for k, weighted in enumerate(passes):
        number += _NUMBERS**k * torch.log2((weighted / g)[counts])
    for axis, length in enumerate(g.shape):
        if length % n or not length:
            continue
        s = length // n
        index = torch.arange(length, device=g.device)
        for inner in (True, False) if s > 1 else (True,):
            example = (index // s if inner else index % n).to(g.dtype)
            shape = [1] * g.ndim
            shape[axis] = length
            expected = example.view(shape).expand_as(g)[counts]
            if float((number - expected).abs().max()) < 0.3:  # not where one is NaN
                return Layout(axis, inner)
    raise Interacts("outputs of examples depend on each other")


# -- one use -----------------------------------------------------------------------------------------


class _Rows:
    """Rows [n, P] that uses add to, in memory that holds anything: what comes first to a parameter is
    written, not added."""

    def __init__(self, rows: Tensor, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._rows, self._spans = rows, _spans(tensors)
        self._written: set[int] = set()
        self._outer: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def place(self, weight: Tensor) -> int | None:
        """Number of the parameter that it is, or is the transpose of, as in a layer xW'."""
        for i, t in enumerate(self.tensors):
            if weight is t or (weight._base is t and _is_transpose(weight, t)):
                return i
        return None

    def add(self, i: int, of_weight: Tensor) -> None:
        """Derivatives [n, *shape] in a parameter."""
        a, b = self._spans[i]
        out, piece = self._rows[:, a:b], of_weight.reshape(len(of_weight), b - a)
        if i in self._written:
            out += piece
        else:
            out.copy_(piece)
        self._written.add(i)

    def add_outer(self, i: int, left: Tensor, right: Tensor) -> None:
        """The sum over s of outer products of left [n, s, a] and right [n, s, b], in a parameter [a, b]."""
        self._outer.setdefault(i, []).append((left, right))

    @torch.no_grad()
    def close(self) -> None:
        """Nothing more is added: sums of outer products are taken, of all uses of a parameter at once."""
        for i, pairs in self._outer.items():
            left, right = (
                side[0] if len(side) == 1 else torch.cat(side, 1) for side in zip(*pairs)
            )
            left, shape = left.transpose(1, 2), (left.shape[2], right.shape[2])
            a, b = self._spans[i]
            out = self._rows[:, a:b].unflatten(1, shape)
            is_first = i not in self._written
            if left.shape[2] == 1 and is_first:
                torch.mul(left, right, out=out)
            elif left.shape[2] == 1:
                out.addcmul_(left, right)
            elif b - a >= _DIRECT:
                out.baddbmm_(left, right, beta=0 if is_first else 1)
            else:
                self.add(i, torch.bmm(left, right))
            self._written.add(i)
        for i, (a, b) in enumerate(self._spans):
            if i not in self._written:
                self._rows[:, a:b] = 0.0


def _is_transpose(weight: Tensor, t: Tensor) -> bool:
    return (
        weight.ndim == t.ndim == 2
        and weight.shape == t.t().shape
        and weight.stride() == t.t().stride()
    )


@torch.no_grad()
def _add(rows: _Rows, use: Use, g: Tensor, layout: Layout, n: int) -> None:
    for k in use.weights:
        weight = use.args[k]
        if not weight.requires_grad:
            continue
        name, i = use.func._schema.name, rows.place(weight)
        try:
            if i is not None and name in _MATRICES and k >= len(use.args) - 2:
                left, right = _factors(use, k, g, layout, n)
                if weight is not rows.tensors[i]:
                    left, right = right, left
                alpha = use.kwargs.get("alpha", 1)
                rows.add_outer(i, left, right if alpha == 1 else right * alpha)
                continue
            of_weight = _RULES.get(name, _by_vmap)(use, k, g, layout, n)  # [n, *weight.shape]
        except Interacts:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise Interacts(f"{use.func}: {type(error).__name__}: {error}") from error
        if i is not None:
            rows.add(i, of_weight if weight is rows.tensors[i] else of_weight.transpose(1, 2))
            continue
        for i, piece in _pulled_back(weight, of_weight, rows.tensors).items():
            rows.add(i, piece)


def _pulled_back(weight: Tensor, of_weight: Tensor, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """From a function of parameters alone to the parameters."""
    n, k = len(of_weight), weight.numel()
    # A function of few numbers: its Jacobian takes fewer backward passes than the examples.
    is_small = 4 * k <= n
    seeds = torch.eye(k, dtype=weight.dtype, device=weight.device) if is_small else of_weight
    back = grad(
        weight,
        list(tensors),
        seeds.view(len(seeds), *weight.shape),
        is_grads_batched=True,
        retain_graph=True,
        allow_unused=True,
    )
    found = {i: b for i, b in enumerate(back) if b is not None}
    if is_small:
        flat = of_weight.reshape(n, k)
        return {i: (flat @ b.reshape(k, -1)).view(n, *b.shape[1:]) for i, b in found.items()}
    return found


def _factors(use: Use, k: int, g: Tensor, layout: Layout, n: int) -> tuple[Tensor, Tensor]:
    """Of a product of matrices: [n, s, a] and [n, s, b], whose outer products summed over s are the
    derivative in the factor [a, b]."""
    A, B = use.args[-2:]
    is_left = (B if k == len(use.args) - 1 else A) is not B
    if not is_left and layout.axis == 0:  # A holds the examples in rows
        return layout.split(A, n), layout.split(g, n)
    if is_left and layout.axis == 1:  # B holds them in columns: (AB)' = B'A'
        return layout.split(g, n).transpose(1, 2), layout.split(B, n).transpose(1, 2)
    raise Interacts("a matrix of examples is multiplied from an unusual side")


def _mm(use: Use, k: int, g: Tensor, layout: Layout, n: int) -> Tensor:
    left, right = _factors(use, k, g, layout, n)
    return torch.bmm(left.transpose(1, 2), right)


def _addmm(use: Use, k: int, g: Tensor, layout: Layout, n: int) -> Tensor:
    beta, alpha = use.kwargs.get("beta", 1), use.kwargs.get("alpha", 1)
    if k == 0:
        summed = _summed(layout.split(g, n), use.args[0].shape, g.ndim)
        return summed if beta == 1 else summed * beta
    out = _mm(use, k, g, layout, n)
    return out if alpha == 1 else out * alpha


def _sum(use: Use, k: int, g: Tensor, layout: Layout, n: int) -> Tensor:
    """Of a + b, a - b, and of a that is expanded."""
    factor = 1.0
    if k == 1:
        sign = -1.0 if use.func._schema.name == "aten::sub" else 1.0
        factor = sign * use.kwargs.get("alpha", 1)
    if use.func._schema.name == "aten::rsub":
        raise Interacts("an unusual difference")
    summed = _summed(layout.split(g, n), use.args[k].shape, g.ndim)
    return summed if factor == 1.0 else summed * factor


def _mul(use: Use, k: int, g: Tensor, layout: Layout, n: int) -> Tensor:
    other = use.args[1 - k]
    return _summed(layout.split(g * other, n), use.args[k].shape, g.ndim)


def _summed(g: Tensor, shape: torch.Size, ndim: int) -> Tensor:
    """[n, *out.shape] -> [n, *shape]: over what was broadcast."""
    g = g.sum(tuple(range(1, 1 + ndim - len(shape)))) if ndim > len(shape) else g
    axes = tuple(i + 1 for i, size in enumerate(shape) if size == 1 and g.shape[i + 1] != 1)
    return g.sum(axes, keepdim=True) if axes else g


def _by_vmap(use: Use, k: int, g: Tensor, layout: Layout, n: int) -> Tensor:
    """Any operation that keeps the place of its examples: its backward pass, example by example."""
    if use.func._schema.is_mutable:
        raise Interacts(f"{use.func} writes in place")
    if layout.axis != 0:
        raise Interacts(f"{use.func} of examples that do not come first")
    length = g.shape[0]
    has = [
        isinstance(x, Tensor) and i not in use.weights and x.ndim > 0 and x.shape[0] == length
        for i, x in enumerate(use.args)
    ]
    data = [layout.split(x.detach(), n, 0) for x, h in zip(use.args, has) if h]
    weight = use.args[k].detach()

    def back(g_i: Tensor, *of_example: Tensor) -> Tensor:
        def f(w: Tensor) -> Tensor:
            items = iter(of_example)
            args = [
                w if i == k else next(items) if h else x
                for i, (x, h) in enumerate(zip(use.args, has))
            ]
            y = use.func(*args, **use.kwargs)
            first: Tensor = y[0] if isinstance(y, (tuple, list)) else y
            return first

        return torch.func.vjp(f, weight)[1](g_i)[0]

    result: Tensor = torch.func.vmap(back)(layout.split(g, n, 0), *data)
    return result


_RULES: dict[str, Callable[[Use, int, Tensor, Layout, int], Tensor]] = {
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::add": _sum,
    "aten::sub": _sum,
    "aten::expand": _sum,
    "aten::mul": _mul,
}
_MATRICES = ("aten::mm", "aten::addmm")
"""Whose derivatives in a weight are sums of outer products."""


# -- rows one after the other --------------------------------------------------------------------------


def rows_one_by_one(
    outputs: Tensor,
    tensors: Sequence[Tensor],
    out: Tensor,
    scales: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """out [n * m, P] += scales dz/dtheta by batched backward passes, which hold for any outputs; the graph
    is kept."""
    z = outputs.reshape(-1)
    spans = _spans(tensors)
    for start in range(0, len(z), chunk):
        stop = min(start + chunk, len(z))
        seeds = torch.zeros(stop - start, len(z), dtype=z.dtype, device=z.device)
        seeds[torch.arange(stop - start), torch.arange(start, stop)] = (
            1.0 if scales is None else scales[start:stop]
        )
        try:
            back = grad(
                z, list(tensors), seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # an operation without a batched form
            single = [
                grad(z, list(tensors), s, retain_graph=True, allow_unused=True) for s in seeds
            ]
            for row, derivatives in zip(out[start:stop], single):
                for (a, b), d in zip(spans, derivatives):
                    if d is not None:
                        row[a:b] += d.reshape(-1)
            continue
        for (a, b), d in zip(spans, back):
            if d is not None:
                out[start:stop, a:b] += d.reshape(stop - start, -1)
    return out


def jacobian_rows(
    outputs: Tensor,
    uses: Sequence[Use] | None,
    tensors: Sequence[Tensor],
    method: RowMethod,
    scales: Tensor | None = None,
) -> Tensor:
    """J [n * m, P] of outputs z [n, ..], attached to the parameters' graph, which is kept.

    Args:
        outputs: z.
        uses: What a `UseWatch` noted of the pass; None: rows one after the other.
        tensors: The parameters.
        method: What was found out about the pass.
        scales: Factors of the rows [n * m]; None: 1.
    """
    P = sum(t.numel() for t in tensors)
    J = torch.empty(outputs.numel(), P, dtype=outputs.dtype, device=outputs.device)
    if uses is not None and method.sees_examples(outputs):
        try:
            return per_example_rows(outputs, uses, tensors, method, J, scales)
        except Interacts as reason:
            method.per_example, method.reason = False, str(reason)
    return rows_one_by_one(outputs, tensors, J.zero_(), scales)


def of_products(
    uses: Sequence[Use], num_rows: int, num_parameters: int, num_examples: int
) -> float:
    """Multiplications of rows with a vector over those of an example's pass: as many as rows where a layer
    uses each weight once for an example, fewer where it does so several times."""
    of_pass = 0
    for use in uses:
        is_matrix = use.func._schema.name in _MATRICES
        of_pass += use.shape.numel() * (use.args[-1].shape[0] if is_matrix else 1)
    return num_rows * min(1.0, num_parameters * num_examples / max(of_pass, 1))


def _spans(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    spans, start = [], 0
    for t in tensors:
        spans.append((start, start + t.numel()))
        start += t.numel()
    return spans
