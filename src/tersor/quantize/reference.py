"""The float model that a prepared graph is compared with."""

from __future__ import annotations

import copy

from torch import fx

from tersor.graph import FakeQuantize
from tersor.quantize.prepare import Prepared

Reference = tuple[fx.GraphModule, dict[str, fx.Node]]


def float_reference(prepared: Prepared) -> Reference:
    """The same graph without rounding, and its nodes by name.

    It shares the tensors of the simulation as they are now: they take no memory of their own. Recovery methods put new
    parameters in place of old ones, which the reference keeps.
    """
    simulation = prepared.simulation
    tensors = [*simulation.parameters(), *simulation.buffers()]
    reference = copy.deepcopy(simulation, {id(tensor): tensor for tensor in tensors})
    for module in reference.modules():
        if isinstance(module, FakeQuantize):
            module.enabled = False
    return reference, {node.name: node for node in reference.graph.nodes}
