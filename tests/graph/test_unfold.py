from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.batch import Batch
from tersor.errors import UnsupportedError
from tersor.graph import fold_batch_norm
from tersor.graph.unfold import keep_scales_positive, unfold_batch_norm, write_back
from tersor.quantize.placement import place
from tersor.quantize.styles import Style
from tersor.quantize.widths import Widths
from zoo import Cnn, captured, disturbed, normal, relative, seeded

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 7, 3, bias=False), nn.BatchNorm1d(7)), normal(6, 3, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU()), normal(6, 3, 6, 6)),
    "conv2d with bias": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3, 2, 1), nn.BatchNorm2d(7)), normal(6, 3, 6, 6)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 7, 2), nn.BatchNorm3d(7)), normal(6, 2, 4, 4, 4)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)), normal(6, 6, 6, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 7, 3), nn.BatchNorm2d(7)), normal(6, 3, 6, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7, eps=0.1)), normal(6, 6)),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7, affine=False)), normal(6, 3, 6, 6)),
    "own average": (lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7, momentum=None)), normal(6, 6)),
}


def unfolded(module: nn.Module, x: Tensor, *, quantizers: bool = False) -> tuple[fx.GraphModule, dict[str, _BatchNorm]]:
    """Folded, with disabled quantizers if asked, and unfolded again."""
    graph_module = captured(module, Batch((x[:2],), {}, None))
    folded = fold_batch_norm(graph_module)
    assert folded
    if quantizers:
        place(graph_module, Widths(), Style())
    return graph_module, unfold_batch_norm(graph_module, folded, module)


@pytest.mark.parametrize("quantizers", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_it_computes_what_the_module_does_with_the_modules_own_paths(
    case: str, quantizers: bool, noticed: Callable[[nn.Module], str]
) -> None:
    build, x = LAYERS[case]
    module = seeded(build)
    before = noticed(module)
    graph_module, norms = unfolded(module, x, quantizers=quantizers)
    assert noticed(module) == before
    with torch.no_grad():
        assert relative(graph_module(x), module(x)) < 1e-5
    assert set(norms) == {"1"}
    assert graph_module.get_submodule("1") is norms["1"]
    assert {path for path, _ in graph_module.named_parameters()} == {path for path, _ in module.named_parameters()}
    signs = module[1].weight.sign() if norms["1"].affine else torch.ones(len(norms["1"].running_mean))
    if norms["1"].affine:
        assert bool((module[1].weight < 0).any())
        assert torch.equal(norms["1"].weight, module[1].weight.abs())
    flat = [1] * (module[0].weight.ndim - 2)
    laid = signs.reshape(1, -1, *flat) if case == "transposed" else signs.reshape(-1, 1, *flat)
    assert torch.equal(graph_module.get_parameter("0.weight"), module[0].weight * laid)


@pytest.mark.parametrize("case", LAYERS)
def test_it_trains_as_the_module_does(case: str) -> None:
    build, x = LAYERS[case]
    module = seeded(build).train()
    graph_module, norms = unfolded(copy.deepcopy(module).eval(), x)
    graph_module.requires_grad_(True).train()
    assert norms["1"].training
    found, expected = graph_module(x), module(x)
    assert relative(found.detach(), expected.detach()) < 1e-5
    weights = normal(*expected.shape, seed=1)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(norms["1"].running_var, module[1].running_var, rtol=1e-4)
    if norms["1"].affine:
        turned = module[1].weight.grad * module[1].weight.sign()
        assert torch.allclose(norms["1"].weight.grad, turned, rtol=1e-3, atol=1e-4)
    gradient = graph_module.get_parameter("0.weight").grad
    assert gradient is not None
    assert torch.allclose(gradient.abs(), module[0].weight.grad.abs(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", LAYERS)
def test_what_was_trained_goes_back_into_the_module_and_folds_to_the_same_values(case: str) -> None:
    build, x = LAYERS[case]
    module = seeded(build)
    graph_module, norms = unfolded(module, x)
    graph_module.requires_grad_(True).train()
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        graph_module(x + step).square().mean().backward()
        optimizer.step()
        keep_scales_positive(norms)
    graph_module.eval()
    done = copy.deepcopy(module)
    write_back(graph_module, done)
    refolded = captured(done, Batch((x[:2],), {}, None))
    factors = fold_batch_norm(refolded)
    with torch.no_grad():
        expected = graph_module(x)
        assert relative(module(x), expected) > 1e-2  # it did learn something
        assert relative(done(x), expected) < 1e-5
        assert relative(refolded(x), expected) < 1e-5
    assert bool((factors["0.weight"].factor >= 0).all())
    assert int(done[1].num_batches_tracked) == int(module[1].num_batches_tracked) + 3


def test_channels_without_scale_or_variance_stay_finite() -> None:
    module = seeded(LAYERS["conv2d"][0])
    with torch.no_grad():
        module[1].weight[1] = 0
        module[1].weight[2] = -0.0
        module[1].running_var[3] = 0
    x = LAYERS["conv2d"][1]
    graph_module, norms = unfolded(module, x, quantizers=True)
    with torch.no_grad():
        assert relative(graph_module(x), module(x)) < 1e-5
    graph_module.requires_grad_(True).train()
    graph_module(x).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in graph_module.parameters())
    with torch.no_grad():
        norms["1"].weight[0] = -0.1
    keep_scales_positive(norms)
    assert norms["1"].weight[0].item() == 0


def test_nothing_stands_between_batch_norm_and_its_activation() -> None:
    module = seeded(Cnn)
    graph_module, norms = unfolded(module, normal(2, 3, 8, 8), quantizers=True)
    assert set(norms) == {"stem_norm", "block.1"}
    behind = {str(node.target): node for node in graph_module.graph.nodes if node.target in norms}
    (user,) = behind["stem_norm"].users
    assert user.target is torch.ops.aten.relu.default
    (user,) = behind["block.1"].users
    assert str(user.target).startswith("activation_quantizers")
    assert all(node.args[0].target is torch.ops.aten.conv2d.default for node in behind.values())


class OneNorm(nn.Module):
    """Two layers with biases of their own, one BatchNorm for both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.left(image)) + functional.relu(self.norm(self.right(image)))


class NormThatActs(nn.BatchNorm2d):
    """As timm has them: the activation function, here with a parameter, belongs to the BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.PReLU(channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.activation(super().forward(image))


@pytest.mark.parametrize(
    "build", [OneNorm, lambda: nn.Sequential(nn.Conv2d(3, 5, 3), NormThatActs(5), nn.Conv2d(5, 2, 1))]
)
def test_a_shared_norm_and_one_that_holds_more_keep_what_they_have(build: Callable[[], nn.Module]) -> None:
    module, x = seeded(build), normal(5, 3, 6, 6)
    graph_module, norms = unfolded(module, x)
    assert len(norms) == 1
    with torch.no_grad():
        assert relative(graph_module(x), module(x)) < 1e-5
    assert {path for path, _ in graph_module.named_parameters()} == {path for path, _ in module.named_parameters()}
    graph_module.train()
    module.train()
    assert relative(graph_module(x).detach(), module(x).detach()) < 1e-5
    graph_module.eval()
    done = seeded(build, seed=1)
    write_back(graph_module, done)
    with torch.no_grad():
        assert relative(done(x), graph_module(x)) < 1e-5


class Functional(nn.Module):
    """BatchNorm without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, features: Tensor) -> Tensor:
        return functional.batch_norm(self.layer(features), self.mean, self.variance)


def test_batch_norm_as_a_function_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"behind 'layer\.weight' is called as a function in .*BatchNorm of its"):
        unfolded(disturbed(Functional()).eval(), normal(4, 6))
