"""Where the model will run."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, field_validator

from tersor.core.config import Config


class Target(Config):
    """A runtime on a device: ``Target("onnxruntime", threads=2, batch=1)``.

    `runtime` is a name from `tersor.runtimes.RUNTIMES`: ``eager``, ``inductor``, ``onnxruntime`` or
    ``openvino``. `dynamic` declares further dimensions that vary, beside the batch: for each input's name the
    dimension and its label, as in ``{"input_ids": {1: "tokens"}}``.

    `reduce_range` keeps int8 weights to 7 bits. x86 processors without VNNI need that: their int8 kernels
    overflow otherwise and answer differently. None decides by this machine; set it to True for an artifact
    that must run anywhere.
    """

    runtime: str = "onnxruntime"
    device: Literal["cpu"] = "cpu"
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, le=1024)
    batch: int = Field(default=1, ge=1)
    dynamic: dict[str, dict[int, str]] = Field(default_factory=dict)
    reduce_range: bool | None = None

    @field_validator("dynamic", mode="before")
    @classmethod
    def _dimensions_from_json(cls, value: Any) -> Any:
        """JSON has no integer keys."""
        if not isinstance(value, dict):
            return value
        return {
            name: {int(axis) if str(axis).isdecimal() else axis: label for axis, label in dims.items()}
            if isinstance(dims, dict)
            else dims
            for name, dims in value.items()
        }

    def __init__(self, runtime: str = "onnxruntime", **fields: Any) -> None:
        super().__init__(runtime=runtime, **fields)
