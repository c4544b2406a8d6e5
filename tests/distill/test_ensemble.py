from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.distill.ensemble import Ensemble
from tersor.errors import ConfigError, OutputError
from zoo import Mlp, normal, seeded

X = normal(6, 12)
TEACHERS = [seeded(Mlp, seed) for seed in range(3)]


class Fixed(nn.Module):
    """Answers with its logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, _: Tensor) -> Tensor:
        return self.logits


class Several(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: Tensor) -> dict[str, Tensor]:
        return {"hidden": torch.zeros(1), "logits": self.logits}


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)


@given(WEIGHTS)
def test_probabilities_are_the_weighted_mean(weights: list[float]) -> None:
    shares = torch.tensor(weights) / sum(weights)
    wanted = sum(share * teacher(X).softmax(-1) for share, teacher in zip(shares, TEACHERS, strict=True))
    torch.testing.assert_close(Ensemble(TEACHERS, weights)(X).softmax(-1), wanted)


@given(WEIGHTS)
def test_logits_are_the_weighted_mean(weights: list[float]) -> None:
    shares = torch.tensor(weights) / sum(weights)
    wanted = sum(share * teacher(X) for share, teacher in zip(shares, TEACHERS, strict=True))
    torch.testing.assert_close(Ensemble(TEACHERS, weights, how="logits")(X), wanted)


def test_the_means_differ_and_one_teacher_stays_itself() -> None:
    arithmetic, geometric = (Ensemble(TEACHERS, how=how)(X).softmax(-1) for how in ("probabilities", "logits"))
    assert bool((arithmetic - geometric).abs().max() > 1e-3)
    torch.testing.assert_close(Ensemble(TEACHERS[:1])(X).softmax(-1), TEACHERS[0](X).softmax(-1))


def test_sure_teachers_that_disagree_give_finite_logs_and_gradients() -> None:
    sure = [Fixed(torch.tensor([[300.0, -300.0]])), Fixed(torch.tensor([[-300.0, 300.0]]))]
    ensemble = Ensemble(sure)
    answer = ensemble(X)
    torch.testing.assert_close(answer.softmax(-1), torch.full((1, 2), 0.5))
    answer[0, 0].backward()
    assert all(bool(torch.isfinite(teacher.logits.grad).all()) for teacher in sure)


def test_half_precision_answers_in_float32() -> None:
    assert Ensemble([Fixed(normal(2, 4).bfloat16())])(X).dtype == torch.float32


def test_the_declared_output_counts() -> None:
    several = Several(normal(2, 4))
    torch.testing.assert_close(Ensemble([several], how="logits", output="logits")(X), several.logits)
    with pytest.raises(OutputError, match="declare one"):
        Ensemble([several])(X)


def test_different_outputs_are_refused() -> None:
    with pytest.raises(OutputError, match=r"one shape, got \[\(2, 4\), \(2, 5\)\]"):
        Ensemble([Fixed(normal(2, 4)), Fixed(normal(2, 5))])(X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teachers": []}, "teachers: expected at least one"),
        ({"teachers": ["a"]}, "teachers: expected at least one nn.Module"),
        ({"weights": [1.0]}, "weights: expected 3 positive numbers"),
        ({"weights": [1.0, 0.0, 1.0]}, "weights: expected 3 positive numbers"),
        ({"weights": [1.0, float("nan"), 1.0]}, "weights: expected 3 positive numbers"),
        ({"how": "votes"}, "how: expected one of"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ensemble(**{"teachers": TEACHERS} | arguments)  # type: ignore[arg-type]
