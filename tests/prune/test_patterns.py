from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ConfigError
from tersor.prune.encoding import decode, encode
from tersor.prune.patterns import as_matrix, block, columns_of, from_matrix, n_m, pattern_of, unstructured
from tersor.prune.patterns.block import block_scores
from zoo import normal

SHAPES = [(6, 8), (5, 7), (4, 8, 3), (6, 4, 3, 3), (3, 8, 2, 3, 1)]


@pytest.mark.parametrize("output_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_and_back(shape: tuple[int, ...], output_dim: int) -> None:
    weight = normal(*shape)
    matrix = as_matrix(weight, output_dim)
    assert matrix.shape == (shape[output_dim], weight.numel() // shape[output_dim])
    assert torch.equal(from_matrix(matrix, weight, output_dim), weight)
    in_gram_order = weight.movedim(output_dim, 0).flatten(1)
    assert torch.equal(in_gram_order[:, columns_of(weight, output_dim)], matrix)


def test_neighbouring_columns_of_a_kernel_are_input_channels() -> None:
    weight = normal(2, 4, 3, 3)
    assert torch.equal(as_matrix(weight)[:, :4], weight[:, :, 0, 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 50))
def test_entries_lose_exactly_the_lowest(rows: int, columns: int, amount: float, seed: int) -> None:
    scores = normal(rows, columns, seed=seed)
    keep = unstructured(scores, amount)
    assert int((~keep).sum()) == round(amount * scores.numel())
    if keep.any() and not keep.all():
        assert scores[~keep].max() <= scores[keep].min()
    assert int((~unstructured(torch.ones(rows, columns), amount)).sum()) == round(amount * scores.numel())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8), st.data())
def test_every_group_keeps_its_n_best(rows: int, groups: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = normal(rows, groups * m, seed=rows).abs()
    keep = n_m(scores, n, m)
    assert (keep.reshape(-1, m).sum(1) == n).all()
    kept = torch.where(keep, scores, torch.inf).reshape(-1, m).min(1).values
    lost = torch.where(keep, 0, scores).reshape(-1, m).max(1).values
    assert (lost <= kept).all()
    assert (n_m(torch.ones(rows, groups * m), n, m).reshape(-1, m).sum(1) == n).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_blocks_are_whole_to_the_ragged_edge(outputs: int, inputs: int, rows: int, columns: int, amount: float) -> None:
    scores = normal(outputs, inputs, seed=inputs)
    means = block_scores(scores, rows, columns)
    keep = block(scores, amount, rows, columns)
    gone = 0
    for top in range(means.shape[0]):
        for left in range(means.shape[1]):
            place = slice(top * rows, (top + 1) * rows), slice(left * columns, (left + 1) * columns)
            assert float(means[top, left]) == pytest.approx(float(scores[place].mean()), abs=1e-5)
            assert bool(keep[place].all()) != bool((~keep[place]).all())
            gone += int((~keep[place]).all())
    assert gone == round(amount * means.numel())


def test_what_went_before_does_not_drag_its_block_along() -> None:
    scores = torch.tensor([[-torch.inf, 8.0, 1.0, 1.0], [-torch.inf, -torch.inf, 3.0, 3.0]])
    assert block_scores(scores, 1, 2).tolist() == [[4.0, 1.0], [-torch.inf, 3.0]]


@pytest.mark.parametrize("name", ["", "2:2", "4:2", "0:4", "2:", "x4", "1x1", "0x4", "blocks", "2:4 "])
def test_an_unknown_pattern_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="'2:4'"):
        pattern_of(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["unstructured", "2:4", "4:8", "1:4", "3:5", "4x1", "8x8"])
@pytest.mark.parametrize("shape", [(6, 40), (5, 40, 3, 3)])
def test_what_is_encoded_comes_back_bit_for_bit(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    weight, pattern = normal(*shape).to(dtype), pattern_of(name)
    for amount in (0.0, 0.5, 0.9):
        keep = from_matrix(pattern.keep(as_matrix(weight.float().abs()), amount), weight)
        data = encode(weight, keep, pattern)
        assert len(data) <= 1 + weight.numel() * weight.element_size()
        assert torch.equal(decode(data, weight, pattern), weight * keep)


def test_groups_with_fewer_than_n_and_transposed_weights_come_back_too() -> None:
    weight, pattern = normal(8, 6), pattern_of("2:4")
    keep = from_matrix(n_m(as_matrix(weight.abs(), 1), 2, 4), weight, 1) & (weight > 0)
    assert torch.equal(decode(encode(weight, keep, pattern, 1), weight, pattern, 1), weight * keep)
    nothing = torch.zeros_like(keep)
    for name in ("unstructured", "2:4", "8x8"):
        assert not decode(encode(weight, nothing, pattern_of(name), 1), weight, pattern_of(name), 1).any()


def test_two_of_four_takes_nine_sixteenths() -> None:
    weight = normal(64, 64)
    data = encode(weight, n_m(weight.abs(), 2, 4), pattern_of("2:4"))
    assert len(data) == 1 + 64 * 64 * 4 // 2 + 64 * 64 // 2 * 2 // 8
