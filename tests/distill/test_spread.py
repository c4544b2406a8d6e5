from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.distill.spread import held_bytes, spread
from tersor.errors import ConfigError
from zoo import normal, seeded

SCRIPT = Path(__file__).with_name("teachers_together.py")
Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What each of two processes found: see the script."""
    directory = tmp_path_factory.mktemp("teachers")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(  # noqa: S603
        [*line, str(directory)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    "case",
    [
        "mlp sharded",
        "mlp tensor",
        "mlp pipeline",
        "encoder sharded",
        "encoder tensor",
        "encoder tensor planned",
        "bert sharded",
        "bert tensor",
        "bert tensor planned",
    ],
)
def test_a_spread_teacher_answers_like_the_whole_one_and_each_process_holds_half(answers: Answers, case: str) -> None:
    for found in answers:
        assert found[case]["apart"] < 1e-5
        assert 0.45 < found[case]["share"] < 0.55
        assert found[case]["untouched"]
        assert found[case]["evaluating"]


@pytest.mark.parametrize("case", ["students", "sharded students"])
def test_students_of_a_spread_teacher_are_those_of_the_whole_one(answers: Answers, case: str) -> None:
    assert all(found[case]["apart"] < 1e-5 for found in answers)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("pipeline of no sequence", "expected an nn.Sequential of at least 2 layers"),
        ("pattern that fits nothing", "'nowhere.*': 'colwise', which fits 0 layers"),
        ("odd features", "'classes' has 5 features, which 2 processes cannot share"),
        ("nothing to split", "no linear layer or embedding of Sequential can be split over 2 processes"),
    ],
)
def test_what_cannot_be_spread_is_refused_everywhere(answers: Answers, case: str, said: str) -> None:
    assert all(said in found[case] for found in answers)


@pytest.mark.parametrize("how", ["sharded", "tensor", "pipeline"])
def test_in_one_process_it_is_a_copy(how: Any) -> None:
    teacher = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))).train()
    copied = spread(teacher, how)
    assert copied is not teacher
    assert teacher.training
    assert not any(part.training for part in copied.modules())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert torch.equal(copied(normal(3, 4)), teacher.eval()(normal(3, 4)))
    assert held_bytes(copied) == 4 * (4 * 8 + 8 + 8 * 2 + 2)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"how: expected one of \['sharded', 'tensor', 'pipeline'\], got 'data'"):
        spread(nn.Linear(2, 2), "data")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="plan: belongs to how='tensor', not to 'pipeline'"):
        spread(nn.Linear(2, 2), "pipeline", plan={"*": "colwise"})
