"""tersor makes trained PyTorch models small and fast, and proves what it cost."""

from tersor import distill, graph, measure, prune, quantize, train
from tersor.core.budget import Budget
from tersor.core.candidate import Candidate
from tersor.core.certificate import Certificate
from tersor.core.metrics import Metric
from tersor.core.recipe import Recipe
from tersor.core.report import Report
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import TersorError
from tersor.pipeline import Result, compress, load

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Candidate",
    "Certificate",
    "Metric",
    "Recipe",
    "Report",
    "Result",
    "Step",
    "Target",
    "Task",
    "TersorError",
    "__version__",
    "compress",
    "distill",
    "graph",
    "load",
    "measure",
    "prune",
    "quantize",
    "train",
]
