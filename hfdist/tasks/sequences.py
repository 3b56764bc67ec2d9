"""Sequences of different length: a small transformer on text, an LSTM on the addition problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task

IGNORED = -100
"""Target of padding, torch's and Hugging Face's."""


# -- transformer -------------------------------------------------------------------------------------


@cache
def _lines(number: int) -> list[bytes]:
    """Lines of Python's own standard library: text that every machine has."""
    import argparse
    import ast
    import inspect
    import json

    text = b"".join(inspect.getsource(m).encode() for m in (argparse, ast, json))
    lines = [line for line in text.split(b"\n") if len(line.strip()) >= 4]
    return [lines[k % len(lines)] for k in range(number)]


class TextLines(Dataset[Tensor]):
    """Bytes of lines, at most `length` of them, int64 [n]."""

    def __init__(self, number: int, length: int, first: int = 0) -> None:
        self._examples = [
            torch.tensor(list(line[:length])) for line in _lines(first + number)[first:]
        ]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Tensor:
        return self._examples[index]

    def lengths(self) -> Tensor:
        """Bytes of every line."""
        return torch.tensor([len(e) for e in self._examples])


class CausalTransformer(nn.Module):
    """A decoder-only transformer over bytes, called as Hugging Face's are."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, length: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Logits [batch, time, vocabulary] for tokens and mask (1: a token, 0: padding) [batch, time]."""
        n = input_ids.shape[1]
        x = self.tokens(input_ids) + self.positions(torch.arange(n, device=input_ids.device))
        later = torch.ones(n, n, dtype=torch.bool, device=input_ids.device).triu(1)
        x = self.body(x, mask=later, src_key_padding_mask=attention_mask == 0)
        # Input and output embeddings are tied.
        return {"logits": nn.functional.linear(self.norm(x), self.tokens.weight)}


class TextTransformer(Task):
    """Next byte of lines of source code, padded; loss is the mean over the bytes that are there.

    Args:
        examples, evaluation: Number of lines.
        width, layers, heads: Of the transformer.
        length: Longest line, in bytes.
        dropout: Probability of dropping.
    """

    def __init__(
        self,
        examples: int = 256,
        evaluation: int = 64,
        width: int = 32,
        layers: int = 2,
        heads: int = 2,
        length: int = 48,
        dropout: float = 0.0,
    ) -> None:
        if width % heads:
            raise TaskError(f"task_args.width is {width}: it must be a multiple of heads ({heads})")
        self._shape = (width, layers, heads, length, dropout)
        self._train = TextLines(examples, length)
        self._eval = TextLines(evaluation, length, first=examples) if evaluation else None

    def model(self) -> nn.Module:
        return CausalTransformer(256, *self._shape)

    def train_data(self) -> TextLines:
        return self._train

    def eval_data(self) -> TextLines | None:
        return self._eval

    def collate(self, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pad to the longest: {"input_ids", "attention_mask", "labels"}, each [batch, time]."""
        longest = max(max(len(e) for e in examples) - 1, 1)
        ids = torch.zeros(len(examples), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, e in enumerate(examples):
            ids[row, : len(e) - 1], labels[row, : len(e) - 1] = e[:-1], e[1:]
            mask[row, : len(e) - 1] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch["labels"].flatten()
        total = nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
        )
        return total, (labels != IGNORED).sum()

    def metrics(self, outputs: Outputs, batch: Batch) -> dict[str, Any]:
        there = batch["labels"] != IGNORED
        right = (outputs["logits"].argmax(-1) == batch["labels"]) & there
        total, weight = self.loss(outputs, batch)
        return {"accuracy": (right.sum(), there.sum()), "bits": (total / math.log(2), weight)}

    def example_costs(self) -> Tensor:
        return self._train.lengths()


# -- arithmetic --------------------------------------------------------------------------------------


class Addition(Dataset[Mapping[str, Tensor]]):
    """The addition problem [Hochreiter & Schmidhuber 1997]: the sum of the two marked numbers of a
    sequence. Lengths vary between half of `length` and `length`."""

    def __init__(self, number: int, length: int, first: int = 0) -> None:
        self._number, self._length, self._first = number, length, first

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        if not 0 <= index < self._number:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self._first + index)
        low = max(2, self._length // 2)
        n = int(torch.randint(low, self._length + 1, (), generator=generator))
        numbers = torch.rand(n, generator=generator)
        marked = torch.randperm(n, generator=generator)[:2]
        marks = torch.zeros(n).index_fill_(0, marked, 1.0)
        return {
            "sequence": torch.stack((numbers, marks), -1),
            "target": self.result(numbers[marked]),
        }

    def result(self, two: Tensor) -> Tensor:
        """What is to be found of the two marked numbers."""
        return two.sum()


class Multiplication(Addition):
    """The same with the product of the two [Hochreiter & Schmidhuber 1997]."""

    def result(self, two: Tensor) -> Tensor:
        return two.prod()


CELLS = {"lstm": nn.LSTM, "tanh": nn.RNN}


class Recurrent(nn.Module):
    def __init__(self, hidden: int, cell: str) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def hidden_units(self) -> list[nn.Module]:
        """For `optim.structural_damping`."""
        return [self.recurrent]

    def forward(self, sequence: Tensor, length: Tensor) -> Tensor:
        """The result [batch] of sequences [batch, time, 2] of the given lengths [batch]."""
        states, _ = self.recurrent(sequence)
        last = states[torch.arange(len(length), device=length.device), length - 1]
        return self.head(last).squeeze(-1)


class LSTMAddition(Task):
    """A recurrent net on the addition problem; loss is the mean squared error.

    Args:
        examples, evaluation: Number of sequences.
        hidden: Units of the net.
        length: Longest sequence.
        cell: "lstm", or "tanh" for a simple recurrent net.
    """

    target_keys = ("target",)
    sum_of_squares = True
    data: type[Addition] = Addition

    def __init__(
        self,
        examples: int = 512,
        evaluation: int = 128,
        hidden: int = 24,
        length: int = 20,
        cell: str = "lstm",
    ) -> None:
        if length < 2:
            raise TaskError(f"task_args.length is {length}: it must be at least 2")
        if cell not in CELLS:
            raise TaskError(f"task_args.cell is {cell!r}: it must be one of {', '.join(CELLS)}")
        self._sizes, self._hidden, self._length = (examples, evaluation), hidden, length
        self._cell = cell

    def model(self) -> nn.Module:
        return Recurrent(self._hidden, self._cell)

    def train_data(self) -> Addition:
        return self.data(self._sizes[0], self._length)

    def eval_data(self) -> Addition | None:
        n = self._sizes[1]
        return self.data(n, self._length, first=10**6) if n else None

    def collate(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad with zeros: {"sequence" [batch, time, 2], "length" [batch], "target" [batch]}."""
        sequences = [e["sequence"] for e in examples]
        return {
            "sequence": nn.utils.rnn.pad_sequence(sequences, batch_first=True),
            "length": torch.tensor([len(s) for s in sequences]),
            "target": torch.stack([e["target"] for e in examples]),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["target"])

    def example_costs(self) -> Tensor:
        # An LSTM's work is its number of time steps.
        data = self.train_data()
        return torch.tensor([float(len(data[k]["sequence"])) for k in range(len(data))])


class LSTMMultiplication(LSTMAddition):
    """A recurrent net on the multiplication problem; arguments as for the addition problem."""

    data = Multiplication
