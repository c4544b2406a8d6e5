"""Pruning: criteria, masks, and the steps that use them."""

from tersor.prune.depth import DepthReport, depth
from tersor.prune.gradual import Gradual, Training, gradual
from tersor.prune.lottery import LotteryTicket, Rounds, lottery_ticket
from tersor.prune.regularise import Learned, Penalty, sparse_learning
from tersor.prune.schedule import SparsitySchedule
from tersor.prune.sparsity import Sparsity
from tersor.prune.steps import Structured
from tersor.prune.structure import Structure
from tersor.prune.structured import PruneReport, structured
from tersor.prune.unstructured import SparsityReport, Unstructured, unstructured

__all__ = [
    "DepthReport",
    "Gradual",
    "Learned",
    "LotteryTicket",
    "Penalty",
    "PruneReport",
    "Rounds",
    "Sparsity",
    "SparsityReport",
    "SparsitySchedule",
    "Structure",
    "Structured",
    "Training",
    "Unstructured",
    "depth",
    "gradual",
    "lottery_ticket",
    "sparse_learning",
    "structured",
    "unstructured",
]
