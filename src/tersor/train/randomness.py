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
    seed = int.from_bytes(digest, "little") >> 1
    # torch.manual_seed formats a stack trace for every device that sleeps, at every call: most of a small step's time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    random.seed(seed)


@contextmanager
def callers_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the caller's random numbers go on as if nothing had happened."""
    state, numpy_state = random.getstate(), np.random.get_state()
    asked = device.type == "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if asked else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
