"""The one training loop."""

from tersor.train.loop import Schedule, fit

__all__ = ["Schedule", "fit"]
