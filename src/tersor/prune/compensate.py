"""Refits the layers behind removed units, so that what stays takes over what is lost.

Shapes: `O` outputs, `I` inputs, `K` columns of a weight seen as a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tersor.core.surgery import Surgery
from tersor.probe import Evidence
from tersor.prune.reconstruction import refit


def compensate(model: nn.Module, surgery: Surgery, evidence: Mapping[str, Evidence]) -> list[str]:
    """Rewrites, in place, the columns that will stay of every weight that `surgery` cuts along its inputs.

    Least squares on the measured inputs, layer by layer: Hassibi & Stork 1992, https://arxiv.org/abs/2302.04089.

    Args:
        model: Before the surgery.
        surgery: That will follow.
        evidence: With grams `[K, K]`; weights without (grouped convolutions, raw parameters) stay as they are.

    Returns:
        Paths of the weights that were refitted.
    """
    done = []
    for cut in surgery.cuts:
        known = evidence.get(cut.parameter)
        if known is None or known.gram is None or known.gram.ndim != 2 or cut.dim != 1 - known.output_dim:
            continue
        weight = model.get_parameter(cut.parameter)
        matrix = weight.detach().transpose(0, known.output_dim).flatten(1)  # [O, K]
        per_input = matrix.shape[1] // cut.size
        kept = (torch.tensor(cut.kept)[:, None] * per_input + torch.arange(per_input)).flatten()
        fitted = matrix.clone()
        fitted[:, kept] = refit(matrix, known.gram, kept)
        shape = weight.transpose(0, known.output_dim).shape
        with torch.no_grad():
            weight.copy_(fitted.reshape(shape).transpose(0, known.output_dim))
        done.append(cut.parameter)
    return done
