"""Small models of every kind that hfdist must differentiate, each with a batch and a loss.

`CASES` is what tests are parametrised with. Models are small enough for explicit matrices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from dense import Function
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
    scaled_dot_product_attention,
)
from torch.utils._pytree import tree_map

from hfdist.tasks.task import Task

N = 6  # examples of a batch
Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem. `split` and `join` say which tensors of the outputs the loss is a function of."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Loss
    reduction: Literal["mean", "sum"] = "mean"
    forward: Callable[[nn.Module, Any], Any] | None = None
    split: Callable[[Any], list[Tensor]] = lambda outputs: [outputs]
    join: Callable[[list[Tensor]], Any] = lambda z: z[0]
    training: bool = True
    double: bool = True
    """Whether to convert the model to float64; otherwise it keeps its own mixture."""
    coupled: bool = False
    """Whether an example's outputs depend on the other examples (batch norm in training)."""
    random: bool = False
    hessian: bool = True
    """Whether torch's second derivatives of it are right."""

    def model(self) -> nn.Module:
        """The model, the same at every call."""
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            model = self.make()
            return (model.double() if self.double else model).train(self.training)

    def data(self) -> Any:
        """The batch, the same at every call."""
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            return self.batch()

    def task(self) -> Task:
        return _CaseTask(self)

    def function(self, model: nn.Module, batch: Any, seed: int) -> Function:
        """The microbatch in the terms of `dense`."""
        task, n = self.task(), num_rows(batch)

        def outputs() -> list[Tensor]:
            buffers = [(b, b.clone()) for b in model.buffers()]
            with torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
                torch.manual_seed(seed)
                z = self.split(task.forward(model, batch))
            for b, before in buffers:
                b.data.copy_(before)
            return z

        def loss(z: list[Tensor]) -> tuple[Tensor, float]:
            value = self.loss(self.join(z), batch)
            if isinstance(value, tuple):
                return value[0], float(value[1])
            return (value * n if self.reduction == "mean" else value), float(n)

        return Function(outputs=outputs, loss=loss)


class _CaseTask(Task):
    def __init__(self, case: Case) -> None:
        self.case = case
        self.loss_reduction = case.reduction

    def model(self) -> nn.Module:
        return self.case.model()

    def loss(self, outputs: Any, batch: Any) -> Any:
        return self.case.loss(outputs, batch)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if self.case.forward is not None:
            return self.case.forward(model, batch)
        return super().forward(model, batch)


def num_rows(batch: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(batch)
    return next(t.shape[0] for t in leaves if isinstance(t, Tensor))


def rows(batch: Any, low: int, high: int) -> Any:
    """Examples low..high of a batch."""
    return tree_map(lambda t: t[low:high] if isinstance(t, Tensor) else t, batch)


def normal(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


def classes(n: int, *shape: int) -> Tensor:
    return torch.randint(n, (N, *shape))


def ce(outputs: Tensor, batch: Any) -> Tensor:
    return cross_entropy(outputs, batch[1])


def mse(outputs: Tensor, batch: Any) -> Tensor:
    return mse_loss(outputs, batch[1])


def bce(outputs: Tensor, batch: Any) -> Tensor:
    return binary_cross_entropy_with_logits(outputs, batch[1])


def summed_bce(outputs: Tensor, batch: Any) -> Tensor:
    """Cross-entropy summed over pixels, mean over cases, on logistic outputs: no logits anywhere."""
    y = outputs.sigmoid().clamp(1e-6, 1 - 1e-6)
    t = batch[1]
    return -(t * y.log() + (1 - t) * (1 - y).log()).sum(1).mean()


def token_loss(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Sum over the tokens that are no padding (label -100), and their number."""
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    total = cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")
    return total, (labels != -100).sum()


def padded_tokens(vocabulary: int = 7, length: int = 4) -> dict[str, Tensor]:
    """A batch in Hugging Face's manner: ids, mask, labels with -100 for padding."""
    lengths = torch.tensor([4, 2, 3, 1, 4, 3])[:N]
    mask = torch.arange(length)[None] < lengths[:, None]
    ids = torch.where(mask, classes(vocabulary, length), torch.zeros(N, length, dtype=torch.long))
    labels = torch.where(mask, classes(vocabulary, length), torch.full((N, length), -100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# -- modules ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions with batch norm, in-place ReLUs and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2, 1, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.relu(self.norm(self.conv1(x))))
        h = torch.relu_(h + x)
        return self.head(h.flatten(1))


class Tied(nn.Module):
    """Embedding whose matrix is also the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.hidden = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 7)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(ids))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **arguments: Any) -> None:
        super().__init__()
        self.rnn = kind(2, 2, batch_first=True, **arguments)
        self.head = nn.Linear(2 * (2 if arguments.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Causal scaled_dot_product_attention with layer norm and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        h = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + h.transpose(1, 2).flatten(2)).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoder on padded tokens, called in Hugging Face's manner."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        layer = nn.TransformerEncoderLayer(
            4, 2, dim_feedforward=5, dropout=dropout, batch_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=~attention_mask)
        return self.head(h)


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A mapping and a data class at once, unknown to pytrees, with hidden states beside the logits."""

    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


@dataclass
class PlainOutput:
    logits: Tensor
    hidden: Tensor


class TwoLayers(nn.Module):
    """Returns its hidden layer too, in a container of the given kind."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.container = container

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.container(self.second(hidden), hidden)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(left) * self.right(right)))


class Unused(nn.Module):
    def __init__(self, freeze: bool = False) -> None:
        super().__init__()
        self.first, self.never, self.second = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 3)
        if freeze:
            self.first.weight.requires_grad_(False)
            self.never.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Mixed(nn.Module):
    """A float32 layer between float64 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4).double()
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.middle(h.float())).double())


class Scale(nn.Module):
    """A parameter of its own, used twice, once in a matrix product and once element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * self.weight.diagonal() + x


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, 3, padding=1, bias=False),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def _grouped_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding=2, padding_mode="circular"),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def _conv1d_transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 2, 3),
        nn.Softplus(),
        nn.ConvTranspose1d(2, 1, 3, stride=2, output_padding=1),
        nn.Flatten(),
    )


def _batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    norm: Any = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return model


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Unflatten(1, (4, 1)), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.SiLU(), nn.Linear(4, 3),
    )  # fmt: skip


def _instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2, affine=True), nn.ELU(), nn.Flatten(), nn.Linear(4, 3)
    )  # fmt: skip


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def _parametrised() -> nn.Module:
    return nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)
    )


def _logits(outputs: Any, batch: Any) -> Tensor:
    return ce(outputs.logits, batch)


def _first(outputs: Any, batch: Any) -> Tensor:
    return ce(outputs[0], batch)


def _both(outputs: Any, batch: Any) -> Tensor:
    return ce(outputs["logits"], batch) + 0.1 * (outputs["hidden"] ** 4).mean()


def _linear_loss(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs * batch[1]).sum(1).mean()


def _smoothed(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=outputs.dtype, device=outputs.device)
    total = cross_entropy(
        outputs, batch[1], weights, ignore_index=1, label_smoothing=0.2, reduction="sum"
    )
    return total, torch.where(
        batch[1] == 1, torch.zeros_like(weights[batch[1]]), weights[batch[1]]
    ).sum()


def _soft(outputs: Tensor, batch: Any) -> Tensor:
    return cross_entropy(outputs, batch[1].softmax(1))


def _weighted_bce(outputs: Tensor, batch: Any) -> Tensor:
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=outputs.dtype, device=outputs.device)
    return binary_cross_entropy_with_logits(
        outputs, batch[1].sigmoid(), weight, pos_weight=weight + 1, reduction="sum"
    )


def _pair(x: Callable[[], Tensor], y: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (x(), y())


_labelled = _pair(lambda: normal(3), lambda: classes(3))
_images = _pair(lambda: normal(1, 4, 4), lambda: classes(3))
_sequences = _pair(lambda: normal(4, 2), lambda: classes(3))
_regression = _pair(lambda: normal(3), lambda: normal(3))
_bits = _pair(lambda: normal(3), lambda: classes(2, 3).double())

CASES: tuple[Case, ...] = (
    # losses
    Case(name="linear-ce", make=_mlp, batch=_labelled, loss=ce),
    Case(name="linear-mse", make=_mlp, batch=_regression, loss=mse),
    Case(name="linear-bce", make=_mlp, batch=_bits, loss=bce),
    Case(name="summed-bce", make=_mlp, batch=_bits, loss=summed_bce),
    Case(name="sum-of-losses", make=_mlp, batch=_regression, reduction="sum",
         loss=lambda z, b: mse_loss(z, b[1], reduction="sum")),
    Case(name="ce-weights-smoothing-ignored", make=_mlp, batch=_labelled, loss=_smoothed),
    Case(name="ce-probabilities", make=_mlp, batch=_regression, loss=_soft),
    Case(name="bce-weights", make=_mlp, batch=_regression, loss=_weighted_bce, reduction="sum"),
    Case(name="huber", make=_mlp, batch=_regression,
         loss=lambda z, b: torch.nn.functional.huber_loss(z, b[1])),
    Case(name="linear-loss", make=_mlp, batch=_regression, loss=_linear_loss),
    Case(name="two-losses", make=_mlp, batch=_labelled,
         loss=lambda z, b: ce(z, b) + 0.3 * z.pow(2).mean()),
    # layers
    Case(name="conv", make=_conv, batch=_images, loss=ce),
    Case(name="grouped-conv", make=_grouped_conv, loss=ce,
         batch=_pair(lambda: normal(2, 4, 4), lambda: classes(3))),
    Case(name="transposed-conv", make=_conv1d_transposed, loss=mse,
         batch=_pair(lambda: normal(1, 4), lambda: normal(6))),
    Case(name="batch-norm-train", make=_batch_norm, batch=_labelled, loss=ce, coupled=True),
    Case(name="batch-norm-eval", make=_batch_norm, batch=_labelled, loss=ce, training=False),
    Case(name="layer-group-norm", make=_norms, batch=_labelled, loss=ce),
    Case(name="instance-norm", make=_instance_norm, loss=ce,
         batch=_pair(lambda: normal(1, 4), lambda: classes(3))),
    Case(name="dropout", make=_dropout, batch=_labelled, loss=ce, random=True),
    Case(name="residual-train", make=Residual, batch=_images, loss=ce, coupled=True),
    Case(name="residual-eval", make=Residual, batch=_images, loss=ce, training=False),
    Case(name="embedding-tied", make=Tied, batch=_pair(lambda: classes(7, 3), lambda: classes(7, 3)),
         loss=token_loss),
    Case(name="rnn", make=lambda: Recurrent(nn.RNN), batch=_sequences, loss=ce),
    Case(name="gru", make=lambda: Recurrent(nn.GRU), batch=_sequences, loss=ce),
    Case(name="lstm", make=lambda: Recurrent(nn.LSTM), batch=_sequences, loss=ce),
    Case(name="lstm-bidirectional", batch=_sequences, loss=ce,
         make=lambda: Recurrent(nn.LSTM, bidirectional=True)),
    Case(name="attention", make=Attention, batch=_pair(lambda: normal(3, 4), lambda: classes(3)),
         loss=ce),
    Case(name="encoder-padded", make=Encoder, batch=padded_tokens, loss=token_loss),
    Case(name="encoder-dropout", make=lambda: Encoder(0.3), batch=padded_tokens, loss=token_loss,
         random=True),
    # torch 2.14 forgets a term in the second derivative of its fused weight norm.
    Case(name="weight-norm", make=_parametrised, batch=_labelled, loss=ce, hessian=False),
    Case(name="shared-parameter", make=Scale, batch=_regression, loss=mse),
    # parameters
    Case(name="unused", make=Unused, batch=_labelled, loss=ce),
    Case(name="frozen", make=lambda: Unused(freeze=True), batch=_labelled, loss=ce),
    Case(name="mixed-dtypes", make=Mixed, batch=_labelled, loss=ce, double=False),
    # inputs and outputs
    Case(name="tuple-inputs", make=TwoInputs, loss=lambda z, b: ce(z, (None, b[2])),
         batch=lambda: (normal(3), normal(2), classes(3)), forward=lambda m, b: m(b[0], b[1])),
    Case(name="dict-inputs", make=TwoInputs, loss=lambda z, b: cross_entropy(z, b["labels"]),
         batch=lambda: {"left": normal(3), "right": normal(2), "labels": classes(3)}),
    Case(name="tuple-outputs", make=lambda: TwoLayers(lambda z, h: (z, h)), batch=_labelled,
         loss=_first, split=list, join=tuple),
    Case(name="dict-outputs", make=lambda: TwoLayers(lambda z, h: {"logits": z, "hidden": h}),
         batch=_labelled, loss=_both, split=lambda o: [o["logits"], o["hidden"]],
         join=lambda z: {"logits": z[0], "hidden": z[1]}),
    Case(name="model-output", make=lambda: TwoLayers(ModelOutput), batch=_labelled, loss=_both,
         split=lambda o: [o.logits, o.hidden], join=lambda z: ModelOutput(*z)),
    Case(name="dataclass-output", make=lambda: TwoLayers(PlainOutput), batch=_labelled, loss=_logits,
         split=lambda o: [o.logits, o.hidden], join=lambda z: PlainOutput(*z)),
)  # fmt: skip
"""Every module, loss and container that must work."""


def named(names: Sequence[str]) -> list[Case]:
    """The cases of these names."""
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in names]
