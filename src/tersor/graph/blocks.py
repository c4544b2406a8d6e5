"""Whole blocks: which modules of a model could be replaced by the identity, and what stands in their place.

A block is a module with parts of its own that answers, in every call of the example runs, with a tensor of its
input's shape and type, and that has a way around its weights: with weights of almost zero it still answers with
something like its input. A chain of convolutions has no such way, a residual block has, whatever its code looks like.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.surgery import Shrink, SkippedBlock, Surgery
from tersor.errors import ModelError, SurgeryError
from tersor.graph.coupling.couple import Run, run_model
from tersor.graph.coupling.family import Frozen

WEAK = 1e-6  # of a probe's weights
LEAST_SIZE, LEAST_LIKENESS = 0.01, 0.3  # a ReLU behind a sum leaves 0.7
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Skip(nn.Module):
    """Stands where a block was: answers with its arguments, in the form in which the block answered.

    Plain attributes of the block (its number, its kind of attention) stay readable, for parents that ask for them.

    Args:
        block: What form, and which arguments. An argument that a call leaves out is None.
        attributes: Of the block that it replaces.
    """

    def __init__(self, block: SkippedBlock, attributes: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        for name, value in (attributes or {}).items():
            setattr(self, name, value)
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments that the block's answer is made of."""
        elements = [argument(source, args, kwargs) for source in self.block.sources]
        if self.block.form == "tensor":
            return elements[0]
        return tuple(elements) if self.block.form == "tuple" else elements

    def extra_repr(self) -> str:
        """What it answers."""
        return f"{self.block.form} of {list(self.block.sources)}"


def argument(source: int | str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument at a position or keyword; None if the call has none."""
    if isinstance(source, int):
        return args[source] if source < len(args) else None
    return None if source is None else kwargs.get(source)


def skip_block(model: nn.Module, block: SkippedBlock) -> None:
    """Replaces a block by the identity, in place, wherever the model holds it."""
    old = model.get_submodule(block.path)
    skip = Skip(block, _plain(old)).train(old.training)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                module._modules[name] = skip


def shrink_list(model: nn.Module, shrink: Shrink) -> None:
    """Keeps some modules of a list, in place."""
    modules = model.get_submodule(shrink.path)
    names, children = list(modules._modules), list(modules._modules.values())
    modules._modules = {names[number]: children[index] for number, index in enumerate(shrink.kept)}


def numbered(module: nn.Module) -> bool:
    """Whether a module is a list: an `nn.ModuleList`, or an `nn.ModuleDict` whose keys end in 0, 1, 2 and so on."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not len(module):
        return False
    start = next(iter(module._modules)).removesuffix("0")
    return list(module._modules) == [f"{start}{number}" for number in range(len(module))]


def check_blocks(modules: Mapping[str, nn.Module], surgery: Surgery) -> None:
    """Raises `SurgeryError` unless all blocks and lists are what the surgery expects."""
    for block in surgery.skipped:
        if isinstance(modules[block.path], Skip):
            raise SurgeryError(f"block {block.path!r} must be there still, it has been skipped before")
    for shrink in surgery.shrunk:
        found = modules[shrink.path]
        size = len(found) if isinstance(found, nn.ModuleList | nn.ModuleDict) and numbered(found) else None
        if size != shrink.size:
            raise SurgeryError(
                f"{shrink.path!r} must be an nn.ModuleList of {shrink.size} modules, or an nn.ModuleDict with such "
                f"numbers for keys, it is {type(found).__name__}{'' if size is None else f' of {size}'}"
            )
        kept = list(shrink.kept)
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= shrink.size:
            raise SurgeryError(f"what is kept of {shrink.path!r} must be ascending indices below {shrink.size}")


def _plain(module: nn.Module) -> dict[str, Any]:
    """Public attributes of a module that are no modules, tensors or hooks; class attributes count."""
    names = {name for kind in type(module).__mro__ if issubclass(kind, nn.Module) for name in vars(kind)}
    names = (names | set(vars(module))) - set(dir(nn.Module)) - {"training", "block"}
    found = {}
    for name in sorted(names):
        if name.startswith("_") or isinstance(getattr(type(module), name, None), property):
            continue
        value = getattr(module, name)
        if not callable(value) and not isinstance(value, Tensor | nn.Module):
            found[name] = value
    return found


def find_blocks(
    model: nn.Module, runs: Sequence[Run], paths: Sequence[str] | None = None
) -> tuple[list[SkippedBlock], list[Frozen]]:
    """Blocks that could be skipped, in the model's order, and those that could not, with the reason.

    Of blocks inside blocks the outer ones count, except that a stage - a block that holds several blocks of one class
    and of its own shape, or one that has all its parameters - gives way to what it holds.

    Args:
        model: In evaluation mode; it stays as it is.
        runs: Arguments of the model.
        paths: Only these modules, whatever they are; by default all that look like blocks.

    Raises:
        SurgeryError: if the model has no module at a path.
        ModelError: if the model does not run.
    """
    modules = dict(model.named_modules())
    unknown = [path for path in paths or () if path not in modules or not path]
    if unknown:
        raise SurgeryError(f"blocks: the model has no modules {unknown}; it has {list(modules)[1:9]} …")
    candidates = _composite(model) if paths is None else [path for path in modules if path in paths]
    seen = {path: _Seen(probes=paths is None) for path in candidates}
    with ExitStack() as stack, torch.no_grad():
        for path in candidates:
            module = modules[path]
            stack.callback(module.register_forward_pre_hook(seen[path].before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(seen[path].after, with_kwargs=True).remove)
        for args, kwargs in runs:
            run_model(model, args, kwargs)
        _offer_cache(model, runs[0])
    blocks, frozen = [], []
    if paths is None:
        residual = [path for path in candidates if seen[path].residual]
        frozen += [Frozen(path, seen[path].reason) for path in residual if seen[path].reason]
        candidates = _outermost([path for path in residual if not seen[path].reason], modules, seen)
    for path in candidates:
        reason = seen[path].reason or _cached(modules[path], seen[path])
        if reason:
            frozen.append(Frozen(path, reason))
        else:
            blocks.append(SkippedBlock(path=path, form=seen[path].form, sources=seen[path].sources))
    return blocks, frozen


def _offer_cache(model: nn.Module, run: Run) -> None:
    """Runs once more with `use_cache=True` where a model has that: who will generate may not have given it here."""
    if "use_cache" not in inspect.signature(model.forward).parameters:
        return
    args, kwargs = run
    with _Probe.alone(), suppress(ModelError):
        run_model(model, args, {**kwargs, "use_cache": True})


def _composite(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if path and not isinstance(module, (*CONTAINERS, Skip)) and next(module.children(), None) is not None
    ]


class _Seen:
    """What the calls of one module have in common."""

    def __init__(self, probes: bool) -> None:
        self.probes = probes  # whether to find out if there is a way around the weights
        self.residual = False
        self.shape: torch.Size | None = None
        self.form: Any = "tensor"
        self.sources: tuple[int | str | None, ...] = ()
        self.cache = False
        self.reason = "it was not called in the example runs"
        self.given: Any = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cached = any(_is_cache(value) for value in (*args, *kwargs.values()))
        self.cache |= cached
        if _Probe.busy or not self.probes or self.shape is not None:
            return
        if any(isinstance(value, Tensor) and value.is_floating_point() for value in (*args, *kwargs.values())):
            self.given = copy.deepcopy((args, kwargs)) if cached else (args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _Probe.busy:
            return
        saved, self.given = self.given, None
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        first = output[0] if type(output) in (tuple, list) and output else output
        source = next((name for name, value in given if _alike(value, first)), None)
        if source is None:
            self.shape, self.reason = torch.Size(), "its output has not the shape of an input"
        elif self.shape is None:
            self.shape, self.reason = first.shape, ""
            self.form, self.sources = _form(source, given, output)
            if saved is not None:
                self.residual = _Probe.residual(module, saved[0], saved[1], source)
        elif not self.reason and (self.form, self.sources) != _form(source, given, output):
            self.reason = "it answers in a different form from call to call"


def _form(source: int | str, given: Sequence[tuple[Any, Any]], output: Any) -> tuple[str, tuple[Any, ...]]:
    if isinstance(output, Tensor):
        return "tensor", (source,)
    names = {id(value): name for name, value in reversed(given) if value is not None}
    # what only the block can make, such as attention weights, is None: whether anything needs it, a check shows
    return type(output).__name__, (source, *(names.get(id(value)) for value in output[1:]))


class _Probe:
    """Calls a module with weights of almost zero."""

    busy = False

    @classmethod
    @contextmanager
    def alone(cls) -> Iterator[None]:
        """Calls in the body are no calls of the example runs."""
        cls.busy = True
        try:
            yield
        finally:
            cls.busy = False

    @classmethod
    def residual(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: int | str) -> bool:
        """Whether it then answers with something like its input."""
        weak = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and (
                (tensor.ndim > 1 and isinstance(tensor, nn.Parameter)) or name.endswith(("bias", "running_mean"))
            ):
                weak[name] = tensor.detach() * WEAK
        wanted = argument(source, args, kwargs)
        if not bool(wanted.any()):  # queries that are learned start at zero
            wanted = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).to(wanted)
            args = tuple(wanted if source == position else value for position, value in enumerate(args))
            kwargs = {name: wanted if source == name else value for name, value in kwargs.items()}
        wanted = wanted.double().flatten()
        with cls.alone():
            try:
                answer = torch.func.functional_call(module, weak, args, kwargs)
            except Exception:
                return False
        found = (answer if isinstance(answer, Tensor) else answer[0]).double().flatten()
        if torch.allclose(found, wanted / 2, rtol=0.01):
            return False  # a gate, at sigmoid(0)
        big = float(found.norm()) > LEAST_SIZE * float(wanted.norm())
        return big and float(functional.cosine_similarity(found, wanted, dim=0)) > LEAST_LIKENESS


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def _alike(value: Any, output: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(output, Tensor):
        return False
    return value.shape == output.shape and value.dtype == output.dtype and value.is_floating_point()


def _outermost(paths: Sequence[str], modules: Mapping[str, nn.Module], seen: Mapping[str, _Seen]) -> list[str]:
    inside: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for other in paths:
            if path.startswith(f"{other}."):
                inside[other].append(path)
    stages = set()
    for path, inner in inside.items():
        classes = Counter(type(modules[name]) for name in inner if seen[name].shape == seen[path].shape)
        if any(count > 1 for count in classes.values()) or _size(modules[path]) in {_size(modules[n]) for n in inner}:
            stages.add(path)
    left = [path for path in paths if path not in stages]
    return [path for path in left if not any(path.startswith(f"{other}.") for other in left)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cached(module: nn.Module, seen: _Seen) -> str:
    if seen.cache and any(getattr(part, "layer_idx", None) == 0 for part in module.modules()):
        return "the cache of keys and values takes its length from it"
    return ""


@contextmanager
def bypassed(model: nn.Module, blocks: Sequence[SkippedBlock]) -> Iterator[None]:
    """The reference of a skip: the body runs `model` whole, but each of these blocks' outputs is its input."""
    with ExitStack() as stack:
        for block in blocks:
            bypass = _Bypass(block)
            module = model.get_submodule(block.path)
            stack.callback(module.register_forward_pre_hook(bypass.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(bypass.after, with_kwargs=True).remove)
        yield


class _Bypass:
    def __init__(self, block: SkippedBlock) -> None:
        self.block = block
        self.inputs: list[Tensor] = []

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a copy: the block may change its input
        self.inputs.append(argument(self.block.sources[0], args, kwargs).clone())

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        value = self.inputs.pop()
        if isinstance(output, Tensor):
            return value
        return type(output)([value, *output[1:]])
