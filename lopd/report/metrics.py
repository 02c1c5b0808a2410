"""The metrics of a run: ``metrics.jsonl``, and the trackers of ``report.trackers``.

A line of metrics.jsonl is an object with ``kind`` ("train" or "eval"), ``stage``, ``step`` and the
metrics (lopd.report.metric_schema). Step n is the state after n optimizer steps, and 0 is the
start. JSON has no NaN, so a figure that is not finite is null.

One system call writes a line. A kill therefore leaves at most the last line incomplete, and readers
drop it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lopd.artifacts import publish_bytes, remove_folder, storage_errors
from lopd.errors import ArtifactError
from lopd.report.console import print_line
from lopd.report.trackers import (
    TENSORBOARD,
    TRACKERS,
    TrackedTraining,
    Tracker,
    missing_package,
    numbers_of,
    open_tracker,
)

METRICS = "metrics.jsonl"
# Bytes at the end of metrics.jsonl in which the newest step is looked for. A line has about 1 KiB.
_END_BYTES = 2**18
# Below it the rollouts are no longer those of the student that trains. A rule of thumb.
LOW_EFFECTIVE_SHARE = 0.5
# The last steps, over which noisy figures of single batches are averaged.
_LAST_STEPS = 4


def mean_of_last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a figure over the last steps that have it; None if none has it."""
    values = [row[name] for row in rows if row.get(name) is not None][-_LAST_STEPS:]
    return sum(values) / len(values) if values else None


def worst_step(
    rows: Sequence[Mapping[str, Any]], name: str, *, lowest: bool
) -> tuple[float, int] | None:
    """Return the worst value of a figure and its step; None if no step has the figure.

    Args:
        rows: Lines of metrics.jsonl.
        name: The figure.
        lowest: Whether the lowest value is the worst one.
    """
    known = [(float(row[name]), int(row["step"])) for row in rows if row.get(name) is not None]
    if not known:
        return None
    return min(known, key=lambda pair: pair[0] if lowest else -pair[0])


def read_metrics(
    folder: Path, *, kind: str | None = None, stage: str | None = None
) -> list[dict[str, Any]]:
    """Return the lines of folder/metrics.jsonl in order. A missing file has none.

    Args:
        kind: Return only lines of this kind.
        stage: Return only lines of this stage.

    Raises:
        ArtifactError: A line is not a JSON object with a kind and a stage.
    """
    path = folder / METRICS
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            # Only a line that somebody has edited can fail here, so the error names it.
            row = json.loads(line)
            # A line without a kind or a stage is refused even if neither was asked for.
            matches = kind in (None, row["kind"]) and stage in (None, row["stage"])
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"this is not a line of metrics ({error})",
                where=f"{path}:{number}",
                remedy="remove this line",
            ) from None
        if matches:
            rows.append(row)
    return rows


def last_step(folder: Path, stage: str) -> int:
    """Return the newest step of a training, from the end of folder/metrics.jsonl; 0 if none.

    Args:
        folder: The run directory.
        stage: The name under which the training logs.
    """
    path = folder / METRICS
    try:
        with path.open("rb") as handle:
            # The file grows with every step. Its end is enough, since one stage runs at a time.
            handle.seek(max(0, path.stat().st_size - _END_BYTES))
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        # The first line of the end is cut, and the last one may be half written.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row["kind"] == "train" and row["stage"] == stage:
                return int(row["step"])
    return 0


def set_aside(folder: Path, stages: Collection[str], archive: Path) -> None:
    """Move the metrics of some stages into another folder.

    A call that was killed can be repeated, and does the rest.

    Args:
        folder: The run directory.
        archive: The folder that gets the lines and the files of the trackers.
    """
    rows = read_metrics(folder)
    # All lines of a stage move, whatever their kind.
    moved = [row for row in rows if row["stage"] in stages]
    # The lines are copied first and removed last. A kill in between leaves them in both places,
    # where the next call finds them.
    if moved:
        _publish_lines(archive / METRICS, moved)
    for kind in (TENSORBOARD, TRACKERS):
        # A list, because the loop takes away what the glob walks over.
        for files in [path for path in (folder / kind).glob("*") if path.name in stages]:
            _move_folder(files, archive / kind / files.name)
    if moved:
        _publish_lines(folder / METRICS, (row for row in rows if row["stage"] not in stages))


def bring_back(folder: Path, archive: Path) -> None:
    """Undo set_aside(). Does nothing if nothing is set aside."""
    rows = read_metrics(archive)
    if rows:
        stages = {row["stage"] for row in rows}
        # A killed call may have brought these lines back already. They must not be there twice.
        others = [row for row in read_metrics(folder) if row["stage"] not in stages]
        _publish_lines(folder / METRICS, [*others, *rows])
    for kind in (TENSORBOARD, TRACKERS):
        for files in list((archive / kind).glob("*")):
            _move_folder(files, folder / kind / files.name)
    # Removed last, because a repeated call needs it.
    (archive / METRICS).unlink(missing_ok=True)


def _move_folder(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A killed call may have left an older copy there. A rename onto a folder with files would fail.
    remove_folder(target)
    source.rename(target)


class MetricsLog:
    """Appends to the metrics of a run. One process writes at a time.

    Args:
        folder: The run directory.
        trackers: The names of the trackers that get the metrics too.
        project: The project that the trackers put the run into.
        knobs: The flat configuration for the trackers, without secrets.

    Raises:
        ConfigError: The package of a tracker is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        trackers: Sequence[str] = (TENSORBOARD,),
        project: str = "lopd",
        knobs: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._path = folder / METRICS
        # Said at once, and not after the first step.
        for name in trackers:
            problem = missing_package(name)
            if problem is not None:
                raise problem
        self._names = tuple(dict.fromkeys(trackers))
        self._project = project
        self._knobs = dict(knobs or {})
        # The open trackers of each stage by their names.
        self._trackers: dict[str, dict[str, Tracker]] = {}
        self._first_steps: dict[str, int] = {}
        # What remains of the last line after a kill. The next line would be written behind it.
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            _publish_text(self._path, _whole_lines(self._path))

    def train(self, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        """Append the metrics of one optimizer step."""
        self._write("train", stage, step, figures)

    def eval(self, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        """Append the metrics of an evaluation after so many steps."""
        self._write("eval", stage, step, figures)

    def truncate_after(self, stage: str, step: int) -> None:
        """Remove those lines of the stage that are newer than the checkpoint at ``step``.

        A resumed run repeats these steps, and no line may be in the file twice. Step 0 means that
        there is no checkpoint, so all lines of the stage are removed.
        """
        # A tracker is told when it is opened.
        assert stage not in self._trackers, "truncate before the stage's first figure is written"
        # A start from nothing also repeats the evaluation at step 0.
        first_dropped = step + 1 if step > 0 else 0
        self._first_steps[stage] = first_dropped
        rows = read_metrics(self._folder)
        kept = [row for row in rows if row["stage"] != stage or row["step"] < first_dropped]
        # Most starts have nothing to drop, and then the file is not written again.
        if len(kept) < len(rows):
            _publish_lines(self._path, kept)

    def close(self) -> None:
        """Close the trackers."""
        for stage, opened in self._trackers.items():
            for name, tracker in opened.items():
                self._guarded(stage, name, tracker.close)
        self._trackers.clear()

    def _write(self, kind: str, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        with storage_errors(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            line = _line({"kind": kind, "stage": stage, "step": step, **figures})
            # One write() to the end of the file, without a buffer that a kill could cut in two.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)
        numbers = numbers_of(figures)
        if stage not in self._trackers:
            self._open(stage)
        opened = self._trackers[stage]
        for name, tracker in list(opened.items()):
            # A tracker that fails is left out from now on. The training goes on, and the file has
            # the line already.
            if not self._guarded(stage, name, partial(tracker.log, kind, step, numbers)):
                del opened[name]

    def _open(self, stage: str) -> None:
        """Open the trackers of a stage at its first metrics."""
        # TensorBoard finds its own files again.
        needs_earlier = any(name != TENSORBOARD for name in self._names)
        # The last line is the one that opens the trackers.
        earlier = read_metrics(self._folder, stage=stage)[:-1] if needs_earlier else []
        first_step = self._first_steps.get(stage)
        about = TrackedTraining(
            self._folder, stage, self._project, self._knobs, first_step, earlier
        )
        opened: dict[str, Tracker] = {}

        def open_one(name: str) -> None:
            opened[name] = open_tracker(name, about)

        for name in self._names:
            self._guarded(stage, name, partial(open_one, name))
        self._trackers[stage] = opened

    def _guarded(self, stage: str, name: str, call: Callable[[], None]) -> bool:
        """Call a tracker. Return False, after a line on the screen, where it fails."""
        try:
            call()
        except Exception as error:
            # TensorBoard only writes files of ours. What fails there fails for the run too.
            if name == TENSORBOARD:
                raise
            # Every class is caught: each package has its own. A tracker is not worth a training of
            # days, and metrics.jsonl has all metrics.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print_line(
                f"{stage} WARNING: the tracker {name} has failed ({reason:.200}) and gets no more "
                f"metrics; {METRICS} has them all"
            )
            return False
        return True


def _publish_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    _publish_text(path, map(_line, rows))


def _publish_text(path: Path, lines: Iterable[str]) -> None:
    publish_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def _line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    # allow_nan=False: a NaN that slipped through must fail here and not in the reader of the file.
    return json.dumps(finite, allow_nan=False, ensure_ascii=False)


def _whole_lines(path: Path) -> list[str]:
    """Return the lines that end with a line break."""
    # What follows the last line break is what a kill has left. It may also end within a character,
    # so errors of UTF-8 are replaced.
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return content.split("\n")[:-1]
