"""How a run stands, from the files in its run directory alone.

The run may be on another machine that shares the file system. Nothing is written, locked or sent,
and of a large file only the end is read. A file may be missing or half written at any moment, so
nothing here is an error: what is not known is None.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lopd.artifacts import MANIFEST, expected_shards
from lopd.report.metrics import METRICS

# The stages in the order of the pipeline. A test compares them with lopd.stages.order, which this
# package may not import.
STAGE_NAMES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
TRAININGS = ("sft", "distill", "sft_longer")
# Bytes at the end of a server's log in which its newest batch is looked for.
_LOG_END = 2**14
# How many lines of metrics.jsonl are kept, and of the newest ones none is left out.
_MOST_ROWS = 8192
_NEWEST_ROWS = 256
# Steps, or shards, over which a rate is taken.
_RECENT = 8
# SGLang writes "Decode batch, #running-req: 4, token usage: 0.02, ..." once every few batches.
_FIGURE = re.compile(r"(?:, |batch, |^)#?([a-z][a-z -]*?(?: \(token/s\))?): ([\d.]+)")
# What a server's line says of its load, and its names here.
_LOAD = {
    "running-req": "running",
    "queue-req": "queued",
    "token usage": "cache_use",
    "gen throughput (token/s)": "tokens_per_s",
    "input throughput (token/s)": "tokens_per_s",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What is done of a stage that has begun.

    Attributes:
        unit: "step", "shard" or "model".
        done: How many.
        total: Of how many; None where nothing says so.
        part: What of the stage this is, where it has several parts: "answers", "sft_longer".
        rate: How many in a second.
    """

    unit: str
    done: int
    total: int | None
    part: str = ""
    rate: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Return the time left at this rate. Evaluations between steps are not in it."""
        if not self.rate or self.total is None:
            return None
        return max(0, self.total - self.done) / self.rate


@dataclass(frozen=True, slots=True)
class StageState:
    """One stage: "done", "begun", "outdated" (one before it runs again), or "absent"."""

    name: str
    state: str
    seconds: float | None = None
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the log of a server says.

    Attributes:
        name: Of the log, for example "distill/sglang-student".
        starts: How often it was started, or None.
        load: "running", "queued", "cache_use" (a share), "tokens_per_s", as far as they are known.
        age_s: Seconds since the log has grown.
    """

    name: str
    starts: int | None
    load: Mapping[str, float]
    age_s: float


@dataclass(frozen=True, slots=True)
class RunState:
    """A run at one moment.

    Attributes:
        stages: In the order of the pipeline.
        current: The stage that has begun and is not done, or None.
        rows: The lines of metrics.jsonl.
        servers: Of the current stage.
        age_s: Seconds since any of the run's files has changed; None where it has none.
        process: The process that holds the run on this machine, or None: it is over, or elsewhere.
        last_line: The last line that the run has said.
        summary: The content of summary.json; empty where there is none.
    """

    run_dir: Path
    stages: Sequence[StageState]
    current: StageState | None
    rows: Sequence[Mapping[str, Any]]
    servers: Sequence[ServerState]
    age_s: float | None
    process: int | None
    last_line: str
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for."""
        return self.current is None and self.process is None and self.stages[-1].state == "done"

    def training(self) -> str | None:
        """Return the training that a reader wants to see; None where no figures are there yet."""
        named = {row["stage"] for row in self.rows}
        # The equal-compute baseline is the newest training and seldom the one to look at.
        part = self.current.work.part if self.current is not None and self.current.work else ""
        # What runs now goes first. After the run the distillation is what a reader wants to see.
        wanted = (part, self.current.name if self.current is not None else "", "distill", "sft")
        return next((name for name in wanted if name in named), None)


@dataclass(slots=True)
class MetricsTail:
    """Reads metrics.jsonl again and again, and each time only what is new."""

    path: Path
    _place: int = 0
    _inode: int = 0
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return the whole lines so far. What is no line of metrics is left out.

        The first line, the newest lines and all evaluations are always there. Of a long run, lines
        of steps in between are left out.
        """
        try:
            with self.path.open("rb") as handle:
                about = self.path.stat()
                # A resumed training replaces the file, which is then another one, or shorter.
                if about.st_ino != self._inode or about.st_size < self._place:
                    self._place = 0
                    self._rows = []
                    self._inode = about.st_ino
                # Only what is new: a long run has many megabytes of metrics, and a frame is drawn
                # every few seconds.
                handle.seek(self._place)
                for line in handle:
                    # The last line may be half written.
                    if not line.endswith(b"\n"):
                        break
                    self._place += len(line)
                    self._add(_object(line.decode(errors="replace")))
        except OSError:
            pass
        return self._rows

    def _add(self, row: dict[str, Any]) -> None:
        if not {"kind", "stage", "step"} <= row.keys():
            return
        self._rows.append(row)
        if len(self._rows) > _MOST_ROWS:
            # A curve of one line needs no more. Else a run of 100,000 steps would take a GiB.
            newest = self._rows[-_NEWEST_ROWS:]
            older = self._rows[:-_NEWEST_ROWS]
            kept = [one for n, one in enumerate(older) if n % 2 == 0 or one["kind"] == "eval"]
            self._rows = kept + newest


def state_of(run_dir: Path, tail: MetricsTail | None = None) -> RunState:
    """Return how a run stands.

    Args:
        run_dir: The run directory.
        tail: The reader of its metrics, if it was read before.
    """
    rows = (tail or MetricsTail(run_dir / METRICS)).rows()
    stages = _stages(run_dir, rows)
    begun = [stage for stage in stages if stage.state == "begun"]
    # The first one: a later stage cannot be at work before it is done.
    current = begun[0] if begun else None
    folder = run_dir / current.name if current is not None else None
    return RunState(
        run_dir=run_dir,
        stages=stages,
        current=current,
        rows=rows,
        servers=_servers(folder) if folder is not None else (),
        age_s=_age(run_dir, folder),
        process=holder_of(run_dir),
        last_line=_last_line(folder),
        summary=_read(run_dir / "summary.json"),
    )


def _stages(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> list[StageState]:
    # The fingerprints of what is done, by the name of the stage.
    made: dict[str, str] = {}
    states = []
    for name in STAGE_NAMES:
        folder = run_dir / name
        manifest = _read(folder / MANIFEST)
        # The pipeline writes it when a stage is done. Nothing else knows how long a stage took.
        seconds = _read(folder / "seconds.json").get("seconds")
        if manifest.get("complete"):
            # A stage that runs again has another fingerprint than the one that was read here.
            parents = manifest.get("parents", {})
            same = all(made.get(parent) == known for parent, known in parents.items())
            made[name] = str(manifest.get("fingerprint"))
            states.append(StageState(name, "done" if same else "outdated", seconds))
        # A folder without a complete manifest: the stage is at work, or was killed in the middle of
        # it.
        elif folder.is_dir():
            states.append(StageState(name, "begun", None, _work(run_dir, name, rows)))
        else:
            states.append(StageState(name, "absent"))
    return states


def _work(run_dir: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Work | None:
    folder = run_dir / name
    if name in TRAININGS:
        return _training(folder, name, rows)
    if name != "evaluate":
        return _shards(folder)
    for part in ("scores", "answers"):
        # The newest part that has begun.
        parts = [*folder.glob(f"{part}-*/")]
        if parts:
            done = sum(bool(_read(path / MANIFEST).get("complete")) for path in parts)
            # The record of the stage before. The other four models are always evaluated.
            longer = _read(run_dir / "config.json").get("evaluate.equal_compute_baseline")
            return Work("model", done, None if longer is None else 4 + bool(longer), part)
    return _training(folder / "sft_longer", "sft_longer", rows)


def _training(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Work | None:
    total = _read(folder / "job.json").get("num_steps")
    own = [row for row in rows if row["kind"] == "train" and row["stage"] == name]
    if not isinstance(total, int):
        return None
    seconds = [row["seconds"] for row in own[-_RECENT:] if row.get("seconds")]
    # The median, because the first step of a process is slower than the others.
    rate = 1 / statistics.median(seconds) if seconds else None
    part = "" if name in ("sft", "distill") else name
    return Work("step", own[-1]["step"] if own else 0, total, part, rate)


def _shards(folder: Path) -> Work | None:
    times = sorted(_changed_at(path) for path in folder.glob("shard-*.parquet"))
    newest = times[-_RECENT:]
    # The times of change are enough for a rate, and a stage writes no other clock.
    took = newest[-1] - newest[0] if newest else 0.0
    rate = (len(newest) - 1) / took if took > 0 else None
    total = expected_shards(folder)
    return None if total is None and not times else Work("shard", len(times), total, rate=rate)


def _servers(folder: Path) -> list[ServerState]:
    found = []
    for log in sorted(folder.glob("sglang-*.log")):
        # Only the end of the log: a server of a long stage writes many megabytes.
        batches = [line for line in _end(log, _LOG_END) if " batch, #" in line]
        load = {}
        if batches:
            for name, value in _FIGURE.findall(batches[-1]):
                if name in _LOAD:
                    load[_LOAD[name]] = float(value)
        # Beside the weights file each server counts its own starts.
        starts = [_number(path) for path in folder.glob(f"{log.name}.weights.json.*.starts")]
        name = f"{folder.name}/{log.stem}"
        age = time.time() - _changed_at(log)
        found.append(ServerState(name, sum(starts) if starts else None, load, age))
    return found


def _age(run_dir: Path, folder: Path | None) -> float | None:
    """Return the seconds since a file of the run has changed."""
    paths = [run_dir / METRICS, run_dir / "summary.json", run_dir / ".lock"]
    if folder is not None:
        # Not those below, of which a model or checkpoints may have thousands.
        paths += [*folder.glob("*"), *folder.glob("*/shard-*.parquet")]
    times = [changed for path in paths if (changed := _changed_at(path))]
    return max(0.0, time.time() - max(times)) if times else None


def holder_of(run_dir: Path) -> int | None:
    """Return the process of this machine that holds the run, without touching the lock."""
    lock = run_dir / ".lock"
    try:
        inode = lock.stat().st_ino
        held = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        # The holder has written its number into the lock.
        process = int(lock.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    # The file stays when its process ends, so the kernel is asked who holds it. A line ends with
    # the process, MAJOR:MINOR:INODE and the range.
    holds = any(f":{inode} " in line and f" {process} " in line for line in held)
    return process if holds else None


def _last_line(folder: Path | None) -> str:
    """Return the newest line of the stage's two logs, without its time."""
    if folder is None:
        return ""
    logs = [path for name in ("log.txt", "train.log") if (path := folder / name).is_file()]
    lines = _end(max(logs, key=_changed_at), _LOG_END) if logs else []
    said = [line for line in lines if line.strip()]
    return re.sub(r"^\d{4}-\d\d-\d\dT[\d:]+Z ", "", said[-1]) if said else ""


def _end(path: Path, num_bytes: int) -> list[str]:
    """Return the lines in the last bytes of a file. The first of them may be cut."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - num_bytes))
            return handle.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
