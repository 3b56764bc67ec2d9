"""DeepXDE's networks and residuals train with HessianFree as their optimizer, from its closures alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepxde") is None, reason="deepxde is not installed"
)

# In a process of its own: deepxde sets torch's default type and device for the whole process. The problem is
# that of its Burgers example, with fewer points; both contenders go on from the same Adam.
PROGRAM = """
import json

import deepxde as dde
import numpy as np
import torch
from deepxde.optimizers.pytorch import nncg

import hfdist

torch.set_num_threads(1)
dde.config.set_default_float("float64")


def burgers(x, u):
    u_x, u_t = dde.grad.jacobian(u, x, j=0), dde.grad.jacobian(u, x, j=1)
    return u_t + u * u_x - 0.01 / np.pi * dde.grad.hessian(u, x, i=0, j=0)


def started():
    dde.config.set_random_seed(0)
    domain = dde.geometry.GeometryXTime(
        dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99)
    )
    conditions = [
        dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, at: at),
        dde.icbc.IC(domain, lambda x: -np.sin(np.pi * x[:, :1]), lambda _, at: at),
    ]
    data = dde.data.TimePDE(
        domain, burgers, conditions, num_domain=150, num_boundary=20, num_initial=40
    )
    model = dde.Model(data, dde.nn.FNN([2] + [12] * 3 + [1], "tanh", "Glorot normal"))
    model.compile("adam", lr=1e-3)
    model.train(iterations=100, display_every=1000, verbose=0)
    return model


def loss(model):
    return float(sum(model.train_state.loss_train))


products = 0
product = nncg.NNCG._hvp


def counted(*args):
    global products
    products += 1
    return product(*args)


nncg.NNCG._hvp = counted
model = started()
start = loss(model)
dde.optimizers.set_NNCG_options(rank=20, cgmaxiter=30)
model.compile("NNCG")
model.train(iterations=4, display_every=1, verbose=0)
theirs = {"loss": loss(model), "products": products}

model = started()
optimizer = hfdist.HessianFree(model.net.parameters())
model.compile(optimizer)
model.train(iterations=8, display_every=1, verbose=0)
ours = {
    "loss": loss(model),
    "products": sum(report.num_products for report in optimizer.history),
    "reported": optimizer.report.final_loss,
    "engine": optimizer.report.product_engine,
}
print(json.dumps({"start": start, "theirs": theirs, "ours": ours}))
"""


def test_hessian_free_is_ahead_of_its_own_newton_cg_with_half_the_products(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"DDE_BACKEND": "pytorch", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found["ours"], found["theirs"]
    assert ours["loss"] == pytest.approx(ours["reported"], rel=1e-9)
    assert ours["engine"] == "linearize"  # derivatives in the inputs are replayed
    assert ours["loss"] <= theirs["loss"] < found["start"], found
    assert 0 < ours["products"] <= 0.5 * theirs["products"], found
