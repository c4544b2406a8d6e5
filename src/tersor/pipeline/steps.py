"""Runs the steps of a recipe, and goes on where an interrupted run stopped."""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace

from tersor.core.candidate import Candidate
from tersor.core.context import Context, Progress
from tersor.distill import distances
from tersor.pipeline.plan import Plan
from tersor.pipeline.run_directory import RunDirectory

logger = logging.getLogger("tersor")


def run_recipe(plan: Plan, run: RunDirectory, progress: Progress) -> Candidate:
    """Applies the steps, taking finished ones from the run directory."""
    context = Context(plan.task, plan.target, plan.original, plan.seed, progress, losses=distances())
    for position, step in enumerate(plan.recipe.steps, start=1):
        step.check(replace(context, directory=run.work(position)))
    candidate = replace(plan.start, module=copy.deepcopy(plan.original))
    for position, step in enumerate(plan.recipe.steps, start=1):
        finished = run.load_stage(position, candidate)
        if finished is not None:
            candidate = step.resume(finished, context)
            continue
        logger.info("step %d of %d: %s", position, len(plan.recipe.steps), step.name)
        candidate = step.apply(candidate, replace(context, directory=run.work(position)))
        if candidate.plan is None or step.rebuilds:  # other quantization is quick, so simply done again
            run.save_stage(position, candidate)
        shutil.rmtree(run.work(position), ignore_errors=True)
    shutil.rmtree(run.unfinished, ignore_errors=True)
    return candidate
