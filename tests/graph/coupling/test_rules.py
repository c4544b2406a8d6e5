"""One or two lines of a model per rule: exactly which indices go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.graph import Coupling, Place, couple
from tersor.graph.coupling.rules.pointwise import pointwise
from tersor.graph.coupling.trace import Trace


class Net(nn.Module):
    """Layers, and how they are put together: `run(net, inputs…)`."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False, **options)


def units(coupling: Coupling, place: str) -> list[list[int]]:
    """Indices of each unit at a place, e.g. `a.weight[0]`; empty if it is frozen."""
    name, dim = place[:-3], int(place[-2])
    rows = [family.members[Place(name, dim)] for family in coupling.families if Place(name, dim) in family.members]
    return sorted(row.tolist() for part in rows for row in part)


def coupled(coupling: Coupling, left: str, right: str) -> list[tuple[list[int], list[int]]]:
    """Units that touch both places: their indices at each."""
    first, second = Place(left[:-3], int(left[-2])), Place(right[:-3], int(right[-2]))
    return [
        (one.tolist(), other.tolist())
        for family in coupling.families
        if first in family.members and second in family.members
        for one, other in zip(family.members[first], family.members[second], strict=True)
    ]


def single(count: int) -> list[list[int]]:
    return [[index] for index in range(count)]


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 4, 4)


def test_a_linear_layer_goes_with_the_columns_of_the_next() -> None:
    found = couple(Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 4), b=linear(4, 2)), torch.randn(2, 3))
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([i], [i]) for i in range(4)]
    assert coupled(found, "a.weight[0]", "a.bias[0]") == [([i], [i]) for i in range(4)]
    assert [family.kind for family in found.families] == ["channel"]


def test_inputs_and_outputs_stay_unless_asked() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=linear(3, 4), b=linear(4, 5))
    found = couple(net, torch.randn(2, 3))
    assert units(found, "a.weight[1]") == units(found, "b.weight[0]") == []
    assert units(couple(net, torch.randn(2, 3), prune_outputs=True), "b.weight[0]") == single(5)


def test_flatten_multiplies_the_columns_of_a_channel() -> None:
    found = couple(Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3, 2), b=linear(32, 4)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [
        ([0], list(range(16))),
        ([1], list(range(16, 32))),
    ]


def test_flatten_of_the_last_dimension_interleaves() -> None:
    net = Net(lambda m, x: m.b(m.a(x).flatten(1)), a=linear(3, 2), b=linear(10, 4))
    assert coupled(couple(net, torch.randn(2, 5, 3)), "a.weight[0]", "b.weight[1]") == [
        ([0], [0, 2, 4, 6, 8]),
        ([1], [1, 3, 5, 7, 9]),
    ]


def heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).view(*x.shape[:2], -1, 2).transpose(1, 2) for part in (m.q, m.k, m.v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return m.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_are_atomic() -> None:
    net = Net(heads, q=linear(6, 6), k=linear(6, 6), v=linear(6, 6), o=linear(6, 5))
    found = couple(net, torch.randn(2, 4, 6))
    for place in ("q.weight[0]", "k.weight[0]", "v.weight[0]", "o.weight[1]"):
        assert units(found, place) == [[0, 1], [2, 3], [4, 5]]
    assert {family.kind for family in found.families} == {"head"}


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    batch, time, _ = x.shape
    q = m.q(x).view(batch, time, -1, m.size).transpose(1, 2)
    k, v = (part(x).view(batch, time, -1, m.size).transpose(1, 2) for part in (m.k, m.v))
    k, v = (
        part[:, :, None].expand(batch, part.shape[1], m.groups, time, m.size).reshape(batch, -1, time, m.size)
        for part in (k, v)
    )
    y = functional.scaled_dot_product_attention(q, k, v)
    return m.o(y.transpose(1, 2).reshape(batch, time, -1))


def test_query_heads_go_with_the_head_of_keys_and_values_that_they_share() -> None:
    net = Net(
        grouped_queries, q=linear(6, 12), k=linear(6, 6), v=linear(6, 6), o=linear(12, 5), size=3, groups=2
    )  # 4 heads of 3 for queries, 2 for keys and values
    found = couple(net, torch.randn(2, 4, 6))
    assert coupled(found, "k.weight[0]", "q.weight[0]") == [
        ([0, 1, 2], [0, 1, 2, 3, 4, 5]),
        ([3, 4, 5], [6, 7, 8, 9, 10, 11]),
    ]
    assert units(found, "o.weight[1]") == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_cat_puts_channels_side_by_side() -> None:
    net = Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 2), b=conv(3, 3), c=conv(5, 4))
    found = couple(net, image())
    assert coupled(found, "a.weight[0]", "c.weight[1]") == [([0], [0]), ([1], [1])]
    assert coupled(found, "b.weight[0]", "c.weight[1]") == [([0], [2]), ([1], [3]), ([2], [4])]


def test_cat_of_a_tensor_with_itself_takes_both_columns() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(torch.cat([x, x], 1))

    assert coupled(couple(Net(run, a=conv(3, 2), b=conv(4, 4)), image()), "a.weight[0]", "b.weight[1]") == [
        ([0], [0, 2]),
        ([1], [1, 3]),
    ]


def test_stack_adds_a_dimension_that_stays() -> None:
    net = Net(lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=linear(3, 4), b=linear(3, 4), c=linear(4, 2))
    found = couple(net, torch.randn(2, 3))
    assert coupled(found, "a.weight[0]", "b.weight[0]") == [([i], [i]) for i in range(4)]


def test_a_sum_ties_both_branches() -> None:
    net = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert coupled(couple(net, image()), "a.weight[0]", "b.weight[0]") == [([i], [i]) for i in range(4)]


def test_a_sum_with_an_input_freezes_with_a_readable_reason() -> None:
    found = couple(Net(lambda m, x: m.b(m.a(x) + x), a=linear(4, 4), b=linear(4, 2)), torch.randn(2, 4))
    assert units(found, "a.weight[0]") == []
    reasons = {item.name: item.reason for item in found.frozen}
    assert reasons["a.weight[0]"] == "it meets a dimension that is fixed (aten.add in the model)"


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.chunk(2, 1),
        lambda x: x.split(x.shape[1] // 2, 1),
        lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
    ],
)
def test_equal_pieces_lose_the_same_positions(how: Callable[[Tensor], Any]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = how(m.a(x))
        return m.b(left * right)

    found = couple(Net(run, a=conv(3, 6), b=conv(3, 4)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([0, 3], [0]), ([1, 4], [1]), ([2, 5], [2])]


def test_glu_is_two_equal_pieces() -> None:
    found = couple(Net(lambda m, x: m.b(functional.glu(m.a(x))), a=linear(3, 6), b=linear(3, 4)), torch.randn(2, 3))
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([0, 3], [0]), ([1, 4], [1]), ([2, 5], [2])]


def test_pieces_of_sizes_written_in_the_code_stay() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).split([2, 4], 1)
        return m.b(left) + m.c(right)

    found = couple(Net(run, a=conv(3, 6), b=conv(2, 4), c=conv(4, 4)), image())
    assert units(found, "a.weight[0]") == []
    assert any("written in the code" in item.reason for item in found.frozen)


def test_pieces_of_sizes_from_attributes_can_shrink() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).split([m.few, m.many], 1)
        return m.b(left) + m.c(right)

    net = Net(run, a=conv(3, 6), b=conv(2, 4), c=conv(4, 4), few=2, many=4)
    found = couple(net, image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([0], [0]), ([1], [1])]
    assert coupled(found, "a.weight[0]", "c.weight[1]") == [([2], [0]), ([3], [1]), ([4], [2]), ([5], [3])]


@pytest.mark.parametrize("written", [False, True])
def test_padded_channels_go_if_their_number_is_an_attribute(written: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(functional.pad(m.a(x), (0, 0, 0, 0, 0, 2 if written else m.extra)) + m.c(x))

    found = couple(Net(run, a=conv(3, 4), b=conv(6, 4), c=conv(3, 6), extra=2), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([i], [i]) for i in range(4)]
    assert units(found, "c.weight[0]") == single(4 if written else 6)


def test_spatial_padding_leaves_channels_free() -> None:
    found = couple(Net(lambda m, x: m.b(functional.pad(m.a(x), (1, 1))), a=conv(3, 4), b=conv(4, 2)), image())
    assert units(found, "a.weight[0]") == single(4)


def shuffled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    batch, channels, height, width = x.shape
    x = x.view(batch, m.groups, channels // m.groups, height, width).transpose(1, 2)
    return m.b(x.reshape(batch, channels, height, width))


def test_a_shuffle_moves_channels_and_takes_the_same_of_every_group() -> None:
    found = couple(Net(shuffled, a=conv(3, 6), b=conv(6, 4), groups=2), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([0, 3], [0, 1]), ([1, 4], [2, 3]), ([2, 5], [4, 5])]


def test_depthwise_channels_go_one_by_one_and_groups_follow() -> None:
    found = couple(Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 4, groups=4), c=conv(4, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[0]") == [([i], [i]) for i in range(4)]
    assert coupled(found, "b.weight[0]", "c.weight[1]") == [([i], [i]) for i in range(4)]


def test_few_wide_groups_lose_the_same_positions() -> None:
    found = couple(Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([i, i + 4], [i]) for i in range(4)]
    assert coupled(found, "b.weight[0]", "c.weight[1]") == [([i, i + 4], [i, i + 4]) for i in range(4)]


def test_many_narrow_groups_go_as_a_whole() -> None:
    found = couple(Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=4), c=conv(8, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[0]") == [([2 * i, 2 * i + 1], [2 * i, 2 * i + 1]) for i in range(4)]
    assert units(found, "b.weight[1]") == []


def test_a_convolution_with_one_output_is_not_depthwise() -> None:
    found = couple(Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 1), c=conv(1, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([i], [i]) for i in range(4)]


def test_a_transposed_convolution_has_its_inputs_first() -> None:
    up = nn.ConvTranspose2d(4, 6, 2, bias=False)
    found = couple(Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=up, c=conv(6, 2)), image())
    assert units(found, "b.weight[0]") == single(4)
    assert coupled(found, "b.weight[1]", "c.weight[1]") == [([i], [i]) for i in range(6)]


@pytest.mark.parametrize(
    ("groups", "rows"),
    [(1, single(8)), (2, [[i, i + 4] for i in range(4)]), (4, [[2 * i, 2 * i + 1] for i in range(4)]), (8, single(8))],
)
def test_a_group_norm_ties_the_channels_that_share_a_statistic(groups: int, rows: list[list[int]]) -> None:
    found = couple(Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(groups, 8), b=conv(8, 2)), image())
    for place in ("a.weight[0]", "n.weight[0]", "b.weight[1]"):
        assert units(found, place) == rows


def test_batch_norm_buffers_go_along() -> None:
    found = couple(Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 2)), image())
    for place in ("n.weight[0]", "n.bias[0]", "n.running_mean[0]", "n.running_var[0]"):
        assert coupled(found, "a.weight[0]", place) == [([i], [i]) for i in range(4)]


def test_pixel_shuffle_takes_whole_blocks_of_channels() -> None:
    found = couple(Net(lambda m, x: m.b(functional.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), b=conv(3, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [(list(range(4 * i, 4 * i + 4)), [i]) for i in range(3)]


def test_repeat_repeats() -> None:
    found = couple(Net(lambda m, x: m.b(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 2), b=conv(4, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([0], [0, 2]), ([1], [1, 3])]


def test_flip_reverses() -> None:
    found = couple(Net(lambda m, x: m.b(m.a(x).flip(1)), a=conv(3, 3), b=conv(3, 2)), image())
    assert coupled(found, "a.weight[0]", "b.weight[1]") == [([0], [2]), ([1], [1]), ([2], [0])]


def test_columns_of_an_embedding_can_go_and_rows_stay() -> None:
    found = couple(Net(lambda m, x: m.b(m.a(x)), a=nn.Embedding(7, 4), b=linear(4, 2)), torch.tensor([[1, 2]]))
    assert coupled(found, "a.weight[1]", "b.weight[1]") == [([i], [i]) for i in range(4)]
    assert units(found, "a.weight[0]") == []
    assert found.families[0].kind == "width"


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (lambda x: x.softmax(1), "a softmax runs over it (aten._softmax in the model)"),
        (lambda x: x.roll(1, 1), "it is shifted"),
        (lambda x: x.cumsum(1), "aten.cumsum runs along it"),
        (lambda x: x[:, :3], "it is sliced at 3, which is written in the code"),
        (lambda x: x[:, ::2], "it is sliced with a step"),
        (lambda x: x[:, [0, 1]], "its entries are looked up by data"),
        (lambda x: x.reshape(-1, 6, 1), "the size 6 is written in the code"),
    ],
)
def test_what_depends_on_every_position_is_frozen_with_the_reason(
    operator: Callable[[Tensor], Tensor], reason: str
) -> None:
    found = couple(Net(lambda m, x: operator(m.a(x)).sum(1), a=linear(3, 6)), torch.randn(2, 3))
    assert found.families == ()
    assert reason in {item.name: item.reason for item in found.frozen}["a.weight[0]"]


@pytest.mark.parametrize(
    "take_apart",
    [
        lambda x, heads: x.view(2, heads, -1),
        lambda x, heads: x.reshape(len(x), heads, x.shape[1] // heads),
        lambda x, heads: x.unflatten(-1, (heads, -1)),
        lambda x, heads: x.unflatten(1, (heads, x.shape[1] // heads)),
    ],
)
def test_hard_coded_heads_stay_and_counted_heads_go(take_apart: Callable[[Tensor, int], Tensor]) -> None:
    def run(m: Any, x: Tensor, heads: int) -> Tensor:
        return m.b(take_apart(m.a(x), heads).softmax(-1).flatten(1))

    counted = couple(Net(lambda m, x: run(m, x, m.heads), a=linear(3, 6), b=linear(6, 2), heads=3), torch.randn(2, 3))
    assert units(counted, "a.weight[0]") == [[0, 1], [2, 3], [4, 5]]
    assert next(str(demand.attribute) for demand in counted.demands if demand.block is not None) == "heads"
    written = couple(Net(lambda m, x: run(m, x, 3), a=linear(3, 6), b=linear(6, 2)), torch.randn(2, 3))
    assert units(written, "a.weight[0]") == []


@torch.library.custom_op("tersor_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """Doubles; says nothing about itself."""
    return x * 2


def strange() -> Net:
    return Net(lambda m, x: m.c(mystery(m.b(m.a(x)))), a=linear(3, 4), b=linear(4, 5), c=linear(5, 2))


def test_an_unknown_operator_freezes_what_it_touches_by_name() -> None:
    found = couple(strange(), torch.randn(2, 3))
    assert units(found, "a.weight[0]") == single(4)
    assert units(found, "b.weight[0]") == units(found, "c.weight[1]") == []
    reasons = {item.name: item.reason for item in found.frozen}
    assert reasons["b.weight[0]"] == (
        "the operator tersor_tests.mystery is not known (tersor_tests.mystery in the model)"
    )


def test_a_rule_of_the_users_own_unfreezes_it() -> None:
    found = couple(strange(), torch.randn(2, 3), rules={"tersor_tests.mystery": pointwise})
    assert coupled(found, "b.weight[0]", "c.weight[1]") == [([i], [i]) for i in range(5)]


def test_a_rule_of_the_users_own_comes_before_the_built_in_one() -> None:
    def nothing_goes(trace: Trace, call: Any) -> None:
        for block in trace.blocks(call.args[0]):
            trace.ledger.freeze(block, "I say so")

    net = Net(lambda m, x: m.b(m.a(x).relu()), a=linear(3, 4), b=linear(4, 2))
    found = couple(net, torch.randn(2, 3), rules={"aten.relu": nothing_goes})
    assert found.families == ()
    assert {item.name: item.reason for item in found.frozen}["a.weight[0]"] == "I say so (aten.relu in the model)"
