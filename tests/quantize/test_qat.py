from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

import tersor
from tersor.core.batch import select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context, Distance
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.distill import distances
from tersor.errors import ConfigError, DataError, IntegrityError, OrderError, UnsupportedError
from tersor.pipeline.plan import make_plan
from tersor.pipeline.run_directory import RunDirectory
from tersor.pipeline.steps import run_recipe
from tersor.prune import Unstructured
from tersor.quantize import Qat, Static
from tersor.quantize.learned import LearnedStep
from tersor.quantize.student import Student
from tersor.recipes import dump_recipe, parse_recipe
from tersor.train import Schedule, fit
from tersor.train.checkpoint import Keeper
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    Cnn,
    Depthwise,
    Mlp,
    Scaling,
    Sized,
    Transformer,
    context_for,
    exported,
    integers,
    normal,
    relative,
    seeded,
    state_hash,
)

SHORT = Schedule(epochs=2, batch_size=16, lr=0.02)
LABELS = integers(5, 48)
LOSSES: Mapping[str, Distance] = distances()
METHODS = ["lsq", "lsq+", "pact", "ste"]
STEP = import_module("tersor.quantize.qat")  # the package has a function of that name


def context(module: nn.Module, data: Any, target: Target | None = None, **fields: Any) -> Context:
    """The same examples to calibrate and to train on."""
    found = context_for(module, None, target, train=data, **fields)
    return replace(found, losses=LOSSES)


def cnn(**fields: Any) -> tuple[nn.Module, Context]:
    module = seeded(Cnn)
    return module, context(module, (CNN_DATA, LABELS), **fields)


def trained_graph(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where `apply` leaves a copy of the graph that it trained, BatchNorm and learned steps in it."""
    kept: list[Any] = []
    plain = Student.trained

    def watched(student: Student, module: nn.Module) -> Any:
        kept.append(copy.deepcopy(student.graph))
        return plain(student, module)

    monkeypatch.setattr(Student, "trained", watched)
    return kept


def answers(candidate: Candidate, values: Any) -> Tensor:
    assert candidate.simulation is not None
    with torch.no_grad():
        found: Tensor = candidate.simulation(*(values if isinstance(values, tuple) else (values,)))
        return found


# --- what comes out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 3])
def test_what_is_deployed_is_what_was_trained(
    method: str, bits: int, monkeypatch: pytest.MonkeyPatch, noticed: Callable[[nn.Module], str]
) -> None:
    module, seen = cnn()
    kept, before, teacher = trained_graph(monkeypatch), noticed(module), noticed(seen.original)
    settings = {"quantizer": method, "weight_bits": bits, "activation_bits": bits}
    candidate = Candidate(module)
    done = Qat(schedule=SHORT, **settings).apply(candidate, seen)  # type: ignore[arg-type]
    assert (noticed(module), noticed(seen.original)) == (before, teacher)
    assert (candidate.plan, candidate.simulation) == (None, None)
    with torch.no_grad():
        expected = kept[0](CNN_DATA)
        assert relative(answers(done, CNN_DATA), expected) < 0.02  # biases are int32, and a value may round over
    learned = [part for part in kept[0].modules() if isinstance(part, LearnedStep)]
    assert bool(learned) == (method != "ste")
    assert not any(part.training for part in done.simulation.modules())  # type: ignore[union-attr]
    assert not any(isinstance(part, LearnedStep | _BatchNorm) for part in done.simulation.modules())  # type: ignore[union-attr]
    assert done.plan is not None
    assert {quant.scheme.bits for path, quant in done.plan.weights.items() if path == "block.0.weight"} == {bits}
    assert done.plan.weights["stem.weight"].scheme.bits == 8  # the edges
    weight = done.module.get_parameter("block.0.weight")
    assert bool((weight.flatten(1).T.unsqueeze(0) != 0).any())
    assert max(len(row.unique()) for row in weight) <= 2**bits
    with torch.no_grad():
        assert relative(done.module(CNN_DATA), expected) < (0.05 if bits == 8 else 0.5)  # activations in float


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "conv1d": (lambda: Sized(1), (normal(40, 2, 12), integers(3, 40)), {}),
    "conv3d": (lambda: Sized(3), (normal(40, 2, 5, 5, 5), integers(3, 40)), {}),
    "depthwise": (Depthwise, (normal(40, 4, 8, 8), integers(3, 40)), {}),
    "linear only": (Mlp, (MLP_DATA, integers(4, 48)), {}),
    "transformer": (Transformer, {**TEXT_DATA, "labels": TEXT_DATA["input_ids"]}, {"output": "logits"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_trains(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, data, fields = CASES[case]
    module, kept = seeded(build), trained_graph(monkeypatch)
    target = Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC if case == "transformer" else {})
    seen = context(module, data, target, **fields)
    done = Qat(weight_bits=4, schedule=SHORT).apply(Candidate(module), seen)
    batch = seen.task.require("train", "a test").batch(range(20))
    inputs = tuple(batch.tensors().values())
    with torch.no_grad():
        assert relative(answers(done, inputs), kept[0](*inputs)) < 0.02
        before, after = (select_output(batch.call(one), fields.get("output")) for one in (module, done.module))
    assert relative(after, before) > 1e-2  # it did learn
    if case == "transformer":
        assert done.module.get_parameter("head.weight") is done.module.get_parameter("embedding.weight")


def test_the_loss_falls_and_is_noted() -> None:
    module, seen = cnn()
    done = Qat(weight_bits=4, activation_bits=4, schedule=Schedule(epochs=5, batch_size=16, lr=0.02)).apply(
        Candidate(module), seen
    )
    record = done.history[-1]
    losses = [float(value) for value in record.notes[1].removeprefix("loss by epoch: ").split(", ")]
    assert len(losses) == 5
    assert losses[-1] < 0.7 * losses[0]
    assert "1 weights in int4" in record.notes[0]
    assert "trained with lsq, ranges by mse on 48 examples" in record.notes[0]
    assert record.settings["schedule"]["epochs"] == 5


@pytest.mark.parametrize("settings", [{}, {"quantizer": "lsq+", "gradual": [8, 6], "distill": "kd"}])
def test_the_same_seed_gives_the_same_bits(settings: dict[str, Any]) -> None:
    step = Qat(weight_bits=4, activation_bits=4, schedule=SHORT, **settings)
    results = [step.apply(Candidate(module), seen) for module, seen in (cnn(), cnn(), cnn(seed=1))]
    hashes = [state_hash(done.module) for done in results]
    assert hashes[0] == hashes[1] != hashes[2]
    assert results[0].plan == results[1].plan
    assert state_hash(results[0].simulation) == state_hash(results[1].simulation)  # type: ignore[arg-type]


@pytest.mark.parametrize(("runtime", "bits"), [("onnxruntime", 8), ("openvino", 8), ("onnxruntime", 4)])
def test_the_runtime_answers_like_the_simulation(runtime: str, bits: int, tmp_path: Path) -> None:
    module, seen = cnn(target=Target(runtime, threads=1, reduce_range=False))
    done = Qat(weight_bits=bits, activation_bits=bits, schedule=SHORT).apply(Candidate(module), seen)
    found = exported(done, seen, tmp_path)()(CNN_DATA)
    expected = answers(done, CNN_DATA)
    assert relative(found, expected) < 0.02
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) > 0.95


def test_training_wins_back_what_rounding_cost(problem: Any) -> None:
    splits = problem.splits()
    task = Task(train=splits["train"])
    seen = Context(task, Target(threads=1, reduce_range=False), frozen_copy(problem.net), losses=LOSSES)
    images, _ = splits["report"]
    widths = {"weight_bits": 2, "activation_bits": 2}

    def distance(candidate: Candidate) -> float:
        with torch.no_grad():
            return float(LOSSES["kd"](answers(candidate, images), seen.original(images), 4.0))

    after_training = Static(**widths).apply(Candidate(problem.model()), seen)
    schedule = Schedule(epochs=3, batch_size=50, lr=0.005)
    trained = Qat(**widths, schedule=schedule, distill="kd", alpha=1.0).apply(Candidate(problem.model()), seen)
    assert distance(trained) < 0.5 * distance(after_training)


# --- while it trains


def test_masked_weights_stay_zero() -> None:
    module, seen = cnn()
    pruned = Unstructured(sparsity=0.6).apply(Candidate(module), seen)
    done = Qat(weight_bits=4, activation_bits=4, schedule=SHORT).apply(pruned, seen)
    assert done.masks.keys() == pruned.masks.keys()
    assert done.simulation is not None
    for path, mask in done.masks.items():
        assert bool((done.module.get_parameter(path)[~mask] == 0).all())
        assert bool((done.simulation.get_parameter(path)[~mask] == 0).all())
        assert not torch.equal(done.module.get_parameter(path), pruned.module.get_parameter(path))


def test_masks_of_tied_and_unused_parameters_do_no_harm() -> None:
    module = seeded(Transformer)
    module.add_module("unused", nn.Linear(3, 3))
    target = Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC)
    seen = context(module, {**TEXT_DATA, "labels": TEXT_DATA["input_ids"]}, target, output="logits")
    tied, unused = torch.rand(24, 16) > 0.5, torch.eye(3) > 0
    masks = {"embedding.weight": tied, "unused.weight": unused}
    with torch.no_grad():
        module.get_parameter("embedding.weight").mul_(tied)
        module.get_parameter("unused.weight").mul_(unused)
    done = Qat(schedule=SHORT).apply(Candidate(module, masks=masks), seen)
    assert bool((done.module.get_parameter("head.weight")[~tied] == 0).all())
    assert torch.equal(done.module.get_parameter("unused.weight"), module.get_parameter("unused.weight"))


def watched_steps(monkeypatch: pytest.MonkeyPatch, look: Callable[[Student, int, int], None]) -> None:
    """Calls `look(student, step, total)` after each step of the optimizer."""
    place = [0, 0]
    before, after = Student.before_step, Student.after_step

    def noted(student: Student, step: int, total: int, frozen_from: int) -> None:
        place[:] = [step, total]
        before(student, step, total, frozen_from)

    def seen(student: Student) -> None:
        after(student)
        look(student, *place)

    monkeypatch.setattr(Student, "before_step", noted)
    monkeypatch.setattr(Student, "after_step", seen)


@pytest.mark.parametrize(("share", "moving"), [(0.0, 6), (0.5, 3), (1.0, 0)])
def test_batch_norm_is_frozen_in_time(share: float, moving: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = cnn()
    means: list[Tensor] = []
    modes: list[bool] = []

    def look(student: Student, step: int, total: int) -> None:
        norm = student.norms["stem_norm"]
        assert norm.running_mean is not None
        means.append(norm.running_mean.clone())
        modes.append(norm.training)

    watched_steps(monkeypatch, look)
    done = Qat(schedule=SHORT, freeze_batchnorm=share).apply(Candidate(module), seen)
    assert modes == [step < moving for step in range(6)]
    assert all(torch.equal(mean, means[-1]) for mean in means[max(moving - 1, 0) :])
    assert len({tuple(mean.tolist()) for mean in means}) == max(moving, 1)
    assert torch.equal(done.module.get_buffer("stem_norm.running_mean"), means[-1])
    assert bool((done.module.get_parameter("stem_norm.weight") >= 0).all())


def test_gradual_narrowing_ends_at_the_asked_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = cnn()
    bits: list[tuple[int, ...]] = []

    def look(student: Student, step: int, total: int) -> None:
        paths = ("weight_quantizers.block_0_weight", "activation_quantizers.relu", "weight_quantizers.stem_weight")
        bits.append(tuple(student.graph.get_submodule(path).scheme.bits for path in paths))  # type: ignore[union-attr]

    watched_steps(monkeypatch, look)
    for method in ("lsq", "ste"):
        bits.clear()
        settings = {"weight_bits": 3, "activation_bits": 4, "gradual": [8, 6], "quantizer": method}
        done = Qat(schedule=SHORT, **settings).apply(Candidate(module), seen)  # type: ignore[arg-type]
        assert bits == [(8, 8, 8)] * 2 + [(6, 6, 8)] * 2 + [(3, 4, 8)] * 2
        assert done.plan is not None
        assert done.plan.weights["block.0.weight"].scheme.bits == 3
    bits.clear()
    Qat(schedule=SHORT, weight_bits=4, activation_bits=4, gradual=(8, 4)).apply(Candidate(module), seen)
    assert bits == [(8, 8, 8)] * 3 + [(4, 4, 8)] * 3


def test_what_learns_is_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, dict[str, list[str]]] = {}
    scales: dict[str, dict[str, list[float]]] = {}
    for method in METHODS:
        module, seen = cnn()
        kept = trained_graph(monkeypatch)
        done = Qat(schedule=SHORT, quantizer=method).apply(Candidate(module), seen)  # type: ignore[arg-type]
        steps = {path: part for path, part in kept[0].named_modules() if isinstance(part, LearnedStep)}
        kinds[method] = {
            kind: [path for path in steps if path.startswith(kind)] for kind in ("weight_quantizers", "activation")
        }
        kinds[method]["offsets"] = [path for path, part in steps.items() if part.learns_offset]
        assert done.plan is not None
        scales[method] = {tensor.name: tensor.scale for tensor in done.plan.tensors if tensor.role == "activation"}
        monkeypatch.undo()
    assert {method: [len(found) for found in kinds[method].values()] for method in METHODS} == {
        "lsq": [3, 4, 0],
        "lsq+": [3, 4, 4],
        "pact": [0, 4, 0],
        "ste": [0, 0, 0],
    }
    module, seen = cnn()
    plan = Static().apply(Candidate(module), seen).plan
    assert plan is not None
    assert scales["ste"] == {tensor.name: tensor.scale for tensor in plan.tensors if tensor.role == "activation"}
    for method in ("lsq", "lsq+", "pact"):
        assert all(abs(found[0] / scales["ste"][name][0] - 1) > 1e-5 for name, found in scales[method].items())


def test_it_learns_from_the_original_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(Cnn)
    seen = context(module, CNN_DATA)
    asked: list[float] = []

    def distance(outputs: Tensor, expected: Tensor, temperature: float) -> Tensor:
        asked.append(temperature)
        return functional.mse_loss(outputs, expected)

    done = Qat(schedule=SHORT, distill="mine", temperature=2.0).apply(
        Candidate(module), replace(seen, losses={"mine": distance})
    )
    assert asked == [2.0] * 6
    before, after = (float(value) for value in done.history[-1].notes[1].removeprefix("loss by epoch: ").split(", "))
    assert after < 0.5 * before


def test_labels_and_original_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = cnn()
    losses: list[float] = []

    def spied(graph: nn.Module, split: Any, loss: Any, **fields: Any) -> list[float]:
        losses.append(float(loss(graph, split.batch(range(8))).detach()))
        return fit(graph, split, loss, **fields)

    monkeypatch.setattr(STEP, "fit", spied)
    for settings in ({"distill": "kd", "alpha": 1.0}, {"distill": "kd", "alpha": 0.25}, {}):
        Qat(schedule=Schedule(batch_size=48, lr=1e-6), **settings).apply(Candidate(module), seen)  # type: ignore[arg-type]
    soft, mixed, hard = losses
    assert mixed == pytest.approx(0.25 * soft + 0.75 * hard, rel=1e-4)


# --- in a recipe


def recipe(**settings: Any) -> tersor.Recipe:
    schedule = Schedule(epochs=1, batch_size=50, lr=0.005)
    return tersor.Recipe([Qat(weight_bits=4, activation_bits=4, schedule=schedule, **settings)])


def test_a_killed_run_does_not_train_again(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Unstructured(sparsity=0.5), *recipe(distill="kd").steps]
    target = tersor.Target("onnxruntime", threads=1)
    budget, settings = tersor.Budget(max_drop=None), {"recipe": tersor.Recipe(steps), "target": target}
    plan = make_plan(problem.model(), problem.small_task(), budget=budget, **settings)
    run = RunDirectory(tmp_path / "run", plan.fingerprint())
    run.claim()
    first = run_recipe(plan, run, lambda *_: None)

    def never(*arguments: Any, **fields: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(STEP, "fit", never)
    again = run_recipe(plan, run, lambda *_: None)
    assert (again.plan, again.history) == (first.plan, first.history)
    assert again.simulation is not None
    assert first.simulation is not None
    assert state_hash(again.simulation) == state_hash(first.simulation)
    assert state_hash(again.module) == state_hash(first.module)
    assert again.masks.keys() == first.masks.keys()
    images, _ = problem.images()
    assert torch.equal(answers(again, images), answers(first, images))
    stage = tmp_path / "run" / "stages" / "02.safetensors"
    stage.write_bytes(stage.read_bytes()[:-3])
    with pytest.raises(IntegrityError, match="remove it to repeat this step"):
        run_recipe(plan, run, lambda *_: None)


def test_a_loss_that_nobody_has_is_refused_before_any_work(problem: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize\.qat\.distill: expected one of \[.*'kd'.*\], got 'magic'"):
        tersor.compress(
            problem.model(),
            problem.small_task(),
            budget=tersor.Budget(max_drop=None),
            recipe=tersor.Recipe([Unstructured(sparsity=0.5), *recipe(distill="magic").steps]),
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "stages").exists()


def test_it_is_written_and_read_as_yaml() -> None:
    text = (
        "steps:\n  - quantize.qat: {weight_bits: 4, gradual: [8, 6], quantizer: lsq+, distill: kd,"
        " schedule: {epochs: 3, optimizer: adamw, lr: 0.001}}\n"
    )
    found = parse_recipe(text)
    assert found.steps == (
        Qat(
            weight_bits=4,
            gradual=(8, 6),
            quantizer="lsq+",
            distill="kd",
            schedule=Schedule(epochs=3, optimizer="adamw", lr=0.001),
        ),
    )
    assert parse_recipe(dump_recipe(found)) == found
    assert found.steps[0].needs == {"train", "calibrate"}
    assert found.steps[0].precision == "int8"


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradual": [4, 8]}, "falling numbers of bits"),
        ({"gradual": [8, 8]}, "falling numbers of bits"),
        ({"gradual": [9]}, "falling numbers of bits"),
        ({"gradual": [6, 4], "weight_bits": 5, "activation_bits": 5}, "gradual ends below the 5 bits"),
        ({"freeze_batchnorm": 1.5}, "freeze_batchnorm"),
        ({"quantizer": "magic"}, "quantizer"),
        ({"weight_bits": 1}, "weight_bits"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Qat(**settings)


def test_what_is_missing_is_named() -> None:
    module = seeded(Mlp)
    with pytest.raises(ConfigError, match=r"quantize\.qat has no labels to learn from.*\['dist', .*'kd', "):
        Qat().apply(Candidate(module), context(module, MLP_DATA))
    with pytest.raises(DataError, match=r"quantize\.qat needs a 'train' split"):
        Qat().apply(Candidate(module), context_for(module, MLP_DATA))
    scaling = seeded(Scaling)
    with pytest.raises(UnsupportedError, match=r"quantize\.qat found no layer"):
        Qat().apply(Candidate(scaling), context(scaling, (MLP_DATA, integers(4, 48))))


def test_it_does_not_follow_another_quantization() -> None:
    with pytest.raises(OrderError, match="starts from float weights"):
        tersor.Recipe([Static(), Qat()])


class Interrupted(Exception):
    """Stands for a kill between two steps."""


@pytest.mark.parametrize("quantizer", ["lsq+", "ste"])
def test_an_interrupted_training_goes_on_in_its_stage(
    quantizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "due", lambda self, step: True)
    step = Qat(quantizer=quantizer, weight_bits=4, gradual=(8, 6), schedule=SHORT, freeze_batchnorm=0.5)
    module, found = cnn()
    whole = step.apply(Candidate(module), found)
    for stop in (2, 5):

        def stopping(label: str, done: int, total: int, facts: Any = None, stop: int = stop) -> None:
            if done == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            step.apply(Candidate(module), replace(found, directory=tmp_path, progress=stopping))
    told: list[int] = []
    watched = replace(found, directory=tmp_path, progress=lambda label, done, total, facts=None: told.append(done))
    done = step.apply(Candidate(module), watched)
    assert told == [5, 6]
    assert state_hash(done.module) == state_hash(whole.module)
    assert done.plan == whole.plan


def test_the_record_has_the_bits_of_every_layer() -> None:
    module, found = cnn()
    record = Qat(weight_bits=4, schedule=SHORT).apply(Candidate(module), found).history[-1].quantization
    assert record is not None
    bits = {layer.name: layer.weight_bits for layer in record.layers}
    assert set(bits.values()) == {4, 8}
    assert [name for name, width in bits.items() if width == 8] == [record.layers[0].name, record.layers[-1].name]
