"""The comparison on small batches runs, and all contenders see the job's examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfdist.bench import small_batches

JOB = Path(__file__).resolve().parents[3] / "deploy" / "jobs" / "digits_classifier.yaml"


def test_a_table_of_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small_batches, "RATES", {"Adam": (1e-2,)})
    small_batches.main([str(JOB), "--batch", "100", "--gradients", "0.2", "0.5", "--seeds", "3"])
    *_, columns, ours, adam = capsys.readouterr().out.splitlines()
    assert columns.split() == ["gradients", "0.2", "0.5"]
    assert ours.startswith("Hessian-free")
    assert adam.startswith("Adam lr 0.01")
    assert "[3, 0]" in adam  # of 0.2 gradients: three updates on 100 of 1,437 examples
