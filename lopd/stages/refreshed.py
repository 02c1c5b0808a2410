"""One refresh as it lies in the folder of the distill stage: asked for by the trainer's ranks, made
by lopd.stages.refresh, learnt from by the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lopd.artifacts import MANIFEST, publish_json, read_manifest
from lopd.records import Manifest

REQUEST, LOST = "refresh.request.json", "refresh.lost.json"  # in the stage's folder
ROLLOUTS, SCORES, SECONDS = "rollouts", "scores", "seconds.json"  # in a refresh's


@dataclass(frozen=True, slots=True)
class Refresh:
    """The number-th refresh (from 1): before step ``step`` (from 0), for this reason, by the
    weights of this version.
    """

    number: int
    step: int
    reason: str
    version: str

    def folder(self, stage: Path) -> Path:
        return stage / f"refresh-{self.number:04d}"

    def ask(self, stage: Path, *, until: str = SCORES, can_send: bool = False) -> None:
        """until: ROLLOUTS where the scores are asked for later. can_send: where the server has lost
        the weights, say so (LOST), and they are sent again.
        """
        publish_json(
            stage / REQUEST, {"refresh": asdict(self), "until": until, "can_send": can_send}
        )


def finished(refresh: Refresh, stage: Path, part: str = SCORES) -> Manifest | None:
    """The manifest of a refresh's scores (or ROLLOUTS); None: not (all) made yet. Asked again and
    again by the waiting ranks.
    """
    folder = refresh.folder(stage) / part
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    return (
        manifest if manifest.complete and manifest.inputs["refresh.step"] == refresh.step else None
    )


def describe(made: Sequence[Refresh], stage: Path) -> list[dict[str, Any]]:
    """What a manifest says of the refreshes of a training: step, reason, weights, rows, response
    tokens, fingerprint of the scores.
    """
    described = []
    for refresh in made:
        manifest = read_manifest(refresh.folder(stage) / SCORES)
        described.append(
            {
                **asdict(refresh),
                "rows": manifest.rows,
                "tokens": manifest.extra["tokens"],
                "fingerprint": manifest.fingerprint,
            }
        )
    return described
