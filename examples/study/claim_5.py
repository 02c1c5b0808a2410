"""Claim 5: Lightning OPD 2.0 recovers what two teachers cost, and what it costs with one."""

from __future__ import annotations

from examples.study.arms import Answer, Arm, Claim, Verdict
from examples.study.claim_2 import teachers_text
from examples.study.figures import Figures, Interval
from examples.study.outcomes import MARGIN, is_within, sign_of
from examples.study.tables import table_of_pairs
from examples.study.two_teachers import OFFLINE, SFT_A, SFT_B, corrected
from examples.study.wording import shown, words

FOREIGN = corrected("c5_foreign", "b", "a")
OWN = corrected("c5_own", "a", "a")


def judge(figures: Figures) -> Verdict:
    """Return the verdict. It is about accuracy at T=1; the table has the rest."""
    # What there is to recover, with the same OPD teacher.
    lost = figures.difference(OFFLINE["aa"].name, OFFLINE["ba"].name, "sampled")
    gain = figures.difference(FOREIGN.name, OFFLINE["ba"].name, "sampled")
    gain_of_one = figures.difference(OWN.name, OFFLINE["aa"].name, "sampled")
    summary = (
        f"SFT by another teacher costs {words(lost, 'sampled')} at T=1 ({_lost(lost)}). The "
        f"corrected cache changes the accuracy with two teachers by {words(gain, 'sampled')} "
        f"({_change(gain)}), and with one teacher by {words(gain_of_one, 'sampled')} "
        f"({_change(gain_of_one)})."
    )
    return Verdict(_answer(lost, gain), summary, details=_details(figures))


def _answer(lost: Interval, gain: Interval) -> Answer:
    if sign_of(gain) > 0:
        # What it gains where nothing was shown to be lost is not a recovery.
        return "holds" if sign_of(lost) > 0 else "open"
    if gain.high < MARGIN and (sign_of(lost) > 0 or sign_of(gain) < 0):
        return "does not hold"
    return "open"


def _lost(lost: Interval) -> str:
    if sign_of(lost) > 0:
        return "a loss"
    if lost.high < MARGIN:
        return f"no loss larger than {100 * max(0.0, lost.high):.1f} points was found"
    return "open"


def _change(change: Interval) -> str:
    if sign_of(change) > 0:
        return "better"
    if sign_of(change) < 0:
        return "worse"
    if is_within(change):
        return "no difference larger than 2 points was found"
    return "open"


def _details(figures: Figures) -> tuple[str, ...]:
    own = OFFLINE["aa"]
    foreign = OFFLINE["ba"]
    corrections = ((FOREIGN, foreign), (OWN, own))
    pairs: list[tuple[Arm, Arm | None]] = [
        (SFT_A, None),
        (own, None),
        (OWN, own),
        (SFT_B, None),
        (foreign, None),
        (FOREIGN, foreign),
    ]
    greedy, kl = (
        [figures.difference(arm.name, other.name, metric) for arm, other in corrections]
        for metric in ("greedy", "reverse_kl")
    )
    return (
        teachers_text(figures),
        "The reverse KL is that from teacher A, but for the SFT student by B: that from B. The "
        "last column is corrected minus not corrected.",
        table_of_pairs(figures, pairs, "correction"),
        f"Corrected minus not corrected in greedy: {words(greedy[0], 'greedy')} with two teachers, "
        f"{words(greedy[1], 'greedy')} with one. In reverse KL from A: "
        f"{shown(kl[0], 'reverse_kl', sign=True)} and {words(kl[1], 'reverse_kl')}.",
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
