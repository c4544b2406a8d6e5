"""Numerical proof of a surgery: the pruned model must answer like the masked original.

Default weights can make the proof empty (a layer scale of 1e-6 hides everything behind it), so families are checked
on a copy with fresh random weights of visible size and BatchNorm statistics that fit them, at two input shapes, and
the mask must have a visible effect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError, TersorError
from tersor.graph.coupling.couple import Coupling, Run, named_outputs, named_tensors, run_alike
from tersor.graph.coupling.family import Frozen
from tersor.graph.coupling.trace import Rule
from tersor.graph.reference import masked_outputs
from tersor.graph.surgery import apply_surgery, plan_surgery

TOLERANCE = 1e-4
VISIBLE = 1e-6
ATTEMPTS = 3  # other halves, where removing one shows nothing


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        error: Largest difference between pruned and masked outputs, relative to the largest output.
        effect: Largest difference between masked and original outputs, relative likewise.
        reason: Why it failed; empty if it did not.
    """

    error: float
    effect: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the pruned model is right."""
        return not self.reason


class Verifier:
    """Checks surgeries on a re-randomised copy of a model.

    Args:
        model: In evaluation mode; it stays as it is.
        coupling: Of the model.
        runs: Example inputs; a second shape is made from the first.
        rules: As given to `couple`.
        seed: Of weights and of the units that are removed.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        runs: Sequence[Run],
        *,
        rules: Mapping[str, Rule] | None = None,
        seed: int = 0,
    ) -> None:
        self.coupling, self.rules, self.seed = coupling, rules, seed
        self.model = randomised(model, runs, seed)
        self.runs = [*runs, *other_shapes(self.model, runs[0])]
        with torch.no_grad():
            self.expected = [run_alike(self.model, args, kwargs) for args, kwargs in self.runs]

    def half(self, names: Sequence[str], attempt: int = 0) -> dict[str, Tensor]:
        """About half of the units of each family, at random, an odd number and not all.

        An even number can be closed under a wrong pairing of units, such as a reversal, which then shows nothing.
        """
        generator = torch.Generator().manual_seed(self.seed + attempt)
        chosen = {}
        for name in names:
            size = self.coupling[name].size
            count = max(1, (size // 2 - 1) | 1)
            chosen[name] = torch.randperm(size, generator=generator)[:count].sort().values
        return chosen

    def check(self, removed: Mapping[str, Tensor]) -> Verdict:
        """Prunes, and compares with the masked original."""
        return compare(self.model, self.coupling, removed, self.runs, rules=self.rules, expected=self.expected)

    def settle(self, names: Sequence[str]) -> tuple[list[str], list[Frozen], float]:
        """Finds which of these families can be pruned, each alone and all together.

        Returns:
            Names of sound families, what was frozen with the reason, and the largest error of what passed.
        """
        sound, frozen, worst = [], [], 0.0
        for name in names:
            for attempt in range(ATTEMPTS):
                verdict = self.check(self.half([name], attempt))
                if not verdict.ok or verdict.effect >= VISIBLE:
                    break
            if verdict.ok and verdict.effect < VISIBLE:
                verdict = Verdict(verdict.error, verdict.effect, "removing it has no visible effect to verify")
            if verdict.ok:
                sound.append(name)
                worst = max(worst, verdict.error)
            else:
                frozen.append(Frozen(name, f"verification: {verdict.reason}"))
        kept, more, error = sound_together(sound, lambda tried: self.check(self.half(tried)))
        return kept, frozen + more, max(worst, error)


def sound_together(
    names: Sequence[str],
    check: Callable[[Sequence[str]], Verdict],
    *,
    where: str = "verification, together with others",
    base: Sequence[str] = (),
) -> tuple[list[str], list[Frozen], float]:
    """As many of `names` as are right together, found by halving: one check if all are.

    Args:
        names: Of families.
        check: What pruning these families together comes to.
        where: Begins the reason of what is frozen.
        base: Families that are part of every check.

    Returns:
        Names of sound families, what was frozen with the reason, and the largest error of what passed.
    """
    if not names:
        return [], [], 0.0
    verdict = check([*base, *names])
    if verdict.ok:
        return list(names), [], verdict.error
    if len(names) == 1:
        return [], [Frozen(names[0], f"{where}: {verdict.reason}")], 0.0
    middle = len(names) // 2
    left, frozen, worst = sound_together(names[:middle], check, where=where, base=base)
    right, more, error = sound_together(names[middle:], check, where=where, base=[*base, *left])
    return left + right, frozen + more, max(worst, error)


def compare(
    model: nn.Module,
    coupling: Coupling,
    removed: Mapping[str, Tensor],
    runs: Sequence[Run],
    *,
    rules: Mapping[str, Rule] | None = None,
    expected: Sequence[Any] | None = None,
) -> Verdict:
    """Prunes a copy of `model` and compares it with the masked original on all runs."""
    try:
        pruned = apply_surgery(copy.deepcopy(model), plan_surgery(model, coupling, removed))
        with torch.no_grad():
            answers = [run_alike(pruned, args, kwargs) for args, kwargs in runs]
    except TersorError as failure:
        cause = failure.__cause__ or failure
        return Verdict(float("inf"), 0.0, f"the pruned model fails: {type(cause).__name__}: {cause}")
    del pruned
    masked = masked_outputs(model, coupling, removed, runs, rules)
    errors = [distance(answer, wanted) for answer, wanted in zip(answers, masked, strict=True)]
    error = max(errors)
    effect = max(distance(old, wanted) for old, wanted in zip(expected or masked, masked, strict=True))
    reason = "" if error <= TOLERANCE else f"outputs differ from the masked model by {error:.1e} of their scale"
    return Verdict(error, effect, reason)


def distance(left: Any, right: Any) -> float:
    """Largest difference over all outputs, relative to each output's largest magnitude; infinite if shapes differ."""
    worst = 0.0
    first, second = named_outputs(left), named_outputs(right)
    if len(first) != len(second):
        return float("inf")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not (a.is_floating_point() or a.is_complex()) or not a.numel():
            continue
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        a, b = a.double(), b.double()
        both = torch.isfinite(a) & torch.isfinite(b)
        if bool((torch.isfinite(a) != torch.isfinite(b)).any()):
            return float("inf")
        if bool(both.any()):
            scale = float(b[both].abs().max())
            worst = max(worst, float((a - b)[both].abs().max()) / max(scale, 1e-12))
    return worst


def randomised(model: nn.Module, runs: Sequence[Run], seed: int) -> nn.Module:
    """A copy with random weights under which every part of the model has a visible effect, in evaluation mode."""
    fresh = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in named_tensors(fresh).items():
            if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
                continue
            if tensor.ndim >= 2:
                owner = fresh.get_submodule(name.rpartition(".")[0])
                fan_in = 1 if isinstance(owner, nn.Embedding) else max(1, tensor[0].numel())
                noise = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
            elif name.endswith("bias"):
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            else:
                noise = 0.5 + torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise)
        norms = [module for module in fresh.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        saved = [module.momentum for module in norms]
        for module in norms:
            module.momentum = None
            module.reset_running_stats()
            module.train()
        if norms:
            for args, kwargs in runs:
                _try(fresh, args, kwargs)
        for module, momentum in zip(norms, saved, strict=True):
            module.momentum = momentum
    return fresh.eval()


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad():
            run_alike(model, args, kwargs)
    except ModelError:
        return False
    return True


def other_shapes(model: nn.Module, run: Run) -> list[Run]:
    """Variants of a run with another batch size and, where the model takes it, another length or image size."""
    args, kwargs = run
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        return []
    found: list[Run] = []
    for change in (_longer_batch, _shorter):
        variant = change(run, tensors)
        if variant is not None and _try(model, *variant):
            found.append(variant)
    return found


def _changed(run: Run, function: Any) -> Run:
    args, kwargs = run
    return (
        tuple(function(value) if isinstance(value, Tensor) else value for value in args),
        {name: function(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()},
    )


def _longer_batch(run: Run, tensors: Sequence[Tensor]) -> Run | None:
    batch = tensors[0].shape[0]

    def repeat(value: Tensor) -> Tensor:
        return torch.cat([value, value[:1].flip(-1)]) if value.ndim and value.shape[0] == batch else value

    return _changed(run, repeat)


def _shorter(run: Run, tensors: Sequence[Tensor]) -> Run | None:
    first = tensors[0]
    if first.ndim == 4 and first.is_floating_point():
        return _changed(run, lambda v: v[..., : v.shape[-2] // 2, :].contiguous() if v.shape == first.shape else v)
    if first.ndim >= 2 and first.shape[1] > 2:
        size = first.shape[1]
        return _changed(run, lambda v: v[:, : size - 1].contiguous() if v.ndim > 1 and v.shape[1] == size else v)
    return None
