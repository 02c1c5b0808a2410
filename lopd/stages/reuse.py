"""Whether a stage's artifact can be reused, and what becomes of one that cannot.

An artifact is reused where its manifest holds the same inputs and the same parents as this
configuration asks for. Another one is moved to ``superseded/`` and comes back with its inputs.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

from lopd.artifacts import MANIFEST, read_manifest, sha256_json
from lopd.config import known_keys
from lopd.config.secrets import scrubbed_inputs
from lopd.errors import ArtifactError, LopdError
from lopd.records import Manifest
from lopd.report.metrics import bring_back, set_aside
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named
from lopd.stages.training import CHECKPOINTS, RESULT

State = Literal["done", "partial", "outdated", "absent"]
SUPERSEDED = "superseded"


def inspect(context: StageContext) -> tuple[State, list[str]]:
    """Return a stage's state, without running or changing anything.

    Returns:
        The state, and for an outdated stage the keys that differ, or the parents that are not done.

    Raises:
        ArtifactError: A manifest is damaged.
    """
    if not (context.folder / MANIFEST).exists():
        return "absent", []
    manifest = read_manifest(context.folder)
    # A parent that is outdated itself will change, and then this stage is outdated too.
    unfinished: list[str] = []
    for name in context.stage.parents(context.config):
        state, _ = inspect(context.of_stage(stage_named(name)))
        if state != "done":
            unfinished.append(f"parent {name}")
    try:
        differs = differences(context, manifest)
    except ArtifactError:
        # A parent's manifest is gone. It is among the unfinished ones.
        differs = []
    # A knob says more than "the parent is not done", so it is named first.
    differs = differs or unfinished
    if differs:
        return "outdated", differs
    return ("done" if manifest.complete else "partial"), []


def differences(context: StageContext, manifest: Manifest) -> list[str]:
    """Return the keys in which an artifact's inputs differ from those of this configuration.

    A parent that changed is named ``parent NAME``.
    """
    parents = {f"parent {name}": value for name, value in context.parents.items()}
    # Through JSON, as the manifest went, so that a tuple equals a list and a path its text.
    wanted = json.loads(json.dumps({**context.inputs, **parents}, default=str))
    # Both sides are scrubbed, or a hidden value would differ from itself.
    found: dict[str, Any] = dict(scrubbed_inputs(manifest.inputs))
    found |= {f"parent {name}": value for name, value in manifest.parents.items()}
    for key in wanted.keys() - found.keys():
        # The knob is newer than the artifact. What was done before is what its default does.
        found[key] = default_of(key)
    return sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found[key])


def default_of(key: str) -> Any:
    """Return the default of a knob as JSON has it; None where it has none."""
    field = known_keys().get(key)
    if field is None or field.is_required():
        return None
    return json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))


def reusable(context: StageContext) -> Manifest | None:
    """Return the manifest of the complete artifact with these inputs, or None."""
    # Only the manifest is read here. Whoever reuses the artifact verifies its files.
    if not (context.folder / MANIFEST).exists():
        return None
    manifest = read_manifest(context.folder)
    return manifest if manifest.complete and not differences(context, manifest) else None


def supersede(context: StageContext) -> None:
    """Move an artifact with other inputs aside, and bring back one with these inputs.

    Its metrics go with it. Nothing that is finished is lost.
    """
    folder = context.folder
    superseded = context.config.run.dir / SUPERSEDED
    _set_aside_training_without_manifest(context, superseded)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        differs = differences(context, manifest)
        if not differs:
            # A command may have been killed between moving the metrics and moving the folder. Then
            # the metrics of this stage are still in its folder.
            bring_back(context.config.run.dir, folder)
            return
        # The name follows from the inputs, so that different earlier results do not collide.
        key = sha256_json([manifest.inputs, manifest.parents])[:12]
        context.log(
            f"runs again: {', '.join(differs[:6])} changed; the former result is kept in "
            f"{SUPERSEDED}/{folder.name}-{key}"
        )
        # A stage may train under several names, each with a folder in its own (sft_longer).
        names = {folder.name, *(path.name for path in folder.iterdir() if path.is_dir())}
        set_aside(context.config.run.dir, names, folder)
        superseded.mkdir(exist_ok=True)
        folder.rename(_free_name(superseded / f"{folder.name}-{key}"))
    # The user may have gone back to earlier knobs. What was made from them need not be made again.
    former = _superseded_with_these_inputs(context, superseded)
    if former is not None:
        if folder.exists():
            # A stage was killed before it had a manifest.
            folder.rename(_free_name(superseded / f"{folder.name}-without-manifest"))
        former.rename(folder)
        bring_back(context.config.run.dir, folder)


def _set_aside_training_without_manifest(context: StageContext, superseded: Path) -> None:
    """Keep hours of training whose manifest is lost. Nothing says from what it was made."""
    folder = context.folder
    if (folder / MANIFEST).exists():
        return
    # Also in folders below: the training of evaluate has one of its own.
    if not any(next(folder.rglob(name), None) for name in (RESULT, CHECKPOINTS)):
        return
    context.log(
        f"has checkpoints or a result, but no {MANIFEST} that says from what they were made; "
        f"they are kept in {SUPERSEDED}/{folder.name}-without-manifest"
    )
    superseded.mkdir(exist_ok=True)
    folder.rename(_free_name(superseded / f"{folder.name}-without-manifest"))


def _superseded_with_these_inputs(context: StageContext, superseded: Path) -> Path | None:
    """Return the folder of an earlier artifact with these inputs, a complete one if possible."""
    found: dict[bool, Path] = {}
    for path in sorted(superseded.glob(f"{context.stage.name}-*")):
        # A damaged one stays where it is.
        with contextlib.suppress(LopdError):
            manifest = read_manifest(path)
            if not differences(context, manifest):
                found[manifest.complete] = path
    return found.get(True, found.get(False))


def _free_name(path: Path) -> Path:
    # A folder is never written over, and a thousand versions of one stage are enough.
    candidates = [path, *(path.with_name(f"{path.name}.{index}") for index in range(1, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())
