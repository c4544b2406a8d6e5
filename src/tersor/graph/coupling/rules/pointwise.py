"""Element-wise operators, reductions, pooling, and new tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.graph.coupling.labels import Blocks, Operand, forbid, support, unify
from tersor.graph.coupling.trace import Call, Rule, Trace


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return []


def broadcast(operand: Operand, ndim: int) -> Operand:
    """The same with leading dimensions of size one."""
    extra = ndim - len(operand.shape)
    return Operand(
        (*[1] * extra, *operand.shape), tuple(block.reshape(*[1] * extra, *block.shape) for block in operand.blocks)
    )


def pointwise(trace: Trace, call: Call) -> None:
    """Entries that meet go together."""
    given = tensors_in([call.args, dict(call.kwargs)])
    outs = tensors_in(call.out)
    ndim = max((out.ndim for out in outs), default=0)
    operands = [broadcast(trace.operand(tensor), ndim) for tensor in given if tensor.ndim <= ndim]
    blocks = unify(trace.ledger, operands)
    for out in outs:
        trace.put(out, blocks)


def reduction(trace: Trace, call: Call) -> None:
    """Sums, means, extrema: what they run over may go (the statistic then runs over what is left)."""
    values = call.args[0]
    dims = call.argument(1, "dim")
    if call.name in ("aten.linalg_vector_norm", "aten.norm"):
        dims = call.argument(2, "dim")
    listed = (
        dims
        if isinstance(dims, tuple | list)
        else [dims]
        if isinstance(dims, int) and not isinstance(dims, bool)
        else []
    )
    over = {int(dim) % max(values.ndim, 1) for dim in listed} or set(range(values.ndim))
    blocks = unify(trace.ledger, [trace.operand(values)], apart=over)
    for out in tensors_in(call.out):
        kept: list[Tensor] = []
        for block in blocks:
            if not support(block) & over:
                kept.append(block if out.ndim == values.ndim else _drop(block, over))
        trace.put(out, tuple(kept))


def _drop(block: Tensor, dims: set[int]) -> Tensor:
    return block.reshape([size for dim, size in enumerate(block.shape) if dim not in dims])


def ordered(trace: Trace, call: Call) -> None:
    """Sorting, cumulative sums and the like: every entry along the dimension depends on the others."""
    values = call.args[0]
    name = {"aten.topk": 2, "aten.kthvalue": 2}.get(call.name, 1)
    dim = call.argument(name, "dim", -1)
    dim = -1 if dim is None or isinstance(dim, bool) else int(dim)
    blocks = forbid(trace.ledger, trace.blocks(values), dim % max(values.ndim, 1), f"{call.name} runs along it")
    for out in tensors_in(call.out):
        trace.put(out, blocks if out.ndim == values.ndim else ())


def spatial(trace: Trace, call: Call) -> None:
    """Pooling and resampling: the last one to three dimensions are fixed, but where a window is one wide."""
    image = call.args[0]
    count = next(number for number in (1, 2, 3) if f"{number}d" in call.name)
    blocks: Blocks = trace.blocks(image)
    for place in range(count):
        if not _untouched(call, place, count):
            dim = image.ndim - count + place
            blocks = forbid(trace.ledger, blocks, dim, "it is a spatial dimension")
    for out in tensors_in(call.out):
        trace.put(out, tuple(blocks))


def _untouched(call: Call, place: int, count: int) -> bool:
    """Whether a window is one wide and moves by one along a dimension, so that every entry stays by itself."""
    if call.name.removeprefix("aten.").split("_pool")[0] not in ("avg", "max"):
        return False

    def at(position: int, name: str, default: int) -> int:
        given = call.argument(position, name, ())
        listed = list(given) if isinstance(given, tuple | list) else [given]
        return int(listed[place if len(listed) == count else 0]) if listed else default

    kernel = at(1, "kernel_size", 0)
    return kernel == 1 and at(2, "stride", kernel) == 1 and at(3, "padding", 0) == 0


def complex_parts(trace: Trace, call: Call) -> None:
    """`view_as_real`, `view_as_complex`: two parts of every number, along a last dimension that comes or vanishes."""
    source = call.args[0]
    blocks = trace.blocks(source)
    if call.name == "aten.view_as_real":
        trace.put(call.out, tuple(block.unsqueeze(-1) for block in blocks))
        return
    blocks = forbid(trace.ledger, blocks, source.ndim - 1, "a complex number has two parts")
    trace.put(call.out, tuple(block.squeeze(-1) for block in blocks))


def fourier(trace: Trace, call: Call) -> None:
    """Fourier transforms: every frequency depends on all entries."""
    blocks = trace.blocks(call.args[0])
    for dim in call.args[1]:
        blocks = forbid(trace.ledger, blocks, int(dim) % call.out.ndim, "a Fourier transform runs along it")
    trace.put(call.out, blocks)


def factory(trace: Trace, call: Call) -> None:
    """Zeros, ones, noise: dimensions whose size is not written in the code can be cut like what they meet."""
    out = call.out
    if call.name.endswith("_like"):
        trace.put(out, trace.blocks(call.args[0]))
        return
    numbers = trace.written(out.shape)
    blocks: list[Tensor] = []
    for dim, number in enumerate(numbers):
        blocks += trace.sized(number, out.shape[dim], dim, out.ndim)
    trace.put(out, tuple(blocks))


def constant(trace: Trace, call: Call) -> None:
    """Counting ranges and numbers from data: nothing can be cut."""


def unknown(trace: Trace, call: Call) -> None:
    """An operator without a rule freezes all that it touches."""
    for tensor in tensors_in([call.args, dict(call.kwargs)]):
        for block in trace.blocks(tensor):
            trace.ledger.freeze(block, f"the operator {call.name} is not known")


def fallback(func: Any) -> Rule:
    """The rule of an operator that is in no table: element-wise if PyTorch says so, also of its form out of place."""
    packet = getattr(torch.ops.aten, func.overloadpacket.__name__.removesuffix("_"), None)
    forms = [func, *(getattr(packet, name) for name in (packet.overloads() if packet is not None else ()))]
    return pointwise if any(torch.Tag.pointwise in form.tags for form in forms) else unknown


_SAME = (
    "clone detach alias _to_copy lift_fresh lift_fresh_copy contiguous copy masked_fill where native_dropout "
    "bernoulli _conj resolve_conj _neg_view fill zero view_as hardswish floor_divide bucketize "
    "log_sigmoid_forward _prelu_kernel polar complex real imag isin special_ndtr dropout alpha_dropout "
    "uniform normal exponential geometric log_normal cauchy random poisson rrelu_with_noise"
)
_REDUCTIONS = (
    "sum mean amax amin aminmax var std var_mean std_mean prod any all norm linalg_vector_norm logsumexp max min "
    "median nansum nanmedian count_nonzero"
)
_ORDERED = "argmax argmin sort argsort topk cumsum cumprod kthvalue mode logcumsumexp cummax cummin"
_SPATIAL = (
    "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool1d max_pool1d "
    "adaptive_max_pool3d max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d "
    "upsample_nearest1d upsample_nearest2d _upsample_nearest_exact1d _upsample_nearest_exact3d "
    "upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d grid_sampler_3d"
)
_FACTORIES = (
    "zeros ones full empty rand randn randint new_zeros new_ones new_full new_empty zeros_like ones_like full_like "
    "empty_like rand_like randn_like empty_strided new_empty_strided"
)
_CONSTANTS = (
    "arange scalar_tensor linspace logspace eye _local_scalar_dense nonzero is_nonzero equal bincount histc "
    "tril_indices triu_indices randperm hann_window hamming_window bartlett_window blackman_window kaiser_window "
    "affine_grid_generator"
)

RULES: dict[str, Rule] = {
    **{f"aten.{name}": pointwise for name in _SAME.split()},
    **{f"aten.{name}": reduction for name in _REDUCTIONS.split()},
    **{f"aten.{name}": ordered for name in _ORDERED.split()},
    **{f"aten.{name}": spatial for name in _SPATIAL.split()},
    **{f"aten.{name}": factory for name in _FACTORIES.split()},
    **{f"aten.{name}": constant for name in _CONSTANTS.split()},
    "aten.view_as_real": complex_parts,
    "aten.view_as_complex": complex_parts,
    "aten._fft_r2c": fourier,
    "aten._fft_c2r": fourier,
    "aten._fft_c2c": fourier,
}
