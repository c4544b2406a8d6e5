from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.errors import NonFiniteError
from tersor.probe import Histogram, histograms
from tersor.probe.histogram import BINS, SAMPLE
from zoo import normal


class Tapped(nn.Module):
    """Two taps, of which the second is reached by positive inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.second = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.log()) if bool((x > -1).all()) else x


def batches(*tensors: Tensor) -> Any:
    return lambda: [Batch((tensor,), {}, None) for tensor in tensors]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=4
    )
)
def test_the_range_is_exact_and_every_value_is_counted(parts: list[np.ndarray[Any, Any]]) -> None:
    model, tensors = nn.Sequential(nn.Identity()), [torch.from_numpy(part) for part in parts]
    found = histograms(model, {"0": "x"}, batches(*tensors))["x"]
    together = np.concatenate(parts)
    assert (found.low, found.high) == (together.min(), together.max())
    assert float(found.counts.sum()) == len(together)
    assert len(found.counts) == BINS


def test_counts_are_those_of_numpy() -> None:
    x = normal(5000).double().float()
    found = histograms(nn.Sequential(nn.Identity()), {"0": "x"}, batches(x[:1000], x[1000:]))["x"]
    expected, edges = np.histogram(x.numpy(), BINS, (found.low, found.high))
    assert np.abs(found.counts.numpy() - expected).sum() <= 20  # float32 against float64 at the edges of bins
    assert torch.allclose(found.centres, torch.from_numpy((edges[1:] + edges[:-1]) / 2).double(), atol=1e-5)


def test_large_tensors_are_sampled_evenly_and_their_range_is_exact() -> None:
    x = torch.cat([torch.linspace(0, 1, 5 * SAMPLE), torch.tensor([3.0])]).reshape(1, -1)
    found = histograms(nn.Sequential(nn.Identity()), {"0": "x"}, batches(x))["x"]
    assert found.high == 3.0
    assert SAMPLE / 2 < float(found.counts.sum()) <= 2 * SAMPLE
    inside = found.counts[: BINS // 3]
    assert float(inside.max() / inside.min()) < 1.2


def test_paths_may_share_a_histogram() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3), nn.ReLU())
    found = histograms(model, {"0": "both", "2": "both"}, batches(normal(4, 3)))
    assert set(found) == {"both"}
    assert float(found["both"].counts.sum()) == 24


def test_a_module_that_is_never_reached_has_no_range() -> None:
    found = histograms(Tapped(), {"first": "a", "second": "b"}, batches(-2 - normal(4, 3).abs()))
    assert found["a"].low < found["a"].high < 0
    assert found["b"].low > found["b"].high
    assert float(found["b"].counts.sum()) == 0


def test_without_counts_only_the_range_is_known_and_the_data_is_read_once() -> None:
    passes = []

    def once() -> list[Batch]:
        passes.append(1)
        return [Batch((normal(4, 3),), {}, None)]

    found = histograms(nn.Sequential(nn.Identity()), {"0": "x"}, once, counts=False)["x"]
    assert found.low < found.high
    assert float(found.counts.sum()) == 0
    assert len(passes) == 1


def test_a_constant_is_counted() -> None:
    found = histograms(nn.Sequential(nn.Identity()), {"0": "x"}, batches(torch.full((4, 5), 2.0)))["x"]
    assert (found.low, found.high) == (2.0, 2.0)
    assert float(found.counts[0]) == float(found.counts.sum()) == 20


def test_bad_input_is_named_by_batch() -> None:
    bad = normal(4, 3)
    bad[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"calibration batch 1 .*1 of 12"):
        histograms(Tapped(), {"first": "a"}, batches(normal(4, 3), bad))


@pytest.mark.parametrize("x", [torch.tensor([[0.5, 0.0]]), torch.tensor([[0.5, -0.5]])], ids=["inf", "nan"])
def test_a_value_that_the_model_makes_is_named_by_batch_and_place(x: Tensor) -> None:
    model = Tapped()
    with pytest.raises(NonFiniteError, match="calibration batch 2 produced NaN or Inf at 'b'"):
        histograms(model, {"first": "a", "second": "b"}, batches(torch.ones(1, 2), torch.ones(1, 2), x))
    assert not model.first._forward_pre_hooks  # nothing is left behind
    assert not model.second._forward_pre_hooks


def test_hooks_are_removed() -> None:
    model = Tapped()
    histograms(model, {"first": "a"}, batches(normal(4, 3)))
    assert not model.first._forward_pre_hooks


def test_a_new_histogram_is_empty() -> None:
    one, two = Histogram(), Histogram()
    one.widen(torch.tensor([1.0, 2.0]))
    one.count(torch.tensor([1.0, 2.0]))
    assert two.low > two.high
    assert float(two.counts.sum()) == 0
