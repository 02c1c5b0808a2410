"""From the configuration to the objective: which knob makes which piece, what each needs, and what
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lopd.config import DistillSection, ObjectiveSection
from lopd.errors import ConfigError
from lopd.objective.distillation import Distillation
from lopd.objective.interface import Objective
from lopd.objective.lightning import Lightning
from lopd.objective.reference import ReferenceKL
from lopd.objective.selection import DropTruncated, Prefix
from lopd.objective.top_k import TopKKL
from lopd.objective.weighting import EarlyTokenGain, TruncatedImportance

AVAILABLE = frozenset(
    {"teacher_logprobs", "sampling_logprobs", "truncated", "student_top_logprobs"}
)  # what every cache and the trainer give an objective
TOP_K = frozenset({"teacher_top_logprobs"})  # what a cache with the teacher's top-K gives besides
_ORIGIN = {  # of TokenBatch's fields
    "teacher_logprobs": "the score stage writes them",
    "sampling_logprobs": "the rollout stage writes them; a cache imported from elsewhere may lack them",
    "truncated": "the rollouts' finish_reason tells",
    "teacher_top_logprobs": "the cache has none; with score.top_k = 16, say, the score stage writes the teacher's likeliest tokens",
    "student_top_logprobs": "the trainer gives the student's log-probabilities of the teacher's tokens; this one does not",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """needs: fields of TokenBatch."""

    needs: tuple[str, ...]
    build: Callable[[DistillSection], Any]


def _top_k(direction: Any) -> Piece:
    return Piece(
        ("teacher_logprobs", "teacher_top_logprobs", "student_top_logprobs"),
        lambda distill: TopKKL(direction, distill.objective.top_k_support, distill.aggregation),
    )


LOSSES: dict[str, Piece] = {  # distill.objective.loss
    "lightning": Piece(
        ("teacher_logprobs",),
        lambda distill: Lightning(distill.advantage_clip, distill.aggregation),
    ),
    "top_k_reverse_kl": _top_k("reverse"),
    "top_k_forward_kl": _top_k("forward"),
}
SELECTIONS: dict[
    str, Piece
] = {  # knobs of distill.objective; a piece is used where its knob differs from the default
    "truncated": Piece(("truncated",), lambda distill: DropTruncated()),
    "prefix_share": Piece(
        ("truncated",),
        lambda distill: Prefix(
            share=distill.objective.prefix_share, keep_end_token=distill.objective.keep_end_token
        ),
    ),
    "prefix_tokens": Piece(
        ("truncated",),
        lambda distill: Prefix(
            num_tokens=distill.objective.prefix_tokens,
            keep_end_token=distill.objective.keep_end_token,
        ),
    ),
}
WEIGHTINGS: dict[str, Piece] = {
    "importance_cap": Piece(
        ("sampling_logprobs",),
        lambda distill: TruncatedImportance(distill.objective.importance_cap or math.inf),
    ),
    "early_token_gain": Piece(
        ("teacher_logprobs",),
        lambda distill: EarlyTokenGain(distill.objective.early_token_gain, distill.advantage_clip),
    ),
}
REFERENCE: dict[str, Piece] = {
    "reference_kl": Piece(
        ("sampling_logprobs",),
        lambda distill: ReferenceKL(
            distill.objective.reference_kl, distill.objective.reference_direction
        ),
    ),
}
_MODIFIES = {  # a knob -> those of which at least one must be on for it to mean anything
    "keep_end_token": ("prefix_share", "prefix_tokens"),
    "reference_direction": ("reference_kl",),
}
_TOKEN_WEIGHTED = ("lightning",)  # losses of the sampled token


def objective_from_config(
    section: DistillSection, available: Collection[str] = AVAILABLE, teachers: tuple[str, ...] = ()
) -> Objective:
    """The objective of [distill] and [distill.objective]. available: fields of TokenBatch that data
    and trainer give. teachers: see Distillation.

    ConfigError: knobs that contradict each other or do nothing, or a piece that needs what is not
    available.
    """
    chosen = {
        name: piece
        for name, piece in (SELECTIONS | WEIGHTINGS | REFERENCE).items()
        if is_on(section.objective, name)
    }
    _refuse_contradictions(section.objective)
    for name, piece in ({"loss": LOSSES[section.objective.loss]} | chosen).items():
        _refuse_missing(section.objective, name, piece, available)
    loss = LOSSES[section.objective.loss].build(section)
    if not chosen and not teachers and isinstance(loss, Lightning):
        return loss

    def built(registry: dict[str, Piece]) -> tuple[Any, ...]:
        return tuple(piece.build(section) for name, piece in registry.items() if name in chosen)

    return Distillation(
        loss, built(SELECTIONS), built(WEIGHTINGS), next(iter(built(REFERENCE)), None), teachers
    )


def needs_top_k(section: DistillSection) -> bool:
    """The loss compares the student with the teacher's likeliest tokens."""
    return "teacher_top_logprobs" in LOSSES[section.objective.loss].needs


def is_on(objective: ObjectiveSection, knob: str) -> bool:
    """Its value is not the default."""
    return bool(getattr(objective, knob) != ObjectiveSection.model_fields[knob].default)


def _refuse_contradictions(objective: ObjectiveSection) -> None:
    if is_on(objective, "prefix_share") and is_on(objective, "prefix_tokens"):
        raise _refused(
            objective,
            "prefix_share",
            "prefix_tokens says how long the prefix is, too",
            "give one of the two",
        )
    for knob, needed in _MODIFIES.items():
        if is_on(objective, knob) and not any(is_on(objective, other) for other in needed):
            raise _refused(
                objective,
                knob,
                f"it changes nothing without {' or '.join(needed)}",
                f"set {' or '.join(needed)}, or leave it out",
            )
    if is_on(objective, "top_k_support") and objective.loss in _TOKEN_WEIGHTED:
        raise _refused(
            objective,
            "top_k_support",
            f"it changes nothing with loss = {objective.loss}",
            "use a top-K loss, or leave it out",
        )
    for knob in WEIGHTINGS:
        if is_on(objective, knob) and objective.loss not in _TOKEN_WEIGHTED:
            reason = f"loss = {objective.loss} is a sum over the teacher's tokens, in which the sampled token plays no part"
            raise _refused(objective, knob, reason, "use loss = lightning, or leave it out")


def _refuse_missing(
    objective: ObjectiveSection, knob: str, piece: Piece, available: Collection[str]
) -> None:
    missing = [name for name in piece.needs if name not in available]
    if missing:
        reason = "; ".join(f"needs {name}: {_ORIGIN[name]}" for name in missing)
        raise _refused(
            objective,
            knob,
            reason,
            "use loss = lightning, or give it" if knob == "loss" else "leave it out",
        )


def _refused(objective: ObjectiveSection, knob: str, reason: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"{knob} = {getattr(objective, knob)}",
        where="[distill.objective]",
        limit=reason,
        remedy=remedy,
    )
