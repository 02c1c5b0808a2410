"""Teacher consistency by lineage: does the teacher that made the student's SFT data also score?

The paper (arXiv 2604.13010) proves that SFT demonstrations and OPD scores must come from the same
teacher. With another teacher the gradient is off by a term that no amount of training removes.
Every manifest from the demonstrations on therefore carries the fingerprint of the demonstrating
teacher, and scoring compares it with its own.

A lineage is a JSON object. docs/cache_format.md specifies its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.errors import ArtifactError, ConsistencyError, DataError
from lopd.records import Manifest, ModelIdentity

# How the teacher of the demonstrations is known: our own stage sampled them, the user says so, or
# not at all.
PROVEN = "proven"
DECLARED = "declared"
UNKNOWN = "unknown"
# The kinds of artifact that a training can learn from.
CACHES = ("teacher_cache", "residualised_cache")
# The key of a manifest that names the method and both tokenizers, where these differ.
TOKEN_ALIGNMENT = "token_alignment"
# What helps where two tokenizers differ, and where the scores could be brought over.
ONE_FAMILY = "use a teacher and a student of one model family, with the same tokenizer.json"
OR_ALIGNED = (
    f'{ONE_FAMILY}, or set score.tokenizer="aligned", which brings the scores to the student\'s '
    "tokens by their bytes"
)


def demonstrated_by(teacher: ModelIdentity) -> dict[str, Any]:
    """Return the lineage of demonstrations that our own stage sampled from ``teacher``."""
    # The fingerprint of the weights and not the path: a checkpoint may be moved or overwritten.
    return {"sft_teacher": teacher.weights, "sft_teacher_path": teacher.path, "evidence": PROVEN}


def declared(teacher: ModelIdentity | None) -> dict[str, Any]:
    """Return the lineage of demonstrations from outside.

    Args:
        teacher: The teacher that the user declares, or None.
    """
    if teacher is None:
        return {"sft_teacher": "", "sft_teacher_path": "", "evidence": UNKNOWN}
    return {"sft_teacher": teacher.weights, "sft_teacher_path": teacher.path, "evidence": DECLARED}


def lineage_of(demonstrations: Manifest, declared_teacher: ModelIdentity | None) -> dict[str, Any]:
    """Return the lineage of demonstrations that are given as an artifact."""
    # The manifest was written by the stage that saw the teacher. A declaration may be a mistake.
    lineage = dict(demonstrations.lineage)
    if lineage.get("sft_teacher") or "by_domain" in lineage:
        return lineage
    return declared(declared_teacher)


def lineage_in(lineage: Mapping[str, Any], domain: str) -> Mapping[str, Any]:
    """Return what is known of the teacher of one domain's demonstrations.

    Args:
        lineage: The lineage record. It has one entry per domain in ``by_domain``, or one entry for
            all domains.
        domain: "" names every domain that has no entry.
    """
    # With several teachers each domain has its own. A domain that nobody has declared is unknown.
    by_domain = lineage.get("by_domain")
    own: Mapping[str, Any] = lineage if by_domain is None else by_domain.get(domain, declared(None))
    return own


def check_scoring_teacher(
    lineage: Mapping[str, Any], teacher: ModelIdentity, *, allow_foreign: bool
) -> dict[str, Any]:
    """Return the lineage to record with the scores.

    Args:
        lineage: The lineage record of the demonstrations.
        teacher: The teacher that is to score.
        allow_foreign: The user accepts another teacher. The lineage then says so.

    Raises:
        ConsistencyError: The teacher is not, or not known to be, the one of the demonstrations.
    """
    known = lineage.get("sft_teacher", "")
    # Two empty fingerprints do not prove that two teachers are one.
    same = bool(known) and known == teacher.weights
    if not same and not allow_foreign:
        # The check is before anything is scored: scoring takes hours, and its result would be of no
        # use.
        what, limit = _difference(lineage, teacher)
        remedy = (
            "set models.teacher to the teacher of the demonstrations, make the "
            "demonstrations with this teacher, or set score.allow_foreign_teacher=true "
            "(lopd records this and prints it in every summary)"
        )
        raise ConsistencyError(what, where="models.teacher", limit=limit, remedy=remedy)
    # The override is recorded only where it was needed, so that a summary does not warn of it where
    # it changed nothing.
    return {
        **lineage,
        "score_teacher": teacher.weights,
        "consistent": same,
        "allow_foreign_teacher": allow_foreign and not same,
    }


def _difference(lineage: Mapping[str, Any], teacher: ModelIdentity) -> tuple[str, str]:
    """Return what is wrong with the scoring teacher, and which teacher would be right."""
    known = lineage.get("sft_teacher", "")
    # Several teachers made the demonstrations, so a single one cannot be right for all of them.
    if "by_domain" in lineage:
        makers = {
            entry.get("sft_teacher_path") or "unknown" for entry in lineage["by_domain"].values()
        }
        return (
            f"teacher {teacher.path} would score every domain, but each domain has its own teacher",
            f"one of the teachers that made the demonstrations: {', '.join(sorted(makers))}",
        )
    if known:
        # The path is only for people. Two paths may hold the same weights, and then the check has
        # passed.
        maker = lineage.get("sft_teacher_path") or "that teacher"
        return (
            f"teacher {_named(teacher)} is not the teacher of the student's demonstrations",
            f"{maker} (weights {known[:12]})",
        )
    return (
        f"it is not recorded whether teacher {teacher.path} made the student's demonstrations",
        "the teacher that made the demonstrations must be recorded",
    )


def check_given_cache(
    manifest: Manifest, folder: Path, student: ModelIdentity, *, allow_foreign: bool
) -> dict[str, Any]:
    """Return the lineage to record with what is learnt from a cache that the user gives.

    The cache must hold this student's responses. They must be scored by the teacher of the
    student's demonstrations, or by another one and then corrected (Lightning OPD 2.0).

    Args:
        manifest: The manifest of the cache.
        folder: The folder of the cache. Errors name it.
        student: The model that the training starts from.
        allow_foreign: Whether the user accepts any other cache. The lineage then records this.

    Returns:
        The cache's own lineage with ``cache``, a sentence about what was found.

    Raises:
        ArtifactError: The folder is not a complete teacher cache.
        ConsistencyError: The responses or the scores are not the right ones.
        DataError: The tokenizers differ.
    """
    if manifest.kind not in CACHES or not manifest.complete:
        # More shards may still be added to an artifact that is not complete.
        state = "" if manifest.complete else " and is not complete"
        raise ArtifactError(
            f"this artifact is of kind {manifest.kind}{state}, but a finished cache is needed",
            where=str(folder),
            limit=f"a complete {' or '.join(CACHES)}",
            remedy="give the folder of a finished cache: see lopd cache --help",
        )
    # Not even allow_foreign helps here: with another tokenizer the ids mean other text.
    for identity in tokenizers_of_rows(manifest, folder).values():
        check_same_tokenizer(identity, student)
    # All faults at once, so that the user does not meet them one after the other.
    wrong = _faults(manifest, student)
    if wrong and not allow_foreign:
        limit = f"responses of {_named(student)}, scored by the teacher of its demonstrations"
        remedy = (
            "give a cache of this student, or set distill.allow_foreign_cache=true (lopd "
            "records this and prints it in every summary)"
        )
        raise ConsistencyError("; ".join(wrong), where=str(folder), limit=limit, remedy=remedy)
    # The note goes into the summary of the run, so that no table is shown without it.
    note = "FOREIGN: " + "; ".join(wrong) if wrong else _accepted(manifest)
    if "teacher_prompt" in manifest.lineage:
        note += "; the teacher saw a prompt of its own (score.teacher_prompt)"
    return {
        **manifest.lineage,
        "consistent": bool(manifest.lineage.get("consistent")),
        "cache": {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "note": note},
        "allow_foreign_cache": bool(wrong),
    }


def alignment_of(manifest: Manifest) -> Mapping[str, Any] | None:
    """Return the method and the tokenizers of a cache whose teacher has another tokenizer.

    It is None for a cache whose teacher has scored the very ids that were sampled.
    """
    found = manifest.extra.get(TOKEN_ALIGNMENT)
    return found if isinstance(found, Mapping) else None


def tokenizers_of_rows(manifest: Manifest, folder: str | Path) -> dict[str, ModelIdentity]:
    """Return the models whose tokenizer must be that of the rows, by role.

    The teacher of an aligned artifact is not among them: it has another tokenizer, and the rows are
    in the student's tokens all the same.
    """
    aligned = alignment_of(manifest)
    if aligned is None:
        return dict(manifest.models)
    others = {
        role: identity
        for role, identity in manifest.models.items()
        if not role.startswith("teacher")
    }
    # The teacher's own tokenizer says nothing of the rows, which are in the student's tokens.
    return {**others, "the aligned rows": scored_tokenizer(aligned, folder)}


def scored_tokenizer(aligned: Mapping[str, Any], folder: str | Path) -> ModelIdentity:
    """Return the tokenizer whose ids a cache has, of what alignment_of() has returned."""
    return ModelIdentity(str(folder), "", str(aligned.get("student_tokenizer", "")), "")


def _faults(manifest: Manifest, student: ModelIdentity) -> list[str]:
    """Return the reasons why a cache does not belong to the student."""
    faults = []
    # The method takes the policy that sampled as its reference. Responses of another student are no
    # on-policy data for this one.
    sampler = manifest.models.get("student")
    if sampler is None:
        faults.append("it is not recorded which student sampled its responses")
    elif sampler.weights != student.weights:
        faults.append(f"its responses were sampled by another student: {_named(sampler)}")
    # A foreign teacher that the user has accepted at scoring is not refused a second time here.
    lineage = manifest.lineage
    corrected = manifest.kind == "residualised_cache"
    if not (lineage.get("consistent") or corrected or lineage.get("allow_foreign_teacher")):
        faults.append(
            "its scores are not shown to be by the teacher of the student's demonstrations, "
            "nor corrected for a foreign one (lopd cache residualise)"
        )
    return faults


def _accepted(manifest: Manifest) -> str:
    """Return why a cache is right for the student."""
    consistent = bool(manifest.lineage.get("consistent"))
    if manifest.kind == "residualised_cache":
        # The correction is made for a foreign teacher. From the own teacher it takes away what the
        # student should learn, so the note says which it was.
        style = (
            "the teacher's own style, which is not foreign"
            if consistent
            else "a foreign teacher's style"
        )
        return (
            "this student's responses; "
            f"scores corrected by cross-fitted residualisation for {style}"
        )
    if consistent:
        return "this student's responses, scored by the teacher of its demonstrations"
    return (
        "this student's responses, scored by a foreign teacher "
        "(score.allow_foreign_teacher was set), not corrected"
    )


def _named(model: ModelIdentity) -> str:
    # The path is what people know a model by. The fingerprint tells two models at one path apart,
    # and 12 of its 64 digits are enough for that.
    return f"{model.path} (weights {model.weights[:12]})"


def check_same_tokenizer(
    teacher: ModelIdentity, student: ModelIdentity, *, remedy: str = ONE_FAMILY
) -> None:
    """Refuse two models whose tokenizers differ: the teacher would score ids that mean other text.

    Args:
        teacher: The one model.
        student: The other model.
        remedy: What the user can do.

    Raises:
        DataError: The fingerprints of tokenizer.json differ.
    """
    if teacher.tokenizer != student.tokenizer:
        # A fingerprint is empty if the folder has no tokenizer.json.
        theirs = teacher.tokenizer[:12] or "missing"
        ours = student.tokenizer[:12] or "missing"
        raise DataError(
            f"the tokenizer of the student ({student.path}) differs from the tokenizer of "
            "the teacher",
            where=teacher.path,
            limit=f"the same sha256 of tokenizer.json: the teacher has {theirs}, the student "
            f"has {ours}",
            remedy=remedy,
        )
