"""Which experts belong to which router, and what a surgery without some of them must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specimens.mixtures import CHANNELS, EXPERTS, TAKEN, TOKENS, Expert, Listed, Router, Stacked, barred, built
from tersor.core.surgery import Change, Surgery
from tersor.errors import SurgeryError
from tersor.graph.expert_surgery import Verifier, compare_experts, outputs_without, plan_experts
from tersor.graph.experts import Mixture, Mixtures, find_mixtures
from tersor.graph.surgery import apply_surgery

RUNS: list[Any] = [((TOKENS,), {})]
KINDS = ("softmax", "all", "late", "first", "sigmoid")
GONE = {"mixtures.0": [1, 4]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [Listed, partial(Listed, keyed=True), Stacked], ids=["list", "dict", "stacked"])
def test_without_some_experts_it_chooses_among_the_others(kind: str, form: Callable[..., nn.Module]) -> None:
    net = built(partial(form, kind))
    mixtures = find_mixtures(net, RUNS)
    assert [mixture.name for mixture in mixtures.found] == ["mixtures.0"]
    mixture = mixtures["mixtures.0"]
    assert (mixture.size, mixture.least, mixture.groups) == (EXPERTS, 1 if kind == "first" else TAKEN, ())
    assert [str(item) for item in mixture.attributes] == ["mixtures.0.router.num_experts"]
    smaller = apply_surgery(copy.deepcopy(net), plan_experts(net, mixtures, GONE))
    assert smaller.mixtures[0].router.num_experts == smaller.mixtures[0].router.linear.out_features == EXPERTS - 2
    expected = barred(net, [1, 4])
    assert not torch.allclose(expected, net(TOKENS), atol=1e-3)
    torch.testing.assert_close(smaller(TOKENS), expected)
    torch.testing.assert_close(outputs_without(net, mixtures, GONE, RUNS)[0], expected)
    assert Verifier(net, mixtures, RUNS).check_alone(GONE).ok


def test_shares_of_all_scores_are_shares_of_those_that_stay() -> None:
    net = built(partial(Stacked, "shares"))
    net.mixtures[0].router.correction = 0.1 * torch.randn(EXPERTS)
    mixtures = find_mixtures(net, RUNS)
    smaller = apply_surgery(copy.deepcopy(net), plan_experts(net, mixtures, GONE))
    torch.testing.assert_close(smaller(TOKENS), barred(net, [1, 4]))
    assert Verifier(net, mixtures, RUNS).check_alone(GONE).ok


def places(mixture: Mixture) -> set[str]:
    return {str(place) for place in mixture.members}


def test_a_mixture_is_its_router_and_what_has_as_many_members() -> None:
    net = built(partial(Listed, "sigmoid"), partial(Stacked, "late"))
    first, second = find_mixtures(net, RUNS).found
    assert first.lists == ("mixtures.0.experts",)
    assert places(first) == {f"mixtures.0.router.{name}[0]" for name in ("linear.weight", "linear.bias", "correction")}
    assert second.lists == ()
    assert places(second) == {
        f"mixtures.1.{name}[0]" for name in ("router.linear.weight", "router.linear.bias", "up", "up_bias", "down")
    }


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_stay_of_equal_size(groups: int) -> None:
    net = built(partial(Stacked, groups=groups))
    mixtures = find_mixtures(net, RUNS)
    mixture = mixtures.found[0]
    assert (len(mixture.groups), mixture.least) == (groups, TAKEN * groups)
    assert [str(item) for item in mixture.attributes] == ["mixtures.0.router.each"]
    if groups == 3:
        with pytest.raises(SurgeryError, match="6 must stay for its router to choose from"):
            plan_experts(net, mixtures, {mixture.name: [0, 2, 4]})
        return
    with pytest.raises(SurgeryError, match="2 groups, which must stay of equal size"):
        plan_experts(net, mixtures, {mixture.name: [1, 2]})
    gone = {mixture.name: [1, 3]}
    assert plan_experts(net, mixtures, gone).changes == (
        Change(owner="mixtures.0.router", name="each", before=3, after=2),
    )
    verdict = Verifier(net, mixtures, RUNS).check_alone(gone)
    assert verdict.ok
    assert verdict.effect > 0.01


def test_a_wrong_surgery_is_caught() -> None:
    for build in (partial(Stacked, "softmax"), partial(Listed, "first")):
        net = built(build)
        mixtures = find_mixtures(net, RUNS)
        right = plan_experts(net, mixtures, GONE)
        verifier = Verifier(net, mixtures, RUNS)
        assert compare_experts(verifier.random, mixtures, GONE, RUNS, right).ok
        wrong = []
        for parts in ("cuts", "shrunk"):
            for number, part in enumerate(getattr(right, parts)):
                other = part.model_copy(update={"kept": (0, 2, 4, 5)})
                listed = list(getattr(right, parts))
                listed[number] = other
                wrong.append(right.model_copy(update={parts: tuple(listed)}))
        assert len(wrong) >= 2
        for surgery in wrong:
            verdict = compare_experts(verifier.random, mixtures, GONE, RUNS, surgery)
            assert "differ from those of the model in which they are never chosen" in verdict.reason
            assert not compare_experts(net, mixtures, GONE, RUNS, surgery).ok


def test_too_few_and_unknown_experts_are_refused() -> None:
    net = built(Listed)
    mixtures = find_mixtures(net, RUNS)
    with pytest.raises(SurgeryError, match="2 must stay for its router to choose from; 5 are too many"):
        plan_experts(net, mixtures, {"mixtures.0": [0, 1, 2, 3, 4]})
    with pytest.raises(SurgeryError, match=r"experts 0 to 5, got \[6\]"):
        plan_experts(net, mixtures, {"mixtures.0": [6]})
    assert plan_experts(net, mixtures, {}) == Surgery()


class Config:
    """As libraries have it: one for all layers."""

    def __init__(self) -> None:
        self.count = EXPERTS


class Counting(Stacked):
    """Reads the number of experts from a shared configuration while it runs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, tokens: Tensor) -> Tensor:
        _, numbers = self.router(tokens)
        hits = nn.functional.one_hot(numbers, self.config.count).sum((0, 1))
        assert len(hits) == len(self.up)
        return super().forward(tokens)


def test_a_number_that_several_layers_read_changes_for_all_or_none() -> None:
    config = Config()
    net = built(lambda: Counting(config), lambda: Counting(config))
    mixtures = find_mixtures(net, RUNS)
    assert all("mixtures.0.config.count" in map(str, mixture.attributes) for mixture in mixtures.found)
    with pytest.raises(
        SurgeryError, match=r"mixtures\.0\.config\.count counts the experts of mixtures\.0, mixtures\.1"
    ):
        plan_experts(net, mixtures, {"mixtures.0": [1]})
    gone = {"mixtures.0": [1], "mixtures.1": [5]}
    assert Verifier(net, mixtures, RUNS).check_alone(gone).ok
    assert apply_surgery(copy.deepcopy(net), plan_experts(net, mixtures, gone)).mixtures[0].config.count == 5


class Shown(nn.Module):
    """Returns the router's scores as well."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Listed()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.mixture(tokens), self.mixture.router.linear(tokens)


class Several(Listed):
    """Two routers choose from the same experts."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Router("softmax")

    def forward(self, tokens: Tensor) -> Tensor:
        result = super().forward(tokens)
        self.router, self.other = self.other, self.router
        return result + super().forward(tokens)


class Bare(nn.Module):
    """A router without experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router("softmax", 7)

    def forward(self, tokens: Tensor) -> Tensor:
        weights, _ = self.router(tokens)
        return tokens * weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Shown, "its router's scores are an output of the model"),
        (lambda: built(Several), "another router chooses from its experts"),
        (lambda: built(Bare), "chooses from 7 entries, and nothing near it has as many members"),
        (lambda: TopTokens(), "chooses from 24 entries that no parameter gives"),
    ],
)
def test_what_does_not_fit_says_why(build: Callable[[], nn.Module], reason: str) -> None:
    mixtures = find_mixtures(build().eval(), RUNS)
    assert not mixtures.found
    assert reason in " ".join(item.reason for item in mixtures.frozen)


class TopTokens(nn.Module):
    """Chooses tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(CHANNELS, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[self.score(tokens).squeeze(-1).topk(3).indices]


class Fixed(Stacked):
    """Makes sure of a number that it got elsewhere."""

    def forward(self, tokens: Tensor) -> Tensor:
        if len(self.up) != 6:
            raise ValueError("expected 6 experts")
        return super().forward(tokens)


def test_a_model_that_insists_on_its_experts_fails_verification() -> None:
    net = built(Fixed)
    mixtures: Mixtures = find_mixtures(net, RUNS)
    verdict = Verifier(net, mixtures, RUNS).check_alone(GONE)
    assert verdict.reason == "the model without them fails: ValueError: expected 6 experts"


class Never(Stacked):
    """Whatever the router chooses goes to the first two."""

    def forward(self, tokens: Tensor) -> Tensor:
        weights, numbers = self.router(tokens)
        hidden = torch.einsum("tkhc,tc->tkh", self.up[numbers * 0], tokens)
        return torch.einsum("tkh,tk->th", hidden, weights / weights.detach())[:, :1].expand_as(tokens)


def test_what_shows_nothing_is_not_proven() -> None:
    net = built(Never)
    mixtures = find_mixtures(net, RUNS)
    assert "no example is sent to them" in Verifier(net, mixtures, RUNS).check_alone({"mixtures.0": [4]}).reason


def test_nothing_of_the_model_changes() -> None:
    net = built(partial(Stacked, "sigmoid"), Expert, Listed)
    before, holders = copy.deepcopy(net.state_dict()), [dict(vars(module)) for module in net.modules()]
    mixtures = find_mixtures(net, RUNS)
    Verifier(net, mixtures, RUNS).check_alone({"mixtures.0": [1], "mixtures.2": [0, 3]})
    outputs_without(net, mixtures, GONE, RUNS)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [dict(vars(module)) for module in net.modules()] == holders
