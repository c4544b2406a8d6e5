from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from tersor.errors import ConfigError
from tersor.quantize import additive_powers_of_two, power_of_two
from tersor.quantize.formats.powers import additive_levels, power_of_two_levels
from zoo import normal


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("largest", [0.74, 0.75, 1.0, 1.4999, 1.5, 3.7, 1e-5])
def test_powers_are_those_of_inq(bits: int, largest: float) -> None:
    first = math.floor(math.log2(4 * largest / 3))
    last = first + 1 - 2 ** (bits - 1) // 2
    expected = {0.0} | {sign * 2.0**power for sign in (1, -1) for power in range(last, first + 1)}
    found = power_of_two(torch.tensor([largest, -largest / 2, 0.0]), bits)
    assert found.scale is not None
    assert set((power_of_two_levels(bits) * float(found.scale)).tolist()) == expected
    assert len(power_of_two_levels(bits)) == 2 ** (bits - 1) + 1


def test_inq_rounds_in_the_middle() -> None:
    """Equation 4: β where (α + β) / 2 ≤ |w| < 3β / 2."""
    tensor = torch.tensor([1.0, 0.76, 0.74, 0.38, 0.37, 0.126, 0.124, 0.06, -0.76])
    found = power_of_two(tensor, 4).dequantize().tolist()
    assert found == [1.0, 1.0, 0.5, 0.5, 0.25, 0.125, 0.125, 0.0, -1.0]


def paper_sums(terms: int, base: int) -> set[Fraction]:
    """Equation 5 of Li et al. 2020, unscaled."""
    each = [
        [Fraction(0), *(Fraction(1, 2 ** (first + step * terms)) for step in range(2**base - 1))]
        for first in range(terms)
    ]
    return {sum(chosen, Fraction(0)) for chosen in itertools.product(*each)}


@pytest.mark.parametrize(("bits", "base"), [(3, 2), (5, 2), (7, 2), (4, 3), (7, 3), (4, 1), (8, 1), (8, 7)])
def test_sums_are_those_of_the_paper(bits: int, base: int) -> None:
    sums = paper_sums((bits - 1) // base, base)
    expected = sorted({sign * value / max(sums) for value in sums for sign in (1, -1)})
    found = additive_levels(bits, base)
    assert len(found) == 2**bits - 1
    assert torch.allclose(found, torch.tensor([float(value) for value in expected], dtype=torch.float64), atol=1e-15)


def test_odd_magnitudes_have_a_term_of_one_bit() -> None:
    """The level sets of the authors for three and five bits of magnitude, written down by their exponents."""
    for bits, exponents in {4: [[0, 1, 3], [2]], 6: [[0, 2, 5], [1, 3, 6], [4]]}.items():
        terms = [[0.0, *(2.0**-exponent for exponent in term)] for term in exponents]
        sums = sorted({sum(chosen) for chosen in itertools.product(*terms)})
        found = additive_levels(bits)
        assert torch.allclose(found[found >= 0], torch.tensor(sums, dtype=torch.float64) / sums[-1])
        assert len(found) == 2**bits - 1


def test_one_bit_terms_are_uniform() -> None:
    assert torch.allclose(additive_levels(4, 1), torch.arange(-7, 8, dtype=torch.float64) / 7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_symmetric_distinct_and_fit(bits: int) -> None:
    for levels in (power_of_two_levels(bits), additive_levels(bits)):
        assert len(levels) <= 2**bits
        assert torch.equal(levels, -levels.flip(0))
        assert bool((levels.diff() > 0).all())


def test_sums_are_finer_than_powers() -> None:
    tensor = normal(1000)
    assert additive_powers_of_two(tensor, 5).error(tensor) < power_of_two(tensor, 5).error(tensor)
    errors = [additive_powers_of_two(tensor, bits).error(tensor) for bits in (3, 4, 5, 6)]
    assert errors == sorted(errors, reverse=True)


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match="expected base_bits that divide the 5 bits of a magnitude, or 2, got 3"):
        additive_powers_of_two(normal(3), 6, base_bits=3)
    with pytest.raises(ConfigError, match="expected base_bits"):
        additive_powers_of_two(normal(3), base_bits=0)
    for quantized in (additive_powers_of_two, power_of_two):
        with pytest.raises(ConfigError, match="expected 2 to 8 bits, got 1"):
            quantized(normal(3), 1)
