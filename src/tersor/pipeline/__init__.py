"""The one-call face: `compress` and `load`."""

from tersor.pipeline.compress import Result, compress
from tersor.pipeline.load import load
from tersor.pipeline.plan import Plan, make_plan

__all__ = ["Plan", "Result", "compress", "load", "make_plan"]
