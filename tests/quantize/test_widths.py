from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tersor.errors import ConfigError, TersorError
from tersor.quantize.widths import FLOAT, Widths, weight_scheme

bits = st.integers(2, 8)


@given(weight=bits, activation=bits, edge=bits)
def test_the_edges_keep_at_least_their_own_bits(weight: int, activation: int, edge: int) -> None:
    widths = Widths(weight_bits=weight, activation_bits=activation, edge_bits=edge)
    assert widths.weight("any", edge=False) == weight
    assert widths.activation("any", edge=False) == activation
    assert widths.weight("any", edge=True) == max(weight, edge)
    assert widths.activation("any", edge=True) == max(activation, edge)


def test_the_first_pattern_that_fits_counts_also_at_the_edges() -> None:
    widths = Widths(weight_bits=4, overrides={"encoder.0": 6, "encoder.*": 3, "*.head": FLOAT, "stem": 2})
    assert widths.weight("encoder.0", edge=False) == 6
    assert widths.weight("encoder.01", edge=False) == 3
    assert widths.weight("model.head", edge=False) == FLOAT
    assert widths.weight("head", edge=False) == 4
    assert widths.weight("Stem", edge=False) == 4  # case counts on every system
    assert widths.weight("stem", edge=True) == 2
    assert Widths(overrides={"*": 5, "stem": 2}).weight("stem", edge=False) == 5


@pytest.mark.parametrize("wrong", [1, 0, -4, 9, 16, 31, 33])
def test_other_widths_are_refused(wrong: int) -> None:
    with pytest.raises((ConfigError, ValidationError), match="2 to 8 bits, or 32 for float"):
        Widths(overrides={"stem": 8, "head": wrong})
    for field in ("weight_bits", "activation_bits", "edge_bits"):
        with pytest.raises((TersorError, ValidationError), match=field):
            Widths(**{field: wrong})  # type: ignore[arg-type]


def test_a_pattern_that_fits_nothing_is_told_with_what_there_is() -> None:
    widths = Widths(overrides={"stem": 4, "hed": 4, "block*": 3})
    with pytest.raises(ConfigError, match=r"\['hed', 'block\*'\] fit no layer; .* are \['head', 'stem'\]"):
        widths.check_used(["stem", "head", "head"])
    Widths(overrides={"s*": 4}).check_used(["stem"])
    Widths().check_used([])


@given(width=bits, axis=st.sampled_from([None, 0, 1]), reduced=st.booleans())
def test_the_scheme_of_a_weight(width: int, axis: int | None, reduced: bool) -> None:
    scheme = weight_scheme(width, axis, reduced=reduced)
    assert (scheme.signed, scheme.symmetric, scheme.axis) == (True, True, axis)
    assert scheme.bits == (min(width, 7) if reduced else width)
