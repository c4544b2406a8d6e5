"""The loss of a distillation: a weighted sum of terms on outputs, features and labels.

Shapes: `B` batch, `T` tokens, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.task import IGNORED, Task
from tersor.distill.ensemble import Ensemble
from tersor.distill.losses import LOSSES
from tersor.distill.pairs import Pair, propose, propose_attention
from tersor.distill.projectors import projector
from tersor.distill.teacher import Answers, CachedTeacher, LiveTeacher, Teacher, refuse_unsteady
from tersor.distill.terms import TASK, Term
from tersor.errors import ConfigError, DataError, ModelError
from tersor.probe.outputs import Outputs
from tersor.train import Blend, Schedule, blended, hard_loss
from tersor.train.metric import evaluating, home_of
from tersor.train.placement import device_of
from tersor.train.randomness import callers_kept, seed_all
from tersor.train.supervised import check_mixable

FOCUSED = frozenset({"crd", "rkd", "similarity_preserving"})  # the papers compare one late layer: the last pair
ATTENTION = frozenset({"minilm_relations"})


@dataclass
class Compared:
    """One pair of layers under one term: where to look, and what fits or judges them."""

    pair: Pair
    fitted: nn.Module | None = None
    judge: nn.Module | None = None


@dataclass
class Wanted:
    """A term, with its pairs if it is on features."""

    term: Term
    compared: list[Compared] = field(default_factory=list)


def check_examples(terms: Sequence[Term], task: Task, schedule: Schedule, *, cached: bool) -> None:
    """Refuses training examples that do not suit the terms.

    Raises:
        DataError: if there are none; if all terms, or one of the distillation's, need labels and there are none.
        ConfigError: if examples that are blended, or drawn at random, meet labels or cached answers; if inputs cannot
            be blended or labels not be smoothed.
    """
    split = task.require("train", "distillation")
    with callers_kept(torch.device("cpu")):  # examples may be drawn at random
        example = split.batch([0])
    labelled = [term.loss for term in terms if term.loss != TASK and LOSSES[term.loss].needs_labels]
    if example.labels is None and labelled:
        raise DataError(f"the loss {labelled[0]!r} needs labels, but the 'train' split has none; leave it out")
    if example.labels is None and all(term.loss == TASK for term in terms):
        raise DataError("the task's loss needs labels, but the 'train' split has none; distil: losses: [kd]")
    if example.labels is not None and any(term.loss == TASK for term in terms):
        task.check_smoothing(schedule.label_smoothing)
    if schedule.mixup:
        check_mixable(example)
        if labelled:
            raise ConfigError(f"the loss {labelled[0]!r} needs one label for each example; leave mixup out")
        if cached:
            raise ConfigError("cached answers are for the training examples as they are; leave mixup out, or the cache")
    if cached:
        refuse_unsteady(split)


class Objective:
    """`(student, batch) -> scalar`; made for one student, whose features it taps while it runs.

    Everything is tried once, on two examples, before any training. A term on features is the mean over its pairs.
    Padding does not count: where the batch has an `attention_mask` `[B, T]` that is 0, or, without one, labels `[B, T]`
    that are -100.

    Args:
        terms: What is summed up.
        student: Is tapped, not changed.
        model: The teacher; stays as it is.
        task: The training examples, the hard loss, and which output counts.
        schedule: Whether labels are smoothed and examples blended.
        seed: Of the projectors' first weights.
        cache: A directory in which the teacher's answers to all training examples are kept; None asks it each time.

    Raises:
        ConfigError: if a term cannot be computed here: no such layer, no pairs found, labels to be mixed.
        ModelError: if student and teacher do not answer alike, with both shapes.
        DataError: if labels are needed and there are none, or they do not fit.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        student: nn.Module,
        model: nn.Module,
        task: Task,
        *,
        schedule: Schedule,
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        self.task, self.schedule = task, schedule
        check_examples(terms, task, schedule, cached=cache is not None)
        split, home = task.require("train", "distillation"), home_of(student)
        self.notes: list[str] = []
        self.teacher: Teacher | None = None
        with callers_kept(home):
            seed_all(seed, "objective")
            example = split.batch(range(min(2, len(split)))).map(lambda value: value.to(home))
            terms = self._with_labels(terms, example)
            live = None
            if any(term.loss != TASK for term in terms):
                self.teacher = live = LiveTeacher(model, declared(model, task), home)
            self.wanted = [self._want(term, student, live, example) for term in terms]
            compared = [item for wanted in self.wanted for item in wanted.compared]
            self.taps = Outputs(student, sorted({item.pair.student for item in compared})) if compared else None
            self.companions = tuple(m.to(home) for item in compared for m in (item.fitted, item.judge) if m is not None)
            if live is not None:
                live.watch(sorted({item.pair.teacher for item in compared}))
            self._try(student, example)
            if live is not None and cache is not None:
                self.teacher = CachedTeacher(live, split, cache, device=device_of(student, schedule))

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """The sum of the weighted terms."""
        blend = blended(batch, self.schedule)
        student = self._answers(module, blend.batch)
        teacher = student if self.teacher is None else self.teacher(blend.batch)
        return torch.stack(
            [item.term.weight * self._value(item, blend, student, teacher) for item in self.wanted]
        ).sum()

    def _answers(self, module: nn.Module, batch: Batch) -> Answers:
        if self.taps is None:
            return Answers(select_output(batch.call(module), self.task.output), {})
        with self.taps as taps:
            outputs = select_output(batch.call(module), self.task.output)
            return Answers(outputs, taps.take())

    def _value(self, wanted: Wanted, blend: Blend, student: Answers, teacher: Answers) -> Tensor:
        term = wanted.term
        if term.loss == TASK:
            return hard_loss(student.outputs, blend, self.task, self.schedule)
        if not term.on_features:
            return self._compare(term, None, blend.batch, student.outputs, teacher.outputs)
        values = []
        for item in wanted.compared:
            ours, theirs = student.features[item.pair.student], teacher.features[item.pair.teacher]
            if item.fitted is not None:
                ours, theirs = item.fitted(ours, theirs)
            values.append(self._compare(term, item.judge, blend.batch, ours, theirs))
        return torch.stack(values).mean()

    def _compare(self, term: Term, judge: nn.Module | None, batch: Batch, ours: Tensor, theirs: Tensor) -> Tensor:
        kind, given = LOSSES[term.loss], {} if judge is not None else dict(term.settings)
        mask = mask_of(batch, ours, maps=term.loss == "attention_maps")
        if kind.needs_labels:
            assert batch.labels is not None  # noqa: S101 - checked before any work
            given["labels"] = batch.labels
            if batch.labels.shape == ours.shape[:-1]:
                labelled = batch.labels != IGNORED
                mask = labelled if mask is None else labelled & (mask != 0)
        if mask is not None and kind.takes_mask:
            given["mask"] = mask
        elif mask is not None and kind.on == "outputs":
            ours, theirs = ours[mask != 0], theirs[mask != 0]
        elif mask is not None:
            ours, theirs = (torch.where(mask[..., None] != 0, features, 0) for features in (ours, theirs))
        function = judge if judge is not None else kind.function
        value: Tensor = function(ours, theirs, **given)
        return value

    def _with_labels(self, terms: Sequence[Term], example: Batch) -> list[Term]:
        """The terms that can be computed: without labels all but the task's."""
        if example.labels is not None or all(term.loss != TASK for term in terms):
            return list(terms)
        self.notes.append("the train split has no labels: the task's loss is left out")
        return [term for term in terms if term.loss != TASK]

    def _want(self, term: Term, student: nn.Module, live: LiveTeacher | None, example: Batch) -> Wanted:
        wanted = Wanted(term)
        if not term.on_features or live is None:
            return wanted
        pairs = self._pairs(term, student, live.module, example)
        kind, axis = LOSSES[term.loss], term.settings.get("channel_axis")
        for pair in pairs:
            compared = Compared(pair)
            if kind.matching:
                first = True if axis == 1 else None
                compared.fitted = projector(pair.student_shape, pair.teacher_shape, channels_first=first)
            if kind.trainable:
                widths = (_width(pair.student_shape, axis), _width(pair.teacher_shape, axis))
                compared.judge = kind.function(*widths, **term.settings)
            wanted.compared.append(compared)
        self.notes += [f"{term.loss}: {pair}" for pair in pairs]
        return wanted

    def _pairs(self, term: Term, student: nn.Module, model: nn.Module, example: Batch) -> tuple[Pair, ...]:
        if term.pairs:
            return _named(term.pairs, student, model, example)
        if term.loss in ATTENTION:
            return _named(list(zip(*propose_attention(student, model), strict=True)), student, model, example)
        if term.loss == "attention_maps":
            raise ConfigError(
                "attention_maps compares matrices that models return only when asked to; name them: pairs: "
                "[[student address, teacher address], …], such as encoder.layer.0.attention.self[1]"
            )
        pairs = propose(student, model, example)
        return pairs[-1:] if term.loss in FOCUSED else pairs

    def _try(self, student: nn.Module, example: Batch) -> None:
        """Computes every term once; whatever does not fit raises here."""
        with evaluating(student):
            ours = self._answers(student, example)
            theirs = ours if self.teacher is None else self.teacher(example)
            on_outputs = any(item.term.loss != TASK and not item.term.on_features for item in self.wanted)
            if on_outputs and ours.outputs.shape != theirs.outputs.shape:
                raise ModelError(
                    f"student and teacher must answer alike to be compared: for the same batch the student returns "
                    f"{tuple(ours.outputs.shape)}, the teacher {tuple(theirs.outputs.shape)} (classes or vocabulary "
                    "differ?); give them the same outputs, or use losses on features only"
                )
            for item in self.wanted:
                self._value(item, Blend(example), ours, theirs)


def declared(module: nn.Module, task: Task) -> str | int | None:
    """Which output of the module counts; an ensemble has selected it already."""
    return None if isinstance(module, Ensemble) else task.output


def _named(pairs: Sequence[tuple[str, str]], student: nn.Module, model: nn.Module, example: Batch) -> tuple[Pair, ...]:
    """Pairs that the user named, with their shapes."""
    found: list[dict[str, Tensor]] = []
    for module, addresses in ((student, [ours for ours, _ in pairs]), (model, [theirs for _, theirs in pairs])):
        taps = Outputs(module, addresses, detach=True)
        patterns = [address for address in addresses if address not in taps.addresses]
        if patterns:
            raise ConfigError(
                f"a pair names one layer of each model, but {patterns[0]!r} is a pattern; name each layer"
            )
        with evaluating(module), taps:
            example.call(module)
            found.append(taps.take())
    return tuple(
        Pair(ours, theirs, tuple(found[0][ours].shape), tuple(found[1][theirs].shape)) for ours, theirs in pairs
    )


def _width(shape: Sequence[int], axis: int | None) -> int:
    """Channels: along `axis`, else dimension 1 of images and the last of others."""
    if axis is None:
        axis = 1 if len(shape) == 4 else -1
    return shape[axis]


def mask_of(batch: Batch, tensor: Tensor, *, maps: bool = False) -> Tensor | None:
    """Which tokens count `[B, T]`, if `tensor` is `[B, T, D]`, or attention maps `[B, H, T, T]`."""
    mask = batch.kwargs.get("attention_mask")
    if mask is None and batch.labels is not None and batch.labels.ndim == 2:
        mask = batch.labels != IGNORED
    if mask is None or mask.ndim != 2:
        return None
    if maps:
        return mask
    return mask if tensor.ndim == 3 and tensor.shape[:2] == mask.shape else None
