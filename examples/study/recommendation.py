"""How often the recommendation that lopd gives from a cache alone was right over the study's runs.

A case is a setting: its SFT student, whose run has the cache, and an arm for each way to learn from
that cache. ``record`` measures the caches, and the page calls ``section``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

from examples.study import claim_9
from examples.study.arms import HABIT_LIGHTNING, HABIT_SFT, HABIT_TOP_K, Arm
from examples.study.figures import Figures, MissingFigures
from examples.study.foretold import FRESH, OLDER
from lopd.artifacts import MANIFEST, publish_json
from lopd.cache.recommendation import Recommendation, recommend
from lopd.cache.regime import RegimeFigures, measure_regime

# The ways to learn from a cache that a recommendation can name.
SAMPLED = "lightning"
CAPPED = "lightning, importance cap"
TOP_K = "top_k_reverse_kl"
FORWARD = "top_k_forward_kl"
# A recommendation is right if its arm is so near to the best arm of the same seed, at T=1.
MARGIN = 0.02
METRIC = "sampled"
# What was measured of a cache, in the folder of the run that has it.
FILE = "regime.json"
_INTRODUCTION = """\
Before any training, `lopd cache inspect` and `lopd distill` say from the cache whether the teacher
is sharp, and recommend a loss ([how](objectives.md#which-loss-suits-a-cache)). Here this is
compared with what came of it, and with controls that look at no cache: the same warning, or the
same loss, every time."""
_LIMITS = """\
The shares of right answers are at T=1. The seeds of one setting share the teacher and the base
student, so they are one test of the rule and not several. With a top-K in the cache the rule
recommends the top-K loss every time, so there it equals its control by construction. Without one
it is compared with the plain and the capped loss alone, and of the student whose training was
stopped early both end below its SFT student. The limit of the warning was set with
the caches of these three settings in view, so here it can hardly be wrong; [claim 10](#claim-10)
tests it with other settings. All of them are tiny models of one task."""
# By seed.
Values: TypeAlias = Mapping[int, float]


@dataclass(frozen=True)
class Case:
    """A setting whose caches are measured."""

    title: str
    # The arm with the student that all others began with. Its run has the cache.
    sft: str
    # The arm of each way to learn.
    arms: Mapping[str, str]


CASES = (
    Case(
        "a bad habit, a teacher of the same size",
        HABIT_SFT.name,
        {SAMPLED: HABIT_LIGHTNING.name, TOP_K: HABIT_TOP_K.name},
    ),
    Case(
        "a student of a sixth of the teacher",
        "small/sft",
        {
            SAMPLED: "small/lightning",
            TOP_K: "small/distilled",
            CAPPED: "small/lightning_cap",
            FORWARD: "small/forward_kl",
        },
    ),
    Case(
        "a student whose training was stopped early",
        claim_9.SFT.name,
        {
            SAMPLED: claim_9.PLAIN.name,
            CAPPED: claim_9.CAP.name,
            TOP_K: claim_9.TOP_K.name,
        },
    ),
)


@dataclass(frozen=True)
class Run:
    """A cache of one seed with what came of each way to learn from it.

    Attributes:
        case: The title of its case.
        figures: What was measured of the cache.
        sft: The share of right answers of the SFT student.
        reached: The share of right answers of each way to learn, at least two.
    """

    case: str
    seed: int
    figures: RegimeFigures
    sft: float
    reached: Mapping[str, float]

    def is_good(self, way: str) -> bool:
        """Return whether a way came within MARGIN of the best one."""
        return self.reached[way] >= max(self.reached.values()) - MARGIN

    @property
    def is_harmed(self) -> bool:
        """Whether the sampled token ended below the SFT student."""
        return self.reached[SAMPLED] < self.sft


@dataclass(frozen=True)
class Score:
    """How often something was right."""

    right: int
    of: int

    def __str__(self) -> str:
        return f"{self.right} of {self.of}"


def way_of(recommendation: Recommendation) -> str:
    """Return the recommended way to learn."""
    if recommendation.loss.value != SAMPLED:
        return str(recommendation.loss.value)
    return SAMPLED if recommendation.importance_cap.value is None else CAPPED


def record(arms: Mapping[str, Arm], seeds: Iterable[int], cases: Sequence[Case] = CASES) -> None:
    """Measure the caches of all cases whose runs are there, and keep the figures in their runs.

    Args:
        arms: All arms, by name.
        seeds: The seeds.
        cases: The cases.
    """
    # The page may be made again without the runs, so it reads figures and not caches.
    found = [arms[case.sft] for case in cases if case.sft in arms]
    found += [arms[one.cache] for one in (*FRESH, *OLDER) if one.cache in arms]
    for run in [arm.place(seed).run for arm in found for seed in seeds]:
        if (run / "score" / MANIFEST).is_file():
            measured = measure_regime(run / "score")
            if measured is not None:
                publish_json(run / FILE, asdict(measured))


def runs_of(figures: Figures, cases: Sequence[Case] = CASES) -> list[Run]:
    """Return the runs of all cases that were measured in all that they need."""
    found = []
    for case in cases:
        try:
            caches = figures.recorded(case.sft, FILE)
        except MissingFigures:
            continue
        sft = _values(figures, case.sft)
        reached = {way: _values(figures, arm) for way, arm in case.arms.items()}
        for seed, content in sorted(caches.items()):
            of_seed = {way: values[seed] for way, values in reached.items() if seed in values}
            # With one way alone any recommendation would be right.
            if seed in sft and SAMPLED in of_seed and len(of_seed) > 1:
                measured = RegimeFigures(**content)
                found.append(Run(case.title, seed, measured, sft[seed], of_seed))
    return found


def _values(figures: Figures, arm: str) -> Values:
    try:
        return figures.values(arm, METRIC)
    except MissingFigures:
        return {}


def without_top_k(run: Run) -> Run:
    """Return the same run as if its cache had only the sampled token's log-probability."""
    figures = replace(run.figures, top_k=0, top_k_coverage=None, teacher_entropy=None)
    reached = {way: value for way, value in run.reached.items() if way in (SAMPLED, CAPPED)}
    return replace(run, figures=figures, reached=reached)


def judge_loss(runs: Sequence[Run]) -> dict[str, Score]:
    """Return how often the recommended way was good, and how often each fixed way would have been.

    Runs without an arm of the recommended way, or with no arm to compare it with, are left out.
    """
    used: list[tuple[Run, str]] = []
    for run in runs:
        recommendation = recommend(run.figures)
        way = None if recommendation is None else way_of(recommendation)
        if way in run.reached and len(run.reached) > 1:
            used.append((run, way))
    scores = {"recommended": Score(sum(run.is_good(way) for run, way in used), len(used))}
    ways = sorted({way for run, _ in used for way in run.reached})
    for way in ways:
        there = [run for run, _ in used if way in run.reached]
        scores[f"always {way}"] = Score(sum(run.is_good(way) for run in there), len(there))
    return scores


def judge_warning(runs: Sequence[Run]) -> dict[str, Score]:
    """Return how often "the sampled token does harm here" was rightly said, or rightly not said."""
    used = [(run, found) for run in runs if (found := recommend(run.figures)) is not None]
    warned = [found.regime == "sharp teacher" for _, found in used]
    harmed = [run.is_harmed for run, _ in used]
    right = sum(one == other for one, other in zip(warned, harmed, strict=True))
    return {
        "by the cache": Score(right, len(used)),
        "always warned": Score(sum(harmed), len(used)),
        "never warned": Score(len(used) - sum(harmed), len(used)),
    }


def section(figures: Figures, cases: Sequence[Case] = CASES) -> list[str]:
    """Return the section of the page as paragraphs of Markdown, which are not wrapped.

    Raises:
        MissingFigures: No run of any case was measured.
    """
    runs = runs_of(figures, cases)
    if not runs:
        raise MissingFigures("no cache of a seed with at least two ways to learn from it")
    header = (
        "| setting | seed | beyond 10 nats, % | beyond 3, % | least, nats | mean, nats | regime | "
        "SFT, % | sampled token, % | best, % |\n"
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---|"
    )
    return [
        "## How often the recommendation from the cache alone was right",
        _INTRODUCTION,
        *_answers(runs),
        "\n".join([header, *map(_row, runs)]),
        _LIMITS,
    ]


def _answers(runs: Sequence[Run]) -> list[str]:
    alone = judge_loss([without_top_k(run) for run in runs])
    return [
        _told("That the sampled token would end below the SFT student was", judge_warning(runs)),
        _told(
            f"The recommended loss came within {100 * MARGIN:.0f} points of the best one in",
            judge_loss(runs),
        ),
        _told("As if the caches had no top-K, the recommended one did so in", alone),
    ]


def _told(beginning: str, scores: Mapping[str, Score]) -> str:
    (name, first), *controls = scores.items()
    if not first.of:
        return f"{beginning} no run, because none has the arms for it."
    said = "rightly said or not said in " if name == "by the cache" else ""
    against = ", ".join(f"{control}: {score}" for control, score in controls)
    beaten = all(first.right > score.right for _, score in controls)
    end = "" if beaten else " A control is as good, so these runs do not show that the rule helps."
    return f"{beginning} {said}{first} runs ({against}).{end}"


def _row(run: Run) -> str:
    recommendation = recommend(run.figures)
    best = max(run.reached, key=lambda way: run.reached[way])
    cells = (
        run.case,
        str(run.seed),
        f"{100 * run.figures.clipped_share:.3f}",
        f"{100 * run.figures.far_share:.2f}",
        f"{run.figures.min_advantage:.1f}",
        f"{run.figures.mean_advantage:+.3f}",
        "unknown" if recommendation is None else recommendation.regime,
        f"{100 * run.sft:.1f}",
        f"{100 * run.reached[SAMPLED]:.1f}",
        f"{100 * run.reached[best]:.1f} ({best})",
    )
    return f"| {' | '.join(cells)} |"
