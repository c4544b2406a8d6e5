"""Captures what flows through named modules of a running model, without changing the model.

Hooks see it, also inside `torch.compile`, which forgets hooks that come after the first compiled call: it guards the
hooks of a module only where it found some (measured with PyTorch 2.13). What it does guard is an own `forward` of an
instance, so that each tapped module gets its class's `forward` once more while it is tapped: that compiles once for
each set of taps and finds the compiled code again afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tersor.errors import ConfigError, ModelError, OutputError

GRAMMAR = re.compile(r"(?P<path>[^\[\]:]*)(?P<input>:input)?(?P<keys>(?:\[[^\[\]]+\])*)")
EXAMPLES = "'layer1', 'layer2.*', 'head:input', 'encoder[last_hidden_state]', 'attention[1]'"
WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
Key = int | str


class Outputs:
    """What named modules return, or are given, in a forward pass; hooks are there only inside `with`.

    ```python
    outputs = Outputs(model, ["layer1", "encoder.layer.*", "attention[1]", "head:input"])
    with outputs:                  # around one pass, or around a whole training
        logits = model(images)
        features = outputs.take()  # {"layer1": [B, C, H, W], "encoder.layer.0": [B, T, D], …}
    ```

    An address is a path of `named_modules()`, without the prefixes of `torch.compile`, DDP and FSDP; `""` is the model.

    - `*` and `?` make it a pattern: they stop at a dot, `**` does not. Modules that cannot be called are not meant.
    - `[1]` or `[last_hidden_state]` behind it picks from a tuple or mapping, `lstm[1][0]` from a tuple inside.
    - `:input` means what the module is given; several tensors are told apart by place or keyword, `block:input[0]`.

    The tensors are the model's own, on its graph, unless `detach`. Each pass must be taken, or it is kept until `with`
    ends. Passes under `torch.compile` compile anew when the number of passes not yet taken is new.

    Args:
        model: Stays as it is.
        addresses: Where to look.
        detach: For teachers: tensors leave the graph.

    Raises:
        ConfigError: if an address cannot be read, or nothing in the model has that path.
    """

    def __init__(self, model: nn.Module, addresses: Iterable[str], *, detach: bool = False) -> None:
        if isinstance(addresses, str):
            raise ConfigError(f"expected a list of addresses, got the string {addresses!r}; write [{addresses!r}]")
        paths = module_paths(model)
        self._taps = {tap.address: tap for address in addresses for tap in _taps(address, paths, detach)}
        self._depth = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """All that will be captured, patterns written out."""
        return tuple(self._taps)

    def __enter__(self) -> Self:
        if self._depth == 0:
            for tap in self._taps.values():
                tap.attach()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for tap in self._taps.values():
                tap.remove()
            self.clear()

    def take(self) -> dict[str, Tensor]:
        """Address -> tensor, of its module's last call; nothing is kept.

        Raises:
            ModelError: if a module was not called, or its tensor was overwritten since.
        """
        return {address: calls[-1] for address, calls in self.take_calls().items()}

    def take_calls(self) -> dict[str, tuple[Tensor, ...]]:
        """The same with every call since the last `take`, in order: for modules that a pass calls several times."""
        try:
            silent = [address for address, tap in self._taps.items() if not tap.calls]
            if silent:
                raise ModelError(f"nothing was captured at {_listed(silent)}: {self._why_silent()}")
            return {address: tap.tensors() for address, tap in self._taps.items()}
        finally:
            self.clear()

    def clear(self) -> None:
        """Forgets what was captured."""
        for tap in self._taps.values():
            tap.calls.clear()

    def _why_silent(self) -> str:
        if self._depth == 0:
            return "the outputs are not attached; run the model and call take() inside `with`"
        if all(not tap.calls for tap in self._taps.values()):
            return "the model did not run since the outputs were attached or last taken; call it before take()"
        return (
            "the model did not call these modules in this pass (a branch that was not taken, or weights that are used "
            "without their module, as those of nn.MultiheadAttention.out_proj); tap the module around them"
        )


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path without wrappers; a module with several names is there under each."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        found[path] = module  # what is wrapped takes its wrapper's place
        for name, child in module._modules.items():
            if child is not None:
                walk(child, path if _wraps(module, name) else f"{path}.{name}".lstrip("."))

    walk(model, "")
    return found


def refuse_nested(value: Tensor, address: str) -> None:
    """Raises `OutputError` for what `nn.TransformerEncoder` makes of padded batches in evaluation mode."""
    if value.is_nested:
        raise OutputError(
            f"{address!r} is a nested tensor, which has no common shape; set use_nested_tensor = False on the "
            "nn.TransformerEncoder around it"
        )


def _wraps(module: nn.Module, name: str) -> bool:
    parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return name in WRAPPED or (parallel and name == "module")


class _Captured(NamedTuple):
    tensor: Tensor
    version: int | None  # None where PyTorch does not count


class _Tap:
    """The hook at one address."""

    def __init__(self, address: str, module: nn.Module, keys: Sequence[Key], *, is_input: bool, detach: bool) -> None:
        self.address, self.module, self.keys, self.is_input, self.detach = address, module, keys, is_input, detach
        self.calls: list[_Captured] = []
        self.handle: RemovableHandle | None = None

    def attach(self) -> None:
        module = self.module
        if self.is_input:
            self.handle = module.register_forward_pre_hook(self, with_kwargs=True)
        else:
            self.handle = module.register_forward_hook(self, with_kwargs=True)
        module.__dict__.setdefault("forward", module.forward)

    def remove(self) -> None:
        assert self.handle is not None  # noqa: S101 - attached before
        self.handle.remove()
        module = self.module
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not any(isinstance(hook, _Tap) for hook in hooks):
            own = module.__dict__.pop("forward", None)
            if own is not None and own != module.forward:  # somebody else's
                module.__dict__["forward"] = own

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        value = self._input(args, kwargs) if self.is_input else output[0]
        for place in range(len(self.keys)):
            value = self._pick(value, place)
        if not isinstance(value, Tensor):
            hint = self._hint(value, len(self.keys))
            raise OutputError(f"{self.address!r} is {_described(value)}, expected a tensor{hint}")
        refuse_nested(value, self.address)
        counted = not torch.compiler.is_compiling() and not value.is_inference()
        self.calls.append(_Captured(value.detach() if self.detach else value, value._version if counted else None))

    def tensors(self) -> tuple[Tensor, ...]:
        if any(version is not None and tensor._version != version for tensor, version in self.calls):
            raise ModelError(
                f"the tensor at {self.address!r} was overwritten after it was captured, by an operation in place such "
                "as ReLU(inplace=True); tap the module that overwrites it, or build that one with inplace=False"
            )
        return tuple(tensor for tensor, _ in self.calls)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        return tensors[0] if len(tensors) == 1 and not self.keys else given

    def _pick(self, value: Any, place: int) -> Any:
        key = self.keys[place]
        if isinstance(value, Tensor):
            raise OutputError(f"{self.address!r}: there is one tensor already; leave [{key}] out")
        if isinstance(value, Mapping) and key in value:
            return value[key]
        if isinstance(value, list | tuple) and isinstance(key, int) and -len(value) <= key < len(value):
            return value[key]
        raise OutputError(f"{self.address!r}: [{key}] is not in {_described(value)}{self._hint(value, place)}")

    def _hint(self, value: Any, used: int) -> str:
        names = [name for name, part in _entries(value) if part is not None]
        stem = self.address.partition("[")[0] + "".join(f"[{key}]" for key in self.keys[:used])
        return f"; name one, e.g. '{stem}[{names[0]}]'" if names else ""


def _taps(address: str, paths: Mapping[str, nn.Module], detach: bool) -> list[_Tap]:
    parts = GRAMMAR.fullmatch(address)
    if parts is None:
        raise ConfigError(f"cannot read the address {address!r}; expected e.g. {EXAMPLES}")
    path, suffix = parts["path"], f"{parts['input'] or ''}{parts['keys']}"
    keys = [int(key) if re.fullmatch(r"-?\d+", key) else key for key in re.findall(r"\[([^\]]+)\]", parts["keys"])]
    found = _matches(path, paths)
    if not found:
        near = get_close_matches(path.replace("*", ""), paths, n=3, cutoff=0.4)
        what = "no module that can be called matches" if _is_pattern(path) else "the model has no module"
        hint = f"nearest: {_listed(near)}" if near else f"there are {_listed(list(paths)[1:])}"
        raise ConfigError(f"{what} {path!r}; {hint}")
    is_input = parts["input"] is not None
    return [_Tap(f"{name}{suffix}", paths[name], keys, is_input=is_input, detach=detach) for name in found]


def _is_pattern(path: str) -> bool:
    return "*" in path or "?" in path


def _matches(path: str, paths: Mapping[str, nn.Module]) -> list[str]:
    if not _is_pattern(path):
        return [path] if path in paths else []
    text = re.escape(path).replace(r"\*\*", ".*").replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
    first: dict[nn.Module, str] = {}
    for name, module in paths.items():
        if type(module).forward is not nn.Module.forward and re.fullmatch(text, name):
            first.setdefault(module, name)  # a module with several names is one match
    return list(first.values())


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _described(value: Any) -> str:
    parts = ", ".join(f"{name}: {_shape(part)}" for name, part in _entries(value))
    return f"a {type(value).__name__} of ({parts})" if parts else f"a {type(value).__name__}"


def _shape(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
