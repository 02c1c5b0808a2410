"""One refresh as it lies in the folder of the distill stage: asked for by the trainer's ranks, made by lopd.stages.refresh, learnt from by the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lopd.artifacts import MANIFEST, publish_json, read_manifest
from lopd.records import Manifest

REQUEST = "refresh.request.json"  # in the stage's folder
ROLLOUTS, SCORES, SECONDS = "rollouts", "scores", "seconds.json"  # in a refresh's


@dataclass(frozen=True, slots=True)
class Refresh:
    """The number-th refresh (from 1): before step ``step`` (from 0), for this reason, by the weights of this version."""

    number: int
    step: int
    reason: str
    version: str

    def folder(self, stage: Path) -> Path:
        return stage / f"refresh-{self.number:04d}"

    def ask(self, stage: Path) -> None:
        publish_json(stage / REQUEST, asdict(self))


def finished(refresh: Refresh, stage: Path) -> Manifest | None:
    """The manifest of a refresh's scores; None: not (all) made yet. Asked again and again by the waiting ranks."""
    folder = refresh.folder(stage) / SCORES
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    return manifest if manifest.complete and manifest.inputs["refresh.step"] == refresh.step else None


def describe(made: Sequence[Refresh], stage: Path) -> list[dict[str, Any]]:
    """What a manifest says of the refreshes of a training: step, reason, weights, rows, response tokens, fingerprint of the scores."""
    described = []
    for refresh in made:
        manifest = read_manifest(refresh.folder(stage) / SCORES)
        described.append({**asdict(refresh), "rows": manifest.rows, "tokens": manifest.extra["tokens"], "fingerprint": manifest.fingerprint})
    return described
