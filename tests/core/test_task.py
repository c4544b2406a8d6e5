from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset, TensorDataset

from tersor.core.metrics import Metric
from tersor.core.split import Split
from tersor.core.task import DEFAULT_CALIBRATION, DEFAULT_FRACTIONS, Task
from tersor.errors import ConfigError, DataError, OverlapError
from zoo import integers, normal

ROLES = ("train", "search", "certify", "report")


def problem(n: int = 600) -> tuple[Tensor, Tensor]:
    """Three classes: 60 %, 30 %, 10 %, in random order."""
    labels = torch.tensor([0] * (6 * n // 10) + [1] * (3 * n // 10) + [2] * (n // 10))
    return normal(n, 3), labels[torch.randperm(n, generator=torch.Generator().manual_seed(1))]


class Rows(Dataset[Any]):
    """A map-style dataset of whatever examples."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


# --- Task.from_dataset


def test_from_dataset_makes_the_documented_shares_of_every_class() -> None:
    task = Task.from_dataset(problem())
    for role in ROLES:
        labels = task.splits[role].labels
        assert labels is not None
        found = Counter(labels.tolist())
        for label, size in {0: 360, 1: 180, 2: 60}.items():
            assert abs(found[label] - DEFAULT_FRACTIONS[role] * size) <= 1, (role, label)


def test_from_dataset_hands_out_every_example_once() -> None:
    task = Task.from_dataset(problem())
    together = np.concatenate([task.splits[role].indices for role in ROLES])
    assert sorted(together.tolist()) == list(range(600))


def test_from_dataset_leaves_the_rest_out_when_the_shares_sum_to_less_than_one() -> None:
    task = Task.from_dataset(problem(), fractions={"certify": 0.25, "report": 0.25})
    assert set(task.splits) == {"certify", "report"}
    assert abs(len(task.splits["certify"]) - 150) <= 3
    assert abs(len(task.splits["report"]) - 150) <= 3


def test_from_dataset_splits_by_its_seed_alone() -> None:
    first, same, other = (Task.from_dataset(problem(), seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint() == same.fingerprint()
    assert all(np.array_equal(first.splits[role].indices, same.splits[role].indices) for role in ROLES)
    assert set(first.splits["report"].indices.tolist()) != set(other.splits["report"].indices.tolist())


def test_from_dataset_keeps_identical_examples_together() -> None:
    x, y = problem(200)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    task = Task.from_dataset((x.repeat(3, 1)[order], y.repeat(3)[order]))
    where = [set(task.splits[role].keys) for role in ROLES]
    assert sum(map(len, where)) == 200  # no picture is known to two splits
    assert all(set(Counter(task.splits[role].keys).values()) == {3} for role in ROLES)  # all copies are there


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_from_dataset_is_fair_to_every_class(sizes: list[int], shares: list[int], seed: int) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    fractions = {
        role: share / sum(shares)
        for role, share in zip(("train", "calibrate", "search", "certify", "report"), shares, strict=False)
    }
    try:
        task = Task.from_dataset((torch.arange(len(labels)).float(), labels), fractions=fractions, seed=seed)
    except DataError:
        assert min(fractions.values()) * min(sizes) < 1, "a split can only be empty if its share is below one example"
        return
    seen = np.concatenate([task.splits[role].indices for role in fractions])
    assert sorted(seen.tolist()) == list(range(len(labels)))
    for role, share in fractions.items():
        found = torch.bincount(task.splits[role].labels, minlength=len(sizes))  # type: ignore[arg-type]
        for label, size in enumerate(sizes):
            assert abs(int(found[label]) - share * size) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("fractions", "named"),
    [
        ({"train": 0.0}, "0.0"),
        ({"train": -0.1}, "-0.1"),
        ({"train": 1.5}, "1.5"),
        ({"train": float("nan")}, "nan"),
        ({"train": 0.7, "report": 0.4}, "0.7"),
        ({"trian": 0.5}, "trian"),
    ],
)
def test_from_dataset_refuses_impossible_fractions(fractions: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Task.from_dataset(problem(), fractions=fractions)


def test_from_dataset_says_which_split_would_be_empty() -> None:
    with pytest.raises(DataError, match="search"):
        Task.from_dataset(normal(3, 2), fractions={"train": 0.5, "search": 1e-9})


def test_from_dataset_works_without_labels_and_with_labels_that_are_no_classes() -> None:
    assert len(Task.from_dataset(normal(100, 2)).splits["certify"]) == pytest.approx(30, abs=1)
    regression = Task.from_dataset((normal(100, 2), normal(100)), metric=lambda outputs, labels: 0.0)
    assert len(regression.splits["certify"]) == pytest.approx(30, abs=1)


def test_from_dataset_takes_labels_whose_length_varies_with_the_batch() -> None:
    def pad(items: list[Tensor]) -> tuple[Tensor, Tensor]:
        padded = pad_sequence(items, batch_first=True)
        return padded, padded

    task = Task.from_dataset([torch.arange(n) + 1 for n in range(1, 400)], collate=pad, metric="perplexity")
    assert sum(len(task.splits[role]) for role in ROLES) == 399


# --- calibrate


def test_calibrate_comes_from_train_and_is_limited_and_seeded() -> None:
    data = {"train": (normal(1000, 2), integers(2, 1000)), "report": (normal(10, 2, seed=1), integers(2, 10))}
    first, same, other = (Task(**data, seed=seed) for seed in (0, 0, 1))
    chosen = first.splits["calibrate"].indices
    assert len(set(chosen.tolist())) == DEFAULT_CALIBRATION == 300
    assert first.splits["calibrate"].dataset is first.splits["train"].dataset
    assert np.array_equal(chosen, same.splits["calibrate"].indices)
    assert not np.array_equal(chosen, other.splits["calibrate"].indices)


def test_calibrate_takes_all_of_a_small_train_split() -> None:
    assert len(Task(train=normal(20, 2)).splits["calibrate"]) == 20


def test_a_given_calibrate_split_is_kept_even_when_it_is_part_of_train() -> None:
    x = normal(50, 2)
    task = Task(train=x, calibrate=x[:7])
    assert len(task.splits["calibrate"]) == 7


# --- given splits

CONTAINERS = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "dict": lambda x, y: {"features": x, "labels": y},
    "TensorDataset": TensorDataset,
    "Dataset": lambda x, y: Rows([(row, int(label)) for row, label in zip(x, y, strict=True)]),
    "Subset": lambda x, y: Subset(TensorDataset(torch.cat([x + 9, x]), torch.cat([y, y])), range(len(x), 2 * len(x))),
    "list": lambda x, y: list(zip(x, y, strict=True)),
    "list of dicts": lambda x, y: [{"features": row, "label": label} for row, label in zip(x, y, strict=True)],
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_examples(container: str) -> None:
    x, y = normal(9, 4), integers(3, 9)
    split = Task(report=CONTAINERS[container](x, y)).splits["report"]
    batch = split.batch([4, 1])
    assert len(split) == 9
    assert torch.equal(next(iter(batch.tensors().values())), x[[4, 1]])
    assert batch.labels is not None
    assert batch.labels.tolist() == y[[4, 1]].tolist()
    assert [len(part) for part in split.batches(4)] == [4, 4, 1]
    assert torch.equal(torch.cat([next(iter(part.tensors().values())) for part in split.batches(4)]), x)


def test_a_single_tensor_has_no_labels() -> None:
    batch = Task(report=normal(5, 2)).splits["report"].batch([0, 1])
    assert batch.labels is None
    assert batch.args[0].shape == (2, 2)


def test_a_custom_collation_is_used_for_every_batch() -> None:
    rows = [(torch.ones(length), length % 2) for length in range(1, 7)]

    def pad(items: list[Any]) -> tuple[Tensor, Tensor]:
        return pad_sequence([row for row, _ in items], batch_first=True), torch.tensor([label for _, label in items])

    split = Task(report=rows, collate=pad).splits["report"]
    assert split.batch([0, 4]).args[0].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_examples_that_do_not_stack_ask_for_a_collation() -> None:
    with pytest.raises(DataError, match=r"Task\(collate="):
        Task(report=[(torch.ones(2), 0), (torch.ones(3), 1)]).splits["report"].batch([0, 1])


def test_shuffling_is_a_seeded_permutation() -> None:
    split = Split("train", torch.arange(50.0))
    first, same, other = (torch.cat([batch.args[0] for batch in split.shuffled(8, seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(50.0))
    assert torch.equal(first.sort().values, torch.arange(50.0))


@pytest.mark.parametrize(
    "data",
    [
        (normal(3, 2), integers(2, 4)),
        {"a": normal(3, 2), "b": normal(4, 2)},
        {},
        torch.tensor(1.0),
        np.array(["a", "b"]),
        iter([1, 2]),
        "a string",
        7,
    ],
    ids=["lengths", "dict lengths", "empty dict", "number", "strings", "iterator", "string", "int"],
)
def test_malformed_data_is_refused_naming_the_split(data: Any) -> None:
    with pytest.raises(DataError, match="'report'"):
        Task(report=data)


def test_examples_of_an_unknown_kind_are_refused_naming_the_split() -> None:
    with pytest.raises(DataError, match="'report'"):
        Task(report=[("a", "b")])
    with pytest.raises(DataError, match="'report'"):
        Task(report=[{"features": torch.ones(2), "label": "cat"}])


@pytest.mark.parametrize(
    "data", [normal(0, 2), [], {"a": normal(0, 2)}, Subset(TensorDataset(normal(5, 2)), [])], ids=type
)
def test_an_empty_split_is_refused_by_name(data: Any) -> None:
    with pytest.raises(DataError, match="'certify' is empty"):
        Task(certify=data, report=normal(3, 2))


def test_a_task_without_data_is_refused() -> None:
    with pytest.raises(DataError, match="at least one split"):
        Task()


# --- overlap

X, Y = normal(20, 3), integers(2, 20)
DATA = TensorDataset(X, Y)
REPEATED = TensorDataset(torch.cat([X[:10], X[:1], X[11:]]), Y)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (Subset(DATA, range(12)), Subset(DATA, range(10, 20)), 2),
        (Subset(Subset(DATA, range(5, 20)), [0, 1]), Subset(DATA, [5]), 1),
        ((X[:10], Y[:10]), (X[9:], Y[9:]), 1),
        ((X[:10], Y[:10]), {"0": X[8:], "label": Y[8:]}, 2),
        ((X[:10], Y[:10]), (X[9:], 1 - Y[9:]), 1),
        (Subset(REPEATED, range(10)), Subset(REPEATED, range(10, 20)), 1),
        (X, X.clone(), 20),
    ],
    ids=["index", "nested", "content", "containers", "other label", "copy in one dataset", "all"],
)
def test_overlap_is_refused_naming_both_splits_and_how_much(first: Any, second: Any, shared: int) -> None:
    with pytest.raises(OverlapError, match=rf"'search' and 'certify' share {shared} example"):
        Task(search=first, certify=second)
    with pytest.raises(OverlapError, match="'train' and 'report'"):
        Task(train=first, report=second)


def test_overlap_shows_when_every_look_at_an_example_is_different() -> None:
    class Noisy(Rows):
        def __getitem__(self, index: int) -> Any:
            return self.rows[index] + torch.rand(3), 0

    noisy = Noisy(list(X))
    with pytest.raises(OverlapError, match="share 2 example"):
        Task(train=Subset(noisy, range(12)), report=Subset(Subset(noisy, range(10, 20)), range(10)))
    assert len(Task(train=Subset(noisy, range(12)), report=Subset(noisy, range(12, 20))).splits["report"]) == 8


def test_overlap_of_calibrate_with_what_measures_is_refused() -> None:
    with pytest.raises(OverlapError, match="'calibrate' and 'certify'"):
        Task(calibrate=X[:5], certify=X[4:])


def test_overlap_shows_through_a_collation_that_pads() -> None:
    rows = [torch.arange(length) + 1 for length in range(1, 9)]

    def pad(items: list[Tensor]) -> Tensor:
        return pad_sequence(items, batch_first=True)

    with pytest.raises(OverlapError, match="share 2 example"):
        Task(train=rows[:4], report=rows[2:], collate=pad)
    assert Split("a", rows, collate=pad).fingerprint == Split("b", rows[::-1], collate=pad).fingerprint


def test_disjoint_parts_of_one_dataset_are_accepted() -> None:
    task = Task(train=Subset(DATA, range(10)), certify=Subset(DATA, range(10, 20)))
    assert (len(task.splits["train"]), len(task.splits["certify"])) == (10, 10)


# --- metric, loss, fingerprint, examples


def test_without_labels_the_metric_is_agreement() -> None:
    assert Task(report=X).metric.name == "agreement"
    assert Task(report=X, metric="f1").metric.name == "agreement"
    assert Task(report=X, metric="cosine").metric.name == "cosine"
    assert Task(report=(X, Y)).metric.name == "top1"
    assert Task(train=(X[:5], Y[:5]), report=X[5:]).metric.name == "agreement"  # what measures has none
    assert Task(train=X[:5], report=(X[5:], Y[5:])).metric.name == "top1"


def test_the_metric_is_a_name_a_metric_or_a_function() -> None:
    def balanced(outputs: Tensor, labels: Tensor) -> float:
        return 0.5

    metric = Metric("mine", lambda outputs, labels: outputs)
    assert Task(report=(X, Y), metric=balanced).metric.name == "balanced"
    assert Task(report=(X, Y), metric=metric).metric is metric
    with pytest.raises(ConfigError, match="'acc'"):
        Task(report=(X, Y), metric="acc")
    with pytest.raises(ConfigError, match="int"):
        Task(report=(X, Y), metric=3)  # type: ignore[arg-type]


def test_the_default_loss_is_cross_entropy_for_classes_and_for_tokens() -> None:
    task = Task(report=(X, Y))
    logits, labels = normal(4, 5), integers(5, 4)
    assert torch.equal(task.loss(logits, labels), functional.cross_entropy(logits, labels))
    tokens, targets = normal(2, 3, 5), integers(5, 2, 3)
    expected = torch.stack(
        [functional.cross_entropy(tokens[0], targets[0]), functional.cross_entropy(tokens[1], targets[1])]
    )
    assert float(task.loss(tokens, targets)) == pytest.approx(float(expected.mean()), rel=1e-6)


@pytest.mark.parametrize("bad", [5, -1, -99])
def test_the_default_loss_refuses_labels_out_of_range(bad: int) -> None:
    with pytest.raises(DataError, match=rf"0\.\.4, got {bad}"):
        Task(report=(X, Y)).loss(normal(3, 5), torch.tensor([0, bad, 1]))


def test_the_default_loss_leaves_out_what_has_no_label() -> None:
    task, outputs = Task(report=(X, Y)), normal(3, 5)
    kept = task.loss(outputs, torch.tensor([0, -100, 1]))
    torch.testing.assert_close(kept, task.loss(outputs[[0, 2]], torch.tensor([0, 1])))


def test_smoothed_labels_are_pytorch_s_and_only_of_the_default_loss() -> None:
    outputs, labels = normal(3, 5), torch.tensor([0, 4, 1])
    smoothed = Task(report=(X, Y)).smoothed_loss(outputs, labels, 0.2)
    torch.testing.assert_close(smoothed, functional.cross_entropy(outputs, labels, label_smoothing=0.2))
    own = Task(report=(X, Y), loss=functional.cross_entropy)
    own.check_smoothing(0.0)
    torch.testing.assert_close(own.smoothed_loss(outputs, labels, 0.0), functional.cross_entropy(outputs, labels))
    with pytest.raises(ConfigError, match="a loss of your own must do it itself"):
        own.check_smoothing(0.1)


def test_the_default_loss_refuses_labels_that_are_no_classes() -> None:
    with pytest.raises(ConfigError, match="loss="):
        Task(report=(X, Y)).loss(normal(3, 5), normal(3))


def test_the_fingerprint_tells_data_apart_and_not_their_order() -> None:
    def fingerprint(x: Tensor, **fields: Any) -> dict[str, str]:
        return Task(report=x, **fields).fingerprint()

    assert fingerprint(X) == fingerprint(X.flip(0))
    changed = X.clone()
    changed[3, 1] += 1e-6
    assert fingerprint(X)["report"] != fingerprint(changed)["report"]
    assert fingerprint(X)["report"] != fingerprint(X[1:])["report"]
    assert fingerprint(X)["report"] != fingerprint(X.double())["report"]
    assert fingerprint(X) != fingerprint(X, output="logits")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 1)])
def test_every_dtype_and_shape_has_a_fingerprint(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    split = Split("report", values)
    assert len(split.keys) == 6
    assert len(set(split.keys)) == (2 if dtype is torch.bool and shape == (6,) else len({str(row) for row in values}))


def test_examples_repeat_where_a_split_is_smaller_than_asked() -> None:
    batch = Task(calibrate=X[:3], report=X[3:]).example(7)
    assert torch.equal(batch.args[0], X[[0, 1, 2, 0, 1, 2, 0]])


def test_a_missing_split_is_refused_saying_what_needs_it() -> None:
    task = Task(report=X)
    assert task.get("train") is None
    with pytest.raises(DataError, match="recover needs a 'train' split"):
        task.require("train", "recover")
