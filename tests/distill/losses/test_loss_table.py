from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tersor.distill import losses
from tersor.distill.losses import LOSSES, check, settings_of
from tersor.distill.losses.crd import Crd
from tersor.errors import ConfigError
from zoo import normal


def test_the_table_is_the_namespace() -> None:
    assert list(LOSSES) == losses.__all__ == sorted(losses.__all__)
    assert all(getattr(losses, name) is kind.function for name, kind in LOSSES.items())
    assert LOSSES["crd"].function is Crd


def test_what_each_loss_needs() -> None:
    def those(attribute: str) -> set[str]:
        return {name for name, kind in LOSSES.items() if getattr(kind, attribute)}

    assert those("matching") == {"hint", "l2_cosine"}
    assert those("trainable") == {"crd"}
    assert those("needs_labels") == {"dkd"}
    assert set(LOSSES) - those("takes_mask") == {"attention_transfer"}
    outputs = {name for name, kind in LOSSES.items() if kind.on == "outputs"}
    assert outputs == {"dist", "dkd", "jsd", "kd", "logit_standardisation", "mse", "reverse_kl"}


@pytest.mark.parametrize("name", losses.__all__)
def test_every_keyword_is_a_setting_or_comes_with_the_batch(name: str) -> None:
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    keywords = {item.name for item in parameters if item.kind is item.KEYWORD_ONLY} - {"labels", "mask"}
    assert set(settings_of(name)) == keywords
    defaults = {key: value for key, value in settings_of(name).items() if value is not inspect.Parameter.empty}
    check(name, defaults | ({"heads": 2} if name == "minilm_relations" else {}))


def test_settings_of() -> None:
    assert settings_of("kd") == {"temperature": 4.0}
    assert settings_of("mse") == {}
    assert settings_of("dkd") == {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
    assert settings_of("crd") == {"width": 128, "temperature": 0.07, "channel_axis": None}
    assert settings_of("minilm_relations") == {"heads": inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hints", {}, "no distillation loss 'hints'; did you mean 'hint'"),
        ("zzzz", {}, r"no distillation loss 'zzzz'; expected one of \['attention_maps', "),
        ("kd", {"temprature": 2.0}, "kd has no setting 'temprature'; did you mean 'temperature'"),
        ("kd", {"zzzz": 2.0}, r"kd has no setting 'zzzz'; expected one of \['temperature'\]"),
        ("mse", {"temperature": 2.0}, "mse has no setting 'temperature'; it has none"),
        ("dkd", {"labels": 1}, "dkd has no setting 'labels'"),
        ("kd", {"mask": 1}, "kd has no setting 'mask'"),
        ("crd", {"student_width": 4}, "crd has no setting 'student_width'"),
        ("kd", {"temperature": 0}, "kd.temperature: expected a number above 0, got 0"),
        ("kd", {"temperature": float("inf")}, "kd.temperature: expected a number above 0, got inf"),
        ("kd", {"temperature": "4"}, "kd.temperature: expected a number above 0, got '4'"),
        ("kd", {"temperature": True}, "kd.temperature: expected a number above 0, got True"),
        ("rkd", {"angle": -1.0}, "rkd.angle: expected a number of at least 0, got -1.0"),
        ("jsd", {"beta": 1.0}, "jsd.beta: expected a number between 0 and 1, both excluded, got 1.0"),
        ("crd", {"width": 1.5}, "crd.width: expected a whole number of at least 1, got 1.5"),
        ("l2_cosine", {"channel_axis": True}, "l2_cosine.channel_axis: expected 1 or -1, or nothing, got True"),
        ("minilm_relations", {}, "minilm_relations.heads must be given: a whole number of at least 1"),
    ],
)
def test_check_refuses(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(name, settings)


@pytest.mark.parametrize(
    ("name", "settings"), [("kd", {"temperature": 0.0}), ("jsd", {"beta": 0.0}), ("rkd", {"distance": -1.0})]
)
def test_the_losses_themselves_refuse_too(name: str, settings: dict[str, float]) -> None:
    (setting,) = settings
    with pytest.raises(ConfigError, match=rf"{name}\.{setting}: expected a number"):
        LOSSES[name].function(normal(2, 3), normal(2, 3, seed=1), **settings)


def test_the_weights_of_a_trainable_loss_learn() -> None:
    module = LOSSES["crd"].function(6, 4)
    assert isinstance(module, torch.nn.Module)
    module(normal(5, 6), normal(5, 4, seed=1)).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())
