"""The task's metric on the search split, for a training that watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.task import Task

BATCH = 256


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode and no gradients are computed; afterwards its modes are as before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def home_of(module: nn.Module) -> torch.device:
    """Where the module is."""
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def answers_of(module: nn.Module, output: str | int | None) -> Callable[[Batch], Tensor]:
    """`batch -> the output that counts`, on the processor: of the module in evaluation mode, wherever it is."""

    def answers(batch: Batch) -> Tensor:
        device = home_of(module)
        with evaluating(module):
            return select_output(batch.map(lambda value: value.to(device)).call(module), output).cpu()

    return answers


def evaluation(task: Task, original: Callable[[Batch], Tensor] | None = None) -> Callable[[nn.Module], float] | None:
    """`module -> metric`, higher is better (a metric of which less is better is negated), on the search split.

    None without a search split.

    Args:
        task: With the metric.
        original: The original's answers, with which metrics such as agreement compare, see `answers_of`; without it,
            they are not evaluated.
    """
    split, metric = task.get("search"), task.metric
    if split is None or (metric.against_original and original is None):
        return None
    expected: list[Tensor | None] = []

    def evaluate(module: nn.Module) -> float:
        answers, statistics, labels = answers_of(module, task.output), [], []
        for index, batch in enumerate(split.batches(BATCH)):
            outputs = answers(batch)
            if metric.against_original:
                if len(expected) <= index:
                    assert original is not None  # noqa: S101 - checked above
                    expected.append(original(batch))
                wanted = expected[index]
            else:
                wanted = batch.labels
            statistics.append(metric.statistic(outputs, wanted))
            if wanted is not None:
                labels.append(wanted)
        value = metric.value(torch.cat(statistics), torch.cat(labels) if labels else None)
        return value if metric.higher_is_better else -value

    return evaluate
