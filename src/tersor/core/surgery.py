"""Surgery as data: what was cut from a model, so that it can be replayed on a freshly built one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from tersor.core.config import Config, explain
from tersor.errors import ConfigError

SCHEMA = 1
LISTED = Field(strict=False)  # JSON has lists only


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
    kept: Annotated[tuple[int, ...], LISTED]


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


class SkippedBlock(Config):
    """A block that is replaced by the identity, and the form in which it answers.

    Attributes:
        path: Of the block.
        form: What it answers: one tensor, or a tuple or list of which the first element is the tensor.
        sources: For every element of the answer the argument that it is: a position, a keyword, or None for None.
    """

    path: str = Field(min_length=1)
    form: Literal["tensor", "tuple", "list"] = "tensor"
    sources: Annotated[tuple[int | str | None, ...], LISTED] = (0,)


class Shrink(Config):
    """Keeps some modules of an `nn.ModuleList`; they are numbered anew.

    An `nn.ModuleDict` whose keys are numbers, with or without a common start (`expert_0`), is such a list too.

    Attributes:
        path: Of the list.
        size: Its length before.
        kept: Positions that stay, ascending.
    """

    path: str
    size: int = Field(ge=1)
    kept: Annotated[tuple[int, ...], LISTED]


class Surgery(Config):
    """All changes of one surgery, in the order in which they are applied.

    Attributes:
        freed: `nn.MultiheadAttention` modules that take a class whose heads can go.
        skipped: Blocks that are replaced by the identity.
        shrunk: Lists of modules that lose some. No cut is in them: cuts go by the names before.
        cuts: Dimensions that shrink.
        changes: Attributes that follow.
        version: Of this form.
    """

    freed: Annotated[tuple[str, ...], LISTED] = ()
    skipped: Annotated[tuple[SkippedBlock, ...], LISTED] = ()
    shrunk: Annotated[tuple[Shrink, ...], LISTED] = ()
    cuts: Annotated[tuple[Cut, ...], LISTED] = ()
    changes: Annotated[tuple[Change, ...], LISTED] = ()
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

    def then(self, later: Surgery) -> Surgery:
        """One surgery that does both; for surgeries of cuts, without blocks or lists of modules."""
        if self.skipped or self.shrunk or later.skipped or later.shrunk:
            raise ConfigError("only surgeries that cut dimensions become one; apply the others one after another")
        cuts = {(cut.parameter, cut.dim): cut for cut in self.cuts}
        for cut in later.cuts:
            first = cuts.get((cut.parameter, cut.dim))
            if first is not None:
                kept = tuple(first.kept[index] for index in cut.kept)
                cut = first.model_copy(update={"kept": kept})
            cuts[cut.parameter, cut.dim] = cut
        changes = {(change.owner, change.name, change.position): change for change in self.changes}
        for change in later.changes:
            before = changes.get((change.owner, change.name, change.position), change).before
            changes[change.owner, change.name, change.position] = change.model_copy(update={"before": before})
        freed = (*self.freed, *(path for path in later.freed if path not in self.freed))
        return Surgery(freed=freed, cuts=tuple(cuts.values()), changes=tuple(changes.values()))
