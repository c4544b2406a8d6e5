"""Draws choices by Optuna's tree of Parzen estimators, near the front or anywhere.

Bergstra et al. 2011, https://papers.nips.cc/paper/4443; for two objectives Ozaki et al. 2022,
https://doi.org/10.1613/jair.1.13188.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import create_trial

from tersor.core.search import Choice, TrialRecord
from tersor.search.database import quiet
from tersor.search.space import Space
from tersor.search.store import FORMAT, distributions

FREE = 0.2  # share of the groups that are drawn anew near the front
ATTEMPTS = 50
STARTUP = 8  # trials before the estimators are trusted


class Sampler:
    """Draws choices in one number format.

    Args:
        space: What choices are made of.
        format: Number format of the choices.
        seed: Of the draws.
    """

    def __init__(self, space: Space, format: str, *, seed: int) -> None:
        self.space, self.format = space, format
        self.random = np.random.default_rng(seed)
        self.sampler = TPESampler(seed=seed, n_startup_trials=STARTUP)

    def ask(
        self, finished: Sequence[TrialRecord], *, near: Sequence[TrialRecord] = (), without: Collection[Choice] = ()
    ) -> Choice | None:
        """A choice that is not among `without`; None if none is found.

        Args:
            finished: What the sampler learns from.
            near: Trials of which one is taken and changed in a fifth of its groups; none: everything is drawn.
            without: Choices that may not come out again.
        """
        tried = {choice.key for choice in without}
        known = distributions(self.space)
        with quiet():
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=self.sampler)
            for record in finished:
                if record.drop is not None and record.latency_ms is not None:
                    params = {**self.space.options(record.choice), FORMAT: record.choice.format}
                    values = [record.drop, record.latency_ms]
                    study.add_trial(create_trial(params=params, distributions=known, values=values))
            for _ in range(ATTEMPTS):
                study.enqueue_trial(self._fixed(near))
                drawn = study.ask(known)
                options = {group.name: int(drawn.params[group.name]) for group in self.space.groups}
                choice = self.space.choice(options, self.format)
                if choice.key not in tried:
                    return choice
        return None

    def _fixed(self, near: Sequence[TrialRecord]) -> dict[str, object]:
        """What is not drawn: the format, and most groups of a trial nearby."""
        fixed: dict[str, object] = {FORMAT: self.format}
        if near:
            start = self.space.options(near[int(self.random.integers(len(near)))].choice)
            count = max(1, round(FREE * len(start)))
            free = {list(start)[index] for index in self.random.permutation(len(start))[:count]}
            fixed |= {name: kept for name, kept in start.items() if name not in free}
        return fixed
