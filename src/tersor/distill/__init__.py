"""Distillation: losses, students, and training with a teacher."""

from tersor.distill.distances import distances
from tersor.distill.ensemble import Ensemble
from tersor.distill.mutual import mutual
from tersor.distill.once_for_all_step import OnceForAll
from tersor.distill.recover import Recover
from tersor.distill.sequences import generate
from tersor.distill.shallow_step import EveryKth
from tersor.distill.students import Student, every_kth, family, scaled
from tersor.distill.terms import Term
from tersor.distill.train import Distilled, train

__all__ = [
    "Distilled",
    "Ensemble",
    "EveryKth",
    "OnceForAll",
    "Recover",
    "Student",
    "Term",
    "distances",
    "every_kth",
    "family",
    "generate",
    "mutual",
    "scaled",
    "train",
]
