"""`prune.experts`: which experts go, that the rest answers as it should, and what it says where it cannot."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import normal
from specimens.mixtures import EXPERTS, TAKEN, TOKENS, Listed, Net, Router, Stacked, barred, built
from tersor.core.surgery import Surgery
from tersor.errors import ConfigError, CoverageError, ModelError, NonFiniteError, SurgeryError
from tersor.prune import experts
from zoo import integers, state_hash

LABELS = integers(4, len(TOKENS))


def cross_entropy(outputs: Any, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return functional.cross_entropy(outputs, labels)


def shares(net: Net) -> Tensor:
    """Of each expert of the first mixture the mean probability with which tokens are sent to it, by hand."""
    tokens = net.first(TOKENS)
    probabilities = net.mixtures[0].router.linear(tokens).softmax(-1)
    values, numbers = probabilities.topk(TAKEN)
    return torch.zeros_like(probabilities).scatter(1, numbers, values).mean(0)


def test_the_least_used_experts_go() -> None:
    net = built(Listed)
    before = state_hash(net)
    report = experts(net, TOKENS, amount=0.34)
    assert state_hash(net) == before
    expected = shares(net)
    torch.testing.assert_close(torch.tensor(report.scores["mixtures.0"]), expected)
    gone = sorted(expected.argsort()[:2].tolist())
    assert report.removed == {"mixtures.0": tuple(gone)}
    assert report.kept == {"mixtures.0": tuple(sorted(set(range(EXPERTS)) - set(gone)))}
    torch.testing.assert_close(report.model(TOKENS), barred(net, gone))
    expert = sum(parameter.numel() for parameter in net.mixtures[0].experts[0].parameters())
    assert report.params_before - report.params_after == 2 * (expert + net.mixtures[0].router.linear.in_features)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert f"experts removed: 2 of 6 in 1 mixtures\n  mixtures.0: {gone[0]}, {gone[1]}\n" in str(report)
    assert len(report.parts["mixtures.0"]) == 1 + 4 * EXPERTS


def test_usage_is_measured_on_data() -> None:
    net = built(partial(Stacked, "late"))
    with torch.no_grad():
        favourite = net.mixtures[0].router.linear(net.first(TOKENS[:1])).argmax().item()
    one = experts(net, TOKENS, amount=0.5, data=[TOKENS[:1]])
    assert favourite not in one.removed["mixtures.0"]
    assert sum(score > 0 for score in one.scores["mixtures.0"]) == TAKEN
    assert one.removed != experts(net, TOKENS, amount=0.5, data=[TOKENS[5:6]]).removed


def test_the_loss_takes_the_expert_that_helps_least() -> None:
    net = built(Listed)
    losses = [float(cross_entropy(barred(net, [number]), LABELS)) for number in range(EXPERTS)]
    whole = float(cross_entropy(barred(net, []), LABELS))
    report = experts(net, TOKENS, amount=0.2, criterion="loss", data=[(TOKENS, LABELS)], loss=cross_entropy)
    assert report.scores["mixtures.0"] == pytest.approx([loss - whole for loss in losses], abs=1e-5)
    assert report.removed == {"mixtures.0": (losses.index(min(losses)),)}


def test_named_experts_go() -> None:
    net = built(Listed, partial(Stacked, "sigmoid"))
    report = experts(net, TOKENS, experts={"mixtures.0": [5, 1, 5]})
    assert report.removed == {"mixtures.0": (1, 5)}
    assert report.scores == {}
    torch.testing.assert_close(report.model(TOKENS), barred(net, [1, 5]))
    with pytest.raises(SurgeryError, match=r"no mixtures \['x'\] that can shrink; it has \['mixtures.0'"):
        experts(net, TOKENS, experts={"x": [1]})
    with pytest.raises(SurgeryError, match=r"experts 0 to 5, got \[6\]"):
        experts(net, TOKENS, experts={"mixtures.0": [6]})
    with pytest.raises(SurgeryError, match="5 are too many to remove"):
        experts(net, TOKENS, experts={"mixtures.0": [0, 1, 2, 3, 4]})


def test_patterns_exclude_mixtures() -> None:
    net = built(Listed, Stacked, Stacked)
    report = experts(net, TOKENS, amount=0.5, exclude=["mixtures.[12]"])
    assert list(report.removed) == list(report.kept) == ["mixtures.0"]
    assert [item.reason for item in report.frozen] == ["excluded", "excluded"]
    with pytest.raises(CoverageError, match=r"Net has no mixture of experts that can shrink; mixtures\.0: excluded"):
        experts(net, TOKENS, exclude=["*"])


@pytest.mark.parametrize(
    "wrong",
    [{"amount": 1.0}, {"amount": -0.1}, {"criterion": "x"}, {"experts": {}}, {"experts": {"mixtures.0": [-1]}},
     {"experts": {"mixtures.0": []}}, {"amount": 0.5, "experts": {"mixtures.0": [1]}}, {"criterion": "loss"}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        experts(built(Listed), TOKENS, **wrong)


def test_chance_is_seeded() -> None:
    net = built(Listed)
    first, again, other = (experts(net, TOKENS, amount=0.5, criterion="random", seed=seed) for seed in (3, 3, 4))
    assert first.removed == again.removed != other.removed


def test_damaged_routers_are_named() -> None:
    net = built(Listed)
    with torch.no_grad():
        net.mixtures[0].router.linear.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"experts of \['mixtures.0'\] are NaN or Inf"):
        experts(net, TOKENS)


def test_rounds_end_with_a_note() -> None:
    model: nn.Module = built(Listed, partial(Stacked, "first"))
    sizes = []
    for _ in range(6):
        report = experts(model, TOKENS, amount=0.4)
        model = report.model
        sizes.append(tuple(len(kept) for kept in report.kept.values()))
    assert sizes[:3] == [(4, 4), (2, 2), (2, 1)]
    assert sizes[-1] == (2,)  # of one expert nothing is chosen
    assert report.notes == [
        "mixtures.0: 1 of 2 experts were asked for, only 0 can go: its router needs 2 to choose from"
    ]
    assert report.surgery == Surgery()
    few = experts(built(Listed), TOKENS, amount=0.01)
    assert few.notes == ["mixtures.0: an amount of 0.01 is less than one of 6 experts: none was removed"]
    most = experts(built(Listed), TOKENS, amount=0.9)
    assert most.notes == ["mixtures.0: 5 of 6 experts were asked for, only 4 can go: its router needs 2 to choose from"]
    assert len(most.removed["mixtures.0"]) == 4


def test_the_least_used_of_every_group_go() -> None:
    report = experts(built(partial(Stacked, groups=2)), TOKENS, amount=0.4)
    scores = report.scores["mixtures.0"]
    assert report.removed["mixtures.0"] == (scores.index(min(scores[:3])), 3 + scores[3:].index(min(scores[3:])))
    with pytest.raises(CoverageError, match="no mixture"):
        experts(nn.Linear(4, 3), normal(2, 4))


def test_groups_that_cannot_lose_one_each_say_so() -> None:
    report = experts(built(partial(Stacked, groups=3)), TOKENS, amount=0.5)
    assert report.removed == {}
    assert "its router needs 6 to choose from" in report.notes[0]


class Fixed(Stacked):
    """Insists on what it was built with."""

    def forward(self, tokens: Tensor) -> Tensor:
        if len(self.up) != EXPERTS:
            raise ValueError("expected 6 experts")
        return super().forward(tokens)


def test_what_fails_is_frozen_and_the_rest_goes() -> None:
    net = built(Listed, Fixed)
    report = experts(net, TOKENS, amount=0.34)
    assert list(report.removed) == list(report.kept) == ["mixtures.0"]
    assert [(item.name, item.reason) for item in report.frozen] == [
        ("mixtures.1", "verification: the model without them fails: ValueError: expected 6 experts")
    ]
    with pytest.raises(CoverageError, match=r"no expert can be removed; mixtures\.0: verification: .*expected 6"):
        experts(built(Fixed), TOKENS)
    with pytest.raises(SurgeryError, match=r"these experts cannot be removed; mixtures\.0: verification"):
        experts(built(Fixed), TOKENS, experts={"mixtures.0": [1]})


class Table(Stacked):
    """A table of positions with as many rows as there are experts, of which few are read."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(EXPERTS, 10))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.positions[torch.arange(2)].mean(0)


def test_a_table_of_as_many_rows_is_not_taken_for_experts_unnoticed() -> None:
    with pytest.raises(CoverageError, match="verification: outputs differ"):
        experts(built(Table), TOKENS, experts=None, criterion="random", amount=0.17, seed=7)
    for gone in ([5], [4, 5], [0]):
        with pytest.raises(SurgeryError, match="verification: "):
            experts(built(Table), TOKENS, experts={"mixtures.0": gone})


class Numbered(Listed):
    """Attributes whose value happens to be the number of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx, self.expert_capacity, self.num_shared_experts, self.num_experts = (EXPERTS,) * 4

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * (torch.arange(len(tokens)) <= 10 * self.expert_capacity)[:, None]


def test_only_what_counts_experts_follows() -> None:
    net = built(Numbered)
    net.n_experts = EXPERTS  # around them
    model = experts(net, TOKENS, amount=0.34).model
    mixture = model.mixtures[0]
    assert (mixture.layer_idx, mixture.expert_capacity, mixture.num_shared_experts) == (6, 6, 6)
    assert mixture.num_experts == mixture.router.num_experts == model.n_experts == 4
    one = experts(built(Listed, Listed), TOKENS, experts={"mixtures.0": [2]}).model
    assert [mixture.router.num_experts for mixture in one.mixtures] == [5, 6]
    apart = built(Listed, Listed)
    apart.n_experts = EXPERTS
    assert experts(apart, TOKENS, experts={"mixtures.0": [2]}).model.n_experts == 6
    assert experts(apart, TOKENS, experts={"mixtures.0": [2], "mixtures.1": [0]}).model.n_experts == 5


class Noisy(Stacked):
    """Has a second router that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.zeros(10, EXPERTS))


def test_what_no_example_reads_is_told() -> None:
    assert experts(built(Noisy), TOKENS).notes == [
        "mixtures.0: the examples never read mixtures.0.noise; they keep 6 entries"
    ]


class Coarse(Stacked):
    """What float32 rounds away here depends on the number of experts."""

    def forward(self, tokens: Tensor) -> Tensor:
        offset = 1e5 * len(self.up)
        return (super().forward(tokens) + offset) - offset


def test_rounding_is_no_error() -> None:
    report = experts(built(Coarse), TOKENS, amount=0.34)
    assert report.max_error is not None
    assert report.max_error < 1e-6


def test_modes_come_back_and_inplace_is_the_same() -> None:
    net = built(Listed).train()
    net.mixtures[0].eval()
    modes = [module.training for module in net.modules()]
    report = experts(net, TOKENS, amount=0.34)
    assert [module.training for module in net.modules()] == modes
    assert report.model.training
    assert not report.model.mixtures[0].training
    assert experts(net, TOKENS, amount=0.34, inplace=True).model is net
    assert state_hash(net) == state_hash(report.model)


def test_a_model_that_does_not_run_is_told() -> None:
    with pytest.raises(ModelError, match="does not run"):
        experts(built(Listed), normal(3, 4))


def test_unverified_is_told() -> None:
    report = experts(built(Listed), TOKENS, verify=False)
    assert report.max_error is None
    assert "not verified" in str(report)


@pytest.mark.parametrize("form", [Listed, partial(Listed, keyed=True), Stacked])
def test_the_result_trains(form: Callable[[], nn.Module]) -> None:
    model = experts(built(form), TOKENS, amount=0.34).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = cross_entropy(model(TOKENS), LABELS)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "router" in name)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_experts_tied_to_something_else_stay_tied() -> None:
    net = built(Stacked, Listed)
    net.copy_of_up = net.mixtures[0].up
    net.mixtures[1].experts[3].up.weight = net.mixtures[1].experts[0].up.weight
    report = experts(net, TOKENS, experts={"mixtures.0": [1], "mixtures.1": [1]})
    assert report.model.copy_of_up is report.model.mixtures[0].up
    members = report.model.mixtures[1].experts
    assert members[2].up.weight is members[0].up.weight


REPLAY = """
import sys, torch
from functools import partial
from pathlib import Path
from safetensors.torch import load_file
from specimens.mixtures import TOKENS, Listed, Stacked, built
from tersor.core.surgery import Surgery
from tersor.graph import apply_surgery
folder = Path(sys.argv[1])
model = built(partial(Listed, keyed=True), Listed, partial(Stacked, "sigmoid"), seed=9)
model = apply_surgery(model, Surgery.from_json((folder / "surgery.json").read_text()))
model.load_state_dict(load_file(folder / "weights.safetensors"))
assert torch.equal(model(TOKENS), load_file(folder / "outputs.safetensors")["outputs"])
"""


def test_it_replays_in_a_fresh_process(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    report = experts(built(partial(Listed, keyed=True), Listed, partial(Stacked, "sigmoid")), TOKENS, amount=0.34)
    (tmp_path / "surgery.json").write_text(report.surgery.to_json())
    save_file(report.model.state_dict(), tmp_path / "weights.safetensors")
    save_file({"outputs": report.model(TOKENS).detach()}, tmp_path / "outputs.safetensors")
    tests = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", REPLAY, str(tmp_path)], check=True, cwd=tests)  # noqa: S603


def test_a_router_alone_is_no_mixture() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router("softmax", 7)

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens * self.router(tokens)[0].sum(-1, keepdim=True)

    with pytest.raises(CoverageError, match="nothing near it has as many members"):
        experts(copy.deepcopy(Bare()), TOKENS)
