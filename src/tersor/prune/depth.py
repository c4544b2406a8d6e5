"""Depth pruning: replaces whole blocks by the identity, and proves that nothing else changed.

Men et al. 2024 (ShortGPT), https://arxiv.org/abs/2403.03853.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from tersor.core.batch import Batch
from tersor.core.config import Config
from tersor.core.surgery import SkippedBlock, Surgery
from tersor.errors import CoverageError, ModelError, SurgeryError
from tersor.graph import Frozen, Verdict, apply_surgery
from tersor.graph.blocks import bypassed, find_blocks
from tersor.graph.coupling import Run, runs_of
from tersor.graph.coupling.couple import run_model
from tersor.graph.verify import TOLERANCE, VISIBLE, distance, other_shapes, randomised
from tersor.probe import multiply_accumulates
from tersor.prune.block_scores import dissimilarity, loss_increase
from tersor.prune.choosing import Loss, evaluation, given_batches, set_modes
from tersor.prune.outcome import Outcome, carried_out, count_parameters

DEFAULT_AMOUNT = 0.25


class Depth(Config):
    """How many blocks go, chosen how. At most one of `amount` and `blocks`.

    Attributes:
        amount: Share of the blocks that could go, in [0, 1); rounded to whole blocks. 0.25 where nothing else decides.
        blocks: Paths of the blocks that go; whatever is named here is tried, whether it looks like a block or not.
        criterion: The lowest scores go. `similarity`: one minus the mean cosine of a block's input and output.
            `loss`: by how much the loss rises when the block alone is skipped. `random`: chance.
        exclude: Paths of blocks that stay.
        verify: Whether to compare every step with the masked model, on random weights and at other shapes.
        seed: Of the random criterion and the verification.
    """

    amount: float | None = Field(default=None, ge=0, lt=1)
    blocks: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    criterion: Literal["similarity", "loss", "random"] = "similarity"
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    verify: bool = True
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Depth:
        if self.amount is not None and self.blocks is not None:
            raise ValueError("expected either an amount or blocks, not both")
        return self


@dataclass(frozen=True, kw_only=True)
class DepthReport(Outcome):
    """A model with fewer blocks; `Outcome` has what all prunings tell.

    Attributes:
        removed: Paths of the blocks that went, in the model's order.
        kept: Paths of the blocks that could have gone.
        scores: Block -> score; empty if the blocks were named.
    """

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    scores: Mapping[str, float]

    def __str__(self) -> str:
        names = f"({', '.join(self.removed)})"
        return self.told([f"blocks removed: {len(self.removed)} of {len(self.removed) + len(self.kept)} {names}"])


def depth(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Any = None,
    loss: Loss | None = None,
    inplace: bool = False,
    **settings: Any,
) -> DepthReport:
    """Replaces the least important blocks of a copy of `model` by the identity, and proves the result right.

    ```python
    report = tersor.prune.depth(model, tokens, amount=0.25)
    report = tersor.prune.depth(model, tokens, amount=0.5, criterion="loss", data=batches, loss=loss)
    report = tersor.prune.depth(model, tokens, blocks=["transformer.h.7", "transformer.h.8"])
    ```

    Args:
        model: Stays as it is unless `inplace`.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keywords, or a list of several of these.
        data: What `similarity` (by default: the example inputs) and `loss` are measured on: a split, one batch, or
            a list of batches. With data, BatchNorm statistics are re-estimated.
        loss: `(outputs, labels) -> scalar`, for the criterion `loss`.
        inplace: Changes `model` itself, once all checks have passed. Rebuild its optimizer.
        **settings: Fields of `Depth`: `amount` (0.25), `blocks`, `criterion` ("similarity"), `exclude`, `verify`,
            `seed`.

    Raises:
        ConfigError: if a setting is wrong, or data or a loss is missing.
        ModelError: if the model does not run on the example inputs.
        CoverageError: if no block can go, with the reasons.
        SurgeryError: if a named block does not exist or cannot go.
    """
    wanted = Depth(**settings)
    batches = given_batches(data, loss, by_loss=wanted.blocks is None and wanted.criterion == "loss")
    with evaluation(model) as modes:
        report = _Operation(model, runs_of(example_inputs), wanted, batches, loss).run(inplace)
    set_modes(report.model, modes)
    return report


class _Operation:
    """One call of `depth`, step by step."""

    def __init__(
        self, model: nn.Module, runs: Sequence[Run], settings: Depth, batches: list[Batch] | None, loss: Loss | None
    ) -> None:
        self.model, self.runs, self.settings, self.batches, self.loss = model, runs, settings, batches, loss
        self.frozen: list[Frozen] = []
        self.seconds: dict[str, float] = {}
        self.error: float | None = None
        self.notes: list[str] = []

    def run(self, inplace: bool) -> DepthReport:
        started = time.perf_counter()
        found, self.frozen = find_blocks(self.model, self.runs, self.settings.blocks)
        self.frozen += [Frozen(block.path, "excluded") for block in found if block.path in self.settings.exclude]
        found = [block for block in found if block.path not in self.settings.exclude]
        self._all_known(found)
        self.seconds["discovery"] = time.perf_counter() - started
        started = time.perf_counter()
        scores = {} if self.settings.blocks is not None else self._scores(found)
        self.seconds["scoring"] = time.perf_counter() - started
        started = time.perf_counter()
        ranked = sorted(found, key=lambda block: scores.get(block.path, 0.0))
        removed = self._accept(ranked)
        removed.sort(key=found.index)
        surgery = Surgery(skipped=tuple(removed))
        if self.settings.verify and removed:
            self._prove(removed)
        self.seconds["verification"] = time.perf_counter() - started
        before, macs = count_parameters(self.model), multiply_accumulates(self.model, *self.runs[0])
        result, notes = carried_out(self.model, surgery, self.batches, inplace)
        self.notes += notes
        gone = {block.path for block in removed} | {item.name for item in self.frozen}
        return DepthReport(
            model=result,
            surgery=surgery,
            removed=tuple(block.path for block in removed),
            kept=tuple(block.path for block in found if block.path not in gone),
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

    def _all_known(self, found: Sequence[SkippedBlock]) -> None:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in self.frozen[:8])
        if self.settings.blocks is not None and len(found) < len(set(self.settings.blocks)):
            raise SurgeryError(f"these blocks cannot be skipped: {reasons}")
        if not found:
            raise CoverageError(
                f"{type(self.model).__name__} has no block that can be skipped"
                + (
                    f": {reasons}"
                    if reasons
                    else "; none has a way around its weights and answers in its input's shape"
                )
            )
        if self.settings.blocks is None and len(found) == 1:
            raise CoverageError(f"{found[0].path!r} is the only block; at least one must stay")

    def _scores(self, found: Sequence[SkippedBlock]) -> dict[str, float]:
        if self.settings.criterion == "random":
            generator = torch.Generator().manual_seed(self.settings.seed)
            chance = torch.rand(len(found), generator=generator).tolist()
            return {block.path: value for block, value in zip(found, chance, strict=True)}
        runs = self.runs if self.batches is None else [(batch.args, batch.kwargs) for batch in self.batches]
        if self.settings.criterion == "similarity":
            return dissimilarity(self.model, found, runs)
        assert self.batches is not None  # noqa: S101 - `depth` has seen to it
        assert self.loss is not None  # noqa: S101
        return loss_increase(self.model, found, self.batches, self.loss)

    def _accept(self, ranked: Sequence[SkippedBlock]) -> list[SkippedBlock]:
        """The first blocks of the ranking that can go together, as many as were asked for."""
        named = self.settings.blocks is not None
        share = DEFAULT_AMOUNT if self.settings.amount is None else self.settings.amount
        count = len(ranked) if named else min(int(share * len(ranked) + 0.5), len(ranked) - 1)
        if not count:
            self.notes.append(f"an amount of {share:g} is less than one of {len(ranked)} blocks: nothing was removed")
        removed: list[SkippedBlock] = []
        verifier = _Verifier(self.model, self.runs, self.settings.seed) if self.settings.verify and count else None
        for block in ranked:
            if len(removed) == count:
                break
            if verifier is not None:
                verdict = verifier.check([*removed, block])
                if not verdict.ok:
                    self.frozen.append(Frozen(block.path, f"verification: {verdict.reason}"))
                    if named:
                        raise SurgeryError(f"block {block.path!r} cannot be skipped: {verdict.reason}")
                    continue
                self.error = max(self.error or 0.0, verdict.error)
            removed.append(block)
        if count and not removed:
            raise CoverageError(
                "no block can be skipped: " + "; ".join(f"{item.name}: {item.reason}" for item in self.frozen[:8])
            )
        if len(removed) < count:
            self.notes.append(f"{count} blocks were asked for, only {len(removed)} can go")
        return removed

    def _prove(self, removed: Sequence[SkippedBlock]) -> None:
        """The surgery that is really done, on the real weights."""
        verdict = compare_skipped(self.model, removed, self.runs)
        if not verdict.ok:
            raise SurgeryError(f"the model without blocks is not as expected: {verdict.reason}; nothing was changed")
        self.error = max(self.error or 0.0, verdict.error)


class _Verifier:
    """Checks skips on random weights of visible size, at the example inputs' and other shapes."""

    def __init__(self, model: nn.Module, runs: Sequence[Run], seed: int) -> None:
        self.model = randomised(model, runs, seed)
        self.runs = [*runs, *other_shapes(self.model, runs[0])]
        self.before: list[Any] = []

    def check(self, blocks: Sequence[SkippedBlock]) -> Verdict:
        """The last block must show: without it the outputs differ from those with it."""
        if not self.before:
            self.before = _outputs(self.model, blocks[:-1], self.runs)
        verdict = compare_skipped(self.model, blocks, self.runs, self.before)
        if verdict.ok:
            self.before = []
        return verdict


def compare_skipped(
    model: nn.Module, blocks: Sequence[SkippedBlock], runs: Sequence[Run], before: Sequence[Any] | None = None
) -> Verdict:
    """Skips blocks of a copy of `model`; compares with the model whose blocks' outputs are replaced by their inputs.

    Args:
        model: In evaluation mode; it stays as it is.
        blocks: That are skipped.
        runs: Arguments of the model.
        before: Outputs from which the result must differ visibly.
    """
    try:
        shallow = apply_surgery(copy.deepcopy(model), Surgery(skipped=tuple(blocks)))
        with torch.no_grad():
            answers = [run_model(shallow, *copy.deepcopy(run)) for run in runs]
    except ModelError as failure:
        cause = failure.__cause__
        return Verdict(float("inf"), 0.0, f"the model without it fails: {cause if cause is not None else failure}")
    wanted = _outputs(model, blocks, runs)
    error = max(distance(answer, right) for answer, right in zip(answers, wanted, strict=True))
    if error > TOLERANCE:
        return Verdict(error, 0.0, f"outputs differ from those with the block bypassed by {error:.1e} of their scale")
    effect = 1.0 if before is None else max(distance(a, b) for a, b in zip(before, wanted, strict=True))
    return Verdict(error, effect, "" if effect >= VISIBLE else "removing it has no visible effect to verify")


def _outputs(model: nn.Module, blocks: Sequence[SkippedBlock], runs: Sequence[Run]) -> list[Any]:
    with bypassed(model, blocks), torch.no_grad():
        return [run_model(model, *copy.deepcopy(run)) for run in runs]
