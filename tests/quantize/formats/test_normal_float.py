from __future__ import annotations

import pytest
import torch

from tersor.errors import ConfigError
from tersor.quantize import Granularity, normal_float, uniform
from tersor.quantize.formats.normal_float import normal_levels
from zoo import normal

NF4 = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_four_bits_are_the_published_levels() -> None:
    assert torch.allclose(normal_levels(4), torch.tensor(NF4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_table_uses_all_codes_and_has_the_ends_and_zero(bits: int) -> None:
    levels = normal_levels(bits)
    assert len(levels) == 2**bits
    assert bool((levels.diff() > 0).all())
    assert levels[[0, 2 ** (bits - 1) - 1, -1]].tolist() == [-1.0, 0.0, 1.0]


def test_blocks_have_a_scale_each_whatever_the_shape() -> None:
    tensor = normal(3, 50)
    found = normal_float(tensor)
    assert found.scale is not None
    assert torch.equal(found.scale, torch.stack([part.abs().max() for part in tensor.flatten().split(64)]))
    assert found.size_bytes == 75 + 3 * 4
    level = min(range(16), key=lambda code: abs(NF4[code] - float(tensor[1, 20] / found.scale[1])))
    assert int(found.codes[1, 20]) == level


def test_it_suits_normal_weights_better_than_equal_steps() -> None:
    tensor = normal(64, 256)
    equal = uniform(tensor, 4, granularity=Granularity.block(64)).error(tensor)
    assert normal_float(tensor).error(tensor) < 0.97 * equal


def test_scales_in_eight_bits_cost_little() -> None:
    tensor = normal(64, 512) * normal(64, 1, seed=1).exp()
    plain, double = normal_float(tensor), normal_float(tensor, double=True)
    assert double.scale_code is not None
    assert plain.size_bytes == 64 * 512 // 2 + 4 * 512
    assert double.size_bytes == 64 * 512 // 2 + 512 + 2 * 4 + 4  # codes; scales, their scales, their mean
    assert double.error(tensor) < 1.1 * plain.error(tensor)
    assert torch.equal(double.encode(double.dequantize()), double.codes)


def test_blocks_of_zeros_stay_zero_with_double_scales() -> None:
    tensor = normal(4, 64)
    tensor[1] = 0
    assert bool((normal_float(tensor, double=True).dequantize()[1] == 0).all())


def test_wrong_bits_are_told() -> None:
    with pytest.raises(ConfigError, match="expected 2 to 8 bits, got 9"):
        normal_float(normal(3), 9)
