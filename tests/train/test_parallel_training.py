from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import together  # the script that the processes run
import torch
from torch import Tensor

from tersor.errors import ConfigError
from tersor.train.parallel import World, join, refuse_several

HERE = Path(__file__).parent
Facts = dict[str, dict[str, Any]]
SAME = ["plain", "plain_accumulated", "twice", "companions", "masked", "uneven", "recover"]
SAME_SHARDED = ["plain", "twice_accumulated", "companions", "masked", "clipped_adamw"]
RANDOM = ["averaged", "gradual"]  # of dropout or BatchNorm, so not comparable with one process


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def torchrun(directory: Path, jobs: list[str], *options: str) -> tuple[Facts, Facts, str]:
    """Both processes' facts, and what they wrote on stderr."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    line += [str(HERE / "together.py"), str(directory), *jobs]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=300)  # noqa: S603
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(directory / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second, done.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, Facts, str]:
    """One launch of two processes that trains everything."""
    jobs = ["own", *SAME, *RANDOM, "averaged#2", *(f"sharded:{name}" for name in SAME_SHARDED)]
    jobs += ["sharded:averaged", "sharded:averaged#2", "sharded:held", "held", "nan", "disagreeing", "refused"]
    return torchrun(tmp_path_factory.mktemp("together"), [*jobs, "plain#2", "kept:0", "kept_sharded:0"])


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], atol=2e-6, rtol=1e-5) for name in first)


def test_the_weights_are_the_same_in_all_processes(done: tuple[Facts, Facts, str]) -> None:
    first, second, _ = done
    trained = [job for job, facts in first.items() if "weights" in facts]
    assert len(trained) >= 18
    for job in trained:
        assert equal(first[job]["weights"], second[job]["weights"]), job
        assert first[job].get("losses") == second[job].get("losses"), job
    assert equal(first["gradual"]["masks"], second["gradual"]["masks"])


@pytest.mark.parametrize("job", [*SAME, *(f"sharded:{name}" for name in SAME_SHARDED)])
def test_several_processes_do_what_one_does(done: tuple[Facts, Facts, str], job: str) -> None:
    alone, found = together.JOBS[job.rpartition(":")[2]](), done[0][job]
    assert close(found["weights"], alone["weights"])
    if job == "recover":
        assert found["after"] < 0.9 * found["before"]
        return
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    assert found["steps"] == alone["steps"]
    assert found["clean"]
    if "companions" in job:
        assert close(found["projector"], alone["projector"])
    if "masked" in job:
        assert found["holds"]
        assert found["same"]


def test_shared_weights_train_like_replicated_ones_also_with_dropout_averages_and_metrics(
    done: tuple[Facts, Facts, str],
) -> None:
    first, _, _ = done
    # A bias before BatchNorm has no gradient but rounding errors, and AdamW makes whole steps of them.
    data, sharded = (
        {name: value for name, value in first[job]["weights"].items() if name not in ("stem.bias", "norm.running_mean")}
        for job in ("averaged", "sharded:averaged")
    )
    assert close(data, sharded)
    assert first["averaged"]["metrics"] == pytest.approx(first["sharded:averaged"]["metrics"])
    assert first["averaged"]["losses"] == pytest.approx(first["sharded:averaged"]["losses"], abs=1e-5)


@pytest.mark.parametrize("job", ["plain", "averaged", "sharded:averaged"])
def test_two_trainings_give_the_same_bits(done: tuple[Facts, Facts, str], job: str) -> None:
    assert equal(done[0][job]["weights"], done[0][f"{job}#2"]["weights"])


def test_each_process_holds_its_part_of_shared_weights(done: tuple[Facts, Facts, str]) -> None:
    shares = [facts["sharded:held"]["share"] for facts in done[:2]]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.6
    assert done[0]["held"]["share"] == 1


def test_the_first_process_alone_tells_progress(done: tuple[Facts, Facts, str]) -> None:
    first, second, _ = done
    assert first["averaged"]["told"] == 10  # 8 steps, 2 epochs
    assert second["averaged"]["told"] == 0


def test_a_loss_that_is_no_number_in_one_process_stops_all(done: tuple[Facts, Facts, str]) -> None:
    for facts in done[:2]:
        assert len(facts["nan"]["errors"]) == 2
        assert all("the training loss became nan in epoch 0, step 0" in error for error in facts["nan"]["errors"])


def test_processes_that_mean_different_things_are_told_and_weights_come_from_the_first(
    done: tuple[Facts, Facts, str],
) -> None:
    for facts in done[:2]:
        schedule, model = facts["disagreeing"]["errors"]
        assert "the schedule differs: process 0 of 2 has …" in schedule
        assert "'lr': 0.1" in schedule
        assert "'lr': 1.1" in schedule
        assert "the model differs" in model
        assert "module.norm.weight" in model
    assert torch.equal(done[0]["disagreeing"]["stem"], done[1]["disagreeing"]["stem"])


def test_what_shared_weights_cannot_do_is_refused(done: tuple[Facts, Facts, str]) -> None:
    for facts in done[:2]:
        compiled, layout, frozen, scalar = facts["refused"]["errors"]
        assert "sharded does not go together with ['compile']" in compiled
        assert "['channels_last']" in layout
        assert "a hook changed requires_grad of a parameter of shape (2, 7)" in frozen
        assert "['module.scale']" in scalar
        assert facts["refused"]["clean"]
        assert facts["refused"]["start"]  # the weights of before


def test_the_callers_own_group_stays_and_ours_ends_quietly(done: tuple[Facts, Facts, str]) -> None:
    first, second, errors = done
    assert first["own"]["still"]
    assert second["own"]["still"]
    assert equal(first["own"]["weights"], first["plain"]["weights"])
    assert "Warning" not in errors
    assert "Error" not in errors


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_end_is_the_same(
    done: tuple[Facts, Facts, str], tmp_path: Path
) -> None:
    """Each job's last process is killed at step 5; `torchrun` starts all again, and they go on from step 3."""
    first, second, errors = torchrun(tmp_path, ["kept:5", "kept_sharded:5"], "--max-restarts=2")
    assert errors.count("exitcode: -9") == 2
    for job in ("kept", "kept_sharded"):
        assert first[f"{job}:5"]["done"] <= 5  # steps since the restart; after the second one, none are left
        for resumed, whole in ((first, done[0]), (second, done[1])):
            assert whole[f"{job}:0"]["done"] == 8
            assert equal(resumed[f"{job}:5"]["weights"], whole[f"{job}:0"]["weights"])
            assert resumed[f"{job}:5"]["losses"] == whole[f"{job}:0"]["losses"]
            assert resumed[f"{job}:5"]["counter"] == whole[f"{job}:0"]["counter"]
    assert second["kept:5"]["counter"] == first["kept:5"]["counter"] + 100  # each process has its own


@pytest.mark.parametrize("how", ["kept_still", pytest.param("kept_still_sharded", marks=pytest.mark.slow)])
def test_a_killed_process_is_noticed_and_one_can_go_on_alone(tmp_path: Path, how: str) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        line = [sys.executable, str(HERE / "together.py"), str(tmp_path), f"{how}:5"]
        started.append(
            subprocess.Popen(line, env=environment() | meeting, stderr=subprocess.PIPE, text=True)  # noqa: S603
        )
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, -9]
    assert "tersor.errors.DistributedError: process 0 of 2 lost touch with the others" in errors[0]
    assert [path.name for path in (tmp_path / how).iterdir()] == ["training.pt"]
    resumed = together.kept(tmp_path / how, still=True)
    alone = together.kept(tmp_path / "alone", still=True)
    assert resumed["done"] == 5  # of 8, three were in the checkpoint
    assert close(resumed["weights"], alone["weights"])
    assert resumed["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def test_a_batch_is_shared_in_equal_parts() -> None:
    import numpy as np

    parts = [World(rank, 3).share(np.arange(11)).tolist() for rank in range(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(ConfigError, match="a batch of 2 examples cannot be shared by 3 processes; raise batch_size"):
        World(0, 3).share(np.arange(2))


def test_what_one_process_does_is_refused_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_several("compress")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="compress is the work of one process, but 4 were started; train with"):
        refuse_several("compress")


def test_one_process_needs_no_others_and_shared_weights_mean_nothing_to_it() -> None:
    world = join(torch.device("cpu"))
    assert (world.rank, world.size, world.leads) == (0, 1, True)
    assert world.mean([1.5]) == [1.5]
    assert world.gathered("a") == ["a"]
    assert equal(together.train()["weights"], together.train(parallel="sharded")["weights"])
