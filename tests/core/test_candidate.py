from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.candidate import Candidate, apply_masks, check_finite_weights, cut_masks, frozen_copy
from tersor.core.surgery import Cut, Shrink, Surgery
from tersor.errors import NonFiniteError
from zoo import CNN_DATA, MLP_DATA, Cnn, Mlp, Transformer, context_for, normal, quantized, seeded, state_hash


class Blur(nn.Module):
    """A fixed kernel that is a buffer, as in anti-aliased networks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(3, 1, 3, 3))
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(functional.conv2d(image, self.get_buffer("kernel"), groups=3)).mean((2, 3))


def test_for_weights_copies() -> None:
    candidate = Candidate(seeded(Mlp))
    fresh = candidate.for_weights()
    assert state_hash(fresh.module) == state_hash(candidate.module)
    with torch.no_grad():
        fresh.module.get_parameter("first.weight").zero_()
    assert candidate.module.get_parameter("first.weight").abs().sum() > 0


def test_for_weights_after_quantization_starts_from_the_rounded_weights() -> None:
    module = seeded(Mlp)
    candidate = quantized(module, context_for(module, MLP_DATA))
    fresh = candidate.for_weights()
    assert (fresh.plan, fresh.simulation, fresh.precision) == (None, None, "float32")
    assert fresh.runnable is fresh.module
    assert candidate.plan is not None
    assert set(candidate.plan.weights) == {"first.weight", "second.weight", "last.weight"}
    for path, quant in candidate.plan.weights.items():
        scale = torch.tensor(quant.scale)[:, None]
        before, after = module.get_parameter(path), fresh.module.get_parameter(path)
        assert not torch.equal(before, after)
        assert torch.equal(after, (before / scale).round() * scale)
        assert (after - before).abs().max() <= scale.max() / 2 * 1.0001
    for path in ("first.bias", "second.bias"):
        assert torch.equal(module.get_parameter(path), fresh.module.get_parameter(path))
    assert state_hash(fresh.module) == state_hash(candidate.module)
    assert fresh.module is not candidate.module


def test_for_weights_undoes_the_folding_of_batch_norm() -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA)
    first = quantized(module, context)
    fresh = first.for_weights()
    again = quantized(fresh.module, context)
    assert first.simulation is not None
    assert again.simulation is not None
    assert first.plan is not None
    for path in first.plan.weights:
        name = path.replace(".", "_")
        codes = [
            simulation.get_submodule(f"weight_quantizers.{name}").codes(simulation.get_parameter(path))  # type: ignore[operator]
            for simulation in (first.simulation, again.simulation)
        ]
        assert torch.equal(*codes), path  # the stored weights were already on the grid


def test_for_weights_rounds_a_kernel_that_is_a_buffer() -> None:
    module = seeded(Blur)
    candidate = quantized(module, context_for(module, normal(20, 3, 6, 6)))
    assert candidate.plan is not None
    quant = candidate.plan.weights["kernel"]
    scale = torch.tensor(quant.scale).reshape(-1, 1, 1, 1)
    kernel = module.get_buffer("kernel")
    assert torch.equal(candidate.for_weights().module.get_buffer("kernel"), (kernel / scale).round() * scale)


def test_masks_zero_exactly_the_masked_entries() -> None:
    module = seeded(Mlp)
    before = module.get_parameter("first.weight").clone()
    mask = normal(16, 12) > 0
    apply_masks(module, {"first.weight": mask})
    after = module.get_parameter("first.weight")
    assert torch.equal(after[mask], before[mask])
    assert (after[~mask] == 0).all()


def test_masks_are_cut_along_every_dimension() -> None:
    cuts = [
        Cut(parameter="first.weight", dim=0, size=16, kept=(0, 5)),
        Cut(parameter="second.weight", dim=1, size=16, kept=(0, 5)),
        Cut(parameter="second.weight", dim=0, size=16, kept=(1, 2, 3)),
    ]
    surgery, module = Surgery(cuts=tuple(cuts)), seeded(Mlp)
    masks = {name: normal(*parameter.shape) > 0 for name, parameter in module.named_parameters()}
    found = cut_masks({**masks, "gone.weight": torch.ones(3, dtype=torch.bool)}, surgery, module)
    assert set(found) == set(masks)
    assert torch.equal(found["first.weight"], masks["first.weight"][[0, 5]])
    assert torch.equal(found["second.weight"], masks["second.weight"][[1, 2, 3]][:, [0, 5]])
    assert torch.equal(found["last.weight"], masks["last.weight"])


def test_the_mask_of_a_tied_weight_is_cut_under_each_of_its_names() -> None:
    module = seeded(Transformer)
    mask = normal(24, 16) > 0
    surgery = Surgery(cuts=(Cut(parameter="embedding.weight", dim=1, size=16, kept=(3, 4)),))
    found = cut_masks({"embedding.weight": mask, "head.weight": mask}, surgery, module)
    assert all(torch.equal(found[name], mask[:, [3, 4]]) for name in ("embedding.weight", "head.weight"))


def test_masks_follow_layers_that_are_numbered_anew() -> None:
    module = nn.Sequential(nn.ModuleList([nn.Linear(2, 2) for _ in range(2)]))
    masks = {f"0.{number}.weight": normal(2, 2, seed=number) > 0 for number in range(4)}
    found = cut_masks(masks, Surgery(shrunk=(Shrink(path="0", size=4, kept=(1, 3)),)), module)
    assert set(found) == {"0.0.weight", "0.1.weight"}
    assert torch.equal(found["0.1.weight"], masks["0.3.weight"])


def test_surgeries_add_up_and_outlive_quantization() -> None:
    module, surgery = seeded(Mlp), Surgery()
    candidate = Candidate(module).after(surgery, module).after(surgery, module)
    assert candidate.surgeries == (surgery, surgery)
    assert candidate.for_weights().surgeries == (surgery, surgery)


def test_the_history_grows_without_touching_the_old_candidate() -> None:
    candidate = Candidate(seeded(Mlp))
    later = candidate.record("a", {"x": 1}, 0.5, ["note"]).record("b", {}, 0.1, [])
    assert candidate.history == ()
    assert [(record.name, record.notes) for record in later.history] == [("a", ["note"]), ("b", [])]


@pytest.mark.parametrize("path", ["block.0.weight", "stem_norm.running_var", "head.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_or_buffer_is_named(path: str, value: float) -> None:
    module = seeded(Cnn)
    check_finite_weights(module)
    module.state_dict()[path].flatten()[0] = value
    with pytest.raises(NonFiniteError, match=rf"'{path}' must be finite, but 1 of"):
        check_finite_weights(module)


def test_a_frozen_copy_is_evaluating_and_separate(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn).train().requires_grad_(True)
    before = noticed(module)
    copy = frozen_copy(module)
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    with torch.no_grad():
        copy.get_parameter("head.weight").zero_()
    assert noticed(module) == before
