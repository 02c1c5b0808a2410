"""Which loss suits a cache, from its figures alone, before any training.

The limits are from the examples of this project: models of less than a million parameters with 32
tokens. docs/objectives.md says how they were found and how often they were right.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from lopd.cache.regime import ADVANTAGE_CLIP, FAR, RegimeFigures, share_excluded
from lopd.config import DistillSection

# From this share on, of the tokens beyond FAR those beyond ADVANTAGE_CLIP, the teacher counts as
# sharp: it does not merely prefer another token, it all but excludes this one. The share lies in
# the middle, by its logarithm, between the caches of three settings: 0.01 to 0.02 where the sampled
# token is enough, 0.17 to 0.36 where it does harm. In settings that were made afterwards it was
# right in 8 of 11, where a warning every time is right in 7 (docs/study.md, claim 10).
SHARP_SHARE = 0.06
# One or two such tokens may be chance.
LEAST_EXCLUDED = 3
# With fewer tokens, one or two decide what the share is.
LEAST_TOKENS = 2000
# In those caches the top 8 hold 99.5% of what the student samples, or more.
MEASURED_COVERAGE = 0.99
# Multiplied by at most 1, a token that the student has given up is pushed no longer.
SAFE_CAP = 1.0
_DOC = "docs/objectives.md#which-loss-suits-a-cache"

Regime: TypeAlias = Literal["soft teacher", "sharp teacher"]
# In how many settings of the study, and of how many, the sampled token ended below its SFT student.
# The three settings that the limit is from are not counted.
HARMED: dict[Regime, tuple[int, int]] = {"soft teacher": (1, 7), "sharp teacher": (6, 8)}


@dataclass(frozen=True, slots=True)
class Advice:
    """The value of one knob, and in one sentence why."""

    value: str | float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What suits a cache.

    Attributes:
        regime: "sharp teacher" where the teacher all but excludes tokens that the student samples,
            otherwise "soft teacher".
        seen: The figures that decided it, as a sentence.
        loss: The value of distill.objective.loss.
        advantage_clip: The value of distill.advantage_clip.
        importance_cap: The value of distill.objective.importance_cap; None is off.
    """

    regime: Regime
    seen: str
    loss: Advice
    advantage_clip: Advice
    importance_cap: Advice


def recommend(figures: RegimeFigures | None) -> Recommendation | None:
    """Return what suits a cache; None where its figures say nothing, or too little."""
    if figures is None or figures.num_tokens < LEAST_TOKENS:
        return None
    if is_sharp(figures.num_far, figures.num_excluded):
        return _of_sharp_teacher(figures)
    return _of_soft_teacher(figures)


def is_sharp(num_far: int, num_excluded: int) -> bool:
    """Return whether the teacher all but excludes tokens that the student samples.

    Args:
        num_far: The number of tokens whose advantage is beyond FAR nats.
        num_excluded: The number of tokens whose advantage is beyond ADVANTAGE_CLIP nats.
    """
    share = share_excluded(num_far, num_excluded)
    return num_excluded >= LEAST_EXCLUDED and share >= SHARP_SHARE


def _of_sharp_teacher(figures: RegimeFigures) -> Recommendation:
    if figures.top_k:
        loss = Advice(
            "top_k_reverse_kl",
            "it pushes a token down only as far as the student still says it, and the sampled "
            f"token's loss does so at full strength for good{_coverage(figures)}",
        )
        clip = Advice(ADVANTAGE_CLIP, "the top-K losses do not read it")
        cap = Advice(
            None, f"the top-K losses take no such weights; with lightning set it to {SAFE_CAP:g}"
        )
        return Recommendation("sharp teacher", _seen(figures), loss, clip, cap)
    loss = Advice(
        "lightning",
        "the cache has no top-K; with score.top_k = 8 another scoring gives one, and then "
        "top_k_reverse_kl is the better choice",
    )
    clip = Advice(
        ADVANTAGE_CLIP,
        "in the one measured setting a clip of 1 left half of the harm",
    )
    cap = Advice(
        SAFE_CAP,
        "it ends the push on a token that the student has given up: in one measured setting no "
        "harm was shown any more, and in another one most of it remained",
    )
    return Recommendation("sharp teacher", _seen(figures), loss, clip, cap)


def _of_soft_teacher(figures: RegimeFigures) -> Recommendation:
    if figures.top_k:
        loss = Advice(
            "top_k_reverse_kl",
            "the top-K is in the cache, has no sampling noise, and did no harm in any measured "
            f"setting{_coverage(figures)}",
        )
    else:
        loss = Advice(
            "lightning",
            f"the cache has no top-K; in {_harmed('soft teacher')} the sampled token ended below "
            "the SFT student",
        )
    clip = Advice(ADVANTAGE_CLIP, "few of the far tokens are beyond it")
    cap = Advice(None, "the cache has no sign of the harm that it can prevent")
    return Recommendation("soft teacher", _seen(figures), loss, clip, cap)


def _seen(figures: RegimeFigures) -> str:
    return (
        f"{figures.far_share:.2%} of the tokens are beyond {FAR:g} nats, "
        f"{figures.excluded_share:.0%} of these beyond {ADVANTAGE_CLIP:g}, and the least advantage "
        f"is {figures.min_advantage:.1f}"
    )


def _coverage(figures: RegimeFigures) -> str:
    """Return the end of a sentence where the top-K holds little of what the student samples."""
    coverage = figures.top_k_coverage
    if coverage is None or coverage >= MEASURED_COVERAGE:
        return ""
    return (
        f"; but the top {figures.top_k} hold only {coverage:.1%} of what the student samples, less "
        f"than in any measured run ({MEASURED_COVERAGE:.0%}), so a larger score.top_k is safer"
    )


def goes_against(recommendation: Recommendation, distill: DistillSection) -> bool:
    """Return whether the knobs are those that did harm in this regime.

    Importance weights and fresh rollouts took the harm away in a part of the measured settings, and
    another advantage than the teacher's was not measured, so none of these goes against it.
    """
    objective = distill.objective
    return (
        recommendation.regime == "sharp teacher"
        and objective.loss == "lightning"
        and objective.importance_cap is None
        and objective.advantage == "teacher"
        and not distill.refresh.is_on
    )


def told(recommendation: Recommendation, distill: DistillSection) -> str:
    """Return one line about the configured loss, for the log of a training."""
    seen = f"{recommendation.regime}: {recommendation.seen}"
    objective = distill.objective
    if _suits(distill):
        return f"{seen}; the configured loss did no harm in any of three measured settings"
    is_paper = objective.advantage == "teacher" and objective.loss == "lightning"
    if is_paper and recommendation.regime == "soft teacher":
        return (
            f"{seen}; in {_harmed(recommendation.regime)} the sampled token ended below the SFT "
            f"student ({_DOC})"
        )
    if is_paper and objective.importance_cap is not None:
        return (
            f"{seen}; with an importance cap no harm of the sampled token was shown in one such "
            f"setting, and much in another one ({_DOC})"
        )
    if not goes_against(recommendation, distill):
        return f"{seen}; the configured loss was not measured there"
    return (
        f"{seen}. In {_harmed(recommendation.regime)} the sampled token "
        f'(distill.objective.loss = "lightning") ended below the SFT student; safer is '
        f"{_remedy(recommendation)}. Nothing is changed ({_DOC})"
    )


def _harmed(regime: Regime) -> str:
    harmed, of = HARMED[regime]
    return f"{harmed} of {of} measured settings with a {regime}"


def _suits(distill: DistillSection) -> bool:
    """Return whether the knobs are those that did no harm in any measured setting."""
    objective = distill.objective
    return objective.advantage == "teacher" and objective.loss == "top_k_reverse_kl"


def _remedy(recommendation: Recommendation) -> str:
    if recommendation.loss.value != "lightning":
        return f'distill.objective.loss = "{recommendation.loss.value}"'
    return (
        f"distill.objective.importance_cap = {recommendation.importance_cap.value:g}, or "
        "score.top_k = 8 with a top-K loss"
    )


def regime_json(figures: RegimeFigures | None) -> dict[str, Any] | None:
    """Return the figures and the recommendation for programs; None without figures."""
    if figures is None:
        return None
    recommendation = recommend(figures)
    return {
        **asdict(figures),
        "excluded_share": figures.excluded_share,
        "recommendation": None if recommendation is None else asdict(recommendation),
    }
