from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import ConfigError
from tersor.quantize.formats.packing import pack, packed_bytes, unpack


@given(st.integers(1, 16).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
def test_codes_come_back_in_as_few_bytes_as_can_be(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_the_layout() -> None:
    assert pack(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00_11_10_01, 0b10]
    assert pack(torch.tensor([0xA, 0x5, 0xF]), 4).tolist() == [0x5A, 0x0F]
    assert pack(torch.tensor([0b111, 0b001, 0b110]), 3).tolist() == [0b10_001_111, 0b1]
    assert pack(torch.tensor([0x1234]), 16).tolist() == [0x34, 0x12]
    codes = torch.tensor([5, 1, 7, 0, 3, 3, 6, 2])
    stream = sum(int(code) << 3 * index for index, code in enumerate(codes))
    assert pack(codes.to(torch.uint8), 3).tolist() == list(stream.to_bytes(3, "little"))


@pytest.mark.parametrize("codes", [[-1], [16], [3, 17]])
def test_codes_that_do_not_fit_are_refused(codes: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"expected codes from 0 to 15 \(4 bits\), got"):
        pack(torch.tensor(codes), 4)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 2 bytes for 5 codes of 3 bits, got 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), 3, 5)
