"""Kills searching processes at random moments, and counts what was lost, run twice or left running.

    OMP_NUM_THREADS=1 python benchmarks/search_kills.py --out benchmarks/results/search_kills.json

Two processes search one SQLite file together; each runs tiny trials in child processes and is killed (`kill -9`) at a
moment drawn at random: some while they open or make the file, most while trials run. Every few kills a new search
begins.
Before and after `TrialStore.finish` a process writes to a log of its own and flushes it to the disk: what that log
says was finished must be in the file, with the same numbers, once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from environment import describe
from tersor.core.search import TrialRecord
from tersor.search.space import Group, Space
from tersor.search.store import Job, TrialStore
from tersor.search.supervise import Limits, Pool, remove_scratch

PROCESSES = 2
SPACE = Space(tuple(Group(f"fc{index}.weight[0]", "channel", (8, 6, 4, 2)) for index in range(5)), ())
IDENTITY = {"model": "tiny", "task": "sleep", "target": "none", "budget": "none", "seed": "0"}
EARLY = 0.3  # share of the kills whose moment is counted from the start of the process, not from its first trial
LATEST = 1.5  # seconds, from there, after which a process is killed at the latest
PATIENCE = 60.0  # seconds to wait for a first trial
GONE = 5.0  # seconds that orphans may take to end
REOFFERED = 0.1  # share of trials known to be finished that are offered to the store all the same


def jobs() -> list[Job]:
    """2,048 trials: 1,024 choices on two rungs."""
    found = []
    for index in range(4 ** len(SPACE.groups)):
        options = {g.name: g.options[index // 4**place % 4] for place, g in enumerate(SPACE.groups)}
        found += [Job(SPACE.choice(options), rung, "program") for rung in (0, 1)]
    return found


def nap(seconds: float) -> float:
    """The whole trial."""
    time.sleep(seconds)
    return seconds


def search(directory: Path, log: Path, seed: int) -> None:
    """One searching process: starts trials, runs them, writes them down, until it is killed."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    with (
        log.open("ab", buffering=0) as stream,
        TrialStore(directory / "trials.sqlite", IDENTITY, SPACE) as store,
        Pool(2, threads=1) as pool,
    ):

        def note(*words: object) -> None:
            stream.write((" ".join(map(str, words)) + "\n").encode())
            os.fsync(stream.fileno())

        store.abandon_stale()
        known = {(record.choice.key, record.rung) for record in store.finished()}
        started: dict[str, Job] = {}
        waiting = iter(jobs())

        def submit() -> None:
            for job in waiting:
                if (job.choice.key, job.rung) in known and draw.random() > REOFFERED:
                    continue
                number = store.start(job)
                if number is None:
                    continue
                if (job.choice.key, job.rung) in known:
                    note("again", job.choice.key, job.rung)
                seconds = draw.uniform(0.0, 0.05)
                started[str(number)] = job
                pool.submit(
                    str(number),
                    partial(nap, seconds),
                    Limits(directory / "logs" / f"{log.name}.{number}", seconds=30),
                )
                return

        submit()
        submit()
        for name, ended in pool.as_completed():
            job = started.pop(name)
            record = TrialRecord(
                number=int(name),
                choice=job.choice,
                rung=job.rung,
                source=job.source,
                status=ended.status,
                reason=ended.reason,
                drop=ended.value,
                latency_ms=ended.seconds,
                seconds=ended.seconds,
            )
            note("finishing", name, job.choice.key, job.rung, ended.value)
            store.finish(record)
            note("finished", name, job.choice.key, job.rung, ended.value)
            submit()
    note("nothing left")


def begin(directory: Path, log: Path, seed: int) -> int:
    """Forks a searching process: importing everything anew for each kill would take hours."""
    process = os.fork()
    if process == 0:
        try:
            search(directory, log, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return process


def orphans(directory: Path) -> set[int]:
    """Processes whose command line names this directory: guards and workers of trials."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if str(directory).encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def kill_all(victims: dict[int, tuple[Path, float, bool]]) -> Counter[str]:
    """Kills each process after its delay, which begins with the process if it is early, else with its first trial."""
    counts: Counter[str] = Counter()
    begun, waiting = time.monotonic(), dict(victims)
    since = {process: begun for process, (_, _, early) in victims.items() if early}
    while waiting:
        time.sleep(0.001)
        now = time.monotonic()
        for process, (log, delay, _) in list(waiting.items()):
            if process not in since and (now - begun > PATIENCE or (log.exists() and b"finished" in log.read_bytes())):
                since[process] = now
            if now - since.get(process, now) < delay or process not in since:
                continue
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            del waiting[process]
            counts["kills"] += 1
            counts["ended_by_themselves"] += not os.WIFSIGNALED(status)
    return counts


def kill_some(directory: Path, kills: int, draw: random.Random) -> Counter[str]:
    """One search, killed `kills` times, then looked at."""
    counts: Counter[str] = Counter()
    logs = directory / "notes"
    logs.mkdir(parents=True)
    for turn in range(0, kills, PROCESSES):
        victims = {}
        for index in range(min(PROCESSES, kills - turn)):
            log = logs / str(turn + index)
            early, delay = draw.random() < EARLY, draw.uniform(0.0, LATEST)
            victims[begin(directory, log, draw.getrandbits(32))] = (log, delay, early)
        counts.update(kill_all(victims))
        deadline = time.monotonic() + GONE
        while (left := orphans(directory)) and time.monotonic() < deadline:
            time.sleep(0.01)
        counts["left_running"] += len(left)
        counts["scratch_swept"] += remove_scratch(directory / "logs")
    counts.update(check(directory, logs))
    return counts


def check(directory: Path, logs: Path) -> Counter[str]:
    """Compares the file with what the processes noted."""
    finishing, finished, again = {}, [], 0
    for log in logs.iterdir():
        for line in log.read_text().splitlines():
            kind, *words = line.split()
            if kind == "finishing":
                finishing[words[0]] = tuple(words[1:])
            elif kind == "finished":
                finished.append((words[0], tuple(words[1:])))
            else:
                again += kind == "again"
    with TrialStore(directory / "trials.sqlite", IDENTITY, SPACE) as store:
        given_up = len(store.abandon_stale())
        records = store.finished()
        abandoned = sum("record" not in trial.user_attrs for trial in store.study.trials) - given_up
    found = {str(record.number): (record.choice.key, str(record.rung), str(record.drop)) for record in records}
    with closing(sqlite3.connect(directory / "trials.sqlite")) as connection:
        intact = connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    done = Counter((record.choice.key, record.rung) for record in records)
    noted = Counter((key, rung) for _, (key, rung, _) in finished)
    return Counter(
        trials_finished=len(records),
        finish_returned=len(finished),
        killed_while_finishing_and_kept=len(found) - len(finished),
        killed_while_running=abandoned + given_up,
        failed=sum(record.status != "finished" for record in records),
        lost=sum(number not in found for number, _ in finished),
        changed=sum(found.get(number, facts) != facts for number, facts in finished),
        invented=sum(finishing.get(number) != facts for number, facts in found.items()),
        duplicated=sum(count - 1 for count in done.values()) + sum(count - 1 for count in noted.values()) + again,
        damaged_files=int(not intact) + len(list(directory.glob("*.damaged-*"))),
    )


def main() -> None:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--per-search", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)  # noqa: S311 - no secret
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:  # Optuna imports much only when it is used: not in each fork
        TrialStore(Path(name) / "trials.sqlite", IDENTITY, SPACE).close()
    searches, begun = 0, time.monotonic()
    while counts["kills"] < arguments.kills:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name).resolve()
            counts.update(kill_some(directory, min(arguments.per_search, arguments.kills - counts["kills"]), draw))
        searches += 1
        print(f"{counts['kills']} kills: {dict(counts)}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "benchmark": "search_kills",
        "environment": describe(threads=1, seed=arguments.seed, packages=("optuna", "sqlalchemy", "filelock")),
        "sqlite": sqlite3.sqlite_version,
        "searches": searches,
        "processes_per_search": PROCESSES,
        "early_share": EARLY,
        "latest_kill_seconds": LATEST,
        "seconds": time.monotonic() - begun,
        **counts,
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text)
    assert counts["lost"] == counts["changed"] == counts["invented"] == counts["duplicated"] == 0
    assert counts["left_running"] == counts["damaged_files"] == counts["ended_by_themselves"] == 0


if __name__ == "__main__":
    main()
