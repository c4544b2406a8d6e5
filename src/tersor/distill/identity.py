"""Hashes by which kept files know whom and what they belong to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from tersor.core.task import Task
from tersor.core.weights import tensors_hash
from tersor.train.parallel import join
from tersor.train.randomness import callers_kept, seed_all

SAMPLED = 64  # examples that stand for a split


def model_hash(module: nn.Module) -> str:
    """Of its printed form without addresses in memory, its parameters and its buffers."""
    printed = re.sub(r"0x[0-9a-f]+", "", repr(module))
    return hashlib.sha256(f"{printed}{tensors_hash(module.state_dict())}".encode()).hexdigest()


def identity_of(task: Task, teachers: Sequence[nn.Module], *facts: str, device: torch.device) -> str:
    """What a checkpoint knows of the training that it belongs to, beside the student: its teachers and its data.

    Of the data, the number of examples, and some of them with their labels; what they draw at random is seeded. Of
    several processes, which train on `device`, the first one's counts.
    """
    split = task.require("train", "distillation")
    positions = np.unique(np.linspace(0, len(split) - 1, min(SAMPLED, len(split))).round().astype(np.int64))
    with callers_kept(torch.device("cpu")):
        seed_all("identity")
        batch = split.batch(positions)
    labels = {} if batch.labels is None else {"labels": torch.as_tensor(batch.labels)}
    known = [*facts, str(len(split)), tensors_hash(batch.tensors() | labels), *map(model_hash, teachers)]
    first: str = join(device).gathered(hashlib.sha256(json.dumps(known).encode()).hexdigest())[0]
    return first
