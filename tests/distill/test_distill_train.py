"""`tersor.distill.train` and `mutual`, from a student and a task to a trained copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from distill_zoo import cnn, images, language, texts
from tersor.core.metrics import Metric
from tersor.core.task import Task
from tersor.distill import Distilled, Ensemble, losses, mutual, train
from tersor.distill.sequences import generate
from tersor.distill.train import ANSWERS, TRAINING
from tersor.errors import ConfigError, DataError, ModelError, OutputDirectoryError, TersorError
from tersor.train import Schedule
from tersor.train.checkpoint import FILE
from zoo import integers, normal, seeded, state_hash

SHORT = Schedule(epochs=2, batch_size=12, lr=0.02)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits `[N, 64]`."""
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def digits_task(examples: int = 150, **fields: Any) -> Task:
    x, y = digits()
    return Task(train=(x[:examples], y[:examples]), search=(x[900:], y[900:]), **fields)


def perceptron(width: int, seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)), seed)


def accuracy(module: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return float((module(x[900:]).argmax(1) == y[900:]).double().mean())


@cache
def digits_teacher() -> nn.Module:
    """Learned on examples that no student sees."""
    x, y = digits()
    task, schedule = Task(train=(x[150:900], y[150:900])), Schedule(epochs=20, batch_size=50, lr=0.2)
    teacher = train(perceptron(64), nn.Identity(), task, losses="task", schedule=schedule).model
    assert accuracy(teacher) > 0.9
    return teacher


# --- what it does


def test_a_small_student_learns_more_from_a_teacher_than_from_few_labels() -> None:
    schedule = Schedule(epochs=30, batch_size=25, lr=0.1)
    x, y = digits()
    unlabelled = Task(train=x[:900], search=(x[900:], y[900:]))
    labels = train(perceptron(16, 1), nn.Identity(), digits_task(60), losses="task", schedule=schedule)
    teacher = train(perceptron(16, 1), digits_teacher(), unlabelled, losses="kd", schedule=schedule)
    assert accuracy(teacher.model) > accuracy(labels.model) + 0.03
    assert len(labels.trained.metrics) == len(teacher.trained.metrics) == 30
    assert teacher.trained.metrics[-1] == pytest.approx(accuracy(teacher.model))


def test_what_the_caller_gave_stays_as_it_is(noticed: Callable[[nn.Module], str]) -> None:
    x = normal(24, 3, 8, 8)
    # In training mode and without labels, so that the metric asks the teacher too: its BatchNorm must not notice.
    task = Task(train=x, search=normal(10, 3, 8, 8, seed=1))
    student, teacher = cnn(4).train(), cnn(8, seed=1).train()
    before = noticed(student), noticed(teacher)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    done = train(student, teacher, task, losses=["kd", "hint", "crd"], schedule=SHORT)
    assert torch.equal(torch.rand(2), expected)
    assert (noticed(student), noticed(teacher)) == before
    assert task.metric.name == "agreement"
    assert len(done.trained.metrics) == 2
    assert all(0 <= value <= 1 for value in done.trained.metrics)
    assert not any(part.training for part in done.model.modules())
    assert all(parameter.grad is None for parameter in done.model.parameters())
    assert not set(map(id, done.model.parameters())) & set(map(id, student.parameters()))
    assert state_hash(done.model) != state_hash(student)


def test_the_same_seed_gives_the_same_bits() -> None:
    def trained(seed: int) -> str:
        return state_hash(train(cnn(4), cnn(8), images(), losses=["hint", "crd"], schedule=SHORT, seed=seed).model)

    assert trained(0) == trained(0) != trained(1)


def test_frozen_parameters_stay_and_frozen_students_are_refused() -> None:
    student = cnn(4)
    student[0].requires_grad_(False)
    done = train(student, cnn(8), images(), schedule=SHORT).model
    assert torch.equal(done[0].weight, student[0].weight)
    assert not torch.equal(done[4].weight, student[4].weight)
    with pytest.raises(ModelError, match=r"no parameter of the model trains; call model\.requires_grad_"):
        train(cnn(4).requires_grad_(False), cnn(8), images(), schedule=SHORT)


def test_it_tells_what_was_compared_and_how_it_went() -> None:
    told: list[tuple[int, int, set[str]]] = []
    done = train(
        cnn(4), cnn(8), images(), losses=["kd", "similarity_preserving"], schedule=SHORT,
        progress=lambda steps, total, facts: told.append((steps, total, set(facts))),
    )  # fmt: skip
    assert [step[:2] for step in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(facts >= {"loss", "examples/s"} for _, _, facts in told)
    assert str(done).splitlines() == [
        f"loss by epoch: {', '.join(f'{value:.4f}' for value in done.trained.losses)}",
        "similarity_preserving: 6 [B, 8, 4, 4] <- 6 [B, 16, 4, 4]",
    ]


def test_the_search_split_may_end_it() -> None:
    schedule = Schedule(epochs=30, batch_size=12, lr=1e-9, patience=1)
    done = train(perceptron(8), digits_teacher(), digits_task(24), schedule=schedule)
    assert done.trained.losses[2:] == []
    assert done.trained.best_epoch == 0


# --- teachers


def test_several_teachers_teach_the_mean_of_their_probabilities() -> None:
    task, teachers = images(), [cnn(8, seed=1), cnn(6, seed=2)]
    several = train(cnn(4), teachers, task, losses="kd", schedule=SHORT)
    assert state_hash(several.model) == state_hash(
        train(cnn(4), Ensemble(teachers), task, losses="kd", schedule=SHORT).model
    )
    one = train(cnn(4), teachers[0], task, losses="kd", schedule=SHORT)
    assert state_hash(one.model) != state_hash(several.model)
    logits = train(cnn(4), Ensemble(teachers, how="logits"), task, losses="kd", schedule=SHORT)
    assert state_hash(logits.model) != state_hash(several.model)


class Dict(nn.Module):
    """Names its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x), "other": x}


def test_an_ensemble_takes_the_declared_output_of_its_members(tmp_path: Path) -> None:
    x, search = normal(24, 3, 8, 8), normal(10, 3, 8, 8, seed=1)
    task = Task(train=x, search=search, output="logits")
    teachers = [Dict(cnn(8, seed=1)), Dict(cnn(6, seed=2))]
    fields: dict[str, Any] = {"losses": ["kd", {"hint": {"pairs": [["inner.2", "teachers.0.inner.2"]]}}]}
    done = train(Dict(cnn(4)), teachers, task, schedule=SHORT, **fields)
    with torch.no_grad():
        agreed = done.model(search)["logits"].argmax(1) == Ensemble(teachers, output="logits")(search).argmax(1)
    assert done.trained.metrics[-1] == pytest.approx(float(agreed.double().mean()))
    again = train(Dict(cnn(4)), teachers, task, schedule=SHORT, **fields, out=tmp_path, cache=True)
    assert again.trained.losses == pytest.approx(done.trained.losses, rel=1e-4)


def test_generations_teach_each_other() -> None:
    schedule = Schedule(epochs=10, batch_size=25, lr=0.1)
    teacher, found = nn.Identity(), []
    for generation in range(3):  # born again: the same architecture, from scratch, with its predecessor as teacher
        terms = "task" if generation == 0 else ["kd", "task"]
        teacher = train(
            perceptron(24, seed=generation), teacher, digits_task(300), losses=terms, schedule=schedule, seed=generation
        ).model
        found.append(accuracy(teacher))
    assert all(value > 0.8 for value in found)
    assert len(set(found)) > 1


@pytest.mark.parametrize("teacher", [None, "teacher", []])
def test_no_teacher_is_refused(teacher: Any) -> None:
    with pytest.raises(ConfigError, match="teacher"):
        train(cnn(4), teacher, images())


# --- resumed


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute passes between any two looks at the clock: every step is kept."""
    minutes = iter(range(10**6))
    monkeypatch.setattr("tersor.train.checkpoint.time", SimpleNamespace(monotonic=lambda: 61.0 * next(minutes)))


def stopping(after: int, steps: list[int]) -> Callable[..., None]:
    def progress(done: int, total: int, facts: Any) -> None:
        steps.append(done)
        if done == after:
            raise Stopped

    return progress


@pytest.mark.usefixtures("always_due")
@pytest.mark.parametrize("cached", [True, False])
def test_a_training_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path, cached: bool) -> None:
    task = images(30, search=(normal(10, 3, 8, 8, seed=1), integers(4, 10)))
    schedule = Schedule(epochs=3, batch_size=10, lr=0.05, ema=0.9)

    def trained(out: Path, progress: Any = None) -> Distilled:
        return train(
            cnn(4), cnn(8, seed=1), task, losses=["kd", "hint", "crd", "task"], schedule=schedule, out=out,
            cache=cached, progress=progress,
        )  # fmt: skip

    whole = trained(tmp_path / "whole")
    steps: list[int] = []
    for after in (2, 3, 7):
        with pytest.raises(Stopped):
            trained(tmp_path / "stopped", stopping(after, steps))
    done = trained(tmp_path / "stopped", stopping(-1, steps))
    # A step is told before it is kept, so the one that was told last is done again; each third is told twice.
    assert steps == [1, 2, 2, 3, 3, 3, 4, 5, 6, 6, 7, 7, 8, 9, 9]
    assert state_hash(done.model) == state_hash(whole.model)
    assert (done.trained.losses, done.trained.metrics) == (whole.trained.losses, whole.trained.metrics)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == ({TRAINING, ANSWERS} if cached else {TRAINING})
    steps.clear()
    assert state_hash(trained(tmp_path / "stopped", stopping(-1, steps)).model) == state_hash(whole.model)
    assert steps == []


OTHERS: dict[str, dict[str, Any]] = {
    "losses": {"losses": ["kd", "task"]},
    "setting": {"losses": {"kd": {"temperature": 2}}},
    "weight": {"losses": {"kd": {"weight": 0.5}}},
    "teacher": {"teacher": cnn(8, seed=2)},
    "more teachers": {"teacher": [cnn(8, seed=1), cnn(8, seed=2)]},
    "student": {"student": cnn(4, seed=1)},
    "examples": {"task": Task(train=(normal(24, 3, 8, 8, seed=9), integers(4, 24)))},
    "labels": {"task": Task(train=(normal(24, 3, 8, 8), integers(4, 24, seed=9)))},
    "number": {"task": images(23)},
    "schedule": {"schedule": Schedule(epochs=3, batch_size=12, lr=0.02)},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {"student": cnn(4), "teacher": cnn(8, seed=1), "task": images(), "losses": "kd",
                             "schedule": SHORT}  # fmt: skip
    train(**given, out=tmp_path)
    content = (tmp_path / TRAINING / FILE).read_bytes()
    with pytest.raises(OutputDirectoryError, match="belongs to another training"):
        train(**(given | OTHERS[name]), out=tmp_path)
    assert (tmp_path / TRAINING / FILE).read_bytes() == content


def test_a_cache_needs_a_place() -> None:
    with pytest.raises(ConfigError, match="say where: out"):
        train(cnn(4), cnn(8), images(), cache=True)


# --- other tasks


def test_a_regression_is_distilled_by_squared_error() -> None:
    x = normal(200, 6)
    teacher = seeded(lambda: nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2)))
    student = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)), 1)
    with torch.no_grad():
        targets = teacher(x)
    close = Metric("close", lambda outputs, labels: -(outputs - labels).square().mean(1))
    task = Task(train=(x[:150], targets[:150] + 0.3 * normal(150, 2, seed=2)), search=(x[150:], targets[150:]),
                loss=functional.mse_loss, metric=close)  # fmt: skip
    schedule = Schedule(epochs=60, batch_size=30, lr=0.1, weight_decay=0.0)
    done = train(
        student, teacher, task, losses=[{"mse": {"weight": 0.9}}, {"task": {"weight": 0.1}}], schedule=schedule
    )
    with torch.no_grad():
        before, after = ((module(x[150:]) - targets[150:]).square().mean() for module in (student, done.model))
    assert after < 0.1 * before
    assert done.trained.metrics[-1] == pytest.approx(-float(after), rel=1e-4)


def test_a_metric_of_which_less_is_better_is_told_negated() -> None:
    whole = torch.ones(8, 6, dtype=torch.long)
    tokens, labels = integers(11, 8, 6, seed=5), integers(11, 8, 6, seed=6)
    search = {"input_ids": tokens, "attention_mask": whole, "labels": labels}
    done = train(language(8, 2), language(12, 4), texts(metric="perplexity", search=search), schedule=SHORT)
    with torch.no_grad():
        logits = done.model(tokens, whole)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp()
    assert done.trained.metrics[-1] == pytest.approx(-float(expected), rel=1e-4)


def test_a_language_model_learns_token_by_token_and_layer_by_layer() -> None:
    student, teacher, task = language(8, 2), language(12, 4, seed=1), texts(48)
    terms = ["kd", {"hint": {"weight": 0.1}}, {"minilm_relations": {"heads": 2}}]
    done = train(student, teacher, task, losses=terms, schedule=Schedule(epochs=30, batch_size=12, lr=0.2))
    batch = task.splits["train"].batch(range(48))
    mask = batch.kwargs["attention_mask"]
    with torch.no_grad():
        expected = batch.call(teacher)
        before, after = (float(losses.kd(batch.call(module), expected, mask=mask)) for module in (student, done.model))
    assert after < 0.3 * before
    assert [note.split(":")[0] for note in done.notes] == ["hint"] * 2 + ["minilm_relations"] * 3


def test_a_student_learns_the_sequences_that_its_teacher_wrote() -> None:
    class Characters(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(8, width), nn.LSTM(width, width, batch_first=True)
            self.head = nn.Linear(width, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return 4 * self.head(self.lstm(self.embedding(tokens))[0])

    teacher, student = seeded(lambda: Characters(24)), seeded(lambda: Characters(16), 1)
    written = generate(teacher, integers(8, 64, 2), length=8, beams=2)
    task = Task(train=written.dataset())
    done = train(student, teacher, task, losses="task", schedule=Schedule(epochs=40, batch_size=16, lr=0.5)).model
    tokens, labels = written.dataset().tensors
    counts = labels != -100

    def right(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(tokens).argmax(-1) == labels)[counts].double().mean())

    assert right(done) > right(student) + 0.3


# --- mutual learning


@pytest.mark.slow
def test_students_learn_more_together_than_alone() -> None:
    schedule = Schedule(epochs=40, batch_size=25, lr=0.1)
    alone, together = [], []
    for seed in range(6):
        students = [perceptron(12, seed=2 * seed), perceptron(16, seed=2 * seed + 1)]
        task = digits_task(100)
        alone += [
            accuracy(train(student, nn.Identity(), task, losses="task", schedule=schedule, seed=seed).model)
            for student in students
        ]
        together += [accuracy(done.model) for done in mutual(students, task, schedule=schedule, seed=seed, weight=2.0)]
    assert sum(together) / len(together) > sum(alone) / len(alone)


def test_students_learn_together_and_the_caller_s_stay(tmp_path: Path, noticed: Callable[[nn.Module], str]) -> None:
    students, task = [perceptron(8), perceptron(12, seed=1), perceptron(16, seed=2)], digits_task(100)
    before = [noticed(student) for student in students]
    schedule = Schedule(epochs=40, batch_size=25, lr=0.1)
    done = mutual(students, task, schedule=schedule, out=tmp_path)
    assert [noticed(student) for student in students] == before
    assert [type(item) for item in done] == [Distilled] * 3
    assert [item.model[0].out_features for item in done] == [8, 12, 16]
    assert all(accuracy(item.model) > 0.6 for item in done)
    mean = sum(accuracy(item.model) for item in done) / 3
    assert done[0].trained.metrics[-1] == pytest.approx(mean)
    again = mutual(students, task, schedule=schedule, out=tmp_path)
    assert [state_hash(item.model) for item in again] == [state_hash(item.model) for item in done]
    with pytest.raises(OutputDirectoryError, match="another training"):
        mutual(students, task, schedule=schedule, out=tmp_path, weight=0.5)


def test_the_mutual_loss_is_the_sum_by_hand() -> None:
    students, task = [perceptron(8), perceptron(12, seed=1), perceptron(16, seed=2)], digits_task(24)
    batch = task.splits["train"].batch(range(24))
    answers = [student(*batch.args) for student in students]
    expected = sum(functional.cross_entropy(answer, batch.labels) for answer in answers)
    for answer in answers:
        for other in answers:
            if other is not answer:
                soft = functional.kl_div(answer.log_softmax(1), other.log_softmax(1), log_target=True, reduction="none")
                expected = expected + 0.7 * soft.sum(1).mean() / 2
    done = mutual(students, task, weight=0.7, schedule=Schedule(batch_size=24))
    assert done[0].trained.losses[0] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_padded_tokens_are_not_learned_from_each_other() -> None:
    students = [language(8, 1), language(12, 2, seed=1)]
    found = [mutual(students, texts(padding=padding), schedule=SHORT)[0].trained.losses for padding in (0, 7)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


SAME = cnn(4)
REFUSED: dict[str, tuple[list[nn.Module], Task, dict[str, Any], type[TersorError], str]] = {
    "nobody": ([], images(), {}, ConfigError, "at least two different students, got 0"),
    "one": ([SAME], images(), {}, ConfigError, "at least two different students, got 1"),
    "the same one": ([SAME, SAME], images(), {}, ConfigError, "got 2, 1 of them different"),
    "one twice": ([SAME, SAME, cnn(6)], images(), {}, ConfigError, "got 3, 2 of them different"),
    "no labels": ([cnn(4), cnn(6)], images(labels=False), {}, DataError, "needs labels"),
    "no weight": ([cnn(4), cnn(6)], images(), {"weight": 0.0}, ConfigError, "above 0, got 0"),
    "no number": ([cnn(4), cnn(6)], images(), {"weight": float("nan")}, ConfigError, "above 0, got nan"),
    "other classes": ([cnn(4), cnn(6, classes=5)], images(), {}, ModelError, r"in one shape, got \[\(\d+, 4\)"),
    "compiled": ([cnn(4), cnn(6)], images(), {"schedule": Schedule(compile=True)}, ConfigError, "compile"),
    "patience": ([cnn(4), cnn(6)], images(), {"schedule": Schedule(patience=1)}, ConfigError, "'search' split"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_together_is_refused(name: str) -> None:
    students, task, fields, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        mutual(students, task, **fields)
