"""Pruning: criteria, masks, and the steps that use them."""

from tersor.prune.unstructured import Unstructured, unstructured_masks

__all__ = ["Unstructured", "unstructured_masks"]
