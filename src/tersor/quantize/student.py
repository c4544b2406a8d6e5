"""A prepared graph while it is trained: BatchNorm taken out again, quantizers that learn, narrower ones by and by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.candidate import apply_masks
from tersor.core.quantization import QuantScheme
from tersor.graph.fake_quantize import SMALLEST_SCALE, FakeQuantize
from tersor.graph.fold import get_tensor
from tersor.graph.unfold import keep_scales_positive, unfold_batch_norm, write_back
from tersor.quantize.learned import LearnedStep, Method
from tersor.quantize.prepare import Batches, Prepared, set_activation_ranges, set_weight_ranges


class Grid(NamedTuple):
    """The format, step `[K]` and zero point `[K]` of one quantizer."""

    scheme: QuantScheme
    scale: Tensor
    zero_point: Tensor


class Student:
    """What training sees of a prepared graph.

    The graph computes with raw weights, each rounded with a step of its own, and with real BatchNorm behind them: the
    deployed step is the raw one times ``γ/σ``, the codes are the same. Every parameter has the path that it has in the
    module.

    Args:
        prepared: Changed in place: afterwards it is good for training only.
        module: What was captured; stays as it is.
        masks: Keep-masks by the module's paths.

    Raises:
        UnsupportedError: if a BatchNorm is no module of its own.
    """

    def __init__(self, prepared: Prepared, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.prepared = prepared
        self.norms = unfold_batch_norm(prepared.simulation, prepared.folded, module)
        self.masks = _reachable(masks, module, prepared.simulation)
        self.unreached: list[str] = []
        self.stages: list[dict[str, Grid]] = []
        self.stage = 0

    @property
    def graph(self) -> nn.Module:
        """What is trained."""
        return self.prepared.simulation

    def calibrate(self, widths: Sequence[int], range_method: str, batches: Batches) -> None:
        """Finds the grids of every stage, with the weights as they are, and takes the first one's.

        Args:
            widths: For each stage how many bits every quantizer has at least; the last one has those that are asked.
            range_method: Of the activations.
            batches: Calibration examples.
        """
        placement = self.prepared.placement
        quantizers = {path: self.prepared.quantizer(path) for path in [*placement.activations, *placement.weights]}
        asked = {path: quantizer.scheme for path, quantizer in quantizers.items()}
        for bits in widths:
            for path, quantizer in quantizers.items():
                quantizer.enabled = False
                quantizer.scheme = asked[path].model_copy(update={"bits": max(bits, asked[path].bits)})
            self.unreached = set_activation_ranges(self.prepared, range_method, batches)
            set_weight_ranges(self.prepared)
            self.stages.append(
                {path: Grid(q.scheme, q.scale, q.zero_point) for path, q in quantizers.items() if q.enabled}
            )
        for path, grid in self.stages[0].items():
            _take(quantizers[path], grid)

    def learn(self, method: Method, *, decay: float) -> None:
        """Lets the quantizers learn: all of them, but with PACT only those of activations."""
        for path in self.stages[0]:
            if method == "pact" and path in self.prepared.placement.weights:
                continue
            learned = LearnedStep(self.prepared.quantizer(path), method, decay=decay)
            self.prepared.simulation.add_submodule(path, learned)

    def state_dict(self) -> dict[str, int]:
        """For checkpoints: what is not among the graph's tensors."""
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the stage of the checkpoint; the graph's tensors are to be loaded afterwards."""
        if state["stage"] != self.stage:
            self._narrow(self.stages[self.stage], self.stages[state["stage"]])
            self.stage = state["stage"]

    def before_step(self, step: int, total: int, frozen_from: int) -> None:
        """Narrows the grids when their stage begins; from the step `frozen_from` on, BatchNorm's statistics stay."""
        stage = step * len(self.stages) // total
        if stage != self.stage:
            self._narrow(self.stages[self.stage], self.stages[stage])
            self.stage = stage
        if step >= frozen_from:
            for norm in self.norms.values():
                norm.eval()

    def after_step(self) -> None:
        """What must hold after every step of the optimizer."""
        apply_masks(self.graph, self.masks)
        keep_scales_positive(self.norms)

    def trained(self, module: nn.Module) -> tuple[nn.Module, dict[str, Grid]]:
        """A copy of the module with what was learned, its weights rounded; and the grids, of raw weights."""
        grids = {path: self._grid(path) for path in self.stages[-1]}
        _round_weights(self.prepared)
        done = copy.deepcopy(module)
        write_back(self.prepared.simulation, done)
        return done, grids

    def _grid(self, path: str) -> Grid:
        found = self.graph.get_submodule(path)
        assert isinstance(found, LearnedStep | FakeQuantize)  # noqa: S101 - placed there
        return Grid(found.scheme, found.scale.detach(), found.zero_point)

    def _narrow(self, before: dict[str, Grid], after: dict[str, Grid]) -> None:
        """What was learned stays: a step changes by the ratio that calibration found between both formats."""
        for path, grid in after.items():
            quantizer = self.graph.get_submodule(path)
            if isinstance(quantizer, LearnedStep):
                quantizer.narrow(grid.scheme, grid.scale / before[path].scale, grid.zero_point)
            else:
                assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - placed there
                _take(quantizer, grid)


def install(prepared: Prepared, grids: Mapping[str, Grid]) -> None:
    """Sets the quantizers of a freshly prepared graph and rounds its weights; those without a grid stay disabled.

    The weights are rounded so that a graph that was built again from its rounded module has the same bits.

    Args:
        prepared: Changed in place.
        grids: By quantizer path, for the weights as the graph has them.
    """
    for path, grid in grids.items():
        _take(prepared.quantizer(path), grid)
    _round_weights(prepared)


def deployed(prepared: Prepared, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """Grids of raw weights as those of the graph, in which BatchNorm is folded: ``s · γ/σ``."""
    result = dict(grids)
    for path, name in prepared.placement.weights.items():
        if name in prepared.folded:
            scale = (grids[path].scale.double() * prepared.folded[name].factor.double()).float()
            result[path] = grids[path]._replace(scale=scale.clamp(min=SMALLEST_SCALE))
    return result


def _round_weights(prepared: Prepared) -> None:
    """Puts every weight on its grid, in place; one that two layers have on two grids stays between them."""
    places = list(prepared.placement.weights.values())
    with torch.no_grad():
        for path, name in prepared.placement.weights.items():
            if places.count(name) == 1:
                weight = get_tensor(prepared.simulation, name)
                weight.copy_(prepared.simulation.get_submodule(path)(weight))


def _take(quantizer: FakeQuantize, grid: Grid) -> None:
    quantizer.scheme, quantizer.scale, quantizer.zero_point = grid
    quantizer.enabled = True


def _reachable(masks: Mapping[str, Tensor], module: nn.Module, graph: nn.Module) -> dict[str, Tensor]:
    """The masks by the graph's paths: tied parameters have one of their names there, unused ones none."""
    named = dict(module.named_parameters(remove_duplicate=False))
    theirs = {id(named[path]): path for path, _ in graph.named_parameters() if path in named}
    return {theirs[id(named[path])]: mask for path, mask in masks.items() if id(named[path]) in theirs}
