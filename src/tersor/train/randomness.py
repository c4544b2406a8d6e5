"""Random numbers that depend on the step alone, so that a resumed training draws what an uninterrupted one draws."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(*key: int | str) -> None:
    """Seeds PyTorch, NumPy and Python with a hash of `key`, such as `(seed, "model", step, rank)`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    random.seed(digest)


@contextmanager
def callers_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the caller's random numbers go on as if nothing had happened."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
