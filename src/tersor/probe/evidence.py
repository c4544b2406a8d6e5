"""What running a model on data tells about each of its parameters; pruning criteria decide by it.

Shapes: `O` outputs, `K` columns of a weight seen as a matrix `[O, K]` (a convolution's `I · h · w`), `G` groups of a
convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, as_batch
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.probe.taps import Role, Taps, layouts

Need = Literal["gradient", "squared_gradient", "movement", "gram", "zero_share"]
NEEDS: tuple[Need, ...] = get_args(Need)
FROM_LOSS: frozenset[Need] = frozenset({"gradient", "squared_gradient", "movement"})
FROM_LAYERS: frozenset[Need] = frozenset({"gram", "zero_share"})


@dataclass(frozen=True)
class Evidence:
    """What is known about one parameter; None where nobody asked, or where the model does not tell.

    Attributes:
        gradient: Mean gradient of the loss, of the parameter's shape.
        squared_gradient: Mean of the squared gradients of single batches, of the parameter's shape.
        movement: Sum over training steps of `-lr · weight · gradient`, of the parameter's shape.
        gram: `X Xᵀ / n` of the layer's inputs `X`, `[K, K]`; of a convolution with `G > 1` groups `[G, K, K]`.
        zero_share: Share of activations that were zero or less, per output, `[O]`.
        role: What the parameter does: a weight matrix or kernel, a bias, the scale of a normalisation.
        output_dim: The dimension of the weight that counts its outputs: 0, or 1 where it is stored transposed.
    """

    gradient: Tensor | None = None
    squared_gradient: Tensor | None = None
    movement: Tensor | None = None
    gram: Tensor | None = None
    zero_share: Tensor | None = None
    role: Role = "other"
    output_dim: int = 0


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    needs: Collection[Need],
    loss: Callable[[Any, Any], Tensor] | None = None,
    parameters: Collection[str] | None = None,
    learning_rate: float = 1e-3,
) -> dict[str, Evidence]:
    """Runs `model` in evaluation mode over `batches` once and notes what `needs` asks for.

    Gradients are means over examples, squared gradients means over batches (weighted by their sizes): batches of one
    example give the empirical Fisher information. Activations are seen by `tersor.probe.taps`; a parameter whose
    layer never ran, or is of a kind that no tap knows, has None. With empty `needs` no data is read, and only `role`
    and `output_dim` are told.

    Args:
        model: Left bit-identical: weights, buffers, `.grad`, `requires_grad`, hooks and training mode.
        batches: Whatever `tersor.core.batch.as_batch` reads.
        needs: Fields of `Evidence`.
        loss: `(outputs, labels) -> scalar`, a mean over the batch; labels are None where a batch has none.
        parameters: Paths; None: every floating-point parameter.
        learning_rate: Of the plain gradient steps, taken on a copy, that `movement` adds up.

    Raises:
        ConfigError: if a need or a parameter is unknown, or a loss is missing.
        DataError: if there is no batch.
        NonFiniteError: naming the batch that gave NaN or Inf.
    """
    chosen = _chosen(model, parameters)
    _check(needs, loss)
    told = layouts(model)
    found: dict[str, dict[str, Any]] = {path: told[parameter]._asdict() for path, parameter in chosen}
    if needs:
        results = _Run(model, chosen, frozenset(needs), loss, learning_rate).over(batches)
        for path, fields in results.items():
            found[path] |= fields
    return {path: Evidence(**fields) for path, fields in found.items()}


def _chosen(model: nn.Module, parameters: Collection[str] | None) -> list[tuple[str, nn.Parameter]]:
    known = {path: parameter for path, parameter in model.named_parameters() if parameter.is_floating_point()}
    if parameters is None:
        return list(known.items())
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ConfigError(
            f"{unknown} are not floating-point parameters of {type(model).__name__}; it has {list(known)[:8]} …"
        )
    return [(path, known[path]) for path in parameters]


def _check(needs: Collection[Need], loss: Callable[[Any, Any], Tensor] | None) -> None:
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ConfigError(f"needs: expected names of {list(NEEDS)}, got {unknown}")
    asked = sorted(FROM_LOSS & set(needs))
    if asked and loss is None:
        raise ConfigError(f"{asked} are taken from a loss; pass loss=..., a function (outputs, labels) -> scalar")


class _Run:
    """One pass over the batches and the sums it adds up."""

    def __init__(
        self,
        model: nn.Module,
        chosen: list[tuple[str, nn.Parameter]],
        needs: frozenset[Need],
        loss: Callable[[Any, Any], Tensor] | None,
        learning_rate: float,
    ) -> None:
        self.model, self.chosen, self.needs, self.loss = model, chosen, needs, loss
        self.learning_rate = learning_rate
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.examples = 0

    def over(self, batches: Iterable[Any]) -> dict[str, dict[str, Tensor]]:
        taps = Taps(self.model, self.chosen, gram="gram" in self.needs, zeros="zero_share" in self.needs)
        mover = copy.deepcopy(self.model).eval() if "movement" in self.needs else None
        weights = {"gradient", "squared_gradient"} & self.needs
        with _undisturbed(self.model, [parameter for _, parameter in self.chosen]):
            for index, item in enumerate(batches):
                where = f"batch {index}"
                batch = as_batch(item, where)
                batch.check_finite(where)
                self.examples += len(batch)
                if weights or FROM_LAYERS & self.needs:
                    with taps.attached(where), torch.set_grad_enabled(bool(weights)):
                        outputs = batch.call(self.model)
                    if isinstance(outputs, Tensor) and not bool(torch.isfinite(outputs).all()):
                        raise NonFiniteError(f"{where}: the model's output holds NaN or Inf; check data and weights")
                    if weights:
                        self._gradients(outputs, batch, where)
                if mover is not None:
                    self._move(mover, batch, where)
        if not self.examples:
            raise DataError(f"{sorted(self.needs)} are measured on data, but there is no batch; pass some")
        results: dict[str, dict[str, Tensor]] = taps.results()
        for (path, name), total in self.sums.items():
            results.setdefault(path, {})[name] = total if name == "movement" else total / self.examples
        return results

    def _differentiate(
        self, outputs: Any, batch: Batch, parameters: Sequence[Tensor], where: str
    ) -> Iterator[tuple[str, Tensor]]:
        """Path and gradient of what the loss depends on; `.grad` is not touched."""
        assert self.loss is not None  # noqa: S101 - `_check` has seen to it
        value = self.loss(outputs, batch.labels)
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{where}: the loss is {value.tolist()}; check the data and the model's weights")
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for (path, _), gradient in zip(self.chosen, gradients, strict=True):
            if gradient is None:
                continue
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(f"{where}: the gradient of {path!r} holds NaN or Inf; check data and weights")
            yield path, gradient

    def _gradients(self, outputs: Any, batch: Batch, where: str) -> None:
        parameters = [parameter for _, parameter in self.chosen]
        for path, gradient in self._differentiate(outputs, batch, parameters, where):
            if "gradient" in self.needs:
                self._add(path, "gradient", gradient * len(batch))
            if "squared_gradient" in self.needs:
                self._add(path, "squared_gradient", gradient.square() * len(batch))

    def _move(self, mover: nn.Module, batch: Batch, where: str) -> None:
        copies = [mover.get_parameter(path).requires_grad_() for path, _ in self.chosen]
        with torch.enable_grad():
            outputs = batch.call(mover)
        steps = dict(self._differentiate(outputs, batch, copies, where))
        with torch.no_grad():
            for path, gradient in steps.items():
                weight = mover.get_parameter(path)
                self._add(path, "movement", -self.learning_rate * weight * gradient)
                weight.sub_(gradient, alpha=self.learning_rate)

    def _add(self, path: str, name: str, value: Tensor) -> None:
        value = value.detach()
        before = self.sums.get((path, name))
        self.sums[path, name] = value if before is None else before + value


@contextmanager
def _undisturbed(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for `parameters`, no fused kernels that pass the hooks by; all undone afterwards."""
    training = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in parameters]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
