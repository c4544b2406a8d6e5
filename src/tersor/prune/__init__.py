"""Pruning: criteria, masks, and the steps that use them."""

from tersor.prune.choosing import ChosenUnits, choose_units
from tersor.prune.depth import DepthReport, depth
from tersor.prune.depth_step import DepthStep
from tersor.prune.experts import ExpertReport, experts
from tersor.prune.experts_step import ExpertsStep
from tersor.prune.gradual import Gradual, Training, gradual
from tersor.prune.lottery import LotteryTicket, Rounds, lottery_ticket
from tersor.prune.regularise import Learned, Penalty, sparse_learning
from tersor.prune.regularise_step import SparseLearning
from tersor.prune.saved import read_pruned, write_pruned
from tersor.prune.schedule import SparsitySchedule
from tersor.prune.sparsity import Sparsity
from tersor.prune.steps import Structured
from tersor.prune.structure import Structure
from tersor.prune.structured import PruneReport, structured
from tersor.prune.unstructured import SparsityReport, Unstructured, unstructured

__all__ = [
    "ChosenUnits",
    "DepthReport",
    "DepthStep",
    "ExpertReport",
    "ExpertsStep",
    "Gradual",
    "Learned",
    "LotteryTicket",
    "Penalty",
    "PruneReport",
    "Rounds",
    "SparseLearning",
    "Sparsity",
    "SparsityReport",
    "SparsitySchedule",
    "Structure",
    "Structured",
    "Training",
    "Unstructured",
    "choose_units",
    "depth",
    "experts",
    "gradual",
    "lottery_ticket",
    "read_pruned",
    "sparse_learning",
    "structured",
    "unstructured",
    "write_pruned",
]
