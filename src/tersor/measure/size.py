"""Counts parameters, multiply-accumulates and bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tersor.core.batch import Batch
from tersor.core.quantization import QuantPlan
from tersor.core.report import Layer


def file_bytes(files: Iterable[Path]) -> dict[str, int]:
    """Bytes on disk by file name."""
    return {path.name: path.stat().st_size for path in files}


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """All parameters and the non-zero ones; tied ones count once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(int(torch.count_nonzero(p)) for p in parameters)


def mac_counts(module: nn.Module, batch: Batch) -> dict[str, int]:
    """Dense multiply-accumulates of one call, by module path; `""` is the whole model.

    Counts convolutions, matrix products and attention, by PyTorch's own counter (two operations each). `module`
    stays as it is.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), _nothing_fused(), FlopCounterMode(display=False) as counter:
            batch.call(module.eval())
    finally:
        for part, training in modes:
            part.training = training
    root = type(module).__name__
    result = {"": counter.get_total_flops() // 2}
    for path, operators in counter.get_flop_counts().items():
        if path.startswith(f"{root}."):
            result[path.removeprefix(f"{root}.")] = sum(operators.values()) // 2
    return result


@contextmanager
def _nothing_fused() -> Iterator[None]:
    """Fused kernels (oneDNN's LSTM, attention, whole encoder layers) hide from the counter what they compute."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration")  # `flags` touches it on every machine
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def layer_table(
    original: nn.Module, deployed: nn.Module, plan: QuantPlan | None, macs: Mapping[str, int]
) -> list[Layer]:
    """One row per module that holds parameters of its own, in the order of the model."""
    stored = plan.stored if plan is not None else {}
    rows = []
    for path, module in deployed.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        errors = [
            weight_error(original, deployed, f"{path}.{name}".lstrip("."))
            for name, parameter in own.items()
            if parameter.ndim >= 2
        ]
        formats = [stored[full] for name in own if (full := f"{path}.{name}".lstrip(".")) in stored]
        rows.append(
            Layer(
                name=path or "(model)",
                kind=type(module).__name__,
                parameters=sum(parameter.numel() for parameter in own.values()),
                nonzero_parameters=sum(int(torch.count_nonzero(parameter)) for parameter in own.values()),
                macs=macs.get(path, 0),
                precision=max(formats, default="float32"),
                weight_error=max((error for error in errors if error is not None), default=None),
            )
        )
    return rows


def weight_error(original: nn.Module, deployed: nn.Module, path: str) -> float | None:
    """``‖W' − W‖ / ‖W‖`` of the deployed weight against the original's; None if their shapes differ."""
    try:
        before = original.get_parameter(path).detach().double()
    except AttributeError:
        return None
    after = deployed.get_parameter(path).detach().double()
    if before.shape != after.shape:
        return None
    norm = float(before.norm())
    return float((after - before).norm()) / norm if norm > 0 else 0.0
