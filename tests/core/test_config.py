from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tersor.core.budget import Budget
from tersor.core.config import Config
from tersor.core.quantization import QuantScheme
from tersor.core.target import Target
from tersor.distill import Recover
from tersor.errors import ConfigError, TersorError
from tersor.prune import Gradual, Unstructured
from tersor.quantize import Static
from tersor.train import Schedule

NAN = float("nan")
WRONG: list[tuple[Callable[..., Config], str, Any]] = [
    (Target, "runtime", 3),
    (Target, "device", "tpu"),
    (Target, "threads", 0),
    (Target, "threads", 1.5),
    (Target, "threads", "two"),
    (Target, "threads", 5000),
    (Target, "batch", 0),
    (Target, "batch", -3),
    (Target, "dynamic", ["x"]),
    (Target, "reduce_range", "yes"),
    (Budget, "max_drop", -0.01),
    (Budget, "max_drop", NAN),
    (Budget, "max_drop", "1%"),
    (Budget, "confidence", 0.0),
    (Budget, "confidence", 1.0),
    (Budget, "confidence", 95),
    (Budget, "minimise", "macs"),
    (Budget, "rounds", 0),
    (Static, "range_method", "median"),
    (Static, "samples", 0),
    (Static, "batch_size", 0),
    (Recover, "losses", "l1"),
    (Recover, "losses", []),
    (Recover, "losses", ["kd", "kd"]),
    (Recover, "losses", {"kd": {"temperature": 0.0}}),
    (Recover, "losses", {"kd": {"pairs": [["layer1", "layer1"]]}}),
    (Schedule, "epochs", 0),
    (Schedule, "epochs", 1.5),
    (Schedule, "lr", 0.0),
    (Schedule, "lr", NAN),
    (Schedule, "momentum", 1.0),
    (Schedule, "weight_decay", -1.0),
    (Schedule, "warmup", 0.0),
    (Schedule, "optimizer", "lion"),
    (Schedule, "clip_norm", 0.0),
    (Schedule, "batch_size", 0),
    (QuantScheme, "bits", 9),
    (QuantScheme, "bits", 1),
    (QuantScheme, "bits", 12),
    (QuantScheme, "group_size", 0),
]
PRUNING: list[tuple[str, Any]] = [
    ("sparsity", 1.0),
    ("sparsity", 1.5),
    ("sparsity", -0.1),
    ("sparsity", NAN),
    ("sparsity", "half"),
    ("floor", 1.0),
    ("floor", -0.5),
    ("criterion", "hessian"),
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG)
def test_a_wrong_value_is_refused_naming_field_and_value(kind: Callable[..., Config], field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{field: value})
    assert f"{kind.__name__}.{field}" in str(caught.value)  # type: ignore[attr-defined]
    assert f"got {value!r}" in str(caught.value)
    assert isinstance(caught.value, TersorError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("field", "value"), PRUNING)
def test_a_wrong_pruning_value_is_refused_naming_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Unstructured\.{field}.*got {re.escape(repr(value))}"):
        Unstructured(**{"sparsity": 0.5, field: value})


def test_a_missing_value_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Gradual\.sparsity: Field required$"):
        Gradual()  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [Target, Budget, Static, Recover, Schedule])
def test_an_unknown_field_is_refused_by_name(kind: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\.sparsity.*got 0\.5"):  # type: ignore[attr-defined]
        kind(sparsity=0.5)


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"Target\.threads.*Target\.batch"):
        Target(threads=0, batch=0)


def test_a_wrong_value_inside_a_mapping_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Target\.dynamic\.x\.1: .*got 2"):
        Target(dynamic={"x": {1: 2}})


def test_a_wrong_value_inside_a_step_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Recover\.schedule.*Schedule\.lr.*got -1"):
        Recover(schedule={"lr": -1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [Target(threads=1), Budget(), Static(), Recover(), Unstructured(sparsity=0.5)])
def test_a_configuration_is_frozen_and_survives_json(config: Config) -> None:
    field = next(iter(type(config).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, field, getattr(config, field))
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_defaults_are_the_documented_ones() -> None:
    budget, target = Budget(), Target()
    assert (budget.max_drop, budget.confidence, budget.minimise) == (0.01, 0.95, "latency")
    assert (target.runtime, target.device, target.batch, target.reduce_range) == ("onnxruntime", "cpu", 1, None)
    assert target.threads >= 1
    assert Target("openvino", threads=2).runtime == "openvino"
