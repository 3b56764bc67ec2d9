"""What a user writes: a model, a loss and data."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

Batch = Any  # any pytree of tensors whose leading axis is the example axis
Outputs = Any  # any pytree of tensors
Weighted = tuple[Tensor, Tensor | float]  # (sum, weight)


class Task(abc.ABC):
    """A training problem. Subclass it in a file of your own and name it in the job: `task: file.py:Class`.

    The constructor takes the job's `task_args`. It is built on every rank, so it must be cheap and
    deterministic: random numbers come from torch's generator, which is seeded with the job's `seed`.
    """

    loss_reduction: Literal["mean", "sum"] = "mean"
    """How `loss` is normalised when it returns a scalar: a mean over the examples, or their sum."""

    sum_of_squares: bool | None = None
    """Whether the loss is a sum or mean of squares of what each number of the outputs misses its target by,
    as of `mse_loss`: solvers of residuals may then take the task (`optim.solver` dense and sample_space), and
    `auto` does where their matrix has at most 6,000 rows. None: found out from the loss of a few examples;
    and `auto` then does so where every step sees all examples, the matrix has at most 1,000 rows, and there
    are at most 8 outputs an example (docs/own-model.md, Squares)."""

    target_keys: tuple[str, ...] = ("labels", "label", "targets", "target")
    """Keys of dict batches that `forward` does not hand to the model."""

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """A freshly initialised model, on the CPU and in float32; hfdist moves it."""

    @abc.abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | Weighted:
        """Loss of one batch, without regularisation (that is `optim.weight_decay`).

        Returns:
            A scalar (see `loss_reduction`), or a pair (sum, weight) of scalars for losses whose
            normaliser is no number of examples: padded tokens, class weights. The global loss is
            then the sum of the sums over the sum of the weights.
        """

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Model outputs for a batch: `model(batch[0])` for tuples, `model(**inputs)` for dicts."""
        if batch is None:
            return model()
        if isinstance(batch, Mapping):
            return model(**{k: v for k, v in batch.items() if k not in self.target_keys})
        if isinstance(batch, (tuple, list)):
            return model(batch[0])
        return model(batch)

    def train_data(self) -> Dataset | None:
        """Training data; None for a deterministic function (batches are then None).

        A map-style data set (`__len__`, `__getitem__`), or a stream of examples (`__iter__`: a torch or
        Hugging Face IterableDataset), of which a step sees the next `batches.gradient`.
        """
        return None

    def eval_data(self) -> Dataset | None:
        """Evaluation data, if any: map-style, or a stream that ends."""
        return None

    def metrics(self, outputs: Outputs, batch: Batch) -> Mapping[str, Tensor | Weighted]:
        """Evaluation metrics of one batch: means over its examples, or (sum, weight) pairs."""
        return {}

    def hidden_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules whose outputs are hidden units of a recurrent net, for `optim.structural_damping`; by
        default those that the model's own method `hidden_units()` names."""
        named = getattr(model, "hidden_units", None)
        return list(named()) if callable(named) else []

    def summary(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """What is reported of the loss and the metrics: made of their means over all evaluation data."""
        return means

    def draw(self, model: nn.Module, folder: Path) -> Sequence[Path]:
        """Pictures of the trained model, written into a folder at the end of a run."""
        return []

    def batch_name(self, batch: Batch) -> str:
        """What messages call a batch's loss."""
        return f"{type(self).__name__}.loss"

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Make a batch of examples. Override to pad sequences."""
        return default_collate(list(examples))

    def example_costs(self) -> Sequence[float] | Tensor | None:
        """Relative work of every training example (say, its length), by which ranks are balanced."""
        return None

    def example_inputs(self, batch: Batch) -> Any:
        """The part of a batch that the model takes: the signature of the recorded model."""
        if isinstance(batch, Mapping):
            return {k: v for k, v in batch.items() if k not in self.target_keys}
        if isinstance(batch, (tuple, list)):
            return batch[0]
        return batch


def num_examples(batch: Batch) -> int:
    """Length of the leading axis of a batch; 1 for the batch None of a deterministic function."""
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    return 1
