"""The batches of a training, each a function of seed and step, loaded here or by other processes."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.train.parallel import World
from tersor.train.randomness import seed_all
from tersor.train.schedule import Schedule


class StepBatches(Dataset[Batch]):
    """The batch of every step of a training: shuffled anew each epoch, this process's part of it.

    Whatever a dataset draws at random, e.g. flips and crops, is seeded by the step, so that neither the number of
    loading processes nor an interruption changes it.
    """

    def __init__(self, split: Split, schedule: Schedule, seed: int, world: World) -> None:
        self.split, self.schedule, self.seed, self.world = split, schedule, seed, world
        self.steps = schedule.steps_per_epoch(len(split))
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return self.schedule.total_steps(len(self.split))

    def __getitem__(self, step: int) -> Batch:
        epoch, within = divmod(step, self.steps)
        if epoch != self._epoch:
            generator = np.random.default_rng(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, generator.permutation(len(self.split))
        size = self.schedule.batch_size
        positions = self.world.share(self._order[within * size : (within + 1) * size])
        seed_all(self.seed, "data", step, self.world.rank)
        try:
            return self.split.batch(positions)
        except Exception as error:
            error.add_note(
                f"while loading step {within} of epoch {epoch}, examples {', '.join(map(str, positions[:4]))}, … of "
                f"split {self.split.name!r}"
            )
            raise

    def loaded(self, first: int) -> Generator[Batch]:
        """The batches of the steps from `first` on, in order; closing it ends the loading processes."""
        if not self.schedule.workers:
            for step in range(first, len(self)):
                yield self[step]
            return
        # A generator of its own: a loader draws a seed from the default one, which belongs to the model here.
        yield from DataLoader(
            self,
            batch_size=None,
            sampler=range(first, len(self)),
            num_workers=self.schedule.workers,
            generator=torch.Generator().manual_seed(0),
        )


def named(batch: Batch) -> str:
    """The first examples of a batch, for a message."""
    if batch.positions is None:
        return ""
    shown = batch.positions[:4].tolist()
    return f". The batch holds the examples {', '.join(map(str, shown))}, … of the split"
