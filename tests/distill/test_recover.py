from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.distill import Recover, losses
from tersor.errors import DataError, NonFiniteError
from tersor.prune import Unstructured
from tersor.quantize import Static
from tersor.train import Schedule
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    Cnn,
    Mlp,
    Transformer,
    context_for,
    integers,
    normal,
    seeded,
    state_hash,
)

IMAGES = normal(160, 3, 8, 8, seed=5)
SHORT = Schedule(epochs=4, batch_size=16, lr=0.02)


def images(labels: bool = False, **fields: Any) -> Context:
    train = (IMAGES[:120], integers(5, 120)) if labels else IMAGES[:120]
    return context_for(seeded(Cnn), None, train=train, report=IMAGES[120:], **fields)


def weighed(alpha: float) -> list[Any]:
    """`alpha` for the original's answers, the rest for labels."""
    return [{name: {"weight": weight}} for name, weight in (("kd", alpha), ("task", 1 - alpha)) if weight]


def distance(module: nn.Module, context: Context) -> float:
    """How far the answers are from the original's, on data that training never saw."""
    with torch.no_grad():
        return float(losses.kd(module(IMAGES[120:]), context.original(IMAGES[120:])))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("loss", ["kd", "mse", "dist", "logit_standardisation", "jsd"])
def test_a_pruned_model_comes_back_towards_the_original(
    labels: bool, loss: str, noticed: Callable[[nn.Module], str]
) -> None:
    module, context = seeded(Cnn), images(labels)
    pruned = Unstructured(sparsity=0.8).apply(Candidate(module), context)
    before, teacher, started = noticed(pruned.module), noticed(context.original), noticed(module)
    done = Recover(losses=[{loss: {"weight": 0.95}}, {"task": {"weight": 0.05}}], schedule=SHORT).apply(pruned, context)
    assert noticed(pruned.module) == before
    assert noticed(context.original) == teacher
    assert noticed(module) == started
    assert distance(done.module, context) < 0.7 * distance(pruned.module, context)
    assert not any(part.training for part in done.module.modules())
    for path, mask in pruned.masks.items():
        assert (done.module.get_parameter(path)[~mask] == 0).all()
    trace = [float(value) for value in done.history[-1].notes[0].removeprefix("loss by epoch: ").split(", ")]
    assert len(trace) == 4
    assert trace[-1] < trace[0]


def test_the_same_seed_gives_the_same_bits() -> None:
    def recovered(seed: int) -> str:
        context = images(labels=True, seed=seed)
        return state_hash(Recover(schedule=SHORT).apply(Candidate(seeded(Cnn)), context).module)

    assert recovered(0) == recovered(0)
    assert recovered(0) != recovered(1)


def test_an_untouched_model_that_learns_from_itself_hardly_moves() -> None:
    context = context_for(seeded(Mlp), None, train=MLP_DATA)
    done = Recover(schedule=Schedule(epochs=2, batch_size=16, weight_decay=0.0)).apply(Candidate(seeded(Mlp)), context)
    moved = (done.module(MLP_DATA) - seeded(Mlp)(MLP_DATA)).abs().max()
    assert moved < 1e-4


def test_alpha_weighs_the_task_loss() -> None:
    x, y = normal(96, 12), integers(4, 96)

    def accuracy(alpha: float) -> float:
        context = context_for(seeded(Mlp), None, train=(x, y))
        schedule = Schedule(epochs=40, batch_size=32, lr=0.2)
        module = Recover(losses=weighed(alpha), schedule=schedule).apply(Candidate(seeded(Mlp)), context).module
        with torch.no_grad():
            return float((module(x).argmax(1) == y).double().mean())

    assert accuracy(0.0) > 0.8  # learns the labels by heart
    assert accuracy(1.0) < 0.5  # does not look at them


def test_labels_are_not_read_where_they_have_no_weight() -> None:
    wrong = torch.full((48,), 99)
    context = context_for(seeded(Mlp), None, train=(MLP_DATA, wrong))
    Recover(losses=weighed(1.0), schedule=SHORT).apply(Candidate(seeded(Mlp)), context)
    with pytest.raises(DataError, match=r"0\.\.3, got 99"):
        Recover(losses=weighed(0.9), schedule=SHORT).apply(Candidate(seeded(Mlp)), context)


def test_the_declared_output_is_learned_by_keyword() -> None:
    module = seeded(Transformer)
    context = context_for(module, None, train=TEXT_DATA, output="logits")
    pruned = Unstructured(sparsity=0.5).apply(Candidate(module), context)
    done = Recover(schedule=Schedule(epochs=6, batch_size=16, lr=0.05)).apply(pruned, context)
    trace = [float(value) for value in done.history[-1].notes[0].removeprefix("loss by epoch: ").split(", ")]
    assert trace[-1] < 0.5 * trace[0]
    assert done.module.get_parameter("head.weight") is done.module.get_parameter("embedding.weight")  # still tied


def test_after_quantization_it_starts_from_the_rounded_weights_and_drops_the_plan() -> None:
    module = seeded(Mlp)
    context = context_for(module, None, train=MLP_DATA)
    int8 = Static().apply(Candidate(module), context)
    done = Recover(schedule=Schedule(lr=1e-12)).apply(int8, context)
    assert (done.plan, done.simulation, done.precision) == (None, None, "float32")
    for path in ("first.weight", "second.weight"):
        assert torch.allclose(done.module.get_parameter(path), int8.for_weights().module.get_parameter(path), atol=1e-7)
        assert not torch.allclose(done.module.get_parameter(path), module.get_parameter(path), atol=1e-5)
    assert [record.name for record in done.history] == ["quantize.static", "recover"]


def test_it_needs_training_data() -> None:
    with pytest.raises(DataError, match="recover needs a 'train' split"):
        Recover().apply(Candidate(seeded(Mlp)), context_for(seeded(Mlp), MLP_DATA))


def test_training_that_explodes_is_told_and_changes_nothing(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn)
    before = noticed(module)
    with pytest.raises(NonFiniteError, match=r"in epoch \d+, step \d+"):
        Recover(losses="mse", schedule=Schedule(epochs=30, batch_size=16, lr=1e9)).apply(
            Candidate(module), context_for(module, None, train=CNN_DATA)
        )
    assert noticed(module) == before


def test_progress_is_told() -> None:
    told: list[tuple[Any, ...]] = []
    context = context_for(seeded(Mlp), None, train=MLP_DATA)
    watched = replace(context, progress=lambda *what: told.append(what))
    Recover(schedule=Schedule(epochs=2, batch_size=24)).apply(Candidate(seeded(Mlp)), watched)
    assert [what[:3] for what in told] == [("recover", done, 4) for done in (1, 2, 3, 4)]
    assert all(set(what[3]) == {"loss", "examples/s"} for what in told)


def test_layers_are_compared_and_masks_hold() -> None:
    module, context = seeded(Cnn), images(labels=True)
    pruned = Unstructured(sparsity=0.8).apply(Candidate(module), context)
    done = Recover(losses=["kd", {"hint": {"weight": 0.1}}, "crd", "task"], schedule=SHORT).apply(pruned, context)
    assert distance(done.module, context) < 0.7 * distance(pruned.module, context)
    for path, mask in pruned.masks.items():
        assert (done.module.get_parameter(path)[~mask] == 0).all()
    notes = done.history[-1].notes
    assert [note.split(":")[0] for note in notes[1:]] == ["hint", "crd"]
    assert set(dict(done.module.named_modules())) == set(dict(module.named_modules()))  # no projector is left behind


def test_averaged_weights_stay_pruned() -> None:
    context = images()
    pruned = Unstructured(sparsity=0.8).apply(Candidate(seeded(Cnn)), context)
    schedule = SHORT.model_copy(update={"ema": 0.9})
    done = Recover(losses="kd", schedule=schedule).apply(pruned, context).module
    assert all((done.get_parameter(path)[~mask] == 0).all() for path, mask in pruned.masks.items())


def test_the_search_split_says_when_to_stop() -> None:
    x, y = normal(48, 12), integers(4, 48)
    context = context_for(seeded(Mlp), None, train=(x[:32], y[:32]), search=(x[32:], y[32:]))
    step = Recover(schedule=Schedule(epochs=9, batch_size=16, lr=1e-9, patience=2))
    assert step.needs == {"train", "search"}
    assert Recover().needs == {"train"}
    notes = step.apply(Candidate(seeded(Mlp)), context).history[-1].notes
    assert len(notes[0].split(", ")) == 3  # epochs: the best, and two without a better one
    assert notes[1].startswith("metric on the search split by epoch: ")
    assert notes[2] == "the weights are those of epoch 1, the best on the search split"


def test_a_kept_answer_serves_every_epoch(tmp_path: Path) -> None:
    context = replace(images(labels=True), directory=tmp_path)
    step = Recover(losses=["kd", "task"], schedule=SHORT, cache=True)
    done = step.apply(Candidate(seeded(Cnn)), context)
    plain = step.model_copy(update={"cache": False}).apply(Candidate(seeded(Cnn)), replace(context, directory=None))
    for name, value in done.module.state_dict().items():
        torch.testing.assert_close(value, plain.module.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".pt"}
