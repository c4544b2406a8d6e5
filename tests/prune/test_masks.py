from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import ModelError
from tersor.prune import masks as keep_masks
from tersor.prune import unstructured
from zoo import CNN_DATA, Cnn, Mlp, Transformer, integers, seeded

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.001, momentum=0.9),
}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(module(CNN_DATA), integers(5, 48)).backward()
        optimizer.step()
    module.eval()


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_momentum_does_not_revive_what_is_held(kind: str) -> None:
    build: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS[kind]
    module = seeded(Cnn)
    optimizer = build(module.parameters())
    train(module, optimizer)  # momentum of all weights, also of those that go
    report = unstructured(module, 0.7, inplace=True)
    with keep_masks.hold(module, report.masks, optimizer):
        train(module, optimizer)
        keep_masks.check(module, report.masks)
        for path, mask in report.masks.items():
            assert (module.get_parameter(path)[mask] != 0).any()
    train(module, optimizer, steps=1)  # let go: momentum moves them
    with pytest.raises(ModelError, match=r"masked weights of '.*' are not zero any more; .*hold"):
        keep_masks.check(module, report.masks)
    assert keep_masks.finalize(module, report.masks) is module
    keep_masks.check(module, report.masks)


def test_masks_that_grow_hold_from_the_next_step_on() -> None:
    module = seeded(Cnn)
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    masks = dict(unstructured(module, 0.3).masks)
    with keep_masks.hold(module, masks, optimizer):
        keep_masks.check(module, masks)
        masks |= unstructured(module, 0.6, masks=masks).masks
        train(module, optimizer, steps=1)
        keep_masks.check(module, masks)
    assert keep_masks.sparsity_of(masks) == pytest.approx(0.6, abs=0.001)


def test_a_state_dict_carries_the_masks() -> None:
    report = unstructured(seeded(Cnn), 0.7)
    stream = io.BytesIO()
    torch.save({"model": report.model.state_dict(), "masks": report.masks}, stream)
    stream.seek(0)
    stored = torch.load(stream, weights_only=True)
    loaded = Cnn()
    loaded.load_state_dict(stored["model"])
    keep_masks.check(loaded, stored["masks"])
    found = keep_masks.from_zeros(loaded)
    assert set(found) == set(report.masks)
    assert all(torch.equal(found[path], mask) for path, mask in report.masks.items())
    assert keep_masks.from_zeros(seeded(Cnn)) == {}


def test_tied_weights_stay_tied() -> None:
    report = unstructured(seeded(Transformer), 0.5)
    model = report.finalize()
    assert model.get_parameter("head.weight") is model.get_parameter("embedding.weight")
    assert ("head.weight" in report.masks) != ("embedding.weight" in report.masks)


def test_masks_of_another_model_are_told() -> None:
    masks = unstructured(seeded(Mlp), 0.5).masks
    with pytest.raises(ModelError, match=r"'first\.weight' has a mask, but Cnn has no such parameter"):
        keep_masks.check(seeded(Cnn), masks)
    with pytest.raises(ModelError, match=r"shape \(9, 16\), its mask \(4, 16\)"):
        keep_masks.check(Mlp(classes=9), {"last.weight": masks["last.weight"]})
