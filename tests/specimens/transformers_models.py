"""All models of `transformers` in the zoo; imports `transformers`, which takes seconds."""

from __future__ import annotations

from specimens.transformers_other import OTHER
from specimens.transformers_text import TEXT
from specimens.transformers_vision import VISION

TRANSFORMERS = [*VISION, *TEXT, *OTHER]
