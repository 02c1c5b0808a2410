"""Which stages of a run were made from an earlier artifact than the present one.

``lopd distill`` makes a new student and leaves the evaluation and the export of the earlier one
where they are. Their figures are true of that student alone, and the page says so at each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lopd.artifacts import MANIFEST, published_weights, read_manifest
from lopd.errors import ArtifactError
from lopd.records import Manifest
from lopd.report.console import MODEL_TITLES
from lopd.report.html.source import STAGES, Source

# Hexadecimal digits of a fingerprint on the page: enough to tell artifacts apart.
DIGITS = 12
# Where lopd keeps the former results of a stage.
_SUPERSEDED = "superseded"
# What a stage makes that others are made from.
_GIVES = {
    "demonstrate": "demonstrations",
    "sft": "SFT student",
    "rollout": "rollouts",
    "score": "cache",
    "distill": "distilled student",
}
# The stage whose artifact the answers of a model depend on.
_MODEL_STAGES = {"sft": "sft", "distilled": "distill", "sft_longer": "distill"}


@dataclass(frozen=True, slots=True)
class Outdated:
    """What is wrong with a stage that is outdated.

    Attributes:
        stage: The stage that was made directly from an earlier artifact. It is the outdated stage
            itself, or one that the outdated stage was made from.
        parent: The stage that has made that artifact, and has made another one since.
        earlier: The earlier artifact by its weights or its fingerprint, with the word before.
        present: The digits of the present one, or "not finished".
    """

    stage: str
    parent: str
    earlier: str
    present: str

    @property
    def what(self) -> str:
        """What was made again, for people."""
        return _GIVES.get(self.parent, self.parent)

    @property
    def told(self) -> str:
        """The end of a sentence about an evaluation: of which student it is."""
        if self.stage == "evaluate":
            return (
                f"an earlier {self.what} ({self.earlier}), not of the present one ({self.present})"
            )
        return (
            f"a student that was made from an earlier {self.what} ({self.earlier}), not from the "
            f"present one ({self.present})"
        )


def outdated_stages(source: Source) -> dict[str, Outdated]:
    """Return the outdated stages of a run by their name, in the order of the pipeline."""
    found: dict[str, Outdated] = {}
    if source.kind != "run":
        return found
    for name in STAGES:
        manifest = source.manifests.get(name)
        if manifest is None:
            continue
        direct = [_compared(source, name, *parent) for parent in manifest.parents.items()]
        inherited = [found.get(parent) for parent in manifest.parents]
        reasons = [one for one in (*direct, *inherited) if one is not None]
        if reasons:
            # Of several the latest one: where both students were made again, the distilled student
            # is the one that an evaluation is about.
            found[name] = max(reasons, key=lambda one: STAGES.index(one.parent))
    return found


def told_of(outdated: Mapping[str, Outdated]) -> Iterator[tuple[list[str], str]]:
    """Yield what to say once of each artifact that was made again.

    Args:
        outdated: What outdated_stages returns.

    Yields:
        The outdated stages that were made from the earlier artifact, and a sentence about them.
    """
    by_artifact: dict[tuple[str, str], list[str]] = {}
    for name, wrong in outdated.items():
        by_artifact.setdefault((wrong.parent, wrong.earlier), []).append(name)
    for (parent, earlier), names in by_artifact.items():
        present = outdated[names[0]].present
        verb = "was" if len(names) == 1 else "were"
        if names == ["export"]:
            asked = "do not use the exported model"
        else:
            asked = f"do not compare {'its' if len(names) == 1 else 'their'} figures"
            if "export" in names:
                asked += ", and do not use the exported model"
        yield (
            names,
            f"{listed(names)} {verb} made from an earlier {parent} ({earlier}), not from the "
            f"present one ({present}): {asked}, until `lopd run CONFIG` has made "
            f"{'it' if len(names) == 1 else 'them'} again.",
        )


def listed(names: Sequence[str]) -> str:
    """Return names as in a sentence: ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def earlier_models(source: Source, stage: str) -> dict[str, str]:
    """Return the titles of the models whose answers a stage has of an earlier artifact, by name.

    Args:
        source: The run.
        stage: The stage with the answers.
    """
    outdated = outdated_stages(source)
    manifest = source.manifests.get(stage)
    if manifest is None or stage not in outdated:
        return {}
    titles = {}
    for model, maker in _MODEL_STAGES.items():
        if not _is_earlier(source, manifest, maker, outdated):
            continue
        # This baseline has as much compute as the distilled student of that time.
        titles[model] = (
            f"{MODEL_TITLES[model]} (of the earlier student)"
            if model == "sft_longer"
            else f"earlier {MODEL_TITLES[model]}"
        )
    return titles


def _is_earlier(
    source: Source, manifest: Manifest, maker: str, outdated: Mapping[str, Outdated]
) -> bool:
    if maker in manifest.parents:
        wrong = _compared(source, manifest.kind, maker, manifest.parents[maker])
        return maker in outdated or wrong is not None
    # The cache depends on the SFT student by way of the rollouts.
    return maker == "sft" and any(parent in outdated for parent in manifest.parents)


def _compared(source: Source, name: str, parent: str, fingerprint: str) -> Outdated | None:
    """Return what is wrong with a stage that names this fingerprint of its parent."""
    now = source.manifests.get(parent)
    earlier = _superseded(source, parent, fingerprint)
    if now is None:
        # Nothing is known of a parent that somebody has removed. While lopd makes it again, the
        # earlier one is kept.
        if earlier is None:
            return None
        return Outdated(name, parent, _called(earlier, fingerprint), "not finished")
    if now.fingerprint == fingerprint:
        return None
    present = output_weights(source, parent)
    if not now.complete:
        return Outdated(name, parent, _called(earlier or "", fingerprint), "not finished")
    if not earlier or not present or earlier == present:
        # Without weights, or with equal ones, the fingerprint of what they were made from differs.
        return Outdated(name, parent, _called("", fingerprint), now.fingerprint[:DIGITS])
    return Outdated(name, parent, _called(earlier, fingerprint), present)


def _called(weights: str, fingerprint: str) -> str:
    return f"weights {weights}" if weights else f"fingerprint {fingerprint[:DIGITS]}"


def _superseded(source: Source, stage: str, fingerprint: str) -> str | None:
    """Return the weights of a former result ("" where it has none), or None if it is not kept."""
    folders = [path.parent for path in source.folder.glob(f"{_SUPERSEDED}/{stage}-*/{MANIFEST}")]
    # An export is a copy of the student that it was made from.
    exported = source.manifests.get("export")
    if stage == "distill" and exported is not None:
        folders.append(source.folder / "export")
    for folder in sorted(folders):
        # A damaged one says nothing, and is not needed.
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(folder)
            is_copy = folder.name == "export"
            known = manifest.parents.get(stage) if is_copy else manifest.fingerprint
            if known == fingerprint:
                return published_weights(folder, manifest.shards)[:DIGITS]
    return None


def output_weights(source: Source, name: str) -> str:
    """Return the short fingerprint of the weights that a stage has published, or ""."""
    manifest = source.manifests.get(name)
    if manifest is None or not manifest.complete:
        return ""
    return published_weights(source.folder / name, manifest.shards)[:DIGITS]
