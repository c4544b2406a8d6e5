"""How much is lost if one layer alone is rounded: what mixed precision decides by.

Shapes: `B` batch, `K` classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.metrics import METRICS
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.graph.fold import get_tensor
from tersor.probe import collect
from tersor.quantize.alone import Grids, Solo, lay_out_fast, macs_of, pause, solos, visit_each
from tersor.quantize.prepare import Prepared, batches_of, prepare, set_activation_ranges
from tersor.quantize.widths import FLOAT, Widths

Measure = Literal["output", "fisher"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
BATCH = 32
FIXED = 8  # the width of embedding tables
CLASS_METRICS = frozenset(METRICS) - {"cosine"}
SCALE_BYTES = 4


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        layer: Path of its module; of several that share a weight the first.
        kind: Class of the module.
        parameters: Of the quantized weight.
        scales: How many scales it needs.
        macs: Multiply-accumulates at batch 1.
        loss: Bits -> what is lost; infinite where the answers were not finite.
        drop: Bits -> drop of the task's metric; empty without labels.
        edge: Whether it is the first or the last layer.
        table: Whether it is looked up, as embeddings are: its width is fixed, it has no input to round.
        modules: All modules that share the weight.
    """

    layer: str
    kind: str
    parameters: int
    scales: int
    macs: int
    loss: Mapping[int, float]
    drop: Mapping[int, float] = field(default_factory=dict)
    edge: bool = False
    table: bool = False
    modules: tuple[str, ...] = ()

    def size_bytes(self, bits: int) -> int:
        """Bytes of the packed codes and of the float32 scales; four per parameter in float."""
        if bits >= FLOAT:
            return 4 * self.parameters
        return -(-bits * self.parameters // 8) + SCALE_BYTES * self.scales

    def loss_at(self, bits: int) -> float:
        """What is lost at this width; nothing in float."""
        return 0.0 if bits >= FLOAT else self.loss[bits]


@dataclass(frozen=True)
class Sensitivity:
    """What every layer loses at every width, in the order of the model.

    Attributes:
        rows: The layers.
        bits: The widths.
        measure: `output` or `fisher`.
        unit: What the losses are.
        samples: Examples that were looked at.
        seconds: How long it took.
    """

    rows: tuple[LayerSensitivity, ...]
    bits: tuple[int, ...]
    measure: Measure
    unit: str
    samples: int
    seconds: float

    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """The layers, those that lose most at their smallest width first."""
        return tuple(sorted(self.rows, key=lambda row: (-row.loss[min(row.loss)], row.layer)))

    def as_data(self) -> dict[str, Any]:
        """Plain data, the most sensitive layer first."""
        rows = [
            {
                "layer": row.layer,
                "kind": row.kind,
                "parameters": row.parameters,
                "macs": row.macs,
                "loss": {str(bits): value for bits, value in row.loss.items()},
                "drop": {str(bits): value for bits, value in row.drop.items()},
            }
            for row in self.ranked()
        ]
        return {
            "measure": self.measure,
            "unit": self.unit,
            "bits": list(self.bits),
            "samples": self.samples,
            "seconds": self.seconds,
            "layers": rows,
        }

    def __rich__(self) -> RenderableType:
        measured = any(row.drop for row in self.rows)
        title = f"{self.unit} if one layer alone is rounded; {self.samples} examples, {self.seconds:.1f} s"
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        heads = ["layer", "parameters", "MACs", *(f"{bits} bits" for bits in self.bits)]
        heads += [f"drop at {self.bits[0]}"] if measured else []  # terminals are narrow; `as_data` has them all
        for position, head in enumerate(heads):
            table.add_column(head, justify="right" if position else "left", no_wrap=position > 0)
        for row in self.ranked():
            cells = [row.layer or "(model)", f"{row.parameters:,}", f"{row.macs:,}"]
            cells += [f"{row.loss[bits]:.3g}" if bits in row.loss else "" for bits in self.bits]
            cells += [f"{row.drop[self.bits[0]]:+.4f}" if self.bits[0] in row.drop else ""] if measured else []
            table.add_row(*(Text("".join(c if c.isprintable() else "\ufffd" for c in cell)) for cell in cells))
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def sensitivity(
    model: nn.Module | Candidate,
    data: Any,
    *,
    bits: Sequence[int] = (2, 4, 8),
    target: Target | None = None,
    measure: Measure = "output",
    samples: int = 128,
    activation_bits: int | None = None,
) -> Sensitivity:
    """Rounds the weights of one layer at a time and tells what that costs; `model` stays as it is.

    - `output`: measured on the calibrate split, per example: ``KL(softmax(y) ‖ softmax(ŷ))`` where the outputs `y` in
      float and `ŷ` rounded are scores of classes `[B, …, K]`, else ``‖ŷ − y‖² / ‖y‖²``; and the drop of the metric.
    - `fisher`: estimated to second order from one pass, ``½ Σᵢ Fᵢᵢ (wᵢ − q(wᵢ))²`` with the empirical Fisher
      information `F`, the mean of squared gradients of single examples. Where there are no labels they are drawn from
      the model's own distribution. After Dong et al. 2019 (HAWQ), https://arxiv.org/abs/1905.03696.

    ::

        found = tersor.quantize.sensitivity(model, task, bits=(2, 4, 8))
        print(found)                                        # the most sensitive layer first
        tersor.quantize.allocate(found, average_bits=4)     # {"layer1.0.conv1": 4, …}

    Args:
        model: Float, as `quantize.static` takes it.
        data: A `Task` with a calibrate split, or what such a split is made of.
        bits: Widths, each 2 to 8.
        target: Where it will run: decides what can be quantized.
        measure: `output` or `fisher`.
        samples: Examples of the calibrate split to use.
        activation_bits: With `output`: the input of the layer is rounded too, to this width.

    Raises:
        ConfigError: for widths and measures that do not exist.
        UnsupportedError, CaptureError: as `quantize.static`.
        DataError: without a calibrate split; for `fisher` if there are neither labels nor scores of classes.
        NonFiniteError: if the float model answers NaN or Inf.
    """
    task = data if isinstance(data, Task) else Task(calibrate=data)
    candidate = model if isinstance(model, Candidate) else Candidate(frozen_copy(model))
    context = Context(task, target or Target(), candidate.module)
    options = Options(tuple(bits), measure, samples, activation_bits)
    return measure_layers(candidate, context, options, "sensitivity")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    bits: tuple[int, ...]
    measure: Measure
    samples: int
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if not self.bits or not all(isinstance(width, int) and 2 <= width <= 8 for width in self.bits):
            raise ConfigError(f"bits: expected widths of 2 to 8 bits, got {list(self.bits)}")
        if self.measure not in MEASURES:
            raise ConfigError(f"measure: expected one of {list(MEASURES)}, got {self.measure!r}")
        if self.samples < 1:
            raise ConfigError(f"samples: expected at least 1, got {self.samples}")
        if self.activation_bits is not None and self.measure == "fisher":
            raise ConfigError("activation_bits: 'fisher' is about weights; use measure='output'")


def measure_layers(candidate: Candidate, context: Context, options: Options, step: str) -> Sensitivity:
    """`sensitivity` of a candidate, for steps."""
    started = time.perf_counter()
    split = context.task.require("calibrate", step)
    widths = tuple(sorted(set(options.bits)))
    narrow = options.activation_bits or FIXED
    prepared = prepare(candidate, context, step, Widths(activation_bits=narrow, edge_bits=narrow))
    batches = batches_of(split, options.samples, BATCH)
    ranged: set[str] = set()
    if options.activation_bits is not None:
        set_activation_ranges(prepared, "mse", batches)
        ranged = {path for path in prepared.placement.activations if prepared.quantizer(path).enabled}
    pause(prepared)
    found = solos(prepared)
    plan = [(solo, (FIXED,) if solo.fixed else widths) for solo in found]
    grids = Grids(prepared, found, sorted({*widths, FIXED}))
    macs = macs_of(prepared, found, context.task.example(1))
    drops: dict[tuple[str, int], float] = {}
    if options.measure == "output":
        tally = _Tally(context.task)
        shown = batches()
        lay_out_fast(prepared, shown[0])
        for index, batch in enumerate(shown):
            batch.check_finite(f"calibration batch {index}")
            tally.start(index)
            visit_each(prepared, plan, grids, batch, tally, rounded=ranged)
            context.progress("sensitivity", index + 1, len(shown))
        losses, drops, unit = tally.losses(), tally.drops(), tally.unit
    else:
        losses, unit = _fisher(prepared, context, batches_of(split, options.samples, 1), plan, grids), "½ Σ F (w − q)²"
    rows = []
    for solo, tried in plan:
        weights = [get_tensor(prepared.simulation, path) for path in solo.weights.values()]
        axes = [prepared.quantizer(path).scheme.axis or 0 for path in solo.weights]
        rows.append(
            LayerSensitivity(
                layer=solo.name,
                kind=type(candidate.module.get_submodule(solo.name)).__name__,
                parameters=sum(weight.numel() for weight in weights),
                scales=sum(weight.shape[axis] for weight, axis in zip(weights, axes, strict=True)),
                macs=macs[solo.name],
                loss={width: losses.get((solo.name, width), 0.0) for width in tried},
                drop={width: drops[solo.name, width] for width in tried if (solo.name, width) in drops},
                edge=solo.edge,
                table=solo.fixed,
                modules=solo.modules,
            )
        )
    seconds = time.perf_counter() - started
    return Sensitivity(tuple(rows), widths, options.measure, unit, min(options.samples, len(split)), seconds)


class _Tally:
    """Adds up what the answers with one rounded layer differ by."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.classes = True
        self.examples = 0
        self.sums: dict[tuple[str, int], float] = {}
        self.reference = 0.0
        self.before: list[tuple[Tensor, Tensor | None]] = []
        self.after: dict[tuple[str, int], list[Tensor]] = {}
        self._batch = -1

    def start(self, index: int) -> None:
        """A new batch."""
        self._fresh, self._batch = True, index

    def __call__(self, solo: Solo, width: int, answer: Tensor, expected: Tensor, batch: Batch) -> None:
        """Takes one answer in."""
        labels = expected if self.task.metric.against_original else batch.labels
        if self._fresh:
            if not bool(torch.isfinite(expected).all()):
                raise NonFiniteError(f"calibration batch {self._batch}: the model's output has NaN or Inf in float")
            self._fresh = False
            self.classes = self._are_classes(expected, batch.labels)
            self.examples += len(batch)
            self.reference += float(expected.double().square().sum())
            if self._scores(labels):
                self.before.append((self.task.metric.statistic(expected, labels), labels))
        value = divergence(answer, expected) if self.classes else (answer.double() - expected.double()).square().sum()
        lost = float(value) if bool(torch.isfinite(answer).all()) else float("inf")
        key = solo.name, width
        self.sums[key] = self.sums.get(key, 0.0) + lost
        if self._scores(labels) and lost < float("inf"):
            self.after.setdefault(key, []).append(self.task.metric.statistic(answer, labels))

    def _are_classes(self, outputs: Tensor, labels: Tensor | None) -> bool:
        if outputs.ndim < 2 or outputs.shape[-1] < 2 or self.task.metric.name == "cosine":
            return False
        of_classes = labels is not None and not labels.is_floating_point() and labels.shape == outputs.shape[:-1]
        return of_classes or (labels is None and self.task.metric.name in CLASS_METRICS)

    def _scores(self, labels: Tensor | None) -> bool:
        """Whether the metric can be computed; one that keeps whole outputs would take too much memory."""
        metric = self.task.metric
        return labels is not None and (metric.per_example or metric.name in METRICS)

    @property
    def unit(self) -> str:
        return "KL divergence" if self.classes else "relative squared error"

    def losses(self) -> dict[tuple[str, int], float]:
        """Per example for the divergence, relative for the error."""
        whole = self.examples if self.classes else max(self.reference, torch.finfo(torch.float64).tiny)
        return {key: value / whole for key, value in self.sums.items()}

    def drops(self) -> dict[tuple[str, int], float]:
        """By how much the metric is worse."""
        if not self.before:
            return {}
        metric = self.task.metric
        labels = torch.cat([part for _, part in self.before if part is not None])
        before = metric.value(torch.cat([statistic for statistic, _ in self.before]), labels)
        sign = 1 if metric.higher_is_better else -1
        whole = {key: torch.cat(parts) for key, parts in self.after.items() if len(parts) == len(self.before)}
        return {key: sign * (before - metric.value(statistic, labels)) for key, statistic in whole.items()}


def divergence(answer: Tensor, expected: Tensor) -> Tensor:
    """``Σ KL(softmax(expected) ‖ softmax(answer))`` over the batch, of several positions the mean."""
    logs = functional.log_softmax(expected.double(), -1)
    each = (logs.exp() * (logs - functional.log_softmax(answer.double(), -1))).sum(-1)
    return each.reshape(len(each), -1).mean(1).clamp(min=0).sum()


def _fisher(
    prepared: Prepared,
    context: Context,
    batches: Callable[[], list[Batch]],
    plan: Sequence[tuple[Solo, Sequence[int]]],
    grids: Grids,
) -> dict[tuple[str, int], float]:
    simulation, loss = prepared.simulation, context.task.loss
    paths = [path for solo, _ in plan for path in solo.weights.values()]
    examples = [Batch(tuple(batch.tensors().values()), {}, batch.labels) for batch in batches()]
    if any(batch.labels is None for batch in examples):
        examples = _labelled(simulation, examples, context.seed)
        loss = _cross_entropy
    evidence = collect(simulation, examples, needs={"squared_gradient"}, loss=loss, parameters=paths)
    found = {}
    for solo, widths in plan:
        for width in widths:
            total = 0.0
            with grids.rounding(solo, width), torch.no_grad():
                for quantizer, path in solo.weights.items():
                    weight, squared = get_tensor(simulation, path).detach(), evidence[path].squared_gradient
                    if squared is not None:
                        error = (prepared.quantizer(quantizer)(weight) - weight).double()
                        total += 0.5 * float((squared.double() * error.square()).sum())
            found[solo.name, width] = total
    return found


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def _labelled(simulation: nn.Module, examples: Sequence[Batch], seed: int) -> list[Batch]:
    """The examples with labels drawn from the model's distribution: the Fisher information is defined by them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in examples:
        with torch.no_grad():
            outputs = simulation(*batch.args)
        if outputs.ndim < 2 or outputs.shape[-1] < 2 or not outputs.is_floating_point():
            raise DataError(
                f"measure 'fisher' needs labels, or outputs that are scores of classes; there are no labels and the "
                f"output is {tuple(outputs.shape)}. Use measure='output'"
            )
        shares = outputs.softmax(-1)
        drawn = torch.multinomial(shares.flatten(0, -2), 1, generator=generator).reshape(shares.shape[:-1])
        found.append(Batch(batch.args, {}, drawn))
    return found
