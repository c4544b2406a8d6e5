"""A training that is killed, wherever, ends with the bits of one that was not; checkpoints that cannot be trusted are
refused."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.errors import ConfigError, IntegrityError, NonFiniteError, OutputDirectoryError
from tersor.train import Checkpoints, Hooks, Schedule, Trained, fit, weights_of
from zoo import normal, seeded, state_hash

X = normal(48, 6)
Y = (X[:, 0] + X[:, 1] > 0).long()
SPLIT = Split("train", (X, Y))

# One process imports everything once and forks a child for every attempt: a child costs milliseconds.
KILLS = r'''
import hashlib, json, os, random, signal, sys, tempfile, time
from pathlib import Path
import numpy as np, torch, torch._dynamo  # which the first optimizer step imports
from torch import nn
from torch.nn import functional
from tersor.core.split import Split
from tersor.core.task import Task
from tersor.train import Checkpoints, Hooks, Schedule, fit, hard_loss, blended
from tersor.core import files

torch.set_num_threads(1)
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Augmented(torch.utils.data.Dataset):
    """Draws from all three sources of random numbers."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        noise = torch.randn(6) + torch.tensor(np.random.randn(6), dtype=torch.float32) + random.gauss(0, 1)
        return X[index] + 0.1 * noise, Y[index]


class Counter:
    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def attempt(fields, directory, every, bomb):
    """One child's training; `bomb` is called at every place where it may be killed."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    projector, counter = nn.Linear(2, 3), Counter()
    task = Task(train=Augmented())
    schedule = Schedule(
        epochs=4, batch_size=16, ema=0.9, mixup=0.4, label_smoothing=0.1, accumulate=3, patience=4, clip_norm=1.0,
        **fields,
    )

    def loss(module, batch):
        bomb("loss")
        blend = blended(batch, schedule)
        outputs = blend.batch.call(module)
        return hard_loss(outputs, blend, task, schedule) + 0.1 * projector(outputs).square().mean()

    def after_step():
        counter.count += 1
        bomb("after step")

    def evaluate(module):
        bomb("evaluate")
        return -float(functional.cross_entropy(module(X), Y)) + 0.01 * float(torch.rand(()))

    replace, fsync = Path.replace, os.fsync

    def replacing(self, target):
        bomb("before replace")
        result = replace(self, target)
        bomb("after replace")
        return result

    def syncing(descriptor):
        bomb("sync")
        return fsync(descriptor)

    Path.replace, os.fsync = replacing, syncing
    torch.randn(int(time.time()) % 7), np.random.rand(os.getpid() % 5), random.seed()  # never the same before
    keep = Checkpoints(directory, every_steps=every)
    trained = fit(
        net, task.splits["train"], loss, schedule=schedule, seed=3, keep=keep,
        hooks=Hooks(
            lambda step, total: bomb("before step"), after_step, evaluate,
            companions=(projector,), stateful={"counter": counter},
        ),
    )
    digest = hashlib.sha256(json.dumps([trained.losses, trained.metrics, trained.steps, trained.best_epoch]).encode())
    for part in (net, projector):
        for value in part.state_dict().values():
            digest.update(value.numpy().tobytes())
    return f"{digest.hexdigest()} {counter.count}"


def child(fields, directory, every, place=None, count=0, after=None):
    """What the child said, or None if it was killed."""
    left = [count]

    def bomb(here):
        if here == place:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    told = directory.parent / "told"
    told.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            told.write_text(attempt(fields, directory, every, bomb))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    if after is not None:
        time.sleep(after)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0
    return told.read_text()


PLACES = ["before step", "loss", "after step", "evaluate", "before replace", "after replace", "sync", "outside"]
results, kills, scratch, tries = [], {}, 0, 0
draw = random.Random(0)
root = Path(tempfile.mkdtemp(dir=sys.argv[1]))
for fields in ({"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adamw", "lr": 0.01}):
    expected = child(fields, root / fields["optimizer"] / "whole", 100)
    for every, wanted in ((1, 7), (3, 4)):
        done = number = 0
        while done < wanted:
            number += 1
            directory = root / fields["optimizer"] / f"{every} {number}" / "run"
            directory.parent.mkdir()
            found = None
            while found is None:
                place = PLACES[tries % len(PLACES)]
                tries += 1
                if place == "outside":
                    found = child(fields, directory, every, after=draw.uniform(0.01, 0.3))
                else:
                    found = child(fields, directory, every, place, draw.randint(1, 5))
                if found is None:
                    done += 1
                    kills[place] = kills.get(place, 0) + 1
                    scratch += len(list(directory.glob(".training.pt.*")))
                if done >= wanted and found is None:
                    found = child(fields, directory, every)
            left = sorted(path.name for path in directory.iterdir())
            results.append([expected, found, left])
print(json.dumps({"results": results, "kills": kills, "scratch": scratch}))
'''


def test_a_training_that_is_killed_anywhere_ends_with_the_same_bits(
    fresh_process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    found = json.loads(fresh_process(KILLS, tmp_path).stdout.splitlines()[-1])
    assert sum(found["kills"].values()) >= 22
    assert set(found["kills"]) >= {"before step", "loss", "after step", "before replace", "after replace", "sync"}
    assert found["scratch"] > 0  # some were killed while they wrote
    for expected, resumed, left in found["results"]:
        assert resumed == expected
        assert expected.endswith(" 16")  # four epochs of four steps
        assert left == ["training.pt"]
    assert len({expected for expected, _, _ in found["results"]}) == 2


# --- in this process: an exception takes the place of the kill


class Interrupted(Exception):
    pass


def network() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    )


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return functional.cross_entropy(batch.call(module), batch.labels)


def schedule(**fields: Any) -> Schedule:
    return Schedule(**{"epochs": 2, "batch_size": 16, "lr": 0.1, **fields})


def train(
    keep: Checkpoints, *, stop: int | None = None, module: nn.Module | None = None, seed: int = 0, **fields: Any
) -> tuple[str, Trained]:
    """Trains, and stops after `stop` steps of this call."""
    module, done = module or network(), 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == stop:
            raise Interrupted

    trained = fit(
        module, SPLIT, cross_entropy, schedule=schedule(**fields), seed=seed, hooks=Hooks(after_step=after_step),
        keep=keep,
    )  # fmt: skip
    return state_hash(module), trained


def half(directory: Path, **fields: Any) -> Checkpoints:
    """A checkpoint after two of six steps."""
    keep = Checkpoints(directory, every_steps=1)
    with pytest.raises(Interrupted):
        train(keep, stop=3, **fields)
    return keep


@pytest.fixture
def halfway(tmp_path: Path) -> Checkpoints:
    return half(tmp_path / "run")


def test_a_finished_training_is_not_repeated(halfway: Checkpoints) -> None:
    first, trained = train(halfway)
    assert trained.steps == 6
    again, repeated = train(halfway, stop=1)  # not even one step
    assert again == first
    assert repeated.losses == trained.losses
    assert np.isnan(repeated.examples_per_second)


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.999])
def test_a_truncated_checkpoint_is_refused(halfway: Checkpoints, share: float) -> None:
    content = halfway.path.read_bytes()
    halfway.path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(IntegrityError, match=r"training\.pt is damaged .*remove it to train from the start"):
        train(halfway)
    with pytest.raises(IntegrityError, match="is damaged"):
        weights_of(halfway.directory)


def test_no_changed_bit_goes_unnoticed(halfway: Checkpoints) -> None:
    content = halfway.path.read_bytes()
    for position in np.random.default_rng(0).integers(len(content), size=60):
        changed = bytearray(content)
        changed[position] ^= 1
        halfway.path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="is damaged"):
            train(halfway)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_no_code_in_a_checkpoint_is_executed(halfway: Checkpoints, tmp_path: Path, container: str) -> None:
    state = torch.load(halfway.path, weights_only=True) | {"done": Malicious(tmp_path / "executed")}
    buffer = io.BytesIO()
    if container == "zip":
        torch.save(state, buffer)
    else:
        pickle.dump(Malicious(tmp_path / "executed"), buffer, protocol=2)
    halfway.path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(IntegrityError, match="is damaged"):
        train(halfway)
    assert not (tmp_path / "executed").exists()
    if container == "zip":
        torch.load(halfway.path, weights_only=False)
        assert (tmp_path / "executed").exists()  # so there was something to refuse


def test_the_checkpoint_of_another_training_is_refused(halfway: Checkpoints) -> None:
    before = halfway.path.read_bytes()
    other = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)), seed=1)
    for change in (
        {"seed": 1}, {"lr": 0.2}, {"epochs": 3}, {"ema": 0.9}, {"module": other}, {"batch_size": 8},
    ):  # fmt: skip
        with pytest.raises(OutputDirectoryError, match=r"belongs to another training .*choose another directory"):
            train(halfway, **change)
    with pytest.raises(OutputDirectoryError, match="belongs to another training"):
        train(Checkpoints(halfway.directory, identity="other data"))
    assert halfway.path.read_bytes() == before


def test_where_a_training_runs_is_no_part_of_what_it_is(halfway: Checkpoints, tmp_path: Path) -> None:
    expected, _ = train(Checkpoints(tmp_path / "other"))
    assert train(halfway, device="cpu")[0] == expected


def test_files_of_others_and_scratch_files_do_no_harm(halfway: Checkpoints, tmp_path: Path) -> None:
    expected, _ = train(Checkpoints(tmp_path / "other"))
    (halfway.directory / "notes.txt").write_text("mine")
    (halfway.directory / ".training.pt.x7f3").write_bytes(halfway.path.read_bytes()[:100])
    assert train(halfway)[0] == expected
    assert sorted(path.name for path in halfway.directory.iterdir()) == ["notes.txt", "training.pt"]


def test_a_full_disk_ends_the_training_and_keeps_the_checkpoint_before(
    small_disk: Callable[..., Path], tmp_path: Path
) -> None:
    expected, _ = train(Checkpoints(tmp_path / "other"))
    place = small_disk(64)
    keep = half(place / "run")
    before = keep.path.read_bytes()
    (place / "filler").write_bytes(b"x" * (60_000 - len(before)))
    module = network()
    with pytest.raises(OutputDirectoryError, match="No space left"):
        train(keep, module=module)
    assert not module.training
    assert keep.path.read_bytes() == before
    assert [path.name for path in keep.directory.iterdir()] == ["training.pt"]
    (place / "filler").unlink()
    assert train(keep)[0] == expected


def test_a_read_only_place_is_told(small_disk: Callable[..., Path]) -> None:
    place = small_disk(64)
    small_disk(64, "ro")
    with pytest.raises(OutputDirectoryError, match="Read-only"):
        train(Checkpoints(place / "run", every_steps=1))


def test_how_often_checkpoints_are_written(tmp_path: Path) -> None:
    def written(name: str, **settings: Any) -> list[int]:
        keep, seen, last = Checkpoints(tmp_path / name, **settings), [], None

        def look(step: int, total: int) -> None:
            nonlocal last
            content = keep.path.read_bytes() if keep.path.exists() else None
            if content != last:
                seen.append(step)
                last = content

        fit(network(), SPLIT, cross_entropy, schedule=schedule(), seed=0, hooks=Hooks(look), keep=keep)
        return [*seen, *([6] if keep.path.read_bytes() != last else [])]

    assert written("each", every_steps=1) == [1, 2, 3, 4, 5, 6]
    assert written("some", every_steps=4) == [4, 6]
    assert written("always", every_seconds=0.0) == [1, 2, 3, 4, 5, 6]
    assert written("seldom") == [6]


@pytest.mark.parametrize("settings", [{"every_steps": 0}, {"every_steps": -1}, {"every_seconds": float("nan")}])
def test_impossible_intervals_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected every_steps from 1 on"):
        Checkpoints(tmp_path, **settings)


class Kept:
    """A stateful thing with whatever state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["value"]


@pytest.mark.parametrize("value", [np.float64(0.5), {1, 2}, [Path("x")], {"a": np.arange(3)}])
def test_what_could_not_be_read_again_is_refused_when_it_is_written(value: Any, tmp_path: Path) -> None:
    keep = Checkpoints(tmp_path / "run", every_steps=1)
    with pytest.raises(ConfigError, match=r"'thing'.*'value'.* holds tensors, numbers, strings, lists and dicts only"):
        fit(
            network(), SPLIT, cross_entropy, schedule=schedule(), seed=0, hooks=Hooks(stateful={"thing": Kept(value)}),
            keep=keep,
        )  # fmt: skip


def test_what_is_kept_beside_the_weights_comes_back(tmp_path: Path) -> None:
    value = {"masks": [torch.arange(3)], "share": 0.5, "name": "x", "none": None, "deep": ({"on": True},)}
    keep = half(tmp_path / "plain")
    with pytest.raises(OutputDirectoryError, match="another training"):  # it has no such state
        fit(
            network(), SPLIT, cross_entropy, schedule=schedule(), seed=0, hooks=Hooks(stateful={"thing": Kept(0)}),
            keep=keep,
        )  # fmt: skip

    def run(thing: Kept, stop: int | None) -> None:
        def before(step: int, total: int) -> None:
            if step == stop:
                raise Interrupted

        hooks = Hooks(before, stateful={"thing": thing})
        keep = Checkpoints(tmp_path / "with", every_steps=1)
        fit(network(), SPLIT, cross_entropy, schedule=schedule(), seed=0, hooks=hooks, keep=keep)

    with pytest.raises(Interrupted):
        run(Kept(value), stop=2)
    restored = Kept("not yet")
    run(restored, stop=None)
    assert restored.state["masks"][0].tolist() == [0, 1, 2]
    assert {key: item for key, item in restored.state.items() if key != "masks"} == {
        key: item for key, item in value.items() if key != "masks"
    }


def test_another_training_can_start_from_the_weights_of_one_that_diverged(tmp_path: Path) -> None:
    kept: list[dict[str, Tensor]] = []

    def failing(module: nn.Module, batch: Batch) -> Tensor:
        if len(kept) == 4:  # in the middle of the second epoch
            return cross_entropy(module, batch) * float("nan")
        kept.append({name: value.clone() for name, value in module.state_dict().items()})
        return cross_entropy(module, batch)

    keep = Checkpoints(tmp_path / "run", every_steps=1)
    with pytest.raises(NonFiniteError, match=r"became nan in epoch 1, step 1 .*lower lr .* the examples \d+, \d+"):
        fit(network(), SPLIT, failing, schedule=schedule(), seed=0, keep=keep)
    weights = weights_of(keep.directory)
    other = network()
    other.load_state_dict(weights)
    assert all(torch.isfinite(value).all() for value in other.state_dict().values())
    assert not torch.equal(weights["0.weight"], kept[3]["0.weight"])  # a step further than the last forward pass
    assert fit(other, SPLIT, cross_entropy, schedule=schedule(lr=0.01), seed=0).steps == 6
    with pytest.raises(IntegrityError, match="has no checkpoint"):
        weights_of(tmp_path)


def test_companions_train_and_come_back(tmp_path: Path) -> None:
    def run(stop: int | None, keep: Checkpoints | None) -> str:
        module, projector = network(), seeded(lambda: nn.Linear(2, 4), seed=2)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            assert projector.training
            return cross_entropy(module, batch) + (projector(batch.call(module)) - 1).square().mean()

        def before(step: int, total: int) -> None:
            if step == stop:
                raise Interrupted

        before_it = state_hash(projector)
        fit(
            module, SPLIT, loss, schedule=schedule(optimizer="adamw", lr=0.01), seed=0,
            hooks=Hooks(before, companions=(projector,)), keep=keep,
        )  # fmt: skip
        assert state_hash(projector) != before_it
        assert not projector.training
        assert all(parameter.grad is None for parameter in projector.parameters())
        return state_hash(module) + state_hash(projector)

    keep = Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(Interrupted):
        run(4, keep)
    assert run(None, keep) == run(None, None)


def test_patience_and_the_best_weights_outlive_an_interruption(tmp_path: Path) -> None:
    metrics = [0.1, 0.7, 0.5, 0.6, 0.9]

    def run(stop: int | None, keep: Checkpoints | None) -> tuple[str, Trained]:
        module, asked = network(), []

        def before(step: int, total: int) -> None:
            asked.append(step)
            if step == stop:
                raise Interrupted

        hooks = Hooks(before, evaluate=lambda module: metrics[(asked[-1] + 1) // 3 - 1])
        trained = fit(
            module, SPLIT, cross_entropy, schedule=schedule(epochs=5, patience=2), seed=0, hooks=hooks, keep=keep
        )
        return state_hash(module), trained

    keep = Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(Interrupted):
        run(10, keep)
    resumed, trained = run(None, keep)
    assert trained.metrics == metrics[:4]
    assert trained.best_epoch == 1
    assert resumed == run(None, None)[0]
    ended, again = run(0, keep)  # out of patience: no step is done any more
    assert ended == resumed
    assert again.best_epoch == 1
