"""Iterative pruning with rewinding: lottery tickets.

Train, remove a share of what is left, set the survivors back to earlier values, and again. Frankle & Carbin 2018,
https://arxiv.org/abs/1803.03635; rewinding to a few steps after the start: Frankle et al. 2019,
https://arxiv.org/abs/1903.01611; keeping the trained values instead (fine-tuning): Renda et al. 2020,
https://arxiv.org/abs/2003.02389.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from tersor.core.candidate import Candidate, apply_masks
from tersor.core.config import Config
from tersor.core.context import Context
from tersor.errors import ConfigError
from tersor.prune.gradual import Grown, Measure, Training, WhileTraining, growing, training_of
from tersor.prune.masks import check
from tersor.prune.schedule import Spacing, iterative
from tersor.prune.sparsity import Sparsity


class Rounds(Config):
    """How often weights go, and what becomes of the others.

    Attributes:
        rounds: How often weights are removed.
        spacing: `geometric` removes the same share of what is left in every round, `equal` the same number.
        rewind_step: After every removal the surviving weights (and all other parameters and buffers) are set back to
            what they were after that many training steps; 0 is the model as given. None keeps the trained values and
            starts with a removal: for models that are trained already.
    """

    rounds: int = Field(default=3, ge=1)
    spacing: Spacing = "geometric"
    rewind_step: int | None = Field(default=0, ge=0)


def lottery_ticket(
    module: nn.Module,
    training: Training,
    settings: Sparsity,
    *,
    rounds: Rounds | None = None,
    masks: Mapping[str, Tensor] | None = None,
    measure: Measure | None = None,
) -> Grown:
    """Trains `module` in place, removes, rewinds, in rounds; ends with a training.

    Each training runs the whole schedule from its start, also after rewinding to a later step. With rewinding there
    is one training more than rounds.

    Args:
        module: Changed in place.
        training: Data, loss, optimizer; the same in every round.
        settings: Final amount, criterion, pattern.
        rounds: How many, and where to rewind to.
        masks: Entries that are gone already.
        measure: `module -> evidence`, asked before every removal, for criteria that need data.

    Raises:
        ConfigError: if the amount is not free, or training is shorter than `rewind_step`.
    """
    plan = rounds or Rounds()
    amounts = iterative(growing(settings), plan.rounds, spacing=plan.spacing)
    grown = Grown(masks=dict(masks or {}))
    early: dict[str, Tensor] = {}
    if plan.rewind_step is not None:
        early = _first_training(module, training, grown, plan.rewind_step)
    for amount in amounts:
        grown.prune(module, settings, amount, measure)
        if plan.rewind_step is not None:
            module.load_state_dict(early)
            apply_masks(module, grown.masks)
        grown.trace += training.run(module, lambda: apply_masks(module, grown.masks))
        check(module, grown.masks)
    return grown


def _first_training(module: nn.Module, training: Training, grown: Grown, rewind_step: int) -> dict[str, Tensor]:
    """Trains without removing anything; the state after `rewind_step` steps."""
    if rewind_step > training.steps:
        raise ConfigError(f"rewind_step: training takes {training.steps} steps only, got {rewind_step}")
    early = _state(module) if rewind_step == 0 else {}
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        apply_masks(module, grown.masks)
        if done == rewind_step:
            early.update(_state(module))

    grown.trace += training.run(module, after_step)
    return early


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class LotteryTicket(WhileTraining):
    """Trains, prunes and rewinds in rounds, on the task's loss; `repeat` says how often and where to."""

    name: ClassVar[str] = "prune.lottery_ticket"

    repeat: Rounds = Field(default_factory=Rounds)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Trains a copy."""
        started = time.perf_counter()
        fresh = candidate.for_weights()
        grown = lottery_ticket(
            fresh.module,
            training_of(context, self.name, self.schedule),
            self.settings(),
            rounds=self.repeat,
            masks=fresh.masks,
            measure=self.measure(context),
        )
        return self.record(fresh, grown, started)
