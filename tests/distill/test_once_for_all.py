"""Shapes: `B` batch, `T` tokens, `C` channels."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.distill import OnceForAll
from tersor.distill.losses import kd
from tersor.distill.objective import Objective
from tersor.distill.once_for_all import Elastic, Sandwich, Selection, importance, kept_of, organise
from tersor.errors import ConfigError, CoverageError, DataError, OutputDirectoryError
from tersor.graph import couple
from tersor.prune import DepthStep, Structured, Unstructured, depth, structured
from tersor.recipes import parse_recipe
from tersor.train import Schedule
from zoo import TEXT_DATA, Mlp, Transformer, context_for, integers, normal, relative, seeded, state_hash

SHORT = Schedule(epochs=2, batch_size=50, lr=0.005)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, image: Tensor) -> Tensor:
        inner = self.first_norm(self.first(image)).relu()
        return (image + self.second_norm(self.second(inner))).relu()


class Residual(nn.Module):
    """A stream of channels through residual blocks; images `[B, 1, 8, 8]`, ten classes."""

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        image = self.blocks(self.norm(self.stem(image)).relu())
        return self.head(functional.max_pool2d(image, 4).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(sequence)[0][:, -1])


class Encoder(nn.Module):
    """Sequences `[B, T, 5]` through transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.inputs = nn.Linear(5, 16)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.layers(self.inputs(sequence)).mean(1))


class Flipped(nn.Module):
    """Units stand in another order at their second place than at their first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.first(features).relu().flip(1))


class Noisy(Flipped):
    """Multiplies units by numbers that are no weights, so they differ by more than their weights."""

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features).relu()
        return self.second(hidden * torch.rand(hidden.shape[1]))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "cnn": (Residual, normal(4, 1, 8, 8)),
    "encoder": (Encoder, normal(4, 6, 5)),
    "lstm": (Recurrent, normal(4, 6, 5)),
    "mlp": (Mlp, normal(4, 12)),
}


def organised(name: str, **settings: Any) -> tuple[nn.Module, nn.Module, Elastic, Tensor]:
    """A model before and after its units were sorted."""
    build, inputs = MODELS[name]
    before, model = seeded(build), seeded(build)
    elastic, _ = organise(model, inputs, **{"widths": (1.0, 0.5), "depth": 0.5} | settings)
    return before, model, elastic, inputs


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images `[B, 1, 8, 8]` and their labels: 500 to train, the other splits smaller."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(y)
    ends = {"train": (0, 500), "calibrate": (500, 700), "report": (700, 1500)}
    return {role: (images[a:b], labels[a:b]) for role, (a, b) in ends.items()}


@cache
def trained() -> nn.Module:
    """A network that has learned the digits."""
    module, (x, y) = seeded(Residual).train(), digits()["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(6):
            for chosen in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
                optimizer.step()
    return module.eval()


def context(**fields: Any) -> Context:
    return context_for(trained(), None, **digits() | fields)


def few(**fields: Any) -> Context:
    """The first 200 images, for trainings of which only the bits matter."""
    x, y = digits()["train"]
    return context(train=(x[:200], y[:200]), **fields)


def accuracy(module: nn.Module) -> float:
    x, y = digits()["report"]
    with torch.no_grad():
        return float((module(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("name", MODELS)
def test_sorted_units_compute_what_they_computed(name: str) -> None:
    before, model, elastic, inputs = organised(name)
    with torch.no_grad():
        assert relative(model(inputs), before(inputs)) < 1e-5
    assert state_hash(model) != state_hash(before)
    for family in elastic.families:
        scores = importance(family, model)
        assert bool((scores.diff() <= 1e-9).all())
        assert torch.allclose(scores, importance(family, before).sort(descending=True).values)


def test_importance_is_the_mean_norm_over_places() -> None:
    model = seeded(Mlp)
    family = couple(model, normal(2, 12))["first.weight[0]"]
    first, second = model.get_submodule("first"), model.get_submodule("second")
    norms = torch.stack([first.weight.norm(dim=1), first.bias.abs(), second.weight.norm(dim=0)])  # type: ignore[operator, union-attr]
    assert torch.allclose(importance(family, model), norms.mean(0).double(), rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_part_answers_like_the_sliced_model(name: str) -> None:
    _, model, elastic, inputs = organised(name)
    kept = {family.name: kept_of(family.size, 0.5) for family in elastic.families}
    part = elastic.subnetwork(model, Selection(kept))
    shares = {name.replace("[", "[[]"): 0.5 for name in kept}
    report = structured(model, inputs, criterion="order", allocation=shares, verify="together")
    assert report.max_error is not None
    assert {cut.name: cut.kept for cut in report.families if cut.kept < cut.units} == kept
    with torch.no_grad():
        assert relative(part(inputs), report.model(inputs)) < 1e-5
        assert relative(part(inputs), model(inputs)) > 1e-2


@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_bypassed_blocks_answer_like_the_shallow_model(name: str) -> None:
    _, model, elastic, inputs = organised(name, widths=(1.0,))
    assert elastic.families == ()
    part = elastic.subnetwork(model, Selection({}, (1,)))
    shallow = depth(model, inputs, blocks=[elastic.blocks[1].path]).model
    with torch.no_grad():
        assert relative(part(inputs), shallow(inputs)) < 1e-5
        assert relative(part(inputs), model(inputs)) > 1e-3


def test_order_slices_the_prefix_wherever_units_stand() -> None:
    model, inputs = seeded(Flipped), normal(5, 6)
    elastic, _ = organise(model, inputs, widths=(0.5,), depth=0.0)
    (family,) = elastic.families
    second = family.members[next(place for place in family.members if place.parameter == "second.weight")]
    assert second.flatten().tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    sliced = structured(model, inputs, criterion="order", amount=0.5).model
    assert torch.equal(sliced.get_parameter("first.weight"), model.get_parameter("first.weight")[:4])
    assert torch.equal(sliced.get_parameter("second.weight"), model.get_parameter("second.weight")[:, 4:])


def test_what_cannot_change_places_or_be_masked_is_left_alone_and_named(noticed: Callable[[nn.Module], str]) -> None:
    model = seeded(Noisy)
    before = noticed(model)
    with pytest.raises(CoverageError, match=r"Noisy has no .* its units cannot change places: outputs differ"):
        organise(model, normal(4, 6), widths=(1.0, 0.5), depth=0.5)
    assert noticed(model) == before
    _, _, elastic, _ = organised("encoder")
    told = "\n".join(elastic.notes())
    assert "inputs.weight[0]: masked weights are not the smaller model" in told  # the stream, behind layer norms
    assert "layers.layers.0: it cannot be bypassed" in told
    assert {family.kind for family in elastic.families} == {"head", "channel"}


def test_only_what_stays_gets_gradients_and_only_the_whole_network_keeps_statistics() -> None:
    _, model, elastic, inputs = organised("cnn")
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    part = elastic.subnetwork(model, elastic.smallest())
    part(inputs).sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    gradient = model.get_parameter("stem.weight").grad
    assert gradient is not None
    assert bool((gradient[8:] == 0).all())
    assert bool((gradient[:8] != 0).any())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_sandwich_is_the_mean_of_the_whole_and_its_parts() -> None:
    module = copy.deepcopy(trained())
    step, (x, _) = OnceForAll(), digits()["train"]
    elastic, _ = organise(module, x[:2], widths=step.widths, depth=step.depth)
    task = context().task
    objective = Objective(step.losses, module, trained(), task, schedule=SHORT)
    sandwich = Sandwich(elastic, objective, task, random=2, temperature=3.0)
    batch = task.require("train", "test").batch(range(16))
    alone = objective(module, batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sandwich.draw(0, 1)
    assert len(sandwich.selections[0].skipped) == elastic.most_skipped == 1
    assert set(sandwich.selections[0].kept.values()) == {8}
    parts = []
    for part in sandwich.selections:
        answers = functional.log_softmax(elastic.subnetwork(module, part)(x[:16]) / 3, 1)
        wanted = functional.log_softmax(module(x[:16]).detach() / 3, 1)
        parts.append(9 * functional.kl_div(answers, wanted, reduction="batchmean", log_target=True))
    assert torch.allclose(sandwich(module, batch), torch.stack([alone, *parts]).mean(), rtol=1e-5)


def test_random_parts_lie_between_the_smallest_and_the_whole() -> None:
    _, _, elastic, _ = organised("cnn", widths=(1.0, 0.75, 0.5), depth=0.7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [elastic.random() for _ in range(60)]
    assert {kept for part in drawn for kept in part.kept.values()} == {16, 12, 8}
    assert {len(part.skipped) for part in drawn} == {0, 1, 2}
    assert {number for part in drawn for number in part.skipped} == {0, 1, 2}


def test_slices_work_without_training_of_their_own(noticed: Callable[[nn.Module], str]) -> None:
    module, seen = copy.deepcopy(trained()), context()
    before, original = noticed(module), noticed(seen.original)
    step = OnceForAll(schedule=Schedule(epochs=8, batch_size=50, lr=0.003, optimizer="adamw"))
    done = step.apply(Candidate(module), seen)
    assert (noticed(module), noticed(seen.original)) == (before, original)
    half = Structured(amount=0.5, criterion="order", floor=0.0).apply(done, seen)
    plain = Structured(amount=0.5, criterion="l2", floor=0.0).apply(Candidate(module), seen)
    assert {pruned.module.get_parameter("stem.weight").shape[0] for pruned in (half, plain)} == {8}
    whole, sliced, unprepared = accuracy(done.module), accuracy(half.module), accuracy(plain.module)
    shallow = accuracy(DepthStep(blocks=("blocks.1",)).apply(half, seen).module)
    assert whole > accuracy(module) - 0.03
    assert sliced > unprepared + 0.4
    assert shallow > unprepared + 0.4
    expected = "4 families may keep 1, 0.75, 0.5 of their units, 1 of 3 blocks may be skipped at once"
    assert done.history[-1].notes[1] == expected


def test_the_same_seed_gives_the_same_bits() -> None:
    def after(seed: int) -> str:
        step = OnceForAll(schedule=SHORT.model_copy(update={"epochs": 1}))
        return state_hash(step.apply(Candidate(trained()), few(seed=seed)).module)

    first = after(0)
    assert after(0) == first
    assert after(1) != first


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = OnceForAll(schedule=SHORT), few()
    expected = state_hash(step.apply(Candidate(trained()), seen).module)
    monkeypatch.setattr("tersor.train.checkpoint.Keeper.due", lambda self, step: step % 3 == 0)

    def killed(label: str, done: int, total: int, facts: Any = None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.apply(Candidate(trained()), replace(seen, directory=tmp_path, progress=killed))
    told: list[int] = []
    seen = replace(seen, directory=tmp_path, progress=lambda label, done, *_: told.append(done))
    with pytest.raises(OutputDirectoryError, match="another training"):
        step.model_copy(update={"random": 2}).apply(Candidate(trained()), seen)
    assert state_hash(step.apply(Candidate(trained()), seen).module) == expected
    assert told[0] == 4


def test_masks_move_along_with_their_weights() -> None:
    seen = few()
    pruned = Unstructured(sparsity=0.6).apply(Candidate(trained()), seen)
    done = OnceForAll(schedule=SHORT).apply(pruned, seen)
    assert set(done.masks) == set(pruned.masks)
    for path, mask in done.masks.items():
        assert int(mask.sum()) == int(pruned.masks[path].sum())
        assert bool((done.module.get_parameter(path)[~mask] == 0).all())
    assert not torch.equal(done.masks["stem.weight"], pruned.masks["stem.weight"])
    kept = done.module.get_parameter("stem.weight")[done.masks["stem.weight"]]
    assert float((kept == 0).double().mean()) < 0.01


def test_a_declared_output_by_keyword_without_labels() -> None:
    module = seeded(Transformer)
    seen = context_for(module, None, train=TEXT_DATA, output="logits")
    step = OnceForAll(schedule=Schedule(epochs=20, batch_size=16, lr=0.05))
    done = step.apply(Candidate(module), seen)
    assert done.module.get_parameter("head.weight") is done.module.get_parameter("embedding.weight")
    assert done.history[-1].notes[-1] == "the train split has no labels: the task's loss is left out"

    def missed(model: nn.Module, criterion: str) -> float:
        half = structured(model, TEXT_DATA, criterion=criterion, allocation={"wide.weight*": 0.5}).model
        with torch.no_grad():
            return float(kd(half(**TEXT_DATA)["logits"], module(**TEXT_DATA)["logits"]))

    assert missed(done.module, "order") < 0.5 * missed(module, "l2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (1.0, 0.0)}, "greater than 0"),
        ({"widths": (1.5,)}, "less than or equal to 1"),
        ({"widths": (1.0, 0.5, 0.5)}, "each share once"),
        ({"widths": (1.0,), "depth": 0.0}, "leave one network"),
        ({"depth": 1.0}, "less than 1"),
        ({"random": -1}, "greater than or equal to 0"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"schedule": Schedule(compile=True)}, "compilation"),
        ({"schedule": Schedule(parallel="sharded")}, "sharding"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnceForAll(**settings)


def test_a_recipe_may_write_it() -> None:
    recipe = parse_recipe(
        "steps: [{distill.once_for_all: {widths: [1, 0.5], depth: 0.25, schedule: {epochs: 3}}}, "
        "{prune.structured: {criterion: order, amount: 0.5}}]"
    )
    assert recipe.steps[0] == OnceForAll(widths=(1.0, 0.5), depth=0.25, schedule=Schedule(epochs=3))


def test_it_needs_examples_and_something_that_may_shrink() -> None:
    model = seeded(Mlp)
    with pytest.raises(DataError, match="once_for_all needs a 'train' split"):
        OnceForAll().check(context_for(model, normal(8, 12)))
    linear = seeded(lambda: nn.Linear(12, 4))
    with pytest.raises(CoverageError, match="it is an output of the model"):
        OnceForAll().apply(Candidate(linear), context_for(linear, None, train=(normal(8, 12), integers(4, 8))))
    assert OnceForAll(schedule=Schedule(patience=1)).needs == {"train", "search"}


def test_the_page_runs_and_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/methods/once-for-all.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    with torch.random.fork_rng(devices=[]):
        exec(compile(script, "once-for-all.md", "exec"), {})  # noqa: S102 - our own page
    assert "1 families may keep 1, 0.5 of their units" in capsys.readouterr().out
    assert isinstance(parse_recipe(recipe).steps[0], OnceForAll)
    assert [name for name in OnceForAll.model_fields if f"| `{name}` |" not in page] == []
