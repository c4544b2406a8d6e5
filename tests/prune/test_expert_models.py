"""`prune.experts` on the mixtures of `transformers`: pruned and right, or left whole with the reason."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.surgery import Surgery
from tersor.errors import CoverageError
from tersor.graph import apply_surgery
from tersor.prune import ExpertReport, experts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

PRUNED = (
    "mixtral_eager", "mixtral_batched", "mixtral_grouped", "qwen2", "qwen3", "olmoe", "gpt_oss", "granite", "phimoe",
    "ernie", "deepseek_3", "deepseek_3_groups", "deepseek_2", "deepseek_2_groups", "switch", "jetmoe", "jamba", "dbrx",
    "llama4",
)  # fmt: skip
FAST = {"mixtral_eager", "deepseek_3_groups", "switch"}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PRUNED]


def specimen(name: str, seed: int = 0) -> nn.Module:
    from specimens.transformers_mixtures import built

    return built(name, seed)


def inputs(name: str, variant: int = 0) -> dict[str, Any]:
    from specimens.transformers_mixtures import MIXTURES

    return MIXTURES[name][1](variant)


def penalised(model: nn.Module, report: ExpertReport, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The original whose routers' scores of removed experts are so low that they are never chosen."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    penalties: dict[int, Tensor] = {}
    for name, gone in report.removed.items():
        size = len(gone) + len(report.kept[name])
        penalty = torch.zeros(size).index_fill_(0, torch.tensor(gone), -1e9)
        for part in report.parts[name]:
            if part.endswith("weight") and parameters[part].shape[0] == size and parameters[part].ndim == 2:
                penalties[id(parameters[part])] = penalty
        for path, buffer in model.named_buffers():
            if path.startswith(f"{name}.") and path.endswith("correction_bias"):
                buffer += penalty.clamp(min=-9)  # a sigmoid of -1e9 is zero, and zero plus a bias may still be chosen
    assert len(penalties) == len(report.removed)
    linear = nn.functional.linear

    def barred(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = linear(values, weight, bias)
        return scores + penalties[id(weight)] if id(weight) in penalties else scores

    monkeypatch.setattr(nn.functional, "linear", barred)
    return model


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PRUNED]
)
def test_the_rest_answers_as_if_they_were_never_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = specimen(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = experts(model, inputs(name), amount=0.34)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(report.removed) >= 2
    assert not report.frozen
    assert report.max_error is not None
    assert report.max_error < 1e-5
    with torch.no_grad():
        answers = [report.model(**inputs(name, variant)).logits for variant in (0, 1)]
        whole = model(**inputs(name, 1)).logits
        replayed = apply_surgery(specimen(name, seed=1), Surgery.from_json(report.surgery.to_json()))
        replayed.load_state_dict(report.model.state_dict())
        assert torch.equal(replayed(**inputs(name, 1)).logits, answers[1])
        reference = penalised(model, report, monkeypatch)
        expected = [reference(**inputs(name, variant)).logits for variant in (0, 1)]
    assert not torch.allclose(expected[1], whole, atol=1e-2)
    torch.testing.assert_close(answers, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_capacity_and_identities_that_do_not_fit_are_frozen() -> None:
    reasons = {
        "nllb": "it chooses from 6 entries, and nothing near it has as many members",  # the dictionary holds a dropout
        "longcat": "verification: ",  # of the six that it chooses from, two have no weights
    }
    for name, reason in reasons.items():
        with pytest.raises(CoverageError) as failure:
            experts(specimen(name), inputs(name), amount=0.34)
        assert reason in str(failure.value)


@pytest.mark.slow
def test_the_loss_that_balances_experts_still_runs() -> None:
    model = specimen("mixtral_eager")
    given = inputs("mixtral_eager")
    with pytest.raises(CoverageError, match="its router's scores are an output of the model"):
        experts(model, given | {"output_router_logits": True})
    smaller = experts(model, given, amount=0.34).model.train()
    assert smaller.num_experts == 4
    outputs = smaller(**given, labels=given["input_ids"], output_router_logits=True)
    assert outputs.aux_loss > 0
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


@pytest.mark.slow
def test_another_way_to_multiply_still_runs() -> None:
    smaller = experts(specimen("mixtral_eager"), inputs("mixtral_eager"), amount=0.34).model
    with torch.no_grad():
        eager = smaller(**inputs("mixtral_eager", 1)).logits
        for way in ("batched_mm", "grouped_mm"):
            smaller.config._experts_implementation = way
            torch.testing.assert_close(smaller(**inputs("mixtral_eager", 1)).logits, eager, atol=1e-4, rtol=1e-4)
