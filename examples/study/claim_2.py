"""Claim 2: the teacher of the demonstrations and the teacher of the scores must be the same."""

from __future__ import annotations

from typing import Literal

from examples.study.arms import Arm, Claim, Verdict
from examples.study.contrasts import (
    MARGIN,
    Column,
    Row,
    at_the_start,
    contrast,
    difference,
    is_above,
    nats,
    of_metric,
    paragraphs,
    points,
    table,
    teachers_text,
)
from examples.study.figures import Figures, Interval
from examples.study.two_teachers import (
    MEASURED_MODELS,
    OFFLINE,
    ONLINE,
    SFT_A,
    SFT_B,
    SFT_STEPS,
    SFT_WEAK,
    WEAK,
    WEAK_SFT_STEPS,
)

# Distances are the same where one is at most so much larger than the other. Named before any arm
# was made.
MATCHED = 1.25
Answer = Literal["holds", "does not hold", "open"]


def consistency(column: Column, grid: dict[str, Arm]) -> Interval:
    """Return what one teacher has before two, as a mean over both teachers: the interaction."""
    # Each SFT teacher and each OPD teacher occurs once on both sides, so that neither a better
    # teacher nor a better SFT student counts.
    signs = {"aa": 0.5, "bb": 0.5, "ab": -0.5, "ba": -0.5}
    return contrast(column, {grid[pair].name: sign for pair, sign in signs.items()})


def judge(figures: Figures) -> Verdict:
    """Return the verdict. It is about accuracy at T=1; the tables have the rest."""
    sampled = of_metric(figures, "sampled")
    offline = consistency(sampled, OFFLINE)
    online = consistency(sampled, ONLINE)
    # The same OPD teacher, the same distance from it: what is left is whose notation SFT taught.
    beyond = difference(sampled, WEAK.name, OFFLINE["ba"].name)
    start = at_the_start(figures)
    far = contrast(start, {OFFLINE["ba"].name: 1.0})
    weak = contrast(start, {WEAK.name: 1.0})
    ratio = far.mean / weak.mean
    is_matched = 1 / MATCHED <= ratio <= MATCHED
    answer = _answer(offline, online, beyond, is_matched=is_matched)
    matched = "" if is_matched else f" (not matched: the ratio is {ratio:.2f})"
    summary = (
        f"{_sentence(offline, online)} The control is a weaker SFT by A. It begins at {nats(weak)} "
        f"nats per token from A, where SFT by B begins at {nats(far)}{matched}. After the same "
        f"distillation from A, it is right more often than SFT by B by {points(beyond)}: "
        f"{_reading(beyond)}."
    )
    return Verdict(answer, summary, details=_details(figures))


def _answer(offline: Interval, online: Interval, beyond: Interval, *, is_matched: bool) -> Answer:
    both = (offline, online)
    if not all(is_above(cost) for cost in both):
        return "does not hold" if all(cost.high < MARGIN for cost in both) else "open"
    # There is a cost. It is one of consistency only if the distance does not explain it.
    if is_matched and is_above(beyond):
        return "holds"
    if is_matched and beyond.high < MARGIN:
        return "does not hold"
    return "open"


def _sentence(offline: Interval, online: Interval) -> str:
    return (
        f"One teacher for both against two teachers, at T=1: {points(offline)} offline "
        f"({_size(offline)}) and {points(online)} online ({_size(online)})."
    )


def _size(cost: Interval) -> str:
    """Return what an interval allows to be said of a gain by consistency."""
    if is_above(cost):
        return "a gain"
    if cost.high < 0:
        return "a loss"
    if cost.high < MARGIN:
        return f"no gain larger than {100 * cost.high:.1f} points was found"
    return f"open: a gain of up to {100 * cost.high:.1f} points is possible"


def _reading(beyond: Interval) -> str:
    """Return what the control says."""
    if is_above(beyond):
        return "the distance alone does not explain it"
    if beyond.high < MARGIN:
        return (
            "whose demonstrations they were costs no more than "
            f"{100 * max(0.0, beyond.high):.1f} points beyond the distance"
        )
    return "it is open whether the distance explains it"


def _details(figures: Figures) -> tuple[str, ...]:
    rows = [
        Row(SFT_A.name, SFT_A.title),
        Row(SFT_B.name, SFT_B.title),
        Row(SFT_WEAK.name, SFT_WEAK.title),
    ]
    for grid in (OFFLINE, ONLINE):
        # Compared within an OPD teacher, from whom the reverse KL is measured too.
        for opd in "ab":
            own = grid[opd + opd]
            other = grid[("b" if opd == "a" else "a") + opd]
            rows += [Row(own.name, own.title), Row(other.name, other.title, own.name)]
    rows.append(Row(WEAK.name, WEAK.title, OFFLINE["ba"].name))
    return paragraphs(
        teachers_text(figures, SFT_A.name, MEASURED_MODELS),
        "The reverse KL of an SFT student is that from its own teacher, of a distilled one that "
        "from its OPD teacher. The last column compares with the line of the same OPD teacher and "
        "of one teacher for both; the weaker SFT is compared with SFT by B.",
        table(figures, rows, "difference"),
        _other_measures(figures),
        "What could overturn this: one student and one task of arithmetic, in a model of 750,000 "
        "parameters with 32 tokens. The teachers differ in one choice of a token, five times a "
        "response, and each knows the other's notation. Teachers that do not know each other's "
        "way of writing, or that differ in what they reason, may cost more.",
    )


def _other_measures(figures: Figures) -> str:
    """Return sentences about what the verdict does not use."""
    greedy = of_metric(figures, "greedy")
    kl = of_metric(figures, "reverse_kl")
    sampled = of_metric(figures, "sampled")
    distance = difference(sampled, OFFLINE["aa"].name, WEAK.name)
    gained = difference(sampled, OFFLINE["ba"].name, SFT_B.name)
    gained_weak = difference(sampled, WEAK.name, SFT_WEAK.name)
    return (
        f"One teacher against two in greedy: {points(consistency(greedy, OFFLINE))} offline, "
        f"{points(consistency(greedy, ONLINE))} online. In reverse KL: "
        f"{consistency(kl, OFFLINE).text(form='+.4f')} and "
        f"{consistency(kl, ONLINE).text(form='+.4f')} nats per token (below 0: nearer to the "
        "teacher). The distance alone, which is SFT by A minus the weaker SFT by A after both were "
        f"distilled from A: {points(distance)} at T=1. The distillation from A gave SFT by B "
        f"{points(gained)}, and the weaker SFT by A {points(gained_weak)}."
    )


CLAIM = Claim(
    number=2,
    title=(
        "The teacher that demonstrates must be the one that scores, online and offline, and the "
        "student's distance from the teacher does not explain it."
    ),
    source="Lightning OPD (arXiv 2604.13010), which has no control for the distance",
    method=(
        "Two teachers of one making prefer another notation each. A student is fine-tuned by one "
        f"for {SFT_STEPS} steps and distilled by either, offline and with fresh rollouts at every "
        f"step (the paper's update, 16 steps of 64). The control is {WEAK_SFT_STEPS} steps of SFT "
        "by A, which leave a student about as far from A as SFT by B does."
    ),
    arms=(SFT_A, SFT_B, SFT_WEAK, *OFFLINE.values(), WEAK, *ONLINE.values()),
    judge=judge,
)
