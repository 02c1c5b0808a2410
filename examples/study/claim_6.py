"""Claim 6: what the choices of the paper's reference code do, each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    LIGHTNING,
    Answer,
    Arm,
    Claim,
    Command,
    Place,
    Verdict,
    distilled,
)
from examples.study.figures import METRICS, Figures, MissingFigures
from examples.study.outcomes import changes, measured
from examples.study.tables import results_table, table_against, titles_of
from examples.study.wording import words

# The temperature of the paper's rollouts, at which its online baseline scores the student too.
TEMPERATURE = 0.8
ALTERED = "altered"
# What altered_caches.py writes beside it.
ALTERED_FIGURES = f"{ALTERED}.json"
RETOKENISED = "retokenised.json"
# A clip that no advantage reaches.
NO_CLIP = 1000
_SFT_STAGES = tuple((HABIT_SFT.name, stage) for stage in ("demonstrate", "sft"))


def from_altered(place: Place, *how: str) -> tuple[Command, ...]:
    """Return the commands that alter the shared cache, and learn from it by the paper's loss.

    Args:
        place: The place of the arm.
        how: The alteration and its options.
    """
    name, *options = how
    out = place.run / ALTERED
    source = place.of(HABIT_SFT.name) / "score"
    return (
        ("python", "altered_caches", name, str(source), str(out), *options),
        ("lopd", "distill", f"distill.cache={out}", "distill.allow_foreign_cache=true", *LIGHTNING),
    )


def _no_end(place: Place) -> tuple[Command, ...]:
    rollouts = place.of(HABIT_SFT.name) / "rollout"
    counted = (
        "python",
        "altered_responses",
        "retokenised",
        str(rollouts),
        str(place.run / RETOKENISED),
        str(HABIT.config),
        *HABIT.overrides(place.seed),
    )
    return (counted, *from_altered(place, "no_end"))


NO_END = Arm(
    name="c6_no_end",
    title="the end token is lost",
    setting=HABIT,
    commands=_no_end,
    copied=_SFT_STAGES,
    after=(HABIT_SFT.name,),
)
TEMPERED = Arm(
    name="c6_tempered",
    title=f"rollouts at temperature {TEMPERATURE}",
    setting=HABIT,
    commands=lambda place: tuple(
        ("lopd", verb, f"rollout.temperature={TEMPERATURE}", *LIGHTNING)
        for verb in ("rollout", "score", "distill")
    ),
    copied=_SFT_STAGES,
    after=(HABIT_SFT.name,),
)
MISMATCHED = Arm(
    name="c6_mismatched",
    title=f"the student scored at temperature {TEMPERATURE}, the teacher at 1",
    setting=HABIT,
    commands=lambda place: from_altered(place, "mismatched", "--temperature", str(TEMPERATURE)),
    copied=_SFT_STAGES,
    after=(HABIT_SFT.name,),
)
UNCLIPPED = distilled("c6_no_clip", "no clip", *LIGHTNING, f"distill.advantage_clip={NO_CLIP}")
ARMS = (NO_END, TEMPERED, MISMATCHED, UNCLIPPED)

_IN_WORDS = {
    "harm": "Shown to cost something",
    "mixed": "Shown to cost something and to gain something else",
    "gain": "Shown to gain something",
    "equal": "No difference larger than 2 points of accuracy",
    "open": "Open",
}
_READING = (
    'Outcomes: "harm", "gain" or "mixed" where an interval of 95% leaves 0 out, in an accuracy or '
    'the reverse KL; "equal" where none does and both accuracies are within 2 points; "open" '
    "otherwise. There are three intervals a line, so about one in twenty of all of them leaves 0 "
    "out by chance."
)
_MEANINGS = """\
What was altered, and only that:

- *The end token is lost.* The code decodes a response and tokenises the text again. The end token
  is not in that text. Here the last token of each finished response is removed from the cache, with
  its scores.
- *Tempered rollouts.* The paper samples at 0.8 and scores at 1. So does this arm.
- *The student scored at another temperature.* In that code's online baseline the student's logits
  are divided by the temperature of the rollouts, and the teacher's are not. A student so trained
  rests where log pi = 0.8 log pi_T + const. The cache of this arm holds that teacher, pi_T^0.8
  normalised, over rollouts at temperature 1. So the arm has the resting point of that choice, and
  not its path. The 24 tokens outside of the top 8 share their probability in equal parts.
- *No clip.* The paper clips an advantage at 10 nats."""
_LIMITS = (
    "What could overturn this: one student, one task of arithmetic, models of 750 thousand "
    "parameters, 32 tokens of vocabulary, and 16 steps. A student that already ends its responses "
    "well has little to lose with its end tokens in so few steps. Combinations of the choices were "
    "not tried."
)


def judge(figures: Figures) -> Verdict:
    """Hold each choice against Lightning OPD on the same SFT student."""
    base = HABIT_LIGHTNING.name
    for metric in METRICS:
        figures.values(base, metric)
    found = measured(figures, ARMS)
    if not found:
        raise MissingFigures("no arm of claim 6 is measured")
    outcomes = {arm.name: changes(figures, arm.name, base) for arm in found}
    clip, needs_clip = _clip(figures)
    tested = [arm for arm in ARMS if arm is not UNCLIPPED or needs_clip]
    is_whole = all(arm in found for arm in tested)
    kinds = set(outcomes.values())
    answer: Answer = "open"
    if kinds & {"equal", "gain"}:
        answer = "does not hold"
    elif is_whole and kinds <= {"harm", "mixed"}:
        answer = "holds"
    missing = [arm.title for arm in tested if arm not in found]
    sentences = _sentences(figures, found, outcomes)
    if missing:
        sentences.append(f"Not measured: {', '.join(missing)}.")
    titles = titles_of(measured(figures, [HABIT_SFT, HABIT_LIGHTNING, *found]))
    return Verdict(
        answer=answer,
        summary=" ".join([*sentences, _retokenised(figures)]),
        details=(
            results_table(figures, titles),
            table_against(figures, found, HABIT_LIGHTNING, outcomes),
            _READING,
            f"{_MEANINGS}\n\n{clip}{_approximated(figures)}",
            _LIMITS,
        ),
    )


def _sentences(figures: Figures, arms: Sequence[Arm], outcomes: dict[str, str]) -> list[str]:
    """Return a sentence for each outcome that there is, with the arms that have it."""
    sentences = []
    for outcome, said in _IN_WORDS.items():
        of_outcome = [
            f"{arm.title} ({_differences(figures, arm.name, HABIT_LIGHTNING.name)})"
            for arm in arms
            if outcomes[arm.name] == outcome
        ]
        if of_outcome:
            sentences.append(f"{said}: {'; '.join(of_outcome)}.")
    return sentences


def _differences(figures: Figures, arm: str, other: str) -> str:
    """Return arm - other in words: "T=1 +1.2 [..] points, greedy .. points, reverse KL .."."""
    sampled, greedy, divergence = (
        words(figures.difference(arm, other, metric), metric)
        for metric in ("sampled", "greedy", "reverse_kl")
    )
    return f"T=1 {sampled}, greedy {greedy}, reverse KL {divergence}"


def recorded(figures: Figures, arm: Arm, file: str) -> list[dict[str, Any]]:
    """Return what the runs of an arm have written into a JSON file, of each seed that has it."""
    try:
        return [*figures.recorded(arm.name, file).values()]
    except MissingFigures:
        return []


def _clip(figures: Figures) -> tuple[str, bool]:
    """Return how often the clip acts, in words, and whether a run without it is another run."""
    try:
        steps = figures.steps(HABIT_LIGHTNING.name, "clipped_share")
    except MissingFigures:
        return "How often the clip acts was not read.", True
    shares = [share for of_seed in steps.values() for _, share in of_seed]
    if max(shares) == 0:
        return (
            f"In all {len(shares)} steps of {len(steps)} seeds no advantage was beyond the clip. A "
            "run without it is the same run, and has no line.",
            False,
        )
    return (
        f"In {sum(share > 0 for share in shares)} of {len(shares)} steps of {len(steps)} seeds the "
        f"clip acts, on at most {100 * max(shares):.3f}% of the tokens.",
        True,
    )


def _approximated(figures: Figures) -> str:
    """Return how far the equal parts of the tail may be from the truth, in words."""
    errors = [one["largest_error"] for one in recorded(figures, MISMATCHED, ALTERED_FIGURES)]
    if not errors:
        return ""
    return (
        " If one token had all of what the 24 share, the teacher at the other temperature would "
        f"differ by {max(errors):.3f} nats at most."
    )


def _retokenised(figures: Figures) -> str:
    """Return in words how many responses change where their text is tokenised again."""
    counts = recorded(figures, NO_END, RETOKENISED)
    if not counts:
        return "How many responses change when their text is tokenised again was not counted."
    total, changed, ended, added = (
        sum(of_seed[name] for of_seed in counts)
        for name in ("responses", "changed", "with_end", "added_think")
    )
    text = (
        f"Tokenising the text of the responses again changes {changed:,} of {total:,} "
        f"({100 * changed / total:.2f}%), apart from the end token that all {ended:,} finished "
        f"ones lose; {added:,} do not begin with <think>"
    )
    if changed == 0:
        return f"{text}: with a token per character there is nothing to test here."
    return f"{text}. No arm tests this."


CLAIM = Claim(
    number=6,
    title=(
        "Each choice of the reference code that this example can test costs accuracy or closeness "
        "to the teacher."
    ),
    source="The reference code of arXiv 2604.13010, and this project, which makes them impossible.",
    method=(
        "Each choice is made alone, from the same SFT student, and held against Lightning OPD with "
        "the same 16 steps of 64 at the same rate. Differences are paired by seed."
    ),
    arms=ARMS,
    judge=judge,
    reads=(HABIT_SFT.name, HABIT_LIGHTNING.name),
)
