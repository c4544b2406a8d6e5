"""How many activations are zero or nearly so, and thresholds that make more of them zero.

Zeroing ``|x| < t`` of what flows into weight layers: Liu et al. 2024 (TEAL), https://arxiv.org/abs/2408.14690. It
changes answers and counts; **no speed-up is to be expected on the runtimes here**: their kernels multiply zeros as
well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, as_batch
from tersor.errors import ConfigError, DataError, NonFiniteError

Side = Literal["input", "output"]
SAMPLE = 1 << 16  # values kept per call for a threshold


@dataclass(frozen=True)
class ActivationShare:
    """Of one module: how many of `values` activations were exactly `zeros`, and how many at most `near_zeros`."""

    values: int
    zeros: int
    near_zeros: int

    @property
    def sparsity(self) -> float:
        """Share of activations that are exactly zero."""
        return self.zeros / max(1, self.values)

    @property
    def near_sparsity(self) -> float:
        """Share of activations at or below the tolerance, zeros included."""
        return self.near_zeros / max(1, self.values)


def activation_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    side: Side = "output",
    tolerance: float = 0.0,
    modules: Collection[str] | None = None,
) -> dict[str, ActivationShare]:
    """Counts activations with ``|x| ≤ tolerance``, per module and over all calls.

    Args:
        model: Run in evaluation mode and left as it is.
        batches: Batches, or whatever `tersor.core.batch.as_batch` reads.
        side: What flows `input` to a module or `output` from it. A zero of a functional ReLU is seen at the input
            of what comes next.
        tolerance: What counts as nearly zero.
        modules: Paths; None: all without children.

    Returns:
        By module path, in the order of the model; modules that never ran are left out.
    """
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance must be finite and at least 0, got {tolerance}")
    counts: dict[str, list[int]] = {}

    def see(path: str, values: Tensor) -> None:
        sizes = values.abs()
        seen = [values.numel(), int((sizes == 0).sum()), int((sizes <= tolerance).sum())]
        counts[path] = [old + new for old, new in zip(counts.get(path, [0, 0, 0]), seen, strict=True)]

    chosen = _chosen(model, modules, weights_only=False)
    _run(model, batches, chosen, side, see)
    return {path: ActivationShare(*counts[path]) for path in chosen if path in counts}


def thresholds(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float,
    *,
    side: Side = "input",
    modules: Collection[str] | None = None,
) -> dict[str, float]:
    """Of each module the least `t` so that at least the share `sparsity` of its activations has ``|x| < t``.

    Of large tensors an evenly spaced sample of at most 65,536 values per call decides; the model runs without
    thresholds, so that the shares of deep layers shift a little once thresholds are in place.

    Args:
        model: Run in evaluation mode and left as it is.
        batches: As in `activation_sparsity`.
        sparsity: Share wanted, in [0, 1).
        side: As in `activation_sparsity`.
        modules: Paths; None: all layers with a weight of two or more dimensions that take floating-point inputs.

    Returns:
        Threshold by module path; 0 changes nothing.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be in [0, 1), got {sparsity}")
    sizes: dict[str, list[Tensor]] = {}

    def see(path: str, values: Tensor) -> None:
        step = max(1, values.numel() // SAMPLE) | 1  # odd, so that it does not fall in step with the layout
        sizes.setdefault(path, []).append(values.flatten()[::step].abs().float().cpu())

    chosen = _chosen(model, modules, weights_only=True)
    _run(model, batches, chosen, side, see)
    found = {}
    for path in chosen:
        if path in sizes:
            ordered = torch.cat(sizes[path]).sort().values
            gone = math.ceil(sparsity * len(ordered))
            above = torch.nextafter(ordered[gone - 1], torch.tensor(torch.inf)) if gone else torch.tensor(0.0)
            found[path] = float(above)
    return found


@dataclass
class Cut:
    """A hook that zeroes ``|x| < threshold`` of the floating-point tensors that pass; counts nothing."""

    threshold: float
    side: Side = field(default="input")

    def __call__(self, module: nn.Module, *passing: Any) -> Any:
        """Before the call: `(inputs)`; after it: `(inputs, output)`."""
        value = passing[-1]
        return tuple(self._cut(part) for part in value) if isinstance(value, tuple) else self._cut(value)

    def _cut(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.masked_fill(value.abs() < self.threshold, 0)


def with_thresholds(model: nn.Module, limits: Mapping[str, float], *, side: Side = "input") -> nn.Module:
    """A copy of `model` whose modules zero small activations; parameters and their names stay as they are.

    Tensors passed by position count; of a tuple each. No speed-up is to be expected on the runtimes here.

    Args:
        model: Stays as it is.
        limits: Threshold by module path, from `thresholds`.
        side: Whether inputs or outputs are cut; as it was measured.

    Raises:
        ConfigError: if a path names no module, or a threshold is negative or not finite.
    """
    _chosen(model, list(limits), weights_only=False)
    result = copy.deepcopy(model)
    for path, threshold in limits.items():
        if not 0 <= threshold < float("inf"):
            raise ConfigError(f"the threshold of {path!r} must be finite and at least 0, got {threshold}")
        if threshold > 0:
            module, cut = result.get_submodule(path), Cut(threshold, side)
            if side == "input":
                module.register_forward_pre_hook(cut)
            else:
                module.register_forward_hook(cut)
    return result


def _chosen(model: nn.Module, modules: Collection[str] | None, *, weights_only: bool) -> list[str]:
    known = dict(model.named_modules())
    if modules is not None:
        unknown = sorted(set(modules) - set(known))
        if unknown:
            raise ConfigError(f"{unknown} are no modules of {type(model).__name__}; it has {list(known)[1:9]} …")
        return list(modules)
    leaves = [path for path, module in known.items() if not any(module.children())]
    if not weights_only:
        return leaves
    return [path for path in leaves if any(weight.ndim >= 2 for weight in known[path].parameters())]


def _run(
    model: nn.Module, batches: Iterable[Any], paths: list[str], side: Side, see: Callable[[str, Tensor], None]
) -> None:
    """Runs every batch and shows each activation of the chosen modules."""
    where = {"batch": 0}

    def show(path: str, value: Any) -> None:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.numel():
                if not bool(torch.isfinite(part).all()):
                    raise NonFiniteError(
                        f"batch {where['batch']}: NaN or Inf at the {side} of module {path!r}; check the data and the "
                        "model's weights"
                    )
                see(path, part.detach())

    def before(path: str) -> Callable[..., None]:
        return lambda module, inputs: show(path, inputs)

    def after(path: str) -> Callable[..., None]:
        return lambda module, inputs, output: show(path, output)

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        if side == "input":
            handles.append(module.register_forward_pre_hook(before(path)))
        else:
            handles.append(module.register_forward_hook(after(path)))
    count = 0
    try:
        with torch.no_grad(), _evaluating(model):
            for index, item in enumerate(batches):
                where["batch"] = index
                batch = item if isinstance(item, Batch) else as_batch(item, f"batch {index}")
                batch.check_finite(f"batch {index}")
                batch.call(model)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise DataError("activations are measured on data, but there is no batch; pass some")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no fused kernels that pass hooks by; undone afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
