"""Distillation: losses and the recovery step that trains with them."""

from tersor.distill.recover import Recover

__all__ = ["Recover"]
