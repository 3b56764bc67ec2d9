"""The problems that optimizers are compared on: whole batches, nothing to download, nothing set per problem
but sizes, the L2 coefficient and the losses to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfdist.config.job import RunConfig, from_dict, load_config, merged
from hfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A problem."""

    description: str
    task: str
    task_args: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    microbatch: int | None = None
    dtype: str = "float32"
    thresholds: tuple[float, ...] = ()
    """Losses to reach; none: what the best rival reaches (see `tables.thresholds_of`)."""


COMPARISONS: dict[str, Comparison] = {
    "digits-autoencoder": Comparison(
        description="autoencoder 64-128-64-32-12 of 1,437 real digits",
        task="hfdist.tasks.digits:DigitsAutoencoder",
        weight_decay=1e-4,
        thresholds=(16.0, 15.5, 15.0, 14.9),
    ),
    **{
        f"curves-{train}": Comparison(
            description=f"autoencoder 784-400-200-100-50-25-6 of {train:,} images of CURVES-R",
            task="hfdist.tasks.curves:Curves",
            task_args={"train": train, "evaluation": 0},
            weight_decay=2e-5,
            microbatch=None if train <= 2000 else 2000,
        )
        for train in (1000, 2000, 20_000)
    },
    "mnist-shaped": Comparison(
        description="autoencoder 784-1000-500-250-30 of 2,000 images of CURVES-R",
        task="hfdist.tasks.curves:Curves",
        task_args={"train": 2000, "evaluation": 0, "widths": [1000, 500, 250, 30]},
        weight_decay=2e-5,
    ),
    "all-cnn-c": Comparison(
        description="All-CNN-C on 2,000 patches of photographs, 3 x 32 x 32, 20 classes",
        task="hfdist.tasks.photographs:PhotographsAllCNNC",
        task_args={"examples": 2000},
        weight_decay=5e-4,
        microbatch=250,
    ),
    "resnet-18": Comparison(
        description="ResNet-18 on 1,437 real digits, enlarged to 1 x 28 x 28",
        task="hfdist.tasks.digits:DigitsResNet18",
        weight_decay=5e-4,
        microbatch=479,
    ),
    "all-cnn-c-narrow": Comparison(
        description="All-CNN-C of 12 and 24 channels on 1,000 patches, for CPUs",
        task="hfdist.tasks.photographs:PhotographsAllCNNC",
        task_args={"examples": 1000, "widths": [12, 24]},
        weight_decay=5e-4,
    ),
    "resnet-18-narrow": Comparison(
        description="ResNet-18 of 8 to 64 channels on 1,437 real digits, 1 x 8 x 8, for CPUs",
        task="hfdist.tasks.digits:DigitsResNet18",
        task_args={"side": 8, "width": 8},
        weight_decay=5e-4,
    ),
    "transformer": Comparison(
        description="causal transformer on 256 lines of the standard library's source",
        task="hfdist.tasks.sequences:TextTransformer",
        task_args={"examples": 256, "evaluation": 0, "width": 64, "length": 64},
    ),
    "lstm-addition": Comparison(
        description="LSTM on 512 addition problems of up to 80 numbers",
        task="hfdist.tasks.sequences:LSTMAddition",
        task_args={"length": 80, "evaluation": 0},
    ),
    "diabetes": Comparison(
        description="regression of 442 patients' data, 10-64-64-1",
        task="hfdist.tasks.diabetes:Diabetes",
        weight_decay=1e-3,
    ),
}


def named(
    name: str, overrides: Sequence[str], problems: Mapping[str, Comparison] = COMPARISONS
) -> tuple[str, RunConfig, tuple[float, ...]]:
    """A problem by its name, or a job file: its name, job and thresholds.

    Args:
        name: Of the problem, or the job file's path.
        overrides: Changes of the job, KEY=VALUE.
        problems: To choose from.

    Raises:
        ConfigError: It is neither.
    """
    known = problems.get(name)
    if known is not None:
        values = {
            "name": name,
            "task": known.task,
            "task_args": known.task_args,
            "optim": {"weight_decay": known.weight_decay},
            "batches": {"microbatch": known.microbatch},
            "dtype": known.dtype,
        }
        return name, from_dict(merged(values, overrides), name), known.thresholds
    if not Path(name).suffix:
        raise ConfigError(
            f"unknown problem {name!r}: choose from {', '.join(problems)}, or name a job file"
        )
    config = load_config(name, overrides)
    return config.name, config, ()
