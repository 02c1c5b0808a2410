"""Claim 5: Lightning OPD 2.0 recovers what two teachers cost, and what it costs with one."""

from __future__ import annotations

from typing import Literal

from examples.study.arms import Claim, Verdict
from examples.study.contrasts import (
    MARGIN,
    Row,
    difference,
    is_above,
    is_small,
    of_metric,
    paragraphs,
    points,
    table,
    teachers_text,
)
from examples.study.figures import Figures, Interval
from examples.study.two_teachers import MEASURED_MODELS, OFFLINE, SFT_A, SFT_B, corrected

FOREIGN = corrected("c5_foreign", "b", "a")
OWN = corrected("c5_own", "a", "a")
Answer = Literal["holds", "does not hold", "open"]


def judge(figures: Figures) -> Verdict:
    """Return the verdict. It is about accuracy at T=1; the table has the rest."""
    sampled = of_metric(figures, "sampled")
    # What there is to recover, with the same OPD teacher.
    lost = difference(sampled, OFFLINE["aa"].name, OFFLINE["ba"].name)
    gain = difference(sampled, FOREIGN.name, OFFLINE["ba"].name)
    gain_of_one = difference(sampled, OWN.name, OFFLINE["aa"].name)
    summary = (
        f"SFT by another teacher costs {points(lost)} at T=1 ({_lost(lost)}). The corrected cache "
        f"changes the accuracy with two teachers by {points(gain)} ({_change(gain)}), and with one "
        f"teacher by {points(gain_of_one)} ({_change(gain_of_one)})."
    )
    return Verdict(_answer(lost, gain), summary, details=_details(figures))


def _answer(lost: Interval, gain: Interval) -> Answer:
    if is_above(gain):
        # What it gains where nothing was shown to be lost is not a recovery.
        return "holds" if is_above(lost) else "open"
    if gain.high < MARGIN and (is_above(lost) or gain.high < 0):
        return "does not hold"
    return "open"


def _lost(lost: Interval) -> str:
    if is_above(lost):
        return "a loss"
    if lost.high < MARGIN:
        return f"no loss larger than {100 * max(0.0, lost.high):.1f} points was found"
    return "open"


def _change(change: Interval) -> str:
    if is_above(change):
        return "better"
    if change.high < 0:
        return "worse"
    if is_small(change):
        return "no difference larger than 2 points was found"
    return "open"


def _details(figures: Figures) -> tuple[str, ...]:
    own = OFFLINE["aa"]
    foreign = OFFLINE["ba"]
    rows = [
        Row(SFT_A.name, SFT_A.title),
        Row(own.name, own.title),
        Row(OWN.name, OWN.title, own.name),
        Row(SFT_B.name, SFT_B.title),
        Row(foreign.name, foreign.title),
        Row(FOREIGN.name, FOREIGN.title, foreign.name),
    ]
    greedy = of_metric(figures, "greedy")
    kl = of_metric(figures, "reverse_kl")
    pairs = ((FOREIGN, foreign), (OWN, own))
    changes = [difference(greedy, arm.name, other.name) for arm, other in pairs]
    kls = [difference(kl, arm.name, other.name).text(form="+.4f") for arm, other in pairs]
    return paragraphs(
        teachers_text(figures, SFT_A.name, MEASURED_MODELS),
        "The reverse KL is that from teacher A, but for the SFT student by B: that from B. The "
        "last column is corrected minus not corrected.",
        table(figures, rows, "correction"),
        f"Corrected minus not corrected in greedy: {points(changes[0])} with two teachers, "
        f"{points(changes[1])} with one. In reverse KL from A: {kls[0]} and {kls[1]} nats per "
        "token.",
        "What must be known: the correction takes away what a token, its place and its surprisal "
        "predict from other prompts. The bad habit of this student, to skip the steps, is such a "
        "thing: it is the same on every prompt, and so a correction cannot tell it from a style. "
        "Where a student's faults depend on the prompt, the correction may do better.",
        "What could overturn this: one student, one task of arithmetic, a model of 750,000 "
        "parameters with 32 tokens, teachers that differ in one choice of a token, and the "
        "defaults of `lopd cache residualise`.",
    )


CLAIM = Claim(
    number=5,
    title=(
        "Where another teacher made the demonstrations, Lightning OPD 2.0 recovers what this costs."
    ),
    source="Lightning OPD 2.0 (arXiv 2607.28449)",
    method=(
        "The students and the scores are those of claim 2. `lopd cache residualise` corrects the "
        "scores by teacher A of the responses of SFT by B, and, to see what it costs where the "
        "teachers agree, those of SFT by A. The steps of distill are the same."
    ),
    arms=(FOREIGN, OWN),
    judge=judge,
    reads=(SFT_A.name, SFT_B.name, OFFLINE["aa"].name, OFFLINE["ba"].name),
)
