"""Claim 10: a cache tells beforehand whether the loss of the sampled token will do harm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from examples.study.arms import Answer, Claim, Plot, Verdict
from examples.study.figures import Figures, Interval
from examples.study.foretold import ARMS, FRESH, OLDER, PAIRS, SEEN, Foretold, Kind
from examples.study.outcomes import sign_of
from examples.study.plots import draw_scatter
from examples.study.recommendation import FILE, METRIC
from examples.study.wording import shown, words
from lopd.cache.recommendation import SHARP_SHARE, recommend
from lopd.cache.regime import RegimeFigures

# The rule before this one: the share of all tokens that are beyond 10 nats.
FORMER_SHARE = 0.001


@dataclass(frozen=True)
class Outcome:
    """A setting: what its caches foretell, and what came of it.

    Attributes:
        title: The setting.
        kind: What the base student is.
        caches: What was measured of its caches, by seed.
        reached: The share of right answers after distilling minus that before, at T=1, by seed.
        difference: The mean of these with its interval.
        sft: The share of right answers before, at T=1.
    """

    title: str
    kind: Kind
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
    def sign(self) -> int:
        """-1 for harm, 1 for a gain, 0 where the interval holds 0."""
        return sign_of(self.difference)

    def mean(self, figure: Callable[[RegimeFigures], float]) -> float:
        """Return the mean of a figure over the caches."""
        return fmean(figure(one) for one in self.caches.values())


def outcomes_of(figures: Figures, settings: Sequence[Foretold]) -> list[Outcome]:
    """Return what came of settings. Raises MissingFigures where one was not measured."""
    return [_outcome(figures, one) for one in settings]


def _outcome(figures: Figures, setting: Foretold) -> Outcome:
    after = figures.values(setting.sampled, METRIC)
    before = figures.values(setting.sft, METRIC)
    caches = figures.recorded(setting.cache, FILE)
    return Outcome(
        setting.title,
        setting.kind,
        {seed: RegimeFigures(**content) for seed, content in sorted(caches.items())},
        {seed: after[seed] - before[seed] for seed in sorted(after) if seed in before},
        figures.difference(setting.sampled, setting.sft, METRIC),
        figures.mean(setting.sft, METRIC),
    )


Rule = Callable[[Outcome], bool]


def other_rules(seen: Sequence[Outcome]) -> dict[str, Rule]:
    """Return rules that foretell harm from something else, by their names.

    The limit of a figure lies in the middle, by its logarithm, between the settings that the limit
    of the cache's rule was taken from. A figure that does not tell those apart has no rule.
    """
    candidates: dict[str, Callable[[Outcome], float]] = {
        "the share of all tokens beyond 10 nats": lambda one: one.mean(lambda c: c.clipped_share),
        "the number of tokens beyond 10 nats": lambda one: one.mean(lambda c: c.num_excluded),
        "the least advantage": lambda one: one.mean(lambda c: -c.min_advantage),
        "the mean advantage": lambda one: one.mean(lambda c: -c.mean_advantage),
        "the share of tokens beyond 3 nats": lambda one: one.mean(lambda c: c.far_share),
        "the SFT student's right answers at T=1": lambda one: one.sft.mean,
    }
    rules: dict[str, Rule] = {
        "always warned": lambda one: True,
        "never warned": lambda one: False,
        "the kind of the base student": lambda one: one.kind != "has a bad habit",
        "the former rule (0.1% of all tokens beyond 10 nats)": lambda one: (
            one.mean(lambda c: c.clipped_share) >= FORMER_SHARE
        ),
    }
    for name, figure in candidates.items():
        rule = _between(seen, figure)
        if rule is not None:
            rules[name] = rule
    return rules


def _between(seen: Sequence[Outcome], figure: Callable[[Outcome], float]) -> Rule | None:
    harmed = [figure(one) for one in seen if one.sign < 0]
    gained = [figure(one) for one in seen if one.sign > 0]
    if not harmed or not gained or min(*harmed, *gained) <= 0:
        return None
    if max(gained) < min(harmed):
        limit = math.sqrt(max(gained) * min(harmed))
        return lambda one: figure(one) >= limit
    if max(harmed) < min(gained):
        limit = math.sqrt(max(harmed) * min(gained))
        return lambda one: figure(one) <= limit
    return None


def num_right(rule: Rule, settled: Sequence[Outcome]) -> int:
    """Return for how many settings a rule foretells what came of them."""
    return sum(rule(one) == (one.sign < 0) for one in settled)


def judge(figures: Figures) -> Verdict:
    """Compare what the caches of settings foretell with what came of them."""
    fresh = outcomes_of(figures, FRESH)
    older = outcomes_of(figures, OLDER)
    seen = outcomes_of(figures, SEEN)
    settled = [one for one in fresh if one.sign]
    harmed = [one for one in settled if one.sign < 0]
    wrong = [one for one in settled if one.is_warned != (one.sign < 0)]
    answer: Answer
    if wrong:
        answer = "does not hold"
    elif harmed and len(harmed) < len(settled):
        answer = "holds"
    else:
        answer = "open"
    num_gained = len(settled) - len(harmed)
    rules = other_rules(seen)
    summary = (
        f"In {len(fresh)} settings that were made after the limit was set, the rule foretold "
        f"{len(settled) - len(wrong)} of the {len(settled)} outcomes that are not open (always "
        f"warned: {len(harmed)}, never warned: {num_gained}, by the kind of the base student: "
        f"{num_right(rules['the kind of the base student'], settled)}). The sampled token ended "
        f"below the SFT student in {len(harmed)} and above it in {num_gained}."
    )
    if wrong:
        summary += f" Wrong: {'; '.join(f'{one.title} ({_said(one)})' for one in wrong)}."
    return Verdict(
        answer=answer,
        summary=summary,
        details=(
            _table(fresh, older, seen),
            _RULES,
            _rules_table(rules, settled, [one for one in (*settled, *older) if one.sign]),
            _SPLIT,
            _LIMITS,
        ),
        plots=(Plot("study_10.svg", _CAPTION, partial(_draw, figures)),),
    )


def _said(one: Outcome) -> str:
    warned = "a warning" if one.is_warned else "no warning"
    return f"{warned}, then {words(one.difference, METRIC)}"


def _table(fresh: Sequence[Outcome], older: Sequence[Outcome], seen: Sequence[Outcome]) -> str:
    lines = [
        "| setting | beyond 3 nats, % | of these beyond 10, %, of each seed | warned | SFT student,"
        " T=1, % | sampled token minus it, points | outcome |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for group, remark in ((fresh, ""), (older, " (older)"), (seen, " (the limit is from it)")):
        for one in group:
            caches = [*one.caches.values()]
            cells = (
                f"{one.title}{remark}",
                f"{100 * fmean(cache.far_share for cache in caches):.2f}",
                ", ".join(f"{100 * cache.excluded_share:.0f}" for cache in caches),
                f"{one.num_warned} of {len(caches)}",
                shown(one.sft, METRIC),
                shown(one.difference, METRIC, sign=True),
                {-1: "harm", 0: "open", 1: "gain"}[one.sign],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rules_table(
    rules: Mapping[str, Rule], settled: Sequence[Outcome], with_older: Sequence[Outcome]
) -> str:
    every: dict[str, Rule] = {"the rule of this claim": lambda one: one.is_warned, **rules}
    pairs = [one for one in settled if one.title in PAIRS]
    first = [one for one in settled if one.title not in PAIRS]
    groups = {
        "the first of them": first,
        "pairs with another teacher": pairs,
        "all that were made afterwards": settled,
        "with the older ones": with_older,
    }
    lines = [
        f"| what foretells harm, right in | {' | '.join(groups)} |",
        f"|---|{'---:|' * len(groups)}",
    ]
    for name, rule in every.items():
        cells = [f"{num_right(rule, group)} of {len(group)}" for group in groups.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


_CAPTION = (
    "Each dot is a cache: the share of tokens beyond 10 nats among those beyond 3, and what the "
    "loss of the sampled token added at T=1. A cache with no token beyond 10 stands at 0.001. "
    "Crosses are the settings that were older than the limit (the line)."
)
_RULES = (
    "Other rules beside it. A limit of a figure lies in the middle, by its logarithm, between the "
    "settings that this claim's limit was taken from; figures that do not tell those apart have no "
    "line. The kind of the base student foretells harm for every small one and every one whose "
    "training was stopped early, and none for one with a bad habit, without a look at the cache."
)
_SPLIT = (
    "The first of the later settings all did harm, and the rule warned of each, as a warning every "
    "time does. The pairs with another teacher were made to tell the rule from the kind of the "
    "student. The kinds were written down when the first outcomes were known, so the pairs alone "
    "test them."
)
_LIMITS = (
    "The rule: of the tokens whose advantage is beyond 3 nats, 6% or more are beyond 10 nats, and "
    "at least 3 tokens. It was written down when the three settings that it was taken from had "
    "been seen. The older settings do not count: what came of them was mostly known, and logs had "
    "their shares. Step 550 was chosen when the caches of other settings had been looked at, and "
    "the pairs with another teacher were added when the first five had all done harm, which a "
    "warning every time foretells as well; no cache of theirs was there. What could overturn this: "
    "seeds of a setting share a teacher and a base student, so a setting is one test; settings of "
    "one kind resemble each other; the small student has 64 steps of 256, the two notations of the "
    "older settings a rate of 3e-5, and all others 16 steps of 64 at 1e-4, of which the rule knows "
    "nothing; two of the later harms are of a student that is right in 8%, where little can be "
    "lost; all of it is one task with 32 tokens."
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
        {one.title: dots(one) for one in outcomes_of(figures, (*OLDER, *SEEN))},
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
        "The limit of the rule was set with the caches of three settings in view. Other settings "
        "were made after it. A setting counts as harm or gain where the 95% interval of its "
        "difference leaves 0 out, and as warned where the rule warns for most of its seeds. The "
        "claim holds where both outcomes occur among the later settings and the rule is right in "
        "each."
    ),
    arms=ARMS,
    judge=judge,
    reads=tuple(
        dict.fromkeys(
            name for one in (*FRESH, *OLDER, *SEEN) for name in (one.cache, one.sft, one.sampled)
        )
    ),
)
