"""The sum of the terms: its value, what it trains, what it leaves alone, what it refuses before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distill_zoo import FEATURES, OF_TOKENS, OUTPUTS, TOKENS, VOCABULARY, Language, cnn, images, language, texts
from tersor.core.batch import Batch
from tersor.core.task import Task
from tersor.distill.losses import LOSSES
from tersor.distill.objective import Objective
from tersor.distill.terms import Losses
from tersor.errors import ConfigError, DataError, ModelError, OutputError, TersorError
from tersor.train import Hooks, Schedule, fit
from zoo import integers, normal, seeded, state_hash

PLAIN = Schedule(batch_size=12)
LAYERS = [["2", "2"], ["6", "6"]]
BLOCKS = [["blocks.0", "blocks.1"], ["blocks.1", "blocks.3"]]


def objective(losses: Any, student: nn.Module, teacher: nn.Module, task: Task, **fields: Any) -> Objective:
    schedule = fields.pop("schedule", PLAIN)
    return Objective(Losses(losses=losses).losses, student, teacher, task, schedule=schedule, **fields)


def batch_of(task: Task) -> Batch:
    return task.splits["train"].batch(range(12))


def written(name: str, pairs: list[list[str]] | None = None) -> dict[str, Any]:
    """A term in short."""
    settings: dict[str, Any] = {"heads": 2} if name == "minilm_relations" else {}
    return {name: settings | ({"pairs": pairs} if pairs else {})}


# --- the value


def test_the_value_is_the_sum_by_hand() -> None:
    student, teacher, task = cnn(4), cnn(8, seed=1), images()
    batch = batch_of(task)
    x, y = batch.args[0], batch.labels
    made = objective([{"kd": {"weight": 0.7, "temperature": 2}}, {"task": {"weight": 0.3}}, {"hint": {"weight": 2.0}}],
                     student, teacher, task)  # fmt: skip
    found = made(student, batch)
    ours, theirs = student(x), teacher(x)
    soft = functional.kl_div((ours / 2).log_softmax(1), (theirs / 2).log_softmax(1), log_target=True, reduction="none")
    hints = []
    for companion, (address, _) in zip(made.companions, LAYERS, strict=True):
        stop = int(address) + 1
        hints.append(functional.mse_loss(companion.map(student[:stop](x)), teacher[:stop](x)))
    expected = 0.7 * 4 * soft.sum(1).mean() + 0.3 * functional.cross_entropy(ours, y) + 2 * sum(hints) / 2
    torch.testing.assert_close(found, expected)
    assert found.ndim == 0
    assert made.notes == [
        "hint: 2 [B, 4, 8, 8] <- 2 [B, 8, 8, 8]", "hint: 6 [B, 8, 4, 4] <- 6 [B, 16, 4, 4]",
    ]  # fmt: skip


def test_settings_reach_the_loss_that_has_weights() -> None:
    made = objective({"crd": {"width": 5, "temperature": 0.5}}, cnn(4), cnn(8), images())
    (judge,) = made.companions
    assert (judge.student.in_features, judge.teacher.in_features, judge.student.out_features) == (8, 16, 5)
    assert judge.temperature == 0.5


def test_the_channel_axis_says_what_three_dimensions_are() -> None:
    def signals(width: int) -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Conv1d(2, width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)))

    task = Task(train=normal(12, 2, 9))
    student, teacher = signals(4), signals(6)
    for module in (student, teacher):
        module(normal(1, 2, 9))
    pairs = [["1", "1"]]
    made = objective({"crd": {"pairs": pairs, "channel_axis": 1}}, student, teacher, task)
    assert (made.companions[0].student.in_features, made.companions[0].teacher.in_features) == (4, 6)
    made = objective({"l2_cosine": {"pairs": pairs, "channel_axis": 1}}, student, teacher, task)
    assert isinstance(made.companions[0].map, nn.Conv1d)


def test_the_seed_makes_the_projectors_and_leaves_the_caller_s_numbers() -> None:
    def made(seed: int) -> str:
        companions = objective(["hint", "crd"], cnn(4), cnn(8), images(), seed=seed).companions
        return state_hash(nn.ModuleList(companions))

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert made(0) == made(0) != made(1)
    assert torch.equal(torch.rand(3), expected)


# --- every loss trains


def check_step(losses: Any, student: nn.Module, teacher: nn.Module, task: Task) -> Objective:
    """One step: finite gradients, in the student and in what the loss owns; nothing in the teacher."""
    made = objective(losses, student, teacher.requires_grad_(True), task)
    student.train()
    before = state_hash(nn.ModuleList([student, *made.companions]))
    value = made(student, batch_of(task))
    value.backward()
    assert torch.isfinite(value)
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert any(bool(gradient.any()) for gradient in gradients)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    for companion in made.companions:
        for parameter in companion.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
            assert bool(torch.isfinite(parameter.grad).all())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    everything = nn.ModuleList([student, *made.companions])
    torch.optim.SGD(everything.parameters(), lr=0.1).step()
    assert state_hash(everything) != before
    return made


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OF_TOKENS])
def test_every_loss_trains_an_image_network(name: str) -> None:
    made = check_step(written(name), cnn(4), cnn(8, seed=1), images())
    pairs = [item for wanted in made.wanted for item in wanted.compared]
    one_layer = name in {"crd", "rkd", "similarity_preserving"}
    assert len(pairs) == (0 if name in OUTPUTS else 1 if one_layer else 2)
    assert bool(made.companions) == (LOSSES[name].matching or LOSSES[name].trainable)


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in OF_TOKENS])
def test_every_loss_on_features_takes_named_pairs_of_images(name: str) -> None:
    made = check_step([written(name, LAYERS), "task"], cnn(4), cnn(8, seed=1), images())
    assert [item.pair.teacher for item in made.wanted[0].compared] == ["2", "6"]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "attention_maps"])
def test_every_loss_trains_a_token_model(name: str) -> None:
    made = check_step(written(name), language(8, 2), language(12, 4, seed=1), texts())
    pairs = [item for wanted in made.wanted for item in wanted.compared]
    expected = {**dict.fromkeys(OUTPUTS, 0), "minilm_relations": 3, "crd": 1, "rkd": 1, "similarity_preserving": 1}
    assert len(pairs) == expected.get(name, 2)


@pytest.mark.parametrize("name", FEATURES)
def test_every_loss_on_features_takes_named_pairs_of_tokens(name: str) -> None:
    of_maps = [["blocks.1.attention[1]", "blocks.3.attention[1]"]]
    check_step(written(name, of_maps if name == "attention_maps" else BLOCKS), language(8, 2), language(12, 4), texts())


@pytest.mark.parametrize("name", ["hint", "crd"])
def test_what_the_loss_owns_is_trained_along(name: str) -> None:
    student, task = cnn(4), images()
    made = objective([name, "task"], student, cnn(8, seed=1), task)
    before = [state_hash(companion) for companion in made.companions]
    fit(student, task.splits["train"], made, schedule=PLAIN, seed=0, hooks=Hooks(companions=made.companions))
    assert all(a != state_hash(b) for a, b in zip(before, made.companions, strict=True))


# --- padding


TOKEN_TERMS = [written(name, [["blocks.1.attention[1]", "blocks.3.attention[1]"]] if name == "attention_maps" else None)
               for name in LOSSES]  # fmt: skip


@pytest.mark.parametrize("term", [*TOKEN_TERMS, {"task": {}}], ids=lambda term: next(iter(term)))
def test_what_stands_in_the_padding_does_not_matter(term: dict[str, Any]) -> None:
    student, teacher = language(8, 2), language(12, 4, seed=1)
    values = []
    for padding in (0, 5):
        task = texts(padding=padding)
        values.append(objective(term, student, teacher, task)(student, batch_of(task)).detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-7)
    other = texts(padding=0)
    columns = other.splits["train"].batch(range(12))
    whole = replace(columns, kwargs=columns.kwargs | {"attention_mask": torch.ones(12, TOKENS, dtype=torch.long)},
                    labels=columns.labels.clamp_min(0))  # fmt: skip
    changed = objective(term, student, teacher, other)(student, whole).detach()
    assert not torch.isclose(changed, values[0], rtol=1e-4)  # the padding did matter, had it counted


class Word(nn.Module):
    """Each token for itself: logits `[B, T, V]`, no mask among the arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_standardisation", "mse", "jsd", "reverse_kl", "hint"])
def test_without_a_mask_labels_say_what_counts(name: str) -> None:
    student, teacher = seeded(lambda: Word(4)), seeded(lambda: Word(6), 1)
    tokens, labels = integers(VOCABULARY, 8, TOKENS), integers(VOCABULARY, 8, TOKENS, seed=2)
    ignored = torch.arange(TOKENS) >= 4
    labels = torch.where(ignored, -100, labels)
    term = written(name, [["embedding", "embedding"]] if name == "hint" else None)
    values = []
    for _ in range(2):
        made = objective(term, student, teacher, Task(train=(tokens, labels)))
        values.append(made(student, Batch((tokens,), {}, labels)).detach())
        tokens = torch.where(ignored, 3, tokens)
    torch.testing.assert_close(values[0], values[1])
    all_count = made(student, Batch((tokens,), {}, labels.clamp_min(0)))
    assert not torch.isclose(all_count, values[1])


def test_dkd_leaves_out_what_has_no_label_even_if_it_is_no_padding() -> None:
    task = texts()
    batch = batch_of(task)
    labels = batch.labels.clone()
    labels[:, 0] = -100
    student, teacher = language(8, 2), language(12, 4)
    made = objective("dkd", student, teacher, task)
    kept = made(student, replace(batch, labels=labels))
    with torch.no_grad():
        rows = labels != -100
        by_hand = LOSSES["dkd"].function(batch.call(student)[rows], batch.call(teacher)[rows], labels=labels[rows])
    torch.testing.assert_close(kept.detach(), by_hand)


# --- mixup


def test_the_teacher_sees_the_blended_examples() -> None:
    seen: list[Tensor] = []

    class Recorded(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.inner(x)

    student, teacher, task = Recorded(cnn(4)), Recorded(cnn(8)), images()
    made = objective(["kd", "task"], student, teacher, task, schedule=Schedule(batch_size=12, mixup=0.4))
    seen.clear()
    batch = batch_of(task)
    torch.manual_seed(0)
    value = made(student, batch)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], batch.args[0])
    torch.manual_seed(0)
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    order = torch.randperm(12)
    torch.testing.assert_close(seen[0], share * batch.args[0] + (1 - share) * batch.args[0][order])
    answers, y = student(seen[0]), batch.labels
    hard = share * functional.cross_entropy(answers, y) + (1 - share) * functional.cross_entropy(answers, y[order])
    torch.testing.assert_close(value, LOSSES["kd"].function(answers, teacher(seen[0])) + hard)


# --- labels


def test_without_labels_the_task_s_loss_is_left_out_and_that_is_told() -> None:
    student, teacher, task = cnn(4), cnn(8), images(labels=False)
    made = objective([{"kd": {"weight": 0.5}}, "task"], student, teacher, task)
    assert made.notes == ["the train split has no labels: the task's loss is left out"]
    batch = batch_of(task)
    expected = 0.5 * LOSSES["kd"].function(student(*batch.args), teacher(*batch.args))
    torch.testing.assert_close(made(student, batch), expected)


def test_labels_alone_need_no_teacher() -> None:
    student, task = cnn(4), images()
    made = objective("task", student, nn.Linear(1, 1), task)
    assert made.teacher is None
    batch = batch_of(task)
    torch.testing.assert_close(made(student, batch), functional.cross_entropy(student(*batch.args), batch.labels))


# --- refused before any work


def other_classes() -> tuple[Any, ...]:
    return "kd", cnn(4), cnn(8, classes=5), images()


def other_vocabulary() -> tuple[Any, ...]:
    return "jsd", language(8, 2), seeded(lambda: Language(12, 4, vocabulary=9)), texts()


REFUSED: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any], type[TersorError], str]] = {
    "other classes": (other_classes, {}, ModelError, r"student returns \(2, 4\), the teacher \(2, 5\)"),
    "other vocabulary": (other_vocabulary, {}, ModelError, r"student returns \(2, 6, 11\), the teacher \(2, 6, 9\)"),
    "no train split": (
        lambda: ("kd", cnn(4), cnn(8), Task(report=normal(4, 3, 8, 8))), {}, DataError, "needs a 'train' split"),
    "dkd without labels": (
        lambda: ("dkd", cnn(4), cnn(8), images(labels=False)), {}, DataError, "'dkd' needs labels"),
    "task without labels": (
        lambda: ("task", cnn(4), cnn(8), images(labels=False)), {}, DataError, r"distil: losses: \[kd\]"),
    "dkd with mixup": (
        lambda: ("dkd", cnn(4), cnn(8), images()), {"mixup": 0.2}, ConfigError, "leave mixup out"),
    "mixed tokens": (
        lambda: ("kd", language(8, 2), language(8, 2), texts()), {"mixup": 0.2}, ConfigError, "input_ids"),
    "smoothed labels of an own loss": (
        lambda: ("task", cnn(4), cnn(8), images(loss=functional.cross_entropy)), {"label_smoothing": 0.1}, ConfigError,
        "a loss of your own"),
    "dkd with float labels": (
        lambda: ("dkd", cnn(4), cnn(8), Task(train=(normal(8, 3, 8, 8), normal(8)))), {}, DataError, "integer labels"),
    "labels out of range": (
        lambda: ("task", cnn(4), cnn(8), Task(train=(normal(8, 3, 8, 8), torch.full((8,), 9)))), {}, DataError,
        r"0\.\.3, got 9"),
    "attention maps without pairs": (
        lambda: ("attention_maps", language(8, 2), language(8, 2), texts()), {}, ConfigError, "name them: pairs"),
    "unknown path of the student": (
        lambda: ({"hint": {"pairs": [["block.0", "blocks.0"]]}}, language(8, 2), language(8, 2), texts()), {},
        ConfigError, "no module 'block.0'; nearest: 'blocks.0'"),
    "unknown path of the teacher": (
        lambda: ({"hint": {"pairs": [["blocks.0", "blocks.9"]]}}, language(8, 2), language(8, 2), texts()), {},
        ConfigError, "no module 'blocks.9'; nearest: 'blocks"),
    "a pattern": (
        lambda: ({"hint": {"pairs": [["blocks.*", "blocks.0"]]}}, language(8, 2), language(8, 2), texts()), {},
        ConfigError, r"'blocks\.\*' is a pattern"),
    "several tensors": (
        lambda: ({"hint": {"pairs": [["blocks.0.attention", "blocks.0"]]}}, language(8, 2), language(8, 2), texts()),
        {}, OutputError, r"name one, e\.g\. 'blocks\.0\.attention\[0\]'"),
    "nothing to pair": (
        lambda: ("hint", nn.Linear(3, 2), nn.Linear(3, 2), Task(train=normal(8, 3))), {}, ConfigError,
        "name the pairs"),
    "heads that do not divide": (
        lambda: ({"minilm_relations": {"heads": 5}}, language(8, 2), language(12, 4), texts()), {}, ConfigError,
        "5 does not divide"),
    "maps of other sizes": (
        lambda: ({"attention_maps": {"pairs": [["blocks.0", "blocks.0"]]}}, language(8, 2), language(8, 2), texts()),
        {}, ConfigError, r"attention matrices \[B, H, T, T\]"),
    "undeclared output": (
        lambda: ("kd", nn.LSTM(3, 4, batch_first=True), cnn(4), Task(train=normal(8, 5, 3))), {}, OutputError,
        "declare one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(name: str, noticed: Callable[[nn.Module], str]) -> None:
    build, fields, error, said = REFUSED[name]
    losses, student, teacher, task = build()
    student.train()
    before = noticed(student), noticed(teacher)
    with pytest.raises(error, match=said):
        objective(losses, student, teacher, task, schedule=Schedule(batch_size=4, **fields))
    assert (noticed(student), noticed(teacher)) == before


# --- taps


class Breaking(nn.Module):
    """A network that fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.broken = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        if self.broken:
            raise ArithmeticError("broken on purpose")
        return self.head(x)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_no_tap_is_left_after_an_error(who: str, noticed: Callable[[nn.Module], str]) -> None:
    student, teacher, task = Breaking(), Breaking().eval().requires_grad_(False), images()
    made = objective({"hint": {"pairs": [["stem", "stem"]]}}, student, teacher, task)
    before, batch = (noticed(student), noticed(teacher)), batch_of(task)
    (student if who == "student" else teacher).broken = True
    with pytest.raises(ArithmeticError, match="on purpose"):
        made(student, batch)
    assert (noticed(student), noticed(teacher)) == before
    assert "forward" not in vars(student.stem)
    assert "forward" not in vars(teacher.stem)
    student.broken = teacher.broken = False
    assert torch.isfinite(made(student, batch))


def test_taps_are_there_only_while_the_loss_is_computed(noticed: Callable[[nn.Module], str]) -> None:
    student, teacher, task = cnn(4), cnn(8), images()
    before = noticed(student), noticed(teacher)
    made = objective(["hint", "attention_transfer"], student, teacher, task)
    assert (noticed(student), noticed(teacher)) == before
    made(student, batch_of(task))
    assert (noticed(student), noticed(teacher)) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_features_are_seen_in_a_compiled_student() -> None:
    task = images()

    def trained(**fields: Any) -> list[float]:
        student, schedule = cnn(4), Schedule(epochs=2, batch_size=12, **fields)
        made = objective(["kd", "hint"], student, cnn(8, seed=1), task, schedule=schedule)
        done = fit(
            student, task.splits["train"], made, schedule=schedule, seed=0, hooks=Hooks(companions=made.companions)
        )
        assert student._compiled_call_impl is None
        return done.losses

    assert trained(compile=True) == pytest.approx(trained(), rel=1e-4)
