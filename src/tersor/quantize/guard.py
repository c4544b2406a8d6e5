"""Stops a quantization that has destroyed the model, before anything is exported.

Shapes: `N` examples, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.stats import binomtest
from torch import Tensor

from tersor.errors import AccuracyError
from tersor.graph.stream import Stream, varying
from tersor.quantize.alone import solos
from tersor.quantize.prepare import Batches, Prepared
from tersor.quantize.reference import float_reference

SIGNIFICANCE = 0.01
KAPPA = 0.1  # agreement beyond chance, of what is possible beyond chance: below it is called slight
SHOWN = 5
Ranked = Sequence[tuple[str, float]]


def check_usable(
    prepared: Prepared,
    original_outputs: Tensor,
    quantized_outputs: Tensor,
    ranked: Ranked | Callable[[], Ranked],
) -> None:
    """Raises if the quantized model gives nothing of what the original knows; a large loss alone is no error.

    Scores of classes, floats `[N, K]` with `K ≥ 2`: destroyed if NaN or Inf appear, if all answers are equal where the
    original's differ, or if the predicted classes agree no better than chance. Chance is the agreement of independent
    predictions with the same frequencies, at least `1 / K`; it is no better if a one-sided binomial test at 1 % does
    not tell it from chance and Cohen's kappa is at most 0.1. With so few examples that even full agreement would not
    pass the test, agreement is not judged. Any other output: destroyed if ``‖ŷ − y‖ > ‖y‖``: zero would be better.

    Args:
        prepared: What was quantized, for the widths in the message.
        original_outputs: Of the float model on the calibrate batches, `[N, …]`.
        quantized_outputs: Of the simulation on the same.
        ranked: Layers with their relative output errors, as `output_errors` gives them; a function is called only if
            something is wrong.

    Raises:
        AccuracyError: with the layers that differ most and what to do.
    """
    found = _examined(original_outputs, quantized_outputs)
    if found is None:
        return
    errors = sorted(ranked() if callable(ranked) else ranked, key=lambda item: -item[1])
    bits = {solo.name: min(prepared.quantizer(path).scheme.bits for path in solo.weights) for solo in solos(prepared)}
    layers = ", ".join(
        f"{layer or '(model)'} {error:.2f}" + (f" at {bits[layer]} bits" if layer in bits else "")
        for layer, error in errors[:SHOWN]
    )
    raise AccuracyError(
        f"quantization has destroyed the model: {found}. Relative output errors, largest first: "
        f"{layers or 'not known'}. Give it more weight_bits or activation_bits, give these layers 8 bits or 32 (float) "
        "with overrides, let quantize.mixed or quantize.fallback choose, or train with the rounding in place"
    )


def _examined(original: Tensor, quantized: Tensor) -> str | None:
    """What is wrong, None if nothing is."""
    if not bool(torch.isfinite(quantized).all()):
        bad = int((~torch.isfinite(quantized)).sum())
        return f"{bad} of {quantized.numel()} output values are NaN or Inf"
    if original.ndim != 2 or original.shape[1] < 2 or not original.is_floating_point():
        distance, size = (float(part.double().norm()) for part in (quantized.double() - original.double(), original))
        if distance > size:
            return f"the relative error of its output is {distance / max(size, 1e-300):.2f}; zero would be 1"
        return None
    if _constant(quantized) and not _constant(original):
        return f"it answers the same to all {len(original)} examples"
    return _agreeing(original.argmax(1), quantized.argmax(1), original.shape[1])


def _constant(outputs: Tensor) -> bool:
    return len(outputs) > 1 and bool((outputs == outputs[0]).all())


def _agreeing(before: Tensor, after: Tensor, classes: int) -> str | None:
    count, equal = len(before), int((before == after).sum())
    shares = [torch.bincount(part, minlength=classes).double() / count for part in (before, after)]
    chance = max(1 / classes, float((shares[0] * shares[1]).sum()))
    if chance**count > SIGNIFICANCE:  # few examples, or one class only: nothing could be told
        return None
    kappa = (equal / count - chance) / (1 - chance)
    if kappa > KAPPA or binomtest(equal, count, chance, alternative="greater").pvalue <= SIGNIFICANCE:
        return None
    return f"its predicted class is the original's for {equal} of {count} examples, where chance gives {chance:.1%}"


def output_errors(prepared: Prepared, batches: Batches) -> list[tuple[str, float]]:
    """``‖ŷ − y‖ / ‖y‖`` of every layer's output with everything before it rounded, largest first.

    Args:
        prepared: With all ranges set; stays as it is.
        batches: Examples.
    """
    reference, nodes = float_reference(prepared)
    inputs = [tuple(batch.tensors().values()) for batch in batches()]
    owner = {node: solo.name for solo in solos(prepared) for node in solo.nodes}
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        given, wanted = Stream(prepared.simulation, inputs), Stream(reference, inputs)
        for node in varying(prepared.simulation):
            if node in owner:
                total = sums.setdefault(owner[node], [0.0, 0.0])
                for seen, expected in zip(given.advance(node), wanted.advance(nodes[node.name]), strict=True):
                    total[0] += float((seen - expected).double().square().sum())
                    total[1] += float(expected.double().square().sum())
    found = [(layer, (error / size) ** 0.5 if size else 0.0) for layer, (error, size) in sums.items()]
    return sorted(found, key=lambda item: -item[1])
