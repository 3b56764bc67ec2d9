"""Watch a forward pass: which operations use trained parameters, on what, with which result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hfdist.curvature.kronecker import recurrent
from hfdist.curvature.kronecker.calls import (
    LayerCall,
    Uses,
    VectorCall,
    Window,
    convolution_uses,
    embedding_uses,
    linear_uses,
    per_example,
    reduced,
    transposed_convolution_uses,
)
from hfdist.curvature.kronecker.keys import KroneckerKey, Rows, VectorKey
from hfdist.curvature.outputs import edge
from hfdist.curvature.reverse import grad

Shared = Literal["expand", "reduce"]


class LayerWatch(TorchFunctionMode):
    """Notes the calls of layers inside the context.

    Recurrent layers and attention are taken apart into the linear layers that they consist of.

    Args:
        tensors: The parameters.
        num_examples: Of the pass; None: not known.
        shared: What uses of one weight in one example are: examples of their own ("expand"), or one use of
            the mean input ("reduce"), see Eschenhagen et al. 2023, section 3.
    """

    def __init__(
        self, tensors: Sequence[Tensor], num_examples: int | None = None, shared: Shared = "expand"
    ) -> None:
        super().__init__()
        self.layers: list[LayerCall] = []
        self.vectors: list[VectorCall] = []
        self._tensors = tensors
        self._index = {id(t): k for k, t in enumerate(tensors)}
        self._n, self._shared = num_examples, shared
        self._is_time_first = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self, self._time_first(), _without_overrides():
                return func(*args, **kwargs)
        parts = recurrent.PARTS.get(func)
        if parts is not None and torch.is_grad_enabled():
            with self:
                return parts(*args, **kwargs)
        out = func(*args, **kwargs)
        note = _NOTES.get(func)
        if note is not None and isinstance(out, Tensor) and out.requires_grad:
            with torch.no_grad():
                note(self, func, out, *args, **kwargs)
        return out

    @contextmanager
    def _time_first(self) -> Iterator[None]:
        """Inside attention, whose inputs are [T, N, C] or rows of that."""
        self._is_time_first = True
        try:
            yield
        finally:
            self._is_time_first = False

    # -- which parameter a tensor is ---------------------------------------------------------------

    def _index_of(self, t: Any) -> int | None:
        return self._index.get(id(t))

    def _matrix(self, t: Any) -> tuple[Rows, bool] | None:
        """A weight, some of its rows, or its transpose: (rows, whether it is transposed)."""
        if not isinstance(t, Tensor) or t.ndim != 2:
            return None
        index = self._index_of(t)
        if index is not None:
            return Rows(index, 0, t.shape[0]), False
        base = t._base
        index = self._index_of(base)
        if base is None or index is None or base.ndim != 2 or not base.is_contiguous():
            return None
        start = int(t.storage_offset() - base.storage_offset())
        columns = base.shape[1]
        if t.shape == base.shape[::-1] and t.stride() == base.stride()[::-1] and start == 0:
            return Rows(index, 0, base.shape[0]), True
        if t.stride() == base.stride() and t.shape[1] == columns and start % columns == 0:
            return Rows(index, start // columns, start // columns + t.shape[0]), False
        return None

    def _bias(self, t: Any) -> Rows | None:
        """A bias, or a part of one."""
        if not isinstance(t, Tensor) or t.ndim != 1:
            return None
        index = self._index_of(t)
        if index is not None:
            return Rows(index, 0, len(t))
        base = t._base
        index = self._index_of(base)
        if base is None or index is None or base.ndim != 1 or t.stride() != (1,):
            return None
        start = int(t.storage_offset() - base.storage_offset())
        return Rows(index, start, start + len(t))

    # -- layers with a weight ------------------------------------------------------------------------

    def _layer(
        self,
        out: Tensor,
        key: KroneckerKey,
        bias: Rows | None,
        uses: Callable[[Tensor], Uses],
    ) -> None:
        if self._shared == "reduce" and not key.is_one_hot:
            uses = reduced(uses)
        self.layers.append(LayerCall(key=key, bias=bias, output=edge(out), uses=uses))

    def _linear(
        self, func: Any, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """y = x W' + b."""
        found = self._matrix(weight)
        if found is None:
            return
        rows, is_transposed = found
        x = input.detach()
        uses = linear_uses(x, self._n, self._is_time_first)
        key = KroneckerKey(rows, x.shape[-1], out.shape[-1], input_first=is_transposed)
        self._layer(out, key, self._bias(bias), uses)

    def _matmul(self, func: Any, out: Tensor, input: Any, other: Any, **_: Any) -> None:
        """y = x W."""
        if isinstance(input, Tensor) and input.ndim > 1 and self._matrix(other) is not None:
            self._linear(func, out, input, other.t() if other.ndim == 2 else other)

    def _reflected_matmul(self, func: Any, out: Tensor, other: Any, input: Any) -> None:
        self._matmul(func, out, input, other)

    def _addmm(
        self, func: Any, out: Tensor, bias: Tensor, input: Any, weight: Any, **scales: Any
    ) -> None:
        """y = b + x W."""
        if not scales and self._matrix(weight) is not None:
            self._linear(func, out, input, weight.t(), bias)

    def _einsum(self, func: Any, out: Tensor, equation: Any, *operands: Any) -> None:
        """y = x W or x W', written out."""
        if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
            return
        inputs, _, result = equation.replace(" ", "").partition("->")
        terms = inputs.split(",")
        if not result or len(terms) != 2:
            return
        place = next((k for k in (1, 0) if self._matrix(operands[k]) is not None), None)
        if place is None:
            return
        weight, x = terms[place], terms[1 - place]
        contracted, kept = set(weight) & set(x), set(weight) - set(x)
        if len(contracted) != 1 or len(kept) != 1 or not kept <= set(result):
            return
        (i,), (o,) = contracted, kept
        if i in result or set(x) - {i} != set(result) - {o} or len(set(x)) < len(x):
            return
        rows, is_transposed = self._matrix(operands[place])  # type: ignore[misc]
        input = operands[1 - place].detach().movedim(x.index(i), -1)
        others = [axis for axis in x if axis != i]  # the order of the rows
        order = [result.index(axis) for axis in others] + [result.index(o)]

        def uses(g: Tensor) -> Uses:
            yield from linear_uses(input, self._n)(g.permute(order))

        sizes = input.shape[-1], out.shape[result.index(o)]
        key = KroneckerKey(rows, *sizes, input_first=is_transposed != (weight[0] == i))
        self._layer(out, key, None, uses)

    def _embedding(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Rows of W by their indices: a linear layer of one-hot inputs."""
        found = self._matrix(weight)
        if found is None or found[1] or found[0].start > 0:
            return
        if padding_idx is not None and padding_idx < 0:
            padding_idx = padding_idx + len(weight) if func is F.embedding else None
        uses = embedding_uses(input, padding_idx, self._n)
        num_inputs, num_outputs = weight.shape
        key = KroneckerKey(found[0], num_inputs, num_outputs, input_first=True, is_one_hot=True)
        self._layer(out, key, None, uses)

    def _getitem(self, func: Any, out: Tensor, input: Any, index: Any) -> None:
        """W[indices]."""
        is_indices = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
        if isinstance(input, Tensor) and input.ndim == 2 and is_indices:
            self._embedding(func, out, index.long() % len(input), input)

    def _index_select(self, func: Any, out: Tensor, input: Any, dim: int, index: Tensor) -> None:
        if dim == 0 and isinstance(input, Tensor) and input.ndim == 2:
            self._embedding(func, out, index.long(), input)

    def _convolution(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        index, dims = self._index_of(weight), weight.ndim - 2
        if index is None:
            return
        has_batch = input.ndim == weight.ndim
        x = input.detach() if has_batch else input.detach()[None]
        size, dilation = tuple(weight.shape[2:]), _each(dilation, dims)
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, size)]
            around = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
        else:
            around = [(p, p) for p in _each(padding, dims)]
        window = Window(size=size, stride=_each(stride, dims), padding=around, dilation=dilation)
        uses = convolution_uses(x, window, groups)
        if not has_batch:
            uses = _with_batch(uses)
        sizes = weight[0].numel(), weight.shape[0] // groups
        key = KroneckerKey(Rows(index, 0, weight.shape[0]), *sizes, groups=groups)
        self._layer(out, key, self._bias(bias), uses)

    def _transposed_convolution(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> None:
        index, dims = self._index_of(weight), weight.ndim - 2
        if input.ndim == weight.ndim:
            self._vector(out, [bias], [(-1, *[1] * dims)], lambda g: [g])
        if index is None or input.ndim != weight.ndim:
            return
        window = Window(
            size=tuple(weight.shape[2:]),
            stride=_each(stride, dims),
            padding=[(p, p) for p in _each(padding, dims)],
            dilation=_each(dilation, dims),
        )
        uses = transposed_convolution_uses(input.detach(), window, groups)
        sizes = weight.shape[0] // groups, weight[0].numel()
        rows = Rows(index, 0, weight.shape[0])
        key = KroneckerKey(rows, *sizes, input_first=True, groups=groups)
        self._layer(out, key, None, uses)

    # -- element-wise operations -----------------------------------------------------------------------

    def _vector(
        self,
        out: Tensor,
        params: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        derivatives: Callable[[Tensor], Sequence[Tensor]],
    ) -> None:
        """Note parameters that enter a result element by element.

        Args:
            out: The result.
            params: Gain and bias, say; those that are not trained do not count.
            shapes: How each lies along the result's last axes; -1 for its size.
            derivatives: g -> the part of each parameter, in the shape of the result.
        """
        known = [(k, self._index_of(p)) for k, p in enumerate(params)]
        trained = [(k, index) for k, index in known if index is not None]
        if not trained:
            return
        n = self._n

        def rows(g: Tensor) -> list[Tensor]:
            parts = derivatives(g)
            return [
                per_example(parts[k], params[k].view(shapes[k]).shape, n).flatten(1)
                for k, _ in trained
            ]

        key = VectorKey(tuple(index for _, index in trained), params[trained[0][0]].numel())
        self.vectors.append(VectorCall(key=key, output=edge(out), rows=rows))

    def _gain_and_bias(
        self,
        out: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: Sequence[int],
        normalised: Callable[[], Tensor],
    ) -> None:
        """y = weight * normalised input + bias."""
        if self._index_of(weight) is None and self._index_of(bias) is None:
            return
        x = normalised() if self._index_of(weight) is not None else None

        def derivatives(g: Tensor) -> list[Tensor]:
            return [g if x is None else g * x, g]

        self._vector(out, [weight, bias], [shape, shape], derivatives)

    def _layer_norm(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
        **__: Any,
    ) -> None:
        def normalised() -> Tensor:
            return F.layer_norm(input, normalized_shape, None, None, eps)

        self._gain_and_bias(out, weight, bias, tuple(normalized_shape), normalised)

    def _rms_norm(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> None:
        def normalised() -> Tensor:
            return F.rms_norm(input, list(normalized_shape), None, eps)

        self._gain_and_bias(out, weight, None, tuple(normalized_shape), normalised)

    def _group_norm(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> None:
        def normalised() -> Tensor:
            return F.group_norm(input, num_groups, None, None, eps)

        self._gain_and_bias(out, weight, bias, _channels(input), normalised)

    def _batch_norm(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *_: Any,
    ) -> None:
        def normalised() -> Tensor:
            if training:  # the running statistics must not move again
                return F.batch_norm(input, None, None, None, None, True, 0.0, eps)
            return F.batch_norm(input, running_mean, running_var, None, None, False, 0.0, eps)

        self._gain_and_bias(out, weight, bias, _channels(input), normalised)

    def _instance_norm(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        def normalised() -> Tensor:
            if use_input_stats:
                return F.instance_norm(input, None, None, None, None, True, 0.0, eps)
            return F.instance_norm(input, running_mean, running_var, None, None, False, 0.0, eps)

        self._gain_and_bias(out, weight, bias, _channels(input), normalised)

    def _prelu(self, func: Any, out: Tensor, input: Tensor, weight: Tensor) -> None:
        negative = input.detach().clamp(max=0.0)
        shape = _channels(input) if weight.numel() > 1 else (1,)
        self._vector(out, [weight], [shape], lambda g: [g * negative])

    def _add(self, func: Any, out: Tensor, a: Any, b: Any, **scales: Any) -> None:
        if not scales:
            for own in (a, b):
                self._operand(out, own, None)

    def _multiply(self, func: Any, out: Tensor, a: Any, b: Any, **_: Any) -> None:
        for own, other in ((a, b), (b, a)):
            if isinstance(own, Tensor):
                self._operand(out, own, other)

    def _operand(self, out: Tensor, own: Any, other: Any) -> None:
        """A parameter, or a view of one, that is added to something, or multiplies it."""
        if not isinstance(own, Tensor) or not own.requires_grad or own.ndim > out.ndim:
            return
        factor = other.detach() if isinstance(other, Tensor) else 1.0 if other is None else other
        if self._index_of(own) is not None:
            self._vector(out, [own], [own.shape], lambda g: [g * factor])
            return
        index = self._index_of(own._base)
        if index is None or own.grad_fn is None:
            return
        parameter, n = self._tensors[index], self._n

        def squares(g: Tensor) -> list[Tensor]:
            seen = per_example(g * factor, own.shape, n).square().sum(0)
            with torch.enable_grad():
                (found,) = grad(own, [parameter], seen.to(own), retain_graph=True)
            return [found]

        self.vectors.append(
            VectorCall(
                key=VectorKey((index,), parameter.numel(), is_diagonal=True),
                output=edge(out),
                rows=squares,
            )
        )


def _with_batch(uses: Callable[[Tensor], Uses]) -> Callable[[Tensor], Uses]:
    return lambda g: uses(g[None])


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for every axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _channels(x: Tensor) -> tuple[int, ...]:
    """How a vector over axis 1 lies along the last axes."""
    return (-1, *[1] * (x.ndim - 2))


@contextmanager
def _without_overrides() -> Iterator[None]:
    """Python functions of torch.nn.functional run their own code in spite of a mode: what they call
    below is seen. (Each asks this function first whether to hand itself over.)"""
    module: Any = F
    own = module.has_torch_function
    module.has_torch_function = lambda *_: False
    try:
        yield
    finally:
        module.has_torch_function = own


_NOTES: dict[Any, Callable[..., None]] = {
    F.linear: LayerWatch._linear,
    **dict.fromkeys(
        (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), LayerWatch._matmul
    ),
    Tensor.__rmatmul__: LayerWatch._reflected_matmul,
    **dict.fromkeys((torch.addmm, Tensor.addmm), LayerWatch._addmm),
    torch.einsum: LayerWatch._einsum,
    F.embedding: LayerWatch._embedding,
    Tensor.__getitem__: LayerWatch._getitem,
    **dict.fromkeys((torch.index_select, Tensor.index_select), LayerWatch._index_select),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), LayerWatch._convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        LayerWatch._transposed_convolution,
    ),
    F.layer_norm: LayerWatch._layer_norm,
    F.rms_norm: LayerWatch._rms_norm,
    F.group_norm: LayerWatch._group_norm,
    F.batch_norm: LayerWatch._batch_norm,
    F.instance_norm: LayerWatch._instance_norm,
    **dict.fromkeys((F.prelu, torch.prelu), LayerWatch._prelu),
    **dict.fromkeys(
        (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
        LayerWatch._add,
    ),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), LayerWatch._multiply),
}
"""What is noted of which function."""
