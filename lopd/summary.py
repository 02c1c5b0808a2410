"""summary.json and the learning curve: what a run came to, read from the stages' manifests."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lopd.artifacts import publish_json, read_manifest
from lopd.config import Config
from lopd.errors import DataError
from lopd.records import Manifest
from lopd.report.console import say

FILE = "summary.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a stage in one command."""

    name: str
    status: Literal["done", "reused"]
    seconds: float


def write(config: Config, outcomes: Sequence[Outcome], standing: Collection[str]) -> dict[str, Any]:
    """Publishes run.dir/summary.json and returns it.

    standing: the stages that are done under this configuration; figures of others, made from other
    knobs, would not belong together.
    """
    run_dir = config.run.dir
    made = {
        name: read_manifest(run_dir / name)
        for name in ("score", "distill", "evaluate")
        if name in standing
    }
    summary: dict[str, Any] = {
        "stages": [
            {"name": done.name, "status": done.status, "seconds": round(done.seconds, 3)}
            for done in outcomes
        ]
    }
    if "score" in made:
        figures = made["score"].extra
        summary["cache"] = {
            "rows": made["score"].rows,
            "tokens": figures["tokens"],
            "bytes_per_token": round(figures["bytes_per_token"], 4),
        }
        summary["teacher"] = dict(made["score"].lineage)
        if not made["score"].lineage["consistent"]:
            summary["notes"] = [
                "WARNING: score.allow_foreign_teacher is set: the scoring teacher did not make the student's demonstrations"
            ]
    if "distill" in made:
        summary["distill"] = {
            name: made["distill"].extra[name]
            for name in ("num_steps", "num_tokens", "first_loss", "last_loss", "weight_syncs")
        }
        if "score" in made:
            summary["teacher_work"] = teacher_work(run_dir, made["score"], made["distill"])
        else:  # distill.cache
            summary["teacher"] = dict(made["distill"].lineage)
            summary["notes"] = [f"distill.cache: {made['distill'].lineage['cache']['note']}"]
    if "evaluate" in made:
        figures = made["evaluate"].extra
        counts = {
            "num_prompts": figures["num_prompts"],
            "samples_per_prompt": figures["samples_per_prompt"],
        }
        for quantity in ("accuracy", "reverse_kl"):
            summary[quantity] = {
                **{name: value["mean"] for name, value in figures[quantity].items()},
                **counts,
            }
            summary[f"{quantity}_standard_error"] = {
                name: value["standard_error"] for name, value in figures[quantity].items()
            }
        summary["sft_longer"] = figures["sft_longer"]
    publish_json(run_dir / FILE, summary)
    return summary


def teacher_work(run_dir: Path, score: Manifest, distill: Manifest) -> dict[str, float]:
    """What the teacher was needed for after the demonstrations, in the score stage and in the
    refreshes of distill.

    tokens: response tokens scored. seconds: in which it started or scored, by the commands that
    finished the stage and each refresh.
    """
    refreshes = distill.extra.get("refreshes", [])
    served = [
        _seconds(path, "teacher_seconds")
        for path in sorted((run_dir / "distill").glob("refresh-*/seconds.json"))
    ]
    return {
        "refreshes": len(refreshes),
        "tokens": score.extra["tokens"] + sum(refresh["tokens"] for refresh in refreshes),
        "seconds": round(_seconds(run_dir / "score" / "seconds.json", "seconds") + sum(served), 3),
    }


def _seconds(path: Path, name: str) -> float:
    """0 where the file, which decides nothing, is missing or damaged."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def draw(config: Config) -> None:
    """Publishes the learning curve; without metrics to draw there is none, which is no reason for a
    run to fail.
    """
    from lopd.report.curve import draw_learning_curve

    try:
        draw_learning_curve(config.run.dir)
    except DataError as error:
        say(f"no learning curve: {error}", config.run.dir / "log.txt")
