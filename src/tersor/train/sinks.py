"""Sinks for a training's numbers: TensorBoard's event files, MLflow's runs.

A sink is a progress function of `Hooks`. It logs, by optimizer step, `loss` and `examples_per_second` after every step,
`epoch_loss` and `metric` after every evaluation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from tersor.errors import ConfigError, RuntimeUnavailableError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

Progress = Callable[[int, int, Mapping[str, float]], None]
EXPERIMENT = "tersor"


class Store(Protocol):
    """Where a sink puts its numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Puts them down; the first call of a training that goes on comes with a step above 1."""

    def flush(self) -> None:
        """Makes them visible to readers."""

    def close(self) -> None:
        """Ends it."""


class Sink:
    """A progress function that logs; also a context that closes itself."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._last = 0

    def __call__(self, done: int, total: int, facts: Mapping[str, float]) -> None:
        """What `Hooks.progress` is called with: the second call for a step is an evaluation's."""
        if done == self._last:
            self.store.log(done, {"epoch_loss": facts["loss"], "metric": facts["metric"]})
            self.store.flush()
        else:
            self.store.log(done, {"loss": facts["loss"], "examples_per_second": facts["examples/s"]})
        self._last = done
        if done == total:
            self.store.flush()

    def close(self) -> None:
        """Writes what is left; nothing can be logged afterwards."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sink(kind: Literal["tensorboard", "mlflow"], destination: str | Path, *, run: str | None = None) -> Sink:
    """A sink that logs to TensorBoard or MLflow, at home or on a server of yours; nothing else is contacted.

    Args:
        kind: Of what.
        destination: For TensorBoard a directory, for MLflow what its tracking URI may be (a server, a directory).
        run: MLflow's id of a run to go on with, e.g. after an interruption; a new one in the experiment `tersor`
            otherwise.

    Raises:
        RuntimeUnavailableError: if the package is not installed.
        ConfigError: if the kind is unknown, or MLflow takes no runs at the destination.
    """
    if kind == "tensorboard":
        return Sink(TensorBoard(Path(destination)))
    if kind == "mlflow":
        return Sink(MlFlow(str(destination), run))
    raise ConfigError(f"sink: expected tensorboard or mlflow, got {kind!r}")


def together(*functions: Progress) -> Progress:
    """One progress function that calls all of these, in order."""

    def call(done: int, total: int, facts: Mapping[str, float]) -> None:
        for function in functions:
            function(done, total, facts)

    return call


class TensorBoard:
    """Event files in a directory; where a training goes on, what the killed one had logged beyond is left out."""

    def __init__(self, directory: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self.directory = directory
        self._event, self._summary, self._files = event_pb2, summary_pb2, event_file_writer
        self._open: EventFileWriter | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds an event."""
        if self._open is None:
            self._open = self._files.EventFileWriter(str(self.directory))
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._add(step, session_log=start)
        entries = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=self._summary.Summary(value=entries))

    def _add(self, step: int, **content: Any) -> None:
        assert self._open is not None  # noqa: S101 - opened by `log`
        self._open.add_event(self._event.Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        """Writes to the file."""
        if self._open is not None:
            self._open.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._open is not None:
            self._open.close()
            self._open = None


class MlFlow:
    """One run, which ends when the sink is closed and can go on under its id."""

    def __init__(self, uri: str, run: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import: it would report to its makers
        try:
            import mlflow
            from mlflow.entities import Metric
        except ImportError as error:
            raise _missing("mlflow-skinny", error) from error
        self._metric = Metric
        try:
            self._client: MlflowClient = mlflow.MlflowClient(tracking_uri=uri)
            if run is None:
                found = self._client.get_experiment_by_name(EXPERIMENT)
                experiment = self._client.create_experiment(EXPERIMENT) if found is None else found.experiment_id
                run = self._client.create_run(experiment).info.run_id
            else:
                self._client.update_run(run, status="RUNNING")
        except mlflow.exceptions.MlflowException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"sink: MLflow takes no runs at {uri!r}: {reason}") from error
        self.run: str = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics, at one go."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.run, [self._metric(name, value, now, step) for name, value in values.items()])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self.run)


def _missing(package: str, error: ImportError) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(f"this sink needs {package} ({error}); run: pip install 'tersor[tracking]'")
