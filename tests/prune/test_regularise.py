from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.errors import ConfigError
from tersor.graph import couple
from tersor.prune import structured
from tersor.prune.gradual import Training
from tersor.prune.regularise import Penalty, penalty, sparse_learning, squared_norms
from tersor.train import Schedule

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).eval()


def task_loss(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return functional.cross_entropy(batch.call(module), batch.labels)


def training(epochs: int = 8) -> Training:
    return Training(Split("train", (X, Y)), task_loss, Schedule(epochs=epochs, lr=0.05, batch_size=32))


def test_norms_are_over_all_that_a_unit_owns() -> None:
    model = net()
    family = couple(model, X[:2]).families[0]
    found = squared_norms(dict(model.named_parameters()), family)
    expected = model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("method", "expected"), [("growing", 0.05), ("lasso", 0.1)])
def test_the_penalty_is_its_formula_and_leaves_other_units_alone(method: str, expected: float) -> None:
    model = net()
    families = couple(model, X[:2]).families
    parameters = dict(model.named_parameters())
    chosen = {families[0].name: torch.tensor([1, 3])}
    value = penalty(parameters, families, chosen, Penalty(method=method, strength=0.1))  # type: ignore[arg-type]
    squares = squared_norms(parameters, families[0])[[1, 3]]
    direct = squares.sum() if method == "growing" else (6 + 1 + 2) ** 0.5 * squares.sqrt().sum()
    torch.testing.assert_close(value, expected * direct)
    value.backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert bool((gradient[[1, 3]] * model[0].weight[[1, 3]] > 0).all())  # towards zero
    assert int(gradient.abs().sum(1).count_nonzero()) == 2


def test_growing_grows_to_its_ceiling() -> None:
    settings = Penalty(strength=0.1, every=2, ceiling=0.25)
    assert [settings.at(step) for step in range(6)] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.25, 0.25])


def test_units_that_will_go_shrink_and_cost_less() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    coupling = couple(model, X[:2])
    family = coupling.families[0]
    chosen = {family.name: squared_norms(dict(model.named_parameters()), family).argsort()[:8]}
    learned = sparse_learning(model, coupling, training(), Penalty(strength=0.05, every=1), chosen=chosen)
    gone = torch.zeros(16, dtype=torch.bool)
    gone[chosen[family.name]] = True
    after = learned.after[family.name]
    assert float(after[gone].max()) < 0.05 * float(after[~gone].min())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    smaller = structured(learned.model, X[:2], amount=0.5).model
    torch.testing.assert_close(smaller(X), learned.model(X), rtol=0, atol=0.05)


def test_lasso_needs_no_choice_and_growing_does() -> None:
    model = net()
    coupling = couple(model, X[:2])
    learned = sparse_learning(model, coupling, training(2), Penalty(method="lasso", strength=0.02))
    assert float(learned.after["0.weight[0]"].sum()) < float(learned.before["0.weight[0]"].sum())
    with pytest.raises(ConfigError, match="chosen"):
        sparse_learning(model, coupling, training(1), Penalty())
    with pytest.raises(ConfigError, match="no families"):
        sparse_learning(model, coupling, training(1), Penalty(), chosen={"other": torch.tensor([0])})
