"""`prune.structured` in a recipe: any order, masks that shrink along, notes and data for the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.task import Task
from tersor.distill import Recover
from tersor.errors import ConfigError, CoverageError, DataError
from tersor.graph import apply_surgery
from tersor.prune import Structured, Unstructured
from tersor.prune.masks import check
from tersor.quantize import Static
from tersor.train import Schedule
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TWO_DATA,
    Cnn,
    Mlp,
    Transformer,
    TwoInputs,
    context_for,
    integers,
    normal,
    quantized,
    seeded,
    state_hash,
)

LABELLED = (MLP_DATA, integers(4, 48))


def rebuilt(module: nn.Module, candidate: Candidate) -> nn.Module:
    """The original replayed: its surgeries, then the candidate's weights."""
    fresh = frozen_copy(module)
    for surgery in candidate.surgeries:
        fresh = apply_surgery(fresh, surgery)
    fresh.load_state_dict(candidate.module.state_dict())
    return fresh


def sizes(candidate: Candidate) -> list[tuple[int, int]]:
    record = candidate.history[-1].pruning
    assert record is not None
    return [(family.units, family.kept) for family in record.families]


def test_it_removes_channels_and_tells_what_it_did() -> None:
    module = seeded(Mlp)
    before = state_hash(module)
    candidate = Candidate(frozen_copy(module))
    done = Structured(amount=0.25, verify="full").apply(candidate, context_for(module, MLP_DATA))
    assert state_hash(candidate.module) == state_hash(module) == before
    assert candidate.history == ()
    assert len(done.surgeries) == 1
    assert done.module.get_parameter("second.weight").shape == (12, 12)
    record = done.history[0]
    assert (record.name, record.settings["amount"]) == ("prune.structured", 0.25)
    pruning = record.pruning
    assert pruning is not None
    assert pruning.parameters_before == 12 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4
    assert pruning.parameters_after == sum(parameter.numel() for parameter in done.module.parameters())
    assert (pruning.macs_before, pruning.macs_after) == (12 * 16 + 16 * 16 + 16 * 4, 12 * 12 + 12 * 12 + 12 * 4)
    assert pruning.amount == 0.25
    assert pruning.max_error is not None
    assert pruning.max_error < 1e-4
    assert [(f.name, f.kind, f.units, f.kept, f.layers) for f in pruning.families] == [
        ("first.weight[0]", "channel", 16, 12, ["first", "second"]),
        ("second.weight[0]", "channel", 16, 12, ["second", "last"]),
    ]
    assert pruning.layers == ["first", "second", "last"]
    assert pruning.coverage == pytest.approx(1 - 4 / pruning.parameters_before)  # all but the last bias
    assert {item.name for item in pruning.frozen} == {"first.weight[1]", "last.weight[0]"}
    notes = "\n".join(record.notes)
    assert "parameters 548 -> " in notes
    assert "2 parts frozen: " in notes
    assert "verified against the masked model" in notes


@pytest.mark.parametrize(("build", "data", "output"), [(TwoInputs, TWO_DATA, None), (Transformer, TEXT_DATA, "logits")])
def test_inputs_are_given_as_the_task_has_them(build: Any, data: Any, output: Any) -> None:
    module = seeded(build)
    context = context_for(module, data, output=output)
    done = Structured(amount=0.5).apply(Candidate(frozen_copy(module)), context)
    assert all(kept < units for units, kept in sizes(done))
    with torch.no_grad():
        answer = context.task.example(4).call(done.module)
    assert torch.isfinite(answer["logits"] if output else answer).all()


@pytest.mark.parametrize("settings", [{"criterion": "taylor"}, {"criterion": "fisher"}, {"compensate": True}])
def test_measured_settings_read_the_calibrate_split(settings: dict[str, Any]) -> None:
    module, step = seeded(Mlp), Structured(amount=0.5, **settings)
    assert step.needs == {"calibrate"}
    done = step.apply(Candidate(frozen_copy(module)), context_for(module, LABELLED))
    assert sizes(done) == [(16, 8), (16, 8)]
    with pytest.raises(DataError, match=r"prune\.structured needs a 'calibrate' split"):
        step.apply(Candidate(frozen_copy(module)), context_for(module, None, report=LABELLED))


def test_a_loss_without_labels_is_refused() -> None:
    module = seeded(Mlp)
    with pytest.raises(DataError, match=r"criterion 'taylor' needs labels in the 'calibrate' split"):
        Structured(criterion="taylor").apply(Candidate(frozen_copy(module)), context_for(module, MLP_DATA))


def test_without_data_to_measure_nothing_is_needed() -> None:
    assert Structured(amount=0.5).needs == frozenset()
    module = seeded(Cnn)
    done = Structured(amount=0.5).apply(Candidate(frozen_copy(module)), context_for(module, None, report=CNN_DATA))
    assert not any("BatchNorm" in note for note in done.history[0].notes)
    assert torch.equal(  # only cut, not estimated anew
        done.module.get_buffer("stem_norm.running_mean"),
        module.get_buffer("stem_norm.running_mean")[list(done.surgeries[0].kept()["stem_norm.running_mean", 0])],
    )


def test_batch_norm_is_estimated_on_the_calibrate_split() -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA[:33])  # a last batch of one example is left out
    done = Structured(amount=0.5).apply(Candidate(frozen_copy(module)), context)
    assert any("2 BatchNorm layers re-estimated" in note for note in done.history[0].notes)
    with torch.no_grad():
        mean = done.module.get_submodule("stem")(CNN_DATA[:32]).mean((0, 2, 3))
    assert torch.allclose(done.module.get_buffer("stem_norm.running_mean"), mean, atol=1e-5)


def test_an_absolute_number_of_macs_is_per_example() -> None:
    module = seeded(Mlp)
    done = Structured(target={"macs": 256}).apply(Candidate(frozen_copy(module)), context_for(module, MLP_DATA))
    assert done.history[0].pruning is not None
    assert 200 < done.history[0].pruning.macs_after <= 256


def test_a_target_out_of_reach_is_said() -> None:
    module = seeded(Mlp)
    step = Structured(target={"macs": 0.001}, floor=0.5)
    done = step.apply(Candidate(frozen_copy(module)), context_for(module, MLP_DATA))
    assert any(note.startswith("target not met") for note in done.history[0].notes)


def test_nothing_to_prune_is_an_error_with_reasons() -> None:
    module = seeded(Mlp)
    with pytest.raises(CoverageError, match=r"first\.weight\[0\]: excluded"):
        Structured(exclude=("*",)).apply(Candidate(frozen_copy(module)), context_for(module, MLP_DATA))


def test_masks_shrink_along_and_hold() -> None:
    module, context = seeded(Mlp), context_for(seeded(Mlp), MLP_DATA)
    sparse = Unstructured(sparsity=0.5).apply(Candidate(frozen_copy(module)), context)
    done = Structured(amount=0.5, compensate=True).apply(sparse, context)
    assert set(done.masks) == set(sparse.masks)
    check(done.module, done.masks)  # least squares did not bring masked weights back
    kept = done.surgeries[0].kept()
    rows, columns = list(kept["second.weight", 0]), list(kept["second.weight", 1])
    assert torch.equal(done.masks["second.weight"], sparse.masks["second.weight"][rows][:, columns])
    assert sparse.masks["second.weight"].shape == (16, 16)


def steps() -> dict[str, Any]:
    return {
        "cut": Structured(amount=0.25, round_to=2),
        "measured": Structured(amount=0.25, criterion="taylor", compensate=True),
        "zero": Unstructured(sparsity=0.4),
        "train": Recover(schedule=Schedule(epochs=1, lr=0.01, batch_size=16)),
        "int8": Static(samples=20),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("cut", "train", "int8"),
        ("zero", "cut", "train", "int8"),
        ("cut", "zero", "train", "int8"),
        ("cut", "measured"),
        ("cut", "train", "measured", "zero", "cut", "train"),
        ("int8", "cut", "train", "int8"),
        ("cut", "int8", "zero", "cut", "int8"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("build", [Mlp, Cnn])
def test_steps_follow_each_other_in_any_legal_order(names: tuple[str, ...], build: Any) -> None:
    module = seeded(build)
    data = LABELLED if build is Mlp else (CNN_DATA, integers(5, 48))
    context = context_for(module, None, train=data)
    candidate = Candidate(frozen_copy(module))
    for name in names:
        candidate = steps()[name].apply(candidate, context)
    assert len(candidate.surgeries) == sum(name in ("cut", "measured") for name in names)
    assert len(candidate.history) == len(names)
    check(candidate.module, candidate.masks)
    assert bool(candidate.masks) == ("zero" in names)
    with torch.no_grad():
        answer: Tensor = candidate.runnable(data[0])
        assert torch.isfinite(answer).all()
        assert torch.equal(rebuilt(module, candidate)(data[0]), candidate.module(data[0]))


def test_the_same_step_gives_the_same_bits() -> None:
    module = seeded(Cnn)
    hashes = set()
    for seed in range(2):
        torch.manual_seed(seed)
        context = context_for(module, (CNN_DATA, integers(5, 48)))
        done = Structured(amount=0.5, criterion="taylor").apply(Candidate(frozen_copy(module)), context)
        hashes.add(state_hash(done.module))
    assert len(hashes) == 1


def test_after_quantization_it_starts_from_the_rounded_weights() -> None:
    module = seeded(Mlp)
    context = context_for(module, MLP_DATA)
    done = Structured(amount=0.5).apply(quantized(module, context), context)
    assert (done.plan, done.simulation) == (None, None)


@pytest.mark.parametrize("wrong", [{"amount": 1.0}, {"criterion": "x"}, {"kinds": "head"}, {"samples": 0}])
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}"):
        Structured(**wrong)


def test_the_task_may_be_unlabelled() -> None:
    module = seeded(Mlp)
    task = Task(calibrate=normal(20, 12))
    context = context_for(module, task.splits["calibrate"])
    assert sizes(Structured().apply(Candidate(frozen_copy(module)), context)) == [(16, 8), (16, 8)]
