"""The optimizer behind other libraries' wrappers, copies and pickles, and what is one for all groups."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdist import HessianFree


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(2, (12,), generator=generator)


def closure(model: nn.Module) -> Any:
    x, y = data()

    def forward() -> tuple[Tensor, Tensor]:
        z = model(x)
        return cross_entropy(z, y), z

    return forward


def losses_of_three_steps() -> list[float]:
    model = net()
    optimizer = HessianFree(model.parameters(), seed=3)
    return [optimizer.step(closure(model)) for _ in range(3)]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_as_the_original(how: Any) -> None:
    model = net()
    optimizer = HessianFree(model.parameters(), seed=3)
    losses = [optimizer.step(closure(model))]
    model, optimizer = how((model, optimizer))
    assert optimizer.report.final_loss == losses[0]
    assert len(optimizer.history) == 1
    losses += [optimizer.step(closure(model)) for _ in range(2)]
    assert losses == losses_of_three_steps()


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, HessianFree(model.parameters(), seed=3))
    losses = []
    for _ in range(3):
        optimizer.step(closure(model))
        losses.append(optimizer.optimizer.report.final_loss)
    assert losses == losses_of_three_steps()


def test_lightning(tmp_path: Any) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model, self.losses = net(), []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return HessianFree(self.model.parameters(), seed=3)

        def training_step(self, batch: Any, index: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.step(closure=closure(self.model))
            self.losses.append(optimizer.report.final_loss)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=4)
    trainer.fit(module, loader)
    assert module.losses == losses_of_three_steps()


def test_a_learning_rate_scheduler() -> None:
    model = net()
    optimizer = HessianFree(model.parameters(), use_linesearch=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step(closure(model))
    scheduler.step()
    optimizer.step(closure(model))
    assert optimizer.report.alpha == 0.5


def test_acc_step_takes_a_function_as_its_model() -> None:
    x, y = data()
    W = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(3, 2, bias=False).double()
    nn.init.zeros_(layer.weight)
    rules = {"preconditioner": "none"}  # a metric draws another sample of another model
    one, other = HessianFree([W], **rules), HessianFree(layer.parameters(), **rules)
    loss = one.acc_step(lambda x: x @ W, cross_entropy, [(x, y)])
    assert loss == pytest.approx(other.acc_step(layer, cross_entropy, [(x, y)]), rel=1e-12)
    one.test_reduction(lambda x: x @ W, cross_entropy, [(x[:6], y[:6]), (x[6:], y[6:])], "mean")


@pytest.mark.parametrize(
    "groups",
    [
        lambda a, b: [{"params": a, "lr": 0.5}, {"params": b}],
        lambda a, b: [{"params": a}, {"params": b, "lr": 0.5}],
        lambda a, b: [{"params": a, "damping": 2.0}, {"params": b, "damping": 3.0}],
    ],
)
def test_what_is_one_for_all_groups_is_never_ignored(groups: Any) -> None:
    model: Any = net()
    with pytest.raises(ValueError, match="in one parameter group and"):
        HessianFree(groups(list(model[0].parameters()), list(model[2].parameters())))


def test_a_group_changed_later_is_told() -> None:
    model: Any = net()
    optimizer = HessianFree([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    optimizer.step(closure(model))
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr is 1\.0 in one parameter group and 0\.5 in another"):
        optimizer.step(closure(model))


def test_the_same_setting_in_every_group_is_used() -> None:
    model: Any = net()
    optimizer = HessianFree(
        [{"params": m.parameters(), "lr": 0.5} for m in (model[0], model[2])], use_linesearch=False
    )
    optimizer.step(closure(model))
    assert optimizer.report.alpha == 0.5


def test_torchs_own_kind_of_closure_takes_the_same_step() -> None:
    finals = []
    for is_torchs in (False, True):
        model = net()
        optimizer = HessianFree(model.parameters())

        def forward(model: Any = model, optimizer: Any = optimizer, own: bool = is_torchs) -> Any:
            loss, outputs = closure(model)()
            if not own:
                return loss, outputs
            optimizer.zero_grad()
            loss.backward()
            return loss

        finals.append([optimizer.step(forward) for _ in range(2)])
        assert all(p.grad is None for p in model.parameters())
    assert finals[1] == pytest.approx(finals[0], rel=1e-6)
