"""One method at a time, for people who want the parts: from a model to its quantized twin in one call.

The steps of recipes do the same work; `tersor.compress` also exports, measures and certifies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tersor.core.candidate import Candidate, check_finite_weights
from tersor.core.context import Context
from tersor.core.quantization import QuantPlan
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.quantize.dynamic import Dynamic
from tersor.quantize.qat import Qat
from tersor.quantize.static import Static
from tersor.quantize.weight_only import WeightOnly

Distance = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class QuantizedModel:
    """What a quantization gives.

    Attributes:
        model: Answers like the deployed model. After `static`, `dynamic` and `qat` it takes its inputs by position and
            returns the one output that counts; after `weight_only` it is called as before.
        plan: Every scale and zero point, as data.
        coverage: Share of the parameters that are stored in fewer bits.
        notes: What was done, and what a reader must know.
        candidate: For runtimes and further steps.
    """

    model: nn.Module
    plan: QuantPlan
    coverage: float
    notes: list[str]
    candidate: Candidate

    @classmethod
    def of(cls, candidate: Candidate) -> QuantizedModel:
        """What a candidate holds after a quantization."""
        assert candidate.plan is not None  # noqa: S101 - every quantization makes one
        sizes = dict(candidate.module.named_parameters(remove_duplicate=False))
        covered = {id(sizes[path]): sizes[path].numel() for path in candidate.plan.weights if path in sizes}
        total = sum(parameter.numel() for parameter in candidate.module.parameters())
        share = sum(covered.values()) / max(1, total)
        return cls(candidate.runnable, candidate.plan, share, candidate.history[-1].notes, candidate)


def static(
    model: nn.Module, data: Any, *, target: Target | None = None, output: str | int | None = None, **settings: Any
) -> QuantizedModel:
    """Rounds weights and activations with fixed scales; see `Static`.

    ```python
    quantized = tersor.quantize.static(model, images)
    quantized = tersor.quantize.static(model, images, weight_bits=4, rounding="gptq", correction="mean")
    ```

    Args:
        model: Stays as it is.
        data: Examples: a tensor, `(x, y)`, a dict of tensors, a Dataset, or a `Task` with a calibrate split.
        target: Whose placement rules to follow; ONNX Runtime by default.
        output: Which output counts, if the model returns several.
        **settings: Fields of `Static`.

    Raises:
        UnsupportedError: if nothing can be quantized.
        CaptureError: if the model cannot be traced.
    """
    return _apply(Static(**settings), model, data, target, output)


def dynamic(
    model: nn.Module, data: Any, *, target: Target | None = None, output: str | int | None = None, **settings: Any
) -> QuantizedModel:
    """Rounds weights to int8, and activations with scales found at run time; see `Dynamic`.

    Of `data` only the shapes of two examples are looked at. Arguments as in `static`.

    Raises:
        UnsupportedError: if nothing can be quantized.
    """
    return _apply(Dynamic(**settings), model, data, target, output)


def weight_only(
    model: nn.Module, data: Any, *, target: Target | None = None, output: str | int | None = None, **settings: Any
) -> QuantizedModel:
    """Stores weights in 2, 3, 4 or 8 bits and computes in float; see `WeightOnly`.

    `method="gptq"` looks at `data`, the others at the shapes of two examples. Arguments as in `static`.

    Raises:
        UnsupportedError: if nothing can be quantized.
        ConfigError: if the groups divide no layer.
    """
    return _apply(WeightOnly(**settings), model, data, target, output)


def qat(
    model: nn.Module,
    task: Task,
    *,
    target: Target | None = None,
    distillation: Distance | None = None,
    **settings: Any,
) -> QuantizedModel:
    """Trains a copy of the model while it computes with rounded numbers; see `Qat`.

    ```python
    kd = tersor.distill.distances()["kd"]
    quantized = tersor.quantize.qat(model, task, weight_bits=4, activation_bits=4, distillation=kd)
    ```

    Args:
        model: Stays as it is.
        task: With splits to train and to calibrate.
        target: Whose placement rules to follow; ONNX Runtime by default.
        distillation: `(outputs, the float model's outputs, temperature) -> scalar`, what is to be learned beside the
            labels.
        **settings: Fields of `Qat`.
    """
    if distillation is not None:
        settings = {"distill": "given", **settings}
    losses = {} if distillation is None else {"given": distillation}
    return _apply(Qat(**settings), model, task, target, task.output, losses)


def _apply(
    step: Step,
    model: nn.Module,
    data: Any,
    target: Target | None,
    output: str | int | None,
    losses: dict[str, Distance] | None = None,
) -> QuantizedModel:
    task = data if isinstance(data, Task) else Task(calibrate=data, output=output)
    check_finite_weights(model)
    tensors = [*model.parameters(), *model.buffers()]
    module = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()  # shares them: steps copy
    context = Context(task, target or Target("onnxruntime"), module, losses=losses or {})
    return QuantizedModel.of(step.apply(Candidate(module), context))
