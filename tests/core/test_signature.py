from __future__ import annotations

from typing import Any

import pytest
import torch

from tersor.core.batch import Batch
from tersor.core.signature import Signature, TensorSpec, dynamic_dimensions, input_names, random_batch
from tersor.core.target import Target
from tersor.errors import ConfigError
from zoo import TEXT_DATA, TEXT_DYNAMIC, Mlp, Transformer, TwoInputs, context_for, normal, seeded, signature_for


def signature(*names: str) -> Signature:
    specs = [TensorSpec(name=name, dtype="float32", shape=["batch", 3]) for name in names]
    return Signature(inputs=specs, output=TensorSpec(name="output", dtype="float32", shape=["batch", 2]))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1, 2), {}), ((1,), {"b": 2}), ((), {"a": 1, "b": 2}), ((), {"b": 2, "a": 1})],
)
def test_inputs_are_arranged_by_position_and_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert signature("a", "b").arrange(args, kwargs) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1,), {}),
        ((1, 2, 3), {}),
        ((1, 2), {"b": 2}),
        ((1,), {"a": 2}),
        ((1,), {"c": 2}),
        ((1, 2), {"c": 3}),
        ((), {"a": 1, "b": 2, "c": 3}),
    ],
)
def test_inputs_that_do_not_fit_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"takes the inputs \['a', 'b'\], got {len(args)} positional"):
        signature("a", "b").arrange(args, kwargs)


def test_names_come_from_forward_and_from_the_keywords() -> None:
    x = normal(2, 12)
    assert input_names(seeded(Mlp), Batch((x,), {}, None)) == ["features"]
    assert input_names(seeded(TwoInputs), Batch((x,), {"table": x}, None)) == ["image", "table"]
    assert input_names(seeded(Transformer), Batch((), {"mask": x, "input_ids": x}, None)) == ["mask", "input_ids"]

    class Anything(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return inputs[0]

    assert input_names(Anything(), Batch((x, x), {}, None)) == ["input_0", "input_1"]


def test_dynamic_dimensions_are_the_batch_and_what_the_target_declares() -> None:
    assert dynamic_dimensions(["a", "b"], Target(dynamic={"b": {1: "t"}})) == {
        "a": {0: "batch"},
        "b": {0: "batch", 1: "t"},
    }
    with pytest.raises(ConfigError, match=r"\['a', 'b'\], got \['c'\]"):
        dynamic_dimensions(["a", "b"], Target(dynamic={"c": {1: "t"}}))


def test_a_signature_describes_inputs_output_and_what_varies() -> None:
    context = context_for(seeded(Transformer), TEXT_DATA, Target(dynamic=TEXT_DYNAMIC), output="logits")
    found = signature_for(context)
    assert [(spec.name, spec.dtype, spec.shape) for spec in found.inputs] == [
        ("mask", "int64", ["batch", "tokens", "tokens"]),
        ("input_ids", "int64", ["batch", "tokens"]),
    ]
    assert (found.output.dtype, found.output.shape[0], found.output.shape[-1]) == ("float32", "batch", 24)
    assert (found.by_name, found.select) == (True, "logits")
    assert Signature.model_validate_json(found.model_dump_json()) == found


def test_random_inputs_fit_the_signature() -> None:
    context = context_for(seeded(Transformer), TEXT_DATA, Target(dynamic=TEXT_DYNAMIC), output="logits")
    batch = random_batch(signature_for(context), 3, length=5)
    assert {name: tuple(tensor.shape) for name, tensor in batch.kwargs.items()} == {
        "mask": (3, 5, 5),
        "input_ids": (3, 5),
    }
    with torch.no_grad():
        assert batch.call(context.original)["logits"].shape == (3, 5, 24)


def test_an_unknown_dtype_is_refused() -> None:
    wrong = TensorSpec(name="a", dtype="float31", shape=["batch"])
    with pytest.raises(ConfigError, match="float31"):
        random_batch(Signature(inputs=[wrong], output=wrong), 1)
