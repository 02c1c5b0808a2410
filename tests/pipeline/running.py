"""lopd as a user runs it: a process of its own that can be watched and killed, and what it leaves
behind on disk and among the processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.config import Config, load_config
from tests.pipeline.holding import HOLDS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny_moe.toml"
LOPD = Path(sys.executable).with_name("lopd")  # the script that installation made
STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
# an environment variable that every process of one command inherits, whichever session or parent it
# moves to
MARK = "LOPD_TEST_MARK"


@dataclass(frozen=True)
class Finished:
    """What a command came to."""

    code: int  # negative: killed by that signal
    stdout: str
    stderr: str
    seconds: float


class Command:
    """``lopd VERB examples/tiny_moe.toml run.dir=RUN_DIR OVERRIDES...``, started in a session of
    its own.

    holds: places at which it waits until it is released or killed, each STAGE-NUMBER: so many
    shards published, or this step logged (tests.pipeline.holding).
    """

    def __init__(
        self,
        verb: str,
        run_dir: Path,
        overrides: Sequence[str],
        *,
        config: Path = EXAMPLE,
        holds: Sequence[str] = (),
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._groups: set[int] = set()
        outputs = run_dir.with_name(f"{run_dir.name}.commands")
        outputs.mkdir(parents=True, exist_ok=True)
        self._stdout = outputs / f"{self._mark}.out"
        self._stderr = outputs / f"{self._mark}.err"
        self._holds = outputs / f"{self._mark}.holds"
        self._holds.mkdir()
        for place in holds:
            (self._holds / place).touch()
        program = [sys.executable, "-m", "tests.pipeline.holding"] if holds else [LOPD]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._began = time.monotonic()
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self._process = subprocess.Popen(
                [*program, verb, config, f"run.dir={run_dir}", *overrides],
                env={**os.environ, MARK: self._mark, HOLDS: str(self._holds), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                # a Ctrl-C of the person who runs the tests is not one of this command's
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What stands on its screen now."""
        return self._stdout.read_text(errors="replace")

    def wait(self, timeout_s: float = 1200) -> Finished:
        """Until it has ended; a command that hangs is killed and fails the test."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            raise AssertionError(
                f"still running after {timeout_s} s; its output ends:\n{self.output[-2000:]}\n"
                f"{self._stderr.read_text(errors='replace')[-2000:]}"
            ) from None
        return Finished(
            code,
            self.output,
            self._stderr.read_text(errors="replace"),
            time.monotonic() - self._began,
        )

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float = 600) -> None:
        """Until reached() is true; the command must still be running then."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self._process.poll() is not None:
                raise AssertionError(
                    f"ended with {self._process.poll()} before {what}:\n"
                    f"{self.output[-2000:]}\n"
                    f"{self._stderr.read_text()[-2000:]}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {timeout_s} s: {what}; its output ends:\n{self.output[-2000:]}"
                )
            time.sleep(0.03)

    def wait_for(self, place: str) -> None:
        """Until it waits at this one of its holds."""
        self.wait_until((self._holds / f"{place}.held").exists, f"hold {place}")

    def release(self, place: str) -> None:
        (self._holds / f"{place}.held").unlink()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def sleep(self, seconds: float) -> None:
        """Waits so long, or until the command has ended; keeps account of its processes."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            self.processes()
            time.sleep(0.2)

    def send(self, number: signal.Signals) -> None:
        """A signal to lopd alone, not to its children."""
        self._process.send_signal(number)

    def processes(self, containing: str = "") -> list[int]:
        """Ids of every live process of this command, wherever it went, whose command line has this
        text.

        Known by its environment, or by a process group in which such a process was seen: SGLang's
        workers write their title over their environment.
        """
        live = {
            int(entry.name): Path(entry.path)
            for entry in os.scandir("/proc")
            if entry.name.isdigit()
        }
        groups: dict[int, int] = {}
        for process, folder in live.items():
            with contextlib.suppress(OSError):
                state, _, group, *_ = folder.joinpath("stat").read_text().rpartition(")")[2].split()
                if state not in "ZX":
                    groups[process] = int(group)
                    if f"{MARK}={self._mark}\0".encode() in folder.joinpath("environ").read_bytes():
                        self._groups.add(int(group))
        found = []
        for process in sorted(
            process for process, group in groups.items() if group in self._groups
        ):
            with contextlib.suppress(OSError):
                if containing in _command_line(live[process]):
                    found.append(process)
        return found

    def ends_completely(self, within_s: float = 60) -> bool:
        """Whether no process of it is left within so many seconds."""
        deadline = time.monotonic() + within_s
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def kill_child(self, containing: str) -> None:
        """kill -9 of its newest process whose command line has this text."""
        candidates = self.processes(containing)
        assert candidates, f"no process with {containing!r} is running"
        os.kill(candidates[-1], signal.SIGKILL)


def _command_line(folder: Path) -> str:
    """Arguments, or the title that a process gave itself."""
    return folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def lopd(
    verb: str, run_dir: Path, overrides: Sequence[str] = (), *, code: int | None = 0
) -> Finished:
    """Runs a command to its end; code: the exit code it must have (None: any)."""
    finished = Command(verb, run_dir, overrides).wait()
    assert code is None or finished.code == code, (
        f"lopd {verb}: exit code {finished.code}\n"
        f"{finished.stdout[-3000:]}\n"
        f"{finished.stderr[-3000:]}"
    )
    return finished


# ---- what listens ----


@contextlib.contextmanager
def listening_addresses(command: Command) -> Iterator[set[tuple[str, str]]]:
    """While the block lasts, collects (address, program) of every TCP socket on which a process of
    the command listens, by looking again and again.
    """
    seen: set[tuple[str, str]] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(1.0):
            seen.update(_listening(command.processes()))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()


def _listening(processes: Sequence[int]) -> Iterator[tuple[str, str]]:
    sockets: dict[str, str] = {}  # inode -> address as the kernel prints it
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                sockets[fields[9]] = fields[1].partition(":")[0]
    for process in processes:
        folder = Path(f"/proc/{process}")
        with contextlib.suppress(OSError):
            for descriptor in folder.joinpath("fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor)
                    if target.startswith("socket:[") and target[8:-1] in sockets:
                        yield sockets[target[8:-1]], _command_line(folder)[:120]


# 127.0.0.1 and ::1 as /proc/net prints them.
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def config_of(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a command, for what need not be a process."""
    return load_config(EXAMPLE, [f"run.dir={run_dir}", *overrides])


# ---- what is on disk ----


def clone(run_dir: Path, target: Path, stages: Sequence[str]) -> Path:
    """A copy of a finished run as it was when these of its stages were done; times are kept."""
    assert tuple(stages) == STAGES[: len(stages)], "later stages need the earlier ones"
    target.mkdir(parents=True)
    for name in stages:
        shutil.copytree(run_dir / name, target / name)
    shutil.copy2(run_dir / "config.json", target)
    trained = {*stages, *(("sft_longer",) if "evaluate" in stages else ())}
    for events in (run_dir / "tensorboard").iterdir():
        if events.name in trained:
            shutil.copytree(events, target / "tensorboard" / events.name)
    lines = [
        line
        for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        if json.loads(line)["stage"] in trained
    ]
    (target / "metrics.jsonl").write_text("".join(lines))
    return target


def fingerprints(run_dir: Path, stages: Sequence[str]) -> dict[str, str]:
    return {name: read_manifest(run_dir / name).fingerprint for name in stages}


def states(run_dir: Path, overrides: Sequence[str]) -> dict[str, str]:
    """What ``lopd status`` says of each stage, without starting it."""
    return {row["name"]: row["state"] for row in pipeline.status(config_of(run_dir, overrides))}


@dataclass(frozen=True)
class FileState:
    """A file's identity on disk: rewritten with equal content it is another one."""

    inode: int
    mtime_ns: int
    sha256: str


def files(folder: Path, pattern: str = "**/*") -> dict[str, FileState]:
    """Every file below a folder that matches, by its relative path."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file():
            about = path.stat()
            found[str(path.relative_to(folder))] = FileState(
                about.st_ino, about.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


def shards(run_dir: Path, stage: str) -> dict[str, FileState]:
    """The published shards of a stage."""
    return files(run_dir / stage, "shard-*.parquet")


def metrics(run_dir: Path, stage: str, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a stage, in order."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["stage"] == stage and row["kind"] == kind]


def deterministic(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what the clock and the memory of a process decide."""
    volatile = ("seconds", "data_wait_share", "peak_memory_gib")
    return [
        {
            name: value
            for name, value in row.items()
            if name not in volatile and not name.endswith("_per_s")
        }
        for row in rows
    ]


def tensorboard(run_dir: Path, stage: str, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [
        (event.step, event.value)
        for event in EventAccumulator(str(run_dir / "tensorboard" / stage)).Reload().Scalars(tag)
    ]
