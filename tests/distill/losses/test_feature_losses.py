from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tersor.distill import losses
from tersor.distill.losses.crd import Crd
from tersor.errors import ConfigError, DataError
from zoo import normal, seeded

Array = np.ndarray[Any, Any]
MAPS, OTHER_MAPS = normal(5, 6, 4, 3), normal(5, 6, 4, 3, seed=1)
TOKENS, OTHER_TOKENS = normal(3, 4, 8), normal(3, 4, 8, seed=1)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def number(loss: Tensor) -> float:
    return float(loss.detach())


def cosine(one: Array, two: Array) -> float:
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def rotated(features: Tensor, seed: int = 7) -> Tensor:
    """`[B, D]` in another orthogonal basis of as many dimensions."""
    basis, _ = torch.linalg.qr(normal(features.shape[1], features.shape[1], seed=seed))
    return features @ basis


def test_hint_by_hand() -> None:
    assert float(losses.hint(MAPS, OTHER_MAPS)) == pytest.approx(float((MAPS - OTHER_MAPS).pow(2).mean()), rel=1e-6)
    rows = [(0, at) for at in range(4)] + [(1, 0), (1, 1), (2, 0)]
    squares = [float(((TOKENS - OTHER_TOKENS)[row, at] ** 2).mean()) for row, at in rows]
    assert float(losses.hint(TOKENS, OTHER_TOKENS, mask=MASK)) == pytest.approx(np.mean(squares), rel=1e-5)


def test_l2_cosine_by_hand() -> None:
    whole, places = [], []
    for student, teacher in zip(MAPS.double().numpy(), OTHER_MAPS.double().numpy(), strict=True):
        apart = student / np.linalg.norm(student) - teacher / np.linalg.norm(teacher)
        whole.append((apart**2).sum())
        for h, w in itertools.product(range(4), range(3)):
            places.append(1 - cosine(student[:, h, w], teacher[:, h, w]))
    value = losses.l2_cosine(MAPS, OTHER_MAPS, l2=0.5, cosine=2.0)
    assert float(value) == pytest.approx(0.5 * np.mean(whole) + 2 * np.mean(places), rel=1e-5)


def test_l2_cosine_of_tokens_reads_counted_ones_only() -> None:
    parts = [losses.l2_cosine(TOKENS[i : i + 1, :n], OTHER_TOKENS[i : i + 1, :n]) for i, n in enumerate((4, 2, 1))]
    ones = [
        losses.l2_cosine(TOKENS[i : i + 1, :n], OTHER_TOKENS[i : i + 1, :n], l2=0.0) for i, n in enumerate((4, 2, 1))
    ]
    expected = sum(float(part - one) for part, one in zip(parts, ones, strict=True)) / 3
    expected += sum(n * float(one) for one, n in zip(ones, (4, 2, 1), strict=True)) / 7
    assert float(losses.l2_cosine(TOKENS, OTHER_TOKENS, mask=MASK)) == pytest.approx(expected, rel=1e-5)


def test_l2_cosine_of_vectors_is_three_times_the_cosine_distance() -> None:
    one, two = normal(6, 9), normal(6, 9, seed=1)
    distance = 1 - functional.cosine_similarity(one, two).mean()
    assert float(losses.l2_cosine(one, two)) == pytest.approx(3 * float(distance), rel=1e-5)


def test_l2_cosine_of_sequences_needs_to_know_the_channels() -> None:
    last = losses.l2_cosine(TOKENS, OTHER_TOKENS)
    first = losses.l2_cosine(TOKENS.transpose(1, 2), OTHER_TOKENS.transpose(1, 2), channel_axis=1)
    assert float(first) == pytest.approx(float(last), rel=1e-6)
    assert float(losses.l2_cosine(TOKENS, OTHER_TOKENS, channel_axis=1)) != pytest.approx(float(last), rel=1e-3)
    with pytest.raises(ConfigError, match="channel_axis: expected 1 or -1"):
        losses.l2_cosine(TOKENS, OTHER_TOKENS, channel_axis=2)
    with pytest.raises(ConfigError, match="two to four dimensions"):
        losses.l2_cosine(normal(2, 2, 2, 2, 2), normal(2, 2, 2, 2, 2))


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1e6))
def test_l2_cosine_and_attention_transfer_do_not_see_the_scale(scale: float) -> None:
    for loss in (losses.l2_cosine, losses.attention_transfer):
        assert float(loss(scale * MAPS, OTHER_MAPS)) == pytest.approx(float(loss(MAPS, OTHER_MAPS)), rel=1e-4)


def test_attention_transfer_by_hand() -> None:
    teacher = normal(5, 9, 4, 3, seed=1)
    distances = []
    for one, two in zip(MAPS.double().numpy(), teacher.double().numpy(), strict=True):
        maps = [(features**2).sum(0).ravel() for features in (one, two)]
        maps = [values / np.linalg.norm(values) for values in maps]
        distances.append(((maps[0] - maps[1]) ** 2).sum())
    assert float(losses.attention_transfer(MAPS, teacher)) == pytest.approx(np.mean(distances), rel=1e-5)


def test_attention_transfer_averages_the_larger_map() -> None:
    teacher = normal(5, 9, 8, 3, seed=1)
    squares = teacher.square().reshape(5, 9, 4, 2, 3).mean(3).mean(1, keepdim=True)
    expected = losses.attention_transfer(MAPS, squares.sqrt())
    assert float(losses.attention_transfer(MAPS, teacher)) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.attention_transfer(teacher, MAPS)) == pytest.approx(float(expected), rel=1e-5)
    sequences = losses.attention_transfer(MAPS[:, :, 0], teacher[:, :, 0])
    assert float(sequences) == pytest.approx(
        float(losses.attention_transfer(MAPS[:, :, :1], teacher[:, :, :1])), rel=1e-5
    )
    long = losses.attention_transfer(normal(2, 3, 8), normal(2, 5, 4, seed=1))
    assert 0 < float(long) <= 2


def test_attention_transfer_does_not_see_the_order_of_channels() -> None:
    shuffled = MAPS[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    assert float(losses.attention_transfer(shuffled, MAPS)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"\[B, C, H, W\] or \[B, C, L\] from both"):
        losses.attention_transfer(MAPS, MAPS[:, :, 0])
    with pytest.raises(ConfigError, match="at least 3 dimensions"):
        losses.attention_transfer(normal(4, 3), normal(4, 3))


def test_similarity_preserving_by_hand() -> None:
    student, teacher = normal(5, 7), normal(5, 2, 6, seed=1)

    def similarities(flat: Array) -> Array:
        rows = [[float(one @ two) for two in flat] for one in flat]
        return np.array([row / np.sqrt(np.square(row).sum()) for row in np.array(rows)])

    apart = similarities(student.double().numpy()) - similarities(teacher.double().numpy().reshape(5, 12))
    expected = (apart**2).sum() / 25
    assert float(losses.similarity_preserving(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_rkd_by_hand() -> None:
    def relations(points: Array) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
        lengths = {(i, j): float(np.linalg.norm(points[i] - points[j])) for i, j in itertools.permutations(range(5), 2)}
        scale = np.mean(list(lengths.values()))
        cosines = {
            (i, j, k): cosine(points[i] - points[j], points[k] - points[j])
            for i, j, k in itertools.permutations(range(5), 3)
        }
        return {pair: length / scale for pair, length in lengths.items()}, cosines

    student, teacher = normal(5, 3), normal(5, 2, 4, seed=1)
    student[0] += 8  # so that some differences leave the square part of Huber's loss
    one, two = relations(student.double().numpy()), relations(teacher.double().numpy().reshape(5, 8))
    distance, angle = (np.mean([huber(one[n][key] - two[n][key]) for key in one[n]]) for n in (0, 1))
    assert float(losses.rkd(student, teacher)) == pytest.approx(distance + 2 * angle, rel=1e-5)
    only = losses.rkd(student, teacher, distance=25.0, angle=0.0)
    assert float(only) == pytest.approx(25 * distance, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-20, 20), st.integers(0, 100))
def test_rkd_does_not_see_rotation_scale_or_shift(scale: float, shift: float, seed: int) -> None:
    teacher = normal(6, 5, seed=1)
    moved = rotated(teacher, seed) * scale + shift
    assert float(losses.rkd(moved, teacher)) == pytest.approx(0, abs=1e-6 + 1e-6 * (shift / scale) ** 2)


def test_rkd_needs_pairs_and_triples() -> None:
    assert float(losses.rkd(normal(1, 4), normal(1, 4, seed=1))) == 0
    assert float(losses.rkd(normal(2, 4), normal(2, 4, seed=1))) == pytest.approx(0, abs=1e-9)  # one distance: the mean
    assert float(losses.rkd(normal(3, 4), normal(3, 4, seed=1))) > 0.01


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_similarity_preserving_does_not_see_rotation_or_scale(scale: float, seed: int) -> None:
    teacher = normal(6, 5, seed=1)
    moved = rotated(teacher, seed) * scale
    assert float(losses.similarity_preserving(moved, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(losses.similarity_preserving(-moved, teacher)) == pytest.approx(0, abs=1e-6)


def relation_kl(student: Tensor, teacher: Tensor, heads: int, lengths: list[int]) -> float:
    """By loops; example `i` has `lengths[i]` tokens."""
    values = []
    for i, length in enumerate(lengths):
        for head in range(heads):
            rows = []
            for features in (student, teacher):
                width = features.shape[2] // heads
                x = features[i, :length, head * width : (head + 1) * width].double().numpy()
                powers = np.exp(x @ x.T / math.sqrt(width))
                rows.append(powers / powers.sum(1, keepdims=True))
            values.append((rows[1] * np.log(rows[1] / rows[0])).sum(1))
    counted = sum(len(rows) for rows in values)
    return float(sum(rows.sum() for rows in values) / counted)


def test_minilm_relations_by_hand() -> None:
    teacher = normal(3, 4, 12, seed=1)
    for heads in (1, 2, 4):
        value = losses.minilm_relations(TOKENS, teacher, heads=heads)
        assert float(value) == pytest.approx(relation_kl(TOKENS, teacher, heads, [4, 4, 4]), rel=1e-5)
        masked = losses.minilm_relations(TOKENS, teacher, heads=heads, mask=MASK)
        assert float(masked) == pytest.approx(relation_kl(TOKENS, teacher, heads, [4, 2, 1]), rel=1e-5)


def test_minilm_relations_do_not_see_a_rotation_within_a_head() -> None:
    turned = torch.cat([rotated(part.flatten(0, 1)).reshape(3, 4, 4) for part in TOKENS.split(4, dim=2)], dim=2)
    assert float(losses.minilm_relations(turned, TOKENS, heads=2)) == pytest.approx(0, abs=1e-6)
    assert float(losses.minilm_relations(turned, TOKENS, heads=4)) > 1e-3


def test_minilm_relations_refuse_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="3 does not divide the student's 8; 4 and its divisors fit"):
        losses.minilm_relations(TOKENS, normal(3, 4, 12), heads=3)
    with pytest.raises(ConfigError, match="8 does not divide the teacher's 12"):
        losses.minilm_relations(TOKENS, normal(3, 4, 12), heads=8)
    with pytest.raises(ConfigError, match=r"heads: expected a whole number of at least 1, got 0"):
        losses.minilm_relations(TOKENS, TOKENS, heads=0)
    with pytest.raises(ConfigError, match="the same tokens"):
        losses.minilm_relations(TOKENS, normal(3, 5, 8), heads=2)


def test_attention_maps_by_hand() -> None:
    student, teacher = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    assert float(losses.attention_maps(student, teacher)) == pytest.approx(
        float((student - teacher).square().mean()), rel=1e-6
    )
    squares = []
    for i, length in enumerate((4, 2, 1)):
        for head, query, key in itertools.product(range(2), range(length), range(length)):
            squares.append(float(student[i, head, query, key] - teacher[i, head, query, key]) ** 2)
    assert float(losses.attention_maps(student, teacher, mask=MASK)) == pytest.approx(np.mean(squares), rel=1e-5)
    with pytest.raises(ConfigError, match="same shape"):
        losses.attention_maps(student, normal(3, 3, 4, 4))
    with pytest.raises(ConfigError, match=r"\[B, H, T, T\]"):
        losses.attention_maps(MAPS, MAPS)


def test_crd_by_hand() -> None:
    module = seeded(lambda: Crd(3, 5, width=4, temperature=0.5))
    student, teacher = normal(6, 3), normal(6, 5, seed=1)
    embedded = []
    for features, layer in ((student, module.get_submodule("student")), (teacher, module.get_submodule("teacher"))):
        weight, bias = (layer.get_parameter(name).detach().double().numpy() for name in ("weight", "bias"))
        rows = features.double().numpy() @ weight.T + bias
        embedded.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    powers = np.exp(embedded[0] @ embedded[1].T / 0.5)
    right = powers.diagonal()
    expected = -(np.log(right / powers.sum(1)).mean() + np.log(right / powers.sum(0)).mean()) / 2
    assert number(module(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_crd_averages_places_and_counted_tokens() -> None:
    module = seeded(lambda: Crd(8, 6))
    pooled = torch.stack([TOKENS[i, :length].mean(0) for i, length in enumerate((4, 2, 1))])
    maps = MAPS[:3]
    expected = number(module(pooled, maps.mean((2, 3))))
    assert number(module(TOKENS, maps.flatten(2).transpose(1, 2)[:, :4], mask=MASK)) > 0
    both = torch.stack([OTHER_TOKENS[i, :length, :6].mean(0) for i, length in enumerate((4, 2, 1))])
    masked = module(TOKENS, OTHER_TOKENS[:, :, :6], mask=MASK)
    assert number(masked) == pytest.approx(number(module(pooled, both)), rel=1e-5)
    assert number(module(pooled, maps)) == pytest.approx(expected, rel=1e-5)
    first = seeded(lambda: Crd(8, 8, channel_axis=1))
    last = seeded(lambda: Crd(8, 8))
    value = first(TOKENS.transpose(1, 2), OTHER_TOKENS.transpose(1, 2))
    assert number(value) == pytest.approx(number(last(TOKENS, OTHER_TOKENS)), rel=1e-5)


def test_crd_learns_to_tell_examples_apart() -> None:
    student, teacher = normal(32, 5), normal(32, 5) @ normal(5, 9, seed=3)
    module = seeded(lambda: Crd(5, 9, width=16)).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    first = number(module(student, teacher))
    for _ in range(150):
        optimiser.zero_grad()
        module(student, teacher).backward()
        optimiser.step()
    assert number(module(student, teacher)) < 0.3 < math.log(32) * 0.8 < first
    assert number(module(student, teacher.roll(1, 0))) > math.log(32)
    assert number(module(student[:1], teacher[:1])) == 0  # nothing to contrast with


def test_crd_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"crd\.student_width: expected a whole number"):
        Crd(0, 4)
    with pytest.raises(ConfigError, match=r"crd\.temperature: expected a number above 0"):
        Crd(4, 4, temperature=-1.0)
    with pytest.raises(ConfigError, match="a teacher of 4 channels, got 8"):
        Crd(8, 4)(TOKENS, TOKENS)


@pytest.mark.parametrize("name", ["l2_cosine", "attention_transfer", "similarity_preserving", "rkd"])
def test_no_square_overflows(name: str) -> None:
    loss = getattr(losses, name)
    plain = float(loss(MAPS, OTHER_MAPS))
    assert float(loss(1e25 * MAPS, OTHER_MAPS)) == pytest.approx(plain, rel=1e-4)
    assert float(loss(MAPS, 1e25 * OTHER_MAPS)) == pytest.approx(plain, rel=1e-4)


def test_a_vector_of_zeros_is_at_right_angles_to_others() -> None:
    student, teacher = normal(4, 6), normal(4, 6, seed=1)
    student[0] = 0
    rest = float(losses.l2_cosine(student[1:], teacher[1:], l2=0.0))
    assert float(losses.l2_cosine(student, teacher, l2=0.0)) == pytest.approx((1 + 3 * rest) / 4, rel=1e-5)
    teacher[0] = 0
    assert float(losses.l2_cosine(student, teacher, l2=0.0)) == pytest.approx(3 * rest / 4, rel=1e-5)


def test_rkd_takes_no_direction_from_rounding() -> None:
    student = normal(4, 5)
    student[1] = student[0] * (1 + 2e-7)
    student.requires_grad_(True)
    losses.rkd(student, normal(4, 5, seed=1)).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 10


@pytest.mark.parametrize("name", ["similarity_preserving", "rkd", "attention_transfer", "minilm_relations"])
def test_relations_are_of_the_same_examples(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} needs .* the same examples, got \(3, 4, 8\) .* \(2, 4, 8\)"):
        losses.LOSSES[name].function(TOKENS, TOKENS[:2], **({"heads": 2} if name == "minilm_relations" else {}))
    with pytest.raises(ConfigError, match="the same examples"):
        losses.LOSSES[name].function(TOKENS[0, 0], TOKENS[0, 0], **({"heads": 2} if name == "minilm_relations" else {}))


@pytest.mark.parametrize("name", ["hint", "l2_cosine"])
def test_features_to_match_have_one_shape(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} needs the same shape .* projector"):
        getattr(losses, name)(TOKENS, normal(3, 4, 9))


@pytest.mark.parametrize("name", ["hint", "l2_cosine", "similarity_preserving", "rkd"])
def test_maps_have_no_mask(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: "):
        getattr(losses, name)(MAPS, MAPS, mask=torch.ones(5, 6))
