"""What the report shows of a quantization on a captured graph: the bits of every layer."""

from __future__ import annotations

from torch import fx

from tersor.core.batch import Batch
from tersor.core.report import QuantizationRecord, QuantizedLayer, StepRecord
from tersor.graph.fold import get_tensor
from tersor.graph.rules import COMPUTE
from tersor.quantize.alone import Solo, macs_of, solos
from tersor.quantize.prepare import Prepared
from tersor.quantize.sensitivity import Sensitivity
from tersor.quantize.widths import FLOAT


def record_of(prepared: Prepared, example: Batch) -> QuantizationRecord:
    """The widths of a calibrated graph, in the order of the model; `example` has one row."""
    found = solos(prepared, kept=True)
    macs = macs_of(prepared, found, example)
    layers = [
        QuantizedLayer(
            name=solo.name,
            parameters=sum(get_tensor(prepared.simulation, path).numel() for path in solo.weights.values()),
            macs=macs[solo.name],
            weight_bits=max(_weight_bits(prepared, path) for path in solo.weights),
            activation_bits=_input_bits(prepared, solo),
        )
        for solo in found
    ]
    return QuantizationRecord(layers=layers)


def with_losses(step: StepRecord, found: Sensitivity) -> StepRecord:
    """The record of a step that rounds, with what its widths were chosen by."""
    assert step.quantization is not None  # noqa: S101 - static quantization makes one
    losses = {row.layer: row.loss for row in found.rows}

    def of(layer: QuantizedLayer) -> QuantizedLayer:
        loss = losses[layer.name]
        known = set(found.bits) <= set(loss)
        return layer.model_copy(update={"losses": [loss[bits] for bits in found.bits] if known else []})

    layers = [of(layer) for layer in step.quantization.layers]
    record = QuantizationRecord(measure=found.unit, widths=list(found.bits), layers=layers)
    return step.model_copy(update={"quantization": record})


def _weight_bits(prepared: Prepared, path: str) -> int:
    return prepared.quantizer(path).scheme.bits if path in prepared.placement.weights else FLOAT


def _input_bits(prepared: Prepared, solo: Solo) -> int | None:
    """Bits of what flows into a layer, of several inputs the widest; None where it computes in float."""
    if not prepared.placement.weights.keys() >= solo.weights.keys():
        return None
    operands = [node.args[place] for node in solo.nodes for place in COMPUTE[node.target].activations]
    paths = {str(operand.target) for operand in operands if isinstance(operand, fx.Node)}
    used = [prepared.quantizer(path) for path in paths & prepared.placement.activations.keys()]
    return max((quantizer.scheme.bits for quantizer in used if quantizer.enabled), default=None)
