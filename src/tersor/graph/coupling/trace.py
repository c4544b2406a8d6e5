"""One eager run under observation: every operator's labels, in the order of execution.

No symbolic trace and no graph: two PyTorch modes watch a normal forward pass, so Python control flow is no obstacle.
The *function mode* sees calls as the model's author wrote them and so the origin of their integers; the *dispatch
mode* sees the few hundred ATen operators below, and asks one rule per operator what it does to labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.graph.coupling.integers import Attribute, Extent, Shape, Traced, traced_attributes
from tersor.graph.coupling.labels import Blocks, Ledger, Operand, along, forbid, restrict, support, tie

_MARK = "_tersor_labels"


@dataclass(frozen=True)
class Call:
    """An ATen operator at work.

    Attributes:
        name: As in `aten.view`, with its namespace, without the overload.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: What the operator returned.
        shape: Of the first argument, before the operator; some change it in place.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    shape: tuple[int, ...] = ()

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


Rule = Callable[["Trace", Call], None]


@dataclass(frozen=True)
class Demand:
    """An attribute must be `size / scale` for the size that `dim` of `block` has; fixed if there is no block."""

    attribute: Attribute
    scale: Fraction
    block: Tensor | None
    dim: int

    def varying(self, classes: Tensor) -> list[Tensor]:
        """The block, if the size can change: if the classes differ along the dimension."""
        if self.block is None:
            return []
        numbers = classes[self.block]
        return [] if bool((numbers == numbers.narrow(self.dim, 0, 1)).all()) else [self.block]


class Grouped(NamedTuple):
    """A grouped convolution: inputs `[G, C / G]`, outputs `[G, O / G]`, and the weight's own inputs `[C / G]`."""

    inputs: Tensor
    outputs: Tensor
    own: Tensor | None
    number: int | Traced


@dataclass
class Trace:
    """What has been found out so far; rules read and write it.

    Attributes:
        ledger: Labels, what is the same, what is frozen.
        learned: Labels below this one belong to parameters and buffers.
        rules: Operator name -> rule.
        demands: Attributes whose value follows a size.
        splits: Joint blocks: a dimension that code has split into several.
        grouped: Convolutions of which either whole groups go, or the same positions of all.
        seen: Parameters and buffers that some operator has read, by id.
    """

    ledger: Ledger
    rules: Mapping[str, Rule]
    fallback: Callable[[Any], Rule]
    learned: int = 0
    demands: list[Demand] = field(default_factory=list)
    splits: list[Tensor] = field(default_factory=list)
    grouped: list[Grouped] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    function: tuple[str, list[Any]] | None = None
    before: Callable[..., Any] | None = None  # may compute an operator in another way
    _stored: dict[int, Blocks] = field(default_factory=dict)

    def adopt(self, tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[int, int]]]:
        """Gives every dimension of parameters and buffers labels; returns name -> (dim, first label)."""
        starts: dict[str, list[tuple[int, int]]] = {}
        for name, tensor in tensors.items():
            blocks: list[Tensor] = []
            starts[name] = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    starts[name].append((dim, self.ledger.count))
                    blocks += along(self.ledger.fresh(size), dim, tensor.ndim)
            self._stored[id(tensor)] = tuple(blocks)
        self.learned = self.ledger.count
        return starts

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
        """While the body runs, other tensors of the same names have the labels, and count as seen for these."""
        twins = [(id(tensor), id(others[name])) for name, tensor in tensors.items() if name in others]
        self._stored.update({other: self._stored[own] for own, other in twins})
        try:
            yield
        finally:
            for own, other in twins:
                del self._stored[other]
                if other in self.seen:
                    self.seen.add(own)

    def blocks(self, tensor: Tensor) -> Blocks:
        """A tensor's blocks; none for a constant or a model input."""
        if id(tensor) in self._stored:
            self.seen.add(id(tensor))
            return self._stored[id(tensor)]
        owner, blocks = getattr(tensor, _MARK, (None, ()))
        return blocks if owner is self._stored else ()  # a tensor that the model keeps may bear an older mark

    def put(self, tensor: Tensor, blocks: Blocks) -> None:
        """Sets a tensor's blocks."""
        if id(tensor) not in self._stored:
            setattr(tensor, _MARK, (self._stored, blocks))

    def operand(self, tensor: Tensor) -> Operand:
        """Shape and blocks."""
        return Operand(tuple(tensor.shape), self.blocks(tensor))

    def written(self, values: Iterable[int]) -> list[int | Traced]:
        """The integers of an operator as the author's call gave them, if that call has exactly these, else derived.

        A plain integer in the result was written in the code: the size is fixed.
        """
        values = [int(value) for value in values]
        if self.function is not None:
            name, given = self.function
            if name == "unflatten" and given:  # names one dimension and its parts; the others stay
                dim, parts = int(given[0]), given[1:]
                first = dim if dim >= 0 else dim + len(values) - len(parts) + 1
                rest = [Traced(value) for value in values]
                given = [*rest[:first], *parts, *rest[first + len(parts) :]]
            for start in range(len(given) - len(values) + 1):
                part = given[start : start + len(values)]
                if all(have in (want, -1) for have, want in zip(part, values, strict=True)):
                    return [
                        Traced(want) if have == -1 and want != -1 else have
                        for have, want in zip(part, values, strict=True)
                    ]
        return [Traced(value) for value in values]

    def require(self, number: int | Traced, blocks: Blocks, dim: int) -> Blocks:
        """The size `number` was asked for along `dim`, on which `blocks` hold; returns what may still be cut."""
        block = next((block for block in blocks if dim in support(block)), None)
        if not isinstance(number, Traced):
            return forbid(self.ledger, blocks, dim, f"the size {number} is written in the code")
        if isinstance(number.origin, Attribute):
            self.demands.append(Demand(number.origin, number.scale, block, dim))
        elif number.constant:
            return forbid(self.ledger, blocks, dim, "its size is taken from a dimension that is fixed")
        elif isinstance(number.origin, Extent) and number.scale == 1:
            labels = number.origin.labels
            if labels is not None and (block is None or support(block) == {dim}):
                if block is not None and labels.sort().values.equal(block.flatten().sort().values):
                    return blocks  # the same in another order, as after a channel shuffle: as many go in both
                tie(self.ledger, labels, None if block is None else block.flatten())
        return blocks

    def compared(self, left: Traced, right: Traced) -> None:
        """An attribute was found equal to the size of a dimension: it must stay so."""
        for number, other in ((left, right), (right, left)):
            size = other.origin
            if isinstance(number.origin, Attribute) and isinstance(size, Extent) and other.scale == 1:
                block, dim = (size.joint, size.dim) if size.labels is None else (size.labels, 0)
                self.demands.append(Demand(number.origin, number.scale, block, dim))

    def sized(self, number: int | Traced, size: int, dim: int, ndim: int) -> Blocks:
        """Blocks of a new dimension (zeros, copies) of which the call gave the size."""
        if size < 2 or not isinstance(number, Traced):
            return ()
        if isinstance(number.origin, Extent) and number.scale == 1:
            labels, joint = number.origin.labels, number.origin.joint
            if joint is not None:  # whole rows from now on
                labels = restrict(self.ledger, joint, {number.origin.dim})[0].flatten()
            return along(labels, dim, ndim)
        blocks = along(self.ledger.fresh(size), dim, ndim)
        return self.require(number, blocks, dim)


class _Functions(TorchFunctionMode):
    """Remembers the integers of the call at work and makes the sizes that tensors report `Traced`."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        trace, outer = self.trace, self.trace.function
        name = getattr(func, "__name__", str(func))
        if func == torch.Tensor.shape.__get__:  # type: ignore[attr-defined]
            return _shape(trace, args[0])
        trace.function = (name, list(_integers((args, kwargs or {}))))
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            trace.function = outer
        if name == "size" and isinstance(args[0], Tensor):
            shape = _shape(trace, args[0])
            return shape if not isinstance(result, int) else shape[args[1] if len(args) > 1 else (kwargs or {})["dim"]]
        return result


def _shape(trace: Trace, tensor: Tensor) -> Shape:
    with torch._C.DisableTorchFunction():
        sizes, blocks = tuple(tensor.shape), trace.blocks(tensor)
    result: list[int] = []
    for dim, size in enumerate(sizes):
        block = next((block for block in blocks if dim in support(block)), None)
        alone = block is not None and support(block) == {dim}
        labels = block.flatten() if block is not None and alone else None
        result.append(Traced(size, Extent(labels, None if alone else block, dim)))
    return Shape(result)


def _integers(value: Any) -> Iterator[Any]:
    """All integers of a call, in order; slices count with their start and stop, tensors of one number as derived."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, Tensor):
        if value.dtype in (torch.int64, torch.int32) and not value.ndim:
            yield Traced(int(value))
    elif isinstance(value, slice):
        yield from _integers([part for part in (value.start, value.stop) if part is not None])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _integers(item)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies one rule per operator."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        trace = self.trace
        name = str(func.overloadpacket)
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        out = NotImplemented
        if trace.before is not None:
            out = trace.before(trace, name, func, args, kwargs or {})
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
        trace.ledger.where = f"{name} in {trace.modules[-1] or 'the model'}" if trace.modules else name
        call = Call(name, args, kwargs or {}, out, shape)
        rule = trace.rules.get(name) or trace.rules.get(name.removesuffix("_")) or trace.fallback(func)
        rule(trace, call)
        return out


@contextmanager
def observed(model: nn.Module, trace: Trace) -> Iterator[None]:
    """The body runs `model` under observation, without gradients and without fused kernels."""
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        trace.modules.append(paths.get(id(module), type(module).__name__))

    def leave(module: nn.Module, *_: Any) -> None:
        trace.modules.pop()

    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:  # its fused kernel is one opaque operator
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        stack.enter_context(traced_attributes(model))
        stack.callback(setattr, Traced, "witness", Traced.witness)
        Traced.witness = trace.compared
        stack.enter_context(_Functions(trace))
        stack.enter_context(_Operators(trace))
        yield
