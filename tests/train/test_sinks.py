"""What a training logs is read back from the files that it left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.errors import ConfigError, RuntimeUnavailableError
from tersor.train import Checkpoints, Hooks, Schedule, Trained, fit
from tersor.train.sinks import sink, together
from zoo import normal, seeded

X = normal(48, 6)
Y = (X[:, 0] > 0).long()
Points = dict[str, list[tuple[int, float]]]


class Interrupted(Exception):
    pass


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return functional.cross_entropy(batch.call(module), batch.labels)


def train(progress: Any, *, stop: int | None = None, keep: Checkpoints | None = None) -> Trained:
    metrics, seen = [0.5, 0.25], []

    def before(step: int, total: int) -> None:
        seen.append(step)
        if step == stop:
            raise Interrupted

    hooks = Hooks(before, evaluate=lambda module: metrics[seen[-1] // 3], progress=progress)
    schedule = Schedule(epochs=2, batch_size=16, lr=0.1)
    return fit(
        seeded(lambda: nn.Linear(6, 2)), Split("train", (X, Y)), cross_entropy, schedule=schedule, seed=0, hooks=hooks,
        keep=keep,
    )  # fmt: skip


def events(directory: Path) -> Points:
    """What TensorBoard shows."""
    accumulating = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulating.EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def check(found: Points, told: list[tuple[int, Mapping[str, float]]], trained: Trained) -> None:
    assert set(found) == {"loss", "examples_per_second", "epoch_loss", "metric"}
    steps = [(done, facts["loss"]) for position, (done, facts) in enumerate(told) if position not in (3, 7)]
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["loss"]] == pytest.approx([value for _, value in steps])
    assert [step for step, _ in found["examples_per_second"]] == [1, 2, 3, 4, 5, 6]
    assert all(value > 0 for _, value in found["examples_per_second"])
    assert [step for step, _ in found["epoch_loss"]] == [3, 6]
    assert [value for _, value in found["epoch_loss"]] == pytest.approx(trained.losses)
    assert found["metric"] == [(3, 0.5), (6, 0.25)]


def test_tensorboard_shows_what_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    told: list[tuple[int, Mapping[str, float]]] = []
    with sink("tensorboard", tmp_path / "logs") as log:
        assert not (tmp_path / "logs").exists()  # nothing before the first step
        trained = train(together(log, lambda done, total, facts: told.append((done, dict(facts)))))
        early = events(tmp_path / "logs")  # all is there before the sink is closed
    check(events(tmp_path / "logs"), told, trained)
    assert early == events(tmp_path / "logs")


def test_a_training_that_goes_on_leaves_one_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    keep = Checkpoints(tmp_path / "run", every_steps=3)
    with sink("tensorboard", tmp_path / "logs") as log, pytest.raises(Interrupted):
        train(log, stop=5, keep=keep)  # the last two of five steps are in no checkpoint
    assert [step for step, _ in events(tmp_path / "logs")["loss"]] == [1, 2, 3, 4, 5]
    told: list[tuple[int, Mapping[str, float]]] = []
    train(lambda done, total, facts: told.append((done, dict(facts))))
    with sink("tensorboard", tmp_path / "logs") as log:
        trained = train(log, keep=keep)
    check(events(tmp_path / "logs"), told, trained)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return pytest.importorskip("mlflow")


def logged(client: Any, run: str) -> Points:
    """What MLflow has of a run."""
    keys = client.get_run(run).data.metrics
    return {key: [(point.step, point.value) for point in client.get_metric_history(run, key)] for key in keys}


def test_mlflow_has_what_was_told(mlflow: Any, tmp_path: Path) -> None:
    told: list[tuple[int, Mapping[str, float]]] = []
    with sink("mlflow", f"file:{tmp_path}") as log:
        trained = train(together(log, lambda done, total, facts: told.append((done, dict(facts)))))
    client = mlflow.MlflowClient(tracking_uri=f"file:{tmp_path}")
    (run,) = client.search_runs([client.get_experiment_by_name("tersor").experiment_id])
    assert run.info.status == "FINISHED"
    check(logged(client, run.info.run_id), told, trained)


def test_an_mlflow_run_goes_on_under_its_id(mlflow: Any, tmp_path: Path) -> None:
    keep, uri = Checkpoints(tmp_path / "run", every_steps=3), f"file:{tmp_path / 'logs'}"
    first = sink("mlflow", uri)
    with first, pytest.raises(Interrupted):
        train(first, stop=3, keep=keep)
    with sink("mlflow", uri, run=first.store.run) as log:  # type: ignore[attr-defined]
        trained = train(log, keep=keep)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tersor").experiment_id])
    told: list[tuple[int, Mapping[str, float]]] = []
    train(lambda done, total, facts: told.append((done, dict(facts))))
    check(logged(client, run.info.run_id), told, trained)
    with pytest.raises(ConfigError, match="MLflow takes no runs at"):
        sink("mlflow", uri, run="0" * 32)


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [("tensorboard", "tensorboard.compat.proto", "tensorboard"), ("mlflow", "mlflow", "mlflow-skinny")],
)
def test_a_missing_package_is_told_with_the_command(
    kind: Any, module: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailableError, match=rf"needs {package} .*pip install 'tersor\[tracking\]'"):
        sink(kind, tmp_path)


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    kind: Any = "paper"
    with pytest.raises(ConfigError, match="expected tensorboard or mlflow, got 'paper'"):
        sink(kind, tmp_path)


def test_functions_are_called_together_in_order() -> None:
    calls: list[str] = []

    def note(name: str) -> Callable[[int, int, Mapping[str, float]], None]:
        return lambda done, total, facts: calls.append(f"{name} {done}/{total} {facts['loss']}")

    together(note("a"), note("b"))(1, 2, {"loss": 0.5})
    assert calls == ["a 1/2 0.5", "b 1/2 0.5"]
