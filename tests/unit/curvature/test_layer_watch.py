"""What a watched forward pass notes of layers: inputs and derivatives that add up to the parameters' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from hfdist.curvature.kronecker.keys import KroneckerKey
from hfdist.curvature.kronecker.watch import LayerWatch

N = 4


class Uses(nn.Module):
    """A module of parameters of given shapes, and a function of it and x."""

    def __init__(
        self, function: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Attention(nn.Module):
    def __init__(self, memory: bool, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **arguments)
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1)[:, :2] if self.memory else x
        return self.attention(x, other, other, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, packed: bool = False) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            y, state = self.layer(x)
        else:
            y, state = self.layer(
                pack_padded_sequence(x, torch.tensor([3, 5, 2, 3]), True, enforce_sorted=False)
            )
            y = y.data
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([t.flatten() for t in (y, *states)])


def cell(layer: nn.Module) -> nn.Module:
    def run(module: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = module.layer(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]

    module = Uses(run)
    module.layer = layer
    return module


def in_place(module: Any, x: Tensor) -> Tensor:
    return torch.relu_(F.linear(x, module.W))


def tied(module: Any, x: Tensor) -> Tensor:
    ids = (x.abs() * 3).long().clamp(max=5)
    return F.linear(torch.tanh(F.embedding(ids, module.W)), module.W, module.b)


def flat(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


BATCH = {"batch_first": True}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(3, 5), lambda: flat(3)),
    "linear of sequences": (lambda: nn.Linear(3, 5, bias=False), lambda: flat(2, 3)),
    "in place after": (lambda: Uses(in_place, W=(5, 3)), lambda: flat(3)),
    "matmul": (lambda: Uses(lambda m, x: x @ m.W, W=(3, 5)), lambda: flat(3)),
    "matmul of a transpose": (lambda: Uses(lambda m, x: x @ m.W.t(), W=(5, 3)), lambda: flat(3)),
    "linear of a transpose": (
        lambda: Uses(lambda m, x: F.linear(x, m.W.T, m.b), W=(3, 5), b=(5,)),
        lambda: flat(3),
    ),
    "addmm": (lambda: Uses(lambda m, x: torch.addmm(m.b, x, m.W), W=(3, 5), b=(5,)), lambda: flat(3)),
    "einsum": (
        lambda: Uses(lambda m, x: torch.einsum("io,nti->ont", m.W, x), W=(3, 5)),
        lambda: flat(2, 3),
    ),
    "rows of a weight": (
        lambda: Uses(
            lambda m, x: F.linear(x, m.W[:2], m.b[:2]).sum(1, keepdim=True) + F.linear(x, m.W[2:]),
            W=(5, 3),
            b=(5,),
        ),
        lambda: flat(3),
    ),
    "indices": (lambda: Uses(lambda m, x: m.W[x.long() % 3], W=(3, 5)), lambda: 5 * flat(2)),
    "embedding": (
        lambda: Uses(lambda m, x: m.layer(x.long() % 3)),
        lambda: 5 * flat(2),
    ),
    "tied": (lambda: Uses(tied, W=(6, 3), b=(6,)), lambda: flat(2)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), lambda: flat(2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), padding=(1, 0)), lambda: flat(2, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), lambda: flat(2, 5, 6)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: flat(4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), lambda: flat(3, 5, 5)),
    "conv2d circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: flat(2, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), lambda: flat(1, 3, 4, 3)),
    "transposed conv1d": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1),
        lambda: flat(2, 4),
    ),
    "transposed conv2d groups": (
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=1, groups=2, dilation=2),
        lambda: flat(4, 3, 3),
    ),
    "layer norm": (lambda: nn.LayerNorm(5), lambda: flat(2, 5)),
    "layer norm of axes": (lambda: nn.LayerNorm((2, 5)), lambda: flat(3, 2, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), lambda: flat(2, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: flat(4, 3)),
    "batch norm": (lambda: nn.BatchNorm2d(3), lambda: flat(3, 2, 2)),
    "batch norm, evaluation": (lambda: nn.BatchNorm1d(3).eval(), lambda: flat(3)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), lambda: flat(3, 5)),
    "prelu": (lambda: nn.PReLU(3), lambda: flat(3, 2)),
    "added": (lambda: Uses(lambda m, x: m.b + x, b=(3,)), lambda: flat(2, 3)),
    "multiplied": (lambda: Uses(lambda m, x: x * m.b * 2.0, b=(2, 1)), lambda: flat(2, 3)),
    "positions": (lambda: Uses(lambda m, x: x + m.b[: x.shape[1]], b=(4, 3)), lambda: flat(2, 3)),
    "own attention": (lambda: Attention(False), lambda: flat(3, 4)),
    "attention to others": (lambda: Attention(True), lambda: flat(3, 4)),
    "attention of other widths": (lambda: Attention(True, kdim=4, vdim=4, bias=False), lambda: flat(3, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM(3, 2, **BATCH)), lambda: flat(5, 3)),
    "lstm both ways": (
        lambda: Recurrent(nn.LSTM(3, 2, 2, bidirectional=True, **BATCH)),
        lambda: flat(5, 3),
    ),
    "lstm projected": (lambda: Recurrent(nn.LSTM(3, 4, proj_size=2, **BATCH)), lambda: flat(5, 3)),
    "packed lstm": (
        lambda: Recurrent(nn.LSTM(3, 2, bidirectional=True, **BATCH), packed=True),
        lambda: flat(5, 3),
    ),
    "gru": (lambda: Recurrent(nn.GRU(3, 2, 2, **BATCH)), lambda: flat(5, 3)),
    "packed gru": (lambda: Recurrent(nn.GRU(3, 2, **BATCH), packed=True), lambda: flat(5, 3)),
    "rnn": (lambda: Recurrent(nn.RNN(3, 2, bias=False, **BATCH)), lambda: flat(5, 3)),
    "relu rnn": (lambda: Recurrent(nn.RNN(3, 2, nonlinearity="relu")), lambda: flat(5, 3)),
    "lstm cell": (lambda: cell(nn.LSTMCell(3, 2)), lambda: flat(5, 3)),
    "gru cell": (lambda: cell(nn.GRUCell(3, 2)), lambda: flat(5, 3)),
    "rnn cell": (lambda: cell(nn.RNNCell(3, 2)), lambda: flat(5, 3)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, data = CASES[name]
    module = make()
    if name == "embedding":
        module.layer = nn.Embedding(3, 5, padding_idx=0)
    return module.double(), data().double()


def of_weight(key: KroneckerKey, x: Tensor, g: Tensor) -> Tensor:
    """sum_r g_r x_r', in the layout of the weight's rows."""
    if key.is_one_hot:
        x = F.one_hot(x, key.num_inputs).to(g)
    x, g = x.view(len(x), key.groups, -1), g.view(len(g), key.groups, -1)
    product = torch.einsum("rgi,rgo->gio" if key.input_first else "rgi,rgo->goi", x, g)
    return product.flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_derivatives_add_up_to_the_parameters_own(name: str) -> None:
    module, x = made(name)
    parameters = list(module.parameters())
    with LayerWatch(parameters, N) as watch:
        y = module(x)
    torch.testing.assert_close(y, module(x))  # recurrent layers go another way
    c = torch.randn_like(y)
    calls = [*watch.layers, *watch.vectors]
    edges = [torch.autograd.graph.GradientEdge(*call.output) for call in calls]
    found = torch.autograd.grad([y], [*edges, *parameters], [c], retain_graph=True)
    noted = [torch.zeros_like(p) for p in parameters]
    for layer, g in zip(watch.layers, found):
        rows = layer.key.rows
        for inputs, gx in layer.uses(g):
            inputs, gx = inputs.flatten(0, 1), gx.flatten(0, 1)
            noted[rows.index][rows.start : rows.stop].flatten(1).add_(
                of_weight(layer.key, inputs, gx)
            )
        if layer.bias is not None:
            total = sum(gx.sum((0, 1)) for _, gx in layer.uses(g))
            noted[layer.bias.index][layer.bias.start : layer.bias.stop] += total
    for vector, g in zip(watch.vectors, found[len(watch.layers) :]):
        if vector.key.is_diagonal:
            continue
        for index, rows_of in zip(vector.key.params, vector.rows(g)):
            assert rows_of.shape == (N, parameters[index].numel())
            noted[index].view(-1).add_(rows_of.sum(0))
    squares_only = {k for v in watch.vectors if v.key.is_diagonal for k in v.key.params}
    for k, own in enumerate(found[len(calls) :]):
        if k not in squares_only:
            torch.testing.assert_close(noted[k], own)


def test_squares_of_a_view_are_those_of_its_parameter() -> None:
    module, x = made("positions")
    with LayerWatch(list(module.parameters()), N) as watch:
        y = module(x)
    c = torch.randn_like(y)
    (vector,) = watch.vectors
    (squares,) = vector.rows(c)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[:2] = c.square().sum(0)
    torch.testing.assert_close(squares, expected)


def test_frozen_parameters_are_nobodys() -> None:
    layer = nn.Linear(3, 5)
    layer.bias.requires_grad_(False)
    with LayerWatch([layer.weight], N) as watch:
        layer(flat(3))
    assert [call.bias for call in watch.layers] == [None]
    with LayerWatch([layer.bias], N) as watch:
        layer(flat(3))
    assert not watch.layers
