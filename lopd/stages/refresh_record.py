"""The record of one refresh, and its files in the folder of the distill stage.

The trainer's ranks ask for a refresh (lopd.stages.refresh_requester), the parent process makes it
(lopd.stages.refresh_service), and the ranks learn from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lopd.artifacts import MANIFEST, publish_json, read_manifest
from lopd.records import Manifest

# In the folder of the stage: what rank 0 asks for, and the answer that a server has lost the
# weights.
REQUEST = "refresh.request.json"
LOST = "refresh.lost.json"
# In the folder of a refresh: the student's responses, the same with teacher_logprobs, and the
# seconds that the teacher took.
ROLLOUTS = "rollouts"
SCORES = "scores"
SECONDS = "seconds.json"


@dataclass(frozen=True, slots=True)
class RefreshRecord:
    """One refresh of the responses."""

    # Counts the refreshes of a training, from 1.
    number: int
    # The first step that learns from it, counted from 0.
    step: int
    # Why it was made, for example "10 steps".
    reason: str
    # The weight version that samples, for example "step-10".
    version: str

    def folder(self, stage: Path) -> Path:
        return stage / f"refresh-{self.number:04d}"

    def request(self, stage: Path, *, until: str = SCORES, can_send: bool = False) -> None:
        """Ask the parent process to make this refresh.

        Args:
            stage: The folder of the stage.
            until: SCORES, or ROLLOUTS where the scores are requested later.
            can_send: Whether the ranks can send the weights again. If a server has lost them, the
                parent then publishes LOST and does not raise an error.
        """
        # Published as a whole: the parent may look at any moment and must never read half of it.
        request = {"refresh": asdict(self), "until": until, "can_send": can_send}
        publish_json(stage / REQUEST, request)


def completed(refresh: RefreshRecord, stage: Path, part: str = SCORES) -> Manifest | None:
    """Return the manifest of a refresh's scores (or rollouts); None until all of it is published.

    Waiting ranks call this again and again, so it reads no more than one file.
    """
    folder = refresh.folder(stage) / part
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    # A killed training that is not repeated to the bit may have refreshed before another step.
    same_step = manifest.inputs["refresh.step"] == refresh.step
    return manifest if manifest.complete and same_step else None


def describe(made: Sequence[RefreshRecord], stage: Path) -> list[dict[str, Any]]:
    """Return what the stage's manifest tells of each refresh.

    The fields of the record, and of its scores rows, tokens (response tokens) and fingerprint.
    """
    described: list[dict[str, Any]] = []
    for refresh in made:
        # The scores are the last artifact of a refresh, so their manifest describes the whole of
        # it.
        manifest = read_manifest(refresh.folder(stage) / SCORES)
        figures = {
            "rows": manifest.rows,
            "tokens": manifest.extra["tokens"],
            "fingerprint": manifest.fingerprint,
        }
        described.append({**asdict(refresh), **figures})
    return described
