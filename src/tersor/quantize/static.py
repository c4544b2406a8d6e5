"""Post-training static quantization: ranges from a few hundred examples, no training.

Weights int8, symmetric, one scale per output channel (absolute maximum over the largest code); activations
uint8, affine, one scale per tensor; biases int32. BatchNorm is folded first. Jacob et al. 2018,
https://arxiv.org/abs/1712.05877; Nagel et al. 2021, https://arxiv.org/abs/2106.08295.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.machine import saturates_int8
from tersor.core.quantization import QuantPlan, QuantScheme, TensorQuant
from tersor.core.signature import dynamic_dimensions, input_names
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.errors import DataError, UnsupportedError
from tersor.graph import FakeQuantize, capture, fold_batch_norm
from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.lower import bias_scale, quantizer_of, round_bias
from tersor.graph.rules import COMPUTE
from tersor.probe import histograms
from tersor.quantize import ranges
from tersor.quantize.placement import Placement, place
from tersor.quantize.ranges.base import Points

FULL_RANGE = QuantScheme(bits=8, signed=True, symmetric=True)
REDUCED_RANGE = QuantScheme(bits=7, signed=True, symmetric=True)
BIAS_ROOM = 2**30  # half of int32: the other half is for the products that are added
CAPTURE_BATCH = 2  # a batch of one would be baked into the graph


class Static(Step):
    """Quantizes to int8 with ranges fixed on the calibrate split.

    `range_method` chooses the activations' ranges: `minmax`, `moving_average` of the batches, `percentile` (99.99 %),
    `mse` or `entropy`. `samples` limits how many calibration examples are used.
    """

    name: ClassVar[str] = "quantize.static"
    kind: ClassVar[Kind] = "quantize"

    range_method: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "mse"
    samples: int = Field(default=300, ge=1)
    batch_size: int = Field(default=50, ge=1)

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split."""
        return frozenset({"calibrate"})

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return "int8"

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Captures, folds, places, calibrates; the result carries the plan and its simulation."""
        started = time.perf_counter()
        split = context.task.require("calibrate", self.name)
        kinds = {tensor.dtype for tensor in candidate.module.parameters() if tensor.is_floating_point()}
        if kinds - {torch.float32}:
            raise UnsupportedError(
                f"{self.name} takes float32 models, {type(candidate.module).__name__} has {sorted(map(str, kinds))}; "
                "call model.float() first"
            )
        example = context.task.example(CAPTURE_BATCH)
        names = input_names(candidate.module, example)
        simulation = capture(
            candidate.module,
            example,
            names=names,
            dynamic=dynamic_dimensions(names, context.target),
            output=context.task.output,
        )
        factors = fold_batch_norm(simulation)
        reduce = context.target.reduce_range
        reduce = saturates_int8() if reduce is None else reduce
        placement = place(simulation, REDUCED_RANGE if reduce else FULL_RANGE)
        if not placement.weights:
            raise UnsupportedError(
                f"{self.name} found no layer that it can quantize in {type(candidate.module).__name__}: it covers "
                "convolutions and linear layers; this model has none in its forward pass"
            )

        def batches() -> list[Batch]:
            chosen = range(min(self.samples, len(split)))
            return [split.batch(chosen[start : start + self.batch_size]) for start in chosen[:: self.batch_size]]

        unreached = _set_activation_ranges(simulation, placement, self.range_method, batches)
        _set_weight_ranges(simulation, placement)
        _make_room_for_biases(simulation)
        _round_biases(simulation)
        plan = _plan(simulation, placement, factors)
        notes = [
            f"{len(placement.weights)} weights and {len(placement.activations) - len(unreached)} activations in int8, "
            f"ranges by {self.range_method} on {min(self.samples, len(split))} examples",
            *(["weights reduced to 7 bits: int8 kernels overflow on x86 without VNNI"] if reduce else []),
            *(f"never reached in calibration, stays float: {name}" for name in unreached),
        ]
        done = replace(candidate, plan=plan, simulation=simulation)
        return done.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)


def _set_activation_ranges(simulation: fx.GraphModule, placement: Placement, method: str, batches: object) -> list[str]:
    """Calibrates the activations; returns the names of those that no example reached."""
    assert callable(batches)  # noqa: S101 - a closure of `apply`
    found = histograms(simulation, placement.activations, batches, counts=method not in {"minmax", "moving_average"})
    unreached = []
    for path, name in placement.activations.items():
        quantizer, histogram = simulation.get_submodule(path), found[name]
        assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - placed there
        if histogram.low > histogram.high:
            unreached.append(name)
            continue
        if not histogram.high - histogram.low < torch.finfo(torch.float32).max:
            raise DataError(
                f"calibration range of {name!r} is [{histogram.low}, {histogram.high}]: too wide for float32"
            )
        quantizer.set_range(*getattr(ranges, method)(Points.of_histogram(histogram), quantizer.scheme))
    return unreached


def _set_weight_ranges(simulation: fx.GraphModule, placement: Placement) -> None:
    for path, parameter in placement.weights.items():
        quantizer = simulation.get_submodule(path)
        assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - placed there
        axis = quantizer.scheme.axis
        assert axis is not None  # noqa: S101 - weights have one scale per channel
        weight = get_tensor(simulation, parameter).detach().movedim(axis, 0).flatten(1)
        quantizer.set_range(weight.amin(1), weight.amax(1))


def _make_room_for_biases(simulation: fx.GraphModule) -> None:
    """Widens the scales of weights beside which the int32 bias would overflow, leaving room for the products.

    Only weights that hardly matter are concerned: channels that pruning or a BatchNorm emptied, layers whose input
    was always zero. Their scales are so small that the bias, all that these channels give, would saturate.
    """
    for node, bias_node, scale in _biased(simulation):
        weight = quantizer_of(simulation, node.args[COMPUTE[node.target].weight or 0])
        assert weight is not None  # noqa: S101 - else the layer would have no bias scale
        smallest = get_tensor(simulation, str(bias_node.target)).detach().abs() / BIAS_ROOM
        weight.scale = weight.scale * (smallest / scale).clamp(min=1)


def _biased(simulation: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    """Each integer layer with a constant bias: the layer, the bias, the scale of its int32 codes."""
    for node in list(simulation.graph.nodes):
        rule = COMPUTE.get(node.target)
        if rule is None or rule.bias is None or len(node.args) <= rule.bias:
            continue
        bias_node, scale = node.args[rule.bias], bias_scale(simulation, node)
        if scale is not None and isinstance(bias_node, fx.Node) and bias_node.op == "get_attr":
            yield node, bias_node, scale


def _round_biases(simulation: fx.GraphModule) -> None:
    """Puts every bias on the int32 grid that the kernels add it in, so that the simulation is exact.

    A bias that several layers share becomes one for each: their grids differ as their inputs do.
    """
    for node, bias_node, scale in _biased(simulation):
        path = str(bias_node.target)
        rounded = round_bias(get_tensor(simulation, path), scale) * scale.double()
        if len(bias_node.users) > 1:
            path = f"{path}_{node.name}"
        set_parameter(simulation, path, rounded)
        with simulation.graph.inserting_before(node):
            own = simulation.graph.get_attr(path)
        node.args = tuple(own if argument is bias_node else argument for argument in node.args)
        if not bias_node.users:
            simulation.graph.erase_node(bias_node)
    simulation.recompile()


def _plan(simulation: fx.GraphModule, placement: Placement, factors: Mapping[str, Tensor]) -> QuantPlan:
    tensors = []
    for path, name in placement.weights.items():
        quantizer = simulation.get_submodule(path)
        assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - placed there
        scale = quantizer.scale
        if name in factors:  # back to the units of the stored weight
            scale = scale / factors[name].abs().clamp(min=1e-12)
        tensors.append(_entry(name, "weight", quantizer, scale, name.rpartition(".")[0]))
    for path, name in placement.activations.items():
        quantizer = simulation.get_submodule(path)
        assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - placed there
        if quantizer.enabled:
            tensors.append(_entry(name, "activation", quantizer, quantizer.scale, _module_of(simulation, name)))
    return QuantPlan(tensors=tensors)


def _entry(
    name: str, role: Literal["weight", "activation"], quantizer: FakeQuantize, scale: Tensor, module: str
) -> TensorQuant:
    return TensorQuant(
        name=name,
        role=role,
        scheme=quantizer.scheme,
        scale=scale.tolist(),
        zero_point=quantizer.zero_point.tolist(),
        module=module,
    )


def _module_of(simulation: fx.GraphModule, name: str) -> str:
    return next((str(node.meta.get("module", "")) for node in simulation.graph.nodes if node.name == name), "")
