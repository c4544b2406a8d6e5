from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.granularity import Granularity
from tersor.core.quantization import QuantPlan, QuantScheme
from tersor.errors import ConfigError

EVERY = {
    "tensor": Granularity(),
    "channel": Granularity.channel(),
    "last channel": Granularity.channel(-1),
    "group": Granularity.group(2),
    "group of outputs": Granularity.group(2, axis=0),
    "token": Granularity.token(),
    "block": Granularity.block(5),
}


@given(st.lists(st.sampled_from([0, 2, 4]), min_size=2, max_size=4), st.sampled_from(sorted(EVERY)))
def test_rows_and_grids_come_back(shape: list[int], name: str) -> None:
    granularity, tensor = EVERY[name], torch.arange(float(math.prod(shape))).reshape(shape)
    rows = granularity.rows(tensor)
    assert torch.equal(granularity.restore(rows, tuple(shape)), tensor)
    assert len(rows) == math.prod(granularity.grid_shape(tuple(shape)))
    numbers = torch.arange(float(len(rows)))
    grid = granularity.grid(numbers, tuple(shape))
    assert tuple(grid.shape) == granularity.grid_shape(tuple(shape))
    assert torch.equal(granularity.flat(grid, tuple(shape)), numbers)
    vectors = torch.stack([numbers, -numbers], 1)
    assert torch.equal(granularity.flat(granularity.grid(vectors, tuple(shape)), tuple(shape)), vectors)


def test_a_region_is_what_it_says() -> None:
    tensor = torch.arange(24.0).reshape(2, 4, 3)
    assert Granularity.channel(1).rows(tensor)[1].tolist() == [3, 4, 5, 15, 16, 17]
    assert Granularity.group(2).rows(tensor)[:2].tolist() == [[0, 3], [6, 9]]
    assert Granularity.token().rows(tensor)[1].tolist() == [3, 4, 5]
    assert Granularity.block(16).rows(tensor)[1].tolist() == [*range(16, 24), *[0] * 8]
    spread = Granularity.group(2).grid(torch.arange(12), (2, 4, 3)).repeat_interleave(2, 1)
    assert spread[1, 2, 0] == spread[1, 3, 0] != spread[1, 1, 0]


def test_scalars_have_a_region() -> None:
    assert Granularity().rows(torch.tensor(3.0)).tolist() == [[3.0]]
    assert Granularity.token().grid_shape(()) == ()
    with pytest.raises(ConfigError, match=r"expected an axis of a tensor of shape \(\), got 0"):
        Granularity.channel().rows(torch.tensor(3.0))


def test_groups_that_do_not_divide_are_told_what_would() -> None:
    with pytest.raises(ConfigError, match=r"expected a divisor of the 12 entries along axis 1 .* got 5; take one of"):
        Granularity.group(5).rows(torch.zeros(3, 12))
    with pytest.raises(ConfigError, match="expected an axis of a tensor of shape"):
        Granularity.channel(3).rows(torch.zeros(3, 12))


@pytest.mark.parametrize(
    ("fields", "missing"),
    [({"kind": "group", "size": 4}, "needs axis"), ({"kind": "group", "axis": 1}, "needs size"),
     ({"kind": "token", "axis": 1}, "takes no axis"), ({"kind": "channel"}, "needs axis")],
)  # fmt: skip
def test_what_is_missing_is_told(fields: dict[str, object], missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        Granularity(**fields)


def test_words_are_read() -> None:
    assert Granularity.of("channel") == Granularity.channel(0)
    assert str(Granularity.of(Granularity.group(32))) == "per group of 32 along axis 1"
    with pytest.raises(ConfigError, match=r"got 'group'; groups have a size: Granularity\.group\(32\)"):
        Granularity.of("group")


SCHEMES = [
    (QuantScheme(bits=16), Granularity()),
    (QuantScheme(axis=1), Granularity.channel(1)),
    (QuantScheme(axis=1, group_size=32), Granularity.group(32)),
    (QuantScheme(group_size=64), Granularity.block(64)),
    (QuantScheme(per_token=True), Granularity.token()),
]


@pytest.mark.parametrize(("scheme", "granularity"), SCHEMES)
def test_a_scheme_knows_its_granularity_and_survives_json(scheme: QuantScheme, granularity: Granularity) -> None:
    assert scheme.granularity == granularity
    assert QuantScheme.model_validate_json(scheme.model_dump_json()) == scheme


def test_plans_of_former_versions_are_read() -> None:
    text = (
        '{"tensors": [{"name": "w", "role": "weight", "scale": [1.0], "zero_point": [0], "module": "",'
        ' "scheme": {"bits": 8, "signed": true, "symmetric": true, "axis": 0}}]}'
    )
    assert QuantPlan.model_validate_json(text).weights["w"].scheme.granularity == Granularity.channel(0)


def test_a_scheme_has_one_granularity() -> None:
    with pytest.raises(ConfigError, match="per_token is one scale per vector"):
        QuantScheme(per_token=True, axis=1)
    assert (QuantScheme(bits=16, signed=True).qmin, QuantScheme(bits=16).qmax) == (-32768, 65535)
