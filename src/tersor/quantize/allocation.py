"""One width per layer, chosen by an integer program.

The losses of single layers are taken to add up. Yao et al. 2021 (HAWQ-V3), https://arxiv.org/abs/2011.10680.

Shapes: `V` variables: one per layer and width, 1 where the layer gets this width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tersor.errors import ConfigError
from tersor.quantize.sensitivity import LayerSensitivity, Sensitivity
from tersor.quantize.widths import FLOAT

Costs = Mapping[str, Mapping[int, float]]
Choices = Sequence[int] | Mapping[str, Sequence[int]]
SCALE = 1e4  # HiGHS tolerates absolute errors of 1e-6: limits and objectives are brought to this size
ROUNDING = 1e-9


@dataclass(frozen=True)
class _Limit:
    """At most `largest` of what `amount` counts."""

    name: str
    largest: float
    amounts: list[float]


def allocate(
    sensitivity: Sensitivity,
    *,
    max_bytes: float | None = None,
    average_bits: float | None = None,
    max_loss: float | None = None,
    costs: Costs | None = None,
    max_cost: float | None = None,
    choices: Choices | None = None,
) -> dict[str, int]:
    """Chooses the width of every layer, ``min Σ loss`` under the limits on size and cost.

    With `max_loss` it is the other way round: the total loss is limited, and the bytes, or the `costs` if there are
    any, are made smallest. Layers with one width only, such as embeddings, keep it and count.

    Args:
        sensitivity: What each layer loses at each width.
        max_bytes: Of all quantized weights, packed, with their float32 scales; biases are not counted.
        average_bits: Of the parameters of these weights, scales left out.
        max_loss: Sum of the losses of all layers, in the unit of `sensitivity`.
        costs: Layer -> bits -> cost, e.g. milliseconds measured on the target.
        max_cost: Sum of the costs.
        choices: Widths that may be chosen, for all layers or per layer (others are free); 32 is float. By default
            those that were measured.

    Returns:
        Layer -> bits, in the order of the model.

    Raises:
        ConfigError: if a limit cannot be met, with the smallest that can; if there is no limit; for unknown layers.
    """
    given = {"max_bytes": max_bytes, "average_bits": average_bits, "max_loss": max_loss, "max_cost": max_cost}
    if all(value is None for value in given.values()):
        raise ConfigError(f"allocate: set at least one of {list(given)}")
    if (costs is None) != (max_cost is None) and not (costs is not None and max_loss is not None):
        raise ConfigError("allocate: costs go with max_cost or max_loss, and max_cost with costs")
    wrong = {
        name: value for name, value in given.items() if value is not None and not (math.isfinite(value) and value >= 0)
    }
    if wrong:
        raise ConfigError(f"allocate: expected finite numbers of at least 0, got {wrong}")
    rows = sensitivity.rows
    variables = [(row, bits) for row in rows for bits in _widths(row, choices, {row.layer for row in rows})]
    total = sum(row.parameters for row in rows)
    count: dict[str, Callable[[LayerSensitivity, int], float]] = {
        "max_bytes": lambda row, bits: row.size_bytes(bits),
        "average_bits": lambda row, bits: bits * row.parameters / total,
        "max_loss": lambda row, bits: row.loss_at(bits),
        "max_cost": lambda row, bits: _cost(costs or {}, row.layer, bits),
    }
    limits = [
        _Limit(name, value, [count[name](row, bits) for row, bits in variables])
        for name, value in given.items()
        if value is not None
    ]
    wanted = "max_loss" if max_loss is None else "max_bytes" if costs is None else "max_cost"
    objective = [count[wanted](row, bits) for row, bits in variables]
    owner = [row.layer for row, _ in variables]
    for limit in limits:
        smallest = _smallest(owner, limit.amounts)
        if smallest > limit.largest * (1 + ROUNDING):
            raise ConfigError(
                f"allocate: {limit.name}={limit.largest:g} cannot be met with these widths, the smallest that can is "
                f"{smallest:g}"
            )
    if not math.isfinite(_smallest(owner, objective)):
        raise ConfigError("allocate: a layer loses infinitely much at every width that it may have; allow more bits")
    chosen = _solve(owner, objective, limits)
    if chosen is None:
        raise ConfigError(_together(owner, limits))
    return {variables[place][0].layer: variables[place][1] for place in chosen}


def average_of(sensitivity: Sensitivity, widths: Mapping[str, int]) -> float:
    """Bits per parameter of an allocation."""
    total = sum(row.parameters for row in sensitivity.rows)
    return sum(widths[row.layer] * row.parameters for row in sensitivity.rows) / max(total, 1)


def _widths(row: LayerSensitivity, choices: Choices | None, known: set[str]) -> list[int]:
    """The widths that a layer can have."""
    measured = list(row.loss)
    if choices is None:
        return measured
    if isinstance(choices, Mapping):
        unknown = sorted(set(choices) - known)
        if unknown:
            raise ConfigError(f"allocate: choices for {unknown}, which are no layers; there are {sorted(known)}")
        if row.layer not in choices:
            return measured
    wanted = choices[row.layer] if isinstance(choices, Mapping) else choices
    able = sorted({bits for bits in wanted if bits == FLOAT or bits in row.loss})
    if able:
        return able
    if len(measured) == 1:
        return measured
    raise ConfigError(f"allocate: {row.layer!r} was measured at {measured} bits, choices allow only {list(wanted)}")


def _cost(costs: Costs, layer: str, bits: int) -> float:
    try:
        return float(costs[layer][bits])
    except KeyError:
        raise ConfigError(f"allocate: costs say nothing of {layer!r} at {bits} bits") from None


def _smallest(owner: Sequence[str], amounts: Sequence[float]) -> float:
    """The least that all layers together can have."""
    least: dict[str, float] = {}
    for layer, amount in zip(owner, amounts, strict=True):
        least[layer] = min(amount, least.get(layer, math.inf))
    return sum(least.values())


def _together(owner: Sequence[str], limits: Sequence[_Limit]) -> str:
    """Why limits that can be met one by one cannot be met at once."""
    last = limits[-1]
    chosen = _solve(owner, last.amounts, limits[:-1])
    least = sum(last.amounts[place] for place in chosen) if chosen is not None else math.inf
    others = " and ".join(f"{limit.name}={limit.largest:g}" for limit in limits[:-1])
    return (
        f"allocate: {last.name}={last.largest:g} cannot be met together with {others}; the smallest that can is "
        f"{least:g}"
    )


def _solve(owner: Sequence[str], objective: Sequence[float], limits: Sequence[_Limit]) -> list[int] | None:
    """Places of the variables that are chosen, one for each layer; None if nothing fits."""
    layers = list(dict.fromkeys(owner))
    rows = {layer: number for number, layer in enumerate(layers)}
    one_each = np.zeros((len(layers), len(owner)))
    one_each[[rows[layer] for layer in owner], np.arange(len(owner))] = 1
    # What alone breaks a limit, or loses infinitely much, is out; the rest is brought to one size.
    allowed = np.isfinite(objective)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        amounts = np.array(limit.amounts, dtype=float)
        allowed &= amounts <= limit.largest * (1 + ROUNDING)
        scale = SCALE / limit.largest if limit.largest > 0 else 1.0
        bounded = np.where(allowed, amounts, 0.0)
        constraints.append(LinearConstraint((bounded * scale)[None], -np.inf, limit.largest * scale * (1 + ROUNDING)))
    goal = np.where(allowed, objective, 0.0).astype(float)
    largest = float(np.abs(goal).max(initial=0.0))
    result = milp(
        goal * (SCALE / largest if largest > 0 else 1.0),
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    return [place for place, value in enumerate(result.x) if value > 0.5]
