"""The base of everything that is configuration: frozen, strict, serialisable, with readable errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tersor.errors import ConfigError


def explain(error: ValidationError, name: str) -> str:
    """Turns pydantic's error into one line per field: where, what was expected, what arrived."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "value"
        arrived = "" if item["type"] == "missing" else f", got {item['input']!r}"
        lines.append(f"{name}.{where}: {item['msg'].removeprefix('Value error, ')}{arrived}")
    return "; ".join(lines)


class Config(BaseModel):
    """A frozen, strict record; a wrong or unknown field raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self).__name__)) from None
