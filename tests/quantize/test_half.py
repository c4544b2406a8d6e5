from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.target import Target
from tersor.errors import UnsupportedError
from tersor.quantize import Half
from tersor.runtimes import get_runtime
from tersor.runtimes.parity import check_parity
from zoo import CNN_DATA, MLP_DATA, Cnn, Mlp, context_for, exported, seeded, state_hash


@pytest.mark.parametrize(("kind", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_parameters_have_the_precision_of_the_format(kind: str, bits: int) -> None:
    module = seeded(Cnn)
    before = state_hash(module)
    done = Half(format=kind).apply(Candidate(module), context_for(module, CNN_DATA))  # type: ignore[arg-type]
    assert state_hash(module) == before
    assert done.precision == f"{kind}-weights"
    for path, parameter in done.module.named_parameters():
        original = module.get_parameter(path)
        assert torch.equal(parameter, parameter.to(getattr(torch, kind)).float()), path
        error = ((parameter - original).abs() / original.abs().clamp(min=1e-3)).max()
        assert error <= 2.0**-bits, path
    assert done.plan is not None
    assert set(done.plan.stored) == {path for path, _ in module.named_parameters()}
    assert done.plan.weight_bits == 16


def test_what_float16_cannot_hold_is_told() -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter("first.weight")[0, 0] = 1e6
    done = Half().apply(Candidate(module), context_for(module, MLP_DATA))
    assert "1 were larger" in done.history[-1].notes[1]
    assert float(done.module.get_parameter("first.weight")[0, 0].detach()) == 65504
    wide = Half(format="bfloat16").apply(Candidate(module), context_for(module, MLP_DATA))
    assert len(wide.history[-1].notes) == 1


def test_a_model_without_float32_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"quantize\.half: Identity has no float32 parameter"):
        Half().apply(Candidate(nn.Identity()), context_for(nn.Identity(), MLP_DATA))


class Wide(nn.Sequential):
    """Enough weights for the file's size to follow them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 4))


@pytest.mark.parametrize(
    ("runtime", "kind"), [("onnxruntime", "float16"), ("onnxruntime", "bfloat16"), ("openvino", "float16")]
)
def test_the_file_has_half_the_bytes_and_answers_alike(runtime: str, kind: str, tmp_path: Path) -> None:
    module = seeded(Wide)
    context = context_for(module, MLP_DATA, Target(runtime, threads=1))
    sizes = {}
    for name, candidate in (
        ("float32", Candidate(module)),
        (kind, Half(format=kind).apply(Candidate(module), context)),  # type: ignore[arg-type]
    ):
        (tmp_path / name).mkdir()
        loaded = exported(candidate, context, tmp_path / name)
        check_parity(loaded, candidate, context.task.example)
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.numel() >= 16)
    assert sizes["float32"] - sizes[kind] > 0.9 * 2 * weights - 2000  # two bytes less each, but for the casts


def test_openvino_has_no_bfloat16_and_says_so() -> None:
    with pytest.raises(UnsupportedError, match="bfloat16-weights, but runtime 'openvino' runs only"):
        get_runtime("openvino").check_supports(Half(format="bfloat16").precision, "quantize.half")
