"""A zoo of tiny models on which pruning is tested: real architectures, and one for every construct."""

from __future__ import annotations

from specimens.base import Specimen
from specimens.branching import BRANCHING
from specimens.constructs import CONSTRUCTS
from specimens.convolutional import CONVOLUTIONAL
from specimens.plain import PLAIN

__all__ = ["SPECIMENS", "Specimen", "transformers_specimens"]

SPECIMENS: dict[str, list[Specimen]] = {
    "convolutional": CONVOLUTIONAL,
    "branching": BRANCHING,
    "plain": PLAIN,
    "constructs": CONSTRUCTS,
}


def transformers_specimens() -> list[Specimen]:
    """Those of the library `transformers`; imports it, which takes seconds."""
    from specimens.transformers_models import TRANSFORMERS

    return TRANSFORMERS
