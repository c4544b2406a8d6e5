"""Weights in few bits in a safetensors file: PyTorch's runtimes decode them when they load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.errors import ArtifactError
from tersor.quantize import Half, WeightOnly
from tersor.runtimes import torch_storage
from tersor.runtimes.parity import check_parity
from tersor.runtimes.stored_weights import StoredWeight
from zoo import CNN_DATA, TEXT_DATA, TEXT_DYNAMIC, Cnn, Transformer, context_for, exported, seeded

STEPS: dict[str, Step] = {
    "int8": WeightOnly(bits=8, group_size=None),
    "int4": WeightOnly(bits=4, group_size=16),
    "int4 symmetric": WeightOnly(bits=4, group_size=16, symmetric=True),
    "int3": WeightOnly(bits=3, group_size=None),
    "float16": Half(format="float16"),
    "bfloat16": Half(format="bfloat16"),
}
BYTES = {"int8": 1.0, "int4": 0.5, "int4 symmetric": 0.5, "int3": 0.5, "float16": 2.0, "bfloat16": 2.0}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "cnn": (Cnn, CNN_DATA, {}),
    "transformer": (lambda: Transformer(width=64), TEXT_DATA, {"output": "logits"}),  # tied weights, names, a dict
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", STEPS)
def test_the_file_holds_the_codes_and_answers_like_the_rounded_model(
    how: str, model: str, tmp_path: Path, noticed: Callable[[nn.Module], str]
) -> None:
    build, data, fields = MODELS[model]
    module = seeded(build)
    target = Target("eager", threads=1, dynamic=TEXT_DYNAMIC if model == "transformer" else {})
    context = context_for(module, data, target, **fields)
    done = STEPS[how].apply(Candidate(module), context)
    assert done.plan is not None
    before = noticed(done.module)
    loaded = exported(done, context, tmp_path, model=lambda: done.module)
    assert check_parity(loaded, done, context.task.example) < 1e-6
    assert noticed(done.module) == before
    stored = torch_storage.read(tmp_path / "model.safetensors")
    parameters = dict(done.module.named_parameters())
    assert stored.precision == done.precision
    assert stored.weights.keys() == done.plan.weights.keys()
    assert stored.weights.keys() | stored.tensors.keys() == parameters.keys() | dict(done.module.named_buffers()).keys()
    for path, quant in done.plan.weights.items():
        expected, found = StoredWeight.of(quant, parameters[path]), stored.weights[path]
        shift = 0 if quant.scheme.bits == 8 else quant.scheme.qmin
        assert torch.equal(found.codes + shift, expected.codes)
        assert torch.equal(found.zero_point + shift, expected.zero_point)
        assert torch.equal(found.scale, expected.scale)
    if model == "transformer":
        size = sum(value.numel() for value in parameters.values()) * BYTES[how]
        assert size < (tmp_path / "model.safetensors").stat().st_size < size * 1.75 + 4500  # scales and the header


def test_weights_of_another_class_are_refused(tmp_path: Path) -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA, Target("eager", threads=1))
    done = WeightOnly(bits=8).apply(Candidate(frozen_copy(module)), context)
    loaded = exported(done, context, tmp_path, model=lambda: nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ArtifactError, match=r"do not fit the module .*missing are \['0\.weight'"):
        loaded()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**16))
def test_packing_keeps_every_code(shape: list[int], seed: int) -> None:
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed))
    packed = torch_storage._packed(codes)
    assert packed.numel() == (codes.numel() + 1) // 2
    assert torch.equal(torch_storage._unpacked(packed, shape).long(), codes)


def test_a_tied_weight_needs_one_name_only() -> None:
    module, other = seeded(Transformer), Transformer()
    state = dict(module.state_dict())
    del state["head.weight"]
    torch_storage.fill(other, state)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())
    del state["norm.bias"]
    with pytest.raises(RuntimeError, match=r"missing are \['norm\.bias'\], nobody asked for \['more'\]"):
        torch_storage.fill(other, state | {"more": torch.zeros(1)})
