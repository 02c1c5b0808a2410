"""From the configuration to the objective.

The tables say which knob makes which part of the objective, and which fields each part needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lopd.config import DistillSection, ObjectiveSection
from lopd.errors import ConfigError
from lopd.objective.delta import Delta
from lopd.objective.distillation import Distillation
from lopd.objective.interface import Objective
from lopd.objective.lightning import Lightning
from lopd.objective.reference import ReferenceKL
from lopd.objective.selection import DropTruncated, Prefix
from lopd.objective.steps import StepDivergence
from lopd.objective.top_k import TopKKL
from lopd.objective.verdicts import DropWrong, VerdictReward, WrongWeight
from lopd.objective.weighting import EarlyTokenGain, TruncatedImportance

# Fields of TokenBatch that every cache and the trainer give to an objective.
AVAILABLE = frozenset(
    {"teacher_logprobs", "sampling_logprobs", "truncated", "student_top_logprobs"}
)
# Fields that a cache with the teacher's top-K gives besides.
TOP_K = frozenset({"teacher_top_logprobs"})
# The field that a cache with the scores of the teacher's base gives besides.
BASE = frozenset({"base_logprobs"})
# The field that verdicts of the responses (distill.verdicts) give besides.
VERDICTS = frozenset({"right"})
# Where each field comes from, for the message that says it is missing.
_ORIGIN = {
    "teacher_logprobs": "the score stage writes them",
    "sampling_logprobs": "the rollout stage writes them; "
    "a cache imported from elsewhere may lack them",
    "truncated": "it follows from the finish_reason of the rollouts",
    "base_logprobs": "the cache has no column teacher_base_logprobs; with models.teacher_base the "
    "score stage writes it",
    "right": "make verdicts of the cache with lopd cache judge, and name them in distill.verdicts",
    "teacher_top_logprobs": "the cache has none; "
    "with score.top_k = 16, for example, the score stage writes the teacher's likeliest tokens",
    "student_top_logprobs": "the trainer gives the student's log-probabilities "
    "of the teacher's tokens; this trainer does not",
}


@dataclass(frozen=True, slots=True)
class Component:
    """A part of an objective."""

    # The fields of TokenBatch that it reads.
    needs: tuple[str, ...]
    # Makes it from the [distill] section.
    build: Callable[[DistillSection], Any]


def _top_k(direction: Any) -> Component:
    return Component(
        ("teacher_logprobs", "teacher_top_logprobs", "student_top_logprobs"),
        lambda distill: TopKKL(direction, distill.objective.top_k_support, distill.aggregation),
    )


def _prefix_share(distill: DistillSection) -> Prefix:
    section = distill.objective
    return Prefix(share=section.prefix_share, keep_end_token=section.keep_end_token)


def _prefix_tokens(distill: DistillSection) -> Prefix:
    section = distill.objective
    return Prefix(num_tokens=section.prefix_tokens, keep_end_token=section.keep_end_token)


def _importance(distill: DistillSection) -> TruncatedImportance:
    return TruncatedImportance(distill.objective.importance_cap or math.inf)


def _early_token_gain(distill: DistillSection) -> EarlyTokenGain:
    return EarlyTokenGain(distill.objective.early_token_gain, distill.advantage_clip)


def _step_divergence(distill: DistillSection) -> StepDivergence:
    return StepDivergence(distill.objective.step_divergence_cap or math.inf)


def _reference_kl(distill: DistillSection) -> ReferenceKL:
    return ReferenceKL(distill.objective.reference_kl, distill.objective.reference_direction)


# The tables below are the only place that connects knobs with classes. A component's name is its
# knob, so that an error can name what the user must change.
# The values of distill.objective.loss.
LOSSES: dict[str, Component] = {
    "lightning": Component(
        ("teacher_logprobs",),
        lambda distill: Lightning(distill.advantage_clip, distill.aggregation),
    ),
    "top_k_reverse_kl": _top_k("reverse"),
    "top_k_forward_kl": _top_k("forward"),
}
# The other tables have knobs of distill.objective. A component is used where its knob differs from
# the default. A prefix needs `truncated` because it keeps the end tokens of finished responses.
SELECTIONS: dict[str, Component] = {
    "truncated": Component(("truncated",), lambda distill: DropTruncated()),
    "wrong": Component(("right",), lambda distill: DropWrong()),
    "prefix_share": Component(("truncated",), _prefix_share),
    "prefix_tokens": Component(("truncated",), _prefix_tokens),
}
WEIGHTINGS: dict[str, Component] = {
    "importance_cap": Component(("sampling_logprobs",), _importance),
    "early_token_gain": Component(("teacher_logprobs",), _early_token_gain),
    "step_divergence_cap": Component(("teacher_logprobs",), _step_divergence),
    "wrong_weight": Component(
        ("right",), lambda distill: WrongWeight(distill.objective.wrong_weight)
    ),
}
SHIFTS: dict[str, Component] = {
    "advantage": Component(("base_logprobs", "sampling_logprobs"), lambda distill: Delta()),
    "verdict_reward": Component(
        ("right",), lambda distill: VerdictReward(distill.objective.verdict_reward)
    ),
}
REFERENCE: dict[str, Component] = {
    "reference_kl": Component(("sampling_logprobs",), _reference_kl),
}
# A knob that only modifies others, and those others. At least one of them must be on.
_MODIFIES = {
    "keep_end_token": ("prefix_share", "prefix_tokens"),
    "reference_direction": ("reference_kl",),
}
# Losses of the sampled token. Token weights and shifts act on these alone, but for the weight of a
# response, which is the same for every token that might stand in it.
_TOKEN_WEIGHTED = ("lightning",)
_OF_THE_TOKEN = ("importance_cap", "early_token_gain", "step_divergence_cap", *SHIFTS)


def objective_from_config(
    section: DistillSection, available: Collection[str] = AVAILABLE, teachers: tuple[str, ...] = ()
) -> Objective:
    """Return the objective of [distill] and [distill.objective].

    Args:
        section: The [distill] section.
        available: The fields of TokenBatch that data and trainer give.
        teachers: The names of the teachers; see Distillation.

    Raises:
        ConfigError: Knobs contradict each other or change nothing, or a component needs a field
            that is not available.
    """
    chosen = {
        name: component
        for name, component in (SELECTIONS | WEIGHTINGS | SHIFTS | REFERENCE).items()
        if is_on(section.objective, name)
    }
    # Contradictions come first: where two knobs exclude each other, it does not help the user to
    # hear that one of them lacks data.
    _refuse_contradictions(section.objective)
    _refuse_verdicts(section)
    # The loss first: where it lacks its data, what modifies it does not matter.
    for name, component in ({"loss": LOSSES[section.objective.loss]} | chosen).items():
        _refuse_missing(section.objective, name, component, available)
    loss = LOSSES[section.objective.loss].build(section)
    if not chosen and not teachers and isinstance(loss, Lightning):
        # The method as the paper has it stays the class that reads like the paper.
        return loss

    def built(table: dict[str, Component]) -> tuple[Any, ...]:
        return tuple(
            component.build(section) for name, component in table.items() if name in chosen
        )

    reference = next(iter(built(REFERENCE)), None)
    return Distillation(
        loss, built(SELECTIONS), built(WEIGHTINGS), reference, teachers, built(SHIFTS)
    )


def needs_top_k(section: DistillSection) -> bool:
    """Return whether the loss compares the student with the teacher's likeliest tokens."""
    return "teacher_top_logprobs" in LOSSES[section.objective.loss].needs


def needs_verdicts(section: DistillSection) -> bool:
    """Return whether a knob of the objective reads the verdicts of the responses."""
    tables = SELECTIONS | WEIGHTINGS | SHIFTS
    return any("right" in part.needs and is_on(section.objective, k) for k, part in tables.items())


def is_on(objective: ObjectiveSection, knob: str) -> bool:
    """Return whether a knob differs from its default."""
    return bool(getattr(objective, knob) != ObjectiveSection.model_fields[knob].default)


def _refuse_contradictions(objective: ObjectiveSection) -> None:
    # Refused and not ignored: a knob without an effect would stand in a manifest as if it had had
    # one.
    if is_on(objective, "prefix_share") and is_on(objective, "prefix_tokens"):
        reason = "prefix_tokens also sets the length of the prefix"
        raise _refused(objective, "prefix_share", reason, "remove prefix_share or prefix_tokens")
    for knob, needed in _MODIFIES.items():
        if is_on(objective, knob) and not any(is_on(objective, other) for other in needed):
            names = " or ".join(needed)
            reason = f"it has no effect without {names}"
            raise _refused(objective, knob, reason, f"set {names}, or remove {knob}")
    if is_on(objective, "top_k_support") and objective.loss in _TOKEN_WEIGHTED:
        reason = f"it has no effect with loss = {objective.loss}"
        remedy = "choose a top-K loss, or remove top_k_support"
        raise _refused(objective, "top_k_support", reason, remedy)
    if is_on(objective, "wrong") and is_on(objective, "wrong_weight"):
        reason = "wrong_weight has nothing left to weight"
        raise _refused(objective, "wrong", reason, "remove wrong or wrong_weight")
    for knob in _OF_THE_TOKEN:
        if is_on(objective, knob) and objective.loss not in _TOKEN_WEIGHTED:
            reason = (
                f"loss = {objective.loss} is a sum over the teacher's tokens and does not "
                "use the sampled token"
            )
            raise _refused(objective, knob, reason, f"set loss = lightning, or remove {knob}")


def _refuse_verdicts(section: DistillSection) -> None:
    """Refuse verdicts that nothing reads, and verdicts of responses that do not exist yet."""
    given = section.verdicts or section.teacher_verdicts
    default = DistillSection.model_fields["teacher_right_share"].default
    what = ""
    remedy = ""
    if section.verdicts is not None and not needs_verdicts(section):
        what = "verdicts has no effect: no knob of the objective reads a verdict"
        remedy = "set distill.objective.wrong, wrong_weight or verdict_reward, or remove verdicts"
    elif section.teacher_verdicts is None and section.teacher_right_share != default:
        what = "teacher_right_share has no effect without teacher_verdicts"
        remedy = "set distill.teacher_verdicts, or remove distill.teacher_right_share"
    elif given and section.refresh.is_on:
        what = "refresh cannot be used with verdicts: nobody has judged the fresh responses"
        remedy = "remove distill.refresh, or distill.verdicts and distill.teacher_verdicts"
    if what:
        raise ConfigError(what, where="[distill]", remedy=remedy)


def _refuse_missing(
    objective: ObjectiveSection, knob: str, component: Component, available: Collection[str]
) -> None:
    missing = [name for name in component.needs if name not in available]
    if missing:
        reason = "; ".join(f"it needs {name}: {_ORIGIN[name]}" for name in missing)
        remedy = (
            "set loss = lightning, or make a cache that has the missing data"
            if knob == "loss"
            else f"remove {knob}"
        )
        raise _refused(objective, knob, reason, remedy)


def _refused(objective: ObjectiveSection, knob: str, reason: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"{knob} = {getattr(objective, knob)} cannot be used: {reason}",
        where="[distill.objective]",
        remedy=remedy,
    )
