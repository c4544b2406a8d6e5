"""What the training loop is handed beside model, data and loss: functions, and things that train or are kept along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from tersor.core.batch import Batch

BatchLoss = Callable[[nn.Module, Batch], Tensor]


class Stateful(Protocol):
    """Something whose state belongs into a checkpoint: tensors, numbers, strings, lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Takes it up again."""


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls.

    Attributes:
        before_step: `(step, steps in all)`, before every step, e.g. to freeze a part in time.
        after_step: After every optimizer step, e.g. to apply masks.
        evaluate: `module -> metric`, higher is better, after every epoch, on the search split.
        finish: Called with the trained module in evaluation mode, without gradients, e.g. to re-estimate BatchNorm
            statistics; also when a training that had ended is called again.
        progress: `(steps done, steps in all, facts)` after every step; facts are `loss`, `examples/s` and the last
            `metric`. After an evaluation once more for the same step, with the epoch's loss and the new metric.
        companions: Modules that the loss owns and that train along, e.g. projectors.
        stateful: What belongs into checkpoints beside model, companions and optimizer, by name.
    """

    before_step: Callable[[int, int], None] | None = None
    after_step: Callable[[], None] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    finish: Callable[[nn.Module], Any] | None = None
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None
    companions: tuple[nn.Module, ...] = ()
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
