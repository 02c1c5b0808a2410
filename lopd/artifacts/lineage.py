"""Teacher consistency by lineage: is the teacher that scores the one that made the student's SFT
data?

The paper proves that SFT demonstrations and OPD scores must come from the same teacher (arXiv
2604.13010): with another one the gradient is off by a term that no amount of training removes. So
every manifest from the demonstrations on carries the demonstrating teacher's fingerprint, and
scoring compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.errors import ArtifactError, ConsistencyError, DataError
from lopd.records import Manifest, ModelIdentity

PROVEN, DECLARED, UNKNOWN = "proven", "declared", "unknown"


def demonstrated_by(teacher: ModelIdentity) -> dict[str, Any]:
    """Lineage of demonstrations that the demonstrate stage itself sampled from ``teacher``."""
    return {"sft_teacher": teacher.weights, "sft_teacher_path": teacher.path, "evidence": PROVEN}


def declared(teacher: ModelIdentity | None) -> dict[str, Any]:
    """Lineage of demonstrations from outside, whose teacher the user declares (or does not)."""
    if teacher is None:
        return {"sft_teacher": "", "sft_teacher_path": "", "evidence": UNKNOWN}
    return {"sft_teacher": teacher.weights, "sft_teacher_path": teacher.path, "evidence": DECLARED}


def lineage_of(demonstrations: Manifest, declared_teacher: ModelIdentity | None) -> dict[str, Any]:
    """Lineage of demonstrations that are given as an artifact: its own where it has one, else what
    the user declares.
    """
    lineage = dict(demonstrations.lineage)
    return (
        lineage
        if lineage.get("sft_teacher") or "by_domain" in lineage
        else declared(declared_teacher)
    )


def lineage_in(lineage: Mapping[str, Any], domain: str) -> Mapping[str, Any]:
    """What is known of the teacher of a domain's demonstrations: its own entry where there is one
    for each domain ("": any other), else that of all.
    """
    by_domain = lineage.get("by_domain")
    own: Mapping[str, Any] = lineage if by_domain is None else by_domain.get(domain, declared(None))
    return own


def check_scoring_teacher(
    lineage: Mapping[str, Any], teacher: ModelIdentity, *, allow_foreign: bool
) -> dict[str, Any]:
    """The lineage to record with the scores. ConsistencyError unless the teacher is that of the
    demonstrations, or the override is set.
    """
    known = lineage.get("sft_teacher", "")
    same = bool(known) and known == teacher.weights
    if not same and not allow_foreign:
        if "by_domain" in lineage:
            makers = {
                entry.get("sft_teacher_path") or "unknown"
                for entry in lineage["by_domain"].values()
            }
            what, limit = (
                f"teacher {teacher.path} is to score every domain",
                f"each domain's demonstrations were made by its own: {', '.join(sorted(makers))}",
            )
        elif known:
            what = f"teacher {teacher.path} (weights {teacher.weights[:12]}) is not the teacher of the student's demonstrations"
            limit = f"{lineage.get('sft_teacher_path') or 'that teacher'} (weights {known[:12]})"
        else:
            what, limit = (
                f"nobody knows whether teacher {teacher.path} made the student's demonstrations",
                "a known teacher",
            )
        remedy = "score with that teacher, make demonstrations with this one, or set score.allow_foreign_teacher=true (recorded, and printed in every summary)"
        raise ConsistencyError(what, where="models.teacher", limit=limit, remedy=remedy)
    return {
        **lineage,
        "score_teacher": teacher.weights,
        "consistent": same,
        "allow_foreign_teacher": allow_foreign and not same,
    }


CACHES = ("teacher_cache", "residualised_cache")


def check_given_cache(
    manifest: Manifest, folder: Path, student: ModelIdentity, *, allow_foreign: bool
) -> dict[str, Any]:
    """The lineage to record with what is learnt from a cache that is given by its folder; its
    ``cache`` says in a sentence what was found.

    student: that the training starts from. Right is a cache of this student's responses, scored by
    the teacher of its demonstrations, or by another one and then corrected (Lightning OPD 2.0).
    ArtifactError: no complete teacher cache; ConsistencyError: anything else, unless allow_foreign;
    DataError: tokenizers.
    """
    if manifest.kind not in CACHES or not manifest.complete:
        state = "" if manifest.complete else ", not complete"
        raise ArtifactError(
            f"is of kind {manifest.kind}{state}",
            where=str(folder),
            limit=f"a complete {' or '.join(CACHES)}",
            remedy="see: lopd cache --help",
        )
    for identity in manifest.models.values():
        check_same_tokenizer(identity, student)
    sampler, lineage = manifest.models.get("student"), manifest.lineage
    corrected = manifest.kind == "residualised_cache"
    wrong = []
    if sampler is None:
        wrong.append("nobody knows which student sampled its responses")
    elif sampler.weights != student.weights:
        wrong.append(
            f"its responses were sampled by another student ({sampler.path}, weights {sampler.weights[:12]})"
        )
    if not (lineage.get("consistent") or corrected or lineage.get("allow_foreign_teacher")):
        wrong.append(
            "its scores are not shown to be by the teacher of the student's demonstrations, nor corrected for a foreign one (lopd cache residualise)"
        )
    if wrong and not allow_foreign:
        limit = f"responses of {student.path} (weights {student.weights[:12]}), scored by the teacher of its demonstrations"
        remedy = "give a cache of this student, or set distill.allow_foreign_cache=true (recorded, and printed in every summary)"
        raise ConsistencyError("; ".join(wrong), where=str(folder), limit=limit, remedy=remedy)
    if wrong:
        note = "FOREIGN: " + "; ".join(wrong)
    elif corrected:
        style = (
            "the teacher's own style, which is not foreign"
            if lineage.get("consistent")
            else "a foreign teacher's style"
        )
        note = f"this student's responses; scores corrected by cross-fitted residualisation for {style}"
    elif lineage.get("consistent"):
        note = "this student's responses, scored by the teacher of its demonstrations"
    else:
        note = "this student's responses, scored by a foreign teacher (score.allow_foreign_teacher was set), not corrected"
    about = {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "note": note}
    return {
        **lineage,
        "consistent": bool(lineage.get("consistent")),
        "cache": about,
        "allow_foreign_cache": bool(wrong),
    }


def check_same_tokenizer(teacher: ModelIdentity, student: ModelIdentity) -> None:
    """DataError if the two tokenizers differ: the teacher would score ids that mean other text."""
    if teacher.tokenizer != student.tokenizer:
        raise DataError(
            f"tokenizer of the student ({student.path}) differs from the teacher's",
            where=teacher.path,
            limit=f"sha256 of tokenizer.json {teacher.tokenizer[:12] or 'missing'} against {student.tokenizer[:12] or 'missing'}",
            remedy="use a teacher and a student of one family, with the very same tokenizer.json",
        )
