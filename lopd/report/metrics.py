"""The run's metrics: ``metrics.jsonl``, one object a line, and TensorBoard event files in
``tensorboard/STAGE``.

A line is {"kind": "train" | "eval", "stage": ..., "step": n, figures...}; step n stands for the
state after n optimizer steps, 0 for the start. A line is written by one system call, so a kill
leaves at most the last one torn, which is dropped. JSON has no NaN: a figure that is not finite is
null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import publish_bytes, remove_folder, storage_errors
from lopd.errors import ArtifactError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_metrics(
    folder: Path, *, kind: str | None = None, stage: str | None = None
) -> list[dict[str, Any]]:
    """The lines of folder/metrics.jsonl in order (none where the file is missing), of one kind and
    stage if given. ArtifactError: a line is no JSON object.
    """
    path = folder / METRICS
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
            matches = kind in (None, row["kind"]) and stage in (None, row["stage"])
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"not a metrics line ({error})", where=f"{path}:{number}", remedy="remove this line"
            ) from None
        if matches:
            rows.append(row)
    return rows


def set_aside(folder: Path, stages: Collection[str], shelf: Path) -> None:
    """Moves these stages' lines and event files from a run's metrics into the folder shelf.
    Repeated after a kill it does the rest.
    """
    rows = read_metrics(folder)
    mine = [row for row in rows if row["stage"] in stages]
    if mine:
        _publish_lines(shelf / METRICS, map(_line, mine))
    for events in [path for path in (folder / TENSORBOARD).glob("*") if path.name in stages]:
        _move_folder(events, shelf / TENSORBOARD / events.name)
    if mine:
        _publish_lines(folder / METRICS, [_line(row) for row in rows if row["stage"] not in stages])


def bring_back(folder: Path, shelf: Path) -> None:
    """Undoes set_aside; does nothing where nothing is set aside."""
    rows = read_metrics(shelf)
    if rows:
        stages = {row["stage"] for row in rows}
        _publish_lines(
            folder / METRICS,
            map(
                _line, [*(row for row in read_metrics(folder) if row["stage"] not in stages), *rows]
            ),
        )
    for events in list((shelf / TENSORBOARD).glob("*")):
        _move_folder(events, folder / TENSORBOARD / events.name)
    (shelf / METRICS).unlink(missing_ok=True)


def _move_folder(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_folder(target)
    source.rename(target)


class MetricsLog:
    """Appends to a run's metrics. One process writes at a time; lines of other stages are left as
    they are.
    """

    def __init__(self, folder: Path) -> None:
        """folder: the run directory. A line torn by a kill is dropped."""
        self._folder = folder
        self._path = folder / METRICS
        self._writers: dict[str, SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            _publish_lines(self._path, _whole_lines(self._path))

    def train(self, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        """Figures of one optimizer step."""
        self._write("train", stage, step, figures)

    def eval(self, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        """Figures of an evaluation after so many steps."""
        self._write("eval", stage, step, figures)

    def truncate_after(self, stage: str, step: int) -> None:
        """Drops the stage's lines beyond the checkpoint at ``step``, so that a resumed run doubles
        none; step 0, a start from nothing, drops all of them.

        TensorBoard is told to hide what it has from there on (its purge_step).
        """
        assert stage not in self._writers, "truncate before the stage's first figure is written"
        first_dropped = step + 1 if step > 0 else 0
        self._purge_steps[stage] = first_dropped
        rows = read_metrics(self._folder)
        kept = [row for row in rows if row["stage"] != stage or row["step"] < first_dropped]
        if len(kept) < len(rows):
            _publish_lines(self._path, map(_line, kept))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _write(self, kind: str, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        with storage_errors(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(
                    descriptor,
                    (
                        _line({"kind": kind, "stage": stage, "step": step, **figures}) + "\n"
                    ).encode(),
                )
            finally:
                os.close(descriptor)
        writer = self._tensorboard(stage)
        for name, value in figures.items():
            if isinstance(value, int | float):
                writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()  # a kill loses no figure that stands in metrics.jsonl

    def _tensorboard(self, stage: str) -> SummaryWriter:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[stage] = SummaryWriter(
                str(self._folder / TENSORBOARD / stage), purge_step=self._purge_steps.get(stage)
            )
        return self._writers[stage]


def _publish_lines(path: Path, lines: Iterable[str]) -> None:
    publish_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False, ensure_ascii=False)


def _whole_lines(path: Path) -> list[str]:
    """The lines that end with a line break; what follows the last one was torn by a kill."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return content.split("\n")[:-1]
