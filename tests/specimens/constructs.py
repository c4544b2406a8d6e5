"""One small model for every construct that a pruning engine must survive."""

from __future__ import annotations

from specimens.constructs_joins import JOINS
from specimens.constructs_modules import MODULES
from specimens.constructs_operators import OPERATORS
from specimens.constructs_shapes import SHAPES
from specimens.constructs_sizes import SIZES

CONSTRUCTS = [*JOINS, *SHAPES, *MODULES, *OPERATORS, *SIZES]
