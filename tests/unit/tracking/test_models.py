"""Saved models predict what the trained ones do, for any number of examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hfdist.tracking.models import save_model


class Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        hidden = self.embed(ids) * mask[..., None]
        return {"logits": self.out(hidden.sum(1) / mask.sum(1, keepdim=True))}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x, y):
        return self.a(x) + y, y


class Rosenbrock(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self):
        return self.x


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


CASES = {
    "mlp": (net(nn.Linear(3, 2), nn.Tanh(), nn.Dropout(0.5)), lambda n: torch.randn(n, 3)),
    "float64": (net(nn.Linear(3, 2)).double(), lambda n: torch.randn(n, 3).double()),
    "images": (
        net(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda n: torch.randn(n, 1, 6, 6),
    ),
    "dict": (
        Dict(),
        lambda n: {"ids": torch.randint(0, 20, (n, 5)), "mask": torch.ones(n, 5)},
    ),
    "tuple": (Two(), lambda n: (torch.randn(n, 3), torch.randn(n, 2))),
    "nothing": (Rosenbrock(), lambda n: None),
}


def call(model: nn.Module, inputs):
    if inputs is None:
        return model()
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_predicts(name, tmp_path, monkeypatch):
    import mlflow.pytorch  # here: it takes seconds, in every process that collects tests
    from mlflow.models import Model

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model, inputs = CASES[name]
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save_model(model, inputs(1), tmp_path / "model")
    assert model.training
    torch.testing.assert_close(dict(model.state_dict()), before)

    loaded = mlflow.pytorch.load_model(str(tmp_path / "model"))
    model.eval()
    for n in (1, 2, 7):
        given = inputs(n)
        torch.testing.assert_close(call(loaded, given), call(model, given))
    if inputs(1) is not None:
        signature = Model.load(str(tmp_path / "model")).signature
        given = inputs(1)
        names = list(given) if isinstance(given, dict) else None
        if names:
            assert signature.inputs.input_names() == names
        assert all(spec.shape[0] == -1 for spec in signature.inputs.inputs)


def test_a_single_tensor_model_serves(tmp_path):
    import mlflow.pyfunc

    model, _ = CASES["mlp"]
    save_model(model, torch.zeros(1, 3), tmp_path / "model")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    data = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    expected = model.eval()(torch.from_numpy(data)).detach().numpy()
    np.testing.assert_allclose(served.predict(data), expected, rtol=1e-5)
    assert served.input_example.shape == (1, 3)
