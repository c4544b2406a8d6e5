from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tersor.core.candidate import Candidate
from tersor.core.target import Target
from tersor.runtimes.parity import check_parity
from zoo import CNN_DATA, Cnn, context_for, exported, relative, seeded


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_answers_like_the_original(tmp_path: Path) -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA, Target("inductor", threads=1))
    loaded = exported(Candidate(module), context, tmp_path, model=Cnn)
    assert check_parity(loaded, Candidate(module), context.task.example) < 1e-4
    session = loaded()
    with torch.no_grad():
        for size in (1, 7):
            assert relative(session(CNN_DATA[:size]), module(CNN_DATA[:size])) < 1e-4
