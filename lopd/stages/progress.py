"""How far a stage is, from the files that it publishes while it runs.

Another process may be running the stage now. Nothing is locked, and few bytes are read, so
``lopd status`` can ask at any time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.artifacts import MANIFEST, expected_shards
from lopd.report.metrics import last_step
from lopd.stages.context import StageContext
from lopd.stages.evaluate import LONGER, models_of
from lopd.stages.training import JOB


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done of a stage, in units that it publishes or computes one after the other."""

    # "step", "shard" or "model".
    unit: str
    done: int
    total: int
    # What of the stage this is, where it has several parts: "answers", "scores".
    part: str = ""

    def __str__(self) -> str:
        text = f"{self.unit} {self.done} of {self.total}"
        return f"{self.part}: {text}" if self.part else text


def progress_of(context: StageContext) -> Progress | None:
    """Return how far a stage is that is begun and not done, or None where nothing says so."""
    name = context.stage.name
    if name in ("sft", "distill"):
        # Before the ranks have a job, servers start.
        planned = getattr(context.config, name).num_steps
        return _training(context.folder, context.config.run.dir, planned=planned)
    if name == "evaluate":
        return _evaluation(context)
    return _shards(context.folder)


def _training(
    folder: Path, run_dir: Path, *, part: str = "", planned: int | None = None
) -> Progress | None:
    """Return the newest step of a training.

    Args:
        folder: The folder of the training, with its job.
        run_dir: The run directory, with the metrics.
        part: See Progress.
        planned: The number of steps if there is no job yet.
    """
    total = _read(folder / JOB).get("num_steps")
    if isinstance(total, int):
        return Progress("step", last_step(run_dir, folder.name), total, part)
    # The metrics may still have the steps of a former training.
    return None if planned is None else Progress("step", 0, planned, part)


def _shards(folder: Path) -> Progress | None:
    # The number stands in the folder, because it follows from prompts that are not read here.
    total = expected_shards(folder)
    if total is None:
        return None
    return Progress("shard", sum(1 for _ in folder.glob("shard-*.parquet")), total)


def _evaluation(context: StageContext) -> Progress | None:
    """Return how far evaluate is: the longer SFT, then answers, then scores of each model."""
    folder = context.folder
    models = models_of(context)
    for part in ("scores", "answers"):
        # The newest part that has begun.
        if any(folder.glob(f"{part}-*")):
            done = sum(_is_complete(folder / f"{part}-{model}") for model in models)
            return Progress("model", done, len(models), part)
    return _training(folder / LONGER, context.config.run.dir, part=LONGER)


def _is_complete(folder: Path) -> bool:
    return bool(_read(folder / MANIFEST).get("complete"))


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file that decides nothing: empty where it is missing or damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
