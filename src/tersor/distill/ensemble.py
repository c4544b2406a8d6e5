"""Several teachers as one.

The mean may be of their probabilities or of their logits, which is the geometric mean of the probabilities up to a
factor: Hinton et al. 2015 (https://arxiv.org/abs/1503.02531) name both.

Shapes: `B` batch, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tersor.core.batch import select_output
from tersor.errors import ConfigError, OutputError

How = Literal["probabilities", "logits"]


class Ensemble(nn.Module):
    """Answers with the weighted mean of its members, as logits.

    `probabilities`: `log Σ_i w_i · softmax(z_i)`, whose softmax is the mean of the members' probabilities.
    `logits`: `Σ_i w_i · z_i`. A temperature in the loss softens the mean, not each member.

    Args:
        teachers: At least one; they are held, not copied.
        weights: One positive number each, by default equal; what counts is their share in the sum.
        how: What the mean is of.
        output: Key or index of the members' output that counts, if they return a dict or tuple.

    Raises:
        ConfigError: if teachers, weights or the kind of mean are wrong.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        *,
        how: How = "probabilities",
        output: str | int | None = None,
    ) -> None:
        super().__init__()
        members = list(teachers)
        if not members or not all(isinstance(member, nn.Module) for member in members):
            raise ConfigError(
                f"teachers: expected at least one nn.Module, got {[type(member).__name__ for member in members]}"
            )
        given = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(members) or not all(math.isfinite(weight) and weight > 0 for weight in given):
            raise ConfigError(f"weights: expected {len(members)} positive numbers, one per teacher, got {given}")
        if how not in get_args(How):
            raise ConfigError(f"how: expected one of {list(get_args(How))}, got {how!r}")
        self.teachers = nn.ModuleList(members)
        self.weights = tuple(weight / math.fsum(given) for weight in given)
        self.how, self.output = how, output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The members' arguments -> `[B, ..., C]` in float32.

        Raises:
            OutputError: if the members' outputs differ in shape, or none was declared where one must be.
        """
        answers = [select_output(teacher(*args, **kwargs), self.output).float() for teacher in self.teachers]
        shapes = [tuple(answer.shape) for answer in answers]
        if len(set(shapes)) > 1:
            raise OutputError(f"the teachers of an ensemble must answer in one shape, got {shapes}")
        if self.how == "logits":
            return torch.stack([w * answer for w, answer in zip(self.weights, answers, strict=True)]).sum(0)
        logs = [math.log(w) + answer.log_softmax(-1) for w, answer in zip(self.weights, answers, strict=True)]
        return torch.stack(logs).logsumexp(0)

    def extra_repr(self) -> str:
        """What the mean is of, and the weights."""
        return f"how={self.how!r}, weights={self.weights}"
