"""Expert pruning: removes whole experts of mixtures, and proves that the rest is chosen from as before.

Muzio et al. 2024 (SEER-MoE), https://arxiv.org/abs/2404.05089; Lu et al. 2024, https://arxiv.org/abs/2402.14800.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from tersor.core.batch import Batch
from tersor.core.config import Config
from tersor.errors import CoverageError, SurgeryError
from tersor.graph import Frozen
from tersor.graph.coupling import Run, runs_of
from tersor.graph.expert_surgery import Verifier, check_removable, plan_experts, together
from tersor.graph.experts import Mixture, Mixtures, find_mixtures
from tersor.graph.verify import sound_together
from tersor.probe import multiply_accumulates
from tersor.prune.choosing import Loss, evaluation, given_batches, set_modes
from tersor.prune.expert_scores import Scores, by_chance, loss_increase, usage
from tersor.prune.outcome import Outcome, carried_out, count_parameters

DEFAULT_AMOUNT = 0.25
Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]


class Experts(Config):
    """How many experts go, chosen how. At most one of `amount` and `experts`.

    Attributes:
        amount: Share of each mixture's experts, in [0, 1); rounded to whole experts. 0.25 where nothing else decides.
        experts: Mixture -> numbers of the experts that go; other mixtures stay whole.
        criterion: The lowest scores go. `usage`: how often the router sends tokens to the expert, weighted by its
            probability. `loss`: by how much the loss rises if the expert alone can't be chosen. `random`: chance.
        exclude: Glob patterns of mixtures that stay whole.
        verify: Whether to compare with the original in which the removed experts can never be chosen.
        seed: Of the random criterion and the verification.
    """

    amount: float | None = Field(default=None, ge=0, lt=1)
    experts: dict[str, Numbers] | None = Field(default=None, min_length=1)
    criterion: Literal["usage", "loss", "random"] = "usage"
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    verify: bool = True
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Experts:
        if self.amount is not None and self.experts is not None:
            raise ValueError("expected either an amount or experts, not both")
        return self


@dataclass(frozen=True, kw_only=True)
class ExpertReport(Outcome):
    """A model with fewer experts; `Outcome` has what all prunings tell.

    Experts that no token was sent to count no multiply-accumulates, before or after.

    Attributes:
        removed: Mixture -> numbers of the experts that went, ascending.
        kept: Mixture -> numbers, before, of the experts that stay; of every mixture that could have lost some.
        parts: Mixture -> parameters of its router and experts.
        scores: Mixture -> score of each expert; empty if the experts were named.
    """

    removed: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, tuple[str, ...]]
    scores: Scores

    def __str__(self) -> str:
        gone, left = sum(map(len, self.removed.values())), sum(map(len, self.kept.values()))
        numbers = [f"  {name}: {', '.join(map(str, numbers))}" for name, numbers in self.removed.items()]
        return self.told([f"experts removed: {gone} of {gone + left} in {len(self.kept)} mixtures", *numbers])


def experts(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Any = None,
    loss: Loss | None = None,
    inplace: bool = False,
    **settings: Any,
) -> ExpertReport:
    """Removes the least used experts of every mixture of a copy of `model`, and proves the result right.

    ```python
    report = tersor.prune.experts(model, tokens, amount=0.25, data=batches)
    report = tersor.prune.experts(model, tokens, amount=0.5, criterion="loss", data=batches, loss=loss)
    report = tersor.prune.experts(model, tokens, experts={"model.layers.3.mlp": [1, 5]})
    ```

    Args:
        model: Stays as it is unless `inplace`.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keywords, or a list of several of these.
        data: What `usage` (by default: the example inputs) and `loss` are measured on: a split, one batch, or a list
            of batches. With data, BatchNorm statistics are re-estimated.
        loss: `(outputs, labels) -> scalar`, for the criterion `loss`.
        inplace: Changes `model` itself, once all checks have passed. Rebuild its optimizer.
        **settings: Fields of `Experts`: `amount` (0.25), `experts`, `criterion` ("usage"), `exclude`, `verify`, `seed`.

    Raises:
        ConfigError: if a setting is wrong, or data or a loss is missing.
        ModelError: if the model does not run on the example inputs.
        CoverageError: if the model has no mixture that can shrink, with the reasons.
        SurgeryError: if a named mixture or expert does not exist or cannot go.
        NonFiniteError: if a score is NaN or Inf.
    """
    wanted = Experts(**settings)
    batches = given_batches(data, loss, by_loss=wanted.experts is None and wanted.criterion == "loss")
    with evaluation(model) as modes:
        report = _Operation(model, runs_of(example_inputs), wanted, batches, loss).run(inplace)
    set_modes(report.model, modes)
    return report


class _Operation:
    """One call of `experts`, step by step."""

    def __init__(
        self, model: nn.Module, runs: Sequence[Run], settings: Experts, batches: list[Batch] | None, loss: Loss | None
    ) -> None:
        self.model, self.runs, self.settings, self.batches, self.loss = model, runs, settings, batches, loss
        self.frozen: list[Frozen] = []
        self.seconds: dict[str, float] = {}
        self.error: float | None = None
        self.notes: list[str] = []

    def run(self, inplace: bool) -> ExpertReport:
        started = time.perf_counter()
        mixtures = find_mixtures(self.model, self.runs)
        self.frozen += mixtures.frozen
        free = self._free(mixtures)
        known = len(self.frozen)
        self.seconds["discovery"] = time.perf_counter() - started
        started = time.perf_counter()
        scores = {} if self.settings.experts is not None else self._scores(mixtures, free)
        self.seconds["scoring"] = time.perf_counter() - started
        started = time.perf_counter()
        removed = self._named(free) if self.settings.experts is not None else self._lowest(free, scores)
        if self.settings.verify and removed:
            removed = self._proven(mixtures, removed)
        self.seconds["verification"] = time.perf_counter() - started
        for mixture in free:
            if mixture.name in removed and mixture.unread:
                names = ", ".join(mixture.unread)
                self.notes.append(f"{mixture.name}: the examples never read {names}; they keep {mixture.size} entries")
        surgery = plan_experts(self.model, mixtures, removed)
        before, macs = count_parameters(self.model), multiply_accumulates(self.model, *self.runs[0])
        result, notes = carried_out(self.model, surgery, self.batches, inplace)
        self.notes += notes
        stuck = {item.name for item in self.frozen[known:]}
        whole = {mixture.name: mixture for mixture in free if mixture.name not in stuck}
        return ExpertReport(
            model=result,
            surgery=surgery,
            removed=removed,
            kept={name: _others(mixture, removed.get(name, ())) for name, mixture in whole.items()},
            parts={name: _parts(self.model, mixture) for name, mixture in whole.items()},
            frozen=self.frozen,
            scores=scores,
            params_before=before,
            params_after=count_parameters(result),
            macs_before=macs,
            macs_after=multiply_accumulates(result, *self.runs[0]),
            max_error=self.error,
            seconds=self.seconds,
            notes=self.notes,
        )

    def _free(self, mixtures: Mixtures) -> list[Mixture]:
        """Mixtures that may shrink. What counts their experts may not count those of one that stays whole."""
        named, free = self.settings.experts, []
        out = {
            item.name for item in mixtures.found if any(fnmatch.fnmatch(item.name, p) for p in self.settings.exclude)
        }
        for group in together(mixtures.found):
            bound = next((item.name for item in group if item.name in out), None)
            for item in group:
                if item.name in out:
                    self.frozen.append(Frozen(item.name, "excluded"))
                elif bound is not None:
                    self.frozen.append(Frozen(item.name, f"an attribute also counts the experts of {bound}, excluded"))
                else:
                    free.append(item)
        unknown = [name for name in named or () if name not in {item.name for item in free}]
        if unknown:
            raise SurgeryError(
                f"experts: the model has no mixtures {unknown} that can shrink; "
                f"it has {[item.name for item in free][:8]}" + self._reasons()
            )
        if not free:
            raise CoverageError(
                f"{type(self.model).__name__} has no mixture of experts that can shrink"
                + (self._reasons() or "; nothing chooses among entries that a parameter gives")
            )
        return free if named is None else [item for item in free if item.name in named]

    def _reasons(self) -> str:
        return "".join(f"; {item.name}: {item.reason}" for item in self.frozen[:8])

    def _scores(self, mixtures: Mixtures, free: Sequence[Mixture]) -> Scores:
        if self.settings.criterion == "random":
            return by_chance(free, self.settings.seed)
        runs = self.runs if self.batches is None else [(batch.args, batch.kwargs) for batch in self.batches]
        if self.settings.criterion == "usage":
            found = usage(self.model, mixtures, runs)
            return {mixture.name: found[mixture.name] for mixture in free}
        assert self.batches is not None  # noqa: S101 - `experts` has seen to it
        assert self.loss is not None  # noqa: S101
        able = [mixture for mixture in free if mixture.least < mixture.size]
        return loss_increase(self.model, mixtures, able, self.batches, self.loss)

    def _named(self, free: Sequence[Mixture]) -> dict[str, tuple[int, ...]]:
        named = self.settings.experts or {}
        removed = {mixture.name: tuple(sorted(set(named[mixture.name]))) for mixture in free}
        for mixture in free:
            check_removable(mixture, removed[mixture.name])
        return removed

    def _lowest(self, free: Sequence[Mixture], scores: Scores) -> dict[str, tuple[int, ...]]:
        """The lowest scores of every mixture, or of every group of one that chooses within groups."""
        share = DEFAULT_AMOUNT if self.settings.amount is None else self.settings.amount
        removed = {}
        for group in together(free):
            counts = [_quota(mixture, share) for mixture in group]
            for mixture, (asked, _) in zip(group, counts, strict=True):
                count = min(able for _, able in counts)
                pools = mixture.groups or (tuple(range(mixture.size)),)
                self._note(mixture, share, asked * len(pools), count * len(pools))
                values = scores.get(mixture.name, ())
                gone = [e for pool in pools for e in sorted(pool, key=lambda e: values[e] if values else 0.0)[:count]]
                if gone:
                    removed[mixture.name] = tuple(sorted(gone))
        return {mixture.name: removed[mixture.name] for mixture in free if mixture.name in removed}

    def _note(self, mixture: Mixture, share: float, asked: int, count: int) -> None:
        if not asked:
            self.notes.append(
                f"{mixture.name}: an amount of {share:g} is less than one of {mixture.size} experts: none was removed"
            )
        elif count < asked:
            self.notes.append(
                f"{mixture.name}: {asked} of {mixture.size} experts were asked for, only {count} can go: "
                f"its router needs {mixture.least} to choose from"
            )

    def _proven(self, mixtures: Mixtures, removed: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """What of it is right, each alone and all together on random weights, and then on the real ones."""
        verifier = Verifier(self.model, mixtures, self.runs, self.settings.seed)
        joined = {group[0].name: [item.name for item in group] for group in together(mixtures.found)}

        def part(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
            return {name: removed[name] for first in names for name in joined[first] if name in removed}

        def settle(names: Sequence[str], check: Any, where: str) -> list[str]:
            sound, frozen, error = sound_together(names, lambda tried: check(part(tried)), where=where)
            self.frozen += [Frozen(name, item.reason) for item in frozen for name in part([item.name])]
            self.error = max(self.error or 0.0, error)
            return sound

        sound = []
        for name in [first for first in joined if part([first])]:
            sound += settle([name], verifier.check_alone, "verification")
        if len(sound) > 1:
            sound = settle(sound, verifier.check, "verification, together with others")
        sound = settle(sound, verifier.check_real, "verification on the real weights")
        if self.settings.experts is not None and len(part(sound)) < len(removed):
            raise SurgeryError(f"these experts cannot be removed{self._reasons()}")
        if not sound:
            raise CoverageError(f"no expert can be removed{self._reasons()}")
        left = part(sound)
        return {name: left[name] for name in removed if name in left}


def _quota(mixture: Mixture, share: float) -> tuple[int, int]:
    """How many of a mixture's experts, or of each of its groups, are asked for, and how many of them can go."""
    groups = max(1, len(mixture.groups))
    asked = int(share * (mixture.size // groups) + 0.5)
    return asked, max(0, min(asked, (mixture.size - mixture.least) // groups))


def _others(mixture: Mixture, removed: Sequence[int]) -> tuple[int, ...]:
    return tuple(number for number in range(mixture.size) if number not in removed)


def _parts(model: nn.Module, mixture: Mixture) -> tuple[str, ...]:
    own = {place.parameter for place in mixture.members}
    starts = tuple(f"{path}." for path in mixture.lists)
    return tuple(name for name, _ in model.named_parameters() if name in own or name.startswith(starts))
