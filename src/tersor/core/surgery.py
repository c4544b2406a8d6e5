"""Surgery as data: what was cut from a model, so that it can be replayed on a freshly built one."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from tersor.core.config import Config, explain
from tersor.errors import ConfigError

SCHEMA = 1


class Cut(Config):
    """Keeps some indices of one dimension of a parameter or buffer.

    Attributes:
        parameter: Its name in the model.
        dim: The dimension.
        size: The dimension's size before.
        kept: Indices that stay, ascending.
    """

    parameter: str
    dim: int = Field(ge=0)
    size: int = Field(ge=1)
    kept: tuple[int, ...]


class Change(Config):
    """Sets one integer attribute.

    Attributes:
        owner: A module's path (empty for the model itself), or `<path>.config` for a configuration object.
        name: The attribute.
        position: Where in a tuple or list; None for a plain integer.
        before: What it must be before.
        after: What it becomes.
    """

    owner: str
    name: str
    position: int | None = None
    before: int
    after: int


class Surgery(Config):
    """All changes of one surgery, in the order in which they are applied.

    Attributes:
        freed: `nn.MultiheadAttention` modules that take a class whose heads can go.
        skipped: Blocks that are replaced by the identity.
        cuts: Dimensions that shrink.
        changes: Attributes that follow.
        version: Of this form.
    """

    freed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    changes: tuple[Change, ...] = ()
    version: int = SCHEMA

    def to_json(self) -> str:
        """As JSON text that `from_json` reads back to an equal surgery."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Surgery:
        """Reads JSON text; raises `ConfigError` if it is no surgery."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(explain(error, "surgery")) from None

    def kept(self) -> Mapping[tuple[str, int], tuple[int, ...]]:
        """`(parameter, dim)` -> indices that stay."""
        return {(cut.parameter, cut.dim): cut.kept for cut in self.cuts}
