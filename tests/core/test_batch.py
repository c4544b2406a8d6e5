from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from tersor.core.batch import Batch, as_batch, select_output
from tersor.errors import DataError, NonFiniteError, OutputError
from zoo import normal

X, Z, Y = normal(4, 3), normal(4, 2, seed=1), torch.arange(4)


@pytest.mark.parametrize(
    ("item", "args", "kwargs", "labelled"),
    [
        (X, 1, [], False),
        ((X,), 1, [], False),
        ([X], 1, [], False),
        ((X, Y), 1, [], True),
        ([X, Z, Y], 2, [], True),
        ({"a": X, "b": Z}, 0, ["a", "b"], False),
        ({"a": X, "labels": Y}, 0, ["a"], True),
        ({"label": Y, "b": Z, "a": X}, 0, ["b", "a"], True),
        (OrderedDict(a=X), 0, ["a"], False),
    ],
)
def test_a_batch_is_read_from_every_container(item: Any, args: int, kwargs: list[str], labelled: bool) -> None:
    batch = as_batch(item)
    assert len(batch) == 4
    assert len(batch.args) == args
    assert list(batch.kwargs) == kwargs
    assert (batch.labels is Y) == labelled
    assert list(batch.tensors()) == [str(index) for index in range(args)] + kwargs


@pytest.mark.parametrize("item", [3, "text", (), [], {}, {"label": Y}, ("a", "b"), {"a": "b"}, {"a": X, "label": [1]}])
def test_anything_else_is_refused_saying_where(item: Any) -> None:
    with pytest.raises(DataError, match="split 'train'"):
        as_batch(item, "split 'train'")


def test_a_batch_calls_by_position_and_by_name() -> None:
    def function(first: Any, second: Any = None) -> tuple[Any, Any]:
        return first, second

    assert Batch((X, Z), {}, None).call(function) == (X, Z)
    assert Batch((X,), {"second": Z}, None).call(function) == (X, Z)
    assert Batch((), {"second": Z, "first": X}, None).call(function) == (X, Z)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_and_counted(value: float) -> None:
    damaged = Z.clone()
    damaged[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"input 'z' of batch 3 .* 1 of 8 values"):
        Batch((X,), {"z": damaged}, None).check_finite("batch 3")
    Batch((X, Y), {"z": Z}, None).check_finite("batch 3")


def test_the_declared_output_is_taken() -> None:
    assert select_output(X, None) is X
    assert select_output({"a": X, "b": Z}, "b") is Z
    assert select_output((X, Z), 1) is Z
    assert select_output([X, Z], -1) is Z


@pytest.mark.parametrize(
    ("output", "declared", "said"),
    [
        ({"logits": X, "hidden": Z}, None, r"Task\(output='logits'\)"),
        ((X, Z), None, r"Task\(output=0\)"),
        ({"a": X}, "logits", r"output='logits'.*\['a'\]"),
        ((X,), 3, r"output=3"),
        ((X, Z), "logits", "output='logits'"),
        ({"a": "text"}, "a", "must be a tensor, got str"),
        (None, None, "NoneType"),
        (X, 0, "output=0.*one tensor"),
        (X, "logits", "output='logits'"),
    ],
)
def test_an_output_that_is_not_there_is_refused_saying_what_is(output: Any, declared: Any, said: str) -> None:
    with pytest.raises(OutputError, match=said):
        select_output(output, declared)
