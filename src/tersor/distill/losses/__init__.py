"""Distillation losses: `(student_outputs, teacher_outputs, temperature) -> scalar`, one file each.

A recipe's `loss: kd` names one of `__all__`.
"""

from tersor.distill.losses.kd import kd
from tersor.distill.losses.mse import mse

__all__ = ["kd", "mse"]
