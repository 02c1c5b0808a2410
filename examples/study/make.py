"""Makes the arms of the study: several side by side, each on one core.

What is finished is not made again, unless its configuration, its commands or what it began with
have changed. After a kill the same call goes on where it was. An arm that fails is named with its
log, and the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from examples.small_student.commands import adopt_orphans, begin_with_copies, run_measured
from examples.study.arms import (
    MODELS,
    ROOT,
    RUNS,
    SMALL,
    SMALL_PREFIX,
    SMALL_RUNS,
    Arm,
    Command,
    Place,
)
from examples.study.small import SHARED, is_small, needed, small_arm
from lopd.artifacts import publish_json
from lopd.processes import die_with_parent, last_lines

HERE = Path(__file__).resolve().parent
LOPD = Path(sys.executable).with_name("lopd")
_SMALL_STUDENT = ROOT / "examples" / "small_student"
# The job that makes the small student's arms of a seed.
_SMALL_JOB = "small"


@dataclass(frozen=True)
class Job:
    """What one process makes: an arm of a seed, or the small student's arms of a seed."""

    name: str
    work: Callable[[], object]
    is_made: bool
    # Jobs that come before it.
    needs: frozenset[str]
    log: Path


@dataclass(frozen=True)
class Mark:
    """A command that has been run, or the one that was begun last."""

    verb: str
    # Of the command and of all that comes before it.
    identity: str
    # None: it was begun and not finished.
    processor_seconds: float | None
    wall_seconds: float | None
    # Whether it went on after a kill or an error. Its seconds are then those of the last attempt
    # alone.
    is_resumed: bool = False


def marks_file(arm: Arm, seed: int) -> Path:
    return RUNS / f"seed-{seed}" / "done" / f"{arm.name}.json"


def marks_of(arm: Arm, seed: int) -> list[Mark]:
    """Return the marks of an arm's commands, in their order."""
    file = marks_file(arm, seed)
    return [Mark(**mark) for mark in json.loads(file.read_text())] if file.exists() else []


def log_of(name: str, seed: int) -> Path:
    return RUNS / f"seed-{seed}" / "logs" / f"{name}.log"


class Identities:
    """Hashes of everything that decides what commands make."""

    def __init__(self, arms: Mapping[str, Arm]) -> None:
        self._arms = arms
        self._known: dict[tuple[str, int], list[str]] = {}

    def of(self, name: str, seed: int) -> list[str]:
        """Return the identities of an arm's beginning and of each of its commands.

        Those before it are part of a command's identity.
        """
        if is_small(name):
            return [of_small(needed([name]))]
        if (name, seed) not in self._known:
            arm = self._arms[name]
            identity = _digest(
                _begins_with(arm.setting.config),
                *arm.setting.overrides(seed),
                *(f"{other}/{stage}" for other, stage in arm.copied),
                *(self.of(other, seed)[-1] for other in _before(arm)),
            )
            found = [identity]
            for command in arm.commands(arm.place(seed)):
                parts: list[str | bytes] = [*command]
                if command[0] == "python":
                    parts.append((HERE / f"{command[1]}.py").read_bytes())
                found.append(_digest(found[-1], *parts))
            self._known[name, seed] = found
        return self._known[name, seed]


def of_small(names: Sequence[str]) -> str:
    """Return the identity of arms of the small student, by their names there."""
    place = Place(0, SMALL_RUNS, SMALL_RUNS)
    commands = [small_arm(SMALL_PREFIX + name).commands(place) for name in names]
    return _digest(_begins_with(SMALL.config), json.dumps(commands))


@functools.cache
def _begins_with(config: Path) -> str:
    """Return a hash of what a configuration says, without its comments, and of its models."""
    said = tomllib.loads(config.read_text(encoding="utf-8"))
    folders = [config.parent / name for name in said["models"].values() if isinstance(name, str)]
    # Models that the study makes itself follow from commands, which have identities of their own.
    shipped = [folder.resolve() for folder in folders if MODELS in folder.resolve().parents]
    weights = [(folder / "model.safetensors").read_bytes() for folder in shipped]
    return _digest(json.dumps(said, sort_keys=True), *weights)


def _before(arm: Arm) -> list[str]:
    """Return the names of the arms that an arm needs, each once."""
    return list(dict.fromkeys([*(other for other, _ in arm.copied), *arm.after]))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        # With its length, so that two parts are not taken for one.
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()


def full_command(arm: Arm, command: Command, seed: int) -> list[str]:
    """Return the program and its arguments for a command of an arm."""
    kind, verb, *arguments = command
    if kind == "python":
        return [sys.executable, "-m", f"examples.study.{verb}", *arguments]
    run = arm.place(seed).run
    overrides = [f"run.dir={run}", *arm.setting.overrides(seed), *arguments]
    return [str(LOPD), verb, str(arm.setting.config), *overrides]


def make_arm(arm: Arm, seed: int, identities: Sequence[str]) -> None:
    """Make an arm of a seed from where it is.

    Args:
        arm: The arm.
        seed: The seed.
        identities: Those of its beginning and of each of its commands.

    Raises:
        subprocess.CalledProcessError: A command failed. Its message is in the log.
    """
    place = arm.place(seed)
    marks = marks_of(arm, seed)
    known = [mark.identity for mark in marks]
    # The first mark is that of the beginning, so a folder without one was begun by nothing that is
    # known.
    is_there = place.run.exists() or not arm.copied
    if not known or not is_there or known != list(identities[: len(known)]):
        stages = [place.of(other) / stage for other, stage in arm.copied]
        if stages:
            begin_with_copies(place.run, stages)
        else:
            _remove(place.run)
        marks = [Mark("", identities[0], 0.0, 0.0)]
        _publish(arm, seed, marks)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for index, command in enumerate(arm.commands(place), start=1):
        if index < len(marks) and marks[index].processor_seconds is not None:
            continue
        begun = Mark(command[1], identities[index], None, None, is_resumed=index < len(marks))
        marks = [*marks[:index], begun]
        # Before it runs: what a killed command of another identity leaves must not be gone on with.
        _publish(arm, seed, marks)
        began = time.monotonic()
        used = run_measured(
            full_command(arm, command, seed), log_of(arm.name, seed), env=environment, cwd=ROOT
        )
        wall = time.monotonic() - began
        marks[index] = dataclasses.replace(begun, processor_seconds=used, wall_seconds=wall)
        _publish(arm, seed, marks)


def _remove(run: Path) -> None:
    # Imported here: it is needed seldom, and by the processes of arms alone.
    import shutil

    shutil.rmtree(run, ignore_errors=True)


def _publish(arm: Arm, seed: int, marks: Sequence[Mark]) -> None:
    publish_json(marks_file(arm, seed), [vars(mark) for mark in marks])


def is_made(arm: Arm, seed: int, identities: Sequence[str]) -> bool:
    """Return whether all commands of an arm of a seed are finished, as they are now."""
    marks = marks_of(arm, seed)
    is_current = [mark.identity for mark in marks] == list(identities)
    is_finished = all(mark.processor_seconds is not None for mark in marks)
    return is_current and is_finished and arm.place(seed).run.exists()


def _make_small(seed: int, names: Sequence[str], identity: str, mark: Path) -> None:
    """Make the small student's arms of a seed by their own command."""
    log = log_of(_SMALL_JOB, seed)
    script = _SMALL_STUDENT / "seeds.py"
    where = ["--runs", str(SMALL_RUNS), "--seeds", str(seed)]
    what = ["--only", "make", "--arms", *names]
    command = [sys.executable, str(script), *where, *what]
    run_measured(command, log, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    publish_json(mark, {"identity": identity})


def jobs_of(arms: Mapping[str, Arm], seeds: Iterable[int]) -> list[Job]:
    """Return the jobs that make arms, seed by seed. A job comes after those that it needs."""
    identities = Identities(arms)
    small = needed(arms)
    jobs: list[Job] = []
    for seed in seeds:
        small_name = f"seed-{seed}/{_SMALL_JOB}"
        if small:
            jobs.append(_small_job(small_name, seed, small, of_small(small)))
        for arm in arms.values():
            if is_small(arm.name):
                continue
            own = identities.of(arm.name, seed)
            before = {
                small_name if is_small(other) else f"seed-{seed}/{other}" for other in _before(arm)
            }
            jobs.append(
                Job(
                    name=f"seed-{seed}/{arm.name}",
                    work=_Work(arm, seed, own),
                    is_made=is_made(arm, seed, own),
                    needs=frozenset(before),
                    log=log_of(arm.name, seed),
                )
            )
    return jobs


@dataclass(frozen=True)
class _Work:
    """make_arm() with its arguments."""

    arm: Arm
    seed: int
    identities: Sequence[str]

    def __call__(self) -> None:
        make_arm(self.arm, self.seed, self.identities)


def _small_job(name: str, seed: int, names: Sequence[str], identity: str) -> Job:
    mark = RUNS / f"seed-{seed}" / "done" / f"{_SMALL_JOB}.json"
    is_there = (SMALL_RUNS / f"seed-{seed}" / SHARED.rpartition("/")[2]).exists()
    done: dict[str, Any] = json.loads(mark.read_text()) if mark.exists() else {}
    return Job(
        name=name,
        work=lambda: _make_small(seed, names, identity, mark),
        is_made=is_there and done.get("identity") == identity,
        needs=frozenset(),
        log=log_of(_SMALL_JOB, seed),
    )


def run_jobs(jobs: Sequence[Job], workers: int) -> list[str]:
    """Run jobs side by side, each in a process of its own.

    Args:
        jobs: The jobs. A job that was made is not made again.
        workers: How many run at the same time.

    Returns:
        A line for each job that failed, or that could not begin because another one failed.
    """
    finished = {job.name for job in jobs if job.is_made}
    waiting = [job for job in jobs if not job.is_made]
    if finished:
        print(f"{len(finished)} of {len(jobs)} arms and seeds are done already", flush=True)
    rate = _Rate(len(waiting))
    failed: dict[str, str] = {}
    # By the sentinel of their processes: the job, its process and when it began.
    running: dict[int, tuple[Job, Any, float]] = {}
    while waiting or running:
        for job in [job for job in waiting if job.needs & failed.keys()]:
            waiting.remove(job)
            cause = sorted(job.needs & failed.keys())[0]
            failed[job.name] = f"{job.name}: not begun, because {cause} failed"
        ready = [job for job in waiting if job.needs <= finished]
        # A job whose needs were not asked for would wait for ever.
        assert ready or running or not waiting, f"nothing makes what {waiting[0].name} needs"
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            process = _start(job)
            running[process.sentinel] = (job, process, time.monotonic())
        for sentinel in wait([*running]) if running else ():
            assert isinstance(sentinel, int)
            job, process, began = running.pop(sentinel)
            process.join()
            seconds = time.monotonic() - began
            if process.exitcode == 0:
                finished.add(job.name)
                print(rate.line(job.name, seconds), flush=True)
            else:
                failed[job.name] = _failure(job)
                rate.line(job.name, seconds)
                print(failed[job.name], file=sys.stderr, flush=True)
    return [*failed.values()]


def _start(job: Job) -> Any:
    # Forked: an import of the claims in each of hundreds of processes would cost minutes.
    parent = os.getpid()
    process = multiprocessing.get_context("fork").Process(target=_work, args=(job, parent))
    process.start()
    return process


def _work(job: Job, parent: int) -> None:
    die_with_parent(parent)
    # What this process adopts are processes of its own job alone, so the times are those of the
    # job.
    adopt_orphans()
    try:
        job.work()
    except (subprocess.CalledProcessError, OSError) as error:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            log.write(f"{error}\n")
        sys.exit(1)


def _failure(job: Job) -> str:
    # The last line is that of the exception, so the message of the command comes before it.
    lines = last_lines(job.log, 2) or ["it has written nothing"]
    return f"{job.name}: FAILED: {lines[0]} (log: {job.log})"


class _Rate:
    """How fast jobs are finished, in words."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = time.monotonic()
        self._done = 0

    def line(self, name: str, seconds: float) -> str:
        """Return the line for a job that has just ended, and count it."""
        self._done += 1
        passed = max(1e-3, time.monotonic() - self._began)
        left = (self._total - self._done) * passed / self._done
        return (
            f"{name}: done in {seconds:.0f} s ({self._done} of {self._total}, "
            f"{60 * self._done / passed:.1f} a minute, {_time(left)} left)"
        )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
