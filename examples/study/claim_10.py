"""Claim 10: a cache tells beforehand whether the loss of the sampled token will do harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from examples.study.arms import Claim, Plot, Verdict
from examples.study.comparisons import Answer, shown, sign_of
from examples.study.figures import Figures, Interval
from examples.study.foretold import ARMS, FRESH, OLDER, SEEN, Foretold
from examples.study.plots import draw_scatter
from examples.study.recommendation import FILE, METRIC
from lopd.cache.recommendation import SHARP_SHARE, recommend
from lopd.cache.regime import RegimeFigures

# The rule before this one: the share of all tokens that are beyond 10 nats.
FORMER_SHARE = 0.001


@dataclass(frozen=True)
class Outcome:
    """A setting: what its caches foretell, and what came of it.

    Attributes:
        title: The setting.
        caches: What was measured of its caches, by seed.
        reached: The share of right answers after distilling minus that before, at T=1, by seed.
        difference: The mean of these with its interval.
        sft: The share of right answers before, at T=1.
    """

    title: str
    caches: Mapping[int, RegimeFigures]
    reached: Mapping[int, float]
    difference: Interval
    sft: Interval

    @property
    def num_warned(self) -> int:
        """The number of caches for which the rule warns."""
        found = [recommend(one) for one in self.caches.values()]
        return sum(one is not None and one.regime == "sharp teacher" for one in found)

    @property
    def is_warned(self) -> bool:
        """Whether the rule warns for most of the caches."""
        return 2 * self.num_warned > len(self.caches)

    @property
    def is_warned_by_former(self) -> bool:
        """Whether the former rule warns for most of the caches."""
        warned = sum(one.clipped_share >= FORMER_SHARE for one in self.caches.values())
        return 2 * warned > len(self.caches)

    @property
    def sign(self) -> int:
        """-1 for harm, 1 for a gain, 0 where the interval holds 0."""
        return sign_of(self.difference)

    @property
    def words(self) -> str:
        """What came of it, in words."""
        return {-1: "harm", 0: "open", 1: "gain"}[self.sign]


def outcomes_of(figures: Figures, settings: Sequence[Foretold]) -> list[Outcome]:
    """Return what came of settings. Raises MissingFigures where one was not measured."""
    return [_outcome(figures, one) for one in settings]


def _outcome(figures: Figures, setting: Foretold) -> Outcome:
    after = figures.values(setting.sampled, METRIC)
    before = figures.values(setting.sft, METRIC)
    caches = figures.recorded(setting.cache, FILE)
    return Outcome(
        setting.title,
        {seed: RegimeFigures(**content) for seed, content in sorted(caches.items())},
        {seed: after[seed] - before[seed] for seed in sorted(after) if seed in before},
        figures.difference(setting.sampled, setting.sft, METRIC),
        figures.mean(setting.sft, METRIC),
    )


def judge(figures: Figures) -> Verdict:
    """Compare what the caches of settings foretell with what came of them."""
    fresh = outcomes_of(figures, FRESH)
    settled = [one for one in fresh if one.sign]
    harmed = [one for one in settled if one.sign < 0]
    wrong = [one for one in settled if one.is_warned != (one.sign < 0)]
    former = sum(one.is_warned_by_former == (one.sign < 0) for one in settled)
    answer: Answer
    if wrong:
        answer = "does not hold"
    elif harmed and len(harmed) < len(settled):
        answer = "holds"
    else:
        answer = "open"
    num_gained = len(settled) - len(harmed)
    mistakes = "; ".join(f"{one.title} ({_said(one)})" for one in wrong)
    summary = (
        f"In {len(fresh)} settings whose caches nobody had seen, the rule foretold "
        f"{len(settled) - len(wrong)} of the {len(settled)} outcomes that are not open (always "
        f"warned: {len(harmed)}, never warned: {num_gained}, the former rule: {former}). The "
        f"sampled token ended below the SFT student in {len(harmed)} and above it in {num_gained}."
    )
    if wrong:
        summary += f" Wrong: {mistakes}."
    return Verdict(
        answer=answer,
        summary=summary,
        details=(_table(fresh, outcomes_of(figures, SEEN)), _LIMITS),
        plots=(Plot("study_10.svg", _CAPTION, partial(_draw, figures)),),
    )


def _said(one: Outcome) -> str:
    warned = "a warning" if one.is_warned else "no warning"
    return f"{warned}, then {shown(one.difference, METRIC, sign=True)} points"


def _table(fresh: Sequence[Outcome], seen: Sequence[Outcome]) -> str:
    lines = [
        "| setting | beyond 3 nats, % | of these beyond 10, %, of each seed | warned | SFT student,"
        " T=1, % | sampled token minus it, points | outcome |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for one in (*fresh, *seen):
        caches = [*one.caches.values()]
        title = one.title if one in fresh else f"{one.title} (the limit is from it)"
        cells = (
            title,
            f"{100 * fmean(cache.far_share for cache in caches):.2f}",
            ", ".join(f"{100 * cache.excluded_share:.0f}" for cache in caches),
            f"{one.num_warned} of {len(caches)}",
            shown(one.sft, METRIC),
            shown(one.difference, METRIC, sign=True),
            one.words,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_CAPTION = (
    "Each dot is a cache: the share of tokens beyond 10 nats among those beyond 3, and what the "
    "loss of the sampled token added at T=1. A cache with no token beyond 10 stands at 0.001. "
    "Crosses are the settings that the limit (the line) was taken from."
)
_LIMITS = (
    "The rule: of the tokens whose advantage is beyond 3 nats, 6% or more are beyond 10 nats, and "
    "at least 3 tokens. It was written down after the three last settings of the table had been "
    "seen, and before any cache of the others was looked at. The setting of step 550 was chosen "
    "when the others' caches had been looked at, because the former rule (0.1% of all tokens "
    "beyond 10 nats) agrees with this one there, and before any outcome. That the sampled token "
    "gains in the settings with a bad habit was known. What could overturn this: the seeds of a "
    "setting share a teacher and a base student, so a setting is one test; settings of one kind "
    "resemble each other and the setting of that kind that was seen; learning rates and numbers of "
    "steps are those of the arms, and the rule knows neither; all of it is one task with 32 tokens."
)


def _draw(figures: Figures, path: Path) -> None:
    def dots(one: Outcome) -> list[tuple[float, float]]:
        seeds = [seed for seed in one.caches if seed in one.reached]
        # A logarithm has no 0.
        shares = [max(one.caches[seed].excluded_share, 0.001) for seed in seeds]
        gains = [100 * one.reached[seed] for seed in seeds]
        return [*zip(shares, gains, strict=True)]

    draw_scatter(
        path,
        {one.title: dots(one) for one in outcomes_of(figures, FRESH)},
        {one.title: dots(one) for one in outcomes_of(figures, SEEN)},
        limit=SHARP_SHARE,
        x_label="share of tokens beyond 10 nats among those beyond 3",
        y_label="sampled token minus SFT student at T=1, points",
    )


CLAIM = Claim(
    number=10,
    title=(
        "The cache tells before any training whether the loss of the sampled token will end below "
        "the SFT student."
    ),
    source=(
        "this project: `lopd cache inspect` and `lopd distill` warn by this rule "
        "([how](objectives.md#which-loss-suits-a-cache))."
    ),
    method=(
        "The rule was set with the caches of three settings in view, and then nine others were "
        "made or opened. A setting counts as harm or gain where the 95% interval of its difference "
        "leaves 0 out, and as warned where the rule warns for most of its seeds. The claim holds "
        "where both outcomes occur and the rule is right in each."
    ),
    arms=ARMS,
    judge=judge,
    reads=tuple(
        dict.fromkeys(name for one in (*FRESH, *SEEN) for name in (one.cache, one.sft, one.sampled))
    ),
)
