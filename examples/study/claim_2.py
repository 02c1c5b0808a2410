"""Claim 2: the teacher of the demonstrations and the teacher of the scores must be the same."""

from __future__ import annotations

from collections.abc import Mapping

from examples.study.arms import Answer, Arm, Claim, Verdict
from examples.study.figures import Figures, Interval, interval_of
from examples.study.outcomes import MARGIN, sign_of
from examples.study.tables import table_of_pairs
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
from examples.study.wording import shown, words

# Distances are the same where one is at most so much larger than the other. Named before any arm
# was made.
MATCHED = 1.25


def consistency(figures: Figures, metric: str, grid: Mapping[str, Arm]) -> Interval:
    """Return what one teacher has before two, as a mean over both teachers: the interaction."""
    # Each SFT teacher and each OPD teacher occurs once on both sides, so that neither a better
    # teacher nor a better SFT student counts.
    signs = {"aa": 0.5, "bb": 0.5, "ab": -0.5, "ba": -0.5}
    return figures.weighted_sum(metric, *((sign, grid[pair].name) for pair, sign in signs.items()))


def _at_the_start(figures: Figures, arm: Arm) -> Interval:
    """Return an arm's reverse KL from its OPD teacher before the first update."""
    # The responses of the first step are the student's own, so it is unbiased.
    of_seeds = figures.steps(arm.name, "reverse_kl").values()
    return interval_of([steps[0][1] for steps in of_seeds])


def judge(figures: Figures) -> Verdict:
    """Return the verdict. It is about accuracy at T=1; the tables have the rest."""
    offline = consistency(figures, "sampled", OFFLINE)
    online = consistency(figures, "sampled", ONLINE)
    # The same OPD teacher, the same distance from it: what is left is whose notation SFT taught.
    beyond = figures.difference(WEAK.name, OFFLINE["ba"].name, "sampled")
    far = _at_the_start(figures, OFFLINE["ba"])
    weak = _at_the_start(figures, WEAK)
    ratio = far.mean / weak.mean
    is_matched = 1 / MATCHED <= ratio <= MATCHED
    answer = _answer(offline, online, beyond, is_matched=is_matched)
    matched = "" if is_matched else f" (not matched: the ratio is {ratio:.2f})"
    summary = (
        f"{_sentence(offline, online)} The control is a weaker SFT by A. It begins at "
        f"{shown(weak, 'reverse_kl')} nats per token from A, where SFT by B begins at "
        f"{shown(far, 'reverse_kl')}{matched}. After the same distillation from A, it is right "
        f"more often than SFT by B by {words(beyond, 'sampled')}: {_reading(beyond)}."
    )
    return Verdict(answer, summary, details=_details(figures))


def _answer(offline: Interval, online: Interval, beyond: Interval, *, is_matched: bool) -> Answer:
    both = (offline, online)
    if not all(sign_of(cost) > 0 for cost in both):
        return "does not hold" if all(cost.high < MARGIN for cost in both) else "open"
    # There is a cost. It is one of consistency only if the distance does not explain it.
    if is_matched and sign_of(beyond) > 0:
        return "holds"
    if is_matched and beyond.high < MARGIN:
        return "does not hold"
    return "open"


def _sentence(offline: Interval, online: Interval) -> str:
    return (
        f"One teacher for both against two teachers, at T=1: {words(offline, 'sampled')} offline "
        f"({_size(offline)}) and {words(online, 'sampled')} online ({_size(online)})."
    )


def _size(cost: Interval) -> str:
    """Return what an interval allows to be said of a gain by consistency."""
    if sign_of(cost) > 0:
        return "a gain"
    if sign_of(cost) < 0:
        return "a loss"
    if cost.high < MARGIN:
        return f"no gain larger than {100 * cost.high:.1f} points was found"
    return f"open: a gain of up to {100 * cost.high:.1f} points is possible"


def _reading(beyond: Interval) -> str:
    """Return what the control says."""
    if sign_of(beyond) > 0:
        return "the distance alone does not explain it"
    if beyond.high < MARGIN:
        return (
            "whose demonstrations they were costs no more than "
            f"{100 * max(0.0, beyond.high):.1f} points beyond the distance"
        )
    return "it is open whether the distance explains it"


def _details(figures: Figures) -> tuple[str, ...]:
    pairs: list[tuple[Arm, Arm | None]] = [(arm, None) for arm in (SFT_A, SFT_B, SFT_WEAK)]
    for grid in (OFFLINE, ONLINE):
        # Compared within an OPD teacher, from whom the reverse KL is measured too.
        for opd in "ab":
            own = grid[opd + opd]
            other = grid[("b" if opd == "a" else "a") + opd]
            pairs += [(own, None), (other, own)]
    pairs.append((WEAK, OFFLINE["ba"]))
    return (
        teachers_text(figures),
        "The reverse KL of an SFT student is that from its own teacher, of a distilled one that "
        "from its OPD teacher. The last column compares with the line of the same OPD teacher and "
        "of one teacher for both; the weaker SFT is compared with SFT by B.",
        table_of_pairs(figures, pairs, "difference"),
        _other_measures(figures),
        "What could overturn this: one student and one task of arithmetic, in a model of 750,000 "
        "parameters with 32 tokens. The teachers differ in one choice of a token, five times a "
        "response, and each knows the other's notation. Teachers that do not know each other's "
        "way of writing, or that differ in what they reason, may cost more.",
    )


def _other_measures(figures: Figures) -> str:
    """Return sentences about what the verdict does not use."""

    def gain(arm: Arm, other: Arm) -> str:
        return words(figures.difference(arm.name, other.name, "sampled"), "sampled")

    greedy, kl = (
        [consistency(figures, metric, grid) for grid in (OFFLINE, ONLINE)]
        for metric in ("greedy", "reverse_kl")
    )
    return (
        f"One teacher against two in greedy: {words(greedy[0], 'greedy')} offline, "
        f"{words(greedy[1], 'greedy')} online. In reverse KL: "
        f"{shown(kl[0], 'reverse_kl', sign=True)} and {words(kl[1], 'reverse_kl')} (below 0: "
        "nearer to the teacher). The distance alone, which is SFT by A minus the weaker SFT by A "
        f"after both were distilled from A: {gain(OFFLINE['aa'], WEAK)} at T=1. The distillation "
        f"from A gave SFT by B {gain(OFFLINE['ba'], SFT_B)}, and the weaker SFT by A "
        f"{gain(WEAK, SFT_WEAK)}."
    )


def teachers_text(figures: Figures) -> str:
    """Return sentences about the two teachers."""
    # It is the same for all seeds.
    measured = next(iter(figures.recorded(SFT_A.name, MEASURED_MODELS).values()))
    a = measured["teacher_a_by_teacher_b"]
    b = measured["teacher_b_by_teacher_a"]
    base = measured["two_notations_by_teacher_a"]
    return (
        f"At T=1 teacher A is right in {100 * a['sampled']:.1f}% and teacher B in "
        f"{100 * b['sampled']:.1f}% of the held-out problems (greedy {100 * a['greedy']:.1f}% and "
        f"{100 * b['greedy']:.1f}%), the base student in {100 * base['sampled']:.1f}%. The reverse "
        f"KL of A from B is {_distance(a)}, of B from A {_distance(b)}, of the base student from A "
        f"{_distance(base)}."
    )


def _distance(measured: Mapping[str, float]) -> str:
    kl = measured["reverse_kl"]
    return f"{kl:.4f} nats per token ({kl * measured['tokens']:.2f} a response)"


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
