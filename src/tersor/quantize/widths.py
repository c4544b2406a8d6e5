"""How many bits each tensor gets."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from pydantic import Field, field_validator

from tersor.core.config import Config
from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError

FLOAT = 32


class Widths(Config):
    """Bits of weights and activations.

    The first and the last layer keep `edge_bits`: they are small, and rounding them coarsely costs most (Esser et al.
    2020, https://arxiv.org/abs/1902.08153). `overrides` gives single layers other widths for their weights, by glob
    pattern over module paths; the first pattern that fits counts, 32 keeps a layer in float.
    """

    weight_bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    edge_bits: int = Field(default=8, ge=2, le=8)
    overrides: dict[str, int] = Field(default_factory=dict)

    @field_validator("overrides")
    @classmethod
    def _known(cls, overrides: dict[str, int]) -> dict[str, int]:
        wrong = {pattern: bits for pattern, bits in overrides.items() if bits != FLOAT and not 2 <= bits <= 8}
        if wrong:
            raise ValueError(f"expected 2 to 8 bits, or {FLOAT} for float, got {wrong}")
        return overrides

    def weight(self, module: str, *, edge: bool) -> int:
        """Bits of the weight of the layer at `module`."""
        for pattern, bits in self.overrides.items():
            if fnmatchcase(module, pattern):
                return bits
        return max(self.weight_bits, self.edge_bits) if edge else self.weight_bits

    def activation(self, module: str, *, edge: bool) -> int:
        """Bits that the input of the layer at `module` needs at least."""
        return max(self.activation_bits, self.edge_bits) if edge else self.activation_bits

    def check_used(self, modules: Iterable[str]) -> None:
        """Raises `ConfigError` if a pattern fits no layer."""
        names = sorted(set(modules))
        unused = [pattern for pattern in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]
        if unused:
            raise ConfigError(f"overrides: {unused} fit no layer; the layers that could be quantized are {names}")


def weight_scheme(bits: int, axis: int | None, *, reduced: bool) -> QuantScheme:
    """Signed and symmetric, one scale per channel; `reduced` spares the bit with which int8 kernels overflow."""
    return QuantScheme(bits=min(bits, 7) if reduced else bits, signed=True, symmetric=True, axis=axis)
