"""Every option of a schedule does what its docstring says."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError, ModelError, NonFiniteError
from tersor.train import Checkpoints, Hooks, Schedule, Trained, fit, supervised
from zoo import integers, normal, seeded, state_hash

X = normal(96, 6)
Y = (X[:, 0] + X[:, 1] > 0).long()
SPLIT = Split("train", (X, Y))
IMAGES = normal(32, 3, 8, 8)
PICTURES = Split("train", (IMAGES, integers(2, 32)))


def network() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    )


def plain() -> nn.Module:
    """Without BatchNorm and dropout: a batch's gradient is the mean of its examples'."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)))


def convolutional() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(),
            nn.Linear(256, 2),
        )
    )  # fmt: skip


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return functional.cross_entropy(batch.call(module).float(), batch.labels)


def schedule(**fields: Any) -> Schedule:
    return Schedule(**{"epochs": 2, "batch_size": 16, "lr": 0.1, **fields})


def train(
    module: nn.Module, split: Split = SPLIT, *, loss: Any = cross_entropy, hooks: Hooks | None = None, **fields: Any
) -> Trained:
    return fit(module, split, loss, schedule=schedule(**fields), seed=0, hooks=hooks)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# --- data


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws from all three sources of random numbers."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(6) + torch.from_numpy(np.random.randn(6)).float() + random.gauss(0, 1)
        return X[index] + 0.1 * noise, Y[index]


def in_a_fresh_process(call: str) -> None:
    """Forking a process that has run ONNX Runtime and OpenVINO may end it, so what forks runs in one of its own."""
    tests = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r}); from train import test_schedule_options as here; here.{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr


def test_processes_that_load_data_do_not_change_a_bit() -> None:
    in_a_fresh_process("processes_change_nothing()")


def processes_change_nothing() -> None:
    def trained(workers: int, keep_drawing: bool) -> str:
        module = network()

        def before(step: int, total: int) -> None:
            if keep_drawing:
                with torch.no_grad():
                    module[0].bias.add_(0.01 * torch.randn(16))

        train(module, Split("train", Augmented()), hooks=Hooks(before), workers=workers)
        return state_hash(module)

    assert trained(0, False) == trained(2, False)
    assert trained(0, True) == trained(2, True) != trained(0, False)


class Broken(Augmented):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 7:
            raise KeyError("no such picture")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_cannot_be_loaded_is_named(workers: int) -> None:
    in_a_fresh_process(f"broken_example_is_named({workers})")


def broken_example_is_named(workers: int) -> None:
    module = plain()
    with pytest.raises(KeyError, match="no such picture") as caught:
        train(module, Split("train", Broken()), batch_size=1, workers=workers)
    told = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "of epoch 0, examples 7, … of split 'train'" in told
    assert not module.training


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="is empty"):
        Split("train", (X[:0], Y[:0]))


def test_missing_labels_are_refused_before_the_first_step() -> None:
    module = network()
    before = weights(module)
    task = Task(train=X)
    with pytest.raises(DataError, match=r"needs labels, but the 'train' split has none"):
        train(module, task.splits["train"], loss=supervised(task, schedule()))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize(("examples", "size", "steps"), [(5, 16, 1), (1, 16, 1), (3, 1, 3), (17, 16, 1), (18, 16, 2)])
def test_small_splits_and_batches(examples: int, size: int, steps: int) -> None:
    module = plain()
    trained = train(module, Split("train", (X[:examples], Y[:examples])), batch_size=size)
    assert trained.steps == 2 * steps == schedule(batch_size=size).total_steps(examples)
    assert len(trained.losses) == 2
    assert not torch.equal(weights(module), weights(plain()))


# --- accumulation


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts: int) -> None:
    whole, cut = plain(), plain()
    split = Split("train", (X[:90], Y[:90]))  # the last batch has ten examples
    expected = train(whole, split)
    sizes: list[int] = []

    def watching(module: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch))
        return cross_entropy(module, batch)

    found = train(cut, split, loss=watching, accumulate=parts)
    assert torch.allclose(weights(cut), weights(whole), atol=1e-6)
    assert found.losses == pytest.approx(expected.losses, abs=1e-6)
    assert found.steps == expected.steps == 12
    assert sum(sizes) == 180
    assert max(sizes) <= -(-16 // parts)


def test_a_short_last_batch_is_not_cut_into_single_examples() -> None:
    module = network()
    assert train(module, Split("train", (X[:19], Y[:19])), accumulate=4).steps == 4  # 16 and 3 examples


def test_more_parts_than_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="a batch of 4 has no 5 parts"):
        Schedule(batch_size=4, accumulate=5)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask[..., None].float()
        return self.linear((self.embedding(input_ids) * weight).sum(1) / weight.sum(1))


def test_texts_of_varying_length_train_in_parts_too() -> None:
    texts = [(integers(10, 2 + index % 7, seed=index) + 1, index % 2) for index in range(40)]

    def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True)
        labels = torch.tensor([label for _, label in items])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    split = Split("train", texts, collate=collate)
    whole, cut = seeded(Words), seeded(Words)
    assert train(whole, split).losses == pytest.approx(train(cut, split, accumulate=3).losses, abs=1e-6)
    assert torch.allclose(weights(whole), weights(cut), atol=1e-6)


# --- moving average


@pytest.mark.parametrize("kind", ["batchnorm", "tied"])
def test_the_moving_average_is_that_of_its_formula(kind: str) -> None:
    shared = nn.Linear(6, 6)
    module = network() if kind == "batchnorm" else seeded(lambda: nn.Sequential(shared, shared, nn.Linear(6, 2)))
    by_hand: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}

    def after_step() -> None:
        for name, value in module.state_dict().items():
            own[name] = value.clone()
            if name not in by_hand or not value.is_floating_point():
                by_hand[name] = value.clone()
            else:
                by_hand[name] = 0.8 * by_hand[name] + 0.2 * value

    train(module, hooks=Hooks(after_step=after_step), ema=0.8)
    for name, value in module.state_dict().items():
        assert torch.allclose(value, by_hand[name], atol=1e-6), name
        assert value.dtype == own[name].dtype
        if name.endswith(("weight", "running_mean")):
            assert not torch.allclose(value, own[name], atol=1e-4)
    if kind == "batchnorm":
        assert int(module.get_buffer("1.num_batches_tracked")) == 12


def test_the_averaged_weights_are_evaluated_and_training_goes_on_from_its_own() -> None:
    seen: list[Tensor] = []
    modes: list[tuple[bool, bool]] = []

    def evaluate(module: nn.Module) -> float:
        seen.append(weights(module))
        modes.append((module.training, torch.is_grad_enabled()))
        return 0.0

    def run(**fields: Any) -> tuple[list[float], Tensor, Tensor]:
        module = network()
        own: list[Tensor] = []
        hooks = Hooks(after_step=lambda: own.append(weights(module)), evaluate=evaluate)
        return train(module, hooks=hooks, **fields).losses, weights(module), own[-1]

    losses, last, own = run()
    averaged_losses, averaged, same = run(ema=0.9)
    assert averaged_losses == losses
    assert torch.equal(same, own)
    assert torch.equal(last, own)
    assert torch.equal(seen[1], own)
    assert torch.equal(seen[3], averaged)
    assert not torch.equal(averaged, own)
    assert modes == [(False, False)] * 4


# --- patience


@pytest.mark.parametrize(
    ("metrics", "patience", "epochs", "best"),
    [
        ([0.5, 0.6, 0.6, 0.6, 0.9], 2, 4, 1),  # equal is not better
        ([0.5, 0.4, 0.6, 0.5, 0.4], 2, 5, 2),
        ([0.9, 0.1, 0.1, 0.1, 0.1], 1, 2, 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 5, 4),
        ([-math.inf, 0.2, 0.1, 0.4, 0.5], 3, 5, 4),
    ],
)
def test_training_ends_when_its_patience_does(metrics: list[float], patience: int, epochs: int, best: int) -> None:
    module, states = network(), []

    def evaluate(module: nn.Module) -> float:
        states.append(state_hash(module))
        return metrics[len(states) - 1]

    trained = train(module, hooks=Hooks(evaluate=evaluate), epochs=5, patience=patience)
    assert trained.metrics == metrics[:epochs]
    assert len(trained.losses) == epochs
    assert trained.steps == 6 * epochs
    assert trained.best_epoch == best
    assert state_hash(module) == states[best]


def test_without_patience_a_metric_is_only_recorded() -> None:
    module, metrics = network(), iter([0.9, 0.1])
    trained = train(module, hooks=Hooks(evaluate=lambda module: next(metrics)))
    other = network()
    train(other)
    assert trained.metrics == [0.9, 0.1]
    assert trained.best_epoch == 1
    assert state_hash(module) == state_hash(other)


def test_patience_without_a_metric_is_refused_before_work() -> None:
    module = network()
    before = state_hash(module)
    with pytest.raises(ConfigError, match=r"patience needs a metric .*'search' split"):
        train(module, patience=1)
    assert state_hash(module) == before


def test_a_metric_that_is_not_a_number_is_told() -> None:
    values = iter([0.5, float("nan")])
    with pytest.raises(NonFiniteError, match="metric on the search split became NaN after epoch 1"):
        train(network(), hooks=Hooks(evaluate=lambda module: next(values)), patience=3)


# --- labels


def test_labels_are_smoothed_as_pytorch_does() -> None:
    task, module, batch = Task(train=(X, Y)), network(), SPLIT.batch(range(16))
    found = supervised(task, schedule(label_smoothing=0.2))(module, batch)
    assert torch.allclose(found, functional.cross_entropy(module(X[:16]), Y[:16], label_smoothing=0.2))
    assert not torch.allclose(found, supervised(task, schedule())(module, batch))


def test_a_loss_of_ones_own_is_not_smoothed_in_silence() -> None:
    task = Task(train=(X, Y), loss=functional.cross_entropy)
    module = network()
    before = weights(module)
    with pytest.raises(ConfigError, match="label_smoothing changes the default cross-entropy"):
        train(module, loss=supervised(task, schedule(label_smoothing=0.1)))
    assert torch.equal(weights(module), before)


def test_mixup_blends_inputs_and_the_loss_in_the_same_share() -> None:
    task, inputs = Task(train=(X, Y)), []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inputs.append(x)
            return x[:, :2]

    loss, shares = supervised(task, schedule(mixup=1.0)), []
    for seed in range(20):
        torch.manual_seed(seed)
        found = loss(Watching(), SPLIT.batch(range(16)))
        mixed = inputs[-1]
        torch.manual_seed(seed)
        share = float(torch.distributions.Beta(1.0, 1.0).sample())
        order = torch.randperm(16)
        shares.append(share)
        assert torch.allclose(mixed, share * X[:16] + (1 - share) * X[:16][order])
        both = functional.one_hot(Y[:16], 2) * share + functional.one_hot(Y[:16][order], 2) * (1 - share)
        assert torch.allclose(found, functional.cross_entropy(mixed[:, :2], both.float()), atol=1e-6)
    assert min(shares) < 0.2
    assert max(shares) > 0.8


def test_tokens_cannot_be_blended() -> None:
    tokens = {"input_ids": integers(11, 32, 4), "attention_mask": torch.ones(32, 4), "labels": integers(2, 32)}
    task = Task(train=tokens)
    with pytest.raises(ConfigError, match=r"mixup blends inputs, .*\['input_ids'\] are not"):
        train(seeded(Words), task.splits["train"], loss=supervised(task, schedule(mixup=0.2)))


def test_mixup_and_smoothing_train() -> None:
    task, module = Task(train=(X, Y)), network()
    options = {"mixup": 0.2, "label_smoothing": 0.1, "accumulate": 2, "epochs": 12}
    losses = train(module, loss=supervised(task, schedule(**options)), **options).losses
    assert losses[-1] < losses[0]
    assert float((module(X).argmax(1) == Y).double().mean()) > 0.8


# --- how steps are computed


def test_half_precision_trains_to_nearly_the_same_loss() -> None:
    kinds = set()

    def watching(module: nn.Module, batch: Batch) -> Tensor:
        outputs = batch.call(module)
        kinds.add(outputs.dtype)
        assert batch.labels is not None
        return functional.cross_entropy(outputs.float(), batch.labels)

    whole, module = plain(), plain()
    expected = train(whole, epochs=8).losses
    found = train(module, loss=watching, epochs=8, precision="bfloat16").losses
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert found[-1] == pytest.approx(expected[-1], rel=0.05)
    assert found != expected
    assert torch.allclose(weights(module), weights(whole), atol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "float16"}, "float16 trains on CUDA only"),
        ({"device": "abacus"}, "expected a device such as cpu or cuda, got 'abacus'"),
        ({"device": "meta"}, "nothing can be computed on meta"),
        pytest.param(
            {"device": "cuda"},
            "cuda.* is not available here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_what_the_machine_cannot_do_is_refused_before_work(fields: dict[str, Any], message: str) -> None:
    module = network()
    before = state_hash(module)
    with pytest.raises(ConfigError, match=message):
        train(module, **fields)
    assert state_hash(module) == before


def test_the_processor_may_be_named() -> None:
    named, unnamed = network(), network()
    train(named, device="cpu")
    train(unnamed)
    assert state_hash(named) == state_hash(unnamed)


@pytest.mark.parametrize("laid_out", [torch.contiguous_format, torch.channels_last])
def test_the_layout_changes_nothing_but_the_layout(laid_out: torch.memory_format) -> None:
    usual, other = convolutional(), convolutional().to(memory_format=laid_out)  # type: ignore[call-overload]
    train(usual, PICTURES)
    parameters = {name: (id(value), value.stride()) for name, value in other.named_parameters()}
    inside = []

    def watching(module: nn.Module, batch: Batch) -> Tensor:
        inside.append(batch.args[0].is_contiguous(memory_format=torch.channels_last))
        inside.append(module.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last))
        return cross_entropy(module, batch)

    train(other, PICTURES, loss=watching, channels_last=True)
    assert all(inside)
    assert torch.allclose(weights(usual), weights(other), atol=1e-4)
    assert {name: (id(value), value.stride()) for name, value in other.named_parameters()} == parameters


def test_convolutions_over_volumes_keep_their_layout() -> None:
    module = seeded(lambda: nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 2)))
    train(module, Split("train", (normal(16, 1, 4, 4, 4), integers(2, 16))), channels_last=True)
    assert module.get_parameter("0.weight").is_contiguous()


COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_schedule_options import *
torch.set_num_threads(1)
usual, module = convolutional(), convolutional()
train(usual, PICTURES)
train(module, PICTURES, compile=True, ema=0.5, hooks=Hooks(evaluate=lambda module: float(module(IMAGES).sum())))
assert module._compiled_call_impl is None
other = convolutional()
train(other, PICTURES, ema=0.5)
assert torch.allclose(weights(module), weights(other), atol=1e-3)
assert not torch.allclose(weights(module), weights(usual), atol=1e-3)
module.compile()
before = module._compiled_call_impl
train(module, PICTURES, epochs=1)
assert module._compiled_call_impl is before
print("done")
"""


@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_is_not_left_compiled(
    fresh_process: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    here = Path(__file__).parent
    assert fresh_process(f"import sys; sys.path.insert(0, {str(here.parent)!r})\n{COMPILED}", here).stdout == "done\n"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_model_trains_on_cuda_and_comes_home(precision: str, tmp_path: Path) -> None:
    module, seen = convolutional(), set()
    state = torch.cuda.get_rng_state()

    def watching(module: nn.Module, batch: Batch) -> Tensor:
        seen.add(batch.args[0].device.type)
        return cross_entropy(module, batch)

    options = {"device": "cuda", "precision": precision, "epochs": 8, "ema": 0.5, "channels_last": True}
    keep = Checkpoints(tmp_path, every_steps=3)
    losses = fit(module, PICTURES, watching, schedule=schedule(**options), seed=0, keep=keep).losses
    assert losses[-1] < losses[0]
    assert seen == {"cuda"}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert torch.equal(torch.cuda.get_rng_state(), state)


# --- learning rate


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_learning_rate_that_steps_are_made_with(decay: str) -> None:
    """Without momentum and decay of weights, a step on `w · 1` moves every weight by the rate."""
    module, places = seeded(lambda: nn.Linear(1, 1, bias=False)), []

    def constant_slope(module: nn.Module, batch: Batch) -> Tensor:
        return module.get_parameter("weight").sum()

    places.append(weights(module))
    hooks = Hooks(after_step=lambda: places.append(weights(module)))
    options = {"epochs": 4, "warmup": 0.25, "decay": decay, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.5}
    train(module, Split("train", (X[:80, :1], Y[:80])), loss=constant_slope, hooks=hooks, **options)
    rates = [float(before - after) for before, after in pairwise(places)]
    assert len(rates) == 20
    for step, rate in enumerate(rates):
        done = (step + 0.5) / 20
        rest = (done - 0.25) / 0.75
        falling = {"cosine": (1 + math.cos(math.pi * rest)) / 2, "linear": 1 - rest, "constant": 1.0}[decay]
        rising = 0.04 + 0.96 * (1 - math.cos(math.pi * done / 0.25)) / 2
        assert rate == pytest.approx(0.5 * (rising if done < 0.25 else falling), abs=1e-6)


# --- hooks, and what the caller finds afterwards


def test_what_finishes_sees_an_evaluating_model_and_the_same_random_numbers(tmp_path: Path) -> None:
    drawn: list[float] = []

    def finish(module: nn.Module) -> None:
        assert not module.training
        assert not torch.is_grad_enabled()
        drawn.append(float(torch.rand(())) + np.random.rand() + random.gauss(0, 1))
        module.train()  # as whoever estimates statistics anew does

    keep = Checkpoints(tmp_path)
    for _ in range(2):  # the second time, nothing is left to do
        module = network()
        fit(module, SPLIT, cross_entropy, schedule=schedule(), seed=0, hooks=Hooks(finish=finish), keep=keep)
        assert not any(part.training for part in module.modules())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_happens_the_caller_finds_things_as_they_were(fails: bool) -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.gauss(0, 1)

    def seed() -> None:
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)

    class Wrong(Exception):
        pass

    def after_step() -> None:
        if fails:
            raise Wrong

    seed()
    expected = draws()
    seed()
    module, companion = convolutional(), seeded(lambda: nn.Linear(2, 2))
    strides = [parameter.stride() for parameter in module.parameters()]
    hooks = Hooks(after_step=after_step, companions=(companion,))
    with torch.inference_mode():
        try:
            train(module, PICTURES, hooks=hooks, channels_last=True, compile=False)
        except Wrong:
            assert fails
    assert draws() == expected
    for part in (module, companion):
        assert not any(layer.training for layer in part.modules())
        assert all(parameter.grad is None for parameter in part.parameters())
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in part.modules())
    assert [parameter.stride() for parameter in module.parameters()] == strides
    assert not torch.equal(weights(module), weights(convolutional()))  # half trained is not untrained


def test_a_model_of_which_nothing_trains_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no parameter of the model trains; call model\.requires_grad_"):
        train(network().requires_grad_(False))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed: expected a whole number from 0 on, got -1"):
        fit(network(), SPLIT, cross_entropy, schedule=schedule(), seed=-1)


def test_a_loss_per_example_is_refused_at_the_first_batch() -> None:
    def each(module: nn.Module, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return functional.cross_entropy(batch.call(module), batch.labels, reduction="none")

    module = network()
    before = weights(module)
    with pytest.raises(ConfigError, match=r"must be one number, a mean over the batch, got shape \[16\]"):
        train(module, loss=each)
    assert torch.equal(weights(module), before)


def test_weights_that_the_last_step_ruins_are_told() -> None:
    """The loss is finite, its gradient is not."""

    def steep(module: nn.Module, batch: Batch) -> Tensor:
        return (0 * batch.call(module)).sum().sqrt()

    with pytest.raises(NonFiniteError, match=r"'0.weight' became NaN or Inf within 1 steps"):
        train(plain(), loss=steep, epochs=1, batch_size=96)


@pytest.mark.parametrize(("most", "steps", "epochs"), [(4, 4, 1), (8, 8, 2), (12, 12, 2), (99, 12, 2)])
def test_training_ends_within_an_epoch_where_it_is_told_to(most: int, steps: int, epochs: int) -> None:
    told: list[int] = []
    hooks = Hooks(evaluate=lambda _: 1.0, progress=lambda done, total, _: told.append(total))
    done = train(network(), hooks=hooks, max_steps=most)
    assert (done.steps, len(done.losses), len(done.metrics)) == (steps, epochs, epochs)
    assert set(told) == {steps}


def test_the_rate_has_fallen_where_a_training_ends_early() -> None:
    short = schedule(max_steps=5)
    assert short.total_steps(len(SPLIT)) == 5
    assert short.learning_rate(4, 5) < 0.2 * short.lr


def test_progress_is_told_once_more_after_an_evaluation() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    metrics = iter([0.25, 0.75])
    hooks = Hooks(
        evaluate=lambda module: next(metrics), progress=lambda done, total, facts: told.append((done, dict(facts)))
    )
    losses = train(network(), hooks=hooks).losses
    assert [done for done, _ in told] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    assert [facts.get("metric") for _, facts in told] == [None] * 6 + [0.25] * 7 + [0.75]
    assert told[6][1]["loss"] == losses[0]
    assert told[13][1]["loss"] == losses[1]
    assert all(facts["examples/s"] > 0 for _, facts in told)
