"""The teacher: asked each time or once, never changed, never mistaken for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill_zoo import cnn, images, language, texts
from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.core.task import Task
from tersor.distill import Ensemble, train
from tersor.distill.objective import Objective
from tersor.distill.teacher import CachedTeacher, LiveTeacher
from tersor.distill.terms import Losses
from tersor.errors import ConfigError, IntegrityError, NonFiniteError, OutputDirectoryError
from tersor.train import Schedule
from zoo import integers, normal, seeded, state_hash

CPU = torch.device("cpu")
SHORT = Schedule(epochs=2, batch_size=10, lr=0.05)


class Rows(nn.Module):
    """A layer whose rows are computed alike in batches of any size, bit by bit; `[B, 12]` to `[B, 4]`."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.weight, self.hidden = nn.Parameter(torch.randn(4, 12)), nn.Identity()
        self.activation, self.asked = activation, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        products = self.activation(x[:, None] * self.weight)
        total = products[..., 0]
        for place in range(1, products.shape[-1]):
            total = total + products[..., place]
        return self.hidden(total)


def mlp(seed: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), seed)


def rows(activation: Callable[[Tensor], Tensor] = torch.relu, seed: int = 0) -> Rows:
    return seeded(lambda: Rows(activation), seed)  # type: ignore[return-value]


def numbers(count: int = 50) -> Task:
    return Task(train=(normal(count, 12), integers(4, count)))


def kept(teacher: nn.Module, split: Split, directory: Path, *addresses: str) -> CachedTeacher:
    live = LiveTeacher(teacher, None, CPU)
    live.watch(addresses)
    return CachedTeacher(live, split, directory, device=CPU, batch_size=16)


def train_split(data: Any, **fields: Any) -> Split:
    return Split("train", data, **fields)


# --- live


def test_a_teacher_in_training_is_copied_and_stays_as_it_is(noticed: Callable[[nn.Module], str]) -> None:
    teacher = cnn(4).train().requires_grad_(True)
    before = noticed(teacher)
    live = LiveTeacher(teacher, None, CPU)
    live.watch(["2"])
    x = normal(6, 3, 8, 8)
    answers = live(Batch((x,), {}, None))
    assert live.module is not teacher
    assert noticed(teacher) == before
    assert not answers.outputs.requires_grad
    assert not answers.features["2"].requires_grad
    assert not any(part.training for part in live.module.modules())
    with torch.no_grad():
        assert torch.equal(answers.outputs, teacher.eval()(x))
        assert torch.equal(answers.features["2"], teacher[:3](x))


def test_a_frozen_teacher_is_not_copied(noticed: Callable[[nn.Module], str]) -> None:
    teacher = cnn(4).eval().requires_grad_(False)
    before = noticed(teacher)
    live = LiveTeacher(teacher, None, CPU)
    live.watch(["2", "6"])
    live(Batch((normal(6, 3, 8, 8),), {}, None))
    assert live.module is teacher
    assert noticed(teacher) == before


def test_a_teacher_elsewhere_is_copied_there() -> None:
    teacher = cnn(4).eval().requires_grad_(False)
    live = LiveTeacher(teacher, None, torch.device("meta"))
    live.watch(["2"])
    answers = live(Batch((torch.empty(6, 3, 8, 8, device="meta"),), {}, None))
    assert (answers.outputs.device.type, answers.features["2"].device.type) == ("meta", "meta")
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}


def test_the_declared_output_is_the_answer() -> None:
    lstm = nn.LSTM(3, 4, batch_first=True).eval()
    x = normal(2, 5, 3)
    with torch.no_grad():
        expected = lstm(x)[0]
    assert torch.equal(LiveTeacher(lstm, 0, CPU)(Batch((x,), {}, None)).outputs, expected)


# --- kept


def test_a_kept_answer_is_the_answer(tmp_path: Path) -> None:
    teacher, task = rows().eval(), numbers()
    split = task.splits["train"]
    live = LiveTeacher(teacher, None, CPU)
    live.watch(["hidden:input"])
    cached = kept(teacher, split, tmp_path, "hidden:input")
    for positions in ([0], [3, 49, 3], range(50), [17, 16]):
        batch = split.batch(positions)
        expected, found = live(batch), cached(batch)
        assert torch.equal(found.outputs, expected.outputs)
        assert found.features.keys() == {"hidden:input"}
        assert torch.equal(found.features["hidden:input"], expected.features["hidden:input"])


@pytest.mark.parametrize(
    "losses", [["kd", "task"], ["mse", {"hint": {"pairs": [["2", "hidden"]]}}, {"crd": {"pairs": [["1", ""]]}}]]
)
def test_training_is_the_same_bit_by_bit_if_the_teacher_s_rows_are(losses: Any, tmp_path: Path) -> None:
    task, teacher = numbers(), rows()
    plain = train(mlp(), teacher, task, losses=losses, schedule=SHORT)
    for attempt in ("first", "second"):
        done = train(mlp(), teacher, task, losses=losses, schedule=SHORT, out=tmp_path / attempt, cache=True)
        assert done.trained.losses == plain.trained.losses
        assert state_hash(done.model) == state_hash(plain.model)


def test_training_on_kept_answers_is_the_same_up_to_rounding(tmp_path: Path) -> None:
    def trained(**fields: Any) -> dict[str, Tensor]:
        return train(
            cnn(4), cnn(8, seed=1), images(40), losses=["kd", "hint", "task"], schedule=SHORT, **fields
        ).model.state_dict()

    plain = trained()
    for name, value in trained(out=tmp_path, cache=True).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


def test_each_example_is_asked_once(tmp_path: Path) -> None:
    teacher, task = rows().eval().requires_grad_(False), numbers()
    train(mlp(), teacher, task, losses="kd", schedule=SHORT, out=tmp_path / "cached", cache=True)
    once = teacher.asked
    teacher.asked = 0
    train(mlp(), teacher, task, losses="kd", schedule=SHORT, out=tmp_path / "live")
    assert once < 50 + 32
    assert teacher.asked > 2 * 50


def test_a_second_training_asks_nobody_again(tmp_path: Path) -> None:
    teacher, split = rows().eval().requires_grad_(False), numbers().splits["train"]
    first = kept(teacher, split, tmp_path)
    written = first.path.stat().st_mtime_ns
    teacher.asked = 0
    again = kept(teacher, split, tmp_path)
    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == written
    assert teacher.asked < 50
    assert torch.equal(again.tensors["outputs"], first.tensors["outputs"])
    assert list(tmp_path.iterdir()) == [first.path]


X, Y = normal(50, 12), integers(4, 50)


@pytest.mark.parametrize(
    ("teacher", "data", "addresses"),
    [
        (rows(seed=1), (X, Y), []),
        (rows(torch.tanh), (X, Y), []),
        (nn.Sequential(rows()), (X, Y), []),
        (rows(), (X + 1e-6, Y), []),
        (rows(), (X.flip(0), Y), []),
        (rows(), (X[:49], Y[:49]), []),
        (rows(), (X, Y), ["hidden"]),
    ],
    ids=["weights", "code", "class", "examples", "order", "number", "addresses"],
)
def test_other_questions_have_another_file(tmp_path: Path, teacher: nn.Module, data: Any, addresses: list[str]) -> None:
    first = kept(rows().eval(), train_split((X, Y)), tmp_path)
    other = kept(teacher.eval(), train_split(data), tmp_path, *addresses)
    assert other.path != first.path
    assert len(list(tmp_path.iterdir())) == 2


def test_ensembles_with_other_weights_have_another_file(tmp_path: Path) -> None:
    members = [rows().eval(), rows(seed=1).eval()]
    paths = {
        kept(Ensemble(members, weights, how=how).eval(), train_split((X, Y)), tmp_path).path
        for weights in ([1, 1], [2, 1])
        for how in ("probabilities", "logits")
    }
    assert len(paths) == 4


def test_other_labels_do_not_matter(tmp_path: Path) -> None:
    first = kept(rows().eval(), train_split((X, Y)), tmp_path)
    assert kept(rows().eval(), train_split((X, Y.flip(0))), tmp_path).path == first.path


# --- what cannot be kept


class Noisy(Dataset[tuple[Tensor, int]]):
    """Every tenth draw is another picture."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.full((12,), float(index))
        return (-x - 1 if self.draw() < 0.1 else x), 0


OWN = np.random.default_rng(0)
REFUSED: dict[str, tuple[Callable[[], Task], str]] = {
    "drawn by PyTorch": (lambda: Task(train=Noisy(lambda: float(torch.rand(())))), "drawn at random: read twice"),
    "drawn by NumPy": (lambda: Task(train=Noisy(np.random.random)), "drawn at random: read twice"),
    "drawn by itself": (lambda: Task(train=Noisy(OWN.random)), "drawn at random: read twice"),
}


def refused(task: Task, losses: Any, teacher: nn.Module, student: nn.Module, directory: Path, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Objective(Losses(losses=losses).losses, student, teacher, task, schedule=SHORT, cache=directory / "answers")
    assert not (directory / "answers").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_examples_that_are_drawn_at_random_are_refused(name: str, tmp_path: Path) -> None:
    build, said = REFUSED[name]
    task = build()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    refused(task, "kd", rows(), mlp(), tmp_path, said)
    assert torch.equal(torch.rand(2), expected)  # what the caller draws goes on as if nothing had happened


def padded(items: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(items, batch_first=True)


def test_examples_that_are_padded_to_their_neighbours_are_refused(tmp_path: Path) -> None:
    lengths = [3, 5, 4, 6]
    task = Task(train=[normal(length, 3) for length in lengths * 3], collate=padded)
    recurrent = nn.Linear(3, 4)
    refused(task, "kd", recurrent, nn.Linear(3, 4), tmp_path, r"'0' is \(3, 3\) alone and \(6, 3\) among others")


def test_features_of_another_shape_in_another_batch_are_refused(tmp_path: Path) -> None:
    class Growing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 1 + int(x.max() > 40))

    task = Task(train=torch.arange(600.0)[:, None] % 300)
    live = LiveTeacher(Growing(), None, CPU)
    with pytest.raises(ConfigError, match=r"'outputs' of the teacher has another shape in other batches \(\(1,\), "):
        CachedTeacher(live, task.splits["train"], tmp_path, device=CPU, batch_size=30)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_row_for_each_example_is_refused(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Flatten(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).reshape(x.shape)

    with pytest.raises(ConfigError, match=r"'first' of the teacher has shape \(192,\) for 16 examples"):
        kept(Flat(), train_split(X), tmp_path, "first")


def test_mixup_and_a_cache_do_not_go_together(tmp_path: Path) -> None:
    schedule = Schedule(mixup=0.2)
    with pytest.raises(ConfigError, match="leave mixup out, or the cache"):
        train(mlp(), rows(), numbers(), schedule=schedule, out=tmp_path, cache=True)
    cached = kept(rows().eval(), train_split((X, Y)), tmp_path)
    with pytest.raises(ConfigError, match="training split"):
        cached(Batch((X,), {}, None))


def test_examples_that_are_no_numbers_are_told_as_that(tmp_path: Path) -> None:
    broken = X.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 600 values are NaN"):
        train(mlp(), rows(), Task(train=(broken, Y)), out=tmp_path, cache=True)


def test_texts_of_one_length_may_be_kept(tmp_path: Path) -> None:
    task, losses = texts(), ["kd", "hint", {"minilm_relations": {"heads": 2}}]
    fields: dict[str, Any] = {"losses": losses, "schedule": SHORT}
    plain = train(language(8, 2), language(12, 4), task, **fields)
    done = train(language(8, 2), language(12, 4), task, **fields, out=tmp_path, cache=True)
    assert done.trained.losses == pytest.approx(plain.trained.losses, rel=1e-4)
    (file,) = (tmp_path / "answers").iterdir()
    assert load_file(file)["feature:blocks.3"].shape == (24, 6, 12)


# --- disk


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not mine"])
def test_a_damaged_file_is_noticed(tmp_path: Path, damage: str) -> None:
    cached = kept(rows().eval(), train_split((X, Y)), tmp_path)
    content = bytearray(cached.path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    cached.path.write_bytes({"truncated": content[:-5], "flipped": content, "empty": b""}.get(damage, b"x" * 100))
    with pytest.raises(IntegrityError, match=r"is damaged .*; remove it to ask the teacher again"):
        kept(rows().eval(), train_split((X, Y)), tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from distill.test_teacher import X, Y, kept, rows, train_split
import tersor.core.files
tersor.core.files.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
kept(rows().eval(), train_split((X, Y)), Path(sys.argv[2]))
"""


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_counts(tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, tests, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=False)  # noqa: S603 - our script
    assert done.returncode == -signal.SIGKILL
    (scratch,) = tmp_path.iterdir()
    assert scratch.name.startswith(".teacher-")
    cached = kept(rows().eval(), train_split((X, Y)), tmp_path)
    assert list(tmp_path.iterdir()) == [cached.path]


def test_a_full_disk_is_told(small_disk: Callable[..., Path]) -> None:
    place = small_disk(8)
    big = train_split(normal(3000, 12))
    with pytest.raises(OutputDirectoryError, match="cannot write"):
        kept(rows().eval(), big, place)
    assert list(place.iterdir()) == []
