"""Parameters as a vector: trial values without copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfdist.curvature.params import ParameterVector


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())


def test_values_of_a_vector_come_and_go(model: nn.Module) -> None:
    params = ParameterVector(model.parameters())
    before, places = params.read(), [t.data_ptr() for t in params.tensors]
    trial = torch.arange(params.numel, dtype=torch.float64)
    with params.at(trial):
        assert torch.equal(params.read(), trial)
        # Where the dtype allows, what the model sees is the vector itself.
        assert params.tensors[2].data_ptr() == trial[params.spans[2][0] :].data_ptr()
        assert params.tensors[0].dtype == torch.float32
    assert torch.equal(params.read(), before)
    assert [t.data_ptr() for t in params.tensors] == places


def test_an_exception_leaves_the_parameters_as_they_were(model: nn.Module) -> None:
    params = ParameterVector(model.parameters())
    before, places = params.read(), [t.data_ptr() for t in params.tensors]
    with pytest.raises(RuntimeError, match="in the middle"), params.at(params.zeros()):
        raise RuntimeError("in the middle")
    with pytest.raises(RuntimeError), params.at(torch.zeros(3)):
        pass
    assert torch.equal(params.read(), before)
    assert [t.data_ptr() for t in params.tensors] == places


def test_moved_is_the_sum(model: nn.Module) -> None:
    params = ParameterVector(model.parameters())
    delta = torch.linspace(-1, 1, params.numel, dtype=torch.float64)
    moved = params.moved(0.3, delta, params.zeros())
    torch.testing.assert_close(moved, params.read() + 0.3 * delta, rtol=1e-15, atol=1e-15)
