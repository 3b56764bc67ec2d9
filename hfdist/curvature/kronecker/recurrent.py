"""Recurrent layers as the linear layers that they consist of, step by step.

Torch computes them in one operation, in which no layer is to be seen. The statistics' pass and rows of
Jacobians go through these instead: the same values up to rounding, more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM, each [n, hidden]
Cell = Callable[[Tensor, State, Sequence[Tensor]], State]
"""(W_i x + b_i [n, gates], state, (W_h, b_h, ..)) -> the next state."""


def _hidden(state: State, weights: Sequence[Tensor]) -> Tensor:
    """W_h h + b_h."""
    return F.linear(state[0], weights[0], weights[1] if len(weights) > 1 else None)


def _tanh(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    return (torch.tanh(x + _hidden(state, weights)),)


def _relu(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    return (torch.relu(x + _hidden(state, weights)),)


def _gru(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = _hidden(state, weights).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (state[0] - n),)


def _lstm(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    i, f, g, o = (x + _hidden(state, weights)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_projected(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    """With `proj_size`: the last weight maps the hidden units to fewer."""
    h, c = _lstm(x, state, weights[:-1])
    return F.linear(h, weights[-1]), c


# -- layers ------------------------------------------------------------------------------------------


def _layer(cell: Cell, is_lstm: bool = False) -> Callable[..., Any]:
    """Torch's function of a whole layer, for padded and for packed sequences."""

    def run(*args: Any) -> Any:
        # (input, states, weights, has_biases, layers, dropout, train, bidirectional, batch_first), or
        # (data, batch_sizes, states, weights, has_biases, layers, dropout, train, bidirectional)
        is_packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
        if is_packed:
            x, batch_sizes, states, weights, has_biases, layers, dropout, train, both = args
            sizes = batch_sizes.tolist()
        else:
            x, states, weights, has_biases, layers, dropout, train, both, batch_first = args
            x = x if batch_first else x.transpose(0, 1)  # [N, T, in]
            sizes = None
        states = (states,) if isinstance(states, Tensor) else tuple(states)
        directions = 2 if both else 1
        each = len(weights) // (layers * directions)
        ends: list[State] = []
        for layer in range(layers):
            results = []
            for direction in range(directions):
                place = layer * directions + direction
                own = weights[place * each : (place + 1) * each]
                start = tuple(s[place] for s in states)
                y, end = _direction(
                    _projected(cell, is_lstm, own, has_biases), x, sizes, start, own, has_biases,
                    backwards=direction == 1,
                )  # fmt: skip
                results.append(y)
                ends.append(end)
            x = torch.cat(results, -1)
            if dropout and train and layer < layers - 1:
                x = F.dropout(x, dropout)
        last = tuple(torch.stack(parts) for parts in zip(*ends))
        if not is_packed and not batch_first:
            x = x.transpose(0, 1)
        return (x, *last)

    return run


def _projected(cell: Cell, is_lstm: bool, weights: Sequence[Tensor], has_biases: bool) -> Cell:
    has_projection = is_lstm and len(weights) == (5 if has_biases else 3)
    return _lstm_projected if has_projection else cell


def _direction(
    cell: Cell,
    x: Tensor,
    sizes: Sequence[int] | None,
    state: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    backwards: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction: (outputs, last state).

    Args:
        x: [N, T, in]; of sequences of different length, the steps' inputs one after the other.
        sizes: Then, how many sequences reach each step, longest first.
    """
    W_i, W_h, *rest = weights
    b_i = rest.pop(0) if has_biases else None
    hidden = [W_h, *rest]
    projected, is_packed = F.linear(x, W_i, b_i), sizes is not None
    steps = projected.split(list(sizes)) if sizes is not None else projected.unbind(1)
    sizes = [len(x)] * len(steps) if sizes is None else sizes
    outputs: list[Tensor] = [x] * len(steps)
    finished: list[State] = []
    now = tuple(s[: sizes[-1] if backwards else sizes[0]] for s in state)
    for t in reversed(range(len(steps))) if backwards else range(len(steps)):
        n = sizes[t]
        if n < len(now[0]):  # shorter sequences end
            finished.append(tuple(s[n:] for s in now))
            now = tuple(s[:n] for s in now)
        elif n > len(now[0]):  # longer ones have run; the others begin at their end
            now = tuple(torch.cat((s, s0[len(s) : n])) for s, s0 in zip(now, state))
        now = cell(steps[t], now, hidden)
        outputs[t] = now[0]
    ends = tuple(torch.cat(parts) for parts in zip(now, *reversed(finished)))
    return torch.cat(outputs) if is_packed else torch.stack(outputs, 1), ends


# -- cells -------------------------------------------------------------------------------------------


def _one_step(cell: Cell) -> Callable[..., Any]:
    def run(
        x: Tensor,
        state: Any,
        W_i: Tensor,
        W_h: Tensor,
        b_i: Tensor | None = None,
        b_h: Tensor | None = None,
    ) -> Any:
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        end = cell(F.linear(x, W_i, b_i), states, [W_h] if b_h is None else [W_h, b_h])
        return end[0] if isinstance(state, Tensor) else end

    return run


PARTS: dict[Any, Callable[..., Any]] = {
    torch._VF.rnn_tanh: _layer(_tanh),
    torch._VF.rnn_relu: _layer(_relu),
    torch._VF.gru: _layer(_gru),
    torch._VF.lstm: _layer(_lstm, is_lstm=True),
    torch._VF.rnn_tanh_cell: _one_step(_tanh),
    torch._VF.rnn_relu_cell: _one_step(_relu),
    torch._VF.gru_cell: _one_step(_gru),
    torch._VF.lstm_cell: _one_step(_lstm),
}
"""Torch's functions, and what stands for them."""


class StepByStep(TorchFunctionMode):
    """Inside the context torch's recurrent layers run step by step, as the linear layers they consist of."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return PARTS.get(func, func)(*args, **(kwargs or {}))
