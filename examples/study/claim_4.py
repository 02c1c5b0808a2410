"""Claim 4: frozen rollouts hold a long training near the SFT policy."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import fmean

from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    LIGHTNING,
    SCORED,
    Answer,
    Arm,
    Claim,
    Command,
    Place,
    Plot,
    Verdict,
)
from examples.study.figures import Figures, Interval, MissingFigures, change, interval_of
from examples.study.outcomes import sign_of
from examples.study.plots import draw_points
from examples.study.tables import Table
from examples.study.wording import shown, words

# HABIT distils for 16 steps. 80 are five times as many.
USUAL = 16
POINTS = (16, 48, 80)
LONG = f"distill.num_steps={POINTS[-1]}"
_KEPT = ("distill.checkpoint_every=16", "distill.keep_checkpoints=5")
ONLINE = ("distill.refresh.every=1", "distill.refresh.keep_teacher=true")
# Figures of gradient_gap.py with what a table calls them, and how many significant digits they get.
GAP_COLUMNS = {
    "fresh_norm": "length of the fresh gradient",
    "frozen_norm": "of the frozen one",
    "gap": "gap of the two",
    "gap_squared": "its square, unbiased",
    "bound": "bound of the gap",
    "sequence_chi_square": "chi-square of responses",
    "chi_square": "chi-square of tokens",
    "effective_sample_share": "effective sample share",
    "pull": "pull towards the SFT student",
}


def long_training(name: str, title: str, *overrides: str) -> Arm:
    """Return a distillation of 80 steps with the paper's update, whose checkpoints are kept."""
    return Arm(
        name=name,
        title=title,
        setting=HABIT,
        commands=lambda place: (("lopd", "distill", *LIGHTNING, LONG, *_KEPT, *overrides),),
        copied=SCORED,
    )


def _exported(arm: Arm, step: int, place: Place) -> tuple[Command, ...]:
    run = str(place.of(arm.name))
    return (("python", "one_rank", run, str(step), str(place.run / "model")),)


def point_of(arm: Arm, name: str, title: str, step: int) -> Arm:
    """Return the model of a checkpoint of an arm."""
    return Arm(
        name=name,
        title=title,
        setting=HABIT,
        commands=partial(_exported, arm, step),
        # kl_from_sft is measured against the SFT student of the run.
        copied=((HABIT_SFT.name, "sft"),),
        after=(arm.name,),
        model="model",
    )


OFFLINE_80 = long_training("c4_offline_80", "Lightning OPD, frozen rollouts, 80 steps")
ONLINE_80 = long_training(
    "c4_online_80", "standard OPD, fresh rollouts each step, 80 steps", *ONLINE
)
OFFLINE_48 = point_of(OFFLINE_80, "c4_offline_48", "the same, after 48 steps", 48)
ONLINE_48 = point_of(ONLINE_80, "c4_online_48", "the same, after 48 steps", 48)
ONLINE_16 = point_of(ONLINE_80, "c4_online_16", "the same, after 16 steps", 16)
# The rate is constant, so the first 16 steps of the long training are the usual training.
OFFLINE = {16: HABIT_LIGHTNING.name, 48: OFFLINE_48.name, 80: OFFLINE_80.name}
FRESH = {16: ONLINE_16.name, 48: ONLINE_48.name, 80: ONLINE_80.name}

# What gradient_control.py writes into the run of GAP.
CONTROL = "control.json"


def _gap(place: Place) -> tuple[Command, ...]:
    sft = place.of(HABIT_SFT.name) / "sft" / "model"
    models = {
        # The control: here both sets are the SFT student's, so the gap must be 0 within its noise.
        0: sft,
        16: place.of(HABIT_LIGHTNING.name) / "distill" / "model",
        48: place.of(OFFLINE_48.name) / "model",
        80: place.of(OFFLINE_80.name) / "distill" / "model",
    }
    named = tuple(f"{step}={model}" for step, model in models.items())
    about = (str(place.seed), str(place.run), str(sft), *named)
    return (("python", "gradient_gap", *about), ("python", "gradient_control", *about))


GAP = Arm(
    name="c4_gap",
    title="gradients on frozen and on fresh rollouts",
    setting=HABIT,
    commands=_gap,
    after=(HABIT_SFT.name, HABIT_LIGHTNING.name, OFFLINE_48.name, OFFLINE_80.name),
    model="",
)


def judge(figures: Figures) -> Verdict:
    """Compare the KL from the SFT student of both trainings at each point."""
    kl = {step: figures.difference(OFFLINE[step], FRESH[step], "kl_from_sft") for step in POINTS}
    last = kl[POINTS[-1]]
    sign = sign_of(last)
    answer: Answer
    if sign < 0:
        answer = "holds"
        found = "frozen rollouts keep the student nearer to its SFT policy"
    elif sign > 0:
        answer = "does not hold"
        found = "frozen rollouts let the student go further from its SFT policy"
    else:
        answer = "open"
        found = "no difference of the distance from the SFT policy is shown"
    growth = {
        name: change(figures, "kl_from_sft", arms[POINTS[-1]], arms[USUAL])
        for name, arms in (("frozen", OFFLINE), ("fresh", FRESH))
    }
    accuracy = figures.difference(OFFLINE[80], FRESH[80], "sampled")
    reverse = figures.difference(OFFLINE[80], FRESH[80], "reverse_kl")
    summary = (
        f"After 80 steps {found}: frozen minus fresh is {words(last, 'kl_from_sft')}. From 16 to "
        f"80 steps this KL changes by {words(growth['frozen'], 'kl_from_sft')} with frozen "
        f"rollouts and by {words(growth['fresh'], 'kl_from_sft')} with fresh ones. At 80 steps "
        f"frozen minus fresh is {words(accuracy, 'sampled')} at T=1 and "
        f"{words(reverse, 'reverse_kl')} of reverse KL to the teacher."
    )
    return Verdict(
        answer=answer,
        summary=summary,
        details=(
            _table(figures),
            _by_step(figures),
            _gaps(figures),
            *_exchanges(figures),
            _LIMITS,
        ),
        plots=(Plot("study_4.svg", _CAPTION, partial(_draw, figures)),),
    )


def _table(figures: Figures) -> str:
    titles = {HABIT_SFT.name: HABIT_SFT.title}
    for step in POINTS:
        titles[OFFLINE[step]] = f"frozen rollouts, {step} steps"
        titles[FRESH[step]] = f"fresh rollouts at every step, {step} steps"
    return Table(titles, HABIT_SFT.name, "SFT student").markdown(figures)


def _by_step(figures: Figures) -> str:
    """Return the differences at each point."""
    lines = [
        "| steps | frozen minus fresh: KL from SFT | reverse KL | T=1, points | greedy, points |",
        "|---:|---:|---:|---:|---:|",
    ]
    for step in POINTS:
        cells = [
            shown(figures.difference(OFFLINE[step], FRESH[step], metric), metric, sign=True)
            for metric in ("kl_from_sft", "reverse_kl", "sampled", "greedy")
        ]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gaps(figures: Figures) -> str:
    """Return the gaps of the gradients along the training on frozen rollouts."""
    try:
        columns = {name: _by_point(figures, name) for name in GAP_COLUMNS}
    except MissingFigures:
        return "The gap of the gradients: not measured."
    heads = " | ".join([*GAP_COLUMNS.values(), "gap over bound"])
    lines = [f"| steps | {heads} |", f"|---:|{'---:|' * (len(GAP_COLUMNS) + 1)}"]
    for step in sorted(columns["gap"]):
        cells = [_plain(interval_of(columns[name].get(step, []))) for name in GAP_COLUMNS]
        pairs = zip(columns["gap"][step], columns["bound"][step], strict=True)
        # Before the first step both are 0 but for noise.
        ratios = [gap / bound for gap, bound in pairs if bound > 0] if step else []
        cells.append(_plain(interval_of(ratios)) if len(ratios) > 1 else "")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return f"{_GAP_TEXT}\n\n" + "\n".join(lines)


def _exchanges(figures: Figures) -> list[str]:
    """Return how large the square of the gap would be by chance, as far as it was measured."""
    try:
        of_seeds = [*figures.recorded(GAP.name, CONTROL).values()]
    except MissingFigures:
        return []
    lines = [
        "| steps | square of the gap | its standard deviation by exchange | in such deviations | "
        "share of exchanges as far from 0, of each seed |",
        "|---:|---:|---:|---:|---:|",
    ]
    for step in of_seeds[0]:
        found = [of[step] for of in of_seeds]
        mean = fmean(one["gap_squared"] for one in found)
        deviation = math.sqrt(sum(one["deviation"] ** 2 for one in found)) / len(found)
        shares = ", ".join(f"{one['share_as_large']:.2f}" for one in found)
        cells = (str(step), f"{mean:.3g}", f"{deviation:.2g}", f"{mean / deviation:.1f}", shares)
        lines.append(f"| {' | '.join(cells)} |")
    return [_EXCHANGE_TEXT, "\n".join(lines)]


def _plain(interval: Interval) -> str:
    return f"{interval.mean:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def _by_point(figures: Figures, metric: str) -> dict[int, list[float]]:
    """Return the values of a metric of the gap by step, in the order of the seeds."""
    by_point: dict[int, list[float]] = {}
    for _, values in sorted(figures.steps(GAP.name, metric).items()):
        for step, value in values:
            by_point.setdefault(step, []).append(value)
    return by_point


_GAP_TEXT = (
    "Both gradients are those of the trainer with the paper's loss, at the weights of the training "
    "on frozen rollouts, on 500 held-out prompts. The fresh responses are the model's own, the "
    "frozen ones the SFT student's. Lengths are free of the noise of the responses: they come from "
    "products of two halves of the prompts. A length is 0 where such a product is negative, so the "
    "square of the gap is the unbiased figure. After 0 steps both sets are the SFT student's, and "
    "the expectation of that square is 0 (see the table below this one). The bound is the root "
    "mean square length of one response's gradient times the root of the chi-square of responses. "
    "The paper's bound has G sigma_A in place of that root mean square, where G is a largest value "
    "that no sample gives: it is not measured. G sigma_A is at least as large, so the paper's "
    "bound is at least as wide. The pull is how much more the frozen update points back to the SFT "
    "student's weights than the fresh one, in the unit of the gradients. Without a pull above 0, a "
    "KL that stays small is no work of the covariance term."
)
_EXCHANGE_TEXT = (
    "How large that square is by chance: the frozen and the fresh response of prompts are "
    "exchanged at random, which makes its expectation 0 and leaves its noise. The means are over "
    "the seeds. The row of 0 steps is the control, where any distance from 0 is chance: beyond 2 "
    "deviations is one chance in 20. The interval of a square in the table above is that of the "
    "seeds alone and does not hold this noise, so the control may lie outside of its own. A row "
    "below 3 deviations shows no gap, and where most seeds have a share above 0.05 only their mean "
    "shows one."
)
_CAPTION = "KL from the SFT student over the steps, with frozen and with fresh rollouts."
_LIMITS = (
    "What could overturn this: one student of 750 thousand parameters, one task of arithmetic with "
    "32 tokens, one learning rate (1e-4, constant), and 512 prompts, which frozen rollouts repeat "
    "ten times in 80 steps while fresh ones are new responses to the same prompts. A student that "
    "learns less also stays nearer to its SFT policy: read the KL beside the reverse KL to the "
    "teacher."
)


def _draw(figures: Figures, path: Path) -> None:
    curves = {
        name: {step: figures.mean(arms[step], "kl_from_sft") for step in POINTS}
        for name, arms in (("frozen rollouts", OFFLINE), ("fresh rollouts", FRESH))
    }
    label = "KL from the SFT student, nats per token"
    draw_points(path, curves, "steps of 64 responses", label)


CLAIM = Claim(
    number=4,
    title="Frozen rollouts hold the student near its SFT policy, also over a long training.",
    source="Lightning OPD (arXiv 2604.13010): implicit regularisation by the covariance term",
    method=(
        "The student with a bad habit is distilled for 80 steps in place of 16, with the paper's "
        "update, on frozen rollouts and on fresh ones at every step. Of each training three points "
        "are measured, and along the one on frozen rollouts the gradients on both kinds of "
        "rollouts at the same weights."
    ),
    arms=(HABIT_SFT, HABIT_LIGHTNING, OFFLINE_80, ONLINE_80, OFFLINE_48, ONLINE_16, ONLINE_48, GAP),
    judge=judge,
)
