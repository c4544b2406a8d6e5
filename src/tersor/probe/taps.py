"""Taps on the layers of a running model: what flows into them, and how often their outputs are silent.

Taps know linear layers (PyTorch's and transformers' `Conv1D`) and convolutions in one to three dimensions. Layers
that are computed without calling their module (the projections inside `nn.MultiheadAttention`), transposed
convolutions and recurrent layers are passed by.

Shapes: `O` outputs, `K` columns of a weight seen as a matrix `[O, K]`, `G` groups, `N` rows: examples times positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tersor.errors import NonFiniteError
from tersor.probe.columns import Window, columns

Role = Literal["weight", "bias", "scale", "other"]

SEED = 0
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Layout(NamedTuple):
    """What a parameter does, and which of its dimensions counts the outputs."""

    role: Role
    output_dim: int


def layouts(model: nn.Module) -> dict[nn.Parameter, Layout]:
    """Told from the modules that own each parameter; of several owners a layer that taps know has the last word."""
    found: dict[nn.Parameter, Layout] = {}
    for module in model.modules():
        known = _is_linear(module) or isinstance(module, _Conv)
        for name, parameter in module.named_parameters(recurse=False):
            if known or parameter not in found:
                found[parameter] = _layout(module, name, parameter)
    return found


def _layout(module: nn.Module, name: str, parameter: nn.Parameter) -> Layout:
    if "bias" in name:
        return Layout("bias", 0)
    if parameter.ndim < 2:
        return Layout("scale" if _is_norm(module) and parameter.ndim == 1 else "other", 0)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Embedding | nn.EmbeddingBag)
    return Layout("weight", int(transposed or _is_conv1d_of_transformers(module)))


class _Seen(NamedTuple):
    """Silent outputs of the layer that ran last; `output` is kept to recognise a norm that takes it."""

    path: str
    output: Tensor
    channel: int
    silent: Tensor
    values: int


class Taps:
    """Sums over the calls of the layers that own the chosen weights."""

    def __init__(
        self, model: nn.Module, chosen: Sequence[tuple[str, nn.Parameter]], *, gram: bool, zeros: bool
    ) -> None:
        paths = {id(parameter): path for path, parameter in chosen}
        self._layers: dict[str, tuple[nn.Module, str]] = {}  # a tied weight has several layers
        self._norms: list[nn.Module] = []
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if (_is_linear(module) or isinstance(module, _Conv)) and id(weight) in paths:
                self._layers[name] = module, paths[id(weight)]
            elif _is_norm(module):
                self._norms.append(module)
        self._gram, self._zeros = gram, zeros
        self._generator = torch.Generator().manual_seed(SEED)
        self._grams: dict[str, tuple[Tensor, int]] = {}
        self._silent: dict[str, tuple[Tensor, int]] = {}
        self._last: _Seen | None = None

    @contextmanager
    def attached(self, where: str) -> Iterator[None]:
        """Hooks for one forward pass; `where` names the batch in errors."""
        handles = []
        for name, (module, path) in self._layers.items():
            if self._gram:
                handles.append(module.register_forward_pre_hook(self._see_inputs(path, name, where), with_kwargs=True))
            if self._zeros:
                handles.append(module.register_forward_hook(self._see_outputs(path)))
        if self._zeros:
            handles += [module.register_forward_hook(self._see_norm) for module in self._norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._settle()

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Parameter path -> `gram` and `zero_share`, where a layer ran."""
        found: dict[str, dict[str, Tensor]] = {}
        for path, (total, count) in self._grams.items():
            found.setdefault(path, {})["gram"] = total / count
        for path, (total, count) in self._silent.items():
            found.setdefault(path, {})["zero_share"] = total / count
        return found

    def _see_inputs(self, path: str, name: str, where: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                values = (args or tuple(kwargs.values()))[0].detach()
                rows = columns(values, _window(module), self._generator)  # [N, G, K]
                count, grouped = rows.shape[0], rows.shape[1] > 1
                gram = torch.einsum("ngk,ngl->gkl", rows, rows) if grouped else rows[:, 0].T @ rows[:, 0]
                if not bool(torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all()):
                    raise NonFiniteError(
                        f"{where}: NaN or Inf flows into layer {name!r}; check the data and the model's weights"
                    )
                total, seen = self._grams.get(path, (torch.zeros_like(gram), 0))
                self._grams[path] = total + gram, seen + count

        return hook

    def _see_outputs(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            self._settle()
            channel = output.ndim - 1 - len(module.kernel_size) if isinstance(module, _Conv) else -1
            self._last = _Seen(path, output, channel, *_count_silent(output, channel))

        return hook

    def _see_norm(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A norm right behind the layer: what it lets through counts instead."""
        last = self._last
        if last is not None and args and args[0] is last.output:
            self._last = _Seen(last.path, output, last.channel, *_count_silent(output, last.channel))

    def _settle(self) -> None:
        if self._last is not None:
            total, seen = self._silent.get(self._last.path, (torch.zeros_like(self._last.silent), 0))
            self._silent[self._last.path] = total + self._last.silent, seen + self._last.values
        self._last = None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d_of_transformers(module)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and not isinstance(module, _Conv)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)


def _count_silent(output: Tensor, channel: int) -> tuple[Tensor, int]:
    """Per channel how many values are zero or less, `[O]`; and out of how many."""
    rows = (output.detach() <= 0).movedim(channel, -1).flatten(0, -2)
    return rows.sum(0, dtype=torch.float32), len(rows)


def _window(module: nn.Module) -> Window | None:
    if not isinstance(module, _Conv):
        return None
    return Window(
        module.kernel_size,
        module.stride,
        module.dilation,
        module._reversed_padding_repeated_twice,
        "constant" if module.padding_mode == "zeros" else module.padding_mode,
        module.groups,
    )
