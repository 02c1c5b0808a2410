"""Claim 7: which signal when, over rollouts that grow stale."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from examples.study.arms import (
    HABIT_LIGHTNING,
    HABIT_SFT,
    HABIT_TOP_K,
    Answer,
    Claim,
    Plot,
    Verdict,
)
from examples.study.claim_4 import OFFLINE_80, ONLINE_80
from examples.study.figures import Figures, Interval, change
from examples.study.outcomes import MARGIN, sign_of
from examples.study.plots import draw_points
from examples.study.signals import (
    AFTER_SFT,
    CAP_80,
    FEW,
    FORWARD_16,
    FORWARD_80,
    GENERALISED_80,
    ONLY_LATE,
    PREFIX_16,
    SHORT,
    SMALL_ARMS,
    STALE,
    TOP_K_80,
)
from examples.study.tables import Table, mean_of_steps
from examples.study.wording import shown, words


def _robust(figures: Figures) -> tuple[Answer, str]:
    """Say whether the forward KL loses less than the reverse KL where rollouts grow stale."""
    forward = change(figures, "reverse_kl", FORWARD_80.name, FORWARD_16.name)
    reverse = change(figures, "reverse_kl", TOP_K_80.name, HABIT_TOP_K.name)
    between = change(
        figures,
        "reverse_kl",
        FORWARD_80.name,
        FORWARD_16.name,
        of=TOP_K_80.name,
        early_of=HABIT_TOP_K.name,
    )
    late = figures.difference(FORWARD_80.name, TOP_K_80.name, "sampled")
    # Robust means two things: less is lost on the way, and nothing is behind at its end.
    if sign_of(between) < 0 and late.high >= 0:
        answer: Answer = "holds"
        verb = "agrees with"
    elif sign_of(between) > 0 or late.high < 0:
        answer = "does not hold"
        verb = "disagrees with"
    else:
        answer = "open"
        verb = "neither agrees nor disagrees with"
    return answer, (
        f"On the direction of the KL this {verb} AsyncOPD (2606.24143): from 2 to 10 passes over "
        f"frozen rollouts the reverse KL to the teacher changes by {words(forward, 'reverse_kl')} "
        f"with the forward KL and by {words(reverse, 'reverse_kl')} with the reverse KL "
        f"(difference {words(between, 'reverse_kl')}), and after 80 steps forward minus reverse is "
        f"{words(late, 'sampled')} at T=1."
    )


def _recomputed(figures: Figures) -> tuple[Answer, str]:
    """Say whether importance weights improve on the advantage under the current student."""
    accuracy = figures.difference(CAP_80.name, OFFLINE_80.name, "sampled")
    reverse = figures.difference(CAP_80.name, OFFLINE_80.name, "reverse_kl")
    gains = _gains(accuracy, reverse)
    if gains:
        answer: Answer = "does not hold"
        verb = "disagrees with"
    elif accuracy.high <= MARGIN:
        answer = "holds"
        verb = "agrees with"
    else:
        answer = "open"
        verb = "neither agrees nor disagrees with"
    return answer, (
        f"On corrections it {verb} AsyncOPD: importance weights (cap 2) minus the plain update, "
        "whose advantage is computed under the current student in any case, is "
        f"{words(accuracy, 'sampled')} at T=1 and {words(reverse, 'reverse_kl')} of reverse KL "
        "after 80 steps."
    )


def _gains(accuracy: Interval, reverse: Interval) -> bool:
    """Return whether a model is better in one figure and not worse in the other."""
    better = (sign_of(accuracy) > 0, sign_of(reverse) < 0)
    worse = (sign_of(accuracy) < 0, sign_of(reverse) > 0)
    return any(better) and not any(worse)


def judge(figures: Figures) -> Verdict:
    """Judge the two statements of AsyncOPD, and show all signals."""
    parts = [_robust(figures), _recomputed(figures)]
    answers = {answer for answer, _ in parts}
    joint: Answer = "open"
    if "does not hold" in answers:
        joint = "does not hold"
    elif answers == {"holds"}:
        joint = "holds"
    return Verdict(
        answer=joint,
        summary=" ".join(text for _, text in parts),
        details=(
            _few_passes(figures),
            _many_passes(figures),
            _staleness(figures),
            _small(figures),
            _LIMITS,
        ),
        plots=(Plot("study_7.svg", _CAPTION, partial(_draw, figures)),),
    )


def _few_passes(figures: Figures) -> str:
    titles = {
        HABIT_SFT.name: HABIT_SFT.title,
        **{early: name for name, (early, _) in STALE.items()},
        **{arm.name: arm.title for arm in (PREFIX_16, SHORT, FEW, AFTER_SFT)},
    }
    table = Table(titles, HABIT_LIGHTNING.name, "sampled token").markdown(figures)
    return f"The student with a bad habit after 16 steps (2 passes over its rollouts):\n\n{table}"


def _many_passes(figures: Figures) -> str:
    titles = {**{late: name for name, (_, late) in STALE.items()}}
    titles |= {arm: name for name, arm in ONLY_LATE.items()}
    table = Table(titles, OFFLINE_80.name, "sampled token").markdown(figures)
    return f"The same after 80 steps (10 passes over the same rollouts):\n\n{table}"


def _staleness(figures: Figures) -> str:
    """Return what staleness does to each signal, and how stale the rollouts have become."""
    lines = [
        "| signal | 80 minus 16 steps: T=1, points | greedy, points | reverse KL "
        "| chi-square of tokens, last 8 steps | effective sample share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (early, late) in STALE.items():
        cells = [
            shown(change(figures, metric, late, early), metric, sign=True)
            for metric in ("sampled", "greedy", "reverse_kl")
        ]
        cells += [
            mean_of_steps(figures, late, metric, slice(-8, None))
            for metric in ("chi_square", "effective_sample_share")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "What more passes over the same rollouts do:\n\n" + "\n".join(lines)


def _small(figures: Figures) -> str:
    titles = {arm: title for arm, title in SMALL_ARMS.items() if figures.has(arm, "greedy")}
    if not titles:
        return "The small student (docs/small_student.md): not measured."
    missing = [title for arm, title in SMALL_ARMS.items() if arm not in titles]
    table = Table(titles, "small/sft", "SFT", metrics=("greedy", "sampled")).markdown(figures)
    note = f"\n\nNot measured: {'; '.join(missing)}." if missing else ""
    return f"The small student (docs/small_student.md), 64 steps of 256:\n\n{table}{note}"


_CAPTION = "Reverse KL to the teacher after 16 and after 80 steps on the same rollouts, by signal."
_LIMITS = (
    "What could overturn this: staleness is here the number of passes over one set of rollouts, "
    "while the rollouts of AsyncOPD lag behind by a number of updates and are used once. So the "
    "same prompts also return, and a signal that learns the prompts by heart would look robust. "
    "The cache has 8 of 32 tokens of the vocabulary, nearly the whole distribution. AsyncOPD's "
    "caches have a much smaller share, and its statement on Monte Carlo estimates is not tested. "
    "All signals have one learning rate (1e-4), which was chosen for the sampled token and the "
    "reverse KL. One student of 750 thousand parameters, one task of arithmetic."
)


def _draw(figures: Figures, path: Path) -> None:
    curves = {
        name: {
            step: figures.mean(arm, "reverse_kl") for step, arm in zip((16, 80), arms, strict=True)
        }
        for name, arms in STALE.items()
    }
    label = "reverse KL to the teacher, nats per token"
    draw_points(path, curves, "steps of 64 responses, on the same 512 rollouts", label)


CLAIM = Claim(
    number=7,
    title=(
        "Where rollouts grow stale the forward KL is the robust signal, and the advantage under "
        "the current student needs no correction by importance weights."
    ),
    source="AsyncOPD (arXiv 2606.24143); prefixes: arXiv 2606.22600; generalised KL: 2606.30406",
    method=(
        "The student with a bad habit is distilled with each signal from the same 512 rollouts, "
        "for 16 and for 80 steps of 64, so that the rollouts grow stale under the student. Prefix, "
        "horizon, number of rollouts and number of SFT steps are varied at 16 steps. The runs of "
        "the small student give a second setting."
    ),
    arms=(
        HABIT_SFT,
        HABIT_LIGHTNING,
        HABIT_TOP_K,
        FORWARD_16,
        TOP_K_80,
        FORWARD_80,
        GENERALISED_80,
        CAP_80,
        PREFIX_16,
        FEW,
        SHORT,
        AFTER_SFT,
    ),
    judge=judge,
    reads=(OFFLINE_80.name, ONLINE_80.name, *SMALL_ARMS),
)
