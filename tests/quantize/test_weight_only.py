from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from low_bit_zoo import MODELS, TOKENS, context_of
from tersor.core.batch import select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.split import Split
from tersor.errors import ConfigError, DataError, NonFiniteError, UnsupportedError
from tersor.probe.recurrent import recurrent_rows
from tersor.quantize import WeightOnly
from tersor.quantize.weight_only import fitting_group
from zoo import MLP_DATA, Mlp, Scaling, context_for, normal, relative, seeded, state_hash


def rounded(context: Context, **settings: object) -> Candidate:
    return WeightOnly(**settings).apply(Candidate(frozen_copy(context.original)), context)


def error(done: Candidate, context: Context) -> float:
    batch = context.task.splits["calibrate"].batch(range(48))
    with torch.no_grad():
        found = select_output(batch.call(done.module), context.task.output)
        return relative(found, select_output(batch.call(context.original), context.task.output))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", [{}, {"bits": 3, "symmetric": True, "group_size": None}, {"bits": 8}], ids=str)
def test_every_weight_is_on_the_grid_that_the_plan_tells(model: str, settings: dict[str, object]) -> None:
    context = context_of(model)
    before = state_hash(context.original)
    done = rounded(context, **settings)
    assert state_hash(context.original) == before
    assert done.plan is not None
    assert done.simulation is None
    assert done.precision == ("int8-weights" if settings.get("bits") == 8 else "int4-weights")
    for path, quant in done.plan.weights.items():
        scheme, weight = quant.scheme, done.module.get_parameter(path).detach()
        rows = scheme.granularity.rows(weight)
        codes = rows / torch.tensor(quant.scale)[:, None] + torch.tensor(quant.zero_point)[:, None]
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert scheme.qmin <= int(codes.round().min())
        assert int(codes.round().max()) <= scheme.qmax
        assert len(quant.scale) == len(rows)
    assert 1e-4 < error(done, context) < (0.35 if settings.get("bits") == 3 else 0.15)


@pytest.mark.parametrize(
    ("inputs", "wanted", "found"),
    [(64, 32, 32), (32, 32, None), (12, 32, None), (48, 32, 16), (100, 32, None), (96, 64, 48), (24, 8, 8)],
)
def test_groups_are_those_that_fit(inputs: int, wanted: int, found: int | None) -> None:
    assert fitting_group(inputs, wanted) == found


def test_layers_that_take_other_groups_are_named() -> None:
    notes = rounded(context_of("lstm")).history[-1].notes
    assert any(note.startswith("groups of 16 instead of 32") and "layer.weight_hh_l0" in note for note in notes)
    with pytest.raises(ConfigError, match=r"group_size: 7 divides the inputs of no layer, which are \[12, 16\]"):
        rounded(context_of("mlp"), group_size=7)


def test_convolutions_get_eight_bits() -> None:
    done = rounded(context_of("cnn"))
    assert done.plan is not None
    bits = {path: quant.scheme.bits for path, quant in done.plan.weights.items()}
    assert bits == {"stem.weight": 8, "block.0.weight": 8, "head.weight": 4}
    assert any("2 convolutions in int8" in note for note in done.history[-1].notes)


@pytest.mark.parametrize("model", ["mlp", "lstm", "gru", "conv1d of transformers"])
def test_gptq_errs_less_than_nearest_on_what_it_saw(model: str) -> None:
    context = context_of(model)
    nearest, gptq = (rounded(context, bits=3, method=method) for method in ("nearest", "gptq"))
    assert error(gptq, context) < 0.9 * error(nearest, context)


def test_hqq_errs_less_in_its_own_norm() -> None:
    context = context_of("mlp")
    losses = []
    for method in ("nearest", "hqq"):
        done = rounded(context, bits=2, method=method)
        losses.append(
            sum(
                float((done.module.get_parameter(path) - context.original.get_parameter(path)).abs().pow(0.7).sum())
                for path in (done.plan.weights if done.plan else ())
            )
        )
    assert losses[1] < losses[0]


def test_later_layers_are_calibrated_on_what_the_rounded_ones_before_give() -> None:
    """With a first layer that rounding destroys, the second sees other inputs than the float model would show."""
    context = context_of("mlp")
    both = rounded(context, bits=2, method="gptq")
    alone = rounded(context, bits=2, method="gptq", keep=("first",))
    second = "second.weight"
    assert not torch.equal(both.module.get_parameter(second), alone.module.get_parameter(second))


def test_what_no_call_shows_is_rounded_to_nearest_and_named() -> None:
    notes = rounded(context_of("attention"), method="gptq").history[-1].notes
    assert any("attention.in_proj_weight" in note and "rounded to nearest" in note for note in notes)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_of_recurrent_layers_are_inputs_and_earlier_states(kind: type[nn.RNNBase], bidirectional: bool) -> None:
    layer = seeded(lambda: kind(5, 7, 2, batch_first=True, bidirectional=bidirectional))
    assert isinstance(layer, nn.RNNBase)
    values, states = normal(3, 4, 5), normal(4 if bidirectional else 2, 3, 7, seed=1)
    hx = (states, normal(*states.shape, seed=2)) if kind is nn.LSTM else states
    with torch.no_grad():
        output = layer(values, hx)[0]
    assert torch.equal(recurrent_rows(layer, "weight_ih_l0", values, hx), values.transpose(0, 1).reshape(-1, 5))
    before = recurrent_rows(layer, "weight_hh_l1", values, hx).reshape(4, 3, 7)
    assert torch.allclose(before[0], states[2 if bidirectional else 1])
    assert torch.allclose(before[1:], output.transpose(0, 1)[:-1, :, :7], atol=1e-6)
    if bidirectional:
        before = recurrent_rows(layer, "weight_hh_l1_reverse", values, hx).reshape(4, 3, 7)
        assert torch.allclose(before[-1], states[3])
        assert torch.allclose(before[:-1], output.transpose(0, 1)[1:, :, 7:], atol=1e-6)
    state = torch.get_rng_state()
    found = recurrent_rows(layer, "weight_ih_l1", values)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (12, 14 if bidirectional else 7)


def test_bad_data_and_models_are_refused() -> None:
    data = MLP_DATA.clone()
    data[20, 3] = math.nan
    with pytest.raises(NonFiniteError, match="calibration batch 1"):
        rounded(context_for(seeded(Mlp), data), method="gptq")
    with pytest.raises(DataError, match=r"quantize\.weight_only needs a 'calibrate' split"):
        rounded(context_for(seeded(Mlp), None, report=MLP_DATA), method="gptq")
    assert rounded(context_for(seeded(Mlp), None, report=MLP_DATA)).plan is not None  # nearest needs none
    with pytest.raises(UnsupportedError, match="found no weight"):
        rounded(context_for(seeded(Scaling), MLP_DATA))
    with pytest.raises(ConfigError, match="bits"):
        WeightOnly(bits=5)  # type: ignore[arg-type]
    assert isinstance(context_of("lstm").task.splits["calibrate"], Split)
    assert TOKENS.shape == (48, 10)


class Shared(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(features)))


def test_a_layer_that_is_called_twice_is_seen_twice() -> None:
    context = context_for(seeded(Shared), MLP_DATA)
    assert error(rounded(context, bits=3, method="gptq"), context) < error(rounded(context, bits=3), context)
