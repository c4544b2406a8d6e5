"""Every error that tersor raises on purpose.

Each message says what was expected, what arrived, where, and what to do next::

    TersorError
    ├── ConfigError(ValueError)            a field of Task, Recipe, Target, Budget or a step is wrong
    │   └── OrderError                     steps stand in an order that cannot work
    ├── DataError(ValueError)              a split, a batch or a label is wrong
    │   ├── OverlapError                   two splits share examples
    │   └── SplitTooSmallError             no result on this split could ever certify the budget
    ├── ModelError                         the model cannot be used as it is
    │   ├── NonFiniteError(ValueError)     NaN or Inf in weights, activations, outputs or a metric
    │   ├── OutputError(TypeError)         the model returns a dict or tuple and no output was declared
    │   ├── CaptureError                   `torch.export` cannot trace the model
    │   ├── SurgeryError                   a surgery does not fit the model
    │   ├── CoverageError                  nothing can be pruned
    │   └── AccuracyError                  compression has destroyed what the model knew
    ├── RuntimeUnavailableError(ImportError)  the target runtime is not installed
    ├── UnsupportedError                   the target has no kernel or form for what was asked
    ├── ExportError                        a runtime could not take the model
    │   └── ParityError                    the exported model answers differently
    ├── MeasurementError                   a measuring process failed
    ├── DistributedError                   processes that train together lost each other
    └── ArtifactError                      an artifact or output directory cannot be read or written
        ├── IntegrityError                 a file is missing, truncated or was changed
        └── OutputDirectoryError(OSError)  the output directory is taken, read-only or full
"""

from __future__ import annotations


class TersorError(Exception):
    """Base of all errors raised by tersor."""


class ConfigError(TersorError, ValueError):
    """A configuration value is wrong."""


class OrderError(ConfigError):
    """The steps of a recipe stand in an order that cannot work."""


class DataError(TersorError, ValueError):
    """A split, a batch or a label is wrong."""


class OverlapError(DataError):
    """Two splits that must be disjoint share examples."""


class SplitTooSmallError(DataError):
    """Not even a flawless candidate could be certified on this split."""


class ModelError(TersorError):
    """The model cannot be used as it is."""


class NonFiniteError(ModelError, ValueError):
    """NaN or Inf appeared in weights, activations, outputs or a metric."""


class OutputError(ModelError, TypeError):
    """The model returns several outputs and none was declared."""


class CaptureError(ModelError):
    """`torch.export` cannot trace the model."""


class SurgeryError(ModelError):
    """A surgery does not fit the model that it is applied to, or its result is wrong."""


class CoverageError(ModelError):
    """Nothing in the model can be pruned."""


class AccuracyError(ModelError):
    """The compressed model answers no better than chance."""


class RuntimeUnavailableError(TersorError, ImportError):
    """The target runtime is not installed on this machine."""


class UnsupportedError(TersorError):
    """The target has no kernel or form for what was asked."""


class ExportError(TersorError):
    """A runtime could not take the model."""


class ParityError(ExportError):
    """The exported model does not answer like the PyTorch model."""


class MeasurementError(TersorError):
    """A measuring process failed or was killed."""


class DistributedError(TersorError):
    """Processes that train together cannot reach each other, or one of them is gone."""


class ArtifactError(TersorError):
    """An artifact or output directory cannot be read or written."""


class IntegrityError(ArtifactError):
    """A file of an artifact is missing, truncated or was changed."""


class OutputDirectoryError(ArtifactError, OSError):
    """The output directory is taken by another run, read-only or full."""
