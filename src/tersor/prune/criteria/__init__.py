"""Importance criteria: each a function from a weight to scores of its shape; the lowest are pruned first.

A recipe's `criterion: magnitude` names one of `__all__`.
"""

from tersor.prune.criteria.magnitude import magnitude

__all__ = ["magnitude"]
