"""How numbers are computed: set for a run, and put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hfdist
from hfdist.config.job import RunConfig
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.devices import arithmetic
from hfdist.errors import TaskError


def settings() -> dict[str, Any]:
    backends = torch.backends
    return {
        "products": backends.cuda.matmul.fp32_precision == "tf32",
        "convolutions": backends.cudnn.conv.fp32_precision == "tf32",
        "cells": backends.cudnn.rnn.fp32_precision == "tf32",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def of(tf32: bool, deterministic: bool) -> dict[str, Any]:
    kinds = ("products", "convolutions", "cells")
    return {**dict.fromkeys(kinds, tf32), "deterministic": deterministic}


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_settings_hold_inside_and_are_put_back(tf32: bool, deterministic: bool) -> None:
    before = settings()
    with arithmetic(tf32=tf32, deterministic=deterministic):
        assert settings() == of(tf32, deterministic)
        with FixedRandomness(torch.device("cpu"), nn.LSTM(2, 2)).evaluation(0):
            pass
        assert settings() == of(tf32, deterministic)
    assert settings() == before


def test_settings_by_torchs_newer_names_are_put_back() -> None:
    """They cannot be read by the older ones where they differ."""
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    try:
        conv.fp32_precision, rnn.fp32_precision = "ieee", "tf32"
        mixed = settings()
        with arithmetic(tf32=False, deterministic=False):
            assert settings() == of(tf32=False, deterministic=False)
        assert settings() == mixed
    finally:
        conv.fp32_precision, rnn.fp32_precision = before


def test_what_the_program_has_set_stays() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with arithmetic(tf32=False, deterministic=False):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        with arithmetic(tf32=False, deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class Seen(hfdist.Task):
    """Notes the settings under which its loss is computed; `put_` has no deterministic kernel."""

    found: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, puts: bool = False) -> None:
        self.puts = puts

    def train_data(self) -> hfdist.ArrayData:
        return hfdist.ArrayData(
            torch.linspace(-1, 1, 6)[:, None], torch.linspace(-1, 1, 6)[:, None]
        )

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        self.found.append(settings())
        if self.puts:
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return nn.functional.mse_loss(outputs, batch[1])


def job(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {"task": f"{__name__}:Seen", "steps": 1, "device": "cpu", "output": str(tmp_path)}
    return RunConfig.model_validate({**values, "tracking": {"enabled": False}, **changes})


@pytest.mark.parametrize(("tf32", "deterministic"), [(False, False), (True, True)])
def test_a_run_has_the_jobs_settings_and_records_them(
    tf32: bool, deterministic: bool, tmp_path: Path
) -> None:
    before = settings()
    Seen.found.clear()
    result = hfdist.train(job(tmp_path, tf32=tf32, deterministic=deterministic))
    assert len(Seen.found) > 2
    assert all(found == of(tf32, deterministic) for found in Seen.found)
    assert settings() == before
    recorded = RunConfig.from_run(Path(result["run_dir"]))
    assert (recorded.tf32, recorded.deterministic) == (tf32, deterministic)
    assert json.loads((tmp_path / result["run_id"] / "result.json").read_text())["steps"] == 1


def test_an_operation_without_a_deterministic_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"put_.*set deterministic=false"):
        hfdist.train(job(tmp_path, deterministic=True, task_args={"puts": True}))
