"""Removes experts, and compares with the original in which the removed ones can never be chosen."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.core.surgery import Cut, Shrink, Surgery
from tersor.errors import SurgeryError, TersorError
from tersor.graph.attention import prunable_attention
from tersor.graph.coupling.couple import Run, named_tensors, run_alike
from tersor.graph.coupling.integers import Attribute, owners, read_integer
from tersor.graph.coupling.trace import observed
from tersor.graph.experts import Mixture, Mixtures
from tersor.graph.routing import barred
from tersor.graph.surgery import apply_surgery, attribute_changes
from tersor.graph.verify import ATTEMPTS, TOLERANCE, Verdict, distance, other_shapes, randomised

SEEN = 1e-3  # well above the tolerance: a wrong expert must not pass for a right one
Removed = Mapping[str, Sequence[int]]


def plan_experts(model: nn.Module, mixtures: Mixtures, removed: Removed) -> Surgery:
    """The surgery that removes experts.

    Args:
        model: The model of the mixtures; it stays as it is.
        mixtures: From `find_mixtures`.
        removed: Mixture -> numbers of the experts that go; mixtures that are left out stay whole.

    Raises:
        SurgeryError: if too few would stay, groups would differ in size, or mixtures that one attribute counts would.
    """
    tensors, cuts, shrunk = named_tensors(model), [], []
    for name, experts in removed.items():
        mixture, gone = mixtures[name], sorted(set(experts))
        if not gone:
            continue
        check_removable(mixture, gone)
        kept = [number for number in range(mixture.size) if number not in gone]
        shrunk += [Shrink(path=path, size=mixture.size, kept=tuple(kept)) for path in mixture.lists]
        for place, rows in mixture.members.items():
            size = tensors[place.parameter].shape[place.dim]
            keep = torch.ones(size, dtype=torch.bool)
            keep[rows[gone].flatten()] = False
            stay = tuple(keep.nonzero().flatten().tolist())
            cuts.append(Cut(parameter=place.parameter, dim=place.dim, size=size, kept=stay))
    order = {name: position for position, name in enumerate(tensors)}
    cuts.sort(key=lambda cut: (order[cut.parameter], cut.dim))
    changes = attribute_changes(model, cuts, _values(model, mixtures, removed))
    return Surgery(shrunk=tuple(shrunk), cuts=tuple(cuts), changes=changes)


def check_removable(mixture: Mixture, gone: Sequence[int]) -> None:
    """Raises `SurgeryError` unless these experts exist and can go together."""
    unknown = [number for number in gone if not 0 <= number < mixture.size]
    if unknown:
        raise SurgeryError(f"mixture {mixture.name!r} has experts 0 to {mixture.size - 1}, got {unknown}")
    if mixture.size - len(gone) < mixture.least:
        raise SurgeryError(
            f"mixture {mixture.name!r} has {mixture.size} experts, and {mixture.least} must stay for its router to "
            f"choose from; {len(gone)} are too many to remove"
        )
    left = {len(set(group) - set(gone)) for group in mixture.groups}
    if len(left) > 1:
        raise SurgeryError(
            f"mixture {mixture.name!r} chooses within {len(mixture.groups)} groups, which must stay of equal size; "
            f"remove as many experts of each of {[list(group) for group in mixture.groups]}"
        )


def _values(model: nn.Module, mixtures: Mixtures, removed: Removed) -> dict[Attribute, int]:
    counted: dict[Attribute, dict[str, int]] = defaultdict(dict)
    followers: dict[Attribute, dict[str, int]] = defaultdict(dict)
    holders = dict(owners(model))
    for mixture in mixtures.found:
        kept = mixture.size - len(set(removed.get(mixture.name, ())))
        for attributes, values in ((mixture.attributes, counted), (mixture.followers, followers)):
            for attribute in attributes:
                before = int(read_integer(holders[attribute.owner], attribute))
                values[attribute][mixture.name] = before * kept // mixture.size
    for attribute, by_mixture in counted.items():
        if len(set(by_mixture.values())) > 1:
            raise SurgeryError(
                f"{attribute} counts the experts of {', '.join(by_mixture)}, which must lose equally many"
            )
    agreed = {attribute: values for attribute, values in followers.items() if len(set(values.values())) == 1}
    return {attribute: next(iter(values.values())) for attribute, values in (agreed | counted).items()}


def together(mixtures: Sequence[Mixture]) -> list[list[Mixture]]:
    """Mixtures by what they share: those whose experts one attribute counts lose equally many."""
    groups: list[list[Mixture]] = []
    for mixture in mixtures:
        touched = [group for group in groups if any(set(mixture.attributes) & set(other.attributes) for other in group)]
        groups = [group for group in groups if group not in touched]
        groups.append([*(other for group in touched for other in group), mixture])
    return groups


def outputs_without(model: nn.Module, mixtures: Mixtures, removed: Removed, runs: Sequence[Run]) -> list[Any]:
    """Outputs of the original in which some experts can never be chosen, one per run.

    Args:
        model: In evaluation mode; it stays as it is.
        mixtures: Of this model, or of one of the same architecture.
        removed: Mixture -> numbers of the experts.
        runs: Arguments of the model.
    """
    labels = [mixtures[name].labels[number] for name, numbers in removed.items() for number in numbers]
    gone = mixtures.classes[labels].tolist()
    outputs = []
    for run in runs:
        trace = barred(gone, mixtures.classes)
        trace.adopt(named_tensors(model))
        with prunable_attention(model), observed(model, trace):
            outputs.append(run_alike(model, *run))
    return outputs


def lively(model: nn.Module, mixtures: Mixtures, runs: Sequence[Run], seed: int) -> nn.Module:
    """A copy with random weights under which it shows which expert is chosen, in evaluation mode."""
    fresh = randomised(model, runs, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(fresh)
    with torch.no_grad():
        for place in dict.fromkeys(place for mixture in mixtures.found for place in mixture.members):
            tensor = tensors[place.parameter]
            if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))  # a bias of the choice
            elif tensor.ndim > 2:  # a matrix per expert: what one of them sums over, not all that it holds
                tensor.mul_((tensor[0].numel() / tensor.shape[-1]) ** 0.5)
    return fresh


def compare_experts(
    model: nn.Module,
    mixtures: Mixtures,
    removed: Removed,
    runs: Sequence[Run],
    surgery: Surgery | None = None,
) -> Verdict:
    """Removes experts of a copy of `model`; compares with the original in which they can never be chosen.

    What differs is compared again in float64: in float32 a near tie between two experts may fall either way.

    Args:
        model: In evaluation mode; it stays as it is.
        mixtures: Of this model, or of one of the same architecture.
        removed: Mixture -> numbers of the experts.
        runs: Arguments of the model.
        surgery: By default the one that `plan_experts` makes.
    """
    try:
        planned = surgery or plan_experts(model, mixtures, removed)
    except SurgeryError as failure:
        return Verdict(float("inf"), 0.0, str(failure))
    verdict = _compare(model, mixtures, removed, runs, planned)
    if verdict.ok or verdict.error == float("inf"):
        return verdict
    precise = [tree_map(_double, run) for run in runs]
    again = _compare(copy.deepcopy(model).double(), mixtures, removed, precise, planned)
    return again if again.ok else verdict


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _compare(model: nn.Module, mixtures: Mixtures, removed: Removed, runs: Sequence[Run], surgery: Surgery) -> Verdict:
    try:
        pruned = apply_surgery(copy.deepcopy(model), surgery)
        with torch.no_grad():
            before = [run_alike(model, *run) for run in runs]
            answers = [run_alike(pruned, *run) for run in runs]
        del pruned
        wanted = outputs_without(model, mixtures, removed, runs)
    except TersorError as failure:
        cause = failure.__cause__ or failure
        return Verdict(float("inf"), 0.0, f"the model without them fails: {type(cause).__name__}: {cause}")
    error = max(distance(answer, right) for answer, right in zip(answers, wanted, strict=True))
    effect = max(distance(old, right) for old, right in zip(before, wanted, strict=True))
    if effect == float("inf"):
        return Verdict(error, effect, "without them outputs have another shape, or are NaN or Inf")
    if error > TOLERANCE:
        reason = f"outputs differ from those of the model in which they are never chosen by {error:.1e} of their scale"
        return Verdict(error, effect, reason)
    return Verdict(error, effect)


class Verifier:
    """Checks removals of experts: on random weights at the example inputs' and other shapes, and on the real ones.

    Args:
        model: In evaluation mode; it stays as it is.
        mixtures: From `find_mixtures`.
        runs: Example inputs.
        seed: Of the weights.
    """

    def __init__(self, model: nn.Module, mixtures: Mixtures, runs: Sequence[Run], seed: int = 0) -> None:
        self.model, self.mixtures, self.runs, self.seed = model, mixtures, runs, seed
        self.random = lively(model, mixtures, runs, seed)
        self.random_runs = [*runs, *other_shapes(self.random, runs[0])]

    def check_alone(self, removed: Removed) -> Verdict:
        """On random weights, and again with others in their place; they must have been chosen for it to say anything.

        What is cut by mistake - a table of as many rows of which an example reads the first - shows with the others.
        """
        for choice in (removed, self._others(removed)):
            verdict = self.check(choice)
            for attempt in range(1, ATTEMPTS):
                if not verdict.ok or verdict.effect >= SEEN:
                    break
                other = lively(self.model, self.mixtures, self.runs, self.seed + attempt)
                verdict = compare_experts(other, self.mixtures, choice, self.random_runs)
            if verdict.ok and verdict.effect < SEEN:
                verdict = Verdict(verdict.error, verdict.effect, "no example is sent to them; give more examples")
            if not verdict.ok:
                break
        return verdict

    def _others(self, removed: Removed) -> dict[str, list[int]]:
        """As many others, of the same groups."""
        found: dict[str, list[int]] = {}
        for name, gone in removed.items():
            mixture = self.mixtures[name]
            for pool in mixture.groups or (tuple(range(mixture.size)),):
                count = len(set(pool) & set(gone))
                found.setdefault(name, []).extend(sorted(pool, key=lambda expert: expert in gone)[:count])
        return found

    def check(self, removed: Removed) -> Verdict:
        """On random weights."""
        return compare_experts(self.random, self.mixtures, removed, self.random_runs)

    def check_real(self, removed: Removed) -> Verdict:
        """On the weights that the model has."""
        return compare_experts(self.model, self.mixtures, removed, self.runs)
