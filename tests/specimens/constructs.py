"""One small model for every construct that a pruning engine must survive."""

from __future__ import annotations

from specimens.constructs_joins import JOINS
from specimens.constructs_modules import MODULES
from specimens.constructs_shapes import SHAPES

CONSTRUCTS = [*JOINS, *SHAPES, *MODULES]
