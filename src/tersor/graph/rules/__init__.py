"""What tersor knows about operators, one file per family.

`COMPUTE` says which operands of an operator can be computed in low precision; `TRANSPARENT` operators hand
values on unchanged, so input and output share one scale; `SHARED` ones do the same for several inputs;
`ACTIVATIONS` are fused into the operator before them, so nothing is quantized in between. `PRODUCTS` multiply two
activations, `LOOKUPS` take rows out of a table, `TRANSPOSED` are transposed convolutions, `SOFTMAX` gives shares of 1.
"""

from typing import Any

from tersor.graph.rules.base import ComputeRule
from tersor.graph.rules.elementwise import ACTIVATIONS, SOFTMAX
from tersor.graph.rules.elementwise import COMPUTE as _ELEMENTWISE
from tersor.graph.rules.linear import COMPUTE as _LINEAR
from tersor.graph.rules.linear import LOOKUPS, PRODUCTS, TRANSPOSED
from tersor.graph.rules.pooling import COMPUTE as _POOLING
from tersor.graph.rules.pooling import TRANSPARENT as _POOLING_TRANSPARENT
from tersor.graph.rules.shape import SHARED
from tersor.graph.rules.shape import TRANSPARENT as _SHAPE_TRANSPARENT

COMPUTE: dict[Any, ComputeRule] = {**_LINEAR, **_ELEMENTWISE, **_POOLING}
TRANSPARENT = _POOLING_TRANSPARENT | _SHAPE_TRANSPARENT

__all__ = [
    "ACTIVATIONS",
    "COMPUTE",
    "LOOKUPS",
    "PRODUCTS",
    "SHARED",
    "SOFTMAX",
    "TRANSPARENT",
    "TRANSPOSED",
    "ComputeRule",
]
