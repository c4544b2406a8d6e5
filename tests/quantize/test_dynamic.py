from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from low_bit_zoo import MODELS, TOKENS, Recurrent, context_of
from tersor.core.batch import select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.target import Target
from tersor.errors import ConfigError, NonFiniteError, UnsupportedError
from tersor.quantize import Dynamic
from tersor.quantize.run_time import rounded_at_run_time
from zoo import MLP_DATA, Mlp, Scaling, context_for, relative, seeded, state_hash


def dynamic(context: Context, **settings: object) -> Candidate:
    return Dynamic(**settings).apply(Candidate(frozen_copy(context.original)), context)


@pytest.mark.parametrize("model", MODELS)
def test_the_simulation_is_near_the_float_model_and_every_weight_on_its_grid(model: str) -> None:
    context = context_of(model)
    before = state_hash(context.original)
    done = dynamic(context)
    assert state_hash(context.original) == before
    assert done.precision == "int8-dynamic"
    assert done.plan is not None
    assert done.simulation is not None
    for path, quant in done.plan.weights.items():
        weight = done.module.get_parameter(path).detach()
        rows = quant.scheme.granularity.rows(weight)
        codes = rows / torch.tensor(quant.scale)[:, None]
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert codes.abs().amax(1).round().unique().tolist() == [127]
        assert len(quant.scale) == len(rows)
    batch = context.task.splits["calibrate"].batch(range(20))
    with torch.no_grad():
        found = done.simulation(*batch.tensors().values())
        expected = select_output(batch.call(context.original), context.task.output)
    assert 1e-5 < relative(found, expected) < 0.05


def test_an_activation_is_rounded_to_255_steps_of_its_own_range() -> None:
    values = torch.tensor([-1.0, 0.0, 0.5, 3.0])
    rounded = rounded_at_run_time(values)
    assert rounded[1] == 0
    assert float((rounded - values).abs().max()) <= 4 / 255 / 2 + 1e-6
    positive = torch.tensor([2.0, 3.0])  # zero is always inside
    assert float((rounded_at_run_time(positive) - positive).abs().max()) <= 3 / 255 / 2 + 1e-6
    assert torch.equal(rounded_at_run_time(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(rounded_at_run_time(torch.arange(3)), torch.arange(3))
    assert rounded_at_run_time(torch.zeros(0, 3)).shape == (0, 3)


def test_what_is_covered_is_told() -> None:
    done = dynamic(context_of("lstm"))
    assert done.plan is not None
    assert len(done.plan.weights) == 1 + 4 + 1
    assert "4 recurrent weights in int8" in done.history[-1].notes[0]
    assert not any("no speed-up" in note for note in done.history[-1].notes)
    convolutions = dynamic(context_of("cnn"))
    assert set(convolutions.plan.weights if convolutions.plan else ()) == {"head.weight"}
    assert any("convolutions stay float" in note for note in convolutions.history[-1].notes)


@pytest.mark.parametrize(("model", "runtime"), [("gru", "onnxruntime"), ("lstm", "openvino")])
def test_recurrent_layers_without_a_kernel_are_named(model: str, runtime: str) -> None:
    notes = dynamic(context_of(model, runtime)).history[-1].notes
    assert any(note.startswith("no speed-up expected from") and runtime in note for note in notes)


def test_embeddings_and_single_layers_may_stay_float() -> None:
    plan = dynamic(context_of("lstm"), embeddings=False, keep=("layer",)).plan
    assert plan is not None
    assert set(plan.weights) == {"head.weight"}
    plan = dynamic(context_of("lstm"), keep=("layer.weight_hh_*", "head")).plan
    assert plan is not None
    assert set(plan.weights) == {"embedding.weight", "layer.weight_ih_l0", "layer.weight_ih_l1"}
    with pytest.raises(ConfigError, match=r"keep: 'nothing' fits no layer; .*'embedding', 'head', 'layer'"):
        dynamic(context_of("lstm"), keep=("nothing",))


def test_tied_weights_are_planned_once_and_unused_ones_not_at_all() -> None:
    plan = dynamic(context_of("transformer")).plan
    assert plan is not None
    assert "embedding.weight" in plan.weights
    assert "head.weight" not in plan.weights
    dead = dynamic(context_for(seeded(Dead), MLP_DATA)).plan
    assert dead is not None
    assert set(dead.weights) == {"first.weight", "last.weight"}


def test_seven_bits_where_kernels_would_overflow() -> None:
    done = dynamic(context_of("lstm", reduce_range=True))
    assert done.plan is not None
    bits = {path: quant.scheme.bits for path, quant in done.plan.weights.items()}
    assert bits.pop("embedding.weight") == 8  # no products, no overflow
    assert set(bits.values()) == {7}
    assert any("7 bits" in note for note in done.history[-1].notes)


def test_a_step_after_it_starts_from_the_rounded_weights() -> None:
    done = dynamic(context_of("mlp"))
    again = done.for_weights()
    assert again.plan is None
    assert state_hash(again.module) == state_hash(done.module)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"quantize\.dynamic found no weight .* in Scaling"):
        dynamic(context_for(seeded(Scaling), MLP_DATA))
    with pytest.raises(UnsupportedError, match=r"takes float32 models, Mlp has \['torch.float64'\]"):
        dynamic(context_for(seeded(Mlp).double(), MLP_DATA.double()))
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter("first.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'first\.weight'"):
        dynamic(context_for(module, MLP_DATA))


class Dead(nn.Module):
    """Has a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.last = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(self.first(features))


class Packed(nn.Module):
    """Runs its LSTM on a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recurrent(layers=1)

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.inner.embedding(tokens)
        packed = nn.utils.rnn.pack_padded_sequence(values, torch.full((len(tokens),), 10), batch_first=True)
        return self.inner.head(self.inner.layer(packed)[1][0][0])


def test_packed_sequences_pass_unrounded() -> None:
    context = context_for(seeded(Packed), TOKENS, Target(threads=1, reduce_range=False))
    done = dynamic(context)
    assert done.simulation is not None
    with torch.no_grad():
        assert relative(done.simulation(TOKENS[:3]), context.original(TOKENS[:3])) < 0.05


def test_the_same_input_gives_the_same_plan() -> None:
    one, two = (dynamic(context_of("gru")) for _ in range(2))
    assert one.plan == two.plan
    assert replace(one, history=()).precision == two.precision
