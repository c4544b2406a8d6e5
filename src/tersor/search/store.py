"""Trials on disk: claimed before they run, written down before anybody hears of them, and found again after a kill."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Self

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from tersor.core.files import disk_errors, write_whole
from tersor.core.search import Choice, Source, TrialRecord
from tersor.errors import ConfigError, IntegrityError, OutputDirectoryError
from tersor.search import salvage
from tersor.search.database import PATIENCE, connect, quiet, shown_url
from tersor.search.salvage import IDENTITY, RECORD
from tersor.search.space import Space

FORMAT = "number format"  # its parameter's name: with a space it can be no path of a module
STUDY = "tersor"
_CLAIM, _OWNER = "claim", "owner"
_DIRECTIONS = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]  # drop, latency


@dataclass(frozen=True)
class Job:
    """A trial that shall run.

    Attributes:
        choice: Of the store's space.
        rung: 0 for the shortest training.
        source: Who thought of it.
        predicted_drop: By the damage table, if there is one.
        predicted_ms: By the cost table, if there is one.
    """

    choice: Choice
    rung: int
    source: Source
    predicted_drop: float | None = None
    predicted_ms: float | None = None


class TrialStore:
    """The trials of one search, in a SQLite file or in a shared database.

    ::

        with TrialStore(Path("runs/a/trials.sqlite"), identity, space) as store:
            store.abandon_stale()
            number = store.start(Job(choice, rung=0, source="program"))
            if number is not None:
                store.finish(TrialRecord(number=number, choice=choice, ...))

    Several processes may use one SQLite file. A shared database has no such lock: one process alone starts trials
    there, and whatever another one has left running counts as given up.

    Args:
        location: Path of the SQLite file, or a URL such as `postgresql+psycopg://user@host/database`.
        identity: Fingerprints of model, task, target, budget and seed.
        space: What its choices are made of; another space is another search.
        name: Of the study; tells searches in one shared database apart.

    Raises:
        ConfigError: if the URL is none.
        OutputDirectoryError: if another search is in there (saying what differs), or it cannot be reached or written.
        IntegrityError: if the file is damaged and nothing of it can be recovered.
        RuntimeUnavailableError: if the database's driver is not installed.
    """

    def __init__(self, location: Path | str, identity: Mapping[str, str], space: Space, *, name: str = STUDY) -> None:
        formats = ", ".join(space.formats)
        self.identity = {**identity, "search space": f"{space.fingerprint} {formats}"}
        self.space, self.name = space, name
        self.token = uuid.uuid4().hex
        self._threads = threading.RLock()
        self._file: FileLock | None = None
        self.path: Path | None = None
        if isinstance(location, str) and "://" in location:
            self.where = shown_url(location)
        else:
            self.path = Path(location).absolute()
            self.where = str(location)
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileLock(f"{self.path}.lock", timeout=PATIENCE, thread_local=False)
        with ExitStack() as stack, self._guard():
            if self.path is not None:
                alive = self._life(self.token)
                stack.callback(Path(alive.lock_file).unlink, missing_ok=True)
                stack.enter_context(alive)
                self._prepare(self.path)
            backend = connect(self.path or str(location))
            stack.callback(backend.engine.dispose)
            self._storage = get_storage(backend)
            self._study_id = self._claim(self._storage)
            self.study = optuna.load_study(study_name=self.name, storage=self._storage)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the database; what this store left running counts as given up."""
        self._stack.close()

    def start(self, job: Job) -> int | None:
        """Claims a trial and returns its number.

        None if an equal one (same choice, same rung) has ended, whatever came of it, or is run by somebody who lives.

        Raises:
            ConfigError: if the choice is not of the store's space.
            OutputDirectoryError: if the database cannot be written.
        """
        unknown = sorted({*job.choice.skipped, *job.choice.widths} - set(self.space.by_name))
        if unknown:
            raise ConfigError(f"choice: the search space has no {unknown}")
        self.space.choice(options := self.space.options(job.choice), job.choice.format)
        claim = [job.choice.key, job.rung]
        with self._guard():
            for trial in self._trials():
                if trial.user_attrs.get(_CLAIM) == claim and self._is_taken(trial):
                    return None
            template = create_trial(
                state=TrialState.RUNNING,
                params={**options, FORMAT: job.choice.format},
                distributions=distributions(self.space),
                user_attrs={
                    _CLAIM: claim,
                    _OWNER: self.token,
                    "source": job.source,
                    "predicted_drop": job.predicted_drop,
                    "predicted_ms": job.predicted_ms,
                },
            )
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=template)
            return self._storage.get_trial_number_from_id(trial_id)

    def finish(self, record: TrialRecord) -> None:
        """Writes down what came of a trial; when this returns it is on disk. Doing it again does nothing.

        Raises:
            ConfigError: if the trial was never started, or a finished one lacks a finite drop or latency.
            OutputDirectoryError: if it has ended otherwise, or the database cannot be written.
        """
        salvage.values_of(record)
        with self._guard():
            trial = next((trial for trial in self._trials() if trial.number == record.number), None)
            if trial is None or trial.user_attrs.get(_CLAIM) != [record.choice.key, record.rung]:
                raise ConfigError(f"trial {record.number}: no such choice was started under this number at its rung")
            sealed = salvage.seal(record)
            if trial.state.is_finished():
                if trial.user_attrs.get(RECORD) == sealed:
                    return
                raise OutputDirectoryError(
                    f"{self.where}: trial {record.number} has ended already, with another result; two searches write "
                    "here, stop one of them"
                )
            trial_id = self._trial_id(trial)
            self._storage.set_trial_user_attr(trial_id, RECORD, sealed)
            self._end(trial_id, record)

    def finished(self) -> list[TrialRecord]:
        """All trials that ended, successful or not, in the order of numbers.

        Raises:
            IntegrityError: if a record was changed.
        """
        with self._guard():
            ended = [trial for trial in self._trials() if trial.state.is_finished() and RECORD in trial.user_attrs]
        return [self._record(trial) for trial in sorted(ended, key=lambda trial: trial.number)]

    def abandon_stale(self) -> list[int]:
        """Ends trials whose process is gone and returns their numbers; they may be started again.

        One whose record was complete when its process died counts as finished.
        """
        with self._guard():
            running = [trial for trial in self._trials() if not trial.state.is_finished()]
            stale = [trial.number for trial in running if not self._is_taken(trial)]
            if self.path is not None:
                for life in self.path.parent.glob(f".{escape(self.path.name)}.*.alive"):
                    if not self._lives(life.name.split(".")[-2]):
                        life.unlink(missing_ok=True)
        return stale

    def _is_taken(self, trial: FrozenTrial) -> bool:
        """Whether nobody else may run this trial's choice; ends the trial if its process is gone."""
        if trial.state.is_finished():
            return RECORD in trial.user_attrs
        owner = trial.user_attrs.get(_OWNER)
        if owner is None or self._lives(owner):  # without owner: asked for by a sampler
            return True
        if RECORD in trial.user_attrs:
            self._end(self._trial_id(trial), self._record(trial))
            return True
        self._storage.set_trial_state_values(self._trial_id(trial), TrialState.FAIL)
        return False

    def _end(self, trial_id: int, record: TrialRecord) -> None:
        values = salvage.values_of(record)
        self._storage.set_trial_state_values(trial_id, salvage.state_of(record), values)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        record = salvage.unseal(trial.user_attrs[RECORD])
        if record is None:
            raise IntegrityError(
                f"{self.where}: the record of trial {trial.number} was changed or is damaged; restore a copy of the "
                "database, or remove it to start anew"
            )
        return record

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def _trial_id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def _life(self, token: str) -> FileLock:
        """The lock that a store holds while it is open; the system releases it when the process dies."""
        assert self.path is not None  # noqa: S101 - of SQLite files only
        path = self.path.with_name(f".{self.path.name}.{token}.alive")
        return FileLock(path, blocking=False, thread_local=False)

    def _lives(self, token: str) -> bool:
        """Whether the store that started a trial is open; of a shared database's only this one."""
        if token == self.token or self.path is None:
            return token == self.token
        life = self._life(token)
        if not Path(life.lock_file).exists():
            return False
        try:
            with life:
                return False
        except Timeout:
            return True

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """One writer at a time, over threads and processes; errors of the database become ours."""
        with self._threads, ExitStack() as stack:
            try:
                if self._file is not None:
                    with disk_errors(Path(self._file.lock_file)):
                        stack.enter_context(self._file)
                yield
            except Timeout:
                raise OutputDirectoryError(
                    f"{self.where} has been locked by another process for {PATIENCE:.0f} s; end it and try again"
                ) from None
            except (StorageInternalError, SQLAlchemyError) as error:
                cause = getattr(error.__cause__ or error, "orig", None) or error
                raise OutputDirectoryError(
                    f"cannot read or write {self.where}: {cause}; free space or make it reachable, then run the same "
                    "call again: finished trials are kept"
                ) from error

    def _prepare(self, path: Path) -> None:
        """Makes the file if there is none, repairs it if it is damaged."""
        if not path.exists():
            self._create(path, {})
        elif (damage := salvage.damage(path, self.name) or self._contradiction(path)) is not None:
            identity, records = salvage.read(path, damage)
            self._check(identity)
            salvage.keep(path, damage, records)
            self._create(path, records)

    def _contradiction(self, path: Path) -> str | None:
        """What does not fit together in a file that SQLite finds in order; None if all does."""
        backend = None
        try:
            backend = connect(path)
            study_id = backend.get_study_id_from_name(self.name)
            backend.get_study_user_attrs(study_id)
            wrong = [trial.number for trial in backend.get_all_trials(study_id) if not _is_sound(trial)]
        except RuntimeError as error:  # written by another version of Optuna
            raise OutputDirectoryError(f"{path}: {error}") from error
        except Exception as error:  # whatever a changed row makes Optuna raise
            return str(error).splitlines()[0]
        finally:
            if backend is not None:
                backend.engine.dispose()
        return f"trials {wrong} do not agree with their records" if wrong else None

    def _create(self, path: Path, records: Mapping[int, TrialRecord]) -> None:
        """Puts a whole database in place, with these trials; numbers between them are taken by failed ones."""
        scratch = path.with_name(f".{path.name}.new")
        for leftover in (scratch, path.with_name(f"{scratch.name}-journal"), path.with_name(f"{path.name}-journal")):
            leftover.unlink(missing_ok=True)
        backend = connect(scratch, durable=False)
        try:
            study_id = self._claim(backend)
            for number in range(max(records, default=-1) + 1):
                template = create_trial(state=TrialState.FAIL)
                if (record := records.get(number)) is not None:
                    template = create_trial(
                        state=salvage.state_of(record),
                        values=salvage.values_of(record),
                        params={**self.space.options(record.choice), FORMAT: record.choice.format},
                        distributions=distributions(self.space),
                        user_attrs={_CLAIM: [record.choice.key, record.rung], RECORD: salvage.seal(record)},
                    )
                backend.create_new_trial(study_id, template_trial=template)
        finally:
            backend.engine.dispose()
        with disk_errors(path):
            salvage.place(scratch, path)

    def _claim(self, storage: BaseStorage) -> int:
        """The study, made if there is none; of this identity."""
        names = [study.study_name for study in storage.get_all_studies()]
        if self.name not in names:
            with quiet():
                storage.create_new_study(_DIRECTIONS, self.name)
        study_id = storage.get_study_id_from_name(self.name)
        found = storage.get_study_user_attrs(study_id).get(IDENTITY)
        if found is None and not storage.get_all_trials(study_id, deepcopy=False):
            storage.set_study_user_attr(study_id, IDENTITY, self.identity)
        else:
            self._check(found or {})
        return study_id

    def _check(self, found: Mapping[str, str]) -> None:
        different = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
        if different:
            raise OutputDirectoryError(
                f"{self.where} holds another search: its {', '.join(different)} differ(s) from this call's; choose "
                "another directory, or repeat the call as it was to resume"
            )


def _is_sound(trial: FrozenTrial) -> bool:
    """Whether a trial's columns say what its record says."""
    claim = trial.user_attrs.get(_CLAIM)
    if RECORD not in trial.user_attrs:
        return claim is None or trial.state is not TrialState.COMPLETE
    record = salvage.unseal(trial.user_attrs[RECORD])
    if record is None or record.number != trial.number or claim != [record.choice.key, record.rung]:
        return False
    ended = (salvage.state_of(record), salvage.values_of(record))
    return not trial.state.is_finished() or (trial.state, trial.values) == ended


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's parameters of a space: units that stay, by group, and `FORMAT`."""
    groups = {group.name: CategoricalDistribution(group.options) for group in space.groups}
    return {**groups, FORMAT: CategoricalDistribution(space.formats)}


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds a directory for one search; the lock of a process that died is free.

    Raises:
        OutputDirectoryError: if it is being searched already, with the process that does it.
    """
    holder = directory / "search.pid"
    with disk_errors(holder):
        directory.mkdir(parents=True, exist_ok=True)
        held = FileLock(directory / "search.lock", blocking=False, thread_local=False)
        try:
            held.acquire()
        except Timeout:
            process = holder.read_text().strip() if holder.exists() else "that has just begun"
            raise OutputDirectoryError(
                f"{directory} is being searched by process {process}; wait for it or choose another directory"
            ) from None
    try:
        write_whole(holder, f"{os.getpid()}\n".encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()
