"""The one training loop, from one core to several machines."""

from tersor.train.checkpoint import Checkpoints, weights_of
from tersor.train.hooks import BatchLoss, Hooks, Stateful
from tersor.train.loop import Trained, fit
from tersor.train.metric import answers_of, evaluation
from tersor.train.schedule import Schedule
from tersor.train.supervised import Blend, blended, hard_loss, supervised

__all__ = [
    "BatchLoss",
    "Blend",
    "Checkpoints",
    "Hooks",
    "Schedule",
    "Stateful",
    "Trained",
    "answers_of",
    "blended",
    "evaluation",
    "fit",
    "hard_loss",
    "supervised",
    "weights_of",
]
